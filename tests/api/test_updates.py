"""In the spec of a job, only `runPolicy` and the retention of checkpoints (`keepLast`, `keepBest`) may change after the
creation, and a cancelled job stays cancelled.

The Python validation and the API server give the same answer to each update. A refused update changes nothing.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_core.validation.validate_job import validate_spec
from tests.api.mutations import MISSING, change
from tests.api.server import Server
from tests.api.strategies import SchemaPath, jobs
from tests.api.test_agreement import PLACES, document, seeded
from tests.core.jobs import quickstart

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(3600)]


def value_at(spec: dict[str, Any], path: SchemaPath) -> Any:
    """Return the value of ``spec`` at ``path``. `[]` in the path means the first item of a list, and `*` the first
    value of a map."""
    node: Any = spec
    for part in path:
        node = node[0] if part == "[]" else next(iter(node.values())) if part == "*" else node[part]
    return node


def immutable_part(spec: dict[str, Any]) -> dict[str, Any]:
    """Return a stored spec without the fields that may change after creation."""
    rest: dict[str, Any] = json.loads(json.dumps(spec))
    rest.pop("runPolicy")
    for name in ("keepLast", "keepBest"):
        rest["storage"]["checkpoint"].pop(name)
    return rest


def try_updates(server: Server, examples: int, places: list[SchemaPath]) -> Counter[str]:
    """Create jobs, change or remove one place in each, and check that API server and Python validation answer alike.
    The places are chosen from ``places``. Return how many of the updates were accepted and how many refused."""
    seen: Counter[str] = Counter()
    cases = st.sampled_from(places).flatmap(
        lambda path: st.tuples(st.just(path), jobs(path), st.one_of(st.just(MISSING), jobs(path)))
    )

    @seeded(examples)
    @given(case=cases)
    def property_of(case: tuple[SchemaPath, dict[str, Any], Any]) -> None:
        path, spec, other = case
        replacement = MISSING if other is MISSING else value_at(other, path)
        created = server.create(json.dumps(document(spec)), keep=True)
        try:
            assert created.accepted, created.message
            changed = change(created.spec, path, "replaced", PLACES[path], replacement)
            assert changed is not None
            verdict = validate_spec(changed, old_spec=created.spec)
            answer = server.update("generated", json.dumps(with_spec(created.body, changed)), keep=True)
            problems = "; ".join(map(str, verdict.problems))
            assert answer.accepted == (verdict.stored is not None), f"{answer.message}\n{problems}"
            now = server.read("generated")
            if answer.accepted:
                assert now.spec == verdict.stored
                assert immutable_part(now.spec) == immutable_part(created.spec)
            else:
                assert now.body["spec"] == created.spec
                assert now.body["metadata"]["resourceVersion"] == created.body["metadata"]["resourceVersion"]
            seen["accepted" if answer.accepted else "refused"] += 1
        finally:
            server.remove("generated")

    property_of()
    return seen


def with_spec(body: dict[str, Any], spec: Any) -> dict[str, Any]:
    """Return the stored object ``body`` with another spec."""
    return {**body, "spec": spec}


def test_updates_are_judged_alike_and_keep_what_is_fixed(server: Server) -> None:
    print(dict(try_updates(server, 60, list(PLACES))))


@pytest.mark.long
def test_many_updates(server: Server) -> None:
    print(dict(try_updates(server, 1000, list(PLACES))))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("model", {"s3": {"uri": "s3://finetune/models/other"}}, "`model` must not change after creation"),
        ("lora", None, "`lora` must not change after creation"),
        ("lora.rank", 16, "`lora` must not change after creation"),
        ("storage.runId", "again", "`storage.runId` must not change after creation"),
        ("storage.checkpoint.everySteps", None, "`storage.checkpoint.everySteps` must not change"),
        ("tracking", {"tensorBoard": {}}, "`tracking` must not change after creation"),
        ("podTemplate.labels", {"team": "b"}, "`podTemplate` must not change after creation"),
    ],
)
def test_a_refused_update_says_what_must_not_change(server: Server, path: str, value: Any, message: str) -> None:
    spec = quickstart()["spec"]
    created = server.create(json.dumps(document(spec)), keep=True)
    try:
        answer = server.update(
            "generated", json.dumps(with_spec(created.body, quickstart(path, value)["spec"])), keep=True
        )
        assert answer.status == 422
        assert message in answer.message
        assert server.read("generated").body == created.body
    finally:
        server.remove("generated")


def test_a_cancelled_job_stays_cancelled(server: Server) -> None:
    created = server.create(json.dumps(document(quickstart("runPolicy.cancel", True)["spec"])), keep=True)
    try:
        answer = server.update("generated", json.dumps(with_spec(created.body, quickstart()["spec"])), keep=True)
        assert answer.status == 422
        assert "`cancel` must not change back to false" in answer.message
        changed = quickstart("runPolicy", {"cancel": True, "maxRetries": 9, "queueName": "team-a"})
        assert server.update("generated", json.dumps(with_spec(created.body, changed["spec"])), keep=True).accepted
    finally:
        server.remove("generated")
