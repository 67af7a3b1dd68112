"""A Sa2VA of about three million parameters, for learning on two CPU cores: sizes, tokenizer, fresh model.

Same parts and names as the released checkpoints (InternViT, Qwen2, SAM 2), only smaller: pictures of 56 pixels in 64
tokens for the language model, 128 pixels for SAM 2.
"""

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, set_seed

from sa2va import Sa2VAChatConfig, Sa2VAChatModel, Sa2VAProcessor
from sa2va.configuration_sa2va import auto_map
from sa2va.data.scenes import corpus

SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>", "[SEG]", "<p>", "</p>", "<vp>",
    "</vp>",
)  # fmt: skip
# How Qwen2 cuts text into words before merging bytes.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def build_tokenizer(vocab_size: int = 640) -> PreTrainedTokenizerFast:
    """Byte-level BPE in Qwen2's manner over the sentences of the synthetic world; any other text still has tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=[t for t in SPECIAL_TOKENS if t not in ("<|im_end|>", "<|endoftext|>")],
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
    )


def build_config(vocab_size: int) -> Sa2VAChatConfig:
    """Sizes of the small model; losses that train SAM 2's mask candidates and scores from nothing."""
    return Sa2VAChatConfig(
        vision_config={
            "hidden_size": 112,
            "intermediate_size": 448,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "image_size": 56,
            "patch_size": 7,
            "initializer_range": 0.08,
        },
        llm_config={
            "model_type": "qwen2",
            "vocab_size": vocab_size,
            "hidden_size": 128,
            "intermediate_size": 352,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            "initializer_range": 0.08,
        },
        grounding_config={
            "image_size": 128,
            "embed_dim": 24,
            "num_heads": 1,
            "stages": [1, 2, 3, 1],
            "global_att_blocks": [5],
            "d_model": 64,
            "mem_dim": 16,
            "memory_attention_layers": 2,
            "memory_attention_dim_feedforward": 128,
            "memory_attention_dropout": 0.0,
            "mask_decoder_mlp_dim": 128,
            "mask_decoder_num_heads": 2,  # heads of 4 numbers, as the released 8 would be, can't tell places apart
            "mask_decoder_attention_downsample_rate": 1,
            "iou_head_hidden_dim": 64,
        },
        force_image_size=56,
        downsample_ratio=1.0,
        max_dynamic_patch=1,
        dice_loss_weight=2.0,
        iou_loss_weight=1.0,
        object_score_loss_weight=0.5,
        num_points=0,
        supervise_all_masks=True,
        architectures=["Sa2VAChatModel"],
        auto_map=auto_map(is_qwen_vl=False),
        dtype="float32",
    )


def _sine_positions(side: int, width: int) -> torch.Tensor:
    """Sines of column and row, [side * side, width]: a start from which attention to neighbours is quickly learned."""
    frequencies = 100.0 ** -(torch.arange(width // 4) / (width // 4))
    angles = torch.arange(side)[:, None] * frequencies
    line = torch.cat([angles.sin(), angles.cos()], dim=1)
    return torch.cat([line.repeat(side, 1), line.repeat_interleave(side, dim=0)], dim=1)


def build_model(seed: int) -> tuple[Sa2VAChatModel, Sa2VAProcessor]:
    """An untrained model and its processor, the same for the same seed."""
    set_seed(seed)
    tokenizer = build_tokenizer()
    config = build_config(len(tokenizer))
    processor = Sa2VAProcessor.from_config(config, tokenizer)
    model = Sa2VAChatModel(config)
    grid = config.vision_config.image_size // config.vision_config.patch_size
    with torch.no_grad():
        embeddings = model.vision_model.embeddings.position_embeddings
        embeddings[0, 1:] = 0.5 * _sine_positions(grid, embeddings.shape[-1])
        # SAM's random waves are so short that a small model can't learn to write a place in them.
        model.grounding_encoder.sam2_model.sam_prompt_encoder.pe_layer.positional_encoding_gaussian_matrix.mul_(0.35)
    model.set_processor(processor)
    return model, processor
