"""Whether a text model draws what it was asked for: retrieval among real pictures, and colours.

    pip install -c constraints.txt -e ".[metrics]"
    python benchmarks/text_alignment.py --output docs/evaluation.md              # the tables of retrieval and colours
    python benchmarks/text_alignment.py --sweep --output docs/evaluation.md      # the sampling options, one by one

Retrieval: a prompt is one picture's caption with its style. Its sample counts as right at k if the picture's concept is
among the k nearest real pictures, by the cosine of an offline network's standardised features; the prompt's own picture is
left out, so that only the concept's other styles can be found and a copy of a training picture gains nothing. Beside the
samples stand what is possible (the real picture itself asks), what the tokenizer lets through (its reconstruction asks) and
chance (the samples, each asking for another prompt's concept).
"""

import itertools
from collections import Counter
from dataclasses import dataclass

import torch
from datasets import concatenate_datasets
from report import option, publish, table
from transformers import HfArgumentParser

from dq_hf import DEFAULT_MODEL
from dq_hf.data.images import ImageCollator, load_images
from dq_hf.loading import load_pipeline
from dq_hf.metrics import FrechetDistance, PrecisionRecall
from dq_hf.metrics.streaming import unit_images
from dq_hf.modeling.image_processing_dq import DQImageProcessor, from_bytes, to_bytes
from dq_hf.networks.extractors import make_extractor

SPLITS = {"train": "seen concepts", "test_pairs": "held-out pairs", "test": "held-out concepts"}
RANKS = (1, 10)
COLOURS = {  # RGB, about those of emoji
    "red": (225, 40, 50),
    "orange": (245, 140, 30),
    "yellow": (252, 205, 60),
    "green": (110, 175, 80),
    "blue": (60, 140, 225),
    "purple": (150, 90, 190),
    "brown": (135, 85, 60),
    "black": (45, 45, 50),
}
SHAPES = ("heart", "circle", "square")
GUIDANCE, TEMPERATURES, TOP_PS = (1.0, 1.5, 2.0, 3.0), (0.6, 0.7, 0.85, 1.0), (0.9, 1.0)


@dataclass
class Arguments:
    model: str = option(DEFAULT_MODEL, "folder or repository of a text model")
    data: str = option("examples/data/emoji", "pictures with columns captions, concept and style")
    prompts: int = option(256, "prompts of each split, drawn at random with the seed")
    samples_per_colour: int = option(4, "samples of each of the 24 coloured shapes")
    seed: int = option(0, "of the prompts and the samples")
    batch_size: int = option(32, "images at a time")
    extractor: str = option("efficientnet-lite0", "as for make_extractor")
    threads: int = option(1, "CPU threads")
    device: str = option("cpu", "where the model runs; the extractor runs on the CPU")
    sweep: bool = option(False, "compare guidance, temperature and top-p, on seen concepts")
    output: str | None = option(None, "Markdown file to put the tables into")


@torch.no_grad()
def main(args):
    torch.set_num_threads(args.threads)
    pipe = load_pipeline(args.model).to(args.device)
    if pipe.transformer.config.text_length is None:
        raise ValueError(f"{args.model} was not trained with text; give --model a text model")
    pipe.set_progress_bar_config(disable=True)
    gallery = Gallery(args, pipe)
    report = sweep(args, pipe, gallery) if args.sweep else obedience(args, pipe, gallery)
    publish(report, f"benchmarks/text_alignment.py{' --sweep' if args.sweep else ''}", args.output)


