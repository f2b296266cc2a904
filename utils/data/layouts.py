"""Folders of CT volumes, or slices, with label maps as other programs lay them out."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from utils.data.dicom import holds_dicom
from utils.data.flare22 import FLARE22_LABELS, are_flare22
from utils.data.labels import is_name
from utils.data.slices import DATASET_FILE
from utils.data.volumes import SUFFIXES, nifti_suffix
from utils.system.downloads import DATA, fetch, unpack
from utils.system.errors import UserError

LAYOUTS = {  # what a folder of each holds
    "flare22": ("images", "labels"),
    "nnunet": ("imagesTr", "labelsTr", "dataset.json"),
    "medsam": ("imgs", "gts"),
}


@dataclass(frozen=True)
class Source:
    """Where the volumes, or slices, of a data set are.

    Attributes:
        images, labels: folders, see `volumes.find_pairs`.
        channel: which of several image files per case is CT; None where there is one.
        label_names: by label id; empty where nothing tells what the labels are.
        npy: whether the folders hold MedSAM's slices and not volumes, see `medsam_npy`.
        what: the layout, in words for the screen.
    """

    images: Path
    labels: Path
    channel: int | None = None
    label_names: dict[int, str] = field(default_factory=dict)
    npy: bool = False
    what: str = "images and labels"


def download(name: str, out: str | Path) -> Path:
    """Fetch a public data set to the folder that `out` is in, unpack it, and find its layout.

    Returns:
        The folder with images/ and labels/.

    Raises:
        UserError: `out` is where the data set is unpacked; or as `fetch` and `unpack`.
    """
    out = Path(out).resolve()
    folder = out.parent / Path(DATA[name].file).stem
    if out == folder:
        raise UserError(f"{out}: is where the data set is unpacked; choose another --out")
    if not folder.is_dir():  # if it is there it is whole, and the archive may have been removed
        archive = fetch(DATA[name], out.parent)
        unpack(archive, folder)
        print(f"{folder}: unpacked; {archive} can be removed")
    # The archive may hold the two folders, or one folder with them (and __MACOSX beside it).
    inner = [path.parent for path in folder.glob("*/images") if (path.parent / "labels").is_dir()]
    return min(inner, default=folder)


def recognise(folder: str | Path, layout: str = "auto") -> Source:
    """Find the volumes in a folder.

    Args:
        folder: that of the data set.
        layout: one of LAYOUTS, or "auto", which goes by the names of what is in the folder. With
            "flare22" the labels are FLARE22's, with "auto" only if the files have FLARE22's names.

    Raises:
        UserError: no such folder, no layout or several, or a dataset.json that cannot be used.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give the data set's to --input")
    missing = {
        name: [part for part in parts if not (folder / part).exists()]
        for name, parts in LAYOUTS.items()
    }
    if layout == "auto":
        matching = [name for name in LAYOUTS if not missing[name]]
        if len(matching) > 1:
            raise UserError(f"{folder}: could be {' or '.join(matching)}; choose with --layout")
        if not matching:
            known = "; ".join(f"{name}: {', '.join(parts)}" for name, parts in LAYOUTS.items())
            raise UserError(f"{folder}: not a known layout ({known}); give --images and --labels")
        if matching == ["flare22"]:
            return _flare22(folder, are_flare22(_cases_in(folder / "labels")))
        layout = matching[0]
    elif missing[layout]:
        raise UserError(f"{folder}: not of layout {layout}: no {', no '.join(missing[layout])}")
    return {"flare22": _flare22, "nnunet": _nnunet, "medsam": _medsam}[layout](folder)


def _cases_in(labels: Path) -> list[str]:
    return [path.name.split(".")[0] for path in labels.iterdir() if nifti_suffix(path)]


def _flare22(folder: Path, labels: bool = True) -> Source:
    """FLARE22's layout; with `labels`, the label ids are FLARE22's as well."""
    series = any(path.is_dir() and holds_dicom(path) for path in (folder / "images").glob("*"))
    what = "FLARE22's layout" + (", with DICOM series for images" if series else "")
    what += " and its label names" if labels else ""
    names = FLARE22_LABELS if labels else {}
    return Source(folder / "images", folder / "labels", label_names=names, what=what)


def _nnunet(folder: Path) -> Source:
    """nnU-Net's raw data: version 2's dataset.json, or version 1's, which is the Decathlon's."""
    path = folder / "dataset.json"
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        channels = meta.get("channel_names") or meta["modality"]
        channels = {int(number): str(name) for number, name in channels.items()}
        names = _label_names(meta["labels"])
        ending = str(meta.get("file_ending", SUFFIXES[0]))
    except OSError as error:
        raise UserError(f"{path}: cannot read: {error.strerror}") from error
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{path}: not nnU-Net's ({type(error).__name__}: {error}); give --images and --labels"
        ) from error
    if ending.lower() not in SUFFIXES:
        raise UserError(f"{path}: its files end in {ending}; convert them to .nii.gz")
    ct = [number for number, name in channels.items() if name.strip().casefold() == "ct"]
    if len(ct) != 1:
        raise UserError(
            f"{path}: expected one CT channel, found {', '.join(channels.values())}; if one is CT "
            "all the same, give its folders to --images and --labels"
        )
    channel = ct[0] if len(channels) > 1 else None
    of_channels = f", channel {channel} of {len(channels)}" if channel is not None else ""
    what = f"nnU-Net's layout{of_channels}, label names of dataset.json"
    return Source(folder / "imagesTr", folder / "labelsTr", channel, names, what=what)


def _medsam(folder: Path) -> Source:
    if (folder / DATASET_FILE).exists():
        raise UserError(
            f"{folder}: has slices and a {DATASET_FILE}, so preprocess_ct.py made it; give it to "
            "train_adaptive.py --data"
        )
    what = "MedSAM's slices (no spacing, window or orientation in them: NSD will be in pixels)"
    return Source(folder / "imgs", folder / "gts", npy=True, what=what)


def _label_names(labels: dict) -> dict[int, str]:
    """Names by label id of version 2's {name: id} or version 1's {id: name}, without background.

    Raises:
        ValueError, TypeError: regions, an id out of range, or what is not a name.
    """
    if all(str(key).isdigit() for key in labels):
        labels = {name: int(label) for label, name in labels.items()}
    for name, label in labels.items():
        if type(label) is not int or not 0 <= label <= 255:
            raise ValueError(f"label {name!r} is {label!r}; regions are not supported")
        if name == "ignore":
            raise ValueError("a label to be ignored is not supported")
        if not is_name(name):
            raise ValueError(f"label name {name!r}")
    return {label: name for name, label in labels.items() if label}
