"""Readers of conversations about images and clips.

* `open_finetune`         Sa2VA's fine-tune format: image, polygons and text
* `open_jsonl`            our own format, which can say all the others say
* `open_gcg`              grounded captions of GLaMM (arXiv:2311.03356): GranD-f, OpenPSG, RefCOCOg, Flickr30k
* `open_region_captions`  regions of Osprey (arXiv:2312.10032)
* `open_llava`, `open_chatunivi`  chat about images and videos, without masks

All take the folder of the data set and the name of a split, and raise FileNotFoundError where files are missing,
ValueError where they are broken or there is no such split.
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from . import templates
from .records import (
    JsonLines,
    Reader,
    Record,
    field,
    file_in,
    find_below,
    json_records,
    located,
    one_of,
    parse_coco_segmentation,
    parse_mask,
    read_json,
)
from .referring import Expression, Style, make_style
from .samples import Encoded, Media, ObjectMasks, Polygons, Sample, Turn, resolve

OSPREY_FILES = {
    "conversation": "osprey_conversation.json",
    "description": "osprey_detail_description.json",
    "short": "osprey_short_form.json",
    "part": "osprey_part_level.json",
    "positive_negative": "osprey_lvis_positive_negative.json",
}
OSPREY_IMAGES = ("train2017", "val2017", "train2014", "val2014", "imgs")
VIDEO_SUFFIXES = (".mp4", ".mkv", ".webm", ".avi")

# ---------- Sa2VA's fine-tune format


@dataclass(frozen=True)
class _Finetune:
    """Builds samples from items of annotations.json, or from (item, number of an object)."""

    folder: Path
    style: Style

    def __call__(self, record: Record, rng: np.random.Generator) -> Sample:
        index, item, only = record.data
        masks, texts = field(item, "mask", list), field(item, "text", list)
        if len(masks) != len(texts) or not masks:
            raise ValueError(f'"mask" and "text" need one entry for each object; got {len(masks)} and {len(texts)}.')
        names = field(item, "name", list, default=[""] * len(texts))
        if len(names) != len(texts) or not all(isinstance(name, str) for name in names):
            raise ValueError(f'"name" must hold a text for each of {len(texts)} objects, got {names!r:.40}.')
        chosen = self.style.choose(rng, range(len(masks))) if only is None else [only]
        expressions = [self._expression(index, i, masks[i], texts[i])._replace(name=names[i]) for i in chosen]
        image = field(item, "image", str)
        name = str(index) if only is None else expressions[0].id
        return self.style.sample(rng, name, Media((resolve(self.folder, image),)), expressions, {"image": image})

    @staticmethod
    def _expression(index: int, number: int, polygons: Any, text: Any) -> Expression:
        with located(f'"mask"[{number}]'):
            encoded = parse_mask(polygons)
            if not isinstance(encoded, Polygons):
                raise ValueError("must be a list of polygons [[x0, y0, x1, y1, ...], ...].")
        if not isinstance(text, str):
            raise ValueError(f'"text"[{number}] must be text, got {text!r:.40}.')
        return Expression(f"{index}_{number}", text, ObjectMasks({0: encoded}))


def open_finetune(root: Path, split: str = "train", **options: Any) -> Reader:
    """Opens data in the format of Sa2VA's fine-tuning example.

    `annotations.json` is a list of {"image": "a.jpg", "mask": [polygons of each object], "text": [a phrase for each]};
    polygons are lists of [x0, y0, x1, y1, ...] in pixels. Images are in `images/`. Ours alone is an optional "name",
    what an answer calls each object where it is not the phrase of the question: see `answer` of `make_style`.

    Args:
        root: folder with `annotations.json` and `images/`.
        split: "train" is `annotations.json`, any other `annotations_<split>.json`.
        **options: see `referring.make_style`.
    """
    style = make_style(split, **options)
    file = root / ("annotations.json" if split == "train" else f"annotations_{split}.json")
    records = []
    for index, (where, item) in enumerate(json_records(file)):
        count = len(item["text"]) if isinstance(item, Mapping) and isinstance(item.get("text"), list) else 0
        numbers = range(count) if style.one_per_expression and count else [None]
        records += [Record(where, (index, item, number)) for number in numbers]
    return Reader(records, _Finetune(root / "images", style), style.seed)


# ---------- JSONL


@dataclass(frozen=True)
class _Line:
    """Builds samples from the lines of our own format."""

    root: Path

    def __call__(self, record: Record, rng: np.random.Generator) -> Sample:
        line = json.loads(record.data)
        asked = field(line, "turns", list)
        objects = [self._object(i, entry) for i, entry in enumerate(field(line, "objects", list, default=[]))]
        turns = []
        for index, turn in enumerate(asked):
            with located(f'"turns"[{index}]'):
                answer = field(turn, "answer", str, type(None), default=None)
                turns.append(Turn(field(turn, "question", str), answer, _select(objects, turn, "objects")))
        info = field(line, "info", dict, default={})
        name = str(line.get("id", record.where.rpartition(":")[2]))
        media, regions = self._media(line), _select(objects, line, "regions")
        if not media and (regions or any(turn.objects for turn in turns)):
            raise ValueError(f'has objects, but no "image", "frames" or "video"; its keys are {sorted(line)}.')
        if media.is_video:
            _check_masks_of_clip(line)
        if regions and not all(0 in region.frames for region in regions):
            raise ValueError('"regions" are looked up in frame 0, where one of them has no mask.')
        return Sample(name, media, tuple(turns), regions, info)

    def _media(self, line: Mapping[str, Any]) -> Media:
        given = [key for key in ("image", "frames", "video") if key in line]
        if len(given) > 1:
            raise ValueError(f'give one of "image", "frames" and "video", got {" and ".join(given)}.')
        if "frames" in line:
            if not (frames := field(line, "frames", list)):
                raise ValueError('"frames" is empty: name at least one picture, or leave it out.')
            return Media(tuple(resolve(self.root, frame) for frame in frames), True)
        if not given:
            return Media(())
        return Media((resolve(self.root, field(line, given[0], str)),), given[0] == "video")

    def _object(self, index: int, entry: Any) -> ObjectMasks:
        with located(f'"objects"[{index}]'):
            if not isinstance(entry, Mapping) or ("mask" in entry) == ("masks" in entry):
                raise ValueError('needs "mask" (of an image) or "masks" (of a clip, by frame number).')
            if "mask" in entry:
                return ObjectMasks({0: parse_mask(entry["mask"], self.root)})
            frames = {int(frame): parse_mask(mask, self.root) for frame, mask in field(entry, "masks", dict).items()}
            annotated = field(entry, "annotated", list, default=None)
            return ObjectMasks(frames, None if annotated is None else _frame_numbers(annotated, frames))


def _check_masks_of_clip(line: Mapping[str, Any]) -> None:
    """An object that a clip's turns point at says where it is in every frame; regions are looked up in frame 0 only."""
    asked = {number for turn in line["turns"] for number in turn.get("objects", ())}
    if alone := [number for number in sorted(asked) if "mask" in line["objects"][number]]:
        raise ValueError(
            f'"objects"[{alone[0]}] of a clip has "mask", which is for pictures and regions. Give "masks" by frame '
            'number, and "annotated" if not all frames were labelled.'
        )


