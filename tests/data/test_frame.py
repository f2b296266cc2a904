"""The 1024 frame: proportions, padding, and the way back."""

import numpy as np
import pytest
from skimage.transform import resize

from perturb import tight_boxes
from utils.data.frame import Frame, rescale_boxes

SHAPES = [(512, 512), (122, 101), (101, 122), (80, 96), (1024, 1024), (333, 1000)]


@pytest.mark.parametrize(
    ("native", "spacing", "content"),
    [
        ((122, 101), (1, 1), (1024, 848)),
        ((101, 122), (1, 1), (848, 1024)),
        ((100, 100), (2.0, 1.0), (1024, 512)),  # pixels that are twice as high as wide
        ((1, 4000), (1, 1), (1, 1024)),
    ],
)
def test_frame_by_hand(native, spacing, content):
    assert Frame.fit(native, spacing) == Frame(native, content)


@pytest.mark.parametrize("shape", SHAPES)
def test_labels_come_back_exactly(shape):
    frame = Frame.fit(shape)
    labels = np.random.default_rng(0).integers(0, 14, shape).astype(np.uint8)
    framed = frame.labels_to_frame(labels)
    assert framed.shape == (1024, 1024) and framed.dtype == np.uint8
    assert (frame.labels_to_native(framed) == labels).all()
    assert not framed[frame.content[0] :].any() and not framed[:, frame.content[1] :].any()
    there, back, lost = frame.labels_there_and_back(labels)
    assert (there == framed).all() and (back == labels).all() and lost == 0


@pytest.mark.parametrize(
    ("shape", "spacing"),
    [((1025, 1024), (1, 1)), ((1500, 1100), (1, 1)), ((600, 600), (0.2, 1)), ((3000, 9), (1, 5))],
)
def test_labels_that_are_in_the_frame_come_back(shape, spacing):
    """Each pixel has its own label: what is in the frame is what comes back, the rest is lost."""
    frame, labels = Frame.fit(shape, spacing), 1 + np.arange(np.prod(shape)).reshape(shape)
    there, back, lost = frame.labels_there_and_back(labels)
    assert lost > 0
    assert set(np.unique(back)) == set(np.unique(there)) - {0}
    assert lost == len(np.setdiff1d(labels, there))
    assert frame.labels_there_and_back(np.zeros_like(labels))[2] == 0


def test_image_is_scaled_like_scikit_image():
    y, x = np.mgrid[:122, :101]
    image = 120 + 80 * np.sin(y / 9) * np.cos(x / 7)
    frame = Frame.fit(image.shape)
    framed = frame.image_to_frame(image)
    expected = resize(image, frame.content, order=3, mode="edge", preserve_range=True)
    inner = (slice(20, 1000), slice(20, 820))  # the kernels differ at the border
    assert np.abs(framed[inner].astype(float) - expected[inner]).max() < 2
    assert not framed[:, 848:].any()
    image = np.zeros((64, 64))
    image[:, 32:] = 255  # bicubic rings at the step, beyond what uint8 holds
    framed = Frame.fit(image.shape).image_to_frame(image)
    assert framed[:, :500].max() < 30 and framed[:, 530:].min() > 225


def test_boxes_scale_by_pixel_edges():
    boxes = np.array([[0, 0, 1023, 1023], [4, 8, 7, 15], [10, 20, 10, 20]], np.float32)
    scaled = rescale_boxes(boxes, 1024, 256)
    assert scaled.tolist() == [[0, 0, 255, 255], [1, 2, 1, 3], [2.5, 5, 1.75, 4.25]]
    assert scaled.dtype == np.float32
    assert rescale_boxes(scaled, 256, 1024) == pytest.approx(boxes)


@pytest.mark.parametrize(
    ("native", "spacing"),
    [((512, 512), (1, 1)), ((80, 96), (2.0, 1.6)), ((101, 122), (3, 3)), ((700, 333), (0.7, 0.9))],
)
def test_the_tight_box_of_a_mask_is_that_of_the_mask_in_the_frame(native, spacing):
    rng, frame = np.random.default_rng(0), Frame.fit(native, spacing)
    for _ in range(50):
        mask = np.zeros(native, np.uint8)
        (y0, y1), (x0, x1) = (np.sort(rng.integers(0, n, 2)) for n in native)
        mask[y0 : y1 + 1, x0 : x1 + 1] = 1
        _, (expected,) = tight_boxes(frame.labels_to_frame(mask))
        (box,) = frame.boxes_to_frame(np.array([[x0, y0, x1, y1]]))
        assert box.tolist() == expected.tolist() and box.dtype == np.float32


def test_fractions_are_rounded_and_a_box_keeps_a_pixel():
    frame = Frame.fit((512, 512))
    boxes = np.array([[10.2, 20.3, 30.4, 40.0], [5.0, 5.0, 4.2, 4.2], [511.0, 0.0, 511.0, 511.0]])
    expected = [[20, 41, 62, 81], [10, 10, 10, 10], [1022, 0, 1023, 1023]]
    assert frame.boxes_to_frame(boxes).tolist() == expected
    shrinking = Frame.fit((2048, 2048))
    assert shrinking.boxes_to_frame(np.array([[3, 3, 3, 3]])).tolist() == [[1, 1, 1, 1]]
