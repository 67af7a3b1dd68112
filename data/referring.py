"""What all data sets of referring expressions share: how expressions become conversations.

For training, several expressions of a picture or clip are the turns of one sample, as in Sa2VA; for evaluation every
expression is a sample of its own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

import numpy as np

from . import templates
from .samples import Media, ObjectMasks, Sample, Turn

T = TypeVar("T")


class Expression(NamedTuple):
    """Words and what they refer to.

    `objects` is None where nothing fits, and `labelled` False where a benchmark keeps the masks to itself. A sentence
    is a question of its own and needs no template around it. `name` is what an answer calls the object, if not `text`.
    """

    id: str
    text: str
    objects: ObjectMasks | None
    labelled: bool = True
    is_sentence: bool = False
    info: Mapping[str, Any] = {}
    name: str = ""


@dataclass(frozen=True)
class Style:
    """How expressions become a conversation.

    Attributes:
        one_per_expression: one expression a sample, in the plain words of evaluation.
        is_video: whether they speak of clips.
        max_expressions: turns of a training sample at most; more expressions are drawn from by chance.
        questions: templates with {} and {medium} around a phrase; evaluation takes the first.
        sentences: the same around a sentence.
        answers: what is said of an object that is there, with one [SEG]; {} stands for its name, or the words.
        seed: names what chance does.
    """

    one_per_expression: bool
    is_video: bool = False
    max_expressions: int = 5
    questions: Sequence[str] = templates.SEGMENT_QUESTIONS
    sentences: Sequence[str] = ("{}",)
    answers: Sequence[str] = templates.ANSWERS
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_expressions < 1:
            raise ValueError(f"max_expressions must be >= 1, got {self.max_expressions}.")

    def choose(self, rng: np.random.Generator, items: Sequence[T]) -> list[T]:
        """The items that become turns, by chance where there are too many."""
        if len(items) <= self.max_expressions:
            return list(items)
        return [items[i] for i in rng.permutation(len(items))[: self.max_expressions]]

    def sample(
        self,
        rng: np.random.Generator,
        id: str,
        media: Media,
        expressions: Sequence[Expression],
        info: Mapping[str, Any],
    ) -> Sample:
        """The sample with a turn for each expression; `info` is what holds for all of them."""
        turns = tuple(self._turn(expression, rng) for expression in expressions)
        if self.one_per_expression:
            first = expressions[0]
            info = {**info, **first.info, "expression": first.text, "expression_id": first.id}
        else:
            info = {**info, "expressions": [expression.text for expression in expressions]}
        return Sample(id, media, turns, info=info)

    def _turn(self, expression: Expression, rng: np.random.Generator) -> Turn:
        words = expression.text.strip()
        if not words:
            raise ValueError("an expression is empty.")
        options = self.sentences if expression.is_sentence else self.questions
        if self.one_per_expression:
            question, answer, refusal = options[0], self.answers[0], templates.REFUSALS[0]
        else:
            question, answer, refusal = (templates.pick(rng, o) for o in (options, self.answers, templates.REFUSALS))
            words = words if expression.is_sentence else words.lower().removesuffix(".")
        medium = templates.medium(self.is_video)
        question = question.replace("{medium}", medium).replace("{}", words)
        if not expression.labelled:
            return Turn(question, None)
        if expression.objects is None:
            return Turn(question, refusal.replace("{medium}", medium))
        return Turn(question, answer.replace("{}", expression.name or words), (expression.objects,))


def make_style(
    split: str,
    *,
    one_per_expression: bool | None = None,
    template: str | None = None,
    answer: str | None = None,
    **options: Any,
) -> Style:
    """The style of a split.

    Args:
        split: those that begin with "train" are grouped for training, all others are for evaluation.
        one_per_expression: True or False says so outright.
        template: a question with {} in it that replaces the usual ones.
        answer: an answer with one [SEG] that replaces the usual ones; {} in it stands for the object's name or
            the expression.
        **options: `max_expressions`, `seed` and what else `Style` takes.

    Raises:
        TypeError: an unknown option.
        ValueError: a template without {}, an answer without one [SEG], or what `Style` refuses.
    """
    if template is not None and "{}" not in template:
        raise ValueError(f"A template needs {{}} where the expression goes, got {template!r}.")
    if answer is not None and answer.count(templates.SEG) != 1:
        raise ValueError(f"An answer needs one {templates.SEG}, got {answer!r}.")
    single = not split.startswith("train") if one_per_expression is None else one_per_expression
    style = Style(single, **options)
    style = replace(style, questions=(template,)) if template else style
    return replace(style, answers=(answer,)) if answer else style
