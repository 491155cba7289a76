"""Blocks of code in Markdown, and a program that runs those of whole pages as a reader would, from top to bottom.

    python tests/markdown_blocks.py README.md,docs/quick-start.md docs/convert.md

A page has a process of its own, and a folder, which looks like the repository's and also holds `photo.png`, and `images`
with classes of pictures in `train` and `test`. Pages joined by a comma are read one after the other in one folder. How a
page is written:

- `python` blocks share one namespace. Where a line ends with `# prints 64`, it must print just that.
- `bash` blocks, and those without a language, are commands, one a line. `dq-hf` and the scripts of `examples` run;
  `pip install` and `pytest` do not: who runs this has done that.
- An `output` block is what the block above it prints or, if its last command fails, the error that it ends with.
- `text`, `yaml`, `json` and `bibtex` are only shown.
- `<!-- not run: why -->` above a block: it does not run, for that reason.
"""

import ast
import contextlib
import io
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import NamedTuple

from markdown_it import MarkdownIt
from PIL import Image, ImageDraw

ROOT = Path(__file__).parents[1]
SHELL = ("", "bash")
SHOWN = ("text", "yaml", "json", "bibtex")
LANGUAGES = ("python", "output", *SHELL, *SHOWN)
SET_UP = (["pip", "install"], ["pytest"])
SCRIPTS = ("train-tokenizer", "encode", "train-generator")  # of dq-hf; each wants a process of its own
NOT_RUN = re.compile(r"<!--\s*not run:\s*(.*?)\s*-->", re.DOTALL)


class Block(NamedTuple):
    language: str
    text: str
    line: int  # of its first fence
    reason: str | None  # why it is not run

    @property
    def runs(self):
        return self.reason is None and self.language in ("python", "output", *SHELL)


def read_blocks(path):
    """The fenced blocks of a page, in order."""
    blocks, reason = [], None
    for token in MarkdownIt().parse(Path(path).read_text("utf-8")):
        if token.type == "fence":
            blocks.append(Block(token.info.strip(), token.content, token.map[0] + 1, reason))
        elif token.type == "code_block":  # of which nobody can say what it is: refused by its language
            blocks.append(Block("indented", token.content, token.map[0] + 1, reason))
        mark = NOT_RUN.fullmatch(token.content.strip()) if token.type == "html_block" else None
        reason = mark and mark[1]
    return blocks


def split_commands(text):
    """Each command of a shell block as a list of words."""
    commands = []
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while "&&" in words:
            commands.append(words[: words.index("&&")])
            words = words[words.index("&&") + 1 :]
        commands += [words] if words else []
    return commands


def script_and_arguments(words):
    """A Python script and its arguments, as `python`, `accelerate launch` or `torchrun` start it; None of other commands."""
    if words[:2] == ["accelerate", "launch"]:
        from accelerate.commands.launch import launch_command_parser

        launch = launch_command_parser().parse_args(words[2:])
        return launch.training_script, launch.training_script_args
    if words[0] == "python" and words[1].endswith(".py"):
        return words[1], words[2:]
    if "torchrun" in words:
        place = next(place for place, word in enumerate(words) if word.endswith(".py"))
        return words[place], words[place + 1 :]
    return None


def run_page(page):
    """Run all blocks of a page in this process and folder; AssertionError, or what a block raises, if one fails."""
    namespace, printed = {"__name__": "__main__"}, ""
    blocks = [block for block in read_blocks(page) if block.runs]
    for block, following in zip(blocks, [*blocks[1:], None]):
        print(f"--- {page}, line {block.line}", flush=True)
        if block.language == "output":
            assert printed.strip() == block.text.strip(), f"printed was:\n{printed}"
        elif block.language == "python":
            printed = run_python(block, page, namespace)
        else:
            *commands, last = split_commands(block.text)
            error_is_shown = following is not None and following.language == "output"
            printed = "".join([*map(run_command, commands), run_command(last, error_is_shown)])
        print(printed, end="", flush=True)


