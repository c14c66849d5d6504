"""The directory: each tenant's own, whole or not there, and nothing in it that a client named."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

import pytest

from router.batches.records import FILE, Status, StoredFile, is_id, new_id
from router.batches.store import STALE_S, FileStore
from splitfire.core import limits
from splitfire.core.errors import ConfigError, InvalidInput
from tests.router.batches.house import House, line


def paths(root: Path) -> list[str]:
    return [str(path.relative_to(root)) for path in root.rglob("*")]


def test_another_tenants_file_is_not_there(tmp_path: Path) -> None:
    house = House(tmp_path)
    file = house.add_file([line("a")], "alice")
    assert house.store.file("alice", file.id) == file
    assert house.store.file("bob", file.id) is None
    assert list(house.store.files("bob", is_ascending=True)) == []
    batch = house.add_batch([line("a")], "alice")
    assert house.store.batch("bob", batch.id) is None
    assert house.store.usage("bob").num_files == 0
    assert house.store.usage("alice").num_files == 2 == house.store.usage().num_files


@pytest.mark.parametrize("name", ["..", ".", "new", "open", "a/b"])
def test_no_name_of_a_client_is_a_path(tmp_path: Path, name: str) -> None:
    house = House(tmp_path / "root")
    file = house.add_file([line("a")], name)
    assert house.store.file(name, file.id) is not None
    parts = {part for path in paths(tmp_path / "root") for part in path.split("/")}
    for part in parts - {"files", "batches", "new", "open", "record.json", "content"}:
        assert re.fullmatch(r"[0-9a-f]{32}|file-[0-9a-f]{32}", part), part
    assert [path.name for path in tmp_path.iterdir()] == ["root"]


@pytest.mark.parametrize(
    "file_id",
    [
        *("", "file-", "..", "file-../../x", "batch_" + "a" * 32),
        *("file-" + "A" * 32, "file-" + "a" * 31, "file-" + "0" * 31 + "\n"),
    ],
)
def test_what_is_no_id_is_never_looked_for(tmp_path: Path, file_id: str) -> None:
    assert not is_id(file_id, FILE)
    assert House(tmp_path).store.file("default", file_id) is None


def test_ids_sort_by_time() -> None:
    made = [new_id(FILE, now) for now in (0.001, 1.0, 1000.0, time.time(), time.time() + 1)]
    assert made == sorted(made)
    assert all(is_id(each, FILE) for each in made)


def test_nobody_else_can_read_what_is_kept(tmp_path: Path) -> None:
    house = House(tmp_path / "root")
    house.add_batch([line("a")])
    for path in (tmp_path / "root").rglob("*"):
        assert path.stat().st_mode & 0o077 == 0, path


def test_a_file_that_a_batch_reads_stays(tmp_path: Path) -> None:
    house = House(tmp_path)
    batch = house.add_batch([line("a")])
    with pytest.raises(InvalidInput) as caught:
        house.store.delete_file("default", batch.input_file_id)
    assert caught.value.reason == "file_in_use"
    free = house.add_file([line("a")])
    house.store.delete_file("default", free.id)
    assert house.store.file("default", free.id) is None
    with pytest.raises(FileNotFoundError):
        house.store.delete_file("default", free.id)


def test_files_go_when_their_time_is_over_and_leftovers_after_a_while(tmp_path: Path) -> None:
    house = House(tmp_path)
    now = int(time.time())
    old, young = house.add_file(["x"], expires_at=now - 1), house.add_file(["x"], expires_at=now + 60)
    assert house.store.file("default", old.id) is None, "at once"
    left, fresh = house.store.draft(new_id(FILE, now)), house.store.draft(new_id(FILE, now))
    for draft in (left, fresh):
        draft.write(b"half")
        draft.close()
    os.utime(left.directory, (now - STALE_S - 10,) * 2)
    assert house.store.usage().num_bytes == 10
    house.store.sweep()
    assert not left.directory.exists() and fresh.directory.exists()
    assert house.store.file("default", young.id) == young
    assert house.store.usage().num_bytes == 5, "and its bytes with it"


def test_a_file_that_is_not_whole_is_not_there(tmp_path: Path) -> None:
    house = House(tmp_path)
    draft = house.store.draft(new_id(FILE, time.time()))
    draft.write(b"half")
    assert list(house.store.files("default", is_ascending=True)) == []
    draft.discard()
    draft.discard()
    assert paths(tmp_path / "new") == []


def test_a_record_that_somebody_broke_is_as_if_it_were_not_there(tmp_path: Path) -> None:
    house = House(tmp_path)
    kept, broken = house.add_file(["x"]), house.add_file(["x"])
    (house.store._files("default") / broken.id / "record.json").write_text('{"id": 3}')
    assert [file.id for file in house.store.files("default", is_ascending=True)] == [kept.id]


def test_the_oldest_batch_that_is_over_makes_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_BATCHES", 3)
    house = House(tmp_path)
    batches = [house.add_batch([line("a")]) for _ in range(3)]
    house.store.forget_oldest("default")
    assert len(list(house.store.batches("default"))) == 3, "none is over"
    house.store.save(batches[1].model_copy(update={"status": Status.FAILED}))
    house.store.forget_oldest("default")
    assert [batch.id for batch in house.store.batches("default")] == [batches[2].id, batches[0].id]
    assert house.store.file("default", batches[1].input_file_id) is not None, "its files stay"


def test_a_directory_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="files_dir"):
        FileStore(tmp_path / "file" / "x", 1).open()
    made = StoredFile(id="x", num_bytes=1, created_at=1, filename="x", purpose="batch")
    assert StoredFile.model_validate_json(made.model_dump_json()) == made