def _frame_numbers(annotated: Sequence[Any], masks: Mapping[int, Any]) -> frozenset[int]:
    if not annotated or not all(type(frame) is int and frame >= 0 for frame in annotated):
        raise ValueError(f'"annotated" must hold numbers of frames from 0, got {annotated!r:.40}.')
    if unseen := masks.keys() - set(annotated):
        raise ValueError(f'"annotated" leaves out frame {min(unseen)}, which has a mask.')
    return frozenset(annotated)


def _select(objects: Sequence[ObjectMasks], holder: Mapping[str, Any], name: str) -> tuple[ObjectMasks, ...]:
    numbers = field(holder, name, list, default=[])
    if wrong := [n for n in numbers if not isinstance(n, int) or not 0 <= n < len(objects)]:
        raise ValueError(f'"{name}" are numbers of the {len(objects)} objects from 0, got {wrong[0]!r}.')
    return tuple(objects[number] for number in numbers)


def open_jsonl(root: Path, split: str) -> Reader:
    """Opens `<split>.jsonl` below `root`, one sample a line in our own format; `docs/data.md` describes it."""
    return Reader(JsonLines(root / f"{split}.jsonl"), _Line(root))


# ---------- grounded captions

# split: file, and where its images may be; the first of the folders is Sa2VA's, the second GLaMM's
GCG_SPLITS: dict[str, tuple[str, tuple[str, ...]]] = {
    "grandf_train": ("GranDf_HA_GCG_train.json", ("images/grandf/train", "GranDf_HA_images/train")),
    "openpsg_train": ("OpenPsgGCG_train.json", ("images/coco2017", "coco_2017/train2017")),
    "openpsg_val": ("OpenPsgGCG_val.json", ("images/coco2017", "coco_2017/train2017")),
    "refcocog_train": ("RefCOCOg_GCG_train.json", ("images/coco2014/train2014", "coco_2014/train2014")),
    "refcocog_val": ("RefCOCOg_GCG_val.json", ("images/coco2014/train2014", "coco_2014/train2014")),
    "flickr_train": ("flickr_mergedGT_GCG_train.json", ("images/flickr30k/Flickr30K", "flikcr_30k/train")),
    "flickr_val": ("flickr_mergedGT_GCG_val.json", ("images/flickr30k/Flickr30K", "flikcr_30k/train")),
    "val": ("val_gcg_coco_caption_gt.json", ("images/grandf/val_test", "GranDf_HA_images/val_test")),
    "test": ("test_gcg_coco_caption_gt.json", ("images/grandf/val_test", "GranDf_HA_images/val_test")),
}
Phrase = tuple[int, int, tuple[Encoded, ...]]  # start and end in the caption, and masks


