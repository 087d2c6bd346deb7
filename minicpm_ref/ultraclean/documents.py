"""Documents in: folders of text or source, JSONL (plain or gzip) and Parquet, one document at a time.

The problem: a cleaner that fails on the first broken file is useless, and one that skips it in silence is worse: nobody
knows what the model has not read.
The idea: a reader yields either a `Document` or an `Unread`, which names source, position and reason. So what went in
is always what was kept plus what was rejected, and the sum can be checked.

How records are cut:
- Only the byte 0x0A (with or without 0x0D before it) ends a JSONL record. Unicode knows more line separators (U+2028,
  U+0085); they are text.
- A position is a byte offset (JSONL) or a row (Parquet). A large JSONL file is cut into ranges of bytes, and a record
  belongs to the range in which it begins, so that many workers can read one file without counting its lines.
- A record above `largest` bytes is listed as `too_large` without being held in memory: that bounds the memory of a
  reader, whatever lies in the files (one line of 200 MB, an archive that unpacks to a terabyte).
- Text is handed on as it was read. Plain text keeps its line ends.

Left out: archives (zip, tar), zstd, and web formats (WARC), whose libraries are worth having only with web data.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CHUNK = 1 << 18  # bytes read at a time
SKIPPED_FOLDERS = {".git", ".hg", ".svn", "__pycache__", "node_modules"}


@dataclass(frozen=True)
class Document:
    """A text, where it came from (file below its input), and an id: the record's own, or source and position."""

    id: str
    source: str
    text: str


@dataclass(frozen=True)
class Unread:
    """What could not be read: where (byte offset, row, or "" for a whole file), why, and in which words."""

    source: str
    position: str
    reason: str
    detail: str = ""

    @property
    def id(self) -> str:
        """Source and position, as a document's default id."""
        return f"{self.source}@{self.position}" if self.position else self.source


@dataclass(frozen=True)
class Piece:
    """Part of a file that one reader takes: bytes [start, stop) of a JSONL file, row groups of a Parquet file, or the
    whole file where `stop` is None. `kind` is text, jsonl, parquet or skipped."""

    path: str
    source: str
    kind: str
    start: int = 0
    stop: int | None = None


@dataclass(frozen=True)
class Plan:
    """The input as a list of shards, each a list of pieces, and the hash of every file. The same files give the same
    plan, whatever reads them."""

    shards: tuple[tuple[Piece, ...], ...]
    files: tuple[dict[str, Any], ...]


def kind_of(path: Path) -> str:
    """How a file is read, by its name: jsonl, parquet, or text for everything else."""
    name = path.name.lower().removesuffix(".gz")
    if name.endswith((".jsonl", ".ndjson")):
        return "jsonl"
    return "parquet" if name.endswith(".parquet") else "text"


def find_files(inputs: Sequence[str | Path]) -> Iterator[tuple[str, Path, str]]:
    """(source, path, kind) of every file of the inputs, in the order of their names; a folder that is not entered comes
    as kind "skipped".

    A source is the input's name and the path below it. Raises FileNotFoundError for a missing input, ValueError for two
    inputs of one name, whose sources could not be told apart.
    """
    roots = [Path(one).resolve() for one in inputs]
    for root in roots:
        if not root.exists():
            raise FileNotFoundError(f"input {root}: no such file or folder")
        if [other.name for other in roots].count(root.name) > 1:
            raise ValueError(f"two inputs are called {root.name!r}: rename one, or give the folder that holds both")
    for root in roots:
        if root.is_file():
            yield root.name, root, kind_of(root)
            continue
        found: list[tuple[str, Path, str]] = []
        for folder, names, files in os.walk(root):
            here = Path(folder)
            for name in list(names):
                if name in SKIPPED_FOLDERS or (here / name).is_symlink():  # a link may lead back to where we are
                    names.remove(name)
                    found.append(((here / name).relative_to(root).as_posix(), here / name, "skipped"))
            found += [((here / name).relative_to(root).as_posix(), here / name, kind_of(Path(name))) for name in files]
        yield from ((f"{root.name}/{source}", path, kind) for source, path, kind in sorted(found))


