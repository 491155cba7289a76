r"""Train DQ-VAE, the tokenizer with variable-length codes (stage 1), on any images.

CPU smoke run, a minute:

    accelerate launch --cpu examples/train_dqvae.py --output_dir runs/smoke --max_steps 20 --batch_size 8 --save_every 10

One GPU, one's own folder of images at 256 pixels, the paper's sizes and its whole objective:

    accelerate launch --config_file examples/configs/one_gpu.yaml examples/train_dqvae.py --data path/to/images \
        --output_dir runs/vae --image_size 256 --granularities 16 8 --block_out_channels 128 128 256 256 512 \
        --layers_per_block 2 --norm_num_groups 32 --z_channels 256 --codebook_dim 256 --codebook_size 1024 \
        --perceptual lpips --perceptual_weight 1 --disc_start 20000 --max_steps 500000 --learning_rate 1e-4

All GPUs of one machine: `--config_file examples/configs/one_node.yaml`; of several: `several_nodes.yaml`. Where only the
package is installed, `-m dq_hf.scripts.train_dqvae` stands for `examples/train_dqvae.py`. A run that was stopped or killed
goes on where its last checkpoint was when the same command is given again. At the end `<output_dir>/model` is a folder
with a model card that `DQVAEModel.from_pretrained` loads. `docs/training.md` says what the logged curves look like when
all is well.
"""

import math

import torch
import torch._functorch.config
from accelerate.utils import DistributedDataParallelKwargs
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel

from dq_hf import DQImageProcessor, DQVAEConfig, DQVAEModel
from dq_hf.data.images import ImageCollator
from dq_hf.data.streams import prepare_loader
from dq_hf.loading import load_tokenizer
from dq_hf.metrics.code_statistics import perplexity
from dq_hf.metrics.psnr import psnr
from dq_hf.modeling.grain_map_dq import check_shares
from dq_hf.networks.perceptual import PERCEPTUAL_LOSSES
from dq_hf.pictures import draw_grain_map, image_grid
from dq_hf.scripts.arguments import TOKENIZER_SIZES, TokenizerArguments
from dq_hf.training.adversarial import (
    LeCam,
    PatchDiscriminator,
    adaptive_weight,
    disc_factor,
    generator_loss,
    hinge_loss,
    r1_penalty,
)
from dq_hf.training.calibration import Calibration, warn_of_shares
from dq_hf.training.checkpoints import writing
from dq_hf.training.options import run_script, settle_sizes
from dq_hf.training.progress import set_learning_rate
from dq_hf.training.run import Run, averaged_weights

PLAIN_LOSSES = ("l1", "vq", "budget", "perceptual", "g_loss", "d_loss", "d_lecam")


def main(arguments=None):
    run_script(train, TokenizerArguments, __name__, arguments)


