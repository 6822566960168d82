"""The operator's sentences in the status of a job, all in one place so that words and tone agree.

Callers pass values, and the messages of other programs such as the kubelet, as arguments. Two kinds of sentences are
not made here: results of the trainer and of the preflight check, and errors about a spec. Events repeat sentences of
the status; only the notes that an attempt started or ended are made elsewhere (`status/events.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from finetune_core.contract import ExitCode

VALID = "the spec is valid"
SETTLED = "the job has ended"
NO_CHECKPOINT = "no checkpoint is committed yet"
NO_PODS = "no pod exists yet"
CAPABILITY_REFUSED = (
    "the Pod Security Standard of the namespace forbids the capability IPC_LOCK of `podTemplate.securityContext`; give"
    " the namespace the label `pod-security.kubernetes.io/enforce: privileged`, or create the job again without the"
    " capability"
)
CPU_LIMIT_NEEDED = (
    "the namespace asks for a CPU limit that the pods do not have; create the job again with `resources.limitCpu: true`"
)
SCHEDULED = "every pod has a node"
PREFLIGHT_RUNS = "store, model and data are being checked before any GPU is asked for"
_SKIP_PREFLIGHT = "`runPolicy.preflight: Skip` starts without the check"
BETWEEN_ATTEMPTS = "no attempt exists at the moment"
NO_ARTIFACT = "every pod ended with exit code 0, but no result names a committed artifact"
CHILD_DELETED = "the PyTorchJob was deleted by somebody else"
CHILD_REPLACED = "the PyTorchJob was replaced by another of the same name"
CANCELLED = "cancelled by `runPolicy.cancel`"
SUSPENDED = "suspended by `runPolicy.suspend`"
SUSPENDED_REST = "suspended by `runPolicy.suspend`; set it to false to go on"
SUSPENDED_ELSEWHERE = "somebody suspended the PyTorchJob; set its `spec.runPolicy.suspend` to false to go on"
RESUMED_TOO_EARLY = (
    "the queue resumed the PyTorchJob while pods of its earlier admission still ended; training-operator counted them"
    " as failed"
)

EXIT_CODE_SENTENCES = {
    ExitCode.BAD_INPUT: "the trainer refused its input (exit code 64) and left no message",
    ExitCode.DIVERGED: "training diverged (exit code 65)",
    ExitCode.OUT_OF_MEMORY: "the trainer ran out of memory (exit code 66)",
    ExitCode.OUTSIDE_FAILURE: "something outside the trainer failed for too long (exit code 75)",
    ExitCode.STOPPED: "the trainer was told to stop and saved a checkpoint (exit code 143)",
}

_ADAPTER_JOB = "model.adapter.job"
ADAPTER_OF_ITSELF = f"{_ADAPTER_JOB}: must not name the job itself"


def adapter_job_missing(name: str) -> str:
    """Return the sentence about a job that waits for the job ``name``, which does not exist or is being deleted."""
    return f"{_ADAPTER_JOB}: there is no FineTuneJob {name} in this namespace"


def adapter_job_unfinished(name: str, state: str) -> str:
    """Return the sentence about a job that waits for the job ``name``. ``state`` is the reason of that job's condition
    Succeeded; empty where it has none yet."""
    return f"{_ADAPTER_JOB}: waits until FineTuneJob {name} has succeeded" + (f" (now: {state})" if state else "")


def adapter_job_unreadable(name: str) -> str:
    """Return the sentence about a job that waits because this version can't read the spec of the job ``name``."""
    return f"{_ADAPTER_JOB}: this version of the operator can't read the spec of FineTuneJob {name}"


def adapter_job_failed(name: str, reason: str) -> str:
    """Return the sentence about a `model.adapter.job` that names the job ``name``, which has failed. ``reason`` is the
    reason of that job's condition Succeeded; it may be empty."""
    return (
        f"{_ADAPTER_JOB}: must name a job that succeeds, and FineTuneJob {name} has ended with {reason or 'a failure'};"
        " an artifact that it has committed all the same can be named by its address in `model.adapter.s3`"
    )


def adapter_job_without_adapter(name: str) -> str:
    """Return the sentence about a `model.adapter.job` that names the job ``name``, whose artifact is a whole model."""
    return (
        f"{_ADAPTER_JOB}: must name a job whose artifact holds an adapter, and that of FineTuneJob {name} is a whole"
        " model; name its address as the base model, in `model.s3`"
    )


