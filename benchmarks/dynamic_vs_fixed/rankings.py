"""Which is behind, the router or the autoencoder? Each tokenizer's regions, ranked by its own and the other ones' routers.

    python benchmarks/dynamic_vs_fixed/rankings.py --seed 0    # once run.py has trained them; three minutes

With two granularities a third of each image's regions is fine: those with the highest scores of a router, with random
numbers, or with the largest gain, for which the image must be coded both ways: that says how much a router could still
gain. Rows are the tokenizers that code the images, columns what ranks.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import run
import torch
from conditions import CONDITIONS, DUAL, make_model
from evidence import REPOSITORY, option, table, write_section
from stage_1 import eight_bits
from transformers import HfArgumentParser

from dq_hf.metrics import psnr, ssim
from dq_hf.modeling.grain_map_dq import rank_routing
from dq_hf.training.router import region_gains

ROUTERS = ("entropy", "feature")


@dataclass
class Arguments:
    data: str = option("emoji", f"one of {', '.join(run.DATA)}")
    conditions: list[str] = option(["random", *ROUTERS], "tokenizers, trained by run.py")
    seed: int = option(0, "of their training, and of the random ranking")
    images: int | None = option(None, "the first held-out images only; none: all")
    work_dir: str = option(str(run.Arguments().work_dir), "run.py's folder of weights")
    output: str = option(str(REPOSITORY / "docs" / "evidence-tables.md"), "Markdown file")


@torch.no_grad()
def main(args):
    images, _ = run.load_split(run.DATA[args.data], "test", args.images)
    models = {name: load(args, name) for name in args.conditions}
    generator = torch.Generator().manual_seed(args.seed)
    rankings = {"random": lambda batch: torch.rand(len(batch), 8, 8, generator=generator)}
    rankings |= {name: models[name].region_scores for name in ROUTERS if name in models}
    rows = []
    for name, model in models.items():
        ways, figures = rankings | {"the gain itself": partial(region_gains, model)}, {}
        for batch in images.split(64):
            for way, rank in ways.items():
                sample = reconstruct(model, batch, rank_routing(rank(batch), DUAL["shares"]))
                figures.setdefault(way, []).append(torch.stack([psnr(sample, batch), ssim(sample, batch)]))
        means = {way: torch.cat(values, dim=1).mean(1).tolist() for way, values in figures.items()}
        cells = {way: f"{decibels:.2f}, {similarity:.3f}" for way, (decibels, similarity) in means.items()}
        rows.append({"trained with": f"`{name}`"} | cells)
    report = f"PSNR in dB, SSIM; seed {args.seed}; {len(images)} held-out images.\n\n{table(rows, texts=None)}"
    write_section(Path(args.output), f"rankings, {args.data}", report)


def load(args, name):
    """A trained tokenizer of two granularities; FileNotFoundError without its weights."""
    path = run.weights_path(args, args.data, name, args.seed)
    if not path.exists():
        raise FileNotFoundError(
            f"{path} not found; train it with run.py --stages 1 --conditions {name} --seeds {args.seed}"
        )
    return run.load_weights(make_model(CONDITIONS[name]), path)


def reconstruct(model, images, grain_map):
    """Images (B, 3, H, W) coded by a grain map, as a PNG file holds them."""
    return eight_bits(model(images, grain_map=grain_map).sample)


if __name__ == "__main__":
    main(HfArgumentParser(Arguments).parse_args_into_dataclasses()[0])
