"""Both engines have the interface of a training engine, and the trainer calls nothing else of an engine.

mypy compares the types of `ENGINES`. The tests compare names and arguments, which mypy does not look at where an engine
is passed as `Any`.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

import finetune_trainer
from finetune_trainer.engine.engine import Engine
from finetune_trainer.engine.interface import TrainingEngine
from finetune_trainer.engine.plain_engine import PlainEngine

ENGINES: Sequence[type[TrainingEngine]] = (Engine, PlainEngine)
INTERFACE = {name for name in vars(TrainingEngine) if not name.startswith("_")}
ROOT = Path(finetune_trainer.__file__).parent
VARIABLES = {"engine", "_engine"}
"""Names under which the trainer keeps an engine."""
OWN_MODULES = {ROOT / "engine" / name for name in ("engine.py", "plain_engine.py")}


def used_names() -> Iterator[tuple[str, str]]:
    """Yield (attribute of an engine, place in the trainer) for each attribute that the trainer reads or calls."""
    for path in sorted(ROOT.rglob("*.py")):
        if path in OWN_MODULES:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and _is_engine(node.value):
                yield node.attr, f"{path.relative_to(ROOT)}:{node.lineno}"


def _is_engine(node: ast.expr) -> bool:
    name = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
    return name in VARIABLES


def test_the_trainer_calls_nothing_of_an_engine_but_its_interface() -> None:
    used = dict(used_names())
    assert {name: place for name, place in used.items() if name not in INTERFACE} == {}
    not_called = {"forward"}
    assert INTERFACE - used.keys() == not_called, "a function that nothing calls is no part of the interface"


def parameters(function: object) -> Mapping[str, tuple[object, object]]:
    """Return kind and default of each argument of ``function``, by its name and in order."""
    assert callable(function)
    return {name: (each.kind, each.default) for name, each in inspect.signature(function).parameters.items()}


@pytest.mark.parametrize("engine", ENGINES)
def test_each_function_takes_the_arguments_of_the_interface(engine: type[TrainingEngine]) -> None:
    for name in INTERFACE:
        wanted = inspect.getattr_static(TrainingEngine, name)
        if isinstance(wanted, property):
            continue
        assert list(parameters(getattr(engine, name)).items()) == list(parameters(wanted).items()), name


def test_both_engines_are_made_with_the_same_arguments() -> None:
    assert parameters(PlainEngine) == parameters(Engine)
