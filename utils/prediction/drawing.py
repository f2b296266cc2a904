"""Boxes drawn on the page of eval.py --predict SCAN --draw, and the masks predicted from them.

The page (draw.html, served by server.py) sends all boxes of a scan after every change. Which boxes
a slice then has is decided by `prompts_by_slice`, as with --boxes --interpolate, so both give the
same label volume. Masks are computed in a thread. --out always has boxes.csv, and the label volume
and predictions.json once all masks are done.
"""

import csv
import threading
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from utils.data.given_boxes import COLUMNS, GivenBox, parse_label
from utils.data.slices import Geometry
from utils.data.volumes import check_window, read_image, read_label_map, write_volume
from utils.model.segmenter import Segmenter
from utils.prediction.output import RECORD, boxes_of, record_of
from utils.prediction.scan import Prompt, ScanSegmenter, add_mask, prompts_by_slice
from utils.system import UserError
from utils.system.files import atomic_write, sha256, write_json

BOXES = "boxes.csv"
AHEAD = 2  # slices on either side of the shown one, encoded before they are asked for
IDLE_SECONDS, RETRY_SECONDS = 0.05, 5.0  # until the thread looks for something to do, tries again


class Drawing:
    """The boxes and masks of one scan; threads may use it at the same time.

    `ids` are the numbers of all labels, by name. The masks that are kept are by the first of the
    `segmenters`, which share their embeddings.
    """

    boxes: list[GivenBox]
    prompts: dict[int, list[Prompt]]  # by z, those that follow from the boxes

    def __init__(self, case: str, segmenters: dict[str, ScanSegmenter], ids: dict) -> None:
        self.case, self.segmenters, self.ids = case, segmenters, ids
        self.model, self.segmenter = next(iter(segmenters.items()))
        self.image = self.segmenter.image
        self.labels = np.zeros(self.image.shape, np.uint8)  # (z, y, x) in LPS
        self._done: dict[int, list[Prompt]] = {}  # by z, those that `labels` was made of
        self._lock = threading.Lock()

    def pending(self) -> list[int]:
        """The slices whose masks are not those of their boxes."""
        slices = {*self.prompts, *self._done.copy()}
        return [z for z in slices if self._done.get(z, []) != self.prompts.get(z, [])]

    def mask(self, index: int, model: str) -> np.ndarray:
        """The label map (H, W) uint8 of a slice's boxes, by one of the models."""
        segmenter, prompts = self.segmenters[model], self.prompts.get(index, [])
        kept = segmenter is self.segmenter
        if kept and self._done.get(index, []) == prompts:
            return self.labels[index]
        plane = np.zeros(self.image.shape[1:], np.uint8)
        highest = np.zeros(plane.shape, np.float32)
        for box, _ in prompts:
            add_mask(plane, highest, segmenter.decode(index, [box.box])[0], self.ids[box.label])
        if kept:
            with self._lock:
                self.labels[index], self._done[index] = plane, prompts
        return plane

    def save(self, path: Path) -> dict:
        """Write the label volume; return what predictions.json says of it."""
        with self._lock:
            labels, done = self.labels.copy(), dict(self._done)
        prompts = [prompt for index in sorted(done) for prompt in done[index]]
        ids = {box.label: self.ids[box.label] for box, _ in prompts}
        write_volume(path, labels, self.image)
        hashes = {"image_sha256": self.image.sha256, "labels_sha256": sha256(path)}
        return {"files": [path.name], **hashes, **record_of(labels, ids, prompts)}

    def restore(self, path: Path, record: dict) -> bool:
        """Take the masks from what `save` wrote, if it was of this image and these boxes."""
        boxes = boxes_of(prompt for of_slice in self.prompts.values() for prompt in of_slice)
        made_of = [self.image.sha256, boxes, path.is_file() and sha256(path)]
        if same := made_of == [record.get(f) for f in ("image_sha256", "boxes", "labels_sha256")]:
            self.labels, self._done = read_label_map(path).array, dict(self.prompts)
        return same


