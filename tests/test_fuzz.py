"""Whatever is given, what comes back is a result or an error of the kinds that the docstrings name.

Examples are drawn by hypothesis, the same in every run.
"""

import contextlib
import copy
import io
import json
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as stnp
from PIL import Image
from transformers import GenerationConfig

from sa2va import Sa2VAChatConfig, Sa2VAChatModel
from sa2va.configuration_sa2va import read_index
from sa2va.hub_upload import check_checkpoint
from sa2va.processing_sa2va import (
    Sa2VAProcessor,
    load_image,
    masks_to_rle,
    open_video,
    rle_to_masks,
    select_key_frames,
)

GOLDEN = Path(__file__).parent / "golden"
RELEASED = sorted((Path(__file__).parent / "released").glob("*--*.json"))
DOCUMENTED = (ValueError, TypeError, OSError)
PICTURE = Image.new("RGB", (6, 6))


def examples(count: int):
    """The settings of a test: as many examples, none of them by chance or by the clock."""
    unhurried = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]
    return settings(max_examples=count, derandomize=True, deadline=None, database=None, suppress_health_check=unhurried)


@pytest.fixture(scope="module")
def processor():
    return Sa2VAProcessor.from_pretrained(GOLDEN / "ivl_qwen2")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from([10**9, 2**63, -1]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)

# ------------------------------------------------------------------------------------------------------- processor

TOKENS = [
    "<image>",
    "<img>",
    "<IMG_CONTEXT>",
    "</img>",
    "<vp>",
    "</vp>",
    "[SEG]",
    "<|im_start|>",
    "<|im_end|>",
    "{text}",
]
WORDS = st.lists(st.text(max_size=6) | st.sampled_from(TOKENS) | st.just("\ud800"), max_size=6).map("".join)


@examples(80)
@given(text=WORDS | JSON, past_text=WORDS | st.none(), picture=st.sampled_from([None, PICTURE]))
def test_any_words(processor, text, past_text, picture):
    try:
        inputs = processor.prepare(picture, None, text, past_text)
    except DOCUMENTED:
        return
    assert inputs.prompt.endswith("<|im_start|>assistant\n") and inputs.input_ids.shape == inputs.attention_mask.shape


SCALARS = st.one_of(
    stnp.boolean_dtypes(),
    stnp.integer_dtypes(endianness="?"),
    stnp.unsigned_integer_dtypes(endianness="?"),
    stnp.floating_dtypes(endianness="?"),
    stnp.complex_number_dtypes(),
    stnp.datetime64_dtypes(),
    stnp.unicode_string_dtypes(max_len=2),
    st.just(np.dtype(object)),
    st.just(np.dtype([("red", np.uint8)])),
)
SHAPES = st.lists(st.sampled_from([0, 1, 2, 3, 4, 5, 7]), max_size=5).map(tuple)
TENSOR_DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.complex64),
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.bool),
]


@st.composite
def arrays(draw) -> Any:
    """Arrays of any kind, as they are or flipped, or tensors of any dtype."""
    shape = draw(SHAPES)
    if draw(st.booleans()):
        values = torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(0))
        return values.to(draw(st.sampled_from(TENSOR_DTYPES)), copy=True)
    dtype = draw(SCALARS)
    drawn = dtype.kind in "biuf" and draw(st.booleans())
    values = draw(stnp.arrays(dtype, shape)) if drawn else np.zeros(shape, dtype)
    return values[::-1] if values.ndim and draw(st.booleans()) else values


@examples(200)
@given(arrays())
def test_any_array_as_a_picture(array):
    try:
        image = load_image(array)
    except DOCUMENTED:
        return
    assert image.mode == "RGB" and image.width * image.height <= np.prod(array.shape)


NOISE = [Image.effect_noise((40, 30), 90).convert("RGB") for _ in range(4)]


def written(kind: str) -> bytes:
    """A picture, or in formats that have it an animation, as a file."""
    file = io.BytesIO()
    moving = {"save_all": True, "append_images": NOISE[1:]} if kind in ("GIF", "WEBP", "PNG") else {}
    NOISE[0].save(file, kind, **moving)
    return file.getvalue()


FILES = {kind: written(kind) for kind in ("GIF", "WEBP", "PNG", "JPEG", "TIFF", "BMP", "PPM", "ICO", "TGA", "DDS")}


