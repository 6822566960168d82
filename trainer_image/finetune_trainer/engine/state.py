"""Training state between engine and files: safetensors that don't know how many ranks wrote them.

Each trained parameter is stored whole (fp32 value and both moments) in the file of one rank, chosen by bytes: a
checkpoint can be read by any number of ranks at any ZeRO stage, and of a LoRA run it holds the adapters alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from finetune_trainer.engine.engine import FIRST_MOMENT, MASTER, SECOND_MOMENT, Engine, assign, full_shape
from finetune_trainer.storage.checkpoint_folders import STATE_GLOB
from finetune_trainer.storage.commit import Damaged

KINDS = (MASTER, FIRST_MOMENT, SECOND_MOMENT)


def owners(shapes: Mapping[str, Sequence[int]], world_size: int) -> dict[str, int]:
    """Return which rank writes which parameter: the largest first, each to the rank with the least so far."""
    loads = [0] * world_size
    chosen = {}
    for name in sorted(shapes, key=lambda name: (-math.prod(shapes[name]), name)):
        rank = loads.index(min(loads))
        chosen[name] = rank
        loads[rank] += math.prod(shapes[name])
    return chosen


def state_file(rank: int, world_size: int) -> str:
    """Return the name of the file that ``rank`` writes."""
    return f"state-{rank:05d}-of-{world_size:05d}.safetensors"


def snapshot(engine: Engine, *, rank: int, world_size: int) -> dict[str, torch.Tensor]:
    """Return this rank's share of the training state on the CPU, under `<parameter>/<kind>`; a collective.

    One parameter at a time is gathered, so the peak is one parameter above the share.
    """
    owner = owners(engine.names, world_size)
    kept: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        for name in engine.names:
            tensors = engine.read_state(name)
            if owner[name] == rank:
                for kind in KINDS:
                    kept[f"{name}/{kind}"] = tensors[kind].to("cpu", torch.float32, copy=True).contiguous()
    return kept


def write_snapshot(tensors: Mapping[str, torch.Tensor], folder: Path, *, rank: int, world_size: int) -> list[Path]:
    """Write a snapshot into ``folder`` and return its files: none where this rank has no share."""
    if not tensors:
        return []
    path = folder / state_file(rank, world_size)
    save_file(dict(tensors), path)
    return [path]


def stored_tensors(folder: Path, kinds: Sequence[str] = KINDS) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """Return the parameters of a fetched checkpoint with the asked kinds of tensors, one at a time."""
    for path in sorted(folder.glob(STATE_GLOB)):
        with safe_open(path, framework="pt") as file:
            names = dict.fromkeys(key.rpartition("/")[0] for key in file.keys())  # noqa: SIM118  (no mapping)
            for name in names:
                yield name, {kind: file.get_tensor(f"{name}/{kind}") for kind in kinds}


def load_weights(model_parameters: Mapping[str, torch.nn.Parameter], folder: Path) -> None:
    """Copy the stored values into the model before the engine is made; raises Damaged where they don't fit."""
    missing = dict(model_parameters)
    with torch.no_grad():
        for name, tensors in stored_tensors(folder, (MASTER,)):
            parameter = missing.pop(name, None)
            if parameter is None or full_shape(parameter) != tensors[MASTER].shape:
                raise Damaged(f"the checkpoint's parameter {name} does not belong to this model")
            assign(parameter, tensors[MASTER])
    if missing:
        raise Damaged(f"the checkpoint lacks parameter {next(iter(missing))}")


def load_state(engine: Engine, folder: Path, *, updates: int) -> None:
    """Set masters, moments and the update count of the engine from a fetched checkpoint."""
    engine.prepare_state(updates)
    with torch.no_grad():
        for name, tensors in stored_tensors(folder):
            engine.write_state(name, tensors)
