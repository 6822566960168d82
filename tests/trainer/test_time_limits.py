"""Time limits grow with the bytes and the nodes of a job, and are never shorter than the constant limits were."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_core.contract import Identity, RunConfig
from finetune_trainer.data.files.index import DataFile, write_index
from finetune_trainer.pod.plan import Inputs, WorkerPlan
from finetune_trainer.pod.settings import PEER_WAIT_SECONDS, Paths
from finetune_trainer.pod.time_limits import (
    LEAST_WORK_SECONDS,
    MOST_SECONDS,
    SHORTEST,
    JobSize,
    TimeLimits,
    time_limits,
)
from finetune_trainer.ranks.gang import BACKGROUND_WORK_SECONDS
from finetune_trainer.sources.inputs import job_size
from tests.trainer.conftest import StartPods
from tests.trainer.objectstore import ObjectStore
from tests.trainer.pods import run_config


class Nowhere:
    endpoint = "http://127.0.0.1:1"


MB, GB = 10**6, 10**9
TABLE: list[tuple[str, JobSize, TimeLimits]] = [
    (
        "nothing to transfer",
        JobSize(model_bytes=0, artifact_bytes=0, checkpoint_bytes=0, data_bytes=0, nodes=1),
        TimeLimits(prepare=1200, fetch=1200, export=1200, share=1200, peers=300),
    ),
    (
        "LoRA of a 7B on one node, with 1.5 MB of rows",
        JobSize(
            model_bytes=14 * GB, artifact_bytes=GB // 20, checkpoint_bytes=GB // 4, data_bytes=3 * MB // 2, nodes=1
        ),
        TimeLimits(prepare=1650, fetch=1210, export=1203.5, share=1650, peers=300),
    ),
    (
        "Full of a 7B on two nodes",
        JobSize(model_bytes=14 * GB, artifact_bytes=14 * GB, checkpoint_bytes=81 * GB, data_bytes=0, nodes=2),
        TimeLimits(prepare=1620, fetch=4440, export=2180, share=4440, peers=860),
    ),
    (
        "merged model of a 70B on four nodes",
        JobSize(model_bytes=140 * GB, artifact_bytes=141 * GB, checkpoint_bytes=2 * GB, data_bytes=0, nodes=4),
        TimeLimits(prepare=5400, fetch=1280, export=11070, share=11070, peers=5900),
    ),
    (
        "Full of a 7B on forty nodes, which share the store",
        JobSize(model_bytes=14 * GB, artifact_bytes=14 * GB, checkpoint_bytes=81 * GB, data_bytes=0, nodes=40),
        TimeLimits(prepare=1620, fetch=7680, export=2180, share=7680, peers=1420),
    ),
    (
        "a million conversations on two nodes",
        JobSize(model_bytes=GB, artifact_bytes=0, checkpoint_bytes=0, data_bytes=GB, nodes=2),
        TimeLimits(prepare=21230, fetch=1200, export=1200, share=21230, peers=380),
    ),
    (
        "more than a day",
        JobSize(model_bytes=10**15, artifact_bytes=10**15, checkpoint_bytes=10**15, data_bytes=10**15, nodes=99),
        TimeLimits(
            prepare=MOST_SECONDS, fetch=MOST_SECONDS, export=MOST_SECONDS, share=MOST_SECONDS, peers=MOST_SECONDS
        ),
    ),
]
SIZES = st.builds(
    JobSize,
    model_bytes=st.integers(0, 10**14),
    artifact_bytes=st.integers(0, 10**14),
    checkpoint_bytes=st.integers(0, 10**14),
    data_bytes=st.integers(0, 10**14),
    nodes=st.integers(1, 99),
)
FIELDS = [field.name for field in fields(TimeLimits)]


@pytest.mark.parametrize(("case", "size", "expected"), TABLE, ids=[case for case, *_ in TABLE])
def test_the_limits_of_a_job(case: str, size: JobSize, expected: TimeLimits) -> None:
    found = time_limits(size)
    assert {name: getattr(found, name) for name in FIELDS} == pytest.approx(
        {name: getattr(expected, name) for name in FIELDS}
    ), case


@given(SIZES)
def test_no_limit_is_shorter_than_the_constant_one_or_longer_than_a_day(size: JobSize) -> None:
    found = time_limits(size)
    assert found.peers >= PEER_WAIT_SECONDS
    assert min(found.prepare, found.fetch, found.export, found.share) >= LEAST_WORK_SECONDS
    assert found.share == max(found.prepare, found.fetch, found.export)
    assert max(found.share, found.peers) <= MOST_SECONDS <= BACKGROUND_WORK_SECONDS


@given(SIZES, st.sampled_from([field.name for field in fields(JobSize)]))
def test_a_limit_never_falls_when_a_job_grows(size: JobSize, field: str) -> None:
    small, large = time_limits(size), time_limits(replace(size, **{field: getattr(size, field) + 1}))
    assert all(getattr(small, name) <= getattr(large, name) for name in FIELDS)


@pytest.mark.parametrize(
    ("changes", "artifact", "checkpoint"),
    [
        ({"lora": {"rank": 8, "alpha": 8}}, 100, 100),
        ({"lora": {"rank": 400, "alpha": 8}}, 1000, 1000),
        ({"lora": {}}, 100, 100),
        ({"storage__artifact": "Both"}, 1100, 100),
        ({"model__addedTokens": ["<a>"], "storage__artifact": "Merged"}, 2100, 100),
        ({"method": "Full"}, 1000, 6000),
    ],
)
def test_the_sizes_of_a_job_are_measured(
    changes: dict[str, Any], artifact: int, checkpoint: int, tmp_path: Path
) -> None:
    """The rows of a volume are measured where they lie. A mix is measured once, by its sources."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(bytes(900))
    (tmp_path / "model" / "config.json").write_bytes(bytes(100))
    rows = tmp_path / "volume.jsonl"
    rows.write_bytes(bytes(70))
    (tmp_path / "data-0").mkdir()
    write_index(tmp_path / "data-0", [DataFile(rows, "volume.jsonl")])
    config = RunConfig.model_validate(run_config(Nowhere(), "sizes", **changes))  # type: ignore[arg-type]
    wanted = JobSize(
        model_bytes=1000, artifact_bytes=artifact, checkpoint_bytes=checkpoint, data_bytes=140, nodes=config.world.nodes
    )
    data, model = tmp_path / "data-0", tmp_path / "model"
    assert job_size(config, Inputs(model=model, train=data, validation=rows)) == wanted
    assert job_size(config, Inputs(model=model, train=tmp_path, mix=[data], test=rows)) == wanted
    found = job_size(config, Inputs(model=model, adapter=data, train=data, validation=rows))
    assert found.model_bytes == 1070
    assert found.checkpoint_bytes == max(checkpoint, 6 * 70)
    rows.unlink()
    assert job_size(config, Inputs(model=model, train=data, validation=rows)).data_bytes == 0


