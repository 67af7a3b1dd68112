"""How each data set is scored: what is measured of a sample's turns, and what many measurements come to.

protocol     data sets                          scores
referring    refcoco, refcoco+, refcocog,       ciou, giou
             reasonseg, finetune
generalized  grefcoco                           giou, ciou, n_acc, t_acc, pr@0.5 ... pr@0.9
video        mevis, ref_youtube_vos             j, f, j_and_f
revos        revos                              the same and robustness; referring, reasoning, and overall: their mean;
                                                hallucination beside them
ref_sav      ref_sav                            j, f, j_and_f; long, short, and overall: their mean
ref_davis17  ref_davis17                        j, f, j_and_f; of the four annotators (official), and per expression
gcg          gcg                                ap50, miou, recall in both modes of `captions`; meteor, cider
words        region_captions                    meteor, cider
mixed        jsonl                              referring of pictures, video of clips; accuracy of the rest
scenes       jsonl, of exported scenes          those of `evaluation/scenes.py`

Masks of an answer are joined before they are compared, and so are the objects of a turn. Of a video, Sa2VA's own
evaluation takes the first `[SEG]` alone; so do these protocols, unless `merge` is "union".
"""

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from transformers.utils import logging

from sa2va import Sa2VAOutput
from sa2va.data.samples import ObjectMasks, Sample, Turn, annotated_frames
from sa2va.evaluation import captions, scenes
from sa2va.evaluation.captions import grounding_scores, plain_caption, text_scores
from sa2va.evaluation.metrics import (
    Overlaps,
    PhraseMasks,
    VideoQuality,
    cumulative_iou,
    disjoint,
    generalized_scores,
    intersection_union,
    iou,
    matched_quality,
    mean,
    mean_iou,
    robustness,
    video_quality,
)
from sa2va.evaluation.predict import join_masks, media_stamp, output_of
from sa2va.processing_sa2va import masks_to_rle, rle_to_masks

logger = logging.get_logger(f"transformers.{__name__}")

ANNOTATORS = 4  # of Ref-DAVIS17
Scores = dict[str, dict[str, float | None]]  # by group of turns and name, 0..1 (CIDEr: 0..10)


class Asked(NamedTuple):
    """A turn and what the model made of it.

    `size` is (h, w) and `frames` their number; masks are [frames, h, w].
    """

    sample: Sample
    index: int  # of the turn
    output: Sa2VAOutput
    size: tuple[int, int]
    frames: int
    merge: str

    @property
    def turn(self) -> Turn:
        """The turn with the truth."""
        return self.sample.turns[self.index]

    @property
    def labelled(self) -> bool:
        """Whether the truth is known: a turn without answer and objects belongs to a benchmark that keeps it."""
        return self.turn.answer is not None or bool(self.turn.objects)

    @property
    def counted(self) -> list[int]:
        """The frames that were labelled."""
        return annotated_frames(self.turn.objects, self.frames)

    def targets(self) -> np.ndarray:
        """Bool [objects, counted frames, h, w]."""
        masks = [thing.read(self.counted, self.size) for thing in self.turn.objects]
        return np.stack(masks) if masks else np.zeros((0, len(self.counted), *self.size), dtype=bool)

    def target(self) -> np.ndarray:
        """Bool [counted frames, h, w], of all objects together."""
        joined = np.zeros((len(self.counted), *self.size), dtype=bool)
        for thing in self.turn.objects:
            joined |= thing.read(self.counted, self.size)
        return joined

    def predicted(self) -> np.ndarray:
        """Bool [counted frames, h, w]: what was found, see the top of this file."""
        first_only = self.sample.media.is_video and self.merge == "official"
        found = self.output.prediction_masks[: 1 if first_only else None]
        return join_masks(found, self.size, self.frames)[self.counted]


class Measurement(NamedTuple):
    """What was measured of a turn: `quality` 0..1 ranks the worst cases (nan: not ranked), `value` is summarized."""

    sample_id: str
    turn: int
    quality: float
    value: Any
    info: Mapping[str, Any]


