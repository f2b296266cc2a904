"""Synthetic portal-venous abdominal CT with FLARE22's 13 organs, for demos and tests without data.

Every structure is a union of tapered tubes, given at the top and at the bottom of the imaged range
and interpolated between them. `STRUCTURES` lists them in the order in which they are painted.

Positions are millimetres of a reference patient in LPS (x to the left, y posterior), from the
midline, 22 mm in front of the centre of the vertebral body. The level `s` runs from 0 (top, about
T12, where the esophagus passes the diaphragm) to 1 (bottom, about L2, at the renal hilum).
"""

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

Field = np.ndarray  # float32 (SIZE, SIZE); of signed distances: mm, negative inside


class SyntheticPatient(NamedTuple):
    """One patient in LPS; array order (z, y, x): x to the left, y posterior, z superior."""

    hu: np.ndarray  # int16 (slices, H, W), Hounsfield units
    labels: np.ndarray  # uint8 (slices, H, W), FLARE22 label ids, 0 is background
    spacing: tuple[float, float, float]  # (sz, sy, sx) in mm


@dataclass(frozen=True)
class Structure:
    """A structure, in mm."""

    label: int  # 0 without one
    hu: float
    # Of nodes x, y, radius at the top and at the bottom; a tube ends where the radius is negative.
    tubes: tuple[tuple[tuple[float, ...], ...], ...]
    levels: tuple[float, float] = (-1, 2)  # s between which it exists
    core: tuple[float, float] = (99, 0)  # how deep it begins, and its HU
    gas: float = 0  # share of the core's height that is filled with air, in front
    paired: bool = False  # painted on both sides
    rough: float = 0.8  # SD of the irregularities of its surface
    move: float = 1  # SD of its position between patients


