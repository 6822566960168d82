"""Why an attempt ends: `RULES`, a table of named rules of which the first that matches decides.

Each rule has a function that takes the evidence and returns a `Ruling` (why the attempt ends and what this means),
`GoesOn` where the attempt must go on, or None where the rule does not match. While an attempt is current, `attempts.py`
calls `judge` in every reconcile. The first ruling is recorded and mostly kept, because later evidence is often only a
consequence of what happened first.
`reference.py` writes `RULES` as a table into docs/architecture.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from finetune_core.api.attempt_causes import Cause
from finetune_core.api.conditions import Reason
from finetune_core.contract import ExitCode, Outcome, Phase
from finetune_operator import messages
from finetune_operator.decide.deadlines import is_active_deadline_over, seconds_to_pending_deadline
from finetune_operator.decide.evidence import Disturbance, Evidence
from finetune_operator.decide.out_of_memory import MemoryFailure, rule_on
from finetune_operator.decide.verdict import GoesOn, Ruling, Verdict
from finetune_operator.objects.observations import ContainerState, PodObservation

# ---- rules for a committed artifact ----


def artifact_committed(evidence: Evidence) -> Ruling | None:
    """Return the verdict Succeeded where a result names the committed artifact and no required score was missed."""
    result = evidence.artifact_result
    if result is None or result.artifact is None or result.outcome is Outcome.GATE_FAILED:
        return None
    reason = Reason.EARLY_STOPPED if result.outcome is Outcome.EARLY_STOPPED else Reason.COMPLETED
    message = result.message or messages.completed(result.artifact.step, result.artifact.uri)
    return Ruling(verdict=Verdict.SUCCEEDED, reason=reason, message=message, result=result)


def gate_failed(evidence: Evidence) -> Ruling | None:
    """Return the verdict Permanent where the artifact is committed, but its model did not reach a required score."""
    result = evidence.artifact_result
    if result is None or result.artifact is None or result.outcome is not Outcome.GATE_FAILED:
        return None
    message = result.message or messages.gate_failed(result.artifact.step, result.artifact.uri)
    return Ruling(verdict=Verdict.PERMANENT, reason=Reason.GATE_FAILED, message=message, result=result)


# ---- rules for orders of `runPolicy` ----


def cancelled(evidence: Evidence) -> Ruling | None:
    """Return the verdict Permanent where `runPolicy.cancel` is true."""
    if not evidence.policy.cancel:
        return None
    return _ordered(Verdict.PERMANENT, Reason.CANCELLED, messages.CANCELLED)


def suspended(evidence: Evidence) -> Ruling | None:
    """Return the verdict Free where `runPolicy.suspend` is true."""
    if not evidence.policy.suspend:
        return None
    return _ordered(Verdict.FREE, Cause.SUSPENDED, messages.SUSPENDED)


def active_deadline_over(evidence: Evidence) -> Ruling | None:
    """Return the verdict Permanent where the job's pods have run for `runPolicy.activeDeadlineSeconds`."""
    if not is_active_deadline_over(evidence.policy, evidence.active_seconds):
        return None
    message = messages.active_deadline(evidence.policy.active_deadline_seconds or 0)
    return _ordered(Verdict.PERMANENT, Reason.DEADLINE_EXCEEDED, message)


def pending_deadline_over(evidence: Evidence) -> Ruling | None:
    """Return the verdict Permanent where not all pods ran within `runPolicy.pendingDeadlineSeconds`."""
    left = seconds_to_pending_deadline(evidence.policy, evidence.current, evidence.now)
    if left is None or left > 0:
        return None
    message = messages.pending_deadline(evidence.policy.pending_deadline_seconds or 0, evidence.waiting_for)
    return _ordered(Verdict.PERMANENT, Reason.DEADLINE_EXCEEDED, message)


def _ordered(verdict: Verdict, reason: str, message: str) -> Ruling:
    return Ruling(verdict=verdict, reason=reason, message=message, ordered=True)


# ---- the rule for a suspended child ----


def held_by_queue(evidence: Evidence) -> GoesOn | None:
    """Return `GoesOn` where a queue or a person has suspended the child object: the attempt goes on after a resume."""
    return GoesOn() if evidence.child is not None and evidence.child.suspended else None


# ---- rules for failures that another attempt would repeat ----


