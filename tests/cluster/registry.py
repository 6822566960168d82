"""The image registry of the clusters. The storage of the registry is in the cache folder. A server on the loopback
address runs while images are pushed without a cluster."""

from __future__ import annotations

import contextlib
import json
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.cluster import tools
from tests.cluster.api import answers
from tests.cluster.cache import cache_folder
from tests.cluster.namespaces import Namespaces, children
from tests.cluster.waiting import ClusterError, tail, wait_for


def storage() -> Path:
    """Return the folder with all pushed images, which the registry of every cluster serves."""
    folder = cache_folder() / "registry"
    folder.mkdir(exist_ok=True)
    return folder


def has_image(name: str, tag: str) -> bool:
    """Return whether an image was pushed completely. The registry writes the file ``link`` after all other files."""
    return (storage() / f"docker/registry/v2/repositories/{name}/_manifests/tags/{tag}/current/link").exists()


def command(config: Path, address: str) -> list[str]:
    """Write the configuration file and return the command of a registry that listens on ``address``, for example
    ``"10.244.0.1:5000"``."""
    content = {
        "version": "0.1",
        "log": {"level": "warn", "accesslog": {"disabled": True}},
        "storage": {"filesystem": {"rootdirectory": str(storage())}, "delete": {"enabled": True}},
        "http": {"addr": address},
    }
    config.write_text(json.dumps(content))
    return [str(tools.REGISTRY.path()), "serve", str(config)]


@dataclass(frozen=True)
class Server:
    """A running registry in a network namespace of its own, in which port 5000 is always free."""

    namespaces: Namespaces
    address: str = "127.0.0.1:5000"

    def command(self, argv: Sequence[str]) -> list[str]:
        """Return the command that runs ``argv`` in the registry's network namespace, where no other network can be
        reached."""
        return ["nsenter", f"--net=/proc/{self.namespaces.pid}/ns/net", "--", *argv]

    def serves(self) -> bool:
        with self.namespaces.network():
            return answers(f"http://{self.address}/v2/")


@contextlib.contextmanager
def serving() -> Iterator[Server]:
    """Run a registry during the block, so that images can be pushed without a cluster.

    The address is always the same because buildah remembers by address which layers a registry has. With a new address,
    buildah would push five gigabytes of dependencies again after each change of the project's code.
    """
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "registry.log"
        serve = command(Path(folder) / "config.json", Server.address)
        script = ["sh", "-c", 'ip link set lo up && exec "$@"', "registry", *serve]
        with log.open("wb") as output:
            process = subprocess.Popen(
                ["unshare", "--net", "--fork", "--kill-child", "--", *script], stdout=output, stderr=output
            )
        try:

            def started() -> Server | None:
                if process.poll() is not None:
                    raise ClusterError(f"the registry ended with {process.returncode}\n{tail(log)}")
                for child in children(process.pid):
                    server = Server(Namespaces(child))
                    if server.serves():
                        return server
                return None

            yield wait_for("the registry", started, 20, evidence=lambda: tail(log))
        finally:
            process.kill()
            process.wait()
