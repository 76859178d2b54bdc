"""A plan told to a person: the verdict first, then what it costs, why, and what to type next.

Everything is laid out for 80 columns and uses more where there are more. Nothing is computed here but sums.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from shlex import quote

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from planner.ledger import GROUPS, Phase
from planner.plan import ON_WHERE_ASKED, Plan, Rejection, Scalar
from planner.report_time import phase_told, time_facts, time_section
from planner.rope_scaling import rope_told
from planner.units import GIB, MIB, format_bytes

NARROWEST, WIDEST = 80, 120  # what the table of phases needs; what can be read with ease
BAR_WIDEST = 96
TITLES: Mapping[str, tuple[str, str]] = {
    "fits": ("FITS", "bold green"),
    "does-not-fit": ("DOES NOT FIT", "bold red"),
}
HEADINGS: Mapping[str, str] = {"optimizer": "optim.", "evaluate": "eval.", "evaluate_loss": "e.loss"}
# Five columns each at most: names of terms stay whole beside ten phases in 80 columns.
NARROW_HEADINGS: Mapping[str, str] = {
    "forward": "forw.",
    "attention": "attn.",
    "backward": "back.",
    "attention_backward": "attn.\nback.",
    "optimizer": "opt.",
    "evaluate": "eval.",
    "evaluate_loss": "eval.\nloss",
}
MANY_PHASES = 9
NAMES_NARROWEST, NAMES_WIDEST = 12, 28  # the column of names beside the figures
KV_CACHE = "kv cache"
# Signs for low, expected, high, free and the end of the budget; the second row where output is not UTF-8.
BLOCKS, LETTERS = "█▓░·│", "#+-.|"
ASCII = str.maketrans({"–": "-", "·": "*", "…": "...", "≥": ">=", "≤": "<=", "×": "x"})


def print_report(plan: Plan, console: Console, *, written: Path | None = None, closing: bool = True) -> None:
    """Print the report of a plan.

    Args:
        written: where the plan was written, if it was.
        closing: whether to end with the next command to type.
    """
    print_parts(console, report(plan, console, written=written, closing=closing))


def print_parts(console: Console, parts: Iterable[RenderableType]) -> None:
    """Print parts one below the other, none wider than a page; in plain text no line ends in spaces."""
    with console.capture() as captured:
        for part in parts:
            console.print(part, highlight=False, markup=False, width=page_width(console))
    text = captured.get()
    if console.color_system is None:  # cells are padded with spaces, which nobody wants in a file
        text = "".join(line.rstrip() + "\n" for line in text.splitlines())
    if _plain(console):
        text = text.translate(ASCII)
    console.file.write(text)


def report(
    plan: Plan, console: Console, *, written: Path | None = None, closing: bool = True
) -> Iterator[RenderableType]:
    """The parts of the report, in reading order."""
    width = page_width(console)
    title, style = TITLES[plan.verdict]
    yield hanging([(Text(title, style=style), Text(printable(plan.summary), style="bold"))])
    if plan.nearest:
        yield section("The nearest that works", _bullets(plan.nearest))
    if plan.warnings:
        yield Text()
        yield hanging((Text("warning", style="yellow"), printable(warning)) for warning in plan.warnings)
    yield section("In short", facts(plan))
    yield section(f"{_device(plan)} memory against its budget", budget_bar(plan, width - 2, _plain(console)))
    yield section(f"{_device(plan)} memory by phase, in {_unit(plan)[0]}", phase_table(plan))
    if (timed := time_section(plan)) is not None:
        yield section("Time of a step, and the rates it goes by", timed)
    if plan.choices:
        made = ((choice.id, [choice.reason, *_knobs(choice.knobs)]) for choice in plan.choices)
        yield section("Switched on, and why", _named(made))
    if plan.rejected:
        yield section("Left off, and why", _named(_left_off(plan.rejected)))
    if plan.not_modelled:
        yield section("Not modelled", _bullets(plan.not_modelled))
    if written is not None:
        yield section("Written", Text(str(written)))
    if closing:
        rows = ((Text(why), Text(command, style="bold")) for why, command in next_commands(plan, written))
        yield section("Next", hanging(rows))


def page_width(console: Console) -> int:
    """Columns to write in; below the narrowest the terminal wraps, which is better than numbers cut short."""
    return max(NARROWEST, min(console.width, WIDEST))


def facts(plan: Plan) -> RenderableType:
    """Card, model, sequence, longest, time and host in one line each."""
    return hanging((Text(name, style="bold"), printable(told)) for name, told in _facts(plan))


def _facts(plan: Plan) -> Iterator[tuple[str, str]]:
    gpu, host = plan.gpu, plan.memory.host
    usable = format_bytes(plan.memory.gpu.budget_bytes)
    if gpu.kind == "gpu":
        shown = f"{_size(gpu.visible_bytes)} less {_size(gpu.context_bytes)} of CUDA context"
        yield "Card", f"{gpu.name}: {usable} to use ({shown}, {gpu.context_basis})"
    else:
        yield "Machine", f"{gpu.name}, no card: {usable} of memory to use"
    model, count = plan.model, plan.model.parameters
    many = f"{count / 1e9:.2f} billion" if count >= 1e9 else f"{count / 1e6:.4g} million"
    made_for = f"{model.layers} layers, made for {model.native_context:,} tokens"
    yield "Model", f"{model.id}: {many} parameters, {made_for}"
    tier = f"tier {plan.tier}: " if plan.tier is not None else ""
    parts = f"{plan.context:,} of context + {plan.target:,} to train = {plan.total_tokens:,} tokens"
    if plan.context == 0:
        parts = f"{plan.total_tokens:,} tokens, all of them trained"
    yield "Sequence", f"{tier}{parts}, LoRA rank {plan.lora_rank}"
    if plan.rope.reason:
        yield "Positions", f"{rope_told(plan.rope)}: {plan.rope.reason}"
    yield "Longest", longest(plan)
    yield from time_facts(plan)
    pinned = f", {format_bytes(host.pinned_bytes)} of it pinned" if host.pinned_bytes else ""
    expected = host.expected_bytes if host.expected_bytes != host.peak_bytes else None
    about = f"; {format_bytes(expected)} expected" if expected is not None else ""
    yield "Host RAM", f"{format_bytes(host.peak_bytes)} of {_size(host.budget_bytes)}{pinned}{about}"
    disk = plan.memory.disk
    if disk.training_bytes:
        traffic = sum(phase.disk_bytes for phase in plan.time.phases.values())
        yield (
            "Scratch",
            f"{format_bytes(disk.training_bytes)} of {_size(disk.budget_bytes)} on disk while it trains; "
            f"{format_bytes(traffic // 2)} written and read anew in every step, which SSDs wear by",
        )
    if left := sum(disk.terms.values()) - disk.training_bytes:
        merged = ", and for the model that it is merged into" if plan.train.merge else ""
        yield "Disk", f"{format_bytes(left)} for the adapter{merged}"


def longest(plan: Plan) -> str:
    """The longest sequence at the same rank."""
    with_target, every, rank = plan.longest.with_target, plan.longest.all_trained, f"at rank {plan.lora_rank}"
    if with_target is not None and plan.context and with_target > plan.target:
        rest = f", {every:,} if all are" if every is not None else ""
        return f"{with_target:,} tokens if {plan.target:,} are trained{rest}, {rank}"
    return f"{every:,} tokens, all trained, {rank}" if every is not None else f"no sequence fits {rank}"


def budget_bar(plan: Plan, width: int, plain: bool = False) -> RenderableType:
    """Low, expected and high as one bar against the budget, and the same in words."""
    peak, budget = plan.memory.gpu.peak_bytes, plan.memory.gpu.budget_bytes
    cells, scale = max(10, min(width, BAR_WIDEST) - 1), max(budget, peak.high, 1)
    signs = LETTERS if plain else BLOCKS
    bar, edge = Text(), min(cells, round(cells * budget / scale))
    for cell in range(cells + 1):
        if cell == edge:
            bar.append(signs[4], style="bold")
            continue
        place = (cell - (cell > edge) + 0.5) * scale / cells
        level = next((i for i, end in enumerate((peak.low, peak.expected, peak.high)) if place < end), 3)
        bar.append(signs[level], style="red" if cell > edge else ("green", "cyan", "yellow", "dim")[level])
    rest = budget - peak.high
    left = f"{_size(rest)} free" if rest >= 0 else f"{_size(-rest)} too much"
    words = Table.grid(padding=(0, 1))
    for _ in range(3):
        words.add_column()
    rows = (
        (0, "low", peak.low, "the exactly known part alone"),
        (
            1,
            "expected",
            peak.expected,
            f"what tensors take at the highest moment ({phase_told(plan.memory.gpu.peak_phase)})",
        ),
        (2, "high", peak.high, f"bound on what is reserved; {left}"),
        (4, "budget", budget, "a plan fits when high is within it"),
    )
    for sign, name, size, meaning in rows:
        words.add_row(f"{signs[sign]} {name}", Text(format_bytes(size), justify="right"), Text(meaning, style="dim"))
    return Group(bar, words)


def phase_table(plan: Plan) -> RenderableType:
    """Every term in every phase, by group; small ones of a group share a line."""
    phases = _shown_phases(plan)
    unit = _unit(plan)[1]
    sizes, many = plan.memory.gpu.phases, len(phases) >= MANY_PHASES
    rows: list[tuple[str, list[str], str]] = []

    def row(label: str, terms: Iterable[str], style: str) -> None:
        wanted = list(terms)
        cells = [sum(sizes[phase].get(term, 0) for term in wanted) for phase in phases]
        rows.append((printable(label), [_cell(size, unit, many) for size in cells], style))

    for group in _groups(plan):
        if group == KV_CACHE:
            rows.append((KV_CACHE, ["0" for _ in phases], "bold"))
            continue
        terms = _terms(plan, group)
        row(group, terms, "bold")
        large = [term for term in terms if _most(plan, term) >= unit / 200]
        small = [term for term in terms if term not in large]
        if len(terms) == 1 or not large:
            continue
        for term in large:
            row("  " + term.partition("/")[2], [term], "")
        if small:
            names = ", ".join(term.partition("/")[2] for term in small)
            row(f"  {names if len(names) <= 20 else f'{len(small)} small ones'}", small, "")
    every = {term for phase in phases for term in sizes[phase]}
    row("sum", every, "bold reverse")
    heads = [(NARROW_HEADINGS if many else HEADINGS).get(phase, phase) for phase in phases]
    grid = Table(box=None, padding=(0, 0, 0, 1), pad_edge=False, header_style="dim")
    # Where there is no room, names are cut short and figures are not.
    figures = sum(
        1 + max(len(text) for text in (*head.splitlines(), *(cells[place] for _, cells, _ in rows)))
        for place, head in enumerate(heads)
    )
    room = min(NAMES_WIDEST, max(NAMES_NARROWEST, NARROWEST - 2 - figures))
    grid.add_column("", no_wrap=True, overflow="ellipsis", ratio=1, max_width=room)
    for phase, head in zip(phases, heads, strict=True):
        high = phase == plan.memory.gpu.peak_phase
        grid.add_column(head, justify="right", no_wrap=True, style="bold" if high else "")
    for label, cells, style in rows:
        grid.add_row(label, *cells, style=style)
    note = "Training keeps no key/value cache; the keys and values of a layer are under attention."
    return Group(grid, Text(note, style="dim"))


def _groups(plan: Plan) -> list[str]:
    present = {term.partition("/")[0] for phase in plan.memory.gpu.phases.values() for term in phase}
    known = [group for group in GROUPS if group in present]
    known += sorted(present - set(known))
    after = known.index("attention") + 1 if "attention" in known else len(known)
    return [*known[:after], KV_CACHE, *known[after:]]


def _terms(plan: Plan, group: str) -> list[str]:
    """Terms of a group that are ever more than nothing, the largest first."""
    names = {term for phase in plan.memory.gpu.phases.values() for term in phase if term.startswith(group + "/")}
    return sorted((name for name in names if _most(plan, name)), key=lambda name: (-_most(plan, name), name))


def _most(plan: Plan, term: str) -> int:
    return max(phase.get(term, 0) for phase in plan.memory.gpu.phases.values())


def _shown_phases(plan: Plan) -> list[str]:
    """The phases in their order, and behind them any that only the plan knows."""
    names = [phase.value for phase in Phase if phase in plan.memory.gpu.phases]
    return names + [phase for phase in plan.memory.gpu.phases if phase not in names]


def next_commands(plan: Plan, written: Path | None) -> list[tuple[str, str]]:
    """What to type next, each with what for."""
    command = plan.provenance.command or f"plan --gpu {quote(plan.gpu.id)}"
    look = [
        ("look behind a number", f"plan explain {_largest(plan)}"),
        ("look behind a choice", "plan optimizations"),
    ]
    if plan.verdict != "fits":
        return look
    data = "" if plan.train.data else " --data FOLDER"
    where = "train it, on that card" if plan.gpu.kind == "gpu" else "train it"
    if written is not None:
        run = f"plan --plan {quote(str(written))} --execute{data}"
        return [(where, run), ("see if it still fits", f"plan check {quote(str(written))}"), look[0]]
    return [(where, f"{command} --execute{data}"), ("keep this plan", f"{command} --out plan.yaml"), look[0]]


def _largest(plan: Plan) -> str:
    """The largest term at the highest moment that grows with the sequence, where there is one."""
    terms = plan.memory.gpu.phases.get(plan.memory.gpu.peak_phase, {})
    passing = {name: size for name, size in terms.items() if not name.startswith("weights/")} or terms
    return max(passing, key=lambda name: passing[name], default="S")


def _device(plan: Plan) -> str:
    return "GPU" if plan.gpu.kind == "gpu" else "Machine"


def _unit(plan: Plan) -> tuple[str, int]:
    return ("GiB", GIB) if plan.memory.gpu.peak_bytes.high >= GIB else ("MiB", MIB)


def _cell(size: int, unit: int, narrow: bool) -> str:
    if size == 0:
        return "–"
    digits = 2 if size < 100 * unit else 0  # five signs at most where it is a matter of fitting at all
    return f"{size / unit:,.{digits}f}" if size >= unit / 200 else "<.01" if narrow else "<0.01"


def _size(count: int) -> str:
    """Bytes for a sentence: "32 GiB", not "32.00 GiB"."""
    return format_bytes(count).replace(".00 ", " ")


def _knobs(knobs: Mapping[str, Scalar]) -> list[str]:
    told = (f"{name} = {value:,}" if type(value) is int else f"{name} = {value}" for name, value in knobs.items())
    return [", ".join(told)] if knobs else []


def _named(rows: Iterable[tuple[str, Iterable[str]]]) -> RenderableType:
    return hanging((Text(printable(name), style="bold"), "\n".join(map(printable, lines))) for name, lines in rows)


def _left_off(rejected: Iterable[Rejection]) -> Iterator[tuple[str, Iterable[str]]]:
    """Each with its reasons; in one row what is on only where it is asked for, of which `plan optimizations` tells."""
    asked = []
    for each in rejected:
        if any(reason.startswith(ON_WHERE_ASKED) for reason in each.reasons):
            asked.append(each.id)
        else:
            yield each.id, each.reasons
    if asked:
        yield "only if asked for", [f"{', '.join(asked)}: --with NAME; `plan optimizations` says what each does"]


def _bullets(lines: Iterable[str], mark: str = "*") -> RenderableType:
    return hanging(((Text(mark), printable(line)) for line in lines), gap=1)


def hanging(rows: Iterable[tuple[Text, str | Text]], gap: int = 2) -> RenderableType:
    """A narrow column and a wide one whose lines wrap below themselves."""
    grid = Table.grid(padding=(0, gap))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")  # a word longer than the line, such as a formula, is never cut short
    for label, told in rows:
        grid.add_row(label, Text(told) if isinstance(told, str) else told)
    return grid


def section(title: str, content: RenderableType) -> RenderableType:
    """A titled part of a report, set off by an empty line."""
    return Group(Text(), Text(title, style="bold underline"), Padding(content, (0, 0, 0, 2)))


def _plain(console: Console) -> bool:
    return not console.encoding.lower().startswith("utf")


def printable(text: str) -> str:
    """The text without control characters, which a plan file from elsewhere might carry to the terminal."""
    return "".join(sign if sign.isprintable() else " " for sign in text)
