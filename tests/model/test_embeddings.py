"""The embedding cache: filled once, resumed, repaired, and never used for anything else."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.model.encoders import CountingEncoder
from utils.data.slices import open_dataset, read_image
from utils.model.embeddings import Embeddings
from utils.system import UserError


@pytest.fixture
def dataset(fresh_slices):
    return open_dataset(fresh_slices)


def expected(sample) -> torch.Tensor:
    """CountingEncoder's embedding of a slice, rounded to float16."""
    image = torch.from_numpy(read_image(sample.image_path))
    return CountingEncoder().encode(image[None], None)[0].half().float()


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_slices_are_encoded_once_into_a_file_each(dataset, capsys):
    train, every, model = dataset.split("train"), dataset.split("all"), CountingEncoder()
    Embeddings(model, train)
    folder, output = dataset.folder / "embeddings" / "lite_medsam-a", capsys.readouterr()
    assert "encoding 4 slices with lite_medsam, once: 0 MiB beside the slices\n" in output.out
    assert model.calls == len(train)
    again = Embeddings(model, every)  # another run on the same data
    assert model.calls == len(every)
    assert {path.name for path in files(folder)} == {f"{s.image_sha256}.npy" for s in every}
    for sample in every:
        assert again.load(sample).dtype == torch.float16
        assert torch.equal(again(sample), expected(sample))


def test_cache_is_never_used_for_anything_else(dataset):
    train = dataset.split("train")
    for made_by in [("a",), ("b",), ("a", "sam_vit_b")]:  # other weights; another normalisation
        for calls in (len(train), 0):
            model = CountingEncoder(*made_by)
            Embeddings(model, train)
            assert model.calls == calls
    changed = replace(train[0], image_sha256="0" * 64)  # by preprocessing again
    for cache in (True, False):
        with pytest.raises(UserError, match=f"{train[0].name}.npy: changed or damaged"):
            Embeddings(model, [changed], cache)(changed)


def test_damaged_file_is_made_again(dataset):
    (sample,), model = dataset.split("val")[:1], CountingEncoder()
    embeddings = Embeddings(model, [sample])
    (path,) = files(dataset.folder / "embeddings")
    whole = path.read_bytes()
    for damaged in (whole[:-1], b"", whole.replace(b"(8, 16, 16)", b"(4, 32, 16)")):
        path.write_bytes(damaged)
        assert torch.equal(Embeddings(model, [sample])(sample), expected(sample))
    assert model.calls == 4
    path.write_bytes(whole[:-1])  # while a run uses it
    with pytest.raises(UserError, match=f"{path.name}: cannot read .*; run again"):
        embeddings.load(sample)


def test_every_process_encodes_its_shard_and_goes_on_after_an_interruption(dataset, monkeypatch):
    every, model = dataset.split("all"), CountingEncoder()
    monkeypatch.setattr("utils.system.distributed.shard", lambda items: items[1::2])

    def stop_after_the_second():
        if model.calls == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr("utils.system.signals.raise_if_pending", stop_after_the_second)
    with pytest.raises(KeyboardInterrupt):
        Embeddings(model, every)
    found = {path.stem for path in files(dataset.folder / "embeddings")}
    assert found == {sample.image_sha256 for sample in every[1:4:2]}
    monkeypatch.undo()
    embeddings = Embeddings(model, every)
    assert model.calls == len(every)
    assert all(torch.equal(embeddings(sample), expected(sample)) for sample in every)


def test_complete_cache_on_a_disk_that_cannot_be_written_is_used(dataset, monkeypatch):
    every, model = dataset.split("all"), CountingEncoder()
    Embeddings(model, every[:2])

    def refuse(*_):
        raise OSError(30, os.strerror(30))

    monkeypatch.setattr(Path, "write_bytes", refuse)
    assert torch.equal(Embeddings(model, every[:2])(every[0]), expected(every[0]))
    with pytest.raises(UserError, match="lite_medsam-a: cannot write: .*; name .* --cache-dir, or"):
        Embeddings(model, every)


def test_cache_dir_serves_several_data_sets(dataset, tmp_path):
    """Slices that they share are encoded once."""
    shutil.copytree(dataset.folder, tmp_path / "copy")
    model, samples = CountingEncoder(), dataset.split("val")
    samples += open_dataset(tmp_path / "copy").split("val")
    embeddings = Embeddings(model, samples, cache_dir=tmp_path / "cache")
    assert 2 * model.calls == 2 * len(files(tmp_path / "cache")) == len(samples)
    assert all(torch.equal(embeddings(sample), expected(sample)) for sample in samples)
    assert not (dataset.folder / "embeddings").exists()


@pytest.mark.parametrize(("error", "ending"), [(0.01, "-fp16"), (0.05, "")])
def test_half_precision_is_used_on_a_gpu_while_it_is_close(
    dataset, monkeypatch, capsys, error, ending
):
    monkeypatch.setattr("utils.model.embeddings.ENCODE_PIXELS", 3 * 256**2)
    every, model = dataset.split("all"), CountingEncoder(device="cuda", error=error)
    Embeddings(model, every)
    assert model.batches == [1, 1, 3, 3, 2]  # the first slice in both formats, then batches
    assert ("would be 5.0% off; encoding in fp32" in capsys.readouterr().out) == (not ending)
    for sample in every:
        folder = dataset.folder / "embeddings" / f"lite_medsam-a{ending}"
        found = np.load(folder / f"{sample.image_sha256}.npy")
        assert np.allclose(found, (1 + 0.01 * bool(ending)) * expected(sample), 2e-3, 1e-6)
    Embeddings(model, every)
    assert sum(model.batches[5:]) == (0 if ending else 2)  # the choice is the same


def test_as_many_stay_on_the_gpu_as_there_is_room_for(dataset, monkeypatch, capsys):
    every, model = dataset.split("all"), CountingEncoder()
    size = expected(every[0]).half().nbytes
    monkeypatch.setattr("utils.model.embeddings.free_gpu_bytes", lambda _: int(2.5 * size / 0.25))
    embeddings = Embeddings(model, every, keep=True)
    assert "embeddings stay on the GPU, up to 0.0 GiB" in capsys.readouterr().out
    for _ in range(2):
        assert all(torch.equal(embeddings(sample), expected(sample)) for sample in every)
    shutil.rmtree(dataset.folder / "embeddings")
    assert all(torch.equal(embeddings(sample), expected(sample)) for sample in every[:2])
    with pytest.raises(UserError, match="cannot read"):
        embeddings(every[2])
