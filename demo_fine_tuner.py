"""The Python API on the sample: a short training, and what came out of it. Under three minutes on two cores.

    uv run python demo_fine_tuner.py

Uses outputs/formatted_dataset.csv, and formats the sample first when it isn't there. Writes into outputs/demo; never into metadata/.
One epoch on a few rows shows how the parts fit together; it makes no good model. `uv run pipeline run` does the whole job.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline import FineTuner, PipelineConfig, load_config
from pipeline.errors import PipelineError

ROOT = Path(__file__).resolve().parent
ROWS = {"train": 40, "valid": 10}  # together the fewest that are fine-tuned on


def main() -> int:
    """Runs the demo; gives the exit code."""
    began = time.monotonic()
    try:
        show(*train(load_config(ROOT / "pipeline.yaml")))
    except PipelineError as error:
        print(error, f"\n{error.hint}" if error.hint else "", sep="", file=sys.stderr)
        return error.exit_code
    print(f"\nDone in {time.monotonic() - began:.0f} s.")
    return 0


def train(config: PipelineConfig) -> tuple[Path, Mapping[str, Any]]:
    """The folder that was written, and the metadata of the training."""
    import pandas as pd

    from pipeline.formatter_promptbuilder import format_dataset

    table = config.output_path / "formatted_dataset.csv"
    if not table.exists():
        print(f"Formatting {config.dataset.path} ...")
        format_dataset(config, config.output_path)
    rows = pd.read_csv(table, dtype=str, keep_default_na=False)
    rows = rows.loc[rows["prompt"].str.len().sort_values(kind="stable").index]
    few = pd.concat([rows[rows["split"] == split].head(count) for split, count in ROWS.items()])
    print(f"Training on the {len(few)} shortest of {len(rows)} rows, one epoch ...")
    folder = config.output_path / "demo"
    success, metadata = FineTuner(fallback_mode=True, progress=Steps()).process_dataset(
        few,
        model_name=config.model.name,
        rating_mapping={rating.label: rating.value for rating in config.dataset.ratings},
        target_topics=config.prompt.topic or "",
        output_dir=folder,
        epochs=1,
        learning_rate=config.train.learning_rate,
        batch_size=config.train.batch_size,
    )
    assert success  # whatever fails is an exception
    return folder, metadata


class Steps:
    """A Progress that prints each new step, and inside a long one a line every twenty seconds."""

    def __init__(self) -> None:
        self.step, self.printed = "", 0.0

    def __call__(self, stage: str, done: int, total: int, note: str = "") -> None:
        if stage == self.step and time.monotonic() - self.printed < 20:
            return
        self.step, self.printed = stage, time.monotonic()
        print(f"  {stage}" + (f" {done}/{total}" if total else "") + (f"  {note}" if note else ""), flush=True)


def show(folder: Path, metadata: Mapping[str, Any]) -> None:
    """Prints what came out: how, the figures, the files."""
    print(f"\nApproach: {metadata['approach']} ({metadata['reason']})")
    print(f"Base:     {metadata['base']['name']}")
    training, validation = metadata["training"], metadata["validation"]
    if training:
        for epoch in training["epochs"]:
            print(f"Epoch {epoch['epoch']}:  loss {epoch['train_loss']:.3f} on train, {epoch['valid_loss']:.3f} on valid")
        served = validation["merged"]
        print(f"Served:   {served['agreement']:.0%} of {validation['rows']} ratings are those of the trained model")
    print(f"Files in {folder.relative_to(ROOT) if folder.is_relative_to(ROOT) else folder}:")
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        print(f"  {path.name:28} {path.stat().st_size / 1e6:9.3f} MB")


if __name__ == "__main__":
    sys.exit(main())
