"""The safetensors files of a model folder: finds the file that holds a tensor, checks that the files are complete, and
writes the index, a file that lists the tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open

from finetune_core.errors import UserError
from finetune_trainer.model.structure import ModelStructure
from finetune_trainer.pod.errors import OutsideFailure, first_line, library_boundary
from finetune_trainer.pod.model_file_names import INDEX_FILE


@dataclass(frozen=True)
class WeightFiles:
    """The safetensors files of a model folder."""

    folder: Path
    files: Mapping[str, str]
    """File name by tensor name, for example `model-00001-of-00002.safetensors` for `lm_head.weight`."""

    @classmethod
    def of(cls, folder: Path) -> WeightFiles:
        """Read from the index, or else from the files' headers, which file holds which tensor."""
        if (folder / INDEX_FILE).is_file():
            return cls(folder, json.loads((folder / INDEX_FILE).read_text())["weight_map"])
        files: dict[str, str] = {}
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                files |= dict.fromkeys(file.keys(), path.name)
        return cls(folder, files)

    def tensor(self, name: str) -> torch.Tensor:
        """Return the tensor ``name``. Its bytes are read from the file when they are used."""
        with safe_open(self.folder / self.files[name], framework="pt") as file:
            return file.get_tensor(name)

    @property
    def shapes(self) -> dict[str, list[int]]:
        """The shape of each tensor by its name, from the headers of the files."""
        found: dict[str, list[int]] = {}
        for file_name in sorted(set(self.files.values())):
            with safe_open(self.folder / file_name, framework="pt") as file:
                inside = [name for name, place in self.files.items() if place == file_name]
                found |= {name: file.get_slice(name).get_shape() for name in inside}
        return found

    def rows(self, name: str, rows: Sequence[int]) -> torch.Tensor:
        """Return the given ``rows`` of the matrix ``name``, as a tensor (rows, columns)."""
        with safe_open(self.folder / self.files[name], framework="pt") as file:
            part = file.get_slice(name)
            return torch.cat([part[row : row + 1] for row in rows])


def check_complete(folder: Path) -> None:
    """Raise UserError where a weights file of the model in ``folder`` is missing, can't be opened, for example because
    it is shorter than its header says, or lacks a tensor that the index expects in it."""
    index = folder / INDEX_FILE
    expected: dict[str, set[str]] = {path.name: set() for path in folder.glob("*.safetensors")}
    try:
        for tensor, name in json.loads(index.read_text())["weight_map"].items() if index.is_file() else ():
            expected.setdefault(f"{name}", set()).add(tensor)
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise UserError("model", f"its files are incomplete: {INDEX_FILE} is not an index of weights") from None
    for name, tensors in sorted(expected.items()):
        if not (folder / name).is_file():
            raise UserError("model", f"its files are incomplete: {INDEX_FILE} names {name}, which is not there")
        with library_boundary(partial(_unreadable, name)), safe_open(folder / name, framework="pt") as file:
            missing = sorted(tensors - set(file.keys()))
        if missing:
            raise UserError("model", f"its files are incomplete: {name} lacks {missing[0]}, which {INDEX_FILE} names")


def _unreadable(name: str, error: BaseException) -> Exception:
    if isinstance(error, OSError):
        return OutsideFailure(f"model: {name} can't be read: {error.strerror or first_line(error)}")
    return UserError("model", f"its files are incomplete: {name} ({first_line(error)})")


def check_shapes(structure: ModelStructure, folder: Path) -> None:
    """Raise UserError where a tensor in the weights files of ``folder`` has another shape than ``structure``, which was
    built from the configuration of the same model. Weights that are no floating-point numbers are left out, because
    quantisations change shapes."""
    expected = {name: list(tensor.shape) for name, tensor in structure.model.state_dict().items()}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in sorted(set(file.keys()) & expected.keys()):
                part = file.get_slice(name)
                if "F" in part.get_dtype() and part.get_shape() != expected[name]:
                    raise UserError(
                        "model",
                        f"its config.json does not fit its weights: {name} has the shape {part.get_shape()} in"
                        f" {path.name}, and must have {expected[name]}",
                    )


def write_index(folder: Path, files: Mapping[str, str]) -> None:
    """Write the index file of a model, which lists in which weights file each tensor lies. ``files`` maps each tensor
    name to a file name."""
    size = sum((folder / name).stat().st_size for name in set(files.values()))
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(files.items()))}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")
