"""Warm-up tasks: questions short enough, and steps small enough, for a model of a few million parameters.

What such a model learns in a few hundred steps is to find a value by its name, copy it, compare two numbers
and recall a one-digit sum or product; what it does not learn is long multiplication or search. So each task
is built from those moves, the reasoning writes every one of them out, and numbers stay below 100 (totals
below 200). Names and goods are single common words, so that a small tokenizer makes one token of each.

The numbers of `add`, `total`, `crates` and `earnings` come from small sets (8,100 sums, 64 products, 396
divisions): there a held-out question is unseen as a text, while its sum may have been met under other names.
In the other tasks the numbers themselves are almost always unseen.
"""

from __future__ import annotations

from collections.abc import Sequence

from fullweight.data.synth.problem import Chooser, Problem, WarmUpTask

NAMES = ("Ann", "Ben", "Carl", "Dan", "Eva", "Fay", "Gus", "Hal", "Ida", "Jim",
         "Kim", "Leo", "Max", "Ned", "Olga", "Pia", "Ray", "Sue", "Tom", "Uma")  # fmt: skip
GOODS = ("cups", "pens", "nails", "bolts", "tiles", "pipes", "boxes", "lamps", "books", "bags",
         "chairs", "ropes", "tools", "doors", "wheels", "plates", "seeds", "bricks", "coats",
         "hats")  # fmt: skip
JOBS = ("cut", "sew", "pack", "load", "sort", "weld", "paint", "print")

_DIGITS = range(2, 10)
_TWO_DIGITS = range(10, 100)
_NUM_STOPS = 7
# Offers of two quantities at two prices with different totals.
_OFFERS = [(a, p, b, q) for a in _DIGITS for p in _DIGITS for b in _DIGITS for q in _DIGITS if a * p != b * q]
# (unit cost, budget) that buys one to nine whole units.
_BUDGETS = [(cost, budget) for cost in _DIGITS for budget in range(cost, 10 * cost)]
_HOURS = [
    (a, b, c, d)
    for a in range(1, 10)
    for b in range(1, 10)
    for c in range(1, 10)
    for d in range(1, 10)
    if a + d != b + c
]


def _scan(names: Sequence[str], values: Sequence[int], lowest: bool) -> tuple[str, str]:
    """(winner, steps): one comparison a step, keeping the best so far."""
    best = 0
    steps = [f"{names[0]} {values[0]}."]
    for i in range(1, len(names)):
        better = values[i] < values[best] if lowest else values[i] > values[best]
        steps.append(f"{names[i]} {values[i]}, {'better' if better else 'worse'}.")
        best = i if better else best
    return names[best], " ".join(steps)


def _best_offer(choose: Chooser) -> Problem:
    a, b, c = names = choose.pick_distinct(NAMES, 3)
    x, y, z = values = choose.pick_distinct(_TWO_DIGITS, 3)
    goods = choose.pick(GOODS)
    question, lowest = choose.pick(
        (
            (f"{a} sells {goods} at {x}, {b} at {y}, {c} at {z}. Who is cheapest?", True),
            (f"For {goods} {a} asks {x}, {b} {y} and {c} {z}. Who asks the least?", True),
            (f"For {goods} {a} pays {x}, {b} pays {y}, {c} pays {z}. Who pays most?", False),
            (f"{a} offers {x} for {goods}, {b} {y} and {c} {z}. Which offer is highest?", False),
        )
    )
    winner, steps = _scan(names, values, lowest)
    return Problem(question, steps, winner)


def _lookup(choose: Chooser) -> Problem:
    names = choose.pick_distinct(GOODS, 4)
    values = choose.pick_distinct(_TWO_DIGITS, 4)
    i, j = choose.pick_distinct(range(4), 2)
    table = ", ".join(f"{name} {value}" for name, value in zip(names, values, strict=True))
    question, lowest = choose.pick(
        (
            (f"Prices: {table}. Which cost less, {names[i]} or {names[j]}?", True),
            (f"Price list: {table}. Which cost more, {names[i]} or {names[j]}?", False),
        )
    )
    winner, steps = _scan([names[i], names[j]], [values[i], values[j]], lowest)
    return Problem(question, steps, winner)


def _total(choose: Chooser) -> Problem:
    name, goods = choose.pick(NAMES), choose.pick(GOODS)
    count, price = choose.pick(_DIGITS), choose.pick(_DIGITS)
    question = choose.pick(
        (
            f"{name} buys {count} {goods} at {price} each. What is the total?",
            f"{name} needs {count} {goods}; each costs {price}. How much to pay?",
            f"How much do {count} {goods} at {price} each cost {name}?",
        )
    )
    return Problem(question, f"{count} x {price} = {count * price}.", str(count * price))


