"""Examples: their choice by rule, and the panel with its script in a real browser."""

import base64
import io
import json
import re
import shutil

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from perturb import BOX_KINDS, Shift
from tests.evaluation.helpers import context, known, made_up, where
from utils.data.slices import read_instances
from utils.evaluation import examples
from utils.evaluation.examples import Example, ExampleRenderer, choose, gains
from utils.evaluation.prompts import Prompt
from utils.evaluation.report import PANEL_PLACE, write_report
from utils.evaluation.statistics import by_instance


def disc(radius: float, shape=(120, 160)) -> np.ndarray:
    y, x = np.mgrid[: shape[0], : shape[1]]
    return (y - 50) ** 2 + (x - 90) ** 2 < radius**2


def render(instance, prompt, names) -> Example:
    """A disc of 20 px; the masks of model n are larger by n and by a tenth of the shift in px."""
    shift = prompt.shift.size
    box = np.array([70 - 40 * shift, 30 - 40 * shift, 109 + 40 * shift, 69 + 40 * shift])
    cells = {
        name: (box, disc(20 + n + 4 * shift), 0.9 - 0.1 * n - abs(shift))
        for n, name in enumerate(names)
    }
    image = np.tile(np.linspace(0, 255, 320), (240, 1)).astype(np.uint8)  # twice as many pixels
    return Example(prompt.box, image, disc(20), cells)


def test_examples_are_chosen_by_rule():
    index = [("d", "p", n, "liver") for n in range(5)]
    gained = pd.Series([0.3, -0.1, 0.2, 0.0, 0.1], pd.MultiIndex.from_tuples(index))
    assert choose(gained) == {"median": index[4], "largest": index[0], "smallest": index[1]}


def test_gain_is_from_the_baseline_to_the_proposed_model():
    scores = made_up(4)
    gained = gains(scores, context(), ("shrink",)).to_dict()
    dsc = by_instance(where(scores, box="shrink", shift="15%"), "dsc").droplevel("patient")
    assert gained == pytest.approx((dsc["adaptive"] - dsc["medsam"]).to_dict()) and len(gained) == 8
    alone = gains(scores, context(baseline="adaptive"), ("shrink",)).to_dict()
    assert alone == pytest.approx(dsc["adaptive"].to_dict())


def test_renderer_predicts_one_label_under_one_box(slices):
    sample = slices[1]
    models = known(right=lambda target: target, empty=lambda target: target & False)
    renderer = ExampleRenderer(models, slices, seed=0)
    instance = (sample.dataset, sample.case, sample.index, "small", 1)
    example = renderer(instance, Prompt("sweep", Shift(0.1, "side")), ["empty", "right"])
    label_map, labels, tight = read_instances(sample)
    target = sample.frame.labels_to_native(label_map) == 2
    assert (example.target == target).all() and list(example.cells) == ["empty", "right"]
    box, mask, dsc = example.cells["empty"]
    assert not mask.any() and dsc == 0
    inner = sample.frame.boxes_to_native(tight)[labels.tolist().index(2)]
    assert (box[:2] < inner[:2]).all() and (box[2:] > inner[2:]).all()
    assert example.image.shape == sample.frame.content


@pytest.mark.parametrize(("count", "shown"), [(6, (0, 1, 2, 3, 4, 5)), (7, (0, 3, 1))])
def test_figures_show_all_models_if_they_fit_side_by_side(tmp_path, monkeypatch, count, shown):
    names = [f"model {number}" for number in range(count)]
    one_model = where(made_up(2), model="medsam").astype({"model": str})
    scores = pd.concat([one_model.assign(model=name) for name in names], ignore_index=True)
    drawn = []
    monkeypatch.setattr(examples, "draw_examples", lambda rows, *args, **kw: drawn.append(rows))
    roles = context(baseline=names[3], proposed=names[1])
    pictures = examples.draw_cases(scores, roles, render, tmp_path)
    assert len(pictures) == 3 and [len(rows) for rows in drawn] == [3, 3, 3]
    assert all(list(row.cells) == [names[n] for n in shown] for rows in drawn for row in rows)
    titles = [row.name.split("\n")[0] for row in drawn[0]]
    assert titles == [f"median, {kind}" for kind in BOX_KINDS]


def data_of(text: str) -> dict:
    (found,) = re.findall(r'id="panel-data">(.*?)</script>', text, re.DOTALL)
    return json.loads(found)


