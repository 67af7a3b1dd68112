"""The processor against the golden data, and each of its promises."""

import copy
import json
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import FrozenInstanceError
from itertools import groupby, pairwise, product
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerFast, Qwen2_5_VLProcessor

from sa2va.configuration_sa2va import Sa2VAChatConfig
from sa2va.processing_sa2va import (
    TEMPLATES,
    Sa2VAInputs,
    Sa2VAProcessor,
    _shorten,
    choose_tiling,
    draw_overlay,
    load_image,
    masks_to_rle,
    object_color,
    open_video,
    prepare_samples,
    rle_to_masks,
)

GOLDEN = Path(__file__).parent / "golden"
CHECKPOINT = GOLDEN / "ivl_qwen2"
CASES = {name: case for name, case in json.loads((CHECKPOINT / "golden.json").read_text()).items() if name[0] != "_"}
EXTRAS = json.loads((GOLDEN / "extras.json").read_text())
IMAGES = {"img2seg": "imgB", "imgD1seg": "imgD"}
VIDEOS = {"vid8_1seg": ("vid8", 8), "vid3_1seg": ("vid3", 3), "vid1_1seg": ("vid3", 1)}
CONTEXT = "<IMG_CONTEXT>"


@pytest.fixture(scope="module")
def processor():
    return Sa2VAProcessor.from_pretrained(CHECKPOINT)


@pytest.fixture(scope="module")
def pictures():
    return dict(np.load(GOLDEN / "inputs.npz"))


@pytest.fixture(scope="module")
def golden():
    return dict(np.load(CHECKPOINT / "golden.npz"))


def arguments(name, processor, pictures):
    """What the official code was called with in a golden case."""
    given = {"text": CASES[name]["text"]}
    if name in VIDEOS:
        key, count = VIDEOS[name]
        given["video"] = [Image.fromarray(frame) for frame in pictures[key][:count]]
    elif name != "text_only":
        given["image"] = Image.fromarray(pictures[IMAGES.get(name, "imgA")])
    if name == "img_vp":
        given["mask_prompts"] = [pictures["vpA"]]
    if name == "img_multiturn":
        first = processor.prepare(given["image"], text=CASES["img1seg"]["text"]).prompt
        given["past_text"] = first + "Sure, [SEG].<|im_end|>\n"
    return given


@pytest.mark.parametrize("name", CASES)
def test_golden_input_ids_are_equal(name, processor, pictures, golden):
    inputs = processor.prepare(**arguments(name, processor, pictures))
    assert inputs.input_ids.shape == inputs.attention_mask.shape == (1, CASES[name]["prompt_len"])
    assert np.array_equal(inputs.input_ids[0], golden[f"{name}__input_ids"])


@pytest.mark.parametrize("family", ["ivl_internlm2", "ivl_qwen2", "qwen25vl", "qwen3vl"])
def test_image_tokens_are_tokenized_as_if_each_stood_there(family):
    """A run of them, often thousands, is tokenized as one and repeated."""
    processor = Sa2VAProcessor.from_pretrained(GOLDEN / family)
    one, start = processor.image_token, processor.image_start
    prompt = f"{one * 7} a{one}é \n{start}{one * 300}\n\n {one}. {one * 2}[SEG]{one * 3}"
    inputs, whole = processor._tokenize(prompt), processor.tokenizer(prompt, return_tensors="pt")
    assert inputs.prompt == prompt and torch.equal(inputs.input_ids, whole.input_ids)
    assert torch.equal(inputs.attention_mask, whole.attention_mask)


def test_a_tag_without_a_picture_is_left_out_and_told(processor, heard):
    """As recorded in the official edge case `text_only_with_tag`, which says nothing of it."""
    prompt = processor.prepare(text="<image>Hello").prompt
    assert prompt == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    assert any("no image= or video=" in message for message in heard)


@pytest.mark.parametrize("name", [name for name in CASES if name != "text_only"])
def test_golden_pixel_values_are_equal(name, processor, pictures, golden):
    pixel_values = processor.prepare(**arguments(name, processor, pictures)).pixel_values
    assert (pixel_values.dtype, list(pixel_values.shape)) == (torch.float32, CASES[name]["pv_shape"])
    np.testing.assert_allclose(pixel_values[:, :, ::56, ::56], golden[f"{name}__pv_sub"], atol=1e-6)


