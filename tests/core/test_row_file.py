"""A file of rows holds whole rows, however its last writer ended."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from splitfire.core.row_file import RowFile


@pytest.mark.parametrize("torn", [b'{"n": 3', b'{"n": 3}', b"\0\0\0\0", b"\0\0\n{}\n", b"3\n", b"[" * 10**5])
def test_what_was_not_written_whole_is_cut_off(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "rows"
    path.write_bytes(b'{"n": 1}\n{"n": 2}\n' + torn)
    file = RowFile(path)
    assert [row["n"] for row in file.rows()] == [1, 2]
    file.append(b'{"n": 4}\n')
    file.close()
    assert path.read_bytes() == b'{"n": 1}\n{"n": 2}\n{"n": 4}\n'


def test_a_disk_that_is_full_leaves_no_half_of_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = RowFile(tmp_path / "rows")
    file.append(b'{"n": 1}\n')
    real, room = os.write, [5]

    def write(descriptor: int, data: bytes) -> int:
        if not room[0]:
            raise OSError(errno.ENOSPC, "full")
        taken, room[0] = room[0], 0
        return real(descriptor, data[:taken])

    monkeypatch.setattr(os, "write", write)
    with pytest.raises(OSError, match="full"):
        file.append(b'{"n": 2}\n')
    monkeypatch.setattr(os, "write", real)
    file.append(b'{"n": 3}\n')
    file.close()
    assert file.path.read_bytes() == b'{"n": 1}\n{"n": 3}\n'
