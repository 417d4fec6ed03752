"""The model set: the base model with a system text and solved examples in front, no weights changed.

Examples come from train rows only; their number and order are chosen on valid rows where an engine is at hand. It never sees a test row.
To an Ollama server it is `from` + `system` + `messages` + `parameters` (`ModelSet.create_request`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from pipeline import prompts
from pipeline.config import GenerateConfig, ModelSetConfig, PromptConfig
from pipeline.errors import ArtifactError, ModelSetConfigError
from pipeline.examples import (
    Desk,
    SolvedExample,
    Trial,
    best_arrangement,
    choose_examples,
    longest_fitting,
    sample_rows,
    token_counter,
    try_arrangements,
    turns,
)
from pipeline.ports import Embedder, Engine, Progress, quiet
from pipeline.records import Message, ModelFacts, RatingScale, Record, fingerprint, to_plain
from pipeline.store import read_json, write_json

SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True)
class ModelSet:
    """model_set_config.json. `reason`: why a model set at all; `how`: why these examples in this order."""

    base: ModelFacts | None  # None when its name led to no file
    base_name: str | None
    scale: RatingScale
    system: str | None
    instruction: str  # what every user turn begins with; "" when the rows came with prompts of their own
    examples: tuple[SolvedExample, ...]
    options: Mapping[str, float | int]  # temperature, num_predict, seed: Ollama's names
    reason: str
    how: str
    trials: tuple[Trial, ...]
    data: Mapping[str, int]  # counts of rows
    schema_version: int = SCHEMA_VERSION

    @property
    def turns(self) -> tuple[Message, ...]:
        """The solved examples as chat turns."""
        return turns(None, self.examples)

    def messages_for(self, record: Record) -> tuple[Message, ...]:
        """The chat for one record: system text, solved examples, the record's own turn."""
        return (*turns(self.system, self.examples), *prompts.messages_for(record))

    @property
    def digest(self) -> str:
        """Fingerprint of what it says to a model; reasons and figures don't count."""
        return fingerprint("model_set", self.system, self.turns, self.scale.labels, self.options)

    @property
    def model_digest(self) -> str:
        """Names the answers of this model set on its base."""
        return fingerprint(self.base.digest if self.base else None, self.digest)

    def create_request(self) -> dict[str, Any]:
        """The body of Ollama's POST /api/create, less the new model's name. A request then holds the record's turn alone."""
        system = {"system": self.system} if self.system else {}
        return {"from": self.base_name, **system, "messages": to_plain(self.turns), "parameters": dict(self.options)}


