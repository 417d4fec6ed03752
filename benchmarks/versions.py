"""How versions fare when there are as many as four digits can name: 9,999 datasets, models and runs.

    uv run python benchmarks/versions.py [--versions 9999] [--rounds 3]

Builds, in about two minutes, a metadata folder whose records are those that `Registry.record` writes (the last ones it does write
itself, a version of each kind a round), then measures, medians over the rounds:

plan, unchanged / plan, new: `Registry.load` and a plan of a dataset, a model and a run that are recorded / that are new in D;
the other rows of new values: in A, B or C, without the load. record: the three new ones written, index included.
verify: everything (`full`); nothing new since the last verify; the three new records; all files touched, as after a `git checkout`.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from pipeline import yaml_text
from pipeline.cards import dataset_card, model_card, run_card, write_card
from pipeline.config import PipelineConfig, parse_config
from pipeline.records import DataQuality, Estimate, Evaluation, ModelFacts, SystemScores, digest_text, fingerprint, to_plain
from pipeline.version_files import entry_of, record_path, write_index
from pipeline.versions import (
    LETTERS,
    Allocation,
    Registry,
    VersionInputs,
    dataset_inputs,
    format_version,
    model_inputs,
    names_of,
    run_inputs,
    verify,
    write_assignments,
)

NOW = "2026-01-02T03:04:05+00:00"
MACHINE = {"dtype": "bfloat16", "threads": 2, "engine": "embedded", "packages": {"torch": "2.15.0", "transformers": "5.23.0"}}
Three = tuple[VersionInputs, VersionInputs, VersionInputs]


# --- what is versioned ------------------------------------------------------------------------------------------------


def numbers(n: int) -> tuple[int, int, int, int]:
    """The n-th combination: 2 sources of 5 parts of 10 ways of 100 states of the rows."""
    return n // 5000, n // 1000 % 5, n // 100 % 10, n % 100


def inputs(n: int) -> Three:
    a, b, c, d = numbers(n)
    return inputs_of(f"source {a}", f"part {b}", c, f"rows {d}", n)


def inputs_of(a: str, b: str, c: int, d: str, n: int) -> Three:
    """A dataset, the model trained on it, and their run; the model's numbers move as the dataset's do."""
    config, data_digest = config_of(a, b, c), digest_text(d)
    facts = ModelFacts("tiny:q4", data_digest, f"llama {a}", int.from_bytes(b.encode()), "Q4_1", 2048, 10, None, None, None)
    data = dataset_inputs(config, data_digest)
    model = model_inputs(config, facts, digest_text(f"{n}"), "lora")
    return data, model, run_inputs(config, model.key, data.key)


@cache
def config_of(a: str, b: str, c: int) -> PipelineConfig:
    columns = {"id": "id", "text": ["premise", "hypothesis"], "rating": "rating", "rationale": "rationale", "group": "premise_id"}
    ratings = [{"value": value, "label": label} for value, label in enumerate(("contradiction", "neutral", "entailment"))]
    dataset = {"source": a, "subsource": b, "method": f"v{c}", "columns": columns, "ratings": ratings}
    return parse_config({"project": "many", "dataset": dataset, "train": {"epochs": 1 + c}})


def new(level: int, n: int) -> Three:
    """New values from segment `level` on."""
    a, b, c, d = numbers(0)
    parts: list[Any] = [f"source {a}", f"part {b}", c, f"rows {d}"]
    parts[level] = 1000 + n if level == 2 else f"new {n}"
    return inputs_of(*parts, n=-1 - n)


def plans(registry: Registry, three: Three) -> tuple[Allocation, Allocation, Allocation]:
    data = registry.plan(three[0])
    model = registry.plan(three[1], lineage={"dataset": data})
    return data, model, registry.plan(three[2], lineage={"model": model, "dataset": data})


# --- the folder -------------------------------------------------------------------------------------------------------


def build(metadata: Path, versions: int) -> None:
    """Writes the files that as many calls of `plan` and `record` leave (those would take hours: each reads and writes the index)."""
    registry, entries = Registry(metadata, []), []
    (metadata / "versions").mkdir(parents=True)
    last: dict[str, str] = {}
    for n in range(versions):
        a, b, c, d = numbers(n)
        version, made = (a + 1, b, c, d), {}
        for of in inputs(n):
            id, key = f"{n + 1:04d}", of.key
            names = names_of(of.kind, id, version, version if of.kind == "run" else None)
            lineage = {role: made[role] for role in {"dataset": (), "model": ("dataset",), "run": ("model", "dataset")}[of.kind]}
            text = format_version(version)
            why = (f"new: {names[0]}", f"compared with {last[of.kind]}:", "D: rows -> …" * 3) if n else (f"the first {of.kind} version",)
            allocation = Allocation(
                of.kind, id, names, f"{text}-data-{text}" if of.kind == "run" else text, key,
                tuple({"segment": letter, "number": number, "digest": fingerprint(value), "value": to_plain(value)}
                      for letter, number, value in zip(LETTERS, version, of.segments, strict=False)),
                of.beside, {role: part.as_lineage() for role, part in lineage.items()}, existing=False, provisional=True, why=why,
            )  # fmt: skip
            machine = MACHINE if of.kind == "model" else {}
            record = {**registry.record(allocation, created=NOW, artifact=digest_text(key), machine=machine, commit="0" * 40)}
            text = yaml_text.dump(record | {"status": "done"})
            record_path(metadata, of.kind, id).write_text(text, encoding="utf-8")
            entries.append(entry_of(record | {"status": "done"}, len(text.encode())))
            made[of.kind], last[of.kind] = replace(allocation, provisional=False), names[0]
    write_index(metadata, entries)
    write_assignments(metadata, {f"{n:016x}": "train" for n in range(20_000)})


def cards(metadata: Path) -> dict[str, int]:
    """Writes the cards of the last versions, with all of the history at hand; their sizes in bytes."""
    registry, config = Registry.load(metadata), PipelineConfig()
    of = {kind: registry.read(kind, registry.versions(kind)[-1].id) for kind in ("dataset", "model", "run")}
    history = {kind: registry.history(kind, last=10_000) for kind in of}
    quality = DataQuality(3, 3, (), {}, {}, {}, {}, 0, 0, 0, 0, 0, (), {})
    sure = Estimate(0.8, 0.5, 0.9, "wilson", 3)
    scores = SystemScores("fine_tuned", "model", 3, 0, {}, *[sure] * 4, None, None, None, {}, ((3,),), (), None, None, 1.0, 20.0)
    found = Evaluation("test", ("Match",), True, "fine_tuned", (scores,), (), (), "Not decided.")
    made = {
        "dataset": dataset_card(config, quality, version=of["dataset"], history=history["dataset"]),
        "model": model_card(config, None, version=of["model"], history=history["model"], method="lora", evaluation=found),
        "run": run_card(config, found, version=of["run"], history=history["run"]),
    }
    for kind, card in made.items():
        write_card(metadata / f"{kind}_card.yaml", card)
    return {kind: (metadata / f"{kind}_card.yaml").stat().st_size for kind in made}


# --- measuring --------------------------------------------------------------------------------------------------------


def measured(metadata: Path, verified: Path, n: int) -> Iterator[tuple[str, Callable[[], Any]]]:
    """What is timed in round n, in this order: later rows see what earlier ones did."""
    loaded: list[Registry] = []
    allocations: list[Allocation] = []
    yield "Registry.load", lambda: loaded.append(Registry.load(metadata))
    yield "load + plan, unchanged", lambda: plans(Registry.load(metadata), inputs(n))
    yield "load + plan, new in D", lambda: allocations.extend(plans(Registry.load(metadata), new(3, n)))
    for level in range(3):
        yield f"plan, new in {LETTERS[level]}", lambda level=level: plans(Registry(metadata, list(loaded[0]._entries)), new(level, n))
    yield "verify --full", lambda: check(metadata, verified, full=True)
    yield "verify, nothing new", lambda: check(metadata, verified)
    yield "record the three", lambda: record(metadata, allocations)
    yield "verify, three new", lambda: check(metadata, verified)
    yield "(touch)", lambda: [path.touch() for path in (metadata / "versions").iterdir()]
    yield "verify, all files touched", lambda: check(metadata, verified)


def check(metadata: Path, verified: Path, **how: bool) -> None:
    problems = verify(metadata, cache=verified, **how)
    if problems:
        raise SystemExit("\n".join(problems[:10]))


def record(metadata: Path, allocations: list[Allocation]) -> None:
    registry = Registry.load(metadata)
    for allocation in allocations:
        registry.record(allocation, created=NOW, artifact=digest_text(allocation.key), commit="0" * 40)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--versions", type=int, default=9999, help="of each kind, those that the rounds record included")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        metadata, verified = Path(folder) / "metadata", Path(folder) / "outputs" / ".verified.tsv"
        started = time.perf_counter()
        build(metadata, args.versions - args.rounds)
        print(f"{args.versions} versions of each kind; built in {time.perf_counter() - started:.0f} s", flush=True)
        sizes = cards(metadata)
        seconds: defaultdict[str, list[float]] = defaultdict(list)
        for n in range(args.rounds):
            for name, work in measured(metadata, verified, n):
                started = time.perf_counter()
                work()
                seconds[name].append(time.perf_counter() - started)
        for name, took in seconds.items():
            print(f"{name:28} {statistics.median(took):7.2f} s   ({', '.join(f'{each:.2f}' for each in took)})")
        records = [path.stat().st_size for path in (metadata / "versions").glob("*.yaml")]
        print(f"{'records':28} {len(records)}, {statistics.mean(records):.0f} bytes each")
        print(f"{'index.jsonl':28} {(metadata / 'versions' / 'index.jsonl').stat().st_size / 1e6:.1f} MB")
        print(f"{'.verified.tsv':28} {verified.stat().st_size / 1e6:.1f} MB")
        print(f"{'cards':28} " + ", ".join(f"{kind} {size} bytes" for kind, size in sizes.items()))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20 if sys.platform == "darwin" else 1 << 10)
    print(f"{'peak memory':28} {peak:.0f} MB, {os.cpu_count()} cores")


if __name__ == "__main__":
    main()
