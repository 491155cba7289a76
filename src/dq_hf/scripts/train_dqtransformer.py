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

import logging
import math
from itertools import chain

import torch
from accelerate import DistributedType
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel

from dq_hf import (
    DQConfig,
    DQImageProcessor,
    DQTransformerConfig,
    DQTransformerForImageGeneration,
)
from dq_hf.data.captions import all_captions, captions_of, with_wrong_captions
from dq_hf.data.codes import CAPTIONS, CodeCollator, LengthBucketSampler, load_codes, read_index
from dq_hf.data.fingerprint import codes_fingerprint
from dq_hf.data.images import ImageCollator, find_labels, first_rows
from dq_hf.data.streams import prepare_loader
from dq_hf.loading import load_generator, load_tokenizer
from dq_hf.pictures import image_grid
from dq_hf.scripts.arguments import GENERATOR_SIZES, GeneratorArguments
from dq_hf.training.checkpoints import writing
from dq_hf.training.generator import (
    BestLoss,
    codes_of,
    compile_blocks,
    evaluate,
    joint_model,
    parameter_groups,
    text_of,
    whole_model,
)
from dq_hf.training.losses import LOSSES, whole_batch_losses
from dq_hf.training.options import run_script, settle_sizes
from dq_hf.training.progress import set_learning_rate
from dq_hf.training.run import Run, averaged_weights
from dq_hf.training.text import WRONG_CAPTIONS, CaptionBatches, make_text

logger = logging.getLogger(__name__)
NUM_PROMPTS = 16  # of a picture of samples


def main(arguments=None):
    run_script(train, GeneratorArguments, __name__, arguments)


def train(args):
    vae = load_tokenizer(args.vae)  # later, under FSDP, only the first process would get its weights
    run = Run(args, "dqtransformer")
    accelerator = run.accelerator
    if accelerator.distributed_type == DistributedType.FSDP and args.ema_decay > 0:
        raise ValueError(
            f"--ema_decay must be 0 under FSDP, whose checkpoints would hold the averages of one process's shards only; got "
            f"{args.ema_decay}; leave it out, or launch without FSDP"
        )
    vae.to(accelerator.device).eval().requires_grad_(False)
    start, label_column = load_start(args), args.label_column or "label"
    train_set, test_sets, names, captions = load_sets(run, vae)
    text = make_text(args, *captions, accelerator.device) if captions is not None else None
    train_loader, train_collate, test_loaders = make_loaders(run, vae, text, train_set, test_sets)
    model = make_model(vae, names, text, start, args)
    config = model.config
    if args.attn_implementation is not None:
        model.set_attn_implementation(args.attn_implementation)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    if text is not None:
        model = text.join(model)
    if args.compile:
        compile_blocks(model)
    optimizer = torch.optim.AdamW(parameter_groups(model, args.weight_decay), args.learning_rate, betas=(0.9, 0.95))
    scheduler = get_scheduler(
        "cosine", optimizer, num_warmup_steps=args.warmup_steps, num_training_steps=args.max_steps
    )
    train_loader = prepare_loader(accelerator, train_loader)
    model, optimizer = accelerator.prepare(model, optimizer)
    average = None
    if args.ema_decay > 0:
        average = EMAModel(model.parameters(), decay=args.ema_decay, use_ema_warmup=True)
    held_out = args.test_split[0]
    best = BestLoss()
    facts = {"vae": codes_fingerprint(vae)}  # another tokenizer with the same codes will do
    if names:
        facts["label_column"] = f"{label_column}, with the classes {', '.join(names)}"
    if text is not None:
        facts["text_encoder"] = f"{args.text_encoder}, whose vocabulary is {text.fingerprint}"
    run.resume(scheduler, best, average, **facts)
    if average is not None:
        average.to(accelerator.device)  # checkpoints are read to the CPU
    set_learning_rate(scheduler, args.learning_rate)
    if run.measured_on not in (None, run.held_out):
        logger.warning("the held-out images are not those of before: the smallest loss is looked for anew")
        best.value = math.inf
    if not (run.dir / "model").exists():  # the checkpoint may be another run's
        if run.step == args.max_steps:
            raise ValueError(f"{run.dir / 'model'} is gone: put it back, or give more --max_steps to make another")
        best.value = math.inf

    for batch in run.batches(train_loader, train_collate.set_epoch):
        model.train()
        images, conditions = codes_of(vae, batch, config), text_of(text, batch)
        with accelerator.accumulate(model):
            losses = whole_batch_losses(accelerator, model(**images, **conditions), config)
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
        if average is not None:
            average.step(model.parameters())
        run.count_step()
        if run.due(args.log_every):
            run.record(run.averaged(terms) | {"lr": scheduler.get_last_lr()[0]}, show=LOSSES[:3])
        if run.due(args.sample_every):
            with averaged_weights(model, average), torch.compiler.set_stance("force_eager"):
                metrics = {
                    split: evaluate(accelerator, vae, model, loader, config, text)
                    for split, loader in test_loaders.items()
                }
                run.report(metrics)
                whole = whole_model(accelerator, model)
                improved = best.improve(metrics[held_out]["test_loss"], run.step)
                if accelerator.is_main_process:
                    joint = joint_model(vae, whole, text)
                    draw_samples(joint, text, names, test_sets[held_out], args, run.picture())
                    if improved:
                        run.save_model(joint)
        run.save_when_due()

    if accelerator.is_main_process and not run.stopped:
        sources = {"vae": vae} | ({} if start is None else {"transformer": start})
        publish(run, len(names), text, test_sets, best.step, sources)
    run.end()


