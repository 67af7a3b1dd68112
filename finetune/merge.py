"""What was learned, in the layout of the released checkpoints: an adapter for PEFT, or the whole model.

    python finetune/merge.py runs/mine/checkpoint-500 --output runs/mine/merged                # the whole model
    python finetune/merge.py runs/mine/checkpoint-500 --output runs/mine/adapter --adapter     # the adapter alone

The first is what `from_pretrained`, `hub_upload.py` and the official code take. The second names modules as the
official code does, so that `peft.PeftModel.from_pretrained` works there, and `model.load_adapter` here. Both take what
`finetune/train.py` saved with an adapter: a checkpoint, or OUTPUT_DIR/adapter; the first also a checkpoint of
`--lora_rank 0`, where nothing is merged, but written in the released layout. Nothing needs a GPU.
"""

import argparse
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from sa2va import Sa2VAChatModel
from sa2va.demo.predict import exit_code
from sa2va.hub_upload import find_base
from sa2va.modeling_sa2va import ModuleNames, merged_with_adapter, native_adapter_weights
from sa2va.processing_sa2va import replacing_files

PREFIX = "base_model.model."
LORA_A, LORA_B = ".lora_A.weight", ".lora_B.weight"
WEIGHTS = "adapter_model.safetensors"


def name_pattern(names: Iterable[str]) -> str:
    """A regular expression of whole names in which any number stands for every number: one for all layers."""
    return "|".join(sorted({re.sub(r"\\\.\d+\\\.", r"\\.\\d+\\.", re.escape(name)) for name in names}))


def merge_adapter(folder: str | Path, output: str | Path, base: str | None = None) -> None:
    """Writes the model with the adapter's changes made, every key, shape and dtype as in the base.

    Args:
        folder: with adapter_config.json and adapter_model.safetensors, modules named as here or in the official code;
            or a checkpoint of a model that was trained without an adapter, which keeps its dtype.
        output: folder for weights, config, tokenizer and processor.
        base: the checkpoint that was trained; default the one that the adapter names.

    Raises:
        ValueError: the adapter doesn't fit the base.
        OSError: no such folder or checkpoint.
    """
    if is_whole_model(folder):
        model = Sa2VAChatModel.from_pretrained(folder, dtype="auto")
    else:
        base = base or find_base(Path(folder), _adapter_config(folder).base_model_name_or_path)
        model = Sa2VAChatModel.from_pretrained(base, dtype="auto")
        dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
        model = merged_with_adapter(model, folder)
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data.to(dtypes[name])  # modules trained in full were float32
    model.save_pretrained(output)
    model.load_processor().save_pretrained(output)


def is_whole_model(folder: str | Path) -> bool:
    """Whether a folder holds a model of its own and no adapter."""
    return (Path(folder) / "config.json").is_file() and not (Path(folder) / "adapter_config.json").is_file()


def release_adapter(folder: str | Path, base: str | None = None, output: str | Path | None = None) -> None:
    """Writes an adapter with its modules named, and fused, as in the official code.

    Args:
        folder, base: as for `merge_adapter`.
        output: folder for the two files; default `folder` itself.

    Raises:
        ValueError, OSError: as for `merge_adapter`.
    """
    from safetensors.torch import save_file

    output = Path(output or folder)
    config, weights = read_adapter(folder)
    with torch.device("meta"):  # only names and sizes are asked for
        model = Sa2VAChatModel(Sa2VAChatModel.config_class.from_pretrained(base or config.base_model_name_or_path))
    weights = native_adapter_weights(model, weights)
    config, weights = _released(model, model.adapter_config(config), weights)
    with replacing_files(output) as temporary:
        tensors = {name: tensor.contiguous() for name, tensor in weights.items()}
        save_file(tensors, temporary / WEIGHTS, metadata={"format": "pt"})
        config.save_pretrained(temporary)


def read_adapter(folder: str | Path):
    """The `peft.LoraConfig` of a folder and its weights by name, on the CPU.

    Raises:
        OSError: there is no such folder.
    """
    import peft

    return _adapter_config(folder), peft.utils.load_peft_weights(str(folder), device="cpu")


