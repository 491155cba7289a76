"""Draw the figures of the README and of how-it-works.md: what the embedded model does to emoji it was not trained on.

python docs/draw_figures.py --output_dir docs/images
"""

import argparse
from pathlib import Path

import datasets
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from dq_hf import DEFAULT_MODEL, DQForImageGeneration, DQImageProcessor
from dq_hf.metrics.code_statistics import count_bits
from dq_hf.pictures import GRAIN_COLOURS, draw_grain_map, score_bounds

EMOJI = Path(__file__).parents[1] / "examples" / "data" / "emoji"
PICTURE = 293  # row of the held-out images: a cupcake
STRIP = (212, 293)  # rows of the README's figure
RATES = (0.1, 0.4, 0.8)  # its shares of fine regions
COLOURS = [[value / 255 for value in colour[:3]] for colour in GRAIN_COLOURS]
NAMES = ("coarse", "fine")
DOTS_PER_INCH = 110


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="docs/images", type=Path, help="where the pictures go (%(default)s)")
    args = parser.parse_args()
    model = DQForImageGeneration.from_pretrained(DEFAULT_MODEL)
    processor = DQImageProcessor.from_pretrained(DEFAULT_MODEL)
    emoji = datasets.load_dataset(str(EMOJI), split="test")
    picture = emoji[PICTURE]
    pixel_values = processor(picture["image"])["pixel_values"]
    with torch.no_grad():
        rates = draw_rates(model.vae, processor, [emoji[row]["image"] for row in STRIP])
        rates.savefig(args.output_dir / "rates.png")
        encoded = model.vae.encode(pixel_values)
        stream = model.transformer.pack(encoded.codes, encoded.grain_map)
        draw_tokenizer(model.vae, processor, pixel_values, encoded).savefig(args.output_dir / "tokenizer.png")
        draw_stream(model.transformer, stream).savefig(args.output_dir / "stream.png")
        draw_growth(model.vae, processor, encoded, stream).savefig(args.output_dir / "growth.png")


def new_figure(columns, width, height):
    """A figure with a row of panels without axes."""
    figure = Figure((width, height), dpi=DOTS_PER_INCH)
    panels = figure.subplots(1, columns)
    for axes in panels:
        axes.set_axis_off()
    return figure, panels


def draw_rates(vae, processor, images):
    """A row an image: the image, and at each of three rates its grain map and its reconstruction."""
    pixel_values = processor(images)["pixel_values"]
    originals = processor.post_process(pixel_values)
    widths = [1, *[0.12, 1, 1] * len(RATES)]
    figure = Figure((12, 1.63 * len(images) + 0.68), dpi=DOTS_PER_INCH)
    top = 1 - 0.66 / figure.get_figheight()
    panels = figure.subplots(len(images), len(widths), width_ratios=widths, squeeze=False)
    figure.subplots_adjust(left=0.005, right=0.995, bottom=0.01, top=top, wspace=0.04, hspace=0.04)
    for axes in panels.flat:
        axes.set_axis_off()
    for axes, image in zip(panels[:, 0], originals):
        axes.imshow(smooth(image))
    write_above(figure, panels[0, 0], panels[0, 0], top, f"image\n{originals[0].width} x {originals[0].height} pixels")
    for first, rate in zip(range(2, len(widths), 3), RATES):
        encoded = vae.encode(pixel_values, fine_ratio=rate)
        decoded = processor.post_process(vae.decode_codes(encoded.codes).sample)
        for row, grain_map, original, image in zip(panels, encoded.grain_map, originals, decoded):
            faded = Image.blend(original, Image.new("RGB", original.size, "white"), 0.5)
            row[first].imshow(draw_grain_map(faded, grain_map, scale=6))
            row[first + 1].imshow(smooth(image))
        num_codes, num_regions = int(encoded.num_codes[0]), encoded.grain_map[0].numel()  # of all, as their share is
        bits = sum(count_bits(num_codes, num_regions, vae.config.codebook_size, len(vae.config.granularities)))
        title = f"{rate:.0%} of the regions fine\n{num_codes} codes, {bits:.0f} bits"
        write_above(figure, panels[0, first], panels[0, first + 1], top, title)
    return figure


def write_above(figure, left, right, bottom, text):
    """Text in the middle above the panels from `left` to `right`."""
    middle = (left.get_position().x0 + right.get_position().x1) / 2
    figure.text(middle, bottom + 0.02, text, ha="center", va="bottom", fontsize=12)


