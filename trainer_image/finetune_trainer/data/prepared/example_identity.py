"""The identity of the examples of a data source: a sha256 over everything that decides what its rows become. Two
preparations with equal identities make equal examples and notices. `example_folder.py` keeps examples under it.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import sys
from collections.abc import Collection, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import finetune_core
import finetune_trainer
from finetune_core.api.dataset import DatasetSpec
from finetune_trainer.data.dataset import LengthLimit
from finetune_trainer.data.reader import data_files

CODE = ((finetune_trainer, "data"), (finetune_trainer, "pod"), (finetune_core, ""))
"""The folders with the code that decides what a row becomes and what a notice says of it, each as a package and a
folder in it."""


def data_identity(path: Path) -> str:
    """Return a sha256 over the names and the contents of the data files of the source ``path`` on this machine. Raises
    OSError if a file can't be read."""
    files = [[file.name, file.place, file.is_head, file.has_rows, _sha256(file.path)] for file in data_files(path)]
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()


def example_identity(
    data: str,
    source: str,
    field: str,
    dataset: DatasetSpec,
    tokenizer: Any,
    *,
    limit: LengthLimit,
    columns: Collection[str],
    keep_rows: bool,
    added_tokens: Sequence[str],
    ends: Sequence[int],
    today: date | None,
) -> str | None:
    """Return the identity of the examples that `prepare_rows` makes, in hexadecimal, or None if it can't be known: with
    a tokenizer that is written in Python, and where rows may show the date and ``today`` is None.

    ``data`` is the `data_identity` of the data source, and ``columns`` are the columns that are read of it.
    ``added_tokens``, ``ends`` and ``today`` are the arguments of `tokenize_functions`, and the other arguments those of
    `prepare_rows`. The date counts only where a chat template shows it.
    """
    if not tokenizer.is_fast:
        return None
    shows_the_date = _shows_the_date(dataset, tokenizer)
    if shows_the_date and today is None:
        return None  # the template shows the date of the moment at which a row is rendered
    form = dataset.model_dump(mode="json", include={"format", "bad_rows", "long_rows"})
    decided_by = {
        "data": data,
        "messages": [source, field],
        "dataset": form,
        "limit": [limit.tokens, limit.origin, limit.rows],
        "columns": sorted(columns),
        "keep_rows": keep_rows,
        "tokenizer": tokenizer_identity(tokenizer),
        "added_tokens": list(added_tokens),
        "ends": list(ends),
        "today": today.isoformat() if shows_the_date and today is not None else "",
        "code": code_identity(),
    }
    return hashlib.sha256(json.dumps(decided_by, sort_keys=True).encode()).hexdigest()


def tokenizer_identity(tokenizer: Any) -> str:
    """Return a sha256 over everything in a fast tokenizer of transformers that decides the ids of a text and the text
    of a conversation."""
    parts = [
        type(tokenizer).__name__,
        tokenizer.backend_tokenizer.to_str(),
        tokenizer.chat_template,
        {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        sorted(tokenizer.all_special_ids),
        tokenizer.split_special_tokens,
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _shows_the_date(dataset: DatasetSpec, tokenizer: Any) -> bool:
    """Return whether rows may contain the date: only a chat template can show it, by the function of this name."""
    return dataset.format.messages is not None and "strftime_now" in str(tokenizer.chat_template)


@functools.cache
def code_identity() -> str:
    """Return a sha256 over the code of this project that decides what a row becomes, and over the versions of Python
    and of all installed packages, because many of them read, render or tokenise rows."""
    versions = sorted(f"{found.name} {found.version}" for found in importlib.metadata.distributions())
    sha256 = hashlib.sha256("\n".join([sys.version, *versions, ""]).encode())
    for package, folder in CODE:
        root = Path(str(package.__file__)).parent / folder
        for file in sorted(root.rglob("*.py")):
            sha256.update(f"{file.relative_to(root)} {_sha256(file)}\n".encode())
    return sha256.hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
