"""The user's rated table -> formatted_dataset.csv: prompts, standardised ratings, splits, and what is wrong with the data.

What is decided here:
- A text column becomes a section of the user message. Cells are stripped, line ends become line feeds.
- A row without text or without a rating is dropped and counted. So are exact duplicates (same prompt, same rating; the first
  stays) and all rows of one prompt that was rated in two ways: there is no truth in them to learn or to test.
- A rating that the scale does not know is an error. The same in a copilot's or rater's column is no rating, and is counted in
  the notes; a column in which nothing is known is an error.
- A given split column is followed to the letter; groups and near duplicates that it tears apart are counted in the notes.
  Rows that it leaves empty are divided by hash among the splits that it does not name. Without empty rows, a column that does
  not name both train and valid only marks the test rows: the others are divided into train and valid by hash.
- `group` in the output is the root that rows share: a user's group, or the first of those that near duplicates join.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.config import DatasetConfig, PipelineConfig, SplitConfig, fold
from pipeline.data_quality import BRIDGE, data_quality, read_quality
from pipeline.errors import DataError
from pipeline.formatted_dataset import read_formatted, write_formatted
from pipeline.near_duplicates import NearDuplicates, near_duplicates
from pipeline.ports import Progress, quiet
from pipeline.rated_rows import RatedRow, digest16, opinion_columns, rated_rows, short, wanted_columns, without_duplicates
from pipeline.records import SPLITS, DataQuality, DroppedRow, Record, Split
from pipeline.splits import SplitPlan, plan_splits
from pipeline.store import write_json
from pipeline.tables import Table, read_table

__all__ = ["DATASET_FILE", "QUALITY_FILE", "format_dataset", "read_formatted", "read_quality", "row_key"]

DATASET_FILE, QUALITY_FILE = "formatted_dataset.csv", "data_quality.json"
SPLIT_NAMES: Mapping[str, Split] = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("valid", "val", "validation", "dev", "development"), "valid"),
    **dict.fromkeys(("test", "testing"), "test"),
}
Shares = dict[Split, float]


def format_dataset(
    config: PipelineConfig, output_dir: Path, *, assigned: Mapping[str, Split] | None = None, progress: Progress = quiet
) -> DataQuality:
    """Writes formatted_dataset.csv and data_quality.json into `output_dir`.

    assigned: `row_key` of a prompt -> the split that an earlier version gave it.

    Raises:
        ConfigError: a column that serves two purposes that exclude one another.
        DataError: anything wrong with the table, all that can be seen at once.
        OutputError: the folder can't be written.
    """
    path, target = config.dataset_path, output_dir / DATASET_FILE
    if path.is_file() and target.is_file() and path.samefile(target):
        raise DataError(str(path), ["is what this stage writes"], hint="name your own table in dataset.path")
    progress("format", 0, 4, "reading")
    dataset, notes, dropped = config.dataset, list[str](), list[DroppedRow]()
    table = read_table(path, wanted_columns(dataset))
    progress("format", 1, 4, "checking")
    kept, conflicts = without_duplicates(rated_rows(table, config, dropped, notes), dropped)
    _check_kept(table, dataset, kept, dropped)
    progress("format", 2, 4, "splitting")
    duplicates = near_duplicates(["\n".join(row.texts) for row in kept])
    plan = _plan(table, config, kept, duplicates, assigned or {}, notes)
    dropped += [DroppedRow(row.number + 1, BRIDGE) for row, split in zip(kept, plan.splits, strict=True) if split is None]
    records = [_record(row, split, root) for row, split, root in zip(kept, plan.splits, plan.roots, strict=True) if split]
    _check_splits(table.source, dataset, records)
    quality = data_quality(table.rows, dataset, records, dropped, conflicts, duplicates, notes)
    progress("format", 3, 4, "writing")
    write_formatted(target, records, dataset.scale, systems=tuple(opinion_columns(dataset)), meta=dataset.keep)
    write_json(output_dir / QUALITY_FILE, quality)
    progress("format", 4, 4)
    return quality


def row_key(prompt: str) -> str:
    """First 16 hex digits of SHA-256 of the prompt: names a row in split assignments without its text."""
    return digest16(prompt)


def _check_kept(table: Table, dataset: DatasetConfig, rows: Sequence[RatedRow], dropped: Sequence[DroppedRow]) -> None:
    reasons = ", ".join(f"{n} {reason}" for reason, n in Counter(row.reason for row in dropped).items())
    why = f" ({table.rows} read, dropped: {reasons})" if reasons else ""
    labels = {row.label for row in rows}
    if not rows:
        raise DataError(table.source, [f"no row is left{why}"], hint="each row needs a text and a rating")
    if len(labels) == 1:
        problem = f"column {dataset.columns.rating!r}: every row left is rated {labels.pop()!r}; two ratings are needed{why}"
        raise DataError(table.source, [problem], hint="add rows with other ratings, or check dataset.columns.rating")


# --- splits ----------------------------------------------------------------------------------------------------------


def _plan(
    table: Table,
    config: PipelineConfig,
    rows: Sequence[RatedRow],
    duplicates: NearDuplicates,
    assigned: Mapping[str, Split],
    notes: list[str],
) -> SplitPlan:
    column, split = config.dataset.columns.split, config.dataset.split
    shares: Shares = {"train": split.train, "valid": split.valid, "test": split.test}
    given: list[Split | None] | None = None
    if column:
        given, shares = _given_splits(table, column, rows, split, notes)
    plan = plan_splits(
        [row.name for row in rows],
        [row.group for row in rows],
        [row.label for row in rows],
        duplicates,
        shares=shares,
        seed=config.seed,
        given=given,
        assigned=[assigned.get(row_key(row.prompt)) for row in rows] if assigned else None,
    )
    if plan.kept:
        notes.append(f"{plan.kept} rows keep the split that an earlier version gave them.")
    if torn := _torn(plan):
        source = f"the column {column!r}" if column else "an earlier version"
        notes.append(f"Leakage: {torn} groups or clusters of near duplicates lie in more than one split, where {source} put them.")
    return plan


def _torn(plan: SplitPlan) -> int:
    """Roots that have rows in more than one split."""
    found: dict[str, set[str]] = {}
    for root, split in zip(plan.roots, plan.splits, strict=True):
        if split:
            found.setdefault(root, set()).add(split)
    return sum(len(splits) > 1 for splits in found.values())


def _given_splits(
    table: Table, column: str, rows: Sequence[RatedRow], split: SplitConfig, notes: list[str]
) -> tuple[list[Split | None], Shares]:
    """(split of each row, None where it is to be chosen; shares of the splits to choose from)."""
    cells = [fold(table.values[column][row.number]) for row in rows]
    given = [SPLIT_NAMES.get(cell) for cell in cells]
    named = {own for own in given if own}
    empty = [row.number for row, cell in zip(rows, cells, strict=True) if not cell]
    unknown: dict[str, list[int]] = {}
    for row, cell in zip(rows, cells, strict=True):
        if cell and cell not in SPLIT_NAMES:
            unknown.setdefault(cell, []).append(row.number)
    problems = [f"column {column!r}: {short(cell)} is no split ({table.places(found)})" for cell, found in sorted(unknown.items())]
    if empty and named == set(SPLITS):
        problems.append(f"column {column!r}: no split in {table.places(empty)}, while others have train, valid and test")
    if problems:
        hint = f"use {', '.join(SPLIT_NAMES)} in every row, or set dataset.columns.split to null to split by hash"
        raise DataError(table.source, problems, hint=hint)
    shares: Shares = {"train": split.train, "valid": split.valid, "test": split.test}
    if empty:
        free = {name: share for name, share in shares.items() if name not in named}
        if not any(free.values()):
            problem = f"column {column!r}: no split in {table.places(empty)}, and no share in dataset.split is left for them"
            raise DataError(table.source, [problem], hint="fill these cells, or raise a share")
        notes.append(f"The column {column!r} is empty in {len(empty)} rows: they were divided among {', '.join(free)} by hash.")
        return given, free
    if "train" in named and ("valid" in named or not split.valid):
        return given, shares
    pool: Shares = {"train": split.train, "valid": split.valid}
    given = [own if own == "test" else None for own in given]
    notes.append(f"The column {column!r} marks the test rows; the other {given.count(None)} were divided into train and valid by hash.")
    return given, pool


def _record(row: RatedRow, split: Split, root: str) -> Record:
    return Record(row.record_id, root, split, row.prompt, row.label, row.rationale, row.opinions, row.meta)


def _check_splits(source: str, dataset: DatasetConfig, records: Sequence[Record]) -> None:
    """A split that lacks a rating altogether can't be trained on, chosen on or tested on.

    Raises:
        DataError: which split lacks which rating.
    """
    counts = Counter((record.split, record.label) for record in records)
    totals = Counter(record.label for record in records)
    groups = {label: len({record.group for record in records if record.label == label}) for label in totals}
    needed = [split for split in SPLITS if split != "valid" or dataset.split.valid > 0]
    problems = [
        f"{split} has no row rated {label!r} (such rows in all: {totals[label]}, in groups: {groups[label]})"
        for split in needed for label in dataset.scale.labels if totals[label] and not counts[split, label]
    ]  # fmt: skip
    if problems:
        own = "move rows in the split column" if dataset.columns.split else "try another seed or larger shares in dataset.split"
        raise DataError(source, problems, hint=f"{own}, add rows with these ratings, or give a rare rating as an alias of another")
