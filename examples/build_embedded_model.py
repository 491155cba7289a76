"""Make the embedded model from a finished training run: bfloat16 weights, measured figures, model card.

    python examples/build_embedded_model.py --model runs/emoji-transformer/model \
        --checkpoint runs/emoji-transformer/checkpoint-5000 --vae runs/emoji-decoder/model

The figures in the card are measured here, on the folder as it is shipped, with the held-out emoji.
"""

import json
import math
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import HfArgumentParser

from dq_hf import DEFAULT_MODEL, DQForImageGeneration, DQImageProcessor
from dq_hf.data.fingerprint import codes_fingerprint
from dq_hf.data.images import ImageCollator, load_images
from dq_hf.hub.card import write_model_card
from dq_hf.hub.folders import partial_of, put_in_place
from dq_hf.loading import load_tokenizer
from dq_hf.metrics.psnr import psnr
from dq_hf.pictures import draw_grain_map, image_grid

SUMMARY = """\
The model that dq_hf carries with it: a DQ-VAE and a class-conditional DQ-Transformer ({vae_parameters:,} and
{transformer_parameters:,} parameters), trained from scratch on emoji. It shows what dynamic vector quantisation does,
right after installing and offline; it is small and was trained on two CPU cores."""

SAMPLES = """\
Samples, one row a class ({classes}); seed 0, not chosen. What is not given is drawn with {sampling} (`sampling_defaults`
in the configuration)."""

RECONSTRUCTIONS = """\
Held-out images, the first ones and the first smileys: their variable-length coding, and their reconstructions."""

COLUMNS = 12  # of that picture

DATA = """\
{num_train:,} training and {num_images:,} held-out pictures of 64x64, split by emoji; the figures above are of all that were
held out, with the shipped (bfloat16) weights, computed in float32.

The pictures of Google's Noto Emoji are under the Apache License 2.0; those of Twitter's Twemoji (copyright 2020 Twitter,
Inc and other contributors) are under CC-BY 4.0. They were composited on white. The weights are derived from both; keep
this notice when you pass them on."""

LIMITS = """\
Trained on few pictures of one style: other images are reconstructed coarsely, and small text and small faces are lost.
The generator's held-out loss had stopped falling: more would need more pictures. People, flags, symbols, travel (mostly
clocks) and smileys can be recognised; animals, food, objects and activities are mostly coloured shapes. The sampling
defaults favour typical pictures over varied ones."""


@dataclass
class Arguments:
    model: str = field(metadata={"help": "folder that train_dqtransformer.py wrote"})
    output_dir: str = DEFAULT_MODEL
    data: str = "examples/data/emoji"
    commands: str = field(
        default="examples/configs/emoji.sh", metadata={"help": "the training commands, for the card"}
    )
    checkpoint: str | None = field(
        default=None, metadata={"help": "take the generator's weights from this checkpoint of the run"}
    )
    vae: str | None = field(
        default=None, metadata={"help": "take this tokenizer; only its decoder may differ from that of the run"}
    )
    temperature: float = field(default=0.8, metadata={"help": "becomes the model's default, like the next two"})
    top_p: float = 0.92
    guidance_scale: float = 2.5
    steps: str = field(default="", metadata={"help": "a sentence on steps and duration, for the card"})