def train(args):
    # Trained in float32, whatever it was saved in.
    start = None if args.start_from is None else load_tokenizer(args.start_from, dtype=torch.float32)
    settle_sizes(args, TOKENIZER_SIZES, None if start is None else sizes_of(start.config))
    config = start.config if start is not None else make_config(args)
    # The codebooks of all processes agree by themselves.
    run = Run(args, "dqvae", handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)])
    accelerator = run.accelerator
    if accelerator.mixed_precision == "fp16" and args.gradient_accumulation_steps > 1 and args.disc_weight > 0:
        raise ValueError(
            "fp16 cannot accumulate the gradients of two optimisers; use bf16, --gradient_accumulation_steps 1, or "
            "--disc_weight 0"
        )
    torch._functorch.config.donated_buffer = False  # the adaptive weight goes back through a compiled graph twice more

    # Data.
    processor = DQImageProcessor.for_model(config)
    train_set, test_sets = run.load_images()
    collate = ImageCollator(processor, args.image_column)
    train_collate = ImageCollator(processor, args.image_column, augmentation=run.augmentation())
    train_loader = run.train_loader(train_set, train_collate)
    test_loaders = run.test_loaders(test_sets, collate)

    # Models, and one optimiser for each (method section 5).
    vae = start if start is not None else DQVAEModel(config)
    calibration = Calibration(args, vae, train_set, collate)
    if run.begins and start is None and not vae.router.uses_features:
        calibration.run()
    if args.decoder_only:
        vae.requires_grad_(False)
        for part in (vae.post_quant_conv, vae.decoder):
            part.requires_grad_(True)
    if args.gradient_checkpointing:
        vae.gradient_checkpointing_enable()
    average = None
    if args.ema_decay > 0:
        average = EMAModel(vae.parameters(), decay=args.ema_decay, use_ema_warmup=True)
    discriminator = PatchDiscriminator(args.disc_channels, args.disc_layers, args.disc_norm)
    if args.disc_weight > 0 and args.disc_start < args.max_steps:
        discriminator.check_size(*config.image_height_width)
    objective = Objective(args, accelerator, vae, discriminator)
    if args.compile:
        vae.encoder.compile()
        vae.decoder.compile()
    optimizers = [
        torch.optim.Adam([p for p in model.parameters() if p.requires_grad], args.learning_rate, betas=(0.5, 0.9))
        for model in (vae, discriminator)
    ]
    scheduler = get_scheduler(
        "cosine", optimizers[0], num_warmup_steps=args.warmup_steps, num_training_steps=args.max_steps
    )
    train_loader = prepare_loader(accelerator, train_loader)
    plain_vae = vae  # without what DDP and compiling wrap around it
    vae, discriminator, *optimizers = accelerator.prepare(vae, discriminator, *optimizers)
    run.resume(average, scheduler, calibration, objective.lecam)
    if average is not None:
        average.to(accelerator.device)  # checkpoints are read to the CPU
    set_learning_rate(scheduler, args.learning_rate)
    accelerator.print(f"shares of regions: {calibration.shares}")

    # Training.
    for batch in run.batches(train_loader, train_collate.set_epoch):
        vae.train(not args.decoder_only)
        plain_vae.decoder.train()
        pixel_values = batch["pixel_values"]
        factor = disc_factor(run.step, args.disc_start, args.disc_ramp) if args.disc_weight > 0 else 0.0
        with accelerator.accumulate(vae, discriminator):
            # The tokenizer's step.
            output = vae(pixel_values)
            loss, terms = objective.of_tokenizer(output, pixel_values, factor)
            terms |= shares_of(output.grain_map, args.granularities)
            terms |= {"loss": loss, "codes": output.num_codes.float().mean()}
            terms |= update(accelerator, vae, optimizers[0], loss, args.max_grad_norm)

            # The discriminator's step.
            if factor > 0:
                optimizers[1].param_groups[0]["lr"] = optimizers[0].param_groups[0]["lr"]
                logits = discriminator(pixel_values), discriminator(output.sample.detach())
                d_loss, d_terms = objective.of_discriminator(*logits, pixel_values)
                norm = update(accelerator, discriminator, optimizers[1], factor * d_loss, args.max_grad_norm)
                terms |= d_terms | {f"d_{name}": value for name, value in norm.items()}
        terms = {name: value.detach() for name, value in terms.items()}
        run.watch(terms, without_scaling=terms.keys() - PLAIN_LOSSES)
        if not accelerator.sync_gradients:
            continue

        scheduler.step()
        if average is not None:
            average.step(vae.parameters())
        run.count_step()
        if run.due(args.log_every):
            rows = run.averaged(terms) | codebook_use(plain_vae.quantizer) | {"lr": scheduler.get_last_lr()[0]}
            if run.step <= args.log_every:  # the first row
                rows |= calibration.figures()
            run.record(rows, show=("loss", "l1", "codes"))
        if run.due(args.sample_every):
            with averaged_weights(vae, average), torch.compiler.set_stance("force_eager"):
                measure(run, plain_vae, calibration, test_loaders, processor)
        run.save_when_due()

    if accelerator.is_main_process and not run.stopped:
        with averaged_weights(vae, average):
            run.save_model(plain_vae, processor)
        publish(run, None if args.streaming else len(train_set), calibration.shares, start)
    run.end()


