"""Random changes of training images: what is drawn, when it is drawn anew, and what stays as it is."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from dq_hf.data.augmentation import Augmentation
from dq_hf.data.images import ImageCollator, decode_image
from dq_hf.modeling.image_processing_dq import DQImageProcessor


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


@pytest.mark.parametrize(("width", "height"), [(40, 8), (16, 60), (16, 16)])
def test_a_random_part_of_the_wanted_shape_is_kept(width, height):
    """Of ramps, whose grey values tell the place."""
    ramp = np.linspace(0, 250, max(width, height)).round().astype(np.uint8)
    pixels = np.broadcast_to(ramp[None, :width] if width > height else ramp[:height, None], (height, width))
    augmentation = Augmentation(0, random_crop=True)
    image = Image.fromarray(pixels)
    crops = [augmentation.crop(image, 8, 16, epoch) for epoch in range(200)]
    wanted = {(40, 8): (16, 8), (16, 60): (16, 8), (16, 16): (16, 8)}[width, height]
    assert {crop.size for crop in crops} == {wanted}
    firsts = {crop.getpixel((0, 0)) for crop in crops}
    places = width - wanted[0] + height - wanted[1] + 1
    assert len(firsts) > 0.8 * places and min(firsts) <= ramp[2]
    assert augmentation.crop(image, 8, 16, 3).tobytes() == crops[3].tobytes()


def test_photographs_are_turned_upright_before_they_are_cropped():
    image = Image.new("RGB", (40, 8))
    image.getexif()[0x0112] = 6  # a quarter turn
    image.save(file := io.BytesIO(), "jpeg", exif=image.getexif())
    processor = DQImageProcessor(size={"height": 20, "width": 8})
    collate = ImageCollator(processor, augmentation=Augmentation(0, random_crop=True))
    for value in (file.getvalue(), Image.open(file)):
        assert Augmentation(0, random_crop=True).crop(decode_image(value), 20, 8, 0).size == (8, 20)
        assert collate([{"image": value}])["pixel_values"].shape == (1, 3, 20, 8)


def test_a_photograph_with_damaged_exif_data_is_cropped_as_it_lies():
    file = io.BytesIO()
    Image.new("RGB", (40, 8)).save(file, "jpeg", exif=b"Exif\0\0JUNKJUNK")
    collate = ImageCollator(DQImageProcessor(size=8), augmentation=Augmentation(0, random_crop=True))
    assert collate([{"image": file.getvalue()}])["pixel_values"].shape == (1, 3, 8, 8)
