"""Checkpoints on their way to and from the Hub; a command line and the functions behind it.

    python hub_upload.py check FOLDER_OR_REPO [--json] [--revision R]     is everything there, at its shape?
    python hub_upload.py convert FOLDER OUT                               pickled weights -> safetensors
    python hub_upload.py pack SOURCE OUT [...]                            any checkpoint -> a complete model repository
    python hub_upload.py push SOURCE REPO_ID [...]                        the same, and up to the Hub

* `check_checkpoint`    config.json and safetensors headers against the model they describe (`CheckpointReport`)
* `convert_pickles`     `pytorch_model*.bin` -> safetensors, without running what a pickle may hold
* `pack_checkpoint`     weights as released, this code, tokenizer and processor, a model card (`CardFacts`), tried out
* `push_checkpoint`     uploads what `pack_checkpoint` makes, in one commit; may be interrupted and run again

Exit codes: 0 all is right, 1 something is wrong with the checkpoint, 2 the command can't be carried out.
"""

import argparse
import filecmp
import fnmatch
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import types
import zipfile
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
PICKLE_INDEX = "pytorch_model.bin.index.json"
MAX_JSON_BYTES = 100_000_000  # as the safetensors format has it for headers
LFS_POINTER = b"version "  # how the text begins that git leaves in place of a large file
HEADER_NOTES = "__metadata__"  # what stands in a safetensors header beside the tensors
WEIGHT_DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}  # torch's names for them
# Never copied beside converted weights: other forms of them, or more pickles.
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack", ".gguf", ".index.json")
QWEN_VL_NAMES = {"qwen2_5_vl": "Qwen2.5-VL", "qwen3_vl": "Qwen3-VL"}
REWRITTEN_LAYOUTS = ("native", "mixed")  # by packing, into the released one
WRONG_CHECKPOINT, CANNOT_RUN = 1, 2

CARD, GENERATION, ADAPTER, TRAINING = "README.md", "generation_config.json", "adapter_config.json", "training.json"
SETTINGS = (GENERATION, "tokenizer_config.json", "processor_config.json")
REQUIREMENTS_FILE = "requirements.txt"
REQUIREMENTS = (  # those of pyproject.toml
    *("torch>=2.7", "torchvision>=0.22", "transformers>=5.10.1", "accelerate>=1.10", "sam2>=1.1", "pillow>=10.3"),
    *("opencv-python>=4.10", "huggingface_hub>=1.5", "safetensors>=0.5"),
)
DOCUMENTS = ("LICENSE*", "NOTICE*")
PICTURES = ("*.png", "*.jpg", "*.jpeg", "*.gif", "*.webp")  # where the card shows them
VOCABULARIES = ("tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json")
UPLOADED = (
    *("configuration_sa2va.py", "hub_upload.py", "modeling_sa2va.py", "processing_sa2va.py", "sam2_decoder.py"),
    *(CONFIG, GENERATION, WEIGHTS, WEIGHTS_INDEX, "model-[0-9]*-of-[0-9]*.safetensors"),
    *("tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", *VOCABULARIES),
    *("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json", "chat_template.jinja"),
    *(CARD, REQUIREMENTS_FILE, *DOCUMENTS),
)
LEFT_BY_TOOLS = (".cache", ".gitattributes", "__pycache__")  # by hf download, the Hub and Python
MAX_HUB_FILE = 50_000_000_000  # bytes; the Hub takes no larger file
CHUNK_BYTES = 2**25
PLACE_FIELDS = ("_name_or_path", "name_or_path", "is_local", "local_files_only", "tokenizer_file")

# Model cards. What each released checkpoint was made from, by type and width of the language model: its name, and the
# vision-language model that SAM 2 was joined to (the tables of arXiv 2501.04001 and of the released cards).
RELATIONS = ("adapter", "finetune", "merge", "quantized")
SAM2 = "facebook/sam2-hiera-large"
LINEAGE = {
    ("qwen2", 896): ("ByteDance/Sa2VA-1B", "OpenGVLab/InternVL2_5-1B"),
    ("qwen2", 2048): ("ByteDance/Sa2VA-4B", "OpenGVLab/InternVL2_5-4B"),
    ("internlm2", 4096): ("ByteDance/Sa2VA-8B", "OpenGVLab/InternVL2_5-8B"),
    ("internlm2", 6144): ("ByteDance/Sa2VA-26B", "OpenGVLab/InternVL2_5-26B"),
    ("qwen2", 1536): ("ByteDance/Sa2VA-InternVL3-2B", "OpenGVLab/InternVL3-2B"),
    ("qwen2", 3584): ("ByteDance/Sa2VA-InternVL3-8B", "OpenGVLab/InternVL3-8B"),
    ("qwen2", 5120): ("ByteDance/Sa2VA-InternVL3-14B", "OpenGVLab/InternVL3-14B"),
    ("qwen2_5_vl_text", 2048): ("ByteDance/Sa2VA-Qwen2_5-VL-3B", "Qwen/Qwen2.5-VL-3B-Instruct"),
    ("qwen2_5_vl_text", 3584): ("ByteDance/Sa2VA-Qwen2_5-VL-7B", "Qwen/Qwen2.5-VL-7B-Instruct"),
    ("qwen3_vl_text", 2560): ("ByteDance/Sa2VA-Qwen3-VL-4B", "Qwen/Qwen3-VL-4B-Instruct"),
}
TAGS = ("sa2va", "sam2", "referring-segmentation", "video-segmentation", "grounding")
TEMPLATE = Path(__file__).parent / "docs" / "model_card.md"
BARE_CARD = "---\n{{ card_data }}\n---\n\n# {{ name }}\n\nSa2VA ({{ family }}, {{ parameters }} parameters).\n"
CARD_MARK = re.compile(r"\n<!-- (?P<id>\S+), by hub_upload\.py: [0-9a-f]{64}\. .*-->\n\Z")
FORM_PHRASES = ("[More Information Needed]", "<!-- This model card has been generated automatically")

# What nobody should find in a public repository.
SECRET = re.compile(
    r"\bhf_[A-Za-z0-9]{30,}|\bgh[pousr]_[A-Za-z0-9]{30,}|\bgithub_pat_\w{30,}|\bsk-[A-Za-z0-9_-]{32,}|"
    r"\bAKIA[0-9A-Z]{16}\b|\bxox[abprs]-[\w-]{10,}|-----BEGIN [A-Z ]*PRIVATE KEY-----"
)
LOCAL_PATH = re.compile(r"(?:[A-Za-z]:[\\/]|~/|\.{1,2}/|/[\w.@~+-]+/)[^\s\"]*")
LOCAL_PATH_IN_JSON = re.compile(r'(?<=")(?:[A-Za-z]:\\\\|~/|/[\w.@~+-]+/)[^\s"]+(?=")')
HOME_PATH = re.compile(
    r"(?<![\w./-])(?:[A-Za-z]:\\Users\\|/(?:home|Users|root|mnt|scratch|workspace)/)[\w.@~+-][^\s\"'`)]*"
)

# Run in a process of its own: everything loads from one folder, and all parts compute.
TRIAL = """
import sys
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor, AutoTokenizer, logging

logging.set_verbosity_error()
folder = sys.argv[1]
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
model, report = AutoModel.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
for part in (processor, model):
    if not type(part).__module__.startswith("transformers_modules."):
        sys.exit(f"{type(part)} is not from this folder")
if lost := [*report["missing_keys"], *report["unexpected_keys"], *report["mismatched_keys"]]:
    sys.exit(f"keys that do not fit: {lost}")
inputs = processor.prepare(Image.new("RGB", (64, 48), "white"), None, "Please segment the object.")
answer = tokenizer("It is [SEG].", add_special_tokens=False, return_tensors="pt").input_ids
input_ids = torch.cat([inputs.input_ids, answer], dim=1)
more = {} if inputs.image_grid_thw is None else {"image_grid_thw": inputs.image_grid_thw}
with torch.no_grad():
    output = model.eval()(
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        labels=torch.cat([torch.full_like(inputs.input_ids, -100), answer], dim=1),
        pixel_values=inputs.pixel_values.to(model.dtype),
        grounding_pixel_values=[processor.grounding_pixel_values(list(inputs.frames)).to(model.dtype)],
        mask_labels=[torch.ones(1, 48, 64)],
        **more,
    )
if not torch.isfinite(output.loss) or len(output.pred_masks[0]) != 1:
    sys.exit(f"one forward pass gave loss {output.loss} and {len(output.pred_masks[0])} masks instead of 1")
"""

# How often a request to the Hub is sent again, and for which answers.
ATTEMPTS, FIRST_WAIT = 5, 1.0  # seconds, twice as long each time
PASSING_STATUS = (408, 429, 500, 502, 503, 504)
MOVED_STATUS = (409, 412)  # somebody else has committed meanwhile
TOKENS_PAGE = "https://huggingface.co/settings/tokens"
HARMLESS = (".gitattributes", ".gitignore", CARD, *DOCUMENTS, *PICTURES)  # what any repository may have
OLD_CODE = ("configuration_*.py", "modeling_*.py", "processing_*.py", "tokenization_*.py")


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
    return _inspect(_find_files(str(name_or_path), revision))[0]


def _inspect(files: "_Files") -> tuple[CheckpointReport, Any, dict[str, "_Tensor"]]:
    """The report of `check_checkpoint`, the config (None if it can't be read), and what the weight files hold."""
    tensors, problems = _read_weights(files)
    problems += [
        f"{name} is {tensor.dtype}; weights are one of {', '.join(WEIGHT_DTYPES)}, so it is quantized or damaged"
        for name, tensor in tensors.items()
        if tensor.dtype not in WEIGHT_DTYPES
    ]
    config, comparison = None, _compare((), {})
    try:
        config = _read_config(files, tensors)
        if tensors or not problems:
            entries = _entries_of(_model_without_memory(config))
            comparison = _compare(entries, {name: tensor.shape for name, tensor in tensors.items()})
    except CheckpointError as error:
        problems.append(str(error))
    dtypes: Counter[str] = Counter()
    for tensor in tensors.values():
        dtypes[tensor.dtype] += math.prod(tensor.shape)
    report = CheckpointReport(
        name=files.name,
        family=config and _family(config),
        language_model=config and config.get_text_config().model_type,
        num_parameters=sum(dtypes.values()),
        num_bytes=sum(tensor.end - tensor.begin for tensor in tensors.values()),
        dtypes=dict(sorted(dtypes.items())),
        problems=tuple(problems),
        **comparison,
    )
    return report, config, tensors


