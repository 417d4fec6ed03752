"""What makes a version the version it is: its key, and the value of each segment.

Never in here: paths, the clock, and facts of the machine (dtype, threads, package versions, the engine that `auto` chose).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any, Literal, get_type_hints

from pipeline.config import PipelineConfig
from pipeline.records import ModelFacts, fingerprint, to_plain
from pipeline.version_names import Kind

LETTERS = ("A", "B", "C", "D")
Method = Literal["lora", "model_set"]
Values = Mapping[str, Any]  # dotted name -> plain value


@dataclass(frozen=True, slots=True)
class VersionInputs:
    """`segments` holds the values behind A, B, C and D (none for a run, whose numbers are its model's and dataset's);
    `beside` what is in the key but moves no segment."""

    kind: Kind
    segments: tuple[Values, ...]
    beside: Values = field(default_factory=dict)

    @property
    def key(self) -> str:
        return key_of(self.kind, self.segments, self.beside)


def key_of(kind: str, segments: Sequence[Values], beside: Values) -> str:
    """Identity of a version: two with the same key are the same version."""
    return fingerprint("version", kind, segments, beside)


def dataset_inputs(config: PipelineConfig, rows_digest: str) -> VersionInputs:
    """`rows_digest`: digest of the formatted rows with their splits.

    `dataset.path` is where this machine keeps the table. `license`, `language` and `shareable` say what may be done with the rows and
    change none of them: to correct a licence corrects the card and makes no new dataset.
    """
    about_rows = _values(config.dataset, "dataset", without=("path", "license", "language", "shareable", "source", "subsource"))
    if config.dataset.columns.split is None:
        about_rows["seed"] = config.seed  # part of the split rule: splits hash (seed, group)
    return VersionInputs(
        "dataset",
        (
            {"dataset.source": config.dataset.source},
            {"dataset.subsource": config.dataset.subsource},
            about_rows,
            {"rows": rows_digest, **_values(config.prompt, "prompt")},
        ),
    )


def model_inputs(config: PipelineConfig, facts: ModelFacts | None, train_valid_digest: str, method: Method) -> VersionInputs:
    """`facts` None: a model set whose base model was not found here, known by its name alone
    (without folders: they are this machine's).

    `train.*` is part of a trained model's recipe only, `model_set.max_examples` of a model set's only: a value that can't change what
    comes out makes no new version. The seed is in D, as a small change of the same recipe.
    """
    if method == "lora":
        recipe = _values(config.train, "train", without=("enabled", "dropout"))
        details: dict[str, Any] = {"train.dropout": float(config.train.dropout)}
    else:
        recipe, details = {"model_set.max_examples": config.model_set.max_examples}, {}
    base = {"base": facts.digest} if facts else {"base": None, "model.name": PurePath(config.model.name).name}
    return VersionInputs(
        "model",
        (
            {"architecture": facts.architecture if facts else None},
            {"parameters": facts.parameters if facts else None},
            {"method": method, **recipe},
            {**_values(config.generate, "generate"), **details, "seed": config.seed, **base},
        ),
        # a limit on prompts refuses rows of training, so it belongs to the rows
        {"train and valid rows": train_valid_digest, "prompt.max_tokens": config.prompt.max_tokens},
    )


def run_inputs(config: PipelineConfig, model_key: str, dataset_key: str) -> VersionInputs:
    """A run has no segments of its own; a model set that is compared as well counts as part of what is evaluated."""
    compared = _values(config.model_set, "model_set") if config.model_set.compare else {"model_set.compare": False}
    return VersionInputs("run", (), {"model": model_key, "dataset": dataset_key, **_values(config.evaluate, "evaluate"), **compared})


def _values(section: Any, prefix: str, *, without: Collection[str] = ()) -> dict[str, Any]:
    """The section's fields as dotted names and plain values; a float field is a float even where 1 was written."""
    hints = get_type_hints(type(section))
    values: dict[str, Any] = {}
    for each in dataclasses.fields(section):
        value, name = getattr(section, each.name), f"{prefix}.{each.name}"
        if each.name in without:
            continue
        if dataclasses.is_dataclass(value):
            values |= _values(value, name)
        else:
            values[name] = float(value) if hints[each.name] is float else to_plain(value)
    return values
