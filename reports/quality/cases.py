"""The trainings that are compared: one of each optimisation that may change what is learnt, beside one without.

All train adapters of the same rank in the same SmolLM2-135M-Instruct on as many rows of the same text, and are judged
by the same held-out files. Each is made once by seed, which says which files are held out, in which order the rest
comes, and where adapters begin.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

SEEDS = (0, 1, 2)
TOKENS, ROWS, STEPS, RATE = 1024, 4, 120, 2e-3
BASE, AGAIN = "base", "base-again"
"""The training without anything, and the same once more: what differs between them is chance."""
KERNEL = "flash"
"""Of attention, on a card: which is the fastest there is measured anew by each process, and they share one."""
SETTINGS = f"lora.rank=16 train.batch={ROWS} train.steps={STEPS} train.warmup=0.05 train.evaluation_rows=64"
ALL_ROWS = "train.evaluation_rows=100000"
"""Judge by all that is held out: where documents share rows, some of the rows are other ones."""
WORDS = (
    "+mixed_precision -streamed +exact_attention +chunked_loss -gradient_checkpointing -nf4_weights -adamw_8bit "
    "-checkpoint_int8 -checkpoint_nf4 -fused_norm"
)
"""Of every training unless it switches one itself. Norms are written out in all, as in those measured first."""


@dataclass(frozen=True)
class Training:
    """One way to train.

    Attributes:
        words: what differs from the base: ``+name`` and ``-name`` to switch, ``knob=value`` to set.
        optimization: the one that is compared; empty where none is, and settings alone differ.
        beside: the training without it.
    """

    name: str
    words: str = ""
    optimization: str = ""
    beside: str = BASE

    def arguments(self, seed: int, kernel: str | None = KERNEL) -> list[str]:
        """Of `plan`, after the card, the model and the data; ``kernel``: of attention, None to leave it open."""
        own = self.words.split()
        switched = {word[1:] for word in own if word[0] in "+-"}
        given = [word for word in WORDS.split() if word[1:] not in switched]
        named = {word.partition("=")[0] for word in own if "=" in word}
        settings = [word for word in (*SETTINGS.split(), f"train.lr={RATE}") if word.partition("=")[0] not in named]
        arguments = ["--context", str(TOKENS)]
        executor = "streamed" if "+streamed" in own else "exact_attention"
        pinned = [f"{executor}.kernel={kernel}"] if kernel and f"{executor}.kernel" not in named else []
        for word in [*given, *own, *settings, *pinned, f"train.seed={seed}"]:
            verb = {"+": "--with", "-": "--without"}.get(word[0])
            arguments += [verb, word[1:]] if verb else ["--set", word]
        return arguments


def _of(name: str, words: str = "") -> Training:
    return Training(name, f"+{name} {words}", name)


def _trainings() -> Iterator[Training]:
    yield Training(BASE)
    yield Training(AGAIN)
    for rate in (2e-4, 5e-4, 1e-3, 4e-3, 8e-3):
        yield Training(f"rate-{rate:.0e}", f"train.lr={rate}")
    yield Training("linear", "train.schedule=linear")
    yield Training("constant", "train.schedule=constant")
    for name in (
        "rslora",
        "lora_plus",
        "batch_rate",
        "one_cycle",
        "polynomial_decay",
        "warmup_stable_decay",
        "lookahead",
        "gradient_centralization",
        "label_smoothing",
        "adaptive_clipping",
        "spike_rewind",
        "context_stages",
        "adamw_8bit",
        "nf4_weights",
    ):
        yield _of(name)
    for rate in (2e-4, 5e-4):
        yield Training(f"lora_plus-{rate:.0e}", f"+lora_plus train.lr={rate}", "lora_plus")
    yield _of("rate_range_test")
    yield Training("steepest", "+rate_range_test rate_range_test.rule=steepest", "rate_range_test")
    yield _of("gradient_noise")
    yield Training("noise-absolute", "+gradient_noise gradient_noise.kind=absolute", "gradient_noise")
    yield _of("early_stopping", "train.evaluate_every=20")
    yield Training("all-rows", ALL_ROWS)
    yield Training("sequence_packing", f"+sequence_packing {ALL_ROWS}", "sequence_packing", "all-rows")
    for kind in ("ema", "swa"):
        words = f"+weight_averaging weight_averaging.kind={kind}"
        yield Training(kind, words, "weight_averaging")
        yield Training(f"{kind}-constant", f"{words} train.schedule=constant", "weight_averaging", "constant")
    yield Training("float32", "-mixed_precision exact_attention.kernel=efficient")  # the other takes 16 bits alone
    yield Training("float16", "mixed_precision.dtype=float16")
    passes = "+streamed -exact_attention -kept_attention"
    yield Training("streamed", passes, "streamed")
    for name in ("checkpoint_int8", "checkpoint_nf4"):
        yield Training(name, f"{passes} +{name}", name, "streamed")


TRAININGS: tuple[Training, ...] = tuple(_trainings())
