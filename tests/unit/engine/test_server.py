"""The server, driven by the official client and by raw HTTP, over an engine whose tokens are known."""

from __future__ import annotations

import json
import math
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import openai
import pytest
import uvicorn
from openai.types.chat import ChatCompletionChunk
from scripted import PEAK, TOKENIZER, encode, scripted_engine

from minicpm_ref.engine import Engine
from minicpm_ref.engine.server import create_app

SCRIPT = encode("The quick brown fox jumps over it")
G = TOKENIZER.decode(SCRIPT)
EOS = TOKENIZER.eos_ids[0]
HI = [{"role": "user", "content": "hi"}]


@contextmanager
def served(engine: Engine, **options) -> Iterator[str]:
    """The address of a server that runs for the length of the block."""
    config = uvicorn.Config(create_app(engine, **options), port=0, log_level="error", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def fox() -> Iterator[str]:
    """A server whose every answer is the fox."""
    with served(scripted_engine([*SCRIPT, EOS], batch=4)) as address:
        yield address


def client(address: str, **options) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", api_key=options.pop("api_key", "none"), max_retries=0, **options)


def post(address: str, path: str, content: object, **options) -> httpx.Response:
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    return httpx.post(f"{address}/v1/{path}", content=body, timeout=20, **options)


def chunks(response: httpx.Response) -> list[dict]:
    lines = [line for line in response.text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1] if not line.startswith(":")]


# ---- answers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("limit", "reason"), [(1, "length"), (len(SCRIPT), "length"), (len(SCRIPT) + 1, "stop")])
def test_streamed_or_not_the_same_answer(fox: str, limit: int, reason: str) -> None:
    """Traps 2.1 and 2.2."""
    text, options = TOKENIZER.decode(SCRIPT[:limit]), {"model": "minicpm-ref", "max_tokens": limit}
    with client(fox) as api:
        whole = api.chat.completions.create(messages=HI, **options)
        assert (whole.choices[0].message.content, whole.choices[0].finish_reason) == (text, reason)
        assert whole.choices[0].logprobs is None
        assert whole.usage.completion_tokens == limit
        assert whole.usage.total_tokens == limit + whole.usage.prompt_tokens
        plain = api.completions.create(prompt="hi", **options)
        assert (plain.choices[0].text, plain.choices[0].finish_reason) == (text, reason)
    for usage in (False, True):
        more = {"stream": True} | ({"stream_options": {"include_usage": True}} if usage else {})
        response = post(fox, "chat/completions", {"messages": HI, **options, **more})
        assert response.headers["content-type"].startswith("text/event-stream")
        assert (response.headers["cache-control"], response.headers["x-accel-buffering"]) == ("no-cache", "no")
        found = [ChatCompletionChunk.model_validate(chunk) for chunk in chunks(response)]
        if usage:
            assert found[-1].choices == []
            last = found.pop().usage
            assert (last.prompt_tokens, last.completion_tokens) == (whole.usage.prompt_tokens, limit)
            assert all(chunk.usage is None for chunk in found)
        assert found[0].choices[0].delta.role == "assistant"
        assert "".join(chunk.choices[0].delta.content or "" for chunk in found) == text
        assert [chunk.choices[0].finish_reason for chunk in found] == [None] * (len(found) - 1) + [reason]
        assert len({(chunk.id, chunk.created, chunk.object) for chunk in found}) == 1
        response = post(fox, "completions", {"prompt": "hi", **options, **more})
        written = chunks(response)  # the client's own type calls null in `finish_reason` wrong, and the interface not
        assert "".join(chunk["choices"][0]["text"] for chunk in written if chunk["choices"]) == text
        reasons = [chunk["choices"][0]["finish_reason"] for chunk in written if chunk["choices"]]
        assert reasons == [None] * (len(reasons) - 1) + [reason]
        assert {chunk["object"] for chunk in written} == {"text_completion"}


