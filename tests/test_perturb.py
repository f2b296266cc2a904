"""Boxes: equations (1)-(8) by hand, the policies' ranges, and what must hold for any box."""

import numpy as np
import pytest
from scipy import stats

import perturb as p

# Width 204, height 51: theta_omega = 204 / 1024, xi = 4.
BOX = np.array([[100, 200, 303, 250]], np.float32)
DEGENERATE = np.array(
    [
        [5, 5, 5, 5],  # one pixel
        [0, 0, 0, 0],  # one pixel in the corner
        [1023, 1023, 1023, 1023],
        [0, 0, 1023, 1023],  # the whole image
        [0, 500, 1023, 500],  # a line from border to border
        [1000, 0, 1023, 1023],
    ],
    np.float32,
)
AREA = np.array([0.7 * 204 * 51])  # of the target in BOX
FACTORS = {"delta_expand": 102.4, "epsilon_shrink": -51.2}
pytestmark = pytest.mark.usefixtures("fixed_constants")


class Fixed(np.random.Generator):
    """A generator that always draws the same number, or the same array of them."""

    def __init__(self, value: float | np.ndarray) -> None:
        super().__init__(np.random.PCG64(0))
        self.value = value

    def random(self, size=None, **_):
        self.shape = size
        return np.full(size, self.value)


def perturb(boxes, policy, rng=0, **settings) -> np.ndarray:
    """perturb.perturb of boxes that their targets fill by 70 %."""
    areas = 0.7 * p.box_sides(boxes).prod(axis=1)
    rng = np.random.default_rng(rng) if isinstance(rng, int) else rng
    return p.perturb(boxes, areas, rng, p.Perturbation(policy, **settings))


def offsets(boxes, areas=AREA, **settings) -> np.ndarray:
    return p.offsets(boxes, areas, p.Perturbation(**settings))


# --- Tight boxes ---------------------------------------------------------------------------------
def test_tight_boxes_of_two_labels():
    mask = np.zeros((1024, 1024), np.int16)
    mask[1:4, 2:7] = 3
    mask[0, 1023] = mask[1023, 7] = 300  # a label of two parts
    labels, boxes = p.tight_boxes(mask)
    assert labels.tolist() == [3, 300]
    assert boxes.tolist() == [[2, 1, 6, 3], [7, 0, 1023, 1023]]
    assert boxes.dtype == np.float32


def test_empty_map_has_no_boxes():
    labels, boxes = p.tight_boxes(np.zeros((4, 4), np.uint8))
    assert labels.shape == (0,) and boxes.shape == (0, 4)
    for policy in p.POLICIES:
        assert perturb(boxes, policy).shape == (0, 4)


# --- Equations (1)-(4) ---------------------------------------------------------------------------
def test_coefficients_by_hand():
    assert p.theta_omega(BOX, AREA) == pytest.approx([204 / 1024])
    assert p.xi(BOX) == pytest.approx([4.0])
    assert p.xi(DEGENERATE[:1]) == pytest.approx([1.0])


def test_offsets_by_hand():
    # 102.4 px at theta_omega = 204 / 1024 is a tenth of the width, and of the height after / xi.
    assert offsets(BOX, **FACTORS) == pytest.approx(np.array([[-10.2, -2.55, 20.4, 5.1]]))


def test_offsets_are_the_same_share_of_every_side():
    boxes = np.array([[0, 0, 9, 99], [300, 40, 811, 50], [0, 0, 1023, 1023]], np.float32)
    sides, areas = p.box_sides(boxes), np.ones(3)
    share = offsets(boxes, areas, delta_expand=153.6, epsilon_shrink=-102.4) / np.tile(sides, 2)
    assert share == pytest.approx(np.tile([-0.1, -0.1, 0.15, 0.15], (3, 1)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"delta_expand": -1.0}, "delta_expand must be"),
        ({"epsilon_shrink": 1.0}, "epsilon_shrink must be"),
        ({"delta_expand": np.nan}, "delta_expand must be"),
        ({"epsilon_shrink": np.nan}, "epsilon_shrink must be"),
        ({"reading": "iou"}, "choose from width, cosine, area"),
        ({"policy": "medsma"}, "choose from none, medsam"),
    ],
)
def test_wrong_signs_and_unknown_names_are_an_error(settings, message):
    with pytest.raises(ValueError, match=message):
        p.Perturbation(**settings)


