"""Fine-tune the mask decoder of MedSAM, LiteMedSAM or SAM on perturbed boxes.

    python train_adaptive.py --demo                                 synthetic CT, a few minutes
    python train_adaptive.py --data data/flare22 --model medsam_vit_b \\
        --checkpoint work_dir/medsam_vit_b.pth --policy adaptive --run flare22-adaptive
    python train_adaptive.py --run flare22-adaptive --resume        go on with that run
    python train_adaptive.py --data data/flare22 --policy medsam,bidirectional,scaled,adaptive \\
        --run ablation                                              one run a policy

The image encoder and the prompt encoder stay as they are. A step is one slice with all its organs,
each with its own freshly perturbed box. The run's folder, work_dir/<run>/, is described in
utils/runs.py; `decoder_best.pth` in it is what eval.py and --checkpoint take. Several policies
are trained one after another in work_dir/<run>/<policy>/, from the same weights, on the same
embeddings, in the same order and with the same seeds: nothing but the boxes differs.
"""

from __future__ import annotations

import math
import shlex
import shutil
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

import perturb
from utils.cli import Parser, UserError, run

if TYPE_CHECKING:
    import torch

    from utils.models import Segmenter
    from utils.slices import Slice

# --- Defaults of the options ---------------------------------------------------------------------
DEFAULTS = {
    "model": "lite_medsam",
    "checkpoint": None,  # the model's own weights
    # boxes
    "policy": "adaptive",
    "delta_expand": perturb.DELTA_EXPAND,  # px of the 1024 frame
    "epsilon_shrink": perturb.EPSILON_SHRINK,  # px of the 1024 frame
    # optimisation: AdamW and ReduceLROnPlateau, as in the paper
    "epochs": 20,
    "lr": 1e-4,
    "weight_decay": 0.01,  # for lambda of (12); decoupled in AdamW
    "seed": 0,  # of boxes and order
    # machine
    "device": "auto",  # cuda if there is one
    "amp": "auto",  # fp16 on cuda, off on a CPU
}
WORK_DIR = "work_dir"
# --- What has no option --------------------------------------------------------------------------
PLATEAU_PATIENCE = 2  # epochs; torch's default of 10 would hardly act within 20
PLATEAU_FACTOR = 0.1
VALIDATION_SHIFT = perturb.Shift(0.15, "side")  # of the validation's expansion and shrink boxes
VALIDATION_SEED = 20  # the same boxes in every epoch, for every policy and every run
LOGIT_SIZE = 256  # the decoder's own resolution, at which the loss is taken
SAVE_SECONDS = 300  # between two checkpoints within an epoch
DEMO_EPOCHS = 2  # to stay under five minutes on two cores
DEMO_PATIENTS = 12
DEMO_SLICES = 3  # a patient
DEMO_SPLIT = (8 / 12, 2 / 12, 2 / 12)


def main(argv: list[str] | None = None) -> None:
    """The command line: --demo, a new run, or --resume."""
    args = parse_args(argv)
    given = {key: getattr(args, key) for key in (*DEFAULTS, "data") if vars(args)[key] is not None}
    if args.demo:
        if "data" in given or args.run or args.resume:
            raise UserError("--demo makes its own data and run: leave out --data, --run, --resume")
        options = {**DEFAULTS, "epochs": DEMO_EPOCHS, **given}
        check_options(options)
        return demo(options, Path(args.work_dir) / "demo")
    if args.resume:
        from utils.runs import stored_options

        if not args.run:
            raise UserError("--resume: say which run, with --run NAME")
        folder = Path(args.work_dir) / args.run
        options = stored_options(folder, expected={*DEFAULTS, "data"})
        for key, value in given.items():
            if options[key] != value:
                raise UserError(
                    f"{folder}: was started with --{key.replace('_', '-')} {options[key]}, not "
                    f"{value}; resume it without that option, or start a new run"
                )
    else:
        if "data" not in given:
            raise UserError("--data: give the folder(s) of preprocess_ct.py, or try --demo")
        options = {**DEFAULTS, **given}
        name = args.run or f"{datetime.now():%Y%m%d-%H%M%S}-{options['policy']}"
        folder = Path(args.work_dir) / name
    check_options(options)
    train_policies(options, folder, resume=args.resume)
    print(f"next: python eval.py --runs {shlex.quote(str(folder))}")


