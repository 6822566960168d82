"""A cluster leaves nothing on the machine, no matter how its owner, the process that started the cluster, ends. Two
clusters that run at the same time do not affect each other."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cluster import Cluster, ClusterError, cgroups, unusable_because, wait_for
from tests.cluster.layout import SECOND_NODE
from tests.cluster.namespaces import children
from tests.cluster.oci import BUSYBOX_IMAGE

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(unusable_because() is not None, reason=str(unusable_because())),
]

REPOSITORY = Path(__file__).resolve().parents[2]
OWNER = f"""
import json, sys
from pathlib import Path
import signal
from tests.cluster import Cluster
# Where the tests run in the background, a shell has switched it off.
signal.signal(signal.SIGINT, signal.default_int_handler)
with Cluster.start(Path(sys.argv[1]), verbose=False) as cluster:
    for node in sys.argv[2:]:
        cluster.second_node()
        affinity = {{"spec": {{"nodeName": node}}}}
        overrides = f"--overrides={{json.dumps(affinity)}}"
        cluster.kubectl("run", "far", "--image={BUSYBOX_IMAGE}", overrides, "--", "sleep", "2000")
        cluster.kubectl("wait", "--for=condition=Ready", "pod/far", "--timeout=60s")
    cluster.kubectl("run", "sleeper", "--image={BUSYBOX_IMAGE}", "--", "sleep", "1000")
    cluster.kubectl("wait", "--for=condition=Ready", "pod/sleeper", "--timeout=30s")
    print("running", cluster._watcher.pid, flush=True)
    sys.stdin.read()
"""


@dataclass(frozen=True)
class Machine:
    """The mounts and network interfaces of the machine. They must be the same before and after a cluster."""

    mounts: list[str]
    interfaces: list[str]

    @staticmethod
    def now(own: Path) -> Machine:
        """Return the present mounts and interfaces. Mounts in the temporary folders of tests are left out unless they
        are below ``own``, because other tests may create and remove them at the same time."""
        lines = [line.split(" ", 1)[1] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
        mounts = [line for line in lines if "/pytest-of-" not in line or str(own) in line]
        return Machine(sorted(mounts), sorted(path.name for path in Path("/sys/class/net").iterdir()))


def network_namespaces(processes: list[int]) -> set[str]:
    """Return the network namespaces of ``processes``, as the kernel names them. Processes that have ended or may not be
    inspected are left out."""
    found = set()
    for pid in processes:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
            found.add(str(Path(f"/proc/{pid}/ns/net").readlink()))
    return found


@dataclass
class Owner:
    """A process that has started a cluster, and the processes of that cluster."""

    process: subprocess.Popen[str]
    state: Path
    processes: list[int]
    networks: set[str]
    everyone: list[int]
    """The ids of all processes that the machine had while the cluster ran. After the cluster's end, the test checks
    only these processes for network namespaces of the cluster. A later process could have a namespace with the same
    number, because the kernel reuses the number of a removed namespace at once."""

    def assert_nothing_is_left(self, before: Machine) -> None:
        wait_for("every process to end", lambda: not any(Path(f"/proc/{pid}").exists() for pid in self.processes), 30)
        wait_for("the state folder to go", lambda: not self.state.exists(), 30)
        assert cgroups.existing(self.state.name) == []
        assert Machine.now(self.state.parent) == before
        assert not network_namespaces(self.everyone) & self.networks


@contextlib.contextmanager
def owner(state: Path, *nodes: str) -> Iterator[Owner]:
    process = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(state), *nodes],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    try:
        word, watcher = process.stdout.readline().split()
        assert word == "running"
        processes = descendants(int(watcher))
        outside = network_namespaces([os.getpid()])
        everyone = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
        yield Owner(process, state, processes, network_namespaces(processes) - outside, everyone)
    finally:
        process.kill()
        process.communicate()


def descendants(pid: int) -> list[int]:
    found = [pid]
    for child in children(pid):
        found += descendants(child)
    return found


def test_an_owner_killed_by_9_leaves_nothing_behind_of_two_nodes(tmp_path: Path) -> None:
    before = Machine.now(tmp_path)
    with owner(tmp_path / "killed", SECOND_NODE.name) as owned:
        commands = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in owned.processes]
        for seconds in (b"1000", b"2000"):
            assert any(b"sleep\0" + seconds in command for command in commands), "the pods' processes are some of them"
        assert len(owned.networks) == 4, "of two nodes and two pods"
        assert cgroups.existing("killed")
        owned.process.kill()
        owned.process.wait()
        owned.assert_nothing_is_left(before)


def test_ctrl_c_leaves_nothing_behind(tmp_path: Path) -> None:
    before = Machine.now(tmp_path)
    with owner(tmp_path / "interrupted") as owned:
        # SIGINT goes to the whole process group, as Ctrl-C in a terminal sends it.
        os.killpg(owned.process.pid, signal.SIGINT)
        owned.process.wait(timeout=60)
        owned.assert_nothing_is_left(before)


def test_a_start_that_fails_leaves_nothing_behind_and_shows_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = Machine.now(tmp_path)
    monkeypatch.setenv("FINETUNE_TOOL_ETCD", "/bin/false")
    with pytest.raises(ClusterError, match="the end of"):
        Cluster.start(tmp_path / "broken", verbose=False)
    assert Machine.now(tmp_path) == before
    assert not (tmp_path / "broken").exists()
    assert cgroups.existing("broken") == []


def test_two_clusters_at_once_do_not_meet(tmp_path: Path) -> None:
    with Cluster.start(tmp_path / "one", verbose=False) as one, Cluster.start(tmp_path / "two", verbose=False) as two:
        one.kubectl("create", "namespace", "only-here")
        assert "only-here" not in [item["metadata"]["name"] for item in two.get("namespaces")["items"]]


def test_logs_are_kept_where_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINETUNE_KEEP_LOGS", str(tmp_path / "kept"))
    with Cluster.start(tmp_path / "logged", verbose=False) as cluster:
        manifest = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "something"}}
        cluster.kubectl("apply", "-f", "-", stdin=json.dumps(manifest))
    (kept,) = (tmp_path / "kept").iterdir()
    assert "Serving securely" in (kept / "logs" / "api-server.log").read_text()
