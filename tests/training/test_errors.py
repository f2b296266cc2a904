"""Tables of errors: what is written, what is thinned out, and bad tables in one line."""

import numpy as np
import pandas as pd
import pytest

import perturb
from utils.preview.measuring import thin, write_errors
from utils.system import UserError
from utils.training.errors import COLUMNS, checked_errors

HEADER = ",".join(COLUMNS)
ROW = "every 5,1,63.2,-0.041,0.012,0,0.02"


def test_a_written_table_is_read_rounded_and_in_order_of_size(tmp_path):
    rows = [["b", 2, 100.06, 0.5, -0.25, -0.0001, 0], ["a", 1, 7.0, 0.1236, 2, 0, 0]]
    path = tmp_path / "errors.csv"
    write_errors(path, pd.DataFrame(rows, columns=COLUMNS), "how it was made")
    expected = ["# how it was made", HEADER, "b,2,100.1,0.5,-0.25,0,0", "a,1,7,0.124,2,0,0"]
    assert path.read_text().splitlines() == expected
    assert checked_errors(path) == str(path)
    read = perturb.read_errors(str(path))
    assert read.tolist() == [[7, 0.124, 2, 0, 0], [100.1, 0.5, -0.25, 0, 0]]


def test_thinning_leaves_as_many_rows_of_each_protocol_and_patient(tmp_path):
    table = pd.DataFrame(
        {"protocol": np.repeat(["x", "y"], 60), "patient": np.tile([1, 1, 2], 40), "size": 1.0}
    ).assign(left=np.arange(120.0))
    thinned = thin(table, 40, seed=0)
    assert (thinned.groupby(["protocol", "patient"]).size() == 10).all() and len(thinned) == 40
    assert thinned.left.is_monotonic_increasing and thinned.left.nunique() == 40
    assert thin(table, 40, seed=0).equals(thinned) and not thin(table, 40, seed=1).equals(thinned)
    assert len(thin(table, 10_000, seed=0)) == 120


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "expected columns protocol,patient,size"),
        (f"{HEADER[:-7]}\n{ROW}", "expected columns"),
        (f"# a comment\n{HEADER}\n", "has no rows"),
        (f"# a comment\n{HEADER}\n{ROW}\n\n{ROW[:-5]}", "row 5: expected a size above 0 px"),
        (f"{HEADER}\n{ROW},1", "row 2: expected"),
        (f"{HEADER}\n{ROW.replace('63.2', '0')}", "found every 5,1,0,-0.041"),
        (f"{HEADER}\n{ROW.replace('63.2', 'x')}", "row 2: expected"),
        (f"{HEADER}\n{ROW.replace('0.012', 'nan')}", "row 2: expected"),
        (f"{HEADER}\n{ROW.replace('-0.041', '-4.1')}", "four shares of the side above -1"),
    ],
)
def test_bad_tables(tmp_path, text, expected):
    path = tmp_path / "errors.csv"
    path.write_text(text)
    with pytest.raises(UserError, match="errors.csv") as error:
        checked_errors(path)
    assert expected in str(error.value) and "\n" not in str(error.value)


def test_the_table_of_the_project_has_three_protocols_of_ten_patients_and_no_path():
    assert checked_errors(perturb.ERRORS) == perturb.ERRORS
    with open(perturb.ERRORS) as file:
        assert file.readline().startswith("# python perturb.py --data data/FLARE22Train/labels")
    table = pd.read_csv(perturb.ERRORS, comment="#")
    assert sorted(table.protocol.unique()) == ["every 10", "every 5", "neighbour"]
    assert sorted(table.patient.unique()) == [*range(1, 11)]
    assert table.groupby(["protocol", "patient"]).size().nunique() == 1
