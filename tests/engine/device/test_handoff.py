"""Memory and stream of hand-offs on a GPU, without one: what is refused, what is copied, what waits for what."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from splitfire.core.errors import ConfigError, Unavailable
from splitfire.engine.device import handoff
from splitfire.engine.device.handoff import SlotTensor, on_handoff_stream, require_shareable

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize("name", ["PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"])
@pytest.mark.parametrize(
    ("value", "key"),
    [
        ("expandable_segments:True", "expandable_segments"),
        ("max_split_size_mb:128, Expandable_Segments : true", "expandable_segments"),
        ("backend:cudaMallocAsync", "backend"),
    ],
)
def test_settings_whose_memory_no_other_process_can_map_are_refused_by_name(name: str, value: str, key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        require_shareable({name: value, "OTHER": "1"})
    assert f"{name} is {value}" in str(caught.value) and f"leave {key} out" in str(caught.value)


@pytest.mark.parametrize(
    "value", ["", "expandable_segments:False", "max_split_size_mb:128", "backend:native,expandable_segments:False"]
)
def test_other_settings_are_accepted(value: str) -> None:
    require_shareable({"PYTORCH_CUDA_ALLOC_CONF": value})
    require_shareable({})


def test_what_a_program_told_pytorch_is_seen_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._C, "_accelerator_getAllocatorSettings", lambda: "expandable_segments:True", raising=False)
    with pytest.raises(ConfigError, match="PyTorch's allocator is expandable_segments:True"):
        require_shareable({})
    monkeypatch.delattr(torch._C, "_accelerator_getAllocatorSettings")
    require_shareable({})


def test_a_front_is_written_and_read_and_nothing_beside_it() -> None:
    slot = SlotTensor(1000, CPU)
    slot.bytes.fill_(9)
    slot.write_front(memoryview(bytearray(range(100))))
    assert slot.bytes.tolist() == [*range(100), *[9] * 900]
    twin = memoryview(bytearray(1000))
    slot.read_front(twin[:101])
    assert bytes(twin) == bytes(range(100)) + b"\t" + bytes(899)
    assert (len(slot), slot.view(7).data_ptr(), len(slot.view(7))) == (1000, slot.bytes.data_ptr(), 7)


def test_a_gpu_that_is_full_refuses_a_slot_and_not_the_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_args: object, **_kwargs: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "zeros", full)
    with pytest.raises(Unavailable, match="4096 bytes"):
        SlotTensor(4096, CPU)


class RecordingStream:
    """A stream, and the notebook of all that happens."""

    def __init__(self, notes: list[str]) -> None:
        self.notes = notes

    def synchronize(self) -> None:
        self.notes.append("synchronise")


@pytest.fixture
def notes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []

    @contextmanager
    def entered(_stream: object) -> Iterator[None]:
        found.append("enter")
        yield
        found.append("leave")

    monkeypatch.setattr(handoff, "_stream", lambda _device: RecordingStream(found))
    monkeypatch.setattr(torch.cuda, "stream", entered)
    return found


def test_work_of_a_handoff_is_complete_when_it_ends_and_waits_for_no_step(notes: list[str]) -> None:
    with on_handoff_stream(GPU):
        notes.append("unpack")
    assert notes == ["enter", "unpack", "leave", "synchronise"]
    notes.clear()
    with on_handoff_stream(CPU):
        pass
    assert not notes
