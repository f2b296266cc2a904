"""What to watch during a run: log.csv, curves.png, TensorBoard events, and a line per epoch."""

import math
import shutil
import sys
from pathlib import Path

import pandas as pd
from matplotlib.ticker import MaxNLocator

from perturb import BOX_KINDS
from utils.system import UserError
from utils.system.files import atomic_write
from utils.system.plotting import BLACK, BLUE, ORANGE, VERMILION, new_figure, save_figure
from utils.training.runs import CURVES, LOG, TENSORBOARD


def write_log(folder: Path, history: list[dict], tensorboard: bool = False) -> None:
    """Write all finished epochs, the rows of log.csv, to a run's folder.

    Windows cannot replace a file that another program, such as Excel, has open. It is then left as
    it is until the next epoch; the checkpoint holds the rows.
    """
    try:
        with atomic_write(folder / LOG, "w") as file:
            pd.DataFrame(history).to_csv(
                file, index=False, float_format="%.6g", na_rep="nan", lineterminator="\n"
            )
        draw_curves(history, folder / CURVES)
    except UserError as error:
        if not isinstance(error.__cause__, PermissionError):
            raise
        print(f"note: {error}; close the program that has it open", file=sys.stderr)
    if tensorboard:
        from torch.utils.tensorboard import SummaryWriter  # an optional package

        # A resumed run writes its epochs again; appended, they would be there twice.
        shutil.rmtree(folder / TENSORBOARD, ignore_errors=True)
        with SummaryWriter(str(folder / TENSORBOARD)) as events:
            for row in history:
                for name, value in row.items():
                    if name != "epoch" and not math.isnan(value):
                        events.add_scalar(name, value, row["epoch"])


def require_tensorboard() -> None:
    """Check that TensorBoard can be written. UserError: it is not installed."""
    try:
        import torch.utils.tensorboard  # noqa: F401  (an optional package)
    except ImportError:
        raise UserError("--tensorboard: needs TensorBoard; pip install tensorboard") from None


def epoch_line(row: dict, epochs: int, best: bool = False) -> str:
    """A row of log.csv as one line for the screen."""
    train_loss = "before training " if row["epoch"] == 0 else f"train {row['train_loss']:.4f}, "
    scores = " / ".join(f"{100 * row[f'dsc_{kind}']:.1f}" for kind in BOX_KINDS)
    return (
        f"epoch {row['epoch']}/{epochs}: {train_loss}val {row['val_loss']:.4f}, "
        f"val DSC {' / '.join(BOX_KINDS)} {scores} %, "
        f"lr {row['lr']:.0e}, {row['seconds']:.0f} s"
        + ("" if math.isnan(row["memory_gib"]) else f", {row['memory_gib']:.1f} GiB")
        + (" (best)" if best and row["epoch"] else "")
    )


def draw_curves(history: list[dict], path: Path) -> None:
    """Loss and validation DSC against the epoch; `history` holds the rows of log.csv."""
    figure = new_figure(8, 3.4)
    loss, score = figure.subplots(1, 2)
    rows = pd.DataFrame(history).set_index("epoch")
    losses, scores = rows[["train_loss", "val_loss"]], rows[[f"dsc_{kind}" for kind in BOX_KINDS]]
    losses.plot(ax=loss, style=["o-", "s-"], color=[BLUE, ORANGE])
    (100 * scores).plot(ax=score, style=["o-", "s-", "^-"], color=[BLACK, BLUE, VERMILION])
    loss.set_ylabel("loss (BCE + Dice)")
    score.set_ylabel("validation DSC, %")
    for axes in (loss, score):
        axes.set_xlabel("epoch (0: before training)")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    save_figure(figure, path)
