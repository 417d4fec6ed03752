"""What the check of a served model against the trained one measures, and what it refuses."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import GenerateConfig
from pipeline.errors import ArtifactError
from pipeline.parity import agreement, check_parity
from pipeline.prompts import messages_for
from pipeline.rating_tree import RatingTree
from pipeline.records import Completion, Message, Rating, RatingScale, Record, TokenRow
from pipeline.training_rows import answer_tree, tokenised
from tests.fakes import FakeEngine

SCALE = RatingScale((Rating(0, "No"), Rating(1, "Yes")))
RECORDS = tuple(Record(f"r{n}", f"r{n}", "valid", f"text {n}", ("No", "Yes")[n % 2], f"because of {n}") for n in range(10))


class LetterEngine(FakeEngine):
    """Tokens are characters; after any text comes 'a' (0.6) or 'b' (0.3)."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.places: list[str] = []

    def tokenize(self, text: str) -> tuple[int, ...]:
        return tuple(map(ord, text))

    def next_token_logprobs(self, token_ids: Sequence[int], n: int) -> Mapping[int, float]:
        self.places.append("".join(map(chr, token_ids)))
        return {97: math.log(0.6), 98: math.log(0.3)}


class Trained:
    """Agrees with the engine but where it is told not to."""

    def __init__(self, *, flipped: int = 0, likely: Mapping[int, float] | None = None) -> None:
        self.flipped, self.likely, self.result = flipped, likely or {97: 0.6, 98: 0.3}, None

    def rating_probabilities(self, prompts: Sequence[Sequence[int]], tree: RatingTree | None) -> list[dict[str, float]]:
        texts = ["".join(map(chr, ids)).removeprefix("<user>").removesuffix("<assistant>") for ids in prompts]
        asked = [type("Asked", (), {"messages": (Message("user", text),)})() for text in texts]
        found = [dict(row) for row in FakeEngine().rating_probabilities(asked, SCALE)]
        for row in found[: self.flipped]:
            row["No"], row["Yes"] = row["Yes"], row["No"]
        return found

    def top_logprobs(self, tokens: Sequence[int], n: int) -> dict[int, float]:
        return {token: math.log(share) for token, share in self.likely.items()}

    def write_unchanged(self, path: Path) -> None:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"unchanged")


def check(
    folder: Path,
    trained: Trained | None = None,
    engine: LetterEngine | None = None,
    rows: dict[str, TokenRow] | None = None,
    server: LetterEngine | None = None,
) -> Any:
    engine = engine or LetterEngine()
    trained = trained or Trained()
    found = tokenised(RECORDS, LetterEngine(), SCALE, max_tokens=1000, context_tokens=1000)
    return check_parity(
        trained,  # type: ignore[arg-type]
        RECORDS,
        rows or {row.record_id: row for row in found.valid},
        Trained().rating_probabilities([row.prompt for row in found.valid], found.tree),
        tree=answer_tree(LetterEngine(), SCALE),
        scale=SCALE,
        generate=GenerateConfig(),
        base=folder / "base.gguf",
        output_dir=folder,
        open_engine=lambda model, *, adapter=None, context_tokens=0: engine,
        serve=(lambda model: server) if server else None,
    )


class OtherTemplate(LetterEngine):
    """A server that puts a system text of its own before every chat."""

    def render(self, messages: Sequence[Message]) -> str:
        return "<system>Be kind.\n" + super().render(messages)


class DoubledStart(LetterEngine):
    """A server that reads one token more than it was sent."""

    def complete(self, *arguments: Any, **settings: Any) -> Iterator[Completion]:
        for done in super().complete(*arguments, **settings):
            yield dataclasses.replace(done, prompt_tokens=done.prompt_tokens + 1)


def test_a_server_is_checked_beside_the_files(tmp_path: Path) -> None:
    assert "served" not in check(tmp_path)
    served = check(tmp_path, server=LetterEngine())["served"]
    assert served["agreement"] == 1.0
    assert (served["prompt_ids_differ"], served["prompt_lengths_differ"], served["prompt_diff"]) == ([], [], [])


