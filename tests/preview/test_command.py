"""python perturb.py: options, pictures, the table on disk, and bad input in one line."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import SimpleITK as sitk

import perturb as p
from tests.helpers import toy_case, write_volume
from utils.preview.command import main
from utils.preview.figures import draw_overlap


def test_examples_and_a_slice_of_ones_own(tmp_path, toy_slices, capsys):
    examples, own = tmp_path / "examples.png", tmp_path / "own.png"
    main(["--out", str(examples), "--delta-expand", "1000"])
    shown = capsys.readouterr().out
    assert f"clamped to delta_expand {p.DELTA_EXPAND_MAX:g}" in shown
    assert "large: 515 x" in shown
    name = sorted((toy_slices / "imgs").iterdir())[0].name
    image, label_map = (str(toy_slices / folder / name) for folder in ("imgs", "gts"))
    main(["--image", image, "--label", label_map, "--out", str(own)])
    assert "label 1 (largest" in capsys.readouterr().out
    for path in (examples, own):
        assert path.read_bytes().startswith(b"\x89PNG")


def table_of(folder: Path, out: Path, *options: str) -> pd.DataFrame:
    main(["--data", str(folder), "--out", str(out), *options])
    return pd.read_csv(out.with_suffix(".csv"))


def test_table_has_one_row_per_policy_and_label(toy_slices, tmp_path, capsys):
    rows = table_of(toy_slices, tmp_path / "boxes.png", "--draws", "5", "--seed", "2")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["boxes.csv", "boxes.png"]
    expected = [(policy, label) for policy in p.POLICIES for label in ("large", "small", "all")]
    assert list(zip(rows.policy, rows.label, strict=True)) == expected
    assert "5 per mask, seed 2" in capsys.readouterr().out


def test_options_reach_the_numbers(toy_slices, tmp_path, capsys):
    labels = toy_slices.parent / "ct" / "labels"
    some = ("--policies", "adaptive,medsam", "--label-names", "1=big one")
    rows = table_of(labels, tmp_path / "a.png", *some)
    assert rows.policy.tolist() == ["adaptive"] * 3 + ["medsam"] * 3
    assert set(rows.label) == {"big one", "label 2", "all"}
    factors = ("--delta-expand", "1000", "--epsilon-shrink", "0")
    wider = table_of(labels, tmp_path / "b.png", *some, *factors)
    assert (wider.delta_expand_px == p.DELTA_EXPAND_MAX).all()
    assert "clamped to delta_expand" in capsys.readouterr().out
    adaptive = wider[wider.policy == "adaptive"]
    most = 100 * p.DELTA_EXPAND_MAX / p.IMAGE_SIZE
    assert (adaptive.offset_percent_of_side_p95 > 0.8 * most).all()
    assert (adaptive.offset_percent_of_side_p05 >= 0).all()
    medsam = [table[table.policy == "medsam"].offset_px_p95.tolist() for table in (rows, wider)]
    assert medsam[0] == medsam[1]  # medsam uses no factors
    by_area = table_of(labels, tmp_path / "e.png", *some, "--reading", "area")
    assert (by_area.reading == "area").all() and (
        by_area.delta_expand_px == p.default_factors("area")[0]
    ).all()
    assert "theta_omega by area" in " ".join(capsys.readouterr().out.split())
    rows = table_of(labels, tmp_path / "c.png", "--draws", "1")
    assert rows.label[:3].tolist() == ["label 1", "label 2", "all"]
    write_volume(tmp_path / "labels" / "FLARE22_Tr_0001.nii.gz", toy_case(0)[1])
    rows = table_of(tmp_path / "labels", tmp_path / "d.png", "--draws", "1")
    assert rows.label[:3].tolist() == ["liver", "right kidney", "all"]


def test_new_policy_needs_no_other_edit(toy_slices, tmp_path, monkeypatch, capsys):
    for name in ("first", "second"):  # more of them than there are styles of lines
        monkeypatch.setitem(p.POLICIES, name, p.adaptive)
    rows = table_of(toy_slices, tmp_path / "boxes.png", "--draws", "1")
    assert set(rows.policy) == set(p.POLICIES)
    main(["--policies", "second", "--out", str(tmp_path / "examples.png")])
    assert "second " in capsys.readouterr().out


def test_overlap_picture_follows_the_data(tmp_path):
    def pixels(name: str, small: dict, large: dict) -> np.ndarray:
        draw_overlap({"small, N = 3": small, "large, N = 4": large}, tmp_path / name)
        return sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / name)))

    empty, low, high = np.empty((0, 2)), np.linspace(0.2, 0.6, 8), np.linspace(0.5, 0.9, 8)
    of_all = {policy: low.reshape(4, 2) for policy in p.POLICIES}
    before = pixels("a.png", of_all, of_all)
    assert (before == pixels("b.png", of_all, of_all)).all()
    changed = pixels("c.png", of_all, of_all | {"adaptive": high})
    differs = (before != changed).any(axis=(0, 2))  # columns of the picture
    middle = len(differs) // 2
    assert differs[middle:].any() and not differs[:middle].any()
    alone = {"none": low}
    assert (pixels("d.png", alone, {"none": empty}) != pixels("e.png", alone, alone)).any()


def test_statistics_need_no_torch(toy_slices, tmp_path):
    code = (
        "import sys; from utils.preview.command import main; main(sys.argv[1:]); "
        "print('torch' in sys.modules)"
    )
    options = ("--data", toy_slices, "--out", tmp_path / "a.png", "--policies", "medsam")
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, options)],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(p.__file__).parent,
    )
    assert done.stdout.endswith("False\n")


def test_bad_folders_and_options(fails, toy_slices, tmp_path):
    def refuses(*options: object) -> str:
        out = tmp_path / "none" / "a.png"
        message = fails(main, *options, "--out", out)
        assert not out.parent.exists()
        return message

    empty, cut, image, blank = (tmp_path / name for name in ("empty", "cut", "image", "blank"))
    empty.mkdir()
    hu, labels = toy_case(0)
    for folder, array in ((cut, labels), (image, hu), (blank, labels * 0)):
        write_volume(folder / "a.nii.gz", array)
    whole = (cut / "a.nii.gz").read_bytes()
    (cut / "a.nii.gz").write_bytes(whole[: len(whole) // 2])
    assert "no such folder" in refuses("--data", tmp_path / "nowhere")
    assert "holds neither dataset.json nor" in refuses("--data", empty)
    assert "a.nii.gz: damaged or cut short" in refuses("--data", cut)
    assert "label ids must be 0 to 255" in refuses("--data", image)
    assert "no volume has a label" in refuses("--data", blank)
    data = ("--data", toy_slices)
    assert "unknown policy 'best'" in refuses(*data, "--policies", "medsam,best")
    assert "names a policy twice" in refuses("--policies", "medsam,medsam")
    assert "must be 1 or more" in refuses(*data, "--draws", "0")
    assert "--draws: expected a whole number" in refuses("--draws", "-1")
    assert "--delta-expand: expected a number, 0 to" in refuses("--delta-expand", "-1")
    assert "--epsilon-shrink: expected a number" in refuses("--epsilon-shrink", "1")
    assert "exclude each other" in refuses(*data, "--image", "a.npy", "--label", "b.npy")
    assert "go together" in refuses("--image", "a.npy")
    assert "cannot read" in refuses("--image", "no.npy", "--label", "no.npy")
    assert "has names" in refuses(*data, "--label-names", "flare22")
    assert "give their folder to --data" in refuses("--label-names", "flare22")
    assert "expected ID=NAME" in refuses("--data", blank, "--label-names", "liver")
    assert "names the picture" in fails(main, *data, "--out", tmp_path / "a.csv")


def test_damaged_slice_is_named(fails, toy_slices, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(toy_slices, copy)
    file = copy / "gts" / "toy_1-002.npy"
    file.write_bytes(file.read_bytes()[:-1] + b"\7")
    assert "toy_1-002.npy: changed or damaged" in fails(main, "--data", copy)
