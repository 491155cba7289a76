"""Model cards: what a folder says of its model, from facts alone, and the cards that travel with loaded models.

A card that ends in `MARK` is rewritten when another model is saved or pushed over it. Without that line it belongs to its
owner, and stays.
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCardData, eval_result_entries_to_yaml, is_offline_mode
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers.utils import logging

from .card_text import (
    CITATION,
    KINDS,
    NOUNS,
    PICTURES,
    figures,
    known_limits,
    model_facts,
    section,
    table,
    task_of,
    term,
)
from .download import check_model_links, repository_of
from .folders import check_links, plain_yaml, whole_file
from .weights import RESULTS_FILE

logger = logging.get_logger(__name__)

MARK = "<!-- Written by dq_hf. Without this line the card stays when a model is saved or pushed over this one. -->"
UNNAMED = "path/to/this/folder"  # in the code of a card whose model has no repository yet

MAX_CARD = 2**20  # bytes that are read
MAX_PICTURE = 2**24  # bytes
MAX_HEADER = 2**16  # characters


@dataclass(frozen=True)
class SourceCard:
    """The card that a loaded model came with.

    Args:
        text: of its README.md.
        pictures: {name: bytes} of those of `PICTURES` that it shows.
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
    def header(self):
        return split_card(self.text)[0]

    @property
    def body(self):
        return split_card(self.text)[1]

    @property
    def title(self):
        found = re.search(r"^# (.{1,200})", self.text, re.MULTILINE)
        return found[1].strip() if found else self.repository or "another model"

    @property
    def licence(self):
        licence = self.header.get("license")
        return licence if isinstance(licence, str) else None

    def still_describes(self, model):
        """Whether the model's weights and configuration are those that were loaded, up to their dtype."""
        state = model_state(model)
        return state.keys() == self.state.keys() and all(map(is_same, self.state.values(), state.values()))


def model_state(model):
    """What a change of the model would change: its configuration, and up to 1,024 values of each of its weights."""
    state = {"config": own_entries(model.config)}
    for name, value in model.state_dict().items():
        readable = type(value) is torch.Tensor and not value.is_meta  # else it was quantised, sharded or put away
        state[name] = value.flatten()[:: math.ceil(value.numel() / 1024) or 1].cpu().clone() if readable else None
    return state


def own_entries(config):
    """What a configuration says of its model."""
    if not hasattr(config, "own_field_names"):  # of a model of transformers itself
        return config.to_diff_dict()
    return {name: getattr(config, name) for name in sorted(config.own_field_names())}


def is_same(before, after):
    """Whether two values of `model_state` are equal; None is a weight that cannot be told."""
    if isinstance(before, torch.Tensor) and isinstance(after, torch.Tensor):
        return before.shape == after.shape and torch.equal(before.to(after.dtype), after)
    return before == after and not isinstance(before, torch.Tensor)


# Reading


def read_source_card(model, folder):
    """The `SourceCard` of a model just loaded from this folder, or None if that has no card.

    It lies beside the model's configuration or, for a part of a pipeline, in the pipeline's folder.
    """
    folder = Path(folder).absolute()
    place, part = folder, ""
    if not (folder / "README.md").is_file() and (folder.parent / "model_index.json").is_file():
        place, part = folder.parent, folder.name
    text = read_card(place)
    if text is None:
        if repository_of(folder) and is_offline_mode():
            logger.warning_once(
                f"no card of {repository_of(folder)} is in the cache; where this model is saved, it will have a new one"
            )
        return None
    pictures = {}
    for name in (name for name in PICTURES if f"]({name})" in text):
        if (place / name).is_file() and (place / name).stat().st_size <= MAX_PICTURE:
            pictures[name] = (place / name).read_bytes()
        else:
            whose = repository_of(folder) or place
            logger.warning_once(f"{name} of {whose} is not there; where this model is saved, it will be missing")
    return SourceCard(text, pictures, repository_of(folder), part, model_state(model))


def read_card(folder):
    """Text of a folder's README.md, its first `MAX_CARD` bytes; None if there is none."""
    check_model_links(folder)
    if not (folder / "README.md").is_file():
        return None
    with open(folder / "README.md", "rb") as file:
        content = file.read(MAX_CARD + 1)
    cut = "\n\n(Cut off here: the card is longer.)\n" if len(content) > MAX_CARD else ""
    return content[:MAX_CARD].decode("utf-8", errors="replace") + cut


