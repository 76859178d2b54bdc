"""The terms of memory of a training step with nothing switched on: float32, eager attention, stock loss.

Without an optimisation that makes ``adapters/weights`` nothing is trained; without checkpointing every layer's
saved tensors live at once. Each formula states what autograd keeps for one layer as transformers 5.17 to 5.23
computes it, with the adapter forward of ``trainer/adapters.py``; they are checked against counted bytes in
``tests/test_memory_against_counted.py``.
"""

from __future__ import annotations

from planner.baseline_formulas import (
    adapter_inner,
    attention_by_document,
    attention_inputs_expanded,
    attention_output,
    backward_bytes,
    bits_of_activation,
    bits_of_weight,
    eager_alone_bytes,
    eager_backward_bytes,
    eager_forward_bytes,
    eager_scores,
    embedding,
    evaluation_working,
    final_hidden,
    final_norm_copy,
    float32,
    forward_bytes,
    head,
    incoming_gradient,
    int64,
    layer_inputs,
    linear_weights,
    loading_in_host,
    masks,
    mlp_saved,
    norm_copies,
    norm_outputs,
    norms_and_biases,
    one_byte,
    positions,
    rotary_frequencies,
    rotary_tables,
    scores_bits,
    stock_logits,
    stock_logits_bits,
    token_ids,
    workspace,
)
from planner.baseline_work import WORK
from planner.expert_formulas import experts, routers, saved_outputs, saved_routing
from planner.ledger import ALWAYS, Basis, Device, Formula, Ledger, Phase, Term

EVALUATION = frozenset({Phase.EVALUATE, Phase.EVALUATE_LOSS})
SAVED = frozenset({Phase.FORWARD, Phase.LOSS, Phase.BACKWARD})
COUNTED = "derivation in the docstring; counted by tests/test_memory_against_counted.py"
SHAPES = "shapes of the modules in transformers"


def _saved(name: str, count: Formula, bits: Formula, meaning: str) -> Term:
    return Term(name, count, bits, SAVED, meaning, COUNTED)


PER_LAYER: tuple[Term, ...] = (
    _saved("activations/inputs", layer_inputs, bits_of_activation, "layer inputs saved by the first norm"),
    _saved("activations/norms", norm_copies, float32, "float32 copies and statistics saved by norms"),
    _saved("activations/hidden", norm_outputs, bits_of_activation, "norm outputs, the inputs of adapters"),
    _saved("activations/adapters", adapter_inner, bits_of_activation, "inner activations of adapters"),
    _saved("activations/mlp", mlp_saved, bits_of_activation, "gate, up, activation and product in the MLP"),
    _saved("activations/experts", saved_outputs, bits_of_activation, "what each expert gives for each of its tokens"),
    _saved("activations/routing", saved_routing, one_byte, "which experts a token takes, and with what weight"),
    _saved("attention/qkv", attention_inputs_expanded, bits_of_activation, "query, key and value after rotation"),
    _saved("attention/output", attention_output, bits_of_activation, "output of attention"),
    _saved("attention/documents", attention_by_document, bits_of_activation, "output of attention by document"),
    _saved("attention/scores", eager_scores, scores_bits, "what attention saves beside its inputs and output"),
)

FIXED: tuple[Term, ...] = (
    Term(
        "weights/linear",
        linear_weights,
        bits_of_weight,
        ALWAYS,
        "linears inside the layers",
        SHAPES,
        basis=Basis.EXACT,
    ),
    Term("weights/embedding", embedding, bits_of_weight, ALWAYS, "token embedding", SHAPES, basis=Basis.EXACT),
    Term("weights/positions", positions, bits_of_weight, ALWAYS, "learned positions", SHAPES, basis=Basis.EXACT),
    Term("weights/experts", experts, bits_of_weight, ALWAYS, "experts inside the layers", SHAPES, basis=Basis.EXACT),
    Term("weights/routers", routers, bits_of_weight, ALWAYS, "routers, biases of experts", SHAPES, basis=Basis.EXACT),
    Term("weights/head", head, bits_of_weight, ALWAYS, "output head, where not tied", SHAPES, basis=Basis.EXACT),
    Term(
        "weights/norms",
        norms_and_biases,
        bits_of_weight,
        ALWAYS,
        "norms and biases",
        SHAPES,
        basis=Basis.EXACT,
    ),
    Term("weights/rotary", rotary_frequencies, float32, ALWAYS, "rotary frequencies", SHAPES, basis=Basis.EXACT),
)

