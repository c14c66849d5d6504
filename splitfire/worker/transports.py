"""Opens the transport that the settings name, and finds the bytes of its slots. UCX is loaded only when it is used, so tcp works where
UCX is not installed.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from kvtransfer.device_slots import place_of
from kvtransfer.tcp import TcpTransport
from kvtransfer.transport import Transport
from splitfire.core.errors import ConfigError
from splitfire.core.settings import WorkerSettings
from splitfire.engine.device.handoff import SlotTensor, require_shareable


def open_transport(settings: WorkerSettings) -> Transport:
    """ConfigError, naming what is wrong, when it cannot be used here."""
    if settings.transport == "tcp":
        return TcpTransport(settings.tcp_host, settings.tcp_port, settings.tcp_advertise or None)
    try:
        from kvtransfer.ucx import UcxTransport  # noqa: PLC0415
    except ImportError as exc:
        raise ConfigError(f"transport is ucx, but UCX cannot be loaded ({exc}); install ucxx, or use --transport tcp") from exc
    devices = None if settings.ucx_devices == "all" else settings.ucx_devices
    if (
        settings.device == "cpu" or not torch.cuda.is_available()
    ):  # who asks for a GPU that is not there hears of it from loading.py
        return UcxTransport(devices)
    require_shareable()
    return UcxTransport(devices, partial(SlotTensor, device=_start_gpu()))


def _start_gpu() -> torch.device:
    """This thread gets its CUDA context: UCX, started after that, sees the GPU."""
    return torch.zeros(1, device="cuda").device


def slot_tensor(part: memoryview) -> Tensor:
    """[len(part)] uint8: a part of a slot, where its bytes lie."""
    place = place_of(part)
    if place is None:
        return torch.frombuffer(part, dtype=torch.uint8)
    assert isinstance(place.device, SlotTensor)
    return place.device.bytes[place.begin : place.begin + len(part)]
