"""Run each layer in passes over the sequence, so that memory of the card does not grow with it.

Before and after attention a layer is computed by chunks of tokens, attention by groups of heads over the whole
sequence. Layer inputs, query, key, value, attended values and gradients lie in pinned host memory, and copies run
beside the computation. The result is exact. It costs host memory, one more forward pass as every checkpointing does,
and the projections before attention once more. For short sequences what lies between the passes can stay on the card.
"""

from __future__ import annotations

from planner import launches
from planner import streamed_memory as memory
from planner import streamed_windows as windows
from planner import streamed_work as work
from planner import streamed_workspace as workspace
from planner.baseline import per_layer_names
from planner.baseline_formulas import bits_of_activation, float32, one_byte
from planner.baseline_work import attention_backward_flops, attention_forward_flops
from planner.ledger import AFTER_LOAD, PASSES, Device, Formula, Ledger, Phase, Resource, Term, Work, held
from planner.optimizations.attention.exact_attention import EAGER, kernels
from planner.optimizations.base import Evidence, Knob, Knobs, Needs, OnCard, Optimization, Scalar, Situation
from planner.optimizations.item import Claimed
from planner.session import Session
from planner.symbols import Letters, Number

CHUNKS = (8192, 4096, 2048, 1024)
MOST_HEADS = (8, 4, 2, 1)
LIVE = frozenset({Phase.BACKWARD})
CHUNKS_PASS = frozenset({Phase.FORWARD, Phase.BACKWARD, Phase.EVALUATE})
SOURCE = "trainer/streamed/layer.py"


def nothing(x: Letters) -> Number:
    """No element."""
    return 0


class _CanBeCut:
    """Needs a model whose attention is one that stock kernels compute."""

    text = "a model whose attention has neither sinks nor soft-capped scores"

    def reasons(self, situation: Situation) -> tuple[str, ...]:
        """Names what the kernels do not know."""
        model = situation.model
        found = []
        if model.attention_sinks:
            found.append(f"attention of {model.id} has sinks, which no exact kernel computes")
        if model.attention_softcap is not None:
            found.append(f"attention of {model.id} caps its scores, which no exact kernel computes")
        if not kernels(situation):
            found.append(f"no exact kernel runs on {situation.gpu.name}")
        return tuple(found)


def heads_at_once(situation: Situation) -> tuple[Scalar, ...]:
    """Numbers of query heads that groups of one size are made of, all of those that read a key head or a part of them.

    Groups of different sizes would hold memory for the larger, and take the time of the smaller.
    """
    heads, key_heads = situation.model.heads, situation.model.kv_heads
    readers = heads // key_heads
    even = {size for size in range(1, readers + 1) if readers % size == 0}
    even |= {readers * whole for whole in range(1, key_heads + 1) if key_heads % whole == 0}
    return tuple(dict.fromkeys(max(size for size in even if size <= most) for most in MOST_HEADS))


def _kernels(situation: Situation) -> tuple[Scalar, ...]:
    return kernels(situation)


_PASSING: tuple[tuple[str, Formula, Formula, frozenset[Phase], str], ...] = (
    ("buffers/input", memory.input_loaded, one_byte, LIVE, "a chunk's layer input, and the next one's"),
    (
        "buffers/loaded",
        memory.chunk_loaded,
        one_byte,
        LIVE,
        "a chunk's attended values and gradient, and the next one's",
    ),
    ("buffers/leaving", memory.chunk_leaving, one_byte, LIVE, "the last chunk's gradients on their way to the host"),
    (
        "attention/group",
        memory.group_forward,
        one_byte,
        frozenset({Phase.ATTENTION}),
        "a group of heads over the whole sequence, the next one's inputs and the last one's outputs",
    ),
    (
        "attention/group_backward",
        memory.group_backward,
        one_byte,
        frozenset({Phase.ATTENTION_BACKWARD}),
        "the same with gradients",
    ),
    (
        "attention/window",
        windows.window_forward,
        one_byte,
        frozenset({Phase.ATTENTION}),
        "copies of a stretch where keys are a window's",
    ),
    (
        "attention/window_backward",
        windows.window_backward,
        one_byte,
        frozenset({Phase.ATTENTION_BACKWARD}),
        "the same with gradients",
    ),
    (
        "attention/shared",
        memory.shared_key_heads,
        one_byte,
        frozenset({Phase.ATTENTION_BACKWARD}),
        "gradients of a key head that several groups share",
    ),
    (
        "loss/loaded",
        memory.loss_loaded,
        bits_of_activation,
        frozenset({Phase.LOSS, Phase.EVALUATE_LOSS}),
        "last hidden states of a chunk, and of the next one",
    ),
    (
        "loss/leaving",
        memory.loss_leaving,
        bits_of_activation,
        frozenset({Phase.LOSS}),
        "their gradient, and the last chunk's on its way to the host",
    ),
)


