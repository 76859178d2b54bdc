"""A grid of runs to hold predictions against: models, cards, lengths and settings; `measure --grid` runs it.

Cards of the test machine's own, held to 8, 12 and 24 GiB, tell memory, the driver's count and seconds; a card that
another stands in for tells memory alone. What is not named in a row is chosen as for any user.

It was run once before, without `_new` and with fewer steps: plans and records of then are in ``grid-first``. Runs whose
settings or peak were planned otherwise by formulas that came after were made again; what they were before is in
``grid-second``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from reports.validation.cases import Case, argument

HELD = {f"h200-{size}gib": f"reports/validation/cards/h200-{size}gib.yaml" for size in (8, 12, 24)}
"""Cards of the test machine's own, held to less memory. All others are cards that it stands in for."""

WHOLE = "-streamed +mixed_precision +exact_attention"  # layers as transformers runs them
SMALL = f"{WHOLE} +nf4_weights +gradient_checkpointing +chunked_loss"
KEEP = f"{WHOLE} -nf4_weights -gradient_checkpointing -chunked_loss"
PASSES = "+streamed +mixed_precision"
NF4 = f"{PASSES} +nf4_weights -streamed_nf4_weights"
HALF = "mixed_precision.dtype=float16"


def run(card: str, model: str, tokens: int, rank: int, words: str, tag: str, layers: int | None = None) -> Case:
    """One run.

    Args:
        card: an id of `plan gpus`, or of ``HELD``.
        words: ``+name`` and ``-name`` for `--with` and `--without`, ``knob=value`` for `--set`, options as they are.
        tag: what sets it apart from others of the same card, model and length.
        layers: of layers that run one by one, so many are run; None runs all.
    """
    if card not in HELD or layers is not None or tokens > 2**16:  # no seconds to compare: to be held to the bound
        steps = 1 if tokens > 2**15 else 2
    else:
        steps = 8 if tokens <= 2**13 else 5
    fixed = f"lora.rank={rank} train.steps={steps} train.validation=0.5 train.evaluation_rows=1"
    given = " ".join(map(argument, [*words.split(), *fixed.split()]))
    arguments = f"--gpu {HELD.get(card, card)} --model random:{model} --context {tokens} {given}"
    return Case(f"{card}-{model}-{tokens}-{tag}", arguments, layers=layers, rehearse=card not in HELD)


