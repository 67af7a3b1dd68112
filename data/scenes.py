"""A synthetic world for learning to point with words: coloured shapes on dull backgrounds, still or moving.

* `make_sample` draws one picture or clip and writes the conversation about it, exact masks included.
* `corpus` lists the sentences of this world, for training a tokenizer.

A sample is made in four steps: a plan (what kind of question), objects placed without hiding each other, a draft of
the words (None when the scene does not allow an unambiguous one: then a new scene is tried for the same plan, so that
kinds of questions stay evenly spread), and the drawing. Lengths are in units of the picture's short side, measured
from its top left corner. Every reference is unambiguous by construction; answers name the object before its `[SEG]`.
The grounded-caption question and its `<p> </p> [SEG]` answer follow Sa2VA (arXiv:2501.04001).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise, product
from typing import NamedTuple

import numpy as np

from .shapes import COLORS, MOTIONS, SHAPES, SceneObject, choose, draw_clip, place_objects, shown_well, shuffled

RELATIONS: dict[str, tuple[int, int]] = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
EXTREMES: dict[str, tuple[int, int]] = {
    "leftmost": (-1, 0),
    "rightmost": (1, 0),
    "topmost": (0, -1),
    "bottommost": (0, 1),
}

IMAGE_TASKS = ("refer", "absent", "multi", "caption", "question", "region", "followup")
VIDEO_TASKS = ("video_refer", "video_motion", "video_multi", "video_absent", "video_question")
INTERVIEWS = ("interview", "video_interview")  # many questions about one scene: for learning, not for scores
SPLITS = ("train", "validation", "test")
KINDS: dict[str, tuple[str, ...]] = {
    "refer": ("color_shape", "shape", "color", "largest", "smallest", "relation", "position"),
    "absent": ("near_miss", "color_shape", "shape", "color", "largest"),
    "multi": ("pair", "all"),
    "caption": ("caption",),
    "question": ("count", "color", "shape", "exists"),
    "region": ("one", "two"),
    "followup": ("it_color", "it_shape", "it_segment", "next", "them"),
    "video_refer": ("color_shape", "shape", "color", "largest", "smallest"),
    "video_motion": tuple(MOTIONS),
    "video_multi": ("pair", "all"),
    "video_absent": ("near_miss", "color_shape", "shape", "color", "motion"),
    "video_question": ("count", "color", "shape", "exists", "direction"),
    "interview": ("interview",),
    "video_interview": ("interview",),
}
CAPTION_QUESTION = (
    "Could you please give me a brief description of the image? "
    "Please respond with interleaved segmentation masks for the corresponding parts of the answer."
)
IMAGE_REQUESTS = ("Please segment {} in this image.", "Can you segment {}?", "Segment {}.", "Where is {}?")
VIDEO_REQUESTS = (
    "Please segment {} in this video.",
    "Can you segment {} in this video?",
    "Segment {} in this video.",
    "Where is {} in this video?",
)

SIDE_RANGE = (96, 160)  # pixels
SIZE_MARGIN = 1.25  # a superlative's radius against the runner-up
POSITION_MARGIN = 0.15  # distance along the axis that makes "left of" or "leftmost" plain
ORDER_GAP = 0.06  # horizontal gap between objects that are listed from left to right
REGION_MIN_RADIUS = 0.14  # a visual prompt must cover a cell of a coarse feature grid
INTERVIEW_TURNS = 5
MAX_ATTEMPTS = 2000
CORPUS_CONVERSATIONS = 8000

# ---------- what a sample is


@dataclass(frozen=True, eq=False)
class Turn:
    """One question and its answer.

    `question` has no `<image>` tag, `answer` no end-of-turn mark. `masks` is bool [S, T, H, W], one per `[SEG]` of the
    answer in order; `targets` are the S object indices. `expected` is the short truth for scoring ("3", "red", "yes",
    "red star", "up"), None for pure segmentation. `kind` is the sub-kind, see `KINDS`.
    """

    question: str
    answer: str
    masks: np.ndarray
    targets: tuple[int, ...]
    expected: str | None
    kind: str


@dataclass(frozen=True, eq=False)
class SceneSample:
    """A picture (T = 1) or clip with its conversation.

    `frames` is uint8 RGB [T, H, W, 3]; `object_masks` bool [N, T, H, W] holds the visible pixels of each of the N
    `objects` (disjoint; all False in frames where one is away or hidden); `regions` is bool [R, H, W], the visual
    prompts of a region task, else None.
    """

    task: str
    frames: np.ndarray
    turns: tuple[Turn, ...]
    objects: tuple[SceneObject, ...]
    object_masks: np.ndarray
    regions: np.ndarray | None = None


@dataclass(frozen=True)
class Noun:
    """A class of objects: "shape", "star", "red shape" or "red star"."""

    color: str | None = None
    shape: str | None = None

    def __str__(self) -> str:
        return " ".join(word for word in (self.color, self.shape or "shape") if word)

    @property
    def plural(self) -> str:
        """The noun for several: "red crosses"."""
        return f"{self}es" if self.shape == "cross" else f"{self}s"

    def matches(self, thing: SceneObject) -> bool:
        """Whether `thing` is of this class."""
        return self.color in (None, thing.color) and self.shape in (None, thing.shape)

    def among(self, objects: Sequence[SceneObject]) -> list[int]:
        """Indices of the objects of this class."""
        return [index for index, thing in enumerate(objects) if self.matches(thing)]


class Plan(NamedTuple):
    """What is decided before the scene, and kept while scenes are tried, so that no kind or answer is favoured."""

    task: str
    kind: str
    count: int  # objects in the scene
    noun: Noun | None  # exactly `crowd` objects are of this class
    crowd: int
    positive: bool  # the answer to a yes/no question

    @property
    def video(self) -> bool:
        """Whether the sample is a clip."""
        return self.task.startswith("video")


class Draft(NamedTuple):
    """A `Turn` before its masks are drawn."""

    question: str
    answer: str
    kind: str
    targets: tuple[int, ...] = ()
    expected: str | None = None
    regions: tuple[int, ...] = ()  # objects shown as visual prompts


def any_noun(rng: np.random.Generator) -> Noun:
    """A shape or a colour."""
    return Noun(shape=choose(rng, SHAPES)) if rng.random() < 0.5 else Noun(color=choose(rng, tuple(COLORS)))


def with_repeats(rng: np.random.Generator, plan: Plan) -> Plan:
    """A plan that is open about the objects, now often with several of one shape or colour."""
    if plan.noun or rng.random() < 0.6:
        return plan
    return plan._replace(noun=any_noun(rng), crowd=int(rng.integers(2, plan.count + 1)))


def sample_kinds(rng: np.random.Generator, plan: Plan) -> list[tuple[str, str]]:
    """Colour and shape of each object; exactly `plan.crowd` of them are of class `plan.noun`, if the plan has one."""
    plan = with_repeats(rng, plan)
    crowd = set(rng.permutation(plan.count)[: plan.crowd].tolist()) if plan.noun else set()
    kinds: list[tuple[str, str]] = []
    for index in range(plan.count):
        noun = plan.noun or Noun()
        inside = index in crowd
        # one repeat in six stays: twins are allowed where the words still tell which is meant
        for _ in range(1 if rng.random() < 1 / 6 else 20):
            color = noun.color if noun.color and inside else choose(rng, [c for c in COLORS if c != noun.color])
            shape = noun.shape if noun.shape and inside else choose(rng, [s for s in SHAPES if s != noun.shape])
            if (color, shape) not in kinds:
                break
        kinds.append((color, shape))
    return kinds


# ---------- expressions: phrases


def with_article(words: str) -> str:
    """ "a red star", "an orange star"."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def join_words(words: Sequence[str], comma: str = ", ") -> str:
    """ "a", "a and b", "a, b and c"."""
    return " and ".join([*([comma.join(words[:-1])] if words[:-1] else []), words[-1]])


