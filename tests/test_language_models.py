"""The language models around which InternVL checkpoints of Sa2VA were made: configs, layouts, positions, states."""

import copy
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import GOLDEN, GoldenFamily, Prescribed
from safetensors.torch import load_file, save_file
from transformers import AutoModel, DynamicCache, Qwen2Config

from sa2va import Sa2VAChatConfig, Sa2VAChatModel, Sa2VAProcessor
from sa2va.modeling_sa2va import _most_tokens, _WrittenStates

FAMILIES = ("ivl_qwen2", "ivl_internlm2")
SIZES = {
    "vocab_size": 448,
    "hidden_size": 160,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "bos_token_id": None,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}
# As in the config.json of the released base models, but for the sizes.
PHI3 = {
    "_name_or_path": "microsoft/Phi-3-mini-128k-instruct",
    "architectures": ["Phi3ForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_phi3.Phi3Config",
        "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM",
    },
    "attn_implementation": "flash_attention_2",
    "model_type": "phi3",
    "original_max_position_embeddings": 4096,
    "max_position_embeddings": 131072,
    "pad_token_id": 32000,
    "rope_theta": 10000.0,
    "rope_scaling": {"long_factor": [2.0] * 20, "short_factor": [1.0] * 20, "type": "su"},
    "sliding_window": 262144,
}
OTHERS = {
    "phi3": PHI3,
    "phi3, window of 64": PHI3 | {"rope_scaling": None, "sliding_window": 64},
    "llama": {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "rope_theta": 500000.0},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 48},
    "qwen2, window of 64": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 64,
        "max_window_layers": 1,
    },
    "internlm2 with biases": {"model_type": "internlm2", "bias": True},
}
ANSWER = "Sure, [SEG] and [SEG].<|im_end|>"


def config_with(llm: dict, **settings) -> Sa2VAChatConfig:
    """The golden config around another language model."""
    released = json.loads((GOLDEN / "ivl_qwen2" / "config.json").read_text())
    return Sa2VAChatConfig(**(released | {"llm_config": SIZES | llm} | settings))


@pytest.fixture(scope="module", params=OTHERS)
def other(request, golden_processor):
    """A small Sa2VA with random weights around a language model that has no recording."""
    torch.manual_seed(0)
    model = Sa2VAChatModel(config_with(OTHERS[request.param])).eval()
    model.set_processor(golden_processor)
    with torch.no_grad():
        for parameter in model.language_model.parameters():
            parameter.normal_(std=0.1)
    return model


