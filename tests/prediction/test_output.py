"""The ids of labels in a label volume."""

import pytest

from utils.prediction.output import label_ids
from utils.system import UserError


def test_ids_of_labels():
    """The known ones, or else in the order of the alphabet: no order of boxes changes them."""
    for labels in (["7", "spleen", "1", "liver"], ["liver", "1", "spleen", "7"]):
        assert label_ids(labels, {}) == {"1": 1, "liver": 2, "spleen": 3, "7": 7}
        known = {"spleen": 3, "pancreas": 4, "liver": 6}
        assert label_ids(labels, known) == {"1": 1, "spleen": 3, "liver": 6, "7": 7}
    with pytest.raises(UserError, match="no label 'livver'; choose from liver, spleen, or"):
        label_ids(["livver", "1"], {"liver": 1, "spleen": 3})
    with pytest.raises(UserError, match="no label 'part 99'"):
        label_ids([f"part {n}" for n in range(256)], {})
