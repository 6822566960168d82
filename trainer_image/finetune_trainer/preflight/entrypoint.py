"""PID 1 of the preflight pod: runs every check within a time limit and writes the findings to the termination message.
`__main__.py` calls `run`.

The pod has little memory, so the two parts of the checks that need much memory run in child processes, one after the
other: the checks of model and data without torch, and then the trainer's own checks of the model on torch's meta
device.
"""

from __future__ import annotations

import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NoReturn

from finetune_core.contract import IDENTITY_VARIABLES, RunConfig
from finetune_core.contract.preflight_result import PREFLIGHT_SECONDS, FindingKind, FoundRun, PreflightResult
from finetune_core.contract.same_training import settings_digest
from finetune_trainer.kernels.parts import parts_left_plain
from finetune_trainer.pod.imports import importing
from finetune_trainer.pod.plan import read_run_file
from finetune_trainer.pod.settings import STORE_CHECK_SECONDS, Paths
from finetune_trainer.pod.signals import STOP_SIGNALS
from finetune_trainer.pod.unused_libraries import leave_out_bitsandbytes
from finetune_trainer.preflight.confinement import MEMORY_BYTES, ChildEnd, run_confined
from finetune_trainer.preflight.findings import Findings
from finetune_trainer.preflight.former_run import former_folders, judged_run, own_folder
from finetune_trainer.preflight.store_check import check_store
from finetune_trainer.sources.adapter_files import adapter_files
from finetune_trainer.sources.cache.cached_fetch import cache_notices
from finetune_trainer.sources.identities import input_identities
from finetune_trainer.sources.model_files import model_files
from finetune_trainer.sources.model_selection import select_model_files
from finetune_trainer.storage.lineage import RunRecord
from finetune_trainer.storage.root import RunRoot, open_root, source_store

HEADERS_FOLDER = "headers"
"""Name of a folder in the preflight folder. The folder holds the base model, with weight files that hold only their
headers."""
ADAPTER_FOLDER = "adapter"
"""Name of a folder in the preflight folder. The folder holds the adapter that the job starts from, with a weight file
that holds only its header."""
TORCH_MEMORY_BYTES = 1100 << 20
"""Largest memory in bytes that the child which imports torch may add. About 300 MiB of this memory are mapped files of
torch, which the kernel can free at any time. So the pod stays below its limit of 1 GiB."""


class ChecksTimedOut(BaseException):
    """The checks took longer than their time limit. The class is a BaseException, so that no `except Exception` in a
    check or a library catches the error."""


def run(paths: Paths, environment: Mapping[str, str], *, first_examples: Path | None = None) -> int:
    """Run all checks and return the exit code. 0: there are no findings. 64: the job can't run as written. 75:
    something outside the job fails or is missing. ``environment`` is the pod's environment, which holds the job's uid.
    ``first_examples`` is a file into which the first examples of the training rows are written, None for no file.

    An unexpected error ends the process with a traceback and exit code 1, and without a result. The operator then shows
    the failure and starts the preflight pod again.
    """
    started = time.monotonic()
    findings = Findings()
    try:
        with _time_limit(PREFLIGHT_SECONDS):
            findings.collect("podTemplate.env", partial(parts_left_plain, environment))
            uid = environment.get(IDENTITY_VARIABLES["uid"], "")
            run_checks(findings, paths, uid=uid, first_examples=first_examples)
    except ChecksTimedOut:
        sentence = f"the checks did not end within {PREFLIGHT_SECONDS} s; they were looking at {findings.subject}"
        findings.add(FindingKind.OUTSIDE, sentence)
    result = findings.result
    paths.termination_log.write_text(result.to_termination_message())
    _print_result(result, time.monotonic() - started)
    return result.exit_code


