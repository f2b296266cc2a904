"""Damaged and hostile files: noticed and named, never used silently, never executed."""

import io
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import eval as evaluation
import train_adaptive
from tests.helpers import call, write_volume
from utils.data.slices import open_dataset, read_image, read_instances, read_label_map
from utils.data.volumes import read_image as read_volume
from utils.model.checkpoints import read_checkpoint, save_checkpoint
from utils.model.segmenter import load_model, save_decoder
from utils.system import UserError, files
from utils.training.runs import find_runs


def damaged_copies(content: bytes, count: int) -> Iterator[bytes]:
    """`content`, truncated in one of four copies and with one flipped bit in the others."""
    rng = np.random.default_rng(0)
    for number in range(count):
        position = int(rng.integers(len(content)))
        damaged = bytearray(content)
        damaged[position] ^= 1 << int(rng.integers(8))
        yield bytes(damaged) if number % 4 else content[:position]


def assert_noticed(path: Path, read: Callable[[], object], count: int) -> None:
    """Damage a file in many ways: reading gives the original content or one line that names it."""
    content, expected = path.read_bytes(), read()
    noticed = 0
    for damaged in damaged_copies(content, count):
        path.write_bytes(damaged)
        try:
            assert read() == expected
        except UserError as error:
            assert path.name in str(error)
            noticed += 1
    path.write_bytes(content)
    assert noticed > count / 2


def test_damaged_checkpoint(tmp_path):
    def read() -> object:
        content = read_checkpoint(path)
        return content | {"weights": content["weights"].numpy().tobytes()}

    path = tmp_path / "decoder_best.pth"
    content = {"format": "x", "notes": {"epoch": 3}, "weights": torch.arange(500.0)}
    save_checkpoint(path, content)
    assert_noticed(path, read, 400)


def test_damaged_slices(fresh_slices):
    one = open_dataset(fresh_slices).split("train")[0]
    image, digest = one.image_path, one.image_sha256
    assert_noticed(image, lambda: read_image(image, digest).tobytes(), 100)
    assert_noticed(one.label_path, lambda: read_instances(one)[0].tobytes(), 100)


def test_damaged_volume(tmp_path):
    def read() -> object:
        volume = read_volume(path)
        return volume.array.tobytes(), volume.spacing_mm, volume.origin_mm, volume.direction

    rng, path = np.random.default_rng(0), tmp_path / "a.nii.gz"
    write_volume(path, rng.integers(-1000, 1000, (4, 9, 8)).astype(np.int16))
    assert_noticed(path, read, 400)


def test_weights_that_are_not_finite_are_refused(lite_medsam, tmp_path):
    path = tmp_path / "decoder.pth"
    save_decoder(path, lite_medsam)
    content = read_checkpoint(path)
    content["mask_decoder"]["mask_tokens.weight"][0, 0] = torch.nan
    torch.save(content, path)
    with pytest.raises(UserError, match="mask_tokens.weight is not finite"):
        load_model("lite_medsam", path, "cpu")


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def hostile_checkpoints(left: Path, folder: Path) -> list[Path]:
    """Checkpoints of the new and the old format, and a plain pickle."""
    paths = [folder / f"{name}.pth" for name in ("zip", "legacy", "pickle")]
    torch.save({"model": Malicious(left)}, paths[0])
    torch.save({"model": Malicious(left)}, paths[1], _use_new_zipfile_serialization=False)
    paths[2].write_bytes(pickle.dumps(Malicious(left)))
    for path in paths[:2]:  # they would do harm if they were trusted
        torch.load(path, weights_only=False)
        left.rmdir()
    return paths


def test_hostile_checkpoints_are_refused_everywhere(fails, toy_slices, tmp_path):
    left, run = tmp_path / "left", tmp_path / "work" / "run"
    data = ("--data", toy_slices, "--device", "cpu")
    work = ("--work-dir", run.parent, "--run", "run")
    call(train_adaptive, *work, *data, "--epochs", 1)
    for path in hostile_checkpoints(left, tmp_path):
        start = ("--checkpoint", path, "--work-dir", tmp_path / "new")
        assert path.name in fails(train_adaptive, *data, *start)
        models = ("--models", f"lite_medsam:{path}", "--out", tmp_path / "out")
        assert path.name in fails(evaluation, *data, *models)
        for name, command in (
            ("checkpoint_last.pth", (train_adaptive, *work, "--resume")),
            ("decoder_best.pth", (evaluation, "--runs", run, "--out", tmp_path / "out")),
        ):
            kept = (run / name).read_bytes()
            shutil.copy(path, run / name)
            assert name in fails(*command)
            (run / name).write_bytes(kept)
    assert not left.exists()


def test_hostile_arrays_are_refused(fails, fresh_slices, tmp_path):
    left, path = tmp_path / "left", tmp_path / "a.npy"
    array, files = np.array([Malicious(left)], object), [io.BytesIO() for _ in range(4)]
    np.save(files[0], array, allow_pickle=True)
    np.savez(files[1], a=array)
    files[2].write(pickle.dumps(array))
    np.save(files[3], np.zeros(3))  # with a header that lies
    for file in files:
        path.write_bytes(file.getvalue().replace(b"'<f8'", b"'|O' "))
        for read in (read_image, read_label_map):
            with pytest.raises(UserError, match="a.npy: damaged or not a NumPy array"):
                read(path)
    target = open_dataset(fresh_slices).split("train")[0].label_path
    shutil.copy(path, target)
    words = ("--data", fresh_slices, "--work-dir", tmp_path / "w", "--device", "cpu")
    assert f"{target}: changed or damaged" in fails(train_adaptive, *words)
    assert not left.exists()


OUTSIDE = ("../x", "..", "/tmp/x", "a/b", "a\\b", "C:x", "", ".", "x\0y", "x\ny")


def test_case_names_that_lead_out_of_the_folder(fresh_slices):
    meta = files.read_json(fresh_slices / "dataset.json")
    for name in OUTSIDE:
        cases = {name if case == "toy_0" else case: one for case, one in meta["cases"].items()}
        files.write_json(fresh_slices / "dataset.json", meta | {"cases": cases})
        with pytest.raises(UserError, match="dataset.json: damaged .*case name"):
            open_dataset(fresh_slices)


def test_policies_and_runs_that_lead_out_of_the_folder(fails, toy_slices, tmp_path):
    for name in (*OUTSIDE, "medsam,../x"):
        files.write_json(tmp_path / "run" / "config.json", {"options": {"policy": name}})
        with pytest.raises(UserError):
            find_runs([tmp_path / "run"])
        if "\0" not in name and "," not in name:
            words = ("--data", toy_slices, "--work-dir", tmp_path / "w", "--run", name)
            assert "--run: expected a name, not a path" in fails(train_adaptive, *words)
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


def test_links_where_results_go_are_replaced_not_followed(tmp_path):
    (tmp_path / "mine").write_text("mine")
    for name in ("a.json", ".a.json.tmp"):
        (tmp_path / name).symlink_to(tmp_path / "mine")
    files.write_json(tmp_path / "a.json", {"a": 1})
    assert (tmp_path / "mine").read_text() == "mine"
    assert not (tmp_path / "a.json").is_symlink()
