"""Client of an S3-compatible object store: read, list, write, create if absent, and delete objects. The class `Retries`
repeats failed requests.

Every failure is raised as `OutsideFailure` with a sentence that names the cause. The launcher, the workers and the
preflight checks use the client, from several threads at once.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from http import HTTPStatus
from itertools import islice
from pathlib import Path
from typing import NamedTuple, TypeVar
from urllib.parse import urlsplit

import certifi
import urllib3
from minio import Minio
from minio.datatypes import Object
from minio.deleteobjects import DeleteObject
from minio.error import S3Error
from minio.sse import Sse, SseKMS, SseS3

from finetune_core.api.storage import Addressing, EncryptionSpec
from finetune_core.layout import Location
from finetune_trainer.pod.errors import OutsideFailure
from finetune_trainer.pod.settings import STORE_BUDGET_SECONDS
from finetune_trainer.storage.credentials import CredentialFiles, PodIdentity, identity_http_pool
from finetune_trainer.storage.retries import Retries
from finetune_trainer.storage.run_store import ListedObject, ObjectDigest, digest_of_file
from finetune_trainer.storage.store_errors import OddAnswerError, answers, read_answer, writing

T = TypeVar("T")

BEYOND_THE_END = "InvalidRange"
PARTS_UNKNOWN_CODES = frozenset({"InvalidPart", "InvalidPartNumber", "InvalidArgument", "NotImplemented", "BadRequest"})
"""Error codes with which stores answer a request for one part of an object, if they do not keep the parts apart."""
EXISTS_CODES = frozenset({"PreconditionFailed", "ConditionalRequestConflict"})
PART_BYTES = 64 * 1024 * 1024
"""Size of a part in multipart uploads. minio-py's default of 5 MiB would make many parts, and one failed part aborts
the upload of the whole object.
"""
ENCRYPTION_HEADER = "x-amz-server-side-encryption"
CUSTOMER_KEY_HEADER = "x-amz-server-side-encryption-customer"
"""Names of response headers about encryption. The value of ENCRYPTION_HEADER begins with `aws:kms` where the store
encrypts an object with a key management service. A header whose name begins with CUSTOMER_KEY_HEADER says that the
store encrypts the object with a key of the customer. In both cases the object's ETag is no digest of the content."""
CHUNK_BYTES = 1024 * 1024
CONNECT_SECONDS = 5.0
READ_SECONDS = 60.0
DIGEST_METADATA = "sha256"
"""Name of the user metadata that holds the sha256 of an uploaded file, so that people can verify an object with other
tools."""


class EtagForm(NamedTuple):
    """How the ETag of an object is computed from its content."""

    part_bytes: int
    """Size in bytes of the first part of an object that was uploaded in parts. 0 for an object that was uploaded as a
    whole, whose ETag is the MD5 of the content."""


