"""Failures of the Hub's library as our errors: what happened, and what to do."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from exl2jax.errors import Exl2JaxError, HubError, StorageError

LOG_IN = "log in with `hf auth login` or set HF_TOKEN"


@contextmanager
def hub_faults(what: str, resume: str) -> Iterator[None]:
    """Turn whatever the library raises into one message about `what`; `resume` says how to go on after a break."""
    try:
        yield
    except Exl2JaxError:
        raise
    # The library raises errors of its own, of its HTTP client and of the system: a class each would name its parts.
    except Exception as e:
        raise _named(e, what, resume) from e


def _named(error: Exception, what: str, resume: str) -> Exl2JaxError:
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    chain = list(_chain(error))
    if any(isinstance(e, OSError) and e.errno == errno.ENOSPC for e in chain):
        return StorageError(f"{what}: the disk is full ({error}); free some space, then {resume}")
    if any(isinstance(e, GatedRepoError) for e in chain):
        return HubError(f"{what}: the repository is gated; ask for access on its page and {LOG_IN}")
    if any(isinstance(e, RepositoryNotFoundError) for e in chain):
        return HubError(f"{what}: there is no such repository, or it is private: check the name, or {LOG_IN}")
    if any(isinstance(e, RevisionNotFoundError) for e in chain):
        return HubError(f"{what}: the repository has no such revision; name a branch, a tag or a commit of it")
    if any(isinstance(e, HFValidationError) for e in chain):
        return HubError(f"{what}: this is no name of a repository ({error}); write USER/NAME")
    status = next((e.response.status_code for e in chain if isinstance(e, HfHubHTTPError)), None)
    if status in (401, 403):
        return HubError(f"{what}: the token has no right to do this; make one with write access, or {LOG_IN}")
    if any(isinstance(e, LocalEntryNotFoundError | OfflineModeIsEnabled) for e in chain):
        return HubError(f"{what}: not in the cache, and the Hub cannot be reached; connect to the network, {resume}")
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    return HubError(f"{what}: the Hub did not answer as expected ({reason}); {resume}")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
