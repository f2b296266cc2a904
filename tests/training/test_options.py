"""Constants of perturb.py that cannot be used: one line, wherever the program starts."""

import pytest

import perturb
from utils.evaluation import options as evaluation
from utils.preview import options as preview
from utils.training import options as training

PIXELS = "expected pixels, not a share of the side; 15 % of it is 153.6"


@pytest.mark.parametrize("start", [training, evaluation, preview])
@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("READING", "Area", "READING is 'Area': expected width, cosine, area"),
        ("READING", [], "READING is []"),
        ("EPSILON_SHRINK", 51.2, "EPSILON_SHRINK is 51.2: expected px, <= 0 (it shrinks)"),
        ("EPSILON_SHRINK_MIN", 256, "EPSILON_SHRINK_MIN is 256: expected px, <= 0"),
        ("DELTA_EXPAND", -1, "DELTA_EXPAND is -1: expected px, >= 0"),
        ("DELTA_EXPAND", "15%", "DELTA_EXPAND is '15%': expected px"),
        ("DELTA_EXPAND", float("nan"), "DELTA_EXPAND is nan: expected px"),
        ("DELTA_EXPAND", 0.15, f"DELTA_EXPAND is 0.15: {PIXELS}"),
        ("DELTA_EXPAND_MAX", None, "DELTA_EXPAND_MAX is None: expected px"),
        ("EPSILON_SHRINK", -0.05, f"EPSILON_SHRINK is -0.05: {PIXELS}"),
        ("MEDSAM_SHIFT", 0.02, f"MEDSAM_SHIFT is 0.02: {PIXELS}"),
        ("MIXED_TIGHT", "half", "MIXED_TIGHT is 'half': expected a share, 0 to 1"),
        ("MIXED_TIGHT", 0.9, "must be 0 or more and add up to 1"),
        ("SAM2_SHARE", 10, "SAM2_SHARE is 10: expected a share, 0 to 1"),
        ("AREA_SCALE", -1, "AREA_SCALE is -1: expected a factor, >= 0"),
    ],
)
def test_bad_constants_are_named(monkeypatch, capsys, start, name, value, expected):
    monkeypatch.setattr(perturb, name, value)
    with pytest.raises(SystemExit) as stop:
        start.parse_options(["--help"])
    message = capsys.readouterr().err
    assert stop.value.code == 2 and message.startswith(f"error: perturb.py: {name}")
    assert expected in message and message.count("\n") == 1


def test_constants_as_they_are_start(monkeypatch, capsys):
    for name, value in (("DELTA_EXPAND", 0), ("EPSILON_SHRINK", 0), ("DELTA_EXPAND_MAX", 1)):
        monkeypatch.setattr(perturb, name, value)
    assert training.parse_options(["--demo"]).demo


def test_factors_in_shares_are_refused_as_options_too():
    for name, value in (("delta_expand", 0.15), ("epsilon_shrink", -0.15)):
        with pytest.raises(ValueError, match=PIXELS):
            perturb.Perturbation(**{name: value})