@st.composite
def damaged(draw) -> tuple[str, bytes]:
    """A picture's format and file, cut off, with a hole, or with some bytes changed."""
    kind = draw(st.sampled_from(sorted(FILES)))
    content = bytearray(FILES[kind])
    where = st.integers(0, len(content) - 1) | st.integers(0, min(len(content), 60) - 1)
    damage = draw(st.sampled_from(["cut", "hole", "bytes"]))
    start = draw(where)
    if damage == "cut":
        del content[start:]
    elif damage == "hole":
        end = min(len(content), start + draw(st.sampled_from([1, 50, 800])))
        content[start:end] = bytes(end - start)
    else:
        for place in draw(st.lists(where, max_size=10)):
            content[place] = draw(st.integers(0, 255))
    return kind, bytes(content)


@examples(400)
@given(damaged())
def test_any_damaged_file(tmp_path_factory, file):
    kind, content = file
    path = tmp_path_factory.mktemp("damaged") / f"file.{kind.lower()}"
    path.write_bytes(content)
    for read in (load_image, lambda path: list(open_video(path)) if kind in ("GIF", "WEBP") else None):
        with contextlib.suppress(DOCUMENTED):
            read(path)


@examples(100)
@given(arrays())
def test_any_array_as_a_video(array):
    try:
        frames = list(open_video(array))
    except DOCUMENTED:
        return
    assert len(frames) == len(array)


@examples(100)
@given(arrays())
def test_any_array_as_regions(processor, array):
    try:
        masks = processor.preprocess_mask_prompts(array)
    except DOCUMENTED:
        return
    assert masks.dtype == torch.bool and masks.shape == (len(array), processor.region_grid, processor.region_grid)


@examples(60)
@given(width=st.integers(1, 3000), height=st.integers(1, 3000), at_least=st.integers(1, 8), more=st.integers(0, 30))
def test_any_size_is_tiled_within_the_limits(processor, width, height, at_least, more):
    least, most = at_least, at_least + more
    chosen = Sa2VAProcessor(
        processor.tokenizer, image_size=28, patch_size=14, min_dynamic_patch=least, max_dynamic_patch=most
    )
    tiles = len(chosen.preprocess_image(Image.new("RGB", (width, height))))
    assert 1 <= tiles <= most + 1


NUMBERS = st.integers(-2, 12) | st.integers() | st.floats() | st.booleans()
SAMPLINGS = st.one_of(
    st.sampled_from(["first", "uniform", "", "First"]),
    st.lists(NUMBERS, max_size=4),
    JSON,
    st.just(range(2**40)),
    arrays(),
)


@examples(150)
@given(num_frames=NUMBERS | JSON, sampling=SAMPLINGS)
def test_any_choice_of_frames(num_frames, sampling):
    try:
        chosen = select_key_frames(open_video([PICTURE] * 8), num_frames, sampling)
    except DOCUMENTED:
        return
    assert chosen == sorted(set(chosen)) and set(chosen) <= set(range(8)) and chosen


@examples(100)
@given(st.lists(st.fixed_dictionaries({}, optional={"size": JSON, "counts": st.text(max_size=9) | JSON}), max_size=2))
def test_any_encoding_of_masks(rles):
    try:
        masks = rle_to_masks(rles)
    except DOCUMENTED:
        return
    assert len(masks_to_rle(masks)) == len(masks)


@examples(200)
@given(stnp.arrays(bool, (1, 9, 7)), st.integers(0, 30), st.binary(max_size=3), st.integers(0, 3))
def test_a_damaged_encoding_is_refused_or_fills_its_size(masks, place, instead, left_out):
    (rle,) = masks_to_rle(masks)
    counts = rle["counts"].encode()
    damaged = counts[:place] + instead + counts[place + left_out :]
    try:
        found = rle_to_masks([{**rle, "counts": damaged}])
    except ValueError:
        return
    (again,) = masks_to_rle(found)
    assert found.shape == masks.shape and np.array_equal(rle_to_masks([again]), found)


@examples(60)
@given(st.dictionaries(st.sampled_from(sorted(Sa2VAProcessor._settings_of(Sa2VAChatConfig()))), JSON, max_size=3))
def test_any_settings_of_a_processor(processor, changes):
    try:
        made = Sa2VAProcessor(processor.tokenizer, **changes)
    except DOCUMENTED:
        return
    assert made.num_image_token >= 1


# ------------------------------------------------------------------------------------------- configs from strangers


def places(values: Any, path: tuple = ()) -> list[tuple]:
    """The paths of all values in JSON."""
    items = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    return [place for key, value in items for place in ((*path, key), *places(value, (*path, key)))]


