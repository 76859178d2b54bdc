"""Layer inputs on disk: the same gradients, no byte more than planned, and whatever the disk does is said plainly."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import trainer_tiny
from streamed_step import make_streamed, make_streamed_loss
from test_coding import InFloat32
from test_trainer_packing import _together
from test_trainer_parity import _assert_same, _batch, _grouped_products_of_any_type, _stock_of, folders
from transformers import LlamaConfig

from planner.errors import PlanError
from planner.streamed_disk import PAGE, held_inputs, stored_inputs
from planner.symbols import Letters
from trainer.data import Batch, collate
from trainer.host_memory import Arena
from trainer.step import nothing
from trainer.streamed import disk_file
from trainer.streamed.arrays import TokenArray
from trainer.streamed.checkpoints import Checkpoints, Codec, Exact, Int8
from trainer.streamed.disk_file import DiskFile, finish
from trainer.streamed.shelf import shelf_on
from trainer.streamed.transfers import Transfers

__all__ = ["_grouped_products_of_any_type", "folders"]
CONFIGS = dict(trainer_tiny.CONFIGS)
FAMILIES = sorted(CONFIGS.keys() - {"gemma2", "gpt_oss"})


def at_once() -> None:
    """Nothing has to be waited for."""


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("spacing", "keep_outputs"), [(1, False), (2, False), (1, True)])
def test_gradients_are_those_of_stock(
    folders: dict[str, Path], tmp_path: Path, family: str, spacing: int, keep_outputs: bool
) -> None:
    batch, knobs = _batch(23, 9, trained=5), {"spacing": spacing, "keep_outputs": keep_outputs}
    ours = make_streamed(folders[family], batch, chunk=9, group=2, disk=tmp_path, **knobs)
    _assert_same(ours, _stock_of(folders[family], batch))


@pytest.mark.parametrize("layers", [1, 2, 8])
@pytest.mark.parametrize("spacing", [1, 3])
def test_gradients_of_a_deep_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layers: int, spacing: int) -> None:
    monkeypatch.setitem(trainer_tiny.CONFIGS, "llama", lambda: deep(layers))
    trainer_tiny.save_model("llama", tmp_path / "model", torch.float64)
    batch = _batch(31)
    for _ in range(2):
        ours = make_streamed(tmp_path / "model", batch, chunk=8, group=1, spacing=spacing, disk=tmp_path)
        _assert_same(ours, _stock_of(tmp_path / "model", batch))


def deep(layers: int) -> LlamaConfig:
    """The tiny Llama with so many layers."""
    config = CONFIGS["llama"]()
    config.num_hidden_layers = layers
    return config


def step(folder: Path, batch: Batch, disk: Path | None, codec: Codec | None = None) -> dict[str, torch.Tensor]:
    made, adapted = make_streamed_loss(folder, batch, chunk=9, group=2, disk=disk, codec=codec)
    made(batch, torch.tensor(float(batch.trained)).double(), nothing).backward()
    found = {name: p.grad for name, p in adapted.named_parameters() if p.grad is not None}
    if made.layers.checkpoints.file is not None:
        made.layers.checkpoints.file.close()
    return found


def test_coded_inputs_come_back_as_they_were_written(folders: dict[str, Path], tmp_path: Path) -> None:
    batch = _batch(40)
    kept, stored = (step(folders["llama"], batch, disk, InFloat32(Int8())) for disk in (None, tmp_path))
    assert kept and all(torch.equal(kept[name], stored[name]) for name in kept)


def test_documents_that_share_a_row(folders: dict[str, Path], tmp_path: Path) -> None:
    batch = collate(_together())
    kept, stored = (step(folders["qwen3"], batch, disk) for disk in (None, tmp_path))
    assert kept and all(torch.equal(kept[name], stored[name]) for name in kept)


def test_a_slow_disk_is_waited_for(folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batch, kept = _batch(64), step(folders["llama"], _batch(64), None)
    for name in ("_write_all", "_read_all"):
        move = getattr(disk_file, name)

        def slowly(*given: Any, move: Any = move) -> None:
            time.sleep(0.05)
            move(*given)

        monkeypatch.setattr(disk_file, name, slowly)
    stored = step(folders["llama"], batch, tmp_path)
    assert all(torch.equal(kept[name], stored[name]) for name in kept)


class Watched:
    """Counts what goes to and from disk files, by direction."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.bytes = {"write": 0, "read": 0}
        for way in self.bytes:
            monkeypatch.setattr(DiskFile, way, self._counted(way, getattr(DiskFile, way)))

    def _counted(self, way: str, move: Any) -> Any:
        def counted(file: DiskFile, values: torch.Tensor, *rest: Any) -> Any:
            self.bytes[way] += values.nbytes
            return move(file, values, *rest)

        return counted


