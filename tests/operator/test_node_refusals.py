"""An attempt is judged Free if it ends because a kubelet or a container runtime refused to start a pod.

`test_failed_nodes.py` tests which of these attempts are charged nevertheless, because many attempts before ended alike.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from datetime import UTC, datetime

import pytest

from finetune_operator.decide.verdict import Verdict
from finetune_operator.objects.observations import START_ERRORS, ContainerObservation, ContainerState
from tests.operator.builders import NOW, pod
from tests.operator.kubelet_refusals import KUBELET_REFUSALS
from tests.operator.verdicts import judged, ruled

WAITING = ContainerObservation(state=ContainerState.WAITING, reason="ContainerCreating")


@pytest.mark.parametrize("reason", sorted({*KUBELET_REFUSALS, "OutOfexample.com/fpga", "AReasonOfAnotherVersion"}))
def test_a_pod_that_a_kubelet_refuses_is_never_charged_whatever_the_reason(reason: str) -> None:
    refused = pod(1, phase="Failed", reason_=reason, message_="Pod was rejected: the node ...", container=None)
    ruling = judged([pod(0), refused])
    assert ruling is not None
    assert (ruling.verdict, ruling.reason, ruling.node) == (Verdict.FREE, "NodeRefused", "node-1")
    assert ruling.message == f"node node-1 did not start pod job-1-worker-1: {reason}: Pod was rejected: the node ..."
    if reason != "Evicted":
        assert ruled([pod(0), replace(refused, container=WAITING)]) == ("Free", "NodeRefused")


@pytest.mark.parametrize("reason", ["NodeShutdown", "Preempting"])
def test_a_pod_that_its_kubelet_ended_for_the_sake_of_the_node_is_not_called_unstarted(reason: str) -> None:
    ended = replace(pod(1, exit_code=137, phase="Failed"), reason=reason, message="Pod was terminated: ...")
    ruling = judged([pod(0), ended])
    assert ruling is not None
    assert (ruling.verdict, ruling.reason) == (Verdict.FREE, "NodeRefused")
    assert ruling.message == f"node node-1 ended pod job-1-worker-1: {reason}: Pod was terminated: ..."


@pytest.mark.parametrize("reason", sorted(START_ERRORS))
def test_a_container_that_its_runtime_could_not_start_is_never_charged_whatever_the_exit_code(reason: str) -> None:
    for code, phase in itertools.product((1, 127, 128, 137), ("Pending", "Running", "Failed")):
        assert ruled([pod(0), pod(1, exit_code=code, reason=reason, phase=phase)]) == ("Free", "NodeRefused")


@pytest.mark.parametrize("reason", sorted(START_ERRORS))
def test_a_container_that_its_runtime_goes_on_refusing_ends_the_attempt_after_two_minutes(reason: str) -> None:
    waiting = ContainerObservation(state=ContainerState.WAITING, reason=reason, message="unresolvable CDI device")
    stuck = pod(1, phase="Pending", container=waiting)
    assert ruled([pod(0), replace(stuck, start_error_seconds=119)]) is None
    ruling = judged([pod(0), replace(stuck, start_error_seconds=120)])
    assert ruling is not None
    assert (ruling.verdict, ruling.reason, ruling.node) == (Verdict.FREE, "NodeRefused", "node-1")
    assert ruling.message.endswith(f"{reason}: unresolvable CDI device")
    deleted = pod(1, phase="Pending", container=waiting, deleted=1, start_error_seconds=120)
    assert ruled([pod(0), deleted]) == ("Free", "PodDeleted")


def test_a_container_that_ended_without_a_start_is_recognised_by_its_times() -> None:
    """The kubelet shows the start of a container that never ran as the beginning of Unix time."""
    ended = pod(1, exit_code=128, reason="Error", message="no such device")
    assert ended.container is not None
    unstarted = replace(ended.container, started_at=datetime.fromtimestamp(0, UTC))
    assert ruled([pod(0), replace(ended, container=unstarted)]) == ("Free", "NodeRefused")
    ran = replace(ended.container, started_at=NOW)
    assert ruled([pod(0), replace(ended, container=ran)]) == ("Charged", "Crashed")
