"""Conversations to segments to tokens, with the loss mask: what the model reads and what it learns to write.

Trained is what the model emits: everything after a turn's prefix (`<｜Assistant｜><think>`,
`<｜Assistant｜></think>` or a task token) to the end-of-sentence token, that token and the closing `</think>`
included. An assistant message with `"train": false` (or the vendor's field, `"mask": false`) is rendered but
not trained.

Without tools, a thinking model reads earlier turns without their reasoning, so a turn is seen as it will be
at inference only when it is the last one: a conversation becomes one sample per trained turn. With tools, or
`drop_thinking = false`, or in chat mode, nothing is dropped and one sample trains all turns.

Control tokens are placed by the renderer by id and never read out of text: `<｜User｜>` or `</think>` in a
message stays what it is, text, and is tokenised as such; normal text is untouched. A prompt rendered into
one string cannot make that difference, so `render_prompt` refuses such text; `encode_prompt` need not. Where
text meets a control token the tokenizer splits anyway, so the tokens of the segments are those of the whole
string.

The rules are of the released encoding_dsv4.py (texts: `encoding/*.toml`); the mask is inferred, the technical
report gives none. Left out: images, and the developer role's internal search results.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any, Literal, Self

from pydantic import model_validator

from fullweight.core.config import Config, nearest
from fullweight.core.errors import DataError
from fullweight.data.encoding import Encoding, Piece, load_encoding
from fullweight.data.encoding.conversation import Message, ToolCall, parse_conversation, sample_label
from fullweight.data.tokenizer import Tokenizer

_USER_ROLES = ("user", "developer")


class EncodingOptions(Config):
    """How conversations are rendered.

    `thinking_mode`: "thinking" renders reasoning (an answer without any gets an empty block, as the released
    encoder does); "chat" leaves reasoning out; "auto" is thinking where a trained turn has reasoning and chat
    where none has, for mixed data (prompts are then in thinking mode). `train_on`: every assistant turn that
    did not opt out, or only the conversation's last.
    """

    name: str = "deepseek-v4"
    thinking_mode: Literal["thinking", "chat", "auto"] = "thinking"
    drop_thinking: bool = True
    reasoning_effort: str | None = None
    train_on: Literal["all", "last"] = "all"

    @model_validator(mode="after")
    def _check(self) -> Self:
        efforts = self.encoding.reasoning_efforts
        if self.reasoning_effort is not None:
            if self.reasoning_effort not in efforts:
                hint = nearest(self.reasoning_effort, list(efforts))
                raise ValueError(f"encoding {self.name} has no reasoning_effort {self.reasoning_effort!r}; {hint}")
            if self.thinking_mode == "chat":
                raise ValueError("reasoning_effort has no effect in chat mode; remove one of the two")
        return self

    @property
    def encoding(self) -> Encoding:
        """Tokens and texts of the chosen version."""
        return load_encoding(self.name)

    @property
    def effort_text(self) -> str:
        """The text that opens a thinking conversation; may be empty."""
        encoding = self.encoding
        return encoding.reasoning_efforts[self.reasoning_effort or encoding.default_reasoning_effort]


@dataclass(frozen=True, slots=True)
class Segment:
    """Text that is trained or not. A `control` segment is exactly one control token."""

    text: str
    trained: bool
    control: bool = False


@dataclass(frozen=True, slots=True)
class EncodedSample:
    """Token ids and, for each, 1 where the model must learn to emit it, else 0 (equal lengths)."""

    tokens: list[int]
    loss_mask: list[int]
    id: str


def render(sample: Mapping[str, Any], options: EncodingOptions) -> list[list[Segment]]:
    """Segments of each training sample that the sample gives; at least one trained segment in each.

    `{"text": ...}` is plain text: all of it and an end-of-sentence token are trained. Raises DataError for
    anything the encoding cannot represent, and where nothing is to be trained.
    """
    given = [key for key in ("text", "messages") if sample.get(key) is not None]
    if len(given) != 1:
        raise DataError(f"{sample_label(sample)}: give either text or messages, found keys {sorted(sample)}")
    if given == ["text"]:
        return [_render_text(sample, options.encoding)]
    messages = parse_conversation(sample, options.encoding)
    turns = _assistant_turns(messages)
    if options.train_on == "last":
        turns = turns[-1:]
    turns = [trained for turn in turns if (trained := [i for i in turn if messages[i].trained])]
    if not turns:
        raise DataError(
            f"{sample_label(sample)}: nothing to train; it needs an assistant message that does not opt out"
        )
    everything = [i for turn in turns for i in turn]
    mode = _mode(messages, everything, options)
    if not _drops_thinking(messages, mode, options):
        return [_render_messages(messages, frozenset(everything), mode, False, options)[0]]
    samples = []
    for turn in turns:
        mode, seen = _mode(messages, turn, options), messages[: turn[-1] + 1]
        samples.append(_render_messages(seen, frozenset(turn), mode, mode == "thinking", options)[0])
    return samples


def render_prompt(
    messages: Sequence[Mapping[str, Any]], options: EncodingOptions, tools: list[Any] | None = None
) -> str:
    """The text after which the model answers, up to and with the prefix of its turn.

    Raises DataError where the last message leaves nothing to answer, and where a message contains a control
    token's text (in one string it would become that token; `encode_prompt` has no such limit).
    """
    segments = _prompt_segments(messages, options, tools)
    for segment in segments:
        if segment.control:
            continue
        for token in options.encoding.control_tokens:
            if token in segment.text:
                raise DataError(
                    f"a message contains {token}, a control token of encoding {options.name}; remove it"
                )
    return "".join(segment.text for segment in segments)


def encode_prompt(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    options: EncodingOptions,
    tools: list[Any] | None = None,
) -> list[int]:
    """Token ids of the prompt; text that spells a control token stays text."""
    [tokens] = _encode([_prompt_segments(messages, options, tools)], tokenizer)
    return list(itertools.chain.from_iterable(tokens))


def encode_sample(
    sample: Mapping[str, Any], tokenizer: Tokenizer, options: EncodingOptions
) -> list[EncodedSample]:
    """`render` and tokenise one sample; prefer `encode_samples` for many."""
    return next(encode_samples([sample], tokenizer, options))


def encode_samples(
    samples: Iterable[Mapping[str, Any]],
    tokenizer: Tokenizer,
    options: EncodingOptions,
    batch_size: int = 128,
) -> Iterator[list[EncodedSample]]:
    """For each sample, in order, its training samples; tokenises `batch_size` samples at a time.

    The id is the sample's own (or ""), with `#1`, `#2`, ... where it gives more than one.
    """
    iterator = iter(samples)
    while batch := list(itertools.islice(iterator, batch_size)):
        rendered = [render(sample, options) for sample in batch]
        encoded = iter(_encode([segments for group in rendered for segments in group], tokenizer))
        for sample, group in zip(batch, rendered, strict=True):
            name = str(sample.get("id") or "")
            result = []
            for number, segments in enumerate(group, 1):
                parts = next(encoded)
                mask = [int(s.trained) for s, part in zip(segments, parts, strict=True) for _ in part]
                tokens = list(itertools.chain.from_iterable(parts))
                result.append(EncodedSample(tokens, mask, f"{name}#{number}" if len(group) > 1 else name))
            yield result


def _encode(documents: list[list[Segment]], tokenizer: Tokenizer) -> list[list[list[int]]]:
    """Token ids of every segment of every document; one call of the tokenizer for all plain text."""
    texts = [s.text for segments in documents for s in segments if not s.control]
    plain = iter(tokenizer.encode_plain(texts))
    return [
        [[tokenizer.token_id(s.text)] if s.control else next(plain) for s in segments] for segments in documents
    ]


def _render_text(sample: Mapping[str, Any], encoding: Encoding) -> list[Segment]:
    text = sample["text"]
    if not isinstance(text, str) or not text:
        raise DataError(f"{sample_label(sample)}: text must be a non-empty string, found {type(text).__name__}")
    writer = _Writer()
    writer.add([encoding.token("bos")], trained=False)
    writer.add([Piece(text), encoding.token("eos")], trained=True)
    return writer.segments


def _prompt_segments(
    messages: Sequence[Mapping[str, Any]], options: EncodingOptions, tools: list[Any] | None
) -> list[Segment]:
    parsed = parse_conversation({"messages": messages, "tools": tools}, options.encoding)
    mode = "chat" if options.thinking_mode == "chat" else "thinking"
    drop = _drops_thinking(parsed, mode, options)
    segments, open_turn = _render_messages(parsed, frozenset(), mode, drop, options)
    if not open_turn:
        raise DataError(
            f"a prompt must end with a user, developer or tool message, or a task; found {parsed[-1].role}"
        )
    return segments


def _assistant_turns(messages: Sequence[Message]) -> list[list[int]]:
    """Indices of the assistant messages that follow each user or developer message."""
    turns: list[list[int]] = []
    fresh = True
    for i, message in enumerate(messages):
        if message.role in _USER_ROLES:
            fresh = True
        elif message.role == "assistant":
            if fresh:
                turns.append([])
            turns[-1].append(i)
            fresh = False
    return turns


def _mode(messages: Sequence[Message], trained: Iterable[int], options: EncodingOptions) -> str:
    if options.thinking_mode != "auto":
        return options.thinking_mode
    return "thinking" if any(messages[i].reasoning for i in trained) else "chat"


def _drops_thinking(messages: Sequence[Message], mode: str, options: EncodingOptions) -> bool:
    return mode == "thinking" and options.drop_thinking and not any(message.tools for message in messages)


def _render_messages(
    messages: Sequence[Message], trained: AbstractSet[int], mode: str, drop: bool, options: EncodingOptions
) -> tuple[list[Segment], bool]:
    """Segments of the messages, and whether they end where the model is to write."""
    encoding = options.encoding
    last_user = max((i for i, m in enumerate(messages) if m.role in _USER_ROLES), default=-1)
    writer = _Writer()
    writer.add([encoding.token("bos")])
    if mode == "thinking":
        writer.add([Piece(options.effort_text)])
    kept = [i for i, m in enumerate(messages) if not (drop and m.role == "developer" and i < last_user)]
    open_turn = False
    for position, i in enumerate(kept):
        message = messages[i]
        thinks = mode == "thinking" and (not drop or i >= last_user)
        if message.role == "assistant":
            answers_task = position > 0 and messages[kept[position - 1]].task is not None
            body = _assistant_body(message, thinks and not answers_task, encoding)
            writer.add(body, trained=i in trained)
        else:
            writer.add(_input_body(message, encoding))
        following = messages[kept[position + 1]].role if position + 1 < len(kept) else None
        prefix: list[Piece] = []
        if following in (None, "assistant", "latest_reminder"):
            prefix = _turn_prefix(message, mode, thinks, encoding)
        writer.add(prefix)
        open_turn = bool(prefix) or (open_turn and message.role == "latest_reminder")
    return writer.segments, open_turn


def _turn_prefix(message: Message, mode: str, thinks: bool, encoding: Encoding) -> list[Piece]:
    """What makes the model write next; empty where nothing does."""
    if message.task is not None:
        task = encoding.tasks[message.task]
        opening = encoding.fill(f"{mode}_prefix") if task.opens_turn else []
        return [*opening, Piece(task.token, control=True)]
    if message.role in _USER_ROLES:
        return encoding.fill("thinking_prefix" if thinks else "chat_prefix")
    return []


def _input_body(message: Message, encoding: Encoding) -> list[Piece]:
    """A system, developer, user or reminder message; never trained."""
    content = [Piece(message.content)]
    if message.blocks:
        parts = [
            encoding.fill("tool_result", content=b.text) if b.is_result else _user_text(b.text, message, encoding)
            for b in message.blocks
        ]
        content = _join(parts, encoding.fill("block_separator"))
    pieces = encoding.fill(message.role, content=content)
    if message.tools:
        schemas = encoding.fill("line_separator")[0].text.join(message.tools)
        pieces += encoding.fill("tools", schemas=schemas)
    if message.response_format:
        pieces += encoding.fill("response_format", schema=message.response_format)
    return pieces


def _user_text(text: str, message: Message, encoding: Encoding) -> list[Piece]:
    """User text; a task may allow one control token inside (read_url: before each address)."""
    inline = encoding.tasks[message.task].inline if message.task else None
    if not inline:
        return [Piece(text)]
    return _join([[Piece(part)] for part in text.split(inline)], [Piece(inline, control=True)])


def _assistant_body(message: Message, thinks: bool, encoding: Encoding) -> list[Piece]:
    pieces = encoding.fill("reasoning", reasoning=message.reasoning) if thinks else []
    pieces.append(Piece(message.content))
    if message.tool_calls:
        calls = [_tool_call(call, encoding) for call in message.tool_calls]
        pieces += encoding.fill("tool_calls", calls=_join(calls, encoding.fill("line_separator")))
    if not message.wo_eos:
        pieces.append(encoding.token("eos"))
    return pieces


def _tool_call(call: ToolCall, encoding: Encoding) -> list[Piece]:
    parameters = [
        encoding.fill(
            "tool_parameter",
            name=name,
            is_string="true" if isinstance(value, str) else "false",
            value=value if isinstance(value, str) else json.dumps(value, ensure_ascii=False),
        )
        for name, value in call.arguments.items()
    ]
    return encoding.fill(
        "tool_call", name=call.name, parameters=_join(parameters, encoding.fill("line_separator"))
    )


def _join(parts: Sequence[list[Piece]], separator: list[Piece]) -> list[Piece]:
    joined: list[Piece] = []
    for i, part in enumerate(parts):
        joined += separator if i else []
        joined += part
    return joined


class _Writer:
    """Collects pieces; neighbouring plain text with the same mask becomes one segment, to tokenise whole."""

    def __init__(self) -> None:
        self.segments: list[Segment] = []

    def add(self, pieces: Iterable[Piece], trained: bool = False) -> None:
        for text, control in pieces:
            if not text:
                continue
            last = self.segments[-1] if self.segments else None
            if last and not control and not last.control and last.trained == trained:
                self.segments[-1] = Segment(last.text + text, trained)
            else:
                self.segments.append(Segment(text, trained, control))
