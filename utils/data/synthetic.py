"""Synthetic portal-venous abdominal CT with FLARE22's 13 organs, for demos and tests without data.

Every structure is a union of tapered tubes, given at the top and at the bottom of the imaged range
and interpolated between them. `STRUCTURES` lists them in the order in which they are painted.

Positions are millimetres of a reference patient in LPS (x to the left, y posterior), from the
midline, 22 mm in front of the centre of the vertebral body. The level `s` runs from 0 (top, about
T12, where the esophagus passes the diaphragm) to 1 (bottom, about L2, at the renal hilum).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import SimpleITK as sitk
from scipy import ndimage

SIZE = 256  # pixels per side of a slice
AIR, GAS, LUNG, FAT, MUSCLE = -1000, -950, -830, -100, 55  # HU
MIN_PIXELS = 16  # a smaller cross-section would not be annotated
WALL_AXES = (148.0, 108.0)  # outer semi-axes (x, y) of the muscular trunk wall, mm
WALL_CENTRE_Y = -6.0
WALL_THICKNESS = 11.0
REACH = 15.0  # around its tubes, what a structure's halo and irregularities can reach, mm

Tubes = tuple[tuple[tuple[float, ...], ...], ...]  # of nodes: x, y, radius at the top, the bottom
Field = np.ndarray  # float32 (SIZE, SIZE); of signed distances: mm, negative inside


class SyntheticPatient(NamedTuple):
    """One patient in LPS; array order (z, y, x): x to the left, y posterior, z superior."""

    hu: np.ndarray  # int16 (slices, H, W), Hounsfield units
    labels: np.ndarray  # uint8 (slices, H, W), FLARE22 label ids, 0 is background
    spacing: tuple[float, float, float]  # (sz, sy, sx) in mm


@dataclass(frozen=True)
class Structure:
    """A structure; lengths in mm. A tube ends where the radius of its nodes is negative."""

    name: str
    label: int
    hu: float
    tubes: Tubes
    levels: tuple[float, float] = (-1, 2)  # s between which it exists
    core: tuple[float, float] = (99, 0)  # how deep it begins, and its HU
    gas: float = 0  # share of the core's height that is filled with air, in front
    halo: float = 0  # width of the fat around it
    rough: float = 0.8  # SD of the irregularities of its surface
    move: float = 1  # SD of its position between patients
    paired: bool = False  # painted on both sides
    clipped: bool = True  # stays within the trunk wall


BOWEL = {"rough": 1.8, "move": 4}
# fmt: off
LOOPS = (  # of small bowel: x, y, radius, and the level at which it begins
    (34, -62, 13, 0.30), (60, -46, 14, 0.30), (84, -34, 13, 0.25), (54, -22, 11, 0.45),
    (82, -6, 12, 0.35), (74, -70, 14, 0.35), (32, -84, 12, 0.55), (-8, -72, 12, 0.60),
    (-36, -74, 11, 0.60), (30, -38, 10, 0.60), (96, -58, 12, 0.45), (6, -88, 11, 0.70),
)
STRUCTURES: tuple[Structure, ...] = (
    # Bowel first: it fills what the organs leave free.
    *(Structure("small bowel", 0, 75, (((x - 6, y + 3, r) * 2, (x + 6, y - 3, r) * 2),), (s, 2),
        core=(2.5, 28), gas=0 if n % 4 else 0.35, **BOWEL) for n, (x, y, r, s) in enumerate(LOOPS)),
    Structure("splenic flexure", 0, 55, (((96, -66, 15, 112, -34, 17), (112, -38, 14, 110, 0, 17)),
        ), core=(2.5, 5), gas=0.55, **BOWEL),
    Structure("liver", 1, 110, (
        ((-92, 38, 44, -114, 34, 20), (-88, -25, 52, -112, -4, 28), (-45, -52, 48, -104, -40, 28),
         (6, -66, 33, -74, -74, 16), (56, -86, 16, -34, -86, -2)),
        ((-30, -30, 16, -34, -30, -8), (-40, -40, 16, -44, -40, -8)),
        ((-66, 8, 26, -80, 8, -4), (-70, 24, 26, -82, 24, -4))), rough=1, move=3),
    Structure("spleen", 3, 120, (((120, -22, 12, 130, 6, 9), (114, 20, 25, 122, 30, 15),
        (86, 58, 26, 108, 54, 13), (62, 70, 12, 94, 66, 3)),), (-1, 1.02), rough=1.2, move=3),
    Structure("stomach", 11, 62, (((76, 13, 20, 80, -46, 8), (71, -18, 30, 58, -64, 16),
        (56, -48, 26, 22, -74, 15), (38, -58, 15, -16, -66, 12)),),
        core=(3.5, 32), gas=0.18, **BOWEL),
    Structure("transverse colon", 0, 55, (((-52, -82, 8, -62, -82, 14), (0, -87, 10, -5, -91, 12),
        (60, -84, 9, 62, -88, 14)),), (0.62, 2), core=(2.5, 0), gas=0.4, **BOWEL),
    # Retroperitoneum, from back to front.
    Structure("psoas", 0, 58, (((25, 30, -2, 31, 30, 12), (25, 30, -2, 30, 36, 12)),), (0.3, 2),
        paired=True),
    Structure("right kidney", 2, 178, (((-54, 26, 12, -49, 18, 14), (-58, 36, 14, -68, 32, 16),
        (-57, 44, 12, -58, 53, 15)),), (0.22, 2), core=(6, 158), halo=2.5, move=2),
    Structure("left kidney", 13, 178, (((56, 24, 12, 49, 16, 14), (60, 34, 14, 68, 30, 16),
        (58, 43, 12, 58, 52, 15)),), (0.1, 2), core=(6, 158), halo=2.5, move=2),
    Structure("renal sinus", 0, -75, (((53, 37, -5, 54, 37, 8), (40, 32, -6, 34, 31, 5)),),
        (0.4, 2), rough=1.2, move=0, paired=True),
    Structure("pancreas", 4, 97, (
        ((-26, -38, -6, -27, -38, 14), (0, -44, 4, -4, -50, 9), (36, -38, 10, 28, -50, 6),
         (60, -22, 10, 52, -40, 4), (80, -6, 10, 70, -28, 1)),
        ((-18, -32, -8, -22, -30, 10), (-4, -30, -8, -4, -29, 5))),
        (0.16, 2), rough=1.7, move=1.5),
    Structure("duodenum", 12, 66, (((-40, -58, 10, -48, -42, 11), (-30, -54, 9, -46, -28, 10)),),
        (0.45, 2), core=(3, 42), move=1.5),
    Structure("gallbladder", 9, 10, (((-50, -46, 6, -58, -56, 7), (-58, -60, 9, -66, -70, 10.5)),),
        (0.4, 2), rough=0.6, move=2),
    Structure("diaphragmatic crus", 0, 60, (((6, -20, 3.5, 14, -4, 2), (15, -14, 4, 17, -2, 3),
        (22, 0, 4, 21, 4, 3.5), (26, 18, 4, 25, 14, 3)),), rough=0.5, move=0, paired=True),
    Structure("portal and superior mesenteric vein", 0, 165,
        (((-44, -44, 5, -4, -40, 6), (-26, -38, 6.5, -5, -39, 6)),), rough=0.3),
    Structure("splenic vein", 0, 165, (((-20, -37, 5, -8, -38, 4), (10, -27, 4, 12, -32, 3.5),
        (40, -26, 3.3, 34, -34, 3), (66, -8, 2.6, 58, -18, 2.6)),), (0.2, 0.62)),
    Structure("inferior vena cava", 6, 142, (((-21, -19, 10.5, -20, -13, 10),
        (-29, -20, 9, -28, -12, 8.5)),), rough=0.5),
    Structure("aorta", 5, 168, (((9, -6, 11, 7, -9, 9.5),),), rough=0.3),
    # The thin glands come last, so that no neighbour cuts them.
    Structure("right adrenal gland", 7, 80, (
        ((-31, -9, 2.9, -33, -3, 2.9), (-35, 3, 2.8, -37, 7, 2.8), (-42, 16, 2.2, -43, 18, 2.2)),
        ((-35, 3, 2.5, -37, 7, 2.5), (-30, 13, 2, -32, 16, 2))), (0.04, 0.56), rough=0.35),
    Structure("left adrenal gland", 8, 80, (
        ((37, -14, 2.6, 35, -21, 2.7), (34, -4, 2.8, 34, -8, 2.8), (29, 9, 2, 30, 4, 2.1)),
        ((34, -4, 2.5, 34, -8, 2.5), (47, 11, 2, 46, 7, 2.1))), (0.04, 0.62), rough=0.35),
    Structure("esophagus", 10, 44, (((12, -27, 5.8, 18, -29, 5.8), (18, -28, 5.8, 30, -36, 5.8)),),
        (-1, 0.33), core=(3.5, 38), rough=0.5),
    # Back and spine.
    Structure("erector spinae", 0, 58, (((20, 70, 18, 20, 72, 18), (44, 72, 17, 42, 74, 18),
        (64, 70, 9, 64, 70, 12)),), core=(9, 50), paired=True, clipped=False),
    Structure("vertebral arch and processes", 0, 330, (((0, 47, 13) * 2,), ((0, 58, 4) * 2,
        (0, 78, 3.5, 0, 76, 5)), ((10, 45, 4) * 2, (30, 52, 3.5, 36, 50, 3))),
        core=(2.2, 200), rough=0.4, move=0, paired=True, clipped=False),
    Structure("vertebral body", 0, 380, (((-6, 22, 16.5, -8, 22, 17), (6, 22, 16.5, 8, 22, 17)),),
        core=(1.8, 190), rough=0.5, move=0),
    Structure("spinal canal", 0, 10, (((-2, 46, 8, -3, 46, 8), (2, 46, 8, 3, 46, 8)),),
        core=(3, 35), rough=0.2, move=0),
)
# fmt: on


def _smooth_noise(rng: np.random.Generator, wavelength_px: float) -> np.ndarray:
    """Periodic smooth noise (2, SIZE, SIZE), mean 0 and SD 1: for the top and the bottom."""
    spectrum = np.fft.fft2(rng.standard_normal((2, SIZE, SIZE)))
    noise = np.fft.ifft2(ndimage.fourier_gaussian(spectrum, [0, *[0.55 * wavelength_px] * 2])).real
    noise -= noise.mean(axis=(1, 2), keepdims=True)
    return (noise / noise.std(axis=(1, 2), keepdims=True)).astype(np.float32)


def _noise_at(noise: np.ndarray, s: float) -> Field:
    """Noise at level s; its SD is that of the top and the bottom."""
    angle = float(np.clip(s, 0, 1)) * np.pi / 2
    return float(np.cos(angle)) * noise[0] + float(np.sin(angle)) * noise[1]


def _superellipse(x: Field, y: Field, a: float, b: float) -> Field:
    """Approximate signed distance to a superellipse of semi-axes a, b around the wall's centre."""
    y = y - WALL_CENTRE_Y
    r = ((np.abs(x) / a) ** 2.4 + (np.abs(y) / b) ** 2.4) ** (1 / 2.4)
    return np.hypot(x, y) * (1 - 1 / np.maximum(r, 1e-3))


