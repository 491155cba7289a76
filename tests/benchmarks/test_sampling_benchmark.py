import re

import pytest
import sampling


def tiny(**changes):
    sizes = dict(codes=[8, 40], batch_sizes=[1, 2], hidden_size=16, num_attention_heads=2, codebook_size=16, repeats=1)
    return sampling.Arguments(**(sizes | changes))


def test_tables_have_a_row_for_every_length_and_batch_size_and_the_rest_of_the_file_stays(tmp_path, capsys):
    output = tmp_path / "performance.md"
    output.write_text("# Performance\n\nTraining is slow.\n")
    sampling.main(tiny(output=str(output)))
    output.write_text(output.read_text() + "\nThe end.\n")
    sampling.main(tiny(codes=[8], batch_sizes=[1], compile="aot_eager", output=str(output)))
    sampling.main(tiny(output=str(output)))
    text = output.read_text()
    rows = re.findall(r"^\| (\d+) \| (\d+) \|" + r" [\d.e+-]+ \|" * 2 + "$", text, flags=re.MULTILINE)
    assert sorted(rows) == [("40", "1"), ("40", "2"), ("8", "1"), ("8", "1"), ("8", "2")]
    assert "| 2 to 11 | 12 to 22 | 23 to 33 | 34 to 44 |" in text and "| 40 | 2 |" in capsys.readouterr().out
    assert "The step is compiled (aot_eager)." in text
    assert text.startswith("# Performance\n\nTraining is slow.\n") and "\nThe end.\n" in text


@pytest.mark.parametrize("codes", [0, 10])
def test_every_region_has_four_codes(codes):
    with pytest.raises(ValueError, match=f"multiple of 4, got {codes}"):
        sampling.make_model(tiny(), codes)
