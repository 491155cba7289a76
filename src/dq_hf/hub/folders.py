"""Files and folders: written whole or not at all, whatever stops it (an error, a signal, a power cut), and read with care."""

import hashlib
import json
import os
import shutil
from contextlib import contextmanager
from pathlib import Path

import yaml

STAGE = ".partial"  # where a model's new files wait until all are written
MAX_JSON = 2**26  # bytes: a million class names
MAX_DEPTH = 50  # of values in each other, in JSON and YAML


@contextmanager
def whole_file(path):
    """A path to write to, which becomes `path` at the end; after an error what was there before is still there."""
    path = Path(path).resolve()  # through a link
    name = hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]  # short: the file's own may be as long as can be
    partial = path.with_name(f".partial-{name}{path.suffix[:16]}")
    try:
        yield partial
        sync(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def whole_folder(folder):
    """An empty folder to write to, which becomes `folder` at the end, as by `put_in_place`."""
    partial = partial_of(folder)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    put_in_place(folder)


def partial_of(folder):
    """Where a folder is written: beside it, or beside what it links to."""
    folder = Path(folder).resolve()
    return folder.with_name(f"partial-{folder.name}")


def put_in_place(folder):
    """Give `partial_of(folder)` the name `folder`; what already has the name is deleted only then.

    Killed at any moment, also by a power cut, it leaves one of the two whole: the old one as `folder` or, beside it, as
    `replaced-<name>`, which `recover` renames.
    """
    partial, folder = partial_of(folder), Path(folder).resolve()
    replaced = folder.with_name(f"replaced-{folder.name}")
    sync(partial)
    if folder.exists():
        if replaced.exists():  # a whole one took its place before a crash
            shutil.rmtree(replaced)
        folder.rename(replaced)
    partial.rename(folder)
    sync(folder.parent, recursive=False)
    if replaced.exists():
        shutil.rmtree(replaced)


def check_place(path):
    """Raise `OSError` now, not after the work, if a file or folder could not be put in place as `path`."""
    place = Path(path).resolve()  # through a link
    if os.path.ismount(place):
        raise OSError(f"{path} is a mount point, which nothing can take the place of; give a name in it instead")
    parent = next(parent for parent in place.parents if parent.exists())
    if not (parent.is_dir() and os.access(parent, os.W_OK | os.X_OK)):
        raise OSError(f"{path} cannot be written, because {parent} is no folder that can be written")


def check_output_folder(folder, force=None, option="--force"):
    """Raise `FileExistsError` if this is a file or, unless forced, a folder that is not empty.

    Args:
        force: None: nothing can force it, so that the message names no option.
        option: that forces it.
    """
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"the output must be a folder, got the file {folder}; choose another name")
    if folder.exists() and any(folder.iterdir()) and not force:
        remedy = "choose another" if force is None else f"choose another or give {option}"
        raise FileExistsError(f"the output folder {folder} is not empty; {remedy}")


def recover(parent):
    """Finish, or take back, each `put_in_place` into this folder that was killed."""
    for replaced in parent.glob("replaced-*"):
        folder = parent / replaced.name.removeprefix("replaced-")
        if folder.exists():
            shutil.rmtree(replaced)
        else:
            replaced.rename(folder)


def sync(path, recursive=True):
    """Wait until a file, or a folder and all that is in it, is on the disk."""
    for part in [*(path.rglob("*") if recursive else ()), path]:
        descriptor = os.open(part, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def files_of(folder):
    """Relative paths of all files of a folder, in order."""
    return [path.relative_to(folder).as_posix() for path in sorted(Path(folder).rglob("*")) if path.is_file()]


def files_beside(folder, names):
    """Relative paths of the files of a folder that lie in its sub-folders of these files, or in itself."""
    places = sorted({Path(folder, name).parent for name in names})
    paths = [path for place in places if place.is_dir() for path in sorted(place.iterdir()) if path.is_file()]
    return [path.relative_to(folder).as_posix() for path in paths]


def check_links(folder, names, blobs=None):
    """Raise `OSError` if one of these files of a folder, or a folder above it, is a link that leaves the folder.

    Args:
        blobs: another folder that links may lead to.
    """
    places = [Path(folder).resolve()] + ([Path(blobs).resolve()] if blobs else [])
    for path in (Path(folder, name) for name in names):
        if not any(path.resolve().is_relative_to(place) for place in places):
            raise OSError(
                f"{path} is a link that leaves {folder}, to {path.resolve()}; put what it leads to in its place"
            )


def replace_files(stage, folder, stale):
    """Move all files of `stage` to where they replace those of `folder`, and delete the `stale` ones there.

    The files that a load begins with, those in JSON, go first and come last: in between there is no model.
    """
    names = sorted(files_of(stage), key=lambda name: (name.endswith(".json"), -name.count("/"), name))
    check_links(folder, [*names, *stale])
    for name in reversed(names):
        if name.endswith(".json"):
            (folder / name).unlink(missing_ok=True)
    for name in sorted(stale, key=lambda name: not name.endswith(".json")):
        (folder / name).unlink()
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(stage / name, folder / name)


def read_json_object(path):
    """The dictionary that a JSON file holds; `OSError` if it is damaged, too large or too deep, or holds something else."""
    path, remedy = Path(path), "save it again or, where it came from the Hub, load it with force_download=True"
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    if path.stat().st_size > MAX_JSON:
        raise OSError(f"{path} has {path.stat().st_size:,} bytes; at most {MAX_JSON:,} are read")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise OSError(f"{path} is damaged and no JSON file ({error}); {remedy}") from error
    if not isinstance(content, dict):
        raise OSError(f"{path} must hold a JSON object, got {type(content).__name__}; {remedy}")
    level = [content]
    for _ in range(MAX_DEPTH):
        level = [inner for node in level for inner in (node.values() if isinstance(node, dict) else node)]
        level = [node for node in level if isinstance(node, (dict, list))]
    if level:
        raise OSError(f"{path} is nested more than {MAX_DEPTH} deep; {remedy}")
    return content


def plain_yaml(text):
    """What a text in YAML of plain values holds; `ValueError` if it is none, or could take long to read."""
    try:
        return yaml.load(text, Loader=PlainLoader)
    except (yaml.YAMLError, LookupError) as error:  # LookupError: an empty number
        raise ValueError(str(error)) from error


class PlainLoader(yaml.SafeLoader):
    """Refuses aliases, which can stand for any number of values, and deep nesting, before it builds anything."""

    depth = 0

    def compose_node(self, parent, index):
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or self.depth == MAX_DEPTH:
            problem = f"more than {MAX_DEPTH} levels of nesting" if self.depth == MAX_DEPTH else "an alias"
            raise ValueError(f"line {event.start_mark.line + 1} has {problem}; write the values out")
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node
