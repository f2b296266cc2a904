"""The tables on made-up scores, and their three formats."""

import io
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from perturb import BOX_KINDS, Shift
from tests.evaluation.helpers import context, made_up, mean, where
from utils.evaluation import tables
from utils.evaluation.scoring import Row
from utils.evaluation.statistics import Estimate, to_frame
from utils.evaluation.tables import Table


def test_table_one():
    scores = made_up(10)
    table = tables.table_one(scores, context(), Shift(0.15, "side"))
    frame = table.frame.set_index("box")
    assert list(frame.index) == [*BOX_KINDS, "average"]
    for box in BOX_KINDS:
        shift = "0%" if box == "standard" else "15%"
        expected = mean(scores, "nsd", model="medsam", box=box, shift=shift)
        assert frame.loc[box, "medsam NSD"].value == pytest.approx(expected)
        assert frame.loc[box, ["patients", "instances"]].tolist() == ["10", "20"]
    average = np.mean([frame.loc[box, "adaptive DSC"].value for box in BOX_KINDS])
    assert frame.loc["average", "adaptive DSC"].value == pytest.approx(average)
    for word in ("10 patients", "20 instances", "U(0, 15%)"):
        assert word in table.caption
    alone = tables.markdown(table, tables.method(context()))  # as in table1.md
    for word in ("made-up (split test)", "2 mm", "1 draw", "2D", "at least 6 patients"):
        assert word in alone and word not in tables.markdown(table)
    assert "patients  " not in alone and "20 instances" in alone  # once, not in every row
    few = tables.table_one(made_up(5), context(), Shift(20, "px"))
    assert "[" not in tables.markdown(few)


def test_published_numbers_are_those_of_the_transcription():
    """tests/evaluation/published.csv was typed from the tables of arXiv:2503.19700."""
    cells = pd.read_csv(Path(__file__).with_name("published.csv"), dtype=str)
    policies = {
        "MedSAM": "medsam",
        "MedSAM + θ_ω ξ": "scaled",
        "MedSAM + δ_expand ε_shrink": "bidirectional",
        "MedSAM + θ_ω ξ + δ_expand ε_shrink": "adaptive",
    }
    one = tables.PUBLISHED_ONE.set_index("box")
    for table, row, column, value in cells.itertuples(index=False):
        if table == "I":
            assert one.loc[row.lower(), column] == value
        else:
            assert tables.PUBLISHED_ABLATION.loc[f"{column} (paper)", policies[row]] == value
    assert one.size + 4 * 3 == len(cells)


def test_tables_two_and_three_have_the_papers_rows_and_marks():
    scores = made_up(9)
    two, three = (make(scores, context()).frame for make in (tables.table_two, tables.table_three))
    assert two.iloc[:, :3].values.tolist() == [
        ["–", "–", "medsam"],
        ["✓", "✓", "adaptive"],
        ["", "", "untouched"],
    ]
    assert two["error rate (paper)"].tolist() == ["18", "2", "–"]
    seeds = {"medsam": "adaptive", "adaptive": "medsam"}  # as if misnamed: the policy decides
    swapped = tables.table_two(scores, context(trainings=seeds)).frame
    assert swapped["model"].tolist() == ["adaptive", "medsam", "untouched"]
    assert swapped["error rate (paper)"].tolist() == ["18", "2", "–"]
    expected = mean(scores, "error", small=True, model="medsam", box="standard")
    assert two["standard"][0].value == pytest.approx(expected)
    assert two.loc[0, ["patients", "instances"]].tolist() == ["9", "9"]
    published = ["DSC (paper)", "NSD (paper)"]
    assert three.columns[5:].tolist() == ["15% DSC", "15% NSD", "20px DSC", "20px NSD", *published]
    assert three.loc[1, published].tolist() == ["90.72", "92.86"]
    expected = mean(scores, "dsc", model="adaptive", box="shrink", shift="20px")
    assert three["20px DSC"][1].value == pytest.approx(expected)


def test_without_a_model_of_the_paper_readers_see_nothing_of_its_columns():
    roles = context(trainings={"medsam": "mixed", "adaptive": "recommended"})
    for make in (tables.table_two, tables.table_three):
        assert "paper”" in tables.markdown(make(made_up(9), context()))
        shown = tables.markdown(make(made_up(9), roles))
        assert "(paper)" not in shown and "paper”" not in shown


def test_table_two_without_small_instances_says_so(tmp_path):
    table = tables.table_two(where(made_up(3), small=False), context())
    assert "No such instance" in table.caption and "|" not in tables.markdown(table)
    tables.write_csv(tmp_path / "table2.csv", table)
    assert (tmp_path / "table2.csv").read_text().startswith('"θ_ω, ξ","δ_expand, ε_shrink",model')


def test_label_table():
    scores = made_up(6)
    both = pd.concat([scores, scores.assign(dataset="other")], ignore_index=True)
    frame = tables.label_table(both.astype({"dataset": "category"}), context(), "dsc").frame
    rows = product(("made-up", "other"), ("adrenal gland", "liver"), BOX_KINDS)
    assert frame[["dataset", "label", "box"]].values.tolist() == [[*row] for row in rows]
    assert set(frame["instances"]) == {"6"}


