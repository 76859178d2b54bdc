"""Model and tokenizer from a folder, a GGUF file, the hub, or random weights of a model's shape; LoRA on top.

Only safetensors and GGUF are read, and no code out of a model repository is ever run.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from planner.errors import PlanError
from planner.model import shipped_folder
from planner.model_hub import HUB_ID
from planner.optimizations.adapters.lora import alpha_of
from planner.plan_facts import RANDOM
from trainer.adapters import make_lean, trainable_to_float32
from trainer.data import Tokenise
from trainer.four_bit import FourBit, Shelf, mark_as_four_bit, quantise_linears
from trainer.layers import is_linear, layers_of
from trainer.random_weights import random_model

EXPERTS = "grouped_mm"
"""How transformers computes experts: a row for each that a token takes, so memory knows nothing of the routing."""

_DROPOUT = re.compile(r"dropout|pdrop$")
_LOADING = (OSError, ValueError, KeyError, TypeError, ImportError, SafetensorError, RuntimeError)


@dataclass(frozen=True)
class Source:
    """Where a model comes from: the folder or hub id, and the GGUF file in it if it is one."""

    asked: str
    place: str
    gguf: str | None = None
    random: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """Arguments that every ``from_pretrained`` gets."""
        return {"trust_remote_code": False} | ({"gguf_file": self.gguf} if self.gguf else {})


def find_source(source: str) -> Source:
    """Tell what kind of source it is.

    Raises:
        PlanError: there is nothing to load there, more than one thing, or only pickled weights.
    """
    if source.startswith(RANDOM):
        place = source.removeprefix(RANDOM)
        return Source(source, str(shipped_folder(place) or place), random=True)
    path = Path(source)
    asked = f"model {source}"
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise PlanError(asked, "is a file, but no GGUF file.", "Name the folder that holds config.json.")
        return Source(source, str(path.parent), path.name)
    if not path.is_dir():
        if HUB_ID.fullmatch(source):
            return Source(source, source)
        raise PlanError(asked, "is neither a folder, nor a GGUF file, nor a hub id (org/name).")
    ggufs = sorted(file.name for file in path.iterdir() if file.suffix.lower() == ".gguf")
    if any(path.glob("*.safetensors")):
        return Source(source, str(path))
    if len(ggufs) == 1:
        return Source(source, str(path), ggufs[0])
    if ggufs:
        raise PlanError(asked, f"holds {len(ggufs)} GGUF files: {', '.join(ggufs)}.", "Name one of them.")
    if any(path.glob("*.bin")):
        why = "holds pickled weights (.bin), which can run code when they are read, and no safetensors."
        raise PlanError(asked, why, "Convert them with safetensors' own converter, or take a revision that has them.")
    nearest = f"{RANDOM}{source} trains random weights of its shape." if (path / "config.json").is_file() else ""
    raise PlanError(asked, "holds no weights (*.safetensors or one *.gguf).", nearest)


def load_tokenizer(source: Source) -> Any:
    """The tokenizer; None for random weights whose folder has none.

    Raises:
        PlanError: there is none, or it cannot be read.
    """
    if source.random and not any(Path(source.place).glob("tokenizer*")):
        return None
    try:
        return AutoTokenizer.from_pretrained(source.place, **source.options)
    except _LOADING as error:
        raise _unreadable(source, "its tokenizer", error) from error


def tokenise_bytes(texts: Sequence[str]) -> list[list[int]]:
    """UTF-8 bytes for tokens, where random weights have no tokenizer."""
    return [list(text.encode("utf-8")) for text in texts]


def load_config(source: Source) -> PretrainedConfig:
    """The model's config as it is trained with: see `for_training`."""
    return for_training(read_config(source))


def for_training(config: PretrainedConfig) -> PretrainedConfig:
    """The same config, without cache, with every dropout at zero, and experts computed in one named way.

    Recomputing a layer has to give the same values, and dropout would not.
    """
    config = copy.deepcopy(config)
    for name, value in config.to_dict().items():
        if _DROPOUT.search(name) and isinstance(value, int | float):
            setattr(config, name, 0.0)
    config.use_cache = False
    if getattr(config, "num_experts_per_tok", None):
        config._experts_implementation = EXPERTS
        config.router_jitter_noise = 0.0  # Mixtral's own kind of dropout
    return config


def read_config(source: Source) -> PretrainedConfig:
    """The model's config as it comes.

    Raises:
        PlanError: it cannot be read, needs remote code, is quantised already, or has pickled weights.
    """
    try:
        raw, _ = PretrainedConfig.get_config_dict(source.place, **source.options)
        kind = raw.get("model_type")
        if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            code = "; its own code (auto_map) is refused" if raw.get("auto_map") else ""
            why = f"transformers has no causal language model of type {kind!r}{code}."
            raise PlanError(f"model {source.asked}", why)
        config = AutoConfig.from_pretrained(source.place, **source.options)
    except PlanError:
        raise
    except _LOADING as error:
        raise _unreadable(source, "its config", error) from error
    quantised = getattr(config, "quantization_config", None)
    if quantised and not source.gguf:
        method = quantised.get("quant_method", "?") if isinstance(quantised, dict) else "?"
        why = f"its weights are quantised already ({method})."
        raise PlanError(f"model {source.asked}", why, "Take the model's 16-bit weights; NF4 is made while loading.")
    return config


