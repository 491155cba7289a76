"""Stage 2: one generator of a tokenizer's codes, trained for as many steps as a given time is worth, and measured."""

import itertools
import math
import time

import torch
from stage_1 import eight_bits

from dq_hf.data.codes import LengthBucketSampler
from dq_hf.metrics import FrechetDistance, PrecisionRecall
from dq_hf.modeling.configuration_dqtransformer import DQTransformerConfig
from dq_hf.modeling.grain_map_dq import count_codes
from dq_hf.modeling.modeling_dqtransformer import DQTransformerForImageGeneration

# Generator: the tokenizer whose codes it learns. With one granularity nothing is left of coarse to fine: such a model is
# a raster-scan transformer of the same depth.
GENERATORS = {"dq-transformer": "entropy", "raster-256": "fixed-256", "raster-128": "fixed-128"}
SIZES = dict(
    hidden_size=128, num_attention_heads=4, num_position_layers=2, num_content_layers=4, attention_dropout=0.0
)
# CPU seconds of a step, by generator_cost.py: all in turn in one process. Time is counted by these and not by the clock,
# since machines differ, and the generators of all seeds need hours, on whatever machine there is.
SECONDS_A_STEP = {"dq-transformer": 0.317, "raster-256": 0.667, "raster-128": 0.292}
BATCH_SIZE = 16
LEARNING_RATE = 1e-3
WARMUP = 0.05  # of the steps
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


def train(codes, grain_maps, codebook_size, seed, steps):
    """A generator trained on the codes' device, and what to note about the run: steps and their time, in seconds."""
    torch.manual_seed(seed)
    model = make_model(codes, grain_maps, codebook_size).to(codes.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.01)
    clock = clock_of(codes.device)
    start = clock()
    for step, rows in enumerate(itertools.islice(batches_of_similar_length(grain_maps, seed), steps)):
        done = step / steps
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * min(1, done / WARMUP) * (1 + math.cos(math.pi * done)) / 2
        train_step(model, optimizer, codes[rows], grain_maps[rows])
    return model.eval(), {"steps": steps, "train_seconds": round(clock() - start)}


def train_step(model, optimizer, codes, grain_maps):
    """One optimizer step."""
    optimizer.zero_grad()
    model(codes, grain_maps).loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def batches_of_similar_length(grain_maps, seed):
    """Row numbers of batches without end, as in the library's training: each one's streams need little padding."""
    sampler = LengthBucketSampler(count_codes(grain_maps).cpu(), BATCH_SIZE, seed)
    for epoch in itertools.count():
        sampler.set_epoch(epoch)
        rows = torch.tensor(list(sampler))
        yield from rows[: len(rows) - len(rows) % BATCH_SIZE].split(BATCH_SIZE)


def clock_of(device):
    """What measures the time spent: this process's CPU time on a CPU, whoever else works there, and time elsewhere."""
    return time.process_time if device.type == "cpu" else time.perf_counter


@torch.no_grad()
def evaluate(model, vae, test_images, num_samples, seed):
    """Nats an image of held-out images; and of samples the Fréchet distance, precision and recall, and the seconds of each.

    "tokenizer-FD-EffLite0" is the Fréchet distance of the tokenizer's reconstructions, which no samples can be expected to beat.
    """
    codes, grain_maps = encode(vae, test_images)
    nats = torch.cat([model.log_prob(*batch).nats for batch in zip(codes.split(64), grain_maps.split(64))])
    metrics = FrechetDistance("efficientnet-lite0"), PrecisionRecall("efficientnet-lite0")
    floor = FrechetDistance("efficientnet-lite0")
    for images, some_codes in zip(test_images.split(64), codes.split(64)):
        for metric in metrics:
            metric.add_batch(references=images)
        floor.add_batch(predictions=eight_bits(vae.decode_codes(some_codes).sample.cpu()), references=images)
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
        "tokenizer-FD-EffLite0": floor.compute()["FD-EffLite0"],
        "nats": [round(value, 2) for value in nats.tolist()],
        "elements": model.pack(codes, grain_maps).lengths.float().mean().item(),
        "seconds_per_sample": seconds / num_samples,
    }
