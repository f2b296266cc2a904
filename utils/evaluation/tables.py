"""Tables of results: DataFrames whose cells are text or estimates, as Markdown, CSV and LaTeX."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pandas as pd

from utils.evaluation.statistics import Estimate

# What LaTeX would not print as it is; longer symbols first.
LATEX = {
    "θ_ω": r"$\theta_\omega$",
    "δ_expand": r"$\delta_{expand}$",
    "ε_shrink": r"$\varepsilon_{shrink}$",
    "ξ": r"$\xi$",
    "✓": r"$\surd$",
    "±": r"$\pm$",
    "−": r"$-$",
    "–": "--",
    "<": r"$<$",
    ">": r"$>$",
    "\\": r"$\backslash$",
    **{character: "\\" + character for character in "%_&#{}$"},
    "^": r"\^{}",
    "~": r"\~{}",
}


@dataclass(frozen=True)
class Table:
    """A DataFrame and what its reader must know.

    Attributes:
        title: what it shows.
        how: how it was measured, and on how many patients.
        frame: its cells are text, or an `Estimate`, which is shown in %.
        notes: what else to know.
        digits: decimals of the estimates.
    """

    title: str
    how: str
    frame: pd.DataFrame
    notes: str = ""
    digits: int = 2


def markdown(table: Table) -> str:
    """The table under its title; intervals stand under their means."""
    parts = [f"### {escape_markdown(table.title)}", escape_markdown(table.how)]
    if len(table.frame):
        parts.append(_grid(table, lambda estimate: estimate.percent(table.digits, "<br>")))
    return "\n\n".join(part for part in (*parts, table.notes) if part)


def plain(table: Table) -> str:
    """The table for a terminal: without intervals and notes."""
    grid = _grid(table, lambda estimate: f"{100 * estimate.value:.{table.digits}f}")
    return f"{table.title} {table.how}\n\n{grid}"


def _grid(table: Table, show: Callable[[Estimate], str]) -> str:
    frame = table.frame
    text = frame.map(lambda cell: show(cell) if _measured(cell) else escape_markdown(cell))
    align = ["right" if frame[name].map(_is_number).all() else "left" for name in frame]
    return text.to_markdown(index=False, tablefmt="pipe", disable_numparse=True, colalign=align)


def csv(tables: Sequence[Table]) -> str:
    """Tables of the same columns as one CSV; an estimate X takes X, X low and X high, in %."""
    frame = pd.concat([table.frame for table in tables], ignore_index=True)
    columns = {}
    for name in frame:
        if frame[name].map(_measured).any():
            ends = [(one.value, *one.interval) for one in frame[name]]
            for number, suffix in enumerate(("", " low", " high")):
                columns[name + suffix] = [_csv_percent(end[number]) for end in ends]
        else:
            columns[name] = frame[name]
    return pd.DataFrame(columns).to_csv(index=False, lineterminator="\n")


def latex(table: Table) -> str:
    """A table environment; it needs the package booktabs."""

    def cell(value: str | Estimate) -> str:
        if not _measured(value):
            return escape_latex(value)
        mean, _, interval = value.percent(table.digits, "\n").partition("\n")
        return rf"\shortstack{{{mean}\\{{\scriptsize {interval}}}}}" if interval else mean

    frame = table.frame.map(cell).rename(columns=escape_latex)
    tabular = frame.to_latex(
        index=False, escape=False, column_format="l" + "r" * (frame.shape[1] - 1)
    )
    caption = escape_latex(" ".join((table.title, table.how, table.notes)).strip())
    return (
        f"% {table.title} (needs \\usepackage{{booktabs}})\n\\begin{{table}}\n\\centering\n"
        f"\\caption{{{caption}}}\n{tabular}\\end{{table}}\n"
    )


def escape_latex(text: str) -> str:
    """Text as LaTeX prints it, the paper's symbols in math."""
    return re.sub("|".join(map(re.escape, LATEX)), lambda match: LATEX[match[0]], text)


def escape_markdown(text: str) -> str:
    """Text in which nothing is Markdown or HTML: names of cases and labels may hold anything."""
    return re.sub(r"<(?=[A-Za-z/!?])", "&lt;", re.sub(r"([\\`*\[\]|])", r"\\\1", text))


def _is_number(cell: str | Estimate) -> bool:
    return _measured(cell) or cell.isdigit()


def _measured(cell: object) -> bool:
    return isinstance(cell, Estimate)


def _csv_percent(value: float) -> str:
    return "" if math.isnan(value) else f"{100 * value:.4f}"
