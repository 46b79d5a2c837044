"""Each rank watches itself and tells the others, so that a run that cannot go on ends soon, with one message.

Two threads, because a store whose holder was stopped blocks whoever asks it. The *courier* writes a beat (where
the training thread is) and reads what others say. The *judge* does no input or output: it counts its own short
sleeps while the training thread notes no new phase (a process that is stopped counts nothing), and past the bound
asks the courier to raise the alarm. Then every rank that still answers writes its stacks into the run folder and
says where it is; the rank that raised the alarm prints the report (`stall.py`), and all end.

The first rank to fail for any other reason leaves its message in the store and prints it; the others end with
that message, unprinted. When a connection breaks without such a message, one rank looks whose beats have ceased.

In a healthy run a rank writes one small value and asks one question a second, whatever the number of ranks; rank
0 reads all beats every ten seconds to find stragglers. Left out: a rank whose training thread keeps the
interpreter to itself answers nothing, and is named as silent; recovery without a new process.
"""

from __future__ import annotations

import faulthandler
import json
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch.distributed as dist

from fullweight.core import phase
from fullweight.core.errors import ToldError
from fullweight.core.launcher import failure_text, outside, restart_count, tell_launcher
from fullweight.core.phase import PHASES, Place
from fullweight.devices import DEVICES
from fullweight.parallel.launch import LaunchConfig
from fullweight.parallel.rendezvous import Meeting, named
from fullweight.parallel.stall import OWN_THREADS, Seen, Straggler, doing, report, stragglers

_LOOK_SECONDS = 0.1
_BEAT_SECONDS = 1.0
_ANSWER_SECONDS = 4.0  # for a rank that lives to answer an alarm
_PATIENCE_SECONDS = 20.0  # of the judge with the courier, and with a training thread that should be ending
_LOSS_SECONDS = 3.5  # several beats: who wrote none in that time is gone
_HEARD_SECONDS = 5.0
_STRAGGLER_LOOK_SECONDS = 10.0
_WINDOW_STEPS = 5
_LEAST_EXCESS_SECONDS = 1.0
_LOST = tuple(sign for kind in DEVICES.values() for sign in kind.lost_peer)


@dataclass(frozen=True)
class Failure:
    """The first failure of the run, as every rank knows it."""

    rank: int
    message: str
    at_once: bool  # the training threads stand still: nobody waits for them
    unable: int  # how many ranks cannot hear of it any more