def make_plan(inputs: Sequence[str | Path], shard_bytes: int = 32_000_000) -> Plan:
    """Cut the inputs into shards of about `shard_bytes`, and hash every file (one pass over the input)."""
    shards: list[list[Piece]] = []
    files: list[dict[str, Any]] = []
    size = shard_bytes
    for source, path, kind in find_files(inputs):
        if kind == "skipped" or not path.is_file():  # a socket, a pipe, a link to nothing
            pieces = [(Piece(str(path), source, "skipped"), 0)]
        else:
            nbytes = path.stat().st_size
            files.append({"source": source, "bytes": nbytes, "sha256": sha256_of(path)})
            pieces = list(_cut(path, source, kind, nbytes, shard_bytes))
        for piece, weight in pieces:
            if size >= shard_bytes or size + weight > shard_bytes and size > 0:
                shards.append([])
                size = 0
            shards[-1].append(piece)
            size += weight + 1000  # a thousand empty files are work, too
    return Plan(tuple(tuple(shard) for shard in shards), tuple(files))


def sha256_of(path: str | Path) -> str:
    """SHA-256 of a file, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _cut(path: Path, source: str, kind: str, nbytes: int, shard_bytes: int) -> Iterator[tuple[Piece, int]]:
    if kind == "jsonl" and not path.name.lower().endswith(".gz") and nbytes > shard_bytes:
        for start in range(0, nbytes, shard_bytes):
            stop = min(start + shard_bytes, nbytes)
            yield Piece(str(path), source, kind, start, stop), stop - start
    elif kind == "parquet" and nbytes > shard_bytes and (groups := _row_groups(path)) > 1:
        for start in range(groups):
            yield Piece(str(path), source, kind, start, start + 1), nbytes // groups
    else:
        yield Piece(str(path), source, kind), nbytes


def _row_groups(path: Path) -> int:
    import pyarrow
    from pyarrow import parquet

    try:
        return parquet.ParquetFile(path).num_row_groups
    except (pyarrow.ArrowException, OSError):
        return 0  # the reader of the whole file will say what is wrong with it


def read_piece(piece: Piece, largest: int = 8_000_000) -> Iterator[Document | Unread]:
    """Every document of a piece, and an `Unread` for whatever is not one.

    A document longer than `largest` bytes is not read.
    """
    if piece.kind == "skipped":
        yield Unread(piece.source, "", "not_entered", "a link, a special file, or a folder of tools")
        return
    reader = {"text": _read_text, "jsonl": _read_jsonl, "parquet": _read_parquet}[piece.kind]
    try:
        yield from reader(piece, largest)
    except OSError as error:  # no permission, gone since, a broken disk
        yield Unread(piece.source, "", "unreadable", f"{type(error).__name__}: {error.strerror}")


def _read_text(piece: Piece, largest: int) -> Iterator[Document | Unread]:
    parts: list[bytes] = []
    try:
        for chunk in _chunks(piece):
            parts.append(chunk)
            if sum(map(len, parts)) > largest:
                yield Unread(piece.source, "", "too_large", f"more than {largest} bytes")
                return
    except (EOFError, zlib.error) as error:
        yield Unread(piece.source, str(sum(map(len, parts))), "cut_off", str(error))
        return
    text = _decoded(b"".join(parts))
    yield Document(piece.source, piece.source, text) if text is not None else _undecodable(piece.source, "", parts)


def _decoded(raw: bytes) -> str | None:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return None  # the caller reports it as `undecodable`


def _undecodable(source: str, position: str, parts: Sequence[bytes]) -> Unread:
    return Unread(source, position, "undecodable", f"not UTF-8; begins with {b''.join(parts)[:24]!r}")


def _read_jsonl(piece: Piece, largest: int) -> Iterator[Document | Unread]:
    records = 0
    lines = _lines(piece, largest)
    while True:
        try:
            offset, line = next(lines)
        except StopIteration:
            break
        except (EOFError, zlib.error) as error:  # what came whole before the cut has been handed on
            records += 1
            yield Unread(piece.source, "end", "cut_off", str(error))
            break
        if line is not None and not line.strip():
            continue
        records += 1
        if line is None:
            yield Unread(piece.source, str(offset), "too_large", f"a record of more than {largest} bytes")
        else:
            yield _record(piece.source, str(offset), line)
    if not records and piece.stop is None:
        yield Unread(piece.source, "", "no_records", "the file holds no record")


def _record(source: str, position: str, line: bytes) -> Document | Unread:
    text = _decoded(line)
    if text is None:
        return _undecodable(source, position, [line])
    try:
        value = json.loads(text.removeprefix("\ufeff") if position == "0" else text)
    except (ValueError, RecursionError) as error:
        return Unread(source, position, "bad_json", str(error))
    if not isinstance(value, dict):
        return Unread(source, position, "not_an_object", f"a {type(value).__name__}")
    return _checked(source, position, value.get("text"), "text" in value, value.get("id"))


def _checked(source: str, position: str, text: Any, there: bool, own_id: Any) -> Document | Unread:
    """A document of a record's fields; only `text` and `id` matter, and only if they are what they should be."""
    if not there:
        return Unread(source, position, "no_text", "the record has no field `text`")
    if not isinstance(text, str):
        return Unread(source, position, "text_not_a_string", f"a {type(text).__name__}")
    named = isinstance(own_id, str | int) and not isinstance(own_id, bool)
    name = str(own_id) if named else f"{source}@{position}"
    try:
        f"{text}{name}".encode()
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair, UTF-8 cannot
        return Unread(source, position, "not_unicode", f"a lone surrogate at character {error.start}")
    return Document(name, source, text)


