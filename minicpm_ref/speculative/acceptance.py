"""Which drafted tokens are kept, so that not one probability changes.

Problem. A cheap draft guesses several tokens, the target scores all of them in one pass, and somebody must decide how
many stay. "Keep a guess when the target likes it" gives text that looks right and has another distribution.

Idea. Couple the draft with the target: accept in such a way that, whatever was drafted, each emitted token has exactly
the law p that plain decoding would have sampled it from. Three rules, each right for one way of drafting and wrong for
the others:

- `accept_onehot`: the draft is deterministic (argmax chain, top-k tree, copied n-gram). Sample the target's own token
  at a node, and go to the child that holds it, if there is one. A child c is taken with probability p(c), and what is
  emitted is always a sample of p: there is nothing to correct.
- `accept_sampled_chain`: token y was drawn from q. Accept it with probability min(1, p(y) / q(y)); else emit a token
  of the residual max(p - q, 0), normalised. Accepting gives min(p, q), the residual adds the rest of p.
- `accept_multi_round`: several siblings drawn from q at each node; the same test one sibling after another, where p
  becomes the residual after each rejection.

In all of them a round that accepts everything still emits one more token, the bonus, since the target has already
scored the place after the last draft. Tokens per target pass are therefore 1 + accepted, never fewer than one.

p must be the *processed* distribution of each node (temperature, top-k, top-p, penalties over that node's own
ancestors); q must be exactly the law that was drawn from. Uniform numbers come from outside: the functions are pure,
and the statistical tests run the very code that serves. Everything is computed in float64.

Left out: "typical" acceptance and thresholds below 1. They are faster and not lossless.

Sources: Leviathan et al., arXiv 2211.17192; Chen et al., arXiv 2302.01318 (the chain); SpecInfer, arXiv 2305.09781
(trees, several rounds); the match of a sampled token against a tree is how CPM.cu (OpenBMB) verifies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Acceptance:
    """Outcome of one round. `tokens`: the accepted drafts in order, then the extra token (residual or bonus). `path`:
    the nodes that stay in the target's cache, root first, one for each token."""

    tokens: list[int]
    path: list[int]

    @property
    def accepted(self) -> int:
        """How many drafted tokens were kept."""
        return len(self.tokens) - 1


def draw(p: ArrayLike, uniform: float) -> int:
    """The token that `uniform` in [0, 1) picks from weights p [V], which need not sum to 1.

    Token i is picked for uniforms in [sum before i, sum with i) / total, so one of weight 0 never is, whatever the
    uniform. Raises ValueError for a uniform outside [0, 1) and for weights that are not a distribution.

    >>> draw([0.0, 0.3, 0.0, 0.7], 0.0), draw([0.0, 0.3, 0.0, 0.7], 0.3)
    (1, 3)
    """
    if not 0 <= uniform < 1:
        raise ValueError(f"uniform = {uniform}: expected 0 <= uniform < 1")
    upper = np.cumsum(np.asarray(p, np.float64))
    total = upper[-1]
    if not 0 < total < np.inf:
        raise ValueError(f"weights sum to {total}: expected a positive, finite sum")
    # the product may round up to the total, which lies beyond the last token of positive weight
    return int(min(np.searchsorted(upper, uniform * total, "right"), np.searchsorted(upper, total, "left")))


def match_path(choose: Callable[[int], int], tokens: Sequence[int], parent: Sequence[int]) -> Acceptance:
    """Walk from the root, at each node to the child that holds `choose(node)`, and stop where there is none.

    tokens [n] and parent [n] describe the tree: node 0 is the root (parent -1, its token is already emitted), parents
    come before their children. `choose` gives the target's own token after a node: its argmax, or a sample of its law.
    It is called for the nodes on the path alone. Among siblings with the same token the first is taken.

    Raises ValueError for a parent array that is not a tree in that order.
    """
    if len(tokens) != len(parent) or not len(parent) or parent[0] != -1:
        raise ValueError(f"{len(tokens)} tokens, parent = {list(parent)}: expected equal lengths and parent[0] = -1")
    children: list[list[int]] = [[] for _ in parent]
    for node in range(1, len(parent)):
        if not 0 <= parent[node] < node:
            raise ValueError(f"parent[{node}] = {parent[node]}: expected a node before it, 0 to {node - 1}")
        children[parent[node]].append(node)
    path, emitted = [0], []
    while True:
        token = choose(path[-1])
        emitted.append(token)
        child = next((node for node in children[path[-1]] if tokens[node] == token), None)
        if child is None:
            return Acceptance(emitted, path)
        path.append(child)


