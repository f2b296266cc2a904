"""Fine-tune the mask decoder of MedSAM, LiteMedSAM or SAM on perturbed boxes.

    python train_adaptive.py --demo                                 synthetic CT, a few minutes
    python train_adaptive.py --data data/flare22 --model medsam_vit_b \\
        --checkpoint work_dir/medsam_vit_b.pth --policy adaptive --run flare22-adaptive
    python train_adaptive.py --run flare22-adaptive --resume        go on with that run
    python train_adaptive.py --data data/flare22 --policy medsam,bidirectional,scaled,adaptive \\
        --run ablation                                              one run per policy
    python train_adaptive.py --average work_dir/ablation work_dir/mixed --run mean
                                        the mean of the decoders that are better together
    python train_adaptive.py --run flare22-adaptive --export medsam_adaptive.pth
                                        its full weights, for SAM's, MedSAM's, LiteMedSAM's programs

    torchrun --nproc-per-node 2 -- train_adaptive.py ...            on several GPUs

The image encoder and the prompt encoder stay as they are. A step is one slice with all its organs,
each with its own freshly perturbed box (--batch: several slices). utils/training/runs.py describes
the folder of a run, work_dir/<run>/; eval.py and --checkpoint take its decoder_best.pth. Several
policies are trained one after another in work_dir/<run>/<policy>/, from the same weights, on the
same embeddings, in the same order and with the same seeds: only the boxes differ.
"""

from __future__ import annotations

import contextlib
import math
import shutil
import signal
import time
from argparse import Namespace
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

import perturb
from utils.system import distributed, signals
from utils.system.command_line import Parser, integer, number, run, shell_command
from utils.system.downloads import DOWNLOAD, weights_path
from utils.system.errors import UserError
from utils.system.files import atomic_write, cannot_write, is_file_name, sha256
from utils.system.signals import Interrupted
from utils.training.options import (
    CONFIG,
    absolute_path,
    checkpoint_path,
    factor_defaults,
    policy_names,
    read_options,
)

# The functions below import what is slow to import (torch, matplotlib) themselves: --help is quick.
if TYPE_CHECKING:
    from utils.data.slices import Slice

# --- Constants without an option (the options' defaults are in make_parser) ----------------------
PLATEAU_PATIENCE = 2  # epochs; torch's default of 10 would hardly act within 20
PLATEAU_FACTOR = 0.1
EMA_DECAY = 0.998  # of --ema without a number: an average over about 500 steps
SAVE_SECONDS = 300  # between two checkpoints within an epoch
CHECK_SECONDS = 1  # between two checks of the loss on a GPU
DEMO_EPOCHS = 2  # to stay under five minutes on two cores
DEMO_PATIENTS = 12
DEMO_SLICES = 3  # per patient
DEMO_SPLIT = (8 / 12, 2 / 12, 2 / 12)
COMMANDS = (
    "demo",
    "work_dir",
    "run",
    "resume",
    "tensorboard",
    "export",
    "format",
    "average",
)  # not stored with a run


