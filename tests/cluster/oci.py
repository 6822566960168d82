"""Two small images that every node gets without a registry: ``pause``, which Kubernetes needs for every pod, and
``busybox`` for test pods that need only a shell."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

PAUSE_IMAGE = "localhost/pause:3.10"
BUSYBOX_IMAGE = "localhost/busybox:1"
BUSYBOX = Path("/bin/busybox")
BUSYBOX_COMMANDS = (
    "cat",
    "date",
    "echo",
    "env",
    "false",
    "id",
    "kill",
    "ls",
    "mkdir",
    "nc",
    "nslookup",
    "sh",
    "sleep",
    "test",
    "touch",
    "true",
    "wget",
)


@dataclass(frozen=True)
class Image:
    """A container image with one layer.

    ``files`` maps paths in the image to the files that are copied there. ``links`` maps paths in the image to the
    targets of symbolic links.
    """

    name: str
    files: Mapping[str, Path]
    links: Mapping[str, str]
    command: Sequence[str]
    is_entry_point: bool = False
    """Whether ``command`` is the image's entry point. If True, the arguments of a container are appended to
    ``command``. Otherwise they replace ``command``."""


def pause(program: Path) -> Image:
    return Image(PAUSE_IMAGE, {"pause": program}, {}, ["/pause"])


def busybox() -> Image:
    links = {f"bin/{name}": "busybox" for name in BUSYBOX_COMMANDS}
    return Image(BUSYBOX_IMAGE, {"bin/busybox": BUSYBOX}, links, ["/bin/sh"])


def write_archive(image: Image, target: Path) -> None:
    """Write ``image`` to the file ``target``, as a tar archive in the format of ``docker save``. containerd can import
    this format."""
    layer = _layer(image)
    config = json.dumps(
        {
            "architecture": "amd64",
            "os": "linux",
            "config": {
                "Entrypoint" if image.is_entry_point else "Cmd": list(image.command),
                "Env": ["PATH=/bin"],
            },
            "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(layer).hexdigest()}"]},
        }
    ).encode()
    manifest = json.dumps([{"Config": "config.json", "RepoTags": [image.name], "Layers": ["layer.tar"]}]).encode()
    with tarfile.open(target, "w") as archive:
        for name, content in (("config.json", config), ("layer.tar", layer), ("manifest.json", manifest)):
            _add(archive, tarfile.TarInfo(name), content)


def _layer(image: Image) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as layer:
        for folder in ("bin", "etc", "tmp"):
            entry = tarfile.TarInfo(folder)
            entry.type, entry.mode = tarfile.DIRTYPE, 0o1777 if folder == "tmp" else 0o755
            layer.addfile(entry)
        for path, source in image.files.items():
            entry = tarfile.TarInfo(path)
            entry.mode = 0o755
            _add(layer, entry, source.read_bytes())
        for path, target in image.links.items():
            entry = tarfile.TarInfo(path)
            entry.type, entry.linkname = tarfile.SYMTYPE, target
            layer.addfile(entry)
    return buffer.getvalue()


def _add(archive: tarfile.TarFile, entry: tarfile.TarInfo, content: bytes) -> None:
    entry.size = len(content)
    archive.addfile(entry, io.BytesIO(content))
