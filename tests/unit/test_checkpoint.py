"""Weights in the published layout: exact round trips, and every way a folder can be wrong."""

from __future__ import annotations

import json
import os

import pytest
import torch
from fresh import fresh_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file, save_model

from minicpm_ref import checkpoint
from minicpm_ref.cache import KVCache
from minicpm_ref.checkpoint import EMBEDDED, load, save, variants
from minicpm_ref.config import ModelConfig
from minicpm_ref.files import replacing
from minicpm_ref.lowbit.layers import TernaryLinear, to_ternary
from minicpm_ref.lowbit.packing import size_report
from minicpm_ref.model import MiniCPM
from minicpm_ref.training.card import check_chain


def tiny(tied: bool = False) -> MiniCPM:
    config = ModelConfig(40, 32, 2, 4, 2, 48, max_position_embeddings=64, tie_word_embeddings=tied)
    return fresh_model(config, seed=3)


def edit(folder, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shard_bytes", [2**30, 9000, 1])
def test_round_trip_is_exact(tmp_path, tied: bool, shard_bytes: int) -> None:
    model = tiny(tied)
    save(model, tmp_path, max_shard_bytes=shard_bytes)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard_bytes < 2**30)
    loaded, tokenizer = load(tmp_path)
    assert tokenizer is None
    assert loaded.config == model.config
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_stored_type_is_kept_unless_another_is_asked_for(tmp_path, dtype: torch.dtype) -> None:
    save(tiny(), tmp_path, dtype=dtype)
    assert load(tmp_path)[0].dtype == dtype
    assert load(tmp_path, dtype=torch.float32)[0].dtype == torch.float32
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == str(dtype).removeprefix("torch.")


def test_a_tied_checkpoint_may_repeat_its_embedding_but_not_contradict_it(tmp_path) -> None:
    save(tiny(tied=True), tmp_path)
    edit(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    load(tmp_path)
    edit(tmp_path, lambda t: t["lm_head.weight"].add_(1))
    with pytest.raises(ValueError, match=r"lm_head\.weight differs"):
        load(tmp_path)


NORM = "model.layers.1.input_layernorm.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(NORM), f"{NORM}.* is missing"),
        (lambda t: t.update(extra=torch.zeros(1)), "unexpected tensor 'extra'"),
        (lambda t: t.update({NORM: torch.zeros(31)}), rf"{NORM}.* has shape \(31,\)"),
        (lambda t: t.update({NORM: torch.zeros(32, dtype=torch.int32)}), f"{NORM}.* is torch.int32"),
        (lambda t: t.update({NORM: torch.zeros(32, dtype=torch.float64)}), f"{NORM}.* is torch.float64"),
    ],
)
def test_wrong_tensors_are_named(tmp_path, change, message: str) -> None:
    save(tiny(), tmp_path)
    edit(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


@pytest.mark.parametrize("keep", [4, 100, -10])
def test_a_truncated_file_is_refused(tmp_path, keep: int) -> None:
    save(tiny(), tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"model\.safetensors: not a complete safetensors file"):
        load(tmp_path)


@pytest.mark.parametrize("place", ["../outside.safetensors", "/etc/passwd", "sub/shard.safetensors", "weights.bin"])
def test_an_index_that_points_outside_its_folder_is_refused(tmp_path, place: str) -> None:
    save(tiny(), tmp_path, max_shard_bytes=9000)
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"][NORM] = place
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="index.json: shard"):
        load(tmp_path)


def test_loaded_weights_ask_for_no_gradients(tmp_path) -> None:
    save(tiny(), tmp_path)
    model, _ = load(tmp_path)
    assert not any(p.requires_grad for p in model.parameters())
    cache = KVCache(model.config, 1, 8)
    model(torch.arange(4)[None], cache)  # without no_grad: the cache must not grow a graph
    assert not cache.keys.requires_grad