BOWEL = {"rough": 1.8, "move": 4}
LOOPS = (  # of small bowel: x, y, radius
    *((34, -62, 13), (60, -46, 14), (84, -34, 13), (82, -6, 12), (74, -70, 14), (32, -84, 12)),
    *((-8, -72, 12), (-36, -74, 11), (96, -58, 12)),
)
# fmt: off
STRUCTURES = (
    # Small bowel and transverse colon first: they fill what the organs leave free.
    *(Structure(0, 75, (((x - 6, y + 3, r) * 2, (x + 6, y - 3, r) * 2),), (0.4, 2),
        core=(2.5, 28), **BOWEL) for x, y, r in LOOPS),
    Structure(1, 110, (  # liver
        ((-92, 38, 44, -114, 34, 20), (-88, -25, 52, -112, -4, 28), (-45, -52, 48, -104, -40, 28),
         (6, -66, 33, -74, -74, 16), (56, -86, 16, -34, -86, -2)),
        ((-66, 8, 26, -80, 8, -4), (-70, 24, 26, -82, 24, -4))), rough=1, move=3),
    Structure(3, 120, (((120, -22, 12, 130, 6, 9), (114, 20, 25, 122, 30, 15),  # spleen
        (86, 58, 26, 108, 54, 13), (62, 70, 12, 94, 66, 3)),), (-1, 1.02), rough=1.2, move=3),
    Structure(11, 62, (((76, 13, 20, 80, -46, 8), (71, -18, 30, 58, -64, 16),  # stomach
        (56, -48, 26, 22, -74, 15), (38, -58, 15, -16, -66, 12)),),
        core=(3.5, 32), gas=0.18, **BOWEL),
    Structure(0, 55, (((-52, -82, 8, -62, -82, 14), (60, -84, 9, 62, -88, 14)),), (0.62, 2),
        core=(2.5, 0), gas=0.4, **BOWEL),
    Structure(0, 58, (((25, 30, -2, 31, 30, 12), (25, 30, -2, 30, 36, 12)),), (0.3, 2),  # psoas
        paired=True),
    Structure(2, 178, (((-54, 26, 12, -49, 18, 14), (-58, 36, 14, -68, 32, 16),  # right kidney
        (-57, 44, 12, -58, 53, 15)),), (0.22, 2), core=(6, 158), move=2),
    Structure(13, 178, (((56, 24, 12, 49, 16, 14), (60, 34, 14, 68, 30, 16),  # left kidney
        (58, 43, 12, 58, 52, 15)),), (0.1, 2), core=(6, 158), move=2),
    Structure(4, 97, (  # pancreas
        ((-26, -38, -6, -27, -38, 14), (0, -44, 4, -4, -50, 9), (36, -38, 10, 28, -50, 6),
         (60, -22, 10, 52, -40, 4), (80, -6, 10, 70, -28, 1)),), (0.16, 2), rough=1.7, move=1.5),
    Structure(12, 66, (((-40, -58, 10, -48, -42, 11), (-30, -54, 9, -46, -28, 10)),),  # duodenum
        (0.45, 2), core=(3, 42), move=1.5),
    Structure(9, 10, (((-50, -46, 6, -58, -56, 7), (-58, -60, 9, -66, -70, 10.5)),),  # gallbladder
        (0.4, 2), rough=0.6, move=2),
    Structure(0, 165, (((-44, -44, 5, -4, -40, 6), (-26, -38, 6.5, -5, -39, 6)),), rough=0.3),
    Structure(6, 142, (((-21, -19, 10.5, -20, -13, 10), (-29, -20, 9, -28, -12, 8.5)),), rough=0.5),
    Structure(5, 168, (((9, -6, 11, 7, -9, 9.5),),), rough=0.3),  # aorta, behind portal and cava
    Structure(7, 80, (  # right adrenal gland; the thin glands are late, so that none cuts them
        ((-31, -9, 2.9, -33, -3, 2.9), (-35, 3, 2.8, -37, 7, 2.8), (-42, 16, 2.2, -43, 18, 2.2)),
        ((-35, 3, 2.5, -37, 7, 2.5), (-30, 13, 2, -32, 16, 2))), (0.04, 0.56), rough=0.35),
    Structure(8, 80, (  # left adrenal gland
        ((37, -14, 2.6, 35, -21, 2.7), (34, -4, 2.8, 34, -8, 2.8), (29, 9, 2, 30, 4, 2.1)),
        ((34, -4, 2.5, 34, -8, 2.5), (47, 11, 2, 46, 7, 2.1))), (0.04, 0.62), rough=0.35),
    Structure(10, 44, (((12, -27, 5.8, 18, -29, 5.8), (18, -28, 5.8, 30, -36, 5.8)),),  # esophagus
        (-1, 0.33), core=(3.5, 38), rough=0.5),
    # Muscles of the back, vertebral arch and body, spinal canal.
    Structure(0, 58, (((20, 70, 18) * 2, (44, 72, 18) * 2, (64, 70, 10) * 2),), core=(9, 50),
        paired=True),
    Structure(0, 330, (((0, 47, 13) * 2, (0, 77, 4) * 2), ((10, 45, 4) * 2, (32, 51, 3.5) * 2)),
        core=(2.2, 200), rough=0.4, move=0, paired=True),
    Structure(0, 380, (((-7, 22, 17) * 2, (7, 22, 17) * 2),), core=(1.8, 190), rough=0.5, move=0),
    Structure(0, 10, (((-2, 46, 8) * 2, (2, 46, 8) * 2),), core=(3, 35), rough=0.2, move=0),
)
# fmt: on


def _smooth_noise(rng: np.random.Generator, slices: int, wavelength_px: float) -> np.ndarray:
    """Periodic smooth noise (slices, SIZE, SIZE); in each slice its mean is 0 and its SD 1."""
    spectrum = np.fft.fftn(rng.standard_normal((slices, SIZE, SIZE)))
    noise = np.fft.ifftn(ndimage.fourier_gaussian(spectrum, [1, *[0.55 * wavelength_px] * 2])).real
    noise -= noise.mean(axis=(1, 2), keepdims=True)
    return (noise / noise.std(axis=(1, 2), keepdims=True)).astype(np.float32)


def _superellipse(x: Field, y: Field, a: float, b: float) -> Field:
    """Approximate signed distance to a superellipse of semi-axes a, b around the wall's centre."""
    y = y - WALL_CENTRE_Y
    r = ((np.abs(x) / a) ** 2.4 + (np.abs(y) / b) ** 2.4) ** (1 / 2.4)
    return np.hypot(x, y) * (1 - 1 / np.maximum(r, 1e-3))


