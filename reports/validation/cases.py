"""The runs that are measured, as command lines of `plan`. Adding a case adds one line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

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
    """One run: its name, the arguments of `plan`, and whether constants may be fitted to its record."""

    name: str
    arguments: str
    set: Literal["calibration", "holdout"] = "calibration"


def _h200(name: str, model: str, arguments: str) -> Case:
    return Case(f"h200-{model}-{name}", f"--gpu h200-sxm --model random:{model} {arguments} {UNFUSED} {STEPS}")


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
)
