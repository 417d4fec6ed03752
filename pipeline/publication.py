"""What one version looks like on the Hugging Face Hub: a repository, a commit of these files, a tag."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from pipeline.version_names import Kind

RepoType = Literal["model", "dataset"]
REPO_TYPES: Mapping[Kind, RepoType] = {"dataset": "dataset", "model": "model", "run": "dataset"}
# A version's commit holds exactly its own files among these; whatever else somebody put into the repository stays.
OWNED = (
    "README.md", "dataset_card.yaml", "model_card.yaml", "run_card.yaml", "plots/*", "metrics/*", "data/*.parquet", "outputs/*.parquet",
    "fine_tuned_model.gguf", "adapter.gguf", "model_set_config.json", "template", "system", "params",
)  # fmt: skip


def is_owned(path: str) -> bool:
    """Whether a path in a repository is this product's to write and to delete."""
    return any(fnmatchcase(path, pattern) for pattern in OWNED)


def url_of(kind: Kind, repo_id: str, name: str, endpoint: str = "https://huggingface.co") -> str:
    """The page of a version: its tag."""
    return f"{endpoint}/{'datasets/' if REPO_TYPES[kind] == 'dataset' else ''}{repo_id}/tree/{name}"


@dataclass(frozen=True, slots=True)
class Publication:
    """All that would go to the Hub for one version. `files`: path in the repository -> its bytes, or the file that holds them."""

    kind: Kind
    name: str  # of the version, and the tag
    repo_id: str  # NAMESPACE/PROJECT-model, -dataset or -runs
    private: bool
    files: Mapping[str, bytes | Path]

    @property
    def repo_type(self) -> RepoType:
        return REPO_TYPES[self.kind]


@dataclass(frozen=True, slots=True)
class Published:
    """What the Hub has of a version, read back from it. `changed`: it was not all there before."""

    kind: Kind
    name: str
    repo_id: str
    commit: str  # 40 hex digits
    url: str
    changed: bool
