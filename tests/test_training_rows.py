"""A rated table becomes records and rows of token ids, or one error that names all that is wrong with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config import PromptConfig
from pipeline.errors import DataError, FineTuningNotSupportedError
from pipeline.prompts import ANSWER_RULE, answer_text, messages_for, user_text
from pipeline.records import Message, Rating, RatingScale, Record
from pipeline.training_rows import answer_tree, end_of_turn, records_from_frame, scale_from_mapping, tokenised

SCALE = RatingScale((Rating(0, "No"), Rating(1, "Yes"), Rating(-1, "Unknown", ("unclear",), abstain=True)))
PROMPT = PromptConfig(topic="coughs")


def records(frame: pd.DataFrame, seed: int = 1) -> tuple[Record, ...]:
    return records_from_frame(frame, SCALE, PROMPT, seed=seed)


def problems_of(frame: pd.DataFrame) -> tuple[str, ...]:
    with pytest.raises(DataError) as caught:
        records(frame)
    return caught.value.problems


def table(n: int = 4, **columns: list[Any]) -> pd.DataFrame:
    base = {"prompt": [f"text {row}" for row in range(n)], "rating": ["Yes" if row % 2 else "No" for row in range(n)]}
    return pd.DataFrame({**base, **columns})


# --- the scale -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mapping", [{"No": 0, "Yes": 1}, {0: "No", 1: "Yes"}, {np.int64(0): "No", np.int64(1): "Yes"}, {"No": 0.0, "Yes": 1.0}]
)
def test_a_mapping_in_either_direction(mapping: dict[Any, Any]) -> None:
    scale = scale_from_mapping(mapping)
    assert scale.ratings == (Rating(0, "No"), Rating(1, "Yes"))
    assert all(type(rating.value) is int for rating in scale.ratings)


def test_several_labels_of_one_rating_are_aliases() -> None:
    scale = scale_from_mapping({"Match": 1, "fits": 1, "No": 0}, ordered=False)
    assert scale == RatingScale((Rating(1, "Match", ("fits",)), Rating(0, "No")), ordered=False)


def test_texts_to_texts_are_labels_to_ratings() -> None:
    assert scale_from_mapping({"Yes": "y", "No": "n"}).ratings == (Rating("y", "Yes"), Rating("n", "No"))


@pytest.mark.parametrize(
    ("mapping", "words"),
    [
        ({}, "is empty"),
        ({1: "Yes", 2: "yes "}, "'yes' stands for several ratings"),
        ({"Yes": 1.5, "No": 0}, "'Yes': 1.5 is not a label with"),
        ({"Yes": True, "No": False}, "'Yes': True"),
        ({None: 1, "No": 0}, "None: 1"),
        ({"Yes": 1}, "at least two"),
        ({"Yes": 1, " yes": 0}, "stands for both"),
        ({"1": 0, "No": 1}, "stands for both"),
        ({"a\nb": 1, "No": 0}, "printable"),
    ],
)
def test_a_mapping_that_is_no_use(mapping: dict[Any, Any], words: str) -> None:
    with pytest.raises(DataError, match="rating_mapping") as caught:
        scale_from_mapping(mapping)
    assert any(words in problem for problem in caught.value.problems)


@given(st.dictionaries(st.text(st.characters(categories=["L", "N"]), min_size=1, max_size=8), st.integers(-9, 9), min_size=1, max_size=5))
def test_a_mapping_gives_a_scale_or_a_data_error(mapping: dict[str, int]) -> None:
    try:
        scale = scale_from_mapping(mapping)
    except DataError:
        return
    for label, value in mapping.items():
        [rating] = [rating for rating in scale.ratings if label in (rating.label, *rating.aliases)]
        assert rating.value == value


# --- the table -------------------------------------------------------------------------------------------------------


def test_records_hold_what_the_table_says() -> None:
    frame = pd.DataFrame(
        {
            "record_id": ["a", "b", "c", "d"],
            "group": ["g", "g", "h", "h"],
            "split": ["train", "Validation", "TEST", "dev"],
            "formatted_prompt": [" one ", "two", "three", "four"],
            "standardized_rating": ["1", "no", "UNCLEAR", 0],
            "Rationale of Rating": ["because", None, float("nan"), " so "],
        }
    )
    found = records(frame)
    assert [record.record_id for record in found] == ["a", "b", "c", "d"]
    assert [record.group for record in found] == ["g", "g", "h", "h"]
    assert [record.split for record in found] == ["train", "valid", "test", "valid"]
    assert [record.label for record in found] == ["Yes", "No", "Unknown", "No"]
    assert [record.rationale for record in found] == ["because", "", "", "so"]


def test_a_prompt_without_the_answer_rule_gains_the_instruction() -> None:
    whole = user_text({"note": "cough"}, PROMPT, SCALE)
    first, second = records(table(2, prompt=["cough and fever", whole]))
    assert first.prompt == user_text({"record": "cough and fever"}, PROMPT, SCALE)
    assert ANSWER_RULE in first.prompt
    assert "coughs" in first.prompt
    assert second.prompt == whole


@pytest.mark.parametrize("dtype", ["object", "string", "Int64", "float64"])
def test_gaps_of_every_kind_are_gaps(dtype: str) -> None:
    ratings = [1, 0, None, 1] if dtype in ("Int64", "float64") else ["1", "0", None, "1"]
    frame = table(rating=ratings).astype({"rating": dtype})
    frame["rationale"] = pd.array(["a", pd.NA, "c", pd.NA], dtype="string")
    assert problems_of(frame) == ("column rating: empty in 1 row: 3",)
    assert [record.label for record in records(frame.dropna(subset="rating"))] == ["Yes", "No", "Yes"]
    assert [record.rationale for record in records(frame.dropna(subset="rating"))] == ["a", "", ""]


def test_everything_wrong_is_said_at_once_with_rows() -> None:
    frame = table(
        9,
        prompt=["a", "", None, "d", "  ", "f", "g", float("nan"), "i"],
        rating=["Yes", "No", None, "maybe", "maybe", "?", "", "Yes", "Yes"],
        split=["train", "train", "other", "test", "valid", None, "train", "train", "other"],
        record_id=["1", "2", "2", "4", "5", "6", "", "8", "9"],
    )
    assert problems_of(frame) == (
        "column record_id: empty in 1 row: 7",
        "column record_id: '2' stands in 2 rows: 2, 3",
        "column prompt: empty in 4 rows: 2, 3, 5, 8",
        "column rating: empty in 2 rows: 3, 7",
        "column rating: 'maybe' is not in the rating mapping (2 rows: 4, 5)",
        "column rating: '?' is not in the rating mapping (1 row: 6)",
        "column split: 'other' is not train, valid or test (2 rows: 3, 9)",
        "column split: '' is not train, valid or test (1 row: 6)",
    )


def test_many_rows_are_counted_and_the_first_shown() -> None:
    assert problems_of(table(30, prompt=[""] * 30)) == ("column prompt: empty in 30 rows: 1, 2, 3, 4, 5, …",)


def test_missing_columns_are_named_with_those_that_are_there() -> None:
    with pytest.raises(DataError) as caught:
        records(pd.DataFrame({"text": ["a"], "score": [1]}))
    assert len(caught.value.problems) == 2
    assert "formatted_prompt" in caught.value.problems[0]
    assert "Expert Rating" in caught.value.problems[1]
    assert caught.value.hint == "the columns are: text, score"


def test_no_rows_one_rating_only_and_no_train_row() -> None:
    assert problems_of(table(0)) == ("there are no rows",)
    assert problems_of(table(3, rating=["Yes"] * 3)) == ("column rating: every row is rated 'Yes'; there is nothing to tell apart",)
    assert problems_of(table(2, split=["test", "valid"])) == ("column split: no row is marked train",)


def test_texts_of_records_are_not_in_the_error() -> None:
    secret = "the patient's own words"
    said = "\n".join(problems_of(table(2, prompt=[secret, secret], rating=["?", None])))
    assert secret not in said


def test_splits_are_drawn_by_group_and_seed() -> None:
    frame = table(400, group=[f"g{row // 4}" for row in range(400)])
    found = records(frame)
    assert {record.split for record in found} == {"train", "valid"}
    assert len({(record.group, record.split) for record in found}) == 100  # a group is never torn
    assert 0.05 < sum(record.split == "valid" for record in found) / 400 < 0.25
    assert [record.split for record in records(frame)] == [record.split for record in found]
    assert [record.split for record in records(frame, seed=2)] != [record.split for record in found]
    assert {r.record_id: r.split for r in records(frame[::-1])} == {r.record_id: r.split for r in found}  # whatever the order


def test_the_same_text_twice_has_two_ids_and_one_split() -> None:
    found = records(table(40, prompt=["one", "two"] * 20))
    assert len({record.record_id for record in found}) == 40
    assert len({(record.group, record.split) for record in found}) == 2


# --- token ids -------------------------------------------------------------------------------------------------------

START, TURN_END = 1, 2


class LetterEngine:
    """Tokens are characters; a turn is START, the text, TURN_END. `turn_mark` is what opens an assistant's turn in a history."""

    def __init__(self, turn_mark: int = START) -> None:
        self.turn_mark = turn_mark

    def tokenize(self, text: str) -> tuple[int, ...]:
        return tuple(map(ord, text))

    def token_ids(self, messages: Sequence[Message]) -> tuple[int, ...]:
        found: list[int] = []
        for message in messages:
            mark = self.turn_mark if message.role == "assistant" else START
            found += [mark, *self.tokenize(message.content), TURN_END]
        return (*found, START)