def run_python(block, page, namespace):
    """What a block prints."""
    everything = ""
    lines = Path(page).read_text("utf-8").splitlines()
    for statement in ast.parse("\n" * block.line + block.text, page).body:
        with contextlib.redirect_stdout(io.StringIO()) as stdout:
            exec(compile(ast.Module([statement], []), page, "exec"), namespace)
        everything += stdout.getvalue()
        expected = re.search(r"  # prints (.*)", lines[statement.end_lineno - 1])
        assert not expected or stdout.getvalue().strip() == expected[1], (
            f"line {statement.end_lineno} printed {stdout.getvalue()!r}"
        )
    return everything


def run_command(words, may_fail=False):
    """What a command prints; the last line of its errors if it fails and may do so."""
    if any(words[: len(start)] == start for start in SET_UP):
        return ""
    print("$", shlex.join(words), flush=True)
    if script := script_and_arguments(words):
        assert in_child(run_script, *script), f"{shlex.join(words)} failed"
        return ""
    if words[0] == "dq-hf":
        from dq_hf.commands.main import main

        if words[1] in SCRIPTS:
            assert in_child(main, words[1:]), f"{shlex.join(words)} failed"
            return ""
        stdout, stderr = io.StringIO(), io.StringIO()
        try:
            with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
                main(words[1:])
        except SystemExit as end:
            assert may_fail or not end.code, stderr.getvalue()
            if end.code:
                return stderr.getvalue().splitlines()[-1] + "\n"
        return stdout.getvalue()
    if words[0] == "python":
        words = [sys.executable, *words[1:]]
    return subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout


def run_script(script, arguments):
    """Run a Python script as a program."""
    os.environ["ACCELERATE_USE_CPU"] = "true"
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).parent.resolve()))
    runpy.run_path(script, run_name="__main__")


def in_child(function, *arguments):
    """Whether a function ends well in a process of its own, which begins with what is imported here."""
    sys.stdout.flush()
    sys.stderr.flush()
    if (child := os.fork()) == 0:
        status = 1
        try:
            function(*arguments)
            status = 0
        except SystemExit as end:
            status = int(bool(end.code))
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def make_folder(folder):
    """The folder that a page's reader has; see above."""
    for name in ("constraints.txt", "benchmarks", "examples", "src", "tests"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "docs" / "images").mkdir(parents=True)  # no link: commands write there
    for script in ROOT.glob("docs/*.py"):
        (folder / "docs" / script.name).symlink_to(script)
    for number in range(12):
        name = ("cat", "dog")[number % 2]
        path = folder / "images" / ("train" if number < 8 else "test") / name / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        draw_picture(number).save(path)
    draw_picture(12).resize((96, 80)).save(folder / "photo.png")


def draw_picture(number):
    """A picture of 64x64 pixels, smooth here and busy there."""
    image = Image.linear_gradient("L").resize((64, 64)).convert("RGB")
    draw = ImageDraw.Draw(image)
    for i in range(10):
        corner = (number * 7 + i * 5) % 40, (number * 3 + i * 11) % 40
        colour = (40 * i % 256, 90 * number % 256, 200 - 15 * i)
        draw.ellipse((*corner, corner[0] + 20 - i, corner[1] + 12 + i), fill=colour)
    return image


def run_in_folder(page, folder, log):
    """Run a page in a folder, with all that is printed in a file."""
    descriptor = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.chdir(folder)
    run_page(page)


def main(pages):
    """Run pages, and print what went wrong, {page: log}, as JSON; each of `pages` may be several, joined by commas."""
    import dq_hf.commands.main  # noqa: F401, once for all pages

    failed = {}
    with tempfile.TemporaryDirectory() as place:
        for number, joined in enumerate(pages):
            folder = Path(place, str(number))
            folder.mkdir()
            make_folder(folder)
            for page in joined.split(","):
                log = Path(place, "log")
                if not in_child(run_in_folder, str(Path(page).resolve()), folder, log):
                    failed[page] = log.read_text("utf-8")
    print(json.dumps(failed, indent=2))


if __name__ == "__main__":
    main(sys.argv[1:])
