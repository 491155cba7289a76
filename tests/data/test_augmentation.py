"""Random changes of training images: what is drawn, when it is drawn anew, and what stays as it is."""

import pytest
import torch

from dq_hf.data.augmentation import Augmentation


@pytest.fixture
def images():
    return torch.rand(400, 3, 6, 5, generator=torch.Generator().manual_seed(0))


def shift_of(image, shifted, most):
    """(rows, columns) by which an image was moved, its border being repeated."""
    height, width = image.shape[1:]
    for down in range(-most, most + 1):
        for right in range(-most, most + 1):
            rows = (torch.arange(height) - down).clamp(0, height - 1)
            columns = (torch.arange(width) - right).clamp(0, width - 1)
            if torch.equal(image[:, rows][:, :, columns], shifted):
                return down, right
    raise AssertionError("the image was not moved, but changed")


def test_images_are_shifted_by_up_to_so_many_pixels_and_their_border_is_repeated(images):
    augmentation = Augmentation(0, max_shift=2)
    first, second = (
        [shift_of(*pair, most=2) for pair in zip(images, augmentation(images, [{}] * 400, epoch))] for epoch in (0, 1)
    )
    places = [first.count((down, right)) for down in range(-2, 3) for right in range(-2, 3)]
    assert sum(places) == 400 and 3 <= min(places) and max(places) <= 33  # 16 on average
    assert sum(one == two for one, two in zip(first, second)) < 40
    alone = augmentation(images[7:8], [{}], 0)
    assert shift_of(images[7], alone[0], most=2) == first[7]


def test_images_of_letters_are_never_mirrored(images):
    rows = [{"letters": i % 2 == 0} for i in range(400)]
    changed = Augmentation(0, horizontal_flips=True, no_flip_column="letters")(images, rows, 0)
    assert torch.equal(changed[::2], images[::2])
    mirrored = sum(torch.equal(one, two.flip(-1)) for one, two in zip(changed[1::2], images[1::2]))
    assert 65 < mirrored < 135  # 100 of 200 on average
