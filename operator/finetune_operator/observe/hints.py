"""Reads the warning events about pods that do not start: a Secret that can't be mounted or a quota shows only there.
Called by `reconcile` while an attempt waits; the newest warning becomes part of its conditions' messages."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

from finetune_core.api.status import CurrentAttempt
from finetune_operator.decide.attempts import World
from finetune_operator.kube.client import KubeClient
from finetune_operator.objects.observations import PodObservation
from finetune_operator.queue.memory import JobMemory
from finetune_operator.queue.retryable import EVENTS_AFTER_SECONDS, EVENTS_EVERY_SECONDS


class HintReader:
    """Keeps `JobMemory.hint` fresh."""

    def __init__(self, cluster: KubeClient, clock: Callable[[], float]) -> None:
        """Read at most every ten seconds of ``clock``."""
        self._cluster = cluster
        self._clock = clock

    async def read(self, memory: JobMemory, namespace: str, current: CurrentAttempt | None, world: World) -> None:
        """Update the hint: the newest warning about what has been waiting for some seconds, or nothing."""
        if current is None or current.cause is not None or world.held:
            memory.hint = ""
            return
        if memory.hint_read_at is not None and self._clock() - memory.hint_read_at < EVENTS_EVERY_SECONDS:
            return
        pods = [pod for pod in world.pods if pod.attempt == current.number]
        waiting = [pod.uid for pod in pods if not pod.running and not pod.ended]
        if (world.now - current.start_time).total_seconds() < EVENTS_AFTER_SECONDS or (pods and not waiting):
            memory.hint = ""
            return
        # Without pods it is the child that could not make them.
        uids = waiting or ([world.child.uid] if world.child else [])
        memory.hint_read_at = self._clock()
        memory.hint = await self._newest_warning(namespace, uids)

    async def read_pod(self, memory: JobMemory, namespace: str, pod: PodObservation | None, now: datetime) -> None:
        """Update the hint for one pod that is waited for: the newest warning about it, once it is some seconds old."""
        if pod is None or pod.running or pod.ended or (now - pod.created_at).total_seconds() < EVENTS_AFTER_SECONDS:
            memory.hint = ""
        elif memory.hint_read_at is None or self._clock() - memory.hint_read_at >= EVENTS_EVERY_SECONDS:
            memory.hint_read_at = self._clock()
            memory.hint = await self._newest_warning(namespace, [pod.uid])

    async def _newest_warning(self, namespace: str, uids: list[str]) -> str:
        for uid in uids:
            warnings = await self._cluster.list_warnings(namespace, uid)
            if warnings:
                newest = max(warnings, key=_event_time)
                return f"{newest.get('reason', '')}: {newest.get('note', '')}"
        return ""


def _event_time(event: Mapping[str, Any]) -> str:
    """Return when an event last happened, as text that sorts; old and new senders fill different fields."""
    series = event.get("series") or {}
    return str(
        series.get("lastObservedTime")
        or event.get("deprecatedLastTimestamp")
        or event.get("eventTime")
        or event["metadata"]["creationTimestamp"]
    )