def run_checks(findings: Findings, paths: Paths, *, uid: str = "", first_examples: Path | None = None) -> None:
    """Check the run file, the object store, the base model and the data, in this order.

    If the artifact of the job is committed already, or that of a former job with the same training, check only the run
    file, and that the object store can be read. ``uid`` is the job's uid. With ``first_examples``, a file for the first
    examples, model and data are checked in any case, and nothing is written to the store.

    Former jobs are looked for only if the job's folder is named after the uid, and holds no run and no artifact yet. A
    person chose a folder with another name (`storage.runId`), so the job keeps that folder.
    """
    config = findings.collect("the run file", partial(read_run_file, paths.run_file))
    root = findings.collect("storage", partial(open_root, config, paths)) if config is not None else None
    if config is None or root is None:
        return
    folder = paths.scratch / "preflight"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    root = RunRoot(root.store.with_budget(STORE_CHECK_SECONDS), root.location)
    own = findings.collect("the object store", partial(own_folder, root))
    if own is not None:
        findings.found = own.found
        if not own.has_runs and own.found is None and root.location.prefix.endswith(f"/{uid}"):
            findings.found = _former_run(findings, config, paths, root, folder)
    if findings.found is not None and findings.found.artifact is not None and first_examples is None:
        findings.found = judged_run(findings.found, config.evaluation.require)
        return
    # If the store does not answer, nothing else is requested from it, because the same finding would only be repeated.
    store_answers = own is not None
    if store_answers and first_examples is None:
        findings.collect("the object store", partial(check_store, root))

    def check_inputs(child: Findings) -> None:
        records = own.records if own is not None else {}
        _check_inputs(
            child, config, paths, root, folder, records, store_answers=store_answers, first_examples=first_examples
        )

    _run_confined(findings, check_inputs)
    print(f"model files and data were checked within {_peak_memory()}", flush=True)
    adapter = folder / ADAPTER_FOLDER if config.model.adapter is not None else None
    # Where one of these folders is missing, a finding says why the model was not checked.
    if (folder / HEADERS_FOLDER).is_dir() and (adapter is None or adapter.is_dir()):
        check_for_job = partial(_check_for_job, config, folder / HEADERS_FOLDER, adapter)
        end = run_confined(
            lambda send: check_for_job(Findings(send)), findings.receive, memory_bytes=TORCH_MEMORY_BYTES
        )
        if end is ChildEnd.TOO_LARGE:
            # The training pod has much more memory than this pod, so a large model is no reason to refuse the job.
            findings.notice("model: it is too large for the last checks before the training, which were left out")
        else:
            _tell_end(findings, end)


def _run_confined(findings: Findings, checks: Callable[[Findings], None]) -> None:
    """Run ``checks`` in a child process whose memory is limited, and add what they find to ``findings``.

    Raises RuntimeError if the checks end with an unexpected error.
    """
    _tell_end(findings, run_confined(lambda send: checks(Findings(send)), findings.receive))


def _tell_end(findings: Findings, end: ChildEnd) -> None:
    """Add a finding where the checks of a child process were ended. Raises RuntimeError where they raised an error."""
    if end is ChildEnd.TOO_LARGE:
        findings.add(
            FindingKind.FINAL,
            f"{findings.subject}: can't be checked with {MEMORY_BYTES >> 20} MiB of memory: what is read there is too"
            " large, or expands to too much (runPolicy.preflight: Skip leaves all checks out)",
        )
    elif end is ChildEnd.KILLED:
        findings.add(
            FindingKind.OUTSIDE,
            f"{findings.subject}: its check was ended by a signal, for lack of memory or because a library can't read"
            " what is there (runPolicy.preflight: Skip leaves all checks out)",
        )
    elif end is ChildEnd.FAILED:
        raise RuntimeError(f"the check of {findings.subject} failed; its traceback stands above")


def _former_run(findings: Findings, config: RunConfig, paths: Paths, root: RunRoot, folder: Path) -> FoundRun | None:
    """Return the run of a former job of the same namespace and name that trained with the same settings on the same
    base model and data. None where there is no such run, or where model and data can't be compared."""
    former = findings.collect("the object store", partial(former_folders, root, settings_digest(config)))
    if not former:
        return None
    # Model and data are looked at only now, because most jobs have no former job with the same settings.
    identities = partial(input_identities, config, paths, source_store(root, config, paths), folder / "identities")
    inputs = findings.collect("the model and the data", identities)
    return next((candidate.found for candidate in former if candidate.training.inputs == inputs), None)


