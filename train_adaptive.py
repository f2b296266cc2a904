"""Fine-tune the mask decoder of MedSAM, LiteMedSAM or SAM on perturbed boxes.

    python train_adaptive.py --demo                                 synthetic CT, a few minutes
    python train_adaptive.py --data data/flare22 --model medsam_vit_b \\
        --checkpoint work_dir/medsam_vit_b.pth --policy adaptive --run flare22-adaptive
    python train_adaptive.py --run flare22-adaptive --resume        resume that run
    python train_adaptive.py --data data/flare22 --policy medsam,bidirectional,scaled,adaptive \\
        --run ablation                                              one run per policy
    python train_adaptive.py --data data/flare22 --policy recommended --ema --run flare22
                                        three trainings, and the mean of their decoders
    python train_adaptive.py --average work_dir/ablation work_dir/mixed --run mean
                                        the mean of the decoders that improve it
    python train_adaptive.py --run flare22-adaptive --export medsam_adaptive.pth
                                        its full weights, for SAM's, MedSAM's, LiteMedSAM's programs

    torchrun --nproc-per-node 2 -- train_adaptive.py ...            on several GPUs

The image encoder and the prompt encoder stay frozen. A step is one slice with all its organs,
each with its own freshly perturbed box (--batch: several slices). utils/training/runs.py describes
the folder of a run, work_dir/<run>/; eval.py and --checkpoint take its decoder_best.pth. Several
policies are trained one after another in work_dir/<run>/<policy>/, from the same weights, on the
same embeddings, in the same order and with the same seeds: only the boxes differ.
"""

from utils.training.options import parse_options

if __name__ == "__main__":  # before the imports that take seconds, so that --help is quick
    options = parse_options()

import contextlib
import math
import shutil
import signal
import time
from argparse import Namespace
from collections.abc import Sequence
from datetime import datetime
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.optim.swa_utils import AveragedModel

import eval as evaluation
import preprocess_ct
from utils.data.slices import Slice, SliceDataset, open_datasets
from utils.data.synthetic import MARKER, write_patients
from utils.model.embeddings import Embeddings
from utils.model.export import export_transformers, export_weights
from utils.model.graphs import GraphedDecoder
from utils.model.segmenter import load_model, save_decoder
from utils.system import UserError, distributed, plural, signals
from utils.system.command_line import run, shell_command
from utils.system.device import (
    be_deterministic,
    choose_device,
    explain_out_of_memory,
    free_memory,
    keep_freed_memory,
    mixed_precision,
    peak_gib,
    reading_threads,
)
from utils.system.downloads import DOWNLOAD, WEIGHTS, fetch, weights_path
from utils.system.files import atomic_write
from utils.system.loops import prefetch, progress_bar
from utils.system.signals import Interrupted
from utils.training import runs
from utils.training.averaging import average_runs
from utils.training.batches import TargetStore, chunks, load_batch, training_boxes
from utils.training.checkpoint import Checkpoint, Intervals, Progress
from utils.training.log import epoch_line, require_tensorboard, write_log
from utils.training.losses import segmentation_loss
from utils.training.options import CONFIG, RECOMMENDED, clamping, perturbation_of, policies_of
from utils.training.validation import decoder_in_place, update_average, validate

# --- Constants without an option -----------------------------------------------------------------
PLATEAU_PATIENCE = 2  # epochs; torch's default of 10 would hardly act within 20
PLATEAU_FACTOR = 0.1
SAVE_SECONDS = 300  # between two checkpoints within an epoch
CHECK_SECONDS = 1  # between two checks of the loss: reading it makes the CPU wait for a GPU
MEMORY_ADVICE = (
    "go on with --resume and fewer --boxes-per-call, or start a new run with --loss-resolution "
    "256, --amp fp16 on a GPU, or --device cpu"
)
DEMO_PATIENTS = 12
DEMO_SLICES = 3  # per patient
DEMO_SPLIT = ",".join(map(str, (8 / 12, 2 / 12, 2 / 12)))


