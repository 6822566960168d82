"""Checks a base model without downloading its weights: all weight files are present and complete, `config.json`
describes a known language model, and the tokenizer loads. `preflight/entrypoint.py` calls `check_model`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from finetune_core.errors import UserError
from finetune_trainer.data.tokenizer import add_tokens, load_tokenizer
from finetune_trainer.model.configuration import load_configuration, model_context
from finetune_trainer.pod.errors import first_line
from finetune_trainer.pod.model_file_names import INDEX_FILE, SINGLE_FILE
from finetune_trainer.sources.model_files import MODEL_SUFFIXES, WEIGHTS_SUFFIX, ModelFiles

HEADER_PIECE_BYTES = 128 * 1024
"""How many bytes of a weight file are read first. Nearly every safetensors header is shorter, so one request is
enough.
"""
LARGEST_HEADER_BYTES = 10_000_000
"""Longest header in bytes that is accepted. Such a header has room for 80,000 tensors, and a file of a large model has
a few thousand. As Python objects, a header takes twenty times its length in memory."""
LARGEST_INDEX_BYTES = 32 * 1024 * 1024
"""Longest index of weight files in bytes that is accepted."""
PARALLEL_READS = 4
LFS_POINTER = b"version https://git-lfs"


@dataclass(frozen=True)
class ModelFacts:
    """What the checks of the data files need to know about the base model."""

    tokenizer: Any
    context: int | None
    """Longest sequence in tokens that the model can read. None if `config.json` names no limit."""
    folder: Path
    """Local folder with the small files of the model, among them its chat templates."""
    added_tokens: Sequence[str] = ()
    """The tokens of `model.addedTokens`, which the tokenizer has."""


def check_model(files: ModelFiles, folder: Path, added_tokens: Sequence[str]) -> ModelFacts:
    """Check the headers of the weight files. Then copy the small files into ``folder``, and load configuration and
    tokenizer from there.

    Raises a UserError that names the file at fault.
    """
    check_weights(files)
    folder.mkdir()
    small = [name for name in files.sizes if name.endswith(MODEL_SUFFIXES) and not name.endswith(WEIGHTS_SUFFIX)]
    files.fetch(small, folder)
    context = check_configuration(folder, files.field)
    tokenizer = load_tokenizer(folder)
    add_tokens(tokenizer, added_tokens)
    return ModelFacts(tokenizer, context, folder, added_tokens)


def check_weights(files: ModelFiles) -> None:
    """Raise UserError if a weight file is missing or truncated, or lacks a tensor that the index expects in it."""
    tensors = _tensors_by_file(files)
    missing = sorted(name for name in tensors if name not in files.sizes)
    if missing:
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(files.field, f"there is no {missing[0]}{others}, which {INDEX_FILE} names")

    one_header_in_memory = Lock()

    def check(item: tuple[str, list[str]]) -> None:
        name, expected = item
        text = _header_text(files, name)
        with one_header_in_memory:
            header = _parse_header(files, name, text)
            lost = next((tensor for tensor in expected if tensor not in header), None)
            del header
        if lost is not None:
            raise UserError(files.field, f"{name} has no tensor {lost!r}, which {INDEX_FILE} puts there")

    with ThreadPoolExecutor(PARALLEL_READS) as pool:
        list(pool.map(check, tensors.items()))


def _tensors_by_file(files: ModelFiles) -> Mapping[str, list[str]]:
    """Return the names of the weight files, each with the names of the tensors that must be in it. For a model with a
    single weight file the list of tensors is empty, because there is no index."""
    if SINGLE_FILE in files.sizes:
        return {SINGLE_FILE: []}
    if INDEX_FILE not in files.sizes:
        raise UserError(files.field, f"there must be a {SINGLE_FILE} or a {INDEX_FILE}")
    if files.sizes[INDEX_FILE] > LARGEST_INDEX_BYTES:
        size = files.sizes[INDEX_FILE]
        raise UserError(
            files.field, f"{INDEX_FILE} has {size} bytes, more than the {LARGEST_INDEX_BYTES} that are read"
        )
    try:
        weights = json.loads(files.read(INDEX_FILE, 0, files.sizes[INDEX_FILE]))["weight_map"]
        found: dict[str, list[str]] = {}
        for tensor, name in weights.items():
            if not isinstance(name, str):
                raise TypeError(f"{tensor!r} is in no file")
            found.setdefault(name, []).append(tensor)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(files.field, f"{INDEX_FILE} must be JSON with a weight_map ({first_line(error)})") from error
    return found


def read_header(files: ModelFiles, name: str) -> Mapping[str, Any]:
    """Return the header of a safetensors file, which gives dtype, shape and byte range of each tensor by its name.

    The file consists of the header's length in 8 bytes (little endian), the header as JSON, and the bytes of the
    tensors. Raises UserError if the file has another format or another length than the header tells, or if the header
    is longer than LARGEST_HEADER_BYTES.
    """
    return _parse_header(files, name, _header_text(files, name))


def _header_text(files: ModelFiles, name: str) -> bytes:
    """Return the header of a safetensors file as JSON text. The text is not parsed yet."""
    size = files.sizes[name]
    piece = files.read(name, 0, min(size, HEADER_PIECE_BYTES))
    if piece.startswith(LFS_POINTER):
        raise UserError(files.field, f"{name} is a pointer of Git LFS, not the file: fetch it with `git lfs pull`")
    length = int.from_bytes(piece[:8], "little")
    if len(piece) < 8 or length < 2 or 8 + length > size:
        raise UserError(files.field, f"{name} is no whole safetensors file ({size} bytes)")
    if length > LARGEST_HEADER_BYTES:
        problem = f"{name} has a header of {length} bytes, more than the {LARGEST_HEADER_BYTES} that are read"
        raise UserError(files.field, problem)
    if 8 + length > len(piece):
        piece += files.read(name, len(piece), 8 + length - len(piece))
    return piece[8 : 8 + length]


def _parse_header(files: ModelFiles, name: str, text: bytes) -> Mapping[str, Any]:
    """Return the header as a mapping, after its entries were compared with the length of the file."""
    size = files.sizes[name]
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        end = 8 + len(text) + max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise UserError(files.field, f"{name} has a broken safetensors header ({first_line(error)})") from error
    if end != size:
        raise UserError(files.field, f"{name} has {size} bytes and must have {end}: it is not complete")
    checked: Mapping[str, Any] = header
    return checked


def check_configuration(folder: Path, field: str) -> int | None:
    """Return the longest sequence in tokens that the model can read, or None if `config.json` names no limit. Raises
    UserError if `config.json` does not describe a causal language model that transformers knows."""
    config = load_configuration(folder, field)
    text = config.get_text_config()
    known = {config.model_type, text.model_type} & set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    if not known:
        raise UserError(field, f"config.json names model_type {config.model_type!r}, which is no causal language model")
    return model_context(config)
