"""Codes of images of any sizes as rows of a table that names its model, which `DQTokens.to_tokens` takes."""

import json
from itertools import groupby, islice

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from ..data.codes import row_features
from ..data.fingerprint import decoding_fingerprint
from ..data.images import as_pattern
from ..modeling.image_processing_dq import DQImageProcessor
from .compress import pad_to_regions, parts

BATCH_PIXELS = 2**20  # encoded together: 16 images of 256x256; a larger image is encoded alone

MODEL = b"dq_hf.model"  # key of the schema's metadata


def row_schema(vae, vae_name):
    """Columns of `row_features` as an Arrow schema, whose metadata name the model.

    Args:
        vae: the `DQVAEModel` that encodes.
        vae_name: its folder or Hub id.
    """
    schema = row_features(vae.config).arrow_schema
    model = {
        "fingerprint": decoding_fingerprint(vae),
        "model": vae_name,
        "granularities": list(vae.config.granularities),
        "codebook_size": vae.config.codebook_size,
    }
    return schema.with_metadata({**schema.metadata, MODEL: json.dumps(model)})


def load_rows(path, vae):
    """The rows of a table of `dq-hf encode --output`, a `datasets.Dataset` with the columns of `row_features`.

    Args:
        path: of the Parquet file.
        vae: the `DQVAEModel` that is to decode them, or a model with one; one with another encoder may, too.

    Raises:
        OSError: no such file.
        ValueError: no such table, or one of another model's codes.
    """
    try:
        metadata = pq.read_schema(path).metadata or {}
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path} is damaged, or no Parquet file ({error}); encode the images again") from error
    if MODEL not in metadata:
        raise ValueError(
            f"{path} does not name its model: datasets does not keep that when it writes a table; if its codes are of your "
            "model, read it without this check, by datasets.Dataset.from_parquet"
        )
    try:
        model = json.loads(metadata[MODEL])
        theirs, name = model["fingerprint"], model["model"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} names its model in another way ({error!r}); encode the images again with dq-hf encode --output"
        ) from error
    own = decoding_fingerprint(parts(vae)[0])
    if theirs != own:
        raise ValueError(
            f"{path} holds the codes of another model: fingerprint {theirs}, {name}, got one with {own}; "
            "give that one, in the precision that it had then"
        )
    return datasets.Dataset.from_parquet(as_pattern(path))


@torch.no_grad()
def encode_rows(vae, images, fine_ratio=None, resize=False):
    """One `pyarrow.Table` with the columns of `row_features` for each batch; the VAE is put into evaluation mode.

    Images that come one after the other and have the same size are a batch. Height and width are those of the image; its
    codes cover whole regions, filled up by pixels of its edge.

    Args:
        vae: a `DQVAEModel`.
        images: iterable of (name, PIL image), which is read only as far as a batch needs it.
        fine_ratio: as in `DQVAEModel.encode`.
        resize: scale and crop all images to the size that the model was trained with.
    """
    vae.eval()
    processor = DQImageProcessor.for_model(vae.config, do_resize=resize)
    factor, schema = vae.config.granularities[0], row_features(vae.config).arrow_schema

    def prepared():
        for name, image in images:
            pixel_values = processor(image)["pixel_values"]
            height, width = pixel_values.shape[2:]
            yield name, height, width, pad_to_regions(pixel_values, factor)

    for shape, same in groupby(prepared(), key=lambda image: image[3].shape):
        while batch := list(islice(same, max(1, BATCH_PIXELS // shape[2:].numel()))):
            names, heights, widths, pixel_values = zip(*batch)
            encoded = vae.encode(torch.cat(pixel_values).to(vae.device), fine_ratio=fine_ratio)
            columns = names, heights, widths, encoded.codes.tolist(), encoded.grain_map.tolist()
            yield pa.table(dict(zip(schema.names, columns)), schema=schema)
