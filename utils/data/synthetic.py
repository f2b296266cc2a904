"""Synthetic portal-venous abdominal CT with FLARE22 labels, for demos and tests without data.

Every structure is a union of tapered tubes (polylines of nodes ``(x, y, r)``) given at the top and
the bottom of the imaged range and interpolated in between.  One table, ``STRUCTURES``, lists them
in paint order: a later row is painted over an earlier one.

Anatomical frame of the table: millimetres of a reference patient, x to the LEFT, y POSTERIOR (LPS),
origin in the midline 22 mm in front of the vertebral body centre.  The level ``s`` runs from 0
(top, about T12, oesophageal hiatus) to 1 (bottom, about L2, renal hilum).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from scipy import ndimage
from skimage import measure

SIZE = 256  # pixels per side of a slice
OVERSAMPLE = 2  # sub-pixels per pixel and axis, averaged for the partial volume effect
AIR, FAT, MUSCLE = -1000.0, -100.0, 55.0
MIN_PIXELS = 16  # a smaller cross-section would not be annotated
WALL_AXES = (148.0, 108.0)  # outer semi-axes of the muscular trunk wall (x, y), mm
WALL_CENTRE_Y = -6.0
WALL_THICKNESS = 11.0

Branches = tuple[tuple[tuple[float, float, float], ...], ...]  # nodes (x, y, r) of each tube
Field = np.ndarray  # float, (rows, columns)


@dataclass(frozen=True)
class SyntheticPatient:
    """One patient, array order (z, y, x) in LPS: x to the left, y posterior, z superior.

    Attributes:
        hu: int16 (slices, H, W), Hounsfield units.
        labels: uint8 (slices, H, W), FLARE22 label ids, 0 is background.
        spacing: (sz, sy, sx) in mm.
    """

    hu: np.ndarray
    labels: np.ndarray
    spacing: tuple[float, float, float]


@dataclass(frozen=True)
class Structure:
    """One row of the table; lengths in mm, attenuation in HU, levels in s.

    A node radius may be zero or negative: that end of the tube is then absent at that level.
    """

    name: str
    hu: float
    top: Branches
    bottom: Branches
    label: int = 0
    levels: tuple[float, float] = (-1.0, 2.0)  # s range in which it exists
    layers: tuple[tuple[float, float], ...] = ()  # (depth below the surface, HU) towards the inside
    gas: float = 0.0  # fraction of the lumen's height filled with air (anterior, supine patient)
    halo: float = 0.0  # width of the fat painted around it first
    rough: float = 0.8  # SD of the surface irregularity
    grain: float = 22.0  # wavelength of that irregularity
    blend: float = 4.0  # rounding where segments meet
    move: float = 1.0  # SD of the patient-to-patient shift
    clip: bool = True  # stay inside the trunk wall


def _mirror(row: Structure, name: str) -> Structure:
    """The same structure on the other side of the midline."""
    top, bottom = (
        tuple(tuple((-x, y, r) for x, y, r in nodes) for nodes in branches)
        for branches in (row.top, row.bottom)
    )
    return replace(row, name=name, top=top, bottom=bottom)


def _loop(number: int, x: float, y: float, radius: float, first: float) -> Structure:
    """A small bowel loop: enhancing wall, fluid or a little gas inside."""
    nodes = (((x - 6, y + 3, radius), (x + 6, y - 3, radius)),)
    gas = 0.35 if number % 4 == 0 else 0.0
    return Structure(f"small bowel {number}", 75, nodes, nodes, levels=(first, 2.0),
                     layers=((2.5, 28.0),), gas=gas, rough=1.5, grain=14, move=4)  # fmt: skip


# fmt: off
_LOOPS = (
    (34, -62, 13, 0.30), (60, -46, 14, 0.30), (84, -34, 13, 0.25), (54, -22, 11, 0.45),
    (82, -6, 12, 0.35), (74, -70, 14, 0.35), (32, -84, 12, 0.55), (-8, -72, 12, 0.60),
    (-36, -74, 11, 0.60), (30, -38, 10, 0.60), (96, -58, 12, 0.45), (6, -88, 11, 0.70),
)

_ERECTOR = Structure("left erector spinae", 58, (((20, 70, 18), (44, 72, 17), (64, 70, 9)),),
    (((20, 72, 18), (42, 74, 18), (64, 70, 12)),), layers=((9, 50.0),), clip=False, rough=1.2)
_PSOAS = Structure("left psoas", 58, (((25, 30, -2),),), (((31, 30, 12), (30, 36, 12)),),
    levels=(0.3, 2.0))
_QUADRATUS = Structure("left quadratus lumborum", 55, (((58, 64, 2), (72, 62, 2)),), (((54, 62, 7),
    (70, 62, 6)),), levels=(0.3, 2.0), clip=False)  # fmt: skip
_TRANSVERSE = Structure("left transverse process", 330, (((10, 45, 4), (30, 52, 3.5)),),
    (((10, 45, 4), (36, 50, 3)),), layers=((2, 190.0),), clip=False, rough=0.4, move=0)

STRUCTURES: tuple[Structure, ...] = (
    # Bowel first: it fills what the organs leave free.
    *(_loop(i, *row) for i, row in enumerate(_LOOPS)),
    Structure("splenic flexure", 55, (((96, -66, 15), (112, -38, 14)),), (((112, -34, 17),
        (110, 0, 17)),), layers=((2.5, 5.0),), gas=0.55, rough=2.0, grain=18, move=4),
    Structure("hepatic flexure", 55, (((-72, -40, 12),),), (((-80, -58, 15), (-72, -26, 17)),),
        levels=(0.6, 2.0), layers=((2.5, 10.0),), gas=0.45, rough=2.0, grain=18, move=4),
    Structure("liver", 110, (((-92, 38, 44), (-88, -25, 52), (-45, -52, 48), (6, -66, 33),
        (56, -86, 16)), ((-30, -30, 16), (-40, -40, 16)), ((-66, 8, 26), (-70, 24, 26))),
        (((-114, 34, 20), (-112, -4, 28), (-104, -40, 28), (-74, -74, 16), (-34, -86, -2)),
        ((-34, -30, -8), (-44, -40, -8)), ((-80, 8, -4), (-82, 24, -4))), label=1, rough=1.2,
        grain=28, blend=6, move=3),
    Structure("spleen", 120, (((120, -22, 12), (114, 20, 25), (86, 58, 26), (62, 70, 12)),),
        (((130, 6, 9), (122, 30, 15), (108, 54, 13), (94, 66, 3)),), label=3, levels=(-1, 1.02),
        rough=1.5, grain=26, blend=6, move=3),
    Structure("stomach", 62, (((76, 13, 20), (71, -18, 30), (56, -48, 26), (38, -58, 15)),),
        (((80, -46, 8), (58, -64, 16), (22, -74, 15), (-16, -66, 12)),), label=11,
        layers=((3.5, 32.0),), gas=0.18, rough=2.0, grain=22, blend=8, move=4),
    Structure("transverse colon", 55, (((-52, -82, 8), (0, -87, 10), (60, -84, 9)),),
        (((-62, -82, 14), (-5, -91, 12), (62, -88, 14)),), levels=(0.62, 2.0), layers=((2.5, 0.0),),
        gas=0.4, rough=2.6, grain=16, move=4),
    # Retroperitoneum, from back to front.
    _PSOAS, _mirror(_PSOAS, "right psoas"),
    _QUADRATUS, _mirror(_QUADRATUS, "right quadratus lumborum"),
    Structure("right kidney", 178, (((-54, 26, 12), (-58, 36, 14), (-57, 44, 12)),),
        (((-49, 18, 14), (-68, 32, 16), (-58, 53, 15)),), label=2, levels=(0.22, 2),
        layers=((6, 158.0),), halo=2.5, move=2, rough=1.0),
    Structure("left kidney", 178, (((56, 24, 12), (60, 34, 14), (58, 43, 12)),), (((49, 16, 14),
        (68, 30, 16), (58, 52, 15)),), label=13, levels=(0.1, 2), layers=((6, 158.0),), halo=2.5,
        move=2, rough=1.0),
    Structure("right renal sinus", -75, (((-52, 37, -5), (-40, 33, -6)),), (((-54, 38, 8),
        (-34, 32, 5)),), levels=(0.4, 2), rough=1.2, grain=10, move=0),
    Structure("left renal sinus", -75, (((52, 36, -5), (40, 32, -6)),), (((54, 36, 8),
        (34, 30, 5)),), levels=(0.4, 2), rough=1.2, grain=10, move=0),
    Structure("pancreas", 97, (((-26, -38, -6), (0, -44, 4), (36, -38, 10), (60, -22, 10),
        (80, -6, 10)), ((-18, -32, -8), (-4, -30, -8))), (((-27, -38, 14), (-4, -50, 9),
        (28, -50, 6), (52, -40, 4), (70, -28, 1)), ((-22, -30, 10), (-4, -29, 5))), label=4,
        levels=(0.16, 2), rough=1.7, grain=9, move=1.5),
    Structure("duodenum", 66, (((-40, -58, 10), (-30, -54, 9)),), (((-48, -42, 11),
        (-46, -28, 10)),), label=12, levels=(0.45, 2), layers=((3.0, 42.0),), rough=1.0, grain=14,
        move=1.5),
    Structure("gallbladder", 10, (((-50, -46, 6), (-58, -60, 9)),), (((-58, -56, 7),
        (-66, -70, 10.5)),), label=9, levels=(0.4, 2), rough=0.6, move=2),
    Structure("right diaphragmatic crus", 60, (((4, -20, 3.5), (-10, -13, 4), (-20, 2, 4),
        (-25, 18, 4)),), (((-10, -4, 2), (-14, -2, 3), (-20, 4, 3.5), (-24, 14, 3)),), rough=0.5,
        move=0),
    Structure("left diaphragmatic crus", 60, (((8, -20, 3.5), (20, -14, 4), (24, 0, 4),
        (27, 18, 4)),), (((17, -4, 2), (19, -2, 3), (22, 4, 3.5), (25, 14, 3)),), rough=0.5,
        move=0),
    Structure("portal and superior mesenteric vein", 165, (((-44, -44, 5), (-26, -38, 6.5)),),
        (((-4, -40, 6), (-5, -39, 6)),), rough=0.3),
    Structure("splenic vein", 165, (((-20, -37, 5), (10, -27, 4), (40, -26, 3.3), (66, -8, 2.6)),),
        (((-8, -38, 4), (12, -32, 3.5), (34, -34, 3), (58, -18, 2.6)),), levels=(0.2, 0.62),
        rough=1.0, grain=12),
    Structure("superior mesenteric artery", 165, (((8, -19, 4),),), (((7, -33, 3.5),),),
        levels=(0.3, 2), rough=0.2),
    Structure("left renal vein", 155, (((46, 30, 3), (28, 0, 4), (6, -22, 3), (-14, -16, 4)),),
        (((46, 34, 3), (28, 2, 4), (7, -23, 3), (-14, -14, 4)),), levels=(0.62, 0.84), rough=0.4),
    Structure("inferior vena cava", 142, (((-21, -19, 10.5), (-29, -20, 9)),), (((-20, -13, 10),
        (-28, -12, 8.5)),), label=6, rough=0.5, move=1.2),
    Structure("aorta", 168, (((9, -6, 11),),), (((7, -9, 9.5),),), label=5, rough=0.3, move=0.8),
    # The thin glands come last, so that no neighbour cuts them.
    Structure("right adrenal gland", 80, (((-31, -9, 2.9), (-35, 3, 2.8), (-42, 16, 2.2)),
        ((-35, 3, 2.5), (-30, 13, 2.0))), (((-33, -3, 2.9), (-37, 7, 2.8), (-43, 18, 2.2)),
        ((-37, 7, 2.5), (-32, 16, 2.0))), label=7, levels=(0.04, 0.56), rough=0.35, grain=8,
        blend=1, move=1),
    Structure("left adrenal gland", 80, (((37, -14, 2.6), (34, -4, 2.8), (29, 9, 2.0)),
        ((34, -4, 2.5), (47, 11, 2.0))), (((35, -21, 2.7), (34, -8, 2.8), (30, 4, 2.1)),
        ((34, -8, 2.5), (46, 7, 2.1))), label=8, levels=(0.04, 0.62), rough=0.35, grain=8, blend=1,
        move=1),
    Structure("esophagus", 44, (((12, -27, 5.8), (18, -28, 5.8)),), (((18, -29, 5.8),
        (30, -36, 5.8)),), label=10, levels=(-1, 0.33), layers=((3.5, 38.0),), rough=0.5, move=1),
    # Back and spine.
    _ERECTOR, _mirror(_ERECTOR, "right erector spinae"),
    _TRANSVERSE, _mirror(_TRANSVERSE, "right transverse process"),
    Structure("vertebral arch", 330, (((0, 47, 13),),), (((0, 47, 13),),), layers=((3, 210.0),),
        clip=False, rough=0.5, move=0),
    Structure("spinous process", 320, (((0, 58, 4), (0, 78, 3.5)),), (((0, 58, 4), (0, 76, 5)),),
        layers=((2, 190.0),), clip=False, rough=0.4, move=0),
    Structure("vertebral body", 380, (((-6, 22, 16.5), (6, 22, 16.5)),), (((-8, 22, 17),
        (8, 22, 17)),), layers=((1.8, 190.0),), clip=False, rough=0.5, blend=2, move=0),
    Structure("spinal canal", 10, (((-2, 46, 8), (2, 46, 8)),), (((-3, 46, 8), (3, 46, 8)),),
        layers=((3.0, 35.0),), clip=False, rough=0.2, move=0),
)
# fmt: on


def _noise_lattice(rng: np.random.Generator, extent: float, wavelength: float) -> np.ndarray:
    """White noise (3 levels, n, n) on a square lattice that covers ``extent`` mm."""
    n = int(np.ceil(extent / wavelength)) + 3
    return rng.standard_normal((3, n, n))


def _smooth_noise(
    lattice: np.ndarray, s: float, rows: np.ndarray, columns: np.ndarray, wavelength: float
) -> Field:
    """Smooth noise of about unit SD at level ``s``; rows and columns in mm from the lattice edge.

    Gaussian interpolation of the lattice; einsum, not BLAS, so the bits do not depend on threads.
    """

    def weights(position: np.ndarray) -> np.ndarray:
        gap = position[:, None] / wavelength - np.arange(lattice.shape[1])[None]
        w = np.exp(-0.5 * (gap / 0.55) ** 2)
        return w / np.sqrt((w**2).sum(axis=1, keepdims=True))

    u = np.exp(-0.5 * ((np.clip(s, 0, 1) - np.array([0.0, 0.5, 1.0])) / 0.3) ** 2)
    plane = np.einsum("k,kij->ij", u / np.sqrt((u**2).sum()), lattice)
    half = np.einsum("ri,ij->rj", weights(rows), plane)
    return np.einsum("rj,cj->rc", half, weights(columns)).astype(np.float32)


def _superellipse(x: Field, y: Field, a: float, b: float, power: float = 2.4) -> Field:
    """Approximate signed distance (mm, negative inside) to a superellipse around the origin."""
    r = ((np.abs(x) / a) ** power + (np.abs(y) / b) ** power) ** (1 / power)
    return np.hypot(x, y) * (1 - 1 / np.maximum(r, 1e-3))


def _tubes(x: Field, y: Field, branches: list[np.ndarray], blend: float) -> Field:
    """Signed distance (mm, negative inside) to tapered polyline tubes, smoothly united."""
    field = np.full(x.shape, 1e3, np.float32)
    for nodes in branches:
        for (ax, ay, ar), (bx, by, br) in pairwise(nodes):
            dx, dy = bx - ax, by - ay
            t = ((x - ax) * dx + (y - ay) * dy) / max(dx * dx + dy * dy, 1e-6)
            t = np.clip(t, 0, 1)
            near = np.hypot(x - ax - t * dx, y - ay - t * dy) - (ar + t * (br - ar))
            h = np.maximum(blend - np.abs(field - near), 0) / blend
            field = np.minimum(field, near) - h * h * (blend / 4)
    return field


class _Slice:
    """A slice being painted on the fine grid: HU, labels and warped anatomical coordinates."""

    def __init__(self, x: Field, y: Field, rows: np.ndarray, columns: np.ndarray, s: float):
        self.x, self.y, self.rows, self.columns, self.s = x, y, rows, columns, s
        self.warp = float(max(np.abs(x - columns).max(), np.abs(y - rows[:, None]).max()))
        self.hu = np.full(x.shape, AIR, np.float32)
        self.labels = np.zeros(x.shape, np.uint8)
        self.wall = _superellipse(x, y - WALL_CENTRE_Y, *WALL_AXES)
        self.cavity = self.wall + WALL_THICKNESS

    def window(self, branches: list[np.ndarray], margin: float) -> tuple[slice, slice]:
        """The part of the grid that the branches, widened by ``margin`` mm, can reach."""
        nodes = np.concatenate(branches)
        reach = np.maximum(nodes[:, 2], 0) + margin + self.warp
        box = []
        for axis, k in ((self.rows, 1), (self.columns, 0)):
            low, high = (nodes[:, k] - reach).min(), (nodes[:, k] + reach).max()
            box.append(slice(*np.searchsorted(axis, [low, high])))
        return box[0], box[1]


def _nodes_at(row: Structure, s: float, shift: np.ndarray, grow: float) -> list[np.ndarray]:
    """The nodes of a structure at level ``s``: one (n, 3) array per branch."""
    result = []
    # The top nodes hold where the organ begins, the bottom nodes where it ends.
    start, stop = max(row.levels[0], 0.0), min(row.levels[1], 1.0)
    u = np.clip((s - start) / (stop - start), 0, 1)
    # Organs round off towards their poles.
    cap = min(1.0, 0.55 + 4 * min(s - row.levels[0], row.levels[1] - s))
    for top, bottom in zip(row.top, row.bottom, strict=True):
        count = max(len(top), len(bottom), 2)  # a single node is a disc
        ends = [np.array((n * count)[:count] if len(n) == 1 else n, float) for n in (top, bottom)]
        nodes = (1 - u) * ends[0] + u * ends[1]
        nodes[:, :2] += shift
        nodes[:, 2] *= grow * np.where(nodes[:, 2] > 0, cap, 1.0)
        result.append(nodes)
    return result


def _paint(cut: _Slice, row: Structure, nodes: list[np.ndarray], irregular: np.ndarray) -> None:
    """Paint one structure with its halo, layers and gas into the slice."""
    box = cut.window(nodes, 1 + row.halo + 3.5 * row.rough + row.blend / 4)
    if min(b.stop - b.start for b in box) < 2:
        return
    x, y, hu, labels = cut.x[box], cut.y[box], cut.hu[box], cut.labels[box]
    field = _tubes(x, y, nodes, row.blend)
    rows, columns = cut.rows[box[0]] - cut.rows[0], cut.columns[box[1]] - cut.columns[0]
    noise = _smooth_noise(irregular, cut.s, rows, columns, row.grain)
    field += row.rough * noise
    if row.clip:
        field = np.maximum(field, cut.cavity[box])
    if row.halo:
        around = (field < row.halo + noise) & (cut.cavity[box] < 0)
        hu[around], labels[around] = FAT, 0
    inside = field < 0
    hu[inside], labels[inside] = row.hu, row.label
    lumen = inside
    for depth, value in row.layers:
        lumen = field < -depth
        hu[lumen] = value
    if row.gas and lumen.any():
        front, back = y[lumen].min(), y[lumen].max()
        hu[lumen & (y < front + row.gas * (back - front))] = -950.0


def _paint_trunk(cut: _Slice, fat: np.ndarray, lung: float, strands: Field, streaks: Field) -> None:
    """Skin, subcutaneous fat, the muscular wall, the fat-filled cavity and the lung's recess.

    Args:
        cut: the slice; its ``cavity`` field excludes the lung afterwards.
        fat: thickness of subcutaneous fat at the sides, and at front and back, mm.
        lung: depth of the posterior costophrenic recess at the top, mm.
        strands, streaks: fine and coarse noise of unit SD, for the vessels within the visceral fat
            and the fat planes of the wall.
    """
    x, y, wall = cut.x, cut.y, cut.wall
    a, b = WALL_AXES
    skin = _superellipse(x, y - WALL_CENTRE_Y, a + fat[0], b + fat[1])
    skin += 9 * np.exp(-((x / 16) ** 2)) * (y > 20)  # the groove over the spinous processes
    cut.hu[skin < 0] = 20.0
    cut.hu[skin < -2] = FAT
    cut.hu[(wall < 0) & (skin < -4)] = MUSCLE
    # Fat planes between the oblique muscles, and the linea alba in front.
    layered = (np.abs(wall + 4.5 + streaks) < 0.8) & (y < 70)
    cut.hu[layered] = -60.0
    cut.hu[(wall < 0) & (np.abs(x) < 3) & (y < 0)] = -20.0
    cut.hu[wall < -WALL_THICKNESS] = FAT
    cut.hu[(wall < -WALL_THICKNESS) & (strands > 2.0)] = -30.0
    depth = max(0.0, 1 - cut.s / 0.3) * lung
    depth = depth * np.clip((y - 10) / 40, 0, 1) * np.clip((np.abs(x) - 30) / 30, 0, 1)
    cut.cavity = wall + WALL_THICKNESS + depth
    cut.hu[(wall < -WALL_THICKNESS) & (cut.cavity > 0)] = -830.0


def _paint_ribs(cut: _Slice, phase: float) -> None:
    """Obliquely cut ribs within the wall; they move forwards from slice to slice."""
    (a, b), inset = WALL_AXES, 5.5
    count = 5 if cut.s < 0.5 else 4
    for side in (-1, 1):
        for k in range(count):
            # 0 points to the side, 90 degrees to the back
            centre = np.deg2rad(68 - 28 * k - 14 * cut.s + phase)
            angle = centre + np.deg2rad(np.array([-3.5, 0, 3.5]) * (0.7 + 0.25 * (k % 3)))
            c, s = np.cos(angle), np.sin(angle)
            r = ((np.abs(c) / (a - inset)) ** 2.4 + (np.abs(s) / (b - inset)) ** 2.4) ** (-1 / 2.4)
            nodes = np.stack([side * r * c, r * s + WALL_CENTRE_Y, np.full(3, 4.4)], axis=1)
            box = cut.window([nodes], 1)
            field = _tubes(cut.x[box], cut.y[box], [nodes], 2.0)
            cut.hu[box][field < 0] = 400.0
            cut.hu[box][field < -1.9] = 170.0


def _paint_liver_vessels(cut: _Slice, veins: np.ndarray) -> None:
    """Sections of hepatic and portal veins: brighter, but still labelled as liver.

    ``veins``: (n, 6) x, y, direction (rad), length, radius and drift from top to bottom (mm).
    """
    for x, y, angle, length, radius, drift in veins:
        along = np.array([np.cos(angle), np.sin(angle)])
        middle = np.array([x, y]) + drift * (cut.s - 0.5) * along[::-1]
        bend = middle + 0.15 * length * np.array([-along[1], along[0]])
        points = [middle - 0.5 * length * along, bend, middle + 0.5 * length * along]
        nodes = np.column_stack([points, radius * np.array([1.0, 0.8, 0.4])])
        box = cut.window([nodes], 1)
        vein = (_tubes(cut.x[box], cut.y[box], [nodes], 2.0) < 0) & (cut.labels[box] == 1)
        cut.hu[box][vein] = np.maximum(cut.hu[box][vein], 145.0)


def _remove_specks(labels: np.ndarray, minimum: int, hu: Field | None = None) -> None:
    """Keep the largest component of every label, in place; the rest takes what lies beside it."""
    for region in measure.regionprops(labels):
        grown = tuple(slice(max(b.start - 4, 0), b.stop + 4) for b in region.slice)
        part = labels[grown]
        mask = part == region.label
        components = measure.label(mask, connectivity=1)
        sizes = np.bincount(components.ravel())[1:]
        if len(sizes) == 1 and sizes[0] >= minimum:
            continue
        wrong = mask & (components != sizes.argmax() + 1) if sizes.max() >= minimum else mask
        index = ndimage.distance_transform_edt(mask, return_distances=False, return_indices=True)
        part[wrong] = part[tuple(index)][wrong]
        if hu is not None:
            hu[grown][wrong] = hu[grown][tuple(index)][wrong]


def _blocks(fine: np.ndarray) -> np.ndarray:
    """(k * H, k * W) -> (k * k, H, W): the sub-pixels of every pixel."""
    k, n = OVERSAMPLE, SIZE
    return fine.reshape(n, k, n, k).transpose(1, 3, 0, 2).reshape(k * k, n, n)


def _majority(fine: np.ndarray) -> np.ndarray:
    """The most frequent sub-pixel label of every pixel."""
    sub = _blocks(fine)
    votes = (sub[:, None] == sub[None]).sum(axis=0)
    return np.take_along_axis(sub, votes.argmax(axis=0)[None], axis=0)[0]


def _ct_noise(rng: np.random.Generator, sd: float) -> Field:
    """Quantum noise through a soft band-pass reconstruction kernel: (H, W), given SD in HU."""
    white = rng.standard_normal((SIZE, SIZE))
    noise = ndimage.gaussian_filter(white, 0.75) - 0.8 * ndimage.gaussian_filter(white, 2.2)
    return sd * noise / noise.std()


def make_patient(rng: np.random.Generator, slices: int = 4) -> SyntheticPatient:
    """Draw one patient and render the CT.

    Args:
        rng: the only source of randomness.
        slices: number of axial slices, from the lowest to the highest, spread over the same
            anatomical range whatever their number.
    """
    scale = rng.uniform([0.90, 0.92], [1.0, 1.05])  # (x, y) size relative to the reference
    fat = rng.uniform([6, 8], [26, 26])
    half_width = scale[0] * (WALL_AXES[0] + fat[0])
    pixel = round(float(np.clip(2 * (half_width + rng.uniform(4, 14)) / SIZE, 1.40, 1.50)), 3)
    thickness = round(float(rng.uniform(10, 12)), 1)
    centre = rng.uniform(-4, 4, 2)
    lean = 1.05 - 0.13 * (fat.mean() - 7) / 19  # more visceral fat leaves less room for the bowel
    noise_sd = rng.uniform(10, 15)
    phase_hu = rng.normal(0, 5)  # shared by all enhancing organs
    rib_phase = rng.uniform(-7, 7)
    offsets = rng.uniform(-0.05, 0.05)
    levels = np.linspace(0.92, 0.08, slices) if slices > 1 else np.array([0.5])

    fine = (np.arange(SIZE * OVERSAMPLE) + 0.5) * pixel / OVERSAMPLE - pixel * SIZE / 2
    columns, rows = (fine - centre[0]) / scale[0], (fine - centre[1]) / scale[1]
    extent = float(max(np.ptp(columns), np.ptp(rows)))
    # Displacement in three bands: posture, organ position, outline.
    bands = [(120.0, 5.0), (55.0, 3.0), (22.0, 0.8)]
    warp = [[_noise_lattice(rng, extent, w) for w, _ in bands] for _ in range(2)]
    texture = [_noise_lattice(rng, extent, w) for w in (5.0, 16.0)]
    drawn = []
    for row in STRUCTURES:
        shift = rng.normal(0, row.move, 2) if row.move else np.zeros(2)
        bowel = row.label == 0 and bool(row.gas or "bowel" in row.name)
        grow = float(np.clip(rng.normal(1, 0.05), 0.88, 1.12)) * (lean if bowel else 1.0)
        low, high = np.array(row.levels) + rng.normal(0, 0.03, 2)
        hu = row.hu + rng.normal(0, 4) + (phase_hu if row.label not in (0, 9) else 0)
        gas = row.gas * rng.uniform(0.3, 1.3)
        row = replace(row, levels=(float(low), float(high)), hu=float(hu), gas=float(gas))
        drawn.append((row, shift, grow, _noise_lattice(rng, extent, row.grain)))
    veins = rng.uniform([-130, -90, 0, 2, 1.2, -40], [-30, 60, np.pi, 32, 2.9, 40], (24, 6))
    lung = rng.uniform(4, 20)

    hu = np.empty((slices, SIZE, SIZE), np.int16)
    labels = np.empty((slices, SIZE, SIZE), np.uint8)
    grid_x, grid_y = np.meshgrid(columns.astype(np.float32), rows.astype(np.float32))
    # Bone does not give way: less displacement near the spine.
    stiff = 1 - 0.75 * np.exp(-(grid_x**2 + (grid_y - 32) ** 2) / 45**2)
    for z, s in enumerate(levels + offsets):

        def noise(lattice: np.ndarray, wavelength: float, s: float = s) -> Field:
            return _smooth_noise(lattice, s, rows - rows[0], columns - columns[0], wavelength)

        move = [
            sum(size * noise(g, w) for g, (w, size) in zip(axis, bands, strict=True))
            for axis in warp
        ]
        cut = _Slice(grid_x + stiff * move[0], grid_y + stiff * move[1], rows, columns, float(s))
        grain, streak = (noise(g, w) for g, w in zip(texture, (5.0, 16.0), strict=True))
        _paint_trunk(cut, fat, lung, grain, streak)
        _paint_ribs(cut, rib_phase)
        for row, shift, grow, irregular in drawn:
            if row.levels[0] <= s <= row.levels[1]:
                _paint(cut, row, _nodes_at(row, float(s), shift, grow), irregular)
        _paint_liver_vessels(cut, veins)
        _remove_specks(cut.labels, MIN_PIXELS * OVERSAMPLE**2, cut.hu)

        body = cut.hu > -300
        cut.hu[body] += 5 * grain[body] + 3 * streak[body]
        blurred = ndimage.gaussian_filter(cut.hu, 0.45 * OVERSAMPLE)  # the scanner's sharpness
        image = _blocks(blurred).mean(axis=0) + _ct_noise(rng, noise_sd)
        hu[z] = np.clip(np.rint(image), -1024, 3071)
        labels[z] = _majority(cut.labels)
        _remove_specks(labels[z], MIN_PIXELS)
    return SyntheticPatient(hu, labels, (thickness, pixel, pixel))


def write_patients(folder: Path, patients: int = 16, slices: int = 4, seed: int = 0) -> list[str]:
    """Write synthetic patients in the FLARE22 layout and return the case names.

    Files: ``images/demo_01_0000.nii.gz`` (int16 HU) and ``labels/demo_01.nii.gz`` (uint8), with
    identity direction (LPS), origin 0 and spacing in mm. Each patient has a generator derived from
    (seed, patient number); the same seed gives the same bytes.
    """
    names = [f"demo_{number:02d}" for number in range(1, patients + 1)]
    for kind in ("images", "labels"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names, start=1):
        patient = make_patient(np.random.default_rng([seed, number]), slices)
        files = {f"images/{name}_0000": patient.hu, f"labels/{name}": patient.labels}
        for file, array in files.items():
            image = sitk.GetImageFromArray(array)
            image.SetSpacing(patient.spacing[::-1])
            sitk.WriteImage(image, str(folder / f"{file}.nii.gz"), useCompression=True)
    return names