class Protocol(NamedTuple):
    """`measure` gives quality and value of a turn, `summarize` the scores of many; `dialogue` as in `predict`."""

    measure: Callable[[Asked], tuple[float, Any]]
    summarize: Callable[[Sequence[Measurement]], Scores]
    dialogue: bool = False


def measure_sample(
    protocol: Protocol, sample: Sample, record: Mapping[str, Any], merge: str = "official"
) -> list[Measurement]:
    """Measures the turns of a sample whose truth is known.

    Args:
        protocol: one of `PROTOCOLS`.
        sample: with the truth.
        record: its line of predictions (`predict`).
        merge: "official" or "union", see the top of this file.

    Raises:
        ValueError: the prediction is of another sample, or masks that do not fit the picture.
        OSError: masks that can't be read.
    """
    try:
        answers = [output_of(turn) for turn in record["turns"]]
        size, frames = tuple(record["size"]), record["frames"]
        shapes = {mask.shape for answer in answers for mask in answer.prediction_masks}
        if shapes - {(frames, *size)}:
            raise ValueError(f"masks of {sorted(shapes)}, not all of frames, height and width {(frames, *size)}")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"The prediction of sample {sample.id!r} is damaged ({error!r}). Remove its line.") from error
    if len(answers) != len(sample.turns):
        raise ValueError(f"Sample {sample.id!r} has {len(sample.turns)} turns, its prediction {len(answers)}.")
    if record.get("media", stamp := media_stamp(sample.media)) != stamp:
        raise ValueError(
            f"The picture of sample {sample.id!r} is another than the one that was answered: the data have changed. "
            "Give another --output, or remove it."
        )
    for turn, given in zip(sample.turns, record["turns"], strict=True):
        if given.get("question") != turn.question:
            raise ValueError(
                f"Sample {sample.id!r} asks {turn.question!r}, its prediction answers {given.get('question')!r}: the "
                "data have changed. Give another --output, or remove it."
            )
    measurements = []
    for index, answer in enumerate(answers):
        asked = Asked(sample, index, answer, size, frames, merge)
        if asked.labelled and sample.media and not asked.counted:
            logger.warning(f"Sample {sample.id!r}: turn {index} is left out, no frame has all its objects annotated.")
        elif asked.labelled:
            measurements.append(Measurement(sample.id, index, *protocol.measure(asked), sample.info))
    return measurements


def by_kind(summarize: Callable[[Sequence[Any]], dict[str, float | None]]) -> Callable[..., Scores]:
    """Scores of all values, and of those of each `info["kind"]`, where a data set has kinds."""

    def summarize_groups(measurements: Sequence[Measurement]) -> Scores:
        """What `summarize` makes of all values, "all", and of each kind."""
        groups: dict[str, list] = defaultdict(list)
        for item in measurements:
            groups["all"].append(item.value)
            if isinstance(kind := item.info.get("kind"), str):  # one's own data may hold anything there
                groups[kind].append(item.value)
        return {group: summarize(values) for group, values in groups.items()}

    return summarize_groups


def halves(*kinds: str) -> Callable[[Sequence[Measurement]], Scores]:
    """Scores of videos by `info["kind"]`; "overall" is the mean of the means of `kinds`, whatever their sizes.

    Where the data have no kinds (training splits), those of all.
    """

    def summarize(measurements: Sequence[Measurement]) -> Scores:
        scores = by_kind(summarize_videos)(measurements)
        of_kinds = {kind: score for kind, score in scores.items() if kind != "all"}
        if not of_kinds.keys() >= {*kinds}:
            return of_kinds or scores
        return {**of_kinds, "overall": _mean_of([of_kinds[kind] for kind in kinds])}

    return summarize


def _mean_of(scores: Iterable[Mapping[str, float]]) -> dict[str, float]:
    scores = list(scores)
    return {name: mean([score[name] for score in scores]) for name in scores[0]}


# ---------- images