def bad_input(evidence: Evidence) -> Ruling | None:
    """Return the verdict Permanent where a trainer refused the spec or the data (exit code 64)."""
    return _permanent(evidence, ExitCode.BAD_INPUT, Reason.BAD_INPUT)


def diverged(evidence: Evidence) -> Ruling | None:
    """Return the verdict Permanent where the training diverged (exit code 65)."""
    return _permanent(evidence, ExitCode.DIVERGED, Reason.DIVERGED)


def out_of_memory(evidence: Evidence) -> Ruling | None:
    """Return the verdict Permanent where a trainer ran out of memory (exit code 66, or OOMKilled) and half its
    micro-batch can't help."""
    return _memory_ruling(evidence, Verdict.PERMANENT)


def out_of_memory_at_first(evidence: Evidence) -> Ruling | None:
    """Return the verdict Charged where the first trainer of the job ran out of memory. The next attempt halves the
    micro-batch."""
    return _memory_ruling(evidence, Verdict.CHARGED)


def out_of_memory_again(evidence: Evidence) -> Ruling | None:
    """Return the verdict Free where a trainer ran out of memory again. The next attempt halves the micro-batch once
    more. The search for the micro-batch that fits was charged with its first attempt."""
    return _memory_ruling(evidence, Verdict.FREE)


def _memory_ruling(evidence: Evidence, verdict: Verdict) -> Ruling | None:
    """Return the ruling on an attempt that ran out of memory where its verdict is ``verdict``."""
    ruling = _permanent(evidence, ExitCode.OUT_OF_MEMORY, Reason.OUT_OF_MEMORY)
    batch = evidence.batch
    if ruling is not None and batch is not None:
        killed = any(pod.container and pod.container.reason == "OOMKilled" for pod in evidence.failures)
        failure = MemoryFailure(
            message=ruling.message,
            phase=_phase_of_failure(evidence),
            packed=batch.packed,
            in_node_memory=killed and batch.on_gpus,
            node=ruling.node,
        )
        ruling = rule_on(
            failure,
            planned=batch.planned,
            halvings=evidence.halvings,
            share=batch.share,
            retries_left=evidence.policy.max_retries - evidence.charged,
            advice="" if killed else messages.advice_of_plan(batch.advice),
        )
    return ruling if ruling is not None and ruling.verdict is verdict else None


def _phase_of_failure(evidence: Evidence) -> str:
    """Return what the trainer did when it ran out of memory, as its result says, or else its last report; empty where
    nobody knows. The report that ends an attempt does not know it."""
    for pod in evidence.failures:
        result = pod.container.result if pod.container is not None else None
        if result is not None and result.phase is not None:
            return result.phase
    return "" if evidence.last_phase == Phase.ENDED else evidence.last_phase


def _permanent(evidence: Evidence, code: ExitCode, reason: Reason) -> Ruling | None:
    for pod in evidence.failures:
        container = pod.container
        if container is None:
            continue
        killed = container.reason == "OOMKilled" and code is ExitCode.OUT_OF_MEMORY
        if container.exit_code == code or killed:
            message = container.result.message if container.result else ""
            if not message and killed:
                message = messages.out_of_memory(pod.memory_limit, _phase_of_failure(evidence))
            message = message or messages.exit_sentence(container.exit_code, "")
            return Ruling(verdict=Verdict.PERMANENT, reason=reason, message=message, node=pod.node)
    return None


# ---- rules for ends that the job did not cause ----


def resumed_too_early(evidence: Evidence) -> Ruling | None:
    """Return the verdict Free where the child failed because pods of its earlier admission were still ending."""
    if evidence.failures or not evidence.resumed_too_early:
        return None
    return _free(Cause.RESUMED_TOO_EARLY, messages.RESUMED_TOO_EARLY)


def child_deleted(evidence: Evidence) -> Ruling | None:
    """Return the verdict Free where no pod failed and somebody else deleted the child object."""
    if evidence.failures or not evidence.child_uid or not (evidence.child is None or evidence.child.deleting):
        return None
    return _free(Cause.CHILD_DELETED, messages.CHILD_DELETED)


