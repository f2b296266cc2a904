"""The page of eval.py --predict SCAN --draw, for one user on this machine.

The server is Werkzeug's, which is small, typed, tested and needs no further package. It listens on
the loopback address only, and answers requests that have the random token in their path, name this
address (Host), come from no other site (Origin), and are from the tab that was opened last.
"""

import colorsys
import io
import json
import logging
import secrets
import signal
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from werkzeug.exceptions import BadRequest, Conflict, Forbidden, HTTPException, NotFound
from werkzeug.routing import Map, Rule
from werkzeug.serving import make_server
from werkzeug.wrappers import Request, Response

from utils.data.given_boxes import GivenBox
from utils.data.labels import WINDOWS
from utils.data.volumes import grey_levels
from utils.prediction.drawing import Drawing, Session
from utils.system import UserError

LOOPBACK = "127.0.0.1"
PAGE = Path(__file__).with_name("draw.html")
PRESETS = {"soft tissue": WINDOWS["medsam"], "lung": WINDOWS["lung"], "bone": (-500.0, 1300.0)}
PLANES = ("axial", "coronal", "sagittal")  # by the axis of a volume (z, y, x) that they cut
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'self' 'unsafe-inline'; img-src 'self' data:",
}
PLANE = f"<any({','.join(PLANES)}):plane>/<int:index>"
PATHS = ("page", "open", "labels", "boxes", "status", f"image/{PLANE}", f"mask/{PLANE}", "done")
URLS = Map([Rule(f"/{path}", endpoint=path.split("/")[0]) for path in PATHS])


def serve(session: Session, port: int) -> None:
    """Print the address of the page, and serve it until it says that it is done, or until Ctrl-C.

    `port` 0 is any free one; UserError if it is taken.
    """
    try:
        listening = socket.create_server((LOOPBACK, port))
    except OSError as error:
        raise UserError(f"--draw {port}: {error.strerror}; choose another port") from error
    with listening:
        app = App(session, f"{LOOPBACK}:{listening.getsockname()[1]}")
        logging.getLogger("werkzeug").setLevel(logging.ERROR)  # not a line for every request
        server = make_server(LOOPBACK, port, app, threaded=True, fd=listening.fileno())
        threading.Thread(target=server.serve_forever, daemon=True).start()
        print(f"draw at http://{app.host}/{app.token}/")
        print("to finish, click Done there or press Ctrl-C here; every box is saved")
        try:
            while not app.ended.wait(0.5):  # signals are handled in between
                pass
        except KeyboardInterrupt as stop:
            if getattr(stop, "signal", signal.SIGINT) != signal.SIGINT:
                raise
        finally:
            server.shutdown()


