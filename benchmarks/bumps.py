"""Many runs at once that reserve and record versions on one git remote: how long each takes, and how often it is overtaken.

    uv run python benchmarks/bumps.py [--at-once 16] [--rounds 10]

Each run is a process of its own with a clone of its own (every second one shallow) of a bare repository on this disk; they differ in
source and rows, some want the same. A bump is reserve + metadata without a model + record; a retry is a push that was lost to another
run. After each round the history must be sound: every ID given once, every number with one meaning, every version recorded and tagged.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.test_version_record import check_many, started
from tests.version_runs import make_remote, toy

COLUMNS = (
    f"{'round':>5}  {'s a bump, median':>16}  {'max':>5}  {'retries a bump, median':>22}  {'max':>3}"
    f"  {'all done after s':>16}  {'versions':>8}"
)


def one_round(folder: Path, at_once: int) -> tuple[list[float], list[int], float, int]:
    bare = make_remote(folder)
    clones = [toy(bare, f"clone-{n}", *(("--depth=1",) if n % 2 else ())).folder for n in range(at_once)]
    # four new sources, other rows under each; every eighth run wants the same as another
    how = [{"source": f"source {n % 8 // 2}", "rows": f"rows {n if n % 8 else 0}"} for n in range(at_once)]
    begun = time.perf_counter()
    with ThreadPoolExecutor(at_once) as threads:
        told = list(threads.map(started, clones, [f"run {n}" for n in range(at_once)], how))
    seconds = time.perf_counter() - begun
    registry = check_many(bare, told)
    needed = [1 + any(not each["existing"] for each in run["reserved"].values()) for run in told]
    retries = [max(run["pushes"] - n, 0) for run, n in zip(told, needed, strict=True)]
    return [run["seconds"] for run in told], retries, seconds, sum(entry.status == "done" for entry in registry.versions("run"))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--at-once", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args()
    print(f"{args.at_once} runs at once, {args.rounds} times\n\n{COLUMNS}")
    all_seconds, all_retries = list[float](), list[int]()
    for n in range(1, args.rounds + 1):
        with tempfile.TemporaryDirectory(prefix="bumps-") as folder:
            seconds, retries, wall, versions = one_round(Path(folder), args.at_once)
        all_seconds += seconds
        all_retries += retries
        _line(f"{n}", seconds, retries, f"{wall:.1f}", f"{versions}")
    _line("all", all_seconds, all_retries, "", "")


def _line(name: str, seconds: list[float], retries: list[int], wall: str, versions: str) -> None:
    print(
        f"{name:>5}  {statistics.median(seconds):>16.2f}  {max(seconds):>5.1f}  {statistics.median(retries):>22.1f}  {max(retries):>3}"
        f"  {wall:>16}  {versions:>8}",
        flush=True,
    )


if __name__ == "__main__":
    main()
