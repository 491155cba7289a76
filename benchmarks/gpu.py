"""What one GPU makes of the models: sampling against the floor that memory sets, training of both stages, peak memory.

    python benchmarks/gpu.py --output docs/performance.md                       # minutes of one GPU
    python benchmarks/gpu.py --device cpu --codes 64 --batch_sizes 1 --train_batch 2 --hidden_size 64 --width 16    # tries it

A step of sampling reads every weight of the generator once, whatever the batch: at the memory's bandwidth, which is measured by
copying, that takes the floor. Keys and values, which grow with the batch, come on top and are not in it.
"""

import resource
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from report import describe_device, synchronize, write_section
from transformers import CompileConfig, HfArgumentParser

from dq_hf import DQTransformerConfig, DQTransformerForImageGeneration, DQVAEConfig, DQVAEModel

WARM_UP, REPEATS = 2, 5
COPIED = 2**28  # bytes


@dataclass
class Arguments:
    device: str = field(default="cuda", metadata={"help": "where it runs"})
    codes: int = field(default=1024, metadata={"help": "cells of the finest grid, 4 times a square number"})
    batch_sizes: list[int] = field(default_factory=lambda: [1, 16, 128], metadata={"help": "images sampled at once"})
    hidden_size: int = field(default=1024, metadata={"help": "width of the generator, 6 + 18 layers as in the paper"})
    width: int = field(default=128, metadata={"help": "channels of the tokenizer's first level"})
    train_batch: int = field(default=16, metadata={"help": "images of a training step"})
    compile: bool = field(default=False, metadata={"help": "compile the step of sampling, with CUDA graphs"})
    output: str | None = field(default=None, metadata={"help": "Markdown file to put the tables into"})


def main(args):
    torch.manual_seed(0)
    vae, transformer = make_models(args)
    bandwidth = measure_bandwidth(args.device)
    weights = sum(parameter.nbytes for parameter in transformer.parameters())
    sampling = [time_sampling(transformer, batch, weights / bandwidth, args) for batch in args.batch_sizes]
    training = [time_training(name, model, args) for name, model in (("tokenizer", vae), ("generator", transformer))]
    report = "\n\n".join(
        [
            f"{describe_device(args.device, torch.get_num_threads())}; torch {torch.__version__}; bfloat16; "
            f"{bandwidth / 1e9:.0f} GB/s copied; generator {weights / 2**20:.0f} MB.",
            table(sampling),
            table(training),
        ]
    )
    print(report)
    if args.output:
        write_section(Path(args.output), "benchmarks/gpu.py", report)


def make_models(args):
    """A tokenizer and a generator of the paper's shape, in float32 and bfloat16."""
    side = round((args.codes / 4) ** 0.5)
    sizes = dict(image_size=16 * side, block_out_channels=[args.width * factor for factor in (1, 1, 2, 2, 4)])
    vae = DQVAEModel(DQVAEConfig(**sizes, norm_num_groups=min(32, args.width)))
    config = DQTransformerConfig(grid_sizes=[[side, side], [2 * side, 2 * side]], hidden_size=args.hidden_size)
    transformer = DQTransformerForImageGeneration(config).to(torch.bfloat16)
    return vae.to(args.device), transformer.to(args.device)


def measure_bandwidth(device):
    """Bytes a second that are read, where as many are written."""
    source = torch.ones(COPIED, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * COPIED / seconds(lambda: target.copy_(source), device)


def seconds(call, device):
    """The least time of `REPEATS` calls, after `WARM_UP` ones."""
    times = []
    for _ in range(WARM_UP + REPEATS):
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times[WARM_UP:])


def time_sampling(model, batch, floor, args):
    """A row of the first table; `floor` is that of a step, in seconds."""
    config = CompileConfig(fullgraph=True, mode="reduce-overhead") if args.compile else None
    forget_peak(args.device)
    synchronize(args.device)
    start = time.perf_counter()
    generated = model.eval().generate(num_images=batch, generator=torch.Generator(), compile_config=config)
    synchronize(args.device)
    passed, steps = time.perf_counter() - start, int(generated.lengths.max())
    return {
        "images at once": batch,
        "steps": steps,
        "images a second": f"{batch / passed:.2f}",
        "ms a step": f"{1e3 * passed / steps:.2f}",
        "floor, ms": f"{1e3 * floor:.2f}",
        "times the floor": f"{passed / steps / floor:.1f}",
        "peak memory, MB": f"{peak_megabytes(args.device):.0f}",
    }


def time_training(name, model, args):
    """A row of the second table: forward, backward and an AdamW step in bfloat16."""
    model = model.float().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    batch = make_batch(name, model, args)

    def step():
        with torch.autocast(torch.device(args.device).type, dtype=torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    forget_peak(args.device)
    passed = seconds(step, args.device)
    return {
        "training": name,
        "images a step": args.train_batch,
        "ms a step": f"{1e3 * passed:.1f}",
        "images a second": f"{args.train_batch / passed:.1f}",
        "peak memory, MB": f"{peak_megabytes(args.device):.0f}",
    }


def make_batch(name, model, args):
    """Random arguments of `forward`."""
    if name == "tokenizer":
        height, width = model.config.image_height_width
        return {"pixel_values": torch.rand(args.train_batch, 3, height, width, device=args.device) * 2 - 1}
    regions = args.train_batch, *model.config.grid_sizes[0]
    codes = torch.randint(model.config.codebook_size, regions, device=args.device)
    return {
        "codes": codes.repeat_interleave(2, 1).repeat_interleave(2, 2),  # one in each region, as coarse ones have
        "grain_map": torch.randint(2, regions, device=args.device),
    }


def forget_peak(device):
    """Begin to measure the most memory anew; on a CPU that of the whole process counts."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_megabytes(device):
    """The most memory since `forget_peak`."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def table(rows):
    """Markdown of rows with the same headings."""
    lines = [list(rows[0]), ["---:"] * len(rows[0]), *(map(str, row.values()) for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    main(*HfArgumentParser(Arguments).parse_args_into_dataclasses())
