"""Asks the Hugging Face Hub, and says in a sentence what it refused: for models and data sets alike.

A person can be granted access while a job waits, so only what the spec itself makes impossible is final.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from finetune_core.errors import UserError
from finetune_trainer.pod.errors import OutsideFailure, first_line

T = TypeVar("T")


def ask_hub(request: Callable[[], T], *, field: str, repo: str, revision: str, has_token: bool) -> T:
    """Return what ``request`` gets; ``field`` is the path of the source, such as `dataset.train.huggingFace`.

    Raises UserError for an unknown revision, OutsideFailure for everything that may change by itself.
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
        # The hub does not tell a private repository from none.
        raise OutsideFailure(f"{field}: {repo} does not exist, or {access}") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, httpx2.HTTPError, OSError) as error:
        raise OutsideFailure(f"{field}: {repo} can't be read: {first_line(error)}") from error
