"""For reports/validation.md: the longest sequences that are planned, and ones that are a little longer."""

from __future__ import annotations

from planner.markdown import gib, table
from planner.plan_file import load_plan
from planner.units import GIB
from reports.render.grid_records import NOT_RUN, OUT, RAN, RECORDS, came_of, record_of
from reports.render.records import Record
from reports.validation.grid import BEYOND, BY_HOST, LONGEST

HOST_HEADS = (
    "model",
    "card",
    "host memory, GiB>",
    "longest planned>",
    "expected>",
    "bound>",
    "it took>",
    "is",
    "longer>",
    "expected>",
    "it took>",
    "is",
)


def sentence() -> str:
    """How many of the longest sequences ran, and of the longer ones how many did not."""
    names = [f"{card}-{model}" for card, model in LONGEST]
    ran = [name for name in names if came_of(f"{name}-longest") == RAN]
    tried = [name for name in names if came_of(f"{name}-beyond") != NOT_RUN]
    ended = [name for name in tried if came_of(f"{name}-beyond") == OUT]
    return (
        f"Of {len(names)} pairs of a card and a model the longest planned sequence has run in {len(ran)}, and "
        f"one a twentieth longer, held to the same budget, has run out of memory in {len(ended)} of {len(tried)}."
    )


def host_sentence() -> str:
    """The same where host memory is the limit, which nothing enforces: what was taken tells."""
    pairs = host_pairs()
    within = sum(longest.host_measured <= budget for longest, _, budget in pairs)
    over = sum(longer.host_measured > budget for _, longer, budget in pairs)
    return (
        f"Where host memory is the limit, the longest planned sequence took no more than it in {within} of "
        f"{len(pairs)} pairs, and the longer one more in {over}."
    )


def host_pairs() -> list[tuple[Record, Record, int]]:
    """Of each pair that was run: the longest, the longer one, and how much host memory the longest was planned for."""
    pairs = []
    for card, model, size in BY_HOST:
        names = [f"{card}-{model}-{size}gib-{which}" for which in ("longest", "beyond")]
        if all(came_of(name) == RAN for name in names):
            longest, longer = map(record_of, names)
            pairs.append((longest, longer, int(longest.content["plan"]["memory"]["host"]["budget_bytes"])))
    return pairs


def section() -> str:
    """Both tables."""
    rows = []
    for (card, model), tokens in LONGEST.items():
        name = f"{card}-{model}"
        longer = load_plan(RECORDS / "plans" / f"{name}-beyond.yaml").total_tokens
        rows.append((model, card, f"{tokens:,}", came_of(f"{name}-longest"), f"{longer:,}", came_of(f"{name}-beyond")))
    heads = ("model", "card", "longest planned>", "it", "longer>", "the longer one, in no more memory")
    told = (
        "With whole layers, rank 16 and every token trained. The longer one is at least "
        f"{BEYOND:g} times as long, by the same settings, held to the same budget. {sentence()}"
    )
    by_host = (
        "With layers in passes and checkpoints in 16 bits host memory is the limit. Nothing enforces it, so that both "
        "run to their end, and what was taken, pinned and anonymous together, is held against the host memory that "
        "the longest was planned for. Some layers were run; host memory holds the inputs of all in any case. "
        f"{host_sentence()}"
    )
    host_rows = [_host_row(*pair) for pair in host_pairs()]
    return (
        f"## The longest that is planned\n\n{told}\n\n{table(heads, rows)}\n{by_host}\n\n{table(HOST_HEADS, host_rows)}"
    )


def _host_row(longest: Record, longer: Record, budget: int) -> tuple[str, ...]:
    plan = longest.content["predicted"]["host"]
    return (
        longest.content["model"]["id"],
        longest.content["card"],
        f"{budget / GIB:g}",
        f"{longest.tokens:,}",
        gib(plan["expected_bytes"]),
        gib(plan["peak_bytes"]),
        gib(longest.host_measured),
        _beside(longest, budget),
        f"{longer.tokens:,}",
        gib(longer.content["predicted"]["host"]["expected_bytes"]),
        gib(longer.host_measured),
        _beside(longer, budget),
    )


def _beside(record: Record, budget: int) -> str:
    return "within" if record.host_measured <= budget else "more"
