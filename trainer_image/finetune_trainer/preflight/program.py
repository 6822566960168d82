"""PID 1 of the preflight pod: runs every check within a bound, and leaves the findings in the termination message.

A small pod without GPUs: torch is kept out, because importing it takes longer and more memory than all checks.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NoReturn

from finetune_core.contract import RunConfig
from finetune_core.contract.preflight_result import PREFLIGHT_SECONDS, FindingKind, PreflightResult
from finetune_trainer.launcher import read_config
from finetune_trainer.pod.plan import open_root
from finetune_trainer.pod.settings import STORE_CHECK_SECONDS, Paths
from finetune_trainer.preflight.findings import Findings
from finetune_trainer.preflight.store import check_store
from finetune_trainer.sources.model_files import model_files
from finetune_trainer.storage.artifact import committed_result
from finetune_trainer.storage.root import RunRoot


class TimeIsUp(BaseException):
    """The checks took too long."""


def run(paths: Paths) -> int:
    """Run the checks; return the exit code: 0 nothing found, 64 impossible, 75 something outside is missing.

    What nobody expected ends with a traceback and 1, and leaves no result: the operator shows that and tries again.
    """
    started = time.monotonic()
    findings = Findings()
    try:
        with _bounded(PREFLIGHT_SECONDS):
            examine(findings, paths)
    except TimeIsUp:
        sentence = f"the checks did not end within {PREFLIGHT_SECONDS} s; they were looking at {findings.subject}"
        findings.add(FindingKind.OUTSIDE, sentence)
    result = findings.result
    paths.termination_log.write_text(result.to_termination_message())
    _tell(result, time.monotonic() - started)
    return result.exit_code


def examine(findings: Findings, paths: Paths) -> None:
    """The story: the run file, the store, and, unless this run has its artifact already, model and rows."""
    config = findings.of("the run file", partial(read_config, paths.run_file))
    root = findings.of("storage", partial(open_root, config, paths)) if config is not None else None
    if config is None or root is None:
        return
    folder = paths.scratch / "preflight"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    root = RunRoot(root.store.with_budget(STORE_CHECK_SECONDS), root.location)
    is_done = findings.of("the object store", partial(_is_done, root))
    if is_done:
        return
    # A store that refuses says the same sentence to every question: it is asked once.
    store_answers = is_done is not None
    if store_answers:
        findings.of("the object store", partial(check_store, root))
    _examine_inputs(findings, config, paths, root, folder, store_answers=store_answers)


def _is_done(root: RunRoot) -> bool:
    """Whether this run's artifact is committed: then an attempt does nothing but say so."""
    return committed_result(root) is not None


def _examine_inputs(
    findings: Findings, config: RunConfig, paths: Paths, root: RunRoot, folder: Path, *, store_answers: bool
) -> None:
    """Look at model and rows, as far as they can be reached."""
    _keep_torch_out()
    from finetune_trainer.preflight.model_check import ModelFacts, check_model
    from finetune_trainer.preflight.rows import check_rows

    def look_at_model() -> ModelFacts:
        return check_model(model_files(config.model, paths, root.store), folder / "model", config.model.added_tokens)

    model = findings.of("the model", look_at_model) if config.model.s3 is None or store_answers else None
    dataset = config.dataset
    for part, source in (("train", dataset.train), ("validation", dataset.validation), ("test", dataset.test)):
        if source is None or (source.s3 is not None and not store_answers):
            continue
        name = f"dataset.{part}"
        check = partial(check_rows, dataset, source, name, paths, root.store, folder / part, model)
        findings.notice(*(findings.of(name, check) or []))


def _keep_torch_out() -> None:
    """Make transformers believe that torch is not installed; it loads tokenizers and configurations without it."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]  # what `import` takes for "there is none"


@contextmanager
def _bounded(seconds: float) -> Iterator[None]:
    """Raise TimeIsUp in the block after ``seconds``, also out of a request that hangs; SIGTERM ends the program."""

    def time_is_up(*_: object) -> NoReturn:
        raise TimeIsUp

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: os._exit(128 + number))
    # The program's first line blocked them until there is a handler.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM, signal.SIGINT))
    signal.signal(signal.SIGALRM, time_is_up)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _tell(result: PreflightResult, seconds: float) -> None:
    """Say the same in the log."""
    for finding in result.findings:
        print(f"{finding.kind.value}: {finding.message}", file=sys.stderr)
    for notice in result.notices:
        print(notice)
    print(f"{len(result.findings)} findings after {seconds:.1f} s, with {_peak_memory()} at most", flush=True)


def _peak_memory() -> str:
    """Return the largest resident set of this process: the pod's limit is chosen by it."""
    status = Path("/proc/self/status").read_text()
    kibibytes = status.partition("VmHWM:")[2].split()[0]
    return f"{int(kibibytes) >> 10} MiB"
