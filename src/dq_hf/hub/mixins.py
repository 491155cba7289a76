"""Mixins of models and image processors: atomic saving, pushing to the Hub and loading from it."""

import re
import shutil
import tempfile
from pathlib import Path

from safetensors import SafetensorError
from transformers.utils import IMAGE_PROCESSOR_NAME, logging

from .card import join_card, merge_with_owner, read_card, read_source_card, save_card, split_card
from .download import HUB_ARGUMENTS, SMALL_FILES, TOKENIZER_FILES, local_folder, repository_of
from .export_code import check_exportable, is_exported, write_code
from .folders import STAGE, files_beside, files_of, read_json_object, replace_files
from .upload import check_push, upload
from .weights import RESULTS_FILE, check_state_dict, load_strictly, place_named, stale_files, write_index

logger = logging.get_logger(__name__)

PUSH_ARGUMENTS = ("private", "token", "revision", "create_pr", "commit_message", "commit_description")
SAVE_ARGUMENTS = ("state_dict", "max_shard_size", "variant", "save_peft_format", "save_original_format", "export_code")
FIXED_ARGUMENTS = {  # the only value, and why
    "safe_serialization": (True, "weights are written as safetensors only: a pickle can run code when it is read"),
    "distributed_checkpoint": (False, "a model's files are written by one process"),
    "use_flashpack": (False, "weights are written as safetensors only"),
}


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
        tags=None,
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
            tags: for the card's header, besides its own and those of `add_model_tags`.
            save_arguments: of `save_pretrained`, such as max_shard_size.

        Raises:
            ValueError: no such name can be, or `private` was asked for a repository that is public.
            PermissionError: no token, or one that may not write there.
            ConnectionError: offline mode, no answer or a broken connection; the repository is then as it was.
            OSError: another refusal by the Hub.
        """
        save_arguments = usual_arguments(save_arguments)
        repo_id = check_push(repo_id, private, token, create_pr)
        commit_message = commit_message or f"Upload {type(self).__name__}"
        with tempfile.TemporaryDirectory() as folder:
            self.write_folder(Path(folder), title=repo_id, repository=repo_id, **save_arguments)
            add_tags(Path(folder, "README.md"), tags or ())
            options = {"token": token, "revision": revision, "create_pr": create_pr}
            return upload(folder, repo_id, commit_message, commit_description, **options)


class ProcessorHubMixin(PushMixin):
    """Stands before `BaseImageProcessor`."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """Load from a folder or a repository of the Hub; arguments and errors as for a model."""
        place = {name: kwargs.pop(name) for name in HUB_ARGUMENTS if name in kwargs}
        with local_folder(pretrained_model_name_or_path, [IMAGE_PROCESSOR_NAME], **place) as folder:
            return super().from_pretrained(folder, **kwargs)

    def save_pretrained(self, save_directory, push_to_hub=False, **arguments):
        """Save its file as in transformers, whose arguments of a model's weights are accepted."""
        push_arguments = {name: arguments.pop(name) for name in ("repo_id", *PUSH_ARGUMENTS) if name in arguments}
        usual_arguments(arguments)
        super().save_pretrained(save_directory)
        if push_to_hub:
            self.push_to_hub(push_arguments.pop("repo_id", Path(save_directory).absolute().name), **push_arguments)

    def write_folder(self, folder, title=None, repository=None, **arguments):
        """Write its file; a processor has no card."""
        super().save_pretrained(folder)

    @classmethod
    def get_image_processor_dict(cls, pretrained_model_name_or_path, **kwargs):
        """As in transformers, but a damaged file is an `OSError` that names it."""
        file = Path(str(pretrained_model_name_or_path), kwargs.get("subfolder") or "", "preprocessor_config.json")
        if file.is_file():
            read_json_object(file)
        content, kwargs = super().get_image_processor_dict(pretrained_model_name_or_path, **kwargs)
        with place_named(file if file.is_file() else pretrained_model_name_or_path):
            cls(**content)
        return content, kwargs


