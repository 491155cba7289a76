"""Images as bytes: what comes back, how long it is, and what damaged, foreign and newer files give."""

import copy
import logging
import math
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import TEXT, make_text_encoder, make_text_tokenizer, make_transformer, make_vae, seeded
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from transformers import BertConfig

from dq_hf import DEFAULT_MODEL, DQForImageGeneration, DQPipeline
from dq_hf.codec import compress, decompress, read_codes
from dq_hf.codec.container import CHECK_BYTES, read_file
from dq_hf.codec.static_prior import StaticPrior, code_frequencies
from dq_hf.modeling.grain_map_dq import expand_grain_map, top_left_cells
from dq_hf.modeling.image_processing_dq import DQImageProcessor
from dq_hf.modeling.text_dq import encode_prompts, prompt_arguments

CLASSES = dict(num_classes=3, id2label={0: "sun", 1: "moon", 2: "star"}, class_dropout=0.2)
THREE = dict(granularities=[8, 4, 2], block_out_channels=[8, 8, 16, 16])


def used(vae):
    """A tokenizer whose codes are not all used alike."""
    vae.quantizer.cluster_size.copy_(torch.linspace(0, 9, vae.config.codebook_size) ** 2)
    return vae


@pytest.fixture(scope="module")
def vae():
    return used(make_vae())


@pytest.fixture(scope="module")
def model(vae):
    return DQForImageGeneration.from_models(vae, make_transformer(**CLASSES)).eval()


def picture(seed, width=16, height=16):
    """Noise, finer in one half."""
    source = np.random.default_rng(seed)
    pixels = source.integers(0, 256, (height, width, 3), dtype=np.uint8)
    pixels[:, : width // 2] = source.integers(0, 256, 3)
    return Image.fromarray(pixels)


def padded(vae, image):
    """`pixel_values` of an image, its last row and column repeated up to whole regions."""
    pixel_values = DQImageProcessor(do_resize=False)(image)["pixel_values"]
    factor = vae.config.granularities[0]
    for dim in (2, 3):
        short = -pixel_values.shape[dim] % factor
        last = pixel_values.narrow(dim, pixel_values.shape[dim] - 1, 1)
        pixel_values = torch.cat([pixel_values] + [last] * short, dim)
    return pixel_values


class Elsewhere(torch.Tensor):
    """A tensor as on a GPU: numpy cannot read it, nor what is computed from it, before `cpu`."""

    def numpy(self, *args, **kwargs):
        raise TypeError("can't convert a tensor of a device to numpy; use cpu() first")

    __array__ = numpy

    def cpu(self):
        return self.as_subclass(torch.Tensor)


# What comes back


@pytest.mark.parametrize("options", [{}, dict(max_bytes=60), dict(prior="generator", class_label=1)])
def test_a_model_on_a_device_writes_the_same_file(model, monkeypatch, options):
    expected = compress(model, picture(0), **options)

    def on_device(method):
        def call(*args, **kwargs):
            result = method(*args, **kwargs)
            if isinstance(result, torch.Tensor):
                return result.as_subclass(Elsewhere)
            for name in ("codes", "grain_map"):
                result[name] = result[name].as_subclass(Elsewhere)
            return result

        return call

    for name in ("encode", "region_scores"):
        monkeypatch.setattr(model.vae, name, on_device(getattr(model.vae, name)))
    assert compress(model, picture(0), **options) == expected


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from([None, 0.0, 0.3, 1.0]), st.integers(0, 99))
def test_any_size_comes_back_as_its_codes_and_cut_to_its_pixels(vae, width, height, fine_ratio, seed):
    image = picture(seed, width, height)
    data = compress(vae, image, fine_ratio=fine_ratio)
    encoded = vae.encode(padded(vae, image), fine_ratio=fine_ratio)
    codes, grain_map = read_codes(vae, data)
    assert torch.equal(codes, encoded.codes) and torch.equal(grain_map, encoded.grain_map)
    result = decompress(vae, data)
    whole = DQImageProcessor(do_resize=False).post_process(vae.decode_codes(encoded.codes).sample)[0]
    assert result.size == (width, height)
    assert np.array_equal(np.asarray(result), np.asarray(whole)[:height, :width])


