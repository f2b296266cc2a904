"""Tables as spreadsheets save them: the same rows from all of them, or one line."""

import pytest

from utils.data.tables import read_table
from utils.system import UserError

ROWS = [(2, {"case": "a", "x0": "8.5"}), (4, {"case": "b", "x0": "9"})]


@pytest.mark.parametrize(
    "text",
    [
        "case,x0\na,8.5\n\nb,9",
        "\ufeffCase; X0\r\na;8,5\r\n;\r\nb;9;;\r\n",  # by Excel with a comma as decimal point
        'case\tx0\n"a"\t 8,5\n\t\nb\t9\n',
    ],
)
def test_ways_to_write_a_table(tmp_path, text):
    (tmp_path / "t.csv").write_bytes(text.encode())
    assert read_table(tmp_path / "t.csv", ["x0"], ["case"]) == ROWS


def test_rows_are_counted_in_lines_of_the_file(tmp_path):
    (tmp_path / "t.csv").write_text('\ncase,note\na,"of\ntwo lines"\nb\n')
    assert [n for n, _ in read_table(tmp_path / "t.csv", ["case"])] == [3, 5]
    assert read_table(tmp_path / "t.csv", ["case"])[1] == (5, {"case": "b", "note": ""})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"", "t.csv: no column case, x0; expected the columns case,x0, and rows"),
        (b"case,y\na,1\n", "t.csv: no column x0; expected the columns case,x0"),
        (b"case,x0\n,\n", "t.csv: has no rows"),
        (b"case,x0,X0\na,1,2\n", "t.csv: column x0 occurs twice"),
        (b"case,x0\na,1\na,8,5\n", "t.csv, row 3: has 3 values, the header 2"),
        (b"case,x0\n\xff,1\n", "t.csv: not a table in UTF-8"),
        (b'case,x0\n"a,1\n', "t.csv: not a table in UTF-8"),
    ],
)
def test_tables_that_cannot_be_used(tmp_path, text, expected):
    (tmp_path / "t.csv").write_bytes(text)
    with pytest.raises(UserError) as error:
        read_table(tmp_path / "t.csv", ["case", "x0"])
    assert expected in str(error.value)
