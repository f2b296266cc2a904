"""What somebody draws on the page of eval.py --predict SCAN --draw, and the masks that it gives.

The page (draw.html, served by server.py) sends all boxes of a scan after every change. Which boxes
a slice has then is for `prompts_by_slice` to say, as it is for --boxes --interpolate, so both give
the same label volume. Masks follow in a thread. --out has boxes.csv at any time, and the label
volume and predictions.json whenever all masks are there.
"""

import csv
import threading
import traceback
from collections.abc import Callable, Iterable, Mapping
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

Boxes = tuple[list[GivenBox], set[tuple[str, int]]]  # of a scan; and (label, z) without a box


class Drawing:
    """The boxes and masks of one scan; threads may use it at the same time.

    `ids` are those of all labels, by name. The masks that are kept are by the first of the
    `segmenters`, which share their embeddings.
    """

    boxes: Boxes
    prompts: dict[int, list[Prompt]]  # by z, those that follow from the boxes

    def __init__(
        self, case: str, segmenters: dict[str, ScanSegmenter], ids: dict[str, int]
    ) -> None:
        self.case, self.segmenters, self.ids = case, segmenters, ids
        self.model, self.segmenter = next(iter(segmenters.items()))
        self.image = self.segmenter.image
        self.labels = np.zeros(self.image.shape, np.uint8)  # (z, y, x) in LPS
        self._done: dict[int, list[Prompt]] = {}  # by z, those that `labels` was made of
        self._lock = threading.Lock()

    def is_filled(self, index: int) -> bool:
        """Whether the masks of a slice are those of its boxes."""
        return self._done.get(index, []) == self.prompts.get(index, [])

    def pending(self) -> list[int]:
        """The slices that are not filled."""
        slices = self.prompts.keys() | self._done.keys()
        return [index for index in slices if not self.is_filled(index)]

    def mask(self, index: int, model: str) -> np.ndarray:
        """The label map (H, W) uint8 of a slice's boxes, by one of the models."""
        segmenter, prompts = self.segmenters[model], self.prompts.get(index, [])
        if segmenter is self.segmenter and self.is_filled(index):
            return self.labels[index]
        plane = np.zeros(self.image.shape[1:], np.uint8)
        if prompts:
            highest = np.zeros(plane.shape, np.float32)
            logits = segmenter.decode(index, [box.box for box, _ in prompts])
            for (box, _), of_box in zip(prompts, logits, strict=True):
                add_mask(plane, highest, of_box, self.ids[box.label])
        if segmenter is self.segmenter:
            with self._lock:
                self.labels[index], self._done[index] = plane, prompts
        return plane

    def progress(self) -> dict[str, list[int]]:
        """By label: boxes drawn, slices with a box, and those of them that are filled."""
        counts = {label: [0, 0, 0] for label in list(self.ids)}  # another thread may add one
        for box in self.boxes[0]:
            counts[box.label][0] += 1
        for index, prompts in self.prompts.items():
            for label in {box.label for box, _ in prompts}:
                counts[label][1] += 1
                counts[label][2] += self.is_filled(index)
        return counts

    def save(self, path: Path) -> dict:
        """Write the label volume; return what predictions.json says of it."""
        with self._lock:
            labels, done = self.labels.copy(), dict(self._done)
        prompts = [prompt for index in sorted(done) for prompt in done[index]]
        ids = {box.label: self.ids[box.label] for box, _ in prompts}
        write_volume(path, labels, self.image)
        hashes = {"image_sha256": self.image.sha256, "labels_sha256": sha256(path)}
        return {"files": [path.name], **hashes, **record_of(labels, ids, prompts)}

    def restore(self, path: Path) -> None:
        """Take the masks of the present boxes from the label volume that `save` wrote."""
        self.labels, self._done = read_label_map(path).array, dict(self.prompts)