class Gallery:
    """All real pictures of a captioned set, as features that can be asked for concepts.

    Attributes:
        rows: the data set, all splits one after the other.
        ranges: the rows of each split.
    """

    def __init__(self, args, pipe):
        parts = {split: load_images(args.data, split) for split in SPLITS}
        self.rows = concatenate_datasets(list(parts.values()))
        starts = itertools.accumulate(map(len, parts.values()), initial=0)
        self.ranges = {split: range(start, start + len(part)) for (split, part), start in zip(parts.items(), starts)}
        self.concepts = self.rows["concept"]
        self.extractor = make_extractor(args.extractor)
        self.collate = ImageCollator(DQImageProcessor.for_model(pipe.vae.config))
        raw = torch.cat([self.raw_features(self.images(rows)) for rows in batched(range(len(self.rows)), 64)])
        self.mean, self.std = raw.mean(0), raw.std(0) + 1e-6
        self.features = self.standardised(raw)

    def images(self, rows):
        """Pictures uint8 (n, 3, H, W) of these rows, as the model's image processor makes them."""
        return to_bytes(self.collate([self.rows[row] for row in rows])["pixel_values"])

    def raw_features(self, images):
        return self.extractor.features(unit_images(images).float())

    def standardised(self, features):
        """Unit vectors of features whose dimensions have the gallery's mean 0 and standard deviation 1."""
        return torch.nn.functional.normalize((features - self.mean) / self.std)

    def recalls(self, images, rows, concepts=None):
        """Shares of images (n, 3, H, W) that find their concept among the k nearest, for each k of `RANKS`.

        Args:
            rows: of the pictures that the images stand for; they are left out.
            concepts: asked for; None: those of the rows.
        """
        concepts = concepts or [self.concepts[row] for row in rows]
        similarity = self.standardised(self.raw_features(images)) @ self.features.T
        similarity[torch.arange(len(rows)), torch.tensor(rows)] = -torch.inf
        nearest = similarity.topk(max(RANKS)).indices.tolist()
        found = [[self.concepts[row] for row in places] for places in nearest]
        return [sum(concept in each[:k] for concept, each in zip(concepts, found)) / len(rows) for k in RANKS]

    def prompts(self, split, count, seed):
        """Rows and captions, "label, STYLE style", of pictures whose concept another row has, too."""
        counts = Counter(self.concepts)
        rows = [row for row in self.ranges[split] if counts[self.concepts[row]] > 1]
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:count]
        rows = [rows[i] for i in order]
        styles = self.rows.features["style"].names
        chosen = self.rows.select(rows)
        return rows, [
            f"{names[0]}, {styles[style]} style" for names, style in zip(chosen["captions"], chosen["style"])
        ]


def obedience(args, pipe, gallery):
    """The two tables."""
    lines = []
    for split, name in SPLITS.items():
        rows, prompts = gallery.prompts(split, args.prompts, args.seed)
        samples, real = draw(args, pipe, prompts), gallery.images(rows)
        others = [gallery.concepts[row] for row in rows[1:] + rows[:1]]
        reconstructions = torch.cat([reconstruct(pipe.vae, part) for part in real.split(args.batch_size)])
        figures = {
            "samples": gallery.recalls(samples, rows),
            "reconstructions": gallery.recalls(reconstructions, rows),
            "real pictures": gallery.recalls(real, rows),
            "chance": gallery.recalls(samples, rows, others),
        }
        cells = {f"{who}, R@{k}": f"{value:.2f}" for who, each in figures.items() for k, value in zip(RANKS, each)}
        lines.append({"prompts": name, "number": len(rows)} | cells)
    return (
        f"{args.prompts} prompts of each kind (fewer where there are fewer), seed {args.seed}, the model's sampling "
        f"defaults; {len(gallery.rows):,} real pictures; {gallery.extractor.description}.\n\n"
        f"{table(lines, texts=['prompts'])}\n\n"
        f"Samples whose main colour is the one asked for, of {len(COLOURS)} colours:\n\n{table([colour_row(args, pipe)])}"
    )


