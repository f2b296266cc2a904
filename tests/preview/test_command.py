"""python perturb.py: options, pictures, tables on disk, and bad input in one line."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

import perturb as p
from perturb import Perturbation
from tests.helpers import BOXES_HEADER, call, tight_rows, toy_case, write_volume
from utils.preview.command import describe, main
from utils.preview.options import parse_options

SCRIPT = SimpleNamespace(main=main, parse_options=parse_options)  # python perturb.py


def table_of(out: Path, *words: object) -> pd.DataFrame:
    call(SCRIPT, *words, "--out", out)
    return pd.read_csv(out.with_suffix(".csv"))


def test_examples_and_a_slice_of_ones_own(tmp_path, toy_slices, capsys):
    examples, own = tmp_path / "examples.png", tmp_path / "own.png"
    call(SCRIPT, "--out", examples, "--delta-expand", 1000)
    clamped = f"adaptive: delta_expand 1000 px is out of bounds: clamped to {p.DELTA_EXPAND_MAX:g}"
    assert clamped in capsys.readouterr().out
    image = sorted((toy_slices / "imgs").iterdir())[0]
    call(SCRIPT, "--image", image, "--label", toy_slices / "gts" / image.name, "--out", own)
    assert "large: " in capsys.readouterr().out  # by the dataset.json above
    alone = tmp_path / "alone" / "gts"
    alone.mkdir(parents=True)
    shutil.copy(toy_slices / "gts" / image.name, alone)
    call(SCRIPT, "--image", image, "--label", alone / image.name, "--out", own)
    assert "label 1: " in capsys.readouterr().out
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in (examples, own))


def test_a_second_picture_does_not_replace_the_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("perturb.png", "perturb-2.png", "perturb-3.png"):
        assert parse_options([]).out == str(Path("work_dir", name))
        Path("work_dir").mkdir(exist_ok=True)
        Path("work_dir", name).touch()


def test_description_by_hand():
    """A box of 20 x 40 px under 10 % both ways, and under MedSAM's shift."""
    mask = np.zeros((1024, 1024), bool)
    mask[100:140, 200:220] = True
    policies = [Perturbation("adaptive", "width", 102.4, -51.2), Perturbation("medsam")]
    first, adaptive, medsam = describe(("organ", mask), policies).splitlines()
    assert first.startswith("organ: 20 x 40 px, theta_omega 0.020, xi 0.50;")
    assert adaptive.split(maxsplit=1)[1] == "x -1.0 ... +2.0 px, y -2.0 ... +4.0 px"
    assert f"x +0.0 ... {p.MEDSAM_SHIFT:+.1f} px" in medsam


