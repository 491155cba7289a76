"""Images of every kind to pixel_values and back: exact values, geometry, and refusal of what would lose data."""

import json
import math
import struct
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.overrides import TorchFunctionMode

from dq_hf.modeling.image_processing_dq import DQImageProcessor

RGB = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
EXPECTED = torch.from_numpy(RGB).permute(2, 0, 1)[None] / 127.5 - 1  # 0 ... 255 to -1 ... 1


@pytest.fixture
def processor():
    """Leaves images at their own size."""
    return DQImageProcessor(do_resize=False)


def as_bytes(pixel_values):
    """(B, 3, H, W) in [-1, 1] as numbers from 0 to 255."""
    return (pixel_values.double() + 1) * 127.5


CHANNELS_FIRST = torch.from_numpy(RGB).permute(2, 0, 1)
CONTAINERS = [
    *(Image.fromarray(RGB), RGB, RGB.transpose(2, 0, 1), RGB.astype(np.float64) / 255),
    *(RGB.astype(np.float32).transpose(2, 0, 1) / 255, np.flip(RGB[:, ::-1].copy(), axis=1)),  # with negative strides
    *(torch.from_numpy(RGB), CHANNELS_FIRST, CHANNELS_FIRST[None], CHANNELS_FIRST / 255),
    *(RGB[None], [Image.fromarray(RGB)], (RGB,), [[RGB[None]]]),
]


@pytest.mark.parametrize("image", CONTAINERS, ids=lambda image: type(image).__name__)
def test_every_container_gives_the_same_pixel_values(processor, image):
    pixel_values = processor(image)["pixel_values"]
    assert pixel_values.dtype == torch.float32
    torch.testing.assert_close(pixel_values, EXPECTED, atol=1e-6, rtol=0)
    assert torch.equal(processor.preprocess(image, return_tensors="pt").pixel_values, pixel_values)
    of_its_size = DQImageProcessor(size={"height": 6, "width": 8})
    assert torch.equal(of_its_size(image)["pixel_values"], pixel_values)


def test_arrays_with_three_rows_keep_the_convention_of_their_library(processor):
    square = np.arange(27, dtype=np.uint8).reshape(3, 3, 3)
    last = torch.from_numpy(square).permute(2, 0, 1)[None] / 127.5 - 1
    first = torch.from_numpy(square)[None] / 127.5 - 1
    torch.testing.assert_close(processor(square)["pixel_values"], last, atol=1e-6, rtol=0)
    torch.testing.assert_close(processor(torch.from_numpy(square))["pixel_values"], first, atol=1e-6, rtol=0)


def with_transparent(index):
    image = Image.new("P", (2, 2), 1)
    image.putpalette([9, 9, 9, 200, 100, 50])
    image.info |= {} if index is None else {"transparency": index}
    return image


WHITE, BROWN = (255, 255, 255), (200, 100, 50)


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("1", 1, WHITE),
        ("L", 77, (77, 77, 77)),
        ("P", None, BROWN),
        ("P", 1, WHITE),
        ("P", 0, BROWN),
        ("RGBA", (200, 100, 50, 255), BROWN),
        ("RGBA", (200, 100, 50, 0), WHITE),
        ("RGBA", (200, 100, 50, 51), (244, 224, 214)),  # a fifth of the colour on white
        ("LA", (100, 0), WHITE),
        ("LA", (100, 255), (100, 100, 100)),
        ("CMYK", (0, 255, 255, 0), (255, 0, 0)),
        ("I;16", 65535, WHITE),
        ("I;16", 30000, (30000 / 257,) * 3),  # PIL's own conversion clips it to white
        ("I;16B", 30000, (30000 / 257,) * 3),
    ],
)
def test_pil_modes(processor, mode, colour, expected):
    if mode == "I;16B":
        image = Image.fromarray(np.full((2, 2), colour, dtype=">u2"))
    else:
        image = with_transparent(colour) if mode == "P" else Image.new(mode, (2, 2), colour)
    values = as_bytes(processor(image)["pixel_values"])
    assert values.shape == (1, 3, 2, 2)
    for channel, value in enumerate(expected):
        np.testing.assert_allclose(values[0, channel].numpy(), value, atol=0.01 if value % 1 else 1.0)


