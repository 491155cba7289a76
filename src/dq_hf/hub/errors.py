"""What the Hub's errors mean: built-in ones that name repository, revision, file or right, and the remedy."""

import re
from contextlib import contextmanager
from urllib.parse import unquote, urlsplit

from huggingface_hub import constants, is_offline_mode
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
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


@contextmanager
def loading_from(source, revision=None, subfolder=None, offline=False):
    """Where a repository is loaded: an error says of which repository, revision, file or right it tells.

    Args:
        offline: only the cache was looked at, or the Hub did not answer, so that a missing file may be there.
    """
    revision, offline = revision or "main", offline or is_offline_mode()
    try:
        yield
    except Exception as error:
        found = hub_error(error)
        if found is None and offline and isinstance(error, FileNotFoundError):
            found = LocalEntryNotFoundError(str(error))
        if found is not None:
            raise describe(found, source, revision, offline) from error
        if isinstance(error, OSError):
            place = f", sub-folder {subfolder}" if subfolder else ""
            raise OSError(f"{source}, revision {revision!r}{place}: {error}") from error
        raise


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


def describe(error, source, revision, offline):
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
    if offline:
        remedy = "offline mode is on: unset HF_HUB_OFFLINE, or leave out local_files_only, to download it"
        return ConnectionError(f"{absent} ({error}); {remedy}")
    return ConnectionError(
        f"{absent} and could not be downloaded from {constants.ENDPOINT}: {error}; try again when the connection works"
    )
