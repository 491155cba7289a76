"""What a finished model folder says about itself, and its way to the Hub."""

import json
import math
import platform
import re
import shlex
import sys
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from huggingface_hub import EvalResult, HfApi, ModelCardData, constants, get_token, is_offline_mode
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from .. import __version__
from ..modeling.configuration_dq import DQConfig
from ..modeling.configuration_dqvae import DQVAEConfig

TERMS = {  # of figures that the training scripts measure: name and unit
    "psnr": ("PSNR of the reconstructions, mean over images", "dB"),
    "codes_per_image": ("codes an image, mean", ""),
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
}
PICTURES = {  # files that a card shows if the folder has them
    "samples.png": "Samples.",
    "reconstructions.png": "Held-out images, their variable-length coding, and their reconstructions.",
}
TASKS = {False: "image-feature-extraction", True: "unconditional-image-generation"}  # the Hub's; True: both stages
PACKAGES = ("torch", "transformers", "diffusers", "accelerate", "datasets", "huggingface_hub")


def write_model_card(
    folder,
    *,
    title,
    summary,
    repo_id=None,
    dataset=None,
    test_split=None,
    metrics=None,
    losses=None,
    data=None,
    training=None,
    command=None,
    license=None,
):
    """Write `README.md` into a finished model folder and return its path. What is not known is left out.

    Args:
        folder: a DQ-VAE with its image processor, or both stages. Size, granularities, router, classes are read there,
            and `PICTURES` if there are any.
        title, summary: a line and a paragraph.
        repo_id: "user/name", for the code that shows how to load the model.
        dataset: images that it was trained on: a local folder, or a Hub id, which the header then names.
        test_split: where `metrics` were measured.
        metrics: {name: value} on held-out images; `TERMS` gives names of the scripts a text and a unit.
        losses: {name: value} of the last training steps, likewise.
        data, training: {text: value} for the tables of these sections; values that are None are left out.
        command: as `command_line` gives it.
        license: identifier of the Hub, such as "mit".

    Raises:
        FileNotFoundError: the folder is not a finished model.
    """
    folder = Path(folder)
    for name in ("config.json", "preprocessor_config.json"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} has no {name}; save the model and its image processor there first")
    joint = json.loads((folder / "config.json").read_text())["model_type"] == DQConfig.model_type
    config = (DQConfig if joint else DQVAEConfig).from_pretrained(folder)
    name = repo_id or "path/to/this/folder"

    usage = joint_usage(config, name) if joint else VAE_USAGE.format(name=name)
    held_out = f"held out, split `{test_split}`" if test_split else "held out"
    pictures = [
        f"![{Path(file).stem}]({file})\n\n{text}" for file, text in PICTURES.items() if (folder / file).is_file()
    ]
    parts = [
        f"# {title}",
        summary,
        table(model_facts(config)),
        *section("Use", usage),
        *section("Measured", figures(metrics, held_out), figures(losses, "end of the training"), *pictures),
        *section("Data", table({"images": dataset} | (data or {}))),
        *section("Training", table((training or {}) | {"software": versions()}), command and f"```\n{command}\n```"),
        *section("Citation", CITATION),
    ]
    header = card_header(joint, title, dataset, test_split, metrics or {}, license)
    card = folder / "README.md"
    card.write_text(f"---\n{header}\n---\n\n" + "\n\n".join(parts) + "\n", encoding="utf-8")
    return card


