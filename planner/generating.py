"""What it takes to write text with a trained adapter: weights, keys and values of all tokens, one chunk of the prompt.

The prompt is read chunk by chunk, each against the keys and values of all before it, so that nothing but these grows
with it. What a layer takes for a chunk is what evaluation takes for a row of that length. The cache of keys and values
has its whole size from the start, and is kept in one of three ways: on the card as it is computed; in host memory, with
two layers of it on the card; on the card in eight bits, with one layer of it as it is computed. Layers with a window
keep that and a chunk on the card, whatever the others do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import ceil
from typing import Literal, get_args

from planner.baseline_formulas import bits_of_activation, float32, one_byte, tokens
from planner.calibration import calibration
from planner.compose import Configuration, compose
from planner.errors import PlanError
from planner.expert_formulas import height
from planner.ledger import Device, Phase, Resource, Term
from planner.optimizations.base import Situation
from planner.plan import Plan
from planner.rates import LAUNCH, TO_DEVICE, rates_of
from planner.symbols import Letters, Number, greatest, least, round_up
from planner.units import format_bytes

Keeping = Literal["card", "host", "int8"]
KEEPINGS: tuple[Keeping, ...] = get_args(Keeping)
"""How a cache is kept. The first that fits is taken of those that change nothing; int8 rounds, so it is asked for."""
EXACT: tuple[Keeping, ...] = ("card", "host")
CHUNKS = (4096, 2048, 1024, 512)
"""Tokens of the prompt that may be read at once on a card: the most that fit, as the host launches the kernels of each
chunk anew, four-bit weights are made wide anew, and a cache in host memory comes to the card anew."""
LEAST = CHUNKS[-1]
"""Enough that a linear is bound by its products, not by its weights; more gains nothing without a card."""
INSTEAD = {"cudnn": "flash"}
"""Of the kernels that plans have. cuDNN is set up for shapes, and the number of keys grows with every token."""
SCORES = 2**22
"""Scores that are written out at once where no kernel attends: soft-capped ones, and in a plan that has no kernel."""
LOADED = frozenset({"lora", "rslora", "mixed_precision", "nf4_weights", "fused_activation", "fused_norm"})
"""Choices of a plan that say how its model is loaded and computed; the others are about training."""
WHILE = frozenset({Phase.EVALUATE})
SOURCE = "trainer/key_values.py"


def in_cache(x: Letters) -> Number:
    """Elements of keys and values in layers that see everything."""
    return (x.L - x.l) * of_layer(x)


def of_layer(x: Letters) -> Number:
    """Elements of keys and values of all tokens in one layer."""
    return 2 * x.B * x.K * x.E * x.S_k


def in_windows(x: Letters) -> Number:
    """Elements of keys and values in layers with a window: what a token sees, and room for a chunk."""
    return x.l * 2 * x.B * x.K * x.E * least(x.S_k, x.s + x.S)


def scales(x: Letters) -> Number:
    """Scales of a cache in eight bits: one for each token, head and layer, of keys and of values."""
    return (x.L - x.l) * 2 * x.B * x.K * x.S_k


def two_layers(x: Letters) -> Number:
    """Elements of keys and values of two layers: one is attended to while the next one comes."""
    return least(x.L - x.l, 1) * 2 * of_layer(x)


def one_layer(x: Letters) -> Number:
    """Elements of keys and values of one layer."""
    return least(x.L - x.l, 1) * of_layer(x)


def attending(x: Letters) -> Number:
    """Bytes alive while a layer attends, above the height of its MLP.

    By a kernel: query, key and value before and after they are turned, and two outputs, of the chunk's own keys and of
    those before, both in float32 as well while they are added. A chunk that is longer than a window is cut into blocks,
    which are copies, and their outputs are merged. Written out: scores in float32, their softmax, and that in the
    compute dtype, where it is another; beside them the query, the same scaled, the output, and
    query, key and value before they were turned.
    """
    by_kernel = tokens(x) * (x.E * ((2 * x.H + 4 * x.K) * x.a // 8 + x.H * (8 + 3 * x.a // 8)) + 16 * x.H)
    whole = round_up(x.S, x.s)
    blocks = x.B * x.E * (whole * 2 * (x.H + x.K) * x.a // 8 + (whole - x.s) * x.H * (2 * x.a // 8 + 12))
    in_blocks = blocks + tokens(x) * x.H * (2 * x.E * x.a // 8 + 16)
    longer = least(x.l, 1) * least(greatest(x.S - x.s, 0), 1)
    by_kernel = greatest(by_kernel, longer * in_blocks)
    row = x.B * x.H * _seen_without_kernel(x)
    scores = greatest(row, least(row * x.S, SCORES)) * (8 + x.a // 8 * (1 - x.a // 32))
    written = least(row, 1) * (scores + tokens(x) * (4 * x.H + 2 * x.K) * x.E * x.a // 8)
    return greatest(greatest(by_kernel, written) - tokens(x) * height(x) * x.a // 8, 0)


def _seen_without_kernel(x: Letters) -> Number:
    """Keys that a chunk sees at most where no kernel attends; 0 where one does."""
    narrow = least(x.S_k, x.s + x.S)
    return least(x.c + x.e, 1) * (narrow + least(x.L - x.l, 1) * (x.S_k - narrow))


def next_token(x: Letters) -> Number:
    """Bytes of the logits of one token for each row, and of what choosing among them takes.

    The compute dtype's, and in float32 the logits, what temperature makes of them, two softmaxes and a running sum, and
    the order by which the least likely are left out, its int64 places among it.
    """
    return x.B * x.V * (x.a // 8 + 40)


def _term(name: str, count: Callable[[Letters], Number], bits: Callable[[Letters], Number], meaning: str) -> Term:
    return Term(name, count, bits, WHILE, meaning, SOURCE)


def eight(x: Letters) -> Number:
    """Bits of a key or a value that is rounded."""
    return 8


IN_WINDOWS = _term("attention/windows", in_windows, bits_of_activation, "keys and values of layers with a window")
ALWAYS: tuple[Term, ...] = (
    IN_WINDOWS,
    _term("attention/generating", attending, one_byte, "what a layer attends with, above its MLP's height"),
    _term("loss/next_token", next_token, one_byte, "logits of the next token, and of choosing it"),
)
CACHES: Mapping[Keeping, tuple[Term, ...]] = {
    "card": (_term("attention/cache", in_cache, bits_of_activation, "keys and values of all tokens"),),
    "host": (
        Term(
            "attention/cache",
            in_cache,
            bits_of_activation,
            WHILE,
            "keys and values of all tokens",
            SOURCE,
            device=Device.PINNED,
        ),
        _term("buffers/cache", two_layers, bits_of_activation, "keys and values of two layers, on the card"),
    ),
    "int8": (
        _term("attention/cache", in_cache, eight, "keys and values of all tokens, rounded to eight bits"),
        _term("attention/cache_scales", scales, float32, "what each token's keys and values were divided by"),
        _term("buffers/cache", one_layer, bits_of_activation, "keys and values of one layer, as they are read"),
    ),
}


@dataclass(frozen=True)
class Generation:
    """What it takes to write ``new`` tokens after a prompt of ``prompt``, with the cache kept in one way.

    Attributes:
        chunk: tokens of the prompt that are read at once.
        card: bytes of each term on the card while tokens are read or written; ``load``: while weights are loaded.
        host: the same in host memory, pinned or not.
        budget: bytes of the card; ``host_budget``: of the host.
        prompt_seconds: to read the prompt; ``token_seconds``: for the last token. Estimates by rates of training; None
            where the card's are unknown.
    """

    prompt: int
    new: int
    chunk: int
    keeping: Keeping
    card: Mapping[str, int]
    load: Mapping[str, int]
    host: Mapping[str, int]
    kind: str
    budget: int
    host_budget: int
    prompt_seconds: float | None
    token_seconds: float | None

    @cached_property
    def expected(self) -> int:
        """Bytes on the card at their peak."""
        return max(sum(self.card.values()), sum(self.load.values()))

    @cached_property
    def high(self) -> int:
        """A bound on what the allocator reserves."""
        return self.expected + int(calibration().reserve_bytes(self.expected, self.kind))

    @cached_property
    def host_high(self) -> int:
        """Bytes in the host, with those of the process; where there is no card, those of the card are among them."""
        process = calibration().host_process_bytes(self.kind)
        return sum(self.host.values()) + process + (self.high if self.kind == "cpu" else 0)

    @property
    def fits(self) -> bool:
        """Whether card and host have room."""
        return self.high <= self.budget and self.host_high <= self.host_budget


def generation(
    plan: Plan, situation: Situation, prompt: int, new: int, keeping: Keeping, chunk: int = LEAST
) -> Generation:
    """What a plan's model takes to write; lengths in tokens, 1 or more each."""
    chunk = min(chunk, prompt)
    on = [choice for choice in plan.choices if choice.id in LOADED]
    knobs = {one.id: {name: value for name, value in one.knobs.items() if value is not None} for one in on}
    made = compose([one.id for one in on], knobs, situation)
    letters, kernel = _letters(made, situation, prompt, new, chunk), kernel_of(plan)
    letters.e = int(kernel is None)
    terms = [term for term in made.ledger.terms.values() if not term.name.startswith(("gradients/", "optimizer/"))]
    mine = (*ALWAYS, *CACHES[keeping])
    reading = [*(term for term in terms if _reads(term)), *mine]
    loading = [term for term in terms if Phase.LOAD in term.phases]
    card = {term.name: int(term.bytes(letters)) for term in reading if term.device is Device.GPU}
    host = {
        term.name: int(term.bytes(letters)) for term in (*loading, *mine) if term.device in (Device.HOST, Device.PINNED)
    }
    load = {term.name: int(term.bytes(letters)) for term in loading if term.device is Device.GPU}
    prompt_seconds, token_seconds = _seconds(made, situation, letters, kernel, card, host, prompt)
    return Generation(
        prompt=prompt,
        new=new,
        chunk=chunk,
        keeping=keeping,
        card={name: size for name, size in card.items() if size},
        load={name: size for name, size in load.items() if size},
        host={name: size for name, size in host.items() if size},
        kind=plan.gpu.kind,
        budget=plan.memory.gpu.budget_bytes,
        host_budget=plan.memory.host.budget_bytes,
        prompt_seconds=prompt_seconds,
        token_seconds=token_seconds,
    )


