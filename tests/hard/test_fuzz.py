"""A few seconds of tests/hard/fuzz.py."""

import numpy as np
import pytest

from tests.hard import fuzz

ROUNDS = {"dataset": 300, "volume": 150, "checkpoint": 40}


@pytest.mark.parametrize("name", fuzz.READERS)
def test_damaged_input_is_read_or_refused_in_one_line(tmp_path, tally, name):
    reader = fuzz.READERS[name](tmp_path)
    refused = sum(fuzz.attempt(reader, seed) for seed in range(ROUNDS[name]))
    assert 0.1 < refused / ROUNDS[name] < 1  # some are still good
    tally(f"randomly damaged inputs: {name}", ROUNDS[name])


def test_the_fuzzer_sees_a_bug():
    class Broken:
        def round(self, rng: np.random.Generator) -> None:
            raise KeyError("not a UserError")

    with pytest.raises(KeyError):
        fuzz.attempt(Broken(), 0)
