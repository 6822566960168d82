"""Runs requests to the Hugging Face Hub, for models and data sets alike, and turns the client's errors into sentences
for the user.

An error that a user may remove while the job waits, such as missing access to a gated repository, becomes
OutsideFailure. Only an error in the spec itself becomes UserError.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from finetune_core.errors import UserError
from finetune_trainer.pod.errors import OutsideFailure, first_line

PARALLEL_DOWNLOADS = 4
"""Number of files that are downloaded at the same time."""
T = TypeVar("T")


def call_hub(request: Callable[[], T], *, field: str, repo: str, revision: str, has_token: bool) -> T:
    """Run ``request`` and return its result. ``field`` is the path of the source in the spec, for example
    `dataset.train.huggingFace`.

    Raises UserError for an unknown revision, and OutsideFailure for every error that may disappear without a change of
    the spec.
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
        # The hub answers alike for a private repository and for one that does not exist.
        raise OutsideFailure(f"{field}: {repo} does not exist, or {access}") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, httpx2.HTTPError, OSError) as error:
        raise OutsideFailure(f"{field}: {repo} can't be read: {first_line(error)}") from error
