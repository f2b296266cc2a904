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
from tests.helpers import edit_json, options_for, write_volume
from tests.model.encoders import CountingEncoder
from utils.data.slices import Slice, open_dataset, read_image, read_instances, read_label_map
from utils.data.volumes import read_image as read_volume
from utils.model.checkpoints import read_checkpoint, save_checkpoint
from utils.model.embeddings import Embeddings
from utils.model.segmenter import load_model, save_decoder
from utils.preview import command as preview
from utils.system import files
from utils.system.errors import UserError
from utils.training.runs import find_runs


# --- Truncated and bit-flipped -------------------------------------------------------------------
def damaged_copies(content: bytes, count: int) -> Iterator[bytes]:
    """`content`, truncated in one of four copies and with one flipped bit in the others."""
    rng = np.random.default_rng(0)
    for number in range(count):
        position = int(rng.integers(len(content)))
        if number % 4:
            damaged = bytearray(content)
            damaged[position] ^= 1 << int(rng.integers(8))
            yield bytes(damaged)
        else:
            yield content[:position]


def assert_noticed(
    path: Path, read: Callable[[], object], count: int, tally: Callable, what: str
) -> None:
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
    tally(f"damaged files tried: {what}", count)


def as_numbers(value: object) -> object:
    """A checkpoint's content in a form that compares by ==."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.shape, value.numpy().tobytes()
    if isinstance(value, dict):
        return {key: as_numbers(part) for key, part in value.items()}
    return value


def test_damaged_checkpoint(tmp_path, tally):
    path = tmp_path / "decoder_best.pth"
    content = {"format": "x", "notes": {"epoch": 3}, "weights": torch.arange(500.0)}
    save_checkpoint(path, content)
    assert_noticed(path, lambda: as_numbers(read_checkpoint(path)), 400, tally, "checkpoint")


def test_weights_that_are_not_finite_are_refused(lite_medsam, tmp_path):
    path = tmp_path / "decoder.pth"
    save_decoder(path, lite_medsam)
    content = read_checkpoint(path)
    content["mask_decoder"]["mask_tokens.weight"][0, 0] = torch.nan
    torch.save(content, path)
    with pytest.raises(UserError, match="mask_tokens.weight is not finite"):
        load_model("lite_medsam", path, "cpu")


@pytest.mark.parametrize("name", ["dataset.json", "config.json"])
def test_damaged_json_is_one_line_or_valid(toy_slices, tmp_path, tally, name):
    """A flipped bit that leaves valid JSON of the right types is not noticed: people edit them."""
    if name == "dataset.json":
        shutil.copytree(toy_slices, tmp_path, dirs_exist_ok=True)
    else:
        options = {"policy": "medsam", "model": "lite_medsam", "data": ["a"], "checkpoint": None}
        files.write_json(tmp_path / name, {"options": options})
    path = tmp_path / name
    content, noticed = path.read_bytes(), 0
    for damaged in damaged_copies(content, 400):
        path.write_bytes(damaged)
        try:
            open_dataset(tmp_path) if name == "dataset.json" else files.read_json(path)
            assert len(damaged) >= len(content) - 1  # only the last line end can be missing
        except UserError as error:
            assert name in str(error)
            noticed += 1
    assert noticed > 100  # those that were cut short
    tally(f"damaged files tried: {name}", 400)


def test_damaged_slices(toy_slices, tmp_path, tally):
    shutil.copytree(toy_slices, tmp_path / "toy")
    entry: Slice = open_dataset(tmp_path / "toy").split("train")[0]
    for path, read in (
        (entry.image_path, lambda: read_image(entry.image_path, entry.image_sha256).tobytes()),
        (entry.label_path, lambda: read_instances(entry)[0].tobytes()),
    ):
        assert_noticed(path, read, 100, tally, "slice")


def test_damaged_volume(tmp_path, tally):
    rng = np.random.default_rng(0)
    path = tmp_path / "a.nii.gz"
    write_volume(path, rng.integers(-1000, 1000, (4, 9, 8)).astype(np.int16))

    def read() -> object:
        volume = read_volume(path)
        return volume.array.tobytes(), volume.spacing_mm, volume.origin_mm, volume.direction

    assert_noticed(path, read, 400, tally, "NIfTI")


def test_damaged_embeddings(toy_slices, tmp_path, tally):
    """A file that was cut short, or has another header, is made again by the next run."""
    shutil.copytree(toy_slices, tmp_path / "toy", ignore=shutil.ignore_patterns("embeddings"))
    (sample,) = open_dataset(tmp_path / "toy").split("all")[:1]
    expected = Embeddings(CountingEncoder("a"), [sample])(sample)
    (path,) = (tmp_path / "toy" / "embeddings").rglob("*.npy")
    content = path.read_bytes()
    for damaged in [content[:5000], *damaged_copies(content[:128], 40)]:
        path.write_bytes(damaged + content[128:] if len(damaged) == 128 else damaged)
        assert torch.equal(Embeddings(CountingEncoder("a"), [sample])(sample), expected)
        assert path.read_bytes() == content
        tally("damaged files tried: embeddings")


# --- Hostile: nothing is executed ----------------------------------------------------------------
class Malicious:
    """Leaves a file behind when it is unpickled."""

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
    return paths


def test_hostile_files_would_do_harm_if_they_were_trusted(tmp_path):
    for path in hostile_checkpoints(tmp_path / "left", tmp_path):
        plain = path.stem == "pickle"
        pickle.loads(path.read_bytes()) if plain else torch.load(path, weights_only=False)
        (tmp_path / "left").rmdir()


def test_hostile_checkpoints_are_refused_everywhere(fails, toy_slices, tmp_path, tally):
    left, run = tmp_path / "left", tmp_path / "work" / "run"
    train, evaluate, data = train_adaptive.main, evaluation.main, ("--data", toy_slices)
    work = ("--work-dir", run.parent, "--run", "run")
    train([*map(str, (*work, *data, "--epochs", 1, "--device", "cpu"))])
    for path in hostile_checkpoints(left, tmp_path):
        with pytest.raises(UserError, match="damaged or not a checkpoint"):
            read_checkpoint(path)
        start = ("--checkpoint", path, "--work-dir", tmp_path / "new")
        assert path.name in fails(train, *data, *start)
        models = ("--models", f"lite_medsam:{path}", "--out", tmp_path)
        assert path.name in fails(evaluate, *data, *models)
        for name, command in (
            ("checkpoint_last.pth", (train, *work, "--resume")),
            ("decoder_best.pth", (evaluate, "--runs", run, "--out", tmp_path / "out")),
        ):
            kept = (run / name).read_bytes()
            shutil.copy(path, run / name)
            assert name in fails(*command)
            (run / name).write_bytes(kept)
        tally("hostile files tried", 5)
    assert not left.exists()


@pytest.mark.parametrize("kind", ["object array", "archive", "pickle", "header"])
def test_hostile_arrays_are_refused(fails, toy_slices, tmp_path, tally, kind):
    left, path = tmp_path / "left", tmp_path / "a.npy"
    array = np.array([Malicious(left)], object)
    if kind == "object array":
        np.save(path, array, allow_pickle=True)
    elif kind == "archive":
        with open(path, "wb") as file:
            np.savez(file, a=array)
    elif kind == "pickle":
        path.write_bytes(pickle.dumps(array))
    else:
        memory = io.BytesIO()
        np.save(memory, np.zeros(3))
        header = memory.getvalue()
        path.write_bytes(header.replace(b"'<f8'", b"'|O' ")[:64] + header[64:])
    shutil.copytree(toy_slices, tmp_path / "toy", ignore=shutil.ignore_patterns("embeddings"))
    entry = open_dataset(tmp_path / "toy").split("train")[0]
    for read in (read_image, read_label_map):
        with pytest.raises(UserError, match="a.npy: damaged or not a NumPy array"):
            read(path)
    for target in (entry.image_path, entry.label_path):
        kept = target.read_bytes()
        shutil.copy(path, target)
        arguments = ["--data", tmp_path / "toy", "--work-dir", tmp_path / "w", "--run", target.stem]
        message = fails(train_adaptive.main, *arguments, "--epochs", 1)
        assert f"{target}: changed or damaged" in message
        shutil.rmtree(tmp_path / "w")
        target.write_bytes(kept)
    assert "a.npy" in fails(preview.main, "--image", path, "--label", path)
    assert not left.exists()
    tally("hostile files tried", 3)


# --- Hostile: nothing is written outside ---------------------------------------------------------
OUTSIDE = ("../x", "..", "/tmp/x", "a/b", "a\\b", "C:x", "", ".", "x\0y", "x\ny")


@pytest.mark.parametrize("name", OUTSIDE)
def test_case_names_that_lead_out_of_the_folder(toy_slices, tmp_path, tally, name):
    shutil.copytree(toy_slices, tmp_path / "toy")
    path = tmp_path / "toy" / "dataset.json"
    edit_json(path, lambda meta: meta["cases"].update({name: meta["cases"].pop("toy_0")}))
    with pytest.raises(UserError, match="dataset.json: damaged .*case name"):
        open_dataset(tmp_path / "toy")
    tally("names that lead out of the folder tried")


@pytest.mark.parametrize("name", [*OUTSIDE, "medsam,../x"])
def test_policies_and_runs_that_lead_out_of_the_folder(fails, toy_slices, tmp_path, tally, name):
    options = vars(options_for(toy_slices, policy=name))
    files.write_json(tmp_path / "run" / "config.json", {"options": options})
    for read in (lambda folder: find_runs([folder]), train_adaptive.stored_options):
        with pytest.raises(UserError, match="unknown policy"):
            read(tmp_path / "run")
    if "\0" not in name and "," not in name:
        arguments = ["--data", toy_slices, "--work-dir", tmp_path / "w", "--run", name]
        assert "--run: a name, not a path" in fails(train_adaptive.main, *arguments)
    assert {path.name for path in tmp_path.iterdir()} == {"run"}
    tally("names that lead out of the folder tried", 2)


def test_links_where_results_go_are_replaced_not_followed(tmp_path):
    (tmp_path / "mine").write_text("mine")
    for name in ("a.json", ".a.json.tmp"):
        (tmp_path / name).symlink_to(tmp_path / "mine")
    files.write_json(tmp_path / "a.json", {"a": 1})
    assert files.read_json(tmp_path / "a.json") == {"a": 1}
    assert (tmp_path / "mine").read_text() == "mine"
    assert not (tmp_path / "a.json").is_symlink()
