"""Writes the engine's training state into safetensors files, and loads it from them.

`checkpoints/saver.py` writes the files, and `train.py` loads them when a run resumes. For the artifact, `finish.py` and
`checkpoints/` read the fp32 values. Each trained parameter is stored whole (fp32 value and both AdamW moments) in the
file of one rank. A checkpoint can therefore be read by any number of ranks at any ZeRO stage. The checkpoint of a LoRA
run holds the adapters only.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from finetune_trainer.engine.engine import FIRST_MOMENT, MASTER, SECOND_MOMENT, assign_parameter, full_shape
from finetune_trainer.engine.interface import TrainingEngine
from finetune_trainer.pod.errors import Damaged
from finetune_trainer.storage.checkpoint_folders import STATE_GLOB

STATE_KINDS = (MASTER, FIRST_MOMENT, SECOND_MOMENT)


def assign_owners(shapes: Mapping[str, Sequence[int]], world_size: int) -> dict[str, int]:
    """Return which rank writes each parameter, by the parameter's name. The largest parameters are assigned first, each
    to the rank with the fewest elements so far."""
    loads = [0] * world_size
    chosen = {}
    for name in sorted(shapes, key=lambda name: (-math.prod(shapes[name]), name)):
        rank = loads.index(min(loads))
        chosen[name] = rank
        loads[rank] += math.prod(shapes[name])
    return chosen


def state_file(rank: int, world_size: int) -> str:
    """Return the name of the file that ``rank`` writes, for example `state-00000-of-00008.safetensors`."""
    return f"state-{rank:05d}-of-{world_size:05d}.safetensors"


def take_snapshot(engine: TrainingEngine, *, rank: int, world_size: int) -> dict[str, torch.Tensor]:
    """Return the part of the training state that this rank stores, as fp32 tensors on the CPU. The keys are
    `<parameter>/<kind>`, where the kind is one of STATE_KINDS. All ranks must call this function together.

    Parameters are gathered one after the other, so that memory holds only this rank's part and at most two whole
    parameters.
    """
    owner = assign_owners(engine.parameter_shapes, world_size)
    kept: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        for name in engine.parameter_shapes:
            tensors = engine.read_state(name)
            if owner[name] == rank:
                for kind in STATE_KINDS:
                    kept[f"{name}/{kind}"] = tensors[kind].to("cpu", torch.float32, copy=True).contiguous()
    return kept


def write_snapshot(tensors: Mapping[str, torch.Tensor], folder: Path, *, rank: int, world_size: int) -> list[Path]:
    """Write the tensors of a snapshot into a file in ``folder``, and return the path of the file in a list. The list is
    empty where this rank stores no parameter."""
    if not tensors:
        return []
    path = folder / state_file(rank, world_size)
    save_file(dict(tensors), path)
    return [path]


def stored_tensors(folder: Path, kinds: Sequence[str] = STATE_KINDS) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """Yield (parameter name, tensors by kind) for each parameter of a checkpoint downloaded to ``folder``. ``kinds``
    selects from the fp32 value and the two AdamW moments."""
    for path in sorted(folder.glob(STATE_GLOB)):
        with safe_open(path, framework="pt") as file:
            names = dict.fromkeys(key.rpartition("/")[0] for key in file.keys())  # noqa: SIM118  (no mapping)
            for name in names:
                yield name, {kind: file.get_tensor(f"{name}/{kind}") for kind in kinds}


def load_weights(model_parameters: Mapping[str, torch.nn.Parameter], folder: Path) -> None:
    """Copy the fp32 values of the checkpoint in ``folder`` into the model's trained parameters. Call this before the
    engine is made. Raises Damaged where the checkpoint's parameters are not those of the model."""
    missing = dict(model_parameters)
    with torch.no_grad():
        for name, tensors in stored_tensors(folder, (MASTER,)):
            parameter = missing.pop(name, None)
            if parameter is None or full_shape(parameter) != tensors[MASTER].shape:
                raise Damaged(f"the checkpoint's parameter {name} does not belong to this model")
            assign_parameter(parameter, tensors[MASTER])
    if missing:
        raise Damaged(f"the checkpoint lacks parameter {next(iter(missing))}")


def load_state(engine: TrainingEngine, folder: Path, *, updates: int) -> None:
    """Set the engine's fp32 values and AdamW moments to those of the checkpoint in ``folder``, and its number of
    updates to ``updates``. Raises Damaged where the checkpoint lacks a trained parameter."""
    engine.prepare_state(updates)
    missing = dict.fromkeys(engine.parameter_shapes)
    with torch.no_grad():
        for name, tensors in stored_tensors(folder):
            engine.write_state(name, tensors)
            missing.pop(name, None)
    if missing:
        raise Damaged(f"the checkpoint lacks parameter {next(iter(missing))}")