def test_errors_on_small_instances_by_definition_label_and_training():
    scores = made_up(8)
    rng = np.random.default_rng(0)
    scores["leak"] = rng.choice([0.0, 0.1, 0.3], len(scores))
    scores["dsc"] = rng.choice([0.3, 0.5, 0.8], len(scores))
    seeds = {"medsam": "seeds", "adaptive": "seeds"}
    frame = tables.small_table(scores, context(trainings=seeds)).frame
    frame = frame.set_index(["label", "training"])
    # The liver is never small.
    assert list(frame.index) == [*product(("all", "adrenal gland"), ("untouched", "seeds"))]
    small = where(scores, small=True)
    for training, models in (("untouched", ["untouched"]), ("seeds", ["medsam", "adaptive"])):
        rows = small[small["model"].isin(models)]
        tight, shrunk = where(rows, box="standard"), where(rows, box="shrink", shift="15%")
        line = frame.loc[("all", training)]
        assert (line["patients"], line["instances"]) == ("8", "8")
        for column, expected in (
            ("error", tight["error"]),
            ("leak", tight["leak"] > 0.1),
            ("low", tight["dsc"] < 0.5),
            ("DSC", tight["dsc"]),
            ("leaked area", tight["leak"]),
            ("error, shrink", shrunk["error"]),
        ):
            assert line[column].value == pytest.approx(expected.mean())


def test_tight_boxes_of_the_instances_that_have_a_given_box():
    rows = []
    for label, box, draw, dsc in (
        *(("liver", "standard", 0, 0.9), ("liver", "given", 0, 0.8), ("liver", "given", 1, 0.4)),
        *(("aorta", "standard", 0, 0.5), ("aorta", "given", 0, 0.7)),
        ("spleen", "standard", 0, 0.1),
    ):
        row = ("m", "a", "p", "p", 3, label, 1, box, "0%", draw, 9, False, dsc, dsc, 0.0, 0.0)
        rows.append(Row(*row))
    table = tables.given_table(to_frame(rows), context())
    frame = table.frame.set_index(["label", "box"])
    values = [estimate.value for estimate in frame["m DSC"]]
    assert list(frame.index) == [*product(("all", "aorta", "liver"), ("given", "tight"))]
    all_labels = [(0.8 + 0.4 + 0.7) / 3, (0.9 + 0.5) / 2]
    assert values == pytest.approx([*all_labels, 0.7, 0.5, 0.6, 0.9])
    assert table.caption.startswith("3 boxes of 2 instances.")


@pytest.fixture
def table() -> Table:
    values = np.array([0.5, 0.4, 0.6])
    rows = [["a & b_1", Estimate(values, 6, 9)], ["θ_ω, ξ | ✓ <b>", Estimate(values / 2, 5, 9)]]
    frame = pd.DataFrame(rows, columns=["name", "DSC, %"])
    return Table("100 % of <it>.", "n = 9.", frame, "A note.")


def test_csv_has_the_interval_in_columns(table, tmp_path):
    tables.write_csv(tmp_path / "two.csv", table, table)
    text = (tmp_path / "two.csv").read_text(encoding="utf-8")
    assert "a & b_1,50.0000,40.5000,59.5000\n" in text and text.endswith(",25.0000,,\n")
    assert len(pd.read_csv(io.StringIO(text))) == 4  # one header


def test_markdown(table):
    title, how, grid, note = tables.markdown(table).split("\n\n")
    assert (title, how, note) == ("### 100 % of &lt;it>.", "n = 9.", "A note.")
    lines = grid.splitlines()
    assert "50.00<br>[40.5, 59.5]" in lines[2] and "θ_ω, ξ \\| ✓ &lt;b>" in lines[3]
    assert lines[3].endswith(" 25.00 |") and len({len(line) for line in lines}) == 1
    assert "  50.00\n" in tables.plain(table) and "[" not in tables.plain(table)


def test_readers_are_spared_columns_that_tell_nothing():
    frame = pd.DataFrame(
        {"shift": ["15%"] * 2, "box": ["a", "b"], "marks": ["", ""], "n": ["1", "2"]}
    )
    shown = tables.markdown(Table("T", "", frame))
    assert "shift" not in shown and "marks" not in shown and "box" in shown and " n |" in shown
    assert "shift" in tables.markdown(Table("T", "", frame[:1]))


def test_glance():
    scores = made_up(8)
    frame = tables.glance_table(scores, context(run_names={"medsam": "seeds"})).frame
    assert frame["model"].tolist() == ["untouched", "medsam", "adaptive"]
    assert frame["run"].tolist() == ["", "seeds", ""]
    of_medsam = frame.set_index("model").loc["medsam"]
    for column, rows in (
        ("tight boxes", where(scores, box="standard")),
        ("boxes too small by up to 15%", where(scores, box="shrink", shift="15%")),
        ("small targets (8), tight boxes", where(scores, box="standard", small=True)),
    ):
        assert of_medsam[column].value == pytest.approx(mean(rows, "dsc", model="medsam"))


def test_latex_is_escaped_and_closed(table):
    text = tables.latex(table)
    assert r"a \& b\_1 & \shortstack{50.00\\{\scriptsize [40.5, 59.5]}} \\" in text
    assert r"$\theta_\omega$, $\xi$ | $\surd$ $<$b$>$ & 25.00 \\" in text
    assert r"name & DSC, \% \\" in text
    assert r"\caption{100 \% of $<$it$>$. n = 9. A note.}" in text
    assert text.count("{") == text.count("}") and text.count("$") % 2 == 0
    assert text.count(r"\begin") == text.count(r"\end") == 2
    assert tables.escape_latex("δ_expand {$}#") == r"$\delta_{expand}$ \{\$\}\#"