@pytest.mark.parametrize("name", [name for name in CASES if name != "text_only"])
def test_golden_sam2_input_is_equal(name, processor, pictures, golden):
    inputs = processor.prepare(**arguments(name, processor, pictures))
    frames = processor.grounding_pixel_values(list(inputs.frames), is_video=inputs.is_video)
    assert list(frames.shape) == CASES[name]["gp_shape"]
    np.testing.assert_allclose(frames[:, :, ::32, ::32], golden[f"{name}__gp_sub"], atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("path", ["image", "video"])
def test_sam2_input_is_rounded_where_the_released_code_rounds(path, dtype, processor, pictures):
    frames = [load_image(pictures["imgA"])]
    pixels = processor.grounding_pixel_values(frames, dtype=getattr(torch, dtype), is_video=path == "video")
    assert pixels.dtype == getattr(torch, dtype)
    expected = np.load(GOLDEN / "extras.npz")[f"gp_{path}_path_{dtype}"]
    np.testing.assert_allclose(pixels[:, :, ::16, ::16].float(), expected, atol=1e-6)


def test_region_tokens_are_the_golden_ones(processor, pictures):
    masks = processor.preprocess_mask_prompts(pictures["vpA"])
    assert (masks.dtype, masks.shape) == (torch.bool, (2, 16, 16))
    assert masks.flatten(1).sum(1).tolist() == [48, 56]


# ------------------------------------------------------------------------------------------------------------ tiles


@pytest.mark.parametrize("size", EXTRAS["tiles"])
def test_tiling_is_the_observed_one(size, processor):
    width, height = map(int, size.split("x"))
    assert list(choose_tiling(width, height)) == EXTRAS["tiles"][size]["cols_rows"]
    assert len(processor.preprocess_image(Image.new("RGB", (width, height)))) == EXTRAS["tiles"][size]["n"]


def tiling_in_order(width, height, grids):
    """The rule of InternVL 1.5 over grids in a given order."""
    best, best_distance = None, float("inf")
    for columns, rows in grids:
        distance = abs(width / height - columns / rows)
        if distance < best_distance or (
            distance == best_distance and width * height > 0.5 * 448 * 448 * columns * rows
        ):
            best, best_distance = (columns, rows), distance
    return best


def test_tiling_does_not_depend_on_the_order_of_equally_large_grids():
    observed = [tuple(grid) for grid in EXTRAS["ratio_order"]]
    groups = [list(group) for _, group in groupby(observed, key=lambda grid: grid[0] * grid[1])]
    mirrored = [grid for group in groups for grid in reversed(group)]
    sizes = list(product(range(1, 2400, 97), repeat=2)) + [
        (a * 224, b * 224) for a, b in product(range(1, 13), repeat=2)
    ]
    for width, height in sizes:
        expected = tiling_in_order(width, height, observed)
        assert choose_tiling(width, height) == expected == tiling_in_order(width, height, mirrored)


def test_tiles_run_row_by_row_and_the_thumbnail_is_last(processor):
    quarters = np.zeros((1344, 1344, 3), np.uint8)
    quarters[:448, 448:896] = 255
    tiles = processor.preprocess_image(Image.fromarray(quarters))
    assert len(tiles) == 10
    assert [index for index, tile in enumerate(tiles) if tile.min() > 2] == [1]
    assert tiles[9].min() < -1 < 2 < tiles[9].max()


def test_thumbnail_and_number_of_tiles_can_be_chosen(processor):
    few = Sa2VAProcessor(processor.tokenizer, max_dynamic_patch=4, use_thumbnail=False)
    assert len(few.preprocess_image(Image.new("RGB", (1920, 1080)))) == 2
    many = Sa2VAProcessor(processor.tokenizer, min_dynamic_patch=3)
    assert len(many.preprocess_image(Image.new("RGB", (448, 448)))) == 5


# ---------------------------------------------------------------------------------------------------------- prompts


def picture(tiles=1):
    return f"<img>{CONTEXT * 256 * tiles}</img>"


def test_prompt_of_an_image(processor):
    prompt = processor.build_prompt("<image>Hi {x}", image_tokens=[7 * 256])
    assert prompt == f"<|im_start|>user\n{picture(7)}Hi {{x}}<|im_end|>\n<|im_start|>assistant\n"


def test_prompt_of_a_video_has_a_line_per_key_frame(processor):
    prompt = processor.build_prompt("<image>Hi", image_tokens=[256] * 3)
    assert prompt == f"<|im_start|>user\n{picture()}\n{picture()}\n{picture()}Hi<|im_end|>\n<|im_start|>assistant\n"


def test_picture_stands_where_the_tag_is_else_in_front(processor):
    assert f"user\nSee {picture()} here<" in processor.build_prompt("See <image> here", image_tokens=[256])
    assert f"user\n{picture()}See<" in processor.build_prompt("See", image_tokens=[256])


def test_prompt_without_picture_drops_the_tag(processor):
    assert "user\nHi<" in processor.build_prompt("<image>Hi")


def test_regions_are_named_right_after_the_picture(processor):
    prompt = processor.build_prompt("<image>Hi", image_tokens=[256], region_tokens=[2, 0])
    regions = f"region1<vp>{CONTEXT * 2}</vp>, region2<vp></vp>"
    assert f"{picture()}\nThere are 2 part regions in the picture: {regions}.\nHi<" in prompt


def test_regions_of_a_video_are_named_after_all_key_frames(processor):
    prompt = processor.build_prompt("Hi", image_tokens=[256] * 2, region_tokens=[1])
    assert f"user\n{picture()}\n{picture()}\nThere are 1 part regions" in prompt


def test_follow_up_does_not_show_the_picture_again(processor):
    past = processor.build_prompt("Hi", image_tokens=[256]) + "Hello.<|im_end|>\n"
    for text in ("And now?", "<image>And now?", "<image>\nAnd now?"):
        prompt = processor.build_prompt(text, image_tokens=[256], past_text=past)
        assert prompt == past + "<|im_start|>user\nAnd now?<|im_end|>\n<|im_start|>assistant\n"


def test_follow_up_names_new_regions_but_not_old_ones(processor):
    past = processor.build_prompt("Hi", image_tokens=[256]) + "Hello.<|im_end|>\n"
    prompt = processor.build_prompt("What is it?", image_tokens=[256], region_tokens=[1], past_text=past)
    new = f"There are 1 part regions in the picture: region1<vp>{CONTEXT}</vp>.\n"
    assert prompt.startswith(f"{past}<|im_start|>user\n{new}What is it?")
    again = processor.build_prompt("Sure?", image_tokens=[256], region_tokens=[1], past_text=prompt)
    assert again.count("part regions") == 1


def test_picture_can_come_after_words(processor):
    past = processor.build_prompt("Hi") + "Hello.<|im_end|>\n"
    assert processor.build_prompt("See", image_tokens=[256], past_text=past).startswith(
        f"{past}<|im_start|>user\n{picture()}S"
    )


@pytest.mark.parametrize(
    ("name", "prompt", "stop_words"),
    [
        ("qwen_chat", "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", ("<|im_end|>", "<|endoftext|>")),
        ("internlm2-chat", "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", ("<|im_end|>",)),
        ("phi3_chat", "<|user|>\nHi<|end|>\n<|assistant|>\n", ("<|end|>",)),
    ],
)
def test_template_decides_prompt_and_stop_words(name, prompt, stop_words, processor):
    other = Sa2VAProcessor(processor.tokenizer, template=name)
    assert (other.build_prompt("Hi"), other.stop_words) == (prompt, stop_words)


def test_only_an_answer_without_any_end_mark_lacks_one(processor):
    answers = ("Yes.", "Yes.<|im_end|>", "Yes.<|endoftext|>")
    assert [processor.missing_end(answer) for answer in answers] == ["<|im_end|>", "", ""]


def test_templates_are_read_only():
    with pytest.raises(TypeError):
        TEMPLATES["mine"] = TEMPLATES["qwen_chat"]
    with pytest.raises(FrozenInstanceError):
        TEMPLATES["qwen_chat"].instruction = ""


# ------------------------------------------------------------------------------------------------------------ calls


def test_inputs_of_a_video(processor, pictures):
    inputs = processor.prepare(video=pictures["vid8"], text="Hi", num_frames=3, frame_sampling="uniform")
    assert (inputs.key_frames, inputs.is_video, inputs.size) == ([0, 3, 7], True, (87, 121))
    assert inputs.pixel_values.shape == (3, 3, 448, 448)
    assert len(inputs.frames) == 8


def test_an_image_is_a_video_of_one_frame(processor, pictures):
    inputs = processor.prepare(pictures["imgA"], text="Hi")
    assert (inputs.key_frames, inputs.is_video, inputs.size, len(inputs.frames)) == ([0], False, (61, 97), 1)


def test_size_is_that_of_frame_0_even_if_it_is_no_key_frame(processor):
    frames = [Image.new("RGB", (30, 20)), Image.new("RGB", (50, 40))]
    assert processor.prepare(video=frames, text="Hi", frame_sampling=[1]).size == (20, 30)


def test_words_alone_have_no_picture(processor):
    inputs = processor.prepare(text="Hi")
    assert inputs.pixel_values is inputs.frames is inputs.prompt_masks is inputs.size is None
    assert (inputs.key_frames, inputs.is_video) == ([], False)


def test_inputs_go_from_one_process_to_another(processor, pictures, tmp_path):
    Image.fromarray(pictures["imgA"]).save(tmp_path / "a.png")
    for given in ({"image": tmp_path / "a.png"}, {"video": pictures["vid3"]}, {"video": tmp_path}):
        inputs = processor.prepare(**given, text="Hi")
        again = pickle.loads(pickle.dumps(inputs))
        assert all(np.array_equal(a, b) for a, b in zip(again.frames, inputs.frames, strict=True))


def test_inputs_can_not_be_changed(processor):
    with pytest.raises(FrozenInstanceError):
        processor.prepare(text="Hi").prompt = ""


def test_call_returns_what_prepare_does(processor, pictures):
    given = {"text": "Hi", "mask_prompts": pictures["vpA"]}
    called = processor(images=pictures["imgA"], return_tensors="pt", **given)
    prepared = processor.prepare(pictures["imgA"], **given)
    names = {"input_ids", "attention_mask", "pixel_values", "prompt_masks"}
    assert set(called) == names | {"prompt_mask_tiles"} == {*processor.model_input_names}
    assert all(torch.equal(called[name], getattr(prepared, name)) for name in names)
    assert set(called["prompt_mask_tiles"].tolist()) == {len(called["pixel_values"]) - 1}  # on the thumbnail


def test_call_takes_one_item_lists_and_gives_arrays(processor, pictures):
    called = processor(images=[pictures["imgA"]], text=["Hi"], return_tensors="np", padding=True)
    assert all(isinstance(value, np.ndarray) for value in called.values())


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_list_of_texts_is_a_batch(processor, pictures, side):
    samples = [{"image": pictures["imgA"]}, {}, {"video": pictures["vid3"]}]
    alone = [processor.prepare(text="Hi" * n, **sample) for n, sample in enumerate(samples, 1)]
    batch = processor(
        images=[pictures["imgA"], None, None],
        text=["Hi", "HiHi", "HiHiHi"],
        videos=[None, None, pictures["vid3"]],
        padding_side=side,
    )
    assert torch.equal(batch["pixel_values"], torch.cat([alone[0].pixel_values, alone[2].pixel_values]))
    for row, mask, one in zip(batch["input_ids"], batch["attention_mask"], alone, strict=True):
        assert torch.equal(row[mask.bool()], one.input_ids[0])
        assert (row[~mask.bool()] == processor.tokenizer.pad_token_id).all()
        assert mask[-1 if side == "left" else 0] == 1


def test_images_of_a_batch_may_stand_in_lists_of_one_or_none(processor, pictures):
    batch = processor(images=[[], [pictures["imgD"]]], text=["Hi", "Ho"])
    assert torch.equal(batch["pixel_values"], processor.prepare(pictures["imgD"], text="Ho").pixel_values)


def test_videos_of_a_batch_may_stand_in_lists_of_one(processor, pictures):
    batch = processor(videos=[None, [np.asarray(pictures["vid3"])]], text=["Hi", "Ho"])
    alone = processor.prepare(video=pictures["vid3"], text="Ho")
    assert torch.equal(batch["pixel_values"], alone.pixel_values)


def test_an_image_of_one_text_may_stand_in_lists(processor, pictures):
    assert torch.equal(
        processor(images=[[pictures["imgD"]]], text="Ho")["pixel_values"],
        processor(images=pictures["imgD"], text="Ho")["pixel_values"],
    )
    assert "pixel_values" not in processor(images=[], text="Ho")


@pytest.mark.parametrize("family", ["ivl_qwen2", "qwen3vl"])
def test_image_tokens_are_found_as_in_other_processors(family, pictures):
    processor = Sa2VAProcessor.from_pretrained(GOLDEN / family)
    inputs = processor(images=pictures["imgA"], text="Hi")
    (kinds,) = processor.create_mm_token_type_ids(inputs["input_ids"].tolist())
    assert kinds == (inputs["input_ids"][0] == processor.image_token_id).long().tolist() and sum(kinds)


@pytest.mark.parametrize("family", ["ivl_qwen2", "ivl_internlm2", "qwen3vl"])
@pytest.mark.parametrize(
    "answer", ["Write <image> there.", "A <vp>region</vp>.", "An <img>image</img>.", "<img></img>"]
)
def test_an_answer_may_speak_of_tags(family, answer, pictures):
    processor = Sa2VAProcessor.from_pretrained(GOLDEN / family)
    for picture in (None, pictures["imgA"]):
        past_text = processor.prepare(picture, text="Hi").prompt + answer + processor.stop_words[0] + "\n"
        assert processor.prepare(picture, text="Ho", past_text=past_text).prompt.startswith(past_text)


def test_arguments_of_other_processors_may_be_none(processor):
    found = processor(text="Hi", video=None, max_length=None)
    assert torch.equal(found["input_ids"], processor(text="Hi")["input_ids"])


def test_settings_of_a_sample_go_before_those_of_all(processor, pictures):
    samples = [{"video": pictures["vid8"], "text": "Hi"} | own for own in ({}, {"num_frames": 1})]
    assert [x.key_frames for x in prepare_samples(processor.prepare, samples, num_frames=2)] == [[0, 1], [0]]


def test_regions_of_a_batch_lie_on_tiles_of_their_own_sample(processor, pictures):
    region = np.ones((1, 8, 8))
    batch = processor(
        images=[pictures["imgA"], None, pictures["imgA"]],
        text=["Hi"] * 3,
        videos=[None, pictures["vid3"], None],
        mask_prompts=[region, np.concatenate([region, region]), None],
    )
    tiles = len(processor.prepare(pictures["imgA"], text="Hi").pixel_values)
    assert batch["prompt_mask_tiles"].tolist() == [tiles - 1, tiles, tiles]


@pytest.mark.parametrize("end", ["", "<|im_end|>", "<|im_end|>\n"])
def test_an_answer_among_messages_is_ended_once(processor, end):
    turns = [
        {"role": role, "content": words} for role, words in (("user", "A"), ("assistant", f"B{end}"), ("user", "C"))
    ]
    assert "B<|im_end|>\n<|im_start|>user\nC" in processor.apply_chat_template(turns)


def test_messages_are_written_as_calls_are(processor, pictures):
    picture = {"type": "image", "image": pictures["imgA"]}
    first = [{"role": "user", "content": [picture, {"type": "text", "text": "Hi"}]}]
    asked = processor.prepare(pictures["imgA"], text="Hi")
    assert processor.apply_chat_template(first) == asked.prompt
    second = [*first, {"role": "assistant", "content": "Ho."}, {"role": "user", "content": "Why?"}]
    again = processor.prepare(pictures["imgA"], text="Why?", past_text=f"{asked.prompt}Ho.<|im_end|>\n")
    assert processor.apply_chat_template(second) == again.prompt
    batch = processor.apply_chat_template([first, second], tokenize=True, return_dict=True, padding_side="right")
    rows = zip(batch["input_ids"], batch["attention_mask"], [asked, again], strict=True)
    assert all(torch.equal(ids[mask.bool()], alone.input_ids[0]) for ids, mask, alone in rows)
    assert torch.equal(batch["pixel_values"], torch.cat([asked.pixel_values, again.pixel_values]))
    assert torch.equal(processor.apply_chat_template(first, tokenize=True), asked.input_ids)


@pytest.mark.parametrize("family", ["ivl_qwen2", "qwen25vl", "qwen3vl"])
@pytest.mark.parametrize(
    "part", [{"type": "image"}, {"type": "image", "text": None, "image": None}, {"type": "image", "image": "given"}]
)
@pytest.mark.parametrize("turns", [1, 3])
def test_a_prompt_of_messages_is_taken_with_the_picture_it_is_about(family, part, turns, pictures):
    """In two steps, as model cards write it: a prompt first, then a call with it and the pictures."""
    processor = Sa2VAProcessor.from_pretrained(GOLDEN / family)
    whole = {"type": "image", "image": pictures["imgA"]}
    said = [{"role": "assistant", "content": "Ho."}, {"role": "user", "content": "Why?"}]

    def messages(shown):
        return [{"role": "user", "content": [shown, {"type": "text", "text": "Hi"}]}, *said][:turns]

    prompt = processor.apply_chat_template(messages(whole if part.get("image") else part), tokenize=False)
    found = processor(text=[prompt.strip() + "\n"], images=[pictures["imgA"]], return_tensors="pt")
    wanted = processor.apply_chat_template(messages(whole), tokenize=True, return_dict=True)
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in found)


