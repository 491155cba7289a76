"""How long sampling takes: with the cache, and re-running the whole prefix for every element, on the same weights.

    python benchmarks/sampling.py                                     # one CPU thread, about ten minutes
    python benchmarks/sampling.py --device cuda --hidden_size 1024 --num_position_layers 6 --num_content_layers 18
    python benchmarks/sampling.py --output docs/performance.md        # puts the tables of this size into that file

The weights are random, but for one thing: the end of the coarse part is made certain, so that every region is fine and
all streams have the wanted number of codes. Re-running computes logits for the last element only, and its streams are
those that cached sampling gave: every element that it draws is compared with them.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from report import CLOCKS, describe_device, synchronize, write_section
from transformers import CompileConfig, HfArgumentParser

from dq_hf.modeling.configuration_dqtransformer import DQTransformerConfig
from dq_hf.modeling.constraints_dq import StreamState
from dq_hf.modeling.generation_dq import Draw, own_generators, uniform_numbers
from dq_hf.modeling.modeling_dqtransformer import DQTransformerForImageGeneration
from dq_hf.modeling.sampling_options_dq import SamplingOptions
from dq_hf.modeling.step_loop_dq import next_element


@dataclass
class Arguments:
    codes: list[int] = field(
        default_factory=lambda: [40, 160, 640], metadata={"help": "codes an image, multiples of 4"}
    )
    batch_sizes: list[int] = field(default_factory=lambda: [1, 4, 16], metadata={"help": "images at a time"})
    codebook_size: int = field(default=1024, metadata={"help": "number of codes to choose from"})
    hidden_size: int = field(default=512, metadata={"help": "width of both stacks"})
    num_attention_heads: int = field(default=8, metadata={"help": "heads of every layer"})
    num_position_layers: int = field(default=2, metadata={"help": "layers of the Position-Transformer"})
    num_content_layers: int = field(default=6, metadata={"help": "layers of the Content-Transformer"})
    every: int = field(
        default=16, metadata={"help": "re-run the prefix of every n-th element and multiply; 1: of all"}
    )
    repeats: int = field(default=2, metadata={"help": "times that everything is timed; the shortest counts"})
    compile: str | None = field(
        default=None, metadata={"help": "compile the cached step by this backend of torch.compile, such as inductor"}
    )
    threads: int = field(default=1, metadata={"help": "CPU threads"})
    clock: str = field(default="wall", metadata={"help": '"wall", or "cpu" for CPU time, on a machine that is busy'})
    device: str = field(default="cpu", metadata={"help": "torch device"})
    seed: int = field(default=0, metadata={"help": "of weights and images"})
    output: str | None = field(default=None, metadata={"help": "Markdown file to put the tables into"})


def main(args):
    torch.set_num_threads(args.threads)
    rows, steps = [], {}
    for codes in args.codes:
        model = make_model(args, codes)
        for batch_size in args.batch_sizes:
            generated, cached, steps[codes, batch_size] = time_cached(model, batch_size, args)
            assert generated.lengths.tolist() == [codes + 4] * batch_size  # start and end of both parts
            rerun = time_rerun(model, generated, args)
            rows.append((codes, batch_size, cached / batch_size, rerun / batch_size))
            print(f"{codes} codes, batch {batch_size}: {cached:.2f} s cached, {rerun:.2f} s re-run", flush=True)
    longest = max(args.codes)
    report = make_report(args, rows, {batch: steps[longest, batch] for batch in args.batch_sizes})
    print(f"\n{report}")
    if args.output is not None:
        size = f"width {args.hidden_size}, {args.num_position_layers} + {args.num_content_layers} layers"
        size += "" if args.compile is None else ", compiled"
        write_section(Path(args.output), f"benchmarks/sampling.py, {size}", report)


def make_model(args, codes):
    """A model whose streams all have that many codes, four in each region."""
    if codes < 4 or codes % 4:
        raise ValueError(f"codes must be a multiple of 4, got {codes}")
    regions = codes // 4
    rows = max(side for side in range(1, math.isqrt(regions) + 1) if regions % side == 0)
    columns = regions // rows
    config = DQTransformerConfig(
        grid_sizes=[[rows, columns], [2 * rows, 2 * columns]],
        codebook_size=args.codebook_size,
        hidden_size=args.hidden_size,
        num_attention_heads=args.num_attention_heads,
        num_position_layers=args.num_position_layers,
        num_content_layers=args.num_content_layers,
    )
    torch.manual_seed(args.seed)
    model = DQTransformerForImageGeneration(config).eval()
    head, coarse_end = model.position_head, regions + 1
    with torch.no_grad():
        # A constant part of the normalised hidden state along the end token's row raises its logit by 100. In the fine
        # part the same index is an ordinary position; positions are fixed there.
        direction = head.projection.weight[coarse_end]
        head.norm.bias.copy_(100 * direction / direction.square().sum())
    return model.to(args.device)


def time_cached(model, batch_size, args):
    """The streams, seconds in all, and seconds after each element."""
    now, best = CLOCKS[args.clock], math.inf
    compile_config = None if args.compile is None else CompileConfig(fullgraph=True, backend=args.compile, mode=None)
    for _ in range(args.repeats + (compile_config is not None)):  # the first one compiles
        clock = []
        start = now()
        generator = torch.Generator().manual_seed(args.seed)
        generation = model.generate_steps(num_images=batch_size, generator=generator, compile_config=compile_config)
        for state in generation:  # noqa: B007 - one object, read at the end
            clock.append(now())
        seconds = now() - start
        if seconds < best:
            best, steps = seconds, [moment - start for moment in clock]
    return model.generation_output(state), best, steps


@torch.no_grad()
def time_rerun(model, generated, args):
    """Seconds in all, from every n-th element; raises RuntimeError if an element is not what `generated` has."""
    batch_size, length = generated.contents.shape
    generators = own_generators(torch.Generator().manual_seed(args.seed), batch_size)
    uniforms = uniform_numbers(generators, model.config.longest_stream)
    source = Draw(uniforms.to(model.device), SamplingOptions())
    state = StreamState(model.layout, torch.zeros_like(generated.lengths))
    places = torch.arange(length, device=model.device)
    now, granularities, seconds, timed = CLOCKS[args.clock], [], 0.0, 0
    for i in range(length):
        if i > 0 and i % args.every == args.every // 2:  # the middle of those that it stands for
            prefix = generated.contents[:, :i], generated.positions[:, :i], torch.stack(granularities, dim=1)
            best = math.inf
            for _ in range(args.repeats):
                synchronize(model.device)
                start = now()
                drawn = next_element(model, prefix, places[:i], state, source, source.inputs(i))
                synchronize(model.device)
                best = min(best, now() - start)
            if not all(torch.equal(a, b[:, i]) for a, b in zip(drawn, (generated.positions, generated.contents))):
                raise RuntimeError(f"re-running the prefix drew another element {i} than cached sampling")
            seconds, timed = seconds + best, timed + 1
        granularities.append(state.granularity)
        state.append(generated.positions[:, i], generated.contents[:, i])
    return seconds / timed * (length - 1)


def make_report(args, rows, steps):
    """Two Markdown tables, and how they were made."""
    compiled = "" if args.compile is None else f"The cached step is compiled ({args.compile}). "
    lines = [
        f"Width {args.hidden_size}, {args.num_attention_heads} heads, {args.num_position_layers} + "
        f"{args.num_content_layers} layers, {args.codebook_size} codes to choose from, float32; "
        f"{describe_device(args.device, args.threads)}; torch {torch.__version__}; {args.clock} time. {compiled}Re-run times are those of every {args.every}. element, multiplied.",
        "",
        "| codes | batch | cached, s/image | cached, ms/code | re-run, s/image | re-run, ms/code | re-run / cached |",
        "|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for codes, batch_size, cached, rerun in rows:
        lines.append(
            f"| {codes} | {batch_size} | {cached:.3g} | {1000 * cached / codes:.3g} | {rerun:.3g} | "
            f"{1000 * rerun / codes:.3g} | {rerun / cached:.1f} |"
        )
    num_steps = max(args.codes) + 3  # the first element is the start token
    edges = [num_steps * quarter // 4 for quarter in range(5)]
    lines += [
        "",
        f"Cached, milliseconds an element (a code of each image) along the streams of {max(args.codes)} codes; only the "
        "attention has more to do for later ones:",
        "",
        "| batch | " + " | ".join(f"{a + 2} to {b + 1}" for a, b in zip(edges, edges[1:])) + " |",
        "|---:|---:|---:|---:|---:|",
    ]
    for batch_size, clock in steps.items():
        clock = [0.0, *clock]
        each = [f"{1000 * (clock[b] - clock[a]) / (b - a):.3g}" for a, b in zip(edges, edges[1:])]
        lines.append(f"| {batch_size} | " + " | ".join(each) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main(HfArgumentParser(Arguments).parse_args_into_dataclasses()[0])
