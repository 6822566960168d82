"""Reads and checks the safetensors files of a model folder: finds the file that holds a tensor, checks that the files
are complete, and reads tensors or only their types and shapes. Also writes the index, a file that lists the tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open

from finetune_core.errors import UserError
from finetune_trainer.pod.errors import OutsideFailure, first_line, library_boundary
from finetune_trainer.pod.model_file_names import INDEX_FILE, SINGLE_FILE


class TensorHeader(NamedTuple):
    """What the header of a weight file says about a tensor."""

    dtype: str
    """Data type by its name in safetensors, for example `BF16`."""
    shape: tuple[int, ...]


@dataclass(frozen=True)
class WeightFiles:
    """The safetensors files of a model folder."""

    folder: Path
    files: Mapping[str, str]
    """File name by tensor name, for example `model-00001-of-00002.safetensors` for `lm_head.weight`."""

    @classmethod
    def of(cls, folder: Path) -> WeightFiles:
        """Read which file holds which tensor of the model in ``folder``. Where there is a single weight file, its
        header is read, as in transformers. Otherwise the index is read."""
        if not (folder / SINGLE_FILE).is_file() and (folder / INDEX_FILE).is_file():
            return cls(folder, json.loads((folder / INDEX_FILE).read_text())["weight_map"])
        with _open_header(folder / SINGLE_FILE) as file:
            return cls(folder, dict.fromkeys(file.keys(), SINGLE_FILE))

    @property
    def names(self) -> list[str]:
        """The names of the weight files, in alphabetical order."""
        return sorted(set(self.files.values()))

    def headers(self) -> dict[str, TensorHeader]:
        """Return the header of each tensor by its name. The tensors themselves are not read."""
        found = {}
        for name in self.names:
            with _open_header(self.folder / name) as file:
                for tensor in file.keys():  # noqa: SIM118  (the file is no mapping)
                    if self.files.get(tensor) == name:
                        part = file.get_slice(tensor)
                        found[tensor] = TensorHeader(part.get_dtype(), tuple(part.get_shape()))
        return found

    def tensor(self, name: str) -> torch.Tensor:
        """Return the tensor ``name``. The bytes of the tensor are read from the file when they are used."""
        with safe_open(self.folder / self.files[name], framework="pt") as file:
            return file.get_tensor(name)

    @property
    def shapes(self) -> dict[str, list[int]]:
        """The shape of each tensor by its name, from the headers of the files."""
        return {name: list(header.shape) for name, header in self.headers().items()}

    def rows(self, name: str, rows: Sequence[int]) -> torch.Tensor:
        """Return the given ``rows`` of the matrix ``name``, as a tensor (rows, columns)."""
        with safe_open(self.folder / self.files[name], framework="pt") as file:
            part = file.get_slice(name)
            return torch.cat([part[row : row + 1] for row in rows])


def _open_header(path: Path) -> Any:
    """Open a weight file of which only the header will be read. torch would map the file for writing, so that the whole
    file would count as memory that the process may need."""
    return safe_open(path, framework="numpy")


def check_complete(folder: Path) -> None:
    """Raise UserError where a weight file of the model in ``folder`` is missing, is damaged, for example shorter than
    its header says, lacks a tensor that the index expects in it, or has a tensor that the index expects in another
    file. Raise UserError also where the index is malformed, and OutsideFailure where the system can't read a weight
    file.

    Where the folder holds a single weight file and also an index of other files, the index may be that of another
    model. Then the files of the index must exist, but only the single file is opened.
    """
    index = folder / INDEX_FILE
    expected: dict[str, set[str]] = {}
    places: dict[str, Any] = {}
    try:
        places = dict(json.loads(index.read_text())["weight_map"].items()) if index.is_file() else {}
        for tensor, name in places.items():
            expected.setdefault(f"{name}", set()).add(tensor)
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise UserError("model", f"its files are incomplete: {INDEX_FILE} is not an index of weights") from None
    if index.is_file() and not expected:
        raise UserError("model", f"its files are incomplete: {INDEX_FILE} is not an index of weights")
    for name in sorted(expected):
        if not (folder / name).is_file():
            raise UserError("model", f"its files are incomplete: {INDEX_FILE} names {name}, which is not there")
    if not expected and not (folder / SINGLE_FILE).is_file():
        raise UserError("model", f"its files are incomplete: there is no {SINGLE_FILE} and no {INDEX_FILE}")
    if (folder / SINGLE_FILE).is_file() and set(expected) != {SINGLE_FILE}:
        expected, places = {SINGLE_FILE: set()}, {}
    for name, tensors in sorted(expected.items()):
        with library_boundary(partial(_unreadable, name)), _open_header(folder / name) as file:
            found = set(file.keys())
        missing = sorted(tensors - found)
        if missing:
            raise UserError("model", f"its files are incomplete: {name} lacks {missing[0]}, which {INDEX_FILE} names")
        twice = sorted(tensor for tensor in found if places.get(tensor, name) != name)
        if twice:
            # transformers would load the tensor from the last file, and another program from the file in the index.
            raise UserError(
                "model",
                f"its files do not fit together: {name} has the tensor {twice[0]}, which {INDEX_FILE} puts into"
                f" {places[twice[0]]}; write the model again with save_pretrained",
            )


def _unreadable(name: str, error: BaseException) -> Exception:
    if isinstance(error, OSError):
        return OutsideFailure(f"model: {name} can't be read: {error.strerror or first_line(error)}")
    return UserError("model", f"its files are incomplete: {name} ({first_line(error)})")


def write_index(folder: Path, files: Mapping[str, str]) -> None:
    """Write the index of a model, which lists the weight file of each tensor. ``files`` maps each tensor name to a file
    name."""
    size = sum((folder / name).stat().st_size for name in set(files.values()))
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(files.items()))}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")
