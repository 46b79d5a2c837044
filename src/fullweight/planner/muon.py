"""What a step of Muon does on one rank, over sizes: products, what travels of cut matrices, and what it holds.

As `optim/muon.py` does it. Matrices of a bucket that lie whole on the rank are orthogonalised here, those of one
shape together, at most `CHUNK_ENTRIES` entries at once. Of a matrix that is cut, every rank sends its piece (fp32)
to the owner, which sends back what becomes of it (BF16): two all-to-all calls each round, and a round is as long
as its dearest owner takes. The rank counted is the first of a pipeline rank's: its pieces are the largest, and it
owns the dearest matrix of every group.

Experts always lie whole, but where they are fewer than the ranks that share them, some ranks have one and others
none, and the step waits for those that have.

Left out: latency of the calls (a few rounds a step), and Newton-Schulz in other types than BF16. Imports no torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from math import ceil, prod

from fullweight.models.deepseek_v4.config import DeepSeekV4Config
from fullweight.models.deepseek_v4.roles import parameter_role
from fullweight.models.deepseek_v4.sharding import cut_of
from fullweight.optim.rounds import multiply_adds, rounds
from fullweight.parallel.config import Layout
from fullweight.planner.tape import NO_CHANGE, Block, Profile, Tape, moved, together

CHUNK_ENTRIES, BUCKET_BYTES, ITERATIONS = 1 << 23, 1 << 28, 10  # of optim/muon.py and optim/buckets.py
_FP32, _BF16 = 4, 2

Matrix = tuple[int, int]
"""(rows, columns)."""


@dataclass(frozen=True)
class Stack:
    """A parameter of independent matrices as the first rank holds it.

    `mesh` names the ranks that it is cut over (dense, heads or experts), `piece` is what the rank has of each cut
    matrix, in entries.
    """

    matrix: Matrix
    number: int  # of matrices in the whole parameter
    mesh: str
    ranks: int
    whole: int  # matrices that lie here whole
    piece: tuple[int, ...]  # of each matrix that no rank has whole
    narrow: bool  # pieces are ranges of columns too: a copy is made of each that is sent back
    entries: int  # of the rank's part


@dataclass(frozen=True)
class Update:
    """One rank's step of Muon.

    `flops` are those that the step waits for, `own` the matrices that this rank makes orthogonal; `bytes_given` is
    what it hands to all-to-all calls, `bytes_waited` what the busiest rank of each call sends or receives.
    `entries` are its numbers in parameters, `others` those that AdamW has. `profile` is of a bucket alone
    (`profile_of` gives the step's).
    """

    flops: int = 0
    calls: int = 0  # of all-to-all
    bytes_given: int = 0
    bytes_waited: int = 0
    entries: int = 0
    others: int = 0
    own: Counter[Matrix] = field(default_factory=Counter, compare=False)
    profile: Profile = field(default=NO_CHANGE, compare=False)


def stack_of(config: DeepSeekV4Config, layout: Layout, name: str, shape: Sequence[int]) -> Stack | None:
    """The parameter's matrices on the first rank; None for what AdamW has."""
    role = parameter_role(name, config)
    if role.optimizer != "muon":
        return None
    cut = cut_of(name)
    first, width, each = shape[0], shape[-1], prod(shape[1:-1])
    mesh, sharers = "dense", layout.dense
    if cut is not None and cut.axis == "expert":
        first, sharers = first // layout.expert, layout.expert_shard
        mesh = "experts" if layout.expert > 1 else "dense"
    elif cut is not None and layout.tensor > 1:
        mesh, sharers = "heads", layout.shard * layout.context
        if cut.dim == 0:
            first //= layout.tensor
        else:
            width //= layout.tensor
    height = ceil(first / sharers) * each  # rows of the largest part
    rows, columns = prod(shape[:-1]) // role.num_matrices, shape[-1]
    aligned = width == columns and height % rows == 0
    cuts = () if aligned else tuple(_pieces(rows, columns, role.num_matrices, height, first * each, width))
    whole = height // rows if width == columns else 0
    entries, narrow = height * width, width < columns
    return Stack((rows, columns), role.num_matrices, mesh, layout.dense, whole, cuts, narrow, entries)


def _pieces(rows: int, columns: int, number: int, height: int, group: int, width: int) -> Iterator[int]:
    """Entries that the first rank has of every cut matrix; parts of `height` rows begin anew in each group."""
    for begin in range(0, rows * number, rows):
        inside, end = begin % group, begin % group + rows
        whole = width == columns and end <= group and inside // height == (end - 1) // height
        if not whole:
            yield max(min(height, group, begin + rows) - begin, 0) * width


def product_flops(matrix: Matrix) -> int:
    """Of all iterations of Newton-Schulz, 2 a multiply-add: two products with the matrix and one of its square."""
    return ITERATIONS * 2 * multiply_adds(matrix)


def update_of(stacks: Iterable[Stack]) -> Update:
    """The step of a rank that has these parameters, in the model's order."""
    flops = calls = given = waited = entries = 0
    own = Counter[Matrix]()
    for bucket in _buckets(stacks):
        one = _bucket(bucket)
        flops, calls, entries = flops + one.flops, calls + one.calls, entries + one.entries
        given, waited = given + one.bytes_given, waited + one.bytes_waited
        own.update(one.own)
    return Update(flops, calls, given, waited, entries, own=own)


def profile_of(stacks: Iterable[Stack], *, offload: bool = False) -> Profile:
    """What that step holds.

    `offload`: moments come from the host by buckets, the next one's while a bucket is at work.
    """
    buckets = list(_buckets(stacks))
    sizes = [_FP32 * sum(stack.entries for stack in bucket) if offload else 0 for bucket in buckets]
    found = []
    for bucket, size, following in zip(buckets, sizes, [*sizes[1:], 0], strict=True):
        found += [moved(temporaries=size + following), _bucket(bucket).profile]
        found.append(moved(temporaries=-size - following))
    return together(found)


@lru_cache(maxsize=1 << 14)
def _bucket(stacks: tuple[Stack, ...]) -> Update:
    """Matrices that are worked on together. Layers of one kind have the same."""
    tape = Tape()
    tape.forward = False
    found = _whole(stacks, tape)
    for mesh in dict.fromkeys(stack.mesh for stack in stacks if stack.piece):
        other = _cut([stack for stack in stacks if stack.mesh == mesh], tape)
        found = Update(
            found.flops + other.flops,
            found.calls + other.calls,
            found.bytes_given + other.bytes_given,
            found.bytes_waited + other.bytes_waited,
            found.entries,
            own=found.own + other.own,
            profile=found.profile + other.profile,
        )
    return found


def _buckets(stacks: Iterable[Stack]) -> Iterator[tuple[Stack, ...]]:
    """Parameters of as many matrices on the same ranks lie together."""
    groups: dict[tuple[int, str], list[Stack]] = {}
    for stack in stacks:
        groups.setdefault((stack.number, stack.mesh), []).append(stack)
    found: list[Stack] = []
    room = 0
    for stack in (stack for group in groups.values() for stack in group):
        size = stack.entries * _FP32
        if size > room:
            if found:
                yield tuple(found)
            found, room = [], BUCKET_BYTES
        found.append(stack)
        room -= size
    if found:
        yield tuple(found)


def _whole(bucket: Sequence[Stack], tape: Tape) -> Update:
    """Matrices that lie here, those of one shape together."""
    counts = Counter[Matrix]()
    for stack in bucket:
        if stack.whole:
            counts[stack.matrix] += stack.whole
    for matrix, count in counts.items():
        number = min(count, max(CHUNK_ENTRIES // prod(matrix), 1))
        direction = tape.new(number * prod(matrix) * _FP32)
        result = _orthogonal(tape, number, matrix)
        del direction, result
    flops = sum(count * product_flops(matrix) for matrix, count in counts.items())
    return Update(flops, entries=sum(stack.entries for stack in bucket), own=counts, profile=tape.cut())


def _orthogonal(tape: Tape, number: int, matrix: Matrix) -> Block:
    """Newton-Schulz of so many matrices at once; returns the result."""
    numbers, small = number * prod(matrix), min(matrix)
    scaled, x = tape.new(numbers * _FP32), tape.new(numbers * _BF16)
    if matrix[0] > matrix[1]:
        x = tape.new(numbers * _BF16)  # the transposed one, put in order
    del scaled
    square = tape.new(number * small * small * _BF16), tape.new(number * small * small * _BF16)
    following = tape.new(numbers * _BF16)
    del square, following
    return x


@dataclass(frozen=True)
class _Cut:
    matrix: Matrix
    piece: int  # entries of it on this rank
    narrow: bool

    @property
    def entries(self) -> int:
        return prod(self.matrix)


def _cut(stacks: Sequence[Stack], tape: Tape) -> Update:
    """Matrices that travel, in rounds."""
    cuts = [_Cut(stack.matrix, piece, stack.narrow) for stack in stacks for piece in stack.piece]
    flops = given = waited = calls = 0
    own = Counter[Matrix]()
    for owned in _rounds(cuts, stacks[0].ranks):
        pieces = sum(cut.piece for batch in owned for cut in batch)
        mine, most = (sum(cut.entries for cut in batch) for batch in (owned[0], max(owned, key=_entries)))
        flops += max(sum(product_flops(cut.matrix) for cut in batch) for batch in owned)
        own.update(cut.matrix for cut in owned[0])
        calls += 2
        given += pieces * _FP32 + mine * _BF16
        waited += max(pieces, most) * (_FP32 + _BF16)
        _round(tape, owned[0], pieces)
    return Update(flops, calls, given, waited, own=own, profile=tape.cut())


def _entries(batch: Sequence[_Cut]) -> int:
    return sum(cut.entries for cut in batch)


def _round(tape: Tape, mine: Sequence[_Cut], pieces: int) -> None:
    """What the rank holds while it owns these matrices and gives so many entries."""
    entries = _entries(mine)
    parts = tape.new(pieces * _FP32)
    sent = tape.new(pieces * _FP32)
    del parts
    received = tape.new(entries * _FP32)
    tape.sent(sent, received)
    del sent
    gathered = tape.new(entries * _FP32)
    results, stacked = [], None
    for matrix, count in Counter(cut.matrix for cut in mine).items():
        stacked = tape.new(count * prod(matrix) * _FP32)
        results.append(_orthogonal(tape, count, matrix))
    del gathered
    copied = sum(c.entries for c in mine if c.narrow or c.matrix[0] > c.matrix[1])
    back, answer = tape.new(copied * _BF16), tape.new(entries * _BF16)
    returned = tape.new(pieces * _BF16)
    tape.sent(answer, returned)
    del results, stacked, back, answer, returned, received


def _rounds(cuts: Sequence[_Cut], ranks: int) -> Iterator[list[list[_Cut]]]:
    return rounds(cuts, ranks, lambda cut: cut.matrix, CHUNK_ENTRIES)
