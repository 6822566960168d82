"""Checks a base model without downloading its weights: all weight files are present and complete, `config.json`
describes a known language model, and the tokenizer loads. Then the trainer's own checks run on the headers of the
weight files. An adapter that the job starts from is checked in the same way, and compared with that of earlier runs.
`preflight/entrypoint.py` calls `check_model`, `check_adapter`, `check_same_adapter` and `check_for_job`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

from finetune_core.contract import RunConfig
from finetune_core.errors import UserError
from finetune_trainer.data.chat.chat_template import use_chat_template
from finetune_trainer.data.tokenizer import add_tokens, check_ends, load_tokenizer
from finetune_trainer.model.configuration import load_configuration, model_context
from finetune_trainer.model.given_adapter import GivenAdapter, adapter_of, with_settings_of
from finetune_trainer.pod.errors import first_line
from finetune_trainer.pod.imports import importing
from finetune_trainer.pod.model_file_names import ADAPTER_CONFIG_FILE, ADAPTER_FILE, INDEX_FILE
from finetune_trainer.pod.model_text_files import pointer_problem
from finetune_trainer.sources.adapter_files import JobFiles, select_adapter_files
from finetune_trainer.sources.inputs import source_name
from finetune_trainer.sources.model_files import ModelFiles
from finetune_trainer.sources.model_selection import ModelSelection, select_model_files
from finetune_trainer.storage.lineage import RunRecord
from finetune_trainer.storage.lineage import check_adapter as check_recorded_adapter

HEADER_PIECE_BYTES = 128 * 1024
"""How many bytes of a weight file are read first. Nearly every safetensors header is shorter, so one request is
enough.
"""
LARGEST_HEADER_BYTES = 10_000_000
"""Longest header in bytes that is accepted. A header of this length has room for 80,000 tensors, and a file of a large
model has a few thousand. As Python objects, a header takes twenty times its length in memory."""
LARGEST_HEADERS_BYTES = 64_000_000
"""Largest size in bytes of the headers of all weight files together. The headers of a model with a trillion parameters
have about 20 MB."""
LARGEST_ADAPTER_BYTES = 1 << 30
"""Largest weight file in bytes of an adapter that is fetched as a whole, to compare it with that of earlier runs."""
PARALLEL_READS = 4


@dataclass(frozen=True)
class ModelFacts:
    """What the checks of the data files need to know about the base model."""

    tokenizer: Any
    context: int | None
    """Longest sequence in tokens that the model can read. None if `config.json` names no limit."""
    folder: Path
    """Local folder with the small files of the model, among them its chat templates."""
    rows: int | None = None
    """Number of rows of the embeddings in the model that the job trains, including the rows of the added tokens. None
    if the number is not in `config.json`."""
    added_tokens: Sequence[str] = ()
    """The tokens of `model.addedTokens`. They were added to ``tokenizer``."""
    notices: Sequence[str] = ()
    """What users should know about the model's files although the job can run."""


def check_model(files: ModelFiles, folder: Path, headers: Path, added_tokens: Sequence[str]) -> ModelFacts:
    """Check the headers of the weight files, put the small files into ``folder``, and load configuration and tokenizer
    from there. At the end, create the folder ``headers`` for `check_for_job`: a model with links to the small files,
    whose weight files have their whole length but hold only the headers.

    Raises UserError where the model or one of ``added_tokens`` can't be used.
    """
    selection = select_model_files(files)
    unfinished = headers.with_suffix(".unfinished")
    unfinished.mkdir()
    check_weights(files, selection, unfinished)
    folder.mkdir()
    files.fetch(selection.small, folder)
    config = load_configuration(folder, files.field)
    tokenizer = load_tokenizer(folder)
    rows = getattr(config.get_text_config(), "vocab_size", None)
    if isinstance(rows, int):
        check_ends(tokenizer, folder, rows)
    ids = add_tokens(tokenizer, added_tokens)
    for name in selection.small:
        (unfinished / name).symlink_to(folder / name)
    unfinished.rename(headers)
    return ModelFacts(
        tokenizer,
        model_context(config),
        folder,
        max(rows, *(number + 1 for number in ids), 0) if isinstance(rows, int) else None,
        added_tokens,
        selection.notices,
    )


