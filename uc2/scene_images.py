"""Paints a demo scene: flat shapes with outlines on a textured background, as a PIL image."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image, ImageDraw

from uc2.scene_layout import HORIZON, SETTINGS, Scene, SceneObject

COLOUR_RGB = {
    "red": (214, 40, 45), "blue": (40, 95, 215), "green": (35, 150, 65), "yellow": (248, 212, 50),
    "orange": (243, 132, 30), "purple": (135, 60, 175), "black": (48, 46, 52), "white": (246, 246, 244),
}  # fmt: skip
STUFF_RGB = {
    "sky": (178, 214, 240), "wall": (240, 214, 196), "grass": (158, 204, 128), "sand": (236, 216, 164),
    "snow": (228, 236, 244), "floor": (190, 150, 118),
}  # fmt: skip
OUTLINE = (32, 30, 38)
WOOD, LEAF, CREAM, METAL, GLASS = (
    (132, 88, 54),
    (70, 140, 70),
    (240, 226, 200),
    (150, 152, 160),
    (206, 232, 244),
)
OVERSAMPLING = 2  # shapes are painted larger and scaled down, for smooth edges


class Brush:
    """Draws inside one object's box with coordinates from (0, 0), top left, to (1, 1)."""

    def __init__(self, draw: ImageDraw.ImageDraw, box: tuple[float, ...], colour: tuple[int, int, int]):
        self.draw, self.colour = draw, colour
        self.x, self.y = box[0], box[1]
        self.width, self.height = box[2] - box[0], box[3] - box[1]
        self.pen = max(2, round(0.022 * (self.width + self.height)))
        self.dark = _mix(colour, (0, 0, 0), 0.28)
        self.light = _mix(colour, (255, 255, 255), 0.45)

    def _points(self, points) -> list[tuple[float, float]]:
        return [(self.x + x * self.width, self.y + y * self.height) for x, y in points]

    def polygon(self, *points, fill=None) -> None:
        self.draw.polygon(self._points(points), fill=fill or self.colour, outline=OUTLINE, width=self.pen)

    def box(self, x1, y1, x2, y2, fill=None, radius=0.0) -> None:
        (left, top), (right, bottom) = self._points([(x1, y1), (x2, y2)])
        self.draw.rounded_rectangle(
            (left, top, right, bottom), radius * self.width, fill or self.colour, OUTLINE, self.pen
        )

    def ellipse(self, x1, y1, x2, y2, fill=None) -> None:
        self.draw.ellipse(self._points([(x1, y1), (x2, y2)]), fill or self.colour, OUTLINE, self.pen)

    def fill(self, x1, y1, x2, y2) -> None:
        """An ellipse of the object's colour without an outline, to hide lines under it."""
        self.draw.ellipse(self._points([(x1, y1), (x2, y2)]), self.colour)

    def pie(self, x1, y1, x2, y2, start, end, fill=None) -> None:
        corners = self._points([(x1, y1), (x2, y2)])
        self.draw.pieslice(corners, start, end, fill or self.colour, OUTLINE, self.pen)

    def line(self, *points, fill=OUTLINE, thickness=1.0) -> None:
        self.draw.line(self._points(points), fill, max(1, round(self.pen * thickness)), joint="curve")

    def arc(self, x1, y1, x2, y2, start, end, fill=OUTLINE, thickness=1.0) -> None:
        corners = self._points([(x1, y1), (x2, y2)])
        self.draw.arc(corners, start, end, fill, max(1, round(self.pen * thickness)))


def render(scene: Scene, image_size: int, rng: np.random.Generator) -> Image.Image:
    """The scene as an RGB image of `image_size` x `image_size` pixels."""
    side = image_size * OVERSAMPLING
    canvas = _paint_background(scene.setting, side, rng)
    draw = ImageDraw.Draw(canvas)
    for thing in scene.objects:
        tint = tuple(int(np.clip(c + rng.integers(-8, 9), 0, 255)) for c in COLOUR_RGB[thing.colour])
        _paint_object(draw, thing, side, tint)
    return canvas.reduce(OVERSAMPLING)


def _paint_object(draw, thing: SceneObject, side: int, tint: tuple[int, int, int]) -> None:
    box = tuple(side * edge for edge in thing.box)
    PAINTERS[thing.kind](Brush(draw, box, tint))


