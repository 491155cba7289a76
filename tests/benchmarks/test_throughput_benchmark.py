import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import train_throughput
from conftest import make_vae
from PIL import Image

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
VAE_SIZES = "--image_size 16 --granularities 4 2 --block_out_channels 8 8 16 --norm_num_groups 4 --z_channels 8"
VAE_SIZES += " --codebook_size 16 --codebook_dim 8 --disc_layers 1 --disc_channels 8"
TRANSFORMER_SIZES = "--hidden_size 16 --num_attention_heads 2 --num_position_layers 1 --num_content_layers 1"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with `images` in class folders, and `vae`, a tokenizer for them."""
    place = tmp_path_factory.mktemp("throughput")
    source = np.random.default_rng(0)
    for split, count in (("train", 6), ("test", 2)):
        for name in ("moon", "sun"):
            folder = place / "images" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = source.integers(0, 256, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    make_vae().save_pretrained(place / "vae")
    return place


def run(place, *options):
    """Run the benchmark from `place`, with batches of 5 images."""
    command = [sys.executable, str(BENCHMARKS / "train_throughput.py"), "--data", "images", "--vae", "vae"]
    command += ["--stage_1", VAE_SIZES, "--stage_2", TRANSFORMER_SIZES, "--batch_size", "5", "--num_images", "9"]
    command += ["--warmup_steps", "1", "--steps", "2", *options]
    environment = os.environ | {"HF_HOME": str(place / "hf")}
    return subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_every_row_is_a_run_of_the_training_script(place):
    done = run(place, "--settings", "fp32", "bf16", "--output", "performance.md")
    assert done.returncode == 0, done.stderr[-3000:]
    report = (place / "performance.md").read_text()
    sizes = "16 pixels, widths 8 8 16; transformer width 16, 1 + 1 layers; batch 5"
    assert f"<!-- begin of benchmarks/train_throughput.py, cpu, {sizes}; fp32 bf16 -->\n{sizes}; " in report
    rows = [line.strip("| ").split(" | ") for line in report.splitlines() if re.match(r"\| [12] ", line)]
    texts = [
        ("1", "L1 and VQ loss"),
        ("1", "perceptual and adversarial loss, too"),
        ("2", "images, encoded at every step"),
        ("2", "code cache, length buckets"),
    ]
    assert [tuple(row[:3]) for row in rows] == [(*text, setting) for text in texts for setting in ("fp32", "bf16")]
    for row in rows:
        images, milliseconds, steps, warmup, memory = map(float, row[3:])
        assert steps == (8 if row[1] == texts[3][1] else 2)
        assert images * milliseconds / 1000 == pytest.approx(5, rel=0.002)  # both have four digits
        assert warmup > 0 and 0.1 < memory < 20
    seconds = {tuple(row[1:3]): float(row[4]) for row in rows}
    gain = seconds[texts[2][1], "bf16"] / seconds[texts[3][1], "bf16"]
    assert float(re.search(r"([\d.]+) times \(bf16\)\.", report)[1]) == pytest.approx(gain, abs=0.06)
    assert report.split("-->\n")[1].split("\n<!--")[0] in done.stdout


def test_figures_are_medians_of_the_steps_of_all_repeats():
    args = train_throughput.Arguments(rows=["images", "codes"], settings=["bf16-compile"], batch_size=8)
    runs = {
        ("images", "bf16-compile"): [
            train_throughput.Run(warmup=3.0, steps=[1.0, 9.0], peak_memory=2_500_000_000),
            train_throughput.Run(warmup=5.0, steps=[4.0], peak_memory=1_000_000_000),
        ],
        ("codes", "bf16-compile"): [train_throughput.Run(warmup=2.0, steps=[1.0, 1.0, 9.0], peak_memory=750_000_000)],
    }
    report = train_throughput.make_report(args, "sizes", runs)
    assert "| 2 | images, encoded at every step | bf16, compile | 2 | 4000 | 3 | 4 | 2.5 |" in report
    assert "| 2 | code cache, length buckets | bf16, compile | 8 | 1000 | 3 | 2 | 0.75 |" in report
    assert "a step of stage 2 is faster: 4.0 times (bf16, compile)." in report


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"rows": ["full", "empty"]}, "names of plain, full, images, codes, got empty"),
        ({"settings": ["fp8"]}, "got fp8"),
        ({"clock": "sun"}, "names of wall, cpu, got sun"),
        ({"steps": 0}, "steps must be 1 or more, got 0"),
        ({"device": "cuda:1"}, "device must be cpu or cuda, got cuda:1"),
    ],
)
def test_what_cannot_be_measured_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        train_throughput.check(train_throughput.Arguments(**changes))
