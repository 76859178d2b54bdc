"""What an optimisation's hook may ask of a training run, before the run is built.

The trainer implements this protocol; the planner only declares it, so a slice can say in one file what it costs
and how it is switched on, and planning still needs no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Protocol

Schedule = Literal["one_cycle", "polynomial_decay", "warmup_stable_decay"]
"""Schedules of the learning rate that a plan may have in place of ``train.schedule``."""


class Session(Protocol):
    """A run that is being put together. Each method may be called once."""

    def knob(self, name: str) -> int | float | str:
        """The value the plan gives to a knob of the optimisation being applied, by its short name."""
        ...

    def store_weights(self, form: Literal["nf4"], *, double_quantization: bool) -> None:
        """Hold the weights of the layers' linears in this form."""
        ...

    def compute_in(self, dtype: Literal["bfloat16", "float16"], *, scale_loss: bool) -> None:
        """Hold frozen weights and activations in this dtype; adapters stay in float32."""
        ...

    def attend_with(self, kernel: str) -> None:
        """Compute attention with this exact kernel, and with no other."""
        ...

    def adapt(self, *, rank: int, alpha: int) -> None:
        """Put LoRA adapters on every linear of every layer; an alpha of 0 stands for what is usual."""
        ...

    def use_rslora(self) -> None:
        """Scale the adapters by alpha over the square root of their rank."""
        ...

    def use_loraplus(self, *, ratio: float) -> None:
        """Let the second matrix of each adapter learn so many times as fast as the first."""
        ...

    def rate_for_rows(self, *, rows: int) -> None:
        """Take the learning rate for that of a step of so many rows; another goes by the square root."""
        ...

    def search_rate(self, *, steps: int, low: float, high: float, rule: str) -> None:
        """Before training try so many rates between these, and train by the one that a rule takes from them.

        ``half_least``: half of that at which the loss is least; ``steepest``: where it falls most.
        """
        ...

    def schedule_rate(self, kind: Schedule, knobs: Mapping[str, float]) -> None:
        """Let the learning rate go by this schedule, whatever ``train.schedule`` says."""
        ...

    def fuse_activation(self) -> None:
        """Compute the MLP's activation function in one operation instead of several."""
        ...

    def fuse_norms(self) -> None:
        """Compute each RMSNorm in one operation instead of several."""
        ...

    def compile_layers(self) -> None:
        """Compile each layer as a whole."""
        ...

    def checkpoint_layers(self) -> None:
        """Keep each layer's input alone, and recompute the layer in the backward pass."""
        ...

    def offload_checkpoints(self) -> None:
        """Hold the kept layer inputs in pinned host memory."""
        ...

    def stream_layers(self, *, kernel: str, chunk: int, heads: int, staging: Literal["host", "card"]) -> None:
        """Run each layer in passes over the sequence: by so many tokens, and attention by so many query heads.

        Layer inputs are kept in host memory; what lies between the passes is kept where ``staging`` says.
        """
        ...

    def stream_weights(self) -> None:
        """Hold the matrices of the layers in pinned host memory, and bring each layer to the card as it is computed."""
        ...

    def space_checkpoints(self, *, every: int) -> None:
        """Keep one layer input for so many layers, and compute the others again."""
        ...

    def code_checkpoints(self, form: Literal["int8", "nf4"]) -> None:
        """Hold the kept layer inputs in this form."""
        ...

    def store_checkpoints(self) -> None:
        """Keep the layer inputs on disk, but for those that are worked on."""
        ...

    def keep_attention_outputs(self) -> None:
        """Keep what attention gave in every layer instead of computing it again."""
        ...

    def block_sequence(self, *, tokens: int) -> None:
        """Let attention go by blocks of so many tokens of the row."""
        ...

    def chunk_loss(self, *, rows: int) -> None:
        """Compute loss and its gradient for this many trained tokens at a time."""
        ...

    def smooth_loss(self, *, share: float) -> None:
        """Spread so much of each target over the vocabulary, in the loss that is differentiated."""
        ...

    def optimize_with(self, name: Literal["adamw", "adamw_8bit"]) -> None:
        """Update the adapters with this optimiser."""
        ...

    def pack_documents(self, *, most: int) -> None:
        """Let so many documents share a row, each attending to itself alone."""
        ...

    def grow_rows(self, *, stages: int) -> None:
        """Cut rows short at first, and half as often in each of so many stages, down to not at all."""
        ...

    def map_tokens(self) -> None:
        """Keep the tokens of the data in a file on disk, and read documents again instead of keeping their texts."""
        ...

    def average_weights(self, *, kind: Literal["ema", "swa"], decay: float, place: Literal["gpu", "host"]) -> None:
        """Keep averages of the adapters over the steps; they are what is evaluated, saved and merged."""
        ...

    def look_ahead(self, *, every: int, share: float, place: Literal["gpu", "host"]) -> None:
        """Let slow adapters follow every so many steps by this share of the way, and the others begin from them."""
        ...

    def stop_early(self, *, patience: int, threshold: float) -> None:
        """End training once so many evaluations have not been better by this share, and go back to the best."""
        ...

    def keep_checkpoints(self, *, count: int, disk_bytes: int) -> None:
        """Write the adapters down at each evaluation; keep the best and so many newest, within these bytes or any."""
        ...

    def go_back_at_spikes(self, *, sigmas: float, window: int, every: int, most: int) -> None:
        """Where a loss is so many deviations above the last ones, go back some steps, and on with the next batch."""
        ...

    def release_cache(self, *, every: int, share: float) -> None:
        """Every so many steps give back what the allocator holds, where that is by this share more than is needed."""
        ...

    def add_gradient_noise(self, *, variance: float, decay: float, relative: bool) -> None:
        """Add noise of this variance to the gradients of the first step, and less by this power to later ones.

        ``relative``: the variance is a share of the mean square of each matrix's gradient.
        """
        ...

    def centralize_gradients(self) -> None:
        """Take the mean of each row off the gradients of the first matrix of each adapter."""
        ...

    def clip_by_rows(self, *, ratio: float, floor: float) -> None:
        """Clip each row's gradient to this share of the row's norm, which counts as no smaller than the floor."""
        ...
