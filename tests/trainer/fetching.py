"""Processes that fetch a model through the cache, each in place of a pod, for `test_model_cache.py`.

The processes are forks of one server process that has imported everything. The server has no other threads.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterable, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from finetune_trainer.sources.cache.cache_folder import Pace
from finetune_trainer.sources.cache.cached_fetch import fetch_model_files
from finetune_trainer.sources.content_digest import ContentDigest, hub_digest
from finetune_trainer.storage.model_digests import ModelDigests

WATCHED = ("open", "os.rename", "os.remove", "os.utime")
"""Names of Python's audit events at which a process can be killed. Python raises the event `os.rename`, for example, at
each call of the function `os.rename`."""


class FolderSource:
    """A source of model files that is a local folder. The name of each fetched file is added to a log."""

    field = "model.s3.uri"

    def __init__(self, folder: Path, log: Path) -> None:
        self._folder, self._log = folder, log
        self.sizes: Mapping[str, int] = {path.name: path.stat().st_size for path in folder.iterdir()}

    def tag(self, name: str) -> str:
        return str(self.digest(name))

    def digest(self, name: str) -> ContentDigest | None:
        content = (self._folder / name).read_bytes()
        return hub_digest(size=len(content), sha256=hashlib.sha256(content).hexdigest(), blob_id="")

    def read(self, name: str, start: int, length: int) -> bytes:
        return (self._folder / name).read_bytes()[start : start + length]

    def fetch(self, names: Iterable[str], folder: Path) -> None:
        """Copy each file in two halves, so that a kill can leave half a file."""
        for name in names:
            content = (self._folder / name).read_bytes()
            (folder / name).write_bytes(content[: len(content) // 2])
            with (folder / name).open("ab") as file:
                file.write(content[len(content) // 2 :])
            with self._log.open("a") as log:
                log.write(f"{name}\n")


class NoDigests(ModelDigests):
    """The digests that a job keeps in its bucket: none here, because the source of the test states the digests of all
    files."""

    def __init__(self) -> None:
        """Start without a folder of the bucket, which `ModelDigests` would need."""


def fetch(source: Path, log: Path, folder: Path, cache: Path, pace: Pace, output: Path, die_at: int | None) -> None:
    """Fetch the model in ``source`` through ``cache`` into ``folder``. With ``die_at``, the process is killed before
    the watched event number ``die_at``, counted from 0. The process prints to the file ``output``, and writes the
    number of watched events to the same path with the suffix `.events`."""
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    files = FolderSource(source, log)
    folder.mkdir()
    events = 0

    def count(event: str, _: tuple[Any, ...]) -> None:
        nonlocal events
        if event in WATCHED:
            if events == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            events += 1

    sys.addaudithook(count)
    fetch_model_files(files, list(files.sizes), folder, cache, NoDigests(), pace)
    seen = events
    output.with_suffix(".events").write_text(str(seen))


def start(*arguments: Any) -> BaseProcess:
    """Start `fetch` in a process of its own."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    process = context.Process(target=fetch, args=arguments)
    process.start()
    return process
