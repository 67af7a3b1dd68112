"""Writes tiny data sets in the exact files of the public ones: `python data/make_samples.py [FOLDER]`.

`data/examples/` holds the result: one folder for each name of `registry.DATASETS`, drawn from the synthetic world of
`scenes`. Nothing depends on chance, apart from the encoder of MP4.
"""

import argparse
import json
import pickle
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sa2va.data.export_scenes import export_scene
from sa2va.data.samples import Polygons
from sa2va.data.scenes import SceneSample, make_sample
from sa2va.demo.media import replacing, video_writer
from sa2va.processing_sa2va import masks_to_rle

EXAMPLES = Path(__file__).resolve().parent / "examples"
SEED = 4
PICTURE, CLIP = (72, 96), (64, 80)
COCO = "coco2014/train2014"

# ---------- scenes


@cache
def pictures() -> tuple[SceneSample, ...]:
    """Three pictures whose objects polygons can outline exactly; the first two are for training."""
    return _plain("refer", 3, size=PICTURE)


@cache
def captions() -> tuple[SceneSample, ...]:
    """Two pictures with grounded captions."""
    return _plain("caption", 2, size=PICTURE)


@cache
def clips() -> tuple[SceneSample, ...]:
    """Two clips of six frames; the first is for training."""
    return tuple(make_sample(SEED, i, split="test", task="video_motion", size=CLIP, num_frames=6) for i in range(2))


@cache
def long_clip() -> SceneSample:
    """A clip of 21 frames, of which SA-V would label six."""
    return make_sample(SEED, 2, split="test", task="video_motion", size=CLIP, num_frames=21)


@cache
def region_scenes() -> tuple[SceneSample, ...]:
    """Two pictures with visual prompts."""
    return _plain("region", 2, size=PICTURE)


def _plain(task: str, count: int, **options: Any) -> tuple[SceneSample, ...]:
    found, index = [], 0
    while len(found) < count:
        sample = make_sample(SEED, index, split="test", task=task, **options)
        masks = sample.object_masks[:, 0]
        if all(np.array_equal(Polygons(tuple(map(tuple, outline(m)))).decode(m.shape), m) for m in masks):
            found.append(sample)
        index += 1
    return tuple(found)


def names(sample: SceneSample) -> list[str]:
    """What the objects of a scene are called: "the red star"."""
    return [f"the {thing.name}" for thing in sample.objects]


# ---------- masks


def outline(mask: np.ndarray) -> list[list[float]]:
    """Polygons along the pixel edges of a mask, bool [h, w]; without holes, COCO fills them with the same pixels."""
    padded = np.pad(mask, 1)
    after: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for y, x in np.argwhere(mask).tolist():
        corners = [(x, y), (x + 1, y), (x + 1, y + 1), (x, y + 1)]
        beside = (padded[y, x + 1], padded[y + 1, x + 2], padded[y + 2, x + 1], padded[y + 1, x])
        for side, inside in enumerate(beside):
            if not inside:
                after.setdefault(corners[side], []).append(corners[(side + 1) % 4])
    polygons = []
    while after:
        start = point = next(iter(after))
        loop = []
        while not loop or point != start:
            loop.append(point)
            following = after[point].pop()
            if not after[point]:
                del after[point]
            point = following
        turns = [p for i, p in enumerate(loop) if not _straight(loop[i - 1], p, loop[(i + 1) % len(loop)])]
        polygons.append([float(value) for corner in turns for value in corner])
    return polygons


def _straight(a: tuple[int, int], b: tuple[int, int], c: tuple[int, int]) -> bool:
    return (b[0] - a[0]) * (c[1] - b[1]) == (b[1] - a[1]) * (c[0] - b[0])


def contours(mask: np.ndarray) -> list[list[list[int]]]:
    """Border pixels ((x, y), ...) of each part of a mask, bool [h, w], as annotators of ReasonSeg click them."""
    import cv2

    found, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    return [contour[:, 0].tolist() for contour in found]


