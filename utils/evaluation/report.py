"""A report from blocks, as Markdown and as one HTML file that needs nothing beside it."""

from __future__ import annotations

import base64
import html
import re
from dataclasses import dataclass
from pathlib import Path

from utils.evaluation.tables import Table
from utils.system.files import atomic_write


@dataclass(frozen=True)
class Heading:
    """A heading; level 1 is the report's title."""

    level: int
    text: str


@dataclass(frozen=True)
class Text:
    """A paragraph; `words` in backticks are set as code."""

    text: str


@dataclass(frozen=True)
class Items:
    """A list of paragraphs."""

    items: list[str]


@dataclass(frozen=True)
class Code:
    """Lines as they are."""

    text: str


@dataclass(frozen=True)
class Figure:
    """A picture and the words under it."""

    path: Path
    caption: str


Block = Heading | Text | Items | Code | Figure | Table

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; margin: 2rem auto; padding: 0 1rem;
       max-width: 96rem; }
h1, h2, h3 { line-height: 1.25; }
h2 { margin-top: 2.5rem; border-bottom: 1px solid #ccc; }
p, li { max-width: 48rem; }
.how { color: #555; font-size: 0.85rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.82rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.25rem 0.6rem; border-bottom: 1px solid #ddd; text-align: left;
         vertical-align: top; white-space: nowrap; }
th { border-bottom: 2px solid #888; vertical-align: bottom; white-space: normal; }
small { color: #555; }
figure { margin: 1.5rem 0; }
img { max-width: min(100%, 36rem); }
figcaption { color: #555; font-size: 0.85rem; max-width: 48rem; }
pre { background: #f4f4f4; padding: 0.75rem; white-space: pre-wrap; overflow-wrap: anywhere;
      font-size: 0.82rem; }
@media print {
  @page { size: A4 landscape; margin: 12mm; }
  body { margin: 0; max-width: none; font-size: 11pt; }
  .wide { overflow: visible; }
  table { font-size: 7pt; page-break-inside: auto; }
  th, td { padding: 0.1rem 0.3rem; }
  tr, figure { page-break-inside: avoid; }
  img { max-height: 165mm; }
  h2, h3 { page-break-after: avoid; }
}
"""


def write_report(blocks: list[Block], out: Path) -> None:
    """Write report.md, which shows the pictures beside it, and report.html, which holds them."""
    with atomic_write(out / "report.md", "w") as file:
        file.write("\n\n".join(as_markdown(block) for block in blocks) + "\n")
    title = next(block.text for block in blocks if isinstance(block, Heading))
    with atomic_write(out / "report.html", "w") as file:
        file.write(
            '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head>\n<body>\n"
            + "\n".join(as_html(block) for block in blocks)
            + "\n</body></html>\n"
        )


def as_markdown(block: Block) -> str:
    """One block as Markdown."""
    match block:
        case Heading(level, text):
            return "#" * level + " " + text
        case Text(text):
            return text
        case Items(items):
            return "\n".join(f"- {item}" for item in items)
        case Code(text):
            return "\n".join("    " + line for line in text.splitlines())
        case Figure(path, caption):
            return f"![{caption}]({path.name})\n\n*{caption}*"
        case Table():
            parts = [f"**{block.title}** {block.how}".strip()]
            parts += [block.markdown(), *block.notes] if block.rows else block.notes
            return "\n\n".join(parts)


def as_html(block: Block) -> str:
    """One block as HTML."""
    match block:
        case Heading(level, text):
            return f"<h{level}>{_inline(text)}</h{level}>"
        case Text(text):
            return f"<p>{_inline(text)}</p>"
        case Items(items):
            return "<ul>" + "".join(f"<li>{_inline(item)}</li>" for item in items) + "</ul>"
        case Code(text):
            return f"<pre>{html.escape(text)}</pre>"
        case Figure(path, caption):
            data = base64.b64encode(path.read_bytes()).decode()
            return (
                f'<figure><img alt="{html.escape(caption)}" src="data:image/png;base64,{data}">'
                f"<figcaption>{_inline(caption)}</figcaption></figure>"
            )
        case Table():
            grid = f'<div class="wide">{block.html()}</div>' if block.rows else ""
            notes = "".join(f'<p class="how">{_inline(note)}</p>' for note in block.notes)
            return (
                f"<h3>{_inline(block.title)}</h3>"
                f'<p class="how">{_inline(block.how)}</p>{grid}{notes}'
            )


def _inline(text: str) -> str:
    return re.sub("`([^`]*)`", r"<code>\1</code>", html.escape(text))
