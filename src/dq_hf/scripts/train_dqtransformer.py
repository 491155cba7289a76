r"""Train DQ-Transformer, which generates variable-length codes from coarse to fine (stage 2), on a trained DQ-VAE's codes.

CPU smoke run on the embedded tokenizer, a minute:

    accelerate launch --cpu examples/train_dqtransformer.py --output_dir runs/smoke2 --max_steps 20 --batch_size 8 \
        --hidden_size 64 --num_position_layers 1 --num_content_layers 1 --max_test_images 50

One GPU, the paper's sizes, one's own tokenizer; images are encoded once, into a cache of codes:

    accelerate launch examples/encode_dataset.py --data path/to/images --vae runs/vae/model --output_dir runs/codes
    accelerate launch --config_file examples/configs/one_gpu.yaml examples/train_dqtransformer.py --codes runs/codes \
        --vae runs/vae/model --output_dir runs/transformer --hidden_size 1024 --num_attention_heads 8 \
        --num_position_layers 6 --num_content_layers 18 --max_steps 300000

All GPUs of one machine: `--config_file examples/configs/one_node.yaml`, or `one_node_fsdp.yaml` to shard weights and
optimiser; of several machines: `several_nodes.yaml`. Where only the package is installed, `-m
dq_hf.scripts.train_dqtransformer` stands for `examples/train_dqtransformer.py`. A run that was stopped or killed goes on
where its last checkpoint was when the same command is given again. `<output_dir>/model` holds tokenizer and generator with
the smallest held-out loss so far, with a model card at the end; `DQPipeline` and `pipeline("dq-generation")` load it.
`docs/training.md` says what the logged curves look like when all is well.
"""

import math
from dataclasses import dataclass

import torch
from accelerate import DistributedType
from diffusers.optimization import get_scheduler
from torch.utils.data import DataLoader

from dq_hf import (
    DEFAULT_MODEL,
    DQConfig,
    DQForImageGeneration,
    DQImageProcessor,
    DQTransformerConfig,
    DQTransformerForImageGeneration,
)
from dq_hf.data.codes import CodeCollator, LengthBucketSampler, load_codes, read_index
from dq_hf.data.fingerprint import codes_fingerprint
from dq_hf.data.images import ImageCollator, class_names, first_rows
from dq_hf.data.streams import prepare_loader
from dq_hf.loading import load_tokenizer
from dq_hf.pictures import image_grid
from dq_hf.training.checkpoints import writing
from dq_hf.training.losses import LOSSES, named_losses, summed_losses, whole_batch_losses
from dq_hf.training.options import (
    RunOptions,
    option,
    require,
    require_one_of,
    require_share,
    run_script,
    settle_sizes,
    size_option,
)
from dq_hf.training.progress import set_learning_rate
from dq_hf.training.run import Run

SIZES = {  # of a new model
    "hidden_size": 256,
    "num_attention_heads": 8,
    "num_position_layers": 2,
    "num_content_layers": 4,
    "fine_order": "row-first",
    "class_dropout": 0.1,
}


@dataclass(kw_only=True)
class Arguments(RunOptions):
    """Options of `RunOptions`, and those of the generator."""

    vae: str = option(
        f"{DEFAULT_MODEL}/vae", "Tokenizer: folder or Hub id of a DQVAEModel, or of both models together."
    )
    codes: str | None = option(
        None, "Code cache, made by encode_dataset.py; without one, the images are encoded at every step."
    )
    label_column: str | None = option("label", "Column with the class labels; none means a model without classes.")
    length_buckets: bool = option(True, "With --codes: make batches of streams of similar length.")

    start_from: str | None = option(
        None, "Folder or Hub id of a DQTransformerForImageGeneration to go on from; its sizes stay."
    )
    hidden_size: int | None = size_option(SIZES["hidden_size"], "Width of both transformers.")
    num_attention_heads: int | None = size_option(SIZES["num_attention_heads"], "Attention heads of each layer.")
    num_position_layers: int | None = size_option(SIZES["num_position_layers"], "Layers of the Position-Transformer.")
    num_content_layers: int | None = size_option(SIZES["num_content_layers"], "Layers of the Content-Transformer.")
    fine_order: str | None = size_option(
        SIZES["fine_order"], "Order of the codes of a granularity: row-first, or region-first."
    )
    class_dropout: float | None = size_option(
        SIZES["class_dropout"],
        "Share of the images whose class is hidden, for classifier-free guidance; 0 means none.",
    )
    dropout: float = option(0.1, "Dropout of embeddings and residuals.")
    attention_dropout: float = option(0.1, "Dropout of attention; 0 lets the fast kernels work on a CPU.")
    attn_implementation: str | None = option(
        None, "Attention of transformers, such as eager, sdpa, flash_attention_2. Default: what transformers chooses."
    )

    horizontal_flips: bool = option(
        True, "Mirror half of the training images; with --codes the cache has its mirror images, or not."
    )
    weight_decay: float = option(0.01, "Weight decay, on the weights of linear layers only.")
    warmup_steps: int = option(200, "Steps in which the learning rate rises to its highest.")

    def __post_init__(self):
        super().__post_init__()
        require(self, 1, "hidden_size", "num_attention_heads", "num_position_layers", "num_content_layers")
        require(self, 0, "weight_decay")
        require_share(self, "class_dropout", "dropout", "attention_dropout")
        require_one_of(self, "fine_order", ("row-first", "region-first"))
        if self.label_column == "none":
            self.label_column = None
        if self.codes is not None and self.streaming:
            raise ValueError(
                "--streaming reads images as they come, but --codes has their codes; leave one of them out"
            )


