"""How samples compare with real images, by a protocol that anyone can repeat."""

import hashlib
import json

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from PIL import Image

from ..data.fingerprint import fingerprint, text_fingerprint
from ..hub.folders import whole_file
from ..networks.extractors import make_extractor
from .frechet_distance import FrechetDistance
from .inception_score import InceptionScore
from .precision_recall import PrecisionRecall
from .references import (
    ReferenceImages,
    check_enough,
    environment,
    figures,
    in_batches,
    own_part,
    reference_captions,
    reference_labels,
)

PROTOCOL_FILE = "protocol.json"  # in a folder of samples: how they were made
LABEL_RULES = ("reference", "balanced")


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
    caption_column=None,
    image_column="image",
    sampling=None,
    extractor="auto",
):
    """Sample images into a folder, those that are not yet there, and compare them with real ones.

    Image i is the i-th of `pipe(..., generator=torch.Generator().manual_seed(seed))`: the set of images depends neither
    on the number of processes nor on the batch size, and a larger set begins with the smaller one.

    Args:
        pipe: a `DQPipeline`.
        model: its name, for the protocol.
        data, split, image_column: real images, as for `ReferenceImages`.
        folder: path for `<number>.png` and `protocol.json`, seen by all processes.
        num_images: of samples; None: as many as there are real images.
        num_references: as many real images, drawn by the seed; None: all.
        label_rule: for a model with classes: "reference", the labels of the real images, mixed by the seed, from the
            start again when all are used; or "balanced", every class in turn.
        label_column: of the real images, for the rule "reference"; its names must be the model's.
        caption_column: of the real images, whose captions are the prompts of a model with text, one of each image, mixed
            by the seed as the labels are; None: no text.
        sampling: arguments of the pipeline, temperature and the like.
        extractor: as for `FrechetDistance`.

    Returns:
        {"protocol": ..., "results": {figure: value}}, the same on all processes.

    Raises:
        ValueError: too few images, labels that do not fit, or a folder with samples made in another way.
        OSError: a sample that cannot be read or written.
        ImportError, OSError: a network that cannot be had.
    """
    state = Accelerator().state
    references = ReferenceImages(pipe.vae, data, split, image_column, num_references, seed)
    num_images = len(references) if num_images is None else num_images
    with state.main_process_first():  # which downloads
        extractor = make_extractor(extractor)
    least = PrecisionRecall(extractor).num_neighbours + 1
    check_enough(num_images, least, "samples")
    check_enough(len(references), least, "references")

    pipe, sampling = pipe.to(state.device), sampling or {}
    config = pipe.transformer.config
    labels = label_cycle(config, references.dataset, label_rule, label_column, seed)
    prompts = mixed(reference_captions(config, references.dataset, caption_column, seed) or [], seed)
    text = {}
    if prompts:
        text = {"captions": caption_column, "captions_sha256": digest(prompts)}
        text["text_fingerprint"] = text_fingerprint(pipe.text_encoder, pipe.tokenizer)
    making = {
        "vae_fingerprint": fingerprint(pipe.vae),
        "transformer_fingerprint": fingerprint(pipe.transformer),
        "seed": seed,
        "sampling": config.sampling_defaults | sampling,
        "class_labels": label_rule if labels else None,
        "class_labels_sha256": digest(labels),
        **text,
        **environment(pipe.vae),
    }
    claim_folder(folder, making)
    paths = [folder / f"{number:06d}.png" for number in range(num_images)]
    sample_missing(pipe, paths, labels, prompts, seed, batch_size, sampling)
    state.wait_for_everyone()
    results = compare(paths, references, extractor, batch_size, state.device)
    protocol = {
        "evaluation": "generation",
        "model": str(model),
        "num_images": num_images,
        **making,
        **references.protocol,
        "references_sha256": references.sha256(),
        "extractor": extractor.description,
    }
    return {"protocol": protocol, "results": results}


def compare(paths, references, extractor, batch_size, device):
    """{figure: value} of the samples in files against `ReferenceImages`, the same on all processes."""
    frechet, score, neighbours = (kind(extractor) for kind in (FrechetDistance, InceptionScore, PrecisionRecall))
    size = tuple(references.protocol["image_size"])
    for numbers in in_batches(own_part(len(paths)), batch_size, "samples"):
        images = torch.stack([read_sample(paths[number], size) for number in numbers]).to(device)
        features, logits = extractor.features_and_logits(frechet.unit_images(images))
        frechet.add_features(predictions=features)
        neighbours.add_features(predictions=features)
        score.add_logits(logits)
    for _, images in references.batches(batch_size):
        features = extractor.features(frechet.unit_images(images.to(device)))
        frechet.add_features(references=features)
        neighbours.add_features(references=features)
    return figures(*(metric.compute() for metric in (frechet, score, neighbours)))


def label_cycle(config, dataset, rule, label_column, seed):
    """Labels that samples take in turn, [] for a model without classes; see `evaluate_generation`."""
    if rule not in LABEL_RULES:
        raise ValueError(f"class labels must be {' or '.join(LABEL_RULES)}, got {rule!r}")
    if config.num_classes == 0:
        return []
    if rule == "balanced":
        return list(range(config.num_classes))
    return mixed(reference_labels(config, dataset, label_column, 'use "balanced" class labels, or '), seed)


def mixed(values, seed):
    """A list in an order drawn by the seed."""
    return [values[i] for i in np.random.default_rng(seed).permutation(len(values))]


def digest(values):
    """A short fingerprint of a list."""
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]


def claim_folder(folder, protocol):
    """Make a folder for samples, or make sure that those in it were made in the same way; all processes call it.

    Raises:
        ValueError: they were not, or it is not known.
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
        raise ValueError(f"{folder} is for samples made in another way: {details}; give another folder, or remove it")


def sample_missing(pipe, paths, labels, prompts, seed, batch_size, sampling):
    """Sample this process's part of the images that are not there."""
    missing = [number for number in own_part(len(paths)) if not paths[number].exists()]
    generators = image_generators(seed, missing)
    pipe.set_progress_bar_config(disable=True)
    for numbers in in_batches(missing, batch_size, "sample"):
        images = pipe(
            prompt=[prompts[number % len(prompts)] for number in numbers] if prompts else None,
            class_labels=[labels[number % len(labels)] for number in numbers] if labels else None,
            num_images_per_prompt=1 if labels or prompts else len(numbers),
            generator=[next(generators) for _ in numbers],
            **sampling,
        ).images
        for image, number in zip(images, numbers):
            with whole_file(paths[number]) as partial:
                image.save(partial)


def image_generators(seed, numbers):
    """A generator for each image of these ascending numbers, whose first draw is that number's draw of the seed's own."""
    source, wanted = torch.Generator().manual_seed(seed), set(numbers)
    for number in range(max(numbers, default=-1) + 1):
        if number in wanted:
            yield source.clone_state()
        torch.randint(2**63 - 1, (), generator=source)  # as the pipeline draws one for each image


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