class Watch:
    """One rank's watch over itself and its peers, from the meeting to the end of the run."""

    def __init__(self, meeting: Meeting, config: LaunchConfig) -> None:
        self.meeting, self.config = meeting, config
        self.rank, self.size = meeting.rank, meeting.size
        self.failure: Failure | None = None
        self._stacks: Path | None = None
        self._how_to_go_on: Callable[[], str] = lambda: ""
        # A connection of its own, for the training thread has the other.
        self._store: dist.Store = meeting.store.clone()  # type: ignore[attr-defined]
        self._stopped, self._stalled = threading.Event(), threading.Event()
        self._answered = self._alarmed = False
        self._hearing = threading.Lock()
        self._beats = 0
        self._work = _Work()
        self._stragglers: SimpleQueue[Straggler] = SimpleQueue()
        self._known_slow: set[int] = set()
        self._told: Exception | None = None
        self._failed_in = phase.now()
        self._threads = [
            threading.Thread(target=work, name=f"{OWN_THREADS}{name}", daemon=True)
            for name, work in (("courier", self._carry), ("judge", self._judge))
        ]

    @contextmanager
    def running(self) -> Iterator[None]:
        """Watch while the block runs; a failure in it is told once among all ranks."""
        self._beat()
        for thread in self._threads:
            thread.start()
        try:
            with self.telling():
                yield
        finally:
            self._leave_in_order()

    @contextmanager
    def telling(self) -> Iterator[None]:
        """Tell a failure of the block once among all ranks, and raise what ends this one."""
        try:
            yield
        except Exception as error:
            told = self._tell(error)
            if told is error:
                raise
            raise told from None

    def of_run(self, stalls: Path, how_to_go_on: Callable[[], str]) -> None:
        """From now on stacks go under `stalls`, and messages end with what `how_to_go_on` says then."""
        self._stacks, self._how_to_go_on = stalls / f"launch-{restart_count()}", how_to_go_on

    def stragglers(self) -> list[Straggler]:
        """Ranks found slow since the last call; only rank 0 finds any."""
        found = []
        while not self._stragglers.empty():
            found.append(self._stragglers.get())
        return found

    def bound_seconds(self, place: Place) -> float:
        """How long the training thread may stay at `place`."""
        if place.phase == "ending":
            return _PATIENCE_SECONDS
        usual = place.in_step and place.steps_begun > 1
        return self.config.stall_seconds if usual else max(self.config.setup_seconds, self.config.stall_seconds)

    # The training thread, when it fails

    def _tell(self, error: Exception) -> Exception:
        if error is self._told:
            return error
        self._failed_in = phase.now()
        phase.enter("ending")
        try:
            self._told = self._tell_others(error)
        except dist.DistError:
            self._told = self._without_store(error)
        return self._told

    def _tell_others(self, error: Exception) -> Exception:
        store = self.meeting.store
        if isinstance(error, ToldError):  # whose cause is about to be told by another rank
            self._await_failure(_HEARD_SECONDS)
            ends_with: Exception = error
        elif _is_loss(error):
            failure = self._await_failure(_BEAT_SECONDS) or self._find_the_lost(error)
            ends_with = ToldError(failure.message)
        elif (message := outside(error)) is not None:
            ends_with = ToldError(self._publish(store, message).message)
        else:  # a bug: its traceback is this rank's to show
            self._publish(store, f"rank {self.rank} failed: {type(error).__name__}: {error}", printed=False)
            ends_with = error
        self._until_heard(store)
        return ends_with

    def _find_the_lost(self, error: Exception) -> Failure:
        """One rank looks whose beats have ceased and tells; the others wait for that."""
        store = self.meeting.store
        if store.compare_set("finder", "", str(self.rank)).decode() != str(self.rank):
            found = self._await_failure(_LOSS_SECONDS + _PATIENCE_SECONDS)
            return found or self._publish(store, f"the connection to another rank was lost: {_first_line(error)}")
        before = self._read_beats(store)
        time.sleep(_LOSS_SECONDS)
        after = self._read_beats(store)
        gone = [r for r in range(self.size) if r != self.rank and before[r]["beats"] == after[r]["beats"]]
        if gone:
            last = after[gone[0]]
            message = (
                f"{named(gone)} {'is' if len(gone) == 1 else 'are'} gone (killed, out of memory, or its machine "
                f"or network failed); last seen in {last['place']}, {_ago(last):.0f} s ago"
            )
        else:
            message = f"the connection between ranks broke, and all of them still run: {_first_line(error)}"
        return self._publish(store, self._with_advice(message), unable=len(gone))

    def _without_store(self, error: Exception) -> Exception:
        """The holder of the store is gone, and with it every way to agree."""
        if not _is_loss(error):
            return error
        message = self._with_advice(f"{self._holder()} is gone; rank {self.rank} was in {self._failed_in}")
        self._print(message)
        return ToldError(message)

    def _publish(
        self, store: dist.Store, message: str, *, printed: bool = True, at_once: bool = False, unable: int = 0
    ) -> Failure:
        """Leave the message for all ranks, and print it, unless there is one already; the one that stands.

        `unable` ranks will not hear of it.
        """
        own = json.dumps([self.rank, message, at_once, unable])
        failure = Failure(*json.loads(store.compare_set("failure", "", own)))
        if failure.rank == self.rank and self.failure is None and printed:
            self._print(message)
        self._hear(store, failure)
        return failure

    def _hear(self, store: dist.Store, failure: Failure) -> None:
        """Know of the failure, and let it be known that this rank does."""
        with self._hearing:
            if self.failure is None:
                self.failure = failure
                store.add("heard", 1)

    def _await_failure(self, seconds: float) -> Failure | None:
        """Another rank's message, waiting so long for one."""
        store = self.meeting.store
        for _ in range(int(seconds / _LOOK_SECONDS)):
            if self.failure is None and store.check(["failure"]):
                self._hear(store, Failure(*json.loads(store.get("failure"))))
            if self.failure is not None:
                return self.failure
            time.sleep(_LOOK_SECONDS)
        return None

    def _until_heard(self, store: dist.Store) -> None:
        """The store goes with the process that holds it: there the other ranks get a moment to hear first."""
        unable = self.failure.unable if self.failure is not None else 0
        for _ in range(int(_HEARD_SECONDS / _LOOK_SECONDS) if self.meeting.hosts else 0):
            if int(store.add("heard", 0)) >= self.size - unable:
                return
            time.sleep(_LOOK_SECONDS)

    # The courier

    def _carry(self) -> None:
        next_look = _STRAGGLER_LOOK_SECONDS
        try:
            while not self._stopped.wait(_BEAT_SECONDS):
                self._beat()
                self._listen()
                if self._stalled.is_set() and not self._alarmed:
                    self._alarm()
                next_look -= _BEAT_SECONDS
                if self.rank == 0 and next_look <= 0:
                    next_look = _STRAGGLER_LOOK_SECONDS
                    self._look_for_stragglers()
        except dist.DistError:
            return  # the judge ends a run that needs it

    def _beat(self) -> None:
        place = phase.now()
        self._beats += 1
        self._store.set(
            f"beat/{self.rank}",
            json.dumps(
                {
                    "beats": self._beats,
                    "time": time.time(),
                    "place": str(place),
                    "position": [place.step, PHASES.index(place.phase), place.detail],
                    "seconds": time.monotonic() - place.began,
                    "busy": self._work.recent(),
                }
            ),
        )

    def _listen(self) -> None:
        if self.failure is None and self._store.check(["failure"]):
            self._hear(self._store, Failure(*json.loads(self._store.get("failure"))))
        if self.failure is not None and self.failure.at_once:
            self._until_heard(self._store)
            _end(self.failure.message)
        if not self._answered and self._store.check(["alarm"]):
            self._answer()

    def _answer(self) -> None:
        """Write this rank's stacks and say where it is."""
        self._answered = True
        waits, line = doing()
        self._write_stacks()
        self._beat()
        self._store.set(f"answer/{self.rank}", json.dumps([waits, line]))

    def _alarm(self) -> None:
        """This rank stands still: if it is the first to say so, collect the answers, report, and end the run."""
        self._alarmed = True
        if self._store.compare_set("alarm", "", str(self.rank)).decode() != str(self.rank):
            return
        place = phase.now()
        if not self._answered:
            self._answer()
        for _ in range(int(_ANSWER_SECONDS / _BEAT_SECONDS)):
            time.sleep(_BEAT_SECONDS)
            self._listen()
            if self.failure is not None:  # which explains the standing still, and ends the run
                return
        seen = [self._seen(rank, beat) for rank, beat in enumerate(self._read_beats(self._store))]
        message = report(seen, self.bound_seconds(place))
        if self._stacks is not None:
            message += f"\nstacks of every rank that answers: {self._stacks}"
        self._write_report(message)
        failure = self._publish(
            self._store, self._with_advice(message), at_once=True, unable=sum(not s.answers for s in seen)
        )
        self._until_heard(self._store)
        _end(failure.message)

    def _seen(self, rank: int, beat: dict[str, Any]) -> Seen:
        answers = self._store.check([f"answer/{rank}"])
        waits, line = json.loads(self._store.get(f"answer/{rank}")) if answers else (False, "")
        step, order, detail = beat["position"]
        seconds = beat["seconds"] if answers else _ago(beat)
        return Seen(rank, beat["place"], (step, order, detail, line), seconds, answers, waits, line)

    def _read_beats(self, store: dist.Store) -> list[dict[str, Any]]:
        return [json.loads(value) for value in store.multi_get([f"beat/{rank}" for rank in range(self.size)])]

    def _look_for_stragglers(self) -> None:
        recent = {rank: beat["busy"] for rank, beat in enumerate(self._read_beats(self._store))}
        full = {rank: (step, seconds) for rank, (step, seconds, steps) in recent.items() if steps == _WINDOW_STEPS}
        if len(full) < self.size:
            return
        found = stragglers(full, self.config.straggler_ratio, _LEAST_EXCESS_SECONDS)
        for straggler in found:
            if straggler.rank not in self._known_slow:
                self._stragglers.put(straggler)
        self._known_slow = {straggler.rank for straggler in found}

    # The judge

    def _judge(self) -> None:
        last, looks, ending_looks = phase.now().count, 0, 0
        while not self._stopped.wait(_LOOK_SECONDS):
            place = phase.now()
            looks = looks + 1 if place.count == last else 0
            last = place.count
            self._work.look(place)
            still, bound = looks * _LOOK_SECONDS, self.bound_seconds(place)
            if self.failure is not None:
                ending_looks += 1
                if ending_looks * _LOOK_SECONDS > _PATIENCE_SECONDS:
                    _end(self.failure.message)
            if still > bound:
                self._stalled.set()
            if still > bound + _PATIENCE_SECONDS:
                self._end_alone(place, still)

    def _end_alone(self, place: Place, still: float) -> None:
        """The store does not answer, so nobody can be asked and nobody told."""
        message = (
            f"this rank stood still for {still:.0f} s in {place}, and {self._holder()} does not answer (stopped, "
            "gone or cut off)"
        )
        if self._stacks is not None:
            self._write_stacks()
            message += f"; its stacks: {self._stacks}"
        self._print(message := self._with_advice(message))
        _end(message)

    # Telling

    def _holder(self) -> str:
        by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        return (
            "torchrun on the first machine, which holds the store,"
            if by_agent
            else "rank 0, which holds the store,"
        )

    def _with_advice(self, message: str) -> str:
        advice = self._how_to_go_on()
        return f"{message}\n{advice}" if advice else message

    def _print(self, message: str) -> None:
        # Not print: the training thread may stand still inside of one.
        os.write(2, f"{failure_text(message)}\n".encode(errors="backslashreplace"))

    def _write_stacks(self) -> None:
        if self._stacks is None:
            return
        path = self._stacks / f"rank-{self.rank}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8") as stream:
            stream.write(f"rank {self.rank}, process {os.getpid()} on {os.uname().nodename}: {phase.now()}\n")
            stream.flush()
            faulthandler.dump_traceback(stream, all_threads=True)

    def _write_report(self, message: str) -> None:
        if self._stacks is not None:
            path = self._stacks / "report.txt"
            path.write_text(message + "\n", encoding="utf-8")

    def _leave_in_order(self) -> None:
        """Stop watching; the holder of the store leaves last, or its peers' last words would fail."""
        self._stopped.set()
        for thread in self._threads:
            thread.join(_HEARD_SECONDS)
        if self.failure is not None or self._told is not None:
            return
        try:
            self.meeting.store.add("left", 1)
            for _ in range(int(_HEARD_SECONDS / _LOOK_SECONDS) if self.meeting.hosts else 0):
                if int(self.meeting.store.add("left", 0)) >= self.size:
                    break
                time.sleep(_LOOK_SECONDS)
        except dist.DistError:
            pass


