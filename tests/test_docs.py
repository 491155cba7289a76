"""What the documentation shows works: blocks of code, commands, links, named tests. How pages are written: `markdown_blocks`."""

import argparse
import ast
import functools
import inspect
import json
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser
from hub_server import HubServer, run_client
from markdown_blocks import LANGUAGES, NOT_RUN, SHELL, read_blocks, script_and_arguments, split_commands
from markdown_it import MarkdownIt
from transformers import HfArgumentParser

from dq_hf import DEFAULT_MODEL
from dq_hf.commands.main import make_parser

ROOT = Path(__file__).parents[1]


def paths_of(*patterns):
    """Files of the repository, relative to it."""
    return [path.relative_to(ROOT).as_posix() for pattern in patterns for path in sorted(ROOT.glob(pattern))]


PAGES = paths_of("README.md", "docs/**/*.md")
BLOCKS = [(page, block) for page in PAGES for block in read_blocks(ROOT / page)]
RUNNING = sorted({page for page, block in BLOCKS if block.runs})
NEWCOMER = ("README.md", "docs/quick-start.md")  # are followed one after the other, in one folder
MARKDOWN = PAGES + paths_of("benchmarks/**/*.md", "examples/**/*.md", "src/**/*.md")


def read(page):
    return (ROOT / page).read_text("utf-8")


def tokens_of(page):
    """All tokens of a page, those inside of paragraphs too."""
    for token in MarkdownIt().enable("table").parse(read(page)):
        yield from (token, *(token.children or []))


# Code


@pytest.fixture(scope="module")
def failures(request, tmp_path_factory):
    """What went wrong, {page: log}, in the pages that are asked for; all are run by one program."""
    tests = [item for item in request.session.items if item.function is test_the_code_of_a_page_runs]
    asked = [test.callspec.params["page"] for test in tests]
    pages = [str(ROOT / page) for page in asked if page not in NEWCOMER]
    if set(asked) & set(NEWCOMER):
        pages.append(",".join(str(ROOT / page) for page in NEWCOMER))
    program = [sys.executable, str(ROOT / "tests" / "markdown_blocks.py"), *pages]
    with HubServer() as hub:
        hub.add("user/repo", DEFAULT_MODEL)
        done = run_client(hub, program, cwd=tmp_path_factory.mktemp("docs"))
    return json.loads(done.stdout)


@pytest.mark.parametrize("page", RUNNING)
def test_the_code_of_a_page_runs(page, failures):
    assert str(ROOT / page) not in failures, failures[str(ROOT / page)]


@pytest.mark.parametrize("page", PAGES)
def test_a_block_is_run_or_says_why_not(page):
    blocks = [block for other, block in BLOCKS if other == page]
    reasons = [block.reason for block in blocks if block.reason is not None]
    assert {block.language for block in blocks} <= set(LANGUAGES)
    assert NOT_RUN.findall(read(page)) == reasons and all(" " in reason for reason in reasons)


# Commands


def shown_commands():
    """Commands of blocks and of the text, and those of our scripts' own help: {command: where}."""
    commands = {}
    for page, block in BLOCKS:
        if block.language in SHELL:
            commands |= {shlex.join(words): page for words in split_commands(block.text)}
    for page in MARKDOWN:
        spans = [" ".join(token.content.split()) for token in tokens_of(page) if token.type == "code_inline"]
        commands |= {span: page for span in spans if re.match(r"(dq-hf|python|accelerate launch) ", span)}
    for path in paths_of("benchmarks/*.py", "docs/*.py", "examples/*.py", "src/dq_hf/scripts/*.py"):
        help_text = (ast.get_docstring(ast.parse(read(path))) or "").replace("\\\n", " ")
        lines = re.findall(r"^    ((?:python|accelerate launch) .*)$", help_text, re.MULTILINE)
        commands |= {shlex.join(shlex.split(line, comments=True)): path for line in lines}
    for path in paths_of("examples/configs/*.sh"):
        lines = re.findall(r"^ *((?:\$launch|python|dq-hf) .*)$", read(path).replace("\\\n", " "), re.MULTILINE)
        lines = [line.replace("$launch", "accelerate launch") for line in lines]
        commands |= {shlex.join(shlex.split(line)): path for line in lines}
    return commands


COMMANDS = shown_commands()


KINDS = ("Arguments", "BuildArguments", "TokenizerArguments", "EncodeArguments", "GeneratorArguments")


