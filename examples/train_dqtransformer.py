"""Train DQ-Transformer, which generates variable-length codes from coarse to fine (stage 2), on a trained DQ-VAE's codes.

CPU smoke run on the embedded tokenizer, a minute:

    accelerate launch --cpu examples/train_dqtransformer.py --output_dir runs/smoke2 --max_steps 20 --batch_size 8 \
        --hidden_size 64 --num_position_layers 1 --num_content_layers 1 --max_test_images 50

One GPU, the paper's sizes, one's own tokenizer; images are encoded once, into a cache of codes:

    accelerate launch examples/encode_dataset.py --data path/to/images --vae runs/vae/model --output_dir runs/codes
    accelerate launch --config_file examples/configs/one_gpu.yaml examples/train_dqtransformer.py --codes runs/codes \
        --vae runs/vae/model --output_dir runs/transformer --hidden_size 1024 --num_attention_heads 8 \
        --num_position_layers 6 --num_content_layers 18 --max_steps 300000

All GPUs of one machine: `--config_file examples/configs/one_node.yaml`, or `one_node_fsdp.yaml` to share out weights and
optimiser; of several machines: `several_nodes.yaml`. A run that was stopped or killed goes on where its last checkpoint
was when the same command is given again. `<output_dir>/model` holds tokenizer and generator with the smallest held-out
loss so far, with a model card at the end; every door of dq_hf loads it. `docs/training.md` says what the logged curves
look like when all is well.
"""

import json
import math
import shutil
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DataLoaderConfiguration,
    DistributedType,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    set_seed,
)
from diffusers.optimization import get_scheduler
from torch.utils.data import DataLoader
from transformers import HfArgumentParser

from dq_hf import (
    DEFAULT_MODEL,
    DQConfig,
    DQForImageGeneration,
    DQImageProcessor,
    DQTransformerConfig,
    DQTransformerForImageGeneration,
    DQVAEModel,
)
from dq_hf.data.codes import CodeCollator, LengthBucketSampler, load_codes, read_index
from dq_hf.data.images import ImageCollator, class_names, first_rows
from dq_hf.data.streams import load_train_and_test, prepare_loader
from dq_hf.modeling.hub_dq import check_push
from dq_hf.modeling.model_card_dq import write_model_card
from dq_hf.pictures import image_grid
from dq_hf.training.checkpoints import check_writable, put_in_place, resume, save_checkpoint, writing
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
    vae: str = field(default=f"{DEFAULT_MODEL}/vae", metadata={"help": "folder or Hub id of a DQVAEModel"})
    codes: str | None = field(
        default=None,
        metadata={"help": "cache made by encode_dataset.py; without it, images are encoded at every step"},
    )
    data: str = field(default="examples/data/emoji", metadata={"help": "folder of images or Parquet, or a Hub id"})
    train_split: str = "train"
    test_split: str = "test"
    image_column: str = "image"
    label_column: str | None = field(default="label", metadata={"help": "none: unconditional"})
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
        metadata={"help": "folder or Hub id of a DQTransformerForImageGeneration to go on from; its sizes stay"},
    )
    hidden_size: int = 256
    num_attention_heads: int = 8
    num_position_layers: int = 2
    num_content_layers: int = 4
    fine_order: str = field(default="row-first", metadata={"help": "row-first or region-first"})
    dropout: float = 0.1
    attention_dropout: float = field(default=0.1, metadata={"help": "0 lets the fast attention kernels work on a CPU"})
    attn_implementation: str | None = field(default=None, metadata={"help": "eager, sdpa, flash_attention_2, ..."})
    class_dropout: float = field(default=0.1, metadata={"help": "for classifier-free guidance; 0: none"})

    horizontal_flips: bool = field(
        default=True, metadata={"help": "mirror half of the images; a cache has its mirror images, or not"}
    )
    length_buckets: bool = field(default=True, metadata={"help": "with a cache: batches of streams of like length"})
    batch_size: int = field(default=32, metadata={"help": "per process and forward pass"})
    gradient_accumulation_steps: int = 1
    learning_rate: float = 5e-4
    weight_decay: float = field(default=0.01, metadata={"help": "on the weights of linear layers only"})
    warmup_steps: int = 200
    max_grad_norm: float = 1.0
    max_steps: int = 4000
    gradient_checkpointing: bool = field(default=False, metadata={"help": "less memory, more time"})
    compile: bool = field(default=False, metadata={"help": "torch.compile"})
    seed: int = 0

    log_every: int = 20
    save_every: int = 500
    keep_checkpoints: int = 2
    sample_every: int = field(default=500, metadata={"help": "held-out loss and sample pictures"})
    resume: str = field(default="auto", metadata={"help": "auto, never, or a checkpoint's folder"})
    report_to: str | None = field(default=None, metadata={"help": "tensorboard, trackio or any accelerate tracker"})
    push_to_hub: str | None = field(default=None, metadata={"help": "repository for the finished model"})