def adapter_job_elsewhere(name: str) -> str:
    """Return the sentence about a `model.adapter.job` that names the job ``name``, whose artifact lies in another
    object store."""
    return (
        f"{_ADAPTER_JOB}: must name a job with the same object store, and `storage.endpoint` of FineTuneJob {name} is"
        " another one"
    )


def adapter_job_without_artifact(name: str) -> str:
    """Return the sentence about a `model.adapter.job` that names the job ``name``, which has succeeded, but whose
    status names no artifact of its runs."""
    return f"{_ADAPTER_JOB}: FineTuneJob {name} has succeeded, and its status names no committed artifact of its runs"


def adapter_job_in_a_circle(name: str) -> str:
    """Return the sentence about a `model.adapter.job` that names the job ``name``, which waits for the job that names
    it, directly or over other jobs."""
    return (
        f"{_ADAPTER_JOB}: must not name a job that waits for this one: FineTuneJob {name} starts from the adapter of"
        " this job, itself or over other jobs"
    )


def exit_sentence(exit_code: int | None, reason: str) -> str:
    """Return the sentence about a training container that ended without a message of its own.

    ``exit_code`` is the container's exit code. ``reason`` is the reason that the kubelet gives, such as "Error"; it may
    be empty.
    """
    if exit_code in EXIT_CODE_SENTENCES:
        return EXIT_CODE_SENTENCES[ExitCode(exit_code)]
    return f"the training container ended with exit code {exit_code}" + (f" ({reason})" if reason else "")


def out_of_memory(limit: str, phase: str) -> str:
    """Return the sentence about a training container that the kernel killed at its memory limit.

    ``limit`` is the memory limit, for example "64Gi"; empty where it is unknown. ``phase`` is the phase of the trainer
    in its last report, for example "Training"; empty without a report.
    """
    when, amount = f" in phase {phase}" if phase else "", f" of {limit}" if limit else ""
    advice = "raise `resources.memory`, or lower `training.microBatchSize` or `dataset.maxLength`"
    return f"out of memory: the kernel killed the trainer{when} at its memory limit{amount}; {advice}"


NODE_MEMORY = "the memory of a pod that computes on GPUs does not depend on the micro-batch"
SMALLEST_MICRO_BATCH = "the micro-batch has one example, so it can't be halved"


def memory_of_phase(phase: str) -> str:
    """Return the sentence about lack of memory in ``phase`` of the trainer, for example "Generating"."""
    return f"the memory of phase {phase} does not depend on the micro-batch"


def halved_too_often(times: int, size: int) -> str:
    """Return the sentence about a job that ran out of memory again after its micro-batch was halved ``times`` times.
    ``size`` is the number of examples in its last micro-batch."""
    return f"the micro-batch was halved {times} times, to {size}"


def advice_of_plan(lines: str) -> str:
    """Return the advice for a job that ran out of memory; ``lines`` are those of `status.plan.advice`, or empty."""
    return f"by the plan a job takes less memory with {lines}" if lines else ""


def memory_not_enough(failure: str, why: str, advice: str) -> str:
    """Return the sentence about lack of memory that ends a job.

    ``failure`` is the sentence of the trainer, ``why`` says why no smaller micro-batch helps, and ``advice`` says what
    to change; empty where the sentence of the trainer says it.
    """
    return "; ".join(part for part in (why, advice, failure) if part)


def micro_batch_halved(failure: str, size: int, smaller: int, *, steps: int | None, time: int, limit: int) -> str:
    """Return the sentence about lack of memory after which the next attempt has a micro-batch of ``smaller`` examples
    instead of ``size``, and ``steps`` gradient accumulation steps, or an unknown number of them (None). ``time`` of at
    most ``limit`` says how often the micro-batch is halved so far. ``failure`` is the sentence of the trainer."""
    accumulation = f", gradient accumulation of {steps}," if steps is not None else ""
    return (
        f"the next attempt has a micro-batch of {smaller} instead of {size}{accumulation} and the same updates (halved"
        f" {time} of at most {limit} times): {failure}"
    )


def pod_deleted(name: str, together: Sequence[str] = ()) -> str:
    """Return the sentence about a pod that somebody deleted.

    ``together`` are the names of further pods that were deleted in the same second, so that nothing shows which of all
    these pods was deleted first.
    """
    if not together:
        return f"pod {name} was deleted"
    if len(together) == 1:
        return f"pod {name} was deleted, and pod {together[0]} in the same second"
    return f"pod {name} was deleted, and {len(together)} further pods in the same second, from {together[0]} on"