@torch.no_grad()
def main():
    args = HfArgumentParser(Arguments).parse_args_into_dataclasses()[0]
    output_dir = Path(args.output_dir)
    folder = partial_of(output_dir)  # what was there stays until the new one is whole
    shutil.rmtree(folder, ignore_errors=True)
    model = DQForImageGeneration.from_pretrained(args.model)
    if args.checkpoint is not None:
        model.transformer.load_state_dict(load_file(Path(args.checkpoint) / "model.safetensors"))
    if args.vae is not None:
        vae = load_tokenizer(args.vae)
        if codes_fingerprint(vae) != codes_fingerprint(model.vae):
            raise ValueError(
                f"{args.vae} must give the codes that the generator of {args.model} learned, got other ones"
            )
        model.vae = vae
    model.transformer.config.sampling_defaults = {
        "temperature": args.temperature,
        "top_p": args.top_p,
        "guidance_scale": args.guidance_scale,
    }
    save_bfloat16(model, folder)
    for pictures in folder.glob("origin*"):  # of the run's card, which the one below takes the place of
        shutil.rmtree(pictures)

    model = DQForImageGeneration.from_pretrained(folder)
    test_set = load_images(args.data, "test")
    figures = measure(model, test_set, folder)
    draw_samples(model, folder / "samples.png")
    sampling = ", ".join(f"{name} {value}" for name, value in model.transformer.config.sampling_defaults.items())
    write_model_card(
        folder,
        model.config,
        title=output_dir.name,
        summary=SUMMARY.format(
            vae_parameters=model.vae.num_parameters(), transformer_parameters=model.transformer.num_parameters()
        ),
        dataset=args.data,
        test_split="test",
        metrics=figures,
        data=DATA.format(num_train=len(load_images(args.data, "train")), num_images=len(test_set)),
        training=args.steps,
        command=Path(args.commands).read_text().rstrip(),
        limits=LIMITS,
        license="cc-by-4.0",
        captions={
            "samples.png": SAMPLES.format(classes=", ".join(model.config.id2label.values()), sampling=sampling),
            "reconstructions.png": RECONSTRUCTIONS,
        },
    )
    put_in_place(output_dir)
    size = sum(path.stat().st_size for path in output_dir.rglob("*") if path.is_file())
    print(json.dumps(figures | {"megabytes": size / 1e6}, indent=2))


def save_bfloat16(model, folder):
    """Weights in bfloat16 but the codebook; the configuration says float32, so that loading computes in float32."""
    weights = {key: value if ".quantizer." in key else value.bfloat16() for key, value in model.state_dict().items()}
    model.save_pretrained(folder, state_dict=weights)


def measure(model, test_set, folder):
    """Figures on held-out images; a picture of the first ones: image with coding above, reconstruction below."""
    processor = DQImageProcessor.for_model(model.vae.config)
    sums = dict.fromkeys(("psnr", "codes_per_image", "content_loss", "position_loss", "nats"), 0.0)
    shown = {"others": [], "faces": []}  # images with coding, and reconstructions
    for batch in tqdm(DataLoader(test_set, 1, collate_fn=ImageCollator(processor, "image", "label"))):
        pixel_values = batch["pixel_values"]
        encoded = model.vae.encode(pixel_values)
        decoded = model.vae.decode_codes(encoded.codes).sample.clamp(-1, 1)
        output = model.transformer(encoded.codes, encoded.grain_map, batch["class_labels"])
        sums["psnr"] += psnr(decoded, pixel_values).item()
        sums["codes_per_image"] += encoded.num_codes.item()
        sums["content_loss"] += output.content_loss.item()
        sums["position_loss"] += output.position_loss.item()
        sums["nats"] += model.transformer.log_prob(encoded.codes, encoded.grain_map, batch["class_labels"]).nats.item()
        pairs = shown["faces" if batch["class_labels"].item() == model.config.label2id["smileys"] else "others"]
        if len(pairs) < COLUMNS:
            overlay = draw_grain_map(processor.post_process(pixel_values)[0], encoded.grain_map[0], scale=2)
            pairs.append((overlay, processor.post_process(decoded)[0].resize(overlay.size)))
    rows = [row for pairs in shown.values() for row in zip(*pairs)]
    image_grid([image for row in rows for image in row], columns=COLUMNS).save(folder / "reconstructions.png")
    figures = {name: value / len(test_set) for name, value in sums.items()}
    figures["nats_per_code"] = figures.pop("nats") / figures["codes_per_image"]
    figures["code_bits_per_image"] = figures["codes_per_image"] * math.log2(model.vae.config.codebook_size)
    return figures


def draw_samples(model, picture):
    """Eight samples of each class, one row a class."""
    labels = [label for label in model.config.id2label for _ in range(8)]
    generated = model.generate(labels, generator=torch.Generator().manual_seed(0))
    image_grid(DQImageProcessor().post_process(generated.pixel_values), columns=8).save(picture)


if __name__ == "__main__":
    main()
