"""The sample that ships: reproducible, balanced, free of near duplicates, and not solved by words alone."""

from __future__ import annotations

import csv
import re
import runpy
from collections import Counter
from itertools import combinations
from pathlib import Path
from statistics import mean, median

import pytest

from pipeline.config import DatasetConfig

DATA = Path(__file__).parents[1] / "data"
KEYWORDS = re.compile(
    r"cough|fever|flu|pneumonia|pna|cold|sore throat|phlegm|sputum|covid|croup|runny|wheez|bronch|chest inf|rsv|strep|sinus|congest",
    re.IGNORECASE,
)
NEGATION = re.compile(r"\b(no|not|nil|denies|denied|without|afebrile|afeb)\b", re.IGNORECASE)
SCALE = DatasetConfig().scale
LABELS = {spelling.casefold(): rating.label for rating in SCALE.ratings for spelling in (rating.label, *rating.aliases)}

Rows = list[dict[str, str]]


@pytest.fixture(scope="module")
def script() -> dict[str, object]:
    return runpy.run_path(str(DATA / "make_chief_complaints.py"))


@pytest.fixture(scope="module")
def rows() -> Rows:
    with (DATA / "chief_complaints.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def label(cell: str) -> str:
    return LABELS[cell.strip().casefold()]


def text(row: dict[str, str]) -> str:
    return f"{row['chief_complaint']} {row['triage_note']}"


def words(rows: Rows, column: str) -> list[int]:
    return [len(row[column].split()) for row in rows if row[column]]


def trigrams(row: dict[str, str]) -> set[tuple[str, ...]]:
    found = re.findall(r"\w+", text(row).casefold())
    return set(zip(found, found[1:], found[2:], strict=False)) or {tuple(found)}


def accuracy(rows: Rows, guesses: list[str]) -> float:
    return mean(guess == label(row["expert_rating"]) for row, guess in zip(rows, guesses, strict=True))


# --- the script ------------------------------------------------------------------------------------------------------


def test_script_writes_the_committed_bytes(script):
    cases = script["read_cases"]((DATA / "cases.txt").read_text(encoding="utf-8"))
    assert script["table"](cases).encode("utf-8") == (DATA / "chief_complaints.csv").read_bytes()


def test_an_unreadable_case_is_named(script):
    with pytest.raises(ValueError, match="M - cough"):
        script["read_cases"]("M - cough - note\n  why\n")


# --- the table -------------------------------------------------------------------------------------------------------


def test_size_groups_and_ids(rows):
    groups = Counter(row["facility_day"] for row in rows)
    assert 300 <= len(rows) <= 330
    assert 60 <= len(groups) <= 80
    assert min(groups.values()) >= 2
    assert len({row["record_id"] for row in rows}) == len(rows)
    assert all(re.fullmatch(r"[a-z]+-2031-\d\d-\d\d", name) for name in groups)


def test_ratings_are_mappable_balanced_and_sometimes_loosely_typed(rows):
    shares = {name: count / len(rows) for name, count in Counter(label(row["expert_rating"]) for row in rows).items()}
    assert shares == {
        "Match": pytest.approx(0.42, abs=0.03),
        "Does Not Match": pytest.approx(0.40, abs=0.03),
        "Unknown": pytest.approx(0.18, abs=0.03),
    }
    loose = [row for row in rows if row["expert_rating"] not in SCALE.labels]
    assert 5 <= len(loose) <= 30
    assert any(row["expert_rating"].casefold() == "no match" for row in loose)


@pytest.mark.parametrize(("who", "share", "agreement"), [("copilot", (0.55, 0.65), (0.70, 0.80)), ("second", (0.35, 0.45), (0.85, 0.88))])
def test_opinions(rows, who, share, agreement):
    given = [row for row in rows if row[f"{who}_rating"]]
    agreed = mean(label(row[f"{who}_rating"]) == label(row["expert_rating"]) for row in given)
    assert share[0] <= len(given) / len(rows) <= share[1]
    assert agreement[0] <= agreed <= agreement[1]
    assert all(bool(row[f"{who}_rating"]) == bool(row[f"{who}_rationale"]) for row in rows)


def test_lengths(rows):
    rationales, notes, whole = words(rows, "expert_rationale"), words(rows, "triage_note"), [len(text(row).split()) for row in rows]
    assert min(rationales) >= 8
    assert max(rationales) <= 25
    assert 14 <= median(rationales) <= 18
    assert max(notes) <= 45
    assert median(whole) <= 35
    assert sum(count >= 28 for count in notes) >= 30  # run-on notes too, not only terse ones


def test_rationales_are_of_their_own_and_name_no_rating(rows):
    rationales = [row[f"{who}_rationale"] for row in rows for who in ("expert", "copilot", "second")]
    assert not [rationale for rationale in rationales if re.search(r"\b(match\w*|unknown)\b", rationale, re.IGNORECASE)]
    assert len({row["expert_rationale"] for row in rows}) == len(rows)


def test_no_near_duplicates(rows):
    sets = [trigrams(row) for row in rows]
    assert max(len(a & b) / len(a | b) for a, b in combinations(sets, 2)) < 0.6


def test_no_cell_looks_like_a_formula(rows):
    assert not [row["record_id"] for row in rows if any(cell.startswith(("=", "+", "-", "@")) for cell in row.values())]


# --- hard enough to be worth learning --------------------------------------------------------------------------------


@pytest.mark.parametrize("other", ["Does Not Match", "Unknown"])
@pytest.mark.parametrize("hits", [1, 2, 3])
def test_keywords_do_not_solve_it(rows, other, hits):
    found = [len({hit.casefold() for hit in KEYWORDS.findall(text(row))}) for row in rows]
    assert accuracy(rows, ["Match" if count >= hits else other for count in found]) < 0.65


def test_keywords_with_negations_and_lengths_do_not_solve_it(rows):
    def guess(row: dict[str, str]) -> str:
        if NEGATION.search(text(row)):
            return "Does Not Match"
        if len(text(row).split()) < 12:
            return "Unknown"
        return "Match" if KEYWORDS.search(text(row)) else "Does Not Match"

    assert accuracy(rows, [guess(row) for row in rows]) < 0.70


def test_a_bag_of_words_learns_something_but_not_all(rows):
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GroupKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline

    learner = make_pipeline(CountVectorizer(), LogisticRegression(max_iter=2000))
    truth, groups = [label(row["expert_rating"]) for row in rows], [row["facility_day"] for row in rows]
    guesses = cross_val_predict(learner, [text(row) for row in rows], truth, groups=groups, cv=GroupKFold(5))
    majority = max(Counter(truth).values()) / len(rows)
    assert majority + 0.10 < accuracy(rows, list(guesses)) < 0.85
