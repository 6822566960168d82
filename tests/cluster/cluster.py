"""The class `Cluster`, which starts a test cluster, has methods for tests, and ends the cluster so that nothing of it
stays on the machine."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.cluster import addons, clients, control_plane, node, oci, packages, registry, tools
from tests.cluster.api import Api, answers
from tests.cluster.component import Component
from tests.cluster.credentials import Credentials, issue
from tests.cluster.layout import (
    CONTAINERD_SOCKET,
    DNS_READY_PORT,
    FIRST_NODE,
    HOST_ADDRESS,
    MINIO_PORT,
    REGISTRY_PORT,
    TRAINING_OPERATOR_PROBE_PORT,
    Layout,
)
from tests.cluster.namespaces import Namespaces
from tests.cluster.progress import say
from tests.cluster.second_node import SecondNode, Surroundings
from tests.cluster.waiting import NO_ANSWER, ClusterError, UnreachableError, wait_for
from tests.cluster.watcher_process import WatcherProcess


@dataclass(frozen=True)
class ObjectStore:
    """Address and keys of the cluster's MinIO. The address ``endpoint`` works in pods and in a thread inside
    ``Cluster.enter``."""

    endpoint: str
    access_key: str
    secret_key: str

    @property
    def in_cluster_endpoint(self) -> str:
        """The address with MinIO's DNS name instead of its IP address. Pods can resolve the name, but a thread inside
        ``Cluster.enter`` can't."""
        return f"http://minio.minio.svc.cluster.local:{MINIO_PORT}"


def unusable_because() -> str | None:
    """Return why this machine can't run a cluster, or None if it can."""
    if sys.platform != "linux":
        return "the test cluster needs Linux"
    if os.geteuid() != 0:
        return "the test cluster needs root, for namespaces and mounts of its own (nothing of the machine is changed)"
    return None


