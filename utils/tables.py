"""Tables of an evaluation, from its rows per instance and box (the columns of instances.csv)."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from utils.files import atomic_write

COLUMNS = ("model", "case", "slice", "label", "box", "draw", "pixels", "dsc", "nsd")


def write_instances(path: Path, rows: Sequence[dict]) -> None:
    """Write instances.csv: one row per model, instance and box; scores in 0-1."""
    with atomic_write(path, "w") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def mean_score(rows: Sequence[dict], score: str, **where: object) -> float:
    """The mean over the rows whose columns have the values of `where`; NaN if there is none."""
    values = [row[score] for row in rows if all(row[key] == where[key] for key in where)]
    return float(np.mean(values)) if values else float("nan")


def shift_table(rows: Sequence[dict]) -> list[list[str]]:
    """The paper's Table I: a row a kind of box and their average, DSC and NSD in % per model."""
    models, boxes = distinct(rows, "model"), distinct(rows, "box")
    table = [["box"] + [f"{model} {score}" for model in models for score in ("DSC", "NSD")]]
    means = np.array(
        [
            [mean_score(rows, score, model=m, box=box) for m in models for score in ("dsc", "nsd")]
            for box in boxes
        ]
    )
    for name, line in zip((*boxes, "average"), (*means, means.mean(axis=0)), strict=True):
        table.append([name, *(f"{100 * value:.2f}" for value in line)])
    return table


def label_table(rows: Sequence[dict], score: str) -> list[list[str]]:
    """One score per label in %: a row a label, "standard / expansion / shrink" per model."""
    models, boxes = distinct(rows, "model"), distinct(rows, "box")
    table = [["label", "patients", "instances", *models]]
    for label in sorted(distinct(rows, "label")):
        chosen = [row for row in rows if row["label"] == label]
        line = [label, str(count(chosen, "case")), str(count(chosen, "case", "slice"))]
        for model in models:
            means = [mean_score(chosen, score, model=model, box=box) for box in boxes]
            line.append(" / ".join(f"{100 * mean:.1f}" for mean in means))
        table.append(line)
    return table


def distinct(rows: Sequence[dict], column: str) -> list[str]:
    """The different values of a column, in order of appearance."""
    return list(dict.fromkeys(row[column] for row in rows))


def count(rows: Sequence[dict], *columns: str) -> int:
    """How many different values the rows have in these columns together."""
    return len({tuple(row[column] for column in columns) for row in rows})


def markdown(table: list[list[str]]) -> str:
    """A table of strings, its first row the header, as aligned Markdown."""
    table = [[cell.replace("|", "\\|") for cell in row] for row in table]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in table
    ]
    rule = "|-" + "-|-".join("-" * width for width in widths) + "-|"
    return "\n".join([lines[0], rule, *lines[1:]])