def test_stop_strings(fox: str) -> None:
    """Traps 1.2 and 1.3."""
    for stop in ("own fox", ["own fox"], ["never", "own fox"]):
        for path, prompt in (("chat/completions", {"messages": HI}), ("completions", {"prompt": "hi"})):
            asked = {**prompt, "stop": stop, "max_tokens": 50}
            choice = post(fox, path, asked).json()["choices"][0]
            text = choice["message"]["content"] if "message" in choice else choice["text"]
            assert (text, choice["finish_reason"]) == ("The quick br", "stop")
            streamed = [chunk["choices"][0] for chunk in chunks(post(fox, path, {**asked, "stream": True}))]
            parts = [c["delta"].get("content", "") if "delta" in c else c["text"] for c in streamed]
            assert "".join(parts) == "The quick br"
    for stop in ("", [""], [3], 3):
        refused = post(fox, "chat/completions", {"messages": HI, "stop": stop})
        assert (refused.status_code, refused.json()["error"]["param"].split(".")[0]) == (400, "stop")
    for stop in (None, []):
        assert (
            post(fox, "chat/completions", {"messages": HI, "stop": stop}).json()["choices"][0]["message"]["content"]
            == G
        )


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"messages": None}, "messages"),
        ({"messages": {}}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "banana", "content": "a"}]}, "messages.0.role"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [{"content": "a"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": None}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content"),
        ({"messages": [{"role": "assistant", "content": None, "tool_calls": [{}]}]}, "messages.0.tool_calls"),
        ({"tools": [{}]}, "tools"),
        ({"n": 0}, "n"),
        ({"n": 2}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": "0.5"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": -0.1}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"presence_penalty": 2.5}, "presence_penalty"),
        ({"logit_bias": {"4096": 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias.1"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"enable_thinking": "no"}, "enable_thinking"),
        ({"chat_template_kwargs": {"enable_thinking": 1}}, "chat_template_kwargs.enable_thinking"),
        ({"continue_final_message": True}, "continue_final_message"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
    ],
)
def test_bad_requests_are_refused_by_name(fox: str, change: dict, param: str) -> None:
    """Traps 3.1 to 3.3, streamed, too: the refusal comes before the stream."""
    for stream in (False, True):
        if stream and "stream_options" in change:
            continue
        response = post(fox, "chat/completions", {"messages": HI, "stream": stream, **change})
        error = response.json()["error"]
        assert (response.status_code, error["param"], error["type"]) == (400, param, "invalid_request_error")
        assert len(error["message"]) > 10
    assert post(fox, "chat/completions", {"messages": HI}).json()["choices"][0]["message"]["content"] == G


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"\xff", b'{"messages": [{"role": "user", "content": "a"}], "temperature": NaN}']
    + [b'{"messages": [{"role": "user", "content": "a"}], "temperature": %s}' % n for n in (b"Infinity", b"1e999")],
)
def test_what_is_no_json_is_refused(fox: str, body: bytes) -> None:
    response = post(fox, "chat/completions", body)
    assert response.status_code == 400
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("prompt", [[], [[]], [-1], [[4096]], [1.5], 3, None, [["a"]]])
def test_bad_prompts_are_refused(fox: str, prompt: object) -> None:
    """Trap 3.2."""
    response = post(fox, "completions", {"prompt": prompt})
    assert (response.status_code, response.json()["error"]["param"].split(".")[0]) == (400, "prompt")


def test_good_prompts_in_every_form(fox: str) -> None:
    for prompt, count in (("hi", 1), (["hi", "a b"], 2), ([5, 6], 1), ([[5], [6, 7]], 2), ("", 1), ([""], 1)):
        answer = post(fox, "completions", {"prompt": prompt, "max_tokens": 3, "echo": True}).json()
        text = TOKENIZER.decode(SCRIPT[:3])
        assert [choice["text"].endswith(text) for choice in answer["choices"]] == [True] * count
        assert [choice["index"] for choice in answer["choices"]] == list(range(count))
        assert answer["usage"]["completion_tokens"] == 3 * count
    assert len(post(fox, "completions", {"prompt": "hi"}).json()["choices"][0]["text"]) > 0


def test_forms_of_the_same_message_are_the_same_prompt(fox: str) -> None:
    def tokens(*messages: dict) -> int:
        return post(fox, "chat/completions", {"messages": messages, "max_tokens": 1}).json()["usage"]["prompt_tokens"]

    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert tokens({"role": "user", "content": parts}) == tokens({"role": "user", "content": "one\ntwo"})
    user = {"role": "user", "content": "q"}
    assert tokens({"role": "developer", "content": "be kind"}, user) == tokens(
        {"role": "system", "content": "be kind"}, user
    )
    silent = {"role": "assistant", "content": None}
    assert tokens(user, silent, user) == tokens(user, {"role": "assistant", "content": ""}, user)
    assert tokens({"role": "system", "content": "only"}) > 3
    open_turn = {"messages": [user, {"role": "assistant", "content": "The"}], "max_tokens": 1}
    closed = post(fox, "chat/completions", open_turn).json()["usage"]["prompt_tokens"]
    going_on = post(fox, "chat/completions", open_turn | {"continue_final_message": True}).json()["usage"]
    assert going_on["prompt_tokens"] < closed
    off = {"messages": [user], "max_tokens": 1}
    counts = [
        post(fox, "chat/completions", off | more).json()["usage"]["prompt_tokens"]
        for more in ({}, {"enable_thinking": False}, {"chat_template_kwargs": {"enable_thinking": False}})
    ]
    assert counts[0] < counts[1] == counts[2]


