"""What rate control gives: quality against real bytes as more regions are coded finely, beside JPEG, WebP and AVIF.

    python benchmarks/rate_control.py --max_images 96 --output docs/evidence-tables.md --plot docs/images/rate_control.png
    python benchmarks/rate_control.py --model runs/vae/model --data path/to/images --max_images 1000

Every image is encoded with `encode(..., fine_ratio=r)` for each r, with the router's own choice, and with the other codecs at
each quality, all from the same 8-bit pixels, and what is decoded is rounded to 8 bits before it is measured. Codes and grain
map are then written as `dq_hf.codec.compress` does, with the static prior and, where the model has a generator, with the
generator prior, each image under its class or its caption; beside it stands the ideal, the code length that the generator itself gives
(`log_prob`).

All files have headers, which weigh much for small images. So bits are counted twice, of the file and without all that a
decoder could add that knows the model or the quality, and the size of the images:

- "static payload", "generator payload": what the entropy coder wrote.
- "JPEG scan": the entropy-coded data between the header of the scan and the end marker, with the standard's Huffman
  tables. (The file has its own, which are shorter.)
- "WebP stream": the VP8 frame, without the RIFF container, start code, width and height.
- "AVIF data": the AV1 data, without the boxes around it.

What no table of bits shows is the receiver's copy of the model; the report says how large it is.
"""

import io
import math
import os
import time
from dataclasses import dataclass
from functools import partial
from itertools import islice, repeat
from pathlib import Path

import numpy as np
import PIL
import torch
from PIL import Image
from report import describe_device, option, publish, table
from tqdm.auto import tqdm
from transformers import HfArgumentParser

from dq_hf import DEFAULT_MODEL, DQImageProcessor
from dq_hf.codec import compress, decompress
from dq_hf.codec.container import Header, write_file
from dq_hf.codec.generator_prior import GeneratorPrior
from dq_hf.codec.static_prior import StaticPrior
from dq_hf.data.images import ImageCollator, first_rows, load_images
from dq_hf.loading import load_models
from dq_hf.metrics import PerceptualDistance, psnr, ssim
from dq_hf.metrics.code_statistics import count_bits
from dq_hf.metrics.references import reference_captions, reference_labels
from dq_hf.modeling.grain_map_dq import refinement_shares
from dq_hf.modeling.image_processing_dq import from_bytes
from dq_hf.pictures import new_figure

ROUTER = "router"
FIXED = "fixed length"
BITS = (FIXED, "file", "payload")  # how figures in bits end


@dataclass
class Arguments:
    model: str = option(str(DEFAULT_MODEL), "folder or Hub id with a DQ-VAE")
    data: str = option("examples/data/emoji", "folder of images or Parquet, or a Hub id")
    split: str = option("test", "which images of them")
    image_column: str = option("image", "where they are")
    label_column: str = option("category", "their classes, for a model with classes")
    caption_column: str = option("captions", "their captions, for a model with text; or none")
    max_images: int | None = option(None, "at most so many, drawn once and for all")
    fine_ratios: list[float] = option(
        [step / 10 for step in range(11)],
        "shares of regions that are coded finely; of K > 2 granularities, the chance that each of the K - 1 "
        "refinements of a region is made",
    )
    qualities: list[int] = option(
        [1, 3, 5, 8, 12, 16, 20, 25, 30, 40, 50, 60, 70, 80, 90, 95], "of JPEG, WebP and AVIF, 1 ... 100"
    )
    subsampling: str = option("4:2:0", "of JPEG's and AVIF's colours; or 4:4:4")
    perceptual: str = option("efficientnet-lite0", "network of the perceptual distance, or lpips")
    timed_images: int = option(4, "images whose way to bytes and back is timed")
    batch_size: int = option(32, "images at a time")
    threads: int = option(1, "CPU threads")
    device: str = option("cpu", "torch device")
    output: str | None = option(None, "Markdown file to put the tables into")
    plot: str | None = option(None, "picture of the curves, to be written")


def main(args):
    torch.set_num_threads(args.threads)
    vae, pipe = load_models(args.model)
    (pipe or vae).to(args.device)
    perceptual = PerceptualDistance(args.perceptual)
    processor, dataset, conditions = load_data(args, vae, pipe)
    points, curves = measure(args, vae, pipe, perceptual, processor, dataset, conditions)
    seconds = measure_seconds(args, pipe or vae, dataset, conditions, processor)
    report = make_report(args, vae, pipe, perceptual, points, curves, seconds, len(dataset))
    title = f"benchmarks/rate_control.py, {Path(args.model).name} on {Path(args.data).name}"
    publish(report, title, args.output)
    if args.plot is not None:
        draw(points, curves, perceptual.figure).savefig(args.plot)