class Objective:
    """What tokenizer and discriminator learn from (method section 5); a method gives a loss, and its terms by name.

    Args:
        args: `TokenizerArguments`.
        accelerator: of the run.
        vae, discriminator: without what DDP and compiling wrap around them.
    """

    def __init__(self, args, accelerator, vae, discriminator):
        self.args = args
        self.scaler = accelerator.scaler
        self.vae = vae
        self.discriminator = discriminator
        self.perceptual = self.lecam = None
        if args.perceptual_weight > 0:
            self.perceptual = PERCEPTUAL_LOSSES[args.perceptual]().to(accelerator.device)
        if args.disc_lecam > 0:
            self.lecam = LeCam().to(accelerator.device)

    @property
    def scale(self):
        """The gradient scaler's factor, 1 without fp16."""
        return self.scaler.get_scale() if self.scaler is not None else 1.0

    def of_tokenizer(self, output, pixel_values, factor):
        """L1 + perceptual + VQ (+ budget) + adversarial loss, of which the share `factor` counts."""
        args, loss, reconstruction = self.args, output.loss, output.reconstruction_loss
        terms = {"l1": reconstruction, "vq": output.vq_loss}
        if output.budget_loss is not None:
            terms["budget"] = output.budget_loss
        if self.perceptual is not None:
            terms["perceptual"] = self.perceptual(output.sample, pixel_values)
            reconstruction = reconstruction + args.perceptual_weight * terms["perceptual"]
            loss = loss + args.perceptual_weight * terms["perceptual"]
        if factor > 0:
            self.discriminator.requires_grad_(False)
            terms["g_loss"] = generator_loss(self.discriminator(output.sample))
            self.discriminator.requires_grad_(True)
            last_weight = self.vae.decoder.output.conv.weight
            terms["lambda"] = adaptive_weight(
                reconstruction, terms["g_loss"], last_weight, args.disc_weight, self.scale
            )
            loss = loss + factor * terms["lambda"] * terms["g_loss"]
        return loss, terms

    def of_discriminator(self, real_logits, fake_logits, pixel_values):
        """Hinge loss (+ R1 penalty at the real images) (+ LeCam)."""
        loss = hinge_loss(real_logits, fake_logits)
        terms = {"d_loss": loss}
        if self.args.disc_r1 > 0:
            terms["d_r1"] = r1_penalty(self.discriminator, pixel_values, self.scale)
            loss = loss + self.args.disc_r1 / 2 * terms["d_r1"]
        if self.lecam is not None:
            terms["d_lecam"] = self.lecam(real_logits, fake_logits)
            loss = loss + self.args.disc_lecam * terms["d_lecam"]
        return loss, terms


def sizes_of(config):
    """The sizes of a model as options."""
    sizes = {name: getattr(config, name) for name in TOKENIZER_SIZES if hasattr(config, name)}
    return sizes | {"fine_ratios": config.budget_targets or []}


def make_config(args):
    """The model's configuration."""
    shares = []  # with one granularity there is nothing to choose
    if len(args.granularities) > 1:
        shares = check_shares("--fine_ratios", args.fine_ratios, len(args.granularities))
    sizes = {name: getattr(args, name) for name in TOKENIZER_SIZES if name != "fine_ratios"}
    return DQVAEConfig(
        **sizes,
        budget_targets=shares,
        router_norm_num_groups=args.norm_num_groups,
        encoder_attention_factors=args.granularities[:1],
    )