def test_prompts_of_a_server_that_differ_are_shown_without_a_record(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError) as caught:
        check(tmp_path, server=OtherTemplate())
    said = str(caught.value)
    assert "served: the prompt's token ids differ from those trained on in 10 rows" in said
    assert " <user>To be, or not to be?<assistant>" in said
    assert "+<system>Be kind." in said
    assert "text 1" not in said
    assert caught.value.exit_code == 4


def test_a_server_that_reads_other_tokens_is_found_by_their_number(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="served: it read another number of prompt tokens than was trained on in 8 rows"):
        check(tmp_path, server=DoubledStart())


def test_near_ties_are_counted_apart() -> None:
    wanted = [{"No": 0.9, "Yes": 0.1}, {"No": 0.51, "Yes": 0.49}, {"No": 0.7, "Yes": 0.3}, {"No": 0.2, "Yes": 0.8}]
    found = [{"No": 0.8, "Yes": 0.2}, {"No": 0.48, "Yes": 0.52}, {"No": 0.4, "Yes": 0.6}, {"No": 0.2, "Yes": 0.8}]
    assert agreement(wanted, found) == {
        "same_rating": 2,
        "near_ties": 1,
        "agreement": 0.75,
        "largest_probability_difference": pytest.approx(0.3),
        "mean_probability_difference": pytest.approx((0.1 + 0.03 + 0.3 + 0) / 4),
    }


def test_tokens_are_compared_where_the_answer_is_open(tmp_path: Path) -> None:
    """At the rating, and twice within what follows it; after the prompt alone every model says the same."""
    engine = LetterEngine()
    report = check(tmp_path, Trained(likely={97: 0.5, 98: 0.3, 99: 0.15}), engine)
    assert report["merged"]["largest_token_difference"] == pytest.approx(0.15)  # the served model does not know the third
    assert report["adapter"]["largest_token_difference"] == pytest.approx(0.15)
    answers = [place.rpartition("<assistant>")[2] for place in engine.places[:3]]
    assert answers[0] == '{"rating": "'
    assert all(answer.startswith('{"rating": "No') for answer in answers[1:])
    whole = len('{"rating": "No", "rationale": "because of 0"}') + 1
    assert len(answers[0]) < len(answers[1]) < len(answers[2]) < whole
    assert len(engine.places) == 2 * 8 * 3


def test_ratings_that_differ(tmp_path: Path) -> None:
    served = Trained().rating_probabilities([LetterEngine().token_ids(messages_for(record)) for record in RECORDS], None)
    flipped = sum(abs(row["No"] - row["Yes"]) >= 0.05 for row in served)
    with pytest.raises(ArtifactError, match=r"merged: only .* of 10 ratings agree") as caught:
        check(tmp_path, Trained(flipped=10))
    assert flipped > 1
    assert f"{1 - flipped / 10:.0%}" in str(caught.value)
    assert caught.value.exit_code == 4
    assert not (tmp_path / "unchanged.gguf").exists()


def test_prompts_that_are_tokenised_otherwise(tmp_path: Path) -> None:
    rows = {row.record_id: row for row in tokenised(RECORDS, LetterEngine(), SCALE, max_tokens=1000, context_tokens=1000).valid}

    class Other(LetterEngine):
        def token_ids(self, messages: Sequence[Message]) -> tuple[int, ...]:
            return (7, *super().token_ids(messages))

    with pytest.raises(ArtifactError, match="token ids differ from those trained on in 10 rows") as caught:
        check(tmp_path, engine=Other(), rows=rows)
    assert "text 1" not in str(caught.value)


def test_answers_that_are_not_valid(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="merged: 8 of 8 answers are not valid"):
        check(tmp_path, engine=LetterEngine(respond=lambda prompt: "I think so"))