def main():
    args = HfArgumentParser(Arguments).parse_args_into_dataclasses()[0]
    output_dir = Path(args.output_dir)
    vae = DQVAEModel.from_pretrained(args.vae)  # later, under FSDP, only the first process would get its weights
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
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=3))],  # one process checks the images
    )
    check_writable(output_dir)
    if args.push_to_hub and accelerator.is_main_process:
        args.push_to_hub = check_push(args.push_to_hub)  # with the user's name
    set_seed(args.seed)

    vae.to(accelerator.device).eval().requires_grad_(False)
    train_loader, test_loader, names, on_epoch = make_loaders(accelerator, vae, args)
    model = make_model(vae, names, args)
    config = model.config
    if args.attn_implementation is not None:
        model.set_attn_implementation(args.attn_implementation)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(parameter_groups(model, args.weight_decay), args.learning_rate, betas=(0.9, 0.95))
    scheduler = get_scheduler(
        "cosine", optimizer, num_warmup_steps=args.warmup_steps, num_training_steps=args.max_steps
    )
    train_loader = prepare_loader(accelerator, train_loader)
    model, optimizer, test_loader = accelerator.prepare(model, optimizer, test_loader)
    progress, best = Progress(), BestLoss()
    accelerator.register_for_checkpointing(progress, scheduler, best)
    set_seed(args.seed, device_specific=True)
    resume(accelerator, output_dir, args.resume)
    check_max_steps(args.max_steps, progress.step, output_dir)
    if not (output_dir / "model").exists():  # the checkpoint may be another run's
        best.value = math.inf
    set_learning_rate(scheduler, args.learning_rate)
    accelerator.init_trackers("dqtransformer", config={k: str(v) for k, v in vars(args).items()})
    log = RunLog(output_dir / "log.jsonl", progress.step) if accelerator.is_main_process else None
    accelerator.print(f"{args.max_steps} steps, starting at step {progress.step}")

    finite = FiniteCheck(progress.step)
    images_per_step = args.batch_size * args.gradient_accumulation_steps * accelerator.num_processes
    bar = progress_bar(args.max_steps, images_per_step, progress.step, disable=not accelerator.is_main_process)
    with StopSignal() as stop:
        for batch in batches(train_loader, progress, accelerator, on_epoch, args.max_steps):
            model.train()
            codes, grain_map, labels = codes_of(vae, batch)
            with accelerator.accumulate(model):
                losses = whole_batch_losses(accelerator, model(codes, grain_map, labels if names else None), config)
                terms = {name: value.detach() for name, value in losses.items()}
                accelerator.backward(losses["loss"])
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
                    terms["grad_norm"] = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # under FSDP
                optimizer.step()
                optimizer.zero_grad()
            finite.add(**{name: terms[name] for name in terms if accelerator.scaler is None or name != "grad_norm"})
            if not accelerator.sync_gradients:
                continue

            scheduler.step()
            progress.step += 1
            bar.update(images_per_step)
            step, last = progress.step, progress.step == args.max_steps
            if step % args.log_every == 0 or last:
                finite.raise_if_bad(step, output_dir)
                values = accelerator.reduce(torch.stack([value.float() for value in terms.values()]), "mean")
                rows = dict(zip(terms, values.tolist())) | {"lr": scheduler.get_last_lr()[0]}
                record(accelerator, log, step, rows)
                bar.set_postfix({name: f"{rows[name]:.4g}" for name in LOSSES[:3]})
            if step % args.sample_every == 0 or last:
                finite.raise_if_bad(step, output_dir)
                metrics = evaluate(accelerator, vae, model, test_loader, config)
                record(accelerator, log, step, metrics)
                accelerator.print(f"step {step}: {json.dumps(metrics)}")
                whole, improved = whole_model(accelerator, model), best.improve(metrics["test_loss"])
                if accelerator.is_main_process:
                    joint = DQForImageGeneration.from_models(vae, whole)
                    draw_samples(joint, names, args.seed, output_dir / f"samples-{step:06d}.png")
                    if improved:
                        save_model(joint, output_dir / "model")
            stopping = stop.requested(accelerator)
            if step % args.save_every == 0 or last or stopping:
                finite.raise_if_bad(step, output_dir)
                save_checkpoint(accelerator, output_dir, step, args.keep_checkpoints)
            if stopping:
                accelerator.print(f"stopped at step {step}; the same command goes on from there")
                accelerator.end_training()
                return
    if accelerator.is_main_process:
        describe_and_push(accelerator, args, log.read(), progress, len(names), vae)
    accelerator.wait_for_everyone()
    accelerator.end_training()