def build_model_set(
    train: Sequence[Record],
    valid: Sequence[Record],
    *,
    scale: RatingScale,
    prompt: PromptConfig,
    generate: GenerateConfig,
    config: ModelSetConfig,
    base: ModelFacts | None,
    engine: Engine | None,
    reason: str,
    seed: int,
    base_name: str | None = None,
    embed: Embedder | None = None,
    progress: Progress = quiet,
) -> ModelSet:
    """The model set of these rows; the same inputs give the same one. `base_name` names a base that no file was found for.

    Raises:
        ModelSetConfigError: no train row has a rating of the scale and a text.
        EngineError: the engine failed while arrangements were tried.
        ValueError: a row of another split was handed in.
    """
    if {record.split for record in train} - {"train"} or {record.split for record in valid} - {"valid"}:
        raise ValueError("examples come from train rows and are chosen on valid rows only")
    usable = _usable(train, scale)
    instruction = _shared_instruction(usable, prompt, scale)
    chosen = choose_examples(usable, scale, config.max_examples // len(scale.labels), seed=seed, strip=instruction, embed=embed)
    limit = min(prompt.max_tokens, base.context_length - generate.max_tokens) if base else prompt.max_tokens
    measure = token_counter(engine)
    longest = longest_fitting([*usable, *valid], measure, limit)
    desk = Desk(scale, definitions(scale) if takes_system_text(base) else None, chosen, measure, longest, limit)
    trials: tuple[Trial, ...] = ()
    if engine is not None and (sample := sample_rows(valid, seed, desk)):
        trials = try_arrangements(desk, engine, sample, progress)
    best, how = best_arrangement(desk, trials, has_engine=engine is not None, max_examples=config.max_examples)
    examples = desk.examples(best)
    return ModelSet(
        base=base,
        base_name=base.name if base else base_name,
        scale=scale,
        system=desk.system if best.system else None,
        instruction=instruction,
        examples=examples,
        options={"temperature": generate.temperature, "num_predict": generate.max_tokens, "seed": seed},
        reason=reason,
        how=how,
        trials=trials,
        data={"train": len(train), "usable": len(usable), "valid": len(valid), "with_rationale": sum(bool(r.rationale) for r in usable)},
    )


def definitions(scale: RatingScale) -> str:
    """The system text: the ratings in order, with what the configuration says of each and nothing more."""
    order = ", from lowest to highest" if scale.ordered else ""
    lines = []
    for rating in scale.ratings:
        also = f" (also written: {', '.join(rating.aliases)})" if rating.aliases else ""
        lines.append(f"- {rating.label}{also}" + (": when the record does not let one tell" if rating.abstain else ""))
    return f"You rate records as the experts of this team do. The ratings{order}:\n" + "\n".join(lines)


def takes_system_text(base: ModelFacts | None) -> bool:
    """Whether the chat template has a place for one. Where it has, an explicit text also keeps a template from putting in
    its own default, which one engine would and another would not."""
    template = base.chat_template if base else None
    if template is None:
        return True
    refused = re.search(r"raise_exception\([^)]*system[^)]*(n[o']t support|not allowed|unsupported)", template, re.IGNORECASE)
    return "system" in template and not refused


def _usable(train: Sequence[Record], scale: RatingScale) -> list[Record]:
    usable = [record for record in train if record.label in scale.labels and record.prompt.strip()]
    if not usable:
        raise ModelSetConfigError(
            f"no model set can be made: none of the {len(train)} training rows has a text and one of the ratings {', '.join(scale.labels)}",
            hint="add rated rows, or correct dataset.ratings",
        )
    return usable


def _shared_instruction(rows: Sequence[Record], prompt: PromptConfig, scale: RatingScale) -> str:
    shared = prompts.instruction(prompt, scale)
    return shared if all(record.prompt.startswith(shared) for record in rows) else ""


# --- the file --------------------------------------------------------------------------------------------------------


def write_model_set(model_set: ModelSet, path: Path) -> None:
    """Writes model_set_config.json, atomically; the answer schema and the digest are in it for other programs to read."""
    write_json(path, {**to_plain(model_set), "answer_schema": prompts.answer_schema(model_set.scale), "digest": model_set.digest})


def read_model_set(path: Path) -> ModelSet:
    """The model set in a file, equal to the one that was written.

    Raises:
        ArtifactError: missing, damaged, changed since it was written, or of another version.
    """
    tree = read_json(path)
    again = "run the stage that makes it again: `pipeline finetune` or `pipeline run`"
    if not isinstance(tree, dict) or tree.get("schema_version") != SCHEMA_VERSION:
        found = tree.get("schema_version") if isinstance(tree, dict) else None
        raise ArtifactError(f"{path}: schema version {found!r}; this program reads {SCHEMA_VERSION}", hint=again)
    try:
        model_set = TypeAdapter(ModelSet).validate_python(tree)
    except ValidationError as error:
        places = ", ".join(".".join(map(str, detail["loc"])) for detail in error.errors()[:5])
        raise ArtifactError(f"{path}: damaged: {places} missing or of the wrong kind", hint=again) from None
    if tree.get("digest") != model_set.digest:
        raise ArtifactError(f"{path}: its content does not have the digest it names; it was changed or damaged", hint=again)
    return model_set
