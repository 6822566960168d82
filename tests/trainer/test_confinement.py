"""The trainer works in a restricted pod, and compiles nothing even where a compiler is at hand. When the kernel kills a
worker for lack of memory, the result of the pod says so.

The restricted pod has a read-only root file system, a user id without name, capabilities or home directory, and no
compiler. The tests have no container, but create the namespaces and cgroups that a container would have, so they need
root.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune_core.contract import Outcome
from tests.cluster import cgroups
from tests.trainer import tiny
from tests.trainer.conftest import StartPods
from tests.trainer.objectstore import ACCESS_KEY, BUCKET, SECRET_KEY, ObjectStore, write_credentials
from tests.trainer.pods import run_config

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(os.geteuid() != 0, reason="namespaces and cgroups of its own need root"),
]

REPOSITORY = Path(__file__).parents[2]
USER = "65532"
"""The user id with which the trainer image runs. The id has no entry in /etc/passwd."""
SYSTEM_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
CONFINE = """
PATH=/usr/sbin:/usr/bin:/sbin:/bin
repository=$1 packages=$2 folder=$3 user=$4 base=$5 python=$6; shift 7
mount -t tmpfs -o mode=755 tmpfs /srv
mkdir /srv/repository /srv/base
mount --bind "$repository" /srv/repository
mount --bind "$base" /srv/base
chown -R "$user:$user" "$folder"
mount --bind "$folder" "$folder"
cut -d' ' -f5 /proc/self/mountinfo | while read -r place; do
  case $place in
    /proc*|/sys*|/dev*|"$folder") ;;
    *) mount -o remount,bind,ro "$place" ;;
  esac
done
cd /
setpriv=$(command -v setpriv)
export PATH=/nonexistent HOME= PYTHONDONTWRITEBYTECODE=1 LD_LIBRARY_PATH=/srv/base/lib
export PYTHONPATH="/srv/repository/core:/srv/repository/trainer_image:/srv/repository/$packages"
exec "$setpriv" --reuid "$user" --regid "$user" --clear-groups --bounding-set=-all --inh-caps=-all --no-new-privs \\
  "/srv/base/bin/$python" "$@"
"""
"""Shell script that confines its own process and then becomes Python.

The arguments of the script are: the repository, the folder of Python packages in it, the only writable folder, the user
id, Python's installation prefix, and the name of the Python binary. The seventh argument is the Python that the
launcher's command line names. The script drops the seventh argument and runs the same Python from a mount that any user
can read, with all further arguments.
"""


def unshared(script: str, *arguments: str) -> list[str]:
    """Return the command line that runs ``script`` in a mount namespace of its own."""
    unshare = shutil.which("unshare", path=SYSTEM_PATH)
    assert unshare is not None
    return [unshare, "--mount", "--propagation", "private", "/bin/sh", "-euc", script, "confine", *arguments]


@pytest.fixture
def anywhere() -> Iterator[Path]:
    """A temporary folder that every user can enter, which pytest's `tmp_path` does not allow."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def everything(store: ObjectStore, name: str, **changes: Any) -> dict[str, Any]:
    """Return the run file of a short job in one process with all features for which DeepSpeed would compile code:
    ZeRO-3, and the offload of optimizer and parameters."""
    options = {
        "world__nodes": 1,
        "method": "Full",
        "optimization__zeroStage": 3,
        "optimization__offloadOptimizer": True,
        "optimization__offloadParameters": True,
        "optimization__precision": "bf16",
    }
    return run_config(store, name, **(options | changes))