def split_card(text):
    """Header (a dictionary, empty if there is none that can be read) and body."""
    match = re.match(r"\s*---\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|$)(.*)", text, re.DOTALL)
    try:
        header = plain_yaml(match[1]) if match and len(match[1]) <= MAX_HEADER else None
    except ValueError:
        header = None
    return (header, match[2]) if isinstance(header, dict) else ({}, text)


def join_card(header, body):
    """The text of a card with this header (a dictionary), the inverse of `split_card`."""
    return f"---\n{dump(header)}\n---\n{body}"


# Writing


def travelling_card(parts):
    """The one card with which all parts of a model, {sub-folder: model}, were loaded, if it is still true; else None."""
    cards = {name: card_of(part) for name, part in parts.items()}
    first = next(iter(cards.values()))
    is_one = all(card and card.text == first.text and card.part == name for name, card in cards.items())
    return first if is_one and are_unchanged(parts) else None


def card_of(part):
    """The `SourceCard` of a part, None for one that a library loaded."""
    return getattr(part, "source_card", None)


def are_unchanged(parts):
    """Whether all parts came with a card and are as they were loaded."""
    return all(card_of(part) and card_of(part).still_describes(part) for part in parts.values())


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


def renew_card(folder, model):
    """Write the card of a model anew where its weights were changed in place; one that its owner wrote stays."""
    if MARK in (read_card(folder) or ""):
        save_card(folder, model.config, model.parts, title=Path(folder).absolute().name)


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
    held_out=True,
    metrics=None,
    losses=None,
    findings=None,
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
        parts: {sub-folder: model} of the models whose own cards are quoted: those that they were loaded with.
        title, summary: a line and a paragraph.
        repository: "user/name", for the code that shows how to load the model.
        dataset: images that it was trained on: a local folder, or a Hub id, which the header then names.
        test_split: where `metrics` were measured.
        held_out: False: that split is among the images that it was trained on.
        metrics: {name: value} on its images; `TERMS` gives names of the scripts a text and a unit.
        losses: {name: value} of the last training steps, likewise.
        findings: Markdown, what else was measured.
        data, training: {text: value} for the tables of these sections, values that are None are left out; or Markdown.
        command: shell commands that trained it.
        limits: Markdown, besides what follows from the configuration.
        license: identifier of the Hub, such as "mit".
        captions: {file: text} for the pictures, instead of those in `PICTURES`.
    """
    folder, kind, parts, metrics = Path(folder), KINDS[config.model_type], parts or {}, metrics or {}
    measured_on = ("held out" if held_out else "training images") + (f", split `{test_split}`" if test_split else "")
    captions = PICTURES | (captions or {})
    pictures = [
        f"![{Path(file).stem}]({file})\n\n{text}" for file, text in captions.items() if (folder / file).is_file()
    ]
    origins, files = tell_origins(parts)
    data = [table({"images": dataset}), data] if isinstance(data, str) else [table({"images": dataset} | (data or {}))]
    training = training if isinstance(training, str) else table(training or {})
    sections = [
        f"# {title}",
        summary or kind["summary"],
        table(model_facts(config)),
        *section("Use", kind["usage"](config, repository or UNNAMED, folder)),
        *section(
            "Measured", figures(metrics, measured_on), figures(losses, "end of the training"), findings, *pictures
        ),
        *section("Data", *data),
        *section("Training", training, command and f"```\n{command}\n```"),
        *section("Limits", limits, *known_limits(config, dataset if metrics else None, held_out)),
        *origins,
        *section("Citation", CITATION),
        MARK,
    ]
    finite = {name: value for name, value in metrics.items() if math.isfinite(value)}  # what the Hub can read
    header = card_header(config, title, dataset, test_split, finite, license, parts)
    text = join_card(header, "\n" + "\n\n".join(sections) + "\n")
    (folder / RESULTS_FILE).unlink(missing_ok=True)
    write_files(folder, files | {"README.md": text.encode()} | results_file(dataset, finite))
    return folder / "README.md"


def write_files(folder, files):
    """Write {path: bytes} into a folder."""
    check_links(folder, files)
    for path, content in files.items():
        Path(folder, path).parent.mkdir(parents=True, exist_ok=True)
        with whole_file(Path(folder, path)) as partial:
            partial.write_bytes(content)


def merge_with_owner(text, owners):
    """The card to put where an owner's card lies: `text`, with the header of one that is only a header; None: theirs stays."""
    if MARK in owners:
        return text
    header, body = split_card(owners)
    if body.strip():
        return None
    own_header, own_body = split_card(text)
    return join_card(own_header | header, own_body)


