"""What the models share: loading that never leaves a weight random, and checks of tensors at the public boundary."""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from .configuration_utils_dq import read_json_object

FLOATS = ("F64", "F32", "F16", "BF16")  # safetensors' names of what a weight may be stored in


class StrictLoadingMixin:
    """Stands before `PreTrainedModel`: its `from_pretrained` refuses damaged, incomplete and mismatched weights.

    (A mixin, because diffusers looks for the name `PreTrainedModel` in the module of a pipeline's component.)
    """

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, output_loading_info=False, **kwargs):
        """Load weights as transformers does, but strictly, and only from safetensors unless `use_safetensors=False`.

        Raises:
            OSError: no such folder, repository or file, a damaged file, or weights only as a pickle.
            TypeError, ValueError: a configuration with a typo or that is impossible, or weights that are missing, left
                over, of another shape or kind or not finite; the message names file and fields or keys.
        """
        place = Path(str(pretrained_model_name_or_path), kwargs.get("subfolder") or "")
        if kwargs.get("use_safetensors") is None:
            kwargs["use_safetensors"] = True
        if kwargs["use_safetensors"] and place.is_dir():
            check_folder(place, kwargs.get("variant"))
        kwargs["ignore_mismatched_sizes"] = True  # only so that they are listed; below they are an error
        try:
            model, info = super().from_pretrained(
                pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
            )
        except SafetensorError as error:
            broken = next((path for path in weight_files(place) if not is_readable(path)), place)
            raise OSError(DAMAGED.format(broken, error)) from error
        except (TypeError, ValueError) as error:
            if str(place) in str(error):
                raise
            raise (TypeError if isinstance(error, TypeError) else ValueError)(f"{place}: {error}") from error
        except OSError as error:
            if "use_safetensors" in str(error):  # transformers' remedy would be to trust a pickle
                raise OSError(PICKLES.format(place, "no file named model.safetensors")) from error
            raise
        mismatched = [
            f"{key} {tuple(found)} instead of {tuple(expected)}" for key, found, expected in info["mismatched_keys"]
        ]
        state_dict = model.state_dict()
        checked = state_dict.keys() - optional_weights(cls)
        not_finite = [name for name in checked if not (state_dict[name].is_meta or is_finite(state_dict[name]))]
        problems = {"missing": info["missing_keys"], "unknown": info["unexpected_keys"]}
        refuse_weights(cls, weight_files(place) or [place], **problems, mismatched=mismatched, not_finite=not_finite)
        return (model, info) if output_loading_info else model

    @staticmethod
    def _load_pretrained_model(model, state_dict, checkpoint_files, load_config, *args, **kwargs):
        """Between building on the meta device and loading: nothing is allocated for weights that do not fit."""
        safe = checkpoint_files and all(str(path).endswith(".safetensors") for path in checkpoint_files)
        whole = all(parameter.is_meta for parameter in model.parameters())  # else these are an adapter's weights
        if safe and whole and state_dict is None and load_config.hf_quantizer is None:
            check_weight_files(type(model), model.state_dict(), checkpoint_files)
        return PreTrainedModel._load_pretrained_model(
            model, state_dict, checkpoint_files, load_config, *args, **kwargs
        )

    @torch.no_grad()
    def _init_weights(self, module):
        """torch's own initialisation."""
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()