def nouns_of(thing: SceneObject) -> tuple[Noun, Noun, Noun]:
    """The looser names of an object: its shape, its colour, and just "shape"."""
    return Noun(shape=thing.shape), Noun(color=thing.color), Noun()


Expression = tuple[str, int]
Objects = tuple[SceneObject, ...]


def by_name(rng: np.random.Generator, objects: Objects, kind: str) -> Expression | None:
    """ "red star", "star" or "red shape", when only one object is that."""
    for index in shuffled(rng, range(len(objects))):
        thing = objects[index]
        noun = Noun(None if kind == "shape" else thing.color, None if kind == "color" else thing.shape)
        if noun.among(objects) == [index]:
            return str(noun), index
    return None


def by_size(rng: np.random.Generator, objects: Objects, kind: str) -> Expression | None:
    """ "largest star", "smallest red shape": at least a quarter larger or smaller in radius than the next."""
    sign = 1 if kind == "largest" else -1
    for index in shuffled(rng, range(len(objects))):
        for noun in shuffled(rng, nouns_of(objects[index])):
            rivals = [objects[other].radius for other in noun.among(objects) if other != index]
            ratios = [(objects[index].radius / radius) ** sign for radius in rivals]
            if ratios and min(ratios) >= SIZE_MARGIN:
                return f"{kind} {noun}", index
    return None