def record(name: str, label: str, prompt: str = "p", split: Any = "train", rationale: str = "why") -> Record:
    return Record(name, name, split, prompt, label, rationale)


def tokens(rows: Sequence[Record], engine: Any = None, max_tokens: int = 500) -> Any:
    return tokenised(rows, engine or LetterEngine(), SCALE, max_tokens=max_tokens, context_tokens=10_000)


def test_rows_are_what_the_engine_serves() -> None:
    rows = [record("a", "Yes"), record("b", "No", split="valid"), record("c", "Yes", split="test")]
    found = tokens(rows)
    engine = LetterEngine()
    assert [row.record_id for row in found.train] == ["a"]
    assert [row.record_id for row in found.valid] == ["b"]
    [row] = found.train
    assert row.prompt == engine.token_ids(messages_for(rows[0]))
    assert row.answer == (*engine.tokenize(answer_text("Yes", "why")), TURN_END)
    assert row.rating_tokens == (len('{"rating": "'),)
    assert [{chr(token) for token in branch} for branch in row.branches] == [{"Y", "N", "U"}]
    assert found.refused == {}


def test_labels_that_part_late() -> None:
    scale = RatingScale((Rating(0, "No"), Rating(1, "No match"), Rating(2, "Yes")))
    tree = answer_tree(LetterEngine(), scale)  # type: ignore[arg-type]
    start = len('{"rating": "')
    assert [len(place) - start for place in tree.places("No match")] == [0, 2]
    assert [len(place) - start for place in tree.places("Yes")] == [0]
    assert sum(tree.probabilities(lambda place, allowed: dict.fromkeys(allowed, 1 / len(allowed))).values()) == 1