def accept_onehot(
    p: ArrayLike, tokens: Sequence[int], parent: Sequence[int], uniforms: Sequence[float] | Array
) -> Acceptance:
    """Accept from a tree (or chain) of deterministic drafts by sample-and-match.

    p [n, V]: the target's law after each node. tokens [n], parent [n]: the drafts; node 0 is the root, with parent -1.
    uniforms [n] in [0, 1): one for each node. A greedy p (all mass on the argmax) makes this greedy verification.

    Lossless for every tree that does not depend on `uniforms`: pruned, reranked, copied, typed by hand.
    Raises ValueError for shapes that do not fit.

    >>> accept_onehot([[0, 1, 0], [0, 0, 1]], tokens=[5, 1], parent=[-1, 0], uniforms=[0.5, 0.5]).tokens
    [1, 2]
    """
    law = _laws("p", p, len(tokens))
    if len(uniforms) < len(tokens):
        raise ValueError(f"{len(uniforms)} uniforms: expected one for each of the {len(tokens)} nodes")
    return match_path(lambda node: draw(law[node], float(uniforms[node])), tokens, parent)


def accept_sampled_chain(p: ArrayLike, q: ArrayLike, y: Sequence[int], uniforms: Sequence[float] | Array) -> Acceptance:
    """Accept from a chain of drafts y_i that were drawn from q_i.

    p [g + 1, V]: the target's law before each draft and after the last. q [g, V]: the law each draft was drawn from,
    over the whole vocabulary (0 where the draft cannot go). y [g]: the drafts. uniforms [g + 1] in [0, 1): one for each
    test and one for the extra token, which must not share one.

    Raises ValueError for shapes that do not fit, and for a draft that its own q calls impossible.

    >>> accept_sampled_chain([[0.5, 0.5], [0, 1]], [[1.0, 0.0]], y=[0], uniforms=[0.4, 0.0]).tokens
    [0, 1]
    """
    steps = len(y)
    target, draft = _laws("p", p, steps + 1), _laws("q", q, steps)
    if len(uniforms) < steps + 1:
        raise ValueError(f"{len(uniforms)} uniforms: expected {steps + 1}, one a draft and one for the extra token")
    extra = float(uniforms[steps])
    for i, token in enumerate(y):
        law = _test(target[i], draft[i], token, float(uniforms[i]))
        if law is not None:  # rejected: what follows was drafted after a token that is not there
            return Acceptance([*map(int, y[:i]), draw(law, extra)], list(range(i + 1)))
    return Acceptance([*map(int, y), draw(target[steps], extra)], list(range(steps + 1)))


def accept_multi_round(
    p: ArrayLike,
    q: ArrayLike,
    tokens: Sequence[int],
    parent: Sequence[int],
    uniforms: Sequence[float] | Array,
    replacement: bool = False,
) -> Acceptance:
    """Accept from a tree whose siblings were drawn one after the other from q of their parent.

    p [n, V]: the target's law after each node. q [n, V]: the law that the children of each node were drawn from
    (anything for a leaf). tokens [n], parent [n]: as in `accept_onehot`, siblings in the order in which they were
    drawn. uniforms [n] in [0, 1): number v tests node v, number 0 draws the extra token.

    `replacement` says how siblings were drawn: independently from q, or each from q without its elder siblings,
    renormalised. Not for trees that were pruned or reranked by score: then q is not the law of what is left.
    Raises ValueError for shapes that do not fit, and for a draft that its q calls impossible.
    """
    target, draft = _laws("p", p, len(tokens)), _laws("q", q, len(tokens))
    if len(uniforms) < len(tokens):
        raise ValueError(f"{len(uniforms)} uniforms: expected one for each of the {len(tokens)} nodes")
    path: list[int] = [0]
    emitted: list[int] = []
    while True:
        law, guess = target[path[-1]], draft[path[-1]].copy()
        accepted = None
        for node in (v for v in range(len(parent)) if parent[v] == path[-1]):
            rest = _test(law, guess, tokens[node], float(uniforms[node]))
            if rest is None:
                accepted = node
                break
            law = rest / rest.sum()
            if not replacement:
                guess[tokens[node]] = 0.0
                guess /= guess.sum() or 1.0
        if accepted is None:
            return Acceptance([*emitted, draw(law, float(uniforms[0]))], path)
        emitted.append(int(tokens[accepted]))
        path.append(accepted)


def acceptance_rate(p: ArrayLike, q: ArrayLike) -> Array:
    """The chance [...] that a draft of q [..., V] passes the test against p [..., V]: sum of min(p, q)."""
    return np.minimum(np.asarray(p, np.float64), np.asarray(q, np.float64)).sum(-1)


def _test(p: Array, q: Array, token: int, uniform: float) -> Array | None:
    """None when `token`, drawn from q [V], passes against p [V]; else the weights [V] that the token is drawn from
    instead."""
    if not q[token] > 0:
        raise ValueError(f"draft token {token} has q = {q[token]}: it cannot have been drawn from this law")
    if uniform * q[token] < p[token]:  # strict, so that a token with p = 0 never passes
        return None
    residual = np.maximum(p - q, 0.0)
    return residual if residual.sum() > 0 else p  # p == q up to rounding, where a rejection is rounding, too


def _laws(name: str, law: ArrayLike, rows: int) -> Array:
    found = np.asarray(law, np.float64)
    if rows == 0 and found.size == 0:  # an empty chain has no laws
        return found.reshape(0, 0)
    if found.ndim != 2 or found.shape[0] != rows:
        raise ValueError(f"{name} has shape {list(found.shape)}: expected [{rows}, V]")
    return found