def _mix(colour, other, share: float) -> tuple[int, int, int]:
    return tuple(round((1 - share) * a + share * b) for a, b in zip(colour, other, strict=True))


# --- background ---


def _paint_background(setting: str, side: int, rng: np.random.Generator) -> Image.Image:
    upper, lower = SETTINGS[setting]
    horizon = round(side * (HORIZON + rng.uniform(-0.06, 0.06)))
    rows = np.linspace(0, 1, side, dtype=np.float32)[:, None, None]
    ground = np.arange(side)[:, None, None] >= horizon
    base = np.where(ground, np.float32(STUFF_RGB[lower]), np.float32(STUFF_RGB[upper]))
    shading = np.where(ground, 12 - 24 * rows, 24 * rows - 6)
    image = np.clip(np.broadcast_to(base + shading, (side, side, 3)) + rng.integers(-6, 7, 3), 0, 255)
    canvas = Image.fromarray(image.astype(np.uint8))
    _TEXTURES[upper](ImageDraw.Draw(canvas), side, 0, horizon, rng)
    _TEXTURES[lower](ImageDraw.Draw(canvas), side, horizon, side, rng)
    return canvas


def _clouds(draw, side, top, bottom, rng) -> None:
    for _ in range(rng.integers(1, 4)):
        x, y, r = rng.uniform(0, side), rng.uniform(top, 0.7 * bottom), rng.uniform(0.03, 0.06) * side
        for dx, grow in ((-1.2, 0.7), (0, 1.0), (1.2, 0.75)):
            draw.ellipse(
                (x + dx * r - r * grow, y - r * grow, x + dx * r + r * grow, y + 0.7 * r), (232, 242, 250)
            )


