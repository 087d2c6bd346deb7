"""Stage 2 in Triton: what the rows of the case table leave out. The two designs apart, split lists, lists without the
forced band, strided caches, gradients, planted bugs, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton", reason="triton is not installed (it exists for Linux only)")
from triton.runtime.interpreter import InterpretedFunction  # noqa: E402

from minicpm_kernels.sparse import backward, blocks, one_token, union  # noqa: E402  # imports triton
from minicpm_kernels.sparse.arguments import placement  # noqa: E402
from minicpm_kernels.sparse.attention import sparse_attention  # noqa: E402
from minicpm_kernels.testing import assert_as_close, check_attention, largest_logit, poisoned_memory  # noqa: E402
from minicpm_ref import sparse as reference  # noqa: E402
from minicpm_ref.cases.sparse import SMALL, SPARSE_ATTENTION, SparseAttentionCase  # noqa: E402

ROWS = {case.name: case for case in SPARSE_ATTENTION}


def by_token(part: int | None) -> Callable[..., torch.Tensor]:
    """The one-token design as a twin of the reference."""

    def twin(q: Any, k: Any, v: Any, blocks: Any, config: Any, query_start: Any = None, lengths: Any = None) -> Any:
        where = placement("by_token", q, k, query_start, lengths)
        return one_token.attend_tokens(q, k, v, blocks, *where, config.block_size, part)[0]

    return twin


@pytest.mark.parametrize("part", [None, 2], ids=["whole", "split"])
@pytest.mark.parametrize("name", ["block-plus-1", "decode-group-16", "draft-batch-static-cache"])
def test_one_token_a_program(name: str, part: int | None) -> None:
    check_attention(by_token(part), reference.sparse_attention, ROWS[name].build())


@pytest.mark.parametrize("name", ["decode", "random-lists-decode-batch"])
def test_the_union_of_a_few_tokens(name: str) -> None:
    """The public function gives so few tokens to the other design."""

    def twin(q: Any, k: Any, v: Any, blocks: Any, config: Any, query_start: Any = None, lengths: Any = None) -> Any:
        where = placement("twin", q, k, query_start, lengths)
        return union.attend_union(q, k, v, blocks, *where, config)[0]

    check_attention(twin, reference.sparse_attention, ROWS[name].build())


class NoLaunch:
    """Stands in for a jitted function."""

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *arguments, **constants: None


class Reads(TorchDispatchMode):
    """Counts what would wait for a device: values of tensors that become Python numbers."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@torch.no_grad()
