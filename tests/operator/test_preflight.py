"""Decisions about the preflight check before attempt 1.

Final findings end the job. Three tries that could not be carried out because of the job itself, with no result between
them, end the job too. A crash or a loss of the pod does not end the job.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from finetune_core.api import FineTuneJobStatus
from finetune_core.api.run_policy import RunPolicySpec
from finetune_core.api.status import PreflightStatus, UsageStatus
from finetune_core.contract import Outcome
from finetune_core.contract.preflight_result import (
    Finding,
    FindingKind,
    FoundArtifact,
    FoundRun,
    InputSizes,
    PlannedNeeds,
    PreflightResult,
)
from finetune_core.resolve import resolve
from finetune_operator.decide.decision import Action, Decision
from finetune_operator.decide.state_machine import decide
from finetune_operator.decide.states import JobState
from finetune_operator.objects.disk_space import model_room, sizes_of_inputs
from finetune_operator.objects.observations import (
    ContainerObservation,
    ContainerState,
    PodObservation,
    parse_preflight_pod,
)
from finetune_operator.objects.preflight_pod import PreflightSpec, build_preflight_config_map, build_preflight_pod
from finetune_operator.observe.observation import JobObservation, PreflightObservation
from tests.operator.builders import NOW, at, job, pod

NONE = PreflightResult(findings=[]).to_termination_message()
PLAN = PreflightSpec(number=3, name="quickstart-1234-preflight-3", image="trainer:1")


def found(*kinds: FindingKind) -> str:
    findings = [Finding(kind=kind, message=f"field: {kind}") for kind in kinds]
    return PreflightResult(findings=findings).to_termination_message()


def seen(
    *pods: PodObservation, enabled: bool = True, warning: str = "", policy: RunPolicySpec | None = None, now: Any = NOW
) -> JobObservation:
    """Return an observation of a job without an attempt, whose preflight pods are ``pods``."""
    return JobObservation(
        now=now,
        nodes=2,
        policy=policy or RunPolicySpec(),
        child=None,
        child_uid="",
        pods=[],
        checkpoints=[],
        usage=UsageStatus(),
        waiting_for="",
        final_result=None,
        warning=warning,
        preflight=PreflightObservation(enabled=enabled, pods=pods),
    )


def check(record: PreflightStatus | None, given: JobObservation) -> Decision:
    """Return the operator's decision for a job without an attempt, whose `status.preflight` is ``record``."""
    return decide(FineTuneJobStatus(preflight=record), given)


def record(**changes: Any) -> PreflightStatus:
    return PreflightStatus(start_time=at(-30)).model_copy(update=changes)


def waits(reason: str, message: str = "") -> ContainerObservation:
    return ContainerObservation(state=ContainerState.WAITING, reason=reason, message=message)


def test_the_record_is_written_before_a_pod_exists() -> None:
    begun = check(None, seen())
    assert (begun.action, begun.preflight) == (Action.NONE, PreflightStatus(start_time=NOW))
    assert check(begun.preflight, seen()).action is Action.CREATE_PREFLIGHT_POD


@pytest.mark.parametrize(
    ("ended", "verdict", "sentence"),
    [
        (pod(1, exit_code=0, message=NONE), "Passed", ""),
        (pod(1, exit_code=0), "Passed", ""),
        (pod(1, exit_code=64, message=found(FindingKind.FINAL)), "Impossible", "field: Final"),
        (pod(1, exit_code=64, message=found(FindingKind.FINAL, FindingKind.OUTSIDE)), "Impossible", "field: Final"),
        (pod(1, exit_code=75, message=found(FindingKind.OUTSIDE)), "Waiting", "field: Outside"),
        (pod(1, exit_code=1, message="Traceback\n  ...\nKeyError: 'x'\n"), "Waiting", "KeyError: 'x'; `runPolicy.pre"),
        (pod(1, exit_code=2, message="usage: ...\nerror: unrecognized arguments"), "Waiting", "exit code 2"),
        (pod(1, exit_code=64, message="not a result"), "Waiting", "exit code 64"),
        (pod(1, exit_code=137, reason="Error"), "Waiting", "exit code 137 and left"),
        (pod(1, exit_code=137, reason="OOMKilled", memory_limit="1Gi"), "Waiting", "at its memory limit of 1Gi"),
        (pod(1, exit_code=128, reason="StartError", message="exec: x"), "Waiting", "128 (StartError) and left no res"),
        (pod(1, phase="Failed", reason_="Evicted", message_="low on disk", container=None), "Waiting", "low on disk"),
        (pod(1, deleted=-1, grace=2), "Waiting", "was deleted"),
        (pod(1, exit_code=143, deleted=-1, grace=2), "Waiting", "was deleted"),
        (pod(1, exit_code=64, message=found(FindingKind.FINAL), deleted=-1, grace=2), "Impossible", "field: Final"),
    ],
)
def test_a_try_is_judged_by_its_findings_alone(ended: PodObservation, verdict: str, sentence: str) -> None:
    step = check(record(), seen(ended))
    assert step.preflight is not None
    assert (step.action, step.preflight.tries, step.preflight.verdict) == (Action.NONE, 1, verdict)
    assert sentence in step.preflight.message
    assert (step.preflight.next_try_time == at(10)) == (verdict == "Waiting")
    assert step.missing == (step.preflight.message if verdict == "Waiting" else "")