def sweep(args, pipe, gallery):
    """Fréchet distance, recall and retrieval by the sampling options, on prompts of seen concepts."""
    rows, prompts = gallery.prompts("train", args.prompts, args.seed)
    real = gallery.images(rows)
    lines = []
    for guidance, temperature, top_p in itertools.product(GUIDANCE, TEMPERATURES, TOP_PS):
        samples = draw(args, pipe, prompts, guidance_scale=guidance, temperature=temperature, top_p=top_p)
        metrics = FrechetDistance(gallery.extractor), PrecisionRecall(gallery.extractor)
        for metric in metrics:
            metric.add_batch(predictions=samples, references=real)
        frechet, shares = (metric.compute() for metric in metrics)
        distance = frechet[gallery.extractor.frechet_distance_name]
        precision, recall = (shares[f"{name}-{gallery.extractor.suffix}"] for name in ("precision", "recall"))
        first, tenth = gallery.recalls(samples, rows)
        line = {"guidance": f"{guidance:g}", "temperature": f"{temperature:g}", "top-p": f"{top_p:g}"}
        line |= {"FD": f"{distance:.1f}", "precision": f"{precision:.2f}", "recall": f"{recall:.2f}"}
        lines.append(line | {"R@1": f"{first:.2f}", "R@10": f"{tenth:.2f}"})
    return (
        f"{len(rows)} prompts of seen concepts, seed {args.seed}; against the prompts' own pictures; "
        f"{gallery.extractor.description}.\n\n{table(lines)}"
    )


def draw(args, pipe, prompts, **options):
    """One sample uint8 (n, 3, H, W) of each prompt."""
    generator = torch.Generator().manual_seed(args.seed)
    parts = [
        pipe(prompt=part, generator=generator, output_type="pt", **options).images
        for part in batched(prompts, args.batch_size)
    ]
    return to_bytes(torch.cat(parts).cpu() * 2 - 1)


def reconstruct(vae, images):
    """Images uint8 (B, 3, H, W) through the tokenizer and back."""
    return to_bytes(vae.decode_codes(vae.encode(from_bytes(images).to(vae.device)).codes).sample).cpu()


def colour_row(args, pipe):
    """A row of a table: of how many samples of each coloured shape the main colour is the one asked for."""
    wanted = [(colour, shape) for shape in SHAPES for colour in COLOURS for _ in range(args.samples_per_colour)]
    colours = main_colours(draw(args, pipe, [f"{colour} {shape}" for colour, shape in wanted]))
    right = [(shape, colour == found) for (colour, shape), found in zip(wanted, colours)]
    row = {}
    for shape in (*SHAPES, "all"):
        hits = [hit for each, hit in right if shape in (each, "all")]
        row[shape] = f"{sum(hits)} of {len(hits)}"
    return row


def main_colours(images):
    """Name of the colour of `COLOURS` that is nearest to most pixels of each image (n, 3, H, W) uint8, white ones aside.

    Nearest in CIELAB, without regard to a third of the difference in lightness: shading is not another colour.
    """
    names, names_lab = list(COLOURS), lab(torch.tensor(list(COLOURS.values()), dtype=torch.uint8))
    found = []
    for image in images:
        pixels = image.flatten(1).T
        pixels = pixels[(pixels < 225).any(1)]
        if len(pixels) == 0:
            found.append("white")
            continue
        differences = lab(pixels)[:, None] - names_lab
        differences[..., 0] /= 1.5
        votes = torch.bincount(differences.square().sum(2).argmin(1), minlength=len(names))
        found.append(names[votes.argmax()])
    return found


def lab(colours):
    """CIELAB (n, 3), for D65, of sRGB colours uint8 (n, 3) (IEC 61966-2-1)."""
    rgb = colours.double() / 255
    rgb = torch.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    to_xyz = torch.tensor(
        [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]], dtype=torch.double
    )
    xyz = rgb @ to_xyz.T / to_xyz.sum(1)
    curved = torch.where(xyz > (6 / 29) ** 3, xyz ** (1 / 3), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    x, y, z = curved.unbind(1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], 1)


def batched(items, size):
    """Lists of so many items, the last one shorter."""
    return [list(items[first : first + size]) for first in range(0, len(items), size)]


if __name__ == "__main__":
    main(HfArgumentParser(Arguments).parse_args_into_dataclasses()[0])
