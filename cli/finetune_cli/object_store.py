"""Files of a job in its object store, read and verified: the only module that talks to MinIO or S3.

In: a job's storage section and credentials. Out: bytes and files whose sha256 is what the manifest says, or UserError
that names the bucket, key or address. Called by `finetune download`.
"""

from __future__ import annotations

import hashlib
import os
import ssl
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import certifi
import urllib3
from minio import Minio
from minio.error import InvalidResponseError, S3Error, ServerError

from finetune_core.api.storage import StorageSpec
from finetune_core.errors import UserError

ACCESS_KEY = "AWS_ACCESS_KEY_ID"
SECRET_KEY = "AWS_SECRET_ACCESS_KEY"  # noqa: S105  (the name of a variable)
SESSION_TOKEN = "AWS_SESSION_TOKEN"  # noqa: S105  (the name of a variable)
CHUNK_BYTES = 1 << 20
SMALL_OBJECT_BYTES = 16 << 20
"""More than any manifest or pointer: an object that is read into memory may not be larger."""
TRIES = 3
REFUSED = ("AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken")


@dataclass(frozen=True, slots=True)
class AccessKey:
    """An access key of the object store."""

    access: str
    secret: str
    session: str | None = None


def access_key_from(values: Mapping[str, str]) -> AccessKey | None:
    """Return the access key in a Secret's values or in the environment, or None where it is not complete."""
    access, secret = values.get(ACCESS_KEY), values.get(SECRET_KEY)
    return AccessKey(access, secret, values.get(SESSION_TOKEN) or None) if access and secret else None


@dataclass(frozen=True, slots=True)
class Entry:
    """An object in a listing."""

    key: str
    bytes: int
    modified: datetime


class MissingError(UserError):
    """An object, or its bucket, that does not exist."""


class ObjectStoreReader:
    """Reads objects; every failure says which address or key it is about."""

    def __init__(
        self, storage: StorageSpec, keys: AccessKey, endpoint: str | None = None, certificates: str | None = None
    ) -> None:
        """Prepare access; ``certificates`` (PEM) sign the endpoint's, None for those of this machine."""
        self.endpoint = endpoint or storage.endpoint_url
        address = urllib3.util.parse_url(self.endpoint)
        if address.scheme not in ("http", "https") or not address.host or address.path not in (None, "", "/"):
            raise UserError(self.endpoint, "must be an address of the form http://host:port or https://host")
        self._minio = Minio(
            address.netloc or "",
            access_key=keys.access,
            secret_key=keys.secret,
            session_token=keys.session,
            region=storage.region,
            secure=address.scheme == "https",
            http_client=urllib3.PoolManager(
                timeout=urllib3.Timeout(connect=5, read=60),
                # MinIO asks to come back after a minute whenever it answers 503: nobody waits that long in silence.
                retries=urllib3.Retry(
                    total=2,
                    backoff_factor=0.5,
                    status_forcelist=[500, 502, 503, 504],
                    respect_retry_after_header=False,
                ),
                cert_reqs="CERT_REQUIRED",
                ssl_context=_trust(certificates),
            ),
        )
        if storage.addressing == "VirtualHosted":
            self._minio.enable_virtual_style_endpoint()
        elif storage.addressing == "Path":
            self._minio.disable_virtual_style_endpoint()

    def entries(self, bucket: str, prefix: str) -> list[Entry]:
        """Return all objects below ``prefix``, ordered by key."""
        with self._explained(f"s3://{bucket}/{prefix}"):
            found = self._minio.list_objects(bucket, prefix=prefix, recursive=True)
            return sorted(
                (Entry(item.object_name, item.size, item.last_modified or datetime.now(UTC)) for item in found),
                key=lambda entry: entry.key,
            )

    def digest(self, bucket: str, key: str) -> str:
        """Return the sha256 of an object, which may be large."""
        hasher = hashlib.sha256()
        self._stream(bucket, key, hasher.update)
        return hasher.hexdigest()

    def read(self, bucket: str, key: str) -> bytes:
        """Return a small object."""
        found = bytearray()

        def add(chunk: bytes) -> None:
            found.extend(chunk)
            if len(found) > SMALL_OBJECT_BYTES:
                raise UserError(f"s3://{bucket}/{key}", f"is larger than {SMALL_OBJECT_BYTES} bytes")

        self._stream(bucket, key, add)
        return bytes(found)

    def fetch(self, bucket: str, key: str, target: Path, progress: Callable[[int], None]) -> tuple[int, str]:
        """Write an object to ``target`` and return its size and sha256; a broken transfer is started again.

        ``progress`` hears the bytes of each chunk, and a negative number when a transfer starts again.
        """
        for attempt in range(1, TRIES + 1):
            sha256, written = hashlib.sha256(), 0
            with target.open("wb") as file:

                def add(chunk: bytes) -> None:
                    nonlocal written
                    file.write(chunk)
                    sha256.update(chunk)  # noqa: B023
                    written += len(chunk)
                    progress(len(chunk))

                try:
                    self._stream(bucket, key, add)
                    return written, sha256.hexdigest()
                except urllib3.exceptions.HTTPError as error:
                    progress(-written)
                    if attempt == TRIES:
                        raise UserError(f"s3://{bucket}/{key}", f"broke off {TRIES} times ({error})") from error
        raise AssertionError("the last try returns or raises")

    def _stream(self, bucket: str, key: str, add: Callable[[bytes], None]) -> None:
        """Hand an object to ``add`` in chunks; a transfer that breaks off in the middle raises urllib3's error."""
        with self._explained(f"s3://{bucket}/{key}"):
            response = self._minio.get_object(bucket, key)
        try:
            for chunk in response.stream(CHUNK_BYTES):
                add(chunk)
        finally:
            response.close()
            response.release_conn()

    @contextmanager
    def _explained(self, subject: str) -> Iterator[None]:
        """Turn what a request inside the block fails with into a sentence about ``subject``."""
        try:
            yield
        except S3Error as error:
            if error.code in ("NoSuchKey", "NoSuchBucket"):
                bucket = subject.removeprefix("s3://").partition("/")[0]
                missing = f"bucket `{bucket}`" if error.code == "NoSuchBucket" else "it"
                raise MissingError(subject, f"{missing} does not exist in the store at {self.endpoint}") from error
            if error.code in REFUSED:
                raise UserError(self.endpoint, f"refused the credentials for {subject} ({error.code})") from error
            raise UserError(subject, f"the store at {self.endpoint} answered {error.code}: {error.message}") from error
        except (InvalidResponseError, ServerError) as error:
            raise UserError(self.endpoint, f"does not answer like an object store ({error})") from error
        except urllib3.exceptions.HTTPError as error:
            cause = getattr(error, "reason", None) or error
            raise UserError(
                self.endpoint,
                f"cannot be reached from here ({cause}); an address inside the cluster needs `kubectl port-forward`"
                " and `--endpoint http://127.0.0.1:PORT`",
            ) from error


def _trust(certificates: str | None) -> ssl.SSLContext:
    """Return the authorities that may sign the store's certificate."""
    if certificates is None:
        return ssl.create_default_context(cafile=os.environ.get("SSL_CERT_FILE") or certifi.where())
    try:
        return ssl.create_default_context(cadata=certificates)
    except ssl.SSLError as error:
        raise UserError("storage.caConfigMapRef", "must hold certificates in PEM") from error
