"""Reads and changes the FineTuneJobs of one namespace, and reads the Secrets and ConfigMaps that they name.

Problems that a user can correct are raised as UserError. The commands and the demo use `JobClient`.
"""

from __future__ import annotations

import base64
import difflib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import urllib3
from kubernetes import client
from pydantic import ValidationError

from finetune_cli.apiserver.following import CALL_TIMEOUT_SECONDS, JobFollower, Snapshot
from finetune_cli.apiserver.refusals import JOBS, ConnectionLostError, Request, explained, lost, message_of
from finetune_cli.apiserver.selection import Selection, key_of
from finetune_core.api.job import GROUP, KIND, PLURAL, VERSION, FineTuneJob
from finetune_core.api.older_specs import present_manifest
from finetune_core.contract.pod import ACCESS_KEY_ID, SECRET_ACCESS_KEY
from finetune_core.errors import UserError

FIELD_MANAGER = "finetune-cli"
"""Name under which the API server records what the CLI changes."""
MERGE_PATCH = "application/merge-patch+json"
NEAR_NAMES = 3
"""Largest number of similar names that a message suggests."""
CONFLICT = 409
TRIES = 5
"""Largest number of times that a change is tried while somebody else changes the same job."""


class JobClient:
    """Reads and changes the FineTuneJobs of one namespace, and reads the Secrets and ConfigMaps that the jobs name."""

    def __init__(self, api: client.ApiClient, namespace: str) -> None:
        self.api = api
        self.namespace = namespace
        self._custom = client.CustomObjectsApi(api)
        self._core = client.CoreV1Api(api)

    def get(self, name: str) -> FineTuneJob:
        """Return the job ``name``. Raises what `get_stored` raises, and UserError where the job does not fit this
        version of the program."""
        return parse(self.get_stored(name))

    def get_stored(self, name: str) -> dict[str, Any]:
        """Return the job ``name`` as the API server stores it. Raises UserError where the job does not exist or the
        user may not read it. Raises ConnectionLostError where the API server can't be reached or has a problem of its
        own."""
        return self._request(
            "get",
            name,
            lambda: self._custom.get_namespaced_custom_object(
                GROUP, VERSION, self.namespace, PLURAL, name, _request_timeout=CALL_TIMEOUT_SECONDS
            ),
        )

    def change(self, name: str, decide: Callable[[dict[str, Any]], dict[str, Any] | None]) -> dict[str, Any] | None:
        """Change the job ``name`` by a merge patch, and return the job as it is stored then. ``decide`` returns the
        patch for the stored job, or None where nothing is to be changed. Then nothing is written, and None is returned.

        The patch is accepted only while the job is the one that ``decide`` has seen. Where somebody else has changed
        the job meanwhile, ``decide`` is asked again. Raises what `get_stored` raises.
        """
        for _ in range(TRIES):
            stored = self.get_stored(name)
            patch = decide(stored)
            if patch is None:
                return None
            seen = {key: stored["metadata"][key] for key in ("uid", "resourceVersion")}
            body = {**patch, "metadata": {**patch.get("metadata", {}), **seen}}
            try:
                return self._request("patch", name, partial(self._patch, name, body))
            except _ConflictError:
                continue
        raise ConnectionLostError(f"{self._subject(name)} was changed by others {TRIES} times in a row")

    def _patch(self, name: str, body: dict[str, Any]) -> Any:
        return self._custom.patch_namespaced_custom_object(
            GROUP,
            VERSION,
            self.namespace,
            PLURAL,
            name,
            body,
            field_manager=FIELD_MANAGER,
            _content_type=MERGE_PATCH,
            _request_timeout=CALL_TIMEOUT_SECONDS,
        )

    def follow(
        self, name: str, notify: Callable[[str], None], *, give_up_after: float | None = None
    ) -> Iterator[FineTuneJob]:
        """Yield the job now and after each change. The iterator does not end when the job has ended. ``notify`` is
        called with a sentence when the connection is lost.

        If ``give_up_after`` is given, raises TimeoutError after that many seconds. Raises UserError when the job does
        not exist, is deleted or can't be read, or when the API server does not answer for ten minutes. Raises
        ConnectionLostError when, at the start, the API server can't be reached or has a problem of its own.
        """
        uid = ""
        for found in self.follow_all((name,), notify, give_up_after=give_up_after):
            stored = next(iter(found.values()), None)
            if stored is None:
                raise UserError(self._subject(name), "was deleted" if uid else self._missing(name))
            if uid and stored["metadata"]["uid"] != uid:
                raise UserError(self._subject(name), "was deleted and created anew; watch it again")
            uid = stored["metadata"]["uid"]
            yield parse(stored)

    def follow_all(
        self, names: tuple[str, ...], notify: Callable[[str], None], *, give_up_after: float | None = None
    ) -> Iterator[Snapshot]:
        """Yield the jobs ``names`` now and after each change, as `JobFollower.follow` does."""
        selection = Selection(self.namespace, names)
        return JobFollower(self.api, selection).follow(notify, give_up_after=give_up_after)

    def require(self, names: tuple[str, ...], found: Snapshot) -> None:
        """Raise UserError for the first of the jobs ``names`` that is not in ``found``, with similar names."""
        there = {key.name for key in found}
        for name in names:
            if name not in there:
                raise UserError(self._subject(name), self._missing(name))

    def secret(self, name: str) -> dict[str, str]:
        """Return the values of the Secret ``name`` by their keys, decoded from base64. Raises UserError where the
        Secret is missing or may not be read."""
        found = self._read(
            self._core.read_namespaced_secret,
            f"Secret {self.namespace}/{name}",
            name,
            {
                404: "does not exist; the job names it in `storage.credentialsSecretRef`",
                403: f"you may not read it; set {ACCESS_KEY_ID} and {SECRET_ACCESS_KEY}",
            },
        )
        return {key: base64.b64decode(value).decode() for key, value in (found.data or {}).items()}

    def config_map(self, name: str) -> dict[str, str]:
        """Return the values of the ConfigMap ``name`` by their keys. Raises UserError where the ConfigMap is missing or
        may not be read."""
        found = self._read(
            self._core.read_namespaced_config_map,
            f"ConfigMap {self.namespace}/{name}",
            name,
            {404: "does not exist; the job names it in `storage.caConfigMapRef`"},
        )
        return dict(found.data or {})

    def _read(self, read: Callable[..., Any], subject: str, name: str, sentences: Mapping[int, str]) -> Any:
        """Return the object ``name``, fetched with ``read``, a method of the Kubernetes client. Where the API server
        answers with an error, raises UserError about ``subject``. The text of the error is the sentence in
        ``sentences`` for the HTTP status code. Where ``sentences`` has no sentence for this code, the text is the
        message of the API server."""
        try:
            return read(name, self.namespace, _request_timeout=CALL_TIMEOUT_SECONDS)
        except client.ApiException as error:
            raise UserError(subject, sentences.get(error.status) or message_of(error)) from error
        except urllib3.exceptions.HTTPError as error:
            raise lost(error) from error

    def _request(self, verb: str, name: str, ask: Callable[[], Any]) -> dict[str, Any]:
        """Return the stored job ``name`` that ``ask`` returns. Raises _ConflictError where the API server says that the
        job has changed."""
        try:
            return dict(ask())
        except client.ApiException as error:
            if error.status == CONFLICT:
                raise _ConflictError from error
            subject = self._subject(name)
            if error.status == 404:
                # Similar names are looked up only where the job is missing.
                found = explained(error, Request(verb, JOBS, subject, missing=""))
                if str(found) == f"{subject}: ":
                    raise UserError(subject, self._missing(name)) from error
                raise found from error
            raise explained(error, Request(verb, JOBS, subject)) from error
        except urllib3.exceptions.HTTPError as error:
            raise lost(error) from error

    def _missing(self, name: str) -> str:
        """Return what a message says about the job ``name``, which does not exist: similar names, or how to look."""
        try:
            found, _ = JobFollower(self.api, Selection(self.namespace)).stored_jobs()
        except (UserError, ConnectionLostError):
            # The user may read single jobs only.
            return "does not exist"
        names = [key.name for key in found]
        near = difflib.get_close_matches(name, names, NEAR_NAMES)
        if near:
            return f"does not exist; similar names are {', '.join(near)}"
        if names:
            return "does not exist; `finetune list` shows the jobs of the namespace"
        return "does not exist, as no job does in this namespace; `finetune list -A` shows those of all namespaces"

    def _subject(self, name: str) -> str:
        return f"{KIND} {self.namespace}/{name}"


class _ConflictError(Exception):
    """Somebody else has changed the job since it was read."""


def parse(stored: dict[str, Any]) -> FineTuneJob:
    """Return ``stored``, an object as the API server returned it, as a FineTuneJob. Raises UserError where the object
    does not fit this version of the program, for example because the cluster runs a newer version."""
    try:
        return FineTuneJob.model_validate(present_manifest(stored))
    except ValidationError as error:
        where = ".".join(str(part) for part in error.errors()[0]["loc"])
        message = f"`{where}` is unknown to this version of finetune; install the version that the cluster runs"
        namespace, name = key_of(stored)
        raise UserError(f"{KIND} {namespace}/{name}", message) from error
