"""eval.py --predict SCAN --draw: the page in headless Chromium, and who may ask its server."""

import csv
import http.client
import json
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import SimpleITK as sitk

import eval as evaluation
from tests.helpers import call, write_volume
from utils.prediction import drawing
from utils.system import UserError
from utils.system.files import read_json, sha256, write_json
from utils.system.signals import Interrupted

pytest.importorskip("werkzeug", reason="an optional package")
server = pytest.importorskip("utils.prediction.server")
pytestmark = pytest.mark.usefixtures("small_lite_medsam")
DEPTH, KEYS = 9, (1, 4, 7)  # slices, and those with drawn boxes
MODEL = ("--models", "lite_medsam", "--window", "flare22", "--device", "cpu")


@pytest.fixture
def scan(tmp_path) -> Path:
    """Two bright discs that grow and move through nine slices, stored upside down."""
    z, y, x = np.mgrid[:DEPTH, :80, :96]
    hu = np.full(z.shape, -80.0)
    hu[np.hypot(x - 30 - z, y - 40) < 10 + z] = 110
    hu[np.hypot(x - 72, y - 30 - 2 * z) < 8] = 60
    noise = np.random.default_rng(0).normal(0, 8, hu.shape)
    write_volume(tmp_path / "discs.nii.gz", (hu + noise).astype(np.int16), orientation="RAI")
    return tmp_path / "discs.nii.gz"


