import re

import sampling_steps
from conftest import TEXT, make_text_encoder, make_text_tokenizer, make_transformer, make_vae

from dq_hf import DQForImageGeneration


def test_tables_have_a_row_for_every_batch_size_and_lookahead(tmp_path):
    transformer = make_transformer(**TEXT)
    for parameter in transformer.requires_grad_(False).parameters():
        parameter *= 0.5  # else no region of its images is fine
    model = DQForImageGeneration.from_models(make_vae(), transformer, make_text_encoder(), make_text_tokenizer())
    model.save_pretrained(tmp_path / "text")
    output, prompts = tmp_path / "performance.md", tmp_path / "prompts.txt"
    prompts.write_text("a red heart\nsun\n")
    trained = dict(model=str(tmp_path / "text"), prompts=str(prompts), num_images=1, seed=3)
    sizes = dict(hidden_size=16, num_attention_heads=2, num_position_layers=1, num_content_layers=1, codebook_size=16)
    sampling_steps.main(
        sampling_steps.Arguments(
            **sizes, **trained, batch_sizes=[1, 2], lookahead=[1, 4], steps=4, rounds=1, output=str(output)
        )
    )
    text = output.read_text()
    number = r" [\d.e+-]+ \|"
    assert re.findall(rf"^\| (\d) \|{number * 6}$", text, flags=re.MULTILINE) == ["1", "2"]
    rows = re.findall(rf"^\| (\d) \| (\d) \|{number * 3} ([-\d.]+) times \|$", text, flags=re.MULTILINE)
    # Times of two passes differ by noise alone at these sizes, and may even come out negative.
    assert [row[:2] for row in rows] == [("1", "1"), ("1", "4"), ("2", "1"), ("2", "4")]
    assert rows[0][2] == rows[2][2] == "1.00"