def by_position(rng: np.random.Generator, objects: Objects, kind: str) -> Expression | None:
    """ "leftmost star", "topmost shape": plain by its centre, and by its edge too."""
    for word in shuffled(rng, tuple(EXTREMES)):
        dx, dy = EXTREMES[word]
        for noun in shuffled(rng, nouns_of(choose(rng, objects))):
            group = noun.among(objects)
            places = [dx * objects[i].x + dy * objects[i].y for i in group]
            edges = [place + objects[i].radius for place, i in zip(places, group, strict=True)]
            best = int(np.argmax(places))
            rest = places[:best] + places[best + 1 :]
            if rest and places[best] - max(rest) >= POSITION_MARGIN and edges[best] == max(edges):
                return f"{word} {noun}", group[best]
    return None


def by_relation(rng: np.random.Generator, objects: Objects, kind: str) -> Expression | None:
    """ "circle left of the red square": the anchor is unique, and no other circle is on that side of it."""
    for index, anchor in shuffled(rng, [(a, b) for a in range(len(objects)) for b in range(len(objects)) if a != b]):
        thing, other = objects[index], objects[anchor]
        names = [name for name in (Noun(other.color, other.shape), *nouns_of(other)) if name.among(objects) == [anchor]]
        sides = [word for word in RELATIONS if _offset(thing, other, word) >= POSITION_MARGIN]
        nouns = [noun for noun in nouns_of(thing) if noun == Noun() or not noun.matches(other)]
        if not names or not sides:
            continue
        word, name, noun = choose(rng, sides), choose(rng, names), choose(rng, nouns)
        rivals = [objects[i] for i in noun.among(objects) if i not in (index, anchor)]
        if all(_offset(rival, other, word) <= 0 for rival in rivals):
            return f"{noun} {word} the {name}", index
    return None


def _offset(thing: SceneObject, anchor: SceneObject, word: str) -> float:
    """How far `thing` lies from `anchor` towards the side that `word` names, in short sides."""
    dx, dy = RELATIONS[word]
    return dx * (thing.x - anchor.x) + dy * (thing.y - anchor.y)


def by_motion(rng: np.random.Generator, objects: Objects, kind: str) -> Expression | None:
    """ "shape moving up", "still circle", when only one object is that."""
    for index in shuffled(rng, range(len(objects))):
        for noun in shuffled(rng, (Noun(), Noun(shape=objects[index].shape))):
            if [i for i in noun.among(objects) if objects[i].motion == kind] == [index]:
                return motion_phrase(noun, kind), index
    return None


def motion_phrase(noun: Noun, motion: str) -> str:
    """ "circle moving left" or "still circle"."""
    return f"still {noun}" if motion == "still" else f"{noun} moving {motion}"


EXPRESSIONS: dict[str, Callable[[np.random.Generator, Objects, str], Expression | None]] = {
    "color_shape": by_name,
    "shape": by_name,
    "color": by_name,
    "largest": by_size,
    "smallest": by_size,
    "position": by_position,
    "relation": by_relation,
    **dict.fromkeys(MOTIONS, by_motion),
}


