"""Random damage to files that users hand over: each is read correctly or refused in one line.

    python -m tests.hard.fuzz --minutes 10                       all readers, one after another
    python -m tests.hard.fuzz --minutes 10 --only dataset volume

Each round takes a good input, changes its bytes or its structure, and reads it. Anything but a
result or a UserError is a bug: it is printed with the seed that reproduces it.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gzip
import io
import json
import math
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from utils.system.errors import UserError

VALUES = (  # replace entries of a good file
    *(None, True, False, 0, 1, -1, 255, 256, 1024, 2**31, 2**63, 10**30, -(2**63)),
    *(0.0, -0.0, 0.5, -1.5, 1e-320, 1e308, math.nan, math.inf, -math.inf),
    *("", " ", "0", "01", "-1", "1e3", "..", "../x", "/tmp/x", "a\0b", "é", "\ud800", "x" * 5000),
    *([], [[]], [1], [1, 2], {}, {"": None}, [None] * 9),
)


# --- Changes -------------------------------------------------------------------------------------
def bytes_changed(content: bytes, rng: np.random.Generator) -> bytes:
    """Some bytes flipped, cut off, inserted, repeated or moved."""
    changed = bytearray(content)
    for _ in range(rng.integers(1, 5)):
        here, there = (int(n) for n in rng.integers(0, len(changed) + 1, 2))
        kind = rng.integers(7)
        if kind < 3 and here < len(changed):
            changed[here] ^= 1 << int(rng.integers(8))
        elif kind == 3:
            del changed[here:]
        elif kind == 4:
            changed[here:here] = rng.bytes(int(rng.integers(1, 20)))
        elif kind == 5:
            del changed[min(here, there) : min(here, there) + int(rng.integers(1, 200))]
        else:
            changed[here:here] = changed[there : there + 100]
    return bytes(changed)


def structure_changed(value: object, rng: np.random.Generator) -> object:
    """A copy in which some entries, anywhere in it, are replaced, removed, added or swapped."""
    root = [copy.deepcopy(value)]
    for _ in range(rng.integers(1, 4)):
        holder: list | dict = root
        key: object = 0
        while isinstance(holder[key], (dict, list)) and len(holder[key]) and rng.random() < 0.85:
            holder = holder[key]
            keys = list(holder) if isinstance(holder, dict) else range(len(holder))
            key = keys[int(rng.integers(len(keys)))]
        new = copy.deepcopy(VALUES[int(rng.integers(len(VALUES)))])
        kind = rng.integers(6)
        if kind < 3 or holder is root:
            holder[key] = new
        elif kind == 3:
            del holder[key]
        elif isinstance(holder, dict):
            name = str(new)[:40] if rng.random() < 0.5 else key
            holder[name] = holder.pop(key) if kind == 4 else copy.deepcopy(holder[key])
        else:
            holder.insert(0, new)
    return root[0]


# --- Readers -------------------------------------------------------------------------------------
class Dataset:
    """A folder of slices, read as training and evaluation read it."""

    def __init__(self, folder: Path) -> None:
        from tests.helpers import TOY_LABELS, preprocess, write_cases

        write_cases(folder / "ct", 3)
        self.folder = folder / "toy"
        more = ("--label-names", TOY_LABELS, "--split", "0.4,0.3,0.3")
        preprocess(folder / "ct", self.folder, *more)
        self.path = self.folder / "dataset.json"
        self.good = self.path.read_bytes()
        self.slice = next((self.folder / "gts").iterdir())
        self.good_slice = self.slice.read_bytes()

    def round(self, rng: np.random.Generator) -> None:
        from utils.data.slices import open_datasets, read_image, read_instances

        kind = rng.integers(3)
        if kind == 0:
            self.path.write_bytes(bytes_changed(self.good, rng))
        elif kind == 1:
            meta = structure_changed(json.loads(self.good), rng)
            self.path.write_text(json.dumps(meta))
        else:
            self.slice.write_bytes(bytes_changed(self.good_slice[:2000], rng))
        try:
            if kind == 2:
                read_image(self.slice)
            (dataset,) = open_datasets([self.folder])
            entry = dataset.split("all")[int(rng.integers(len(dataset.split("all"))))]
            read_image(entry.image_path, entry.image_sha256)
            label_map, _, boxes = read_instances(entry)
            entry.frame.labels_to_native(label_map)
            entry.frame.boxes_to_native(boxes)
        finally:
            self.path.write_bytes(self.good)
            self.slice.write_bytes(self.good_slice)


class Volume:
    """A CT volume and its label map, into slices."""

    def __init__(self, folder: Path) -> None:
        from tests.helpers import toy_case, write_volume

        self.folder = folder
        hu, labels = toy_case(0)
        write_volume(folder / "images" / "a_0000.nii.gz", hu[:, :40, :40])
        write_volume(folder / "labels" / "a.nii.gz", labels[:, :40, :40])
        self.paths = [folder / "images" / "a_0000.nii.gz", folder / "labels" / "a.nii.gz"]
        self.good = [gzip.decompress(path.read_bytes()) for path in self.paths]
        self.out = folder / "out"

    def round(self, rng: np.random.Generator) -> None:
        import shutil

        from tests.helpers import preprocess
        from utils.data.slices import open_dataset

        which = int(rng.integers(2))
        content = bytearray(self.good[which])
        kind = rng.integers(4)
        if kind == 0:
            content = bytes_changed(bytes(content), rng)
        elif kind == 1:
            content[:348] = bytes_changed(bytes(content[:348]), rng)[:348].ljust(348, b"\0")
        elif kind == 2:  # a number in the header that is out of the ordinary
            for _ in range(rng.integers(1, 4)):
                offset = int(rng.choice([*range(40, 56, 2), 70, 72, 252, 254]))
                struct.pack_into("<h", content, offset, int(rng.integers(-(2**15), 2**15)))
        else:
            for _ in range(rng.integers(1, 4)):
                offset = int(rng.choice([*range(76, 120, 4), *range(256, 328, 4)]))
                numbers = [v for v in VALUES if type(v) is float and abs(v) < 1e38 or v != v]
                struct.pack_into("<f", content, offset, numbers[int(rng.integers(len(numbers)))])
        stored = bytes(content) if rng.random() < 0.3 else gzip.compress(bytes(content), 1)
        if rng.random() < 0.2:
            stored = bytes_changed(stored, rng)
        self.paths[which].write_bytes(stored)
        try:
            preprocess(self.folder, self.out)
            open_dataset(self.out)
        finally:
            shutil.rmtree(self.out, ignore_errors=True)
            for path, good in zip(self.paths, self.good, strict=True):
                path.write_bytes(gzip.compress(good, 1))


class Checkpoint:
    """A fine-tuned decoder, as eval.py and training load it."""

    def __init__(self, folder: Path) -> None:
        from utils.model.segmenter import load_model, save_decoder

        self.path = folder / "decoder_best.pth"
        save_decoder(self.path, load_model("lite_medsam", None, "cpu"), epoch=1)
        self.good = self.path.read_bytes()
        self.content = torch.load(self.path, weights_only=True)

    def round(self, rng: np.random.Generator) -> None:
        from utils.model.segmenter import load_model

        if rng.random() < 0.5:
            self.path.write_bytes(bytes_changed(self.good, rng))
        else:
            torch.save(structure_changed(self.content, rng), self.path)
        load_model("lite_medsam", self.path, "cpu")


READERS: dict[str, Callable] = {"dataset": Dataset, "volume": Volume, "checkpoint": Checkpoint}


def attempt(reader: object, seed: int) -> bool:
    """Run one round; whether the input was refused in one line. Other errors are passed on."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            reader.round(np.random.default_rng(seed))
    except UserError:
        return True
    return False


def main() -> None:
    """Run rounds until the time is over; exit status 1 if a bug was found."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=10, help="(default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the first round (default 0)")
    parser.add_argument("--only", nargs="+", choices=READERS, default=list(READERS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    bugs: set[str] = set()
    for name in args.only:
        with tempfile.TemporaryDirectory() as folder:
            reader = READERS[name](Path(folder))
            end = time.monotonic() + 60 * args.minutes / len(args.only)
            rounds = refused = 0
            while time.monotonic() < end:
                try:
                    refused += attempt(reader, args.seed + rounds)
                except Exception as error:
                    where = traceback.extract_tb(error.__traceback__)[-1]
                    bug = f"{type(error).__name__} at {Path(where.filename).name}:{where.lineno}"
                    if bug not in bugs:
                        print(f"--- {name}, seed {args.seed + rounds}: {bug}", flush=True)
                        traceback.print_exc(file=sys.stdout)
                    bugs.add(bug)
                rounds += 1
        print(f"{name}: {rounds:,} rounds, {refused:,} refused in one line", flush=True)
    sys.exit(1 if bugs else 0)


if __name__ == "__main__":
    main()
