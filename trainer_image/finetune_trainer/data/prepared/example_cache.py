"""Keeps prepared examples on a volume that the pods of many jobs share. `example_folder.py` calls this module.

The examples of one identity are one file: a line with the seal, and then the files of the folder of examples, one
behind the other and each encrypted, because examples are the rows of a job in another form. Nothing on the volume is
believed: the files are copied to the node, and count only if the copied bytes have the digests in the seal, and the
seal the right key. The name of the file depends on the key, so that jobs with different keys do not replace each
other's examples.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from Crypto.Cipher import AES

from finetune_trainer.pod.errors import OutsideFailure, first_line, reason_of
from finetune_trainer.pod.volume_folder import Shares, VolumeFolder

FOLDER = "finetune-examples"
"""Name of the folder on the volume that holds all examples."""
SHARES = Shares(largest=0.1, of_the_free=0.6)
"""Examples take at most a tenth of the volume, and there is room for some of them where the files of models, which
nobody deletes for examples, take all that they may take."""
LONGEST_SEAL = 64 * 1024
COPY_BYTES = 4 << 20
"""How many bytes of a file are copied at once."""
_NAME = re.compile(r"examples-[0-9a-f]{64}")


class DamagedExamples(Exception):  # noqa: N818  (the file is at fault)
    """A file on the volume does not hold what was written into it, as a phrase that follows "the examples"."""


class ExampleCache:
    """The examples on a mounted volume. The methods raise OSError for errors of the volume's file system."""

    def __init__(self, mount: Path, key: bytes) -> None:
        """Use the volume that is mounted at ``mount``. For ``key`` see `obtain_examples`."""
        self._key = key
        self._folder = VolumeFolder(mount, FOLDER, lambda name: _NAME.fullmatch(name) is not None, shares=SHARES)

    def __enter__(self) -> ExampleCache:
        return self

    def __exit__(self, *_: object) -> None:
        """Close the folder. No other method may be called afterwards."""
        self._folder.__exit__()

    def name(self, identity: str) -> str:
        """Return the name of the file with the examples of an identity."""
        return f"examples-{self._mac(f'name {identity}')}"

    def copy_out(self, identity: str, names: Sequence[str], target: Path) -> bool:
        """Copy the files ``names`` of the examples into the existing local folder ``target``, and return whether the
        volume has the examples. Raises DamagedExamples, after the file was deleted, if the file does not hold what its
        seal says, and OutsideFailure if ``target`` can't be written."""
        kept = self.name(identity)
        with self._folder.opened(kept) as file:
            if file is None:
                return False
            try:
                salt, files = self._seal(file, identity, names)
                for name, (size, digest) in files.items():
                    if _copied_digest(file, self._cipher(salt, name), target / name, size) != digest:
                        raise DamagedExamples(f"have a changed {name}")
            except DamagedExamples:
                self._folder.discard(kept)
                raise
        self._folder.note_use(kept)
        return True

    def copy_in(self, identity: str, names: Sequence[str], source: Path) -> None:
        """Copy the files ``names`` of the local folder ``source`` to the volume. Raises OSError with ENOSPC where there
        is no room, and OutsideFailure if ``source`` can't be read."""
        kept, salt = self.name(identity), secrets.token_bytes(16)
        files = {name: _size_and_digest(self._encrypted(salt, source / name)) for name in names}
        content = json.dumps({"name": kept, "salt": salt.hex(), "files": files}, sort_keys=True)
        seal = json.dumps({"content": content, "mac": self._mac(content)}).encode() + b"\n"
        with self._folder.new_file(len(seal) + sum(size for size, _ in files.values())) as new:
            new.write(seal)
            for name in names:
                for chunk in self._encrypted(salt, source / name):
                    new.write(chunk)
            new.name(kept)

    def _seal(self, file: BinaryIO, identity: str, names: Sequence[str]) -> _Seal:
        """Read the seal. Raises DamagedExamples if it is not the one of a file with this identity and key, or if the
        file has another size."""
        line = file.readline(LONGEST_SEAL)
        try:
            seal = json.loads(line)
            content, mac = str(seal["content"]), str(seal["mac"])
            if not hmac.compare_digest(self._mac(content).encode(), mac.encode()):
                raise DamagedExamples("have another seal")
            sealed: Any = json.loads(content)
            files = {name: (int(sealed["files"][name][0]), str(sealed["files"][name][1])) for name in names}
            salt, is_right = bytes.fromhex(sealed["salt"]), sealed["name"] == self.name(identity)
            if any(size < 0 for size, _ in files.values()):
                raise ValueError("a size is negative")
        except (ValueError, KeyError, TypeError, IndexError, OverflowError, RecursionError) as error:
            raise DamagedExamples(f"have a seal that can't be read ({first_line(error)})") from None
        if not is_right:
            raise DamagedExamples("have the seal of other examples")
        if os.fstat(file.fileno()).st_size != len(line) + sum(size for size, _ in files.values()):
            raise DamagedExamples("have another size")
        return _Seal(salt, files)

    def _encrypted(self, salt: bytes, path: Path) -> Iterator[bytes]:
        """Yield the encrypted content of a local file of examples. Raises OutsideFailure if it can't be read."""
        cipher = self._cipher(salt, path.name)
        for chunk in _chunks(path):
            yield cipher(chunk)

    def _cipher(self, salt: bytes, name: str) -> Callable[[bytes], bytes]:
        """Return the function that encrypts or decrypts a file of examples, chunk by chunk: AES in counter mode (NIST
        SP 800-38A), in which both are the same. Each file has a key of its own, so the counter begins at 0."""
        key = hmac.digest(self._key, b"encrypt " + salt + name.encode(), "sha256")
        return AES.new(key, AES.MODE_CTR, nonce=b"").encrypt

    def _mac(self, content: str) -> str:
        return hmac.digest(self._key, content.encode(), "sha256").hex()