def test_the_sizes_of_model_and_data_are_recorded() -> None:
    message = PreflightResult(findings=[], sizes=InputSizes(model_bytes=7, data_bytes=5)).to_termination_message()
    step = check(record(), seen(pod(1, exit_code=0, message=message)))
    assert step.preflight is not None
    assert (step.preflight.model_bytes, step.preflight.data_bytes) == (7, 5)
    assert sizes_of_inputs(step.preflight) == InputSizes(model_bytes=7, data_bytes=5)


def test_the_plan_is_told_with_the_verdict() -> None:
    planned = PlannedNeeds(gpu_memory_bytes=7, memory_bytes=5 * GIB, cpus=8)
    message = PreflightResult(findings=[], planned=planned).to_termination_message()
    step = check(record(), seen(pod(1, exit_code=0, message=message)))
    assert step.preflight is not None
    assert (step.preflight.verdict, step.planned) == ("Passed", planned)
    assert check(record(), seen(pod(1, exit_code=0, message=NONE))).planned is None


GIB = 1 << 30


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ({"resources": {"scratch": {"size": "13.9Gi"}}}, "resources.scratch.size: must be at least 14Gi for the files"),
        ({"resources": {"scratch": {"size": "15G", "storageClassName": "nvme"}}}, "resources.scratch.size: must be at"),
        ({"resources": {"scratch": {"size": 14 * GIB}}}, ""),
        (
            {"storage": {"uri": "s3://bucket/runs", "cache": {"ephemeral": {"size": "9Gi"}}}},
            "storage.cache.ephemeral.size: mus",
        ),
        (
            {
                "storage": {"uri": "s3://bucket/runs", "cache": {"ephemeral": {"size": "14Gi"}}},
                "resources": {"scratch": {"size": "1Gi"}},
            },
            "",
        ),
        (
            {
                "model": {"volume": {"claimName": "models", "path": "m"}},
                "resources": {"scratch": {"size": "1Gi"}},
            },
            "",
        ),
        ({}, ""),
    ],
)
def test_a_volume_that_is_too_small_for_the_model_ends_the_job_before_gpus_are_asked_for(
    spec: dict[str, Any], sentence: str
) -> None:
    sizes = InputSizes(model_bytes=14 * GIB, data_bytes=GIB)
    message = PreflightResult(findings=[], sizes=sizes).to_termination_message()
    given = seen(pod(1, exit_code=0, message=message))
    given = replace(given, preflight=replace(given.preflight, model_room=model_room(job(**spec))))
    step = check(record(), given)
    assert step.preflight is not None
    assert step.preflight.verdict == ("Impossible" if sentence else "Passed")
    assert step.preflight.message.startswith(sentence)


def test_a_job_whose_artifact_is_there_needs_no_room_for_the_model() -> None:
    artifact = FoundArtifact(run=1, bytes=3, manifest_sha256="0" * 64, outcome=Outcome.COMPLETED)
    former = FoundRun(run_id="uid-1", uid="uid-1", time=NOW.isoformat(), step=5, artifact=artifact)
    sizes = InputSizes(model_bytes=14 * GIB, data_bytes=GIB)
    message = PreflightResult(findings=[], sizes=sizes, found=former).to_termination_message()
    given = seen(pod(1, exit_code=0, message=message))
    room = model_room(job(resources={"scratch": {"size": "1Gi"}}))
    step = check(record(), replace(given, preflight=replace(given.preflight, model_room=room)))
    assert step.preflight is not None
    assert step.preflight.verdict == "Passed"


def test_a_trainer_image_that_tells_no_sizes_is_understood() -> None:
    step = check(record(), seen(pod(1, exit_code=0, message=NONE)))
    assert sizes_of_inputs(step.preflight) is None