@torch.no_grad()
def measure(args, vae, pipe, perceptual, processor, dataset, conditions):
    """Means over the images.

    Returns:
        {fine ratio or ROUTER: {"codes", "fixed length", "static file", ..., "PSNR", ...}} and {"JPEG file": [{"bits",
        "PSNR", ...}], ...} with rising bits.
    """
    num_granularities = len(vae.config.granularities)
    if num_granularities == 1:
        raise ValueError("the model must have at least two granularities; with one there is no rate to control")
    shares = {ratio: refinement_shares(ratio, num_granularities) for ratio in args.fine_ratios} | {ROUTER: None}
    collate = ImageCollator(processor, args.image_column)
    loader = torch.utils.data.DataLoader(dataset, args.batch_size, collate_fn=collate)
    static, conditions = StaticPrior(vae), iter(conditions)
    values = {}  # {setting: {figure: [one number an image]}}

    def record(setting, images, **counts):
        figures = counts | quality(as_uint8(images), as_uint8(originals), perceptual)
        for name, each in figures.items():
            values.setdefault(setting, {}).setdefault(name, []).extend(float(value) for value in each)

    for batch in tqdm(loader, desc="measure"):
        originals = processor.post_process(batch["pixel_values"])
        pixel_values = processor(originals)["pixel_values"].to(args.device)
        chosen = list(islice(conditions, len(originals)))
        for ratio, share in shares.items():
            encoded = vae.encode(pixel_values, fine_ratio=share)
            images = processor.post_process(vae.decode_codes(encoded.codes).sample)
            record(("DQ-VAE", ratio), images, **count(vae, pipe, static, encoded, originals, chosen))
        for number in args.qualities:
            for codec in CODECS:
                decoded, file, bare = zip(*(code(codec, image, number, args.subsampling) for image in originals))
                record((codec, number), decoded, file=file, bare=bare)

    means = {
        setting: {name: float(np.mean(each)) for name, each in figures.items()} for setting, figures in values.items()
    }
    curves = {}
    for codec, (_, bare) in CODECS.items():
        for curve, way in ((f"{codec} file", "file"), (f"{codec} {bare}", "bare")):
            rows = [means[codec, number] | {"bits": means[codec, number][way]} for number in args.qualities]
            curves[curve] = sorted(rows, key=lambda row: row["bits"])
    return {ratio: means["DQ-VAE", ratio] for ratio in shares}, curves


def count(vae, pipe, static, encoded, images, conditions):
    """What images are coded in, {figure: (B,)}: codes, bits of fixed length, of each prior, and, ideally, of the generator."""
    config, num_regions = vae.config, encoded.grain_map[0].numel()
    fixed = sum(count_bits(encoded.num_codes, num_regions, config.codebook_size, len(config.granularities)))
    counts, ways = {"codes": encoded.num_codes, FIXED: fixed}, {"static": repeat(static)}
    if pipe is not None:
        ways["generator"] = (GeneratorPrior(pipe, *each) for each in conditions)  # one in memory at a time
        labels, prompts = (None if each[0] is None else list(each) for each in zip(*conditions))
        texts = pipe.encode_prompt(prompts)
        nats = pipe.transformer.log_prob(encoded.codes, encoded.grain_map, labels, **texts).nats
        counts["ideal"] = nats / math.log(2)
    for way, priors in ways.items():
        lengths = map(dq_bits, priors, images, encoded.codes.cpu(), encoded.grain_map.cpu())
        counts[f"{way} file"], counts[f"{way} payload"] = zip(*lengths)
    return counts


def dq_bits(prior, image, codes, grain_map):
    """Bits of the file that `compress` writes, and of the payload in it."""
    payload = prior.encode(codes, grain_map)
    condition = prior.class_label, prior.prompt
    header = Header(bytes(8), image.height, image.width, prior.flag, None, *condition)
    return 8 * len(write_file(header, payload, codes, grain_map)), 8 * len(payload)


def measure_seconds(args, model, dataset, conditions, processor):
    """{way: (seconds to bytes, seconds back)} an image, at the router's rate, and quality 50."""
    rows = dataset.select(range(min(args.timed_images, len(dataset))))
    batch = ImageCollator(processor, args.image_column)(list(rows))
    images = processor.post_process(batch["pixel_values"])

    def timed(function, inputs):
        begin = time.perf_counter()
        outputs = [function(each) for each in inputs]
        return outputs, (time.perf_counter() - begin) / len(outputs)

    def write(image):
        return save(image, **settings)

    def write_by_generator(image):
        class_label, prompt = conditions[images.index(image)]
        return compress(model, image, prior="generator", class_label=class_label, prompt=prompt)

    files, to_bytes = timed(partial(compress, model), images)
    seconds = {"static": (to_bytes, timed(partial(decompress, model), files)[1])}
    if hasattr(model, "transformer"):
        files, to_bytes = timed(write_by_generator, images)
        seconds["generator"] = to_bytes, timed(partial(decompress, model), files)[1]
    for codec in CODECS:
        settings = options(codec, 50, args.subsampling)
        files, to_bytes = timed(write, images)
        seconds[codec] = to_bytes, timed(load, files)[1]
    return seconds


