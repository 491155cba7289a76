"""Evaluations that anyone can repeat: the figures of a model, and the protocol by which they were measured.

Runs in one process or, under `accelerate launch`, in several, which share the images out and all get the report.
"""

import hashlib
import json
import math
import platform
from importlib.metadata import version

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from datasets import ClassLabel
from PIL import Image
from tqdm.auto import tqdm

from .. import __version__
from ..files import whole_file
from ..modeling.image_processing_dq import DQImageProcessor
from ..training.codes import fingerprint
from ..training.data import ImageCollator, class_names, load_images
from .code_statistics import CodeStatistics
from .extractors import make_extractor
from .frechet_distance import FrechetDistance
from .inception_score import InceptionScore
from .perceptual_distance import PerceptualDistance
from .precision_recall import PrecisionRecall
from .psnr import PSNR
from .ssim import SSIM
from .streaming import gather

PROTOCOL_FILE = "protocol.json"  # in a folder of samples: how they were made
PIXELS = "8 bits a colour, as PNG stores them: originals, and what is compared with them"
LABEL_RULES = ("reference", "balanced")
UNITS = {"PSNR": "dB", "PSNR of mean error": "dB", "codes": "an image", "bits": "an image, grain map included"}


class ReferenceImages:
    """The real images of an evaluation, at the model's size and in 8 bits.

    Args:
        vae: the `DQVAEModel` whose image size they get.
        data, split, image_column: as for `load_images`.
        num_images: so many, drawn by the seed; None: all, in their order.
        seed: of the drawing.

    Raises:
        ValueError: no such split or column, or fewer images than asked for.
    """

    def __init__(self, vae, data, split, image_column="image", num_images=None, seed=0):
        dataset = load_images(data, split, image_column)
        if num_images is not None:
            if not 1 <= num_images <= len(dataset):
                raise ValueError(
                    f"split {split!r} of {data} has {len(dataset)} images, got a request for {num_images}"
                )
            dataset = dataset.shuffle(seed=seed).select(range(num_images))
        self.dataset = dataset
        height, width = vae.config.image_height_width
        self.collate = ImageCollator(DQImageProcessor(size={"height": height, "width": width}), image_column)
        self.digests = {}
        self.protocol = {
            "data": str(data),
            "split": split,
            "image_size": [height, width],
            "resampling": "scaled until the size is covered, bicubic, antialiased; images of this size stay as they are",
            "crop": "centre",
            "pixels": PIXELS,
            "num_references": len(dataset),
            "references_drawn_by_seed": None if num_images is None else seed,
        }

    def __len__(self):
        return len(self.dataset)

    def batches(self, batch_size):
        """This process's images, uint8 (B, 3, H, W).

        Raises:
            ValueError: an image that cannot be read.
        """
        for rows in share_out(len(self.dataset), batch_size, "references"):
            images = to_bytes(self.collate([self.dataset[row] for row in rows])["pixel_values"])
            for row, image in zip(rows, images):
                self.digests[row] = hashlib.sha256(f"{tuple(image.shape)}".encode() + image.numpy().tobytes()).digest()
            yield images

    def sha256(self):
        """Of the images of all processes that `batches` gave, in their order; 16 hex digits."""
        digests = {row: digest for part in gather(self.digests) for row, digest in part.items()}
        return hashlib.sha256(b"".join(digests[row] for row in sorted(digests))).hexdigest()[:16]


