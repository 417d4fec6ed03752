"""Rows a second of the embedded engine against one request at a time with llama.cpp's default settings.

    uv run python benchmarks/inference.py                         24 invented rows, three alternating rounds
    uv run python benchmarks/inference.py --csv TABLE --text premise hypothesis --rows 40
    uv run python benchmarks/inference.py --model outputs/fine_tuned_model.gguf

Both sides answer the same prompts on the same model under a grammar of the same answers, greedily. The default side is xllamacpp's
server as it comes (one slot, all cores), one request after the other; rating probabilities are part of our side only. Each side runs in
a process of its own, so that its memory is its own, and waits passively at OpenMP's barriers (without that, the default side is many
times slower on a busy machine, and the ratio says more about the neighbours than about the engine). An untrained base writes answers of
other lengths when it may split the fixed text into tokens as it likes, as it may on the default side: hence tokens/s beside rows/s.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from pipeline import prompts
from pipeline.config import GenerateConfig, PromptConfig
from pipeline.records import Message, Prompt, Rating, RatingScale

SCALE = RatingScale((Rating(0, "contradiction"), Rating(1, "neutral"), Rating(2, "entailment")))
MAX_TOKENS = 64
PEOPLE = ("A man in a red jacket", "Two children", "An old woman with a dog", "A cook", "Three cyclists", "A girl in a yellow dress")
DEEDS = ("is waiting at a bus stop", "are running along the beach", "is selling fruit on a crowded market", "is reading a newspaper")
CLAIMS = ("Somebody is outdoors.", "Nobody is there.", "A person is asleep at home.", "The people know one another.")


def read_prompts(table: Path | None, columns: list[str], n_rows: int) -> list[str]:
    """User messages: an instruction that all share and about thirty tokens of their own."""
    if table is None:
        mixed = itertools.product(PEOPLE, DEEDS, CLAIMS)
        rows = [{"premise": f"{who} {deed}.", "hypothesis": claim} for who, deed, claim in mixed]
        rows = [rows[n * 7 % len(rows)] for n in range(n_rows)]
    else:
        with table.open(encoding="utf-8", newline="") as handle:
            rows = [{column: row[column] for column in columns} for row in itertools.islice(csv.DictReader(handle), n_rows)]
    return [prompts.user_text(row, PromptConfig(), SCALE) for row in rows]


def run_defaults(model: Path, texts: list[str]) -> dict[str, Any]:
    """xllamacpp as it comes: one request after the other through its chat endpoint."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.verbosity = str(model), -1
    params.n_ctx = 2048  # the default, the model's whole training context, would only cost memory
    server = xllamacpp.Server(params)
    grammar = prompts.answer_grammar(SCALE)
    started, tokens, labels = time.perf_counter(), 0, []
    for text in texts:
        request = {"messages": [{"role": "user", "content": text}], "max_tokens": MAX_TOKENS, "temperature": 0.0, "grammar": grammar}
        reply = server.handle_chat_completions(request)
        tokens += reply["usage"]["completion_tokens"]
        choice = reply["choices"][0]
        labels.append(prompts.parse_answer(choice["message"]["content"], choice["finish_reason"], SCALE)[0])
    return {"seconds": time.perf_counter() - started, "output_tokens": tokens, "labels": labels}


def run_ours(model: Path, texts: list[str], parallel: int | None, threads: int | None) -> dict[str, Any]:
    from pipeline.backends.llamacpp import open_engine

    asked = [Prompt(str(n), (Message("user", text),)) for n, text in enumerate(texts)]
    with open_engine(model, parallel=parallel, threads=threads) as engine:
        started = time.perf_counter()
        completions = {c.record_id: c for c in engine.complete(asked, SCALE, GenerateConfig(max_tokens=MAX_TOKENS), max_prompt_tokens=1900)}
        seconds = time.perf_counter() - started
    in_order = [completions[prompt.record_id] for prompt in asked]
    labels = [prompts.parse_answer(c.text, c.finish, SCALE)[0] for c in in_order]
    likeliest = [max(c.probabilities, key=lambda name, p=c.probabilities: p[name]) for c in in_order if c.probabilities]
    agree = sum(a == b for a, b in zip(labels, likeliest, strict=True))
    return {"seconds": seconds, "output_tokens": sum(c.output_tokens for c in in_order), "labels": labels, "label_is_likeliest": agree}