@dataclass(frozen=True)
class _GroundedCaptions:
    """Builds samples from (image, caption, phrases as the data set writes them)."""

    folders: tuple[Path, ...]
    split: str

    def __call__(self, record: Record, rng: np.random.Generator) -> Sample:
        if self.split in ("val", "test"):
            return self._reference(*record.data)
        read = {"refcocog": _refcocog_phrases, "flickr": _flickr_phrases}.get(self.split.split("_")[0], _grandf_phrases)
        image, caption, found = read(record.data)
        phrases = _without_overlap(sorted(found, key=lambda phrase: phrase[:2]), len(caption))
        answer, end = "", 0
        for start, stop, _ in phrases:
            answer += f"{caption[end:start]}<p> {caption[start:stop]} </p> [SEG]"
            end = stop
        objects = tuple(ObjectMasks({0: masks}) for *_, masks in phrases)
        turn = Turn(templates.pick(rng, templates.GROUNDED_CAPTION_QUESTIONS), answer + caption[end:], objects)
        info = {"image": image, "caption": caption, "phrases": [caption[a:b] for a, b, _ in phrases]}
        return Sample(record.where, Media((file_in(self.folders, image),)), (turn,), info=info)

    def _reference(self, image: Mapping[str, Any], captions: Sequence[Any], masks: Sequence[Any]) -> Sample:
        if not captions:
            raise ValueError(f"image {image.get('id')!r} has no caption.")
        name = str(field(image, "id", str, int))
        phrases = field(captions[0], "labels", list)
        if wrong := [phrase for phrase in phrases if not isinstance(phrase, str)]:
            raise ValueError(f'"labels" must be texts, got {wrong[0]!r}.')
        objects = tuple(
            ObjectMasks({0: parse_coco_segmentation(field(mask, "segmentation", list, dict))}) for mask in masks
        )
        turn = Turn(templates.GROUNDED_CAPTION_QUESTIONS[0], None, objects)
        info = {
            "image": name,
            "captions": [field(caption, "caption", str) for caption in captions],
            "phrases": phrases,
        }
        return Sample(name, Media((file_in(self.folders, f"{name}.jpg"),)), (turn,), info=info)


def _grandf_phrases(item: Any) -> tuple[str, str, list[Phrase]]:
    caption, phrases = field(item, "caption", str).strip('"').strip(), []
    for words, grounding in field(item, "groundings", dict).items():
        with located(f"phrase {words!r}"):
            start, end = field(grounding, "token_positives", list)
            masks = tuple(parse_mask(mask) for mask in field(grounding, "rle_masks", list))
            phrases.append((start, end, masks))
    return field(item, "file_name", str), caption, phrases


def _refcocog_phrases(item: Any) -> tuple[str, str, list[Phrase]]:
    entry = next(iter(item.values())) if isinstance(item, Mapping) and item else item
    caption, phrases = field(entry, "caption", str).strip('"').strip().lower(), []
    for number, ref in enumerate(field(entry, "refs", list)):
        with located(f'"refs"[{number}]'):
            words = field(ref, "sentence", str).lower()
            start = caption.find(words)
            if start >= 0:
                encoded = parse_coco_segmentation(field(ref, "segmentation", list, dict))
                phrases.append((start, start + len(words), encoded if isinstance(encoded, tuple) else (encoded,)))
    return field(entry, "img_file_name", str), caption, phrases


