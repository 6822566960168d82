"""Puts the examples of the data sets of a job into the scratch folder of a node, where all ranks of the node map them.
`preparation.py` uses an `ExamplePreparation` on the first rank of each node.

Rows become examples in batches and in several processes (`data/prepared`). A job with `storage.cache.claimName` keeps
the examples of each data source on that volume, for later attempts and for other jobs. Examples on the volume are
encrypted, and used only if their seal is right. The key is derived from the secret access key of the bucket: whoever
knows that secret could change the data and the checkpoints of the job anyway.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

from finetune_core.api.sources import DataSource
from finetune_core.contract.pod import SECRET_ACCESS_KEY
from finetune_trainer.data.dataset import LengthLimit, columns_read
from finetune_trainer.data.examples import ExampleSet, joined
from finetune_trainer.data.formats import TokenizeFunctions
from finetune_trainer.data.mixture import Mixture
from finetune_trainer.data.prepared.conversation_batches import batch_functions
from finetune_trainer.data.prepared.example_cache import writing_examples
from finetune_trainer.data.prepared.example_folder import obtain_examples
from finetune_trainer.data.prepared.example_identity import data_identity, example_identity
from finetune_trainer.data.prepared.prepared_rows import PreparedRows, prepare_rows, process_count
from finetune_trainer.data.reader import data_files, read_rows
from finetune_trainer.pod import cgroup
from finetune_trainer.pod.errors import reason_of
from finetune_trainer.pod.plan import WorkerPlan
from finetune_trainer.pod.settings import Paths
from finetune_trainer.reporting.progress import log_line
from finetune_trainer.sources.inputs import source_name

_KEY_SALT = b"finetune: prepared examples"
_KEY_WORK = 1 << 14
"""The cost of the key (the parameter n of scrypt, RFC 7914): 16 MiB and some ten milliseconds. Whoever can read the
volume can try secrets against a seal, so each try must cost something."""


@dataclass(frozen=True)
class Encoding:
    """Everything that decides the token ids of a row, beside its data set and its limit of tokens."""

    tokenizer: Any
    added_tokens: Sequence[str]
    ends: Sequence[int]
    """The result of `stop_ids`."""
    today: date | None
    """The date that a chat template gets."""

    def functions(self) -> TokenizeFunctions:
        """Return the functions that make many examples with little work."""
        return batch_functions(self.tokenizer, self.added_tokens, ends=self.ends, today=self.today)


class Part(NamedTuple):
    """A data source, or one source of a mix."""

    field: str
    """Path in the spec, for example `dataset.train.mix[0]`."""
    source: DataSource
    path: Path


class PreparedSet(NamedTuple):
    """The examples of a data set."""

    examples: ExampleSet
    sizes: list[int]
    """Number of examples of each source of the data set."""
    notices: list[str]


def data_sets(plan: WorkerPlan) -> dict[str, list[Part]]:
    """Return the sources of each data set that the job has, by the name of the data set (`train`, `validation` or
    `test`), `train` first. A data set has several sources only where it is a mix."""
    inputs = plan.inputs
    left: dict[str, list[Path | None]] = {
        "train": [*(inputs.mix or [inputs.train])],
        "validation": [inputs.validation],
        "test": [inputs.test],
    }
    sets: dict[str, list[Part]] = {}
    for field, source in plan.config.dataset.sources.items():
        name = field.removeprefix("dataset.").partition(".")[0]
        path = left[name].pop(0)
        if path is not None:
            sets.setdefault(name, []).append(Part(field, source, path))
    return sets


class ExamplePreparation:
    """Prepares the examples of the data sets of a job on one node."""

    def __init__(
        self,
        plan: WorkerPlan,
        encoding: Encoding,
        *,
        limit: LengthLimit,
        graded: Collection[str],
        stop: Callable[[], bool],
    ) -> None:
        """``graded`` holds all columns that the job's grader reads. ``stop`` returns whether the preparation shall end,
        which then raises StopAgreed. Raises UserError if the rows can't be tokenised."""
        self._plan, self._encoding, self._limit, self._graded, self._stop = plan, encoding, limit, graded, stop
        self._tokenize = encoding.functions()
        self._cache, self._key = _cache_and_key(plan.paths)
        every = [part for parts in data_sets(plan).values() for part in parts] if self._cache is not None else []
        self._data = {part.field: _data_identity(part) for part in every}
        # Tokenising may change settings that a tokenizer was loaded with, so all identities are determined before.
        self._identities = {part.field: self._identity(part) for part in every}

    def prepare(self, name: str, parts: Sequence[Part]) -> PreparedSet:
        """Put the examples of the data set ``name`` into its folder, and return them. Raises UserError for rows that
        the job does not allow, and the errors of `prepare_rows` and `obtain_examples`."""
        folder = examples_folder(self._plan, name)
        if len(parts) == 1:
            prepared = self._obtain(parts[0], folder)
            examples, sizes = prepared.examples, [len(prepared.examples)]
            return PreparedSet(examples, sizes, [*_files_notice(parts[0], prepared.rows), *prepared.notices])
        apart = folder.parent / f"{name}-sources"
        made, notices = [], []
        for number, part in enumerate(parts):
            prepared = self._obtain(part, apart / str(number))
            made.append(prepared.examples)
            notices += [*_files_notice(part, prepared.rows), *prepared.notices]
        with writing_examples(folder):
            joined(made).save(folder)
        shutil.rmtree(apart)
        return PreparedSet(ExampleSet.load(folder), [len(examples) for examples in made], notices)

    def _obtain(self, part: Part, target: Path) -> PreparedRows:
        """Put the examples of one source into the folder ``target``."""
        found = obtain_examples(
            self._identities.get(part.field),
            lambda: self._made(part),
            target,
            cache=self._cache,
            key=self._key,
            is_unchanged=lambda: _data_identity(part) == self._data[part.field],
        )
        if found.trouble:
            log_line(f"storage.cache: {found.trouble}")
        prepared = found.prepared
        origin = ", which storage.cache had already" if found.from_cache else ""
        source, count = source_name(part.source), len(prepared.examples)
        log_line(f"{part.field}: {prepared.rows} rows of {source}, {count} examples{origin}")
        return prepared

    def _made(self, part: Part) -> PreparedRows:
        return prepare_rows(
            read_rows(part.path, part.field, columns=self._columns(part)),
            source_name(part.source),
            part.field,
            self._plan.config.dataset,
            self._tokenize,
            limit=self._limit,
            keep_rows=self._keeps_rows(part),
            processes=_processes(),
            stop=self._stop,
        )

    def _identity(self, part: Part) -> str | None:
        """Return the identity of the examples of a source, or None where it can't be known."""
        data, encoding = self._data[part.field], self._encoding
        if data is None:
            return None
        return example_identity(
            data,
            source_name(part.source),
            part.field,
            self._plan.config.dataset,
            encoding.tokenizer,
            limit=self._limit,
            columns=self._columns(part),
            keep_rows=self._keeps_rows(part),
            added_tokens=encoding.added_tokens,
            ends=encoding.ends,
            today=encoding.today,
        )

    def _columns(self, part: Part) -> set[str]:
        config = self._plan.config
        return columns_read(config.dataset, part.field, config.evaluation.base_prompt, self._graded)

    def _keeps_rows(self, part: Part) -> bool:
        """Return whether the rows of a source are kept beside their examples, because graders read them."""
        return self._plan.config.dataset.task is not None and not part.field.startswith("dataset.train")