@pytest.mark.parametrize("box", [[5, 5, 4, 5], [0, 0, np.nan, 3], [1, 2, 3]])
def test_what_is_no_box_is_an_error(box):
    with pytest.raises(ValueError, match="box"):
        perturb(np.array([box], np.float32), "adaptive")


# --- Equations (5)-(8) ---------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("number", "literal", "expected"),
    [
        (1.0, False, [79.6, 194.9, 323.4, 255.1]),  # every edge expands by delta
        (0.0, False, [110.2, 202.55, 292.8, 247.45]),  # every edge shrinks by epsilon
        (0.0, True, [89.8, 197.45, 292.8, 247.45]),  # both corners move by epsilon
        (1.0, True, [120.4, 205.1, 323.4, 255.1]),  # both corners move by delta
    ],
)
def test_perturb_by_hand(number, literal, expected):
    drawn = perturb(BOX, "adaptive", Fixed(number), **FACTORS, literal=literal)
    assert drawn == pytest.approx(np.array([expected]), abs=1e-4)


def test_random_numbers_belong_to_edges_in_the_order_of_xyxy():
    """A change of this order would change the boxes of every run."""
    u = np.array([[0.0, 0.25, 0.5, 1.0], [0.5, 0.5, 0.5, 0.5]])
    boxes = np.repeat(BOX, 2, axis=0)
    rng = Fixed(u)
    moved = perturb(boxes, "scaled", rng, **FACTORS)
    assert rng.shape == (2, 4)
    assert moved == pytest.approx(boxes + [-1, -1, 1, 1] * u * [20.4, 5.1, 20.4, 5.1], abs=1e-4)


def literal_and_oriented(**factors: float) -> list[float]:
    """p-values of the two-sample Kolmogorov-Smirnov test, per edge."""
    boxes = np.repeat(BOX, 5000, axis=0)
    oriented, literal = (perturb(boxes, "adaptive", n, literal=n > 0, **factors).T for n in (0, 1))
    return [stats.ks_2samp(*edges).pvalue for edges in zip(oriented, literal, strict=True)]


def test_literal_and_oriented_agree_for_symmetric_factors_alone():
    assert min(literal_and_oriented(delta_expand=153.6, epsilon_shrink=-153.6)) > 0.01
    unequal = literal_and_oriented(delta_expand=153.6, epsilon_shrink=-51.2)
    assert max(unequal[:2]) < 1e-6  # the top-left corner goes the other way
    assert min(unequal[2:]) > 0.01


# --- Readings of theta_omega ---------------------------------------------------------------------
def test_readings_by_hand():
    mask = np.zeros((1024, 1024), np.uint8)
    mask[200:251, 100:304], mask[0, :7] = 2, 9
    areas = p.mask_areas(mask, np.array([2, 9]))
    assert areas.tolist() == [204 * 51, 7]
    by_reading = {r: p.theta_omega(BOX, areas[:1], r) for r in p.READINGS}
    assert by_reading == {
        "width": pytest.approx([204 / 1024]),
        "cosine": pytest.approx([(204 * 51) ** 0.5 / 1024]),
        "area": pytest.approx([204 * 51 / 1024**2]),
    }
    # They are what the text calls them: the mask and the whole image as binary vectors.
    flat, whole = (mask == 2).ravel().astype(float), np.ones(mask.size)
    cosine = flat @ whole / np.linalg.norm(flat) / np.linalg.norm(whole)
    assert by_reading["cosine"] == pytest.approx([cosine])
    assert by_reading["area"] == pytest.approx([flat.sum() / np.maximum(flat, whole).sum()])


@pytest.mark.parametrize("reading", p.READINGS)
def test_under_every_reading_x_and_y_move_by_one_share_of_their_side(reading):
    ellipse = np.pi / 4 * 204 * 51
    moved = offsets(BOX, [ellipse], delta_expand=100, epsilon_shrink=-50, reading=reading)
    share = moved / [[204, 51, 204, 51]]
    assert share[0, 0] == pytest.approx(share[0, 1]) and share[0, 2] == pytest.approx(share[0, 3])
    assert share[0, 2] == pytest.approx(-2 * share[0, 0])


def test_under_area_small_targets_get_a_smaller_share_of_their_side():
    sides = np.array([20, 130, 300])
    boxes = np.column_stack([0 * sides, 0 * sides, sides - 1, sides - 1]).astype(np.float32)
    areas = np.pi / 4 * sides**2  # round targets
    share = offsets(boxes, areas, delta_expand=1024, reading="area")[:, 2] / sides
    assert share == pytest.approx(np.pi / 4 * sides / 1024, rel=1e-5)
    same = offsets(boxes, areas, delta_expand=100, reading="cosine")[:, 2] / sides
    assert same == pytest.approx([same[0]] * 3)


