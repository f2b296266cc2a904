"""Folders of CT volumes, or slices, with label maps as other programs lay them out."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from utils.data.labels import is_label_name
from utils.data.slices import DATASET_FILE
from utils.system.errors import UserError

NNUNET_SUFFIXES = (".nii.gz", ".nii")


@dataclass(frozen=True)
class Source:
    """Where the volumes, or slices, of a data set are.

    Attributes:
        images, labels: folders, see `volumes.find_pairs`.
        channel: of several image files a case, the one that is CT; None where there is one.
        label_names: by label id, where the layout has them.
        npy: whether the folders hold MedSAM's slices and not volumes, see `medsam_npy`.
        what: the layout, in words for the screen.
    """

    images: Path
    labels: Path
    channel: int | None = None
    label_names: dict[int, str] | None = None
    npy: bool = False
    what: str = "images and labels"


def recognise(folder: str | Path, layout: str = "auto") -> Source:
    """Find the volumes in a folder.

    Args:
        folder: that of the data set.
        layout: "flare22" (images/, labels/), "nnunet" (imagesTr/, labelsTr/, dataset.json),
            "medsam" (imgs/, gts/), or "auto", which tells by the names.

    Raises:
        UserError: no such folder, no layout or several, or a dataset.json that cannot be used.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give the data set's to --input")
    found = [name for name, parts in PARTS.items() if all((folder / p).exists() for p in parts)]
    if layout == "auto":
        looked_for = "; ".join(f"{name}: {', '.join(parts)}" for name, parts in PARTS.items())
        if len(found) > 1:
            raise UserError(f"{folder}: could be {' or '.join(found)}; choose with --layout")
        if not found:
            raise UserError(
                f"{folder}: no layout that is known ({looked_for}); give --images and --labels"
            )
        layout = found[0]
    elif layout not in found:
        missing = [part for part in PARTS[layout] if not (folder / part).exists()]
        raise UserError(f"{folder}: not of layout {layout}: no {', no '.join(missing)}")
    return _READERS[layout](folder)


def _flare22(folder: Path) -> Source:
    from utils.data.dicom import holds_dicom

    images = folder / "images"
    folders = (path for path in images.iterdir() if path.is_dir())
    series = any(map(holds_dicom, folders)) if images.is_dir() else False
    what = "FLARE22's layout" + (", with DICOM series for images" if series else "")
    return Source(images, folder / "labels", what=what)


def _nnunet(folder: Path) -> Source:
    """nnU-Net's raw data: version 2's dataset.json, or version 1's, which is the Decathlon's."""
    path = folder / "dataset.json"
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        channels = meta.get("channel_names") or meta["modality"]
        channels = {int(number): str(name) for number, name in channels.items()}
        names = _label_names(meta["labels"])
        ending = str(meta.get("file_ending", NNUNET_SUFFIXES[0]))
    except OSError as error:
        raise UserError(f"{path}: cannot read: {error.strerror}") from error
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{path}: not nnU-Net's ({type(error).__name__}: {error}); give --images and --labels"
        ) from error
    if ending not in NNUNET_SUFFIXES:
        raise UserError(f"{path}: its files end in {ending}; convert them to .nii.gz")
    ct = [number for number, name in channels.items() if name.strip().casefold() == "ct"]
    if len(ct) != 1:
        shown = ", ".join(channels.values())
        raise UserError(
            f"{path}: expected one CT channel, found {shown}; if one is CT all the same, give its "
            "folders to --images and --labels"
        )
    number = ct[0] if len(channels) > 1 else None
    which = f", channel {number} of {len(channels)}" if number is not None else ""
    what = f"nnU-Net's layout{which}, label names of dataset.json"
    return Source(folder / "imagesTr", folder / "labelsTr", number, names, what=what)


def _medsam(folder: Path) -> Source:
    if (folder / DATASET_FILE).exists():
        raise UserError(
            f"{folder}: has slices and a {DATASET_FILE}, so preprocess_ct.py made it; give it to "
            "train_adaptive.py --data"
        )
    what = "MedSAM's slices (no spacing, window or orientation in them: NSD will be in pixels)"
    return Source(folder / "imgs", folder / "gts", npy=True, what=what)


def _label_names(labels: dict) -> dict[int, str]:
    """Names by label id of version 2's {name: id} or version 1's {id: name}, no background.

    Raises:
        ValueError, TypeError: regions, ids out of range, a name that is none.
    """
    if all(str(key).isdigit() for key in labels):
        labels = {name: int(label) for label, name in labels.items()}
    names = {}
    for name, label in labels.items():
        if type(label) is not int or not 0 <= label <= 255:
            raise ValueError(f"label {name!r} is {label!r}; regions are not supported")
        if name == "ignore":
            raise ValueError("a label to be ignored is not supported")
        if not is_label_name(name):
            raise ValueError(f"label name {name!r}")
        if label:
            names[label] = name
    return names


PARTS = {
    "flare22": ("images", "labels"),
    "nnunet": ("imagesTr", "labelsTr", "dataset.json"),
    "medsam": ("imgs", "gts"),
}
_READERS = {"flare22": _flare22, "nnunet": _nnunet, "medsam": _medsam}
