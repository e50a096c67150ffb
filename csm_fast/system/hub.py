"""Files of the Hugging Face hub: what its cache holds, whether it answers, downloads and how they fail.

``huggingface_hub`` is imported on first use, because importing it takes long.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


class HubError(Exception):
    """A request that the hub did not fulfil.

    Attributes:
        kind: "gated" (access not granted), "repository" (none of this name, or a private one), "file" (not in the
            repository), or "other" (network errors, whose classes differ between the client's releases).
        reason: of the client, in its own words.
    """

    def __init__(self, kind: Literal["gated", "repository", "file", "other"], error: Exception):
        self.kind, self.reason = kind, str(error)
        self.error_type = type(error).__name__
        super().__init__(self.reason)


def is_hub_id(name: str) -> bool:
    """Whether ``name`` has the form owner/name."""
    return _ID.fullmatch(name) is not None


def cached_file(repository: str, filename: str) -> Path | None:
    """A repository's file in the local cache; None where it is not there."""
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(repository, filename)
    return Path(path) if isinstance(path, str) else None


def is_offline() -> bool:
    """Whether the user forbids all requests (HF_HUB_OFFLINE)."""
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE


def endpoint() -> str:
    """The hub's address."""
    from huggingface_hub import constants

    return constants.ENDPOINT


def hub_answers(seconds: float) -> bool:
    """Whether the hub answers one request in time; any status is an answer.

    ``hf_hub_download`` retries for 20 s and more before it gives up on a dead network. The request runs in a thread,
    because looking up a name obeys no timeout.
    """
    from huggingface_hub.utils import get_session

    if is_offline():
        return False
    answers: list[bool] = []

    def ask() -> None:
        try:
            get_session().head(endpoint(), timeout=seconds)
            answers.append(True)
        except Exception:
            answers.append(False)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return answers == [True]


def download_file(repository: str, filename: str, **options: Any) -> Path:
    """A repository's file, from the cache where it is up to date. ``options``: of ``hf_hub_download``.

    Raises:
        HubError: it cannot be had.
    """
    from huggingface_hub import hf_hub_download

    with _hub_errors():
        return Path(hf_hub_download(repository, filename, **options))


def list_files(repository: str, seconds: float) -> tuple[set[str], str]:
    """(names of a repository's files, the commit they belong to).

    Raises:
        HubError: no such repository, no access to it, or no answer within ``seconds``.
    """
    from huggingface_hub import HfApi

    with _hub_errors():
        info = HfApi().model_info(repository, timeout=seconds)
        return {sibling.rfilename for sibling in info.siblings or ()}, str(info.sha)


@contextmanager
def _hub_errors() -> Iterator[None]:
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise HubError("gated", error) from None
    except errors.RepositoryNotFoundError as error:
        raise HubError("repository", error) from None
    except errors.EntryNotFoundError as error:
        raise HubError("file", error) from None
    except Exception as error:
        raise HubError("other", error) from None