class _Seal(NamedTuple):
    """What the first line of a file says."""

    salt: bytes
    """Random bytes, from which the keys of this file's content are derived."""
    files: Mapping[str, tuple[int, str]]
    """Size, and sha256 of the encrypted content, of each file of the examples."""


@contextmanager
def writing_examples(path: Path) -> Iterator[None]:
    """Turn an error of the local file system in the `with` block, such as a full disk, into OutsideFailure. ``path`` is
    the folder of examples that the block writes."""
    try:
        yield
    except OSError as error:
        raise OutsideFailure(f"the examples can't be written to {path.parent}: {reason_of(error)}") from error


@contextmanager
def _reading_examples(path: Path) -> Iterator[None]:
    """Turn an error of the local file system in the `with` block into OutsideFailure. ``path`` is the folder of
    examples that the block reads."""
    try:
        yield
    except OSError as error:
        raise OutsideFailure(f"the examples can't be read from {path.parent}: {reason_of(error)}") from error


def _copied_digest(source: BinaryIO, decrypt: Callable[[bytes], bytes], target: Path, size: int) -> str:
    """Copy the next ``size`` bytes of ``source``, decrypted, to ``target``, and return the sha256 of the encrypted
    bytes. There are fewer bytes if another writer has changed the file."""
    sha256, left = hashlib.sha256(), size
    with writing_examples(target.parent):
        copy = target.open("wb")
    try:
        while left and (chunk := source.read(min(COPY_BYTES, left))):
            sha256.update(chunk)
            left -= len(chunk)
            with writing_examples(target.parent):
                copy.write(decrypt(chunk))
    finally:
        with writing_examples(target.parent):
            copy.close()  # writes what is left in the buffer
    return sha256.hexdigest()


def _size_and_digest(chunks: Iterable[bytes]) -> tuple[int, str]:
    sha256, size = hashlib.sha256(), 0
    for chunk in chunks:
        sha256.update(chunk)
        size += len(chunk)
    return size, sha256.hexdigest()


def _chunks(path: Path) -> Iterator[bytes]:
    with _reading_examples(path.parent):
        file = path.open("rb")
    with file:
        while True:
            with _reading_examples(path.parent):
                chunk = file.read(COPY_BYTES)
            if not chunk:
                return
            yield chunk
