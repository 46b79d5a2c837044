"""A run that is going is served on loopback alone, drawn again when it has grown, and never written to."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest
from tests.unit.report.recorded import step_line

from fullweight.cli.main import main
from fullweight.evidence.ledger import Ledger
from fullweight.report.watch import ADDRESS, Watch


@pytest.fixture
def run(tmp_path: Path) -> Path:
    lines = Ledger(tmp_path / "ledger.jsonl")
    lines.begin("start", 0, {"format": 2})
    lines.close()
    return tmp_path


@pytest.fixture
def watch(run: Path) -> Iterator[Watch]:
    watch = Watch(run, 0)
    thread = threading.Thread(target=watch.serve)
    thread.start()
    yield watch
    watch.close()
    thread.join()


def fetch(watch: Watch, path: str = "") -> str:
    with urlopen(watch.url + path, timeout=60) as answer:
        text: str = answer.read().decode()
    return text


def test_the_page_follows_the_ledger(run: Path, watch: Watch) -> None:
    before = sorted(p.name for p in run.iterdir())
    assert "holds no step yet" in fetch(watch)
    first = fetch(watch, "version")
    lines = Ledger(run / "ledger.jsonl")
    lines.append("step", 1, step_line(1))
    assert fetch(watch, "version") != first
    assert "2.9000 to 2.9000" in fetch(watch)
    lines.append("step", 2, step_line(2))
    lines.close()
    with (run / "ledger.jsonl").open("ab") as stream:
        stream.write(b'{"kind":"step","st')  # a line that is being written
    page = fetch(watch)
    assert "2.9000 to 2.8000" in page
    assert 'fetch("version")' in page
    assert sorted(p.name for p in run.iterdir()) == before


@pytest.mark.parametrize("path", ["ledger.jsonl", "../ledger.jsonl", "%2e%2e/etc/passwd", "version/"])
def test_nothing_else_is_served(watch: Watch, path: str) -> None:
    assert watch.url.startswith(f"http://{ADDRESS}:")
    with pytest.raises(HTTPError, match="404"):
        fetch(watch, path)


def test_mistakes(watch: Watch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert main(["watch", str(tmp_path / "empty")]) == 1
    assert "is no run folder" in capsys.readouterr().err
    port = watch.url.rsplit(":", 1)[1].rstrip("/")
    assert main(["watch", str(watch.root), "--port", port]) == 1
    assert f"port {port} cannot be listened on" in capsys.readouterr().err
