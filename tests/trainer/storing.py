"""A program that uses a folder store or an object store in a process of its own, and prints what happened as JSON. The
tests of the folder store kill it, refuse its system calls, and let several processes race.

    python -m tests.trainer.storing kills FOLDER OPERATION
    python -m tests.trainer.storing calls FOLDER OPERATION
    python -m tests.trainer.storing refused FOLDER OPERATION CALL ERROR
    python -m tests.trainer.storing create STORE NUMBER
    python -m tests.trainer.storing own STORE NUMBER

STORE is the folder of a folder store, or `ENDPOINT CREDENTIALS` of an object store in one argument. The last two print
a line when they are ready, and begin when their standard input ends.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import random
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from finetune_trainer.pod.errors import OutsideFailure
from finetune_trainer.storage.client import Store
from finetune_trainer.storage.folder.folder_entries import PARTIAL
from finetune_trainer.storage.folder.folder_store import FolderStore
from finetune_trainer.storage.retries import Retries
from finetune_trainer.storage.run_store import RunStore
from tests.trainer.objectstore import BUCKET
from tests.trainer.refusing import refuse
from tests.trainer.traced import traced

KEY = "runs/job/checkpoints/000001-000000005/state"
OLD, NEW = b"old" * 1000, b"new" * 400_000
"""Contents before and after an operation. The new content is longer than one chunk of a copy."""
RACED = [f"raced/{number:02d}" for number in range(40)]
STEPS = 150


def upload(store: RunStore, folder: Path) -> None:
    store.upload(BUCKET, KEY, folder / "new")


def create(store: RunStore, folder: Path) -> None:
    store.create(BUCKET, KEY, NEW)


def write(store: RunStore, folder: Path) -> None:
    store.write(BUCKET, KEY, NEW)


def delete(store: RunStore, folder: Path) -> None:
    store.delete(BUCKET, [KEY])


def read(store: RunStore, folder: Path) -> None:
    store.read(BUCKET, KEY)


OPERATIONS: Mapping[str, Callable[[RunStore, Path], None]] = {
    "upload": upload,
    "create": create,
    "write": write,
    "delete": delete,
    "read": read,
}


def prepared(folder: Path, *, old: bytes | None) -> FolderStore:
    """Make a folder store in ``folder`` that holds the object KEY with the content ``old``, if there is one. Write NEW
    to a file beside the store, for uploads."""
    store = FolderStore.at(folder / "store", budget_seconds=0)
    store.folder.mkdir(parents=True)
    (folder / "new").write_bytes(NEW)
    if old is not None:
        store.write(BUCKET, KEY, old)
    return store


def content(store: RunStore) -> str:
    """Return which of the two contents the object KEY has."""
    return {None: "none", OLD: "old", NEW: "new"}.get(store.read(BUCKET, KEY), "damaged")


def unfinished(folder: Path) -> int:
    """Return the number of files that were begun and not finished."""
    return sum(1 for path in folder.rglob("*") if path.name.startswith(PARTIAL))


def kills(folder: Path, operation: str, *, old: bytes | None) -> list[dict[str, Any]]:
    """Kill the operation at its first system call, at its second, and so on, until it runs to its end. Return what each
    of them left."""
    found = []
    for number in itertools.count():
        store = prepared(folder / str(number), old=old)
        work = partial(OPERATIONS[operation], store, folder / str(number))
        is_killed = traced(work, kill_at=number).is_killed
        after = {
            "killed": is_killed,
            "content": content(store),
            "sizes": [entry.bytes for entry in store.list_objects(BUCKET, "")],
            "left": unfinished(store.folder),
        }
        aborted = store.abort_multipart_uploads(BUCKET, "runs/job/")
        after |= {"aborted": len(aborted), "left_then": unfinished(store.folder), "content_then": content(store)}
        work()
        found.append(after | {"content_at_last": content(store)})
        if not is_killed:
            return found
    raise AssertionError("the loop does not end by itself")


class Waited(Exception):  # noqa: N818  (what happened, and no error)
    """A failed request is about to be repeated."""


def wait(seconds: float) -> None:
    """Take the place of the pause before a request is repeated."""
    raise Waited


def refused(folder: Path, operation: str, call: str, error: str, *, old: bytes | None) -> dict[str, Any]:
    """Let the kernel refuse a system call. Return the sentences about that, whether the operation would be tried again,
    at once and in the background, and the names of all files that are there then."""
    store = prepared(folder, old=old)
    heard: list[str] = []
    patient = FolderStore(store.folder, Retries(store.endpoint, 60, on_attempt=heard.append, wait=wait))
    refuse(call, getattr(errno, error))
    repeated = []
    for tried in (patient, patient.for_background(60, heard.append)):
        try:
            OPERATIONS[operation](tried, folder)
        except OutsideFailure as failure:
            heard.append(str(failure))
            repeated.append(False)
        except Waited:
            repeated.append(True)
    names = [name for _, _, names in os.walk(store.folder) for name in names]
    return {"heard": heard, "repeated": repeated, "names": names}


def opened(store: str) -> RunStore:
    """Return the store that an argument of the program names."""
    endpoint, _, credentials = store.partition(" ")
    return Store(endpoint, "us-east-1", Path(credentials)) if credentials else FolderStore.at(Path(store))


def create_all(store: RunStore, number: int) -> list[str]:
    """Create the objects RACED in an order of one's own, and return the keys of those that were created."""
    keys = random.Random(number).sample(RACED, len(RACED))
    return [key for key in keys if store.create(BUCKET, key, f"by process {number}".encode())]