def _whole() -> Iterator[Case]:
    """Layers as transformers runs them."""
    yield run("h200-8gib", "smollm2-135m", 512, 2, "-streamed -mixed_precision -nf4_weights", "float32")
    yield run("h200-8gib", "smollm2-135m", 2048, 64, KEEP, "keepall")
    yield run("h200-8gib", "smollm2-135m", 8192, 8, f"{SMALL} -nf4_weights".replace("+nf4_weights ", ""), "bf16")
    yield run("h200-12gib", "smollm2-135m", 32768, 16, SMALL, "small")
    yield run("h200-8gib", "qwen2.5-0.5b", 512, 4, KEEP, "keepall")
    yield run("h200-8gib", "qwen2.5-0.5b", 4096, 32, f"{SMALL} +adamw_8bit", "adamw8")
    yield run("h200-24gib", "qwen2.5-0.5b", 8192, 8, SMALL.replace("+chunked_loss", "-chunked_loss"), "stockloss")
    yield run("h200-12gib", "qwen2.5-0.5b", 32768, 16, f"{SMALL} +checkpoint_offload", "offload")
    yield run("h200-8gib", "gemma-3-1b", 1024, 64, SMALL, "small")
    yield run("h200-12gib", "gemma-3-1b", 4096, 8, f"{SMALL} exact_attention.kernel=efficient", "efficient")
    yield run("h200-24gib", "gemma-3-1b", 16384, 16, SMALL, "small")
    yield run("h200-8gib", "llama-3.2-1b", 512, 2, SMALL, "small")
    yield run("h200-12gib", "llama-3.2-1b", 2048, 32, KEEP, "keepall")
    yield run("h200-8gib", "llama-3.2-1b", 16384, 64, f"{SMALL} +checkpoint_offload", "offload")
    yield run("h200-24gib", "llama-3.2-1b", 65536, 8, SMALL, "small")
    yield run(
        "h200-8gib",
        "llama-3.2-1b",
        4096,
        16,
        f"{SMALL} +weight_averaging weight_averaging.kind=ema weight_averaging.place=gpu",
        "ema",
    )
    yield run("h200-8gib", "qwen3-1.7b", 2048, 4, SMALL.replace("+exact", "-exact"), "eager")
    yield run("h200-8gib", "qwen3-1.7b", 4096, 64, f"{SMALL} -fused_activation", "unfused")
    yield run("h200-12gib", "qwen3-1.7b", 16384, 16, SMALL, "small")
    yield run("h200-24gib", "qwen3-1.7b", 4096, 8, KEEP, "keepall")
    yield run("h200-8gib", "phi-2", 1024, 2, f"{SMALL} {HALF} exact_attention.kernel=efficient", "half")
    yield run("h200-12gib", "phi-2", 2048, 8, SMALL.replace("+nf4", "-nf4"), "bf16")
    yield run("h200-8gib", "phi-2", 8192, 64, f"{SMALL} -fused_activation", "unfused")
    yield run("h200-24gib", "phi-2", 16384, 32, SMALL.replace("+chunked_loss", "-chunked_loss"), "stockloss")
    yield run("h200-24gib", "phi-2", 32768, 16, SMALL, "small")
    yield run("h200-12gib", "mistral-7b-v0.3", 1024, 16, SMALL, "small")
    yield run("h200-12gib", "mistral-7b-v0.3", 8192, 8, f"{SMALL} +checkpoint_offload", "offload")
    yield run("h200-24gib", "mistral-7b-v0.3", 16384, 64, SMALL, "small")
    yield run("h200-24gib", "mistral-7b-v0.3", 2048, 4, SMALL.replace("+nf4", "-nf4"), "bf16")
    yield run("h200-8gib", "llama-3.1-8b", 1024, 2, SMALL, "small")
    yield run("h200-12gib", "llama-3.1-8b", 8192, 16, SMALL, "small")
    yield run(
        "h200-24gib",
        "llama-3.1-8b",
        16384,
        64,
        f"{SMALL} +weight_averaging weight_averaging.kind=swa weight_averaging.place=host",
        "swa",
    )
    yield run("h200-12gib", "llama-3.1-8b", 4096, 32, f"{SMALL} +adamw_8bit", "adamw8")
    # Models that no constant was fitted to.
    yield run("h200-8gib", "granite-3.1-2b", 512, 4, SMALL, "small")
    yield run("h200-8gib", "granite-3.1-2b", 4096, 16, SMALL.replace("+chunked_loss", "-chunked_loss"), "stockloss")
    yield run("h200-12gib", "granite-3.1-2b", 16384, 64, SMALL, "small")
    yield run("h200-24gib", "granite-3.1-2b", 2048, 8, KEEP, "keepall")
    yield run("h200-8gib", "starcoder2-3b", 2048, 2, SMALL, "small")
    yield run("h200-12gib", "starcoder2-3b", 8192, 32, f"{SMALL} {HALF} exact_attention.kernel=efficient", "half")
    yield run("h200-24gib", "starcoder2-3b", 32768, 8, SMALL, "small")
    yield run("h200-8gib", "phi-3.5-mini", 1024, 8, SMALL, "small")
    yield run("h200-8gib", "phi-3.5-mini", 4096, 64, f"{SMALL} +checkpoint_offload", "offload")
    yield run("h200-12gib", "phi-3.5-mini", 16384, 16, SMALL, "small")
    yield run("h200-24gib", "phi-3.5-mini", 4096, 4, SMALL.replace("+nf4", "-nf4"), "bf16")
    yield run("h200-8gib", "gemma-2-2b", 1024, 8, SMALL.replace("+exact", "-exact"), "eager")
    yield run("h200-12gib", "gemma-2-2b", 4096, 16, SMALL.replace("+exact", "+blockwise"), "blocks")
    yield run("h200-8gib", "qwen3-4b", 2048, 16, SMALL, "small")
    yield run("h200-12gib", "qwen3-4b", 8192, 2, f"{SMALL} +adamw_8bit", "adamw8")
    yield run("h200-24gib", "qwen3-4b", 32768, 32, f"{SMALL} +checkpoint_offload", "offload")
    yield run("h200-8gib", "llama-3.2-3b", 4096, 4, SMALL, "small")
    yield run("h200-12gib", "llama-3.2-3b", 16384, 64, SMALL, "small")
    yield run("h200-24gib", "llama-3.2-3b", 4096, 16, SMALL.replace("+nf4", "-nf4"), "bf16")
    yield run("h200-12gib", "mistral-7b-v0.1", 4096, 32, SMALL, "small")
    yield run("h200-24gib", "mistral-7b-v0.1", 16384, 8, f"{SMALL} -fused_activation", "unfused")
    yield run("h200-8gib", "gpt2", 512, 8, SMALL.replace("+nf4", "-nf4"), "bf16")
    yield run("h200-8gib", "pythia-1b", 2048, 16, SMALL, "small")
    yield run("h200-8gib", "falcon3-1b", 4096, 8, f"{SMALL} +sequence_packing sequence_packing.documents=4", "packed")