def check_adapter(files: ModelFiles, folder: Path) -> None:
    """Check the kind of the adapter that the job starts from, and the header of its weight file. Then create
    ``folder`` for `check_for_job`: an adapter whose weight file has its whole length but holds only the header.

    Raises a UserError that names the file at fault.
    """
    select_adapter_files(files)
    unfinished = folder.with_suffix(".unfinished")
    unfinished.mkdir()
    files.fetch([ADAPTER_CONFIG_FILE], unfinished)
    if isinstance(files, JobFiles):
        files.check_content([ADAPTER_CONFIG_FILE], unfinished)
    GivenAdapter.read(unfinished)
    text = _header_text(files, ADAPTER_FILE)
    _parse_header(files, ADAPTER_FILE, text)
    with (unfinished / ADAPTER_FILE).open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(files.sizes[ADAPTER_FILE])
    unfinished.rename(folder)


def check_same_adapter(files: ModelFiles | None, records: Mapping[int, RunRecord], folder: Path) -> None:
    """Raise UserError where the newest run in the job's folder started from another adapter than the one in ``files``,
    or where only one of that run and the job has an adapter. ``records`` are those of the runs in the job's folder. The
    adapter is fetched into the new folder ``folder``, unless it is so large that only the trainer compares it."""
    if not records:
        return
    if files is None:
        check_recorded_adapter(records, None)
    elif files.sizes[ADAPTER_FILE] <= LARGEST_ADAPTER_BYTES:
        folder.mkdir()
        files.fetch([ADAPTER_CONFIG_FILE, ADAPTER_FILE], folder)
        check_recorded_adapter(records, GivenAdapter.read(folder).sha256)


def check_for_job(headers: Path, config: RunConfig, adapter: Path | None = None) -> list[str]:
    """Run the checks with which the trainer begins, on the folder ``headers`` that `check_model` has made, and rehearse
    the export of the artifact. ``adapter`` is the folder that `check_adapter` has made, if the job starts from an
    adapter. Return notices. Raises UserError where the job can't use the model or the adapter.

    torch is imported only here, because it takes seconds and hundreds of megabytes.
    """
    with importing():
        from finetune_trainer.checkpoints.job_export import rehearse_job_export
        from finetune_trainer.model.base_check import JobBase, check_base

    config = with_settings_of(config, adapter_of(adapter))
    base = JobBase(headers, config, adapter, source_name(config.model))
    notices = check_base(base)
    use_chat_template(base.tokenizer, config.dataset.format, headers)
    scratch = headers.with_suffix(".rehearsal")
    return notices + rehearse_job_export(config, headers, headers, base.tokenizer, base.targets, scratch)


def check_weights(files: ModelFiles, selection: ModelSelection, folder: Path) -> None:
    """Raise UserError if a weight file has another length than its header says, has a malformed header, or lacks a
    tensor that the index expects in it, or if the headers are too long. Write each weight file into ``folder`` with its
    header and its whole length. The tensors are holes that take no space on the disk."""
    left = LARGEST_HEADERS_BYTES
    one_header_in_memory = Lock()

    def check(item: tuple[str, Sequence[str]]) -> None:
        name, expected = item
        text = _header_text(files, name)
        with one_header_in_memory:
            nonlocal left
            left -= len(text)
            if left < 0:
                problem = f"the headers of its weight files have more than {LARGEST_HEADERS_BYTES} bytes together"
                raise UserError(files.field, problem)
            header = _parse_header(files, name, text)
            with (folder / name).open("wb") as file:
                file.write(len(text).to_bytes(8, "little") + text)
                file.truncate(files.sizes[name])
            lost = next((tensor for tensor in expected if tensor not in header), None)
            del header
        if lost is not None:
            raise UserError(files.field, f"{name} has no tensor {lost!r}, which {INDEX_FILE} puts there")

    with ThreadPoolExecutor(PARALLEL_READS) as pool:
        list(pool.map(check, selection.weights.items()))


def _header_text(files: ModelFiles, name: str) -> bytes:
    """Return the header of the safetensors file ``name`` as JSON text. The text is not parsed yet.

    The file consists of the header's length in 8 bytes (little endian), the header, and the bytes of the tensors. The
    header gives dtype, shape and byte range of each tensor by its name. Raises UserError if the file is a pointer of
    Git LFS or ends before the end of the header, or if the header is longer than LARGEST_HEADER_BYTES.
    """
    size = files.sizes[name]
    piece = files.read(name, 0, min(size, HEADER_PIECE_BYTES))
    if problem := pointer_problem(name, piece):
        raise UserError(files.field, problem)
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
    """Return the header ``text`` as a mapping. Raises UserError if the text is malformed, or if the entries of the
    header do not fit the length of the file."""
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