def _tubes(x: Field, y: Field, tubes: list[np.ndarray]) -> Field:
    """Signed distance to tubes of nodes (n, 3) x, y, radius, rounded where segments meet."""
    nodes = np.concatenate(tubes)
    reach = np.maximum(nodes[:, 2:], 0) + REACH
    low, high = (nodes[:, :2] - reach).min(axis=0), (nodes[:, :2] + reach).max(axis=0)
    near = (x > low[0]) & (x < high[0]) & (y > low[1]) & (y < high[1])
    x, y, result = x[near], y[near], np.full(x.shape, 1e3, np.float32)
    blend = 0.3 * max(1.0, float(nodes[:, 2].mean()))
    field = np.full(x.shape, 1e3, np.float32)
    for tube in tubes:
        nodes = tube.tolist()
        for (ax, ay, ar), (bx, by, br) in pairwise(nodes if len(nodes) > 1 else nodes * 2):
            dx, dy = bx - ax, by - ay
            t = np.clip(((x - ax) * dx + (y - ay) * dy) / max(dx * dx + dy * dy, 1e-6), 0, 1)
            distance = np.hypot(x - ax - t * dx, y - ay - t * dy) - (ar + t * (br - ar))
            h = np.maximum(blend - np.abs(field - distance), 0) / blend
            field = np.minimum(field, distance) - h * h * (blend / 4)
    result[near] = field
    return result


