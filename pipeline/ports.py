"""What the stages call: Protocols that backends implement, so that no stage imports one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pipeline.config import GenerateConfig, TrainConfig
from pipeline.publication import Publication, Published
from pipeline.rating_tree import RatingTree
from pipeline.records import Completion, Message, ModelFacts, Prompt, RatingScale, Record, TokenRow, TrainingResult

if TYPE_CHECKING:
    from pipeline.version_names import Kind


class Progress(Protocol):
    """Called as work goes on; `total` 0 means unknown. `note` is short, for people, and holds no record text."""

    def __call__(self, stage: str, done: int, total: int, note: str = "") -> None: ...


def quiet(stage: str, done: int, total: int, note: str = "") -> None:
    """The Progress that shows nothing."""


class Engine(Protocol):
    """Generates answers with one model that is loaded until `close`. Also a context manager."""

    name: str  # "embedded" or "ollama"
    model_digest: str

    def render(self, messages: Sequence[Message]) -> str:
        """The prompt's text: chat template applied, ready for the assistant's turn."""

    def token_ids(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """The prompt as the model sees it: `render` in token ids."""

    def tokenize(self, text: str) -> tuple[int, ...]:
        """Plain text in token ids; what looks like a special token in it is read as text."""

    def complete(
        self, prompts: Sequence[Prompt], scale: RatingScale, generate: GenerateConfig, *, max_prompt_tokens: int
    ) -> Iterator[Completion]:
        """One Completion a prompt, in the order they are done. A bad row is a Completion with `error`.

        Raises:
            EngineError: the engine as a whole failed.
        """

    def rating_probabilities(self, prompts: Sequence[Prompt], scale: RatingScale) -> list[Mapping[str, float]]:
        """Label -> probability for each prompt, in order: at each token where the labels' token sequences branch,
        renormalised over the allowed branches."""

    def next_token_logprobs(self, token_ids: Sequence[int], n: int) -> Mapping[int, float]:
        """The n likeliest tokens after these and their log-probabilities over the whole vocabulary."""

    def close(self) -> None: ...
    def __enter__(self) -> Engine: ...
    def __exit__(self, *exc: object) -> None: ...


class EngineFactory(Protocol):
    """Opens an engine on a GGUF file; `adapter` is a LoRA GGUF on top of it."""

    def __call__(self, model: Path, *, adapter: Path | None = None, context_tokens: int = 0) -> Engine: ...


class BaseModel(Protocol):
    """A base model found on this machine."""

    @property
    def facts(self) -> ModelFacts: ...
    @property
    def path(self) -> Path:
        """The GGUF."""

    @property
    def why_untrainable(self) -> str | None:
        """Why it can't be trained though its architecture could, or None."""


@dataclass(frozen=True, slots=True)
class Kept:
    """A finished model that others can call. `changed`: it was not there before, or another one was."""

    name: str
    digest: str  # of the GGUF that it is served from
    changed: bool


class Serving(Protocol):
    """Where answers come from: finds base models, opens engines on them and on what was made of them, keeps finished models."""

    name: str  # "embedded" or "ollama"

    @property
    def facts(self) -> Mapping[str, Any]:
        """Of this machine, for the record: never part of a key."""

    def find(self, name: str, *, root: Path, allow_download: bool, verify: bool, progress: Progress = quiet) -> BaseModel:
        """The base model of that name; `verify` has its file's content compared with its digest where that is known beforehand.

        Raises:
            ModelNotFoundError, UserError, ArtifactError, BackendError, OutputError
        """

    def manner(self, base: BaseModel) -> str | None:
        """Fingerprint of how chats with the base are put into words; None: as its file says."""

    def words(self, base: BaseModel) -> Mapping[str, Any] | None:
        """What a server brings to every chat with the base: template, system, parameters; None: nothing but the file."""

    def on_file(self, base: BaseModel) -> EngineFactory:
        """Opens engines in this process, whose prompts are those that this serving gives the base."""

    def serve(self, base: BaseModel, model: Path | None = None) -> Engine:
        """The engine that gives answers: of the base, or of a GGUF that was made from it."""

    def served_apart(self) -> bool:
        """Whether `serve` answers through another program than `on_file`, so that both must be compared."""

    def keep(self, name: str, base: BaseModel, model: Path | Mapping[str, Any], *, replace: bool = False) -> Kept | None:
        """Keeps a GGUF made from the base, or a model set (what `ModelSet.create_request` gives), under a name for others to call;
        None where this serving keeps none. The same again changes nothing.

        Raises:
            UserError: the name means another model already, and `replace` is off.
        """

    def has(self, name: str, digest: str) -> bool:
        """Whether a kept model is still there."""


@dataclass(frozen=True, slots=True)
class TrainingEstimate:
    seconds: float
    memory_bytes: int