def saved(folder) -> dict[str, torch.Tensor]:
    """All tensors of a saved checkpoint, by name."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def same_weights(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    """Whether two models have the same names and the same bits."""
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --------------------------------------------------------------------------------------------------------- configs


@pytest.mark.parametrize("name", ["InternLM2", "Qwen2", "Phi3", "Llama", "Qwen3"])
def test_architectures_choose_the_language_model_if_no_model_type_does(name):
    config = config_with({"architectures": [f"{name}ForCausalLM"]})
    assert config.llm_config.model_type == name.lower()


def test_no_word_about_the_language_model_means_qwen2():
    assert config_with({}).llm_config.model_type == "qwen2"


def test_an_unknown_architecture_is_named():
    with pytest.raises(ValueError, match="mamba9"):
        config_with({"architectures": ["Mamba9ForCausalLM"]})


@pytest.mark.parametrize("bias", [True, False])
def test_internlm2_says_bias_where_llama_says_attention_bias(bias):
    config = config_with({"model_type": "internlm2", "bias": bias})
    assert config.llm_config.attention_bias is bias and config.to_dict()["llm_config"]["bias"] is bias


def test_internlm2_has_biases_unless_the_config_says_no():
    assert config_with({"model_type": "internlm2"}).llm_config.attention_bias


@pytest.mark.parametrize(("factor", "tokens"), [(4.0, 4000), (0.5, 1000)])
def test_positions_that_are_stretched_are_as_many_more(factor, tokens):
    rope = {"rope_type": "linear", "factor": factor, "rope_theta": 10000.0}
    assert _most_tokens(Qwen2Config(max_position_embeddings=1000, rope_parameters=rope)) == tokens


@pytest.mark.parametrize("kind", ["su", "longrope"])
def test_phi3_reads_both_names_of_its_long_positions_and_keeps_what_it_read(kind, tmp_path):
    scaling = PHI3["rope_scaling"] | {"type": kind}
    config = config_with(PHI3 | {"rope_scaling": scaling})
    assert config.llm_config.rope_parameters["rope_type"] == "longrope"
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())["llm_config"]
    assert written["rope_scaling"] == scaling and written["rope_theta"] == 10000.0
    assert Sa2VAChatConfig.from_pretrained(tmp_path).llm_config.rope_parameters["rope_type"] == "longrope"


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "dynamic", "factor": 2.0},
        {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "factor": 2.0},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    ],
)
def test_internlm2_keeps_positions_that_only_transformers_knows(scaling, tmp_path):
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "original_max_position_embeddings": 64}
    config = config_with({"model_type": "internlm2", **sizes, "rope_scaling": scaling})
    config.save_pretrained(tmp_path)
    again = Sa2VAChatConfig.from_pretrained(tmp_path)
    assert scaling.items() <= again.llm_config.rope_parameters.items()


def attention_of(model) -> dict[str, str]:
    """What really runs in a layer of each tower."""
    if model.config.is_qwen_vl:
        seeing = model.model.model.visual.blocks[0].attn
    else:
        seeing = model.vision_model.encoder.layer[0].attention
    parts = {"vision_config": seeing, "llm_config": model.get_decoder().layers[0].self_attn}
    return {name: part.config._attn_implementation for name, part in parts.items()}


@pytest.mark.parametrize("family", ["ivl_qwen2", "ivl_internlm2", "qwen25vl", "qwen3vl"])
def test_the_attention_that_is_asked_for_runs(family):
    def load(**kwargs):
        return AutoModel.from_pretrained(GOLDEN / family, dtype=torch.float32, **kwargs)

    model, seeing = load(), {"vision_config": "eager"}
    assert attention_of(model) == {"vision_config": "sdpa", "llm_config": "sdpa"}
    assert attention_of(load(attn_implementation="eager")) == {"vision_config": "eager", "llm_config": "eager"}
    assert attention_of(load(attn_implementation=seeing)) == {"vision_config": "eager", "llm_config": "sdpa"}
    model.set_attn_implementation(seeing)
    assert attention_of(model) == {"vision_config": "eager", "llm_config": "sdpa"}


# --------------------------------------------------------------------------------------------------------- layouts


@pytest.mark.parametrize("shard_size", ["1GB", "1MB"])
@pytest.mark.parametrize("family", FAMILIES)
def test_load_and_save_give_the_released_file_bit_for_bit(family, shard_size, tmp_path):
    AutoModel.from_pretrained(GOLDEN / family).save_pretrained(tmp_path, max_shard_size=shard_size)
    released, again = load_file(GOLDEN / family / "model.safetensors"), saved(tmp_path)
    assert again.keys() == released.keys()
    assert all(torch.equal(again[name], released[name]) for name in released)
    if shard_size == "1MB":
        assert len(list(tmp_path.glob("*.safetensors"))) > 1
        assert same_weights(AutoModel.from_pretrained(tmp_path), AutoModel.from_pretrained(GOLDEN / family))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_native_layout_loads_too(family, tmp_path):
    model = AutoModel.from_pretrained(GOLDEN / family)
    save_file(model.state_dict(), tmp_path / "model.safetensors", {"format": "pt"})
    model.config.save_pretrained(tmp_path)
    again, report = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert same_weights(again, model)


def test_other_language_models_save_under_their_own_names_and_load_again(other, tmp_path):
    other.save_pretrained(tmp_path)
    again, report = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(again.language_model) is type(other.language_model) and same_weights(again, other)
    names = {name.removeprefix("language_model.") for name in saved(tmp_path) if name.startswith("language_model.")}
    attention = {
        "phi3": {"self_attn.qkv_proj.weight", "mlp.gate_up_proj.weight", "mlp.down_proj.weight"},
        "llama": {"self_attn.q_proj.weight", "self_attn.k_proj.weight", "mlp.gate_proj.weight"},
        "qwen2": {"self_attn.q_proj.bias", "self_attn.k_proj.weight", "mlp.gate_proj.weight"},
        "qwen3": {"self_attn.q_proj.weight", "self_attn.q_norm.weight", "mlp.gate_proj.weight"},
        "internlm2": {"attention.wqkv.weight", "attention.wqkv.bias", "attention.wo.bias", "feed_forward.w2.weight"},
    }[other.config.llm_config.model_type]
    assert {f"model.layers.1.{name}" for name in attention} <= names
    assert {"model.norm.weight"} <= names and bool({"lm_head.weight", "output.weight"} & names)


# ---------------------------------------------------------------------------------------------------------- states


def test_other_language_models_answer_with_a_mask_for_every_seg(other, golden_processor, picture):
    scripted = [Prescribed(golden_processor.tokenizer(ANSWER).input_ids)]
    output = other.predict_forward(image=picture, text="Where is it?", logits_processor=scripted)
    assert output.prediction == ANSWER
    assert [mask.shape for mask in output.prediction_masks] == [(1, 61, 97)] * 2


def test_the_final_norm_may_have_any_name(golden_processor, picture):
    model = Sa2VAChatModel(config_with({"model_type": "phi"})).eval()
    assert not hasattr(model.get_decoder(), "norm")
    model.set_processor(golden_processor)
    scripted = [Prescribed(golden_processor.tokenizer(ANSWER).input_ids)]
    output = model.predict_forward(image=picture, text="Where is it?", logits_processor=scripted)
    assert len(output.prediction_masks) == 2


def test_a_language_model_without_rotary_positions_answers_several_at_once(golden_processor, picture):
    model = Sa2VAChatModel(config_with({"model_type": "opt", "word_embed_proj_dim": 160, "ffn_dim": 64})).eval()
    model.set_processor(golden_processor)
    samples = [{"image": picture, "text": "Where is it?"}, {"text": "?"}]
    alone = [model.predict_forward(**sample, max_new_tokens=4).prediction for sample in samples]
    together = model.predict_batch(samples, max_new_tokens=4)
    assert [output.prediction for output in together] == alone


@pytest.mark.parametrize("again", [False, True], ids=["seen while writing", "read again"])
def test_seg_states_are_those_of_reading_the_whole_conversation(other, golden_processor, picture, monkeypatch, again):
    """Also with a sliding window, whose cache no longer holds the prompt when the answer is finished."""
    if again:
        monkeypatch.setattr(_WrittenStates, "of", lambda self, answers: None)
    seen = []
    hook = other.text_hidden_fcs.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    other.predict_forward(
        image=picture, text="?", logits_processor=[Prescribed(golden_processor.tokenizer(ANSWER).input_ids)]
    )
    hook.remove()
    inputs = golden_processor.prepare(image=picture, text="?")
    answer = golden_processor.tokenizer(ANSWER, return_tensors="pt").input_ids
    ids = torch.cat([inputs.input_ids, answer], dim=1)
    assert ids.shape[1] > 64  # more than the windows hold
    with torch.no_grad():
        states = other(input_ids=ids, pixel_values=inputs.pixel_values).seg_hidden_states
    assert seen[0].shape == (2, 160)
    torch.testing.assert_close(seen[0], states, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("other", [name for name in OTHERS if "window" in name], indirect=True)
def test_windows_matter_to_the_states(other, golden_processor, picture):
    """Else the test above would prove nothing."""
    wide = copy.deepcopy(other.config)
    wide.llm_config.sliding_window = 4096
    unbounded = Sa2VAChatModel(wide).eval()
    unbounded.load_state_dict(other.state_dict())
    unbounded.set_processor(golden_processor)
    inputs = golden_processor.prepare(image=picture, text="? [SEG]")
    arguments = {"input_ids": inputs.input_ids, "pixel_values": inputs.pixel_values}
    with torch.no_grad():
        states, others = other(**arguments).seg_hidden_states, unbounded(**arguments).seg_hidden_states
    assert (states - others).abs().max() > 1e-2


# ---------------------------------------------------------------------------------------- InternLM2, from scratch


class InternLM2:
    """InternLM2 in released names, straight from its definition; remembers what it read."""

    def __init__(self, weights: dict[str, torch.Tensor], config):
        self.weights, self.config = weights, config
        self.cache = [(torch.zeros(0), torch.zeros(0))] * config.num_hidden_layers

    def _linear(self, x, name):
        return F.linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    def _norm(self, x, name):
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.config.rms_norm_eps)
        return x * scale * self.weights[f"{name}.weight"]

    def _rotate(self, x, start: int, length: int):
        """x [heads, n, size]; `length` is that of everything read so far."""
        size, most, factor = x.shape[-1], self.config.max_position_embeddings, 2.0
        base = 1e6 * max(1.0, factor * length / most - (factor - 1)) ** (size / (size - 2))
        angles = torch.outer(torch.arange(start, length).float(), base ** (-torch.arange(0, size, 2).float() / size))
        x1, x2 = x.chunk(2, dim=-1)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1)

    def read(self, states: torch.Tensor) -> torch.Tensor:
        """Last states [n, hidden] of n more embeddings."""
        for layer in range(self.config.num_hidden_layers):
            name = f"model.layers.{layer}"
            normed = self._norm(states, f"{name}.attention_norm")
            states = states + self._linear(self._attend(normed, layer), f"{name}.attention.wo")
            normed = self._norm(states, f"{name}.ffn_norm")
            gate, up = (self._linear(normed, f"{name}.feed_forward.{w}") for w in ("w1", "w3"))
            states = states + self._linear(F.silu(gate) * up, f"{name}.feed_forward.w2")
        return self._norm(states, "model.norm")

    def _attend(self, x: torch.Tensor, layer: int) -> torch.Tensor:
        config, n = self.config, len(x)
        group = config.num_attention_heads // config.num_key_value_heads
        fused = self._linear(x, f"model.layers.{layer}.attention.wqkv")
        fused = fused.view(n, config.num_key_value_heads, group + 2, -1)
        queries, keys, values = fused[:, :, :group].flatten(1, 2), fused[:, :, -2], fused[:, :, -1]
        old_keys, old_values = self.cache[layer]
        start = old_keys.shape[1] if old_keys.ndim == 3 else 0
        queries, keys = (self._rotate(part.transpose(0, 1), start, start + n) for part in (queries, keys))
        values = values.transpose(0, 1)
        if start:
            keys, values = torch.cat([old_keys, keys], dim=1), torch.cat([old_values, values], dim=1)
        self.cache[layer] = (keys, values)
        keys, values = keys.repeat_interleave(group, dim=0), values.repeat_interleave(group, dim=0)
        scores = queries @ keys.transpose(1, 2) / queries.shape[-1] ** 0.5
        future = torch.arange(start + n) > torch.arange(start, start + n)[:, None]
        return (scores.masked_fill(future, -torch.inf).softmax(-1) @ values).transpose(0, 1).flatten(1)


@pytest.fixture(scope="module", params=[False, True], ids=["no bias", "biases"])
def internlm2(request, tmp_path_factory):
    """(a model loaded from a released layout, its weights in that layout) with a context of 16."""
    llm = {"model_type": "internlm2", "bias": request.param, "max_position_embeddings": 16, "rope_theta": 1e6}
    config = config_with(llm | {"rope_scaling": {"type": "dynamic", "factor": 2.0}})
    torch.manual_seed(0)
    model, folder = Sa2VAChatModel(config), tmp_path_factory.mktemp("internlm2")
    model.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    weights |= {name: torch.randn_like(w) * 0.2 for name, w in weights.items() if name.startswith("language_model.")}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    prefix = "language_model."
    weights = {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}
    return AutoModel.from_pretrained(folder).eval(), weights


def states_of(model: Sa2VAChatModel, ids: torch.Tensor, cache=None) -> torch.Tensor:
    """Last states [n, hidden] of ids."""
    with torch.no_grad():
        return model.get_decoder()(input_ids=ids[None], past_key_values=cache, use_cache=cache is not None)[0][0]


@pytest.mark.parametrize("lengths", [[12], [16], [17], [40], [40, 20], [40, 16], [40, 8]], ids=str)
def test_internlm2_reads_texts_shorter_and_longer_than_its_context_as_defined(internlm2, lengths):
    """A long text before changes nothing."""
    model, weights = internlm2
    for length in lengths:
        ids = torch.arange(length) * 7 % 440
        wanted = InternLM2(weights, model.config.llm_config).read(weights["model.tok_embeddings.weight"][ids])
        torch.testing.assert_close(states_of(model, ids), wanted, atol=2e-4, rtol=2e-4)


def test_internlm2_outgrows_its_context_while_writing_as_defined(internlm2):
    model, weights = internlm2
    reference, cache = InternLM2(weights, model.config.llm_config), DynamicCache()
    ids = torch.arange(24) * 11 % 440
    for part in ids.split([13] + [1] * 11):
        wanted = reference.read(weights["model.tok_embeddings.weight"][part])
        torch.testing.assert_close(states_of(model, part, cache), wanted, atol=2e-4, rtol=2e-4)


def test_seg_states_beyond_the_context_are_those_of_writing_the_answer(internlm2):
    """There every token was rotated by a base of its own, so reading the answer at once would differ."""
    model, weights = internlm2
    processor = Sa2VAProcessor.from_pretrained(GOLDEN / "ivl_internlm2")
    inputs, seg = processor.prepare(text="Hello there"), processor.tokenizer.convert_tokens_to_ids("[SEG]")
    assert inputs.input_ids.shape[1] > 16
    prompt = model._prompt(model.special_token_ids(processor.tokenizer), [inputs])
    script = [Prescribed(processor.tokenizer(ANSWER).input_ids)]
    answer = model.language_model.generate(
        **prompt, max_new_tokens=20, logits_processor=script, return_dict_in_generate=True
    )
    new_ids = answer.sequences[0]
    with torch.no_grad():
        (ours,) = model._seg_states(prompt, [new_ids], seg, answer.past_key_values)
    reference, embed = InternLM2(weights, model.config.llm_config), weights["model.tok_embeddings.weight"]
    reference.read(embed[inputs.input_ids[0]])
    wanted = torch.cat([reference.read(embed[token]) for token in new_ids.split(1)])[new_ids == seg]
    assert len(wanted) == 2
    torch.testing.assert_close(ours, wanted, atol=2e-4, rtol=2e-4)


def test_the_names_internlm2_is_saved_under_are_those_of_sa2va_8b(internlm2):
    _, weights = internlm2
    released = json.loads((GOLDEN.parent / "released" / "ByteDance--Sa2VA-8B.json").read_text())["keys"]
    wanted = {name.removeprefix("language_model.") for name in released if name.startswith("language_model.")}
    wanted = {name.replace("{0..31}", str(layer)) for name in wanted for layer in range(2)}
    assert wanted == {name for name in weights if not name.endswith(".bias")}


# ------------------------------------------------------------------------------------------------------- templates


@pytest.mark.parametrize(
    ("template", "prompt"),
    [
        ("qwen_chat", "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"),
        ("internlm2_chat", "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"),
        ("phi3_chat", "<|user|>\nHi<|end|>\n<|assistant|>\n"),
        ("phi3-chat", "<|user|>\nHi<|end|>\n<|assistant|>\n"),
    ],
)
def test_the_config_names_the_template(template, prompt, golden_processor):
    processor = Sa2VAProcessor.from_config(config_with({}, template=template), golden_processor.tokenizer)
    assert processor.build_prompt("Hi") == prompt


def test_phi3_chat_over_a_qwen_tokenizer_stops_at_the_spelled_end_and_keeps_the_mask(golden_model, golden_processor):
    """Sa2VA-4B: its `<|end|>` is several tokens, which stay in the prediction; clients strip them."""
    case = GoldenFamily("ivl_qwen2").case("img1seg")
    processor = Sa2VAProcessor.from_config(
        config_with({}, template="phi3_chat", max_dynamic_patch=12), golden_processor.tokenizer
    )
    assert len(processor.tokenizer("<|end|>").input_ids) > 1
    output = golden_model.predict_forward(
        **case.arguments,
        processor=processor,
        logits_processor=[Prescribed(processor.tokenizer("Sure, it is [SEG].<|end|>and on and on").input_ids)],
    )
    assert output.prediction == "Sure, it is [SEG].<|end|>"
    assert output.past_text.endswith("<|assistant|>\nSure, it is [SEG].<|end|>\n")
    assert [mask.dtype for mask in output.prediction_masks] == [np.bool_]
    again = golden_model.predict_forward(
        image=case.arguments["image"],
        text="And?",
        past_text=output.past_text,
        processor=processor,
        logits_processor=[Prescribed(processor.tokenizer("No.<|end|>and on").input_ids)],
    )
    assert again.prediction == "No.<|end|>"
