"""The program finds the cluster as kubectl does: KUBECONFIG with several files, contexts, and their namespaces. What is
wrong is one sentence that says what to do, and no library says anything before it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.programs import Ended, run_finetune
from tests.cli.stored import stored
from tests.cli.test_main import environment
from tests.cli.test_terminal import served

CONFIG = """\
apiVersion: v1
kind: Config
clusters: [{{name: {name}, cluster: {{server: "http://127.0.0.1:{port}"}}}}]
users: [{{name: {name}, user: {{}}}}]
contexts: [{{name: {name}, context: {{cluster: {name}, user: {name}, namespace: {namespace}}}}}]
current-context: {current}
"""


def config(folder: Path, name: str, port: int, *, namespace: str = "research", current: str = '""') -> Path:
    """Write a kubeconfig with one context called ``name``."""
    file = folder / name
    file.write_text(CONFIG.format(name=name, port=port, namespace=namespace, current=current))
    return file


def jobs() -> bytes:
    """Return a list with one job, as the API server sends it."""
    return json.dumps({"items": [stored("running")], "metadata": {"resourceVersion": "7"}}).encode()


def finetune(folder: Path, kubeconfig: str, *arguments: str) -> Ended:
    return run_finetune(arguments, environment(kubeconfig), folder)


def test_context_and_namespace_are_those_of_the_command_line_or_of_the_kubeconfig(tmp_path: Path) -> None:
    paths: list[str] = []

    def answer(path: str) -> tuple[int, bytes]:
        paths.append(path.partition("?")[0])
        return 200, jobs()

    with served(answer) as port:
        first = config(tmp_path, "first", 1, current="first")
        second = config(tmp_path, "second", port, namespace="other")
        both = f"{first}:{second}:/nonexistent"
        done = finetune(tmp_path, both, "list", "--context", "second")
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.splitlines()[1].split()[:3] == ["quickstart", "LoRA", "Running"]
        finetune(tmp_path, both, "list", "--context", "second", "-n", "mine")
        finetune(tmp_path, both, "list", "--context", "second", "-A", "-n", "mine")
        alone = finetune(tmp_path, str(second), "list")
    api = "/apis/finetune.dev/v1alpha1"
    assert paths == [f"{api}/namespaces/{name}/finetunejobs" for name in ("other", "mine")] + [f"{api}/finetunejobs"]
    assert alone.stderr == (
        "finetune: kubeconfig: cannot be loaded (has no current context); choose one with `--context` (second)\n"
    )


@pytest.mark.parametrize("command", [["list"], ["watch"], ["describe", "x"], ["suspend", "x"], ["metrics", "x"]])
def test_an_unknown_context_names_those_that_exist(tmp_path: Path, command: list[str]) -> None:
    first, second = config(tmp_path, "first", 1, current="first"), config(tmp_path, "second", 2)
    done = finetune(tmp_path, f"{first}:{second}", *command, "--context", "third")
    assert done.returncode == 2
    assert done.stderr == ("finetune: --context: must name a context of the kubeconfig (first, second), and is third\n")


@pytest.mark.parametrize("command", [["list"], ["logs", "x"], ["events", "x"], ["cancel", "x"]])
def test_no_kubeconfig_is_one_sentence_and_no_library_says_another(tmp_path: Path, command: list[str]) -> None:
    done = finetune(tmp_path, "/nonexistent", *command)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        "finetune: kubeconfig: cannot be loaded (there is no file /nonexistent); set KUBECONFIG to a kubeconfig, or"
        " create ~/.kube/config\n"
    )


def test_a_cluster_that_is_down_is_one_sentence(tmp_path: Path) -> None:
    done = finetune(tmp_path, str(config(tmp_path, "first", 9, current="first")), "list")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("finetune: API server: cannot be reached (")
    assert line.endswith("`kubectl cluster-info` asks the same server; or choose another cluster with `--context`")


def test_warnings_of_libraries_are_shown_only_where_the_user_asks_for_them(tmp_path: Path) -> None:
    """urllib3 logs a warning for each of its retries, here of a store that is down."""
    found = stored("running")
    found["spec"]["storage"] = {"uri": "s3://finetune/runs", "endpoint": "http://127.0.0.1:9"}
    with served(lambda _path: (200, json.dumps(found).encode())) as port:
        keys = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
        variables = environment(config(tmp_path, "first", port, current="first")) | keys
        quiet = run_finetune(["checkpoints", "quickstart"], variables, tmp_path)
        verbose = run_finetune(["-v", "checkpoints", "quickstart"], variables, tmp_path)
    (line,) = quiet.stderr.splitlines()
    assert line.startswith("finetune: http://127.0.0.1:9: cannot be reached from here")
    *warnings, last = verbose.stderr.splitlines()
    assert last == line
    assert any("Retrying" in warning for warning in warnings)


@pytest.mark.parametrize(
    ("code", "body", "sentence"),
    [
        (
            404,
            b"404 page not found",
            "FineTuneJob: is unknown to this cluster; install the Helm chart first, or choose",
        ),
        (401, b"{}", "kubeconfig: the API server does not accept its credentials; log in again, or choose another"),
        (403, b'{"message": "no"}', "you may not list it (no); ask for the verb `list` on `finetunejobs.finetune.dev`"),
        (400, b'{"message": "unable to parse"}', "the API server refuses the request: unable to parse"),
        (500, b"", "API server: cannot be reached (HTTP 500"),
    ],
)
def test_each_refusal_says_what_to_do_next(tmp_path: Path, code: int, body: bytes, sentence: str) -> None:
    with served(lambda _path: (code, body)) as port:
        done = finetune(tmp_path, str(config(tmp_path, "c", port, current="c")), "list", "-l", "a=b")
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert sentence in line


@pytest.mark.parametrize(
    "arguments", [["watch", "a/b"], ["list", "-n", "A_"], ["logs", "x" * 41], ["logs", "x", "--tail", "-1"]]
)
def test_names_and_numbers_that_can_not_be_are_refused_before_any_request(tmp_path: Path, arguments: list[str]) -> None:
    done = finetune(tmp_path, "/nonexistent", *arguments)
    assert done.returncode == 2
    assert "must be" in done.stderr


def test_a_reader_that_ends_early_is_no_error() -> None:
    """As with `finetune completion bash | head -1`: nobody reads what the program writes."""
    reading, writing = os.pipe()
    os.close(reading)
    command = "import sys; from finetune_cli.main import main; sys.exit(main(['completion', 'bash']))"
    done = subprocess.run([sys.executable, "-c", command], stdout=writing, stderr=subprocess.PIPE, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, b"")