def train_policies(options: dict, folder: Path, resume: bool = False) -> None:
    """Train the policy of `options`, or several (comma-separated) each in folder/<policy>/.

    Raises:
        UserError: as `train`.
    """
    from utils import runs

    policies = options["policy"].split(",")
    if len(policies) == 1:
        return train(options, folder, resume)
    if not resume:
        clamped_factors(options)
        runs.start_run(folder, options)
    for policy in policies:
        started = (folder / policy / runs.CONFIG).is_file()
        train({**options, "policy": policy}, folder / policy, resume=resume and started)


def train(options: dict, folder: Path, resume: bool = False) -> None:
    """Run, or go on with, the training of `folder` (see utils/runs.py).

    Args:
        options: the keys of DEFAULTS, and "data", a list of folders.
        folder: work_dir/<run>; new or empty unless `resume`.

    Raises:
        UserError: bad input, a folder in use, or a run that is not what it was.
    """
    import torch
    from tqdm import tqdm

    from utils import runs
    from utils.embeddings import cached_embeddings
    from utils.files import sha256
    from utils.losses import segmentation_loss
    from utils.models import choose_device, load_model, save_checkpoint, save_decoder
    from utils.slices import open_datasets

    # Bad input is found before the run's folder is made.
    device = choose_device(options["device"])
    amp_dtype = mixed_precision(options["amp"], device)
    factors = clamped_factors(options)
    datasets = open_datasets(options["data"])
    model = load_model(options["model"], options["checkpoint"], device)
    for dataset in datasets:
        for part in ("train", "val"):
            if not dataset.split(part):
                raise UserError(
                    f"{dataset.folder}: no slice in the {part} split; preprocess with more cases "
                    "or another --split"
                )
    slices = {part: [s for d in datasets for s in d.split(part)] for part in ("train", "val")}
    facts = {  # what must not change between a run's start and its end, beside the options
        "data": {dataset.name: dataset.sha256 for dataset in datasets},
        "base_weights": model.base_sha256,
        "start_weights": sha256(options["checkpoint"] or model.base_path),
        "constants": constants(factors),
        "device": device.type,
        "amp": str(amp_dtype or "off"),
    }
    if resume:
        runs.check_unchanged(folder, **facts)
    else:
        runs.start_run(folder, options, **facts)
    print(
        f"{folder}: {options['model']} on {device}, policy {options['policy']}, "
        f"{len(slices['train'])} training and {len(slices['val'])} validation slices"
    )
    embeddings = cached_embeddings(datasets, model, slices["train"] + slices["val"])

    optimizer = torch.optim.AdamW(
        model.mask_decoder.parameters(), lr=options["lr"], weight_decay=options["weight_decay"]
    )
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, factor=PLATEAU_FACTOR, patience=PLATEAU_PATIENCE
    )
    scaler = torch.amp.GradScaler(device.type, enabled=amp_dtype == torch.float16)
    autocast = torch.autocast(device.type, amp_dtype, enabled=amp_dtype is not None)

    # `at` is the position: the next step to take, and the epoch's running sums up to there.
    at = {"epoch": 1, "step": 0, "loss_sum": 0.0, "instances": 0, "seconds": 0.0}
    history: list[dict] = []
    parts = {
        "mask_decoder": model.mask_decoder,
        "optimizer": optimizer,
        "scheduler": scheduler,
        "scaler": scaler,
    }
    expected = {*parts, "rng", "at", "history"}
    if saved := runs.load_checkpoint(folder, expected) if resume else None:
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        torch.set_rng_state(saved["rng"])
        at, history = saved["at"], saved["history"]
        print(f"going on at epoch {at['epoch']}, step {at['step']}")
    else:
        torch.manual_seed(options["seed"])
        row = {"epoch": 0, "train_loss": math.nan}  # the weights before training
        history.append(row | validate(model, embeddings, slices["val"], autocast))
        history[-1] |= {"lr": options["lr"], "seconds": 0.0}
        print(epoch_line(history[-1], options["epochs"]))

    def save() -> None:
        state = {name: part.state_dict() for name, part in parts.items()}
        state |= {"rng": torch.get_rng_state(), "at": at, "history": history}
        save_checkpoint(folder / runs.LAST, state)

    while at["epoch"] <= options["epochs"]:
        epoch, started, saved_at = at["epoch"], time.monotonic() - at["seconds"], time.monotonic()
        order = perturb.box_rng(options["seed"], "order", epoch).permutation(len(slices["train"]))
        progress = tqdm(order, desc=f"epoch {epoch}", unit="slice", leave=False, disable=None)
        for step, index in enumerate(progress):
            if step < at["step"]:
                continue
            entry = slices["train"][index]
            tight, targets = load_targets(entry)
            rng = perturb.box_rng(options["seed"], "boxes", epoch, entry.key)
            boxes = perturb.perturb(tight, options["policy"], rng, **factors)
            with autocast:
                logits = model.decode(embeddings(entry).to(device), boxes)
            losses = segmentation_loss(logits, targets.to(device))
            loss_sum = losses.sum().item()
            if math.isfinite(loss_sum):
                at["loss_sum"] += loss_sum
                at["instances"] += len(boxes)
            elif not scaler.is_enabled():  # a scaler skips such a step and lowers its scale
                raise UserError(
                    f"{folder}: the loss is {loss_sum} at epoch {epoch}, slice {entry.key}; "
                    "start again with a smaller --lr"
                )
            optimizer.zero_grad(set_to_none=True)
            scaler.scale(losses.mean()).backward()
            scaler.step(optimizer)
            scaler.update()
            at["step"] = step + 1
            at["seconds"] = time.monotonic() - started
            progress.set_postfix(loss=f"{at['loss_sum'] / max(1, at['instances']):.4f}")
            if time.monotonic() - saved_at > SAVE_SECONDS:
                save()
                saved_at = time.monotonic()

        row = {"epoch": epoch, "train_loss": at["loss_sum"] / max(1, at["instances"])}
        row |= validate(model, embeddings, slices["val"], autocast)
        row |= {"lr": optimizer.param_groups[0]["lr"], "seconds": time.monotonic() - started}
        if not math.isfinite(row["val_loss"]):
            raise UserError(
                f"{folder}: the validation loss is {row['val_loss']} after epoch {epoch}; start "
                "again with a smaller --lr or --amp off"
            )
        scheduler.step(row["val_loss"])
        best = min((past["val_loss"] for past in history if past["epoch"] > 0), default=math.inf)
        history.append(row)
        at = {"epoch": epoch + 1, "step": 0, "loss_sum": 0.0, "instances": 0, "seconds": 0.0}
        # The decoder first: a run stopped between the two writes makes the same one again.
        if row["val_loss"] < best:
            save_decoder(
                folder / runs.BEST,
                model,
                epoch=epoch,
                policy=options["policy"],
                val_loss=row["val_loss"],
            )
        save()
        runs.write_log(folder, history)
        print(epoch_line(row, options["epochs"], best=row["val_loss"] < best))
    runs.write_log(folder, history)


