"""Fetches the files of a base model or an adapter. Files that the cache on a volume (`storage.cache.claimName`) has are
copied from there, and all others are fetched from their source. `inputs.py` calls `fetch_model_files`, and the
preflight check calls `cache_notices`.

The cache only saves time. If the volume can't be read, the files come from their source. If it can't be written to,
fetched files are not kept in the cache. A sentence in the log says so.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from finetune_trainer.pod.errors import OutsideFailure, reason_of
from finetune_trainer.sources.cache.cache_folder import ModelCache, Pace, Patience
from finetune_trainer.sources.content_digest import ContentDigest, own_digest
from finetune_trainer.sources.file_selection import shown
from finetune_trainer.sources.hub_requests import PARALLEL_DOWNLOADS
from finetune_trainer.sources.model_files import ModelFiles
from finetune_trainer.storage.model_digests import ModelDigests
from finetune_trainer.storage.run_store import digest_of_file

SMALL_BYTES = 16 << 20
"""Files of at most this size, such as those of the tokenizer, are fetched with one call."""
FIELD = "storage.cache"


def fetch_model_files(
    files: ModelFiles, names: Collection[str], folder: Path, cache: Path, own: ModelDigests, pace: Pace | None = None
) -> None:
    """Put the files called ``names`` into the existing local folder ``folder``. ``cache`` is the folder at which the
    volume of the cache is mounted. If that folder does not exist, the job has no cache. ``own`` holds the digests that
    pods of this job have computed themselves.

    Raises UserError and OutsideFailure as ``files.fetch`` does. A job with a cache also raises OutsideFailure if a
    downloaded file does not have the content that its source states, if two downloads of the file had different
    contents, or if the bucket with the digests ``own`` can't be reached.
    """
    try:
        opened = ModelCache(cache, pace) if cache.is_dir() else None
    except OSError as error:
        _say(f"the volume can't be used ({reason_of(error)}): the model is fetched from its source")
        opened = None
    if opened is None:
        files.fetch(names, folder)
        return
    with opened:
        fetch = _CachedFetch(files, names, folder, opened, own)
        fetch.run()
    _say(f"{fetch.copied} of {len(names)} files came from the cache, and {fetch.kept} were fetched and are kept in it")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Unit:
    """Files that are fetched with one call."""

    name: str
    names: Sequence[str]
    bytes: int


class _CachedFetch:
    """Fetches the files of one model into one folder."""

    def __init__(
        self,
        files: ModelFiles,
        names: Collection[str],
        folder: Path,
        cache: ModelCache,
        own: ModelDigests,
    ) -> None:
        self._files, self._folder, self._cache, self._own = files, folder, cache, own
        stated = {name: files.digest(name) for name in names}
        self._units = self._grouped(stated)
        self._digests = {name: digest for name, digest in stated.items() if digest is not None}
        self._uncertain = [name for name, digest in stated.items() if digest is None or not digest.is_certain]
        self._patience = Patience(cache.pace)
        self._lock = threading.Lock()
        self._done: set[str] = set()
        self._said: set[str] = set()
        self._can_read = self._can_write = True
        self.copied = self.kept = 0
        """`copied` is the number of files that came from the cache. `kept` is the number of files that were fetched
        from their source and are now in the cache."""

    def run(self) -> None:
        """Take each unit from the cache, or fetch it. Units that another pod is fetching are left for later."""
        left = self._units
        self._look_up(list(self._files.sizes))
        with ThreadPoolExecutor(PARALLEL_DOWNLOADS) as pool:
            while left:
                got = list(pool.map(self._obtain, left))
                if not any(got):
                    self._say_once("waits", f"waits for another pod that fetches {shown(left[0].names[0])}")
                    # A network file system does not report a new file, so the cache is looked at again after a pause.
                    time.sleep(self._cache.pace.look_seconds)
                left = [unit for unit, is_done in zip(left, got, strict=True) if not is_done]

    def _obtain(self, unit: _Unit) -> bool:
        """Take the files of a unit from the cache, or fetch them if this pod has the turn. Return whether all files of
        the unit are now in the local folder."""
        missing = self._copy_out(unit.names)
        if not missing:
            return True
        with self._turn(unit) as is_ours:
            if not is_ours:
                return False
            # Another pod may have put the files into the cache before this pod got the turn.
            self._look_up(missing)
            if missing := self._copy_out(missing):
                self._files.fetch(missing, self._folder)
                for name in missing:
                    self._copy_in(name)
        return True

    def _grouped(self, stated: Mapping[str, ContentDigest | None]) -> list[_Unit]:
        """Return all small files as one unit, and each other file as a unit of its own. ``stated`` has the digest of
        each file, where its source states one. All pods give the same unit the same name."""
        sizes = self._files.sizes
        small = sorted(name for name in stated if sizes[name] <= SMALL_BYTES)
        groups = [small] if small else []
        groups += [[name] for name in sorted(stated) if sizes[name] > SMALL_BYTES]
        units = []
        for group in groups:
            contents = [
                digest.name if (digest := stated[name]) else f"{name} {self._files.tag(name)}" for name in group
            ]
            text = "\n".join(contents).encode(errors="surrogatepass")
            size = sum(sizes[name] for name in group)
            units.append(_Unit(name=hashlib.sha256(text).hexdigest(), names=group, bytes=size))
        return units

    def _look_up(self, names: Collection[str]) -> None:
        """Look up which digests the pods of this job have computed for the files ``names``, and use these digests in
        all later calls. Only those files are looked up whose source states no digest, or one that is not certain
        (`ContentDigest.is_certain`)."""
        tags = {name: self._files.tag(name) for name in self._uncertain if name in names and name not in self._done}
        if tags:
            for name, found in self._own.find(tags).items():
                self._digests[name] = own_digest(found.bytes, found.sha256)

    @contextmanager
    def _turn(self, unit: _Unit) -> Iterator[bool]:
        """Yield whether this pod may fetch a unit now. It may if no other pod has the turn, or if the pod that has the
        turn seems to be dead or is too slow. Where the volume can't be written to, every pod may fetch."""
        turn, may_fetch = None, not self._can_write
        if self._can_write:
            with self._trouble_with_writing():
                turn = self._cache.take_turn(unit.name)
                if turn is None:
                    sign = self._cache.sign_of_life(unit.name)
                    if self._patience.is_over(unit.name, sign, unit.bytes):
                        self._cache.end_turn_of_others(unit.name)
                        turn = self._cache.take_turn(unit.name)
                        may_fetch = True
            may_fetch = may_fetch or not self._can_write
        if turn is None:
            yield may_fetch
        else:
            with turn:
                yield True

    def _copy_out(self, names: Sequence[str]) -> list[str]:
        """Copy the files ``names`` from the cache, and return the names of those files that the cache does not have."""
        missing = []
        for name in names:
            if name in self._done:
                continue
            try:
                digest = self._digests.get(name) if self._can_read else None
                is_there = digest is not None and self._cache.copy_out(digest, self._folder / name)
            except OSError as error:
                is_there = self._can_read = False
                self._say_once("read", f"the volume can't be read ({reason_of(error)}): files come from their source")
            if is_there:
                with self._lock:
                    self._done.add(name)
                    self.copied += 1
            else:
                missing.append(name)
        return missing

    def _copy_in(self, name: str) -> None:
        """Put a file that was just fetched into the cache. Raises OutsideFailure if the file does not have the content
        that its source states, or if another download of it had another content."""
        digest, path = self._digests.get(name), self._folder / name
        is_right, is_kept = self._compared_and_kept(digest, path) if digest is not None else (False, False)
        if not is_right:
            computed = digest_of_file(path)
            if digest is not None and digest.is_certain:
                raise self._received_wrong(name, f"its {digest.algorithm} digest is not {digest.value}")
            if digest is not None:
                # Either the ETag is no digest of the content, or the content was damaged on its way. In the second
                # case, a second download has another content.
                self._files.fetch([name], self._folder)
                if digest_of_file(path) != computed:
                    raise self._received_wrong(name, "its content was another one the second time")
            if not self._own.note(name, self._files.tag(name), computed):
                raise self._received_wrong(name, "another pod of this job has received another content")
            self._digests[name] = own_digest(computed.bytes, computed.sha256)
            _, is_kept = self._compared_and_kept(self._digests[name], path)
        with self._lock:
            self.kept += is_kept

    def _received_wrong(self, name: str, why: str) -> OutsideFailure:
        return OutsideFailure(f"{self._files.field}: {shown(name)} was not received as it is: {why}")

    def _compared_and_kept(self, digest: ContentDigest, path: Path) -> tuple[bool, bool]:
        """Put the local file ``path`` into the cache if it has the digest ``digest``. Return whether the file has the
        digest, and whether the file is now in the cache."""
        if self._can_write:
            with self._trouble_with_writing():
                is_right = self._cache.copy_in(digest, path, [other.name for other in list(self._digests.values())])
                return is_right, is_right
        return digest.is_of(path), False

    @contextmanager
    def _trouble_with_writing(self) -> Iterator[None]:
        """Turn an error of the volume in the `with` block into a sentence in the log. After such an error, nothing more
        is written to the volume."""
        try:
            yield
        except OSError as error:
            self._can_write = False
            self._say_once("write", f"the volume can't be written to ({reason_of(error)}): what it lacks is not kept")

    def _say_once(self, subject: str, sentence: str) -> None:
        with self._lock:
            is_new = subject not in self._said
            self._said.add(subject)
        if is_new:
            _say(sentence)


def cache_notices(bytes_of_model: int, cache: Path) -> list[str]:
    """Return a sentence if the pods can't write to the volume of the cache, or if the volume is too small for a model
    of ``bytes_of_model`` bytes. The preflight check reports it. ``cache`` is the folder at which the volume is mounted.
    If that folder does not exist, the job has no cache."""
    try:
        if not cache.is_dir():
            return []
        with ModelCache(cache) as opened:
            opened.check_writable()
            largest = opened.largest_bytes
    except OSError as error:
        return [
            f"{FIELD}: user {os.getuid()} of the pods can't write to the volume ({reason_of(error)}), so pods fetch"
            " what it lacks and do not keep it"
        ]
    if largest < bytes_of_model:
        return [
            f"{FIELD}: the volume has room for {largest >> 20} MiB of models, and the model has"
            f" {bytes_of_model >> 20} MiB, so pods fetch the rest each time"
        ]
    return []


def _say(sentence: str) -> None:
    print(f"{FIELD}: {sentence}", flush=True)
