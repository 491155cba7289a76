"""Editing: what the mask does not touch stays, whatever kinds of images and masks are given, and clear refusals."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from conftest import TEXT, make_text_encoder, make_text_tokenizer, make_transformer, make_vae, seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dq_hf import DQForImageGeneration, DQInpaintPipeline, DQPipeline
from dq_hf.modeling.image_processing_dq import covering_size
from dq_hf.pipelines.masks import masked_regions

KINDS = {
    "two": (dict(image_size=16), {}),
    "region-first": (dict(image_size=16), dict(fine_order="region-first", num_classes=3, class_dropout=0.2)),
    "three": (
        dict(image_size=16, granularities=[8, 4, 2], block_out_channels=[8, 8, 16, 16], entropy_thresholds=[1.0, 2.0]),
        dict(grid_sizes=[[2, 2], [4, 4], [8, 8]]),
    ),
}


def make_pipe(kind):
    vae, transformer = KINDS[kind]
    pipe = DQInpaintPipeline(make_vae(**vae), make_transformer(**transformer))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipes():
    return {kind: make_pipe(kind) for kind in KINDS}


@pytest.fixture(scope="module")
def pipe(pipes):
    return pipes["two"]


@pytest.fixture(scope="module")
def image():
    """16x16 pixels, half of them grey."""
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    noise[:, :7] = 128
    return Image.fromarray(noise)


def box(top, bottom, left, right, size=16):
    """A mask that is white in a box of pixels."""
    mask = np.zeros((size, size), dtype=bool)
    mask[top:bottom, left:right] = True
    return mask


def cells(regions, side):
    return regions.repeat_interleave(side, -2).repeat_interleave(side, -1)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=6)
@given(seed=st.integers(0, 2**32), share=st.floats(0, 1), overlay=st.booleans())
def test_what_the_mask_does_not_touch_keeps_codes_grain_map_and_pixels(pipes, image, kind, seed, share, overlay):
    pipe = pipes[kind]
    mask = torch.rand(16, 16, generator=seeded(seed)) < share / 8
    mask[seed % 16, seed // 16 % 16] = True
    labels = 1 if pipe.transformer.config.num_classes else None
    output = pipe(image=image, mask_image=mask, class_labels=labels, overlay=overlay, generator=seeded(seed))

    side = pipe.vae.config.granularities[0]
    touched = mask.view(16 // side, side, 16 // side, side).any(3).any(1)
    assert torch.equal(output.regenerated, touched[None])
    encoded = pipe.vae.encode(pipe.image_processor(image)["pixel_values"])
    assert torch.equal(output.grain_maps[0][~touched], encoded.grain_map[0][~touched])
    known = cells(~touched, encoded.codes.shape[1] // len(touched))
    assert torch.equal(output.codes[0][known], encoded.codes[0][known])
    found, inside = np.asarray(output.images[0]), cells(touched, side).numpy()
    if overlay:
        assert (found[~inside] == np.asarray(image)[~inside]).all()
    else:
        decoded = pipe.vae.decode_codes(output.codes).sample
        assert (found == np.asarray(pipe.image_processor.post_process(decoded)[0])).all()


def test_far_from_the_seam_new_regions_are_the_decoders_and_at_it_the_difference_is_made_up_for():
    """A grey picture beside a decoder that draws everything brighter by 0.1."""
    from dq_hf.pipelines.inpaint import keep_outside

    originals = torch.full((1, 3, 32, 32), 0.5)
    regenerated = torch.tensor([[[False, True, True, True]] * 4])  # regions of 8 pixels
    images = keep_outside(originals + 0.1, originals, regenerated)
    row = images[0, 0, 16]
    assert (row[:8] == 0.5).all()
    assert row[8] == pytest.approx(0.51, abs=0.012)
    assert (row[8:13].diff() > 0.015).all() and (row[13:] - 0.6).abs().max() < 1e-6


def test_a_full_mask_is_plain_sampling(pipes, image):
    pipe = pipes["region-first"]
    plain = DQPipeline.from_pipe(pipe)
    plain.set_progress_bar_config(disable=True)
    expected = plain(class_labels=[0, 2], generator=seeded(4))
    for num_candidates in (1, 3):
        arguments = dict(class_labels=[0, 2], generator=seeded(4), num_candidates=num_candidates)
        output = pipe(image=image, mask_image=np.ones((16, 16)), **arguments)
        assert torch.equal(output.codes, expected.codes)
        assert [np.asarray(each).tolist() for each in output.images] == [
            np.asarray(each).tolist() for each in expected.images
        ]


@pytest.mark.parametrize("num_candidates", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_several_elements_a_pass_give_the_same_image_in_fewer_passes(pipes, image, kind, num_candidates):
    pipe, config = pipes[kind], pipes[kind].transformer.config
    labels = [0, 1] if config.num_classes else None
    images, masks = [image, image.transpose(Image.Transpose.ROTATE_90)], [box(0, 7, 3, 12), box(9, 16, 0, 16)]

    def edit(lookahead):
        """Codes, and the number of passes."""
        steps = []
        output = pipe(
            image=images,
            mask_image=masks,
            class_labels=labels,
            grain_map=np.full(config.grid_sizes[0], len(config.grid_sizes) - 1),
            num_candidates=num_candidates,
            lookahead=lookahead,
            generator=seeded(5),
            callback_on_step_end=lambda pipe, step, *_: steps.append(step),
        )
        return output.codes, len(steps)

    codes, passes = zip(*map(edit, (1, 3, 100)))
    assert all(torch.equal(each, codes[0]) for each in codes)
    assert passes == tuple(sorted(passes, reverse=True)) and passes[-1] < passes[0]


WHITE, BLACK = box(2, 7, 9, 15), np.zeros((16, 16), dtype=bool)
GREY = Image.fromarray(WHITE.astype(np.uint8) * 200)
MASKS = {
    "bool": WHITE,
    "0 and 1": WHITE.astype(np.int64),
    "0 ... 255": WHITE.astype(np.uint8) * 255,
    "16 bits": WHITE.astype(np.uint16) * 255,
    "other bytes first": WHITE.astype(">i2"),
    "read only": np.asarray(GREY),
    "float": WHITE * 0.7,
    "soft": np.where(WHITE, 0.5, 0.49).astype(np.float32),
    "channel last": WHITE[..., None],
    "colours": np.stack([WHITE] * 3, -1).astype(np.float32),
    "colours, transparent outside": np.stack([np.ones_like(WHITE)] * 3 + [WHITE], -1).astype(np.uint8) * 255,
    "channel first": torch.from_numpy(WHITE)[None],
    "batch": torch.from_numpy(WHITE)[None, None].float(),
    "list": [WHITE],
    "PIL 1": Image.fromarray(WHITE),
    "PIL L": GREY,
    "PIL P": GREY.convert("P"),
    "PIL RGB": GREY.convert("RGB"),
    "PIL LA": GREY.convert("LA"),
    "PIL I;16": Image.fromarray(WHITE.astype(np.uint16) * 65535),
    "PIL I": Image.fromarray(WHITE.astype(np.int32) * 255),
    "PIL F": Image.fromarray(WHITE.astype(np.float32)),
    "PIL RGBA, transparent outside": Image.merge(
        "RGBA", [Image.new("L", (16, 16), 255)] * 3 + [Image.fromarray(WHITE.astype(np.uint8) * 255)]
    ),
}


@pytest.mark.parametrize("kind", MASKS)
def test_masks_of_every_kind_are_read(pipe, image, kind):
    _, regenerated = pipe.prepare_images(image, MASKS[kind])
    assert regenerated.tolist() == [[[0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0]]]


@pytest.mark.parametrize(
    ("size", "place", "regions"),
    [
        ((48, 48), (0, 1, 11, 12), [(0, 0)]),  # one pixel of nine times as many
        ((48, 48), (0, 1, 11, 13), [(0, 0), (0, 1)]),
        ((24, 16), (3, 4, 0, 1), None),  # above what is cut out
        ((24, 16), (4, 5, 0, 1), [(0, 0)]),
        ((8, 8), (7, 8, 7, 8), [(3, 3)]),
    ],
)
def test_masks_follow_their_image_through_scaling_and_cropping(pipe, size, place, regions):
    mask = np.zeros(size, dtype=bool)
    mask[place[0] : place[1], place[2] : place[3]] = True
    image = Image.new("RGB", size[::-1])
    if regions is None:
        with pytest.raises(ValueError, match="touches no region"):
            pipe.prepare_images(image, mask)
    else:
        assert pipe.prepare_images(image, mask)[1][0].nonzero().tolist() == [list(region) for region in regions]


@given(st.integers(16, 70), st.integers(16, 70), st.integers(0, 10**6))
@settings(max_examples=100)
def test_a_pixel_of_a_mask_touches_the_regions_that_it_overlaps(height, width, place):
    """Against exact fractions."""
    row, column = divmod(place % (height * width), width)
    mask = torch.zeros(height, width, dtype=torch.bool)
    mask[row, column] = True
    covering, start = covering_size(mask.shape, 16, 16)

    def touched(at, axis):
        first, last = (Fraction((at + end) * covering[axis], mask.shape[axis]) - start[axis] for end in (0, 1))
        return {region for region in range(4) if first < 4 * (region + 1) and last > 4 * region}

    expected = {(i, j) for i in touched(row, 0) for j in touched(column, 1)}
    assert set(map(tuple, masked_regions(mask, (16, 16), (4, 4)).nonzero().tolist())) == expected


def test_several_images_masks_labels_and_numbers_of_images(pipes, image):
    pipe = pipes["region-first"]
    masks = [box(0, 4, 0, 4), box(8, 16, 0, 16)]
    turned = image.transpose(Image.Transpose.ROTATE_90)
    several = pipe(
        image=[image, turned], mask_image=masks, class_labels="LABEL_1", num_images_per_label=2, generator=seeded(0)
    )
    assert several.codes.shape == (4, 8, 8) and several.regenerated.flatten(1).sum(1).tolist() == [1, 1, 8, 8]
    source = seeded(0)
    for i, (each, mask) in enumerate([(image, masks[0])] * 2 + [(turned, masks[1])] * 2):
        alone = pipe(image=each, mask_image=mask, class_labels=1, generator=source)
        assert torch.equal(alone.codes[0], several.codes[i])
        assert np.asarray(alone.images[0]).tolist() == np.asarray(several.images[i]).tolist()
    labels = pipe(image=image, mask_image=masks[0], class_labels=[0, 1, 2], output_type="pt", generator=seeded(0))
    assert labels.images.shape == (3, 3, 16, 16) and len(labels.regenerated) == 3
    without = pipes["two"](image=[image, turned], mask_image=masks[1], num_images_per_label=2, output_type="np")
    assert without.images.shape == (4, 16, 16, 3)
    sizes = [
        pipes["two"](image=[image, turned], mask_image=masks[1], output_type="codes", **{f"num_images_per_{name}": 2})
        for name in ("label", "prompt")
    ]
    assert [len(output.codes) for output in sizes] == [4, 4]
    assert all(torch.equal(output.regenerated[0], output.regenerated[3]) for output in sizes)
    codes = pipes["two"](image=image, mask_image=masks[1], output_type="codes", return_dict=False)
    assert len(codes) == 4 and torch.equal(codes[0], codes[1]) and codes[3].dtype == torch.bool


def test_prompts_say_what_is_drawn(image):
    pipe = DQInpaintPipeline(make_vae(), make_transformer(**TEXT), make_text_encoder(), make_text_tokenizer())
    pipe.set_progress_bar_config(disable=True)
    images = [image, image.transpose(Image.Transpose.ROTATE_180)]
    one_for_all = pipe("a red heart", images, WHITE, guidance_scale=2.0, num_candidates=2, generator=seeded(1))
    each = pipe(["a red heart"] * 2, images, [WHITE] * 2, guidance_scale=2.0, num_candidates=2, generator=seeded(1))
    assert torch.equal(one_for_all.codes, each.codes)
    drawn = [pipe(prompt, image, WHITE, generator=seeded(1)).codes for prompt in (None, "a red heart", "sun")]
    regions = cells(each.regenerated[:1], 2)
    assert all(torch.equal(codes[~regions], drawn[0][~regions]) for codes in drawn)
    assert len({str(codes) for codes in drawn}) > 1
    several = pipe(["sun", "a red heart"], image, WHITE, num_images_per_prompt=2, generator=seeded(1))
    assert torch.equal(several.codes[:1], drawn[2]) and len(several.regenerated) == 4


@pytest.mark.parametrize(
    ("named", "states"),
    [
        (dict(prompt="a red heart"), ["prompt"]),
        (dict(negative_prompt=["sun", "a red heart"]), ["negative_prompt"]),
        (dict(prompt="sun", negative_prompt="a red heart"), ["prompt", "negative_prompt"]),
    ],
)
def test_states_of_texts_draw_several_images_as_the_texts_do(image, named, states):
    pipe = DQInpaintPipeline(make_vae(), make_transformer(**TEXT), make_text_encoder(), make_text_tokenizer())
    pipe.set_progress_bar_config(disable=True)
    arguments = dict(image=[image, image.transpose(Image.Transpose.ROTATE_180)], mask_image=WHITE, guidance_scale=2.0)
    arguments |= dict(num_images_per_prompt=2, output_type="codes")
    by_text = pipe(**arguments, **named, generator=seeded(1))
    given = pipe.encode_prompt(**named)
    embeds = {}
    for name in states:
        prefix = name.removesuffix("prompt")
        embeds[f"{name}_embeds"] = given[f"{prefix}encoder_hidden_states"]
        embeds[f"{name}_attention_mask"] = given[f"{prefix}encoder_attention_mask"]
    by_states = pipe(**arguments, **embeds, generator=seeded(1))
    assert len(by_text.codes) == 4 and torch.equal(by_text.codes, by_states.codes)


def test_granularities_of_what_is_drawn_again_can_be_prescribed(pipe, image):
    mask = box(0, 8, 0, 16)
    for granularity in (0, 1):
        grain_map = np.fliplr(np.full((4, 4), granularity))  # which has a negative stride
        output = pipe(image=image, mask_image=mask, grain_map=grain_map, generator=seeded(1))
        assert (output.grain_maps[output.regenerated] == granularity).all()
    encoded = pipe.vae.encode(pipe.image_processor(image)["pixel_values"])
    assert torch.equal(output.grain_maps[:, 2:], encoded.grain_map[:, 2:])


@pytest.mark.parametrize("router", ["entropy", "feature"])
def test_models_in_training_mode_draw_the_same_and_learn_nothing(image, router):
    pipe = DQInpaintPipeline(make_vae(router=router, dropout=0.5), make_transformer(residual_dropout=0.5))
    pipe.set_progress_bar_config(disable=True)
    plain = DQPipeline(pipe.vae, pipe.transformer)
    plain.set_progress_bar_config(disable=True)

    def draw():
        outputs = [
            pipe(image=image, mask_image=box(0, 8, 0, 16), output_type="pt", generator=seeded(0)),
            plain(output_type="pt", generator=seeded(0)),
        ]
        return [tensor for output in outputs for tensor in (output.images, output.codes, output.grain_maps)]

    codebook, expected = pipe.vae.quantizer.codebook.clone(), draw()
    for model in (pipe.vae, pipe.transformer):
        model.train()
    assert all(map(torch.equal, draw(), expected))
    assert torch.equal(pipe.vae.quantizer.codebook, codebook)
    assert all(module.training for module in (*pipe.vae.modules(), *pipe.transformer.modules()))


def test_it_loads_saved_folders_and_shares_the_parts_of_a_pipeline(pipe, image, tmp_path):
    DQForImageGeneration.from_models(pipe.vae, pipe.transformer).save_pretrained(tmp_path)
    loaded = DQInpaintPipeline.from_pretrained(tmp_path)
    plain = DQPipeline.from_pretrained(tmp_path)
    shared = DQInpaintPipeline.from_pipe(plain)
    assert shared.vae is plain.vae and shared.transformer is plain.transformer
    assert type(shared) is DQInpaintPipeline
    results = [
        each(image=image, mask_image=WHITE, generator=seeded(2)).codes.tolist() for each in (pipe, loaded, shared)
    ]
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_sharing_models_leaves_them_their_precision_unless_another_is_asked_for(dtype):
    vae, transformer = make_vae(image_size=16), make_transformer()
    plain = DQPipeline(vae, transformer.bfloat16())
    before = plain(generator=seeded(0)).codes
    for kind in (DQInpaintPipeline, DQPipeline):
        assert kind.from_pipe(plain, dtype=dtype).transformer is transformer
        assert vae.dtype == (dtype or torch.float32) and transformer.dtype == (dtype or torch.bfloat16)
        assert dtype is not None or torch.equal(plain(generator=seeded(0)).codes, before)
    assert DQInpaintPipeline.from_pipe(plain, vae=(other := make_vae(image_size=16))).vae is other


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(image=None), ValueError, "image is missing"),
        (dict(mask_image=None), ValueError, "mask_image is missing"),
        (dict(mask_image=box(0, 4, 0, 4, size=15)), ValueError, "image's size, 16x16 pixels; got 15x15"),
        (dict(mask_image=Image.new("L", (16, 8), 255)), ValueError, "image's size, 16x16 pixels; got 16x8"),
        (dict(mask_image=BLACK), ValueError, r"image\(s\) \[0\] touches no region"),
        (dict(mask_image=np.full((16, 16), 0.49)), ValueError, "touches no region"),
        (dict(mask_image="mask.png"), TypeError, "PIL image, a numpy array or a torch tensor, got str"),
        (dict(mask_image=WHITE * 255.0), ValueError, r"must lie in 0 ... 1, got values from 0 to 255"),
        (dict(mask_image=WHITE * np.nan), ValueError, "must lie in 0 ... 1, got values from nan"),
        (dict(mask_image=WHITE.astype(int) * -1), ValueError, "must lie in 0 ... 255"),
        (dict(mask_image=WHITE[0]), ValueError, "a mask must have shape"),
        (dict(mask_image=[WHITE, WHITE]), ValueError, "one mask or one for each of 1 images, got 2"),
        (dict(image=[]), ValueError, "for each of 0 images"),
        (dict(image="image.png"), TypeError, "an image must be a PIL image"),
        (dict(num_candidates=0), ValueError, "num_candidates must be at least 1"),
        (dict(strength=0.5), TypeError, "unknown argument.*strength"),
        (dict(overlai=False), TypeError, "unknown argument.* overlai; did you mean overlay?"),
        (dict(num_images_per_promt=2), TypeError, "did you mean num_images_per_prompt?"),
        (dict(num_images=2), TypeError, "num_images is .*; here it is num_images_per_prompt"),
        (dict(encoder_hidden_states=torch.ones(1, 2, 8)), TypeError, "here it is prompt_embeds"),
        (dict(codes=np.zeros((8, 8), int)), TypeError, "codes is .*; here it is image"),
        (dict(grain_map=np.full((4, 4), 7)), ValueError, "grain_map must lie in -1 ... 1"),
        (dict(grain_map=[0] * 4), ValueError, r"grain_map must have shape \(B, 4, 4\), got \(4,\)"),
        (dict(grain_map=np.zeros((3, 4, 4), int)), ValueError, "of one image or of each of 1, got 3"),
        (dict(class_labels=0), ValueError, "unconditional"),
        (dict(output_type="latent"), ValueError, "output_type must be one of pil, np, pt, codes"),
        (dict(num_images_per_prompt=0), ValueError, "num_images_per_prompt must be at least 1, got 0"),
    ],
)
def test_bad_input_is_refused(pipe, image, arguments, error, message):
    with pytest.raises(error, match=message):
        pipe(**(dict(image=image, mask_image=WHITE) | arguments))
