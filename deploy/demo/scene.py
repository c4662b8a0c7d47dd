"""A small world the project draws itself: machine parts on a conveyor belt, with exact boxes and track ids.

What flows through::

    seed → World (belt, light, camera) → bodies (which part lies where, how fast) → for each frame:
    belt → shadow and metal of each body, in a patch of its own → light, blur, sensor noise → Scene

A part is a pair of fields over its own plane: its *outline* (a signed distance, negative inside, in units of the part's
radius) and its *relief* (height above the belt, same units). Everything else follows from the two: coverage, box and
shadow from the outline; metal from the slope of the relief.

Pixels are BGR. Image axes: x to the right, y down; pixel (row, column) has its centre at (column + 0.5, row + 0.5).
The belt runs to the right. Numpy only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

CLASS_NAMES: tuple[str, ...] = ("nut", "bolt", "washer", "gear")

Field = npt.NDArray[np.floating[Any]]
Colour = tuple[float, float, float]

REFERENCE_SIDE = 320.0  # sizes below are pixels of an image whose shorter side is this long
RADII = ((19.0, 31.0), (36.0, 52.0), (18.0, 31.0), (25.0, 41.0))  # nut, bolt (half its length), washer, gear
CLEARANCE = 0.70  # two parts stay this share of their summed radii apart: they overlap in part, none disappears
INSIDE = 0.35  # of its radius: how far inside the image the centre of a still part lies, at least
RAIL = 0.065  # of the image height: each of the two side rails
CROSSING_SECONDS = 4.0  # the belt carries a part from one image edge to the other
SLIP = 0.10  # parts run up to this much faster or slower than the belt

METALS: tuple[Colour, ...] = (
    (200, 197, 192),  # steel
    (212, 204, 190),  # zinc, bluish
    (128, 188, 214),  # yellow zinc
    (92, 164, 206),  # brass
    (98, 132, 190),  # copper
    (96, 92, 90),  # black oxide
)
BELTS: tuple[Colour, ...] = ((84, 82, 78), (118, 96, 66), (84, 112, 58), (62, 58, 56), (126, 122, 116), (104, 108, 70))
RAIL_COLOUR: Colour = (176, 172, 168)


@dataclass(frozen=True)
class Part:
    """One part that is mostly in view. The box is tight around its silhouette, in pixels, clipped to the image."""

    class_id: int
    x1: float
    y1: float
    x2: float
    y2: float
    track_id: int | None


@dataclass(frozen=True)
class Scene:
    """One picture and what is in it. `image`: height x width x 3, uint8, BGR."""

    image: npt.NDArray[np.uint8]
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Body:
    """A part before it is seen: where its centre is at frame 0, how it lies, and what it is made of."""

    class_id: int
    x: float
    y: float
    radius: float
    speed: float  # pixels per frame
    angle: float  # radians
    variant: float  # 0..1, picks the proportions within the class
    metal: Colour

    def x_at(self, frame: int) -> float:
        """The x of its centre, in pixels, at a frame."""
        return self.x + self.speed * frame


@dataclass(frozen=True)
class Light:
    """One lamp: a unit vector towards it (z up from the belt), the fall-off it leaves on the picture, its colour."""

    x: float
    y: float
    z: float
    falloff: Field  # height x width x 1
    tint: Field  # BGR


@dataclass(frozen=True)
class Camera:
    """How the picture is spoilt: defocus and motion smear in pixels (smear is odd, 1 for none), noise in levels."""

    defocus: float
    smear: int
    noise: float


@dataclass(frozen=True)
class World:
    """Everything that stays the same over a clip. `belt`: height x width x 3, periodic in x."""

    width: int
    height: int
    belt: Field
    rails: Field  # height x 4: BGR and opacity
    light: Light
    camera: Camera


def draw_scene(seed: int, width: int = 480, height: int = 320) -> Scene:
    """One still picture of the belt. The same seed and size give the same scene; parts carry no track id."""
    rng = np.random.default_rng((seed, 0))
    world = _make_world(rng, width, height, smear=rng.uniform(0, 1.6) * _scale(width, height))
    bodies = _scatter(rng, world, count=int(rng.integers(3, 15)), speed=0.0, frames=1)
    return _render(rng, world, [(None, body) for body in bodies], frame=0)


def draw_clip(seed: int, frames: int = 60, width: int = 480, height: int = 320, fps: float = 15) -> Iterator[Scene]:
    """A recorded clip: the belt carries parts in on the left and out on the right.

    A part is listed while its centre is in view, under one track id from its first frame to its last. Ids count up
    from 1 in order of arrival.
    """
    rng = np.random.default_rng((seed, 1))
    speed = width / (CROSSING_SECONDS * fps)
    world = _make_world(rng, width, height, smear=speed / 6)
    crossings = 1 + speed * frames / width
    bodies = _scatter(rng, world, count=round(9 * crossings), speed=speed, frames=frames)
    tracks = list(enumerate(sorted(bodies, key=lambda body: -body.x / body.speed), start=1))
    for frame in range(frames):
        yield _render(rng, world, tracks, frame, belt_shift=round(speed * frame))


# ---- the world: belt, rails, light, camera


def _make_world(rng: np.random.Generator, width: int, height: int, smear: float) -> World:
    defocus = rng.uniform(0, 0.8) * _scale(width, height)
    camera = Camera(defocus, smear=2 * round(smear) + 1, noise=rng.uniform(1.5, 5))
    return World(width, height, _belt(rng, width, height), _rails(height), _lamp(rng, width, height), camera)


def _scale(width: int, height: int) -> float:
    """How much larger an image is than the one the sizes are given for."""
    return min(width, height) / REFERENCE_SIDE


def _belt(rng: np.random.Generator, width: int, height: int) -> Field:
    """Woven rubber: a base colour, stains, scuffs along the way it runs, a weave, and the splice of its two ends."""
    stains = _noise(rng, width, height, columns=9, rows=9) - 0.5
    scuffs = _noise(rng, width, height, columns=6, rows=height // 2) - 0.5
    threads = max(1, width // 6)
    x = np.arange(width, dtype=np.float32) * np.float32(2 * np.pi * threads / width)
    y = np.arange(height, dtype=np.float32)[:, None] * np.float32(2 * np.pi * threads / width)
    weave = np.sin(x + y) * np.sin(x - y)
    splice = np.exp(-(((np.arange(width, dtype=np.float32) - width * rng.uniform()) * 160 / width) ** 2))
    tone = 1 + 0.22 * stains + 0.06 * scuffs + rng.uniform(0.03, 0.09) * weave - 0.25 * splice
    colour = np.asarray(BELTS[rng.integers(len(BELTS))], np.float32) * np.float32(rng.uniform(0.8, 1.25))
    return tone[..., None].astype(np.float32) * colour


def _rails(height: int) -> Field:
    """Two aluminium side rails and the shade they throw on the belt: a profile over y, BGR and opacity."""
    edge = np.minimum(np.arange(height) + 0.5, height - np.arange(height) - 0.5) / (RAIL * height)
    ridge = 0.72 + 0.3 * np.sin(np.pi * np.clip(edge, 0, 1)) - 0.35 * np.exp(-(((edge - 0.55) * 14) ** 2))
    on_rail = np.clip((1 - edge) * RAIL * height + 0.5, 0, 1)
    shade = 0.6 * np.exp(-np.clip(edge - 1, 0, None) * 2.5)
    colour = np.asarray(RAIL_COLOUR) * (ridge * on_rail)[:, None]
    return np.column_stack((colour, np.maximum(on_rail, shade))).astype(np.float32)


def _lamp(rng: np.random.Generator, width: int, height: int) -> Light:
    azimuth, elevation = np.radians(rng.uniform(-155, -25)), np.radians(rng.uniform(40, 60))
    x, y = np.cos(azimuth) * np.cos(elevation), np.sin(azimuth) * np.cos(elevation)
    across = np.linspace(-1, 1, width, dtype=np.float32) - np.float32(0.7 * x)
    down = np.linspace(-1, 1, height, dtype=np.float32)[:, None] - np.float32(0.7 * y)
    falloff = rng.uniform(0.88, 1.16) * (1.14 - rng.uniform(0.1, 0.24) * (across**2 + down**2))
    warmth = rng.uniform(-0.05, 0.05)
    tint = np.asarray((1 - warmth, 1, 1 + warmth), np.float32)
    return Light(float(x), float(y), float(np.sin(elevation)), falloff[..., None].astype(np.float32), tint)


def _noise(rng: np.random.Generator, width: int, height: int, columns: int, rows: int) -> Field:
    """Smooth noise 0..1, height x width: a coarse random grid between whose knots we interpolate; periodic in x."""
    grid = rng.random((rows + 1, columns), dtype=np.float32)
    grid = np.concatenate((grid, grid[:, :1]), axis=1)
    return _hats(height, rows + 1) @ grid @ _hats(width, columns + 1).T


def _hats(samples: int, knots: int) -> Field:
    """Weights of linear interpolation, samples x knots: each row spreads one sample over its two nearest knots."""
    at = np.linspace(0, knots - 1, samples, endpoint=False, dtype=np.float32)[:, None]
    weights: Field = np.clip(1 - np.abs(at - np.arange(knots, dtype=np.float32)), 0, 1)
    return weights


# ---- what lies on the belt


def _scatter(rng: np.random.Generator, world: World, count: int, speed: float, frames: int) -> list[Body]:
    """Up to `count` bodies, placed so that none is ever hidden under the others: see CLEARANCE."""
    bodies: list[Body] = []
    for _ in range(count * 3):
        body = _random_body(rng, world, speed, frames)
        if all(_keep_clear(body, other, world.width, frames) for other in bodies):
            bodies.append(body)
        if len(bodies) == count:
            break
    return bodies


def _random_body(rng: np.random.Generator, world: World, speed: float, frames: int) -> Body:
    class_id = int(rng.integers(len(CLASS_NAMES)))
    radius = rng.uniform(*RADII[class_id]) * _scale(world.width, world.height)
    own_speed = speed * rng.uniform(1 - SLIP, 1 + SLIP)
    upstream = own_speed * frames
    margin = INSIDE * radius
    rail = RAIL * world.height + radius
    metal = np.asarray(METALS[rng.integers(len(METALS))]) * rng.uniform(0.85, 1.1)
    return Body(
        class_id=class_id,
        x=rng.uniform(margin - upstream, world.width - margin),
        y=rng.uniform(rail, max(rail, world.height - rail)),
        radius=radius,
        speed=own_speed,
        angle=rng.uniform(0, 2 * np.pi),
        variant=rng.uniform(),
        metal=(float(metal[0]), float(metal[1]), float(metal[2])),
    )


def _keep_clear(one: Body, other: Body, width: int, frames: int) -> bool:
    """Whether the two stay CLEARANCE apart in every frame that shows both."""
    (enter, leave), (other_enter, other_leave) = _in_view(one, width, frames), _in_view(other, width, frames)
    first, last = max(enter, other_enter), min(leave, other_leave)
    if first > last:
        return True
    gaps = one.x_at(first) - other.x_at(first), one.x_at(last) - other.x_at(last)
    along = 0.0 if gaps[0] * gaps[1] < 0 else min(abs(gaps[0]), abs(gaps[1]))
    return bool(np.hypot(along, one.y - other.y) > CLEARANCE * (one.radius + other.radius))


def _in_view(body: Body, width: int, frames: int) -> tuple[int, int]:
    """The first and last frame in which any of the body is inside the image."""
    if body.speed == 0:
        return 0, frames - 1
    enter = np.ceil((-body.radius - body.x) / body.speed)
    leave = np.floor((width + body.radius - body.x) / body.speed)
    return max(0, int(enter)), min(frames - 1, int(leave))


# ---- the shapes: (u, v) in radii from the centre, and a variant 0..1 → outline and relief, both in radii


def _nut(u: Field, v: Field, variant: float) -> tuple[Field, Field]:
    """A hexagon with chamfered corners and a threaded hole."""
    bore = 0.42 + 0.1 * variant
    r = np.hypot(u, v)
    outline = np.maximum(_hexagon(u, v, 0.866), bore - r)
    corner_chamfer = 0.6 * np.clip(r - 0.84, 0, None)
    thread = np.clip((bore + 0.16 - r) / 0.16, 0, 1) * (0.16 + 0.05 * np.sin(r * 110))
    return outline, 0.45 * _rounded(outline, 0.06) - corner_chamfer - thread


def _bolt(u: Field, v: Field, variant: float) -> tuple[Field, Field]:
    """Seen from the side: a hexagonal head on the left, a threaded shank to the right."""
    shank, head, shoulder = 0.15 + 0.05 * variant, 0.3 + 0.07 * variant, -0.68
    pitch = 2 * np.pi / 0.105
    ripple = np.sin(u * pitch + 2.2 * v / shank) * np.clip((u - shoulder - 0.5 * variant) * 12, 0, 1)
    taper = np.clip(u - 0.9, 0, None) * 0.9
    shank_half = shank + 0.012 * ripple - taper
    shank_outline = np.maximum(np.abs(v) - shank_half, np.maximum(u - 1, shoulder - 0.05 - u))
    head_outline = np.maximum(np.abs(v) - head, np.abs(u - (shoulder - 1) / 2) - (shoulder + 1) / 2)
    round_shank = np.sqrt(np.clip(shank**2 - v**2, 0, None)) + 0.02 * ripple
    facets = head * (1 - 0.55 * np.clip(np.abs(v) / head - 0.5, 0, None)) - 0.12 * (1 - _rounded(head_outline, 0.08))
    return np.minimum(shank_outline, head_outline), np.where(head_outline < 0, facets, round_shank)


def _washer(u: Field, v: Field, variant: float) -> tuple[Field, Field]:
    """A flat ring."""
    bore = 0.46 + 0.16 * variant
    r = np.hypot(u, v)
    outline = np.maximum(r - 1, bore - r)
    return outline, 0.12 * _rounded(outline, 0.07)


def _gear(u: Field, v: Field, variant: float) -> tuple[Field, Field]:
    """A spur gear: teeth, a recessed web with or without holes, a hub and its bore."""
    teeth, spokes = 10 + int(variant * 8), 4 + int(variant * 97) % 3
    r, theta = np.hypot(u, v), np.arctan2(v, u)
    outline = np.maximum(_toothed_rim(r, theta, teeth), 0.2 - r)
    if int(variant * 31) % 3:
        turn = (theta * spokes / (2 * np.pi)) % 1 * (2 * np.pi / spokes) - np.pi / spokes
        outline = np.maximum(outline, 0.115 - np.hypot(r * np.cos(turn) - 0.53, r * np.sin(turn)))
    web = _ramp(r, 0.34, 0.38) * _ramp(-r, -0.74, -0.69)
    return outline, 0.32 * _rounded(outline, 0.06) - 0.1 * web


def _toothed_rim(r: Field, theta: Field, teeth: int) -> Field:
    """Distance to a rim that swings between root and tip in flattened waves; divided by its slope to stay metric."""
    depth, flatness = 0.1, 1.5
    root = 1 - 2 * depth
    wave = flatness * np.cos(teeth * theta)
    slope = np.where(np.abs(wave) < 1, depth * flatness * teeth * np.sin(teeth * theta), 0)
    rim = root + depth * (1 + np.clip(wave, -1, 1))
    outline: Field = np.minimum((r - rim) / np.hypot(1, slope / np.maximum(r, root)), r - root)
    return outline


def _hexagon(u: Field, v: Field, apothem: float) -> Field:
    outline: Field = np.maximum(np.abs(v), 0.866 * np.abs(u) + 0.5 * np.abs(v)) - apothem
    return outline


def _rounded(outline: Field, width: float) -> Field:
    """0 at the edge, 1 from `width` inwards: a quarter circle between, as of a broken edge."""
    bend: Field = np.clip(1 + outline / width, 0, 1)
    return np.sqrt(1 - bend**2)


def _ramp(value: Field, low: float, high: float) -> Field:
    """Smoothly 0 below `low`, 1 above `high`."""
    t: Field = np.clip((value - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)


SHAPES: tuple[Callable[[Field, Field, float], tuple[Field, Field]], ...] = (_nut, _bolt, _washer, _gear)
THICKNESS = (0.42, 0.22, 0.13, 0.3)  # in radii, for the shadow


# ---- from bodies to a picture


@dataclass(frozen=True)
class Patch:
    """The part of the image one body can reach, and the body's fields there: all rows x columns, in pixels."""

    window: tuple[slice, slice]
    centre: tuple[float, float]  # x, y
    x: Field  # pixel centres, 1 x columns
    y: Field  # pixel centres, rows x 1
    outline: Field
    relief: Field


