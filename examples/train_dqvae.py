"""Train DQ-VAE, the tokenizer with variable-length codes (stage 1), on any images.

CPU smoke run, a minute:

    accelerate launch --cpu examples/train_dqvae.py --output_dir runs/smoke --max_steps 20 --batch_size 8 --save_every 10

One GPU, one's own folder of images at 256 pixels, the paper's sizes:

    accelerate launch --mixed_precision bf16 examples/train_dqvae.py --data path/to/images --output_dir runs/vae \
        --image_size 256 --granularities 16 8 --block_out_channels 128 128 256 256 512 --layers_per_block 2 \
        --norm_num_groups 32 --z_channels 256 --codebook_dim 256 --codebook_size 1024

Several GPUs or machines: the same after `accelerate config`. A run that was stopped goes on where it was when the same
command is given again. At the end `<output_dir>/model` is a folder that `DQVAEModel.from_pretrained` loads.
"""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from diffusers.optimization import get_scheduler
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import HfArgumentParser

from dq_hf import DQImageProcessor, DQVAEConfig, DQVAEModel
from dq_hf.training.calibration import calibrate_thresholds
from dq_hf.training.checkpoints import resume, save_checkpoint
from dq_hf.training.data import ImageCollator, flip_half, load_images
from dq_hf.training.perceptual import EfficientNetLitePerceptualLoss
from dq_hf.visualize import draw_grain_map, image_grid


@dataclass
class Arguments:
    output_dir: str
    data: str = field(default="examples/data/emoji", metadata={"help": "folder of images or Parquet, or a Hub id"})
    train_split: str = "train"
    test_split: str = "test"
    image_column: str = "image"

    image_size: int = 64
    granularities: list[int] = field(default_factory=lambda: [8, 4])
    router: str = field(default="entropy", metadata={"help": "entropy or feature"})
    fine_ratios: list[float] = field(
        default_factory=lambda: [0.5],
        metadata={"help": "budget: share of regions at each granularity but the coarsest"},
    )
    block_out_channels: list[int] = field(default_factory=lambda: [32, 48, 96, 128])
    layers_per_block: int = 1
    norm_num_groups: int = 16
    z_channels: int = 96
    codebook_size: int = 512
    codebook_dim: int = 32

    perceptual_weight: float = field(default=0.2, metadata={"help": "0 needs no feature network"})
    horizontal_flips: bool = True
    batch_size: int = field(default=32, metadata={"help": "per process"})
    learning_rate: float = field(default=6e-4, metadata={"help": "far above the paper's 4.5e-6 x batch: short runs"})
    warmup_steps: int = 100
    max_steps: int = 2000
    seed: int = 0
    num_workers: int = 0
    save_every: int = 500
    sample_every: int = 500
    report_to: str | None = field(default=None, metadata={"help": "tensorboard, trackio or any accelerate tracker"})


