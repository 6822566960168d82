"""The first process inside a cluster's namespaces: it lays out network and mounts, then collects orphans until it is
killed.

Run by the watcher under ``unshare``, as ``python -m tests.cluster.init STATE_FOLDER``. Everything it changes is the
cluster's own and goes when it ends.
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
    """Lay out loopback and pod bridge; no route leads out of the namespace."""
    run("ip", "link", "set", "lo", "up")
    # The API server listens on the address of the Service "kubernetes" itself, and CoreDNS on its own: no kube-proxy.
    for address in (SERVICE_ADDRESS, DNS_ADDRESS):
        run("ip", "address", "add", f"{address}/32", "dev", "lo")
    # With an address of its own: a bridge takes the lowest of its ports' instead, which changes as pods come and go,
    # and then all pods talk to the old one until their neighbour caches expire, for half a minute.
    run("ip", "link", "add", BRIDGE, "address", BRIDGE_MAC, "type", "bridge")
    run("ip", "address", "add", f"{HOST_ADDRESS}/{POD_PREFIX_LENGTH}", "dev", BRIDGE)
    run("ip", "link", "set", BRIDGE, "up")
    # Other service addresses fail at once instead of timing out.
    run("ip", "route", "add", "blackhole", SERVICE_NETWORK)
    Path("/proc/sys/net/ipv4/ip_forward").write_text("1")


def mounts(layout: Layout) -> None:
    """Put the cluster's own folders over those of the machine that kubelet and containerd write to."""
    # Where the link leads is asked before /run, which it may lead to, disappears.
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
    """Wait for the processes whose parents have ended, for ever."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    while True:
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            pass  # nobody to wait for just now
        signal.sigtimedwait({signal.SIGCHLD}, 1)


def run(*argv: str) -> None:
    """Run a program, or end this one with what it complained about."""
    done = subprocess.run(argv, text=True, capture_output=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(argv)}: {done.stderr.strip()}")


if __name__ == "__main__":
    main()
