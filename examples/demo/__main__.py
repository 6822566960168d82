"""`make demo`: fine-tunes a model on a real Kubernetes cluster on this machine, and removes the cluster afterwards.

The demo applies examples/quickstart.yaml (or quickstart-full.yaml) unchanged, shows the live status as `finetune watch`
does, downloads the artifact, and compares the answers of base model and tuned model. All results are written to
out/demo/<method>/.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from examples.demo import steps
from examples.demo.base_model import base_model
from examples.demo.measurements import JobTimes, Measurements
from examples.trails.generate import Rows, generate, write
from finetune_cli.bucket.download import artifact_of, download
from finetune_cli.bucket.object_store import AccessKey, ObjectStoreReader
from finetune_cli.formatting import duration, size
from finetune_cli.state import Ending
from finetune_cli.terminal import SafeConsole
from finetune_cli.views.watch import show_until_ended, view_for
from finetune_core.api.job import FineTuneJob
from finetune_core.errors import UserError
from tests.cluster import Cluster, ClusterError, unusable_because
from tests.cluster.__main__ import build
from tests.cluster.progress import say, step

NAMESPACE = "demo"
JOB_TIMEOUT_SECONDS = 2400
ANSWERS_TIMEOUT_SECONDS = 600
EXAMPLES_SHOWN = 3
METHODS = {"lora": "LoRA", "full": "Full"}
HELP = """\
examples:
  python -m examples.demo
  python -m examples.demo --method full
  python -m examples.demo --keep        leave the cluster up afterwards and say how to reach it
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo. Return 0 when all phases succeeded, 1 after a failure, 130 when interrupted."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.demo",
        description="Fine-tune a small model on a real Kubernetes cluster on this machine.",
        epilog=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--method", choices=METHODS, default="lora", help="what is trained (default: %(default)s)")
    parser.add_argument("--keep", action="store_true", help="leave the cluster up until Ctrl-C")
    options = parser.parse_args(arguments)
    # SIGINT and SIGTERM raise KeyboardInterrupt in the main thread, so that both signals remove the cluster at any
    # time. The handler is set for SIGINT too, although Python's default handler does the same, because a shell that
    # starts the program in the background makes the program ignore SIGINT.
    for request in (signal.SIGINT, signal.SIGTERM):
        signal.signal(request, signal.default_int_handler)
    command = f"make demo METHOD={options.method}"
    try:
        return demo(METHODS[options.method], Path("out/demo") / options.method, command, keep=options.keep)
    except (ClusterError, UserError) as error:
        say(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        say("interrupted; the cluster has ended, nothing of it is left")
        return 130


def demo(method: str, output: Path, command: str, *, keep: bool) -> int:
    """Run all phases of the demo and return 0. ``method`` is `LoRA` or `Full`, the results are written into the folder
    ``output``, and ``command`` is the command that the measurements name. ``keep`` leaves the cluster up until Ctrl-C.
    Raises ClusterError where this machine can't run a cluster, and ClusterError or UserError where a phase fails."""
    if reason := unusable_because():
        raise ClusterError(reason)
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    measured = Measurements(command)
    with measured.phase("programs, base model, data, images: make what is missing"):
        build()
        model, rows, values = base_model(), generate(), steps.chart_values()
        write(rows, output / "data")
    with contextlib.ExitStack() as stack:
        with measured.phase("cluster"):
            cluster = stack.enter_context(Cluster.start())
        prepare(cluster, model, rows, values, measured)
        with measured.phase("job"):
            end, job = run_job(cluster, steps.QUICKSTARTS[method], measured)
        (output / "job.json").write_text(json.dumps(job.to_json(), indent=2) + "\n")
        if not end.succeeded:
            raise ClusterError(f"the job ended as {end.reason}: {end.message}\n{steps.diagnostics(cluster)}")
        with measured.phase("download"):
            fetch(cluster, job, output / "artifact")
        with measured.phase("answers"):
            answers = compare_answers(model, output)
        measured.exact_match = answers["exactMatch"]
        measured.record_sizes(cluster, job)
        measured.write(output / "measurements.json")
        print_results(answers, measured, job, output)
        if keep:
            keep_running(cluster, job)
        with measured.phase("clean up"):
            stack.close()
    measured.write(output / "measurements.json")
    return 0


def prepare(cluster: Cluster, model: Path, rows: Rows, values: dict[str, Any], measured: Measurements) -> None:
    """Put the files of ``model`` and the rows into the object store, install the operator with ``values`` for its Helm
    chart, and create the job's namespace. ``measured`` records the seconds of each phase."""
    with measured.phase("object store"):
        steps.make_bucket(cluster)
        with step("base model into MinIO"):
            steps.put_base_model(cluster, model)
        steps.put_rows(cluster, rows)
        steps.name_object_store(cluster)
    with measured.phase("operator"):
        with step("helm install"):
            steps.install_operator(cluster, values)
        steps.make_namespace(cluster, NAMESPACE)


def run_job(cluster: Cluster, file: Path, measured: Measurements) -> tuple[Ending, FineTuneJob]:
    """Apply the job file unchanged, show the job until it has ended, and return its end and its last state."""
    manifest = steps.manifest_of(file)
    name, pods = manifest["metadata"]["name"], manifest["spec"]["resources"]["nodes"]
    say(f"kubectl apply --namespace {NAMESPACE} --filename {file}")
    with JobTimes(cluster, NAMESPACE, pods) as times, steps.jobs_in(cluster, NAMESPACE) as jobs:
        steps.apply(cluster, file, NAMESPACE)
        with view_for(SafeConsole()) as view:
            states = jobs.follow(name, view.show_notice, give_up_after=JOB_TIMEOUT_SECONDS)
            try:
                end = show_until_ended(times.observe(states), view)
            except TimeoutError as error:
                reason = f"{name} has not ended after {duration(JOB_TIMEOUT_SECONDS)}"
                raise ClusterError(f"{reason}\n{steps.diagnostics(cluster)}") from error
        job = jobs.get(name)
    measured.job = times.seconds
    return end, job


def fetch(cluster: Cluster, job: FineTuneJob, folder: Path) -> None:
    """Download the artifact of ``job`` into the new folder ``folder``, as `finetune download` does."""
    keys = AccessKey(cluster.minio.access_key, cluster.minio.secret_key)
    with cluster.enter():
        store = ObjectStoreReader(job.spec.storage, keys, cluster.minio.endpoint)
        manifest = download(artifact_of(job), store, folder, lambda count: None)
    say(f"{len(manifest.files)} files, {size(manifest.total_bytes)}, verified")


def compare_answers(model: Path, output: Path) -> dict[str, Any]:
    """Return the answers of base model and tuned model to the held-out rows, and for each model the share of answers
    that are exactly right. ``model`` is the folder of the base model, and ``output`` is the folder of the demo's
    results."""
    file = output / "answers.json"
    arguments = ["--base", model, "--tuned", output / "artifact", "--rows", output / "data" / "heldout.jsonl"]
    command = [sys.executable, "-m", "examples.demo.answers", *map(str, arguments), "--output", str(file)]
    with step("40 held-out sentences, twice"):
        done = subprocess.run(command, text=True, capture_output=True, timeout=ANSWERS_TIMEOUT_SECONDS)
    if done.returncode != 0:
        raise ClusterError(f"{shlex.join(command)} failed:\n{done.stderr[-2000:]}")
    answers: dict[str, Any] = json.loads(file.read_text())
    return answers


def print_results(answers: dict[str, Any], measured: Measurements, job: FineTuneJob, output: Path) -> None:
    """Print some answers of base model and tuned model, the share of right answers, the duration of each phase, sizes,
    and the paths of the results."""
    console = SafeConsole()
    table = Table(title="Sentences that the model has not seen", title_justify="left", show_lines=True, expand=True)
    for heading in ("sentence", "base model", "tuned model"):
        table.add_column(heading, ratio=1)
    for row in answers["rows"][:EXAMPLES_SHOWN]:
        right = "green" if row["tuned"] == row["meaning"] else "red"
        table.add_row(Text(row["sentence"]), Text(row["base"] or "(an empty line)"), Text(row["tuned"], style=right))
    console.print(table)
    count, share = len(answers["rows"]), answers["exactMatch"]
    console.print(
        f"Exactly right of {count}: base {share['base']:.0%}, tuned {share['tuned']:.0%}", style="bold", highlight=False
    )
    times = Table.grid(padding=(0, 2))
    for name, seconds in measured.phases.items():
        times.add_row(name, f"{seconds:.1f} s")
    for milestone, seconds in measured.job.items():
        times.add_row(f"  apply → {milestone}", f"{seconds:.1f} s")
    times.add_row("operator memory", size(measured.memory["operatorWorkingSetBytes"]))
    for checkpoint in measured.checkpoints:
        times.add_row(f"checkpoint of step {checkpoint['step']}", size(checkpoint["bytes"]))
    console.print(times)
    console.print(f"artifact in the store: {artifact_of(job).uri}", highlight=False, soft_wrap=True)
    console.print(f"artifact here:         {output / 'artifact'}", highlight=False)
    console.print(f"answers, figures, job: {output}/answers.json, measurements.json, job.json", highlight=False)


def keep_running(cluster: Cluster, job: FineTuneJob) -> None:
    """Print how to reach the cluster, and return when the user presses Ctrl-C."""
    enter, name = cluster.layout.enter_script, job.metadata.name
    say("\nThe cluster stays up. In another terminal:")
    say(f"  {enter} kubectl get ftj --namespace {NAMESPACE} {name} --output yaml")
    say(f"  {enter} {Path(sys.executable).parent}/finetune watch {name} --namespace {NAMESPACE}")
    say(f"  {enter} bash")
    say(f"MinIO inside: {cluster.minio.endpoint}  user {cluster.minio.access_key}  password {cluster.minio.secret_key}")
    say("Ctrl-C ends it.")
    with contextlib.suppress(KeyboardInterrupt):
        threading.Event().wait()


if __name__ == "__main__":
    sys.exit(main())
