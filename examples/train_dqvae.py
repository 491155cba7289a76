"""Train DQ-VAE, the tokenizer with variable-length codes (stage 1), on any images.

CPU smoke run, a minute:

    accelerate launch --cpu examples/train_dqvae.py --output_dir runs/smoke --max_steps 20 --batch_size 8 --save_every 10

One GPU, one's own folder of images at 256 pixels, the paper's sizes and its whole objective:

    accelerate launch --config_file examples/configs/one_gpu.yaml examples/train_dqvae.py --data path/to/images \
        --output_dir runs/vae --image_size 256 --granularities 16 8 --block_out_channels 128 128 256 256 512 \
        --layers_per_block 2 --norm_num_groups 32 --z_channels 256 --codebook_dim 256 --codebook_size 1024 \
        --perceptual lpips --perceptual_weight 1 --disc_start 20000 --max_steps 500000 --learning_rate 1e-4

All GPUs of one machine: `--config_file examples/configs/one_node.yaml`; of several: `several_nodes.yaml`. A run that was
stopped or killed goes on where its last checkpoint was when the same command is given again. At the end
`<output_dir>/model` is a folder with a model card that `DQVAEModel.from_pretrained` loads. `docs/training.md` says what
the logged curves look like when all is well.
"""

import itertools
import json
import math
import shutil
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
import torch._functorch.config
from accelerate import Accelerator
from accelerate.utils import (
    DataLoaderConfiguration,
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    set_seed,
)
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch.utils.data import DataLoader
from transformers import HfArgumentParser

from dq_hf import DQImageProcessor, DQVAEConfig, DQVAEModel
from dq_hf.data.images import ImageCollator
from dq_hf.data.streams import load_train_and_test, prepare_loader
from dq_hf.modeling.hub_dq import check_push
from dq_hf.modeling.model_card_dq import write_model_card
from dq_hf.networks.perceptual import make_perceptual_loss
from dq_hf.pictures import draw_grain_map, image_grid
from dq_hf.training.adversarial import PatchDiscriminator, adaptive_weight, disc_factor, generator_loss, hinge_loss
from dq_hf.training.calibration import calibrate_thresholds
from dq_hf.training.checkpoints import (
    check_writable,
    find_checkpoint,
    put_in_place,
    resume,
    save_checkpoint,
    writing,
)
from dq_hf.training.progress import (
    FiniteCheck,
    Progress,
    RunLog,
    StopSignal,
    batches,
    check_max_steps,
    ignore_sigterm,
    progress_bar,
    set_learning_rate,
)
from dq_hf.training.publish import command_line, machine_facts, push_folder


