"""Shows a plan: as a view for people, and as an object for programs.

`plan.py` calls both. The functions are pure.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from finetune_cli.formatting import count, duration, size
from finetune_core.planning.advice import Suggestion
from finetune_core.planning.gpu_types import GIBIBYTE
from finetune_core.planning.job_plan import JobPlan, gibibytes

BAR_WIDTH = 30
"""Characters of the bar that stands for a GPU's whole memory."""
NOT_MEASURED = "speed and hours are estimates from the data sheet of the GPU"


def as_view(name: str, plan: JobPlan, changes: Sequence[Suggestion]) -> RenderableType:
    """Return the plan of the job ``name`` for people."""
    setup = plan.setup
    method = "Full" if setup.adapters is None else f"LoRA r {setup.adapters.rank}"
    nodes = setup.processes // setup.processes_per_node
    machines = f"{nodes} x {setup.processes_per_node} {plan.gpu.name}"
    parts: list[RenderableType] = [
        Text.assemble((name, "bold"), f"  {method} of {count(setup.base_parameters)} parameters on {machines}"),
        Text(),
        _memory(plan),
        Text(),
        _verdict(plan),
        *(Text(f"  {problem}", style="red") for problem in plan.problems),
    ]
    parts += [Text(f"  note: {note}", style="yellow") for note in plan.notes]
    if plan.choices:
        parts += [Text(), _choices(plan)]
    parts += [Text(), _speed(plan), Text(), _host(plan)]
    if not plan.fits:
        parts += [Text(), *_changes(changes)]
    return Group(*parts)


def _verdict(plan: JobPlan) -> Text:
    """Return whether the job of ``plan`` fits, and whether it does so without the lines that the plan has chosen."""
    if not plan.fits:
        return Text("does not fit", style="bold red")
    if plan.problems_as_written:
        return Text.assemble(
            ("fits with the lines below", "bold yellow"), f", and not without them: {plan.problems_as_written[0]}"
        )
    return Text("fits", style="bold green")


def _table(*columns: str, right: Sequence[int] = ()) -> Table:
    table = Table(box=None, pad_edge=False, show_header=any(columns))
    for place, column in enumerate(columns):
        table.add_column(column, justify="right" if place in right else "left", overflow="fold")
    return table


def _titled(title: str, table: Table) -> RenderableType:
    """Return ``table`` with a title above it, which may be wider than the table."""
    return Group(Text(title, style="bold"), table)


def _memory(plan: JobPlan) -> RenderableType:
    total = plan.gpu.memory
    table = _table("part", "size", "share of the GPU", right=(1,))
    parts = {**plan.memory.parts, "CUDA and gaps": plan.memory.device}
    for part, taken in parts.items():
        if taken > 0:
            table.add_row(part, gibibytes(taken), Text(_bar(taken, total), style="cyan"))
    needed = plan.memory.needed
    style = "green" if needed <= total else "red"
    table.add_row(Text("needed", style="bold"), gibibytes(needed), Text(_bar(needed, total), style=style))
    return _titled(f"memory of one GPU of {gibibytes(total)}, at its peak ({plan.memory.peak_phase})", table)


def _bar(taken: int, total: int) -> str:
    """Return a bar for ``taken`` of ``total`` bytes, cut where it is more than the whole, with the share behind it."""
    return f"{'█' * min(BAR_WIDTH, round(BAR_WIDTH * taken / total))} {taken / total:.0%}"


def _choices(plan: JobPlan) -> RenderableType:
    table = _table("lines for the job", "reason")
    reasons = {choice.field: choice.reason for choice in plan.choices}
    for line, field in nested({choice.field: choice.value for choice in plan.choices}):
        table.add_row(Text(line, style="cyan"), reasons[field] if field is not None else "")
    return _titled("chosen, because the job leaves it open", table)


def _speed(plan: JobPlan) -> RenderableType:
    speed = plan.speed
    table = _table("", "")
    table.add_row("FLOPs of a step", f"{speed.flops_per_step:.3g}, of {speed.tokens_per_step:,} tokens")
    table.add_row(
        "tokens per second", f"{speed.tokens_per_second:,.0f} (MFU {speed.model_flops_utilisation:.0%}), over all GPUs"
    )
    table.add_row("most of the time", speed.largest_part)
    if plan.hours is None:
        table.add_row("time", "depends on the number of rows: give --rows")
    else:
        cost = f", {plan.cost:,.2f} by the price" if plan.cost is not None else ""
        table.add_row("time", f"{duration(3600 * plan.hours)} without evaluations and checkpoints{cost}")
    return _titled(f"speed ({NOT_MEASURED})", table)


