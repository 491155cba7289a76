import re
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def benchmark():
    sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
    import sampling

    return sampling


def tiny(benchmark, **changes):
    sizes = dict(codes=[8, 40], batch_sizes=[1, 2], hidden_size=16, num_attention_heads=2, codebook_size=16, repeats=1)
    return benchmark.Arguments(**(sizes | changes))


def test_tables_have_a_row_for_every_length_and_batch_size(benchmark, tmp_path, capsys):
    output = tmp_path / "performance.md"
    benchmark.main(tiny(benchmark, every=1, output=str(output)))
    rows = re.findall(r"^\| (\d+) \| (\d+) \|" + r" [\d.e+-]+ \|" * 5 + "$", output.read_text(), flags=re.MULTILINE)
    assert rows == [("8", "1"), ("8", "2"), ("40", "1"), ("40", "2")]
    assert "| 2 to 11 | 12 to 22 | 23 to 33 | 34 to 44 |" in output.read_text()
    assert "| 40 | 2 |" in capsys.readouterr().out


def test_the_cached_step_can_be_compiled(benchmark, tmp_path, monkeypatch):
    compiled, torch_compile = [], benchmark.torch.compile
    monkeypatch.setattr(
        benchmark.torch, "compile", lambda step, **options: compiled.append(options) or torch_compile(step, **options)
    )
    output = tmp_path / "performance.md"
    benchmark.main(tiny(benchmark, codes=[8], batch_sizes=[1], every=1, compile="aot_eager", output=str(output)))
    assert [options["backend"] for options in compiled] == ["aot_eager"] * 2
    assert "layers, compiled -->" in output.read_text()
    assert "The cached step is compiled (aot_eager)." in output.read_text()


def test_writing_leaves_the_rest_of_the_file_alone(benchmark, tmp_path):
    output = tmp_path / "performance.md"
    output.write_text("# Performance\n\nTraining is slow.\n")
    benchmark.write_section(output, "small", "first")
    output.write_text(output.read_text() + "\nThe end.\n")
    benchmark.write_section(output, "large", "other")
    benchmark.write_section(output, "small", "second")
    text = output.read_text()
    assert text.startswith("# Performance\n\nTraining is slow.\n") and "\nThe end.\n" in text
    assert "second" in text and "first" not in text and "other" in text


def test_re_running_that_draws_something_else_is_an_error(benchmark):
    args = tiny(benchmark, every=1)
    model = benchmark.make_model(args, 8)
    generated, _, _ = benchmark.time_cached(model, 2, args)
    assert generated.grain_map.unique().tolist() == [1]
    generated.contents[1, 7] = (generated.contents[1, 7] + 1) % 16
    with pytest.raises(RuntimeError, match="another element 7"):
        benchmark.time_rerun(model, generated, args)


def test_lengths_that_no_grid_has_are_refused(benchmark):
    with pytest.raises(ValueError, match="multiple of 4, got 10"):
        benchmark.make_model(tiny(benchmark), 10)
