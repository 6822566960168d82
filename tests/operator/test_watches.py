"""The watches, which kopf runs, go on after an answer with status 429, whatever its `Retry-After` says.

`watches.watch` and kopf are the real ones. The API server is a stand-in on the loopback.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from aiohttp import web

from finetune_core.api import API_VERSION, GROUP, KIND, PLURAL, VERSION
from finetune_operator.kube.resources import PODS, PYTORCHJOBS
from finetune_operator.process.health import WatchActivity
from finetune_operator.queue.memory import Memory
from finetune_operator.queue.work_queue import WorkQueue
from finetune_operator.watches import watch
from tests.operator.operators import KEY

VERBS = ["get", "list", "watch", "patch"]
CLUSTER_KINDS = {"customresourcedefinitions": "CustomResourceDefinition", "namespaces": "Namespace"}
"""Kinds that kopf itself watches, to notice new namespaces and new kinds."""
APIS: dict[str, dict[str, str]] = {
    "api/v1": {PODS.plural: "Pod", "namespaces": "Namespace"},
    "apis/apiextensions.k8s.io/v1": {"customresourcedefinitions": "CustomResourceDefinition"},
    f"apis/{GROUP}/{VERSION}": {PLURAL: KIND},
    f"apis/{PYTORCHJOBS.group}/{PYTORCHJOBS.version}": {PYTORCHJOBS.plural: "PyTorchJob"},
}
"""The kinds that the stand-in serves, by the path of their API group."""


class ApiServer:
    """A stand-in for the API server with one FineTuneJob. It answers the first two requests for a list of FineTuneJobs
    with 429 and a given `Retry-After`."""

    def __init__(self, retry_after: str) -> None:
        self.retry_after = retry_after
        self.lists = 0
        """Number of requests to list FineTuneJobs, including those that were answered with 429."""

    async def answer(self, request: web.Request) -> web.StreamResponse:
        path = request.path.strip("/")
        if path in ("api", "apis"):
            return web.json_response(_groups(path))
        if path in APIS:
            return web.json_response({"kind": "APIResourceList", "resources": _resources(APIS[path])})
        if "watch" in request.query:
            stream = web.StreamResponse()
            await stream.prepare(request)
            await asyncio.Event().wait()
        items: list[dict[str, Any]] = []
        if path.endswith(f"/{PLURAL}"):
            self.lists += 1
            if self.lists <= 2:
                refusal = {"kind": "Status", "code": 429, "reason": "TooManyRequests", "message": "overloaded"}
                return web.json_response(refusal, status=429, headers={"Retry-After": self.retry_after})
            metadata = {"name": KEY.name, "namespace": KEY.namespace, "uid": "u", "resourceVersion": "3"}
            items = [{"apiVersion": API_VERSION, "kind": KIND, "metadata": metadata}]
        return web.json_response({"kind": "List", "metadata": {"resourceVersion": "5"}, "items": items})


def _groups(path: str) -> dict[str, Any]:
    if path == "api":
        return {"versions": ["v1"]}
    groups = []
    for known in APIS:
        kind, _, name = known.partition("/")
        if kind == "apis":
            group, version = name.split("/")
            entry = {"groupVersion": name, "version": version}
            groups.append({"name": group, "versions": [entry], "preferredVersion": entry})
    return {"kind": "APIGroupList", "groups": groups}


def _resources(kinds: dict[str, str]) -> list[dict[str, Any]]:
    return [
        {
            "name": plural,
            "singularName": kind.lower(),
            "kind": kind,
            "namespaced": plural not in CLUSTER_KINDS,
            "verbs": VERBS,
        }
        for plural, kind in kinds.items()
    ]


async def _token(_name: str) -> str:
    return "Bearer token"


@asynccontextmanager
async def watching(server: ApiServer) -> AsyncIterator[tuple[WorkQueue, asyncio.Task[None]]]:
    """Run the operator's watches against ``server``; yield the queue, and the task that ends if a watch ends."""
    application = web.Application()
    application.router.add_route("*", "/{path:.*}", server.answer)
    runner = web.AppRunner(application, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    host, port = runner.addresses[0][:2]
    configuration = SimpleNamespace(
        host=f"http://{host}:{port}",
        ssl_ca_cert=None,
        verify_ssl=True,
        cert_file=None,
        key_file=None,
        get_api_key_with_prefix=_token,
    )
    queue = WorkQueue()
    task = asyncio.create_task(
        watch(queue=queue, memory=Memory(), activity=WatchActivity(), configuration=configuration, namespaces=())
    )
    try:
        yield queue, task
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        await runner.cleanup()


@pytest.mark.parametrize("retry_after", ["1", "0", "nan", "inf", "Tue, 24 Nov 2026 12:00:07 GMT", "9" * 5000])
async def test_a_watch_goes_on_after_a_429_whatever_its_retry_after_is(retry_after: str) -> None:
    server = ApiServer(retry_after)
    async with watching(server) as (queue, watches):
        found = asyncio.create_task(queue.get())
        await asyncio.wait([found, watches], return_when=asyncio.FIRST_COMPLETED)
        assert not watches.done(), "a watch has ended"
        assert await found == KEY
    assert server.lists == 3