@pytest.mark.parametrize("granularities", [THREE, dict(granularities=[4], block_out_channels=[8, 8, 16])])
def test_any_number_of_granularities(granularities):
    vae = used(make_vae(**granularities))
    shares = [0.3, 0.5] if len(vae.config.granularities) == 3 else None
    data = compress(vae, picture(0, 50, 33), fine_ratio=shares)
    encoded = vae.encode(padded(vae, picture(0, 50, 33)), fine_ratio=shares)
    assert all(torch.equal(*pair) for pair in zip(read_codes(vae, data), (encoded.codes, encoded.grain_map)))


@pytest.mark.parametrize(("class_label", "fine_ratio"), [(None, None), ("moon", 0), ("sun", 0.5), (2, 1)])
def test_the_generator_prior_gives_the_same_codes_within_the_models_code_length(model, class_label, fine_ratio):
    image = picture(3)
    data = compress(model, image, prior="generator", class_label=class_label, fine_ratio=fine_ratio)
    encoded = model.vae.encode(padded(model.vae, image), fine_ratio=fine_ratio)
    codes, grain_map = read_codes(model, data)
    assert torch.equal(codes, encoded.codes) and torch.equal(grain_map, encoded.grain_map)
    header, payload, _ = read_file(data)
    assert header.flag == 1 and header.class_label == {None: None, "sun": 0, "moon": 1, 2: 2}[class_label]
    if class_label is not None:
        bits = model.transformer.log_prob(codes, grain_map, header.class_label).nats.item() / math.log(2)
        assert bits / 8 - 1 <= len(payload) <= 1.02 * bits / 8 + 2


def test_the_embedded_model_writes_an_image_within_its_code_length():
    """Streams of real length, whose probabilities two ways of calculating must agree on."""
    model = DQForImageGeneration.from_pretrained(DEFAULT_MODEL)
    data = compress(model, picture(3, 64, 64), prior="generator", prompt="red heart")
    header, payload, _ = read_file(data)
    assert header.flag == 1 and header.prompt == "red heart"  # it was read back
    encoded = model.vae.encode(padded(model.vae, picture(3, 64, 64)))
    text = prompt_arguments(model.transformer.config, model.text_encoder, model.tokenizer, "red heart")
    bits = model.transformer.log_prob(encoded.codes, encoded.grain_map, **text).nats.item() / math.log(2)
    assert bits / 8 - 1 <= len(payload) <= 1.02 * bits / 8 + 2


def test_the_generator_prior_of_three_granularities_and_of_no_class():
    vae = used(make_vae(**THREE))
    transformer = make_transformer(grid_sizes=[[2, 2], [4, 4], [8, 8]])
    model = DQForImageGeneration.from_models(vae, transformer).eval()
    data = compress(model, picture(5), prior="generator", fine_ratio=[0.25, 0.5])
    codes, grain_map = read_codes(model, data)
    assert grain_map.flatten().sort().values.tolist() == [0, 1, 2, 2]
    bits = transformer.log_prob(codes, grain_map).nats.item() / math.log(2)
    assert len(read_file(data)[1]) <= 1.02 * bits / 8 + 2


def test_a_generator_whose_logits_are_not_finite_writes_nothing():
    transformer = make_transformer()
    torch.nn.init.constant_(transformer.content_head.projection.weight, torch.nan)
    model = DQForImageGeneration.from_models(used(make_vae()), transformer).eval()
    with pytest.raises(ValueError, match="logits are not finite"):
        compress(model, picture(5), prior="generator")


