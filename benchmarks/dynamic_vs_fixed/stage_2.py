"""Stage 2: one generator of a tokenizer's codes, trained for a given time and measured."""

import math
import time

import torch
from stage_1 import batches_of_rows, eight_bits

from dq_hf.metrics import FrechetDistance, PrecisionRecall
from dq_hf.modeling.configuration_dqtransformer import DQTransformerConfig
from dq_hf.modeling.modeling_dqtransformer import DQTransformerForImageGeneration

# Generator: the tokenizer whose codes it learns. With one granularity nothing is left of coarse to fine: such a model is
# a raster-scan transformer of the same depth.
GENERATORS = {"dq-transformer": "entropy", "raster-256": "fixed-256", "raster-128": "fixed-128"}
SIZES = dict(
    hidden_size=128, num_attention_heads=4, num_position_layers=2, num_content_layers=4, attention_dropout=0.0
)
BATCH_SIZE = 16
LEARNING_RATE = 1e-3
WARMUP = 0.05  # of the time
SAMPLES_AT_ONCE = 64


@torch.no_grad()
def encode(vae, images):
    """Codes and grain maps of images (n, 3, 64, 64)."""
    encoded = [vae.encode(batch.to(vae.device)) for batch in images.split(64)]
    return torch.cat([part.codes for part in encoded]), torch.cat([part.grain_map for part in encoded])


def make_model(codes, grain_maps, codebook_size):
    """A new generator, random weights drawn from torch's global generator."""
    coarsest, finest = list(grain_maps.shape[1:]), list(codes.shape[1:])
    raster = coarsest == finest
    config = DQTransformerConfig(
        **SIZES,
        grid_sizes=[finest] if raster else [coarsest, finest],
        codebook_size=codebook_size,
        position_loss_weight=0.0 if raster else 1.0,  # in raster order there is nothing to predict
    )
    return DQTransformerForImageGeneration(config)


def train(codes, grain_maps, codebook_size, seed, seconds):
    """A generator trained on the codes' device for so many seconds (CPU time on a CPU), and what to note about the run.

    The learning rate follows the time and not the steps, so that every model gets the whole schedule.
    """
    torch.manual_seed(seed)
    model = make_model(codes, grain_maps, codebook_size).to(codes.device).train()
    clock = clock_of(codes.device)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.01)
    start = clock()
    for step, rows in enumerate(batches_of_rows(len(codes), BATCH_SIZE, seed)):
        spent = (clock() - start) / seconds
        if spent >= 1:
            return model.eval(), {"steps": step}
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * min(1, spent / WARMUP) * (1 + math.cos(math.pi * spent)) / 2
        optimizer.zero_grad()
        model(codes[rows], grain_maps[rows]).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def clock_of(device):
    """What measures the time spent: this process's CPU time on a CPU, whoever else works there, and time elsewhere."""
    return time.process_time if device.type == "cpu" else time.perf_counter


@torch.no_grad()
def evaluate(model, vae, test_images, num_samples, seed):
    """Nats an image of held-out images; and of samples the Fréchet distance, precision and recall, and the seconds of each."""
    codes, grain_maps = encode(vae, test_images)
    nats = torch.cat([model.log_prob(*batch).nats for batch in zip(codes.split(64), grain_maps.split(64))])
    metrics = FrechetDistance("efficientnet-lite0"), PrecisionRecall("efficientnet-lite0")
    for images in test_images.split(64):
        for metric in metrics:
            metric.add_batch(references=images)
    clock = clock_of(model.device)
    generator = torch.Generator().manual_seed(seed)
    seconds = 0.0
    for first in range(0, num_samples, SAMPLES_AT_ONCE):
        start = clock()
        drawn = model.generate(num_images=min(SAMPLES_AT_ONCE, num_samples - first), generator=generator)
        images = vae.decode_codes(drawn.codes).sample.cpu()
        seconds += clock() - start
        for metric in metrics:
            metric.add_batch(predictions=eight_bits(images))
    figures = {name: value for metric in metrics for name, value in metric.compute().items()}
    return figures | {
        "nats": [round(value, 2) for value in nats.tolist()],
        "elements": model.pack(codes, grain_maps).lengths.float().mean().item(),
        "seconds_per_sample": seconds / num_samples,
    }
