"""Generated tasks are true, distinct and repeatable; the checker accepts exactly the right answer.

Every operations-research instance is read back from its words alone and solved by enumeration in exact
arithmetic, with no solver.
"""

import hashlib
import json
import math
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from itertools import combinations, islice, pairwise, permutations, product

import pytest

from fullweight.core.errors import ConfigError, DataError
from fullweight.data.synth import TASKS, TIERS, SynthConfig, check, describe, generate
from fullweight.data.synth.answers import format_number, parse_value
from fullweight.data.synth.problem import Chooser, WarmUpTask
from fullweight.data.synth.solver import Program, solve

CLOSING = " Finish with a line 'Answer: ' and the number."


def samples(num_samples: int, seed: int = 0, **mixture: float) -> list[dict]:
    weights = {name.replace("_", "-"): weight for name, weight in mixture.items()} or {"warm-up": 1.0}
    return list(generate(SynthConfig(seed=seed, num_samples=num_samples, mixture=weights)))


def question(sample: dict) -> str:
    return sample["messages"][0]["content"].removesuffix(CLOSING)


def numbers(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]


# --- operations research: read the words, enumerate the plans ---------------------------------------------


def best_vertex(rows: list[list[int]], limits: list[int], objective: list[int]) -> Fraction:
    """Largest objective over the vertices of {rows . x <= limits, x >= 0}, by Cramer's rule."""
    n = len(objective)
    bounds = [[-int(i == j) for j in range(n)] for i in range(n)]
    lines = list(zip(rows + bounds, limits + [0] * n, strict=True))

    def determinant(matrix: list[list[int]]) -> int:
        total = 0
        for order in permutations(range(n)):
            sign = (-1) ** sum(a > b for a, b in combinations(order, 2))
            term = sign
            for i, j in enumerate(order):
                term *= matrix[i][j]
            total += term
        return total

    values = []
    for chosen in combinations(lines, n):
        matrix = [list(row) for row, _ in chosen]
        whole = determinant(matrix)
        if whole == 0:
            continue
        point = []
        for j in range(n):
            swapped = [[*row[:j], limit, *row[j + 1 :]] for row, (_, limit) in zip(matrix, chosen, strict=True)]
            point.append(Fraction(determinant(swapped), whole))
        if all(sum(a * x for a, x in zip(row, point, strict=True)) <= limit for row, limit in lines):
            values.append(sum(c * x for c, x in zip(objective, point, strict=True)))
    return Fraction(max(values))


def sentences(text: str) -> list[list[int]]:
    return [found for found in map(numbers, text.split(". ")) if found]


def production(text: str) -> Fraction:
    *products, limits = sentences(text)
    rows = [list(row) for row in zip(*(p[1:] for p in products), strict=True)]
    return best_vertex(rows, limits, [p[0] for p in products])


def diet(text: str) -> Fraction:
    *foods, needs = sentences(text)
    rows = [[-a for a in row] for row in zip(*(f[1:] for f in foods), strict=True)]
    return -best_vertex(rows, [-b for b in needs], [-f[0] for f in foods])


def knapsack(text: str) -> Fraction:
    *flat, capacity = numbers(text)
    items = list(zip(flat[::2], flat[1::2], strict=True))
    loads = (list(c) for k in range(len(items) + 1) for c in combinations(items, k))
    return Fraction(max(sum(v for v, _ in load) for load in loads if sum(w for _, w in load) <= capacity))


def assignment(text: str) -> Fraction:
    table = sentences(text)
    return Fraction(
        min(sum(row[j] for row, j in zip(table, order, strict=True)) for order in permutations(range(len(table))))
    )


def transport(text: str) -> Fraction:
    (first, second, *demands), *costs = sentences(text)
    totals = []
    for sent in product(*(range(d + 1) for d in demands)):
        if sum(sent) <= first and sum(demands) - sum(sent) <= second:
            rest = [d - s for d, s in zip(demands, sent, strict=True)]
            totals.append(sum(c * x for c, x in zip(costs[0] + costs[1], [*sent, *rest], strict=True)))
    return Fraction(min(totals))