def dump(header):
    """YAML of a card's header."""
    return yaml.safe_dump(header, sort_keys=False, allow_unicode=True).rstrip()


def card_header(config, title, dataset, test_split, metrics, license, parts):
    """What the Hub reads, a dictionary."""
    on_hub = dataset is not None and is_hub_dataset(dataset)
    cards = [card_of(part) for part in parts.values() if card_of(part)]
    datasets = [dataset] if on_hub else []
    for named in (card.header.get("datasets") for card in cards):
        datasets += [name for name in (named if isinstance(named, list) else [named]) if isinstance(name, str)]
    licences = {card.licence for card in cards}
    if not license and is_whole(parts) and len(licences) == 1 and are_unchanged(parts):
        license = licences.pop()
    results = [
        EvalResult(
            task_type=task_of(config),
            dataset_type=dataset if on_hub else "custom",
            dataset_name=dataset,
            dataset_split=test_split,
            metric_type=name,
            metric_name=term(name)[0],
            metric_value=value,
        )
        for name, value in metrics.items()
        if dataset is not None  # the Hub wants to know on what
    ]
    return ModelCardData(
        library_name="transformers",
        pipeline_tag=task_of(config),
        license=license,
        datasets=list(dict.fromkeys(datasets)) or None,
        metrics=list(metrics) or None,
        base_model=list(dict.fromkeys(card.repository for card in cards if card.repository)) or None,
        tags=["dq_hf", "vector-quantization", *KINDS[config.model_type]["tags"]],
        model_name=title if results else None,
        eval_results=results or None,
    ).to_dict()


def results_file(dataset, metrics):
    """{path: YAML} of the figures as the Hub reads them today, beside `model-index` in the header; {} if it cannot."""
    if not metrics or dataset is None or not is_hub_dataset(dataset):
        return {}
    entries = [EvalResultEntry(dataset, name, value) for name, value in metrics.items()]
    return {RESULTS_FILE: dump(eval_result_entries_to_yaml(entries)).encode()}


def is_hub_dataset(dataset):
    """Whether this is a Hub id, not a place on this machine."""
    return reads_like_an_id(dataset) and not Path(dataset).exists()


def lasting_name(dataset):
    """The name of images to be kept: a local one that reads like a Hub id gets "./", as the folder may be gone later."""
    return f"./{dataset}" if reads_like_an_id(dataset) and Path(dataset).exists() else dataset


def reads_like_an_id(name):
    """Whether the Hub could have a repository of this name."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def tell_origins(parts):
    """Sections of the cards that parts of a model came with, and {path: bytes} of their pictures."""
    told = {}  # text: names of the parts that it came with
    for name, part in parts.items():
        if card_of(part):
            told.setdefault(card_of(part).text, []).append(name)
    sections, files = [], {}
    for names in told.values():
        card = card_of(parts[names[0]])
        whose, folder = ("", "origin") if is_whole(names) else (f" of the {NOUNS[names[0]]}", f"origin-{names[0]}")
        same = are_unchanged({name: parts[name] for name in names})
        words = "Weights and configuration are those of" if same else "Weights or configuration are no longer those of"
        source = card.title if card.repository is None else f"[{card.title}](https://huggingface.co/{card.repository})"
        if len(names) == 1 and card.part in NOUNS:
            source = f"the {NOUNS[card.part]} of {source}"
        sections += section(
            f"Origin{whose}",
            f"{words} {source}, whose card says:",
            card.licence and f"Licence: {card.licence}",
            quote(card, folder),
        )
        files |= {f"{folder}/{path}": content for path, content in card.pictures.items()}
    return sections, files


def is_whole(names):
    """Whether these sub-folders are all of a model, but perhaps for its text encoder."""
    return "" in names or {"vae", "transformer"} <= set(names)


def quote(card, folder):
    """A card's body as a quotation, with its pictures in `folder`."""
    body = card.body.replace(MARK, "").strip()
    for name in card.pictures:
        body = body.replace(f"]({name})", f"]({folder}/{name})")
    return "\n".join(f"> {line}".rstrip() for line in body.splitlines())
