"""The ledger against counted bytes: the real trainer step on the CPU, every tensor counted, phase by phase."""

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from planner.planning import Request, make_plan
from trainer.measure import Recorder
from trainer.probing import probe
from trainer.session import build

SIZES = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 8, "vocab_size": 96}
FAMILIES = {
    "phi": {"intermediate_size": 512, "hidden_act": "gelu_new", "partial_rotary_factor": 0.5},
    "llama": {"intermediate_size": 512, "num_key_value_heads": 2, "head_dim": 16},
    "qwen2": {"intermediate_size": 688, "num_key_value_heads": 2},
    "qwen3": {"intermediate_size": 384, "num_key_value_heads": 4, "head_dim": 16},
    "mistral": {"intermediate_size": 448, "num_key_value_heads": 2, "sliding_window": None},
}
CLASSES = {"phi": "Phi", "llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "mistral": "Mistral"}
SWITCHED = ("gradient_checkpointing", "fused_activation")


def write_config(family: str, folder: Path) -> Path:
    """A config of realistic proportions, small enough for a CPU."""
    config = AutoConfig.for_model(family, **SIZES, **FAMILIES[family])
    config.architectures = [f"{CLASSES[family]}ForCausalLM"]
    config.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("on", [(), ("gradient_checkpointing",)], ids=["every-layer-saved", "checkpointed"])
@pytest.mark.parametrize(("tokens", "target", "batch"), [(384, 384, 1), (256, 64, 2)])
def test_every_phase(tmp_path: Path, family: str, on: tuple[str, ...], tokens: int, target: int, batch: int) -> None:
    plan = make_plan(
        Request(
            gpu="cpu",
            model=f"random:{write_config(family, tmp_path)}",
            total_tokens=tokens,
            target=target,
            required=("lora", "chunked_loss", "exact_attention", *on),
            excluded=tuple(name for name in SWITCHED if name not in on),
            knobs={"lora": {"rank": 4}, "chunked_loss": {"rows": 32}},
            train={"batch": batch},
        )
    )
    with Recorder(torch.device("cpu")) as recorder:
        built = build(plan)
        probe(plan, built, recorder)
    predicted = {phase: sum(terms.values()) for phase, terms in plan.memory.gpu.phases.items()}
    measured = {phase: sizes["allocated_bytes"] for phase, sizes in recorder.phases.items() if sizes}
    assert {"forward", "loss", "backward", "optimizer", "evaluate", "evaluate_loss"} <= measured.keys()
    peak = plan.memory.gpu.peak_bytes
    assert recorder.peak("allocated_bytes") == pytest.approx(peak.expected, rel=0.01)
    assert recorder.peak("allocated_bytes") <= peak.high
    for phase in ("forward", "loss", "backward", "optimizer"):
        assert predicted[phase] == pytest.approx(measured[phase], rel=0.02), phase
    for phase in ("evaluate", "evaluate_loss"):  # a bound: what stands highest there, not all at one moment
        assert measured[phase] <= 1.01 * predicted[phase], phase
