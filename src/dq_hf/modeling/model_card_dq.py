"""Model cards: what a folder says of its model, from facts alone, and the cards that travel with loaded models.

A card that ends in `MARK` is rewritten when another model is saved or pushed over it. Without that line it belongs to its
owner, and stays.
"""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch
import yaml
from huggingface_hub import EvalResult, ModelCardData, hf_hub_download, is_offline_mode, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import validate_repo_id
from transformers.utils import logging

logger = logging.get_logger(__name__)

MARK = "<!-- Written by dq_hf. Without this line the card stays when a model is saved or pushed over this one. -->"
UNNAMED = "path/to/this/folder"  # in the code of a card whose model has no repository yet
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
    "lambda": ("adaptive weight of the adversarial loss", ""),
    "grad_norm": ("norm of the gradient", ""),
    "lr": ("learning rate", ""),
    "codebook_usage": ("share of the codebook in use", ""),
    "perplexity": ("perplexity of the codes", ""),
    "loss": ("loss, all terms", ""),
    "content_loss": ("content loss", "nats an element"),
    "position_loss": ("position loss, mean of coarse and fine", "nats an element"),
    "nats_per_code": ("contents and positions of a stream, over its codes", "nats a code"),
}
PICTURES = {  # files that a card shows if the folder has them
    "samples.png": "Samples.",
    "reconstructions.png": "Held-out images, their variable-length coding, and their reconstructions.",
}
PICTURE_SUFFIXES = {".png", ".jpg", ".jpeg", ".gif", ".webp", ".svg"}
NOUNS = {"vae": "tokenizer", "transformer": "generator"}  # of a part of a model


@dataclass(frozen=True)
class SourceCard:
    """The card that a loaded model came with.

    Args:
        text: of its README.md.
        pictures: {path: bytes} of the pictures that it shows from its own folder.
        repository: "user/name", None for a local folder.
        part: sub-folder of the model in what the card describes, "" if it describes this model alone.
        state: `model_state` of the model as it was loaded.
    """

    text: str
    pictures: dict
    repository: str | None
    part: str
    state: dict

    @property
    def title(self):
        found = re.search(r"^# (.+)$", self.text, re.MULTILINE)
        return found[1].strip() if found else self.repository or "another model"

    def still_describes(self, model):
        """Whether the model's weights and configuration are those that were loaded, up to their dtype."""
        state = model_state(model)
        return state.keys() == self.state.keys() and all(map(is_same, self.state.values(), state.values()))


def model_state(model):
    """What a change of the model would change: its configuration, and up to 1,024 values of each of its weights."""
    state = {f"config.{name}": getattr(model.config, name) for name in sorted(model.config.own_field_names())}
    for name, value in model.state_dict().items():
        readable = type(value) is torch.Tensor and not value.is_meta  # else it was quantised, sharded or put away
        state[name] = value.flatten()[:: math.ceil(value.numel() / 1024) or 1].cpu().clone() if readable else None
    return state


def is_same(before, after):
    """Whether two values of `model_state` are equal; None is a weight that cannot be told."""
    if isinstance(before, torch.Tensor) and isinstance(after, torch.Tensor):
        return before.shape == after.shape and torch.equal(before.to(after.dtype), after)
    return before == after and not isinstance(before, torch.Tensor)


# Reading


def read_source_card(model, source, subfolder="", **hub_arguments):
    """The `SourceCard` of a model just loaded from this folder or repository, or None if that has no card.

    It lies beside the model's configuration or, for a part of a pipeline, in the pipeline's folder.

    Raises:
        ConnectionError: the repository did not answer.
    """
    source, subfolder = str(source), "/".join(Path(subfolder or "").parts)
    if Path(source).is_dir():
        source, subfolder = str(Path(source, subfolder).absolute()), ""
        above = [(str(Path(source).parent), "")]
    else:
        above = [(source, subfolder.rpartition("/")[0])] if subfolder else []

    def find(place, name):
        return find_file(place[0], f"{place[1]}/{name}".removeprefix("/"), **hub_arguments)

    place, part = (source, subfolder), ""
    card = find(place, "README.md")
    if card is None and above and find(above[0], "model_index.json"):
        place, part = above[0], Path(subfolder or source).name
        card = find(place, "README.md")
    if card is None:
        if may_be_uncached(source, f"{subfolder}/README.md".removeprefix("/"), **hub_arguments):
            logger.warning(f"no card of {source} is in the cache; where this model is saved, it will have a new one")
        return None
    text = card.read_text(encoding="utf-8", errors="replace")
    found = {path: find(place, path) for path in pictures_of(text)}
    pictures = {path: file.read_bytes() for path, file in found.items() if file is not None}
    for path in found.keys() - pictures.keys():
        if may_be_uncached(source, f"{place[1]}/{path}".removeprefix("/"), **hub_arguments):
            logger.warning(f"{path} of {source} is not in the cache; where this model is saved, it will be missing")
    return SourceCard(text, pictures, None if Path(source).is_dir() else source, part, model_state(model))


