"""A Hub that cannot be reached is said at once, and nothing stays switched off."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import datasets
import pytest
from huggingface_hub import constants

from fullweight.core.errors import DataError
from fullweight.data import hub
from fullweight.data.readers import Columns, read_rows


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An endpoint that refuses connections (its port is taken and not listened on), and no proxy before it."""
    monkeypatch.setattr(hub, "getproxies", dict)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{taken.getsockname()[1]}"
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        yield endpoint


def test_a_name_that_cannot_be_asked_for(silent: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One message with the endpoint and the reason; `datasets` is told that it is offline, and asks nobody."""
    told = []
    original = datasets.load_dataset

    def load(*arguments: object, **options: object) -> object:
        told.append((constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE))
        return original(*arguments, **options)

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(
        DataError, match=rf"no connection to {silent}: Connection refused; no copy is in the cache"
    ):
        next(iter(read_rows("nobody/nothing-here", Columns(), "train")))
    assert told == [(True, True)]
    assert not constants.HF_HUB_OFFLINE
    assert not datasets.config.HF_HUB_OFFLINE


def test_a_hub_that_answers_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """And so is a proxy, which alone knows."""
    monkeypatch.setattr(hub, "getproxies", dict)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        assert hub.unreachable(f"http://127.0.0.1:{listening.getsockname()[1]}") is None
    monkeypatch.setattr(hub, "getproxies", lambda: {"https": "http://proxy:3128"})
    assert hub.unreachable("https://huggingface.co") is None
