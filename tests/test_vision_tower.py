"""InternViT, 300M and 6B: the tower equals its definition on weights of the released layout, and gives them back."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import GOLDEN
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from sa2va import Sa2VAChatConfig, Sa2VAChatModel

SIZES = {"hidden_size": 80, "intermediate_size": 112, "num_hidden_layers": 3, "num_attention_heads": 5}
TOWERS = {
    "300M": {"norm_type": "layer_norm", "qkv_bias": True, "qk_normalization": False},
    "6B": {"norm_type": "rms_norm", "qkv_bias": False, "qk_normalization": True},
    "6B, large epsilon": {
        "norm_type": "rms_norm",
        "qkv_bias": False,
        "qk_normalization": True,
        "layer_norm_eps": 0.05,
    },
    "300M with normalised queries": {"norm_type": "layer_norm", "qkv_bias": True, "qk_normalization": True},
}
RELEASED = {"300M": "ByteDance--Sa2VA-1B", "6B": "ByteDance--Sa2VA-26B"}


class InternViT:
    """The official computation, short: reads released names."""

    def __init__(self, weights: dict[str, torch.Tensor], config):
        self.weights, self.config = weights, config

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """[n, 3, H, W] -> [n, 1 + patches, hidden], the class token first."""
        states = self._embed(pixels)
        for layer in range(self.config.num_hidden_layers):
            name = f"encoder.layers.{layer}"
            attended = self._attend(self._norm(states, f"{name}.norm1"), f"{name}.attn")
            states = states + attended * self.weights[f"{name}.ls1"]
            hidden = F.gelu(self._linear(self._norm(states, f"{name}.norm2"), f"{name}.mlp.fc1"))
            states = states + self._linear(hidden, f"{name}.mlp.fc2") * self.weights[f"{name}.ls2"]
        return states

    def _embed(self, pixels):
        name, size = "embeddings.patch_embedding", self.config.patch_size
        patches = F.conv2d(pixels, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], stride=size)
        positions = self.weights["embeddings.position_embedding"]
        side = self.config.image_size // size
        grid = positions[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
        if patches.shape[-2:] != grid.shape[-2:]:
            grid = F.interpolate(grid, size=patches.shape[-2:], mode="bicubic", align_corners=False)
        patches = (patches + grid).flatten(2).transpose(1, 2)
        first = self.weights["embeddings.class_embedding"] + positions[:, :1]
        return torch.cat([first.expand(len(pixels), -1, -1), patches], dim=1)

    def _linear(self, x, name):
        return F.linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    def _norm(self, x, name):
        if self.config.norm_type == "layer_norm" and f"{name}.bias" in self.weights:
            scale, shift = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
            return F.layer_norm(x, x.shape[-1:], scale, shift, self.config.layer_norm_eps)
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.config.layer_norm_eps)
        return x * scale * self.weights[f"{name}.weight"]

    def _attend(self, x, name):
        queries, keys, values = self._linear(x, f"{name}.qkv").chunk(3, dim=-1)
        if self.config.qk_normalization:  # over the width of all heads together
            queries, keys = self._norm(queries, f"{name}.q_norm"), self._norm(keys, f"{name}.k_norm")
        heads = self.config.num_attention_heads
        queries, keys, values = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (queries, keys, values))
        scores = queries * queries.shape[-1] ** -0.5 @ keys.transpose(-2, -1)
        return self._linear((scores.softmax(-1) @ values).transpose(1, 2).flatten(2), f"{name}.proj")


def config_with(tower: dict, **settings) -> Sa2VAChatConfig:
    """The golden config with another vision tower."""
    released = json.loads((GOLDEN / "ivl_qwen2" / "config.json").read_text())
    return Sa2VAChatConfig(**(released | {"vision_config": released["vision_config"] | SIZES | tower} | settings))


def checkpoint(folder, config: Sa2VAChatConfig) -> dict[str, torch.Tensor]:
    """Writes a checkpoint in the released layout whose vision tower is random, and returns its tensors."""
    torch.manual_seed(0)
    Sa2VAChatModel(config).save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    weights |= {
        name: torch.randn_like(weight) * 0.3 + name.endswith(("norm.weight", "norm1.weight", "norm2.weight"))
        for name, weight in weights.items()
        if name.startswith("vision_model.")
    }
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return weights


@pytest.fixture(scope="module", params=TOWERS)
def loaded(request, tmp_path_factory):
    """(name, model, the tensors of the file it was loaded from)."""
    folder = tmp_path_factory.mktemp("tower")
    weights = checkpoint(folder, config_with(TOWERS[request.param]))
    return request.param, AutoModel.from_pretrained(folder).eval(), weights


def reference(model: Sa2VAChatModel, weights: dict[str, torch.Tensor]) -> InternViT:
    """The definition on the weights of a file."""
    prefix = "vision_model."
    weights = {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}
    return InternViT(weights, model.config.vision_config)


@torch.no_grad()
def states_of(model: Sa2VAChatModel, pixels: torch.Tensor) -> torch.Tensor:
    """Last states of our tower."""
    return model.vision_model(pixels).last_hidden_state


def test_the_tower_equals_its_definition(loaded):
    _, model, weights = loaded
    pixels = torch.randn(2, 3, 448, 448, generator=torch.Generator().manual_seed(1))
    wanted = reference(model, weights)(pixels)
    assert wanted.shape == (2, 1025, 80)
    torch.testing.assert_close(states_of(model, pixels), wanted, atol=5e-4, rtol=5e-4)


def test_the_fused_layout_comes_back_bit_for_bit(loaded, tmp_path):
    _, model, weights = loaded
    model.save_pretrained(tmp_path)
    again = load_file(tmp_path / "model.safetensors")
    assert again.keys() == weights.keys()
    assert all(torch.equal(again[name], weights[name]) for name in weights)


def test_the_native_layout_loads_too(loaded, tmp_path):
    _, model, _ = loaded
    save_file(model.state_dict(), tmp_path / "model.safetensors", {"format": "pt"})
    model.config.save_pretrained(tmp_path)
    again, report = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    native = model.state_dict()
    assert all(torch.equal(weight, native[name]) for name, weight in again.state_dict().items())


@pytest.mark.parametrize("loaded", RELEASED, indirect=True)
def test_names_are_those_of_the_released_checkpoint(loaded):
    name, _, weights = loaded
    released = json.loads((GOLDEN.parent / "released" / f"{RELEASED[name]}.json").read_text())["keys"]
    released = {key for key in released if key.startswith("vision_model.")}
    names = {re.sub(r"layers\.\d+\.", "layers.*.", key) for key in weights if key.startswith("vision_model.")}
    assert names == {re.sub(r"layers\.{.*?}\.", "layers.*.", key) for key in released}


@pytest.mark.parametrize("size", [224, 616])
def test_tiles_of_another_size_get_interpolated_positions_as_defined(tmp_path, picture, golden_processor, size):
    config = config_with(TOWERS["300M"], force_image_size=size)
    weights = checkpoint(tmp_path, config)
    model = AutoModel.from_pretrained(tmp_path).eval()
    pixels = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(1))
    wanted = reference(model, weights)(pixels)
    torch.testing.assert_close(states_of(model, pixels), wanted, atol=5e-4, rtol=5e-4)
    output = model.predict_forward(image=picture, text="?", tokenizer=golden_processor.tokenizer, max_new_tokens=2)
    assert output.past_text.count("<IMG_CONTEXT>") % (size // 28) ** 2 == 0


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_patches_are_folded_in_the_order_of_the_configs_version(version):
    config = SimpleNamespace(downsample_ratio=0.5, ps_version=version)
    states = torch.arange(2 * 36 * 3.0).reshape(2, 36, 3)
    # Views and permutations of InternVL's own code: `w` rows of `h` patches.
    folded = states.reshape(2, 6, 3, 6).permute(0, 2, 1, 3).reshape(2, 3, 3, 12)
    folded = folded if version == "v1" else folded.permute(0, 2, 1, 3)
    found = Sa2VAChatModel._pixel_shuffle(SimpleNamespace(config=config), states)
    assert torch.equal(found, folded.reshape(2, 9, 12))
