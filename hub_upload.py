"""Checkpoints on their way to and from the Hub; a command line and the functions behind it.

    python hub_upload.py check FOLDER_OR_REPO [--json] [--revision R]     is everything there, at its shape?
    python hub_upload.py convert FOLDER OUT                               pickled weights -> safetensors

* `check_checkpoint`    config.json and safetensors headers against the model they describe (`CheckpointReport`)
* `convert_pickles`     `pytorch_model*.bin` -> safetensors, without running what a pickle may hold

Exit codes: 0 all is right, 1 something is wrong with the checkpoint, 2 the command can't be carried out.
"""

import argparse
import json
import math
import re
import shutil
import sys
import types
import zipfile
from collections import Counter, defaultdict
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
PICKLE_INDEX = "pytorch_model.bin.index.json"
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format
MAX_JSON_BYTES = 100_000_000
LFS_POINTER = b"version "  # how the text begins that git leaves in place of a large file
WEIGHT_DTYPES = ("F16", "BF16", "F32", "F64")
PROMPT_DECODER = "grounding_encoder.sam2_model.sam_mask_decoder_modified."
# Never copied beside converted weights: other forms of them, or more pickles.
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack", ".gguf", ".index.json")
QWEN_VL_NAMES = {"qwen2_5_vl": "Qwen2.5-VL", "qwen3_vl": "Qwen3-VL"}
WRONG_CHECKPOINT, CANNOT_RUN = 1, 2


class CheckpointError(ValueError):
    """Something is wrong with the checkpoint itself."""


class ShapeMismatch(NamedTuple):
    """A key whose shape is not what the config asks for."""

    name: str
    expected: tuple[int, ...]
    found: tuple[int, ...]


@dataclass(frozen=True)
class CheckpointReport:
    """What `check_checkpoint` found; names are in the checkpoint's own layout and in a fixed order.

    Attributes:
        name: the folder or repository.
        family: "InternVL + Qwen2", "Qwen3-VL", ..., with " (Sa2VA-i)" if it has two mask decoders; None without a
            readable config.
        language_model: `model_type` of the language model's config.
        layout: "released", "native" (keys of `model.state_dict()`), "mixed" (both occur; it loads, but not in the
            official code) or None (no key tells).
        num_parameters, num_bytes: of all tensors in the weight files.
        dtypes: parameters of each safetensors dtype ("BF16", "F32", ...).
        missing_keys: expected and not there.
        unexpected_keys: there and not expected.
        mismatched_keys: there at another shape than expected.
        problems: sentences about everything else: files, headers, index, config.
    """

    name: str
    family: str | None
    language_model: str | None
    layout: str | None
    num_parameters: int
    num_bytes: int
    dtypes: dict[str, int]
    missing_keys: tuple[str, ...]
    unexpected_keys: tuple[str, ...]
    mismatched_keys: tuple[ShapeMismatch, ...]
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether the checkpoint loads with every key at its shape."""
        return not (self.problems or self.missing_keys or self.unexpected_keys or self.mismatched_keys)

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON has it."""
        mismatched = [mismatch._asdict() for mismatch in self.mismatched_keys]
        return {"ok": self.ok, **asdict(self), "mismatched_keys": mismatched}

    def __str__(self) -> str:
        dtypes = ", ".join(f"{dtype} {count:,}" for dtype, count in self.dtypes.items())
        shapes = [f"{key.name}: expected {list(key.expected)}, found {list(key.found)}" for key in self.mismatched_keys]
        return "\n".join(
            [
                f"{self.name}: {self.family or 'unknown family'}",
                f"  language model  {self.language_model or 'unknown'}",
                f"  layout          {self.layout or 'unknown'}",
                f"  parameters      {self.num_parameters:,} in {self.num_bytes / 1e9:.2f} GB ({dtypes or 'none'})",
                *_section("problems", self.problems),
                *_section("missing keys", self.missing_keys),
                *_section("unexpected keys", self.unexpected_keys),
                *_section("mis-shaped keys", shapes),
                "Every key is there, at its shape." if self.ok else "This checkpoint is not right.",
            ]
        )


def _section(title: str, lines: Sequence[str]) -> list[str]:
    return [f"{title} ({len(lines)}):", *(f"  {line}" for line in lines)] if lines else []


