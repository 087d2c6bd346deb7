"""The EAGLE-3 head against its equations, and its files against what others got wrong in public."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from fresh import fresh_model
from safetensors.torch import load_file, save_file

from minicpm_ref.config import LongRope, ModelConfig
from minicpm_ref.model import MiniCPM
from minicpm_ref.speculative import DraftHead, DraftHeadConfig, HeadDrafter, load_head, offsets, save_head
from minicpm_ref.speculative.draft_head import default_layers

TARGET = ModelConfig(40, 32, 2, 4, 2, 48, max_position_embeddings=256)
LAYERS = (0, 1, 2)
KEPT = torch.tensor([0, 2, 5, 7, 11, 12, 20, 33, 39])


@pytest.fixture(scope="module")
def target() -> MiniCPM:
    return fresh_model(TARGET, seed=2).double()


def random_head(target: MiniCPM, kept: torch.Tensor = KEPT, seed: int = 0) -> DraftHead:
    """A head with random numbers everywhere, norms included."""
    config = DraftHeadConfig.for_target(target.config, len(kept), LAYERS)
    head = DraftHead(config, target.model.embed_tokens.weight).to(target.dtype)
    generator = torch.Generator().manual_seed(seed)
    for parameter in head.parameters():
        values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data = values * 0.15 + (1.0 if parameter.ndim == 1 else 0.0)
    head.d2t.copy_(offsets(kept))
    return head.requires_grad_(False)


# ---- the equations, once more and in numpy ---------------------------------------------------------------------------


def norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


def rotate(x: np.ndarray, position: float, theta: float = 10000.0) -> np.ndarray:
    """x [heads, D] at a position, half-split."""
    half = x.shape[-1] // 2
    angle = position * theta ** (-np.arange(half) / half)
    a, b = x[:, :half], x[:, half:]
    return np.concatenate((a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)), -1)


def chain_by_hand(head: DraftHead, ids: list[int], features: np.ndarray, drafts: list[int], fault: str = "") -> list:
    """Draft logits after the text `ids` (its features [len - 1, 3C]) and after each of `drafts`, row by row."""
    w = {name: tensor.double().numpy() for name, tensor in head.state_dict().items()}
    config = head.config.decoder
    heads, groups, dim, eps = (
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
        config.rms_norm_eps,
    )
    table = head.embedding.double().numpy()
    keys, values, out, state = [], [], [], None
    for row, token in enumerate([*ids[1:], *drafts]):
        h = features[row] @ w["fc.weight"].T if row < len(features) else state
        if fault == "no recurrence" and row >= len(features):
            h = features[-1] @ w["fc.weight"].T
        if fault == "normed state" and row >= len(features):
            h = norm(state, w["norm.weight"], eps)
        if fault == "same token":
            token = ids[row] if row < len(ids) else token
        e = norm(table[token], w["midlayer.input_layernorm.weight"], eps)
        n = norm(h, w["midlayer.hidden_norm.weight"], eps)
        z = np.concatenate((n, e) if fault == "hidden first" else (e, n))
        position = row + 1 if fault == "position of the token" and row >= len(features) else row
        q = rotate((w["midlayer.self_attn.q_proj.weight"] @ z).reshape(heads, dim), position)
        keys.append(rotate((w["midlayer.self_attn.k_proj.weight"] @ z).reshape(groups, dim), position))
        values.append((w["midlayer.self_attn.v_proj.weight"] @ z).reshape(groups, dim))
        if fault == "sees itself only" and row >= len(features):
            keys, values = keys[-1:], values[-1:]
        found = []
        for index in range(heads):
            group = index // (heads // groups)
            scores = np.array([k[group] @ q[index] for k in keys]) / np.sqrt(dim)
            weights = np.exp(scores - scores.max())
            found.append(sum(p * v[group] for p, v in zip(weights / weights.sum(), values, strict=True)))
        scale = TARGET.residual_scale if fault == "muP branches" else 1.0
        u = (n if fault == "normed residual" else h) + scale * w["midlayer.self_attn.o_proj.weight"] @ np.concatenate(
            found
        )
        m = norm(u, w["midlayer.post_attention_layernorm.weight"], eps)
        gate = w["midlayer.mlp.gate_proj.weight"] @ m
        state = u + scale * w["midlayer.mlp.down_proj.weight"] @ (
            gate / (1 + np.exp(-gate)) * (w["midlayer.mlp.up_proj.weight"] @ m)
        )
        if row >= len(features) - 1:
            out.append(w["lm_head.weight"] @ norm(state, w["norm.weight"], eps))
    return out


@torch.no_grad()
def chain_by_head(head: DraftHead, ids: list[int], features: np.ndarray, drafts: list[int]) -> list[np.ndarray]:
    """The same through `forward`: the text in one call, then a row a draft."""
    rows = len(ids) - 1
    state, memory = head(torch.tensor([ids[1:]]), torch.from_numpy(features)[None], torch.arange(rows))
    state = state[:, -1:]
    out = [head.logits(state)[0, 0].numpy()]
    for step, token in enumerate(drafts):
        state, memory = head(torch.tensor([[token]]), state, torch.tensor([rows + step]), memory)
        out.append(head.logits(state)[0, 0].numpy())
    return out


IDS, DRAFTS = [3, 1, 4, 1, 5, 9, 2, 6], [5, 3, 5]


def features_of(target: MiniCPM, ids: list[int]) -> np.ndarray:
    with torch.no_grad():
        states = target.hidden_states(torch.tensor([ids]))
    return torch.cat([states[layer] for layer in LAYERS], -1)[0].numpy()


def test_a_chain_equals_the_equations(target: MiniCPM) -> None:
    head, features = random_head(target), features_of(target, IDS)[:-1]
    for found, expected in zip(
        chain_by_head(head, IDS, features, DRAFTS), chain_by_hand(head, IDS, features, DRAFTS), strict=True
    ):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)  # rms_norm keeps its statistics in float32


@pytest.mark.parametrize(
    "fault",
    ["hidden first", "normed residual", "normed state", "no recurrence", "same token", "position of the token",
     "sees itself only", "muP branches"],
)  # fmt: skip
def test_each_silent_killer_changes_the_logits(target: MiniCPM, fault: str) -> None:
    head, features = random_head(target), features_of(target, IDS)[:-1]
    found = np.stack(chain_by_head(head, IDS, features, DRAFTS))
    wrong = np.stack(chain_by_hand(head, IDS, features, DRAFTS, fault))
    assert np.abs(found - wrong).max() > 1e-3


def test_constant_factors_do_not_matter_but_branch_factors_do(target: MiniCPM) -> None:
    """D8: every consumer is a norm, so 12 x the embedding, or all of the stream, changes nothing (eps -> 0)."""
    head, features = random_head(target), features_of(target, IDS)[:-1]
    for module in head.modules():
        if hasattr(module, "eps"):
            module.eps = 0.0
    before = np.stack(chain_by_head(head, IDS, features, DRAFTS))
    head.embedding = head.embedding * 12
    np.testing.assert_allclose(np.stack(chain_by_head(head, IDS, features, DRAFTS)), before, rtol=0, atol=1e-6)
    for weight in (head.midlayer.self_attn.o_proj.weight, head.midlayer.mlp.down_proj.weight):
        weight.mul_(3.0)
    assert np.abs(np.stack(chain_by_head(head, IDS, features, DRAFTS)) - before).max() > 1e-2
    head.fc.weight.mul_(3.0)
    np.testing.assert_allclose(np.stack(chain_by_head(head, IDS, features, DRAFTS)), before, rtol=0, atol=1e-6)


def told(drafter: HeadDrafter, features: np.ndarray, cuts: list[int]) -> HeadDrafter:
    """The text IDS in pieces that end at `cuts`."""
    drafter.start(IDS[0])
    for begin, end in zip([0, *cuts], [*cuts, len(features)], strict=True):
        drafter.extend(IDS[1 + begin : 1 + end], features[begin:end].astype(np.float64))
    return drafter


def test_a_text_in_pieces_leaves_the_same_memory_and_drafts(target: MiniCPM) -> None:
    """D4 and trap 4.3: chunks of 1, 3, 4 tokens and one pass; a draft in between leaves nothing behind."""
    head, features = random_head(target), features_of(target, IDS)[:-1]
    whole = told(HeadDrafter(head, 3, 3, 9), features, [])
    draft = whole.propose(9)
    for cuts in ([1, 2, 3, 4, 5, 6], [3, 6], [4]):
        pieces = told(HeadDrafter(head, 3, 3, 9), features, cuts)
        pieces.propose(9)
        assert pieces.propose(9) == draft
        assert whole.memory is not None
        assert pieces.memory is not None
        assert torch.allclose(pieces.memory.keys, whole.memory.keys)
        assert torch.allclose(pieces.memory.values, whole.memory.values)
        assert pieces.memory.keys.shape[2] == pieces.rows == 7


def test_the_tree_follows_the_law_of_each_path(target: MiniCPM) -> None:
    """Each node of a tree has the children that a chain of its ancestors would choose: no sibling is seen."""
    head, features = random_head(target), features_of(target, IDS)[:-1]
    drafter = told(HeadDrafter(head, 3, 3, 100), features, [])
    draft = drafter.propose(9)
    assert len(draft.tokens) == 3 + 2 * 9
    children: dict[int, list[int]] = {}
    for node, parent in enumerate(draft.parents):
        children.setdefault(parent, []).append(node)
    for parent, nodes in children.items():
        path: list[int] = []
        while parent >= 0:
            path.insert(0, draft.tokens[parent])
            parent = draft.parents[parent]
        logits = chain_by_hand(head, IDS, features, path)[-1]
        best = [int(KEPT[i]) for i in np.argsort(-logits)[:3]]
        assert [draft.tokens[node] for node in nodes] == best


def test_the_window_forgets_the_oldest_rows(target: MiniCPM) -> None:
    head, features = random_head(target), features_of(target, IDS)[:-1]
    narrow = told(HeadDrafter(head, 1, 1, 1, window=3), features, [2, 5])
    assert narrow.memory is not None
    assert narrow.memory.keys.shape[2] == 3
    whole = told(HeadDrafter(head, 1, 1, 1), features, [])
    assert whole.memory is not None
    assert torch.allclose(narrow.memory.keys, whole.memory.keys[:, :, -3:])  # positions go on counting
    assert not torch.allclose(narrow._state, whole._state)  # type: ignore[arg-type]
    assert told(HeadDrafter(head, 1, 1, 1, window=1), features, [4]).memory.keys.shape[2] == 1  # type: ignore[union-attr]


def test_positions_beyond_the_heads_own_length(target: MiniCPM) -> None:
    """Trap 5.4: `max_position_embeddings` 64 and 4096 give the same at position 100."""
    head = random_head(target)
    longer = random_head(target)
    longer.config = replace(head.config, decoder=replace(head.config.decoder, max_position_embeddings=4096))
    short = random_head(target)
    short.config = replace(head.config, decoder=replace(head.config.decoder, max_position_embeddings=64))
    row = (torch.tensor([[3]]), torch.ones(1, 1, 96, dtype=torch.float64), torch.tensor([100]))
    assert torch.equal(longer(*row)[0], short(*row)[0])


def test_features_of_another_width_are_refused(target: MiniCPM) -> None:
    with pytest.raises(ValueError, match="features are 64 wide: expected 96"):
        random_head(target).inputs(torch.tensor([[1]]), torch.zeros(1, 1, 64, dtype=torch.float64))


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def stored(target: MiniCPM, tmp_path: Path) -> Path:
    save_head(random_head(target), tmp_path, torch.float64)
    return tmp_path


def rewrite(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def reconfigure(folder: Path, **changes: object) -> None:
    content = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in content.items() if v != "absent"}))


def test_what_was_saved_is_loaded(target: MiniCPM, stored: Path) -> None:
    head, loaded = random_head(target), load_head(stored, target)
    assert loaded.config == head.config
    assert loaded.vocabulary.tolist() == KEPT.tolist()
    for name, tensor in head.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name])
    names = set(load_file(stored / "model.safetensors"))
    expected = {f"midlayer.self_attn.{part}_proj.weight" for part in "qkvo"}
    expected |= {f"midlayer.mlp.{part}_proj.weight" for part in ("gate", "up", "down")}
    norms = ("hidden_norm", "input_layernorm", "post_attention_layernorm")
    expected |= {f"midlayer.{name}.weight" for name in norms}
    assert names == expected | {"fc.weight", "norm.weight", "lm_head.weight", "d2t", "t2d"}


@pytest.mark.parametrize("prefix", ["layers.0.", "model.layers.0.", "model.midlayer."])
def test_other_names_of_the_layer(target: MiniCPM, stored: Path, prefix: str) -> None:
    def rename(tensors: dict) -> None:
        for name in [name for name in tensors if name.startswith("midlayer.")]:
            tensors[prefix + name.removeprefix("midlayer.")] = tensors.pop(name)

    rewrite(stored, rename)
    assert torch.equal(load_head(stored, target).fc.weight, random_head(target).fc.weight)


def test_missing_extra_and_misshapen_tensors_are_one_error(target: MiniCPM, stored: Path) -> None:
    names = [name for name in load_file(stored / "model.safetensors") if name not in ("d2t", "t2d")]
    for name in names:
        kept = load_file(stored / "model.safetensors")
        rewrite(stored, lambda tensors, name=name: tensors.pop(name))
        with pytest.raises(ValueError, match=f"{name} is missing"):
            load_head(stored, target)
        save_file(kept, stored / "model.safetensors")

    def spoil(tensors: dict) -> None:
        tensors.pop("norm.weight")
        tensors["fc.weight"] = tensors["fc.weight"][:, :-1].contiguous()
        tensors["midlayer.extra.weight"] = torch.zeros(1)
        tensors["lm_head.weight"] = tensors["lm_head.weight"].int()

    rewrite(stored, spoil)
    with pytest.raises(ValueError) as error:
        load_head(stored, target)
    for words in ("norm.weight is missing", "fc.weight is [32, 95], config.json implies [32, 96]",
                  "midlayer.extra.weight is unexpected", "lm_head.weight is torch.int32"):  # fmt: skip
        assert words in str(error.value)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (None, "d2t is missing, although the head knows 9 of 40"),
        (torch.arange(9) * 5, "d2t: i [+] d2t"),  # 0, 6, 12, ... 48: ids instead of offsets reach past V
        (torch.zeros(8, dtype=torch.int64), r"d2t is torch.int64 \[8\], expected integers \[9\]"),
        (torch.tensor([0, 1, 0, 0, 0, 0, 0, 0, 0]).roll(2) - 1, "d2t: i [+] d2t"),
        (torch.tensor([9, 0, 0, 0, 0, 0, 0, 0, 0]), "d2t: i [+] d2t"),
        (torch.zeros(9), "d2t is torch.float32"),
        (torch.zeros(9, dtype=torch.int64), "t2d marks other tokens"),
    ],
)
def test_wrong_vocabularies_are_refused(target: MiniCPM, stored: Path, wrong: torch.Tensor | None, words: str) -> None:
    rewrite(stored, lambda tensors: tensors.pop("d2t") if wrong is None else tensors.__setitem__("d2t", wrong))
    with pytest.raises(ValueError, match=words):
        load_head(stored, target)


def test_a_head_of_the_whole_vocabulary_needs_no_map(target: MiniCPM, tmp_path: Path) -> None:
    head = random_head(target, torch.arange(40))
    save_head(head, tmp_path, torch.float64)
    rewrite(tmp_path, lambda tensors: (tensors.pop("d2t"), tensors.pop("t2d")))
    reconfigure(tmp_path, draft_vocab_size="absent")
    assert load_head(tmp_path, target).vocabulary.tolist() == list(range(40))


def test_the_file_owns_what_it_brings(target: MiniCPM, stored: Path) -> None:
    shared = load_head(stored, target)
    assert shared.embedding.data_ptr() == target.model.embed_tokens.weight.data_ptr()
    own = torch.full((40, 32), 0.5, dtype=torch.float64)
    rewrite(stored, lambda tensors: tensors.__setitem__("embed_tokens.weight", own))
    assert torch.equal(load_head(stored, target).embedding, own)
    rewrite(stored, lambda tensors: tensors.__setitem__("embed_tokens.weight", own[:, :-1].contiguous()))
    with pytest.raises(ValueError, match=r"embed_tokens.weight is \[40, 31\]"):
        load_head(stored, target)


def test_rope_is_the_heads_own(target: MiniCPM, stored: Path) -> None:
    """A missing base means 10000 even where the target has another; a missing scaling means the target's."""
    far = replace(TARGET, rope_theta=500000.0)
    assert DraftHeadConfig.from_dict({**_config(stored), "rope_theta": None}, far).decoder.rope_theta == 10000.0
    logits = []
    for theta in (1e4, 1e6):
        reconfigure(stored, rope_theta=theta)
        features = features_of(target, IDS)[:-1]
        logits.append(np.stack(chain_by_head(load_head(stored, target), IDS, features, DRAFTS)))
    assert np.abs(logits[0] - logits[1]).max() > 1e-3
    scaling = LongRope((1.0,) * 4, (1.0,) * 4, 64)
    long = replace(TARGET, rope_scaling=scaling)
    assert DraftHeadConfig.from_dict(_config(stored), long).decoder.rope_scaling == scaling


