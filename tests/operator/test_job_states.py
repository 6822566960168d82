"""Walks through the operator's state machine. A walk is a series of events that leads a job from state to state.

Each walk runs the whole reconciler against the model API server. A walk may take only transitions of `TRANSITIONS`, and
together the walks take every transition.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest

from finetune_core.api import FineTuneJobStatus
from finetune_core.contract import Outcome
from finetune_operator import reconcile
from finetune_operator.decide.decision import Decision
from finetune_operator.decide.state_machine import decide
from finetune_operator.decide.states import FINAL_STATES, MEANINGS, TRANSITIONS, JobState
from finetune_operator.observe.observation import JobObservation
from tests.operator.builders import NOW, former_run, job_manifest, result
from tests.operator.model import ModelServer
from tests.operator.operators import KEY, reconciler

DONE = result(Outcome.COMPLETED, with_artifact=True)

Action = Callable[[ModelServer], object]
"""A change of the cluster by anyone but the operator, for example a person or a node."""
Event = tuple[Action, ...]
"""The changes of the cluster between two reconciles, in their order; may be empty."""


def sets(**policy: Any) -> Action:
    """Return the action of a person who sets the fields ``policy`` of `runPolicy`."""
    return lambda server: server.set_policy(**policy)


def ends(exit_code: int, message: str = "") -> Action:
    """Return the action that ends every running training container with ``exit_code`` and the termination message
    ``message``."""
    return lambda server: server.end_pods(exit_code, message)


def passes(seconds: float) -> Action:
    """Return the action that moves the clock on by ``seconds``."""
    return lambda server: server.pass_time(seconds)


def deletes_a_pod(server: ModelServer) -> None:
    """Ask for the deletion of the pod with index 1. The pod stays until its container ends."""
    assert server.ask_deletion(1)


def holds(server: ModelServer) -> None:
    """Suspend the PyTorchJob as Kueue does."""
    assert server.hold_child()


def releases(server: ModelServer) -> None:
    """Resume the PyTorchJob as Kueue does; new pods start if the server lets pods run."""
    assert server.release_child()


def starts_pods(server: ModelServer) -> None:
    """Let all waiting pods run, and let every later pod run as soon as it is created."""
    server.pods_run = True
    for pod in server.pods:
        (container,) = pod["status"]["containerStatuses"]
        if "waiting" in container["state"]:
            container["state"] = {"running": {"startedAt": server.now.isoformat()}}


def lets_pods_wait(server: ModelServer) -> None:
    """Let every pod that is created from now on wait instead of run."""
    server.pods_run = False


def passes_check(server: ModelServer) -> None:
    """End the preflight pod without findings."""
    assert server.end_check(0)


def finds_the_artifact(server: ModelServer) -> None:
    """End the preflight pod, which found the artifact of a former job with the same training."""
    assert server.end_check(0, former_run(done=True))


def breaks_check(server: ModelServer) -> None:
    """End the preflight pod with a crash, after which another try follows."""
    assert server.end_check(1)


@dataclass(frozen=True, kw_only=True)
class Walk:
    """A job, the events of its life, and the states that it must go through."""

    events: Sequence[Event]
    states: str
    """Names of the states that the reconciles find, in order and without the first state, New."""
    policy: dict[str, Any] = field(default_factory=dict)
    pods_run: bool = True
    """Whether pods run as soon as they are created."""
    one_reconcile: bool = False
    """Whether only one reconcile follows each event. Otherwise reconciles follow until the operator asks for no further
    reconcile without a pause."""


CHECKED, SUSPENDED, CANCELLED = {"preflight": "Run"}, {"suspend": True}, {"cancel": True}
NOTHING: Event = ()
RESUMED = (sets(suspend=False),)

WALKS = {
    # walks in which something happens before attempt 1
    "a check passes": Walk(
        policy=CHECKED, events=[(passes_check, passes(10)), NOTHING], states="Checking Opened Running"
    ),
    "a check finds that everything is trained": Walk(
        policy=CHECKED, events=[(finds_the_artifact,)], states="Checking Succeeded"
    ),
    "a job is applied suspended, and checked once it is resumed": Walk(
        policy=CHECKED | SUSPENDED, events=[RESUMED], states="Suspended Checking"
    ),
    "a job is applied suspended, and cancelled": Walk(
        policy=SUSPENDED, events=[(sets(cancel=True),)], states="Suspended Failed"
    ),
    "a job is applied cancelled": Walk(policy=CANCELLED, events=[], states="Failed"),
    "a job is applied suspended, and resumed": Walk(policy=SUSPENDED, events=[RESUMED], states="Suspended Opened"),
    "a check is cancelled between two tries": Walk(
        policy=CHECKED, events=[(breaks_check,), (sets(cancel=True),)], states="Checking Failed"
    ),
    "a check is suspended between two tries": Walk(
        policy=CHECKED, events=[(breaks_check,), (sets(suspend=True),)], states="Checking Suspended"
    ),
    "a check is suspended while its pod runs": Walk(
        policy=CHECKED, events=[(sets(suspend=True),)], states="Checking CleaningUp Suspended"
    ),
    "a check is cancelled while its pod runs": Walk(
        policy=CHECKED, events=[(sets(cancel=True),)], states="Checking CleaningUp Failed"
    ),
    "a check is skipped while its pod runs": Walk(
        policy=CHECKED, events=[(sets(preflight="Skip"),)], states="Checking CleaningUp Opened"
    ),
    # walks in which an attempt goes on
    "pods wait, then run": Walk(pods_run=False, events=[NOTHING, (starts_pods,)], states="Opened Pending Running"),
    "a queue holds an attempt that was just opened": Walk(events=[(holds,), (releases,)], states="Opened Held Running"),
    "a queue holds an attempt whose pods wait": Walk(
        pods_run=False, events=[NOTHING, (holds,), (releases,)], states="Opened Pending Held Pending"
    ),
    "a queue holds an attempt that runs": Walk(events=[NOTHING, (holds,)], states="Opened Running Held"),
    "a queue holds and releases an attempt between two reconciles": Walk(
        events=[NOTHING, (passes(5), holds, lets_pods_wait, releases)], states="Opened Running Pending"
    ),
    # walks with the end of an attempt, and what follows
    "an attempt fails, and the next follows after the back-off": Walk(
        events=[NOTHING, (deletes_a_pod,), (ends(1),), (passes(1),), (passes(300),)],
        states="Opened Running Ending CleaningUp BackingOff Opened",
    ),
    "a job is suspended and resumed during the back-off": Walk(
        events=[NOTHING, (ends(1),), (passes(1),), (sets(suspend=True),), RESUMED],
        states="Opened Running CleaningUp BackingOff Suspended BackingOff",
    ),
    "a job is cancelled during the back-off": Walk(
        events=[NOTHING, (ends(1),), (passes(1),), (sets(cancel=True),)],
        states="Opened Running CleaningUp BackingOff Failed",
    ),
    "a person deletes a pod of an attempt that succeeds all the same": Walk(
        events=[NOTHING, (deletes_a_pod,), (ends(0, DONE),)], states="Opened Running Ending Succeeded"
    ),
    "a person deletes a pod of an attempt whose other pod finds a bad row": Walk(
        events=[NOTHING, (deletes_a_pod,), (passes(1), ends(64))], states="Opened Running Ending Failed"
    ),
    "an attempt is suspended": Walk(
        events=[NOTHING, (sets(suspend=True),), (passes(1),)], states="Opened Running CleaningUp Suspended"
    ),
    "an attempt is cancelled": Walk(
        events=[NOTHING, (sets(cancel=True),), (passes(1),)], states="Opened Running CleaningUp Failed"
    ),
    # a walk with a single reconcile after each event
    "a check is suspended, and resumed in the moment in which its pod is removed": Walk(
        policy=CHECKED,
        events=[NOTHING, (sets(suspend=True),), RESUMED],
        states="Checking CleaningUp Checking",
        one_reconcile=True,
    ),
}

REACHED = {
    "Opened": Walk(events=[], states="Opened"),
    "Pending": Walk(events=[NOTHING], states="Opened Pending", pods_run=False),
    "Running": Walk(events=[NOTHING], states="Opened Running"),
    "Held": Walk(events=[NOTHING, (holds,)], states="Opened Running Held"),
}
"""Walks that end in a state in which an attempt exists, by the name of this state."""

ENDS = {
    "Ending": (deletes_a_pod,),
    "CleaningUp": (sets(suspend=True),),
    "Succeeded": (ends(0, DONE),),
    "Failed": (ends(64),),
}
"""Events that, while pods run, lead a job into a further state, by the name of this further state."""


async def walked(walk: Walk, monkeypatch: pytest.MonkeyPatch) -> list[JobState]:
    """Run ``walk`` and return the job's states: first New, then each state that differs from the one before."""
    states = [JobState.NEW]
    server = ModelServer(job_manifest(runPolicy=walk.policy), NOW, pods_run=walk.pods_run)
    monkeypatch.setattr(reconcile, "decide", recording(states))
    operator = reconciler(server)
    for event in (NOTHING, *walk.events):
        for action in event:
            action(server)
        for _ in range(20):
            if (await operator.reconcile(KEY)).after != 0 or walk.one_reconcile:
                break
    return states