def _tubes(x: Field, y: Field, tubes: list[np.ndarray]) -> Field:
    """Signed distance to tubes of nodes (n, 3) x, y, radius, rounded where segments meet."""
    blend = 0.3 * max(1.0, float(np.concatenate(tubes)[:, 2].mean()))
    field = np.full(x.shape, 1e3, np.float32)
    for tube in tubes:
        nodes = tube.tolist()
        for (ax, ay, ar), (bx, by, br) in pairwise(nodes if len(nodes) > 1 else nodes * 2):
            dx, dy = bx - ax, by - ay
            t = np.clip(((x - ax) * dx + (y - ay) * dy) / max(dx * dx + dy * dy, 1e-6), 0, 1)
            distance = np.hypot(x - ax - t * dx, y - ay - t * dy) - (ar + t * (br - ar))
            h = np.maximum(blend - np.abs(field - distance), 0) / blend
            field = np.minimum(field, distance) - h * h * (blend / 4)
    return field


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

    def paint_trunk(self, fat: np.ndarray, strands: Field) -> None:
        """Paint skin, subcutaneous fat (mm at the sides, in front), the wall, and the lungs."""
        skin = _superellipse(self.x, self.y, *(np.array(WALL_AXES) + fat).tolist())
        inner = self.cavity
        self.paint(skin, 20)
        self.paint(skin + 2, FAT)
        self.paint(np.maximum(self.wall, skin + 4), MUSCLE)
        self.paint(inner, FAT)
        self.hu[(inner < 0) & (strands > 2)] = -30  # vessels
        recess = max(0.0, 1 - self.s / 0.3) * 12 * np.clip((self.y - 10) / 40, 0, 1)
        self.cavity = inner + recess * np.clip((np.abs(self.x) - 30) / 30, 0, 1)
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
        # Organs stay off the lungs, all within the wall.
        field = np.maximum(field, self.cavity if row.label else self.wall + WALL_THICKNESS)
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

    The axial slices run from the lowest to the highest, spread over the same anatomical range
    whatever their number.
    """
    fat = rng.uniform([6, 8], [26, 26])
    scale = rng.uniform([0.90, 0.92], [1.0, 1.05]).tolist()  # (x, y) relative to the reference
    width = 2 * (scale[0] * (WALL_AXES[0] + fat[0]) + rng.uniform(4, 14))
    pixel = round(float(np.clip(width / SIZE, 1.40, 1.50)), 3)
    thickness = round(float(rng.uniform(10, 12)), 1)
    noise_sd, rib_phase = rng.uniform([10, -7], [15, 7]).tolist()
    contrast = rng.normal(0, 5)
    # Displacements of two wavelengths: posture, and position of organs.
    warps = [
        sum(sd * _smooth_noise(rng, slices, mm / pixel) for sd, mm in ((5, 120), (3, 55)))
        for _ in "xy"
    ]
    strands, outlines = (_smooth_noise(rng, slices, mm / pixel) for mm in (5, 14))
    structures = [(_vary(row, rng, contrast), rng.integers(SIZE, size=2)) for row in STRUCTURES]
    position = (np.arange(SIZE, dtype=np.float32) + 0.5 - SIZE / 2) * pixel
    x0, y0 = np.meshgrid(position / scale[0], position / scale[1])
    # Bone does not give way: less displacement near the spine.
    stiff = 1 - 0.75 * np.exp(-(x0**2 + (y0 - 32) ** 2) / 45**2)

    hu = np.empty((slices, SIZE, SIZE), np.int16)
    labels = np.empty((slices, SIZE, SIZE), np.uint8)
    levels = np.linspace(0.92, 0.08, slices) if slices > 1 else np.array([0.5])
    for z, s in enumerate((levels + rng.uniform(-0.05, 0.05)).tolist()):
        canvas = _Canvas(x0 + stiff * warps[0][z], y0 + stiff * warps[1][z], s, pixel)
        canvas.paint_trunk(fat, strands[z])
        canvas.paint_ribs(rib_phase)
        for row, moved in structures:
            if row.levels[0] <= s <= row.levels[1]:
                canvas.paint_structure(row, np.roll(outlines[z], moved, axis=(0, 1)))
        canvas.drop_specks()
        canvas.hu[(canvas.labels == 1) & (strands[z] > 1.9)] = 145  # veins of the liver
        canvas.hu += (canvas.hu > -300) * (5 * strands[z])
        # Quantum noise through a soft band-pass reconstruction kernel.
        white = rng.standard_normal((SIZE, SIZE))
        grains = ndimage.gaussian_filter(white, 0.75) - 0.8 * ndimage.gaussian_filter(white, 2.2)
        image = ndimage.gaussian_filter(canvas.hu, 0.45) + noise_sd * grains / grains.std()
        hu[z] = np.clip(np.rint(image), -1024, 3071)
        labels[z] = canvas.labels
    return SyntheticPatient(hu, labels, (thickness, pixel, pixel))


def write_patients(folder: Path, patients: int = 16, slices: int = 4, seed: int = 0) -> list[str]:
    """Write synthetic patients in the FLARE22 layout and LPS, and return the case names.

    A patient depends on the seed and the patient's number alone.
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
