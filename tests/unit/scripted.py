"""An executor that says what it is told: exact tests of text need known tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from minicpm_ref.checkpoint import EMBEDDED
from minicpm_ref.config import ModelConfig
from minicpm_ref.engine import Engine
from minicpm_ref.engine.executor import Logits, check_tokens
from minicpm_ref.engine.scheduler import Scheduler
from minicpm_ref.model import MiniCPM
from minicpm_ref.tokenizer import Tokenizer

Script = Callable[[list[int]], Sequence[int]]
PEAK = 40.0  # over 0 for all others: no temperature that a test uses draws another token
TOKENIZER = Tokenizer.load(EMBEDDED / "base" / "tokenizer.json")


class ScriptedExecutor:
    """Answers each prompt with the ids of `script(prompt)`, then with the id 0. `fail_at`: the number of the call, from
    0 on, that raises; `before_call` is called first in each."""

    def __init__(self, vocab_size: int, script: Script, batch: int = 1, max_length: int = 512):
        sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1}
        self.config = ModelConfig(vocab_size, **sizes, intermediate_size=8, max_position_embeddings=max_length)
        self.script, self.batch, self.max_length = script, batch, max_length
        self.rows: list[list[int]] = [[] for _ in range(batch)]
        self.prompts = [0] * batch  # lengths
        self.calls: list[tuple[str, tuple[int, ...]]] = []
        self.fail_at: int | None = None
        self.error: BaseException = RuntimeError("planted")
        self.before_call: Callable[[], object] = lambda: None

    def _call(self, name: str, rows: Sequence[int]) -> None:
        self.before_call()
        self.calls.append((name, tuple(rows)))
        if self.fail_at == len(self.calls) - 1:
            raise self.error

    def _logits(self, row: int) -> Logits:
        prompt, tokens = self.rows[row][: self.prompts[row]], self.rows[row]
        script = self.script(prompt)
        place = len(tokens) - len(prompt)
        logits = np.zeros(self.config.vocab_size, np.float32)
        logits[script[place] if place < len(script) else 0] = PEAK
        return logits

    def prefill(self, row: int, ids: Sequence[int], final_length: int | None = None) -> Logits:
        check_tokens(self, row, ids, len(self.rows[row]))
        self.rows[row] += ids
        self._call("prefill", [row])
        self.prompts[row] = len(self.rows[row])
        return self._logits(row)

    def decode(self, rows: Sequence[int], ids: Sequence[int]) -> Logits:
        for row, token in zip(rows, ids, strict=True):
            check_tokens(self, row, [token], len(self.rows[row]))
            self.rows[row].append(token)
        self._call("decode", rows)
        return np.stack([self._logits(row) for row in rows])

    def truncate(self, row: int, length: int) -> None:
        assert length <= len(self.rows[row])
        del self.rows[row][length:]

    def length(self, row: int) -> int:
        return len(self.rows[row])

    def memory(self) -> dict[str, int]:
        return {"weights": 0, "cache": 0, "scratch": 0}


def encode(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_bos=False)


def scripted_engine(
    script: Sequence[int] | Script, batch: int = 1, max_length: int = 512, chunk_length: int = 512
) -> Engine:
    """An engine that answers every prompt with the ids `script`, or with those of `script(prompt)`."""
    answer = script if callable(script) else lambda prompt: script
    executor = ScriptedExecutor(TOKENIZER.vocab_size, answer, batch, max_length)
    engine = Engine(MiniCPM(executor.config), TOKENIZER, executor="torch", max_length=8)
    engine.executor, engine.max_length = executor, max_length
    engine._scheduler = Scheduler(executor, chunk_length)
    return engine
