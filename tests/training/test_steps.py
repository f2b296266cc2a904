"""Speed must not change results: steps in parts, batches, processes, caches, number formats."""

import copy
import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

import perturb
import train_adaptive
import utils.model.segmenter
from tests.test_train_adaptive import options_for, results
from utils.data.slices import open_dataset, read_label_map
from utils.model.embeddings import open_embeddings
from utils.model.segmenter import load_model
from utils.system.device import explain_out_of_memory, keep_freed_memory
from utils.system.errors import UserError
from utils.training.batches import Batch, as_shares, load_batch, targets_of
from utils.training.losses import resize_logits, segmentation_loss
from utils.training.trainer import Trainer, dsc_of

ROOT = Path(__file__).resolve().parents[2]


def perturbed(entry, tight):
    rng = perturb.box_rng(0, entry.key)
    return perturb.perturb(tight, "adaptive", rng)


@pytest.fixture
def material(toy_slices):
    """A function to a trainer of fresh LiteMedSAM weights and a batch of slices of two boxes."""
    dataset = open_dataset(toy_slices)

    def make(resolution: int = 256, slices: int = 3, **changes) -> tuple:
        entries = dataset.split("train")[:slices]
        model = load_model("lite_medsam", None, "cpu")
        embeddings = open_embeddings([dataset], model, entries)
        options = {"lr": 1e-4, "weight_decay": 0.01, "factor": 0.1, "patience": 2, "amp": None}
        trainer = Trainer(model, embeddings, **options | {"boxes_per_call": 16} | changes)
        return trainer, load_batch(entries, embeddings, resolution, perturbed)

    return make


def weights_after(trainer, batch, steps: int = 2) -> torch.Tensor:
    for _ in range(steps):
        trainer.step(batch, sum(map(len, batch.boxes)))
    state = trainer.state()["mask_decoder"]
    return torch.cat([value.flatten() for value in state.values()])


def losses(folder: Path) -> list[float]:
    log = results(folder)["log"]
    return [float(row[name]) for row in log[1:] for name in ("train_loss", "val_loss")]


# --- The same results ----------------------------------------------------------------------------
def test_training_with_segment_anythings_own_decoder_has_the_same_losses(
    toy_slices, tmp_path, monkeypatch
):
    def theirs(decoder, images, position, prompts, counts):
        found = [
            decoder(
                image_embeddings=image[None],
                image_pe=position,
                sparse_prompt_embeddings=part,
                dense_prompt_embeddings=torch.zeros(len(part), *image.shape),
                multimask_output=False,
            )[0][:, 0]
            for image, part in zip(images, prompts.split(counts), strict=True)
        ]
        return torch.cat(found)

    for name in ("ours", "theirs"):
        if name == "theirs":
            monkeypatch.setattr(utils.model.segmenter, "mask_logits", theirs)
        train_adaptive.train(options_for(toy_slices, epochs=3), tmp_path / name)
    assert losses(tmp_path / "ours") == pytest.approx(losses(tmp_path / "theirs"), rel=1e-3)


def test_boxes_per_call_do_not_change_a_step(material):
    together = weights_after(*material())
    for most in (1, 4):
        apart = weights_after(*material(boxes_per_call=most))
        # AdamW's first steps are the signs of gradients: rounding may turn a tiny one around.
        assert (apart - together).abs().mean() < 1e-7


def test_several_slices_in_a_step_are_the_mean_over_their_boxes(material):
    trainer, batch = material()
    trainer.step(batch, 6)
    found = {name: p.grad for name, p in trainer._stateful["mask_decoder"].named_parameters()}
    other, _ = material()
    parts = []
    for n in range(3):
        one = type(batch)(*([getattr(batch, field)[n]] for field in batch.__dataclass_fields__))
        parts += [segmentation_loss(*predict_with_gradient(other, one))]
    torch.cat(parts).mean().backward()
    for name, parameter in other._stateful["mask_decoder"].named_parameters():
        if parameter.grad is not None:
            assert (found[name] - parameter.grad).norm() <= 1e-3 * parameter.grad.norm(), name
    trainer.look()
    assert trainer.train_loss == pytest.approx(torch.cat(parts).mean().item(), rel=1e-5)