def child_replaced(evidence: Evidence) -> Ruling | None:
    """Return the verdict Free where no pod failed and another object has taken the child's name."""
    child = evidence.child
    if evidence.failures or not evidence.child_uid or child is None or child.uid == evidence.child_uid:
        return None
    return _free(Cause.CHILD_REPLACED, messages.CHILD_REPLACED)


def child_scaled(evidence: Evidence) -> Ruling | None:
    """Return the verdict Free where no pod failed and somebody else scaled the child to another number of pods."""
    child = evidence.child
    if evidence.failures or not evidence.child_uid or child is None or child.replicas == evidence.nodes:
        return None
    return _free(Cause.CHILD_CHANGED, messages.replicas_changed(child.replicas, evidence.nodes))


def pod_disrupted(evidence: Evidence) -> Ruling | None:
    """Return the verdict Free where a pod got the condition DisruptionTarget before the first failure."""
    pod = _disturbed(evidence, Disturbance.DISRUPTED)
    if pod is None:
        return None
    return _free(pod.disruption, messages.pod_disrupted(pod.name, pod.disruption), pod.node)


def node_lost(evidence: Evidence) -> Ruling | None:
    """Return the verdict Free where the node of a pod no longer answers, or has lost the pod's container."""
    pod = _disturbed(evidence, Disturbance.NODE_LOST)
    if pod is None and (pod := evidence.lost) is not None:
        return _free(Cause.NODE_LOST, messages.container_lost(pod.name, pod.node), pod.node)
    if pod is None:
        return None
    return _free(Cause.NODE_LOST, messages.pod_disrupted(pod.name, Cause.NODE_LOST), pod.node)


def pod_deleted(evidence: Evidence) -> Ruling | None:
    """Return the verdict Free where somebody deleted a pod before the first failure.

    After a deletion by force the pod no longer exists, and training-operator deletes the pods that are left. So where
    recorded pods vanished or were replaced, these pods are taken as the cause, with the reason PodVanished or
    PodReplaced (see `_missing`).
    """
    pod = _disturbed(evidence, Disturbance.DELETED)
    if pod is None:
        return None
    message = messages.pod_deleted(pod.name, [other.name for other in evidence.deleted_together])
    missing = _missing(evidence)
    if missing is None:
        return _free(Cause.POD_DELETED, message, pod.node)
    is_recorded = any(record.uid == pod.uid for record in evidence.current.pods)
    return _free(missing.reason, f"{missing.message}; {message}" if is_recorded else missing.message, missing.node)


def pods_missing(evidence: Evidence) -> Ruling | None:
    """Return the verdict Free where no pod failed and recorded pods vanished or were replaced.

    After a failure missing pods prove nothing, because the backend itself then deletes the other pods.
    """
    return None if evidence.failures else _missing(evidence)


def _disturbed(evidence: Evidence, kind: Disturbance) -> PodObservation | None:
    """Return the pod of the first disturbance where that disturbance is of ``kind``; None otherwise."""
    if evidence.disturbance is None or evidence.disturbance[0] is not kind:
        return None
    return evidence.disturbance[1]


def _missing(evidence: Evidence) -> Ruling | None:
    """Return the verdict Free where recorded pods vanished or were replaced; None where all recorded pods exist.

    The message names all pods that vanished or, where none vanished, all pods that were replaced. Nothing shows any
    more which of them somebody deleted and which the backend deleted afterwards.
    """
    if gone := evidence.vanished:
        return _free(Cause.POD_VANISHED, messages.pods_vanished([record.name for record in gone]), gone[0].node)
    if other := evidence.replaced:
        return _free(Cause.POD_REPLACED, messages.pods_replaced([record.name for record in other]), other[0].node)
    return None


def _free(reason: str, message: str, node: str = "") -> Ruling:
    return Ruling(verdict=Verdict.FREE, reason=reason, message=message, node=node)


def node_refused(evidence: Evidence) -> Ruling | None:
    """Return the verdict Free where a node did not start a pod, or its kubelet killed the pod for the node's own sake.

    If the pods of other workers fail as well, their failures are a consequence, because they miss one worker.
    """
    pod = evidence.refused
    if pod is None:
        return None
    container = pod.container
    by_runtime = container is not None and (container.never_ran or container.waits_for_runtime)
    source = container if container is not None and by_runtime else pod
    ran = container is not None and not by_runtime and container.state is not ContainerState.WAITING
    message = messages.node_refused(pod.name, pod.node, source.reason, source.message, ran=ran)
    return _free(Cause.NODE_REFUSED, message, pod.node)


