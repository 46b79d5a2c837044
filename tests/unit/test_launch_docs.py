"""The examples for schedulers are valid shell and YAML, and call the command line as it is."""

from __future__ import annotations

import shlex
import subprocess
import tomllib
from typing import Any

import yaml
from tests.unit.test_docs import ROOT, blocks

from fullweight.parallel.launch import LaunchConfig

PAGE = ROOT / "docs" / "launch.md"
CALL = "-m fullweight train recipe.toml --output /shared/runs/demo"


def pods() -> list[dict[str, Any]]:
    """The pod template of each example."""
    job, volcano = (yaml.safe_load(text) for text in blocks(PAGE, "yaml"))
    assert (job["kind"], volcano["kind"]) == ("PyTorchJob", "Job")
    worker = job["spec"]["pytorchReplicaSpecs"]["Worker"]
    assert worker["replicas"] == 16
    assert volcano["spec"]["minAvailable"] == volcano["spec"]["tasks"][0]["replicas"]
    return [worker["template"]["spec"], volcano["spec"]["tasks"][0]["template"]["spec"]]


def test_the_batch_script_is_valid_shell() -> None:
    """`bash -n` reads it without running it."""
    [script] = blocks(PAGE, "slurm")
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
    assert CALL in " ".join(script.replace("\\\n", " ").split())


def test_the_jobs_are_valid_yaml_and_launch_training() -> None:
    """Each container runs torchrun with restarts and the same job id."""
    for pod in pods():
        [container] = pod["containers"]
        words = shlex.split(" ".join([*container["command"], *container["args"]]))
        text = " ".join(words)
        assert text.endswith(CALL)
        assert "torchrun" in words
        assert words[words.index("--rdzv-id") + 1] == "fullweight-demo"
        assert words[words.index("--max-restarts") + 1] == "3"


def test_the_settings_shown_are_the_defaults() -> None:
    """Every key of the section, with its default."""
    [text] = blocks(PAGE, "toml")
    shown = tomllib.loads(text)
    assert LaunchConfig.resolve(shown["launch"]) == LaunchConfig()
    assert set(shown["launch"]) == set(LaunchConfig.model_fields)