class _Files(NamedTuple):
    """The files of a checkpoint: their sizes in bytes by name, and `read(name, begin, count)`."""

    name: str
    sizes: dict[str, int]
    read: Callable[[str, int, int], bytes]


def _find_files(name: str, revision: str | None = None) -> _Files:
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
        with _asking_for(name):
            listing = hub.ls(name, detail=True, revision=revision)
    except (ValueError, NotImplementedError, FileNotFoundError) as error:  # no name of a repository, or of none
        version = f" at revision {revision}" if revision else ""
        raise FileNotFoundError(
            f"{name}{version} is neither a folder nor a repository on the Hub that you may read. Give the folder that "
            "holds config.json and the weights, or a name like ByteDance/Sa2VA-4B; private ones need `hf auth login`."
        ) from error

    def read(file: str, begin: int, count: int) -> bytes:
        with _asking_for(name), hub.open(f"{name}/{file}", "rb", revision=revision, block_size=2**18) as stream:
            stream.seek(begin)
            return stream.read(count)

    sizes = {entry["name"].rpartition("/")[2]: entry["size"] for entry in listing if entry["type"] == "file"}
    return _Files(name, sizes, read)


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
    """A tensor as a safetensors header describes it; its bytes are `begin`..`end` of the file."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @classmethod
    def parse(cls, file: str, start: int, name: str, entry: Any) -> "_Tensor":
        """The tensor of an entry in a header that ends at `start`, or CheckpointError for one that is no such thing."""
        try:
            dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        except (TypeError, KeyError, ValueError):
            dtype, shape, begin, end = None, (), None, None
        numbers = (*shape, begin, end)
        plausible = len(shape) <= 64 and all(type(number) is int and 0 <= number < 2**63 for number in numbers)
        if not (isinstance(dtype, str) and plausible and math.prod(shape) < 2**63):
            raise CheckpointError(f"the header's entry of {name} is not dtype, shape and two offsets")
        return cls(file, dtype, shape, start + begin, start + end)

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
    if WEIGHTS not in shards and not isinstance(_read_json(files, WEIGHTS_INDEX).get("metadata"), dict):
        problems.append(f'{WEIGHTS_INDEX} has no metadata, without which it is not read. Add "metadata": {{}}.')
    for file, indexed in shards.items():
        try:
            header, wrong = _read_header(files, file)
        except CheckpointError as error:
            problems.append(f"{file}: {error}")
            continue
        if indexed is not None:
            wrong += [
                f"{name} is not in it, though {WEIGHTS_INDEX} puts it there." for name in indexed if name not in header
            ]
            strange = sorted(header.keys() - set(indexed))
            wrong += [f"holds {name}, which {WEIGHTS_INDEX} does not put there." for name in strange]
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


def _read_header(files: _Files, name: str) -> tuple[dict[str, _Tensor], list[str]]:
    """The tensors of a safetensors file, and what is wrong with where it puts them; raises as `_header_entries`."""
    entries, start = _header_entries(files, name)
    notes = entries.pop(HEADER_NOTES, None)
    tensors = {key: _Tensor.parse(name, start, key, entry) for key, entry in entries.items()}
    problems = _offset_problems(tensors, start, files.sizes[name])
    if not (notes is None or (isinstance(notes, dict) and all(isinstance(note, str) for note in notes.values()))):
        problems.append(f"has {HEADER_NOTES} other than texts by name, for which safetensors refuses the file.")
    return tensors, problems


def _header_entries(files: _Files, name: str) -> tuple[dict[str, Any], int]:
    """All that the header of a safetensors file says, by name, and the byte at which the tensors begin.

    safetensors itself would map the whole file, for which memory may lack.

    Raises:
        CheckpointError: the file is not there, or its header can't be read. Nothing is allocated on a header's word.
    """
    if name not in files.sizes:
        raise CheckpointError(f"is not there, though {WEIGHTS_INDEX} names it.")
    if not name.endswith(".safetensors"):
        raise CheckpointError(f"is no .safetensors file, though {WEIGHTS_INDEX} names it. No other is read.")
    size, start = files.sizes[name], files.read(name, 0, 8)
    if start == LFS_POINTER:
        raise CheckpointError("is a Git LFS pointer and not the weights themselves. Fetch them: git lfs pull")
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length > MAX_JSON_BYTES or 8 + length > size:
        raise CheckpointError(
            f"has no whole safetensors header: {size:,} bytes, of which the header claims {length:,} "
            f"(at most {MAX_JSON_BYTES:,} are allowed). It is cut off or not a safetensors file."
        )
    return _parse_json(files.read(name, 8, length), "the header"), 8 + length


def _offset_problems(tensors: dict[str, _Tensor], start: int, size: int) -> list[str]:
    """Whether the tensors fill the file behind its header, which ends at `start`, one after the other."""
    problems, end = [], start
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if tensor.num_bytes is None:
            problems.append(f"{name} has the unknown dtype {tensor.dtype!r}.")
        elif (tensor.begin, tensor.end) != (end, end + tensor.num_bytes):
            problems.append(
                f"{name} is said to be at bytes {tensor.begin - start:,} to {tensor.end - start:,}; its shape, its "
                f"dtype and what comes before it put it at {end - start:,} to {end - start + tensor.num_bytes:,}."
            )
        end = tensor.end
    if end != size:
        which = "is cut off" if end > size else "has bytes that belong to no tensor"
        problems.append(f"{which}: {size:,} bytes, the header describes {end:,}.")
    return problems


@contextmanager
def _as_checkpoint_error() -> Iterator[None]:
    """Whatever goes wrong in the block is the fault of config.json: it may hold any value where any other belongs."""
    try:
        yield
    except Exception as error:
        raise CheckpointError(f"{CONFIG} describes no model that can be built: {error}") from error


def _read_config(files: _Files, tensors: dict[str, _Tensor]):
    """The `Sa2VAChatConfig` of a checkpoint. Whether it is Sa2VA-i is read off its keys, as when loading."""
    from .configuration_sa2va import PROMPT_DECODER, Sa2VAChatConfig

    values = _read_json(files, CONFIG)
    if values.get("model_type") != Sa2VAChatConfig.model_type:
        raise CheckpointError(
            f"{CONFIG} has model_type {values.get('model_type')!r}; {Sa2VAChatConfig.model_type!r} makes a Sa2VA."
        )
    with _as_checkpoint_error():
        grounding = dict(values.get("grounding_config") or {})
        if grounding.get("separate_prompt_decoder") is None:
            grounding["separate_prompt_decoder"] = any(f".{PROMPT_DECODER}." in name for name in tensors)
        return Sa2VAChatConfig.from_dict({**values, "grounding_config": grounding})


def _family(config) -> str:
    """What the checkpoint is made of, in a few words."""
    if config.is_qwen_vl:
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


def _model_without_memory(config):
    """The model that a config describes, on the meta device."""
    import torch

    from .modeling_sa2va import Sa2VAChatModel

    if getattr(config, "quantization_config", None):
        raise CheckpointError(
            "The weights are quantized, and only transformers can tell whether they fit. Take the checkpoint they were "
            "made from; quantized ones go to the Hub by model.push_to_hub."
        )
    with _as_checkpoint_error(), torch.device("meta"):
        return Sa2VAChatModel(config)


def _entries_of(model) -> list[_Entry]:
    """All keys of a model."""
    from transformers.core_model_loading import revert_weight_conversion

    from .modeling_sa2va import ModuleNames

    weights, names = model.state_dict(), ModuleNames(model).released
    native: dict[str, dict[str, tuple[int, ...]]] = defaultdict(dict)
    for name, tensor in weights.items():
        native[names[name]][name] = tuple(tensor.shape)
    released = revert_weight_conversion(model, weights)
    tied = model.all_tied_weights_keys.keys()
    return [
        _Entry({name: tuple(tensor.shape)}, native[name], tied=native[name].keys() <= tied)
        for name, tensor in released.items()
    ]


def _compare(entries: Sequence[_Entry], found: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """What a `CheckpointReport` says of keys, each judged in the layout it has; missing ones are named as most are."""
    layouts = [entry.layout_in(found) for entry in entries]
    count = Counter(layout for layout in layouts if layout)
    usual = "native" if count["native"] > count["released"] else "released"
    expected: dict[str, tuple[int, ...]] = {}
    for entry, layout in zip(entries, layouts, strict=True):
        keys = entry.native if (layout or usual) == "native" else entry.released
        if not entry.tied or any(name in found for name in keys):
            expected |= keys
    return {
        "layout": "mixed" if len(count) > 1 else next(iter(count), None),
        "missing_keys": tuple(name for name in expected if name not in found),
        "unexpected_keys": tuple(sorted(name for name in found if name not in expected)),
        "mismatched_keys": tuple(
            ShapeMismatch(name, shape, found[name])
            for name, shape in expected.items()
            if name in found and found[name] != shape
        ),
    }


def convert_pickles(folder: str | Path, out: str | Path) -> list[Path]:
    """Writes a checkpoint of `pytorch_model*.bin` again as safetensors, one file at a time.

    The pickles are read by `torch.load(weights_only=True)`, which runs nothing they may hold. Values, dtypes and keys
    stay; config, tokenizer and code files are copied. `out` stays as it is until all is done; the index comes last.

    Args:
        folder: with the pickles.
        out: new folder, or one without weights.

    Returns:
        The weight files written.

    Raises:
        OSError: there are no pickles, the index names one that is not there, or `out` is a file or already has
            weights.
        CheckpointError: a file holds anything but tensors by name. (A `ValueError`.)
    """
    folder, out = Path(folder), Path(out)
    pickles = _find_pickles(folder)
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"{out} is a file. Name a new folder.")
    if any((out / name).exists() for name in (WEIGHTS, WEIGHTS_INDEX)):
        raise FileExistsError(f"{out} already has weights. Name a new folder.")
    count = len(pickles)
    names = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)] if count > 1 else [WEIGHTS]
    with _temporary_sibling(out, "converting") as made:
        sizes = {name: _convert_pickle(pickle, made / name) for name, pickle in zip(names, pickles, strict=True)}
        if count > 1:
            _write_json(made / WEIGHTS_INDEX, _index_of(sizes))
        for file in folder.iterdir():
            if file.is_file() and not file.name.endswith(WEIGHT_SUFFIXES):
                shutil.copy(file, made)
        out.mkdir(parents=True, exist_ok=True)
        for file in sorted(
            made.iterdir(), key=lambda file: (file.name == WEIGHTS_INDEX, file.suffix == ".safetensors")
        ):
            file.replace(out / file.name)
    return [out / name for name in names]


def _find_pickles(folder: Path) -> list[Path]:
    """The pickled weights of a folder, by their index if there is one."""
    if not folder.is_dir():
        raise NotADirectoryError(
            f"{folder} is not a folder. A Hub repository has to be fetched first: hf download NAME --local-dir FOLDER"
        )
    names = {path.name for path in folder.glob("pytorch_model*.bin")}
    if (folder / PICKLE_INDEX).is_file():
        weight_map = _read_weight_map(_find_files(str(folder)), PICKLE_INDEX)
        if absent := sorted(set(weight_map.values()) - names):
            raise FileNotFoundError(f"{PICKLE_INDEX} names files that are not in {folder}: {', '.join(absent)}.")
        names = set(weight_map.values())
    if not names:
        raise FileNotFoundError(f"{folder} has no pickled weights: pytorch_model*.bin are looked for.")
    return [folder / name for name in sorted(names)]


def _convert_pickle(pickle: Path, target: Path) -> dict[str, int]:
    """Writes one file of pickled tensors as safetensors; returns the bytes of each."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        tensors = torch.load(pickle, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(pickle))
    except OSError:
        raise
    except Exception as error:  # a damaged pickle holds any value where any other belongs
        raise CheckpointError(f"{pickle} can't be read as tensors, so it is not converted: {error}") from error
    if not isinstance(tensors, dict) or not all(isinstance(name, str) and _is_plain(t) for name, t in tensors.items()):
        raise CheckpointError(f"{pickle} holds more than tensors by their names. Save the model's state_dict alone.")
    try:
        save_file(_in_memory_of_their_own(tensors), target, metadata={"format": "pt"})
    except KeyError as error:
        raise CheckpointError(f"{pickle} holds a tensor of {error}, which safetensors has no name for.") from error
    except SafetensorError as error:
        raise OSError(f"{target.name} can't be written: {error}") from error
    return {name: tensor.nbytes for name, tensor in tensors.items()}