def test_photographs_are_turned_upright_by_their_exif_orientation(processor, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it rotated by 90 degrees clockwise
    Image.fromarray(RGB).save(tmp_path / "photo.png", exif=exif)
    with Image.open(tmp_path / "photo.png") as photo:
        pixel_values = processor(photo)["pixel_values"]
    torch.testing.assert_close(pixel_values, EXPECTED.rot90(-1, dims=(2, 3)), atol=1e-6, rtol=0)


@given(st.integers(0, 2**32 - 1), st.integers(1, 9), st.integers(1, 9))
def test_round_trip_is_exact_for_bytes(seed, height, width):
    array = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    processor = DQImageProcessor(do_resize=False)
    (image,) = processor.post_process(processor(Image.fromarray(array))["pixel_values"])
    assert np.array_equal(np.array(image), array)
    ramp = np.arange(256, dtype=np.uint8)[None, :, None].repeat(3, axis=2)
    pixel_values = processor(ramp)["pixel_values"]
    assert pixel_values.min() == -1 and pixel_values.max() == 1
    assert np.array_equal(np.array(processor.post_process(pixel_values)[0]), ramp)


def test_post_process_clips_and_gives_three_kinds(processor):
    pixel_values = torch.tensor([-3.0, -1.0, 0.0, 0.5, 1.0, 3.0]).expand(2, 3, 1, 6)
    expected = np.array([0, 0, 0.5, 0.75, 1, 1])
    assert np.array_equal(processor.post_process(pixel_values, "np")[1, 0, :, 2], expected)
    assert np.array_equal(processor.post_process(pixel_values, "pt")[1, 2, 0].numpy(), expected)
    images = processor.post_process(pixel_values.bfloat16().requires_grad_())
    assert [image.size for image in images] == [(6, 1), (6, 1)]
    assert np.array_equal(np.array(images[0])[0, :, 0], [0, 0, 128, 191, 255, 255])


@pytest.mark.parametrize(
    ("pixel_values", "output_type", "error"),
    [
        (torch.zeros(3, 4, 4), "pil", r"shape \(B, 3, height, width\), got \(3, 4, 4\)"),
        (torch.zeros(1, 1, 4, 4), "pil", r"got \(1, 1, 4, 4\)"),
        (np.zeros((1, 3, 4, 4)), "pil", "got ndarray"),
        (torch.full((1, 3, 4, 4), torch.nan), "pil", "must be finite"),
        (torch.zeros(1, 3, 4, 4), "jpeg", "output_type must be .* got 'jpeg'"),
    ],
)
def test_post_process_refuses(processor, pixel_values, output_type, error):
    with pytest.raises(ValueError, match=error):
        processor.post_process(pixel_values, output_type)


def noise(height, width):
    return np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("height", "width", "rows", "columns"),
    [(10, 8, slice(2, 8), slice(0, 8)), (6, 13, slice(0, 6), slice(2, 10)), (7, 8, slice(0, 6), slice(0, 8))],
)
def test_the_centre_is_cut_out_without_scaling_where_one_side_fits(height, width, rows, columns):
    array = noise(height, width)
    pixel_values = DQImageProcessor(size={"height": 6, "width": 8})(array)["pixel_values"]
    expected = torch.from_numpy(array[rows, columns]).permute(2, 0, 1)[None] / 127.5 - 1
    torch.testing.assert_close(pixel_values, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 5), (100, 7), (5, 100), (31, 33)])
@pytest.mark.parametrize(("target_height", "target_width"), [(8, 8), (16, 8)])
def test_any_size_becomes_the_wanted_one_and_plain_colour_stays(height, width, target_height, target_width):
    image = Image.new("RGB", (width, height), (200, 100, 50))
    processor = DQImageProcessor(size={"height": target_height, "width": target_width})
    values = as_bytes(processor(image)["pixel_values"])
    assert values.shape == (1, 3, target_height, target_width)
    for channel, value in enumerate((200, 100, 50)):
        np.testing.assert_allclose(values[0, channel].numpy(), value, atol=0.01)


