"""Reads the conversation of a data row: its messages, the tools that the assistant may call, and arguments of the chat
template. `conversations.py` calls `read_conversation`.

The published formats of conversations (OpenAI, ShareGPT, trl) differ in names and shapes. All of them are converted to
the one form that chat templates read. docs/data.md lists what happens to each field.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from finetune_core.api.dataset import KNOWN_ROLES, MessagesFormat
from finetune_core.errors import valid_text
from finetune_core.row_templates import HALF_PAIR, NOT_FINITE
from finetune_trainer.data.files.row import repeated

Message = Mapping[str, Any]

SYSTEM_COLUMN = "system"
"""Column with the text of a system message that comes before the messages."""
ARGUMENTS_COLUMN = "chat_template_kwargs"
"""Column with arguments of the chat template for one row, as trl reads them."""
REFUSED_COLUMNS = {
    "functions": "OpenAI's older form of tools: list the functions in the tools column",
    "images": "only text is learned",
    "audios": "only text is learned",
    "videos": "only text is learned",
    "documents": "put their text into a message",
}
"""Columns that other tools read beside the messages, each with the reason why a row with a value in this column is
refused."""
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
"""Names of the field of a message that holds the thoughts of the assistant. A template gets the field under the name
that the row uses."""


OPENED = "<think>"
"""Tag with which some templates open the thoughts of an answer. Rows may have the tag in the content of an answer."""
CLOSED = "</think>"


class _ProblemError(Exception):
    """What is wrong with a row, as a phrase that follows the place of the row."""


@dataclass(frozen=True)
class Conversation:
    """The conversation of a row in the form that chat templates read."""

    messages: Sequence[Message]
    """Each message has a `role` and no field that is null. `content`, where it is present, is a text or a list of text
    parts. The arguments of tool calls are JSON objects."""
    weights: Sequence[int]
    """1 for each message of the assistant that may be learned, and 0 for all others. If `learn` is Everything, all
    messages are learned, whatever their weight."""
    first_number: int
    """Number of the first of `messages` in texts for people: 1, or 0 where the first message comes from another
    column."""
    tools: Sequence[Mapping[str, Any]]
    arguments: Mapping[str, Any]
    """Arguments of the chat template that the row has."""


def optional_columns(form: MessagesFormat) -> list[str]:
    """Return the columns that are read where a row has them, besides the column of the messages."""
    return [form.tools_field, SYSTEM_COLUMN, ARGUMENTS_COLUMN, *REFUSED_COLUMNS]


def read_conversation(fields: Mapping[str, Any], form: MessagesFormat) -> Conversation | str:
    """Return the conversation in the columns ``fields`` of a row. For a bad row, return a phrase with the problem."""
    try:
        return _conversation(fields, form)
    except _ProblemError as problem:
        return str(problem)


def _conversation(fields: Mapping[str, Any], form: MessagesFormat) -> Conversation:
    for column, reason in REFUSED_COLUMNS.items():
        if fields.get(column) and column not in (form.messages_field, form.tools_field):
            raise _ProblemError(f"has {column!r}, which is not read ({reason})")
    found = fields.get(form.messages_field)
    if found is None:
        raise _ProblemError(f"has no {form.messages_field!r}")
    found = _parsed(found, repr(form.messages_field))
    if not isinstance(found, list) or not all(isinstance(message, dict) for message in found):
        raise _ProblemError(f"has a {form.messages_field!r} that is not a list of messages")
    read = [_message(message, number, form) for number, message in enumerate(found, start=1)]
    messages, weights = [message for message, _ in read], [weight for _, weight in read]
    _check_call_ids(messages)
    system = fields.get(SYSTEM_COLUMN) if form.messages_field != SYSTEM_COLUMN else None
    if system:
        if not _is_text(system):
            raise _ProblemError(f"has a {SYSTEM_COLUMN!r} that is not text")
        if messages and messages[0]["role"] == "system":
            raise _ProblemError(f"has a system message both in {SYSTEM_COLUMN!r} and in {form.messages_field!r}")
        messages, weights = [{"role": "system", "content": system}, *messages], [0, *weights]
    arguments = _parsed(fields.get(ARGUMENTS_COLUMN) or {}, repr(ARGUMENTS_COLUMN))
    if not isinstance(arguments, dict):
        raise _ProblemError(f"has a {ARGUMENTS_COLUMN!r} that is not an object")
    if not _is_valid(arguments):
        raise _ProblemError(f"has a {ARGUMENTS_COLUMN!r} that is not an object of JSON values{_reason(arguments)}")
    # Arguments that are null are left out. Parquet adds such an argument to a row if other rows of the file have the
    # argument.
    arguments = {name: value for name, value in arguments.items() if value is not None}
    tools = _tools(fields.get(form.tools_field), form.tools_field)
    return Conversation(messages, weights, 0 if system else 1, tools, arguments)


def _parsed(value: Any, place: str) -> Any:
    """Return ``value``, or its parsed content where it is JSON text: csv files have no lists, and parquet files have no
    objects whose keys differ from row to row. Text that is not JSON is returned as it is.

    Raises _ProblemError, which names ``place``, for a key that occurs twice in one object, because one of the two
    values would be lost.
    """
    if not isinstance(value, str):
        return value

    def as_object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise _ProblemError(f"has JSON text with the key {repeated(name for name, _ in pairs)!r} twice in {place}")
        return found

    try:
        return json.loads(value, object_pairs_hook=as_object)
    except (ValueError, RecursionError):
        return value


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and valid_text(value) == value


def _is_valid(value: Any) -> bool:
    """Return whether ``value`` is a JSON value in which no text has half of a surrogate pair. Parquet files may also
    hold values that are not JSON, such as dates, and Python's parser of JSON takes NaN and Infinity, which are not
    JSON, and makes an infinity of a number as large as 1e999."""
    # The loop uses a list instead of recursion, because JSON may be nested more deeply than Python functions may call
    # each other.
    left = [value]
    while left:
        value = left.pop()
        if isinstance(value, dict):
            left += [*value, *value.values()]
        elif isinstance(value, list | tuple):
            left += value
        elif isinstance(value, str):
            if not _is_text(value):
                return False
        elif not (value is None or isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))):
            return False
    return True


def _message(found: Mapping[str, Any], number: int, form: MessagesFormat) -> tuple[Message, int]:
    """Return message ``number`` in the form that templates read, and 1 if it may be learned, else 0."""
    # Fields that are null are left out. Parquet adds such fields to a message if other messages of the file have them,
    # and OpenAI's API returns them.
    message = {key: value for key, value in found.items() if value is not None}
    if "from" in message and "role" not in message:
        message["role"] = message.pop("from")
        if "value" in message and "content" not in message:
            message["content"] = message.pop("value")
        _read_tools_of_sharegpt(message, number, form)
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise _ProblemError(f"has no role in message {number}")
    message["role"] = role = {**KNOWN_ROLES, **form.roles}.get(role, role)
    weight = message.pop("weight", None)
    if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
        raise _ProblemError(f"has a weight in message {number} that is not 0 or 1")
    if weight and role != "assistant" and form.learn != "Everything":
        raise _ProblemError(f"has weight 1 in message {number}, which is not of the assistant")
    if weight == 0 and form.learn == "Everything":
        raise _ProblemError(f"has weight 0 in message {number}, although dataset.format.messages.learn is Everything")
    thoughts = [name for name in THOUGHTS if name in message]
    for name in thoughts[1:]:
        # Some servers return the same thoughts under two names. A template reads only one of the names.
        if message[name] == message[thoughts[0]]:
            del message[name]
    calls = _calls(message, number)
    message.pop("tool_calls", None)
    if calls:
        message["tool_calls"] = calls
    _set_content(message, number)
    half = next((key for key, value in message.items() if key != "role" and not _is_valid([key, value])), None)
    if half is not None:
        what = f"no text as {half}" if half == "content" else f"no JSON as {half!r}"
        raise _ProblemError(f"has {what} of message {number}{_reason(message[half])}")
    return message, int(role == "assistant" and weight != 0)


def _read_tools_of_sharegpt(message: dict[str, Any], number: int, form: MessagesFormat) -> None:
    """Translate two roles of ShareGPT in ``message``. `observation` becomes the role `tool`. `function_call` becomes
    the role `assistant`, and its content, which is JSON text, becomes the tool calls. A role that the job lists in
    `roles` is left as it is."""
    if message["role"] in form.roles:
        return
    if message["role"] == "observation":
        message["role"] = "tool"
    elif message["role"] == "function_call":
        found = _parsed(message.pop("content", None), f"message {number}")
        calls = found if isinstance(found, list) else [found]
        if "tool_calls" in message or not calls or not all(isinstance(call, dict) for call in calls):
            raise _ProblemError(f"has a function_call in message {number} that is no JSON object")
        message |= {"role": "assistant", "tool_calls": calls}


def _reason(value: Any) -> str:
    """Return why ``value`` is not valid (see `_is_valid`), in brackets, or an empty text if the reason is obvious."""
    if "\\ud" in ascii(value):
        return f" ({HALF_PAIR})"
    left = [value]
    while left:
        value = left.pop()
        if isinstance(value, dict):
            left += value.values()
        elif isinstance(value, list | tuple):
            left += value
        elif isinstance(value, float) and not math.isfinite(value):
            return f" ({NOT_FINITE})"
    return ""


def _set_content(message: dict[str, Any], number: int) -> None:
    """Check the content of ``message``. If it is a list, give each part exactly the fields `type` and `text`. If
    ``message`` calls tools and its content is empty, remove the content."""
    content = message.get("content")
    if isinstance(content, list):
        for part in content:
            kind = part.get("type", "text") if isinstance(part, dict) else None
            if kind != "text" and isinstance(kind, str):
                raise _ProblemError(f"has a part of type {kind!r} in message {number}: only text is learned")
            if kind != "text" or not isinstance(part.get("text"), str):
                raise _ProblemError(f"has no text as content of message {number}")
            unknown = next((key for key in part if key not in ("type", "text") and part[key] is not None), None)
            if unknown is not None:
                raise _ProblemError(f"has a part with the field {unknown!r} in message {number}, which is not read")
        message["content"] = [{"type": "text", "text": part["text"]} for part in content]
    elif (content is not None and not isinstance(content, str)) or (content is None and "tool_calls" not in message):
        raise _ProblemError(f"has no text as content of message {number}")
    says_something = content_text(message).strip() or "tool_calls" in message
    if message["role"] == "assistant" and not says_something:
        raise _ProblemError(f"has an empty answer in message {number}")
    if "tool_calls" in message and not content:
        message.pop("content", None)


def content_text(message: Message) -> str:
    """Return the content of a message as one text. The texts of a list of parts are joined."""
    content = message.get("content") or ""
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def _calls(message: dict[str, Any], number: int) -> list[dict[str, Any]]:
    """Return the tool calls of ``message``, with their arguments as JSON objects. A call in OpenAI's older field
    `function_call` is returned too, and the field is removed from ``message``."""
    calls = _parsed(message.get("tool_calls", []), f"message {number}")
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise _ProblemError(f"has tool_calls in message {number} that are not a list of calls")
    old = _parsed(message.pop("function_call", None), f"message {number}")
    if old is not None:
        if calls or not isinstance(old, dict):
            raise _ProblemError(f"has a function_call in message {number} that is not the only call")
        calls = [{"type": "function", "function": old}]
    if calls and message["role"] != "assistant":
        raise _ProblemError(f"has tool_calls in message {number}, which is not of the assistant")
    return [_call(call, number) for call in calls]


def _call(found: Mapping[str, Any], number: int) -> dict[str, Any]:
    """Return a tool call as `{"type": "function", "function": {"name": ..., "arguments": {...}}}`, with the `id` that
    ``found`` has. If ``found`` has no field `function`, `name` and `arguments` are its own fields."""
    call = {key: value for key, value in found.items() if value is not None and key != "index"}
    function = call.pop("function", None)
    if function is None:
        function = {key: call.pop(key) for key in ("name", "arguments") if key in call}
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise _ProblemError(f"has a tool call without a name in message {number}")
    function = {key: value for key, value in function.items() if value is not None}
    unknown = [key for key in (*call, *function) if key not in ("id", "type", "name", "arguments")]
    if unknown or call.get("type", "function") != "function":
        problem = f"the field {unknown[0]!r}" if unknown else f"the type {call['type']!r}"
        raise _ProblemError(f"has a tool call with {problem} in message {number}, which no chat template reads")
    arguments = function.get("arguments", {})
    arguments = {} if arguments == "" else _parsed(arguments, f"message {number}")
    if not isinstance(arguments, dict):
        raise _ProblemError(f"has arguments of a tool call in message {number} that are not a JSON object")
    name = function["name"]
    return {"type": "function", **call, "function": {"name": name, "arguments": arguments}}


def _check_call_ids(messages: Sequence[Message]) -> None:
    """Raise _ProblemError if a message answers a tool call that no message before it has. If there are calls before it
    and none of them has an id, the id of the answer has nothing to be compared with, and the answer is accepted."""
    known: set[Any] = set()
    has_calls = False
    for number, message in enumerate(messages, start=1):
        calls = message.get("tool_calls", ())
        has_calls = has_calls or bool(calls)
        known.update(str(call["id"]) for call in calls if "id" in call)
        answered = message.get("tool_call_id")
        if answered is not None and str(answered) not in known and (known or not has_calls):
            raise _ProblemError(f"has a tool_call_id in message {number} that no tool call before it has")


def _tools(found: Any, column: str) -> list[dict[str, Any]]:
    """Return the tools of a row. ``found`` is the value of the column ``column``: a list of tools, or JSON text of such
    a list."""
    found = _parsed(found or [], repr(column))
    if not isinstance(found, list) or not all(isinstance(tool, dict) and tool for tool in found):
        raise _ProblemError(f"has a {column!r} that is not a list of tools")
    tools = [_without_null(tool) for tool in found]
    for tool in tools:
        function = tool.get("function", tool)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise _ProblemError(f"has a tool without a name in {column!r}")
    if not _is_valid(tools):
        raise _ProblemError(f"has a {column!r} that is not JSON{_reason(tools)}")
    return tools


def _without_null(schema: Any) -> Any:
    """Return a JSON Schema without the keywords that are null. Parquet adds such keywords to a schema if another schema
    of the file has them. Only `default` and `const` have a meaning where they are null, so these two stay."""
    if isinstance(schema, list):
        return [_without_null(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {key: value for key, value in schema.items() if value is not None or key in ("default", "const")}
    return {key: _without_null(value) for key, value in kept.items()}