def _is_plain(value: Any) -> bool:
    """Whether it is a tensor whose numbers safetensors can write."""
    import torch

    is_dense = isinstance(value, torch.Tensor) and value.layout == torch.strided
    return is_dense and not value.is_meta and not value.is_quantized


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


def _index_of(sizes: dict[str, dict[str, int]]) -> dict[str, Any]:
    """The index of weight files; `sizes` are the bytes of the tensors of each."""
    keys = Counter(key for shard in sizes.values() for key in shard)
    if twice := sorted(key for key, count in keys.items() if count > 1):
        raise CheckpointError(f"More than one file holds {', '.join(twice)}. Keep one form of the weights, then retry.")
    return {
        "metadata": {"total_size": sum(sum(shard.values()) for shard in sizes.values())},
        "weight_map": {key: name for name, shard in sizes.items() for key in shard},
    }


@dataclass(frozen=True)
class CardFacts:
    """What a model card says and the checkpoint doesn't.

    Attributes:
        base_model: names on the Hub of what this was made from; default: the adapter's base model, else what the
            source's own card says, else what the released checkpoint of this size was made from.
        base_model_relation: "finetune", "merge", "adapter" or "quantized"; default fits `base_model`.
        license: as the Hub spells it, "apache-2.0"; default that of the source's card.
        language: ISO codes, or "multilingual".
        datasets: names on the Hub of what it was trained on.
        tags: more tags than every Sa2VA has.
        results: scores, each with the fields of `huggingface_hub.EvalResult`; see `read_results`.
        training: any facts about training, by name.
        new_card: write a new card even if the source has one that somebody wrote.
    """

    base_model: tuple[str, ...] = ()
    base_model_relation: str | None = None
    license: str | None = None
    language: tuple[str, ...] = ()
    datasets: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    results: tuple[Mapping[str, Any], ...] = ()
    training: Mapping[str, Any] | None = None
    new_card: bool = False

    def __post_init__(self):
        for field in fields(self):
            if isinstance(field.default, tuple) and isinstance(value := getattr(self, field.name), str):
                raise ValueError(f"{field.name}={value!r} must be a tuple: ({value!r},).")
        if self.base_model_relation not in (None, *RELATIONS):
            raise ValueError(f"base_model_relation={self.base_model_relation!r}: the Hub knows {', '.join(RELATIONS)}.")


@dataclass(frozen=True)
class PackReport:
    """What `pack_checkpoint` made.

    Attributes:
        folder: the model repository.
        family: as in `CheckpointReport`.
        weights: "linked" or "copied" (right as they were), "rewritten", or "merged" with an adapter.
        card: "generated" or "kept".
        tested: whether it was loaded in a process of its own.
        files: bytes of each file.
        notes: what the user should know.
    """

    folder: str
    family: str
    weights: str
    card: str
    tested: bool
    files: dict[str, int]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "\n".join(
            [
                f"{self.folder}: {self.family}",
                *_file_lines(self.files),
                f"weights {self.weights}, card {self.card}, "
                + ("loads with trust_remote_code" if self.tested else "not tried out"),
                *(f"note: {note}" for note in self.notes),
            ]
        )


def _file_lines(files: Mapping[str, int]) -> list[str]:
    return [f"  {size / 1e6:12,.3f} MB  {name}" for name, size in sorted(files.items())]


def pack_checkpoint(
    source: str | Path,
    out: str | Path,
    *,
    revision: str | None = None,
    facts: CardFacts = CardFacts(),
    max_shard_size: int | str | None = None,
    skip_test: bool = False,
    overwrite: bool = False,
    token: str | None = None,
    model_id: str | None = None,
) -> PackReport:
    """Writes a complete model repository: one that loads with `trust_remote_code`, wherever this package is not.

    Weights end in the released layout in safetensors. Those that are so already are hard-linked (copied to another
    file system), others are rewritten one tensor at a time, so that memory holds no more than the largest; only
    merging an adapter loads the model. Nothing is at `out` before all of it is right.

    Args:
        source: folder, or name on the Hub: released or native layout, or an adapter, which is merged.
        out: folder to write.
        revision: branch, tag or commit of a Hub repository.
        facts: for the model card. A card that somebody wrote or changed, in `source` or before in `out`, is kept.
        max_shard_size: bytes, or "5GB"; files that are larger are split. Default: what the Hub takes, 50 GB.
        skip_test: don't load the result and run it once in a process of its own.
        overwrite: replace `out` if it is there and holds nothing but a model repository.
        token: for private repositories on the Hub.
        model_id: name that the card's examples use; default the name of `out`.

    Raises:
        OSError: `source` is not there, `out` is and may not be replaced, or the Hub can't be asked.
        CheckpointError: `source` is no checkpoint that loads, or what would be written names secrets or local paths.
        ValueError: a revision of a folder, an impossible `max_shard_size` or result.
    """
    model_id = model_id or Path(out).absolute().name
    out = Path(out).resolve()  # of a link, what it leads to
    _put_back(out)
    _check_replaceable(out, overwrite)
    with _temporary_sibling(out, "fetching") as merged, _temporary_sibling(out, "packing") as target:
        origin = _find_origin(str(source), revision, token, merged)
        old_text = _find_card(out, origin.documents)
        files = _find_files(str(origin.folder))
        report, config, tensors = _inspect(files)
        if not report.ok:
            raise CheckpointError(f"Not packed, since something is wrong:\n{report}")
        _pack_settings(files, target, config)
        card, notes = _pack_card(target, config, report, origin, old_text, facts, model_id)
        # The weights last: they may take long, and what is before may be refused.
        weights = _pack_weights(files, tensors, target, config, report.layout, _size(max_shard_size))
        _pack_documents((origin.documents, out), target)
        packed = {name: target / name for name in _uploaded_names(target)}
        sizes = {name: path.stat().st_size for name, path in packed.items()}
        _refuse_private(packed, origin.folder, out)
        if not skip_test:
            _try_out(target)
        _put_in_place(target, out)
    weights = "merged" if origin.base is not None else weights
    return PackReport(str(out), report.family, weights, card, not skip_test, sizes, notes)


def _check_replaceable(out: Path, overwrite: bool) -> None:
    """Raises FileExistsError where writing `out` would remove what is not a model repository."""
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not overwrite):
        raise FileExistsError(f"{out} is there already. Name a new folder, or say --overwrite.")
    if not out.is_dir():
        return
    if out in (Path.cwd(), *Path.cwd().parents, Path.home()):
        raise FileExistsError(
            f"{out} is, or holds, the current or home folder, which is never replaced. Name a folder inside."
        )
    names = {path.name for path in out.iterdir()} - {*_uploaded_names(out), *LEFT_BY_TOOLS}
    if names:
        some = ", ".join(sorted(names)[:5]) + (", ..." if len(names) > 5 else "")
        raise FileExistsError(
            f"{out} also holds {some}, which is of no model repository and which --overwrite would remove. Move that "
            "away, or name a new folder."
        )


@contextmanager
def _temporary_sibling(path: Path, purpose: str) -> Iterator[Path]:
    """A new folder beside `path` for as long as the block lasts, of this call alone; a killed process leaves it."""
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.{purpose}-") as place:
        folder = Path(place) / f".{path.name}.{purpose}"
        folder.mkdir()
        yield folder


def _replaced(out: Path) -> Path:
    """Where the old `out` is while a new one takes its place."""
    return out.with_name(f".{out.name}.old")


def _put_back(out: Path) -> None:
    """Undoes a replacement in whose middle a process was killed."""
    if not out.exists() and _replaced(out).exists():
        _replaced(out).rename(out)


def _put_in_place(folder: Path, out: Path) -> None:
    """Renames a finished folder to `out`; what was there goes when the new one stands."""
    old = _replaced(out)
    if out.exists():
        shutil.rmtree(old, ignore_errors=True)
        out.rename(old)
    try:
        folder.rename(out)
    except OSError:
        if old.exists():
            old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _size(size: int | str | None) -> int:
    """Bytes of "5GB", "200MB" or a number."""
    if size is None:
        return MAX_HUB_FILE
    number = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", str(size).strip().upper())
    count = int(float(number[1]) * 1000 ** " KMGT".index(number[2] or " ")) if number else 0
    if not 0 < count <= MAX_HUB_FILE:
        raise ValueError(f"max_shard_size={size!r}: a size like 5GB or 200MB is needed, at most 50GB.")
    return count


class _Origin(NamedTuple):
    """Where a checkpoint comes from.

    `folder` holds it whole, `documents` its card and licenses; `name` is its name on the Hub or None; `base` names what
    an adapter was trained on, "" if only this machine knows it, None if there is no adapter; `training` are facts found
    beside it.
    """

    folder: Path
    documents: Path
    name: str | None
    base: str | None
    training: dict[str, Any]