_WORKSPACES: dict[str, Formula] = {
    "cudnn": workspace.cudnn_workspace,
    "flash": workspace.flash_workspace,
    "efficient": workspace.efficient_workspace,
    "cpu": workspace.flash_workspace,  # explained on every machine
}
_STAGED = "query, key, value, attended values, gradients between the passes"
_SCORES = "log-sum-exp of the scores"
_BETWEEN_PASSES: tuple[tuple[str, Formula, Formula, Device, str], ...] = (
    ("buffers/staging", memory.staging_in_host, bits_of_activation, Device.PINNED, _STAGED),
    ("buffers/staging_on_card", memory.staging_on_card, bits_of_activation, Device.GPU, _STAGED),
    ("buffers/log_sum_exp", memory.log_sum_exp_in_host, float32, Device.PINNED, _SCORES),
    ("buffers/log_sum_exp_on_card", memory.log_sum_exp_on_card, float32, Device.GPU, _SCORES),
)


FORWARD, ATTENTION = Phase.FORWARD, Phase.ATTENTION
BACKWARD, ATTENTION_BACKWARD = Phase.BACKWARD, Phase.ATTENTION_BACKWARD
LINEAR, MEMORY, OF_KERNEL = Resource.LINEAR, Resource.MEMORY, Resource.ATTENTION
EXPOSED, LAUNCH = Resource.EXPOSED, Resource.LAUNCH
_BEFORE, _AFTER = "linears before attention", "linears after attention"
_TRAFFIC = "norms, activations, sums"
_WAITED = "what nothing hides of a pass's first and last piece"
_WORK: tuple[Work, ...] = (
    Work("linear/project", work.between, LINEAR, FORWARD, _BEFORE, "project"),
    Work("linear/forward", work.finish_flops, LINEAR, FORWARD, _AFTER),
    Work("linear/again", work.project_flops_again, LINEAR, BACKWARD, f"{_BEFORE} again", "again"),
    Work("linear/backward", work.finish_flops_back, LINEAR, BACKWARD, f"{_AFTER} again, and their gradients"),
    Work(
        "linear/project_back", work.project_flops_back, LINEAR, BACKWARD, f"{_BEFORE}, and their gradients", "project"
    ),
    Work("elementwise/project", work.project_bytes, MEMORY, FORWARD, f"{_TRAFFIC} before attention", "project"),
    Work("elementwise/forward", work.finish_bytes, MEMORY, FORWARD, f"{_TRAFFIC} after attention"),
    Work(
        "elementwise/again", work.project_bytes_again, MEMORY, BACKWARD, f"{_TRAFFIC} before attention again", "again"
    ),
    Work("elementwise/backward", work.finish_bytes_back, MEMORY, BACKWARD, f"{_TRAFFIC} after attention, both ways"),
    Work("elementwise/project_back", work.project_bytes_back, MEMORY, BACKWARD, f"{_TRAFFIC} before it", "project"),
    Work("attention/forward", attention_forward_flops, OF_KERNEL, ATTENTION, "attention"),
    Work("attention/again", work.attention_again_flops, OF_KERNEL, ATTENTION_BACKWARD, "attention again", "again"),
    Work("attention/backward", attention_backward_flops, OF_KERNEL, ATTENTION_BACKWARD, "gradient of attention"),
    Work("heads/copied", work.heads_bytes, MEMORY, ATTENTION, "copies beside the kernel"),
    Work("heads_again/copied", work.heads_bytes_again, MEMORY, ATTENTION_BACKWARD, "copies beside the kernel", "again"),
    Work("heads_back/copied", work.heads_bytes_back, MEMORY, ATTENTION_BACKWARD, "copies beside the kernel"),
    Work("chunks/exposed", work.chunks_exposed, EXPOSED, FORWARD, _WAITED),
    Work("heads/exposed", work.heads_exposed, EXPOSED, ATTENTION, _WAITED),
    Work("chunks_back/exposed", work.chunks_back_exposed, EXPOSED, BACKWARD, _WAITED),
    Work("heads_back/exposed", work.heads_back_exposed, EXPOSED, ATTENTION_BACKWARD, _WAITED),
    Work("launches/forward", launches.chunks_forward, LAUNCH, FORWARD, "kernels of all chunks"),
    Work("launches/heads", launches.heads_forward, LAUNCH, ATTENTION, "kernels of all groups"),
    Work("launches/loss", launches.loss_by_slices, LAUNCH, Phase.LOSS, "kernels of the loss, slice by slice"),
    Work("launches/backward", launches.chunks_backward, LAUNCH, BACKWARD, "kernels of all chunks"),
    Work("launches/heads_back", launches.heads_backward, LAUNCH, ATTENTION_BACKWARD, "kernels of all groups"),
)
_LINK: tuple[tuple[str, Phase, str, Formula, Formula], ...] = (
    ("project", FORWARD, "project", work.project_in, work.project_out),
    ("finish", FORWARD, "", work.finish_in, work.finish_out),
    ("heads", ATTENTION, "", work.heads_in, work.heads_out),
    ("again", BACKWARD, "again", work.again_in, work.again_out),
    ("finish_back", BACKWARD, "", work.finish_back_in, work.finish_back_out),
    ("project_back", BACKWARD, "project", work.project_back_in, work.project_back_out),
    ("heads_again", ATTENTION_BACKWARD, "again", work.heads_again_in, work.heads_again_out),
    ("heads_back", ATTENTION_BACKWARD, "", work.heads_back_in, work.heads_back_out),
)
CHANGED = frozenset(
    {
        *("linear/forward", "linear/backward", "elementwise/forward", "elementwise/backward"),
        *("launches/forward", "launches/loss", "launches/backward"),
    }
)
"""Work that there is without it too, in other amounts; of attention, in another phase."""


