import errno

import pytest

from gdn2.data.durable import locked, naming_full_disk, write_file, write_folder


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    write_file(tmp_path / "a", b"old")
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    with pytest.raises(OSError, match=r"no room to write .*/a \(full\)") as raised:
        write_file(tmp_path / "a", b"new")
    assert raised.value.errno == errno.ENOSPC
    assert (tmp_path / "a").read_bytes() == b"old"


def test_other_errors_are_left_alone(tmp_path):
    with pytest.raises(PermissionError), naming_full_disk(tmp_path):
        raise PermissionError(errno.EACCES, "no")


def test_a_folder_has_its_name_when_it_is_full(tmp_path):
    target = tmp_path / "new" / "folder"

    def fail(folder):
        (folder / "part").write_text("1")
        raise OSError(errno.ENOSPC, "full")

    with pytest.raises(OSError, match="full"):
        write_folder(target, fail)
    assert list(target.parent.iterdir()) == []

    def fill(folder):
        assert not target.exists()
        (folder / "deep").mkdir()
        (folder / "deep" / "file").write_text("1")

    write_folder(target, fill)
    assert [path.name for path in target.parent.iterdir()] == ["folder"]
    assert (target / "deep" / "file").read_text() == "1"


def test_a_locked_folder_belongs_to_one_process(tmp_path):
    with (
        locked(tmp_path / "run"),
        pytest.raises(RuntimeError, match=r"/run is in use by another process"),
        locked(tmp_path / "run"),
    ):
        pass
    with locked(tmp_path / "run"):
        pass
