"""From the folders of a sweep to three files of figures/data, which everything later is drawn and fitted from.

`wind_tunnel_rates.json` (learning rates and knobs), `wind_tunnel_law.json` (the ends of the decays, and the embedded
base that they shall predict) and `wind_tunnel_bench.json` (every model's answers to ScalingBench). Runs that are not
finished are not in them; `planned` says how many there would have been.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minicpm_ref import checkpoint
from minicpm_ref.data import Corpus, read_held_out, small_sample
from minicpm_ref.evaluate import bits_per_byte
from minicpm_ref.machine import machine
from minicpm_ref.plotting import load_results
from minicpm_ref.wind_tunnel import plan
from minicpm_ref.wind_tunnel.candidate import multiplied_parameters
from minicpm_ref.wind_tunnel.law import FittedLaw, Run, bootstrap_law
from minicpm_ref.wind_tunnel.scaling_bench import GUESSING, Question, make_questions
from minicpm_ref.wind_tunnel.scoring import answer, solution_bytes
from minicpm_ref.wind_tunnel.sigmoid import FittedSigmoid, Scored, bootstrap_sigmoid
from minicpm_ref.wind_tunnel.tasks import Task, cost_of, finished


def circumstances() -> dict[str, Any]:
    """Device, versions and date of a measurement made now."""
    here = machine(torch.device("cpu"))
    versions = {"torch": here["torch"], "python": here["python"], "numpy": np.__version__}
    return {"device": here["device"], "versions": versions, "date": time.strftime("%Y-%m-%d", time.gmtime())}


def finished_tasks(tasks: Sequence[Task], folder: Path) -> list[dict[str, Any]]:
    """Name, settings, result and cost of the tasks that are finished below `folder`."""
    rows = []
    for task in tasks:
        result = finished(task, folder)
        if result is not None:
            cost = cost_of(task, folder)
            kept = {key: cost[key] for key in ("seconds", "cpu_seconds", "device", "date")}
            rows.append({"name": task.name, "settings": dict(task.settings), "result": result, "cost": kept})
    return rows


def record_rates(corpus: Corpus, folder: Path) -> dict[str, Any]:
    """Every finished run that is not part of the law: one row a run, with what differs between them."""
    tasks = [task for task in plan.every_task(corpus.manifest_sha256) if not task.name.startswith("law_")]
    rows = finished_tasks(tasks, folder)
    varied = ("width", "parametrization", "lr", "seed", *plan.KNOBS)
    runs = [
        {key: row["settings"][key] for key in varied} | row["result"] | {"cpu_seconds": row["cost"]["cpu_seconds"]}
        for row in rows
    ]
    common = {key: value for key, value in tasks[0].settings.items() if key not in varied}
    return circumstances() | {
        "settings": common,
        "planned": len(tasks),
        "cpu_seconds": round(sum(run["cpu_seconds"] for run in runs), 1),
        "tokens": sum(run["tokens"] for run in runs),
        "runs": runs,
    }


def record_law(corpus: Corpus, folder: Path) -> dict[str, Any]:
    """The end of every finished decay, and the embedded base measured on the same text in the same windows."""
    tasks = list(plan.branch_tasks(corpus.manifest_sha256, plan.LAW_WIDTHS))
    rows = finished_tasks(tasks, folder)
    runs = [
        {"width": row["settings"]["width"], "n": row["result"]["multiplied_parameters"], "d": branch["tokens"]}
        | {"loss": branch["held_out_bits_per_byte"]}
        for row in rows
        for branch in row["result"]["branches"]
    ]
    model, tokenizer = checkpoint.load(dtype=torch.float32)
    assert tokenizer is not None
    card = json.loads((checkpoint.EMBEDDED / "base" / "card.json").read_text("utf-8"))
    texts = [document.text for document in small_sample(corpus.held_out, plan.LAW.evaluation_bytes)]
    base = {
        "n": multiplied_parameters(model.config),
        "d": card["tokens"],
        "loss": round(bits_per_byte(model, tokenizer, texts, plan.LAW.context), 5),
        "corpus_tokens": corpus.manifest["train_tokens"],
    }
    common = {key: value for key, value in tasks[0].settings.items() if key not in ("width", "tokens")}
    return circumstances() | {
        "settings": common,
        "planned": len(plan.LAW_WIDTHS) * len(plan.STABLE_STEPS),
        "cpu_seconds": round(sum(row["cost"]["cpu_seconds"] for row in rows), 1),
        "runs": runs,
        "base": base,
    }


def record_bench(folder: Path, others: dict[str, str] | None = None) -> dict[str, Any]:
    """Answers of every model that the law's decays left, of the embedded base, and of `others` (name to weights)."""
    questions = make_questions(read_held_out(checkpoint.EMBEDDED / "held_out.jsonl"))
    models = []
    for path in sorted(folder.glob("law_*/branch_*/model")):
        model, tokenizer = checkpoint.load(path, dtype=torch.float32)
        step, width = int(path.parent.name.removeprefix("branch_")), model.config.hidden_size
        tokens = round(step / (1 - plan.LAW.decay)) * plan.LAW.batch_tokens
        name = f"width {width}, {tokens / 1e6:.2f} M tokens"
        size = {"n": multiplied_parameters(model.config), "d": tokens, "trained_by": "wind tunnel"}
        models.append(size | _answers(name, model, tokenizer, questions))
    model, tokenizer = checkpoint.load(dtype=torch.float32)
    card = json.loads((checkpoint.EMBEDDED / "base" / "card.json").read_text("utf-8"))
    size = {"n": multiplied_parameters(model.config), "d": card["tokens"], "trained_by": "base"}
    models.append(size | _answers("embedded base", model, tokenizer, questions))
    for name, source in (others or {}).items():
        model, tokenizer = checkpoint.load(source, dtype=torch.float32)
        size = {"n": multiplied_parameters(model.config), "d": None, "trained_by": "others"}
        models.append(size | _answers(name, model, tokenizer, questions))
    return circumstances() | {
        "settings": {"kinds": [question.kind for question in questions], "options": len(questions[0].options)},
        "solution_bytes": solution_bytes(questions).tolist(),
        "models": models,
    }


