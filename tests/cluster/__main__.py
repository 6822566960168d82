"""The command line of the test cluster: ``python -m tests.cluster build|prepare|up|down|status|images``.

The Makefile uses it: `make test` runs `prepare`, `make cluster` runs `up`, and `make images` runs `images`.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import threading
import time
from functools import partial
from pathlib import Path

from tests.cluster import clients, images, packages, tools
from tests.cluster.cluster import Cluster, unusable_because
from tests.cluster.layout import Layout
from tests.cluster.progress import say
from tests.cluster.waiting import ClusterError, wait_while_it_moves
from tests.cluster.watcher import bottom_up

EXAMPLES = """examples:
  python -m tests.cluster build            build and install all that is missing (about ten minutes the first time)
  python -m tests.cluster up               start a cluster and keep it up until Ctrl-C (--nodes 2: with two nodes)
  python -m tests.cluster images           build the images of operator and trainer, print their names inside a cluster
  python -m tests.cluster status           list the clusters that `up` keeps up
  python -m tests.cluster down             end them

  # in another terminal, with the path that `up` printed:
  /tmp/finetune-cluster-x1y2z3/enter kubectl get pods --all-namespaces
"""

STATE_PREFIX = "finetune-cluster-"
DOWN_QUIET_SECONDS = 60
"""`down` gives up when removing a cluster has made no progress for this many seconds."""


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.cluster",
        description="A real Kubernetes cluster on one machine, in namespaces of its own.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("build", help="build and install all that is missing, start nothing")
    starting = commands.add_parser("up", help="start a cluster and keep it up until Ctrl-C")
    starting.add_argument("--nodes", type=int, choices=(1, 2), default=1, help="how many nodes it has (1)")
    commands.add_parser("down", help="end every cluster that `up` keeps up")
    commands.add_parser("prepare", help="make all that the tests can use here: without root, what needs no cluster")
    commands.add_parser("images", help="build the project's images and put them into the clusters' registry")
    commands.add_parser("status", help="list the clusters that are up")
    arguments = parser.parse_args()
    try:
        if arguments.command == "up":
            up(arguments.nodes)
        else:
            COMMANDS[arguments.command]()
    except ClusterError as error:
        sys.exit(f"error: {error}")


def build() -> None:
    packages.install(packages.NODE_PACKAGES)
    packages.unpack()
    tools.build_missing()
    clients.clients()
    say("everything is there")


def prepare() -> None:
    """Build and install all that the tests need. On a machine that can't run a cluster, print the reason, build the
    cluster's programs, and find or download kubectl and helm, but install no packages and build no images."""
    reason = unusable_because()
    if reason:
        say(f"{reason}: tests that need it are skipped, the others run")
        tools.build_missing()
        clients.clients()
    else:
        build()
        build_images()


def up(nodes: int) -> None:
    # From here on SIGTERM raises KeyboardInterrupt. So SIGTERM ends the cluster also while the cluster is still
    # starting.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    started = time.monotonic()
    try:
        with Cluster.start() as cluster:
            cluster.layout.kept_up.touch()
            if nodes > 1:
                cluster.second_node(reserved=False)
            enter = cluster.layout.enter_script
            say(f"\nThe cluster is up after {time.monotonic() - started:.0f} s. In another terminal:")
            say(f"  {enter} kubectl get pods --all-namespaces")
            say(f"  {enter} helm list      {enter} bash")
            store = cluster.minio
            say(f"MinIO inside: {store.endpoint}  user {store.access_key}  password {store.secret_key}")
            say(f"registry inside: {cluster.registry}     logs: {cluster.layout.logs}")
            say("Ctrl-C ends it.")
            threading.Event().wait()
    except KeyboardInterrupt:
        say("the cluster has ended, nothing of it is left")


def build_images() -> None:
    """Build the images of the project that are missing in the registry of the clusters, and push them into the
    registry's storage. Print for each image the reference that a pod spec must contain."""
    reason = unusable_because()
    if reason:
        raise ClusterError(reason)
    for image in images.ALL:
        print(images.ensure(image), flush=True)


def status() -> None:
    reason = unusable_because()
    if reason:
        print(reason)
    for tool in tools.ALL:
        print(f"{'missing' if tool.missing else 'built':9} {tool.name}")
    for layout in running():
        kept = "up" if layout.kept_up.exists() else "in a test"
        print(f"{kept:9} {layout.enter_script} kubectl get pods --all-namespaces")


def down() -> None:
    """End every cluster that the command `up` keeps up: send SIGTERM to its owner process and wait until the cluster is
    removed. A cluster that is still starting keeps running, and so do the clusters of test runs."""
    for layout in running():
        if not layout.kept_up.exists():
            continue
        os.kill(int(layout.owner_pid.read_text()), signal.SIGTERM)
        wait_while_it_moves(
            f"removing {layout.state}",
            partial(_gone, layout.state),
            partial(_left, layout.state),
            DOWN_QUIET_SECONDS,
            tell=say,
            interval=1,
        )
        say(f"{layout.state} has ended")


def _gone(path: Path) -> bool:
    return not path.exists()


def _left(path: Path) -> str:
    return f"{sum(1 for _ in bottom_up(path))} files and folders are left"


def running() -> list[Layout]:
    """Return the `Layout` of each running cluster. The function finds only clusters with the default state folder,
    which is ``finetune-cluster-*`` in the folder for temporary files. A cluster counts as running while its owner
    process runs."""
    found = [Layout(state) for state in sorted(Path(tempfile.gettempdir()).glob(f"{STATE_PREFIX}*"))]
    return [
        layout
        for layout in found
        if layout.owner_pid.exists() and Path(f"/proc/{layout.owner_pid.read_text()}").exists()
    ]


COMMANDS = {
    "build": build,
    "down": down,
    "prepare": prepare,
    "images": build_images,
    "status": status,
}

if __name__ == "__main__":
    main()
