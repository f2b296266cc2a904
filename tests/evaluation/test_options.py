"""The options of eval.py."""

from pathlib import Path

import pytest

import eval as evaluation
from utils.evaluation.options import ModelSpec, default_out, parse_model, parse_options


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("lite_medsam", ("lite_medsam", "lite_medsam", None)),
        ("ours=lite_medsam:a/b.pth", ("ours", "lite_medsam", "a/b.pth")),
        ("medsam_vit_b:x=1.pth", ("medsam_vit_b", "medsam_vit_b", "x=1.pth")),
        (r"w=medsam_vit_b:C:\w\m.pth", ("w", "medsam_vit_b", r"C:\w\m.pth")),
    ],
)
def test_model_argument(text, expected):
    assert parse_model(text) == ModelSpec(*expected)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", "give --runs RUN or --models"),
        ("--models =lite_medsam", "expected NAME=MODEL"),
        ("--models ../x=lite_medsam", "NAME of letters"),
        ("--models m --shift 0.15", "expected a share of the side like 15%"),
        ("--models m --shift 50%", "less than half the side"),
        ("--models m --shift 5% 5%", "given twice"),
        ("--models m --draws 0", "--draws: expected a whole number, 1 or more"),
        ("--models m --every 1", "--every: expected a whole number, 2 or more"),
        ("--models m --predict a --boxes b --every 5", "--predict: cannot be used with --every"),
        ("--models m --tolerance -1", "--tolerance: expected mm"),
        ("--models m --cache off --cache-dir x", "leave out one of the two"),
        ("--models m --split both", "invalid choice: 'both'"),
    ],
)
def test_bad_options(fails, words, expected):
    assert expected in fails(evaluation, *words.split())


def test_boxes_in_every_nth_slice_are_scored_in_3d():
    options = parse_options("--models m --every 10 3 3".split())
    assert options.every == [3, 10] and options.volume
    assert not parse_options(["--models", "m"]).volume


def test_a_run_may_be_named_by_its_name_in_work_dir(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "work_dir" / "one").mkdir(parents=True)
    (tmp_path / "here").mkdir()
    options = parse_options(["--runs", "one", "here", "neither"])
    assert options.runs == [str(Path("work_dir", "one")), "here", "neither"]


def test_default_folder_has_the_names_of_the_runs_or_models():
    def out_of(words: str) -> str:
        return default_out(parse_options(words.split())).as_posix()

    assert out_of("--runs a/first second --models lite_medsam") == "work_dir/eval/first+second"
    assert out_of("--models x=lite_medsam") == "work_dir/eval/x"
    assert len(out_of("--runs " + "é" * 300).encode()) < 270
