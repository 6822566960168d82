"""Finds the field of a model's JSON file with which a library fails, by trying: one field after another is left out.

The errors of transformers often name no field: with an unknown `hidden_act`, for example, the message is only its
value. The code that loads configuration, structure, tokenizer and generation configuration of a model calls
`explained` where the loading failed.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from finetune_core.errors import UserError
from finetune_trainer.pod.errors import first_line, library_boundary, one_line
from finetune_trainer.pod.model_text_files import read_json_object

MOST_TRIALS = 80
LONGEST_SECONDS = 4.0
"""After this many trials or seconds, no further field is tried. The preflight check must not take long."""
DEEPEST = 3
"""How deep the objects may lie within each other whose fields are tried."""
LAST = ("model_type", "architectures", "vocab_size", "hidden_size", "num_hidden_layers", "tokenizer_file")
"""Fields that are tried after all others. A model without them is another one, which may load for that reason alone."""
NAMES_FIELD = ("Validation error for field '", "`")
"""How messages of transformers begin that name the field, and say what it must be, themselves."""


class FaultyField(NamedTuple):
    """A field without which a file loads."""

    path: str
    """Names of the field and of the objects in which it lies, joined by dots, for example `rope_scaling.type`."""
    value: Any


def faulty_field(
    document: Mapping[str, Any],
    loads: Callable[[Mapping[str, Any]], bool],
    message: str = "",
    now: Callable[[], float] = time.monotonic,
) -> FaultyField | None:
    """Return the first field of ``document`` without which the document loads. None if there is none. ``loads`` says
    whether a document loads. ``message`` is the error of the library; fields that it names or whose value it shows are
    tried first.

    Where no field can be left out, whole numbers are replaced by 1, because the default of a field may not fit the
    other fields of a small model.
    """
    end = now() + LONGEST_SECONDS
    places = sorted(_places(document), key=lambda place: _order(place, message))
    ones = [place for place in places if type(place[1]) is int]
    trials = [*((place, False) for place in places), *((place, True) for place in ones)]
    for (path, value), replaced in trials[:MOST_TRIALS]:
        if now() > end:
            return None
        if loads(_changed(document, path, replaced=replaced)):
            return FaultyField(".".join(path), value)
    return None


def explained(
    folder: Path, files: Sequence[str], load: Callable[[Path], object], error: BaseException, *, smaller: bool = False
) -> str:
    """Return what is wrong with the model in ``folder``, where ``load`` has raised ``error``: the field of one of
    ``files`` with which the library fails, and the library's message. Where no single field explains the error, the
    message alone is returned. ``load`` is called with folders in which a field of one file is left out. With
    ``smaller``, these folders describe a model of two layers, if ``load`` fails with it too."""
    message = first_line(error)
    if message.startswith(NAMES_FIELD):
        return message
    for name in files:
        try:
            document = read_json_object(folder / name)
            if not document:
                continue
            with TemporaryDirectory() as scratch:
                trial = Path(scratch)
                for path in folder.iterdir():
                    if path.name != name:
                        (trial / path.name).symlink_to(path.resolve())
                loads = _Trial(trial, name, load)
                if "model_type" not in document and not loads({}):
                    continue  # The error does not come from this file.
                small = _with_two_layers(document)
                found = faulty_field(small if smaller and not loads(small) else document, loads, message)
        except (OSError, ValueError):
            continue  # The error of the library is what the user must see, not that there is no room for a trial.
        if found is not None:
            # The file may have chosen the names of its fields too.
            field, value = one_line(found.path, limit=120), one_line(repr(found.value), limit=60)
            return f"`{field}` of {name} is {value}, with which transformers fails: {message}"
    return message


class _Trial:
    """Says whether a model loads if its file ``name`` in ``folder`` has a given content."""

    def __init__(self, folder: Path, name: str, load: Callable[[Path], object]) -> None:
        self._folder, self._name, self._load = folder, name, load

    def __call__(self, document: Mapping[str, Any]) -> bool:
        (self._folder / self._name).write_text(json.dumps(document))
        try:
            with library_boundary(lambda error: UserError("model", first_line(error))):
                self._load(self._folder)
        except UserError:
            return False
        return True


Place = tuple[tuple[str, ...], Any]


def _places(document: Mapping[str, Any], above: tuple[str, ...] = ()) -> Iterator[Place]:
    """Yield the path and the value of each field of ``document``. The fields of an object come before the object."""
    for name, value in document.items():
        path = (*above, name)
        if isinstance(value, Mapping) and len(path) < DEEPEST:
            yield from _places(value, path)
        yield path, value


def _order(place: Place, message: str) -> tuple[bool, bool]:
    path, value = place
    shown = path[-1] in message or (isinstance(value, str) and bool(value) and value in message)
    return path[-1] in LAST, not shown


def _changed(document: Mapping[str, Any], path: tuple[str, ...], *, replaced: bool) -> dict[str, Any]:
    """Return ``document`` without the field at ``path``, or, if ``replaced``, with the number 1 there."""
    name, *below = path
    if below:
        return {**document, name: _changed(document[name], tuple(below), replaced=replaced)}
    rest = {key: value for key, value in document.items() if key != name}
    return {**rest, name: 1} if replaced else rest


def _with_two_layers(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``document``, the content of a config.json, for a model of at most two layers."""
    return {
        name: min(value, 2)
        if name == "num_hidden_layers" and type(value) is int
        else _with_two_layers(value)
        if name == "text_config" and isinstance(value, Mapping)
        else value
        for name, value in document.items()
    }
