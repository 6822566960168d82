"""Selects the files of a model's folder that make up the model: the weight files that transformers loads, and the small
files beside them. Adapters and other checkpoints in the same folder are left out.

The launcher fetches the selected files, `identities.py` determines their identity, and the preflight checks read parts
of them. So no other file is fetched, hashed, loaded or copied.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from finetune_core.errors import UserError
from finetune_trainer.pod.errors import first_line
from finetune_trainer.pod.model_file_names import ADAPTER_CONFIG_FILE, INDEX_FILE, SINGLE_FILE
from finetune_trainer.pod.model_text_files import pointer_problem
from finetune_trainer.sources.file_selection import shown
from finetune_trainer.sources.model_files import MODEL_SUFFIXES, WEIGHTS_SUFFIX, ModelFiles

LARGEST_INDEX_BYTES = 32 * 1024 * 1024
"""Largest size in bytes of an index of weight files that is accepted."""
OTHER_INDEX_SUFFIX = ".index.json"
"""Suffix of the names of all indices of weight files, for example `pytorch_model.bin.index.json`. Of these files, only
INDEX_FILE belongs to the model."""
MOST_SHOWN = 5
"""Largest number of files that a notice names."""


@dataclass(frozen=True)
class ModelSelection:
    """The files of a folder that make up the model."""

    weights: Mapping[str, Sequence[str]]
    """The names of the weight files. Each file has a list of the tensors that the index expects in the file. The list
    is empty where the model has no index, or where the index is left out."""
    small: Sequence[str]
    """The names of all other files of the model, such as `config.json` and `tokenizer.json`."""
    notices: Sequence[str]
    """Sentences for users about files that were left out."""

    @property
    def names(self) -> list[str]:
        """The names of all files of the model."""
        return [*self.weights, *self.small]


def select_model_files(files: ModelFiles) -> ModelSelection:
    """Return the weight files and the small files of the model. The weight file is `model.safetensors` if there is one,
    because transformers prefers it. Otherwise the weight files are those that the index names. Only the index is read.

    Raises UserError if there is neither `model.safetensors` nor an index, if the index can't be read, or if the index
    names a file that is not there.
    """
    indexed = _indexed_tensors(files) if INDEX_FILE in files.sizes else None
    if indexed is None and SINGLE_FILE not in files.sizes:
        raise UserError(files.field, f"there must be a {SINGLE_FILE} or a {INDEX_FILE}")
    missing = sorted(name for name in indexed or () if name not in files.sizes)
    if missing:
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        problem = f"there is no {missing[0]}{others}, which {INDEX_FILE} names"
        if SINGLE_FILE in files.sizes:
            problem += f": remove the index if {SINGLE_FILE} holds the whole model, or else {SINGLE_FILE}"
        raise UserError(files.field, problem)
    weights: Mapping[str, Sequence[str]] = indexed or {SINGLE_FILE: []}
    if SINGLE_FILE in files.sizes and set(weights) != {SINGLE_FILE}:
        weights = {SINGLE_FILE: []}
        indexed = None
    left_out = [name for name in files.sizes if name.endswith(WEIGHTS_SUFFIX) and name not in weights]
    left_out += [name for name in (ADAPTER_CONFIG_FILE,) if name in files.sizes]
    left_out += [INDEX_FILE] if INDEX_FILE in files.sizes and indexed is None else []
    small = [
        name
        for name in files.sizes
        if name.endswith(MODEL_SUFFIXES)
        and not name.endswith(WEIGHTS_SUFFIX)
        and name not in left_out
        and (name == INDEX_FILE or not name.endswith(OTHER_INDEX_SUFFIX))
    ]
    return ModelSelection(weights, small, _left_out_notice(files.field, sorted(left_out), indexed=indexed is not None))


def _indexed_tensors(files: ModelFiles) -> dict[str, list[str]]:
    """Return the names of the weight files that the index names, each with the names of its tensors."""
    if files.sizes[INDEX_FILE] > LARGEST_INDEX_BYTES:
        size = files.sizes[INDEX_FILE]
        raise UserError(
            files.field, f"{INDEX_FILE} has {size} bytes, more than the {LARGEST_INDEX_BYTES} that are read"
        )
    content = files.read(INDEX_FILE, 0, files.sizes[INDEX_FILE])
    if problem := pointer_problem(INDEX_FILE, content):
        raise UserError(files.field, problem)
    try:
        weights = json.loads(content)["weight_map"]
        found: dict[str, list[str]] = {}
        for tensor, name in weights.items():
            if not isinstance(name, str):
                raise TypeError(f"{tensor!r} is in no file")
            if "/" in name or not name.endswith(WEIGHTS_SUFFIX):
                raise UserError(
                    files.field,
                    f"{INDEX_FILE} must name *.safetensors files in the same folder, and names {shown(name)}",
                )
            found.setdefault(name, []).append(tensor)
        if not found:
            raise ValueError("it names no tensor")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(files.field, f"{INDEX_FILE} must be JSON with a weight_map ({first_line(error)})") from error
    return found


def _left_out_notice(field: str, names: Sequence[str], *, indexed: bool) -> list[str]:
    if not names:
        return []
    more = f" and {len(names) - MOST_SHOWN} more" if len(names) > MOST_SHOWN else ""
    told = ", ".join(shown(name) for name in names[:MOST_SHOWN]) + more
    model = f"the weight files that {INDEX_FILE} names" if indexed else SINGLE_FILE
    return [f"{field}: {told} beside the model will not be used: the model is in {model}"]
