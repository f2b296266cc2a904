"""A table that knows its numbers' intervals, as Markdown, CSV, LaTeX and HTML."""

from __future__ import annotations

import csv
import html
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from utils.evaluation.statistics import Estimate

Cell = str | Estimate

# What LaTeX does not take as it is; longer symbols first.
_LATEX = {
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
    """A table of a report.

    Attributes:
        title: what it shows.
        how: how it was measured, and on how many.
        header: a name for each column.
        rows: cells; an `Estimate` is shown in %, with its interval.
        notes: what a reader must know beside.
        digits: decimals of the estimates.
    """

    title: str
    how: str
    header: list[str]
    rows: list[list[Cell]]
    notes: list[str] = field(default_factory=list)
    digits: int = 2

    def markdown(self) -> str:
        """The table alone, aligned; an interval stands under its mean."""
        return markdown(self._text("<br>"))

    def plain(self) -> str:
        """The table alone, aligned, without intervals: for the screen."""
        return markdown([[cell.partition("\n")[0] for cell in row] for row in self._text("\n")])

    def html(self) -> str:
        """The table alone, as an HTML element; an interval stands under its mean."""
        lines = []
        for number, row in enumerate(self._text("\n")):
            tag = "th" if number == 0 else "td"
            cells = []
            for cell in row:
                value, _, interval = html.escape(cell).partition("\n")
                cells.append(value + (f"<br><small>{interval}</small>" if interval else ""))
            lines.append("<tr>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in cells) + "</tr>")
        head, *body = lines
        return f"<table><thead>{head}</thead><tbody>{''.join(body)}</tbody></table>"

    def csv(self) -> str:
        """Comma-separated; an estimate takes three columns, in %: the mean, low and high."""
        estimates = [any(isinstance(row[c], Estimate) for row in self.rows) for c in self._columns]
        lines: list[list[str]] = [[]]
        for name, is_estimate in zip(self.header, estimates, strict=True):
            lines[0] += [name, f"{name} low", f"{name} high"] if is_estimate else [name]
        for row in self.rows:
            line: list[str] = []
            for cell, is_estimate in zip(row, estimates, strict=True):
                if isinstance(cell, Estimate):
                    values = (cell.value, *cell.interval)
                    line += ["" if math.isnan(v) else f"{100 * v:.4f}" for v in values]
                else:
                    line += [cell, "", ""] if is_estimate else [cell]
            lines.append(line)
        file = io.StringIO()
        csv.writer(file, lineterminator="\n").writerows(lines)
        return file.getvalue()

    def latex(self) -> str:
        """A table environment that needs no package."""
        lines = [
            "% " + self.title,
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{latex(self.title)} {latex(self.how)} {latex(' '.join(self.notes))}}}",
            rf"\begin{{tabular}}{{l{'r' * (len(self.header) - 1)}}}",
            r"\hline",
        ]
        for number, row in enumerate(self._text("\n")):
            cells = []
            for cell in row:
                value, _, interval = cell.partition("\n")
                value, interval = latex(value), latex(interval)
                if interval:
                    value = rf"\shortstack{{{value}\\{{\scriptsize {interval}}}}}"
                cells.append(value)
            lines.append(" & ".join(cells) + r" \\" + (r" \hline" if number == 0 else ""))
        lines += [r"\hline", r"\end{tabular}", r"\end{table}", ""]
        return "\n".join(lines)

    @property
    def _columns(self) -> range:
        return range(len(self.header))

    def _text(self, line_end: str) -> list[list[str]]:
        """The header and all cells as text, an interval after `line_end`."""
        body = [
            [
                show(cell, self.digits, line_end) if isinstance(cell, Estimate) else cell
                for cell in r
            ]
            for r in self.rows
        ]
        return [self.header, *body]


def show(estimate: Estimate, digits: int = 2, line_end: str = " ", sign: str = "") -> str:
    """An estimate in %: its mean and, if there are patients enough for one, its interval."""
    low, high = estimate.interval
    text = f"{100 * estimate.value:{sign}.{digits}f}"
    if math.isnan(low):
        return text
    return f"{text}{line_end}[{100 * low:{sign}.1f}, {100 * high:{sign}.1f}]"


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


def aligned(table: Sequence[Sequence[str]]) -> str:
    """A table of strings as plain text: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = []
    for first, *others in table:
        cells = [first.ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join(cells))
    return "\n".join(lines)


def latex(text: str) -> str:
    """Text with what LaTeX reads otherwise escaped, and the paper's symbols in its notation."""
    return re.sub("|".join(map(re.escape, _LATEX)), lambda match: _LATEX[match[0]], text)
