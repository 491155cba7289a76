"""What a step of sampling costs beside other models of transformers, and what looking ahead gains.

    python benchmarks/sampling_steps.py                                # one CPU thread, some minutes
    python benchmarks/sampling_steps.py --hidden_size 1024 --num_position_layers 6 --num_content_layers 18 --steps 8
    python benchmarks/sampling_steps.py --output docs/performance.md   # puts the tables of this size into that file

The first table has a step, one element of every image, of a DQ-Transformer with random weights, of the same when its
modules must be called (as with adapters), of `GPT2LMHeadModel` and `LlamaForCausalLM` with as many parameters, sampled by
their own `generate`, and of nothing but our matrix products. The second has a pass of several elements in its fixed finest part, and what a code costs if as many come out of a pass as
from the embedded model. All are timed in turn, round after round, and the fastest rounds count.
"""

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import transformers
from report import CLOCKS, describe_device, option, publish, table
from sampling import Sizes, make_model
from transformers import GPT2Config, GPT2LMHeadModel, HfArgumentParser, LlamaConfig, LlamaForCausalLM

import dq_hf
from dq_hf.modeling.fused_dq import fused

NUM_COARSE = 2  # passes before the finest part of our streams: the end of the coarse one, and a start


@dataclass
class Arguments(Sizes):
    lookahead: list[int] = option([1, 4, 8, 16, 32], "elements a pass")
    steps: int = option(64, "steps of a round, from the beginning of the streams")
    rounds: int = option(3, "times that everything is timed")
    model: str | None = option(None, "model of which codes a pass are counted; default: ours")
    prompts: str = option("examples/data/prompts.txt", "text file with a prompt a line, for a model with text")
    num_images: int = option(9, "images of which they are counted")
    device = "cpu"


@torch.no_grad()
def main(args):
    torch.set_num_threads(args.threads)
    num_codes = 4 * math.ceil(args.steps / 4) * 2  # so that no stream ends
    ours = make_model(args, num_codes)
    others = [gpt2(ours), llama(ours)]
    step_rows, pass_rows = [], []
    for batch in args.batch_sizes:
        calls = {
            "ours": partial(sample, ours, batch, args.steps),
            "by modules": partial(sample_by_modules, ours, batch, args.steps),
            "GPT-2": partial(generate, others[0], batch, args.steps),
            "Llama": partial(generate, others[1], batch, args.steps),
            "products": partial(multiply, products(ours), batch, args.steps),
        }
        step_rows.append((batch, *fastest(calls, args).values()))
    counted = {n: codes_a_pass(args, n) for n in args.lookahead}
    for batch in args.batch_sizes:
        passes = {n: max(4, args.steps // n) for n in args.lookahead}
        calls = {n: partial(sample, ours, batch, NUM_COARSE + passes[n], n) for n in args.lookahead}
        coarse, *all_passes = fastest({0: partial(sample, ours, batch, NUM_COARSE)} | calls, args).values()
        for n, milliseconds in zip(args.lookahead, all_passes):
            pass_rows.append((batch, n, (milliseconds - coarse) * args.steps / passes[n], counted[n]))
    report = make_report(args, ours, others, step_rows, pass_rows)
    publish(report, args.title("sampling_steps.py"), args.output)


def fastest(calls, args):
    """{name: milliseconds of a step} of functions that do `args.steps` steps each, timed in turn."""
    now, best = CLOCKS[args.clock], dict.fromkeys(calls, math.inf)
    for _ in range(args.rounds):
        for name, call in calls.items():
            start = now()
            call()
            best[name] = min(best[name], 1000 * (now() - start) / args.steps)
    return best


def sample(model, batch, passes, lookahead=1):
    """Sample so many passes."""
    steps = model.generate_steps(num_images=batch, generator=torch.Generator().manual_seed(0), lookahead=lookahead)
    for _, _ in zip(range(passes), steps):
        pass


def sample_by_modules(model, batch, passes):
    """The same with a hook in each stack, which does nothing but be called."""
    stacks = model.position_transformer, model.content_transformer
    hooks = [stack.register_forward_pre_hook(lambda *_: None) for stack in stacks]
    sample(model, batch, passes)
    for hook in hooks:
        hook.remove()


def generate(model, batch, steps):
    """Sample so many tokens, the transformers way."""
    model.generate(torch.zeros(batch, 1, dtype=torch.long), do_sample=True, max_new_tokens=steps, min_new_tokens=steps)


def products(model):
    """Weights and biases of a step whose position is fixed; queries, keys and values are one product."""
    layers = [*model.position_transformer.layers, *model.content_transformer.layers]
    return [
        *(each for layer in layers for each in fused(layer).products),
        (model.content_head.projection.weight, None),
    ]


def multiply(products, batch, steps):
    """The matrix products of so many steps, and nothing else."""
    inputs = {weight.shape[1]: torch.randn(batch, weight.shape[1]) for weight, _ in products}
    for _ in range(steps):
        for weight, bias in products:
            torch.nn.functional.linear(inputs[weight.shape[1]], weight, bias)


def gpt2(ours):
    """A GPT-2 of the same width and depth, whose blocks have the same sizes."""
    config = ours.config
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=config.content_vocab_size,
            n_positions=config.longest_stream,
            n_embd=config.hidden_size,
            n_layer=config.num_position_layers + config.num_content_layers,
            n_head=config.num_attention_heads,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
        )
    ).eval()


