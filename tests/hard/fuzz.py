"""Random damage to what users hand over: it is read rightly, or refused in one line.

    python -m tests.hard.fuzz --minutes 10                       all readers in turn
    python -m tests.hard.fuzz --minutes 10 --only dataset volume

Each round takes a good input, changes bytes or the structure inside valid bytes, and reads it. What
is neither a result nor a UserError is a bug: it is shown with the seed that makes it again, and
kept as a test in tests/test_fuzz.py.
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

VALUES = (  # what a damaged or hostile file may hold in place of something else
    *(None, True, False, 0, 1, -1, 255, 256, 1024, 2**31, 2**63, 10**30, -(2**63)),
    *(0.0, -0.0, 0.5, -1.5, 1e-320, 1e308, math.nan, math.inf, -math.inf),
    *("", " ", "0", "01", "-1", "1e3", "..", "../x", "/tmp/x", "a\0b", "é", "\ud800", "x" * 5000),
    *([], [[]], [1], [1, 2], {}, {"": None}, [None] * 9),
)
TENSORS = (
    lambda: torch.zeros(()),
    lambda: torch.full((3,), torch.nan),
    lambda: torch.zeros(0),
    lambda: torch.zeros(2, 3, dtype=torch.int64),
    lambda: torch.zeros(4, dtype=torch.complex64),
    lambda: torch.eye(3).to_sparse(),
    lambda: torch.zeros(1).expand(2**40),
    lambda: torch.ones(2, dtype=torch.bool),
)


# --- Changes -------------------------------------------------------------------------------------
def bytes_changed(content: bytes, rng: np.random.Generator) -> bytes:
    """Some bytes flipped, cut off, inserted, repeated or moved."""
    found = bytearray(content)
    for _ in range(rng.integers(1, 5)):
        at, more = (int(n) for n in rng.integers(0, len(found) + 1, 2))
        kind = rng.integers(7)
        if kind < 3 and at < len(found):
            found[at] ^= 1 << int(rng.integers(8))
        elif kind == 3:
            del found[at:]
        elif kind == 4:
            found[at:at] = rng.bytes(int(rng.integers(1, 20)))
        elif kind == 5:
            del found[min(at, more) : min(at, more) + int(rng.integers(1, 200))]
        else:
            found[at:at] = found[more : more + 100]
    return bytes(found)


def structure_changed(value: object, rng: np.random.Generator, others: tuple = ()) -> object:
    """A copy in which some entries, anywhere in it, are replaced, removed, added or swapped."""
    root = [copy.deepcopy(value)]
    for _ in range(rng.integers(1, 4)):
        holder: list | dict = root
        key: object = 0
        while isinstance(holder[key], (dict, list)) and len(holder[key]) and rng.random() < 0.85:
            holder = holder[key]
            keys = list(holder) if isinstance(holder, dict) else range(len(holder))
            key = keys[int(rng.integers(len(keys)))]
        choices = (*VALUES, *others)
        new = choices[int(rng.integers(len(choices)))]
        new = new() if callable(new) else copy.deepcopy(new)
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
    """A folder of slices: dataset.json, slices, and what training and evaluation make of them."""

    def __init__(self, folder: Path) -> None:
        from preprocess_ct import preprocess
        from tests.helpers import TOY_NAMES, write_cases

        write_cases(folder / "ct", 3)
        self.folder = folder / "toy"
        where = (folder / "ct" / "images", folder / "ct" / "labels", self.folder)
        preprocess(*where, label_names=TOY_NAMES, split=(0.4, 0.3, 0.3), workers=1)
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
            meta = structure_changed(json.loads(self.good) | {"sha256": "edited"}, rng)
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

        from preprocess_ct import preprocess
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
                at = int(rng.choice([*range(40, 56, 2), 70, 72, 252, 254]))
                struct.pack_into("<h", content, at, int(rng.integers(-(2**15), 2**15)))
        else:
            for _ in range(rng.integers(1, 4)):
                at = int(rng.choice([*range(76, 120, 4), *range(256, 328, 4)]))
                numbers = [v for v in VALUES if type(v) is float and abs(v) < 1e38 or v != v]
                struct.pack_into("<f", content, at, numbers[int(rng.integers(len(numbers)))])
        stored = bytes(content) if rng.random() < 0.3 else gzip.compress(bytes(content), 1)
        if rng.random() < 0.2:
            stored = bytes_changed(stored, rng)
        self.paths[which].write_bytes(stored)
        try:
            preprocess(self.folder / "images", self.folder / "labels", self.out, workers=1)
            open_dataset(self.out)
        finally:
            shutil.rmtree(self.out, ignore_errors=True)
            for path, good in zip(self.paths, self.good, strict=True):
                path.write_bytes(gzip.compress(good, 1))


class Checkpoint:
    """A decoder and the checkpoint of a run."""

    def __init__(self, folder: Path) -> None:
        from utils.model.segmenter import load_model, save_decoder

        self.path = folder / "decoder_best.pth"
        self.model = load_model("lite_medsam", None, "cpu")
        save_decoder(self.path, self.model, epoch=1)
        self.decoder = torch.load(self.path, weights_only=True)
        trainer = self.trainer()
        parameters = trainer._optimizer.param_groups[0]["params"]
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        trainer._optimizer.step()
        trainer.end_epoch({"epoch": 0, "val_loss": 1.0, "skipped_steps": 0})
        trainer.at["epoch"] = 1
        self.last = copy.deepcopy(trainer.state())
        # The structure without the weights' bulk, which deepcopy would copy in every round.
        self.shared = {"mask_decoder": self.last.pop("mask_decoder")}

    def trainer(self):
        from utils.training.trainer import Trainer

        settings = {"lr": 1e-4, "weight_decay": 0.01, "factor": 0.1, "patience": 2, "amp": None}
        return Trainer(self.model, None, boxes_per_call=16, **settings)

    def round(self, rng: np.random.Generator) -> None:
        from utils.model.checkpoints import load_state, read_checkpoint
        from utils.training.trainer import Trainer

        kind = rng.integers(3)
        memory = io.BytesIO()
        if kind == 0:
            small = {key: v for key, v in self.decoder.items() if key != "mask_decoder"}
            torch.save(small | {"mask_decoder": {"a": torch.arange(9.0)}}, memory)
            self.path.write_bytes(bytes_changed(memory.getvalue(), rng))
            read_checkpoint(self.path)
        elif kind == 1:
            content = structure_changed(self.decoder, rng, TENSORS)
            torch.save(content, self.path)
            content = read_checkpoint(self.path)
            load_state(self.model.mask_decoder, content.get("mask_decoder"), self.path, "x")
        else:
            content = structure_changed(self.last, rng, TENSORS)
            if isinstance(content, dict) and rng.random() < 0.9:
                content = content | self.shared
            torch.save(content, self.path)
            content = read_checkpoint(self.path)
            if content.keys() >= Trainer.STATE:
                trainer = self.trainer()
                trainer.load_state(content)
                trainer.state()
                trainer.skipped, trainer.look(), trainer.train_loss


READERS: dict[str, Callable] = {"dataset": Dataset, "volume": Volume, "checkpoint": Checkpoint}


def attempt(reader: object, seed: int) -> bool:
    """One round; whether the input was refused in one line. Anything else is passed on."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            reader.round(np.random.default_rng(seed))
    except UserError:
        return True
    return False


def main() -> None:
    """Rounds until the time is over; exit status 1 if a bug was found."""
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
