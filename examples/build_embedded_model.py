"""Make the embedded model from a finished training run with text: bfloat16 weights, measured figures, pictures, card.

    python examples/build_embedded_model.py --model runs/emoji-text/model --vae runs/emoji-decoder/model
    python benchmarks/text_alignment.py --output runs/alignment.md
    python examples/build_embedded_model.py --model runs/emoji-text/model --vae runs/emoji-decoder/model \
        --findings runs/alignment.md

The second build is the first with the tables of the benchmark in its card. All other figures are measured here, on the
folder as it is shipped, with the held-out emoji.
"""

import json
import math
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import load_file
from tokenizers import Regex, normalizers
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import HfArgumentParser

from dq_hf import DEFAULT_MODEL, DQForImageGeneration, DQImageProcessor
from dq_hf.data.captions import with_wrong_captions
from dq_hf.data.fingerprint import codes_fingerprint
from dq_hf.data.images import ImageCollator, load_images
from dq_hf.hub.card import write_model_card
from dq_hf.hub.folders import whole_folder
from dq_hf.loading import load_tokenizer
from dq_hf.metrics.psnr import psnr
from dq_hf.pictures import captioned_grid, draw_grain_map, enlarge, image_grid
from dq_hf.training.generator import evaluate
from dq_hf.training.text import WRONG_CAPTIONS, CaptionBatches, GeneratorWithText, TrainedText

SPLITS = {"test": "held-out concepts", "test_pairs": "held-out styles of other concepts"}
ARTICLE = r"^\s*(an?|the)\s+(?!button)"
CAPTION_COLUMN = "captions"
BATCH_SIZE = 32
COLUMNS = 8  # of the samples
CONCEPT = "crown"  # in all styles, one of which is held out, and as guidance grows
GUIDANCE = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0)
NUM_RECONSTRUCTIONS = 24
SCALE = 2  # of all pictures

SUMMARY = """\
The model that dq_hf carries with it: a DQ-VAE, a DQ-Transformer and a small text encoder ({parameters}
parameters), trained on captioned emoji in {num_styles} styles ({styles}). It shows what dynamic vector
quantisation does, right after installing and offline; it is small, and takes prompts such as "{concept}, {style} style"."""

SAMPLES = """\
Samples, not chosen. First the {num_prompts} prompts of `{prompts}`, drawn at random from the captions of the training images:
`dq-hf generate --prompts-file {prompts} -n {num_prompts} --seed 0`. Then one concept in all styles (not seen in training: {unseen}),
and one prompt as guidance grows, all from seed 0. What is not given is {sampling} (`sampling_defaults` in the configuration)."""

RECONSTRUCTIONS = "The first held-out images of split `test`, their variable-length coding, and their reconstructions."

DATA = """\
{num_train:,} training pictures; held out are {held_out}. All were measured, with the shipped (bfloat16) weights, computed in
float32.

The pictures come from Google's Noto Emoji, of today and of 2017 (copyright Google LLC, Apache License 2.0), Twitter's Twemoji
(copyright Twitter, Inc and other contributors, CC-BY 4.0) and Microsoft's Fluent Emoji, flat and 3D (copyright Microsoft
Corporation, MIT licence, packaged by LobeHub); the captions from Emojibase (copyright 2017-2019 Miles Johnson, MIT licence),
whose texts are from Unicode's CLDR (Unicode License v3). The pictures were rendered on white. The weights are derived from
all of them; keep this notice when you pass them on. The licences in full: `{data}/NOTICE.md` of the repository."""

LIMITS = """\
Trained on few pictures of emoji: other images are reconstructed coarsely, and small text and small faces are lost. The
generator knows the words of its captions only, and a prompt is at most {text_length} words; an article at its beginning is left out,
because in the captions "a" is a blood type. Letters, digits, small marks on flags and thin parts mostly become blobs, and
concepts that it has seen in no style become other ones."""


@dataclass
class Arguments:
    model: str = field(metadata={"help": "folder of a finished model with text, that train_dqtransformer.py wrote"})
    output_dir: str = DEFAULT_MODEL
    data: str = field(default="examples/data/emoji", metadata={"help": "images that it was trained on"})
    prompts: str = field(
        default="examples/data/prompts.txt", metadata={"help": "text file with a prompt a line, for the samples"}
    )
    commands: str = field(
        default="examples/configs/emoji_gpu.sh", metadata={"help": "the training commands, for the card"}
    )
    checkpoint: str | None = field(
        default=None,
        metadata={"help": "take the weights that the run had at this checkpoint, averaged ones if it averages"},
    )
    vae: str | None = field(
        default=None, metadata={"help": "take this tokenizer; only its decoder may differ from that of the run"}
    )
    temperature: float = field(default=0.85, metadata={"help": "becomes the model's default, like the next two"})
    top_p: float = 0.9
    guidance_scale: float = 3.0
    steps: str = field(default="", metadata={"help": "a sentence on steps and duration, for the card"})
    findings: str | None = field(
        default=None, metadata={"help": "Markdown file for the card's figures, such as text_alignment.py writes"}
    )


