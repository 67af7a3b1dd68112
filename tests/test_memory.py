"""Memory of a video: attention as SAM 2 computes it, and how many key frames it looks at."""

import copy
import itertools
import random

import numpy as np
import pytest
import torch
from conftest import GOLDEN, Prescribed
from sam2.modeling.memory_attention import MemoryAttention, MemoryAttentionLayer
from sam2.modeling.sam.transformer import RoPEAttention
from sam2.modeling.sam2_utils import select_closest_cond_frames
from transformers import AutoModel

from sa2va import Sa2VAChatConfig, modeling_sa2va, sam2_decoder
from sa2va.configuration_sa2va import Sa2VAGroundingConfig
from sa2va.sam2_decoder import BLOCK_SIZE, FrameFeatures, FrameMemory, MemoryBank, _attend_in_blocks, _attend_in_rows

KEY_FRAMES = (3, 5, 6, 11)

# -------------------------------------------------------------------------------------------------------- attention


@pytest.fixture(scope="module")
def attention(golden_model):
    """The memory attention of the golden checkpoint, and `sam2`'s own with the same weights."""
    ours, config = golden_model.grounding_encoder.sam2_model.memory_attention, golden_model.config.grounding_config
    settings = {"embedding_dim": config.d_model, "num_heads": 1, "feat_sizes": (8, 8)}
    layer = MemoryAttentionLayer(
        activation="relu",
        dim_feedforward=config.memory_attention_dim_feedforward,
        dropout=0.0,
        pos_enc_at_attn=False,
        self_attention=RoPEAttention(**settings),
        d_model=config.d_model,
        pos_enc_at_cross_attn_keys=True,
        pos_enc_at_cross_attn_queries=False,
        cross_attention=RoPEAttention(**settings, rope_k_repeat=True, kv_in_dim=config.mem_dim),
    )
    theirs = MemoryAttention(config.d_model, True, layer, config.memory_attention_layers).eval()
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs, config


def memories(config, objects, maps, tokens, side=8):
    """One frame, and random memories of so many maps and tokens of object pointers."""
    generator = torch.Generator().manual_seed(0)
    length = side * side * maps + tokens
    return {
        "curr": torch.randn(side * side, 1, config.d_model, generator=generator),
        "curr_pos": torch.randn(side * side, 1, config.d_model, generator=generator),
        "memory": torch.randn(length, objects, config.mem_dim, generator=generator),
        "memory_pos": torch.randn(length, 1, config.mem_dim, generator=generator),
        "num_obj_ptr_tokens": tokens,
    }