@torch.no_grad()
def evaluate_reconstruction(
    vae, model, data, split, *, num_images=None, seed=0, batch_size=32, fine_ratio=None, networks=None, **columns
):
    """Encode and decode images, and measure what is lost and what the codes take.

    Args:
        vae: a `DQVAEModel`.
        model: its name, for the protocol.
        data, split, num_images, seed, columns: as for `ReferenceImages`.
        batch_size: images at a time.
        fine_ratio: as for `DQVAEModel.encode`.
        networks: {"extractor": ..., "perceptual": ...}, as for `FrechetDistance` and `PerceptualDistance`.

    Returns:
        {"protocol": ..., "results": {figure: value}}, the same on all processes.

    Raises:
        ValueError: fewer than two images, an image that cannot be read, or arguments that `encode` refuses.
        ImportError, OSError: a network that cannot be had.
    """
    state = Accelerator().state  # which, other than PartialState, heeds ACCELERATE_USE_CPU
    references = ReferenceImages(vae, data, split, num_images=num_images, seed=seed, **columns)
    check_number(len(references), 2, "images")
    networks = {"extractor": "auto", "perceptual": "auto"} | (networks or {})
    with state.main_process_first():  # which downloads
        frechet = FrechetDistance(networks["extractor"])
        perceptual = PerceptualDistance(networks["perceptual"])
    codes = CodeStatistics(vae.config.codebook_size, len(vae.config.granularities))
    pairwise = [PSNR(), SSIM(), perceptual, frechet]
    vae = vae.to(state.device).eval()
    for originals in references.batches(batch_size):
        originals = originals.to(state.device)
        encoded = vae.encode(from_bytes(originals), fine_ratio=fine_ratio)
        reconstructions = to_bytes(vae.decode_codes(encoded.codes).sample)
        for metric in pairwise:
            metric.add_batch(predictions=reconstructions, references=originals)
        codes.add_batch(codes=encoded.codes, grain_maps=encoded.grain_map)
    protocol = {
        "evaluation": "reconstruction",
        "model": str(model),
        "model_fingerprint": fingerprint(vae),
        "fine_ratio": fine_ratio,
        **references.protocol,
        "references_sha256": references.sha256(),
        "extractor": frechet.extractor.description,
        "perceptual_network": perceptual.network_description,
        **environment(vae),
    }
    results = figures(*(metric.compute() for metric in [*pairwise, codes]))
    name = frechet.extractor.frechet_distance_name
    return {"protocol": protocol, "results": {f"r{key}" if key == name else key: results[key] for key in results}}


