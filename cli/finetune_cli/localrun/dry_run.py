"""Prints what `finetune run` would train: the plan, the run file, and the first examples. `run_job.py` calls
`show_dry_run` after the check of the job.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from finetune_cli.jobfiles.plan_view import as_view
from finetune_cli.localrun.dry_run_view import example_lines
from finetune_cli.localrun.local_job import LocalJob
from finetune_cli.terminal import SafeConsole, print_page, say, say_yaml
from finetune_core.contract import RunConfig
from finetune_core.contract.first_examples import FirstExamples
from finetune_core.errors import UserError
from finetune_core.planned_job import changes_of, gpu_of, plan_of


def show_dry_run(local: LocalJob, config: RunConfig, file: Path, code: int | None) -> int:
    """Print the plan of the job, the run file ``config``, and the first examples in ``file``, as far as the check could
    write them. ``code`` is the exit code of the check, None without a finding. Return the exit code of the command."""
    found = _read(file)
    say("")
    if found is not None:
        _show_plan(local, found.model_config_file)
    say("")
    say("run file:")
    say_yaml(json.loads(config.to_json()))
    if found is not None:
        console = SafeConsole()
        say("")
        for line in example_lines(found.examples, marks=not console.is_terminal):
            if console.is_terminal:
                console.print(line, soft_wrap=True)
            else:
                say(line.plain)
    return code or 0


def _read(file: Path) -> FirstExamples | None:
    try:
        return FirstExamples.model_validate_json(file.read_bytes()) if file.is_file() else None
    except ValidationError:
        return None


def _show_plan(local: LocalJob, configuration: dict[str, Any]) -> None:
    spec = local.job.spec
    if spec.resources.device == "CPU":
        say("plan: none, because a plan is about GPUs; `finetune plan FILE --gpu TYPE` plans the job as if it had some")
        return
    try:
        plan = plan_of(spec, configuration, gpu_of(spec))
        changes = [] if plan.fits else changes_of(local.document, configuration, plan)
    except UserError as error:
        say(f"plan: none: {error}")
        return
    print_page(as_view(local.job.metadata.name, plan, changes))
