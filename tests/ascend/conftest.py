"""These tests need torch_npu and the stand-in for CANN: `make test-ascend` runs them in that environment."""

from __future__ import annotations

import importlib.util

import pytest

if importlib.util.find_spec("torch_npu") is None:
    raise pytest.UsageError("tests/ascend need torch_npu beside the environment: run `make test-ascend`")

import torch_npu  # noqa: F401
