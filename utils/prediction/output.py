"""What a prediction writes: label volumes, probabilities, and pictures of boxes and masks."""

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

import numpy as np

from utils.data.volumes import grey_levels, write_volume
from utils.prediction.scan import (
    GIVEN,
    INTERPOLATED,
    PROPAGATED,
    Prompt,
    ScanPrediction,
    ScanSegmenter,
)
from utils.system import UserError, plotting
from utils.system.plotting import ORANGE, SKY

RECORD = "predictions.json"
WRITTEN = ("*.nii.gz", "*.png")  # by `write_prediction`
MAX_SLICES = 6  # in a picture
LINES = {GIVEN: "--", INTERPOLATED: "-.", PROPAGATED: ":"}  # of boxes


def label_ids(labels: Collection[str], known: Mapping[str, int]) -> dict[str, int]:
    """An id for every label, in their order: the number that it is, or that of its name in `known`.

    Where nothing is known, names have the free numbers from 1 in the order of the alphabet.

    Raises UserError: an unknown name, or one for which no number is left.
    """
    ids = {label: int(label) for label in labels if label.isdecimal()}
    names = sorted(set(labels) - ids.keys())
    free = (number for number in range(1, 256) if number not in ids.values())
    known = known or dict(zip(names, free, strict=False))
    if unknown := [name for name in names if name not in known]:
        raise UserError(
            f"--boxes: there is no label {unknown[0]!r}; choose from {', '.join(known)}, or give "
            "all names with --label-names"
        )
    ids |= {name: known[name] for name in names}
    return dict(sorted(ids.items(), key=lambda item: item[1]))


def write_prediction(
    folder: Path, case: str, segmenter: ScanSegmenter, prediction: ScanPrediction
) -> dict:
    """Write the files of one scan, on its grid; return its record in predictions.json.

    Raises UserError: a file cannot be written.
    """
    image, ids = segmenter.image, prediction.ids
    files = [f"{case}.nii.gz"]
    write_volume(folder / files[0], prediction.labels, image)
    for label, number in ids.items():
        name = file_name(case, label, number)
        if prediction.probabilities is not None:
            files.append(f"{name}-probability.nii.gz")
            write_volume(folder / files[-1], prediction.probabilities[label], image)
        files.append(f"{name}.png")
        draw_label(segmenter, prediction, label, f"{case}: {label}", folder / files[-1])
    return {
        "files": files,
        "image_sha256": image.sha256,
        **record_of(prediction.labels, ids, prediction.boxes),
    }


def record_of(labels: np.ndarray, ids: dict[str, int], prompts: Iterable[Prompt]) -> dict:
    """What predictions.json says of a label volume (z, y, x), its ids and its boxes."""
    # By slice, as bincount makes int64 of its input.
    voxels = sum(np.bincount(plane.ravel(), minlength=256) for plane in labels)
    return {
        "labels": {str(number): label for label, number in ids.items()},
        "voxels": {label: int(voxels[number]) for label, number in ids.items()},
        "boxes": boxes_of(prompts),
    }


def boxes_of(prompts: Iterable[Prompt]) -> list[dict]:
    """What predictions.json says of boxes."""
    return [
        {
            "label": box.label,
            "z": box.index,
            "box": np.round(box.box, 3).tolist(),
            "source": source,
        }
        for box, source in prompts
    ]


def file_name(case: str, label: str, number: int) -> str:
    """<case>-<id>[-<name>], safe as a file's name and another one for every label."""
    name = "" if label == str(number) else "-" + re.sub(r"[^\w.+-]", "_", label)
    return f"{case}-{number}{name[:60]}"


def draw_label(
    segmenter: ScanSegmenter, prediction: ScanPrediction, label: str, title: str, path: Path
) -> None:
    """Draw boxes and masks of one label in up to MAX_SLICES of its slices, evenly spread."""
    boxes = [(box, source) for box, source in prediction.boxes if box.label == label]
    indices = sorted({box.index for box, _ in boxes})
    spread = np.linspace(0, len(indices) - 1, min(len(indices), MAX_SLICES)).round().astype(int)
    chosen = [indices[n] for n in spread]
    columns = min(3, len(chosen))
    rows = -(-len(chosen) // columns)
    figure = plotting.new_figure(max(plotting.COLUMN, 2.2 * columns), 2.4 * rows + 0.7)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in grid[len(chosen) :]:
        axes.set_axis_off()
    image = segmenter.image
    aspect = image.spacing_mm[1] / image.spacing_mm[2]
    corners = np.array([box.box for box, _ in boxes if box.index in chosen])
    low, high = corners[:, :2].min(axis=0), corners[:, 2:].max(axis=0)
    for axes, index in zip(grid, chosen, strict=False):
        grey = grey_levels(image.array[index], segmenter.window)
        axes.imshow(grey, cmap="gray", vmin=0, vmax=255, aspect=aspect)
        axes.set_facecolor("black")  # beyond the image
        mask = prediction.labels[index] == prediction.ids[label]
        plotting.draw_contours(axes, mask, color=ORANGE, linewidth=1)
        for box, source in boxes:
            if box.index == index:
                style = {"edgecolor": SKY, "linewidth": 1, "linestyle": LINES[source]}
                plotting.draw_box(axes, box.box, **style)
        plotting.show_square(axes, (low + high) / 2, 0.7 * (high - low).max() + 3)
        axes.set_title(f"z {index}", fontsize=7)
    figure.suptitle(title, fontsize=8)
    sources = dict.fromkeys(source for _, source in boxes)
    styles = [*((f"box {source}", SKY, LINES[source]) for source in sources), ("mask", ORANGE, "-")]
    plotting.add_legend(figure, styles, fontsize=7)
    plotting.save_figure(figure, path)
