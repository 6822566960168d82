"""Build the base image for the project's Dockerfiles: a Debian with Python. debootstrap makes it from the Debian
archive that the machine's apt uses for `SUITE`, or else from debootstrap's default archive."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import tempfile
from pathlib import Path

from tests.cluster import buildah
from tests.cluster.progress import step
from tests.cluster.waiting import ClusterError

SUITE = "bookworm"
PACKAGES = ("ca-certificates", "python3", "python3-pip", "python3-venv")
# Folders that are emptied in the base image, so that the image is smaller. Their content is not needed at run time.
DROPPED = (
    "var/cache/apt",
    "var/lib/apt/lists",
    "var/log",
    "usr/share/doc",
    "usr/share/info",
    "usr/share/locale",
    "usr/share/man",
)
DOCKERFILE = """FROM scratch
ADD base.tar /
# pip and uv bring a list of authorities of their own; Debian's is the one that an administrator can add to.
ENV SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt PIP_CERT=/etc/ssl/certs/ca-certificates.crt
ENV LANG=C.UTF-8
"""
BOOTSTRAP_TIMEOUT_SECONDS = 1200


def base_key() -> str:
    """Return a hash of everything that determines the content of the base image: Debian suite, packages, emptied
    folders and Dockerfile. The image's name contains the hash, so that a change to one of these leads to a new
    image."""
    return hashlib.sha256(repr((SUITE, PACKAGES, DROPPED, DOCKERFILE)).encode()).hexdigest()[:12]


def ensure_base() -> str:
    """Return the name of the base image in buildah's storage. If the image does not exist yet, build it first."""
    name = f"finetune-base-{base_key()}"
    image = f"localhost/{name}:latest"
    if not buildah.exists(image):
        with (
            step("making the base image with debootstrap"),
            tempfile.TemporaryDirectory(dir=buildah.images_folder(), prefix="base-") as folder,
        ):
            root, context = Path(folder) / "root", Path(folder) / "context"
            _bootstrap(root)
            context.mkdir()
            (context / "Dockerfile").write_text(DOCKERFILE)
            # The files are packed into a tar archive, because the instruction ADD keeps owners, modes and links of an
            # archive exactly.
            archive = [
                "tar",
                "--numeric-owner",
                "--sort=name",
                f"--directory={root}",
                "--create",
                f"--file={context / 'base.tar'}",
                ".",
            ]
            subprocess.run(archive, check=True, timeout=BOOTSTRAP_TIMEOUT_SECONDS)
            buildah.build(name, context / "Dockerfile", context)
    return image


def _bootstrap(root: Path) -> None:
    """Install Debian into the folder ``root`` and empty the folders `DROPPED`. debootstrap runs in a mount namespace of
    its own, so that none of its mounts stays on the machine."""
    command = ["debootstrap", "--variant=minbase", f"--include={','.join(PACKAGES)}", SUITE, str(root), *_mirror()]
    done = subprocess.run(
        [*buildah.ISOLATED, *command], text=True, capture_output=True, timeout=BOOTSTRAP_TIMEOUT_SECONDS
    )
    if done.returncode != 0:
        raise ClusterError(f"{' '.join(command)} failed:\n{(done.stdout + done.stderr)[-3000:]}")
    for dropped in DROPPED:
        shutil.rmtree(root / dropped, ignore_errors=True)
        (root / dropped).mkdir(parents=True)


def _mirror() -> list[str]:
    """Return debootstrap's argument for the Debian archive: a list with the URL that the machine's apt uses for
    `SUITE`. If apt has no archive for `SUITE`, the list is empty, and debootstrap uses its default archive."""
    targets = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(CODENAME) $(COMPONENT) $(CREATED_BY) $(REPO_URI)"],
        text=True,
        capture_output=True,
        timeout=60,
    )
    for line in targets.stdout.splitlines():
        codename, component, kind, *address = line.split()
        if (codename, component, kind) == (SUITE, "main", "Packages") and address:
            return address[:1]
    return []
