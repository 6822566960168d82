"""The NetworkPolicy of an attempt admits only connections from pods of that attempt. It stays at least until the last
pod of the attempt has ended."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_core.names import attempt_name
from tests.operator.builders import NOW, UID, job_manifest
from tests.operator.model import ModelServer
from tests.operator.operators import KEY, reconciler

FIRST, SECOND = attempt_name("quickstart", UID, 1), attempt_name("quickstart", UID, 2)


async def begun(server: ModelServer) -> None:
    for _ in range(5):
        await reconciler(server).reconcile(KEY)


async def second_attempt(server: ModelServer) -> None:
    server.end_pods(1)
    for _ in range(20):
        outcome = await reconciler(server).reconcile(KEY)
        server.pass_time(outcome.after or 0)


def nonce_of(server: ModelServer, attempt: str) -> str:
    return str(server.config_maps[attempt]["data"]["nonce"])


async def test_only_pods_of_the_same_attempt_are_admitted() -> None:
    server = ModelServer(job_manifest(), NOW)
    await begun(server)
    (policy,) = server.network_policies.values()
    selected = {"matchLabels": {"finetune.dev/job-uid": UID, "finetune.dev/attempt": "1"}}
    assert policy["spec"] == {
        "podSelector": selected,
        "policyTypes": ["Ingress"],
        "ingress": [{"from": [{"podSelector": selected}]}],
    }
    for pod in server.pods:
        assert selected["matchLabels"].items() <= pod["metadata"]["labels"].items()
    (owner,) = policy["metadata"]["ownerReferences"]
    assert (owner["uid"], owner["controller"]) == (UID, True)


async def test_the_policy_exists_before_the_first_pod() -> None:
    server = ModelServer(job_manifest(), NOW)
    await begun(server)
    assert server.writes.index(f"create networkpolicy {FIRST}") < server.writes.index(f"create {FIRST}")


async def test_the_next_attempt_has_another_policy_and_another_nonce() -> None:
    server = ModelServer(job_manifest(), NOW)
    await begun(server)
    first = nonce_of(server, FIRST)
    await second_attempt(server)
    assert (list(server.network_policies), list(server.children)) == ([SECOND], [SECOND])
    assert len({"", first, nonce_of(server, SECOND)}) == 3


@pytest.mark.parametrize("order", [{"cancel": True}, {"suspend": True}, {"activeDeadlineSeconds": 1}], ids=str)
async def test_pods_that_save_their_last_checkpoint_are_still_protected(order: dict[str, Any]) -> None:
    server = ModelServer(job_manifest(), NOW, saving=60)
    await begun(server)
    server.pass_time(5)
    server.set_policy(**order)
    with_pods = 0
    for _ in range(20):
        outcome = await reconciler(server).reconcile(KEY)
        with_pods += bool(server.pods and not server.children)
        assert not server.pods or list(server.network_policies) == [FIRST]
        server.pass_time(min(outcome.after or 5, 5))
    assert with_pods
    assert not server.pods
    if "suspend" in order:
        server.set_policy(suspend=False)
        for _ in range(5):
            await reconciler(server).reconcile(KEY)
        assert list(server.network_policies) == list(server.children) == [SECOND]
    else:
        assert (server.network_policies, server.children) == ({}, {})


async def test_an_operator_that_starts_again_keeps_the_nonce_of_the_attempt() -> None:
    server = ModelServer(job_manifest(), NOW, refuses="quota")
    await begun(server)
    before = nonce_of(server, FIRST)
    server.refuses = ""
    server.pass_time(600)
    await begun(server)
    assert (nonce_of(server, FIRST), list(server.children)) == (before, [FIRST])


async def test_no_attempt_starts_under_a_policy_of_somebody_else() -> None:
    server = ModelServer(job_manifest(), NOW)
    foreign = {"metadata": {"name": FIRST, "uid": "foreign", "ownerReferences": []}, "spec": {"podSelector": {}}}
    server.network_policies[FIRST] = foreign
    await begun(server)
    assert (server.children, server.network_policies) == ({}, {FIRST: foreign})
    accepted = next(item for item in server.job["status"]["conditions"] if item["type"] == "Accepted")
    assert (accepted["status"], accepted["reason"]) == ("False", "NameConflict")
    assert "NetworkPolicy" in accepted["message"]


async def test_an_installation_without_policies_sends_no_request_for_them() -> None:
    server = ModelServer(job_manifest(), NOW)
    server.network_policies = None  # type: ignore[assignment]  # so that every request for a policy fails
    without = reconciler(server, network_policies=False)
    for _ in range(5):
        await without.reconcile(KEY)
    server.end_pods(1)
    for _ in range(20):
        outcome = await without.reconcile(KEY)
        server.pass_time(outcome.after or 0)
    assert list(server.children) == [SECOND]