def _render(
    rng: np.random.Generator, world: World, tracks: Sequence[tuple[int | None, Body]], frame: int, belt_shift: int = 0
) -> Scene:
    canvas = np.roll(world.belt, belt_shift, axis=1)
    canvas = canvas * (1 - world.rails[:, None, 3:]) + world.rails[:, None, :3]
    parts = []
    for track_id, body in tracks:
        patch = _patch(body, frame, world)
        if patch is None:
            continue
        _paint(canvas, patch, body, world.light)
        if 0 <= patch.centre[0] <= world.width:
            parts.append(_label(patch, body.class_id, track_id, world))
    return Scene(_expose(rng, canvas, world), tuple(parts))


def _patch(body: Body, frame: int, world: World) -> Patch | None:
    """The body's fields where it, its soft edge or its shadow can be; None when that is outside the image."""
    x = body.x_at(frame)
    reach = body.radius * (1.1 + 2 * THICKNESS[body.class_id])
    left, right = max(0, int(x - reach)), min(world.width, int(x + reach) + 1)
    top, bottom = max(0, int(body.y - reach)), min(world.height, int(body.y + reach) + 1)
    if right - left < 2 or bottom - top < 2:
        return None
    xs = np.arange(left, right, dtype=np.float32)[None, :] + np.float32(0.5)
    ys = np.arange(top, bottom, dtype=np.float32)[:, None] + np.float32(0.5)
    outline, relief = _fields(body, xs - np.float32(x), ys - np.float32(body.y))
    return Patch((slice(top, bottom), slice(left, right)), (x, body.y), xs, ys, outline, relief)


