"""Readers of referring expressions on videos.

data set          expressions                              masks
MeViS             meta_expressions.json                    mask_dict.json: run lengths by anno_id; several are merged
ReVOS             meta_expressions_<split>_.json           the same, and mask_dict_foreground.json
Ref-SAV (valid)   meta_expressions_valid.json              the same
Ref-YouTube-VOS   meta_expressions/<split>/...json         Annotations: PNG palettes, obj_id is the index
Ref-DAVIS17       the same, or the four annotators' texts  the same
Ref-SAV (train)   Ref-SAV.json                             SA-V's JSON of a video, every fourth frame of its MP4

Sa2VA leaves questions among the expressions ("which dog wins?") as they are, in training and in evaluation.

All openers take the folder of the data set, the name of a split, and options for `referring.make_style`. They raise
FileNotFoundError where files are missing, ValueError where they are broken or there is no such split.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from . import templates
from .records import Reader, Record, field, file_in, find_below, located, one_of, parse_mask, read_json
from .referring import Expression, Style, make_style
from .samples import MaskFile, Media, ObjectMasks, Sample, resolve

REVOS_KINDS = ("referring", "reasoning", "hallucination")
REF_SAV_KINDS = ("long", "short")
SAV_STEP = 4  # SA-V labels every fourth frame
DAVIS_TEXTS = (  # in the order of the expressions' numbers; file and encoding
    ("Davis17_annot1.txt", "utf-8"),
    ("Davis17_annot1_full_video.txt", "utf-8"),
    ("Davis17_annot2.txt", "latin-1"),
    ("Davis17_annot2_full_video.txt", "latin-1"),
)
DAVIS_SLIPS = {"clasic-car": "classic-car", "dog-scale": "dogs-scale", "motor-bike": "motorbike"}

# ---------- where masks are


@dataclass(frozen=True)
class _RunLengths:
    """Masks by annotation: {"12": [run lengths or null of each frame]}."""

    table: Mapping[str, Any]

    def __call__(self, video: str, names: Sequence[str], expression: Mapping[str, Any]) -> ObjectMasks | None:
        """All objects of an expression as one; None when it has none."""
        lists = []
        for anno_id in map(str, field(expression, "anno_id", list)):
            masks = field(self.table, anno_id, list)
            if len(masks) != len(names):
                raise ValueError(f"annotation {anno_id} has {len(masks)} masks, but the video {len(names)} frames.")
            lists.append(masks)
        if not lists:
            return None
        frames = {t: tuple(parse_mask(masks[t]) for masks in lists if masks[t]) for t in range(len(names))}
        return ObjectMasks({t: encoded for t, encoded in frames.items() if encoded})


@dataclass(frozen=True)
class _Palettes:
    """Masks as colours of PNG files, one file a frame."""

    folder: Path

    def __call__(self, video: str, names: Sequence[str], expression: Mapping[str, Any]) -> ObjectMasks:
        """The object of an expression."""
        value = int(field(expression, "obj_id", str, int))
        return ObjectMasks({t: MaskFile(resolve(self.folder, video, f"{n}.png"), value) for t, n in enumerate(names)})


# ---------- expressions by video


@dataclass(frozen=True)
class _Clips:
    """Builds samples from (video, [ids of expressions]).

    `masks` is None where a benchmark keeps them; `kinds` names the values of "type_id"; `foreground` holds run lengths
    of all that is no background, for ReVOS' robustness; `annotators` is how many described each object in turn.
    """

    videos: Mapping[str, Any]
    folders: tuple[Path, ...]
    masks: Callable[[str, Sequence[str], Mapping[str, Any]], ObjectMasks | None] | None
    style: Style
    kinds: tuple[str, ...] = ()
    foreground: Mapping[str, Any] | None = None
    annotators: int = 0

    def __call__(self, record: Record, rng: np.random.Generator) -> Sample:
        video, ids = record.data
        names = sorted(field(self.videos[video], "frames", list))
        if not names:
            raise ValueError('"frames" is empty.')
        expressions = [self._expression(video, names, id) for id in self.style.choose(rng, ids)]
        info = {"video": video, "frames": names}
        if self.foreground is not None and self.style.one_per_expression:
            info["foreground"] = self._foreground(video, len(names))
        name = f"{video}/{ids[0]}" if self.style.one_per_expression else video
        return self.style.sample(rng, name, _clip(self.folders, video, names), expressions, info)

    def _expression(self, video: str, names: Sequence[str], id: str) -> Expression:
        resolve(Path(), id)  # it becomes the name of a folder where predictions are submitted
        entry = self.videos[video]["expressions"][id]
        text = field(entry, "exp", str)
        info: dict[str, Any] = {}
        if self.kinds:
            number = field(entry, "type_id", int)
            if not 0 <= number < len(self.kinds):
                raise ValueError(f'"type_id" must be 0..{len(self.kinds) - 1} ({", ".join(self.kinds)}), got {number}.')
            info["kind"] = self.kinds[number]
        if "obj_id" in entry:
            info["object_id"] = entry["obj_id"]
        if self.annotators:
            info["annotator"] = int(id) % self.annotators
        objects = self.masks(video, names, entry) if self.masks else None
        return Expression(id, text, objects, self.masks is not None, "?" in text, info)

    def _foreground(self, video: str, length: int) -> ObjectMasks:
        masks = field(field(self.foreground, video, dict), "masks_rle", list)
        if len(masks) != length:
            raise ValueError(f"mask_dict_foreground.json has {len(masks)} masks, but the video {length} frames.")
        parts = (mask if isinstance(mask, list) else [mask] if mask else [] for mask in masks)
        return ObjectMasks({t: tuple(parse_mask(part) for part in group) for t, group in enumerate(parts)})


def _clip(folders: Sequence[Path], video: str, names: Sequence[str]) -> Media:
    """A folder of frames; or an MP4, of which `names` are evenly spaced frame numbers from 0."""
    folder = next((folder / video for folder in folders if resolve(folder, video).is_dir()), None)
    file = file_in(folders, f"{video}.mp4", f"{video[:7]}/{video}.mp4")  # SA-V keeps sav_000001 in sav_000
    if folder is not None or not file.is_file():
        base = folder or resolve(folders[0], video)
        return Media(tuple(resolve(base, f"{name}.jpg") for name in names), is_video=True)
    numbers = [int(name) for name in names]
    step = numbers[1] if len(numbers) > 1 else 1
    if numbers != list(range(0, len(numbers) * step, step)):
        raise ValueError(f"frames of {file.name} must be evenly spaced from 0, got {numbers[:3]} ...")
    return Media((file,), True, step, len(numbers))


def _open_clips(
    file: Path, videos: Mapping[str, Any], style: Style, folders: Sequence[Path], masks: Any, **extras: Any
) -> Reader:
    records = []
    for video, entry in videos.items():
        where = f"{file.name}: video {video}"
        with located(where):
            ids = list(field(entry, "expressions", dict))
        if style.one_per_expression:
            records += [Record(f"{where}: expression {id}", (video, [id])) for id in ids]
        elif ids:
            records.append(Record(where, (video, ids)))
    return Reader(records, _Clips(videos, tuple(folders), masks, style, **extras), style.seed)


def _read_videos(file: Path) -> dict[str, Any]:
    content = read_json(file)
    with located(file.name):
        return field(content, "videos", dict)


def _style(split: str, options: Mapping[str, Any]) -> Style:
    style = make_style(split, is_video=True, **options)
    if style.one_per_expression and options.get("template") is None:
        style = make_style(split, is_video=True, questions=(templates.VIDEO_EVALUATION_QUESTION,), **options)
    return style


# ---------- data sets


def open_mevis(root: Path, split: str, **options: Any) -> Reader:
    """Opens MeViS (arXiv:2308.08544), a folder for each split; "valid" and "test" come without masks."""
    folder = root / one_of(split, ("train", "valid_u", "valid", "test"), "MeViS")
    file = find_below(folder, ("meta_expressions.json", "meta_expressions_release.json"), "expressions")
    masks = _RunLengths(read_json(folder / "mask_dict.json")) if split in ("train", "valid_u") else None
    return _open_clips(file, _read_videos(file), _style(split, options), (folder / "JPEGImages",), masks)


def open_revos(root: Path, split: str, **options: Any) -> Reader:
    """Opens "train" or "valid" of ReVOS (arXiv:2407.11325); videos are in `JPEGImages/` or directly in `root`.

    `info["kind"]` is one of `REVOS_KINDS`; the last has no objects. In evaluation `info["foreground"]` holds what
    robustness is measured against.
    """
    file = root / f"meta_expressions_{one_of(split, ('train', 'valid'), 'ReVOS')}_.json"
    style = _style(split, options)
    foreground = read_json(root / "mask_dict_foreground.json") if style.one_per_expression else None
    masks = _RunLengths(read_json(root / "mask_dict.json"))
    extras = {"kinds": REVOS_KINDS, "foreground": foreground}
    return _open_clips(file, _read_videos(file), style, (root / "JPEGImages", root), masks, **extras)


def open_ref_youtube_vos(root: Path, split: str, **options: Any) -> Reader:
    """Opens Ref-YouTube-VOS: `meta_expressions/<split>/` and `<split>/JPEGImages`, with masks for "train" only.

    The file of "valid" lists the videos of "test", too; they are left out when the file of "test" is there.
    """
    files = {name: root / "meta_expressions" / name / "meta_expressions.json" for name in ("train", "valid", "test")}
    file = files[one_of(split, tuple(files), "Ref-YouTube-VOS")]
    others = _read_videos(files["test"]) if split == "valid" and files["test"].is_file() else {}
    videos = {video: entry for video, entry in _read_videos(file).items() if video not in others}
    masks = _Palettes(root / split / "Annotations") if split == "train" else None
    return _open_clips(file, videos, _style(split, options), (root / split / "JPEGImages",), masks)


def open_ref_davis17(root: Path, split: str, **options: Any) -> Reader:
    """Opens "train" or "valid" of Ref-DAVIS17 (arXiv:1803.08006).

    `root` has `davis_text_annotations/` and `DAVIS/` as published, or the layout of Ref-YouTube-VOS. Four expressions
    in turn describe an object: first frame and full video by annotator 1, then by annotator 2; `info["annotator"]`
    counts them 0..3.
    """
    split = "valid" if split == "val" else one_of(split, ("train", "valid"), "Ref-DAVIS17")
    style = _style(split, options)
    file = root / "meta_expressions" / split / "meta_expressions.json"
    if file.is_file():
        images, masks = root / split / "JPEGImages", root / split / "Annotations"
        return _open_clips(file, _read_videos(file), style, (images,), _Palettes(masks), annotators=len(DAVIS_TEXTS))
    davis = find_below(root, ("DAVIS",), "DAVIS/ or meta_expressions/")
    annotations = find_below(davis, ("Annotations_unsupervised/480p", "Annotations/480p"), "masks")
    videos = _davis_videos(root, davis, split)
    folders, masks = (davis / "JPEGImages/480p",), _Palettes(annotations)
    return _open_clips(root / "davis_text_annotations", videos, style, folders, masks, annotators=len(DAVIS_TEXTS))


def _davis_videos(root: Path, davis: Path, split: str) -> dict[str, Any]:
    """The annotators' texts in the shape of meta_expressions.json."""
    names = find_below(davis, (f"ImageSets/2017/{'val' if split == 'valid' else split}.txt",), "list of videos")
    texts = [_davis_texts(root / "davis_text_annotations" / file, encoding) for file, encoding in DAVIS_TEXTS]
    videos = {}
    for video in names.read_text().split():
        rounds = [annotator.get(video, {}) for annotator in texts]
        objects = [id for id in rounds[0] if all(id in described for described in rounds)]
        if not objects:
            raise ValueError(f"davis_text_annotations: there is no object of {video} that every annotator describes.")
        turns = [{"obj_id": id, "exp": described[id]} for id in objects for described in rounds]
        frames = sorted(path.stem for path in (davis / "JPEGImages/480p" / video).glob("*.jpg"))
        videos[video] = {"frames": frames, "expressions": {str(i): turn for i, turn in enumerate(turns)}}
    return videos


