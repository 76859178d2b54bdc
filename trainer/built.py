"""A run that is put together: everything that a training loop needs, in one place."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from trainer.averaging import Averages
from trainer.cache_release import CacheRelease
from trainer.data import Tokenise
from trainer.gradients import Shaping
from trainer.host_memory import Arena
from trainer.judging import Judging
from trainer.lookahead import Lookahead
from trainer.rates import Rates, RateSearch
from trainer.spikes import Spikes
from trainer.step import Loss
from trainer.streamed.disk_file import DiskFile
from trainer.streamed.loss import StreamedLoss
from trainer.streamed.weights import Weights


@dataclass(frozen=True)
class BuiltRun:
    """Everything a training loop needs.

    Attributes:
        config: the base model's own, with the plan's rotary scaling: what a user of the adapter builds the base from.
        tokenise: texts to token ids, with nothing added and no control token recognised inside a text.
        dtype: of frozen weights and activations; adapters and optimiser state are float32 whatever it is.
        rates: how the learning rate goes; ``rate_search``: how the highest is looked for, if it is.
        shaping: what is done to gradients before the optimiser.
        judging: what is made of evaluations while it trains; ``spikes``: of losses far above the others, if anything.
        cache_release: when the allocator's cache is given back, if ever.
        most_documents: that share one row; ``map_tokens``: whether tokens are in a file.
        compiled: whether layers are compiled when they first run.
        stages: of a run whose rows grow; 1 where they have one length.
        averages: of the adapters over the steps, or slow adapters, if any are kept.
        executor: ``resident`` or ``streamed``.
        host: the host memory that what is on its way to or from the card is kept in, if any.
        disk: what of the disk is used while it trains, if any.
        weights: of the layers; told which are needed.
        kernel: the attention actually used.
        loss_name: the loss actually used.
    """

    model: PeftModel
    config: PretrainedConfig
    tokenizer: Any
    tokenise: Tokenise
    optimizer: torch.optim.Optimizer
    rates: Rates
    shaping: Shaping
    judging: Judging
    spikes: Spikes | None
    rate_search: RateSearch | None
    cache_release: CacheRelease | None
    scaler: torch.amp.GradScaler | None
    loss: Loss
    dtype: torch.dtype
    device: torch.device
    most_documents: int
    map_tokens: bool
    compiled: bool
    stages: int
    averages: Averages | Lookahead | None
    executor: Literal["resident", "streamed"]
    host: Arena | None
    disk: DiskFile | None
    weights: Weights
    kernel: str
    loss_name: str

    @property
    def base(self) -> PreTrainedModel:
        """The transformers model inside, its linears adapted in place."""
        base: Any = self.model.get_base_model()
        return base

    @property
    def trained(self) -> list[nn.Parameter]:
        """What is trained: the adapters."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    @property
    def first_matrices(self) -> list[nn.Parameter]:
        """Of what is trained, the first matrix of each adapter."""
        return [each for name, each in self.model.named_parameters() if each.requires_grad and "lora_A" in name]

    @property
    def streamed(self) -> StreamedLoss | None:
        """The loss where layers are streamed; None where the model runs as a whole."""
        return self.loss if isinstance(self.loss, StreamedLoss) else None

    @property
    def arenas(self) -> list[Arena]:
        """The host memory that the run works with."""
        return [arena for arena in (self.host, self.weights.host) if arena is not None]

    def first_layers(self, count: int) -> AbstractContextManager[None]:
        """Meanwhile a streamed model has its first layers alone; others have all of theirs."""
        return self.streamed.first_layers(count) if self.streamed is not None else nullcontext()

    def close(self) -> None:
        """Give pinned memory and the disk back."""
        if self.disk is not None:
            self.disk.close()
        for arena in self.arenas:
            arena.close()
