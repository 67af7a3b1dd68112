"""Readers of data sets: what each format gives, and how it names what is broken.

`data/examples/` holds tiny files in the exact formats; `data/make_samples.py` knows the scenes they were drawn from.
"""

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sa2va.data import check, make_samples
from sa2va.data.check import validate
from sa2va.data.export_scenes import export_scenes
from sa2va.data.make_samples import EXAMPLES, captions, clips, long_clip, pictures, region_scenes
from sa2va.data.registry import DATASETS, open_dataset
from sa2va.data.samples import MaskFile, Media, ObjectMasks, PaintedPolygons, Polygons, decode_mask, resolve
from sa2va.data.scenes import make_sample

# for each example: the scenes behind it, and how many samples it has
REFERRING = {
    ("finetune", "train"): (lambda: pictures()[:2], 2),
    ("finetune", "val"): (lambda: pictures()[2:], 5),
    ("refcoco", "train"): (lambda: pictures()[:2], 2),
    ("refcoco", "val"): (lambda: pictures()[2:], 10),
    ("refcoco+", "val"): (lambda: pictures()[2:], 10),
    ("refcocog", "val"): (lambda: pictures()[2:], 10),
    ("grefcoco", "train"): (lambda: pictures()[:2], 2),
    ("grefcoco", "val"): (lambda: pictures()[2:], 3),
    ("reasonseg", "train"): (lambda: pictures()[:2], 2),
    ("reasonseg", "val"): (lambda: pictures()[2:], 1),
    ("mevis", "train"): (lambda: clips()[:1], 1),
    ("mevis", "valid_u"): (lambda: clips()[1:], 6),
    ("ref_youtube_vos", "train"): (lambda: clips()[:1], 1),
    ("ref_davis17", "train"): (lambda: clips()[:1], 1),
    ("ref_davis17", "valid"): (lambda: clips()[1:], 20),
    ("ref_sav", "train"): (lambda: [long_clip()], 1),
    ("ref_sav", "valid"): (lambda: clips()[1:], 6),
}
OTHERS = {
    ("jsonl", "train"): 7,
    ("mevis", "valid"): 6,
    ("ref_youtube_vos", "valid"): 5,
    ("ref_youtube_vos", "test"): 5,
    ("revos", "train"): 1,
    ("revos", "valid"): 8,
    ("gcg", "train"): 2,
    ("gcg", "refcocog_train"): 2,
    ("gcg", "flickr_train"): 2,
    ("gcg", "val"): 2,
    ("region_captions", "description"): 2,
    ("region_captions", "conversation"): 2,
    ("llava", "train"): 2,
    ("chatunivi", "train"): 1,
}


def example(name, split, **options):
    return open_dataset(name, EXAMPLES / name, split, **options)


def read_masks(masks, sample):
    """All frames of an object, bool [T, h, w]."""
    return masks.read(range(len(sample.media)), sample.media.size())


def meant(scene, words):
    """The union of the objects that are named in some words, bool [T, h, w]; None without any."""
    numbers = [i for i, thing in enumerate(scene.objects) if thing.name in words]
    return scene.object_masks[numbers].any(0) if numbers else None


# ---------- every format


def test_every_data_set_has_an_example():
    assert {name for name, _ in [*REFERRING, *OTHERS]} == set(DATASETS)


@pytest.mark.parametrize(("name", "split"), [*REFERRING, *OTHERS])
def test_examples_are_sound_and_complete(name, split):
    count = OTHERS.get((name, split)) or REFERRING[name, split][1]

    assert len(example(name, split)) == count
    assert validate(name, EXAMPLES / name, split) == []


