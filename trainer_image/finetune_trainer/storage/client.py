"""One bucket of an S3-compatible store: read, write, create once, list, delete; retried within a budget.

Every failure leaves here as an `OutsideFailure` with a sentence that names the cause. Used by the launcher and
by every worker; safe to use from several threads.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import io
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple, TypeVar
from urllib.parse import urlsplit

import urllib3
from minio import Minio
from minio.credentials import Credentials, Provider
from minio.deleteobjects import DeleteObject
from minio.error import InvalidResponseError, S3Error, ServerError

from finetune_trainer.errors import OutsideFailure
from finetune_trainer.settings import STORE_BUDGET_SECONDS

T = TypeVar("T")

REFUSED_CODES = frozenset(
    {"AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidTokenId", "InvalidToken"}
)
PERMANENT_CODES = frozenset({"NoSuchBucket", "InvalidBucketName", "MethodNotAllowed", "EntityTooLarge"})
BEYOND_THE_END = "InvalidRange"
MISSING_CODES = frozenset({"NoSuchKey", "NoSuchObject", "NotFound"})
PART_BYTES = 64 * 1024 * 1024
"""minio-py's own default makes 5 MiB parts of which a single failing one aborts the whole object."""
CHUNK_BYTES = 1024 * 1024
FIRST_DELAY_SECONDS = 0.5
LONGEST_DELAY_SECONDS = 10.0
CONNECT_SECONDS = 5.0
READ_SECONDS = 60.0
PRESIGNED_LIFETIME = timedelta(minutes=15)


class CredentialFiles(Provider):  # type: ignore[misc]  # minio has no type information
    """Reads the credentials anew for each request, so that a rotated Secret needs no restart."""

    def __init__(self, folder: Path) -> None:
        """Read from files in ``folder`` that are named after the environment variables of the AWS tools."""
        self._folder = folder

    def retrieve(self) -> Credentials:
        """Return the credentials as the files hold them now; raises OutsideFailure where one is missing."""
        values = {}
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
            path = self._folder / name
            values[name] = path.read_text().strip() if path.is_file() else ""
            if not values[name] and name != "AWS_SESSION_TOKEN":
                raise OutsideFailure(f"storage.credentialsSecretRef: the Secret has no key {name}, or it is empty")
        return Credentials(
            values["AWS_ACCESS_KEY_ID"], values["AWS_SECRET_ACCESS_KEY"], values["AWS_SESSION_TOKEN"] or None
        )


class Entry(NamedTuple):
    """An object in a listing."""

    key: str
    bytes: int
    modified: datetime


@dataclass(frozen=True)
class Stored:
    """What was written or read: size and sha256."""

    bytes: int
    sha256: str