def shortest_path(text: str) -> Fraction:
    body, end = text.rsplit(". ", 1)
    length = {}
    for fact in body.split(". ", 1)[1].split("; "):
        a, b = re.findall(r"[A-Z][a-z]+", fact)
        length[a, b] = length[b, a] = numbers(fact)[0]
    start, goal = re.search(r"from (\w+) to (\w+)\?", end).groups()
    inner = {town for pair in length for town in pair} - {start, goal}
    routes = ((start, *mid, goal) for k in range(len(inner) + 1) for mid in permutations(inner, k))
    usable = (list(pairwise(r)) for r in routes)
    return Fraction(min(sum(length[leg] for leg in legs) for legs in usable if all(leg in length for leg in legs)))


def staffing(text: str) -> Fraction:
    found = numbers(text)
    n = len(found) // 2
    needs, wages = found[:n], found[n:]
    covers = (
        plan
        for plan in product(range(max(needs) + 1), repeat=n)
        if all(plan[i] + plan[i - 1] >= needs[i] for i in range(n))
    )
    return Fraction(min(sum(w * x for w, x in zip(wages, plan, strict=True)) for plan in covers))


def facility(text: str) -> Fraction:
    sites = sentences(text)
    chosen = (open_sites for k in range(1, len(sites) + 1) for open_sites in combinations(sites, k))
    return Fraction(
        min(
            sum(s[0] for s in group) + sum(map(min, zip(*(s[1:] for s in group), strict=True))) for group in chosen
        )
    )


REFERENCES: dict[str, Callable[[str], Fraction]] = {
    "production": production,
    "diet": diet,
    "knapsack": knapsack,
    "assignment": assignment,
    "transport": transport,
    "shortest-path": shortest_path,
    "staffing": staffing,
    "facility": facility,
}


def test_every_or_task_has_a_reference() -> None:
    """A new task cannot be added to the tier without an independent solution here."""
    assert sorted(REFERENCES) == sorted(TIERS["or"])


@pytest.mark.parametrize("task", TIERS["or"])
def test_or_answers_are_optimal(task: str) -> None:
    """The answer is what enumeration finds from the question's words alone, for every phrasing."""
    for sample in samples(25, seed=3, **{task: 1.0}):
        assert format_number(REFERENCES[task](question(sample))) == sample["answer"], question(sample)


SUM = r"(?:[\d.]+ [x+] )*[\d.]*\d"


def value_of(text: str) -> Fraction:
    """A sum of products: "2 x 3 + 4" is 10."""
    return sum((math.prod(map(Fraction, term.split(" x "))) for term in text.split(" + ")), Fraction(0))


@pytest.mark.parametrize("task", sorted(TASKS))
def test_worked_steps_are_true(task: str) -> None:
    """Every equation in the reasoning holds, and the answer is the last number or name it reaches."""
    for sample in samples(40, seed=5, **{task: 1.0}):
        steps = sample["messages"][1]["reasoning_content"]
        for left, right in re.findall(rf"({SUM}) = (?=({SUM}))", steps):
            assert value_of(left) == value_of(right), steps
        if task in TIERS["or"]:
            assert steps.endswith(f"= {sample['answer']}.")


def test_solver_refuses_ties_and_missing_optima() -> None:
    """An optimum is accepted only when it exists and is the only one."""
    tied = [[1, 1]], [4]
    assert solve(Program([1, 1], *tied, maximise=True)) is None
    assert solve(Program([1, 1], *tied, maximise=True, upper=[4, 4])) is None
    assert solve(Program([1, 0], [[-1, 0]], [4], maximise=True)) is None  # unbounded
    assert solve(Program([1, 1], [[1, 1], [-1, -1]], [3, -5])) is None  # infeasible
    assert solve(Program([1, 1], [[1, 1], [-1, -1]], [3, -5], upper=[9, 9])) is None
    third = solve(Program([1, 2], [[3, 1], [1, 4]], [5, 7], maximise=True))
    assert third is not None
    assert third.plan == (Fraction(13, 11), Fraction(16, 11))
    assert third.value == Fraction(45, 11)
    whole = solve(Program([2, 3], [[3, 1], [1, 4]], [5, 7], maximise=True, upper=[5, 5]))
    assert whole is not None
    assert (whole.plan, whole.value) == ((1, 1), 5)