def pods_vanished(names: Sequence[str]) -> str:
    """Return the sentence about pods that no longer exist."""
    return f"pod {names[0]} is gone" if len(names) == 1 else f"pods {', '.join(names)} are gone"


def pods_replaced(names: Sequence[str]) -> str:
    """Return the sentence about pods that were deleted and in whose place other pods exist."""
    if len(names) == 1:
        return f"pod {names[0]} was deleted and another one took its place"
    return f"pods {', '.join(names)} were deleted and others took their places"


def pod_disrupted(name: str, reason: str) -> str:
    """Return the sentence about a pod that the cluster removed, or whose node was lost.

    ``reason`` is the reason as one word, for example "PreemptionByScheduler".
    """
    return f"pod {name} was removed by the cluster ({reason})"


def pod_failed(name: str, reason: str, message: str) -> str:
    """Return the sentence about a pod that was evicted, or that failed without an exit code.

    ``reason`` and ``message`` are fields of the pod's status, for example "Evicted" and a sentence of the kubelet.
    Either may be empty.
    """
    return f"pod {name} failed: {reason or 'no reason given'}" + (f": {message}" if message else "")


def container_lost(name: str, node: str) -> str:
    """Return the sentence about the pod ``name``, whose container is gone without anybody knowing how it ended.

    ``node`` is the name of the pod's node; it may be empty.
    """
    return f"{f'node {node}' if node else 'its node'} lost the container of pod {name}, for example in a restart"


def node_refused(name: str, node: str, reason: str, message: str, *, ran: bool) -> str:
    """Return the sentence about the pod ``name``, which the node ``node`` did not start or, where it ``ran``, ended.

    ``reason`` is the word of the kubelet or of the container runtime, for example "UnexpectedAdmissionError", and
    ``message`` is the sentence that came with it. ``node`` and ``message`` may be empty.
    """
    where = f"node {node}" if node else "its node"
    return f"{where} {'ended' if ran else 'did not start'} pod {name}: {reason}" + (f": {message}" if message else "")


def node_broken(name: str, node: str, message: str) -> str:
    """Return the sentence about the pod ``name``, whose trainer says in ``message`` that a GPU or the driver of the
    node ``node`` is broken. ``node`` may be empty."""
    return f"{f'node {node}' if node else 'the node'} of pod {name} is broken: {message}"


def replicas_changed(replicas: int, nodes: int) -> str:
    """Return the sentence about a PyTorchJob that somebody else scaled to ``replicas`` instead of ``nodes`` workers."""
    return f"the PyTorchJob was scaled to {replicas} workers by somebody else; the job has {nodes} nodes"


def name_conflict(kind: str, name: str) -> str:
    """Return the sentence about an object that has the name which the operator needs, but belongs to another owner."""
    return f"{kind} {name} exists and does not belong to this job; delete or rename it"


def backend_missing() -> str:
    """Return the sentence about a cluster that does not know the kind PyTorchJob."""
    return "the API server does not know PyTorchJob (kubeflow.org/v1); install Kubeflow's training-operator"


def backend_refused(kind: str, name: str, message: str) -> str:
    """Return the sentence about an object that the API server refused; ``message`` is the API server's message."""
    return f"the API server refused {kind} {name}: {message}"


def image_pull(detail: str) -> str:
    """Return the sentence about an image that can't be pulled; ``detail`` is the kubelet's message or reason."""
    return f"the image can't be pulled: {detail}"


def waiting_pod(name: str, detail: str) -> str:
    """Return the sentence about a pod that does not run yet; ``detail`` says why."""
    return f"pod {name}: {detail}"


def refused_pods(explanation: str, detail: str) -> str:
    """Return the sentence about pods that the API server refuses; ``detail`` is the warning about them."""
    return f"{explanation} ({detail})"


def attempt_prefix(number: int, last_cause: str) -> str:
    """Return the beginning of a message about attempt ``number``: a text that says why the previous attempt ended.

    ``last_cause`` says why the previous attempt ended. The text is empty for attempt 1, and where ``last_cause`` is
    empty.
    """
    return f"attempt {number}, after: {last_cause}" if number > 1 and last_cause else ""