def measure_overlap(asked: Asked) -> tuple[float, tuple[int, int, bool, bool]]:
    """IoU; intersection and union, and whether anything was found and wanted. `info["ignore"]` does not count."""
    predicted, target = asked.predicted(), asked.target()
    if isinstance(ignore := asked.sample.info.get("ignore"), ObjectMasks):  # one's own data may hold anything there
        counts = ~ignore.read(asked.counted, asked.size)
        predicted, target = predicted & counts, target & counts
    intersection, union = (int(count.sum()) for count in intersection_union(predicted, target))
    return float(iou(intersection, union)), (intersection, union, bool(predicted.any()), bool(target.any()))


def summarize_referring(values: Sequence[tuple[int, int, bool, bool]]) -> dict[str, float]:
    """cIoU and gIoU."""
    intersections, unions, *_ = zip(*values, strict=True)
    return {"ciou": cumulative_iou(intersections, unions), "giou": mean_iou(intersections, unions)}


def summarize_generalized(values: Sequence[tuple[int, int, bool, bool]]) -> dict[str, float]:
    """See `metrics.generalized_scores`."""
    return generalized_scores(*zip(*values, strict=True))


# ---------- videos


def measure_video(asked: Asked) -> tuple[float, dict[str, float]]:
    """J&F; J and F of an expression in a video, and its robustness where `info["foreground"]` has all its objects."""
    predicted, target = asked.predicted(), asked.target()
    quality = video_quality(predicted, target)
    value = _as_dict(quality)
    if isinstance(foreground := asked.sample.info.get("foreground"), ObjectMasks):
        value["robustness"] = robustness(predicted, target, foreground.read(asked.counted, asked.size))
    return quality.j_and_f, value


def _as_dict(quality: VideoQuality) -> dict[str, float]:
    return {**quality._asdict(), "j_and_f": quality.j_and_f}


summarize_videos = _mean_of


def measure_davis(asked: Asked) -> tuple[float, tuple[dict[str, float], list, list]]:
    """J&F of an expression, and both masks, encoded, to be matched when all of a video's are there."""
    quality, value = measure_video(asked)
    return quality, (value, masks_to_rle(asked.predicted()), masks_to_rle(asked.target()))


def summarize_davis(measurements: Sequence[Measurement]) -> Scores:
    """Ref-DAVIS17 (Khoreva et al., ACCV 2018) in two accounts.

    * "per expression": the mean over all (video, expression), as MeViS has it and Sa2VA's own evaluation computes it
    * "official": for each of the four annotators, a video's masks are painted into one label map, earlier objects over
      later ones, and matched with the true objects (`metrics.matched_quality`); the mean over all objects of all
      videos, then over annotators. A video that lacks an annotator's words for an object that another one describes is
      left out (`--limit` draws such). As everywhere here, pixels that DAVIS marks as void count as background.
    """
    videos: dict[str, dict[int, dict[int, Measurement]]] = defaultdict(lambda: defaultdict(dict))
    for item in measurements:
        if "annotator" in item.info:  # training splits join everybody's words
            videos[item.info["video"]][item.info["annotator"]][int(item.info["object_id"])] = item
    qualities: dict[int, list[VideoQuality]] = defaultdict(list)
    for annotators in videos.values():
        if len(annotators) == ANNOTATORS and len({tuple(sorted(things)) for things in annotators.values()}) == 1:
            for annotator, things in annotators.items():
                _, found, wanted = zip(*(things[key].value for key in sorted(things)), strict=True)
                found, wanted = (np.stack([rle_to_masks(rles) for rles in side]) for side in (found, wanted))
                qualities[annotator] += matched_quality(disjoint(found), wanted)
    scores = {"per expression": _mean_of(item.value[0] for item in measurements)}
    if qualities:
        scores["official"] = _mean_of(_mean_of(map(_as_dict, group)) for group in qualities.values())
    return scores


# ---------- captions