def main():
    args = HfArgumentParser(Arguments).parse_args_into_dataclasses()[0]
    accelerator = Accelerator(
        log_with=args.report_to,
        project_dir=args.output_dir,
        step_scheduler_with_optimizer=False,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=args.seed),
    )
    set_seed(args.seed, device_specific=True)
    output_dir = Path(args.output_dir)
    if accelerator.is_main_process:
        output_dir.mkdir(parents=True, exist_ok=True)

    processor = DQImageProcessor(size={"height": args.image_size, "width": args.image_size})
    collate = ImageCollator(processor, args.image_column)
    with accelerator.main_process_first():
        train_set = load_images(args.data, args.train_split, args.image_column)
        test_set = load_images(args.data, args.test_split, args.image_column)
    train_loader = DataLoader(
        train_set,
        args.batch_size,
        shuffle=True,
        drop_last=True,
        collate_fn=collate,
        num_workers=args.num_workers,
        generator=torch.Generator(),  # else opening it draws from torch's own, and a resumed run opens it once more
    )
    test_loader = DataLoader(test_set, args.batch_size, collate_fn=collate)

    model = DQVAEModel(make_config(args, train_set, collate))
    perceptual = None
    if args.perceptual_weight > 0:
        perceptual = EfficientNetLitePerceptualLoss().to(accelerator.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.learning_rate, betas=(0.5, 0.9))
    scheduler = get_scheduler(
        "cosine", optimizer, num_warmup_steps=args.warmup_steps, num_training_steps=args.max_steps
    )
    model, optimizer, train_loader, test_loader = accelerator.prepare(model, optimizer, train_loader, test_loader)
    if len(train_loader) == 0:
        raise ValueError(
            f"--batch_size times processes must be at most {len(train_set)}, the number of training images"
        )
    accelerator.register_for_checkpointing(scheduler)
    accelerator.init_trackers("dqvae", config={k: str(v) for k, v in vars(args).items()})
    step = resume(accelerator, output_dir)
    accelerator.print(f"{len(train_set)} training images, {args.max_steps} steps, starting at step {step}")

    progress = tqdm(total=args.max_steps, initial=step, disable=not accelerator.is_main_process)
    while step < args.max_steps:
        epoch, batches_done = divmod(step, len(train_loader))
        train_loader.set_epoch(epoch)
        for batch in accelerator.skip_first_batches(train_loader, batches_done):
            model.train()
            pixel_values = batch["pixel_values"]
            if args.horizontal_flips:
                pixel_values = flip_half(pixel_values)
            output = model(pixel_values)  # L1 + VQ (+ budget)
            loss = output.loss
            logs = {"l1": output.reconstruction_loss.detach(), "vq": output.vq_loss.detach()}
            if perceptual is not None:
                distance = perceptual(output.sample.float(), pixel_values)
                loss = loss + args.perceptual_weight * distance
                logs["perceptual"] = distance.detach()
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()

            step += 1
            progress.update()
            if step % 20 == 0:
                logs |= {"codes": output.num_codes.float().mean(), "used": len(output.codes.unique())}
                logs = {name: float(value) for name, value in logs.items()} | {"lr": scheduler.get_last_lr()[0]}
                if not math.isfinite(float(loss)):
                    raise RuntimeError(f"the loss is not finite at step {step}: {logs}; lower --learning_rate")
                progress.set_postfix({name: f"{value:.4g}" for name, value in logs.items()})
                accelerator.log(logs, step)
            if step % args.sample_every == 0 or step == args.max_steps:
                metrics = evaluate(accelerator, model, test_loader, processor, output_dir / f"samples-{step:06d}.png")
                accelerator.log(metrics, step)
                accelerator.print(f"step {step}: {json.dumps(metrics)}")
            if step % args.save_every == 0 or step == args.max_steps:
                save_checkpoint(accelerator, output_dir, step)
            if step == args.max_steps:
                break

    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(output_dir / "model")
        processor.save_pretrained(output_dir / "model")
    accelerator.end_training()


def make_config(args, train_set, collate):
    """The model's configuration, entropy thresholds calibrated on (at most 4,096) training images."""
    fine_ratios = args.fine_ratios if len(args.granularities) > 1 else []  # one granularity: nothing to choose
    config = DQVAEConfig(
        image_size=args.image_size,
        granularities=args.granularities,
        router=args.router,
        budget_targets=fine_ratios,
        block_out_channels=args.block_out_channels,
        layers_per_block=args.layers_per_block,
        norm_num_groups=args.norm_num_groups,
        router_norm_num_groups=args.norm_num_groups,
        z_channels=args.z_channels,
        codebook_size=args.codebook_size,
        codebook_dim=args.codebook_dim,
        encoder_attention_factors=args.granularities[:1],
    )
    if args.router == "entropy" and fine_ratios:
        subset = train_set.shuffle(seed=args.seed).select(range(min(4096, len(train_set))))
        batches = (batch["pixel_values"] for batch in DataLoader(subset, args.batch_size, collate_fn=collate))
        config.entropy_thresholds, _ = calibrate_thresholds(batches, args.granularities[0], fine_ratios)
    return config


@torch.no_grad()
def evaluate(accelerator, model, loader, processor, picture):
    """Held-out mean PSNR in dB and codes an image; writes inputs, grain maps and reconstructions to `picture`."""
    model.eval()
    psnrs, codes = [], []
    for i, batch in enumerate(loader):
        output = model(batch["pixel_values"])
        error = (output.sample.float().clamp(-1, 1) - batch["pixel_values"]).square().mean(dim=(1, 2, 3))
        psnr, num_codes = accelerator.gather_for_metrics((10 * torch.log10(4 / error), output.num_codes.float()))
        psnrs.append(psnr)
        codes.append(num_codes)
        if i == 0 and accelerator.is_main_process:
            inputs = processor.post_process(batch["pixel_values"][:16])
            scale = math.ceil(8 / accelerator.unwrap_model(model).config.granularities[-1])  # frames of 8 pixels
            maps = [draw_grain_map(image, grain_map, scale) for image, grain_map in zip(inputs, output.grain_map)]
            outputs = processor.post_process(output.sample[:16])
            rows = [image.resize(maps[0].size) for image in inputs], maps, [im.resize(maps[0].size) for im in outputs]
            image_grid([image for row in rows for image in row], columns=len(inputs)).save(picture)
    return {"psnr": torch.cat(psnrs).mean().item(), "codes_per_image": torch.cat(codes).mean().item()}


if __name__ == "__main__":
    main()
