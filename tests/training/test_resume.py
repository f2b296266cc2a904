"""Going on with a run: what it may be given anew."""

import pytest

from tests.helpers import options_for
from utils.system.errors import UserError
from utils.training.resume import resumed_options

HARMLESS = {"data", "epochs", "boxes_per_call", "cache", "cache_dir", "device", "amp"}


def test_an_option_that_changes_boxes_or_losses_is_refused(tmp_path):
    stored = options_for(tmp_path)
    others = vars(stored).keys() - HARMLESS
    assert len(others) > 8
    for name in others:
        option = f"--{name.replace('_', '-')}"
        with pytest.raises(UserError, match=f"was started with {option} .*, not another"):
            resumed_options(tmp_path, stored, {name: "another"})