def predict_with_gradient(trainer, batch):
    return Trainer.predict.__wrapped__(trainer, batch)


def test_without_a_cache_the_run_is_the_same_bit_for_bit(toy_slices, tmp_path):
    for cache in ("on", "off"):
        train_adaptive.train(options_for(toy_slices, epochs=1, cache=cache), tmp_path / cache)
    on, off = (results(tmp_path / cache) for cache in ("on", "off"))
    assert on["log"] == off["log"]
    assert all(torch.equal(value, off["last"][key]) for key, value in on["last"].items())


def test_loss_at_1024_is_taken_on_the_label_map(material, toy_slices):
    entry = open_dataset(toy_slices).split("train")[0]
    boxes, targets = targets_of(entry, 1024)
    label_map = read_label_map(entry.label_path)
    for label, target in zip((1, 2), targets, strict=True):
        assert (target == (label_map == label)).all()
    trainer, batch = material(1024)
    logits, shares = trainer.predict(batch)
    assert logits.shape == shares.shape == (6, 1024, 1024) and set(shares.unique().tolist()) == {
        0,
        1,
    }
    small, _ = material()[0].predict(material()[1])
    assert torch.equal(logits, F.interpolate(small[None], (1024, 1024), mode="bilinear")[0])
    assert resize_logits(small, 256) is small


def test_dsc_on_the_device_is_the_metrics(material):
    from utils.evaluation.metrics import dsc

    trainer, batch = material()
    logits, targets = trainer.predict(batch)
    logits[0] = -1
    expected = [
        dsc(mask, target)
        for mask, target in zip((logits > 0).numpy(), (targets >= 0.5).numpy(), strict=True)
    ]
    assert dsc_of(logits, targets).tolist() == pytest.approx(expected) and expected[0] == 0
    nothing = torch.zeros(1, 4, 4)
    assert dsc_of(nothing - 1, nothing).tolist() == [1.0]


# --- Nothing waits -------------------------------------------------------------------------------
class Waits(TorchFunctionMode):
    """Counts what a GPU would have to be waited for: a tensor's value asked for by Python."""

    NAMES = {"item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__float__", "__int__"}
    NAMES |= {"__index__", "argwhere", "masked_select", "unique", "equal", "allclose"}
    count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.count += getattr(function, "__name__", "") in self.NAMES
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("amp", [None, torch.float16])
def test_no_step_waits_for_the_device(material, amp):
    trainer, batch = material(amp=amp, boxes_per_call=1, slices=1)
    with Waits() as waits:
        trainer.step(batch, 2)
    assert waits.count == 0
    with Waits() as waits:
        trainer.look()
    assert waits.count > 0  # the counter counts


def test_everything_is_brought_to_the_gpu(toy_slices):
    """Tensors without storage that say they are on a GPU: to meet one on the CPU is an error."""
    model = load_model("lite_medsam", None, "cpu")
    entry = open_dataset(toy_slices).split("train")[0]
    image = torch.from_numpy(np.load(entry.image_path))[None]
    tight, targets = targets_of(entry, 1024)
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in model.modules():
            for name, value in module._parameters.items():
                if value is not None:
                    there = torch.empty(value.shape, dtype=value.dtype, device="cuda")
                    module._parameters[name] = torch.nn.Parameter(there, value.requires_grad)
            for name, value in module._buffers.items():
                there = torch.empty(value.shape, dtype=value.dtype, device="cuda")
                module._buffers[name] = there
        embedding = model.encode(image, [entry.frame])
        trainer = Trainer(
            *(model, Given(embedding)),
            **{"lr": 1e-4, "weight_decay": 0.01, "factor": 0.1, "patience": 2, "amp": None},
            boxes_per_call=16,
        )
        batch = Batch([entry], [None], [tight], [torch.from_numpy(targets)])
        logits, shares = trainer.predict(batch)
        masks = entry.frame.logits_to_native(logits)
        losses, scores = segmentation_loss(logits, shares), dsc_of(logits, shares)
        assert {each.device.type for each in (losses, scores, masks)} == {"cuda"}
        with pytest.raises(RuntimeError, match="same device"):
            segmentation_loss(logits, torch.from_numpy(targets))


