"""Messages and answer format: the one place for training and serving."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.config import PromptConfig
from pipeline.records import AnswerError, Finish, Message, RatingScale, Record

ANSWER_RULE = 'Answer with one JSON object: "rating" is one of'  # stands in every prompt that is complete
ANSWER_OPENING = '{"rating": "'  # what stands before the rating's text in every answer
RATIONALE_OPENING = '", "rationale": "'  # what stands between the rating's text and the rationale's
# spaces may stand between the parts: a server's own grammar allows them
_RATING = re.compile(r'\s*\{\s*"rating"\s*:\s*"(?P<rating>(?:[^"\\]|\\.)*)"')
_RATIONALE = re.compile(_RATING.pattern + r'\s*,\s*"rationale"\s*:\s*"(?P<rationale>.*)\Z', re.DOTALL)
_CHARACTERS = 'char ::= [^"\\\\\\x00-\\x1F\\x7F] | "\\\\" (["\\\\/bfnrt] | "u" hex hex hex hex)\nhex ::= [0-9a-fA-F]\n'


def instruction(prompt: PromptConfig, scale: RatingScale) -> str:
    """The part of the user message that all records share."""
    topic = f" Topic: {prompt.topic}." if prompt.topic else ""
    opening = prompt.instruction or (
        "Rate the record below as an expert would" + (" for how well it fits the topic." if prompt.topic else ".")
    )
    labels = ", ".join(f'"{label}"' for label in scale.labels)
    return (
        f'{opening.strip()}{topic}\nAnswer with one JSON object: "rating" is one of {labels}; "rationale" says why in one or two sentences.'
    )


def user_text(texts: Mapping[str, str], prompt: PromptConfig, scale: RatingScale) -> str:
    """The user message for one record: the instruction, then each text under its heading (column name -> text)."""
    sections = [f"{heading(column)}: {text}" for column, text in texts.items() if text]
    return instruction(prompt, scale) + "\n\n" + "\n".join(sections)


def heading(column: str) -> str:
    """A column's name as people write it: `triage_note` -> `Triage note`."""
    words = column.replace("_", " ").strip()
    return words[:1].upper() + words[1:]


def messages_for(record: Record) -> tuple[Message, ...]:
    return (Message("user", record.prompt),)


def answer_text(label: str, rationale: str) -> str:
    """The answer as it is trained on and as the grammar allows it."""
    return json.dumps({"rating": label, "rationale": rationale}, ensure_ascii=False)


def answer_schema(scale: RatingScale) -> dict[str, Any]:
    """JSON Schema of an answer. `rating` also sorts before `rationale` ("rati-n" < "rati-o"), for servers that sort keys."""
    return {
        "type": "object",
        "properties": {"rating": {"type": "string", "enum": list(scale.labels)}, "rationale": {"type": "string"}},
        "required": ["rating", "rationale"],
        "additionalProperties": False,
    }


def answer_grammar(scale: RatingScale) -> str:
    """GBNF of exactly the texts that `answer_text` writes for this scale, one line each."""
    labels = " | ".join(json.dumps(label, ensure_ascii=False) for label in scale.labels)
    return f'root ::= "{{\\"rating\\": \\"" label "\\", \\"rationale\\": \\"" char* "\\"}}"\nlabel ::= {labels}\n' + _CHARACTERS


def rationale_grammar() -> str:
    """GBNF of what may follow RATIONALE_OPENING in an answer: the rest of the string, its quote and the brace."""
    return 'root ::= char* "\\"}"\n' + _CHARACTERS


def parse_answer(text: str, finish: Finish, scale: RatingScale) -> tuple[str | None, str | None, AnswerError | None]:
    """(label, rationale, error) of a response. The label survives a rationale that was cut by the token limit."""
    if finish in ("too_long", "failed"):
        return None, None, finish
    try:
        answer = json.loads(text)
    except ValueError:
        return _parse_cut(text, scale) if finish == "length" else (None, None, "invalid_json")
    if not isinstance(answer, dict) or not isinstance(answer.get("rating"), str):
        return None, None, "invalid_json"
    if answer["rating"] not in scale.labels:
        return None, None, "unknown_label"
    rationale = answer.get("rationale")
    return answer["rating"], rationale if isinstance(rationale, str) else None, None


def rating_of(text: str) -> str | None:
    """The rating's text in an answer, whole or cut after it; None when it is not there, or not to its end."""
    found = _RATING.match(text)
    return _unescape(found["rating"]) if found else None


def _parse_cut(text: str, scale: RatingScale) -> tuple[str | None, str | None, AnswerError | None]:
    label = rating_of(text)
    if label not in scale.labels:
        return None, None, "cut"
    rationale = _RATIONALE.match(text)
    return label, _unescape(rationale["rationale"]) if rationale else None, None


def _unescape(cut: str) -> str:
    """A JSON string's inside, less a last escape that was torn."""
    for end in range(len(cut), max(len(cut) - 6, -1), -1):
        try:
            return str(json.loads(f'"{cut[:end]}"'))
        except ValueError:
            continue
    return cut


def answer_examples(examples: Sequence[Record]) -> list[tuple[Message, Message]]:
    """Records as solved turns, for a model set."""
    return [(Message("user", record.prompt), Message("assistant", answer_text(record.label, record.rationale))) for record in examples]
