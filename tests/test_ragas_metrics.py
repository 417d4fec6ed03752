"""The ragas library itself on rationales, offline."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rapidfuzz.distance import Levenshtein
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu import sentence_chrf

from pipeline.backends import ragas_metrics
from pipeline.backends.ragas_metrics import METRICS, RagasScorer, embed
from pipeline.errors import BackendError

RESPONSES = ["Cough and fever for two days.", "No respiratory complaint.", "Ankle twisted while playing football."]
REFERENCES = ["Fever with a productive cough since Monday.", "There is no breathing complaint.", "Wheezing after exercise."]


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="module")
def scorer() -> RagasScorer:
    return RagasScorer()


def test_ragas_does_not_track() -> None:
    from ragas._analytics import do_not_track

    assert os.environ["RAGAS_DO_NOT_TRACK"] == "true"
    assert do_not_track()


def test_scores_are_those_of_the_metrics_own_libraries(scorer: RagasScorer) -> None:
    pairs = list(zip(RESPONSES, REFERENCES, strict=True))
    rouge = RougeScorer(["rougeL"], use_stemmer=True)
    assert scorer("rouge", RESPONSES, REFERENCES) == pytest.approx([rouge.score(b, a)["rougeL"].fmeasure for a, b in pairs])
    assert scorer("chrf", RESPONSES, REFERENCES) == pytest.approx(
        [sentence_chrf(a, [b], eps_smoothing=False).score / 100 for a, b in pairs]
    )
    assert scorer("string_similarity", RESPONSES, REFERENCES) == pytest.approx([Levenshtein.normalized_similarity(a, b) for a, b in pairs])
    vectors = np.array(embed([*RESPONSES, *REFERENCES]))
    cosines = (vectors[:3] * vectors[3:]).sum(1)
    similar = scorer("semantic_similarity", RESPONSES, REFERENCES)
    assert similar == pytest.approx(list(cosines), abs=1e-5)
    assert similar[0] is not None
    assert similar[2] is not None
    assert similar[0] > 0.5 > similar[2]


@pytest.mark.parametrize("metric", METRICS)
def test_equal_texts_score_one_and_rows_that_cannot_be_scored_none(scorer: RagasScorer, metric: str) -> None:
    texts = ["the same", "", "fine", "x " * 15_000]
    scores = scorer(metric, texts, ["the same", "something", " ", "fine"])
    assert scores == [pytest.approx(1.0), None, None, None]
    assert type(scores[0]) is float
    assert scorer(metric, [], []) == []


def test_rouge_cannot_read_other_scripts_but_the_others_can(scorer: RagasScorer) -> None:
    assert scorer("rouge", ["Husten", "кашель"], ["кашель", "cough"]) == [None, 0.0]
    assert scorer("chrf", ["кашель"], ["кашель"]) == [pytest.approx(1.0)]


class _Odd:
    """A metric that fails in every way on record."""

    async def ascore(self, response: str, reference: str) -> Any:
        if response == "raise":
            raise ZeroDivisionError
        return SimpleNamespace(value={"nan": float("nan"), "none": None, "far": 9.0, "low": -0.5, "edge": 1.0000001, "fine": 0.5}[response])


@pytest.fixture
def _odd_metric(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RagasScorer, "_metric", lambda self, metric: _Odd())


@pytest.mark.usefixtures("_odd_metric")
def test_a_bad_row_is_none_and_counted_without_its_text(caplog: pytest.LogCaptureFixture) -> None:
    responses = ["fine", "raise", "nan", "none", "far", "low", "edge", "fine"]
    with caplog.at_level(logging.WARNING):
        scores = RagasScorer()("chrf", responses, ["secret"] * 8)
    assert scores == [0.5, None, None, None, None, None, 1.0, 0.5]
    assert "chrf: 1 of 8 rows could not be scored (ZeroDivisionError)" in caplog.text
    assert "chrf: 4 of 8 rows could not be scored (not a number in range)" in caplog.text
    assert "secret" not in caplog.text


def test_a_missing_library_is_an_error_and_not_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    class Missing:
        async def ascore(self, **_: str) -> Any:
            raise ImportError("no rouge_score")

    monkeypatch.setattr(RagasScorer, "_metric", lambda self, metric: Missing())
    with pytest.raises(BackendError, match="rouge needs a library"):
        RagasScorer()("rouge", ["a"], ["a"])


def test_wrong_calls(scorer: RagasScorer) -> None:
    with pytest.raises(ValueError, match="no metric 'bleu'"):
        scorer("bleu", [], [])
    with pytest.raises(ValueError, match="shorter"):
        scorer("chrf", ["a", "b"], ["a"])


def test_it_works_inside_a_running_loop(scorer: RagasScorer) -> None:
    async def notebook() -> list[float | None]:
        return scorer("chrf", ["same"], ["same"])

    assert asyncio.run(notebook()) == [pytest.approx(1.0)]


def test_embeddings_are_unit_vectors_that_know_meaning() -> None:
    assert embed([]) == []
    vectors = embed(["shortness of breath", "dyspnea", "broken toe"])
    assert [len(vector) for vector in vectors] == [384] * 3
    assert type(vectors[0][0]) is float
    assert np.linalg.norm(vectors, axis=1) == pytest.approx([1, 1, 1], abs=1e-5)
    near, far = np.dot(vectors[0], vectors[1]), np.dot(vectors[0], vectors[2])
    assert near > far


def test_each_text_is_embedded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def counting(texts: list[str]) -> list[list[float]]:
        seen.extend(texts)
        return [[1.0, 0.0] for _ in texts]

    monkeypatch.setattr(ragas_metrics, "embed", counting)
    scorer = RagasScorer()
    assert scorer("semantic_similarity", ["a", "a", "b"], ["c", "b", "c"]) == [1.0, 1.0, 1.0]
    scorer("semantic_similarity", ["d"], ["c"])
    assert seen == ["a", "b", "c", "d"]


def test_libraries_keep_quiet(scorer: RagasScorer, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> None:
    ragas_metrics._model.cache_clear()
    with caplog.at_level(logging.INFO):
        for metric in METRICS:
            RagasScorer()(metric, RESPONSES, REFERENCES)
    assert caplog.text == ""
    assert capfd.readouterr() == ("", "")
