"""No text, wherever it comes from, leads a request of the operator to another path of the API server.

The client's methods send real requests to a server on this machine, which records each path as it arrives. Only this
path counts, because the client and its libraries resolve dots and escapes in URLs before they send a request.
"""

from __future__ import annotations

import asyncio
import inspect
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import pytest
from aiohttp import web
from hypothesis import example, given, settings
from hypothesis import strategies as st

import finetune_operator
from finetune_core.api.job import NAME_MAX_LENGTH, NAME_PATTERN, NAMESPACE_PATTERN
from finetune_core.contract import report_path
from finetune_core.contract.stock_reports import SERVER_URL_VARIABLE, client_environment
from finetune_operator.kube.client import KubeClient
from finetune_operator.objects.labels import JOB_NAME, job_key
from finetune_operator.queue.key import Key
from tests.operator.report_servers import api_configuration

HOSTILE = (
    "..",
    ".",
    "",
    "a/../b",
    "../../secrets/finetune-operator-certificates",
    "..%2F..%2Fsecrets%2Fx",
    "%2e%2e",
    "x?watch=true",
    "x#",
    "x\n",
    "x\r\nHost: elsewhere",
    "x\x00",
    "x;y",
    "x\\..\\y",
    "//evil.example",
    "{name}",
    "é/..",
    "x" * 8192,
)
"""Texts that could lead a request to another path if they were put into a URL as they are."""

Call = Callable[[KubeClient, str, str], Awaitable[object]]


def _manifest(namespace: str, name: str) -> dict[str, Any]:
    return {"metadata": {"namespace": namespace, "name": name}}


async def _all_keys(client: KubeClient, namespace: str) -> list[Key]:
    return [job.key async for job in client.list_jobs(namespace)]


CALLS: dict[str, Call] = {
    "get_job": lambda client, namespace, name: client.get_job(Key(namespace, name)),
    "list_jobs": lambda client, namespace, _: _all_keys(client, namespace),
    "apply_status": lambda client, namespace, name: client.apply_status(Key(namespace, name), "1", {}),
    "get_child": lambda client, namespace, name: client.get_child(namespace, name),
    "create_child": lambda client, namespace, name: client.create_child(_manifest(namespace, name)),
    "delete_child": lambda client, namespace, name: client.delete_child(namespace, name, "uid"),
    "get_config_map": lambda client, namespace, name: client.get_config_map(namespace, name),
    "create_config_map": lambda client, namespace, name: client.create_config_map(_manifest(namespace, name)),
    "delete_config_map": lambda client, namespace, name: client.delete_config_map(namespace, name, "uid"),
    "get_network_policy": lambda client, namespace, name: client.get_network_policy(namespace, name),
    "create_network_policy": lambda client, namespace, name: client.create_network_policy(_manifest(namespace, name)),
    "delete_network_policy": lambda client, namespace, name: client.delete_network_policy(namespace, name, "uid"),
    "list_pods": lambda client, namespace, name: client.list_pods(namespace, name),
    "create_pod": lambda client, namespace, name: client.create_pod(_manifest(namespace, name)),
    "delete_pod": lambda client, namespace, name: client.delete_pod(namespace, name, "uid"),
    "annotate_pod": lambda client, namespace, name: client.annotate_pod(namespace, name, "uid", {}),
    "list_warnings": lambda client, namespace, name: client.list_warnings(namespace, name),
    "create_event": lambda client, namespace, name: client.create_event(namespace, _manifest(namespace, name)),
    "review_token": lambda client, namespace, name: client.review_token(namespace, name),
    "get_secret": lambda client, namespace, name: client.get_secret(namespace, name),
    "create_secret": lambda client, namespace, name: client.create_secret(_manifest(namespace, name)),
    "update_secret": lambda client, namespace, name: client.update_secret(_manifest(namespace, name)),
    "get_endpoint_slice": lambda client, namespace, name: client.get_endpoint_slice(namespace, name),
    "create_endpoint_slice": lambda client, namespace, name: client.create_endpoint_slice(_manifest(namespace, name)),
    "update_endpoint_slice": lambda client, namespace, name: client.update_endpoint_slice(_manifest(namespace, name)),
}
"""A call of each method of the client with a namespace and a name."""