def train(
    options: Namespace,
    folder: Path,
    resume: bool = False,
    tensorboard: bool = False,
) -> None:
    """Train one policy in `folder`, from the start or, with `resume`, from where the run was.

    Args:
        options: as `make_parser` declares them, "data" and all others that are not in COMMANDS.
        folder: work_dir/<run>, new or empty unless `resume`; see utils/training/runs.py.
        resume: go on from the last checkpoint.
        tensorboard: write folder/tensorboard/ as well.

    Raises:
        UserError: bad input, a folder in use, a run that is not what it was, or no memory left.
        Interrupted: Ctrl-C or SIGTERM; everything until the last finished step is saved.
    """
    import torch

    from utils.model.segmenter import save_decoder
    from utils.system.device import (
        explain_out_of_memory,
        forget_peak,
        peak_gib,
        peak_memory,
        reading_threads,
    )
    from utils.system.prefetch import prefetch
    from utils.system.progress_bar import progress_bar
    from utils.training import runs
    from utils.training.batches import TargetStore, accumulate, decoder_parts, load_step
    from utils.training.boxes import perturbation_of, training_boxes
    from utils.training.inputs import memory_advice, open_inputs, run_embeddings
    from utils.training.log import RunLog, epoch_line
    from utils.training.losses import segmentation_loss
    from utils.training.moving_average import MovingAverage
    from utils.training.progress import (
        Checkpoint,
        Intervals,
        Progress,
        make_scaler,
        raise_if_not_finite,
    )
    from utils.training.resume import start_or_resume
    from utils.training.validation import validate

    inputs = open_inputs(options)
    facts = inputs.facts | {"constants": constants(), "perturb_sha256": sha256(perturb.__file__)}
    facts |= {"perturbation": asdict(perturbation_of(options))}
    model, amp = inputs.model, inputs.amp
    device, on_gpu = model.device, model.device.type == "cuda"
    rank_zero, several = distributed.rank() == 0, distributed.world_size() > 1
    train_slices, val_slices = (
        [entry for dataset in inputs.datasets for entry in dataset.split(part)]
        for part in ("train", "val")
    )
    with contextlib.ExitStack() as stack, signals.deferred():
        distributed.rank_zero_first(lambda: stack.enter_context(runs.claim(folder)))
        start_or_resume(folder, options, resume, **facts)
        distributed.print_once(
            f"{folder}: {options.model} on {device}"
            + (f" ({distributed.world_size()} processes)" if several else "")
            + f", policy {options.policy}, "
            f"{len(train_slices)} training and {len(val_slices)} validation slices"
        )
        for note in inputs.notes:
            distributed.print_once(note)
        embeddings = run_embeddings(inputs, train_slices + val_slices, options)

        forget_peak(device)
        torch.manual_seed(options.seed)
        decode = distributed.data_parallel(model.decode_batch, model.mask_decoder)
        autocast = torch.autocast(device.type, amp, enabled=amp is not None)
        trained = [p for p in model.mask_decoder.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            trained, lr=options.lr, weight_decay=options.weight_decay, fused=True
        )
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer, factor=PLATEAU_FACTOR, patience=PLATEAU_PATIENCE
        )
        # GradScaler skips steps with non-finite gradients; in fp16 it also lowers its scale.
        scaler = make_scaler(device, amp)
        average = MovingAverage(model.mask_decoder, options.ema)
        progress = Progress(optimizer, scaler)
        checkpoint = Checkpoint(
            folder / runs.LAST,
            mask_decoder=model.mask_decoder,
            optimizer=optimizer,
            scheduler=scheduler,
            scaler=scaler,
            average=average,
            progress=progress,
        )
        intervals = Intervals(CHECK_SECONDS if on_gpu else 0, SAVE_SECONDS)
        nonfinite = folder / runs.NONFINITE
        log = stack.enter_context(contextlib.closing(RunLog(folder, tensorboard)))
        stack.enter_context(explain_out_of_memory(memory_advice(options)))
        stack.enter_context(checkpoint.saved_on_interrupt())

        readers = reading_threads(device)
        targets = TargetStore(options.loss_resolution)  # of the slices that were read

        def load(step: list[Slice]):
            return load_step(step, embeddings, targets, pin_memory=on_gpu)

        def save_best(row: dict) -> None:
            if rank_zero:
                notes = {name: row[name] for name in ("epoch", "val_loss")}
                notes |= {"policy": options.policy}
                with average.in_place():
                    save_decoder(folder / runs.BEST, model, inputs.seen, **notes)

        if resume and checkpoint.load():
            where = f"going on at epoch {progress.epoch}, step {progress.step}"
            finished = progress.epoch > options.epochs
            distributed.print_once("already finished" if finished else where)
        else:
            row = {"epoch": 0, "train_loss": math.nan}  # the weights before training
            row |= validate(model, embeddings, targets, val_slices, options, autocast)
            row |= {"lr": options.lr, "skipped_steps": 0, "seconds": 0.0}
            row |= {"memory_gib": peak_gib(device)}
            progress.history.append(row)
            save_best(row)
            log.write(progress.history)
            distributed.print_once(epoch_line(row, options.epochs))

        # --- The training loop -------------------------------------------------------------------
        while (epoch := progress.epoch) <= options.epochs:
            epoch_started = time.monotonic() - progress.seconds
            steps = shuffled_steps(train_slices, epoch, options)
            batches = prefetch(load, steps[progress.step :], 2 * readers, readers)
            bar = progress_bar(
                batches, desc=f"epoch {epoch}", unit="step", total=len(steps), initial=progress.step
            )
            for batch in bar:
                # Perturb: every slice gets new boxes in every epoch, equations (1)-(8).
                boxes = [
                    training_boxes(entry, tight, areas, epoch, options)
                    for entry, tight, areas in zip(
                        batch.slices, batch.tight_boxes, batch.areas, strict=True
                    )
                ]
                # Decode, and go back through the loss (11), a part of the boxes at a time.
                optimizer.zero_grad(set_to_none=True)
                loss_sum = torch.zeros((), device=device)
                parts = decoder_parts(batch, boxes, embeddings, options.boxes_per_call)
                for part in accumulate(parts, decode):
                    with autocast:
                        logits = decode(part.embeddings, part.boxes)
                    losses = segmentation_loss(logits, part.targets)
                    scaler.scale(losses.sum() * batch.loss_weight).backward()
                    loss_sum += losses.detach().sum() * (batch.loss_weight > 0)
                # AdamW's weight decay stands for the penalty of (12).
                scaler.step(optimizer)
                scaler.update()
                average.update()  # --ema
                progress.add_step(loss_sum, batch.boxes_in_step)

                progress.seconds = time.monotonic() - epoch_started
                if epoch == progress.step == 1:
                    distributed.print_once(f"peak memory of the first step: {peak_memory(device)}")
                # Reading the loss makes the CPU wait for the GPU: it is read about once a second.
                stop, check, save = intervals.due()
                if check:
                    raise_if_not_finite(progress, steps, model.mask_decoder, nonfinite)
                    bar.set_postfix(loss=f"{progress.train_loss:.4f}", refresh=False)
                if stop:
                    raise Interrupted(stop)
                if save:
                    checkpoint.save()
            raise_if_not_finite(progress, steps, model.mask_decoder, nonfinite)

            row = {"epoch": epoch, "train_loss": progress.train_loss}
            with average.in_place():
                row |= validate(model, embeddings, targets, val_slices, options, autocast)
            row |= {"lr": optimizer.param_groups[0]["lr"], "skipped_steps": progress.skipped_steps}
            row |= {"seconds": time.monotonic() - epoch_started, "memory_gib": peak_gib(device)}
            if not math.isfinite(row["val_loss"]):
                raise UserError(
                    f"{folder}: the validation loss is {row['val_loss']} after epoch {epoch}; "
                    "start a new run with a smaller --lr or --amp off"
                )
            scheduler.step(row["val_loss"])
            best = progress.end_epoch(row)
            # The decoder first: a run stopped between two writes makes the same ones again.
            if best:
                save_best(row)
            checkpoint.save()
            log.write(progress.history)
            distributed.print_once(epoch_line(row, options.epochs, best))
        log.write(progress.history)
        if progress.best_epoch == 0:
            distributed.print_once(
                f"{folder}: never got better than the weights it started from, by its validation "
                f"loss; {runs.BEST} holds those; try a new run with a smaller --lr"
            )
        distributed.barrier()


