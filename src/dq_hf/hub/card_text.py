"""What a model card says: the terms of figures, facts of a configuration, and code for each kind of model."""

import json
import math

TERMS = {  # of measured figures: name and unit
    "psnr": ("PSNR of the reconstructions, mean over images", "dB"),
    "codes_per_image": ("codes an image, mean", ""),
    "code_bits_per_image": ("code bits an image, mean", "bits"),
    "l1": ("mean absolute error, images in [-1, 1]", ""),
    "perceptual": ("perceptual distance", ""),
    "vq": ("vector quantisation loss", ""),
    "budget": ("budget loss", ""),
    "g_loss": ("generator's adversarial loss", ""),
    "d_loss": ("discriminator's hinge loss", ""),
    "d_r1": ("discriminator's R1 penalty, before gamma / 2", ""),
    "d_lecam": ("discriminator's LeCam regularisation", ""),
    "lambda": ("adaptive weight of the adversarial loss", ""),
    "grad_norm": ("norm of the gradient", ""),
    "lr": ("learning rate", ""),
    "codebook_usage": ("share of the codebook in use", ""),
    "perplexity": ("perplexity of the codes", ""),
    "loss": ("loss, all terms", ""),
    "content_loss": ("content loss", "nats an element"),
    "text_worth": ("content loss without the caption, less that with it", "nats an element"),
    "position_loss": ("position loss, mean of coarse and fine", "nats an element"),
    "nats_per_code": ("contents and positions of a stream, over its codes", "nats a code"),
}
PICTURES = {  # files that a card shows if the folder has them
    "samples.png": "Samples.",
    "reconstructions.png": "Held-out images, their variable-length coding, and their reconstructions.",
}
NOUNS = {"vae": "tokenizer", "transformer": "generator", "text_encoder": "text encoder"}  # of a part of a model
PROMPT = "a red heart"  # of the code that a card shows


def model_facts(config):
    """What the configuration says that a reader wants to know first."""
    facts = {}
    if vae := tokenizer_of(config):
        sides = " and ".join(f"{side} x {side}" for side in vae.granularities)
        facts |= {
            "image size": " x ".join(map(str, vae.image_height_width)),
            "granularities": f"{sides} pixels a code",
            "router": vae.router if len(vae.granularities) > 1 else None,
            "codebook": f"{vae.codebook_size:,} codes of {vae.codebook_dim} numbers",
        }
    if generator := generator_of(config):
        layers = f"{generator.num_position_layers} for positions, {generator.num_content_layers} for contents"
        if vae is None:
            grids = " and ".join(" x ".join(map(str, grid)) for grid in generator.grid_sizes)
            facts |= {"grids of codes": grids, "codebook": f"{generator.codebook_size:,} codes"}
        text = getattr(config, "text_encoder_config", None)
        encoder = f" of a {text.architectures[0]}" if text is not None and text.architectures else ""
        facts["text"] = f"{generator.text_length} tokens{encoder}" if generator.text_length is not None else None
        facts |= {"classes": generator.num_classes or None, "layers": f"{layers}, width {generator.hidden_size}"}
    return facts


def known_limits(config, measured_on, held_out=True):
    """Sentences that follow from the configuration and from what was measured."""
    vae, generator = tokenizer_of(config), generator_of(config)
    if vae:
        codes = [rows * columns for rows, columns in vae.grid_sizes]
        span = f"between {codes[0]:,} and {codes[-1]:,}" if len(codes) > 1 else f"{codes[0]:,}"
        size = " x ".join(map(str, vae.image_height_width))
        yield f"Coding loses detail: an image of {size} becomes {span} codes of {math.log2(vae.codebook_size):.4g} bits."
    if generator and vae:
        classes = f", and only of its {generator.num_classes} classes" if generator.num_classes else ""
        yield f"Images are generated at {size} pixels only{classes}."
    elif generator:
        yield "Its codes mean something only to the tokenizer that it was trained with."
    if measured_on:
        images = "held-out" if held_out else "training"
        yield f"The figures were measured on {images} images of {measured_on}; for other images they are not known."


def tokenizer_of(config):
    """The configuration of the DQ-VAE, if there is one."""
    return config if config.model_type == "dqvae" else getattr(config, "vae_config", None)


def generator_of(config):
    """The configuration of the DQ-Transformer, if there is one."""
    return config if config.model_type == "dqtransformer" else getattr(config, "transformer_config", None)


def section(heading, *parts):
    """A heading and those of its parts that say something; nothing if none does."""
    parts = [part for part in parts if part]
    return [f"## {heading}", *parts] if parts else []


def table(facts, head=""):
    """Markdown for {name: value}, without those that are None; an empty text if none is left."""
    rows = [f"| {name} | {cell(value)} |" for name, value in facts.items() if value is not None]
    return "\n".join([f"| {head} | |", "|---|---|", *rows]) if rows else ""