def _find_origin(source: str, revision: str | None, token: str | None, merged: Path) -> _Origin:
    """Fetches a source from the Hub if it is no folder, and merges an adapter into the empty folder `merged`."""
    folder = Path(source)
    if folder.is_dir() and revision is not None:
        raise ValueError(f"revision={revision!r} is for Hub repositories, but {source} is a folder. Leave it out.")
    name = None if folder.is_dir() else source
    folder = _learned_in(folder) if name is None else _download(source, revision, token)
    training = _training_facts(folder)
    _check_settings(folder)
    if not (folder / ADAPTER).is_file():
        return _Origin(folder, folder, name, None, training)
    base, more = _merge_adapter(folder, merged, token)
    return _Origin(merged, folder, name, base, training | more)


def _learned_in(folder: Path) -> Path:
    """What training left in its folder: the adapter, or if there is none the whole model; other folders as they are."""
    places = (folder, folder / "adapter", folder / "final")
    return next((place for place in places if any((place / name).is_file() for name in (CONFIG, ADAPTER))), folder)


def _download(name: str, revision: str | None, token: str | None) -> Path:
    """What is needed of a Hub repository, in the cache. Never pickles."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except ValueError as error:
        raise FileNotFoundError(f"{name} is neither a folder nor a name on the Hub like ByteDance/Sa2VA-4B.") from error
    wanted = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.md", *PICTURES, *DOCUMENTS]
    options = {"allow_patterns": wanted, "ignore_patterns": ["*/*"]}
    with _asking_for(name):
        return Path(snapshot_download(name, revision=revision, token=token, **options))


def _check_settings(folder: Path) -> None:
    """Raises CheckpointError for a file of JSON that holds no object: transformers does not say which one it is."""
    files = _find_files(str(folder))
    for name in (*SETTINGS, "tokenizer.json"):
        if name in files.sizes:
            _read_json(files, name)


def _training_facts(folder: Path) -> dict[str, Any]:
    """What training.json says in plain words and numbers; no paths, which mean nothing elsewhere."""
    path = folder / TRAINING
    values = _parse_json(path.read_bytes(), TRAINING) if path.is_file() else {}
    return {
        name: value
        for name, value in values.items()
        if isinstance(value, str | int | float) and not LOCAL_PATH.match(str(value))
    }


def _merge_adapter(folder: Path, merged: Path, token: str | None) -> tuple[str, dict[str, Any]]:
    """Writes base model and adapter as one checkpoint; returns the base's public name or "", and facts for the card."""
    from .modeling_sa2va import Sa2VAChatModel, merged_with_adapter
    from .processing_sa2va import Sa2VAProcessor

    values = _parse_json((folder / ADAPTER).read_bytes(), ADAPTER)
    base = find_base(folder, values.get("base_model_name_or_path"))
    hub = {"token": token}
    if values.get("revision") and not Path(base).is_dir():
        hub["revision"] = values["revision"]  # of the base model, as PEFT means it
    alone = _without_adapter(folder, merged.with_name("base")) if base == str(folder) else base
    model = Sa2VAChatModel.from_pretrained(alone, **hub)
    try:
        model = merged_with_adapter(model, folder)
    except (ValueError, RuntimeError) as error:
        raise CheckpointError(f"The adapter in {folder} does not fit {base}: {error}") from error
    model.save_pretrained(merged)
    words = folder if (folder / "tokenizer_config.json").is_file() else base
    Sa2VAProcessor.from_pretrained(words, config=model.config, **(hub if words == base else {})).save_pretrained(merged)
    facts = {
        "adapter": f"{values.get('peft_type')}, merged",
        "rank": values.get("r"),
        "alpha": values.get("lora_alpha"),
    }
    return "" if Path(base).is_dir() else base, {name: value for name, value in facts.items() if value is not None}


def _without_adapter(folder: Path, out: Path) -> str:
    """A folder with the files of another but the adapter's config, by which transformers would load the adapter too."""
    out.mkdir()
    for path in folder.iterdir():
        if path.is_file() and path.name != ADAPTER:
            _link(path, out / path.name)
    return str(out)


def find_base(folder: Path, named: Any) -> str:
    """What an adapter belongs to: the model in its own folder, a folder by its name, else that name on the Hub.

    Args:
        folder: of the adapter.
        named: its `base_model_name_or_path`.

    Raises:
        FileNotFoundError: neither a folder nor a name of the Hub.
    """
    if any((folder / name).is_file() for name in (WEIGHTS, WEIGHTS_INDEX)):
        return str(folder)
    is_name = isinstance(named, str) and named != ""
    for place in (Path(named), folder / named) if is_name else ():
        if place.is_dir():
            return str(place)
    if not is_name or LOCAL_PATH.match(named) or named.count("/") != 1:
        raise FileNotFoundError(
            f"{folder / ADAPTER} names the base model {named!r}, which is not here. Put the folder or the name on the "
            "Hub of what the adapter was trained on into base_model_name_or_path, or give merge.py --model."
        )
    return named


def _pack_weights(
    files: _Files, tensors: Mapping[str, _Tensor], out: Path, config, layout: str | None, max_bytes: int
) -> str:
    """Links, copies or rewrites the weights of a folder that was found right; says which."""
    folder = Path(files.name)
    shards = {tensor.file for tensor in tensors.values()}
    if layout in REWRITTEN_LAYOUTS or any(files.sizes[name] > max_bytes for name in shards):
        _rewrite_weights(files, tensors, out, config, max_bytes)
        return "rewritten"
    names = _usual_names(shards)
    how = {_link(folder / name, out / new) for name, new in names.items()}
    if WEIGHTS not in shards:
        index = _read_json(files, WEIGHTS_INDEX)
        weight_map = {key: names[file] for key, file in index["weight_map"].items()}
        _write_json(out / WEIGHTS_INDEX, {**index, "weight_map": weight_map})
    return how.pop() if len(how) == 1 else "copied"


def _usual_names(shards: Collection[str]) -> dict[str, str]:
    """The names that the Hub and other tools know weight files by; an index may name them otherwise."""
    if all(_matches(name, UPLOADED) for name in shards):
        return {name: name for name in shards}
    total = len(shards)
    return {name: f"model-{number:05d}-of-{total:05d}.safetensors" for number, name in enumerate(sorted(shards), 1)}


def _link(source: Path, target: Path) -> str:
    try:
        os.link(source.resolve(), target)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(source, target)
        return "copied"
    return "linked"


class _Move(NamedTuple):
    """A tensor to be written: its header entry without offsets, and the tensors it is made of."""

    dtype: str
    shape: tuple[int, ...]
    parts: dict[str, _Tensor]

    @property
    def num_bytes(self) -> int:
        return sum(tensor.end - tensor.begin for tensor in self.parts.values())


def _rewrite_weights(files: _Files, tensors: Mapping[str, _Tensor], out: Path, config, max_bytes: int) -> None:
    """Writes weights in the released layout into files of at most `max_bytes` (but for single larger tensors)."""
    from huggingface_hub import split_state_dict_into_shards_factory

    model = _model_without_memory(config)
    moves = _plan_moves(tensors, _entries_of(model))
    split = split_state_dict_into_shards_factory(
        moves,
        get_storage_size=lambda move: move.num_bytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_bytes,
    )
    for name, keys in split.filename_to_tensors.items():
        _write_shard(files, out / name, {key: moves[key] for key in keys}, model)
    if split.is_sharded:
        _write_json(out / WEIGHTS_INDEX, {"metadata": split.metadata, "weight_map": split.tensor_to_filename})


def _plan_moves(found: Mapping[str, _Tensor], entries: Sequence[_Entry]) -> dict[str, _Move]:
    """What becomes of the tensors of a checkpoint in which no key is missing or at another shape."""
    moves = {}
    for entry in entries:
        keys = entry.native if entry.layout_in(found) == "native" else entry.released
        if entry.tied and not any(key in found for key in keys):
            continue
        parts = {key: found[key] for key in keys}
        dtypes = {tensor.dtype for tensor in parts.values()}
        if len(dtypes) > 1:
            raise CheckpointError(f"{', '.join(parts)} are fused when saved, but are {', '.join(sorted(dtypes))}.")
        (dtype,) = dtypes
        moves |= {name: _Move(dtype, shape, parts) for name, shape in entry.released.items()}
    return moves