def run_in_process(side: str, arguments: list[str]) -> dict[str, Any]:
    command = [sys.executable, __file__, *arguments, "--side", side]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, "OMP_WAIT_POLICY": "passive"})
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def machine() -> str:
    info = Path("/proc/cpuinfo")
    flags = info.read_text().split("flags", 1)[-1].split("\n", 1)[0] if info.exists() else ""
    known = [name for name in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8") if f" {name} " in f"{flags} "]
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    return f"{platform.machine()}, {os.cpu_count()} cores, {' '.join(known) or 'no known extensions'}{load}"


def compare(rounds: int, arguments: list[str]) -> None:
    results: dict[str, list[dict[str, Any]]] = {"default": [], "ours": []}
    print(f"machine: {machine()}")
    for number in range(rounds):
        for side in ("default", "ours") if number % 2 == 0 else ("ours", "default"):
            result = run_in_process(side, arguments)
            results[side].append(result)
            rate = len(result["labels"]) / result["seconds"]
            print(f"round {number + 1}  {side:8}{rate:7.2f} rows/s  {result['output_tokens']} tokens  {result['peak_mb']} MB", flush=True)
    speed = {side: statistics.median(len(r["labels"]) / r["seconds"] for r in runs) for side, runs in results.items()}
    pairs = [d["seconds"] / o["seconds"] for d, o in zip(results["default"], results["ours"], strict=True)]
    memory = {side: max(r["peak_mb"] for r in runs) for side, runs in results.items()}
    last = {side: runs[-1]["labels"] for side, runs in results.items()}
    same = sum(a == b for a, b in zip(last["default"], last["ours"], strict=True))
    print(f"median rows/s: ours {speed['ours']:.2f}, one at a time {speed['default']:.2f}")
    tokens = [pair * o["output_tokens"] / d["output_tokens"] for pair, d, o in zip(pairs, results["default"], results["ours"], strict=True)]
    print(f"ratio of rows/s: {statistics.median(pairs):.2f} (rounds {min(pairs):.2f} to {max(pairs):.2f})")
    print(f"ratio of output tokens/s: {statistics.median(tokens):.2f} (rounds {min(tokens):.2f} to {max(tokens):.2f})")
    print(f"peak memory: ours {memory['ours']} MB, one at a time {memory['default']} MB")
    print(f"same rating: {same} of {len(last['ours'])}; rating is the likeliest one: {results['ours'][-1]['label_is_likeliest']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a GGUF file; the embedded default unless given")
    parser.add_argument("--csv", type=Path, help="a table to take rows from")
    parser.add_argument("--text", nargs="+", default=["premise", "hypothesis"], help="its text columns")
    parser.add_argument("--rows", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--parallel", type=int, help="rows at once; the engine's own choice unless given")
    parser.add_argument("--threads", type=int, help="threads; the engine's own choice unless given")
    parser.add_argument("--side", choices=["default", "ours"], help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.side is None:
        compare(chosen.rounds, sys.argv[1:])
        return
    from pipeline.backends.base_model import EMBEDDED_NAME, resolve

    model = chosen.model or resolve(EMBEDDED_NAME).path
    texts = read_prompts(chosen.csv, chosen.text, chosen.rows)
    result = run_defaults(model, texts) if chosen.side == "default" else run_ours(model, texts, chosen.parallel, chosen.threads)
    result["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (1 if sys.platform != "darwin" else 1024) // 1024
    print(json.dumps(result))


if __name__ == "__main__":
    main()
