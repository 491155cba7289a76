"""Is it brightness or colour that a tokenizer has not learned? The error of finished runs' reconstructions, split into both.

    python benchmarks/dynamic_vs_fixed/colours.py --data photographs    # once run.py has trained them; ten minutes

The PSNR of brightness (grey values) and that of what remains of the colours without it, and the share of the pictures' colour
that the reconstructions have: 1 where they are as colourful, 0 where they are grey.
"""

from dataclasses import dataclass
from pathlib import Path

import run
import torch
from conditions import CONDITIONS, make_model
from evidence import REPOSITORY, option, table, write_section
from stage_1 import eight_bits
from transformers import HfArgumentParser

from dq_hf.modeling.routing_dq import GREY_WEIGHTS


@dataclass
class Arguments:
    data: str = option("emoji", f"one of {', '.join(run.DATA)}")
    images: int | None = option(None, "the first held-out images only; none: all")
    work_dir: str = option(str(run.Arguments().work_dir), "run.py's folder of weights")
    output: str = option(str(REPOSITORY / "docs" / "evidence-tables.md"), "Markdown file")


@torch.no_grad()
def main(args):
    images, _ = run.load_split(run.DATA[args.data], "test", args.images)
    rows = []
    for name in CONDITIONS:
        for path in sorted(Path(args.work_dir, args.data).glob(f"{name}-seed?.safetensors")):
            metadata = run.read_metadata(path)
            model = run.load_weights(make_model(CONDITIONS[name]), path)
            samples = torch.cat([eight_bits(model(batch).sample) for batch in images.split(64)])
            figures = {name: f"{value:.2f}" for name, value in measure(samples, images).items()}
            rows.append({"tokenizer": f"`{name}`", "seed": metadata["settings"]["seed"]} | figures)
    if not rows:
        raise FileNotFoundError(
            f"no weights in {Path(args.work_dir, args.data)}; train tokenizers with run.py --stages 1"
        )
    report = f"{len(images)} held-out images, routed by each tokenizer's own choice.\n\n{table(rows, texts=None)}"
    write_section(Path(args.output), f"colours, {args.data}", report)


def measure(samples, images):
    """Mean PSNR in dB of brightness and colours of images (B, 3, H, W) in [-1, 1], and the share of colour that is kept."""
    (grey, colour), (sample_grey, sample_colour) = split(images), split(samples)
    return {
        "brightness, dB": decibels(sample_grey, grey),
        "colour, dB": decibels(sample_colour, colour),
        "share of the colour": ((sample_colour * colour).sum() / colour.square().sum()).item(),
    }


def split(images):
    """Grey values (B, 1, H, W), and the colours (B, 3, H, W) less them."""
    grey = (images * images.new_tensor(GREY_WEIGHTS).view(1, 3, 1, 1)).sum(1, keepdim=True)
    return grey, images - grey


def decibels(values, originals):
    """Mean over images of the PSNR, peak to peak 2."""
    errors = (values - originals).square().flatten(1).mean(1).clamp(min=1e-10)
    return (10 * torch.log10(4 / errors)).mean().item()


if __name__ == "__main__":
    main(HfArgumentParser(Arguments).parse_args_into_dataclasses()[0])