def smooth(image):
    """An image of few pixels, enlarged for the eye."""
    return image.resize((6 * image.width, 6 * image.height), Image.BICUBIC)


def draw_tokenizer(vae, processor, pixel_values, encoded):
    """Figure 3 of the paper on one picture: from the image to its reconstruction, left to right."""
    figure, panels = new_figure(5, 14, 2.9)
    figure.subplots_adjust(left=0.01, right=0.99, bottom=0.02, top=0.84, wspace=0.45)
    image = processor.post_process(pixel_values)[0]
    grain_map, codes = encoded.grain_map[0], encoded.codes[0]
    (threshold,) = vae.router.thresholds.tolist()
    num_fine, num_codes = int(grain_map.sum()), int(encoded.num_codes)
    panels[0].imshow(image, interpolation="nearest")
    scores = vae.region_scores(pixel_values)[0].numpy()
    low, high = score_bounds(scores, [threshold])
    heat = panels[1].imshow(scores, cmap="magma", vmin=low, vmax=high)
    for row, column in (grain_map == 1).nonzero().tolist():
        panels[1].add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor="white", linewidth=0.8))
    scale = figure.colorbar(heat, cax=panels[1].inset_axes((1.03, 0, 0.06, 1)))
    scale.ax.axhline(threshold, color="white", linewidth=2)
    panels[2].imshow(draw_grain_map(image, grain_map, scale=6))
    panels[3].imshow(codes, cmap="nipy_spectral", vmin=0, vmax=vae.config.codebook_size)
    draw_cells(panels[3], grain_map)
    panels[4].imshow(processor.post_process(vae.decode_codes(encoded.codes).sample)[0], interpolation="nearest")
    bits = num_codes * (vae.config.codebook_size - 1).bit_length() + grain_map.numel()
    titles = (
        f"image\n{image.width}x{image.height} pixels",
        f"{vae.router.score_name}\nfine above {threshold:.2f}",
        f"grain map\n{num_fine} of {grain_map.numel()} regions fine",
        f"{num_codes} codes\nof a codebook of {vae.config.codebook_size}",
        f"reconstruction\nfrom {bits} bits",
    )
    for axes, title in zip(panels, titles):
        axes.set_title(title, fontsize=11)
    figure.canvas.draw()  # now the panels are where they stay
    boxes = [axes.get_position() for axes in panels]
    for label, left, right in zip(("router", "", "encoder,\nquantiser", "decoder"), boxes, boxes[1:]):
        middle, gap = (left.y0 + left.y1) / 2, 0.048 if left is boxes[1] else 0.008
        place = {"xycoords": "figure fraction", "textcoords": "figure fraction"}
        arrow = {"arrowstyle": "-|>", "linewidth": 1.8, "color": "0.3"}
        panels[0].annotate("", (right.x0 - 0.004, middle), (left.x1 + gap, middle), arrowprops=arrow, **place)
        figure.text((left.x1 + right.x0) / 2, middle + 0.04, label, ha="center", va="bottom", fontsize=10)
    return figure


def draw_cells(axes, grain_map):
    """A frame for each code on axes of the fine grid."""
    for row, column in torch.cartesian_prod(*map(torch.arange, grain_map.shape)).tolist():
        granularity = int(grain_map[row, column])
        side = 2 // 2**granularity  # in fine cells
        for i in range(0, 2, side):
            for j in range(0, 2, side):
                corner = (2 * column + j - 0.5, 2 * row + i - 0.5)
                axes.add_patch(Rectangle(corner, side, side, fill=False, edgecolor="white", linewidth=0.6))