def test_limits_and_the_context() -> None:
    """Trap 3.4."""
    with served(scripted_engine(SCRIPT * 9, max_length=40)) as address:
        used = post(address, "chat/completions", {"messages": HI, "max_tokens": 10**6}).json()
        assert used["usage"]["total_tokens"] == 40
        assert used["choices"][0]["finish_reason"] == "length"
        both = {"messages": HI, "max_tokens": 7, "max_completion_tokens": 5}
        assert post(address, "chat/completions", both).json()["usage"]["completion_tokens"] == 5
        assert post(address, "completions", {"prompt": [5] * 39}).json()["usage"]["completion_tokens"] == 1
        for size in (40, 41):
            for stream in (False, True):
                error = post(address, "completions", {"prompt": [5] * size, "stream": stream})
                assert (error.status_code, error.json()["error"]["code"]) == (400, "context_length_exceeded")
                assert str(size) in error.json()["error"]["message"]
                assert "40" in error.json()["error"]["message"]


def test_thoughts_are_apart_in_every_cut() -> None:
    """Trap 6.2."""
    ids = [TOKENIZER._required_id(f"<0x{byte:02X}>") for byte in b"<think>a</think>ba"] + [EOS]
    with served(scripted_engine(ids)) as address:
        for more, content in (({}, "ba"), ({"stop": ["a"]}, "b"), ({"enable_thinking": False}, "ba")):
            message = post(address, "chat/completions", {"messages": HI, **more}).json()["choices"][0]["message"]
            assert (message["reasoning_content"], message["content"]) == ("a", content)
            found = chunks(post(address, "chat/completions", {"messages": HI, "stream": True, **more}))
            deltas = [chunk["choices"][0]["delta"] for chunk in found]
            assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "a"
            assert "".join(delta.get("content", "") for delta in deltas) == content
        for limit in range(1, 9):
            choice = post(address, "chat/completions", {"messages": HI, "max_tokens": limit}).json()["choices"][0]
            assert (choice["message"]["content"], choice["finish_reason"]) == ("", "length")


# ---- logarithms ----------------------------------------------------------------------------------------------------


def test_logprobs_have_the_shape_of_their_endpoint(fox: str) -> None:
    """Trap 4.2: the scripted logits are PEAK for the next id and 0 for the others."""
    chosen, other = -math.log1p(4095 * math.exp(-PEAK)), -PEAK

    def refuse(name: str) -> None:
        raise AssertionError(name)

    asked = {"messages": HI, "logprobs": True, "max_tokens": 3}
    plain = json.loads(post(fox, "chat/completions", asked).content, parse_constant=refuse)
    entries = plain["choices"][0]["logprobs"]["content"]
    assert [entry["top_logprobs"] for entry in entries] == [[], [], []]
    assert [entry["logprob"] for entry in entries] == pytest.approx([chosen] * 3)
    assert bytes(b for entry in entries for b in entry["bytes"]).decode() == TOKENIZER.decode(SCRIPT[:3])
    top = asked | {"top_logprobs": 5, "logit_bias": {str(SCRIPT[0]): -100}}
    entries = post(fox, "chat/completions", top).json()["choices"][0]["logprobs"]["content"]
    assert [len(entry["top_logprobs"]) for entry in entries] == [5, 5, 5]
    first = entries[0]["top_logprobs"]
    assert [entry["logprob"] for entry in first] == pytest.approx([chosen, *[other] * 4])
    streamed = chunks(post(fox, "chat/completions", asked | {"stream": True}))
    assert sum(len((c["choices"][0]["logprobs"] or {"content": []})["content"]) for c in streamed) == 3
    for count in (0, 2):
        found = post(fox, "completions", {"prompt": "test", "logprobs": count, "max_tokens": 3}).json()
        logprobs = found["choices"][0]["logprobs"]
        assert logprobs["text_offset"][0] == 4
        assert logprobs["text_offset"][1] == 4 + len(TOKENIZER.decode(SCRIPT[:1]))
        assert len(logprobs["tokens"]) == len(logprobs["token_logprobs"]) == 3
        assert [len(top) for top in logprobs["top_logprobs"] or []] == [count] * (3 if count else 0)


