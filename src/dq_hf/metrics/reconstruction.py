"""What encoding and decoding costs in quality and in bits, by a protocol that anyone can repeat."""

import torch
from accelerate import Accelerator

from ..data.fingerprint import fingerprint
from ..modeling.image_processing_dq import from_bytes, to_bytes
from .code_statistics import CodeStatistics
from .frechet_distance import FrechetDistance
from .perceptual_distance import PerceptualDistance
from .psnr import PSNR
from .references import ReferenceImages, check_enough, environment, figures
from .ssim import SSIM


@torch.no_grad()
def evaluate_reconstruction(
    vae,
    model,
    data,
    split,
    *,
    num_images=None,
    seed=0,
    batch_size=32,
    fine_ratio=None,
    image_column="image",
    extractor="auto",
    perceptual="auto",
):
    """Encode and decode images, and measure what is lost and what the codes take.

    Args:
        vae: a `DQVAEModel`.
        model: its name, for the protocol.
        data, split, image_column, num_images, seed: as for `ReferenceImages`.
        batch_size: images at a time.
        fine_ratio: as for `DQVAEModel.encode`.
        extractor, perceptual: networks, as for `FrechetDistance` and `PerceptualDistance`.

    Returns:
        {"protocol": ..., "results": {figure: value}}, the same on all processes.

    Raises:
        ValueError: fewer than two images, an image that cannot be read, or arguments that `encode` refuses.
        ImportError, OSError: a network that cannot be had.
    """
    state = Accelerator().state  # which, other than PartialState, heeds ACCELERATE_USE_CPU
    references = ReferenceImages(vae, data, split, image_column, num_images, seed)
    check_enough(len(references), 2, "images")
    with state.main_process_first():  # which downloads
        frechet = FrechetDistance(extractor)
        perceptual = PerceptualDistance(perceptual)
    codes = CodeStatistics(vae.config.codebook_size, len(vae.config.granularities))
    pairwise = [PSNR(), SSIM(), perceptual, frechet]
    vae = vae.to(state.device).eval()
    for _, originals in references.batches(batch_size):
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
