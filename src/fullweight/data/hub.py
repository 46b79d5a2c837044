"""Whether the Hugging Face Hub can be reached, asked once and for seconds.

`datasets` asks again six times, with pauses, before it says that a name cannot be had: half a minute on every
rank. Where the Hub cannot be reached it is told that it is offline, so that it takes its own copy or says at once
that it has none. Behind a proxy nothing is asked: it alone knows.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

_SECONDS = 5.0


def unreachable(endpoint: str) -> str | None:
    """Why no connection to the endpoint (a URL) can be made; None when one can, or a proxy stands between."""
    parts = urlsplit(endpoint)
    if getproxies().get(parts.scheme):
        return None
    try:
        port = parts.port or {"https": 443, "http": 80}[parts.scheme]
        socket.create_connection((parts.hostname or "", port), timeout=_SECONDS).close()
    except OSError as error:
        return f"{endpoint}: {error.strerror or error}"
    return None


@contextmanager
def reached_or_offline() -> Iterator[str | None]:
    """Inside it `datasets` asks the Hub only if that can be reached; gives why it cannot, else None."""
    import datasets  # noqa: PLC0415 (takes over a second)
    from huggingface_hub import constants  # noqa: PLC0415 (the same)

    places: tuple[Any, Any] = (datasets.config, constants)
    before = [place.HF_HUB_OFFLINE for place in places]
    why = None if any(before) else unreachable(constants.ENDPOINT)
    for place in places if why else ():
        place.HF_HUB_OFFLINE = True
    try:
        yield why
    finally:
        for place, value in zip(places, before, strict=True):
            place.HF_HUB_OFFLINE = value