def test_factors_and_bounds_are_those_of_reading_and_policy(monkeypatch):
    monkeypatch.setattr(p, "AREA_SCALE", 8.0)
    monkeypatch.setattr(p, "MIXED_SCALE", 1.5)

    def factors(policy="adaptive", **settings):
        made = p.Perturbation(policy, **settings)
        return np.array([made.delta_expand, made.epsilon_shrink])

    constants = np.array([p.DELTA_EXPAND, p.EPSILON_SHRINK])
    assert (factors(reading="width") == constants).all()
    assert (factors(reading="cosine") == constants).all()
    assert factors(reading="area") == pytest.approx(8 * constants)
    assert factors("mixed", reading="area") == pytest.approx(12 * constants)
    far = {"delta_expand": 1e6, "epsilon_shrink": -1e6}
    assert factors(**far).tolist() == [256, -256]
    assert factors(**far, reading="area").tolist() == [8 * 256, -8 * 256]


# --- Policies ------------------------------------------------------------------------------------
RANGES = {  # outward offset in px for BOX: (x lowest, x highest), (y lowest, y highest)
    "none": ((0, 0), (0, 0)),
    "medsam": ((0, 20), (0, 20)),
    "bidirectional": ((-20, 20), (-20, 20)),
    "scaled": ((0, 30.6), (0, 7.65)),
    "adaptive": ((-30.6, 30.6), (-7.65, 7.65)),
    "sam2": ((-20, 20), (-5.1, 5.1)),  # 10 % of the width is 20.4: the cap holds
}


@pytest.mark.parametrize("policy", RANGES)
def test_policy_fills_its_range(policy):
    boxes, factors = np.repeat(BOX, 4000, axis=0), {"delta_expand": 153.6, "epsilon_shrink": -153.6}
    outward = (perturb(boxes, policy, 1, **factors) - BOX) * [-1, -1, 1, 1]
    low, high = np.tile(RANGES[policy], (2, 1)).T
    span = high - low
    assert (np.abs(outward.min(axis=0) - low) <= 0.005 * span + 1e-4).all()
    assert (np.abs(outward.max(axis=0) - high) <= 0.005 * span + 1e-4).all()
    assert (np.abs(outward.mean(axis=0) - (low + high) / 2) <= 0.03 * span + 1e-4).all()
    if policy != "none":  # every edge of every box has its own offset
        correlation = np.corrcoef(outward.T) - np.eye(4)
        assert np.abs(correlation).max() < 0.08


def test_mixed_boxes_are_tight_or_too_large_or_too_small_by_their_shares(monkeypatch):
    for name, share in (("MIXED_TIGHT", 0.5), ("MIXED_OUTWARD", 0.2), ("MIXED_INWARD", 0.3)):
        monkeypatch.setattr(p, name, share)
    monkeypatch.setattr(p, "MIXED_SIZE", 1)
    drawn = perturb(np.repeat(BOX, 8000, axis=0), "mixed", 5, **FACTORS)
    outward = (drawn - BOX) * [-1, -1, 1, 1]
    tight = (outward == 0).all(axis=1)
    large, small = (outward > 0).all(axis=1), (outward < 0).all(axis=1)
    assert (tight | large | small).all()  # the edges of a box never go both ways
    shares = np.array([tight.mean(), large.mean(), small.mean()])
    assert shares == pytest.approx([0.5, 0.2, 0.3], abs=0.02)
    for part, size in ((outward[large], [20.4, 5.1] * 2), (-outward[small], [10.2, 2.55] * 2)):
        assert (part <= size).all()
        for edge, largest in zip(part.T, size, strict=True):
            assert stats.kstest(edge, stats.uniform(0, largest).cdf).pvalue > 0.001


def test_mixed_boxes_of_small_targets_err_by_a_smaller_share(monkeypatch):
    monkeypatch.setattr(p, "MIXED_SIZE", 80.0)
    boxes, largest = np.repeat(BOX, 4000, axis=0), {}
    for side in (20, 80, 400):
        areas, rng = np.full(4000, side**2), np.random.default_rng(0)
        moved = p.perturb(boxes, areas, rng, p.Perturbation("mixed", **FACTORS)) - boxes
        largest[side] = np.abs(moved).max(axis=0)
    assert largest[20] == pytest.approx(largest[80] / 4, rel=1e-4)
    assert (largest[400] == largest[80]).all()