@pytest.mark.parametrize(("name", "split"), REFERRING)
def test_expressions_have_the_masks_of_the_scene(name, split):
    scenes = REFERRING[name, split][0]()
    dataset = example(name, split)
    per_scene = len(dataset) // len(scenes)

    for index in range(len(dataset)):
        sample, scene = dataset[index], scenes[index // per_scene]
        texts = sample.info["expressions"] if "expressions" in sample.info else [sample.info["expression"]]
        step = sample.media.step
        for text, turn in zip(texts, sample.turns, strict=True):
            target = meant(scene, text)
            assert text.lower().removesuffix(".") in turn.question.lower()
            assert len(turn.objects) == (target is not None)
            for masks in turn.objects:
                np.testing.assert_array_equal(read_masks(masks, sample), target[::step])


@pytest.mark.parametrize(("name", "split"), [("refcoco", "train"), ("mevis", "train")])
def test_pictures_are_those_of_the_scene(name, split):
    scene = REFERRING[name, split][0]()[0]
    frames = example(name, split)[0].media.read()

    assert len(frames) == len(scene.frames)
    for frame, pixels in zip(frames, scene.frames, strict=True):
        assert np.abs(np.asarray(frame, dtype=float) - pixels).mean() < 8  # JPEG


def test_training_groups_expressions_and_evaluation_asks_one_by_one():
    grouped = example("refcoco", "train", max_expressions=3)[0]
    single = example("refcoco", "train", one_per_expression=True)

    assert len(grouped.turns) == len(set(grouped.info["expressions"])) == 3
    assert len(single) == 18
    assert [single[0].turns[0].question, single[0].turns[0].answer] == [
        "Please segment red triangle in this image.",
        "Sure, it is [SEG].",
    ]


def test_chance_follows_from_seed_index_and_visit():
    def questions(seed, visit):
        return [turn.question for turn in example("refcoco", "train", seed=seed).at(0, visit).turns]

    assert questions(1, 0) == questions(1, 0)
    assert len({tuple(questions(seed, visit)) for seed in (1, 2) for visit in (0, 1)}) == 4


def test_a_template_replaces_the_usual_question():
    dataset = example("mevis", "valid_u", template="Find {} please.")

    assert dataset[0].turns[0].question == f"Find {dataset[0].info['expression']} please."
    with pytest.raises(ValueError, match=r"needs \{\}"):
        example("mevis", "valid_u", template="Find it.")


def test_an_answer_of_ones_own_repeats_the_expression():
    turn = example("mevis", "valid_u", answer="It is {} [SEG].")[0].turns[0]

    assert turn.answer == f"It is {example('mevis', 'valid_u')[0].info['expression']} [SEG]."
    with pytest.raises(ValueError, match=r"one \[SEG\]"):
        example("mevis", "valid_u", answer="It is {}.")


def test_an_answer_may_call_an_object_by_another_name(tmp_path):
    item = {"image": "a.png", "mask": [[[0, 0, 4, 0, 4, 4]]], "text": ["de ster"], "name": ["the star"]}
    (tmp_path / "annotations.json").write_text(json.dumps([item]))
    turn = open_dataset("finetune", tmp_path, "train", template="Find {}.", answer="It is {} [SEG].")[0].turns[0]

    assert (turn.question, turn.answer) == ("Find de ster.", "It is the star [SEG].")
    item |= {"text": ["The Star.\r\n"]}
    del item["name"]
    (tmp_path / "annotations.json").write_text(json.dumps([item]))
    turn = open_dataset("finetune", tmp_path, "train", template="Find {}.", answer="It is {} [SEG].")[0].turns[0]
    assert (turn.question, turn.answer) == ("Find the star.", "It is the star [SEG].")
    (tmp_path / "annotations.json").write_text(json.dumps([item | {"name": []}]))
    with pytest.raises(ValueError, match='"name" must hold a text for each of 1 objects'):
        open_dataset("finetune", tmp_path, "train")[0]


def test_unknown_names_splits_and_folders_are_refused():
    with pytest.raises(ValueError, match=r"Unknown data set 'coco'.*refcoco"):
        open_dataset("coco", EXAMPLES, "val")
    with pytest.raises(ValueError, match=r"no split 'testA'.*train, val"):
        example("refcoco", "testA")
    with pytest.raises(FileNotFoundError, match=r"docs/data.md"):
        open_dataset("mevis", EXAMPLES / "nowhere", "train")


# ---------- single formats


def test_grefcoco_refuses_where_nothing_fits():
    found, both, nothing = example("grefcoco", "val")

    assert [s.info["no_target"] for s in (found, both, nothing)] == [False, False, True]
    assert nothing.turns[0].objects == () and nothing.turns[0].answer == "There is no such object in this image."


def test_reasonseg_asks_the_first_question_and_ignores_areas():
    sample, scene = example("reasonseg", "val")[0], pictures()[2]

    assert sample.info["kind"] == "long"
    name = scene.objects[0].name
    assert sample.turns[0].question == f"Which thing here is a {name}? Please respond with a segmentation mask."
    np.testing.assert_array_equal(read_masks(sample.info["ignore"], sample)[0], scene.object_masks[1, 0])


def test_smaller_polygons_of_reasonseg_cover_larger_ones():
    square, inner = ((1, 1), (8, 1), (8, 8), (1, 8)), ((3, 3), (5, 3), (5, 5), (3, 5))
    layers = ((255, inner), (1, square))

    target, ignored = (PaintedPolygons(layers, label).decode((10, 10)) for label in (1, 255))

    assert (target.sum(), ignored.sum()) == (64 - 9, 9)


def test_benchmarks_that_keep_their_masks_have_no_answer():
    for name in ("mevis", "ref_youtube_vos"):
        turn = example(name, "valid")[0].turns[0]
        assert turn.answer is None and turn.objects == ()


def test_ref_youtube_vos_leaves_test_videos_out_of_valid():
    assert {sample.info["video"] for sample in example("ref_youtube_vos", "valid")} == {"valid"}


def test_revos_tells_types_apart_and_knows_the_foreground():
    samples, scene = list(example("revos", "valid")), clips()[1]

    assert [sample.info["kind"] for sample in samples[-3:]] == ["referring", "reasoning", "hallucination"]
    assert samples[-2].turns[0].question == "Which shape is this clip about?"
    assert samples[-1].turns[0].objects == ()
    np.testing.assert_array_equal(read_masks(samples[0].info["foreground"], samples[0]), scene.object_masks.any(0))


def test_ref_davis17_has_four_annotators_for_each_object():
    samples = list(example("ref_davis17", "valid"))

    assert [sample.info["annotator"] for sample in samples[:5]] == [0, 1, 2, 3, 0]
    assert [sample.info["object_id"] for sample in samples[:5]] == ["1", "1", "1", "1", "2"]


def test_ref_davis17_reads_the_layout_of_ref_youtube_vos_too(tmp_path):
    shutil.copytree(EXAMPLES / "ref_youtube_vos/train", tmp_path / "valid")
    file = "meta_expressions/{}/meta_expressions.json"
    (tmp_path / file.format("valid")).parent.mkdir(parents=True)
    shutil.copy(EXAMPLES / "ref_youtube_vos" / file.format("train"), tmp_path / file.format("valid"))

    sample = open_dataset("ref_davis17", tmp_path, "val")[0]

    np.testing.assert_array_equal(read_masks(sample.turns[0].objects[0], sample), clips()[0].object_masks[0])


def test_ref_sav_sees_every_fourth_frame():
    media = example("ref_sav", "train")[0].media

    assert len(media) == 6
    assert np.abs(np.asarray(media.read([2])[0], dtype=float) - long_clip().frames[8]).mean() < 8
    assert [sample.info["kind"] for sample in example("ref_sav", "valid")][:2] == ["long", "short"]


@pytest.mark.parametrize("split", ["grandf_train", "refcocog_train", "flickr_train"])
def test_grounded_captions_tag_their_phrases(split):
    for sample, scene in zip(example("gcg", split), captions(), strict=True):
        turn = sample.turns[0]
        assert turn.answer == scene.turns[0].answer
        assert sample.info["caption"] == make_samples.plain_caption(scene)[0]
        for masks, target in zip(turn.objects, scene.turns[0].masks, strict=True):
            np.testing.assert_array_equal(read_masks(masks, sample), target)


def test_the_benchmark_of_grounded_captions_has_references():
    sample, scene = example("gcg", "val")[0], captions()[0]

    assert sample.turns[0].answer is None
    assert sample.info["captions"] == [make_samples.plain_caption(scene)[0]]
    assert len(sample.info["phrases"]) == len(sample.turns[0].objects) == len(scene.turns[0].targets)


def test_phrases_inside_other_phrases_are_left_out(tmp_path):
    root = copied("gcg", tmp_path)

    def overlap(items):
        first = next(iter(items[0]["groundings"].values()))
        items[0]["groundings"]["green"] = {"token_positives": [2, 7], "rle_masks": first["rle_masks"]}

    edit(root / "annotations/GranDf_HA_GCG_train.json", overlap)

    assert open_dataset("gcg", root, "train")[0].turns[0].answer == captions()[0].turns[0].answer


def test_regions_are_described_by_number():
    for kind in ("description", "conversation"):
        for sample, scene in zip(example("region_captions", kind), region_scenes(), strict=True):
            for masks, target in zip(sample.regions, scene.regions, strict=True):
                np.testing.assert_array_equal(read_masks(masks, sample)[0], target)

    assert (sample.turns[0].question, sample.turns[0].answer) == (scene.turns[0].question, scene.turns[0].answer)
    described = example("region_captions", "description")[0]
    assert "region1" in described.turns[0].question and described.turns[0].answer.startswith("region1: ")


def test_chat_has_no_masks_and_no_tags():
    scene = make_sample(make_samples.SEED, 0, split="test", task="question", size=make_samples.PICTURE)
    turn = example("llava", "train")[0].turns[0]

    assert (turn.question, turn.answer) == (scene.turns[0].question, scene.turns[0].answer)
    assert len(example("llava", "train", text_only=True)) == 3
    assert not example("llava", "train", text_only=True)[0].media


def test_chat_about_videos_finds_the_file_under_another_suffix():
    sample = example("chatunivi", "train")[0]

    assert sample.media.paths[0].name == "v_0.mp4" and len(sample.media) == 6
    assert "<video>" not in sample.turns[0].question


def test_jsonl_writes_masks_in_many_ways():
    sample, target = example("jsonl", "train")[6], pictures()[0].object_masks[0]

    for masks in sample.turns[0].objects:
        np.testing.assert_array_equal(read_masks(masks, sample), target)
    box = read_masks(sample.regions[0], sample)[0]
    assert (box & target[0]).sum() == target.sum()
    assert box.any(0).sum() == target[0].any(0).sum() and box.any(1).sum() == target[0].any(1).sum()


def test_exported_scenes_come_back_exactly(tmp_path):
    export_scenes(5, 1, tmp_path, tasks=("region", "video_multi"), num_frames=3)

    for sample, task in zip(open_dataset("jsonl", tmp_path, "test"), ("region", "video_multi"), strict=True):
        scene = make_sample(5, 0, split="test", task=task, num_frames=3)
        np.testing.assert_array_equal(np.stack([np.asarray(frame) for frame in sample.media.read()]), scene.frames)
        for turn, source in zip(sample.turns, scene.turns, strict=True):
            assert (turn.question, turn.answer) == (source.question, source.answer)
            for masks, target in zip(turn.objects, source.masks, strict=True):
                np.testing.assert_array_equal(read_masks(masks, sample), target)
        for masks, region in zip(sample.regions, scene.regions if task == "region" else (), strict=True):
            np.testing.assert_array_equal(read_masks(masks, sample)[0], region)
        assert (sample.info["task"], sample.info["kind"]) == (task, [turn.kind for turn in scene.turns])
        assert sample.info["expected"] == [turn.expected for turn in scene.turns]


# ---------- samples


def test_boxes_and_polygons_are_filled_as_coco_does():
    np.testing.assert_array_equal(
        np.argwhere(Polygons.box(1, 2, 3, 4).decode((5, 5))), [[2, 1], [2, 2], [3, 1], [3, 2]]
    )
    joined = Polygons(((0, 0, 2, 0, 2, 2, 0, 2), (1, 1, 3, 1, 3, 3, 1, 3)))
    assert joined.decode((4, 4)).sum() == 7


def test_run_lengths_go_down_the_columns():
    np.testing.assert_array_equal(
        decode_mask({"size": [2, 3], "counts": [1, 2, 3]}, (2, 3)), [[False, True, False], [True, False, False]]
    )


def test_masks_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"2x3 \(h x w\), its picture 4x4"):
        decode_mask({"size": [2, 3], "counts": [6]}, (4, 4))
    with pytest.raises(ValueError, match=r"add up to 2x3 = 6, not 5"):
        decode_mask({"size": [2, 3], "counts": [5]}, (2, 3))


