"""What the synthetic world of `scenes` is made of: coloured shapes, where they lie, how they move and are drawn.

Lengths are in units of the picture's short side, measured from its top left corner; sizes are (height, width) in
pixels. Masks are exact: a pixel belongs to the nearest object that covers at least half of it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import TypeVar

import numpy as np

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (212, 40, 44),
    "green": (44, 166, 66),
    "blue": (44, 92, 220),
    "yellow": (240, 224, 50),
    "purple": (146, 56, 196),
    "orange": (246, 136, 28),
}
SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "star", "cross")
MOTIONS: dict[str, tuple[int, int]] = {
    "up": (0, -1),
    "down": (0, 1),
    "left": (-1, 0),
    "right": (1, 0),
    "still": (0, 0),
}
RADIUS_RANGE = (0.09, 0.24)
SPEED_RANGE = (0.03, 0.06)  # per frame
AREA_FACTOR = 2.4  # every shape has area 2.4 r^2, so "largest" by radius is largest to the eye
REACH = 1.4  # no point of a shape is further than this many radii from its centre
MIN_VISIBLE = 0.6  # share of each object seen in the first frame
COLOR_JITTER = 14
SUPERSAMPLING = 4

T = TypeVar("T")
Point = tuple[float, float]


@dataclass(frozen=True)
class SceneObject:
    """One shape. Lengths are in short sides of the picture; `x`, `y` are its centre in the first frame.

    `radius` is its nominal size (area = 2.4 radius^2 whatever the shape), `angle` its rotation in radians, `rgb` the
    colour drawn (0..255, jittered around `COLORS[color]`), `motion` a key of `MOTIONS`, `speed` in short sides per
    frame (0 when still), `outlined` whether it has a dark rim. Objects later in a sample's tuple are nearer.
    """

    color: str
    shape: str
    radius: float
    x: float
    y: float
    angle: float
    rgb: tuple[int, int, int]
    outlined: bool
    motion: str = "still"
    speed: float = 0.0

    @property
    def name(self) -> str:
        """Colour and shape, such as "red star"."""
        return f"{self.color} {self.shape}"


@cache
def shape_outline(shape: str) -> np.ndarray:
    """Corners of a shape of radius 1 around (0, 0), float64 [corners, 2] (x right, y down), area `AREA_FACTOR`."""
    if shape == "cross":
        arm, half = 1.0, 0.36
        quarter = [(half, -arm), (half, -half), (arm, -half)]
        points = [(x, y) if turn == 0 else _quarter_turn(x, y, turn) for turn in range(4) for x, y in quarter]
    else:
        corners = {"circle": 48, "square": 4, "triangle": 3, "star": 10}[shape]
        start = -math.pi / 2 + (math.pi / 4 if shape == "square" else 0)
        reach = [0.45 if shape == "star" and corner % 2 else 1.0 for corner in range(corners)]
        angles = [start + 2 * math.pi * corner / corners for corner in range(corners)]
        points = [(r * math.cos(a), r * math.sin(a)) for r, a in zip(reach, angles, strict=True)]
    outline = np.array(points)
    x, y = outline.T
    area = abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2
    outline *= math.sqrt(AREA_FACTOR / area)
    outline.setflags(write=False)
    return outline


def _quarter_turn(x: float, y: float, turns: int) -> Point:
    for _ in range(turns):
        x, y = -y, x
    return x, y


def draw_background(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A dull, textured picture, uint8 [height, width, 3]: soft clouds plus nothing, a gradient or stripes."""
    import cv2

    clouds = rng.normal(0, 14, (5, 5)).astype(np.float32)
    gray = cv2.resize(clouds, (width, height), interpolation=cv2.INTER_CUBIC) + np.float32(rng.uniform(70, 190))
    pattern, angle, strength = rng.integers(3), rng.uniform(0, 2 * math.pi), rng.uniform(8, 24)
    if pattern:
        across = np.arange(width, dtype=np.float32) * math.cos(angle) / min(height, width)
        down = np.arange(height, dtype=np.float32) * math.sin(angle) / min(height, width)
        phase = across[None] + down[:, None]
        gray += strength * (
            phase if pattern == 1 else np.sin(phase * np.float32(rng.uniform(15, 50)), dtype=np.float32)
        )
    gray += rng.integers(-5, 6, (height, width), dtype=np.int8)
    tint = rng.uniform(-9, 9, 3).astype(np.float32)
    return np.clip(gray[..., None] + tint, 20, 235).astype(np.uint8)