def test_scaling_is_near_pil_bicubic_and_stays_in_range():
    array = noise(8, 8).repeat(5, axis=0).repeat(5, axis=1)
    values = as_bytes(DQImageProcessor(size={"height": 16, "width": 16})(array)["pixel_values"])[0]
    expected = np.array(Image.fromarray(array).resize((16, 16), Image.BICUBIC)).transpose(2, 0, 1)
    np.testing.assert_allclose(values.numpy(), expected, atol=1.5)
    array = noise(4, 4)
    array[::2] = 255
    values = DQImageProcessor(size={"height": 32, "width": 32})(array)["pixel_values"]
    assert values.min() >= -1 and values.max() <= 1


def test_images_of_several_sizes_make_one_batch_only_by_resizing(processor):
    images = [Image.new("RGB", (8, 3)), Image.new("RGB", (9, 20))]
    for data_format in ("channels_first", "channels_last"):
        with pytest.raises(ValueError, match=r"one size, got \[\(3, 8\), \(20, 9\)\]; use do_resize=True"):
            processor(images, data_format=data_format)
    assert processor(images, size={"height": 4, "width": 6}, do_resize=True)["pixel_values"].shape == (2, 3, 4, 6)
    assert processor.do_resize is False and processor.size == {"height": 256, "width": 256}


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        ([], ValueError, "at least one image, got an empty list"),
        (RGB[None][:0], ValueError, "at least one image"),
        ("photo.png", TypeError, "numpy array or a torch tensor, got str; open it: PIL.Image.open..photo.png"),
        ([RGB, None], TypeError, "got NoneType"),
        ([1, 2], TypeError, "got int"),
        (Image.new("RGB", (0, 5)), ValueError, "at least one pixel, got 0x5"),
        (Image.new("I", (2, 2)), ValueError, "mode 'I' has no fixed range"),
        (Image.new("F", (2, 2)), ValueError, "mode 'F' has no fixed range"),
        (RGB[0, 0], ValueError, r"shape \(height, width, channels\) or .*; got \(3,\)"),
        (RGB[..., :2], ValueError, r"got \(6, 8, 2\)"),
        (np.concatenate([RGB, RGB], axis=2), ValueError, r"got \(6, 8, 6\)"),
        (RGB[:0], ValueError, r"got \(0, 8, 3\)"),
        (RGB.astype(np.int64), TypeError, r"must be uint8 \(0 ... 255\) or float \(0 ... 1\), got torch.int64"),
        (RGB.astype(np.uint16), TypeError, "got torch.uint16"),
        (RGB > 100, TypeError, "got torch.bool"),
        (RGB.astype(np.float32), ValueError, r"lie in \[0, 1\], got values from 0 to 2[0-9]+"),
        (EXPECTED[0], ValueError, r"lie in \[0, 1\], got values from -1 .* already in \[-1, 1\]"),
        (np.full((2, 2, 3), math.nan), ValueError, "finite .* got values from nan"),
        (torch.full((3, 2, 2), math.inf), ValueError, "finite .* to inf"),
    ],
)
def test_bad_images_are_refused(processor, images, error, message):
    with pytest.raises(error, match=message):
        processor(images)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(size="64"), ValueError, "size must be {.*} or one number, got '64'"),
        (dict(size=True), ValueError, "size must be {.*} or one number, got True"),
        (dict(size=(1, 2, 3)), ValueError, "size must be {.*} or one number, got"),
        (dict(size={"height": 64}), ValueError, "size must be {.*} or one number, got"),
        (dict(size={"height": 64, "widht": 64}), ValueError, "size must be {.*} or one number, got"),
        (dict(size=0), ValueError, "positive whole numbers"),
        (dict(size={"height": 0, "width": 64}), ValueError, "positive whole numbers"),
        (dict(size={"height": 64.0, "width": 64}), ValueError, "positive whole numbers"),
        (dict(size={"height": True, "width": 64}), ValueError, "positive whole numbers"),
        (dict(do_resize="no"), TypeError, "do_resize must be True or False, got 'no'"),
        (dict(do_rescale=1), TypeError, "do_rescale must be True or False, got 1"),
        (dict(do_normalize="yes"), TypeError, "do_normalize must be True or False, got 'yes'"),
        (dict(sise=64), TypeError, "no argument sise; it has size, do_resize"),
        (dict(image_mean=[0.48, 0.46, 0.41]), ValueError, r"image_mean must be \[0.5, 0.5, 0.5\], which the models"),
        (dict(resample=0), ValueError, "resample must be 3, .* got 0"),
    ],
)
def test_bad_options_are_refused(processor, options, error, message):
    with pytest.raises(error, match=message):
        DQImageProcessor(**options)
    with pytest.raises(error, match=message):
        processor(RGB, **options)