def _passes() -> Iterator[Case]:
    """Layers in passes over the sequence."""
    off = "-checkpoint_int8 -checkpoint_nf4 -checkpoint_spacing"
    yield run("h200-8gib", "smollm2-135m", 16384, 8, f"{PASSES} -nf4_weights {off}", "streamed")
    yield run("h200-8gib", "qwen2.5-0.5b", 32768, 16, f"{NF4} {off}", "streamed")
    yield run("h200-8gib", "qwen2.5-0.5b", 524288, 4, f"{NF4} +checkpoint_int8", "int8", layers=2)
    yield run("h200-8gib", "gemma-3-1b", 16384, 32, f"{NF4} +checkpoint_int8", "int8")
    yield run("h200-8gib", "gemma-3-1b", 262144, 8, NF4, "streamed", layers=7)  # the sixth is the first that sees all
    yield run("h200-8gib", "llama-3.2-1b", 16384, 2, f"{NF4} +checkpoint_nf4", "nf4checkpoints")
    yield run("h200-8gib", "llama-3.2-1b", 65536, 64, f"{NF4} {off}", "streamed")
    yield run("h200-8gib", "llama-3.2-1b", 524288, 16, f"{NF4} +checkpoint_spacing", "spacing", layers=2)
    yield run("h200-12gib", "llama-3.2-1b", 32768, 8, f"{NF4} +kept_attention", "kept")
    yield run("h200-8gib", "qwen3-1.7b", 16384, 16, f"{NF4} {off}", "streamed")
    yield run("h200-8gib", "qwen3-1.7b", 32768, 4, f"{PASSES} +streamed_weights", "weights")
    yield run("h200-12gib", "qwen3-1.7b", 131072, 32, f"{NF4} +checkpoint_int8", "int8", layers=2)
    yield run("h200-8gib", "phi-2", 8192, 4, f"{NF4} {HALF} streamed.kernel=efficient {off}", "half")
    yield run("h200-8gib", "phi-2", 16384, 64, f"{PASSES} +streamed_nf4_weights", "nf4weights")
    yield run("h200-8gib", "phi-2", 32768, 8, f"{NF4} +checkpoint_int8", "int8")
    yield run(
        "h200-12gib", "phi-2", 65536, 2, f"{NF4} +sequence_blocks sequence_blocks.tokens=16384", "blocks", layers=2
    )
    yield run("h200-8gib", "phi-2", 131072, 16, f"{NF4} --disk=40GiB +checkpoint_disk", "disk", layers=2)
    yield run("h200-8gib", "phi-2", 524288, 8, f"{NF4} --host-ram=64GiB", "streamed", layers=2)
    yield run("h200-8gib", "mistral-7b-v0.3", 16384, 8, f"{NF4} {off}", "streamed")
    yield run("h200-8gib", "mistral-7b-v0.3", 65536, 16, NF4, "streamed", layers=2)
    yield run("h200-8gib", "llama-3.1-8b", 8192, 32, f"{PASSES} +streamed_nf4_weights", "nf4weights")
    yield run("h200-8gib", "llama-3.1-8b", 16384, 4, f"{NF4} +checkpoint_int8", "int8")
    yield run("h200-12gib", "llama-3.1-8b", 262144, 16, NF4, "streamed", layers=2)
    # Models that no constant was fitted to.
    yield run("h200-8gib", "granite-3.1-2b", 16384, 8, f"{NF4} {off}", "streamed")
    yield run("h200-8gib", "granite-3.1-2b", 131072, 32, NF4, "streamed", layers=2)
    yield run("h200-8gib", "starcoder2-3b", 16384, 16, f"{NF4} +checkpoint_int8", "int8")
    yield run("h200-8gib", "starcoder2-3b", 65536, 4, f"{PASSES} +streamed_weights", "weights", layers=2)
    yield run("h200-8gib", "phi-3.5-mini", 16384, 2, f"{NF4} {off}", "streamed")
    yield run("h200-12gib", "phi-3.5-mini", 131072, 16, NF4, "streamed", layers=2)
    yield run("h200-8gib", "qwen3-4b", 32768, 64, f"{NF4} +checkpoint_int8", "int8")
    yield run("h200-8gib", "qwen3-4b", 262144, 8, f"{PASSES} +streamed_nf4_weights", "nf4weights", layers=2)
    yield run("h200-8gib", "llama-3.2-3b", 32768, 32, f"{NF4} {off}", "streamed")
    yield run("h200-8gib", "llama-3.2-3b", 524288, 16, f"{NF4} --host-ram=64GiB", "streamed", layers=2)
    yield run("h200-8gib", "mistral-7b-v0.1", 32768, 16, f"{NF4} +kept_attention", "kept")


