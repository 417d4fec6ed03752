"""Does the file that will be served give what training produced? Compared in token ids, rating probabilities and answers."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.config import GenerateConfig
from pipeline.errors import ArtifactError
from pipeline.ports import Engine, EngineFactory, Progress, TrainedModel, quiet
from pipeline.prompts import messages_for, parse_answer
from pipeline.rating_tree import RatingTree
from pipeline.records import Message, Prompt, RatingScale, Record, TokenRow

CHECKED_ROWS = 40
ANSWERED_ROWS = 8
TOKEN_ROWS = 8
TOP_TOKENS = 10
LEAST_AGREEMENT = 0.95
PROBE = (Message("user", "To be, or not to be?"),)  # shown where prompts differ, instead of a record
NEAR_TIE, WIDEST_TIE = 0.05, 0.2  # two ratings whose probabilities are this close may change places between kernels: least, most

Probabilities = Sequence[Mapping[str, float]]


def check_parity(
    trained: TrainedModel,
    records: Sequence[Record],
    rows: Mapping[str, TokenRow],
    base_probabilities: Probabilities,
    *,
    tree: RatingTree,
    scale: RatingScale,
    generate: GenerateConfig,
    base: Path,
    output_dir: Path,
    open_engine: EngineFactory,
    serve: Callable[[Path], Engine] | None = None,
    progress: Progress = quiet,
) -> dict[str, Any]:
    """The validation figures of the merged file and of the adapter; each part says whether it passed.

    Args:
        records: the rows to check on. rows: record_id -> the token ids trained on.
        base_probabilities: rating probabilities of the untouched base on `records`.
        serve: opens the engine that will answer with the merged file, where that is another program than `open_engine`: checked as well.

    Raises:
        ArtifactError: prompt ids differ, an answer is not valid, or fewer than 95 % of the ratings agree.
    """
    asked = [Prompt(record.record_id, messages_for(record)) for record in records]
    ids = [rows[record.record_id].prompt for record in records]
    places = [place for record in records[:TOKEN_ROWS] for place in _places(rows[record.record_id])]
    progress("validate", 0, 0, "ratings of the trained model")
    wanted = trained.rating_probabilities(ids, tree)
    likely = [trained.top_logprobs(place, TOP_TOKENS) for place in places]
    progress("validate", 1, 0, "the base stored as the merged file is, with no change")
    storage = _storage_effect(trained, asked, base_probabilities, scale, output_dir, open_engine)
    # what kernels and storage types alone move on these rows; either side of a comparison may move that far
    near_tie = min(max(2 * storage["largest_probability_difference"], NEAR_TIE), WIDEST_TIE)
    report: dict[str, Any] = {"rows": len(records), "storage_alone": storage, "near_tie_below": near_tie}
    merged = output_dir / "fine_tuned_model.gguf"
    opened: dict[str, Callable[[], Engine]] = {
        "merged": lambda: open_engine(merged),
        "adapter": lambda: open_engine(base, adapter=output_dir / "adapter.gguf"),
        **({"served": lambda: serve(merged)} if serve is not None else {}),
    }
    probe = ""
    for step, (name, open_it) in enumerate(opened.items(), 2):
        progress("validate", step, len(opened) + 2, f"ratings of the {name} model")
        with open_it() as engine:
            found = _served(engine, asked, ids, scale, None if name == "adapter" else generate)
            found |= agreement(wanted, engine.rating_probabilities(asked, scale), near_tie)
            found["largest_token_difference"] = _token_difference(engine, places, likely)
            probe = probe or engine.render(PROBE)
            found["prompt_diff"] = list(
                difflib.unified_diff(probe.splitlines(), engine.render(PROBE).splitlines(), "trained on", name, lineterm="")
            )
        report[name] = found
    progress("validate", len(opened) + 2, len(opened) + 2)
    _judge(report)
    return report


def agreement(wanted: Probabilities, found: Probabilities, near_tie: float = NEAR_TIE) -> dict[str, Any]:
    """How often both give the same likeliest rating, and the largest difference of a probability. A rating that differs where the two
    likeliest of `wanted` lie closer than `near_tie` is counted apart, and as agreement."""
    same = near = 0
    for a, b in zip(wanted, found, strict=True):
        first, second = sorted(a.values(), reverse=True)[:2]
        if max(a, key=a.__getitem__) == max(b, key=b.__getitem__):
            same += 1
        elif first - second < near_tie:
            near += 1
    gaps = [abs(a[label] - b[label]) for a, b in zip(wanted, found, strict=True) for label in a]
    return {
        "same_rating": same,
        "near_ties": near,
        "agreement": (same + near) / len(wanted),
        "largest_probability_difference": max(gaps),
        "mean_probability_difference": sum(gaps) / len(gaps),
    }


def _served(
    engine: Engine, asked: Sequence[Prompt], ids: Sequence[tuple[int, ...]], scale: RatingScale, generate: GenerateConfig | None
) -> dict[str, Any]:
    """Prompt ids, and the answers where `generate` is given. What differs is named by row, without its text."""
    other = [prompt.record_id for prompt, trained_on in zip(asked, ids, strict=True) if engine.token_ids(prompt.messages) != trained_on]
    found: dict[str, Any] = {"prompt_ids_differ": other}
    if generate is not None:
        longest = max(map(len, ids))
        completions = list(engine.complete(asked[:ANSWERED_ROWS], scale, generate, max_prompt_tokens=longest))
        bad = [done.record_id for done in completions if parse_answer(done.text, done.finish, scale)[0] is None]
        length = {prompt.record_id: len(trained_on) for prompt, trained_on in zip(asked, ids, strict=True)}
        counted = [done.record_id for done in completions if done.error is None and done.prompt_tokens != length[done.record_id]]
        found |= {"answers_checked": len(completions), "answers_invalid": bad, "prompt_lengths_differ": counted}
    return found


def _places(row: TokenRow) -> list[tuple[int, ...]]:
    """The row up to where its rating is decided, and up to a third and two thirds of what follows in its answer: there the next token
    is open. Right after the prompt it is not: every answer begins alike."""
    rating = row.rating_tokens[0]
    rest = len(row.answer) - rating
    return [row.prompt + row.answer[:end] for end in (rating, rating + rest // 3, rating + 2 * rest // 3)]


def _token_difference(engine: Engine, places: Sequence[tuple[int, ...]], likely: Sequence[Mapping[int, float]]) -> float:
    """Largest difference of probability over the trained model's likeliest next tokens at each place."""
    gaps = []
    for place, wanted in zip(places, likely, strict=True):
        served = engine.next_token_logprobs(place, 4 * TOP_TOKENS)
        gaps += [abs(math.exp(value) - math.exp(served.get(token, -math.inf))) for token, value in wanted.items()]
    return max(gaps)


