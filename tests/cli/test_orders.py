"""What `finetune suspend`, `resume` and `cancel` tell a job, and to which jobs they can't tell anything."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_cli.commands.order_commands import Order, Told, applied_by, tell
from finetune_core.errors import UserError
from tests.cli.stored import stored


def having(state: str | None = None, **policy: bool) -> dict[str, Any]:
    """Return a stored job with the status in `jobs/<state>.yaml` and with ``policy`` in its `runPolicy`."""
    found = stored(state)
    found["spec"]["runPolicy"] = {**found["spec"].get("runPolicy", {}), **policy}
    return found


@pytest.mark.parametrize(
    ("order", "policy", "fields", "sentence"),
    [
        (Order.SUSPEND, {}, {"suspend": True}, "is being suspended"),
        (Order.SUSPEND, {"suspend": True}, {}, "is suspended already"),
        (Order.RESUME, {"suspend": True}, {"suspend": False}, "goes on"),
        (Order.RESUME, {}, {}, "is not suspended"),
        (Order.CANCEL, {}, {"cancel": True}, "is being cancelled"),
        (Order.CANCEL, {"suspend": True}, {"cancel": True}, "is being cancelled"),
        (Order.CANCEL, {"cancel": True}, {}, "is being cancelled already"),
    ],
)
def test_a_job_is_told_what_it_does_not_do_yet(
    order: Order, policy: dict[str, bool], fields: dict[str, bool], sentence: str
) -> None:
    for state in (None, "running", "unschedulable"):
        told = tell(order, having(state, **policy))
        assert told.fields == fields
        assert sentence in told.sentence


@pytest.mark.parametrize("order", list(Order))
@pytest.mark.parametrize("state", ["succeeded", "failed", "gate-failed"])
def test_a_job_that_has_ended_can_not_be_told_anything(order: Order, state: str) -> None:
    with pytest.raises(UserError, match=rf"has ended \(\w+\) and can't be told to {order}"):
        tell(order, having(state))


@pytest.mark.parametrize("order", [Order.SUSPEND, Order.RESUME])
def test_a_cancelled_job_is_not_resumed(order: Order) -> None:
    with pytest.raises(UserError, match="is being cancelled and can't be told"):
        tell(order, having("running", cancel=True))


def test_a_job_of_another_version_obeys_too() -> None:
    strange = having("running")
    strange["spec"]["quantum"] = True
    strange["status"]["conditions"][0] = {}
    assert tell(Order.CANCEL, strange) == Told({"cancel": True}, "is being cancelled; its checkpoints stay")
    assert tell(Order.SUSPEND, {"metadata": {"name": "x", "namespace": "y"}}).fields == {"suspend": True}


def test_a_job_that_comes_from_git_is_recognised() -> None:
    found = stored()
    assert applied_by(found) is None
    found["metadata"]["annotations"] = {"argocd.argoproj.io/tracking-id": "x"}
    assert applied_by(found) == "Argo CD"
    found["metadata"]["annotations"] = None
    found["metadata"]["labels"] = {"kustomize.toolkit.fluxcd.io/name": "x"}
    assert applied_by(found) == "Flux"