@pytest.mark.parametrize("name", ["decode", "chunk-at-an-offset"])
def test_a_model_reads_no_value_off_the_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each read would wait for everything launched before it, once a layer and token."""
    q, k, v, lists, config, *_ = ROWS[name].build()
    monkeypatch.setenv("MINICPM_BACKEND", "triton")
    for module in (blocks, one_token, union):
        for attribute, value in vars(module).items():
            if isinstance(value, InterpretedFunction):
                monkeypatch.setattr(module, attribute, NoLaunch())
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: pytest.fail("tolist reads values"))
    with Reads() as reads:
        reference.attend(q, k, v, config, reference.compress(k, config))
    assert reads.count == 0
    with Reads() as reads:
        sparse_attention(q, k, v, lists, config)
    assert reads.count == 2  # lists from elsewhere are looked at


@pytest.mark.parametrize("design", ["token", "union"])
def test_the_log_sum_exp_is_that_of_the_visible_logits(design: str) -> None:
    q, k, v, blocks, config, *place = ROWS["chunk-at-an-offset"].build()
    where = placement("test", q, k, *place)
    if design == "token":
        lse = one_token.attend_tokens(q[:, :, :4], k, v, blocks[:, :, :4].contiguous(), *where, 16, 2)[1]
    else:
        lse = union.attend_union(q, k, v, blocks, *where, config)[1]
    positions = reference.query_positions(q, k, *place)[:, : lse.shape[2]]
    key = torch.arange(k.shape[2])
    listed = (blocks[:, :, : lse.shape[2], None, :] == (key // 16)[:, None]).any(-1)  # [B, G, t, S]
    visible = listed & (key <= positions[:, None, :, None])
    logits = q[:, :, : lse.shape[2]].double() @ k.double().repeat_interleave(2, 1).transpose(-1, -2) / 4
    expected = logits.masked_fill(~visible.repeat_interleave(2, 1), -torch.inf).logsumexp(-1) / torch.tensor(2.0).log()
    torch.testing.assert_close(lse.double(), expected, rtol=1e-6, atol=2e-6)


def test_order_and_holes_in_a_list_do_not_matter() -> None:
    q, k, v, blocks, *rest = ROWS["chunk-at-an-offset"].build()
    holes = torch.cat((blocks, torch.full_like(blocks[..., :2], -1)), -1)
    shuffled = holes[..., torch.randperm(holes.shape[-1], generator=torch.Generator().manual_seed(0))].contiguous()
    for tokens in (3, 23):
        q_few, lists, few = q[:, :, :tokens].contiguous(), shuffled[:, :, :tokens].contiguous(), blocks[:, :, :tokens]
        expected = sparse_attention(q_few, k, v, few.contiguous(), *rest)
        torch.testing.assert_close(sparse_attention(q_few, k, v, lists.long(), *rest), expected, rtol=1e-5, atol=1e-6)


def test_a_tile_may_mix_whole_and_partial_bands() -> None:
    """One token of every four loses its own block: it alone leaves the shared window."""
    case = ROWS["chunk-at-an-offset"]
    q, k, v, blocks, config, *place = case.build()
    own = reference.query_positions(q, k, *place)[:, None, :, None] // config.block_size
    odd = (torch.arange(case.tokens) % 4 == 1)[:, None]
    blocks = torch.where((blocks == own) & odd, -1, blocks).to(torch.int32)
    check_attention(sparse_attention, reference.sparse_attention, (q, k, v, blocks, config, *place))


def test_a_strided_cache_is_read_in_place() -> None:
    q, k, v, *rest = ROWS["chunk-at-an-offset"].build()
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    assert torch.equal(sparse_attention(*strided, *rest), sparse_attention(q, k, v, *rest))


# ---- gradients -------------------------------------------------------------------------------------------------------


def gradients(
    function: Callable[..., torch.Tensor], arguments: tuple[Any, ...], dtype: torch.dtype
) -> list[torch.Tensor]:
    """[out, dq, dk, dv] for a fixed gradient of out; with one visible key dq and dk are 0, and what rounding leaves of
    them in float64 is taken for 0."""
    leaves = [x.to(dtype).detach().requires_grad_() for x in arguments[:3]]
    dout = torch.randn(arguments[0].shape, generator=torch.Generator().manual_seed(1)).to(arguments[0].dtype)
    with poisoned_memory():
        out = function(*leaves, *arguments[3:])
        results = [out.detach(), *torch.autograd.grad(out, leaves, dout.to(out.dtype))]
    return [torch.where(x.abs() < 1e-14, 0.0, x) for x in results] if dtype == torch.float64 else results


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize(
    "name", ["one-token", "block-plus-1", "group-16", "chunk-at-an-offset", "block-is-one-stride", "padded-batch"]
)
def test_gradients(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backward, "CHUNK", 32)  # so that a list has several chunks
    arguments = ROWS[name].build(dtype)
    expected = gradients(reference.sparse_attention, arguments, torch.float64)
    actual = gradients(sparse_attention, arguments, dtype)
    own = gradients(reference.sparse_attention, arguments, dtype)
    assert_as_close(actual, own, expected, largest_logit(*arguments[:2]), "(out, dq, dk, dv)")


def test_long_rows_of_bits_are_walked_in_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Along a row (blocks of a tile) and along a column (tiles of a block) there may be more than one step holds."""
    arguments = ROWS["chunk-at-an-offset"].build()
    expected, own = (gradients(reference.sparse_attention, arguments, t) for t in (torch.float64, torch.float32))
    monkeypatch.setattr(union, "CHUNK", 32)
    monkeypatch.setattr(backward, "COLUMN", 2)
    monkeypatch.setattr(backward, "CHUNK", 4)
    actual = gradients(sparse_attention, arguments, torch.float32)
    assert_as_close(actual, own, expected, largest_logit(*arguments[:2]))
    actual[2][0, 0, 17] = 0.0  # the planted bug: the gradient of one key is lost
    with pytest.raises(AssertionError, match="error relative"):
        assert_as_close(actual, own, expected, largest_logit(*arguments[:2]))


def test_gradients_of_lists_without_forced_blocks() -> None:
    case = SparseAttentionCase("random", 40, 90, random_lists=True)
    expected, own = (gradients(reference.sparse_attention, case.build(), t) for t in (torch.float64, torch.float32))
    actual = gradients(sparse_attention, case.build(), torch.float32)
    assert_as_close(actual, own, expected, largest_logit(*case.build()[:2]))


