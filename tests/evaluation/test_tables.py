"""The paper's tables on made-up scores, and the three formats."""

import csv
import io
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from perturb import BOX_KINDS, Shift
from tests.evaluation.helpers import made_up, protocol, where
from utils.evaluation import paper_tables, tables
from utils.evaluation.statistics import Estimate
from utils.evaluation.tables import Table


def rows_of(table: Table) -> list[dict]:
    """The rows of a table's CSV."""
    return list(csv.DictReader(io.StringIO(tables.csv([table]))))


# --- The paper's tables --------------------------------------------------------------------------
def test_table_one():
    scores = made_up(10)
    table = paper_tables.table_one(scores, protocol(), Shift(0.15, "side"))
    rows = rows_of(table)
    assert [row["box"] for row in rows] == [*BOX_KINDS, "average"]
    for row in rows[:3]:
        shift = "0%" if row["box"] == "standard" else "15%"
        values = where(scores, model="medsam", box=row["box"], shift=shift)["nsd"]
        assert float(row["medsam NSD"]) == pytest.approx(100 * values.mean(), abs=1e-3)
        assert float(row["medsam NSD low"]) < float(row["medsam NSD"])
        assert (row["patients"], row["instances"]) == ("10", "20")
    average = np.mean([float(row["adaptive DSC"]) for row in rows[:3]])
    assert float(rows[3]["adaptive DSC"]) == pytest.approx(average, abs=1e-3)
    for word in ("10 patients", "20 instances", "2D", "2 mm", "U(0, 15%)", "1 draw", "intervals"):
        assert word in table.how
    few = paper_tables.table_one(made_up(5), protocol(), Shift(20, "px"))
    assert "without intervals, which need 6 patients" in few.how


def test_published_numbers_are_those_of_the_transcription():
    """tests/evaluation/published.csv was typed from the tables of arXiv:2503.19700."""
    cells = pd.read_csv(Path(__file__).with_name("published.csv"), dtype=str)
    marks = {
        "MedSAM": "medsam",
        "MedSAM + θ_ω ξ": "scaled",
        "MedSAM + δ_expand ε_shrink": "bidirectional",
        "MedSAM + θ_ω ξ + δ_expand ε_shrink": "adaptive",
    }
    one = paper_tables.published_table().frame.set_index("box")
    scores = made_up(9)
    two, three = (
        make(scores, protocol()).frame.set_index("model")
        for make in (paper_tables.table_two, paper_tables.table_three)
    )
    for table, row, column, value in cells.itertuples(index=False):
        if table == "I":
            shown = one.loc[row.lower(), column]
        else:
            of_policy = {"II": paper_tables.PUBLISHED_TWO, "III": paper_tables.PUBLISHED_THREE}
            shown = of_policy[table][marks[row]]
            shown = shown if table == "II" else shown[("DSC", "NSD").index(column)]
            frame = two if table == "II" else three
            if marks[row] in frame.index:
                assert frame.loc[marks[row], f"{column} (paper)"] == value
        assert shown == value, (table, row, column)
    assert one.size + 4 + 8 == len(cells)
    assert two.loc["untouched", "error rate (paper)"] == "–"


def test_tables_two_and_three_have_the_papers_rows_and_marks():
    scores = made_up(9)
    two, three = (
        make(scores, protocol()).frame
        for make in (paper_tables.table_two, paper_tables.table_three)
    )
    assert two.iloc[:, :3].values.tolist() == [
        ["–", "–", "medsam"],
        ["✓", "✓", "adaptive"],
        ["", "", "untouched"],
    ]
    seeds = {"medsam": "adaptive", "adaptive": "medsam"}  # as if misnamed: the policy decides
    swapped = paper_tables.table_two(scores, protocol(trainings=seeds)).frame
    assert swapped["model"].tolist() == ["adaptive", "medsam", "untouched"]
    assert swapped["error rate (paper)"].tolist() == ["18", "2", "–"]
    small = where(scores, small=True, model="medsam", box="standard")
    assert two["standard"][0].value == pytest.approx(small["error"].mean())
    assert two.loc[0, ["patients", "instances"]].tolist() == ["9", "9"]
    published = ["DSC (paper)", "NSD (paper)"]
    assert three.columns[5:].tolist() == ["15% DSC", "15% NSD", "20px DSC", "20px NSD", *published]
    shrink = where(scores, model="adaptive", box="shrink", shift="20px")
    assert three["20px DSC"][1].value == pytest.approx(shrink["dsc"].mean())


