"""Workers whose slots lie on a GPU, played by memory that only a tensor reaches: from settings to slots, and whole hand-offs."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from kvtransfer.device_slots import place_of
from kvtransfer.transport import SlotMemory
from kvtransfer.ucx import UcxTransport
from splitfire.core.errors import ConfigError
from splitfire.core.flags import parse_settings
from splitfire.core.settings import WorkerSettings
from splitfire.engine.device.handoff import SlotTensor
from splitfire.worker import transports
from splitfire.worker.transports import open_transport, slot_tensor
from tests import rig as rig_module
from tests.checkpoints import VOCAB, family_configs, save_checkpoint
from tests.engines import load_model, make_engine
from tests.rig import Rig, play, until

CPU = torch.device("cpu")
POISON = 0xEE
FRONT = 4096  # bytes of a twin that a transport may have written


class OpenSlotTensor(SlotTensor):
    """UCX takes no torch tensor that is not on a GPU."""

    def view(self, num_bytes: int) -> Any:
        return self.bytes[:num_bytes].numpy()


class DeviceHub:
    """In place of tests.rig's: real UCX, slots on the device, twins that are poisoned beyond their front."""

    def __init__(self) -> None:
        self.twins: list[memoryview] = []

    def create(self) -> UcxTransport:
        transport = UcxTransport("lo", partial(OpenSlotTensor, device=CPU))
        allocate = transport.allocate

        def poisoned(num_bytes: int) -> SlotMemory:
            memory = allocate(num_bytes)
            memory.buffer[FRONT:] = bytes([POISON]) * (num_bytes - FRONT)
            self.twins.append(memory.buffer)
            return memory

        transport.allocate = poisoned  # type: ignore[method-assign]
        return transport


@pytest.mark.parametrize("dtypes", [("fp32", "fp32"), ("bf16", "int8")], ids=str)
def test_a_handoff_between_devices_is_one_between_hosts(
    dtypes: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same tokens as by host memory; no block passes by the twins."""
    save_checkpoint(family_configs()["llama"], tmp_path)
    model = load_model(tmp_path)
    prompts = [[(7 * i + j) % VOCAB for j in range(length)] for i, length in enumerate((1, 32, 33, 150))]

    def tokens() -> list[list[int]]:
        found: list[list[int]] = []

        async def scene() -> None:
            here, there = (make_engine(model, dtype=dtype, block_size=16, chunk_tokens=48) for dtype in dtypes)
            rig = Rig(here, there)
            answers = [rig.ask(prompt, 8) for prompt in prompts]
            await until(lambda: all(answer.end for answer in answers))
            found.extend(answer.ids() for answer in answers)
            await rig.settle()
            rig.close()

        play(scene())
        return found

    by_host = tokens()
    hub = DeviceHub()
    monkeypatch.setattr(rig_module, "Hub", lambda: hub)
    assert tokens() == by_host
    assert hub.twins
    for twin in hub.twins:
        assert set(twin[FRONT:]) == {POISON}


def settings_of(*flags: str) -> WorkerSettings:
    return parse_settings(WorkerSettings, ["--model=builtin", *flags], prog="test")


def test_a_worker_on_a_gpu_has_its_slots_there_and_others_in_host_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(transports, "_start_gpu", lambda: CPU)
    on_gpu, on_host, by_tcp = (
        open_transport(settings_of(*f)) for f in (["--device=cuda"], [], ["--device=cuda", "--transport=tcp"])
    )
    slot = on_gpu.allocate(1 << 14).buffer
    place = place_of(slot)
    assert place is not None and isinstance(place.device, SlotTensor)
    slot_tensor(slot[100:200]).fill_(7)
    assert place.device.bytes.sum() == 700 and place.device.bytes[100:200].eq(7).all()
    assert bytes(slot) == bytes(1 << 14), "the twin has no part in it"
    for transport in (on_host, by_tcp):
        host = transport.allocate(1 << 14).buffer
        slot_tensor(host[100:200]).fill_(7)
        assert bytes(host) == bytes(100) + bytes([7]) * 100 + bytes((1 << 14) - 200)
    for transport in (on_gpu, on_host, by_tcp):
        transport.close()


def test_gpu_memory_that_cannot_be_shared_is_refused_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(transports, "_start_gpu", lambda: pytest.fail("the GPU was started"))
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    with pytest.raises(ConfigError, match="PYTORCH_CUDA_ALLOC_CONF"):
        open_transport(settings_of("--device=cuda"))
    for flags in ([], ["--device=cuda", "--transport=tcp"]):  # whose slots are not shared
        open_transport(settings_of(*flags)).close()