def absent_noun(rng: np.random.Generator, objects: Objects, kind: str) -> Noun | None:
    """A class that no object belongs to; a near miss has a colour and a shape that are both there, but apart."""
    colors, shapes = {thing.color for thing in objects}, {thing.shape for thing in objects}
    if kind == "shape":
        options = [Noun(shape=shape) for shape in SHAPES if shape not in shapes]
    elif kind == "color":
        options = [Noun(color=color) for color in COLORS if color not in colors]
    else:
        options = [Noun(color, shape) for color, shape in product(COLORS, SHAPES)]
        options = [noun for noun in options if not noun.among(objects)]
    if kind == "near_miss":
        options = [noun for noun in options if noun.color in colors and noun.shape in shapes]
    return choose(rng, options) if options else None


# ---------- conversations: one function each


def sure(thing: SceneObject) -> str:
    """The answer that points at one object."""
    return f"Sure, it is the {thing.name} [SEG]."


def request(rng: np.random.Generator, words: str, video: bool, several: bool = False) -> str:
    """A question for masks of `words` ("the red star", "all circles")."""
    templates = VIDEO_REQUESTS if video else IMAGE_REQUESTS
    return choose(rng, templates[: -1 if several else None]).format(words)


def draft_refer(rng: np.random.Generator, objects: Objects, plan: Plan) -> list[Draft] | None:
    """A referring expression."""
    found = EXPRESSIONS[plan.kind](rng, objects, plan.kind)
    if found is None:
        return None
    words, index = found
    return [Draft(request(rng, f"the {words}", plan.video), sure(objects[index]), plan.kind, (index,))]


def draft_absent(rng: np.random.Generator, objects: Objects, plan: Plan) -> list[Draft] | None:
    """A referring expression for something that is not there."""
    if plan.kind == "motion":
        missing = [motion for motion in MOTIONS if all(thing.motion != motion for thing in objects)]
        if not missing:
            return None
        words = motion_phrase(Noun(), choose(rng, missing))
        return [Draft(request(rng, f"the {words}", True), f"There is no {words}.", plan.kind)]
    superlative = plan.kind == "largest"
    kind = choose(rng, ("shape", "color")) if superlative else plan.kind
    noun = absent_noun(rng, objects, kind)
    if noun is None:
        return None
    words = f"{choose(rng, ('largest', 'smallest'))} {noun}" if superlative else str(noun)
    return [Draft(request(rng, f"the {words}", plan.video), f"There is no {noun}.", plan.kind)]


def draft_multi(rng: np.random.Generator, objects: Objects, plan: Plan) -> list[Draft] | None:
    """Two named objects, or all of a class from left to right."""
    if plan.kind == "pair":
        if not all_different(objects):
            return None
        targets = shuffled(rng, range(len(objects)))[:2]
        words = join_words([f"the {objects[i].name}" for i in targets])
    else:
        noun = plan.noun or Noun()
        targets = left_to_right(objects, noun.among(objects))
        words = f"all {noun.plural}"
    if targets is None:
        return None
    return [Draft(request(rng, words, plan.video, True), list_answer(objects, targets), plan.kind, tuple(targets))]


def list_answer(objects: Objects, targets: Sequence[int]) -> str:
    """The answer that points at several objects in order."""
    return f"Sure, {join_words([f'the {objects[i].name} [SEG]' for i in targets])}."


def all_different(objects: Objects) -> bool:
    """Whether no two objects share both colour and shape."""
    return len({thing.name for thing in objects}) == len(objects)


def left_to_right(objects: Objects, indices: Sequence[int]) -> list[int] | None:
    """The indices sorted by the objects' centres, or None where that order is not plain to see."""
    order = sorted(indices, key=lambda index: objects[index].x)
    gaps = [objects[b].x - objects[a].x for a, b in pairwise(order)]
    return order if all(gap >= ORDER_GAP for gap in gaps) else None


def draft_caption(rng: np.random.Generator, objects: Objects, plan: Plan) -> list[Draft] | None:
    """A grounded caption of all objects from left to right."""
    order = left_to_right(objects, range(len(objects)))
    if order is None or not all_different(objects):
        return None
    parts = [f"<p> {with_article(objects[i].name)} </p> [SEG]" for i in order]
    return [Draft(CAPTION_QUESTION, f"{join_words(parts, ' , ')} .", plan.kind, tuple(order))]