def test_table_two_without_small_instances_says_so():
    scores = made_up(3)
    table = paper_tables.table_two(where(scores, small=False), protocol())
    assert "No such instance" in table.how and "|" not in tables.markdown(table)
    assert tables.csv([table]).startswith('"θ_ω, ξ","δ_expand, ε_shrink",model,patients')
    assert r"\end{table}" in tables.latex(table)


def test_shift_and_label_tables():
    scores = made_up(6)
    rows = rows_of(paper_tables.label_table(scores, protocol(), "dsc"))
    assert [(row["label"], row["box"]) for row in rows] == [
        (label, kind) for label in ("adrenal gland", "liver") for kind in BOX_KINDS
    ]
    assert {row["instances"] for row in rows} == {"6"}
    rows = rows_of(paper_tables.shift_table(scores, protocol()))
    assert [(row["shift"], row["box"]) for row in rows] == [
        (shift, kind) for shift in ("15%", "20px") for kind in BOX_KINDS[1:]
    ]


# --- Formats -------------------------------------------------------------------------------------
@pytest.fixture
def table() -> Table:
    rows = [
        ["a & b_1", Estimate(0.5, np.array([0.4, 0.6]), tuple("abcdef"), 9)],
        ["θ_ω, ξ | ✓ <b>", Estimate(0.25, np.array([0.4, 0.6]), tuple("abcde"), 9)],
    ]
    frame = pd.DataFrame(rows, columns=["name", "DSC, %"])
    return Table("100 % of <it>.", "n = 9.", frame, "A note.")


def test_csv_has_the_interval_in_columns(table):
    rows = rows_of(table)
    assert rows[0]["DSC, %"] == "50.0000" and float(rows[0]["DSC, % low"]) == pytest.approx(40.5)
    assert rows[1]["DSC, %"] == "25.0000" and rows[1]["DSC, % high"] == ""
    assert len(tables.csv([table, table]).splitlines()) == 5  # one header


def test_markdown(table):
    title, how, grid, note = tables.markdown(table).split("\n\n")
    assert (title, how, note) == ("### 100 % of &lt;it>.", "n = 9.", "A note.")
    lines = grid.splitlines()
    assert "50.00<br>[40.5, 59.5]" in lines[2] and "θ_ω, ξ \\| ✓ &lt;b>" in lines[3]
    assert lines[3].endswith(" 25.00 |") and len({len(line) for line in lines}) == 1
    assert " 50.00 |" in tables.plain(table) and "[" not in tables.plain(table)


def test_latex_is_escaped_and_closed(table):
    text = tables.latex(table)
    assert r"a \& b\_1 & \shortstack{50.00\\{\scriptsize [40.5, 59.5]}} \\" in text
    assert r"$\theta_\omega$, $\xi$ | $\surd$ $<$b$>$ & 25.00 \\" in text
    assert r"name & DSC, \% \\" in text
    assert r"\caption{100 \% of $<$it$>$. n = 9. A note.}" in text
    assert text.count("{") == text.count("}") and text.count("$") % 2 == 0
    assert text.count(r"\begin") == text.count(r"\end") == 2
    escape = tables.escape_latex
    assert escape("ε_shrink, δ_expand") == r"$\varepsilon_{shrink}$, $\delta_{expand}$"
    assert escape("{$}#") == r"\{\$\}\#"


def test_estimates_in_percent():
    few = Estimate(0.123, np.array([0.1, 0.1]), tuple("abcde"), 5)
    assert few.percent() == "12.30"  # five patients have no interval
    more = Estimate(0.123, np.array([0.1, 0.1]), tuple("abcdef"), 6)
    assert more.percent(1, sign="+") == "+12.3 [+10.0, +10.0]"
