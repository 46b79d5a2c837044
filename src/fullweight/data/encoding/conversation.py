"""From the messages of a file to the checked, ordered messages that the encoding renders.

Everything that can be wrong with a conversation is found here, before any text is made. Tool results and
neighbouring user messages become one user message, results in the order of the calls they answer. A
`<think>...</think>` block at the start of an assistant's content becomes its reasoning.

Stricter than the published encoder, which drops or misrenders these silently; each raises DataError: unknown
keys, a task that no answer follows or that a merge would lose, call arguments that are not a JSON object, a
result that answers no call, an answer that follows no question. Keys that are null or empty count as absent
(columnar files fill them in). Content is a string or a list of text blocks, `{"type": "text", "text": ...}`, which
are joined as the encoding joins blocks (the encoder does so in user messages and tool results; here in every
role). Images and other kinds of block are refused by name.

Source: merge_tool_messages and sort_tool_results_by_call_order of the released encoding_dsv4.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fullweight.core.config import nearest
from fullweight.core.errors import DataError
from fullweight.core.strict_json import parse_json
from fullweight.data.encoding import Encoding

_ROLE_KEYS: dict[str, set[str]] = {
    "system": {"tools", "response_format"},
    "developer": {"tools", "response_format", "task"},
    "user": {"task", "wo_eos"},
    "assistant": {"reasoning_content", "tool_calls", "task", "wo_eos"},
    "tool": {"tool_call_id"},
    "latest_reminder": set(),
}
BLOCK_SEPARATOR = "\n\n"  # of all encodings so far
_COMMON_KEYS = {"role", "content", "mask", "train"}
_IGNORED_KEYS = {"id", "name", "type", "metadata", "timestamp"}
_THINKING = re.compile(r"\s*<think>\n*(.*?)\n*</think>\n*(.*)", re.DOTALL)
_UNSAFE_NAME = re.compile(r'["<>\r\n]')


@dataclass(frozen=True)
class ToolCall:
    """One call; `arguments` is the parsed JSON object."""

    id: str
    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Block:
    """A part of a user message: text, or the result of the call `call_id`."""

    text: str
    is_result: bool = False
    call_id: str = ""


@dataclass(frozen=True)
class Message:
    """A checked message. Only a user message has blocks; only an assistant's may be trained."""

    role: str
    where: str
    content: str = ""
    blocks: tuple[Block, ...] = ()
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    tools: tuple[str, ...] = ()  # one JSON schema each
    response_format: str = ""  # JSON
    task: str | None = None
    wo_eos: bool = False
    trained: bool = False


def parse_conversation(sample: Mapping[str, Any], encoding: Encoding) -> list[Message]:
    """Checked messages of a sample, user turns merged; raises DataError naming sample and message."""
    label = sample_label(sample)
    raw = sample.get("messages")
    if not isinstance(raw, Sequence) or isinstance(raw, str) or not raw:
        raise DataError(f"{label}: messages must be a non-empty list, found {_show(raw)}")
    messages = [_parse_message(message, f"{label}, message {i + 1}", encoding) for i, message in enumerate(raw)]
    messages = _with_tools(messages, _tool_schemas(sample.get("tools"), label), label)
    _check_order(messages)
    return _merge_user_turns(messages)


def sample_label(sample: Mapping[str, Any]) -> str:
    """How messages name a sample: by its id, where it has one."""
    return f"sample {sample['id']!r}" if sample.get("id") else "sample"


def content_text(content: Any, where: str, separator: str = BLOCK_SEPARATOR) -> str:
    """The text of a message's content: None, a string, or a list of text blocks, joined by `separator`.

    Raises DataError for anything else, naming the kind of block.
    """
    if not isinstance(content, list | tuple):
        return _string(content, "content", where)
    texts = []
    for number, block in enumerate(content, 1):
        kind = block.get("type") if isinstance(block, Mapping) else None
        if kind is not None and kind != "text":
            raise DataError(
                f"{where}: content block {number} is of type {kind!r}, and this model reads text only; remove the "
                "block or leave the sample out"
            )
        if kind is None or not isinstance(block.get("text"), str):
            raise DataError(
                f'{where}: content block {number} must be like {{"type": "text", "text": "..."}}, '
                f"found {_show(block)}"
            )
        texts.append(block["text"])
    return separator.join(texts)


