"""Finds the settings in which runs differ. Pure; the views and the claims call these functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pydantic.alias_generators import to_camel

from finetune_cli.compare.compared_run import ComparedRun
from finetune_core.contract.same_training import NOT_THE_TRAINING

LEFT_OUT = ("version", "report", "storage.uri", "adapterArtifact")
"""Fields that differ between any two jobs and say nothing about them."""


@dataclass(frozen=True, slots=True)
class SettingRow:
    """A field in which at least two runs differ."""

    path: str
    values: tuple[str | None, ...]
    """The value of each run. None where the run does not set it, or where its settings are not known."""
    defines_training: bool
    """Whether the field defines what is trained. Other fields say where and in which portions."""


def differences(runs: Sequence[ComparedRun]) -> list[SettingRow]:
    """Return the fields in which the ``runs`` with known settings differ, those that define the training first."""
    known = [run.settings for run in runs if run.settings is not None]
    if len(known) < 2:
        return []
    paths = sorted({path for settings in known for path in settings if not _is_below(path, LEFT_OUT)})
    rows = [
        SettingRow(path, tuple(run.setting(path) for run in runs), defines_training(path))
        for path in paths
        if len({settings.get(path) for settings in known}) > 1
    ]
    return sorted(rows, key=lambda row: (not row.defines_training, row.path))


def defines_training(path: str) -> bool:
    """Return whether the field at ``path`` of the run file, in camelCase, defines what is trained."""
    return not _is_below(path, _NOT_THE_TRAINING)


def changed_paths(first: Mapping[str, str], second: Mapping[str, str]) -> set[str]:
    """Return the paths of the fields that define the training and have different values in both."""
    return {
        path for path in first.keys() | second.keys() if first.get(path) != second.get(path) and defines_training(path)
    }


def _is_below(path: str, fields: Sequence[str]) -> bool:
    return any(path == field or path.startswith(f"{field}.") for field in fields)


_NOT_THE_TRAINING = tuple(".".join(to_camel(part) for part in path.split(".")) for path in NOT_THE_TRAINING)