def measure_grounding(asked: Asked) -> tuple[float, tuple[Overlaps, str, Sequence[str]]]:
    """Overlap of the masks; masks compared, and the words with their references."""
    truth = asked.targets()[:, 0]
    found = [masks[0] for masks in asked.output.prediction_masks]
    sureness = np.array([score["iou"][0] for score in asked.output.mask_scores], dtype=float)
    predicted = PhraseMasks(np.stack(found) if found else truth[:0], asked.output.phrases, sureness)
    # a caption may have fewer labels than its image has masks: those are phrases that nothing matches
    labels = itertools.chain(asked.sample.info["phrases"], itertools.repeat(""))
    overlaps = Overlaps.of(predicted, PhraseMasks(truth, list(itertools.islice(labels, len(truth)))))
    return captions.iou_of_all(overlaps), (overlaps, *_words(asked))


def summarize_grounding(measurements: Sequence[Measurement], text_encoder: str | None = None) -> Scores:
    """Both modes of `captions`, and the words.

    The recall of mode "glamm" needs a `text_encoder` (`captions.bert_similarity`); a warning says so if there is none.
    """
    similarity = None
    if text_encoder:
        try:
            similarity = captions.bert_similarity(text_encoder)
        except OSError as error:
            logger.warning_once(f"No recall as GLaMM counts it, for want of {text_encoder}: {error}")
    in_order = sorted(measurements, key=lambda item: item.sample_id)  # as COCO's evaluation orders images
    overlaps, texts, references = zip(*(item.value for item in in_order), strict=True)
    scores = {mode: grounding_scores(overlaps, mode, similarity) for mode in captions.MODES}
    return {**scores, "caption": text_scores(texts, references)}


def measure_words(asked: Asked) -> tuple[float, tuple[str, Sequence[str]]]:
    """A caption and its references."""
    return float("nan"), _words(asked)


def _words(asked: Asked) -> tuple[str, Sequence[str]]:
    references = asked.sample.info.get("captions") or [asked.turn.answer or ""]
    return plain_caption(asked.output.prediction), [plain_caption(text) for text in references]


def summarize_words(values: Sequence[tuple[str, Sequence[str]]]) -> dict[str, float | None]:
    """METEOR and CIDEr."""
    return text_scores(*zip(*values, strict=True))


# ---------- own data


def measure_mixed(asked: Asked) -> tuple[float, tuple[str, Any]]:
    """Overlap of a picture, J and F of a clip; of a turn that asks for no object, whether the answer names none.

    Our own format allows for one `[SEG]` an object in clips, too, so all masks are joined.
    """
    asked = asked._replace(merge="union")
    if not asked.turn.objects:
        hit = scenes.measure_absence(asked.turn, asked.output)
        return float(hit), ("nothing to point at", hit)
    if asked.sample.media.is_video:
        quality, value = measure_video(asked)
        return quality, ("videos", value)
    quality, value = measure_overlap(asked)
    return quality, ("images", value)


def summarize_mixed(measurements: Sequence[Measurement]) -> Scores:
    """cIoU and gIoU of "images", J and F of "videos", accuracy where there is "nothing to point at"."""
    ways = {"images": summarize_referring, "videos": summarize_videos, "nothing to point at": scenes.summarize_hits}
    groups = {name: [item.value[1] for item in measurements if item.value[0] == name] for name in ways}
    return {name: ways[name](values) for name, values in groups.items() if values}


class SceneTurn(NamedTuple):
    """A turn as `evaluation/scenes.py` measures it; see `data.scenes.Turn`."""

    masks: np.ndarray
    answer: str
    targets: Sequence[Any]
    expected: str | None
    kind: str


def measure_scene(asked: Asked) -> tuple[float, tuple[str, str, Any]]:
    """The criterion of `evaluation/scenes.py`, the label of its details and its measurement.

    Raises:
        ValueError: the sample is no scene.
    """
    info = asked.sample.info
    try:
        task, expected, kind = info["task"], info["expected"][asked.index], info["kind"][asked.index]
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(
            f'Sample {asked.sample.id!r} is no scene of data/export_scenes.py: the "info" of those has task, expected '
            "and kind. Leave --metric out."
        ) from error
    turn = SceneTurn(asked.targets(), asked.turn.answer or "", asked.turn.objects, expected, kind)
    criterion = scenes.criterion_of(task, turn)
    value = scenes.CRITERIA[criterion].measure(turn, asked.output)
    return _scene_quality(value), (criterion, f"{task}/{kind}", value)