def _stood_in_for() -> Iterator[Case]:
    """As each card would be planned, with little said: the test machine stands in for it."""
    for card, rank in (("rtx2060s", 8), ("rtx3060-12gb", 16), ("rtx4090", 32)):
        for model, tokens in (
            ("llama-3.2-1b", 8192),
            ("phi-2", 4096),
            ("phi-3.5-mini", 2048),
            ("granite-3.1-2b", 8192),
        ):
            yield run(card, model, tokens, rank, "-streamed", "whole")
        for model, tokens in (("qwen3-1.7b", 65536), ("llama-3.1-8b", 32768), ("starcoder2-3b", 131072)):
            yield run(card, model, tokens, rank, "+streamed", "streamed", layers=2)
    yield run("rtx4090", "phi-2", 524288, 16, "+streamed", "streamed", layers=2)
    yield run("rtx4090", "mistral-7b-v0.1", 8192, 64, "-streamed", "whole")


def _new() -> Iterator[Case]:
    """Models that no run had been made of when these were planned: neither constants nor formulas know of them."""
    yield run("h200-8gib", "smollm2-360m", 4096, 8, SMALL, "small")
    yield run("h200-8gib", "tinyllama-1.1b", 2048, 4, KEEP, "keepall")
    yield run("h200-8gib", "deepseek-coder-1.3b", 8192, 8, SMALL, "small")
    yield run("h200-8gib", "qwen2.5-1.5b", 2048, 16, SMALL, "small")
    yield run("h200-12gib", "smollm2-1.7b", 8192, 32, SMALL, "small")
    yield run("h200-24gib", "smollm3-3b", 16384, 16, SMALL, "small")
    yield run("h200-8gib", "phi-4-mini", 2048, 8, SMALL, "small")
    yield run("h200-12gib", "gemma-3-4b-text", 4096, 16, SMALL, "small")
    yield run("h200-12gib", "llama-2-7b", 1024, 64, f"{WHOLE} +nf4_weights -gradient_checkpointing", "keepall")
    yield run("h200-12gib", "qwen2.5-7b", 4096, 16, f"{SMALL} +adamw_8bit", "adamw8")
    yield run("h200-12gib", "qwen3-8b", 8192, 16, f"{SMALL} +checkpoint_offload", "offload")
    yield run("h200-8gib", "qwen2.5-1.5b", 32768, 8, NF4, "streamed")
    yield run("h200-8gib", "smollm3-3b", 16384, 16, f"{NF4} +checkpoint_int8", "int8")
    yield run("h200-8gib", "phi-4-mini", 16384, 8, NF4, "streamed")
    yield run("h200-8gib", "llama-2-7b", 16384, 16, f"{PASSES} +streamed_nf4_weights", "nf4weights")
    yield run("h200-8gib", "gemma-3-4b-text", 32768, 8, NF4, "streamed")
    yield run("h200-8gib", "qwen3-8b", 65536, 16, NF4, "streamed", layers=2)
    yield run("rtx2060s", "qwen2.5-1.5b", 8192, 8, "-streamed", "whole")
    yield run("rtx3060-12gb", "smollm3-3b", 8192, 16, "-streamed", "whole")
    yield run("rtx4090", "qwen3-8b", 8192, 32, "-streamed", "whole")


NEW: frozenset[str] = frozenset(case.name for case in _new())


