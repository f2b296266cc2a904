"""What a run records of the code that makes its boxes, and what is said when that changes."""

import numpy as np
import pytest

import perturb
from tests.helpers import options_for
from utils.training.box_code import box_code, changed_box_code

POLICIES = ("none", "medsam", "bidirectional", "scaled", "adaptive", "mixed", "sam2")
SCALED = ["scaled", "adaptive", "mixed"]  # use theta_omega and xi


@pytest.fixture
def changed(tmp_path):
    """What is said of a policy's run after a change, by the name of the policy."""
    options = [options_for(tmp_path, policy=policy) for policy in POLICIES]
    before = [box_code(each) for each in options]

    def compare() -> dict[str, str]:
        now = [box_code(each) for each in options]
        return {
            policy: changed_box_code(*records)
            for policy, *records in zip(POLICIES, before, now, strict=True)
            if records[0] != records[1]
        }

    return compare


def test_a_policy_records_the_constants_that_it_uses(tmp_path):
    names = {
        policy: set(box_code(options_for(tmp_path, policy=policy))["constants"])
        for policy in POLICIES
    }
    delta = {"DELTA_EXPAND_MAX", "delta_expand_used"}
    both = delta | {"EPSILON_SHRINK_MIN", "epsilon_shrink_used"}
    assert names == {
        "none": set(),
        "medsam": {"MEDSAM_SHIFT"},
        "bidirectional": {"MEDSAM_SHIFT"},
        "scaled": delta,
        "adaptive": both,
        "mixed": both | {"MIXED_TIGHT", "MIXED_OUTWARD", "MIXED_INWARD"},
        "sam2": {"SAM2_SHARE", "SAM2_SHIFT_MAX"},
    }


def test_nothing_changed_and_code_that_does_the_same(changed, monkeypatch):
    assert changed() == {}
    theta_omega = perturb.theta_omega
    monkeypatch.setattr(
        perturb, "theta_omega", lambda *args, **kw: theta_omega(*args, **kw) * 2 / 2
    )
    assert changed() == {}


def test_a_constant_is_told_with_both_values(changed, monkeypatch):
    monkeypatch.setattr(perturb, "MEDSAM_SHIFT", perturb.MEDSAM_SHIFT + 10)
    old, new = perturb.MEDSAM_SHIFT - 10, perturb.MEDSAM_SHIFT
    said = changed()
    assert set(said) == {"medsam", "bidirectional"}
    assert said["medsam"] == (
        f"MEDSAM_SHIFT is {new}, was {old}; perturb with medsam gives other values than when the "
        "run was started"
    )


@pytest.mark.parametrize(
    ("name", "edit", "policies", "first"),
    [
        ("theta_omega", lambda value: value**0.5, SCALED, "theta_omega by width, "),
        ("xi", lambda value: 1 / value, SCALED, "xi, "),
        ("offsets", lambda value: value * [1, 2, 1, 1], SCALED[1:], "(1) and (2) of o"),
        ("_uniform", lambda value: value / 2, POLICIES[1:], "perturb with "),
        ("keep_box", lambda value: value + 1, POLICIES, "perturb with "),
        ("shift_boxes", lambda value: value + 1, POLICIES, "shift_boxes gives other values"),
        ("tight_boxes", lambda value: (value[0], value[1] + 1), POLICIES, "tight_boxes gives oth"),
    ],
)
def test_an_edited_function_is_noticed_by_the_policies_that_use_it(
    changed, monkeypatch, name, edit, policies, first
):
    function = getattr(perturb, name)
    monkeypatch.setattr(perturb, name, lambda *args, **kw: edit(function(*args, **kw)))
    said = changed()
    assert list(said) == list(policies)
    assert all(text.startswith(first) for text in said.values()), said


def test_an_edited_policy_is_noticed_in_its_own_runs_alone(changed, monkeypatch):
    def tighter(sides: np.ndarray, epsilon: np.ndarray, delta: np.ndarray) -> list[perturb.Case]:
        return [(1.0, epsilon / 2, delta)]

    monkeypatch.setitem(perturb.POLICIES, "adaptive", tighter)
    assert list(changed()) == ["adaptive"]


def test_a_run_records_the_theta_omega_of_its_own_reading(tmp_path, monkeypatch):
    options = {r: options_for(tmp_path, policy="adaptive", reading=r) for r in perturb.READINGS}
    before = {reading: box_code(each) for reading, each in options.items()}
    values = [str(record["fingerprints"]) for record in before.values()]
    assert len(set(values)) == 3
    monkeypatch.setitem(perturb.READINGS, "cosine", lambda boxes, areas, size: areas / size)
    changes = {r: changed_box_code(before[r], box_code(options[r])) for r in options}
    assert changes["width"] == changes["area"] == ""
    assert changes["cosine"].startswith("theta_omega by cosine, ")
