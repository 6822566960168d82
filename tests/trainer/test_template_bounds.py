"""A chat template is a program that a stranger may have written. Whatever a template does, the result is an example, a
sentence about the row, or a sentence about the job, within bounds of time and memory."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from finetune_core.api.dataset import DatasetFormat, DatasetSpec
from finetune_core.errors import UserError
from finetune_trainer.data.chat import chat_template, template_process, template_variables
from finetune_trainer.data.chat.chat_template import use_chat_template
from finetune_trainer.data.chat.template_process import MEMORY_BYTES, TemplateLimitError, TemplateProcess
from finetune_trainer.data.dataset import LengthLimit, make_examples
from finetune_trainer.data.files.row import Row
from finetune_trainer.data.tokenizer import tokenize_functions
from finetune_trainer.pod.errors import OutsideFailure
from tests.trainer.chat import byte_tokenizer, rendered

TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
APPENDING = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
UNINTERRUPTIBLE = "{% set n = namespace(x=3) %}{% for i in range(40) %}{% set n.x = n.x * n.x %}{% endfor %}"
HUGE = (
    "{{ 'a' * 10000000000 }}",
    "{% set x = 'a' * 1000000000 %}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '{:1000000000}'.format(1) }}",
    "{{ messages | tojson(indent=1000000000) }}",
    "{{ messages[0].content | center(10000000000) }}",
    "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
)


def outcome(template: str, messages: object = TALK) -> str:
    """Return what becomes of a row with ``template``: `examples`, or a sentence about the row or the job."""
    tokenizer = byte_tokenizer("")
    tokenizer.chat_template = template
    try:
        use_chat_template(tokenizer, DatasetFormat.model_validate({"messages": {}}), Path())
        found = rendered(tokenizer, {"messages": messages})
    except UserError as error:
        return str(error)
    return found if isinstance(found, str) else "examples"


def peak_memory() -> int:
    """Return the largest memory in bytes that this process had so far."""
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) << 10


@pytest.mark.parametrize("template", HUGE)
def test_a_template_that_takes_much_memory_is_a_sentence_and_takes_it_from_nobody(template: str) -> None:
    outcome(APPENDING)
    before = peak_memory()
    limit = f"the chat template takes more than {MEMORY_BYTES >> 20} MiB of memory for one row"
    assert outcome(APPENDING + template) == f"dataset.format.messages: {limit}"
    assert peak_memory() - before < MEMORY_BYTES // 4


@pytest.mark.parametrize("template", [ENDLESS, UNINTERRUPTIBLE])
def test_a_template_that_does_not_end_is_a_sentence_also_in_a_thread_and_where_no_signal_interrupts_it(
    template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The workers prepare the rows in a thread, in which Python runs no signal handlers."""
    monkeypatch.setattr(chat_template, "RENDER_SECONDS", 0.2)
    found: list[str] = []
    thread = threading.Thread(target=lambda: found.append(outcome(APPENDING + template)))
    thread.start()
    thread.join()
    assert found == ["dataset.format.messages: the chat template takes more than 0 s for one row"]


def test_many_blanks_behind_an_answer_are_decoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = byte_tokenizer("")
    tokenizer.chat_template = APPENDING + "{% if not add_generation_prompt %}{{ '\\n ' * 100000 }}{% endif %}"
    asked: list[list[int]] = []
    decode = tokenizer.decode

    def counted(ids: list[int]) -> str:
        asked.append(ids)
        return str(decode(ids))

    monkeypatch.setattr(tokenizer, "decode", counted)
    rendered(tokenizer, {"messages": TALK})
    assert 0 < len(asked) < 10


def test_the_row_at_which_a_template_reaches_a_limit_is_named() -> None:
    spec = DatasetSpec.model_validate(
        {"train": {"volume": {"claimName": "c", "path": "a.jsonl"}}, "format": {"messages": {}}, "badRows": "Skip"}
    )
    template = APPENDING + "{% if messages[0].content == 'x' %}{{ 'a' * 1000000000 }}{% endif %}"
    rows = [Row(number, {"messages": [{**TALK[0], "content": text}, TALK[1]]}) for number, text in enumerate("abx", 1)]
    with pytest.raises(UserError, match=r"^dataset.format.messages: .* of memory for one row \(a.jsonl line 3\)$"):
        make_examples(
            rows,
            "a.jsonl",
            "dataset.train",
            spec,
            tokenize_functions(byte_tokenizer(template)),
            limit=LengthLimit(99, ""),
        )


