"""The "or" tier, continued: who serves whom, and by which way."""

from __future__ import annotations

import random
from itertools import pairwise

from fullweight.data.synth.answers import format_number
from fullweight.data.synth.problem import Problem, ProgramTask
from fullweight.data.synth.solver import Program, solve
from fullweight.data.synth.wording import listing, optimum_problem, sentence, value_sum

_WORKERS = ("Ann", "Ben", "Carl", "Dan", "Eva", "Fay", "Gus", "Hal", "Ida", "Jim", "Kim", "Leo")
_JOBS = ("welding", "painting", "wiring", "packing", "sorting", "testing", "loading", "milling")
_TOWNS = (
    "Arden",
    "Brook",
    "Colby",
    "Dale",
    "Elton",
    "Ford",
    "Grove",
    "Hurst",
    "Ivy",
    "Kirby",
    "Lund",
    "Marsh",
)


def _assignment(rng: random.Random) -> Problem | None:
    n = rng.randint(3, 4)
    workers, jobs = rng.sample(_WORKERS, n), rng.sample(_JOBS, n)
    costs = [[rng.randint(2, 40) for _ in range(n)] for _ in range(n)]
    rows = [[int(k // n == i) for k in range(n * n)] for i in range(n)]
    rows += [[int(k % n == j) for k in range(n * n)] for j in range(n)]
    both = rows + [[-a for a in row] for row in rows]
    limits = [1] * len(rows) + [-1] * len(rows)
    optimum = solve(Program([c for row in costs for c in row], both, limits, upper=[1] * n * n))
    if optimum is None:
        return None
    opening, each, closing = rng.choice(
        (
            (
                "Each worker does one job and each job gets one worker.",
                "Hours of {}: {}",
                "Find the fewest total hours.",
            ),
            (
                "A foreman gives every worker a different job.",
                "In euros {} charges {}",
                "What is the lowest total charge?",
            ),
            (
                "Match workers and jobs one to one.",
                "The cost of {} is {}",
                "What is the smallest possible total cost?",
            ),
        )
    )
    lines = [
        each.format(worker, listing([f"{c} for {job}" for c, job in zip(row, jobs, strict=True)])) + "."
        for worker, row in zip(workers, costs, strict=True)
    ]
    chosen = [(k // n, k % n) for k, x in enumerate(optimum.plan) if x]
    steps = (
        f"Best matching: {', '.join(f'{workers[i]} {jobs[j]} ({costs[i][j]})' for i, j in chosen)}. "
        f"Total: {' + '.join(str(costs[i][j]) for i, j in chosen)} = {optimum.value}."
    )
    return optimum_problem(" ".join([opening, *lines, closing]), steps, optimum)


def _facility(rng: random.Random) -> Problem | None:
    m, n = 3, rng.randint(3, 4)
    towns = rng.sample(_TOWNS, m + n)
    sites, customers = towns[:m], towns[m:]
    fixed = [rng.randint(10, 60) for _ in range(m)]
    costs = [[rng.randint(2, 40) for _ in range(n)] for _ in range(m)]
    pairs = [(i, j) for i in range(m) for j in range(n)]
    served = [[0] * m + [int(b == j) for _, b in pairs] for j in range(n)]
    opened = [[-int(s == i) for s in range(m)] + [int(p == (i, j)) for p in pairs] for i, j in pairs]
    rows = served + [[-a for a in row] for row in served] + opened
    limits = [1] * n + [-1] * n + [0] * len(pairs)
    flat = fixed + [c for row in costs for c in row]
    optimum = solve(Program(flat, rows, limits, upper=[1] * len(flat)))
    if optimum is None:
        return None
    each, closing = rng.choice(
        (
            (
                "A warehouse in {} costs {} to open and serves {}",
                "Every town is served from one open warehouse. What is the lowest total cost?",
            ),
            (
                "Building a clinic in {} costs {}; yearly trips from it cost {}",
                "Each place needs one clinic to look after it. Find the cheapest total.",
            ),
            (
                "The antenna at {} costs {} and its lines cost {}",
                "Every place must be linked to one antenna that is built. What is the minimum total cost?",
            ),
        )
    )
    lines = [
        each.format(site, f, listing([f"{c} for {town}" for c, town in zip(row, customers, strict=True)])) + "."
        for site, f, row in zip(sites, fixed, costs, strict=True)
    ]
    open_sites = [i for i in range(m) if optimum.plan[i]]
    used = [(i, j) for (i, j), x in zip(pairs, optimum.plan[m:], strict=True) if x]
    terms = [str(fixed[i]) for i in open_sites] + [str(costs[i][j]) for i, j in used]
    steps = (
        f"Open {', '.join(sites[i] for i in open_sites)}. "
        f"Serve {', '.join(f'{customers[j]} from {sites[i]}' for i, j in used)}. "
        f"Cost: {' + '.join(terms)} = {optimum.value}."
    )
    return optimum_problem(" ".join([*lines, closing]), steps, optimum)


def _shortest_path(rng: random.Random) -> Problem | None:
    n = rng.randint(5, 6)
    towns = rng.sample(_TOWNS, n)
    roads = set(pairwise(range(n)))
    while len(roads) < n + 3:
        i, j = sorted(rng.sample(range(n), 2))
        roads.add((i, j))
    roads.discard((0, n - 1))
    ways = sorted(roads)
    lengths = [rng.randint(2, 40) for _ in ways]
    arcs = ways + [(j, i) for i, j in ways]
    balance = [[int(i == node) - int(j == node) for i, j in arcs] for node in range(n)]
    net = [1] + [0] * (n - 2) + [-1]
    both = balance + [[-a for a in row] for row in balance]
    optimum = solve(Program(lengths * 2, both, net + [-b for b in net], upper=[1] * len(arcs)))
    if optimum is None:
        return None
    order = rng.sample(range(len(ways)), len(ways))
    opening, each, closing = rng.choice(
        (
            (
                "Roads can be used both ways.",
                "{} to {} is {} km",
                "How many km is the shortest route from {} to {}?",
            ),
            (
                "A courier knows these links, the same in both directions.",
                "{} and {}: {} minutes",
                "What is the least time from {} to {}?",
            ),
            (
                "Tolls are due on each stretch, in either direction.",
                "between {} and {} {} euros",
                "What is the cheapest way from {} to {}?",
            ),
        )
    )
    facts = [each.format(towns[ways[k][0]], towns[ways[k][1]], lengths[k]) for k in order]
    after = {i: (j, length) for (i, j), length, x in zip(arcs, lengths * 2, optimum.plan, strict=True) if x}
    route, legs = [0], []
    while route[-1] != n - 1:
        node, length = after[route[-1]]
        route.append(node)
        legs.append(str(length))
    steps = f"Best route: {' - '.join(towns[i] for i in route)}. Length: {' + '.join(legs)} = {optimum.value}."
    question = f"{opening} {'; '.join(facts)}. {closing.format(towns[0], towns[-1])}"
    return optimum_problem(question, steps, optimum)


def _transport(rng: random.Random) -> Problem | None:
    m, n = rng.choice([(2, 2), (2, 3)])
    towns = rng.sample(_TOWNS, m + n)
    sources, sinks = towns[:m], towns[m:]
    demands = [rng.randint(3, 20) for _ in range(n)]
    cut = rng.randint(2, sum(demands) - 2)
    supplies = [cut + rng.randint(0, 4), sum(demands) - cut + rng.randint(0, 4)]
    costs = [[rng.randint(2, 20) for _ in range(n)] for _ in range(m)]
    leaving = [[int(k // n == i) for k in range(m * n)] for i in range(m)]
    arriving = [[-int(k % n == j) for k in range(m * n)] for j in range(n)]
    flat = [c for row in costs for c in row]
    upper = [min(supplies[k // n], demands[k % n]) for k in range(m * n)]
    optimum = solve(Program(flat, leaving + arriving, supplies + [-d for d in demands], upper=upper))
    if optimum is None:
        return None
    stock, want, rates, closing = rng.choice(
        (
            (
                "{} has {} pallets in stock",
                "{} ordered {} pallets",
                "A pallet from {} costs {}",
                "Every order must be met with whole pallets. Find the lowest total cost.",
            ),
            (
                "the mine at {} yields up to {} tons",
                "the works at {} needs {} tons",
                "Hauling a ton from {} costs {}",
                "Send whole tons. What is the cheapest way to supply all works?",
            ),
            (
                "the depot in {} can send {} vans",
                "{} asks for {} vans",
                "A van from {} travels at a cost of {}",
                "All requests must be met. What is the minimum total cost?",
            ),
        )
    )
    offer = "; ".join(stock.format(*pair) for pair in zip(sources, supplies, strict=True))
    demand = "; ".join(want.format(*pair) for pair in zip(sinks, demands, strict=True))
    lines = [
        rates.format(source, listing([f"{c} to {sink}" for c, sink in zip(row, sinks, strict=True)])) + "."
        for source, row in zip(sources, costs, strict=True)
    ]
    sent = [
        f"{format_number(x)} from {sources[k // n]} to {sinks[k % n]}" for k, x in enumerate(optimum.plan) if x
    ]
    steps = f"Send {', '.join(sent)}. Cost: {value_sum(flat, optimum.plan, optimum.value)}."
    return optimum_problem(f"{sentence(offer)}; {demand}. {' '.join(lines)} {closing}", steps, optimum)


NETWORK_TASKS = (
    ProgramTask("assignment", "workers to jobs at least cost (integer program)", _assignment),
    ProgramTask("facility", "which sites to open and whom each serves (integer program)", _facility),
    ProgramTask("shortest-path", "least cost from one town to another (integer program)", _shortest_path),
    ProgramTask("transport", "supply every demand at least cost (integer program)", _transport),
)
