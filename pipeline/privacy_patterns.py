"""Patterns of what is about a person, made so that versions, digests, dates of runs and scores don't look like one."""

from __future__ import annotations

import re
from collections.abc import Iterator

_MONTH = "(?:jan|feb|mar|apr|may|mai|jun|jul|aug|sep|oct|okt|nov|dec|dez)[a-zäéû]{0,7}\\.?"
_ORDINAL = r"\d{1,2}(?:st|nd|rd|th|\.)?"
_DATE = (
    r"(?:\d{1,4}[-/.]\s?\d{1,2}[-/.]\s?\d{2,4}"
    rf"|{_ORDINAL}\s(?:of\s)?{_MONTH},?\s?\d{{2,4}}"
    rf"|{_MONTH}\s{_ORDINAL},?\s\d{{2,4}})"
)
_BIRTH = (
    r"(?:\bd\.?\s?o\.?\s?b\b\.?|\bdate\sof\sbirth|\bbirth\s?da(?:te|y)|\bborn\b|\bgeboren\b|\bgeburtsdatum|\bgeb\."
    r"|\bn[ée]e?\sle\b|\bnaissance\b|\bnacid[oa]\b|\bnacimiento\b)"
)
_NUMBERED = r"(?:patient|hospital|chart|case|encounter|visit|health(?:\sinsurance|\scard)?|insurance|policy|passport|medicare|medicaid)"
_NUMBER = r"(?:id|no|nr|num|number|identifier|card)\b"
_RECORD = (
    rf"(?:\bmrn|\bmedical\srecord|\b{_NUMBERED}(?=\s?(?:{_NUMBER}|#))"
    r"|\bnhs|\bssn|\bsocial\ssecurity|\bversicherten(?:nummer|nr)|\bpatienten(?:nummer|nr|-id))"
    rf"(?:\s?{_NUMBER})*"
)
_IDENTIFIER = r"(?=[a-z0-9 -]{0,6}\d{2})[a-z]{0,4}[ -]?\d[\d -]{2,14}\d"
# Between the parts of a phone number: no thin blank, which stands between thousands
_GAP = r"[ \u00a0./-]"

_CALLED = r"\b(?:tele?(?:phone|fon)?|phone|mobile|mobil|cell|fax|call(?:\sback)?(?:\sme)?(?:\sat|\son)?)\b\.?(?:\sn(?:o|umber|r)\b)?"

# kind, fewest digits, pattern; what an earlier one took, a later one leaves alone
_PATTERNS = (
    ("e-mail address", 0, r"(?<![\w.+-])[\w.%+-]{1,64}\\?@(?:[\w-]{1,63}\.){1,5}[^\W\d_]{2,24}(?![\w-])"),
    ("date of birth", 0, rf"(?i){_BIRTH}\D{{0,25}}{_DATE}"),
    ("date of birth", 0, rf"(?i)(?<![\w.]){_DATE}\W{{1,4}}(?:\w+\W){{0,2}}{_BIRTH}"),
    ("record number", 0, rf"(?i){_RECORD}\W{{0,6}}(?:is\s|was\s)?{_IDENTIFIER}"),
    ("record number", 0, r"(?<![\w.-])(?!000|666|9)\d{3}-\d{2}-\d{4}(?![\w.-]?\d|\w)"),  # as in the United States
    ("phone number", 8, rf"(?<![\w.+])\+[1-9]\d{{0,2}}{_GAP}?(?:\(\d{{1,4}}\){_GAP}?|\d{{1,5}}{_GAP}?){{2,6}}\d{{2,5}}(?![\w.]?\d)"),
    ("phone number", 10, rf"(?<![\w.,:+/-])00[1-9]\d{{0,2}}{_GAP}(?:\(?\d{{1,5}}\)?{_GAP}?){{2,5}}\d{{2,5}}(?![\w.]?\d)"),
    ("phone number", 10, r"(?<![\w.,:+/-])(?:\(\d{3}\)\s?|\d{3}[-. \u00a0])\d{3}[-. \u00a0]\d{4}(?![\w.-]?\d|\w)"),
    ("phone number", 9, r"(?<![\w.,:+/-])\(?0\d{1,5}\)?[ \u00a0/-]\s?\d{3,4}(?:[ \u00a0-]?\d{2,5}){0,2}(?![\w.:-]?\d|\w)"),
    ("phone number", 10, r"(?<![\w.,:+/-])0[1-9](?:[ \u00a0.-]\d{2}){4}(?![\w.-]?\d|\w)"),
    ("phone number", 7, rf"(?i){_CALLED}\W{{0,4}}\+?\(?\d[\d \u00a0()./-]{{5,20}}\d(?!\w)"),
)
_COMPILED = tuple((kind, fewest, re.compile(pattern)) for kind, fewest, pattern in _PATTERNS)
_MOST_DIGITS = {"phone number": 15}


def matches(text: str) -> Iterator[tuple[str, str]]:
    """(kind, what matched), each place once."""
    if not any(character.isdigit() for character in text) and "@" not in text:
        return
    seen: list[tuple[int, int]] = []
    for kind, fewest, pattern in _COMPILED:
        for match in pattern.finditer(text):
            if not fewest <= sum(character.isdigit() for character in match[0]) <= _MOST_DIGITS.get(kind, 10**6):
                continue
            if not any(start < match.end() and match.start() < end for start, end in seen):
                seen.append(match.span())
                yield kind, match[0]