def _read_parquet(piece: Piece, largest: int) -> Iterator[Document | Unread]:
    import pyarrow
    from pyarrow import parquet

    row = 0
    try:
        file = parquet.ParquetFile(piece.path)
        if piece.stop is not None:
            row = sum(file.metadata.row_group(group).num_rows for group in range(piece.start))
        groups = range(piece.start, file.num_row_groups if piece.stop is None else piece.stop)
        there = "text" in file.schema_arrow.names
        # without either column rows are still counted: one column is read, whichever it is
        columns = [name for name in ("text", "id") if name in file.schema_arrow.names] or file.schema_arrow.names[:1]
        if not file.metadata.num_rows:
            yield Unread(piece.source, "", "no_records", "the file holds no row")
        for batch in file.iter_batches(64, row_groups=list(groups), columns=columns):
            for record in batch.to_pylist():
                text = record.get("text")
                if isinstance(text, str) and len(text) > largest:
                    yield Unread(piece.source, str(row), "too_large", f"a text of more than {largest} characters")
                else:
                    yield _checked(piece.source, str(row), text, there, record.get("id"))
                row += 1
    except pyarrow.ArrowException as error:
        yield Unread(piece.source, str(row), "unreadable", str(error).splitlines()[0])


def _chunks(piece: Piece) -> Iterator[bytes]:
    """The bytes of a file from `piece.start` on, unpacked if its name ends in .gz."""
    with open(piece.path, "rb") as file:
        if not piece.path.lower().endswith(".gz"):
            file.seek(piece.start)
            while chunk := file.read(CHUNK):
                yield chunk
            return
        unpacker, begun = zlib.decompressobj(31), False
        while chunk := file.read(CHUNK):
            while chunk:
                begun = True
                if data := unpacker.decompress(chunk, CHUNK):  # never more than CHUNK bytes at once
                    yield data
                chunk = unpacker.unconsumed_tail
                if unpacker.eof:  # a file may hold several members, one after the other
                    chunk = unpacker.unused_data.lstrip(b"\0")
                    unpacker, begun = zlib.decompressobj(31), False
        while begun and (data := unpacker.decompress(unpacker.unconsumed_tail, CHUNK)):
            yield data
        if begun and not unpacker.eof:
            raise EOFError("the gzip stream ends before its end mark")


def _lines(piece: Piece, largest: int) -> Iterator[tuple[int, bytes | None]]:
    """(byte offset, line without its end) of every line that begins in the piece; None for one above `largest`."""
    offset, parts, length = piece.start, [], 0
    skip = piece.start > 0
    if skip:  # a line that begins before `start` belongs to the piece before: drop everything up to its end
        piece = Piece(piece.path, piece.source, piece.kind, piece.start - 1, piece.stop)
        offset -= 1
    for chunk in _chunks(piece):
        begin = 0
        while (end := chunk.find(b"\n", begin)) >= 0:
            length += end - begin
            if not skip:
                parts.append(chunk[begin:end])
                yield offset, b"".join(parts).removesuffix(b"\r") if length <= largest else None
            offset, skip, parts, length, begin = offset + length + 1, False, [], 0, end + 1
            if piece.stop is not None and offset >= piece.stop:
                return
        length += len(chunk) - begin
        parts = [] if skip or length > largest else [*parts, chunk[begin:]]
    if length and not skip:
        yield offset, b"".join(parts) if length <= largest else None