class TrainedModel(Protocol):
    """What training leaves in memory, to be written and checked."""

    result: TrainingResult

    def write(self, output_dir: Path) -> Mapping[str, Any]:
        """Writes adapter.gguf and fine_tuned_model.gguf; gives how the merged tensors were stored."""

    def write_unchanged(self, path: Path) -> None:
        """Writes the base with a zero change, its tensors stored as in fine_tuned_model.gguf."""

    def rating_probabilities(self, prompts: Sequence[Sequence[int]], tree: RatingTree) -> list[dict[str, float]]:
        """label -> probability for each prompt (token ids), as `Engine.rating_probabilities` defines it."""

    def top_logprobs(self, tokens: Sequence[int], n: int) -> dict[int, float]:
        """The n likeliest next tokens and their log-probabilities."""


class Trainer(Protocol):
    """Turns tokenised rows into a trained model."""

    def unsupported(self, base: BaseModel) -> str | None:
        """Why this model can't be trained here, or None.

        Raises:
            ArtifactError: the base model's file is damaged.
        """

    def estimate(self, base: BaseModel, train: Sequence[TokenRow], valid: Sequence[TokenRow], config: TrainConfig) -> TrainingEstimate:
        """Time and peak memory of `train` on this machine, from a short measurement."""

    def train(
        self,
        base: BaseModel,
        train: Sequence[TokenRow],
        valid: Sequence[TokenRow],
        config: TrainConfig,
        *,
        seed: int,
        folder: Path,
        progress: Progress = quiet,
    ) -> TrainedModel:
        """Trains from the last checkpoint in `folder` on; keeps the epoch with the lowest validation loss.

        Raises:
            TrainingFailedError: out of memory, loss not finite.
            ArtifactError: the base model's file is damaged.
        """


class Embedder(Protocol):
    """Text -> unit vectors, offline."""

    def __call__(self, texts: Sequence[str]) -> Sequence[Sequence[float]]: ...


class Scorer(Protocol):
    """Scores rationales against the expert's. None where a row can't be scored."""

    def __call__(self, metric: str, responses: Sequence[str], references: Sequence[str]) -> list[float | None]: ...


class Judge(Protocol):
    """A model that grades rationales; none ships yet."""

    name: str

    def grade(self, metric: str, prompt: str, response: str, reference: str) -> float | None: ...


class ModelSetBuilder(Protocol):
    """`pipeline.model_set.build_model_set`."""

    def __call__(self, train: Sequence[Record], valid: Sequence[Record], **settings: Any) -> Any: ...


class Hub(Protocol):
    """Where versions are published: `pipeline.backends.hub.HubClient`."""

    def publish(self, publication: Publication, *, create: bool = False, replace: bool = False) -> Published:
        """Brings a version's files and its tag there, in one commit. What is there already is not sent again, so it can be called
        again after any failure. Where a version with a higher ID is there, this one's commit does not become the head of main.

        Args:
            create: lets it make a repository that is missing.
            replace: moves a tag that is there with other content to a new commit.

        Raises:
            UserError: no token, or HF_HUB_OFFLINE is set. ArtifactError: a file can't be read.
            PrivacyError: the repository is public and the publication is not.
            BackendError: the Hub refused, stays out of reach, or has other content under this tag that may not be replaced.
        """

    def read_back(self, kind: Kind, repo_id: str, name: str) -> Published | None:
        """What is there under a version's tag; None where there is no such tag, or no such repository.

        Raises:
            UserError, BackendError: as `publish`.
        """


RESERVED_TAGS = "reserved/"  # below refs/tags/
WAITING_BRANCHES = "pipeline/record-"  # below refs/heads/: a record that waits in a pull request; it ends with the reservation's nonce


@dataclass(frozen=True, slots=True)
class RemoteState:
    """A git remote in one look."""

    branch: str  # the default one, the only one that allocates versions
    head: str  # its commit
    tags: Mapping[str, str]  # every tag -> its object
    reserved: Mapping[str, str]  # the tags reserved/… -> their messages
    branches: Mapping[str, str]  # every branch -> its commit


class Remote(Protocol):
    """Where versions are agreed on. Nothing here touches the user's branch or working tree but `advance`."""

    def folder(self, path: Path) -> str:
        """A folder of the repository, as the remote's commits name it."""

    def look(self) -> RemoteState: ...
    def files_at(self, commit: str, folder: str, into: Path) -> None:
        """Writes the files of a folder at a commit below `into`, byte for byte."""

    def files_of_tag(self, name: str, folder: str, into: Path) -> bool:
        """The same at the commit of a tag; False where there is none."""

    def head(self) -> str | None:
        """The commit that is checked out."""

    def commit(self, parent: str, folder: str, content: Path, message: str) -> str | None:
        """A commit on `parent` in which `folder` holds what `content` holds; None when it does so already."""

    def tag(self, name: str, commit: str, message: str) -> str: ...
    def push(self, updates: Mapping[str, str | None]) -> None:
        """Sets refs to objects (None deletes one), all or none; tags are created only, a branch only moves forward.

        Raises:
            PushLostError: somebody else was faster; nothing was done.
            BackendError: refused, or the remote can't be reached.
        """

    def advance(self, branch: str, commit: str, folder: str) -> bool: ...