def retrying(ended: int, cause: str, next_start: datetime | None) -> str:
    """Return the sentence about an attempt that ended and after which another attempt will start.

    ``ended`` is the number of the ended attempt, and ``cause`` says why it ended. ``next_start`` is the time of the
    next start; None where it is not decided yet. The sentence contains this time and not the seconds until then,
    because a number of seconds would change the sentence in every reconcile.
    """
    when = f"; the next starts after {next_start:%H:%M:%S} UTC" if next_start else "; the next starts once it is gone"
    return f"attempt {ended} ended: {cause}{when}"


def retries_exhausted(charged: int, cause: str) -> str:
    """Return the sentence about a job that has used up `runPolicy.maxRetries`, or all attempts that a job can have.

    ``charged`` is how many attempts counted against `maxRetries`; ``cause`` says why the last attempt ended.
    """
    return f"{charged} attempts failed; the last: {cause}"


def stopped(cause: str, newest_checkpoint: str) -> str:
    """Return the sentence about a job that ended for ``cause`` before its artifact was committed.

    ``newest_checkpoint`` is the address of the newest checkpoint; empty if there is none. The sentence contains this
    address, because a new job can resume from the checkpoint.
    """
    return f"{cause}; " + (f"the newest checkpoint: {newest_checkpoint}" if newest_checkpoint else NO_CHECKPOINT)


def pods_end(cause: str, pods: int) -> str:
    """Return ``cause``, followed by how many pods still terminate if ``pods`` is not 0."""
    return f"{cause}; {pods} pod{'s' if pods > 1 else ''} still end{'' if pods > 1 else 's'}" if pods else cause


def active_deadline(seconds: int) -> str:
    """Return the sentence about a job whose pods have run for the ``seconds`` of `runPolicy.activeDeadlineSeconds`."""
    return f"its pods have run for the {seconds} s of `runPolicy.activeDeadlineSeconds`"


def pending_deadline(seconds: int, waiting_for: str) -> str:
    """Return the sentence about an attempt whose pods did not all run within ``seconds``.

    ``waiting_for`` says why, for example that a pod has no node; empty where that is not known.
    """
    return f"not all pods ran within the {seconds} s of `runPolicy.pendingDeadlineSeconds`: {waiting_for or NO_PODS}"


def preflight_broke(exit_code: int | None, reason: str, last_line: str) -> str:
    """Return the sentence about a preflight pod that ended without a result, and about how to skip the check.

    ``exit_code`` is the exit code of its container. ``reason`` is the reason that the kubelet gives, and ``last_line``
    is the last line of the container's termination message, which mostly is the end of its log. Either may be empty.
    """
    why = f" ({reason})" if reason and reason != "Error" else ""
    line = f": {last_line}" if last_line else ""
    return f"the preflight pod ended with exit code {exit_code}{why} and left no result{line}; {_SKIP_PREFLIGHT}"


def preflight_turn(limit: int) -> str:
    """Return the sentence about a preflight check that waits, because ``limit`` others run and no more may run."""
    return f"the check of store, model and data waits for its turn: {limit} checks of all jobs run at the same time"


def preflight_out_of_memory(limit: str) -> str:
    """Return the sentence about a preflight pod that the kernel killed at its memory limit.

    ``limit`` is the memory limit, for example "1Gi"; empty where it is unknown.
    """
    amount = f" of {limit}" if limit else ""
    return (
        f"the preflight pod was killed at its memory limit{amount}: a row, the tokenizer or the header of a weight file"
        f" is too large for the check; {_SKIP_PREFLIGHT}"
    )


def preflight_ran_on(seconds: int, command: str) -> str:
    """Return the sentence about a preflight pod that still ran after ``seconds``, far longer than the check takes.

    ``command`` is the argument with which the operator asks an image to check.
    """
    return (
        f"the preflight pod had not ended after {seconds} s: an image of your own must end soon when its argument is"
        f" `{command}`; {_SKIP_PREFLIGHT}"
    )


def too_small_for_model(field: str, needed: str) -> str:
    """Return the sentence about a volume that is too small for the files of the base model. ``field`` is the path of
    its size in the spec, and ``needed`` is the size of the files, for example "15Gi"."""
    return f"{field}: must be at least {needed} for the files of the model, and more for what the training writes"


