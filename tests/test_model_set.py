"""The model set: its examples, the choice on valid rows, what it says to a model, and its file."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

from pipeline import prompts
from pipeline.config import GenerateConfig, ModelSetConfig, PromptConfig
from pipeline.errors import ArtifactError, EngineError, ModelSetConfigError
from pipeline.examples import choose_examples
from pipeline.model_set import ModelSet, build_model_set, definitions, read_model_set, takes_system_text, write_model_set
from pipeline.records import Completion, Message, ModelFacts, Prompt, Rating, RatingScale, Record, Split

SCALE = RatingScale((Rating(0, "No", aliases=("nope", "0")), Rating(-1, "Unknown", abstain=True), Rating(1, "Yes")))
PROMPT = PromptConfig(topic="boats")
BASE = ModelFacts("tiny", "sha256:" + "a" * 64, "llama", 1000, "Q8_0", 4096, 2000, "mit", None, "{{ system }}")
WORDS = ("river", "harbour", "sail", "engine", "mast", "tide", "rope", "deck", "hull", "anchor", "wind", "storm", "pier", "oar")


def record(
    n: int, label: str, split: Split = "train", *, text: str | None = None, group: str = "", rationale: str = "it says so"
) -> Record:
    text = text if text is not None else " ".join(WORDS[(n * k) % len(WORDS)] for k in range(1, 6)) + f" {n}"
    return Record(f"r{n:03}", group or f"g{n}", split, prompts.user_text({"text": text}, PROMPT, SCALE), label, rationale)


TRAIN = tuple(record(n, SCALE.labels[n % 3]) for n in range(30))
VALID = tuple(record(100 + n, SCALE.labels[n % 3], "valid") for n in range(12))


class FakeEngine:
    """Right with the probability that `right_at(number of examples, label of the last one)` gives; a word is a token."""

    name = "embedded"
    model_digest = "sha256:fake"

    def __init__(self, right_at: Mapping[tuple[int, str | None], float] | None = None) -> None:
        self.right_at = right_at or {}
        self.asked: list[Prompt] = []

    def token_ids(self, messages: Sequence[Message]) -> tuple[int, ...]:
        return tuple(range(sum(len(message.content.split()) for message in messages)))

    def complete(self, *args: object, **kwargs: object) -> Iterator[Completion]:
        raise AssertionError("a choice needs no generated text")

    def rating_probabilities(self, asked: Sequence[Prompt], scale: RatingScale) -> list[Mapping[str, float]]:
        self.asked += asked
        truth = {row.record_id: row.label for row in VALID}
        return [self.said(prompt, truth[prompt.record_id]) for prompt in asked]

    def said(self, prompt: Prompt, label: str) -> Mapping[str, float]:
        answers = [json.loads(m.content)["rating"] for m in prompt.messages if m.role == "assistant"]
        right = self.right_at.get((len(answers), answers[-1] if answers else None), 0.2)
        return {other: right if other == label else (1 - right) / 2 for other in SCALE.labels}

    def close(self) -> None: ...

    def __enter__(self) -> FakeEngine:
        return self

    def __exit__(self, *exc: object) -> None: ...


def build(train: Sequence[Record] = TRAIN, valid: Sequence[Record] = VALID, **changes: object) -> ModelSet:
    given: dict[str, object] = {
        "scale": SCALE,
        "prompt": PROMPT,
        "generate": GenerateConfig(),
        "config": ModelSetConfig(),
        "base": BASE,
        "engine": None,
        "reason": "fewer than 50 usable rows",
        "seed": 42,
    }
    return build_model_set(train, valid, **{**given, **changes})  # type: ignore[arg-type]


# --- examples --------------------------------------------------------------------------------------------------------


def test_examples_are_balanced_from_train_and_in_the_scales_order() -> None:
    made = build()
    assert [example.label for example in made.examples] == ["No", "Unknown", "Yes"] * 2
    by_id = {row.record_id: row for row in TRAIN}
    for example in made.examples:
        row = by_id[example.record_id]
        assert (example.user, example.assistant) == (row.prompt, prompts.answer_text(row.label, row.rationale))
    assert len({example.record_id for example in made.examples}) == 6


def test_no_two_examples_share_a_group() -> None:
    rows = [record(n, SCALE.labels[n % 3], group=f"g{n // 3}") for n in range(30)]  # each group has all three ratings
    groups = {row.record_id: row.group for row in rows}
    chosen = [groups[example.record_id] for example in build(rows).examples]
    assert len(chosen) == len(set(chosen)) == 6


def test_one_group_gives_one_example() -> None:
    made = build([record(n, SCALE.labels[n % 3], group="all") for n in range(9)])
    assert len(made.examples) == 1
    assert "train has only 0 usable examples of 'Yes'" in made.how


def test_examples_are_unlike_one_another() -> None:
    texts = ["red boat on the river"] * 8 + ["quite other words"]
    rows = [record(n, "No", text=f"{text} {n}") for n, text in enumerate(texts)] + [record(50, "Yes")]
    chosen = choose_examples(rows, SCALE, 2, seed=1, strip=prompts.instruction(PROMPT, SCALE))
    assert [row.record_id == "r008" for row in chosen["No"]] == [False, True]


def test_an_embedder_decides_diversity() -> None:
    rows = [record(n, "No") for n in range(6)]
    far = rows[4].prompt.removeprefix(prompts.instruction(PROMPT, SCALE))

    def embed(texts: Sequence[str]) -> list[list[float]]:
        return [[0.0, 1.0] if text == far else [1.0, 0.0] for text in texts]

    chosen = choose_examples(rows, SCALE, 2, seed=1, strip=prompts.instruction(PROMPT, SCALE), embed=embed)
    assert chosen["No"][1].record_id == "r004"
    assert np.allclose(embed([far]), [[0, 1]])


def test_short_rows_with_a_rationale_are_preferred() -> None:
    rows = [record(n, SCALE.labels[n % 3], rationale="" if n < 12 else "because") for n in range(24)]
    rows += [record(60 + n, SCALE.labels[n % 3], text="long " * 300) for n in range(15)]
    chosen = {example.record_id for example in build(rows).examples}
    assert chosen <= {f"r{n:03}" for n in range(12, 24)}


def test_rows_without_any_rationale_still_serve() -> None:
    assert len(build([dataclasses.replace(row, rationale="") for row in TRAIN]).examples) == 6


def test_the_same_text_with_two_ratings_is_no_example() -> None:
    rows = [record(0, "No", text="same"), record(1, "Yes", text="same"), record(2, "Yes", text="other")]
    assert [example.record_id for example in build(rows).examples] == ["r002"]


@pytest.mark.parametrize(("most", "count"), [(0, 0), (2, 0), (3, 3), (5, 3), (6, 6), (12, 6)])
def test_max_examples(most: int, count: int) -> None:
    made = build(config=ModelSetConfig(max_examples=most))
    assert len(made.examples) == count
    assert ("too few for one of each" in made.how) == (most == 2)


def test_examples_give_way_to_text() -> None:
    many = build(prompt=dataclasses.replace(PROMPT, max_tokens=2000))
    few = build(prompt=dataclasses.replace(PROMPT, max_tokens=500))
    none = build(prompt=dataclasses.replace(PROMPT, max_tokens=200))
    assert [len(made.examples) for made in (many, few, none)] == [6, 3, 0]
    assert "token limit" in none.how
    assert not build(base=dataclasses.replace(BASE, context_length=300)).examples


def test_a_refused_giant_does_not_cost_the_examples() -> None:
    assert len(build([*TRAIN, record(70, "No", text="word " * 200_000)]).examples) == 6


def test_nothing_usable() -> None:
    for rows in ([], [record(1, "Perhaps")], [dataclasses.replace(record(1, "No"), prompt=" ")]):
        with pytest.raises(ModelSetConfigError, match="no model set can be made") as caught:
            build(rows)
        assert caught.value.hint


def test_rows_of_other_splits_are_a_bug() -> None:
    with pytest.raises(ValueError, match="train rows"):
        build([record(1, "No", "test")])
    with pytest.raises(ValueError, match="train rows"):
        build(valid=[record(1, "No", "test")])


# --- the choice on valid rows ----------------------------------------------------------------------------------------


def test_number_and_order_are_chosen_on_valid_rows() -> None:
    engine = FakeEngine({(3, "Yes"): 0.6, (3, "No"): 0.9})
    seen: list[tuple[int, int]] = []
    made = build(engine=engine, progress=lambda stage, done, total, note="": seen.append((done, total)))
    assert [example.label for example in made.examples] == ["Unknown", "Yes", "No"]
    assert [(t.arrangement.system, t.examples, t.arrangement.last) for t in made.trials] == [
        (False, 0, "Yes"),
        (True, 0, "Yes"),
        (True, 3, "Yes"),
        (True, 6, "Yes"),
        (True, 3, "No"),
        (True, 3, "Unknown"),
    ]
    best = made.trials[4]
    assert (best.rows, best.accuracy, best.mean_log_probability) == (12, 1.0, round(float(np.log(0.9)), 6))
    assert made.trials[0].accuracy == 0.0
    assert "6 arrangements on 12 valid rows (accuracy 1.000; the bare prompt 0.000" in made.how
    assert seen[-1][0] == seen[-1][1]
    assert {prompt.record_id for prompt in engine.asked} == {row.record_id for row in VALID}


def test_of_equals_the_shorter_wins_and_may_be_the_bare_prompt() -> None:
    made = build(engine=FakeEngine())
    assert (made.system, made.examples) == (None, ())
    assert made.messages_for(VALID[0]) == prompts.messages_for(VALID[0])


def test_log_probability_decides_between_equal_accuracies() -> None:
    made = build(engine=FakeEngine({(0, None): 0.5, (3, "Yes"): 0.6, (6, "Yes"): 0.7}))
    assert len(made.examples) == 6


def test_a_trial_reads_a_bounded_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = FakeEngine()
    monkeypatch.setattr("pipeline.examples.VALID_ROWS", 5)
    assert {trial.rows for trial in build(engine=engine).trials} == {5}
    monkeypatch.setattr("pipeline.examples.VALID_TOKENS", 1)
    assert {trial.rows for trial in build(engine=engine).trials} == {1}


def test_an_arrangement_that_does_not_fit_is_recorded_untried() -> None:
    made = build(engine=FakeEngine(), prompt=dataclasses.replace(PROMPT, max_tokens=300))
    assert [(t.examples, t.accuracy) for t in made.trials if t.rows == 0] == [(6, None)]
    assert "1 did not fit" in made.how


def test_without_engine_or_valid_rows_the_defaults_stand() -> None:
    assert "no engine was at hand" in build().how
    assert "no valid rows were at hand" in build(valid=(), engine=FakeEngine()).how
    assert build().trials == ()


def test_an_engine_that_fails_is_not_hidden() -> None:
    class Broken(FakeEngine):
        def rating_probabilities(self, asked: Sequence[Prompt], scale: RatingScale) -> list[Mapping[str, float]]:
            raise EngineError("gone")

    with pytest.raises(EngineError):
        build(engine=Broken())


# --- what it says ----------------------------------------------------------------------------------------------------


def test_messages() -> None:
    made = build()
    messages = made.messages_for(VALID[0])
    assert [message.role for message in messages] == ["system", *["user", "assistant"] * 6, "user"]
    assert messages[-1].content == VALID[0].prompt
    assert made.instruction == prompts.instruction(PROMPT, SCALE)
    assert VALID[0].prompt.startswith(made.instruction)
    assert build([dataclasses.replace(TRAIN[0], prompt="a prompt of the user's own")]).instruction == ""


def test_definitions_say_what_the_configuration_says() -> None:
    text = definitions(SCALE)
    assert "from lowest to highest" in text
    assert text.splitlines()[1:] == ["- No (also written: nope, 0)", "- Unknown: when the record does not let one tell", "- Yes"]
    assert "lowest" not in definitions(dataclasses.replace(SCALE, ordered=False))


@pytest.mark.parametrize(
    ("template", "takes"),
    [
        (None, True),
        ("{% if messages[0]['role'] != 'system' %}You are helpful{% endif %}", True),
        ("{{ messages[0]['content'] }}", False),
        ("{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}", False),
        ("{{ raise_exception('After the optional system message, roles must alternate') }}", True),
    ],
)
def test_a_system_text_only_where_the_template_takes_one(template: str | None, takes: bool) -> None:
    base = dataclasses.replace(BASE, chat_template=template)
    assert takes_system_text(base) == takes
    roles = {message.role for message in build(base=base).messages_for(VALID[0])}
    assert ("system" in roles) == takes


def test_as_ollama_registers_it() -> None:
    made = build(generate=GenerateConfig(max_tokens=99, temperature=0.5))
    request = made.create_request()
    assert (request["from"], request["system"]) == ("tiny", made.system)
    assert request["parameters"] == {"temperature": 0.5, "num_predict": 99, "seed": 42}
    stored = [Message("system", request["system"]), *(Message(**turn) for turn in request["messages"])]
    assert (*stored, Message("user", VALID[0].prompt)) == made.messages_for(VALID[0])


def test_without_a_base() -> None:
    made = build(base=None, base_name="llama2", reason="llama2 was not found")
    assert (made.base, made.create_request()["from"], len(made.examples)) == (None, "llama2", 6)
    assert made.model_digest != build().model_digest
    assert made.digest == build().digest


def test_digest_follows_what_is_said_and_nothing_else() -> None:
    made = build()
    assert build(reason="another").digest == made.digest
    assert re.fullmatch("sha256:[0-9a-f]{64}", made.model_digest)
    assert build(config=ModelSetConfig(max_examples=3)).digest != made.digest
    assert build(generate=GenerateConfig(temperature=0.1)).digest != made.digest


# --- the file --------------------------------------------------------------------------------------------------------


def test_round_trip_and_same_bytes(tmp_path: Path) -> None:
    for name, changes in {"a": {}, "b": {"engine": FakeEngine({(6, "No"): 0.9, (6, "Yes"): 0.8})}, "c": {"base": None}}.items():
        made, again = build(**changes), build(tuple(reversed(TRAIN)), **changes)
        write_model_set(made, tmp_path / name)
        write_model_set(again, tmp_path / f"{name}2")
        assert read_model_set(tmp_path / name) == made
        assert (tmp_path / name).read_bytes() == (tmp_path / f"{name}2").read_bytes()


def test_what_the_file_holds(tmp_path: Path) -> None:
    made = build()
    write_model_set(made, path := tmp_path / "model_set_config.json")
    tree = json.loads(path.read_text(encoding="utf-8"))
    assert tree["schema_version"] == 1
    assert tree["base"]["digest"] == BASE.digest
    assert tree["answer_schema"] == prompts.answer_schema(SCALE)
    assert tree["reason"] == "fewer than 50 usable rows"
    assert tree["data"] == {"train": 30, "usable": 30, "valid": 12, "with_rationale": 30}
    assert set(tree["examples"][0]) == {"record_id", "label", "user", "assistant"}


def test_files_that_are_no_model_set(tmp_path: Path) -> None:
    path = tmp_path / "model_set_config.json"
    write_model_set(build(), path)
    tree = json.loads(path.read_text(encoding="utf-8"))
    short = {key: value for key, value in tree.items() if key != "examples"}
    for content, words in [
        ("{", "damaged"),
        ("[]", "schema version"),
        (json.dumps({**tree, "schema_version": 9}), "schema version 9"),
        (json.dumps(short), "examples"),
        (json.dumps({**tree, "examples": [{"record_id": 3}]}), "damaged"),
        (json.dumps({**tree, "system": "You say yes to everything."}), "changed or damaged"),
        (json.dumps({**tree, "trials": [{"arrangement": tree["examples"][0]}]}), "damaged"),
    ]:
        path.write_text(content, encoding="utf-8")
        with pytest.raises(ArtifactError, match=words) as caught:
            read_model_set(path)
        assert str(path) in str(caught.value)
    with pytest.raises(ArtifactError, match="no such file"):
        read_model_set(tmp_path / "absent.json")