def train(options: Namespace, folder: Path) -> None:
    """Train one policy in `folder`, from the start or, with `resume`, from where the run was.

    Raises:
        UserError: bad input, a folder in use, a run that is not what it was, or no memory left.
        Interrupted: Ctrl-C or SIGTERM; everything until the last finished step is saved.
    """
    if options.deterministic:
        be_deterministic()
    device = choose_device(distributed.local_device(options.device))
    amp = mixed_precision(options.amp, device)
    datasets = sorted(open_datasets(options.data), key=lambda dataset: dataset.name)
    train_slices, val_slices = (split_slices(datasets, part) for part in ("train", "val"))
    if device.type == "cpu":
        keep_freed_memory()
    model = load_model(options.model, options.checkpoint, device)
    perturbation = perturbation_of(options)
    seen, warning = runs.seen_by_training(options.checkpoint, model, datasets)
    record = runs.run_record(options, datasets, model, amp)
    autocast = torch.autocast(device.type, amp, enabled=amp is not None)
    readers = reading_threads(device)

    with contextlib.ExitStack() as stack:
        stack.enter_context(signals.deferred())
        distributed.on_rank_zero(stack.enter_context, runs.claim(folder))
        distributed.on_rank_zero(runs.start_or_resume, folder, options, record)
        stack.enter_context(explain_out_of_memory(MEMORY_ADVICE))
        distributed.print_once(
            f"{folder}: {options.model} on {device}, policy {options.policy}, "
            f"{len(train_slices)} training and {len(val_slices)} validation slices"
        )
        if warning:
            distributed.print_once(warning)
        cache = (options.cache == "on", options.cache_dir)
        embeddings = Embeddings(model, train_slices + val_slices, *cache, keep=True)
        targets = TargetStore(options.loss_resolution)
        load = partial(
            load_batch, embeddings=embeddings, targets=targets, pin_memory=device.type == "cuda"
        )
        free_memory(device)

        trained = [p for p in model.mask_decoder.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            trained, lr=options.lr, weight_decay=options.weight_decay, fused=True
        )
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer, factor=PLATEAU_FACTOR, patience=PLATEAU_PATIENCE
        )
        scaler = torch.amp.GradScaler(device.type, enabled=amp == torch.float16)
        average_fn = partial(update_average, options.ema)
        ema = AveragedModel(model.mask_decoder, multi_avg_fn=average_fn) if options.ema else None
        progress = Progress(device)
        decode = model.decode_batch
        if options.cuda_graphs:
            most = max(len(sample.labels) for sample in train_slices)
            decode = GraphedDecoder(model, min(most, options.boxes_per_call), amp)
        checkpoint = Checkpoint(
            folder / runs.LAST,
            progress,
            mask_decoder=model.mask_decoder,
            optimizer=optimizer,
            scheduler=scheduler,
            scaler=scaler,
            **({"ema": ema} if ema else {}),
        )
        stack.enter_context(checkpoint.saved_on_interrupt())
        if options.resume and checkpoint.load():
            where = f"resuming at epoch {progress.epoch}, step {progress.step}"
            finished = progress.epoch > options.epochs
            distributed.print_once("already finished" if finished else where)

        # --- The training loop. Epoch 0 validates the weights before training. -------------------
        intervals = Intervals(CHECK_SECONDS, SAVE_SECONDS)
        for epoch in range(progress.epoch if progress.history else 0, options.epochs + 1):
            epoch_started = time.monotonic() - progress.seconds
            steps = shuffled_steps(train_slices, epoch, options) if epoch else []
            shares = [distributed.shard(step) for step in steps[progress.step :]]
            bar = progress_bar(
                prefetch(load, shares, 2 * readers, readers),
                desc=f"epoch {epoch}",
                unit="step",
                total=len(steps),
                initial=progress.step,
            )
            for batch in bar:
                # Perturb: new boxes for every slice in every epoch, (1)-(8) of perturb.py.
                boxes = [
                    training_boxes(*sample, perturbation, options.seed, epoch)
                    for sample in zip(batch.samples, batch.tight_boxes, batch.areas, strict=True)
                ]
                # Decode, and go back through the loss (11), a chunk of the boxes at a time.
                boxes_in_step = sum(len(sample.labels) for sample in steps[progress.step])
                optimizer.zero_grad(set_to_none=True)
                for chunk in chunks(batch, boxes, embeddings, options.boxes_per_call):
                    with autocast:
                        logits = decode(chunk.embeddings, chunk.boxes)
                    losses = segmentation_loss(logits, chunk.targets)
                    scaler.scale(losses.sum() / boxes_in_step).backward()
                    progress.loss_sum += losses.detach().sum()
                # AdamW's weight decay stands for the penalty of (12).
                distributed.sum_gradients(trained)
                scaler.step(optimizer)
                scaler.update()
                if ema:
                    ema.update_parameters(model.mask_decoder)

                progress.boxes += boxes_in_step
                progress.step += 1
                progress.seconds = time.monotonic() - epoch_started
                if epoch == progress.step == 1:
                    peak = f"{peak_gib(device):.2f} GiB"
                    distributed.print_once(f"peak memory of the first step: {peak}")
                stop, check, save = intervals.due()
                if check:
                    bar.set_postfix(loss=f"{progress.mean_loss():.4f}", refresh=False)
                if stop:
                    raise Interrupted(stop)
                if save:
                    checkpoint.save()

            row = {"epoch": epoch, "train_loss": progress.mean_loss() if epoch else math.nan}
            with decoder_in_place(model, ema.module if ema and epoch else model.mask_decoder):
                row |= validate(model, embeddings, targets, val_slices, options, amp)
                row |= {"lr": optimizer.param_groups[0]["lr"]}
                row |= {"seconds": time.monotonic() - epoch_started, "memory_gib": peak_gib(device)}
                if epoch:
                    scheduler.step(row["val_loss"])
                best = progress.end_epoch(row)
                # The decoder first: a run stopped between two writes makes the same ones again.
                if best and distributed.rank() == 0:
                    notes = {"epoch": epoch, "val_loss": row["val_loss"], "policy": options.policy}
                    save_decoder(folder / runs.BEST, model, seen, **notes)
            if epoch:
                checkpoint.save()
            distributed.on_rank_zero(write_log, folder, progress.history, options.tensorboard)
            distributed.print_once(epoch_line(row, options.epochs, best))
        distributed.on_rank_zero(write_log, folder, progress.history, options.tensorboard)
        if progress.best_epoch == 0:
            distributed.print_once(
                f"{folder}: its validation loss never fell below that of the starting weights, "
                f"which {runs.BEST} holds; try a new run with a smaller --lr"
            )