def test_a_prompt_of_messages_about_a_video_is_taken_with_it(processor, pictures):
    messages = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "Hi"}]}]
    found = processor(text=processor.apply_chat_template(messages), videos=pictures["vid3"])
    assert torch.equal(found["input_ids"], processor.prepare(video=pictures["vid3"], text="Hi").input_ids)


def test_a_prompt_of_words_alone_is_not_written_into_another(processor):
    prompt = processor.apply_chat_template([{"role": "user", "content": "Hi"}])
    assert torch.equal(processor(text=prompt)["input_ids"], processor(text="Hi")["input_ids"])


@pytest.mark.parametrize("family", ["ivl_qwen2", "qwen3vl"])
def test_a_tokenizer_of_the_callers_keeps_the_settings_of_the_checkpoint(family, tmp_path):
    model = AutoModel.from_pretrained(GOLDEN / family)
    own = model.load_processor()
    own.num_key_frames = 2
    own.min_pixels = own.max_pixels = own.max_dynamic_patch = 1
    for given in (own.tokenizer, AutoTokenizer.from_pretrained(GOLDEN / family)):
        found = model._resolve_processor(given, None)
        assert found.tokenizer is given
        assert (found.num_key_frames, found.max_dynamic_patch, found.max_pixels) == (2, 1, 1)


