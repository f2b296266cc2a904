"""The part of the report to play with: its data, and its script in a real browser."""

import base64
import io
import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from perturb import BOX_KINDS
from tests.evaluation.helpers import made_up, protocol
from utils.evaluation import panel
from utils.evaluation.figures import Example, choose, gains
from utils.evaluation.report import PANEL_PLACE, write_report

MODELS = ["untouched", "medsam", "adaptive"]


def disc(radius: float, shape=(120, 160)) -> np.ndarray:
    y, x = np.mgrid[: shape[0], : shape[1]]
    return (y - 50) ** 2 + (x - 90) ** 2 < radius**2


def illustrate(instance, prompt, names) -> Example:
    """A disc of 20 px; the masks of model n are larger by n and by a tenth of the shift in px."""
    shift = prompt.shift.size
    box = np.array([70 - 40 * shift, 30 - 40 * shift, 109 + 40 * shift, 69 + 40 * shift])
    cells = {
        name: (box, disc(20 + n + 4 * shift), 0.9 - 0.1 * n - abs(shift))
        for n, name in enumerate(names)
    }
    image = np.tile(np.linspace(0, 255, 320), (240, 1)).astype(np.uint8)  # twice as many pixels
    return Example(prompt.box, image, disc(20), cells)


def made_panel() -> str:
    return panel.panel_html(made_up(6), protocol(), illustrate)


def data_of(text: str) -> dict:
    (found,) = re.findall(r'id="panel-data">(.*?)</script>', text, re.DOTALL)
    return json.loads(found)


def test_data_of_the_panel():
    scores = made_up(6)
    data = data_of(made_panel())
    assert data["shifts"] == [-25, -20, -15, -10, -5, 0, 5, 10, 15, 20, 25]
    # All instances and small ones: three each, and those that are both are there once.
    rows = [scores, scores[scores["small"]]]
    chosen = {one for part in rows for one in choose(gains(part, protocol(), BOX_KINDS)).values()}
    assert len(data["examples"]) == len(chosen) >= 3
    assert data["examples"][0]["name"].startswith("largest gain: ")
    assert any("among small instances" in one["name"] for one in data["examples"])
    one = data["examples"][0]
    step = one["steps"][data["shifts"].index(10)]
    assert step["dsc"] == pytest.approx([80, 70, 60])
    left, top = 90 - one["width"] / 2, 50 - one["height"] / 2  # the disc is in the middle
    x, y, width, height = step["box"]
    assert (width, height) == (48, 48) and x == pytest.approx(66 - left, abs=1)
    assert y == pytest.approx(26 - top, abs=1)
    picture = Image.open(io.BytesIO(base64.b64decode(one["image"].partition(",")[2])))
    assert picture.size[0] / picture.size[1] == pytest.approx(one["width"] / one["height"], 0.03)


def points_of(path: str) -> np.ndarray:
    return np.array([part.split() for part in re.split("[MLZ]+", path) if part], float)


def test_contours_are_closed_and_within_a_pixel_of_the_mask():
    mask = disc(20)
    path = panel.svg_path(mask)
    assert re.fullmatch(r"(M(\d+\.\d \d+\.\d)(L\d+\.\d \d+\.\d)+Z)+", path)
    points = points_of(path)
    distance = np.hypot(*(points - (90.5, 50.5)).T)
    assert abs(distance - 20).max() < 1 and 12 < len(points) < 60
    hole = mask & ~disc(8)
    assert panel.svg_path(hole).count("M") == 2
    assert panel.svg_path(np.zeros((9, 9), bool)) == ""
    corner = points_of(panel.svg_path(np.ones((4, 6), bool)))  # at the image's edge
    assert corner.min(axis=0) == pytest.approx([0, 0], abs=0.5)
    assert corner.max(axis=0) == pytest.approx([6, 4], abs=0.5)


def test_names_cannot_leave_the_script():
    scores = made_up(6)
    name = "</script><script>alert(1)</script>"
    scores["label"] = scores["label"].cat.rename_categories({"liver": name})
    text = panel.panel_html(scores, protocol(), illustrate)
    assert name not in text
    assert name in json.dumps(data_of(text)).replace("\\u003c", "<")


def test_only_the_html_has_it(tmp_path):
    write_report(["# T", PANEL_PLACE, "text"], tmp_path, made_panel())
    html, text = ((tmp_path / f"report.{kind}").read_text() for kind in ("html", "md"))
    assert PANEL_PLACE in text and "<script" not in text
    assert PANEL_PLACE not in html and html.count("<script") == 2 and "<noscript>" in html
    assert "http" not in re.sub('(src|href)="data:[^"]*"', "", html).replace("http-equiv", "")


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

    write_report(["# T", PANEL_PLACE], tmp_path, made_panel())
    data = data_of((tmp_path / "report.html").read_text())
    browser.get((tmp_path / "report.html").as_uri())

    def one(selector: str):
        return browser.find_element(By.CSS_SELECTOR, f"#panel {selector}")

    def state() -> tuple:
        figures = browser.find_elements(By.CSS_SELECTOR, "#panel figure")
        masks = [f.find_element(By.CSS_SELECTOR, ".mask").get_attribute("d") for f in figures]
        texts = [f.find_element(By.TAG_NAME, "b").text for f in figures]
        box = [float(one("rect").get_attribute(name)) for name in ("x", "y", "width", "height")]
        return one("output").text, masks, texts, box

    def expected(example: int, shift: int) -> tuple:
        step = data["examples"][example]["steps"][data["shifts"].index(shift)]
        return step["masks"], [f"DSC {dsc:.1f} %" for dsc in step["dsc"]], step["box"]

    assert one("select").is_displayed()
    text, *shown = state()
    assert text == "0 % of the side, tight" and tuple(shown) == expected(0, 0)
    one("input").send_keys(Keys.ARROW_LEFT, Keys.ARROW_LEFT)
    text, *shown = state()
    assert text == "\N{MINUS SIGN}10 % of the side, too small" and tuple(shown) == expected(0, -10)
    one("input").send_keys(Keys.END)
    text, *shown = state()
    assert text == "+25 % of the side, too large" and tuple(shown) == expected(0, 25)
    Select(one("select")).select_by_index(1)
    assert state()[1:] == expected(1, 25)
    assert [f.text.split()[0] for f in browser.find_elements(By.CSS_SELECTOR, "#panel figcaption")]
    errors = [line for line in browser.get_log("browser") if line["level"] == "SEVERE"]
    assert not errors
    widths = browser.execute_script(
        "return [document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    )
    assert widths[0] <= widths[1]  # nothing to scroll sideways
