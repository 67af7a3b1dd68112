"""How good grounded captions are: their masks (`grounding_scores`) and their words (`text_scores`).

Of the masks there are two accounts, named by `mode`:

* "strict"   AP50 ranks masks by SAM 2's own estimate of their IoU. mIoU pairs masks one to one so that the sum is
             largest, and each mask without a partner, predicted or true, counts 0. Recall counts the most pairs that
             are possible with IoU >= 0.5 and the same phrase (`normalize_phrase`).
* "glamm"    What the evaluation of GLaMM (arXiv 2311.03356, eval/gcg/evaluate.py) computes. All masks are equally sure,
             so AP50 depends on the order of images and masks. mIoU takes the best pair, then the best of the rest...,
             and is the mean over pairs that overlap: what was missed and what is surplus costs nothing; no pair is 0.
             Recall takes pairs in the same order until the first one with IoU < 0.5 or phrases less similar than 0.5
             (cosine of BERT's mean last states) and stops there, even if pairs after it would do.
"""

import itertools
import math
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
from scipy.optimize import linear_sum_assignment
from transformers.utils import logging

from sa2va.evaluation.metrics import Overlaps, mean, overlap_precision

logger = logging.get_logger(f"transformers.{__name__}")

MODES = ("strict", "glamm")
IOU_THRESHOLD = 0.5
SIMILARITY_THRESHOLD = 0.5
TEXT_ENCODER = "google-bert/bert-base-uncased"

Similarity = Callable[[str, str], float]

# ---------- masks


def grounding_scores(
    images: Sequence[Overlaps], mode: str = "strict", similarity: Similarity | None = None
) -> dict[str, float | None]:
    """AP50, mIoU and recall of the masks of grounded captions.

    Args:
        images: every image's masks, compared, with phrases.
        mode: see the top of this file.
        similarity: of two phrases, for the recall of mode "glamm" (`bert_similarity`).

    Returns:
        "ap50", "miou", "recall" in 0..1; recall is None in mode "glamm" without `similarity`. In mode "strict" also
        "ap50_phrase", where a mask may only take a target of the same phrase. nan without images or targets.

    Raises:
        ValueError: an unknown mode, or missing phrases.
    """
    if mode == "strict":
        return {
            "ap50": overlap_precision(images),
            "ap50_phrase": overlap_precision(images, match_phrases=True),
            "miou": mean([iou_of_all(image) for image in images]),
            "recall": _recall(images, _count_possible),
        }
    if mode == "glamm":
        return {
            "ap50": overlap_precision([replace(image, scores=np.ones(len(image.ious))) for image in images]),
            "miou": mean([_iou_of_pairs(image) for image in images]),
            "recall": similarity and _recall(images, lambda image: _count_until_bad(image, similarity)),
        }
    raise ValueError(f"Unknown mode {mode!r}; choose one of {', '.join(MODES)}.")


def _recall(images: Sequence[Overlaps], count: Callable[[Overlaps], int]) -> float:
    wanted = sum(image.ious.shape[1] for image in images)
    return sum(map(count, images)) / wanted if wanted else math.nan


def iou_of_all(image: Overlaps) -> float:
    """Mean IoU of the best one-to-one pairing, masks without a partner counting 0; 1 if there are none at all."""
    most = max(image.ious.shape)
    return float(image.ious[linear_sum_assignment(image.ious, maximize=True)].sum() / most) if most else 1.0


def _count_possible(image: Overlaps) -> int:
    """The most pairs with enough overlap and the same phrase."""
    good = (image.ious >= IOU_THRESHOLD) & image.same_phrases()
    return int(good[linear_sum_assignment(good, maximize=True)].sum())


def _greedy_pairs(ious: np.ndarray) -> Iterator[tuple[int, int]]:
    """Rows and columns of pairs that overlap: the best, then the best of what it leaves, ..."""
    left = ious.copy()
    while left.size and left.max() > 0:
        row, column = map(int, np.unravel_index(left.argmax(), left.shape))
        yield row, column
        left[row], left[:, column] = 0, 0


