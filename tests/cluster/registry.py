"""The image registry. All clusters use the same storage, which is in the cache folder. Images can also be pushed while
no cluster runs: `serving` runs a registry with the same storage for this purpose."""

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
    """Return the folder with all pushed images, and create the folder if needed. The registries of all clusters use
    this folder."""
    folder = cache_folder() / "registry"
    folder.mkdir(exist_ok=True)
    return folder


def has_image(name: str, tag: str) -> bool:
    """Return whether the image was pushed completely. The file ``link`` exists only after a complete push, because the
    registry writes it last."""
    return (storage() / f"docker/registry/v2/repositories/{name}/_manifests/tags/{tag}/current/link").exists()


def command(config: Path, address: str) -> list[str]:
    """Write the configuration file ``config`` of a registry that listens on ``address``, for example
    ``"10.244.0.1:5000"``, and return the registry's command."""
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
    """A registry that runs in a network namespace of its own, so that its port 5000 is always free."""

    namespaces: Namespaces
    address: str = "127.0.0.1:5000"

    def command(self, argv: Sequence[str]) -> list[str]:
        """Return a command that runs ``argv`` in the registry's network namespace. In this namespace the program can
        reach no other server than the registry."""
        return ["nsenter", f"--net=/proc/{self.namespaces.pid}/ns/net", "--", *argv]

    def serves(self) -> bool:
        with self.namespaces.network():
            return answers(f"http://{self.address}/v2/")


@contextlib.contextmanager
def serving() -> Iterator[Server]:
    """Run a registry during the block, so that images can be pushed without a cluster.

    The registry always has the same address, because buildah remembers by address which layers a registry already has.
    With a new address for each push, buildah would push the layers with dependencies (several gigabytes) again after
    each change of the project's code.
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
