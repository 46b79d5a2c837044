"""The guard and the stop flag."""

import os
import signal

import pytest

from fullweight.core.errors import TrainingError
from fullweight.train.guards import Guard, GuardConfig, StopRequest

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("losses", "grad_norm", "named"),
    [
        ({"lm": NAN}, 1.0, "lm loss nan"),
        ({"lm": 1.0, "mtp": INF}, 1.0, "mtp loss inf"),
        ({"lm": 1.0}, -INF, "gradient norm -inf"),
        ({"lm": NAN}, NAN, "gradient norm nan"),
    ],
)
def test_names_every_number_that_is_not_finite(losses: dict, grad_norm: float, named: str) -> None:
    """A refusal says which number was bad, so that the user knows where to look."""
    refusal = Guard(GuardConfig()).refusal(losses, grad_norm)
    assert refusal is not None
    assert named in refusal


def test_finite_numbers_pass() -> None:
    """Large but finite is not refused."""
    assert Guard(GuardConfig()).refusal({"lm": 1e30}, 1e30) is None


def test_stop_policy_ends_at_the_first_bad_step() -> None:
    """`stop` is the default and gives a message with a fix."""
    guard = Guard(GuardConfig())
    refusal = guard.refusal({"lm": NAN}, 1.0)
    with pytest.raises(TrainingError, match="weights were not changed"):
        guard.enforce(7, refusal)


def test_skip_policy_forgives_until_the_limit_in_a_row() -> None:
    """A good step resets the count; one more than max_skips in a row ends the run."""
    guard = Guard(GuardConfig(non_finite="skip", max_skips=2))

    def bad() -> None:
        guard.enforce(1, guard.refusal({"lm": NAN}, 1.0))

    bad()
    bad()
    assert guard.refusal({"lm": 1.0}, 1.0) is None
    bad()
    bad()
    with pytest.raises(TrainingError, match="2 steps before it"):
        bad()


def test_a_signal_raises_the_flag_and_a_later_interrupt_is_immediate(monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGTERM and SIGINT let the step finish, also when both come at once; pressing Ctrl-C later does not wait."""
    now = 100.0
    monkeypatch.setattr("fullweight.train.guards.time.monotonic", lambda: now)
    before = signal.getsignal(signal.SIGINT)
    with StopRequest().listening() as stop:
        assert not stop.requested
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested
        now = 110.0
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