# --- What the loop calls -------------------------------------------------------------------------
def split_slices(datasets: Sequence[SliceDataset], part: str) -> list[Slice]:
    """The slices of "train" or "val" of all data sets.

    Raises UserError: a data set has no slice to train on, or none has one to validate on.
    """
    for dataset in datasets:
        others = datasets if part == "val" else [dataset]
        if not any(other.split(part) for other in others):
            raise UserError(
                f"{dataset.folder}: no slice in the {part} split; preprocess with more cases or "
                "another --split"
            )
    return [sample for dataset in datasets for sample in dataset.split(part)]


def shuffled_steps(samples: Sequence[Slice], epoch: int, options: Namespace) -> list[list[Slice]]:
    """The slices of each step of an epoch, in an order that depends on seed and epoch alone."""
    order = np.random.default_rng((options.seed, epoch)).permutation(len(samples))
    size = options.batch
    return [[samples[i] for i in order[n : n + size]] for n in range(0, len(order), size)]


# --- The command line ----------------------------------------------------------------------------
def main(options: Namespace) -> None:
    """A new or resumed run, or --demo, --average, --export; Interrupted says how to go on."""
    work_dir = Path(options.work_dir)
    folder = work_dir / (options.run or "")
    if options.export:
        return export_run(folder, Path(options.export), options.format)
    if (options.average or options.demo) and signals.under_torchrun():
        raise UserError("--average and --demo run in one process; leave out torchrun")
    if options.average:
        average_runs(options.average, folder, options)
        return print("next: " + shell_command("python", "eval.py", "--runs", folder))
    if options.policy == RECOMMENDED and signals.under_torchrun():
        policies = ",".join(policies_of(options.policy))
        raise UserError(
            f"--policy {RECOMMENDED} averages in one process; give --policy {policies}, then "
            "--average without torchrun"
        )
    if options.tensorboard:
        require_tensorboard()
    distributed.init()
    report_clamping(options)
    if options.cuda_graphs and choose_device(options.device).type == "cpu":
        raise UserError("--cuda-graphs: needs a GPU; leave it out")
    if options.checkpoint == DOWNLOAD:
        open_datasets(options.data or [])  # before gigabytes are fetched
        options.checkpoint = weights_path(options.model, work_dir, "--checkpoint")
        distributed.on_rank_zero(fetch, WEIGHTS[options.model], work_dir)
    if options.demo:
        return demo(options, work_dir / "demo")
    if not options.run:
        name = f"{datetime.now():%Y%m%d-%H%M%S}-{options.policy}"
        folder = work_dir / distributed.broadcast(name)
    try:
        train_policies(options, folder)
    except KeyboardInterrupt as stop:
        message = str(stop) or "interrupted"
        if (folder / CONFIG).is_file():
            size = distributed.world_size()
            launcher = f"torchrun --nproc-per-node {size} --" if size > 1 else "python"
            script = ("train_adaptive.py", "--work-dir", options.work_dir, "--run", folder.name)
            message += f"; go on with: {launcher} {shell_command(*script)} --resume"
        raise Interrupted(getattr(stop, "signal", signal.SIGINT), message) from None
    command = ("python", "eval.py", "--runs", folder, *cache_words(options))
    distributed.print_once("next: " + shell_command(*command))
    distributed.leave()


def report_clamping(options: Namespace) -> None:
    """Print which factors are out of bounds; UserError if one has the wrong sign."""
    for policy in policies_of(options.policy):
        used = perturbation_of(Namespace(**{**vars(options), "policy": policy}))
        for line in clamping(options, used):
            distributed.print_once(line)