PASSING: tuple[Term, ...] = (
    Term("activations/tokens", token_ids, int64, SAVED | EVALUATION, "token ids and targets", COUNTED),
    Term(
        "activations/rotary",
        rotary_tables,
        bits_of_activation,
        SAVED | EVALUATION,
        "rotary tables",
        COUNTED,
    ),
    Term(
        "activations/outputs",
        incoming_gradient,
        bits_of_activation,
        frozenset({Phase.BACKWARD}),
        "the gradient coming into a layer",
        COUNTED,
    ),
    Term(
        "activations/forward",
        forward_bytes,
        one_byte,
        frozenset({Phase.FORWARD}),
        "passing tensors of the forward pass",
        COUNTED,
    ),
    Term(
        "activations/backward",
        backward_bytes,
        one_byte,
        frozenset({Phase.BACKWARD}),
        "gradients at the height of a layer's backward pass",
        COUNTED,
    ),
    Term(
        "activations/evaluation",
        evaluation_working,
        bits_of_activation,
        frozenset({Phase.EVALUATE}),
        "tensors of one layer run without autograd",
        COUNTED,
    ),
    Term(
        "attention/mask",
        masks,
        bits_of_activation,
        frozenset({Phase.FORWARD, Phase.EVALUATE}),
        "causal masks, added to the scores",
        COUNTED,
    ),
    Term(
        "attention/eager",
        eager_backward_bytes,
        one_byte,
        frozenset({Phase.BACKWARD}),
        "score-sized tensors while the softmax is differentiated",
        "torch aten/native/cuda/SoftMax.cu; reports/validation/h200-phi-2-2048-eager.json",
    ),
    Term(
        "attention/eager_forward",
        eager_forward_bytes,
        one_byte,
        frozenset({Phase.FORWARD}),
        "score-sized tensors while the softmax is computed",
        COUNTED,
    ),
    Term(
        "attention/eager_evaluation",
        eager_alone_bytes,
        one_byte,
        frozenset({Phase.EVALUATE}),
        "the same without autograd",
        COUNTED,
    ),
    Term(
        "loss/hidden",
        final_hidden,
        bits_of_activation,
        frozenset({Phase.LOSS}),
        "last hidden states before the final norm",
        COUNTED,
    ),
    Term(
        "loss/norm",
        final_norm_copy,
        float32,
        frozenset({Phase.LOSS}),
        "float32 copy in the final norm",
        COUNTED,
    ),
    Term(
        "loss/logits",
        stock_logits,
        stock_logits_bits,
        frozenset({Phase.LOSS, Phase.EVALUATE_LOSS}),
        "logits of every token, their float32 copies and gradient",
        COUNTED,
    ),
)

LOADING = Term(
    "buffers/dequantising",
    loading_in_host,
    one_byte,
    frozenset({Phase.LOAD}),
    "a GGUF file's weights on their way through the host",
    "transformers 5.23, modeling_gguf_pytorch_utils; anonymous memory of a process that loads SmolLM2-135M",
    device=Device.HOST,
    basis=Basis.MEASURED,
)

WORKSPACE = Term(
    "runtime/workspace",
    workspace,
    one_byte,
    ALWAYS - {Phase.LOAD},
    "workspace that cuBLAS keeps",
    "torch CUDABlas.cpp and CublasHandlePool.cpp: a handle, and a workspace, for each thread",
    basis=Basis.MEASURED,
)


def baseline() -> Ledger:
    """The ledger with nothing switched on."""
    return Ledger().with_terms(*FIXED, *PER_LAYER, *PASSING, LOADING, WORKSPACE).with_work(*WORK)


def per_layer_names() -> tuple[str, ...]:
    """Names of the terms that live once for each layer whose saved tensors are alive."""
    return tuple(term.name for term in PER_LAYER)