def rle(mask: np.ndarray) -> dict[str, Any]:
    """COCO's compressed run lengths of a mask, bool [h, w]."""
    return masks_to_rle(mask[None])[0]


def rle_or_null(mask: np.ndarray) -> dict[str, Any] | None:
    """Run lengths, or None of an empty mask, as MeViS writes it."""
    return rle(mask) if mask.any() else None


# ---------- files


def write_json(path: Path, content: Any) -> None:
    """Writes JSON; makes folders as needed."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content))


def write_picture(path: Path, pixels: np.ndarray) -> None:
    """Writes uint8 [h, w, 3] as JPEG or PNG."""
    with replacing(path) as temporary:
        Image.fromarray(pixels).save(temporary, quality=85)


def write_frames(folder: Path, sample: SceneSample) -> list[str]:
    """Writes 00000.jpg, 00001.jpg, ... and gives their names without suffix."""
    frames = [f"{t:05}" for t in range(len(sample.frames))]
    for name, pixels in zip(frames, sample.frames, strict=True):
        write_picture(folder / f"{name}.jpg", pixels)
    return frames


def write_palettes(folder: Path, sample: SceneSample) -> None:
    """Writes a PNG of palette colours for each frame: object 1, 2, ... on 0."""
    for t in range(len(sample.frames)):
        labels = np.zeros(sample.frames.shape[1:3], dtype=np.uint8)
        for number, masks in enumerate(sample.object_masks, 1):
            labels[masks[t]] = number
        picture = Image.fromarray(labels).convert("P")
        picture.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0, 0, 0, 128, 128, 0, 128])
        with replacing(folder / f"{t:05}.png") as temporary:
            picture.save(temporary)


def write_video(path: Path, sample: SceneSample) -> None:
    """Writes the frames as MP4."""
    with video_writer(path, sample.frames.shape[1:3], 24.0) as write:
        for pixels in sample.frames:
            write(pixels)


# ---------- images


def write_finetune(root: Path) -> None:
    """Two items for training, one in annotations_val.json."""
    items = []
    for index, sample in enumerate(pictures()):
        write_picture(root / "images" / f"{index}.jpg", sample.frames[0])
        masks = [outline(mask) for mask in sample.object_masks[:, 0]]
        items.append({"image": f"{index}.jpg", "mask": masks, "text": names(sample)})
    write_json(root / "annotations.json", items[:2])
    write_json(root / "annotations_val.json", items[2:])


def write_jsonl(root: Path) -> None:
    """A line of each kind of task, then one with the other ways to write masks."""
    tasks = ("refer", "absent", "caption", "region", "followup", "video_multi")
    options = {"split": "test", "num_frames": 4}
    lines = [export_scene(make_sample(SEED, 0, task=t, size=(48, 64), **options), t, root) for t in tasks]
    sample = pictures()[0]
    write_picture(root / "images/masks.jpg", sample.frames[0])
    mask = sample.object_masks[0, 0]
    with replacing(root / "masks/labels.png") as temporary:
        Image.fromarray(mask.astype(np.uint8) * 3).save(temporary)
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    box = [int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1]
    written = [{"file": "masks/labels.png", "value": 3}, outline(mask), rle(mask), "masks/labels.png", box]
    turn = {"question": "Segment it in every way.", "answer": "[SEG] [SEG] [SEG] [SEG]", "objects": [0, 1, 2, 3]}
    line = {"image": "images/masks.jpg", "objects": [{"mask": m} for m in written], "turns": [turn], "regions": [4]}
    with replacing(root / "train.jsonl") as temporary:
        temporary.write_text("".join(json.dumps(entry) + "\n" for entry in [*lines, line]))


def coco_instances(root: Path, samples: Sequence[SceneSample]) -> None:
    """Writes images and instances.json; object j of picture i is annotation 100 i + j."""
    images, annotations = [], []
    for i, sample in enumerate(samples):
        name = f"COCO_train2014_{i:012}.jpg"
        write_picture(root / COCO / name, sample.frames[0])
        images.append({"id": i, "file_name": name, "height": PICTURE[0], "width": PICTURE[1]})
        for j, mask in enumerate(sample.object_masks[:, 0]):
            entry = {"id": 100 * i + j, "image_id": i, "category_id": 1, "iscrowd": 0, "area": int(mask.sum())}
            annotations.append({**entry, "segmentation": outline(mask)})
    categories = [{"id": 1, "name": "shape"}]
    write_json(root / "instances.json", {"images": images, "annotations": annotations, "categories": categories})


def _ref(number: int, image: int, annotation: Any, split: str, texts: Sequence[str]) -> dict[str, Any]:
    sentences = [
        {"sent_id": 10 * number + k, "sent": text, "raw": text.capitalize(), "tokens": text.split()}
        for k, text in enumerate(texts)
    ]
    file_name = f"COCO_train2014_{image:012}_{number}.jpg"
    ref = {"ref_id": number, "image_id": image, "ann_id": annotation, "split": split, "file_name": file_name}
    return {**ref, "category_id": 1, "sentences": sentences, "sent_ids": [s["sent_id"] for s in sentences]}


def write_refcoco(root: Path, split_by: str = "unc") -> None:
    """A ref of two sentences for each object; the third picture is "val"."""
    coco_instances(root, pictures())
    refs = []
    for i, sample in enumerate(pictures()):
        for j, name in enumerate(names(sample)):
            texts = [name.removeprefix("the "), name]
            refs.append(_ref(len(refs), i, 100 * i + j, "val" if i == 2 else "train", texts))
    with replacing(root / f"refs({split_by}).p") as temporary:
        temporary.write_bytes(pickle.dumps(refs, protocol=2))


def write_refcocog(root: Path) -> None:
    """RefCOCOg by the split of UMD."""
    write_refcoco(root, "umd")


def write_grefcoco(root: Path) -> None:
    """For each picture one object, two objects, and none."""
    coco_instances(root, pictures())
    refs = []
    for i, sample in enumerate(pictures()):
        split, called = "val" if i == 2 else "train", names(sample)
        for ids, text in (([0], called[0]), ([0, 1], " and ".join(called[:2])), ([], "the elephant")):
            ref = _ref(len(refs), i, [100 * i + j for j in ids] or [-1], split, [text])
            refs.append({**ref, "no_target": not ids, "category_id": [1] * len(ids) or [-1]})
    write_json(root / "grefs(unc).json", refs)


def write_reasonseg(root: Path) -> None:
    """Two pictures for training, one to validate with an area that is ignored; sentences and phrases."""
    for i, sample in enumerate(pictures()):
        stem = root / ("val" if i == 2 else "train") / f"{i}"
        write_picture(stem.with_suffix(".jpg"), sample.frames[0])
        shapes = [("target", points) for points in contours(sample.object_masks[0, 0])]
        shapes += [("ignore", points) for points in contours(sample.object_masks[1, 0])] if i == 2 else []
        target = sample.objects[0].name
        texts = [f"Which thing here is a {target}?", f"Where do you see a {target}?"] if i else [target]
        content = {"text": texts, "is_sentence": bool(i), "shapes": [{"label": a, "points": b} for a, b in shapes]}
        write_json(stem.with_suffix(".json"), content)


def write_gcg(root: Path) -> None:
    """One caption in each of GLaMM's forms, and a benchmark of two."""
    grandf, refcocog, flickr = [], [], {"images": [], "annotations": []}
    benchmark = {"images": [], "annotations": []}, {"images": [], "annotations": []}
    for i, sample in enumerate(captions()):
        caption, spans = plain_caption(sample)
        masks = sample.turns[0].masks[:, 0]
        for folder in ("grandf/train", "grandf/val_test", "coco2014/train2014", "flickr30k/Flickr30K"):
            write_picture(root / "images" / folder / f"sa_{i}.jpg", sample.frames[0])
        phrases = [caption[a:b] for a, b in spans]
        grounded = zip(phrases, spans, masks, strict=True)
        groundings = {words: {"token_positives": span, "rle_masks": [rle(mask)]} for words, span, mask in grounded}
        grandf.append({"file_name": f"sa_{i}.jpg", "image_id": i, "caption": f'"{caption}"', "groundings": groundings})
        refs = [{"sentence": w, "segmentation": outline(m)} for w, m in zip(phrases, masks, strict=True)]
        refcocog.append({str(i): {"img_file_name": f"sa_{i}.jpg", "caption": caption, "refs": refs}})
        size = {"height": PICTURE[0], "width": PICTURE[1]}
        flickr["images"].append({"id": i, "file_name": f"sa_{i}.jpg", "caption": caption, **size})
        for span, mask in zip(spans, masks, strict=True):
            entry = {"id": len(flickr["annotations"]), "image_id": i, "area": int(mask.sum())}
            flickr["annotations"].append({**entry, "tokens_positive": [span], "sam_mask": rle(mask)})
            kept = {"id": entry["id"], "image_id": f"sa_{i}", "category_id": 1, "iscrowd": 0, "area": entry["area"]}
            benchmark[1]["annotations"].append({**kept, "segmentation": rle(mask)})
        benchmark[0]["annotations"].append({"id": i, "image_id": f"sa_{i}", "caption": caption, "labels": phrases})
        for part in benchmark:
            part["images"].append({"id": f"sa_{i}", **size})
    benchmark[1]["categories"] = [{"id": 1, "name": "object"}]
    write_json(root / "annotations/GranDf_HA_GCG_train.json", grandf)
    write_json(root / "annotations/RefCOCOg_GCG_train.json", refcocog)
    write_json(root / "annotations/flickr_mergedGT_GCG_train.json", flickr)
    write_json(root / "annotations/val_test/val_gcg_coco_caption_gt.json", benchmark[0])
    write_json(root / "annotations/val_test/val_gcg_coco_mask_gt.json", benchmark[1])