@pytest.mark.parametrize("damage", ["{}", "[]"])
def test_a_tokenizer_of_the_callers_serves_where_the_checkpoints_own_is_damaged(damage, pictures, tmp_path, heard):
    folder = shutil.copytree(CHECKPOINT, tmp_path / "damaged")
    (folder / "tokenizer.json").write_text(damage)
    model, given = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(CHECKPOINT)
    for _ in range(2):
        model.predict_forward(image=pictures["imgA"], text="Hi", max_new_tokens=1, tokenizer=given)
    assert sum("own processor can't be read" in message for message in heard) == 1


def test_the_template_of_a_given_processor_is_used(pictures):
    model = AutoModel.from_pretrained(GOLDEN / "qwen25vl")
    given = Qwen2_5_VLProcessor.from_pretrained(GOLDEN / "qwen25vl")
    given.chat_template = given.chat_template.replace("You are a helpful assistant", "You are a pirate")
    for arguments in ({"processor": given}, {"tokenizer": given}):
        output = model.predict_forward(image=pictures["imgA"], text="Hi", max_new_tokens=1, **arguments)
        assert "You are a pirate" in output.past_text


def test_the_template_of_the_checkpoint_is_used_with_a_tokenizer_that_has_none(pictures):
    model = AutoModel.from_pretrained(GOLDEN / "qwen25vl")
    own = model.load_processor()
    own.chat_template = own.tokenizer.chat_template
    bare = AutoTokenizer.from_pretrained(GOLDEN / "qwen25vl")
    bare.chat_template = None
    output = model.predict_forward(image=pictures["imgA"], text="Hi", max_new_tokens=1, tokenizer=bare)
    assert "Hi<|im_end|>" in output.past_text