def node_broken(evidence: Evidence) -> Ruling | None:
    """Return the verdict Free where a trainer ended with exit code 75 because a GPU or the driver of its node is
    broken. The next attempt avoids the node."""
    pod = evidence.broken_node
    container = pod.container if pod is not None else None
    if pod is None or container is None or container.result is None or container.exit_code != ExitCode.OUTSIDE_FAILURE:
        return None
    return _free(Cause.NODE_REFUSED, messages.node_broken(pod.name, pod.node, container.result.message), pod.node)


# ---- rules for failures that another attempt may survive ----


def evicted(evidence: Evidence) -> Ruling | None:
    """Return the verdict Charged where the kubelet evicted a pod, for example because the pod used too much disk."""
    pod = evidence.decisive_failure
    if pod is None or pod.reason != Cause.EVICTED:
        return None
    return _charged(pod, Cause.EVICTED, messages.pod_failed(pod.name, pod.reason, pod.message))


def failed_without_exit_code(evidence: Evidence) -> Ruling | None:
    """Return the verdict Charged where a pod failed and its training container left no exit code."""
    pod = evidence.decisive_failure
    if pod is None or (pod.container is not None and pod.container.exit_code is not None):
        return None
    return _charged(pod, pod.reason or Cause.POD_FAILED, messages.pod_failed(pod.name, pod.reason, pod.message))


def outside_failure(evidence: Evidence) -> Ruling | None:
    """Return the verdict Charged where a trainer ended with exit code 75: something outside of the spec and the data
    failed, such as the store or another rank."""
    return _exited(evidence, Cause.OUTSIDE_FAILURE, lambda code: code == ExitCode.OUTSIDE_FAILURE)


def stopped(evidence: Evidence) -> Ruling | None:
    """Return the verdict Charged where a pod ended after SIGTERM (exit code 143) although nobody had deleted it."""
    return _exited(evidence, Cause.STOPPED, lambda code: code == ExitCode.STOPPED)


def crashed(evidence: Evidence) -> Ruling | None:
    """Return the verdict Charged where a pod failed with any exit code that no earlier rule handles."""
    return _exited(evidence, Cause.CRASHED, lambda code: True)


def no_artifact(evidence: Evidence) -> Ruling | None:
    """Return the verdict Charged where every pod ended without a failure, but no result names an artifact."""
    if len(evidence.pods) != evidence.nodes or not all(pod.ended for pod in evidence.pods):
        return None
    return Ruling(verdict=Verdict.CHARGED, reason=Cause.NO_ARTIFACT, message=messages.NO_ARTIFACT)


def child_failed(evidence: Evidence) -> Ruling | None:
    """Return the verdict Charged where the backend finished the child, and no pod explains why."""
    child = evidence.child
    if child is None or not child.finished or not all(pod.ended for pod in evidence.pods):
        return None
    message = child.message or messages.NO_ARTIFACT
    return Ruling(verdict=Verdict.CHARGED, reason=Cause.CHILD_FAILED, message=message)


def _exited(evidence: Evidence, reason: Cause, is_code: Callable[[int], bool]) -> Ruling | None:
    pod = evidence.decisive_failure
    container = pod.container if pod is not None else None
    if pod is None or container is None or container.exit_code is None or not is_code(container.exit_code):
        return None
    message = container.result.message if container.result else ""
    return _charged(pod, reason, message or messages.exit_sentence(container.exit_code, container.reason))


def _charged(pod: PodObservation, reason: str, message: str) -> Ruling:
    return Ruling(verdict=Verdict.CHARGED, reason=reason, message=message, node=pod.node)


# ---- the verdict table: RULES ----


@dataclass(frozen=True, slots=True)
class Rule:
    """One row of `RULES`, the table that decides why an attempt ended and with which verdict."""

    decide: Callable[[Evidence], Ruling | GoesOn | None]
    """Function that returns a ruling (or `GoesOn`) where the rule matches, and None where the next rule is asked."""
    verdict: Verdict | None
    """The verdict of every ruling that `decide` returns; None where `decide` returns `GoesOn`."""
    when: str
    """When the rule matches, as docs/architecture.md shows it."""
    is_order: bool = False
    """Whether `runPolicy` orders the end. An order is obeyed only while no other cause is recorded for the attempt."""

    @property
    def name(self) -> str:
        """Name of the function `decide`, for example "pod_deleted"."""
        return self.decide.__name__


