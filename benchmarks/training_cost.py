"""What training costs, by counting: parameters, floating-point operations and memory of both stages, without a GPU.

    python benchmarks/training_cost.py      # the scripts' sizes; a minute on one CPU core
    python benchmarks/training_cost.py --batch_size 16 --output docs/recipes.md --name half \
        --stage_1 "--image_size 256 --granularities 16 8 --block_out_channels 64 64 128 128 256 --perceptual lpips" \
        --stage_2 "--hidden_size 512 --num_content_layers 6"

The whole objective of each stage is computed forward and backward for one image, on the CPU in float32. Counted are the
operations of matrix products and convolutions, and the bytes that are kept for the backward pass. The rest is arithmetic:
the time of a step on a device that sustains --tflops, and the memory of a batch, with weights, gradients, both moments of
Adam and (stage 1) the moving average of the weights. LPIPS has random weights here, so that nothing is downloaded.
"""

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
from report import option, publish, table
from safetensors.torch import save_file
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode
from transformers import HfArgumentParser

from dq_hf import DQVAEModel
from dq_hf.networks.perceptual import LPIPS, EfficientNetLitePerceptualLoss
from dq_hf.scripts import train_dqtransformer, train_dqvae
from dq_hf.scripts.arguments import GENERATOR_SIZES, TOKENIZER_SIZES, GeneratorArguments, TokenizerArguments
from dq_hf.training.adversarial import PatchDiscriminator, adaptive_weight, generator_loss, hinge_loss
from dq_hf.training.options import settle_sizes

GIGA = 1e9
TERA = 1e12


@dataclass
class Arguments:
    stage_1: str = option("", "Options of train_dqvae.py, such as sizes.")
    stage_2: str = option("", "Options of train_dqtransformer.py, such as sizes.")
    batch_size: int = option(32, "Images of a step.")
    tflops: float = option(40.0, "TFLOP/s that the device is assumed to sustain.")
    output: str | None = option(None, "Markdown file to put the table into.")
    name: str = option("default sizes", "What the table is called in that file.")


class Count(NamedTuple):
    """What a training step with one image takes."""

    parameters: int
    operations: int
    activations: int  # bytes
    state: int  # bytes of weights, gradients, moments and averages, whatever the batch


def main(args):
    torch.manual_seed(0)
    options = options_of(TokenizerArguments, args.stage_1)
    settle_sizes(options, TOKENIZER_SIZES)
    vae = DQVAEModel(train_dqvae.make_config(options))
    pixel_values = torch.rand(1, 3, *vae.config.image_height_width) * 2 - 1
    with torch.no_grad():
        encoded = vae.eval().encode(pixel_values, fine_ratio=vae.config.budget_targets)
    generator_options = options_of(GeneratorArguments, args.stage_2)
    settle_sizes(generator_options, GENERATOR_SIZES)
    generator = train_dqtransformer.make_model(vae, [], None, None, generator_options)
    counts = (
        count_tokenizer(vae, options, pixel_values, encoded.grain_map),
        count_steps([generator], [], lambda: generator(encoded.codes, encoded.grain_map).loss, num_averages=0),
    )
    report = make_report(args, counts, encoded.num_codes.item())
    publish(report, f"benchmarks/training_cost.py, {args.name}", args.output)


def options_of(arguments, options):
    """The arguments of a script, without an output folder."""
    return HfArgumentParser(arguments).parse_args_into_dataclasses(["--output_dir", "", *options.split()])[0]


def count_tokenizer(vae, options, pixel_values, grain_map):
    """The `Count` of stage 1 with the perceptual and the adversarial loss."""
    discriminator = PatchDiscriminator(options.disc_channels, options.disc_layers, options.disc_norm)
    perceptual = random_lpips() if options.perceptual == "lpips" else EfficientNetLitePerceptualLoss()

    def loss():
        output = vae(pixel_values, grain_map=grain_map)
        distance = perceptual(output.sample, pixel_values)
        adversarial = generator_loss(discriminator(output.sample))
        last_weight = vae.decoder.output.conv.weight
        weight = adaptive_weight(output.reconstruction_loss + distance, adversarial, last_weight, options.disc_weight)
        judged = hinge_loss(discriminator(pixel_values), discriminator(output.sample.detach()))
        return output.loss + distance + weight * adversarial + judged

    return count_steps([vae, discriminator], [perceptual], loss, num_averages=1)


def count_steps(trained, frozen, make_loss, num_averages):
    """The `Count` of a loss of one image; `trained` and `frozen` are the models that it goes through."""
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    for model in trained:
        model.train()
    with FlopCounterMode(display=False) as counter:
        with saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = make_loss()
        loss.backward()
    weights = {weight.untyped_storage().data_ptr() for model in [*trained, *frozen] for weight in model.parameters()}
    sizes = [sum(weight.numel() for weight in model.parameters()) for model in trained]
    return Count(
        parameters=sizes[0],
        operations=counter.get_total_flops(),
        activations=sum(size for place, size in kept.items() if place not in weights),
        state=4 * (4 * sum(sizes) + num_averages * sizes[0]),
    )


def random_lpips():
    """LPIPS with random weights."""
    weights, index, channels = {}, 0, 3
    for stage, widths in enumerate(LPIPS.stages):
        index += stage > 0  # a pooling layer
        for width in widths:
            weights[f"features.{index}.weight"] = torch.randn(width, channels, 3, 3) * (2 / (9 * channels)) ** 0.5
            weights[f"features.{index}.bias"] = torch.zeros(width)
            index, channels = index + 2, width
    heads = {
        f"lin{depth}.model.1.weight": torch.rand(1, widths[-1], 1, 1) for depth, widths in enumerate(LPIPS.stages)
    }
    with TemporaryDirectory() as folder:
        save_file(weights, Path(folder, "model.safetensors"))
        torch.save(heads, Path(folder, "vgg.pth"))
        return LPIPS(folder, Path(folder, "vgg.pth"))


def make_report(args, counts, num_codes):
    """A Markdown table with a row a stage."""
    rows = []
    for stage, count in enumerate(counts, 1):
        seconds = count.operations * args.batch_size / (args.tflops * TERA)
        memory = (count.state + count.activations * args.batch_size) / GIGA
        rows.append(
            {
                "stage": stage,
                "parameters": f"{count.parameters:,}",
                "GFLOP an image": f"{count.operations / GIGA:.4g}",
                "seconds a step": f"{seconds:.2g}",
                "GB an image": f"{count.activations / GIGA:.2g}",
                "GB a step": f"{memory:.2g}",
            }
        )
    return (
        f"Counted for one image with {num_codes} codes; a step has {args.batch_size} images; the device is assumed to sustain "
        f"{args.tflops:g} TFLOP/s. Memory is that of float32.\n\n{table(rows)}"
    )


if __name__ == "__main__":
    main(HfArgumentParser(Arguments).parse_args_into_dataclasses()[0])