@dataclass
class Arguments:
    output_dir: str
    data: str = field(default="examples/data/emoji", metadata={"help": "folder of images or Parquet, or a Hub id"})
    train_split: str = "train"
    test_split: str = "test"
    image_column: str = "image"
    streaming: bool = field(
        default=False, metadata={"help": "read a Hub set that does not fit on the disk as it comes"}
    )
    max_test_images: int = field(default=1000, metadata={"help": "held-out images to measure on"})
    max_broken_share: float = field(
        default=0.01, metadata={"help": "images that cannot be read are skipped; above this share the run stops"}
    )
    num_workers: int = 0

    start_from: str | None = field(
        default=None,
        metadata={"help": "folder or Hub id of a DQVAEModel to go on from; its sizes and thresholds stay"},
    )
    decoder_only: bool = field(
        default=False,
        metadata={"help": "with --start_from: all codes stay as they are, and so do caches and generators of them"},
    )
    image_size: int = 64
    granularities: list[int] = field(default_factory=lambda: [8, 4])
    router: str = field(default="entropy", metadata={"help": "entropy or feature"})
    fine_ratios: list[float] = field(
        default_factory=lambda: [0.5],
        metadata={"help": "budget: share of regions at each granularity but the coarsest"},
    )
    calibration_images: int = field(default=4096, metadata={"help": "training images that set the entropy thresholds"})
    block_out_channels: list[int] = field(default_factory=lambda: [32, 48, 96, 128])
    layers_per_block: int = 1
    norm_num_groups: int = 16
    z_channels: int = 96
    codebook_size: int = 512
    codebook_dim: int = 32

    perceptual: str = field(
        default="efficientnet-lite0", metadata={"help": "lpips (the paper's), or efficientnet-lite0, offline and fast"}
    )
    perceptual_weight: float = field(default=0.2, metadata={"help": "0 needs no feature network"})
    disc_weight: float = field(default=0.75, metadata={"help": "of the adversarial loss; 0: no discriminator"})
    disc_start: int = field(default=2000, metadata={"help": "step at which the discriminator begins"})
    disc_ramp: int = field(default=0, metadata={"help": "steps in which it comes to full weight; 0: at once"})
    disc_channels: int = 64
    disc_layers: int = 3

    horizontal_flips: bool = True
    batch_size: int = field(default=32, metadata={"help": "per process and forward pass"})
    gradient_accumulation_steps: int = field(
        default=1, metadata={"help": "the codebook still moves at every forward pass"}
    )
    learning_rate: float = field(default=6e-4, metadata={"help": "far above the paper's 4.5e-6 x batch: short runs"})
    warmup_steps: int = 100
    max_grad_norm: float = 1.0
    ema_decay: float = field(default=0.999, metadata={"help": "of the averaged weights that are kept; 0: none"})
    max_steps: int = 4000
    gradient_checkpointing: bool = field(default=False, metadata={"help": "less memory, more time"})
    compile: bool = field(default=False, metadata={"help": "torch.compile"})
    seed: int = 0

    log_every: int = 20
    save_every: int = 500
    keep_checkpoints: int = 2
    sample_every: int = field(default=500, metadata={"help": "held-out figures and a picture"})
    resume: str = field(default="auto", metadata={"help": "auto, never, or a checkpoint's folder"})
    report_to: str | None = field(default=None, metadata={"help": "tensorboard, trackio or any accelerate tracker"})
    push_to_hub: str | None = field(default=None, metadata={"help": "repository for the finished model"})


