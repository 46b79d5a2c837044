"""The report and the command that prints it."""

from __future__ import annotations

import io
import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from fullweight.cli.data import data_app, print_report
from fullweight.core.errors import ConfigError, DataError
from fullweight.data.inspect import histogram, inspect
from fullweight.data.tokenised import DataConfig
from fullweight.data.tokenizer import train_tokenizer

SHARED = Path(__file__).parents[3] / ".." / "shared" / "data"


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["what is 1 + 2 ? it is 3"] * 4, vocab_size=400)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [{"q": f"what is {i} [bold]?", "a": f"<think>hm</think>it is {i}", "id": f"n{i}"} for i in range(30)]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def report_of(file, tokenizer, **options):
    source = {"kind": "file", "path": str(file), "columns": {"prompt": "q", "answer": "a"}}
    config = DataConfig.resolve({"sources": [source], "row_tokens": 128, **options})
    return inspect(config, tokenizer, num_samples=2)


def run(*arguments):
    result = CliRunner().invoke(data_app, ["inspect", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_report_adds_up(file, tokenizer):
    """Runs rejoin to the sample, trained runs are what the model emits, counts agree with each other."""
    report = report_of(file, tokenizer, held_out_fraction=0.3)
    first = report.samples[0]
    trained = "".join(r.text for r in first.runs if r.trained)
    assert trained.startswith("hm</think>it is")
    assert trained.endswith(tokenizer.decode([tokenizer.eos_id]))
    assert [r.trained for r in first.runs] == [False, True]
    counts = report.sources[0]
    assert counts.train.samples + counts.held_out.samples == counts.records == 30
    assert sum(report.length_counts) == report.train.samples == counts.train.samples
    assert report.train.tokens == counts.train.tokens
    assert report.train.efficiency == report.train.tokens / (report.train.rows * 128)
    assert report.held_out is not None
    assert report.held_out.samples == counts.held_out.samples
    assert report.tokens_per_second > 0


@pytest.mark.parametrize("lengths", [[5], [1, 1000], list(range(1, 14)), [7, 7, 7], [3, 3, 8192]])
def test_histogram_covers_every_length(lengths):
    """At most 12 bins, agreeing with numpy's own histogram over the same edges; nothing falls outside."""
    edges, counts = histogram(np.array(lengths))
    assert len(edges) == len(counts) + 1 <= 13
    assert edges[0] == min(lengths)
    assert edges[-1] > max(lengths)
    assert sum(counts) == len(lengths)
    assert list(counts) == [sum(a <= n < b for n in lengths) for a, b in pairwise(edges)]


def test_trained_tokens_are_marked_with_and_without_colour(file, tokenizer):
    """On a terminal by colour, in plain text by brackets; text from data is never read as markup."""
    report = report_of(file, tokenizer)
    plain, coloured = io.StringIO(), io.StringIO()
    print_report(report, Console(file=plain, width=300))
    print_report(report, Console(file=coloured, width=300, force_terminal=True, color_system="standard"))
    assert "⟦hm</think>it is 0" in plain.getvalue()
    assert "[bold]?" in plain.getvalue()
    assert "\x1b[1;32mhm</think>it is 0" in coloured.getvalue()
    assert "⟦" not in coloured.getvalue()
    for text in ("30 records, 0 duplicates", "efficiency", "tokens/s", "█"):
        assert text in plain.getvalue()


def test_command_reads_a_data_file(file):
    """A file with its columns on the command line gives JSON with exact counts."""
    report = json.loads(run(file, "--columns", "prompt=q,answer=a", "--row-tokens", "64", "--json").stdout)
    assert report["sources"][0]["train"]["samples"] == 30
    assert report["train"]["row_tokens"] == 64
    assert len(report["samples"]) == 2
    assert run(file, "--columns", "prompt=q,answer=a", "--samples", 0).exit_code == 0


def test_command_reads_a_recipe(file, tmp_path, tokenizer):
    """The [data] section of a recipe is used as it stands, tokenizer folder and overrides included."""
    tokenizer.save(tmp_path / "tokenizer")
    recipe = tmp_path / "r.toml"
    recipe.write_text(
        f"""[model]\npreset = "tiny"\n[data]\nrow_tokens = 96\ntokenizer = "{tmp_path / "tokenizer"}"
[[data.sources]]\nkind = "file"\npath = "{file}"\ncolumns = {{ prompt = "q", answer = "a" }}\n"""
    )
    report = json.loads(run(recipe, "--json", "--set", "data.held_out_fraction=0.5").stdout)
    assert report["train"]["row_tokens"] == 96
    assert report["held_out"]["samples"] > 0


def test_wrong_use_is_one_message(file, tmp_path):
    """Mistakes on the command line and in files are FullweightErrors, which print without a traceback."""
    recipe = tmp_path / "r.toml"
    recipe.write_text("[model]\n")
    for arguments, error, message in (
        ((recipe,), ConfigError, r"no \[data\] section; found: model"),
        ((recipe, "--columns", "text=a"), ConfigError, "a recipe says its columns"),
        ((file, "--columns", "prompt"), ConfigError, "key=column pairs.*found 'prompt'"),
        ((file, "--columns", "promt=q"), ConfigError, "did you mean 'prompt'"),
        ((file, "--set", "data.seed=1"), ConfigError, "--set is for a recipe"),
        ((file, "--row-tokens", "0"), ConfigError, "row_tokens"),
        ((file,), DataError, r"a.jsonl:1: no column 'messages'; columns found: q, a, id"),
        ((tmp_path / "no.jsonl",), DataError, "no data file at"),
    ):
        with pytest.raises(error, match=message):
            run(*arguments)