def _fields(body: Body, dx: Field, dy: Field) -> tuple[Field, Field]:
    """Outline and relief, in pixels, at offsets from the body's centre."""
    across, down = np.float32(np.cos(body.angle) / body.radius), np.float32(np.sin(body.angle) / body.radius)
    outline, relief = SHAPES[body.class_id](dx * across + dy * down, dy * across - dx * down, body.variant)
    return outline * np.float32(body.radius), relief * np.float32(body.radius)


def _label(patch: Patch, class_id: int, track_id: int | None, world: World) -> Part:
    """The tight box: every pixel inside the outline holds a disc that reaches to it; the box is that of all discs."""
    inside = np.minimum(patch.outline, 0)
    x1 = np.where(inside < 0, patch.x + inside, np.inf).min()
    y1 = np.where(inside < 0, patch.y + inside, np.inf).min()
    x2 = np.where(inside < 0, patch.x - inside, -np.inf).max()
    y2 = np.where(inside < 0, patch.y - inside, -np.inf).max()
    x1, x2 = np.clip((x1, x2), 0, world.width)
    y1, y2 = np.clip((y1, y2), 0, world.height)
    return Part(class_id, float(x1), float(y1), float(x2), float(y2), track_id)


def _paint(canvas: Field, patch: Patch, body: Body, light: Light) -> None:
    """Lay the body's shadow and then its metal on the canvas, in place."""
    ground = canvas[patch.window] * (1 - _shadow(patch, body, light))[..., None]
    coverage = np.clip(0.5 - patch.outline, 0, 1)[..., None]
    canvas[patch.window] = ground + coverage * (_metal(patch, body, light) - ground)


