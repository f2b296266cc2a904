"""The embedding cache: filled once, resumed, repaired, and never used for anything else."""

import errno
import hashlib
import os
import shutil
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.model.encoders import CountingEncoder, SmallGPU
from utils.data.frame import Frame
from utils.data.slices import open_dataset, read_image
from utils.model.embeddings import ROW, EmbeddingCache, close_to_fp32, encode_all, open_embeddings
from utils.system.errors import UserError


@pytest.fixture
def dataset(toy_slices, tmp_path):
    """The toy slices without embeddings."""
    shutil.copytree(toy_slices, tmp_path / "toy", ignore=shutil.ignore_patterns("embeddings"))
    return open_dataset(tmp_path / "toy")


def expected(entry) -> np.ndarray:
    """CountingEncoder's embedding of a slice."""
    image = torch.from_numpy(read_image(entry.image_path))
    return CountingEncoder("").encode(image[None], None)[0].half().numpy()


def filled(dataset, slices, model) -> EmbeddingCache:
    cache = EmbeddingCache(dataset, model)
    cache.fill(slices)
    return cache


def test_slices_are_encoded_once(dataset):
    train, every = dataset.split("train"), dataset.split("all")
    model = CountingEncoder("a")
    cache = filled(dataset, train, model)
    assert model.calls == len(train)
    again = filled(dataset, every, model)  # another run on the same data
    assert model.calls == len(every)
    for entry in every:
        assert again.get(entry).dtype == np.float16
        assert np.array_equal(again.get(entry), expected(entry))
    assert np.array_equal(cache.get(every[-1]), expected(every[-1]))  # they share the file


def test_log_file_shows_how_far_encoding_is(dataset, monkeypatch, capsys):
    monkeypatch.setattr("utils.system.progress_bar.LINE_SECONDS", 0)
    train = dataset.split("train")
    filled(dataset, train, CountingEncoder("a"))
    assert f"encoding: {len(train)} of {len(train)} slices, 0 s left\n" in capsys.readouterr().err


def test_cache_is_never_used_for_anything_else(dataset, monkeypatch):
    train = dataset.split("train")

    def calls(dataset=dataset, **changes) -> int:
        model = CountingEncoder("a")
        vars(model).update(changes)
        filled(dataset, train, model)
        return model.calls

    def with_test_slices(**changes):
        changed = [replace(entry, **changes) for entry in dataset.slices["test"]]
        return replace(dataset, slices={**dataset.slices, "test": changed})

    assert calls() == len(train)
    assert calls() == 0
    assert calls(base_sha256="b") == len(train)
    assert calls(name="sam_vit_b") == len(train)  # the same weights, another normalisation
    assert calls(with_test_slices(image_sha256="0" * 64)) == len(train)
    assert calls(with_test_slices(frame=Frame((80, 96), (9, 9)))) == len(train)
    monkeypatch.setattr("utils.model.embeddings.VERSION", 0)
    assert calls() == len(train)


def test_image_that_changed_since_preprocessing_is_not_encoded(dataset):
    entry = replace(dataset.slices["test"][0], image_sha256="0" * 64)
    with pytest.raises(UserError, match=f"{entry.name}.npy: changed or damaged"):
        filled(dataset, [entry], CountingEncoder("a"))


def test_interrupted_encoding_is_resumed(dataset):
    every = dataset.split("all")
    model = CountingEncoder("a")
    encode = model.encode

    def stop_at_the_third(images, frames):
        if model.calls == 2:
            raise KeyboardInterrupt
        return encode(images, frames)

    model.encode = stop_at_the_third
    with pytest.raises(KeyboardInterrupt):
        filled(dataset, every, model)
    model.encode = encode
    cache = filled(dataset, every, model)
    assert model.calls == len(every)
    assert all(np.array_equal(cache.get(entry), expected(entry)) for entry in every)


def test_damaged_row_is_named_and_encoded_again(dataset):
    every = dataset.split("all")
    cache = filled(dataset, every, CountingEncoder("a"))
    with open(cache.path, "r+b") as file:
        file.seek(ROW.itemsize + 1000)
        file.write(b"\xff\x00\xff")
    cache.get(every[0])
    with pytest.raises(UserError, match=f"damaged at slice {every[1].name}"):
        cache.get(every[1])
    model = CountingEncoder("a")
    repaired = filled(dataset, every, model)
    assert model.calls == 1 and np.array_equal(repaired.get(every[1]), expected(every[1]))
    cache.path.unlink()
    with pytest.raises(UserError, match=f"cannot read slice {every[1].name}: No such file"):
        cache.get(every[1])