def status_of(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def test_it_trains_with_a_read_only_root_no_home_no_compiler_and_an_unknown_user(
    store: ObjectStore, pods: StartPods, anywhere: Path
) -> None:
    credentials = anywhere / "credentials"
    write_credentials(credentials, ACCESS_KEY, SECRET_KEY)
    python = f"python{sys.version_info.major}.{sys.version_info.minor}"
    packages = Path(sysconfig.get_path("purelib")).relative_to(REPOSITORY)
    places = [str(REPOSITORY), str(packages), str(anywhere), USER, sys.base_prefix, python]
    attempt = pods(
        everything(store, "confined", optimization__maxSteps=40),
        folder=anywhere / "attempt",
        credentials=credentials,
        wrapper=tuple(unshared(CONFINE, *places)),
    )
    (pod,) = attempt.pods
    attempt.wait_for(lambda: "step 2/" in attempt.output, "the second step")
    for pid in (pod.process.pid, *pod.workers()):
        status = status_of(pid)
        assert status["Uid"].split() == [USER] * 4
        assert status["Groups"] == ""
        assert (status["NoNewPrivs"], int(status["CapEff"], 16), int(status["CapBnd"], 16)) == ("1", 0, 0)
        mounts = [line.split() for line in Path(f"/proc/{pid}/mountinfo").read_text().splitlines()]
        writable = {mount[4] for mount in mounts if "rw" in mount[5].split(",")}
        assert {place for place in writable if not place.startswith(("/proc", "/sys", "/dev"))} == {str(anywhere)}
    assert attempt.wait() == [0], attempt.output
    assert pod.result.outcome is Outcome.COMPLETED
    assert json.loads(store.read("runs/default/confined/uid-1/ARTIFACT"))["step"] == 40


@pytest.mark.parametrize("method", ["LoRA", "Full"])
def test_nothing_is_compiled_where_a_compiler_is_at_hand(
    method: str, store: ObjectStore, pods: StartPods, tmp_path: Path
) -> None:
    """Programs that pretend to be compilers are on PATH, and record their calls.

    DeepSpeed would call these programs to compile its shared-memory operator and its CPU optimizer, but the trainer
    must prevent this.
    """
    trace, programs = tmp_path / "compiled", tmp_path / "programs"
    programs.mkdir()
    for name in ("cc", "c++", "gcc", "g++", "clang", "clang++", "ninja", "nvcc", "make", "ld"):
        (programs / name).write_text(f'#!/bin/sh\necho "$0" "$@" >> {trace}\nexit 1\n')
        (programs / name).chmod(0o755)
    config = everything(store, f"compiler-{method.lower()}", method=method)
    path = f"{programs}:{SYSTEM_PATH}"
    attempt = pods(config, variables={"PATH": path, "CC": str(programs / "cc"), "CXX": str(programs / "c++")})
    assert attempt.wait() == [0], attempt.output
    calls = trace.read_text().splitlines() if trace.exists() else []
    # A linker call with `-t` is no compilation: Python itself makes such calls to find libraries
    # (ctypes.util.find_library).
    assert [call for call in calls if "-o" in call.split() and " -t " not in call] == []


LIMIT_BYTES = 900 << 20
LIMIT = """
PATH=/usr/sbin:/usr/bin:/sbin:/bin
folder=$1 seen_at=$2; shift 2
echo $$ > "$folder/cgroup.procs"
mount --bind "$folder" "$seen_at"
export PATH=/nonexistent
exec "$@"
"""


@pytest.fixture
def limited() -> Iterator[list[str]]:
    """The beginning of a command line that runs a process in a cgroup with a memory limit of 900 MiB.

    The process sees this cgroup at the path where a container sees its own cgroup.
    """
    name = f"finetune-memory-{os.getpid()}"
    cgroups.create(name)
    try:
        folders = {folder.parent.name: folder for folder in cgroups.existing(name)}
        if "memory" in folders:
            folder, seen_at = folders["memory"], "/sys/fs/cgroup/memory"
            (folder / "memory.limit_in_bytes").write_text(str(LIMIT_BYTES))
        else:
            folder, seen_at = Path("/sys/fs/cgroup") / name, "/sys/fs/cgroup"
            (folder / "memory.max").write_text(str(LIMIT_BYTES))
        yield unshared(LIMIT, str(folder), seen_at)
    finally:
        cgroups.remove(name)


def test_a_kill_by_the_kernel_is_told_with_phase_amount_and_remedy(
    store: ObjectStore, pods: StartPods, limited: list[str], tmp_path: Path
) -> None:
    """Loading the model stays below the memory limit, but the activations of 12,000 tokens exceed it."""
    shape: dict[str, Any] = {
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": 4,
        "max_position_embeddings": 1100,
    }
    store.upload("models/wide", tiny.write_model(tmp_path / "wide", **shape))
    long = " ".join(tiny.WORDS[index % 60] for index in range(980))
    long_rows = tmp_path / "long"
    long_rows.mkdir()
    rows = tiny.write_jsonl(long_rows / "long.jsonl", [{"question": f"w{n}", "reply": long} for n in range(12)])
    store.upload("long", rows.parent)
    config = run_config(
        store,
        "killed-for-memory",
        world__nodes=1,
        model={"s3": {"uri": f"s3://{BUCKET}/models/wide"}},
        dataset__train={"s3": {"uri": f"s3://{BUCKET}/long/long.jsonl"}},
        dataset__validation=None,
        dataset__maxLength=1024,
        optimization__globalBatchSize=12,
        optimization__microBatchSize=12,
    )
    attempt = pods(config, wrapper=tuple(limited))
    assert attempt.wait() == [66], attempt.output
    result = attempt.pods[0].result
    print(result.message)
    assert result.outcome is Outcome.OUT_OF_MEMORY
    assert result.message == (
        "out of memory: rank 0 was killed in phase Training because the pod reached its memory limit of 0.88 GiB:"
        " raise resources.memory, or lower training.microBatchSize or dataset.maxLength"
    )
