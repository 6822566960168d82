"""The process that holds the namespaces of a second node. It makes the node's mounts, connects the node to the
cluster's network, and then waits until it is killed.

`second_node.py` starts this process inside the cluster's namespaces as ``unshare --net --mount -- python -m
tests.cluster.join STATE_FOLDER``.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from tests.cluster.init import mounts, run
from tests.cluster.layout import (
    BRIDGE,
    HOST_ADDRESS,
    POD_PREFIX_LENGTH,
    SECOND_NODE,
    SECOND_NODE_LINK,
    SERVICE_NETWORK,
    Layout,
)

CABLE_END = "uplink"


def main() -> None:
    layout = Layout(Path(sys.argv[1])).second_node
    leave_the_first_node()
    mounts(layout)
    network()
    layout.namespaces_ready.touch()
    while True:
        signal.pause()


def leave_the_first_node() -> None:
    """Unmount what the first node mounted over /var/lib, /var/log and /run, and the mounts of its pods below these
    folders. At its start the second node has all these mounts, because its mount namespace is a copy of the first
    node's mount namespace."""
    for place in ("/var/lib", "/var/log", "/run"):
        run("umount", "--recursive", "--lazy", place)


def network() -> None:
    """Connect the second node to the first node's bridge by a veth pair. On the second node, add a route to the
    cluster IPs of Services. On the first node, add a route to the second node's pods."""
    # Prefix of the commands that run in the first node's network namespace, which is the network namespace of the
    # process with PID 1.
    first_node = ("nsenter", "--net=/proc/1/ns/net", "--")
    cable = ("link", "add", SECOND_NODE_LINK, "type", "veth", "peer", "name", CABLE_END, "netns", str(os.getpid()))
    run(*first_node, "ip", *cable)
    run(*first_node, "ip", "link", "set", SECOND_NODE_LINK, "master", BRIDGE, "up")
    run("ip", "link", "set", "lo", "up")
    run("ip", "address", "add", f"{SECOND_NODE.address}/{POD_PREFIX_LENGTH}", "dev", CABLE_END)
    run("ip", "link", "set", CABLE_END, "up")
    run("ip", "route", "add", SERVICE_NETWORK, "via", HOST_ADDRESS)
    # `replace` instead of `add`, because the route of an earlier second node may still exist.
    run(*first_node, "ip", "route", "replace", SECOND_NODE.pod_network, "via", SECOND_NODE.address)
    Path("/proc/sys/net/ipv4/ip_forward").write_text("1")


if __name__ == "__main__":
    main()
