"""Uploads of one commit, which replace a model's files on the Hub."""

from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token, is_offline_mode
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers.utils import logging

from .card import merge_with_owner
from .errors import plain_errors
from .folders import check_links, files_of
from .weights import stale_files

logger = logging.get_logger(__name__)

ATTEMPTS = 3  # at a repository that others change meanwhile


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
    with plain_errors(f"{repo_id} cannot be written", repo_id):
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

    The commit follows the state that was looked at: where another one comes between, it is made again from that one.

    Arguments and errors as in `PushMixin.push_to_hub`; keep_card=False replaces a card whoever wrote it.
    """
    folder, api = Path(folder), HfApi(token=token)
    names = files_of(folder) if files is None else files
    check_links(folder, names)
    with plain_errors(f"the upload to {repo_id} failed", repo_id):
        if revision is not None and not create_pr and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        for attempt in range(ATTEMPTS):
            commit = api.model_info(repo_id, revision=revision).sha
            contents = {name: folder / name for name in names}
            there = api.list_repo_files(repo_id, revision=commit)
            if keep_card and {"README.md"} <= contents.keys() & set(there):
                merge_cards(api, repo_id, commit, contents)
            try:
                return api.create_commit(
                    repo_id,
                    [CommitOperationAdd(name, content) for name, content in contents.items()]
                    + [CommitOperationDelete(name) for name in stale_files(there, contents)],
                    commit_message=commit_message,
                    commit_description=commit_description,
                    revision=revision,
                    create_pr=create_pr,
                    parent_commit=commit,
                )
            except HfHubHTTPError as error:  # somebody else's commit came first: look again
                if error.response.status_code not in (409, 412) or attempt == ATTEMPTS - 1:
                    raise


def merge_cards(api, repo_id, commit, contents):
    """Let a card that its owner wrote on the Hub stay: take the own one from the contents, or give it their header."""
    owners = Path(api.hf_hub_download(repo_id, "README.md", revision=commit)).read_text("utf-8", "replace")
    card = merge_with_owner(contents["README.md"].read_text("utf-8"), owners)
    if card is None:
        logger.warning(f"the card of {repo_id} stays as its owner wrote it; the model's own was not uploaded")
        del contents["README.md"]
    else:
        contents["README.md"] = card.encode()