def llama(ours):
    """A Llama of the same width and depth; its MLP has three matrices, of two thirds of the size."""
    config = ours.config
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.content_vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=round(8 * config.hidden_size / 3),
            num_hidden_layers=config.num_position_layers + config.num_content_layers,
            num_attention_heads=config.num_attention_heads,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
        )
    ).eval()


def codes_a_pass(args, lookahead):
    """Fine codes a pass of one image, the mean over images of a trained model with its own sampling options."""
    pipe = dq_hf.DQPipeline.from_pretrained(args.model or dq_hf.DEFAULT_MODEL)
    config, images = pipe.transformer.config, range(args.num_images)
    codes, passes = 0, 0
    generators = [torch.Generator().manual_seed(args.seed + i) for i in images]
    labels = [i % config.num_classes for i in images] if config.num_classes else None
    prompts = None
    if config.text_length is not None:
        lines = Path(args.prompts).read_text("utf-8").splitlines()
        prompts = [lines[i % len(lines)] for i in images]
    condition = {"class_labels": labels, "num_images": args.num_images, **pipe.encode_prompt(prompts)}
    done = torch.zeros(args.num_images, dtype=torch.long)
    for state in pipe.transformer.generate_steps(**condition, generator=generators, lookahead=lookahead):
        came = state.taken.sum(1) - done
        if state.positions_are_fixed().all() and done.sum() > 0:  # one element a pass until then
            codes, passes = codes + int(came.sum()), passes + int((came > 0).sum())
        done = done + came
    return codes / passes


def make_report(args, ours, others, step_rows, pass_rows):
    """Two Markdown tables, and how they were made."""
    sizes = [f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M" for model in (ours, *others)]
    names = "ours", "ours, by calls of modules", "GPT-2", "Llama", "our products alone"
    steps, passes = [], []
    for batch, *figures in step_rows:
        row = {"batch": batch} | {name: f"{value:.3g}" for name, value in zip(names, figures)}
        steps.append(row | {"ours / products": f"{figures[0] / figures[-1]:.2f}"})
    for batch, lookahead, milliseconds, codes in pass_rows:
        (first,) = [row[2] / row[3] for row in pass_rows if row[:2] == (batch, args.lookahead[0])]
        row = {"batch": batch, "lookahead": lookahead, "ms a pass": f"{milliseconds:.3g}"}
        row |= {"codes a pass": f"{codes:.2f}", "ms a code": f"{milliseconds / codes:.3g}"}
        passes.append(row | {"against 1": f"{first / (milliseconds / codes):.2f} times"})
    return (
        f"Width {args.hidden_size}, {args.num_attention_heads} heads, {args.num_position_layers} + "
        f"{args.num_content_layers} layers; parameters: {sizes[0]}, GPT-2 {sizes[1]}, Llama {sizes[2]}; float32; "
        f"{describe_device(args.device, args.threads)}; torch {torch.__version__}, transformers "
        f"{transformers.__version__}; {args.clock} time. Milliseconds a step, the mean of the first {args.steps}:\n\n"
        f"{table(steps)}\n\n"
        f"Looking ahead in the finest part; codes a pass are those of one image, the mean of {args.num_images} of "
        f"{args.model or 'the embedded model'}, at whose size nothing here was timed:\n\n{table(passes)}"
    )


if __name__ == "__main__":
    main(HfArgumentParser(Arguments).parse_args_into_dataclasses()[0])