@dataclass
class Session:
    """The scans of one command, one of them open, and the thread that fills in its masks."""

    scans: Mapping[str, Path]  # by case, as geometry and boxes
    geometry: Mapping[str, Geometry]
    boxes: dict[str, list[GivenBox]]
    models: Mapping[str, Segmenter]
    folder: Path
    record: dict  # predictions.json
    amp: torch.dtype | None
    drawing: Drawing | None = None  # that of the open scan
    shown: int = 0  # its slice
    problem: str = ""  # that keeps things from being saved

    def __post_init__(self) -> None:
        self.ids = {name: int(number) for number, name in self.record["label_names"].items()}
        self.boxes = {case: self.boxes.get(case, []) for case in self.scans}
        # Cases whose label volume may be that of other boxes: to open one shows whether it is.
        self.unsaved = {c for c in self.scans if self.boxes[c] or c in self.record["scans"]}
        self._lock, self._closing = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def open(self, case: str) -> Drawing:
        """Go on with a scan; UserError if it cannot be read, and the last one stays open."""
        if self.drawing is None or self.drawing.case != case:
            image = read_image(self.scans[case])
            window = tuple(self.record["window_hu"])
            check_window(image.array, self.scans[case], window)
            segmenters: dict[str, ScanSegmenter] = {}
            for name, model in self.models.items():
                first = next(iter(segmenters.values()), None)
                segmenters[name] = ScanSegmenter(model, image, window, self.amp, first)
            drawing = Drawing(case, segmenters, self.ids)
            self._place(drawing, self.boxes[case])
            if drawing.restore(self.folder / f"{case}.nii.gz", self.record["scans"].get(case, {})):
                self.unsaved.discard(case)
            self.drawing, self.shown = drawing, image.shape[0] // 2
        return self.drawing

    def add_label(self, name: str) -> None:
        """Add a label under the first free id; UserError if it cannot have that name."""
        free = next((n for n in range(1, 256) if n not in self.ids.values()), None)
        if free is None or parse_label("add a label", name).isdecimal():
            raise UserError(f"{name!r}: a name needs a letter, and 255 labels are the most")
        if name in self.ids:
            raise UserError(f"label {name!r} already exists; choose another name")
        self.ids[name] = free
        self.write_record()

    def change(self, boxes: list[GivenBox]) -> None:
        """Replace the boxes of the open scan, and write boxes.csv."""
        boxes = boxes if any(box.box for box in boxes) else []
        boxes.sort(key=lambda box: (self.ids[box.label], box.index, box.box or ()))
        with self._lock:
            self._place(self.drawing, boxes)
            self.unsaved.add(self.drawing.case)
        self._write_boxes()

    def finish(self) -> None:
        """Wait until all masks are computed and saved, or a problem prevents it."""
        self.problem = ""
        while self.unsaved and not self.problem:
            if self.drawing.case not in self.unsaved:
                self.open(next(iter(self.unsaved)))
            self._thread.join(IDLE_SECONDS)

    def close(self) -> None:
        """Stop the thread."""
        self._closing.set()
        self._thread.join()

    def _place(self, drawing: Drawing, boxes: list[GivenBox]) -> None:
        drawing.boxes = self.boxes[drawing.case] = boxes
        drawing.prompts = prompts_by_slice(boxes, self.ids, self.record["interpolate"])

    def _work(self) -> None:
        while not self._closing.is_set():
            with self._lock:
                task = self._next_task()
            try:
                task()
            except Exception as error:  # the page shows it, and it is tried again
                self.problem = str(error)
                if not isinstance(error, UserError):
                    traceback.print_exc()
                self._closing.wait(RETRY_SECONDS)

    def _next_task(self) -> Callable[[], object]:
        if (drawing := self.drawing) is not None:
            near = range(self.shown - AHEAD, self.shown + AHEAD + 1)
            within = [index for index in near if index in range(len(drawing.labels))]
            for index in sorted(within, key=lambda index: abs(index - self.shown)):
                if not drawing.segmenter.is_encoded(index):
                    return partial(drawing.segmenter.encode, index)
            if pending := drawing.pending():
                nearest = min(pending, key=lambda index: abs(index - self.shown))
                return partial(drawing.mask, nearest, drawing.model)
            if drawing.case in self.unsaved:
                return partial(self._save, drawing)
        return partial(self._closing.wait, IDLE_SECONDS)

    def _save(self, drawing: Drawing) -> None:
        case, boxes = drawing.case, drawing.boxes
        saved = drawing.save(self.folder / f"{case}.nii.gz")
        of_scan = {"image": self.scans[case].name, **saved}
        self.record["scans"] = {**self.record["scans"], case: of_scan}
        self._write_boxes()  # once more: when they were drawn, the disk may have been full
        self.write_record()
        self.problem = ""
        with self._lock:
            if drawing.boxes is boxes:
                self.unsaved.discard(case)

    def write_record(self) -> None:
        """Write predictions.json."""
        with self._lock:
            by_id = sorted((number, name) for name, number in dict(self.ids).items())
            self.record["label_names"] = {str(number): name for number, name in by_id}
            path = self.folder / BOXES
            self.record["boxes"] = {BOXES: sha256(path)} if path.is_file() else {}
            write_json(self.folder / RECORD, self.record)

    def _write_boxes(self) -> None:
        with self._lock:
            rows = []
            for case, boxes in self.boxes.items():
                for box in boxes:
                    corners = np.reshape(box.box or (0, 0, 0, 0), (2, 2))
                    corners = np.insert(corners, 2, box.index, axis=1)
                    ends = self.geometry[case].from_stored(corners, back=True)
                    (x0, y0, z), (x1, y1, _) = np.sort(ends, axis=0).tolist()
                    numbers = [f"{n:g}" if box.box else "" for n in (x0, y0, x1, y1)]
                    rows.append((case, box.label, f"{z:g}", *numbers))
            path = self.folder / BOXES
            if not rows:
                return path.unlink(missing_ok=True)
            with atomic_write(path, "w") as file:
                csv.writer(file, lineterminator="\n").writerows([COLUMNS, *rows])
