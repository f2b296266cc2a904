"""Tables, comparisons, curves, conclusions and the report, on made-up scores."""

import csv
import io
import re

import numpy as np
import pytest
from scipy import stats

from perturb import BOX_KINDS, Shift
from utils.evaluation import comparisons, paper_tables, report
from utils.evaluation.comparisons import Curve, Protocol
from utils.evaluation.scores import COLUMNS, Scores
from utils.evaluation.statistics import Estimate, estimate, holm
from utils.evaluation.tables import Table, latex, markdown, show

MODELS = {"untouched": 0.0, "medsam": 0.05, "adaptive": 0.10}
LOSS = {"standard": 0.0, "expansion": 0.05, "shrink": 0.2}  # the adaptive one loses a quarter of it


def protocol(**changes) -> Protocol:
    options = {
        "what": "made-up (split test)",
        "shifts": (Shift(0.15, "side"), Shift(20, "px")),
        "sweep": (Shift(-0.2, "side"), Shift(0.2, "side")),
        "draws": 1,
        "seed": 0,
        "tolerance": "2 mm",
        "small_share": 0.002,
        "error_leak": 0.1,
        "error_dsc": 0.5,
        "baseline": "medsam",
        "proposed": "adaptive",
    }
    return Protocol(**(options | changes))


def made_up(patients: int, draws: int = 1) -> Scores:
    """Two instances a patient, one of them small; scores that are easy to average."""
    rng = np.random.default_rng(0)
    rows = []
    for number in range(patients):
        for label, small in (("liver", False), ("adrenal gland", True)):
            level = 0.6 + 0.2 * rng.random()
            for model, gain in MODELS.items():
                noise = 0.01 * rng.random()
                prompts = [("standard", "0%", 0)]
                for shift in ("15%", "20px"):
                    prompts += [(k, shift, d) for k in BOX_KINDS[1:] for d in range(draws)]
                prompts += [("sweep", "-20%", 0), ("sweep", "20%", 0)]
                for box, shift, draw in prompts:
                    loss = LOSS[{"-20%": "shrink", "20%": "expansion"}.get(shift, box)]
                    score = level + gain + noise + 0.02 * draw
                    score -= loss / 4 if model == "adaptive" else loss
                    values = (model, f"p{number}", 7, label, box, shift, draw, 90, small)
                    values += (score, score / 2, 0.0, float(score < 0.6))
                    rows.append(dict(zip(COLUMNS, values, strict=True)))
    return Scores.of(rows)


def cells(table: Table) -> list[dict]:
    """The rows of a table's CSV."""
    return list(csv.DictReader(io.StringIO(table.csv())))


# --- The paper's tables --------------------------------------------------------------------------
def test_table_one():
    scores = made_up(10)
    table = paper_tables.table_one(scores, protocol(), Shift(0.15, "side"))
    rows = cells(table)
    assert [row["box"] for row in rows] == [*BOX_KINDS, "average"]
    for row in rows[:3]:
        shift = "0%" if row["box"] == "standard" else "15%"
        values = scores.where(model="medsam", box=row["box"], shift=shift)["nsd"]
        assert float(row["medsam NSD"]) == pytest.approx(100 * values.mean(), abs=1e-3)
        assert float(row["medsam NSD low"]) < float(row["medsam NSD"])
        assert (row["patients"], row["instances"]) == ("10", "20")
    # The paper's numbers stand beside one shift, and are marked.
    assert rows[0]["MedSAM DSC (paper)"] == "94.06" and rows[2]["MedSAM DSC (paper)"] == "78.17"
    assert "not here" in table.notes[0]
    other = cells(paper_tables.table_one(scores, protocol(), Shift(20, "px")))
    assert {row["MedSAM DSC (paper)"] for row in other} == {"–"}
    for word in ("10 patients", "20 instances", "2D", "2 mm", "U(0, 15%)", "1 draw"):
        assert word in table.how