def _check_inputs(
    findings: Findings,
    config: RunConfig,
    paths: Paths,
    root: RunRoot,
    folder: Path,
    records: Mapping[int, RunRecord],
    *,
    store_answers: bool,
    first_examples: Path | None,
) -> None:
    """Check the base model, the adapter, the grader, the first rows of each data source, and by the plan of the
    training whether it fits the memory of its GPUs. Without ``store_answers``, model, adapter and data in the object
    store are left out. ``records`` are those of the runs in the job's folder. ``first_examples`` is as for `run`."""
    _hide_torch()
    with importing():
        from finetune_trainer.data.dataset import check_tools_of_mix
        from finetune_trainer.data.files.index import INDEX_FILE
        from finetune_trainer.evaluation.graders import load_grading
        from finetune_trainer.preflight.memory_check import check_memory_of
        from finetune_trainer.preflight.model_check import ModelFacts, check_adapter, check_model, check_same_adapter
        from finetune_trainer.preflight.row_check import check_rows
        from finetune_trainer.preflight.task_check import TaskCheck

    store = source_store(root, config, paths)

    def check_base_model() -> ModelFacts:
        files = model_files(config.model, paths, store)
        model_bytes = sum(files.sizes[name] for name in select_model_files(files).names)
        findings.measured(model_bytes=model_bytes)
        findings.notice(*cache_notices(model_bytes, paths.model_cache))
        return check_model(files, folder / "model", folder / HEADERS_FOLDER, config.model.added_tokens)

    model = findings.collect("the model", check_base_model) if config.model.s3 is None or store_answers else None
    findings.notice(*(model.notices if model is not None else ()))

    def check_initial_adapter() -> None:
        files = adapter_files(config, paths, store)
        if files is not None:
            check_adapter(files, folder / ADAPTER_FOLDER)
        check_same_adapter(files, records, folder / "whole-adapter")

    adapter = config.model.adapter
    if store_answers or (adapter is not None and adapter.s3 is None and adapter.job is None):
        findings.collect("the adapter", check_initial_adapter)
    dataset = config.dataset
    task = findings.collect("dataset.task", lambda: TaskCheck(config, load_grading(dataset, config.evaluation.require)))
    heads: dict[str, Path] = {}
    longest_rows: list[int] = []  # of each source of training rows, in tokens
    for number, (field, source) in enumerate(dataset.sources.items()):
        if source.s3 is not None and not store_answers:
            continue
        check = partial(
            check_rows,
            dataset,
            source,
            field,
            paths,
            store,
            folder / f"data-{number}",
            model,
            task,
            today=config.template_date,
            base_prompt=config.evaluation.base_prompt,
            measured=lambda data_bytes: findings.measured(data_bytes=data_bytes),
            has_tokens=longest_rows.append if field.startswith("dataset.train") else lambda _: None,
            first_examples=first_examples if number == 0 else None,
        )
        findings.notice(*(findings.collect(field, check) or []))
        if (folder / f"data-{number}" / INDEX_FILE).is_file():
            heads[field] = folder / f"data-{number}"
    if heads.keys() == dataset.sources.keys():
        findings.collect("dataset.train", partial(check_tools_of_mix, heads, dataset.format))
    if model is not None:
        check_memory = partial(check_memory_of, config, model.folder, longest_row=max(longest_rows, default=None))
        memory = findings.collect("resources", check_memory)
        if memory is not None:
            if memory.planned is not None:
                findings.plan(memory.planned)
            findings.notice(*memory.notices)


def _check_for_job(config: RunConfig, headers: Path, adapter: Path | None, findings: Findings) -> None:
    """Run the trainer's checks of the base model and of the adapter that the job starts from. The folders ``headers``
    and ``adapter`` hold no weights."""
    _limit_threads()
    leave_out_bitsandbytes(config)
    with importing():
        from finetune_trainer.preflight.model_check import check_for_job

    findings.notice(*(findings.collect("the model", partial(check_for_job, headers, config, adapter)) or []))


def _limit_threads() -> None:
    """Keep libraries from starting one thread per core of the node, because the pod has a CPU limit of one core and
    little memory. Also keep transformers from writing reports to the log."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(variable, "1")


def _hide_torch() -> None:
    """Make transformers believe that torch is not installed. transformers can load tokenizers and configurations
    without it."""
    _limit_threads()
    # `import torch` raises ModuleNotFoundError while sys.modules holds None for it.
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise ChecksTimedOut in the `with` block after ``seconds``, even while a request hangs. SIGTERM and SIGINT end
    the process at once, in the block and after it."""

    def on_alarm(*_: object) -> NoReturn:
        raise ChecksTimedOut

    for number in STOP_SIGNALS:
        signal.signal(number, lambda number, _: os._exit(128 + number))
    # `__main__.py` blocked these signals at the start, so that none arrives before its handler is installed.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    signal.signal(signal.SIGALRM, on_alarm)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _print_result(result: PreflightResult, seconds: float) -> None:
    """Print to the log the findings, the notices, a run that was found, and the time and memory that the checks
    took."""
    for finding in result.findings:
        print(f"{finding.kind.value}: {finding.message}", file=sys.stderr)
    for notice in result.notices:
        print(notice)
    if result.found is not None:
        print(f"found in the bucket: {result.found.to_json()}")
    print(f"{len(result.findings)} findings after {seconds:.1f} s, with {_peak_memory()} at most", flush=True)


def _peak_memory() -> str:
    """Return the peak resident memory of this process plus that of the largest child so far, for example `212 MiB`. The
    figure helps to choose the memory limit of the preflight pod."""
    own = int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
    return f"{own + resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss >> 10} MiB"