def cache_words(options: Namespace) -> list[str]:
    """The options of eval.py by which it finds the embeddings where this run does."""
    if options.cache == "off":
        return ["--cache", "off"]
    return ["--cache-dir", options.cache_dir] if options.cache_dir else []


def train_policies(options: Namespace, folder: Path) -> None:
    """`train` the policy of `options`, or several each in folder/<policy>/.

    Those of `recommended` are averaged in folder/recommended/.
    """
    policies = policies_of(options.policy)
    if len(policies) == 1:
        return train(options, folder)
    # What is wrong with the options is found before the folder is made.
    mixed_precision(options.amp, choose_device(distributed.local_device(options.device)))
    split_slices(open_datasets(options.data), "train")
    load_model(options.model, options.checkpoint, "cpu")
    # A signal between two policies would be lost if it were not deferred.
    with contextlib.ExitStack() as stack:
        stack.enter_context(signals.deferred())
        distributed.on_rank_zero(stack.enter_context, runs.claim(folder))
        distributed.on_rank_zero(runs.start_or_resume, folder, options, {})
        for number, policy in enumerate(policies, start=1):
            signals.raise_if_pending()
            distributed.print_once(f"training {number} of {len(policies)}: {policy}")
            # Rank 0 answers for all: it may have made the folder before another process looks.
            started = distributed.on_rank_zero((folder / policy / CONFIG).is_file)
            resume = options.resume and started
            one = Namespace(**{**vars(options), "policy": policy, "resume": resume})
            train(one, folder / policy)
        if options.policy == RECOMMENDED:
            ingredients, mean = [folder / policy for policy in policies], folder / RECOMMENDED
            shutil.rmtree(mean, ignore_errors=True)  # of fewer epochs, before a resume
            average_runs(ingredients, mean, options, policy=RECOMMENDED)


def export_run(folder: Path, path: Path, form: str) -> None:
    """Write a run's weights to the new `path`, in the form "sam" or "transformers"."""
    run, *others = runs.find_runs([folder])
    if others or run.folder != folder:
        raise UserError(
            f"{folder}: holds several runs; export one, with --work-dir {folder} --run POLICY"
        )
    if not run.average_of and run.epochs < run.options["epochs"]:
        print(f"{folder}: trained for {run.epochs} of {run.options['epochs']} epochs so far")
    model = load_model(run.options["model"], run.decoder, "cpu")
    if form == "transformers":
        export_transformers(model, path, run.config, run.scores)
    else:
        export_weights(model, path)


def demo(options: Namespace, folder: Path) -> None:
    """The whole path on synthetic CT: make it, preprocess, fine-tune, evaluate before and after."""
    started = time.monotonic()
    load_model(options.model, options.checkpoint, choose_device(options.device))
    marker = folder / MARKER
    if folder.exists() and not marker.exists():
        raise UserError(f"{folder}: is not an earlier demo; choose another --work-dir")
    shutil.rmtree(folder, ignore_errors=True)
    with atomic_write(marker, "w") as file:
        file.write("Made by train_adaptive.py --demo; the next demo removes this folder.\n")
    print(f"1/4 {DEMO_PATIENTS} patients of SYNTHETIC CT, generated by a program: a few seconds")
    slices = folder / "synthetic"
    write_patients(folder / "ct", DEMO_PATIENTS, DEMO_SLICES, options.seed)
    words = ("--images", folder / "ct" / "images", "--labels", folder / "ct" / "labels")
    words += ("--out", slices, "--label-names", "flare22", "--window", "medsam")
    words += ("--split", DEMO_SPLIT)
    print("2/4 converting volumes to slices: a few seconds")
    preprocess_ct.preprocess(preprocess_ct.parse_options(list(map(str, words))))
    options.data = [str(slices.resolve())]
    epochs = plural(options.epochs, "epoch")
    print(f"3/4 fine-tuning LiteMedSAM, {epochs}: one to two minutes on two CPU cores")
    train_policies(options, folder / "run")
    print("4/4 evaluating before and after, under three kinds of box: about a minute")
    # Less than eval.py's defaults: the curve and the other shifts take minutes.
    words = ("--runs", folder / "run", "--out", folder / "eval", "--shift", "15%", "--no-sweep")
    words = [*map(str, words), "--device", options.device, *cache_words(options)]
    evaluation.main(evaluation.parse_options(words))
    tested = open_datasets(options.data)[0].split("test")[0].case
    scan = folder / "ct" / "images" / f"{tested}_0000.nii.gz"
    print(
        f"SCAN is, for example, {scan}; --draw needs one more package: pip install werkzeug\n"
        f"the demo took {(time.monotonic() - started) / 60:.1f} minutes; "
        f"open {folder / 'eval' / 'report.html'} in a browser\n"
        "next, your own CT with label maps: "
        "python preprocess_ct.py --input DIR --window medsam --out data/mine"
    )


if __name__ == "__main__":
    run(main, options)