def _davis_texts(file: Path, encoding: str) -> dict[str, dict[str, str]]:
    """Expressions by video and object, from lines like `bear 1 "a brown bear"`."""
    if not file.is_file():
        raise FileNotFoundError(f"There is no file {str(file)!r}. See docs/data.md for the layout.")
    videos = defaultdict(dict)
    for number, line in enumerate(file.read_text(encoding=encoding).splitlines(), 1):
        parts = line.split(maxsplit=2)
        if len(parts) == 3 and parts[1].isdigit():
            videos[DAVIS_SLIPS.get(parts[0], parts[0])][parts[1]] = parts[2].strip()[1:-1]
        elif parts:
            raise ValueError(f'{file.name}:{number}: expected video, object and "expression"; got {line[:50]!r}.')
    return {video: dict(sorted(objects.items())) for video, objects in videos.items()}


# ---------- Ref-SAV


@dataclass(frozen=True)
class _SavClips:
    """Builds samples from (video, entry of Ref-SAV.json, [ids of objects])."""

    folders: tuple[Path, ...]
    style: Style

    def __call__(self, record: Record, rng: np.random.Generator) -> Sample:
        video, entry, ids = record.data
        file, labels = (self._path(field(entry, name, str)) for name in ("video_path", "anno_path"))
        masklets = field(read_json(labels), "masklet", list)
        chosen = self.style.choose(rng, ids)
        expressions = [
            Expression(id, field(entry["objects"][id], "formated", str), self._object(masklets, int(id)))
            for id in chosen
        ]
        name = f"{video}/{ids[0]}" if self.style.one_per_expression else video
        media = Media((file,), True, SAV_STEP, len(masklets))
        return self.style.sample(rng, name, media, expressions, {"video": video})

    def _path(self, path: str) -> Path:
        # the published file has sav_000/sav_train/sav_000/..., the download sav_train/sav_000/...
        _, _, rest = path.removeprefix("./").partition("/")
        return file_in(self.folders, path, *([rest] if rest.startswith("sav_train/") else []))

    @staticmethod
    def _object(masklets: list, index: int) -> ObjectMasks:
        if short := [t for t, masks in enumerate(masklets) if len(masks) <= index]:
            raise ValueError(
                f'object {index}: frame {short[0]} of "masklet" has {len(masklets[short[0]])} objects only.'
            )
        return ObjectMasks({t: parse_mask(masks[index]) for t, masks in enumerate(masklets)})


def open_ref_sav(root: Path, split: str, **options: Any) -> Reader:
    """Opens Ref-SAV (arXiv:2501.04001).

    For "train", `root` has `Ref-SAV.json` and SA-V's videos in `sam_v_full/` (or directly); for "valid",
    `meta_expressions_valid.json`, `mask_dict.json` and `videos/` (frames or MP4), and `info["kind"]` is one of
    `REF_SAV_KINDS`.
    """
    style = _style(one_of(split, ("train", "valid"), "Ref-SAV"), options)
    if split == "valid":
        file = root / "meta_expressions_valid.json"
        masks = _RunLengths(read_json(root / "mask_dict.json"))
        return _open_clips(file, _read_videos(file), style, (root / "videos",), masks, kinds=REF_SAV_KINDS)
    file = root / "Ref-SAV.json"
    videos = read_json(file)
    records = []
    for video, entry in videos.items():
        with located(f"{file.name}: video {video}"):
            ids = list(field(entry, "objects", dict))
        groups = [[id] for id in ids] if style.one_per_expression else [ids] if ids else []
        records += [Record(f"{file.name}: video {video}", (video, entry, group)) for group in groups]
    return Reader(records, _SavClips((root / "sam_v_full", root), style), style.seed)
