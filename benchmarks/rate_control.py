"""What rate control gives: quality against codes and bits as more regions are coded finely, beside JPEG and WebP.

    python benchmarks/rate_control.py --output docs/evidence-tables.md --plot docs/images/rate_control.png
    python benchmarks/rate_control.py --model runs/vae/model --data path/to/images --max_images 1000

Every image is encoded with `encode(..., fine_ratio=r)` for each r, with the router's own choice, and with JPEG and WebP at
each quality, all from the same 8-bit pixels, and what is decoded is rounded to 8 bits before it is measured.

The bits of DQ-VAE are those of its codes and its grain map as numbers of fixed length: nothing is entropy coded. The
files of JPEG and WebP are entropy coded, but have headers, which weigh much for small images. So their bits are counted
twice, of the file and without all that a decoder could add that knows the quality and the size of the images:

- "JPEG scan": the entropy-coded data between the header of the scan and the end marker, with the standard's Huffman
  tables. (The file has its own, which are shorter.)
- "WebP stream": the VP8 frame, without the RIFF container, start code, width and height.
"""

import io
import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import PIL
import torch
from PIL import Image
from report import write_section
from tqdm.auto import tqdm
from transformers import HfArgumentParser

from dq_hf import DEFAULT_MODEL, DQImageProcessor
from dq_hf.data.images import ImageCollator, first_rows, load_images
from dq_hf.loading import load_tokenizer
from dq_hf.metrics import PerceptualDistance, psnr, ssim
from dq_hf.metrics.code_statistics import count_bits
from dq_hf.modeling.grain_map_dq import refinement_shares
from dq_hf.modeling.image_processing_dq import from_bytes
from dq_hf.pictures import new_figure

ROUTER = "router"
DIGITS = {"PSNR": 2, "SSIM": 3}  # a perceptual distance gets four


@dataclass
class Arguments:
    model: str = field(default=str(DEFAULT_MODEL), metadata={"help": "folder or Hub id with a DQ-VAE"})
    data: str = field(default="examples/data/emoji", metadata={"help": "folder of images or Parquet, or a Hub id"})
    split: str = field(default="test", metadata={"help": "which images of them"})
    image_column: str = field(default="image", metadata={"help": "where they are"})
    max_images: int | None = field(default=None, metadata={"help": "at most so many, drawn once and for all"})
    fine_ratios: list[float] = field(
        default_factory=lambda: [step / 10 for step in range(11)],
        metadata={
            "help": "shares of regions that are coded finely; of K > 2 granularities, the chance that each of the K - 1 "
            "refinements of a region is made"
        },
    )
    qualities: list[int] = field(
        default_factory=lambda: [1, 3, 5, 8, 12, 16, 20, 25, 30, 40, 50, 60, 70, 80, 90, 95],
        metadata={"help": "of JPEG and WebP, 1 ... 100"},
    )
    subsampling: str = field(default="4:2:0", metadata={"help": "of JPEG's colours; or 4:4:4"})
    perceptual: str = field(
        default="efficientnet-lite0", metadata={"help": "network of the perceptual distance, or lpips"}
    )
    batch_size: int = field(default=32, metadata={"help": "images at a time"})
    threads: int = field(default=1, metadata={"help": "CPU threads"})
    device: str = field(default="cpu", metadata={"help": "torch device"})
    output: str | None = field(default=None, metadata={"help": "Markdown file to put the tables into"})
    plot: str | None = field(default=None, metadata={"help": "picture of the curves, to be written"})


def main(args):
    torch.set_num_threads(args.threads)
    vae = load_tokenizer(args.model).to(args.device).eval()
    perceptual = PerceptualDistance(args.perceptual)
    points, curves, num_images = measure(args, vae, perceptual)
    report = make_report(args, vae, perceptual, points, curves, num_images)
    print(report)
    if args.plot is not None:
        draw(points, curves, perceptual.figure).savefig(args.plot)
    if args.output is not None:
        title = f"benchmarks/rate_control.py, {Path(args.model).name} on {Path(args.data).name}"
        write_section(Path(args.output), title, report)


