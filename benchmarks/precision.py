"""What half precision and int8 weights cost the embedded model: codes, PSNR, held-out nats and samples, against float32.

    pip install -c constraints.txt -e ".[quantization]"
    python benchmarks/precision.py --output docs/precision.md      # one CPU thread; half an hour where half precision is slow

int8: torchao's weight-only quantisation of the generator, one scale for each row of a weight; activations, the
tokenizer and the text encoder stay in float32.
"""

import tempfile
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from report import describe_device, option, publish, table
from torch.utils.data import DataLoader
from torchao.quantization import Int8WeightOnlyConfig
from transformers import HfArgumentParser, TorchAoConfig

from dq_hf import DEFAULT_MODEL, DQForImageGeneration, DQImageProcessor
from dq_hf.data.images import ImageCollator, load_images
from dq_hf.metrics.psnr import psnr
from dq_hf.metrics.references import reference_captions
from dq_hf.modeling.text_dq import prompt_arguments

VARIANTS = {
    "float32": {},
    "bfloat16": dict(dtype=torch.bfloat16),
    "float16": dict(dtype=torch.float16),
    "int8 weights": dict(quantization_config=TorchAoConfig(Int8WeightOnlyConfig())),
}


@dataclass
class Arguments:
    model: str = option(DEFAULT_MODEL, "folder or repository of a text model")
    data: str = option("examples/data/emoji", "images with a split test")
    caption_column: str = option("captions", "of the images; one of each is drawn")
    num_images: int = option(386, "held-out images, the first ones")
    prompts: str = option("examples/data/prompts.txt", "text file with a prompt a line, of the samples")
    samples_per_prompt: int = option(2, "samples of each prompt, seed 0")
    batch_size: int = option(32, "images at a time")
    threads: int = option(1, "CPU threads")
    output: str | None = option(None, "Markdown file to put the table into")


@torch.no_grad()
def main(args):
    torch.set_num_threads(args.threads)
    images = load_images(args.data, "test")
    images = images.select(range(min(args.num_images, len(images))))
    config = DQForImageGeneration.config_class.from_pretrained(args.model)
    captions = reference_captions(config.transformer_config, images, args.caption_column, seed=0)
    collate = ImageCollator(DQImageProcessor.for_model(config.vae_config))
    batches = [batch["pixel_values"] for batch in DataLoader(images, args.batch_size, collate_fn=collate)]
    prompts = Path(args.prompts).read_text("utf-8").splitlines()
    prompts = [prompt for prompt in prompts for _ in range(args.samples_per_prompt)]
    rows, reference = {}, None
    for name, options in VARIANTS.items():
        model = DQForImageGeneration.from_pretrained(args.model, **options)
        encoded = [model.vae.encode(batch) for batch in batches]
        texts = prompt_states(model, prompts)
        samples = model.transformer.generate(**texts, generator=torch.Generator().manual_seed(0))
        if reference is None:
            reference = (encoded, samples)
        rows[name] = {
            "megabytes": saved_megabytes(model.transformer),
            "same_codes": share_of_same_codes(encoded, reference[0]),
            "psnr": mean_psnr(model.vae, batches, encoded),
            "nats": nats_per_code(model, captions, reference[0]),
            **compare_samples(samples, reference[1]),
        }
        print(name, rows[name], flush=True)
    report = make_report(args, rows, len(images), len(prompts))
    publish(report, "benchmarks/precision.py", args.output)


def prompt_states(model, prompts):
    """The states of prompts, by the names of the generator's arguments."""
    return prompt_arguments(model.transformer.config, model.text_encoder, model.tokenizer, prompts)


def saved_megabytes(transformer):
    """Size of the generator's weight file."""
    with tempfile.TemporaryDirectory() as folder:
        transformer.save_pretrained(folder)
        return sum(path.stat().st_size for path in Path(folder).glob("*.safetensors")) / 1e6


def share_of_same_codes(encoded, reference):
    """Share of the fine grid's cells whose code is the reference's."""
    same = torch.cat([one.codes == other.codes for one, other in zip(encoded, reference)])
    return same.double().mean().item()


def mean_psnr(vae, batches, encoded):
    """Mean over images, in dB, of what a model reconstructs from its own codes."""
    psnrs = [psnr(vae.decode_codes(one.codes).sample.clamp(-1, 1), batch) for batch, one in zip(batches, encoded)]
    return torch.cat(psnrs).mean().item()


def nats_per_code(model, captions, encoded):
    """Nats of contents and positions of whole streams, each with its caption, over the number of their codes."""
    nats, captions = [], iter(captions)
    for one in encoded:
        texts = prompt_states(model, list(islice(captions, len(one.codes))))
        nats.append(model.transformer.log_prob(one.codes, one.grain_map, **texts).nats)
    return (torch.cat(nats).double().sum() / sum(one.num_codes.sum() for one in encoded)).item()


def compare_samples(samples, reference):
    """Share of samples that are the reference's, and of their elements before the first that differs."""
    length = min(samples.contents.shape[1], reference.contents.shape[1])
    same = (samples.contents[:, :length] == reference.contents[:, :length]) & (
        samples.positions[:, :length] == reference.positions[:, :length]
    )
    before = same.long().cumprod(1).sum(1).minimum(reference.lengths)
    return {
        "same_samples": (samples.codes == reference.codes).flatten(1).all(1).double().mean().item(),
        "before_first_difference": (before / reference.lengths).double().mean().item(),
    }


def make_report(args, rows, num_images, num_samples):
    """A Markdown table, and how it was made."""
    base = rows["float32"]
    cells = [
        {
            "": name,
            "generator, MB": f"{row['megabytes']:.1f}",
            "same codes": f"{row['same_codes']:.2%}",
            "PSNR, dB": f"{row['psnr']:.2f}",
            "nats a code": f"{row['nats']:.4f}",
            "more than float32": f"{row['nats'] - base['nats']:+.4f}",
            "same samples": f"{row['same_samples']:.0%}",
            "stream before the first difference": f"{row['before_first_difference']:.0%}",
        }
        for name, row in rows.items()
    ]
    return (
        f"{num_images} held-out images, {num_samples} samples, seed 0; "
        f"{describe_device('cpu', args.threads)}; torch {torch.__version__}.\n\n{table(cells, texts=[''])}"
    )


if __name__ == "__main__":
    main(HfArgumentParser(Arguments).parse_args_into_dataclasses()[0])