class Given:
    """Embeddings that are there already."""

    def __init__(self, embeddings: torch.Tensor) -> None:
        self._embeddings = embeddings

    def embed(self, loaded, entries):
        return self._embeddings


# --- Mixed precision with a gradient scaler, on a CPU --------------------------------------------
def test_scaler_skips_a_step_that_is_not_finite_and_goes_on(material):
    trainer, batch = material(amp=torch.float16, slices=1)
    trainer._scaler.load_state_dict({**trainer._scaler.state_dict(), "scale": 2.0**40})
    before = trainer.state()["mask_decoder"]["mask_tokens.weight"].clone()
    trainer.step(batch, 2)
    assert torch.equal(trainer.state()["mask_decoder"]["mask_tokens.weight"], before)
    assert trainer._scaler.get_scale() == 2.0**39
    assert trainer.look() is None and trainer.skipped == 1
    trainer._scaler.update(1024.0)
    trainer.step(batch, 2)
    changed = trainer.state()["mask_decoder"]["mask_tokens.weight"]
    assert changed.isfinite().all() and not torch.equal(changed, before)


def test_skipped_steps_are_counted_over_epochs_and_checkpoints(material):
    trainer, batch = material(amp=torch.float16)
    row = {"epoch": 0, "val_loss": 1.0, "skipped_steps": 0}
    trainer.history.append(row)
    for epoch, overflows in ((1, [True, False]), (2, [True])):
        for overflow in overflows:
            scale = {"scale": 2.0**40 if overflow else 1024.0}
            trainer._scaler.load_state_dict(trainer._scaler.state_dict() | scale)
            trainer.step(batch, 2)
        assert trainer.look() is None
        assert trainer.skipped == sum(overflows)
        kept = copy.deepcopy(trainer.state())
        trainer, _ = material(amp=torch.float16)
        trainer.load_state(kept)
        assert trainer.skipped == sum(overflows)
        trainer.end_epoch({"epoch": epoch, "val_loss": 1.0, "skipped_steps": trainer.skipped})


def test_series_of_bad_steps_begins_after_the_last_good_one(material):
    """An overflow of the first step, which half precision often has, is not what is to blame."""
    trainer, batch = material(amp=torch.float16)
    for scale in (2.0**40, 1024.0):
        trainer._scaler.load_state_dict(trainer._scaler.state_dict() | {"scale": scale})
        trainer.step(batch, 2)
    with torch.no_grad():
        trainer._stateful["mask_decoder"].mask_tokens.weight.fill_(torch.nan)
    trainer._scaler.update(2.0**-14)
    trainer.step(batch, 2)
    assert trainer.look() == 2


def test_gradients_that_are_never_finite_are_told_in_half_precision_too(material):
    trainer, batch = material(amp=torch.float16)
    with torch.no_grad():
        trainer._stateful["mask_decoder"].mask_tokens.weight.fill_(torch.nan)
    trainer.step(batch, 2)
    assert trainer.look() is None  # the scale was too large, it seems
    trainer._scaler.update(2.0**-14)
    trainer.step(batch, 2)
    assert trainer.look() == 0 and trainer.skipped == 2