def _shadow(patch: Patch, body: Body, light: Light) -> Field:
    """Opacity 0..1. The outline moved away from the lamp, for half and for full height, with a soft edge."""
    thickness = THICKNESS[body.class_id] * body.radius
    centre_x, centre_y = patch.centre
    outlines = []
    for height in (0.5 * thickness, thickness):
        dx, dy = -light.x / light.z * height, -light.y / light.z * height
        outlines.append(_fields(body, patch.x - np.float32(centre_x + dx), patch.y - np.float32(centre_y + dy))[0])
    softness = 1.5 + 0.4 * thickness
    return 0.62 * _ramp(-np.minimum(*outlines), -softness, softness)


def _metal(patch: Patch, body: Body, light: Light) -> Field:
    """Rows x columns x 3: lamp light by the slope of the relief, a highlight, the sky it mirrors, turning marks."""
    slope_y, slope_x = np.gradient(patch.relief)
    upright = 1 / np.sqrt(1 + slope_x**2 + slope_y**2)
    lit = np.clip((light.z - slope_x * light.x - slope_y * light.y) * upright, 0, 1)
    half_z = math.sqrt((1 + light.z) / 2)
    glint = (half_z - (slope_x * light.x + slope_y * light.y) / (2 * half_z)) * upright
    sky = 0.16 * slope_y * upright
    tone = 0.24 + 0.62 * lit - sky + _turning_marks(patch, body, light)
    metal: Field = tone[..., None] * np.asarray(body.metal, np.float32)
    highlight: Field = 150 * np.clip(glint, 0, 1)[..., None] ** 40
    return metal + highlight


