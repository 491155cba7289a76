"""Pictures: grids of images, also with captions, codings drawn over images, generation step by step, router scores, code usage."""

import math

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

from .modeling.grain_map_dq import expand_grain_map

# Frame colours (RGBA) by granularity, coarsest first: blue, red, orange, green.
GRAIN_COLOURS = ((40, 90, 220, 150), (220, 40, 40, 150), (240, 150, 0, 150), (0, 150, 60, 150))
NO_CODE_YET = -1  # in place of a cell's granularity
LIGHT_GREY = (226, 226, 226)  # where no code is yet
ORDER_COLOURS = np.array([(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)])  # first to last
MARGIN = 4  # pixels around each image of an animation, and of a grid with captions
CAPTION_PIXELS = 12  # height of a caption's font
DOTS_PER_INCH = 100  # of figures
CODING_PIXELS = 320  # at least so wide is a coding drawn, before a figure scales it down


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


def captioned_grid(images, captions, columns=None, scale=2):
    """As `image_grid`, of enlarged images with the caption of each below it, in as many lines as its width asks for.

    Args:
        captions: one text for each image, in letters of Latin scripts, which are those of Pillow's own font.
        scale: enlargement, a whole number.

    Raises:
        ValueError: as `image_grid`, or another number of captions.
    """
    if len(captions) != len(images):
        raise ValueError(f"captions must be one for each of the {len(images)} images, got {len(captions)}")
    font = ImageFont.load_default(CAPTION_PIXELS)
    texts = [break_lines(caption, font, scale * image.width) for image, caption in zip(images, captions)]
    below = sum(font.getmetrics()) * max((len(lines) for lines in texts), default=0) + MARGIN
    cells = []
    for image, lines in zip(images, texts):
        cell = ImageOps.expand(enlarge(image, scale), (MARGIN, MARGIN, MARGIN, below), "white")
        pen, top = ImageDraw.Draw(cell), cell.height - below
        for i, line in enumerate(lines):
            pen.text((cell.width / 2, top + i * sum(font.getmetrics())), line, "black", font, anchor="ma")
        cells.append(cell)
    return image_grid(cells, columns)


