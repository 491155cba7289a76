"""Stage 1: one tokenizer, trained and measured."""

import itertools
import time

import torch
from conditions import make_model, random_grain_map
from diffusers.optimization import get_scheduler
from tqdm.auto import tqdm

from dq_hf.codec.static_prior import StaticPrior
from dq_hf.metrics import CodeStatistics, FrechetDistance, PerceptualDistance, psnr, ssim
from dq_hf.modeling.image_processing_dq import from_bytes, to_bytes
from dq_hf.training.calibration import calibrate
from dq_hf.training.router import learn_router

BATCH_SIZE = 8  # better than 16 for the same number of images
WARMUP_STEPS = 50
CALIBRATION_IMAGES = 1024
ROUTER_STEPS, ROUTER_BATCH_SIZE = 300, 32  # of a gain router


def train(condition, train_images, seed, steps, learning_rate, device):
    """A tokenizer trained on `train_images` (n, 3, 64, 64), and what to note about the run.

    L1 and VQ loss, and the feature router's budget. Images come in the same order for every condition of a seed. The
    entropy router is calibrated to its shares before training, the feature router after it.
    """
    torch.manual_seed(seed)
    model = make_model(condition).to(device, memory_format=torch.channels_last).train()
    calibration_images = train_images[:CALIBRATION_IMAGES].split(256)
    if condition.router == "entropy":
        calibrate(model, calibration_images, condition.shares)
    optimizer = torch.optim.Adam(model.parameters(), learning_rate, betas=(0.9, 0.99))
    scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=WARMUP_STEPS, num_training_steps=steps)
    start = time.perf_counter()
    batches = itertools.islice(batches_of_rows(len(train_images), BATCH_SIZE, seed), steps)
    for rows in tqdm(batches, total=steps, mininterval=10):
        pixel_values = train_images[rows].to(device)
        shares = list(condition.shares) if condition.router == "random" else None
        loss = model(pixel_values, fine_ratio=shares).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
    seconds = round((time.perf_counter() - start) / steps, 4)
    if condition.router == "feature":
        calibrate(model, calibration_images, condition.shares)
    thresholds = model.router.thresholds.tolist() if condition.router == "entropy" else None
    return model.eval(), {"seconds_per_step": seconds, "entropy_thresholds": thresholds}


def teach_router(model, condition, train_images, seed, router_steps):
    """A trained tokenizer with a gain router, calibrated to its shares, and what to note about the run."""
    torch.manual_seed(seed)
    start = time.perf_counter()
    batch_size = min(ROUTER_BATCH_SIZE, len(train_images))
    batches = (train_images[rows] for rows in batches_of_rows(len(train_images), batch_size, seed))
    model = learn_router(model, batches, router_steps)
    seconds = round((time.perf_counter() - start) / router_steps, 4)
    calibrate(model, train_images[:CALIBRATION_IMAGES].split(256), condition.shares)
    return model, {"seconds_per_step": seconds, "router_steps": router_steps, "entropy_thresholds": None}


def batches_of_rows(num_rows, batch_size, seed):
    """Row numbers of batches without end: one epoch in random order after another, each without what fills no batch."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        epoch = torch.randperm(num_rows, generator=generator)
        yield from epoch[: num_rows - num_rows % batch_size].split(batch_size)


@torch.no_grad()
def evaluate(model, condition, test_images, seed):
    """Figures of held-out images (n, 3, 64, 64), for each way to route them.

    Returns:
        {"own": ..., "exact": ...}: by the router's own choice (of the control: at random), and with exactly the wanted
        shares of every image's regions, where there is a router with a choice of its own.
    """
    if condition.router == "random":
        generator = torch.Generator().manual_seed(seed)
        return {"own": measure(model, test_images, random_grain_map(condition, len(test_images), generator))}
    results = {"own": measure(model, test_images)}
    if condition.router is not None:
        results["exact"] = measure(model, test_images, fine_ratio=list(condition.shares))
    return results


def measure(model, test_images, grain_map=None, fine_ratio=None):
    """Figures of all images together, and "images", a list of each image's for every measure; bytes: by the static prior."""
    frechet, perceptual = FrechetDistance("efficientnet-lite0"), PerceptualDistance("efficientnet-lite0")
    codes = CodeStatistics(model.config.codebook_size, len(model.config.granularities))
    prior = StaticPrior(model)
    lists = {"codes": [], "bytes": [], "psnr": [], "ssim": [], "perceptual": []}
    shares = torch.zeros(len(model.config.granularities))
    for rows in torch.arange(len(test_images)).split(64):
        originals = test_images[rows]
        prescribed = None if grain_map is None else grain_map[rows]
        output = model(originals.to(model.device), fine_ratio=fine_ratio, grain_map=prescribed)
        samples = eight_bits(output.sample.cpu())
        for name, values, digits in (
            ("codes", output.num_codes, 0),
            ("psnr", psnr(samples, originals), 3),
            ("ssim", ssim(samples, originals), 4),
            ("perceptual", perceptual.network.distance(samples, originals), 5),
        ):
            lists[name] += [round(value, digits) for value in values.tolist()]
        encoded = zip(output.codes.cpu(), output.grain_map.cpu())
        lists["bytes"] += [len(prior.encode(*image)) for image in encoded]  # of the payload: every file has one header
        frechet.add_batch(predictions=samples, references=originals)
        codes.add_batch(codes=output.codes, grain_maps=output.grain_map)
        shares += torch.bincount(output.grain_map.flatten().cpu(), minlength=len(shares))
    return frechet.compute() | codes.compute() | {"shares": (shares / shares.sum()).tolist(), "images": lists}


def eight_bits(samples):
    """Images as a PNG file holds them: clipped to [-1, 1] and rounded to 256 values."""
    return from_bytes(to_bytes(samples))
