"""Images to `pixel_values` and back."""

import math
import os

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor

from .configuration_utils_dq import MOST_WIDTH, check_choice
from .hub_dq import ProcessorHubMixin, without_remote_code

# Besides the arguments, what transformers writes into a processor's file.
FILE_KEYS = {"image_processor_type", "processor_class", "auto_map"}
MOST_COVERING = 4  # times a side of the result, to which an image is scaled before its ends are cut off
FORMATS = ("channels_first", "channels_last")
FIXED_ARGUMENTS = {  # of transformers' processors: the only value here
    "resample": Image.Resampling.BICUBIC,
    "rescale_factor": 1 / 255,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "do_convert_rgb": True,
    "do_center_crop": True,
    "do_pad": False,
}


class DQImageProcessor(ProcessorHubMixin, BaseImageProcessor):
    """PIL images, numpy arrays or torch tensors, one or a list, to `pixel_values` in [-1, 1], and back.

    Args:
        size: {"height", "width"} in pixels, (height, width), or one number for both. With `do_resize` the image is scaled
            until it covers this size, keeping its shape (bicubic, antialiased), and the centre is cut out.
        do_resize: False keeps every image at its own size; all images of one call must then have the same.
        do_rescale: False leaves bytes in [0, 255]; floats are in [0, 1] already, and stay.
        do_normalize: False leaves out the step from [0, 1] to [-1, 1], the range that the models take.
        kwargs: `FIXED_ARGUMENTS`, other arguments of transformers' processors, with their only value.
    """

    model_input_names = ["pixel_values"]

    def __init__(self, size=None, do_resize=True, do_rescale=True, do_normalize=True, **kwargs):
        super().__init__(**without_remote_code(other_arguments(kwargs)))
        self.size = check_size({"height": 256, "width": 256} if size is None else size)
        self.do_resize = check_flag("do_resize", do_resize)
        self.do_rescale = check_flag("do_rescale", do_rescale)
        self.do_normalize = check_flag("do_normalize", do_normalize)

    @classmethod
    def for_model(cls, config, do_resize=True):
        """The processor that gives images the size of a tokenizer with this `DQVAEConfig`."""
        return cls(size=config.image_height_width, do_resize=do_resize)

    def to_dict(self):
        """What its file holds; steps that are done by default are left out."""
        steps = {"do_rescale": True, "do_normalize": True}
        return {name: value for name, value in super().to_dict().items() if value != steps.get(name)}

    def __call__(
        self,
        images,
        size=None,
        do_resize=None,
        do_rescale=None,
        do_normalize=None,
        return_tensors="pt",
        data_format="channels_first",
        input_data_format=None,
        device=None,
        **kwargs,
    ):
        """`pixel_values` (B, 3, height, width) float32 in [-1, 1], in a `BatchFeature`.

        Args:
            images: an image or a list. PIL in any mode with a fixed range, turned upright by its EXIF orientation,
                transparent parts on white; arrays and tensors of three channels, four with transparency, one or none if
                grey, first or last, integers 0 ... 255 (uint8) or floats in [0, 1]; four dimensions are a batch.
            size, do_resize, do_rescale, do_normalize: instead of the processor's own.
            return_tensors: "pt" or "np"; None: a list of tensors, which may have several sizes.
            data_format: "channels_first", or "channels_last" for (B, height, width, 3).
            input_data_format: likewise, of arrays and tensors. Default: where there are three channels.
            device: of the result.
            kwargs: `FIXED_ARGUMENTS`.

        Raises:
            TypeError: not an image, an array of another dtype, or an unknown argument.
            ValueError: wrong channels, values out of range or NaN, or different sizes that cannot be stacked.
        """
        check_choice("return_tensors", return_tensors, ("pt", "np", None))
        check_choice("data_format", data_format, FORMATS)
        check_choice("input_data_format", input_data_format, (*FORMATS, None))
        other_arguments(kwargs)
        size = self.size if size is None else check_size(size)
        do_resize = self.do_resize if do_resize is None else check_flag("do_resize", do_resize)
        do_rescale = self.do_rescale if do_rescale is None else check_flag("do_rescale", do_rescale)
        do_normalize = self.do_normalize if do_normalize is None else check_flag("do_normalize", do_normalize)
        images = flatten_images(images)
        if not images:
            raise ValueError("images must hold at least one image, got an empty list")
        tensors = [to_tensor(image, input_data_format) for image in images]
        if do_resize:
            tensors = [resize_and_crop(tensor, size["height"], size["width"]) for tensor in tensors]
        if not do_rescale:
            tensors = [tensor * 255 if is_bytes(image) else tensor for tensor, image in zip(tensors, images)]
        if do_normalize:
            tensors = [tensor * 2 - 1 for tensor in tensors]
        if data_format == "channels_last":
            tensors = [tensor.permute(1, 2, 0) for tensor in tensors]
        if device is not None:
            tensors = [tensor.to(device) for tensor in tensors]
        if return_tensors is None:
            return BatchFeature({"pixel_values": tensors})
        shapes = {tuple(tensor.shape) for tensor in tensors}
        if len(shapes) > 1:
            sizes = sorted(shape[:2] if data_format == "channels_last" else shape[1:] for shape in shapes)
            raise ValueError(f"images of one call must have one size, got {sizes}; use do_resize=True")
        pixel_values = torch.stack(tensors)
        return BatchFeature({"pixel_values": pixel_values.cpu().numpy() if return_tensors == "np" else pixel_values})

    preprocess = __call__

    def post_process(self, pixel_values, output_type="pil"):
        """Images of `pixel_values` (B, 3, height, width) about in [-1, 1]; what lies outside is clipped.

        Args:
            output_type: "pil" (a list), "np" (B, height, width, 3) float32 in [0, 1] or "pt" (B, 3, height, width).
        """
        if not isinstance(pixel_values, torch.Tensor) or pixel_values.dim() != 4 or pixel_values.shape[1] != 3:
            got = tuple(pixel_values.shape) if isinstance(pixel_values, torch.Tensor) else type(pixel_values).__name__
            raise ValueError(f"pixel_values must be a tensor of shape (B, 3, height, width), got {got}")
        if not torch.isfinite(pixel_values).all():
            raise ValueError("pixel_values must be finite, got NaN or infinite values")
        return from_unit(to_unit(pixel_values.detach()), output_type)


