"""Codes of images of any sizes as rows of a table, which `DQTokens.to_tokens` takes."""

from itertools import groupby, islice

import pyarrow as pa
import torch

from ..data.codes import row_features
from ..modeling.image_processing_dq import DQImageProcessor
from .compress import pad_to_regions

BATCH_PIXELS = 2**20  # encoded together: 16 images of 256x256; a larger image is encoded alone


@torch.no_grad()
def encode_rows(vae, images, fine_ratio=None):
    """One `pyarrow.Table` with the columns of `row_features` for each batch; the VAE is put into evaluation mode.

    Images that come one after the other and have the same size are a batch. Height and width are those of the image; its
    codes cover whole regions, filled up by pixels of its edge.

    Args:
        vae: a `DQVAEModel`.
        images: iterable of (name, PIL image), which is read only as far as a batch needs it.
        fine_ratio: as in `DQVAEModel.encode`.
    """
    vae.eval()
    processor = DQImageProcessor.for_model(vae.config, do_resize=False)
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
