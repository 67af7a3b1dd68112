"""The measures by which segmentation from words is judged, on numpy masks.

* cIoU, gIoU    referring segmentation on images (`cumulative_iou`, `mean_iou`)
* N-acc, T-acc  and Pr@k beside them, where an expression may mean nothing (`generalized_scores`)
* J, F, J&F     objects in videos (`video_quality`), as DAVIS defines them (Perazzi et al., CVPR 2016); of a label map
                whose objects must first be matched (`matched_quality`)
* R             robustness, what is wrongly found against what there is to find (`robustness`)
* AP50          grounded captions (`average_precision`), as COCO computes it; with or without matching phrases. More of
                them in `captions`.

Scores lie in 0..1. Masks are bool; where both masks are empty, nothing is wrong and the score is 1.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

BOUNDARY_TOLERANCE = 0.008  # of the picture's diagonal, as in DAVIS
PRECISION_LEVELS = (0.5, 0.6, 0.7, 0.8, 0.9)  # least IoU of a hit, in Pr@k
RECALL_LEVELS = np.linspace(0, 1, 101)  # where COCO reads the precision

# ---------- images


def intersection_union(predicted: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pixels that both masks have, and pixels that either has.

    Args:
        predicted, target: bool [..., H, W], of one shape.

    Returns:
        Two int64 arrays [...].

    Raises:
        TypeError: masks that are not boolean.
        ValueError: masks of different shapes.
    """
    _check(predicted, target)
    return np.sum(predicted & target, axis=(-2, -1)), np.sum(predicted | target, axis=(-2, -1))


def iou(intersections: np.ndarray, unions: np.ndarray) -> np.ndarray:
    """Intersection over union, float64 of the arguments' shape; 1 where the union is empty."""
    intersections, unions = np.asarray(intersections), np.asarray(unions)
    return np.where(unions > 0, intersections / np.maximum(unions, 1), 1.0)


def cumulative_iou(intersections: Sequence[int], unions: Sequence[int]) -> float:
    """cIoU: all intersections over all unions, so that large objects weigh more (in RefCOCO papers also oIoU).

    Args:
        intersections, unions: [samples], from `intersection_union`.

    Returns:
        0..1; nan without samples.
    """
    return float(iou(np.sum(intersections), np.sum(unions))) if len(unions) else math.nan


def mean_iou(intersections: Sequence[int], unions: Sequence[int]) -> float:
    """gIoU: the mean of the samples' IoU, where a sample with nothing to find and nothing found counts 1.

    Arguments and result as in `cumulative_iou`.
    """
    return float(iou(intersections, unions).mean()) if len(unions) else math.nan


def generalized_scores(
    intersections: Sequence[int], unions: Sequence[int], found: Sequence[bool], wanted: Sequence[bool]
) -> dict[str, float]:
    """What gRefCOCO is judged by, as GRES (Liu et al., CVPR 2023) defines it.

    A sample without target has IoU 1 if nothing was found, else 0; that is the empty-union rule of `mean_iou`. Pr@k is
    over samples with a target. T-acc is TN / (TN + FP) of the paper, "no target" being positive; the code released with
    it computes TP / (TP + FP + 1) under that name.

    Args:
        intersections, unions: [samples], of the predicted and the true mask of all targets together.
        found, wanted: [samples], whether the prediction and the truth have any pixel.

    Returns:
        "giou", "ciou", "n_acc", "t_acc", "pr@0.5" ... "pr@0.9", each 0..1, or nan where no sample counts.
    """
    found, wanted = np.asarray(found, dtype=bool), np.asarray(wanted, dtype=bool)
    ious = iou(intersections, unions)[wanted]
    return {
        "giou": mean_iou(intersections, unions),
        "ciou": cumulative_iou(intersections, unions),
        "n_acc": mean(~found[~wanted]),
        "t_acc": mean(found[wanted]),
        **{f"pr@{level}": mean(ious >= level) for level in PRECISION_LEVELS},
    }


def mean(values: Sequence[float]) -> float:
    """The mean as a float; nan of nothing."""
    return float(np.mean(values)) if len(values) else math.nan


# ---------- videos