def find_file(source, path, *, local_files_only=False, **hub_arguments):
    """A file of a folder, or of a repository (it is then in the cache); None if there is none."""
    if Path(source).is_dir():
        return Path(source, path) if Path(source, path).is_file() else None
    known = {name: hub_arguments.get(name) for name in ("cache_dir", "revision")}
    cached = try_to_load_from_cache(source, path, **known)
    if re.fullmatch("[0-9a-f]{40}", known["revision"] or "") and cached is not None:  # a commit does not change
        return Path(cached) if isinstance(cached, str) else None
    try:
        return Path(hf_hub_download(source, path, local_files_only=local_files_only, **hub_arguments))
    except LocalEntryNotFoundError as error:
        if not (local_files_only or is_offline_mode()):
            raise ConnectionError(f"{source}: its card's file {path} could not be fetched: {error}") from error
    except EntryNotFoundError:
        pass
    return None


def may_be_uncached(source, path, *, local_files_only=False, cache_dir=None, revision=None, **hub_arguments):
    """Whether a repository that is read from the cache alone may have this file, which is not there."""
    if Path(source).is_dir() or not (local_files_only or is_offline_mode()):
        return False
    return try_to_load_from_cache(source, path, cache_dir, revision) is None  # else it is known not to exist


def pictures_of(text):
    """Paths of the pictures that a card shows from its own folder, in order, each once."""
    shown = re.findall(r"!\[[^\]]*\]\(\s*([^)\s]+)|<img\b[^>]*?\bsrc=[\"']([^\"']+)", text)
    paths = [PurePosixPath(markdown or html) for markdown, html in shown]
    return list(dict.fromkeys(str(path) for path in paths if is_own_picture(path)))


def is_own_picture(path):
    """Whether it can be no place but one in the card's folder, and no file but a picture."""
    outside = path.is_absolute() or ".." in path.parts or re.search(r"[\\:?*\[\]]", str(path))
    return path.suffix.lower() in PICTURE_SUFFIXES and not outside


def split_card(text):
    """Header (a dictionary, empty if there is none or it is no YAML) and body."""
    match = re.match(r"\s*---\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|$)(.*)", text, re.DOTALL)
    try:
        header = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError:
        header = None
    return (header, match[2]) if isinstance(header, dict) else ({}, text)


# Writing


def travelling_card(parts):
    """The one card with which all parts of a model, {sub-folder: model}, were loaded, if it is still true; else None."""
    cards = {name: part.source_card for name, part in parts.items()}
    if any(card is None or card.part != name for name, card in cards.items()):
        return None
    if len({card.text for card in cards.values()}) > 1:
        return None
    true = all(card.still_describes(parts[name]) for name, card in cards.items())
    return next(iter(cards.values())) if true else None


def save_card(folder, config, parts, title, repository=None):
    """Write `README.md` into a folder that a model was just saved to: the card it came with, or a new one.

    Args:
        folder: of the model's files.
        config: the model's configuration.
        parts: {sub-folder: model}, {"": model} for a single one.
        title: of a new card.
        repository: "user/name", where the folder goes, if it is known.
    """
    card = travelling_card(parts)
    if card is None:
        write_model_card(folder, config, parts, title=title, repository=repository)
        return
    text = card.text
    for name in (UNNAMED, card.repository) if repository else ():
        text = text.replace(f'"{name}"', f'"{repository}"')  # in its code
    write_files(folder, {"README.md": text.encode()} | card.pictures)