def _fresh() -> Iterator[Case]:
    """Long sequences of models with several query heads a key head, planned when formulas of those had changed."""
    given = f"{NF4} --host-ram=96GiB"
    yield run("h200-8gib", "smollm2-135m", 262144, 8, f"{PASSES} -nf4_weights --host-ram=96GiB", "fresh", layers=2)
    yield run("h200-8gib", "smollm2-360m", 131072, 16, f"{given} streamed.heads=5", "fresh", layers=2)
    yield run("h200-8gib", "qwen2.5-1.5b", 524288, 8, f"{given} +checkpoint_int8", "fresh", layers=2)
    yield run("h200-8gib", "falcon3-1b", 131072, 4, f"{given} streamed.heads=4", "fresh", layers=2)
    yield run("h200-8gib", "llama-3.2-3b", 262144, 8, f"{given} streamed.heads=3", "fresh", layers=2)
    yield run("h200-8gib", "phi-4-mini", 262144, 16, f"{given} streamed.heads=3", "fresh", layers=2)
    yield run("h200-8gib", "gemma-3-4b-text", 131072, 8, given, "fresh", layers=7)
    yield run("h200-12gib", "starcoder2-3b", 262144, 8, given, "fresh", layers=2)
    yield run("h200-12gib", "qwen2.5-7b", 262144, 16, f"{given} +checkpoint_int8 streamed.heads=7", "fresh", layers=2)
    yield run("h200-24gib", "qwen3-4b", 262144, 8, f"{given} +kept_attention streamed.heads=4", "fresh", layers=2)


FRESH: frozenset[str] = frozenset(case.name for case in _fresh())


LONGEST: Mapping[tuple[str, str], int] = {
    ("h200-8gib", "phi-2"): 56_768,
    ("h200-8gib", "llama-3.2-1b"): 47_296,
    ("h200-8gib", "qwen3-1.7b"): 47_936,
    ("h200-8gib", "granite-3.1-2b"): 43_328,
    ("h200-8gib", "starcoder2-3b"): 46_912,
    ("h200-12gib", "phi-2"): 95_808,
    ("h200-12gib", "llama-3.1-8b"): 22_976,
    ("h200-12gib", "phi-3.5-mini"): 50_368,
    ("h200-12gib", "qwen3-4b"): 45_120,
    ("h200-24gib", "mistral-7b-v0.1"): 74_624,
    ("rtx2060s", "phi-2"): 49_280,
    ("rtx3060-12gb", "qwen3-4b"): 42_368,
}
"""By card and model, the longest sequence that was planned with whole layers, rank 16 and all tokens trained."""
BY_HOST: Mapping[tuple[str, str, int], int] = {
    ("h200-8gib", "llama-3.2-1b", 8): 105_792,
    ("h200-8gib", "phi-2", 12): 68_224,
    ("h200-8gib", "qwen3-4b", 16): 83_712,
}
"""The same with layers in passes and 16-bit checkpoints, by GiB of host memory besides, which is what is too little."""
BEYOND = 1.05  # times the longest: what is shown not to fit


def _longest() -> Iterator[Case]:
    """The longest that is planned, and the same settings for a longer one in no more memory."""
    given = "--set lora.rank=16 --set train.steps=1 --set train.validation=0"
    for (card, model), tokens in LONGEST.items():
        name, where, rehearse = f"{card}-{model}-longest", HELD.get(card, card), card not in HELD
        asked = f"--gpu {where} --model random:{model} --context {tokens} --without streamed {given}"
        yield Case(name, asked, rehearse=rehearse)
        yield Case(f"{card}-{model}-beyond", "", rehearse=rehearse, beyond=name)
    exact = "--without checkpoint_int8 --without checkpoint_nf4 --without checkpoint_spacing --without checkpoint_disk"
    for (card, model, host), tokens in BY_HOST.items():  # two layers: host memory holds the inputs of all in any case
        name = f"{card}-{model}-{host}gib-longest"
        asked = f"--gpu {HELD[card]} --model random:{model} --context {tokens} --with streamed {exact} {given}"
        yield Case(name, f"{asked} --host-ram {host}GiB", layers=2)
        yield Case(name.replace("longest", "beyond"), "", layers=2, beyond=name)


GRID: tuple[Case, ...] = (*_whole(), *_passes(), *_stood_in_for(), *_new(), *_fresh(), *_longest())

LATER: frozenset[str] = frozenset(
    {
        "adaptive_clipping",
        "gradient_centralization",
        "gradient_noise",
        "batch_rate",
        "cache_release",
        "compiled_layers",
        "context_stages",
        "early_stopping",
        "fused_norm",
        "kept_checkpoints",
        "label_smoothing",
        "lookahead",
        "lora_plus",
        "mapped_tokens",
        "one_cycle",
        "polynomial_decay",
        "rate_range_test",
        "rslora",
        "spike_rewind",
        "warmup_stable_decay",
    }
)
"""Optimisations that came after these plans were frozen: no run has any of them."""

EXCLUDED: Mapping[str, str] = {}
"""Runs that have a record and no part in what is said of errors, with the reason."""

FAILED: Mapping[str, str] = {}
"""What is known of runs that were to end and did not."""
