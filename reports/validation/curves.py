"""Twenty steps of plain transformers beside the streamed executor, and its gradient beside a difference quotient.

    python -m reports.validation.curves OUT [--gpu CARD] [--model NAME] [--tokens N] [--steps N]

The same random weights, adapters and batches go through both in 16 bits, a step of AdamW after each; OUT gets the loss
of every step. Then the executor runs in float32, and the gradient of one adapter weight, the largest, is held beside
(loss(w + h) - loss(w - h)) / 2h.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from planner.planning import Request, make_plan
from reports.validation.accuracy import asked_for, fill_adapters, our_step, plan_of, stock_of, stock_step, write_record
from trainer.built import BuiltRun
from trainer.data import Batch, synthetic_batch
from trainer.session import build
from trainer.step import nothing, update

LEARNING_RATE, CLIP, BATCHES = 1e-3, 1.0, 4
SHIFTS = (0.02, 0.01, 0.005)  # h: the smaller, the more of the quotient is rounding


def batches_of(built: BuiltRun, tokens: int) -> list[Batch]:
    """A few, which come again and again, so that there is something to learn in random tokens."""
    vocab = built.base.config.vocab_size
    return [synthetic_batch(1, tokens, tokens, vocab, seed, 1).to(built.device) for seed in range(BATCHES)]


def losses(gpu: str, model: str, tokens: int, steps: int) -> dict[str, Any]:
    """The loss of every step of both, and the most that they are apart."""
    plan = plan_of(gpu, model, tokens)
    built = build(plan)
    fill_adapters(built, 0)
    batches = batches_of(built, tokens)
    plain = stock_of(built, built.dtype)
    trained = [parameter for parameter in plain.parameters() if parameter.requires_grad]
    mine, theirs = (torch.optim.AdamW(each, lr=LEARNING_RATE) for each in (built.trained, trained))
    found: dict[str, list[float]] = {"stock": [], "streamed": []}
    for step in range(steps):
        batch = batches[step % BATCHES]
        found["stock"].append(stock_step(plain, batch, built.dtype)[0])
        update(theirs, None, trained, CLIP)
        found["streamed"].append(our_step(built, batch)[0])
        update(mine, None, built.trained, CLIP)
    built.close()
    apart = max(abs(ours / stock - 1) for ours, stock in zip(found["streamed"], found["stock"], strict=True))
    return {
        **found,
        "furthest_apart": apart,
        "dtype": plan.knobs("mixed_precision")["dtype"],
        "streamed_settings": dict(plan.knobs("streamed")),
    }


def difference_quotient(gpu: str, model: str, tokens: int) -> dict[str, Any]:
    """The gradient of one weight of an adapter, and what the loss really does when it is moved."""
    torch.backends.cuda.matmul.allow_tf32 = False
    request = Request(
        gpu=gpu,
        model=f"random:{model}",
        total_tokens=tokens,
        required=("streamed", "lora", "chunked_loss"),
        excluded=("mixed_precision", "nf4_weights", "checkpoint_int8", "checkpoint_nf4", "streamed_weights"),
        knobs={"lora": {"rank": 16}, "streamed": {"chunk": max(64, tokens // 4), "heads": 3, "staging": "host"}},
    )
    built = build(make_plan(request))
    fill_adapters(built, 0)
    batch = batches_of(built, tokens)[0]
    our_step(built, batch)
    largest = max(built.trained, key=lambda each: float(_gradient(each).abs().max()))
    place = int(_gradient(largest).abs().argmax())
    gradient = float(_gradient(largest).flatten()[place])
    weight = largest.data.view(-1)
    kept, divisor = float(weight[place]), torch.tensor(float(batch.trained), device=built.device)

    def at(value: float) -> float:
        weight[place] = value
        with torch.no_grad():
            return float(built.loss(batch, divisor, nothing))

    each = [{"h": h, "quotient": (at(kept + h) - at(kept - h)) / (2 * h)} for h in SHIFTS]
    built.close()
    return {
        "dtype": "float32",
        "gradient": gradient,
        "each": [one | {"off": one["quotient"] / gradient - 1} for one in each],
    }


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def main() -> int:
    """See the module's docstring."""
    asked = asked_for("loss curves and a difference quotient", tokens=2048, steps=20)
    found = {
        "what": "loss curves beside plain transformers, and the gradient beside a difference quotient",
        "model": asked.model,
        "tokens": asked.tokens,
        "curves": losses(asked.gpu, asked.model, asked.tokens, asked.steps),
        "difference": difference_quotient(asked.gpu, asked.model, asked.tokens),
    }
    write_record(asked.out, found)
    off = min(abs(one["off"]) for one in found["difference"]["each"])
    print(f"curves {found['curves']['furthest_apart']:.2e} apart, difference quotient {off:.2e} off")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
