"""Random damage to files that users hand over: each is read correctly or refused in one line.

Anything but a result or a UserError is a bug, and the number of the round reproduces it. FUZZ=100
makes a hundred times as many rounds.
"""

import copy
import gzip
import json
import math
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from tests.helpers import TOY_LABELS, preprocess, toy_case, write_cases, write_volume
from utils.data.slices import open_datasets, read_image, read_instances
from utils.model.segmenter import load_model, save_decoder
from utils.system import UserError

TIMES = int(os.environ.get("FUZZ", 1))
VALUES = (  # replace entries of a good file
    *(None, True, False, 0, 1, -1, 255, 256, 1024, 2**31, 2**63, 10**30, -(2**63)),
    *(0.0, -0.0, 0.5, -1.5, 1e-320, 1e308, math.nan, math.inf, -math.inf),
    *("", " ", "0", "01", "-1", "1e3", "..", "../x", "/tmp/x", "a\0b", "é", "\ud800", "x" * 5000),
    *([], [[]], [1], [1, 2], {}, {"": None}, [None] * 9),
)
FLOATS = [v for v in VALUES if type(v) is float and (abs(v) < 1e38 or math.isnan(v))]


def change_bytes(content: bytes, rng: np.random.Generator) -> bytes:
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


def change_structure(value: object, rng: np.random.Generator) -> object:
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


def was_refused(read: Callable, *arguments: object) -> bool:
    """Whether an input is refused in one line; errors that are bugs are passed on."""
    try:
        read(*arguments)
    except UserError as error:
        assert "\n" not in str(error)
        return True
    return False


def read_dataset(folder: Path, rng: np.random.Generator) -> None:
    """What training and evaluation read of a folder of slices."""
    (dataset,) = open_datasets([folder])
    samples = dataset.split("all")
    sample = samples[int(rng.integers(len(samples)))]
    read_image(sample.image_path, sample.image_sha256)
    label_map, _, boxes = read_instances(sample)
    sample.frame.labels_to_native(label_map)
    sample.frame.boxes_to_native(boxes)


def test_dataset_json_and_slices(tmp_path):
    write_cases(tmp_path / "ct", 3)
    folder, rounds, refused = tmp_path / "toy", 300 * TIMES, 0
    preprocess(tmp_path / "ct", folder, "--label-names", TOY_LABELS)
    path, slice_path = folder / "dataset.json", next((folder / "gts").iterdir())
    good, good_slice = path.read_bytes(), slice_path.read_bytes()
    for seed in range(rounds):
        rng = np.random.default_rng(seed)
        kind = rng.integers(3)
        if kind == 0:
            path.write_bytes(change_bytes(good, rng))
        elif kind == 1:
            path.write_text(json.dumps(change_structure(json.loads(good), rng)))
        else:
            slice_path.write_bytes(change_bytes(good_slice[:2000], rng))
            refused += was_refused(read_image, slice_path)
        refused += kind < 2 and was_refused(read_dataset, folder, rng)
        path.write_bytes(good)
        slice_path.write_bytes(good_slice)
    assert 0.1 < refused / rounds < 1  # some are still good


def change_volume(good: bytes, rng: np.random.Generator) -> bytes:
    """A NIfTI file, compressed or not, with other bytes or with numbers that are unusual."""
    content = bytearray(good)
    kind = rng.integers(4)
    if kind == 0:
        content = bytearray(change_bytes(good, rng))
    elif kind == 1:
        content[:348] = change_bytes(good[:348], rng)[:348].ljust(348, b"\0")
    for _ in range(rng.integers(1, 4) if kind > 1 else 0):
        if kind == 2:
            offset = int(rng.choice([*range(40, 56, 2), 70, 72, 252, 254]))
            struct.pack_into("<h", content, offset, int(rng.integers(-(2**15), 2**15)))
        else:
            offset = int(rng.choice([*range(76, 120, 4), *range(256, 328, 4)]))
            struct.pack_into("<f", content, offset, FLOATS[int(rng.integers(len(FLOATS)))])
    stored = bytes(content) if rng.random() < 0.3 else gzip.compress(bytes(content), 1)
    return change_bytes(stored, rng) if rng.random() < 0.2 else stored


def test_volumes(tmp_path):
    paths = [tmp_path / "images" / "a_0000.nii.gz", tmp_path / "labels" / "a.nii.gz"]
    for path, array in zip(paths, toy_case(0), strict=True):
        write_volume(path, array[:, :40, :40])
    good, rounds, refused = [path.read_bytes() for path in paths], 150 * TIMES, 0
    for seed in range(rounds):
        rng = np.random.default_rng(seed)
        which = int(rng.integers(2))
        paths[which].write_bytes(change_volume(gzip.decompress(good[which]), rng))
        refused += was_refused(preprocess, tmp_path, tmp_path / "out")
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        paths[which].write_bytes(good[which])
    assert 0.1 < refused / rounds < 1  # some are still good


def test_checkpoints(tmp_path, lite_medsam):
    path, rounds, refused = tmp_path / "decoder_best.pth", 40 * TIMES, 0
    save_decoder(path, lite_medsam, epoch=1)
    good, content = path.read_bytes(), torch.load(path, weights_only=True)
    for seed in range(rounds):
        rng = np.random.default_rng(seed)
        if rng.random() < 0.5:
            path.write_bytes(change_bytes(good, rng))
        else:
            torch.save(change_structure(content, rng), path)
        refused += was_refused(load_model, "lite_medsam", path, "cpu")
    assert 0.1 < refused / rounds < 1  # some are still good
