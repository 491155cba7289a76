"""`dq-hf` itself: how fast it answers, how it ends, and how it starts the training scripts."""

import signal
import subprocess
import sys

import pytest

from dq_hf.commands.main import main, make_parser

COMMANDS = [
    [],
    ["generate"],
    ["reconstruct"],
    ["convert"],
    ["encode"],
    ["calibrate"],
    ["train-router"],
    ["evaluate"],
    ["evaluate", "reconstruction"],
    ["evaluate", "generation"],
    ["evaluate", "likelihood"],
    ["draw"],
    ["draw", "order"],
    ["draw", "router"],
    ["draw", "usage"],
    ["demo"],
]
REFUSED = [
    (["paint"], 2),
    (["generate", "--sead", "1", "--output", "a.png"], 2),
    (["generate", "--output", "a.png", "-n", "0"], 1),
    (["generate", "--output", "a.png", "--seed", "-1"], 1),
    (["generate", "--output", "a.png", "--top-p", "1.5"], 1),
    (["generate", "--output", "taken.png"], 1),
    (["reconstruct", "none.png", "out.png"], 1),
    (["draw", "order", "order.png"], 1),
    (["draw", "router", "none.png", "out.png"], 1),
    (["evaluate", "generation", "--data", "gone", "--output", "report.txt"], 1),
    (["calibrate", "--data", "gone", "--model", "gone"], 1),
    (["train-router", "--data", "gone", "--model", "gone", "--output", "new", "--steps", "0"], 1),
    (["demo", "--port", "70000"], 1),
]
# As `dq-hf` and as `python -m dq_hf` start; every line of `asked` is a command, whose exit status is printed.
STARTS = {
    "script": "sys.argv = ['/bin/dq-hf']",
    "module": "sys.argv, sys.orig_argv = ['-m'], ['python', '-m', 'dq_hf']",
}
PROGRAM = """
import sys
{start}
from dq_hf.commands.main import main
for arguments in {asked}:
    try:
        main(arguments)
    except SystemExit as end:
        heavy = [name for name in ("torch", "transformers", "diffusers", "accelerate") if name in sys.modules]
        print("ENDED", end.code, *heavy)
"""


@pytest.mark.parametrize(
    ("command", "nearest"),
    [
        (["generate", "--class-lable", "flags", "--output", "a.png"], "--class-label"),
        (["train-tokenizer", "--output_dir", "run", "--max_stepz", "4"], "--max_steps"),
        (["train-tokenizer", "--output_dir", "run", "--dsc_r1=4"], "--disc_r1"),
        (["encode", "photos", "--output", "codes.parquet", "--resise"], "--resize"),
    ],
)
def test_a_misspelt_option_is_answered_by_the_command_with_the_nearest(capsys, monkeypatch, command, nearest):
    monkeypatch.setattr(sys, "argv", sys.argv)  # which a script's command changes
    with pytest.raises(SystemExit, match="2"):
        main(command)
    message = capsys.readouterr().err
    assert message.startswith(f"usage: dq-hf {command[0]}") and message.endswith(f"did you mean {nearest}?\n")


@pytest.mark.parametrize("start", STARTS)
def test_help_and_refused_arguments_import_nothing_large(tmp_path, start):
    (tmp_path / "taken.png").write_text("mine")
    asked = [(command + ["--help"], 0) for command in COMMANDS] + REFUSED
    program = PROGRAM.format(start=STARTS[start], asked=[arguments for arguments, _ in asked])
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    ended = [line for line in done.stdout.splitlines() if line.startswith("ENDED")]
    assert ended == [f"ENDED {status}" for _, status in asked], done.stderr


def test_scripts_read_their_options_before_torch_is_imported(tmp_path):
    scripts = ("train-tokenizer", "encode", "train-generator")
    asked = [([script, "--help"], 0) for script in scripts]
    asked += [([script, "--output_dir", "a", "--batch_size", "0"], 1) for script in scripts]
    asked += [([script, "--output_dir", "a", "--crop", "top"], 2) for script in scripts]
    program = PROGRAM.format(start=STARTS["script"], asked=[arguments for arguments, _ in asked])
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    ended = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("ENDED")]
    assert [int(words[0]) for words in ended] == [status for _, status in asked], done.stderr
    assert not any("torch" in words for words in ended)
    assert done.stderr.count("--batch_size must be 1 or more, got 0") == 3
    assert done.stderr.count("argument --crop: invalid choice: 'top'") == 3


def test_the_package_is_whole_in_any_process():
    registered = (
        "import dq_hf\nfrom transformers import AutoConfig\nAutoConfig.for_model('dq')\n"  # by the import alone
    )
    names = "import dq_hf\nfor name in dq_hf.__all__: getattr(dq_hf, name)\n"
    for program in (registered, f"import sys\n{STARTS['script']}\n{names}{registered}"):
        done = subprocess.run([sys.executable, "-c", program], capture_output=True)
        assert done.returncode == 0, done.stderr
    missing = f"import sys\n{STARTS['script']}\nimport dq_hf\ntry: dq_hf.DQ\nexcept AttributeError: print('refused')"
    assert subprocess.run([sys.executable, "-c", missing], capture_output=True).stdout == b"refused\n"


def test_the_module_runs_as_a_command(tmp_path):
    command = [sys.executable, "-m", "dq_hf", "generate", "-n", "1", "--output", "grid.png"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and done.stdout == "grid.png\n"
    assert "100%" in done.stderr and not any(word in done.stderr for word in ("arning:", "torch"))
    again = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    message = "dq-hf generate: error: grid.png exists; choose another name or give --force\n"
    assert (again.returncode, again.stdout, again.stderr) == (1, "", message)


@pytest.mark.parametrize("arguments", [[], ["paint"], ["generate"], ["generate", "--sead", "1", "--output", "a.png"]])
def test_wrong_options_show_the_usage(capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2 and "usage: dq-hf" in capsys.readouterr().err


def test_every_help_is_a_full_sentence():
    def sentences(parser):
        for action in (parser.get_default("parser") or parser)._actions:
            yield action.help
            for command in (action.choices or {}).values() if action.nargs == "A..." else ():
                yield command.description
                yield from sentences(command)

    texts = [text for text in sentences(make_parser()) if text and text != "show this help message and exit"]
    assert len(texts) > 100
    assert not [text for text in texts if not (text[0].isupper() and text.endswith((".", "...`.")))]


def test_ctrl_c_ends_in_one_line(tmp_path):
    command = [sys.executable, "-m", "dq_hf", "generate", "-n", "2000", "--batch-size", "1", "--output-dir", "a"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=tmp_path, preexec_fn=reset_interrupts)
    while not (tmp_path / "a" / "00000.png").exists():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and error.splitlines()[-1] == "dq-hf generate: interrupted"
    assert "Traceback" not in error


def reset_interrupts():
    """Whoever starts the tests may have Ctrl-C ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.mark.parametrize("command", ["train-tokenizer", "encode", "train-generator"])
def test_a_script_gets_all_arguments_of_its_command(command, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [])  # which the script changes
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    shown = capsys.readouterr().out
    assert stop.value.code == 0 and f"usage: dq-hf {command}" in shown and "--output_dir" in shown
    with pytest.raises((SystemExit, ValueError)) as stop:
        main([command, "--output_dir", "a", "--sead", "1"])
    assert "--sead" in f"{stop.value} {capsys.readouterr().err}"