def examples_folder(plan: WorkerPlan, name: str) -> Path:
    """Return the folder with the examples of the data set ``name``, which all ranks of the node map."""
    return plan.folder / "tokens" / name


def mixture_of(plan: WorkerPlan, sizes: Sequence[int]) -> Mixture:
    """Return how the training examples are mixed. ``sizes`` has the number of examples of each source."""
    return Mixture.of(sizes, [part.weight for part in plan.config.dataset.train.mix or ()])


def mix_notice(parts: Sequence[Part], mixture: Mixture) -> str:
    """Return a notice about how many examples each source of a mix has, and how often the first epoch takes one of
    them."""
    taken = mixture.counts(mixture.examples)
    sources = (
        f"{count} times one of {size} examples from {source_name(part.source)}"
        for part, size, count in zip(parts, mixture.sizes, taken, strict=True)
    )
    return f"dataset.train: an epoch takes {'; '.join(sources)}"


def _files_notice(part: Part, rows: int) -> list[str]:
    """Return a notice about how many files and rows were read, if the source has several files."""
    files = data_files(part.path)
    if len(files) < 2:
        return []
    return [f"{part.field}: {rows} rows of {len(files)} files were read, from {files[0].name} to {files[-1].name}"]


def _data_identity(part: Part) -> str | None:
    """Return the identity of the files of a source, or None if a file can't be read."""
    try:
        return data_identity(part.path)
    except OSError:
        return None  # the reader of the rows says what is wrong with the file


def _processes() -> int:
    """Return how many processes tokenise beside this one. All CPUs of the pod are free, because the other ranks wait
    for the examples."""
    cpus = cgroup.available_cpus(
        limit=cgroup.cpu_limit(), request=cgroup.cpu_request(os.environ), cores=cgroup.usable_cores()
    )
    return process_count(cpus, cgroup.memory_limit())


def _cache_and_key(paths: Paths) -> tuple[Path | None, bytes]:
    """Return the folder at which the volume of the cache is mounted, and the key with which the examples on it are
    sealed. The folder is None where nothing is kept: the job has no cache or no secret access key, or the volume can't
    be used."""
    try:
        if not paths.model_cache.is_dir():
            return None, b""
    except OSError as error:
        log_line(f"storage.cache: the volume can't be used ({reason_of(error)}): the tokenised rows are not kept")
        return None, b""
    file = paths.credentials / SECRET_ACCESS_KEY
    secret = file.read_bytes() if file.is_file() else b""
    if not secret:
        log_line(
            "storage.cache: the tokenised rows are not kept, because only a job with storage.credentialsSecretRef has a"
            " secret with which it can seal them"
        )
        return None, b""
    return paths.model_cache, hashlib.scrypt(secret, salt=_KEY_SALT, n=_KEY_WORK, r=8, p=1, dklen=32)
