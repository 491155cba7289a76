"""Train DQ-Transformer, which generates variable-length codes from coarse to fine (stage 2), on a trained DQ-VAE's codes.

CPU smoke run on the embedded tokenizer, a minute:

    accelerate launch --cpu examples/train_dqtransformer.py --output_dir runs/smoke2 --max_steps 20 --batch_size 8 \
        --hidden_size 64 --num_position_layers 1 --num_content_layers 1 --max_images 200

One GPU, the paper's sizes, one's own tokenizer:

    accelerate launch --mixed_precision bf16 examples/train_dqtransformer.py --vae runs/vae/model --data path/to/images \
        --output_dir runs/transformer --hidden_size 1024 --num_attention_heads 8 --num_position_layers 6 \
        --num_content_layers 18 --max_steps 300000

Several GPUs or machines: the same after `accelerate config`. A run that was stopped goes on where it was when the same
command is given again. `<output_dir>/model` holds tokenizer and generator with the smallest held-out loss so far; every
door of dq_hf loads it.
"""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from diffusers.optimization import get_scheduler
from torch.utils.data import DataLoader, TensorDataset
from tqdm.auto import tqdm
from transformers import HfArgumentParser

from dq_hf import (
    DEFAULT_MODEL,
    DQForImageGeneration,
    DQImageProcessor,
    DQTransformerConfig,
    DQTransformerForImageGeneration,
    DQVAEModel,
)
from dq_hf.training.checkpoints import resume, save_checkpoint
from dq_hf.training.data import ImageCollator, class_names, load_images
from dq_hf.visualize import image_grid


@dataclass
class Arguments:
    output_dir: str
    vae: str = field(default=f"{DEFAULT_MODEL}/vae", metadata={"help": "folder or Hub id of a DQVAEModel"})
    data: str = field(default="examples/data/emoji", metadata={"help": "folder of images or Parquet, or a Hub id"})
    train_split: str = "train"
    test_split: str = "test"
    image_column: str = "image"
    label_column: str | None = field(default="label", metadata={"help": "none: unconditional"})
    max_images: int | None = field(default=None, metadata={"help": "only the first so many, for a quick try"})

    hidden_size: int = 256
    num_attention_heads: int = 8
    num_position_layers: int = 2
    num_content_layers: int = 4
    fine_order: str = field(default="row-first", metadata={"help": "row-first or region-first"})
    dropout: float = 0.1
    attention_dropout: float = field(default=0.1, metadata={"help": "0 lets the fast attention kernels work on a CPU"})
    attn_implementation: str | None = field(default=None, metadata={"help": "eager, sdpa, flash_attention_2, ..."})
    class_dropout: float = field(default=0.1, metadata={"help": "for classifier-free guidance; 0: none"})

    horizontal_flips: bool = field(default=True, metadata={"help": "mirror images count as further training images"})
    batch_size: int = field(default=32, metadata={"help": "per process"})
    learning_rate: float = 5e-4
    weight_decay: float = field(default=0.01, metadata={"help": "on the weights of linear layers only"})
    warmup_steps: int = 200
    max_steps: int = 4000
    seed: int = 0
    save_every: int = 500
    sample_every: int = field(default=500, metadata={"help": "held-out loss and sample pictures"})
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
    label_column = None if args.label_column in (None, "none") else args.label_column

    vae = DQVAEModel.from_pretrained(args.vae).to(accelerator.device).eval()
    with accelerator.main_process_first():
        train_set = load_images(args.data, args.train_split, args.image_column)
        test_set = load_images(args.data, args.test_split, args.image_column)
    names = class_names(train_set, label_column) if label_column else []
    train_codes = encode_images(vae, train_set, args, label_column, flips=args.horizontal_flips)
    test_codes = encode_images(vae, test_set, args, label_column, flips=False)
    train_loader = DataLoader(
        train_codes,
        args.batch_size,
        shuffle=True,
        drop_last=True,
        generator=torch.Generator(),  # else opening it draws from torch's own, and a resumed run opens it once more
    )
    test_loader = DataLoader(test_codes, args.batch_size)

    model = DQTransformerForImageGeneration(
        DQTransformerConfig(
            grid_sizes=vae.config.grid_sizes,
            codebook_size=vae.config.codebook_size,
            num_classes=len(names),
            id2label=dict(enumerate(names)),
            class_dropout=args.class_dropout if names else 0.0,
            hidden_size=args.hidden_size,
            num_attention_heads=args.num_attention_heads,
            num_position_layers=args.num_position_layers,
            num_content_layers=args.num_content_layers,
            fine_order=args.fine_order,
            embedding_dropout=args.dropout,
            residual_dropout=args.dropout,
            attention_dropout=args.attention_dropout,
        )
    )
    if args.attn_implementation is not None:
        model.set_attn_implementation(args.attn_implementation)
    optimizer = torch.optim.AdamW(parameter_groups(model, args.weight_decay), args.learning_rate, betas=(0.9, 0.95))
    scheduler = get_scheduler(
        "cosine", optimizer, num_warmup_steps=args.warmup_steps, num_training_steps=args.max_steps
    )
    best = BestLoss()
    model, optimizer, train_loader, test_loader = accelerator.prepare(model, optimizer, train_loader, test_loader)
    if len(train_loader) == 0:
        raise ValueError(
            f"--batch_size times processes must be at most {len(train_codes)}, the number of training streams"
        )
    accelerator.register_for_checkpointing(scheduler, best)
    accelerator.init_trackers("dqtransformer", config={k: str(v) for k, v in vars(args).items()})
    step = resume(accelerator, output_dir)
    accelerator.print(f"{len(train_codes)} training streams, {args.max_steps} steps, starting at step {step}")

    progress = tqdm(total=args.max_steps, initial=step, disable=not accelerator.is_main_process)
    while step < args.max_steps:
        epoch, batches_done = divmod(step, len(train_loader))
        train_loader.set_epoch(epoch)
        for codes, grain_map, labels in accelerator.skip_first_batches(train_loader, batches_done):
            model.train()
            output = model(codes.long(), grain_map.long(), labels.long() if names else None)
            accelerator.backward(output.loss)
            norm = accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()

            step += 1
            progress.update()
            if step % 20 == 0:
                logs = {name: getattr(output, name).item() for name in ("loss", "content_loss", "position_loss")}
                logs |= {"grad_norm": float(norm), "lr": scheduler.get_last_lr()[0]}
                if not math.isfinite(logs["loss"]):
                    raise RuntimeError(f"the loss is not finite at step {step}: {logs}; lower --learning_rate")
                progress.set_postfix({name: f"{value:.4g}" for name, value in logs.items()})
                accelerator.log(logs, step)
            if step % args.sample_every == 0 or step == args.max_steps:
                metrics = evaluate(accelerator, model, test_loader, bool(names))
                accelerator.log(metrics, step)
                accelerator.print(f"step {step}: {json.dumps(metrics)}")
                joint = DQForImageGeneration.from_models(vae, accelerator.unwrap_model(model))
                if accelerator.is_main_process:
                    draw_samples(joint, names, args.seed, output_dir / f"samples-{step:06d}.png")
                    if best.improve(metrics["test_loss"]):
                        joint.save_pretrained(output_dir / "model")
            if step % args.save_every == 0 or step == args.max_steps:
                save_checkpoint(accelerator, output_dir, step)
            if step == args.max_steps:
                break
    accelerator.wait_for_everyone()
    accelerator.end_training()


