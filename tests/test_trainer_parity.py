"""A training step gives the loss and gradients of stock transformers and PEFT, to the last digits of float64.

transformers' norms and routers, its written-out softmax and its loss compute in float32 whatever they are given, which
would hide what is compared here. So in these tests both sides get norms and routers that stay in float64, and the stock
side a softmax that does and the cross-entropy of its float64 logits. torch's grouped products have no float64, so here
they are the loop that transformers has for such types; the stock side goes from expert to expert.
"""

from __future__ import annotations

import warnings
from functools import cache
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from torch.nn.functional import cross_entropy, linear
from trainer_tiny import CONFIGS, VOCAB, save_model
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from planner.model import load_model as plan_shape
from planner.plan import Rope
from trainer.adapters import make_lean
from trainer.attention import register
from trainer.checkpointing import DeviceStore, Store, checkpoint_layers
from trainer.data import NOT_TRAINED, Batch, Row, collate
from trainer.host_store import HostStore
from trainer.layers import is_linear, layers_of
from trainer.loading import find_source, load_config, load_model
from trainer.rotary import go_by_batch, scale
from trainer.step import make_loss, nothing

CPU = torch.device("cpu")
LAYERS = 3
WRITTEN_OUT = {"gemma2": "blocks", "gpt_oss": "cpu"}
"""Families whose attention transformers has in written-out form alone, and the kernel that is to be like it."""


@pytest.fixture(autouse=True)
def _grouped_products_of_any_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.integrations.moe._can_use_grouped_mm", lambda *_: False)


UNSCALED = Rope()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("models")
    for family in CONFIGS:
        save_model(family, place / family, torch.float64)
    return {family: place / family for family in CONFIGS}


def _wide_norms(model: torch.nn.Module) -> None:
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):

            def forward(hidden: Tensor, module: torch.nn.Module = module) -> Tensor:
                spread = hidden.pow(2).mean(-1, keepdim=True)
                gemma = type(module).__name__.startswith("Gemma")
                weight = 1 + module.weight if gemma else module.weight
                return weight * hidden * torch.rsqrt(spread + (module.eps if gemma else module.variance_epsilon))

            module.forward = forward
        elif type(module).__name__ in ("MixtralTopKRouter", "Qwen3MoeTopKRouter"):

            def route(hidden: Tensor, module: torch.nn.Module = module) -> tuple[Tensor, Tensor, Tensor]:
                scores = linear(hidden.reshape(-1, module.hidden_dim), module.weight)
                best, experts = torch.topk(scores.softmax(-1), module.top_k, dim=-1)
                normed = getattr(module, "norm_topk_prob", True)
                return scores, best / best.sum(-1, keepdim=True) if normed else best, experts

            module.forward = route


def _kernel(family: str) -> str:
    return WRITTEN_OUT.get(family, "cpu")


def _stock_attention(folder: Path) -> str:
    return "eager" if folder.name in WRITTEN_OUT else "sdpa"


