"""What the Hub would refuse in a card, checked offline against card_schema.json. The Hub may change its rules; it checks again when a
card is pushed."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import ValidationError

_SCHEMA: Mapping[str, Any] = json.loads(files("pipeline").joinpath("card_schema.json").read_text(encoding="utf-8"))
HUB_LICENSES = frozenset(_SCHEMA["$defs"]["license"]["enum"])


def validate_card(kind: str, card: Mapping[str, Any]) -> list[str]:
    """One line a problem, naming the field; empty when the card is fit for the Hub. `kind`: dataset, model or run.

    Takes the cards in `metadata/` and the front matter of a README alike.
    """
    problems = [f"{field}: is null" for field, value in card.items() if value is None]
    problems += [f"{path}: not a finite number" for path in _not_finite(card)]
    filled = {field: value for field, value in card.items() if value is not None}
    problems += [line for error in _validator(kind).iter_errors(filled) for line in _lines(error)]
    return list(dict.fromkeys([*problems, *_said_twice(card)]))


@cache
def _validator(kind: str) -> Draft202012Validator:
    from jsonschema import Draft202012Validator

    return Draft202012Validator({"$ref": f"#/$defs/{kind}", "$defs": _SCHEMA["$defs"]})


def _lines(error: ValidationError) -> Iterator[str]:
    """The schema's own words for what is wrong (`x-problem`), after the place."""
    words = error.schema.get("x-problem") if isinstance(error.schema, Mapping) else None
    place = _place(error.absolute_path)
    if error.validator == "required":
        required, found = cast(list[str], error.validator_value), cast(Mapping[str, Any], error.instance)
        for name in (name for name in required if name not in found):
            yield f"{place}.{name}: missing".lstrip(".")
    elif error.validator == "not" and isinstance(error.validator_value, Mapping):
        words = error.validator_value.get("x-problem") or words
        yield f"{place}: {_shown(error.instance)}{words or error.message}"
    else:
        yield f"{place}: {_shown(error.instance) if str(words).startswith(('is ', 'may ')) else ''}{words or error.message}"


def _place(path: Iterable[str | int]) -> str:
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}"
    return text.lstrip(".")


def _shown(value: Any) -> str:
    return f"{str(value)[:60]!r} " if isinstance(value, str) else f"{value!r} " if value is None or isinstance(value, int | float) else ""


def _not_finite(value: Any, path: str = "") -> Iterator[str]:
    if isinstance(value, float) and not math.isfinite(value):
        yield path
    for key, item in value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list | tuple) else ():
        yield from _not_finite(item, f"{path}.{key}" if path else str(key))


def _said_twice(card: Mapping[str, Any]) -> Iterator[str]:
    """Names that stand for two things: a schema can compare whole items only."""
    configs = [config for config in _list(card.get("configs")) if isinstance(config, Mapping)]
    yield from (f"configs: the name {name!r} is there twice" for name in _twice(config.get("config_name") for config in configs))
    for number, config in enumerate(configs):
        splits = (file.get("split") for file in _list(config.get("data_files")) if isinstance(file, Mapping))
        yield from (f"configs[{number}].data_files: the split {split!r} is there twice" for split in _twice(splits))


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _twice(values: Iterable[Any]) -> list[str]:
    return [value for value, n in Counter(str(value) for value in values).items() if n > 1]