def load_data(args, vae, pipe):
    """The processor for a model's size, the images, and (class, caption) of each, None where the model takes none."""
    processor = DQImageProcessor.for_model(vae.config)
    dataset = load_images(args.data, args.split, args.image_column)
    if args.max_images is not None:
        dataset = first_rows(dataset, args.max_images)
    labels = captions = [None] * len(dataset)
    if pipe is not None and pipe.transformer.config.num_classes:
        labels = reference_labels(pipe.transformer.config, dataset, args.label_column)
    has_text = pipe is not None and pipe.transformer.config.text_length is not None
    if has_text and args.caption_column != "none":
        captions = reference_captions(pipe.transformer.config, dataset, args.caption_column, seed=0)
    return processor, dataset, list(zip(labels, captions))


def as_uint8(images):
    """PIL images as a tensor (B, 3, H, W)."""
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2)


def quality(images, references, perceptual):
    """How near images (B, 3, H, W) uint8 are to others, {name: (B,)}."""
    distance = perceptual.network.distance(from_bytes(images), from_bytes(references))
    return {"PSNR": psnr(images, references), "SSIM": ssim(images, references), perceptual.figure: distance}


def options(codec, quality, subsampling):
    """Arguments of Pillow's `save`; WebP is always 4:2:0, and slow settings are the better ones."""
    return {
        "JPEG": dict(format="JPEG", quality=quality, subsampling=subsampling),
        "WebP": dict(format="WEBP", quality=quality, method=6),
        "AVIF": dict(format="AVIF", quality=quality, subsampling=subsampling, speed=2),
    }[codec]


def code(codec, image, quality, subsampling):
    """The image that a codec gives back, bits of the file, and bits of it without what surrounds the coded data."""
    arguments = options(codec, quality, subsampling)
    file = save(image, **arguments)
    length = len(file)
    if codec == "JPEG":  # with Huffman tables of the file's own, where that is shorter
        length = min(length, len(save(image, optimize=True, **arguments)))
    bare, _ = CODECS[codec]
    return load(file), 8 * length, 8 * len(bare(file))


def jpeg_scan(file):
    """The entropy-coded data of a baseline JPEG file."""
    place, marker = 2, None  # behind the start marker
    while marker != 0xDA:  # start of scan
        marker = file[place + 1]
        place += 2 + int.from_bytes(file[place + 2 : place + 4], "big")
    return file[place:-2]  # without the end marker


def vp8_stream(file):
    """The VP8 frame of a simple WebP file without its start code, width and height (RFC 6386, section 9.1)."""
    if file[12:16] != b"VP8 ":
        raise ValueError(f"expected a simple lossy WebP file, got one with a chunk {file[12:16]}")
    frame = file[20 : 20 + int.from_bytes(file[16:20], "little")]
    return frame[:3] + frame[10:]


def av1_data(file):
    """What is in the box "mdat" of an AVIF file (ISO/IEC 14496-12)."""
    place = 0
    while file[place + 4 : place + 8] != b"mdat":
        place += int.from_bytes(file[place : place + 4], "big")
    return file[place + 8 : place + int.from_bytes(file[place : place + 4], "big")]


CODECS = {"JPEG": (jpeg_scan, "scan"), "WebP": (vp8_stream, "stream"), "AVIF": (av1_data, "data")}


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


def make_report(args, vae, pipe, perceptual, points, curves, seconds, num_images):
    """Markdown tables, and how they were made."""
    names = ["PSNR", "SSIM", perceptual.figure]
    columns = [FIXED, *(f"{way} {what}" for way in seconds for what in ("file", "payload") if way not in CODECS)]
    best = columns[-2]  # the file of the best prior
    height, width = vae.config.image_height_width
    map_bits = math.prod(vae.config.grid_sizes[0]) * math.log2(len(vae.config.granularities))
    times = [
        {"": name} | {way: f"{each[i]:.4f}" for way, each in seconds.items()}
        for i, name in enumerate(("to bytes", "back"))
    ]
    return "\n\n".join(
        [
            f"{Path(args.model).name} on {num_images} images of {args.data}, split {args.split}, {width}x{height}; JPEG and AVIF "
            f"{args.subsampling}; {perceptual.network_description}; torch {torch.__version__}, Pillow {PIL.__version__}. All means "
            f"over the images. {receiver(vae, pipe)}",
            f"Quality, and bits an image. {FIXED.capitalize()}: codes of {math.log2(vae.config.codebook_size):g} bits, and "
            f"{map_bits:g} bits of the grain map.",
            table([rate_row(ratio, figures, names, columns) for ratio, figures in points.items()]),
            f"Bits for equal PSNR (–: the codec has no setting so bad or so good). {receiver(vae, pipe)}",
            table([equal_psnr_row(figures, columns[1:], curves) for figures in points.values()]),
            f"{' / '.join(names)} at as many bits as the {best} has (–: the codec has no setting with so few). "
            f"{receiver(vae, pipe)}",
            table([equal_bits_row(figures, names, best, curves) for figures in points.values()]),
            f"Seconds an image, {describe_devices(args)}, mean of {min(args.timed_images, num_images)} images; load of "
            f"the machine {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores. To bytes with the generator includes decoding once.",
            table(times),
        ]
    )