def test_tables_two_and_three_have_the_papers_rows_and_marks():
    scores = made_up(9)
    two, three = (
        make(scores, protocol()) for make in (paper_tables.table_two, paper_tables.table_three)
    )
    assert [row[:3] for row in two.rows] == [
        ["–", "–", "medsam"],
        ["✓", "✓", "adaptive"],
        ["", "", "untouched"],
    ]
    small = scores.where("small", model="medsam", box="standard")
    assert two.rows[0][5].value == pytest.approx(small["error"].mean())
    assert two.rows[0][3:5] == ["9", "9"]  # patients, small instances
    assert three.header[5:] == ["15% DSC", "15% NSD", "20px DSC", "20px NSD"]
    shrink = scores.where(model="adaptive", box="shrink", shift="20px")
    assert three.rows[1][7].value == pytest.approx(shrink["dsc"].mean())


def test_table_two_without_small_instances_says_so():
    table = paper_tables.table_two(made_up(3).where("large"), protocol())
    assert table.rows == [] and "No such instance" in table.how
    assert "|" not in report.as_markdown(table) and "<table" not in report.as_html(table)


def test_label_table():
    rows = cells(paper_tables.label_table(made_up(6), protocol(), "dsc"))
    assert [(row["label"], row["box"]) for row in rows] == [
        (label, kind) for label in ("adrenal gland", "liver") for kind in BOX_KINDS
    ]
    assert {row["instances"] for row in rows} == {"6"}


# --- Comparisons ---------------------------------------------------------------------------------
def test_comparison_is_scipys_wilcoxon_over_patients_with_holm():
    scores = made_up(12)
    found = comparisons.compare(scores, protocol())
    shrink = {
        one.other: one
        for one in found
        if (one.population, one.box, str(one.shift), one.score) == ("all", "shrink", "15%", "dsc")
    }
    p = []
    for other in ("untouched", "medsam"):
        means = []
        for name in ("adaptive", other):
            of_model = scores.where(model=name, box="shrink", shift="15%")
            means.append([of_model.where(case=f"p{n}")["dsc"].mean() for n in range(12)])
        p.append(stats.wilcoxon(np.subtract(*means)).pvalue)
        assert shrink[other].difference.value == pytest.approx(np.subtract(*means).mean())
        assert shrink[other].p == pytest.approx(p[-1])
    assert [shrink[o].p_holm for o in ("untouched", "medsam")] == pytest.approx(holm(p))
    assert {one.verdict for one in shrink.values()} == {"better"}


def test_verdicts():
    scores = made_up(12)
    worse = comparisons.compare(scores, protocol(proposed="untouched"))
    assert {one.verdict for one in worse} == {"worse"}
    few = comparisons.compare(made_up(5), protocol())
    assert {one.verdict for one in few} == {"too few patients"}
    twins = Scores.of(
        [
            dict(zip(COLUMNS, values, strict=True)) | {"model": model}
            for model in ("medsam", "adaptive")
            for values in zip(
                *(scores.where(model="medsam")[c].tolist() for c in COLUMNS), strict=True
            )
        ]
    )
    assert {one.verdict for one in comparisons.compare(twins, protocol())} == {
        "not distinguishable"
    }


def test_better_on_average_is_not_better_if_most_patients_are_worse():
    """35 of 40 patients a little worse, 5 much better: the mean and the ranks disagree."""
    rows = []
    rng = np.random.default_rng(0)
    for number in range(40):
        gain = 0.5 if number < 5 else -0.001 - 0.009 * rng.random()
        for model, score in (("medsam", 0.4), ("adaptive", 0.4 + gain)):
            values = (model, f"p{number:02d}", 1, "liver", "standard", "0%", 0, 90, False)
            values += (score, score, 0.0, 0.0)
            rows.append(dict(zip(COLUMNS, values, strict=True)))
    shrink = [row | {"box": kind, "shift": "15%"} for row in rows for kind in BOX_KINDS[1:]]
    one_shift = protocol(shifts=(Shift(0.15, "side"),))
    found = comparisons.compare(Scores.of(rows + shrink), one_shift)[0]
    assert found.difference.interval[0] > 0 and found.p_holm < 0.05 and found.ahead == 5
    assert found.verdict == "not distinguishable"