class Streamed(Optimization):
    """Layers in passes over the sequence: memory of the card flat in its length."""

    id = "streamed"
    title = "layers in passes over the sequence, the rest in host memory"
    claimed = (
        Claimed(
            42,
            "memory that does not grow, and context without an end",
            "does not hold",
            "Blockwise over host memory: on RTX 2060 SUPER every token takes 3 kB of the card and 68 kB of host "
            "RAM, and 481,280 tokens are the end.",
        ),
    )
    claims = frozenset(
        {
            "letter A",
            "letter p",
            "letter S_c",
            "letter H_g",
            "letter j_h",
            "letter l_r",
            "letter e",
            "setting attention",
        }
        | {"setting executor", "activations/checkpoints.device"}
        | {f"{name}.{what}" for name in per_layer_names() for what in ("count", "phases")}
        | {f"{name}.count" for name in EAGER}
        | {
            "activations/outputs.count",
            "activations/rotary.count",
            "activations/rotary.phases",
            "activations/tokens.count",
            "activations/tokens.phases",
            "runtime/workspace.count",
        }
        | {f"activations/{name}.count" for name in ("forward", "backward", "evaluation")}
        | {"activations/evaluation.bits"}
        | {"loss/hidden.count", "loss/norm.count", "loss/normed.count", "loss/normed_evaluation.count"}
        | {"loss/gradient.count"}
        | {"attention/forward.phase", "attention/backward.phase"}
        | {f"{name}.amount" for name in CHANGED}
    )
    makes = frozenset({name for name, *_ in (*_PASSING, *_BETWEEN_PASSES)}) | {
        "activations/rotary_on_card",
        "attention/workspace",
        "activations/checkpoints",
        "activations/inner",
    }
    adds = frozenset(each.name for each in _WORK) - {*CHANGED, "attention/forward", "attention/backward"} | {
        f"{name}/{way}" for name, *_ in _LINK for way in ("in", "out")
    }
    requires = (
        OnCard("with the CPU alone there is one memory, so there is nowhere to stream from"),
        Needs("adapters/weights", "frozen weights are what makes a pass by chunks cheap"),
        Needs("loss/gradient", "the loss goes by chunks too"),
        _CanBeCut(),
    )
    knobs = (
        Knob("chunk", "tokens computed at once", lambda _: CHUNKS, letter="S_c", low=64, high=1 << 20),
        Knob(
            "heads",
            "query heads whose attention is computed at once",
            heads_at_once,
            letter="H_g",
            low=1,
            high=1024,
        ),
        Knob(
            "staging",
            "host or card: where what lies between passes waits",
            lambda _: ("host", "card"),
            letter="j_h",
            names=("card", "host"),
        ),
        Knob("kernel", "cudnn, flash or efficient", _kernels, names=("cudnn", "flash", "efficient")),
    )
    evidence = (
        Evidence("loss and gradients equal stock to 1e-10 in float64", "tests/streamed/test_gradients.py"),
        Evidence("bytes counted chunk by chunk", "tests/streamed/test_memory.py"),
        Evidence("attention by head chunks", "Untied Ulysses, arXiv 2602.21196"),
        Evidence("attention streamed from host memory", "Yao et al. 2024, arXiv 2408.16978"),
    )

    def letters(self, situation: Situation, knobs: Knobs) -> dict[str, int]:
        """One layer at a time, no stored scores."""
        return super().letters(situation, knobs) | {"A": 1, "p": 1, "e": 0, "l_r": 1}

    def settings(self, situation: Situation, knobs: Knobs) -> dict[str, str]:
        """The kernel that attention rates are looked up by, and the executor."""
        return {"attention": str(knobs["kernel"]), "executor": "streamed"}

    def rewrite(self, ledger: Ledger, knobs: Knobs, situation: Situation) -> Ledger:
        """Chunks and groups instead of whole sequences on the card; whole sequences in the host."""
        counts: dict[str, Formula] = {
            "activations/inputs": nothing,
            "activations/norms": memory.chunk_norms,
            "activations/hidden": memory.chunk_hidden,
            "activations/adapters": memory.chunk_adapters,
            "activations/mlp": memory.chunk_mlp,
            "activations/experts": memory.chunk_experts,
            "activations/routing": memory.chunk_routing,
            "attention/qkv": nothing,
            "attention/output": memory.chunk_attended,
            "attention/documents": nothing,
            "attention/scores": nothing,
        }
        for name, count in counts.items():
            ledger = ledger.claimed(name, count=count, phases=LIVE)
        for name in (*EAGER, "activations/outputs", "loss/hidden"):
            ledger = ledger.claimed(name, count=nothing)
        passing = (Term(*each[:4], each[4], SOURCE) for each in _PASSING)
        return (
            ledger.claimed("activations/rotary", count=memory.rotary, phases=CHUNKS_PASS)
            .claimed("runtime/workspace", count=memory.workspace)
            .claimed("activations/tokens", count=memory.row_ids, phases=AFTER_LOAD)
            .claimed("activations/forward", count=memory.forward_chunk)
            .claimed("activations/evaluation", count=memory.forward_chunk, bits=one_byte)
            .claimed("activations/backward", count=memory.chunk_backward_bytes)
            .claimed("loss/norm", count=memory.loss_norm)
            .claimed("loss/normed", count=memory.loss_gradient)
            .claimed("loss/normed_evaluation", count=memory.loss_gradient)
            .claimed("loss/gradient", count=memory.loss_gradient)
            .with_terms(
                *passing,
                Term(
                    "activations/rotary_on_card",
                    memory.rotary_on_card,
                    bits_of_activation,
                    CHUNKS_PASS | PASSES | {Phase.LOSS, Phase.EVALUATE_LOSS},
                    "rotary tables of all chunks",
                    SOURCE,
                ),
                Term(
                    "attention/workspace",
                    _WORKSPACES[str(knobs["kernel"])],
                    one_byte,
                    frozenset({Phase.ATTENTION_BACKWARD}),
                    "what the kernel takes in its backward pass",
                    SOURCE,
                ),
                Term(
                    "activations/checkpoints",
                    memory.checkpoints,
                    work.input_bits,
                    AFTER_LOAD,
                    "inputs of the layers",
                    "trainer/streamed/checkpoints.py",
                    device=Device.PINNED,
                ),
                Term(
                    "activations/inner",
                    memory.inner_checkpoints,
                    bits_of_activation,
                    AFTER_LOAD,
                    "inputs of layers between two that are kept",
                    "trainer/streamed/checkpoints.py",
                    device=Device.PINNED,
                ),
                *(
                    Term(name, count, bits, held(device), what, SOURCE, device=device)
                    for name, count, bits, device, what in _BETWEEN_PASSES
                ),
            )
            .with_work(*self._work())
        )

    @staticmethod
    def _work() -> tuple[Work, ...]:
        ways = (("in", "from the host"), ("out", "to the host"))
        return _WORK + tuple(
            Work(f"{name}/{way}", amount, Resource.LINK, phase, meaning, stage)
            for name, phase, stage, *amounts in _LINK
            for (way, meaning), amount in zip(ways, amounts, strict=True)
        )

    def apply(self, session: Session) -> None:
        """Run the layers in passes."""
        staging = session.knob("staging")
        assert staging in ("host", "card")
        session.stream_layers(
            kernel=str(session.knob("kernel")),
            chunk=int(session.knob("chunk")),
            heads=int(session.knob("heads")),
            staging="host" if staging == "host" else "card",
        )