def _flickr_phrases(item: Any) -> tuple[str, str, list[Phrase]]:
    image, annotations = item
    phrases = []
    for annotation in annotations:
        if not annotation.get("ignore"):
            start, end = field(annotation, "tokens_positive", list)[0]
            phrases.append((start, end, (parse_mask(field(annotation, "sam_mask", dict)),)))
    return field(image, "file_name", str), field(image, "caption", str), phrases


def _without_overlap(phrases: Sequence[Phrase], length: int) -> list[Phrase]:
    """Phrases in order, without those that begin inside an earlier one (a word can't be in two pairs of tags)."""
    kept, end = [], 0
    for start, stop, masks in phrases:
        if not 0 <= start < stop <= length:
            raise ValueError(f"a phrase from {start} to {stop} does not fit a caption of {length} letters.")
        if start >= end:
            kept.append((start, stop, masks))
            end = stop
    return kept


def open_gcg(root: Path, split: str, *, seed: int = 0) -> Reader:
    """Opens grounded captions: one question, an answer with `<p> phrase </p> [SEG]` for each grounded phrase.

    "val" and "test" are GranD-f's benchmark: no answer, but `info["captions"]`, `info["phrases"]` and the masks.

    Args:
        root: folder with `annotations/` (also `annotations/train/`, `annotations/val_test/`) and the images.
        split: a key of `GCG_SPLITS`; "train" is "grandf_train".
        seed: names the choice of questions.
    """
    split = "grandf_train" if split == "train" else one_of(split, tuple(GCG_SPLITS), "GCG")
    name, folders = GCG_SPLITS[split]
    annotations = find_below(root, ("GranDf/annotations", "annotations"), "annotations")
    file = find_below(annotations, (name, f"train/{name}", f"val_test/{name}"), name)
    if split in ("val", "test"):
        records = _reference_records(file, file.with_name(name.replace("caption", "mask")))
    elif split.startswith("flickr"):
        content = read_json(file)
        records = [Record(where, (image, own)) for where, image, own in _by_image(file, content, "annotations")]
        records = [r for r in records if len(str(r.data[0].get("caption", "no caption given")).split()) >= 3]
    else:
        records = json_records(file)
    return Reader(records, _GroundedCaptions(tuple(root / folder for folder in folders), split), seed)


def _by_image(file: Path, content: Any, name: str) -> Iterator[tuple[str, Any, list]]:
    own = defaultdict(list)
    with located(file.name):
        for entry in field(content, name, list):
            own[field(entry, "image_id", int, str)].append(entry)
        images = field(content, "images", list)
    for number, image in enumerate(images):
        with located(f"{file.name}: images[{number}]"):
            yield f"{file.name}: images[{number}]", image, own[field(image, "id", int, str)]


def _reference_records(captions: Path, masks: Path) -> list[Record]:
    content, labels = read_json(captions), read_json(masks)
    by_image = defaultdict(list)
    with located(masks.name):
        for entry in field(labels, "annotations", list):
            by_image[field(entry, "image_id", int, str)].append(entry)
    return [
        Record(where, (image, own, by_image[image["id"]]))
        for where, image, own in _by_image(captions, content, "annotations")
    ]


# ---------- regions


@dataclass(frozen=True)
class _Regions:
    """Builds samples from items of Osprey's files."""

    folders: tuple[Path, ...]
    kind: str

    def __call__(self, record: Record, rng: np.random.Generator) -> Sample:
        item = record.data
        regions = []
        for number, annotation in enumerate(field(item, "annotation", list)):
            with located(f'"annotation"[{number}]'):
                segmentation = field(annotation, "segmentation", list, dict)
                regions.append(ObjectMasks({0: parse_coco_segmentation(segmentation)}))
        turns = self._descriptions(item, len(regions), rng) if self.kind == "description" else self._talk(item)
        name = field(item, "file_name", str)
        # COCO_train2014_000000000009.jpg of 2014 is 000000000009.jpg of 2017
        media = Media((file_in(self.folders, name, name.rpartition("_")[2]),))
        return Sample(record.where, media, tuple(turns), tuple(regions), {"image": name, "kind": self.kind})

    def _descriptions(self, item: Any, regions: int, rng: np.random.Generator) -> list[Turn]:
        texts = field(item, "descriptions" if "descriptions" in item else "description", list)
        if len(texts) != regions:
            raise ValueError(f'"description" needs one text for each of {regions} regions, got {len(texts)}.')
        questions = (templates.pick(rng, templates.REGION_QUESTIONS) for _ in texts)
        return [
            Turn(question.replace("{}", f"region{number}"), _without_brackets(text))
            for number, (question, text) in enumerate(zip(questions, texts, strict=True), 1)
        ]

    def _talk(self, item: Any) -> list[Turn]:
        suffix = templates.SHORT_ANSWER if self.kind in ("short", "part") else ""
        turns = read_turns(field(item, "conversations", list))
        return [Turn(_without_brackets(turn.question) + suffix, _without_brackets(turn.answer)) for turn in turns]