def main():
    args = HfArgumentParser(Arguments).parse_args_into_dataclasses()[0]
    output_dir = Path(args.output_dir)
    accelerator = Accelerator(
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=args.gradient_accumulation_steps,
            sync_with_dataloader=False,  # steps of one size, also at the end of an epoch
        ),
        dynamo_backend="inductor" if args.compile else None,
        log_with=args.report_to,
        project_config=ProjectConfiguration(project_dir=args.output_dir, logging_dir=args.output_dir),
        step_scheduler_with_optimizer=False,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=args.seed),
        kwargs_handlers=[
            DistributedDataParallelKwargs(broadcast_buffers=False),  # the codebooks agree by themselves
            InitProcessGroupKwargs(timeout=timedelta(hours=3)),  # one process checks the images, the others wait
        ],
    )
    if accelerator.mixed_precision == "fp16" and args.gradient_accumulation_steps > 1 and args.disc_weight > 0:
        raise ValueError(
            "fp16 cannot accumulate the gradients of two optimisers; use bf16, --gradient_accumulation_steps 1, or "
            "--disc_weight 0"
        )
    check_writable(output_dir)
    begins = find_checkpoint(accelerator, output_dir, args.resume) is None
    if args.push_to_hub and accelerator.is_main_process:
        args.push_to_hub = check_push(args.push_to_hub)  # with the user's name
    start = DQVAEModel.from_pretrained(args.start_from) if args.start_from is not None else None
    if start is not None:
        take_sizes(args, start.config)
    elif args.decoder_only:
        raise ValueError("--decoder_only trains the decoder of a finished model; give it with --start_from")
    set_seed(args.seed)
    torch._functorch.config.donated_buffer = False  # the adaptive weight goes back through a compiled graph twice more

    # Data.
    processor = DQImageProcessor(size={"height": args.image_size, "width": args.image_size})
    train_set, test_set = load_train_and_test(
        accelerator,
        args.data,
        (args.train_split, args.test_split),
        args.image_column,
        args.streaming,
        args.max_broken_share,
        args.max_test_images,
        args.seed,
    )
    collate = ImageCollator(processor, args.image_column)
    train_collate = ImageCollator(processor, args.image_column, flip_seed=args.seed if args.horizontal_flips else None)
    train_loader = DataLoader(
        train_set,
        args.batch_size,
        shuffle=None if args.streaming else True,
        drop_last=True,
        collate_fn=train_collate,
        num_workers=args.num_workers,
        worker_init_fn=ignore_sigterm,
    )
    test_loader = DataLoader(test_set, args.batch_size, collate_fn=collate)

    # Models, and one optimiser for each (method section 5).
    config = start.config if start is not None else make_config(args)
    calibration = Calibration(args, config)
    if begins and start is None:
        calibration.run(train_set, collate)
    vae = start if start is not None else DQVAEModel(config)
    if args.decoder_only:
        vae.requires_grad_(False)
        for part in (vae.post_quant_conv, vae.decoder):
            part.requires_grad_(True)
    if args.gradient_checkpointing:
        vae.gradient_checkpointing_enable()
    ema = EMAModel(vae.parameters(), decay=args.ema_decay, use_ema_warmup=True)
    discriminator = PatchDiscriminator(args.disc_channels, args.disc_layers)
    if args.disc_weight > 0 and args.disc_start < args.max_steps:
        discriminator.check_size(args.image_size, args.image_size)
    perceptual = None
    if args.perceptual_weight > 0:
        perceptual = make_perceptual_loss(args.perceptual).to(accelerator.device)
    optimizers = [
        torch.optim.Adam(filter(is_trained, model.parameters()), lr=args.learning_rate, betas=(0.5, 0.9))
        for model in (vae, discriminator)
    ]
    scheduler = get_scheduler(
        "cosine", optimizers[0], num_warmup_steps=args.warmup_steps, num_training_steps=args.max_steps
    )
    train_loader = prepare_loader(accelerator, train_loader)
    plain_vae, judge = vae, discriminator  # without what DDP and compiling wrap around them
    vae, discriminator, *optimizers, test_loader = accelerator.prepare(vae, discriminator, *optimizers, test_loader)
    progress = Progress()
    accelerator.register_for_checkpointing(progress, ema, scheduler, calibration)
    set_seed(args.seed, device_specific=True)
    resume(accelerator, output_dir, args.resume)
    check_max_steps(args.max_steps, progress.step, output_dir)
    ema.to(accelerator.device)  # checkpoints are read to the CPU
    set_learning_rate(scheduler, args.learning_rate)
    accelerator.init_trackers("dqvae", config={k: str(v) for k, v in vars(args).items()})
    log = RunLog(output_dir / "log.jsonl", progress.step) if accelerator.is_main_process else None
    shares = calibration.shares
    accelerator.print(f"{args.max_steps} steps, starting at step {progress.step}; shares of regions: {shares}")

    # Training.
    def objective(pixel_values):
        """L1 + perceptual + VQ (+ budget) + adversarial loss, the reconstructions, and the terms to log."""
        output = vae(pixel_values)
        reconstruction, loss = output.reconstruction_loss, output.loss
        terms = {"l1": output.reconstruction_loss, "vq": output.vq_loss}
        if output.budget_loss is not None:
            terms["budget"] = output.budget_loss
        if perceptual is not None:
            terms["perceptual"] = perceptual(output.sample, pixel_values)
            reconstruction = reconstruction + args.perceptual_weight * terms["perceptual"]
            loss = loss + args.perceptual_weight * terms["perceptual"]
        if factor > 0:
            judge.requires_grad_(False)
            terms["g_loss"] = generator_loss(judge(output.sample))
            judge.requires_grad_(True)
            last_weight = plain_vae.decoder.output.conv.weight
            scale = accelerator.scaler.get_scale() if accelerator.scaler is not None else 1.0
            terms["lambda"] = adaptive_weight(
                reconstruction, terms["g_loss"], last_weight, args.disc_weight, scale=scale
            )
            loss = loss + factor * terms["lambda"] * terms["g_loss"]
        for granularity in range(1, len(args.granularities)):
            terms[f"share_{args.granularities[granularity]}"] = (output.grain_map == granularity).float().mean()
        terms |= {"loss": loss, "codes": output.num_codes.float().mean()}
        return loss, output.sample.detach(), {name: value.detach() for name, value in terms.items()}

    def update(model, optimizer, loss):
        """A backward pass and, where gradients are complete, a step; the gradient's norm by name, if there was one."""
        accelerator.backward(loss)
        norm = {}
        if accelerator.sync_gradients:
            norm["grad_norm"] = accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        return norm

    finite = FiniteCheck(progress.step)
    images_per_step = args.batch_size * args.gradient_accumulation_steps * accelerator.num_processes
    bar = progress_bar(args.max_steps, images_per_step, progress.step, disable=not accelerator.is_main_process)
    with StopSignal() as stop:
        for batch in batches(train_loader, progress, accelerator, train_collate.set_epoch, args.max_steps):
            vae.train(not args.decoder_only)
            plain_vae.decoder.train()
            pixel_values = batch["pixel_values"]
            factor = disc_factor(progress.step, args.disc_start, args.disc_ramp) if args.disc_weight > 0 else 0.0
            with accelerator.accumulate(vae, discriminator):
                loss, reconstructions, terms = objective(pixel_values)
                terms |= update(vae, optimizers[0], loss)
                if factor > 0:
                    optimizers[1].param_groups[0]["lr"] = scheduler.get_last_lr()[0]
                    d_loss = hinge_loss(discriminator(pixel_values), discriminator(reconstructions))
                    norm = update(discriminator, optimizers[1], factor * d_loss)
                    terms |= {"d_loss": d_loss.detach()} | {f"d_{name}": value for name, value in norm.items()}
            # Under fp16 a gradient may overflow, and its step is left out; the plain losses may not.
            finite.add(**{name: terms[name] for name in terms if accelerator.scaler is None or name in PLAIN_LOSSES})
            if not accelerator.sync_gradients:
                continue

            progress.step += 1
            bar.update(images_per_step)
            scheduler.step()
            if args.ema_decay > 0:
                ema.step(vae.parameters())
            step, last = progress.step, progress.step == args.max_steps
            if step % args.log_every == 0 or last:
                finite.raise_if_bad(step, output_dir)
                rows = averaged(accelerator, terms) | codebook_use(plain_vae.quantizer)
                rows["lr"] = scheduler.get_last_lr()[0]
                if step <= args.log_every:  # the first row
                    rows |= {f"calibrated_share_{side}": share for side, share in shares.items()}
                record(accelerator, log, step, rows)
                bar.set_postfix({name: f"{rows[name]:.4g}" for name in ("loss", "l1", "codes")})
            if step % args.sample_every == 0 or last:
                finite.raise_if_bad(step, output_dir)
                with averaged_weights(vae, ema, args):
                    picture = output_dir / f"samples-{step:06d}.png"
                    metrics = evaluate(accelerator, plain_vae, test_loader, processor, picture)
                record(accelerator, log, step, metrics)
                accelerator.print(f"step {step}: {json.dumps(metrics)}")
            stopping = stop.requested(accelerator)
            if step % args.save_every == 0 or last or stopping:
                finite.raise_if_bad(step, output_dir)
                save_checkpoint(accelerator, output_dir, step, args.keep_checkpoints)
            if stopping:
                accelerator.print(f"stopped at step {step}; the same command goes on from there")
                accelerator.end_training()
                return
    if accelerator.is_main_process:
        with averaged_weights(vae, ema, args):
            save_model(plain_vae, processor, output_dir / "model")
        num_images = None if args.streaming else len(train_set)
        describe_and_push(accelerator, args, log.read(), progress, num_images, shares)
    accelerator.wait_for_everyone()
    accelerator.end_training()


