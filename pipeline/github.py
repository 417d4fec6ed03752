"""What GitHub Actions tells a job and takes from it: who runs, what was typed into the form, outputs for other jobs."""

from __future__ import annotations

import json
import os
import re
import secrets
from collections.abc import Mapping
from pathlib import Path

from pipeline.errors import ConfigError, UserError
from pipeline.store import explained

INPUTS = "PIPELINE_INPUTS"  # the inputs of a manual run as one JSON object; texts, empty where nothing was given
SETTINGS = {
    "dataset": "dataset.path",
    "base_model": "model.name",
    "epochs": "train.epochs",
    "learning_rate": "train.learning_rate",
    "batch_size": "train.batch_size",
    "publish": "publish.enabled",
}
_NUMBERS = {"epochs": int, "learning_rate": float, "batch_size": int}
_FLAGS = {"yes": True, "true": True, "no": False, "false": False}
AS_CONFIGURED = ("", "as configured")  # what a form shows where pipeline.yaml is to hold


def run_name(environ: Mapping[str, str] = os.environ) -> str:
    """Who runs. A second attempt of one workflow run has the same name; outside of a workflow no two runs have."""
    if run := environ.get("GITHUB_RUN_ID"):
        return f"workflow run {run} of {environ.get('GITHUB_REPOSITORY', 'this repository')}"
    return f"run {secrets.token_hex(4)}"  # no name of a machine: it would stand in tags and records


def is_workflow(environ: Mapping[str, str] = os.environ) -> bool:
    return environ.get("GITHUB_ACTIONS") == "true"


def input_settings(environ: Mapping[str, str] = os.environ) -> list[str]:
    """What was typed into the form, as KEY=VALUE settings. Values are written as JSON, so that a text is never more than one value.

    Raises:
        ConfigError: not an object of texts; a number that is none; all problems at once.
    """
    settings, problems = [], []
    for name, text in _inputs(environ).items():
        if name in SETTINGS and text not in AS_CONFIGURED:
            try:
                value = _NUMBERS[name](text) if name in _NUMBERS else _FLAGS[text.lower()] if name == "publish" else text
                settings.append(f"{SETTINGS[name]}={_as_yaml(value)}")
            except (KeyError, ValueError):
                problems.append(f"{name}: {text[:80]!r} is not {'a number' if name in _NUMBERS else 'yes or no'}")
    if problems:
        raise ConfigError("the inputs of this workflow run", problems, hint="run the workflow again with other inputs")
    return settings


def wants_dry_run(environ: Mapping[str, str] = os.environ) -> bool:
    return _FLAGS.get(_inputs(environ).get("dry_run", "").lower(), False)


def write_outputs(outputs: Mapping[str, str], environ: Mapping[str, str] = os.environ) -> None:
    """Hands values on to later steps and jobs, where a workflow asks for them."""
    if path := environ.get("GITHUB_OUTPUT"):
        for name, value in outputs.items():
            if "\n" in value or "\r" in value:
                raise ValueError(f"{name}: more than a line")
        with explained(Path(path)), Path(path).open("a", encoding="utf-8") as file:
            file.writelines(f"{name}={value}\n" for name, value in outputs.items())


def _as_yaml(value: object) -> str:
    """JSON is YAML, but for its escapes of characters beyond U+FFFF, which are two halves: those stand for themselves."""
    text = json.dumps(value, allow_nan=False, ensure_ascii=False)
    return re.sub(r"[^ -~\U00010000-\U0010ffff]+", lambda found: json.dumps(found[0])[1:-1], text)


def _inputs(environ: Mapping[str, str]) -> dict[str, str]:
    text = environ.get(INPUTS, "").strip()
    if text in ("", "null"):  # a push has none
        return {}
    try:
        told = json.loads(text)
        return {
            str(name): "" if value is None else str(value).lower() if isinstance(value, bool) else str(value).strip()
            for name, value in told.items()
        }
    except (ValueError, AttributeError, RecursionError):
        raise UserError(f"{INPUTS} is not a JSON object", hint="give it toJSON(inputs)") from None