@pytest.mark.parametrize(
    ("first", "second"), [(2**30, 9000), (9000, 2**30), (9000, 20000), (20000, 9000), (2**30, 2**30), (9000, 9000)]
)
def test_what_was_saved_last_is_what_loads(tmp_path, first: int, second: int) -> None:
    old, new = tiny(), fresh_model(tiny().config, seed=4)
    save(old, tmp_path, max_shard_bytes=first)
    save(new, tmp_path, max_shard_bytes=second)
    loaded, _ = load(tmp_path)
    for name, tensor in new.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert len(list(tmp_path.glob("*.safetensors"))) == len(checkpoint._split(dict(new.state_dict()), second))


@pytest.mark.parametrize("shard_bytes", [9000, 2**30])
def test_an_error_while_saving_leaves_the_earlier_save(tmp_path, monkeypatch, shard_bytes: int) -> None:
    old = tiny()
    save(old, tmp_path, max_shard_bytes=9000)
    before = sorted(os.listdir(tmp_path))
    calls = []

    def full_disk(tensors: dict, path: object, metadata: dict) -> None:
        calls.append(path)
        if len(calls) == 2 or shard_bytes > 9000:
            raise OSError("no space left on device")
        save_file(tensors, path, metadata)

    monkeypatch.setattr(checkpoint, "save_file", full_disk)
    with pytest.raises(OSError, match="no space"):
        save(fresh_model(old.config, seed=4), tmp_path, max_shard_bytes=shard_bytes)
    assert sorted(os.listdir(tmp_path)) == before
    for name, tensor in load(tmp_path)[0].state_dict().items():
        assert torch.equal(tensor, old.state_dict()[name]), name


def test_two_sets_of_weights_in_one_folder_are_refused(tmp_path) -> None:
    save(tiny(), tmp_path, max_shard_bytes=9000)
    save_file(dict(tiny().state_dict()), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"holds both model\.safetensors and model\.safetensors\.index\.json"):
        load(tmp_path)


def test_a_shard_of_another_checkpoint_is_noticed(tmp_path) -> None:
    save(tiny(), tmp_path, max_shard_bytes=9000)
    shard = sorted(tmp_path.glob("model-*.safetensors"))[0]
    save_file(load_file(shard) | {"stranger": torch.zeros(1)}, shard)
    with pytest.raises(ValueError, match=f"{shard.name}: tensor 'stranger' is not in the index"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1]", "expected a JSON object"),
        ("{}", "weight_map = None: expected an object"),
        ('{"weight_map": 5}', "weight_map = 5"),
        ('{"weight_map": {"x": 5}}', r"weight_map\['x'\] = 5: expected a string"),
        ("{", "Expecting"),
    ],
)
def test_a_broken_index_is_named(tmp_path, content: str, message: str) -> None:
    save(tiny(), tmp_path, max_shard_bytes=9000)
    (tmp_path / checkpoint.INDEX).write_text(content)
    with pytest.raises(ValueError, match=rf"index\.json: .*{message}"):
        load(tmp_path)


@pytest.mark.parametrize(
    "names", [[f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(2)], ["model.rotary_emb.inv_freq"]]
)
def test_stored_rotary_frequencies_are_skipped(tmp_path, names: list[str]) -> None:
    model = tiny()
    for shard_bytes in (2**30, 9000):
        save(model, tmp_path, max_shard_bytes=shard_bytes)
        path = sorted(tmp_path.glob("*.safetensors"))[0]
        save_file(load_file(path) | {name: torch.ones(4) for name in names}, path)
        assert torch.equal(load(tmp_path)[0](torch.arange(9)[None]), model(torch.arange(9)[None]))


