"""A folder in the published layout: `config.json`, one safetensors file or shards with their index, `tokenizer.json`.

Only safetensors and JSON are opened; a pickle can run code and is named, never read. What exporters of the past have
left in such folders and means nothing is dropped here (stored rotary frequencies, which follow from `config.json`);
what they have spelled in several ways is brought into one (the embedding of a tied model under the name of the output
matrix). Everything else must be exactly what the index says.

Sources: the safetensors format; the index file and `save_model`'s note of shared tensors as transformers and
safetensors write them.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import safetensors
from torch import Tensor

from minicpm_ref.config import ModelConfig
from minicpm_ref.lowbit.packing import TernaryTensor, unpack_tensors
from minicpm_ref.published import read_json, require, token_ids
from minicpm_ref.tokenizer import Tokenizer

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
# Buffers that older exporters stored: recomputed from config.json by every loader.
_ROTARY = re.compile(r"(model\.)?(layers\.\d+\.self_attn\.)?rotary_emb\.(inv_freq|cos_cached|sin_cached)")


@dataclass
class Contents:
    """What a checkpoint of any format holds: under published names the `tensors` to load as they are, and the packed
    `matrices` (name of the linear, codes and scales), which are unpacked one by one while they are asked for."""

    path: Path
    config: ModelConfig
    tensors: dict[str, Tensor]
    matrices: Iterable[tuple[str, TernaryTensor]]
    tokenizer: Tokenizer | None


def read_folder(folder: Path) -> Contents:
    """The checkpoint in `folder`; its end tokens are those of `config.json` and `generation_config.json` (chat models
    often name theirs only there). Raises FileNotFoundError or ValueError naming the file and the tensor or key.

    >>> read_folder(Path("MiniCPM4-0.5B")).config.eos_token_id
    (2, 73440)
    """
    config = ModelConfig.from_json(folder / "config.json")
    more = folder / "generation_config.json"
    if more.is_file():
        found = read_json(more).get("eos_token_id")
        try:
            ids = () if found is None else token_ids("eos_token_id", found, config.vocab_size)
        except ValueError as error:
            raise ValueError(f"{more}: {error}") from error
        config = dataclasses.replace(config, eos_token_id=tuple(dict.fromkeys((*config.eos_token_id, *ids))))
    tensors, metadata = read_tensors(folder)
    if count_layers(tensors) != config.num_hidden_layers:  # before a decoder of a billion layers is built
        raise ValueError(
            f"{folder}: config.json says num_hidden_layers = {config.num_hidden_layers}, "
            f"the weights have {count_layers(tensors)}"
        )
    vocabulary = folder / "tokenizer.json"
    tokenizer = Tokenizer.load(vocabulary) if vocabulary.is_file() else None
    return Contents(folder, config, tensors, unpack_tensors(tensors, metadata), tokenizer)


def read_tensors(folder: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of `model.safetensors`, or of the shards that `model.safetensors.index.json` lists, and the files'
    metadata. Raises FileNotFoundError or ValueError naming the file and the tensor.

    >>> tensors, metadata = read_tensors(Path("MiniCPM4-0.5B"))
    """
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    for path, expected in _shards(folder):
        try:
            with safetensors.safe_open(path, "pt") as file:
                names = {name for name in file.keys() if not _ROTARY.fullmatch(name)}  # noqa: SIM118  # not a mapping
                _check_listed(path, names, expected)
                metadata |= file.metadata() or {}
                tensors |= {name: file.get_tensor(name) for name in sorted(names)}
        except safetensors.SafetensorError as error:
            raise ValueError(f"{path}: not a complete safetensors file ({error})") from error
    _restore_shared(tensors, metadata)
    return tensors, metadata


def count_layers(tensors: dict[str, Tensor]) -> int:
    """How many decoder layers the names speak of: one more than the largest number in `model.layers.N.`"""
    numbers = (re.match(r"model\.layers\.(\d+)\.", name) for name in tensors)
    return max((int(number[1]) + 1 for number in numbers if number), default=0)


def _check_listed(path: Path, names: set[str], expected: set[str] | None) -> None:
    if expected is None:
        return
    missing, extra = expected - names, names - expected
    if missing:
        raise ValueError(f"{path}: tensor {min(missing)!r} is missing, the index says it is here")
    if extra:
        raise ValueError(f"{path}: tensor {min(extra)!r} is not in the index; is the shard of another checkpoint?")


def _restore_shared(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Two names of one tensor are stored once; the file's metadata then says {dropped name: kept name}."""
    for name, kept in metadata.items():
        if name in (EMBEDDING, OUTPUT) and kept in (EMBEDDING, OUTPUT) and name not in tensors and kept in tensors:
            tensors[name] = tensors[kept]


def _shards(folder: Path) -> Iterator[tuple[Path, set[str] | None]]:
    """Weight files and the tensor names each must hold (None: whatever it holds)."""
    index = folder / INDEX
    if (folder / SINGLE).is_file() and index.is_file():
        raise ValueError(f"{folder}: holds both {SINGLE} and {INDEX}; which of them counts? Delete the other")
    if (folder / SINGLE).is_file():
        yield folder / SINGLE, None
    elif index.is_file():
        listed = _listed(index)
        for file_name in listed:
            if Path(file_name).name != file_name or not file_name.endswith(".safetensors"):
                raise ValueError(f"{index}: shard {file_name!r} is not the name of a .safetensors file in this folder")
        for file_name, names in listed.items():
            if not (folder / file_name).is_file():
                raise FileNotFoundError(f"{folder / file_name}: no such file, {index.name} lists it")
            yield folder / file_name, names
    else:
        pickles = [path.name for path in sorted(folder.iterdir()) if path.suffix in (".bin", ".pt", ".pth", ".pkl")]
        also = f"; {pickles[0]} is a pickle, which can run code when opened and is never read" if pickles else ""
        raise FileNotFoundError(f"{folder}: no {SINGLE} or {INDEX}{also}")


def _listed(index: Path) -> dict[str, set[str]]:
    """{shard: names of its tensors} of an index file."""
    content = read_json(index)
    try:
        weight_map = require("weight_map", content.get("weight_map"), dict)
        shards: dict[str, set[str]] = {}
        for name, place in weight_map.items():
            names = shards.setdefault(require(f"weight_map[{name!r}]", place, str), set())
            if not _ROTARY.fullmatch(name):
                names.add(name)
    except ValueError as error:
        raise ValueError(f"{index}: {error}") from error
    return shards