class HubMixin(PushMixin):
    """Stands first among the bases of a model: saves it with its card, whole or not at all, and loads it strictly.

    A model of several parts lists their sub-folders in `part_folders`, has those that are there as `parts`, and its next
    base loads and saves them.
    """

    source_card = None
    part_folders = ()

    @property
    def parts(self):
        """{sub-folder: model} of the models in a saved folder."""
        return {"": self}

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, output_loading_info=False, **kwargs):
        """Load a folder or a repository of the Hub, strictly, and from safetensors unless `use_safetensors=False`.

        Raises:
            PermissionError: the repository wants a token, or another one.
            ConnectionError: the Hub does not answer, and the files are not in the cache.
            OSError: no such folder, repository, revision or file, a damaged file, or weights only as a pickle.
            TypeError, ValueError: a configuration with a typo or that is impossible, or weights that are missing, left
                over, of another shape or kind or not finite; the message names file and fields or keys.
        """
        source = pretrained_model_name_or_path
        if source is None and not cls.part_folders:  # as in transformers, from `config` and `state_dict`
            return super().from_pretrained(None, *args, output_loading_info=output_loading_info, **kwargs)
        place = {name: kwargs.pop(name) for name in HUB_ARGUMENTS if name in kwargs}
        with local_folder(source, cls.files(kwargs.get("variant"), kwargs.get("use_safetensors")), **place) as folder:
            if cls.part_folders:
                model, info = super().from_pretrained(folder, *args, output_loading_info=True, **kwargs)
            else:
                model, info = load_model(cls, super().from_pretrained, folder, *args, **kwargs)
            if name := repository_of(folder):
                model.name_or_path = model.config.name_or_path = name
        return (model, info) if output_loading_info else model

    @classmethod
    def files(cls, variant=None, use_safetensors=None):
        """Patterns of what `from_pretrained` reads, for `local_folder`."""
        infix = f".{variant}" if variant else ""
        names = ["config.json", f"model{infix}.safetensors", f"model{infix}-*-of-*.safetensors"]
        names += [f"model.safetensors.index{infix}.json"]
        names += ["pytorch_model*.bin*"] if use_safetensors is False else []
        parts = [f"{part}/{name}" for part in cls.part_folders for name in names]
        return (["config.json", *parts, *TOKENIZER_FILES] if parts else names) + list(SMALL_FILES)

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
                save_function and safe_serialization=True, which change nothing: the files are always safetensors;
                export_code=True writes the model's code too: `AutoModel.from_pretrained(folder, trust_remote_code=True)`
                then needs no dq_hf, and with dq_hf no trust. Default: False, unless the class came from such code.

        Raises:
            OSError: the directory is a file, or cannot be written; with `push_to_hub` also what that raises.
            TypeError: unknown arguments, or those of `push_to_hub` without it.
            ValueError: a state_dict with other keys than the model's, another format than safetensors, or export_code=True of
                a class of one's own.
        """
        push = {name: arguments.pop(name) for name in PUSH_ARGUMENTS if name in arguments}
        given = sorted(name for name, value in {**push, "repo_id": repo_id}.items() if value)
        if given and not push_to_hub:
            raise TypeError(f"argument(s) for the Hub without push_to_hub=True: {', '.join(given)}")
        arguments = usual_arguments(arguments)
        if arguments.get("state_dict") is not None:
            check_state_dict(self, arguments["state_dict"])
        folder = Path(save_directory)
        name = repo_id or folder.absolute().name
        if not is_main_process:
            arguments.pop("export_code", None)
            super().save_pretrained(folder, is_main_process=False, **arguments)
            return None
        if not push_to_hub:
            replace_folder(self, folder, name, **arguments)
            return None
        private, message = push.pop("private", None), push.pop("commit_message", None)
        repo_id = check_push(name, private, push.get("token"), push.get("create_pr", False))
        written = replace_folder(self, folder, repo_id, repository=repo_id, **arguments)
        return upload(folder, repo_id, message or f"Upload {type(self).__name__}", files=written, **push)

    def write_folder(self, folder, title, repository=None, export_code=None, **arguments):
        """Write all that a saved folder holds into an empty one."""
        if export_code:
            check_exportable(type(self))
        try:
            super().save_pretrained(folder, **arguments)
        except SafetensorError as error:  # such as a full disk
            raise OSError(f"the weights cannot be written to {folder}: {error}") from error
        if self.part_folders and re.fullmatch(r"checkpoint-\d+", title):  # as `Trainer` names them
            write_index(folder)
        if is_exported(type(self)) if export_code is None else export_code:
            write_code(folder, {"": self} | self.parts)
        if (folder / "config.json").is_file():  # else these are an adapter's weights
            save_card(folder, self.config, self.parts, title, repository)
            add_tags(folder / "README.md", getattr(self, "model_tags", None) or ())


def replace_folder(model, folder, title, **arguments):
    """Write all that a saved folder holds beside what is there, then in its place; the names of the files."""
    is_new, stage = not folder.exists(), folder / STAGE
    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(stage, ignore_errors=True)  # what a killed process left
    try:
        model.write_folder(stage, title, **arguments)
        keep_owners_card(stage, folder)
        written = files_of(stage)
        there = files_beside(folder, [*written, RESULTS_FILE])
        replace_files(stage, folder, stale_files(there, written))
        return written
    except Exception:
        if is_new:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def load_model(model_class, load, folder, *args, **kwargs):
    """As `load_strictly`; the model, which may be one of transformers itself, keeps the card that it came with."""
    model, info = load_strictly(model_class, load, folder, *args, **kwargs)
    model.source_card = read_source_card(model, folder)
    return model, info


def keep_owners_card(stage, folder):
    """Let a card that its owner wrote stay in a folder that the files of `stage` are about to go to."""
    new, old = stage / "README.md", read_card(folder)
    if new.is_file() and old is not None:
        merged = merge_with_owner(new.read_text("utf-8"), old)
        if merged is None:
            logger.warning(f"{folder / 'README.md'} stays as its owner wrote it; the model's own card was not written")
            new.unlink()
        else:
            new.write_text(merged, "utf-8")


def add_tags(card, tags):
    """Add tags to the header of a card, if there is one."""
    if tags and card.is_file():
        header, body = split_card(card.read_text("utf-8"))
        header["tags"] = list(dict.fromkeys([*(header.get("tags") or ()), *tags]))
        card.write_text(join_card(header, body), "utf-8")


def usual_arguments(arguments):
    """Those of the arguments of `save_pretrained`, as transformers and diffusers have them, that change what is saved.

    Raises:
        TypeError: unknown arguments.
        ValueError: a format that is not written.
    """
    arguments = {name: value for name, value in arguments.items() if name != "save_function" and value is not None}
    for name, (only, reason) in FIXED_ARGUMENTS.items():
        if (got := arguments.pop(name, only)) != only:
            raise ValueError(f"{name} must be {only}, got {got}: {reason}")
    if unknown := sorted(set(arguments) - set(SAVE_ARGUMENTS)):
        raise TypeError(f"unknown argument(s) {', '.join(unknown)}; there are {', '.join(SAVE_ARGUMENTS)}")
    return arguments
