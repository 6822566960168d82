"""Reads objects of a job from MinIO or S3. No other module of the CLI sends requests to the object store.

The input is the section `spec.storage` of a job, and an access key. A failed request raises a UserError that names the
object or the address of the store. `commands/job_store.py` and the demo create an `ObjectStoreReader`, and the
other modules of this room read with it.
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
from typing import TypeVar
from xml.etree import ElementTree

import certifi
import urllib3
from minio import Minio
from minio.error import InvalidResponseError, S3Error, ServerError

from finetune_core.api.storage import StorageSpec
from finetune_core.contract.pod import ACCESS_KEY_ID, SECRET_ACCESS_KEY, SESSION_TOKEN
from finetune_core.errors import UserError

T = TypeVar("T")

CHUNK_BYTES = 1 << 20
SMALL_OBJECT_BYTES = 16 << 20
"""Size in bytes of the largest object that `read` returns. The objects that the commands read with `read`, such as
manifests, are far smaller."""
TRIES = 3
"""Largest number of times that `fetch`, `digest` and `read` start the transfer of an object, the first time
included."""
REFUSED = ("AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken")
"""The S3 error codes with which an object store refuses an access key."""


@dataclass(frozen=True, slots=True)
class AccessKey:
    """An access key of the object store: access key id, secret key, and the session token of temporary credentials."""

    access: str
    secret: str
    session: str | None = None


def access_key_from(values: Mapping[str, str]) -> AccessKey | None:
    """Return the access key in ``values``, the data of a Secret or the environment variables. Return None where the
    access key id or the secret key is missing."""
    access, secret = values.get(ACCESS_KEY_ID), values.get(SECRET_ACCESS_KEY)
    return AccessKey(access, secret, values.get(SESSION_TOKEN) or None) if access and secret else None


@dataclass(frozen=True, slots=True)
class Entry:
    """An object in a listing, with its size in bytes and the time of its last change."""

    key: str
    bytes: int
    modified: datetime


class MissingError(UserError):
    """The requested object, or its bucket, does not exist."""


class ObjectStoreReader:
    """Reads objects from a job's object store. A failed request raises a UserError that names the object or the address
    of the store. A transfer that breaks off is started again from the first byte. After TRIES transfers of an object
    that broke off, a UserError is raised."""

    def __init__(
        self, storage: StorageSpec, keys: AccessKey, endpoint: str | None = None, certificates: str | None = None
    ) -> None:
        """Create the client. ``endpoint`` replaces the object store's address in ``storage``. ``certificates`` are CA
        certificates in PEM. If they are given, the client trusts only these certificates."""
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
                # Retry-After is ignored, because MinIO asks for a pause of one minute with every 503, and a user would
                # see no output during the pause.
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
        """Return all objects whose keys begin with ``prefix``, sorted by key."""
        with self._explained(f"s3://{bucket}/{prefix}"):
            found = self._minio.list_objects(bucket, prefix=prefix, recursive=True)
            return sorted(
                (Entry(item.object_name, item.size, item.last_modified or datetime.now(UTC)) for item in found),
                key=lambda entry: entry.key,
            )

    def digest(self, bucket: str, key: str) -> str:
        """Return the sha256 of an object in hexadecimal. The object is read in pieces, so it need not fit into
        memory."""

        def transfer() -> str:
            hasher = hashlib.sha256()
            self._stream(bucket, key, hasher.update)
            return hasher.hexdigest()

        return self._repeated(bucket, key, transfer)

    def read(self, bucket: str, key: str) -> bytes:
        """Return the content of a small object. Raises UserError for an object of more than SMALL_OBJECT_BYTES."""

        def transfer() -> bytes:
            found = bytearray()

            def add(chunk: bytes) -> None:
                found.extend(chunk)
                if len(found) > SMALL_OBJECT_BYTES:
                    raise UserError(f"s3://{bucket}/{key}", f"is larger than {SMALL_OBJECT_BYTES} bytes")

            self._stream(bucket, key, add)
            return bytes(found)

        return self._repeated(bucket, key, transfer)

    def fetch(self, bucket: str, key: str, target: Path, progress: Callable[[int], None]) -> tuple[int, str]:
        """Write an object to ``target``, and return its size in bytes and its sha256.

        ``progress`` is called with the number of bytes of each chunk. When a transfer breaks off, ``progress`` is
        called with the negative number of the bytes that this transfer had written, so that the sum of all calls stays
        right.
        """

        def transfer() -> tuple[int, str]:
            sha256, written = hashlib.sha256(), 0
            with target.open("wb") as file:

                def add(chunk: bytes) -> None:
                    nonlocal written
                    file.write(chunk)
                    sha256.update(chunk)
                    written += len(chunk)
                    progress(len(chunk))

                try:
                    self._stream(bucket, key, add)
                except urllib3.exceptions.HTTPError:
                    progress(-written)
                    raise
            return written, sha256.hexdigest()

        return self._repeated(bucket, key, transfer)

    def _repeated(self, bucket: str, key: str, transfer: Callable[[], T]) -> T:
        """Call ``transfer``, which reads an object, until it does not break off, at most TRIES times. Return its
        result."""
        for attempt in range(1, TRIES + 1):
            try:
                return transfer()
            except urllib3.exceptions.HTTPError as error:
                if attempt == TRIES:
                    raise UserError(f"s3://{bucket}/{key}", f"broke off {TRIES} times ({error})") from error
        raise AssertionError("the last try returns or raises")

    def _stream(self, bucket: str, key: str, add: Callable[[bytes], None]) -> None:
        """Read an object in chunks and call ``add`` with each chunk. Raises urllib3's error when the transfer breaks
        off."""
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
        """Return a context manager that turns the error of a failed request in its `with` block into a UserError.
        ``subject`` is the `s3://` address that the request is about."""
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
        # minio-py raises ValueError or ParseError where the answer is not the XML that an object store sends.
        except (InvalidResponseError, ServerError, ValueError, ElementTree.ParseError) as error:
            raise UserError(self.endpoint, f"does not answer like an object store ({error})") from error
        except urllib3.exceptions.HTTPError as error:
            cause = getattr(error, "reason", None) or error
            raise UserError(
                self.endpoint,
                f"cannot be reached from here ({cause}); an address inside the cluster needs `kubectl port-forward`"
                " and `--endpoint http://127.0.0.1:PORT`",
            ) from error


def _trust(certificates: str | None) -> ssl.SSLContext:
    """Return a TLS context that trusts the CA certificates in ``certificates`` (PEM). Where ``certificates`` is None,
    the context trusts the CA certificates in the file that the environment variable SSL_CERT_FILE names, or else the CA
    certificates of the library certifi."""
    if certificates is None:
        return ssl.create_default_context(cafile=os.environ.get("SSL_CERT_FILE") or certifi.where())
    try:
        return ssl.create_default_context(cadata=certificates)
    except ssl.SSLError as error:
        raise UserError("storage.caConfigMapRef", "must hold certificates in PEM") from error