def test_files_are_checked_when_they_are_read_for_the_first_time(dataset, monkeypatch):
    """Rows of the cache, and without a cache the images."""
    entries = dataset.split("train")
    checks = []

    class Hashing:
        crc32 = staticmethod(lambda content: checks.append("row") or zlib.crc32(content))
        sha256 = staticmethod(lambda content: checks.append("image") or hashlib.sha256(content))

    model = CountingEncoder("a")
    open_embeddings([dataset], model, entries)
    monkeypatch.setattr("utils.model.embeddings.zlib", Hashing)
    monkeypatch.setattr("utils.data.slices.hashlib", Hashing)
    for cache in (True, False):
        embeddings = open_embeddings([dataset], model, entries, cache=cache)
        for _ in range(2):
            loaded = [embeddings.load(entry) for entry in entries]
    assert checks == ["row"] * len(entries) + ["image"] * len(entries)
    assert np.array_equal(loaded[0], read_image(entries[0].image_path))


def test_every_process_encodes_its_shard(dataset, monkeypatch):
    every = dataset.split("all")
    monkeypatch.setattr("utils.system.distributed.shard", lambda items: items[1::2])
    model = CountingEncoder("a")
    cache = filled(dataset, every, model)
    assert model.calls == len(every) // 2
    assert np.array_equal(cache.get(every[1]), expected(every[1]))
    with pytest.raises(UserError, match=f"damaged at slice {every[0].name}"):
        cache.get(every[0])


def test_disk_that_is_too_small_is_told_before_encoding(dataset, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 1000))
    model = CountingEncoder("a")
    with pytest.raises(UserError, match="16,776,248 of them do not fit"):
        filled(dataset, dataset.split("all"), model)
    assert not model.calls


@pytest.mark.parametrize(("sparse", "rows"), [(True, 6), (False, 0)])
def test_room_that_a_file_already_takes_is_not_asked_for_again(
    dataset, monkeypatch, capsys, sparse, rows
):
    """On Windows a file takes the room of all its rows when it is made."""
    every = dataset.split("all")
    filled(dataset, every[:2], CountingEncoder("a"))
    capsys.readouterr()
    monkeypatch.setattr("utils.model.embeddings.SPARSE", sparse)
    free = rows * ROW.itemsize
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, free))
    filled(dataset, every, CountingEncoder("a"))
    assert f"encoding 6 slices with lite_medsam: {free / 2**30:.2f} GiB" in capsys.readouterr().out


def test_room_is_checked_before_a_file_takes_it(dataset, monkeypatch):
    monkeypatch.setattr("utils.model.embeddings.SPARSE", False)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 1000))
    with pytest.raises(UserError, match="16,776,248 of them do not fit"):
        filled(dataset, dataset.split("train"), CountingEncoder("a"))
    assert not list((dataset.folder / "embeddings").iterdir())


@pytest.fixture
def read_only(monkeypatch):
    """A function that makes the disk read-only, for the superuser as well."""

    def opened(path, mode="r", *args, **kwargs):
        if mode != "rb":
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return open(path, mode, *args, **kwargs)

    return lambda: monkeypatch.setattr("utils.model.embeddings.open", opened, raising=False)


def test_complete_cache_on_a_read_only_disk_is_used(dataset, read_only):
    every, model = dataset.split("all"), CountingEncoder("a")
    cache = filled(dataset, every[:2], model)
    before = cache.path.stat()
    read_only()
    embeddings = open_embeddings([dataset], model, every[:2])
    assert np.array_equal(embeddings.load(every[0]), expected(every[0]))
    after = cache.path.stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    with pytest.raises(UserError) as error:  # a slice is missing
        open_embeddings([dataset], model, every)
    assert str(error.value) == (
        f"{cache.path}: cannot write: Read-only file system; name a folder that can be written "
        "with --cache-dir, or use --cache off"
    )
    assert model.calls == 2


def test_damaged_row_on_a_read_only_disk_is_one_line(dataset, read_only):
    (entry,) = dataset.split("val")[:1]
    cache = filled(dataset, [entry], CountingEncoder("a"))
    content = bytearray(cache.path.read_bytes())
    content[cache._offsets[entry.name] + 1000] ^= 1
    cache.path.write_bytes(content)
    read_only()
    with pytest.raises(
        UserError,
        match=rf"damaged at slice {entry.name}, and cannot be written \(Read-only.*--cache-dir",
    ):
        cache.get(entry)
    assert cache.path.read_bytes() == content


def test_cache_dir_serves_several_data_sets(dataset, tmp_path):
    """Also copies of one under another name, whose rows it does not repeat."""
    shutil.copytree(dataset.folder, tmp_path / "copy")
    copy, model = open_dataset(tmp_path / "copy"), CountingEncoder("a")
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    entries = dataset.split("val") + copy.split("val")
    embeddings = open_embeddings([dataset, copy], model, entries, cache_dir=tmp_path / "link")
    assert model.calls == len(dataset.split("val"))
    assert all(np.array_equal(embeddings.load(entry), expected(entry)) for entry in entries)
    assert len(list((tmp_path / "disk").iterdir())) == 1
    assert not (dataset.folder / "embeddings").exists()


