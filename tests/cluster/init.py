"""The first process inside a cluster's namespaces (PID 1). It configures network and mounts, and then reaps orphaned
processes until it is killed.

`watcher.py` starts this process under ``unshare`` as ``python -m tests.cluster.init STATE_FOLDER``. All changes that
the process makes are inside the cluster's namespaces and disappear together with them.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.cluster.layout import (
    BRIDGE,
    BRIDGE_MAC,
    DNS_ADDRESS,
    HOST_ADDRESS,
    POD_PREFIX_LENGTH,
    SERVICE_ADDRESS,
    SERVICE_NETWORK,
    Layout,
)


def main() -> None:
    layout = Layout(Path(sys.argv[1]))
    mounts(layout)
    network()
    layout.namespaces_ready.touch()
    collect_orphans()


def network() -> None:
    """Configure the loopback interface and the bridge to which pods are connected. No route leads out of the network
    namespace."""
    run("ip", "link", "set", "lo", "up")
    # The cluster runs no kube-proxy, which would forward connections from the cluster IP of a Service to its pods. So
    # the API server and CoreDNS listen on the cluster IPs of their Services themselves. To make this possible, these
    # cluster IPs become addresses of the loopback interface.
    for address in (SERVICE_ADDRESS, DNS_ADDRESS):
        run("ip", "address", "add", f"{address}/32", "dev", "lo")
    # The bridge gets a fixed MAC address. Without this setting it would use the lowest MAC address of its ports, which
    # changes when pods start and end. After each change, pods would send to the old address for half a minute, until
    # their neighbour caches expire.
    run("ip", "link", "add", BRIDGE, "address", BRIDGE_MAC, "type", "bridge")
    run("ip", "address", "add", f"{HOST_ADDRESS}/{POD_PREFIX_LENGTH}", "dev", BRIDGE)
    run("ip", "link", "set", BRIDGE, "up")
    # Because of this route, a connection to the cluster IP of any other Service fails at once instead of timing out.
    run("ip", "route", "add", "blackhole", SERVICE_NETWORK)
    Path("/proc/sys/net/ipv4/ip_forward").write_text("1")


def mounts(layout: Layout) -> None:
    """Mount folders of the cluster over the machine's /var/lib and /var/log, and a new tmpfs over /run, because the
    kubelet and containerd write to all three. Mount a resolv.conf that names CoreDNS over the machine's resolv.conf."""
    # /etc/resolv.conf may be a link into /run. The link is resolved here, before the mount over /run hides its target.
    resolver = Path("/etc/resolv.conf").resolve()
    for own, place in ((layout.var_lib, "/var/lib"), (layout.var_log, "/var/log")):
        own.mkdir(exist_ok=True)
        run("mount", "--bind", str(own), place)
    run("mount", "-t", "tmpfs", "tmpfs", "/run")
    layout.resolver.write_text(f"nameserver {DNS_ADDRESS}\nsearch svc.cluster.local cluster.local\noptions ndots:5\n")
    resolver.parent.mkdir(parents=True, exist_ok=True)
    resolver.touch()
    run("mount", "--bind", str(layout.resolver), str(resolver))


def collect_orphans() -> None:
    """Reap processes whose parent processes have ended. The function never returns."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    while True:
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            pass  # This process has no child process at the moment.
        signal.sigtimedwait({signal.SIGCHLD}, 1)


def run(*argv: str) -> None:
    """Run a program. If it fails, print its error output and end this process."""
    done = subprocess.run(argv, text=True, capture_output=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(argv)}: {done.stderr.strip()}")


if __name__ == "__main__":
    main()
