"""Puts a resident run together: the plan's choices say what they want, then everything is built once."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from peft import PeftModel
from transformers import PretrainedConfig, PreTrainedModel

from planner.errors import PlanError, did_you_mean
from planner.optimizations.mlp.fused_activation import FUSED
from planner.plan import Choice, Plan
from trainer.attention import NAMES, register
from trainer.built import BuiltRun
from trainer.checkpointing import DeviceStore, Store, checkpoint_layers
from trainer.compiled import compile_layers
from trainer.config_check import check_config
from trainer.device import take_device
from trainer.disk_room import scratch_folder
from trainer.four_bit import FourBit
from trainer.gguf_reading import read_once
from trainer.host_memory import Arena
from trainer.host_store import HostStore
from trainer.layers import activation_field, layers_of
from trainer.loading import (
    add_adapters,
    find_source,
    for_training,
    load_model,
    load_tokenizer,
    read_config,
    tokenise_bytes,
    tokenise_with,
)
from trainer.norms import fuse_norms
from trainer.rotary import go_by_batch, scale
from trainer.step import Loss, make_loss
from trainer.streamed import split
from trainer.streamed.build import Streaming, build_streamed
from trainer.streamed.disk_file import DiskFile
from trainer.streamed.weights import StreamedWeights, Weights
from trainer.update_hooks import UpdateHooks

STOCK_ATTENTION = "eager"
"""What transformers does when nothing else is asked for: every score of every head written out."""


class ResidentSession(UpdateHooks):
    """Implements `planner.session.Session`: hooks say what they want, ``build`` makes it."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)
        self._four_bit: FourBit | None = None
        self._dtype, self._scale_loss = torch.float32, False
        self._kernel: str | None = None
        self._rank: tuple[int, int] | None = None
        self._checkpointing = self._offloading = False
        self._fused_activation = self._fused_norms = self._compiling = False
        self._streaming: dict[str, Any] = {}
        self._streaming_weights = False
        self.weights = Weights()
        self._loss_rows: int | None = None
        self._smoothing = 0.0
        self._most_documents = 1
        self._map_tokens = False
        self._stages = 1

    @contextmanager
    def applying(self, choice: Choice) -> Iterator[None]:
        """While this lasts, ``knob`` reads this choice, and messages name it."""
        self._choice = choice
        try:
            yield
        finally:
            self._choice = None

    def apply_choices(self) -> None:
        """Let every optimisation of the plan say what it wants."""
        by_id: Callable[[str], Any] = importlib.import_module("planner.optimizations").by_id
        for choice in self._plan.choices:
            with self.applying(choice):
                by_id(choice.id).apply(self)

    def knob(self, name: str) -> int | float | str:
        """The plan's value of a knob of the choice being applied."""
        assert self._choice is not None, "a knob belongs to a choice that is being applied"
        value = self._choice.knobs.get(name)
        if value is None:
            raise PlanError(self._who(), f"has no value for its knob {name}.", did_you_mean(name, self._choice.knobs))
        return value

    def store_weights(self, form: Literal["nf4"], *, double_quantization: bool) -> None:
        """See the protocol."""
        self._once("store_weights")
        assert form == "nf4", form
        self._four_bit = FourBit(double_quantization)

    def compute_in(self, dtype: Literal["bfloat16", "float16"], *, scale_loss: bool) -> None:
        """See the protocol."""
        self._once("compute_in")
        self._dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16}[dtype]
        self._scale_loss = scale_loss

    def attend_with(self, kernel: str) -> None:
        """See the protocol."""
        self._once("attend_with")
        if kernel not in NAMES:
            raise PlanError(f"attention kernel {kernel}", "is not known.", did_you_mean(kernel, NAMES))
        self._kernel = kernel

    def adapt(self, *, rank: int, alpha: int) -> None:
        """See the protocol."""
        self._once("adapt")
        self._rank = (rank, alpha)

    def fuse_activation(self) -> None:
        """See the protocol."""
        self._once("fuse_activation")
        self._fused_activation = True

    def fuse_norms(self) -> None:
        """See the protocol."""
        self._once("fuse_norms")
        self._fused_norms = True

    def compile_layers(self) -> None:
        """See the protocol."""
        self._once("compile_layers")
        self._compiling = True

    def checkpoint_layers(self) -> None:
        """See the protocol."""
        self._once("checkpoint_layers")
        self._checkpointing = True

    def offload_checkpoints(self) -> None:
        """See the protocol."""
        self._once("offload_checkpoints")
        self._offloading = True

    def stream_layers(self, *, kernel: str, chunk: int, heads: int, staging: Literal["host", "card"]) -> None:
        """See the protocol."""
        self.attend_with(kernel)
        self._stream("stream_layers", kernel=kernel, chunk=chunk, heads=heads, staging=staging)

    def stream_weights(self) -> None:
        """See the protocol."""
        self._once("stream_weights")
        self._streaming_weights = True

    def space_checkpoints(self, *, every: int) -> None:
        """See the protocol."""
        self._stream("space_checkpoints", spacing=every)

    def code_checkpoints(self, form: Literal["int8", "nf4"]) -> None:
        """See the protocol."""
        self._stream("code_checkpoints", form=form)

    def store_checkpoints(self) -> None:
        """See the protocol."""
        self._stream("store_checkpoints", disk=scratch_folder(self._plan))

    def keep_attention_outputs(self) -> None:
        """See the protocol."""
        self._stream("keep_attention_outputs", keep_outputs=True)

    def block_sequence(self, *, tokens: int) -> None:
        """See the protocol."""
        self._stream("block_sequence", block=tokens)

    def _stream(self, what: str, **wishes: Any) -> None:
        self._once(what)
        self._streaming |= wishes

    def chunk_loss(self, *, rows: int) -> None:
        """See the protocol."""
        self._once("chunk_loss")
        self._loss_rows = rows

    def smooth_loss(self, *, share: float) -> None:
        """See the protocol."""
        self._once("smooth_loss")
        self._smoothing = share

    def pack_documents(self, *, most: int) -> None:
        """See the protocol."""
        self._once("pack_documents")
        self._most_documents = most

    def grow_rows(self, *, stages: int) -> None:
        """See the protocol."""
        self._once("grow_rows")
        self._stages = stages

    def map_tokens(self) -> None:
        """See the protocol."""
        self._once("map_tokens")
        self._map_tokens = True

    @property
    def dtype(self) -> torch.dtype:
        """What frozen weights and activations are computed in."""
        return self._dtype

    @read_once()
    def adapted_model(self) -> tuple[PeftModel, Any, PretrainedConfig]:
        """The model with fresh adapters on it, the tokenizer if there is one, and the config the base is built from.

        Raises:
            PlanError: the device, the model or the choices do not allow it.
        """
        if self._rank is None:
            raise PlanError("the plan's choices", "put no adapters on, so nothing would be trained.")
        plan, device = self._plan, take_device(self._plan)
        source = find_source(plan.model.source)
        tokenizer = load_tokenizer(source)
        stock = read_config(source)
        scale(stock, plan.rope)
        config = for_training(stock)
        check_config(plan, config, self._kernel, streaming=bool(self._streaming))
        if self._fused_activation:
            name = activation_field(config)
            setattr(config, name, self._fused(getattr(config, name)))
        if self._streaming_weights:
            self.weights = StreamedWeights(device)
        try:
            model = load_model(
                source,
                config,
                dtype=self._dtype,
                attention=self._attention(),
                device=device,
                four_bit=self._four_bit,
                seed=plan.train.seed,
                put_away=self.weights.put_away if isinstance(self.weights, StreamedWeights) else None,
            )
            self.weights.ready()
        except BaseException:
            self._give_back()
            raise
        model.requires_grad_(False)
        go_by_batch(model)
        if self._fused_norms:
            fuse_norms(model)
        rank, alpha = self._rank
        adapted = add_adapters(model, rank=rank, alpha=alpha, seed=plan.train.seed, by_root=self._by_root)
        return adapted, tokenizer, stock

    def _give_back(self) -> None:
        if self.weights.host is not None:
            self.weights.host.close()

    def build(self) -> BuiltRun:
        """Load the model and put on it what was asked for.

        Raises:
            PlanError: the device, the model or the choices do not allow it.
        """
        if self._offloading and not self._checkpointing:
            raise PlanError("the plan's choices", "keep layer inputs in host memory, but keep no layer inputs.")
        if self._smoothing and self._loss_rows is None:
            raise PlanError("the plan's choices", "ask for a smoothed loss, but not for the loss by slices.")
        streaming = self._streaming_options()
        if self._streaming_weights and streaming is None:
            raise PlanError("the plan's choices", "keep weights in host memory, but ask for no layers in pieces.")
        adapted, tokenizer, config = self.adapted_model()
        base: Any = adapted.get_base_model()
        model: PreTrainedModel = base
        device = model.device
        trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
        for parameter in trained:  # these buffers stay for the whole run, so they never fragment memory
            parameter.grad = torch.zeros_like(parameter)
        try:
            optimizer = self._optimizing.optimizer(adapted, self._plan.train)
            host, disk, loss = self._executor(model, streaming, device)  # last, as nobody would give its memory back
        except BaseException:
            self._give_back()
            raise
        return BuiltRun(
            model=adapted,
            config=config,
            tokenizer=tokenizer,
            tokenise=tokenise_with(tokenizer) if tokenizer is not None else tokenise_bytes,
            optimizer=optimizer,
            rates=self._rates,
            shaping=self._shaping,
            judging=self._judging,
            spikes=self._spikes,
            rate_search=self._rate_search,
            cache_release=self._cache_release,
            scaler=torch.amp.GradScaler(device.type) if self._scale_loss else None,
            loss=loss,
            dtype=self._dtype,
            device=device,
            most_documents=self._most_documents,
            map_tokens=self._map_tokens,
            compiled=self._compiling,
            stages=self._stages,
            averages=self._averaging(trained) if self._averaging else None,
            executor="streamed" if streaming else "resident",
            host=host,
            disk=disk,
            weights=self.weights,
            kernel=self._kernel or STOCK_ATTENTION,
            loss_name=f"chunked, {self._loss_rows} rows" if self._loss_rows else "transformers",
        )

    def _attention(self) -> str:
        if self._streaming:
            return split.register()
        return register(self._kernel) if self._kernel else STOCK_ATTENTION

    def _streaming_options(self) -> Streaming | None:
        if not self._streaming:
            return None
        if "chunk" not in self._streaming or self._loss_rows is None:
            why = f"ask for {', '.join(sorted(self._streaming))}, but not for layers and loss in pieces."
            raise PlanError("the plan's choices", why)
        if self._checkpointing:
            raise PlanError("the plan's choices", "ask for layers in pieces and for whole layers to be recomputed.")
        if self._compiling:
            raise PlanError("the plan's choices", "ask for layers in pieces and for whole layers to be compiled.")
        return Streaming(**self._streaming)

    def _executor(
        self, model: PreTrainedModel, streaming: Streaming | None, device: torch.device
    ) -> tuple[Arena | None, DiskFile | None, Loss]:
        """What runs forward and backward, and the host memory and the disk it works with."""
        if streaming is None:
            if self._compiling:  # before layers are checkpointed, whose backward pass runs what was compiled again
                compile_layers(model)
            store = self._checkpoint(model, device)
            return (
                (store.arena if store is not None else None),
                None,
                make_loss(model, self._loss_rows, self._smoothing),
            )
        assert self._loss_rows is not None
        made = build_streamed(
            model,
            streaming,
            self.weights,
            tokens=self._plan.train.batch * self._plan.total_tokens,
            dtype=self._dtype,
            device=device,
            rows=self._loss_rows,
            scaled=self._scale_loss,
            smoothing=self._smoothing,
        )
        return made.host, made.disk, made.loss

    def _checkpoint(self, model: PreTrainedModel, device: torch.device) -> HostStore | None:
        if not self._checkpointing:
            return None
        layers, train = layers_of(model), self._plan.train
        host = None
        if self._offloading:
            shape = (train.batch, self._plan.total_tokens, model.config.hidden_size)
            host = HostStore(len(layers), shape, self._dtype, device)
        store: Store = host if host is not None else DeviceStore()
        checkpoint_layers(layers, store)
        return host

    def _fused(self, activation: str) -> str:
        if activation not in FUSED:
            why = f"is planned for, and the model has {activation}, which it does not know."
            raise PlanError("fused_activation", why, "Plan again for this model.")
        return FUSED[activation]


def build(plan: Plan) -> BuiltRun:
    """Build the run that a plan describes; see `ResidentSession.build`."""
    session = ResidentSession(plan)
    session.apply_choices()
    return session.build()