def test_mask_files_hold_values_or_colours(tmp_path):
    Image.fromarray(np.array([[0, 2], [3, 2]], dtype=np.uint8)).save(tmp_path / "grey.png")
    Image.fromarray(np.array([[[0, 0, 0], [9, 0, 0]]], dtype=np.uint8)).save(tmp_path / "colour.png")

    assert MaskFile(tmp_path / "grey.png", 2).decode((2, 2)).tolist() == [[False, True], [False, True]]
    assert MaskFile(tmp_path / "grey.png").decode((2, 2)).sum() == 3
    assert MaskFile(tmp_path / "colour.png").decode((1, 2)).tolist() == [[False, True]]
    with pytest.raises(ValueError, match="holds colours"):
        MaskFile(tmp_path / "colour.png", 9).decode((1, 2))


def test_a_palette_may_have_black_anywhere(tmp_path):
    picture = Image.fromarray(np.array([[0, 1, 2]], dtype=np.uint8), "P")
    picture.putpalette([255, 255, 255, 0, 0, 0, 9, 0, 0])
    picture.save(tmp_path / "white first.png")
    assert MaskFile(tmp_path / "white first.png").decode((1, 3)).tolist() == [[True, False, True]]
    assert MaskFile(tmp_path / "white first.png", 1).decode((1, 3)).tolist() == [[False, True, False]]


