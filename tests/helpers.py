"""Toy CT volumes and other helpers that several test files share."""

import csv
import gzip
import json
import os
import shutil
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import nibabel
import numpy as np
import SimpleITK as sitk
import torch
from segment_anything import modeling

import preprocess_ct
from perturb import tight_boxes
from utils.data.slices import open_dataset
from utils.training.options import parse_options

ROOT = Path(__file__).resolve().parents[1]
SHAPE = (3, 80, 96)  # z, y, x: not square
SPACING = (5.0, 2.0, 1.6)  # z, y, x: nor are its pixels
TOY_NAMES = {1: "large", 2: "small"}
TOY_LABELS = "1=large,2=small"  # the same as an option
SMALL_EMBEDDING = (32, 16, 16)  # of `build_small`
BOXES_HEADER = "case,label,z,x0,y0,x1,y1\n"


def toy_case(number: int) -> tuple[np.ndarray, np.ndarray]:
    """HU (z, y, x) int16 and labels uint8 in LPS: a body, a large organ and a small one on its rim.

    Slice 0 has no label. The large organ lies at small x, as a liver does.
    """
    rng = np.random.default_rng(number)
    z, y, x = np.mgrid[: SHAPE[0], : SHAPE[1], : SHAPE[2]]
    cy, cx = 40 + rng.integers(-4, 5), 34 + rng.integers(-4, 5)
    labels = np.zeros(SHAPE, np.uint8)
    labels[((y - cy) / 18) ** 2 + ((x - cx) / 14) ** 2 < 1] = 1
    labels[((y - cy - 6) / 5) ** 2 + ((x - cx - 18) / 6) ** 2 < 1] = 2
    labels[0] = 0
    hu = np.where(((y - 40) / 37) ** 2 + ((x - 48) / 45) ** 2 < 1, -80.0, -1000.0)
    hu = np.choose(labels, (hu, 110.0, 20.0)) + rng.normal(0, 8, SHAPE)
    return hu.astype(np.int16), labels


def write_volume(
    path: Path,
    array: np.ndarray,
    spacing: tuple[float, ...] = SPACING,
    origin: tuple[float, ...] = (-96.0, -80.0, 10.0),
    orientation: str = "LPS",
) -> None:
    """Write an LPS array (z, y, x), stored in the file in another orientation if asked."""
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(tuple(reversed(spacing)))
    image.SetOrigin(origin)
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(sitk.DICOMOrient(image, orientation), str(path))


def edit_nifti(path: Path, fields: dict[str, tuple[object, object]]) -> None:
    """Set fields of a header, each at an index, to what SimpleITK would not write."""
    content = gzip.decompress(path.read_bytes())
    header = nibabel.Nifti1Header(content[:348], check=False)
    for field, (index, value) in fields.items():
        header[field][index] = value
    path.write_bytes(gzip.compress(header.binaryblock + content[348:]))


def write_cases(folder: Path, count: int, orientation: str = "LPS") -> None:
    """Write toy cases in the FLARE22 layout to folder/images and folder/labels."""
    for number in range(count):
        hu, labels = toy_case(number)
        write_volume(folder / f"images/toy_{number}_0000.nii.gz", hu, orientation=orientation)
        write_volume(folder / f"labels/toy_{number}.nii.gz", labels, orientation=orientation)


def tight_rows(number: int, case: str = "", move: int = 0) -> str:
    """The tight boxes of a toy case as rows of boxes.csv, every edge moved outward by `move`."""
    return "".join(
        f"{case},{label},{z},{x0 - move:g},{y0 - move:g},{x1 + move:g},{y1 + move:g}\n"
        for z, plane in enumerate(toy_case(number)[1])
        for label, (x0, y0, x1, y1) in zip(*tight_boxes(plane), strict=True)
    )


