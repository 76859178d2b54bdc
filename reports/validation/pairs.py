"""Runs in pairs, with an optimisation and without it: is what it changes what the planner says it changes?

`measure --pairs` runs them, on a whole H200, so that no limit but a plan's own bound has a part in it. What is not
named in a row is switched off, or chosen as for any user where it has no say in what is compared.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from reports.validation.cases import Case, argument

CARD = "h200-sxm"
WHOLE = "-streamed +mixed_precision +exact_attention +chunked_loss +gradient_checkpointing -nf4_weights -adamw_8bit"
RESIDENT = f"{WHOLE} -checkpoint_offload"
PASSES = "+streamed +mixed_precision +chunked_loss -adamw_8bit -sequence_blocks"
KEPT_OFF = "-checkpoint_int8 -checkpoint_nf4 -checkpoint_spacing -checkpoint_disk -kept_attention"
STREAMED = f"{PASSES} -nf4_weights -streamed_weights {KEPT_OFF}"
STEPS = 7
"""Of a run whose seconds are compared, after the probe step; of others there are two."""


@dataclass(frozen=True)
class Pair:
    """An optimisation, and the names of two runs that differ in it alone.

    Attributes:
        timed: whether seconds are compared: both runs have the card to themselves.
        host: whether it is host memory that it changes, not the card's.
    """

    optimization: str
    without: str
    with_it: str
    timed: bool = False
    host: bool = False


@dataclass(frozen=True)
class _Base:
    name: str
    model: str
    tokens: int
    rank: int
    words: str


_LLAMA = _Base("llama", "llama-3.2-1b", 4096, 16, RESIDENT)
_WHOLE_KEPT = _Base(
    "kept", "llama-3.2-1b", 4096, 16, RESIDENT.replace("+gradient_checkpointing", "-gradient_checkpointing")
)
_WIDE = _Base("wide", "llama-3.2-1b", 2048, 64, RESIDENT)  # adapters that are large enough to be seen
_PHI = _Base("phi", "phi-2", 2048, 8, f"{RESIDENT} -gradient_checkpointing".replace("+gradient_checkpointing ", ""))
_GEMMA = _Base("gemma", "gemma-2-2b", 2048, 8, RESIDENT.replace("+exact_attention ", ""))
_LONG = _Base("long", "llama-3.2-1b", 16384, 16, f"{WHOLE} +checkpoint_offload")
_PASSES = _Base("passes", "llama-3.2-1b", 16384, 16, STREAMED)
_NF4 = _Base(
    "nf4", "llama-3.2-1b", 16384, 16, f"{STREAMED.replace('-nf4_weights', '+nf4_weights')} -streamed_nf4_weights"
)

_SWITCHED: tuple[tuple[_Base, str, str, bool, bool], ...] = (
    # what from, the optimisation, what it needs besides or its knobs, seconds as well, host memory
    (_LLAMA, "nf4_weights", "", True, False),
    (_LLAMA, "checkpoint_offload", "", True, False),
    (_LLAMA, "label_smoothing", "", True, False),
    (_LLAMA, "fused_norm", "", True, False),
    (_LLAMA, "compiled_layers", "", True, False),
    (_WHOLE_KEPT, "compiled_layers", "", True, False),
    (_LLAMA, "cache_release", "cache_release.every=2", True, False),
    (_LLAMA, "sequence_packing", "sequence_packing.documents=4", True, False),
    (_WIDE, "adamw_8bit", "", True, False),
    (_WIDE, "weight_averaging", "weight_averaging.kind=ema weight_averaging.place=gpu", False, False),
    (_WIDE, "lookahead", "lookahead.place=gpu", False, False),
    (_WIDE, "gradient_noise", "gradient_noise.kind=absolute", True, False),
    (_WIDE, "gradient_centralization", "", True, False),
    (_WIDE, "adaptive_clipping", "", True, False),
    (_WIDE, "early_stopping", "train.evaluate_every=1", False, True),
    (_WIDE, "spike_rewind", "", False, True),
    (_WIDE, "rate_range_test", "rate_range_test.steps=8 rate_range_test.rule=steepest", False, True),
    (_WIDE, "mapped_tokens", "--disk=20GiB", False, True),
    (_LONG, "fused_norm", "", True, False),  # long enough that no step waits for the host
    (_LONG, "compiled_layers", "", True, False),
    (_LONG, "context_stages", "train.steps=14", True, False),  # some of each stage before those that are held
    (_PASSES, "checkpoint_int8", "", True, True),
    (_PASSES, "checkpoint_nf4", "", True, True),
    (_PASSES, "checkpoint_spacing", "checkpoint_spacing.every=2", True, True),
    (_PASSES, "checkpoint_disk", "--disk=20GiB", True, True),
    (_PASSES, "kept_attention", "", True, False),
    (_PASSES, "sequence_blocks", "sequence_blocks.tokens=4096", True, False),
    (_PASSES, "streamed_weights", "", True, False),
    (_NF4, "streamed_nf4_weights", "", True, False),
)
_TAKEN_AWAY: tuple[tuple[_Base, str, str], ...] = (  # the same, from a run that has it
    (_LLAMA, "exact_attention", ""),
    (_LLAMA, "chunked_loss", ""),
    (_LLAMA, "gradient_checkpointing", ""),
    (_LLAMA, "mixed_precision", ""),
    (_PHI, "fused_activation", ""),
)


def _case(base: _Base, tag: str, words: str, timed: bool) -> Case:
    switched = {word[1:] for word in words.split() if word[0] in "+-" and not word.startswith("--")}
    own = [word for word in base.words.split() if word[1:] not in switched]
    steps = [] if "train.steps=" in words else [f"train.steps={STEPS if timed else 2}"]
    fixed = [f"lora.rank={base.rank}", *steps, "train.validation=0.5", "train.evaluation_rows=1"]
    given = " ".join(map(argument, [*own, *words.split(), *fixed]))
    return Case(f"{base.name}-{tag}", f"--gpu {CARD} --model random:{base.model} --context {base.tokens} {given}")


def _cases() -> Iterator[Case]:
    for base in (_LLAMA, _WHOLE_KEPT, _WIDE, _PHI, _PASSES, _NF4):
        yield _case(base, "base", "+fused_activation" if base is _PHI else "", True)
    yield _case(_LONG, "base", "", True)
    yield _case(_GEMMA, "eager", "-blockwise_attention", True)
    yield _case(_GEMMA, "blocks", "+blockwise_attention", True)
    for base, name, words, timed, _ in _SWITCHED:
        yield _case(base, name, f"+{name} {words}", timed)
    for base, name, words in _TAKEN_AWAY:
        yield _case(base, f"no-{name}", f"-{name} {words}", True)


PAIRED: tuple[Case, ...] = tuple(_cases())
PAIRS: tuple[Pair, ...] = (
    *(Pair(name, f"{base.name}-base", f"{base.name}-{name}", timed, host) for base, name, _, timed, host in _SWITCHED),
    *(Pair(name, f"{base.name}-no-{name}", f"{base.name}-base", True) for base, name, _ in _TAKEN_AWAY),
    Pair("blockwise_attention", "gemma-eager", "gemma-blocks", True),
    Pair("streamed", "long-base", "passes-base", True),
)
TIMED: frozenset[str] = frozenset(name for pair in PAIRS if pair.timed for name in (pair.without, pair.with_it))
"""Names of the runs that have the card to themselves."""
