"""Small tables of real rated data with a configuration each, and a check of what the job made of them.

python .ci/slices.py make DATA FOLDER    writes FOLDER/esnli and FOLDER/pubmedqa
python .ci/slices.py check FOLDER/NAME   fails unless the run left scores of every system there must be
"""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

ESNLI_ROWS = 166  # about 90 to train on, 60 to test on
PUBMEDQA_ROWS = {("dev", "yes"): 28, ("dev", "no"): 24, ("dev", "maybe"): 18, ("test", "yes"): 18, ("test", "no"): 13, ("test", "maybe"): 9}
SHORT = """
train: {epochs: 1, learning_rate: 1.0e-3}
generate: {max_tokens: 48}
"""
CONFIGS = {
    "esnli": """
project: esnli-slice
dataset:
  path: rated.csv
  source: e-SNLI
  columns: {id: id, text: [premise, hypothesis], rating: rating, rationale: rationale, group: premise_id}
  ratings: [{value: 0, label: contradiction}, {value: 1, label: neutral}, {value: 2, label: entailment}]
  split: {train: 0.54, valid: 0.1, test: 0.36}
  license: mit
prompt: {topic: the premise entails the hypothesis}
"""
    + SHORT,
    "pubmedqa": """
project: pubmedqa-slice
dataset:
  path: rated.csv
  source: PubMedQA
  columns: {id: pmid, text: [question, context], rating: rating, rationale: rationale, group: pmid, split: official_split}
  ratings: [{value: 0, label: "no"}, {value: -1, label: maybe, abstain: true}, {value: 1, label: "yes"}]
  raters: {second: {rating: second_rating}}
  license: mit
prompt: {topic: the abstract answers the question with yes}
"""
    + SHORT,
}
SYSTEMS = {"esnli": {"base", "fine_tuned", "majority"}, "pubmedqa": {"base", "fine_tuned", "majority", "second"}}


def make(data: Path, folder: Path) -> None:
    for name, config in CONFIGS.items():
        with (data / name / "rated.csv").open(encoding="utf-8", newline="") as table:
            rows = list(csv.DictReader(table))
        rows = rows[:ESNLI_ROWS] if name == "esnli" else shortest(rows)
        (folder / name).mkdir(parents=True)
        (folder / name / "pipeline.yaml").write_text(config, encoding="utf-8")
        with (folder / name / "rated.csv").open("w", encoding="utf-8", newline="") as out:
            writer = csv.DictWriter(out, rows[0])
            writer.writeheader()
            writer.writerows(rows)
        print(f"{name}: {len(rows)} rows")


def shortest(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """The rows with the shortest texts of each official split and rating."""
    chosen = []
    for (split, rating), count in PUBMEDQA_ROWS.items():
        of_kind = [row for row in rows if (row["official_split"], row["rating"]) == (split, rating)]
        chosen += sorted(of_kind, key=lambda row: len(row["context"]))[:count]
    return chosen


def check(folder: Path) -> None:
    outputs = folder / "outputs"
    for name in ("report.html", "summary.md", "fine_tuned_model.gguf", "adapter.gguf"):
        assert (outputs / name).stat().st_size, f"{name} is empty"
    systems = {system["system"]: system for system in json.loads((outputs / "scores.json").read_text(encoding="utf-8"))["systems"]}
    missing = SYSTEMS[folder.name] - set(systems)
    assert not missing, f"scores.json lacks {', '.join(sorted(missing))}"
    for name, system in systems.items():
        print(f"{name:12} accuracy {system['accuracy']['value']:.3f} on {system['n']} rows, {system['n_invalid']} invalid")
    for name in ("base", "fine_tuned"):
        assert systems[name]["n_invalid"] == 0, f"{name}: the grammar allows no invalid answer"


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["make", data, folder]:
            make(Path(data), Path(folder))
        case ["check", folder]:
            check(Path(folder))
        case _:
            sys.exit(__doc__)
