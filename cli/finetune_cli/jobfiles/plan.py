"""`finetune plan`: says of a job file whether the training fits its GPUs, how fast it is, and what to change where it
does not fit. No cluster and no GPU is needed.

`commands/plan_command.py` calls `plan_file`. `finetune_core.planning` has the arithmetic, and `plan_view.py` the texts
for people.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from finetune_cli.bucket.object_store import ObjectStoreReader, access_key_from
from finetune_cli.jobfiles.plan_view import as_json, as_view
from finetune_cli.jobfiles.validate import SIZE_LIMIT, check_file
from finetune_cli.terminal import SafeConsole, say_json, say_yaml
from finetune_core.api.job import KIND, FineTuneJob
from finetune_core.api.spec import FineTuneJobSpec
from finetune_core.contract.pod import ACCESS_KEY_ID, SECRET_ACCESS_KEY
from finetune_core.errors import UserError
from finetune_core.layout import parse_uri
from finetune_core.planned_job import changes_of, gpu_of, plan_of
from finetune_core.planning.gpu_types import GPU_TYPES, find_gpu, with_types

MODEL_CONFIG = "--model-config"
CONFIG_FILE = "config.json"


def plan_file(options: argparse.Namespace) -> int:
    """Print the plan of the job in the file that the command line names. Return 0 where the job fits, else 1."""
    document, job = read_job(options.file)
    types = GPU_TYPES
    if options.gpu_table is not None:
        types = with_types(_parsed(options.gpu_table, "--gpu-table"), str(options.gpu_table))
    gpu = find_gpu(options.gpu, types) if options.gpu is not None else gpu_of(job.spec, types)
    configuration = _configuration(job.spec, options)
    plan = plan_of(job.spec, configuration, gpu, rows=options.rows, price=options.price)
    changes = [] if plan.fits else changes_of(document, configuration, plan, rows=options.rows)
    if options.output == "text":
        SafeConsole().print(as_view(job.metadata.name, plan, changes))
    elif options.output == "json":
        say_json(as_json(plan, changes))
    else:
        say_yaml(as_json(plan, changes))
    return 0 if plan.fits else 1


def read_job(
    name: str, change: Callable[[dict[str, Any]], dict[str, Any]] = lambda job: job
) -> tuple[dict[str, Any], FineTuneJob]:
    """Return the only FineTuneJob in the file ``name``, or in the standard input where ``name`` is `-`, as the document
    and as a model, after ``change``. Raises UserError where the file holds no job or several, and for the first problem
    that `finetune validate` would name."""
    report = check_file(name, change)
    if report.problems:
        first = report.problems[0]
        raise UserError(f"{name}:{first.line}", f"{first.path}: {first.message}" if first.path else first.message)
    if len(report.values) != 1:
        raise UserError(name, f"must hold one {KIND}, and holds {len(report.values) or 'none'}")
    (document,) = report.values
    return document, FineTuneJob.model_validate(document)


def _configuration(spec: FineTuneJobSpec, options: argparse.Namespace) -> dict[str, Any]:
    """Return the content of the base model's `config.json`: from the command line, or from the bucket."""
    if options.model_config is not None:
        path: Path = options.model_config / CONFIG_FILE if options.model_config.is_dir() else options.model_config
        return _object(_parsed(path, MODEL_CONFIG), str(path))
    if spec.model.s3 is not None:
        place = parse_uri(spec.model.s3.uri)
        keys = access_key_from(os.environ)
        if keys is None:
            raise UserError(
                "environment",
                f"must have {ACCESS_KEY_ID} and {SECRET_ACCESS_KEY} to read {CONFIG_FILE} from"
                f" {spec.model.s3.uri}; or {MODEL_CONFIG} must name the file",
            )
        store = ObjectStoreReader(spec.storage, keys, options.endpoint)
        raw = store.read(place.bucket, place.key(CONFIG_FILE))
        try:
            return _object(json.loads(raw), f"{spec.model.s3.uri}/{CONFIG_FILE}")
        except (ValueError, RecursionError) as error:
            raise UserError(f"{spec.model.s3.uri}/{CONFIG_FILE}", f"must be JSON: {error}") from None
    hub = spec.model.hugging_face
    where = f"the file {CONFIG_FILE} of {hub.repo}" if hub is not None else f"a copy of the model's {CONFIG_FILE}"
    raise UserError(MODEL_CONFIG, f"must name {where}: the command reads no hub and no volume")


def _object(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(name, "must hold a JSON object")
    return value


def _parsed(path: Path, option: str) -> Any:
    """Return the content of a YAML or JSON file. Raises UserError that names ``option`` and the file."""
    try:
        with path.open("rb") as file:
            raw = file.read(SIZE_LIMIT + 1)
        if len(raw) > SIZE_LIMIT:
            raise UserError(option, f"must name a file of at most {SIZE_LIMIT >> 20} MB, and {path} is larger")
        try:
            # YAML refuses the tabs with which JSON may be indented, and reads 1e-05 as text.
            return json.loads(raw)
        except ValueError:
            if path.suffix == ".json":
                raise
        return yaml.safe_load(raw)
    except OSError as error:
        raise UserError(option, f"must name a file: {path} can't be read ({error.strerror or error})") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        first = str(error).splitlines()[0] if str(error) else "no YAML"
        raise UserError(option, f"must name a YAML or JSON file, and {path} is none ({first})") from None