def test_frames_without_mask_do_not_show_the_object():
    masks = ObjectMasks({1: (Polygons.box(0, 0, 1, 1), Polygons.box(1, 1, 2, 2))})

    assert masks.read([0, 1], (2, 2)).tolist() == [[[False] * 2] * 2, [[True, False], [False, True]]]


def test_media_reads_only_what_is_asked(tmp_path):
    Image.new("RGB", (4, 3), "red").save(tmp_path / "0.png")
    clip = Media((tmp_path / "0.png", tmp_path / "missing.png"), is_video=True)

    assert len(clip) == 2 and clip.size() == (3, 4)
    with pytest.raises(FileNotFoundError, match=r"missing.png"):
        clip.read()
    with pytest.raises(ValueError, match="no frame 2"):
        clip.read([2])


def test_paths_stay_below_the_folder():
    for path in ("../secret.png", "/etc/passwd"):
        with pytest.raises(ValueError, match="must lie below"):
            resolve(Path("data"), path)


def test_pickles_that_could_run_code_are_refused(tmp_path):
    root = copied("refcoco", tmp_path)
    (root / "refs(unc).p").write_bytes(pickle.dumps([Path("x")]))

    with pytest.raises(ValueError, match=r"refs\(unc\).p: no plain pickle: it refers to .*Path"):
        open_dataset("refcoco", root, "val")


