"""The status of a job is written although a stored field of its spec has another type than in the present CRD.

A server on this machine answers as the API server does: server-side apply fails for such an object, and a patch does
not.
"""

from __future__ import annotations

from typing import Any

import pytest
from aiohttp import web

from finetune_operator.kube.api_errors import ApiError
from finetune_operator.kube.client import KubeClient
from finetune_operator.queue.key import Key
from tests.operator.report_servers import api_configuration

APPLY, PATCH = "application/apply-patch+yaml", "application/json-patch+json"
OTHER_TYPE = "failed to create typed live object (team/job): .spec.dataset.task: expected map, got &{None}"


async def written(answers: dict[str, tuple[int, str]]) -> tuple[str | ApiError, list[tuple[str, Any]]]:
    """Write a status to a server that answers a request with the status code and the message that ``answers`` holds for
    the request's content type. Return the new resourceVersion or the error, and the content type and the body of each
    request."""
    requests: list[tuple[str, Any]] = []

    async def answer(request: web.BaseRequest) -> web.Response:
        requests.append((request.content_type, await request.json()))
        code, message = answers[request.content_type]
        return web.json_response({"message": message, "metadata": {"resourceVersion": "8"}}, status=code)

    runner = web.ServerRunner(web.Server(answer))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    client = KubeClient(api_configuration(f"http://127.0.0.1:{runner.addresses[0][1]}"), lambda: None)
    try:
        return await client.apply_status(Key("team", "job"), "7", {"conditions": []}), requests
    except ApiError as error:
        return error, requests
    finally:
        await client.close()
        await runner.cleanup()


async def test_the_status_is_replaced_by_a_patch_that_holds_the_resource_version() -> None:
    version, requests = await written({APPLY: (500, OTHER_TYPE), PATCH: (200, "")})
    assert version == "8"
    assert [kind for kind, _ in requests] == [APPLY, PATCH]
    assert requests[1][1] == [
        {"op": "replace", "path": "/metadata/resourceVersion", "value": "7"},
        {"op": "add", "path": "/status", "value": {"conditions": []}},
    ]


@pytest.mark.parametrize(
    ("code", "message"), [(500, "etcdserver: leader changed"), (409, OTHER_TYPE), (422, "invalid")]
)
async def test_after_any_other_answer_nothing_else_is_sent(code: int, message: str) -> None:
    error, requests = await written({APPLY: (code, message)})
    assert isinstance(error, ApiError)
    assert error.status == code
    assert [kind for kind, _ in requests] == [APPLY]
