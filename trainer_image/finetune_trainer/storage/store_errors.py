"""Turns whatever minio-py raises about a request or an answer into an exception that `retries.py` handles."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import urllib3
from minio.error import InvalidResponseError, S3Error, ServerError

from finetune_trainer.pod.errors import OutsideFailure, first_line, library_boundary
from finetune_trainer.storage.credentials import NoCredentials


class OddAnswerError(Exception):
    """minio-py can't make a request, or can't read the answer, or the answer is not what was asked for."""


@contextlib.contextmanager
def answers(what: str = "") -> Iterator[None]:
    """Turn whatever minio-py raises in the `with` block, besides its own exceptions, into an exception that `Retries`
    handles. Put only calls of minio-py and the reading of its answers into the block. Otherwise an error of the trainer
    itself would be reported as an error of the store.

    ``what`` names the content of the answer for the message, for example "its listing". With ``what``, an answer that
    can't be read counts as an error that may pass, so `Retries` repeats the request. Without ``what``, it counts as an
    error that lasts.

    minio-py raises ValueError for a key with the part `..`, KeyError for a header that is missing, and AttributeError
    or TypeError for an element that is missing.
    """

    def odd(error: BaseException) -> Exception:
        if isinstance(error, OSError):  # an error of the connection
            return ConnectionError(*error.args)
        if what:
            return urllib3.exceptions.HTTPError(f"{what} can't be read: {first_line(error)}")
        return OddAnswerError(f"{type(error).__name__}: {first_line(error)}")

    known = (S3Error, ServerError, InvalidResponseError, ElementTree.ParseError, urllib3.exceptions.HTTPError)
    with library_boundary(odd, *known, NoCredentials):
        yield


def read_answer(response: urllib3.BaseHTTPResponse, most: int | None = None) -> bytes:
    """Return at most the next ``most`` bytes of an answer, or all its bytes where ``most`` is None."""
    with answers():
        return response.read(most)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an error of the local file system in the `with` block, such as a full disk, into OutsideFailure. ``path`` is
    the file that the block writes."""
    try:
        yield
    except ConnectionError:
        raise
    except OSError as error:
        raise OutsideFailure(f"a downloaded file can't be written to {path.parent}: {error.strerror}") from error