def test_mixed_draws_its_kind_of_box_after_the_edges(monkeypatch):
    """So that its edges have the random numbers that those of the other policies have."""
    monkeypatch.setattr(p, "MIXED_SIZE", 1)
    boxes = np.repeat(BOX, 500, axis=0)
    mixed, scaled = (perturb(boxes, name, 6, **FACTORS) for name in ("mixed", "scaled"))
    large = ((mixed - BOX) * [-1, -1, 1, 1] > 0).all(axis=1)
    assert large.sum() > 50 and (mixed[large] == scaled[large]).all()


def table_of_errors(path, sizes, shares) -> str:
    """A table of boxes of targets of these sizes, off by these shares on all four edges."""
    rows = (
        f"drawn,1,{size},{share},{share},{-share},0"
        for size, share in zip(sizes, shares, strict=True)
    )
    path.write_text("# by hand\nprotocol,patient,size,left,top,right,bottom\n" + "\n".join(rows))
    return str(path)


def test_measured_boxes_are_tight_or_err_as_a_row_of_the_table(tmp_path, monkeypatch):
    monkeypatch.setattr(p, "MEASURED_TIGHT", 0.4)
    errors = table_of_errors(tmp_path / "errors.csv", [30, 90], [0.25, 0.125])
    drawn = perturb(np.repeat(BOX, 9000, axis=0), "measured", 7, errors=errors)
    outward = (drawn - BOX) * [-1, -1, 1, 1]
    rows, counts = np.unique(outward, axis=0, return_counts=True)
    quarter = [51, 12.75, -51, 0]  # of 204 and 51 px
    assert sorted(rows.tolist()) == [[0, 0, 0, 0], [n / 2 for n in quarter], quarter]
    assert counts / 9000 == pytest.approx([0.4, 0.3, 0.3], abs=0.02)
    one = perturb(BOX, "measured", p.box_rng(0, "training", "", "a", 1, 2, 3), errors=errors)
    assert one.tobytes() in {row.tobytes() for row in drawn}