def measure(args, vae, perceptual):
    """Means over the images.

    Returns:
        {fine ratio or ROUTER: {"codes", "bits", "PSNR", ...}}, {"JPEG file": [{"bits", "PSNR", ...}], ...} with rising
        bits, and the number of images.
    """
    processor, loader = load_data(args, vae.config)
    num_granularities = len(vae.config.granularities)
    if num_granularities == 1:
        raise ValueError("the model must have at least two granularities; with one there is no rate to control")
    shares = {ratio: refinement_shares(ratio, num_granularities) for ratio in args.fine_ratios} | {ROUTER: None}
    values = {}  # {setting: {figure: [one tensor or list a batch]}}

    def record(setting, images, **counts):
        figures = counts | quality(as_uint8(images), references, perceptual)
        for name, each in figures.items():
            values.setdefault(setting, {}).setdefault(name, []).extend(float(value) for value in each)

    for batch in tqdm(loader, desc="measure"):
        originals = processor.post_process(batch["pixel_values"])
        references = as_uint8(originals)
        pixel_values = processor(originals)["pixel_values"].to(args.device)
        for ratio, share in shares.items():
            with torch.no_grad():
                encoded = vae.encode(pixel_values, fine_ratio=share)
                sample = vae.decode_codes(encoded.codes).sample
            regions = encoded.grain_map[0].numel()
            bits = count_bits(encoded.num_codes, regions, vae.config.codebook_size, num_granularities)
            record(("DQ-VAE", ratio), processor.post_process(sample), codes=encoded.num_codes, bits=bits)
        for number in args.qualities:
            for codec, code in (("JPEG", code_jpeg), ("WebP", code_webp)):
                decoded, file, bare = zip(*(code(image, number, args.subsampling) for image in originals))
                record((codec, number), decoded, file=file, bare=bare)

    means = {
        setting: {name: float(np.mean(each)) for name, each in figures.items()} for setting, figures in values.items()
    }
    points = {ratio: means["DQ-VAE", ratio] for ratio in shares}
    curves = {}
    for curve, codec, way in (
        ("JPEG file", "JPEG", "file"),
        ("JPEG scan", "JPEG", "bare"),
        ("WebP file", "WebP", "file"),
        ("WebP stream", "WebP", "bare"),
    ):
        rows = [means[codec, number] | {"bits": means[codec, number][way]} for number in args.qualities]
        curves[curve] = sorted(rows, key=lambda row: row["bits"])
    return points, curves, len(values["DQ-VAE", ROUTER]["codes"])


def load_data(args, config):
    """The processor for a model's size, and a loader of images."""
    processor = DQImageProcessor.for_model(config)
    dataset = load_images(args.data, args.split, args.image_column)
    if args.max_images is not None:
        dataset = first_rows(dataset, args.max_images)
    collate = ImageCollator(processor, args.image_column)
    return processor, torch.utils.data.DataLoader(dataset, args.batch_size, collate_fn=collate)


def as_uint8(images):
    """PIL images as a tensor (B, 3, H, W)."""
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2)


def quality(images, references, perceptual):
    """How near images (B, 3, H, W) uint8 are to others, {name: (B,)}."""
    distance = perceptual.network.distance(from_bytes(images), from_bytes(references))
    return {"PSNR": psnr(images, references), "SSIM": ssim(images, references), perceptual.figure: distance}


def code_jpeg(image, quality, subsampling):
    """The image that JPEG gives back, bits of the file, and bits of the scan's data alone."""
    options = dict(format="JPEG", quality=quality, subsampling=subsampling)
    file = save(image, **options)
    return load(file), 8 * min(len(file), len(save(image, optimize=True, **options))), 8 * len(jpeg_scan(file))


def jpeg_scan(file):
    """The entropy-coded data of a baseline JPEG file."""
    place, marker = 2, None  # behind the start marker
    while marker != 0xDA:  # start of scan
        marker = file[place + 1]
        place += 2 + int.from_bytes(file[place + 2 : place + 4], "big")
    return file[place:-2]  # without the end marker


def code_webp(image, quality, subsampling):
    """The image that lossy WebP gives back, bits of the file, and bits of the VP8 stream alone; it is always 4:2:0."""
    file = save(image, format="WEBP", quality=quality, method=6)
    return load(file), 8 * len(file), 8 * len(vp8_stream(file))


def vp8_stream(file):
    """The VP8 frame of a simple WebP file without its start code, width and height (RFC 6386, section 9.1)."""
    if file[12:16] != b"VP8 ":
        raise ValueError(f"expected a simple lossy WebP file, got one with a chunk {file[12:16]}")
    frame = file[20 : 20 + int.from_bytes(file[16:20], "little")]
    return frame[:3] + frame[10:]


def save(image, **options):
    """The bytes of an image's file."""
    buffer = io.BytesIO()
    image.save(buffer, **options)
    return buffer.getvalue()


def load(file):
    """The image of a file's bytes."""
    return Image.open(io.BytesIO(file)).convert("RGB")


def at_equal(curve, known, value, wanted):
    """The figure `wanted` where `known` has that value, between two settings; NaN beyond the curve. Bits count in logs."""

    def column(name):
        values = np.array([row[name] for row in curve])
        return np.log(values) if name == "bits" else values

    order = column(known).argsort()
    value = math.log(value) if known == "bits" else value
    found = np.interp(value, column(known)[order], column(wanted)[order], left=math.nan, right=math.nan)
    return math.exp(found) if wanted == "bits" else float(found)