def update(accelerator, model, optimizer, loss, max_grad_norm):
    """A backward pass and, where gradients are complete, a step; the gradient's norm by name, if there was one."""
    accelerator.backward(loss)
    norm = {}
    if accelerator.sync_gradients:
        norm["grad_norm"] = accelerator.clip_grad_norm_(model.parameters(), max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    return norm


def shares_of(grain_map, granularities):
    """Share of the regions at each granularity but the coarsest, by the name that the log gives it."""
    return {f"share_{side}": (grain_map == i).float().mean() for i, side in enumerate(granularities) if i > 0}


def codebook_use(quantizer):
    """Share of codes in use and their perplexity, from the moving averages of their counts (all processes together), not as in
    `CodeStatistics`: in each cell of the finest grid that it fills a code counts once more, and a dead one counts 1.
    """
    uses = quantizer.cluster_size
    return {"codebook_usage": (uses > 1).float().mean().item(), "perplexity": perplexity(uses.cpu())}


def measure(run, model, calibration, loaders, processor):
    """Report held-out figures of each split, with a picture of the first; a router that learns is calibrated before."""
    config, calibrated, first = model.config, calibration.recalibrate(), run.options.test_split[0]
    figures = {
        split: evaluate(run.accelerator, model, loader, processor, run.picture() if split == first else None)
        for split, loader in loaders.items()
    }
    if run.accelerator.is_main_process:
        achieved = [figures[first][f"test_share_{side}"] for side in config.granularities[1:]]
        warn_of_shares(achieved, config.budget_targets, "held-out images")
    run.report(figures, **calibrated)


@torch.no_grad()
def evaluate(accelerator, model, loader, processor, picture):
    """Held-out mean PSNR in dB, codes an image and shares of regions.

    Args:
        picture: path for a drawing of the first images; None: no drawing.
    """
    model.eval()
    figures = []
    for i, batch in enumerate(loader):
        output = model(batch["pixel_values"])
        quality = psnr(output.sample.float().clamp(-1, 1), batch["pixel_values"])
        shares = [(output.grain_map == i).float().mean((1, 2)) for i in range(1, len(model.config.granularities))]
        figures.append(accelerator.gather_for_metrics((quality, output.num_codes.float(), *shares)))
        if i == 0 and picture is not None and accelerator.is_main_process:
            with writing(picture, picture.parent):
                draw(model.config, processor, batch["pixel_values"][:16], output).save(picture)
    names = ["psnr", "codes_per_image", *(f"test_share_{side}" for side in model.config.granularities[1:])]
    return {name: torch.cat(values).mean().item() for name, values in zip(names, zip(*figures))}


def draw(config, processor, pixel_values, output):
    """A PIL image with a column for each image: itself, its grain map and its reconstruction."""
    inputs, outputs = (processor.post_process(images) for images in (pixel_values, output.sample[: len(pixel_values)]))
    scale = math.ceil(8 / config.granularities[-1])  # frames of 8 pixels
    maps = [draw_grain_map(image, grain_map, scale) for image, grain_map in zip(inputs, output.grain_map)]
    inputs, outputs = ([image.resize(maps[0].size) for image in images] for images in (inputs, outputs))
    return image_grid([*inputs, *maps, *outputs], columns=len(inputs))


def publish(run, num_images, shares, start):
    """Put the card of what was measured into the model's folder, and push it if asked to."""
    args = run.options
    run.publish(
        DQVAEConfig.from_pretrained(run.dir / "model"),
        measured=next(row for row in reversed(run.log.read()) if "psnr" in row),
        metrics=("psnr", "codes_per_image"),
        losses=(*PLAIN_LOSSES, "codebook_usage", "perplexity"),
        picture="reconstructions.png",
        dataset=args.data,
        data={"training images": num_images, "horizontal flips": args.horizontal_flips}
        | {f"share of regions with codes of {side} x {side} pixels": share for side, share in shares.items()},
        training={
            "perceptual loss": args.perceptual if args.perceptual_weight > 0 else None,
            "only the decoder was trained": args.decoder_only or None,
        },
        sources=None if start is None else {"": start},
    )


if __name__ == "__main__":
    main()
