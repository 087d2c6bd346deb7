"""Training a draft head as it will be used: on its own states, several steps deep.

Problem. At inference only the first guess sees the target's features; every further one sees what the head made of the
guess before. A head trained on true features alone meets its own states for the first time when it drafts.

Idea ("training-time test"). Unroll the recurrence in training. Step 0 runs the head on the true features of every
token; step i runs it again on the states of step i - 1, with the tokens moved on by one. After S steps row t has been
asked for tokens t + 2, ..., t + 1 + S, exactly as if drafting had begun at every token of the text at once.

What a row may look at is the subtle part. At inference, the i-th guess that began at row t sees the rows made from
true features up to t, and then only the guesses of its own chain. So at step i the keys of row t are the whole causal
block of step 0, K_0[s] for s <= t, and of each later step j <= i its own diagonal, K_j[t]; one softmax over all of
them. Row t stands at rotary position t + i. A test compares every (step, row) with a draft of that depth.

The target is the teacher: cross-entropy against its distribution, restricted to the head's vocabulary, on the rows
whose predicted token the target itself wrote and whose best token the head can say. Nothing is detached between steps.

Sources: EAGLE-3, arXiv 2503.01840; the masks of SafeAILab/EAGLE after the correction of September 2025.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minicpm_ref.model import DecoderLayer, MiniCPM
from minicpm_ref.speculative.draft_head import DraftHead, DraftHeadConfig, Memory
from minicpm_ref.speculative.vocabulary import offsets

STEP_DECAY = 0.8  # weight of a step's loss relative to the step before


def fresh_head(target: MiniCPM, kept: Tensor, layers: tuple[int, ...], seed: int = 0) -> DraftHead:
    """An untrained head for `target` that can say the tokens `kept`, built from the target's last layer.

    Its output matrix and final norm are the target's, `fc` passes the highest stream on, and the layer is the target's
    last one, which does not yet look at the embedding half of its input: small random numbers stand there. This head
    already speaks the target's language; starting from random numbers in every place costs most of a short run.
    """
    head = DraftHead(DraftHeadConfig.for_target(target.config, len(kept), layers), target.model.embed_tokens.weight)
    generator = torch.Generator().manual_seed(seed)
    last = cast(DecoderLayer, target.model.layers[-1])
    width, own = target.config.hidden_size, head.midlayer
    with torch.no_grad():
        for parameter in head.parameters():
            if parameter.ndim == 2:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
        head.d2t.copy_(offsets(kept))
        output = target.model.embed_tokens if target.config.tie_word_embeddings else target.lm_head
        head.lm_head.weight.copy_(output.weight[kept] / target.config.logit_divisor)
        head.norm.weight.copy_(target.model.norm.weight)
        head.fc.weight[:, -width:] += torch.eye(width)
        for name in ("q_proj", "k_proj", "v_proj"):
            mine, theirs = (
                cast(nn.Linear, attention.get_submodule(name)) for attention in (own.self_attn, last.self_attn)
            )
            mine.weight[:, width:] = theirs.weight
        # the head's layer has no residual multiplier: it goes into the matrices that write to the residual
        own.self_attn.o_proj.weight.copy_(last.self_attn.o_proj.weight * last.residual_scale)
        own.mlp.load_state_dict(last.mlp.state_dict())
        own.mlp.down_proj.weight.mul_(last.residual_scale)
        own.hidden_norm.load_state_dict(last.input_layernorm.state_dict())
        own.post_attention_layernorm.load_state_dict(last.post_attention_layernorm.state_dict())
    return head


class StepResult(NamedTuple):
    """Of each step: `losses` [S] in nats, with gradient; `acceptance` [S], the mean chance that a sampled guess would
    pass the target's test, given that those before it did."""

    losses: Tensor
    acceptance: Tensor