@functools.cache
def script_parser(script):
    """The parser of a script of ours, also of one that starts a program of the package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str((ROOT / script).parent))
        main = runpy.run_path(str(ROOT / script), run_name="shown")["main"]
    names = inspect.unwrap(main).__globals__
    kind = next(names[name] for name in KINDS if name in names)  # its own before one that it imports
    return HfArgumentParser(kind)


def dq_hf_parser(words):
    """The parser that a `dq-hf` command's options are for; an unknown command is an AssertionError."""
    parser = make_parser()
    for word in words:
        choices = [a.choices for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
        if not choices or word.startswith("-"):
            break
        assert word in choices[0]
        parser = choices[0][word]
    return parser


def check_options(words, *parsers):
    """AssertionError at an option that none of the parsers has; other things may be missing."""
    known = {option for parser in parsers for option in parser._option_string_actions}
    assert {word for word in words if word.startswith("-")} <= known


@pytest.mark.parametrize("command", COMMANDS)
def test_options_and_files_of_a_command_exist(command):
    words = [re.sub(r"\$\w+", "1", word) for word in shlex.split(command)]
    scripts = re.findall(r"(?:benchmarks|docs|examples)/\w+\.py", command)
    for path in scripts + re.findall(r"examples/configs/\S+", command):
        assert (ROOT / path).is_file()
    if words[0] == "dq-hf":
        parser = dq_hf_parser(words[1:])
        parsers = [parser.get_default("parser") or parser]
        if script := parser.get_default("module"):
            parsers.append(script_parser(f"src/{script.replace('.', '/')}.py"))
        check_options(words, *parsers)
    elif words[-1] == "...":
        check_options(words, launch_command_parser(), *map(script_parser, scripts))
    elif scripts:
        path, arguments = script_and_arguments(words)
        if "HfArgumentParser" in read(path) or "dq_hf.scripts" in read(path):
            script_parser(path).parse_args_into_dataclasses(arguments)
        else:
            options = [word for word in arguments if word.startswith("--")]
            assert all(f'"{option}"' in read(path) for option in options)


@pytest.mark.parametrize("page", PAGES)
def test_extras_that_are_installed_exist(page):
    extras = re.findall(r'pip install .*"\.\[(.+?)\]"', read(page))
    table = read("setup.py").partition("extras_require=")[2]
    assert all(f'"{name}": [' in table for extra in extras for name in extra.split(","))


def test_continuous_integration_runs_the_test_command_of_the_readme():
    script = read(".ci/run")
    search = re.search(r"\$\((grep .* README\.md)\)", script)[1]
    found = subprocess.run(["bash", "-c", search], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    assert found.endswith("&& pytest") and found in read("README.md").splitlines()
    assert 'bash -c "$command"' in script


def test_every_command_has_a_row_that_can_be_typed_as_it_stands():
    rows = re.findall(r"^\| `(dq-hf [^`]+)` \|", read("README.md"), re.MULTILINE)
    (action,) = [action for action in make_parser()._actions if isinstance(action, argparse._SubParsersAction)]
    assert {row.split()[1] for row in rows} == set(action.choices)
    for row in rows:
        make_parser().parse_args(shlex.split(row)[1:])


# Links, files and tests that are named


def anchors_of(page):
    """The anchors that GitHub gives to a page's headings."""
    tokens = MarkdownIt().parse(read(page))
    titles = [inline.content for head, inline in zip(tokens, tokens[1:]) if head.type == "heading_open"]
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", MARKDOWN)
def test_links_and_pictures_lead_somewhere(page):
    targets = [token.attrGet("href") or token.attrGet("src") for token in tokens_of(page)]
    for target in targets:
        if target is None or re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), target
        assert not anchor or anchor in anchors_of(file.resolve().relative_to(ROOT)), target


@pytest.mark.parametrize(
    "name", sorted({name for page in PAGES for name in re.findall(r"`(test_\w+\.py(?:::\w+)?)`", read(page))})
)
def test_a_test_that_is_named_exists(name):
    file, _, function = name.partition("::")
    (path,) = paths_of(f"tests/**/{file}")
    tree = ast.parse(read(path))
    assert not function or function in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


# The reference


def test_the_reference_is_made_of_todays_docstrings():
    pages = runpy.run_path(str(ROOT / "docs" / "build_reference.py"))["make_pages"]()
    written = {Path(path).name: read(path) for path in paths_of("docs/reference/*.md")}
    assert written == pages, "run `python docs/build_reference.py`"