def cells_of(config, stream):
    """(granularity, row, column) on the fine grid, and side in fine cells, of each code of a stream, in its order."""
    cells = []
    for granularity, position in zip(stream.granularities[0].tolist(), stream.positions[0].tolist()):
        rows, columns = config.grid_sizes[granularity]
        if position < rows * columns:  # else a start or an end
            side = config.grid_sizes[-1][0] // rows
            cells.append((granularity, position // columns * side, position % columns * side, side))
    return cells


def draw_stream(transformer, stream):
    """Figure 4 of the paper on one picture: the order of its codes, and the stream that the generator sees."""
    figure = Figure((14, 4.6), dpi=DOTS_PER_INCH)
    order = figure.add_axes((0.01, 0.02, 0.31, 0.9))
    tokens = figure.add_axes((0.34, 0.02, 0.65, 0.9))
    for axes in (order, tokens):
        axes.set_axis_off()
        axes.invert_yaxis()
    order.set_title("where each code goes, and when", fontsize=11)
    rows, columns = transformer.config.grid_sizes[-1]
    order.set(xlim=(0, columns), ylim=(rows, 0), aspect="equal")
    for number, (granularity, row, column, side) in enumerate(cells_of(transformer.config, stream), 1):
        colour = COLOURS[granularity]
        order.add_patch(Rectangle((column, row), side, side, facecolor=(*colour, 0.12), edgecolor=colour))
        place = (column + side / 2, row + side / 2 + 0.05)
        order.text(*place, number, ha="center", va="center", fontsize=6 + 4 * (side > 1), color=colour)

    granularities, positions, contents = (
        values[0].tolist() for values in (stream.granularities, stream.positions, stream.contents)
    )
    codebook_size = transformer.config.codebook_size
    tokens.set_title("the stream: a position and a content in every element", fontsize=11)
    tokens.set(xlim=(-1.6, 12.2), ylim=(5.7, -0.75))
    for granularity in range(len(NAMES)):
        part = [i for i, value in enumerate(granularities) if value == granularity]
        shown = [*part[:8], None, *part[-3:]]
        top = 3.5 * granularity
        tokens.text(-0.1, top - 0.15, NAMES[granularity], color=COLOURS[granularity], ha="right", fontsize=11)
        for height, name in ((0.45, "position"), (1.45, "content")):
            tokens.text(-0.1, top + height, name, ha="right", va="center", fontsize=10)
        for place, i in enumerate(shown):
            if i is None:
                tokens.text(place + 0.5, top + 1, "...", ha="center", va="center", fontsize=14)
                continue
            pair = positions[i], contents[i]
            if contents[i] == codebook_size + 1:
                pair = "end", "end"
            elif contents[i] > codebook_size + 1:
                pair = "start", "start"
            for row, text in enumerate(pair):
                colour = COLOURS[granularity]
                tokens.add_patch(Rectangle((place, top + row), 0.92, 0.9, facecolor=(*colour, 0.15), edgecolor=colour))
                tokens.text(place + 0.46, top + row + 0.45, text, ha="center", va="center", fontsize=9)
    arrow = {"arrowstyle": "-|>", "color": "0.3", "linewidth": 1.3}
    tokens.annotate("", (4.46, 0.02), (3.46, 0.02), arrowprops=arrow | {"connectionstyle": "arc3,rad=-0.5"})
    tokens.text(3.96, -0.45, "Position-Transformer", ha="center", fontsize=10)
    tokens.annotate("", (4.3, 1.1), (4.3, 0.85), arrowprops=arrow)
    tokens.annotate("", (4.46, 1.88), (3.46, 1.88), arrowprops=arrow | {"connectionstyle": "arc3,rad=0.5"})
    tokens.text(3.96, 2.55, "Content-Transformer", ha="center", fontsize=10)
    return figure


def draw_growth(vae, processor, encoded, stream):
    """The picture as its stream grows: what is decoded of a part of the codes, grey where there is none yet."""
    cells = cells_of(vae.config, stream)
    num_coarse = sum(granularity == 0 for granularity, *_ in cells)
    counts = [num_coarse // 2, num_coarse, *(num_coarse + (len(cells) - num_coarse) * i // 3 for i in (1, 2, 3))]
    figure, panels = new_figure(len(counts), 14, 3.1)
    figure.subplots_adjust(left=0.01, right=0.99, bottom=0.02, top=0.9, wspace=0.06)
    vectors = vae.quantizer.lookup(encoded.codes)
    pixels = vae.config.granularities[-1]
    for axes, count in zip(panels, counts):
        known = torch.zeros(encoded.codes.shape[1:])
        for _, row, column, side in cells[:count]:
            known[row : row + side, column : column + side] = 1
        image = processor.post_process(vae.decode(vectors * known).sample, "pt")[0].permute(1, 2, 0)
        mask = known.repeat_interleave(pixels, 0).repeat_interleave(pixels, 1)[..., None]
        axes.imshow(image * mask + 0.88 * (1 - mask), interpolation="nearest")
        axes.set_title(f"{count} codes", fontsize=11)
    return figure


if __name__ == "__main__":
    main()