@pytest.mark.parametrize("name", ["return_tensors", "data_format", "input_data_format"])
def test_other_formats_are_refused(processor, name):
    with pytest.raises(ValueError, match=f"{name} must be one of .*; got 'tf'"):
        processor(RGB, **{name: "tf"})


def test_arguments_of_transformers_processors_mean_what_they_mean_there(processor):
    pixel_values = processor(RGB)["pixel_values"]
    usual = dict(
        resample=Image.BICUBIC, rescale_factor=1 / 255, image_mean=0.5, image_std=(0.5, 0.5, 0.5), do_pad=False
    )
    assert torch.equal(processor(RGB, **usual, do_convert_rgb=True)["pixel_values"], pixel_values)
    for means in (np.full(3, 0.5), torch.full((3,), 0.5)):
        assert torch.equal(processor(RGB, image_mean=means)["pixel_values"], pixel_values)
    array = processor(RGB, return_tensors="np")["pixel_values"]
    assert isinstance(array, np.ndarray) and np.array_equal(array, pixel_values.numpy())
    last = processor(RGB, data_format="channels_last", device="cpu")["pixel_values"]
    assert torch.equal(last.permute(0, 3, 1, 2), pixel_values)
    several = processor([RGB, RGB[:2]], return_tensors=None)["pixel_values"]
    assert [tuple(each.shape) for each in several] == [(3, 6, 8), (3, 2, 8)]
    for size in (4, (4, 4), [4, 4]):
        assert DQImageProcessor(size=size).size == {"height": 4, "width": 4}
        assert processor(RGB, size=size, do_resize=True)["pixel_values"].shape == (1, 3, 4, 4)

    plain = torch.from_numpy(RGB).permute(2, 0, 1)[None].float()
    torch.testing.assert_close(processor(RGB, do_normalize=False)["pixel_values"], plain / 255)
    torch.testing.assert_close(processor(Image.fromarray(RGB), do_rescale=False)["pixel_values"], 2 * plain - 1)
    torch.testing.assert_close(processor(RGB, do_rescale=False, do_normalize=False)["pixel_values"], plain)
    torch.testing.assert_close(processor(RGB / 255, do_rescale=False)["pixel_values"].float(), pixel_values)


@pytest.mark.filterwarnings("error")
def test_an_array_of_an_image_may_be_read_only_and_of_other_bytes(processor):
    image = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
    expected = processor(image)["pixel_values"]
    assert torch.equal(processor(np.asarray(image))["pixel_values"], expected)
    assert torch.equal(processor(np.asarray(image).astype(">f4") / 255)["pixel_values"], expected)


def test_grey_and_transparent_arrays_and_their_channels(processor):
    alpha = np.random.default_rng(2).integers(0, 256, (6, 8, 1), dtype=np.uint8)
    transparent = np.concatenate([RGB, alpha], axis=2)
    share = alpha / 255
    on_white = torch.from_numpy(RGB / 255 * share + (1 - share)).permute(2, 0, 1)[None].float() * 2 - 1
    for image in (transparent, transparent / 255, torch.from_numpy(transparent).permute(2, 0, 1)):
        torch.testing.assert_close(processor(image)["pixel_values"], on_white)
    grey = RGB[..., 0]
    expected = (torch.from_numpy(grey).float() / 127.5 - 1).expand(1, 3, 6, 8)
    for image in (grey, grey[..., None], grey[None], torch.from_numpy(grey)):
        torch.testing.assert_close(processor(image)["pixel_values"], expected)
    cube = np.random.default_rng(3).integers(0, 256, (3, 3, 3), dtype=np.uint8)
    first = processor(cube, input_data_format="channels_first")["pixel_values"]
    assert torch.equal(first[0], processor(cube)["pixel_values"][0].permute(1, 2, 0))