def test_a_tokenizer_alone_reads_what_a_pipeline_wrote_with_the_static_prior(vae, model):
    data = compress(DQPipeline(vae=vae, transformer=model.transformer), picture(1))
    assert data == compress(vae, picture(1)) == compress(model, np.array(picture(1)))
    assert decompress(vae, data) == decompress(model, data)


@pytest.mark.parametrize("prior", ["static", "generator"])
def test_a_compiled_model_reads_and_writes_the_files_of_the_same_model_and_of_no_other(model, prior):
    image = picture(0)
    compiled = DQForImageGeneration.from_models(model.vae, model.transformer)
    compiled.vae, compiled.transformer = torch.compile(model.vae), torch.compile(model.transformer)
    data = compress(compiled, image, prior)
    assert data == compress(model, image, prior)
    other = DQForImageGeneration.from_models(copy.deepcopy(model.vae), model.transformer)
    next(other.vae.decoder.parameters()).data += 1
    other.vae = torch.compile(other.vae)
    with pytest.raises(ValueError, match="of another model"):
        decompress(other, data)
    assert compress(torch.compile(model.vae), image) == compress(model.vae, image)


def test_a_model_of_8_bits_reads_what_it_wrote_with_the_generator():
    model = DQForImageGeneration.from_models(make_vae(), make_transformer(num_classes=2, class_dropout=0.2)).eval()
    quantize_(model.transformer, Int8WeightOnlyConfig())
    data = compress(model, picture(0), "generator", class_label=1)
    again = DQForImageGeneration.from_models(model.vae, copy.deepcopy(model.transformer))
    assert np.array_equal(decompress(again, data), decompress(model, data))


def test_the_static_prior_costs_what_the_cluster_sizes_say(vae):
    """And the grain map at most a bit a region, on the whole."""
    data = compress(vae, picture(2, 64, 64), fine_ratio=0.5)
    codes, grain_map = read_codes(vae, data)
    fine = expand_grain_map(grain_map, 2)
    once = codes[top_left_cells(fine, 2) == torch.arange(codes.numel()).view(codes.shape)]
    frequencies = torch.from_numpy(code_frequencies(vae.quantizer.cluster_size)).double()
    assert frequencies.min() == 1 and frequencies.max() == 2**16 - 1
    bits = -(frequencies / frequencies.sum()).log2()[once].sum().item()
    assert bits / 8 < len(read_file(data)[1]) < (1.001 * bits + 1.1 * grain_map.numel()) / 8 + 2


@pytest.mark.parametrize("share", [0.5, 0.9, 0.9999])
def test_an_image_of_the_first_code_alone_is_not_too_short_to_be_read(share):
    """Its payload is zeros, of which the coder would keep none; `decode` refuses what is too short for its regions."""
    vae = make_vae()
    size = vae.config.codebook_size
    vae.quantizer.cluster_size.copy_(torch.tensor([share, *[(1 - share) / (size - 1)] * (size - 1)]))
    prior, side = StaticPrior(vae), 2 ** (len(vae.config.granularities) - 1)
    for granularity in range(len(vae.config.granularities)):
        grain_map = torch.full((16, 24), granularity)
        codes = torch.zeros(16 * side, 24 * side, dtype=torch.long)
        payload = prior.encode(codes, grain_map)
        assert prior.least_bits(codes, grain_map) / 8 <= len(payload) + 1
        again, grains = prior.decode(payload, (16, 24))
        assert torch.equal(again, codes) and torch.equal(grains, grain_map)


def test_frequencies_of_a_codebook_that_counted_nothing_are_equal():
    assert code_frequencies(torch.zeros(5)).tolist() == [1] * 5
    assert code_frequencies(torch.tensor([0.0, 1.0, 2.0])).tolist() == [1, 32767, 65535]


