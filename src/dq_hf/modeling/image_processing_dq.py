"""Images to `pixel_values` and back."""

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor

from .configuration_utils_dq import MOST_WIDTH
from .hub_dq import ProcessorHubMixin, without_remote_code

# Besides the arguments, what transformers writes into a processor's file.
FILE_KEYS = {"image_processor_type", "processor_class", "auto_map"}


class DQImageProcessor(ProcessorHubMixin, BaseImageProcessor):
    """PIL images, numpy arrays or torch tensors, one or a list, to `pixel_values` in [-1, 1], and back.

    Args:
        size: {"height", "width"} in pixels. With `do_resize` the image is scaled until it covers this size, keeping
            its shape (bicubic, antialiased), and the centre is cut out.
        do_resize: False keeps every image at its own size; all images of one call must then have the same.
    """

    model_input_names = ["pixel_values"]

    def __init__(self, size=None, do_resize=True, **kwargs):
        if unknown := sorted(set(kwargs) - FILE_KEYS):
            raise TypeError(f"DQImageProcessor has no argument {', '.join(unknown)}; it has size and do_resize")
        super().__init__(**without_remote_code(kwargs))
        self.size = check_size({"height": 256, "width": 256} if size is None else size)
        self.do_resize = check_do_resize(do_resize)

    @classmethod
    def for_model(cls, config, do_resize=True):
        """The processor that gives images the size of a tokenizer with this `DQVAEConfig`."""
        height, width = config.image_height_width
        return cls(size={"height": height, "width": width}, do_resize=do_resize)

    def __call__(self, images, size=None, do_resize=None, return_tensors="pt"):
        """`pixel_values` (B, 3, height, width) float32 in [-1, 1], in a `BatchFeature`.

        Args:
            images: an image or a list. PIL in any mode with a fixed range, turned upright by its EXIF orientation,
                transparent parts on white; arrays and tensors of three channels, first or last, integers 0 ... 255
                (uint8) or floats in [0, 1]; four dimensions are a batch.
            size, do_resize: instead of the processor's own.
            return_tensors: always "pt".

        Raises:
            TypeError: not an image, or an array of another dtype.
            ValueError: wrong channels, values out of range or NaN, or different sizes that cannot be stacked.
        """
        if return_tensors != "pt":
            raise ValueError(f'return_tensors must be "pt", got {return_tensors!r}')
        size = self.size if size is None else check_size(size)
        do_resize = self.do_resize if do_resize is None else check_do_resize(do_resize)
        tensors = [to_tensor(image) for image in flatten_images(images)]
        if not tensors:
            raise ValueError("images must hold at least one image, got an empty list")
        if do_resize:
            tensors = [resize_and_crop(tensor, size["height"], size["width"]) for tensor in tensors]
        shapes = {tuple(tensor.shape[1:]) for tensor in tensors}
        if len(shapes) > 1:
            raise ValueError(f"images of one call must have one size, got {sorted(shapes)}; use do_resize=True")
        return BatchFeature({"pixel_values": torch.stack(tensors) * 2 - 1})

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
        pixel_values = pixel_values.detach()
        if output_type == "pt":
            return to_unit(pixel_values)
        if output_type == "np":
            return to_unit(pixel_values).permute(0, 2, 3, 1).cpu().numpy()
        if output_type == "pil":
            return [Image.fromarray(image.permute(1, 2, 0).cpu().numpy()) for image in to_bytes(pixel_values)]
        raise ValueError(f'output_type must be "pil", "np" or "pt", got {output_type!r}')


def to_unit(pixel_values):
    """Images in [-1, 1] as float32 in [0, 1]; what lies outside is clipped."""
    return (pixel_values.float() / 2 + 0.5).clamp(0, 1)


def to_bytes(pixel_values):
    """uint8 of images in [-1, 1]; what lies outside is clipped, as in any file."""
    return (to_unit(pixel_values) * 255).round().to(torch.uint8)


def from_bytes(images):
    """What `DQImageProcessor` gives for such an image: float32 in [-1, 1]."""
    return images.float() / 255 * 2 - 1


def check_size(size):
    """A copy of `size`, checked to be {"height": n, "width": n} with positive integers."""
    if not isinstance(size, dict) or set(size) != {"height", "width"}:
        raise ValueError(f'size must be {{"height": ..., "width": ...}}, got {size!r}')
    if any(type(side) is not int or not 1 <= side <= MOST_WIDTH for side in size.values()):
        raise ValueError(f"size must hold positive whole numbers up to {MOST_WIDTH}, got {size!r}")
    return dict(size)


def check_do_resize(do_resize):
    """`do_resize`, checked to be a bool."""
    if not isinstance(do_resize, bool):
        raise TypeError(f"do_resize must be True or False, got {do_resize!r}")
    return do_resize


def flatten_images(images):
    """A list of single images."""
    if isinstance(images, (list, tuple)):
        return [single for image in images for single in flatten_images(image)]
    if isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim == 4:
        return list(images)
    return [images]


def to_tensor(image):
    """One image as (3, height, width) float32 in [0, 1]."""
    if isinstance(image, Image.Image):
        return pil_to_tensor(image)
    if not isinstance(image, (np.ndarray, torch.Tensor)):
        raise TypeError(f"an image must be a PIL image, a numpy array or a torch tensor, got {type(image).__name__}")
    channels_last = isinstance(image, np.ndarray)
    tensor = torch.as_tensor(np.ascontiguousarray(image) if channels_last else image)  # torch has no negative strides
    if tensor.ndim != 3 or 3 not in (tensor.shape[0], tensor.shape[-1]) or tensor.numel() == 0:
        raise ValueError(
            f"an image must have shape (height, width, 3) or (3, height, width), got {tuple(tensor.shape)}; "
            'for grey or transparent images use PIL, Image.fromarray(array).convert("RGB")'
        )
    if tensor.shape[-1] == 3 and (channels_last or tensor.shape[0] != 3):
        tensor = tensor.permute(2, 0, 1)
    if tensor.dtype == torch.uint8:
        return tensor.float() / 255
    if not tensor.is_floating_point():
        raise TypeError(f"an image array must be uint8 (0 ... 255) or float (0 ... 1), got {tensor.dtype}; convert it")
    low, high = tensor.aminmax()
    if not (low >= 0 and high <= 1):
        raise ValueError(
            f"a float image must be finite and lie in [0, 1], got values from {float(low):.4g} to {float(high):.4g}; "
            "images that are already in [-1, 1] go to the model without the processor"
        )
    return tensor.float()


def pil_to_tensor(image):
    """A PIL image as (3, height, width) float32 in [0, 1], upright, transparent parts on white."""
    image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F"):
        raise ValueError(
            f"a PIL image of mode {image.mode!r} has no fixed range of values; scale it and convert it to mode L"
        )
    if image.mode.startswith("I;16"):  # PIL's own conversion would clip at 255
        grey = torch.from_numpy(np.array(image).astype(np.float32) / 65535)
        return grey.expand(3, *grey.shape)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 255


def resize_and_crop(image, height, width):
    """Scale (3, H, W) until it covers (height, width), then cut out the centre."""
    scale = max(height / image.shape[1], width / image.shape[2])
    if scale != 1:
        covering = [max(height, round(image.shape[1] * scale)), max(width, round(image.shape[2] * scale))]
        image = torch.nn.functional.interpolate(image[None], size=covering, mode="bicubic", antialias=True)
        image = image[0].clamp(0, 1)
    top, left = (image.shape[1] - height) // 2, (image.shape[2] - width) // 2
    return image[:, top : top + height, left : left + width]
