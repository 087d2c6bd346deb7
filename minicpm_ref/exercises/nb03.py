"""Checkers of 03_cache_and_roofline: tokens for free, the speed of a batch, and a stream of whole characters."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

from minicpm_ref.config import ModelConfig
from minicpm_ref.exercises import attempt
from minicpm_ref.tokenizer import Tokenizer


def check_free_tokens(free_tokens: Callable[[ModelConfig, int, float, float], int]) -> str:
    """Check `free_tokens(config, past, bandwidth, peak)`: tokens that one pass can add while memory is the limit."""

    def check() -> None:
        for name in ("minicpm4-0.5b", "minicpm4.1-8b"):
            config = ModelConfig.preset(name)
            for past in (0, 1000, 2**17):
                for peak in (4e11, 2e12):
                    found = free_tokens(config, past, 50e9, peak)
                    assert isinstance(found, int), "tokens are counted in whole numbers"
                    for count, free in ((found, True), (found + 1, False)):
                        flops = sum(config.flops_per_token(past + i + 1) for i in range(count))
                        in_time = flops / peak <= config.decode_bytes(past + count) / 50e9
                        assert in_time == free, (
                            f"{name}, past {past}, peak {peak:.0e}: {found} tokens, but {count} would "
                            + ("be slower than the bytes" if free else "be free as well")
                        )
        assert free_tokens(config, 0, 1e15, 1e12) == 0, "endless bandwidth: not even one token is free"

    return attempt("free_tokens", check)


def check_decode_rate(decode_rate: Callable[[ModelConfig, int, int, float, float], float]) -> str:
    """Check `decode_rate(config, batch, context_length, bandwidth, peak)` in tokens/s."""

    def check() -> None:
        config = ModelConfig.preset("minicpm4.1-8b")
        alone = decode_rate(config, 1, 4096, 50e9, 2e12)
        assert math.isclose(alone, 50e9 / config.decode_bytes(4096), rel_tol=1e-6), "batch 1 is limited by memory"
        crowd = decode_rate(config, 1024, 128, 50e9, 2e12)
        assert math.isclose(crowd, 2e12 / config.flops_per_token(128), rel_tol=1e-6), "1024 are limited by arithmetic"
        read = config.decode_bytes(0) + 8 * 131072 * config.kv_bytes_per_token()
        assert math.isclose(decode_rate(config, 8, 131072, 50e9, 2e13), 8 * 50e9 / read, rel_tol=1e-6), (
            "8 at 128K: the weights are read once, the cache of every sequence"
        )

    return attempt("decode_rate", check)


def check_stream_pieces(stream_pieces: Callable[[Tokenizer, Iterable[int]], Iterator[str]]) -> str:
    """Check `stream_pieces(tokenizer, tokens)`: pieces of text as tokens arrive, never a part of a character."""

    def check() -> None:
        line = "def return self import if not in for x and else is None the value of a list\n"
        tokenizer = Tokenizer.train([line, line], vocab_size=305, alphabet=30)
        for text in ("return x", "if 猫 in list: # 小钢炮 🐈\n", "é", "🐈🐈 the value"):
            tokens = tokenizer.encode(text, add_bos=False)
            pieces = list(stream_pieces(tokenizer, iter(tokens)))
            assert "".join(pieces) == text, f"{text!r}: the pieces give {''.join(pieces)!r}"
            assert not any("\ufffd" in piece for piece in pieces), f"{text!r}: a piece holds part of a character"
        arrived = 0

        def feed() -> Iterator[int]:
            nonlocal arrived
            for token in tokenizer.encode("x猫x", add_bos=False):  # one token, three bytes, one token
                arrived += 1
                yield token

        first = next(piece for piece in stream_pieces(tokenizer, feed()) if piece)
        assert (first, arrived) == ("x", 1), "the first character is complete after one token, and comes then"
        cut = tokenizer.encode("x猫", add_bos=False)[:-1]
        pieces = list(stream_pieces(tokenizer, cut))
        assert "".join(pieces) == tokenizer.decode(cut), "a text that ends inside a character must still come out whole"

    return attempt("stream_pieces", check)