@torch.no_grad()
def main():
    args = HfArgumentParser(Arguments).parse_args_into_dataclasses()[0]
    prompts = Path(args.prompts).read_text("utf-8").splitlines()
    findings = None if args.findings is None else Path(args.findings).read_text("utf-8").strip()
    model = chosen_model(args)
    with whole_folder(args.output_dir) as folder:
        save_bfloat16(model, folder)
        figures = complete(args, folder, prompts, findings)
    size = sum(path.stat().st_size for path in Path(args.output_dir).rglob("*") if path.is_file())
    print(json.dumps(figures | {"megabytes": size / 1e6}, indent=2))


def complete(args, folder, prompts, findings):
    """Put pictures and card into the folder of the model; the figures of the card."""
    for pictures in folder.glob("origin*"):  # of the run's card, which the one below takes the place of
        shutil.rmtree(pictures)
    model = DQForImageGeneration.from_pretrained(folder)
    sets = {split: load_images(args.data, split) for split in SPLITS}
    train_set = load_images(args.data, "train")
    styles = train_set.features["style"].names
    figures, tables = measure(model, sets, styles)
    draw_reconstructions(model, sets["test"]).save(folder / "reconstructions.png")
    draw_samples(model, prompts, styles).save(folder / "samples.png")
    config = model.transformer.config
    sampling = ", ".join(f"{name} {value}" for name, value in config.sampling_defaults.items())
    pairs = sets["test_pairs"].select_columns([CAPTION_COLUMN, "style"])
    unseen = [styles[row["style"]] for row in pairs if row[CAPTION_COLUMN][0] == CONCEPT]
    held_out = ", ".join(f"{len(rows):,} of {SPLITS[split]} (`{split}`)" for split, rows in sets.items())
    write_model_card(
        folder,
        model.config,
        title=Path(args.output_dir).name,
        summary=SUMMARY.format(
            parameters=" + ".join(f"{part.num_parameters():,}" for part in model.parts.values()),
            num_styles=len(styles),
            styles=", ".join(styles),
            concept=CONCEPT,
            style=styles[-1],
        ),
        dataset=args.data,
        test_split="test",
        metrics=figures,
        findings="\n\n".join(part for part in (tables, findings) if part),
        data=DATA.format(num_train=len(train_set), held_out=held_out, data=args.data),
        training=args.steps,
        command=Path(args.commands).read_text().rstrip(),
        limits=LIMITS.format(text_length=config.text_length),
        license="cc-by-4.0",
        captions={
            "samples.png": SAMPLES.format(
                num_prompts=len(prompts),
                prompts=args.prompts,
                unseen=", ".join(unseen) or "none",
                sampling=sampling,
            ),
            "reconstructions.png": RECONSTRUCTIONS,
        },
    )
    return figures


# Weights


def chosen_model(args):
    """The model of the run, with the weights, the tokenizer and the sampling defaults that were asked for."""
    model = DQForImageGeneration.from_pretrained(args.model)
    if model.text_encoder is None or model.tokenizer is None:
        raise ValueError(f"--model must hold a text encoder and its tokenizer, and {args.model} does not")
    if args.checkpoint is not None:
        load_checkpoint(model, Path(args.checkpoint))
    if args.vae is not None:
        vae = load_tokenizer(args.vae)
        if codes_fingerprint(vae) != codes_fingerprint(model.vae):
            raise ValueError(
                f"{args.vae} must give the codes that the generator of {args.model} learned, got other ones"
            )
        model.vae = vae
    leave_out_articles(model.tokenizer)
    model.transformer.config.sampling_defaults = {
        "temperature": args.temperature,
        "top_p": args.top_p,
        "guidance_scale": args.guidance_scale,
    }
    return model


def leave_out_articles(tokenizer):
    """Let "a red heart" be read as "red heart".

    No caption of the emoji begins with an article but "A button (blood type)", which "a" would stand for.
    """
    backend = tokenizer.backend_tokenizer
    own = [] if backend.normalizer is None else [backend.normalizer]
    backend.normalizer = normalizers.Sequence([*own, normalizers.Replace(Regex(ARTICLE), "")])


def load_checkpoint(model, checkpoint):
    """Give generator and text encoder their weights at a checkpoint, the moving average of them if the run has one."""
    trained = GeneratorWithText(model.transformer, model.text_encoder)
    trained.load_state_dict(load_file(checkpoint / "model.safetensors"))
    for path in checkpoint.glob("custom_checkpoint_*.pkl"):  # of what the run keeps beside the model
        state = torch.load(path, weights_only=True)
        if "shadow_params" in state:
            for parameter, value in zip(trained.parameters(), state["shadow_params"], strict=True):
                parameter.copy_(value)


def save_bfloat16(model, folder):
    """Weights in bfloat16 but the codebook; the configuration says float32, so that loading computes in float32."""
    weights = {key: value if ".quantizer." in key else value.bfloat16() for key, value in model.state_dict().items()}
    model.save_pretrained(folder, state_dict=weights)


# Figures


