"""PipelineConfig: every default once, read from YAML and `--set`, with all problems in one error.

Order: the dataclasses here < the YAML file < `--set key=value`.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError

from pipeline.errors import ConfigError
from pipeline.records import Rating, RatingScale

DEFAULT_FILE = "pipeline.yaml"

Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Names = Annotated[tuple[str, ...], BeforeValidator(lambda value: (value,) if isinstance(value, str) else value)]
Artifact = Literal["cards", "summary", "scores", "report", "outputs", "dataset", "training_data", "model_set", "weights"]
Metric = Literal["rouge", "chrf", "string_similarity", "semantic_similarity"]


@dataclass(frozen=True, kw_only=True)
class ColumnsConfig:
    """Which column of the user's table holds what."""

    id: str | None = None
    text: Names = ("text",)
    rating: str = "rating"
    rationale: str | None = None
    group: str | None = None
    split: str | None = None


@dataclass(frozen=True, kw_only=True)
class OpinionColumns:
    """The columns of a copilot or a further rater."""

    rating: str
    rationale: str | None = None


@dataclass(frozen=True, kw_only=True)
class SplitConfig:
    train: Share = 0.6
    valid: Share = 0.1
    test: Share = 0.3


@dataclass(frozen=True, kw_only=True)
class DatasetConfig:
    path: str = "data/chief_complaints.csv"
    source: str = "unnamed source"
    subsource: str = "all"
    method: str = "v1"
    columns: ColumnsConfig = ColumnsConfig()
    ratings: tuple[Rating, ...] = (
        Rating(value=0, label="Does Not Match", aliases=("no match",)),
        Rating(value=-1, label="Unknown", abstain=True),
        Rating(value=1, label="Match"),
    )
    ordered: bool = True
    raters: Mapping[str, OpinionColumns] = field(default_factory=dict)
    copilot: OpinionColumns | None = None
    keep: Names = ()
    split: SplitConfig = SplitConfig()
    license: str = "other"
    language: str = "en"
    shareable: bool = False

    @property
    def scale(self) -> RatingScale:
        return RatingScale(self.ratings, self.ordered)


@dataclass(frozen=True, kw_only=True)
class PromptConfig:
    topic: str | None = None
    instruction: str | None = None  # replaces the built-in first sentences; ratings and format are always added
    max_tokens: Positive = 2048  # a longer prompt is refused and counted, never cut


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    name: str = "smollm2-135m-instruct:q4_1"
    engine: Literal["embedded", "ollama", "auto"] = "embedded"
    pull: bool = True  # whether an Ollama server may download a base model that it lacks


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    enabled: bool = True
    epochs: Positive = 3
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 1e-4
    batch_size: Positive = 4  # rows a step
    rank: Annotated[int, Field(ge=1, le=512)] = 16
    alpha: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 32.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    rating_weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0  # weight of the rating's tokens in the loss; 1 is plain


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    max_tokens: Positive = 160
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0


@dataclass(frozen=True, kw_only=True)
class ModelSetConfig:
    compare: bool = False  # also evaluate the model set beside a fine-tuned model
    max_examples: Annotated[int, Field(ge=0)] = 6


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    systems: Names = ("base", "fine_tuned")
    metrics: tuple[Metric, ...] = ("rouge", "chrf", "string_similarity", "semantic_similarity")
    judge: str | None = None
    gates: Mapping[str, Mapping[str, str]] = field(default_factory=dict)  # {"fine_tuned.accuracy": {"value": ">= 0.6"}}


@dataclass(frozen=True, kw_only=True)
class PublishConfig:
    enabled: bool = False
    namespace: str | None = None
    private: bool = True
    weights: bool = False
    rows: bool = False
    allowed: Names = ()  # texts that look personal and may go: the team's own address, say
    artifacts: tuple[Artifact, ...] = ("cards", "summary")  # what CI may keep


@dataclass(frozen=True, kw_only=True)
class PipelineConfig:
    """pipeline.yaml, read. `root` is the folder that relative paths start from; it is not a key of the file."""

    project: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")] = "project"
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 42
    output_dir: str = "outputs"
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    prompt: PromptConfig = PromptConfig()
    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()
    generate: GenerateConfig = GenerateConfig()
    model_set: ModelSetConfig = ModelSetConfig()
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    publish: PublishConfig = PublishConfig()
    root: Path = Path()

    @property
    def dataset_path(self) -> Path:
        return self.root / self.dataset.path

    @property
    def output_path(self) -> Path:
        return self.root / self.output_dir

    @property
    def metadata_path(self) -> Path:
        return self.root / "metadata"


