"""`finetune logs`: shows what the pods of a job write: by default worker 0 of the newest attempt, which has rank 0."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from finetune_cli.apiserver.job_client import parse
from finetune_cli.apiserver.pod_logs import JobPod, LogOptions, PodReader, newest_pods
from finetune_cli.commands.options import Commands, add_command, add_job, add_place, jobs_of, whole_number
from finetune_cli.state import state, status_of
from finetune_cli.terminal import say, without_sequences
from finetune_core.api.job import KIND, FineTuneJob
from finetune_core.api.resources import NODES_LIMIT
from finetune_core.api.status import ATTEMPT_LIMIT
from finetune_core.errors import UserError

LARGEST_COUNT = 10**9
EXAMPLES = """\
examples:
  finetune logs quickstart                    worker 0 of the newest attempt, which has rank 0
  finetune logs quickstart -f --tail 100
  finetune logs quickstart --worker 1 --attempt 2
  finetune logs quickstart --all-workers      each line begins with the number of the worker
  finetune logs quickstart --preflight        the check before the first attempt

Logs end with their pods. `finetune describe` shows why attempts ended, also when their pods are gone.
"""


def add_logs(commands: Commands) -> None:
    """Add `finetune logs` to the command line."""
    command = add_command(commands, "logs", "show what the pods of a job write", EXAMPLES, show_logs)
    add_job(command)
    add_place(command)
    command.add_argument("-f", "--follow", action="store_true", help="go on until the container ends")
    command.add_argument(
        "--tail", type=whole_number(0, LARGEST_COUNT), metavar="LINES", help="only the newest lines (default: all)"
    )
    command.add_argument(
        "--since", type=whole_number(1, LARGEST_COUNT), metavar="SECONDS", help="only lines of the last seconds"
    )
    command.add_argument("--timestamps", action="store_true", help="begin each line with its time")
    command.add_argument(
        "--attempt", type=whole_number(1, ATTEMPT_LIMIT), metavar="NUMBER", help="default: the newest attempt"
    )
    command.add_argument("--preflight", action="store_true", help="the check before the first attempt")
    workers = command.add_mutually_exclusive_group()
    workers.add_argument(
        "--worker", type=whole_number(0, NODES_LIMIT - 1), metavar="INDEX", default=0, help="index of the pod"
    )
    workers.add_argument("--all-workers", action="store_true", help="all pods of the attempt")
    command.add_argument("-c", "--container", metavar="NAME", help="default: the training container")


def show_logs(options: argparse.Namespace) -> int:
    """Print the log that the command line asks for, and return 0."""
    jobs = jobs_of(options)
    job = parse(jobs.get_stored(options.name))
    reader = PodReader(jobs.api, jobs.namespace)
    pods = newest_pods(
        reader.pods_of(options.name, job.metadata.uid), attempt=options.attempt, preflight=options.preflight
    )
    chosen = pods if options.all_workers else [pod for pod in pods if pod.index == options.worker]
    if not chosen:
        raise UserError(f"{KIND} {jobs.namespace}/{options.name}", why_none(job, pods, options))
    wanted = LogOptions(options.follow, options.tail, options.since, options.timestamps, options.container)
    for pod, line in reader.all_lines(chosen, wanted):
        shown = without_sequences(line)
        say(f"[{pod.index}] {shown}" if options.all_workers else shown)
    return 0


def why_none(job: FineTuneJob, pods: Sequence[JobPod], options: argparse.Namespace) -> str:
    """Return why the job has no pod whose log could be shown, and what to do. ``pods`` are those of the attempt that
    the command line asks for."""
    attempts = status_of(job).attempts
    if pods:
        there = ", ".join(str(pod.index) for pod in pods)
        return f"has no worker {options.worker} in attempt {pods[0].attempt}; its workers are {there}"
    if options.preflight:
        return "has no pod of a check any more; `finetune describe` shows what the check found"
    if options.attempt is not None and options.attempt > attempts.started:
        return f"has no attempt {options.attempt}; its newest one is {attempts.started}"
    if not attempts.started:
        return (
            f"has no pod yet, because no attempt was started: its state is {state(job)}; `finetune describe` says why"
        )
    number = options.attempt or attempts.started
    past = next((found for found in attempts.recent if found.number == number), None)
    ended = f", which ended as {past.reason}" if past is not None else ""
    return (
        f"has no pod of attempt {number}{ended} any more, and a log goes with its pod; `finetune describe` shows the"
        " attempts, and a log collector of the cluster may have the lines"
    )