DAMAGED = "{} is damaged or incomplete ({}); download or save it again"
PICKLES = (
    "{} has no weights in safetensors ({}): a pickle can run code when it is read, and is not loaded. A checkpoint of "
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


def refuse_weights(model_class, files, **problems):
    """Raise `ValueError` if there is a problem, `PROBLEMS`, with any key."""
    for problem, keys in problems.items():
        if keys:
            source = ", ".join(map(str, files))
            raise ValueError(
                f"{source} does not fit {model_class.__name__}: {PROBLEMS[problem]}: {shorten(sorted(keys))}"
            )


def optional_weights(model_class):
    """Names of weights that older folders do not have; the model fills them in, and checks them itself."""
    return set(model_class._keys_to_ignore_on_load_missing or ())


def check_weight_files(model_class, state_dict, files):
    """Compare the headers of safetensors files with a model's weights, of which only the shapes are looked at.

    Raises:
        OSError: a file that is not there, or damaged.
        ValueError: weights that do not fit.
    """
    found, repeated = {}, []
    for path in files:
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():
                    tensor = file.get_slice(name)
                    repeated += [name] * (name in found)
                    found[name] = (tuple(tensor.get_shape()), tensor.get_dtype())
        except SafetensorError as error:
            raise OSError(DAMAGED.format(path, error)) from error
    mismatched, no_floats = [], []
    for name in found.keys() & state_dict.keys():
        (shape, dtype), expected = found[name], tuple(state_dict[name].shape)
        mismatched += [f"{name} {shape} instead of {expected}"] * (shape != expected)
        no_floats += [f"{name} ({dtype})"] * (dtype not in FLOATS)
    refuse_weights(
        model_class,
        files,
        missing=state_dict.keys() - found.keys() - optional_weights(model_class),
        unknown=found.keys() - state_dict.keys(),
        repeated=repeated,
        mismatched=mismatched,
        no_floats=no_floats,
    )


def check_folder(folder, variant=None):
    """Raise `OSError` at a folder whose weights are only a pickle, or whose list of shards is damaged."""
    infix = f".{variant}" if variant else ""
    if (folder / f"model{infix}.safetensors").is_file():
        return
    index = folder / f"model.safetensors.index{infix}.json"
    if index.is_file():
        content = read_json_object(index)
        shards = content.get("weight_map")
        if not isinstance(shards, dict) or not shards or not isinstance(content.get("metadata"), dict):
            raise OSError(f"{index} must hold weight_map and metadata, two objects; download or save it again")
        for key, shard in shards.items():
            if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
                raise OSError(f"{index}: {key} must be in a safetensors file beside it, got {shard!r}")
            if not (folder / shard).is_file():
                raise OSError(f"{folder / shard} is not there, but {index} lists it; download or save it again")
        return
    pickles = sorted(path.name for kind in ("bin", "pt", "pth", "ckpt") for path in folder.glob(f"*.{kind}"))
    if pickles:
        raise OSError(PICKLES.format(folder, f"only {shorten(pickles)}"))


def is_finite(value):
    """Whether a tensor has no NaN or infinite value, one with quantised storage included."""
    if type(value) not in (torch.Tensor, torch.nn.Parameter):  # torchao's have few operations of their own
        value = value.dequantize()
    return bool(torch.isfinite(value).all())


def weight_files(place):
    """Paths of the weight files of a local folder."""
    return sorted(place.glob("*.safetensors")) if place.is_dir() else []


def is_readable(path):
    """Whether a safetensors file is whole."""
    try:
        with safe_open(path, "pt"):
            return True
    except SafetensorError:
        return False


def shorten(names, limit=8):
    """The first few names, and how many more there are."""
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.int64)


def check_indices(name, values, shape, limit, device):
    """`values` as a long tensor on `device`, checked: integer dtype, the given shape (None: any), in [0, limit).

    Raises:
        TypeError: not a tensor of integers.
        ValueError: another shape, or values out of range.
    """
    if not isinstance(values, torch.Tensor) or values.dtype not in INTEGERS:
        got = values.dtype if isinstance(values, torch.Tensor) else type(values).__name__
        raise TypeError(f"{name} must be a tensor of integers, got {got}")
    if values.dim() != len(shape) or any(want not in (None, got) for want, got in zip(shape, values.shape)):
        expected = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} must have shape ({expected}), got {tuple(values.shape)}")
    values = values.to(device=device, dtype=torch.long)
    if torch.compiler.is_compiling():  # a graph cannot ask for values
        return values
    if values.numel() and (values.min() < 0 or values.max() >= limit):
        raise ValueError(
            f"{name} must lie in 0 ... {limit - 1}, got values from {int(values.min())} to {int(values.max())}"
        )
    return values
