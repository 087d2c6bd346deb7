"""Reading: every record once, every broken one listed with its position, and text as it was."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from minicpm_ref.ultraclean.documents import Document, Piece, Unread, kind_of, make_plan, read_piece

SEPARATORS = "one\u2028two\u2029three\u0085four\x0bfive\x1csix"


def read(path: Path, largest: int = 8_000_000) -> list[Document | Unread]:
    return list(read_piece(Piece(str(path), path.name, kind_of(path)), largest))


def texts(items: list[Document | Unread]) -> list[str]:
    return [item.text for item in items if isinstance(item, Document)]


def reasons(items: list[Document | Unread]) -> list[tuple[str, str]]:
    return [(item.reason, item.position) for item in items if isinstance(item, Unread)]


def jsonl(*records: Any) -> bytes:
    return b"".join(json.dumps(record, ensure_ascii=False).encode() + b"\n" for record in records)


@pytest.mark.parametrize("packed", [False, True])
def test_only_a_line_feed_ends_a_record(tmp_path: Path, packed: bool) -> None:
    raw = jsonl({"text": SEPARATORS}, {"text": "b", "id": 7}).replace(b"\n", b"\r\n") + b'{"text": "no end"}'
    path = tmp_path / ("a.jsonl.gz" if packed else "a.jsonl")
    path.write_bytes(gzip.compress(raw) if packed else raw)
    items = read(path)
    assert texts(items) == [SEPARATORS, "b", "no end"]
    assert [item.id for item in items][1] == "7"


def test_plain_text_is_handed_on_as_it_is(tmp_path: Path) -> None:
    strange = SEPARATORS + "\r\nnext\ra\u0301 中文 😀\0"
    (tmp_path / "a.txt").write_bytes(strange.encode())
    assert texts(read(tmp_path / "a.txt")) == [strange]
    (tmp_path / "empty.md").write_bytes(b"")
    assert texts(read(tmp_path / "empty.md")) == [""]
    (tmp_path / "latin.py").write_bytes("café".encode("latin-1"))
    assert reasons(read(tmp_path / "latin.py")) == [("undecodable", "")]


def test_records_that_are_none_are_listed_and_the_rest_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    good = {"text": "good", "other": None}
    wrong: list[Any] = [None, 3, ["a"], {"a": 1}]
    bad: list[Any] = [*({"text": value} for value in wrong), {"no": 1}, [1], {"text": "\ud800"}]
    path.write_bytes(jsonl(good) + b"".join(json.dumps(r).encode() + b"\n" for r in bad) + jsonl({"text": ""}, good))
    items = read(path)
    assert texts(items) == ["good", "", "good"]
    found = [reason for reason, _ in reasons(items)]
    assert found == ["text_not_a_string"] * 4 + ["no_text", "not_an_object", "not_unicode"]
    offsets = [int(position) for _, position in reasons(items)]
    assert path.read_bytes()[offsets[4] :].startswith(b'{"no": 1}'), "the position is the byte where the record begins"


def test_broken_text_in_the_middle_costs_one_record(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n{"text": "c"}\n{"id": 2')
    items = read(path)
    assert texts(items) == ["a", "c"]
    assert reasons(items) == [("undecodable", "14"), ("bad_json", "42")]
    path.write_bytes(b"\n \n\r\n")
    assert reasons(read(path)) == [("no_records", "")]


@pytest.mark.parametrize("cut", ["half", "trailer", "header"])
def test_a_cut_gzip_gives_its_whole_records_and_one_error(tmp_path: Path, cut: str) -> None:
    rows = [{"text": f"{i} {i * 7919 % 10007}"} for i in range(5000)]
    packed = gzip.compress(jsonl(*rows))
    stop = {"half": len(packed) // 2, "trailer": len(packed) - 4, "header": 6}[cut]
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(packed[:stop])
    items = read(path)
    assert [item.reason for item in items if isinstance(item, Unread)] == ["cut_off"]
    found = texts(items)
    assert found == [row["text"] for row in rows[: len(found)]]
    assert len(found) == {"half": len(found), "trailer": 5000, "header": 0}[cut]
    assert cut != "half" or 1000 < len(found) < 5000


def test_every_member_of_a_gzip_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(jsonl({"text": "a"})) + gzip.compress(jsonl({"text": "b"})))
    assert texts(read(path)) == ["a", "b"]


def test_a_long_line_is_listed_without_being_held(tmp_path: Path) -> None:
    import tracemalloc

    path = tmp_path / "a.jsonl"
    with open(path, "wb") as file:
        file.write(jsonl({"text": "a"}) + b'{"text": "')
        for _ in range(64):
            file.write(b"x" * 1_000_000)
        file.write(b'"}\n' + jsonl({"text": "c"}))
    tracemalloc.start()
    items = read(path, largest=1_000_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert texts(items) == ["a", "c"]
    assert reasons(items) == [("too_large", "14")]
    assert peak < 8_000_000


@pytest.mark.parametrize("order", [("a", "b"), ("b", "a")])
def test_parquet_of_any_string_type_in_any_order(tmp_path: Path, order: tuple[str, str]) -> None:
    import pyarrow
    from pyarrow import parquet

    columns = {
        "a": {"text": pyarrow.array(["x", None], pyarrow.string()), "meta": pyarrow.array([None, None])},
        "b": {"text": pyarrow.array(["y"], pyarrow.large_string()), "meta": pyarrow.array(["m"])},
    }
    for name, column in columns.items():
        parquet.write_table(pyarrow.table(column), tmp_path / f"{name}.parquet")
    found = {name: read(tmp_path / f"{name}.parquet") for name in order}
    assert (texts(found["a"]), texts(found["b"])) == (["x"], ["y"])
    assert reasons(found["a"]) == [("text_not_a_string", "1")]
    parquet.write_table(pyarrow.table({"text": pyarrow.array([None, None])}), tmp_path / "null.parquet")
    assert reasons(read(tmp_path / "null.parquet")) == [("text_not_a_string", "0"), ("text_not_a_string", "1")]
    parquet.write_table(pyarrow.table({"other": pyarrow.array([1])}), tmp_path / "none.parquet")
    assert reasons(read(tmp_path / "none.parquet")) == [("no_text", "0")]
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and nothing else")
    assert [reason for reason, _ in reasons(read(tmp_path / "broken.parquet"))] == ["unreadable"]


@pytest.mark.parametrize("shard_bytes", [20, 100, 1000, 10**6])
def test_pieces_cover_every_record_once(tmp_path: Path, shard_bytes: int) -> None:
    import pyarrow
    from pyarrow import parquet

    rows = [{"text": "x" * (i * 37 % 90), "id": i} for i in range(50)]
    (tmp_path / "a.jsonl").write_bytes(jsonl(*rows))
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "b.parquet", row_group_size=7)
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "object").write_bytes(b"\xff")
    plan = make_plan([tmp_path], shard_bytes)
    items = [item for shard in plan.shards for piece in shard for item in read_piece(piece)]
    assert [item.id for item in items] == [f"{tmp_path.name}/.git", *2 * [str(i) for i in range(50)]]
    assert reasons(items) == [("not_entered", "")]
    assert len(plan.shards) > 1 or shard_bytes > 1000
    assert [file["source"] for file in plan.files] == [f"{tmp_path.name}/a.jsonl", f"{tmp_path.name}/b.parquet"]


def test_inputs_must_exist_and_differ(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nothing"):
        make_plan([tmp_path / "nothing"])
    for folder in ("one", "two"):
        (tmp_path / folder / "same").mkdir(parents=True)
    with pytest.raises(ValueError, match="two inputs are called 'same'"):
        make_plan([tmp_path / "one" / "same", tmp_path / "two" / "same"])