def _storage_effect(
    trained: TrainedModel, asked: Sequence[Prompt], base: Probabilities, scale: RatingScale, output_dir: Path, open_engine: EngineFactory
) -> dict[str, Any]:
    """What storing the base's tensors in other types changes by itself, so that it can't pass for learning."""
    path = output_dir / "unchanged.gguf"
    try:
        trained.write_unchanged(path)
        with open_engine(path) as engine:
            return agreement(base, engine.rating_probabilities(asked, scale))
    finally:
        path.unlink(missing_ok=True)


def _judge(report: Mapping[str, Any]) -> None:
    problems = []
    for name in ("merged", "adapter", "served"):
        part = report.get(name)
        if part is None:
            continue
        if part["prompt_ids_differ"]:
            problems.append(f"{name}: the prompt's token ids differ from those trained on in {len(part['prompt_ids_differ'])} rows")
            problems += [f"  {line}" for line in part["prompt_diff"]]
        if part.get("prompt_lengths_differ"):
            problems.append(
                f"{name}: it read another number of prompt tokens than was trained on in {len(part['prompt_lengths_differ'])} rows"
            )
        if part.get("answers_invalid"):
            problems.append(f"{name}: {len(part['answers_invalid'])} of {part['answers_checked']} answers are not valid")
        if part["agreement"] < LEAST_AGREEMENT:
            problems.append(
                f"{name}: only {part['agreement']:.0%} of {report['rows']} ratings agree with the trained model's"
                f" (largest difference of a probability {part['largest_probability_difference']:.2f})"
            )
    if problems:
        raise ArtifactError(
            "the served model is not the trained one:\n" + "\n".join(f"  - {problem}" for problem in problems),
            hint="run again with --debug; if it stays so, use a base model in a less lossy quantisation (Q8_0, F16)",
        )
