"""No command lets a control character from the cluster, from the bucket or from a file reach the terminal.

Each command runs as a program. The API server and the object store are HTTP servers of the tests. The hostile text is
in the status of a job, in an error of a server, in the manifest of a checkpoint, or in a file for `finetune validate`.
"""

from __future__ import annotations

import ast
import json
import logging
import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import pytest
from pydantic import ValidationError

from finetune_cli.terminal import SafeConsole, TerminalHandler, printable, say_json
from finetune_core.api.conditions import ConditionType
from finetune_core.api.job import FineTuneJob
from finetune_core.layout import digest, run_root_of
from tests.cli.programs import run_finetune
from tests.cli.stored import stored
from tests.cli.test_main import KUBECONFIG

CLI = Path(__file__).parents[2] / "cli/finetune_cli"
ATTACKS = (
    "\x1b[2J",  # clears the screen
    "\x1b]0;owned\x07",  # sets the title of the window
    "\x1b]52;c;b3duZWQ=\x07",  # sets the clipboard
    "\x9b31m",  # sets a colour: \x9b is the C1 control character for ESC [
    "\x90q\x9c",  # a device control string between two C1 control characters
    "\r\x08\x7f",  # writes over the line
    "\n12:00:00  Completed: forged",  # forges a line
    "\u2028\u202e\u2066\u200b",  # ends the line, changes the direction of reading twice, and adds an invisible space
    "[red]x[/nothing]",  # markup of the library rich
    ":bomb:",
)
HOSTILE = "before" + "".join(ATTACKS) + "after"
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\u200b]")
OWN_CODES = re.compile(r"\x1b\[[0-9;?]*[mKAhlG]|\r")
"""Matches what rich itself writes to control a terminal: the sequences that set colours, erase a line, or move, hide or
show the cursor, and the carriage return."""


def hostile_job(name: str) -> dict[str, Any]:
    """Return the stored job ``name``. A hostile text replaces each text in the job's status, if the models accept a
    hostile text there.

    The type of the condition `Succeeded` stays, because without that condition the command shows a fixed text instead
    of the job's state and message.
    """
    found = stored(name)
    changed = 0
    for path, own in list(_texts(found["status"])):
        if own == ConditionType.SUCCEEDED:
            continue
        for text in (HOSTILE, "s3://bucket/" + HOSTILE):
            candidate = _with(found["status"], path, text)
            try:
                FineTuneJob.model_validate({**found, "status": candidate})
            except ValidationError:
                continue
            found["status"], changed = candidate, changed + 1
            break
    assert changed, "no text of the status can be hostile"
    return found