def load_targets(entry: Slice) -> tuple[np.ndarray, torch.Tensor]:
    """A slice's tight boxes (K, 4) in the 1024 frame and target masks (K, 256, 256) float32.

    A pixel's target is the share of it that the label covers: the label map is four times as fine
    as the decoder, and small organs do not vanish or jump to whole pixels.

    Raises:
        UserError: the label map is damaged, or holds other labels than dataset.json lists.
    """
    import torch

    from utils.frame import FRAME_SIZE
    from utils.slices import read_labels_of

    label_map = read_labels_of(entry)
    labels, boxes = perturb.tight_boxes(label_map)
    factor = FRAME_SIZE // LOGIT_SIZE
    blocks = label_map.reshape(LOGIT_SIZE, factor, LOGIT_SIZE, factor)
    masks = [(blocks == label).sum(axis=(1, 3), dtype=np.uint8) for label in labels]
    return boxes, torch.from_numpy(np.stack(masks)).float() / factor**2


def validate(
    model: Segmenter,
    embeddings: Callable[[Slice], torch.Tensor],
    slices: list[Slice],
    autocast: torch.autocast,
) -> dict[str, float]:
    """Loss and DSC (at the decoder's resolution) over standard, expansion and shrink boxes.

    The boxes depend on nothing but the slice, so that epochs, policies and runs compare.
    """
    import torch

    from utils.losses import segmentation_loss
    from utils.metrics import dsc

    losses: list[torch.Tensor] = []
    scores: dict[str, list[float]] = {kind: [] for kind in perturb.BOX_KINDS}
    for entry in slices:
        tight, targets = load_targets(entry)
        rng = perturb.box_rng(VALIDATION_SEED, entry.case, entry.index)
        boxes = [
            perturb.shift_boxes(tight, kind, VALIDATION_SHIFT, rng) for kind in perturb.BOX_KINDS
        ]
        with torch.no_grad(), autocast:
            logits = model.decode(embeddings(entry).to(model.device), np.concatenate(boxes))
        for kind, part in zip(perturb.BOX_KINDS, logits.split(len(tight)), strict=True):
            losses.append(segmentation_loss(part, targets.to(model.device)))
            pairs = zip((part > 0).cpu().numpy(), (targets >= 0.5).numpy(), strict=True)
            scores[kind] += [dsc(prediction, target) for prediction, target in pairs]
    means = {f"dsc_{kind}": float(np.mean(values)) for kind, values in scores.items()}
    return {"val_loss": torch.cat(losses).mean().item(), **means}