def test_table_has_one_row_per_policy_and_label(toy_slices, tmp_path, monkeypatch, capsys):
    """A new policy needs no other edit."""
    for name in ("first", "second"):  # more of them than there are colours
        monkeypatch.setitem(p.POLICIES, name, p.adaptive)
    out = tmp_path / "boxes.png"
    rows = table_of(out, "--data", toy_slices, "--draws", 2, "--seed", 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["boxes.csv", "boxes.png"]
    expected = [(policy, label) for policy in p.POLICIES for label in ("large", "small", "all")]
    assert list(zip(rows.policy, rows.label, strict=True)) == expected
    assert "2 per mask, seed 2" in capsys.readouterr().out
    call(SCRIPT, "--policy", "second", "--out", tmp_path / "examples.png")
    assert "second " in capsys.readouterr().out


def test_options_reach_the_numbers(toy_slices, tmp_path):
    data = ("--data", toy_slices.parent / "ct" / "labels", "--label-names", "1=big one")
    some = (*data, "--policy", "adaptive,medsam")
    rows = table_of(tmp_path / "a.png", *some)
    assert rows.policy.tolist() == ["adaptive"] * 3 + ["medsam"] * 3
    assert rows.label[:3].tolist() == ["big one", "label 2", "all"]
    wider = table_of(tmp_path / "b.png", *some, "--delta-expand", 1000, "--epsilon-shrink", 0)
    assert (wider.delta_expand_px == p.DELTA_EXPAND_MAX).all()
    assert (wider.offset_percent_of_side_p05 >= 0).all()
    medsam = [table[table.policy == "medsam"].offset_px_p95.tolist() for table in (rows, wider)]
    assert medsam[0] == medsam[1]  # medsam uses no factors


def test_given_boxes(toy_slices, tmp_path, capsys):
    boxes = tmp_path / "boxes.csv"
    rows = "".join(tight_rows(number, f"toy_{number}", move=-1) for number in range(3))
    rows = rows.replace(",1,1,", ",large,1,") + "toy_0,9,1,1,1,2,2\n"  # a name; no such label
    boxes.write_text(BOXES_HEADER + rows)
    table = table_of(tmp_path / "out.png", "--data", toy_slices, "--boxes", boxes)
    printed = capsys.readouterr().out
    assert "12 boxes beside the tight ones" in printed
    assert "note: 1 of the given boxes" in printed
    assert "DELTA_EXPAND = 0.0 and EPSILON_SHRINK = -" in printed
    assert table.label.tolist() == ["large", "small", "all"] and table.boxes.iloc[-1] == 12
    assert (table.cut_percent == 100).all() and (table.offset_px_high < 0).all()


def test_boxes_that_miss_their_targets_are_named_and_left_out(toy_slices, tmp_path, fails, capfd):
    boxes = tmp_path / "boxes.csv"
    beside = "toy_0,large,2,90,70,95,79\n"  # in another corner
    boxes.write_text(BOXES_HEADER + tight_rows(0, "toy_0") + beside)
    table = table_of(tmp_path / "out.png", "--data", toy_slices, "--boxes", boxes)
    printed = capfd.readouterr().out
    assert "left out, as they miss their targets: 1 box\ntoy_0, z 2: large\n" in printed
    assert table.boxes.iloc[-1] == 4 and table.offset_px_high.iloc[-1] < 20
    boxes.write_text(BOXES_HEADER + beside)
    words = ("--data", toy_slices, "--boxes", boxes, "--out", tmp_path / "none.png")
    assert "every box misses its target (toy_0, z 2: large)" in fails(SCRIPT, *words)


def test_bad_folders(fails, toy_slices, tmp_path):
    hu, labels = toy_case(0)
    for name, array in (("image", hu), ("blank", labels * 0)):
        write_volume(tmp_path / name / "a.nii.gz", array)
    (tmp_path / "empty").mkdir()
    for data, words in (
        ("nowhere", "no such folder"),
        ("empty", "holds no .nii.gz, .nii, .seg.nrrd"),
        ("image", "label ids must be 0 to 255"),
        ("blank", "no volume has a label"),
    ):
        out = tmp_path / "none" / "a.png"
        assert words in fails(SCRIPT, "--data", tmp_path / data, "--out", out)
        assert not out.parent.exists()
    given = ("--data", toy_slices, "--label-names", "flare22")
    assert "has names" in fails(SCRIPT, *given)
    given = ("--data", toy_slices.parent / "ct" / "labels", "--boxes", "a.csv")
    assert "give the --out of preprocess_ct.py" in fails(SCRIPT, *given)


@pytest.mark.parametrize(
    ("words", "options"),
    [
        ("--draws: expected a whole number, 1 or more", ("--draws", 0)),
        ("--epsilon-shrink: expected a number", ("--epsilon-shrink", 1)),
        ("cannot be combined", ("--data", "a", "--image", "a.npy", "--label", "b.npy")),
        ("go together", ("--image", "a.npy")),
        ("cannot read", ("--image", "no.npy", "--label", "no.npy")),
        ("expected ID=NAME", ("--data", "a", "--label-names", "liver")),
        ("expected a picture", ("--out", "a.csv")),
        ("give the folder", ("--boxes", "a.csv")),
        ("writes its own table", ("--data", "a", "--out", "b.png", "--errors", "b.csv")),
    ],
)
def test_bad_options(fails, words, options):
    assert words in fails(SCRIPT, *options)


def test_bad_boxes(toy_slices, tmp_path, fails):
    boxes = tmp_path / "boxes.csv"
    words = (SCRIPT, "--data", toy_slices, "--boxes", boxes, "--out", tmp_path / "boxes.png")
    boxes.write_text(BOXES_HEADER + "toy_7,1,1,1,1,2,2\n")
    assert "would replace the boxes" in fails(*words)  # its table would be boxes.csv
    assert boxes.read_text().startswith(BOXES_HEADER)
    assert "there is no case 'toy_7'; choose from toy_0" in fails(*words[:-1], "other.png")