def write_model_card(
    folder,
    config,
    parts=None,
    *,
    title,
    summary=None,
    repository=None,
    dataset=None,
    test_split=None,
    metrics=None,
    losses=None,
    data=None,
    training=None,
    command=None,
    limits=None,
    license=None,
    captions=None,
):
    """Write `README.md` into a model's folder and return its path. What is not known is left out.

    Args:
        folder: of a DQ-VAE, a DQ-Transformer or both; it may hold `PICTURES`.
        config: the model's configuration, for size, granularities, router, classes.
        parts: {sub-folder: model} of the models whose own cards are to be told: those that they were loaded with.
        title, summary: a line and a paragraph.
        repository: "user/name", for the code that shows how to load the model.
        dataset: images that it was trained on: a local folder, or a Hub id, which the header then names.
        test_split: where `metrics` were measured.
        metrics: {name: value} on held-out images; `TERMS` gives names of the scripts a text and a unit.
        losses: {name: value} of the last training steps, likewise.
        data, training: {text: value} for the tables of these sections, values that are None are left out; or Markdown.
        command: shell commands that trained it.
        limits: Markdown, besides what follows from the configuration.
        license: identifier of the Hub, such as "mit".
        captions: {file: text} for the pictures, instead of those in `PICTURES`.
    """
    folder, kind = Path(folder), KINDS[config.model_type]
    held_out = f"held out, split `{test_split}`" if test_split else "held out"
    captions = PICTURES | (captions or {})
    pictures = [
        f"![{Path(file).stem}]({file})\n\n{text}" for file, text in captions.items() if (folder / file).is_file()
    ]
    origins, files = tell_origins(parts or {})
    data = [table({"images": dataset}), data] if isinstance(data, str) else [table({"images": dataset} | (data or {}))]
    training = training if isinstance(training, str) else table(training or {})
    sections = [
        f"# {title}",
        summary or kind["summary"],
        table(model_facts(config)),
        *section("Use", kind["usage"](config, repository or UNNAMED, folder)),
        *section("Measured", figures(metrics, held_out), figures(losses, "end of the training"), *pictures),
        *section("Data", *data),
        *section("Training", training, command and f"```\n{command}\n```"),
        *section("Limits", limits, *known_limits(config, dataset if metrics else None)),
        *origins,
        *section("Citation", CITATION),
        MARK,
    ]
    header = card_header(config, title, dataset, test_split, metrics or {}, license, parts or {})
    text = f"---\n{header}\n---\n\n" + "\n\n".join(sections) + "\n"
    write_files(folder, files | {"README.md": text.encode()})
    return folder / "README.md"


def write_files(folder, files):
    """Write {path: bytes} into a folder."""
    for path, content in files.items():
        Path(folder, path).parent.mkdir(parents=True, exist_ok=True)
        Path(folder, path).write_bytes(content)


def merge_with_owner(text, owners):
    """The card to put where an owner's card lies: `text`, with the header of one that is only a header; None: theirs stays."""
    if MARK in owners:
        return text
    header, body = split_card(owners)
    if body.strip():
        return None
    own_header, own_body = split_card(text)
    return f"---\n{dump(own_header | header)}\n---\n{own_body}"


def dump(header):
    """YAML of a card's header."""
    return yaml.safe_dump(header, sort_keys=False, allow_unicode=True).rstrip()


def card_header(config, title, dataset, test_split, metrics, license, parts):
    """The YAML that the Hub reads."""
    kind = KINDS[config.model_type]
    on_hub = dataset is not None and is_hub_dataset(dataset)
    cards = [part.source_card for part in parts.values() if part.source_card is not None]
    headers = [split_card(card.text)[0] for card in cards]
    datasets = [dataset] if on_hub else []
    for header in headers:
        named = header.get("datasets") or []
        datasets += [named] if isinstance(named, str) else named
    licences = {header.get("license") for header in headers}
    same = all(part.source_card and part.source_card.still_describes(part) for part in parts.values())
    if is_whole(parts) and same and len(licences) == 1:
        license = license or licences.pop()
    results = [
        EvalResult(
            task_type=kind["task"],
            dataset_type=dataset if on_hub else "custom",
            dataset_name=dataset,
            dataset_split=test_split,
            metric_type=name,
            metric_name=term(name)[0],
            metric_value=value,
        )
        for name, value in metrics.items()
        if dataset is not None and math.isfinite(value)  # the Hub wants to know on what
    ]
    bases = list(dict.fromkeys(card.repository for card in cards if card.repository))
    return ModelCardData(
        library_name="transformers",
        pipeline_tag=kind["task"],
        license=license,
        datasets=list(dict.fromkeys(datasets)) or None,
        metrics=[name for name, value in metrics.items() if math.isfinite(value)] or None,
        base_model=bases or None,
        tags=["dq_hf", "vector-quantization", *kind["tags"]],
        model_name=title if results else None,
        eval_results=results or None,
    ).to_yaml()