LOSSES = ("loss", "content_loss", "position_loss", "coarse_position_loss", "fine_position_loss")


def make_loaders(accelerator, vae, args):
    """Batches for training and for measuring, class names, and what is to be called when an epoch begins."""
    label_column = None if args.label_column in (None, "none") else args.label_column
    sampler, on_epoch = None, None
    if args.codes is not None:
        if args.streaming:
            raise ValueError(
                "--streaming reads images as they come, but --codes has their codes; leave one of them out"
            )
        train_set, test_set = (load_codes(args.codes, split, vae) for split in (args.train_split, args.test_split))
        test_set = first_rows(test_set, args.max_test_images)
        names = class_names(train_set, "label") if label_column else []
        train_collate = test_collate = CodeCollator(vae.config.grid_sizes)
        if args.length_buckets:
            rows_per_step = args.batch_size * accelerator.num_processes
            sampler = LengthBucketSampler(train_set["num_codes"][:], rows_per_step, args.seed)
    else:
        height, width = vae.config.image_height_width
        processor = DQImageProcessor(size={"height": height, "width": width})
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
        names = class_names(train_set, label_column) if label_column else []
        flip_seed = args.seed if args.horizontal_flips else None
        train_collate = ImageCollator(processor, args.image_column, label_column, flip_seed)
        test_collate = ImageCollator(processor, args.image_column, label_column)
        on_epoch = train_collate.set_epoch
    train_loader = DataLoader(
        train_set,
        args.batch_size,
        shuffle=None if sampler is not None or args.streaming else True,
        sampler=sampler,
        drop_last=True,
        collate_fn=train_collate,
        num_workers=args.num_workers,
        worker_init_fn=ignore_sigterm,
    )
    return train_loader, DataLoader(test_set, args.batch_size, collate_fn=test_collate), names, on_epoch


SIZES = ("hidden_size", "num_attention_heads", "num_position_layers", "num_content_layers", "fine_order")
SIZES += ("class_dropout",)


def make_model(vae, names, args):
    """The generator for the codes of this tokenizer: new, or the one to go on from."""
    fitting = {
        "grid_sizes": vae.config.grid_sizes,
        "codebook_size": vae.config.codebook_size,
        "num_classes": len(names),
        "id2label": dict(enumerate(names)),
    }
    dropout = {"embedding_dropout": args.dropout, "residual_dropout": args.dropout}
    dropout["attention_dropout"] = args.attention_dropout
    if args.start_from is None:
        sizes = {name: getattr(args, name) for name in SIZES} | ({} if names else {"class_dropout": 0.0})
        return DQTransformerForImageGeneration(DQTransformerConfig(**fitting, **sizes, **dropout))
    model = DQTransformerForImageGeneration.from_pretrained(args.start_from, **dropout)
    defaults = Arguments(output_dir=args.output_dir)
    for name, value in fitting.items():
        if getattr(model.config, name) != value:
            raise ValueError(
                f"--start_from must have {name} {value}, as the tokenizer and the images have; "
                f"got {getattr(model.config, name)}; train a new generator for them"
            )
    for name in SIZES:
        value = getattr(model.config, name)
        if getattr(args, name) not in (value, getattr(defaults, name)):
            raise ValueError(
                f"--{name} is {value} in the model of --start_from, got {getattr(args, name)}; leave it out"
            )
    return model


@torch.no_grad()
def codes_of(vae, batch):
    """Codes and grain maps of a batch, from the cache or encoded now, and class labels if there are any."""
    encoded = vae.encode(batch["pixel_values"]) if "pixel_values" in batch else None
    codes, grain_map = (batch[name] if encoded is None else encoded[name] for name in ("codes", "grain_map"))
    return codes, grain_map, batch.get("class_labels")


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


def record(accelerator, log, step, values):
    """To the run's log and to the tracker."""
    accelerator.log(values, step)
    if log is not None:
        log.write(step, values)


def target_masks(stream, num_granularities):
    """Which elements are targets (1 + K, B, L - 1): of the content loss, and of each granularity's position loss."""
    granularities = stream.granularities[:, 1:]
    inside = torch.arange(granularities.shape[1], device=granularities.device) < stream.lengths[:, None] - 1
    return torch.stack([inside, *(inside & (granularities == i) for i in range(num_granularities))])


def whole_batch_losses(accelerator, output, config):
    """Losses by name whose means over the processes are means over all processes' targets.

    Streams differ in length: the mean of the processes' own means would weigh a target by where it happened to be.
    """
    counts = target_masks(output.stream, len(config.grid_sizes)).sum((1, 2)).float()
    weights = counts / accelerator.reduce(counts, "mean")
    return named_losses(output.content_loss * weights[0], output.position_losses * weights[1:], config)