RULES: tuple[Rule, ...] = (
    Rule(
        artifact_committed,
        Verdict.SUCCEEDED,
        "every pod ended with 0 and a result names the artifact; or no pod is left and the final report names it",
    ),
    Rule(
        gate_failed,
        Verdict.PERMANENT,
        "the same, and the result says that the model did not reach a score of `evaluation.require`",
    ),
    Rule(cancelled, Verdict.PERMANENT, "`runPolicy.cancel` is true", is_order=True),
    Rule(suspended, Verdict.FREE, "`runPolicy.suspend` is true", is_order=True),
    Rule(active_deadline_over, Verdict.PERMANENT, "`runPolicy.activeDeadlineSeconds` is over", is_order=True),
    Rule(pending_deadline_over, Verdict.PERMANENT, "`runPolicy.pendingDeadlineSeconds` is over", is_order=True),
    Rule(held_by_queue, None, "the queue suspended the child; the attempt goes on once the queue resumes the child"),
    Rule(bad_input, Verdict.PERMANENT, "a pod that nobody had disrupted or deleted ended with 64"),
    Rule(diverged, Verdict.PERMANENT, "a pod that nobody had disrupted or deleted ended with 65"),
    Rule(
        out_of_memory,
        Verdict.PERMANENT,
        "a pod that nobody had disrupted or deleted ended with 66 or OOMKilled, and half the micro-batch can't help",
    ),
    Rule(out_of_memory_at_first, Verdict.CHARGED, "the same, and half the micro-batch may help, for the first time"),
    Rule(out_of_memory_again, Verdict.FREE, "the same, at most twice more"),
    Rule(
        resumed_too_early,
        Verdict.FREE,
        "the queue resumed the child while old pods still ended, and training-operator failed the child for those pods",
    ),
    Rule(child_deleted, Verdict.FREE, "no pod failed, and somebody else deleted the child"),
    Rule(child_replaced, Verdict.FREE, "no pod failed, and another object took the child's name"),
    Rule(child_scaled, Verdict.FREE, "no pod failed, and somebody else scaled the child"),
    Rule(pod_disrupted, Verdict.FREE, "before the first failure a pod got the condition DisruptionTarget"),
    Rule(node_lost, Verdict.FREE, "the node of a pod no longer answers, or lost the pod's container in a restart"),
    Rule(pod_deleted, Verdict.FREE, "before the first failure somebody deleted a pod, which then ends with 137 or 143"),
    Rule(pods_missing, Verdict.FREE, "no pod failed, and a recorded pod vanished or another one took its place"),
    Rule(
        node_refused,
        Verdict.FREE,
        "a kubelet refused a pod or killed it for the node's own sake, or its container runtime could not start it",
    ),
    Rule(node_broken, Verdict.FREE, "a pod ended with 75, and says that a GPU or the driver of its node is broken"),
    Rule(evicted, Verdict.CHARGED, "the kubelet evicted a pod without DisruptionTarget"),
    Rule(failed_without_exit_code, Verdict.CHARGED, "a pod failed and its container left no exit code"),
    Rule(outside_failure, Verdict.CHARGED, "a pod ended with 75"),
    Rule(stopped, Verdict.CHARGED, "a pod ended with 143 although nobody had deleted that pod"),
    Rule(crashed, Verdict.CHARGED, "a pod ended with any other code but 0"),
    Rule(no_artifact, Verdict.CHARGED, "every pod ended with 0, but no result names an artifact"),
    Rule(child_failed, Verdict.CHARGED, "the backend finished the child, and no pod explains why"),
)
"""All rules, in the order in which they are asked. The first rule that matches decides."""


def judge(evidence: Evidence) -> Ruling | None:
    """Return the ruling of the first rule that matches; None while the attempt goes on.

    Rules for orders are left out once the attempt has a cause of its end.
    """
    for rule in RULES:
        if rule.is_order and evidence.current.cause is not None:
            continue
        if (answer := rule.decide(evidence)) is not None:
            return answer if isinstance(answer, Ruling) else None
    return None
