"""Card files: found by any name, every mistake told, nothing filled in."""

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from planner import hardware
from planner.cli import main
from planner.errors import PlanError, PlanErrors
from planner.hardware import (
    FOLDERS_VARIABLE,
    SHIPPED,
    Sourced,
    list_profiles,
    load_profile,
)
from planner.planning import Request, make_plan

MIB = 2**20
IDS = sorted(path.stem for path in SHIPPED.glob("*.yaml"))


@pytest.fixture(autouse=True)
def _only_shipped_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(FOLDERS_VARIABLE, raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def card_data(**changes: Any) -> dict[str, Any]:
    """A whole card file as data; a change to ``None`` drops the key."""
    data = yaml.safe_load((SHIPPED / "rtx2060s.yaml").read_text(encoding="utf-8"))
    data |= {"id": "mine", "name": "NVIDIA Mine", "aliases": ["own-card"]} | changes
    return {key: value for key, value in data.items() if value is not None}


def write(folder: Path, data: Any, name: str = "mine.yaml") -> Path:
    path = folder / name
    path.write_text(data if isinstance(data, str) else yaml.safe_dump(data), encoding="utf-8")
    return path


def refusal(folder: Path, data: Any) -> str:
    with pytest.raises(PlanError) as caught:
        load_profile(str(write(folder, data)))
    return str(caught.value)


@pytest.mark.parametrize("unknown", ["visible_memory", "cuda_context"])
def test_an_unknown_fact_is_never_filled_in_from_another_card(tmp_path: Path, unknown: str) -> None:
    nobody = {"value": "unknown", "why": "nobody looked at this one"}
    # Everything but the id is that of a card whose figures are known, its printed name included.
    path = write(tmp_path, card_data(name="NVIDIA GeForce RTX 2060 SUPER", **{unknown: nobody}))
    with pytest.raises(PlanError, match=f"card mine: what a plan needs is unknown: {unknown}: nobody looked"):
        make_plan(Request(gpu=str(path), model="smollm2-135m", total_tokens=1024))
    given = card_data() | {unknown: {"value": "500 MiB" if unknown == "cuda_context" else "7 GiB", "source": "mine"}}
    assert make_plan(Request(gpu=str(write(tmp_path, given)), model="smollm2-135m", total_tokens=1024)).gpu.id == "mine"


def test_a_card_of_unknown_kernels_is_not_planned_for_as_if_it_were_an_old_one(tmp_path: Path) -> None:
    nobody = {"value": "unknown", "why": "nobody looked at this one"}
    path = write(tmp_path, card_data(compute_capability=nobody))
    with pytest.raises(PlanError, match="card mine: what a plan needs is unknown: compute_capability: not in its prof"):
        make_plan(Request(gpu=str(path), model="smollm2-135m", total_tokens=1024))
    known = {"value": "600 MiB", "source": "mine"}
    amd = card_data(compute_capability={"value": "gfx1100", "source": "mine"}, vendor="AMD", cuda_context=known)
    with pytest.raises(PlanError, match=r"compute_capability: gfx1100, an AMD card, has none.* those of NVIDIA"):
        make_plan(Request(gpu=str(write(tmp_path, amd)), model="smollm2-135m", total_tokens=1024))


def test_a_limit_of_a_step_is_not_taken_to_be_met_where_no_time_is_known(tmp_path: Path) -> None:
    nobody = {"value": "unknown", "why": "nobody looked"}
    data = card_data(memory_bandwidth=nobody, pcie_bandwidth=nobody)
    data["rates"] = dict.fromkeys(data["rates"], nobody)
    asked = Request(gpu=str(write(tmp_path, data)), model="smollm2-135m", total_tokens=1024)
    plan = make_plan(asked)
    assert plan.verdict == "fits" and plan.time.step_seconds.estimate is None
    told = [choice.reason for choice in plan.choices] + [reason for lost in plan.rejected for reason in lost.reasons]
    assert any("rates that rank where" in reason for reason in told) and not any(" times as " in r for r in told)
    with pytest.raises(PlanError, match=r"--max-step-time 2.00 s: whether a step .* lacks .*rates.fp16: nobody looked"):
        make_plan(replace(asked, max_step_seconds=2.0))


# --- finding a card


@pytest.mark.parametrize(
    "name",
    ["rtx2060s", "RTX2060S", " rtx-2060-super ", "RTX 2060 Super", "NVIDIA GeForce RTX 2060 SUPER", "2060s"],
)
def test_a_card_answers_to_id_alias_and_printed_name(name: str) -> None:
    assert load_profile(name).id == "rtx2060s"


def test_an_id_opens_one_file(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []
    read = Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda path, **how: opened.append(path.name) or read(path, **how))
    load_profile("rtx4090")
    assert opened == ["rtx4090.yaml"]


def test_an_alias_reads_few_files_as_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    parsed = []
    read = hardware._read
    monkeypatch.setattr(hardware, "_read", lambda path, **how: parsed.append(path.stem) or read(path, **how))
    assert load_profile("NVIDIA GeForce RTX 4070 Ti").id == "rtx4070ti"
    assert set(parsed) == {"rtx4070ti", "rtx4070ti-super"}  # the two whose text has that name in it


def test_an_alias_that_yaml_hides_from_a_search_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = yaml.safe_dump(card_data(aliases=["plain"])).replace("plain", '"hi\\x64den"')
    write(tmp_path, text)
    monkeypatch.setenv(FOLDERS_VARIABLE, str(tmp_path))
    assert load_profile("hidden").id == "mine"


def test_an_unknown_name_is_told_the_nearest() -> None:
    with pytest.raises(PlanError, match=r"Did you mean rtx2060 or rtx2060s .*`plan gpus` lists them"):
        load_profile("rtx2060x")
    with pytest.raises(PlanError, match=r"Did you mean a100-40gb-pcie or .* or a100-80gb-sxm\?"):
        load_profile("a100")
    for nothing_like_it in ("", "voodoo"):
        with pytest.raises(PlanError, match="`plan gpus` lists them"):
            load_profile(nothing_like_it)


@pytest.mark.parametrize("other", ["NVIDIA GeForce RTX 3060 Laptop GPU", "NVIDIA H200 NVL", "RTX 5090 D"])
def test_a_card_with_a_longer_name_is_another_card(other: str) -> None:
    with pytest.raises(PlanError):
        load_profile(other)


def test_a_dropped_file_is_a_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, card_data())
    assert load_profile(str(path)).name == "NVIDIA Mine"
    with pytest.raises(PlanError):
        load_profile("mine")
    monkeypatch.setenv(FOLDERS_VARIABLE, os.pathsep.join(["", str(tmp_path)]))
    assert load_profile("mine").id == load_profile("Own Card").id == "mine"
    assert [card.id for card in list_profiles()] == sorted([*IDS, "mine"])