def check_checkpoint(name_or_path: str | Path, revision: str | None = None) -> CheckpointReport:
    """Compares a checkpoint's keys and shapes with the model that its config describes.

    Reads config.json and the headers of the weight files, from a Hub repository over HTTP ranges; never the weights.

    Args:
        name_or_path: folder, or name of a repository on the Hugging Face Hub.
        revision: branch, tag or commit of the repository.

    Returns:
        `CheckpointReport`; whatever is wrong with the checkpoint is told there.

    Raises:
        OSError: there is no such folder or repository, or the Hub can't be reached.
        ValueError: a revision of a folder.
    """
    files = _find_files(str(name_or_path), revision)
    tensors, problems = _read_weights(files)
    problems += [
        f"{name} is {tensor.dtype}; weights are one of {', '.join(WEIGHT_DTYPES)}, so it is quantized or damaged"
        for name, tensor in tensors.items()
        if tensor.dtype not in WEIGHT_DTYPES
    ]
    config, comparison = None, _Comparison()
    try:
        config = _read_config(files, tensors)
        if tensors:
            comparison = _compare(_expected_entries(config), {name: tensor.shape for name, tensor in tensors.items()})
    except CheckpointError as error:
        problems.append(str(error))
    dtypes: Counter[str] = Counter()
    for tensor in tensors.values():
        dtypes[tensor.dtype] += math.prod(tensor.shape)
    return CheckpointReport(
        name=files.name,
        family=config and _family(config),
        language_model=config and config.get_text_config().model_type,
        layout=comparison.layout,
        num_parameters=sum(dtypes.values()),
        num_bytes=sum(tensor.end - tensor.begin for tensor in tensors.values()),
        dtypes=dict(sorted(dtypes.items())),
        missing_keys=comparison.missing,
        unexpected_keys=comparison.unexpected,
        mismatched_keys=comparison.mismatched,
        problems=tuple(problems),
    )


class _Files(NamedTuple):
    """The files of a checkpoint: their sizes in bytes by name, and `read(name, begin, count)`."""

    name: str
    sizes: dict[str, int]
    read: Callable[[str, int, int], bytes]


def _find_files(name: str, revision: str | None) -> _Files:
    """The files of a folder or, if there is none, of a Hub repository."""
    folder = Path(name)
    if not folder.is_dir():
        return _hub_files(name, revision)
    if revision is not None:
        raise ValueError(f"revision={revision!r} is for Hub repositories, but {name} is a folder. Leave it out.")

    def read(file: str, begin: int, count: int) -> bytes:
        with (folder / file).open("rb") as stream:
            stream.seek(begin)
            return stream.read(count)

    return _Files(name, {path.name: path.stat().st_size for path in folder.iterdir() if path.is_file()}, read)


def _hub_files(name: str, revision: str | None) -> _Files:
    """The files of a Hub repository; what is read of them is fetched by HTTP ranges."""
    from huggingface_hub import HfFileSystem
    from huggingface_hub.utils import validate_repo_id

    hub = HfFileSystem(skip_instance_cache=True)
    try:
        validate_repo_id(name)
        with _asking_hub(name):
            listing = hub.ls(name, detail=True, revision=revision)
    except (ValueError, NotImplementedError, FileNotFoundError) as error:  # no name of a repository, or of none
        version = f" at revision {revision}" if revision else ""
        raise FileNotFoundError(
            f"{name}{version} is neither a folder nor a repository on the Hub that you may read. Give the folder that "
            "holds config.json and the weights, or a name like ByteDance/Sa2VA-4B; private ones need `hf auth login`."
        ) from error

    def read(file: str, begin: int, count: int) -> bytes:
        with _asking_hub(name), hub.open(f"{name}/{file}", "rb", revision=revision, block_size=2**18) as stream:
            stream.seek(begin)
            return stream.read(count)

    sizes = {entry["name"].rpartition("/")[2]: entry["size"] for entry in listing if entry["type"] == "file"}
    return _Files(name, sizes, read)


@contextmanager
def _asking_hub(name: str) -> Iterator[None]:
    """Turns what the HTTP library raises, of whichever version, into OSError."""
    from huggingface_hub.errors import HTTPError

    try:
        yield
    except HTTPError as error:
        raise OSError(f"{name} is not a folder here, and the Hub can't be asked for it: {error}") from error


