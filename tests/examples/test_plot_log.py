import json
import sys
from pathlib import Path

import pytest
from PIL import Image

from dq_hf.training.progress import RunLog

TRAINED = {"loss": 0.8, "l1": 0.3, "codes": 40.0}
JUDGED = {"g_loss": -0.1, "d_loss": 1.0}


@pytest.fixture(scope="module")
def plot_log():
    sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
    import plot_log

    return plot_log


@pytest.fixture
def stage_1_log(tmp_path):
    """The discriminator starts between steps 20 and 40."""
    log = RunLog(tmp_path / "log.jsonl")
    log.write(20, TRAINED)
    log.write(40, TRAINED | JUDGED)
    log.write(40, {"psnr": 20.0, "codes_per_image": 39.0})
    log.write(60, TRAINED | JUDGED)
    return log.path


@pytest.fixture
def run(plot_log, monkeypatch):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["plot_log.py", *map(str, arguments)])
        plot_log.main()

    return run


def test_a_picture_has_a_panel_for_each_quantity(run, stage_1_log, tmp_path, capsys):
    run(stage_1_log, "--output", tmp_path / "curves.png")
    assert capsys.readouterr().out == f"{tmp_path / 'curves.png'}\n"
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.size == (4 * 360, 2 * 240 + 60)  # loss, l1, codes, g_loss; d_loss, psnr
        assert len(picture.convert("RGB").getcolors(2**20)) > 10


def test_held_out_figures_share_the_panel_of_what_training_logs(plot_log, stage_1_log, tmp_path):
    panels = plot_log.find_curves(plot_log.read_rows(stage_1_log))
    assert list(panels) == ["loss", "l1", "codes", "g_loss", "d_loss", "psnr"]
    assert panels["codes"] == {"training": ([20, 40, 60], [40.0] * 3), "held out": ([40], [39.0])}
    assert panels["psnr"] == {"held out": ([40], [20.0])}
    panels = plot_log.find_curves(
        [{"step": 5, "share_4": 0.4, "calibrated_share_4": 0.5}, {"step": 10, "share_4": 0.6}]
    )
    assert panels == {"share_4": {"training": ([5, 10], [0.4, 0.6]), "calibration": ([5], [0.5])}}
    log = RunLog(tmp_path / "stage_2.jsonl")
    log.write(5, {"content_loss": 5.0})
    log.write(5, {"test_content_loss": 6.0})
    panels = plot_log.find_curves(plot_log.read_rows(log.path))
    assert panels == {"content_loss": {"training": ([5], [5.0]), "held out": ([5], [6.0])}}


def test_each_split_has_a_curve_of_its_own_in_the_panel_of_what_it_measures(plot_log):
    held_out = {"psnr": 20.0, "codes_per_image": 39.0, "test_share_4": 0.5, "test_loss": 2.0}
    rows = [{"step": step, "codes": 40.0, "share_4": 0.4, "loss": 1.0} for step in (5, 10)]
    splits = {f"{name}/{split}": value for split in ("pairs", "more") for name, value in held_out.items()}
    rows.append({"step": 10} | held_out | splits)
    measured = {kind: [10] for kind in ("held out", "held out, pairs", "held out, more")}
    panels = plot_log.find_curves(rows)
    steps = {panel: {kind: at for kind, (at, _) in curves.items()} for panel, curves in panels.items()}
    trained = {"training": [5, 10]} | measured
    assert steps == {"codes": trained, "share_4": trained, "loss": trained, "psnr": measured}
    assert panels["codes"]["held out, more"] == ([10], [39.0])

    figure = plot_log.draw(rows, "run")
    (legend,) = figure.legends
    colours = {text.get_text(): line.get_color() for text, line in zip(legend.get_texts(), legend.get_lines())}
    assert len(set(colours.values())) == 4 and set(colours) == set(trained)
    psnr = figure.axes[-1]
    assert psnr.get_ylabel() == "dB"
    assert [line.get_color() for line in psnr.lines] == [colours[kind] for kind in measured]


def test_titles_have_words_and_axes_have_units(plot_log, stage_1_log):
    axes = plot_log.draw(plot_log.read_rows(stage_1_log), "run").axes
    titles = {panel.get_title(): panel.get_ylabel() for panel in axes}
    assert titles["PSNR of the reconstructions, mean over images"] == "dB"
    assert "codes an image, mean" in titles and "discriminator's hinge loss" in titles


def test_a_line_stands_where_the_discriminator_starts(plot_log, stage_1_log):
    rows = plot_log.read_rows(stage_1_log)
    figure = plot_log.draw(rows, "run")
    for panel in figure.axes:
        [line] = [line for line in panel.lines if line.get_linestyle() == ":"]
        assert list(line.get_xdata()) == [40, 40]
    assert "discriminator starts" in [text.get_text() for text in figure.legends[0].get_texts()]
    figure = plot_log.draw(rows[:1], "run")
    assert [len(panel.lines) for panel in figure.axes] == [1, 1, 1]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["training"]


def test_a_last_line_that_is_not_whole_is_left_out(plot_log, stage_1_log):
    rows = plot_log.read_rows(stage_1_log)
    with open(stage_1_log, "a") as file:
        file.write('{"step": 80, "lo')
    assert plot_log.read_rows(stage_1_log) == rows


def test_losses_that_are_not_finite_are_gaps(run, tmp_path):
    log = RunLog(tmp_path / "log.jsonl")
    log.write(1, {"loss": 1.0})
    log.write(2, {"loss": float("nan")})
    log.write(3, {"loss": float("inf")})
    run(log.path, "--output", tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.size == (360, 240 + 60)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "holds no figures yet"),
        (b'{"step": 20, "lo', "holds no figures yet"),
        (json.dumps({"step": 20}).encode() + b"\n", "holds no figures yet"),
        (b'{"step": 20, "loss": 0.5}\n{"step": 40, "lo\n', "line 2: expected a JSON object"),
        (b'{"loss": 0.5}\n', "expected rows of numbers with a step"),
        (b'{"step": 20, "loss": "low"}\n', "expected rows of numbers with a step"),
        (b"\x89PNG\n\xff\n", "is no log of a run"),
    ],
)
def test_an_empty_or_damaged_log_is_an_error_in_one_line(run, tmp_path, content, message):
    (tmp_path / "log.jsonl").write_bytes(content)
    with pytest.raises(SystemExit, match=message) as error:
        run(tmp_path / "log.jsonl", "--output", tmp_path / "curves.png")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "curves.png").exists()


def test_a_log_that_is_not_there_and_an_unknown_format_are_errors(run, stage_1_log, tmp_path):
    with pytest.raises(SystemExit, match="No such file.*other.jsonl"):
        run(tmp_path / "other.jsonl")
    with pytest.raises(SystemExit, match="expected the file log.jsonl of a run, got the folder"):
        run(tmp_path)
    with pytest.raises(SystemExit, match="Format 'txt' is not supported"):
        run(stage_1_log, "--output", tmp_path / "curves.txt")


def test_without_matplotlib_the_extra_is_named(run, stage_1_log, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SystemExit, match=r'pip install -c constraints.txt -e "\.\[train\]"'):
        run(stage_1_log)