# ---- models, errors, keys ------------------------------------------------------------------------------------------


def test_models_and_the_clients_exceptions() -> None:
    """Traps 3.5 and 5.5."""
    engine = scripted_engine([*SCRIPT, EOS])
    with served(engine, model="a/b", api_key="secret", max_body=4000) as address:
        with client(address, api_key="secret") as api:
            assert [model.id for model in api.models.list()] == ["a/b"]
            assert api.models.retrieve("a/b").owned_by == "minicpm_ref"
            with pytest.raises(openai.NotFoundError, match="expected 'a/b'"):
                api.chat.completions.create(model="c", messages=HI)
            with pytest.raises(openai.NotFoundError):
                api.models.retrieve("c")
            with pytest.raises(openai.BadRequestError, match="temperature"):
                api.chat.completions.create(model="a/b", messages=HI, temperature=3)
            with pytest.raises(openai.APIStatusError) as large:
                api.chat.completions.create(model="a/b", messages=[{"role": "user", "content": "x" * 5000}])
            assert large.value.status_code == 413
            assert api.chat.completions.create(model="a/b", messages=HI).choices[0].message.content == G
        for key in (None, "Bearer wrong", "secret", "Basic secret"):
            headers = {"Authorization": key} if key else {}
            refused = httpx.get(f"{address}/v1/models", headers=headers)
            assert (refused.status_code, refused.json()["error"]["type"]) == (401, "authentication_error")
            assert httpx.get(f"{address}/health", headers=headers).status_code == 200
            assert httpx.get(address, headers=headers).status_code == 200
            assert httpx.options(f"{address}/v1/models", headers=headers).status_code == 405
        right = {"Authorization": "bearer   secret"}
        assert httpx.get(f"{address}/v1/models", headers=right).status_code == 200
        foreign = httpx.get(f"{address}/v1/models", headers=right | {"Origin": "https://evil.example"})
        assert foreign.status_code == 403
        assert not [name for name in foreign.headers if name.startswith("access-control")]
        assert httpx.get(f"{address}/v1/models", headers=right | {"Origin": address}).status_code == 200
        for method, path, status in (("GET", "/v1/nothing", 404), ("GET", "/v1/chat/completions", 405)):
            error = httpx.request(method, address + path, headers=right)
            assert (error.status_code, set(error.json()["error"])) == (status, {"message", "type", "param", "code"})

        def endless() -> Iterator[bytes]:  # no Content-Length to look at
            for _ in range(100):
                yield b"x" * 1000

        sent = httpx.post(f"{address}/v1/completions", content=endless(), headers=right)
        assert (sent.status_code, sent.json()["error"]["code"]) == (413, "request_too_large")


def test_a_failing_model_is_an_event_and_the_server_lives() -> None:
    """Trap 2.3."""
    engine = scripted_engine([*SCRIPT, EOS])
    with served(engine) as address:
        engine.executor.fail_at = 3
        response = post(address, "chat/completions", {"messages": HI, "stream": True})
        last = json.loads(response.text.strip().split("\n\n")[-1].removeprefix("data: "))
        assert response.status_code == 200
        assert "planted" in last["error"]["message"]
        engine.executor.fail_at = len(engine.executor.calls) + 2
        whole = post(address, "chat/completions", {"messages": HI})
        assert (whole.status_code, whole.json()["error"]["type"]) == (500, "server_error")
        assert post(address, "chat/completions", {"messages": HI}).json()["choices"][0]["message"]["content"] == G


# ---- load ----------------------------------------------------------------------------------------------------------


def wait_until(check, seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.01)


def test_a_client_that_leaves_frees_its_row() -> None:
    """Trap 5.3: streamed or not, waiting or running."""
    engine = scripted_engine(SCRIPT * 100, max_length=4096)
    engine.executor.before_call = lambda: time.sleep(0.005)
    with served(engine) as address:
        host, port = address.removeprefix("http://").split(":")
        for stream in (True, False):
            for events in (0, 1, 3):
                body = json.dumps({"messages": HI, "stream": stream}).encode()
                head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
                with socket.create_connection((host, int(port))) as raw:
                    raw.sendall(head.encode() + body)
                    wait_until(lambda: engine.active == 1)
                    for _ in range(events if stream else 0):
                        raw.recv(4096)
                wait_until(lambda: engine.active == 0)
        calls = len(engine.executor.calls)
        time.sleep(0.1)
        assert len(engine.executor.calls) == calls  # nothing is made for nobody
        assert httpx.get(f"{address}/health").json() == {"status": "ok", "active": 0}


