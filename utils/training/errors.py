"""Tables of errors: how far boxes lay from the tight boxes of their targets.

    # how it was made
    protocol,patient,size,left,top,right,bottom
    every 5,1,63.2,-0.041,0.012,0,0.02

A row is one box. The protocol says how it was made, patients are numbered from 1, `size` is
sqrt(area) of the target's mask in px of the 1024 frame, and the others say by which share of its
side (the width for left and right) each edge lay too far outward. `perturb.read_errors` loads it.
"""

from pathlib import Path

import numpy as np

from utils.system import UserError
from utils.system.files import read_bytes

EDGES = ["left", "top", "right", "bottom"]
COLUMNS = ["protocol", "patient", "size", *EDGES]


def checked_errors(path: str) -> str:
    """The absolute path of a table of errors.

    Raises UserError: unreadable, other columns, no row, or a row with other values.
    """
    lines = enumerate(read_bytes(path).decode(errors="replace").splitlines(), start=1)
    rows = [(number, line.split(",")) for number, line in lines if line.strip() and line[0] != "#"]
    if not rows or rows[0][1] != COLUMNS:
        raise UserError(f"{path}: expected columns {','.join(COLUMNS)}, as from perturb.py")
    for number, values in rows[1:]:
        try:
            size, *shares = (float(value) for value in values[2:])
            fine = np.isfinite([size, *shares]).all() and size > 0 and min(shares) > -1
        except ValueError:
            fine = False
        if not fine or len(values) != len(COLUMNS):
            raise UserError(
                f"{path}, row {number}: expected a size above 0 px and four shares of the side "
                f"above -1 in {','.join(COLUMNS)}, found {','.join(values)}"
            )
    if len(rows) < 2:
        raise UserError(f"{path}: has no rows; measure some boxes")
    return str(Path(path).resolve())
