"""A box becomes a volume: by a model that knows the answer, and where it ends."""

import numpy as np

from utils.prediction.scan import largest_part, propagate


def ellipsoid(depth: int = 12, shift: float = 0.0) -> np.ndarray:
    """(z, y, x) bool around z = 5; its centre moves by `shift` pixels from slice to slice."""
    z, y, x = np.mgrid[:depth, :64, :80]
    centre = 40 + shift * (z - 5)
    return ((z - 5) / 5.5) ** 2 + ((y - 30) / 14) ** 2 + ((x - centre) / 18) ** 2 < 1


def follow(volume: np.ndarray, start: int = 5, taken=()) -> dict[int, np.ndarray]:
    """The masks of the slices that propagation reaches, with what lies in their box alone."""

    def decode(index, boxes):
        ((x0, y0, x1, y1),) = boxes
        y, x = np.mgrid[: volume.shape[1], : volume.shape[2]]
        inside = (x >= x0) & (x <= x1) & (y >= y0) & (y <= y1)
        return np.where(volume[index] & inside, 1.0, -1.0)[None]

    found = propagate(start, volume[start], decode, len(volume), taken)
    return {index: logits > 0 for index, _, logits in found}


def test_a_whole_target_is_found_from_one_box():
    volume = ellipsoid(shift=0.5)
    masks = follow(volume)
    assert sorted(masks) == [1, 2, 3, 4, 6, 7, 8, 9]  # not where the area halves at its ends
    assert all((mask == volume[index]).mean() > 0.998 for index, mask in masks.items())
    assert sorted(follow(volume, taken={5, 7, 2})) == [3, 4, 6]  # which have a box of their own


def test_it_ends_where_the_mask_is_empty_or_its_area_jumps():
    volume = ellipsoid()
    volume[7] = False
    assert max(follow(volume)) == 6
    volume[7, 30:34, 40:44] = True
    assert max(follow(volume)) == 6
    volume[7, 10:60, 10:78] = True
    assert 7 in follow(volume)  # its box keeps it from growing
    logits = np.where(volume, 1.0, -1.0)
    found = propagate(5, volume[5], lambda index, _: logits[index : index + 1], len(volume), ())
    assert max(index for index, _, _ in found) == 6


def test_it_follows_the_largest_part():
    volume = ellipsoid()
    volume[5, 2:5, 2:5] = True  # a speck far off
    masks = follow(volume)
    x0 = np.flatnonzero(volume[4].any(axis=0))[0]
    assert np.flatnonzero(masks[4].any(axis=0))[0] == x0 > 10
    assert largest_part(volume[5]).sum() == volume[5].sum() - 9
    assert not largest_part(np.zeros((4, 4), bool)).any()
