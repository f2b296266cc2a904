"""Fine-tune the mask decoder of MedSAM, LiteMedSAM or SAM on perturbed boxes.

    python train_adaptive.py --demo                                 synthetic CT, a few minutes
    python train_adaptive.py --data data/flare22 --model medsam_vit_b \\
        --checkpoint work_dir/medsam_vit_b.pth --policy adaptive --run flare22-adaptive
    python train_adaptive.py --run flare22-adaptive --resume        go on with that run
    python train_adaptive.py --data data/flare22 --policy medsam,bidirectional,scaled,adaptive \\
        --run ablation                                              one run a policy
    python train_adaptive.py --run flare22-adaptive --export medsam_adaptive.pth
                                        its full weights, for SAM's, MedSAM's, LiteMedSAM's programs

    torchrun --nproc-per-node 2 -- train_adaptive.py ...            on several GPUs

The image encoder and the prompt encoder stay as they are. A step is one slice with all its organs,
each with its own freshly perturbed box (--batch: several slices). The run's folder,
work_dir/<run>/, is described in utils/runs.py; `decoder_best.pth` in it is what eval.py and
--checkpoint take. Several policies are trained one after another in work_dir/<run>/<policy>/, from
the same weights, on the same embeddings, in the same order and with the same seeds: nothing but the
boxes differs.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

import perturb
from utils.system import distributed, signals
from utils.system.command_line import Parser, run, shell_command
from utils.system.errors import UserError
from utils.system.signals import Interrupted

if TYPE_CHECKING:
    import torch

    from utils.data.slices import Slice, SliceDataset
    from utils.model.segmenter import Segmenter
    from utils.training.batches import Batch
    from utils.training.trainer import Trainer, runs

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
    "batch": 1,  # slices a step; with torchrun one a process
    "loss_resolution": 256,  # px: the decoder's own
    # machine
    "device": "auto",  # cuda if there is one
    "amp": "auto",  # fp16 on cuda, off on a CPU
    "boxes_per_call": 16,  # of the decoder; more take more memory and give the same result
    "cache": "on",  # of embeddings
    "deterministic": False,  # on a CPU it is so anyway
}
CHOICES = {
    "loss_resolution": (256, 1024),
    "amp": ("auto", "fp16", "bf16", "off"),
    "cache": ("on", "off"),
}
WORK_DIR = "work_dir"
DOWNLOAD = "download"  # in place of a path, of --checkpoint
# --- What has no option --------------------------------------------------------------------------
PLATEAU_PATIENCE = 2  # epochs; torch's default of 10 would hardly act within 20
PLATEAU_FACTOR = 0.1
VALIDATION_SHIFT = perturb.Shift(0.15, "side")  # of the validation's expansion and shrink boxes
VALIDATION_SEED = 20  # the same boxes in every epoch, for every policy and every run
SAVE_SECONDS = 300  # between two checkpoints within an epoch
LOOK_SECONDS = 1  # between two looks at the loss, for which a GPU has to be waited for
DEMO_EPOCHS = 2  # to stay under five minutes on two cores
DEMO_PATIENTS = 12
DEMO_SLICES = 3  # a patient
DEMO_SPLIT = (8 / 12, 2 / 12, 2 / 12)


def main(argv: list[str] | None = None) -> None:
    """The command line: --demo, a new run, --resume or --export."""
    args = parse_args(argv)
    given = {key: getattr(args, key) for key in (*DEFAULTS, "data") if vars(args)[key] is not None}
    fetches = given.get("checkpoint") == DOWNLOAD
    if args.export:
        if given or args.demo or args.resume or args.tensorboard or not args.run:
            raise UserError("--export: goes with --run NAME, and --work-dir, alone")
        return export(Path(args.work_dir) / args.run, Path(args.export))
    if args.tensorboard:
        from utils.training.runs import require_tensorboard

        require_tensorboard()
    if args.demo:
        if os.environ.get("WORLD_SIZE", "1") != "1":
            raise UserError("--demo runs in one process; leave out torchrun")
        if "data" in given or args.run or args.resume:
            raise UserError("--demo makes its own data and run: leave out --data, --run, --resume")
        options = {**DEFAULTS, "epochs": DEMO_EPOCHS, **given}
        options |= place_of_weights(options, args.work_dir)
        check_options(options)
        if fetches:
            fetch_weights(options)
        return demo(options, Path(args.work_dir) / "demo", args.tensorboard)
    distributed.init()
    if args.resume:
        from utils.training.runs import stored_options

        if not args.run:
            raise UserError("--resume: say which run, with --run NAME")
        folder = Path(args.work_dir) / args.run
        options = stored_options(folder, expected={*DEFAULTS, "data"})
        given |= place_of_weights({**options, **given}, args.work_dir)
        for key, value in given.items():
            if options[key] != value:
                raise UserError(
                    f"{folder}: was started with --{key.replace('_', '-')} {options[key]}, not "
                    f"{value}; resume it without that option, or start a new run"
                )
    else:
        if "data" not in given:
            raise UserError("--data: give the folder(s) of preprocess_ct.py, or try --demo")
        options = {**DEFAULTS, "batch": distributed.world_size(), **given}
        options |= place_of_weights(options, args.work_dir)
        name = args.run or f"{datetime.now():%Y%m%d-%H%M%S}-{options['policy']}"
        name = distributed.broadcast(name)
        folder = Path(args.work_dir) / name
    check_options(options)
    if fetches:
        fetch_weights(options)
    from utils.training.runs import CONFIG

    try:
        train_policies(options, folder, args.resume, args.tensorboard)
    except KeyboardInterrupt as stop:
        number, said = getattr(stop, "signal", signal.SIGINT), str(stop) or "interrupted"
        if (folder / CONFIG).is_file():
            words = ["train_adaptive.py", "--work-dir", args.work_dir, "--run", folder.name]
            said += f"; go on with: {launcher()} {shell_command(*words)} --resume"
        raise Interrupted(number, said) from None
    distributed.print_once("next: " + shell_command("python", "eval.py", "--runs", folder))


def place_of_weights(options: dict, work_dir: str) -> dict:
    """Where "--checkpoint download" has the model's weights, as an option; nothing without it.

    Raises:
        UserError: the model has none to download.
    """
    if options["checkpoint"] != DOWNLOAD:
        return {}
    from utils.system.downloads import WEIGHTS

    model = options["model"]
    if model not in WEIGHTS:
        raise UserError(
            f"--checkpoint {DOWNLOAD}: is for {', '.join(WEIGHTS)}; {model} goes without"
        )
    return {"checkpoint": str((Path(work_dir) / WEIGHTS[model].file).resolve())}


def fetch_weights(options: dict) -> None:
    """Download the model's weights to their place, unless they are there.

    Raises:
        UserError: they cannot be had, or the data cannot be used, which is seen before.
    """
    from utils.data.slices import open_datasets
    from utils.system.downloads import WEIGHTS, fetch

    open_datasets(options.get("data", []))
    folder = Path(options["checkpoint"]).parent
    distributed.rank_zero_first(lambda: fetch(WEIGHTS[options["model"]], folder))


def export(folder: Path, path: Path) -> None:
    """Write the full weights of a run's best decoder to `path`; says how to load them.

    Raises:
        UserError: no trained run of one policy, or as `models.export_weights`.
    """
    from utils.model.segmenter import export_weights
    from utils.training.runs import find_runs

    runs = find_runs([folder])
    if len(runs) > 1 or runs[0].folder != folder:
        names = ", ".join(run.folder.name for run in runs)
        raise UserError(
            f"{folder}: holds the runs {names}; export one, with --work-dir {folder} --run NAME"
        )
    run = runs[0]
    if run.epochs < run.options["epochs"]:
        print(f"{folder}: trained for {run.epochs} of {run.options['epochs']} epochs until now")
    name = export_weights(run.decoder, path)
    if name == "lite_medsam":
        loader = "build_lite_medsam().load_state_dict(torch.load(PATH)), then .eval()"
    else:
        loader = f'sam_model_registry["{name[-5:]}"](checkpoint=PATH)'
        loader += ", images in [0, 1]: MedSAM's inference" if name == "medsam_vit_b" else ""
    print(f"wrote {path}: full weights of {name}; {loader} takes them")


def launcher() -> str:
    """How this script was started: by python, or by torchrun."""
    return (
        f"torchrun --nproc-per-node {distributed.world_size()} --"
        if distributed.world_size() > 1
        else "python"
    )


def train_policies(
    options: dict, folder: Path, resume: bool = False, tensorboard: bool = False
) -> None:
    """Train the policy of `options`, or several (comma-separated) each in folder/<policy>/.

    Raises:
        UserError: as `train`.
    """
    from utils.training import runs

    policies = options["policy"].split(",")
    if len(policies) == 1:
        return train(options, folder, resume, tensorboard)
    if not resume:
        prepare(options)
        distributed.rank_zero_first(lambda: runs.start_run(folder, options))
    with signals.deferred():  # a KeyboardInterrupt between two of them could get lost
        for policy in policies:
            signals.raise_if_pending()
            # Asked once: rank 0 may have made it before another process looks.
            started = distributed.broadcast((folder / policy / runs.CONFIG).is_file())
            train({**options, "policy": policy}, folder / policy, resume and started, tensorboard)


def train(options: dict, folder: Path, resume: bool = False, tensorboard: bool = False) -> None:
    """Run, or go on with, the training of `folder` (see utils/runs.py).

    Args:
        options: the keys of DEFAULTS, and "data", a list of folders.
        folder: work_dir/<run>; new or empty unless `resume`.
        resume: go on where it was.
        tensorboard: write folder/tensorboard/ as well.

    Raises:
        UserError: bad input, a folder in use, a run that is not what it was, or no memory left.
    """
    from utils.training import runs

    prepared = prepare(options)
    with contextlib.ExitStack() as held, signals.deferred():
        distributed.rank_zero_first(lambda: held.enter_context(runs.claim(folder)))
        if resume:
            runs.check_unchanged(folder, **prepared.facts)
        else:
            distributed.rank_zero_first(lambda: runs.start_run(folder, options, **prepared.facts))
        log = runs.RunLog(folder, tensorboard) if distributed.rank() == 0 else None
        with contextlib.closing(log) if log else contextlib.nullcontext():
            fit(prepared, options, folder, resume, log)
        distributed.barrier()


@dataclass(frozen=True)
class Prepared:
    """What a training needs, seen to be in order.

    Attributes:
        model: the starting weights, on their device.
        amp: the number format of mixed precision, or None for fp32.
        datasets: of training and validation.
        factors: arguments of `perturb`.
        facts: what must not change between a run's start and its end, beside the options.
    """

    model: Segmenter
    amp: torch.dtype | None
    datasets: list[SliceDataset]
    factors: dict[str, float]
    facts: dict


def prepare(options: dict) -> Prepared:
    """Open what the options name; bad input is found here, before a run's folder is made.

    Raises:
        UserError: bad input.
    """
    from utils.data.slices import open_datasets
    from utils.model.segmenter import load_model
    from utils.system.device import (
        be_deterministic,
        choose_device,
        keep_freed_memory,
        mixed_precision,
    )
    from utils.system.files import sha256

    if options["deterministic"]:
        be_deterministic()
    device = choose_device(distributed.local_device(options["device"]))
    amp_dtype = mixed_precision(options["amp"], device)
    if options["batch"] < distributed.world_size():
        raise UserError(
            f"--batch: {options['batch']} slices a step are too few for "
            f"{distributed.world_size()} processes"
        )
    factors = clamped_factors(options)
    datasets = open_datasets(options["data"])
    if device.type == "cpu":
        keep_freed_memory()
    model = load_model(options["model"], options["checkpoint"], device)
    another = "preprocess with more cases or another --split"
    for dataset in datasets:
        if not dataset.split("train"):
            raise UserError(f"{dataset.folder}: no slice in the train split; {another}")
    if not any(dataset.split("val") for dataset in datasets):
        raise UserError(f"{datasets[0].folder}: no slice in the val split; {another}")
    facts = {
        "data": {dataset.name: dataset.sha256 for dataset in datasets},
        "base_weights": model.base_sha256,
        "start_weights": sha256(options["checkpoint"] or model.base_path),
        "constants": constants(factors),
        "device": device.type,
        "amp": str(amp_dtype or "off"),
    }
    return Prepared(model, amp_dtype, datasets, factors, facts)


def fit(
    prepared: Prepared, options: dict, folder: Path, resume: bool, log: runs.RunLog | None
) -> None:
    """Encode what is not encoded yet, then train from the start or from the last checkpoint.

    Args:
        prepared: of these options.
        options, folder: of the run.
        resume: go on where it was.
        log: of the run; None on other ranks than 0.

    Raises:
        UserError: as `train`.
        Interrupted: Ctrl-C or SIGTERM; what was done is saved.
    """
    import torch

    from utils.model.checkpoints import save_checkpoint
    from utils.model.embeddings import open_embeddings
    from utils.model.segmenter import save_decoder
    from utils.system.device import explain_out_of_memory, forget_peak, peak_gib
    from utils.training.trainer import Trainer, runs

    model, datasets, factors = prepared.model, prepared.datasets, prepared.factors
    slices = {part: [s for d in datasets for s in d.split(part)] for part in ("train", "val")}
    distributed.print_once(
        f"{folder}: {options['model']} on {model.device}"
        + (f" ({distributed.world_size()} processes)" if distributed.world_size() > 1 else "")
        + f", policy {options['policy']}, "
        f"{len(slices['train'])} training and {len(slices['val'])} validation slices"
    )
    try:
        with explain_out_of_memory("encoding; close what else uses the GPU, or use --device cpu"):
            embeddings = open_embeddings(
                datasets, model, slices["train"] + slices["val"], cache=options["cache"] == "on"
            )
    except Interrupted as stop:
        raise Interrupted(stop.signal, "stopped in encoding; what is encoded is kept") from None
    forget_peak(model.device)
    torch.manual_seed(options["seed"])
    trainer = Trainer(
        model,
        embeddings,
        lr=options["lr"],
        weight_decay=options["weight_decay"],
        factor=PLATEAU_FACTOR,
        patience=PLATEAU_PATIENCE,
        amp=prepared.amp,
        boxes_per_call=options["boxes_per_call"],
    )

    def save() -> None:
        if distributed.rank() == 0:
            save_checkpoint(folder / runs.LAST, trainer.state())

    try:
        with explain_out_of_memory(remedy(options)):
            if saved := runs.load_checkpoint(folder, Trainer.STATE) if resume else None:
                try:
                    trainer.load_state(saved)
                except UserError as error:
                    raise UserError(f"{folder / runs.LAST}: {error}; start a new run") from error
                distributed.print_once(
                    f"going on at epoch {trainer.at['epoch']}, step {trainer.at['step']}"
                )
            else:
                row = {"epoch": 0, "train_loss": math.nan}  # the weights before training
                row |= validate(trainer, slices["val"], options["loss_resolution"])
                row |= {"lr": trainer.lr, "skipped_steps": 0, "seconds": 0.0}
                row |= {"memory_gib": peak_gib(model.device)}
                trainer.history.append(row)
                if log:
                    log.write(trainer.history)
                distributed.print_once(epoch_line(row, options["epochs"]))

            while (epoch := trainer.at["epoch"]) <= options["epochs"]:
                started = time.monotonic() - trainer.at["seconds"]
                train_epoch(trainer, slices["train"], options, factors, folder, started, save)
                row = {"epoch": epoch, "train_loss": trainer.train_loss}
                row |= validate(trainer, slices["val"], options["loss_resolution"])
                row |= {"lr": trainer.lr, "skipped_steps": trainer.skipped}
                row |= {"seconds": time.monotonic() - started}
                row |= {"memory_gib": peak_gib(model.device)}
                if not math.isfinite(row["val_loss"]):
                    raise UserError(
                        f"{folder}: the validation loss is {row['val_loss']} after epoch {epoch}; "
                        "start again with a smaller --lr or --amp off"
                    )
                best = trainer.end_epoch(row)
                if log:
                    # The decoder first: a run stopped between two writes makes the same ones again.
                    if best:
                        notes = {"policy": options["policy"], "val_loss": row["val_loss"]}
                        save_decoder(folder / runs.BEST, model, epoch=epoch, **notes)
                    save()
                    log.write(trainer.history)
                distributed.print_once(epoch_line(row, options["epochs"], best=best))
    except Interrupted as stop:
        if not trainer.history:
            raise
        save()
        distributed.barrier()  # torchrun ends the others when one leaves earlier
        epoch, step = trainer.at["epoch"], trainer.at["step"]
        where = f"stopped at epoch {epoch}, step {step}, and saved"
        raise Interrupted(stop.signal, where) from None
    if log:
        log.write(trainer.history)


def train_epoch(
    trainer: Trainer,
    slices: list[Slice],
    options: dict,
    factors: dict[str, float],
    folder: Path,
    started: float,
    save: Callable[[], None],
) -> None:
    """The steps of an epoch, from where the trainer is; slices are read while it computes.

    Args:
        trainer: at the epoch's next step.
        slices: to train on, each in one step.
        options, factors, folder: of the run.
        started: time.monotonic() of the epoch's beginning.
        save: writes a checkpoint.

    Raises:
        UserError: a damaged file, or a loss that is not finite.
        Interrupted: Ctrl-C or SIGTERM, after the step that it came in.
    """
    from tqdm import tqdm

    from utils.model.checkpoints import save_checkpoint
    from utils.system.device import peak_memory
    from utils.system.prefetch import prefetch
    from utils.training.runs import NONFINITE

    epoch, first = trainer.at["epoch"], trainer.at["step"]
    order = perturb.box_rng(options["seed"], "order", epoch).permutation(len(slices))
    size = options["batch"]
    steps = [[slices[i] for i in order[at : at + size]] for at in range(0, len(order), size)]

    def prompt(entry: Slice, tight: np.ndarray) -> np.ndarray:
        return training_boxes(entry, tight, epoch, options, factors)

    def load(entries: list[Slice]) -> Batch:
        own = distributed.shard(entries) or entries[:1]
        return trainer.load(own, options["loss_resolution"], prompt)

    def look() -> None:
        if (bad := trainer.look()) is None:
            return
        if distributed.rank() == 0:
            batch = trainer.load(steps[bad], options["loss_resolution"], prompt)
            where = {"epoch": epoch, "step": bad}
            save_checkpoint(folder / NONFINITE, where | trainer.inputs(batch))
        names = ", ".join(entry.key for entry in steps[bad])
        raise UserError(
            f"{folder}: the loss or its gradient is not finite at epoch {epoch}, slice {names}; "
            f"what went in is kept in {NONFINITE}; start again with a smaller --lr or --amp off"
        )

    progress = tqdm(
        prefetch(load, steps[first:], trainer.read_ahead),
        desc=f"epoch {epoch}",
        unit="step",
        initial=first,
        total=len(steps),
        leave=False,
        disable=None if distributed.rank() == 0 else True,
    )
    on_cpu = trainer.device.type == "cpu"  # there is nothing to wait for
    saved_at = looked_at = time.monotonic()
    for step, batch in enumerate(progress, first):
        instances = sum(len(entry.labels) for entry in steps[step])
        trainer.step(batch, instances, counts=distributed.rank() < len(steps[step]))
        now = time.monotonic()
        trainer.at["seconds"] = now - started
        if epoch == 1 and step == 0:
            distributed.print_once(
                f"peak memory up to the first step: {peak_memory(trainer.device)}"
            )
        # All processes look, save and stop at the same step.
        due = (now - looked_at > LOOK_SECONDS, now - saved_at > SAVE_SECONDS)
        asked, to_look, to_save = distributed.all_reduce_max([signals.pending(), *due])
        if on_cpu or asked or to_look or to_save:
            look()
            progress.set_postfix(loss=f"{trainer.train_loss:.4f}", refresh=False)
            looked_at = now
        if asked:
            raise Interrupted(asked)
        if to_save:
            save()
            saved_at = now
    look()


def training_boxes(
    entry: Slice, tight: np.ndarray, epoch: int, options: dict, factors: dict[str, float]
) -> np.ndarray:
    """The boxes (K, 4) that a slice is trained on in an epoch, of its tight ones.

    They depend on the seed, the epoch and the slice alone.
    """
    rng = perturb.box_rng(options["seed"], "boxes", epoch, entry.key)
    return perturb.perturb(tight, options["policy"], rng, **factors)


def boxes_of_run(
    folder: Path, epoch: int
) -> Iterator[tuple[Slice, np.ndarray, np.ndarray, np.ndarray]]:
    """Make the training boxes of a run's epoch again, from its folder and its data alone.

    Args:
        folder: of a run of one policy.
        epoch: from 1.

    Yields:
        Each training slice with its labels (K,), their tight boxes and the ones that it was trained
        on, both (K, 4) float32 XYXY in the 1024 frame.

    Raises:
        UserError: the data, or the constants in perturb.py, are not those of the run any more.
    """
    from utils.data.slices import open_datasets, read_instances
    from utils.training import runs

    options = runs.stored_options(folder, expected={*DEFAULTS, "data"})
    if "," in options["policy"]:
        raise UserError(f"{folder}: a run of several policies; give the folder of one of them")
    if not 1 <= epoch <= options["epochs"]:
        raise UserError(f"{folder}: has epochs 1 to {options['epochs']}, not {epoch}")
    factors = clamped_factors(options)
    datasets = open_datasets(options["data"])
    data = {dataset.name: dataset.sha256 for dataset in datasets}
    runs.check_unchanged(folder, data=data, constants=constants(factors))
    for entry in (entry for dataset in datasets for entry in dataset.split("train")):
        _, labels, tight = read_instances(entry)
        yield entry, labels, tight, training_boxes(entry, tight, epoch, options, factors)


def validate(trainer: Trainer, slices: list[Slice], resolution: int) -> dict[str, float]:
    """Loss and DSC over standard, expansion and shrink boxes.

    The boxes depend on nothing but the slice, so that epochs, policies and runs compare.

    Args:
        trainer: the decoder, at any point of its training.
        slices: all of them; each process takes its share.
        resolution: at which loss and DSC are taken, 256 (the decoder's own) or 1024.
    """
    import torch

    from utils.system.prefetch import prefetch
    from utils.training.losses import segmentation_loss
    from utils.training.trainer import dsc_of

    def prompt(entry: Slice, tight: np.ndarray) -> np.ndarray:
        rng = perturb.box_rng(VALIDATION_SEED, entry.case, entry.index)
        kinds = [
            perturb.shift_boxes(tight, kind, VALIDATION_SHIFT, rng) for kind in perturb.BOX_KINDS
        ]
        return np.concatenate(kinds)

    def load(entry: Slice) -> Batch:
        return trainer.load([entry], resolution, prompt)

    # Rows: loss, DSC, boxes; a column for each kind of box. Nothing waits for the device till the
    # end.
    sums = torch.zeros(3, len(perturb.BOX_KINDS), dtype=torch.float64, device=trainer.device)
    for batch in prefetch(load, distributed.shard(slices), trainer.read_ahead):
        logits, targets = trainer.predict(batch)
        scores = torch.stack([segmentation_loss(logits, targets), dsc_of(logits, targets)])
        by_kind = scores.unflatten(1, (len(perturb.BOX_KINDS), -1)).double()
        sums[:2] += by_kind.sum(dim=2)
        sums[2] += by_kind.shape[2]
        if distributed.world_size() == 1:  # several could not wait for each other then
            signals.raise_if_pending()
    losses, scores, boxes = distributed.all_reduce_sum(sums).tolist()
    means = {
        f"dsc_{kind}": score / count
        for kind, score, count in zip(perturb.BOX_KINDS, scores, boxes, strict=True)
    }
    return {"val_loss": sum(losses) / sum(boxes), **means}


def demo(options: dict, folder: Path, tensorboard: bool = False) -> None:
    """The whole path on synthetic CT: make it, preprocess, fine-tune, evaluate before and after."""
    import eval as evaluation
    from preprocess_ct import preprocess
    from utils.data.synthetic import write_patients
    from utils.model.segmenter import load_model
    from utils.system.device import choose_device
    from utils.system.files import atomic_write, cannot_write

    started = time.monotonic()
    clamped_factors(options)
    load_model(options["model"], options["checkpoint"], choose_device(options["device"]))
    marker = folder / "SYNTHETIC.txt"
    try:
        if folder.exists() and any(folder.iterdir()) and not marker.exists():
            raise UserError(f"{folder}: is not an earlier demo; choose another --work-dir")
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(marker, "w") as file:
            file.write("Made by train_adaptive.py --demo; the next demo empties this folder.\n")
        for earlier in folder.iterdir():
            if earlier.is_dir():
                shutil.rmtree(earlier)
    except OSError as error:
        raise cannot_write(folder, error) from error
    print("SYNTHETIC DATA: drawn by a program, to show the path. It says nothing about real CT.")
    slices = folder / "synthetic"
    write_patients(folder / "ct", DEMO_PATIENTS, DEMO_SLICES, options["seed"])
    preprocess(folder / "ct" / "images", folder / "ct" / "labels", slices, split=DEMO_SPLIT)
    options = options | {"data": [str(slices.resolve())]}
    train_policies(options, folder / "run", tensorboard=tensorboard)
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
        "next, on real CT, with MedSAM's weights:\n"
        "  python preprocess_ct.py --download flare22 --out data/flare22\n"
        "  python train_adaptive.py --data data/flare22 --model medsam_vit_b --checkpoint download"
    )


def remedy(options: dict) -> str:
    """What helps a run that is out of memory."""
    helps = []
    if options["boxes_per_call"] > 1:
        helps.append(f"--boxes-per-call {options['boxes_per_call'] // 2}")
    if options["batch"] > distributed.world_size():
        helps.append(f"--batch {distributed.world_size()}")
    if options["loss_resolution"] > 256:
        helps.append("--loss-resolution 256")
    if options["cache"] == "off":
        helps.append("--cache on")
    if options["amp"] == "off":
        helps.append("--amp fp16 on a GPU")
    return f"in a new run, try {', '.join([*helps, '--device cpu'])}"


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
            distributed.print_once(
                f"{name} {before:g} px is out of bounds: clamped to {after:g} px"
            )
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
        f"lr {row['lr']:.0e}, {row['seconds']:.0f} s"
        + ("" if math.isnan(row["memory_gib"]) else f", {row['memory_gib']:.1f} GiB")
        + (f", {row['skipped_steps']} steps skipped by the scaler" if row["skipped_steps"] else "")
        + (" (best)" if best else "")
    )


def check_options(options: dict) -> None:
    """See that the options are in their ranges, wherever they come from.

    Raises:
        UserError: one is not.
    """
    for name, kinds, least, most in (
        ("epochs", (int,), 1, 10**6),
        ("seed", (int,), 0, 2**63 - 1),
        ("lr", (int, float), 1e-12, 1.0),
        ("weight_decay", (int, float), 0, 1.0),
        ("batch", (int,), 1, 10**6),
        ("boxes_per_call", (int,), 1, 10**6),
        ("delta_expand", (int, float), -1e6, 1e6),  # more in `clamped_factors`
        ("epsilon_shrink", (int, float), -1e6, 1e6),
    ):
        value = options[name]
        if type(value) not in kinds or not least <= value <= most:
            raise UserError(
                f"--{name.replace('_', '-')}: must be from {least:g} to {most:g}, got {value}"
            )
    for name, choices in (*CHOICES.items(), ("deterministic", (False, True))):
        if options[name] not in choices:
            raise UserError(
                f"--{name.replace('_', '-')}: choose from {', '.join(map(str, choices))}, got "
                f"{options[name]}"
            )
    if not isinstance(options["device"], str):
        raise UserError(f"--device: must be a name, got {options['device']}")


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
        text += "" if default is None or default is False else f" (default {default})"
        to.add_argument(option, help=text, **kwargs)

    what = parser.add_argument_group("what to train on what")
    add(what, "--data", "folder(s) of preprocess_ct.py", nargs="+", metavar="DIR", type=resolved)
    add(what, "--model", "lite_medsam, medsam_vit_b or sam_vit_b|l|h", metavar="NAME")
    add(
        what,
        "--checkpoint",
        "weights to start from: the full weights, or a decoder_best.pth; download fetches MedSAM's "
        "or SAM's into WORK_DIR",
        metavar="PTH",
        type=checkpoint_path,
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
    add(
        optimisation,
        "--batch",
        "slices a step, over all processes of torchrun: one each at least, and by default",
        type=int,
        metavar="N",
    )
    add(
        optimisation,
        "--loss-resolution",
        "px at which the loss is taken: 256, the decoder's own, or 1024, MedSAM's way",
        type=int,
        choices=CHOICES["loss_resolution"],
    )

    machine = parser.add_argument_group("machine")
    add(machine, "--device", "cuda, cuda:N, cpu or auto", metavar="NAME")
    add(
        machine,
        "--amp",
        "mixed precision; auto is fp16 on cuda and off on a CPU",
        choices=CHOICES["amp"],
    )
    add(
        machine,
        "--boxes-per-call",
        "most boxes in one decoder call: fewer take less memory, the result is the same",
        type=int,
        metavar="N",
    )
    add(
        machine,
        "--cache",
        "keep the embeddings, 2 MiB a slice, beside the slices; off encodes each in every epoch",
        choices=CHOICES["cache"],
    )
    add(
        machine,
        "--deterministic",
        "on CUDA, ask for the same bits every time: slower, how much was not measured; a CPU gives "
        "them anyway",
        action="store_true",
        default=None,
    )

    runs = parser.add_argument_group("the run's folder, WORK_DIR/NAME/")
    runs.add_argument("--work-dir", default=WORK_DIR, metavar="DIR", help="(default %(default)s)")
    add(runs, "--run", "name of the run (default: date, time and policy)", metavar="NAME")
    add(runs, "--resume", "go on with --run NAME, with its own options", action="store_true")
    add(
        runs,
        "--tensorboard",
        "also write WORK_DIR/NAME/tensorboard/, if TensorBoard is installed",
        action="store_true",
    )
    add(
        runs,
        "--export",
        "write the full weights of --run NAME to a new file, a state dict that segment-anything, "
        "MedSAM's inference or LiteMedSAM's loader takes; alone",
        metavar="PTH",
    )
    args = parser.parse_args(argv)

    from utils.system.files import is_file_name

    if args.run is not None and not is_file_name(args.run):
        raise UserError(
            f"--run: a name, not a path, got {args.run!r}; a run in another folder, as one policy "
            "of several, is --work-dir FOLDER --run NAME"
        )
    return args


def policy_list(text: str) -> str:
    """One policy or several, comma-separated, as they were given."""
    from utils.training.runs import policies_of

    policies_of(text, "--policy")
    return text


def checkpoint_path(text: str) -> str:
    """ "download", or an absolute path."""
    return text if text == DOWNLOAD else resolved(text)


def resolved(path: str) -> str:
    """An absolute path, so that a run can be resumed from another folder."""
    return str(Path(path).resolve())


if __name__ == "__main__":
    run(main)
