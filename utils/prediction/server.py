"""The page of eval.py --predict SCAN --draw, for one user on this machine.

The server is Werkzeug's, which is small, typed, tested and needs no further package. It answers on
the loopback address alone, to who knows the random token of the address, asks for this machine by
that address (Host), comes from no other site (Origin), and is the one tab that draws.
"""

import colorsys
import io
import json
import logging
import secrets
import socket
import sys
import threading
import webbrowser
from collections.abc import Callable, Sequence
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
GET = ("page", "status", f"image/{PLANE}", f"mask/{PLANE}")
POST = ("open", "labels", "boxes", "done")
URLS = Map(
    [Rule(f"/{path}", endpoint=path.split("/")[0], methods=["GET"]) for path in GET]
    + [Rule(f"/{path}", endpoint=path, methods=["POST"]) for path in POST]
)


def serve(session: Session, port: int) -> None:
    """Print the address of the page, open it, and serve it until it says that it is done.

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
        address = f"http://{app.host}/{app.token}/"
        print(f"draw at {address}\nend with Done there, or with Ctrl-C here; all is saved")
        if sys.stdout.isatty():
            webbrowser.open(address)
        try:
            while not app.ended.wait(0.5):  # signals are handled in between
                pass
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
        except HTTPException as error:
            response = Response(error.description, error.code)
        except UserError as error:
            response = Response(str(error), 400)
        response.headers.update(HEADERS)
        return response(environ, start_response)

    def _answer(self, request: Request) -> Response:
        here = f"http://{self.host}"
        _, token, path = f"{request.path}/".split("/", 2)
        known = secrets.compare_digest(token.encode(), self.token.encode())
        hosts = request.headers.get("Host"), request.headers.get("Origin", here)
        if not known or hosts != (self.host, here):
            raise Forbidden("this is not the address that the program printed")
        endpoint, values = URLS.bind(self.host).match(f"/{path[:-1] or 'page'}", request.method)
        if endpoint not in ("page", "open"):
            with self._opening:  # a scan that is asked for is there
                pass
            if request.headers.get("X-Tab") != self._tab:
                raise Conflict("another tab draws")
        answer = getattr(self, endpoint)(request, **values)
        return Response(json.dumps(answer)) if isinstance(answer, dict) else answer

    def page(self, request: Request) -> Response:
        """The page itself."""
        return Response(PAGE.read_text(), mimetype="text/html")

    def open(self, request: Request) -> dict:
        """Open a scan for a tab; all that the page needs to know of it."""
        asked, tab, session = request.get_json(), request.headers.get("X-Tab", ""), self._session
        with self._opening:
            if self._tab not in ("", tab) and not asked.get("take_over"):
                raise Conflict("another tab draws, or was closed")
            self._tab = tab
            if (case := asked.get("scan") or session.drawing.case) not in session.scans:
                raise NotFound(f"there is no scan {case!r}")
            image = session.open(case).image
        return {
            "scan": case,
            "scans": list(session.scans),
            "models": list(session.models),
            "shape": image.shape,
            "spacing": image.spacing_mm,
            "windows": {"as the model sees it": session.window, **PRESETS},
            "boxes": [_as_json(box) for box in session.drawing.boxes[0]],
            "dropped": sorted(session.drawing.boxes[1]),
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
            boxes = [_box(content, drawing) for content in content["boxes"]]
            dropped = {_place(*place, drawing) for place in content["dropped"]}
        except (ValueError, LookupError, TypeError) as error:
            raise BadRequest(f"not boxes of this scan: {error}") from error
        self._session.change((boxes, dropped))
        return self.status(request)

    def status(self, request: Request) -> dict:
        """All boxes by slice, and how far the masks are."""
        session, drawing = self._session, self._session.drawing
        return {
            "labels": [
                {"name": label, "colour": _colour(drawing.ids[label]), "progress": progress}
                for label, progress in drawing.progress().items()
            ],
            "prompts": {
                index: [_as_json(box, source=source) for box, source in of_slice]
                for index, of_slice in drawing.prompts.items()
            },
            "pending": len(drawing.pending()),
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
            self._session.show(index)
        return _picture(grey_levels(pixels, (low, high)), "JPEG", quality=95)

    def mask(self, request: Request, plane: str, index: int) -> Response:
        """A slice of the masks: those that are there, or axial those that ?model=NAME makes."""
        drawing, model = self._session.drawing, request.args.get("model")
        pixels = _cut(drawing.labels, plane, index)
        if plane == "axial" and model in drawing.segmenters:
            pixels = drawing.mask(index, model)
        palette = [part for number in range(256) for part in _colour(number)]
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


def _picture(
    pixels: np.ndarray, kind: str, palette: Sequence[int] = (), **options: int
) -> Response:
    image, file = Image.fromarray(pixels.astype(np.uint8)), io.BytesIO()
    if palette:
        image.putpalette(palette)
    image.save(file, kind, **options)
    return Response(file.getvalue(), mimetype=f"image/{kind.lower()}")


def _colour(number: int) -> tuple[int, ...]:
    """RGB of a label id: neighbours in number are far apart in hue."""
    return tuple(round(255 * part) for part in colorsys.hsv_to_rgb(number * 0.618 % 1, 0.75, 1))


def _as_json(box: GivenBox, **more: str) -> dict:
    return {"label": box.label, "z": box.index, "box": box.box, **more}


def _box(content: dict, drawing: Drawing) -> GivenBox:
    """A box that the page sent, of whole pixels within the slice; ValueError and such otherwise."""
    x0, y0, x1, y1 = box = tuple(float(int(edge)) for edge in content["box"])
    _, height, width = drawing.labels.shape
    if not (0 <= x0 <= x1 < width and 0 <= y0 <= y1 < height):
        raise ValueError(f"{content['box']} lies outside")
    return GivenBox(*_place(content["label"], content["z"], drawing), box)


def _place(label: str, index: int, drawing: Drawing) -> tuple[str, int]:
    if label not in drawing.ids or index not in range(len(drawing.labels)):
        raise ValueError(f"there is no label {label!r}, or no slice {index!r}")
    return label, int(index)