@pytest.mark.parametrize(("length", "near"), [(700, 40), (4000, 200)])
def test_measured_draws_evenly_from_the_rows_nearest_in_size(tmp_path, monkeypatch, length, near):
    """The share of each row is its size / 10^4, so that a box tells which row it is of."""
    monkeypatch.setattr(p, "MEASURED_TIGHT", 0.0)
    monkeypatch.setattr(p, "MEASURED_ROWS", 40)
    sizes = np.random.default_rng(1).permutation(np.arange(length) + 1)
    errors = table_of_errors(tmp_path / "errors.csv", sizes, sizes / 1e4)
    for size, low in ((500, 500 - near // 2), (0.5, 1), (1e5, length + 1 - near)):
        boxes, areas = np.repeat(BOX, 8000, axis=0), np.full(8000, size**2)
        rng, perturbation = np.random.default_rng(2), p.Perturbation("measured", errors=errors)
        drawn = p.perturb(boxes, areas, rng, perturbation)
        row = (drawn[:, 2] - BOX[0, 2]) / -204 * 1e4
        assert np.rint(row) == pytest.approx(row, abs=0.01)
        found, counts = np.unique(np.rint(row), return_counts=True)
        assert found.tolist() == [*range(low, low + near)]
        assert stats.chisquare(counts).pvalue > 0.001


def test_measured_has_the_errors_of_the_project_s_table_at_a_size(monkeypatch):
    monkeypatch.setattr(p, "MEASURED_TIGHT", 0.0)
    table = p.read_errors()
    assert len(table) == 900 and (np.diff(table[:, 0]) >= 0).all()
    nearest = table[np.argsort(np.abs(table[:, 0] - 60))[: p.MEASURED_ROWS], 1:]
    boxes, areas = np.repeat(BOX, 5000, axis=0), np.full(5000, 60.0**2)
    drawn = p.perturb(boxes, areas, np.random.default_rng(3), p.Perturbation("measured"))
    share = (drawn - BOX) * [-1, -1, 1, 1] / [204, 51, 204, 51]
    for edge, expected in zip(share.T, nearest.T, strict=True):
        assert stats.ks_2samp(edge, expected).pvalue > 0.2


def test_test_boxes_are_of_other_patients_than_the_training_boxes(monkeypatch):
    rows = np.genfromtxt(p.ERRORS, delimiter=",", dtype=str)[1:]
    of_test = {tuple(row) for row in p.read_errors(protocol="every 5").round(3).tolist()}
    expected = rows[(rows[:, 0] == "every 5") & (rows[:, 1].astype(int) > 5), 2:].astype(float)
    assert of_test == {*map(tuple, expected.tolist())} and len(expected) == 300
    boxes, areas, rng = np.repeat(BOX, 500, axis=0), np.full(500, 60**2), np.random.default_rng(0)
    errors = p.read_errors(protocol="every 5")
    erring = (p.erring_boxes(boxes, areas, errors, rng) - BOX) * [-1, -1, 1, 1]
    shares = (erring / [204, 51, 204, 51]).round(3)
    assert {*map(tuple, shares.tolist())} <= {row[1:] for row in of_test}
    monkeypatch.setattr(p, "ERRORS_TRAIN", 8)
    p.read_errors.cache_clear()
    assert len(p.read_errors()) == 1440 and len(p.read_errors(protocol="every 10")) == 120
    p.read_errors.cache_clear()


@pytest.mark.parametrize("shares", [(0.5, 0.2, 0.2), (1.2, 0.0, -0.2)])
def test_shares_that_do_not_add_up_are_an_error(monkeypatch, shares):
    names = ("MIXED_TIGHT", "MIXED_OUTWARD", "MIXED_INWARD")
    for name, share in zip(names, shares, strict=True):
        monkeypatch.setattr(p, name, share)
    with pytest.raises(ValueError, match="add up to 1"):
        p.Perturbation("mixed")


@pytest.mark.parametrize("literal", [False, True])
@pytest.mark.parametrize("policy", p.POLICIES)
def test_degenerate_boxes_stay_boxes_in_the_image(policy, literal):
    factors = {"delta_expand": 256, "epsilon_shrink": -256, "literal": literal}
    drawn = np.array([perturb(DEGENERATE, policy, seed, **factors) for seed in range(50)])
    assert drawn.dtype == np.float32 and (drawn >= 0).all() and (drawn <= 1023).all()
    assert (drawn[..., 2:] >= drawn[..., :2]).all()


def test_every_policy_and_box_kind_draws_four_numbers_per_box():
    """So that runs that differ in the policy alone differ in nothing else."""
    boxes, following = np.repeat(BOX, 3, axis=0), np.random.default_rng(4).random(13)[-1]
    for name in (*p.POLICIES, *p.BOX_KINDS, p.LOOSE):
        rng = np.random.default_rng(4)
        if name in p.POLICIES:
            perturb(boxes, name, rng)
        else:
            p.shift_boxes(boxes, name, p.Shift(20, "px"), rng)
        draws_more = name in ("mixed", "measured")  # the kind of box, or the row
        assert (rng.random() == following) != draws_more


def test_a_generator_belongs_to_one_key_and_input_is_left_alone():
    """Change one part of the key, and other boxes are drawn; the same key draws the same ones."""
    key, before = (3, "training", "data", "case", 7, 2, 1), BOX.copy()
    boxes = {perturb(BOX, "adaptive", p.box_rng(*key)).tobytes() for _ in range(2)}
    assert len(boxes) == 1 and (BOX == before).all()
    for n, part in enumerate(key):
        other = (*key[:n], part + 1 if isinstance(part, int) else part + "1", *key[n + 1 :])
        boxes.add(perturb(BOX, "adaptive", p.box_rng(*other)).tobytes())
    assert len(boxes) == 1 + len(key)


# --- Evaluation boxes ----------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("shift", "largest"),  # per edge of BOX, px
    [(p.Shift(0.15, "side"), [30.6, 7.65]), (p.Shift(20, "px"), [20, 20])],
)
@pytest.mark.parametrize("kind", p.BOX_KINDS)
def test_shift_is_a_share_of_the_side_or_pixels(kind, shift, largest):
    drawn = p.shift_boxes(np.repeat(BOX, 3000, axis=0), kind, shift, np.random.default_rng(2))
    share = (drawn - BOX) * [-1, -1, 1, 1] / np.tile(largest, 2)
    low, high = {"standard": (0, 0), "expansion": (0, 1), "shrink": (-1, 0)}[kind]
    assert share.min(axis=0) == pytest.approx([low] * 4, abs=5e-3)
    assert share.max(axis=0) == pytest.approx([high] * 4, abs=5e-3)


@pytest.mark.parametrize("shift", [p.Shift(0.49, "side"), p.Shift(300, "px")])
def test_shifted_boxes_stay_boxes_in_the_image(shift):
    drawn = [p.sweep_boxes(DEGENERATE, p.Shift(s * shift.size, shift.unit)) for s in (-1, 1)]
    for kind in p.BOX_KINDS:
        drawn.append(p.shift_boxes(DEGENERATE, kind, shift, np.random.default_rng(0)))
    assert (np.array(drawn) >= 0).all() and (np.array(drawn) <= 1023).all()
    assert all((boxes[:, 2:] >= boxes[:, :2]).all() for boxes in drawn)


def test_shrink_boxes_stay_inside_the_tight_box():
    """Also where the shift is larger than the box, and its edges move unequally."""
    small = np.repeat(np.array([[500, 300, 509, 399]], np.float32), 2000, axis=0)  # 10 x 100 px
    drawn = p.shift_boxes(small, "shrink", p.Shift(20, "px"), np.random.default_rng(3))
    assert (drawn[:, :2] >= small[:, :2]).all() and (drawn[:, 2:] <= small[:, 2:]).all()
    points = drawn[:, 0] == drawn[:, 2]
    assert 0.5 < points.mean() < 1  # most are a line, in x; none is in y
    assert (drawn[:, 1] < drawn[:, 3]).all()
    assert np.ptp(drawn[points, 0]) > 7  # it lies where the edges meet, not in the middle


def test_edges_that_pass_each_other_stop_where_they_meet():
    """The left edge moves three times as fast as the right one: it has gone 3/4 of the width."""
    box = np.array([[500, 300, 509, 399]], np.float32)  # 10 x 100 px
    moved = p.move_edges(box, np.array([[-30.0, 5.0, -10.0, 5.0]]))
    assert moved == pytest.approx(np.array([[506.75, 295, 506.75, 404]]))
    drawn = perturb(DEGENERATE[:1], "adaptive", Fixed(0.0), delta_expand=0, epsilon_shrink=-256)
    assert drawn.tolist() == [[5, 5, 5, 5]]


@pytest.mark.parametrize(
    ("shift", "expected"),
    [
        (p.Shift(0.1, "side"), [20.4, 5.1]),
        (p.Shift(-0.25, "side"), [-51, -12.75]),
        (p.Shift(7, "px"), [7, 7]),
        (p.Shift(-7, "px"), [-7, -7]),
    ],
)
def test_sweep_moves_every_edge_by_the_whole_shift(shift, expected):
    """BOX is 204 x 51 px."""
    outward = (p.sweep_boxes(BOX, shift) - BOX) * [-1, -1, 1, 1]
    assert outward == pytest.approx(np.tile([expected], 2), abs=1e-3)


def test_a_loose_box_errs_either_way_on_every_edge():
    shift = p.Shift(0.1, "side")
    drawn = p.shift_boxes(np.repeat(BOX, 4000, axis=0), p.LOOSE, shift, np.random.default_rng(4))
    outward = (drawn - BOX) * [-1, -1, 1, 1] / [204, 51, 204, 51]
    for edge in outward.T:
        assert stats.kstest(edge, stats.uniform(-0.1, 0.2).cdf).pvalue > 0.001
    assert set((outward > 0).sum(axis=1)) == {0, 1, 2, 3, 4}  # each edge on its own


def test_the_families_are_tight_both_ways_by_each_shift_loose_and_as_drawn():
    families = p.box_families([p.Shift(0.15, "side"), p.Shift(20, "px")])
    expected = ["expansion 15%", "shrink 15%", "expansion 20px", "shrink 20px", "loose 15%"]
    expected += ["like every 5 0%", "like every 10 0%"]
    assert [f"{kind} {shift}" for kind, shift in families][1:] == expected
    kinds = [kind for kind, _ in p.box_families([p.Shift(20, "px")])]
    assert kinds == [*p.BOX_KINDS, p.LOOSE, *p.LIKE]


@pytest.mark.parametrize(
    "text", ["0.15", "50%", "-60%", "nan%", "nanpx", "2000px", "%", "15 cm", ""]
)
def test_shift_as_text(text):
    for shift in ("15%", "2.5%", "20px", "0%", "-25%", "-20px"):
        assert str(p.Shift.parse(shift)) == shift
    with pytest.raises(ValueError):
        p.Shift.parse(text)