class Cluster:
    """A running cluster. ``Cluster.start()`` starts a cluster. When the cluster is used as a context manager, it ends
    at the end of the block.

    ``components`` holds the cluster's programs by name: etcd, api-server, controller-manager, scheduler, containerd,
    kubelet, device-plugin, coredns, minio, registry and training-operator. A cluster without a node has only etcd,
    api-server, controller-manager and training-operator. Tests stop and start the programs to cause failures.
    """

    def __init__(self, layout: Layout, verbose: bool) -> None:
        self.layout = layout
        self.components: dict[str, Component] = {}
        self.registry = node.REGISTRY
        self.minio = ObjectStore(f"http://{HOST_ADDRESS}:{MINIO_PORT}", "test-admin", secrets.token_urlsafe(24))
        self._verbose = verbose
        self._started = time.monotonic()
        self._cgroup = layout.state.name
        self._watcher: WatcherProcess | None = None
        self._credentials: Credentials
        self._api: Api

    @classmethod
    def start(
        cls,
        state: Path | None = None,
        *,
        verbose: bool = True,
        with_node: bool = True,
        flags: Mapping[str, Sequence[str]] | None = None,
    ) -> Cluster:
        """Start a cluster and wait until all of its programs are ready. Programs that are not built yet are built
        first. For a cluster with a node, missing Debian packages are installed too.

        ``state`` is the cluster's state folder, which must not exist yet and is removed when the cluster ends; the
        default is a new temporary folder. Without ``with_node`` only etcd, API server, controller manager and
        training-operator run: pods are stored, but nothing runs them. ``flags`` holds additional command-line
        arguments, by the name of the component that gets them.

        Raises:
            ClusterError: the cluster did not start. What had started is removed again.
        """
        reason = unusable_because()
        if reason:
            raise ClusterError(reason)
        if with_node:
            packages.install(packages.NODE_PACKAGES)
        tools.build_missing(tools.ALL if with_node else tools.CONTROL_PLANE)
        programs = clients.clients()
        if state is None:
            state = Path(tempfile.mkdtemp(prefix="finetune-cluster-"))
        else:
            state.mkdir(parents=True)
        cluster = cls(Layout(state.resolve()), verbose)
        try:
            cluster._bring_up(programs, with_node=with_node, flags=flags or {})
        except BaseException:
            cluster.stop()
            raise
        return cluster

    def __enter__(self) -> Cluster:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    # Properties and methods for tests

    @property
    def kubeconfig(self) -> Path:
        """Path of the administrator's kubeconfig. Its server address can be reached from pods and from inside the
        cluster's network namespace."""
        return self._credentials.kubeconfigs["administrator"]

    @property
    def namespaces(self) -> Namespaces:
        return Namespaces(int(self.layout.init_pid.read_text()))

    @contextlib.contextmanager
    def enter(self) -> Iterator[None]:
        """Move the calling thread into the cluster's network namespace during the block. There the thread reaches the
        API server, MinIO, the registry and pods, and no other network.

        Threads and programs that start during the block are inside too, and stay inside after the block.
        """
        with self.namespaces.network():
            yield

    def popen(
        self, argv: Sequence[str | Path], *, environment: Mapping[str, str] | None = None, **options: Any
    ) -> subprocess.Popen[Any]:
        """Start a program inside the cluster's namespaces, with KUBECONFIG set, and return without waiting. A program
        that still runs when the cluster ends is killed."""
        variables = {**self._environment(os.environ), **(environment or {})}
        return subprocess.Popen(self.namespaces.command([str(argument) for argument in argv]), env=variables, **options)

    def run(
        self,
        argv: Sequence[str | Path],
        *,
        stdin: str | None = None,
        check: bool = True,
        timeout: float = 120,
        environment: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a program inside the cluster's namespaces, with KUBECONFIG set. Wait for its end, and return its exit
        code and output.

        Raises:
            UnreachableError: the program took longer than ``timeout`` seconds, or ``check`` is True and the program
            failed because a server did not answer it.
            ClusterError: ``check`` is True, and the program failed (ended with another exit code than 0) for another
            reason. The message holds the program's output.
        """
        source = subprocess.PIPE if stdin is not None else subprocess.DEVNULL
        pipes = {"stdin": source, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        with self.popen(argv, environment=environment, text=True, **pipes) as process:
            try:
                output, errors = process.communicate(stdin, timeout=timeout)
            except subprocess.TimeoutExpired as error:
                process.kill()
                raise UnreachableError(f"{shlex.join(map(str, argv))} took longer than {timeout:g} s") from error
        if check and process.returncode != 0:
            kind = UnreachableError if NO_ANSWER.search(errors) else ClusterError
            raise kind(f"{shlex.join(map(str, argv))} ended with {process.returncode}:\n{output}{errors}")
        return subprocess.CompletedProcess(list(argv), process.returncode, output, errors)

    def kubectl(self, *arguments: str, stdin: str | None = None, timeout: float = 60) -> str:
        """Run kubectl as the cluster's administrator and return its standard output."""
        return self.run([self.layout.programs / "kubectl", *arguments], stdin=stdin, timeout=timeout).stdout

    def helm(self, *arguments: str, stdin: str | None = None, timeout: float = 300) -> str:
        """Run helm as the cluster's administrator and return its standard output."""
        return self.run([self.layout.programs / "helm", *arguments], stdin=stdin, timeout=timeout).stdout

    def learn_new_kinds(self) -> None:
        """Make the garbage collector know the kinds of all CRDs that exist now. Call this after CRDs were applied, and
        before a test waits until the objects of a deleted owner are gone.

        A running garbage collector looks for new kinds only every 30 s, and then lists their objects. Until then it
        deletes no object whose owner is of a new kind. The method restarts the controller manager, which contains the
        garbage collector, because a new process looks for all kinds at its start.
        """
        self.components["controller-manager"].restart()

    def second_node(self, *, reserved: bool = True) -> SecondNode:
        """Start a second node, wait until pods can be placed on it, and return it. The method ``stop()`` of the
        returned object ends the node.

        A ``reserved`` node takes only pods with ``second_node.TOLERATION``. Pods of other tests therefore stay on the
        first node.

        Raises:
            ClusterError: the node did not start; the message says why.
        """
        around = Surroundings(
            self.layout, self._credentials, self._api, self.namespaces, self.run, self._cgroup, self._base_environment()
        )
        added = SecondNode(around, reserved=reserved)
        added.start(lambda node: self._import_images(node.namespaces))
        self._tell(added.name)
        return added

    def import_image(self, image: oci.Image, namespaces: Namespaces | None = None) -> None:
        """Import a small image into the containerd of a node, without a registry. ``namespaces`` are the namespaces of
        the node. By default the image is imported into the first node."""
        handle, archive = tempfile.mkstemp(suffix=".tar", dir=self.layout.temporary)
        os.close(handle)
        try:
            oci.write_archive(image, Path(archive))
            command = ["ctr", "--namespace=k8s.io", "images", "import", archive]
            done = subprocess.run(
                (namespaces or self.namespaces).command(command),
                env=self._environment(os.environ),
                text=True,
                capture_output=True,
                timeout=120,
            )
        finally:
            Path(archive).unlink()
        if done.returncode != 0:
            raise ClusterError(f"importing {image.name}: {done.stdout}{done.stderr}")

    def get(self, *arguments: str) -> Any:
        """Run ``kubectl get ... --output=json`` and return the parsed JSON."""
        return json.loads(self.kubectl("get", *arguments, "--output=json"))

    def stop(self) -> None:
        """End the cluster, and wait until its processes, cgroups, mounts and state folder are gone.

        Raises:
            ClusterError: something of the cluster is left on the machine; the message says what.
        """
        watcher, self._watcher = self._watcher, None
        if watcher is not None:
            watcher.end(verbose=self._verbose)

    # The start of the cluster, and small helpers

    def _bring_up(self, programs: Mapping[str, Path], *, with_node: bool, flags: Mapping[str, Sequence[str]]) -> None:
        self.layout.create()
        self.layout.owner_pid.write_text(str(os.getpid()))
        self._watcher = WatcherProcess(self.layout, self._cgroup)
        self._watcher.wait_ready()
        self._credentials = issue(self.layout)
        self._api = Api(self._credentials.authority, self._credentials.administrator)
        self._define_control_plane(flags)
        if with_node:
            self._define_node(flags)
        self._write_scripts(programs)
        self._tell("namespaces and certificates")
        self._start("etcd", "api-server")
        if with_node:
            self._start("containerd", "minio", "registry")
        self.components["etcd"].wait_ready()
        if with_node:
            self.components["containerd"].wait_ready()
            self._import_images(self.namespaces)
            self._tell("containerd")
        self.components["api-server"].wait_ready()
        self._tell("API server")
        self._start("controller-manager")
        if with_node:
            self._start("scheduler", "kubelet", "coredns")
        with self.enter():
            addons.apply_objects(self._api, self._credentials)
            # The training-operator is started only after the API server serves the CRD. A controller that starts before
            # its CRD is served tries again only after 10 s.
            wait_for(
                "the PyTorchJob CRD", lambda: addons.crd_established(self._api), 30, evidence=self._log("api-server")
            )
        if with_node:
            self.components["kubelet"].wait_ready()
            self._start("device-plugin")
        self._start("training-operator")
        for component in self.components.values():
            component.wait_ready()
        with self.enter():
            wait_for(
                "the service account of the namespace default",
                self._namespace_filled,
                30,
                evidence=self._log("controller-manager"),
            )
        self._tell("all of it")

    def _define_control_plane(self, flags: Mapping[str, Sequence[str]]) -> None:
        layout, credentials, api = self.layout, self._credentials, self._api
        probe = f"http://{HOST_ADDRESS}:{TRAINING_OPERATOR_PROBE_PORT}/readyz"

        def define(name: str, argv: list[str], ready: Callable[[], bool]) -> None:
            self._define(name, [*argv, *flags.get(name, ())], ready)

        define("etcd", control_plane.etcd(layout), lambda: answers(f"{control_plane.ETCD_URL}/health"))
        define("api-server", control_plane.api_server(layout, credentials), api.ready)
        define("controller-manager", control_plane.controller_manager(credentials), self._namespace_filled)
        define("training-operator", addons.training_operator(layout, credentials), lambda: answers(probe))

    def _define_node(self, flags: Mapping[str, Sequence[str]]) -> None:
        layout, credentials, api = self.layout, self._credentials, self._api
        containerd_socket = Path(f"/proc/{self.namespaces.pid}/root{CONTAINERD_SOCKET}")
        kubelet = node.kubelet(
            layout,
            FIRST_NODE,
            credentials.kubelet_config(FIRST_NODE),
            credentials.authority,
            credentials.kubelet_servers[FIRST_NODE.name],
            self._cgroup,
        )

        def define(
            name: str, argv: list[str], ready: Callable[[], bool], environment: Mapping[str, str] | None = None
        ) -> None:
            self._define(name, [*argv, *flags.get(name, ())], ready, environment)

        define("scheduler", control_plane.scheduler(credentials), lambda: True)
        define("containerd", node.containerd(layout, FIRST_NODE), containerd_socket.exists)
        define("kubelet", kubelet, lambda: node.is_ready(api, FIRST_NODE.name))
        define("device-plugin", node.device_plugin(), lambda: node.has_devices(api, FIRST_NODE.name))
        define(
            "coredns", addons.coredns(layout, credentials), lambda: answers(f"http://127.0.0.1:{DNS_READY_PORT}/ready")
        )
        store = {
            "MINIO_ROOT_USER": self.minio.access_key,
            "MINIO_ROOT_PASSWORD": self.minio.secret_key,
            "MINIO_BROWSER": "off",
        }
        define("minio", addons.minio(layout), lambda: answers(f"{self.minio.endpoint}/minio/health/live"), store)
        define(
            "registry",
            registry.command(layout.config / "registry.json", node.REGISTRY),
            lambda: answers(f"http://{HOST_ADDRESS}:{REGISTRY_PORT}/v2/"),
        )

    def _define(
        self, name: str, argv: list[str], ready: Callable[[], bool], environment: Mapping[str, str] | None = None
    ) -> None:
        base = self._base_environment()
        log = self.layout.logs / f"{name}.log"
        self.components[name] = Component(name, argv, ready, self.namespaces, log, {**base, **(environment or {})})

    def _base_environment(self) -> dict[str, str]:
        return {"PATH": _path(), "HOME": str(self.layout.temporary), "TMPDIR": str(self.layout.temporary)}

    def _start(self, *names: str) -> None:
        for name in names:
            self.components[name].start()

    def _import_images(self, namespaces: Namespaces) -> None:
        for image in (oci.pause(tools.PAUSE.path()), oci.busybox()):
            self.import_image(image, namespaces)

    def _namespace_filled(self) -> bool:
        base = "/api/v1/namespaces/default"
        return bool(
            self._api.get(f"{base}/serviceaccounts/default") and self._api.get(f"{base}/configmaps/kube-root-ca.crt")
        )

    def _log(self, name: str) -> Callable[[], str]:
        return self.components[name].evidence

    def _write_scripts(self, programs: Mapping[str, Path]) -> None:
        self.layout.programs.mkdir()
        for name, program in programs.items():
            (self.layout.programs / name).symlink_to(program)
        script = self.layout.enter_script
        # A program that enters a mount namespace begins in its root folder. Files that the caller names stand here.
        command = shlex.join(self.namespaces.command(["/bin/sh", "-c", 'cd "$0" && exec "$@"']))
        variables = {"KUBECONFIG": str(self.kubeconfig), "PATH": f"{self.layout.programs}:{_path()}"}
        exports = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in variables.items())
        usage = f"# Runs a command inside this cluster: {script} kubectl get pods"
        script.write_text(f'#!/bin/sh\n{usage}\n{exports}exec {command} "$PWD" "$@"\n')
        script.chmod(0o755)

    def _environment(self, base: Mapping[str, str]) -> dict[str, str]:
        return {
            **base,
            "KUBECONFIG": str(self.kubeconfig),
            "PATH": f"{self.layout.programs}:{_path()}",
            "NO_PROXY": "*",
            "no_proxy": "*",
        }

    def _tell(self, what: str) -> None:
        if self._verbose:
            say(f"cluster: {what} after {time.monotonic() - self._started:.1f} s")


def _path() -> str:
    return f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