def kernel_of(plan: Plan) -> str | None:
    """The attention kernel that is written with, by a plan; None where scores are written out."""
    found = next((str(choice.knobs["kernel"]) for choice in plan.choices if "kernel" in choice.knobs), None)
    return INSTEAD.get(found, found) if found else None


def choose(plan: Plan, situation: Situation, prompt: int, new: int, keeping: Keeping | None = None) -> Generation:
    """The first way to keep the cache that fits and changes nothing, or the one that was asked for, by large chunks.

    Raises:
        PlanError: none fits; it says how long a prompt may be.
    """
    asked = f"{prompt:,} tokens of prompt and {new:,} more"
    rows = situation.model.native_context
    if situation.model.learned_positions and prompt + new > rows:
        raise PlanError(asked, f"are more than the {rows:,} positions that {plan.model.id} has learned.")
    if keeping in ("host", "int8") and situation.model.sliding_layers == situation.model.layers:
        why = f"changes nothing: every layer of {plan.model.id} has a window, and keeps that as it is, on the card."
        raise PlanError(f"--cache {keeping}", why, "Leave it out.")
    ways = (keeping,) if keeping else _exact_ways(plan, situation)
    found = []
    for way in ways:
        for chunk in CHUNKS if plan.gpu.kind == "gpu" else (LEAST,):
            made = generation(plan, situation, prompt, new, way, chunk)
            if made.fits:
                return made
        found.append(made)
    why = "do not fit: " + "; ".join(map(_why, found)) + "."
    raise PlanError(asked, why, _nearest(plan, situation, new, ways))