PLAIN_LOSSES = ("l1", "vq", "budget", "perceptual", "g_loss", "d_loss")


SIZES = ("granularities", "router", "block_out_channels", "layers_per_block", "norm_num_groups", "z_channels")
SIZES += ("codebook_size", "codebook_dim")


def take_sizes(args, config):
    """Put the sizes of the model to go on from into the arguments.

    Raises:
        ValueError: an argument that asks for another size.
    """
    height, width = config.image_height_width
    if height != width:
        raise ValueError(f"--start_from must be a model of square images, got {height}x{width}")
    sizes = {name: getattr(config, name) for name in SIZES}
    sizes |= {"image_size": height, "fine_ratios": config.budget_targets or []}
    defaults = Arguments(output_dir=args.output_dir)
    for name, value in sizes.items():
        if getattr(args, name) not in (value, getattr(defaults, name)):
            raise ValueError(
                f"--{name} is {value} in the model of --start_from, got {getattr(args, name)}; leave it out"
            )
        setattr(args, name, value)


def is_trained(parameter):
    """Whether this parameter is to change."""
    return parameter.requires_grad


def make_config(args):
    """The model's configuration; its entropy thresholds are not those of these images yet."""
    return DQVAEConfig(
        image_size=args.image_size,
        granularities=args.granularities,
        router=args.router,
        budget_targets=args.fine_ratios if len(args.granularities) > 1 else [],  # one: nothing to choose
        block_out_channels=args.block_out_channels,
        layers_per_block=args.layers_per_block,
        norm_num_groups=args.norm_num_groups,
        router_norm_num_groups=args.norm_num_groups,
        z_channels=args.z_channels,
        codebook_size=args.codebook_size,
        codebook_dim=args.codebook_dim,
        encoder_attention_factors=args.granularities[:1],
    )