def load_model(
    source: Source,
    config: PretrainedConfig,
    *,
    dtype: torch.dtype,
    attention: str,
    device: torch.device,
    four_bit: FourBit | None,
    seed: int,
    put_away: Callable[[nn.Module], None] | None = None,
) -> PreTrainedModel:
    """The base model on the device, frozen weights in ``dtype`` or NF4, attention by its registered name.

    Args:
        put_away: gets every layer as soon as it is on the device, before the next one is, and takes its matrices off
            it; so a model larger than the device can be loaded.

    Raises:
        PlanError: the weights cannot be read, or some are missing.
    """
    if source.random:
        return random_model(
            config,
            dtype=dtype,
            attention=attention,
            device=device,
            four_bit=four_bit,
            seed=seed,
            name=source.place,
            put_away=put_away,
        )
    at_once = four_bit is None and put_away is None  # else layer by layer
    options: dict[str, Any] = {
        **source.options,
        "config": config,
        # As it is in the files it need not be copied: they are mapped, and take no memory of the process.
        "dtype": dtype if at_once or source.gguf else "auto",
        "attn_implementation": attention,
        "use_safetensors": True,
        "output_loading_info": True,
    }
    if source.gguf:
        # Where the package kernels is installed, transformers would keep the file's own blocks otherwise.
        options["quantization_config"] = GgufConfig(dequantize=True)
    if source.gguf is None and device.type == "cuda" and at_once:
        options["device_map"] = {"": device.index or 0}
    logging.disable_progress_bar()
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(source.place, **options)
    except torch.OutOfMemoryError:
        raise
    except _LOADING as error:
        raise _unreadable(source, "its weights", error) from error
    model, info = loaded
    wrong = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
    if wrong:
        why = f"{len(wrong)} of its weights are missing or of another shape, such as {wrong[0]}."
        raise PlanError(f"model {source.asked}", why, "Fetch the files again; nothing is trained on made-up weights.")
    if source.gguf:
        # The weights are plain tensors now, so nothing may take the model for a quantised one.
        model.hf_quantizer = None
        for holder in (model.config, model):
            for name in ("quantization_config", "is_quantized", "quantization_method"):
                if name in vars(holder):
                    delattr(holder, name)
    shelf = Shelf.of(model, device) if four_bit is not None and put_away is None else None
    for layer in layers_of(model):
        if four_bit is not None:
            quantise_linears(layer, four_bit, dtype, device, shelf)
        if put_away is not None:
            _move(layer, device, dtype)
            put_away(layer)
    if four_bit is not None:
        mark_as_four_bit(model)
    if at_once:
        return model.to(device)
    _move(model, device, dtype)
    return model


def _move(module: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Parameters to a device and a dtype, buffers to the device alone: rotary tables stay in float32."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(device, dtype if parameter.is_floating_point() else None)
    for buffer in module.buffers():
        buffer.data = buffer.data.to(device)


def add_adapters(model: PreTrainedModel, *, rank: int, alpha: int, seed: int, by_root: bool = False) -> PeftModel:
    """LoRA in float32 on every linear of every layer; the same seed gives the same adapters.

    Args:
        alpha: see `planner.optimizations.adapters.lora.alpha_of`.
        by_root: whether the adapters are scaled by alpha over the root of their rank.
    """
    linears = {path: module for path, module in layers_of(model).named_modules() if is_linear(module)}
    names = {path.rpartition(".")[2] for path in linears}
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha_of(alpha, rank, by_root=by_root),
        use_rslora=by_root,
        target_modules=sorted(names),
        lora_dropout=0.0,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in linears.values()),
        bias="none",
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        # PEFT asks for an attribute that transformers has renamed.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
        adapted = get_peft_model(model, config)
    assert isinstance(adapted, PeftModel)
    trainable_to_float32(adapted)
    make_lean(adapted)
    return adapted.train()


def _unreadable(source: Source, what: str, error: Exception) -> PlanError:
    """What transformers said, in one line."""
    lines = str(error).strip().splitlines()
    told = lines[0].rstrip(". ") if lines else type(error).__name__
    hub = source.gguf is None and not Path(source.place).is_dir()
    nearest = "A folder with the model's files works without network." if hub else ""
    return PlanError(f"model {source.asked}", f"{what} cannot be read: {told}.", nearest)


def tokenise_with(tokenizer: Any) -> Tokenise:
    """Texts to token ids with nothing added, and no control token recognised inside a text."""

    def tokenise(texts: Any) -> list[list[int]]:
        encoded = tokenizer(
            list(texts),
            add_special_tokens=False,
            split_special_tokens=True,  # a text may not smuggle control tokens in
            return_attention_mask=False,
            verbose=False,
        )
        return list(encoded["input_ids"])

    return tokenise