def from_unit(images, output_type):
    """Images (B, 3, height, width) in [0, 1] as an output type of `DQImageProcessor.post_process`."""
    if output_type == "pt":
        return images
    if output_type == "np":
        return images.permute(0, 2, 3, 1).cpu().numpy()
    if output_type == "pil":
        arrays = unit_to_bytes(images).permute(0, 2, 3, 1).cpu().numpy()
        return [Image.fromarray(array) for array in arrays]
    raise ValueError(f'output_type must be "pil", "np" or "pt", got {output_type!r}')


def to_unit(pixel_values):
    """Images in [-1, 1] as float32 in [0, 1]; what lies outside is clipped."""
    return (pixel_values.float() / 2 + 0.5).clamp(0, 1)


def to_bytes(pixel_values):
    """uint8 of images in [-1, 1]; what lies outside is clipped, as in any file."""
    return unit_to_bytes(to_unit(pixel_values))


def unit_to_bytes(images):
    """uint8 of images in [0, 1]."""
    return (images * 255).round().to(torch.uint8)


def from_bytes(images):
    """What `DQImageProcessor` gives for such an image: float32 in [-1, 1]."""
    return images.float() / 255 * 2 - 1


def other_arguments(arguments):
    """Those of a processor's file; raises TypeError at an unknown one, ValueError at another value than in `FIXED_ARGUMENTS`."""
    if unknown := sorted(set(arguments) - FILE_KEYS - set(FIXED_ARGUMENTS)):
        raise TypeError(
            f"DQImageProcessor has no argument {', '.join(unknown)}; it has size, do_resize, do_rescale and do_normalize"
        )
    for name, only in FIXED_ARGUMENTS.items():
        value = arguments.get(name)
        value = value.tolist() if hasattr(value, "tolist") else value
        same = (None, only, tuple(only), only[0]) if isinstance(only, list) else (None, only)
        if value not in same:
            raise ValueError(f"{name} must be {only}, which the models were trained with; got {value}")
    return {name: value for name, value in arguments.items() if name in FILE_KEYS}


def check_size(size):
    """`size`, a number, (height, width) or a dictionary, as {"height": n, "width": n}, checked to be positive integers."""
    if type(size) is int:
        size = (size, size)
    if isinstance(size, (list, tuple)) and len(size) == 2:
        size = dict(zip(("height", "width"), size))
    if not isinstance(size, dict) or set(size) != {"height", "width"}:
        raise ValueError(f'size must be {{"height": ..., "width": ...}} or one number, got {size!r}')
    if any(type(side) is not int or not 1 <= side <= MOST_WIDTH for side in size.values()):
        raise ValueError(f"size must hold positive whole numbers up to {MOST_WIDTH}, got {size!r}")
    return dict(size)


def check_flag(name, value):
    """`value`, checked to be a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return value


def flatten_images(images):
    """A list of single images."""
    if isinstance(images, (list, tuple)):
        return [single for image in images for single in flatten_images(image)]
    if isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim == 4:
        return list(images)
    return [images]


def is_bytes(image):
    """Whether an image's values are in [0, 255], not in [0, 1]."""
    return isinstance(image, Image.Image) or image.dtype in (np.uint8, torch.uint8)