def test_a_folder_of_ones_own_comes_before_the_shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, card_data(id="rtx3090", name="Corrected"), "rtx3090.yaml")
    monkeypatch.setenv(FOLDERS_VARIABLE, str(tmp_path))
    assert load_profile("rtx3090").name == "Corrected"
    assert [card.name for card in list_profiles() if card.id == "rtx3090"] == ["Corrected"]


def test_a_name_of_two_cards_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, card_data(id="rtx3060-8gb", name="NVIDIA GeForce RTX 3060"), "rtx3060-8gb.yaml")
    monkeypatch.setenv(FOLDERS_VARIABLE, str(tmp_path))
    with pytest.raises(PlanError, match="rtx3060-12gb, rtx3060-8gb"):
        load_profile("NVIDIA GeForce RTX 3060")
    with pytest.raises(PlanError, match=r"rtx3080-10gb, rtx3080-12gb\. Give one of these ids"):
        load_profile("rtx3080")


def test_folders_and_files_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PlanError, match="no such file"):
        load_profile(str(tmp_path / "absent.yaml"))
    (tmp_path / "folder.yaml").mkdir()
    with pytest.raises(PlanError, match="cannot be read"):
        load_profile(str(tmp_path / "folder.yaml"))
    monkeypatch.setenv(FOLDERS_VARIABLE, str(tmp_path / "absent"))
    with pytest.raises(PlanError, match=f"{FOLDERS_VARIABLE}=.*absent: is not a folder"):
        list_profiles()


# --- mistakes in a file


