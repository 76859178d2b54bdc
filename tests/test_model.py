"""Models by name: the shipped ones and their counts, adapters, and every way to name a model or to miss it.

No torch and no network.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import planner.model
import planner.model_hub
from planner.errors import PlanError, PlanErrors
from planner.families import FAMILIES
from planner.model import Linear, list_models, load_model
from planner.planning import Request, make_plan

SHIPPED = [facts.id for facts in list_models()]
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


def folder_with(folder: Path, config: dict[str, Any] | str) -> Path:
    text = config if isinstance(config, str) else json.dumps(config)
    (folder / "config.json").write_text(text, encoding="utf-8")
    return folder


class TestShipped:
    def test_the_planned_models_are_there_smallest_first(self) -> None:
        assert {
            "phi-2", "llama-3.2-1b", "llama-3.1-8b", "qwen2.5-0.5b", "qwen3-1.7b", "mistral-7b-v0.3", "smollm2-135m",
            "phi-4-mini", "gemma-2-2b", "gemma-3-1b", "granite-3.1-2b", "smollm3-3b", "starcoder2-3b", "pythia-160m",
            "gpt2", "mixtral-8x7b", "qwen3-30b-a3b", "gpt-oss-20b", "llama-3.1-70b",
        } <= set(SHIPPED)  # fmt: skip
        assert {load_model(id).model_type for id in SHIPPED} == set(FAMILIES)
        counts = [facts.counted for facts in list_models()]
        assert counts == sorted(counts)

    @pytest.mark.parametrize("facts", list_models(), ids=SHIPPED)
    def test_counts_are_the_published_ones(self, facts: planner.model.ModelFacts) -> None:
        shape = load_model(facts.id)
        assert shape.parameters == facts.counted
        assert facts.counted == facts.published or facts.difference
        assert shape.native_context == facts.config_context
        assert shape.hub_id == (None if facts.hub_part else facts.hub_id) and "/" in facts.hub_id
        assert facts.licence and facts.sources

    def test_where_counts_differ_from_the_published_ones_the_difference_is_exact(self) -> None:
        extra = {
            "qwen3-0.6b": lambda shape: shape.vocab * shape.width,  # the tied head, stored a second time
            "qwen3-1.7b": lambda shape: shape.vocab * shape.width,
            "gpt2": lambda shape: shape.layers * shape.native_context**2,  # causal masks
            "llama-2-7b": lambda shape: shape.layers * shape.head_size // 2,  # rotary frequencies
            "gemma-3-4b-text": lambda shape: 416_866_032 + 2_950_272,  # the tower that sees, and its projector
        }
        differ = {facts.id: facts for facts in list_models() if facts.published != facts.counted}
        assert differ.keys() == extra.keys()
        for id, facts in differ.items():
            assert facts.published - load_model(id).parameters == extra[id](load_model(id)), id
            assert facts.difference, id

    def test_phi_2(self) -> None:
        shape = load_model("phi-2")
        assert (shape.layers, shape.width, shape.mlp_width, shape.vocab) == (32, 2560, 10240, 51200)
        assert (shape.heads, shape.kv_heads, shape.head_size, shape.rotary_width) == (32, 32, 80, 32)
        assert [linear.name for linear in shape.linears] == [
            "q_proj",
            "k_proj",
            "v_proj",
            "dense",
            "fc1",
            "fc2",
        ]
        assert all(linear.bias for linear in shape.linears)
        assert shape.parallel_block and not shape.gated_mlp and shape.head_bias and not shape.tied_head
        assert (shape.norm, shape.norms_per_layer, shape.norm_parameters_per_layer) == ("layernorm", 1, 5120)
        assert (shape.residual_dropout, shape.activation, shape.config_dtype) == (0.1, "gelu_new", "float16")
        assert shape.linear_parameters_per_layer == 4 * 2560**2 + 2 * 2560 * 10240
        assert shape.largest_linear == 2560 * 10240
        # 33 LayerNorms of two vectors; biases of 4 + 4 + 1 widths in each layer and of the head.
        assert shape.small_parameters == 33 * 2 * 2560 + 32 * 9 * 2560 + 51200 == 957_440
        assert shape.parameters == 2_779_683_840

    def test_small_facts_of_the_others(self) -> None:
        qwen2, qwen3, llama = load_model("qwen2.5-0.5b"), load_model("qwen3-1.7b"), load_model("llama-3.1-8b")
        assert [linear.name for linear in qwen2.linears if linear.bias] == ["q_proj", "k_proj", "v_proj"]
        assert qwen2.tied_head and qwen2.head_parameters == 0
        assert qwen2.sliding_window is None  # the file names one and switches it off
        assert qwen3.qk_norm and qwen3.norm_parameters_per_layer == 2 * 2048 + 2 * 128 and qwen3.norms_per_layer == 2
        assert llama.head_parameters == llama.embedding_parameters == 128256 * 4096
        assert llama.linears[1] == Linear("k_proj", 4096, 1024, False, "attention")
        assert (llama.query_width, llama.kv_width) == (4096, 1024)
        assert (llama.rope_type, llama.rope_theta) == ("llama3", 500000.0)
        assert load_model("mistral-7b-v0.3").sliding_window is None

    def test_small_facts_of_other_families(self) -> None:
        gpt_oss, gemma3, smollm3 = load_model("gpt-oss-20b"), load_model("gemma-3-1b"), load_model("smollm3-3b")
        assert (gpt_oss.quantized, gpt_oss.experts, gpt_oss.experts_per_token) == ("mxfp4", 32, 4)
        assert (gpt_oss.sliding_window, gpt_oss.sliding_layers) == (128, 12)
        assert (gpt_oss.rotary_width, gpt_oss.rotary_table_width) == (64, 32)
        assert gpt_oss.active_parameters == 4_187_440_704
        assert load_model("qwen3-30b-a3b").active_parameters == 3_353_032_704
        assert load_model("mixtral-8x7b").active_parameters == 12_879_925_248
        assert (gemma3.sliding_layers, gemma3.rotary_tables, gemma3.norms_per_layer) == (22, 2, 4)
        assert gemma3.norm_one_plus and gemma3.qk_norm and gemma3.output_norms_per_layer == 2
        assert (smollm3.rope_free_layers, smollm3.sliding_window) == (9, None)
        assert load_model("gpt2").position_embedding_parameters == 1024 * 768
        assert load_model("phi-4-mini").rotary_width == 96 and load_model("phi-4-mini").sliding_window is None
        assert load_model("pythia-160m").rotary_width == 16 and load_model("pythia-160m").parallel_block
        assert load_model("starcoder2-3b").sliding_layers == 30
        assert load_model("mistral-nemo-12b").query_width == 4096

    def test_all_of_them_can_be_planned_but_what_is_published_in_four_bits_of_its_own(self) -> None:
        shapes = {id: load_model(id) for id in SHIPPED}
        assert {id: shape.not_planned for id, shape in shapes.items()} == dict.fromkeys(SHIPPED, ())
        assert [id for id, shape in shapes.items() if shape.quantized_otherwise] == ["gpt-oss-20b"]
        with pytest.raises(PlanError, match=r"already quantised \(mxfp4\)\. Give the original 16-bit weights"):
            make_plan(Request("h200-sxm", "gpt-oss-20b"))

    @pytest.mark.parametrize("name", ["phi-2", "microsoft/phi-2"])
    def test_reading_one_model_does_not_read_the_facts_of_the_others(self, name: str, monkeypatch: Any) -> None:
        read, facts_of = [], planner.model._read_facts

        def noted(id: str) -> planner.model.ModelFacts:
            read.append(id)
            return facts_of(id)

        monkeypatch.setattr(planner.model, "_read_facts", noted)
        load_model(name)
        assert set(read) == {"phi-2"}

    def test_nothing_heavy_is_imported_for_a_shipped_model(self) -> None:
        code = (
            "import sys; from planner.model import load_model; load_model('microsoft/phi-2');"
            "print(sorted({'torch', 'transformers', 'huggingface_hub', 'gguf', 'numpy'} & set(sys.modules)))"
        )
        root = Path(planner.model.__file__).parents[1]
        done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "[]"


class TestAdapters:
    def test_published_count_for_phi_2(self) -> None:
        assert load_model("phi-2").adapter_parameters(16) == 23_592_960

    def test_targets(self) -> None:
        shape = load_model("phi-2")
        assert shape.adapter_parameters(4, ["q_proj", "v_proj"]) == 32 * 4 * 2 * (2560 + 2560)
        assert shape.adapted_width(["fc1"]) == 2560 + 10240
        assert shape.adapter_parameters(4, ["fc1", "fc1"]) == shape.adapter_parameters(4, ["fc1"])

    @given(rank=st.integers(1, 4096), name=st.sampled_from(SHIPPED), data=st.data())
    def test_linear_in_rank_and_additive_in_targets(self, rank: int, name: str, data: st.DataObject) -> None:
        shape = load_model(name)
        names = [linear.name for linear in shape.linears]
        chosen = data.draw(st.sets(st.sampled_from(names), min_size=1))
        one_by_one = sum(shape.adapter_parameters(1, [target]) for target in chosen)
        assert shape.adapter_parameters(rank, chosen) == rank * one_by_one
        assert shape.adapter_parameters(rank) == shape.adapter_parameters(rank, names)

    @pytest.mark.parametrize("rank", [0, -1, True, 1.5, "8"])
    def test_refuses_what_is_no_rank(self, rank: Any) -> None:
        with pytest.raises(PlanError, match="whole number of at least 1"):
            load_model("phi-2").adapter_parameters(rank)

    def test_refuses_unknown_targets_and_none(self) -> None:
        with pytest.raises(PlanError, match="Did you mean q_proj") as caught:
            load_model("phi-2").adapter_parameters(8, ["q_prj"])
        assert "phi-2" in str(caught.value)
        with pytest.raises(PlanError, match="none is named"):
            load_model("phi-2").adapter_parameters(8, [])


class TestNames:
    @pytest.fixture(autouse=True)
    def no_network(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(hub_id: str, nearest: str = "") -> bytes:
            raise PlanError(hub_id, "the hub was asked", nearest)

        monkeypatch.setattr(planner.model_hub, "download_config", refuse)

    @pytest.mark.parametrize("name", ["phi-2", "Phi-2", "microsoft/phi-2", "Microsoft/Phi-2"])
    def test_shipped_id_and_hub_id_need_no_network(self, name: str) -> None:
        assert load_model(name) == load_model("phi-2")

    def test_folder_and_file(self, tmp_path: Path) -> None:
        folder = folder_with(tmp_path, LLAMA)
        assert load_model(folder) == load_model(str(folder / "config.json"))
        assert load_model(folder).id == tmp_path.name and load_model(folder).hub_id is None

    @pytest.mark.parametrize(
        ("name", "hint"),
        [
            ("phi2", "Did you mean phi-2"),
            ("lama-3.1-8b", "Did you mean llama-3.1-8b"),
            ("zzzzzz", "plan models"),
            ("", "plan models"),
            ("./phi-2", "no such file or folder"),
            ("phi-2.gguf", "no such file or folder"),
            ("x" * 5000, "cannot be looked up"),
            ("a\0b", "neither a shipped model"),
            ("../../no-such-folder", "no such file or folder"),
            ("microsoft/phi2", "Did you mean microsoft/phi-2"),
            ("google/gemma-3-4b-pt", "The shipped gemma-3-4b-text is the text part"),
            ("..", "neither a config.json nor a GGUF"),
            ("meta-llama/Llama-3.2-1B-Instruct", "The shipped llama-3.2-1b has the same layers"),
        ],
    )
    def test_what_is_not_there(self, name: str, hint: str) -> None:
        with pytest.raises(PlanError) as caught:
            load_model(name)
        assert hint in str(caught.value)

    def test_a_folder_without_a_model(self, tmp_path: Path) -> None:
        with pytest.raises(PlanError, match=r"neither a config\.json nor a GGUF"):
            load_model(tmp_path)


class TestHub:
    @pytest.fixture
    def hub(self, monkeypatch: pytest.MonkeyPatch) -> Any:
        monkeypatch.setattr(planner.model_hub, "_has_address", lambda endpoint: True)
        return pytest.importorskip("huggingface_hub")

    def test_reads_the_downloaded_config(self, hub: Any, monkeypatch: Any, tmp_path: Path) -> None:
        asked = []

        def download(repo_id: str, filename: str, local_files_only: bool) -> str:
            asked.append((repo_id, filename))
            return str(folder_with(tmp_path, LLAMA) / "config.json")

        monkeypatch.setattr(hub, "hf_hub_download", download)
        shape = load_model("someone/tiny-llama")
        assert asked == [("someone/tiny-llama", "config.json")]
        assert (shape.id, shape.hub_id, shape.layers) == ("someone/tiny-llama", "someone/tiny-llama", 3)

    @pytest.mark.parametrize(
        ("failure", "told"),
        [
            ("GatedRepoError", "licence accepted"),
            ("RepositoryNotFoundError", "no such model"),
            ("LocalEntryNotFoundError", "out of reach"),
            ("OfflineModeIsEnabled", "out of reach"),
            ("EntryNotFoundError", "has no config.json"),
            ("HFValidationError", "no name the hub can have"),
            ("HfHubHTTPError", "did not answer"),
            ("ConnectionError", "did not answer"),
        ],
    )
    def test_failures_are_explained(self, hub: Any, monkeypatch: Any, failure: str, told: str) -> None:
        kind = ConnectionError if failure == "ConnectionError" else getattr(hub.errors, failure)
        error = kind.__new__(kind)  # each class wants arguments of its own; only its type matters here
        error.args = ("first line\nsecond line",)

        def download(repo_id: str, filename: str, local_files_only: bool) -> str:
            raise error

        monkeypatch.setattr(hub, "hf_hub_download", download)
        with pytest.raises(PlanError, match=told):
            load_model("someone/tiny-llama")

    @pytest.mark.parametrize("proxies", [{}, {"https": "http://proxy:3128"}])
    def test_without_network_only_the_cache_is_looked_at(
        self, hub: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, proxies: dict[str, str]
    ) -> None:
        def lookup(host: str, port: None) -> None:
            assert host == "hub.example"
            raise OSError

        def download(repo_id: str, filename: str, local_files_only: bool) -> str:
            assert local_files_only == (not proxies)
            return str(folder_with(tmp_path, LLAMA) / "config.json")

        monkeypatch.undo()
        monkeypatch.setattr(hub.constants, "ENDPOINT", "https://hub.example/hf")
        monkeypatch.setattr(planner.model_hub.socket, "getaddrinfo", lookup)
        monkeypatch.setattr(planner.model_hub, "getproxies", lambda: proxies)
        monkeypatch.setattr(hub, "hf_hub_download", download)
        assert load_model("someone/tiny-llama").layers == 3

    def test_without_huggingface_hub_the_command_is_named(self, monkeypatch: Any) -> None:
        monkeypatch.setitem(sys.modules, "huggingface_hub", None)
        with pytest.raises(PlanError, match="pip install huggingface_hub"):
            load_model("someone/tiny-llama")


class TestFacts:
    """What is wrong with a model.yaml is said to whoever adds a model."""

    GOOD = """