# ---------- broken files


def copied(name, folder):
    return shutil.copytree(EXAMPLES / name, folder / name)


def edit(path, change):
    """Changes a JSON file in place."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def edit_refs(path, change):
    refs = pickle.loads(path.read_bytes())
    change(refs)
    path.write_bytes(pickle.dumps(refs, protocol=2))


def edit_line(path, number, text):
    lines = path.read_text().splitlines()
    lines[number - 1] = text
    path.write_text("\n".join(lines) + "\n")


def _far_away(instances):
    instances["annotations"][-1]["segmentation"][0][2] = instances["annotations"][-5]["segmentation"][0][2] = 1e12


META = "meta_expressions/train/meta_expressions.json"
DAVIS = "davis_text_annotations/Davis17_annot2.txt"
OSPREY = "Osprey-724K/osprey_detail_description.json"
LLAVA = "LLaVA-Instruct-150K/llava_v1_5_mix665k.json"
FIRST = "meta_expressions.json: video clip: expression 1"
BOX = {"mask": [1, 1, 5, 5]}
LATER = {"masks": {"1": [1, 1, 5, 5]}}


def _clip_with_a_broken_frame(root):
    names = ["a.png", "b.png", "c.png"]
    for name in names:
        Image.new("RGB", (8, 6)).save(root / name)
    (root / "b.png").write_bytes(b"garbage")
    line = {"frames": names, "turns": [{"question": "Hi?", "answer": "Ho."}]}
    edit_line(root / "train.jsonl", 2, json.dumps(line))


def _edit_first_video(root, change, split="valid_u"):
    edit(root / split / "meta_expressions.json", lambda d: change(next(iter(d["videos"].values()))))


def _rename_first(entries, name):
    entries[name] = entries.pop(next(iter(entries)))


def _annotated_clip(root, *annotated, more_turns=(), **more):
    names = ["a.png", "b.png"]
    for name in names:
        Image.new("RGB", (64, 48)).save(root / name)
    objects = [{"masks": {frames[0]: [0, 0, 9, 9]}, "annotated": frames} for frames in annotated]
    turn = {"question": "Where?", "answer": "[SEG] [SEG]", "objects": [0, 1]}
    edit_line(
        root / "train.jsonl", 2, json.dumps({"frames": names, "objects": objects, "turns": [turn, *more_turns], **more})
    )


BROKEN = {
    "polygon of two corners": (
        ("finetune", "train", lambda r: edit(r / "annotations.json", lambda d: d[1]["mask"][0].append([1, 2, 3, 4.5]))),
        ['annotations.json[1]: "mask"[0]: a polygon is [x0, y0, x1, y1, x2, y2, ...], got [1, 2, 3, 4.5].'],
    ),
    "text missing": (
        ("finetune", "train", lambda r: edit(r / "annotations.json", lambda d: d[0].pop("text"))),
        ['annotations.json[0]: lacks "text" (a list); it has image, mask.'],
    ),
    "no JSON": (
        ("finetune", "train", lambda r: (r / "annotations.json").write_text('[\n{"image":\n')),
        ["annotations.json:3: no JSON: Expecting value"],
    ),
    "image missing": (
        ("finetune", "train", lambda r: (r / "images/1.jpg").unlink()),
        ["annotations.json[1]: there is no file", "images/1.jpg"],
    ),
    "image damaged": (
        ("finetune", "train", lambda r: (r / "images/1.jpg").write_bytes(b"no picture")),
        ["annotations.json[1]: 1.jpg can't be read"],
    ),
    "line cut off": (
        ("jsonl", "train", lambda r: edit_line(r / "train.jsonl", 3, '{"image": ')),
        ["train.jsonl:3: Expecting value"],
    ),
    **{
        f"JSONL: {message}": (
            ("jsonl", "train", lambda r, line=line: edit_line(r / "train.jsonl", 2, json.dumps({"turns": []} | line))),
            [f"train.jsonl:2: {message}"],
        )
        for message, line in {
            'has objects, but no "image"': {"images": "a.png", "objects": [BOX], "regions": [0]},
            '"frames" is empty': {"frames": []},
            '"regions" are looked up in frame 0': {"frames": ["a.png"] * 2, "objects": [LATER], "regions": [0]},
            '"objects"[0] of a clip has "mask"': {
                "frames": ["a.png"] * 2,
                "objects": [BOX],
                "turns": [{"question": "Where?", "objects": [0]}],
            },
            '"objects"[0]: "annotated" must hold': {"frames": ["a.png"], "objects": [LATER | {"annotated": ["1"]}]},
            '"objects"[0]: "annotated" leaves out frame 1': {
                "frames": ["a.png"],
                "objects": [LATER | {"annotated": [0]}],
            },
        }.items()
    },
    "objects that are never annotated together": (
        ("jsonl", "train", lambda r: _annotated_clip(r, [0], [1])),
        ["train.jsonl:2: turn 0: there is no frame in which all its objects are annotated."],
    ),
    "objects of a conversation that are never annotated together": (
        (
            "jsonl",
            "train",
            lambda r: _annotated_clip(
                r,
                [0],
                [0],
                [1],
                more_turns=[
                    {"question": "And?", "answer": "[SEG]", "objects": [2]},
                    {"question": "Who?", "answer": "A cat."},
                ],
            ),
        ),
        ["train.jsonl:2: there is no frame in which all objects of the conversation are annotated."],
    ),
    "regions on a frame that nobody annotated": (
        ("jsonl", "train", lambda r: _annotated_clip(r, [1], [0, 1], regions=[1])),
        ["train.jsonl:2: turn 0: regions are shown on frame 0, in which not all its objects are annotated."],
    ),
    "a frame in the middle that can't be read": (
        ("jsonl", "train", lambda r: _clip_with_a_broken_frame(r)),
        ["train.jsonl:2: b.png can't be read"],
    ),
    "one [SEG] too many": (
        (
            "jsonl",
            "train",
            lambda r: edit_line(
                r / "train.jsonl",
                2,
                '{"image": "images/refer.png", "turns": [{"question": "Segment it.", "answer": "[SEG]"}]}',
            ),
        ),
        ["train.jsonl:2: turn 0: 1 [SEG] in the answer, but 0 objects."],
    ),
    "annotation missing": (
        ("refcoco", "val", lambda r: edit_refs(r / "refs(unc).p", lambda d: d[-1].update(ann_id=999))),
        ["refs(unc).p[", "instances.json has no annotation 999."],
    ),
    "annotation of one expression among many": (
        ("refcoco", "train", lambda r: edit_refs(r / "refs(unc).p", lambda d: d[4].update(ann_id=77))),
        ["refs(unc).p: image ", "instances.json has no annotation 77."],
    ),
    "corner out of this world": (
        ("grefcoco", "val", lambda r: edit(r / "instances.json", _far_away)),
        ["grefs(unc).json[", "a mask is run lengths, polygons, a box or a file"],
    ),
    "sentence empty": (
        ("refcoco+", "val", lambda r: edit_refs(r / "refs(unc).p", lambda d: d[-1]["sentences"][0].update(sent=" "))),
        ["refs(unc).p[", "an expression is empty."],
    ),
    "split missing": (
        ("refcocog", "val", lambda r: edit_refs(r / "refs(umd).p", lambda d: d[3].pop("split"))),
        ['refs(umd).p[3]: lacks "split" (text)'],
    ),
    "ids are text": (
        ("grefcoco", "val", lambda r: edit(r / "grefs(unc).json", lambda d: d[-2].update(ann_id="200"))),
        ['grefs(unc).json[7]: "ann_id" must be a whole number or a list'],
    ),
    "point beyond every picture": (
        ("reasonseg", "val", lambda r: edit(r / "val/2.json", lambda d: d["shapes"][0]["points"].append([1e999, 0]))),
        ["val/2.json: shapes[0]: its points must lie within"],
    ),
    "a turn of which nothing is known": (
        ("jsonl", "train", lambda r: edit_line(r / "train.jsonl", 2, json.dumps({"turns": [{"question": "Hi?"}]}))),
        ["train.jsonl:2: turn 0: neither answer nor objects say what is right."],
    ),
    "frames that lead elsewhere": (
        ("mevis", "valid", lambda r: _edit_first_video(r, lambda v: v.update(frames=["../../secret"]), "valid")),
        ["must lie below the data set's folder"],
    ),
    "an expression that leads elsewhere": (
        ("mevis", "valid_u", lambda r: _edit_first_video(r, lambda v: _rename_first(v["expressions"], "../0"))),
        ["must lie below the data set's folder"],
    ),
    "shape without label": (
        ("reasonseg", "val", lambda r: edit(r / "val/2.json", lambda d: d["shapes"][1].pop("label"))),
        ['val/2.json: shapes[1]: lacks "label" (text)'],
    ),
    "too few masks": (
        ("mevis", "valid_u", lambda r: edit(r / "valid_u/mask_dict.json", lambda d: d["8"].pop())),
        [f"{FIRST}: annotation 8 has 5 masks, but the video 6 frames."],
    ),
    "mask of another size": (
        ("mevis", "valid_u", lambda r: edit(r / "valid_u/mask_dict.json", lambda d: d["8"][2].update(size=[80, 64]))),
        [f"{FIRST}: turn 0, object 0: The mask is 80x64 (h x w), its picture 64x80."],
    ),
    "obj_id missing": (
        (
            "ref_youtube_vos",
            "train",
            lambda r: edit(r / META, lambda d: d["videos"]["train"]["expressions"]["0"].pop("obj_id")),
        ),
        ['meta_expressions.json: video train: lacks "obj_id"'],
    ),
    "unknown type": (
        (
            "revos",
            "valid",
            lambda r: edit(
                r / "meta_expressions_valid_.json",
                lambda d: d["videos"]["valid"]["expressions"]["2"].update(type_id=5),
            ),
        ),
        ['meta_expressions_valid_.json: video valid: expression 2: "type_id" must be 0..2'],
    ),
    "line without object": (
        ("ref_davis17", "valid", lambda r: edit_line(r / DAVIS, 2, 'val "the star"')),
        ["Davis17_annot2.txt:2: expected video, object and"],
    ),
    "object without masks": (
        (
            "ref_sav",
            "train",
            lambda r: edit(
                r / "Ref-SAV.json", lambda d: d["sav_000001"]["objects"].update({"17": {"formated": "a star"}})
            ),
        ),
        ['Ref-SAV.json: video sav_000001: object 17: frame 0 of "masklet" has 5 objects only.'],
    ),
    "phrase outside of the caption": (
        (
            "gcg",
            "train",
            lambda r: edit(
                r / "annotations/GranDf_HA_GCG_train.json",
                lambda d: next(iter(d[1]["groundings"].values())).update(token_positives=[5, 900]),
            ),
        ),
        ["GranDf_HA_GCG_train.json[1]: a phrase from 5 to 900 does not fit a caption of"],
    ),
    "description missing": (
        ("region_captions", "description", lambda r: edit(r / OSPREY, lambda d: d[0]["description"].pop())),
        ['osprey_detail_description.json[0]: "description" needs one text for each of 2 regions, got 1.'],
    ),
    "unknown speaker": (
        ("llava", "train", lambda r: edit(r / LLAVA, lambda d: d[2]["conversations"][0].update({"from": "user"}))),
        ['llava_v1_5_mix665k.json[2]: "conversations"[0]: "from" must be "human" or "gpt", got'],
    ),
    "video missing": (
        ("chatunivi", "train", lambda r: (r / "Activity_Videos/v_0.mp4").unlink()),
        ["video_chat.json[0]: there is no file", "v_0.mkv"],
    ),
}


def test_something_is_broken_in_every_format():
    assert {case[0][0] for case in BROKEN.values()} == set(DATASETS)


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_broken_is_named(case, tmp_path):
    (name, split, damage), expected = BROKEN[case]
    root = copied(name, tmp_path)
    damage(root)

    problems = validate(name, root, split)

    assert any(all(part in problem for part in expected) for problem in problems), problems


def test_a_name_that_no_file_can_have_is_named_and_the_rest_is_looked_at(tmp_path):
    turns = [{"question": "Why?", "answer": "So."}]
    lines = [{"id": name, "image": f"{name * 5000}.png", "turns": turns} for name in "ab"]
    (tmp_path / "test.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    problems = validate("jsonl", tmp_path, "test")
    assert len(problems) == 2 and all("there is no file" in problem for problem in problems)


@pytest.mark.parametrize("turn", [("Say <IMG_CONTEXT>.", "A [SEG]."), ("What?", "A <|image_pad|> [SEG].")])
def test_words_that_stand_for_pictures_are_found(tmp_path, turn):
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    question, answer = turn
    mask = {"size": [32, 32], "counts": [0, 1024]}
    line = {
        "image": "a.png",
        "objects": [{"mask": mask}],
        "turns": [{"question": question, "answer": answer, "objects": [0]}],
    }
    (tmp_path / "train.jsonl").write_text(json.dumps(line) + "\n")
    (problem,) = validate("jsonl", tmp_path, "train")
    assert "stand for parts of a picture" in problem


def test_the_command_refuses_to_look_at_nothing(capsys):
    with pytest.raises(SystemExit, match="2"):
        check.main(["finetune", str(EXAMPLES / "finetune"), "--limit", "0"])
    assert "--limit" in capsys.readouterr().err


def test_the_command_lists_problems_and_fails(tmp_path, capsys):
    root = copied("finetune", tmp_path)
    (root / "images/0.jpg").unlink()

    with pytest.raises(SystemExit) as end:
        check.main(["finetune", str(root)])
    broken = capsys.readouterr().out
    with pytest.raises(SystemExit) as sound_end:
        check.main(["finetune", str(root), "--split", "val"])

    assert end.value.code == 1 and "annotations.json[0]: there is no file" in broken and "1 problem\n" in broken
    assert sound_end.value.code == 0 and capsys.readouterr().out == "no problems\n"