def _without_brackets(text: str) -> str:
    return text.replace("<", "").replace(">", "")


def open_region_captions(root: Path, split: str, *, seed: int = 0) -> Reader:
    """Opens a part of Osprey-724K; regions are called region1, region2, ... as in the file.

    Args:
        root: folder with the JSON (also in `Osprey-724K/`) and COCO's images in `coco/<one of OSPREY_IMAGES>`.
        split: a key of `OSPREY_FILES`; "train" is "description".
        seed: names the choice of questions.
    """
    kind = "description" if split == "train" else one_of(split, tuple(OSPREY_FILES), "Osprey")
    name = OSPREY_FILES[kind]
    file = find_below(root, (name, f"Osprey-724K/{name}"), name)
    coco = find_below(root, ("coco", "."), "images")
    # some of Osprey's conversations are empty
    records = [r for r in json_records(file) if not isinstance(r.data, Mapping) or r.data.get("conversations") != []]
    return Reader(records, _Regions(tuple(coco / folder for folder in OSPREY_IMAGES), kind), seed)


# ---------- chat


def read_turns(messages: Sequence[Any]) -> list[Turn]:
    """The turns of a LLaVA conversation: a list of {"from": "human" or "gpt", "value": text}.

    Questions in a row are joined, tags of pictures removed; an answer to nothing and a last question without answer are
    dropped, as some of the public sets have them.

    Raises:
        ValueError: messages of another form, or no turn at all.
    """
    turns, question = [], ""
    for number, message in enumerate(messages):
        with located(f'"conversations"[{number}]'):
            speaker, text = field(message, "from", str), field(message, "value", str)
            if speaker not in ("human", "gpt"):
                raise ValueError(f'"from" must be "human" or "gpt", got {speaker!r}.')
        if speaker == "human":
            question += re.sub("<(image|video)>", "", text).strip()
        elif question:
            turns.append(Turn(question, text))
            question = ""
    if not turns:
        raise ValueError('"conversations" needs a question of "human" and an answer of "gpt".')
    return turns


@dataclass(frozen=True)
class _Chat:
    """Builds samples from LLaVA's items, about an image, a video or nothing."""

    folder: Path

    def __call__(self, record: Record, rng: np.random.Generator) -> Sample:
        item = record.data
        turns = tuple(read_turns(field(item, "conversations", list)))
        if "video" in item:
            path = resolve(self.folder, field(item, "video", str))
            return Sample(record.where, Media((_as_stored(path),), is_video=True), turns)
        paths = (resolve(self.folder, field(item, "image", str)),) if item.get("image") else ()
        return Sample(record.where, Media(paths), turns)


def _as_stored(video: Path) -> Path:
    """The file under the suffix that the download has: lists say .mkv where there are .mp4."""
    return next((p for p in (video, *map(video.with_suffix, VIDEO_SUFFIXES)) if p.exists()), video)


def open_llava(root: Path, split: str = "train", *, file: str | None = None, text_only: bool = False) -> Reader:
    """Opens LLaVA's instructions (arXiv:2310.03744).

    Args:
        root: folder with `LLaVA-Instruct-150K/llava_v1_5_mix665k.json` and the images in `llava_images/`.
        split: "train".
        file: another JSON of the same form, relative to root.
        text_only: keep conversations without image, too; Sa2VA leaves them out.
    """
    one_of(split, ("train",), "LLaVA")
    names = ("LLaVA-Instruct-150K/llava_v1_5_mix665k.json", "llava_v1_5_mix665k.json")
    records = json_records(resolve(root, file) if file else find_below(root, names, "llava_v1_5_mix665k.json"))
    kept = [r for r in records if text_only or not isinstance(r.data, Mapping) or r.data.get("image")]
    return Reader(kept, _Chat(find_below(root, ("llava_images", "images", "."), "images")))


def open_chatunivi(root: Path, split: str = "train") -> Reader:
    """Opens the video part of Chat-UniVi's instructions (arXiv:2311.08046): `video_chat.json`, `Activity_Videos/`."""
    one_of(split, ("train",), "ChatUniVi")
    return Reader(json_records(root / "video_chat.json"), _Chat(root / "Activity_Videos"))
