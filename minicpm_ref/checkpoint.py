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
from collections.abc import Iterator
from pathlib import Path

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor

from minicpm_ref.config import ModelConfig
from minicpm_ref.files import replacing, write_text
from minicpm_ref.model import MiniCPM
from minicpm_ref.ternary_layers import install_ternary, ternary_state
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

    `source` is a folder in the published layout, a hub id such as "openbmb/MiniCPM4.1-8B" (give `revision`, a commit
    hash, so that the same weights load tomorrow), or None: then the environment variable MINICPM_WEIGHTS decides if it
    is set, else the embedded weights. `variant` names one of the embedded weights and is refused with another source.
    `dtype` None keeps float32 for the embedded weights and the stored type for others.

    Raises FileNotFoundError or ValueError naming the file and the tensor or key that is wrong.
    """
    if source is None:
        source = os.environ.get(WEIGHTS_VARIABLE) or None
    if source is None:
        folder = variant_folder(variant)
        dtype = dtype or torch.float32
    else:
        if variant != "base":
            raise ValueError(
                f"variant {variant!r} names embedded weights, but the source is {str(source)!r}; give one or the other"
            )
        folder = resolve(source, revision)
    config = ModelConfig.from_json(folder / "config.json")
    tensors, metadata = read_tensors(folder)
    with torch.device("meta"):
        model = MiniCPM(config)
    try:
        packed = set(install_ternary(model, tensors, metadata))
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    dense = {name: tensor for name, tensor in tensors.items() if name not in packed}
    check_tensors(model, dense, packed, folder)
    dtype = dtype or dense["model.embed_tokens.weight"].dtype
    dense = {name: tensor.to(device, dtype) for name, tensor in dense.items()}
    model.load_state_dict(dense, strict=False, assign=True)  # strict would ask for the packed ones, which are in place
    model.to(device)
    tokenizer = Tokenizer.load(folder / "tokenizer.json") if (folder / "tokenizer.json").is_file() else None
    return model.eval(), tokenizer


def resolve(source: str | Path, revision: str | None = None) -> Path:
    """The local folder of `source`, downloading a hub id (safetensors and JSON files only)."""
    folder = Path(source)
    if folder.is_dir():
        return folder
    name = str(source)
    if name.count("/") != 1 or name.startswith((".", "/", "~")) or "\\" in name:
        raise FileNotFoundError(f"{name}: no such folder, and not a hub id of the form 'owner/name'")
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name, revision=revision, allow_patterns=HUB_FILES))


def read_tensors(folder: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of `model.safetensors`, or of the shards that `model.safetensors.index.json` lists, and the files'
    metadata."""
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    for path, expected in _shards(folder):
        try:
            with safetensors.safe_open(path, "pt") as file:
                names = set(file.keys())
                metadata |= file.metadata() or {}
                if expected is not None and (expected - names):
                    raise ValueError(f"{path}: tensor {min(expected - names)!r} is missing, the index says it is here")
                for name in names if expected is None else expected:
                    tensors[name] = file.get_tensor(name)
        except safetensors.SafetensorError as error:
            raise ValueError(f"{path}: not a complete safetensors file ({error})") from error
    return tensors, metadata


def _shards(folder: Path) -> Iterator[tuple[Path, set[str] | None]]:
    """Weight files and the tensor names each must hold (None: whatever it holds)."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        yield folder / "model.safetensors", None
    elif index.is_file():
        try:
            weight_map: dict[str, str] = json.loads(index.read_text("utf-8"))["weight_map"]
        except (ValueError, KeyError) as error:
            raise ValueError(f"{index}: expected JSON with a 'weight_map'") from error
        for file_name in dict.fromkeys(weight_map.values()):
            if Path(file_name).name != file_name or not file_name.endswith(".safetensors"):
                raise ValueError(f"{index}: shard {file_name!r} is not the name of a .safetensors file in this folder")
            if not (folder / file_name).is_file():
                raise FileNotFoundError(f"{folder / file_name}: no such file, {index.name} lists it")
            yield folder / file_name, {name for name, place in weight_map.items() if place == file_name}
    else:
        pickles = [path.name for path in sorted(folder.iterdir()) if path.suffix in (".bin", ".pt", ".pth", ".pkl")]
        also = f"; {pickles[0]} is a pickle, which can run code when opened and is never read" if pickles else ""
        raise FileNotFoundError(f"{folder}: no model.safetensors or model.safetensors.index.json{also}")


def check_tensors(model: MiniCPM, tensors: dict[str, Tensor], packed: set[str], folder: Path) -> None:
    """Compare names, shapes and dtypes with what `model` asks for besides the `packed` tensors it already has; raises
    ValueError naming the first that differs."""
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in packed}
    config = model.config
    if config.tie_word_embeddings and "lm_head.weight" in tensors:
        if not torch.equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"]):
            raise ValueError(
                f"{folder}: lm_head.weight differs from the embedding, but config.json says tie_word_embeddings"
            )
        del tensors["lm_head.weight"]
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
    """Write `model` to `folder` in the published layout, each file atomically, the weights before the index that names
    them.

    `dtype` None keeps the model's own; weights above `max_shard_bytes` are split into indexed shards. Packed ternary
    layers are stored packed, five weights to a byte, whatever `dtype` is.
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
    shards: list[dict[str, Tensor]] = [{}]
    for name, tensor in tensors.items():
        if shards[-1] and sum(t.nbytes for t in shards[-1].values()) + tensor.nbytes > max_shard_bytes:
            shards.append({})
        shards[-1][name] = tensor
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file_name = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        with replacing(folder / file_name) as temporary:
            save_file(shard, temporary, metadata=metadata)
        weight_map |= dict.fromkeys(shard, file_name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
        write_text(folder / "model.safetensors.index.json", json.dumps(index, indent=2))
    write_text(
        folder / "config.json",
        json.dumps(model.config.to_dict() | {"torch_dtype": str(stored).removeprefix("torch.")}, indent=2),
    )
    if tokenizer is not None:
        tokenizer.save(folder / "tokenizer.json")


def sha256_file(path: str | Path) -> str:
    """Hash of a file's content, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