def row_for_each(inputs):
    objects = inputs["memory"].shape[1]
    return {k: v.expand(-1, objects, -1) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize(("objects", "maps", "tokens"), [(1, 1, 0), (3, 2, 12), (2, 3, 200)])
def test_a_frame_taken_once_gives_what_sam2_computes_for_each_object(attention, objects, maps, tokens, gradients):
    ours, theirs, config = attention
    inputs = memories(config, objects, maps, tokens)
    with torch.set_grad_enabled(gradients):  # two ways to compute the same
        torch.testing.assert_close(ours(**inputs), theirs(**row_for_each(inputs)), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("tokens", [0, 12])
def test_maps_larger_than_a_block_give_the_same(attention, tokens, gradients):
    ours, theirs, config = attention
    inputs = memories(config, objects=2, maps=2, tokens=tokens, side=40)
    inputs["memory"].requires_grad_(gradients)
    with torch.set_grad_enabled(gradients):
        found, wanted = ours(**inputs), theirs(**row_for_each(inputs))
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    if gradients:
        slopes = [torch.autograd.grad(output.square().sum(), inputs["memory"])[0] for output in (found, wanted)]
        torch.testing.assert_close(*slopes, atol=1e-4, rtol=1e-3)


def test_a_block_of_far_lower_scores_takes_nothing_from_those_before_it():
    query, keys = torch.full((2, 4), 10.0), torch.full((2 * BLOCK_SIZE, 4), 10.0)
    keys[BLOCK_SIZE:] *= -1  # exp of the difference is more than float32 can hold
    values = torch.arange(2.0 * BLOCK_SIZE).unsqueeze(1)
    wanted = torch.full((2, 1), values[:BLOCK_SIZE].mean())
    torch.testing.assert_close(_attend_in_blocks(query, [keys], values), wanted)


@torch.no_grad()
@pytest.mark.parametrize("side", [8, 40])  # of maps smaller and larger than a block
def test_memory_attention_drops_out_in_training_only(attention, side):
    ours, _, config = attention
    inputs = memories(config, objects=2, maps=2, tokens=12, side=side)
    layers = copy.deepcopy(ours).train()
    for module in layers.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for layer in layers.layers:
        layer.self_attn.dropout_p = 0.0  # what is left is that of attention to memories
    assert not torch.equal(layers(**inputs), layers(**inputs))
    assert torch.equal(layers.eval()(**inputs), layers(**inputs))


def test_the_first_layer_attends_to_the_frame_once_for_all_objects(attention):
    ours, _, config = attention
    rows = []
    hooks = [layer.self_attn.register_forward_hook(lambda m, args, out: rows.append(len(out))) for layer in ours.layers]
    with torch.no_grad():
        ours(**memories(config, objects=3, maps=1, tokens=4))
    for hook in hooks:
        hook.remove()
    assert rows == [1] + [3] * (len(hooks) - 1)


def test_rows_attended_to_one_after_another_give_the_same():
    q, k, v = torch.randn(1, 6, 8).expand(3, -1, -1), torch.randn(3, 20, 8), torch.randn(3, 20, 8)
    wanted = _attend_in_rows(q, k, v, 0.0, step=3)
    for step in (1, 2):
        torch.testing.assert_close(_attend_in_rows(q, k, v, 0.0, step), wanted)


def test_position_encodings_are_there_before_the_image_encoder_needs_them(golden_model):
    """Made by a compiled encoder they would be its outputs, which the next call of a CUDA graph overwrites."""
    decoder = copy.deepcopy(golden_model.grounding_encoder)
    encoder, side, seen = decoder.sam2_model.image_encoder, decoder.config.image_size, []
    cache = encoder.neck.position_encoding.cache
    cache.clear()
    encoder.register_forward_pre_hook(lambda *_: seen.append(set(cache)))
    with torch.no_grad():
        decoder.encode(torch.zeros(1, 3, side, side))
    assert seen == [set(cache)]


@pytest.mark.parametrize("family", ["ivl_qwen2", "sa2vai_qwen2"])
def test_more_frames_than_attention_takes_are_encoded_apart(family, monkeypatch):
    with torch.device("meta"):
        assert sam2_decoder.Sam2Decoder(Sa2VAGroundingConfig()).most_frames == 63  # of 1024 windows each
    decoder = AutoModel.from_pretrained(GOLDEN / family, dtype=torch.float32).eval().grounding_encoder
    frames = torch.randn(5, 3, decoder.config.image_size, decoder.config.image_size)
    with torch.no_grad():
        together = decoder.encode(frames)
        monkeypatch.setattr(decoder, "most_frames", 2)
        apart = decoder.encode(frames)
    torch.testing.assert_close(tuple(apart), tuple(together), atol=1e-4, rtol=1e-4)


def test_memory_that_torch_keeps_for_later_counts_as_free(golden_model, monkeypatch):
    decoder = copy.deepcopy(golden_model.grounding_encoder)
    decoder.config.image_size = 1024
    monkeypatch.setattr(modeling_sa2va, "_execution_device", lambda module: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2 * 2**30, 24 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 10 * 2**30)
    for reserved, count in ((10, 1), (20, 4)):
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device, gigabytes=reserved: gigabytes * 2**30)
        assert modeling_sa2va._encode_batch_size(decoder) == count


# ------------------------------------------------------------------------------------------------- how many key frames


@pytest.fixture
def limited(golden_model, monkeypatch):
    """Sets the limit on the loaded model for a test."""
    config = golden_model.config.grounding_config
    return lambda limit: monkeypatch.setattr(config, "max_cond_frames_in_attn", limit)


@pytest.mark.parametrize("limit", [-1, 2, 3, 4, 9])
def test_key_frames_are_chosen_as_sam2_chooses(limit):
    for seed in range(20):
        frames = random.Random(seed).sample(range(30), 6)
        bank = MemoryBank(7, 16, limit, conditioning=dict.fromkeys(frames))
        for frame in range(30):
            assert bank.chosen(frame) == sorted(select_closest_cond_frames(frame, bank.conditioning, limit)[0])


def test_a_limit_of_one_takes_the_closest():
    bank = MemoryBank(7, 16, 1, conditioning=dict.fromkeys(KEY_FRAMES))
    assert [bank.chosen(frame) for frame in (0, 4, 7, 10, 20)] == [[3], [3], [6], [11], [11]]


@pytest.mark.parametrize("step", [1, -1])
def test_a_bank_keeps_what_later_frames_look_at_and_no_more(step):
    bank = MemoryBank(num_maskmem=7, max_object_pointers=16)
    for number in range(30):
        bank.add(step * number, FrameMemory(torch.zeros(1), torch.zeros(1)))
    assert list(bank.recent) == [step * number for number in range(15, 30)]
    assert [t for t, memory in bank.recent.items() if memory.features is not None] == [step * n for n in range(24, 30)]


def test_a_frame_may_look_at_maps_without_pointers(golden_model, remembered):
    """The closest key frame is yet to come, and pointers of tracked frames are not wanted."""
    frame, memory, position = remembered
    bank = MemoryBank(7, 1, 1, position, conditioning={t: memory[t] for t in (3, 8)})
    bank.add(6, memory[6])
    assert bank.chosen(7) == [8] and bank.pointers(7, reverse=False) == []
    with torch.no_grad():
        fused = golden_model.grounding_encoder._attend(frame, bank, 7, reverse=False)
    assert fused.shape == (2, *frame.vision_features.shape[1:])


@pytest.fixture(scope="module")
def remembered(golden_model):
    """Features of a frame, and random memories of two objects in 20 frames, four of them key frames."""
    config = golden_model.config.grounding_config
    side, generator = config.image_size // 16, torch.Generator().manual_seed(0)

    def noise(*shape):
        return torch.randn(*shape, generator=generator)

    frame = FrameFeatures(noise(1, config.d_model, side, side), noise(1, config.d_model, side, side), None, None)
    memory = {t: FrameMemory(noise(side * side, 2, config.mem_dim), noise(2, config.d_model)) for t in range(20)}
    return frame, memory, noise(side * side, 1, config.mem_dim)


def as_sam2_keeps_it(memory, position, side):
    def as_map(tokens):
        return tokens.permute(1, 2, 0).unflatten(-1, (side, side))

    position = as_map(position).expand(2, -1, -1, -1)
    return {
        "maskmem_features": as_map(memory.features),
        "maskmem_pos_enc": [position],
        "obj_ptr": memory.object_pointers,
    }


@pytest.mark.parametrize("pointers", [16, 4, 1])
@pytest.mark.parametrize(("limit", "reverse"), itertools.product([-1, 2, 3], [False, True]))
def test_memory_is_put_together_as_sam2_does(golden_model, remembered, monkeypatch, limit, reverse, pointers):
    frame, memory, position = remembered
    decoder, sam2 = golden_model.grounding_encoder, golden_model.grounding_encoder.sam2_model
    monkeypatch.setattr(sam2, "max_cond_frames_in_attn", limit)
    monkeypatch.setattr(sam2, "max_obj_ptrs_in_encoder", pointers)
    index, passed = (2, range(19, 2, -1)) if reverse else (8, range(8))
    bank = MemoryBank(sam2.num_maskmem, sam2.max_obj_ptrs_in_encoder, limit, position)
    bank.conditioning = {t: memory[t] for t in KEY_FRAMES}
    for t in (t for t in passed if t not in KEY_FRAMES):
        bank.add(t, memory[t])
    side = frame.vision_features.shape[-1]
    kept = {t: as_sam2_keeps_it(m, position, side) for t, m in memory.items()}
    tokens = [x.flatten(2).permute(2, 0, 1).expand(-1, 2, -1) for x in (frame.vision_features, frame.vision_pos_embeds)]
    with torch.no_grad():
        wanted = sam2._prepare_memory_conditioned_features(
            frame_idx=index,
            is_init_cond_frame=False,
            current_vision_feats=tokens[:1],
            current_vision_pos_embeds=tokens[1:],
            feat_sizes=[(side, side)],
            output_dict={
                "cond_frame_outputs": {t: kept[t] for t in KEY_FRAMES},
                "non_cond_frame_outputs": {t: kept[t] for t in passed if t not in KEY_FRAMES},
            },
            num_frames=20,
            track_in_reverse=reverse,
        )
        torch.testing.assert_close(decoder._attend(frame, bank, index, reverse), wanted, atol=1e-5, rtol=1e-4)


@pytest.fixture(scope="module")
def arguments(golden_processor, clip):
    """A stream with four key frames: one frame before them, one between, two behind."""
    ids = golden_processor.tokenizer("[SEG] and [SEG]<|im_end|>").input_ids
    small = [frame.resize((40, 30)) for frame in clip]
    answer = {"text": "all", "frame_sampling": [1, 2, 4, 5], "logits_processor": [Prescribed(ids)]}
    return {"video": small, "return_raw_masks": True, **answer}


def masks_of(model, arguments):
    return np.stack([frame.masks for frame in model.predict_stream(**arguments)])


def test_a_limit_set_on_a_loaded_model_holds_at_once_and_only_if_there_are_more(golden_model, arguments, limited):
    without = masks_of(golden_model, arguments)
    limited(4)
    np.testing.assert_array_equal(masks_of(golden_model, arguments), without)
    limited(1)
    changed = [
        bool(np.abs(a - b).max() > 1e-6) for a, b in zip(masks_of(golden_model, arguments), without, strict=True)
    ]
    assert changed == [t not in (1, 2, 4, 5) for t in range(8)]


def test_a_saved_state_goes_on_with_the_limit(golden_model, arguments, limited):
    limited(2)
    whole = masks_of(golden_model, arguments)
    stream = golden_model.predict_stream(**arguments)
    state = [stream.state() for _, _ in zip(range(4), stream, strict=False)][-1]
    rest = golden_model.predict_stream(video=arguments["video"], resume=state, return_raw_masks=True)
    np.testing.assert_allclose(np.stack([frame.masks for frame in rest]), whole[4:], atol=1e-5)


@pytest.mark.parametrize("limit", [0, -2, 10**5, 1.5])
def test_a_limit_that_is_no_number_of_frames_is_refused(limit):
    with pytest.raises(ValueError, match="max_cond_frames_in_attn"):
        Sa2VAChatConfig.from_dict({"grounding_config": {"max_cond_frames_in_attn": limit}})


def test_all_key_frames_are_looked_at_unless_the_config_says_otherwise(tmp_path):
    assert Sa2VAGroundingConfig().max_cond_frames_in_attn == -1
    Sa2VAChatConfig(grounding_config={"max_cond_frames_in_attn": 3}).save_pretrained(tmp_path)
    assert Sa2VAChatConfig.from_pretrained(tmp_path).grounding_config.max_cond_frames_in_attn == 3


@pytest.mark.parametrize(("family", "alike"), [("ivl_qwen2", range(6)), ("sa2vai_qwen2", range(3, 6))])
def test_training_follows_objects_as_prediction_does(family, alike):
    """Of Sa2VA-i only tracked frames: in training its key frames are what the prompted decoder says, not cut out."""
    decoder = AutoModel.from_pretrained(GOLDEN / family, dtype=torch.float32).eval().grounding_encoder
    generator = torch.Generator().manual_seed(0)
    frames = torch.randn(6, 3, decoder.config.image_size, decoder.config.image_size, generator=generator)
    prompts = torch.randn(2, decoder.config.d_model, generator=generator)
    with torch.no_grad():
        trained = decoder.segment_clips(frames[None], prompts, torch.zeros(2, dtype=torch.long), 3)
        state = decoder.condition([(t, frames[t : t + 1]) for t in range(3)], prompts)
        predicted = dict(decoder.propagate(state, list(frames), lambda some: torch.stack(tuple(some))))
    for t in alike:
        torch.testing.assert_close(trained[t].logits, predicted[t].logits, atol=1e-4, rtol=1e-4)
