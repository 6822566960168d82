"""Build the project's images without a container engine, and push them into the storage of the clusters' registry.
debootstrap makes the base image, and buildah builds the Dockerfiles.

``ensure`` returns the reference by which a pod spec names the image. The tag of the reference is a hash of everything
that determines the image's content, so that an unchanged image is neither built nor pushed again. The registry's
storage is in the cache folder, so later clusters find the image there.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tests.cluster import packages, tools
from tests.cluster.base_image import base_key, ensure_base
from tests.cluster.buildah import build, push
from tests.cluster.cache import locked
from tests.cluster.node import REGISTRY
from tests.cluster.progress import step
from tests.cluster.registry import has_image
from tests.cluster.waiting import ClusterError

REPOSITORY = Path(__file__).resolve().parents[2]
IGNORED = {"__pycache__", ".git"}


@dataclass(frozen=True)
class Image:
    """An image of the project: its name in the registry, its Dockerfile, and the build context (the folder from which
    the Dockerfile copies files)."""

    name: str
    dockerfile: Path
    context: Path = REPOSITORY


OPERATOR = Image("finetune-operator", REPOSITORY / "operator" / "Dockerfile")
TRAINER = Image("finetune-trainer", REPOSITORY / "trainer_image" / "Dockerfile")
ALL = (OPERATOR, TRAINER)


def ensure(image: Image) -> str:
    """Return the reference with which a pod spec names the image. If the registry has no image with the same content
    yet, build and push the image first.

    Raises:
        ClusterError: the Dockerfile does not exist, or a build step failed. In the second case the message
            holds the end of the build log.
    """
    if not image.dockerfile.exists():
        raise ClusterError(f"{image.dockerfile} is not there: nothing to build {image.name} from")
    tag = content_key(image)
    reference = f"{REGISTRY}/{image.name}:{tag}"
    if has_image(image.name, tag):
        return reference
    packages.install(packages.IMAGE_PACKAGES)
    tools.build_missing()
    with locked("images"):
        if not has_image(image.name, tag):
            base = ensure_base()
            with step(f"building the image {image.name}"):
                built = build(image.name, image.dockerfile, image.context, base)
            with step(f"pushing the image {image.name} to the registry's storage"):
                push(built, image.name, tag)
    return reference


def content_key(image: Image) -> str:
    """Return a hash of everything that determines the image's content: the recipe of the base image, the Dockerfile,
    and the files that the Dockerfile copies."""
    text = image.dockerfile.read_text()
    digest = hashlib.sha256(f"{base_key()}\0{text}\0".encode())
    for source in copied_sources(text):
        for file in _files(image.context, source):
            digest.update(f"{file.relative_to(image.context)}\0{file.stat().st_mode & 0o777:o}\0".encode())
            digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()[:16]


def copied_sources(dockerfile: str) -> list[str]:
    """Return the paths that the COPY and ADD lines of a Dockerfile take from the build context.

    >>> copied_sources("COPY --chown=1:1 a b/ /to/\\nCOPY --from=other x /y\\nRUN COPY z /z")
    ['a', 'b/']
    """
    sources = []
    for line in re.sub(r"\\\n", " ", dockerfile).splitlines():
        instruction, *words = line.split() or [""]
        if instruction.upper() not in {"COPY", "ADD"} or any(word.startswith("--from=") for word in words):
            continue
        sources += [word for word in words if not word.startswith("--")][:-1]
    return sources


def _files(context: Path, source: str) -> Iterable[Path]:
    """Yield, in a fixed order, the files in ``context`` that ``source`` selects. ``source`` is a path or a glob
    pattern. If it selects a folder, it selects all files in the folder, except those that `IGNORED` excludes."""
    matches = sorted(context.glob(source.strip("/"))) if source.strip("/.") else [context]
    if not matches:
        raise ClusterError(f"a Dockerfile copies {source}, which is not in {context}")
    for match in matches:
        if match.is_file():
            yield match
        else:
            inside = (file for file in match.rglob("*") if file.is_file())
            yield from sorted(file for file in inside if not IGNORED & set(file.relative_to(context).parts))