@torch.no_grad()
def encode_images(vae, dataset, args, label_column, flips):
    """Codes, grain maps and labels of all images (and of their mirror images), in memory: about 1 kB an image."""
    if args.max_images is not None:
        dataset = dataset.select(range(min(args.max_images, len(dataset))))
    height, width = vae.config.image_height_width
    processor = DQImageProcessor(size={"height": height, "width": width})
    loader = DataLoader(dataset, 64, collate_fn=ImageCollator(processor, args.image_column, label_column))
    columns = []
    for batch in tqdm(loader, desc="encode"):
        pixel_values = batch["pixel_values"].to(vae.device)
        labels = batch.get("class_labels", torch.zeros(len(pixel_values), dtype=torch.long))
        for images in (pixel_values, pixel_values.flip(-1)) if flips else (pixel_values,):
            encoded = vae.encode(images)
            columns.append((encoded.codes.int().cpu(), encoded.grain_map.to(torch.uint8).cpu(), labels))
    return TensorDataset(*(torch.cat(column) for column in zip(*columns)))


def parameter_groups(model, weight_decay):
    """Weight decay on the weights of linear layers only (paper appendix; the release)."""
    decayed = [module.weight for module in model.modules() if isinstance(module, torch.nn.Linear)]
    decayed_ids = {id(weight) for weight in decayed}
    others = [parameter for parameter in model.parameters() if id(parameter) not in decayed_ids]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


class BestLoss:
    """The smallest held-out loss so far, kept in the checkpoints."""

    def __init__(self):
        self.value = math.inf

    def improve(self, loss):
        """Whether `loss` is the smallest so far; it is remembered."""
        improved = loss < self.value
        self.value = min(loss, self.value)
        return improved

    def state_dict(self):
        return {"value": self.value}

    def load_state_dict(self, state):
        self.value = state["value"]


@torch.no_grad()
def evaluate(accelerator, model, loader, has_labels):
    """Held-out losses in nats, means over the batches' images."""
    model.eval()
    rows = []
    for codes, grain_map, labels in loader:
        output = model(codes.long(), grain_map.long(), labels.long() if has_labels else None)
        losses = torch.stack([output.loss, output.content_loss, output.position_loss]).float()
        rows.append(accelerator.gather_for_metrics(losses.expand(len(codes), 3)))
    loss, content_loss, position_loss = torch.cat(rows).mean(0).tolist()
    return {"test_loss": loss, "test_content_loss": content_loss, "test_position_loss": position_loss}


def draw_samples(joint, names, seed, picture):
    """Eight images of each class (at most ten classes), one row a class, or 16 of an unconditional model."""
    labels = [label for label in range(min(len(names), 10)) for _ in range(8)] or None
    generator = torch.Generator().manual_seed(seed)
    joint.eval()
    generated = joint.generate(labels, num_images=None if labels else 16, generator=generator)
    images = DQImageProcessor().post_process(generated.pixel_values)
    image_grid(images, columns=8).save(picture)


if __name__ == "__main__":
    main()
