"""Tables that people write: CSV with commas, semicolons or tabs, as spreadsheets save it."""

import csv
import io
import re
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path

from utils.system import UserError
from utils.system.files import read_bytes

Rows = list[tuple[int, dict[str, str]]]


def read_table(path: str | Path, required: Sequence[str], optional: Sequence[str] = ()) -> Rows:
    """The rows of a table that are not empty: the line where each starts, and its values.

    Values are by column, whose names are in lower case; "" where the row ends early. Columns that
    are neither `required` nor `optional` are kept. Unless commas separate the values, a comma in a
    number is a decimal comma, and becomes a point.

    Raises UserError: unreadable, not UTF-8, a missing or repeated column, no rows, or a row with
    more values than the header.
    """
    try:
        text = read_bytes(path).decode("utf-8-sig")  # Excel writes a byte order mark
        first = next((line for line in text.splitlines() if line.strip(" ,;\t")), "")
        separator = max(",;\t", key=first.count)
        lines = io.StringIO(text, newline="")
        reader = csv.reader(lines, delimiter=separator, skipinitialspace=True, strict=True)
        rows, number = [], 1
        for values in reader:
            values = [value.strip() for value in values]
            if any(values):  # Excel leaves empty rows
                rows.append((number, values))
            number = reader.line_num + 1
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: not a table in UTF-8 ({error}); save it as CSV UTF-8") from error
    columns = [name.lower() for name in rows[0][1]] if rows else []
    problem = "" if rows[1:] else "has no rows"
    if missing := [name for name in required if name not in columns]:
        problem = f"no column {', '.join(missing)}"
    elif twice := [name for name in columns if name and columns.count(name) > 1]:
        problem = f"column {twice[0]} occurs twice"
    if problem:
        named = ",".join(required) + f" (and {','.join(optional)})" * bool(optional)
        raise UserError(f"{path}: {problem}; expected the columns {named}, and rows below them")
    table = []
    for number, values in rows[1:]:
        if any(values[len(columns) :]):
            raise UserError(
                f"{path}, row {number}: has {len(values)} values, the header {len(columns)}; "
                "use decimal points, or separate the values with semicolons"
            )
        if separator != ",":
            values = [re.sub(r"^(-?\d*),(\d+)$", r"\1.\2", value) for value in values]
        row = dict(zip_longest(columns, values[: len(columns)], fillvalue=""))
        row.pop("", None)  # columns without a name
        table.append((number, row))
    return table
