"""A few seconds of tests/fuzz.py, and what it found before."""

import numpy as np
import pytest

from tests.hard import fuzz
from utils.system.errors import UserError

ROUNDS = {"dataset": 300, "volume": 150, "checkpoint": 60}


@pytest.mark.slow
@pytest.mark.parametrize("name", fuzz.READERS)
def test_damaged_input_is_read_or_refused_in_one_line(tmp_path, tally, name):
    reader = fuzz.READERS[name](tmp_path)
    refused = sum(fuzz.attempt(reader, seed) for seed in range(ROUNDS[name]))
    assert 0.1 < refused / ROUNDS[name] < 1  # some are still good
    tally(f"inputs made up at random: {name}", ROUNDS[name])


def test_the_fuzzer_sees_a_bug():
    class Broken:
        def round(self, rng: np.random.Generator) -> None:
            raise KeyError("not a UserError")

    with pytest.raises(KeyError):
        fuzz.attempt(Broken(), 0)


# --- Found ---------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "change",
    [
        lambda state: state["history"][0].update(skipped_steps="0"),
        lambda state: state["history"][0].pop("skipped_steps"),
        lambda state: state["history"].clear(),
        lambda state: state["at"].update(epoch=None),
        lambda state: state["optimizer"]["state"][0].update(exp_avg=None),
    ],
)
def test_checkpoint_that_does_not_fit_is_refused(tmp_path, change):
    reader = fuzz.Checkpoint(tmp_path)
    state = reader.last | reader.shared
    change(state)
    with pytest.raises(UserError, match="not a checkpoint of this run"):
        reader.trainer().load_state(state)