class Running:
    """The program in a thread of this process, and requests to it."""

    def __init__(self, scan: Path, out: Path, *more: object) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        words = ("--predict", scan, "--draw", self.port, "--out", out, *(more or MODEL))
        self.thread = threading.Thread(target=call, args=(evaluation, *words), daemon=True)
        self.thread.start()
        self.address = f"http://127.0.0.1:{self.port}/token/"
        wait(lambda: not self.thread.is_alive() or self.is_up())

    def is_up(self) -> bool:
        with socket.socket() as client:
            return client.connect_ex(("127.0.0.1", self.port)) == 0

    def ask(self, method: str, path: str, content: object = None, **headers: str) -> tuple:
        """Status and body."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port)
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        headers["Content-Type"] = "application/json"
        body = None if content is None else json.dumps(content)
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        return response.status, response.read()

    def end(self) -> None:
        self.ask("POST", "/token/open", {}, X_Tab="end")
        assert self.ask("POST", "/token/done", {}, X_Tab="end")[0] == 200
        self.thread.join(60)
        assert not self.thread.is_alive()


def wait(condition: Callable[[], object], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


@pytest.fixture
def draw(monkeypatch) -> Iterator[Callable[..., Running]]:
    """Start the program; it is ended after the test."""
    monkeypatch.setattr("secrets.token_urlsafe", lambda size: "token")
    started = []

    def start(*words: object) -> Running:
        started.append(Running(*words))
        return started[-1]

    yield start
    for running in started:
        if running.thread.is_alive():
            running.end()


def voxels_of(path: Path) -> np.ndarray:
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))


def rows_of(path: Path) -> list[dict]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def boxes_like(label: str, *places: tuple) -> list[dict]:
    return [{"label": label, "index": z, "box": box or None} for z, *box in places]


def test_what_is_drawn_is_kept_and_equals_the_same_boxes_headless(scan, draw, tmp_path):
    """Two labels, a mask dropped, a label added; then a second start, which makes nothing anew."""
    out = tmp_path / "out"
    running = draw(scan, out)
    tab = {"X_Tab": "one"}
    state = json.loads(running.ask("POST", "/token/open", {}, **tab)[1])
    assert state["shape"] == [DEPTH, 80, 96] and [n["name"] for n in state["labels"]] == ["target"]
    assert running.ask("POST", "/token/labels", {"name": "vessel"}, **tab)[0] == 200
    for name in ("vessel", "3", "nan", " "):  # there already, or not to be read again
        assert running.ask("POST", "/token/labels", {"name": name}, **tab)[0] == 400
    boxes = boxes_like("target", (1, 18, 28, 44, 52), (4, 20, 24, 50, 56), (7, 19, 22, 56, 58))
    boxes += boxes_like("vessel", (7, 64, 36, 80, 52), (1, 62, 22, 80, 41), (3,))
    content = {"scan": "discs", "boxes": boxes}
    status, body = running.ask("POST", "/token/boxes", content, **tab)
    state = json.loads(body)
    assert status == 200 and sorted(map(int, state["prompts"])) == [*range(1, 8)]
    sources = {(p["label"], z): p["source"] for z, of in state["prompts"].items() for p in of}
    assert sources["target", "4"] == "given" and sources["vessel", "4"] == "interpolated"
    assert ("vessel", "3") not in sources
    assert (out / "boxes.csv").is_file()  # before any mask
    running.end()

    rows = rows_of(out / "boxes.csv")
    assert len(rows) == 6 and {row["case"] for row in rows} == {"discs"}
    assert [row["x0"] for row in rows].count("") == 1
    record = read_json(out / "predictions.json")
    assert record["label_names"] == {"1": "target", "2": "vessel"}
    drawn = voxels_of(out / "discs.nii.gz")
    assert set(np.unique(drawn)) == {0, 1, 2}
    words = ("--boxes", out / "boxes.csv", "--interpolate", "--out", tmp_path / "headless")
    call(evaluation, "--predict", scan, *words, *MODEL)
    headless = read_json(tmp_path / "headless/predictions.json")
    assert np.array_equal(drawn, voxels_of(tmp_path / "headless/discs.nii.gz"))
    for key in ("labels", "voxels", "boxes", "image_sha256"):
        assert headless["scans"]["discs"][key] == record["scans"]["discs"][key]

    running = draw(scan, out)
    state = json.loads(running.ask("POST", "/token/open", {}, **tab)[1])
    assert state["saved"] and not state["pending"]  # the masks are those of the file
    assert len(state["boxes"]) == 6 and boxes_like("vessel", (3,))[0] in state["boxes"]
    content = {"scan": "discs", "boxes": []}
    assert running.ask("POST", "/token/boxes", content, **tab)[0] == 200
    running.end()
    assert not voxels_of(out / "discs.nii.gz").any() and not (out / "boxes.csv").exists()


@contextmanager
def full_disk(monkeypatch, *names: str) -> Iterator[None]:
    """Within it, functions that `drawing` writes with fail."""
    with monkeypatch.context() as patch:
        for name in names:
            patch.setattr(drawing, name, Mock(side_effect=UserError("disk full")))
        yield


def test_what_could_not_be_saved_is_tried_again(scan, draw, tmp_path, monkeypatch):
    out, tab = tmp_path / "out", {"X_Tab": "one"}
    running = draw(scan, out)

    def state() -> dict:
        return json.loads(running.ask("GET", "/token/status", **tab)[1])

    running.ask("POST", "/token/open", {}, **tab)
    content = {"scan": "discs", "boxes": boxes_like("target", (4, 20, 24, 50, 56))}
    monkeypatch.setattr(drawing, "RETRY_SECONDS", 0.5)
    with full_disk(monkeypatch, "atomic_write", "write_volume"):
        status, text = running.ask("POST", "/token/boxes", content, **tab)
        assert (status, text) == (400, b"disk full")
        wait(lambda: state()["problem"] == "disk full")  # in place of "boxes saved"
        assert not state()["saved"] and not (out / "boxes.csv").exists()
    wait(lambda: state()["saved"])
    assert len(rows_of(out / "boxes.csv")) == 1 and voxels_of(out / "discs.nii.gz").any()
    assert state()["problem"] == ""


def test_masks_of_other_boxes_are_made_anew(scan, draw, tmp_path):
    """As after a kill between boxes.csv and the masks; the other scan's masks are kept."""
    out, tab, folder = tmp_path / "out", {"X_Tab": "one"}, tmp_path / "scans"
    folder.mkdir()
    for name in ("a", "b"):
        shutil.copy(scan, folder / f"{name}.nii.gz")
    running = draw(folder, out)
    for name in ("a", "b"):
        assert running.ask("POST", "/token/open", {"scan": name}, **tab)[0] == 200
        boxes = boxes_like("target", (4, 20, 24, 50, 56))
        content = {"scan": name, "boxes": boxes}
        assert running.ask("POST", "/token/boxes", content, **tab)[0] == 200
    (folder / "b.nii.gz").rename(tmp_path / "b.nii.gz")
    (folder / "b.nii.gz").write_bytes(b"not a scan")  # the open one is in memory
    assert running.ask("POST", "/token/open", {"scan": "a"}, **tab)[0] == 200
    assert running.ask("POST", "/token/open", {"scan": "b"}, **tab)[0] == 400
    status, body = running.ask("GET", "/token/status", **tab)  # the last one stays open
    assert status == 200 and len(json.loads(body)["prompts"]) == 1
    (tmp_path / "b.nii.gz").replace(folder / "b.nii.gz")
    running.end()

    a, b = rows_of(out / "boxes.csv")
    moved = ",".join({**a, "x0": "0", "x1": "9"}.values()), ",".join(b.values())
    (out / "boxes.csv").write_text("\n".join([",".join(a), *moved]))
    record = read_json(out / "predictions.json")
    record["boxes"]["boxes.csv"] = sha256(out / "boxes.csv")
    write_json(out / "predictions.json", record)
    kept = (out / "b.nii.gz").stat().st_mtime_ns
    draw(folder, out).end()
    of_scans = read_json(out / "predictions.json")["scans"]
    widths = {name: np.diff(of["boxes"][0]["box"][::2]) for name, of in of_scans.items()}
    assert widths == {"a": 9, "b": 30}
    assert (out / "b.nii.gz").stat().st_mtime_ns == kept