@asynccontextmanager
async def recording_server(paths: list[str]) -> AsyncIterator[KubeClient]:
    """Start a server that answers every request and appends its raw path to ``paths``; yield a client of it."""

    async def answer(request: web.BaseRequest) -> web.Response:
        paths.append(request.raw_path)
        return web.json_response({"items": [], "metadata": {"resourceVersion": "1"}, "status": {}})

    # The server accepts long paths. Otherwise it would refuse such a request before it records the path.
    runner = web.ServerRunner(web.Server(answer, max_line_size=1 << 20))
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    client = KubeClient(api_configuration(f"http://127.0.0.1:{runner.addresses[0][1]}"), lambda: None)
    try:
        yield client
    finally:
        await client.close()
        await runner.cleanup()


def test_the_table_calls_every_method_of_the_client() -> None:
    methods = {name for name, _ in inspect.getmembers(KubeClient, inspect.isfunction) if not name.startswith("_")}
    assert methods - {"close"} == set(CALLS)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_a_request_has_the_given_names_as_segments_of_its_path_or_is_never_sent(call: Call) -> None:
    texts = st.one_of(st.sampled_from(HOSTILE), st.text(max_size=40), st.from_regex(r"[a-z0-9-]{1,20}", fullmatch=True))
    paths: list[str] = []

    def segments(namespace: str, name: str) -> list[str] | None:
        """Return the segments of the path that a call sends, each unquoted on its own; None where it sends nothing."""
        paths.clear()
        try:
            runner.run(_send(call, client, namespace, name))
        except ValueError:
            assert paths == []
            return None
        (path,) = paths
        return [unquote(segment) for segment in path.partition("?")[0].split("/")]

    with asyncio.Runner() as runner:
        server = recording_server(paths)
        client = runner.run(server.__aenter__())
        plain = segments("team", "quickstart")
        assert plain is not None

        @given(namespace=texts, name=texts)
        @example(namespace="team", name="..")
        @example(namespace="..", name="quickstart")
        @example(namespace="", name="quickstart")
        @example(namespace="team", name="")
        @settings(max_examples=30, database=None)
        def check(namespace: str, name: str) -> None:
            given = {"team": namespace, "quickstart": name}
            assert segments(namespace, name) in (None, [given.get(segment, segment) for segment in plain])

        try:
            check()
        finally:
            runner.run(server.__aexit__(None, None, None))


async def _send(call: Call, client: KubeClient, namespace: str, name: str) -> None:
    await call(client, namespace, name)


@pytest.mark.parametrize("text", HOSTILE)
def test_a_key_exists_only_for_names_that_the_api_server_accepts(text: str) -> None:
    for namespace, name in ((text, "quickstart"), ("team", text)):
        assert Key.parse(namespace, name) is None
        with pytest.raises(ValueError, match="possible FineTuneJob"):
            Key(namespace, name)
    assert job_key("team", {JOB_NAME: text}) is None
    assert Key.parse("n" * 63, "j" * 40) is not None
    assert (Key.parse("n" * 64, "j"), Key.parse("n", "j" * 41), Key.parse("n", "1j")) == (None, None, None)


@given(
    namespace=st.from_regex(NAMESPACE_PATTERN, fullmatch=True),
    name=st.from_regex(NAME_PATTERN, fullmatch=True).filter(lambda name: len(name) <= NAME_MAX_LENGTH),
    attempt=st.integers(1, 999),
)
def test_the_urls_of_reports_need_no_quoting(namespace: str, name: str, attempt: int) -> None:
    assert Key.parse(namespace, name) is not None
    stock = client_environment("https://operator:8443", namespace, name)[SERVER_URL_VARIABLE]
    for path in (report_path(namespace, name, attempt), stock.removeprefix("https://operator:8443")):
        assert quote(path) == path
        assert {namespace, name} <= set(path.split("/"))


def test_one_module_of_the_operator_builds_paths_of_the_api_server() -> None:
    package = Path(finetune_operator.__file__).parent
    builders = {path.name for path in package.rglob("*.py") if re.search(r"f?\"/apis?/", path.read_text())}
    senders = {path.name for path in package.rglob("*.py") if re.search(r"param_serialize|call_api", path.read_text())}
    assert (builders, senders) == ({"resources.py"}, {"client.py"})
