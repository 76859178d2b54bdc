"""The header of a GGUF file: metadata and the list of tensors, read without touching a weight.

Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian. The header is
read here rather than by the ``gguf`` package because that package turns each of the tokenizer's hundred thousand
strings into arrays first, which takes seconds; the strings are stepped over here.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from planner.config_positions import ROPE_NEEDS
from planner.errors import PlanError

_SCALARS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
_STRING, _ARRAY = 8, 9
_MOST_DIMENSIONS = 4

# Tensors that hold factors of the rotary embedding; transformers computes these, they are no parameters.
_NOT_PARAMETERS = frozenset({"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"})

# GGUF names an architecture in its own way. Mistral is written as llama: same tensors, and no word of its window.
_MODEL_TYPES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "phi2": "phi"}

_REQUIRED = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "context_length": "max_position_embeddings",
}


@dataclass(frozen=True)
class GGUFHeader:
    """Metadata (arrays as the text ``array of N``) and the dimensions of each tensor, innermost first."""

    metadata: dict[str, Any]
    tensors: dict[str, tuple[int, ...]]

    @property
    def parameters(self) -> int:
        """Elements of all tensors that are parameters of the model."""
        return sum(math.prod(size) for name, size in self.tensors.items() if name not in _NOT_PARAMETERS)


def read_gguf_header(path: Path) -> GGUFHeader:
    """Read the header of ``path``.

    Raises:
        PlanError: not a GGUF file, another version or byte order, or a header that is cut off or senseless.
    """
    try:
        if path.stat().st_size == 0:
            raise ValueError("it is empty")
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return _Cursor(content).header()
    except OSError as error:
        raise PlanError(str(path), f"cannot be read: {error.strerror or error}.") from error
    except struct.error as error:
        raise PlanError(str(path), "is not a whole GGUF file: it ends within its header.") from error
    except (ValueError, OverflowError) as error:
        raise PlanError(str(path), f"is not a whole GGUF file: {error}.") from error


def config_of_gguf(header: GGUFHeader, where: str) -> dict[str, Any]:
    """The header's sizes under the names that config.json has for them. Dropout rates are not in a GGUF file.

    Raises:
        PlanError: an architecture that is not known, a mixture of experts, one part of several, missing sizes.
    """
    metadata, tensors = header.metadata, header.tensors
    kind = metadata.get("general.architecture")
    if not isinstance(kind, str) or kind not in _MODEL_TYPES:
        known = f"Known in GGUF files: {', '.join(_MODEL_TYPES)}."
        raise PlanError(where, f"unknown architecture {kind!r}.", known)
    if metadata.get("split.count", 1) != 1:
        raise PlanError(where, "is one part of several.", "Join the parts with llama-gguf-split --merge.")
    if metadata.get(f"{kind}.expert_count", 0) != 0:
        raise PlanError(where, "is a mixture of experts; only dense models are known.")

    lacking = [f"{kind}.{key}" for key in _REQUIRED if f"{kind}.{key}" not in metadata]
    embedding = tensors.get("token_embd.weight", ())
    if len(embedding) != 2:
        lacking.append("the tensor token_embd.weight")
    if lacking:
        raise PlanError(where, f"lacks {', '.join(lacking)}.")

    config = {name: metadata[f"{kind}.{key}"] for key, name in _REQUIRED.items()}
    config |= {
        "model_type": _MODEL_TYPES[kind],
        "vocab_size": embedding[1],
        "num_key_value_heads": metadata.get(f"{kind}.attention.head_count_kv", config["num_attention_heads"]),
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in tensors,
        "quantization_config": {"quant_method": "gguf"},
    }
    width, heads = config["hidden_size"], config["num_attention_heads"]
    head_size = metadata.get(f"{kind}.attention.key_length", width // heads if _divides(heads, width) else None)
    if head_size is not None:
        config["head_dim"] = head_size
    rotary = metadata.get(f"{kind}.rope.dimension_count")
    if kind == "phi2" and isinstance(rotary, int) and isinstance(head_size, int) and 0 < rotary < head_size:
        # Half a dimension more than asked for, so that the product with the head size never rounds below it.
        config["partial_rotary_factor"] = (rotary + 0.5) / head_size
    if f"{kind}.rope.freq_base" in metadata:
        config["rope_theta"] = metadata[f"{kind}.rope.freq_base"]
    scaling = metadata.get(f"{kind}.rope.scaling.type")
    if scaling in ("linear", "yarn"):
        config["rope_scaling"] = {"rope_type": scaling, "factor": metadata.get(f"{kind}.rope.scaling.factor")}
    elif "rope_freqs.weight" in tensors:
        # Llama 3's scaling. Its factors were worked into that tensor, and no shape depends on them.
        config["rope_scaling"] = {"rope_type": "llama3", **dict.fromkeys(ROPE_NEEDS["llama3"])}
    return config


def _divides(heads: object, width: object) -> bool:
    return isinstance(heads, int) and isinstance(width, int) and heads > 0 and width % heads == 0


class _Cursor:
    """Walks through the header. struct.error tells of an end that comes too early, ValueError of nonsense."""

    def __init__(self, content: mmap.mmap) -> None:
        self.content, self.position = content, 0

    def header(self) -> GGUFHeader:
        if self.content[:4] != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        self.position = 4
        version = self._number("<I")
        if version not in (2, 3):
            raise ValueError(f"its version is {version}; little-endian 2 and 3 are known")
        tensor_count, pair_count = self._number("<Q"), self._number("<Q")
        metadata: dict[str, Any] = {}
        for _ in range(pair_count):
            key = self._text()
            metadata[key] = self._value(self._number("<I"))
        tensors: dict[str, tuple[int, ...]] = {}
        for _ in range(tensor_count):
            name = self._text()
            dimensions = self._number("<I")
            if not 1 <= dimensions <= _MOST_DIMENSIONS:
                raise ValueError(f"tensor {name!r} has {dimensions} dimensions")
            tensors[name] = tuple(self._number("<Q") for _ in range(dimensions))
            self._step(4 + 8)  # its number type and where its weights lie
        return GGUFHeader(metadata, tensors)

    def _number(self, form: str) -> Any:
        (value,) = struct.unpack_from(form, self.content, self.position)
        self.position += struct.calcsize(form)
        return value

    def _step(self, size: int) -> None:
        if size > len(self.content) - self.position:
            raise ValueError("it ends within its header")
        self.position += size

    def _text(self) -> str:
        size = self._number("<Q")
        start = self.position
        self._step(size)
        return self.content[start : self.position].decode("utf-8", errors="replace")

    def _value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self._number(_SCALARS[kind])
        if kind == _STRING:
            return self._text()
        if kind != _ARRAY:
            raise ValueError(f"it has a value of the unknown type {kind}")
        inner, count = self._number("<I"), self._number("<Q")
        if inner in _SCALARS:
            self._step(count * struct.calcsize(_SCALARS[inner]))
        elif inner == _STRING:
            for _ in range(count):
                self._step(self._number("<Q"))
        else:
            raise ValueError(f"it has an array of the type {inner}")
        return f"array of {count}"