def test_who_may_ask(scan, draw, tmp_path):
    running = draw(scan, tmp_path / "out")
    host = f"127.0.0.1:{running.port}"
    page = running.ask("GET", "/token/")
    assert page[0] == 200 and b"<canvas" in page[1] and b"http://" not in page[1]
    for path in ("/", "/other/", "/other/image/axial/1", "/token%00/"):
        assert running.ask("GET", path)[0] == 403, path
    for path in ("/token/../../etc/passwd", "/token/draw.html", "/token/image/axial/../1"):
        assert running.ask("GET", path)[0] == 404, path
    for wrong in ({"Host": "evil.example"}, {"Host": "evil.example", "Origin": f"http://{host}"}):
        assert running.ask("GET", "/token/", **wrong)[0] == 403
    for origin in ("http://evil.example", "null"):
        assert running.ask("POST", "/token/open", {}, Origin=origin, X_Tab="a")[0] == 403
    assert running.ask("POST", "/token/open", {}, Origin=f"http://{host}", X_Tab="a")[0] == 200
    assert running.ask("GET", "/token/status", X_Tab="b")[0] == 409  # a second tab
    assert running.ask("POST", "/token/boxes", {}, X_Tab="b")[0] == 409
    assert running.ask("POST", "/token/open", {}, X_Tab="b")[0] == 200
    assert running.ask("GET", "/token/status", X_Tab="a")[0] == 409
    assert running.ask("GET", "/token/status", X_Tab="b")[0] == 200
    for scan_name in ("../discs", "/etc/passwd", 3):
        status, _ = running.ask("POST", "/token/open", {"scan": scan_name}, X_Tab="b")
        assert status == 404
    for path in ("image/axial/9", "image/coronal/80", "mask/sagittal/96", "image/axial/-1"):
        assert running.ask("GET", f"/token/{path}?low=0&high=1", X_Tab="b")[0] == 404
    good = {"label": "target", "index": 2, "box": [1, 1, 5, 5]}
    for wrong in (
        {"label": "other"},
        {"index": 9},
        {"index": "../x"},
        {"box": [5, 1, 1, 5]},
        {"box": [1, 1, 96, 5]},
        {"box": [1, 1, "NaN", 5]},
        {"box": [1, 2, 3]},
    ):
        content = {"scan": "discs", "boxes": [{**good, **wrong}]}
        assert running.ask("POST", "/token/boxes", content, X_Tab="b")[0] == 400, wrong
    assert running.ask("POST", "/token/boxes", [], X_Tab="b")[0] == 400
    assert not (tmp_path / "out/boxes.csv").exists()