def test_rows_that_are_too_long_are_refused_and_never_cut() -> None:
    rows = [record("short", "Yes"), record("long", "No", "p" * 300), record("long too", "No", "p" * 400, split="valid")]
    limit = len(tokens(rows).train[0].prompt)
    found = tokens(rows, max_tokens=limit)
    assert [row.record_id for row in found.train] == ["short"]
    assert found.valid == ()
    assert found.refused == {"longer than prompt.max_tokens": 2}
    assert tokens(rows[:1], max_tokens=limit - 1).train == ()
    whole = tokens(rows[:1]).train[0].size
    assert tokenised(rows[:1], LetterEngine(), SCALE, max_tokens=500, context_tokens=whole).train
    assert tokenised(rows[:1], LetterEngine(), SCALE, max_tokens=500, context_tokens=whole - 1).refused == {
        "longer than the model's context": 1
    }


def test_a_rating_that_merges_with_its_rationale_is_refused() -> None:
    class Merging(LetterEngine):
        def tokenize(self, text: str) -> tuple[int, ...]:
            return super().tokenize(text.replace('Yes", "rationale": "w', "\x05"))

    found = tokens([record("merged", "Yes", rationale="well"), record("plain", "Yes", rationale="so"), record("no", "No")], Merging())
    assert [row.record_id for row in found.train] == ["plain", "no"]
    assert found.refused == {"rating tokenised in an unusual way": 1}


def test_the_end_of_turn_is_learnt_from_the_template() -> None:
    assert end_of_turn(LetterEngine()) == TURN_END  # type: ignore[arg-type]
    with pytest.raises(FineTuningNotSupportedError, match="opens an assistant's turn in another way") as caught:
        end_of_turn(LetterEngine(turn_mark=7))  # type: ignore[arg-type]
    assert caught.value.hint