def _scene_quality(value: Any) -> float:
    if isinstance(value, scenes.Overlap):
        return float(iou(value.intersection, value.union))
    if isinstance(value, scenes.Tracks):
        return value.quality.j_and_f
    return captions.iou_of_all(value) if isinstance(value, Overlaps) else float(value)


def summarize_scenes(measurements: Sequence[Measurement]) -> Scores:
    """The scores of each criterion, then of each task and kind of question ("image_segmentation: refer/largest")."""
    groups: dict[tuple[str, str], list] = defaultdict(list)
    for item in measurements:
        criterion, label, value = item.value
        for part in ("", label.partition("/")[0], label):
            groups[criterion, part].append(value)
    order = list(scenes.CRITERIA)
    ranked = sorted(groups.items(), key=lambda group: (group[0][1] != "", order.index(group[0][0])))
    return {
        f"{criterion}: {label}" if label else criterion: scenes.CRITERIA[criterion].summarize(values)
        for (criterion, label), values in ranked
    }


# ---------- by name

PROTOCOLS: Mapping[str, Protocol] = {
    "referring": Protocol(measure_overlap, by_kind(summarize_referring)),
    "generalized": Protocol(measure_overlap, by_kind(summarize_generalized)),
    "video": Protocol(measure_video, by_kind(summarize_videos)),
    "revos": Protocol(measure_video, halves("referring", "reasoning")),
    "ref_sav": Protocol(measure_video, halves("long", "short")),
    "ref_davis17": Protocol(measure_davis, summarize_davis),
    "gcg": Protocol(measure_grounding, summarize_grounding),
    "words": Protocol(measure_words, by_kind(summarize_words)),
    "mixed": Protocol(measure_mixed, summarize_mixed, dialogue=True),
    "scenes": Protocol(measure_scene, summarize_scenes, dialogue=True),
}
PROTOCOL_OF: Mapping[str, str] = {
    **dict.fromkeys(("refcoco", "refcoco+", "refcocog", "reasonseg", "finetune"), "referring"),
    **dict.fromkeys(("mevis", "ref_youtube_vos"), "video"),
    **{name: name for name in ("revos", "ref_sav", "ref_davis17", "gcg")},
    "grefcoco": "generalized",
    "region_captions": "words",
    "jsonl": "mixed",
}
# What Sa2VA's evaluation writes between a picture and the question; nothing where data are not a published benchmark.
BEFORE_QUESTIONS: Mapping[str, str] = {
    **dict.fromkeys(("refcoco", "refcoco+", "refcocog", "grefcoco", "reasonseg"), "\n "),
    **dict.fromkeys(("mevis", "ref_youtube_vos", "revos", "ref_davis17", "ref_sav", "gcg"), "\n"),
}
_MADE_FOR = {"ref_davis17": "ref_davis17", "gcg": "gcg", "scenes": "jsonl"}  # metric: the data that have what it needs


def protocol_of(data: str, metric: str | None = None) -> Protocol:
    """The protocol of a data set, or the one named.

    Raises:
        ValueError: an unknown name, a data set that has no protocol, or lacks what the protocol looks at.
    """
    name = metric or PROTOCOL_OF.get(data)
    if name is None:
        raise ValueError(f"There is no metric for {data!r}; there is one for {', '.join(PROTOCOL_OF)}.")
    if name not in PROTOCOLS:
        raise ValueError(f"There is no metric {name!r}; choose one of {', '.join(PROTOCOLS)}.")
    if data != (needed := _MADE_FOR.get(name, data)):
        raise ValueError(f"The metric {name!r} looks at what only {needed!r} has, not {data!r}. Leave --metric out.")
    return PROTOCOLS[name]