def make_report(args, vae, perceptual, points, curves, num_images):
    """Three Markdown tables, and how they were made."""
    names = ["PSNR", "SSIM", perceptual.figure]

    def texts(figures):
        return [f"{figures[name]:.{DIGITS.get(name, 4)}f}" for name in names]

    height, width = vae.config.image_height_width
    map_bits = count_bits(0, math.prod(vae.config.grid_sizes[0]), 1, len(vae.config.granularities))
    lines = [
        f"{Path(args.model).name} on {num_images} images of {args.data}, split {args.split}, {width}x{height}; JPEG "
        f"{args.subsampling}; {perceptual.network_description}; torch {torch.__version__}, Pillow {PIL.__version__}. Bits: codes "
        f"of {math.log2(vae.config.codebook_size):g} bits, and {map_bits:g} of the grain map. All means over the images.",
        "",
        f"| fine ratio | codes | bits | bits a pixel | {' | '.join(names)} |",
        "|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for ratio, figures in points.items():
        cells = [ratio, f"{figures['codes']:.1f}", f"{figures['bits']:.0f}", f"{figures['bits'] / height / width:.3f}"]
        lines.append(f"| {' | '.join(map(str, cells))} | {' | '.join(texts(figures))} |")
    lines += [
        "",
        f"{' / '.join(names)} at equal bits (–: the codec has no setting with so few):",
        "",
        f"| bits | DQ-VAE | {' | '.join(curves)} |",
        "|---:|---:" + "|---:" * len(curves) + "|",
    ]
    for figures in points.values():
        cells = [texts(figures)]
        for curve in curves.values():
            cells.append(texts({name: at_equal(curve, "bits", figures["bits"], name) for name in names}))
        cells = ["–" if "nan" in cell else " / ".join(cell) for cell in cells]
        lines.append(f"| {figures['bits']:.0f} | {' | '.join(cells)} |")
    lines += [
        "",
        "Bits for equal PSNR (–: the codec has no setting so bad or so good):",
        "",
        f"| PSNR | DQ-VAE | {' | '.join(curves)} |",
        "|---:|---:" + "|---:" * len(curves) + "|",
    ]
    for figures in points.values():
        others = [at_equal(curve, "PSNR", figures["PSNR"], "bits") for curve in curves.values()]
        others = ["–" if math.isnan(bits) else f"{bits:.0f}" for bits in others]
        lines.append(f"| {figures['PSNR']:.2f} | {figures['bits']:.0f} | {' | '.join(others)} |")
    return "\n".join(lines)


def draw(points, curves, perceptual_name):
    """A matplotlib figure: each figure of merit against bits."""
    figure = new_figure(13, 4.2)
    sweep = [figures for ratio, figures in points.items() if ratio != ROUTER]
    router = points[ROUTER]
    styles = {"JPEG": "C1", "WebP": "C2"}
    units = {"PSNR": "PSNR, dB", "SSIM": "SSIM", perceptual_name: f"{perceptual_name} (less is better)"}
    for number, (name, label) in enumerate(units.items(), 1):
        axes = figure.add_subplot(1, 3, number)
        axes.set_xscale("log")
        axes.minorticks_off()
        axes.set_xlabel("bits an image")
        axes.set_title(label, fontsize=10)
        axes.grid(alpha=0.3, which="major")
        for curve, rows in curves.items():
            axes.plot(
                [row["bits"] for row in rows],
                [row[name] for row in rows],
                color=styles[curve.split()[0]],
                linestyle=":" if curve.endswith("file") else "-",
                marker=".",
                label=curve,
            )
        axes.plot([row["bits"] for row in sweep], [row[name] for row in sweep], "C0o-", markersize=4, label="DQ-VAE")
        axes.plot(router["bits"], router[name], "k*", markersize=11, label="DQ-VAE, router's choice", zorder=3)
        axes.set_xticks(ticks := [number * 10**power for power in range(2, 6) for number in (1, 2, 5)], ticks)
        axes.set_xlim(0.8 * sweep[0]["bits"], 1.2 * max(row["bits"] for rows in curves.values() for row in rows))
        down = name == perceptual_name
        for row, place, side in (
            (sweep[0], (7, 0 if down else -7), "left"),
            (sweep[-1], (0, -14 if down else 7), "right"),
        ):
            text = f"{row['codes']:.0f} codes"
            axes.annotate(text, (row["bits"], row[name]), place, textcoords="offset points", ha=side, fontsize=9)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    return figure


if __name__ == "__main__":
    main(HfArgumentParser(Arguments).parse_args_into_dataclasses()[0])