def _read_json(files: _Files, name: str) -> dict[str, Any]:
    if name not in files.sizes:
        raise CheckpointError(f"{name} is not there.")
    if files.sizes[name] > MAX_JSON_BYTES:
        raise CheckpointError(f"{name} has {files.sizes[name]:,} bytes, too many for what it should be.")
    return _parse_json(files.read(name, 0, files.sizes[name]), name)


def _parse_json(text: bytes, what: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{what} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{what} is not a JSON object but a {type(values).__name__}.")
    return values


class _Tensor(NamedTuple):
    """A tensor as a safetensors header describes it; its bytes are `begin`..`end` behind the header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @classmethod
    def parse(cls, name: str, entry: Any) -> "_Tensor":
        """The tensor of a header's entry, or CheckpointError for one that is no such thing."""
        try:
            dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        except (TypeError, KeyError, ValueError):
            dtype, shape, begin, end = None, (), None, None
        numbers = (*shape, begin, end)
        plausible = len(shape) <= 64 and all(type(number) is int and 0 <= number < 2**63 for number in numbers)
        if not (isinstance(dtype, str) and plausible and math.prod(shape) < 2**63):
            raise CheckpointError(f"the header's entry of {name} is not dtype, shape and two offsets")
        return cls(dtype, shape, begin, end)

    @property
    def num_bytes(self) -> int | None:
        """What shape and dtype need; None for an unknown dtype. Names say their width: BF16, I64, F8_E4M3."""
        width = re.match(r"(?:F|BF|I|U|C)(\d+)", "U8" if self.dtype == "BOOL" else self.dtype)
        return math.prod(self.shape) * int(width[1]) // 8 if width else None


def _read_weights(files: _Files) -> tuple[dict[str, _Tensor], list[str]]:
    """Everything that the headers of the weight files name, and what is wrong with the files."""
    tensors: dict[str, _Tensor] = {}
    problems: list[str] = []
    try:
        shards = _shards(files)
    except CheckpointError as error:
        return tensors, [str(error)]
    for file, indexed in shards.items():
        try:
            header, wrong = _read_header(files, file)
        except CheckpointError as error:
            problems.append(f"{file}: {error}")
            continue
        wrong += [] if indexed is None else _index_problems(indexed, header)
        problems += [f"{file}: {sentence}" for sentence in wrong]
        tensors |= header
    return tensors, problems


def _shards(files: _Files) -> dict[str, list[str] | None]:
    """The weight files, and which keys the index puts into each; None where there is no index."""
    if WEIGHTS in files.sizes:
        return {WEIGHTS: None}
    if WEIGHTS_INDEX not in files.sizes:
        if any(name.startswith("pytorch_model") and name.endswith(".bin") for name in files.sizes):
            from .modeling_sa2va import pickled_weights_message

            raise CheckpointError(pickled_weights_message(files.name))
        raise CheckpointError(f"There are no weights: neither {WEIGHTS} nor {WEIGHTS_INDEX}.")
    shards: dict[str, list[str] | None] = defaultdict(list)
    for key, file in _read_weight_map(files).items():
        shards[file].append(key)
    return dict(sorted(shards.items()))


def _read_weight_map(files: _Files, index: str = WEIGHTS_INDEX) -> dict[str, str]:
    """Which file holds which key, by an index."""
    weight_map = _read_json(files, index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{index} has no weight_map from keys to file names.")
    return weight_map


def _index_problems(indexed: list[str], header: dict[str, _Tensor]) -> list[str]:
    """Where the index and a shard's header disagree."""
    absent = [name for name in indexed if name not in header]
    strange = sorted(header.keys() - set(indexed))
    return [
        *(f"{name} is not in it, though {WEIGHTS_INDEX} puts it there." for name in absent),
        *(f"holds {name}, which {WEIGHTS_INDEX} does not put there." for name in strange),
    ]


def _read_header(files: _Files, name: str) -> tuple[dict[str, _Tensor], list[str]]:
    """The tensors of a safetensors file, and what is wrong with where it puts them.

    Raises:
        CheckpointError: the file is not there, or its header can't be read. Nothing is allocated on a header's word.
    """
    if name not in files.sizes:
        raise CheckpointError(f"is not there, though {WEIGHTS_INDEX} names it.")
    size, start = files.sizes[name], files.read(name, 0, 8)
    if start == LFS_POINTER:
        raise CheckpointError("is a Git LFS pointer and not the weights themselves. Fetch them: git lfs pull")
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length > MAX_HEADER_BYTES or 8 + length > size:
        raise CheckpointError(
            f"has no whole safetensors header: {size:,} bytes, of which the header claims {length:,} "
            f"(at most {MAX_HEADER_BYTES:,} are allowed). It is cut off or not a safetensors file."
        )
    entries = _parse_json(files.read(name, 8, length), "the header")
    tensors = {key: _Tensor.parse(key, entry) for key, entry in entries.items() if key != "__metadata__"}
    return tensors, _offset_problems(tensors, 8 + length, size)


def _offset_problems(tensors: dict[str, _Tensor], start: int, size: int) -> list[str]:
    """Whether the tensors fill the file behind `start`, one after the other."""
    problems, end = [], 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if tensor.num_bytes is None:
            problems.append(f"{name} has the unknown dtype {tensor.dtype!r}.")
        elif (tensor.begin, tensor.end) != (end, end + tensor.num_bytes):
            problems.append(
                f"{name} is said to be at bytes {tensor.begin:,} to {tensor.end:,}; its shape, its dtype and what "
                f"comes before it put it at {end:,} to {end + tensor.num_bytes:,}."
            )
        end = tensor.end
    if start + end != size:
        which = "is cut off" if start + end > size else "has bytes that belong to no tensor"
        problems.append(f"{which}: {size:,} bytes, the header describes {start + end:,}.")
    return problems


@contextmanager
def _blaming_config() -> Iterator[None]:
    """Whatever goes wrong in the block is the fault of config.json: it may hold any value where any other belongs."""
    try:
        yield
    except Exception as error:
        raise CheckpointError(f"{CONFIG} describes no model that can be built: {error}") from error


def _read_config(files: _Files, tensors: dict[str, _Tensor]):
    """The `Sa2VAChatConfig` of a checkpoint. Whether it is Sa2VA-i is read off its keys, as when loading."""
    from .configuration_sa2va import Sa2VAChatConfig

    values = _read_json(files, CONFIG)
    if values.get("model_type") != Sa2VAChatConfig.model_type:
        raise CheckpointError(
            f"{CONFIG} has model_type {values.get('model_type')!r}; {Sa2VAChatConfig.model_type!r} makes a Sa2VA."
        )
    with _blaming_config():
        grounding = dict(values.get("grounding_config") or {})
        if grounding.get("separate_prompt_decoder") is None:
            grounding["separate_prompt_decoder"] = any(name.startswith(PROMPT_DECODER) for name in tensors)
        return Sa2VAChatConfig.from_dict({**values, "grounding_config": grounding})


def _family(config) -> str:
    """What the checkpoint is made of, in a few words."""
    if hasattr(config, "qwen_vl_type"):
        name = QWEN_VL_NAMES[config.qwen_vl_type]
    else:
        name = f"InternVL + {type(config.llm_config).__name__.removeprefix('Sa2VA').removesuffix('Config')}"
    return f"{name} (Sa2VA-i)" if config.grounding_config.separate_prompt_decoder else name


class _Entry(NamedTuple):
    """One key of the released layout, and the keys of the native layout that it becomes; with their shapes.

    `tied` ones may be left out: the config says that another key has the same values.
    """

    released: dict[str, tuple[int, ...]]
    native: dict[str, tuple[int, ...]]
    tied: bool

    def layout_in(self, found: Container[str]) -> str | None:
        """Which of the two is there; None if neither is or they are alike."""
        if self.released.keys() == self.native.keys():
            return None
        if any(name in found for name in self.released):
            return "released"
        return "native" if any(name in found for name in self.native) else None


def _expected_entries(config) -> list[_Entry]:
    """All keys of the model that a config describes, built without memory on the meta device."""
    import torch
    from transformers.core_model_loading import revert_weight_conversion

    from .modeling_sa2va import Sa2VAChatModel

    if getattr(config, "quantization_config", None):
        raise CheckpointError("The weights are quantized; check the checkpoint they were made from.")
    with _blaming_config(), torch.device("meta"):
        model = Sa2VAChatModel(config)
    weights = model.state_dict()
    rules = model._weight_conversions  # between the released layout and ours; saving reverses them
    native: dict[str, dict[str, tuple[int, ...]]] = defaultdict(dict)
    for name, released_name in _released_names(weights, rules).items():
        native[released_name][name] = tuple(weights[name].shape)
    released = revert_weight_conversion(model, weights)
    tied = model.all_tied_weights_keys.keys()
    return [
        _Entry({name: tuple(tensor.shape)}, native[name], tied=native[name].keys() <= tied)
        for name, tensor in released.items()
    ]


def _released_names(names: Iterable[str], rules: list) -> dict[str, str]:
    """What saving calls each key: tensors that belong together are joined first, then all are renamed."""
    from transformers.core_model_loading import WeightConverter

    reverse = [rule.reverse_transform() for rule in reversed(rules)]
    reverse.sort(key=lambda rule: not isinstance(rule, WeightConverter))
    released = {}
    for name in names:
        released[name] = name
        for rule in reverse:
            released[name], _ = rule.rename_source_key(released[name])
    return released


class _Comparison(NamedTuple):
    """Keys of a checkpoint beside those of its model."""

    layout: str | None = None
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: tuple[ShapeMismatch, ...] = ()


def _compare(entries: Sequence[_Entry], found: dict[str, tuple[int, ...]]) -> _Comparison:
    """Judges every key in the layout in which it is there; what is missing is named as most others are."""
    layouts = [entry.layout_in(found) for entry in entries]
    count = Counter(layout for layout in layouts if layout)
    usual = "native" if count["native"] > count["released"] else "released"
    expected: dict[str, tuple[int, ...]] = {}
    for entry, layout in zip(entries, layouts, strict=True):
        keys = entry.native if (layout or usual) == "native" else entry.released
        if not entry.tied or any(name in found for name in keys):
            expected |= keys
    return _Comparison(
        layout="mixed" if len(count) > 1 else next(iter(count), None),
        missing=tuple(name for name in expected if name not in found),
        unexpected=tuple(sorted(name for name in found if name not in expected)),
        mismatched=tuple(
            ShapeMismatch(name, shape, found[name])
            for name, shape in expected.items()
            if name in found and found[name] != shape
        ),
    )


def convert_pickles(folder: str | Path, out: str | Path) -> list[Path]:
    """Writes a checkpoint of `pytorch_model*.bin` again as safetensors, one file at a time.

    The pickles are read by `torch.load(weights_only=True)`, which runs nothing they may hold. Values, dtypes and keys
    stay; config, tokenizer and code files are copied. Files get their names when they are whole, the index last.

    Args:
        folder: with the pickles.
        out: new folder, or one without weights.

    Returns:
        The weight files written.

    Raises:
        OSError: there are no pickles, the index names one that is not there, or `out` already has weights.
        CheckpointError: a file holds anything but tensors by name. (A `ValueError`.)
    """
    folder, out = Path(folder), Path(out)
    pickles = _find_pickles(folder)
    if any((out / name).exists() for name in (WEIGHTS, WEIGHTS_INDEX)):
        raise FileExistsError(f"{out} already has weights. Name a new folder.")
    out.mkdir(parents=True, exist_ok=True)
    for file in folder.iterdir():
        if file.is_file() and not file.name.endswith(WEIGHT_SUFFIXES):
            shutil.copy(file, out)
    count = len(pickles)
    names = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)] if count > 1 else [WEIGHTS]
    sizes = {name: _convert_pickle(pickle, out / name) for name, pickle in zip(names, pickles, strict=True)}
    if count > 1:
        _write_index(sizes, out / WEIGHTS_INDEX)
    return [out / name for name in names]