class Store:
    """Access to one store; the bucket is named with each call because model and data may lie in other ones."""

    def __init__(
        self,
        endpoint: str,
        region: str,
        credentials: Path,
        *,
        budget_seconds: float = STORE_BUDGET_SECONDS,
        wait: Callable[[float], None] = time.sleep,
    ) -> None:
        """Prepare access to ``endpoint`` (`http://host:port`); nothing is sent yet.

        ``wait`` is called with the seconds between two tries of a failing request.
        """
        parts = urlsplit(endpoint)
        self.endpoint = endpoint
        self._budget = budget_seconds
        self._wait = wait
        self._http = urllib3.PoolManager(
            timeout=urllib3.Timeout(connect=CONNECT_SECONDS, read=READ_SECONDS),
            retries=False,
            maxsize=8,
            cert_reqs="CERT_REQUIRED",
        )
        self._client = Minio(
            parts.netloc,
            region=region,
            secure=parts.scheme == "https",
            credentials=CredentialFiles(credentials),
            http_client=self._http,
        )

    def with_budget(self, seconds: float) -> Store:
        """Return the same access with another budget for retries."""
        copy = object.__new__(Store)
        copy.__dict__.update(self.__dict__, _budget=seconds)
        return copy

    # Reading

    def read(self, bucket: str, key: str) -> bytes | None:
        """Return an object's bytes, None where it does not exist."""

        def get() -> bytes:
            with self._open(bucket, key) as response:
                return response.read()

        return self._retried(get, bucket, missing=None)

    def read_range(self, bucket: str, key: str, start: int, length: int) -> bytes | None:
        """Return ``length`` bytes of an object from ``start`` on, fewer where it ends; None where it does not exist."""

        def get() -> bytes:
            try:
                with self._open(bucket, key, offset=start, length=length) as response:
                    return response.read()
            except S3Error as error:
                if error.code == BEYOND_THE_END:
                    return b""
                raise

        return self._retried(get, bucket, missing=None)

    def download(self, bucket: str, key: str, path: Path) -> Stored | None:
        """Write an object to ``path`` and return its size and digest; None where it does not exist."""

        def get() -> Stored:
            hasher, size = hashlib.sha256(), 0
            with self._open(bucket, key) as response, path.open("wb") as file:
                while chunk := response.read(CHUNK_BYTES):
                    hasher.update(chunk)
                    size += file.write(chunk)
            return Stored(size, hasher.hexdigest())

        return self._retried(get, bucket, missing=None)

    def entries(self, bucket: str, prefix: str) -> list[Entry]:
        """Return all objects below ``prefix``, ordered by key."""

        def objects() -> list[Entry]:
            found = self._client.list_objects(bucket, prefix=prefix, recursive=True)
            return [Entry(item.object_name, item.size, item.last_modified or datetime.now(UTC)) for item in found]

        return sorted(self._retried(objects, bucket))

    # Writing

    def write(self, bucket: str, key: str, data: bytes) -> None:
        """Create or replace an object."""
        self._retried(
            lambda: self._client.put_object(bucket, key, io.BytesIO(data), len(data), part_size=PART_BYTES), bucket
        )

    def upload(self, bucket: str, key: str, path: Path) -> Stored:
        """Create or replace an object with the content of ``path`` and return the file's size and digest."""
        hasher = hashlib.sha256()
        with path.open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                hasher.update(chunk)
        size = path.stat().st_size

        def put() -> None:
            with path.open("rb") as file:
                self._client.put_object(bucket, key, file, size, part_size=PART_BYTES, num_parallel_uploads=2)

        self._retried(put, bucket)
        return Stored(size, hasher.hexdigest())

    def create(self, bucket: str, key: str, data: bytes) -> bool:
        """Create an object unless it exists; return whether ``data`` is now its content by this call.

        minio-py's put_object turns `If-None-Match` into user metadata, so this is a presigned PUT. A lost
        response makes the retry meet its own object: that is told apart by reading it back.
        """

        def put() -> bool:
            url = self._client.get_presigned_url("PUT", bucket, key, expires=PRESIGNED_LIFETIME)
            response = self._http.request("PUT", url, body=data, headers={"If-None-Match": "*"})
            if response.status == http.client.PRECONDITION_FAILED:
                return False
            if response.status != http.client.OK:
                raise _status_error(response)
            return True

        return self._retried(put, bucket) or self.read(bucket, key) == data

    def delete(self, bucket: str, keys: Iterable[str]) -> None:
        """Delete objects; one that does not exist is no error."""
        names = [DeleteObject(key) for key in keys]
        if not names:
            return

        def remove() -> None:
            for error in self._client.remove_objects(bucket, names):
                raise OutsideFailure(f"storage.uri: the store refused to delete {error.name}: {error.message}")

        self._retried(remove, bucket)

    # Failures

    @contextlib.contextmanager
    def _open(self, bucket: str, key: str, *, offset: int = 0, length: int = 0) -> Iterator[urllib3.BaseHTTPResponse]:
        """Open an object for reading, from ``offset`` on and for ``length`` bytes (0: to its end); its connection is
        given back, whole or broken."""
        response = self._client.get_object(bucket, key, offset=offset, length=length)
        try:
            yield response
        finally:
            response.close()
            response.release_conn()

    def _retried(self, request: Callable[[], T], bucket: str, *, missing: T | object = ...) -> T:
        """Call ``request`` until it works, fails for good, or the budget is spent."""
        deadline = time.monotonic() + self._budget
        delay = FIRST_DELAY_SECONDS
        while True:
            try:
                return request()
            except S3Error as error:
                if error.code in MISSING_CODES and missing is not ...:
                    return missing  # type: ignore[return-value]
                cause = self._sentence(error, bucket)
                final = error.code in PERMANENT_CODES or error.code in REFUSED_CODES
            except (ServerError, InvalidResponseError, urllib3.exceptions.HTTPError, OSError) as error:
                cause = f"storage.endpoint: {self.endpoint} can't be reached ({_short(error)})"
                final = False
            if final or time.monotonic() + delay > deadline:
                raise OutsideFailure(cause)
            self._wait(delay)
            delay = min(2 * delay, LONGEST_DELAY_SECONDS)

    def _sentence(self, error: S3Error, bucket: str) -> str:
        if error.code in REFUSED_CODES:
            return (
                f"storage.credentialsSecretRef: {self.endpoint} refused the credentials for bucket {bucket!r}"
                f" ({error.code})"
            )
        if error.code == "NoSuchBucket":
            return f"storage.uri: bucket {bucket!r} does not exist at {self.endpoint}"
        return f"storage.endpoint: {self.endpoint} answered {error.code}: {error.message}"


def _status_error(response: urllib3.BaseHTTPResponse) -> S3Error | urllib3.exceptions.HTTPError:
    """Return the error that a raw response stands for, so that it is judged like minio-py's own."""
    text = response.data.decode(errors="replace")
    code = text.partition("<Code>")[2].partition("</Code>")[0]
    if not code:
        return urllib3.exceptions.HTTPError(f"status {response.status}")
    message = text.partition("<Message>")[2].partition("</Message>")[0]
    return S3Error(response, code, message, None, None, None)


def _short(error: Exception) -> str:
    """Return an error's innermost reason without urllib3's object addresses."""
    reason = getattr(error, "reason", None)
    text = str(reason if isinstance(reason, Exception) else error)
    return text.rpartition(">: ")[2] or type(error).__name__