def demo(options: dict, folder: Path) -> None:
    """The whole path on synthetic CT: make it, preprocess, fine-tune, evaluate before and after."""
    import eval as evaluation
    from preprocess_ct import preprocess
    from utils.models import choose_device, load_model
    from utils.synthetic import write_patients

    started = time.monotonic()
    clamped_factors(options)
    load_model(options["model"], options["checkpoint"], choose_device(options["device"]))
    marker = folder / "SYNTHETIC.txt"
    try:
        if folder.exists() and any(folder.iterdir()) and not marker.exists():
            raise UserError(f"{folder}: is not an earlier demo; choose another --work-dir")
        folder.mkdir(parents=True, exist_ok=True)
        marker.write_text("Made by train_adaptive.py --demo; the next demo empties this folder.\n")
        for earlier in folder.iterdir():
            if earlier.is_dir():
                shutil.rmtree(earlier)
    except OSError as error:
        raise UserError(f"{folder}: cannot write: {error.strerror or error}") from error
    print("SYNTHETIC DATA: drawn by a program, to show the path. It says nothing about real CT.")
    slices = folder / "synthetic"
    write_patients(folder / "ct", DEMO_PATIENTS, DEMO_SLICES, options["seed"])
    preprocess(folder / "ct" / "images", folder / "ct" / "labels", slices, split=DEMO_SPLIT)
    train_policies(options | {"data": [str(slices.resolve())]}, folder / "run")
    # Less than eval.py's defaults: the curve and the other shifts take minutes.
    evaluation.main(
        [
            *("--runs", str(folder / "run"), "--out", str(folder / "eval")),
            *("--shift", "15%", "--no-sweep", "--device", options["device"]),
        ]
    )
    print(
        f"The demo took {(time.monotonic() - started) / 60:.1f} minutes. The table above is of "
        "SYNTHETIC slices that a program drew.\n"
        f"look at {folder / 'eval' / 'report.html'}\n"
        "next, on real CT: get FLARE22 and MedSAM's weights as the README tells, then\n"
        "  python preprocess_ct.py --images FLARE22Train/images --labels FLARE22Train/labels "
        "--out data/flare22\n"
        "  python train_adaptive.py --data data/flare22 --model medsam_vit_b "
        "--checkpoint work_dir/medsam_vit_b.pth"
    )