def load_sets(run, vae):
    """Rows for training, {split: rows} for measuring, class names, and, if there is to be text, the distinct captions:
    those of training, and all.
    """
    args = run.options
    if args.codes is None:
        train_set, test_sets = run.load_images()
    else:
        train_set = load_codes(args.codes, args.train_split, vae)
        test_sets = {
            split: first_rows(load_codes(args.codes, split, vae), args.max_test_images) for split in args.test_split
        }
    splits = [(args.train_split, train_set), *test_sets.items()]
    args.label_column, names, (train_set, *rows_to_measure) = find_labels(splits, args.label_column)
    test_sets = dict(zip(test_sets, rows_to_measure))
    if args.caption_column is None:
        if args.codes is not None and CAPTIONS in train_set.column_names:
            logger.warning(
                "--codes has captions that are not used: for a model with text give --caption_column captions"
            )
        return train_set, test_sets, names, None
    if args.codes is not None and CAPTIONS not in train_set.column_names:
        raise ValueError(f"--codes {args.codes} has no captions; encode the images again with --caption_column")
    train_captions, *test_captions = (
        all_captions(rows, args.caption_column, args.max_uncaptioned_share)
        for rows in (train_set, *test_sets.values())
    )
    captions = list(dict.fromkeys(chain(train_captions, *test_captions)))
    test_sets = {
        split: with_wrong_captions(rows, args.caption_column, WRONG_CAPTIONS) for split, rows in test_sets.items()
    }
    return train_set, test_sets, names, (train_captions, captions)


def make_loaders(run, vae, text, train_set, test_sets):
    """Batches for training, what makes them, and {split: batches for measuring}."""
    args = run.options
    sampler, more, test_more = None, None, None
    if text is not None:
        more = CaptionBatches(text, args.caption_column, args.seed)
        test_more = CaptionBatches(text, args.caption_column, args.seed, WRONG_CAPTIONS)
    if args.codes is not None:
        collate = CodeCollator(vae.config.grid_sizes, more)
        test_collate = CodeCollator(vae.config.grid_sizes, test_more)
        if args.length_buckets:
            rows_per_step = args.batch_size * run.accelerator.num_processes
            sampler = LengthBucketSampler(train_set["num_codes"][:], rows_per_step, args.seed)
    else:
        columns = DQImageProcessor.for_model(vae.config), args.image_column, args.label_column
        collate = ImageCollator(*columns, run.augmentation(), more)
        test_collate = ImageCollator(*columns, more=test_more)
    return run.train_loader(train_set, collate, sampler), collate, run.test_loaders(test_sets, test_collate)