def _parse_message(raw: Any, where: str, encoding: Encoding) -> Message:
    if not isinstance(raw, Mapping):
        raise DataError(f"{where}: expected an object with role and content, found {_show(raw)}")
    role = raw.get("role")
    if not isinstance(role, str) or role not in _ROLE_KEYS:
        hint = nearest(str(role), list(_ROLE_KEYS))
        raise DataError(f"{where}: encoding {encoding.name} knows no role {role!r}; {hint}")
    where = f"{where} ({role})"
    values = {key: value for key, value in raw.items() if not _absent(key, value)}
    known = _COMMON_KEYS | _ROLE_KEYS[role]
    for key in values.keys() - known - _IGNORED_KEYS:
        raise DataError(f"{where}: key {key!r} has no meaning here; {nearest(key, sorted(known))}")
    message = Message(
        role=role,
        where=where,
        content=content_text(raw.get("content"), where, encoding.fill("block_separator")[0].text),
        tools=_tool_schemas(values.get("tools"), where),
        response_format=_response_format(values.get("response_format"), where),
        task=_task(values.get("task"), role, where, encoding),
        wo_eos=_flag(values, "wo_eos", where, default=False),
        trained=_trained(values, role, where),
    )
    if role == "assistant":
        return _parse_assistant(message, raw, where)
    if not message.content.strip() and not (role == "tool" or message.tools or message.response_format):
        missing = "is missing" if raw.get("content") is None else "is empty"
        raise DataError(f"{where}: content {missing}; give it a text or remove the message")
    if role in ("user", "tool"):
        block = Block(message.content, role == "tool", str(values.get("tool_call_id", "")))
        return replace(message, blocks=(block,))
    return message


def _parse_assistant(message: Message, raw: Mapping[str, Any], where: str) -> Message:
    calls = tuple(_tool_call(call, where) for call in _list(raw.get("tool_calls"), "tool_calls", where))
    content, reasoning = message.content, _string(raw.get("reasoning_content"), "reasoning_content", where)
    if raw.get("reasoning_content") is None:
        reasoning, content = _split_thinking(content, where)
    elif content.lstrip().startswith("<think>") and reasoning:
        raise DataError(f"{where}: reasoning both in reasoning_content and as <think> in content; keep one")
    if not (content or calls):
        missing = "is missing" if raw.get("content") is None else "is empty"
        raise DataError(f"{where}: content {missing} and there is no tool call; nothing was answered")
    return replace(message, content=content, reasoning=reasoning, tool_calls=calls)


def _split_thinking(content: str, where: str) -> tuple[str, str]:
    """(reasoning, content); newlines beside the two tags belong to the tags."""
    opens = content.lstrip().startswith("<think>")
    found = _THINKING.fullmatch(content)
    if opens and found:
        return found[1], found[2]
    if opens:
        raise DataError(f"{where}: <think> is never closed; end the reasoning with </think> or drop the sample")
    if "</think>" in content and "<think>" not in content:
        raise DataError(f"{where}: </think> without <think>; put the reasoning into reasoning_content")
    return "", content


def _tool_call(raw: Any, where: str) -> ToolCall:
    function = raw.get("function", raw) if isinstance(raw, Mapping) else None
    if not isinstance(function, Mapping):
        raise DataError(f"{where}: a tool call is an object with function.name, found {_show(raw)}")
    name, arguments = _safe_name(function.get("name"), "tool call name", where), function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = parse_json(arguments)
        except ValueError as error:
            raise DataError(f"{where}: arguments of {name} are {error}") from None
    if not isinstance(arguments, dict):
        raise DataError(f"{where}: arguments of {name} must be a JSON object, found {_show(arguments)}")
    _json(arguments, f"{where}: arguments of {name}")
    for key in arguments:
        _safe_name(key, f"parameter name of {name}", where)
    return ToolCall(str(raw.get("id") or function.get("id") or ""), name, arguments)


def _tool_schemas(raw: Any, where: str) -> tuple[str, ...]:
    """JSON of each function's schema, from OpenAI-style tools (a list, or its JSON text)."""
    if isinstance(raw, str) and raw:
        try:
            raw = parse_json(raw)
        except ValueError as error:
            raise DataError(f"{where}: tools are {error}") from None
    schemas = []
    for tool in _list(raw, "tools", where):
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping):
            raise DataError(f"{where}: a tool is an object with function.name, found {_show(tool)}")
        _safe_name(function.get("name"), "tool name", where)
        schemas.append(_json(function, f"{where}: tools"))
    return tuple(schemas)


def _response_format(raw: Any, where: str) -> str:
    return "" if raw is None else _json(raw, f"{where}: response_format")


def _with_tools(messages: list[Message], tools: tuple[str, ...], label: str) -> list[Message]:
    """The sample's own tools go to its leading system message, or to an empty one put before the rest."""
    if not tools:
        return messages
    if any(message.tools for message in messages):
        raise DataError(f"{label}: tools both on the sample and on a message; keep one")
    if messages[0].role == "system":
        return [replace(messages[0], tools=tools), *messages[1:]]
    return [Message("system", label, tools=tools), *messages]