def test_a_prompt_is_in_the_file(vae):
    """It changes the probabilities, and so must come back with them."""
    transformer = make_transformer(**TEXT)
    model = DQForImageGeneration.from_models(vae, transformer, make_text_encoder(), make_text_tokenizer()).eval()
    files = [compress(model, picture(6), prior="generator", prompt=prompt) for prompt in (None, "red sun")]
    assert [read_file(data)[0].prompt for data in files] == [None, "red sun"]
    assert read_file(files[0])[1] != read_file(files[1])[1]
    codes, grain_map = read_codes(model, files[1])
    assert torch.equal(codes, read_codes(vae, compress(vae, picture(6)))[0])
    prompt = encode_prompts(model.tokenizer, model.text_encoder, "red sun", transformer.config.text_length)
    bits = transformer.log_prob(codes, grain_map, None, *prompt).nats.item() / math.log(2)
    assert bits / 8 - 1 <= len(read_file(files[1])[1]) <= 1.02 * bits / 8 + 2

    other = DQForImageGeneration.from_models(vae, transformer, make_text_encoder("t5"), make_text_tokenizer()).eval()
    assert torch.equal(read_codes(other, files[0])[0], codes)
    with pytest.raises(ValueError, match="another model"):
        decompress(other, files[1])


# How long it may be


@pytest.mark.parametrize("overrides", [{}, THREE])
def test_max_bytes_takes_the_largest_ratio_that_fits(overrides):
    vae, image = used(make_vae(**overrides)), picture(4, 24, 16)
    regions, ratios = 24 * 16 // vae.config.granularities[0] ** 2, []
    for step in range(regions + 1):
        ratio = step / regions
        shares = ratio if not overrides else [2 * ratio * (1 - ratio), ratio**2]
        ratios.append(compress(vae, image, fine_ratio=shares))
    lengths = [len(data) for data in ratios]
    for most in [*range(min(lengths), max(lengths), 9), max(lengths), max(lengths) + 1]:
        largest = max(step for step, length in enumerate(lengths) if length <= most)
        assert compress(vae, image, max_bytes=most) == ratios[largest]
    assert compress(vae, image, max_bytes=np.int64(max(lengths))) == ratios[-1]
    with pytest.raises(ValueError, match=f"at least {min(lengths)} "):
        compress(vae, image, max_bytes=min(lengths) - 1)


def test_an_image_that_the_reader_would_refuse_is_not_written(vae):
    with pytest.raises(ValueError, match="at most 1,048,576 pixels a side, got 1,048,577 x 1"):
        compress(vae, Image.new("L", (2**20 + 1, 1)))


def test_the_weights_are_hashed_once_however_many_ratios_are_tried(vae, monkeypatch):
    calls, state_dict = [], vae.state_dict
    monkeypatch.setattr(vae, "state_dict", lambda: calls.append(1) or state_dict())
    compress(vae, picture(4), max_bytes=len(compress(vae, picture(4), fine_ratio=0.3)))
    assert len(calls) == 2  # one for each file


def test_max_bytes_with_the_generator(model):
    options = dict(prior="generator", class_label=0)
    files = [compress(model, picture(4), fine_ratio=step / 16, **options) for step in (15, 16)]
    assert compress(model, picture(4), max_bytes=len(files[1]) - 1, **options) == files[0]  # which is shorter


# What cannot be


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        (dict(prior="huffman"), ValueError, "static"),
        (dict(class_label="sun"), ValueError, "generator"),
        (dict(prior="generator", class_label="venus"), ValueError, "unknown class"),
        (dict(prior="generator", class_label=3), ValueError, "0 ... 2"),
        (dict(prior="generator", prompt="a sun"), ValueError, "model with text"),
        (dict(prior="generator", prompt=3), TypeError, "a text"),
        (dict(max_bytes=99, fine_ratio=0.5), ValueError, "either"),
        (dict(max_bytes=99.5), TypeError, "whole number"),
        (dict(fine_ratio=1.5), ValueError, "fine_ratio"),
        (dict(model_id=""), TypeError, "repository"),
    ],
)
def test_impossible_arguments_are_refused(model, arguments, error, match):
    with pytest.raises(error, match=match):
        compress(model, picture(0), **arguments)


