"""Write the pages of docs/reference from the docstrings: one for each part of the package, and one for the command line.

    python docs/build_reference.py

Public are the names that `dq_hf` exports, with their methods, and of the other modules what has a docstring of more than
one line; shorter ones are those of helpers. Of a configuration only fields and properties are listed.
"""

import argparse
import importlib
import inspect
import pkgutil
import re
from pathlib import Path

from transformers import PreTrainedConfig

import dq_hf
from dq_hf.commands.main import make_parser

FOLDER = Path(__file__).parent / "reference"
NOT_API = ("__main__", "assets", "commands", "public", "scripts")  # the command line has a page; scripts have --help


def main():
    pages = make_pages()
    FOLDER.mkdir(exist_ok=True)
    for old in FOLDER.glob("*.md"):
        old.unlink()
    for name, text in pages.items():
        (FOLDER / name).write_text(text, encoding="utf-8")


def make_pages():
    """{file name: text} of all pages."""
    public = [getattr(dq_hf, name) for name in dq_hf.__all__]
    classes = [member for member in public if inspect.isclass(member)]
    pages = {"dq_hf.md": [f"# dq_hf\n\n{dq_hf.__doc__.strip()}", *map(describe_class, classes)]}
    for part in pkgutil.iter_modules(dq_hf.__path__, "dq_hf."):
        if part.name.rpartition(".")[2] not in NOT_API:
            package = importlib.import_module(part.name)
            text = [f"# {part.name}\n\n{markdown(package.__doc__)}"]
            if part.ispkg:
                modules = [
                    importlib.import_module(m.name) for m in pkgutil.iter_modules(package.__path__, f"{part.name}.")
                ]
                for module in modules:
                    if members := describe_members(module, public):
                        text += [f"## {module.__name__}\n\n{markdown(module.__doc__)}", *members]
            text += describe_members(package, public)
            pages[f"{part.name}.md"] = text
    pages["command-line.md"] = ["# dq-hf", *describe_parser(make_parser(), "dq-hf")]
    pages = {name: "\n\n".join(text) + "\n" for name, text in pages.items() if len(text) > 1}
    titles = {name: re.match(r"# (.+)\n\n(.+)", text) for name, text in pages.items()}
    rows = "\n".join(f"| [{title[1]}]({name}) | {title[2]} |" for name, title in titles.items())
    index = f"# API reference\n\nMade of the docstrings by `python docs/build_reference.py`.\n\n| page | what is there |\n|---|---|\n{rows}\n"
    return {"README.md": index} | pages


def describe_members(module, elsewhere):
    """Public classes and functions that a module defines, but those that another page has."""
    members = [
        member
        for member in vars(module).values()
        if getattr(member, "__module__", None) == module.__name__
        and (inspect.isclass(member) or inspect.isfunction(member))
    ]
    members = [member for member in members if member not in elsewhere and "\n" in (member.__doc__ or "").strip()]
    return [
        describe_class(member) if inspect.isclass(member) else describe_function(member, member.__name__)
        for member in members
    ]


def describe_class(kind):
    """A class, with the methods that it and its bases in dq_hf define."""
    ours = [base for base in kind.__mro__ if base.__module__.startswith("dq_hf")]
    defaults = vars(kind) if issubclass(kind, PreTrainedConfig) else {}
    text = [f"### {kind.__name__}", markdown(inspect.getdoc(kind), defaults)]
    names = dict.fromkeys(name for base in ours for name in vars(base) if name == "__call__" or name[0] != "_")
    for name in names:
        member = next(vars(base)[name] for base in ours if name in vars(base))
        title = f"{kind.__name__}.{name}"
        if isinstance(member, property) and member.__doc__:
            text.append(f"#### {title}\n\n{markdown(inspect.getdoc(member))}")
        elif inspect.isroutine(member) and member.__doc__ and member.__name__ == name and not defaults:
            text.append(describe_function(getattr(kind, name), title, "####"))
    return "\n\n".join(text)


def describe_function(function, title, level="###"):
    """A function or method, with its parameters and their defaults."""
    signature = inspect.signature(function)
    parameters = [p.replace(annotation=p.empty) for p in signature.parameters.values() if p.name != "self"]
    signature = signature.replace(parameters=parameters, return_annotation=signature.empty)
    return f"{level} {title}\n\n`{title.rpartition('.')[2]}{signature}`\n\n{markdown(inspect.getdoc(function))}"


def markdown(docstring, defaults=()):
    """A docstring as Markdown: its sections as lists, with the defaults of fields that have one."""
    text, items, section = [], [], None
    for line in [*inspect.cleandoc(docstring).splitlines(), None]:
        head = line is not None and re.fullmatch(r"(Args|Attributes|Returns|Raises):", line)
        if line is None or head or (section and line and not line.startswith(" ")):
            if section:
                text += [f"{section}:", "", *items, ""]
            items, section = [], None
        if head:
            section = head[1]
        elif section and line:
            entry = re.match(r"    (\w+(?:, \w+)*): (.*)", line)
            if entry and section != "Returns":
                names = entry[1].split(", ")
                default = defaults[names[0]] if len(names) == 1 and names[0] in defaults else None
                shown = ", ".join(f"`{name}`" for name in names) + (
                    f" (default `{default!r}`)" if default is not None else ""
                )
                items.append(f"- {shown}: {escape(entry[2])}")
            elif section == "Returns" and not items:
                items.append(f"- {escape(line.strip())}")
            else:
                items.append(f"  {escape(line.strip())}")
        elif line is not None:
            text.append(line if line.startswith("    ") else escape(line))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(text)).strip()


def escape(line):
    """Text outside of code in which nothing is taken for HTML."""
    return "".join(part if i % 2 else part.replace("<", "\\<") for i, part in enumerate(re.split(r"(`[^`]*`)", line)))


def describe_parser(parser, title):
    """A command's options as a table, and its sub-commands."""
    parser = parser.get_default("parser") or parser  # the one behind a parser that passes all on
    text, rows, commands = [parser.description], [], {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            commands = action.choices
        elif not isinstance(action, argparse._HelpAction):
            values = action.metavar or ("" if action.nargs == 0 else action.dest.upper())
            values = "|".join(map(str, action.choices)) if action.choices else values
            name = ", ".join(f"{option} {values}".strip() for option in action.option_strings) or values
            rows.append((name.replace("|", "\\|"), (action.help or "") % vars(action)))
    if rows:
        text.append("\n".join(["| option | |", "|---|---|", *(f"| `{name}` | {about} |" for name, about in rows)]))
    for name, command in commands.items():
        text += [f"## {title} {name}", *describe_parser(command, f"{title} {name}")]
    return text


if __name__ == "__main__":
    main()
