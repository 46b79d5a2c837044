"""Fullweight: full-parameter post-training of DeepSeek-V4-class models, with evidence.

`fullweight.load(folder)` gives a model to query; the command line does the rest. Importing this package
imports no torch: planning and configuration run without it.
"""

from __future__ import annotations

import os
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fullweight.api import LoadedModel, load

# torch reads this once, at its first allocation: large tensors on huge pages, which cost fewer faults.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
# devices/ imports vendors' packages, and says in one message why one cannot be; torch would fail with it.
os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
# torch_npu reads this once: an operation that the NPU lacks raises, and never runs on the CPU unseen.
os.environ.setdefault("TORCH_NPU_FALLBACK_CPU_DISABLE", "1")

__version__ = version("fullweight")
__all__ = ["LoadedModel", "__version__", "load"]


def __getattr__(name: str) -> Any:
    if name in ("load", "LoadedModel"):
        from fullweight import api

        return getattr(api, name)
    raise AttributeError(f"module 'fullweight' has no attribute {name!r}")