class Session:
    """The scans of one command, one of them open, and the thread that fills in its masks."""

    def __init__(
        self,
        scans: Mapping[str, Path],
        geometry: Mapping[str, Geometry],
        boxes: dict[str, Boxes],
        models: Mapping[str, Segmenter],
        folder: Path,
        record: dict,
        amp: torch.dtype | None,
    ) -> None:
        """`geometry` and `boxes` are by case; `record` is predictions.json."""
        self.scans, self.models, self.folder, self.record = scans, models, folder, record
        self.ids = {name: int(number) for number, name in record["label_names"].items()}
        self.window, self.drawing, self.shown = tuple(record["window_hu"]), None, 0
        self._geometry, self._amp = geometry, amp
        self._boxes: dict[str, Boxes] = {case: boxes.get(case, ([], set())) for case in scans}
        self.problem = ""  # that keeps things from being saved
        self.unsaved = set()  # cases whose label volume is not that of their boxes
        for case in scans:
            prompts = [prompt for of in self._prompts(case).values() for prompt in of]
            if boxes_of(prompts) != record["scans"].get(case, {}).get("boxes", []):
                self.unsaved.add(case)
        self._wake, self._saving = threading.Condition(), threading.Lock()
        self._closing = False
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def open(self, case: str) -> Drawing:
        """Go on with a scan; UserError if it cannot be read, and the last one stays open."""
        if self.drawing is None or self.drawing.case != case:
            image = read_image(self.scans[case])
            check_window(image.array, self.scans[case], self.window)
            segmenters: dict[str, ScanSegmenter] = {}
            for name, model in self.models.items():
                first = next(iter(segmenters.values()), None)
                segmenters[name] = ScanSegmenter(model, image, self.window, self._amp, first)
            drawing = Drawing(case, segmenters, self.ids)
            drawing.boxes, drawing.prompts = self._boxes[case], self._prompts(case)
            path, of_scan = self.folder / f"{case}.nii.gz", self.record["scans"].get(case, {})
            hashes = (image.sha256, sha256(path) if path.is_file() else "")
            kept = (of_scan.get("image_sha256"), of_scan.get("labels_sha256")) == hashes
            if kept and case not in self.unsaved:
                drawing.restore(path)
            elif drawing.prompts:
                self.unsaved.add(case)
            self.drawing = drawing
            self.show(image.shape[0] // 2)
        return self.drawing

    def add_label(self, name: str) -> None:
        """Add a label under the first free id; UserError if it cannot have that name."""
        free = next((n for n in range(1, 256) if n not in self.ids.values()), None)
        if free is None or parse_label("add a label", name).isdecimal():
            raise UserError(f"{name!r}: give a name with a letter in it, to at most 255 labels")
        if name in self.ids:
            raise UserError(f"there is a label {name!r} already")
        self.ids[name] = free
        self.write_record()

    def change(self, boxes: Boxes) -> None:
        """Replace the boxes of the open scan, and write boxes.csv."""
        drawing, case = self.drawing, self.drawing.case
        boxes[0].sort(key=lambda box: (self.ids[box.label], box.index, box.box))
        with self._wake:
            self._boxes[case] = drawing.boxes = boxes
            drawing.prompts = self._prompts(case)
            self.unsaved.add(case)
        try:
            self._write_boxes()
        except UserError as error:
            self.problem = str(error)
            raise
        self.show(self.shown)

    def show(self, index: int) -> None:
        """Let the thread begin with what is around a slice."""
        with self._wake:
            self.shown = index
            self._wake.notify()

    def finish(self) -> None:
        """Wait until all is filled in and saved, or something is in the way of it."""
        self.problem = ""
        while self.unsaved and not self.problem:
            if self.drawing.case not in self.unsaved:
                self.open(next(iter(self.unsaved)))
            self._thread.join(0.2)

    def close(self) -> None:
        """Stop the thread."""
        self._closing = True
        self.show(self.shown)
        self._thread.join()

    def _prompts(self, case: str) -> dict[int, list[Prompt]]:
        boxes, dropped = self._boxes[case]
        return prompts_by_slice(boxes, self.ids, self.record["interpolate"], dropped)

    def _work(self) -> None:
        while not self._closing:
            with self._wake:
                if (task := self._next_task()) is None:
                    self._wake.wait()
                    continue
            try:
                task()
            except Exception as error:  # the page shows it, and it is tried again
                self.problem = str(error)
                if not isinstance(error, UserError):
                    traceback.print_exc()
                with self._wake:
                    self._wake.wait(5)

    def _next_task(self) -> Callable[[], object] | None:
        if (drawing := self.drawing) is None:
            return None
        near = range(max(0, self.shown - AHEAD), min(len(drawing.labels), self.shown + AHEAD + 1))
        for index in sorted(near, key=lambda index: abs(index - self.shown)):
            if not drawing.segmenter.is_encoded(index):
                return partial(drawing.segmenter.encode, index)
        if pending := drawing.pending():
            nearest = min(pending, key=lambda index: abs(index - self.shown))
            return partial(drawing.mask, nearest, drawing.model)
        return partial(self._save, drawing) if drawing.case in self.unsaved else None

    def _save(self, drawing: Drawing) -> None:
        case, boxes = drawing.case, drawing.boxes
        saved = drawing.save(self.folder / f"{case}.nii.gz")
        of_scan = {"image": self.scans[case].name, **saved}
        self.record["scans"] = {**self.record["scans"], case: of_scan}
        self._write_boxes()  # once more: when they were drawn, the disk may have been full
        self.write_record()
        self.problem = ""
        with self._wake:
            if drawing.boxes is boxes:
                self.unsaved.discard(case)

    def write_record(self) -> None:
        """Write predictions.json."""
        with self._saving:
            names = {number: name for name, number in dict(self.ids).items()}
            self.record["label_names"] = {str(number): names[number] for number in sorted(names)}
            path = self.folder / BOXES
            self.record["boxes"] = {BOXES: sha256(path)} if path.is_file() else {}
            write_json(self.folder / RECORD, self.record)

    def _write_boxes(self) -> None:
        with self._saving:
            rows: list[Iterable] = [COLUMNS]
            for case, (boxes, dropped) in self._boxes.items():
                stored = partial(self._geometry[case].from_stored, back=True)
                for box in boxes:
                    corners = np.reshape(box.box, (2, 2))
                    ends = stored(np.insert(corners, 2, box.index, axis=1))
                    (x0, y0, z), (x1, y1, _) = np.sort(ends, axis=0).tolist()
                    rows.append((case, box.label, *(f"{n:g}" for n in (z, x0, y0, x1, y1))))
                for label, index in sorted(dropped) if boxes else ():
                    z = stored(np.array([[0, 0, index]]))[0, 2]
                    rows.append((case, label, f"{z:g}", "", "", "", ""))
            path = self.folder / BOXES
            if len(rows) == 1:
                return path.unlink(missing_ok=True)
            with atomic_write(path, "w") as file:
                csv.writer(file, lineterminator="\n").writerows(rows)