def test_a_picture_stands_at_a_tag_in_the_words_before_or_behind_it(processor, pictures):
    parts = [{"type": "text", "text": "In <image> is?"}, {"type": "image", "image": pictures["imgA"]}]
    asked = processor.prepare(pictures["imgA"], text="In <image> is?")
    for content in (parts, parts[::-1]):
        assert processor.apply_chat_template([{"role": "user", "content": content}]) == asked.prompt


def test_a_picture_between_words_stands_there(processor, pictures):
    parts = [
        {"type": "text", "text": "In "},
        {"type": "image", "image": pictures["imgA"]},
        {"type": "text", "text": " is?"},
    ]
    asked = processor.prepare(pictures["imgA"], text="In <image> is?")
    assert processor.apply_chat_template([{"role": "user", "content": parts}]) == asked.prompt


def test_messages_are_taken_as_transformers_pipelines_give_them(processor, pictures):
    messages = [{"role": "user", "content": [{"type": "image", "image": pictures["imgA"]}]}]
    messages[0]["content"].append({"type": "text", "text": "Hi"})
    given = {"continue_final_message": False, "processor_kwargs": {"padding_side": "right"}, "return_tensors": "pt"}
    found = processor.apply_chat_template(messages, tokenize=True, return_dict=True, **given)
    assert torch.equal(found["input_ids"], processor.prepare(pictures["imgA"], text="Hi").input_ids)


def test_a_whole_prompt_with_more_image_tokens_than_its_picture_is_refused(processor, pictures):
    prompt = processor.prepare(pictures["imgD"], text="Hi").prompt
    with pytest.raises(ValueError, match="prompt with pictures"):
        processor(pictures["imgD"], prompt.replace("Hi", f"Hi{CONTEXT}"))


def test_a_list_of_one_animation_is_that_video(processor, pictures, tmp_path):
    frames = [Image.fromarray(frame) for frame in pictures["vid3"]]
    frames[0].save(tmp_path / "clip.apng", save_all=True, append_images=frames[1:])
    found = processor(videos=[tmp_path / "clip.apng"], text="Hi")
    assert torch.equal(found["pixel_values"], processor.prepare(video=pictures["vid3"], text="Hi").pixel_values)


def test_a_list_of_one_video_file_is_that_video(processor, tmp_path):
    writer = cv2.VideoWriter(str(tmp_path / "clip.avi"), cv2.VideoWriter_fourcc(*"MJPG"), 10, (32, 24))
    for _ in range(3):
        writer.write(np.zeros((24, 32, 3), np.uint8))
    writer.release()
    assert len(processor(videos=[tmp_path / "clip.avi"], text="Hi")["pixel_values"]) == 3