def named_losses(content_loss, position_losses, config):
    """The losses of `LOSSES`, as the model combines them."""
    position_loss = position_losses.mean()
    loss = config.content_loss_weight * content_loss + config.position_loss_weight * position_loss
    return dict(zip(LOSSES, (loss, content_loss, position_loss, position_losses[0], position_losses[-1])))


@torch.no_grad()
def evaluate(accelerator, vae, model, loader, config):
    """Held-out losses in nats, means over all targets, whatever the batches."""
    model.eval()
    rows = []
    for batch in loader:
        codes, grain_map, labels = codes_of(vae, batch)
        output = model(codes, grain_map, labels if config.num_classes else None)
        masks = target_masks(output.stream, len(config.grid_sizes))
        contents, positions = (
            torch.nn.functional.cross_entropy(logits.float().transpose(1, 2), targets[:, 1:], reduction="none")
            for logits, targets in (
                (output.content_logits, output.stream.contents),
                (output.position_logits, output.stream.positions),
            )
        )
        losses = torch.stack([contents, *[positions] * len(config.grid_sizes)]) * masks
        rows.append(accelerator.gather_for_metrics(torch.stack([losses.sum(2), masks.sum(2)]).permute(2, 0, 1)))
    sums, counts = torch.cat(rows).cpu().double().sum(0)  # (1 + K) each
    losses = named_losses(sums[0] / counts[0], sums[1:] / counts[1:], config)
    return {f"test_{name}": losses[name].item() for name in LOSSES[:3]}


def whole_model(accelerator, model):
    """The generator with all of its weights; where FSDP has shared them out, a copy on the main process, else None."""
    if accelerator.distributed_type != DistributedType.FSDP:
        return accelerator.unwrap_model(model, keep_torch_compile=False)
    weights = accelerator.get_state_dict(model)
    if not accelerator.is_main_process:
        return None
    copy = DQTransformerForImageGeneration(model.config)
    copy.load_state_dict(weights)
    return copy.to(accelerator.device)


def draw_samples(joint, names, seed, picture):
    """Eight images of each class (at most ten classes), one row a class, or 16 of an unconditional model."""
    labels = [label for label in range(min(len(names), 10)) for _ in range(8)] or None
    generator = torch.Generator().manual_seed(seed)
    generated = joint.generate(labels, num_images=None if labels else 16, generator=generator)
    images = DQImageProcessor().post_process(generated.pixel_values)
    with writing(picture, picture.parent):
        image_grid(images, columns=8).save(picture)


def save_model(joint, folder):
    """Both models, beside the folder first, so that what was there is lost only once the new one is in its place."""
    partial = folder.with_name(f"partial-{folder.name}")
    with writing(folder, folder.parent):
        shutil.rmtree(partial, ignore_errors=True)
        joint.save_pretrained(partial)
        put_in_place(partial, folder)


def describe_and_push(accelerator, args, rows, progress, num_classes, vae):
    """Put the card of what was measured into the model's folder, and push it if asked to."""
    folder = Path(args.output_dir) / "model"
    measured = min((row for row in rows if "test_loss" in row), key=lambda row: row["test_loss"])  # of the model kept
    shutil.copy(Path(args.output_dir) / f"samples-{measured['step']:06d}.png", folder / "samples.png")
    trained = next(row for row in reversed(rows) if "loss" in row)
    write_model_card(
        folder,
        DQConfig.from_pretrained(folder),
        {"vae": vae},
        title=args.push_to_hub or Path(args.output_dir).name,
        repository=args.push_to_hub,
        dataset=args.data if args.codes is None else read_index(args.codes)["data"],
        test_split=args.test_split,
        metrics={name: measured[name] for name in ("test_loss", "test_content_loss", "test_position_loss")},
        losses={name: trained[name] for name in LOSSES[:3]},
        data={
            "classes": num_classes or None,
            "horizontal flips": args.horizontal_flips if args.codes is None else None,
        },
        training={
            "tokenizer": args.vae,
            "steps": progress.step,
            "step of the smallest held-out loss, which is this model": measured["step"],
            "images seen": progress.images,
            "batch, all processes": args.batch_size * args.gradient_accumulation_steps * accelerator.num_processes,
            "learning rate, highest": args.learning_rate,
            "started from": args.start_from,
        }
        | machine_facts(accelerator),
        command=command_line(),
    )
    if args.push_to_hub:
        print(push_folder(folder, args.push_to_hub, commit_message=f"Train for {progress.step} steps"))


if __name__ == "__main__":
    main()