def load_config(path: Path | str = DEFAULT_FILE, overrides: Sequence[str] = ()) -> PipelineConfig:
    """The configuration in a YAML file, with `--set` overrides ("train.epochs=5") on top.

    Raises:
        ConfigError: no such file, not YAML, or any number of wrong keys and values, all named.
    """
    import yaml

    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(str(path), ["no such file"], hint="name one with --config, or run where pipeline.yaml lies") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(str(path), [f"can't be read: {error}"]) from error
    try:
        tree = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # PyYAML lets an impossible date or number through as ValueError
        raise ConfigError(str(path), [f"not valid YAML: {' '.join(str(error).split())}"]) from error
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise ConfigError(str(path), ["the top level must be a mapping of sections"])
    for override in overrides:
        _override(tree, override)
    return parse_config(tree, source=str(path), root=path.resolve().parent)


def parse_config(tree: Mapping[str, Any], *, source: str = "config", root: Path | None = None) -> PipelineConfig:
    """A PipelineConfig from a parsed YAML tree.

    Raises:
        ConfigError: every unknown key (with the nearest known one), wrong type and contradiction.
    """
    problems = _unknown_keys(tree, PipelineConfig) + _no_text(tree)
    config: PipelineConfig | None = None
    try:
        config = TypeAdapter(PipelineConfig).validate_python({**tree, "root": root or Path()})
    except ValidationError as error:
        problems += [_sentence(detail) for detail in error.errors()]
    if config is not None:
        problems += _contradictions(config)
    if problems or config is None:
        raise ConfigError(source, problems)
    return config


def section_from(kind: type[Any], values: Mapping[str, Any], *, source: str) -> Any:
    """One section (`TrainConfig`, say) from a mapping, checked the same way.

    Raises:
        ConfigError: every unknown key and wrong value.
    """
    problems = _unknown_keys(values, kind)
    try:
        section = TypeAdapter(kind).validate_python(dict(values))
    except ValidationError as error:
        raise ConfigError(source, problems + [_sentence(detail) for detail in error.errors()]) from error
    if problems:
        raise ConfigError(source, problems)
    return section


def _override(tree: dict[str, Any], override: str) -> None:
    import yaml

    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError("--set", [f"{override!r} is not KEY=VALUE, for example train.epochs=5"])
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError("--set", [f"{key}: {text!r} is not a YAML value"]) from error
    *parents, last = key.strip().split(".")
    for parent in parents:
        child = tree.get(parent)
        if child is None:
            child = tree[parent] = {}
        if not isinstance(child, dict):
            raise ConfigError("--set", [f"{key}: {parent} is not a section"])
        tree = child
    tree[last] = value


def _unknown_keys(tree: object, kind: Any, prefix: str = "") -> list[str]:
    """One line for every key that `kind` does not have, at any depth."""
    if not isinstance(tree, Mapping):
        if isinstance(tree, list):
            item = next((arg for arg in get_args(kind) if dataclasses.is_dataclass(arg)), None)
            return [line for n, child in enumerate(tree) for line in _unknown_keys(child, item, f"{prefix[:-1]}[{n}].")]
        return []
    if not dataclasses.is_dataclass(kind):
        if get_origin(kind) is not None and issubclass(_class_of(get_origin(kind)), Mapping):
            item = get_args(kind)[1]
            return [line for key, child in tree.items() for line in _unknown_keys(child, item, f"{prefix}{key}.")]
        options = [arg for arg in get_args(kind) if dataclasses.is_dataclass(arg)]
        return _unknown_keys(tree, options[0], prefix) if options else []
    hints = get_type_hints(kind)
    hints.pop("root", None)
    problems = []
    for key, child in tree.items():
        if key in hints:
            problems += _unknown_keys(child, hints[key], f"{prefix}{key}.")
            continue
        near = difflib.get_close_matches(str(key), hints, n=1, cutoff=0.6)
        problems.append(
            f"{prefix}{key}: unknown key" + (f"; did you mean {prefix}{near[0]}?" if near else f"; known here: {', '.join(hints)}")
        )
    return problems