def test_first_step_without_a_loss_is_told_and_changes_nothing(material):
    trainer, batch = material()
    trainer.step(batch, 6)
    assert trainer.look() is None and trainer.at["instances"] == 6
    decoder = trainer._stateful["mask_decoder"]
    with torch.no_grad():
        decoder.mask_tokens.weight.fill_(torch.nan)
    kept = {name: value.clone() for name, value in decoder.state_dict().items()}
    trainer.step(batch, 6)
    trainer.step(batch, 6)
    assert trainer.look() == 1
    assert trainer.at["instances"] == 6 and np.isfinite(trainer.train_loss)
    for name, value in decoder.state_dict().items():
        assert torch.equal(value.nan_to_num(7), kept[name].nan_to_num(7)), name


def test_gradient_that_is_not_finite_is_told_and_changes_nothing(material):
    """Where the loss is finite, and without a scaler of half precision."""
    trainer, batch = material()
    decoder = trainer._stateful["mask_decoder"]
    kept = {name: value.clone() for name, value in decoder.state_dict().items()}
    hook = decoder.mask_tokens.weight.register_hook(lambda gradient: gradient * torch.inf)
    trainer.step(batch, 6)
    hook.remove()
    assert all(torch.equal(value, kept[name]) for name, value in decoder.state_dict().items())
    trainer.step(batch, 6)
    assert trainer.look() == 0 and trainer.skipped == 1


# --- Memory --------------------------------------------------------------------------------------
def test_out_of_memory_names_what_helps(fails, toy_slices, tmp_path, monkeypatch):
    def full(*_, **__):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(Trainer, "step", full)
    options = ("--data", toy_slices, "--work-dir", tmp_path, "--run", "r", "--device", "cpu")
    message = fails(train_adaptive.main, *options, "--loss-resolution", "1024")
    assert "out of memory: in a new run, try --boxes-per-call 8, --loss-resolution 256" in message


def test_only_memory_errors_are_explained():
    with pytest.raises(UserError, match="out of memory: fewer"), explain_out_of_memory("fewer"):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 1 bytes")
    with pytest.raises(RuntimeError, match="other"), explain_out_of_memory("fewer"):
        raise RuntimeError("other")


def test_memory_is_kept_where_glibc_is_and_nothing_happens_elsewhere(monkeypatch):
    asked = []

    class Library:
        def __init__(self, name):
            self.mallopt = lambda *arguments: asked.append(arguments)

    monkeypatch.setattr("ctypes.CDLL", Library)
    monkeypatch.setattr(sys, "platform", "win32")
    keep_freed_memory()
    assert not asked
    monkeypatch.setattr(sys, "platform", "linux")
    keep_freed_memory()
    assert (-4, 0) in asked  # no block gets a mapping of its own, to be given back
    monkeypatch.setattr("ctypes.CDLL", lambda name: object())  # musl has no mallopt
    keep_freed_memory()


def test_peak_memory_is_printed_after_the_first_step(toy_slices, tmp_path, capsys):
    train_adaptive.train(options_for(toy_slices, epochs=2), tmp_path / "run")
    lines = [line for line in capsys.readouterr().out.splitlines() if "peak memory" in line]
    assert len(lines) == 1 and 0 < float(lines[0].split()[-2]) < 50


