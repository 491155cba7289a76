"""The real images of an evaluation, and its report: figures and the protocol by which they were measured.

Runs in one process or, under `accelerate launch`, in several, which share the images out and all get the report.
"""

import hashlib
import json
import math
import platform
from importlib.metadata import version

import numpy as np
import torch
from accelerate import PartialState
from tqdm.auto import tqdm

from .. import __version__
from ..data.captions import all_captions, captions_of
from ..data.images import ImageCollator, load_images, with_class_ids
from ..hub.folders import whole_file
from ..modeling.image_processing_dq import DQImageProcessor, to_bytes
from ..modeling.text_dq import require_text
from .streaming import gather

PIXELS = "8 bits a colour, as PNG stores them: originals, and what is compared with them"
UNITS = {
    "PSNR": "dB",
    "PSNR of mean error": "dB",
    "codes": "an image",
    "bits": "an image, grain map included",
    "nats": "an image, grain map included",
    "bits of fixed length": "an image, grain map included",
}


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
        self.collate = ImageCollator(DQImageProcessor.for_model(vae.config), image_column)
        self.digests = {}
        self.protocol = {
            "data": str(data),
            "split": split,
            "image_size": list(vae.config.image_height_width),
            "resampling": "scaled until the size is covered, bicubic, antialiased; images of this size stay as they are",
            "crop": "centre",
            "pixels": PIXELS,
            "num_references": len(dataset),
            "references_drawn_by_seed": None if num_images is None else seed,
        }

    def __len__(self):
        return len(self.dataset)

    def batches(self, batch_size):
        """This process's images, pairs of their rows and uint8 (B, 3, H, W).

        Raises:
            ValueError: an image that cannot be read.
        """
        for rows in in_batches(own_part(len(self.dataset)), batch_size, "references"):
            images = to_bytes(self.collate([self.dataset[row] for row in rows])["pixel_values"])
            for row, image in zip(rows, images):
                self.digests[row] = hashlib.sha256(f"{tuple(image.shape)}".encode() + image.numpy().tobytes()).digest()
            yield rows, images

    def sha256(self):
        """Of the images of all processes that `batches` gave, in their order; 16 hex digits."""
        digests = {row: digest for part in gather(self.digests) for row, digest in part.items()}
        return hashlib.sha256(b"".join(digests[row] for row in sorted(digests))).hexdigest()[:16]


def reference_labels(config, dataset, label_column, remedy=""):
    """The real images' class ids in a model's configuration, a list.

    Args:
        remedy: what an error proposes before other images.

    Raises:
        ValueError: no labels, hidden ones, or names that the model does not have.
    """
    remedy += "take images with the labels that the model was trained on"
    if label_column in dataset.column_names:
        dataset = dataset.select_columns([label_column])  # no image is needed
    column, names, (dataset,) = with_class_ids([("the set of real images", dataset)], label_column, remedy)
    if unknown := [name for name in names if name not in config.label2id]:
        raise ValueError(f"the model has no class {', '.join(map(repr, unknown[:5]))} as the real images do; {remedy}")
    return [config.label2id[names[label]] for label in dataset[column]]


def reference_captions(config, dataset, caption_column, seed):
    """A caption of each real image, one of those that it has, drawn by the seed; None without a column: no text.

    Raises:
        ValueError: a model without text, no such column, or images without a caption.
        TypeError: captions that are no texts.
    """
    if caption_column is None:
        return None
    require_text("caption_column", config)
    all_captions(dataset, caption_column)  # or an error that counts those that are missing
    own = [captions_of(value) for value in dataset.with_format(None)[caption_column]]
    random = np.random.default_rng(seed)
    return [texts[random.integers(len(texts))] for texts in own]


def own_part(number):
    """This process's part of the numbers from 0."""
    return range(PartialState().process_index, number, PartialState().num_processes)


def in_batches(numbers, batch_size, text):
    """The numbers in lists, with a progress bar."""
    batches = [list(numbers[first : first + batch_size]) for first in range(0, len(numbers), batch_size)]
    return tqdm(batches, desc=text, disable=not PartialState().is_main_process)


def check_enough(number, least, text):
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