# --- warm-up: solved from the words ------------------------------------------------------------------------


def warm_up_answer(task: str, text: str) -> str:  # noqa: PLR0911
    """The answer, read off the words by another route than the generator's."""
    values = numbers(text)
    named = re.findall(r"\b(?!(?:For|Who|Whose|Which|Hours)\b)[A-Z][a-z]{2,}", text)
    if task == "add":
        return str(sum(values))
    if task == "stops":
        return str(sum(values) - 7)  # the number of stops is said too
    if task == "total":
        return str(values[0] * values[1])
    if task == "best-offer":
        lowest = "cheapest" in text or "least" in text
        return named[values.index(min(values) if lowest else max(values))]
    if task == "lookup":
        table = {name: int(v) for name, v in re.findall(r"(\w+) (\d+)", text)}
        pair = re.search(r"(\w+) or (\w+)\?", text).groups()
        return (min if "less" in text else max)(pair, key=table.__getitem__)
    if task == "offers":
        totals = values[0] * values[1], values[2] * values[3]
        return named[totals.index(min(totals) if "lower" in text else max(totals))]
    if task == "pairing":
        return str(min(values[0] + values[3], values[1] + values[2]))
    profit = 1
    if task == "earnings":
        cost, profit, budget = values
    else:
        cost, budget = values
    return str(profit * max(n for n in range(100) if n * cost <= budget))


@pytest.mark.parametrize("task", TIERS["warm-up"])
def test_warm_up_answers_are_right(task: str) -> None:
    """Each answer follows from the question's words."""
    for sample in samples(300, seed=1, **{task: 1.0}):
        assert warm_up_answer(task, question(sample)) == sample["answer"], question(sample)


@pytest.mark.parametrize("task", TIERS["warm-up"])
def test_warm_up_tasks_are_short_and_many(task: str) -> None:
    """A problem is short enough for a tiny model and there are tens of thousands of them; `stops` is long on
    purpose, for a document must exceed 128 tokens to reach the heavily compressed attention."""
    assert TASKS[task].num_problems > 50_000
    most = 220 if task == "stops" else 75
    for sample in samples(200, **{task: 1.0}):
        text = " ".join(str(v) for m in sample["messages"] for k, v in m.items() if k != "role")
        assert len(re.findall(r"\w|\W", re.sub(r"[a-z]+|[A-Z][a-z]+", "w", text).replace(" ", ""))) <= most


def test_carry_is_written_out() -> None:
    """The addition's reasoning shows both columns and the carry, and they make the answer."""
    for sample in samples(200, add=1.0):
        a, b = numbers(question(sample))
        p, q, ones, carry, s, t, both, again, c, tens = numbers(sample["messages"][1]["reasoning_content"])
        assert (p, q, s, t) == (a % 10, b % 10, a // 10, b // 10)
        assert (p + q, s + t, both, c, both + c) == (ones, both, again, carry, tens)
        assert sample["answer"] == str(10 * tens + ones - 10 * carry)


def test_a_long_sum_says_what_is_left() -> None:
    """Each step adds one number to the total and repeats the others, so that nothing is looked up far back."""
    for sample in samples(200, stops=1.0):
        total, *left = numbers(question(sample).replace("7 stops", ""))
        for step in re.findall(r"[^.]+\.", sample["messages"][1]["reasoning_content"]):
            before, added, total, *rest = numbers(step)
            assert (before + added, added, rest) == (total, left[0], left[1:])
            left = rest
        assert ([], str(total)) == (left, sample["answer"])


# --- the generator -----------------------------------------------------------------------------------------


def test_samples_have_the_shape_that_the_encoder_reads() -> None:
    """A user turn, then an assistant turn with reasoning and a final answer line that checks."""
    for name, sample in describe().items():
        user, assistant = sample["messages"]
        assert sample["task"] == name
        assert (user["role"], assistant["role"]) == ("user", "assistant")
        assert assistant["content"] == f"Answer: {sample['answer']}"
        assert check(sample, assistant["content"])
        assert check(sample, f"{assistant['reasoning_content']}</think>{assistant['content']}")
        assert parse_value(sample["answer"]) is not None
        assert json.loads(json.dumps(sample)) == sample
    assert list(describe()) == list(TASKS)


def test_questions_and_ids_are_distinct() -> None:
    """No question and no id occurs twice."""
    drawn = samples(30_000, total=2, add=1, crates=1) + samples(100, **{"or": 1.0})
    assert len({question(s) for s in drawn}) == len({s["id"] for s in drawn}) == 30_100


def test_first_samples_do_not_depend_on_the_rest() -> None:
    """A longer run starts with the shorter run; a task's problems do not depend on the mixture."""
    assert samples(500) == samples(2_000)[:500]
    mixed = [s for s in samples(400, add=3, offers=1) if s["task"] == "offers"]
    assert mixed == samples(100, offers=1)


def test_seeds_differ() -> None:
    """Another seed gives other problems."""
    first, second = ({s["id"] for s in samples(500, seed=seed)} for seed in (0, 1))
    assert len(first & second) < 25


@pytest.mark.parametrize("hash_seed", ["1", "2"])
def test_same_in_a_fresh_process(hash_seed: str) -> None:
    """The seed alone decides the samples, whatever the process's hash seed."""
    code = (
        "import json; from fullweight.data.synth import SynthConfig, generate; "
        "print(json.dumps(list(generate(SynthConfig(num_samples=48, mixture={'warm-up': 1, 'or': 1})))))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONHASHSEED": hash_seed}, capture_output=True, check=True
    )
    assert json.loads(result.stdout) == samples(48, **{"warm-up": 1, "or": 1})