def is_hub_dataset(dataset):
    """Whether this is a Hub id, not a place on this machine."""
    try:
        validate_repo_id(dataset)
    except HFValidationError:
        return False
    return not Path(dataset).exists()


def tell_origins(parts):
    """Sections of the cards that parts of a model came with, and {path: bytes} of their pictures."""
    told = {}  # text: names of the parts that it came with
    for name, part in parts.items():
        if part.source_card is not None:
            told.setdefault(part.source_card.text, []).append(name)
    sections, files = [], {}
    for names in told.values():
        card = parts[names[0]].source_card
        whose = "" if is_whole(names) else f" of the {NOUNS[names[0]]}"
        same = all(parts[name].source_card.still_describes(parts[name]) for name in names)
        link = card.title if card.repository is None else f"[{card.title}](https://huggingface.co/{card.repository})"
        whole = f"the {NOUNS[card.part]} of {link}" if len(names) == 1 and card.part in NOUNS else link
        words = "Weights and configuration are those of" if same else "Weights or configuration are no longer those of"
        licence = split_card(card.text)[0].get("license")
        folder = "origin" if is_whole(names) else f"origin-{names[0]}"
        sections += [
            f"## Origin{whose}",
            f"{words} {whole}, whose card says:",
            *([f"Licence: {licence}"] if licence else []),
            *quote(card, folder),
        ]
        files |= {f"{folder}/{path}": content for path, content in card.pictures.items()}
    return sections, files


def is_whole(names):
    """Whether these sub-folders are all of a model."""
    return set(names) in ({""}, set(NOUNS))


def quote(card, folder):
    """A card's body, as a part of a section, with its pictures in `folder`."""
    body = split_card(card.text)[1].replace(MARK, "").replace(f"## Citation\n\n{CITATION}", "")
    for path in card.pictures:
        body = re.sub(rf"(\]\(\s*|src=[\"']){re.escape(path)}(?=[)\s\"'])", rf"\g<1>{folder}/{path}", body)
    pieces = re.split(r"(^```.*?^```$)", body, flags=re.DOTALL | re.MULTILINE)  # code stays as it is
    pieces[::2] = [re.sub(r"^(#{1,4}) ", r"\1## ", piece, flags=re.MULTILINE) for piece in pieces[::2]]
    body = "".join(pieces).strip()
    return [body] if body else []


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
        facts |= {"classes": generator.num_classes or None, "layers": f"{layers}, width {generator.hidden_size}"}
    return facts


def known_limits(config, measured_on):
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
        yield f"The figures were measured on held-out images of {measured_on}; for other images they are not known."


def tokenizer_of(config):
    """The configuration of the DQ-VAE, if there is one."""
    return {"dq": getattr(config, "vae_config", None), "dqvae": config}.get(config.model_type)


def generator_of(config):
    """The configuration of the DQ-Transformer, if there is one."""
    return {"dq": getattr(config, "transformer_config", None), "dqtransformer": config}.get(config.model_type)


def section(heading, *parts):
    """A heading and those of its parts that say something; nothing if none does."""
    parts = [part for part in parts if part]
    return [f"## {heading}", *parts] if parts else []


def table(facts, head=""):
    """Markdown for {name: value}, without those that are None; an empty text if none is left."""
    rows = [f"| {name} | {shown(value)} |" for name, value in facts.items() if value is not None]
    return "\n".join([f"| {head} | |", "|---|---|", *rows]) if rows else ""


def figures(values, head):
    """A table of measured figures with their text and unit."""
    rows = {}
    for name, value in (values or {}).items():
        text, unit = term(name)
        rows[name if text in rows else text] = f"{shown(value)} {unit}".strip()
    return table(rows, head)


def shown(value):
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
    """Code for both pipelines, with the first class if there are classes."""
    if not config.transformer_config.num_classes:
        return JOINT_USAGE.format(name=name, label="", labels="")
    label = json.dumps(config.id2label[0], ensure_ascii=False)
    return JOINT_USAGE.format(name=name, label=f"{label}, ", labels=f"class_labels=[{label}], ")


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
generate({label}seed=0)["image"].save("sample.png")
```

With diffusers:

```python
import torch
from dq_hf import DQPipeline

pipe = DQPipeline.from_pretrained("{name}")
images = pipe({labels}num_images_per_label=4, generator=torch.Generator().manual_seed(0)).images
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