def test_a_step_that_is_left_out_is_saved(tmp_path):
    DQImageProcessor(do_normalize=False).save_pretrained(tmp_path)
    assert DQImageProcessor.from_pretrained(tmp_path).do_normalize is False


def test_saving_and_loading_keeps_the_options(tmp_path):
    size = {"height": 8, "width": 12}
    DQImageProcessor(size=size, do_resize=False).save_pretrained(tmp_path)
    content = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert content == {"do_resize": False, "image_processor_type": "DQImageProcessor", "size": size}
    loaded = DQImageProcessor.from_pretrained(tmp_path)
    assert loaded.size == size and loaded.do_resize is False
    assert DQImageProcessor.from_pretrained(tmp_path, do_resize=True)(RGB)["pixel_values"].shape == (1, 3, 8, 12)
    loaded.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "preprocessor_config.json").read_text()) == content
    DQImageProcessor().size["height"] = 1
    assert DQImageProcessor().size == {"height": 256, "width": 256}


@pytest.mark.parametrize(("mode", "transparent"), [("I;16", 40000), ("I;16", 0), ("L", 7), ("RGB", (9, 9, 9))])
def test_what_a_file_marks_as_transparent_is_white(processor, tmp_path, mode, transparent):
    colour = transparent if mode != "RGB" else (9, 9, 9)
    image = Image.new(mode, (32, 24), colour)
    image.putpixel((0, 0), 20000 if mode == "I;16" else 100 if mode == "L" else (100, 100, 100))
    image.save(tmp_path / "a.png", transparency=transparent)
    pixel_values = processor(Image.open(tmp_path / "a.png"))["pixel_values"][0]
    assert (pixel_values[:, 1:, 1:] == 1).all()
    expected = 20000 / 65535 if mode == "I;16" else 100 / 255
    assert pixel_values[:, 0, 0].tolist() == pytest.approx([2 * expected - 1] * 3)


def test_sixteen_bit_colours_that_a_file_marks_as_transparent_are_white(processor, tmp_path):
    colours = struct.pack(">3H", 0x1234, 0x5678, 0x9ABC) * (24 * 32 - 1) + struct.pack(">3H", 0xFFFF, 0, 0)
    lines = b"".join(b"\0" + colours[start : start + 32 * 6] for start in range(0, len(colours), 32 * 6))

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">2I5B", 32, 24, 16, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"tRNS", colours[:6]), (b"IDAT", zlib.compress(lines)), (b"IEND", b"")]
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in chunks))
    pixel_values = processor(Image.open(tmp_path / "a.png"))["pixel_values"][0]
    assert (pixel_values[:, :-1] == 1).all() and pixel_values[:, -1, -1].tolist() == [1, -1, -1]


@pytest.mark.parametrize(("height", "width"), [(1, 3000), (3000, 1), (24, 4000), (120, 9000), (48, 5000)])
def test_long_thin_images_are_cut_before_they_are_scaled(height, width):
    image = torch.rand(3, height, width, generator=torch.Generator().manual_seed(0))
    largest = 0

    class Watch(TorchFunctionMode):
        def __torch_function__(self, function, types, arguments=(), options=None):
            nonlocal largest
            result = function(*arguments, **(options or {}))
            if isinstance(result, torch.Tensor) and function is torch.nn.functional.interpolate:
                largest = max(largest, result.numel())
            return result

    with Watch():
        pixel_values = DQImageProcessor(size=(24, 32))(image)["pixel_values"][0]
    assert largest <= 6 * 3 * 32 * 32
    scale = max(24 / height, 32 / width)
    whole = torch.nn.functional.interpolate(
        image[None],
        size=[max(24, round(height * scale)), max(32, round(width * scale))],
        mode="bicubic",
        antialias=True,
    )[0].clamp(0, 1)
    top, left = (whole.shape[1] - 24) // 2, (whole.shape[2] - 32) // 2
    expected = whole[:, top : top + 24, left : left + 32] * 2 - 1
    assert torch.allclose(pixel_values, expected, atol=1e-3)
