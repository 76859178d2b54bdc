"""What a decoder-only language model is made of, as far as memory and time care: sizes, linears, exact counts."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from planner.errors import PlanError, did_you_mean
from planner.families import MEMORY_DERIVED


@dataclass(frozen=True)
class Linear:
    """One linear module of a decoder layer. Its weight is ``outputs`` x ``inputs``; ``bias`` adds ``outputs``.

    ``name`` is the last part of the module's name in transformers, which is also what PEFT takes as a target.
    """

    name: str
    inputs: int
    outputs: int
    bias: bool
    part: Literal["attention", "mlp"]

    @property
    def weights(self) -> int:
        """Elements of the weight, the bias left out."""
        return self.inputs * self.outputs


@dataclass(frozen=True)
class ModelShape:
    """A decoder whose layers all have the same shape. Sizes are in elements, counts in parameters.

    Attributes:
        id: shipped id, folder or file name, or the hub id it was read from.
        model_type: the family, as config.json names it.
        architecture: class of transformers that builds it.
        hub_id: ``org/name`` on the hub, None if unknown.
        layers, width, mlp_width, heads, kv_heads, head_size, vocab: L, D, F, H, K, E and V of the formulas. With
            experts ``mlp_width`` is the width of one expert.
        native_context: positions that config.json declares (``max_position_embeddings``).
        linears: the linears of one layer in the order in which the layer runs them. With experts these are the
            linears of attention: neither router nor experts are linears in transformers 5.
        conv1d: what stands in ``linears`` are Conv1D modules: weights kept as ``inputs`` x ``outputs``, always with a
            bias, and no nn.Linear.
        fused_qkv: one linear gives queries, keys and values, which are views into its output.
        fused_gate_up: one linear of the MLP gives gate and up projection, which are views into its output.
        gated_mlp: the MLP has a gate beside its up projection; so has every expert.
        experts: experts of each layer, 0 where the MLP is a plain one; ``experts_per_token``: how many a token takes.
        expert_biases: router and experts have biases.
        clamped_experts: gate and up projection of experts are clamped, and the experts taken alone share the softmax.
        wide_expert_weights: what experts give is weighted in float32.
        parallel_block: attention and MLP both read the layer's input, and their outputs are added to it: through one
            norm (``norms_per_layer`` 1, Phi) or each through its own (2, GPT-NeoX).
        tied_head: the output head is the embedding matrix and has no weight of its own.
        qk_norm: queries and keys are normed, head by head.
        norm_one_plus: RMSNorm multiplies by one plus its weight in float32 and rounds after that (Gemma).
        norms_per_layer: norms as wide as the model; norms of queries and keys are not among them.
        output_norms_per_layer: those of them that norm what attention and MLP give, before it is added (Gemma: 2).
        norm_parameters_per_layer: parameters of every norm of a layer, those of queries and keys included.
        activation: ``hidden_act`` as config.json writes it. The experts of gpt_oss have a clamped gate of their own.
        residual_dropout: rate on the outputs of attention and MLP; ``embedding_dropout``: on the embeddings;
            ``attention_dropout``: on the attention weights.
        attention_softcap: scores are capped by tanh at this value before the softmax; None: they are not.
        final_softcap: logits are capped by tanh at this value; None: they are not.
        narrow_softmax: the attention that transformers writes out has its softmax in the dtype of the scores, where
            others have it in float32.
        attention_sinks: each head has a learned score that takes part in the softmax and stands for no key.
        embedding_scale: factor on the embeddings; None where there is no such step.
        residual_multiplier: factor on what attention and MLP give, before it is added; ``logits_divisor``: divisor of
            the logits (Granite). None where there is no such step. Such a step saves no tensor, its result is a new
            one.
        sliding_window: keys that a token of a sliding layer sees; None unless shorter than the native context.
        sliding_layers: layers that have that window; 0 if there is none.
        learned_positions: a learned row for each of ``native_context`` positions is added to the embeddings.
        rope_free_layers: layers whose queries and keys no rotary embedding turns.
        rotary_tables: pairs of cosines and sines alive at once; 2 where layers with a window have their own.
        rotary_width: dimensions of each head that the rotary embedding turns; 0 without one.
        rotary_table_width: elements of a token's cosines, and of its sines: ``rotary_width``, or half of it.
        rope_theta, rope_type: base and kind (``default``, ``llama3``, ``yarn`` ...) of the rotary embedding;
            0 and ``none`` without one. ``rope_local_theta``: base of that for layers with a window, None if the same.
        config_dtype: number type the checkpoint is said to be stored in, None if config.json is silent.
        quantized: how the checkpoint is already quantised (``bitsandbytes``, ``gptq``, ``mxfp4``, ``gguf`` ...), None
            if not. Counts are those of the model that is not quantised.
    """

    id: str
    model_type: str
    architecture: str
    hub_id: str | None
    layers: int
    width: int
    mlp_width: int
    heads: int
    kv_heads: int
    head_size: int
    vocab: int
    native_context: int
    linears: tuple[Linear, ...]
    conv1d: bool
    fused_qkv: bool
    fused_gate_up: bool
    gated_mlp: bool
    experts: int
    experts_per_token: int
    expert_biases: bool
    clamped_experts: bool
    wide_expert_weights: bool
    parallel_block: bool
    tied_head: bool
    head_bias: bool
    qk_norm: bool
    norm: Literal["layernorm", "rmsnorm"]
    norm_one_plus: bool
    norms_per_layer: int
    output_norms_per_layer: int
    norm_parameters_per_layer: int
    final_norm_parameters: int
    activation: str
    residual_dropout: float
    embedding_dropout: float
    attention_dropout: float
    attention_softcap: float | None
    final_softcap: float | None
    narrow_softmax: bool
    attention_sinks: bool
    embedding_scale: float | None
    residual_multiplier: float | None
    logits_divisor: float | None
    sliding_window: int | None
    sliding_layers: int
    learned_positions: bool
    rope_free_layers: int
    rotary_tables: int
    rotary_width: int
    rotary_table_width: int
    rope_theta: float
    rope_local_theta: float | None
    rope_type: str
    config_dtype: str | None
    quantized: str | None

    @property
    def not_planned(self) -> tuple[str, ...]:
        """Why a run of this model cannot be planned yet, one reason each; empty where it can."""
        reasons = []
        if self.model_type not in MEMORY_DERIVED:
            reasons.append(f"the memory of this family ({self.model_type}) is not derived yet")
        return tuple(reasons)

    @property
    def quantized_otherwise(self) -> str:
        """Why its weights are not read as they are published: in a quantised format other than GGUF; else empty."""
        return "" if self.quantized in (None, "gguf") else f"its weights are already quantised ({self.quantized})"

    @property
    def most_tokens(self) -> int | None:
        """The longest sequence there are positions for; None where there is no end to them."""
        return self.native_context if self.learned_positions else None

    @property
    def parameters(self) -> int:
        """All parameters, each counted once: a tied head counts nothing of its own."""
        per_layer = (
            self.linear_parameters_per_layer + self.expert_parameters_per_layer + self.router_parameters_per_layer
        )
        embeddings = self.embedding_parameters + self.position_embedding_parameters
        return embeddings + self.head_parameters + self.layers * per_layer + self.small_parameters

    @property
    def active_parameters(self) -> int:
        """Parameters that a token meets: all of them but those of the experts that it does not take."""
        if not self.experts:
            return self.parameters
        idle = self.experts - self.experts_per_token
        return self.parameters - self.layers * idle * (self.expert_parameters_per_layer // self.experts)

    @property
    def linear_parameters_per_layer(self) -> int:
        """Weights of the linears of one layer, biases left out."""
        return sum(linear.weights for linear in self.linears)

    @property
    def bias_parameters_per_layer(self) -> int:
        """Biases of the linears of one layer."""
        return sum(linear.outputs for linear in self.linears if linear.bias)

    @property
    def expert_parameters_per_layer(self) -> int:
        """Elements of all experts of one layer, in no nn.Linear: gate, up and down projection, and their biases."""
        return self.experts * 3 * self.width * self.mlp_width + self.expert_bias_parameters_per_layer

    @property
    def expert_bias_parameters_per_layer(self) -> int:
        """Elements of the biases of all experts of one layer; they count with the experts."""
        return self.experts * (2 * self.mlp_width + self.width) if self.expert_biases else 0

    @property
    def router_parameters_per_layer(self) -> int:
        """Elements of the weight that scores the experts, ``experts`` x ``width``; in no nn.Linear, bias left out."""
        return self.experts * self.width

    @property
    def small_parameters(self) -> int:
        """All norms, all biases and all attention sinks of the model: whatever has one dimension.

        The biases of head and router are included, those of the experts are not: they count with the experts.
        """
        per_layer = self.norm_parameters_per_layer + self.bias_parameters_per_layer
        per_layer += self.heads if self.attention_sinks else 0
        per_layer += self.experts if self.expert_biases else 0
        head_bias = self.vocab if self.head_bias else 0
        return self.layers * per_layer + self.final_norm_parameters + head_bias

    @property
    def embedding_parameters(self) -> int:
        """The embedding matrix, ``vocab`` x ``width``."""
        return self.vocab * self.width

    @property
    def position_embedding_parameters(self) -> int:
        """The learned rows of the positions, ``native_context`` x ``width``; 0 where there are none."""
        return self.native_context * self.width if self.learned_positions else 0

    @property
    def head_parameters(self) -> int:
        """Weight of the output head, its bias left out; 0 where it is the embedding matrix."""
        return 0 if self.tied_head else self.vocab * self.width

    @property
    def largest_linear(self) -> int:
        """Weights of the largest linear of a layer: what a buffer must hold that takes any one of them."""
        return max(linear.weights for linear in self.linears)

    @property
    def query_width(self) -> int:
        """Elements of a token's queries, all heads together."""
        return self.heads * self.head_size

    @property
    def kv_width(self) -> int:
        """Elements of a token's keys, all heads together; its values have as many."""
        return self.kv_heads * self.head_size

    def adapted(self, targets: Collection[str] | None = None) -> tuple[Linear, ...]:
        """The linears of one layer that ``targets`` names; all of them if None.

        Raises:
            PlanError: no target at all, or one that no linear of the layer is called.
        """
        if targets is None:
            return self.linears
        assert not isinstance(targets, str), "targets is a collection of names, not one name"
        names = list(dict.fromkeys(linear.name for linear in self.linears))  # GPT-2 has two called c_proj
        if not targets:
            raise PlanError("LoRA targets", "none is named.", f"{self.id} has {', '.join(names)}.")
        for target in targets:
            if target not in names:
                nearest = did_you_mean(target, names) or f"It has {', '.join(names)}."
                raise PlanError(f"LoRA target {target!r}", f"no linear of {self.id} has that name.", nearest)
        return tuple(linear for linear in self.linears if linear.name in targets)

    def adapted_width(self, targets: Collection[str] | None = None) -> int:
        """Inputs plus outputs, summed over the adapted linears of one layer: adapter elements per unit of rank."""
        return sum(linear.inputs + linear.outputs for linear in self.adapted(targets))

    def adapter_parameters(self, rank: int, targets: Collection[str] | None = None) -> int:
        """Trainable parameters of LoRA on ``targets``: two matrices, rank x inputs and outputs x rank, no bias.

        Source: Hu et al., LoRA, arXiv 2106.09685, section 4.1.

        Raises:
            PlanError: a rank that is not a positive whole number; unknown targets.
        """
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            raise PlanError(f"LoRA rank {rank!r}", "a rank is a whole number of at least 1.", "Try 8 or 16.")
        return self.layers * rank * self.adapted_width(targets)
