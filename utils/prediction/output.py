"""What a prediction writes: label volumes, probabilities, pictures, and how all of it was made."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from utils.data.volumes import Volume, grey_levels, write_volume
from utils.prediction.scan import ScanPrediction
from utils.system.plotting import (
    COLUMN,
    ORANGE,
    SKY,
    add_legend,
    draw_box,
    draw_contours,
    new_figure,
    save_figure,
    show_square,
)

MOST_SLICES = 6  # in a picture


def write_prediction(
    folder: Path,
    case: str,
    image: Volume,
    window: tuple[float, float],
    prediction: ScanPrediction,
    ids: Mapping[str, int],
) -> dict:
    """Write the files of one scan.

    Args:
        folder: where to.
        case: the name of the scan.
        image: the scan, whose grid the volumes get.
        window: in which the pictures show it.
        prediction: of the scan.
        ids: by label, its id in the label volume.

    Returns:
        Its entry in predictions.json: files, ids, voxels per label, and boxes.

    Raises:
        UserError: a file cannot be written.
    """
    files = [f"{case}.nii.gz"]
    write_volume(folder / files[0], prediction.labels, image)
    for label, number in ids.items():
        name = file_name(case, label, number)
        if label in prediction.probabilities:
            files.append(f"{name}-probability.nii.gz")
            write_volume(folder / files[-1], prediction.probabilities[label], image)
        files.append(f"{name}.png")
        title = f"{case}: {label}"
        draw_label(image, window, prediction, label, number, title, folder / files[-1])
    return {
        "files": files,
        "image_sha256": image.sha256,
        "labels": {str(number): label for label, number in ids.items()},
        "voxels": {label: int((prediction.labels == ids[label]).sum()) for label in ids},
        "boxes": [
            {"label": label, "z": index, "box": [round(edge, 3) for edge in box], "given": given}
            for label, index, box, given in prediction.boxes
        ],
    }


def file_name(case: str, label: str, number: int) -> str:
    """<case>-<id>[-<name>], safe as a file's name and another one for every label."""
    name = "" if label == str(number) else "-" + re.sub(r"[^\w.+-]", "_", label)
    return f"{case}-{number}{name[:60]}"


def draw_label(
    image: Volume,
    window: tuple[float, float],
    prediction: ScanPrediction,
    label: str,
    number: int,
    title: str,
    path: Path,
) -> None:
    """Draw boxes and masks of one label in up to MOST_SLICES of its slices, evenly spread.

    Args:
        image: the scan, in LPS.
        window: (lowest, highest) HU, in which it is shown.
        prediction: of the scan.
        label, number: the label, and its id in the label volume.
        title: of the picture.
        path: of the PNG.
    """
    boxes = [(index, box, given) for name, index, box, given in prediction.boxes if name == label]
    indices = sorted({index for index, _, _ in boxes})
    chosen = [indices[n] for n in _evenly(len(indices), MOST_SLICES)]
    columns = min(3, len(chosen))
    rows = -(-len(chosen) // columns)
    figure = new_figure(max(COLUMN, 2.2 * columns), 2.4 * rows + 0.7)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in grid[len(chosen) :]:
        axes.set_axis_off()
    aspect = image.spacing_mm[1] / image.spacing_mm[2]
    corners = np.array([box for index, box, _ in boxes if index in chosen])
    low, high = corners[:, :2].min(axis=0), corners[:, 2:].max(axis=0)
    for axes, index in zip(grid, chosen, strict=False):
        grey = grey_levels(image.array[index], window)
        axes.imshow(grey, cmap="gray", vmin=0, vmax=255, aspect=aspect)
        axes.set_facecolor("black")  # beyond the image
        draw_contours(axes, prediction.labels[index] == number, color=ORANGE, linewidth=1)
        for of_slice, box, given in boxes:
            if of_slice == index:
                line = "--" if given else ":"
                draw_box(axes, np.array(box), edgecolor=SKY, linewidth=1, linestyle=line)
        show_square(axes, (low + high) / 2, 0.7 * (high - low).max() + 3)
        axes.set_title(f"z {index}", fontsize=7)
    figure.suptitle(title, fontsize=8)
    styles = [("box given", SKY, "--"), ("mask", ORANGE, "-")]
    if not all(given for _, _, given in boxes):
        styles.insert(1, ("box from the last mask", SKY, ":"))
    add_legend(figure, styles, fontsize=7)
    save_figure(figure, path)


def _evenly(count: int, most: int) -> list[int]:
    """At most `most` of `count` indices, evenly spread, the first and the last among them."""
    return sorted(set(np.linspace(0, count - 1, min(count, most)).round().astype(int).tolist()))
