"""What the README shows works: its commands, its Python, its links; and the commands of docs/pictures.md."""

import argparse
import importlib.util
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from PIL import Image
from transformers import HfArgumentParser

from dq_hf.cli import make_parser

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
INSTALL = "pip install -c constraints.txt -e . && dq-hf generate --output samples.png"
TEST = 'pip install -c constraints.txt -e ".[test]" && pytest'
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.M | re.S)
COMMANDS = [line for language, text in BLOCKS if not language for line in text.splitlines()]
SPANS = [
    " ".join(span.split()) for span in re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```$", "", README, flags=re.M | re.S))
]


def test_two_commands_do_all_the_set_up():
    assert COMMANDS[:2] == [INSTALL, TEST]


def test_continuous_integration_runs_the_test_command_of_the_readme():
    script = (ROOT / ".ci" / "run").read_text()
    search = re.search(r"\$\((grep .* README\.md)\)", script)[1]
    found = subprocess.run(["bash", "-c", search], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == TEST
    assert 'bash -c "$command"' in script


def test_the_python_of_the_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = [text for language, text in BLOCKS if language == "python"]
    results = []
    for text in blocks:
        namespace = {}
        exec(compile(text, "README.md", "exec"), namespace)
        results.append(namespace)
    first, second = results
    assert Image.open("food.png").size == (64, 64)
    assert [result["label"] for result in first["results"]][0] == "food" and len(first["results"]) == 2
    assert len(first["output"].images) == 4 and first["output"].codes.shape == (4, 16, 16)
    assert second["encoded"].grain_map.sum() == 19  # 30 % of 64 regions
    assert second["image"].size == (64, 64)


def subparsers(parser):
    """A parser's commands, {} if it has none."""
    actions = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    return actions[0].choices if actions else {}


@pytest.mark.parametrize("command", [text for text in COMMANDS + SPANS if "dq-hf " in text])
def test_commands_and_their_options_exist(command):
    words = shlex.split(command[command.index("dq-hf ") :])[1:]
    parser = make_parser()
    while words and (commands := subparsers(parser)) and not words[0].startswith("-"):
        parser = commands[words.pop(0)]
    for word in words:
        assert not word.startswith("-") or word in parser._option_string_actions, word


def test_commands_of_the_table_can_be_typed_as_they_stand():
    rows = re.findall(r"^\| `(dq-hf [^`]+)` \|", README, re.M)
    assert {row.split()[1] for row in rows} == set(subparsers(make_parser()))
    for row in rows:
        make_parser().parse_args(shlex.split(row)[1:])


@pytest.mark.parametrize(
    "command", re.findall(r"^dq-hf (.+)$", (ROOT / "docs" / "pictures.md").read_text(), flags=re.MULTILINE)
)
def test_commands_of_the_pictures_can_be_typed_as_they_stand(command):
    make_parser().parse_args(shlex.split(command))


@pytest.mark.parametrize("picture", re.findall(r"\]\((images/[^)]+)\)", (ROOT / "docs" / "pictures.md").read_text()))
def test_pictures_are_small(picture):
    path = ROOT / "docs" / picture
    assert path.stat().st_size < (400_000 if path.suffix == ".gif" else 150_000)


@pytest.mark.parametrize("command", [text for text in COMMANDS if "examples/" in text])
def test_training_commands_can_be_typed_as_they_stand(command):
    words = shlex.split(command)
    script = next(word for word in words if word.startswith("examples/"))
    spec = importlib.util.spec_from_file_location(Path(script).stem, ROOT / script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    arguments = words[words.index(script) + 1 :]
    HfArgumentParser(module.Arguments).parse_args_into_dataclasses(arguments)


@pytest.mark.parametrize("target", re.findall(r"\]\((?!https?://)([^)#]+)\)", README))
def test_links_lead_somewhere(target):
    assert (ROOT / target).exists()


@pytest.mark.parametrize("name", re.findall(r"^\|.*\| `(\w+\.py)` \|$", README, re.M))
def test_files_of_the_table_exist(name):
    assert (ROOT / "src" / "dq_hf" / "modeling" / name).is_file()