def mixed_precision(amp: str, device: torch.device) -> torch.dtype | None:
    """The number format of mixed precision, or None for fp32.

    Raises:
        UserError: fp16 on a CPU.
    """
    import torch

    if device.type == "cpu" and amp == "fp16":
        raise UserError("--amp fp16 needs a GPU; on a CPU use --amp off or bf16")
    if amp == "auto":
        amp = "fp16" if device.type == "cuda" else "off"
    return {"fp16": torch.float16, "bf16": torch.bfloat16, "off": None}[amp]


def clamped_factors(options: dict) -> dict[str, float]:
    """delta_expand and epsilon_shrink within their bounds, as arguments of `perturb`; says so.

    Raises:
        UserError: a factor of the wrong sign.
    """
    asked = (options["delta_expand"], options["epsilon_shrink"])
    try:
        used = perturb.clamp_factors(*asked)
    except ValueError as error:
        raise UserError(str(error)) from None
    names = ("delta_expand", "epsilon_shrink")
    for name, before, after in zip(names, asked, used, strict=True):
        if before != after:
            print(f"{name} {before:g} px is out of bounds: clamped to {after:g} px")
    return dict(zip(names, used, strict=True))


def constants(factors: dict[str, float]) -> dict[str, float]:
    """The constants without an option that a run depends on, for its config.json."""
    return {
        "delta_expand_used": factors["delta_expand"],
        "epsilon_shrink_used": factors["epsilon_shrink"],
        "DELTA_EXPAND_MAX": perturb.DELTA_EXPAND_MAX,
        "EPSILON_SHRINK_MIN": perturb.EPSILON_SHRINK_MIN,
        "MEDSAM_SHIFT": perturb.MEDSAM_SHIFT,
        "SAM2_SHARE": perturb.SAM2_SHARE,
        "SAM2_SHIFT_MAX": perturb.SAM2_SHIFT_MAX,
        "PLATEAU_PATIENCE": PLATEAU_PATIENCE,
        "PLATEAU_FACTOR": PLATEAU_FACTOR,
        "VALIDATION_SHIFT": str(VALIDATION_SHIFT),
        "VALIDATION_SEED": VALIDATION_SEED,
    }


def epoch_line(row: dict, epochs: int, best: bool = False) -> str:
    """One line for the screen about an epoch of log.csv."""
    train_loss = "before training " if row["epoch"] == 0 else f"train {row['train_loss']:.4f}, "
    scores = " / ".join(f"{100 * row[f'dsc_{kind}']:.1f}" for kind in perturb.BOX_KINDS)
    return (
        f"epoch {row['epoch']}/{epochs}: {train_loss}val {row['val_loss']:.4f}, "
        f"val DSC {' / '.join(perturb.BOX_KINDS)} {scores} %, "
        f"lr {row['lr']:.0e}, {row['seconds']:.0f} s" + (" (best)" if best else "")
    )


def check_options(options: dict) -> None:
    """See that numbers lie in their ranges, wherever the options come from.

    Raises:
        UserError: one does not.
    """
    for name, least, most in (
        ("epochs", 1, 10**6),
        ("seed", 0, 2**63 - 1),
        ("lr", 1e-12, 1.0),
        ("weight_decay", 0, 1.0),
    ):
        value = options[name]
        if not (isinstance(value, (int, float)) and least <= value <= most):
            raise UserError(
                f"--{name.replace('_', '-')}: must be from {least:g} to {most:g}, got {value}"
            )


