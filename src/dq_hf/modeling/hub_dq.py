"""To the Hub and back: saving that is whole or not there, uploads of one commit, and errors that say what is missing."""

import os
import re
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote, urlsplit

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    constants,
    get_token,
    hf_hub_download,
    is_offline_mode,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError
from transformers.utils import logging

from .model_card_dq import find_file, merge_with_owner, read_source_card, save_card
from .remote_code_dq import IN_PACKAGE, auto_classes, write_code

logger = logging.get_logger(__name__)

HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
PUSH_ARGUMENTS = ("private", "token", "revision", "create_pr", "commit_message", "commit_description")
SAVE_ARGUMENTS = ("state_dict", "max_shard_size", "variant", "save_peft_format", "save_original_format", "export_code")
STAGE = ".partial"  # where a folder's new files wait until all are written


class PushMixin:
    """Gives `push_to_hub`: what `save_pretrained` saves, in one commit."""

    def push_to_hub(
        self,
        repo_id,
        *,
        private=None,
        token=None,
        revision=None,
        create_pr=False,
        commit_message=None,
        commit_description=None,
        **save_arguments,
    ):
        """Upload to a repository, which is created if it is not there, and return the `CommitInfo`.

        Weights of an earlier upload that these replace (as shards, or in one piece) are deleted. A card that its owner
        wrote or edited there stays.

        Args:
            repo_id: "user/name", or "name" for one's own.
            private: for a new repository; None is the Hub's default for its owner.
            token: instead of the one that `hf auth login` or HF_TOKEN left.
            revision: branch, created if it is not there. Default: main.
            create_pr: open a pull request instead.
            commit_message, commit_description: of the commit.
            save_arguments: of `save_pretrained`, such as max_shard_size.

        Raises:
            ValueError: no such name can be, or `private` was asked for a repository that is public.
            PermissionError: no token, or one that may not write there.
            ConnectionError: offline mode, no answer or a broken connection; the repository is then as it was.
            OSError: another refusal by the Hub.
        """
        check_arguments(save_arguments)
        repo_id = check_push(repo_id, private, token, create_pr)
        commit_message = commit_message or f"Upload {type(self).__name__}"
        with tempfile.TemporaryDirectory() as folder:
            self.write_folder(Path(folder), title=repo_id, repository=repo_id, **save_arguments)
            options = {"token": token, "revision": revision, "create_pr": create_pr}
            return upload(folder, repo_id, commit_message, commit_description, **options)


