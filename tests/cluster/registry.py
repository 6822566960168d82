"""The image registry: its storage in the cache folder, and a server on the loopback address while images are pushed
without a cluster."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.cluster import tools
from tests.cluster.api import answers
from tests.cluster.cache import cache_folder
from tests.cluster.waiting import ClusterError, tail, wait_for


def storage() -> Path:
    """Where pushed images lie; every cluster's registry serves them."""
    folder = cache_folder() / "registry"
    folder.mkdir(exist_ok=True)
    return folder


def has_image(name: str, tag: str) -> bool:
    """Tell whether an image was pushed completely: the link is what the registry writes last."""
    return (storage() / f"docker/registry/v2/repositories/{name}/_manifests/tags/{tag}/current/link").exists()


def command(config: Path, address: str) -> list[str]:
    """Write the configuration and return the command of a registry that listens on ``address``."""
    content = {
        "version": "0.1",
        "log": {"level": "warn", "accesslog": {"disabled": True}},
        "storage": {"filesystem": {"rootdirectory": str(storage())}, "delete": {"enabled": True}},
        "http": {"addr": address},
    }
    config.write_text(json.dumps(content))
    return [str(tools.REGISTRY.path()), "serve", str(config)]


@contextlib.contextmanager
def serving() -> Iterator[str]:
    """Serve the storage on a free port of the loopback address, and give ``host:port``."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    address = f"127.0.0.1:{port}"
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "registry.log"
        with log.open("wb") as output:
            server = subprocess.Popen(command(Path(folder) / "config.json", address), stdout=output, stderr=output)
        try:
            wait_for("the registry", lambda: _serves(server, address, log), 20, evidence=lambda: tail(log))
            yield address
        finally:
            server.kill()
            server.wait()


def _serves(server: subprocess.Popen[bytes], address: str, log: Path) -> bool:
    if server.poll() is not None:
        raise ClusterError(f"the registry ended with {server.returncode}\n{tail(log)}")
    return answers(f"http://{address}/v2/")
