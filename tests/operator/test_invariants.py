"""Rules that hold for every order of events, even if the operator crashes in between.

Every attempt is counted once, before the next attempt is created. A job that has ended creates nothing. Every change of
a job's state is a transition of the table in `decide/states.py`.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest

from finetune_core.contract import Outcome
from finetune_core.names import attempt_name
from finetune_operator import reconcile
from finetune_operator.decide.states import TRANSITIONS, JobState
from tests.operator.builders import NOW, UID, job_manifest, result
from tests.operator.model import CrashedError, Manifest, ModelServer
from tests.operator.operators import KEY, reconciler
from tests.operator.test_job_states import recording

DONE = result(Outcome.COMPLETED, with_artifact=True)


class WatchedServer(ModelServer):
    """A model server that checks the operator's bookkeeping at each write of the status and each creation of a
    PyTorchJob, and makes the operator crash by chance after any write."""

    def __init__(self, *arguments: Any, chance: random.Random, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._chance = chance
        self.accounted: dict[int, str] = {}

    def _wrote(self, what: str) -> None:
        self.writes.append(what)
        if what == "status":
            self._check_status()
        if what.startswith("create ") and " configmap " not in what and " networkpolicy " not in what:
            self._check_creation(what.removeprefix("create "))
        if self._chance.random() < 0.1:
            raise CrashedError(what)

    def _check_status(self) -> None:
        attempts = self.job["status"]["attempts"]
        for past in attempts["recent"]:
            known = self.accounted.setdefault(past["number"], past["verdict"])
            assert known == past["verdict"], f"attempt {past['number']} was accounted twice"
        current = attempts.get("current")
        verdicts = list(self.accounted.values())
        assert attempts["charged"] == verdicts.count("Charged")
        assert attempts["free"] == verdicts.count("Free")
        assert attempts["started"] == len(verdicts) + (current is not None)
        assert sorted(self.accounted) == list(range(1, len(verdicts) + 1))
        assert verdicts[:-1].count("Permanent") + verdicts[:-1].count("Succeeded") == 0, "something followed the end"

    def _check_creation(self, name: str) -> None:
        number = self.job["status"]["attempts"]["started"]
        assert name == attempt_name("quickstart", UID, number)
        assert self.job["status"]["attempts"]["current"]["number"] == number
        assert sorted(self.accounted) == list(range(1, number)), "the attempt before was not accounted"
        assert list(self.children) == [name], "two attempts exist"
        for pod in self.pods:
            assert pod["child"] == name, f"a pod of {pod['child']} still saves"
        assert len(self.created) == len(set(self.created)), "an attempt was created twice"


def likely_events(chance: random.Random) -> list[tuple[Callable[[ModelServer], Any], float]]:
    """Return the events that may happen between two reconciles, each with its weight."""

    def scale(server: ModelServer) -> None:
        for child in server.children.values():
            child["spec"]["pytorchReplicaSpecs"]["Worker"]["replicas"] = 1

    def delete(server: ModelServer) -> None:
        for name in list(server.children):
            del server.children[name]
            server.end_pods_of(name)

    def refuse(server: ModelServer) -> None:
        server.refuses = chance.choice(("", "", "exceeded quota"))

    def held(server: ModelServer) -> bool:
        return any(child["spec"].get("runPolicy", {}).get("suspend") for child in server.children.values())

    return [
        (lambda server: server.pass_time(chance.choice((1, 5, 30, 300))), 12),
        (lambda server: server.end_pods(chance.choice((1, 75, 137, 143))), 3),
        (lambda server: server.end_pods(0, DONE), 0.3),
        (lambda server: server.end_pods(64), 0.1),
        (lambda server: server.ask_deletion(chance.choice((0, 1))), 2),
        (lambda server: server.set_policy(suspend=chance.random() < 0.3), 2),
        (lambda server: server.created and server.set_policy(cancel=True), 0.05),
        (lambda server: server.set_policy(activeDeadlineSeconds=chance.choice((60, 3600, 36000))), 0.3),
        (lambda server: server.set_policy(pendingDeadlineSeconds=chance.choice((60, 3600))), 0.3),
        (lambda server: not held(server) and server.children and server.hold_child(), 1),
        (lambda server: held(server) and server.release_child(), 2),
        (scale, 0.3),
        (delete, 0.3),
        (refuse, 0.5),
    ]


@pytest.mark.parametrize("seed", range(20))
async def test_every_attempt_is_accounted_once_and_before_the_next(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Choose events by chance, and check the states of the job. `WatchedServer` checks the attempts meanwhile."""
    states = [JobState.NEW]
    monkeypatch.setattr(reconcile, "decide", recording(states))
    chance = random.Random(seed)
    server = WatchedServer(_job(), NOW, chance=chance, saving=chance.choice((0, 20, 85)))
    operator = reconciler(server)
    actions, weights = zip(*likely_events(chance), strict=True)
    for _ in range(300):
        try:
            await operator.reconcile(KEY)
        except CrashedError:
            operator = reconciler(server)
            continue
        if _settled(server):
            break
        chance.choices(actions, weights)[0](server)
    created = list(server.created)
    if _settled(server):
        for _ in range(3):
            server.pass_time(30)
            await _reconcile_without_crash(server)
        assert server.created == created
    assert server.accounted, "no attempt was ever accounted"
    assert all(following in TRANSITIONS[state] for state, following in pairwise(states)), states


def _job() -> Manifest:
    return job_manifest(runPolicy={"maxRetries": 100})


def _settled(server: ModelServer) -> bool:
    conditions = server.job.get("status", {}).get("conditions", [])
    return any(item["type"] == "Succeeded" and item["status"] != "Unknown" for item in conditions)


async def _reconcile_without_crash(server: ModelServer) -> None:
    for _ in range(20):
        try:
            await reconciler(server).reconcile(KEY)
        except CrashedError:
            continue
        return
    raise AssertionError("the operator crashed twenty times in a row")