def figures(values, head):
    """A table of measured figures with their text and unit."""
    rows = {}
    for name, value in (values or {}).items():
        text, unit = term(name)
        rows[name if text in rows else text] = f"{cell(value)} {unit}".strip()
    return table(rows, head)


def cell(value):
    """A number with four digits, a whole one with all; text as it is, safe in a table."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else str(value).replace("|", "\\|").replace("\n", " ")


def term(name):
    """Text and unit of a figure."""
    if name.startswith("share_"):
        return f"share of regions with {name[6:]} x {name[6:]} pixels a code", ""
    return TERMS.get(name.removeprefix("test_"), (name, ""))


def vae_usage(config, name, folder):
    """Code for a tokenizer, with its image processor if the folder has it."""
    processor = f'DQImageProcessor.from_pretrained("{name}")'
    if not (folder / "preprocessor_config.json").is_file():
        height, width = config.image_height_width
        processor = f'DQImageProcessor(size={{"height": {height}, "width": {width}}})'
    return VAE_USAGE.format(name=name, processor=processor)


def transformer_usage(config, name, folder):
    """Code for a generator, with the first class if there are classes."""
    return TRANSFORMER_USAGE.format(name=name, labels="class_labels=[0], " if config.num_classes else "")


def joint_usage(config, name, folder):
    """Code for both pipelines, with a prompt if there is a text encoder, and the first class if there are classes."""
    has_text = config.text_encoder_config is not None
    inputs = [f'"{PROMPT}"'] if has_text else []
    arguments = [*inputs]
    if config.transformer_config.num_classes:
        label = json.dumps(config.id2label[0], ensure_ascii=False)
        inputs = [f'{{"prompt": "{PROMPT}", "class_label": {label}}}' if has_text else label]
        arguments.append(f"class_labels=[{label}]")
    arguments += [
        f"num_images_per_{'prompt' if has_text else 'label'}=4",
        "generator=torch.Generator().manual_seed(0)",
    ]
    return JOINT_USAGE.format(name=name, inputs=", ".join([*inputs, "seed=0"]), arguments=", ".join(arguments))


def task_of(config):
    """The Hub's task of a model."""
    generator = generator_of(config)
    has_text = generator is not None and generator.text_length is not None
    return "text-to-image" if has_text else KINDS[config.model_type]["task"]


KINDS = {  # by model_type: the Hub's task, tags, what it is, and the code that uses it
    "dqvae": {
        "task": "image-feature-extraction",
        "tags": ["image-tokenizer"],
        "summary": "A DQ-VAE: an image tokenizer that spends more codes where the picture needs them.",
        "usage": vae_usage,
    },
    "dqtransformer": {
        "task": "unconditional-image-generation",
        "tags": ["image-generation"],
        "summary": "A DQ-Transformer: it generates the variable-length codes of a DQ-VAE from coarse to fine.",
        "usage": transformer_usage,
    },
    "dq": {
        "task": "unconditional-image-generation",
        "tags": ["image-tokenizer", "image-generation"],
        "summary": "A DQ-VAE, an image tokenizer with variable-length codes, and a DQ-Transformer, which generates such "
        "codes from coarse to fine.",
        "usage": joint_usage,
    },
}

VAE_USAGE = """\
```python
from PIL import Image
from dq_hf import DQImageProcessor, DQVAEModel

vae = DQVAEModel.from_pretrained("{name}")
processor = {processor}
pixel_values = processor(Image.open("image.png"))["pixel_values"]  # (1, 3, height, width) in [-1, 1]

encoded = vae.encode(pixel_values)  # .codes (1, H, W), .grain_map (1, h, w), .num_codes (1,)
image = processor.post_process(vae.decode_codes(encoded.codes).sample)[0]
```"""

TRANSFORMER_USAGE = """\
```python
import torch
from dq_hf import DQTransformerForImageGeneration

transformer = DQTransformerForImageGeneration.from_pretrained("{name}")
generated = transformer.generate({labels}generator=torch.Generator().manual_seed(0))
generated.codes, generated.grain_map  # (1, H, W), (1, h, w)
```

With its tokenizer, `dq_hf.DQForImageGeneration.from_models(vae, transformer)` generates images."""

JOINT_USAGE = """\
```python
import dq_hf
from transformers import pipeline

generate = pipeline("dq-generation", model="{name}")
generate({inputs})["image"].save("sample.png")
```

With diffusers:

```python
import torch
from dq_hf import DQPipeline

pipe = DQPipeline.from_pretrained("{name}")
images = pipe({arguments}).images
```"""

CITATION = """\
The method: [Towards Accurate Image Coding: Improved Autoregressive Image Generation with Dynamic Vector
Quantization](https://arxiv.org/abs/2305.11718).

```bibtex
@inproceedings{huang2023towards,
  title = {Towards Accurate Image Coding: Improved Autoregressive Image Generation with Dynamic Vector Quantization},
  author = {Huang, Mengqi and Mao, Zhendong and Chen, Zhuowei and Zhang, Yongdong},
  booktitle = {IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)},
  year = {2023},
  note = {arXiv:2305.11718}
}
```"""