class _Canvas:
    """A slice that is being painted: its HU, its labels, and where its pixels lie in the body."""

    def __init__(self, x: Field, y: Field, s: float, pixel: float) -> None:
        self.x, self.y, self.s, self.pixel = x, y, s, pixel
        self.hu = np.full(x.shape, AIR, np.float32)
        self.labels = np.zeros(x.shape, np.uint8)
        self.wall = _superellipse(x, y, *WALL_AXES)
        self.cavity = self.wall + WALL_THICKNESS  # where organs may lie

    def paint(self, field: Field, hu: float, label: int = 0) -> None:
        """Paint the inside of a field of signed distances; pixels on its border are mixtures."""
        self.hu += np.clip(0.5 - field / self.pixel, 0, 1) * (hu - self.hu)
        self.labels[field < 0] = label

    def paint_trunk(self, fat: np.ndarray, lung: float, strands: Field, streaks: Field) -> None:
        """Paint skin, fat, the muscular wall with its fat planes, and the lungs.

        Args:
            fat: thickness of subcutaneous fat at the sides, and at front and back, mm.
            lung: depth of its posterior recess at the top, mm.
            strands, streaks: noise, for vessels in the visceral fat and fat planes of the wall.
        """
        x, y, wall, inner = self.x, self.y, self.wall, self.cavity
        skin = _superellipse(x, y, *(np.array(WALL_AXES) + fat).tolist())
        skin += 9 * np.exp(-((x / 16) ** 2)) * (y > 20)  # the groove over the spinous processes
        self.paint(skin, 20)
        self.paint(skin + 2, FAT)
        self.paint(np.maximum(wall, skin + 4), MUSCLE)
        self.paint(np.maximum(np.abs(wall + 4.5 + streaks) - 0.8, y - 70), -60)
        self.paint(inner, FAT)
        self.hu[(inner < 0) & (strands > 2)] = -30
        recess = max(0.0, 1 - self.s / 0.3) * lung * np.clip((y - 10) / 40, 0, 1)
        self.cavity = inner + recess * np.clip((np.abs(x) - 30) / 30, 0, 1)
        self.paint(np.maximum(inner, -self.cavity), LUNG)

    def paint_ribs(self, phase: float) -> None:
        """Paint obliquely cut ribs, 28 degrees apart; from top to bottom they move forwards."""
        x, y = np.abs(self.x), self.y - WALL_CENTRE_Y
        angle = np.rad2deg(np.arctan2(y, x))  # 0 at the side, 90 behind
        apart = (angle - phase + 14 * self.s - 54) % 28 - 14
        along = np.maximum(np.deg2rad(np.abs(apart)) * np.hypot(x, y) - 7, 0)
        field = np.hypot(self.wall + 5.5, along) - 4.4
        field[np.abs(angle - apart - 10) > 65] = 1e3  # none in front, none at the spine
        self.paint(field, 400)
        self.paint(field + 1.9, 170)

    def paint_structure(self, row: Structure, noise: Field) -> None:
        """Paint a structure that exists at this level, with its fat, core and gas."""
        start, stop = max(row.levels[0], 0), min(row.levels[1], 1)
        u = np.clip((self.s - start) / (stop - start), 0, 1)
        # Organs round off towards their ends.
        cap = min(1.0, 0.55 + 4 * min(self.s - row.levels[0], row.levels[1] - self.s))
        tubes = [(1 - u) * tube[:, :3] + u * tube[:, 3:] for tube in row.tubes]
        for tube in tubes:
            tube[:, 2] *= np.where(tube[:, 2] > 0, cap, 1)
        field = _tubes(np.abs(self.x) if row.paired else self.x, self.y, tubes) + row.rough * noise
        if row.clipped:
            field = np.maximum(field, self.cavity)
        if row.halo:
            self.paint(np.maximum(field - row.halo - noise, self.cavity), FAT)
        core = field + row.core[0]
        self.paint(field, row.hu, row.label)
        self.paint(core, row.core[1], row.label)
        if row.gas and (core < 0).any():
            front, back = self.y[core < 0].min(), self.y[core < 0].max()
            level = front + row.gas * (back - front)
            self.paint(np.maximum(core, self.y - level), GAS, row.label)

    def drop_specks(self) -> None:
        """Turn all but the largest part of every organ into fat, and organs that are too small."""
        for label in np.unique(self.labels)[1:]:
            parts, _ = ndimage.label(self.labels == label)
            sizes = np.bincount(parts.ravel())[1:]
            kept = 1 + sizes.argmax() if sizes.max() >= MIN_PIXELS else 0
            specks = (parts > 0) & (parts != kept)
            self.labels[specks], self.hu[specks] = 0, FAT