hub_id: someone/tiny
licence: mit
parameters: {published: 1, published_what: all, counted: 1}
context: {native: 512, config: 512}
sources: [a line]
"""

    @pytest.fixture
    def model_yaml(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
        monkeypatch.setattr(planner.model, "SHIPPED", tmp_path)
        (tmp_path / "tiny").mkdir()
        folder_with(tmp_path / "tiny", LLAMA)
        return tmp_path / "tiny" / "model.yaml"

    def test_a_new_folder_is_a_new_model(self, model_yaml: Path) -> None:
        model_yaml.write_text(self.GOOD)
        assert (load_model("tiny").id, load_model("Someone/Tiny").hub_id) == ("tiny", "someone/tiny")
        (facts,) = list_models()
        assert facts.hub_gated is None and facts.sources == ("a line",)

    def test_every_mistake_is_named(self, model_yaml: Path) -> None:
        model_yaml.write_text(self.GOOD.replace("licence: mit", "license: 7").replace("native: 512", "native: long"))
        with pytest.raises(PlanErrors) as caught:
            list_models()
        text = str(caught.value)
        assert "license: unknown field. Did you mean licence" in text
        assert "licence: is None" in text and "context.native: is 'long', not a whole number" in text

    @pytest.mark.parametrize("text", ["", "- a list", "a: [", "a: \x00"])
    def test_no_block_of_fields(self, model_yaml: Path, text: str) -> None:
        model_yaml.write_text(text)
        with pytest.raises(PlanError, match=r"model\.yaml"):
            load_model("tiny")
