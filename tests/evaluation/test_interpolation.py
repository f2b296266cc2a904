"""A box becomes a volume: by interpolation, and by a model that knows the answer."""

import numpy as np

from tests.evaluation.helpers import RIGHT_EDGES, stack
from utils.data.given_boxes import GivenBox
from utils.evaluation.interpolation import find_tracks, interpolate, largest_part, propagate


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


# --- Interpolation -------------------------------------------------------------------------------
def test_edges_between_two_boxes_are_linear_in_z():
    boxes = [GivenBox("a", 2, (10, 20, 30, 40)), GivenBox("a", 6, (14, 12, 50, 40))]
    boxes.append(GivenBox("b", 4, (0, 0, 5, 5)))  # alone
    found = {box.index: box.box for box in interpolate(boxes[::-1])}
    assert found == {3: (11, 18, 35, 40), 4: (12, 16, 40, 40), 5: (13, 14, 45, 40)}
    ends = [GivenBox("a", 6, (0, 0, 4, 4)), GivenBox("a", 7, (0, 0, 4, 4))]
    assert interpolate(ends) == []


def test_only_gaps_of_up_to_the_given_size_are_filled():
    boxes = [GivenBox("a", z, (0, 0, 9, 9)) for z in (0, 3, 7)]
    slices = {most: [box.index for box in interpolate(boxes, most)] for most in (0, 3, 2, 1)}
    assert slices == {0: [1, 2, 4, 5, 6], 3: [1, 2, 4, 5, 6], 2: [1, 2], 1: []}


def test_several_boxes_of_a_label_go_on_to_the_nearest():
    """As of two kidneys, the first of which ends earlier."""
    left, right = (10, 10, 20, 20), (60, 12, 70, 22)
    moved = (62, 12, 72, 22)
    boxes = [GivenBox("kidneys", 0, left), GivenBox("kidneys", 0, right)]
    both = [*boxes, GivenBox("kidneys", 2, moved), GivenBox("kidneys", 2, left)]
    assert {box.box for box in interpolate(both)} == {left, (61, 12, 71, 22)}
    assert [box.box for box in interpolate([*boxes, GivenBox("kidneys", 2, moved)])] == [
        (61, 12, 71, 22)
    ]


# --- What somebody would draw --------------------------------------------------------------------
def places(track) -> list[int]:
    return [sample.index for sample in track.slices]


def test_a_target_is_followed_to_a_gap_and_again_behind_it(tmp_path):
    spot, bar, behind = find_tracks(stack(tmp_path).split("all"))
    assert [places(track) for track in (spot, behind)] == [[1, 2, 3, 4], [6, 7]]
    assert places(bar) == [*range(1, 8)]
    assert spot.organ == behind.organ == ("stack", "s0", "spot")
    assert bar.boxes == [(40, 10, edge, 29) for edge in RIGHT_EDGES.values()]
    assert spot.boxes[1] == (12, 40, 21, 49)


def test_boxes_of_every_third_slice_as_by_hand(tmp_path):
    """In the first slice, every third after it, and the last, to which it may be less far."""
    spot, bar, behind = find_tracks(stack(tmp_path).split("all"))
    assert [bar.key_slices(n) for n in (2, 3, 4, 6, 10)] == [
        *([0, 2, 4, 6], [0, 3, 6], [0, 4, 6], [0, 6], [0, 6])
    ]
    assert behind.key_slices(5) == [0, 1] and behind.boxes_of_every(5) == behind.boxes
    assert [box[2] for box in bar.boxes_of_every(3)] == [51, 53, 55, 57, 59, 61, 63]
    assert [box[2] for box in bar.boxes_of_every(10)] == [51, 53, 55, 57, 59, 61, 63]
    assert [box[2] for box in bar.boxes_of_every(4)] == [51, 55.75, 60.5, 65.25, 70, 66.5, 63]
    assert {(x0, y0, y1) for x0, y0, _, y1 in bar.boxes_of_every(4)} == {(40, 10, 29)}
    assert bar.boxes_of_every(1) == bar.boxes and spot.boxes_of_every(3) == spot.boxes


def test_parts_are_followed_by_their_place_and_end_where_none_overlaps(tmp_path):
    """The larger part has the label's id, so ids alone would mix them up."""
    tracks = find_tracks(stack(tmp_path, 1, "--parts", "spot").split("all"))
    spots = [track for track in tracks if track.organ[2] == "spot"]
    assert [places(track) for track in spots] == [[1, 2, 3], [2, 3, 4], [4], [6, 7]]
    first, second, far, _ = spots
    assert [box[0] for box in first.boxes] == [11, 12, 13] and far.boxes == [(70, 40, 79, 49)]
    assert second.boxes == [(30, 54, 35, 59)] * 3
    assert first.instances == [1, 1, 1] and 1 not in second.instances
    instances = [(s.key, n) for t in tracks for s, n in zip(t.slices, t.instances, strict=True)]
    assert len(set(instances)) == len(instances) == 7 + 3 + 3 + 1 + 2


def test_slices_of_another_case_are_no_neighbours(tmp_path):
    """Though the numbers of the slices go on where those of the first case end."""
    slices = stack(tmp_path, 2).split("all")
    tracks = find_tracks([s for s in slices if (s.case == "s0") == (s.index < 4)])
    assert [(track.organ[1], places(track)) for track in tracks] == [
        *[("s0", [1, 2, 3])] * 2,
        *(("s1", [4]), ("s1", [4, 5, 6, 7]), ("s1", [6, 7])),
    ]
