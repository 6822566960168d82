"""Runs requests to the Hugging Face Hub, for models and data sets alike, and turns errors of the hub's client library
into sentences for the user.

An unknown revision is an error in the spec and becomes UserError. All other errors become OutsideFailure, because they
may be solved without a change of the spec, such as missing access to a gated repository.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from finetune_core.errors import UserError
from finetune_trainer.pod.errors import OutsideFailure, first_line

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
