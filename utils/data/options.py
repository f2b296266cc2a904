"""Types of preprocess_ct.py's options that are several numbers."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from utils.data.flare22 import WINDOWS


def parse_window(text: str) -> tuple[float, float]:
    """(lowest, highest) HU of a preset's name or "LO,HI"."""
    low, high = WINDOWS[text] if text in WINDOWS else _numbers(text, 2)
    if not low < high:
        raise argparse.ArgumentTypeError(f"expected LO,HI with LO < HI, got {text}")
    return low, high


def parse_split(text: str) -> tuple[float, float, float] | Path:
    """Shares of train, val and test, which add up to 1, or the path of a .csv file."""
    if text.lower().endswith(".csv"):
        return Path(text)
    shares = _numbers(text, 3, " or a .csv file")
    if min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
        raise argparse.ArgumentTypeError(f"shares must be 0 or more and add up to 1, got {text}")
    return shares


def _numbers(text: str, count: int, other: str = "") -> tuple[float, ...]:
    """`count` finite numbers joined by commas; an error also names `other` values."""
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if len(numbers) != count or not all(map(math.isfinite, numbers)):
        expected = f"{count} numbers joined by commas{other}"
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
    return numbers
