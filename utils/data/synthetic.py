"""Synthetic portal-venous abdominal CT with FLARE22's 13 organs, for demos and tests without data.

Organs are ellipsoids. Positions are millimetres from the midline, 22 mm in front of
the centre of the spine, x to the left and y posterior; the level runs from 0 (top, about T12, where
the esophagus passes the diaphragm) to 1 (bottom, about L2, at the renal hilum).
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import ndimage

from utils.data.slices import Geometry
from utils.data.volumes import write_volume

SIZE = 256  # pixels per side of a slice
AIR, FAT, MUSCLE = -1000, -100, 55  # HU
MIN_PIXELS = 16  # a smaller cross-section would not be annotated
MARKER = "SYNTHETIC.txt"  # in the folder of a demo


class SyntheticPatient(NamedTuple):
    """One patient in LPS; array order (z, y, x): x to the left, y posterior, z superior."""

    hu: np.ndarray  # int16 (slices, H, W), Hounsfield units
    labels: np.ndarray  # uint8 (slices, H, W), FLARE22 label ids, 0 is background
    spacing: tuple[float, float, float]  # (sz, sy, sx) in mm


ALL_LEVELS = 99
# Label, HU; centre x, y, level; semi-axes, and by how many degrees they are turned from x to y.
# Later ones are painted over earlier ones.
ELLIPSOIDS = (
    (1, 110, (-72, -8, 0.1), (50, 78, 1.05), 8),  # liver, right lobe
    (1, 110, (-20, -56, 0), (66, 28, 0.7), -10),  # left lobe
    (3, 120, (104, 34, 0.15), (19, 46, 0.85), -12),  # spleen
    (11, 45, (70, -34, 0.3), (27, 44, 1), 25),  # stomach
    (2, 178, (-60, 40, 1), (22, 27, 0.75), 20),  # right kidney
    (13, 178, (62, 38, 0.9), (22, 27, 0.75), -20),  # left kidney
    (4, 95, (18, -36, 0.7), (54, 10, 0.45), 12),  # pancreas
    (12, 55, (-42, -40, 0.95), (11, 21, 0.5), -15),  # duodenum
    (9, 10, (-58, -56, 0.9), (12, 16, 0.55), 20),  # gallbladder
    (6, 140, (-24, -17, 0.5), (11, 9, ALL_LEVELS), 0),  # inferior vena cava
    (5, 168, (8, -8, 0.5), (10, 10, ALL_LEVELS), 0),  # aorta
    (10, 44, (15, -27, -0.1), (9, 6.5, 0.45), 15),  # esophagus
    (7, 80, (-38, 8, 0.25), (3.2, 16, 0.4), 30),  # right adrenal gland
    (8, 80, (36, 0, 0.3), (3.2, 16, 0.4), -20),  # left adrenal gland
    (0, 55, (-45, 72, 0.5), (34, 16, ALL_LEVELS), 0),  # muscles of the back
    (0, 55, (45, 72, 0.5), (34, 16, ALL_LEVELS), 0),
    (0, 380, (0, 24, 0.5), (24, 18, ALL_LEVELS), 0),  # vertebra: cortical bone, marrow, canal
    (0, 190, (0, 24, 0.5), (22, 16, ALL_LEVELS), 0),
    (0, 330, (0, 50, 0.5), (14, 24, ALL_LEVELS), 0),
    (0, 20, (0, 48, 0.5), (9, 7, ALL_LEVELS), 0),
)


def _smooth_noise(rng: np.random.Generator, slices: int, sigma: float) -> np.ndarray:
    """Noise (slices, SIZE, SIZE) of SD 1, smoothed by `sigma` pixels within the slices."""
    white = rng.standard_normal((slices, SIZE, SIZE))
    noise = ndimage.gaussian_filter(white, (0.5, sigma, sigma), mode="wrap")
    return noise / noise.std()


def _drop_specks(hu: np.ndarray, labels: np.ndarray) -> None:
    """Turn all but the largest part of every organ in a slice, and small organs, into fat."""
    for label in np.unique(labels)[1:]:
        parts, _ = ndimage.label(labels == label)
        sizes = np.bincount(parts.ravel())[1:]
        kept = 1 + sizes.argmax() if sizes.max() >= MIN_PIXELS else 0
        specks = (parts > 0) & (parts != kept)
        hu[specks], labels[specks] = FAT, 0


def make_patient(rng: np.random.Generator, slices: int = 4) -> SyntheticPatient:
    """Draw one patient and render the CT.

    The axial slices run from the lowest to the highest, spread over the same anatomical range
    whatever their number.
    """
    # Of the fat under the skin, mm; of the body relative to the table above; of voxels, mm.
    fat, size, pixel, thickness = rng.uniform([3, 0.9, 1.4, 10], [20, 1, 1.5, 12]).round(2).tolist()
    levels = np.linspace(0.92, 0.08, slices) if slices > 1 else np.array([0.5])
    position = (np.arange(SIZE) + 0.5 - SIZE / 2) * pixel / size
    level, y, x = np.meshgrid(levels + rng.uniform(-0.05, 0.05), position, position, indexing="ij")
    for axis in (x, y):  # posture, and irregular outlines
        axis += 4 * _smooth_noise(rng, slices, 20) + 1.5 * _smooth_noise(rng, slices, 5)

    hu, labels = np.full(x.shape, AIR, np.float64), np.zeros(x.shape, np.uint8)
    for margin, value in ((fat + 3, 20), (fat, FAT), (0, MUSCLE), (-11, FAT)):  # from the skin
        inside = (np.abs(x) / (148 + margin)) ** 2.4 + (np.abs(y + 6) / (108 + margin)) ** 2.4 < 1
        hu[inside] = value
    hu[inside & (_smooth_noise(rng, slices, 5) > 0.4)] = 45  # bowel
    enhancement = rng.normal(0, 5)
    for label, value, centre, (a, b, c), degrees in ELLIPSOIDS:
        cx, cy, at = centre + rng.normal(0, (2, 2, 0.03)) * (label > 0)
        turned = ((x - cx) + 1j * (y - cy)) * np.exp(-1j * np.deg2rad(degrees))
        radius2 = (turned.real / a) ** 2 + (turned.imag / b) ** 2 + ((level - at) / c) ** 2
        part = inside & (radius2 < np.clip(rng.normal(1, 0.1), 0.8, 1.2))
        hu[part], labels[part] = value + (rng.normal(enhancement, 4) if label else 0), label
    for planes in zip(hu, labels, strict=True):
        _drop_specks(*planes)
    # Pixels on a border are mixtures, and the reconstruction kernel leaves grains of noise.
    hu = ndimage.gaussian_filter(hu, (0, 0.6, 0.6))
    hu += rng.uniform(10, 15) * _smooth_noise(rng, slices, 0.75)
    hu = np.rint(hu).clip(-1024, 3071).astype(np.int16)
    return SyntheticPatient(hu, labels, (thickness, pixel, pixel))


def is_synthetic(dataset_folder: Path) -> bool:
    """Whether a data set was made by the demo, which leaves the file MARKER beside it."""
    return (dataset_folder.resolve().parent / MARKER).is_file()


def write_patients(
    folder: str | Path, patients: int = 16, slices: int = 4, seed: int = 0
) -> list[str]:
    """Write synthetic patients in the FLARE22 layout and LPS, and return the case names.

    A patient depends on the seed and the patient's number alone.
    """
    names = [f"demo_{number:02d}" for number in range(1, patients + 1)]
    for number, name in enumerate(names, start=1):
        patient = make_patient(np.random.default_rng([seed, number]), slices)
        grid = Geometry(patient.labels.shape, patient.spacing)
        write_volume(Path(folder, "images") / f"{name}_0000.nii.gz", patient.hu, grid)
        write_volume(Path(folder, "labels") / f"{name}.nii.gz", patient.labels, grid)
    return names
