"""Readers of referring expressions on images.

* RefCOCO, RefCOCO+, RefCOCOg: `refs(unc).p` (a pickle of plain lists and dicts) and `instances.json` of COCO
* gRefCOCO: `grefs(unc).json`; an expression means several objects, merged into one mask, or none at all
* ReasonSeg: one JSON of painted polygons an image, as LISA reads it (arXiv:2308.00692)

Both openers raise FileNotFoundError where files are missing, ValueError where they are broken or there is no such
split.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from . import templates
from .records import (
    FARTHEST,
    Reader,
    Record,
    field,
    find_below,
    json_records,
    located,
    one_of,
    parse_coco_segmentation,
    read_json,
    read_plain_pickle,
)
from .referring import Expression, Style, make_style
from .samples import Media, ObjectMasks, PaintedPolygons, Sample, resolve

COCO_FOLDERS = (
    "coco2014/train2014",  # Sa2VA
    "images/mscoco/images/train2014",  # REFER
    "images/train2014",
    "train2014",
    "../coco2014/train2014",
    "../images/mscoco/images/train2014",
    "../images/train2014",
    "../train2014",
)
IGNORED = 255  # label of areas that ReasonSeg leaves out of the score


# ---------- RefCOCO and gRefCOCO


@dataclass(frozen=True)
class _CocoExpressions:
    """Builds samples from (image id, [(ref, sentence), ...])."""

    images: Mapping[Any, Any]
    annotations: Mapping[Any, Any]
    folder: Path
    style: Style
    skip_crowds: bool  # gRefCOCO's rule

    def __call__(self, record: Record, rng: np.random.Generator) -> Sample:
        image_id, pairs = record.data
        if image_id not in self.images:
            raise ValueError(f"instances.json has no image {image_id!r}.")
        file_name = field(self.images[image_id], "file_name", str)
        expressions = [self._expression(*pair) for pair in self.style.choose(rng, pairs)]
        name = expressions[0].id if self.style.one_per_expression else str(image_id)
        info = {"image": file_name}
        return self.style.sample(rng, name, Media((resolve(self.folder, file_name),)), expressions, info)

    def _expression(self, ref: Mapping[str, Any], sentence: Mapping[str, Any]) -> Expression:
        number = f"{field(ref, 'ref_id', int)}_{field(sentence, 'sent_id', int)}"
        ids = [id for id in _as_list(field(ref, "ann_id", int, list)) if id != -1]
        with located(f"ref {number}"):
            objects = ObjectMasks({0: tuple(part for id in ids for part in self._masks(id))}) if ids else None
        return Expression(number, field(sentence, "sent", str), objects, info={"no_target": not ids})

    def _masks(self, annotation_id: int) -> tuple:
        if annotation_id not in self.annotations:
            raise ValueError(f"instances.json has no annotation {annotation_id}.")
        annotation = self.annotations[annotation_id]
        if self.skip_crowds and annotation.get("iscrowd"):
            return ()
        encoded = parse_coco_segmentation(field(annotation, "segmentation", list, dict))
        return encoded if isinstance(encoded, tuple) else (encoded,)


def open_refcoco(
    name: str,
    root: Path,
    split: str,
    *,
    split_by: str | None = None,
    **options: Any,
) -> Reader:
    """Opens RefCOCO, RefCOCO+, RefCOCOg or gRefCOCO.

    Args:
        name: "refcoco", "refcoco+", "refcocog" or "grefcoco".
        root: folder with the refs and `instances.json`, or the one above that has `name` in it. Images are looked for
            in the usual places of COCO's train2014 below or beside it.
        split: "train", "val", "testA", "testB", for RefCOCOg "test".
        split_by: who split it, part of the file's name: "unc", for RefCOCOg "umd" (default) or "google".
        **options: see `referring.make_style`.
    """
    folder = root / name if (root / name).is_dir() else root
    generalized = name == "grefcoco"
    split_by = split_by or ("umd" if name == "refcocog" else "unc")
    file = folder / (f"grefs({split_by}).json" if generalized else f"refs({split_by}).p")
    refs = json_records(file, None if generalized else read_plain_pickle(file))
    instances = read_json(folder / "instances.json")
    with located(str(folder / "instances.json")):
        images = {field(image, "id", int): image for image in field(instances, "images", list)}
        annotations = {field(entry, "id", int): entry for entry in field(instances, "annotations", list)}
    style = make_style(split, **options)
    records = _group_refs(refs, split, file.name, style.one_per_expression)
    images_folder = find_below(folder, COCO_FOLDERS, "images of COCO train2014")
    return Reader(records, _CocoExpressions(images, annotations, images_folder, style, generalized), style.seed)


def _group_refs(refs: list[Record], split: str, file: str, single: bool) -> list[Record]:
    """One record an expression or, for training, an image."""
    by_image, splits = defaultdict(list), set()
    for where, ref in refs:
        with located(where):
            splits.add(field(ref, "split", str))
            if ref["split"] == split:
                sentences = field(ref, "sentences", list)
                by_image[field(ref, "image_id", int)] += [(ref, sentence, where) for sentence in sentences]
    one_of(split, sorted(splits), file)
    if single:
        return [
            Record(where, (image_id, [(ref, sentence)]))
            for image_id, items in by_image.items()
            for ref, sentence, where in items
        ]
    return [
        Record(f"{file}: image {image_id}", (image_id, [item[:2] for item in items]))
        for image_id, items in by_image.items()
        if items
    ]


def _as_list(value: Any) -> list:
    return value if isinstance(value, list) else [value]


# ---------- ReasonSeg


@dataclass(frozen=True)
class _ReasonSeg:
    """Builds samples from the paths of an image and its JSON."""

    style: Style

    def __call__(self, record: Record, rng: np.random.Generator) -> Sample:
        image, annotation = record.data
        content = read_json(annotation)
        texts, is_sentence = field(content, "text", list), bool(field(content, "is_sentence", bool, int))
        if not texts:
            raise ValueError('"text" has no question.')
        target, ignored = self._painted(field(content, "shapes", list))
        # the benchmark asks the first of an image's questions only
        chosen = texts[:1] if self.style.one_per_expression else self.style.choose(rng, texts)
        expressions = [
            Expression(image.stem, text, ObjectMasks({0: target}), is_sentence=is_sentence) for text in chosen
        ]
        info = {"image": image.name, "kind": "long" if is_sentence else "short", "ignore": ObjectMasks({0: ignored})}
        return self.style.sample(rng, image.stem, Media((image,)), expressions, info)

    @staticmethod
    def _painted(shapes: list) -> tuple[PaintedPolygons, PaintedPolygons]:
        layers = []
        for index, shape in enumerate(shapes):
            with located(f"shapes[{index}]"):
                label = field(shape, "label", str).lower()
                if label != "flag":  # left over from annotation, means nothing
                    points = tuple((float(x), float(y)) for x, y in field(shape, "points", list))
                    if not all(abs(number) <= FARTHEST for point in points for number in point):
                        raise ValueError(f"its points must lie within {FARTHEST} pixels, got {points!r:.60}.")
                    layers.append((IGNORED if "ignore" in label else 1, points))
        return PaintedPolygons(tuple(layers), 1), PaintedPolygons(tuple(layers), IGNORED)


def open_reasonseg(root: Path, split: str, **options: Any) -> Reader:
    """Opens ReasonSeg: `train/`, `val/`, `test/` with a .jpg and a .json of the same name for each sample.

    Evaluation asks the first question of every image, as LISA does; `info["kind"]` is "long" for whole sentences and
    "short" for phrases, `info["ignore"]` the area that does not count. Training draws from all questions. For the
    options see `referring.make_style`.

    Raises:
        ValueError, OSError: no such split, or no pictures in it.
    """
    folder = find_below(root, (split, f"ReasonSeg/{split}", f"reason_seg/ReasonSeg/{split}"), f"split {split!r}")
    images = sorted(folder.glob("*.jpg"))
    if not images:
        raise ValueError(f"There are no .jpg images in {str(folder)!r}.")
    style = make_style(split, sentences=templates.REASONING_QUESTIONS, **options)
    records = [
        Record(f"{split}/{annotation.name}", (image, annotation))
        for image in images
        for annotation in [image.with_suffix(".json")]
    ]
    return Reader(records, _ReasonSeg(style), style.seed)