def parse_args(argv: list[str] | None):
    """The options; those not given are None, so that a resumed run keeps its own.

    Raises:
        UserError: an unknown option or value.
    """
    parser = Parser(
        description="Fine-tune the mask decoder of MedSAM, LiteMedSAM or SAM on perturbed boxes."
    )

    def add(to, option: str, text: str, **kwargs) -> None:
        default = DEFAULTS.get(option[2:].replace("-", "_"))
        text += f" (default {default})" if default is not None else ""
        to.add_argument(option, help=text, **kwargs)

    what = parser.add_argument_group("what to train on what")
    add(what, "--data", "folder(s) of preprocess_ct.py", nargs="+", metavar="DIR", type=resolved)
    add(what, "--model", "lite_medsam, medsam_vit_b or sam_vit_b|l|h", metavar="NAME")
    add(
        what,
        "--checkpoint",
        "weights to start from: the full weights, or a decoder_best.pth",
        metavar="PTH",
        type=resolved,
    )
    add(what, "--demo", "everything on synthetic CT, in minutes", action="store_true")

    boxes = parser.add_argument_group("training boxes (the constants are in perturb.py)")
    add(
        boxes,
        "--policy",
        f"perturbation of the boxes, or several, comma-separated: {', '.join(perturb.POLICIES)}",
        type=policy_list,
        metavar="NAME[,NAME]",
    )
    add(
        boxes,
        "--delta-expand",
        "outward bound, px of the 1024 frame for a box as wide as the image: 102.4 is 10 %% of "
        "the side of any box, 0 ... 256",
        type=float,
        metavar="PX",
    )
    add(
        boxes,
        "--epsilon-shrink",
        "inward bound, in the same unit, -256 ... 0",
        type=float,
        metavar="PX",
    )

    optimisation = parser.add_argument_group("optimisation")
    add(optimisation, "--epochs", "passes over the training slices", type=int, metavar="N")
    add(optimisation, "--lr", "AdamW's learning rate", type=float, metavar="X")
    add(optimisation, "--weight-decay", "AdamW's weight decay", type=float, metavar="X")
    add(optimisation, "--seed", "of boxes and order", type=int, metavar="N")

    machine = parser.add_argument_group("machine")
    add(machine, "--device", "cuda, cuda:N, cpu or auto", metavar="NAME")
    add(
        machine,
        "--amp",
        "mixed precision; auto is fp16 on cuda and off on a CPU",
        choices=("auto", "fp16", "bf16", "off"),
    )

    runs = parser.add_argument_group("the run's folder, WORK_DIR/NAME/")
    runs.add_argument("--work-dir", default=WORK_DIR, metavar="DIR", help="(default %(default)s)")
    add(runs, "--run", "name of the run (default: date, time and policy)", metavar="NAME")
    add(runs, "--resume", "go on with --run NAME, with its own options", action="store_true")
    args = parser.parse_args(argv)

    if args.run is not None and (Path(args.run).name != args.run or args.run in ("", ".", "..")):
        raise UserError(f"--run: a name, not a path, got {args.run!r}; see --work-dir")
    return args


def policy_list(text: str) -> str:
    """One policy or several, comma-separated, as they were given.

    Raises:
        UserError: an unknown policy, or one that is there twice.
    """
    policies = text.split(",")
    for policy in policies:
        if policy not in perturb.POLICIES:
            known = ", ".join(perturb.POLICIES)
            raise UserError(f"--policy: unknown policy {policy!r}; choose from {known}")
    if len(set(policies)) < len(policies):
        raise UserError(f"--policy: {text} names a policy twice")
    return text


def resolved(path: str) -> str:
    """An absolute path, so that a run can be resumed from another folder."""
    return str(Path(path).resolve())


if __name__ == "__main__":
    run(main)