class HubMixin(PushMixin):
    """Stands first among the bases of a model: saves it with its card, whole or not at all, and pushes and pulls it."""

    source_card = None

    @property
    def card_parts(self):
        """{sub-folder: model} of the models in a saved folder."""
        return {"": self}

    @property
    def code_classes(self):
        """{JSON file of a saved folder: {Auto class's name: class}}, for exported code."""
        return {"config.json": auto_classes(type(self))}

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, output_loading_info=False, **kwargs):
        """Load a folder or a repository of the Hub, with the card that it has.

        Raises:
            PermissionError: the repository wants a token, or another one.
            ConnectionError: the Hub does not answer, and the files are not in the cache.
            OSError, ValueError: the repository, its revision or a file does not exist, or as for a folder.
        """
        place = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
        with loading_from(pretrained_model_name_or_path, **place):
            kwargs["revision"] = place["revision"] = pin_revision(pretrained_model_name_or_path, **place)
            model, info = super().from_pretrained(
                pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
            )
            model.source_card = read_source_card(model, pretrained_model_name_or_path, **place)
        return (model, info) if output_loading_info else model

    def save_pretrained(self, save_directory, *, is_main_process=True, push_to_hub=False, repo_id=None, **arguments):
        """Save weights, configuration and model card.

        The new files replace the old ones when all are written; a save that is cut short leaves the old model or a folder
        that cannot be loaded, never a mixture. A card that its owner wrote or edited stays.

        Args:
            save_directory: the folder, created if it is not there.
            is_main_process: False writes nothing.
            push_to_hub: upload the folder's new files too, to `repo_id` (default: the folder's name), with the arguments
                of `push_to_hub`.
            arguments: state_dict, max_shard_size, variant, save_peft_format, save_original_format as in transformers;
                export_code=True writes the model's code too: `AutoModel.from_pretrained(folder, trust_remote_code=True)`
                then needs no dq_hf, and with dq_hf no trust. Default: False, unless the class came from such code.

        Raises:
            OSError: the directory is a file, or cannot be written; with `push_to_hub` also what that raises.
            TypeError: unknown arguments, or those of `push_to_hub` without it.
            ValueError: a state_dict with other keys than the model's.
        """
        push_arguments = {name: arguments.pop(name) for name in PUSH_ARGUMENTS if name in arguments}
        if not push_to_hub and (push_arguments or repo_id is not None):
            names = sorted(push_arguments) + ["repo_id"] * (repo_id is not None)
            raise TypeError(f"argument(s) for the Hub without push_to_hub=True: {', '.join(names)}")
        check_arguments(arguments)
        if arguments.get("state_dict") is not None:
            check_state_dict(self, arguments["state_dict"])
        folder = Path(save_directory)
        if not is_main_process:
            arguments.pop("export_code", None)
            self.write_files(folder, is_main_process=False, **arguments)
            return None
        if push_to_hub:
            target = {name: push_arguments.pop(name, None) for name in ("private", "token")}
            create_pr = push_arguments.get("create_pr", False)
            repo_id = check_push(repo_id or folder.absolute().name, **target, create_pr=create_pr)
        is_new = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        stage = folder / STAGE
        shutil.rmtree(stage, ignore_errors=True)  # what a killed process left
        try:
            self.write_folder(stage, title=repo_id or folder.absolute().name, repository=repo_id, **arguments)
            written = move_files(stage, folder)
        except Exception:
            if is_new:
                shutil.rmtree(folder, ignore_errors=True)
            raise
        finally:
            shutil.rmtree(stage, ignore_errors=True)
        if not push_to_hub:
            return None
        message = push_arguments.pop("commit_message", None) or f"Upload {type(self).__name__}"
        return upload(folder, repo_id, message, files=written, token=target["token"], **push_arguments)

    def write_folder(self, folder, title, repository=None, export_code=not IN_PACKAGE, **arguments):
        """Write all that a saved folder holds into an empty one."""
        self.write_files(folder, **arguments)
        if export_code:
            write_code(folder, self.code_classes)
        if (folder / "config.json").is_file():  # else these are an adapter's weights
            save_card(folder, self.config, self.card_parts, title, repository)

    def write_files(self, folder, **arguments):
        """Write the files but the card."""
        try:
            super().save_pretrained(folder, **arguments)
        except SafetensorError as error:  # such as a full disk
            raise OSError(f"the weights cannot be written to {folder}: {error}") from error


def check_arguments(arguments):
    """Raise `TypeError` at arguments that `save_pretrained` does not have."""
    if unknown := sorted(set(arguments) - set(SAVE_ARGUMENTS)):
        raise TypeError(f"unknown argument(s) {', '.join(unknown)}; there are {', '.join(SAVE_ARGUMENTS)}")


def check_state_dict(model, state_dict):
    """Raise `ValueError` if these are not the weights of the model, by their names."""
    if different := sorted(set(model.state_dict()) ^ set(state_dict)):
        shown = ", ".join(different[:8])
        raise ValueError(f"state_dict must have the model's keys; {len(different)} are missing or left over: {shown}")


# Folders


