"""Weights in safetensors, strictly: what is missing, unknown, of another shape, not finite or damaged is named."""

import json
import re
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedConfig

from .folders import read_json_object

RESULTS_FILE = ".eval_results/dq_hf.yaml"  # what a card's figures are for the Hub
FLOATS = ("F64", "F32", "F16", "BF16")  # safetensors' names of what a weight may be stored in

PICKLES = (
    "{} has no weights in safetensors, only {}: a pickle can run code when it is read, and is not loaded. A checkpoint of "
    "the paper's release becomes safetensors by `dq-hf convert`; one of transformers that you trust by "
    "from_pretrained(..., use_safetensors=False).save_pretrained(...)"
)
PROBLEMS = {
    "missing": "weights are missing",
    "unknown": "there are weights that the model does not have",
    "repeated": "weights are in more than one file",
    "mismatched": "weights have another shape than the configuration says",
    "no_floats": f"weights are stored as something else than {', '.join(FLOATS)}",
    "not_finite": "weights are not finite",
}


def load_strictly(model_class, load, folder, *args, config=None, **kwargs):
    """The model and the loading information that transformers' `load` gives, or an error that names file and key.

    Raises:
        OSError, TypeError, ValueError: as `HubMixin.from_pretrained`.
    """
    kwargs["use_safetensors"] = kwargs.get("use_safetensors") is not False
    with place_named(folder):
        if config is None and (folder / "config.json").is_file():
            model_class.config_class.get_config_dict(folder)  # or it is of another model, whose weights lie elsewhere
        files = weight_files(folder, kwargs.get("variant")) if kwargs["use_safetensors"] else []
        if files and not isinstance(config, PreTrainedConfig):
            config, kwargs = read_config(model_class.config_class, config or folder, kwargs)
        is_quantized = kwargs.get("quantization_config") or getattr(config, "quantization_config", None)
        if files and not is_quantized:  # else the shapes are others
            check_weight_files(model_class, config, files)
        kwargs["ignore_mismatched_sizes"] = True  # only so that they are listed; below they are an error
        model, info = load(folder, *args, config=config, output_loading_info=True, **kwargs)
    mismatched = [
        f"{key} {tuple(found)} instead of {tuple(expected)}" for key, found, expected in info["mismatched_keys"]
    ]
    problems = {"missing": info["missing_keys"], "unknown": info["unexpected_keys"], "mismatched": mismatched}
    refuse_weights(model_class, files or [folder], **problems)
    check_weights_finite(model, files or [folder])
    return model, info


@contextmanager
def place_named(place):
    """Where something is loaded: a `TypeError` or `ValueError` names the folder or file, or a file in it."""
    try:
        yield
    except (TypeError, ValueError, StrictDataclassError) as error:
        if str(place) in str(error):
            raise
        raise (TypeError if isinstance(error, TypeError) else ValueError)(f"{place}: {error}") from error


def read_config(config_class, source, arguments):
    """A configuration, changed by those of the arguments of `from_pretrained` that are its fields, and the others."""
    dtypes = {name: value for name, value in arguments.items() if name in ("dtype", "torch_dtype")}  # of the weights
    changes = {name: value for name, value in arguments.items() if name not in dtypes}
    config, others = config_class.from_pretrained(source, return_unused_kwargs=True, **changes)
    return config, others | dtypes


def check_weights_finite(model, files):
    """Raise `ValueError` if a weight that was loaded from these files is not finite."""
    may_be_infinite, not_finite = getattr(model, "weights_that_may_be_infinite", ()), []
    for name, value in model.state_dict().items():
        if name in may_be_infinite or value.is_meta:
            continue
        if type(value) not in (torch.Tensor, torch.nn.Parameter):  # torchao's have few operations of their own
            value = value.dequantize()
        if not torch.isfinite(value).all():
            not_finite.append(name)
    refuse_weights(type(model), files, not_finite=not_finite)


def refuse_weights(model_class, files, **problems):
    """Raise `ValueError` if there is a problem, `PROBLEMS`, with any key."""
    for problem, keys in problems.items():
        if keys:
            source = ", ".join(map(str, files))
            raise ValueError(
                f"{source} does not fit {model_class.__name__}: {PROBLEMS[problem]}: {shorten(sorted(keys))}"
            )


def optional_weights(model):
    """Names of weights that a folder need not have: those that the model fills in by itself, and others' twins (tied)."""
    return set(model._keys_to_ignore_on_load_missing or ()) | set(model.all_tied_weights_keys)