def rate_row(ratio, figures, names, columns):
    """Quality and bits at a fine ratio."""
    row = {"fine ratio": ratio, "codes": f"{figures['codes']:.1f}"} | texts(figures, [*names, *columns])
    if "ideal" in figures:
        excess = figures["generator payload"] - figures["ideal"]
        row["ideal"] = f"{figures['ideal']:.0f}"
        row["payload above ideal"] = f"{excess:.1f} ({excess / figures['ideal']:.1%})"
    return row


def equal_psnr_row(figures, columns, curves):
    """Bits of the other codecs at our PSNR, beside ours."""
    row = texts(figures, ["PSNR", *columns])
    for curve, settings in curves.items():
        bits = at_equal(settings, "PSNR", figures["PSNR"], "bits")
        row[curve] = "–" if math.isnan(bits) else f"{bits:.0f}"
    return row


def equal_bits_row(figures, names, best, curves):
    """Quality of the other codecs at as many bits as `best` has, beside ours."""
    row = {"bits": f"{figures[best]:.0f}", "DQ-VAE": " / ".join(texts(figures, names).values())}
    for curve, settings in curves.items():
        found = {name: at_equal(settings, "bits", figures[best], name) for name in names}
        row[curve] = "–" if math.isnan(found["PSNR"]) else " / ".join(texts(found, names).values())
    return row


def texts(figures, names):
    """Figures as texts, {name: text}: bits as whole numbers."""
    digits = {"PSNR": 2, "SSIM": 3} | {name: 0 for name in names if name.endswith(BITS)}
    return {name: f"{figures[name]:.{digits.get(name, 4)}f}" for name in names}


def receiver(vae, pipe):
    """How large a model the receiver must have, in words."""

    def megabytes(*modules):
        return sum(weight.nbytes for module in modules for weight in module.parameters()) / 1e6

    decoder = megabytes(vae.decoder, vae.post_quant_conv) + vae.quantizer.codebook.nbytes / 1e6
    text = f"The receiver holds decoder and codebook, {decoder:.1f} MB"
    if pipe is not None:
        parts = {"the generator": pipe.transformer, "the text encoder": pipe.text_encoder}
        parts = {name: part for name, part in parts.items() if part is not None}
        text += f", and for the generator prior {' and '.join(parts)}, {megabytes(*parts.values()):.1f} MB more"
    return f"{text}."


def describe_devices(args):
    """Where the codecs ran, and where the models did, if elsewhere."""
    names = dict.fromkeys(describe_device(device, args.threads) for device in ("cpu", args.device))
    return ", models on ".join(names)


def draw(points, curves, perceptual_name):
    """A matplotlib figure: each figure of merit against bits."""
    figure = new_figure(13, 4.6)
    sweep = [figures for ratio, figures in points.items() if ratio != ROUTER]
    router = points[ROUTER]
    styles = {"JPEG": "C1", "WebP": "C2", "AVIF": "C4"}
    ways = {way: color for way, color in (("static", "C0"), ("generator", "C3")) if f"{way} file" in router}
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
        for way, color in ways.items():
            for what, style in (("file", ":"), ("payload", "-")):
                bits = [row[f"{way} {what}"] for row in sweep]
                values = [row[name] for row in sweep]
                axes.plot(bits, values, color=color, linestyle=style, marker="o", markersize=4, label=f"{way} {what}")
                axes.plot(router[f"{way} {what}"], router[name], "k*", markersize=8, zorder=3)
        axes.set_xticks(ticks := [number * 10**power for power in range(2, 6) for number in (1, 2, 5)], ticks)
        least = min(sweep[0][f"{way} payload"] for way in ways)
        axes.set_xlim(0.8 * least, 1.2 * max(row["bits"] for rows in curves.values() for row in rows))
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return figure


if __name__ == "__main__":
    main(HfArgumentParser(Arguments).parse_args_into_dataclasses()[0])
