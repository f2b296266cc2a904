"""The report in both formats, and the figures' choice of cases."""

import base64
import io
import re

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy import ndimage

from tests.evaluation.helpers import made_up, protocol, where
from utils.evaluation import figures, report
from utils.evaluation.instances import by_instance
from utils.evaluation.paper_tables import label_table
from utils.system.plotting import new_figure, save_figure


def test_report_is_the_same_in_both_formats(tmp_path):
    save_figure(new_figure(1, 1), tmp_path / "picture.png")
    scores = made_up(9)
    scores["label"] = scores["label"].cat.rename_categories({"liver": "<b> [x](http://y) *z* a|b"})
    parts = [
        "# Title & more",
        "Plain `code <b>`.",
        "- first\n- second",
        label_table(scores, protocol(), "dsc"),
        "    python eval.py\n    --out 'x y'",
        figures.picture("picture.png", "What it [shows]."),
    ]
    report.write_report(parts, tmp_path)
    text, html = ((tmp_path / f"report.{suffix}").read_text() for suffix in ("md", "html"))
    assert text.startswith("# Title & more\n\nPlain `code <b>`.\n\n- first\n- second\n\n### DSC")
    assert r"![What it \[shows\].](picture.png)" in text
    assert "<title>Title &amp; more</title>" in html and "<code>code &lt;b&gt;</code>" in html
    assert 'src="data:image/png;base64,iVBOR' in html and html.count("<li>") == 2
    assert '<div class="wide"><table>' in html and "<br><small>[" in html
    assert "&lt;b&gt; [x](http://y) *z* a|b</td>" in html  # a label is text, whatever it holds
    assert "<a " not in html and "<b>" not in html and "<em>z" not in html


def test_examples_are_chosen_by_rule():
    gains = {("p", n, "liver"): gain for n, gain in enumerate((0.3, -0.1, 0.2, 0.0, 0.1))}
    assert figures.choose(gains) == {
        "largest": ("p", 0, "liver"),
        "median": ("p", 4, "liver"),
        "smallest": ("p", 1, "liver"),
    }


def test_gain_is_from_the_baseline_to_the_proposed_model():
    scores = made_up(4)
    gains = figures.gains(scores, protocol(), ("shrink",))
    dsc = by_instance(where(scores, box="shrink", shift="15%"), "dsc").droplevel("patient")
    assert gains == pytest.approx((dsc["adaptive"] - dsc["medsam"]).to_dict()) and len(gains) == 8
    alone = figures.gains(scores, protocol(baseline="adaptive"), ("shrink",))
    assert alone == pytest.approx(dsc["adaptive"].to_dict())


@pytest.mark.parametrize(("count", "shown"), [(6, 6), (7, 3)])
def test_examples_show_all_models_if_they_fit_side_by_side(tmp_path, monkeypatch, count, shown):
    names = [f"model {number}" for number in range(count)]
    one_model = where(made_up(2), model="medsam").astype({"model": str})
    scores = pd.concat([one_model.assign(model=name) for name in names], ignore_index=True)
    asked = []

    def illustrate(instance, prompt, models):
        asked.append(list(models))
        return figures.Example(prompt.box, *[None] * 3)

    monkeypatch.setattr(figures, "draw_examples", lambda *args, **kwargs: None)
    roles = protocol(baseline=names[3], proposed=names[1])
    pictures = figures.draw_cases(scores, roles, illustrate, tmp_path)
    assert len(pictures) == 3 and len(asked) == 9
    expected = names if shown == count else [names[0], names[3], names[1]]
    assert all(models == expected for models in asked)


def test_photographs_are_embedded_as_jpeg_and_diagrams_as_they_are(tmp_path):
    rng = np.random.default_rng(0)
    photograph = ndimage.gaussian_filter(rng.normal(size=(300, 300)), 1)
    photograph = 128 + 100 * photograph / abs(photograph).max() + rng.normal(0, 3, (300, 300))
    diagram = np.zeros((300, 300), np.uint8)
    diagram[100:110], diagram[:, 50] = 255, 255
    kinds = []
    for name, pixels in (("a.png", photograph.astype(np.uint8)), ("b.png", diagram)):
        Image.fromarray(pixels).save(tmp_path / name)
        report.write_report(["# T", figures.picture(name, "c")], tmp_path)
        html = (tmp_path / "report.html").read_text()
        kind, content = re.search('src="data:image/(.*?);base64,(.*?)"', html).groups()
        shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(content))).convert("L"), float)
        assert abs(shown - pixels.astype(np.uint8)).mean() < 8
        kinds.append(kind)
    assert kinds == ["jpeg", "png"]