def _add(choose: Chooser) -> Problem:
    name, goods = choose.pick(NAMES), choose.pick(GOODS)
    a, b = choose.pick(_TWO_DIGITS), choose.pick(_TWO_DIGITS)
    question = choose.pick(
        (
            f"{name} has {a} {goods} and gets {b} more. How many now?",
            f"{name} made {a} {goods} one day and {b} the next. How many in all?",
            f"{name} needs {a} {goods} here and {b} there. How many to order?",
        )
    )
    ones = a % 10 + b % 10
    carry = ones // 10
    tens = a // 10 + b // 10
    steps = (
        f"Ones: {a % 10} + {b % 10} = {ones}, carry {carry}. "
        f"Tens: {a // 10} + {b // 10} = {tens}, {tens} + {carry} = {tens + carry}."
    )
    return Problem(question, steps, str(a + b))


def _divide(cost: int, budget: int) -> tuple[int, str]:
    """(how many, steps)."""
    count = budget // cost
    bought = f"{count} x {cost} = {count * cost} fits {budget}"
    return count, f"{bought}, {count + 1} x {cost} = {(count + 1) * cost} not."


def _crates(choose: Chooser) -> Problem:
    name, goods = choose.pick(NAMES), choose.pick(GOODS)
    cost, budget = choose.pick(_BUDGETS)
    question = choose.pick(
        (
            f"A crate of {goods} costs {cost}. How many crates can {name} buy with {budget}?",
            f"Crates of {goods} weigh {cost} each. How many can {name} load up to {budget}?",
            f"{name} packs {goods} {cost} to a crate. How many full crates from {budget}?",
        )
    )
    count, steps = _divide(cost, budget)
    return Problem(question, steps, str(count))


def _earnings(choose: Chooser) -> Problem:
    name, goods = choose.pick(NAMES), choose.pick(GOODS)
    cost, budget = choose.pick(_BUDGETS)
    profit = choose.pick(_DIGITS)
    question = choose.pick(
        (
            f"A crate of {goods} takes {cost} hours and earns {profit}. What can {name} earn in {budget}?",
            f"Crates of {goods} weigh {cost} and earn {profit}. What can {name} earn with room for {budget}?",
        )
    )
    count, steps = _divide(cost, budget)
    return Problem(question, f"{steps} {count} x {profit} = {count * profit}.", str(count * profit))


def _offers(choose: Chooser) -> Problem:
    first, second = choose.pick_distinct(NAMES, 2)
    goods = choose.pick(GOODS)
    a, p, b, q = choose.pick(_OFFERS)
    question, lowest = choose.pick(
        (
            (f"{first} sells {a} {goods} at {p} each, {second} {b} at {q}. Whose total is lower?", True),
            (f"{first} buys {a} {goods} at {p} each, {second} {b} at {q}. Who pays more?", False),
        )
    )
    winner, steps = _scan([first, second], [a * p, b * q], lowest)
    return Problem(question, f"{a} x {p} = {a * p}. {b} x {q} = {b * q}. {steps}", winner)


def _pairing(choose: Chooser) -> Problem:
    first, second = choose.pick_distinct(NAMES, 2)
    job, other = choose.pick_distinct(JOBS, 2)
    a, b, c, d = choose.pick(_HOURS)
    question = choose.pick(
        (
            f"Hours: {first} {job} {a}, {other} {b}; {second} {job} {c}, {other} {d}. One job each. Fewest hours?",
            f"{first} can {job} in {a} or {other} in {b}, {second} {job} in {c} or {other} in {d}. "
            "One job each. Least total?",
        )
    )
    straight, crossed = a + d, b + c
    least = min(straight, crossed)
    steps = f"{a} + {d} = {straight}. {b} + {c} = {crossed}. Least {least}."
    return Problem(question, steps, str(least))


def _stops(choose: Chooser) -> Problem:
    name, goods = choose.pick(NAMES), choose.pick(GOODS)
    loads = [choose.pick(_DIGITS) for _ in range(_NUM_STOPS)]
    listed = ", ".join(str(load) for load in loads)
    question = choose.pick(
        (
            f"{name} unloads {goods} at {_NUM_STOPS} stops: {listed}. How many in all?",
            f"At {_NUM_STOPS} stops {name} leaves {listed} {goods}. What is the total?",
        )
    )
    total, left, steps = loads[0], loads[1:], []
    while left:
        step = f"{total} + {left[0]} = {total + left[0]}"
        total, left = total + left[0], left[1:]
        steps.append(f"{step}, left {', '.join(map(str, left))}." if left else f"{step}.")
    return Problem(question, " ".join(steps), str(total))


WARM_UP_TASKS = (
    WarmUpTask("add", "two-digit addition, the carry written out", _add),
    WarmUpTask("best-offer", "the lowest or highest of three named values", _best_offer),
    WarmUpTask("crates", "whole units that a budget buys", _crates),
    WarmUpTask("earnings", "whole units that a limit allows, times what one earns", _earnings),
    WarmUpTask("lookup", "look two prices up in a list and compare them", _lookup),
    WarmUpTask("offers", "compare two totals of quantity times price", _offers),
    WarmUpTask("pairing", "two workers, two jobs: the cheaper of two assignments", _pairing),
    WarmUpTask("stops", "a long sum, one addition a step (a document of about 170 tokens)", _stops),
    WarmUpTask("total", "one-digit quantity times one-digit price", _total),
)
