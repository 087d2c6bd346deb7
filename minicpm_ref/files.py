"""Files: written atomically (in full or not at all, whatever interrupts the program), read in a stated encoding."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing_all(paths: Sequence[str | Path]) -> Iterator[list[Path]]:
    """Give temporary paths beside `paths` to write to; renamed over them on success, removed on any error."""
    targets = [Path(path) for path in paths]
    temporaries = [path.with_name(f".{path.name}.{os.getpid()}.tmp") for path in targets]
    for path in targets:
        path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield temporaries
        for temporary, path in zip(temporaries, targets, strict=True):
            temporary.chmod(0o644)  # some writers create private files
            os.replace(temporary, path)
    finally:
        for temporary in temporaries:
            temporary.unlink(missing_ok=True)


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """`replacing_all` for one file."""
    with replacing_all([path]) as (temporary,):
        yield temporary


def write_text(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8, atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, "utf-8", newline="\n")


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file, line ends as they are, without a byte-order mark.

    Raises ValueError naming the file and the place for another encoding.
    """
    content = Path(path).read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: not UTF-8 (byte 0x{content[error.start]:02X} at {error.start}); convert it first, "
            f"for example with: iconv -f latin1 -t utf-8"
        ) from error
