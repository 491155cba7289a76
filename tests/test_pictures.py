"""Grids of images, drawn grain maps, animations and figures, checked pixel by pixel."""

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

from dq_hf import DQImageProcessor
from dq_hf.pictures import (
    GRAIN_COLOURS,
    LIGHT_GREY,
    MARGIN,
    NO_CODE_YET,
    captioned_grid,
    draw_code_usage,
    draw_generation,
    draw_grain_map,
    draw_scores,
    image_grid,
)

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


def test_captions_stand_below_their_images_in_lines_of_whole_words():
    images = [Image.new("RGB", (32, 16), COLOURS[i]) for i in range(3)]
    pixels = np.array(captioned_grid(images, ["wide wide wide wide", "", "i"], columns=3, scale=2))
    num_lines = []
    for colour, cell in zip(COLOURS, np.split(pixels, 3, axis=1)):
        assert cell.shape[1] == 2 * 32 + 2 * MARGIN
        below = MARGIN + 2 * 16
        assert (cell[MARGIN:below, MARGIN:-MARGIN] == colour).all()
        inked = (cell[below:] < 128).all(2)
        assert not inked[:, [0, -1]].any() and not inked[-1].any()
        rows, columns = inked.any(1).nonzero()[0], inked.any(0).nonzero()[0]
        num_lines.append(len(rows) and 1 + (np.diff(rows) > 2).sum())  # the dot of an i stands apart, too
        assert len(columns) == 0 or abs(columns[0] + columns[-1] - (cell.shape[1] - 1)) <= 2  # in the middle
    assert num_lines == [2, 0, 1]
    with pytest.raises(ValueError, match="one for each of the 3 images, got 2"):
        captioned_grid(images, ["a", "b"])


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


@pytest.mark.parametrize("last", [NO_CODE_YET, 1])
def test_regions_without_a_code_yet_are_grey(last):
    grain_map = torch.tensor([[NO_CODE_YET, NO_CODE_YET], [NO_CODE_YET, last]])
    pixels = np.array(draw_grain_map(Image.new("RGB", (16, 16)), grain_map, scale=1))
    assert (pixels[:8] == LIGHT_GREY).all() and (pixels[:, :8] == LIGHT_GREY).all()
    assert (pixels == LIGHT_GREY).all() == (last == NO_CODE_YET)


@pytest.mark.parametrize(
    ("size", "grain_map", "message"),
    [
        ((8, 8), torch.zeros(1, 2, 2).long(), r"must have shape \(h, w\), got \(1, 2, 2\)"),
        ((9, 8), torch.zeros(2, 2).long(), "multiples of the map's 2x2 finest codes, got 8x9"),
        ((6, 8), torch.ones(2, 2).long(), "multiples of the map's 4x4 finest codes, got 8x6"),
    ],
)
def test_drawing_refuses_a_map_that_does_not_fit(size, grain_map, message):
    with pytest.raises(ValueError, match=message):
        draw_grain_map(Image.new("RGB", size), grain_map)


@pytest.mark.parametrize(("granularity", "expected"), [(0, 1), (1, 2), (2, 4)])
def test_the_finest_frames_have_eight_pixels_also_on_grey_images(granularity, expected):
    drawn = draw_grain_map(Image.new("L", (16, 8)), np.array([[0, granularity]]))
    assert drawn.size == (16 * expected, 8 * expected) and drawn.mode == "RGB"


def test_an_animation_shows_the_codes_so_far_and_ends_with_the_images(tiny_vae):
    source = torch.Generator().manual_seed(0)
    grain_maps = torch.randint(2, (2, 4, 4), generator=source)
    fine = grain_maps.repeat_interleave(2, 1).repeat_interleave(2, 2)
    codes = torch.randint(16, (2, 8, 8), generator=source)
    codes = torch.where(fine == 1, codes, codes[:, ::2, ::2].repeat_interleave(2, 1).repeat_interleave(2, 2))
    order = torch.where(fine == 1, 5 + torch.arange(8)[:, None], torch.arange(8)[:, None] // 2 % 4)  # 13 steps
    processor = DQImageProcessor(size={"height": 16, "width": 16})
    frames = draw_generation(tiny_vae, processor, codes, grain_maps, order, num_frames=6)
    assert len(frames) == 7 and {frame.size for frame in frames} == {(2 * 72, 72)}  # 4 pixels around 64
    finished = processor.post_process(tiny_vae.decode_codes(codes).sample)
    for image in range(2):
        pictures = [np.array(frame)[4:68, image * 72 + 4 : image * 72 + 68] for frame in frames]
        assert np.abs(pictures[-1] - np.array(finished[image]).repeat(4, 0).repeat(4, 1).astype(int)).max() <= 1
        for frame, picture in enumerate(pictures[:-1], 1):
            for row, column in np.ndindex(8, 8):
                cell = picture[row * 8 : row * 8 + 8, column * 8 : column * 8 + 8]
                has_code = int(order[image, row, column]) < 13 * frame // 6
                assert (cell == LIGHT_GREY).all() == (not has_code)
        whole = np.array(draw_grain_map(finished[image], grain_maps[image]))
        assert np.abs(pictures[-2] - whole.astype(int)).max() <= 1  # nothing is missing in the last but one
    assert len(draw_generation(tiny_vae, processor, codes, grain_maps, order, num_frames=100)) == 13 + 1
    with pytest.raises(ValueError, match="at least 1, got 0"):
        draw_generation(tiny_vae, processor, codes, grain_maps, order, num_frames=0)


def count_pixels(image, colour):
    return int((np.abs(np.array(image).astype(int) - colour).max(-1) <= 2).sum())


@pytest.mark.parametrize("lowest", [0.0, -4.0])  # a predicted gain may be a loss
def test_a_region_with_a_higher_score_is_brighter_on_the_heat_map(lowest):
    scores = lowest + (4 - lowest) * torch.tensor([[0, 0.25], [0.5, 1]])
    drawn = draw_scores(Image.new("RGB", (8, 8), "lime"), scores, "score", torch.eye(2).long(), [1.5])
    colours = [255 * np.array(matplotlib.colormaps["magma"](share)[:3]) for share in (0, 0.25, 0.5, 1)]
    sizes = [count_pixels(drawn, colour) for colour in colours]
    assert min(sizes) > 10_000 and max(sizes) < 1.3 * min(sizes)  # and a little of each on the scale
    assert count_pixels(drawn, (0, 255, 0)) > 80_000  # the image, and the coding between its frames


def test_bars_of_code_usage_are_as_high_as_the_shares():
    drawn = draw_code_usage(torch.tensor([[0, 60, 0, 0], [10, 10, 20, 0]]), [8, 4]).crop((0, 0, 600, 300))  # no legend
    blue, red = (count_pixels(drawn, GRAIN_COLOURS[granularity][:3]) for granularity in (0, 1))
    assert blue / red == pytest.approx(60 / 40, rel=0.1)