def _config(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def test_two_conventions_of_the_layers() -> None:
    """[1, 15, 28] as outputs and [2, 16, 29] as inputs are the same streams."""
    deep = replace(TARGET, num_hidden_layers=32)
    plain = DraftHeadConfig.for_target(deep).to_dict()
    key = "eagle_aux_hidden_state_layer_ids"
    assert default_layers(32) == (2, 16, 29) == tuple(plain[key])
    bare = {name: value for name, value in plain.items() if name != key}
    nested = bare | {"eagle_config": {key: [1, 15, 28]}}
    assert {DraftHeadConfig.from_dict(c, deep).layers for c in (plain, bare, nested)} == {(2, 16, 29)}
    with pytest.raises(ValueError, match="contradict"):
        DraftHeadConfig.from_dict(plain | {"eagle_config": {key: [2, 16, 29]}}, deep)
    with pytest.raises(ValueError, match="has 32 layers"):
        DraftHeadConfig.from_dict(plain | {key: [2, 16, 33]}, deep)
    for count in range(3, 7):
        with pytest.raises(ValueError, match="no default streams"):
            default_layers(count)
    assert [default_layers(count) for count in (7, 8)] == [(2, 3, 4), (2, 4, 5)]
    for layers in ((2, 2, 1), (2, 3, 3), (1, 2), (-1, 0, 1)):
        with pytest.raises(ValueError, match="ascending"):
            DraftHeadConfig.for_target(deep, layers=layers)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_hidden_layers": 2}, "num_hidden_layers = 2"),
        ({"fc_norm": True}, "fc_norm = True"),
        ({"norm_output": False}, "norm_output = False"),
        ({"norm_before_residual": True}, "norm_before_residual = True"),
        ({"vocab_size": 41}, "vocab_size = 41: the target's is 40"),
        ({"draft_vocab_size": 41}, "draft_vocab_size = 41"),
        ({"draft_vocab_size": "9"}, "draft_vocab_size = '9'"),
        ({"hidden_size": "absent"}, "lacks hidden_size"),
        ({"target_hidden_size": 48}, "target_hidden_size = 48"),
        ({"attention_bias": True}, "attention_bias"),
    ],
)
def test_other_heads_are_refused_by_name(target: MiniCPM, stored: Path, change: dict, words: str) -> None:
    reconfigure(stored, **change)
    with pytest.raises(ValueError, match=words):
        load_head(stored, target)