def to_tensor(image, data_format=None):
    """One image as (3, height, width) float32 in [0, 1]; `data_format` of an array is one of `FORMATS`, or None."""
    if isinstance(image, Image.Image):
        return pil_to_tensor(image)
    if not isinstance(image, (np.ndarray, torch.Tensor)):
        file = isinstance(image, (str, os.PathLike))
        remedy = f"; open it: PIL.Image.open({str(image)!r})" if file else ""
        raise TypeError(
            f"an image must be a PIL image, a numpy array or a torch tensor, got {type(image).__name__}{remedy}"
        )
    tensor = as_tensor(image)
    usual = "channels_last" if isinstance(image, np.ndarray) else "channels_first"
    tensor = channels_first(tensor, data_format or find_channels(tensor, usual))
    if tensor.dtype == torch.uint8:
        return to_rgb(tensor.float() / 255)
    if not tensor.is_floating_point():
        raise TypeError(f"an image array must be uint8 (0 ... 255) or float (0 ... 1), got {tensor.dtype}; convert it")
    low, high = tensor.aminmax()
    if not (low >= 0 and high <= 1):
        raise ValueError(
            f"a float image must be finite and lie in [0, 1], got values from {float(low):.4g} to {float(high):.4g}; "
            "images that are already in [-1, 1] go to the model without the processor"
        )
    return to_rgb(tensor.float())


def as_tensor(values):
    """A tensor of a tensor or of any numpy array, whose memory it has if torch takes that: in order, to be written to, with
    native bytes.
    """
    if isinstance(values, torch.Tensor):
        return values
    return torch.from_numpy(np.require(values, values.dtype.newbyteorder("="), requirements=["C", "W"]))


def find_channels(tensor, usual):
    """Which of `FORMATS` an array has: three channels before four before one, and where both are possible the usual one."""
    for channels in (3, 4, 1):
        places = [place for place, end in zip(FORMATS, (0, -1)) if tensor.ndim == 3 and tensor.shape[end] == channels]
        if places:
            return usual if usual in places else places[0]
    return usual


def channels_first(tensor, data_format):
    """An array (C, H, W), C among 1, 3 and 4, from one in `data_format`, or grey (H, W); ValueError at another shape."""
    shape = tuple(tensor.shape)
    if tensor.ndim == 2:
        tensor = tensor[None]
    elif tensor.ndim == 3 and data_format == "channels_last":
        tensor = tensor.permute(2, 0, 1)
    if tensor.ndim != 3 or len(tensor) not in (1, 3, 4) or tensor.numel() == 0:
        raise ValueError(
            f"an image must have shape (height, width, channels) or (channels, height, width) with 3 channels, 4 with "
            f"transparency or 1, or (height, width); got {shape}"
        )
    return tensor


def to_rgb(tensor):
    """Three channels of 1, 3 or 4, float in [0, 1]; what is transparent lies on white."""
    if len(tensor) == 4:
        return tensor[:3] * tensor[3:] + 1 - tensor[3:]
    return tensor.expand(3, -1, -1)


def upright(image):
    """A PIL image as its EXIF data turn it; as it is where they are damaged, which Pillow does not mind either on opening."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # of a dozen kinds, SyntaxError among them
        return image


def pil_to_tensor(image):
    """A PIL image as (3, height, width) float32 in [0, 1], upright, transparent parts on white."""
    image = upright(image)
    if 0 in image.size:
        raise ValueError(f"an image must have at least one pixel, got {image.width}x{image.height}")
    if image.mode in ("I", "F"):
        raise ValueError(
            f"a PIL image of mode {image.mode!r} has no fixed range of values; scale it and convert it to mode L"
        )
    if image.mode.startswith("I;16"):  # PIL's own conversion would clip at 255
        values = np.array(image)
        grey = torch.from_numpy(values.astype(np.float32) / 65535)
        if (transparent := image.info.get("transparency")) is not None:
            grey = grey.masked_fill(torch.from_numpy(values == transparent), 1.0)
        return grey.expand(3, *grey.shape)
    if image.has_transparency_data:
        transparent = image.info.get("transparency")
        if isinstance(transparent, tuple) and max(transparent) > 255:  # of a PNG of 16 bits, of which PIL keeps 8
            image.info["transparency"] = tuple(value >> 8 for value in transparent)
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 255


def resize_and_crop(image, height, width):
    """Scale (3, H, W) until it covers (height, width), then cut out the centre; at a cost bounded by the two sizes."""
    scale = max(height / image.shape[1], width / image.shape[2])
    if max(image.shape[1] * scale / height, image.shape[2] * scale / width) > MOST_COVERING:
        image = cut_ends(image, height / scale, width / scale, margin=math.ceil(2 / min(scale, 1)))
    covering, (top, left) = covering_size(image.shape[1:], height, width)
    if covering != tuple(image.shape[1:]):
        image = torch.nn.functional.interpolate(image[None], size=covering, mode="bicubic", antialias=True)
        image = image[0].clamp(0, 1)
    return image[:, top : top + height, left : left + width]


def cut_ends(image, height, width, margin):
    """The middle of (3, H, W), with a margin around what is needed of it; the centre stays, to the half pixel."""
    for dim, needed in ((1, height), (2, width)):
        left_over = max(0, image.shape[dim] - math.ceil(needed) - 2 * margin)
        image = image.narrow(dim, left_over // 2, image.shape[dim] - left_over // 2 * 2)
    return image


def covering_size(size, height, width):
    """What an image (H, W) is scaled to until it covers (height, width), and where the part that is cut out begins."""
    scale = max(height / size[0], width / size[1])
    covering = max(height, round(size[0] * scale)), max(width, round(size[1] * scale))
    return covering, ((covering[0] - height) // 2, (covering[1] - width) // 2)