def running_for(seconds: float, number: int = 1, **changes: Any) -> PodObservation:
    container = ContainerObservation(state=ContainerState.RUNNING, started_at=at(-seconds))
    return pod(number, container=container, **({"created_at": at(-seconds)} | changes))


def killed_for_memory(number: int) -> PodObservation:
    return pod(number, exit_code=137, reason="OOMKilled", memory_limit="1Gi")


def past_its_deadline(number: int) -> PodObservation:
    """Return a preflight pod that the kubelet ended at the pod's own deadline, while no operator worked."""
    ended = pod(number, exit_code=137, reason="Error", reason_="DeadlineExceeded")
    assert ended.container is not None
    return replace(ended, container=replace(ended.container, started_at=at(-1700)))


def test_a_node_whose_clock_is_behind_ends_no_check() -> None:
    record = PreflightStatus(start_time=at(-20))
    given = seen(running_for(3600, created_at=at(-20)))
    decision = check(record, given)
    assert (decision.preflight, decision.action) == (record, Action.NONE)


def test_a_pause_that_a_leader_with_a_wrong_clock_recorded_is_not_waited_for() -> None:
    record = PreflightStatus(start_time=at(-20), tries=1, verdict="Waiting", message="m")
    waits = check(record.model_copy(update={"next_try_time": at(300)}), seen())
    assert (waits.action, waits.wait_seconds) == (Action.NONE, 300)
    tries = check(record.model_copy(update={"next_try_time": at(86400)}), seen())
    assert tries.action is Action.CREATE_PREFLIGHT_POD


ABORTED = {
    "it is killed for memory": (killed_for_memory, "at its memory limit of 1Gi"),
    "it runs on": (lambda number: running_for(240, number), "had not ended after 240 s"),
    "it runs on until the deadline of the pod": (past_its_deadline, "had not ended after 240 s"),
}


@pytest.mark.parametrize("name", ABORTED)
def test_a_check_that_can_not_be_carried_out_three_times_in_a_row_ends_the_job_with_a_sentence(name: str) -> None:
    make, sentence = ABORTED[name]
    current = record()
    for number in (1, 2, 3):
        step = check(current, seen(make(number)))
        assert step.preflight is not None
        current = step.preflight
        assert (current.tries, current.aborted) == (number, number)
        assert sentence in current.message
        assert current.verdict == ("Waiting" if number < 3 else "Impossible")
    ended = check(current, seen()).end
    assert ended is not None
    assert (ended.reason, ended.message.startswith("3 tries of the preflight check failed")) == ("BadInput", True)
    assert "`runPolicy.preflight: Skip`" in ended.message


def test_tries_that_were_carried_out_begin_the_row_anew_and_lost_pods_do_not() -> None:
    twice = record(tries=2, aborted=2, verdict="Waiting")
    for ended, aborted in (
        (pod(3, exit_code=75, message=found(FindingKind.OUTSIDE)), 0),
        (pod(3, deleted=-1, grace=2), 2),
        (pod(3, exit_code=1), 2),
    ):
        step = check(twice, seen(ended))
        assert step.preflight is not None
        assert (step.preflight.aborted, step.preflight.verdict) == (aborted, "Waiting")


def test_a_check_that_runs_and_a_pod_that_pulls_its_image_are_given_time() -> None:
    assert check(record(), seen(running_for(239))).preflight == record()
    pulling = pod(1, phase="Pending", container=waits("ContainerCreating"), created_at=at(-1700))
    assert check(record(), seen(pulling)).preflight == record()
    late = pod(1, phase="Failed", reason_="DeadlineExceeded", container=waits("ContainerCreating"))
    step = check(record(), seen(late))
    assert step.preflight is not None
    assert (step.preflight.aborted, step.preflight.verdict) == (0, "Waiting")


def test_the_pauses_grow_from_10_s_to_5_min() -> None:
    pauses = []
    for tries in range(8):
        ended = pod(tries + 1, exit_code=75, message=found(FindingKind.OUTSIDE))
        step = check(record(tries=tries), seen(ended))
        assert step.preflight is not None
        assert step.preflight.next_try_time is not None
        pauses.append((step.preflight.next_try_time - NOW).total_seconds())
    assert pauses == [10, 20, 40, 80, 160, 300, 300, 300]


