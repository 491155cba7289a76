"""Images to bytes and back: `compress` and `decompress`."""

import logging
from functools import cache, partial
from numbers import Integral
from pathlib import Path

import torch

from ..data.fingerprint import decoding_fingerprint
from ..hub.download import model_type_of
from ..modeling.image_processing_dq import DQImageProcessor
from ..modeling.modeling_dq import DQForImageGeneration
from ..modeling.modeling_dqvae import DQVAEModel
from ..modeling.modeling_utils_dq import evaluation_mode, uncompiled
from ..pipelines.class_labels import class_ids
from .container import DAMAGED, GENERATOR, MOST_SIDE, STATIC, Header, read_file, write_file
from .generator_prior import GeneratorPrior
from .rate_search import finest_that_fits
from .static_prior import StaticPrior

logger = logging.getLogger(__name__)

NOT_REPRODUCED = (
    "this file is intact and of this model, but this machine comes to other probabilities than the one that wrote it; "
    'decompress it there, or compress the image again with prior "static", which every machine reads'
)


@torch.no_grad()
def compress(
    model, image, prior="static", fine_ratio=None, max_bytes=None, class_label=None, prompt=None, model_id=None
) -> bytes:
    """An image as a file of few bytes, of which the same model makes an image again.

    Args:
        model: `DQVAEModel`; or `DQForImageGeneration` or `DQPipeline`, which the prior "generator" needs.
        image: PIL image, array or tensor, as for `DQImageProcessor`, of any size, which it keeps.
        prior: "static": by how often each code is used; takes milliseconds, and gives the same bytes on every machine.
            "generator": by the generator's probabilities; two fifths shorter on emoji, takes seconds, both ways, and is for
            images of the generator's own size. Where it cannot be used, the file has the static prior, and a warning says
            so.
        fine_ratio: as in `DQVAEModel.encode`; None: the router decides.
        max_bytes: the largest fine ratio with which the file has at most so many bytes, in steps of one region or a
            thousandth. With more than two granularities each refinement of a region has that chance.
        class_label: name or id of the image's class, for the prior "generator"; None: of any class.
        prompt: a text that says what the image shows, for the prior "generator" of a model with text.
        model_id: repository of the model on the Hub, to be named in the file, so that `decompress` can find it.

    Raises:
        TypeError, ValueError: arguments of another type or range, or that do not go together; `max_bytes` that no ratio
            reaches.
    """
    vae, transformer = parts(model)
    check_arguments(transformer, prior, fine_ratio, max_bytes, class_label, prompt, model_id)
    if class_label is not None:
        (class_label,) = class_ids([class_label], transformer.config)
    pixel_values = pixels_of(vae, image)
    height, width = pixel_values.shape[2:]
    factor = vae.config.granularities[0]
    shape = region_shape(factor, height, width)
    pixel_values = pad_to_regions(pixel_values, factor).to(vae.device)

    static = StaticPrior(vae)
    chosen = static if prior == "static" else GeneratorPrior(model, class_label, prompt)
    if chosen.shape not in (None, shape):
        rows, columns = chosen.shape
        logger.warning(
            "the generator is for images of %dx%d pixels, got %dx%d: the file has the static prior",
            *(columns * factor, rows * factor, width, height),
        )
        chosen = static

    fingerprint_with = cache(partial(fingerprint, model))  # it reads all weights, and `max_bytes` tries many files

    def write(prior, codes, grain_map):
        codes, grain_map = codes.cpu(), grain_map.cpu()
        condition = prior.class_label, prior.prompt
        header = Header(fingerprint_with(prior), height, width, prior.flag, model_id, *condition)
        return write_file(header, prior.encode(codes, grain_map), codes, grain_map)

    def grids_for(prior):
        if max_bytes is None:
            encoded = vae.encode(pixel_values, fine_ratio=fine_ratio)
            return encoded.codes[0], encoded.grain_map[0]
        return finest_that_fits(
            vae, pixel_values, max_bytes, prior.least_bits, lambda *grids: len(write(prior, *grids))
        )

    with evaluation_mode(vae):
        file = write(chosen, *grids_for(chosen))
        if chosen is static or decode(chosen, *read_file(file)) is not None:
            return file
        logger.warning("this machine does not come to the same probabilities twice: the file has the static prior")
        return write(static, *grids_for(static))


@torch.no_grad()
def decompress(model, data):
    """The PIL image of a file that `compress` wrote.

    Args:
        model: as for `compress`, or its folder or repository; None: the repository that the file names.
        data: bytes.

    Raises:
        TypeError: not bytes.
        ValueError: anything but an intact file of this model, in words: damaged or cut off, of another model, of a newer
            format, or of the prior "generator" where this machine comes to other probabilities.
        OSError: a model that cannot be loaded.
    """
    header, vae, codes, _ = read(model, data)
    with evaluation_mode(vae):
        pixel_values = vae.decode_codes(codes).sample[..., : header.height, : header.width]
    (image,) = DQImageProcessor.for_model(vae.config).post_process(pixel_values)
    return image


def read_codes(model, data):
    """Codes (1, H, W) and grain map (1, h, w) of a file, as `DQVAEModel.encode` gave them; arguments, errors: `decompress`."""
    return read(model, data)[2:]