class Calibration:
    """Entropy thresholds, in the model's configuration, and the shares of regions that they give.

    Both are kept in the checkpoints: a run that goes on codes as it began, whatever it would find now.
    """

    def __init__(self, args, config):
        self.args = args
        self.config = config
        self.shares = {}

    def run(self, train_set, collate):
        """Find the thresholds for training images, if the router needs any."""
        args, granularities, budget = self.args, self.config.granularities, self.config.budget_targets
        if self.config.router != "entropy" or not budget:
            return
        # The same on all processes.
        subset = train_set.part(0, 1) if args.streaming else train_set.shuffle(seed=args.seed)
        loader = DataLoader(subset, args.batch_size, collate_fn=collate)
        num_batches = math.ceil(args.calibration_images / args.batch_size)
        images = (batch["pixel_values"] for batch in itertools.islice(loader, num_batches))
        self.config.entropy_thresholds, shares = calibrate_thresholds(images, granularities[0], budget)
        self.shares = dict(zip(granularities[1:], shares))

    def state_dict(self):
        sizes = {name: getattr(self.args, name) for name in ("image_size", "fine_ratios", *SIZES)}
        return {"sizes": sizes, "thresholds": self.config.entropy_thresholds, "shares": self.shares}

    def load_state_dict(self, state):
        for name, value in state["sizes"].items():
            if getattr(self.args, name) != value:
                raise ValueError(f"--{name} was {value}, got {getattr(self.args, name)}")
        self.config.entropy_thresholds, self.shares = state["thresholds"], state["shares"]