def build_small() -> modeling.Sam:
    """SAM with one narrow block, for images of 256 px and an embedding of SMALL_EMBEDDING."""
    channels, *side = SMALL_EMBEDDING
    encoder = {"img_size": 256, "embed_dim": 48, "depth": 1, "num_heads": 2, "out_chans": channels}
    transformer = modeling.TwoWayTransformer(2, channels, num_heads=4, mlp_dim=64)
    return modeling.Sam(
        modeling.ImageEncoderViT(**encoder),
        modeling.PromptEncoder(channels, tuple(side), (256, 256), mask_in_chans=4),
        modeling.MaskDecoder(transformer_dim=channels, transformer=transformer),
    )


def edit_json(path: Path, change: Callable[[dict], object]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def copy_slices(source: Path, target: Path, change: Callable[[dict], object]) -> Path:
    """Copy slices and their embeddings, change dataset.json, and return the copy."""
    shutil.copytree(source, target)
    edit_json(target / "dataset.json", change)
    return target


def all_in_split(split: str, meta: dict) -> None:
    for case in meta["cases"].values():
        case["split"] = split


def call(script: ModuleType, *words: object) -> None:
    """Run a script's `main` with the options that these words give."""
    script.main(script.parse_options([str(word) for word in words]))


def launch(processes: int, script: object, *words: object) -> subprocess.CompletedProcess:
    """Run a script in the repository's root, by torchrun if in several processes."""
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node", processes, "--standalone", "--")
    command = (sys.executable, *(torchrun if processes > 1 else ()), script, *words)
    return subprocess.run(
        [*map(str, command)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )


def options_for(data: Path, **changes: object) -> Namespace:
    options = parse_options(["--data", str(data), "--device", "cpu", "--epochs", "2"])
    return Namespace(**{**vars(options), **changes})


def results(folder: Path) -> dict:
    """A run's numbers: the best decoder, the last weights, and the log but for time and memory."""
    best = torch.load(folder / "decoder_best.pth", weights_only=True)
    last = torch.load(folder / "checkpoint_last.pth", weights_only=True)
    with open(folder / "log.csv") as file:
        log = list(csv.DictReader(file))
    for row in log:
        del row["seconds"], row["memory_gib"]
    return {"best": best["mask_decoder"], "last": last["mask_decoder"], "log": log}


def assert_same_weights(found: dict, expected: dict, prefix: str = "") -> None:
    """Assert that all of `expected`, whose names have a prefix in `found`, is there bit for bit."""
    for key, value in expected.items():
        assert torch.equal(found[prefix + key], value), key


def assert_same(found: dict, expected: dict) -> None:
    """Assert that two runs have the same `results`, bit for bit."""
    assert found["log"] == expected["log"]
    for part in ("best", "last"):
        assert_same_weights(found[part], expected[part])


def assert_same_slices(one: Path, other: Path) -> None:
    """Assert that two data sets have slices of the same names and bits."""
    first, second = (
        [(s.name, s.image_sha256, s.label_sha256) for s in open_dataset(folder).split("all")]
        for folder in (one, other)
    )
    assert first == second and first


def preprocess(folder: Path, out: Path, *more: object) -> dict:
    """Preprocess a folder of a known layout, in one process; returns dataset.json.

    Of volumes, with the paper's window unless another is given.
    """
    words = [*map(str, preprocessing(folder, out, *more))]
    return preprocess_ct.preprocess(preprocess_ct.parse_options(words))


def preprocessing(folder: Path, out: Path, *more: object) -> tuple:
    """The options of that preprocessing."""
    if "--window" not in more and not (any(folder.glob("imgs")) or any(folder.glob("*.npz"))):
        more = ("--window", "flare22", *more)
    return ("--input", folder, "--out", out, "--workers", 1, *more)


def refused(fails: Callable, folder: Path, out: Path, *more: object) -> str:
    """The error line of a preprocessing that must leave no trace of `out`."""
    before = set(out.parent.iterdir())
    message = fails(preprocess_ct, *preprocessing(folder, out, *more))
    assert set(out.parent.iterdir()) == before
    return message