def test_queue_health_and_order() -> None:
    """Trap 5.4."""
    gate = threading.Event()
    engine = scripted_engine([*SCRIPT, EOS], batch=1)
    engine.executor.before_call = lambda: gate.wait(20)
    with served(engine, queue=2) as address, ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(post, address, "chat/completions", {"messages": HI}) for _ in range(8)]
        wait_until(lambda: sum(one.done() for one in asked) == 5)
        refused = [one.result() for one in asked if one.done()]
        assert [(r.status_code, r.headers["retry-after"], r.json()["error"]["code"]) for r in refused] == [
            (429, "1", "queue_full")
        ] * 5
        start = time.monotonic()
        assert httpx.get(f"{address}/health").json()["active"] == 3
        assert time.monotonic() - start < 2  # a model that stands still does not hold up the loop
        gate.set()
        assert sorted(one.result().status_code for one in asked) == [200] * 3 + [429] * 5


def test_soak_concurrent_clients_of_every_kind() -> None:
    """Eight at a time: good ones, ones that leave, and nonsense; each good text equals that of a lone run."""

    def script(prompt: list[int]) -> list[int]:
        return [*(300 + (7 * prompt[-1] + i) % 500 for i in range(4 + prompt[-1] % 9)), EOS]

    engine = scripted_engine(script, batch=3, chunk_length=3)

    def good(i: int) -> None:
        prompt = [300 + (i * j) % 50 for j in range(1, 4 + i % 7)]
        text = TOKENIZER.decode(script(prompt)[:-1], continues=True)
        found = post(address, "completions", {"prompt": prompt, "max_tokens": 40, "temperature": 0}).json()
        assert found["choices"][0]["text"] == text

    def leaves(i: int) -> None:
        with httpx.stream("POST", f"{address}/v1/completions", json={"prompt": [300 + i], "stream": True}) as response:
            next(response.iter_bytes())

    def nonsense(i: int) -> None:
        bodies = (b"{", b"[]", b'{"prompt": 3}', b'{"prompt": [99999]}', b"x" * 3000, b'{"prompt": []}')
        assert 400 <= post(address, "completions", bodies[i % 6]).status_code < 500

    with served(engine, queue=20, max_body=2000) as address, ThreadPoolExecutor(8) as pool:
        kinds = (good, leaves, good, nonsense)
        list(pool.map(lambda i: kinds[i % 4](i), range(120)))
        wait_until(lambda: not engine.busy)
        assert httpx.get(f"{address}/health").json()["active"] == 0
    assert all(len(row.tokens) == engine.executor.length(row.number) for row in engine._scheduler.rows)


def test_silence_is_filled_with_comments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trap 2.3: headers before the prefill, and signs of life during it."""
    monkeypatch.setattr("minicpm_ref.engine.server.worker.KEEP_ALIVE", 0.05)
    engine = scripted_engine([*SCRIPT, EOS])
    gate = threading.Event()
    engine.executor.before_call = lambda: gate.wait(20)
    with served(engine) as address:
        asked = {"messages": HI, "stream": True}
        with httpx.stream("POST", f"{address}/v1/chat/completions", json=asked, timeout=10) as response:
            assert response.status_code == 200
            lines = response.iter_lines()
            comments = sum(next(lines).startswith(":") for _ in range(12))
            gate.set()
            rest = "\n".join(lines)
        assert comments >= 2
        assert rest.rstrip().endswith("data: [DONE]")


def test_the_page_reads_nothing_from_elsewhere(fox: str) -> None:
    page = httpx.get(fox)
    assert "script-src 'self'" in page.headers["content-security-policy"]
    for name in ("chat.js", "chat.css"):
        assert f"/page/{name}" in page.text
        part = httpx.get(f"{fox}/page/{name}").text
        for forbidden in ("innerHTML", "http://", "https://", "insertAdjacentHTML", "document.write"):
            assert forbidden not in part + page.text
    assert httpx.get(f"{fox}/page/../app.py").status_code == 404
    assert httpx.get(f"{fox}/page/app.py").status_code == 404