@pytest.mark.parametrize("whole", [True, False])
def test_links_are_not_written_through(dataset, tmp_path, whole):
    """Of the folder of embeddings, or of the file in it."""
    cache = EmbeddingCache(dataset, CountingEncoder("a"))
    (tmp_path / "elsewhere").mkdir()
    mine = tmp_path / "elsewhere" / cache.path.name
    mine.write_bytes(b"mine")
    if whole:
        cache.path.parent.symlink_to(mine.parent)
    else:
        cache.path.parent.mkdir()
        cache.path.symlink_to(mine)
    with pytest.raises(UserError, match="a link that leads out of the data's folder"):
        cache.fill(dataset.split("all"))
    assert mine.read_bytes() == b"mine"


def test_embeddings_are_the_same_with_and_without_a_cache(dataset):
    every = dataset.split("all")
    model = CountingEncoder("a")
    cached = open_embeddings([dataset], model, every)
    live = open_embeddings([dataset], model, every, cache=False)
    assert model.calls == len(every)
    assert live.load(every[0]).dtype == torch.uint8 and cached.load(every[0]).shape[0] == 256
    loaded = [[source.load(entry) for entry in every[:2]] for source in (cached, live)]
    both = [s.embed(part, every[:2]) for s, part in zip((cached, live), loaded, strict=True)]
    assert both[0].dtype == torch.float32 and torch.equal(*both)
    assert torch.equal(cached(every[1]), both[0][1])


# --- On a GPU ------------------------------------------------------------------------------------
@pytest.fixture
def half_precision(monkeypatch):
    """Lets torch.autocast("cuda") be entered without a GPU."""

    class Autocast:
        def __init__(self, device, dtype, enabled):
            self.enabled = enabled

        def __enter__(self):
            torch.set_autocast_enabled("cuda", self.enabled)

        def __exit__(self, *_):
            torch.set_autocast_enabled("cuda", False)

    monkeypatch.setattr(torch, "autocast", Autocast)


def test_batches_are_halved_when_memory_runs_out(dataset, half_precision):
    every = dataset.split("all")
    model = SmallGPU("a")
    encoded = list(encode_all(model, every, "fp32"))
    assert [entry for entry, _ in encoded] == every
    assert set(model.batches) == {2} and sum(model.batches) == len(every)
    assert all(np.array_equal(embedding, expected(entry)) for entry, embedding in encoded)


@pytest.mark.parametrize("error", [torch.cuda.OutOfMemoryError("CUDA out of memory"), IndexError()])
def test_errors_that_smaller_batches_do_not_mend_are_passed_on(dataset, half_precision, error):
    def fail(images, frames):
        raise error

    model = SmallGPU("a")
    model.encode = fail
    with pytest.raises(type(error)):
        list(encode_all(model, dataset.split("val"), "fp32"))


@pytest.mark.parametrize(("error", "precision"), [(0.01, "fp16"), (0.05, "fp32")])
def test_half_precision_is_used_while_it_is_close(
    dataset, half_precision, capsys, error, precision
):
    """And the choice is the same when the cache is opened again."""
    every = dataset.split("all")
    model = SmallGPU("a", error)
    for calls in (len(every), 0):
        model.batches.clear()
        open_embeddings([dataset], model, every)
        checks = 2 if calls or precision == "fp32" else 0  # the first slice, in both formats
        assert sum(model.batches) == calls + checks
    assert ("encoding in fp32" in capsys.readouterr().out) == (precision == "fp32")


def test_fp32_that_does_not_fit_the_gpu_is_computed_on_the_cpu_for_comparison(
    dataset, half_precision, capsys, monkeypatch
):
    """And the encoder is brought back to the GPU."""
    model, moves = SmallGPU("a"), []
    encode = model.encode

    def small(images, frames):
        if moves[-1:] != ["cpu"] and not torch.is_autocast_enabled("cuda"):
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return encode(images, frames)

    model.encode = small
    monkeypatch.setattr(model.image_encoder, "cpu", lambda: moves.append("cpu"))
    monkeypatch.setattr(model.image_encoder, "to", lambda device: moves.append(device.type))
    assert close_to_fp32(model, dataset, "fp16") and moves == ["cpu", "cuda"]
    assert capsys.readouterr().out == (
        "fp32 encoding does not fit the GPU's memory: fp16 is compared with the CPU's\n"
    )
    model.error = 0.05
    assert not close_to_fp32(model, dataset, "fp16")