def check_weight_files(model_class, config, files):
    """Compare the headers of safetensors files with the weights of a model, before anything is allocated for it.

    Raises:
        OSError: a file that is not there, or damaged.
        ValueError: weights that do not fit.
    """
    with torch.device("meta"):
        model = model_class(config)
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    shapes, dtypes, repeated = {}, {}, []
    for path in files:
        try:
            with safe_open(path, "pt") as file:
                repeated += shapes.keys() & file.keys()
                slices = {name: file.get_slice(name) for name in file.keys()}
                shapes |= {name: tuple(value.get_shape()) for name, value in slices.items()}
                dtypes |= {name: value.get_dtype() for name, value in slices.items()}
        except SafetensorError as error:
            remedy = "save it again or, where it came from the Hub, load it with force_download=True"
            raise OSError(f"{path} is damaged or incomplete ({error}); {remedy}") from error
    known = shapes.keys() & expected.keys()
    refuse_weights(
        model_class,
        files,
        missing=expected.keys() - shapes.keys() - optional_weights(model),
        unknown=shapes.keys() - expected.keys(),
        repeated=repeated,
        mismatched=[f"{n} {shapes[n]} instead of {expected[n]}" for n in known if shapes[n] != expected[n]],
        no_floats=[f"{n} ({dtypes[n]})" for n in known if dtypes[n] not in FLOATS],
    )


def weight_files(folder, variant=None):
    """Paths of the safetensors files that transformers loads from a folder, none where an adapter's are.

    Raises:
        OSError: there are none, only a pickle, or the list of shards is damaged.
    """
    infix = f".{variant}" if variant else ""
    single, index = folder / f"model{infix}.safetensors", folder / f"model.safetensors.index{infix}.json"
    if single.is_file():
        return [single]
    if (folder / "adapter_config.json").is_file():
        return []
    if not index.is_file():
        pickles = sorted(path.name for kind in ("bin", "pt", "pth", "ckpt") for path in folder.glob(f"*.{kind}"))
        if pickles:
            raise OSError(PICKLES.format(folder, shorten(pickles)))
        variants = sorted(path.name.split(".")[1].split("-")[0] for path in folder.glob("model.*.safetensors"))
        remedy = f"give variant={variants[0]!r}" if variants and not infix else "save or download the model again"
        raise FileNotFoundError(f"{folder} has no file named {single.name}; {remedy}")
    content = read_json_object(index)
    shards = content.get("weight_map")
    if not isinstance(shards, dict) or not shards or not isinstance(content.get("metadata"), dict):
        raise OSError(f"{index} must hold weight_map and metadata, two objects; save or download it again")
    for key, shard in shards.items():
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise OSError(f"{index}: {key} must be in a safetensors file beside it, got {shard!r}")
    files = [folder / shard for shard in sorted(set(shards.values()))]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{file} is not there, but {index} lists it; save or download it again")
    return files


def write_index(folder):
    """Write the list of all weights in the sub-folders of a model's folder, without which `Trainer` resumes from none.

    Each weight has the name that it has in the whole model; in the file that is named it has the part's own.
    """
    weight_map = {}
    for path in sorted(folder.glob("*/model*.safetensors")):
        with safe_open(path, "pt") as file:
            names = [f"{path.parent.name}.{name}" for name in file.keys()]
        weight_map |= dict.fromkeys(names, f"{path.parent.name}/{path.name}")
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def shorten(names, limit=8):
    """The first few names, and how many more there are."""
    first = ", ".join(names[:limit])
    return first if len(names) <= limit else f"{first} and {len(names) - limit} more"


def stale_files(names, written):
    """Those of these files that tell of what was written anew elsewhere: weights, their lists, and results of a card."""
    models = {weights_of(name) for name in written} - {None}
    results = {RESULTS_FILE} if "README.md" in written else set()
    return [name for name in names if (weights_of(name) in models or name in results) and name not in written]


def weights_of(name):
    """Folder and variant of a file of weights, whole or a shard, or of a list of shards; None for another file."""
    match = re.fullmatch(
        r"((?:.*/)?)model(?:\.(?!safetensors)(.+?))?(?:-\d{5}-of-\d{5})?\.safetensors", name
    ) or re.fullmatch(r"((?:.*/)?)model\.safetensors\.index(?:\.(.+))?\.json", name)
    return match and match.groups()


def check_state_dict(model, state_dict):
    """Raise `ValueError` if these are not the weights of the model, by their names."""
    if different := sorted(set(model.state_dict()) ^ set(state_dict)):
        raise ValueError(
            f"state_dict must have the model's keys; {len(different)} are missing or left over: {shorten(different)}"
        )