def recording(states: list[JobState]) -> Callable[[FineTuneJobStatus, JobObservation], Decision]:
    """Return a function to replace `decide`. It makes the decisions that `decide` makes, and records their states.

    The state of a decision is appended to ``states`` if it differs from the last recorded state.
    """

    def decide_and_record(stored: FineTuneJobStatus, seen: JobObservation) -> Decision:
        decision = decide(stored, seen)
        if decision.state is not states[-1]:
            states.append(decision.state)
        return decision

    return decide_and_record


def attempt_walks() -> dict[str, Walk]:
    """Return walks by name, one for each pair of a state in `REACHED` and an end in `ENDS`."""
    walks = {}
    for state, reached in REACHED.items():
        for end, event in ENDS.items():
            before: Event = {"Pending": (starts_pods,), "Held": (releases, passes(1))}.get(state, ())
            events = [*reached.events, (*before, *event)]
            name = f"an attempt goes from {state} to {end}"
            walks[name] = Walk(
                events=events, states=f"{reached.states} {end}", policy=reached.policy, pods_run=reached.pods_run
            )
    return walks


ALL_WALKS = WALKS | attempt_walks()


@pytest.mark.parametrize("name", ALL_WALKS)
async def test_a_walk_goes_through_the_states_of_the_table(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    walk = ALL_WALKS[name]
    states = await walked(walk, monkeypatch)
    assert " ".join(states[1:]) == walk.states
    for state, following in pairwise(states):
        assert following in TRANSITIONS[state]


def test_the_walks_take_every_transition_of_the_table() -> None:
    taken = {step for walk in ALL_WALKS.values() for step in pairwise(["New", *walk.states.split()])}
    assert taken == {(str(state), str(other)) for state, others in TRANSITIONS.items() for other in others}


def test_every_state_has_a_meaning_and_only_the_final_ones_have_no_transition() -> None:
    assert list(MEANINGS) == list(TRANSITIONS) == list(JobState)
    assert {state for state, others in TRANSITIONS.items() if not others} == FINAL_STATES
