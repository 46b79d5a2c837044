"""Entry of a doctor whose last rank has another environment, as one machine of a cluster may."""

from __future__ import annotations

import os

from fullweight.cli.main import main


def differing(arguments: list[str]) -> int:
    if os.environ["RANK"] == "1":
        os.environ["TORCH_SHOW_CPP_STACKTRACES"] = "1"
        os.environ["GLOO_SOCKET_IFNAME"] = "nosuch0"
    return main(arguments)
