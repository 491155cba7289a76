import re

import sampling_steps


def test_tables_have_a_row_for_every_batch_size_and_lookahead(tmp_path):
    output = tmp_path / "performance.md"
    sizes = dict(hidden_size=16, num_attention_heads=2, num_position_layers=1, num_content_layers=1, codebook_size=16)
    sampling_steps.main(
        sampling_steps.Arguments(
            **sizes, batch_sizes=[1, 2], lookahead=[1, 4], steps=4, rounds=1, num_images=1, output=str(output)
        )
    )
    text = output.read_text()
    number = r" [\d.e+-]+ \|"
    assert re.findall(rf"^\| (\d) \|{number * 6}$", text, flags=re.MULTILINE) == ["1", "2"]
    rows = re.findall(rf"^\| (\d) \| (\d) \|{number * 3} ([\d.]+) times \|$", text, flags=re.MULTILINE)
    assert [row[:2] for row in rows] == [("1", "1"), ("1", "4"), ("2", "1"), ("2", "4")]
    assert rows[0][2] == rows[2][2] == "1.00"
