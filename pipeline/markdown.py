"""Text that Markdown shows as it is, and the tables and lists made of it. Everything from data goes through `text` or `code`."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence

_CONTROLS = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x9f\u200b\u200e\u200f\u202a-\u202e\u2060-\u2069\ufeff\ud800-\udfff]")
_BLANKS = re.compile("[ \t\n\r\x0b\x0c\x85\u2028\u2029]+")
_SPECIAL = re.compile(r"([\\`*|~$#!\[\]{}]|(?<![^\W_])_|_(?![^\W_])|:(?=//)|(?<=www)\.|@(?=\w))")


class Markdown(str):
    """Markup that is safe as it stands; every other value is escaped on its way into a page."""

    __slots__ = ()


def line(value: object) -> str:
    """The value on one line, without control characters or changes of writing direction."""
    return _CONTROLS.sub("", _BLANKS.sub(" ", str(value))).strip()


def text(value: object) -> Markdown:
    """The value with nothing in it that is markup, HTML, a link, a mention, a formula or the end of a table cell."""
    if isinstance(value, Markdown):
        return value
    escaped = _SPECIAL.sub(r"\\\1", html.escape(line(value), quote=False))
    return Markdown(re.sub(r"^(\d*)([+\-=>.)])(?=\s|$)", r"\1\\\2", escaped))  # no list, quotation or heading line


def code(value: object) -> Markdown:
    """The value as a span of code, whatever backticks it holds; it may stand in a table."""
    shown = line(value).replace("|", "¦")  # no escape of a bar is the same to all readers of tables
    fence = "`" * (max((len(run) for run in re.findall("`+", shown)), default=0) + 1)
    pad = " " if shown[:1] == "`" or shown[-1:] == "`" or not shown else ""
    return Markdown(f"{fence}{pad}{shown}{pad}{fence}")


def block(value: str, language: str = "bash") -> Markdown:
    """Lines of code; the fence is longer than any in them."""
    fence = "`" * max(3, *(len(run) + 1 for run in re.findall("`+", value)), 3)
    return Markdown(f"{fence}{language}\n{_CONTROLS.sub('', value).strip()}\n{fence}")


def link(words: object, url: str | None) -> Markdown:
    """A link to a web address; the words alone where there is none."""
    if url is None or not re.fullmatch(r"https?://[\w.:/%@?=&~+,;-]+", url, re.ASCII):
        return text(words)
    return Markdown(f"[{text(words)}]({url})")


def image(path: str, alt: str) -> Markdown:
    """An image of the repository, with words for who can't see it."""
    return Markdown(f"![{text(alt)}]({path})")


def bullets(items: Iterable[object]) -> Markdown:
    return Markdown("\n".join(f"- {text(item)}" for item in items))


def table(head: Sequence[object], rows: Iterable[Sequence[object]]) -> Markdown:
    """A table; columns of figures stand right. Empty without rows."""
    cells = [[text(cell) for cell in row] for row in rows]
    if not cells:
        return Markdown()
    right = [n > 0 and all(re.match(r"[−+\-]?\d|–|&lt; \d", row[n]) for row in cells) for n in range(len(head))]
    lines: list[list[str]] = [[text(name) for name in head], ["---:" if r else "---" for r in right], *[list[str](row) for row in cells]]
    return Markdown("\n".join("| " + " | ".join(row) + " |" for row in lines))
