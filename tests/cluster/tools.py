"""The programs of a cluster that are built from Go source. The Go modules with the pinned versions are in ``tools/``,
and each program is built once into the cache folder.

If the environment variable ``FINETUNE_TOOL_<NAME>`` is set, for example ``FINETUNE_TOOL_KUBE_APISERVER``, it names the
binary to use. Otherwise the binary comes from the cache, and is built if the cache lacks it. The binary's folder in the
cache is named by a hash of the binary's sources, so that a new version gets a new folder. After an interrupted build,
the next build goes on with the first missing binary.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tests.cluster.cache import cache_folder, locked
from tests.cluster.progress import step
from tests.cluster.waiting import ClusterError

TOOLS_FOLDER = Path(__file__).parent / "tools"
MINIMUM_GO = (1, 24)
BUILD_TIMEOUT_SECONDS = 1800


@dataclass(frozen=True)
class Tool:
    """One program that is built from a Go module.

    ``folder`` is the folder below ``tools/`` with the go.mod file, and ``package`` is the Go package to compile.
    ``stamps_version`` writes the Kubernetes version into the binary, because clients and the kubelet compare versions.
    ``data`` is a glob pattern of files, such as CRDs, that are copied beside the binary. The files are taken from the
    Go module that contains the package ``data_from``. If ``data_from`` is None, they are taken from the Go module that
    contains ``package``. If ``package`` is a package of this project, ``data`` needs ``data_from``.
    """

    name: str
    folder: str
    package: str
    stamps_version: bool = False
    data: str | None = None
    data_from: str | None = None

    @property
    def variable(self) -> str:
        """Name of the environment variable that can contain the path of another binary, for example
        ``"FINETUNE_TOOL_ETCD"``."""
        return "FINETUNE_TOOL_" + re.sub(r"\W", "_", self.name).upper()

    @property
    def sources(self) -> Path:
        return TOOLS_FOLDER / self.folder

    @cached_property
    def build_arguments(self) -> tuple[str, ...]:
        """The arguments of ``go build``. With these arguments, the binary contains no debug information, no state of
        git and no paths of this machine. With ``stamps_version``, it contains the Kubernetes version."""
        flags = "-s -w"
        if self.stamps_version:
            version = pinned_version("kubernetes", "k8s.io/kubernetes")
            major, minor, _ = version.removeprefix("v").split(".")
            values = {"gitVersion": version, "gitMajor": major, "gitMinor": minor}
            flags += "".join(f" -X k8s.io/component-base/version.{key}={value}" for key, value in values.items())
        return ("-mod=readonly", "-trimpath", "-buildvcs=false", "-ldflags", flags)

    @cached_property
    def cached(self) -> Path:
        """The path of the binary in the cache folder, whether or not it is built yet."""
        digest = hashlib.sha256(repr((self.package, self.data, self.build_arguments)).encode())
        for source in sorted(self.sources.iterdir()):
            if source.suffix in {".go", ".mod", ".sum"}:
                digest.update(source.name.encode() + b"\0" + source.read_bytes())
        return cache_folder() / f"bin-{digest.hexdigest()[:16]}" / self.name

    def path(self) -> Path:
        """Return the path of the binary to run: the path in the environment variable, or else the path in the cache
        folder.

        Raises:
            ClusterError: the binary is not built yet, or the environment variable does not name an executable file.
        """
        named = os.environ.get(self.variable)
        if named:
            if not os.access(named, os.X_OK):
                raise ClusterError(f"{self.variable}={named}: there is no such program")
            return Path(named)
        if not self.cached.exists():
            raise ClusterError(f"{self.name} is not built yet: run `python -m tests.cluster build`")
        return self.cached

    @property
    def missing(self) -> bool:
        return not os.environ.get(self.variable) and not self.cached.exists()

    def data_files(self) -> list[Path]:
        """Return the paths of the files that ``data`` selects, as they were copied beside the binary in the cache
        folder."""
        if self.data is None:
            raise ValueError(f"{self.name} has no data files")
        found = sorted(self.cached.parent.glob(Path(self.data).name))
        if not found:
            raise ClusterError(f"{self.name}: {Path(self.data).name} is missing in {self.cached.parent}")
        return found


def _kubernetes(name: str) -> Tool:
    return Tool(name, "kubernetes", f"k8s.io/kubernetes/cmd/{name}", stamps_version=True)


ETCD = Tool("etcd", "etcd", "go.etcd.io/etcd/server/v3")
API_SERVER = _kubernetes("kube-apiserver")
CONTROLLER_MANAGER = _kubernetes("kube-controller-manager")
SCHEDULER = _kubernetes("kube-scheduler")
KUBELET = _kubernetes("kubelet")
MINIO = Tool("minio", "minio", "github.com/minio/minio")
COREDNS = Tool("coredns", "coredns", ".")
REGISTRY = Tool("registry", "registry", "github.com/distribution/distribution/v3/cmd/registry")
TRAINING_OPERATOR = Tool(
    "training-operator",
    "training-operator",
    "github.com/kubeflow/training-operator/cmd/training-operator.v1",
    data="manifests/base/crds/kubeflow.org_pytorchjobs.yaml",
)
DEVICE_PLUGIN = Tool("device-plugin", "device-plugin", ".")
PAUSE = Tool("pause", "pause", ".")
CERT_MANAGER = Tool(
    "cert-manager",
    "cert-manager",
    ".",
    data="deploy/crds/cert-manager.io_*.yaml",
    data_from="github.com/cert-manager/cert-manager/pkg/controller",
)
"""cert-manager's controllers. They are not part of ``ALL``, because only one long test needs them. This test builds the
program itself."""

ALL = (
    PAUSE,
    DEVICE_PLUGIN,
    ETCD,
    API_SERVER,
    CONTROLLER_MANAGER,
    SCHEDULER,
    KUBELET,
    TRAINING_OPERATOR,
    COREDNS,
    REGISTRY,
    MINIO,
)


CONTROL_PLANE = (ETCD, API_SERVER, CONTROLLER_MANAGER, TRAINING_OPERATOR)
"""The programs that a cluster without a node needs."""


def pinned_version(folder: str, module: str) -> str:
    """Return the version of the Go module ``module`` that ``tools/<folder>/go.mod`` requires, for example
    ``"v1.34.4"``."""
    text = (TOOLS_FOLDER / folder / "go.mod").read_text()
    found = re.search(rf"^\s*(?:require )?{re.escape(module)} (v\S+)", text, re.MULTILINE)
    if not found:
        raise ClusterError(f"tools/{folder}/go.mod does not pin {module}")
    return found[1]


def build_missing(wanted: Sequence[Tool] = ALL) -> None:
    """Build the programs in ``wanted`` that are not in the cache yet. A program is not built if its environment
    variable names another binary."""
    if not any(tool.missing for tool in wanted):
        return
    with locked("build"):
        missing = [tool for tool in wanted if tool.missing]
        if missing:
            _check_go()
        for number, tool in enumerate(missing, 1):
            with step(f"[{number}/{len(missing)}] building {tool.name} from Go modules"):
                _build(tool)


def _check_go() -> None:
    if not shutil.which("go"):
        raise ClusterError("the cluster's programs are built with Go, and there is no `go` on the PATH")
    text = subprocess.run(["go", "env", "GOVERSION"], text=True, capture_output=True, check=True).stdout
    found = re.match(r"go(\d+)\.(\d+)", text)
    if not found or (int(found[1]), int(found[2])) < MINIMUM_GO:
        raise ClusterError(
            f"Go {'.'.join(map(str, MINIMUM_GO))} or newer is needed, `go env GOVERSION` says {text.strip()}"
        )


def _build(tool: Tool) -> None:
    tool.cached.parent.mkdir(parents=True, exist_ok=True)
    unfinished = tool.cached.with_name(f".{tool.name}.{os.getpid()}")
    try:
        _go(tool, ["build", *tool.build_arguments, "-o", str(unfinished), tool.package])
        if tool.data is not None:
            package = tool.data_from or tool.package
            module = _go(tool, ["list", "-mod=readonly", "-f", "{{.Module.Dir}}", package]).strip()
            found = sorted(Path(module).glob(tool.data))
            if not found:
                raise ClusterError(f"{tool.name}: {module} has no {tool.data}")
            for file in found:
                shutil.copyfile(file, tool.cached.with_name(file.name))
        unfinished.rename(tool.cached)
    finally:
        unfinished.unlink(missing_ok=True)


def _go(tool: Tool, arguments: list[str]) -> str:
    environment = os.environ | {"CGO_ENABLED": "0", "GOWORK": "off"}
    done = subprocess.run(
        ["go", *arguments],
        cwd=tool.sources,
        env=environment,
        text=True,
        capture_output=True,
        timeout=BUILD_TIMEOUT_SECONDS,
    )
    if done.returncode != 0:
        raise ClusterError(f"`go {' '.join(arguments)}` failed in {tool.sources}:\n{done.stderr[-4000:]}")
    return done.stdout