def load_start(args):
    """The generator to go on from, in float32, or None; sizes that were left out are its own, or those of a new one."""
    if args.start_from is None:
        settle_sizes(args, GENERATOR_SIZES)
        return None
    model = load_generator(args.start_from, dtype=torch.float32, **dropout(args))
    if (model.config.text_length is None) != (args.caption_column is None):
        with_it, without = ("with", "leave out") if args.caption_column else ("without", "give")
        raise ValueError(
            f"--start_from must be a model {with_it} text, as the captions ask; {without} --caption_column"
        )
    settle_sizes(args, GENERATOR_SIZES, {name: getattr(model.config, name) for name in GENERATOR_SIZES})
    return model


def dropout(args):
    """What the configuration says of it: an option of the run, also where the sizes are those of --start_from."""
    rest = args.dropout
    return {"embedding_dropout": rest, "residual_dropout": rest, "attention_dropout": args.attention_dropout}


def make_model(vae, names, text, model, args):
    """The generator for the codes of this tokenizer: a new one, unless there is one to go on from."""
    fitting = {
        "grid_sizes": vae.config.grid_sizes,
        "codebook_size": vae.config.codebook_size,
        "num_classes": len(names),
        "id2label": dict(enumerate(names)),
        "text_hidden_size": None if text is None else text.encoder.config.hidden_size,
    }
    if model is None:
        sizes = {name: getattr(args, name) for name in GENERATOR_SIZES}
        sizes |= {} if names else {"class_dropout": 0.0}
        sizes |= {} if text is not None else {"text_length": None}
        return DQTransformerForImageGeneration(DQTransformerConfig(**fitting, **sizes, **dropout(args)))
    for name, value in fitting.items():
        if getattr(model.config, name) != value:
            raise ValueError(
                f"--start_from must have {name} {value}, as the tokenizer, the images and the text encoder have; got "
                f"{getattr(model.config, name)}; train a new generator, or give those that it was trained with"
            )
    return model


def prompts_of(test_set, args):
    """Some of the rows to measure on, and the first caption of each."""
    rows = list(first_rows(test_set, NUM_PROMPTS))
    return rows, [next(iter(captions_of(row[args.caption_column])), "") for row in rows]


def draw_samples(joint, text, names, test_set, args, picture):
    """Eight images of each class (at most ten classes), one row a class; of a model with text, of `prompts_of`; else 16."""
    generator, options = torch.Generator().manual_seed(args.seed), {}
    labels = [label for label in range(min(len(names), 10)) for _ in range(8)] or None
    if text is not None:
        rows, prompts = prompts_of(test_set, args)
        labels = [int(row[args.label_column]) for row in rows] if names else None
        options = {"prompt": prompts}
    num_images = 16 if labels is None and text is None else None
    generated = joint.generate(labels, num_images=num_images, generator=generator, **options)
    images = DQImageProcessor().post_process(generated.pixel_values)
    with writing(picture, picture.parent):
        image_grid(images, columns=8).save(picture)


def publish(run, num_classes, text, test_sets, step, sources):
    """Put the card of what was measured at the kept model's step into its folder, and push it if asked to."""
    args, figures = run.options, [f"test_{name}" for name in LOSSES[:3]]
    prompts = "; ".join(prompts_of(test_sets[args.test_split[0]], args)[1]) if text is not None else None
    rows = (row for row in run.log.read() if "test_loss" in row and row["step"] == step)
    measured = min(rows, key=lambda row: row["test_loss"], default={"step": step})  # the user may have deleted the log
    run.publish(
        DQConfig.from_pretrained(run.dir / "model"),
        measured=measured,  # of the model that was kept
        metrics=[*figures, "test_text_worth"] if text is not None else figures,
        losses=LOSSES[:3],
        picture="samples.png",
        dataset=args.data if args.codes is None else read_index(args.codes)["data"],
        data={
            "classes": num_classes or None,
            "horizontal flips": args.horizontal_flips if args.codes is None else None,
            "captions of the samples": prompts,
        },
        training={
            "tokenizer": args.vae,
            "text encoder": args.text_encoder,
            "step of the smallest held-out loss, which is this model": measured["step"],
        },
        sources=sources,
    )


if __name__ == "__main__":
    main()