def test_mixture_is_exact_at_every_length() -> None:
    """Weights of any scale hold to within one sample per task at every prefix; a tier shares its weight."""
    drawn = [s["task"] for s in samples(1_000, add=30, offers=10, total=60)]
    for n in (10, 37, 500, 1_000):
        counts = Counter(drawn[:n])
        for task, share in (("add", 0.3), ("offers", 0.1), ("total", 0.6)):
            assert abs(counts[task] - share * n) <= 1
    tiers = Counter(TASKS[s["task"]].tier for s in samples(320, **{"warm-up": 0.75, "or": 0.25}))
    assert tiers == {"warm-up": 240, "or": 80}


@pytest.mark.parametrize("task", TIERS["warm-up"])
def test_every_index_is_another_problem(task: str) -> None:
    """The count of problems is exact: the whole index range, or a spread of it, gives distinct questions."""
    warm_up = TASKS[task]
    assert isinstance(warm_up, WarmUpTask)
    total = warm_up.num_problems
    indices = range(0, total, max(1, total // 80_000))
    built = Counter(warm_up.build(Chooser(i)).question for i in indices)
    assert len(built) == len(indices)
    sizes = set()
    for i in islice(indices, 0, None, 997):
        chooser = Chooser(i)
        warm_up.build(chooser)
        sizes.add(chooser.size)
    assert sizes == {total}


def test_asking_for_more_than_exist_is_refused() -> None:
    """A task too small for the request says how many problems it has, before any sample is made."""
    assert TASKS["total"].num_problems == 76_800
    with pytest.raises(DataError, match=r"'total' has 76800 distinct problems and the mixture asks for 76801"):
        generate(SynthConfig(num_samples=76_801, mixture={"total": 1.0}))


def test_the_whole_of_a_task_can_be_drawn() -> None:
    """Asking for exactly as many as exist gives each once."""
    assert len({s["id"] for s in samples(76_800, total=1.0)}) == 76_800


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mixture": {"knapsak": 1.0}}, "unknown task 'knapsak'; did you mean 'knapsack'"),
        ({"mixture": {"warmup": 1.0}}, "unknown task 'warmup'; did you mean 'warm-up'"),
        ({"mixture": {}}, "no task to draw from"),
        ({"mixture": {"add": 0.0}}, "weight of 'add' is 0.0, expected a positive number"),
        ({"mixture": {"add": -1.0}}, "expected a positive number"),
        ({"mixture": {"add": float("inf")}}, "mixture.add"),
        ({"num_samples": 0}, "num_samples"),
        ({"mixtures": {}}, "unknown key mixtures; did you mean 'mixture'"),
    ],
)
def test_bad_settings_name_what_is_wrong(values: dict, message: str) -> None:
    """A wrong mixture is one ConfigError with the nearest valid name."""
    with pytest.raises(ConfigError) as error:
        SynthConfig.resolve(values)
    assert message in str(error.value)