def test_the_limits_of_a_plan_reach_the_workers(tmp_path: Path) -> None:
    size = JobSize(model_bytes=140 * GB, artifact_bytes=0, checkpoint_bytes=0, data_bytes=0, nodes=4)
    plan = WorkerPlan(
        paths=Paths(),
        identity=Identity(namespace="default", name="t", uid="u", attempt=1, pod_name="p", pod_uid="p", node_rank=0),
        config=RunConfig.model_validate(run_config(Nowhere(), "limits")),  # type: ignore[arg-type]
        inputs=Inputs(model=tmp_path, train=tmp_path),
        folder=tmp_path,
        time_limits=time_limits(size),
    )
    read = WorkerPlan.model_validate_json(plan.to_json())
    assert read.time_limits == time_limits(size)
    assert read.time_limits != SHORTEST


def test_the_launcher_measures_the_job_and_tells_the_workers(store: ObjectStore, pods: StartPods) -> None:
    attempt = pods(run_config(store, "limits", world__nodes=1, optimization__maxSteps=1), forked=True)
    assert attempt.wait() == [0], attempt.output
    plan = WorkerPlan.model_validate_json((attempt.pods[0].scratch / "attempt" / "plan.json").read_text())
    size = job_size(plan.config, plan.inputs)
    assert min(size.model_bytes, size.data_bytes, size.artifact_bytes, size.checkpoint_bytes) > 0
    assert plan.time_limits == time_limits(size)
    assert plan.time_limits.share > SHORTEST.share
