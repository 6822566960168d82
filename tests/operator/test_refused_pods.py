"""Where the API server refuses the pods of an attempt because of the namespace, the status says what to change.

The texts are those of Kubernetes 1.34, as training-operator puts them into its warning events.
"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_operator import messages
from finetune_operator.observe.waiting import why_attempt_waits

BEGINNING = 'FailedCreatePod: Error creating: pods "job-1-worker-0" is forbidden: '
CASES = [
    (
        BEGINNING
        + 'violates PodSecurity "baseline:latest": non-default capabilities (container "pytorch" must not include'
        ' "IPC_LOCK" in securityContext.capabilities.add)',
        messages.CAPABILITY_REFUSED,
    ),
    (
        BEGINNING + 'violates PodSecurity "restricted:latest": unrestricted capabilities (container "pytorch" must not'
        ' include "IPC_LOCK" in securityContext.capabilities.add)',
        messages.CAPABILITY_REFUSED,
    ),
    (
        BEGINNING + "failed quota: team: must specify limits.cpu for: pytorch",
        messages.CPU_LIMIT_NEEDED,
    ),
    (
        BEGINNING + "failed quota: team: must specify limits.cpu for: pytorch; requests.cpu for: proxy",
        messages.CPU_LIMIT_NEEDED,
    ),
    (
        'FailedCreatePod: Error creating: Pod "job-1-worker-0" is invalid: spec.containers[0].resources.requests:'
        ' Invalid value: "8": must be less than or equal to cpu limit of 500m',
        messages.CPU_LIMIT_NEEDED,
    ),
    (
        BEGINNING + "cpu max limit to request ratio per Container is 2, but no limit is specified or limit is 0",
        messages.CPU_LIMIT_NEEDED,
    ),
]


@pytest.mark.parametrize(("warning", "explanation"), CASES)
def test_the_status_says_what_to_change(warning: str, explanation: str) -> None:
    assert why_attempt_waits([], 2, warning) == f"{explanation} ({warning})"
    assert explanation in (messages.CAPABILITY_REFUSED, messages.CPU_LIMIT_NEEDED)


@pytest.mark.parametrize(
    "warning",
    [
        BEGINNING + "exceeded quota: team, requested: limits.cpu=8, used: limits.cpu=0, limited: limits.cpu=4",
        BEGINNING + "failed quota: team: must specify limits.memory for: pytorch",
        BEGINNING + 'violates PodSecurity "restricted:latest": seccompProfile',
    ],
)
def test_another_refusal_is_told_as_it_is(warning: str) -> None:
    assert why_attempt_waits([], 2, warning) == warning


@given(st.text(max_size=300))
def test_any_warning_is_told(warning: str) -> None:
    assert warning in why_attempt_waits([], 1, warning)
