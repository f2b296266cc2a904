"""The options of eval.py."""

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
        ("", "give --runs DIR or --models"),
        ("--models =lite_medsam", "expected NAME=MODEL"),
        ("--models ../x=lite_medsam", "NAME of letters"),
        ("--models m --shift 0.15", "expected a share of the side like 15%"),
        ("--models m --shift 50%", "less than half the side"),
        ("--models m --shift -5%", "must be more than 0"),
        ("--models m --shift 5% 5%", "given twice"),
        ("--models m --draws 0", "--draws: expected a whole number, 1 or more"),
        ("--models m --slices 0", "--slices: expected a whole number, 1 or more"),
        ("--models m --workers -1", "--workers: expected a whole number, 0"),
        ("--models m --tolerance -1", "--tolerance: expected mm"),
        ("--models m --cache off --cache-dir x", "leave out one of the two"),
        ("--models m --split both", "invalid choice: 'both'"),
        ("--models m --propagate", "--propagate: goes with --predict SCAN"),
        ("--models m --predict s.nii.gz", "give the boxes of the scan"),
    ],
)
def test_bad_options(fails, words, expected):
    assert expected in fails(evaluation, *words.split())


def test_default_folder_has_the_names_of_the_runs_or_models():
    def name_of(*words: str) -> str:
        return default_out(parse_options([*words])).name

    out = default_out(parse_options(["--runs", "a/ablation"]))
    assert out.as_posix() == "work_dir/eval/ablation"
    assert name_of("--runs", "first", "second", "--models", "lite_medsam") == "first+second"
    assert name_of("--models", "x=lite_medsam") == "x"
    assert len(name_of("--runs", "é" * 300).encode()) < 255
