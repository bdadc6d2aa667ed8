"""Drawing scenes: several objects that differ in name (colour + shape), over clutter.

Texture and size vary, too, but no words tell of them. Many pictures hold objects of one colour
or of one shape, so that a model has to know both.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import cv2
import numpy as np
from numpy.typing import NDArray

Pairs = Literal["seen", "held_out", "all"]
Pixels = NDArray[np.uint8]
Mask = NDArray[np.bool_]

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "orange": (246, 140, 32),
    "yellow": (240, 220, 60),
    "green": (50, 160, 70),
    "blue": (45, 90, 215),
    "purple": (150, 60, 180),
}
SHAPES = ("oval", "square", "triangle", "bar", "cross", "ring")
TEXTURES = ("", "striped", "dotted", "checked")
SIZES = ("small", "large")
NAMES = tuple(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES)
# One pair for each shape and each colour, so that every word is seen in training, but not together.
HELD_OUT_NAMES = tuple(f"{colour} {SHAPES[(i + 2) % 6]}" for i, colour in enumerate(COLOURS))

_MIN_VISIBLE = 0.85  # share of an object that the ones drawn over it must leave in sight
_KINSHIP = (0.5, 0.2, 0.3)  # share of pictures whose objects have one colour, one shape, neither
_COARSE = 3  # pixels a cell when a place is looked for
_SUBPIXEL = 4  # fractional bits of OpenCV's fixed-point coordinates


@dataclass(frozen=True)
class SceneConfig:
    """What to draw.

    Attributes:
        samples: Number of pictures.
        pairs: `seen` leaves out the held-out names, `held_out` puts at least one of them into every
            picture, `all` draws from every name.
        seed: Pictures are a function of `(seed, pairs, index)` alone.
        size_px: Longer limit of both sides; each side is drawn from 80 % of it up to it.
        objects_min: Fewest objects a picture.
        objects_max: Most objects a picture.
        shard_size: Pictures a tar.
    """

    samples: int = 1000
    pairs: Pairs = "seen"
    seed: int = 0
    size_px: int = 112
    objects_min: int = 3
    objects_max: int = 3
    shard_size: int = 500

    def __post_init__(self) -> None:
        if self.samples < 1 or self.shard_size < 1:
            raise ValueError(
                f"samples and shard_size must be at least 1, got {self.samples} and "
                f"{self.shard_size}"
            )
        if not 3 <= self.objects_min <= self.objects_max <= 5:
            raise ValueError(
                "expected 3 <= objects_min <= objects_max <= 5 (with fewer than three the picture "
                f"itself gives the answer away), got {self.objects_min} and {self.objects_max}"
            )
        if not 64 <= self.size_px <= 1024:
            raise ValueError(f"size_px must lie in 64..1024, got {self.size_px}")
        if self.pairs not in ("seen", "held_out", "all"):
            raise ValueError(f"pairs must be seen, held_out or all, got {self.pairs!r}")


@dataclass(frozen=True)
class SceneObject:
    """One drawn object: what it is, and the mask `[H, W]` of the part in sight."""

    name: str
    texture: str
    size: str
    mask: Mask

    @property
    def phrase(self) -> str:
        """The name with its article."""
        return f"{'an' if self.name[0] in 'aeiou' else 'a'} {self.name}"


@dataclass(frozen=True)
class Scene:
    """A picture `[H, W, 3]` (RGB, uint8) and its objects, in the order of the caption."""

    rgb: Pixels
    objects: tuple[SceneObject, ...]

    @property
    def caption(self) -> str:
        """All phrases, as one sentence would list them."""
        *head, last = (o.phrase for o in self.objects)
        return f"{', '.join(head)} and {last}"


def _outline(shape: str, radius: float, turn: float) -> list[NDArray[Any]]:
    """Return the polygons `[N, 2]` (x, y) around 0 whose even-odd filling is the shape."""

    def ring(r: float | NDArray[Any], n: int, start: float = 0.0) -> NDArray[Any]:
        angle = start + turn + np.arange(n) * (2 * np.pi / n)
        spokes = np.stack([np.cos(angle), np.sin(angle)], 1) * np.reshape(r, (-1, 1))
        return np.asarray(spokes)

    rotation = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    if shape == "oval":
        return [ring(radius, 40) * (0.6, 1.2)]
    if shape == "ring":
        return [ring(radius * 0.95, 40), ring(radius * 0.5, 40)]
    if shape == "square":
        return [ring(radius * 1.1, 4, np.pi / 4)]
    if shape == "triangle":
        return [ring(radius * 1.15, 3, -np.pi / 2)]
    if shape == "bar":
        wide, high = radius * 1.2, radius * 0.42
        corners = np.array([(wide, high), (-wide, high), (-wide, -high), (wide, -high)])
        return [corners @ rotation]
    arm, bar = radius * 1.05, radius * 0.3
    corner = np.array([(bar, arm), (bar, bar), (arm, bar)])
    quarters = [np.linalg.matrix_power(np.array([[0, -1], [1, 0]]), q) for q in range(4)]
    cross = np.concatenate([corner @ quarter for quarter in quarters])
    return [cross @ rotation]


def _coverage(outline: list[NDArray[Any]], height: int, width: int) -> NDArray[np.float32]:
    canvas = np.zeros((height, width), np.uint8)
    scaled = [np.round(p * 2**_SUBPIXEL).astype(np.int32) for p in outline]
    cv2.fillPoly(canvas, scaled, 255, lineType=cv2.LINE_AA, shift=_SUBPIXEL)
    return canvas.astype(np.float32) / 255.0


def _texture(kind: str, colour: NDArray[Any], grid: NDArray[Any], period: float) -> NDArray[Any]:
    """Return the surface `[H, W, 3]` of an object; its second tone is a darker shade."""
    x, y = grid
    if kind == "striped":
        dark = np.mod(x, period) < period * 0.45
    elif kind == "dotted":
        dark = (np.mod(x, period) - period / 2) ** 2 + (np.mod(y, period) - period / 2) ** 2 < (
            period * 0.3
        ) ** 2
    elif kind == "checked":
        dark = (np.mod(x, period) < period / 2) ^ (np.mod(y, period) < period / 2)
    else:
        dark = np.zeros(x.shape, bool)
    return np.where(dark[..., None], colour * 0.75, colour)


def _background(rng: np.random.Generator, height: int, width: int) -> Pixels:
    """Paint greyish clutter: a gradient, many lines and blobs, and noise."""
    corners = rng.uniform(70, 200, (2, 2, 1)) + rng.uniform(-14, 14, (2, 2, 3))
    canvas = cv2.resize(corners.astype(np.float32), (width, height)).astype(np.uint8)
    for _ in range(int(rng.integers(8, 20))):
        tone = [int(v) for v in np.clip(rng.uniform(40, 225) + rng.uniform(-16, 16, 3), 0, 255)]
        p, q = rng.uniform(0, 1, (2, 2)) * (width, height)
        start = (int(p[0]), int(p[1]))
        if rng.random() < 0.6:
            cv2.line(canvas, start, (int(q[0]), int(q[1])), tone, int(rng.integers(1, 4)))
        else:
            axes = (int(rng.integers(2, width // 6)), int(rng.integers(2, height // 6)))
            cv2.ellipse(canvas, start, axes, float(rng.uniform(0, 180)), 0, 360, tone, -1)
    noise = rng.normal(0, 7, (height, width, 1))
    return np.asarray(np.clip(canvas + noise, 0, 255), np.uint8)


def _choose_names(rng: np.random.Generator, config: SceneConfig) -> list[str]:
    """Choose different names; often all of one colour or all of one shape, so that both count."""
    count = int(rng.integers(config.objects_min, config.objects_max + 1))
    names = [n for n in NAMES if config.pairs == "all" or n not in HELD_OUT_NAMES]
    first = str(rng.choice(HELD_OUT_NAMES if config.pairs == "held_out" else names))
    colour, shape = first.split(" ")
    kin = rng.choice(["colour", "shape", "any"], p=_KINSHIP)
    if kin == "colour":
        names = [n for n in names if n.startswith(colour)]
    elif kin == "shape":
        names = [n for n in names if n.endswith(shape)]
    others = [str(n) for n in rng.permutation(names) if n != first]
    return [str(n) for n in rng.permutation([first, *others[: count - 1]])]


def _place(
    rng: np.random.Generator, names: list[str], height: int, width: int
) -> list[tuple[str, str, float, NDArray[np.float32], float]] | None:
    """Lay the objects over each other so that all stay in sight; `None` if they do not fit."""
    placed: list[tuple[str, str, float, NDArray[np.float32], float]] = []
    visible: list[Mask] = []
    areas: list[int] = []
    rows, columns = height // _COARSE, width // _COARSE
    for name in names:
        size = str(rng.choice(SIZES))
        limits = (0.18, 0.21) if size == "small" else (0.24, 0.28)
        radius = float(rng.uniform(*limits)) * min(height, width)
        turn = float(rng.uniform(-0.25, 0.25))
        outline = _outline(name.split(" ")[1], radius, turn)
        for _ in range(20):
            centre = rng.uniform((radius, radius), (width - radius, height - radius))
            mask = _coverage([(p + centre) / _COARSE for p in outline], rows, columns) > 0.5
            rest = [m & ~mask for m in visible]
            if all(m.sum() >= _MIN_VISIBLE * a for m, a in zip(rest, areas, strict=True)):
                break
        else:
            return None
        visible = [*rest, mask]
        areas.append(int(mask.sum()))
        cover = _coverage([p + centre for p in outline], height, width)
        placed.append((name, size, turn, cover, radius))
    return placed


def draw_scene(rng: np.random.Generator, config: SceneConfig) -> Scene:
    """Draw one picture; the same generator state gives the same picture."""
    limits = (config.size_px * 4 // 5, config.size_px + 1)
    height, width = (int(v) for v in rng.integers(*limits, 2))
    while (placed := _place(rng, _choose_names(rng, config), height, width)) is None:
        pass
    canvas = _background(rng, height, width).astype(np.float32)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    objects: list[SceneObject] = []
    for name, size, turn, cover, radius in placed:
        texture = str(rng.choice(TEXTURES))
        colour = np.clip(COLOURS[name.split(" ")[0]] + rng.uniform(-16, 16, 3), 0, 255)
        c, s = np.cos(turn), np.sin(turn)
        surface = _texture(texture, colour, np.stack([c * x + s * y, c * y - s * x]), radius * 0.5)
        canvas += cover[..., None] * (surface - canvas)
        mask = cover > 0.5
        objects = [replace(o, mask=o.mask & ~mask) for o in objects]
        objects.append(SceneObject(name, texture, size, mask))
    rgb = np.clip(canvas + rng.normal(0, 3, canvas.shape), 0, 255).astype(np.uint8)
    return Scene(rgb, tuple(objects[i] for i in rng.permutation(len(objects))))
