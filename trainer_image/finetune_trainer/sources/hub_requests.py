"""Runs requests to the Hugging Face Hub, for models and data sets alike, and turns errors of the hub's client library
into sentences for the user.

An unknown revision is an error in the spec and becomes UserError. All other errors become OutsideFailure, because they
may be solved without a change of the spec, such as missing access to a gated repository.
"""

from __future__ import annotations

from collections.abc import Callable
from http import HTTPStatus
from typing import TypeVar

from finetune_core.errors import UserError
from finetune_trainer.pod.errors import OutsideFailure, first_line
from finetune_trainer.pod.settings import HUB_SECONDS

PARALLEL_DOWNLOADS = 4
"""How many files of one repository or folder are downloaded at the same time."""
T = TypeVar("T")


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
    try:
        return request()
    except RevisionNotFoundError as error:
        raise UserError(f"{field}.revision", f"{repo} has no revision {revision!r}") from error
    except GatedRepoError as error:
        raise OutsideFailure(f"{field}: {repo} is gated and {access}") from error
    except RepositoryNotFoundError as error:
        # The message names both causes, because the hub gives the same answer for a private repository and for a
        # missing one.
        raise OutsideFailure(f"{field}: {repo} does not exist, or {access}") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, httpx2.HTTPError, OSError) as error:
        raise OutsideFailure(f"{field}: {repo} can't be read: {first_line(error)}") from error
    except (UserError, OutsideFailure, MemoryError):
        raise
    except Exception as error:
        # The client library raises whatever an answer that it does not expect makes its code raise.
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise OutsideFailure(f"{field}: the hub's answer about {repo} can't be read ({reason})") from error


def read_hub_range(
    repo: str, name: str, revision: str, token: str | None, start: int, length: int, *, repo_type: str = "model"
) -> bytes:
    """Return ``length`` bytes of a file from offset ``start`` on, or fewer if the file ends before. It raises what the
    hub's client library raises, so it must be called by `call_hub`."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils._headers import build_hf_headers
    from huggingface_hub.utils._http import get_session, hf_raise_for_status

    headers = build_hf_headers(token=token or False) | {"Range": f"bytes={start}-{start + length - 1}"}
    url = hf_hub_url(repo, name, revision=revision, repo_type=repo_type)
    response = get_session().get(url, headers=headers, timeout=HUB_SECONDS)
    hf_raise_for_status(response)
    if start and response.status_code != HTTPStatus.PARTIAL_CONTENT:
        raise OSError("the answer is not the range of bytes that was asked for")
    return bytes(response.content[:length])