def _vary(row: Structure, rng: np.random.Generator, contrast: float) -> Structure:
    """A structure as it is in one patient; `contrast` is added to the HU of enhancing organs."""
    x, y = rng.normal(0, 1, 2) * row.move
    grow = np.clip(rng.normal(1, 0.05), 0.88, 1.12)
    scale, shift = np.array([1, 1, grow] * 2), np.array([x, y, 0] * 2)
    tubes = tuple(scale * tube + shift for tube in row.tubes)
    hu = row.hu + rng.normal(0, 4) + (contrast if row.label not in (0, 9) else 0)
    levels = np.array(row.levels) + rng.normal(0, 0.03, 2)
    return replace(row, tubes=tubes, hu=hu, levels=levels, gas=row.gas * rng.uniform(0.3, 1.3))


def make_patient(rng: np.random.Generator, slices: int = 4) -> SyntheticPatient:
    """Draw one patient and render the CT.

    Args:
        rng: the only source of randomness.
        slices: number of axial slices, from the lowest to the highest, spread over the same
            anatomical range whatever their number.
    """
    fat = rng.uniform([6, 8], [26, 26])
    scale = rng.uniform([0.90, 0.92], [1.0, 1.05]).tolist()  # (x, y) relative to the reference
    width = 2 * (scale[0] * (WALL_AXES[0] + fat[0]) + rng.uniform(4, 14))
    pixel = round(float(np.clip(width / SIZE, 1.40, 1.50)), 3)
    thickness = round(float(rng.uniform(10, 12)), 1)
    noise_sd, rib_phase, lung = rng.uniform([10, -7, 4], [15, 7, 20]).tolist()
    contrast = rng.normal(0, 5)
    # Displacements of three wavelengths: posture, position of organs, outlines.
    warps = [
        [(sd, _smooth_noise(rng, mm / pixel)) for sd, mm in ((5, 120), (3, 55), (0.8, 22))]
        for _ in "xy"
    ]
    strands, streaks, outlines = (_smooth_noise(rng, mm / pixel) for mm in (5, 16, 14))
    structures = [(_vary(row, rng, contrast), rng.integers(SIZE, size=2)) for row in STRUCTURES]
    position = (np.arange(SIZE, dtype=np.float32) + 0.5 - SIZE / 2) * pixel
    x0, y0 = np.meshgrid(position / scale[0], position / scale[1])
    # Bone does not give way: less displacement near the spine.
    stiff = 1 - 0.75 * np.exp(-(x0**2 + (y0 - 32) ** 2) / 45**2)

    hu = np.empty((slices, SIZE, SIZE), np.int16)
    labels = np.empty((slices, SIZE, SIZE), np.uint8)
    levels = np.linspace(0.92, 0.08, slices) if slices > 1 else np.array([0.5])
    for z, s in enumerate((levels + rng.uniform(-0.05, 0.05)).tolist()):
        dx, dy = (stiff * sum(sd * _noise_at(noise, s) for sd, noise in warp) for warp in warps)
        canvas = _Canvas(x0 + dx, y0 + dy, s, pixel)
        strand, streak, outline = (_noise_at(noise, s) for noise in (strands, streaks, outlines))
        canvas.paint_trunk(fat, lung, strand, streak)
        canvas.paint_ribs(rib_phase)
        for row, moved in structures:
            if row.levels[0] <= s <= row.levels[1]:
                canvas.paint_structure(row, np.roll(outline, moved, axis=(0, 1)))
        canvas.drop_specks()
        canvas.hu[(canvas.labels == 1) & (strand > 1.9)] = 145  # veins of the liver
        canvas.hu += (canvas.hu > -300) * (5 * strand + 3 * streak)
        # Quantum noise through a soft band-pass reconstruction kernel.
        white = rng.standard_normal((SIZE, SIZE))
        grains = ndimage.gaussian_filter(white, 0.75) - 0.8 * ndimage.gaussian_filter(white, 2.2)
        image = ndimage.gaussian_filter(canvas.hu, 0.45) + noise_sd * grains / grains.std()
        hu[z] = np.clip(np.rint(image), -1024, 3071)
        labels[z] = canvas.labels
    return SyntheticPatient(hu, labels, (thickness, pixel, pixel))


def write_patients(folder: Path, patients: int = 16, slices: int = 4, seed: int = 0) -> list[str]:
    """Write synthetic patients in the FLARE22 layout and return the case names.

    Files: `images/demo_01_0000.nii.gz` (int16 HU) and `labels/demo_01.nii.gz` (uint8), stored in
    LPS with origin 0. A patient depends on the seed and the patient's number alone.
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