# --- Several processes ---------------------------------------------------------------------------
def torchrun(processes: int, *command: object) -> str:
    run = launched(processes, *command)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def launched(processes: int, *command: object) -> subprocess.CompletedProcess:
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", processes, "--standalone", "--"]
    return subprocess.run(
        [sys.executable, *map(str, launch if processes > 1 else []), *map(str, command)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_two_processes_are_one_with_the_same_batch(toy_volumes, tmp_path):
    """Three of four slices in the first step, one in the second: a process has none there."""
    from preprocess_ct import preprocess

    for processes in (1, 2):  # each encodes for itself
        data = tmp_path / str(processes) / "toy"
        shares = (0.5, 0.25, 0.25)
        preprocess(toy_volumes / "images", toy_volumes / "labels", data, split=shares, workers=1)
        work = tmp_path / str(processes) / "work"
        options = ("--batch", 3, "--epochs", 2, "--device", "cpu", "--boxes-per-call", 2)
        said = torchrun(
            *(processes, "train_adaptive.py", "--data", data, "--work-dir", work),
            *("--run", "r", *options),
        )
        assert said.count("epoch 2/2") == said.count("next: python") == 1
        said = torchrun(
            *(processes, "eval.py", "--runs", work / "r", "--out", work / "report"),
            *("--shift", "15%", "--no-sweep", "--no-figures", "--device", "cpu"),
        )
        assert said.count("wrote ") == 1
    one, two = (tmp_path / str(n) / "work" for n in (1, 2))
    assert losses(one / "r") == pytest.approx(losses(two / "r"), rel=1e-4)
    # AdamW hides the size of gradients from the losses; its moments do not.
    moments = [
        torch.load(work / "r" / "checkpoint_last.pth", weights_only=True)["optimizer"]["state"]
        for work in (one, two)
    ]
    for key, state in moments[0].items():
        for name in ("exp_avg", "exp_avg_sq"):
            expected, found = state[name], moments[1][key][name]
            assert (found - expected).norm() <= 0.05 * expected.norm(), (key, name)
    rows = []
    for work in (one, two):
        with open(work / "report" / "instances.csv") as file:
            rows.append(list(csv.DictReader(file)))
    names = ("model", "case", "slice", "label", "box", "pixels")
    assert [[r[n] for n in names] for r in rows[0]] == [[r[n] for n in names] for r in rows[1]]
    scores = [np.array([float(row["dsc"]) for row in part]) for part in rows]
    assert np.abs(scores[0] - scores[1]).max() < 0.02 and len(scores[0]) > 10


def test_process_of_several_ends_without_tearing_down_the_interpreter(tmp_path):
    """gloo's threads may hold tensors to the end, and abort where the interpreter goes first."""
    script = tmp_path / "script.py"
    script.write_text(
        f"import atexit, sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from utils.system import command_line as cli, distributed\n"
        "def main():\n"
        "    distributed.init()\n"
        "    atexit.register(lambda: print('torn down'))\n"
        "    print('done', end='')\n"
        "    distributed.barrier()\n"
        "cli.run(main)\n"
    )
    assert torchrun(2, script).count("done") == 2
    assert "torn down" not in torchrun(2, script) and "torn down" in torchrun(1, script)


def test_what_the_first_of_several_processes_refuses_is_told_once(toy_slices, tmp_path):
    """The others leave without a word, not with the traceback of a connection that broke."""
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "notes.txt").write_text("mine")
    script = "train_adaptive.py"
    options = ("--data", toy_slices, "--work-dir", tmp_path, "--run", "r", "--batch", 2)
    for policy in ("adaptive", "medsam,adaptive"):
        run = launched(2, script, *options, "--policy", policy, "--device", "cpu")
        own = re.split("torch[./]distributed[./]elastic", run.stderr)[0]  # then torchrun's report
        assert run.returncode and own.count("error: ") == own.count("already exists") == 1, own
        assert "gloo" not in run.stderr and "Traceback" not in own, run.stderr
    assert [path.name for path in (tmp_path / "r").iterdir()] == ["notes.txt"]


def test_one_gpu_for_several_processes_is_refused(monkeypatch):
    from utils.system import distributed

    monkeypatch.setattr(distributed, "size", lambda: 2)
    with pytest.raises(UserError, match="every process needs its own GPU"):
        distributed.local_device("cuda:1")
    assert distributed.local_device("cpu") == "cpu"
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    assert distributed.shard(range(5)) == range(1, 5, 2)


def test_demo_is_for_one_process(fails, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    message = fails(train_adaptive.main, "--demo", "--work-dir", tmp_path)
    assert "leave out torchrun" in message


def test_targets_are_shares(toy_slices):
    _, targets = targets_of(open_dataset(toy_slices).split("train")[0], 256)
    shares = as_shares(torch.from_numpy(targets))
    assert targets.max() == 16 and shares.max() == 1 and shares.dtype == torch.float32
