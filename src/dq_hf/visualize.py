"""Pictures of the coding: grids of images, and grain maps drawn over images."""

import math

from PIL import Image, ImageDraw

# Frame colours (RGBA) by granularity, coarsest first: blue, red, orange, green.
GRAIN_COLOURS = ((40, 90, 220, 150), (220, 40, 40, 150), (240, 150, 0, 150), (0, 150, 60, 150))


def image_grid(images, columns=None):
    """One PIL image of all the PIL images, row by row, about square unless `columns` is given.

    Raises:
        ValueError: no images, images of different sizes, or no column.
    """
    if not images:
        raise ValueError("images must hold at least one image, got an empty list")
    if len({image.size for image in images}) > 1:
        raise ValueError(f"images must have one size, got {sorted({image.size for image in images})}")
    columns = math.ceil(math.sqrt(len(images))) if columns is None else columns
    if columns < 1:
        raise ValueError(f"columns must be 1 or more, got {columns}")
    rows = math.ceil(len(images) / columns)
    width, height = images[0].size
    grid = Image.new("RGB", (columns * width, rows * height), "white")
    for i, image in enumerate(images):
        grid.paste(image, (i % columns * width, i // columns * height))
    return grid


def draw_grain_map(image, grain_map, scale=None):
    """The image enlarged, with one frame for each code: the finer the frames, the more codes (paper figure 1).

    Args:
        image: PIL image.
        grain_map: (h, w) integers, granularity of each region, 0 = coarsest.
        scale: enlargement, a whole number; default: so that the finest frame has at least 8 pixels.

    Raises:
        ValueError: a map of another shape, or an image whose sides are not whole multiples of the map's finest codes.
    """
    if grain_map.ndim != 2:
        raise ValueError(f"grain_map must have shape (h, w), got {tuple(grain_map.shape)}")
    rows, columns = grain_map.shape
    finest = 2 ** int(grain_map.max())
    if image.height % (rows * finest) or image.width % (columns * finest):
        raise ValueError(
            f"the image's sides must be multiples of the map's {rows * finest}x{columns * finest} finest codes, "
            f"got {image.height}x{image.width}"
        )
    region_height, region_width = image.height // rows, image.width // columns
    scale = max(1, math.ceil(8 * finest / min(region_height, region_width))) if scale is None else scale
    canvas = image.resize((image.width * scale, image.height * scale), Image.NEAREST)
    overlay = Image.new("RGBA", canvas.size, (0, 0, 0, 0))
    draw = ImageDraw.Draw(overlay)
    for row, granularities in enumerate(grain_map.tolist()):
        for column, granularity in enumerate(granularities):
            side = 2**granularity
            height, width = region_height * scale // side, region_width * scale // side
            top, left = row * region_height * scale, column * region_width * scale
            for i in range(side):
                for j in range(side):
                    corner = (left + j * width, top + i * height)
                    end = (corner[0] + width - 1, corner[1] + height - 1)
                    draw.rectangle((corner, end), outline=GRAIN_COLOURS[granularity % len(GRAIN_COLOURS)])
    return Image.alpha_composite(canvas.convert("RGBA"), overlay).convert("RGB")
