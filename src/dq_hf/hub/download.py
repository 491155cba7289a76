"""A repository's files as a local folder: all of one commit, fetched into the cache at once."""

from contextlib import contextmanager
from functools import partial
from pathlib import Path

from huggingface_hub import is_offline_mode, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError

from .card_text import PICTURES
from .errors import plain_errors
from .folders import check_links, read_json_object

HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
SMALL_FILES = ("README.md", "model_index.json", "preprocessor_config.json", *PICTURES)
TOKENIZER_FILES = ("tokenizer/*.json", "tokenizer/*.txt", "tokenizer/*.model")  # of a text encoder
MODEL_FOLDERS = {"vae", "transformer", "text_encoder", "tokenizer"}
MODEL_SUFFIXES = {".json", ".safetensors", ".md", ".png", ".bin"}


@contextmanager
def local_folder(source, patterns, *, subfolder=None, **hub_arguments):
    """Yield the local folder `source`, or one in the cache with a repository's files, with its sub-folder if one is given.

    Args:
        patterns: names of the files to fetch, in which * stands for anything; the first must be there.
        subfolder, hub_arguments: `HUB_ARGUMENTS`, as in transformers.

    Raises:
        OSError: a link that leaves the folder, or no such repository, revision, file, right or connection, also where
            that is noticed inside the `with` block.
    """
    subfolder = "/".join(Path(subfolder or "").parts)
    if Path(str(source)).is_dir():
        check_model_links(Path(source, subfolder))
        refuse_run_folder(source, f"{subfolder}/{patterns[0]}".removeprefix("/"))
        with nesting_named(Path(source, subfolder)):
            yield Path(source, subfolder)
        return
    allowed = [f"{subfolder}/{pattern}".removeprefix("/") for pattern in patterns]
    if subfolder and "README.md" in patterns:  # the card of a part is that of the whole
        above = subfolder.rpartition("/")[0]
        allowed += [f"{above}/{name}".removeprefix("/") for name in SMALL_FILES]
    revision, incomplete = hub_arguments.get("revision") or "main", None
    offline = hub_arguments.get("local_files_only") or is_offline_mode()
    failure = f"{source} is no local folder, and as a repository (revision {revision!r}) it cannot be loaded"
    told = partial(plain_errors, failure, source, offline)
    with told():
        try:
            root = snapshot_download(str(source), allow_patterns=allowed, **hub_arguments)
        except LocalEntryNotFoundError as error:  # what is in the cache may be enough
            root, incomplete = getattr(error, "snapshot_path", None), error
            if root is None:
                raise
    folder = Path(root, subfolder)
    try:
        if not (folder / patterns[0]).is_file():
            raise FileNotFoundError(f"there is no file {allowed[0]}")
        check_model_links(folder)
        with nesting_named(folder):
            yield folder
    except OSError as error:
        if isinstance(error, FileNotFoundError) and (incomplete or offline):  # it may be in the repository
            reason = incomplete or LocalEntryNotFoundError(str(error))
            with told():
                raise reason from reason.__cause__
        raise OSError(f"{source}, revision {revision!r}: {error}") from error


def model_type_of(source, revision=None):
    """The `model_type` of what a folder or repository holds, and the commit looked at (None: a folder)."""
    with local_folder(source, ["config.json"], revision=revision) as folder:
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"{source} has no config.json; give the folder of a saved model, or a Hub id")
        kind = read_json_object(folder / "config.json").get("model_type")
    return kind, None if Path(source).is_dir() else folder.name


def refuse_run_folder(folder, name):
    """Raise `FileNotFoundError` at a training run's folder that is given instead of the model in it, which has this file."""
    model = Path(folder, "model")
    if not Path(folder, name).is_file() and (model / name).is_file():
        raise FileNotFoundError(f"{folder} has no {name}: it is the folder of a training run; give its model, {model}")


@contextmanager
def nesting_named(folder):
    """A `RecursionError` becomes an `OSError` that names the JSON file in which values lie too deep in each other."""
    try:
        yield
    except RecursionError:
        for path in sorted([*folder.glob("*.json"), *folder.glob("*/*.json")]):
            read_json_object(path)  # or an error
        raise


def repository_of(folder):
    """ "user/name" of a folder in the Hub's cache, else None."""
    cache = cache_of(folder)
    return cache and cache.name.removeprefix("models--").replace("--", "/", 1)


def cache_of(folder):
    """What the Hub's cache holds of the repository to which a folder belongs, else None."""
    folder = Path(folder).absolute()
    for place in (folder, *folder.parents):
        if place.parent.name == "snapshots" and place.parent.parent.name.startswith("models--"):
            return place.parent.parent
    return None


def check_model_links(folder):
    """Raise `OSError` at a link that leaves a model's folder, but for those of the Hub's cache."""
    paths = folder.iterdir() if folder.is_dir() else ()
    names = [path.name for path in paths if path.suffix in MODEL_SUFFIXES or path.name in MODEL_FOLDERS]
    cache = cache_of(folder)
    check_links(folder, names, cache and cache / "blobs")
