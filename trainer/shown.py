"""What is evaluated, saved and merged of a run: its adapters, or what is kept over the steps in their place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from trainer.built import BuiltRun


@contextmanager
def shown_as_saved(built: BuiltRun) -> Iterator[None]:
    """Meanwhile the adapters are what would be saved now; then they are back, whatever happens."""
    if built.averages is None:
        yield
        return
    # In host memory: on the card there may be no room for them, and adapters half of one kind would be trained on.
    adapters = [parameter.detach().to("cpu", copy=True) for parameter in built.trained]
    try:
        built.averages.show()
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(built.trained, adapters, strict=True):
                parameter.copy_(value)


def put_averages(built: BuiltRun) -> None:
    """From here on the adapters are their averages, or the slow ones, where any are kept: saved, evaluated, merged."""
    if built.averages is not None:
        built.averages.put()
