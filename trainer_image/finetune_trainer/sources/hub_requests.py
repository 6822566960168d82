"""Runs requests to the Hugging Face Hub, for models and data sets alike, and turns errors of the hub's client library
into sentences for the user.

An unknown revision is an error in the spec and becomes UserError. All other errors, such as missing access to a gated
repository, become OutsideFailure, because they may be solved without a change of the spec.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from http import HTTPStatus
from pathlib import Path
from typing import TypeVar

from finetune_core.errors import UserError
from finetune_trainer.pod.errors import OutsideFailure, first_line, library_boundary
from finetune_trainer.pod.settings import HUB_SECONDS

PARALLEL_DOWNLOADS = 4
"""How many files of one repository or folder are downloaded at the same time."""
T = TypeVar("T")


def read_token(path: Path, field: str) -> str:
    """Return the access token of the hub in the file ``path``, which comes from the Secret that ``field`` names. Raises
    OutsideFailure if the content of the file can't be a token."""
    token = path.read_text(encoding="utf-8-sig", errors="replace").strip()
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        # The content of the file is left out of the message, because it may be most of a secret.
        raise OutsideFailure(f"{field}: the key of the Secret must hold a token, and holds no text or other characters")
    return token


def literal_pattern(path: str) -> str:
    """Return a glob pattern that matches only ``path``, with glob's special characters escaped. The hub's client takes
    the names of the files to download as patterns."""
    return re.sub(r"([*?\[])", r"[\1]", path)


def call_hub(request: Callable[[], T], *, field: str, repo: str, revision: str, has_token: bool) -> T:
    """Run ``request`` and return its result. ``field`` is the path of the source in the spec, for example
    `dataset.train.huggingFace`.

    Raises UserError for an unknown revision, and OutsideFailure for every other error of the hub or the network.
    """
    import httpx2
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    access = "the token gives no access to it" if has_token else f"no token is set ({field}.tokenSecretRef)"

    def failure(error: BaseException) -> Exception:
        if isinstance(error, RevisionNotFoundError):
            return UserError(f"{field}.revision", f"{repo} has no revision {revision!r}")
        if isinstance(error, GatedRepoError):
            return OutsideFailure(f"{field}: {repo} is gated and {access}")
        if isinstance(error, RepositoryNotFoundError):
            # The message names both causes, because the hub gives the same answer for a private repository and for a
            # missing one.
            return OutsideFailure(f"{field}: {repo} does not exist, or {access}")
        if isinstance(error, HfHubHTTPError | LocalEntryNotFoundError | httpx2.HTTPError | OSError):
            return OutsideFailure(f"{field}: {repo} can't be read: {first_line(error)}")
        reason = f"{type(error).__name__}: {first_line(error)}"
        return OutsideFailure(f"{field}: the hub's answer about {repo} can't be read ({reason})")

    # An answer that the client library does not expect can make it raise any exception.
    with library_boundary(failure):
        return request()


def read_hub_range(
    repo: str, name: str, revision: str, token: str | None, start: int, length: int, *, repo_type: str = "model"
) -> bytes:
    """Return ``length`` bytes of a file from offset ``start`` on, or fewer if the file ends before. The function raises
    what the hub's client library raises, so `call_hub` must run it."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils._headers import build_hf_headers
    from huggingface_hub.utils._http import get_session, hf_raise_for_status

    headers = build_hf_headers(token=token or False) | {"Range": f"bytes={start}-{start + length - 1}"}
    url = hf_hub_url(repo, name, revision=revision, repo_type=repo_type)
    found = bytearray()
    with get_session().stream("GET", url, headers=headers, timeout=HUB_SECONDS) as response:
        if response.is_error:
            response.read()
        hf_raise_for_status(response)
        if start and response.status_code != HTTPStatus.PARTIAL_CONTENT:
            raise OSError("the answer is not the range of bytes that was asked for")
        # A server that knows no ranges sends the whole file, which may not fit into memory.
        for piece in response.iter_bytes():
            found += piece
            if len(found) >= length:
                break
    return bytes(found[:length])
