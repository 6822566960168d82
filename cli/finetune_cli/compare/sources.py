"""What a source of `finetune compare` is, how the comparison calls the source, and what the status of a job says
beyond the folder of its run.

`commands/compare_command.py` reads the sources.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress

from pydantic import ValidationError

from finetune_cli.compare.compared_run import JobFacts
from finetune_cli.compare.stored_files import settings_of
from finetune_cli.state import state, status_of
from finetune_core.api.job import FineTuneJob
from finetune_core.errors import UserError
from finetune_core.layout import LOCAL_RUN
from finetune_core.resolve import resolve


def is_folder(source: str) -> bool:
    """Return whether ``source`` is the path of a folder and not the name of a job. `finetune download` makes a folder
    with the name of the job, so a text without a slash is a job even where such a folder exists."""
    return "/" in source or os.sep in source or source in (".", "..") or source.startswith("~")


def labels_of(sources: Sequence[str]) -> list[str]:
    """Return a short and different name for each source: the name of the job, which the layout puts before the id of
    the run, or the last part of a path, and a number behind it where two would be equal."""
    names = []
    for source in sources:
        parts = [part for part in source.removeprefix("s3://").split("/") if part not in ("", ".", "..", "~")]
        is_local_run = bool(parts) and re.fullmatch(rf"{LOCAL_RUN}(-[0-9]+)?", parts[-1]) is not None
        at_job = len(parts) >= 3 and (source.startswith("s3://") or is_local_run)
        names.append(parts[-2] if at_job else parts[-1] if parts else source)
    counts, seen, labels = Counter(names), Counter[str](), []
    for name in names:
        seen[name] += 1
        labels.append(f"{name} #{seen[name]}" if counts[name] > 1 else name)
    return labels


def facts_of(job: FineTuneJob) -> JobFacts:
    """Return what the status of ``job`` knows beyond its folder, and the settings that its spec resolves to."""
    status = status_of(job)
    settings = None
    # A job of another version, or one that this version can't run, has no settings here. Its figures are in the folder.
    with suppress(UserError, ValidationError):
        settings = settings_of(resolve(job, report=None, preflight=status.preflight).to_json().encode())
    return JobFacts(
        state=state(job),
        gpu_seconds=status.usage.gpu_seconds if status.usage is not None else None,
        incidents=tuple(f"Step {item.step}, {item.kind}: {item.message or item.action}" for item in status.incidents),
        settings=settings,
    )