def test_other_inputs_are_refused(vae):
    with pytest.raises(ValueError, match="tokenizer alone"):
        compress(vae, picture(0), prior="generator")
    with pytest.raises(ValueError, match="one image, got 2"):
        compress(vae, [picture(0)] * 2)
    with pytest.raises(TypeError, match="DQVAEModel"):
        compress(torch.nn.Linear(1, 1), picture(0))
    with pytest.raises(TypeError, match="bytes"):
        decompress(vae, "DQ")


def test_a_class_is_needed_where_the_model_never_saw_an_image_without(vae):
    model = DQForImageGeneration.from_models(vae, make_transformer(num_classes=3)).eval()
    with pytest.raises(ValueError, match="give class_label"):
        compress(model, picture(0), prior="generator")


def test_another_size_than_the_generators_has_the_static_prior_and_says_so(model, caplog):
    data = compress(model, picture(0, 32, 16), prior="generator", class_label=0)
    assert data == compress(model.vae, picture(0, 32, 16))
    assert "16x16" in caplog.text and "32x16" in caplog.text


@pytest.fixture(scope="module")
def files(model):
    """A file of each prior."""
    return [
        compress(model, picture(7), fine_ratio=0.5, model_id="someone/model"),
        compress(model, picture(7), fine_ratio=0.5, prior="generator", class_label=1),
    ]