@torch.no_grad()
def evaluate_generation(
    pipe,
    model,
    data,
    split,
    folder,
    *,
    num_images=None,
    num_references=None,
    seed=0,
    batch_size=32,
    label_rule="reference",
    label_column="label",
    sampling=None,
    networks=None,
    **columns,
):
    """Sample images into a folder, those that are not yet there, and compare them with real ones.

    Image i is the i-th of `pipe(..., generator=torch.Generator().manual_seed(seed))`: the set of images depends neither
    on the number of processes nor on the batch size, and a larger set begins with the smaller one.

    Args:
        pipe: a `DQPipeline`.
        model: its name, for the protocol.
        data, split, columns: real images, as for `ReferenceImages`.
        folder: path for `<number>.png` and `protocol.json`, seen by all processes.
        num_images: of samples; None: as many as there are real images.
        num_references: as many real images, drawn by the seed; None: all.
        label_rule: for a model with classes: "reference", the labels of the real images, mixed by the seed, from the
            start again when all are used; or "balanced", every class in turn.
        label_column: of the real images, for the rule "reference"; its names must be the model's.
        sampling: arguments of the pipeline, temperature and the like.
        networks: {"extractor": ...}, as for `FrechetDistance`.

    Returns:
        {"protocol": ..., "results": {figure: value}}, the same on all processes.

    Raises:
        ValueError: too few images, labels that do not fit, or a folder with samples made in another way.
        OSError: a sample that cannot be read or written.
        ImportError, OSError: a network that cannot be had.
    """
    state = Accelerator().state
    references = ReferenceImages(pipe.vae, data, split, num_images=num_references, seed=seed, **columns)
    num_images = len(references) if num_images is None else num_images
    with state.main_process_first():  # which downloads
        extractor = make_extractor((networks or {}).get("extractor", "auto"))
    frechet, score, neighbours = (kind(extractor) for kind in (FrechetDistance, InceptionScore, PrecisionRecall))
    check_number(num_images, neighbours.num_neighbours + 1, "samples")
    check_number(len(references), neighbours.num_neighbours + 1, "references")

    pipe = pipe.to(state.device)
    labels = label_cycle(pipe.transformer.config, references.dataset, label_rule, label_column, seed)
    protocol = {
        "vae_fingerprint": fingerprint(pipe.vae),
        "transformer_fingerprint": fingerprint(pipe.transformer),
        "seed": seed,
        "sampling": pipe.transformer.config.sampling_defaults | (sampling or {}),
        "class_labels": label_rule if labels else None,
        "class_labels_sha256": hashlib.sha256(json.dumps(labels).encode()).hexdigest()[:16],
        **environment(pipe.vae),
    }
    claim_folder(folder, protocol)
    paths = [folder / f"{number:06d}.png" for number in range(num_images)]
    sample_missing(pipe, paths, labels, seed, batch_size, sampling or {})
    state.wait_for_everyone()

    size = tuple(references.protocol["image_size"])
    for numbers in share_out(num_images, batch_size, "samples"):
        images = torch.stack([read_sample(paths[number], size) for number in numbers]).to(state.device)
        features, logits = extractor.features_and_logits(frechet.unit_images(images))
        frechet.add_features(predictions=features)
        neighbours.add_features(predictions=features)
        score.add_logits(logits)
    for images in references.batches(batch_size):
        features = extractor.features(frechet.unit_images(images.to(state.device)))
        frechet.add_features(references=features)
        neighbours.add_features(references=features)
    protocol = {
        "evaluation": "generation",
        "model": str(model),
        "num_images": num_images,
        **protocol,
        **references.protocol,
        "references_sha256": references.sha256(),
        "extractor": extractor.description,
    }
    return {"protocol": protocol, "results": figures(*(metric.compute() for metric in (frechet, score, neighbours)))}


def label_cycle(config, dataset, rule, label_column, seed):
    """Labels that samples take in turn, [] for a model without classes; see `evaluate_generation`."""
    if rule not in LABEL_RULES:
        raise ValueError(f"class labels must be {' or '.join(LABEL_RULES)}, got {rule!r}")
    if config.num_classes == 0:
        return []
    if rule == "balanced":
        return list(range(config.num_classes))
    remedy = 'use "balanced" class labels, or images with the labels that the model was trained on'
    if not isinstance((dataset.features or {}).get(label_column), ClassLabel):
        raise ValueError(f"the real images have no class labels in a column {label_column!r}; {remedy}")
    names = class_names(dataset, label_column)
    if unknown := [name for name in names if name not in config.label2id]:
        raise ValueError(f"the model has no class {', '.join(map(repr, unknown[:5]))} as the real images do; {remedy}")
    labels = [config.label2id[names[label]] for label in dataset[:][label_column]]
    return [labels[i] for i in np.random.default_rng(seed).permutation(len(labels))]


def claim_folder(folder, protocol):
    """Make a folder for samples, or make sure that those in it were made in the same way; all processes call it.

    Raises:
        ValueError: they were not, or nobody knows.
    """
    state, file = PartialState(), folder / PROTOCOL_FILE
    protocol = json.loads(json.dumps(protocol))  # as a file gives it back
    if state.is_main_process and not (folder.is_dir() and any(folder.glob("*.png"))) and not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with whole_file(file) as partial:
            partial.write_text(json.dumps(protocol, indent=2) + "\n")
    state.wait_for_everyone()
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{folder} has images but no {PROTOCOL_FILE} that says how they were made ({error}); give another folder"
        ) from error
    differing = sorted(key for key in {*protocol, *found} if protocol.get(key) != found.get(key))
    if differing:
        details = "; ".join(f"{key} was {found.get(key)}, now {protocol.get(key)}" for key in differing)
        raise ValueError(f"{folder} holds samples made in another way: {details}; give another folder, or remove it")