@contextmanager
def averaged_weights(vae, ema, args):
    """The moving average of the weights, if there is one, in place of the present ones."""
    if args.ema_decay > 0:
        ema.store(vae.parameters())
        ema.copy_to(vae.parameters())
    yield
    if args.ema_decay > 0:
        ema.restore(vae.parameters())


def averaged(accelerator, terms):
    """Logged terms as numbers, means over the processes."""
    values = accelerator.reduce(torch.stack([value.float() for value in terms.values()]), "mean")
    return dict(zip(terms, values.tolist()))


def codebook_use(quantizer):
    """Share of codes in use and their perplexity, from the moving averages of their counts (all processes together)."""
    share = quantizer.cluster_size / quantizer.cluster_size.sum()
    perplexity = torch.exp(-(share * share.clamp(min=1e-10).log()).sum())
    return {"codebook_usage": (quantizer.cluster_size > 1).float().mean().item(), "perplexity": perplexity.item()}


def record(accelerator, log, step, values):
    """To the run's log and to the tracker."""
    accelerator.log(values, step)
    if log is not None:
        log.write(step, values)


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
            scale = math.ceil(8 / model.config.granularities[-1])  # frames of 8 pixels
            maps = [draw_grain_map(image, grain_map, scale) for image, grain_map in zip(inputs, output.grain_map)]
            outputs = processor.post_process(output.sample[:16])
            rows = [image.resize(maps[0].size) for image in inputs], maps, [im.resize(maps[0].size) for im in outputs]
            with writing(picture, picture.parent):
                image_grid([image for row in rows for image in row], columns=len(inputs)).save(picture)
    return {"psnr": torch.cat(psnrs).mean().item(), "codes_per_image": torch.cat(codes).mean().item()}


def save_model(vae, processor, folder):
    """Beside the folder first, so that what was there is lost only once the new one is in its place."""
    partial = folder.with_name(f"partial-{folder.name}")
    with writing(folder, folder.parent):
        shutil.rmtree(partial, ignore_errors=True)
        vae.save_pretrained(partial)
        processor.save_pretrained(partial)
        put_in_place(partial, folder)


def describe_and_push(accelerator, args, rows, progress, num_images, shares):
    """Put the card of what was measured into the model's folder, and push it if asked to."""
    folder = Path(args.output_dir) / "model"
    measured = next(row for row in reversed(rows) if "psnr" in row)
    shutil.copy(Path(args.output_dir) / f"samples-{measured['step']:06d}.png", folder / "reconstructions.png")
    trained = next(row for row in reversed(rows) if "loss" in row)
    write_model_card(
        folder,
        DQVAEConfig.from_pretrained(folder),
        title=args.push_to_hub or Path(args.output_dir).name,
        repository=args.push_to_hub,
        dataset=args.data,
        test_split=args.test_split,
        metrics={name: measured[name] for name in ("psnr", "codes_per_image")},
        losses={name: trained[name] for name in (*PLAIN_LOSSES, "codebook_usage", "perplexity") if name in trained},
        data={"training images": num_images, "horizontal flips": args.horizontal_flips}
        | {f"share of regions with codes of {side} x {side} pixels": share for side, share in shares.items()},
        training={
            "steps": progress.step,
            "images seen": progress.images,
            "batch, all processes": args.batch_size * args.gradient_accumulation_steps * accelerator.num_processes,
            "learning rate, highest": args.learning_rate,
            "perceptual loss": args.perceptual if args.perceptual_weight > 0 else None,
            "started from": args.start_from,
            "only the decoder was trained": args.decoder_only or None,
        }
        | machine_facts(accelerator),
        command=command_line(),
    )
    if args.push_to_hub:
        print(push_folder(folder, args.push_to_hub, commit_message=f"Train for {progress.step} steps"))


if __name__ == "__main__":
    main()
