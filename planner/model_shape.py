"""What a decoder-only language model is made of, as far as memory and time care: sizes, linears, exact counts."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from planner.errors import PlanError, did_you_mean


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
    """A dense decoder whose layers all have the same shape. Sizes are in elements, counts in parameters.

    Attributes:
        id: shipped id, folder or file name, or the hub id it was read from.
        model_type: the family, as config.json names it.
        architecture: class of transformers that builds it.
        hub_id: ``org/name`` on the hub, None if unknown.
        layers, width, mlp_width, heads, kv_heads, head_size, vocab: L, D, F, H, K, E and V of the formulas.
        native_context: positions that config.json declares (``max_position_embeddings``).
        linears: the linears of one layer in the order in which the layer runs them.
        gated_mlp: the MLP has a gate beside its up projection (three linears, not two).
        parallel_block: attention and MLP both read the same normed input, and their outputs are added (Phi).
        tied_head: the output head is the embedding matrix and has no weight of its own.
        qk_norm: queries and keys are normed, head by head.
        norms_per_layer: norms as wide as the model; norms of queries and keys are not among them.
        norm_parameters_per_layer: parameters of every norm of a layer, those of queries and keys included.
        activation: ``hidden_act`` as config.json writes it.
        residual_dropout: rate on the outputs of attention and MLP; ``embedding_dropout``: on the embeddings;
            ``attention_dropout``: on the attention weights.
        sliding_window: keys that a token of a sliding layer sees; None unless shorter than the native context.
        sliding_layers: layers that have that window; 0 if there is none.
        rotary_width: dimensions of each head that the rotary embedding turns.
        rope_theta, rope_type: base and kind (``default``, ``llama3``, ``yarn`` ...) of the rotary embedding.
        config_dtype: number type the checkpoint is said to be stored in, None if config.json is silent.
        quantized: how the checkpoint is already quantised (``bitsandbytes``, ``gptq``, ``gguf`` ...), None if not.
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
    gated_mlp: bool
    parallel_block: bool
    tied_head: bool
    head_bias: bool
    qk_norm: bool
    norm: Literal["layernorm", "rmsnorm"]
    norms_per_layer: int
    norm_parameters_per_layer: int
    final_norm_parameters: int
    activation: str
    residual_dropout: float
    embedding_dropout: float
    attention_dropout: float
    sliding_window: int | None
    sliding_layers: int
    rotary_width: int
    rope_theta: float
    rope_type: str
    config_dtype: str | None
    quantized: str | None

    @property
    def parameters(self) -> int:
        """All parameters, each counted once: a tied head counts nothing of its own."""
        layers = self.layers * self.linear_parameters_per_layer
        return self.embedding_parameters + self.head_parameters + layers + self.small_parameters

    @property
    def linear_parameters_per_layer(self) -> int:
        """Weights of the linears of one layer, biases left out."""
        return sum(linear.weights for linear in self.linears)

    @property
    def bias_parameters_per_layer(self) -> int:
        """Biases of the linears of one layer."""
        return sum(linear.outputs for linear in self.linears if linear.bias)

    @property
    def small_parameters(self) -> int:
        """All norms and all biases of the model, the bias of the head included."""
        per_layer = self.norm_parameters_per_layer + self.bias_parameters_per_layer
        head_bias = self.vocab if self.head_bias else 0
        return self.layers * per_layer + self.final_norm_parameters + head_bias

    @property
    def embedding_parameters(self) -> int:
        """The embedding matrix, ``vocab`` x ``width``."""
        return self.vocab * self.width

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
        names = [linear.name for linear in self.linears]
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