def card_header(joint, title, dataset, test_split, metrics, license):
    """The YAML that the Hub reads."""
    on_hub = dataset is not None and is_hub_dataset(dataset)
    results = [
        EvalResult(
            task_type=TASKS[joint],
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
    return ModelCardData(
        library_name="transformers",
        pipeline_tag=TASKS[joint],
        license=license,
        datasets=[dataset] if on_hub else None,
        tags=["dq_hf", "vector-quantization", "image-tokenizer"] + ["image-generation"] * joint,
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


def model_facts(config):
    """What the configuration says that a reader wants to know first."""
    vae = getattr(config, "vae_config", config)
    sides = " and ".join(f"{side} x {side}" for side in vae.granularities)
    facts = {
        "image size": " x ".join(map(str, vae.image_height_width)),
        "granularities": f"{sides} pixels a code",
        "router": vae.router if len(vae.granularities) > 1 else None,
        "codebook": f"{vae.codebook_size:,} codes of {vae.codebook_dim} numbers",
    }
    if vae is not config:
        generator = config.transformer_config
        layers = f"{generator.num_position_layers} for positions, {generator.num_content_layers} for contents"
        facts |= {"classes": generator.num_classes or None, "layers": f"{layers}, width {generator.hidden_size}"}
    return facts


def joint_usage(config, name):
    """Code for both pipelines, with the first class if there are classes."""
    if not config.transformer_config.num_classes:
        return JOINT_USAGE.format(name=name, label="", labels="")
    label = json.dumps(config.id2label[0], ensure_ascii=False)
    return JOINT_USAGE.format(name=name, label=f"{label}, ", labels=f"class_labels=[{label}], ")


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


def versions():
    """Installed versions of what trains."""
    found = {"dq_hf": __version__, "Python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # the user's environment has it without its metadata, or not at all
            continue
    return ", ".join(f"{name} {number}" for name, number in found.items())


def machine_facts(accelerator):
    """Processes, precision and device of a run, for the table `training` of its card."""
    precision = {"no": "float32", "bf16": "bfloat16, mixed", "fp16": "float16, mixed"}
    device = (
        torch.cuda.get_device_name(accelerator.device) if accelerator.device.type == "cuda" else accelerator.device
    )
    return {
        "processes": accelerator.num_processes,
        "precision": precision.get(accelerator.mixed_precision, accelerator.mixed_precision),
        "device of a process": str(device),
    }


SECRETS = {"token", "secret", "password", "passwd", "key", "apikey", "auth", "credentials"}
HIDDEN = "HIDDEN"


def command_line():
    """The command of this process, quoted for a shell, without what is secret.

    `accelerate launch` starts the script with `python` and keeps its own options to itself; `machine_facts` says what
    they did. Hidden are values of options like --hub_token and --api-key, tokens of the Hub, passwords in addresses.
    """
    words, hide = ["python"], False
    for word in sys.argv:
        option, equals, value = word.partition("=")
        secret = option.startswith("-") and SECRETS & set(re.split("[-_]", option.lower()))
        if hide and not word.startswith("--"):
            word = HIDDEN
        elif secret and equals:
            word = f"{option}={HIDDEN}"
        hide = secret and not equals
        words.append(re.sub(r"hf_\w{8,}|(?<=://)[^/@]+(?=@)", HIDDEN, word))
    return shlex.join(words)


def check_push(repo_id, private=None):
    """Make sure, before a long training, that `push_folder` can write to this repository, and return "user/name".

    It is created if it is not there. One process does this for all.

    Args:
        repo_id: "user/name", or "name" for one's own.
        private: for a new repository; None is the Hub's default for its owner.

    Raises:
        ValueError: no such name can be, or `private` was asked for a repository that is public.
        PermissionError: no token, or one that may not write there.
        ConnectionError: offline mode, or no answer.
        OSError: another refusal by the Hub.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f'the repository must be "user/name" or "name", got {repo_id!r}: {error}') from error
    if is_offline_mode():
        raise ConnectionError(f"{repo_id} cannot be uploaded in offline mode; unset HF_HUB_OFFLINE, or do not push")
    if get_token() is None:
        raise PermissionError(f"{repo_id} cannot be uploaded without a token; run `hf auth login` or set HF_TOKEN")
    api = HfApi()
    with plain_errors(f"{repo_id} cannot be written"):
        if "/" not in repo_id:
            repo_id = f"{api.whoami()['name']}/{repo_id}"
        api.create_repo(repo_id, private=private, exist_ok=True)
        api.auth_check(repo_id, write=True)  # creating says nothing about it when the repository is there
        public = private and not api.model_info(repo_id).private
    if public:
        raise ValueError(
            f"{repo_id} was to be private, but it exists and is public; change that on the Hub, or its name"
        )
    return repo_id


def push_folder(folder, repo_id, private=None, commit_message="Upload the trained model"):
    """Upload a finished model folder as it is, its card included, and return the address of the repository.

    Arguments and errors as for `check_push`. The folder stays as it is, and an `OSError` says how to upload it by hand.
    """
    if not (Path(folder) / "config.json").is_file():
        raise FileNotFoundError(f"{folder} has no config.json; save the model there first")
    command = ["hf", "upload", repo_id, str(folder), "."] + ["--private"] * bool(private)
    by_hand = f"\n{folder} is whole; upload it later with `{shlex.join(command)}`"
    try:
        repo_id = check_push(repo_id, private)
        with plain_errors(f"the upload to {repo_id} failed"):
            HfApi().upload_folder(repo_id=repo_id, folder_path=folder, commit_message=commit_message)
    except OSError as error:
        raise type(error)(f"{error}{by_hand}") from error
    return f"{constants.ENDPOINT}/{repo_id}"


@contextmanager
def plain_errors(failure):
    """Errors of the Hub's client as built-in ones: `failure`, the reason and, where known, the remedy."""
    try:
        yield
    except Exception as error:  # those of the connection have one class in huggingface_hub 1 and another in 2
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status == 401:
            raise PermissionError(f"{failure}: the token is not valid; run `hf auth login` or set HF_TOKEN") from error
        if status == 403:
            remedy = f"make one that may, at {constants.ENDPOINT}/settings/tokens, or choose another repository"
            raise PermissionError(f"{failure}: the token has no right to it; {remedy}") from error
        if status is not None or isinstance(error, ValueError):
            raise OSError(f"{failure}: {error}") from error
        cause = error.__cause__ or error  # the uploading of a large file wraps it
        raise ConnectionError(
            f"{failure}: {cause} ({constants.ENDPOINT}); try again when the connection works"
        ) from error


VAE_USAGE = """\
```python
from PIL import Image
from dq_hf import DQImageProcessor, DQVAEModel

vae = DQVAEModel.from_pretrained("{name}")
processor = DQImageProcessor.from_pretrained("{name}")
pixel_values = processor(Image.open("image.png"))["pixel_values"]  # (1, 3, height, width) in [-1, 1]

encoded = vae.encode(pixel_values)  # .codes (1, H, W), .grain_map (1, h, w), .num_codes (1,)
image = processor.post_process(vae.decode_codes(encoded.codes).sample)[0]
```"""

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