class _Work:
    """How long the training thread really worked in its last steps: looked at ten times a second.

    Only the judge writes. The first step is left out: it compiles and measures.
    """

    def __init__(self) -> None:
        self._steps: deque[float] = deque(maxlen=_WINDOW_STEPS)
        self._step = 0
        self._seconds = 0.0
        self._last = time.perf_counter()
        self._recent = (0, 0.0, 0)

    def look(self, place: Place) -> None:
        """Add the time since the last look to the step if the thread is not waiting for others."""
        now = time.perf_counter()
        passed, self._last = min(now - self._last, 5 * _LOOK_SECONDS), now
        if not place.in_step or place.steps_begun < 2:
            return
        if place.step != self._step:
            if self._step:
                self._steps.append(self._seconds)
                self._recent = (self._step, sum(self._steps), len(self._steps))
            self._step, self._seconds = place.step, 0.0
        if not doing()[0]:
            self._seconds += passed

    def recent(self) -> tuple[int, float, int]:
        """(last step counted, seconds of work in the last steps, how many steps those are)."""
        return self._recent


def _is_loss(error: Exception) -> bool:
    lost = isinstance(error, RuntimeError) and any(sign in str(error) for sign in _LOST)
    return lost or isinstance(error, dist.DistError)


def _end(message: str) -> None:
    """Leave without the training thread, which stands still."""
    tell_launcher(message)
    os._exit(1)


def _ago(beat: dict[str, Any]) -> float:
    return max(0.0, time.time() - beat["time"])


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