def sample_missing(pipe, paths, labels, seed, batch_size, sampling):
    """Sample this process's part of the images that are not there."""
    state = PartialState()
    mine = range(state.process_index, len(paths), state.num_processes)
    missing = [number for number in mine if not paths[number].exists()]
    source, drawn = torch.Generator().manual_seed(seed), 0
    pipe.set_progress_bar_config(disable=True)
    with tqdm(
        total=len(mine), initial=len(mine) - len(missing), desc="sample", disable=not state.is_main_process
    ) as bar:
        for first in range(0, len(missing), batch_size):
            numbers = missing[first : first + batch_size]
            generators = []
            for number in numbers:  # the pipeline takes image i's seed from the i-th draw
                for _ in range(number - drawn):
                    torch.randint(2**63 - 1, (), generator=source)
                drawn = number
                generators.append(torch.Generator())
                generators[-1].set_state(source.get_state())
            images = pipe(
                class_labels=[labels[number % len(labels)] for number in numbers] if labels else None,
                num_images_per_label=1 if labels else len(numbers),
                generator=generators,
                **sampling,
            ).images
            for image, number in zip(images, numbers):
                with whole_file(paths[number]) as partial:
                    image.save(partial)
            bar.update(len(numbers))


def read_sample(path, size):
    """A sample, uint8 (3, H, W), or OSError."""
    try:
        with Image.open(path) as file:
            pixels = np.array(file.convert("RGB"))
    except (OSError, SyntaxError) as error:
        raise OSError(
            f"{path} is missing or damaged ({error}); delete it and run again, it will be sampled anew"
        ) from error
    if pixels.shape[:2] != size:
        raise OSError(
            f"{path} must be {size[1]}x{size[0]}, got {pixels.shape[1]}x{pixels.shape[0]}; delete it and run again"
        )
    return torch.from_numpy(pixels).permute(2, 0, 1)


def share_out(number, batch_size, text):
    """Lists of this process's part of the numbers from 0, with a progress bar."""
    state = PartialState()
    mine = list(range(number))[state.process_index :: state.num_processes]
    batches = [mine[first : first + batch_size] for first in range(0, len(mine), batch_size)]
    return tqdm(batches, desc=text, disable=not state.is_main_process)


def to_bytes(pixel_values):
    """uint8 of images in [-1, 1]; what lies outside is clipped, as in any file."""
    return ((pixel_values.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)


def from_bytes(images):
    """What `DQImageProcessor` gives for such an image: float in [-1, 1]."""
    return images.float() / 255 * 2 - 1


def check_number(number, least, text):
    """ValueError for too few."""
    if number < least:
        raise ValueError(f"at least {least} {text} are needed, got {number}")


def environment(model):
    """What else may change figures: versions, device, precision."""
    device = model.device
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "dtype": str(model.dtype).removeprefix("torch."),
        "versions": {"dq_hf": __version__, "python": platform.python_version()}
        | {package: version(package) for package in ("torch", "transformers", "diffusers", "pillow")},
    }


def figures(*results):
    """Their figures together, without what the protocol says."""
    return {name: value for result in results for name, value in result.items() if isinstance(value, float)}


def write_report(report, path):
    """The report as JSON, in which an infinite figure is a text."""
    results = {name: value if math.isfinite(value) else str(value) for name, value in report["results"].items()}
    with whole_file(path) as partial:
        partial.write_text(json.dumps(report | {"results": results}, indent=2) + "\n")


def report_table(report):
    """The figures as lines of text."""
    width = max(map(len, report["results"]))
    lines = (f"{name:{width}}  {value:10.4f}  {UNITS.get(name, '')}" for name, value in report["results"].items())
    return "\n".join(line.rstrip() for line in lines)