class VideoQuality(NamedTuple):
    """Scores in 0..1 of one object's masks in a video: region similarity J and boundary accuracy F."""

    j: float
    f: float

    @property
    def j_and_f(self) -> float:
        """J&F, their mean."""
        return (self.j + self.f) / 2


def video_quality(predicted: np.ndarray, target: np.ndarray) -> VideoQuality:
    """J and F of one expression in one video, averaged over all frames.

    All frames count, as for MeViS and Ref-DAVIS (the semi-supervised DAVIS task leaves out the first and the last).

    Args:
        predicted, target: bool [T, H, W], T >= 1.

    Raises:
        TypeError: masks that are not boolean.
        ValueError: masks of different shapes, or not of shape [T, H, W] with T >= 1.
    """
    _check(predicted, target)
    if target.ndim != 3 or not len(target):
        raise ValueError(f"Masks of a video are [T, H, W] with T >= 1, these are {target.shape}.")
    frames = zip(predicted, target, strict=True)
    return VideoQuality(region_similarity(predicted, target), float(np.mean([boundary_accuracy(*f) for f in frames])))


def region_similarity(predicted: np.ndarray, target: np.ndarray) -> float:
    """J: the mean IoU of the frames of bool [T, H, W]; a frame where both are empty counts 1."""
    return float(iou(*intersection_union(predicted, target)).mean())


def boundary_accuracy(predicted: np.ndarray, target: np.ndarray, tolerance: float = BOUNDARY_TOLERANCE) -> float:
    """F: harmonic mean of precision and recall of one frame's boundary pixels.

    A boundary pixel is right if the other mask has one within `tolerance` of the diagonal, rounded up to whole pixels.
    As in DAVIS, the picture's edge is no boundary: a mask of the whole frame has none, like an empty one.

    Args:
        predicted, target: bool [H, W].
        tolerance: in 0..1, share of the diagonal.

    Returns:
        0..1; 1 if neither mask has a boundary, 0 if only one has.

    Raises:
        TypeError: masks that are not boolean.
        ValueError: masks of different shapes.
    """
    _check(predicted, target)
    radius = math.ceil(tolerance * math.hypot(*target.shape))
    found, wanted = boundary_map(predicted), boundary_map(target)
    if not found.any() or not wanted.any():
        return float(found.any() == wanted.any())
    precision = (found & _dilate(wanted, radius)).sum() / found.sum()
    recall = (wanted & _dilate(found, radius)).sum() / wanted.sum()
    return float(2 * precision * recall / (precision + recall)) if precision + recall else 0.0


def robustness(predicted: np.ndarray, target: np.ndarray, foreground: np.ndarray) -> float:
    """R of ReVOS (VISA, arXiv 2407.11325): 1 less the wrongly found pixels over those of all objects, at least 0.

    Args:
        predicted, target, foreground: bool [T, H, W], the last one of all annotated objects of the video.

    Returns:
        0..1, the mean over the frames; a frame without objects counts 1 if nothing was wrongly found, else 0.

    Raises:
        TypeError, ValueError: as in `intersection_union`.
    """
    _check(predicted, target)
    _check(foreground, target)
    wrong = np.sum(predicted & ~target, axis=(-2, -1))
    return float(np.maximum(1 - wrong / (np.sum(foreground, axis=(-2, -1)) + 1e-6), 0).mean())


def matched_quality(predicted: np.ndarray, target: np.ndarray) -> list[VideoQuality]:
    """J and F of each true object with the predicted one that the best one-to-one matching gives it.

    It is DAVIS' unsupervised evaluation (arXiv 1905.00737), by which Ref-DAVIS17 is judged too: what counts is which
    objects were found, not which expression found them.

    Args:
        predicted: bool [N, T, H, W], disjoint (`disjoint`).
        target: bool [M, T, H, W].

    Returns:
        M items; objects without a partner are matched with an empty mask.

    Raises:
        TypeError, ValueError: as in `video_quality`.
    """
    from scipy.optimize import linear_sum_assignment

    missing = max(0, len(target) - len(predicted))
    predicted = np.concatenate([predicted, np.zeros((missing, *target.shape[1:]), dtype=predicted.dtype)])
    table = [[video_quality(found, wanted) for found in predicted] for wanted in target]
    rows, columns = linear_sum_assignment([[quality.j_and_f for quality in row] for row in table], maximize=True)
    return [table[row][column] for row, column in zip(rows, columns, strict=True)]