def ask_count(rng: np.random.Generator, objects: Objects, plan: Plan) -> Draft | None:
    """ "How many circles are there?" """
    noun = plan.noun or Noun()
    count = len(noun.among(objects))
    answer = f"There is 1 {noun}." if count == 1 else f"There are {count} {noun.plural}."
    return Draft(_in_video(f"How many {noun.plural} are there", plan), answer, "count", (), str(count))


def color_question(thing: SceneObject, plan: Plan) -> Draft:
    """ "What color is the star?" """
    question = _in_video(f"What color is the {thing.shape}", plan)
    return Draft(question, f"The {thing.shape} is {thing.color}.", "color", (), thing.color)


def shape_question(thing: SceneObject, plan: Plan) -> Draft:
    """ "What shape is the red one?" """
    question = _in_video(f"What shape is the {thing.color} one", plan)
    return Draft(question, f"The {thing.color} one is {with_article(thing.shape)}.", "shape", (), thing.shape)


def ask_color(rng: np.random.Generator, objects: Objects, plan: Plan) -> Draft | None:
    """The colour of the only object of its shape."""
    found = by_name(rng, objects, "shape")
    return None if found is None else color_question(objects[found[1]], plan)


def ask_shape(rng: np.random.Generator, objects: Objects, plan: Plan) -> Draft | None:
    """The shape of the only object of its colour."""
    found = by_name(rng, objects, "color")
    return None if found is None else shape_question(objects[found[1]], plan)


def ask_exists(rng: np.random.Generator, objects: Objects, plan: Plan) -> Draft | None:
    """ "Is there a red star?", the answer as planned; near misses among the noes."""
    kind = choose(rng, ("near_miss", "color_shape", "color_shape", "shape", "color"))
    thing = choose(rng, objects)
    noun = Noun(None if kind == "shape" else thing.color, None if kind == "color" else thing.shape)
    if not plan.positive:
        noun = absent_noun(rng, objects, kind)
    if noun is None:
        return None
    question = _in_video(f"Is there {with_article(str(noun))}", plan)
    answer = f"Yes, there is {with_article(str(noun))}." if plan.positive else f"No, there is no {noun}."
    return Draft(question, answer, "exists", (), "yes" if plan.positive else "no")


def ask_direction(rng: np.random.Generator, objects: Objects, plan: Plan) -> Draft | None:
    """ "How is the red star moving?" """
    found = by_name(rng, objects, "color_shape")
    if found is None:
        return None
    motion = objects[found[1]].motion
    answer = f"The {found[0]} is {motion if motion == 'still' else f'moving {motion}'}."
    return Draft(f"How is the {found[0]} moving in this video?", answer, "direction", (), motion)


def _in_video(words: str, plan: Plan) -> str:
    return f"{words} in this video?" if plan.video else f"{words}?"


QUESTIONS: dict[str, Callable[[np.random.Generator, Objects, Plan], Draft | None]] = {
    "count": ask_count,
    "color": ask_color,
    "shape": ask_shape,
    "exists": ask_exists,
    "direction": ask_direction,
}


def draft_question(rng: np.random.Generator, objects: Objects, plan: Plan) -> list[Draft] | None:
    """A question answered in words."""
    draft = QUESTIONS[plan.kind](rng, objects, plan)
    return None if draft is None else [draft]


def draft_region(rng: np.random.Generator, objects: Objects, plan: Plan) -> list[Draft] | None:
    """ "What is region2?" """
    number = 1 if plan.kind == "one" else 2
    large = [i for i in range(len(objects)) if objects[i].radius >= REGION_MIN_RADIUS]
    if len(large) < number:
        return None
    shown = shuffled(rng, large)[:number]
    asked = int(rng.integers(number))
    question = choose(rng, ("What is region{}?", "Describe region{}.")).format(asked + 1)
    name = objects[shown[asked]].name
    answer = f"Region{asked + 1} is {with_article(name)}."
    return [Draft(question, answer, plan.kind, (), name, tuple(shown))]


