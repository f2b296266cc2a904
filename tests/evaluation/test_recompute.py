"""The script of docs/results.md makes the tables again from instances.csv."""

import re
from pathlib import Path

import pandas as pd
import pytest

from perturb import BOX_KINDS
from tests.evaluation.helpers import made_up, protocol
from utils.evaluation.report import write_results

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results.md"
(SCRIPT,) = re.findall(r"```python\n(.*?)```", RESULTS.read_text(encoding="utf-8"), re.DOTALL)


def test_the_documented_script_makes_the_tables_again(tmp_path, monkeypatch):
    write_results(made_up(8, draws=2), protocol(draws=2), "", tmp_path, illustrate=None)
    written = {name: pd.read_csv(tmp_path / f"{name}.csv") for name in ("table1", "table2")}
    families = pd.read_csv(tmp_path / "families.csv")
    families = families[families["instances are"] == "all"].set_index("training")
    assert len(SCRIPT.splitlines()) == 10
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(SCRIPT, names)  # defines table1, families, regret and table2

    def close(value: float) -> object:
        return pytest.approx(value, abs=1e-4)

    one = written["table1"][written["table1"]["shift"] == "15%"].set_index("box")
    two = written["table2"].set_index("model")
    for model in ("untouched", "medsam", "adaptive"):
        for box in BOX_KINDS:
            for score in ("dsc", "nsd"):
                printed = one.loc[box, f"{model} {score.upper()}"]
                assert names["table1"].loc[(model, box), score] == close(printed)
            assert names["table2"].loc[(model, box)] == close(two.loc[model, box])
        assert names["regret"][model] == close(families.loc[model, "worst regret"])
        computed = names["families"].loc[model]
        assert len(computed) == 6
        for family, dsc in computed.items():
            name = "tight" if family == "standard 0%" else family
            assert dsc == close(families.loc[model, name])
