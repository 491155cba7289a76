"""The rate-control benchmark: what is counted as bits, what stands at equal bits, and its tables at a tiny size."""

import io
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import rate_control
from conftest import TEXT, make_text_encoder, make_text_tokenizer, make_transformer, make_vae
from PIL import Image
from safetensors.torch import load_file

from dq_hf import DEFAULT_MODEL, DQForImageGeneration
from dq_hf.loading import load_models


def photograph(seed, side=32):
    """Smooth colours with some noise."""
    source = np.random.default_rng(seed)
    waves = np.sin(np.arange(side)[:, None, None] * source.uniform(0.1, 0.5, 3) + source.uniform(0, 6, (1, side, 3)))
    return Image.fromarray((127 + 90 * waves + source.normal(0, 9, (side, side, 3))).clip(0, 255).astype(np.uint8))


def pixels(file):
    return np.asarray(Image.open(io.BytesIO(file)).convert("RGB")).astype(int)


@pytest.mark.parametrize("quality", [1, 20, 90])
def test_the_scan_alone_gives_the_image_back_behind_the_head_of_another_file(quality):
    """So nothing that it leaves out depends on the image."""
    files = [rate_control.save(photograph(seed), format="JPEG", quality=quality) for seed in (0, 1)]
    scans = [rate_control.jpeg_scan(file) for file in files]
    heads = [file[: -len(scan) - 2] for file, scan in zip(files, scans)]
    assert scans[0] != scans[1] and len(heads[0]) > 500
    assert (pixels(heads[1] + scans[0] + b"\xff\xd9") == pixels(files[0])).all()


@pytest.mark.parametrize("quality", [1, 20, 90])
def test_the_vp8_stream_gives_the_image_back_in_a_container_of_its_length(quality):
    file = rate_control.save(photograph(0), format="WEBP", quality=quality)
    stream = rate_control.vp8_stream(file)
    frame = stream[:3] + b"\x9d\x01\x2a" + 2 * (32).to_bytes(2, "little") + stream[3:]
    frame += b"\0" * (len(frame) % 2)
    chunk = b"VP8 " + len(frame).to_bytes(4, "little") + frame
    rebuilt = b"RIFF" + (4 + len(chunk)).to_bytes(4, "little") + b"WEBP" + chunk
    assert (pixels(rebuilt) == pixels(file)).all()
    assert len(file) - len(stream) in (27, 28)  # RIFF 12, chunk 8, start code 3, sides 4; and what makes it even
    with pytest.raises(ValueError, match="lossy"):
        rate_control.vp8_stream(rate_control.save(photograph(0), format="WEBP", lossless=True))


@pytest.mark.parametrize("codec", ["JPEG", "WebP", "AVIF"])
def test_files_are_counted_whole(codec):
    image = photograph(2)
    decoded, file, bare = rate_control.code(codec, image, 30, "4:4:4")
    arguments = rate_control.options(codec, 30, "4:4:4") | ({"optimize": True} if codec == "JPEG" else {})
    written = rate_control.save(image, **arguments)
    assert file == 8 * len(written) and 0 < bare < file
    assert (np.asarray(decoded) == pixels(written)).all()  # Huffman tables change the length only


def test_between_two_settings_bits_count_in_logarithms():
    curve = [{"bits": 100, "PSNR": 20.0, "D": 0.5}, {"bits": 400, "PSNR": 26.0, "D": 0.1}]
    assert rate_control.at_equal(curve, "bits", 200, "PSNR") == pytest.approx(23)
    assert rate_control.at_equal(curve, "bits", 200, "D") == pytest.approx(0.3)
    assert rate_control.at_equal(curve, "PSNR", 24, "bits") == pytest.approx(100 * 4 ** (2 / 3))
    assert rate_control.at_equal(curve, "bits", 400, "PSNR") == 26
    for beyond in (99, 401):
        assert math.isnan(rate_control.at_equal(curve, "bits", beyond, "PSNR"))


def test_the_av1_data_is_what_the_images_of_one_setting_differ_in():
    files = [rate_control.save(photograph(seed), **rate_control.options("AVIF", 50, "4:2:0")) for seed in (0, 1)]
    data = [rate_control.av1_data(file) for file in files]
    frames = [file.removesuffix(inner) for file, inner in zip(files, data)]
    assert data[0] != data[1] and 100 < len(frames[0]) == len(frames[1]) < 600
    different = [one != other for one, other in zip(*frames)]
    assert sum(different) <= 8  # lengths