def _check_order(messages: list[Message]) -> None:
    """Every assistant message answers something, and every task is answered (or ends the list)."""
    answerable = False
    for i, message in enumerate(messages):
        following = messages[i + 1].role if i + 1 < len(messages) else None
        if message.task and following not in (None, "assistant"):
            raise DataError(
                f"{message.where}: task {message.task!r} must be answered by the next message, "
                f"an assistant's; found one of {following}"
            )
        if message.role == "assistant":
            if not answerable:
                raise DataError(
                    f"{message.where}: it answers nothing; it must follow a user, developer or tool message "
                    "or an assistant message with a task (merge two assistant messages in a row into one)"
                )
            answerable = message.task is not None
        elif message.role != "latest_reminder":
            answerable = message.role != "system"


def _merge_user_turns(messages: list[Message]) -> list[Message]:
    merged: list[Message] = []
    calls: dict[str, int] = {}
    for message in messages:
        if message.tool_calls:
            calls = {call.id: i for i, call in enumerate(message.tool_calls) if call.id}
        if not message.blocks:
            merged.append(message)
            continue
        _check_answers_call(message, calls)
        last = merged[-1] if merged else None
        if last is None or last.role != "user":
            merged.append(replace(message, role="user"))
            continue
        if message.task:
            raise DataError(
                f"{message.where}: its task {message.task!r} would be lost, because it merges into "
                "the user turn before it; join the two messages"
            )
        merged[-1] = replace(last, blocks=_in_call_order((*last.blocks, *message.blocks), calls))
    return merged


def _check_answers_call(message: Message, calls: dict[str, int]) -> None:
    call_id = message.blocks[0].call_id
    if call_id and calls and call_id not in calls:
        raise DataError(
            f"{message.where}: tool_call_id {call_id!r} answers no call of the assistant before it; "
            f"{nearest(call_id, list(calls))}"
        )


def _in_call_order(blocks: tuple[Block, ...], calls: dict[str, int]) -> tuple[Block, ...]:
    results = iter(sorted((b for b in blocks if b.is_result), key=lambda b: calls.get(b.call_id, 0)))
    return tuple(next(results) if block.is_result else block for block in blocks)


def _task(raw: Any, role: str, where: str, encoding: Encoding) -> str | None:
    if raw is None:
        return None
    if not isinstance(raw, str) or raw not in encoding.tasks:
        raise DataError(f"{where}: unknown task {raw!r}; {nearest(str(raw), list(encoding.tasks))}")
    expected = encoding.tasks[raw].on
    if (role == "assistant") != (expected == "assistant"):
        raise DataError(f"{where}: task {raw!r} belongs on a message of the {expected}")
    return raw


def _trained(values: Mapping[str, Any], role: str, where: str) -> bool:
    """Whether to train the message: false where `mask` or `train` is false; only an assistant's can be."""
    asked = [_flag(values, key, where, default=True) for key in ("mask", "train") if key in values]
    if role != "assistant":
        if any(asked):
            raise DataError(f"{where}: only what an assistant says can be trained; remove mask or train")
        return False
    if len(set(asked)) > 1:
        raise DataError(f"{where}: mask and train contradict each other; give one (false: do not train)")
    return all(asked)


def _absent(key: str, value: Any) -> bool:
    return value is None or value in ([], {}, "") or (value is False and key not in ("mask", "train"))


def _flag(values: Mapping[str, Any], key: str, where: str, default: bool) -> bool:
    value = values.get(key, default)
    if not isinstance(value, bool) and value not in (0, 1):
        raise DataError(f"{where}: {key} must be true or false, found {_show(value)}")
    return bool(value)


def _string(value: Any, what: str, where: str) -> str:
    if value is not None and not isinstance(value, str):
        raise DataError(f"{where}: {what} must be a string, found {_show(value)}")
    return value or ""


def _list(value: Any, key: str, where: str) -> list[Any]:
    if value is None or value == "":
        return []
    if not isinstance(value, list | tuple):
        raise DataError(f"{where}: {key} must be a list, found {_show(value)}")
    return list(value)


def _safe_name(name: Any, what: str, where: str) -> str:
    if not isinstance(name, str) or not name or _UNSAFE_NAME.search(name):
        raise DataError(f'{where}: {what} must be a string without ", <, > or line breaks, found {_show(name)}')
    return name


def _json(value: Any, where: str) -> str:
    """The value as the model reads it; raises DataError for what no JSON text can hold."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:  # bytes or a date of a columnar file; NaN and infinities
        raise DataError(f"{where}: {error}; only what JSON can hold has a rendering") from None


def _show(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text[:60]}{'...' if len(text) > 60 else ''}"