def _texts(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """Yield path and value of every string in ``value``."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from _texts(item, (*path, key))
    if isinstance(value, str):
        yield path, value


def _with(value: Any, path: tuple[str | int, ...], text: str) -> Any:
    """Return a copy of ``value`` with ``text`` as the value at ``path``."""
    if not path:
        return text
    copied = value.copy()
    copied[path[0]] = _with(value[path[0]], path[1:], text)
    return copied


Answer = tuple[int, bytes]


@contextmanager
def served(answer: Callable[[str], Answer]) -> Iterator[int]:
    """Serve GET and HEAD requests on a port of this machine and yield the port. ``answer`` is called with the path and
    query of each request, and returns the status code and the body."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            code, body = answer(self.path)
            self.send_response(code)
            self.send_header("Content-Type", "application/xml" if body.startswith(b"<") else "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *_: Any) -> None:
            """Log nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()


def finetune(folder: Path, port: int, arguments: list[str], *, terminal: bool) -> str:
    """Run `finetune` with the API server at ``port`` and return all its output. With ``terminal``, the program writes
    as on a terminal, otherwise as into a pipe."""
    (folder / "config").write_text(KUBECONFIG.format(port=port))
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(folder),
        "KUBECONFIG": str(folder / "config"),
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "b",
        **({"FORCE_COLOR": "1", "COLUMNS": "150", "TERM": "xterm-256color"} if terminal else {}),
    }
    done = run_finetune(arguments, environment, folder)
    text = done.stdout + done.stderr
    assert "Traceback" not in text, text
    return text


def check(text: str, *, terminal: bool) -> None:
    """Assert that ``text``, the output of a command, contains no control character that a terminal would obey, and no
    forged line that a user would believe.

    A hostile text may still be broken into lines inside the panel of the live view. Each of these lines begins with the
    frame of the panel, so none looks like a line of the program.
    """
    assert "after" in text, f"nothing hostile was shown, so nothing was tested: {text}"
    shown = OWN_CODES.sub("", text) if terminal else text
    assert CONTROL.findall(shown) == []
    assert not re.search(r"^\s*12:00:00  Completed: forged", shown, re.MULTILINE)
    assert "before" in shown


def test_json_has_no_control_character_and_loses_none(capsys: pytest.CaptureFixture[str]) -> None:
    every = "".join(chr(code) for code in range(0x100)) + HOSTILE
    say_json({every: every})
    written = capsys.readouterr().out
    assert CONTROL.findall(written) == []
    assert json.loads(written) == {every: every}


COMMANDS = {
    "watch": ["watch", "quickstart"],
    "download": ["download", "quickstart"],
    "checkpoints": ["checkpoints", "quickstart"],
    "list": ["list"],
    "watch all": ["watch"],
    "describe": ["describe", "quickstart"],
    "logs": ["logs", "quickstart"],
    "events": ["events", "quickstart"],
    "cancel": ["cancel", "quickstart"],
    "metrics": ["metrics", "quickstart"],
}


@pytest.mark.parametrize("terminal", [False, True], ids=["pipe", "terminal"])
@pytest.mark.parametrize("job", ["succeeded", "failed", "running", "unschedulable"])
def test_watch_shows_a_hostile_status_harmlessly(tmp_path: Path, job: str, *, terminal: bool) -> None:
    found = hostile_job(job)
    body = json.dumps({"items": [found], "metadata": {"resourceVersion": "7"}}).encode()
    with served(lambda _path: (200, body)) as port:
        text = finetune(tmp_path, port, ["watch", "quickstart", "--timeout", "0.5"], terminal=terminal)
    check(text, terminal=terminal)


@pytest.mark.parametrize("terminal", [False, True], ids=["pipe", "terminal"])
@pytest.mark.parametrize(
    "arguments", [["list"], ["list", "-o", "wide"], ["describe", "x"], ["watch", "a", "b"]], ids=str
)
def test_hostile_jobs_are_shown_harmlessly(tmp_path: Path, arguments: list[str], *, terminal: bool) -> None:
    jobs = [hostile_job("failed"), hostile_job("unschedulable")]
    for found, name in zip(jobs, ("a", "b"), strict=True):
        found["metadata"] |= {"name": name, "labels": {"x": HOSTILE}, "annotations": {"x": HOSTILE}}
    event = {"regarding": {"kind": HOSTILE, "name": HOSTILE}, "reason": HOSTILE, "note": HOSTILE, "type": HOSTILE}

    def answer(path: str) -> Answer:
        if path.endswith("/x"):
            return 200, json.dumps(jobs[0]).encode()
        items = [{**event, "regarding": {"kind": "FineTuneJob", "name": "a"}}] if "/events" in path else jobs
        return 200, json.dumps({"items": items, "metadata": {"resourceVersion": "7"}}).encode()

    extra = ["--timeout", "0.5"] if arguments[0] == "watch" else []
    with served(answer) as port:
        text = finetune(tmp_path, port, [*arguments, *extra], terminal=terminal)
    if arguments[0] == "describe":
        # The lines of the page are indented. Those of the program about changes begin at the left.
        assert "before" in text
        assert not re.search(r"^12:00:00", OWN_CODES.sub("", text), re.MULTILINE)
    elif arguments != ["list"]:
        check(text, terminal=terminal)
    assert CONTROL.findall(OWN_CODES.sub("", text) if terminal else text) == []


@pytest.mark.parametrize("terminal", [False, True], ids=["pipe", "terminal"])
@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("code", [403, 500])
def test_a_hostile_refusal_of_the_api_server_is_shown_harmlessly(
    tmp_path: Path, command: str, code: int, *, terminal: bool
) -> None:
    status = {"kind": "Status", "code": code, "reason": HOSTILE, "message": HOSTILE}
    with served(lambda _path: (code, json.dumps(status).encode())) as port:
        check(finetune(tmp_path, port, COMMANDS[command], terminal=terminal), terminal=terminal)


@pytest.mark.parametrize("terminal", [False, True], ids=["pipe", "terminal"])
@pytest.mark.parametrize("command", ["download", "checkpoints"])
def test_a_hostile_refusal_of_the_store_is_shown_harmlessly(tmp_path: Path, command: str, *, terminal: bool) -> None:
    # The attacks with ESC or backspace are left out, because XML can't contain these C0 control characters. XML can
    # contain the C1 control characters.
    said = escape("before" + "".join(item for item in ATTACKS if "\x1b" not in item and "\x08" not in item) + "after")
    refusal = f"<?xml version='1.0' encoding='UTF-8'?><Error><Code>X</Code><Message>{said}</Message></Error>"
    with served(lambda _path: (400, refusal.encode())) as store, served(lambda _path: (200, _job_at(store))) as port:
        check(finetune(tmp_path, port, COMMANDS[command], terminal=terminal), terminal=terminal)


@pytest.mark.parametrize("answer", [b"", b"<", b"<html>before\xc2\x9b2Jafter</html>", b"before\x1b[2Jafter"])
@pytest.mark.parametrize("command", ["download", "checkpoints"])
def test_an_answer_that_no_store_gives_is_one_sentence(tmp_path: Path, command: str, answer: bytes) -> None:
    with served(lambda _path: (200, answer)) as store, served(lambda _path: (200, _job_at(store))) as port:
        text = finetune(tmp_path, port, COMMANDS[command], terminal=False)
    assert len(text.splitlines()) == 1, text
    assert CONTROL.findall(text) == []


def _job_at(port: int) -> bytes:
    """Return the succeeded job, whose object store is at ``port``, as JSON."""
    found = stored("succeeded")
    found["spec"]["storage"] = {"uri": "s3://finetune/runs", "endpoint": f"http://127.0.0.1:{port}"}
    return json.dumps(found).encode()


@pytest.mark.parametrize("output", ["text", "json"])
@pytest.mark.parametrize("terminal", [False, True], ids=["pipe", "terminal"])
def test_a_hostile_manifest_in_the_bucket_is_shown_harmlessly(tmp_path: Path, output: str, *, terminal: bool) -> None:
    manifest = json.dumps({"files": [{"name": HOSTILE, "bytes": 1, "sha256": "0" * 64}]}).encode()
    job = FineTuneJob.model_validate(json.loads(_job_at(1)))
    folder = run_root_of(job).removeprefix("s3://finetune/") + "/checkpoints/1-10"
    objects = {f"{folder}/manifest.json": manifest, f"{folder}/COMMIT": digest(manifest).encode()}

    def answer(path: str) -> Answer:
        if "list-type" in path:
            contents = "".join(
                f"<Contents><Key>{key}</Key><LastModified>2026-11-24T12:00:00.000Z</LastModified>"
                f'<ETag>"x"</ETag><Size>{len(value)}</Size></Contents>'
                for key, value in objects.items()
            )
            return (
                200,
                f"<ListBucketResult><Name>finetune</Name>{contents}<IsTruncated>false</IsTruncated></ListBucketResult>".encode(),
            )
        if "location" in path:
            return 200, b"<LocationConstraint/>"
        found = objects.get(path.partition("?")[0].removeprefix("/finetune/"))
        return (200, found) if found is not None else (404, b"<Error><Code>NoSuchKey</Code></Error>")

    with served(answer) as store, served(lambda _path: (200, _job_at(store))) as port:
        arguments = ["checkpoints", "quickstart", "-o", output]
        text = finetune(tmp_path, port, arguments, terminal=terminal)
    assert CONTROL.findall(OWN_CODES.sub("", text) if terminal else text) == []
    assert "damaged" in text


def test_validate_shows_a_hostile_file_harmlessly(tmp_path: Path) -> None:
    found = stored()
    found["metadata"]["name"] = found["spec"]["method"] = HOSTILE
    found["spec"][HOSTILE] = HOSTILE
    (tmp_path / "job.yaml").write_text(json.dumps(found))
    check(finetune(tmp_path, 1, ["validate", "job.yaml"], terminal=False), terminal=False)


def test_words_stay_apart_and_letters_of_all_scripts_stay() -> None:
    assert printable("one\r\ntwo\tthree") == "one two three"
    assert printable("Schrödinger 训练 ▁▂▃ ✔ می‌خواهم") == "Schrödinger 训练 ▁▂▃ ✔ می‌خواهم"
    assert printable("\ud800x\U000e0041") == "x"


def test_the_console_understands_no_markup() -> None:
    console = SafeConsole(width=60, color_system=None)
    with console.capture() as capture:
        console.print("[red]x[/nothing] :bomb:")
    assert capture.get() == "[red]x[/nothing] :bomb:\n"


def test_no_module_prints_but_the_one_that_removes_control_characters() -> None:
    prints = []
    for path in sorted(CLI.rglob("*.py")):
        if path.name == "terminal.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Name) and node.id == "print":
                prints.append(f"{path.name}:{node.lineno}: print")
            if isinstance(node, ast.Attribute) and node.attr in ("stdout", "stderr"):
                prints.append(f"{path.name}:{node.lineno}: {node.attr}")
            if isinstance(node, ast.ImportFrom) and node.module == "rich.console":
                prints += [f"{path.name}: {item.name}" for item in node.names if item.name == "Console"]
    assert prints == []


def test_a_warning_that_a_library_logs_goes_the_same_way(capsys: pytest.CaptureFixture[str]) -> None:
    handler = TerminalHandler(logging.WARNING)
    handler.handle(logging.LogRecord("library", logging.WARNING, "file", 1, "header %r: %s", ("x", HOSTILE), None))
    shown = capsys.readouterr().err
    assert "before" in shown
    assert CONTROL.findall(shown) == []
