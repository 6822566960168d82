"""The watcher: a process that creates the namespaces of a cluster, and that removes the cluster at the request of
its owner, or after the owner or the cluster's first process has ended. The owner is the process that called
``Cluster.start``.

``Cluster`` starts the watcher as ``python -m tests.cluster.watcher STATE_FOLDER CGROUP OWNER_PID`` in a session of its
own, so that neither Ctrl-C nor a closed terminal reaches it. The watcher's standard input is a pipe that only the owner
holds open. When the pipe closes, the watcher removes the cluster, no matter whether the owner closed the pipe or was
killed by ``kill -9``. If the watcher itself is killed, the kernel kills the cluster's processes, and only the state
folder and empty cgroup folders stay.

While the watcher removes the cluster, it writes lines about its progress to standard output, which the owner reads.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from tests.cluster import cgroups
from tests.cluster.layout import Layout
from tests.cluster.namespaces import children, die_with_parent
from tests.cluster.waiting import TELLING_SECONDS, ClusterError, wait_for, wait_while_it_moves

KEEP_LOGS_VARIABLE = "FINETUNE_KEEP_LOGS"
QUIET_SECONDS = 60
"""The watcher gives up removing the cluster after this many seconds without any progress."""
RETRY_SECONDS = 0.2


def main() -> None:
    layout, cgroup, owner = Layout(Path(sys.argv[1])), sys.argv[2], int(sys.argv[3])
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    process = None
    try:
        cgroups.create(cgroup)
        process = start_namespaces(layout)
        wait_for_the_end(owner, process)
    finally:
        if process is not None:
            end_namespaces(process, cgroup)
        keep_logs(layout)
        cgroups.remove(cgroup)
        remove_state(layout)


def start_namespaces(layout: Layout) -> subprocess.Popen[bytes]:
    """Start the cluster's first process in new namespaces, and write its process id to the file `Layout.init_pid`."""
    watcher = os.getpid()

    def end_with_the_watcher() -> None:
        for default in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(default, signal.SIG_DFL)
        die_with_parent(signal.SIGKILL)
        if os.getppid() != watcher:
            os.kill(os.getpid(), signal.SIGKILL)

    with (layout.logs / "init.log").open("ab") as log:
        process = subprocess.Popen(
            [
                *("unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "--"),
                *(sys.executable, "-m", "tests.cluster.init", str(layout.state)),
            ],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            preexec_fn=end_with_the_watcher,
        )
    try:
        first = wait_for("unshare to start the first process", lambda: children(process.pid) or process.poll(), 10)
        if isinstance(first, list):
            unfinished = layout.init_pid.with_suffix(".new")
            unfinished.write_text(str(first[0]))
            unfinished.rename(layout.init_pid)
    except BaseException:
        process.kill()
        raise
    return process


def wait_for_the_end(owner: int, process: subprocess.Popen[bytes]) -> None:
    """Wait until the owner closes the pipe or ends, or until the cluster's first process ends."""
    poll = select.poll()
    poll.register(sys.stdin.fileno(), select.POLLIN | select.POLLHUP)
    try:
        poll.register(os.pidfd_open(owner), select.POLLIN)
    except ProcessLookupError:
        return
    poll.register(os.pidfd_open(process.pid), select.POLLIN)
    poll.poll()


def tell(line: str) -> None:
    """Write a line about the progress to the pipe that the owner reads. If the owner has ended, the line is lost, and
    the removal of the cluster continues."""
    with contextlib.suppress(BrokenPipeError):
        os.write(sys.stdout.fileno(), f"{line}\n".encode())


def end_namespaces(process: subprocess.Popen[bytes], cgroup: str) -> None:
    """Kill the cluster's first process and wait for its end. The kernel then kills all other processes of the PID
    namespace, and the first process ends last."""
    for first in children(process.pid):
        os.kill(first, signal.SIGKILL)
    wait_while_it_moves(
        "the processes to end",
        lambda: process.poll() is not None,
        lambda: f"{len(cgroups.processes(cgroup))} processes are left",
        QUIET_SECONDS,
        tell=tell,
    )


def keep_logs(layout: Layout) -> None:
    """Copy the logs of the cluster's programs and pods into the folder that the environment variable FINETUNE_KEEP_LOGS
    names. If the variable is not set, do nothing."""
    wanted = os.environ.get(KEEP_LOGS_VARIABLE)
    if not wanted:
        return
    kept = Path(wanted) / f"{time.strftime('%Y%m%dT%H%M%S')}-{layout.state.name}"
    shutil.copytree(layout.logs, kept / "logs")
    for node, folder in ((layout, "pods"), (layout.second_node, "pods-of-the-second-node")):
        if (node.var_log / "pods").exists():
            shutil.copytree(node.var_log / "pods", kept / folder, symlinks=True)


def remove_state(layout: Layout) -> None:
    """Remove the state folder. Removing is tried until it succeeds, because mounts of the ended namespaces may keep
    entries of the folder busy for a moment.

    Raises:
        ClusterError: no entry could be removed for ``QUIET_SECONDS``.
    """
    removed, moved, told = 0, time.monotonic(), time.monotonic()
    while layout.state.exists():
        problem: OSError | None = None
        for entry in bottom_up(layout.state):
            try:
                remove(entry)
            except OSError as error:
                problem = error
                continue
            removed, moved = removed + 1, time.monotonic()
            if moved - told >= TELLING_SECONDS:
                tell(f"{removed} files and folders of the cluster are removed")
                told = moved
        if problem and time.monotonic() - moved >= QUIET_SECONDS:
            raise ClusterError(f"{layout.state} is left, and nothing of it could be removed: {problem}")
        if problem:
            # The kernel does not report when it releases a mount, so removing is tried again after a pause.
            time.sleep(RETRY_SECONDS)


def bottom_up(folder: Path) -> Iterator[Path]:
    """Yield everything in ``folder``, the content of a folder before the folder itself, and ``folder`` last. Symbolic
    links are not followed."""
    for root, folders, files in os.walk(folder, topdown=False):
        for name in (*files, *folders):
            yield Path(root, name)
    yield folder


def remove(entry: Path) -> None:
    """Remove a file, a symbolic link or an empty folder. An entry that is gone already is no error."""
    with contextlib.suppress(FileNotFoundError):
        if entry.is_dir() and not entry.is_symlink():
            entry.rmdir()
        else:
            entry.unlink()


if __name__ == "__main__":
    try:
        main()
    except ClusterError as error:
        sys.exit(str(error))