def _exact_ways(plan: Plan, situation: Situation) -> tuple[Keeping, ...]:
    """Without a card there is one memory; where every layer has a window, nothing is kept that could lie elsewhere."""
    model = situation.model
    return EXACT if plan.gpu.kind == "gpu" and model.sliding_layers < model.layers else EXACT[:1]


def _why(found: Generation) -> str:
    if found.kind == "cpu" or found.high <= found.budget:
        needed, there = found.host_high, found.host_budget
    else:
        needed, there = found.high, found.budget
    where = "the host" if needed == found.host_high else "the card"
    ways = {"card": "as they are", "host": "in host memory", "int8": "in eight bits"}
    kept = ways[found.keeping]
    return f"{where} would need {format_bytes(needed)} of {format_bytes(there)} with keys and values kept {kept}"


def _nearest(plan: Plan, situation: Situation, new: int, ways: Sequence[Keeping]) -> str:
    """The longest prompt that fits, and how."""
    rounded: tuple[Keeping, ...] = ("int8",) if situation.model.sliding_layers < situation.model.layers else ()
    tried = (*_exact_ways(plan, situation), *rounded, *ways)
    longest = {each: longest_prompt(plan, situation, new, each) for each in tried}
    asked, best = max(longest[each] for each in ways), max(longest, key=lambda each: longest[each])
    told = f"The longest prompt that fits has {asked:,} tokens" if asked else "No prompt fits"
    if longest[best] > asked:
        told += f", and {longest[best]:,} with --cache {best}"
    return told + "."


