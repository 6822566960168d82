"""Only a 409 with the reason AlreadyExists means that an object exists. Any other 409 means that nothing was done.

When two requests count against the same ResourceQuota at once, the API server may answer a creation with 409 and the
reason Conflict. An operator that took this for "the ConfigMap exists" would start pods that wait for the ConfigMap for
ever.
"""

from __future__ import annotations

import ast
import inspect
from pathlib import Path
from typing import Any

import pytest

from finetune_operator.kube.api_errors import ApiError
from finetune_operator.kube.client import KubeClient
from tests.operator.builders import NOW, REPOSITORY, job_manifest
from tests.operator.model import ModelServer
from tests.operator.operators import KEY, reconciler
from tests.operator.scenarios import SCENARIOS, Scenario, essence, run_to_end

REASONS = ("Conflict", "", "AlreadyExists", "TooManyRequests")
"""Reasons of the 409 that answers a creation in these tests. Nothing is created, whatever the reason. With the reason
AlreadyExists it is as if somebody had deleted the existing object right after the answer."""
CREATIONS = ("create_config_map", "create_network_policy", "create_child", "create_pod")
LIVES = ("crashes, then succeeds", "waits for a bucket, a broken pod and a lost one, then succeeds")


class Conflicting(ModelServer):
    """Answers one creation with 409, and does not create the object of this creation."""

    def __init__(self, scenario: Scenario, number: int, reason: str) -> None:
        """Answer creation ``number``, counted from 1, with 409 and ``reason``."""
        super().__init__(job_manifest(runPolicy=scenario.policy), NOW)
        self.number, self.reason, self.asked = number, reason, 0

    def _conflict(self) -> None:
        self.asked += 1
        if self.asked == self.number:
            raise ApiError(409, self.reason, "Operation cannot be fulfilled on resourcequotas")

    async def create_config_map(self, manifest: dict[str, Any]) -> dict[str, Any]:
        self._conflict()
        return await super().create_config_map(manifest)

    async def create_network_policy(self, manifest: dict[str, Any]) -> dict[str, Any]:
        self._conflict()
        return await super().create_network_policy(manifest)

    async def create_child(self, manifest: dict[str, Any]) -> dict[str, Any]:
        self._conflict()
        return await super().create_child(manifest)

    async def create_pod(self, manifest: dict[str, Any]) -> dict[str, Any]:
        self._conflict()
        return await super().create_pod(manifest)


@pytest.mark.parametrize("reason", REASONS)
@pytest.mark.parametrize("name", LIVES)
async def test_a_creation_that_is_answered_with_any_409_changes_nothing(name: str, reason: str) -> None:
    scenario = SCENARIOS[name]
    expected = essence(await run_to_end(scenario))
    number, asked = 1, 1
    while number <= asked:
        server = Conflicting(scenario, number, reason)
        found = essence(await run_to_end(scenario, server=server))
        assert found == expected, f"creation {number} was answered with 409 {reason}"
        number, asked = number + 1, server.asked
    assert asked >= 4


def test_only_the_reason_already_exists_says_that_a_name_is_taken() -> None:
    answers = [ApiError(409, reason, "") for reason in REASONS]
    assert [answer.reason for answer in answers if answer.is_name_taken] == ["AlreadyExists"]
    assert [answer.reason for answer in answers if answer.is_conflict] == ["Conflict", "", "TooManyRequests"]
    assert not ApiError(422, "AlreadyExists", "").is_name_taken


def test_only_one_module_compares_an_answer_with_409() -> None:
    """Every other module must choose between `is_name_taken` and `is_conflict`."""
    package = REPOSITORY / "operator/finetune_operator"
    found = {str(path.relative_to(package)) for path in package.rglob("*.py") if _compares_with_409(path)}
    assert found == {"kube/api_errors.py"}


def _compares_with_409(path: Path) -> bool:
    return any(
        isinstance(node, ast.Compare)
        and any(
            (isinstance(part, ast.Constant) and part.value == 409)
            or (isinstance(part, ast.Attribute) and part.attr == "CONFLICT")
            for part in ast.walk(node)
        )
        for node in ast.walk(ast.parse(path.read_text()))
    )


def test_every_creation_of_the_life_of_a_job_is_among_those_that_are_answered_with_409() -> None:
    """Three creations are left out: the certificate Secret and the EndpointSlice do not belong to a job, and nothing
    depends on an event."""
    known = {name for name, _ in inspect.getmembers(KubeClient, inspect.isfunction) if name.startswith("create_")}
    assert known - {"create_event", "create_endpoint_slice", "create_secret"} == set(CREATIONS)


REFUSALS = [
    ApiError(400, "", "no"),
    ApiError(403, "Forbidden", "exceeded quota"),
    ApiError(404, "NotFound", "no"),
    ApiError(413, "", "too large"),
    ApiError(418, "", "a webhook says no"),
    ApiError(422, "Invalid", "no"),
    ApiError(500, "InternalError", 'failed calling webhook "guard": connection refused'),
]


@pytest.mark.parametrize("error", REFUSALS, ids=str)
@pytest.mark.parametrize("creation", CREATIONS)
async def test_whatever_object_is_refused_the_job_says_why_and_goes_on_when_it_may(
    creation: str, error: ApiError
) -> None:
    server = ModelServer(job_manifest(runPolicy={"preflight": "Run" if creation == "create_pod" else "Skip"}), NOW)
    allowed = getattr(server, creation)

    async def refused(manifest: dict[str, Any]) -> dict[str, Any]:
        raise error

    setattr(server, creation, refused)
    operator = reconciler(server)
    for _ in range(6):
        await operator.reconcile(KEY)
        server.pass_time(11)
    (accepted,) = (item for item in server.job["status"]["conditions"] if item["type"] == "Accepted")
    assert accepted["status"] == "False"
    assert error.message in accepted["message"]
    setattr(server, creation, allowed)
    for _ in range(4):
        server.pass_time(301)
        await operator.reconcile(KEY)
    assert server.pods or server.checks