def test_every_flipped_bit_is_an_error(model, files):
    for data in files:
        for bit in range(8 * len(data)):
            damaged = bytearray(data)
            damaged[bit // 8] ^= 1 << bit % 8
            with pytest.raises(ValueError, match="damaged|another model|newer than 1|begin with DQ"):
                decompress(model, bytes(damaged))


def test_two_thousand_damaged_files_give_errors_that_say_so(model, files):
    draw = random.Random(0)
    for number in range(2000):
        data = bytearray(files[number % 2])
        kind = draw.randrange(4)
        if kind == 0:  # cut off
            del data[draw.randrange(len(data)) :]
        elif kind == 1:  # a part is missing
            first = draw.randrange(len(data))
            del data[first : first + draw.randrange(1, 9)]
        elif kind == 2:  # some bytes are others
            for place in draw.sample(range(len(data)), draw.randrange(1, 9)):
                data[place] ^= draw.randrange(1, 256)
        else:  # something is behind it
            data += draw.randbytes(draw.randrange(1, 9))
        with pytest.raises(ValueError, match="damaged|another model|newer than 1|begin with DQ"):
            decompress(model, bytes(data))


def test_a_foreign_model_is_named_by_both_fingerprints(model, files):
    other = make_vae()
    other.decoder.conv_in.weight.data[0] += 1e-3
    with pytest.raises(ValueError, match=f"{files[0][4:12].hex()}, someone/model, got one with [0-9a-f]{{16}}"):
        decompress(used(other), files[0])
    with pytest.raises(ValueError, match="generator .*tokenizer alone"):
        decompress(model.vae, files[1])


def test_what_only_encodes_does_not_make_a_model_foreign(files):
    other = used(make_vae())
    other.router.set_thresholds([0.1])
    other.encoder.conv_in.weight.data += 1
    assert decompress(other, files[0]) == decompress(used(make_vae()), files[0])


def test_a_newer_format_is_named(vae, files):
    with pytest.raises(ValueError, match="format version 2, newer than 1.*upgrade"):
        decompress(vae, files[0][:2] + b"\2" + files[0][3:])


def test_a_machine_that_does_not_reproduce_the_generator_is_told_apart_from_damage(model, files, monkeypatch):
    from dq_hf.codec import generator_prior

    exact = generator_prior.frequencies
    monkeypatch.setattr(generator_prior, "frequencies", lambda logits: exact(logits * (1 + 1e-3)))
    with pytest.raises(ValueError, match="intact.*other probabilities"):
        decompress(model, files[1])


def test_a_machine_that_does_not_come_to_the_same_twice_writes_the_static_prior(model, monkeypatch, caplog):
    from dq_hf.codec import generator_prior

    exact, draw = generator_prior.frequencies, seeded()
    monkeypatch.setattr(
        generator_prior, "frequencies", lambda logits: exact(logits * (1 + 0.1 * torch.rand((), generator=draw)))
    )
    with caplog.at_level(logging.WARNING):
        data = compress(model, picture(0), prior="generator")
        assert data == compress(model, picture(0)) and "static prior" in caplog.text
        limit = len(data) - 1  # holds for this file, too
        data = compress(model, picture(0), prior="generator", max_bytes=limit)
    assert data == compress(model, picture(0), max_bytes=limit) and len(data) <= limit


def test_a_file_without_a_models_name_asks_for_the_model(vae, files, tmp_path):
    vae.save_pretrained(tmp_path / "vae")
    assert decompress(tmp_path / "vae", files[0]) == decompress(vae, files[0])
    named = compress(vae, picture(7), fine_ratio=0.5, model_id=str(tmp_path / "vae"))
    assert decompress(None, named) == decompress(vae, files[0])
    with pytest.raises(ValueError, match="names no model.*[0-9a-f]{16}"):
        decompress(None, files[1])


def test_a_file_that_names_another_kind_of_model_is_refused_before_that_is_loaded(vae, tmp_path):
    BertConfig().save_pretrained(tmp_path)
    named = compress(vae, picture(7), model_id=str(tmp_path))
    with pytest.raises(ValueError, match=r"must be a tokenizer, or that and a generator \(dqvae, dq\); got 'bert'"):
        decompress(None, named)


def test_the_same_weights_in_another_precision_are_told_what_to_do(vae):
    data = compress(vae, picture(7))
    with pytest.raises(ValueError, match="another model.*in the precision that it had then"):
        decompress(copy.deepcopy(vae).half(), data)


def test_the_frame_is_small(vae, files):
    """Magic 2, version, flags, fingerprint 8, sides 1 each, check 4; a generator's: a class 1, a second check 4."""
    bare = compress(vae, picture(7), fine_ratio=0.5)
    assert len(bare) - len(read_file(bare)[1]) == 14 + CHECK_BYTES
    assert len(files[1]) - len(read_file(files[1])[1]) == 15 + 2 * CHECK_BYTES


WITH_TWO_THREADS = """
import sys, torch
from PIL import Image
from dq_hf import DQForImageGeneration
from dq_hf.codec import compress, decompress
folder = sys.argv[1]
torch.set_num_threads(2)
model = DQForImageGeneration.from_pretrained(folder)
for seed in range(2):
    decompress(model, open(f"{folder}/{seed}.dq", "rb").read())
    data = compress(model, Image.open(f"{folder}/{seed}.png"), prior="generator", class_label=seed)
    open(f"{folder}/{seed}-other.dq", "wb").write(data)
"""


@pytest.mark.slow
def test_processes_with_other_numbers_of_threads_read_each_others_files(model, tmp_path):
    model.save_pretrained(tmp_path)
    files = [compress(model, picture(seed), prior="generator", class_label=seed) for seed in range(2)]
    for seed, data in enumerate(files):
        picture(seed).save(tmp_path / f"{seed}.png")
        (tmp_path / f"{seed}.dq").write_bytes(data)
    subprocess.run([sys.executable, "-c", WITH_TWO_THREADS, str(tmp_path)], check=True)
    for seed, data in enumerate(files):
        assert read_file(data)[0].flag == 1
        assert (tmp_path / f"{seed}-other.dq").read_bytes() == data
