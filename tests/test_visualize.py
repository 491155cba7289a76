"""Grids of images and drawn grain maps, checked pixel by pixel."""

import numpy as np
import pytest
import torch
from PIL import Image

from dq_hf.visualize import GRAIN_COLOURS, draw_grain_map, image_grid

COLOURS = [(250, 0, 0), (0, 250, 0), (0, 0, 250), (9, 9, 9), (80, 80, 80)]


def plain_images(count):
    return [Image.new("RGB", (3, 2), COLOURS[i]) for i in range(count)]


@pytest.mark.parametrize(
    ("count", "columns", "shape"), [(1, None, (1, 1)), (5, None, (2, 3)), (4, 1, (4, 1)), (3, 8, (1, 8))]
)
def test_grid_holds_the_images_row_by_row_and_white_after_them(count, columns, shape):
    pixels = np.array(image_grid(plain_images(count), columns))
    assert pixels.shape == (shape[0] * 2, shape[1] * 3, 3)
    for i in range(shape[0] * shape[1]):
        row, column = divmod(i, shape[1])
        cell = pixels[row * 2 : row * 2 + 2, column * 3 : column * 3 + 3]
        assert (cell == (COLOURS[i] if i < count else (255, 255, 255))).all()


@pytest.mark.parametrize(
    ("images", "columns", "message"),
    [
        ([], None, "at least one image"),
        ([Image.new("RGB", (3, 2)), Image.new("RGB", (2, 3))], None, r"one size, got \[\(2, 3\), \(3, 2\)\]"),
        (plain_images(2), 0, "columns must be 1 or more, got 0"),
    ],
)
def test_grid_refuses(images, columns, message):
    with pytest.raises(ValueError, match=message):
        image_grid(images, columns)


def frame(granularity):
    """Colour of a frame drawn over black."""
    *colour, alpha = GRAIN_COLOURS[granularity]
    return np.array(colour) * alpha / 255


def test_one_frame_for_each_code():
    grain_map = torch.tensor([[0, 1], [2, 0]])
    pixels = np.array(draw_grain_map(Image.new("RGB", (64, 64)), grain_map, scale=1)).astype(float)
    assert pixels.shape == (64, 64, 3)
    for row, column in np.ndindex(2, 2):
        granularity = int(grain_map[row, column])
        side = 32 // 2**granularity  # pixels of a code
        region = pixels[row * 32 : (row + 1) * 32, column * 32 : (column + 1) * 32]
        for y, x in np.ndindex(32, 32):
            on_frame = y % side in (0, side - 1) or x % side in (0, side - 1)
            np.testing.assert_allclose(region[y, x], frame(granularity) if on_frame else 0, atol=1)


@pytest.mark.parametrize(("granularity", "expected"), [(0, 1), (1, 2), (2, 4)])
def test_default_scale_gives_the_finest_frames_eight_pixels(granularity, expected):
    drawn = draw_grain_map(Image.new("RGB", (16, 8)), torch.tensor([[0, granularity]]))
    assert drawn.size == (16 * expected, 8 * expected)


def test_numpy_maps_and_grey_images_are_taken():
    assert draw_grain_map(Image.new("L", (8, 8)), np.array([[1]])).mode == "RGB"


@pytest.mark.parametrize(
    ("size", "grain_map", "message"),
    [
        ((8, 8), torch.zeros(1, 2, 2, dtype=torch.long), r"must have shape \(h, w\), got \(1, 2, 2\)"),
        ((9, 8), torch.zeros(2, 2, dtype=torch.long), "multiples of the map's 2x2 finest codes, got 8x9"),
        ((6, 8), torch.ones(2, 2, dtype=torch.long), "multiples of the map's 4x4 finest codes, got 8x6"),
    ],
)
def test_drawing_refuses_a_map_that_does_not_fit(size, grain_map, message):
    with pytest.raises(ValueError, match=message):
        draw_grain_map(Image.new("RGB", size), grain_map)