@pytest.mark.parametrize("verdict", ["Passed", "Impossible", "Waiting"])
def test_what_is_left_of_a_try_goes_before_anything_else_happens(verdict: str) -> None:
    ended = pod(1, exit_code=0)
    step = check(record(tries=1, verdict=verdict), seen(ended))
    assert (step.action, list(step.preflight_pods)) == (Action.REMOVE_PREFLIGHT_PODS, [ended])
    going = replace(ended, delete_deadline=NOW)
    assert check(record(tries=1, verdict=verdict), seen(going)).action is not Action.REMOVE_PREFLIGHT_PODS


def test_a_verdict_is_acted_on() -> None:
    assert check(record(tries=1, verdict="Passed"), seen()).action is Action.OPEN_ATTEMPT
    ended = check(record(tries=1, verdict="Impossible", message="no rows"), seen())
    assert (ended.state, ended.end and ended.end.message) == (JobState.FAILED, "no rows")
    waiting = record(tries=1, verdict="Waiting", message="no bucket", next_try_time=at(4))
    step = check(waiting, seen())
    assert (step.action, step.wait_seconds, step.missing) == (Action.NONE, 4, "no bucket")
    step = check(waiting, seen(now=at(4)))
    assert (step.action, step.number_of_try, step.missing) == (Action.CREATE_PREFLIGHT_POD, 2, "no bucket")


@pytest.mark.parametrize(
    ("stuck", "hint", "sentence"),
    [
        (pod(1, container=None, unschedulable='persistentvolumeclaim "data" not found'), "", 'claim "data" not found'),
        (pod(1, container=waits("ImagePullBackOff", "x: ErrImagePull: not found")), "", "image can't be pulled: not"),
        (pod(1, container=waits("ContainerCreating")), 'FailedMount: secret "keys" not found', '"keys" not found'),
        (pod(1, container=waits("CreateContainerConfigError", "no key")), "", "CreateContainerConfigError: no key"),
    ],
)
def test_a_pod_that_is_stuck_names_what_it_waits_for(stuck: PodObservation, hint: str, sentence: str) -> None:
    step = check(record(), seen(stuck, warning=hint))
    assert step.action is Action.NONE
    assert sentence in step.missing
    fresh = replace(stuck, created_at=at(-2))
    assert check(record(), seen(fresh, warning=hint)).missing == "", "a pod needs seconds to start"


def test_an_earlier_cause_stays_until_a_try_says_otherwise() -> None:
    step = check(record(tries=1, verdict="Waiting", message="no bucket"), seen(pod(2)))
    assert (step.action, step.missing) == (Action.NONE, "no bucket")


def test_the_pending_deadline_ends_a_job_that_waits_and_leaves_no_pod() -> None:
    policy = RunPolicySpec(pending_deadline_seconds=60)
    waiting = record(start_time=at(-60), tries=1, verdict="Waiting", message="no bucket", next_try_time=at(9))
    ended = check(waiting, seen(policy=policy))
    assert ended.end is not None
    assert (ended.end.reason, "no bucket" in ended.end.message) == ("DeadlineExceeded", True)
    assert check(waiting, seen(pod(2), policy=policy)).action is Action.REMOVE_PREFLIGHT_PODS
    soon = check(waiting.model_copy(update={"start_time": at(-57)}), seen(policy=policy))
    assert (soon.action, soon.wait_seconds) == (Action.NONE, 3)


def test_a_check_that_is_not_wanted_goes_and_begins_anew_later() -> None:
    step = check(record(), seen(pod(1), enabled=False))
    assert (step.action, step.state) == (Action.REMOVE_PREFLIGHT_PODS, JobState.CLEANING_UP)
    step = check(record(), seen(enabled=False))
    assert (step.action, step.preflight) == (Action.OPEN_ATTEMPT, None)
    passed = record(tries=1, verdict="Passed")
    assert check(passed, seen(enabled=False)).preflight == passed