def draft_followup(rng: np.random.Generator, objects: Objects, plan: Plan) -> list[Draft] | None:
    """Two turns; in most kinds the second one cannot be understood without the first."""
    if plan.kind == "them":
        return _count_then_segment(rng, objects, plan)
    if plan.kind == "it_segment":
        return _ask_then_segment(rng, objects, plan)
    kind = choose(rng, [kind for kind in KINDS["refer"] if kind not in ("color_shape", plan.kind.removeprefix("it_"))])
    first = draft_refer(rng, objects, plan._replace(task="refer", kind=kind))
    if first is None:
        return None
    thing = objects[first[0].targets[0]]
    if plan.kind == "it_color":
        return [*first, Draft("What color is it?", f"It is {thing.color}.", plan.kind, (), thing.color)]
    if plan.kind == "it_shape":
        return [*first, Draft("What shape is it?", f"It is {with_article(thing.shape)}.", plan.kind, (), thing.shape)]
    found = by_name(rng, objects, "color_shape")
    if found is None or found[1] == first[0].targets[0]:
        return None
    return [*first, Draft(f"Now segment the {found[0]}.", sure(objects[found[1]]), plan.kind, (found[1],))]


def _count_then_segment(rng: np.random.Generator, objects: Objects, plan: Plan) -> list[Draft] | None:
    noun = plan.noun or Noun()
    targets = left_to_right(objects, noun.among(objects))
    count = ask_count(rng, objects, plan)
    if not targets or count is None:
        return None
    return [count, Draft("Please segment all of them.", list_answer(objects, targets), plan.kind, tuple(targets))]


def _ask_then_segment(rng: np.random.Generator, objects: Objects, plan: Plan) -> list[Draft] | None:
    key, ask = choose(rng, (("shape", color_question), ("color", shape_question)))
    found = by_name(rng, objects, key)
    if found is None:
        return None
    thing = objects[found[1]]
    return [ask(thing, plan), Draft("Segment it.", sure(thing), plan.kind, (found[1],))]


def draft_interview(rng: np.random.Generator, objects: Objects, plan: Plan) -> list[Draft] | None:
    """Up to `INTERVIEW_TURNS` turns that don't depend on each other, each of a kind of its own but for motion."""
    tasks = ("refer", "multi", "absent", "question")
    if plan.video:
        tasks = ("video_refer", "video_motion", "video_multi", "video_absent", "video_question")
    kinds = [(task, kind) for task in tasks for kind in KINDS[task] if kind != "interview"]
    about_motion = [(task, kind) for task, kind in kinds if task == "video_motion" or kind in ("motion", "direction")]
    kinds += 2 * about_motion  # or it would be learned long after all else
    drafts: dict[str, Draft] = {}
    for task, kind in shuffled(rng, kinds):
        noun = choose(rng, nouns_of(choose(rng, objects))) if rng.random() < 0.7 else any_noun(rng)
        noun = plan.noun if plan.noun and rng.random() < 0.5 else noun
        about = plan._replace(task=task, kind=kind, noun=noun, positive=bool(rng.random() < 0.5))
        if kind == "all" and not noun.among(objects):
            continue
        for draft in DRAFTS[task](rng, objects, about) or ():
            drafts.setdefault(draft.question, draft)
        if len(drafts) == INTERVIEW_TURNS:
            break
    return list(drafts.values())


DRAFTS: dict[str, Callable[[np.random.Generator, Objects, Plan], list[Draft] | None]] = {
    "refer": draft_refer,
    "absent": draft_absent,
    "multi": draft_multi,
    "caption": draft_caption,
    "question": draft_question,
    "region": draft_region,
    "followup": draft_followup,
    "video_refer": draft_refer,
    "video_motion": draft_refer,
    "video_multi": draft_multi,
    "video_absent": draft_absent,
    "video_question": draft_question,
    "interview": draft_interview,
    "video_interview": draft_interview,
}


# ---------- samples


def sample_plan(rng: np.random.Generator, task: str, kind: str | None = None) -> Plan:
    """What to ask, and how many objects share a colour or a shape, so that counts come out even."""
    kind = kind or choose(rng, KINDS[task])
    positive = bool(rng.random() < 0.5)
    count = int(rng.integers(2, 6))
    if kind in ("count", "all", "them", "interview"):
        if rng.random() < 0.25:
            return Plan(task, kind, count, None, 0, positive)
        crowd = int(rng.integers(0 if kind == "count" else 1, 5))
        return Plan(task, kind, int(rng.integers(max(2, crowd), 6)), any_noun(rng), crowd, positive)
    return Plan(task, kind, count, None, 0, positive)


