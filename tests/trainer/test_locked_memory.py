"""A worker can lock more memory than its limit where the container has the capability IPC_LOCK and the file of the
interpreter carries it. The mark on the file keeps no other pod from starting.

The processes are started as a container runtime starts those of a pod: as another user than root, with no privileges to
gain, and with a bounding set that has the capability or is empty.
"""

from __future__ import annotations

import os
import resource
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from finetune_trainer.ranks.locked_memory import CAP_IPC_LOCK, lock_all_memory

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can start processes of other users")
BIT = 1 << CAP_IPC_LOCK
MARK = struct.pack("<IIIII", 0x02000000, BIT, 0, 0, 0)
"""A file capability of version 2 that is permitted and not effective, as `setcap cap_ipc_lock=p` writes it."""
BECOME_USER = """
import ctypes, os, resource, sys

libc = ctypes.CDLL(None)
permitted = int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_MEMLOCK, (1 << 16, 1 << 17))
for number in range(64):
    if not permitted >> number & 1:
        libc.prctl(24, number, 0, 0, 0)  # PR_CAPBSET_DROP
assert libc.prctl(8, 1, 0, 0, 0) == 0  # PR_SET_KEEPCAPS
os.setgroups([])
os.setgid(65532)
os.setuid(65532)
words = (ctypes.c_uint32 * 6)(0, permitted, 0, 0, 0, 0)
assert libc.capset((ctypes.c_uint32 * 2)(0x20080522, 0), words) == 0
assert libc.prctl(38, 1, 0, 0, 0) == 0  # PR_SET_NO_NEW_PRIVS
"""
SHOW_STATUS = "os.execv(sys.argv[2], [sys.argv[2], '/proc/self/status'])"
LOCK = """
buffer = ctypes.create_string_buffer(1 << 22)
before = libc.mlock(buffer, 1 << 22)
print(before, lock_all_memory(), libc.mlock(buffer, 1 << 22), *resource.getrlimit(resource.RLIMIT_MEMLOCK))
"""


def run(program: str, *arguments: str) -> str:
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def folder() -> Iterator[Path]:
    """Yield a folder that every user can enter, if the folder for temporary files is one."""
    with tempfile.TemporaryDirectory() as path:
        Path(path).chmod(0o711)
        yield Path(path)


@needs_root
@pytest.mark.parametrize(
    ("marked", "allowed", "permitted"), [(True, True, BIT), (True, False, 0), (False, True, 0), (False, False, 0)]
)
def test_the_kernel_permits_the_capability_where_container_and_file_have_it(
    folder: Path, marked: bool, allowed: bool, permitted: int
) -> None:
    program = folder / "cat"
    shutil.copyfile("/bin/cat", program)
    program.chmod(0o755)
    if marked:
        try:
            os.setxattr(program, "security.capability", MARK)
        except OSError as error:
            pytest.skip(f"a file can't carry a capability here: {error}")
    text = run(BECOME_USER + SHOW_STATUS, str(BIT if allowed else 0), str(program))
    sets = dict(line.split(":\t", 1) for line in text.splitlines() if line.startswith("Cap"))
    assert (int(sets["CapPrm"], 16), int(sets["CapEff"], 16)) == (permitted, 0)


@needs_root
@pytest.mark.parametrize(("permitted", "printed"), [(BIT, "-1 True 0 131072 131072"), (0, "-1 False -1 131072 131072")])
def test_a_process_that_is_permitted_locks_any_amount_of_memory(permitted: int, printed: str) -> None:
    imports = "from finetune_trainer.ranks.locked_memory import lock_all_memory\n"
    assert run(imports + BECOME_USER + LOCK, str(permitted)).strip() == printed


def test_the_limit_is_raised_to_what_the_process_may_have() -> None:
    before = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    try:
        lock_all_memory()
        assert resource.getrlimit(resource.RLIMIT_MEMLOCK) == (before[1], before[1])
    finally:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, before)
