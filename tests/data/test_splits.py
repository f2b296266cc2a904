"""Splits of patients: at random, by a file, and what a test split can show."""

import shlex

import pytest

import preprocess_ct
from tests.helpers import preprocess, refused
from utils.data.slices import open_dataset
from utils.data.splits import read_split_file, split_patients
from utils.system import UserError

CASES = [f"toy_{number}" for number in range(4)]
PATIENTS = """\
case,split,patient
toy_0,train,Ann
toy_3,val,Bob
toy_1,train,Ann
toy_2,test,Cleo
"""


def test_split_is_seeded_and_independent_of_order():
    cases = [f"case_{i}" for i in range(50)]
    split = split_patients(cases, (0.8, 0.1, 0.1), 0)
    assert sorted(split) == sorted(cases)
    assert split == split_patients(cases[::-1], (0.8, 0.1, 0.1), 0)
    assert split != split_patients(cases, (0.8, 0.1, 0.1), 1)


@pytest.mark.parametrize(
    ("count", "shares", "expected"),
    [
        (50, (0.8, 0.1, 0.1), [40, 5, 5]),
        (1, (0.8, 0.1, 0.1), [1, 0, 0]),
        (3, (0.8, 0.1, 0.1), [1, 1, 1]),
        (4, (0, 0, 1), [0, 0, 4]),
        (3, (0, 0.5, 0.5), [0, 2, 1]),
        (92, (0.8, 0.1, 0.1), [74, 9, 9]),
    ],
)
def test_split_counts(count, shares, expected):
    split = split_patients([str(i) for i in range(count)], shares, 0)
    assert [list(split.values()).count(part) for part in ("train", "val", "test")] == expected


def test_split_and_patients_of_a_file(toy_volumes, tmp_path, capsys):
    file, out = tmp_path / "split.csv", tmp_path / "out"
    file.write_text(PATIENTS)
    meta = preprocess(toy_volumes, out, "--split", file)
    dataset = open_dataset(out)
    found = {f"{s.case},{part},{s.patient}" for part in dataset.slices for s in dataset.split(part)}
    assert found == set(PATIENTS.split()[1:])
    assert "train 2 cases of 1 patient, 4 slices; val 1 case, 2 slices" in capsys.readouterr().out
    assert meta["split"] == {"file": "split.csv"}


@pytest.mark.parametrize(
    "text",
    [
        "case,split\na,train\nb,test\n",
        "\ufeffcase,split\r\na,train\r\n\r\nb,test\r\n",  # as Excel saves it
        "Split;Case\n train ; a\ntest;b\nval;left out\n;\n",
        'case,split\n"a",train\nb,test',
    ],
)
def test_ways_to_write_the_file(tmp_path, text):
    (tmp_path / "s.csv").write_bytes(text.encode())
    assigned = read_split_file(tmp_path / "s.csv", ["a", "b"], unusable=["left out"])
    assert assigned == {"a": {"split": "train"}, "b": {"split": "test"}}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"", "no column case, split; expected the columns case,split (and patient)"),
        (b"case,split,patients\na,train,p\n", "unknown column patients; expected case,split"),
        (b"case,split,split\na,train,val\n", "column split occurs twice"),
        (b"case,split\na,train\nb,\n", "row 3: expected a value for each of case,split"),
        (b"case,split,patient\na,train,p\nb,test\n", "row 3: expected a value for each of case"),
        (b"case,split\na,train,p\nb,test\n", "row 2: has 3 values, the header 2"),
        (b"case,split\na,train\nb,tets\n", "row 3: split 'tets' is not one of train, val, test"),
        (b"case,split\na,train\nb,val\na,train\n", "row 4: case a is listed twice"),
        (b"case,split\na,train\nb,val\nc,val\n", "row 4: no case 'c' in the data"),
        (b"case,split\nb,train\n", "lacks 1 of the 2 cases, such as a; add a row"),
        (
            b"case,split,patient\na,train,p\nb,test,p\n",
            "row 3: patient p is in test here but in train above",
        ),
    ],
)
def test_file_that_cannot_be_used(tmp_path, text, expected):
    (tmp_path / "s.csv").write_bytes(text)
    with pytest.raises(UserError) as error:
        read_split_file(tmp_path / "s.csv", ["a", "b"])
    assert str(error.value).startswith(f"{tmp_path / 's.csv'}") and expected in str(error.value)


def test_file_that_does_not_fit_leaves_nothing(fails, toy_volumes, tmp_path):
    (tmp_path / "s.csv").write_text("case,split\ntoy_0,train\n")
    for name, expected in (("s", "lacks 3 of the 4 cases, such as toy_1"), ("none", "cannot read")):
        split = ("--split", tmp_path / f"{name}.csv")
        assert expected in refused(fails, toy_volumes, tmp_path / "out", *split)


RECOMMENDED = "python train_adaptive.py --data --run 'my data' --policy recommended --ema"


@pytest.mark.parametrize(
    ("splits", "expected"),
    [
        (("train", "val", "test"), RECOMMENDED),
        (("train", "val"), RECOMMENDED),
        (("val", "test"), "python eval.py --models lite_medsam --data"),
        (("train", "test"), None),
    ],
)
def test_next_command_is_one_that_runs(splits, expected, capsys):
    cases = {f"case {n}": {"split": split} for n, split in enumerate(splits)}
    preprocess_ct.print_outlook({"cases": cases}, "my data")
    lines = capsys.readouterr().out.splitlines()
    assert ("patients in test" in lines[0]) == ("test" in splits)
    if expected:
        assert sorted(shlex.split(lines[-1])) == sorted(
            ["next:", *shlex.split(expected), "my data"]
        )
    else:
        assert "train_adaptive.py" not in lines[-1] and "training needs patients" in lines[-1]


def test_the_ablation_needs_eight_patients(capsys):
    """2 ** (1 - n) is the least p of n patients, times four by Holm."""
    for count, verdict in ((15, "8, enough for"), (14, "7, too few for")):
        cases = {str(n): {"split": "test", "patient": str(n // 2)} for n in range(count)}
        preprocess_ct.print_outlook({"cases": cases}, "out")
        assert f"patients in test: {verdict} a conclusion" in capsys.readouterr().out
