"""What the Hub's errors mean: built-in ones that name repository, revision or right, and the remedy."""

from contextlib import contextmanager

from huggingface_hub import constants, is_offline_mode
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

LOGIN = "run `hf auth login`, set HF_TOKEN or give token="


@contextmanager
def plain_errors(failure, repository, offline=False):
    """Errors of the Hub's client as built-in ones: `failure`, the reason and, where known, the remedy.

    Args:
        offline: the caller asked for the cache alone; offline mode counts, too.
    """
    try:
        yield
    except (TypeError, LookupError, AttributeError, MemoryError):  # none of the Hub's
        raise
    except Exception as error:  # those of the connection have one class in huggingface_hub 1 and another in 2
        kind, reason = explain(error, f"{constants.ENDPOINT}/{repository}", offline or is_offline_mode())
        raise kind(f"{failure}: {reason}") from error


def explain(error, page, offline):
    """The built-in class and the reason, with its remedy, of an error of the Hub's client; `page` shows the repository."""
    chain = [error]
    while (inner := chain[-1].__cause__ or chain[-1].__context__) and inner not in chain:
        chain.append(inner)
    answer = next((link for link in chain if isinstance(link, (HfHubHTTPError, HFValidationError))), error)
    status = getattr(getattr(answer, "response", None), "status_code", None)
    if isinstance(answer, HFValidationError):
        return OSError, f'no repository can have this name; expected "user/name": {answer}'
    if isinstance(answer, GatedRepoError):
        return PermissionError, f"it is gated: ask for access at {page}, then {LOGIN}"
    if isinstance(answer, RepositoryNotFoundError):
        reason = f"there is no {page}, or it is private and the token is missing or has no right to it"
        return PermissionError if status == 401 else OSError, f"{reason}: check the name or {LOGIN}"
    if isinstance(answer, RevisionNotFoundError):
        return OSError, f"there is no such revision: see the branches at {page}"
    if status == 401:
        return PermissionError, f"the token is not valid; {LOGIN}"
    if status == 403:
        remedy = f"make one that may, at {constants.ENDPOINT}/settings/tokens, or choose another repository"
        return PermissionError, f"the token has no right to it; {remedy}"
    is_broken = isinstance(answer, (ConnectionError, TimeoutError, LocalEntryNotFoundError))
    if isinstance(answer, (OSError, ValueError)) and not is_broken:
        return OSError, str(answer)
    if offline:
        remedy = "offline mode is on: unset HF_HUB_OFFLINE, or leave out local_files_only, to download it"
        return ConnectionError, f"it is not whole in the cache ({error}); {remedy}"
    return ConnectionError, f"{error.__cause__ or error} ({constants.ENDPOINT}); try again when the connection works"