def test_populations_are_kept_apart():
    found = comparisons.compare(made_up(9), protocol())
    instances = {one.population: one.difference.instances for one in found}
    assert instances == {"all": 18, "small": 9, "large": 9}
    for population in ("large", "small"):
        alone = made_up(9).where(population)
        assert {one.population for one in comparisons.compare(alone, protocol())} == {"all"}
        assert {one.population for one in comparisons.curves(alone, protocol())} == {"all"}


def test_conclusions_follow_the_numbers():
    scores = made_up(12)
    said = comparisons.conclusions(scores, comparisons.compare(scores, protocol()), protocol())
    text = "\n".join(said)
    found = r"Boxes too small by up to 15%: adaptive is better, \+(19.9|20.0|20.1) \["
    assert re.search(found, text) and "ahead in 12 of 12; Holm-corrected p" in text
    assert "12 patients, 24 instances" in text and "too large by up to 20px" in text
    assert "too small by up to 15% the DSC of adaptive changes by -5.0 [-5.0, -5.0] points" in text
    told = comparisons.conclusions(scores, [], protocol(warning="Not the test split."))
    assert told[0] == "Not the test split."
    few = made_up(5)
    compared = comparisons.compare(few, protocol())
    text = "\n".join(comparisons.conclusions(few, compared, protocol()))
    assert "too few patients to conclude" in text and "is better" not in text
    assert "instances are of 5 patients: with 2 comparisons no p under 0.12 is possible" in text


# --- Robustness ----------------------------------------------------------------------------------
def test_area_and_worst_point_by_hand():
    shifts = [Shift(size, "side") for size in (-0.2, 0.0, 0.1)]
    means = [estimate([value], ["a"], 1) for value in (0.2, 0.8, 0.6)]
    curve = Curve("all", "side", "dsc", "m", shifts, means)
    # Trapezoids: 0.2 wide at 0.5, 0.1 wide at 0.7.
    assert curve.area.value == pytest.approx((0.2 * 0.5 + 0.1 * 0.7) / 0.3)
    assert curve.worst == (shifts[0], means[0])
    flat = Curve("all", "side", "dsc", "m", shifts, [estimate([0.7], ["a"], 1)] * 3)
    assert flat.area.value == pytest.approx(0.7)


def test_curves_hold_the_sweep_and_the_tight_box():
    scores = made_up(8)
    found = comparisons.curves(scores, protocol())
    assert {(c.population, c.unit, c.score) for c in found} == {
        (population, "side", score) for population in ("all", "small") for score in ("dsc", "nsd")
    }  # the sweep has no pixels
    curve = next(c for c in found if (c.model, c.score, c.population) == ("medsam", "dsc", "all"))
    assert [str(shift) for shift in curve.shifts] == ["-20%", "0%", "20%"]
    expected = [
        scores.where(model="medsam", box=box, shift=shift)["dsc"].mean()
        for box, shift in (("sweep", "-20%"), ("standard", "0%"), ("sweep", "20%"))
    ]
    assert [mean.value for mean in curve.means] == pytest.approx(expected)
    rows = cells(comparisons.robustness_table(found))
    assert len(rows) == 3 * len(found) and {row["patients"] for row in rows} == {"8"}
    assert comparisons.curves(scores, protocol(sweep=())) == []


def test_spread_over_draws():
    table = comparisons.spread_table(made_up(6, draws=3), protocol(draws=3))
    first = cells(table)[0]  # draws differ by 0.02 each
    assert float(first["standard deviation"]) == pytest.approx(2.0, abs=1e-3)


# --- Formats -------------------------------------------------------------------------------------
@pytest.fixture
def table() -> Table:
    rows = [
        ["a & b_1", Estimate(0.5, np.array([0.4, 0.6]), tuple("abcdef"), 9)],
        ["θ_ω, ξ | ✓", "–"],
    ]
    return Table("100 % of <it>.", "n = 9.", ["name", "DSC, %"], rows, ["A note."])