def _no_text(tree: object, where: str = "") -> list[str]:
    """One line for every string that no file can hold."""
    if isinstance(tree, Mapping):
        return [line for key, child in tree.items() for line in _no_text(child, f"{where}.{key}" if where else str(key))]
    if isinstance(tree, list):
        return [line for n, child in enumerate(tree) for line in _no_text(child, f"{where}[{n}]")]
    odd = isinstance(tree, str) and ("\0" in tree or any(0xD800 <= ord(character) < 0xE000 for character in tree))
    return [f"{where}: holds a NUL or half a character"] if odd else []


def _class_of(origin: Any) -> type:
    return origin if isinstance(origin, type) and origin not in (Union, types.UnionType) else object


def _sentence(detail: Any) -> str:
    where = ".".join(str(part) for part in detail["loc"] if not (isinstance(part, str) and part[:1].isupper()))
    got = "" if detail["type"] == "missing" else f" (got {str(detail['input'])[:80]!r})"
    return f"{where}: {detail['msg']}{got}"


def _contradictions(config: PipelineConfig) -> list[str]:
    """Problems that no single value shows."""
    problems = []
    shares = config.dataset.split
    if abs(shares.train + shares.valid + shares.test - 1) > 1e-6:
        problems.append(f"dataset.split: shares must add up to 1, not {shares.train + shares.valid + shares.test:g}")
    if shares.train == 0 or shares.test == 0:
        problems.append("dataset.split: train and test must be above 0")
    problems += rating_problems(config.dataset.ratings)
    problems += _publish_problems(config.project, config.publish)
    for code in config.dataset.language.split(","):
        if not re.fullmatch(r"[a-z]{2,3}(-[A-Za-z0-9]{2,8})*|code|multilingual", code.strip()):
            problems.append(f"dataset.language: {code.strip()!r} is not an ISO 639 code such as en (several: en, de)")
    if not config.dataset.columns.text:
        problems.append("dataset.columns.text: name at least one column")
    reserved = {"base", "fine_tuned", "model_set", "copilot", "majority"} & set(config.dataset.raters)
    problems += [f"dataset.raters.{name}: this name is taken; choose another" for name in sorted(reserved)]
    known = {"base", "fine_tuned", "model_set"}
    for system in config.evaluate.systems:
        if system not in known:
            problems.append(
                f"evaluate.systems: {system!r} is not one of {', '.join(sorted(known))} (copilot and raters join by themselves)"
            )
    return problems


def rating_problems(ratings: Sequence[Rating]) -> list[str]:
    """What is wrong with a rating scale: too few, or a text that could mean two ratings."""
    problems = []
    if len(ratings) < 2:
        problems.append("dataset.ratings: name at least two ratings")
    seen: dict[str, str] = {}
    for rating in ratings:
        if not rating.label.strip() or any(ord(c) < 32 for c in rating.label) or '"' in rating.label or "\\" in rating.label:
            problems.append(f"dataset.ratings: the label {rating.label!r} must be printable text without quotes or backslashes")
        for text in dict.fromkeys(fold(str(t)) for t in (rating.value, rating.label, *rating.aliases)):
            if text in seen and seen[text] != rating.label:
                problems.append(f"dataset.ratings: {text!r} stands for both {seen[text]!r} and {rating.label!r}")
            seen[text] = rating.label
    if len({rating.label for rating in ratings}) < len(ratings):
        problems.append("dataset.ratings: two ratings have the same label")
    return problems


def fold(text: str) -> str:
    """A rating's text with case and runs of spaces forgiven."""
    return " ".join(text.casefold().split())


def _publish_problems(project: str, publish: PublishConfig) -> list[str]:
    """What would be found out only after hours of training."""
    if not publish.enabled:
        return []
    if not publish.namespace:
        return ["publish.namespace: needed where publish.enabled is true: your user name or organisation on the Hub"]
    return [
        f"{key}: {name!r} can't be part of a repository's name on the Hub: letters, digits, and single - _ . between them"
        for key, name in (("publish.namespace", publish.namespace), ("project", project))
        if not re.fullmatch(r"[A-Za-z0-9_]+([-.][A-Za-z0-9_]+)*", name)
    ]