def test_the_pod_asks_for_no_gpu_and_mounts_what_the_attempt_will() -> None:
    resources = {"nodes": 2, "gpusPerNode": 8, "gpuProduct": "NVIDIA-H100", "cpu": "16", "memory": "200Gi"}
    template = {
        "nodeSelector": {"zone": "a"},
        "labels": {"team": "nlp"},
        "env": [{"name": "HF_ENDPOINT", "value": "x"}],
    }
    spec = job(resources=resources, podTemplate=template)
    manifest = build_preflight_pod(spec, PLAN)
    (container,) = manifest["spec"]["containers"]
    assert container["args"] == ["preflight"]
    assert container["image"] == "trainer:1"
    assert {*container["resources"]["limits"], *container["resources"]["requests"]} == {
        "cpu",
        "memory",
        "ephemeral-storage",
    }
    assert manifest["spec"]["nodeSelector"] == {"zone": "a"}
    assert {variable["name"] for variable in container["env"]} == {"HOME", "FTJ_UID", "HF_ENDPOINT"}
    assert {volume["name"] for volume in manifest["spec"]["volumes"]} == {
        "run",
        "storage-credentials",
        "scratch",
        "tmp",
    }
    assert {mount["name"] for mount in container["volumeMounts"]} == {"run", "storage-credentials", "scratch", "tmp"}
    assert manifest["spec"]["automountServiceAccountToken"] is False
    assert manifest["spec"]["restartPolicy"] == "Never"
    assert manifest["metadata"]["labels"]["team"] == "nlp"
    assert "finetune.dev/attempt" not in manifest["metadata"]["labels"]
    (owner,) = manifest["metadata"]["ownerReferences"]
    assert owner["uid"] == spec.metadata.uid
    config_map = build_preflight_config_map(spec, PLAN, resolve(spec, report=None))
    assert config_map["metadata"]["name"] == manifest["metadata"]["name"] == PLAN.name
    assert list(config_map["data"]) == ["run.json"]


def test_the_pod_ends_by_itself_also_while_no_operator_works() -> None:
    assert build_preflight_pod(job(), PLAN)["spec"]["activeDeadlineSeconds"] == 1800


ZONE = {"key": "zone", "operator": "In", "values": ["a"]}
GPU_NODES: dict[str, dict[str, Any]] = {
    "a node selector": {"podTemplate": {"nodeSelector": {"pool": "gpu"}}},
    "a required affinity": {
        "podTemplate": {
            "affinity": {
                "nodeAffinity": {
                    "requiredDuringSchedulingIgnoredDuringExecution": {
                        "nodeSelectorTerms": [{"matchExpressions": [ZONE]}]
                    }
                }
            }
        }
    },
    "a claim with the model": {"model": {"volume": {"claimName": "models", "path": "m"}}},
    "a claim of the user": {
        "podTemplate": {
            "volumes": [{"name": "c", "mountPath": "/cache", "persistentVolumeClaim": {"claimName": "cache"}}]
        }
    },
}
GPU_NODES["a claim with the cache"] = {"storage": {"uri": "s3://bucket/x", "cache": {"claimName": "models"}}}
GPU_TAINT = {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}


@pytest.mark.parametrize("name", GPU_NODES)
def test_the_pod_tolerates_the_taint_of_gpu_nodes_where_it_may_have_to_run_there(name: str) -> None:
    gpu = {"nodes": 1, "gpusPerNode": 8, "cpu": "1", "memory": "1Gi"}
    with_gpus = build_preflight_pod(job(**GPU_NODES[name], resources=gpu), PLAN)
    assert GPU_TAINT in with_gpus["spec"]["tolerations"]
    cpu = {"nodes": 1, "gpusPerNode": 0, "device": "CPU", "cpu": "1", "memory": "1Gi"}
    without_gpus = build_preflight_pod(job(**GPU_NODES[name], resources=cpu), PLAN)
    assert GPU_TAINT not in without_gpus["spec"]["tolerations"]


def test_a_pod_that_may_run_anywhere_keeps_away_from_tainted_gpu_nodes() -> None:
    gpu = {"nodes": 1, "gpusPerNode": 8, "cpu": "1", "memory": "1Gi"}
    assert GPU_TAINT not in build_preflight_pod(job(resources=gpu), PLAN)["spec"]["tolerations"]


def test_no_queue_holds_the_check_of_a_job_that_names_one() -> None:
    """Kueue would hold a pod with the label of a queue. A job that can't work is to end before it waits in a queue."""
    manifest = build_preflight_pod(job(runPolicy={"queueName": "gpu"}), PLAN)
    assert not any(label.startswith("kueue.x-k8s.io/") for label in manifest["metadata"]["labels"])


def test_a_preflight_pod_is_recognised_by_its_label() -> None:
    manifest = build_preflight_pod(job(), PLAN)
    manifest["metadata"] |= {"uid": "u", "creationTimestamp": NOW.isoformat()}
    parsed = parse_preflight_pod(manifest)
    assert parsed is not None
    assert (parsed.index, parsed.name) == (3, PLAN.name)
    del manifest["metadata"]["labels"]["finetune.dev/preflight"]
    assert parse_preflight_pod(manifest) is None