def test_csv_has_the_interval_in_columns(table):
    rows = cells(table)
    assert rows[0]["DSC, %"] == "50.0000" and float(rows[0]["DSC, % low"]) == pytest.approx(40.5)
    assert rows[1]["DSC, %"] == "–" and rows[1]["DSC, % high"] == ""


def test_markdown(table):
    lines = table.markdown().splitlines()
    assert "50.00<br>[40.5, 59.5]" in lines[2] and "θ_ω, ξ \\| ✓" in lines[3]
    assert len({len(line) for line in lines}) == 1
    assert "| 50.00  |" in table.plain() and "[" not in table.plain()
    assert markdown([["a", "bcd"], ["ef", "g"]]) == "| a  | bcd |\n|----|-----|\n| ef | g   |"


def test_html_is_escaped(table):
    text = report.as_html(table)
    assert "100 % of &lt;it&gt;." in text and "a &amp; b_1" in text
    assert "<td>50.00<br><small>[40.5, 59.5]</small></td>" in text


def test_latex_is_escaped_and_closed(table):
    text = table.latex()
    assert r"a \& b\_1 & \shortstack{50.00\\{\scriptsize [40.5, 59.5]}} \\" in text
    assert r"$\theta_\omega$, $\xi$ | $\surd$ & -- \\" in text
    assert r"\caption{100 \% of $<$it$>$. n = 9. A note.}" in text
    assert text.count("{") == text.count("}") and text.count("$") % 2 == 0
    assert text.count(r"\begin") == text.count(r"\end") == 2
    assert latex("ε_shrink, δ_expand") == r"$\varepsilon_{shrink}$, $\delta_{expand}$"
    assert latex("{$}#") == r"\{\$\}\#"


def test_shown_estimates():
    few = Estimate(0.123, np.array([0.1, 0.1]), tuple("abcde"), 5)
    assert show(few) == "12.30"  # five patients have no interval
    more = Estimate(0.123, np.array([0.1, 0.1]), tuple("abcdef"), 6)
    assert show(more, 1, sign="+") == "+12.3 [+10.0, +10.0]"


def test_report_is_the_same_in_both_formats(tmp_path):
    from utils.evaluation.figures import new_figure, save_figure

    picture = tmp_path / "picture.png"
    save_figure(new_figure(1, 1), picture)
    blocks = [
        report.Heading(1, "Title & more"),
        report.Text("Plain `code <b>`."),
        report.Items(["first", "second"]),
        report.Code("python eval.py\n--out 'x y'"),
        report.Figure(picture, "What it shows."),
    ]
    report.write_report(blocks, tmp_path)
    text, html = ((tmp_path / f"report.{suffix}").read_text() for suffix in ("md", "html"))
    assert text.startswith("# Title & more\n\nPlain `code <b>`.\n\n- first\n- second\n\n    python")
    assert "![What it shows.](picture.png)" in text
    assert "<title>Title &amp; more</title>" in html and "<code>code &lt;b&gt;</code>" in html
    assert 'src="data:image/png;base64,iVBOR' in html and html.count("<li>") == 2


# --- Figures -------------------------------------------------------------------------------------
def test_examples_are_chosen_by_rule():
    from utils.evaluation.results import _by_rule

    gains = {("p", n, "liver"): gain for n, gain in enumerate((0.3, -0.1, 0.2, 0.0, 0.1))}
    assert _by_rule(gains) == {
        "largest": ("p", 0, "liver"),
        "median": ("p", 4, "liver"),
        "smallest": ("p", 1, "liver"),
    }


def test_gain_is_from_the_baseline_to_the_proposed_model():
    from utils.evaluation.results import _gains

    scores = made_up(4)
    gains = _gains(scores, protocol(), ("shrink",))
    difference = [
        scores.where(model=model, box="shrink", shift="15%").by_instance("dsc")
        for model in ("adaptive", "medsam")
    ]
    assert gains == pytest.approx({k: difference[0][k] - difference[1][k] for k in difference[0]})
    alone = _gains(scores, protocol(baseline="adaptive"), ("shrink",))
    assert alone == pytest.approx(difference[0])