def test_generation_is_fast() -> None:
    """At least 1,000 warm-up samples a second, far below what is usual, so a busy machine passes."""
    start = time.process_time()
    samples(5_000)
    assert time.process_time() - start < 5.0


# --- the checker -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "response"),
    [
        ("42", "Answer: 42"),
        ("42", "6 x 7 = 42.</think>Answer: 42"),
        ("42", "I add.\n\nAnswer: 42\n"),
        ("42", "answer:42<｜end▁of▁sentence｜>"),
        ("42", "Answer: 42.0"),
        ("42", "Answer: +84/2"),
        ("42", "Answer: 42\nSo, again:\nAnswer: 42.00"),
        ("42", "Answer: 41 was wrong</think>Answer: 42"),
        ("3.5", "Answer: 3.50"),
        ("3.5", "Answer: 7/2"),
        ("-0.25", "Answer: -1/4"),
        ("0.1", "Answer: 0.10"),
        ("Ann", "Answer: ann "),
        ("map case", "Answer: Map  case"),
    ],
)
def test_right_answers_pass(answer: str, response: str) -> None:
    """Equal rationals and equal names pass, however they are written."""
    assert check({"answer": answer}, response)


@pytest.mark.parametrize(
    ("answer", "response"),
    [
        ("42", ""),
        ("42", "42"),
        ("42", "Answer:"),
        ("42", "Answer: "),
        ("42", "Answer: 43"),
        ("42", "Answer: 42 or 43"),
        ("42", "Answer: 42 42"),
        ("42", "Answer: 41\nAnswer: 42"),
        ("42", "Answer: 42\nAnswer: 41"),
        ("42", "Answer: 42\nbut perhaps not"),
        ("42", "The Answer: 42"),
        ("42", "Answer: 42</think>"),
        ("42", "Answer: 42</think>I do not know"),
        ("42", "Answer: nan"),
        ("42", "Answer: inf"),
        ("42", "Answer: 42/0"),
        ("42", "Answer: 4.2e1"),
        ("42", "Answer: 4_2"),
        ("42", "Answer: ４２"),
        ("42", "Answer: 42.0000000001"),
        ("42", "Answer: " + "9" * 10_000),
        ("0.1", "Answer: 0.1000000000000000055"),
        ("3.5", "Answer: 3.5.0"),
        ("3.5", "Answer: 3,5"),
        ("Ann", "Answer: Ann, Ben"),
        ("Ann", "Answer: Ann\nAnswer: Ben"),
        ("Ann", "Answer: Anna"),
    ],
)
def test_wrong_answers_fail(answer: str, response: str) -> None:
    """Missing, extra, contradicting, non-finite and nearly right answers fail."""
    assert not check({"answer": answer}, response)


@pytest.mark.parametrize("sample", [{}, {"answer": None}, {"answer": 42}, {"answer": ""}, {"answer": "NaN"}])
def test_a_sample_without_an_answer_is_refused(sample: dict) -> None:
    """Nothing can be checked against a sample without a usable answer."""
    with pytest.raises(DataError, match="cannot be checked"):
        check({"id": "x", **sample}, "Answer: 42")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (Fraction(5), "5"),
        (Fraction(-5, 2), "-2.5"),
        (Fraction(1, 20), "0.05"),
        (Fraction(-1, 3), "-1/3"),
        (0, "0"),
        (1200, "1200"),
    ],
)
def test_numbers_have_one_canonical_text(value: Fraction, text: str) -> None:
    """A rational is written one way, and reads back as itself."""
    assert format_number(value) == text
    assert parse_value(text) == value


def test_the_same_data_on_every_machine() -> None:
    """Of shares that nearly tie, whose order a rounding decides: seen equal under Python 3.11 and 3.12."""
    config = SynthConfig(seed=1, num_samples=400, mixture={"warm-up": 1, "stops": 2})
    made = "\n".join(json.dumps(sample, sort_keys=True) for sample in generate(config))
    assert hashlib.sha256(made.encode()).hexdigest().startswith("ba115f6d75de393a")