def test_a_tied_matrix_may_be_stored_under_either_name(tmp_path) -> None:
    model = tiny(tied=True)
    save(model, tmp_path)
    edit(tmp_path, lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight")}))
    assert torch.equal(load(tmp_path)[0](torch.arange(9)[None]), model(torch.arange(9)[None]))


def test_a_tensor_that_safetensors_stored_once_is_found_under_both_names(tmp_path) -> None:
    model = tiny()
    model.lm_head.weight.data = model.model.embed_tokens.weight.data
    save(tiny(), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    save_model(model, str(tmp_path / "model.safetensors"))  # notes {dropped name: kept name} in the metadata
    assert len(load_file(tmp_path / "model.safetensors")) == len(model.state_dict()) - 1
    assert torch.equal(load(tmp_path)[0](torch.arange(9)[None]), model(torch.arange(9)[None]))


@pytest.mark.parametrize("layers", [1, 3, 10**9])
def test_the_number_of_layers_is_compared_before_any_is_built(tmp_path, monkeypatch, layers: int) -> None:
    save(tiny(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": layers}))
    monkeypatch.setattr(checkpoint, "MiniCPM", lambda config: pytest.fail("built"))
    with pytest.raises(ValueError, match=f"num_hidden_layers = {layers}, the weights have 2"):
        load(tmp_path)


def test_end_tokens_are_those_of_config_generation_config_and_vocabulary(tmp_path) -> None:
    _, tokenizer = load()
    assert tokenizer is not None
    own = tokenizer.eos_ids
    config = ModelConfig(4096, 32, 2, 4, 2, 48, max_position_embeddings=64, eos_token_id=(7,))
    save(fresh_model(config, seed=3), tmp_path, tokenizer)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 11], "temperature": 0.8}')
    model, tokenizer = load(tmp_path)
    assert tokenizer is not None
    assert model.config.eos_token_id == (7, 11)
    assert tokenizer.eos_ids == (*own, 7, 11)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 5000}')
    with pytest.raises(ValueError, match=r"generation_config\.json: eos_token_id = 5000"):
        load(tmp_path)


def test_missing_shards_and_tensors_are_named(tmp_path) -> None:
    save(tiny(), tmp_path, max_shard_bytes=9000)
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    tensors = load_file(shards[1])
    name = sorted(tensors)[0]
    save_file({k: v for k, v in tensors.items() if k != name}, shards[1])
    with pytest.raises(ValueError, match=f"{shards[1].name}: tensor '{name}' is missing"):
        load(tmp_path)
    shards[1].unlink()
    with pytest.raises(FileNotFoundError, match=shards[1].name):
        load(tmp_path)


def test_a_pickle_is_named_and_never_opened(tmp_path) -> None:
    save(tiny(), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save({"x": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"pytorch_model\.bin is a pickle"):
        load(tmp_path)


def test_sources_that_do_not_exist_are_refused(tmp_path, monkeypatch) -> None:
    for source in (tmp_path / "nowhere", "no-such-name", "/a/b"):
        with pytest.raises(FileNotFoundError, match="no such folder"):
            load(source)
    with pytest.raises(ValueError, match="variant 'ternery': expected one of base"):
        load(variant="ternery")
    monkeypatch.setenv("MINICPM_WEIGHTS", str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load()


def test_the_environment_replaces_the_default(tmp_path, monkeypatch) -> None:
    model = tiny()
    save(model, tmp_path)
    monkeypatch.setenv("MINICPM_WEIGHTS", str(tmp_path))
    assert load()[0].config == model.config
    if "sparse" in variants():  # what was asked for by name is that
        assert load(variant="sparse")[0].config.sparse_config is not None
    with pytest.raises(ValueError, match="give one or the other"):
        load(tmp_path, variant="sparse")


def test_a_hub_id_is_fetched_as_safetensors_and_json_at_the_given_revision(tmp_path, monkeypatch) -> None:
    model = tiny()
    save(model, tmp_path)
    asked = {}

    def snapshot_download(name: str, **settings: object) -> str:
        asked.update(settings, name=name)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    loaded, _ = load("openbmb/MiniCPM4-0.5B", revision="0123abc")
    assert loaded.config == model.config
    assert asked == {"name": "openbmb/MiniCPM4-0.5B", "revision": "0123abc", "allow_patterns": checkpoint.HUB_FILES}


def test_an_interrupted_write_leaves_the_old_file(tmp_path) -> None:
    target = tmp_path / "file"
    target.write_text("old")

    def interrupted() -> None:
        with replacing(target) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


# ---- the embedded weights


def test_the_embedded_base_is_what_its_card_says() -> None:
    model, tokenizer = load()
    card = json.loads((EMBEDDED / "base" / "card.json").read_text())
    assert tokenizer is not None
    assert model.config == ModelConfig.from_dict(card["recipe"]["config"]) == ModelConfig.preset("embedded")
    assert sum(p.numel() for p in model.parameters()) == card["parameters"]
    assert 5e6 <= card["parameters"] <= 15e6
    assert tokenizer.vocab_size == model.config.vocab_size
    assert (EMBEDDED / "base" / "model.safetensors").stat().st_size <= 32e6
    assert all(shape[1] % 256 == 0 for shape in model.config.linear_shapes().values())
    assert model.config.group_size >= 4


def test_every_embedded_variant_hangs_on_the_embedded_base() -> None:
    check_chain()


def test_a_variant_of_another_base_is_refused(tmp_path, monkeypatch) -> None:
    folders = {name: tmp_path / name for name in ("base", "sparse")}
    for name, folder in folders.items():
        save(tiny(), folder)
        digest = checkpoint.sha256_file(folder / "model.safetensors")
        parent = None if name == "base" else {"name": "base", "weights_sha256": digest}
        (folder / "card.json").write_text(json.dumps({"weights_sha256": digest, "parent": parent}))
    (tmp_path / "stable").mkdir()
    (tmp_path / "stable" / "state.safetensors").write_bytes(b"the state of a run")
    monkeypatch.setattr(checkpoint, "EMBEDDED", tmp_path)
    assert variants() == ["base", "sparse"]
    check_chain()
    edit(folders["base"], lambda t: t[NORM].add_(1))  # a better base arrives
    card = json.loads((folders["base"] / "card.json").read_text())
    card["weights_sha256"] = checkpoint.sha256_file(folders["base"] / "model.safetensors")
    (folders["base"] / "card.json").write_text(json.dumps(card))
    with pytest.raises(ValueError, match="variant 'sparse' was trained from"):
        check_chain()


def ternary(group_size: int = 16) -> MiniCPM:
    model = tiny()
    to_ternary(model, group_size)
    return model


@pytest.mark.parametrize("shard_bytes", [2**30, 9000, 1])
def test_a_packed_round_trip_is_exact(tmp_path, shard_bytes: int) -> None:
    model = ternary()
    save(model, tmp_path, max_shard_bytes=shard_bytes)
    loaded, _ = load(tmp_path)
    assert set(loaded.state_dict()) == set(model.state_dict())
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    ids = torch.arange(12)[None]
    assert torch.equal(loaded(ids), model(ids))
    report = size_report(tmp_path)
    assert report.ternary_weights == sum(p.numel() for n, p in tiny().named_parameters() if "_proj" in n)
    assert report.bits_per_weight == pytest.approx(8 / 5 + 16 / 16, abs=0.01)


def test_a_packed_checkpoint_is_the_same_file_every_time(tmp_path) -> None:
    for name in "ab":
        save(ternary(), tmp_path / name)
    assert len({checkpoint.sha256_file(tmp_path / name / "model.safetensors") for name in "ab"}) == 1


def test_casting_a_packed_checkpoint_leaves_its_scales_alone(tmp_path) -> None:
    save(ternary(), tmp_path, dtype=torch.float16)
    loaded, _ = load(tmp_path, dtype=torch.float32)
    layer = loaded.get_submodule("model.layers.0.mlp.down_proj")
    assert loaded.dtype == torch.float32
    assert isinstance(layer, TernaryLinear)
    assert layer.scales.dtype == torch.float16


def test_a_damaged_packed_checkpoint_is_refused_by_folder_and_tensor(tmp_path) -> None:
    save(ternary(), tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        metadata = file.metadata()
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.codes"
    for change, message in [
        (lambda t: t.pop(name), f"{name} is missing"),
        (lambda t: t[name].fill_(243), f"{name}.*243"),
        (lambda t: t.pop("model.norm.weight"), "'model.norm.weight' is missing"),
        (lambda t: t.update(extra=torch.zeros(1)), "unexpected tensor 'extra'"),
    ]:
        changed = {key: tensor.clone() for key, tensor in tensors.items()}
        change(changed)
        save_file(changed, tmp_path / "model.safetensors", metadata)
        with pytest.raises(ValueError, match=rf"{tmp_path}: .*{message}"):
            load(tmp_path)