def disjoint(masks: np.ndarray) -> np.ndarray:
    """Bool [N, ...] without the pixels that an earlier mask has: what is left of masks painted into one label map."""
    earlier = np.logical_or.accumulate(masks, axis=0)
    return np.concatenate([masks[:1], masks[1:] & ~earlier[:-1]])


def boundary_map(mask: np.ndarray) -> np.ndarray:
    """The boundary, one pixel wide: bool [H, W], True where the right, lower or lower right neighbour differs.

    It is the boundary of Martin's `seg2bmap`, which DAVIS uses.
    """
    padded = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    return (mask ^ padded[:-1, 1:]) | (mask ^ padded[1:, :-1]) | (mask ^ padded[1:, 1:])


def _dilate(mask: np.ndarray, radius: int) -> np.ndarray:
    """Adds all pixels of bool [H, W] no further than `radius` from one of the mask."""
    import cv2

    offsets = np.arange(-radius, radius + 1) ** 2
    disk = (offsets[:, None] + offsets[None] <= radius**2).astype(np.uint8)
    return cv2.dilate(mask.astype(np.uint8), disk).astype(bool)


# ---------- grounded captions


@dataclass(frozen=True, eq=False)
class PhraseMasks:
    """What a grounded caption points at in one image.

    Attributes:
        masks: bool [N, H, W].
        phrases: N strings, the words of each mask; needed only to match phrases.
        scores: float [N], the larger the surer; needed only of predictions. None: all alike.
    """

    masks: np.ndarray
    phrases: Sequence[str] = ()
    scores: np.ndarray | None = field(default=None)


@dataclass(frozen=True, eq=False)
class Overlaps:
    """What the scores of a grounded caption are computed from, once its masks have been compared.

    Attributes:
        ious: float [N, M] of N predicted with M true masks.
        scores: float [N], as in `PhraseMasks`.
        phrases, target_phrases: N and M strings; or none.
    """

    ious: np.ndarray
    scores: np.ndarray
    phrases: Sequence[str] = ()
    target_phrases: Sequence[str] = ()

    @classmethod
    def of(cls, predicted: PhraseMasks, target: PhraseMasks) -> "Overlaps":
        """Compares the masks of an image.

        Raises:
            ValueError: masks of several sizes, or scores that do not fit them.
            TypeError: masks that are not boolean.
        """
        return cls(_ious(predicted.masks, target.masks), _scores(predicted), predicted.phrases, target.phrases)

    def same_phrases(self) -> np.ndarray:
        """Bool [N, M]: which predictions say what which targets say.

        Raises:
            ValueError: not as many phrases as masks.
        """
        texts = (self.phrases, self.target_phrases)
        for phrases, count in zip(texts, self.ious.shape, strict=True):
            if len(phrases) != count:
                raise ValueError(f"{len(phrases)} phrases for {count} masks: give one for each.")
        found, wanted = ([normalize_phrase(phrase) for phrase in phrases] for phrases in texts)
        same = [[phrase == other for other in wanted] for phrase in found]
        return np.array(same, dtype=bool).reshape(self.ious.shape)


def average_precision(
    predictions: Sequence[PhraseMasks],
    targets: Sequence[PhraseMasks],
    iou_threshold: float = 0.5,
    match_phrases: bool = False,
) -> float:
    """`overlap_precision` of masks that are still to be compared.

    Args:
        predictions, targets: one each for every image, in the same order.
        iou_threshold, match_phrases: see there.

    Returns:
        0..1; nan if there are no targets at all.

    Raises:
        ValueError: numbers of images differ, or masks, phrases and scores of an image do not fit together.
        TypeError: masks that are not boolean.
    """
    if len(predictions) != len(targets):
        raise ValueError(f"{len(predictions)} predictions for {len(targets)} images: give one for each, in order.")
    images = [Overlaps.of(*pair) for pair in zip(predictions, targets, strict=True)]
    return overlap_precision(images, iou_threshold, match_phrases)


