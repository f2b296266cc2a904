"""Names of label ids, FLARE22's labels and their tolerances, and CT windows."""

import gzip
import json
import re
from collections.abc import Collection
from pathlib import Path

from utils.system import UserError
from utils.system.files import read_bytes

# The labels of the FLARE22 challenge from id 1, and its tolerances of the surface distance, mm.
FLARE22_TOLERANCES_MM = {
    "liver": 5.0,
    "right kidney": 3.0,
    "spleen": 3.0,
    "pancreas": 5.0,
    "aorta": 2.0,
    "inferior vena cava": 2.0,
    "right adrenal gland": 2.0,
    "left adrenal gland": 2.0,
    "gallbladder": 2.0,
    "esophagus": 3.0,
    "stomach": 5.0,
    "duodenum": 7.0,
    "left kidney": 3.0,
}
FLARE22_LABELS = dict(enumerate(FLARE22_TOLERANCES_MM, start=1))

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
    """Names by label id, of an option: "flare22", "1=left lung,2=right lung", or a file of them.

    Files are ITK-SNAP's label descriptions, nnU-Net's dataset.json, .json files with "label_names"
    as they are written here, and label maps with TotalSegmentator's names in the header.
    """
    if text == "flare22":
        return FLARE22_LABELS
    pairs = [part.partition("=")[::2] for part in re.split("[,;]", text)]
    if Path(text).is_file():
        pairs = _pairs_of_file(Path(text))
    names: dict[int, str] = {}
    for label, name in ((str(label).strip(), name.strip()) for label, name in pairs):
        if not re.fullmatch("[0-9]+", label) or not 1 <= int(label) <= 255 or not is_name(name):
            raise UserError(f"--label-names: expected ID=NAME with ID 1-255, got '{label}={name}'")
        if int(label) in names or name in names.values():
            raise UserError(f"--label-names: label or name occurs twice: '{label}={name}'")
        names[int(label)] = name
    return names


def _pairs_of_file(path: Path) -> list[tuple]:
    """Label ids and names in a file, see `parse_label_names`; UserError without any."""
    content = read_bytes(path)
    try:
        if path.suffix == ".json":
            meta = json.loads(content)
            names = meta["label_names"] if "label_names" in meta else nnunet_names(meta["labels"])
            return [*names.items()]
        start = (gzip.decompress(content) if path.suffix == ".gz" else content)[: 1 << 20]
        for pattern in (
            r'<Label Key="(\d+)"[^>]*><!\[CDATA\[(.*?)\]\]>',  # TotalSegmentator's
            r'(?m)^\s*(0*[1-9]\d*)(?:\s+[\d.]+){6}\s+"(.*)"',  # ITK-SNAP's, without background
        ):
            if pairs := re.findall(pattern, start.decode(errors="replace")):
                return pairs
        raise ValueError("neither ITK-SNAP's nor TotalSegmentator's")
    except (ValueError, LookupError, TypeError, AttributeError, OSError, EOFError) as error:
        raise UserError(f"{path}: no label names in a known format ({error})") from error


def nnunet_names(labels: dict) -> dict[int, str]:
    """Names by label id of nnU-Net's version 2 {name: id} or version 1 {id: name}.

    Raises ValueError: regions, labels to ignore, or ids above 255.
    """
    if all(str(key).isdecimal() for key in labels):
        labels = {name: int(label) for label, name in labels.items()}
    for name, label in labels.items():
        if type(label) is not int or not 0 <= label <= 255 or name == "ignore" or not is_name(name):
            raise ValueError(f"label {name!r} is {label!r}; no regions or ignore labels are read")
    return {label: name for name, label in labels.items() if label}
