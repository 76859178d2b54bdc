"""What optimisations ask of a run beside its step: rates, gradients, copies of adapters, what is done between steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

from torch import nn

from planner.errors import PlanError
from planner.plan import Choice, Plan
from planner.session import Schedule
from trainer.averaging import Averages, Averaging
from trainer.cache_release import CacheRelease
from trainer.gradients import Noise, Shaping
from trainer.judging import Judging
from trainer.lookahead import Lookahead
from trainer.optimizers import OptimizerChoice
from trainer.rates import Rates, RateSearch
from trainer.spikes import Spikes


class UpdateHooks:
    """The part of `planner.session.Session` that is no matter of the model; each method may be called once."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._choice: Choice | None = None
        self._asked: set[str] = set()
        self._optimizing, self._rates, self._by_root = OptimizerChoice(), Rates(), False
        self._shaping, self._judging = Shaping(seed=plan.train.seed), Judging()
        self._spikes: Spikes | None = None
        self._rate_search: RateSearch | None = None
        self._cache_release: CacheRelease | None = None
        self._averaging: Callable[[list[nn.Parameter]], Averages | Lookahead] | None = None

    def use_rslora(self) -> None:
        """See the protocol."""
        self._once("use_rslora")
        self._by_root = True

    def use_loraplus(self, *, ratio: float) -> None:
        """See the protocol."""
        self._once("use_loraplus")
        self._optimizing.ratio = ratio

    def rate_for_rows(self, *, rows: int) -> None:
        """See the protocol."""
        self._once("rate_for_rows")
        self._optimizing.rows = rows

    def search_rate(self, *, steps: int, low: float, high: float, rule: str) -> None:
        """See the protocol."""
        self._once("search_rate")
        if not low < high:
            raise PlanError(self._who(), f"goes from a rate of {low:g} to one of {high:g}.", "The first is the least.")
        self._rate_search = RateSearch(steps, low, high, rule)

    def schedule_rate(self, kind: Schedule, knobs: Mapping[str, float]) -> None:
        """See the protocol."""
        self._once("schedule_rate")
        self._rates = Rates(kind, dict(knobs))

    def optimize_with(self, name: Literal["adamw", "adamw_8bit"]) -> None:
        """See the protocol."""
        self._once("optimize_with")
        self._optimizing.name = name

    def average_weights(self, *, kind: Literal["ema", "swa"], decay: float, place: Literal["gpu", "host"]) -> None:
        """See the protocol."""
        self._once("average_weights")
        how = Averaging.of(kind, decay, place)
        self._averaging = lambda trained: Averages(trained, how)

    def look_ahead(self, *, every: int, share: float, place: Literal["gpu", "host"]) -> None:
        """See the protocol."""
        self._once("look_ahead")
        self._averaging = lambda trained: Lookahead(trained, every=every, share=share, place=place)

    def stop_early(self, *, patience: int, threshold: float) -> None:
        """See the protocol."""
        self._once("stop_early")
        self._judging.stopping = (patience, threshold)

    def keep_checkpoints(self, *, count: int, disk_bytes: int) -> None:
        """See the protocol."""
        self._once("keep_checkpoints")
        self._judging.keeping = (count, disk_bytes)

    def go_back_at_spikes(self, *, sigmas: float, window: int, every: int, most: int) -> None:
        """See the protocol."""
        self._once("go_back_at_spikes")
        self._spikes = Spikes(sigmas, window, every, most)

    def release_cache(self, *, every: int, share: float) -> None:
        """See the protocol."""
        self._once("release_cache")
        self._cache_release = CacheRelease(every, share)

    def add_gradient_noise(self, *, variance: float, decay: float, relative: bool) -> None:
        """See the protocol."""
        self._once("add_gradient_noise")
        self._shaping.noise = Noise(variance, decay, relative)

    def centralize_gradients(self) -> None:
        """See the protocol."""
        self._once("centralize_gradients")
        self._shaping.centralized = True

    def clip_by_rows(self, *, ratio: float, floor: float) -> None:
        """See the protocol."""
        self._once("clip_by_rows")
        self._shaping.by_rows = (ratio, floor)

    def _once(self, what: str) -> None:
        if what in self._asked:
            raise PlanError(self._who(), f"asks for {what}, which another choice of the plan asked for already.")
        self._asked.add(what)

    def _who(self) -> str:
        return f"choice {self._choice.id}" if self._choice else "the plan's choices"