class TrainingTimeTest(nn.Module):
    """`head` unrolled for `steps` against `target`, which is frozen and not part of this module's state."""

    def __init__(self, head: DraftHead, target: MiniCPM, steps: int = 7):
        super().__init__()
        if steps < 1:
            raise ValueError(f"steps = {steps}: expected at least 1")
        self.head, self.steps = head, steps
        self._target = [target.requires_grad_(False).eval()]  # in a list: its weights are not this module's

    def forward(self, ids: Tensor, written: Tensor, steps: int | None = None) -> StepResult:
        """ids [B, T]: texts. written [B, T] (bool): the tokens that the target wrote, which are what is learned.
        `steps`: how many steps to unroll, None for all."""
        target, head = self._target[0], self.head
        with torch.no_grad():
            states = target.hidden_states(ids)
            features = torch.cat([states[layer] for layer in head.layers], dim=-1)
            teacher = target.logits(states[-1]).float()  # [B, T, V]
            known = torch.isin(teacher.argmax(-1), head.vocabulary)
            whole = teacher.logsumexp(-1, keepdim=True)
            teacher = teacher[..., head.vocabulary]
            share = (teacher - whole).exp()  # the target's probabilities of the head's tokens, [B, T, Vd]
            teacher = teacher.softmax(-1)
        losses, acceptance = [], []
        for step, logits in enumerate(self.unroll(ids, features, steps)):
            log_q = logits.float().log_softmax(-1)  # [B, T - 1, Vd]: row t guesses token t + 2 + step,
            after = 1 + step  # and what the target says of that stands at token t + 1 + step
            asked = _ahead(written, after + 1)  # rows whose guessed token the target wrote
            cross = -(_ahead(teacher, after) * log_q).sum(-1)
            losses.append((cross * (asked & _ahead(known, after))).mean())
            with torch.no_grad():
                passed = torch.minimum(_ahead(share, after), log_q.exp()).sum(-1)
                acceptance.append((passed * asked).sum() / asked.sum().clamp(min=1))
        return StepResult(torch.stack(losses), torch.stack(acceptance))

    def unroll(self, ids: Tensor, features: Tensor, steps: int | None = None) -> list[Tensor]:
        """Draft logits [B, T - 1, Vd] of every step; features [B, T, 3C] of the target."""
        head, rows = self.head, ids.shape[1] - 1
        past: list[Memory] = []
        out = []
        state = features[:, :rows]
        for step in range(self.steps if steps is None else steps):
            tokens = _ahead(ids, 1 + step)  # teacher-forced, zeros where the text has ended
            inputs, residual = head.inputs(tokens, state)
            positions = torch.arange(rows, device=ids.device) + step
            q, own = head.rotated(inputs, positions)
            past.append(own)
            state = head.finish(residual, _attend(q, past))
            out.append(head.logits(state))
        return out


def _attend(q: Tensor, past: list[Memory]) -> Tensor:
    """q [B, H, T, D] over the causal block of the first memory and the diagonals of the others -> [B, H, T, D]."""
    group = q.shape[1] // past[0].keys.shape[1]
    keys = [memory.keys.repeat_interleave(group, 1) for memory in past]
    values = [memory.values.repeat_interleave(group, 1) for memory in past]
    rows = q.shape[2]
    block = q @ keys[0].mT
    block = block.masked_fill(~torch.ones(rows, rows, dtype=torch.bool, device=q.device).tril(), -torch.inf)
    diagonals = [(q * k).sum(-1, keepdim=True) for k in keys[1:]]
    weights = torch.cat([block, *diagonals], -1).mul(q.shape[-1] ** -0.5).float().softmax(-1).to(q.dtype)
    out = weights[..., :rows] @ values[0]
    for index, v in enumerate(values[1:]):
        out = out + weights[..., rows + index, None] * v
    return out


def _ahead(x: Tensor, by: int) -> Tensor:
    """The first T - 1 rows of x [B, T, ...] moved `by` to the left, zeros behind its end."""
    moved = x[:, by : by + x.shape[1] - 1]
    missing = x.shape[1] - 1 - moved.shape[1]
    return moved if missing == 0 else F.pad(moved, (0, 0) * (x.ndim - 2) + (0, missing))
