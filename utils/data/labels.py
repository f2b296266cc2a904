"""Names of label ids, and what is known of FLARE22's labels; CT windows."""

import argparse
import re
from collections.abc import Collection

FLARE22_LABELS = {
    1: "liver",
    2: "right kidney",
    3: "spleen",
    4: "pancreas",
    5: "aorta",
    6: "inferior vena cava",
    7: "right adrenal gland",
    8: "left adrenal gland",
    9: "gallbladder",
    10: "esophagus",
    11: "stomach",
    12: "duodenum",
    13: "left kidney",
}

# Tolerances of the normalised surface distance in the FLARE22 challenge, mm, by label name.
_TOLERANCES_MM = (5.0, 3.0, 3.0, 5.0, 2.0, 2.0, 2.0, 2.0, 2.0, 3.0, 5.0, 7.0, 3.0)
FLARE22_TOLERANCES_MM = dict(zip(FLARE22_LABELS.values(), _TOLERANCES_MM, strict=True))

# Hounsfield units, (lowest, highest): the paper's for FLARE22 and lung CT, and that of level 40 and
# width 400 which MedSAM's and LiteMedSAM's scripts use for soft tissue.
WINDOWS = {"flare22": (-360.0, 440.0), "lung": (-1000.0, 400.0), "medsam": (-160.0, 240.0)}


def are_flare22(cases: Collection[str]) -> bool:
    """Whether the cases have the names of FLARE22's own files, such as FLARE22_Tr_0001."""
    return bool(cases) and all(re.fullmatch(r"FLARE22_Tr_\d{4}", case) for case in cases)


def label_name(names: dict[int, str], label: int) -> str:
    """The name of a label id, or "label 7" for one without a name."""
    return names.get(label, f"label {label}")


def is_name(text: object) -> bool:
    """Whether `text` can stand in a line of a table."""
    return isinstance(text, str) and bool(text.strip()) and text.isprintable()


def parse_label_names(text: str) -> dict[int, str]:
    """Names by label id, of an option: "flare22" or "1=left lung,2=right lung"."""
    if text == "flare22":
        return FLARE22_LABELS
    names: dict[int, str] = {}
    for part in text.split(","):
        label, _, name = part.partition("=")
        if not label.strip().isdigit() or not 1 <= int(label) <= 255 or not is_name(name.strip()):
            raise argparse.ArgumentTypeError(f"expected ID=NAME with ID 1-255, got {part!r}")
        if int(label) in names or name.strip() in names.values():
            raise argparse.ArgumentTypeError(f"label or name is there twice: {part!r}")
        names[int(label)] = name.strip()
    return names