def test_gradients_have_the_same_bits_every_time() -> None:
    arguments = ROWS["block-plus-1"].build()
    first, second = (gradients(sparse_attention, arguments, torch.float32) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_it_trains() -> None:
    """Three steps of gradient descent on q, k and v follow those of the reference."""
    q, k, v, *rest = ROWS["block-plus-1"].build()
    target = torch.randn(q.shape, generator=torch.Generator().manual_seed(2))
    losses: list[list[float]] = []
    for function in (sparse_attention, reference.sparse_attention):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        optimizer = torch.optim.SGD(leaves, lr=5.0)
        losses.append([])
        for _ in range(3):
            loss = (function(*leaves, *rest) - target).square().mean()
            losses[-1].append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0][2] < losses[0][0]


# ---- planted bugs ----------------------------------------------------------------------------------------------------


class Planted:
    """A jitted function that is launched with some arguments changed."""

    def __init__(self, function: Any, change: dict[str, Callable[[Any], Any]]) -> None:
        self.function, self.change = function, change

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*arguments: Any, **keywords: Any) -> None:
            named = dict(zip(self.function.arg_names, arguments, strict=False)) | keywords
            self.function[grid](**{name: self.change.get(name, lambda x: x)(x) for name, x in named.items()})

        return launch


@pytest.mark.parametrize(
    ("kernel", "change"),
    [
        ("_window", {"scale_log2": lambda x: x * 4}),
        ("_union", {"scale_log2": lambda x: x * 4}),
        ("_window", {"first_ptr": lambda x: x + 1}),
        ("_union", {"seed_lse_ptr": torch.zeros_like}),
        ("_union", {"seed_lse_ptr": lambda x: x + 1}),
        ("_union", {"seed_ptr": torch.zeros_like}),
        ("_union", {"past_ptr": torch.zeros_like, "count_ptr": torch.zeros_like}),
    ],
    ids=[
        "the window's scale is dropped",
        "the union's scale is dropped",
        "the causal mask is one off",
        "the softmax starts from weight 1",
        "the seed is in another base",
        "the window's result is lost",
        "the union is not walked",
    ],
)
def test_a_planted_bug_is_caught(
    kernel: str, change: dict[str, Callable[[Any], Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ROWS["chunk-at-an-offset"].build()
    monkeypatch.setattr(union, kernel, Planted(getattr(union, kernel), change))
    with pytest.raises(AssertionError, match="error relative|NaN or infinite"):
        check_attention(sparse_attention, reference.sparse_attention, arguments)


def test_a_flipped_causal_sign_is_caught() -> None:
    """Positions counted backwards: every token sees the keys after it."""
    q, k, v, blocks, config, *_ = ROWS["block-plus-1"].build()

    def flipped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any) -> torch.Tensor:
        return sparse_attention(q.flip(2), k.flip(2), v.flip(2), *rest).flip(2)

    with pytest.raises(AssertionError, match="error relative"):
        check_attention(flipped, reference.sparse_attention, (q, k, v, blocks, config))


# ---- refusals --------------------------------------------------------------------------------------------------------

Q, K, BLOCKS = torch.ones(1, 4, 9, 16), torch.ones(1, 2, 30, 16), torch.zeros(1, 2, 9, 3, dtype=torch.int32)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"v": K[:, :, :29]}, r"v has shape \[1, 2, 29, 16\], expected \[1, 2, 30, 16\] like k"),
        ({"v": K.half()}, "v is torch.float16 on cpu, expected torch.float32"),
        ({"k": K.double(), "v": K.double()}, "k is torch.float64, expected"),
        ({"q": Q[..., :8], "k": K[..., :8], "v": K[..., :8]}, "head_dim 8, expected one of"),
        ({"blocks": BLOCKS.float()}, "blocks is torch.float32, expected torch.int32 or torch.int64"),
        ({"blocks": BLOCKS[:, :, :8].contiguous()}, r"blocks has shape \[1, 2, 8, 3\], expected \[1, 2, 9, 'K'\]"),
        ({"blocks": BLOCKS + 2}, r"blocks hold 2..2, expected -1..1"),
        ({"blocks": BLOCKS - 2}, r"blocks hold -2..-2, expected -1..1"),
        ({"query_start": 22}, r"query_start \[22\] \+ 9 queries exceeds the 30 keys"),
    ],
)
def test_arguments_are_checked(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=f"sparse_attention: .*{words}"):
        sparse_attention(**({"q": Q, "k": K, "v": K, "blocks": BLOCKS, "config": SMALL} | change))