def plain_caption(sample: SceneSample) -> tuple[str, list[list[int]]]:
    """A scene's caption without tags, and where its phrases start and end."""
    caption, spans = "", []
    for part in sample.turns[0].answer.split("<p> ")[1:]:
        phrase, rest = part.split(" </p> [SEG]")
        spans.append([len(caption), len(caption) + len(phrase)])
        caption += phrase + rest
    return caption, spans


def write_region_captions(root: Path) -> None:
    """Descriptions and a conversation about the visual prompts of two pictures."""
    described, talks = [], []
    for i, sample in enumerate(region_scenes()):
        name = f"{i:012}.jpg"
        write_picture(root / "coco/train2017" / name, sample.frames[0])
        annotation = [{"bbox": [], "segmentation": outline(region)} for region in sample.regions]
        item = {"file_name": name, "height": PICTURE[0], "width": PICTURE[1], "annotation": annotation}
        texts = [f"<region{k}>: a shape on a dull ground" for k in range(1, len(annotation) + 1)]
        described.append({"id": i, **item, "description": texts})
        question = sample.turns[0].question.replace("region", "<region").replace("?", ">?").replace(".", ">.")
        talks.append({"id": i, **item, "conversations": _messages(question, sample.turns[0].answer)})
    write_json(root / "Osprey-724K/osprey_detail_description.json", described)
    write_json(root / "Osprey-724K/osprey_conversation.json", talks)


