"""What the generator makes of real images: nats and bits of their codes, by a protocol that anyone can repeat."""

import math

import torch
from accelerate import Accelerator

from ..data.fingerprint import fingerprint, text_fingerprint
from ..modeling.image_processing_dq import from_bytes
from ..modeling.text_dq import prompt_arguments
from .code_statistics import count_bits
from .references import ReferenceImages, check_enough, environment, reference_captions, reference_labels
from .streaming import gather


@torch.no_grad()
def evaluate_likelihood(
    model,
    name,
    data,
    split,
    *,
    num_images=None,
    seed=0,
    batch_size=32,
    label_column="label",
    caption_column=None,
    image_column="image",
):
    """Encode real images and measure the code length of their streams under the generator.

    Code lengths are those of `DQTransformerForImageGeneration.log_prob`: the training order decides what may come, and
    what is forced costs nothing.

    Args:
        model: a `DQForImageGeneration` or `DQPipeline`.
        name: of the model, for the protocol.
        data, split, image_column, num_images, seed: as for `ReferenceImages`.
        batch_size: images at a time.
        label_column: of a model with classes; its names must be the model's.
        caption_column: of a model with text; None: no text. Of several captions one is drawn by the seed.

    Returns:
        {"protocol": ..., "results": {figure: value}}, means over images, the same on all processes.

    Raises:
        ValueError: no image, an image that cannot be read, or labels that do not fit.
    """
    state = Accelerator().state
    references = ReferenceImages(model.vae, data, split, image_column, num_images, seed)
    check_enough(len(references), 1, "images")
    vae, transformer = (part.to(state.device).eval() for part in (model.vae, model.transformer))
    config, vae_config = transformer.config, vae.config
    labels = reference_labels(config, references.dataset, label_column) if config.num_classes else None
    captions = reference_captions(config, references.dataset, caption_column, seed)
    if model.text_encoder is not None:
        model.text_encoder.to(state.device)
    num_granularities = len(vae_config.granularities)
    nats = torch.zeros(2, num_granularities, dtype=torch.float64)  # of positions and of contents
    counts = torch.zeros(2, dtype=torch.float64)  # of codes and of regions
    for rows, images in references.batches(batch_size):
        encoded = vae.encode(from_bytes(images.to(state.device)))
        chosen = None if labels is None else torch.tensor([labels[row] for row in rows])
        prompts = None if captions is None else [captions[row] for row in rows]
        texts = prompt_arguments(config, model.text_encoder, model.tokenizer, prompts)
        output = transformer.log_prob(encoded.codes, encoded.grain_map, chosen, **texts)
        granularities = output.stream.granularities.flatten().cpu()
        for row, log_probs in zip(nats, (output.position_log_probs, output.content_log_probs)):
            row.index_add_(0, granularities, -log_probs.flatten().cpu().double())
        counts += torch.tensor([encoded.num_codes.sum(), encoded.grain_map.numel()])
    nats, counts = (sum(parts) / len(references) for parts in zip(*gather((nats, counts))))
    codes, regions = counts.tolist()
    total = float(nats.sum())
    results = {"nats": total, "bits": total / math.log(2), "codes": codes, "nats a code": total / codes}
    for side, position, content in zip(vae_config.granularities, *nats.tolist()):
        results[f"bits of {side}x{side} positions"] = position / math.log(2)
        results[f"bits of {side}x{side} contents"] = content / math.log(2)
    results["bits of fixed length"] = sum(count_bits(codes, regions, vae_config.codebook_size, num_granularities))
    text = {}
    if captions is not None:
        text = {"captions": caption_column, "text_fingerprint": text_fingerprint(model.text_encoder, model.tokenizer)}
    protocol = {
        "evaluation": "likelihood",
        "model": str(name),
        "vae_fingerprint": fingerprint(vae),
        "transformer_fingerprint": fingerprint(transformer),
        **text,
        **references.protocol,
        "references_sha256": references.sha256(),
        **environment(vae),
    }
    return {"protocol": protocol, "results": results}