def _iou_of_pairs(image: Overlaps) -> float:
    found = [image.ious[pair] for pair in _greedy_pairs(image.ious)]
    return float(np.mean(found)) if found else 0.0


def _count_until_bad(image: Overlaps, similarity: Similarity) -> int:
    """How many pairs come before the first that overlaps too little or whose phrases differ too much."""

    def good(target: int, found: int) -> bool:
        similar = similarity(image.target_phrases[target], image.phrases[found]) >= SIMILARITY_THRESHOLD
        return similar and image.ious[found, target] >= IOU_THRESHOLD

    pairs = _greedy_pairs(image.ious.T)  # targets first, as GLaMM has it: of equal overlaps the first target's counts
    return sum(1 for _ in itertools.takewhile(lambda pair: good(*pair), pairs))


def bert_similarity(name: str = TEXT_ENCODER) -> Similarity:
    """Cosine of the mean last hidden states of two texts, as GLaMM compares phrases.

    Args:
        name: folder or Hugging Face name of a text encoder.

    Returns:
        A function of two texts, -1..1; it remembers the texts it has seen.

    Raises:
        OSError: no such encoder, or the Hub can't be reached.
    """
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(name), AutoModel.from_pretrained(name).eval()
    known: dict[str, np.ndarray] = {}

    def embed(text: str) -> np.ndarray:
        if text not in known:
            with torch.no_grad():
                states = model(**tokenizer(text, return_tensors="pt", truncation=True)).last_hidden_state[0]
            known[text] = torch.nn.functional.normalize(states.mean(0), dim=0).numpy()
        return known[text]

    return lambda one, other: float(embed(one) @ embed(other))


# ---------- words


def plain_caption(answer: str) -> str:
    """The words of an answer, without tags, special tokens and `[SEG]`, single-spaced."""
    return " ".join(re.sub(r"<[^<>]*>|\[SEG\]", "", answer).split())


def has_java() -> bool:
    """Whether METEOR and the tokenizer of COCO's captions can run here."""
    return shutil.which("java") is not None


def text_scores(captions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float | None]:
    """METEOR and CIDEr by pycocoevalcap, on words as Stanford's tokenizer cuts them.

    Both that tokenizer and METEOR are Java programs. Where there is no Java, a warning says so, "meteor" and "cider"
    are None, and "cider_plain" is CIDEr on lower-case words cut at spaces and punctuation: close, but not to be
    compared with published numbers.

    Args:
        captions: one for each image.
        references: one or more for each image.

    Returns:
        "meteor" in 0..1; "cider" in 0..10, a corpus measure that needs several images: of one it is 0.

    Raises:
        ValueError: numbers differ, or an image has no reference.
    """
    if len(captions) != len(references) or not all(references):
        raise ValueError(f"{len(captions)} captions, {len(references)} lists of references: give one or more for each.")
    from pycocoevalcap.cider.cider import Cider

    if not has_java():
        logger.warning_once("METEOR and CIDEr need Java, and there is none here: install a Java runtime.")
        found = {index: [_plain_words(caption)] for index, caption in enumerate(captions)}
        wanted = {index: [_plain_words(text) for text in texts] for index, texts in enumerate(references)}
        return {"meteor": None, "cider": None, "cider_plain": float(Cider().compute_score(wanted, found)[0])}
    found, wanted = _tokenize([[caption] for caption in captions]), _tokenize(references)
    return {"meteor": _meteor(wanted, found), "cider": float(Cider().compute_score(wanted, found)[0])}


def _plain_words(text: str) -> str:
    return " ".join(re.findall(r"[^\W_]+(?:['-][^\W_]+)*", text.lower()))


def _tokenize(texts: Sequence[Sequence[str]]) -> dict[int, list[str]]:
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    return PTBTokenizer().tokenize({index: [{"caption": text} for text in group] for index, group in enumerate(texts)})


def _meteor(references: dict[int, list[str]], captions: dict[int, list[str]]) -> float:
    from pycocoevalcap.meteor.meteor import Meteor

    return float(Meteor().compute_score(references, captions)[0])