def longest_prompt(plan: Plan, situation: Situation, new: int, keeping: Keeping) -> int:
    """The longest prompt that fits with the cache kept so; 0 where none does."""
    fitting, beyond = 0, 2**26
    while beyond - fitting > 1:
        middle = (fitting + beyond) // 2
        if generation(plan, situation, middle, new, keeping).fits:
            fitting = middle
        else:
            beyond = middle
    return fitting


def _reads(term: Term) -> bool:
    """Whether a term of evaluation is there while a chunk is read: attention and loss are of another kind here."""
    return Phase.EVALUATE in term.phases and not term.name.startswith(("attention/", "loss/"))


def _letters(made: Configuration, situation: Situation, prompt: int, new: int, chunk: int) -> Letters:
    gpu = situation.gpu
    workspace = calibration().workspace_bytes(gpu.compute_capability if gpu.kind == "gpu" else None)
    found = made.at(batch=1, total=chunk, target=1, workspace=workspace)
    found.S_k = prompt + new
    return found


def _seconds(
    made: Configuration,
    situation: Situation,
    letters: Letters,
    kernel: str | None,
    card: Mapping[str, int],
    host: Mapping[str, int],
    prompt: int,
) -> tuple[float | None, float | None]:
    """Seconds to read the prompt, and to write the last token; None where the card's rates are unknown.

    A prompt is its products and attention, and for each chunk what is read and written between them; the host launches
    the kernels of each, and the cache in host memory, which is taken first, comes once for each. A token reads every
    weight and the cache once, or waits for it to come from the host, or for the host to launch its kernels.
    """
    rates = rates_of(kernel or "eager", made.settings["dtype"], letters.E, situation.gpu, calibration()).likely
    work = made.ledger.work.values()
    whole = made.at(batch=1, total=float(prompt), target=1, workspace=0)
    whole.e = 0  # of layers with a window no more is looked at, whoever attends
    needed = {Resource.LINEAR: "linear", Resource.ATTENTION: "attention"}
    flops = {
        kind: sum(
            float(each.amount(whole)) for each in work if each.resource is resource and each.phase is Phase.FORWARD
        )
        for resource, kind in needed.items()
    }
    each_chunk = {
        resource: sum(
            float(each.amount(letters)) for each in work if each.resource is resource and each.phase is Phase.FORWARD
        )
        for resource in (Resource.MEMORY, Resource.LAUNCH)
    }
    widened = 2 * letters.a / 8 * float(in_cache(letters)) if "attention/cache_scales" in card else 0.0
    pinned = host.get("attention/cache", 0)
    looked_at = ("weights/", "attention/cache", "attention/windows")
    read = sum(size for name, size in card.items() if name.startswith(looked_at))
    rate = {kind: rates[kind] or 0.0 for kind in ("linear", "attention", "memory", LAUNCH, TO_DEVICE)}
    if not all(value for kind, value in rate.items() if kind != TO_DEVICE or pinned):
        return None, None
    over_link = pinned / rate[TO_DEVICE] if pinned else 0.0
    launching, chunks = each_chunk[Resource.LAUNCH] / rate[LAUNCH], ceil(prompt / letters.S)
    between = (each_chunk[Resource.MEMORY] + widened / 2) / rate["memory"]
    reading = sum(amount / rate[kind] for kind, amount in flops.items()) + chunks * between
    return (
        pinned / calibration().pinning_rate() + max(reading, chunks * launching, chunks * over_link / 2),
        max((read + pinned + widened) / rate["memory"], over_link, launching),
    )