def _find_pickles(folder: Path) -> list[Path]:
    """The pickled weights of a folder, by their index if there is one."""
    if not folder.is_dir():
        raise NotADirectoryError(
            f"{folder} is not a folder. A Hub repository has to be fetched first: hf download NAME --local-dir FOLDER"
        )
    names = {path.name for path in folder.glob("pytorch_model*.bin")}
    if (folder / PICKLE_INDEX).is_file():
        weight_map = _read_weight_map(_find_files(str(folder), None), PICKLE_INDEX)
        if absent := sorted(set(weight_map.values()) - names):
            raise FileNotFoundError(f"{PICKLE_INDEX} names files that are not in {folder}: {', '.join(absent)}.")
        names = set(weight_map.values())
    if not names:
        raise FileNotFoundError(f"{folder} has no pickled weights: pytorch_model*.bin are looked for.")
    return [folder / name for name in sorted(names)]


def _convert_pickle(pickle: Path, target: Path) -> dict[str, int]:
    """Writes one file of pickled tensors as safetensors; returns the bytes of each."""
    import torch
    from safetensors.torch import save_file

    try:
        tensors = torch.load(pickle, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(pickle))
    except (UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise CheckpointError(f"{pickle} can't be read as tensors, so it is not converted: {error}") from error
    if not isinstance(tensors, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
        raise CheckpointError(f"{pickle} holds more than tensors by their names. Save the model's state_dict alone.")
    temporary = target.with_name(f"{target.name}.tmp")
    save_file(_in_memory_of_their_own(tensors), temporary, metadata={"format": "pt"})
    temporary.replace(target)
    return {name: tensor.nbytes for name, tensor in tensors.items()}


def _in_memory_of_their_own(tensors: dict[str, Any]) -> dict[str, Any]:
    """What safetensors asks for: contiguous, and no two in one storage. Only tensors that are not so are copied."""
    seen: set[int] = set()
    separate = {}
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()
        alone = tensor.nbytes == storage.nbytes() and storage.data_ptr() not in seen
        seen.add(storage.data_ptr())
        tensor = tensor.detach() if alone else tensor.detach().clone()
        separate[name] = tensor.contiguous()
    return separate


def _write_index(sizes: dict[str, dict[str, int]], path: Path) -> None:
    """Writes the index of shards; `sizes` are the bytes of the tensors of each file."""
    keys = Counter(key for shard in sizes.values() for key in shard)
    if twice := sorted(key for key, count in keys.items() if count > 1):
        raise CheckpointError(f"More than one file holds {', '.join(twice)}. Keep one form of the weights, then retry.")
    index = {
        "metadata": {"total_size": sum(sum(shard.values()) for shard in sizes.values())},
        "weight_map": {key: name for name, shard in sizes.items() for key in shard},
    }
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(json.dumps(index, indent=2) + "\n")
    temporary.replace(path)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line.

    Args:
        argv: arguments without the program's name; default those of the process.

    Returns:
        Exit code: 0, 1 (something is wrong with the checkpoint) or 2 (the command can't be carried out).
    """
    arguments = _parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return WRONG_CHECKPOINT if isinstance(error, CheckpointError) else CANNOT_RUN


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hub_upload.py", description="Checks and converts Sa2VA checkpoints.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    check = commands.add_parser("check", help="compare keys and shapes with the config; reads no weights")
    check.add_argument("checkpoint", metavar="FOLDER_OR_REPO", help="folder, or name on the Hugging Face Hub")
    check.add_argument("--json", action="store_true", help="print the report as one JSON object")
    check.add_argument("--revision", help="branch, tag or commit of a Hub repository")
    check.set_defaults(run=_run_check)
    convert = commands.add_parser("convert", help="write pickled weights (pytorch_model*.bin) as safetensors")
    convert.add_argument("folder", metavar="FOLDER", help="checkpoint with pickled weights")
    convert.add_argument("out", metavar="OUT", help="new folder for the converted checkpoint")
    convert.set_defaults(run=_run_convert)
    return parser


def _run_check(arguments: argparse.Namespace) -> int:
    report = check_checkpoint(arguments.checkpoint, revision=arguments.revision)
    print(json.dumps(report.to_dict(), indent=2) if arguments.json else report)
    return 0 if report.ok else WRONG_CHECKPOINT


def _run_convert(arguments: argparse.Namespace) -> int:
    for path in convert_pickles(arguments.folder, arguments.out):
        print(f"wrote {path}")
    return 0


def _package_of_script() -> str:
    """Run as a script, this file has no package to import its neighbours from: its folder becomes one."""
    package = types.ModuleType("sa2va")
    package.__path__ = [str(Path(__file__).resolve().parent)]
    sys.modules[package.__name__] = package
    return package.__name__


if __name__ == "__main__":
    __package__ = __package__ or _package_of_script()
    sys.exit(main())
