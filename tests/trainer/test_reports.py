"""Rank 0 posts reports over HTTPS with the token from a file. The reports hold what the job's status shows."""

from __future__ import annotations

import datetime
import signal
import ssl
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from finetune_core.api.sources import MIX_LIMIT
from finetune_core.api.status import METRIC_LIMIT
from finetune_core.contract import (
    REPORT_LIMIT_BYTES,
    CheckpointRecord,
    CurvePoint,
    Outcome,
    Phase,
    Report,
    ReportConfig,
    Result,
)
from finetune_trainer.data.examples import Example, example_set
from finetune_trainer.data.micro_batches import MicroBatcher
from finetune_trainer.data.mixture import Mixture
from finetune_trainer.pod.settings import Paths
from finetune_trainer.reporting.curve import MAX_POINTS, downsample
from finetune_trainer.reporting.progress import Progress
from finetune_trainer.reporting.reporter import Reporter
from finetune_trainer.reporting.throughput import Throughput, Tokens
from finetune_trainer.storage.step_log import StepRow
from tests.cluster.waiting import wait_for
from tests.trainer.conftest import StartPods
from tests.trainer.gangs import step_rows
from tests.trainer.objectstore import BUCKET, ObjectStore
from tests.trainer.pods import Attempt, run_config


@dataclass
class ReportServer:
    url: str
    ca_file: Path
    reports: list[Report] = field(default_factory=list)
    tokens: list[str] = field(default_factory=list)
    fail: bool = False
    answers: threading.Event = field(default_factory=threading.Event)
    """Set while the server answers. A report that arrives while it is not set waits for its answer."""

    def __post_init__(self) -> None:
        self.answers.set()


