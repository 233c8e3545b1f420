"""What is in a demo scene: objects with a kind, a colour, a size and a place, drawn at random from a seed.

Nothing here is an image or a word: `scene_images` paints a `Scene`, `scene_captions` and `scene_questions`
say it. Coordinates are fractions of the picture's side, x to the right and y down.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

KIND_ASPECTS = {  # width / height of the drawn shape
    "ball": 1.0, "house": 1.0, "tree": 0.8, "car": 1.7, "fish": 1.6, "star": 1.0, "cup": 1.15, "chair": 0.7,
    "flower": 0.7, "boat": 1.0, "umbrella": 1.0, "hat": 1.5, "bell": 0.95, "kite": 0.75, "book": 1.35,
    "key": 2.0, "mushroom": 1.0, "ladder": 0.5, "apple": 0.95, "bird": 1.35, "cat": 1.0, "butterfly": 1.3,
    "heart": 1.05, "lamp": 0.7,
}  # fmt: skip
KINDS = tuple(KIND_ASPECTS)
COLOURS = ("red", "blue", "green", "yellow", "orange", "purple", "black", "white")
SIZES = {"small": 0.17, "medium": 0.235, "large": 0.32}  # square root of the box's area
SETTINGS = {  # setting: what fills the picture above and below the horizon
    "meadow": ("sky", "grass"),
    "beach": ("sky", "sand"),
    "snow": ("sky", "snow"),
    "room": ("wall", "floor"),
}
STUFF = ("sky", "wall", "grass", "sand", "snow", "floor")
LABELS = KINDS + STUFF  # the classes of the region detector, in class order
HORIZON = 0.5
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above", "next": "next"}

_GAP = 0.025  # free space around every object
_PLACEMENTS = 60  # tries before the layout starts afresh


@dataclass(frozen=True)
class SceneObject:
    """One drawn object; `box` is x1, y1, x2, y2."""

    kind: str
    colour: str
    size: str
    box: tuple[float, float, float, float]

    @property
    def centre(self) -> tuple[float, float]:
        x1, y1, x2, y2 = self.box
        return (x1 + x2) / 2, (y1 + y2) / 2


@dataclass(frozen=True)
class Item:
    """An object as a caption mentions it; `size` is None when it is left unsaid."""

    kind: str
    colour: str
    size: str | None = None


@dataclass(frozen=True)
class Description:
    """The facts that the caption of a scene states, the same in every language.

    `relations` holds (i, name, j): item i is `name` ("left", "right", "above", "below", "next") of item j.
    Items that no relation mentions are simply listed; `setting` is None when it is left unsaid.
    """

    items: tuple[Item, ...]
    relations: tuple[tuple[int, str, int], ...] = ()
    setting: str | None = None


@dataclass(frozen=True)
class Scene:
    """A picture's content: the described objects first, in the order of the description, then clutter."""

    setting: str
    objects: tuple[SceneObject, ...]
    description: Description

    @property
    def contents(self) -> frozenset[tuple[str, str]]:
        """(kind, colour) of everything in the picture."""
        return frozenset((thing.kind, thing.colour) for thing in self.objects)

    @property
    def described(self) -> frozenset[tuple[str, str]]:
        """(kind, colour) of what the caption mentions."""
        return frozenset((item.kind, item.colour) for item in self.description.items)


def relation_between(first: SceneObject, second: SceneObject) -> str | None:
    """Where `first` is, seen from `second`: "left", "right", "above", "below", or None when it is not clear.

    Clear means that the boxes do not overlap along the main axis and that the offset along it is at least 1.5
    times the offset across it.
    """
    dx, dy = (a - b for a, b in zip(first.centre, second.centre, strict=True))
    if abs(dx) >= 1.5 * abs(dy):
        left, right = sorted((first, second), key=lambda thing: thing.centre[0])
        apart, name = left.box[2] <= right.box[0], "left" if dx < 0 else "right"
    elif abs(dy) >= 1.5 * abs(dx):
        upper, lower = sorted((first, second), key=lambda thing: thing.centre[1])
        apart, name = upper.box[3] <= lower.box[1], "above" if dy < 0 else "below"
    else:
        return None
    return name if apart else None


def are_neighbours(first: SceneObject, second: SceneObject) -> bool:
    """Whether the two stand side by side with little space between them."""
    if relation_between(first, second) not in ("left", "right"):
        return False
    left, right = sorted((first, second), key=lambda thing: thing.centre[0])
    return right.box[0] - left.box[2] < 0.12


def draw_scene(rng: np.random.Generator) -> Scene:
    """A random scene of two to four described objects and up to two objects of clutter."""
    while True:
        objects, num_described = _draw_objects(rng)
        if objects is not None:
            break
    setting = str(rng.choice(list(SETTINGS)))
    described = objects[:num_described]
    items = tuple(
        Item(thing.kind, thing.colour, thing.size if thing.size != "medium" and rng.random() < 0.6 else None)
        for thing in described
    )
    relations = _draw_relations(rng, described) if rng.random() < 0.65 else ()
    says_setting = not relations and rng.random() < 0.6
    return Scene(setting, objects, Description(items, relations, setting if says_setting else None))


def _draw_objects(rng: np.random.Generator) -> tuple[tuple[SceneObject, ...] | None, int]:
    """Objects that do not touch, or None when they found no place; and how many of them are described."""
    num_described = int(rng.choice([2, 3, 4], p=[0.35, 0.5, 0.15]))
    num_clutter = int(rng.choice([0, 1, 2], p=[0.25, 0.45, 0.3]))
    kinds = [str(kind) for kind in rng.choice(KINDS, num_described + num_clutter, replace=False)]
    colours = [str(colour) for colour in rng.choice(COLOURS, len(kinds))]
    if num_clutter and rng.random() < 0.5:  # a second one of a described kind, so that counting has a point
        kinds[-1] = kinds[0]
        colours[-1] = str(rng.choice([colour for colour in COLOURS if colour != colours[0]]))
    placed: list[SceneObject] = []
    for i, (kind, colour) in enumerate(zip(kinds, colours, strict=True)):
        size = str(rng.choice(list(SIZES), p=[0.3, 0.4, 0.3] if i < num_described else [0.6, 0.4, 0.0]))
        box = _find_place(rng, kind, size, [thing.box for thing in placed])
        if box is None:
            return None, num_described
        placed.append(SceneObject(kind, colour, size, box))
    return tuple(placed), num_described


def _find_place(rng, kind: str, size: str, taken: list) -> tuple[float, float, float, float] | None:
    side = SIZES[size] * rng.uniform(0.95, 1.05)
    stretch = KIND_ASPECTS[kind] ** 0.5
    width, height = side * stretch, side / stretch
    for _ in range(_PLACEMENTS):
        x, y = rng.uniform(_GAP, 1 - width - _GAP), rng.uniform(_GAP, 1 - height - _GAP)
        if all(
            x + width + _GAP < x1 or x2 + _GAP < x or y + height + _GAP < y1 or y2 + _GAP < y
            for x1, y1, x2, y2 in taken
        ):
            return float(x), float(y), float(x + width), float(y + height)
    return None


def _draw_relations(rng, described: tuple[SceneObject, ...]) -> tuple[tuple[int, str, int], ...]:
    """A relation for the first two objects and, of four, for the last two: those that are clear."""
    relations = []
    for i, j in ((0, 1), (2, 3)):
        if j >= len(described):
            continue
        name = relation_between(described[i], described[j])
        if name is not None and are_neighbours(described[i], described[j]) and rng.random() < 0.6:
            name = "next"
        if name is not None:
            relations.append((i, name, j))
    return tuple(relations)
