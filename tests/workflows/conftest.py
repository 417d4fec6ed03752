"""A repository with our workflows, and a `pipeline` that answers as if all went well."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.workflows.act import Answer, Answers, GitHub

RECORD_TEXT = "cough and fever for two days"
CARD = "metadata/model_card.yaml"


def repository(folder: Path, files: Mapping[str, str | bytes] | None = None, **settings: Any) -> GitHub:
    """A repository with the secret of the Hub set; settings as `GitHub` takes them."""
    return GitHub(folder, files or {"pipeline.yaml": "project: example\n"}, **{"secrets": {"HF_TOKEN": "token-of-the-hub"}, **settings})


@pytest.fixture
def github(tmp_path: Path) -> Callable[..., GitHub]:
    """Makes a repository for one test: `github()`, or with files and settings."""
    return functools.partial(repository, tmp_path / "github")


def answers(**changed: Answer | None) -> Answers:
    """A run that is recorded and published; `version_record=Answer(...)` changes how `pipeline version record` answers."""
    usual: dict[str, Answer | None] = {
        "version_reserve": Answer(
            says="0007-model-1.0.0.0 is reserved", outputs={"changed": "true", "record": "true", "reservation": "5d1c07e9"},
            files={"outputs/reservation.json": '{"nonce": "5d1c07e9"}'},
        ),
        "run": Answer(files={
            "outputs/outputs.jsonl": RECORD_TEXT, "outputs/.checkpoint/epoch": RECORD_TEXT, "outputs/summary.md": "# Better", CARD: "new",
        }),
        "artifacts": Answer(files={"outputs/artifacts/summary.md": "# Better\n", f"outputs/artifacts/{CARD}": "new"}),
        "version_record": Answer(
            says="recorded", outputs={"commit": "c0ffee", "branch": "", "versions": "0007-model-1.0.0.0", "publish": "true"}
        ),
        "publish": Answer(says="what went to the Hub"),
    }  # fmt: skip
    return {words.replace("_", " "): answer for words, answer in (usual | changed).items() if answer is not None}