def rasterize(thing: SceneObject, center: Point, scale: float) -> tuple[int, int, np.ndarray, np.ndarray]:
    """Coverage of an object at `center` (short sides) in a picture whose short side is `scale` pixels.

    Returns the left and top pixel of its box, how far each pixel of the box is covered (uint8 [h, w], 255 = wholly)
    and how far by the dark rim (same shape; zeros without one).
    """
    import cv2

    cos, sin = math.cos(thing.angle) * thing.radius * scale, math.sin(thing.angle) * thing.radius * scale
    points = shape_outline(thing.shape) @ np.array([[cos, sin], [-sin, cos]]) + np.array(center) * scale
    left, top = (int(value) for value in np.floor(points.min(axis=0)))
    width, height = (int(value) for value in np.ceil(points.max(axis=0)))
    width, height = width - left, height - top
    # OpenCV puts pixel centres on whole numbers; 4 fractional bits
    fine = np.rint(((points - (left, top)) * SUPERSAMPLING - 0.5) * 16).astype(np.int32)
    cover = np.zeros((height * SUPERSAMPLING, width * SUPERSAMPLING), np.uint8)
    cv2.fillPoly(cover, [fine], 255, shift=4)
    rim = np.zeros_like(cover)
    if thing.outlined:
        cv2.polylines(rim, [fine], True, 255, thickness=2 * SUPERSAMPLING, shift=4)
        rim &= cover
        rim = cv2.resize(rim, (width, height), interpolation=cv2.INTER_AREA)
    else:
        rim = rim[:height, :width]
    return left, top, cv2.resize(cover, (width, height), interpolation=cv2.INTER_AREA), rim


def draw_object(frame: np.ndarray, owner: np.ndarray, label: int, thing: SceneObject, center: Point) -> int:
    """Paint an object over `frame` (uint8 [H, W, 3]) and write `label` on its pixels of `owner` (int8 [H, W]).

    Returns the number of pixels of the whole object, hidden ones and those outside the picture included.
    """
    height, width = owner.shape
    left, top, cover, rim = rasterize(thing, center, min(height, width))
    area = int(np.count_nonzero(cover >= 128))
    x0, y0 = max(left, 0), max(top, 0)
    x1, y1 = min(left + cover.shape[1], width), min(top + cover.shape[0], height)
    if x0 >= x1 or y0 >= y1:
        return area
    box = (slice(y0, y1), slice(x0, x1))
    part = (slice(y0 - top, y1 - top), slice(x0 - left, x1 - left))
    cover, rim = cover[part], rim[part]
    owner[box][cover >= 128] = label
    alpha = cover[..., None] * np.float32(1 / 255)
    paint = np.array(thing.rgb, np.float32)
    if thing.outlined:
        paint = paint * (1 - rim[..., None] * np.float32(0.75 / 255))
    under = frame[box].astype(np.float32)
    frame[box] = under + alpha * (paint - under) + np.float32(0.5)
    return area


def fold(value: float, low: float, high: float) -> float:
    """A point moving on a line, turned back at `low` and `high`."""
    offset = (value - low) % (2 * (high - low))
    return low + min(offset, 2 * (high - low) - offset)


def position(thing: SceneObject, frame: int, size: tuple[int, int]) -> Point:
    """Centre of an object in a frame, in short sides; movers turn back once they are wholly outside the picture."""
    reach = REACH * thing.radius
    dx, dy = MOTIONS[thing.motion]
    height, width = (side / min(size) for side in size)
    x = fold(thing.x + dx * thing.speed * frame, -reach, width + reach)
    y = fold(thing.y + dy * thing.speed * frame, -reach, height + reach)
    return x, y


