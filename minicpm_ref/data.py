"""The corpus: Python source that is already on the machine, and the yardstick that goes with it.

Real weights need real text, and a project that must train offline cannot download any. But whoever runs Python has its
standard library, and usually numpy, torch, sympy or networkx beside it: some hundred megabytes of edited, licensed,
structured text.

Files are deduplicated by content, and split into train and held-out *by file*, by a hash of the path alone: the same
file is held out on every machine and for every Python version, so no version of a held-out file is ever trained on. The
manifest lists each file with its hash, split and licence; the hash of the manifest names the corpus.

Loss is reported in bits per byte: the negative log2-likelihood of a text divided by its length in UTF-8 bytes. Unlike
loss per token it does not depend on the vocabulary, so models with different tokenizers can be compared.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from minicpm_ref.files import replacing, write_text
from minicpm_ref.tokenizer import Tokenizer

LICENCES = {
    "stdlib": "PSF-2.0",
    "numpy": "BSD-3-Clause",
    "torch": "BSD-3-Clause",
    "sympy": "BSD-3-Clause",
    "networkx": "BSD-3-Clause",
}
LARGEST_FILE = 200_000  # bytes; larger .py files are generated tables, not programs
BPE_SAMPLE = 24_000_000  # characters of training text that the vocabulary is learned from


@dataclass(frozen=True)
class Document:
    """One source file: `group` is a key of LICENCES, `path` is relative to the root of that group."""

    group: str
    path: str
    text: str

    @property
    def nbytes(self) -> int:
        """Length in UTF-8 bytes."""
        return len(self.text.encode())

    @property
    def held_out(self) -> bool:
        """True for one file in fifty, chosen by a hash of its group and path."""
        return int.from_bytes(hashlib.sha256(f"{self.group}/{self.path}".encode()).digest()[:4]) % 50 == 0


def find_roots(groups: Sequence[str] | None = None) -> dict[str, Path]:
    """The source folders present on this machine, by group; with `groups`, those alone.

    Raises ValueError for a group that is unknown, or named but not installed.
    """
    roots = {"stdlib": Path(sysconfig.get_paths()["stdlib"])}
    for package in LICENCES.keys() - {"stdlib"}:
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.submodule_search_locations:
            roots[package] = Path(spec.submodule_search_locations[0])
    for group in groups or ():
        if group not in roots:
            raise ValueError(f"group {group!r}: expected one of those found here, {', '.join(sorted(roots))}")
    return {group: roots[group] for group in LICENCES if group in (groups or roots) and group in roots}


def read_documents(group: str, root: Path) -> Iterator[Document]:
    """Every non-empty UTF-8 `.py` file below `root`, in path order.

    Skipped are folders and dangling links of that name, files that cannot be read, packages installed inside the
    standard library, and its `config-*` folder, whose files are generated with paths of the machine.
    """
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if {"site-packages", "dist-packages", "__pycache__"} & set(relative.parts) or relative.match("config-*/*"):
            continue
        try:
            if not path.is_file() or path.stat().st_size > LARGEST_FILE:
                continue
            text = path.read_text("utf-8")
        except (UnicodeDecodeError, OSError):  # test data in other encodings; links to nowhere or to themselves
            continue
        if text.strip():
            yield Document(group, relative.as_posix(), text)


def build_corpus(
    folder: str | Path,
    roots: dict[str, Path] | None = None,
    vocab_size: int = 4096,
    tokenizer: Tokenizer | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> Corpus:
    """Collect, deduplicate, split and tokenize the sources into `folder`; returns the opened corpus.

    Writes `manifest.json`, `tokenizer.json` (learned here unless given), `train.bin` (uint16 ids, every document
    between `<s>` and `</s>`) and `held_out.jsonl`. `report` receives a line of progress per stage.
    """
    folder = Path(folder)
    documents: list[Document] = []
    files: list[dict[str, str | int]] = []
    seen: set[str] = set()
    for group, root in (find_roots() if roots is None else roots).items():
        for document in read_documents(group, root):
            digest = hashlib.sha256(document.text.encode()).hexdigest()
            if digest in seen:
                continue
            seen.add(digest)
            documents.append(document)
            split = "held_out" if document.held_out else "train"
            files.append(
                {"group": group, "path": document.path, "sha256": digest, "bytes": document.nbytes, "split": split}
            )
    train = [document for document in documents if not document.held_out]
    held_out = [document for document in documents if document.held_out]
    if not train or not held_out:
        raise ValueError(
            f"{len(train)} files to train on and {len(held_out)} held out below {roots}: expected at least one of each"
        )
    report(f"{len(train)} files to train on, {len(held_out)} held out")
    if tokenizer is None:
        report("learning the vocabulary")
        tokenizer = Tokenizer.train(_sample(train), vocab_size)
    tokenizer.save(folder / "tokenizer.json")
    report("encoding")
    tokens = _write_tokens(folder / "train.bin", train, tokenizer)
    write_text(
        folder / "held_out.jsonl",
        "".join(json.dumps(vars(document), ensure_ascii=False) + "\n" for document in held_out),
    )
    sizes: Counter[str] = Counter()
    for file in files:
        sizes[f"{file['group']}/{file['split']}"] += int(file["bytes"])
    manifest = {
        "licences": {group: LICENCES.get(group, "unknown") for group in {document.group for document in documents}},
        "bytes": dict(sorted(sizes.items())),
        "train_tokens": tokens,
        "files": files,
    }
    write_text(folder / "manifest.json", json.dumps(manifest, ensure_ascii=False, indent=1, sort_keys=True))
    return Corpus(folder)


def _sample(documents: Sequence[Document]) -> Iterator[str]:
    """Whole documents at even distances, about BPE_SAMPLE characters in all."""
    stride = max(1, math.ceil(sum(len(document.text) for document in documents) / BPE_SAMPLE))
    return (document.text for document in documents[::stride])


def _write_tokens(path: Path, documents: Sequence[Document], tokenizer: Tokenizer) -> int:
    if tokenizer.vocab_size > 2**16:
        raise ValueError(f"vocabulary of {tokenizer.vocab_size} tokens: train.bin holds 16-bit ids")
    count = 0
    with replacing(path) as temporary, open(temporary, "wb") as file:
        for start in range(0, len(documents), 256):
            for ids in tokenizer.encode_batch([document.text for document in documents[start : start + 256]]):
                np.array([tokenizer.bos_id, *ids, tokenizer.eos_ids[0]], dtype="<u2").tofile(file)
                count += len(ids) + 2
    return count


def read_held_out(path: str | Path) -> list[Document]:
    """Documents of a `held_out.jsonl`."""
    return [Document(**json.loads(line)) for line in Path(path).read_text("utf-8").splitlines() if line]


def small_sample(documents: Sequence[Document], nbytes: int, largest: int = 16_000) -> list[Document]:
    """Documents of 2 kB to `largest` bytes (of any size, if there are none) from each group in turn, about `nbytes` in
    all.

    Every group is heard, whatever its size. The order within a group is that of a hash of the path, which is as good as
    random.
    """
    pool = [document for document in documents if 2000 <= document.nbytes <= largest] or documents
    queues: dict[str, list[Document]] = {}
    for document in sorted(pool, key=lambda d: hashlib.sha256(d.path.encode()).digest()):
        queues.setdefault(document.group, []).append(document)
    chosen: list[Document] = []
    while any(queues.values()) and sum(document.nbytes for document in chosen) < nbytes:
        chosen += [queue.pop(0) for _, queue in sorted(queues.items()) if queue]
    return chosen


class Corpus:
    """A built corpus folder: a tokenizer, training tokens and held-out documents."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        for name in ("manifest.json", "tokenizer.json", "train.bin", "held_out.jsonl"):
            if not (self.folder / name).is_file():
                raise FileNotFoundError(f"{self.folder / name}: no such file; build the corpus with `minicpm-ref data`")
        self.manifest_sha256 = hashlib.sha256((self.folder / "manifest.json").read_bytes()).hexdigest()
        self.manifest = json.loads((self.folder / "manifest.json").read_text("utf-8"))
        self.tokenizer = Tokenizer.load(self.folder / "tokenizer.json")
        self.tokens = np.memmap(self.folder / "train.bin", dtype="<u2", mode="r")
        self.held_out = read_held_out(self.folder / "held_out.jsonl")
        if len(self.tokens) != self.manifest["train_tokens"]:
            raise ValueError(
                f"{self.folder / 'train.bin'} holds {len(self.tokens)} tokens: "
                f"manifest.json says {self.manifest['train_tokens']}"
            )

    def batch(
        self, step: int, rows: int, context: int, seed: int = 0, part: int = 0, parts: int = 1
    ) -> tuple[Tensor, Tensor]:
        """Inputs and targets [rows / parts, context] (int64) of a training step.

        A pure function of (seed, step), so that a resumed run sees what an uninterrupted one would have seen; process
        `part` of `parts` gets its share of the rows. Raises ValueError when the rows cannot be shared evenly.
        """
        if rows % parts:
            raise ValueError(f"{rows} rows a step cannot be shared by {parts} processes")
        starts = np.random.default_rng((seed, step)).integers(0, len(self.tokens) - context - 1, rows)
        mine = starts[part * rows // parts : (part + 1) * rows // parts]
        windows = torch.from_numpy(
            np.stack([self.tokens[start : start + context + 1] for start in mine]).astype(np.int64)
        )
        return windows[:, :-1], windows[:, 1:]
