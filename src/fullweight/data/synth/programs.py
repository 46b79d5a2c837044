"""The "or" tier: small operations-research problems in words, each with one optimal plan.

Linear programs (production, diet) and integer programs (knapsack, staffing; in `networks` assignment,
facility, shortest path, transport), in the spirit of the reference run's optimisation problems but small
enough to check by hand. The reasoning states the program, the plan and its value. Each task has several
phrasings; within a task the numbers come in one order whatever the phrasing, so that a test can read the
instance back from the text alone and solve it another way.

Left out: networks and tables of realistic size, and problems whose optimum has more than two decimals.
"""

from __future__ import annotations

import random

from fullweight.data.synth.problem import Problem, ProgramTask
from fullweight.data.synth.solver import Optimum, Program, solve
from fullweight.data.synth.wording import expression, listing, optimum_problem, plan_text, sentence, value_sum

_MAKERS = ("joinery", "workshop", "small factory", "cooperative", "furniture maker", "mill")
_PRODUCTS = ("chair", "table", "lamp", "frame", "crate", "stool", "cabinet", "tray", "door", "ladder")
_RESOURCES = (
    "hours of labour",
    "machine hours",
    "kilograms of wood",
    "litres of varnish",
    "units of storage",
)
_FOODS = ("oats", "lentils", "rice", "cheese", "beans", "eggs", "nuts", "milk", "maize", "peas")
_NUTRIENTS = ("protein", "iron", "fibre", "calcium", "zinc")
_GEAR = (
    "tent",
    "stove",
    "radio",
    "drill",
    "pump",
    "lamp",
    "rope",
    "camera",
    "heater",
    "ladder",
    "winch",
    "kite",
)
_PROJECTS = ("harbour", "bridge", "library", "tunnel", "school", "park", "market", "station", "museum", "dam")
_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday")


def _short_decimals(optimum: Optimum | None) -> Optimum | None:
    """The optimum, unless a number in it needs more than two decimals."""
    if optimum is None or any((100 * x).denominator > 1 for x in (*optimum.plan, optimum.value)):
        return None
    return optimum


def _diet(rng: random.Random) -> Problem | None:
    n, m = rng.choice([(2, 2), (3, 2), (3, 3)])
    foods, nutrients = rng.sample(_FOODS, n), rng.sample(_NUTRIENTS, m)
    costs = [rng.randint(2, 40) for _ in range(n)]
    holds = [[rng.randint(2, 12) for _ in range(m)] for _ in range(n)]
    aim = [rng.randint(1, 6) for _ in range(n)]
    rows = [[hold[i] for hold in holds] for i in range(m)]
    needs = [sum(a * x for a, x in zip(row, aim, strict=True)) for row in rows]
    program = Program(costs, [[-a for a in row] for row in rows], [-b for b in needs])
    optimum = _short_decimals(solve(program))
    if optimum is None:
        return None
    contents = [listing([f"{h} units of {x}" for h, x in zip(hold, nutrients, strict=True)]) for hold in holds]
    demand = listing([f"{b} units of {x}" for b, x in zip(needs, nutrients, strict=True)])
    opening, each, closing = rng.choice(
        (
            (
                "A canteen plans a meal.",
                "A portion of {} costs {} and holds {}.",
                f"The meal must hold at least {demand}. Portions may be split. What is the lowest cost?",
            ),
            (
                "A farm mixes feed.",
                "One bag of {} costs {} and gives {}.",
                f"The mix needs no less than {demand}. Part bags are allowed. Find the minimum cost.",
            ),
            (
                "Compose the cheapest ration.",
                "Per scoop, {} cost {} and supply {}.",
                f"Required are at least {demand}. Scoops are divisible. How little can the ration cost?",
            ),
        )
    )
    lines = [each.format(f, c, content) for f, c, content in zip(foods, costs, contents, strict=True)]
    constraints = "; ".join(f"{expression(row, foods)} >= {b}" for row, b in zip(rows, needs, strict=True))
    steps = (
        f"Minimise {expression(costs, foods)} subject to {constraints}. "
        f"Best plan: {plan_text(foods, optimum.plan)}. Cost: {value_sum(costs, optimum.plan, optimum.value)}."
    )
    return optimum_problem(" ".join([opening, *lines, closing]), steps, optimum)


def _knapsack(rng: random.Random) -> Problem | None:
    n = rng.randint(4, 7)
    values = [rng.randint(3, 60) for _ in range(n)]
    weights = [rng.randint(2, 25) for _ in range(n)]
    capacity = rng.randint(max(weights), sum(weights) - 1)
    optimum = solve(Program(values, [weights], [capacity], maximise=True, upper=[1] * n))
    if optimum is None:
        return None
    pool, opening, each, closing = rng.choice(
        (
            (
                _GEAR,
                "A boat is loaded for an expedition.",
                "the {} is worth {} and weighs {} kg",
                f"At most {capacity} kg fit. What is the largest possible total worth?",
            ),
            (
                _PROJECTS,
                "A town chooses what to build.",
                "the {} returns {} and costs {}",
                f"The budget is {capacity}. Each is built whole or left. Find the greatest total return.",
            ),
            (
                _GEAR,
                "A van can make one trip.",
                "the {} has priority {} and takes {} litres",
                f"The van holds {capacity} litres. What is the highest sum of priorities it can carry?",
            ),
        )
    )
    items = rng.sample(pool, n)
    facts = [each.format(*fact) for fact in zip(items, values, weights, strict=True)]
    taken = [i for i, x in enumerate(optimum.plan) if x]
    steps = (
        f"Maximise the total with sizes adding to at most {capacity}. "
        f"Take {', '.join(items[i] for i in taken)}. "
        f"Sizes: {' + '.join(str(weights[i]) for i in taken)} = {sum(weights[i] for i in taken)}. "
        f"Total: {' + '.join(str(values[i]) for i in taken)} = {optimum.value}."
    )
    return optimum_problem(f"{opening} Known: {'; '.join(facts)}. {closing}", steps, optimum)