def break_lines(text, font, width):
    """Lines of whole words that are no wider than so many pixels, unless a single word is."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".lstrip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def draw_grain_map(image, grain_map, scale=None):
    """The image enlarged, with one frame for each code: the finer the frames, the more codes (paper figure 1).

    Args:
        image: PIL image.
        grain_map: (h, w) integers, granularity of each region, 0 = coarsest; -1 where no code is yet, which becomes grey.
        scale: enlargement, a whole number; default: so that the finest frame has at least 8 pixels.

    Raises:
        ValueError: a map of another shape, or an image whose sides are not whole multiples of the map's finest codes.
    """
    grain_map = torch.as_tensor(grain_map)
    if grain_map.ndim != 2:
        raise ValueError(f"grain_map must have shape (h, w), got {tuple(grain_map.shape)}")
    num_granularities = max(0, int(grain_map.max())) + 1
    fine_grain_map = expand_grain_map(grain_map[None], num_granularities)[0]
    rows, columns = fine_grain_map.shape
    if image.height % rows or image.width % columns:
        raise ValueError(
            f"the image's sides must be multiples of the map's {rows}x{columns} finest codes, "
            f"got {image.height}x{image.width}"
        )
    scale = default_scale(image, fine_grain_map) if scale is None else scale
    return draw_codes(image, fine_grain_map, num_granularities, scale)


def default_scale(image, fine_grain_map):
    """The enlargement that gives a cell of the fine grid at least 8 pixels."""
    rows, columns = fine_grain_map.shape
    return max(1, math.ceil(8 / min(image.height // rows, image.width // columns)))


def draw_codes(image, fine_grain_map, num_granularities, scale):
    """The image enlarged, with a frame for each code of (H, W) granularities; cells with NO_CODE_YET are grey."""
    canvas = enlarge(image, scale)
    overlay = Image.new("RGBA", canvas.size, (0, 0, 0, 0))
    draw = ImageDraw.Draw(overlay)
    rows, columns = fine_grain_map.shape
    height, width = canvas.height // rows, canvas.width // columns  # of a cell
    for row, granularities in enumerate(fine_grain_map.tolist()):
        for column, granularity in enumerate(granularities):
            side = 1 if granularity == NO_CODE_YET else 2 ** (num_granularities - 1 - granularity)  # in cells
            if row % side or column % side:
                continue
            corner = (column * width, row * height)
            end = (corner[0] + side * width - 1, corner[1] + side * height - 1)
            if granularity == NO_CODE_YET:
                draw.rectangle((corner, end), fill=LIGHT_GREY)
            else:
                draw.rectangle((corner, end), outline=GRAIN_COLOURS[granularity % len(GRAIN_COLOURS)])
    return Image.alpha_composite(canvas.convert("RGBA"), overlay).convert("RGB")


def grey_out(image, present):
    """A copy of the image, grey where (H, W) bool says that no code is present."""
    image, missing = image.copy(), Image.fromarray(~present.cpu().numpy())
    image.paste(LIGHT_GREY, mask=missing.resize(image.size, Image.NEAREST))
    return image


def draw_order(order, size):
    """A PIL image of this (width, height): (H, W) steps from dark, the first, to bright, the last."""
    order = order.cpu().numpy()
    share = order / max(1, order.max()) * (len(ORDER_COLOURS) - 1)
    anchors = np.arange(len(ORDER_COLOURS))
    colours = np.stack([np.interp(share, anchors, channel) for channel in ORDER_COLOURS.T], axis=-1)
    return Image.fromarray(colours.round().astype(np.uint8)).resize(size, Image.NEAREST)


def enlarge(image, scale):
    """Each pixel becomes scale x scale pixels."""
    return image.resize((image.width * scale, image.height * scale), Image.NEAREST)


@torch.no_grad()
def draw_generation(vae, processor, codes, grain_maps, order, num_frames):
    """An animation, a list of PIL images, each a grid of all images as far as their codes go; the last is finished.

    Images on their way have their codings over them; what is still to come is grey.

    Args:
        vae: `DQVAEModel`.
        processor: `DQImageProcessor`.
        codes: (B, H, W) long, finished.
        grain_maps: (B, h, w) long.
        order: (B, H, W) integers, after how many steps each cell has its code; 0 for the first step.
        num_frames: frames with codes on their way, spread evenly over the steps; no more than there are steps.

    Raises:
        ValueError: no frame.
    """
    if num_frames < 1:
        raise ValueError(f"num_frames must be at least 1, got {num_frames}")
    num_granularities = len(vae.config.granularities)
    fine_grain_maps = expand_grain_map(grain_maps, num_granularities)
    num_steps = int(order.max()) + 1
    num_frames = min(num_frames, num_steps)
    finished = processor.post_process(vae.decode_each(codes).sample)
    scale = default_scale(finished[0], fine_grain_maps[0])

    def grid(images):
        return image_grid([ImageOps.expand(image, MARGIN, "white") for image in images])

    frames = []
    for frame in range(1, num_frames + 1):
        present = order < frame * num_steps // num_frames
        images = processor.post_process(vae.decode_each(codes, present).sample)
        maps = fine_grain_maps.where(present, NO_CODE_YET)
        frames.append(grid([draw_codes(*pair, num_granularities, scale) for pair in zip(images, maps)]))
    return [*frames, grid([enlarge(image, scale) for image in finished])]


def draw_scores(image, scores, name, grain_map, thresholds):
    """The image, the router's scores of its regions as a heat map with scale, and the coding, side by side; a PIL image.

    Args:
        image: PIL image.
        scores: (h, w) float, as `DQVAEModel.region_scores` gives them.
        name: of what they are.
        grain_map: (h, w) integers.
        thresholds: the router's, marked on the scale; none where it did not decide by them.

    Raises:
        ImportError: without matplotlib.
    """
    figure = new_figure(11, 0.6 + 3.2 * image.height / image.width)
    panels = figure.subplots(1, 3)
    word = "threshold" + "s" * (len(thresholds) > 1)
    above = f"; {word} {', '.join(f'{value:.2f}' for value in thresholds)}" if len(thresholds) else ""
    titles = ("image", f"{name}{above}", f"{int((4**grain_map).sum())} codes")
    for axes, title in zip(panels, titles):
        axes.set_title(title, fontsize=10)
        axes.set_axis_off()
    panels[0].imshow(image, interpolation="nearest")
    scores = np.asarray(scores)
    low, high = score_bounds(scores, thresholds)
    heat = panels[1].imshow(scores, cmap="magma", vmin=low, vmax=high)
    scale = figure.colorbar(heat, ax=panels[1], fraction=0.046)
    for threshold in thresholds:
        scale.ax.axhline(threshold, color="white", linewidth=2)
    panels[2].imshow(draw_grain_map(image, grain_map, scale=math.ceil(CODING_PIXELS / image.width)))
    return as_image(figure)


def score_bounds(scores, thresholds):
    """Ends of a scale on which scores, thresholds and 0 lie."""
    low, high = min(float(scores.min()), 0, *thresholds), max(float(scores.max()), 0, *thresholds)
    return low, high if high > low else low + 1


def draw_code_usage(uses, granularities):
    """How often each code is used, sorted, in all and at each granularity; a PIL image.

    Args:
        uses: (K, N) long, of each code at each granularity, coarsest first, as `CodeStatistics` counts them.
        granularities: K pixels, sides of a code's square.

    Raises:
        ImportError: without matplotlib.
    """
    from .metrics.code_statistics import perplexity  # here, for the library `evaluate` takes a second to import

    figure = new_figure(9, 6)
    histogram, ranked = figure.subplots(2, 1)
    shares = (uses / uses.sum())[:, uses.sum(0).argsort(descending=True)]
    ranks = range(1, uses.shape[1] + 1)
    histogram.set_title("all codes, sorted by use", fontsize=10)
    histogram.set_ylabel("share of all codes")
    ranked.set_title("each granularity sorted by itself", fontsize=10)
    ranked.set_ylabel("share of its codes")
    ranked.set_yscale("log")
    for granularity, side in enumerate(granularities):
        colour = [value / 255 for value in GRAIN_COLOURS[granularity % len(GRAIN_COLOURS)][:3]]
        label = f"{side}x{side} pixels"
        histogram.bar(ranks, shares[granularity], 1.0, shares[:granularity].sum(0), color=colour, label=label)
        own = uses[granularity].sort(descending=True).values
        own = own[own > 0]
        if len(own):
            label += f": {len(own)} used, perplexity {perplexity(own):.0f}"
            ranked.plot(ranks[: len(own)], own / own.sum(), color=colour, label=label)
    for axes in (histogram, ranked):
        axes.axhline(
            1 / len(ranks), color="0.4", linestyle="--", linewidth=1, label=f"uniform over {len(ranks)} codes"
        )
        axes.set_xlim(0.5, len(ranks) + 0.5)
        axes.set_xlabel("rank of the code")
        axes.legend(fontsize=9)
    return as_image(figure)


def new_figure(width, height):
    """An empty matplotlib figure of this size in inches, or ImportError."""
    return import_figure()((width, height), dpi=DOTS_PER_INCH, layout="constrained")


def import_figure():
    """The class of matplotlib's figures, or ImportError."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            'figures need matplotlib; install it with `pip install -c constraints.txt -e ".[draw]"`'
        ) from error
    return Figure


def as_image(figure):
    """A figure as a PIL image."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