def test_files_that_are_not_there(target: MiniCPM, stored: Path) -> None:
    data = (stored / "model.safetensors").read_bytes()
    (stored / "model.safetensors").write_bytes(data[:-100])
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        load_head(stored, target)
    (stored / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="no such file$"):
        load_head(stored, target)
    (stored / "pytorch_model.bin").touch()
    with pytest.raises(FileNotFoundError, match="pickle"):
        load_head(stored, target)


def test_16_bit_files_draft_nearly_the_same(target: MiniCPM, tmp_path: Path) -> None:
    features = features_of(target, IDS)[:-1]
    exact = np.stack(chain_by_head(random_head(target), IDS, features, DRAFTS))
    for dtype, relative in ((torch.float16, 2.0**-11), (torch.bfloat16, 2.0**-8)):
        save_head(random_head(target), tmp_path, dtype)
        found = np.stack(chain_by_head(load_head(tmp_path, target), IDS, features, DRAFTS))
        # every weight is off by up to `relative`; some tens of products of such weights stand behind a logit
        assert 0 < np.abs(found - exact).max() < 64 * relative * np.abs(exact).max()


def test_sizes_are_refused() -> None:
    model = fresh_model(TARGET, seed=2)
    head = DraftHead(DraftHeadConfig.for_target(TARGET, layers=LAYERS), model.model.embed_tokens.weight)
    for name in ("width", "depth", "nodes", "window"):
        with pytest.raises(ValueError, match=f"{name} = 0"):
            HeadDrafter(head, **{name: 0})
    assert HeadDrafter(head).propose(3).tokens == []
