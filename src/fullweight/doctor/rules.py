"""What is wrong with a set of environment variables, for the device in use and the run that is asked for.

Each rule is a small function of the variables and the `Setting`. The rules here are general: names and values.
What variables mean together is in the vendor's file: timeouts in an order in which each failure is told by who
knows most, settings that hide NaN, let a job hang, or fall back silently. Defaults count where a variable is
unset. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator

from fullweight.doctor import rules_ascend, rules_cuda
from fullweight.doctor.environment import meant_for, misspelt, relevant, variables
from fullweight.doctor.findings import Finding, Severity, by_weight
from fullweight.doctor.settings import Environment, Rule, Setting, equals

_ERROR, _WARNING, _NOTE = Severity.error, Severity.warning, Severity.note


def check_environment(environment: Environment, setting: Setting) -> list[Finding]:
    """Everything wrong with the variables that the device's software reads, gravest first."""
    rules = [*_GENERAL, *_OF_DEVICE.get(setting.device, ())]
    return by_weight(f for rule in rules for f in rule(environment, setting))


def _names(environment: Environment, setting: Setting) -> Iterator[Finding]:
    for name in environment:
        if real := misspelt(name, setting.device):
            mend = {name: ""} if real in environment else {name: "", real: environment[name]}
            yield Finding(
                _WARNING,
                name,
                "a name that nothing reads",
                f"a real one; did you mean {real!r}?",
                f"the setting is not made; rename it, or unset it ({real}: {variables()[real].meaning})",
                mend,
            )
        elif name not in variables() and meant_for(name, setting.device):
            yield Finding(
                _NOTE, name, "a name that is not in the table", "a known one", "see that your software reads it"
            )


def _values(environment: Environment, setting: Setting) -> Iterator[Finding]:
    for name, variable in relevant(setting.device).items():
        value = environment.get(name, "")
        if value and not variable.legal(value):
            expected = f"{variable.expected} ({variable.meaning})"
            if not variable.checked:
                yield Finding(
                    _NOTE, name, repr(value), expected, "the table may lack this value; see the vendor's page"
                )
                continue
            mend = f"use one, or unset it (default {variable.default or 'unset'})"
            yield Finding(_ERROR, name, repr(value), expected, mend, {name: variable.default})


def _old_names(environment: Environment, setting: Setting) -> Iterator[Finding]:
    for name, variable in relevant(setting.device).items():
        if environment.get(name) and variable.replaced_by:
            new = variable.replaced_by
            twice = new in environment
            found = f"an old name{', and the new one beside it' if twice else ''}"
            yield Finding(_NOTE, name, found, new, f"use {new} alone ({variable.meaning})")


def _debugging(environment: Environment, setting: Setting) -> Iterator[Finding]:
    if equals(environment, "TORCH_DISTRIBUTED_DEBUG", "DETAIL") and setting.ranks > 1:
        mend = {"TORCH_DISTRIBUTED_DEBUG": ""}
        yield Finding(
            _WARNING,
            "TORCH_DISTRIBUTED_DEBUG",
            "DETAIL",
            "OFF or INFO",
            "every collective is compared over all ranks first, which is slow; unset it after debugging",
            mend,
        )


_GENERAL: tuple[Rule, ...] = (_names, _values, _old_names, _debugging)
_OF_DEVICE: dict[str, tuple[Rule, ...]] = {"ascend": rules_ascend.RULES, "cuda": rules_cuda.RULES}
