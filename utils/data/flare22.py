"""Labels, tolerances and windows of the public CT data sets that the paper uses."""

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

# Hounsfield units, (lowest, highest): the paper's for FLARE22 and lung CT, and that of level 40 and
# width 400 which MedSAM's and LiteMedSAM's scripts use for soft tissue.
WINDOWS = {"flare22": (-360.0, 440.0), "lung": (-1000.0, 400.0), "medsam": (-160.0, 240.0)}


def are_flare22(cases: Collection[str]) -> bool:
    """Whether the cases have the names of FLARE22's own files, such as FLARE22_Tr_0001."""
    return bool(cases) and all(re.fullmatch(r"FLARE22_Tr_\d{4}", case) for case in cases)