def main(arguments=None):
    run_script(train, Arguments, __doc__, arguments)


def train(args):
    vae = load_tokenizer(args.vae)  # later, under FSDP, only the first process would get its weights
    run = Run(args, "dqtransformer")
    accelerator = run.accelerator
    vae.to(accelerator.device).eval().requires_grad_(False)
    train_loader, test_loader, names, on_epoch = make_loaders(run, vae)
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
    best = BestLoss()
    run.resume(scheduler, best, vae=codes_fingerprint(vae))  # another tokenizer with the same codes will do
    set_learning_rate(scheduler, args.learning_rate)
    if not (run.dir / "model").exists():  # the checkpoint may be another run's
        best.value = math.inf

    for batch in run.batches(train_loader, on_epoch):
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
        run.watch(terms, without_scaling={"grad_norm"})
        if not accelerator.sync_gradients:
            continue

        scheduler.step()
        run.count_step()
        if run.due(args.log_every):
            run.record(run.averaged(terms) | {"lr": scheduler.get_last_lr()[0]}, show=LOSSES[:3])
        if run.due(args.sample_every):
            metrics = evaluate(accelerator, vae, model, test_loader, config)
            run.report(metrics)
            whole, improved = whole_model(accelerator, model), best.improve(metrics["test_loss"])
            if accelerator.is_main_process:
                joint = DQForImageGeneration.from_models(vae, whole)
                draw_samples(joint, names, args.seed, run.picture())
                if improved:
                    run.save_model(joint)
        run.save_when_due()

    if accelerator.is_main_process and not run.stopped:
        publish(run, len(names), vae)
    run.end()


def make_loaders(run, vae):
    """Batches for training and for measuring, class names, and what is to be called when an epoch begins."""
    args = run.options
    sampler, on_epoch = None, None
    if args.codes is not None:
        train_set, test_set = (load_codes(args.codes, split, vae) for split in (args.train_split, args.test_split))
        test_set = first_rows(test_set, args.max_test_images)
        names = class_names(train_set, "label") if args.label_column else []
        train_collate = test_collate = CodeCollator(vae.config.grid_sizes)
        if args.length_buckets:
            rows_per_step = args.batch_size * run.accelerator.num_processes
            sampler = LengthBucketSampler(train_set["num_codes"][:], rows_per_step, args.seed)
    else:
        processor = DQImageProcessor.for_model(vae.config)
        train_set, test_set = run.load_images()
        names = class_names(train_set, args.label_column) if args.label_column else []
        flip_seed = args.seed if args.horizontal_flips else None
        train_collate = ImageCollator(processor, args.image_column, args.label_column, flip_seed)
        test_collate = ImageCollator(processor, args.image_column, args.label_column)
        on_epoch = train_collate.set_epoch
    test_loader = DataLoader(test_set, args.batch_size, collate_fn=test_collate)
    return run.train_loader(train_set, train_collate, sampler), test_loader, names, on_epoch


def make_model(vae, names, args):
    """The generator for the codes of this tokenizer: new, or the one to go on from, in float32."""
    fitting = {
        "grid_sizes": vae.config.grid_sizes,
        "codebook_size": vae.config.codebook_size,
        "num_classes": len(names),
        "id2label": dict(enumerate(names)),
    }
    dropout = {"embedding_dropout": args.dropout, "residual_dropout": args.dropout}
    dropout["attention_dropout"] = args.attention_dropout
    if args.start_from is None:
        settle_sizes(args, SIZES)
        sizes = {name: getattr(args, name) for name in SIZES} | ({} if names else {"class_dropout": 0.0})
        return DQTransformerForImageGeneration(DQTransformerConfig(**fitting, **sizes, **dropout))
    model = DQTransformerForImageGeneration.from_pretrained(args.start_from, dtype=torch.float32, **dropout)
    for name, value in fitting.items():
        if getattr(model.config, name) != value:
            raise ValueError(
                f"--start_from must have {name} {value}, as the tokenizer and the images have; "
                f"got {getattr(model.config, name)}; train a new generator for them"
            )
    settle_sizes(args, SIZES, {name: getattr(model.config, name) for name in SIZES})
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


@torch.no_grad()
def evaluate(accelerator, vae, model, loader, config):
    """Held-out losses in nats, means over all targets, whatever the batches."""
    model.eval()
    rows = []
    for batch in loader:
        codes, grain_map, labels = codes_of(vae, batch)
        output = model(codes, grain_map, labels if config.num_classes else None)
        rows.append(accelerator.gather_for_metrics(summed_losses(output, config)))
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


def publish(run, num_classes, vae):
    """Put the card of what was measured into the model's folder, and push it if asked to."""
    args = run.options
    measured = min((row for row in run.log.read() if "test_loss" in row), key=lambda row: row["test_loss"])
    run.publish(
        DQConfig.from_pretrained(run.dir / "model"),
        measured=measured,  # of the model that was kept
        metrics=[f"test_{name}" for name in LOSSES[:3]],
        losses=LOSSES[:3],
        picture="samples.png",
        dataset=args.data if args.codes is None else read_index(args.codes)["data"],
        data={
            "classes": num_classes or None,
            "horizontal flips": args.horizontal_flips if args.codes is None else None,
        },
        training={
            "tokenizer": args.vae,
            "step of the smallest held-out loss, which is this model": measured["step"],
        },
        sources={"vae": vae},
    )


if __name__ == "__main__":
    main()