def _write_shard(files: _Files, path: Path, moves: Mapping[str, _Move], model) -> None:
    """Writes a safetensors file, tensor by tensor. As the format's own writer does, wide numbers stand first."""
    order = sorted(moves, key=lambda name: -moves[name].num_bytes // max(1, math.prod(moves[name].shape)))
    header: dict[str, Any] = {HEADER_NOTES: {"format": "pt"}}
    end = 0
    for name in order:
        begin, end = end, end + moves[name].num_bytes
        header[name] = {"dtype": moves[name].dtype, "shape": moves[name].shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            for data in _bytes_of(files, moves[name], model):
                stream.write(data)


def _bytes_of(files: _Files, move: _Move, model) -> Iterator[bytes]:
    """The bytes of a tensor: those of the one that it is, else of what saving makes of several."""
    import torch
    from transformers.core_model_loading import revert_weight_conversion

    if len(move.parts) == 1:
        (tensor,) = move.parts.values()
        for begin in range(tensor.begin, tensor.end, CHUNK_BYTES):
            yield files.read(tensor.file, begin, min(CHUNK_BYTES, tensor.end - begin))
        return
    whole = {}
    for key, tensor in move.parts.items():
        data = bytearray(files.read(tensor.file, tensor.begin, tensor.end - tensor.begin))
        whole[key] = torch.frombuffer(data, dtype=getattr(torch, WEIGHT_DTYPES[tensor.dtype])).view(tensor.shape)
    (fused,) = revert_weight_conversion(model, whole).values()
    yield fused.contiguous().flatten().view(torch.uint8).numpy().data


def _pack_settings(files: _Files, out: Path, config) -> None:
    """Configs, tokenizer, processor, code and requirements, without what only the old place needed."""
    from transformers import GenerationConfig

    from .configuration_sa2va import auto_map, copy_code
    from .processing_sa2va import Sa2VAProcessor

    folder = Path(files.name)
    try:
        processor = Sa2VAProcessor.from_pretrained(folder, config=config)
    except (OSError, ValueError) as error:
        raise CheckpointError(str(error)) from error
    processor.save_pretrained(out)
    if (folder / GENERATION).is_file():
        shutil.copyfile(folder / GENERATION, out / GENERATION)
    else:
        GenerationConfig.from_model_config(config).save_pretrained(out)
    values = _read_json(files, CONFIG)
    mapping = auto_map(config.is_qwen_vl)
    grounding = dict(values.get("grounding_config") or {})
    grounding["separate_prompt_decoder"] = config.grounding_config.separate_prompt_decoder  # no need to ask the weights
    values |= {"auto_map": mapping, "architectures": [mapping["AutoModel"].rpartition(".")[2]]}
    values["grounding_config"] = grounding
    _write_json(out / CONFIG, _without_places(values))
    for name in SETTINGS:
        _write_json(out / name, _without_places(json.loads((out / name).read_text(encoding="utf-8"))))
    copy_code(out)
    (out / REQUIREMENTS_FILE).write_text("\n".join(REQUIREMENTS) + "\n")


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _without_places(value: Any) -> Any:
    """JSON values without the fields in which transformers notes where something was loaded from."""
    if isinstance(value, dict):
        return {name: _without_places(part) for name, part in value.items() if name not in PLACE_FIELDS}
    return [_without_places(part) for part in value] if isinstance(value, list) else value


def _pack_documents(folders: Sequence[Path], out: Path) -> None:
    """License texts, and the pictures that the card shows; ours if the card says Apache-2.0 and there is none."""
    text = _read_card(out)
    for path in (path for folder in folders if folder.is_dir() for path in sorted(folder.iterdir())):
        if path.is_file() and (_matches(path.name, DOCUMENTS) or _is_shown(path.name, text)):
            shutil.copyfile(path, out / path.name)
    named, ours, there = _card(text).data.license, Path(__file__).with_name("LICENSE"), out / "LICENSE"
    if not ours.is_file():
        return
    if named == "apache-2.0" and not there.exists():
        shutil.copyfile(ours, there)
    elif named not in ("apache-2.0", None) and there.is_file() and filecmp.cmp(ours, there, shallow=False):
        there.unlink()  # of an earlier packing, when the card said something else


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _is_shown(name: str, card: str) -> bool:
    """Whether a file is a picture in a model card: cat.png is none where it shows fat-cat.png."""
    return _matches(name, PICTURES) and re.search(rf"(?<![\w.-]){re.escape(name)}", card) is not None


def _pack_card(
    out: Path, config, report: CheckpointReport, origin: _Origin, old_text: str, facts: CardFacts, model_id: str
) -> tuple[str, tuple[str, ...]]:
    """Writes README.md; says whether it was "generated" or "kept", and what is to be known about it."""
    written_by_hand = bool(old_text) and not _is_made_by_machine(old_text)
    if written_by_hand and not facts.new_card:
        text = _readdressed(old_text, origin.name or origin.documents, model_id)
        (out / CARD).write_text(text, encoding="utf-8")
        given = [field.name for field in fields(facts) if getattr(facts, field.name)]
        notes = [f"The card is the one found; {', '.join(given)} did not change it (--new-card)."] if given else []
        return "kept", (*_card_notes(text, model_id), *notes)
    old = _card("" if _is_form(old_text) else old_text).data
    text = _render_card(config, report, origin, old, facts, model_id)
    (out / CARD).write_text(_marked(text, model_id), encoding="utf-8")
    return "generated", _card_notes(text, model_id)


def _read_card(folder: Path) -> str:
    """The card of a folder, "" if it has none."""
    path = folder / CARD
    try:
        return path.read_text(encoding="utf-8") if path.is_file() else ""
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not in UTF-8: {error}. Save it so.") from error


def _find_card(*folders: Path) -> str:
    """The first card that somebody wrote or changed, else that of the last folder; raises if it can't be read."""
    for folder in folders:
        text = _read_card(folder)
        if not _is_made_by_machine(text):
            break
    _card(text)  # said before anything that takes long
    return text


def _card(text: str):
    """The `ModelCard` of a README.md."""
    from huggingface_hub import ModelCard

    try:
        return ModelCard(text or "---\n\n---\n")  # without the empty line, it warns that there is no metadata
    except Exception as error:  # of PyYAML or of the values' meaning: whatever is wrong, it is the card's fault
        raise CheckpointError(f"{CARD} has metadata that can't be read: {error}") from error


def _marked(text: str, model_id: str) -> str:
    """A generated card with a last line that tells whether somebody has changed it since."""
    text = text.rstrip() + "\n"
    digest = hashlib.sha256(text.encode()).hexdigest()
    return (
        f"{text}\n<!-- {model_id}, by hub_upload.py: {digest}. A card that is changed above is kept from then on. -->\n"
    )


def _is_made_by_machine(text: str) -> bool:
    """Whether nobody has written or changed a card: it is ours, a form that a library filled in, or metadata only."""
    if not re.sub(r"\A---\n.*?\n---(\n|\Z)", "", text, flags=re.DOTALL).strip():
        return True
    if match := CARD_MARK.search(text):
        return _marked(text[: match.start()], match["id"]) == text
    return _is_form(text)


def _is_form(text: str) -> bool:
    """Whether a library filled in a card, whose metadata speak of the run or the adapter."""
    return any(phrase in text for phrase in FORM_PHRASES)


def _readdressed(text: str, source: str | Path, model_id: str) -> str:
    """A card whose examples load `model_id` where they loaded the source; whatever else somebody wrote stays."""
    mark = CARD_MARK.search(text)
    is_ours = mark is not None and _is_made_by_machine(text)
    body = text[: mark.start()] if is_ours else text
    for name in {str(source), Path(source).resolve().name, *([mark["id"]] if mark else [])}:
        call = rf"(?<=\.from_pretrained\()(\s*[\"']){re.escape(name)}(?=[\"'])"
        body = re.sub(call, lambda begin: begin[1] + model_id, body)
        body = body.replace(f"huggingface.co/{name}/resolve/", f"huggingface.co/{model_id}/resolve/")
    return _marked(body, model_id) if is_ours else body


def _card_notes(text: str, model_id: str) -> tuple[str, ...]:
    """What a card lacks."""
    lacks = [field for field in ("license", "library_name", "pipeline_tag") if not getattr(_card(text).data, field)]
    notes = []
    if lacks:
        notes.append(f"The card says nothing about {', '.join(lacks)}: write it there, or say --license or --new-card.")
    if "from_pretrained(" in text and model_id not in text:
        notes.append(f"The card's examples load something else than {model_id} (--new-card).")
    return tuple(notes)


def _render_card(config, report: CheckpointReport, origin: _Origin, old, facts: CardFacts, model_id: str) -> str:
    """The text of a model card from the template, or of a bare one where this code has no template beside it."""
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    name = model_id.rpartition("/")[2]
    known = LINEAGE.get((config.get_text_config().model_type, config.get_text_config().hidden_size))
    bases, relation = _lineage(config, origin, old, facts, known)
    results = [EvalResult(**_result(values)) for values in facts.results]
    data = ModelCardData(
        license=facts.license or old.license,
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        base_model=bases or None,
        base_model_relation=relation,
        language=list(facts.language) or old.language or (["multilingual"] if known else ["en"]),
        datasets=list(facts.datasets) or old.datasets,
        tags=[*TAGS, *(old.tags or ()), *facts.tags],
        **({"eval_results": results, "model_name": name} if results else {}),
    )
    card = ModelCard.from_template(
        data,
        template_str=TEMPLATE.read_text(encoding="utf-8") if TEMPLATE.is_file() else BARE_CARD,
        model_id=model_id,
        name=name,
        family=report.family,
        parameters=_rounded(report.num_parameters),
        dtypes=" and ".join(WEIGHT_DTYPES[dtype] for dtype in report.dtypes),
        base_models=bases,
        relation=relation,
        is_qwen_vl=config.is_qwen_vl,
        key_frames=config.grounding_config.num_key_frames,
        frame_sampling={"first": "the first ones", "uniform": "spread evenly"}[config.grounding_config.frame_sampling],
        training={**origin.training, **(facts.training or {})},
        results=results,
    )
    return str(card)


def _rounded(count: int) -> str:
    """A number of parameters in words: "3.94 billion"."""
    return f"{count / 1e9:.2f} billion" if count >= 1e9 else f"{count / 1e6:.1f} million"


def _lineage(config, origin: _Origin, old, facts: CardFacts, known) -> tuple[list[str], str | None]:
    """What a model was made from, and how, as the Hub's model tree wants it."""
    if facts.base_model:
        return list(facts.base_model), facts.base_model_relation or "finetune"
    if origin.base:
        return [origin.base], facts.base_model_relation or "finetune"
    if named := old.base_model:
        relation = facts.base_model_relation or old.get("base_model_relation")
        bases = [named] if isinstance(named, str) else named
        if not (isinstance(bases, list) and all(isinstance(base, str) for base in bases)):
            raise CheckpointError(
                f"{CARD} has the base_model {named!r}, which is neither a name on the Hub nor a list of names. Correct "
                "it there, or say --base-model."
            )
        return bases, relation
    if known is None:
        return [], None
    if config.grounding_config.separate_prompt_decoder or origin.base is not None:  # trained on from a released one
        return [known[0]], facts.base_model_relation or "finetune"
    return [known[1], SAM2], facts.base_model_relation or "merge"


def _result(values: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of an `EvalResult`; the kind of task and the data set's short name may be left out."""
    from huggingface_hub import EvalResult

    accepted = [field.name for field in fields(EvalResult)]
    if unknown := sorted(str(name) for name in values if name not in accepted):
        raise ValueError(f"A result has {', '.join(unknown)}; these are accepted: {', '.join(accepted)}.")
    if missing := [name for name in ("dataset_name", "metric_type", "metric_value") if name not in values]:
        raise ValueError(f"The result {dict(values)} lacks {', '.join(missing)}.")
    short = re.sub(r"[^a-z0-9]+", "-", str(values["dataset_name"]).lower()).strip("-")
    return {"task_type": "image-segmentation", "dataset_type": short, **values}


def read_results(path: str | Path) -> tuple[dict[str, Any], ...]:
    """Scores for a model card from a YAML or JSON file.

    Args:
        path: a list of results, each with `dataset_name`, `metric_type` ("cIoU"), `metric_value` and whatever else
            `huggingface_hub.EvalResult` has: `dataset_split`, `task_name`, `source_url`...

    Raises:
        OSError: there is no such file.
        ValueError: it is no such list.
    """
    import yaml

    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))  # JSON is YAML, too
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is neither YAML nor JSON: {error}") from error
    if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
        raise ValueError(f"{path} has no list of results; each needs dataset_name, metric_type and metric_value.")
    return tuple(_result(value) for value in values)


def _uploaded_names(folder: Path) -> list[str]:
    """The files of a folder that belong into a model repository; everything else is not uploaded."""
    text = _read_card(folder)
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    return [name for name in names if _matches(name, UPLOADED) or _is_shown(name, text)]


def _refuse_private(files: Mapping[str, Path | bytes], *places: Path) -> None:
    """Looks through all text, and the headers of weights, for secrets and for paths of this machine.

    Raises:
        CheckpointError: names each file and line.
    """
    here = {str(place) for given in (*places, Path.cwd(), Path.home()) for place in (given, given.resolve())}
    here = {place for place in here if place.count("/") + place.count("\\") > 1}
    found = []
    for name, content in files.items():
        if name.endswith(".safetensors"):
            entries, _ = _header_entries(_find_files(str(content.parent)), content.name)
            lines = [json.dumps(entries.get(HEADER_NOTES))]
        elif _matches(name, PICTURES):
            continue
        else:
            data = content if isinstance(content, bytes) else content.read_bytes()
            lines = data.decode("utf-8", errors="replace").splitlines()
        found += [f"{name}:{i}: {what}" for i, line in enumerate(lines, 1) for what in _private_parts(name, line, here)]
    if found:
        raise CheckpointError(
            "This would be read by everybody; take it out and run again:\n  " + "\n  ".join(found[:20])
        )


def _private_parts(name: str, line: str, here: Iterable[str]) -> list[str]:
    """Secrets and local paths in a line. Vocabularies hold pieces of everything: there, only secrets count."""
    parts = [f"a secret ({match[0][:6]}...)" for match in SECRET.finditer(line)]
    if name in VOCABULARIES:
        return parts
    paths = [match[0] for match in (LOCAL_PATH_IN_JSON if name.endswith(".json") else HOME_PATH).finditer(line)]
    return parts + [f"a path of this machine ({path})" for path in paths or [place for place in here if place in line]]


def _try_out(folder: Path) -> None:
    """Loads a model repository in a process that knows nothing of this package, and runs it once.

    Raises:
        CheckpointError: with what that process said.
    """
    with tempfile.TemporaryDirectory() as empty:
        environment = os.environ | {
            "HF_HUB_OFFLINE": "1",
            "HF_MODULES_CACHE": str(Path(empty) / "modules"),
            "PYTHONWARNINGS": "ignore",
        }
        done = subprocess.run(
            [sys.executable, "-c", TRIAL, str(folder)], cwd=empty, env=environment, capture_output=True, text=True
        )
    if done.returncode < 0:
        raise CheckpointError(
            f"The process that tried what was packed was stopped by signal {-done.returncode}, probably for want of "
            "memory. --skip-test leaves the trial out."
        )
    if done.returncode != 0:
        raise CheckpointError(f"What was packed does not load with trust_remote_code:\n{done.stderr[-3000:]}")


class HubError(OSError):
    """The Hub could not do what was asked; the message says what to do about it."""


@dataclass(frozen=True)
class PushReport:
    """What `push_checkpoint` does, or has done.

    Attributes:
        repo_id, revision: where to; the revision is a branch or a pull request ("refs/pr/3").
        files: bytes of every file that the repository has in the end.
        uploaded: those of them that are new or changed.
        deleted: files of an earlier version that the new one must not find there.
        left_out: files of the source that are not uploaded.
        creates: whether there is no such repository yet.
        card: "generated", or "kept": the one that somebody wrote, here or on the Hub.
        notes: what the user should know, as in `PackReport`.
        dry_run: whether nothing was done.
        url: of the commit or pull request; None before.
        commit: id of the commit in which all is right; None before.
    """

    repo_id: str
    revision: str
    files: dict[str, int]
    uploaded: tuple[str, ...]
    deleted: tuple[str, ...]
    left_out: tuple[str, ...]
    creates: bool
    card: str
    notes: tuple[str, ...] = ()
    dry_run: bool = False
    url: str | None = None
    commit: str | None = None

    def __str__(self) -> str:
        sizes = {name: self.files[name] for name in self.uploaded}
        kept = len(self.files) - len(sizes)
        where = f"{self.repo_id} ({'new' if self.creates else self.revision})"
        return "\n".join(
            [
                f"{where}: {len(sizes)} files to upload, {sum(sizes.values()) / 1e6:,.1f} MB; {kept} are there already",
                *_file_lines(sizes),
                *(f"  deleted          {name}" for name in self.deleted),
                *(f"  not uploaded     {name}" for name in self.left_out),
                *(f"note: {note}" for note in self.notes),
            ]
        )


def push_checkpoint(
    source: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    create_pr: bool = False,
    revision: str | None = None,
    tag: str | None = None,
    dry_run: bool = False,
    max_shard_size: int | str | None = None,
    token: str | None = None,
    facts: CardFacts = CardFacts(),
    skip_test: bool = False,
    source_revision: str | None = None,
    commit_message: str = "Upload Sa2VA",
    commit_description: str | None = None,
    endpoint: str | None = None,
    show: Callable[[PushReport], None] | None = None,
) -> PushReport:
    """Packs a checkpoint (unless it is as `pack_checkpoint` leaves it) and uploads it in one commit.

    Large files are sent first, one after the other; nobody sees them before the commit, which adds, changes and
    deletes everything at once. A card that somebody wrote or changed on the Hub stays, but for `facts.new_card` or
    another one that was written here. Then the hashes that the Hub reports are compared. A run that was interrupted is
    continued by running it again: what the Hub has is not sent again, and a draft pull request is taken up.

    Args:
        source: as for `pack_checkpoint`.
        repo_id: "name/model" on the Hub; made if it is not there.
        private: whether a new repository is private; default as the account says.
        create_pr: open a pull request instead of committing to the branch.
        revision: branch, made from main if it is not there; default main.
        tag: name for the commit.
        dry_run: only find out what would be done.
        max_shard_size, facts, skip_test: as for `pack_checkpoint`.
        token, endpoint: default those of `hf auth login` or HF_TOKEN, and of HF_ENDPOINT.
        source_revision: revision of a source on the Hub.
        commit_message: of the commit, and title of the pull request.
        commit_description: of both, below that.
        show: called with the plan before anything is sent.

    Raises:
        HubError: no token, no permission, no connection, no space; or `repo_id` holds something else. (An `OSError`.)
        CheckpointError, OSError: as for `pack_checkpoint`.
        ValueError: arguments that don't go together.
    """
    hub = _Hub(repo_id, revision, create_pr, commit_description, endpoint=endpoint, token=token)
    exists = hub.look_around()
    options = {"facts": facts, "max_shard_size": max_shard_size, "skip_test": skip_test, "token": token}
    with _packed(source, revision=source_revision, model_id=repo_id, **options) as (folder, notes):
        files, left_out = _contents(Path(source), folder, repo_id)
        card = "generated" if _is_made_by_machine(files[CARD].decode()) else "kept"
        if exists and card == "generated" and not facts.new_card and hub.has_written_card():
            del files[CARD]
            card, notes = "kept", ("The card on the Hub was written or changed there, and stays (--new-card).",)
        _refuse_private(files, folder, Path(source))
        told = {"creates": not exists, "card": card, "left_out": left_out, "notes": notes, "dry_run": dry_run}
        plan, additions = hub.plan(files, **told)
        if show is not None:
            show(plan)
        if exists and tag is not None:
            hub.is_tagged(tag, None if plan.uploaded or plan.deleted else plan.commit)
        return replace(plan, commit=None) if dry_run else hub.carry_out(plan, additions, private, tag, commit_message)


@contextmanager
def _packed(given: str | Path, **options: Any) -> Iterator[tuple[Path, tuple[str, ...]]]:
    """A folder as `pack_checkpoint` leaves it, made for the time being if the source is none; and its notes."""
    source = Path(given)
    if options["facts"] == CardFacts() and _is_packed(source, _size(options["max_shard_size"])):
        text = _read_card(source)
        yield source, _card_notes(_readdressed(text, source, options["model_id"]), options["model_id"])
        return
    beside = {"dir": source.resolve().parent, "prefix": f".{source.name}."}  # where weights can be linked
    may = source.is_dir() and os.access(beside["dir"], os.W_OK)
    with tempfile.TemporaryDirectory(**beside if may else {}) as place:
        out = Path(place) / (source.resolve().name or "model")
        yield out, pack_checkpoint(given, out, **options).notes  # a path would turn the slash of a name round


def _contents(source: Path, folder: Path, repo_id: str) -> tuple[dict[str, Any], tuple[str, ...]]:
    """What to upload, paths or bytes by name, the card with the repository's name; and what is not uploaded."""
    files: dict[str, Any] = {name: folder / name for name in _uploaded_names(folder)}
    files[CARD] = _readdressed(files[CARD].read_text(encoding="utf-8"), folder, repo_id).encode()
    here = {path.name for path in source.iterdir()} if source.is_dir() else set()
    return files, tuple(sorted(here - files.keys()))


def _is_packed(folder: Path, max_bytes: int) -> bool:
    """Whether packing a folder would change nothing but its card."""
    from .configuration_sa2va import CODE_FILES, auto_map

    if not all((folder / name).is_file() for name in (CONFIG, *SETTINGS, CARD, REQUIREMENTS_FILE, *CODE_FILES)):
        return False
    _check_settings(folder)
    if any((folder / name).read_bytes() != Path(__file__).with_name(name).read_bytes() for name in CODE_FILES):
        return False
    files = _find_files(str(folder))
    try:
        weights = _shards(files)
    except CheckpointError:  # packing tells more
        return False
    if any(files.sizes.get(name, 0) > max_bytes or not _matches(name, UPLOADED) for name in weights):
        return False
    mapped = [_read_json(files, name).get("auto_map") for name in (CONFIG, "processor_config.json")]
    ours = [auto_map(is_qwen_vl) for is_qwen_vl in (False, True)]
    is_mapped = mapped in [[mapping, {"AutoProcessor": mapping["AutoProcessor"]}] for mapping in ours]
    if not is_mapped:
        return False
    report, _, _ = _inspect(files)
    return report.ok and report.layout not in REWRITTEN_LAYOUTS


class _Hub:
    """A repository on the Hub, as the token's owner sees it; what fails for a moment is tried again."""

    def __init__(self, repo_id: str, revision: str | None, create_pr: bool, description: str | None, **account: Any):
        from huggingface_hub import HfApi
        from huggingface_hub.utils import validate_repo_id

        try:
            validate_repo_id(repo_id)
        except ValueError as error:
            kinds = [kind for kind in ("datasets", "spaces") if repo_id.startswith(f"{kind}/")]
            what = f"{repo_id} names one of the {kinds[0]}" if kinds else f"{repo_id!r} is no name of a repository"
            raise ValueError(f"{what}; a model is pushed to a model repository, as in my-name/my-sa2va.") from error
        if create_pr and revision is not None:
            raise ValueError("The Hub opens pull requests against main only: leave out --revision or --create-pr.")
        self.repo_id = repo_id
        self.api = HfApi(**account)
        self.create_pr = create_pr
        self.revision = revision or "main"
        self.description = description
        self.user = ""

    def ask(self, function: Callable, *args, attempts: int = ATTEMPTS, **kwargs) -> Any:
        """Calls a method of `HfApi`, again after a passing fault."""
        for attempt in range(1, attempts + 1):
            try:
                with _asking_for(self.repo_id):
                    return function(*args, **kwargs)
            except HubError as error:
                if attempt == attempts or not _is_passing(error):
                    raise
                time.sleep(FIRST_WAIT * 2 ** (attempt - 1))

    def look_around(self) -> bool:
        """Whether the repository is there; raises if it can't be pushed to or holds no Sa2VA."""
        account = self.ask(self.api.whoami, attempts=2)  # whether anybody answers at all is soon found out
        self.user = account.get("name", "")
        if (account.get("auth", {}).get("accessToken") or {}).get("role") == "read":
            raise HubError(f"The token of {self.user} can only read. Make one with the role 'write': {TOKENS_PAGE}")
        if not self.ask(self.api.repo_exists, self.repo_id):
            self._refuse_other_kinds()
            return False
        self._refuse_other_models()
        return True

    def _refuse_other_kinds(self) -> None:
        if self.create_pr:
            raise HubError(f"There is no {self.repo_id} (that {self.user} may see) to open a pull request on.")
        for kind in ("dataset", "space"):
            if self.ask(self.api.repo_exists, self.repo_id, repo_type=kind):
                raise HubError(
                    f"{self.repo_id} is a {kind}, and no model. Choose another name; if a model shall have the same "
                    f"one, make it first: hf repo create {self.repo_id}"
                )

    def _refuse_other_models(self) -> None:
        """Never overwrites a repository that holds anything but a Sa2VA."""
        names = self.ask(self.api.list_repo_files, self.repo_id, revision="main")
        if CONFIG in names:
            try:
                found = _parse_json(self._read(CONFIG, "main"), CONFIG).get("model_type")
            except CheckpointError:
                found = None
            if found != "sa2va_chat":
                raise HubError(f"{self.repo_id} holds a model of type {found!r}, which is not overwritten.")
        elif others := sorted(name for name in names if not _matches(name, HARMLESS)):
            raise HubError(f"{self.repo_id} holds no Sa2VA but {', '.join(others[:5])}; it is not overwritten.")

    def _files(self, revision: str) -> list[Any]:
        from huggingface_hub.hf_api import RepoFile

        tree = self.api.list_repo_tree(self.repo_id, recursive=True, revision=revision)
        return [entry for entry in tree if isinstance(entry, RepoFile)]

    def _read(self, name: str, revision: str) -> bytes:
        """A small file of the repository."""
        with tempfile.TemporaryDirectory() as folder:
            path = self.ask(self.api.hf_hub_download, self.repo_id, name, revision=revision, local_dir=folder)
            return Path(path).read_bytes()

    def has_written_card(self) -> bool:
        """Whether the branch has a model card that somebody wrote or changed, perhaps on the Hub's own page."""
        head = self.head()
        if CARD not in self.ask(self.api.list_repo_files, self.repo_id, revision=head):
            return False
        return not _is_made_by_machine(self._read(CARD, head).decode("utf-8", errors="replace"))

    def head(self) -> str:
        """The commit that the branch is at, or will begin at."""
        from huggingface_hub.errors import RevisionNotFoundError

        try:
            return self.ask(self.api.repo_info, self.repo_id, revision=self.revision).sha
        except HubError as error:
            if not isinstance(error.__cause__, RevisionNotFoundError):
                raise
        return self.ask(self.api.repo_info, self.repo_id).sha

    def compare(self, additions: Mapping[str, Any], commit: str | None = None) -> tuple[str, list[str], list[str]]:
        """A commit (the branch's last), which files differ there by their hashes, and which should not be there."""
        head = commit or self.head()
        remote = {file.path: file for file in self.ask(self._files, head)}
        changed = [name for name, addition in additions.items() if not _is_same(addition, remote.get(name))]
        stale = [name for name in remote if name not in additions and _is_replaced(name)]
        return head, changed, stale

    def plan(self, files: Mapping[str, Path | bytes], **facts: Any) -> tuple[PushReport, dict[str, Any]]:
        """What is to be done to have these files there, and what `HfApi` wants of each."""
        from huggingface_hub import CommitOperationAdd  # hashes when they are needed, and once

        additions = {name: CommitOperationAdd(name, content) for name, content in files.items()}
        head, changed, stale = (None, [*additions], []) if facts["creates"] else self.compare(additions)
        sizes = {name: addition.upload_info.size for name, addition in additions.items()}
        changes = {"files": sizes, "uploaded": tuple(changed), "deleted": tuple(stale), "commit": head}
        return PushReport(self.repo_id, self.revision, **changes, **facts), additions

    def carry_out(
        self, plan: PushReport, additions: Mapping[str, Any], private: bool | None, tag: str | None, message: str
    ) -> PushReport:
        """Does what a plan says, which says in the end what was done."""
        head = plan.commit
        if plan.creates:
            self.ask(self.api.create_repo, self.repo_id, private=private, exist_ok=True)
        if plan.uploaded or plan.deleted:
            self.prepare(message)
            head = self.upload(additions, message)
            if self.create_pr:
                self.ask(self._open)
        if tag is not None and not self.is_tagged(tag, head):
            self.ask(self.api.create_tag, self.repo_id, tag=tag, revision=head, exist_ok=True)
        return replace(plan, revision=self.revision, url=self.url(head), commit=head)

    def prepare(self, title: str) -> None:
        """Makes sure that the branch is there, or a draft pull request: an unfinished one of the same title is used."""
        if self.create_pr:
            self.revision = f"refs/pr/{self.ask(self._draft, title)}"
        elif self.revision != "main" and not self.revision.startswith("refs/pr/"):
            self.ask(self.api.create_branch, self.repo_id, branch=self.revision, exist_ok=True)

    def _draft(self, title: str) -> int:
        for discussion in self.api.get_repo_discussions(self.repo_id, author=self.user):
            if discussion.is_pull_request and (discussion.status, discussion.title) == ("draft", title):
                return discussion.num
        return self.api.create_pull_request(self.repo_id, title=title, description=self.description).num

    def upload(self, additions: Mapping[str, Any], message: str) -> str:
        """Commits until the Hub has what is here; returns the commit in which it has."""
        sent: str | None = None
        for attempt in itertools.count(1):
            head, changed, stale = self.compare(additions, sent)  # somebody may have committed since
            if not changed and not stale:
                return head
            if sent:
                differing = ", ".join([*changed, *stale])
                raise HubError(f"{self.repo_id} holds other bytes of {differing} than were sent. Run it again.")
            try:
                with _asking_for(self.repo_id):
                    sent = self._send([additions[name] for name in changed], stale, message, head)
            except HubError as error:  # also if only the answer was lost: comparing tells
                if attempt == ATTEMPTS or not _is_passing(error, MOVED_STATUS):
                    raise
                time.sleep(FIRST_WAIT * 2 ** (attempt - 1))

    def _send(self, additions: list[Any], stale: list[str], message: str, head: str) -> str:
        """One commit, whose id is returned; weights go first, one by one, so that none has to be sent again."""
        from huggingface_hub import CommitOperationDelete

        weights = [[addition] for addition in additions if addition.path_in_repo.endswith(".safetensors")]
        others = [addition for addition in additions if not addition.path_in_repo.endswith(".safetensors")]
        with ExitStack() as files:
            sent = [addition for group in (*weights, others) for addition in self._send_large(group, files)]
            commit = self.api.create_commit(
                self.repo_id,
                [*sent, *(CommitOperationDelete(path_in_repo=name) for name in stale)],
                commit_message=message,
                commit_description=self.description,
                revision=self.revision,
                parent_commit=head,
            )
        return commit.oid

    def _send_large(self, additions: list[Any], files: ExitStack) -> list[Any]:
        """Sends the large ones to the Hub's store; returns what a commit takes.

        With hf_xet installed, huggingface_hub 2 knows no other protocol than Xet, except for opened files: by those a
        Hub without it gets Git LFS.
        """
        from huggingface_hub import CommitOperationAdd

        options = {"revision": self.revision, "free_memory": False, "num_threads": 1}
        try:
            self.api.preupload_lfs_files(self.repo_id, additions, **options)
        except OSError as error:
            if "xet-write-token" not in str(error) or _status(error) != 404:
                raise
            additions = [CommitOperationAdd(a.path_in_repo, files.enter_context(a.as_file())) for a in additions]
            self.api.preupload_lfs_files(self.repo_id, additions, **options)
        return additions

    def _open(self) -> None:
        """Makes the draft a pull request, now that it is whole."""
        number = int(self.revision.rpartition("/")[2])
        if self.api.get_discussion_details(self.repo_id, number).status == "draft":
            self.api.change_discussion_status(self.repo_id, number, new_status="open")

    def is_tagged(self, tag: str, commit: str | None) -> bool:
        """Whether a tag names a commit already; raises if it names another."""
        tags = {ref.name: ref.target_commit for ref in self.ask(self.api.list_repo_refs, self.repo_id).tags}
        if tags.get(tag, commit) != commit:
            raise HubError(f"The tag {tag} of {self.repo_id} names another commit. Delete it or choose another.")
        return tag in tags

    def url(self, commit: str | None) -> str:
        """Where to look at it."""
        _, is_pr, number = self.revision.rpartition("refs/pr/")
        place = f"discussions/{number}" if is_pr else f"commit/{commit}"
        return f"{self.api.endpoint}/{self.repo_id}/{place}"


@contextmanager
def _asking_for(name: str) -> Iterator[None]:
    """Whatever goes wrong between here and the Hub becomes a `HubError` that says what to do."""
    from huggingface_hub.errors import HTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    try:
        yield
    except (HubError, NotImplementedError):
        raise
    except LocalTokenNotFoundError as error:
        raise HubError(
            f"No token: the Hub must know who pushes. Run `hf auth login`, or set HF_TOKEN; tokens with the role "
            f"'write' are made at {TOKENS_PAGE}"
        ) from error
    except OfflineModeIsEnabled as error:
        raise HubError("HF_HUB_OFFLINE is set, so the Hub is not asked. Unset it and run again.") from error
    except (HTTPError, OSError, RuntimeError, json.JSONDecodeError) as error:
        is_builtin = type(error).__module__ == "builtins"  # Xet's client raises kinds of its own, and ConnectionError
        if isinstance(error, OSError) and is_builtin and not isinstance(error, ConnectionError):
            raise  # of a file here
        raise HubError(f"{_advice(name, _http_fault(error) or error)}\n({str(error).strip()})") from error
    except ValueError as error:
        if "LFS batch API" not in str(error):
            raise
        raise HubError(f"The Hub does not take the files of {name}: {error}") from error


def _http_fault(error: BaseException | None) -> BaseException | None:
    """The HTTP library's error behind one that was made of it."""
    from huggingface_hub.errors import HTTPError

    while error is not None and not isinstance(error, HTTPError):
        error = error.__cause__ or error.__context__
    return error


def _status(error: BaseException) -> int | None:
    """The status with which the Hub answered, which Xet's client only writes into its words; None without answer."""
    written = re.search(r"HTTP status \w+ error \((\d{3})", str(error))
    return getattr(getattr(error, "response", None), "status_code", int(written[1]) if written else None)


def _advice(repo_id: str, fault: BaseException) -> str:
    """What to do about a fault."""
    status, again = _status(fault), "Nothing half-done is visible; run the same again, and it goes on from there."
    if status == 402 or status == 507 or (status in (403, 413) and re.search("storage|quota", str(fault), re.I)):
        return (
            f"There is no room for {repo_id} in this account's storage. Delete something, make the repository public, "
            f"or see https://huggingface.co/settings/billing. {again}"
        )
    told = {
        401: f"The Hub does not accept this token (or there is none, and {repo_id} is private or not there). Make one "
        f"at {TOKENS_PAGE} and run `hf auth login`.",
        403: f"This token may not write to {repo_id}. Use one with the role 'write' of an account that may "
        f"({TOKENS_PAGE}), or propose the upload with --create-pr.",
        404: f"The Hub has no {repo_id} with such a revision, or this token may not see it.",
        429: f"The Hub asks for fewer requests. Wait some minutes. {again}",
        **dict.fromkeys(MOVED_STATUS, f"{repo_id} was changed by somebody else meanwhile. {again}"),
    }
    if status is None:
        return f"The Hub can't be reached, or the connection broke. {again}"
    return told.get(status, f"The Hub answered with an error. {again}")


def _is_passing(error: HubError, more: tuple[int, ...] = ()) -> bool:
    """Whether the same request may go through later: no answer, half an answer, or the Hub is busy."""
    if isinstance(error.__cause__, json.JSONDecodeError):
        return True
    fault = _http_fault(error)
    return fault is not None and _status(fault) in (None, *PASSING_STATUS, *more)


def _is_same(addition: Any, remote: Any) -> bool:
    """Whether the Hub has a file as it is here, by its hash there: git's, or for large files SHA-256."""
    from huggingface_hub.utils.sha import git_hash

    if remote is None or remote.size != addition.upload_info.size:
        return False
    if remote.lfs is not None:
        return remote.lfs.sha256 == addition.upload_info.sha256.hex()
    with addition.as_file() as stream:
        return remote.blob_id == git_hash(stream.read())


def _is_replaced(name: str) -> bool:
    """Whether a remote file belongs to an earlier upload, and would be read instead of, or beside, the new ones."""
    if "/" in name or _matches(name, (CARD, *DOCUMENTS)):
        return False
    return name.endswith(WEIGHT_SUFFIXES) or _matches(name, UPLOADED) or _matches(name, OLD_CODE)


def push_model(model, repo_id: str, *, tags: str | Sequence[str] | None = None, **kwargs) -> PushReport:
    """What `Sa2VAChatModel.push_to_hub` does: saves model and processor, and pushes them.

    Args:
        model: `Sa2VAChatModel` that has a processor, or a checkpoint to read one from.
        repo_id: "name/model" on the Hub.
        tags: more tags for the card.
        **kwargs: as for `push_checkpoint`, but `source`.

    Raises:
        ValueError: the model has no processor.
        HubError: see `push_checkpoint`.
    """
    base = model.name_or_path
    is_public = model._folder is None and base.count("/") == 1 and not Path(base).exists()
    more = (tags,) if isinstance(tags, str) else tuple(tags or ())
    facts = CardFacts(base_model=(base,) if is_public else (), tags=more)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "model"
        model.save_pretrained(folder)
        model.load_processor().save_pretrained(folder)
        return push_checkpoint(folder, repo_id, facts=facts, skip_test=True, **kwargs)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line.

    Args:
        argv: arguments without the program's name; default those of the process.

    Returns:
        Exit code: 0, 1 (something is wrong with the checkpoint) or 2 (the command can't be carried out).
    """
    arguments = _parser().parse_args(argv)
    try:
        values, words = arguments.run(arguments)
    except (OSError, ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return WRONG_CHECKPOINT if isinstance(error, CheckpointError) else CANNOT_RUN
    print(json.dumps(values, indent=2) if arguments.json else words)
    return 0 if values.get("ok", True) else WRONG_CHECKPOINT


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Sa2VA checkpoints on their way to and from the Hub.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(run: Callable, name: str, summary: str, packs: bool = False) -> Callable:
        """Adds a command; returns what adds its arguments."""
        added = commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
        added.add_argument("--json", action="store_true", help="print the report as one JSON object")
        added.set_defaults(run=run)
        if packs:
            _add_packing_arguments(added.add_argument, added.add_argument_group("model card").add_argument)
        return added.add_argument

    hub_revision = {"help": "branch, tag or commit of a checkpoint on the Hub"}
    add = command(_run_check, "check", "compare keys and shapes with the config; reads no weights")
    add("checkpoint", metavar="FOLDER_OR_REPO", help="folder, or name on the Hugging Face Hub")
    add("--revision", **hub_revision)
    add = command(_run_convert, "convert", "write pickled weights (pytorch_model*.bin) as safetensors")
    add("folder", metavar="FOLDER", help="checkpoint with pickled weights")
    add("out", metavar="OUT", help="new folder for the converted checkpoint")
    add = command(_run_pack, "pack", "make a complete model repository, which loads with trust_remote_code", packs=True)
    add("out", metavar="OUT", help="folder to write")
    add("--overwrite", action="store_true", help="replace OUT; a card that you changed there is kept")
    add("--revision", **hub_revision)
    add = command(_run_push, "push", "pack and upload in one commit; run it again after an interruption", packs=True)
    add("repo_id", metavar="REPO_ID", help="your-name/model; made if it is not there")
    add("--private", action="store_true", default=None, help="if the repository is new, hide it")
    add("--create-pr", action="store_true", help="open a pull request instead of committing")
    add("--revision", help="branch to commit to (default main)")
    add("--tag", help="name for the commit, like v1.0")
    add("--dry-run", action="store_true", help="show what would be uploaded, and upload nothing")
    add("--source-revision", **hub_revision)
    return parser


def _add_packing_arguments(add: Callable, add_fact: Callable) -> None:
    add("source", metavar="SOURCE", help="checkpoint, adapter or output of training: folder, or name on the Hub")
    add("--max-shard-size", help="split larger weight files, as in 5GB")
    add("--skip-test", action="store_true", help="don't load the result and run it once (for huge models)")
    add("--token", help="default: that of `hf auth login`, or HF_TOKEN")
    add_fact("--base-model", action="append", default=[], help="what it was made from; may be repeated")
    add_fact("--base-model-relation", choices=RELATIONS, help="how it was made from it")
    add_fact("--license", help="as the Hub spells it, like apache-2.0")
    add_fact("--language", action="append", default=[], help="ISO code; may be repeated")
    add_fact("--dataset", action="append", default=[], help="data set on the Hub; may be repeated")
    add_fact("--results", metavar="FILE", help="scores in YAML or JSON: dataset_name, metric_type, metric_value")
    add_fact("--new-card", action="store_true", help="write a new card even if somebody wrote one")


def _packing_arguments(arguments: argparse.Namespace) -> dict[str, Any]:
    """What `pack` and `push` have in common, as the functions behind them take it."""
    facts = CardFacts(
        base_model=tuple(arguments.base_model),
        base_model_relation=arguments.base_model_relation,
        license=arguments.license,
        language=tuple(arguments.language),
        datasets=tuple(arguments.dataset),
        results=read_results(arguments.results) if arguments.results else (),
        new_card=arguments.new_card,
    )
    names = ("max_shard_size", "skip_test", "token")
    return {"facts": facts, **{name: getattr(arguments, name) for name in names}}


def _run_check(arguments: argparse.Namespace) -> tuple[dict[str, Any], Any]:
    report = check_checkpoint(arguments.checkpoint, revision=arguments.revision)
    return report.to_dict(), report


def _run_convert(arguments: argparse.Namespace) -> tuple[dict[str, Any], Any]:
    files = [str(path) for path in convert_pickles(arguments.folder, arguments.out)]
    return {"files": files}, "\n".join(f"wrote {file}" for file in files)


def _run_pack(arguments: argparse.Namespace) -> tuple[dict[str, Any], Any]:
    places = {name: getattr(arguments, name) for name in ("source", "out", "revision", "overwrite")}
    report = pack_checkpoint(**places, **_packing_arguments(arguments))
    return asdict(report), report


def _run_push(arguments: argparse.Namespace) -> tuple[dict[str, Any], Any]:
    names = ("source", "repo_id", "private", "create_pr", "revision", "tag", "dry_run", "source_revision")
    given = {name: getattr(arguments, name) for name in names}
    show = None if arguments.json else print
    report = push_checkpoint(**given, show=show, **_packing_arguments(arguments))
    done = f"{report.url}: every file there has the bytes that it has here"
    return asdict(report), "Nothing was sent." if report.dry_run else done


def _package_of_script() -> str:
    """Run as a script, this file has no package to import its neighbours from: its folder becomes one."""
    package = types.ModuleType("sa2va")
    package.__path__ = [str(Path(__file__).resolve().parent)]
    sys.modules[package.__name__] = package
    return package.__name__


if __name__ == "__main__":
    __package__ = __package__ or _package_of_script()
    sys.exit(main())