def _answers(name: str, model: Any, tokenizer: Any, questions: Sequence[Question]) -> dict[str, Any]:
    if tokenizer is None:
        raise ValueError(f"{name}: no tokenizer.json beside the weights, so a question cannot be encoded")
    scored = answer(name, model, tokenizer, questions)
    return {
        "name": name,
        "bits": [round(bits, 3) for bits in scored.bits.tolist()],
        "right": [int(right) for right in scored.right],
    }


# ---- reading them back


def recorded_law(data: Path | None = None) -> tuple[list[Run], Run]:
    """The recorded runs of the law, and the embedded base."""
    results = load_results("wind_tunnel_law", data)
    base = results["base"]
    return [Run(run["n"], run["d"], run["loss"]) for run in results["runs"]], Run(base["n"], base["d"], base["loss"])


def recorded_bench(data: Path | None = None) -> tuple[list[dict[str, Any]], list[Scored], np.ndarray]:
    """The recorded models (n, d, name, trained_by), their answers, and the bytes of each solution."""
    results = load_results("wind_tunnel_bench", data)
    models = results["models"]
    scored = [Scored(m["name"], np.array(m["bits"]), np.array(m["right"], dtype=np.float64)) for m in models]
    return models, scored, np.array(results["solution_bytes"])


def fitted_bench(data: Path | None = None, resamples: int = 50) -> tuple[FittedLaw, FittedSigmoid]:
    """The law of the *solutions'* loss and the sigmoid of the score, from the wind tunnel's own models alone."""
    models, scored, nbytes = recorded_bench(data)
    ours = [i for i, model in enumerate(models) if model["trained_by"] == "wind tunnel"]
    runs = [Run(models[i]["n"], models[i]["d"], scored[i].loss(nbytes)) for i in ours]
    law = bootstrap_law(runs, resamples)
    return law, bootstrap_sigmoid([scored[i] for i in ours], nbytes, GUESSING, resamples)