def read(model, data):
    """(`Header`, tokenizer of the model, codes (1, H, W), grain map (1, h, w)); arguments, errors: `decompress`."""
    header, *rest = read_file(data)
    model = find_model(model, header)
    vae, transformer = parts(model)
    if header.flag == GENERATOR and transformer is None:
        raise ValueError("this file needs a model with a generator (DQForImageGeneration), got a tokenizer alone")
    own = fingerprint(model, header)
    if own != header.fingerprint:
        name = "" if header.model_id is None else f", {header.model_id}"
        raise ValueError(
            f"this file is of another model: fingerprint {header.fingerprint.hex()}{name}, got one with {own.hex()}; "
            "give the model that wrote it, in the precision that it had then (dtype=torch.float32, or as its weights were saved)"
        )
    prior = StaticPrior(vae) if header.flag == STATIC else GeneratorPrior(model, header.class_label, header.prompt)
    grids = decode(prior, header, *rest)
    if grids is None:
        raise ValueError(DAMAGED if prior.flag == STATIC else NOT_REPRODUCED)
    return header, vae, *(grid[None].to(vae.device) for grid in grids)


def decode(prior, header, payload, holds):
    """Codes (H, W) and grain map (h, w) of what `read_file` gave, or None where they are not those that were written."""
    try:
        codes, grain_map = prior.decode(payload, region_shape(prior.factor, header.height, header.width))
    except ValueError:
        return None
    return (codes, grain_map) if holds(codes, grain_map) else None


def parts(model):
    """The tokenizer and the generator, or None, of a model."""
    model = uncompiled(model)
    if isinstance(model, DQVAEModel):
        return model, None
    if not all(hasattr(model, name) for name in ("vae", "transformer")):
        raise TypeError(f"model must be a DQVAEModel, DQForImageGeneration or DQPipeline, got {type(model).__name__}")
    return model.vae, model.transformer


def fingerprint(model, prior):
    """8 bytes, of all that decoding depends on with a prior, or with that of a `Header`."""
    vae, transformer = parts(model)
    behind = []
    if prior.flag == GENERATOR:
        behind = [transformer] if prior.prompt is None else [transformer, model.text_encoder, model.tokenizer]
    return bytes.fromhex(decoding_fingerprint(vae, *behind))


def find_model(model, header):
    """A model, loaded where it is a name."""
    name = header.model_id if model is None else model
    if name is None:
        raise ValueError(f"this file names no model: give the one with fingerprint {header.fingerprint.hex()}")
    if not isinstance(name, (str, Path)):
        return name
    kind, revision = model_type_of(name)
    classes = {each.config_class.model_type: each for each in (DQVAEModel, DQForImageGeneration)}
    if kind not in classes:
        raise ValueError(f"{name} must be a tokenizer, or that and a generator ({', '.join(classes)}); got {kind!r}")
    return classes[kind].from_pretrained(name, revision=revision).eval()


def pixels_of(vae, image):
    """One image in its own size, (1, 3, height, width); ValueError for several, or one that no file can be of."""
    pixel_values = DQImageProcessor.for_model(vae.config, do_resize=False)(image)["pixel_values"]
    if len(pixel_values) != 1:
        raise ValueError(f"image must be one image, got {len(pixel_values)}")
    height, width = pixel_values.shape[2:]
    if max(height, width) > MOST_SIDE:
        raise ValueError(f"image must have at most {MOST_SIDE:,} pixels a side, got {width:,} x {height:,}")
    return pixel_values


def region_shape(factor, height, width):
    """Rows and columns of regions with sides of `factor` pixels that cover an image."""
    return -(-height // factor), -(-width // factor)


def pad_to_regions(pixel_values, factor):
    """Images (B, 3, H, W) whose last row and column are repeated until whole regions cover them."""
    height, width = pixel_values.shape[2:]
    rows, columns = region_shape(factor, height, width)
    margins = (0, columns * factor - width, 0, rows * factor - height)
    return torch.nn.functional.pad(pixel_values, margins, mode="replicate")


def check_arguments(transformer, prior, fine_ratio, max_bytes, class_label, prompt, model_id):
    """Raise TypeError or ValueError unless the arguments of `compress` go together."""
    if prior not in ("static", "generator"):
        raise ValueError(f'prior must be "static" or "generator", got {prior!r}')
    if prior == "generator" and transformer is None:
        raise ValueError(
            'prior "generator" needs a model with a generator (DQForImageGeneration), got a tokenizer alone'
        )
    if prior == "static" and not class_label is prompt is None:
        raise ValueError('class_label and prompt are for prior "generator" only; leave them out')
    if max_bytes is not None:
        if isinstance(max_bytes, bool) or not isinstance(max_bytes, Integral):
            raise TypeError(f"max_bytes must be a whole number, got {max_bytes!r}")
        if fine_ratio is not None:
            raise ValueError("give either fine_ratio or max_bytes, not both")
    if prompt is not None and not isinstance(prompt, str):
        raise TypeError(f"prompt must be a text, got {prompt!r}")
    if model_id is not None and not (isinstance(model_id, str) and model_id):
        raise TypeError(f"model_id must be the name of a repository, got {model_id!r}")
