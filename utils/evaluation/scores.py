"""The scores of an evaluation, one row per model, instance and box: instances.csv and its means."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from utils.evaluation.statistics import Estimate, estimate
from utils.system.files import atomic_write

# Scores are 0 to 1; `box` is one of BOX_KINDS or "sweep", `shift` its size as in --shift.
COLUMNS = (
    *("model", "case", "slice", "label", "box", "shift", "draw"),
    *("pixels", "small", "dsc", "nsd", "leak", "error"),
)


class Scores:
    """Rows with the columns of instances.csv, kept by column."""

    def __init__(self, columns: dict[str, np.ndarray]) -> None:
        self._columns = columns

    @classmethod
    def of(cls, rows: Iterable[dict]) -> Scores:
        """From one dict a row; they are not kept, as there may be a million."""
        columns: dict[str, list] = {name: [] for name in COLUMNS}
        for row in rows:
            for name, values in columns.items():
                values.append(row[name])
        return cls({name: np.array(values) for name, values in columns.items()})

    @classmethod
    def join(cls, parts: Sequence[Scores], order: Sequence[tuple[str, int]]) -> Scores:
        """Scores of different slices together, in the order of their (case, slice)."""
        parts = [part for part in parts if len(part)]
        columns = {name: np.concatenate([part[name] for part in parts]) for name in COLUMNS}
        place = {key: number for number, key in enumerate(order)}
        keys = zip(columns["case"].tolist(), columns["slice"].tolist(), strict=True)
        chosen = np.argsort([place[key] for key in keys], kind="stable")
        return cls({name: column[chosen] for name, column in columns.items()})

    def __len__(self) -> int:
        return len(self._columns["model"])

    def __getitem__(self, column: str) -> np.ndarray:
        return self._columns[column]

    def where(self, population: str = "all", **values: object) -> Scores:
        """The rows whose columns have these values.

        Args:
            population: "all", "small" or "large": instances below or above the size that the
                evaluation calls small.
        """
        chosen = np.ones(len(self), bool)
        for column, value in values.items():
            chosen &= self[column] == value
        if population != "all":
            chosen &= self["small"] == (population == "small")
        if chosen.all():
            return self
        return Scores({name: column[chosen] for name, column in self._columns.items()})

    def group(self, *columns: str) -> dict[tuple, Scores]:
        """The rows of each combination of values that there is of these columns."""
        rows: dict[tuple, list[int]] = {}
        keys = zip(*(self[column].tolist() for column in columns), strict=True)
        for row, key in enumerate(keys):
            rows.setdefault(key, []).append(row)
        return {
            key: Scores({name: column[chosen] for name, column in self._columns.items()})
            for key, chosen in rows.items()
        }

    def distinct(self, column: str) -> list:
        """The different values of a column, in order of appearance."""
        return list(dict.fromkeys(self[column].tolist()))

    def count(self, *columns: str) -> int:
        """How many different values the rows have in these columns together."""
        return len(set(zip(*(self[column].tolist() for column in columns), strict=True)))

    def populations(self, *names: str) -> dict[str, Scores]:
        """The instances of each named population that has some, but is not just all of them."""
        found = {name: self.where(name) for name in names}
        return {
            name: part for name, part in found.items() if name == "all" or 0 < len(part) < len(self)
        }

    @property
    def patients(self) -> int:
        """How many patients there are."""
        return self.count("case")

    @property
    def instances(self) -> int:
        """How many instances: labels in slices."""
        return self.count("case", "slice", "label")

    def mean(self, score: str) -> Estimate:
        """The mean of a score over the rows, with its bootstrap over patients.

        Raises:
            ValueError: there is no row.
        """
        return estimate(self[score], self["case"], self.instances)

    def by_instance(self, score: str) -> dict[tuple, float]:
        """The mean of a score for each (case, slice, label)."""
        found: dict[tuple, list[float]] = {}
        keys = zip(*(self[name].tolist() for name in ("case", "slice", "label")), strict=True)
        for key, value in zip(keys, self[score].tolist(), strict=True):
            found.setdefault(key, []).append(value)
        return {key: float(np.mean(values)) for key, values in found.items()}

    def write(self, path: Path) -> None:
        """Write instances.csv."""
        with atomic_write(path, "w") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(COLUMNS)
            writer.writerows(zip(*(self._text(name) for name in COLUMNS), strict=True))

    def _text(self, name: str) -> Sequence:
        values = self[name]
        return (values.astype(int) if values.dtype == bool else values).tolist()
