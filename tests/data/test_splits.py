"""Splits of patients: at random, by a file, and what a test split can show."""

import shlex

import pytest

import preprocess_ct
from tests.helpers import preprocess, refused
from utils.data.slices import open_dataset
from utils.data.splits import note_on_test_split, read_split_file, split_patients
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


# --- By a file -----------------------------------------------------------------------------------
def test_split_and_patients_of_a_file(toy_volumes, tmp_path, capsys):
    file, out = tmp_path / "split.csv", tmp_path / "out"
    file.write_text(PATIENTS)
    meta = preprocess(toy_volumes, out, "--split", file)
    dataset = open_dataset(out)
    found = {
        (entry.case, entry.patient): part
        for part in dataset.slices
        for entry in dataset.split(part)
    }
    assert found == {
        ("toy_0", "Ann"): "train",
        ("toy_1", "Ann"): "train",
        ("toy_2", "Cleo"): "test",
        ("toy_3", "Bob"): "val",
    }
    assert "train 2 cases of 1 patient, 4 slices; val 1 case, 2 slices" in capsys.readouterr().out
    assert meta["split"] == {"file": "split.csv"}


@pytest.mark.parametrize(
    "text",
    [
        "case,split\na,train\nb,test\n",
        "\ufeffcase,split\r\na,train\r\n\r\nb,test\r\n",  # as Excel saves it
        "split,case\n train , a\ntest,b\nval,left out\n,\n",
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
        (b"", "expected the columns case,split[,patient], found nothing"),
        (b"case,patient\na,p\nb,q\n", "expected the columns"),
        (b"case,split,patients\na,train,p\n", "expected the columns"),
        (b"case,split\na,train\nb,\n", "row 3: expected a value for each of case,split"),
        (b"case,split\na,train,p\nb,test\n", "row 2: expected a value for each of case,split"),
        (b"case,split,patient\na,train,\n", "row 2: expected a value for each of"),
        (b"case,split\na,train\nb,tets\n", "row 3: split 'tets' is not one of train, val, test"),
        (b"case,split\na,train\nb,val\na,train\n", "row 4: case a is there twice"),
        (b"case,split\na,train\nb,val\nc,val\n", "row 4: no case 'c' in the data"),
        (b"case,split\nb,train\n", "lacks 1 of the 2 cases: a; add a row"),
        (
            b"case,split,patient\na,train,p\nb,test,p\n",
            "row 3: patient p is in test here and in train before",
        ),
        (b"case,split\n\xff,train\n", "not a CSV file in UTF-8"),
        (b'case,split\n"a,train\nb,val\n', "not a CSV file in UTF-8"),
    ],
)
def test_file_that_cannot_be_used(tmp_path, text, expected):
    (tmp_path / "s.csv").write_bytes(text)
    with pytest.raises(UserError) as error:
        read_split_file(tmp_path / "s.csv", ["a", "b"])
    assert str(error.value).startswith(f"{tmp_path / 's.csv'}: ") and expected in str(error.value)


def test_file_that_does_not_fit_leaves_nothing(fails, toy_volumes, tmp_path):
    (tmp_path / "s.csv").write_text("case,split\ntoy_0,train\n")
    split = ("--split", tmp_path / "s.csv")
    assert "lacks 3 of the 4 cases: toy_1" in refused(fails, toy_volumes, tmp_path / "out", *split)
    split = ("--split", tmp_path / "none.csv")
    assert "none.csv: cannot read" in refused(fails, toy_volumes, tmp_path / "out", *split)


def test_row_of_a_case_that_is_left_out_may_stay(toy_volumes, tmp_path):
    (toy_volumes / "labels" / "toy_3.nii.gz").unlink()
    (tmp_path / "s.csv").write_text(PATIENTS)
    meta = preprocess(toy_volumes, tmp_path / "out", "--split", tmp_path / "s.csv", "--skip-bad")
    assert set(meta["cases"]) == {"toy_0", "toy_1", "toy_2"}


# --- What it is good for -------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("counts", "from_file", "expected"),
    [
        ((40, 5, 5), False, "5, too few for a conclusion (the ablation's comparisons need 8 for"),
        ((40, 5, 5), False, "; --split 0.7,0.1,0.2 gives 35/5/10"),
        ((24, 3, 3), False, "; --split 0.6,0.1,0.3 gives 18/3/9"),
        ((16, 2, 2), False, "; --split 0.5,0.1,0.4 gives 10/2/8"),
        ((40, 5, 5), True, "; move 3 more of the 50 to test"),
        ((12, 1, 1), False, "; 14 are too few to train and to test on"),
        ((34, 6, 8), False, "test: 8, enough for a conclusion (the ablation's"),
        ((0, 0, 7), False, "need 8 for any p under 0.05)"),
    ],
)
def test_note_on_the_test_split(counts, from_file, expected):
    counts = dict(zip(("train", "val", "test"), counts, strict=True))
    note = note_on_test_split(counts, 8, from_file)
    assert expected in note
    if counts["test"] in (7, 8):
        assert note.endswith("0.05)")


@pytest.mark.parametrize(
    ("splits", "expected"),
    [
        (("train", "val", "test"), "python train_adaptive.py --data"),
        (("train", "val"), "python train_adaptive.py --data"),
        (("test", "test"), "python eval.py --models lite_medsam --data"),
        (("val", "test"), "python eval.py --models lite_medsam --data"),
        (("train", "test"), None),
        (("val", "val"), None),
    ],
)
def test_next_command_is_one_that_runs(splits, expected, capsys):
    cases = {f"case {n}": {"split": split} for n, split in enumerate(splits)}
    preprocess_ct.print_outlook({"cases": cases, "split": {"shares": [0, 0, 1]}}, "my data")
    lines = capsys.readouterr().out.splitlines()
    assert ("need 8 for any p under 0.05" in lines[0]) == ("test" in splits)
    if expected:
        assert sorted(shlex.split(lines[-1])) == sorted(["next:", *expected.split(), "my data"])
    else:
        assert "train_adaptive.py" not in lines[-1] and "training needs patients" in lines[-1]