def preflight_gives_up(tries: int, cause: str) -> str:
    """Return the sentence about a preflight check that ends the job, because ``tries`` tries could not be carried out.

    ``cause`` says why the last try could not be carried out.
    """
    return f"{tries} tries of the preflight check failed in this way: {cause}"


def preflight_deadline(seconds: int, waiting_for: str) -> str:
    """Return the sentence about a job whose preflight check did not pass within the pending deadline of ``seconds``.

    ``waiting_for`` says what is missing; empty where that is not known.
    """
    what = waiting_for or PREFLIGHT_RUNS
    return f"the preflight check did not pass within the {seconds} s of `runPolicy.pendingDeadlineSeconds`: {what}"


def queued(queue: str) -> str:
    """Return the sentence about an attempt that waits in the LocalQueue ``queue`` until Kueue admits the attempt."""
    return f"waits for admission by the queue {queue}"


def most_attempts(number: int) -> str:
    """Return the sentence about a job that has started ``number`` attempts, the most that a job can have."""
    return f"{number} attempts were started, the most that a job can have; create it anew with the same `storage.runId`"


def unreadable_status(path: str) -> str:
    """Return the sentence about a job whose status has a part at ``path`` that this version can't read."""
    return f"status.{path}: this version of the operator can't read it, and leaves the job as it is"


def waiting_for_reports(nodes: int, running: int) -> str:
    """Return the sentence about an attempt that does not train yet: ``running`` of its ``nodes`` pods run.

    Where all of them run, the sentence says that the first report is still missing.
    """
    if running < nodes:
        return f"{running} of {nodes} pods run"
    return "all pods run; no report has arrived yet"


def running(nodes: int, attempt: int) -> str:
    """Return the sentence about attempt number ``attempt``, which trains on ``nodes`` pods."""
    return f"attempt {attempt} trains on {nodes} pod{'s' if nodes > 1 else ''}"


def completed(step: int, uri: str) -> str:
    """Return the sentence about a job that succeeded with the artifact of ``step`` at the address ``uri``."""
    return f"the artifact of step {step} is committed: {uri}"


def gate_failed(step: int, uri: str) -> str:
    """Return the sentence about a job whose model did not reach a score of `evaluation.require`. The artifact of
    ``step`` is at the address ``uri``."""
    return f"evaluation.require: a score was not reached (status.evaluation.requirements); {completed(step, uri)}"


def taken_over(run_id: str, uid: str, began: datetime, step: int, *, done: bool) -> str:
    """Return the sentence about a former run that the job takes over: its folder, its start, and how to train anew.

    ``run_id`` is the name of the folder. ``uid`` is the uid of the job that began the newest run in the folder; empty
    where it is not known. The first run in the folder began at ``began``. ``step`` is the step of the artifact or,
    without an artifact, of the newest checkpoint. ``done`` says whether the artifact is committed, so that nothing is
    left to train.
    """
    what = f"takes over the artifact of step {step}" if done else f"resumes from the checkpoint of step {step}"
    job = f" of the job with uid {uid}" if uid and uid != run_id else ""
    return (
        f"{what} of the run {run_id}{job}, begun at {began:%Y-%m-%d %H:%M:%S} UTC; to train anew, create the job with"
        " a new `storage.runId` or with another training, for example another `training.seed`"
    )


def checkpoint_available(step: int, count: int) -> str:
    """Return the sentence about ``count`` undamaged checkpoints, the newest of which is of step ``step``."""
    return f"step {step} is the newest of {count}" if count > 1 else f"step {step} is committed"


def checkpoint_overdue(what: str, age_seconds: int, problem: str) -> str:
    """Return the sentence about a job whose newest checkpoint is older than the job asks for.

    ``what`` is the sentence about the undamaged checkpoints, and ``problem`` says why no newer checkpoint was
    committed. ``age_seconds`` is the time since the newest checkpoint of the run or, before the first one, since the
    trainer was ready to save checkpoints. The sentence gives this time in whole minutes, so that the sentence does not
    change with every report.
    """
    return f"{what}; {age_seconds // 60} min of training are not saved: {problem}"


def checkpoint_damaged(what: str, step: int, damage: str) -> str:
    """Return the sentence about the checkpoint of ``step``, which is damaged; ``damage`` says what is wrong with it.

    ``what`` is the sentence about the undamaged checkpoints.
    """
    return f"{what}; that of step {step} is damaged: {damage}"
