"""The first example, with a few steps."""

import re
import runpy
import sys
from pathlib import Path

import torch
from PIL import Image

from dq_hf import DQPipeline

SCRIPT = Path(__file__).parents[2] / "examples" / "train_tiny.py"


def test_it_trains_both_stages_and_draws_what_they_learned(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        sys, "argv", [str(SCRIPT), "--output", str(tmp_path), "--tokenizer_steps", "2", "--generator_steps", "3"]
    )
    runpy.run_path(str(SCRIPT), run_name="__main__")
    printed = capsys.readouterr()
    assert "tokenizer: 100%" in printed.err and "generator: 100%" in printed.err
    assert re.search(r"held-out images: [\d.]+ dB with \d+ codes of at most 64", printed.out)
    picture = Image.open(tmp_path / "tiny.png")
    assert picture.width / picture.height == 12 / 4  # originals, grain maps, reconstructions, samples
    pipe = DQPipeline.from_pretrained(tmp_path)
    image = pipe(class_labels="flags", generator=torch.Generator().manual_seed(0)).images[0]
    assert image.size == (32, 32)