def _production(rng: random.Random) -> Problem | None:
    n, m = rng.choice([(2, 2), (2, 3), (3, 2), (3, 3)])
    maker = rng.choice(_MAKERS)
    products, resources = rng.sample(_PRODUCTS, n), rng.sample(_RESOURCES, m)
    plurals = [f"{product}s" for product in products]
    profits = [rng.randint(5, 60) for _ in range(n)]
    uses = [[rng.randint(2, 9) for _ in range(m)] for _ in range(n)]
    aim = [rng.randint(1, 15) for _ in range(n)]
    rows = [[use[i] for use in uses] for i in range(m)]
    limits = [
        sum(a * x for a, x in zip(row, aim, strict=True)) + rng.choice([0, rng.randint(1, 20)]) for row in rows
    ]
    optimum = _short_decimals(solve(Program(profits, rows, limits, maximise=True)))
    if optimum is None:
        return None
    needs = [listing([f"{u} {r}" for u, r in zip(use, resources, strict=True)]) for use in uses]
    stock = listing([f"{limit} {r}" for limit, r in zip(limits, resources, strict=True)])
    makes = listing(plurals)
    opening, each, available, closing = rng.choice(
        (
            (
                f"A {maker} makes {makes}.",
                "A {} earns {} and needs {}.",
                f"Available are {stock}.",
                "Fractions are allowed. What is the largest possible profit?",
            ),
            (
                f"Plan the week of a {maker} that makes {makes}.",
                "One {} brings {} and takes {}.",
                f"The week offers {stock}.",
                "Work may be carried over, so fractions count. Find the maximum profit.",
            ),
            (
                f"How should a {maker} divide its capacity among {makes}?",
                "Each {} is worth {} and consumes {}.",
                f"There are at most {stock}.",
                "On average over many weeks, any fraction can be made. Give the highest total worth.",
            ),
        )
    )
    lines = [each.format(*fact) for fact in zip(products, profits, needs, strict=True)]
    constraints = "; ".join(f"{expression(row, plurals)} <= {b}" for row, b in zip(rows, limits, strict=True))
    steps = (
        f"Maximise {expression(profits, plurals)} subject to {constraints}. "
        f"Best plan: {plan_text(plurals, optimum.plan)}. "
        f"Value: {value_sum(profits, optimum.plan, optimum.value)}."
    )
    return optimum_problem(" ".join([opening, *lines, available, closing]), steps, optimum)


def _staffing(rng: random.Random) -> Problem | None:
    n = rng.randint(4, 5)
    days = _DAYS[:n]
    needs = [rng.randint(2, 6) for _ in range(n)]
    wages = [rng.randint(20, 60) for _ in range(n)]
    rows = [[-int(k in (i, (i - 1) % n)) for k in range(n)] for i in range(n)]
    optimum = solve(Program(wages, rows, [-b for b in needs], upper=[max(needs)] * n))
    if optimum is None:
        return None
    need_text, wage_text, rule, closing = rng.choice(
        (
            (
                "{} needs {} guards",
                "starting on {} costs {}",
                "A guard works two days in a row",
                "What is the lowest total cost?",
            ),
            (
                "on {} at least {} nurses must be there",
                "a contract that begins on {} costs {}",
                "A contract covers its first day and the day after",
                "Find the minimum cost of the contracts.",
            ),
            (
                "{} calls for {} drivers",
                "hiring from {} on costs {}",
                "Whoever is hired drives for two days",
                "How cheaply can all days be covered?",
            ),
        )
    )
    demand = "; ".join(need_text.format(*pair) for pair in zip(days, needs, strict=True))
    price = "; ".join(wage_text.format(*pair) for pair in zip(days, wages, strict=True))
    wrap = f"{days[-1]} is followed by {days[0]} of the next, identical week"
    names = [f"{day} starts" for day in days]
    steps = (
        f"Each day is covered by those who start on it or the day before. "
        f"Best plan: {plan_text(names, optimum.plan)}. "
        f"Cost: {value_sum(wages, optimum.plan, optimum.value)}."
    )
    question = f"{sentence(demand)}. {rule}; {wrap}. Per person, {price}. {closing}"
    return optimum_problem(question, steps, optimum)


PLAN_TASKS = (
    ProgramTask("diet", "cheapest mix that meets its needs (linear program)", _diet),
    ProgramTask("knapsack", "best choice within a capacity (integer program)", _knapsack),
    ProgramTask("production", "most profitable product mix (linear program)", _production),
    ProgramTask("staffing", "cover every day at least cost (integer program)", _staffing),
)