def _host(plan: JobPlan) -> RenderableType:
    host = plan.host
    table = _table("", "")
    table.add_row("memory", gibibytes(host.memory))
    table.add_row("CPUs", str(host.cpus))
    table.add_row("scratch", f"{host.scratch.request_gibibytes} GiB, without the rows")
    table.add_row("a checkpoint", size(host.checkpoint))
    table.add_row("the artifact", size(host.artifact))
    return _titled("each pod", table)


def _changes(changes: Sequence[Suggestion]) -> list[RenderableType]:
    if not changes:
        return [Text("No small change makes the job fit this GPU.", style="bold")]
    shown: list[RenderableType] = [Text("Each of these changes makes the job fit:", style="bold")]
    for change in changes:
        plan = change.plan
        note = f"# {gibibytes(plan.memory.needed)}, {plan.speed.tokens_per_second:,.0f} tokens per second"
        shown += [Text(), Text(note, style="bright_black")]
        shown += [Text(line, style="cyan") for line, _ in nested(dict(line.split(": ", 1) for line in change.lines))]
    return shown


def nested(fields: Mapping[str, str]) -> Iterator[tuple[str, str | None]]:
    """Yield the lines of YAML that set ``fields``, values in YAML by the dotted paths of their fields. With each line
    comes the path of the field that the line sets, or None where the line begins a section."""
    tree: dict[str, Any] = {}
    for path in fields:
        *sections, _ = path.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[path] = None
    yield from _lines(tree, fields, "")


def _lines(tree: Mapping[str, Any], fields: Mapping[str, str], indent: str) -> Iterator[tuple[str, str | None]]:
    for name, below in tree.items():
        if below is None:
            yield f"{indent}{name.rpartition('.')[2]}: {fields[name]}", name
        else:
            yield f"{indent}{name}:", None
            yield from _lines(below, fields, f"{indent}  ")


def as_json(plan: JobPlan, changes: Sequence[Suggestion]) -> dict[str, Any]:
    """Return the plan as an object for programs. Sizes are bytes."""
    setup, memory, speed, host = plan.setup, plan.memory, plan.speed, plan.host
    return {
        "fits": plan.fits,
        "problems": list(plan.problems),
        "problemsAsWritten": list(plan.problems_as_written),
        "notes": list(plan.notes),
        "gpu": {"name": plan.gpu.name, "memoryBytes": plan.gpu.memory, "count": setup.processes},
        "parameters": setup.parameters,
        "trainedParameters": setup.trained_parameters,
        "memory": {
            "neededBytes": memory.needed,
            "parts": {**memory.parts, "device": memory.device},
            "peakPhase": memory.peak_phase.value,
            "peaks": {phase.value: count for phase, count in memory.phases.items()},
            "standingBytes": memory.standing,
        },
        "training": {
            "zeroStage": setup.zero_stage,
            "offloadOptimizer": setup.offload_optimizer,
            "gradientCheckpointing": setup.recompute,
            "microBatchSize": setup.micro_batch,
            "microBatchTokens": setup.tokens,
        },
        "choices": [{"field": choice.field, "value": choice.value, "reason": choice.reason} for choice in plan.choices],
        "pod": {
            "memoryGibibytes": -(-host.memory // GIBIBYTE),
            "cpus": host.cpus,
            "scratchGibibytes": host.scratch.request_gibibytes,
            "checkpointBytes": host.checkpoint,
            "artifactBytes": host.artifact,
        },
        "speed": {
            "flopsPerStep": speed.flops_per_step,
            "tokensPerStep": speed.tokens_per_step,
            "tokensPerSecond": round(speed.tokens_per_second, 1),
            "modelFlopsUtilisation": round(speed.model_flops_utilisation, 4),
            "secondsPerStep": round(speed.seconds_per_step, 4),
        },
        "hours": round(plan.hours, 3) if plan.hours is not None else None,
        "cost": round(plan.cost, 2) if plan.cost is not None else None,
        "changes": [{"lines": list(change.lines), "neededBytes": change.plan.memory.needed} for change in changes],
    }