class Store:
    """Access to an object store. Each call names the bucket, because model and data may lie in other buckets than the
    runs. The class implements `RunStore`, and has more methods than that for model and data."""

    field = "storage.endpoint"

    def __init__(
        self,
        endpoint: str,
        region: str,
        credentials: Path | None,
        *,
        addressing: Addressing | None = None,
        encryption: EncryptionSpec | None = None,
        ca_file: Path | None = None,
        budget_seconds: float = STORE_BUDGET_SECONDS,
        read_seconds: float = READ_SECONDS,
        wait: Callable[[float], None] = time.sleep,
    ) -> None:
        """Prepare access to ``endpoint``, for example `http://minio.minio.svc:9000`. No request is sent.

        ``credentials`` is the folder of a mounted Secret. If it is None, the pod's own identity is used. ``ca_file``
        holds the CA certificates for the endpoint. If it is None, the file that SSL_CERT_FILE names is used, or else
        the certificates of the package certifi. ``wait`` is called before a failed request is repeated, and must wait
        the given number of seconds.
        """
        parts = urlsplit(endpoint)
        self.endpoint = endpoint
        self._retries = Retries(endpoint, budget_seconds, wait=wait)
        self._sse = _encryption(encryption)
        self._http = urllib3.PoolManager(
            timeout=urllib3.Timeout(connect=CONNECT_SECONDS, read=read_seconds),
            retries=False,
            maxsize=8,
            cert_reqs="CERT_REQUIRED",
            ca_certs=str(ca_file or os.environ.get("SSL_CERT_FILE") or certifi.where()),
        )
        self._client = Minio(
            parts.netloc,
            region=region,
            secure=parts.scheme == "https",
            credentials=(
                CredentialFiles(credentials)
                if credentials is not None
                else PodIdentity(region, identity_http_pool(ca_file))
            ),
            http_client=self._http,
        )
        if addressing == "VirtualHosted":
            self._client.enable_virtual_style_endpoint()
        elif addressing == "Path":
            self._client.disable_virtual_style_endpoint()

    def address(self, bucket: str, key: str) -> str:
        """Return the `s3://` address of a key."""
        return Location(bucket, "").uri(key)

    def with_budget(self, seconds: float) -> Store:
        """Return a copy of this store with another time budget for repeating failed requests."""
        return self._with(replace(self._retries, budget_seconds=seconds))

    def for_background(self, seconds: float, on_attempt: Callable[[str], None]) -> Store:
        """Return a copy of this store for background work. The copy repeats a failed request until ``seconds`` have
        passed, even if the store refused the credentials or the bucket is missing, because people can correct both
        meanwhile.

        ``on_attempt`` is called with the error message after each failed request, and with an empty text when a
        repeated request succeeds.
        """
        retries = replace(self._retries, budget_seconds=seconds, retry_refusals=True, on_attempt=on_attempt)
        return self._with(retries)

    def telling(self, on_attempt: Callable[[str], None]) -> Store:
        """Return a copy of this store that calls ``on_attempt`` as `for_background` says, and not after an error for
        which a request is not repeated."""
        return self._with(replace(self._retries, on_attempt=on_attempt))

    def _with(self, retries: Retries) -> Store:
        other = copy.copy(self)
        other._retries = retries
        return other

    def read(self, bucket: str, key: str) -> bytes | None:
        """Return the bytes of an object, or None if the object does not exist."""

        def get() -> bytes:
            with self._open(bucket, key) as response:
                return read_answer(response)

        return self._retries.run(get, bucket, missing=None)

    def read_range(self, bucket: str, key: str, start: int, length: int) -> bytes | None:
        """Return ``length`` bytes of an object from offset ``start`` on, or fewer if the object ends before. Return
        None if the object does not exist."""

        def get() -> bytes:
            try:
                with self._open(bucket, key, offset=start, length=length) as response:
                    if start and response.status != HTTPStatus.PARTIAL_CONTENT:
                        raise OddAnswerError("the answer is not the range of bytes that was asked for")
                    # A store that does not support ranges sends the whole object, which may not fit into memory.
                    return read_answer(response, length)
            except S3Error as error:
                if error.code == BEYOND_THE_END:
                    return b""
                raise

        return self._retries.run(get, bucket, missing=None)

    def download(self, bucket: str, key: str, path: Path) -> ObjectDigest | None:
        """Write an object to the local file ``path`` and return its size and sha256, or None if the object does not
        exist."""

        def get() -> ObjectDigest:
            hasher, size = hashlib.sha256(), 0
            with self._open(bucket, key) as response, writing(path), path.open("wb") as file:
                while chunk := read_answer(response, CHUNK_BYTES):
                    hasher.update(chunk)
                    size += file.write(chunk)
            return ObjectDigest(size, hasher.hexdigest())

        return self._retries.run(get, bucket, missing=None)

    def list_objects(self, bucket: str, prefix: str, *, most: int | None = None) -> list[ListedObject]:
        """Return all objects whose keys begin with ``prefix``, or the first ``most`` of them, ordered by key."""

        def objects() -> list[ListedObject]:
            with answers("its listing"):
                found = self._client.list_objects(bucket, prefix=prefix, recursive=True)
                return [_listed(item) for item in islice(found, most)]

        return sorted(self._retries.run(objects, bucket))

    def list_folders(self, bucket: str, prefix: str, most: int) -> list[str]:
        """Return the names of the first ``most`` folders directly below ``prefix``, which ends with a slash."""

        def folders() -> list[str]:
            with answers("its listing"):
                found = self._client.list_objects(bucket, prefix=prefix)
                names = (item.object_name.removeprefix(prefix).rstrip("/") for item in found if item.is_dir)
                return list(islice(names, most))

        return self._retries.run(folders, bucket)

    def stat(self, bucket: str, key: str) -> ListedObject | None:
        """Return the entry of one object, as a listing would show it. Return None if the object does not exist."""

        def ask() -> ListedObject:
            with answers():
                return _listed(self._client.stat_object(bucket, key))

        return self._retries.run(ask, bucket, missing=None)

    def etag_form(self, bucket: str, key: str, *, in_parts: bool) -> EtagForm | None:
        """Return how the ETag of an object is computed from the content. ``in_parts`` says whether the object was
        uploaded in parts. Return None if the ETag is no digest of the content, if the object does not exist, or if the
        store refuses a request for the first part."""

        def ask() -> EtagForm | None:
            query = {"partNumber": "1"} if in_parts else None
            try:
                with answers():
                    found = self._client.stat_object(bucket, key, extra_query_params=query)
                    headers = {str(name).lower(): str(value).lower() for name, value in (found.metadata or {}).items()}
            except S3Error as error:
                if error.code in PARTS_UNKNOWN_CODES:
                    return None
                raise
            is_digest = not headers.get(ENCRYPTION_HEADER, "").startswith("aws:kms") and not any(
                name.startswith(CUSTOMER_KEY_HEADER) for name in headers
            )
            return EtagForm(int(found.size or 0) if in_parts else 0) if is_digest else None

        return self._retries.run(ask, bucket, missing=None)

    def write(self, bucket: str, key: str, data: bytes) -> None:
        """Create or replace an object."""

        def put() -> None:
            with answers():
                self._client.put_object(bucket, key, io.BytesIO(data), len(data), part_size=PART_BYTES, sse=self._sse)

        self._retries.run(put, bucket)

    def upload(self, bucket: str, key: str, path: Path) -> ObjectDigest:
        """Create or replace an object with the content of the local file ``path``, and return its size and sha256."""
        digest = digest_of_file(path)
        metadata = {DIGEST_METADATA: digest.sha256}

        def put() -> None:
            with path.open("rb") as file, answers():
                self._client.put_object(
                    bucket,
                    key,
                    file,
                    digest.bytes,
                    part_size=PART_BYTES,
                    num_parallel_uploads=2,
                    metadata=metadata,
                    sse=self._sse,
                )

        self._retries.run(put, bucket)
        return digest

    def create(self, bucket: str, key: str, data: bytes) -> bool:
        """Create an object unless the key exists. Return whether the object now has the content ``data``.

        If the response to a successful request is lost, the repeated request finds the object. The object is then read
        back, and counts as created by this call if it has the same content.

        The method calls minio-py's internal `_execute`, because `put_object` would send `If-None-Match` as user
        metadata.
        """

        def put() -> bool:
            headers = {"If-None-Match": "*", **(self._sse.headers() if self._sse else {})}
            try:
                with answers():
                    self._client._execute("PUT", bucket, key, body=data, headers=headers)
            except S3Error as error:
                if error.code in EXISTS_CODES:
                    return False
                raise
            return True

        return self._retries.run(put, bucket) or self.read(bucket, key) == data

    def delete(self, bucket: str, keys: Iterable[str]) -> None:
        """Delete objects. A key that does not exist is no error."""
        names = [DeleteObject(key) for key in keys]
        if not names:
            return

        def remove() -> None:
            with answers():
                refused = next(iter(self._client.remove_objects(bucket, names)), None)
            if refused is not None:
                raise OutsideFailure(f"storage.uri: the store refused to delete {refused.name}: {refused.message}")

        self._retries.run(remove, bucket)

    def abort_multipart_uploads(self, bucket: str, prefix: str) -> list[str]:
        """Abort the unfinished multipart uploads whose keys begin with ``prefix``, and return these keys.

        The uploads of the whole bucket are listed as well and then filtered, because for a prefix MinIO lists only the
        uploads whose whole key is that prefix. After a restart MinIO does not list older uploads any more, but deletes
        their parts itself after a day.
        """

        def uploads() -> list[tuple[str, str]]:
            with answers("its list of uploads"):
                found = [
                    upload
                    for asked in (prefix, "")
                    for upload in self._client._list_multipart_uploads(bucket, prefix=asked).uploads
                ]
                return sorted({(str(upload.object_name), str(upload.upload_id)) for upload in found})

        stale = [item for item in self._retries.run(uploads, bucket) if item[0].startswith(prefix)]
        for key, upload in stale:
            self._retries.run(partial(self._abort_upload, bucket, key, upload), bucket, missing=None)
        return [key for key, _ in stale]

    def _abort_upload(self, bucket: str, key: str, upload: str) -> None:
        with answers():
            self._client._abort_multipart_upload(bucket, key, upload)

    @contextlib.contextmanager
    def _open(self, bucket: str, key: str, *, offset: int = 0, length: int = 0) -> Iterator[urllib3.BaseHTTPResponse]:
        """Open an object and yield the response, from which ``length`` bytes can be read from ``offset`` on. A
        ``length`` of 0 means all bytes to the end. At the end of the `with` block the connection returns to the pool,
        also after an error."""
        with answers():
            response = self._client.get_object(bucket, key, offset=offset, length=length)
        try:
            yield response
        finally:
            response.close()
            response.release_conn()


def _listed(item: Object) -> ListedObject:
    """Return minio-py's entry of an object as a `ListedObject`."""
    return ListedObject(item.object_name, item.size, item.last_modified or datetime.now(UTC), item.etag or "")


def _encryption(wanted: EncryptionSpec | None) -> Sse | None:
    """Return the job's server-side encryption as minio-py's object, or None without encryption."""
    if wanted is None:
        return None
    return SseKMS(wanted.kms.key_id, {}) if wanted.kms is not None else SseS3()