def test_a_template_that_is_nested_too_deeply_is_a_sentence() -> None:
    for template in ("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "{% if x %}" * 900 + "{% endif %}" * 900):
        assert outcome(template).startswith("dataset.format.messages.chatTemplate: is no chat template: ")
    for depth in (20, 60, 95, 150, 190):
        found = outcome(APPENDING + "{% if messages %}" * depth + "{% endif %}" * depth)
        assert found == "examples" or found.startswith("can't be rendered by the model's chat template: ")


def ended_by(number: int) -> Callable[[], None]:
    def end() -> None:
        # A shell starts a program in the background with SIGQUIT ignored, and forked processes ignore SIGQUIT too.
        if number != signal.SIGKILL:
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    return end


def test_whatever_ends_the_process_of_a_template_is_told_apart() -> None:
    for number in (signal.SIGTRAP, signal.SIGQUIT):
        with pytest.raises(ValueError, match=rf"^it ends the process that reads it \({number.name}\)$"):
            TemplateProcess(ended_by(number), seconds=9).call()
    # The kernel ends processes with SIGKILL where a pod has no memory left.
    with pytest.raises(MemoryError):
        TemplateProcess(ended_by(signal.SIGKILL), seconds=9).call()
    with pytest.raises(TemplateLimitError, match=r"^takes more than 9 s$"):
        TemplateProcess(ended_by(signal.SIGPROF), seconds=9).call()
    with pytest.raises(ValueError, match=r"^it ends the process that reads it \(without a signal\)$"):
        TemplateProcess(lambda: os._exit(0), seconds=9).call()


@pytest.mark.parametrize("size", [1, 8 << 20], ids=["no answer", "a question that it does not take"])
def test_a_process_that_stands_still_is_an_outside_failure_and_is_made_anew(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(template_process, "PATIENCE_SECONDS", 0.6)
    process = TemplateProcess(lambda _: os.getpid(), seconds=9)
    child = process.call("")
    os.kill(child, signal.SIGSTOP)
    sentence = r"^the process that renders the chat template stood still for 1 s$"
    with pytest.raises(OutsideFailure, match=sentence):
        process.call("x" * size)
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)
    assert process.call("") not in (child, os.getpid())


def test_a_process_that_can_not_be_started_is_an_outside_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> int:
        raise OSError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", refuse)
    with pytest.raises(OutsideFailure, match=r"^no process can be started for the chat template: Resource temporarily"):
        TemplateProcess(str, seconds=9).call(1)


def test_a_process_goes_on_after_an_error_is_made_anew_after_its_end_and_leaves_nothing_behind() -> None:
    def answer(question: str) -> Any:
        if question == "end":
            os._exit(0)
        return (os.getpid(), int(question))

    process = TemplateProcess(answer, seconds=9)
    first, _ = process.call("1")
    with pytest.raises(ValueError, match="invalid literal for int"):
        process.call("one")
    assert process.call("2") == (first, 2)
    with pytest.raises(ValueError, match="it ends the process"):
        process.call("end")
    second, _ = process.call("3")
    assert second not in (first, os.getpid())
    del process
    for child in (first, second):
        with pytest.raises(ProcessLookupError):
            os.kill(child, 0)


NAMES = st.sampled_from(
    ["messages", "tools", "m", "x", "loop", "namespace", "range", "dict", "lipsum", "cycler", "self"]
)
LITERALS = st.sampled_from(
    ["1", "0", "-1", "99999", "10000000000", "1.5e300", "'a'", "'<|end|>'", "none", "true", "[]"]
)
OPERATORS = st.sampled_from(["+", "-", "*", "/", "//", "%", "~", "==", "<", " in ", " and "])
ATTRIBUTES = st.sampled_from(["content", "role", "items()", "x", "__class__", "format(1)", "split('')"])
FILTERS = st.sampled_from(
    [
        "tojson",
        "length",
        "list",
        "join",
        "string",
        "int",
        "upper",
        "center(9999999999)",
        "batch(2)",
        "first",
        "map('upper')",
        "sort",
        "reverse",
        "trim",
        "indent(3)",
        "random",
        "nope",
        "replace('a','aaaaaaaaa')",
    ]
)
EXPRESSIONS = st.recursive(
    NAMES | LITERALS,
    lambda inner: st.one_of(
        st.tuples(inner, OPERATORS, inner).map(lambda parts: f"({''.join(parts)})"),
        st.tuples(inner, ATTRIBUTES).map(lambda parts: f"{parts[0]}.{parts[1]}"),
        st.tuples(inner, FILTERS).map(lambda parts: f"{parts[0]}|{parts[1]}"),
        st.tuples(inner, inner).map(lambda parts: f"{parts[0]}[{parts[1]}]"),
        st.tuples(inner, inner).map(lambda parts: f"{parts[0]}({parts[1]})"),
        st.lists(inner, max_size=3).map(lambda items: f"[{', '.join(items)}]"),
    ),
    max_leaves=6,
)
BODIES = st.recursive(
    st.sampled_from(["text", "\n", "<|end|>", "{#", "{{", "%}", "{% break %}", APPENDING])
    | EXPRESSIONS.map(lambda found: f"{{{{ {found} }}}}")
    | EXPRESSIONS.map(lambda found: f"{{% set x = {found} %}}"),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map("".join),
        st.tuples(EXPRESSIONS, inner).map(lambda p: f"{{% for m in {p[0]} %}}{p[1]}{{% endfor %}}"),
        st.tuples(EXPRESSIONS, inner).map(lambda p: f"{{% if {p[0]} %}}{p[1]}{{% endif %}}"),
        inner.map(lambda body: f"{{% macro m() %}}{body}{{{{ m() }}}}{{% endmacro %}}{{{{ m() }}}}"),
        inner.map(lambda body: f"{{% filter upper %}}{body}{{% endfilter %}}"),
    ),
    max_leaves=6,
)


SENTENCES = (
    "can't be rendered by the model's chat template: ",
    "has ",
    "begins with ",
    "dataset.format.messages: the chat template takes more than ",
    "dataset.format.messages: the model's tokenizer has no chat template",
    "dataset.format.messages.chatTemplate: ",
)


def check_templates(examples: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "RENDER_SECONDS", 0.2)
    monkeypatch.setattr(template_variables, "SECONDS", 0.5)

    @given(BODIES | st.text("{}%#-|.()[]'=+* \nmessagxfori", max_size=40))
    @example(APPENDING)
    @settings(max_examples=examples)
    def check(template: str) -> None:
        found = outcome(template)
        assert "\n" not in found
        assert found == "examples" or found.startswith(SENTENCES)

    check()


def test_any_template_is_an_example_or_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    check_templates(25, monkeypatch)


@pytest.mark.long
def test_any_of_many_templates_is_an_example_or_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    check_templates(3000, monkeypatch)