def _adapter_config(folder: str | Path):
    import peft

    if not Path(folder).is_dir():
        raise NotADirectoryError(f"There is no folder {str(folder)!r}. Give a checkpoint, or OUTPUT_DIR/adapter.")
    return peft.PeftConfig.from_pretrained(str(folder))


def _released(model: Sa2VAChatModel, config, weights: dict[str, Tensor]):
    """Config and weights by released names; adapters of parts of one tensor become one, of their joint rank."""
    names = ModuleNames(model)
    adapted: dict[str, list[str]] = defaultdict(list)
    trained: dict[str, dict[str, Tensor]] = defaultdict(dict)  # in full
    for key, tensor in weights.items():
        name = key.removeprefix(PREFIX)
        if name.endswith(LORA_A):
            adapted[names.released[name.removesuffix(LORA_A)]].append(name.removesuffix(LORA_A))
        elif not name.endswith(LORA_B):
            trained[names.released.get(name, name)][name] = tensor
    output = {PREFIX + released: _fused(model, names, released, parts) for released, parts in trained.items()}
    ranks = {}
    for released, modules in adapted.items():
        pairs = {m: (weights[PREFIX + m + LORA_A], weights[PREFIX + m + LORA_B]) for m in modules}
        a, b = _joined(model, names, released, pairs)
        output |= {PREFIX + released + LORA_A: a, PREFIX + released + LORA_B: b}
        ranks[released] = len(a)
    joint = {name_pattern([name]): rank for name, rank in ranks.items() if rank != config.r}
    config.target_modules = name_pattern(ranks)
    config.rank_pattern = joint
    config.alpha_pattern = {name: config.lora_alpha * rank // config.r for name, rank in joint.items()}
    config.modules_to_save = [names.released[name] for name in config.modules_to_save or ()] or None
    return config, output


def _fused(model: Sa2VAChatModel, names: ModuleNames, released: str, parts: dict[str, Tensor]) -> Tensor:
    """A tensor of the released code from those that it is here."""
    if released not in names.splits:
        (tensor,) = parts.values()
        return tensor
    wanted = [name for name, other in names.released.items() if other == released]
    if parts.keys() != set(wanted):
        raise ValueError(f"Of {wanted}, which are {released} in the released code, only {list(parts)} were trained.")
    fuse = names.splits[released].reverse_op
    return fuse.convert(parts, wanted, [released], config=model.config)[released]


def _joined(
    model: Sa2VAChatModel, names: ModuleNames, released: str, pairs: dict[str, tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """LoRA's A and B of a released module from those of its parts: A stacked, B in blocks, fused as the weight is."""
    if released not in names.splits:
        ((a, b),) = pairs.values()
        return a, b
    parts = [name for name, other in names.released.items() if other == released]
    rank, start, blocks = sum(len(a) for a, _ in pairs.values()), 0, {}
    for part in parts:
        rows = model.get_submodule(part).out_features
        a, b = pairs.get(part, (torch.zeros(0, 0), torch.zeros(rows, 0)))
        blocks[part] = torch.zeros(rows, rank, dtype=b.dtype)
        blocks[part][:, start : start + len(a)] = b
        start += len(a)
    a = torch.cat([pairs[part][0] for part in parts if part in pairs])
    fuse = names.splits[released].reverse_op
    return a, fuse.convert(blocks, parts, [released], config=model.config)[released]


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="with adapter_config.json and adapter_model.safetensors, or a whole model")
    parser.add_argument("--output", required=True, help="folder to write")
    parser.add_argument("--model", help="the checkpoint that was trained; default: the one that the adapter names")
    parser.add_argument("--adapter", action="store_true", help="write the adapter alone, by released names")
    options = parser.parse_args(argv)
    if (options.adapter or options.model) and is_whole_model(options.folder):
        parser.error(f"{options.folder} is a whole model, trained without an adapter: leave --adapter, --model out.")
    write = release_adapter if options.adapter else merge_adapter
    write(options.folder, output=options.output, base=options.model)
    print(f"wrote {options.output}")


if __name__ == "__main__":
    sys.exit(exit_code(main, "train"))