# --- What the loop calls -------------------------------------------------------------------------
def shuffled_steps(slices: list[Slice], epoch: int, options: Namespace) -> list[list[Slice]]:
    """The slices of each step of an epoch, in an order that depends on seed and epoch alone."""
    order = np.random.default_rng((options.seed, epoch)).permutation(len(slices))
    size = options.batch
    return [[slices[i] for i in order[n : n + size]] for n in range(0, len(order), size)]


def constants() -> dict[str, float | str]:
    """The constants without an option, beside those of perturb.py, that a run depends on."""
    from utils.training import validation

    return {
        "PLATEAU_PATIENCE": PLATEAU_PATIENCE,
        "PLATEAU_FACTOR": PLATEAU_FACTOR,
        "VALIDATION_SHIFT": str(validation.SHIFT),
        "VALIDATION_SEED": validation.SEED,
    }


# --- The command line ----------------------------------------------------------------------------
def main(argv: list[str] | None = None) -> None:
    """The command line: --demo, a new run, --resume or --export."""
    parser = make_parser()
    args = parser.parse_args(argv)
    given = {key: value for key, value in parser.given(argv).items() if key not in COMMANDS}
    options = default_options(**given)
    work_dir = Path(args.work_dir)
    if args.run is not None and not is_file_name(args.run):
        raise UserError(
            f"--run: a name, not a path, got {args.run!r}; a run in another folder, as one policy "
            "of several, is --work-dir FOLDER --run NAME"
        )
    if args.export:
        if given or args.demo or args.resume or args.tensorboard or not args.run:
            raise UserError("--export: goes with --run NAME, --work-dir and --format alone")
        from utils.training.export import export_run

        return export_run(work_dir / args.run, Path(args.export), args.format)
    if args.format != "sam":
        raise UserError("--format: goes with --export")
    if args.average:
        other = given.keys() - {"device", "amp", "cache", "cache_dir", "boxes_per_call"}
        if other or args.demo or args.resume or args.tensorboard or not args.run:
            raise UserError("--average: goes with --run NAME, --work-dir and machine options alone")
        if distributed.under_torchrun():
            raise UserError("--average runs in one process; leave out torchrun")
        from utils.training.averaging import average_runs

        options.batch = 1
        average_runs(args.average, work_dir / args.run, options)
        return print("next: " + shell_command("python", "eval.py", "--runs", work_dir / args.run))
    if args.demo and (args.data or args.run or args.resume):
        raise UserError("--demo makes its own data and run: leave out --data, --run, --resume")
    if args.demo and distributed.under_torchrun():
        raise UserError("--demo runs in one process; leave out torchrun")
    if args.resume and not args.run:
        raise UserError("--resume: say which run, with --run NAME")
    if not (args.data or args.demo or args.resume):
        raise UserError("--data: give the folder(s) of preprocess_ct.py, or try --demo")
    if given.get("cache") == "off" and "cache_dir" in given:
        raise UserError("--cache-dir: --cache off keeps nothing; leave out one of the two")
    if args.tensorboard:
        from utils.training.log import require_tensorboard

        require_tensorboard()
    distributed.init()
    download = options.checkpoint == DOWNLOAD
    if download:
        from utils.training.inputs import fetch_weights

    folder = work_dir / ("demo" if args.demo else args.run or "")
    if args.resume:
        options = stored_options(folder)
        if download:
            given["checkpoint"] = weights_path(options.model, work_dir, "--checkpoint")
        from utils.training.resume import resumed_options

        options = resumed_options(folder, options, given)
    else:
        options.batch = options.batch or distributed.world_size()
        if download:
            options.checkpoint = weights_path(options.model, work_dir, "--checkpoint")
        if args.demo:
            options.epochs = given.get("epochs", DEMO_EPOCHS)
    print_clamped(options)
    if download:
        fetch_weights(options)
    if args.demo:
        return demo(options, folder, args.tensorboard)

    from utils.training.runs import new_folder

    with contextlib.ExitStack() as stack:
        if not args.run:
            name = f"{datetime.now():%Y%m%d-%H%M%S}-{options.policy}"
            folder = stack.enter_context(new_folder(work_dir, name))
        try:
            train_policies(options, folder, args.resume, args.tensorboard)
        except KeyboardInterrupt as stop:
            message = str(stop) or "interrupted"
            if (folder / CONFIG).is_file():
                size = distributed.world_size()
                launcher = f"torchrun --nproc-per-node {size} --" if size > 1 else "python"
                script = ("train_adaptive.py", "--work-dir", args.work_dir, "--run", folder.name)
                message += f"; go on with: {launcher} {shell_command(*script)} --resume"
            raise Interrupted(getattr(stop, "signal", signal.SIGINT), message) from None
    command = ("python", "eval.py", "--runs", folder, *cache_words(options))
    distributed.print_once("next: " + shell_command(*command))


