"""Names of label ids."""

from __future__ import annotations

from utils.data.flare22 import FLARE22_LABELS
from utils.system.errors import UserError


def label_name(names: dict[int, str], label: int) -> str:
    """The name of a label id, or "label 7" for one without a name."""
    return names.get(label, f"label {label}")


def is_name(text: object) -> bool:
    """Whether `text` can stand in a line of a table."""
    return isinstance(text, str) and bool(text.strip()) and text.isprintable()


def parse_label_names(text: str) -> dict[int, str]:
    """Names by label id from --label-names: "flare22" or "1=left lung,2=right lung".

    Raises:
        UserError: an id out of range or named twice, a name that is empty or cannot be printed, or
            one name for two labels.
    """
    if text == "flare22":
        return FLARE22_LABELS
    names: dict[int, str] = {}
    for part in text.split(","):
        label, _, name = part.partition("=")
        if not label.strip().isdigit() or not 1 <= int(label) <= 255 or not is_name(name.strip()):
            raise UserError(f"--label-names: expected ID=NAME with ID 1-255, got {part!r}")
        if int(label) in names:
            raise UserError(f"--label-names: label {int(label)} is named twice")
        names[int(label)] = name.strip()
    if len(set(names.values())) < len(names):
        raise UserError("--label-names: two labels have one name")
    return names
