"""Files written whole and read back checked."""

import os

import pytest

from files import NoRoom, read_json, read_jsonl, remove, whole_file, write_json, write_jsonl, write_whole


def test_whole_file_keeps_the_old_content_on_failure(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"old": 1})
    with pytest.raises(RuntimeError, match="midway"), whole_file(path) as file:
        file.write("half")
        file.flush()
        assert path.read_text() != "half", "not in place before it is whole"
        raise RuntimeError("midway")
    assert path.read_text() == '{\n "old": 1\n}\n'
    with pytest.raises(TypeError):
        write_json(path, {"unwritable": object()})
    assert path.read_text() == '{\n "old": 1\n}\n'
    assert os.listdir(tmp_path) == ["a.json"]


def test_read_jsonl_ignores_a_torn_last_line(tmp_path):
    path = tmp_path / "m.jsonl"
    assert read_jsonl(path) == []
    path.write_text('{"a": 1}\n{"a": 2}\n{"a": 3, "b')
    assert read_jsonl(path) == [{"a": 1}, {"a": 2}]
    path.write_text('{"a": 1}\n{"a": 2}\n')
    assert read_jsonl(path) == [{"a": 1}, {"a": 2}]


def test_text_bytes_and_records_come_back(tmp_path):
    write_whole(tmp_path / "a.txt", "text ä")
    write_whole(tmp_path / "a.bin", b"\x00\xff")
    write_jsonl(tmp_path / "a.jsonl", ({"i": i} for i in range(3)))
    assert (tmp_path / "a.txt").read_text() == "text ä" and (tmp_path / "a.bin").read_bytes() == b"\x00\xff"
    assert read_jsonl(tmp_path / "a.jsonl", "i") == [{"i": 0}, {"i": 1}, {"i": 2}]


def test_json_without_numbers_that_are_none(tmp_path):
    write_json(tmp_path / "a.json", {"x": float("nan")})
    assert read_json(tmp_path / "a.json", "x")["x"] != 0
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "a.json", {"x": float("inf")}, allow_nan=False)
    assert "NaN" in (tmp_path / "a.json").read_text() and os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize("content, message", [("{", "Expecting"), ("[1]", "not an object with a, b"), ('{"a": 1}', "a, b")])
def test_damaged_json_is_named(tmp_path, content, message):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(ValueError, match=f"x.json is damaged .*{message}.*restore it"):
        read_json(tmp_path / "x.json", "a", "b")
    (tmp_path / "x.jsonl").write_text('{"a": 1, "b": 2}\n' + content + "\n")
    with pytest.raises(ValueError, match=f"x.jsonl, line 2, is damaged .*{message}"):
        read_jsonl(tmp_path / "x.jsonl", "a", "b")


def test_a_full_disk_says_what_is_free_and_leaves_the_old_file(tmp_path, monkeypatch):
    write_json(tmp_path / "a.json", 1)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(NoRoom, match=r"cannot write .*a.json .*No space left.* GB free .*same command again"):
        write_json(tmp_path / "a.json", 2)
    assert read_json(tmp_path / "a.json") == 1 and os.listdir(tmp_path) == ["a.json"]


def test_a_folder_is_removed_under_another_name(tmp_path, monkeypatch):
    (tmp_path / "sharded_3").mkdir()
    (tmp_path / "sharded_3/part").write_text("x")
    seen = []
    monkeypatch.setattr("files.shutil.rmtree", lambda path: seen.append((path.name, (tmp_path / "sharded_3").exists())))
    remove(tmp_path / "sharded_3")
    assert seen == [(".tmp-removed-sharded_3", False)], "half of it is never taken for it"
    remove(tmp_path / "nothing")