@pytest.mark.parametrize(("written", "size"), [("8GB", 8 * 10**9), ("8 GiB", 2**33), (2**33, 2**33)])
def test_both_gigabytes_are_read_as_written(tmp_path: Path, written: str | int, size: int) -> None:
    path = write(tmp_path, card_data(memory={"value": written, "source": "box"}))
    assert load_profile(str(path)).memory_bytes == Sourced(size, "box")


def test_both_gigabytes_are_shown_as_what_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    visible = {"value": "7 GiB", "source": "box"}
    for name, written in (("decimal", "8GB"), ("binary", "8GiB")):
        memory = {"value": written, "source": "box"}
        write(tmp_path, card_data(id=name, aliases=[], memory=memory, visible_memory=visible), f"{name}.yaml")
    monkeypatch.setenv(FOLDERS_VARIABLE, str(tmp_path))
    assert main(["gpus"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [" 7.45 GiB " in line for line in lines if line.startswith("decimal ")] == [True]
    assert [" 8 GiB " in line for line in lines if line.startswith("binary ")] == [True]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"memory": {"value": "8G", "source": "box"}}, r"memory: 8G could be 8 GB .* or 8 GiB"),
        ({"memory": {"value": "8 GiB"}}, "memory: 8 GiB has no source"),
        ({"memory": {"value": "8 GiB", "source": "  "}}, "memory: 8 GiB has no source"),
        ({"memory": {"value": "unknown", "source": "box"}}, "memory: unknown has no reason"),
        ({"memory": "8 GiB"}, "memory: is not a sourced value"),
        ({"memory": {"value": ["8 GiB"], "source": "box"}}, "memory: the value is neither a number"),
        ({"memory": {"value": "-8 GiB", "source": "box"}}, "memory: -8 GiB is negative"),
        ({"memory": {"value": "0 GiB", "source": "box"}}, "memory: 0 GiB is no figure of a card"),
        ({"memory": {"value": "64 TiB", "source": "box"}}, "is no figure of a card. It lies between 0 and 16 TiB."),
        ({"memory": {"value": 8, "source": "box"}}, "memory: 8 without a unit is a number of bytes. Write 8GiB"),
        (
            {"memory": {"value": "8 GiB", "sorce": "box"}},
            r"memory.sorce: is not a key here. Did you mean source\?",
        ),
        ({"memory": {"value": "8 GiB", "source": "box", "basis": "guess"}}, "memory.basis: input should be"),
        ({"memory_bandwith": {"value": "1 GB/s", "source": "box"}}, r"Did you mean memory_bandwidth"),
        ({"memory_bandwidth": {"value": "448 GB", "source": "box"}}, "memory_bandwidth: 448 GB has the unit"),
        ({"memory_bandwidth": {"value": 448, "source": "box"}}, "memory_bandwidth: 448 is not a bandwidth"),
        ({"memory_bandwidth": {"value": "448e9 GB/s", "source": "box"}}, "memory_bandwidth: 448e9"),
        ({"sm_count": {"value": 34.5, "source": "box"}}, "sm_count: 34.5 is not a whole number"),
        ({"sm_count": {"value": True, "source": "box"}}, "sm_count: True is not a whole number"),
        ({"bf16": {"value": "no", "source": "box"}}, "bf16: 'no' is not true or false"),
        ({"compute_capability": {"value": "seven", "source": "box"}}, "compute_capability: 'seven' is not"),
        ({"rates": {"fp16": {"value": "28.7 TFLOP/s", "source": "box"}}}, "rates.fp32: is missing"),
        ({"tdp": None}, "tdp: is missing"),
        ({"compute_capability": {"value": "gfx", "source": "box"}}, "compute_capability: 'gfx' is not .* gfx1100"),
        ({"compute_capability": {"value": "gfx1100", "source": "box"}}, "compute_capability: is a gfx name for an AMD"),
        ({"vendor": "AMD"}, "compute_capability: is a gfx name for an AMD card, and CUDA's figure for all others"),
        ({"id": "../mine"}, "id: string should match"),
        ({"id": "cpu"}, "id: 'cpu' is kept for the machine itself"),
        ({"name": ""}, "name: string should have at least 1 character"),
        ({"aliases": [2060]}, "aliases.0: input should be a valid string"),
        ({"visible_memory": {"value": "9 GiB", "source": "box"}}, "visible_memory: 9.00 GiB is more than"),
        ({"cuda_context": {"value": "8 GiB", "source": "box"}}, "cuda_context: 8.00 GiB leaves nothing"),
    ],
)
def test_a_mistake_names_file_and_key(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    message = refusal(tmp_path, card_data(**changes))
    assert str(tmp_path / "mine.yaml") in message
    assert re.search(told, message), message


def test_a_rate_of_bf16_on_a_card_without_it_is_refused(tmp_path: Path) -> None:
    data = card_data()
    data["rates"]["bf16"] = {"value": "28.7 TFLOP/s", "source": "box"}
    assert "rates.bf16: has a value, but bf16 is false" in refusal(tmp_path, data)


def test_all_mistakes_of_a_file_come_at_once(tmp_path: Path) -> None:
    data = card_data(memory={"value": "8G"}, tdp={"value": "175", "source": "box"}, colour="green", vendor=None)
    with pytest.raises(PlanErrors) as caught:
        load_profile(str(write(tmp_path, data)))
    keys = sorted(error.asked.rpartition(" ")[2] for error in caught.value.errors)
    assert keys == ["colour", "memory", "memory", "tdp", "vendor"]  # memory: ambiguous, and without a source


def test_impossible_figures_of_a_file_come_at_once_each_by_its_name(tmp_path: Path) -> None:
    def told(value: Any) -> dict[str, Any]:
        return {"value": value, "source": "box"}

    data = card_data(
        memory=told("-8 GiB"),
        visible_memory=told("0 MiB"),
        cuda_context=told("999999 PiB"),
        memory_bandwidth=told("448 W"),
        pcie_bandwidth=told("-1 GB/s"),
        tdp=told("175 GB/s"),
        sm_count=told(0),
        compute_capability=told(-7.5),
    )
    data["rates"] |= {
        "fp32": told("0 TFLOP/s"),
        "tf32": told("8 TOPS"),
        "fp16": told("28.7 GiB"),
        "bf16": told("9e99 TFLOP/s"),
    }
    with pytest.raises(PlanErrors) as caught:
        load_profile(str(write(tmp_path, data)))
    keys = sorted(error.asked.rpartition(" ")[2] for error in caught.value.errors)
    facts = set(data) - {"id", "name", "aliases", "vendor", "architecture", "rates", "bf16", "flash_attention_2"}
    assert keys == sorted({*facts, *(f"rates.{name}" for name in data["rates"])})


def test_all_broken_files_are_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, card_data(id="one", tdp=None), "one.yaml")
    write(tmp_path, card_data(id="two"), "three.yaml")
    monkeypatch.setenv(FOLDERS_VARIABLE, str(tmp_path))
    with pytest.raises(PlanErrors) as caught:
        list_profiles()
    assert "one.yaml: tdp" in str(caught.value)
    assert "the file is named 'three'" in str(caught.value)
    assert load_profile("rtx3090").id == "rtx3090"  # another's mistake does not stop a card that is asked by id


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("id: [1, 2", "is not YAML"),
        ("id: a\nid: b", "'id' is given twice at line 2, column 1"),
        ("id: a\nmemory: {value: 8 GiB, value: 9 GiB}", "'value' is given twice"),
        ("x: !!python/object/apply:os.system [true]", "is not YAML"),
        ("x: " + "[" * 5000, "is not YAML"),
        ("x: " + "9" * 5000, "is not YAML"),
        ('!!int ""', "is not YAML"),
        ("", "does not hold the keys of a card"),
        ("- id: a", "does not hold the keys of a card"),
    ],
)
def test_what_is_no_yaml_is_refused(tmp_path: Path, text: str, told: str) -> None:
    assert told in refusal(tmp_path, text)


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_bytes(b"\xff\xfe\x00id")
    with pytest.raises(PlanError, match="is not YAML"):
        load_profile(str(tmp_path / "mine.yaml"))


def test_unknown_facts_are_named_with_their_reason(tmp_path: Path) -> None:
    nobody = {"value": "unknown", "why": "nobody measured it"}
    card = load_profile(str(write(tmp_path, card_data(cuda_context=nobody, memory_bandwidth=nobody))))
    assert card.budget_bytes() is None
    assert card.missing() == ["cuda_context: nobody measured it", "memory_bandwidth: nobody measured it"]