def test_data_of_the_panel():
    scores = made_up(6)
    data = data_of(examples.panel_html(scores, context(), render))
    assert data["shifts"] == [-25, -20, -15, -10, -5, 0, 5, 10, 15, 20, 25]
    # All instances and small ones: three each, and those that are both are there once.
    rows = [scores, scores[scores["small"]]]
    chosen = {one for part in rows for one in choose(gains(part, context(), BOX_KINDS)).values()}
    assert len(data["examples"]) == len(chosen) >= 3
    one = data["examples"][0]
    step = one["steps"][data["shifts"].index(10)]
    assert step["dsc"] == pytest.approx([80, 70, 60]) and step["box"] == [66, 26, 48, 48]
    x, y, width, height = one["view"]  # the disc is in the middle, and the largest box within
    assert (x + width / 2, y + height / 2) == pytest.approx((90, 50), abs=0.6)
    assert width == height > one["steps"][-1]["box"][2]
    assert re.fullmatch(r"median gain: [a-z ]+, p\d, slice 7", one["name"])
    other = scores.assign(dataset="other")
    two = data_of(examples.panel_html(pd.concat([scores, other]), context(), render))
    assert (
        ", made-up, p" in two["examples"][0]["name"] or ", other, p" in two["examples"][0]["name"]
    )
    picture = Image.open(io.BytesIO(base64.b64decode(one["image"].partition(",")[2])))
    assert picture.size == (320, 240) and one["size"] == [160, 120]


def points_of(path: str) -> np.ndarray:
    return np.array([part.split() for part in re.split("[MLZ]+", path) if part], float)


def test_contours_are_closed_and_within_a_pixel_of_the_mask():
    mask = disc(20)
    path = examples.svg_path(mask)
    assert re.fullmatch(r"(M(\d+\.\d \d+\.\d)(L\d+\.\d \d+\.\d)+Z)+", path)
    points = points_of(path)
    assert abs(np.hypot(*(points - (90.5, 50.5)).T) - 20).max() < 1 and 12 < len(points) < 60
    assert examples.svg_path(mask & ~disc(8)).count("M") == 2  # a hole
    assert examples.svg_path(np.zeros((9, 9), bool)) == ""
    corner = points_of(examples.svg_path(np.ones((4, 6), bool)))  # at the image's edge
    assert corner.min(axis=0) == pytest.approx([0, 0], abs=0.5)
    assert corner.max(axis=0) == pytest.approx([6, 4], abs=0.5)


def test_names_cannot_leave_the_script_and_only_the_html_has_it(tmp_path):
    scores = made_up(6)
    name = "</script><script>alert(1)</script>"
    scores["label"] = scores["label"].cat.rename_categories({"liver": name})
    panel = examples.panel_html(scores, context(), render)
    assert name not in panel and name in str(data_of(panel))
    write_report(["# T", PANEL_PLACE, "text"], tmp_path, panel)
    html, text = ((tmp_path / f"report.{kind}").read_text() for kind in ("html", "md"))
    assert PANEL_PLACE in text and "<script" not in text
    assert PANEL_PLACE not in html and html.count("<script") == 2 and "<noscript>" in html
    assert "http" not in re.sub('(src|href)="data:[^"]*"', "", html)


@pytest.fixture
def browser():
    """Headless Chromium; without it, or without selenium, the test is skipped."""
    webdriver = pytest.importorskip("selenium.webdriver")
    binary = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
    driver = shutil.which("chromedriver")
    if not binary or not driver:
        pytest.skip("no Chromium with its driver here (Debian: chromium, chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=900,1200"):
        options.add_argument(argument)
    service = webdriver.ChromeService(executable_path=driver)
    browser = webdriver.Chrome(options=options, service=service)
    yield browser
    browser.quit()


def test_panel_in_a_browser(browser, tmp_path):
    """The slider moves the box and the masks, by mouse or key; the choice changes the target."""
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import Select

    panel = examples.panel_html(made_up(6), context(), render)
    write_report(["# T", PANEL_PLACE], tmp_path, panel)
    data = data_of(panel)
    browser.get((tmp_path / "report.html").as_uri())
    select, slider, output = (
        browser.find_element(By.CSS_SELECTOR, f"#panel {tag}")
        for tag in ("select", "input", "output")
    )

    def check(example: int, shift: int, text: str) -> None:
        step = data["examples"][example]["steps"][data["shifts"].index(shift)]
        assert output.text == text
        for n, view in enumerate(browser.find_elements(By.CSS_SELECTOR, "#panel figure")):
            caption = view.find_element(By.TAG_NAME, "figcaption").text
            assert caption == f"{data['models'][n]} DSC {step['dsc'][n]:.1f} %"
            mask = view.find_element(By.CSS_SELECTOR, ".mask").get_attribute("d")
            box = view.find_element(By.TAG_NAME, "rect")
            numbers = [float(box.get_attribute(name)) for name in ("x", "y", "width", "height")]
            assert (mask, numbers) == (step["masks"][n], step["box"])
        assert n == 2

    assert select.is_displayed()
    check(0, 0, "0 % of the side, tight")
    slider.send_keys(Keys.ARROW_LEFT, Keys.ARROW_LEFT)
    check(0, -10, "\N{MINUS SIGN}10 % of the side, too small")
    slider.send_keys(Keys.END)
    check(0, 25, "+25 % of the side, too large")
    Select(select).select_by_index(1)
    check(1, 25, "+25 % of the side, too large")
    assert not [line for line in browser.get_log("browser") if line["level"] == "SEVERE"]
