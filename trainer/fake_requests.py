"""What a run asks the card's allocator for, request by request: loading, a step, an evaluation, another step.

And what `plan generate` asks for to read a prompt (``reading``). Both are what runs on a card, on tensors that hold no
data (``trainer.fake_step``), in the order in which tensors are made and die; ``trainer.allocator`` tells what they
would reserve. Approximate: copies on streams of their own are taken to be on the one stream, where they are free as
soon as nothing refers to them; what an attention kernel takes for itself is taken to be one request; few rows, which
bitsandbytes may multiply by a four-bit matrix as it is, are taken to be multiplied by one that is made wide.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from planner.calibration import calibration
from planner.generating import Generation
from planner.ledger import Phase
from planner.plan import Plan
from trainer import session
from trainer.allocator import EMPTY
from trainer.counting import TensorBytes
from trainer.data import synthetic_batch
from trainer.fake_step import make_state, nothing_real
from trainer.generating import GeneratingSession, read_into
from trainer.key_values import make_cache
from trainer.probing import PROBED

PRODUCTS = {"gemm_4bit", "mm", "addmm", "bmm", "baddbmm", "addmm_", "_grouped_mm"}
"""Ops that cuBLAS computes; the first of a thread takes its workspace, which stays."""

SCALES = 7
"""Where `gemm_4bit` has the scales in 8 bits, among what it is given."""


class Requests(TensorBytes):
    """While active, notes what is asked for and given back.

    Args:
        workspace: bytes of cuBLAS for each thread; ``inside``: of an attention kernel's backward pass.

    Attributes:
        events: as ``trainer.allocator.replayed`` takes them.
    """

    def __init__(self, workspace: int, inside: int) -> None:
        self.events: list[tuple[int, int]] = []
        self._workspace, self._inside = workspace, inside
        self._count, self._threads, self._elsewhere = 0, set[str](), False
        self.threaded = True
        super().__init__()

    @contextmanager
    def elsewhere(self, away: bool) -> Iterator[None]:
        """Meanwhile what is made does not lie on the card."""
        self._elsewhere = away
        try:
            yield
        finally:
            self._elsewhere = False

    def empty_cache(self) -> None:
        """Unused pages are given back."""
        self.events.append(EMPTY)

    def _made(self, size: int) -> int:
        super()._made(size)
        return 0 if self._elsewhere or not size else self._asked(size)

    def _gone(self, name: int, size: int) -> None:
        super()._gone(name, size)
        if name:
            self.events.append((name, -1))

    def _asked(self, size: int) -> int:
        self._count += 1
        self.events.append((self._count, size))
        return self._count

    def _passing(self, size: int) -> None:
        self.events.append((self._asked(size), -1))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in PRODUCTS and self.phase != "start":
            # Autograd computes whole layers in a thread of its own.
            thread = Phase.BACKWARD if self.threaded and self.phase == Phase.BACKWARD else Phase.FORWARD
            if thread not in self._threads:
                self._threads.add(thread)
                self._asked(self._workspace)
        passing: list[int] = []
        if name == "gemm_4bit":  # on a card the matrix is made first, in the type of the rows
            rows, _, shape, _, block = args[:5]
            elements = shape[0] * shape[1]
            if len(args) > SCALES and args[SCALES] is not None:
                # Its scales before it, as they were quantised and as they are shifted.
                passing += [self._asked(4 * elements // block), self._asked(4 * elements // block)]
            passing.append(self._asked(elements * rows.element_size()))
        made = super().__torch_dispatch__(func, types, args, kwargs)
        self.events += [(each, -1) for each in passing]
        if self._inside and "attention" in name and "backward" in name:
            self._passing(self._inside)
        return made


def requests(plan: Plan) -> list[tuple[int, int]]:
    """Everything that a plan's run asks for, in order: ``(name, size)`` takes, ``(name, -1)`` gives back.

    Layers that run one by one are taken two of; the second step is left out there, as it is like the first.
    """
    capability = plan.gpu.compute_capability
    major, minor = map(int, (capability or "0.0").split("."))
    inside = max(terms.get("attention/workspace", 0) for terms in plan.memory.gpu.phases.values())
    asked = Requests(calibration().workspace_bytes((major, minor) if capability else None), inside)

    with nothing_real(asked.elsewhere), asked:
        built = session.build(plan)
        asked.empty_cache()
        asked.threaded = built.streamed is None
        vocab = built.base.config.vocab_size
        batch = synthetic_batch(plan.train.batch, plan.total_tokens, plan.target, vocab, 0, built.most_documents)
        make_state(built)

        def step() -> None:
            total, divisor = torch.zeros(()), torch.tensor(float(batch.trained))
            for _ in range(min(2, plan.train.accumulation)):
                asked.mark(Phase.FORWARD)
                loss = built.loss(batch, divisor, asked.mark)
                asked.mark(Phase.BACKWARD)
                loss.backward()
                total += loss.detach()
                del loss
            asked.mark(Phase.OPTIMIZER)
            torch.nn.utils.clip_grad_norm_(built.trained, plan.train.max_grad_norm)

        def evaluation() -> None:
            with torch.no_grad():
                asked.mark(Phase.EVALUATE)
                built.loss(batch, torch.ones(()), asked.mark)

        with built.first_layers(PROBED):
            step()
            evaluation()
            asked.empty_cache()
            if built.streamed is None:
                evaluation()
                step()
        events = list(asked.events)
    return events


def reading(plan: Plan, found: Generation) -> list[tuple[int, int]]:
    """What is asked for to load a plan's model and to read a prompt into a cache on the card, in the same form.

    Args:
        found: with the cache on the card, as it is or in eight bits.
    """
    assert found.keeping != "host", "copies to and from the host are made in a stream that a CPU does not have"
    capability = tuple(map(int, (plan.gpu.compute_capability or "0.0").split(".")))
    asked = Requests(calibration().workspace_bytes(capability), 0)
    with nothing_real(asked.elsewhere), asked:
        session = GeneratingSession(plan)
        session.apply_choices()
        adapted, _, _ = session.adapted_model()
        model: Any = adapted.get_base_model()
        model.eval()
        asked.empty_cache()
        asked.mark(Phase.EVALUATE)
        ids = torch.zeros(1, found.prompt, dtype=torch.long)
        cache, _ = make_cache(model, found.keeping, found.prompt + found.new, found.chunk)
        read_into(cache, model, ids, found.chunk, lambda _: None)
        events = list(asked.events)
    return events
