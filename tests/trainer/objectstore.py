"""A real MinIO server on loopback for the tests. Each server has a port and a data folder of its own, and all have the
same access key."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import urllib3
from minio import Minio

ACCESS_KEY, SECRET_KEY = "test-access", "test-secret-key"
BUCKET = "finetune"


def minio_binary() -> Path | None:
    """Return the path of the MinIO binary that FINETUNE_MINIO names, or of the binary in the test cluster's cache; None
    if there is no binary."""
    named = os.environ.get("FINETUNE_MINIO")
    if named:
        return Path(named)
    cache = Path(os.environ.get("FINETUNE_CACHE", "~/.cache/finetune-operator")).expanduser()
    return next((path for path in sorted(cache.glob("bin-*/minio")) if path.is_file()), None)


def free_port() -> int:
    """Return a port of the loopback interface on which nobody listens. The port is below the range of ports that the
    kernel gives to clients.

    A client that tries again and again to reach a port of the kernel's range, before its server listens, may get that
    very port for its own end. The client is then connected with itself, and the server can't open the port any more.
    """
    first_of_clients = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    while True:
        port = random.randrange(10_000, first_of_clients)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


@dataclass
class ObjectStore:
    """A running MinIO server, with methods to read and fill its bucket `finetune`."""

    endpoint: str
    credentials: Path
    client: Minio = field(repr=False)

    def keys(self, prefix: str) -> list[str]:
        return sorted(item.object_name for item in self.client.list_objects(BUCKET, prefix=prefix, recursive=True))

    def read(self, key: str) -> bytes:
        response = self.client.get_object(BUCKET, key)
        try:
            return bytes(response.read())
        finally:
            response.close()
            response.release_conn()

    def upload(self, prefix: str, folder: Path, *, replacing: bool = False) -> None:
        """Upload the files of ``folder`` to keys that begin with ``prefix``. Many tests share the bucket, so the upload
        fails where it would change the content of an object, unless ``replacing`` is true."""
        there = set(self.keys(f"{prefix}/"))
        for path in folder.iterdir():
            key = f"{prefix}/{path.name}"
            is_new = replacing or key not in there or self.read(key) == path.read_bytes()
            assert is_new, f"{key} would change under other tests"
            self.client.fput_object(BUCKET, key, str(path))


@contextmanager
def running_store(
    binary: Path,
    folder: Path,
    *,
    variables: Mapping[str, str] | None = None,
    certificates: Path | None = None,
    region: str = "us-east-1",
) -> Iterator[ObjectStore]:
    """Run a server on ``folder`` while the block runs.

    ``variables`` are added to the server's environment. With ``certificates``, a folder with public.crt, private.key
    and the CA's ca.crt, the server speaks TLS under the name localhost.
    """
    port = free_port()
    environment = {
        **os.environ,
        **(variables or {}),
        "MINIO_ROOT_USER": ACCESS_KEY,
        "MINIO_ROOT_PASSWORD": SECRET_KEY,
        "HOME": str(folder),
        "MINIO_BROWSER": "off",
        "MINIO_UPDATE": "off",
    }
    command = [str(binary), "server", "--quiet", "--address", f"127.0.0.1:{port}", str(folder / "data")]
    if certificates is not None:
        command[2:2] = ["--certs-dir", str(certificates)]
    authority = certificates / "ca.crt" if certificates is not None else None
    with (folder / "minio.log").open("wb") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        endpoint = f"http://127.0.0.1:{port}" if certificates is None else f"https://localhost:{port}"
        # A MinIO server that is still initializing asks for a pause of a minute (Retry-After), although it is ready a
        # moment later. So the client ignores Retry-After.
        retries = urllib3.Retry(
            30, backoff_factor=0.1, backoff_max=1, status_forcelist=[503], respect_retry_after_header=False
        )
        connections = urllib3.PoolManager(ca_certs=str(authority) if authority else None, retries=retries)
        wait_ready(endpoint, server, folder / "minio.log", connections)
        credentials = folder / "credentials"
        write_credentials(credentials, ACCESS_KEY, SECRET_KEY)
        client = Minio(
            urlsplit(endpoint).netloc,
            ACCESS_KEY,
            SECRET_KEY,
            secure=certificates is not None,
            region=region,
            http_client=connections,
        )
        client.make_bucket(BUCKET, location=region)
        yield ObjectStore(endpoint, credentials, client)
    finally:
        server.terminate()
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def write_credentials(folder: Path, access_key: str, secret_key: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "AWS_ACCESS_KEY_ID").write_text(access_key)
    (folder / "AWS_SECRET_ACCESS_KEY").write_text(secret_key)


def wait_ready(
    endpoint: str,
    server: subprocess.Popen[bytes],
    log: Path,
    connections: urllib3.PoolManager | None = None,
    seconds: float = 30,
) -> None:
    connections = connections or urllib3.PoolManager()
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise RuntimeError(f"MinIO ended with {server.returncode}: {log.read_text()[-2000:]}")
        try:
            if connections.request("GET", f"{endpoint}/minio/health/ready", timeout=2, retries=False).status == 200:
                return
        except urllib3.exceptions.HTTPError:
            pass
        # Pause between two requests; the deadline bounds their total time.
        time.sleep(0.1)
    raise TimeoutError(f"MinIO was not ready after {seconds} s: {log.read_text()[-2000:]}")
