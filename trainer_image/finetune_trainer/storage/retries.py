"""Repeats failed requests to a store until a time budget is spent. A request that fails for good raises
OutsideFailure with a sentence that names the cause."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar
from xml.etree import ElementTree

import urllib3
from minio.error import InvalidResponseError, S3Error, ServerError

from finetune_trainer.pod.errors import OutsideFailure, one_line
from finetune_trainer.pod.settings import STORE_BUDGET_SECONDS
from finetune_trainer.storage.credentials import NoCredentials
from finetune_trainer.storage.store_errors import OddAnswerError

T = TypeVar("T")

REFUSED_CODES = frozenset(
    {"AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidTokenId", "InvalidToken"}
)
PERMANENT_CODES = frozenset({"NoSuchBucket", "InvalidBucketName", "MethodNotAllowed", "EntityTooLarge"})
MISSING_CODES = frozenset({"NoSuchKey", "NoSuchObject", "NotFound", "NoSuchUpload"})
CLOCK_CODES = frozenset({"RequestTimeTooSkewed", "RequestExpired"})
FIRST_DELAY_SECONDS = 0.5
LONGEST_DELAY_SECONDS = 10.0


class RequestFailedError(Exception):
    """A request to a store failed, and the message is the sentence for the user. Only stores that do not use minio-py
    raise this exception."""

    def __init__(self, sentence: str, *, final: bool) -> None:
        """``final`` says whether the error usually lasts, so that it makes no sense to repeat the request at once."""
        super().__init__(sentence)
        self.final = final


def _ignore(sentence: str) -> None:
    """Do nothing with the error message of a failed request. This is the default of `Retries.on_attempt`."""


@dataclass(frozen=True)
class Retries:
    """How long and after which errors the requests to one store are repeated."""

    endpoint: str
    """Address of the store for messages, for example `http://minio.minio.svc:9000`, or its folder."""
    budget_seconds: float = STORE_BUDGET_SECONDS
    """Seconds from the beginning of the first try. No try begins later than that."""
    retry_refusals: bool = False
    """Whether requests are repeated also after errors that usually last, such as refused credentials and a missing
    bucket."""
    on_attempt: Callable[[str], None] = _ignore
    """Called with the error message after each failed request, and with an empty text when a repeated request
    succeeds. Not called after an error for which a request is not repeated."""
    wait: Callable[[float], None] = time.sleep
    """Called before a failed request is repeated. Must wait the given number of seconds."""

    def run(self, request: Callable[[], T], bucket: str, *, missing: T | object = ...) -> T:
        """Call ``request`` again and again until it succeeds, and return its result. Raise OutsideFailure when the time
        budget is spent, or, without `retry_refusals`, at once after an error that usually lasts.

        ``missing`` is returned if the object does not exist. Without ``missing``, a missing object is an error.
        ``bucket`` is named in messages.
        """
        deadline = time.monotonic() + self.budget_seconds
        delay = FIRST_DELAY_SECONDS
        failed = False
        while True:
            try:
                done = request()
            except S3Error as error:
                if error.code in MISSING_CODES and missing is not ...:
                    if failed:
                        self.on_attempt("")
                    return missing  # type: ignore[return-value]
                cause = _sentence(error, self.endpoint, bucket)
                final = error.code in PERMANENT_CODES or error.code in REFUSED_CODES
            except RequestFailedError as error:
                cause, final = str(error), error.final
            except NoCredentials as error:
                cause, final = str(error), True
            except ElementTree.ParseError as error:
                cause, final = f"storage.endpoint: {self.endpoint} sent an answer that can't be read ({error})", False
            except (ServerError, InvalidResponseError, urllib3.exceptions.HTTPError, ConnectionError) as error:
                cause = f"storage.endpoint: {self.endpoint} can't be reached ({_short(error)})"
                final = False
            except OddAnswerError as error:
                cause, final = f"storage.endpoint: a request to {self.endpoint} failed ({error})", True
            else:
                if failed:
                    self.on_attempt("")
                return done
            failed = True
            cause = one_line(cause)  # a server may answer anything, also line breaks
            if final and not self.retry_refusals:
                raise OutsideFailure(cause)
            self.on_attempt(cause)
            if time.monotonic() + delay > deadline:
                raise OutsideFailure(cause)
            self.wait(delay)
            delay = min(2 * delay, LONGEST_DELAY_SECONDS)


def _sentence(error: S3Error, endpoint: str, bucket: str) -> str:
    """Return the message about ``error``, which the store at ``endpoint`` answered to a request for ``bucket``."""
    if error.code in REFUSED_CODES:
        return f"storage.credentialsSecretRef: {endpoint} refused the credentials for bucket {bucket!r} ({error.code})"
    if error.code in CLOCK_CODES:
        return (
            f"storage.endpoint: {endpoint} refused the request's time ({error.code}): the clock of this node"
            " or that of the store is wrong"
        )
    if error.code == "NoSuchBucket":
        return f"storage.uri: bucket {bucket!r} does not exist at {endpoint}"
    if error.code == "IncompleteBody":
        # MinIO answers IncompleteBody if its disk becomes full during a write.
        return f"storage.endpoint: {endpoint} took only a part of an object ({error.code}): its disk may be full"
    return f"storage.endpoint: {endpoint} answered {error.code}: {error.message}"


def _short(error: Exception) -> str:
    """Return the text of an error, or of the reason that urllib3 gives for it, without the addresses of urllib3's
    objects in memory."""
    reason = getattr(error, "reason", None)
    text = str(reason if isinstance(reason, Exception) else error)
    return text.rpartition(">: ")[2] or type(error).__name__