@pytest.fixture
def report_server(tmp_path: Path) -> Iterator[ReportServer]:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "reports")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now)
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    chain = tmp_path / "server.pem"
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    chain.write_bytes(private + certificate.public_bytes(serialization.Encoding.PEM))
    (tmp_path / "ca.crt").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            server.reports.append(Report.model_validate_json(body))
            server.tokens.append(self.headers["Authorization"])
            server.answers.wait()
            self.send_response(503 if server.fail else 200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Suppress the server's log lines."""

    listener = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(chain)
    listener.socket = context.wrap_socket(listener.socket, server_side=True)
    server = ReportServer(f"https://127.0.0.1:{listener.server_address[1]}/report", tmp_path / "ca.crt")
    thread = threading.Thread(target=listener.serve_forever, daemon=True)
    thread.start()
    yield server
    listener.shutdown()
    listener.server_close()


def test_reports_tell_the_run_from_loading_to_its_result(
    store: ObjectStore, pods: StartPods, report_server: ReportServer, tmp_path: Path
) -> None:
    token = tmp_path / "token"
    token.write_text("the-token\n")
    config = run_config(store, "reported", world__nodes=1, evaluation__everySteps=3)
    config["report"] = {"url": report_server.url, "intervalSeconds": 0.05}
    report_server.fail = True  # The server refuses the first reports. This must never stop the training.
    files = ("--ca-file", str(report_server.ca_file), "--report-token-file", str(token))
    attempt = pods(config, arguments=files, forked=True)
    attempt.wait_for(lambda: bool(report_server.reports), "the first report")
    report_server.fail = False
    assert attempt.wait() == [0]
    assert set(report_server.tokens) == {"Bearer the-token"}
    first, last = report_server.reports[0], report_server.reports[-1]
    assert (first.phase, first.run, first.step) == (Phase.LOADING, 0, 0)
    assert last.phase is Phase.ENDED
    assert last.result == attempt.pods[0].result
    assert (last.run, last.step, last.total_steps, last.epoch) == (1, 6, 6, 1.5)
    assert [point.step for point in last.history] == [1, 2, 3, 4, 5, 6]
    assert [point.step for point in last.history if point.perplexity is not None] == [3, 6]
    assert [(record.run, record.step) for record in last.checkpoints] == [(1, 3), (1, 6)]
    assert last.metrics.keys() == {
        "loss",
        "perplexity",
        "learningRate",
        "gradientNorm",
        "supervisedTokensPerSecond",
        "paddedTokensPerSecond",
        "memoryBytes",
        "memoryPeakBytes",
        "dataSeconds",
        "forwardSeconds",
        "backwardSeconds",
        "updateSeconds",
        "stepSeconds",
        "checkpointSeconds",
        "skippedUpdates",
    }
    rows = step_rows(store, "reported")
    assert [row.step for row in rows] == [1, 2, 3, 4, 5, 6]
    for row in rows:
        parts = (row.data_seconds, row.forward_seconds, row.backward_seconds, row.update_seconds)
        assert all(part > 0 for part in parts)
        assert sum(parts) <= row.seconds
        assert row.tokens < row.real_tokens < row.padded_tokens
        assert 0 < row.memory_bytes <= row.memory_peak_bytes
        assert row.mfu is None  # MFU needs the peak FLOPs of the device, which are unknown for a CPU.
    # The time of the checkpoint at step 3 is recorded in the row of step 4.
    assert rows[3].checkpoint_seconds > 0
    assert rows[4].checkpoint_seconds == 0
    assert last.metrics["skippedUpdates"] == 0
    assert last.tokens_per_second is not None
    assert last.metrics["supervisedTokensPerSecond"] < last.tokens_per_second < last.metrics["paddedTokensPerSecond"]
    assert last.best is not None
    assert last.best.step in (3, 6)
    evaluation = last.evaluation
    assert evaluation is not None
    assert (evaluation.rows, evaluation.examples, evaluation.tuned_step) == ("Validation", 7, 6)
    assert evaluation.base is not None
    assert evaluation.tuned is not None
    assert evaluation.tuned.perplexity == pytest.approx(rows[-1].perplexity, rel=1e-6)
    assert evaluation.base.perplexity > evaluation.tuned.perplexity
    assert attempt.pods[0].result.evaluation == evaluation.rounded()
    assert [report.step for report in report_server.reports] == sorted(report.step for report in report_server.reports)


def test_reports_count_the_examples_of_each_source_of_a_mix_also_after_a_resume(
    store: ObjectStore, pods: StartPods, report_server: ReportServer, tmp_path: Path
) -> None:
    """27 rows make an epoch of 5 batches. The first attempt is stopped, and the second one has more ranks."""
    token = tmp_path / "token"
    token.write_text("the-token\n")
    weights = {"train": "0.25", "validation": "0.75"}
    mix = [{"s3": {"uri": f"s3://{BUCKET}/data/{name}.jsonl"}, "weight": weight} for name, weight in weights.items()]

    def begin(attempt: int, nodes: int) -> Attempt:
        config = run_config(
            store,
            "mixed-reports",
            world__nodes=nodes,
            dataset__train={"mix": mix},
            dataset__validation=None,
            dataset__packing=True,
            optimization__maxSteps=40,
        )
        config["report"] = {"url": report_server.url, "intervalSeconds": 0.05}
        arguments = ("--ca-file", str(report_server.ca_file), "--report-token-file", str(token))
        return pods(config, attempt=attempt, arguments=arguments, forked=True)

    first = begin(1, nodes=1)
    first.wait_for(lambda: "step 3/" in first.output, "step 3")
    first.pods[0].process.send_signal(signal.SIGTERM)
    assert first.wait() == [143]
    stopped = report_server.reports[-1]
    assert 3 <= stopped.step < 40
    assert begin(2, nodes=2).wait() == [0, 0]
    last = report_server.reports[-1]
    assert (last.step, last.resumed_from_step, last.epoch) == (40, stopped.step, 8.0)
    mixture = Mixture.of([20, 7], list(weights.values()))
    for report in (stopped, last):
        counts = [report.metrics["mix0Examples"], report.metrics["mix1Examples"]]
        assert counts == list(mixture.taken(report.step, global_batch_size=6))
    assert counts == [54, 162]
    (notice,) = [text for text in last.notices if text.startswith("dataset.train: an epoch takes ")]
    assert f"7 times one of 20 examples from s3://{BUCKET}/data/train.jsonl" in notice
    assert f"20 times one of 7 examples from s3://{BUCKET}/data/validation.jsonl" in notice
    assert len(last.metrics) <= METRIC_LIMIT - MIX_LIMIT + len(mix)


def test_an_urgent_report_and_the_end_wait_for_no_interval(report_server: ReportServer, tmp_path: Path) -> None:
    """An urgent report and the end may come while another report is being posted."""
    token = tmp_path / "token"
    token.write_text("the-token")
    paths = Paths(ca_file=report_server.ca_file, report_token_file=token)
    report_server.answers.clear()
    reporter = Reporter(ReportConfig(url=report_server.url, interval_seconds=3600), paths)
    progress = Progress(pod_uid="p", ranks=1, reporter=reporter)  # posts its first report

    def arrived(count: int) -> None:
        wait_for(f"report {count}", lambda: len(report_server.reports) == count, 60)

    arrived(1)
    progress.phase(Phase.TRAINING)
    report_server.answers.set()
    arrived(2)
    report_server.answers.clear()
    progress.phase(Phase.SAVING)
    arrived(3)
    closed = threading.Thread(target=progress.end, args=(Result(outcome=Outcome.STOPPED, message="told to stop"),))
    closed.start()
    report_server.answers.set()
    closed.join(60)
    assert not closed.is_alive()
    assert [report.phase for report in report_server.reports] == [
        Phase.LOADING,
        Phase.TRAINING,
        Phase.SAVING,
        Phase.ENDED,
    ]


def test_a_report_with_many_long_addresses_is_sent_within_the_servers_limit(
    report_server: ReportServer, tmp_path: Path
) -> None:
    token = tmp_path / "token"
    token.write_text("the-token\n")
    paths = Paths(ca_file=report_server.ca_file, report_token_file=token)
    reporter = Reporter(ReportConfig(url=report_server.url), paths)
    progress = Progress(pod_uid="p", ranks=1, reporter=reporter)
    time = datetime.datetime.now(datetime.UTC)
    records = [
        CheckpointRecord(run=1, step=step, uri="s3://" + "u" * 1019, bytes=1, manifest_sha256="f" * 64, time=time)
        for step in range(150)
    ]
    progress.saved(records[-1], records, None)
    progress.end(Result(outcome=Outcome.COMPLETED))
    last = report_server.reports[-1]
    assert last.phase is Phase.ENDED
    assert len(last.to_json().encode()) <= REPORT_LIMIT_BYTES
    assert 40 < len(last.checkpoints) < 100
    assert last.checkpoints == records[-len(last.checkpoints) :]


def test_after_a_resume_or_a_rollback_the_figures_are_those_of_the_steps_that_led_there(
    report_server: ReportServer, tmp_path: Path
) -> None:
    token = tmp_path / "token"
    token.write_text("the-token\n")
    paths = Paths(ca_file=report_server.ca_file, report_token_file=token)
    taken = partial(Mixture.of([20, 7], ["3", "1"]).taken, global_batch_size=8)
    history = [
        StepRow(
            step=1, epoch=0.1, loss=3.0, learning_rate=1, tokens=1, seconds=1, perplexity=2.5, task_score=0.5, mfu=0.3
        ),
        StepRow(step=2, epoch=0.2, loss=2.0, learning_rate=1, tokens=1, seconds=1, mfu=0.4),
    ]

    def metrics(*histories: Sequence[StepRow]) -> dict[str, float]:
        progress = Progress(pod_uid="p", ranks=1, reporter=Reporter(ReportConfig(url=report_server.url), paths))
        for run, rows in enumerate(histories, start=1):
            progress.begin(run=run, total_steps=9, history=rows, taken=taken)
        progress.end(Result(outcome=Outcome.COMPLETED))
        shown = ("loss", "perplexity", "taskScore", "mix0Examples", "mix1Examples")
        return {name: value for name, value in report_server.reports[-1].metrics.items() if name in shown}

    resumed = {"loss": 2.0, "perplexity": 2.5, "taskScore": 0.5, "mix0Examples": 12, "mix1Examples": 4}
    assert metrics(history) == resumed
    assert report_server.reports[-1].mfu == 0.4
    assert metrics(history, history[:1]) == resumed | {"loss": 3.0, "mix0Examples": 6, "mix1Examples": 2}
    assert report_server.reports[-1].mfu == 0.3
    assert metrics(history, []) == {"mix0Examples": 0, "mix1Examples": 0}
    assert report_server.reports[-1].mfu is None


def test_a_thinned_curve_keeps_its_ends_and_its_evaluations() -> None:
    points = [CurvePoint(step=step, loss=1.0, perplexity=2.0 if step % 50 == 0 else None) for step in range(1, 1001)]
    kept = downsample(points)
    assert len(kept) == MAX_POINTS
    assert kept[0].step == 1
    assert kept[-1].step == 1000
    assert [point.step for point in kept if point.perplexity] == list(range(50, 1001, 50))
    assert [point.step for point in kept] == sorted({point.step for point in kept})
    many = [CurvePoint(step=step, perplexity=2.0) for step in range(500)]
    assert len(downsample(many)) == MAX_POINTS


def test_trap_27_padding_does_not_count_as_throughput() -> None:
    """Half of the batch's positions are padding, so the rate of real tokens is half the rate of computed positions."""
    lengths = (2, 10, 2, 6)
    examples = example_set([Example(range(length), [(1, length)]) for length in lengths])
    batches = MicroBatcher(examples, rank=0, world_size=1, pad=0, capacity=None)
    (batch,) = batches.tensors(batches.plan_rows(range(4), 4))
    assert batch.input_ids.numel() == 40
    assert (batch.real_tokens, batch.tokens) == (20, 16)
    speed = Throughput()
    speed.step(now=2.0, tokens=Tokens(batch.tokens, batch.real_tokens, batch.input_ids.numel()), seconds=2.0)
    assert speed.per_second() == (8.0, 10.0, 20.0)


def test_the_time_before_the_first_step_makes_no_run_slow() -> None:
    """Scoring the base model takes minutes. Evaluations between two steps count: they belong to the training."""
    speed = Throughput()
    speed.step(now=600.0, tokens=Tokens(10, 20, 40), seconds=2.0)
    assert speed.per_second() == (5.0, 10.0, 20.0)
    assert speed.eta_seconds(10) == 20
    speed.step(now=608.0, tokens=Tokens(10, 20, 40), seconds=2.0)
    assert speed.per_second() == (2.0, 4.0, 8.0)


def test_speed_and_remaining_time_come_from_a_sliding_window() -> None:
    speed = Throughput()
    assert speed.eta_seconds(10) is None
    for step in range(1, 101):
        speed.step(now=float(step if step <= 50 else 50 + 2 * (step - 50)), tokens=Tokens(10, 20, 40), seconds=1.0)
    assert speed.per_second() == (5.0, 10.0, 20.0)
    assert speed.eta_seconds(10) == 20