def print_clamped(options: Namespace) -> None:
    """Print which factors are out of bounds.

    Raises:
        UserError: a factor has the wrong sign.
    """
    from utils.training.boxes import perturbation_of

    for policy in options.policy.split(","):
        used = perturbation_of(Namespace(**{**vars(options), "policy": policy}))
        for name in ("delta_expand", "epsilon_shrink"):
            value, clamped = getattr(options, name), getattr(used, name)
            if value not in (None, clamped):
                distributed.print_once(
                    f"{name} {value:g} px is out of bounds: clamped to {clamped:g} px"
                )


def cache_words(options: Namespace) -> list[str]:
    """The options of eval.py by which it finds the embeddings where this run does."""
    if options.cache == "off":
        return ["--cache", "off"]
    return ["--cache-dir", options.cache_dir] if options.cache_dir else []


def train_policies(
    options: Namespace,
    folder: Path,
    resume: bool = False,
    tensorboard: bool = False,
) -> None:
    """Train the policy of `options`, or several (comma-separated) each in folder/<policy>/.

    Raises:
        UserError, Interrupted: as `train`.
    """
    from utils.training import runs
    from utils.training.inputs import open_inputs
    from utils.training.resume import start_or_resume

    policies = options.policy.split(",")
    if len(policies) == 1:
        return train(options, folder, resume, tensorboard)
    facts = open_inputs(options).facts
    # A signal between two policies would be lost if it were not deferred.
    with contextlib.ExitStack() as stack, signals.deferred():
        distributed.rank_zero_first(lambda: stack.enter_context(runs.claim(folder)))
        start_or_resume(folder, options, resume, **facts)
        for policy in policies:
            signals.raise_if_pending()
            # Rank 0 answers for all: it may have made the folder before another process looks.
            started = distributed.broadcast((folder / policy / CONFIG).is_file())
            one_policy = Namespace(**{**vars(options), "policy": policy})
            train(one_policy, folder / policy, resume and started, tensorboard)


