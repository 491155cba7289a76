"""Random changes of training images."""

import hashlib
import zlib

import torch
from torch.nn import functional as F


class Augmentation:
    """Crops, shifts and mirrors images at random.

    What happens to an image depends on the seed, the epoch and its pixels only: in any batch, process and worker, and
    after resuming, it is the same.

    Args:
        seed: another one, other changes.
        horizontal_flips: mirror each image left to right with probability 1/2.
        no_flip_column: column that is true for images that must not be mirrored, such as those of letters.
        random_crop: keep a random part of an image, as large as can be, where its shape is another than is wanted.
        max_shift: pixels by which an image is moved at most, up or down and left or right; its border is repeated.
    """

    def __init__(self, seed, horizontal_flips=False, no_flip_column=None, random_crop=False, max_shift=0):
        self.seed = seed
        self.horizontal_flips = horizontal_flips
        self.no_flip_column = no_flip_column
        self.random_crop = random_crop
        self.max_shift = max_shift

    def crop(self, image, height, width, epoch):
        """A part of an upright PIL image, of the shape of (height, width); the whole image without `random_crop`."""
        if not self.random_crop:
            return image
        scale = min(image.width / width, image.height / height)
        sides = max(1, round(width * scale)), max(1, round(height * scale))
        _, places = self._draw(image.tobytes(), epoch)
        left, top = (place % (whole - side + 1) for place, whole, side in zip(places, image.size, sides))
        return image.crop((left, top, left + sides[0], top + sides[1]))

    def __call__(self, pixel_values, rows, epoch):
        """`pixel_values` (B, 3, H, W) of these rows, changed."""
        if not (self.max_shift or self.horizontal_flips):
            return pixel_values
        draws = [self._draw(image.flatten().numpy(), epoch) for image in pixel_values]
        if self.max_shift > 0:
            height, width = pixel_values.shape[2:]
            padded = F.pad(pixel_values, 4 * (self.max_shift,), mode="replicate")
            places = [[draw % (2 * self.max_shift + 1) for draw in shifts] for _, shifts in draws]
            pixel_values = torch.stack(
                [image[:, top : top + height, left : left + width] for image, (top, left) in zip(padded, places)]
            )
        if self.horizontal_flips:
            flips = torch.tensor([coin for coin, _ in draws]) & may_flip(rows, self.no_flip_column)
            pixel_values = torch.where(flips[:, None, None, None], pixel_values.flip(-1), pixel_values)
        return pixel_values

    def _draw(self, pixels, epoch):
        """A fair coin and two numbers, which know only the seed, the epoch and the image's bytes."""
        pixels = zlib.crc32(pixels)  # not of the epoch too: CRC is linear, all would turn together
        digest = hashlib.blake2b(f"{self.seed} {epoch} {pixels}".encode()).digest()
        return bool(digest[0] & 1), [int.from_bytes(digest[1 + 4 * axis : 5 + 4 * axis], "big") for axis in (0, 1)]


def may_flip(rows, no_flip_column=None):
    """Which rows' images may be mirrored, (B,) bool."""
    return torch.tensor([no_flip_column is None or not row[no_flip_column] for row in rows])