def _messages(question: str, answer: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def write_llava(root: Path) -> None:
    """Two questions about pictures, and one about nothing."""
    items = [{"id": "text", "conversations": _messages("How many sides has a square?", "A square has 4 sides.")}]
    for i in range(2):
        sample = make_sample(SEED, i, split="test", task="question", size=PICTURE)
        write_picture(root / "llava_images/coco/train2017" / f"{i}.jpg", sample.frames[0])
        talk = _messages(f"<image>\n{sample.turns[0].question}", sample.turns[0].answer)
        items.append({"id": str(i), "image": f"coco/train2017/{i}.jpg", "conversations": talk})
    write_json(root / "LLaVA-Instruct-150K/llava_v1_5_mix665k.json", items)


# ---------- videos


def write_chatunivi(root: Path) -> None:
    """A question about a video, whose suffix the list gets wrong."""
    sample = make_sample(SEED, 0, split="test", task="video_question", size=CLIP, num_frames=6)
    write_video(root / "Activity_Videos/v_0.mp4", sample)
    talk = _messages(f"{sample.turns[0].question}\n<video>", sample.turns[0].answer)
    write_json(root / "video_chat.json", [{"id": 0, "video": "v_0.mkv", "conversations": talk}])


def mask_lists(sample: SceneSample) -> list[list[Any]]:
    """Run lengths or null of each frame, for each object."""
    return [[rle_or_null(mask) for mask in masks] for masks in sample.object_masks]


def _expressions(sample: SceneSample, first: int) -> dict[str, Any]:
    """One for each object and one for the first two; annotations are numbered from `first`."""
    called = names(sample)
    groups = [([j], name) for j, name in enumerate(called)] + [([0, 1], f"{called[0]} and {called[1]}")]
    return {
        str(k): {"exp": text, "obj_id": ids, "anno_id": [first + j for j in ids]}
        for k, (ids, text) in enumerate(groups)
    }


def write_mevis(root: Path) -> None:
    """A clip for training, one of "valid_u" and one of "valid", whose masks are kept."""
    for split, sample in zip(("train", "valid_u", "valid"), (*clips(), clips()[1]), strict=True):
        frames = write_frames(root / split / "JPEGImages/clip", sample)
        expressions = _expressions(sample, 7)
        if split == "valid":
            expressions = {id: {"exp": entry["exp"]} for id, entry in expressions.items()}
        else:
            write_json(root / split / "mask_dict.json", {str(7 + j): m for j, m in enumerate(mask_lists(sample))})
        video = {"vid_id": 0, "frames": frames, "expressions": expressions}
        write_json(root / split / "meta_expressions.json", {"videos": {"clip": video}})


def write_revos(root: Path) -> None:
    """A clip for training and one to validate, each with expressions of all three types."""
    masks, foreground, first = {}, {}, 0
    for split, sample in zip(("train", "valid"), clips(), strict=True):
        frames = write_frames(root / "JPEGImages" / split, sample)
        expressions = {id: {**entry, "type_id": 0} for id, entry in _expressions(sample, first).items()}
        question = {"exp": "Which shape is this clip about?", "obj_id": [0], "anno_id": [first], "type_id": 1}
        nothing = {"exp": "the elephant", "obj_id": [], "anno_id": [], "type_id": 2}
        expressions |= {str(len(expressions)): question, str(len(expressions) + 1): nothing}
        content = {"videos": {split: {"frames": frames, "expressions": expressions}}}
        write_json(root / f"meta_expressions_{split}_.json", content)
        masks |= {str(first + j): m for j, m in enumerate(mask_lists(sample))}
        foreground[split] = {"masks_rle": [rle(mask) for mask in sample.object_masks.any(0)]}
        first += len(sample.objects)
    write_json(root / "mask_dict.json", masks)
    write_json(root / "mask_dict_foreground.json", foreground)


def write_ref_youtube_vos(root: Path) -> None:
    """A clip for training; "valid" lists its own clip and that of "test"."""
    entries = {}
    for split, sample in zip(("train", "valid", "test"), (*clips(), clips()[1]), strict=True):
        frames = write_frames(root / split / "JPEGImages" / split, sample)
        called = enumerate(names(sample))
        expressions = {
            str(j): {"exp": name, **({"obj_id": str(j + 1)} if split == "train" else {})} for j, name in called
        }
        entries[split] = {"frames": frames, "expressions": expressions}
    write_palettes(root / "train/Annotations/train", clips()[0])
    for split, listed in (("train", ("train",)), ("valid", ("valid", "test")), ("test", ("test",))):
        content = {"videos": {video: entries[video] for video in listed}}
        write_json(root / "meta_expressions" / split / "meta_expressions.json", content)


def write_ref_davis17(root: Path) -> None:
    """A clip to train and one to validate, described by the four annotators."""
    lines: dict[str, list[str]] = {}
    for split, sample in zip(("train", "val"), clips(), strict=True):
        write_frames(root / "DAVIS/JPEGImages/480p" / split, sample)
        write_palettes(root / "DAVIS/Annotations_unsupervised/480p" / split, sample)
        with replacing(root / f"DAVIS/ImageSets/2017/{split}.txt") as temporary:
            temporary.write_text(f"{split}\n")
        for suffix in ("annot1", "annot1_full_video", "annot2", "annot2_full_video"):
            words = "in the whole video" if "full" in suffix else "in the first frame"
            texts = [f'{split} {j} "{name} {words}"' for j, name in enumerate(names(sample), 1)]
            lines.setdefault(suffix, []).extend(texts)
    for suffix, texts in lines.items():
        with replacing(root / f"davis_text_annotations/Davis17_{suffix}.txt") as temporary:
            temporary.write_text("\n".join(texts) + "\n")


def write_ref_sav(root: Path) -> None:
    """A video with SA-V's masks for training; a clip of the benchmark."""
    sample = long_clip()
    folder = root / "sam_v_full/sav_train/sav_000"
    write_video(folder / "sav_000001.mp4", sample)
    labelled = sample.object_masks[:, ::4]
    masklet = [[rle(masks[t]) for masks in labelled] for t in range(labelled.shape[1])]
    facts = {"video_id": "sav_000001", "video_frame_count": float(len(sample.frames)), "video_split": "train"}
    write_json(
        folder / "sav_000001_manual.json", {**facts, "masklet_id": list(range(len(labelled))), "masklet": masklet}
    )
    published = "sav_000/sav_train/sav_000/sav_000001"
    objects = {str(j): {"formated": f"{name} that moves over the dull ground."} for j, name in enumerate(names(sample))}
    entry = {"video_path": f"{published}.mp4", "anno_path": f"{published}_manual.json", "objects": objects}
    write_json(root / "Ref-SAV.json", {"sav_000001": entry})
    clip = clips()[1]
    frames = write_frames(root / "videos/sav_000002", clip)
    expressions = {id: {**entry, "type_id": int(id) % 2} for id, entry in _expressions(clip, 0).items()}
    video = {"frames": frames, "height": CLIP[0], "width": CLIP[1], "expressions": expressions}
    write_json(root / "meta_expressions_valid.json", {"videos": {"sav_000002": video}})
    write_json(root / "mask_dict.json", {str(j): masks for j, masks in enumerate(mask_lists(clip))})


WRITERS: dict[str, Callable[[Path], None]] = {
    "finetune": write_finetune,
    "jsonl": write_jsonl,
    "refcoco": write_refcoco,
    "refcoco+": write_refcoco,
    "refcocog": write_refcocog,
    "grefcoco": write_grefcoco,
    "reasonseg": write_reasonseg,
    "mevis": write_mevis,
    "ref_youtube_vos": write_ref_youtube_vos,
    "revos": write_revos,
    "ref_davis17": write_ref_davis17,
    "ref_sav": write_ref_sav,
    "gcg": write_gcg,
    "region_captions": write_region_captions,
    "llava": write_llava,
    "chatunivi": write_chatunivi,
}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("folder", nargs="?", type=Path, default=EXAMPLES, help=f"default: {EXAMPLES.name}/ beside this")
    folder = parser.parse_args().folder
    for name, write in WRITERS.items():
        write(folder / name)


if __name__ == "__main__":
    main()
