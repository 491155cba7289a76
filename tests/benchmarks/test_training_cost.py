"""`benchmarks/training_cost.py` counts what arithmetic gives, and reports both stages at the sizes of the scripts' options."""

import re
import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import training_cost  # noqa: E402

STAGE_1 = (
    "--image_size 32 --granularities 8 4 --block_out_channels 4 4 8 8 --norm_num_groups 2 --z_channels 4 "
    "--codebook_size 8 --codebook_dim 4 --disc_channels 4 --perceptual lpips"
)
STAGE_2 = "--hidden_size 8 --num_attention_heads 2 --num_position_layers 1 --num_content_layers 1"


def test_a_linear_layer_costs_what_arithmetic_says():
    layer, frozen = torch.nn.Linear(8, 4), torch.nn.Linear(4, 4).requires_grad_(False)
    inputs = torch.rand(5, 8)
    count = training_cost.count_steps([layer], [frozen], lambda: frozen(layer(inputs)).sum(), num_averages=1)
    assert count.parameters == 8 * 4 + 4
    # Forward and gradient of the weight; of the frozen layer forward and gradient of the input.
    assert count.operations == 2 * (2 * 5 * 8 * 4) + 2 * (2 * 5 * 4 * 4)
    assert count.activations == 4 * 5 * 8  # the layer's input; the frozen one keeps only its weight
    assert count.state == 4 * 36 * 5  # weights, gradients, two moments, an average


def test_the_report_has_both_stages_of_the_given_sizes(tmp_path, capsys):
    output = tmp_path / "page.md"
    sizes = {"stage_1": STAGE_1, "stage_2": STAGE_2}
    training_cost.main(training_cost.Arguments(**sizes, batch_size=4, tflops=1.0, output=str(output), name="tiny"))
    report = capsys.readouterr().out
    assert "with 40 codes; a step has 4 images" in report  # half of the 16 regions fine: 8 + 8 * 4
    rows = re.findall(r"^\| (\d) \| ([\d,]+) \| (\S+) \| (\S+) \|", report, re.MULTILINE)
    assert [row[0] for row in rows] == ["1", "2"]
    for _, _, operations, seconds in rows:
        assert float(seconds) == float(f"{float(operations) * 4 / 1000:.2g}")
    assert report.strip() in output.read_text()