def test_a_list_of_one_damaged_picture_says_what_is_wrong(processor, tmp_path):
    (tmp_path / "frame.png").write_text("no picture")
    with pytest.raises(OSError, match=r"frame\.png.* is no readable image"):
        processor(videos=[tmp_path / "frame.png"], text="Hi")


@pytest.mark.parametrize("opened", [np.asarray, open_video])
def test_a_list_of_one_video_is_that_video(processor, pictures, opened):
    found = processor(videos=[opened(pictures["vid3"])], text="Hi")
    assert torch.equal(found["pixel_values"], processor.prepare(video=pictures["vid3"], text="Hi").pixel_values)


def test_messages_may_be_about_an_iterator_of_frames(processor, pictures):
    video = {"type": "video", "video": iter(pictures["vid3"])}
    messages = [{"role": "user", "content": [video, {"type": "text", "text": "Hi"}]}]
    messages += [{"role": "assistant", "content": "Ho."}, {"role": "user", "content": "Why?"}]
    found = processor.apply_chat_template(messages, tokenize=True, return_dict=True)
    assert torch.equal(found["pixel_values"], processor.prepare(video=pictures["vid3"], text="Hi").pixel_values)


def test_a_region_between_the_points_looked_at_is_told(processor, heard):
    region = np.zeros((2, 160, 160))
    region[0, 41:49, 41:49] = 1  # points are 10 pixels apart
    region[1, 35:45] = 1
    assert processor.preprocess_mask_prompts(region).flatten(1).sum(1).tolist() == [0, 16]
    assert any("regions [1] hold none of the 16x16" in message for message in heard)


def test_whatever_is_not_zero_is_inside_a_region(processor):
    assert processor.preprocess_mask_prompts(np.full((1, 4, 6), -1)).all()


def test_regions_come_too_late_for_a_whole_prompt(processor, pictures):
    prompt = processor.prepare(pictures["imgD"], text="Hi").prompt
    with pytest.raises(ValueError, match="come too late"):
        processor(pictures["imgD"], prompt, mask_prompts=pictures["vpA"])


def test_texts_are_padded_with_the_tokenizers_own_token_else_its_end_mark(processor):
    tokenizer = copy.deepcopy(processor.tokenizer)
    tokenizer.pad_token, tokenizer.eos_token = "#", "?"
    assert Sa2VAProcessor(tokenizer).pad_token_id == tokenizer.convert_tokens_to_ids("#")
    tokenizer.pad_token = None
    assert Sa2VAProcessor(tokenizer).pad_token_id == tokenizer.convert_tokens_to_ids("?")
    tokenizer.eos_token = None
    assert Sa2VAProcessor(tokenizer).pad_token_id == 0


def test_call_with_words_alone_has_no_pixels(processor):
    assert set(processor(text="Hi")) == {"input_ids", "attention_mask"}


def test_call_refuses_unknown_arguments(processor):
    with pytest.raises(TypeError, match="max_lenght"):
        processor(text="Hi", max_lenght=3)


def test_threads_may_share_a_processor(processor, pictures):
    calls = [{"image": pictures["imgA"], "text": f"Ask {number}."} for number in range(4)]
    calls += [{"video": pictures["vid3"], "text": f"Ask {number}."} for number in range(4)]
    with ThreadPoolExecutor(4) as pool:
        parallel = list(pool.map(lambda call: processor.prepare(**call), calls))
    for call, inputs in zip(calls, parallel, strict=True):
        assert inputs.prompt == processor.prepare(**call).prompt


def test_a_foreign_tokenizer_is_refused(pictures):
    foreign = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"?": 0}, unk_token="?")), unk_token="?")
    with pytest.raises(ValueError, match="checkpoint's own"):
        Sa2VAProcessor(foreign).prepare(pictures["imgD"], text="Hi")


# ------------------------------------------------------------------------------------------------- load and save


def test_a_released_folder_without_processor_config_loads(processor):
    assert not (CHECKPOINT / "processor_config.json").exists()
    assert (processor.template, processor.image_size, processor.grounding_image_size) == ("qwen_chat", 448, 256)
    assert (processor.num_image_token, processor.region_grid) == (256, 16)
    assert (processor.num_key_frames, processor.frame_sampling) == (5, "first")


@pytest.mark.parametrize("frames", [torch.tensor([0, 2]), np.array([0, 2]), [np.int64(0), 2], range(0, 4, 2)])
def test_frame_numbers_of_any_kind_are_saved(processor, tmp_path, frames):
    Sa2VAProcessor(processor.tokenizer, frame_sampling=frames).save_pretrained(tmp_path)
    assert Sa2VAProcessor.from_pretrained(tmp_path).frame_sampling == [0, 2]


def test_saved_processor_comes_back_without_config(processor, tmp_path):
    own = Sa2VAProcessor(processor.tokenizer, template="phi3_chat", max_dynamic_patch=6, frame_sampling="uniform")
    own.save_pretrained(tmp_path)
    assert (tmp_path / "processor_config.json").exists()
    loaded = Sa2VAProcessor.from_pretrained(tmp_path)
    assert loaded.to_dict() == own.to_dict()
    assert loaded.tokenizer.get_vocab() == own.tokenizer.get_vocab()


def test_saved_settings_win_over_config_and_arguments_over_both(processor, tmp_path):
    Sa2VAProcessor(processor.tokenizer, max_dynamic_patch=6).save_pretrained(tmp_path)
    Sa2VAChatConfig.from_pretrained(CHECKPOINT).save_pretrained(tmp_path)
    assert Sa2VAProcessor.from_pretrained(tmp_path).max_dynamic_patch == 6
    assert Sa2VAProcessor.from_pretrained(tmp_path, max_dynamic_patch=3).max_dynamic_patch == 3