def make_sample(
    seed: int,
    index: int,
    *,
    split: str = "train",
    task: str | None = None,
    size: tuple[int, int] | None = None,
    num_frames: int = 8,
) -> SceneSample:
    """Make one sample; the same arguments always give the same bytes, and splits never share a random stream.

    Args:
        seed, index: whole numbers >= 0 that name the sample within its split.
        split: one of `SPLITS`.
        task: a key of `KINDS`; None draws one.
        size: height and width in pixels, both >= 32; None draws each from 96..160.
        num_frames: length of clips, >= 1; pictures always have one frame.

    Raises:
        ValueError: an argument outside these ranges.
        RuntimeError: no scene of this size fits what was drawn.
    """
    _check(seed, index, split, task, size, num_frames)
    rng = np.random.default_rng([SPLITS.index(split), seed, index])
    plan = sample_plan(rng, task or choose(rng, IMAGE_TASKS + VIDEO_TASKS))
    low, high = SIDE_RANGE
    height, width = size or rng.integers(low, high + 1, 2).tolist()
    for _ in range(MAX_ATTEMPTS):
        objects = place_objects(rng, sample_kinds(rng, plan), (height, width), moving=plan.video)
        drafts = objects and DRAFTS[plan.task](rng, objects, plan)
        if not drafts:
            continue
        frames, masks, areas = draw_clip(rng, objects, (height, width), num_frames if plan.video else 1)
        if shown_well(masks, areas):
            return _finish(plan.task, frames, masks, objects, drafts)
    raise RuntimeError(f"No scene fits {plan} at {height}x{width} after {MAX_ATTEMPTS} attempts; use another index.")


def _finish(task: str, frames: np.ndarray, masks: np.ndarray, objects: Objects, drafts: Sequence[Draft]) -> SceneSample:
    turns = tuple(Turn(d.question, d.answer, masks[list(d.targets)], d.targets, d.expected, d.kind) for d in drafts)
    shown = drafts[0].regions
    return SceneSample(task, frames, turns, objects, masks, masks[list(shown), 0] if shown else None)


def _check(seed: int, index: int, split: str, task: str | None, size: tuple[int, int] | None, num_frames: int) -> None:
    if seed < 0 or index < 0:
        raise ValueError(f"seed and index must be >= 0, got seed={seed}, index={index}.")
    if split not in SPLITS:
        raise ValueError(f"Unknown split {split!r}; choose one of {', '.join(SPLITS)}.")
    if task is not None and task not in KINDS:
        raise ValueError(f"Unknown task {task!r}; choose one of {', '.join(KINDS)}, or None for any.")
    if size is not None and (len(size) != 2 or min(size) < 32):
        raise ValueError(f"size must be (height, width), both >= 32 pixels, got {size}.")
    if num_frames < 1:
        raise ValueError(f"num_frames must be >= 1, got {num_frames}.")


# ---------- corpus


def corpus(limit: int | None = None) -> Iterator[str]:
    """Sentences of this world for a tokenizer: words only, no pictures drawn.

    Deterministic (its own random stream, apart from all splits). Every task and kind comes by turns, so that a few
    thousand sentences hold every word in every pattern; None gives `CORPUS_CONVERSATIONS` conversations.
    """
    return islice(_sentences(), limit)


def _sentences() -> Iterator[str]:
    order = [(task, kind) for task, kinds in KINDS.items() if task not in INTERVIEWS for kind in kinds]
    for index in range(CORPUS_CONVERSATIONS):
        for draft in _words_only(index, *order[index % len(order)]):
            yield from (draft.question, draft.answer)


def _words_only(index: int, task: str, kind: str) -> list[Draft]:
    rng = np.random.default_rng([len(SPLITS), index])
    plan = sample_plan(rng, task, kind)
    for _ in range(MAX_ATTEMPTS):
        objects = place_objects(rng, sample_kinds(rng, plan), (128, 128), moving=plan.video)
        drafts = objects and DRAFTS[task](rng, objects, plan)
        if drafts:
            return drafts
    return []