def use_own(store: RunStore, number: int) -> list[str]:
    """Write and delete one's own objects in folders that all processes share, and return where the store did not hold
    what was written last. Sometimes the unfinished uploads of all processes are removed."""
    rng, held, wrong = random.Random(number), dict[str, bytes](), []
    file = Path(os.devnull)
    for step in range(STEPS):
        key = f"shared/{rng.choice('abc')}/{number}-{rng.randrange(3)}"
        data = f"{number} {step} ".encode() * rng.choice([0, 1, 5000])
        action = rng.choice(["write", "create", "delete", "delete", "upload", "list", "abort"])
        if action == "write":
            store.write(BUCKET, key, data)
            held[key] = data
        elif action == "create":
            if store.create(BUCKET, key, data) != (held.setdefault(key, data) == data):
                wrong.append(f"{step}: create {key}")
        elif action == "delete":
            store.delete(BUCKET, [key])
            held.pop(key, None)
        elif action == "upload":
            store.upload(BUCKET, key, file)
            held[key] = b""
        elif action == "list":
            found = {entry.key: entry.bytes for entry in store.list_objects(BUCKET, "shared/")}
            if {name: size for name, size in found.items() if f"/{number}-" in name} != {
                name: len(content) for name, content in held.items()
            }:
                wrong.append(f"{step}: list")
        else:
            store.abort_multipart_uploads(BUCKET, "shared/")
        if store.read(BUCKET, key) != held.get(key):
            wrong.append(f"{step}: {action} {key}")
    return wrong


def main(mode: str, where: str, *arguments: str) -> object:
    """Do what the command line says, and return what is printed."""
    if mode in ("create", "own"):
        store, number = opened(where), int(arguments[0])
        print("ready", flush=True)
        sys.stdin.read()
        return create_all(store, number) if mode == "create" else use_own(store, number)
    operation, *rest = arguments
    old = None if operation == "create" else OLD
    if mode == "kills":
        return kills(Path(where), operation, old=old)
    if mode == "refused":
        call, error = rest
        return refused(Path(where), operation, call, error, old=old)
    store = prepared(Path(where), old=old)
    return traced(partial(OPERATIONS[operation], store, Path(where))).calls


if __name__ == "__main__":
    # The kernel may refuse `write` by now, but not `writev`.
    os.writev(sys.stdout.fileno(), [json.dumps(main(*sys.argv[1:])).encode()])
