"""The curves of a training run."""

from __future__ import annotations

from pathlib import Path

from utils.system.plotting import BLACK, BLUE, ORANGE, VERMILION, new_figure, save_figure


def draw_curves(history: list[dict], path: str | Path) -> None:
    """Loss and validation DSC against the epoch; `history` holds the rows of log.csv."""
    from matplotlib.ticker import MaxNLocator

    figure = new_figure(8, 3.4)
    loss, score = figure.subplots(1, 2)
    epochs = [row["epoch"] for row in history]
    loss.plot(epochs, [row["train_loss"] for row in history], "o-", color=BLUE, label="training")
    loss.plot(epochs, [row["val_loss"] for row in history], "s-", color=ORANGE, label="validation")
    loss.set_ylabel("loss (BCE + Dice)")
    styles = (("standard", "o-", BLACK), ("expansion", "s-", BLUE), ("shrink", "^-", VERMILION))
    for kind, marker, colour in styles:
        values = [100 * row[f"dsc_{kind}"] for row in history]
        score.plot(epochs, values, marker, color=colour, label=kind)
    score.set_ylabel("validation DSC, %")
    for axes in (loss, score):
        axes.set_xlabel("epoch (0: before training)")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    save_figure(figure, path)
