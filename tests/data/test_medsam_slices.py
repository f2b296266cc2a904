"""MedSAM's slices as input: grey levels and labels as they are, and no millimetres."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import eval as evaluation
import train_adaptive
from tests.helpers import (
    TOY_LABELS,
    call,
    copy_slices,
    preprocess,
    refused,
    toy_case,
    write_cases,
)
from utils.data.slices import open_dataset, read_image, read_label_map

pytestmark = pytest.mark.usefixtures("small_lite_medsam")

CASES = [f"CT_Abd_toy_{number}" for number in range(4)]
SIDE = 256  # MedSAM's is 1024, at which scikit-image takes seconds per slice


def write_npy(folder, side=SIDE, first=0, cases=CASES):
    """Toy cases as MedSAM's scripts write them, with every operation in their order.

    With `side` scaled to a square, as MedSAM's pre_CT_MR.py does, else at native size as LiteMedSAM
    has it. The grey is in three channels before it is scaled, so that they differ by rounding.
    """
    from skimage.transform import resize

    (folder / "imgs").mkdir(parents=True)
    (folder / "gts").mkdir()
    for number, case in enumerate(cases):
        hu, labels = toy_case(number)
        grey = np.clip(hu, -160.0, 240.0)
        grey = np.uint8((grey - grey.min()) / (grey.max() - grey.min()) * 255.0)
        for index, z in enumerate(np.flatnonzero(labels.any((1, 2))), start=first):
            image, gt = np.repeat(grey[z][..., None], 3, axis=-1), labels[z]
            if side:
                how = {"preserve_range": True, "mode": "constant"}
                image = resize(image, (side, side), order=3, anti_aliasing=True, **how)
                gt = resize(gt, (side, side), order=0, anti_aliasing=False, **how)
            image = (image - image.min()) / max(image.max() - image.min(), 1e-8)
            np.save(folder / "imgs" / f"{case}-{index:03d}.npy", image)
            np.save(folder / "gts" / f"{case}-{index:03d}.npy", gt.astype(np.uint8))
    return folder


def dataset_of(folder, out):
    preprocess(folder, out, "--label-names", TOY_LABELS, "--split", "0.5,0.25,0.25")
    return open_dataset(out)


@pytest.fixture(scope="module")
def medsam(tmp_path_factory):
    return write_npy(tmp_path_factory.mktemp("medsam") / "npy")


@pytest.fixture(scope="module")
def data(medsam):
    return dataset_of(medsam, medsam.parent / "of_medsam")


def test_slices_become_a_data_set(medsam, tmp_path, capsys):
    dataset = dataset_of(medsam, tmp_path / "toy")
    assert f"{medsam}: MedSAM's slices (no spacing" in capsys.readouterr().out
    samples = dataset.split("all")
    assert [s.name for s in samples] == [f"{case}-00{n}" for case in CASES for n in (0, 1)]
    for sample in samples:
        target = np.load(medsam / "gts" / f"{sample.name}.npy")
        label_map = read_label_map(sample.label_path, sample.label_sha256)
        assert (sample.frame.labels_to_native(label_map) == target).all()
        image = np.load(medsam / "imgs" / f"{sample.name}.npy")
        assert (image != image[..., :1]).any()  # by rounding, else the tests are blind
        assert sample.labels == {1: (target == 1).sum(), 2: (target == 2).sum()}
        assert sample.label_names == {1: "large", 2: "small"} and sample.spacing_mm is None
    assert dataset.window is None and dataset.geometry == {}


def test_grey_levels_and_labels_of_1024_pixels_stay_as_they_are(tmp_path):
    rng = np.random.default_rng(0)
    grey, labels = rng.integers(0, 256, (1024, 1024)), np.zeros((1024, 1024), np.uint8)
    labels[300:400, 500:700] = 1
    image = grey[..., None] / 255 + rng.uniform(-1e-13, 1e-13, (1024, 1024, 3))
    for part, array in (("imgs", np.clip(image, 0, 1)), ("gts", labels)):
        (tmp_path / "npy" / part).mkdir(parents=True)
        save(tmp_path / "npy", part, array)
    (sample,) = dataset_of(tmp_path / "npy", tmp_path / "out").split("all")
    assert (read_image(sample.image_path) == grey).all()
    assert (read_image(tmp_path / "npy" / "imgs" / f"{sample.name}.npy") == grey).all()
    assert (read_label_map(sample.label_path) == labels).all()


@pytest.mark.skipif("MEDSAM_CHECKOUT" not in os.environ, reason="MEDSAM_CHECKOUT is not set")
def test_medsams_own_script(tmp_path):
    """What it writes is read here, and is what the other tests are made of, bit for bit.

    The scripts read data/FLARE22Train, and drop the small organ for its size.
    """
    pytest.importorskip("cc3d", reason="connected-components-3d is not installed")
    checkout = Path(os.environ["MEDSAM_CHECKOUT"]).resolve()
    lite = (checkout / "npz_to_npy.py").is_file()
    write_cases(tmp_path / "data" / "FLARE22Train", 1)
    for script in ("pre_CT_MR.py", "npz_to_npy.py")[: 1 + lite]:
        subprocess.run([sys.executable, str(checkout / script)], cwd=tmp_path, check=True)
    made = tmp_path / "data" / "npy" / ("" if lite else "CT_Abd")
    ours = write_npy(tmp_path / "ours", side=0 if lite else 1024, cases=CASES[:1])
    names = sorted(path.name for path in (ours / "imgs").iterdir())
    assert sorted(path.name for path in (made / "imgs").iterdir()) == names
    for name in names:
        assert (np.load(made / "imgs" / name) == np.load(ours / "imgs" / name)).all()
        labels, expected = np.load(made / "gts" / name), np.load(ours / "gts" / name)
        assert (labels[expected != 2] == expected[expected != 2]).all() and (labels == 1).any()
    assert len(dataset_of(made, tmp_path / "out").split("all")) == 2


def test_slices_of_native_size_are_scaled_and_padded(tmp_path):
    dataset = dataset_of(write_npy(tmp_path / "npy", side=0, first=7), tmp_path / "toy")
    sample = dataset.split("all")[0]
    assert sample.frame.native == (80, 96) and sample.frame.content == (853, 1024)
    target = np.load(tmp_path / "npy" / "gts" / f"{sample.name}.npy")
    label_map = read_label_map(sample.label_path)
    assert (sample.frame.labels_to_native(label_map) == target).all()
    image = read_image(sample.image_path)
    assert image[:850].std() > 10 and not image[853:].any()


def test_nsd_is_in_pixels_of_the_slice_and_every_table_says_so(data, tmp_path):
    """The same scores as with pixels of 1 mm, which a person may enter."""
    grid = {"spacing_mm": [1, 1, 1], "origin_mm": [0, 0, 0], "stored_orientation": "LPS"}
    grid["direction"] = np.eye(3).ravel().tolist()
    folder = copy_slices(
        data.folder, tmp_path / "mm", lambda meta: [c.update(grid) for c in meta["cases"].values()]
    )
    options = ["--models", "lite_medsam", "--no-sweep", "--no-figures", "--tolerance", "3"]
    for source, out in ((data.folder, tmp_path / "px_out"), (folder, tmp_path / "mm_out")):
        call(evaluation, "--data", source, "--out", out, *options, "--shift", "15%")
    scores = [(tmp_path / f"{unit}_out" / "instances.csv").read_text() for unit in ("px", "mm")]
    assert scores[0] == scores[1] and scores[0].count("\n") > 10
    header = "NSD at 3 pixels of the slices, whose spacing is unknown"
    for name in ("report.md", "report.html", "table1.md", "table3.md", "table1.tex"):
        assert header in (tmp_path / "px_out" / name).read_text(), name
        assert header not in (tmp_path / "mm_out" / name).read_text(), name


def test_what_takes_millimetres_is_refused_and_pixels_are_not_mixed_with_them(
    data, fresh_slices, tmp_path, fails
):
    options = ("--models", "lite_medsam", "--out", tmp_path / "out", "--data", data.folder)
    for words in ("--volume", "--save-predictions", "--tolerance flare22"):
        message = fails(evaluation, *options, *words.split())
        assert "MedSAM's slices, whose spacing" in message and words in message
    expected = f"{data.folder}: has no spacing, but {fresh_slices} has"
    assert expected in fails(evaluation, *options, fresh_slices)
    assert not (tmp_path / "out").exists()


def save(folder, part, array, name=f"{CASES[0]}-000"):
    np.save(folder / part / f"{name}.npy", array)


def image(*where, value):
    array = np.zeros((SIDE, SIDE, 3))
    array[where] = value
    return lambda folder: save(folder, "imgs", array)


def label(array):
    return lambda folder: save(folder, "gts", array)


def other_size(folder):
    save(folder, "imgs", np.zeros((80, 96, 3)))
    save(folder, "gts", np.zeros((80, 96), np.uint8))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (image(value=255), "floats in [0, 1]"),
        (image(value=np.nan), "or NaN"),
        (image(5, 7, 1, value=0.02 / 255), "its three channels differ"),
        (
            lambda f: save(f, "imgs", np.zeros((1024, 1024), np.uint8)),
            "expected floats (H, W, 3)",
        ),
        (label(np.zeros((512, 512), np.uint8)), "and label ids uint8 (H, W), found"),
        (label(np.zeros((SIDE, SIDE))), "and label ids uint8 (H, W), found"),
        (lambda f: (f / "gts" / f"{CASES[1]}-001.npy").write_bytes(b"x"), "not a NumPy array"),
        (lambda f: (f / "gts" / f"{CASES[1]}-001.npy").unlink(), "missing from imgs/ or gts/"),
        (lambda f: save(f, "imgs", np.zeros(3), "a-0042"), "not named like CASE-042.npy"),
        (other_size, "but others (80, 96)"),
    ],
)
def test_bad_slices(medsam, tmp_path, fails, change, expected):
    folder = tmp_path / "npy"
    shutil.copytree(medsam, folder)
    change(folder)
    message = refused(fails, folder, tmp_path / "out")
    assert expected in message and ".npy" in message


def test_window_and_the_wrong_folder_are_refused(medsam, data, tmp_path, fails):
    message = refused(fails, medsam, tmp_path / "out", "--window", "-160,240")
    assert "already windowed" in message
    message = refused(fails, data.folder, tmp_path / "out")
    assert "already preprocessed; use train_adaptive.py --data" in message
    message = fails(train_adaptive, "--data", medsam, "--work-dir", tmp_path / "work")
    assert "whose --input takes CT volumes and MedSAM's slices" in message
    for part in ("imgs", "gts"):
        (tmp_path / "empty" / part).mkdir(parents=True)
    assert "holds no imgs/CASE-042.npy" in refused(fails, tmp_path / "empty", tmp_path / "out")