def demo(options: Namespace, folder: Path, tensorboard: bool = False) -> None:
    """The whole path on synthetic CT: make it, preprocess, fine-tune, evaluate before and after."""
    import eval as evaluation
    from preprocess_ct import preprocess
    from utils.data.flare22 import FLARE22_LABELS
    from utils.data.synthetic import write_patients
    from utils.model.segmenter import load_model
    from utils.system.device import choose_device

    started = time.monotonic()
    load_model(options.model, options.checkpoint, choose_device(options.device))
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
    write_patients(folder / "ct", DEMO_PATIENTS, DEMO_SLICES, options.seed)
    volumes = (folder / "ct" / "images", folder / "ct" / "labels")
    preprocess(*volumes, slices, label_names=FLARE22_LABELS, split=DEMO_SPLIT)
    options.data = [str(slices.resolve())]
    train_policies(options, folder / "run", tensorboard=tensorboard)
    # Less than eval.py's defaults: the curve and the other shifts take minutes.
    evaluation.main(
        [
            *("--runs", str(folder / "run"), "--out", str(folder / "eval")),
            *("--shift", "15%", "--no-sweep", "--device", options.device, *cache_words(options)),
        ]
    )
    print(
        f"The demo took {(time.monotonic() - started) / 60:.1f} minutes. The table above is of "
        "SYNTHETIC slices that a program drew.\n"
        f"look at {folder / 'eval' / 'report.html'}\n"
        "next, on real CT, with MedSAM's weights:\n"
        "  python preprocess_ct.py --download flare22 --out data/flare22 --split 0.7,0.1,0.2\n"
        "  python train_adaptive.py --data data/flare22 --model medsam_vit_b --checkpoint download"
    )


def default_options(**given: object) -> Namespace:
    """The options of a run: those given, and the defaults of the others."""
    options = vars(make_parser().parse_args([])) | given
    return Namespace(**{key: value for key, value in options.items() if key not in COMMANDS})


def stored_options(folder: Path) -> Namespace:
    """The options that a run was started with; see `read_options`."""
    return read_options(folder, make_parser(), vars(default_options()))


