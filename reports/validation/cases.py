"""The runs that are measured, as command lines of `plan`. Adding a case adds one line."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

# Everything that a small card needs; what each case changes follows it.
SMALL = (
    "--with nf4_weights --with mixed_precision --with exact_attention --with gradient_checkpointing --with chunked_loss"
)
TURING = f"{SMALL} --set mixed_precision.dtype=float16 --set exact_attention.kernel=efficient"
# The records were made before the fused activation existed.
UNFUSED = "--without fused_activation"
STEPS = "--set train.steps=4 --set train.evaluation_rows=1 --set train.validation=0.5"


@dataclass(frozen=True)
class Case:
    """One run: its name, and the arguments of `plan`.

    ``layers``: of a streamed model only so many are run, at full length and with full buffers; None runs all.
    ``pending``: planned, and not run so far on any card; docs/validation.md says so.
    ``rehearse``: the card at hand stands in for the one that is planned for.
    ``beyond``: the name of a case; this one is of the same settings for a longer sequence, held to the same budget.
    """

    name: str
    arguments: str
    layers: int | None = None
    pending: bool = False
    rehearse: bool = False
    beyond: str | None = None

    @property
    def run(self) -> str:
        """What cases that stand in for each other share: the name without the chip it runs on."""
        return run_of(self.name)


def argument(word: str) -> str:
    """``+name`` and ``-name`` as `--with` and `--without`, ``knob=value`` as `--set`; an option as it is."""
    if word.startswith("--"):
        return word
    verb = {"+": "--with ", "-": "--without "}.get(word[0])
    return f"{verb}{word[1:]}" if verb else f"--set {word}"


def run_of(name: str) -> str:
    """Of the name of a case or a record: which run it is, on whichever chip."""
    return name.partition("-")[2]


def _h200(name: str, model: str, arguments: str) -> Case:
    return Case(f"h200-{model}-{name}", f"--gpu h200-sxm --model random:{model} {arguments} {UNFUSED} {STEPS}")


# Planned and not run yet; a run is taken out of here when its record comes in.
PENDING: frozenset[str] = frozenset()
# Layers in passes over the sequence, held to the memory of a small card (reports/validation/cards).
EXACT = "--without checkpoint_int8 --without checkpoint_nf4 --without checkpoint_spacing --without kept_attention"
HOST = "--host-ram 122GiB"
STREAMED = f"--with streamed --with nf4_weights --without streamed_nf4_weights --set lora.rank=16 {EXACT} {HOST}"
# The same with the weights in host memory as well.
PLACED = f"--with streamed --with streamed_nf4_weights {EXACT} {HOST}"


def _streamed(chip: str) -> Iterator[Case]:
    """The runs of layers in passes, on a card of one kind; whichever there is, one of the two will do."""

    def case(
        name: str,
        model: str,
        arguments: str,
        held: str = "8gib",
        steps: int = 1,
        layers: int | None = None,
    ) -> Case:
        where = f"--gpu reports/validation/cards/{chip}-{held}.yaml --model random:{model}"
        length = f"--set train.steps={steps} --set train.validation=0"
        run = f"{held}-{model}-{name}"
        return Case(f"{chip}-{run}", f"{where} {arguments} {length}", layers=layers, pending=run in PENDING)

    yield case("65536-streamed", "gemma-3-1b", f"--context 65536 {STREAMED}", steps=3)  # windows of 512 tokens
    turing = "--set streamed.kernel=efficient --set mixed_precision.dtype=float16"
    yield case("16384-streamed", "phi-2", f"--context 16384 {STREAMED} --set streamed.staging=card", steps=4)
    kept = STREAMED.replace("--without kept_attention", "--with kept_attention")
    yield case("16384-kept", "phi-2", f"--context 16384 {kept} --set streamed.staging=card", steps=4)
    yield case("32768-card", "phi-2", f"--context 32768 {STREAMED} --set streamed.staging=card", steps=3)
    yield case("16384-resident", "phi-2", f"--context 16384 --set lora.rank=16 {SMALL}", steps=4)
    blocks = "--with sequence_blocks --set sequence_blocks.tokens=8192"
    yield case("32768-blocks", "phi-2", f"--context 32768 {STREAMED} {blocks}", steps=3)
    for tokens in (32768, 131072, 262144, 524288):
        # The first step meets every kernel for the first time, which a short one shows.
        yield case(f"{tokens}-streamed", "phi-2", f"--context {tokens} {STREAMED}", steps=3 if tokens < 2**16 else 1)
    disk = "--disk 64GiB --with checkpoint_disk"  # all but two layer inputs on it
    yield case("131072-disk", "phi-2", f"--context 131072 {STREAMED} {disk}")
    yield case("131072-streamed", "llama-3.1-8b", f"--context 131072 {STREAMED}")
    yield case("524288-streamed", "llama-3.2-1b", f"--context 524288 {STREAMED}")
    yield case("1048576-streamed", "qwen2.5-0.5b", f"--context 1048576 {STREAMED}", layers=3)
    yield case("16384-streamed", "llama-3.1-70b", f"--context 16384 {PLACED} --set lora.rank=16", layers=3, steps=3)
    # Models and lengths that no constant of time was fitted to.
    for model, tokens in (("qwen3-1.7b", 32768), ("llama-3.2-3b", 49152), ("mistral-7b-v0.1", 32768)):
        yield case(f"{tokens}-streamed", model, f"--context {tokens} {STREAMED}", steps=3)
    yield case("tier8-turing", "phi-2", f"--tier 8 {PLACED} {turing}", held="2060s", layers=2)


CASES: tuple[Case, ...] = (
    _h200("4096-small", "phi-2", f"--context 4096 --set lora.rank=16 {SMALL} --without checkpoint_offload"),
    _h200("8192-small", "phi-2", f"--context 8192 --set lora.rank=16 {SMALL} --without checkpoint_offload"),
    _h200("4096-turing", "phi-2", f"--context 4096 --set lora.rank=16 {TURING} --without checkpoint_offload"),
    _h200("8192-turing", "phi-2", f"--context 8192 --set lora.rank=16 {TURING} --without checkpoint_offload"),
    _h200("8192-flash", "phi-2", f"--context 8192 --set lora.rank=16 {SMALL} --set exact_attention.kernel=flash"),
    _h200("tier3-turing", "phi-2", f"--tier 3 {TURING} --with checkpoint_offload"),
    _h200("8192-offload", "phi-2", f"--context 8192 --set lora.rank=16 {SMALL} --with checkpoint_offload"),
    _h200("8192-adamw8bit", "phi-2", f"--context 8192 --set lora.rank=16 {SMALL} --with adamw_8bit"),
    _h200("4096-bf16", "phi-2", "--context 4096 --without nf4_weights --with gradient_checkpointing"),
    _h200("4096-keepall", "phi-2", "--context 4096 --without nf4_weights --without gradient_checkpointing"),
    _h200("4096-keepall-nf4", "phi-2", "--context 4096 --with nf4_weights --without gradient_checkpointing"),
    _h200(
        "4096-stockloss",
        "phi-2",
        f"--context 4096 {SMALL.replace('--with chunked_loss', '--without chunked_loss')}",
    ),
    _h200(
        "2048-eager",
        "phi-2",
        f"--context 2048 {SMALL.replace('--with exact_attention', '--without exact_attention')}",
    ),
    _h200("8192-small", "llama-3.2-1b", f"--context 8192 --set lora.rank=16 {SMALL}"),
    _h200("32768-small", "llama-3.2-1b", f"--context 32768 --set lora.rank=16 {SMALL}"),
    _h200("8192-turing", "llama-3.2-1b", f"--context 8192 --set lora.rank=16 {TURING} --with checkpoint_offload"),
    _h200("4096-small", "llama-3.1-8b", f"--context 4096 {SMALL}"),
    _h200("8192-small", "qwen3-1.7b", f"--context 8192 {SMALL}"),
    _h200("8192-small", "qwen2.5-0.5b", f"--context 8192 {SMALL}"),
    _h200("8192-small", "mistral-7b-v0.3", f"--context 8192 {SMALL}"),
    _h200("4096-float32", "smollm2-135m", "--context 4096 --without mixed_precision"),
    *_streamed("h100"),
    *_streamed("h200"),
)
