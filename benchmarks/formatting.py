"""How long the formatter takes and how much memory it needs, on many rows of e-SNLI's size.

    python benchmarks/formatting.py [--rows 100000] [--kind recombined|words|templates] [--data ../shared/data/esnli/rated.csv]

`recombined`: premises, hypotheses and rationales of e-SNLI, drawn anew for each row (words where the file is absent): many rows
share a sentence. `words`: seeded words, nearly all rows unlike. `templates`: one long form with a few words filled in, and
every tenth row a copy with a word more: the hard case for near duplicates.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from pipeline.config import parse_config
from pipeline.formatter_promptbuilder import format_dataset

LABELS = ("entailment", "neutral", "contradiction")
ESNLI = Path(__file__).resolve().parents[2] / "shared" / "data" / "esnli" / "rated.csv"


def recombined(rows: int, data: Path, seed: int) -> Iterator[list[str]]:
    with data.open(encoding="utf-8", newline="") as handle:
        source = list(csv.DictReader(handle))
    rng = random.Random(seed)
    for _ in range(rows):
        premise, other = rng.choice(source), rng.choice(source)
        yield [premise["premise"], other["hypothesis"], other["rating"], other["rationale"]]


def words(rows: int, seed: int) -> Iterator[list[str]]:
    rng = random.Random(seed)
    vocabulary = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(8000)]
    weights = [1 / (n + 3) for n in range(len(vocabulary))]  # about as uneven as English

    def sentence(length: int) -> str:
        return " ".join(rng.choices(vocabulary, weights, k=length))

    for _ in range(rows):
        yield [sentence(rng.randint(8, 26)), sentence(rng.randint(4, 12)), rng.choice(LABELS), sentence(rng.randint(6, 22))]


def templates(rows: int, seed: int) -> Iterator[list[str]]:
    rng = random.Random(seed)
    names = [f"name{n}" for n in range(3000)]
    last = ""
    for row in range(rows):
        a, b, c = rng.choices(names, k=3)
        text = f"the person called {a} came in with {b} since two days and was seen by the nurse and then sent on to {c} for a further look"
        if row % 10 == 9:
            text = "today " + last
        last = text
        yield [text, "all is well", rng.choice(LABELS), "it is so"]


def table(kind: str, rows: int, data: Path, seed: int) -> Iterator[list[str]]:
    if kind == "recombined" and data.exists():
        return recombined(rows, data, seed)
    return templates(rows, seed) if kind == "templates" else words(rows, seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--kind", choices=("recombined", "words", "templates"), default="recombined")
    parser.add_argument("--data", type=Path, default=ESNLI)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rated.csv"
        with path.open("w", encoding="utf-8", newline="") as handle:
            writer = csv.writer(handle, lineterminator="\n")
            writer.writerow(["premise", "hypothesis", "rating", "rationale"])
            writer.writerows(table(args.kind, args.rows, args.data, args.seed))
        columns = {"text": ["premise", "hypothesis"], "rating": "rating", "rationale": "rationale"}
        ratings = [{"value": label, "label": label} for label in LABELS]
        config = parse_config({"dataset": {"path": path.name, "columns": columns, "ratings": ratings, "ordered": False}}, root=path.parent)
        start = time.perf_counter()
        quality = format_dataset(config, Path(folder) / "outputs")
        seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20 if sys.platform == "darwin" else 1 << 10)
    figures = {"kind": args.kind, "rows": args.rows, "seconds": round(seconds, 2), "peak_mb": round(peak), "rows_kept": quality.rows_kept}
    print(json.dumps(figures | {"near_duplicate_rows": quality.near_duplicate_rows, "notes": quality.notes}, indent=2))


if __name__ == "__main__":
    main()