class App:
    """A WSGI application; each public method answers the endpoint of its name in URLS."""

    def __init__(self, session: Session, host: str) -> None:
        self.host, self.token, self.ended = host, secrets.token_urlsafe(16), threading.Event()
        self._session, self._opening, self._tab = session, threading.Lock(), ""

    def __call__(self, environ: dict, start_response: Callable) -> object:
        try:
            response = self._answer(Request(environ))
        except (HTTPException, UserError) as error:
            text, status = getattr(error, "description", str(error)), getattr(error, "code", 400)
            response = Response(text, status)
        response.headers.update(HEADERS)
        return response(environ, start_response)

    def _answer(self, request: Request) -> Response:
        here = f"http://{self.host}"
        _, token, path = f"{request.path}/".split("/", 2)
        known = secrets.compare_digest(token.encode(), self.token.encode())
        hosts = request.headers.get("Host"), request.headers.get("Origin", here)
        if not known or hosts != (self.host, here):
            raise Forbidden("this is not the address that the program printed")
        endpoint, values = URLS.bind(self.host).match(f"/{path[:-1] or 'page'}")
        if endpoint not in ("page", "open") and request.headers.get("X-Tab") != self._tab:
            raise Conflict("another tab is drawing; reload this one to continue here")
        answer = getattr(self, endpoint)(request, **values)
        return Response(json.dumps(answer)) if isinstance(answer, dict) else answer

    def page(self, request: Request) -> Response:
        """The page itself."""
        return Response(PAGE.read_text(), mimetype="text/html")

    def open(self, request: Request) -> dict:
        """Open a scan for a tab; all that the page needs to know of it."""
        session = self._session
        if (case := request.get_json().get("scan") or session.drawing.case) not in session.scans:
            raise NotFound(f"there is no scan {case!r}")
        with self._opening:
            self._tab, image = request.headers.get("X-Tab"), session.open(case).image
        return {
            "scan": case,
            "scans": list(session.scans),
            "models": list(session.models),
            "shape": image.shape,
            "spacing": image.spacing_mm,
            "windows": {"as the model sees it": session.record["window_hu"], **PRESETS},
            "boxes": [vars(box) for box in session.drawing.boxes],
            "shown": session.shown,
            **self.status(request),
        }

    def labels(self, request: Request) -> dict:
        """Add a label."""
        self._session.add_label(request.get_json()["name"])
        return self.status(request)

    def boxes(self, request: Request) -> dict:
        """Replace the boxes of the open scan."""
        drawing, content = self._session.drawing, request.get_json()
        try:
            if content["scan"] != drawing.case:
                raise ValueError("another scan is open")
            boxes = [_box(drawing, **box) for box in content["boxes"]]
        except (ValueError, LookupError, TypeError) as error:
            raise BadRequest(f"not boxes of this scan: {error}") from error
        self._session.change(boxes)
        return self.status(request)

    def status(self, request: Request) -> dict:
        """All boxes by slice, and the slices whose masks are pending."""
        session, drawing = self._session, self._session.drawing
        return {
            "labels": [
                {"name": label, "colour": _colour(number)}
                for label, number in dict(session.ids).items()
            ],
            "prompts": {
                index: [{**vars(box), "source": source} for box, source in of_slice]
                for index, of_slice in drawing.prompts.items()
            },
            "pending": drawing.pending(),
            "saved": drawing.case not in session.unsaved,
            "problem": session.problem,
        }

    def image(self, request: Request, plane: str, index: int) -> Response:
        """A slice in grey levels, of the window ?low=HU&high=HU."""
        pixels = _cut(self._session.drawing.image.array, plane, index)
        low, high = (request.args.get(name, 0.0, float) for name in ("low", "high"))
        if not low < high:
            raise BadRequest("expected low < high")
        if plane == "axial":
            self._session.shown = index
        return _picture(grey_levels(pixels, (low, high)), "JPEG", quality=95)

    def mask(self, request: Request, plane: str, index: int) -> Response:
        """A slice of the masks: those that are there, or axial those that ?model=NAME makes."""
        drawing, model = self._session.drawing, request.args.get("model")
        pixels = _cut(drawing.labels, plane, index)
        if plane == "axial" and model in drawing.segmenters:
            pixels = drawing.mask(index, model)
        palette = tuple(part for number in range(256) for part in _colour(number))
        return _picture(pixels, "PNG", palette, compress_level=1, transparency=0)

    def done(self, request: Request) -> dict:
        """End the program."""
        self.ended.set()
        return {}


def _cut(volume: np.ndarray, plane: str, index: int) -> np.ndarray:
    """A slice of a volume (z, y, x), head up."""
    axis = PLANES.index(plane)
    if index >= volume.shape[axis]:
        raise NotFound(f"there is no {plane} slice {index}")
    return volume[index] if axis == 0 else volume[::-1].take(index, axis)


def _picture(pixels: np.ndarray, kind: str, palette: tuple = (), **options: int) -> Response:
    image, file = Image.fromarray(pixels.astype(np.uint8)), io.BytesIO()
    if palette:
        image.putpalette(palette)
    image.save(file, kind, **options)
    return Response(file.getvalue(), mimetype=f"image/{kind.lower()}")


def _colour(number: int) -> tuple[int, ...]:
    """RGB of a label id: neighbours in number are far apart in hue."""
    return tuple(round(255 * part) for part in colorsys.hsv_to_rgb(number * 0.618 % 1, 0.75, 1))


def _box(drawing: Drawing, label: str, index: int, box: list | None) -> GivenBox:
    """A box that the page sent, of whole pixels within the slice; ValueError and such otherwise."""
    depth, height, width = drawing.labels.shape
    if label not in drawing.ids or index not in range(depth):
        raise ValueError(f"there is no label {label!r}, or no slice {index!r}")
    if box is not None:
        x0, y0, x1, y1 = box = tuple(float(int(edge)) for edge in box)
        if not (0 <= x0 <= x1 < width and 0 <= y0 <= y1 < height):
            raise ValueError(f"{box} lies outside the slice")
    return GivenBox(label, int(index), box)