def move_files(stage, folder):
    """Move all files from one folder to the other, where they replace what was there; give their names.

    The files that a load begins with, those in JSON, go first and come last: in between there is no model.
    """
    names = files_of(stage)
    if "README.md" in names and (folder / "README.md").is_file():
        merged = merge_with_owner((stage / "README.md").read_text("utf-8"), (folder / "README.md").read_text("utf-8"))
        if merged is None:
            logger.warning(f"{folder / 'README.md'} stays as its owner wrote it; the model's own card was not written")
            (stage / "README.md").unlink()
        else:
            (stage / "README.md").write_text(merged, "utf-8")
    names.sort(key=lambda name: (name.endswith(".json"), -name.count("/"), name))
    stale = stale_weights(files_of(folder), names)
    for name in reversed(names):
        if name.endswith(".json"):
            (folder / name).unlink(missing_ok=True)
    for name in sorted(stale, key=lambda name: not name.endswith(".json")):
        (folder / name).unlink()
    for name in names:
        if (stage / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(stage / name, folder / name)
    return names


def files_of(folder):
    """Relative paths of all files of a folder but those in `STAGE`."""
    paths = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    names = [path.relative_to(folder).as_posix() for path in paths]
    return [name for name in names if not name.startswith(f"{STAGE}/")]


def stale_weights(names, written):
    """Those of these files that hold, or list, weights of the models whose weights were written anew elsewhere."""
    models = {weights_of(name) for name in written} - {None}
    return [name for name in names if weights_of(name) in models and name not in written]


def weights_of(name):
    """Folder and variant of a file of weights, whole or a shard, or of a list of shards; None for another file."""
    match = re.fullmatch(
        r"((?:.*/)?)model(?:\.(?!safetensors)(.+?))?(?:-\d{5}-of-\d{5})?\.safetensors", name
    ) or re.fullmatch(r"((?:.*/)?)model\.safetensors\.index(?:\.(.+))?\.json", name)
    return match and match.groups()


# To the Hub


def check_push(repo_id, private=None, token=None, create_pr=False):
    """Make sure that a repository can be written, and return its whole name; arguments and errors as in `push_to_hub`.

    It is created if it is not there. One process does this for all.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f'the repository must be "user/name" or "name", got {repo_id!r}: {error}') from error
    if is_offline_mode():
        raise ConnectionError(f"{repo_id} cannot be uploaded in offline mode; unset HF_HUB_OFFLINE, or do not push")
    token = get_token() if token in (None, True) else token
    if not token:
        raise PermissionError(f"{repo_id} cannot be uploaded without a token; run `hf auth login` or set HF_TOKEN")
    api = HfApi(token=token)
    with plain_errors(f"{repo_id} cannot be written"):
        if "/" not in repo_id:
            repo_id = f"{api.whoami()['name']}/{repo_id}"
        if create_pr:  # may be opened without the right to write
            return repo_id
        api.create_repo(repo_id, private=private, exist_ok=True)
        api.auth_check(repo_id, write=True)  # creating says nothing about it when the repository is there
        public = private and not api.model_info(repo_id).private
    if public:
        raise ValueError(
            f"{repo_id} was to be private, but it exists and is public; change that on the Hub, or its name"
        )
    return repo_id


def upload(
    folder,
    repo_id,
    commit_message,
    commit_description=None,
    *,
    files=None,
    token=None,
    revision=None,
    create_pr=False,
    keep_card=True,
):
    """Upload files of a folder (default: all) in one commit, which also deletes the weights that they replace.

    Arguments and errors as in `PushMixin.push_to_hub`; keep_card=False replaces a card whoever wrote it.
    """
    folder, api = Path(folder), HfApi(token=token)
    contents = {name: folder / name for name in (files_of(folder) if files is None else files)}
    with plain_errors(f"the upload to {repo_id} failed"):
        if revision is not None and not create_pr and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        stale = stale_weights(api.list_repo_files(repo_id, revision=revision), contents)
        if keep_card and "README.md" in contents:
            owners = find_file(repo_id, "README.md", revision=revision, token=token)
            card = contents["README.md"].read_text("utf-8")
            card = card if owners is None else merge_with_owner(card, owners.read_text("utf-8"))
            if card is None:
                logger.warning(f"the card of {repo_id} stays as its owner wrote it; the model's own was not uploaded")
                del contents["README.md"]
            else:
                contents["README.md"] = card.encode()
        return api.create_commit(
            repo_id,
            [CommitOperationAdd(name, content) for name, content in contents.items()]
            + [CommitOperationDelete(name) for name in stale],
            commit_message=commit_message,
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
        )


@contextmanager
def plain_errors(failure):
    """Errors of the Hub's client as built-in ones: `failure`, the reason and, where known, the remedy."""
    try:
        yield
    except Exception as error:  # those of the connection have one class in huggingface_hub 1 and another in 2
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status == 401:
            raise PermissionError(f"{failure}: the token is not valid; run `hf auth login` or set HF_TOKEN") from error
        if status == 403:
            remedy = f"make one that may, at {constants.ENDPOINT}/settings/tokens, or choose another repository"
            raise PermissionError(f"{failure}: the token has no right to it; {remedy}") from error
        if status is not None or isinstance(error, ValueError):
            raise OSError(f"{failure}: {error}") from error
        cause = error.__cause__ or error  # the uploading of a large file wraps it
        raise ConnectionError(
            f"{failure}: {cause} ({constants.ENDPOINT}); try again when the connection works"
        ) from error


# From the Hub


@contextmanager
def loading_from(source, revision=None, subfolder=None, **hub_arguments):
    """Where a folder or repository is loaded: an error says of which repository, revision, file or right it tells."""
    try:
        yield
    except Exception as error:
        if Path(str(source)).is_dir():
            raise
        revision, place = revision or "main", f", sub-folder {subfolder}" if subfolder else ""
        if (found := hub_error(error)) is not None:
            raise describe(found, source, revision) from error
        if isinstance(error, OSError):
            raise OSError(f"{source}, revision {revision!r}{place}: {error}") from error
        raise


def pin_revision(source, revision=None, subfolder=None, *, file="config.json", **hub_arguments):
    """The commit that a repository's revision is now, so that all files are of one; for a folder `revision` itself.

    It is found by a file that must be there.
    """
    if Path(str(source)).is_dir():
        return revision
    path = hf_hub_download(str(source), file, subfolder=subfolder, revision=revision, **hub_arguments)
    depth = len(Path(subfolder or "", file).parts)
    return Path(path).parents[depth - 1].name  # .../snapshots/commit/sub-folder/file


def hub_error(error):
    """The error of the Hub's client, or of its connection, behind this one; None if it has another reason."""
    chain = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    answered = [error for error in chain if isinstance(error, (HfHubHTTPError, HFValidationError))]
    broken = [
        error
        for error in chain
        if isinstance(error, LocalEntryNotFoundError) or type(error).__module__.startswith("httpx")
    ]
    return next(iter(answered + broken), None)


def describe(error, source, revision):
    """A built-in error that names repository, revision, file or rights."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    login = "run `hf auth login`, set HF_TOKEN or give token="
    if isinstance(error, HFValidationError):
        return OSError(
            f'{source} is no local folder, and no repository can have this name; expected "user/name": {error}'
        )
    if isinstance(error, GatedRepoError):
        return PermissionError(f"{source} is gated: ask for access at {constants.ENDPOINT}/{source}, then {login}")
    if isinstance(error, RepositoryNotFoundError):
        if status == 401:
            return PermissionError(
                f"{source} is no local folder, and no repository that can be seen without a valid token: "
                f"check its name or, if it is private, {login}"
            )
        return OSError(
            f"{source} is no local folder, and there is no such repository at {constants.ENDPOINT}, or it is private "
            f"and the token has no right to it: check its name or {login}"
        )
    if isinstance(error, RevisionNotFoundError):
        return OSError(f"{source} has no revision {revision!r}: see its branches at {constants.ENDPOINT}/{source}")
    if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
        path = re.sub(r".*/resolve/[^/]+/", "", unquote(urlsplit(str(error.response.url)).path))
        return OSError(f"{source} has no file {path} at revision {revision!r}")
    if status in (401, 403):
        return PermissionError(f"{source} cannot be read: the token is not valid or has no right to it; {login}")
    if status is not None:
        return OSError(f"{source} cannot be read: {error}")
    absent = f"{source} is no local folder, and as a repository (revision {revision!r}) it is not whole in the cache"
    if is_offline_mode():
        return ConnectionError(f"{absent}; offline mode is on: unset HF_HUB_OFFLINE to download it")
    return ConnectionError(
        f"{absent} and could not be downloaded from {constants.ENDPOINT}: {error}; try again when the connection works"
    )