# fmt: off
def make_parser() -> Parser:
    """The options, declared once with their defaults; a run stores those not in COMMANDS."""
    parser = Parser(
        description="Fine-tune the mask decoder of MedSAM, LiteMedSAM or SAM on perturbed boxes."
    )
    add = parser.add_argument_group("what to train on what").add_argument
    add("--data", nargs="+", type=absolute_path, metavar="DIR",
        help="folder(s) of preprocess_ct.py")
    add("--model", default="lite_medsam", metavar="NAME",
        help="lite_medsam, medsam_vit_b or sam_vit_b|l|h")
    add("--checkpoint", type=checkpoint_path, metavar="PTH",
        help="weights to start from: the full weights, or a decoder_best.pth; download fetches "
             "MedSAM's or SAM's into WORK_DIR (default: LiteMedSAM's, which its package holds)")
    add("--demo", action="store_true", help="everything on synthetic CT, in minutes")

    add = parser.add_argument_group("training boxes (the constants are in perturb.py)").add_argument
    add("--policy", default="adaptive", type=policy_names, metavar="NAME[,NAME]",
        help=f"perturbation of the boxes, one or several: {', '.join(perturb.POLICIES)}")
    add("--reading", default=perturb.READING, choices=tuple(perturb.READINGS),
        help="of theta_omega, which the paper leaves open: box width / image width, the cosine "
             "similarity of mask and image, or the share of the image that the mask covers")
    add("--delta-expand", type=number(-1e6, 1e6), metavar="PX",
        help="outward bound, px of the 1024 frame for theta_omega = 1: with --reading width, "
             f"102.4 is 10 %% of the side of any box {factor_defaults('delta_expand')}")
    add("--epsilon-shrink", type=number(-1e6, 1e6), metavar="PX",
        help=f"inward bound, in the same unit {factor_defaults('epsilon_shrink')}")
    add("--literal", action="store_true",
        help="equations (5)-(8) as they are printed: both corners move by one signed interval, so "
             "a negative epsilon enlarges the box at its top-left corner")

    add = parser.add_argument_group("optimisation: AdamW, ReduceLROnPlateau").add_argument
    add("--epochs", default=20, type=integer(1), metavar="N",
        help="passes over the training slices")
    add("--lr", default=1e-4, type=number(1e-12, 1), metavar="X", help="AdamW's learning rate")
    add("--weight-decay", default=0.01, type=number(0, 1), metavar="X",
        help="AdamW's, for lambda of (12)")
    add("--seed", default=0, type=integer(0), metavar="N", help="of boxes and order")
    add("--ema", nargs="?", default=0.0, const=EMA_DECAY, type=number(0, 0.999999), metavar="DECAY",
        help="validate and keep an exponential moving average of the decoder's weights, with this "
             f"decay per step ({EMA_DECAY} if none is given); training goes on with the weights "
             "themselves (default off)")
    add("--batch", type=integer(1), metavar="N",
        help="slices per step, over all processes of torchrun (default: one per process)")
    add("--loss-resolution", default=256, type=int, choices=(256, 1024),
        help="px at which the loss is taken: 256, the decoder's own, or 1024, MedSAM's way; the "
             "targets stay in memory once they were read, at most 1 GiB in each process")

    add = parser.add_argument_group("machine").add_argument
    add("--device", default="auto", metavar="NAME",
        help="cuda, cuda:N, cpu or auto, which is cuda or else cpu; mps is Apple's GPU, in fp32: "
             "nothing has run on one yet")
    add("--amp", default="auto", choices=("auto", "fp16", "bf16", "off"),
        help="mixed precision; auto is fp16 on cuda and off elsewhere")
    add("--boxes-per-call", default=16, type=integer(1), metavar="N",
        help="most boxes in one decoder call: fewer take less memory, the result is the same")
    add("--cache", default="on", choices=("on", "off"),
        help="keep the embeddings, 2 MiB per slice, beside the slices; off encodes each slice in "
             "every epoch")
    add("--cache-dir", type=absolute_path, metavar="DIR",
        help="folder for the embeddings, where that of the data cannot be written to (default: "
             "DATA/embeddings)")
    add("--deterministic", action="store_true",
        help="ask CUDA for the same bits every time, which is slower (how much was not measured); "
             "a CPU gives them anyway")

    add = parser.add_argument_group("the run's folder, WORK_DIR/NAME/").add_argument
    add("--work-dir", default="work_dir", metavar="DIR")
    add("--run", metavar="NAME", help="name of the run (default: date, time and policy)")
    add("--resume", action="store_true",
        help="go on with --run NAME, with its own options; --epochs, --device, --amp, --cache, "
             "--cache-dir, --boxes-per-call and, if it was moved, --data may be others")
    add("--tensorboard", action="store_true",
        help="also write WORK_DIR/NAME/tensorboard/, if TensorBoard is installed")
    add("--average", nargs="+", metavar="RUN",
        help="write the mean of the decoders of these runs (their folders), which started from the "
             "same weights, to --run NAME: those that raise its DSC on the validation patients")
    add("--export", metavar="PTH",
        help="write the full weights of --run NAME to a new file, a state dict that "
             "segment-anything, MedSAM's inference or LiteMedSAM's loader takes; alone")
    add("--format", default="sam", choices=("sam", "transformers"),
        help="of --export; transformers is a folder for Hugging Face's SamModel and SamProcessor, "
             "with a model card (not of lite_medsam)")
    return parser
# fmt: on


if __name__ == "__main__":
    run(main)
