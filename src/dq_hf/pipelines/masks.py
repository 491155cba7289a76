"""Masks, as users give them, and the regions that they touch."""

import numpy as np
import torch
from PIL import Image

from ..modeling.image_processing_dq import as_tensor, covering_size, upright

MASKED = 0.5  # from this value on, of 1


def read_masks(masks):
    """A list of masks (H, W), bool, from one mask or a list, of the kinds that `DQInpaintPipeline` names.

    Raises:
        TypeError: no mask.
        ValueError: another number of dimensions, or values out of range.
    """
    if isinstance(masks, (list, tuple)):
        return [mask for each in masks for mask in read_masks(each)]
    if isinstance(masks, Image.Image):
        return [to_unit_mask(pil_to_grey(masks)) >= MASKED]
    if not isinstance(masks, (np.ndarray, torch.Tensor)):
        raise TypeError(f"a mask must be a PIL image, a numpy array or a torch tensor, got {type(masks).__name__}")
    masks = as_tensor(masks).detach().cpu()
    unit = to_unit_mask(masks)
    if unit.dim() in (3, 4) and unit.shape[-1] == 4:  # what is transparent is black
        unit = unit[..., :3] * unit[..., 3:]
    if unit.dim() in (3, 4) and unit.shape[-1] in (1, 3):
        unit = unit.mean(-1)
    elif unit.dim() == 4 and unit.shape[1] in (1, 3):
        unit = unit.mean(1)
    if unit.dim() == 2:
        unit = unit[None]
    if unit.dim() != 3 or unit.numel() == 0:
        raise ValueError(
            f"a mask must have shape (H, W), (H, W, 1, 3 or 4), (1, H, W) or, for several, (B, H, W); got {tuple(masks.shape)}"
        )
    return list(unit >= MASKED)


def pil_to_grey(mask):
    """An array (H, W) of a PIL image, upright; what is transparent is black."""
    mask = upright(mask)
    if mask.mode in ("I", "F"):
        return torch.from_numpy(np.array(mask))
    if mask.mode.startswith("I;16"):
        return torch.from_numpy(np.array(mask).astype(np.float32) / 65535)
    if mask.has_transparency_data:
        mask = mask.convert("RGBA")
        mask = Image.alpha_composite(Image.new("RGBA", mask.size, "black"), mask)
    return torch.from_numpy(np.array(mask.convert("L")))


def to_unit_mask(mask):
    """Booleans, integers (0 and 1, or 0 ... 255) or floats in [0, 1] as float32 in [0, 1]."""
    if mask.dtype == torch.bool or mask.numel() == 0:
        return mask.float()
    if mask.is_complex():
        raise TypeError(f"a mask must hold booleans, integers or floats, got {mask.dtype}")
    is_float, kind = mask.is_floating_point(), mask.dtype
    mask = mask.float() if is_float else mask.long()  # torch finds no largest uint16
    low, high = float(mask.min()), float(mask.max())
    most = 1 if is_float else 255
    if not (low >= 0 and high <= most):  # false for NaN, too
        raise ValueError(
            f"a mask of {kind} must lie in 0 ... {most}, got values from {low:.4g} to {high:.4g}; 1 marks what is "
            "drawn again"
        )
    return mask.float() if is_float or high <= 1 else mask.float() / 255


def masked_regions(mask, size, grid):
    """The regions that a mask touches once its image is scaled and cropped as by `DQImageProcessor`, (h, w) bool.

    Args:
        mask: (H, W) bool.
        size: (height, width) of the images that the model sees.
        grid: (h, w) regions.
    """
    covering, start = covering_size(mask.shape, *size)

    def parts(axis):
        """Of each row or column of regions the slice of the mask that it touches."""
        given, scaled, side = mask.shape[axis], covering[axis], size[axis] // grid[axis]
        for first in range(start[axis], start[axis] + size[axis], side):
            yield slice(first * given // scaled, -(-(first + side) * given // scaled))

    rows = torch.stack([mask[part].any(0) for part in parts(0)])
    return torch.stack([rows[:, part].any(1) for part in parts(1)], 1)