def test_each_input_goes_once_and_comes_once_and_the_last_two_never(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, watched = _batch(32), Watched(monkeypatch)
    made, _ = make_streamed_loss(folders["llama"], batch, chunk=9, group=2, disk=tmp_path)
    with torch.no_grad():
        made(batch, torch.tensor(32.0).double(), nothing)
    assert watched.bytes == {"write": 0, "read": 0}, "an evaluation reads no layer's input twice"
    for times in (1, 2):  # the second step finds everything as the first did
        made(batch, torch.tensor(32.0).double(), nothing).backward()
        width, one_of_three = made.layers.sizes.width, 1
        assert watched.bytes == dict.fromkeys(("write", "read"), times * one_of_three * 32 * width * 8)


@pytest.mark.parametrize("tokens", [32, 77])
@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("coded", [False, True])
def test_bytes_are_those_of_the_formulas(
    folders: dict[str, Path], tmp_path: Path, tokens: int, layers: int, coded: bool
) -> None:
    arena, width = Arena(torch.device("cpu"), away=True, pinned=False), 128
    made = Checkpoints(
        arena, layers, tokens, width, torch.bfloat16, spacing=1, codec=Int8() if coded else Exact(torch.bfloat16),
        shelve=lambda places, inputs: shelf_on(tmp_path, places, inputs, mark=lambda: at_once),
    )  # fmt: skip
    bits = 64 * 8 + 32 if coded else 0
    x = Letters(B=1, S=tokens, L=layers, L_s=1, D=width, a=16, b_c=bits)
    assert (made.file.size if made.file is not None else 0) == stored_inputs(x)
    assert (made.file is None) is (layers <= 2), "no file where every input has a place in the host"
    assert arena.bytes == held_inputs(x) * (bits or 64 * 16) // 8
    if made.file is not None:
        made.file.close()


@pytest.mark.parametrize("size", [1, PAGE - 1, PAGE, PAGE + 1, 5 * PAGE + 300, 2 * disk_file.PIECE + 17])
@pytest.mark.parametrize("direct", [True, False])
def test_every_byte_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, direct: bool) -> None:
    if not direct:
        monkeypatch.setattr(disk_file, "_DIRECT", 0)
    arena = Arena(torch.device("cpu"), away=True, pinned=False)
    one, other = (arena.take(size, torch.uint8) for _ in range(2))
    one.copy_(torch.randint(256, (size,), dtype=torch.uint8))
    other.zero_()
    file = DiskFile(tmp_path, PAGE * (2 + size // PAGE) + PAGE)
    finish(file.write(one, PAGE, at_once))
    finish(file.read(other, PAGE, at_once))
    assert torch.equal(one, other)
    assert not list(tmp_path.iterdir()), "the file has no name"
    file.close()
    file.close()


def test_nothing_is_moved_before_its_time(tmp_path: Path) -> None:
    gate, file, values = threading.Event(), DiskFile(tmp_path, PAGE), torch.ones(8, dtype=torch.uint8)
    pieces = file.write(values, 0, lambda: gate.wait(10) and None)
    values.fill_(7)
    gate.set()
    finish(pieces)
    back = torch.zeros(8, dtype=torch.uint8)
    finish(file.read(back, 0, at_once))
    file.close()
    assert back.tolist() == [7] * 8


def test_what_is_still_on_its_way_is_waited_for(tmp_path: Path) -> None:
    """As on a card: copies to host memory have begun and are not done when an input is said to be written."""
    gate, late = threading.Event(), [7]
    places = [[TokenArray(Arena(torch.device("cpu"), away=True, pinned=False), 8, (4,), torch.uint8)] for _ in range(2)]

    def mark() -> Callable[[], None]:
        array, value = places[0][0], late[0]

        def done() -> None:
            assert gate.wait(10)
            array.at(0, 8).fill_(value)

        return done

    shelf = shelf_on(tmp_path, places, 3, mark=mark)
    assert shelf is not None
    shelf.begin(8, keep=True)
    for number in range(2):
        shelf.writing(number)
        shelf.written(number)
    gate.set()
    shelf.writing(2)  # into the place of the first, which is on the disk by now
    places[0][0].at(0, 8).fill_(9)
    late[0] = 0  # before the first comes back, all copies from its place are waited for, too
    shelf.reading(2)
    shelf.reading(1)
    shelf.reading(0)
    assert places[0][0].at(0, 8).unique().tolist() == [7]
    shelf.file.close()


class Noted(Transfers):
    """Notes when copies out begin and when a moment is marked."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.noted: list[str] = []

    def send(self, *given: Any) -> None:
        self.noted.append("send")
        super().send(*given)

    def mark(self) -> Callable[[], None]:
        self.noted.append("mark")
        return super().mark()


def test_an_input_is_marked_when_all_of_it_is_on_its_way(tmp_path: Path) -> None:
    noted, arena = Noted(), Arena(torch.device("cpu"), away=True, pinned=False)
    made = Checkpoints(
        arena, 4, 10, 64, torch.float64, spacing=1, codec=Exact(torch.float64),
        shelve=lambda places, inputs: shelf_on(tmp_path, places, inputs, mark=noted.mark),
    )  # fmt: skip
    made.begin(10, keep=True)
    for start, stop in ((0, 4), (4, 8), (8, 10)):
        made.write(noted, 0, start, stop, torch.ones(stop - start, 64, dtype=torch.float64))
    assert noted.noted == ["send", "send", "send", "mark"]
    assert made.file is not None
    made.file.close()


def test_it_goes_by_the_cache_where_room_is_taken_by_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = os.posix_fallocate

    def by_writing(descriptor: int, *rest: int) -> None:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        taken(descriptor, *rest)

    monkeypatch.setattr(os, "posix_fallocate", by_writing)
    file = DiskFile(tmp_path, PAGE)
    assert not file.direct
    file.close()


def test_a_full_disk_is_said_before_the_first_step(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(PlanError, match=r"disk of .* is full\. .* free") as refused:
        make_streamed_loss(folders["llama"], _batch(32), chunk=9, group=2, disk=tmp_path)
    assert "train.scratch" in refused.value.nearest
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("name", "number"), [("_write_all", errno.ENOSPC), ("_read_all", errno.EIO)])
def test_a_disk_that_fails_midway_ends_the_step_with_a_reason(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, number: int
) -> None:
    def failing(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    batch = _batch(32)
    made, _ = make_streamed_loss(folders["llama"], batch, chunk=9, group=2, disk=tmp_path)
    monkeypatch.setattr(disk_file, name, failing)
    with pytest.raises(PlanError, match="of disk for layer inputs"):
        made(batch, torch.tensor(32.0).double(), nothing).backward()
    assert made.layers.checkpoints.file is not None
    made.layers.checkpoints.file.close()


def test_a_file_system_without_nameless_files_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = os.open

    def refusing(path: Any, flags: int, *rest: Any, **more: Any) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        return opened(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", refusing)
    file = DiskFile(tmp_path / "not" / "there", PAGE)
    assert not file.direct and not list(tmp_path.iterdir())
    values = torch.arange(8, dtype=torch.uint8)
    finish(file.write(values, 0, at_once))
    back = torch.zeros_like(values)
    finish(file.read(back, 0, at_once))
    file.close()
    assert torch.equal(values, back)
