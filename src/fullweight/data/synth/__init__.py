"""Generated, verified tasks: the quickstart's data and a verifiable reward.

- `problem`: what a task is; problems numbered by a mixed-radix index.
- `warmup`: tasks that a model of a few million parameters can learn.
- `solver`, `programs`, `networks`, `wording`: operations-research problems with one exact optimum.
- `answers`: the exact checker.
- `generate`: config, mixture, samples.
"""

from fullweight.data.synth.answers import check
from fullweight.data.synth.generate import TASKS, TIERS, SynthConfig, describe, generate

__all__ = ["TASKS", "TIERS", "SynthConfig", "check", "describe", "generate"]
