"""What a process sees of its machine: never an error, and the same after the wire."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from splitfire.core import machine
from splitfire.core.machine import Namespaces, SharedMemory, facts_from_wire, facts_to_wire, look_around, machine_id


def test_facts_survive_the_wire() -> None:
    facts = look_around({"UCX_TLS": "tcp", "UCX_NET_DEVICES": "lo", "UCX_OTHER": "x"})
    assert facts.ucx_settings == ("UCX_TLS=tcp", "UCX_NET_DEVICES=lo")
    assert facts.num_cpus == len(os.sched_getaffinity(0))
    assert facts_from_wire(facts_to_wire(facts)) == facts


def test_a_long_setting_is_cut_and_an_empty_one_is_none() -> None:
    assert look_around({"UCX_TLS": ""}).ucx_settings == ()
    [setting] = look_around({"UCX_TLS": "x" * 1000}).ucx_settings
    assert len(setting) == machine.MAX_SETTING_CHARS


def test_the_machine_has_one_name_and_it_is_not_the_boot_id() -> None:
    assert machine_id() == machine_id()
    boot = Path("/proc/sys/kernel/random/boot_id")
    assert not boot.exists() or machine_id() not in boot.read_text()


def test_shared_memory_that_cannot_be_used_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine._shared_memory(str(tmp_path)).is_writable
    assert machine._shared_memory(str(tmp_path / "none")) == SharedMemory()

    def full(**_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.TemporaryFile", full)
    assert not machine._shared_memory(str(tmp_path)).is_writable
    assert machine._shared_memory(str(tmp_path)).num_bytes > 0


def test_namespaces_that_differ_are_named_and_unknown_ones_are_not() -> None:
    assert Namespaces(1, 2, 3).differing(Namespaces(1, 5, 6)) == ("pid", "network")
    assert Namespaces(1, 2, 3).differing(Namespaces(0, 2, 3)) == ()


def test_gpus_that_are_hidden_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    files = [Path(f"/dev/nvidia{name}") for name in ("0", "1", "ctl", "-uvm")]
    monkeypatch.setattr(Path, "glob", lambda _self, _pattern: iter(files))
    monkeypatch.setattr(os, "access", lambda _path, _mode: True)
    assert machine._num_gpus(None) == 2
    assert machine._num_gpus("1") == 1
    assert machine._num_gpus("") == machine._num_gpus("-1") == 0