def overlap_precision(images: Sequence[Overlaps], iou_threshold: float = 0.5, match_phrases: bool = False) -> float:
    """AP of masks at one IoU threshold (0.5: AP50), all phrases being one class, as GLaMM (arXiv 2311.03356) does.

    Computed as COCO does: in each image predictions take, from the surest on, the free target that they overlap most;
    over all images the precision is then read at 101 levels of recall, at each the best at that recall or above.

    Args:
        images: every image's masks, compared; of equally sure masks the first image's come first.
        iou_threshold: in 0..1; an overlap of at least this is a hit.
        match_phrases: a prediction can only take a target whose phrase is the same (`normalize_phrase`).

    Returns:
        0..1; nan if there are no targets at all.

    Raises:
        ValueError: phrases to be matched are missing.
    """
    hits, scores = [np.zeros(0, dtype=bool)], [np.zeros(0)]
    for image in images:
        ious = image.ious * image.same_phrases() if match_phrases else image.ious
        hits.append(match_greedily(ious, image.scores, iou_threshold))
        scores.append(image.scores)
    num_targets = sum(image.ious.shape[1] for image in images)
    return interpolated_precision(np.concatenate(hits), np.concatenate(scores), num_targets)


def match_greedily(overlaps: np.ndarray, scores: np.ndarray, threshold: float) -> np.ndarray:
    """Which predictions get a target of their own.

    Args:
        overlaps: float [N, M] of N predictions with M targets.
        scores: float [N]; the surest chooses first, of equals the first one.
        threshold: the least overlap of a match; overlaps of 0 never match.

    Returns:
        bool [N].
    """
    hits = np.zeros(len(scores), dtype=bool)
    free = np.ones(overlaps.shape[1], dtype=bool)
    for index in np.argsort(-scores, kind="stable"):
        options = np.where(free & (overlaps[index] > 0), overlaps[index], -1.0)
        if len(options) and options.max() >= threshold:
            free[options.argmax()] = False
            hits[index] = True
    return hits


def interpolated_precision(hits: np.ndarray, scores: np.ndarray, num_targets: int) -> float:
    """COCO's 101-point average precision.

    Args:
        hits: bool [N], over all images.
        scores: float [N].
        num_targets: how many hits were possible.

    Returns:
        0..1; nan if `num_targets` is 0.
    """
    if not num_targets:
        return math.nan
    found = np.cumsum(hits[np.argsort(-scores, kind="stable")])
    precision = found / np.arange(1, len(found) + 1)
    best_from_here = np.maximum.accumulate(precision[::-1])[::-1]
    places = np.searchsorted(found / num_targets, RECALL_LEVELS)
    return float(np.append(best_from_here, 0.0)[places].mean())


def normalize_phrase(phrase: str) -> str:
    """A phrase without its article, case and surplus spaces: "A  red Star" -> "red star"."""
    return re.sub(r"^(?:an?|the) ", "", " ".join(phrase.lower().split()))


def _ious(predicted: np.ndarray, target: np.ndarray) -> np.ndarray:
    """IoU [N, M] of bool [N, H, W] with bool [M, H, W]; empty masks overlap nothing, not even each other."""
    if predicted.ndim != 3 or predicted.shape[1:] != target.shape[1:]:
        raise ValueError(f"Masks of an image are [N, H, W] of one size, given were {predicted.shape}, {target.shape}.")
    pairs = [intersection_union(np.broadcast_to(mask, target.shape), target) for mask in predicted]
    rows = [intersections / np.maximum(unions, 1) for intersections, unions in pairs]
    return np.array(rows, dtype=float).reshape(len(predicted), len(target))


def _scores(item: PhraseMasks) -> np.ndarray:
    scores = np.ones(len(item.masks)) if item.scores is None else np.asarray(item.scores, dtype=float)
    if scores.shape != (len(item.masks),):
        raise ValueError(f"scores of shape {scores.shape} for {len(item.masks)} masks: give one number for each.")
    return scores


def _check(predicted: np.ndarray, target: np.ndarray) -> None:
    if predicted.dtype != bool or target.dtype != bool:
        raise TypeError(f"Masks must be bool, given were {predicted.dtype} and {target.dtype}: threshold them first.")
    if predicted.shape != target.shape:
        raise ValueError(f"Masks differ in shape: {predicted.shape} predicted, {target.shape} wanted. Resize one.")