def _wide_softmax(scores: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    return torch.softmax(scores, dim)


def _adapted(model: PreTrainedModel) -> PeftModel:
    # By name: "all-linear" means the parameters of experts as well.
    names = {path.rpartition(".")[2] for path, module in layers_of(model).named_modules() if is_linear(module)}
    config = LoraConfig(r=4, lora_alpha=8, target_modules=sorted(names), lora_dropout=0.0, task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        # PEFT asks for an attribute that transformers has renamed.
        warnings.simplefilter("ignore", FutureWarning)
        adapted = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:  # B too, which PEFT starts at zero
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return adapted.train()


def _gradients(model: PeftModel) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}


@cache
def _stock(folder: Path, *lengths: int, trained: int | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """What `_stock_of` gives for rows of these lengths."""
    return _stock_of(folder, _batch(*lengths, trained=trained))


def _stock_of(
    folder: Path, batch: Batch, device: torch.device = CPU, smoothing: float = 0.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """What plain transformers and PEFT give for a batch, with transformers' own default attention."""
    config = AutoConfig.from_pretrained(folder)
    dropouts = {name: 0.0 for name in config.to_dict() if name.endswith(("dropout", "pdrop"))}
    attention = _stock_attention(folder)
    dropouts |= {"router_jitter_noise": 0.0} if "router_jitter_noise" in config.to_dict() else {}
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, attn_implementation=attention, experts_implementation="eager", **dropouts
    )
    _wide_norms(model)
    adapted, batch = _adapted(model).to(device), batch.to(device)
    with patch("torch.nn.functional.softmax", _wide_softmax):
        logits = adapted(input_ids=batch.inputs, use_cache=False).logits
    assert logits.dtype == torch.float64
    targets = batch.targets.flatten()
    loss = cross_entropy(logits.flatten(0, 1), targets, ignore_index=NOT_TRAINED, label_smoothing=smoothing)
    loss.backward()
    return loss.detach(), _gradients(adapted)


def _ours(
    folder: Path,
    batch: Batch,
    *,
    kernel: str | None,
    store: Store | None,
    rows: int | None,
    rope: Rope = UNSCALED,
    smoothing: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    source = find_source(str(folder))
    config = load_config(source)
    scale(config, rope)
    model = load_model(
        source,
        config,
        dtype=torch.float64,
        attention=register(kernel) if kernel else _stock_attention(folder),
        device=CPU,
        four_bit=None,
        seed=0,
    )
    go_by_batch(model)
    _wide_norms(model)
    adapted = _adapted(model)
    assert make_lean(adapted) == LAYERS * len(plan_shape(folder).linears)
    if store is not None:
        checkpoint_layers(layers_of(model), store)
    loss = make_loss(model, rows, smoothing)(batch, torch.tensor(float(batch.trained), dtype=torch.float64), nothing)
    loss.backward()
    return loss.detach(), _gradients(adapted)


def _assert_same(ours: tuple[Tensor, dict[str, Tensor]], stock: tuple[Tensor, dict[str, Tensor]]) -> None:
    assert abs(ours[0] / stock[0] - 1) <= 1e-10
    assert ours[1].keys() == stock[1].keys() and len(ours[1]) > 0
    for name, wanted in stock[1].items():
        assert wanted.norm() > 0, name
        error = (ours[1][name] - wanted).norm() / wanted.norm()
        assert error <= 1e-10, f"{name}: relative error {error:.1e}"


def _batch(*lengths: int, trained: int | None = None) -> Batch:
    generator = torch.Generator().manual_seed(11)
    rows = [torch.randint(VOCAB, (length + 1,), generator=generator) for length in lengths]
    return collate([Row(row, min(trained or 10**6, len(row) - 1)) for row in rows])


@pytest.mark.parametrize("family", CONFIGS)
def test_a_smoothed_step_equals_stock_step(folders: dict[str, Path], family: str) -> None:
    batch = _batch(31, 19, trained=7)
    ours = _ours(folders[family], batch, kernel=_kernel(family), store=None, rows=3, smoothing=0.2)
    _assert_same(ours, _stock_of(folders[family], batch, smoothing=0.2))


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("lengths", [(17,), (32, 32), (31, 19)], ids=str)
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 1000])
def test_step_equals_stock_step(
    folders: dict[str, Path], family: str, lengths: tuple[int, ...], checkpointed: bool, rows: int
) -> None:
    store = DeviceStore() if checkpointed else None
    ours = _ours(folders[family], _batch(*lengths), kernel=_kernel(family), store=store, rows=rows)
    _assert_same(ours, _stock(folders[family], *lengths))


@pytest.mark.parametrize("family", CONFIGS)
def test_only_the_target_is_trained(folders: dict[str, Path], family: str) -> None:
    batch = _batch(23, 9, trained=5)
    assert batch.trained == 10
    ours = _ours(folders[family], batch, kernel=_kernel(family), store=DeviceStore(), rows=4)
    _assert_same(ours, _stock(folders[family], 23, 9, trained=5))


@pytest.mark.parametrize("family", CONFIGS)
def test_layer_inputs_in_host_memory_change_nothing(folders: dict[str, Path], family: str) -> None:
    store, batch = HostStore(LAYERS, (2, 32, 64), torch.float64, CPU), _batch(31, 19)
    ours = _ours(folders[family], batch, kernel=_kernel(family), store=store, rows=8)
    _assert_same(ours, _stock(folders[family], 31, 19))
    store.close()


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("rows", [None, 5])
def test_loss_is_what_transformers_returns_for_labels(folders: dict[str, Path], family: str, rows: int | None) -> None:
    """Given a row whole, transformers shifts the labels itself; here inputs and targets come shifted."""
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(VOCAB, (2, 19), generator=generator)
    model = load_model(
        find_source(str(folders[family])),
        load_config(find_source(str(folders[family]))),
        dtype=torch.float64,
        attention=_stock_attention(folders[family]),
        device=CPU,
        four_bit=None,
        seed=0,
    ).requires_grad_(False)
    batch = collate([Row(row, 18) for row in tokens])
    stock = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    ours = make_loss(model, rows)(batch, torch.tensor(72.0), nothing)  # half of a step of 72 tokens
    torch.testing.assert_close(ours.double(), stock.double() / 2, rtol=1e-6, atol=0)


@pytest.mark.parametrize("family", CONFIGS)
def test_padding_on_the_right_is_harmless(folders: dict[str, Path], family: str) -> None:
    """A batch of unequal rows has the loss and gradients of its rows, each alone, weighted by tokens."""
    options = {"kernel": _kernel(family), "store": DeviceStore(), "rows": 8}
    together = _ours(folders[family], _batch(29, 12), **options)
    generator = torch.Generator().manual_seed(11)
    loss, gradients = torch.zeros((), dtype=torch.float64), {}
    for length in (29, 12):
        alone = collate([Row(torch.randint(VOCAB, (length + 1,), generator=generator), length)])
        part, grads = _ours(folders[family], alone, **options)
        loss += part * length / 41
        for name, value in grads.items():
            gradients[name] = gradients.get(name, 0) + value * length / 41
    _assert_same(together, (loss, gradients))
