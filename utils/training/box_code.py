"""What the code that makes a run's boxes does, so that an edited perturb.py does not go unnoticed.

A record holds the constants of perturb.py that a run's policy uses, and fingerprints: hashes of
what the functions return for fixed boxes. Editing what the policy does not use changes nothing, nor
does rewriting a function that returns the same values.
"""

from __future__ import annotations

import hashlib
from argparse import Namespace

import numpy as np

import perturb
from utils.system.errors import UserError
from utils.training.boxes import policy_boxes
from utils.training.validation import SHIFT

STEP, STEP_PX = 1e-6, 1e-3  # to which coefficients, and pixels, are rounded before they are hashed
PROBE = np.array(  # XYXY in the 1024 frame
    [
        *((0, 0, 1023, 1023), (0, 300, 63, 363), (960, 0, 1023, 40), (512, 980, 900, 1023)),
        *((0, 0, 0, 0), (512, 300, 512, 300), (1023, 1023, 1023, 1023)),  # one pixel
        *((100, 100, 227, 227), (333, 700, 340, 712), (600, 610, 603, 611)),  # square, small
        *((10, 20, 29, 500), (400, 401, 900, 420), (37, 211, 628, 894)),  # tall, wide, large
    ],
    np.float32,
)
PROBE_FILLED = 0.7  # share of each box that its mask fills
DRAWS = 8  # of each box, by the policy


def used_factors(options: Namespace) -> tuple[float, float]:
    """delta_expand and epsilon_shrink of a run, by default its reading's and policy's, in bounds.

    Raises:
        UserError: a factor has the wrong sign.
    """
    given = (options.delta_expand, options.epsilon_shrink)
    defaults = perturb.default_factors(options.reading, options.policy)
    factors = (d if g is None else g for g, d in zip(given, defaults, strict=True))
    try:
        return perturb.clamp_factors(*factors, options.reading)
    except ValueError as error:
        raise UserError(str(error)) from None


def box_code(options: Namespace) -> dict[str, dict]:
    """What makes the boxes of a run of one policy.

    Returns:
        "constants" by name, and "fingerprints" by function. theta_omega, xi, the offsets (1)-(4)
        and what bounds them are among them if the range of the policy depends on them.

    Raises:
        UserError: a factor has the wrong sign.
    """
    policy, reading = perturb.POLICIES[options.policy], options.reading
    delta_expand, epsilon_shrink = used_factors(options)
    constants = {
        name: getattr(perturb, name)
        for name in policy.__code__.co_names
        if name.isupper() and isinstance(getattr(perturb, name, None), int | float)
    }
    fingerprints = {}

    # A range depends on an offset if it is another for small offsets and for large ones.
    sides = perturb.box_sides(PROBE)
    small, large = np.ones_like(sides), np.full_like(sides, 500)

    def ranges(epsilon: np.ndarray, delta: np.ndarray) -> np.ndarray:
        return np.array([case[1:] for case in policy(sides, epsilon, delta)])

    with_small = ranges(-small, small)
    by_epsilon = not np.array_equal(with_small, ranges(-large, small))
    by_delta = not np.array_equal(with_small, ranges(-small, large))
    areas = np.ceil(PROBE_FILLED * sides.prod(axis=1))
    if by_epsilon or by_delta:
        theta = perturb.theta_omega(PROBE, areas, reading=reading)
        fingerprints[f"theta_omega by {reading}"] = _hash(theta, STEP)
        fingerprints["xi"] = _hash(perturb.xi(PROBE), STEP)
    offsets = perturb.offsets(
        PROBE, perturb.IMAGE_SIZE, delta_expand, epsilon_shrink, areas, reading
    )
    if by_epsilon:
        constants["EPSILON_SHRINK_MIN"] = perturb.EPSILON_SHRINK_MIN
        constants["epsilon_shrink_used"] = epsilon_shrink
        fingerprints["(1) and (2) of offsets"] = _hash(offsets[:, :2], STEP_PX)
    if by_delta:
        constants["DELTA_EXPAND_MAX"] = perturb.DELTA_EXPAND_MAX
        constants["delta_expand_used"] = delta_expand
        fingerprints["(3) and (4) of offsets"] = _hash(offsets[:, 2:], STEP_PX)

    many, rng = np.tile(PROBE, (DRAWS, 1)), perturb.box_rng("probe", "perturb")
    fingerprints[f"perturb with {options.policy}"] = _hash(
        policy_boxes(many, np.tile(areas, DRAWS), rng, options), STEP_PX
    )
    rng = perturb.box_rng("probe", "shift_boxes")
    kinds = [perturb.shift_boxes(PROBE, kind, SHIFT, rng) for kind in perturb.BOX_KINDS]
    fingerprints["shift_boxes"] = _hash(np.concatenate(kinds), STEP_PX)
    mask = np.zeros((8, 9), np.uint8)
    mask[2:5, 3:8], mask[4, 0], mask[7] = 2, 1, 5
    fingerprints["tight_boxes"] = _hash(np.column_stack(perturb.tight_boxes(mask)), STEP_PX)
    return {"constants": constants, "fingerprints": fingerprints}


def _hash(values: np.ndarray, step: float) -> str:
    """A hash of numbers rounded to multiples of `step`."""
    steps = np.rint(np.asarray(values, np.float64) / step)
    return hashlib.sha256((steps + 0.0).tobytes()).hexdigest()[:16]  # + 0.0 turns -0.0 into 0.0


def changed_box_code(before: dict[str, dict], now: dict[str, dict]) -> str:
    """What differs between the box code of a run and the present one, as the start of a sentence.

    Fingerprints follow constants, in the order in which one function uses another: the first name
    is the place to look at.
    """
    constants = changed_constants(before["constants"], now["constants"])
    old, new = before["fingerprints"], now["fingerprints"]
    names = [name for name in new | old if old.get(name) != new.get(name)]
    values = f"{', '.join(names)} give{'' if names[1:] else 's'} other values than when the run "
    return "; ".join([*constants, *([f"{values}was started"] if names else [])])


def changed_constants(before: dict, now: dict) -> list[str]:
    """For each constant that changed, a clause with its new and its old value."""
    return [
        f"{name} is {now.get(name, 'not used')}, was {before.get(name, 'not used')}"
        for name in now | before
        if now.get(name) != before.get(name)
    ]