def test_what_was_changed_in_a_config_wins_over_saved_settings(processor, tmp_path):
    config = Sa2VAChatConfig.from_pretrained(CHECKPOINT)
    config.save_pretrained(tmp_path)
    Sa2VAProcessor(processor.tokenizer, max_dynamic_patch=6).save_pretrained(tmp_path)
    config.grounding_config.num_key_frames = 2
    loaded = Sa2VAProcessor.from_pretrained(tmp_path, config=config)
    assert (loaded.num_key_frames, loaded.max_dynamic_patch) == (2, 6)
    assert Sa2VAProcessor.from_pretrained(tmp_path, config=config, num_key_frames=3).num_key_frames == 3


def test_a_folder_without_a_tokenizer_says_so(processor, tmp_path):
    Sa2VAChatConfig.from_pretrained(CHECKPOINT).save_pretrained(tmp_path)
    with pytest.raises(OSError, match="holds no tokenizer"):
        Sa2VAProcessor.from_pretrained(tmp_path)


def test_settings_do_not_leak_into_the_tokenizer(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    assert "max_dynamic_patch" not in json.loads((tmp_path / "tokenizer_config.json").read_text())


def test_folder_with_neither_config_is_refused(tmp_path):
    with pytest.raises(OSError, match=r"processor_config\.json"):
        Sa2VAProcessor.from_pretrained(tmp_path)


def test_processor_of_a_config(processor):
    config = Sa2VAChatConfig.from_pretrained(CHECKPOINT)
    assert Sa2VAProcessor.from_config(config, processor.tokenizer).to_dict() == processor.to_dict()


# ----------------------------------------------------------------------------------------------------- after a call


@pytest.mark.parametrize("size", [(61, 97), (256, 256)], ids=["another size", "that very size"])
def test_logits_are_resized_by_way_of_sam2s_input_size(processor, size):
    logits = torch.randn(2, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    resized = processor.resize_logits(logits.bfloat16(), size)
    assert (resized.dtype, resized.shape) == (torch.float32, (2, *size))
    full = torch.nn.functional.interpolate(logits.bfloat16().float(), size=(256, 256), mode="bilinear")
    assert torch.equal(resized, torch.nn.functional.interpolate(full, size=size, mode="bilinear")[:, 0])


def test_resized_golden_logits_are_equal(processor, golden):
    low = torch.from_numpy(golden["img1seg__low0"])
    resized = processor.resize_logits(low, (61, 97))
    np.testing.assert_allclose(resized, golden["img1seg__final_logits0"].reshape(resized.shape), atol=1e-5)
    shape = golden["img1seg__mask0_shape"]
    mask = np.unpackbits(golden["img1seg__mask0"], count=int(np.prod(shape))).reshape(shape)
    assert np.array_equal(processor.binarize(resized), mask.astype(bool))


def test_threshold_is_a_probability(processor):
    logits = torch.tensor([-1.0, 0.0, 1.0])
    assert processor.binarize(logits).tolist() == [False, False, True]
    assert processor.binarize(logits, 0.2).tolist() == [True, True, True]
    assert processor.binarize(logits, 0.8).tolist() == [False, False, False]


@pytest.mark.parametrize("threshold", [0, 1, -0.1, 1.5, float("nan")])
def test_threshold_outside_0_to_1_is_refused(threshold, processor):
    with pytest.raises(ValueError, match="between 0 and 1"):
        processor.binarize(torch.zeros(1), threshold)


PHRASES = [
    ("Sure, [SEG].<|im_end|>", ["Sure"]),
    ("Sure, it is [SEG] and [SEG].<|im_end|>", ["Sure, it is and"] * 2),
    ("A person in white shirt [SEG].<|im_end|>", ["A person in white shirt"]),
    ("<p> A man </p> [SEG] walks <p> two dogs </p> [SEG] [SEG].", ["A man", "two dogs", "two dogs"]),
    ("<p>cats</p> [SEG], [SEG] and [SEG]", ["cats"] * 3),
    ("<p>A cat</p> sits. The dog [SEG] runs.", ["The dog runs"]),
    ("It is red. Here: [SEG]. Bye.", ["Here"]),
    ("The square is red. [SEG]", ["The square is red"]),
    ("It is red. [SEG] is there.", ["is there"]),
    ("Bye. Mr. Smith, e.g. the dog's owner, is [SEG]. A cat.", ["Mr. Smith, e.g. the dog's owner, is"]),
    ("[SEG]<|im_end|>", [""]),
    ("Sure,  [SEG] . <|im_end|>", ["Sure"]),
    ("No object here.<|im_end|>", []),
    ("", []),
]


@pytest.mark.parametrize(("prediction", "phrases"), PHRASES)
def test_every_seg_has_its_words(prediction, phrases, processor):
    assert processor.phrases(prediction) == phrases


# ------------------------------------------------------------------------------------------------------------ masks


@pytest.mark.parametrize("shape", [(3, 17, 9), (1, 1, 1), (2, 1, 30)])
def test_run_length_encoding_comes_back_through_json(shape):
    masks = np.random.default_rng(0).random(shape) > 0.5
    rles = json.loads(json.dumps(masks_to_rle(masks)))
    assert [rle["size"] for rle in rles] == [list(shape[1:])] * shape[0]
    decoded = rle_to_masks(rles)
    assert decoded.dtype == np.bool_
    assert np.array_equal(decoded, masks)


def test_run_length_encoding_takes_tensors_and_no_frames():
    assert masks_to_rle(torch.ones(1, 2, 2, dtype=torch.bool)) == masks_to_rle(np.ones((1, 2, 2), bool))
    assert masks_to_rle(np.ones((0, 2, 2), bool)) == []
    assert rle_to_masks([]).shape == (0, 0, 0)
    assert rle_to_masks([{"size": [2.0, 1.0], "counts": [1.0, 1.0]}])[0].ravel().tolist() == [False, True]


@pytest.mark.parametrize("masks", [np.ones((1, 2, 2)), np.ones((2, 2), bool)])
def test_only_bool_masks_of_three_axes_are_encoded(masks):
    with pytest.raises(ValueError, match="bool"):
        masks_to_rle(masks)


def test_encodings_of_different_sizes_are_refused():
    rles = masks_to_rle(np.ones((1, 2, 2), bool)) + masks_to_rle(np.ones((1, 3, 2), bool))
    with pytest.raises(ValueError, match="differ in size"):
        rle_to_masks(rles)


def boxes(*corners, size=(120, 200)):
    masks = np.zeros((len(corners), *size), bool)
    for mask, (top, left, bottom, right) in zip(masks, corners, strict=True):
        mask[top:bottom, left:right] = True
    return masks


def test_every_object_has_its_colour():
    colors = [object_color(index) for index in range(32)]
    assert len(set(colors)) == 32
    distances = [np.abs(np.subtract(a, b)).sum() for a, b in pairwise(colors)]
    assert min(distances) > 100


@pytest.mark.parametrize("width", [0, 3, 4, 9, 10, 11, 40])
def test_a_phrase_is_cut_to_the_longest_beginning_that_fits(width):
    text = "a  red cat on it"
    cuts = [text, *(text[:length].rstrip() + "..." for length in range(len(text) - 1, 0, -1))]
    assert _shorten(text, lambda words: len(words) <= width) == next((c for c in cuts if len(c) <= width), "")


def test_overlay_paints_masks_and_leaves_the_rest():
    masks = boxes((40, 20, 80, 60), (40, 120, 80, 160))
    overlay = draw_overlay(Image.new("RGB", (200, 120), "gray"), masks, alpha=0.5)
    assert (overlay.dtype, overlay.shape) == (np.uint8, (120, 200, 3))
    outside = ~masks.any(axis=0)
    assert (overlay[outside] == 128).all()
    for index, mask in enumerate(masks):
        tint = np.rint(0.5 * 128 + 0.5 * np.array(object_color(index)))
        assert (overlay[60, np.nonzero(mask)[1].min() + 20] == tint).all()
        assert (overlay[40, np.nonzero(mask)[1].min()] == object_color(index)).all()  # contour


@pytest.mark.parametrize("phrase", ["a cat", "a very long phrase about nothing in particular " * 5])
@pytest.mark.parametrize("corners", [(0, 0, 10, 10), (110, 190, 120, 200), (0, 0, 120, 200)])
def test_label_stays_inside_the_picture(phrase, corners):
    image, masks = Image.new("RGB", (200, 120), "gray"), boxes(corners)
    overlay = draw_overlay(image, masks, [phrase])
    label = (overlay == object_color(0)).all(axis=-1) & (draw_overlay(image, masks) != overlay).any(axis=-1)
    assert label.sum() > 100
    rows, columns = np.nonzero(label)
    text = overlay[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    border = np.concatenate([text[0], text[-1], text[:, 0], text[:, -1]])
    assert (border == object_color(0)).all()  # no letter is cut


def test_labels_of_objects_in_one_place_do_not_cover_each_other():
    image, masks = Image.new("RGB", (200, 120), "gray"), boxes((60, 50, 80, 150), (60, 50, 80, 150))
    both = draw_overlay(image, masks, ["first", "second"])
    first = (draw_overlay(image, masks, ["first", ""]) != draw_overlay(image, masks)).any(axis=-1)
    assert np.array_equal(both[first], draw_overlay(image, masks, ["first", ""])[first])


@pytest.mark.parametrize("size", [(1, 1), (3, 200), (200, 3)])
def test_tiny_pictures_are_painted_without_label(size):
    overlay = draw_overlay(Image.new("RGB", size), np.ones((1, size[1], size[0]), bool), ["a cat"])
    assert overlay.shape == (size[1], size[0], 3)


def test_overlay_of_no_objects_is_the_picture(pictures):
    assert np.array_equal(draw_overlay(pictures["imgA"], np.zeros((0, 61, 97), bool), []), pictures["imgA"])


def test_words_that_no_font_can_write_are_labelled_by_number():
    image, masks = Image.new("RGB", (200, 120), "gray"), boxes((20, 20, 60, 60), (60, 100, 90, 160))
    unknown = "\U0010fffd" * 3  # of a private area, where no font has letters
    assert np.array_equal(draw_overlay(image, masks, [unknown] * 2), draw_overlay(image, masks, ["1", "2"]))


@pytest.mark.parametrize(
    ("masks", "phrases"),
    [
        (boxes((0, 0, 9, 9)), ["a", "b"]),
        (boxes((0, 0, 9, 9)), [5]),
        (boxes((0, 0, 9, 9)), "a"),
        (boxes(), "a"),
        (boxes((0, 0, 9, 9), size=(9, 9)), None),
    ],
)
def test_overlay_refuses_what_does_not_fit(masks, phrases):
    with pytest.raises(ValueError, match=r"(?i)mask"):
        draw_overlay(Image.new("RGB", (200, 120)), masks, phrases)


def test_inputs_are_documented():
    assert all(name in Sa2VAInputs.__doc__ for name in Sa2VAInputs.__dataclass_fields__)