def _wallpaper(draw, side, top, bottom, rng) -> None:
    step = side / rng.integers(7, 12)
    for x in np.arange(rng.uniform(0, step), side, step):
        draw.line((x, top, x, bottom), (230, 200, 180), max(2, side // 100))


def _tufts(draw, side, top, bottom, rng) -> None:
    for _ in range(rng.integers(14, 26)):
        x, y, h = rng.uniform(0, side), rng.uniform(top, bottom), rng.uniform(0.015, 0.03) * side
        for lean in (-0.5, 0, 0.5):
            draw.line((x, y, x + lean * h, y - h), (112, 170, 92), max(1, side // 160))


def _specks(colour, low: int, high: int, radius: float):
    def paint(draw, side, top, bottom, rng) -> None:
        for _ in range(rng.integers(low, high)):
            x, y, r = rng.uniform(0, side), rng.uniform(top, bottom), radius * rng.uniform(0.6, 1.4) * side
            draw.ellipse((x - r, y - 0.7 * r, x + r, y + 0.7 * r), colour)

    return paint


def _planks(draw, side, top, bottom, rng) -> None:
    step = side * rng.uniform(0.07, 0.1)
    for y in np.arange(top, bottom, step):
        draw.line((0, y, side, y), (164, 124, 94), max(2, side // 120))
        for x in rng.uniform(0, side, 3):
            draw.line((x, y, x, min(y + step, bottom)), (164, 124, 94), max(2, side // 120))


_TEXTURES = {
    "sky": _clouds,
    "wall": _wallpaper,
    "grass": _tufts,
    "sand": _specks((208, 184, 130), 30, 60, 0.006),
    "snow": _specks((250, 252, 255), 30, 60, 0.009),
    "floor": _planks,
}


# --- objects ---


def _ball(b: Brush) -> None:
    b.ellipse(0, 0, 1, 1)
    b.arc(-0.55, -0.1, 0.45, 1.1, -46, 46)
    b.arc(0.55, -0.1, 1.55, 1.1, 134, 226)
    b.line((0.5, 0.03), (0.5, 0.97))


def _house(b: Brush) -> None:
    b.box(0.12, 0.42, 0.88, 1)
    b.box(0.68, 0.1, 0.82, 0.4, fill=b.dark)
    b.polygon((0, 0.46), (0.5, 0), (1, 0.46), fill=b.dark)
    b.box(0.42, 0.64, 0.62, 1, fill=WOOD)
    b.box(0.19, 0.54, 0.36, 0.72, fill=GLASS)
    b.box(0.68, 0.54, 0.83, 0.72, fill=GLASS)


def _tree(b: Brush) -> None:
    b.box(0.4, 0.55, 0.6, 1, fill=WOOD)
    b.ellipse(0, 0.28, 0.56, 0.74)
    b.ellipse(0.44, 0.28, 1, 0.74)
    b.ellipse(0.16, 0, 0.84, 0.6)
    b.ellipse(0.28, 0.36, 0.72, 0.7)


def _car(b: Brush) -> None:
    b.polygon((0.2, 0.45), (0.32, 0.04), (0.68, 0.04), (0.84, 0.45))
    b.polygon((0.28, 0.42), (0.36, 0.14), (0.48, 0.14), (0.48, 0.42), fill=GLASS)
    b.polygon((0.54, 0.42), (0.54, 0.14), (0.65, 0.14), (0.75, 0.42), fill=GLASS)
    b.box(0, 0.4, 1, 0.82, radius=0.08)
    for x in (0.14, 0.62):
        b.ellipse(x, 0.58, x + 0.25, 1, fill=(60, 60, 66))
        b.ellipse(x + 0.08, 0.72, x + 0.17, 0.87, fill=METAL)


def _fish(b: Brush) -> None:
    b.polygon((0.62, 0.5), (1, 0.06), (0.92, 0.5), (1, 0.94), fill=b.dark)
    b.polygon((0.28, 0.25), (0.46, 0), (0.6, 0.25), fill=b.dark)
    b.ellipse(0, 0.12, 0.76, 0.88)
    b.arc(0.12, 0.2, 0.4, 0.8, -70, 70)
    b.ellipse(0.12, 0.34, 0.22, 0.5, fill=(255, 255, 255))
    b.polygon((0.38, 0.52), (0.58, 0.42), (0.56, 0.68), fill=b.dark)


def _star(b: Brush) -> None:
    angles = [math.pi * (k / 5 - 0.5) for k in range(10)]
    radii = [0.53 if k % 2 == 0 else 0.23 for k in range(10)]
    b.polygon(*((0.5 + r * math.cos(a), 0.53 + r * math.sin(a)) for a, r in zip(angles, radii, strict=True)))


def _cup(b: Brush) -> None:
    b.ellipse(0.56, 0.24, 1, 0.76, fill=b.dark)
    b.ellipse(0.66, 0.36, 0.9, 0.64, fill=CREAM)
    b.polygon((0, 0.1), (0.76, 0.1), (0.66, 1), (0.1, 1))
    b.ellipse(0, 0, 0.76, 0.22, fill=b.light)
    b.line((0.08, 0.5), (0.68, 0.5), fill=b.dark, thickness=1.6)


def _chair(b: Brush) -> None:
    b.box(0.06, 0, 0.24, 1)
    b.box(0.12, 0.06, 0.3, 0.5, fill=b.dark)
    b.box(0.78, 0.56, 0.96, 1)
    b.box(0.06, 0.48, 1, 0.64, radius=0.05)
    b.line((0.24, 0.82), (0.78, 0.82), thickness=1.6)


def _flower(b: Brush) -> None:
    b.line((0.5, 0.4), (0.5, 1), fill=LEAF, thickness=2.4)
    b.ellipse(0.5, 0.66, 0.92, 0.84, fill=LEAF)
    b.ellipse(0.08, 0.76, 0.5, 0.93, fill=LEAF)
    for k in range(6):
        x, y = 0.5 + 0.28 * math.cos(k * math.pi / 3), 0.29 + 0.19 * math.sin(k * math.pi / 3)
        b.ellipse(x - 0.21, y - 0.13, x + 0.21, y + 0.13)
    b.ellipse(0.34, 0.18, 0.66, 0.4, fill=CREAM)


def _boat(b: Brush) -> None:
    b.line((0.48, 0), (0.48, 0.7), fill=WOOD, thickness=2.0)
    b.polygon((0.53, 0.02), (0.53, 0.62), (0.95, 0.62), fill=CREAM)
    b.polygon((0.42, 0.12), (0.42, 0.62), (0.1, 0.62), fill=b.light)
    b.polygon((0, 0.68), (1, 0.68), (0.8, 1), (0.2, 1))


def _umbrella(b: Brush) -> None:
    b.line((0.5, 0.3), (0.5, 0.86), fill=WOOD, thickness=1.8)
    b.arc(0.5, 0.74, 0.74, 0.98, 0, 180, fill=WOOD, thickness=1.8)
    b.pie(0, 0.04, 1, 1.0, 180, 360)
    for x in (0, 0.333, 0.667):
        b.pie(x, 0.44, x + 0.333, 0.62, 180, 360, fill=CREAM)
    b.line((0.5, 0), (0.5, 0.44))
    b.arc(0.25, 0.04, 0.75, 1.0, 180, 360)


def _hat(b: Brush) -> None:
    b.ellipse(0, 0.66, 1, 1)
    b.box(0.22, 0, 0.78, 0.82, radius=0.1)
    b.box(0.22, 0.54, 0.78, 0.74, fill=b.light if sum(b.colour) < 300 else b.dark)


def _bell(b: Brush) -> None:
    b.ellipse(0.4, 0, 0.6, 0.2, fill=METAL)
    b.ellipse(0.38, 0.78, 0.62, 1, fill=METAL)
    b.pie(0.16, 0.1, 0.84, 0.9, 180, 360)
    b.polygon((0.16, 0.48), (0.84, 0.48), (1, 0.86), (0, 0.86))
    b.line((0.19, 0.49), (0.81, 0.49), fill=b.colour, thickness=2.2)
    b.line((0.08, 0.72), (0.92, 0.72), fill=b.dark, thickness=1.6)


def _kite(b: Brush) -> None:
    b.line((0.5, 0.7), (0.36, 0.82), (0.56, 0.9), (0.42, 1), thickness=1.2)
    b.polygon((0.5, 0), (1, 0.3), (0.5, 0.74), (0, 0.3))
    b.polygon((0.5, 0), (1, 0.3), (0.5, 0.3), fill=b.light)
    b.polygon((0.5, 0.3), (0.5, 0.74), (0, 0.3), fill=b.light)
    b.polygon((0.3, 0.78), (0.3, 0.9), (0.46, 0.82), fill=b.dark)
    b.polygon((0.64, 0.84), (0.66, 0.97), (0.48, 0.9), fill=b.dark)


def _book(b: Brush) -> None:
    b.polygon((0, 0.1), (0.5, 0.22), (1, 0.1), (1, 0.9), (0.5, 1), (0, 0.9))
    b.polygon((0.06, 0), (0.5, 0.14), (0.5, 0.9), (0.06, 0.78), fill=CREAM)
    b.polygon((0.94, 0), (0.5, 0.14), (0.5, 0.9), (0.94, 0.78), fill=CREAM)
    for y in (0.24, 0.42, 0.6):
        b.line((0.13, y - 0.04), (0.43, y + 0.05), fill=b.colour, thickness=2.0)
        b.line((0.57, y + 0.05), (0.87, y - 0.04), fill=b.colour, thickness=2.0)


def _key(b: Brush) -> None:
    b.box(0.3, 0.4, 1, 0.6)
    b.box(0.86, 0.5, 1, 0.96)
    b.box(0.66, 0.5, 0.78, 0.86)
    b.ellipse(0, 0.02, 0.46, 0.98)
    b.ellipse(0.13, 0.3, 0.32, 0.7, fill=CREAM)


def _mushroom(b: Brush) -> None:
    b.box(0.32, 0.45, 0.68, 1, fill=CREAM, radius=0.1)
    b.pie(0, 0, 1, 1.1, 180, 360)
    spots = (255, 255, 255) if sum(b.colour) < 680 else METAL
    for x, y, r in ((0.28, 0.36, 0.09), (0.55, 0.2, 0.11), (0.76, 0.42, 0.08)):
        b.ellipse(x - r, y - r, x + r, y + r, fill=spots)


def _ladder(b: Brush) -> None:
    for y in (0.1, 0.28, 0.46, 0.64, 0.82):
        b.box(0.1, y, 0.9, y + 0.075)
    b.box(0, 0, 0.2, 1)
    b.box(0.8, 0, 1, 1)


def _apple(b: Brush) -> None:
    b.line((0.5, 0.3), (0.54, 0.02), fill=WOOD, thickness=2.0)
    b.ellipse(0.54, 0.02, 0.88, 0.2, fill=LEAF)
    b.ellipse(0, 0.2, 0.64, 0.98)
    b.ellipse(0.36, 0.2, 1, 0.98)
    b.fill(0.2, 0.27, 0.8, 0.93)
    b.arc(0.12, 0.32, 0.5, 0.8, 150, 240, fill=b.light, thickness=1.8)


def _bird(b: Brush) -> None:
    b.polygon((0.12, 0.22), (0, 0.32), (0.14, 0.38), fill=(244, 170, 50))
    b.polygon((0.7, 0.5), (1, 0.3), (0.98, 0.62), fill=b.dark)
    b.line((0.42, 0.82), (0.4, 1), thickness=1.3)
    b.line((0.56, 0.82), (0.58, 1), thickness=1.3)
    b.ellipse(0.16, 0.26, 0.84, 0.88)
    b.ellipse(0.1, 0, 0.46, 0.5)
    b.ellipse(0.2, 0.14, 0.28, 0.26, fill=(255, 255, 255))
    b.pie(0.36, 0.2, 0.82, 0.76, 10, 170, fill=b.dark)


def _cat(b: Brush) -> None:
    b.polygon((0.06, 0.46), (0.06, 0), (0.44, 0.22))
    b.polygon((0.94, 0.46), (0.94, 0), (0.56, 0.22))
    b.ellipse(0, 0.14, 1, 1)
    for x in (0.24, 0.6):
        b.ellipse(x, 0.4, x + 0.16, 0.58, fill=(220, 240, 160))
        b.ellipse(x + 0.06, 0.43, x + 0.1, 0.55, fill=OUTLINE)
    b.polygon((0.44, 0.64), (0.56, 0.64), (0.5, 0.71), fill=(240, 150, 160))
    for y in (0.64, 0.74):
        b.line((0.04, y), (0.34, 0.7), fill=METAL, thickness=0.8)
        b.line((0.96, y), (0.66, 0.7), fill=METAL, thickness=0.8)


def _butterfly(b: Brush) -> None:
    for left in (0.0, 0.54):
        b.ellipse(left, 0.08, left + 0.46, 0.6)
        b.ellipse(left + 0.05, 0.5, left + 0.41, 0.98, fill=b.light if sum(b.colour) < 600 else b.dark)
        b.ellipse(left + 0.15, 0.22, left + 0.31, 0.44, fill=CREAM)
    b.ellipse(0.44, 0.14, 0.56, 0.92, fill=WOOD)
    b.line((0.48, 0.16), (0.38, 0))
    b.line((0.52, 0.16), (0.62, 0))


def _heart(b: Brush) -> None:
    curve = [t * math.pi / 24 for t in range(48)]
    b.polygon(
        *(
            (
                0.5 + math.sin(t) ** 3 / 2,
                0.44 - (13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t)) / 29,
            )
            for t in curve
        )
    )
    b.arc(0.14, 0.14, 0.46, 0.5, 170, 260, fill=b.light, thickness=1.8)


def _lamp(b: Brush) -> None:
    b.box(0.44, 0.4, 0.56, 0.92, fill=METAL)
    b.ellipse(0.16, 0.86, 0.84, 1, fill=METAL)
    b.polygon((0.28, 0), (0.72, 0), (1, 0.5), (0, 0.5))
    b.line((0.8, 0.52), (0.8, 0.7), thickness=1.0)


PAINTERS = {
    "ball": _ball, "house": _house, "tree": _tree, "car": _car, "fish": _fish, "star": _star, "cup": _cup,
    "chair": _chair, "flower": _flower, "boat": _boat, "umbrella": _umbrella, "hat": _hat, "bell": _bell,
    "kite": _kite, "book": _book, "key": _key, "mushroom": _mushroom, "ladder": _ladder, "apple": _apple,
    "bird": _bird, "cat": _cat, "butterfly": _butterfly, "heart": _heart, "lamp": _lamp,
}  # fmt: skip
