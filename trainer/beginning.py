"""What is known of a run when its first step begins or it goes on, which is stored with it; and where it is."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch.optim.lr_scheduler import LambdaLR

from trainer.rates import RateFound
from trainer.saving import Saved
from trainer.step import Evaluation


@dataclass
class Place:
    """Where training is.

    Attributes:
        step: steps that are done; ``skips``: the last ones, all without an update.
        schedule: of the learning rate; None until training begins, with what was stored of it put back.
        changing: an update is under way, so that nothing can be said of the adapters but by that step's end.
    """

    step: int = 0
    skips: int = 0
    schedule: LambdaLR | None = None
    changing: bool = False


@dataclass(frozen=True)
class Beginning:
    """What is known of a run when its first step begins.

    Attributes:
        terms, probe_seconds: see `probe`.
        before: the held-out rows; None without any.
        resumed: where the run was gone on from.
        replanned: after which steps it had too little memory and went on by a smaller plan, and why.
        rate: what a range test of the learning rate gave; None where there was none.
    """

    terms: dict[str, int]
    probe_seconds: float
    before: Evaluation | None
    resumed: tuple[dict[str, int | None], ...] = ()
    replanned: tuple[dict[str, Any], ...] = ()
    rate: RateFound | None = None

    def document(self) -> dict[str, Any]:
        """As plain data."""
        several = {"resumed": list(self.resumed), "replanned": list(self.replanned)}
        found = {"before": vars(self.before) if self.before else None, "rate": self.rate and self.rate.document()}
        return vars(self) | found | several

    @staticmethod
    def of(saved: Saved) -> Beginning:
        """What was stored."""
        about = saved.about["beginning"]
        before = Evaluation(**about["before"]) if about["before"] else None
        replanned = tuple(about.get("replanned", ()))
        resumed, rate = tuple(about["resumed"]), RateFound.of(about.get("rate"))
        return Beginning(about["terms"], about["probe_seconds"], before, resumed, replanned, rate)

    def gone_on(self, saved: Saved) -> Beginning:
        """The same, and that it was gone on from there."""
        inside = saved.inside
        place = {
            "steps": saved.step,
            "micro_batches": inside.part if inside else 0,
            "layer": inside.layer if inside else None,
        }
        return replace(self, resumed=(*self.resumed, place))
