"""Providers that give minio-py the S3 access key: from files of a mounted Secret, or from the pod's own identity.

minio-py asks the provider for the key before each request. So the trainer needs no restart when the Secret is replaced
or a session expires.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import urllib3
from minio.credentials import Credentials, EnvAWSProvider, IamAwsProvider, Provider

from finetune_core.contract.pod import (
    ACCESS_KEY_ID,
    SECRET_ACCESS_KEY,
    SESSION_TOKEN,
    STS_ENDPOINT_VARIABLE,
    WEB_IDENTITY_FILE_VARIABLE,
)
from finetune_trainer.pod.errors import library_boundary

IDENTITY_SECONDS = 10.0


class NoCredentials(Exception):  # noqa: N818  (a state that may pass, for example while a Secret is replaced)
    """There is no access key at the moment. The message names the place where a key should be."""


class CredentialFiles(Provider):  # type: ignore[misc]  # minio has no type information
    """Reads the access key from the files of a mounted Secret."""

    def __init__(self, folder: Path) -> None:
        """Read from the files in ``folder``, the mounted Secret. The files are named after the environment variables of
        the AWS tools, such as `AWS_ACCESS_KEY_ID`."""
        self._folder = folder

    def retrieve(self) -> Credentials:
        """Return the access key that the files hold now. Raises NoCredentials if a file is missing, empty or not
        readable as text. Only the session token may be missing or empty."""
        values = {}
        for name in (ACCESS_KEY_ID, SECRET_ACCESS_KEY, SESSION_TOKEN):
            path = self._folder / name
            try:
                values[name] = path.read_text().strip() if path.is_file() else ""
            except (OSError, ValueError) as error:
                # The error itself is left out, because a UnicodeDecodeError holds the bytes of the secret.
                problem = f"the key {name} of the Secret can't be read as text ({type(error).__name__})"
                raise NoCredentials(f"storage.credentialsSecretRef: {problem}") from None
            if not values[name] and name != SESSION_TOKEN:
                raise NoCredentials(f"storage.credentialsSecretRef: the Secret has no key {name}, or it is empty")
        return Credentials(values[ACCESS_KEY_ID], values[SECRET_ACCESS_KEY], values[SESSION_TOKEN] or None)


class PodIdentity(Provider):  # type: ignore[misc]  # minio has no type information
    """Obtains an access key from the identity that the cluster gives the pod.

    The first of the following sources that exists gives the key:

    - an access key in the environment
    - a web identity token (`storage.identity`, or IRSA on EKS)
    - the container credentials endpoint (EKS Pod Identity, ECS)
    - the role of the node
    """

    def __init__(self, region: str, http: urllib3.PoolManager) -> None:
        """Use ``http`` for requests. The environment variables of the AWS tools name the endpoint of the token service
        and the file with the web identity token."""
        endpoint = os.environ.get(STS_ENDPOINT_VARIABLE) if os.environ.get(WEB_IDENTITY_FILE_VARIABLE) else None
        self._provider = IamAwsProvider(custom_endpoint=endpoint, http_client=http, region=region)

    def retrieve(self) -> Credentials:
        """Return an access key that has not expired. Raises NoCredentials if none can be obtained."""
        fixed = EnvAWSProvider().retrieve() if _has_key() else None
        if fixed is not None:
            return fixed
        # minio-py raises ValueError if the service refuses a key, and an exception of any class if the answer of the
        # service is malformed or missing.
        with library_boundary(_no_identity):
            return self._provider.retrieve()


def _no_identity(error: BaseException) -> NoCredentials:
    return NoCredentials(
        "storage.credentialsSecretRef is absent and the pod's own identity gives no access key"
        f" ({_reason(error)}): name a Secret, set storage.identity, or name a service account with a role in"
        " podTemplate"
    )


def _has_key() -> bool:
    return all(os.environ.get(name) for name in (ACCESS_KEY_ID, SECRET_ACCESS_KEY))


def _reason(error: BaseException) -> str:
    """Return the reason of an error, at most 200 characters. Query strings of URLs are left out, because they may
    contain a secret token."""
    text = str(getattr(error, "reason", None) or error).splitlines()[0] if str(error) else type(error).__name__
    return re.sub(r"\?\S*", "", text).rpartition(">: ")[2][:200] or type(error).__name__


def identity_http_pool(ca_file: Path | None) -> urllib3.PoolManager:
    """Return an HTTP connection pool for requests to identity services, with short timeouts and two retries.
    ``ca_file`` is the file with the CA certificates of the object store. Without it the default certificates are used.
    """
    return urllib3.PoolManager(
        timeout=urllib3.Timeout(connect=IDENTITY_SECONDS, read=IDENTITY_SECONDS),
        # Two retries bridge a short fault of the service. After a longer fault `PodIdentity` raises NoCredentials. Only
        # background work then repeats the whole request (see `Retries.retry_refusals`). Retry-After is ignored, because
        # MinIO asks for a minute with each 503. `allowed_methods=None` repeats a POST too, which urllib3 does not do by
        # default: the exchange of a token for an access key is a POST, and may be repeated, because it changes nothing.
        retries=urllib3.Retry(
            total=2,
            backoff_factor=0.2,
            status_forcelist=[500, 502, 503, 504],
            respect_retry_after_header=False,
            allowed_methods=None,
        ),
        cert_reqs="CERT_REQUIRED",
        ca_certs=str(ca_file) if ca_file is not None else None,
    )