def _turning_marks(patch: Patch, body: Body, light: Light) -> Field:
    """Lathe marks gather the light in a bow tie across it; fine rings follow the tool."""
    dx, dy = patch.x - np.float32(patch.centre[0]), patch.y - np.float32(patch.centre[1])
    r = np.hypot(dx, dy)
    across = ((dx * light.x + dy * light.y) / np.maximum(r, 1)) ** 2 / (light.x**2 + light.y**2)
    marks: Field = 0.2 * (across - 0.5) + 0.03 * np.sin(r * (2.1 + body.variant))
    return marks


def _expose(rng: np.random.Generator, canvas: Field, world: World) -> npt.NDArray[np.uint8]:
    """Lamp fall-off and tint, then what the camera does to it."""
    picture = (canvas * world.light.falloff * world.light.tint).astype(np.float32)
    defocus, smear = _bell(world.camera.defocus), np.full(world.camera.smear, 1 / world.camera.smear, np.float32)
    picture = _blur(picture, defocus, axis=0)
    picture = _blur(picture, np.convolve(defocus, smear), axis=1)
    picture += rng.standard_normal(picture.shape, np.float32) * np.float32(world.camera.noise)
    return np.clip(picture, 0, 255).astype(np.uint8)


def _blur(picture: Field, weights: Field, axis: int) -> Field:
    """A weighted mean of neighbours along one axis; the border pixel goes on beyond the border."""
    reach, length = len(weights) // 2, picture.shape[axis]
    if reach == 0:
        return picture
    padding = [(0, 0)] * 3
    padding[axis] = (reach, reach)
    wide = np.pad(picture, padding, mode="edge")
    total = np.zeros_like(picture)
    for offset, weight in enumerate(weights):
        window = slice(offset, offset + length)
        total += weight * (wide[window] if axis == 0 else wide[:, window])
    return total


def _bell(sigma: float) -> Field:
    """Weights of a normal distribution, `sigma` in pixels; a single 1 for hardly any."""
    reach = int(np.ceil(2 * sigma)) if sigma > 0.2 else 0
    bell: Field = np.exp(-0.5 * (np.arange(-reach, reach + 1, dtype=np.float32) / np.float32(max(sigma, 0.2))) ** 2)
    return bell / float(bell.sum())
