"""The report in both formats, all that is written beside it, and the tables from its rows again."""

import re
from functools import partial
from pathlib import Path

import pandas as pd
import pytest

from perturb import BOX_KINDS
from tests.evaluation.helpers import context, made_up, protocol
from utils.evaluation import report
from utils.evaluation.tables import label_table, picture
from utils.system.plotting import new_figure, save_figure

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results.md"
(SCRIPT,) = re.findall(r"```python\n(.*?)```", RESULTS.read_text(encoding="utf-8"), re.DOTALL)


def test_report_is_the_same_in_both_formats(tmp_path):
    save_figure(new_figure(1, 1), tmp_path / "picture.png")
    scores = made_up(9)
    scores["label"] = scores["label"].cat.rename_categories({"liver": "<b> [x](http://y) *z* a|b"})
    parts = [
        "# Title & more",
        "Plain `code <b>`.",
        "- first\n- second",
        label_table(scores, context(), "dsc"),
        "    python eval.py\n    --out 'x y'",
        picture("picture.png", "What it [shows]."),
    ]
    report.write_report(parts, tmp_path)
    text, html = ((tmp_path / f"report.{suffix}").read_text() for suffix in ("md", "html"))
    assert text.startswith("# Title & more\n\nPlain `code <b>`.\n\n- first\n- second\n\n### DSC")
    assert r"![What it \[shows\].](picture.png)" in text
    assert "<title>Title &amp; more</title>" in html and "<code>code &lt;b&gt;</code>" in html
    assert 'src="data:image/webp;base64,UklGR' in html and html.count("<li>") == 2
    assert '<div class="wide glance"><table>' in html and " <small>[" in html
    assert "&lt;b&gt; [x](http://y) *z* a|b</td>" in html  # a label is text, whatever it holds
    assert "<a " not in html and "<b>" not in html and "<em>z" not in html


def test_sections_are_linked_and_only_the_first_table_is_large(tmp_path):
    table = label_table(made_up(9), context(), "dsc")
    report.write_report(["# T", "## One & two", table, "## Three", table], tmp_path)
    html = (tmp_path / "report.html").read_text()
    assert re.findall(r'<li><a href="#(.*?)">(.*?)</a>', html) == [
        ("one-two", "One &amp; two"),
        ("three", "Three"),
    ]
    assert html.index('id="one-two"') < html.index('class="wide glance"')
    assert html.index('class="wide glance"') < html.index('class="wide"><table>')
    assert html.count("<table>") == html.count("</table></div>") == 2


def test_the_documented_script_makes_the_tables_again(tmp_path, monkeypatch):
    twice = context(protocol=protocol(draws=2), notes=("mind *this*",))
    printed = report.write_results(made_up(8, draws=2), twice, "", tmp_path)
    assert {path.name for path in tmp_path.iterdir()} <= set(report.RESULT_FILES)
    assert printed.startswith("note: mind *this*\n\nDice (DSC), %\n8 patients")
    assert printed.splitlines()[-1].startswith("Smallest worst regret") and "|" not in printed
    assert r"**Note: mind \*this\***" in (tmp_path / "report.md").read_text()
    written = {name: pd.read_csv(tmp_path / f"{name}.csv") for name in ("table1", "table2")}
    families = pd.read_csv(tmp_path / "families.csv")
    families = families[families["size"] == "all"].set_index("training")
    assert len(SCRIPT.splitlines()) == 10
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(SCRIPT, names)  # defines table1, families, regret and table2
    one = written["table1"][written["table1"]["shift"] == "15%"].set_index("box")
    two = written["table2"].set_index("model")
    close = partial(pytest.approx, abs=1e-4)
    for model in ("untouched", "medsam", "adaptive"):
        for box in BOX_KINDS:
            for score in ("dsc", "nsd"):
                expected = one.loc[box, f"{model} {score.upper()}"]
                assert names["table1"].loc[(model, box), score] == close(expected)
            assert names["table2"].loc[(model, box)] == close(two.loc[model, box])
        assert names["regret"][model] == close(families.loc[model, "worst regret"])
        computed = names["families"].loc[model].rename({"standard 0%": "tight"})
        computed = computed.rename({f"like {n} 0%": n for n in ("every 5", "every 10")})
        assert len(computed) == 8
        assert computed.to_dict() == close(families.loc[model, computed.index].to_dict())