@pytest.mark.parametrize("with_text", [True, False])
def test_the_receiver_holds_whatever_the_generator_prior_decodes_by(with_text):
    vae, pipe = load_models(DEFAULT_MODEL)
    if not with_text:
        pipe.text_encoder = None
    parts = ["transformer", "text_encoder"][: 1 + with_text]
    weights = [load_file(Path(DEFAULT_MODEL, part, "model.safetensors")).values() for part in parts]
    num_bytes = sum(4 * value.numel() for values in weights for value in values)  # in the file some are of two bytes
    text = rate_control.receiver(vae, pipe)
    words, number = re.search(r"for the generator prior (.*), ([\d.]+) MB more", text).groups()
    assert words == " and ".join(["the generator", "the text encoder"][: 1 + with_text])
    assert float(number) == pytest.approx(num_bytes / 1e6, abs=0.1)
    assert "generator" not in rate_control.receiver(vae, None)


@pytest.mark.parametrize("column, expected", [("text", ["red", "sun"]), ("none", [None, None])])
def test_images_are_coded_under_their_captions_or_without(tmp_path, column, expected):
    for seed in range(2):
        photograph(seed, side=16).save(tmp_path / f"{seed}.png")
    lines = [json.dumps({"file_name": f"{i}.png", "text": text}) for i, text in enumerate(("red", "sun"))]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    args = rate_control.Arguments(data=str(tmp_path), split="train", caption_column=column)
    pipe = SimpleNamespace(transformer=make_transformer(**TEXT))
    assert rate_control.load_data(args, make_vae(), pipe)[2] == [(None, caption) for caption in expected]


def test_a_small_run_writes_tables_whose_figures_add_up(tmp_path):
    (tmp_path / "images").mkdir()
    lines = []
    for seed, caption in enumerate(("red", "sun", "and")):
        photograph(seed, side=16).save(tmp_path / "images" / f"{seed}.png")
        lines.append(json.dumps({"file_name": f"{seed}.png", "text": caption}))
    (tmp_path / "images" / "metadata.jsonl").write_text("\n".join(lines))
    vae, transformer = make_vae(entropy_thresholds=[3.0]), make_transformer(**TEXT)
    for parameter in transformer.requires_grad_(False).parameters():
        parameter *= 0.5  # so that no element is less likely than a payload can say
    model = DQForImageGeneration.from_models(vae, transformer, make_text_encoder(), make_text_tokenizer())
    model.save_pretrained(tmp_path / "both")
    output, plot = tmp_path / "evidence.md", tmp_path / "plot.png"
    output.write_text("# Evidence\n\nBefore.\n")
    rate_control.main(
        rate_control.Arguments(
            model=str(tmp_path / "both"),
            data=str(tmp_path / "images"),
            split="train",
            caption_column="text",
            fine_ratios=[0.0, 0.25, 1.0],
            qualities=[1, 50, 90],
            batch_size=2,
            timed_images=1,
            output=str(output),
            plot=str(plot),
        )
    )
    text = output.read_text()
    assert text.startswith("# Evidence\n\nBefore.\n") and "both on 3 images" in text and "PD-EffLite0" in text
    assert text.count("The receiver holds") == 3
    quality, equal_psnr, equal_bits, seconds = re.split("Bits for equal PSNR|at as many bits|Seconds an image", text)
    rows = [row.split(" | ") for row in re.findall(r"^\| ((?:[\d.]+|router) \| .*) \|$", quality, re.M)]
    assert [row[0] for row in rows] == ["0.0", "0.25", "1.0", "router"]
    codes = [float(row[1]) for row in rows]
    assert codes[:3] == [16, 16 + 3 * 4, 64] and 16 <= codes[3] <= 64  # 4 x 4 regions
    # 16 codes to choose from; a bit of the grain map for each region; 18 and 26 bytes around payloads, 4 for the caption.
    for row in rows:
        fixed, static_file, static, generator_file, generator, ideal = map(float, row[5:11])
        assert fixed == pytest.approx(4 * float(row[1]) + 16, abs=0.5)
        assert static_file == pytest.approx(static + 8 * 18, abs=1)
        assert generator_file == pytest.approx(generator + 8 * 26, abs=1)
        assert ideal < generator < 1.02 * ideal + 8 and 4 * float(row[1]) < static < fixed + 16
    assert len(re.findall(r"^\| [-\d.]+( \| \d+){4}( \| (?:\d+|–)){6} \|$", equal_psnr, re.M)) == 4
    assert len(re.findall(r"^\| \d+ \| [^–|]+ / [^–|]+ / [^–|]+( \| [^|]+){6} \|$", equal_bits, re.M)) == 4
    assert len(re.findall(r"^\| (?:to bytes|back)( \| [\d.]+){5} \|$", seconds, re.M)) == 2
    assert Image.open(plot).size == (1300, 460)
