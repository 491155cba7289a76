"""How long sampling takes: by the number of codes and of images at a time.

    python benchmarks/sampling.py                                     # one CPU thread, some minutes
    python benchmarks/sampling.py --device cuda --hidden_size 1024 --num_position_layers 6 --num_content_layers 18
    python benchmarks/sampling.py --output docs/performance.md        # puts the tables of this size into that file

The weights are random, but for one thing: the end of the coarse part is made certain, so that every region is fine and
all streams have the wanted number of codes.
"""

import math
from dataclasses import dataclass

import torch
from report import CLOCKS, describe_device, option, publish, table
from transformers import CompileConfig, HfArgumentParser

from dq_hf.modeling.configuration_dqtransformer import DQTransformerConfig
from dq_hf.modeling.modeling_dqtransformer import DQTransformerForImageGeneration


@dataclass
class Sizes:
    """The model whose sampling is timed, and how."""

    batch_sizes: list[int] = option([1, 4, 16], "images at a time")
    codebook_size: int = option(1024, "number of codes to choose from")
    hidden_size: int = option(512, "width of both stacks")
    num_attention_heads: int = option(8, "heads of every layer")
    num_position_layers: int = option(2, "layers of the Position-Transformer")
    num_content_layers: int = option(6, "layers of the Content-Transformer")
    threads: int = option(1, "CPU threads")
    clock: str = option("wall", '"wall", or "cpu" for CPU time, on a machine that is busy')
    seed: int = option(0, "of weights and images")
    output: str | None = option(None, "Markdown file to put the tables into")

    def title(self, script):
        """What the tables of these sizes are called in that file."""
        layers = f"{self.num_position_layers} + {self.num_content_layers} layers"
        return f"benchmarks/{script}, width {self.hidden_size}, {layers}"


@dataclass
class Arguments(Sizes):
    codes: list[int] = option([40, 160, 640], "codes an image, multiples of 4")
    repeats: int = option(2, "times that everything is timed; the shortest counts")
    device: str = option("cpu", "torch device")
    compile: str | None = option(None, "compile the step by this backend of torch.compile, such as inductor")


def main(args):
    torch.set_num_threads(args.threads)
    seconds = {}
    for codes in args.codes:
        model = make_model(args, codes)
        for batch_size in args.batch_sizes:
            seconds[codes, batch_size] = times = time_sampling(model, batch_size, args)
            assert len(times) == codes + 3, "the end of the coarse part and both ends of the fine one count, too"
            print(f"{codes} codes, batch {batch_size}: {times[-1]:.2f} s", flush=True)
    report = make_report(args, seconds)
    title = args.title("sampling.py") + ("" if args.compile is None else ", compiled")
    publish(report, title, args.output)


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


def time_sampling(model, batch_size, args):
    """Seconds from the beginning to each element behind the start, of the fastest repeat."""
    now = CLOCKS[args.clock]
    compile_config = None if args.compile is None else CompileConfig(fullgraph=True, backend=args.compile, mode=None)
    repeats = []
    for _ in range(args.repeats + (compile_config is not None)):  # the first one compiles
        start = now()
        generator = torch.Generator().manual_seed(args.seed)
        steps = model.generate_steps(num_images=batch_size, generator=generator, compile_config=compile_config)
        repeats.append([now() - start for _ in steps])
    return min(repeats, key=lambda times: times[-1])


def make_report(args, seconds):
    """Two Markdown tables, and how they were made."""
    compiled = "" if args.compile is None else f" The step is compiled ({args.compile})."
    longest = max(args.codes)
    edges = [(longest + 3) * quarter // 4 for quarter in range(5)]  # the first element is the start token
    lengths, quarters = [], []
    for (codes, batch_size), times in seconds.items():
        image = times[-1] / batch_size
        figures = {"s/image": f"{image:.3g}", "ms/code": f"{1000 * image / codes:.3g}"}
        lengths.append({"codes": codes, "batch": batch_size} | figures)
    for batch_size in args.batch_sizes:
        clock = [0.0, *seconds[longest, batch_size]]
        each = {f"{a + 2} to {b + 1}": 1000 * (clock[b] - clock[a]) / (b - a) for a, b in zip(edges, edges[1:])}
        quarters.append({"batch": batch_size} | {name: f"{value:.3g}" for name, value in each.items()})
    return (
        f"Width {args.hidden_size}, {args.num_attention_heads} heads, {args.num_position_layers} + "
        f"{args.num_content_layers} layers, {args.codebook_size} codes to choose from, float32; "
        f"{describe_device(args.device, args.threads)}; torch {torch.__version__}; {args.clock} time.{compiled}\n\n"
        f"{table(lengths)}\n\n"
        f"Milliseconds an element (a code of each image) along the streams of {longest} codes; only the attention has more "
        f"to do for later ones:\n\n{table(quarters)}"
    )


if __name__ == "__main__":
    main(HfArgumentParser(Arguments).parse_args_into_dataclasses()[0])