def test_what_stands_in_the_way(scan, fails, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").write_text("mine")
    words = ("--predict", scan, "--draw", *MODEL, "--out")
    assert "holds files other than drawn" in fails(evaluation, *words, tmp_path / "full")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["notes.txt"]
    write_volume(tmp_path / "side.nii.gz", np.zeros((4, 8, 8), np.int16), orientation="SPL")
    side = ("--predict", tmp_path / "side.nii.gz", "--draw", *MODEL, "--out", tmp_path / "new")
    assert "not axial" in fails(evaluation, *side) and not (tmp_path / "new").exists()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        words = ("--predict", scan, "--draw", taken.getsockname()[1], *MODEL)
        assert "choose another port" in fails(evaluation, *words, "--out", tmp_path / "new")
    both = ("--predict", scan, "--draw", "--boxes", "boxes.csv", *MODEL)
    assert "--draw: cannot be used with --boxes" in fails(evaluation, *both)


def test_ctrl_c_ends_as_the_button_does_and_sigterm_at_once(monkeypatch):
    app = Mock()
    monkeypatch.setattr(server, "App", Mock(return_value=app))
    for stop in (KeyboardInterrupt(), Interrupted(signal.SIGINT)):
        app.ended.wait.side_effect = stop
        server.serve(Mock(), 0)
    app.ended.wait.side_effect = Interrupted(signal.SIGTERM)
    with pytest.raises(Interrupted):
        server.serve(Mock(), 0)


# --- In a browser --------------------------------------------------------------------------------
@pytest.fixture
def browser():
    """Headless Chromium; without it, or without selenium, the test is skipped."""
    webdriver = pytest.importorskip("selenium.webdriver")
    binary = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
    if not binary or not shutil.which("chromedriver"):
        pytest.skip("no Chromium with its driver here (Debian: chromium, chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1200,800"):
        options.add_argument(argument)
    service = webdriver.ChromeService(executable_path=shutil.which("chromedriver"))
    browser = webdriver.Chrome(options=options, service=service)
    yield browser
    browser.quit()


def settled(browser) -> None:
    """Wait until what was done has been sent, filled in, saved, and is shown."""
    idle = "[send, show_slice, show_mask, side_views].every(task => !task.running)"
    wait(lambda: browser.execute_script(f"return S.open && !S.pending.length && S.saved && {idle}"))


def drag(browser, box: tuple, kind: str = "mouse") -> None:
    """Drag from a corner of a box (x0, y0, x1, y1) of whole pixels to the other."""
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.actions.pointer_input import PointerInput

    x0, y0, x1, y1 = box
    corners = f"[[{x0}, {y0}], [{(x0 + x1) / 2}, {y1}], [{x1 + 1}, {y1 + 1}]]"
    place = "const at = canvas.getBoundingClientRect(); return " + corners
    points = browser.execute_script(
        place + ".map(p => to_screen(...p)).map(([x, y]) => [at.x + x, at.y + y].map(Math.round))"
    )
    chain = ActionChains(browser, devices=[PointerInput(kind, kind)], duration=30)
    pointer = chain.w3c_actions.pointer_action
    pointer.move_to_location(*points[0]).pointer_down()
    for point in points[1:]:
        pointer.move_to_location(*point)
    pointer.pointer_up()
    chain.perform()


def press(browser, *keys: str) -> None:
    from selenium.webdriver.common.by import By

    browser.find_element(By.TAG_NAME, "body").send_keys(*keys)


def drawn(browser) -> list[tuple]:
    boxes = browser.execute_script("return S.boxes.filter(box => box.box)")
    return sorted((box["label"], box["index"], *box["box"]) for box in boxes)


def test_the_page(scan, draw, browser, tmp_path):
    """Two labels in three slices each, edited, undone, reloaded, started again, by touch."""
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    out = tmp_path / "out"
    running = draw(scan, out)
    browser.get(running.address)
    settled(browser)
    browser.find_element(By.ID, "name").send_keys("vessel", Keys.ENTER)
    wait(lambda: browser.execute_script("return S.label") == "vessel")
    expected = []
    for z in KEYS:
        browser.execute_script(f"go({z})")
        settled(browser)
        boxes = {"2": (63, 21 + 2 * z, 81, 39 + 2 * z), "1": (19, 29 - z, 41 + 2 * z, 51 + z)}
        for key, box in boxes.items():
            press(browser, key)
            drag(browser, box)
            expected.append(("target" if key == "1" else "vessel", z, *box))
        settled(browser)
    assert drawn(browser) == sorted(expected)
    press(browser, Keys.ARROW_DOWN)
    settled(browser)
    here = browser.execute_script("return here()")
    assert [(p["source"], p["index"]) for p in here] == [("interpolated", 6)] * 2
    texts = [b.text for b in browser.find_elements(By.CSS_SELECTOR, "#labels button")]
    assert texts == [f"{n}\n3 drawn, 7 of 7" for n in ("target", "vessel")]

    # A click on a dashed box draws it, and moving an edge moves it; both can be undone.
    corner = here[0]["box"]
    edges = [round(edge) for edge in corner]
    middle = ((edges[0] + edges[2]) / 2, (edges[1] + edges[3]) / 2)
    drag(browser, (*middle, middle[0] - 1, middle[1] - 1))
    settled(browser)
    assert ("target", 6, *edges) in drawn(browser)
    drag(browser, (edges[2] + 1, middle[1], edges[2] + 4, middle[1]))
    settled(browser)
    assert ("target", 6, *edges[:2], edges[2] + 4, edges[3]) in drawn(browser)
    press(browser, Keys.CONTROL + "z")
    press(browser, Keys.CONTROL + "z")
    settled(browser)
    assert drawn(browser) == sorted(expected)
    press(browser, Keys.CONTROL + "y")
    settled(browser)
    assert ("target", 6, *edges) in drawn(browser)
    press(browser, "1", "d")
    settled(browser)
    assert [p["label"] for p in browser.execute_script("return here()")] == ["vessel"]
    assert drawn(browser) == sorted(expected)

    # Undo shows what it undoes; the next drop drops a box that was drawn in place of the mask.
    browser.execute_script("go(8)")
    press(browser, Keys.CONTROL + "z")
    settled(browser)
    assert browser.execute_script("return S.z") == 6
    press(browser, Keys.CONTROL + "y")
    drag(browser, (2, 2, 12, 12))
    press(browser, "D")
    settled(browser)
    assert [p["label"] for p in browser.execute_script("return here()")] == ["vessel"]

    # Slices that pass in a hurry are not all asked for; a dragged window is no preset.
    count = "performance.getEntriesByType('resource').filter(e => e.name.includes('axial')).length"
    before = browser.execute_script(f"return {count}")
    browser.execute_script("for (let z = 0; z < 9; z++) go(z)")
    settled(browser)
    assert browser.execute_script(f"return {count}") - before <= 4  # two slices and their masks
    browser.execute_script("S.window = [0, 77]; show()")
    assert browser.execute_script("return $('window').selectedIndex") == -1

    def check_the_volume() -> None:
        words = ("--boxes", out / "boxes.csv", "--interpolate", "--out", tmp_path / "headless")
        call(evaluation, "--predict", scan, *words, *MODEL, "--overwrite")
        headless = voxels_of(tmp_path / "headless/discs.nii.gz")
        assert np.array_equal(headless, voxels_of(out / "discs.nii.gz"))

    check_the_volume()
    browser.refresh()
    settled(browser)
    assert drawn(browser) == sorted(expected)
    browser.find_element(By.ID, "done").click()
    running.thread.join(60)
    running = draw(scan, out)
    browser.get(running.address)
    settled(browser)
    assert drawn(browser) == sorted(expected)
    browser.execute_script("go(3)")
    settled(browser)
    press(browser, "2")
    drag(browser, (10, 60, 25, 70), "touch")
    settled(browser)
    assert drawn(browser) == sorted([*expected, ("vessel", 3, 10, 60, 25, 70)])
    assert browser.find_element(By.ID, "message").text == ""
    browser.find_element(By.ID, "done").click()
    running.thread.join(60)
    check_the_volume()
    assert not [line for line in browser.get_log("browser") if line["level"] == "SEVERE"]