def draw_clip(
    rng: np.random.Generator, objects: Sequence[SceneObject], size: tuple[int, int], num_frames: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw objects, the last one nearest.

    Returns frames (uint8 [T, H, W, 3]), visible masks (bool [N, T, H, W]) and whole areas in pixels (int [N, T]).
    """
    height, width = size
    frames = np.repeat(draw_background(rng, height, width)[None], num_frames, axis=0)
    owner = np.full((num_frames, height, width), -1, np.int8)
    areas = np.empty((len(objects), num_frames), np.int64)
    for time, label in product(range(num_frames), range(len(objects))):
        center = position(objects[label], time, size)
        areas[label, time] = draw_object(frames[time], owner[time], label, objects[label], center)
    masks = owner[None] == np.arange(len(objects), dtype=np.int8)[:, None, None, None]
    return frames, masks, areas


def shown_well(masks: np.ndarray, areas: np.ndarray) -> bool:
    """Whether every object is mostly visible in the first frame and seen in three of the first five."""
    shares = masks[:, :5].sum(axis=(2, 3)) / areas[:, :5]
    enough = min(3, shares.shape[1])
    return bool((shares[:, 0] >= MIN_VISIBLE).all() and ((shares > 0.25).sum(axis=1) >= enough).all())


def choose(rng: np.random.Generator, options: Sequence[T]) -> T:
    """One of `options`, all equally likely."""
    return options[int(rng.integers(len(options)))]


def shuffled(rng: np.random.Generator, options: Sequence[T]) -> list[T]:
    """The options in random order."""
    return [options[int(index)] for index in rng.permutation(len(options))]


def start_area(radius: float, motion: str, speed: float, size: tuple[int, int]) -> tuple[list[float], list[float]]:
    """Lowest and highest start of an object's centre: inside, and not yet away after three frames of moving."""
    low = [0.75 * radius] * 2
    high = [side / min(size) - 0.75 * radius for side in (size[1], size[0])]
    for axis, sign in enumerate(MOTIONS[motion]):
        run = 3 * speed - 1.05 * radius  # beyond what the line above leaves
        if run > 0 and sign:
            low[axis] += run if sign < 0 else 0
            high[axis] -= run if sign > 0 else 0
    return low, high


def find_start(
    rng: np.random.Generator,
    placed: list[tuple[float, float, float]],
    radius: float,
    area: tuple[list[float], list[float]],
    spacing: float,
) -> Point | None:
    """A free place in `area` for an object, at least `spacing` times the sum of radii from those placed (x, y, r)."""
    for x, y in rng.uniform(*area, (12, 2)).tolist():
        if all(math.hypot(x - px, y - py) >= spacing * (radius + pr) for px, py, pr in placed):
            return x, y
    return None


def place_objects(
    rng: np.random.Generator, kinds: Sequence[tuple[str, str]], size: tuple[int, int], moving: bool
) -> tuple[SceneObject, ...] | None:
    """Objects of the given (colour, shape) in a picture of `size` (height, width), or None if they do not fit."""
    placed: list[tuple[float, float, float]] = []
    objects: list[SceneObject] = []
    spacing = rng.uniform(0.62, 1.1)
    for color, shape in kinds:
        radius = rng.uniform(*RADIUS_RANGE)
        motion = choose(rng, tuple(MOTIONS)) if moving else "still"
        speed = 0.0 if motion == "still" else rng.uniform(*SPEED_RANGE)
        area = start_area(radius, motion, speed, size)
        if rng.random() < 0.3:
            area = _near_exit(area, motion)
        start = find_start(rng, placed, radius, area, spacing)
        if start is None:
            return None
        placed.append((*start, radius))
        rgb = tuple(np.clip(COLORS[color] + rng.integers(-COLOR_JITTER, COLOR_JITTER + 1, 3), 0, 255).tolist())
        angle, outlined = rng.uniform(-0.3, 0.3), bool(rng.random() < 0.4)
        objects.append(SceneObject(color, shape, radius, *start, angle, rgb, outlined, motion, speed))
    return tuple(objects)


def _near_exit(area: tuple[list[float], list[float]], motion: str) -> tuple[list[float], list[float]]:
    """The last fifth of a start area in the direction of moving, so that objects do leave within a short clip."""
    low, high = list(area[0]), list(area[1])
    for axis, sign in enumerate(MOTIONS[motion]):
        if sign > 0:
            low[axis] += 0.8 * (high[axis] - low[axis])
        elif sign < 0:
            high[axis] -= 0.8 * (high[axis] - low[axis])
    return low, high
