"""What the formatter found in a table, counted; no record text."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from pipeline.config import DatasetConfig, fold
from pipeline.errors import ArtifactError
from pipeline.near_duplicates import NearDuplicates
from pipeline.records import SPLITS, DataQuality, DroppedRow, RatingScale, Record, SplitQuality
from pipeline.store import read_json

NO_TEXT, NO_RATING, DUPLICATE = "empty text", "empty rating", "exact duplicate"
CONFLICT, BRIDGE = "same text, different ratings", "would bridge two splits"


def data_quality(
    rows_read: int,
    dataset: DatasetConfig,
    records: Sequence[Record],
    dropped: Sequence[DroppedRow],
    conflicts: int,
    duplicates: NearDuplicates,
    notes: Sequence[str] = (),
) -> DataQuality:
    """The counts; `notes` are those of the stages before."""
    sizes = np.bincount(duplicates.clusters())
    systems = [*(["copilot"] if dataset.copilot else []), *dataset.raters]
    without = sum(not record.rationale for record in records)
    notes = [*notes, *_notes(dataset, records, sizes, duplicates, without)]
    return DataQuality(
        rows_read=rows_read,
        rows_kept=len(records),
        dropped=tuple(sorted(dropped, key=lambda row: row.row)),
        splits={split: _split_quality([r for r in records if r.split == split], dataset.scale) for split in SPLITS},
        prompt_words=_lengths([len(record.prompt.split()) for record in records]),
        rationale_words=_lengths([len(record.rationale.split()) for record in records if record.rationale]),
        prompt_tokens={},
        without_rationale=without,
        exact_duplicates=sum(row.reason == DUPLICATE for row in dropped),
        near_duplicate_clusters=int((sizes > 1).sum()),
        near_duplicate_rows=int(sizes[sizes > 1].sum()),
        label_conflicts=conflicts,
        contradicting_rationales=_contradicting(records, dataset.scale),
        opinions={system: sum(system in record.opinions for record in records) for system in systems},
        notes=tuple(notes),
    )


def _notes(
    dataset: DatasetConfig, records: Sequence[Record], sizes: NDArray[Any], duplicates: NearDuplicates, without: int
) -> Iterator[str]:
    rows = len(records)
    if dataset.columns.rationale is None:
        yield "No rationale column is named: only ratings are learnt and compared."
    elif without:
        yield f"{without} of {rows} rows have no rationale."
    if sizes.max() > 1:
        yield f"The largest cluster of near duplicates has {sizes.max()} rows."
    if not duplicates.complete:
        yield "Some phrases are in so many rows that not all of these were compared for near duplicates."
    for label in dataset.scale.labels:
        if all(record.label != label for record in records):
            yield f"No row is rated {label!r}."
    biggest = Counter(record.group for record in records).most_common(1)[0][1]
    if biggest > 0.1 * rows and rows >= 50:
        yield f"One group holds {biggest} of {rows} rows; it lies whole in one split, so shares are coarse."


def _split_quality(records: Sequence[Record], scale: RatingScale) -> SplitQuality:
    counts = Counter(record.label for record in records)
    return SplitQuality(len(records), len({record.group for record in records}), {label: counts[label] for label in scale.labels})


def _lengths(counts: Sequence[int]) -> dict[str, float]:
    if not counts:
        return {}
    values = np.array(counts)
    low, median, high, top = values.min(), np.median(values), np.percentile(values, 95), values.max()
    return {"min": float(low), "median": float(median), "p95": float(high), "max": float(top)}


def _contradicting(records: Sequence[Record], scale: RatingScale) -> tuple[str, ...]:
    """record_ids whose rationale gives another rating as its verdict, and not the row's own.

    Only plain verdicts count, since words such as "no" or "neutral" stand in any sentence: "rated Match", "label: no",
    "this is a Match because", or a sentence that is nothing but a rating. The longest label is read first, so
    "Does Not Match" is not taken for "Match".
    """
    meaning = {fold(text): r.label for r in scale.ratings for text in (r.label, *r.aliases) if len(text) > 1}
    names = "|".join(r"\s+".join(map(re.escape, text.split())) for text in sorted(meaning, key=len, reverse=True))
    if not names:
        return ()
    name = rf"[\"'“‘]?(?<!\w)({names})(?!\w)[\"'”’]?"
    stated = r"\b(?:rated(?: as)?|(?:rating|label|verdict)(?: is|:| =)?|label+ed(?: as)?|classified as)\s+(?:an? )?"
    opening = r"(?:^|[.!?;\n])\s*(?:(?:this|it|the record|this record)\s+)?(?:is\s+)?(?:an?\s+)?"
    end = r"(?=\s*(?:$|[.:!\n]|because\b|since\b))"
    verdict = re.compile(rf"(?:{stated}|{opening}){name}{end}", re.IGNORECASE)
    contradicting = []
    for record in records:
        named = {meaning[fold(text)] for text in verdict.findall(record.rationale)}
        if named and record.label not in named:
            contradicting.append(record.record_id)
    return tuple(contradicting)


def read_quality(path: Path) -> DataQuality:
    """data_quality.json.

    Raises:
        ArtifactError: missing or damaged.
    """
    try:
        return TypeAdapter(DataQuality).validate_python(read_json(path))
    except ValidationError as error:
        raise ArtifactError(f"{path}: damaged: {error.error_count()} wrong entries", hint="delete it and run again") from None