@st.composite
def mutated(draw, configs: list[dict]) -> dict:
    """A config with up to three values replaced, added or taken away."""
    config = copy.deepcopy(draw(st.sampled_from(configs)))
    for _ in range(draw(st.integers(1, 3))):
        *path, last = draw(st.sampled_from(places(config)))
        parent = config
        for key in path:
            parent = parent[key]
        if isinstance(parent, dict) and draw(st.integers(0, 3)) == 0:
            del parent[last]
        else:
            parent[last] = draw(JSON)
    return config


RELEASED_CONFIGS = [json.loads(path.read_text())["config"] for path in RELEASED]
GOLDEN_CONFIGS = [json.loads((folder / "config.json").read_text()) for folder in sorted(GOLDEN.glob("*_*/"))]


SETTINGS = st.sampled_from(sorted({*vars(GenerationConfig()), "__dict__", "update"}))


@examples(150)
@given(st.dictionaries(SETTINGS, JSON, max_size=4))
def test_any_saved_settings_give_an_answer_in_bounds(golden_model, tmp_path_factory, values):
    folder = tmp_path_factory.mktemp("settings")
    (folder / "generation_config.json").write_text(json.dumps({"transformers_version": "5.24.0"} | values))
    model = copy.copy(golden_model)  # with settings of its own
    try:
        model.adjust_generation_fn(None, False, False, str(folder), None, False, None, True, None, "main", "", False)
        config = model._generation_arguments(model.load_processor(), {})["generation_config"]
    except DOCUMENTED:
        return
    assert config.max_new_tokens * (config.num_beams or 1) <= 10**7 and config.max_cache_len is None
    config.max_new_tokens = 1
    model.predict_forward(text="Hi", generation_config=config)


@examples(250)
@given(mutated(RELEASED_CONFIGS))
def test_any_config_is_read_or_refused_without_much_memory(config):
    tracemalloc.start()
    try:
        json.dumps(Sa2VAChatConfig.from_dict(config).to_dict(), allow_nan=False)
    except DOCUMENTED:
        pass
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 100e6


@examples(15)
@given(mutated([config for config in GOLDEN_CONFIGS if "llm_config" in config]))
def test_any_config_is_built_or_refused(config):
    try:
        with torch.device("meta"):
            model = Sa2VAChatModel(Sa2VAChatConfig.from_dict(config))
    except DOCUMENTED:
        return
    assert model.num_parameters() > 0


# ------------------------------------------------------------------------------------------------ safetensors headers

ENTRY = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
HEADERS = st.one_of(
    mutated([{"a": ENTRY, "b": {**ENTRY, "data_offsets": [24, 48]}, "__metadata__": {"format": "pt"}}]).map(json.dumps),
    JSON.map(json.dumps),
    st.text(max_size=20),
)


@examples(150)
@given(header=HEADERS, length=st.none() | st.integers(0, 2**64 - 1), cut=st.integers(0, 60), index=st.none() | JSON)
def test_any_header_is_told_and_not_believed(tmp_path_factory, header, length, cut, index):
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "config.json").write_text((GOLDEN / "ivl_qwen2" / "config.json").read_text())
    text = header.encode(errors="surrogatepass")
    data = struct.pack("<Q", len(text) if length is None else length) + text + bytes(48)
    name = "model.safetensors" if index is None else "model-00001-of-00001.safetensors"
    (folder / name).write_bytes(data[: len(data) - cut])
    if index is not None:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    report = check_checkpoint(folder)
    assert not report.ok and report.family == "InternVL + Qwen2"  # it is the weights that are told


FILE_NAMES = st.text(max_size=8) | st.sampled_from(["..", "../", "/", "\\", "C:", "\0"])
FILES_OF_INDICES = st.lists(FILE_NAMES, max_size=3).map(lambda parts: "".join([*parts, ".safetensors"]))


@examples(150)
@given(st.fixed_dictionaries({"weight_map": st.dictionaries(st.text(max_size=3), FILES_OF_INDICES) | JSON}) | JSON)
def test_any_index_names_files_beside_it_or_is_refused(tmp_path_factory, index):
    folder = tmp_path_factory.mktemp("index")
    (folder / "index.json").write_text(json.dumps(index))
    try:
        files = read_index(folder / "index.json")["weight_map"].values()
    except OSError:
        return
    assert files and all((folder / file).resolve().parent == folder.resolve() for file in files)