def measure(model, sets, styles):
    """Figures of the first of the sets, {name: value}, and Markdown tables of all."""
    by_style = ["| held out | " + " | ".join([*styles, "all"]) + " |", "|---|" + "---:|" * (len(styles) + 1)]
    by_caption = ["| held out | right caption | none | another picture's |", "|---|---:|---:|---:|"]
    figures = {}
    for split, rows in sets.items():
        name = f"{SPLITS[split]} (`{split}`)"
        quality = torch.tensor(reconstruction_figures(model.vae, rows, split), dtype=torch.float64)
        own = torch.tensor(rows["style"])
        means = [quality[own == style].mean(0).tolist() for style in range(len(styles))] + [quality.mean(0).tolist()]
        losses = held_out_losses(model, rows, split)
        costs = [losses[f"test_content_loss{kind}"] for kind in ("", "_no_text", "_wrong_text")]
        by_style.append(f"| {name} | " + " | ".join(f"{value:.2f} ({codes:.0f})" for value, codes in means) + " |")
        by_caption.append(f"| {name} | " + " | ".join(f"{cost:.3f}" for cost in costs) + " |")
        if not figures:
            value, codes = means[-1]
            bits = codes * math.log2(model.vae.config.codebook_size)
            figures = {"psnr": value, "codes_per_image": codes, "code_bits_per_image": bits} | {
                name: losses[f"test_{name}"] for name in ("content_loss", "text_worth", "position_loss")
            }
    lines = ["PSNR in dB, and in brackets codes an image, by style:", "", *by_style, ""]
    lines += ["Content loss, nats an element, with each of three captions:", "", *by_caption]
    return figures, "\n".join(lines)


def reconstruction_figures(vae, rows, split):
    """(PSNR, codes) of every image."""
    figures = []
    collate = ImageCollator(DQImageProcessor.for_model(vae.config))
    for batch in tqdm(DataLoader(rows, BATCH_SIZE, collate_fn=collate), desc=f"reconstruct {split}"):
        encoded = vae.encode(batch["pixel_values"])
        decoded = vae.decode_codes(encoded.codes).sample.clamp(-1, 1)
        values = psnr(decoded, batch["pixel_values"])
        figures += zip(values.tolist(), encoded.num_codes.tolist())
    return figures


def held_out_losses(model, rows, split):
    """Losses as in the run's log, but of these weights."""
    text = TrainedText(model.tokenizer, model.text_encoder, model.transformer.config.text_length)
    more = CaptionBatches(text, CAPTION_COLUMN, seed=0, wrong_column=WRONG_CAPTIONS)
    rows = with_wrong_captions(rows, CAPTION_COLUMN, WRONG_CAPTIONS)
    collate = ImageCollator(DQImageProcessor.for_model(model.vae.config), more=more)
    loader = tqdm(DataLoader(rows, BATCH_SIZE, collate_fn=collate), desc=f"predict {split}")
    generator = text.join(model.transformer)
    return evaluate(Accelerator(cpu=True), model.vae, generator, loader, generator.config, text)


# Pictures


def draw_reconstructions(model, rows):
    """The first images with their coding, and below each its reconstruction."""
    processor = DQImageProcessor.for_model(model.vae.config)
    batch = ImageCollator(processor)([rows[i] for i in range(min(NUM_RECONSTRUCTIONS, len(rows)))])
    encoded = model.vae.encode(batch["pixel_values"])
    originals = processor.post_process(batch["pixel_values"])
    decoded = processor.post_process(model.vae.decode_codes(encoded.codes).sample)
    codings = [draw_grain_map(*pair, SCALE) for pair in zip(originals, encoded.grain_map)]
    pairs = [[coding, enlarge(image, SCALE)] for coding, image in zip(codings, decoded)]
    return image_grid([image_grid(pair, columns=1) for pair in pairs], columns=NUM_RECONSTRUCTIONS // 2)


def draw_samples(model, prompts, styles):
    """Samples with their prompts below them: the prompts, one concept in all styles, and one prompt as guidance grows."""
    processor = DQImageProcessor.for_model(model.vae.config)

    def sample(prompts, generator, **options):
        return processor.post_process(model.generate(prompt=prompts, generator=generator, **options).pixel_values)

    def seeded():
        return torch.Generator().manual_seed(0)

    in_styles = [f"{CONCEPT}, {style} style" for style in styles]
    in_guidance = [f"{in_styles[-1]}, guidance {scale:g}" for scale in GUIDANCE]
    rows = [
        (sample(prompts, seeded()), prompts),
        (sample(in_styles, [seeded() for _ in styles]), in_styles),
        ([sample(in_styles[-1], seeded(), guidance_scale=scale)[0] for scale in GUIDANCE], in_guidance),
    ]
    images, captions = [], []
    for some, their_captions in rows:
        missing = -len(some) % COLUMNS  # to the end of the row
        images += [*some, *[Image.new("RGB", some[0].size, "white")] * missing]
        captions += [*their_captions, *[""] * missing]
    return captioned_grid(images, captions, COLUMNS, SCALE)


if __name__ == "__main__":
    main()
