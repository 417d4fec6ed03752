"""Patterns of what is about a person, made so that versions, digests, dates of runs and scores don't look like one."""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Sequence

# --- the text that the patterns see ----------------------------------------------------------------------------------

# Control and format characters (Cc, Cf) and others that show nothing: they part words and addresses for a machine only
_UNSEEN = re.compile(
    "[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\u00ad\u034f\u0600-\u0605\u061c\u06dd\u070f\u0890\u0891\u08e2\u115f\u1160\u17b4\u17b5"
    "\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff9-\ufffb\U000110bd\U000110cd"
    "\U00013430-\U0001343f\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e01ef]"
)
# Pd, and the minus and bullets that look like it
_DASH = re.compile(
    "[\u02d7\u058a\u05be\u1400\u1806\u2010-\u2015\u2043\u2212\u2e17\u2e1a\u2e3a\u2e3b\u2e40\u2e5d\u301c\u3030\u30a0\U00010d6e\U00010ead]"
)
_OTHER_DIGIT = re.compile(r"[^\D0-9]")
_THIN = re.compile("[\u2007\u2009\u202f]")
_THOUSANDS = re.compile("(?<!\\d)\\d{1,3}(?:[\u2007\u2009\u202f]\\d{3})+(?![\\d\u2007\u2009\u202f])")


def normal(text: str) -> str:
    """A text as a reader sees it: one form of each letter, digit, dash and blank, and nothing that does not show."""
    if text.isascii():
        return text if text.isprintable() else _UNSEEN.sub("", text)
    text = _UNSEEN.sub("", text)
    if _THIN.search(text):  # NFKC makes blanks of them, and thousands look like a phone number then
        text = _THOUSANDS.sub(lambda thousands: _THIN.sub(",", thousands[0]), text)
    text = _DASH.sub("-", unicodedata.normalize("NFKC", text))
    return _OTHER_DIGIT.sub(lambda digit: str(unicodedata.decimal(digit[0])), text)


# --- patterns --------------------------------------------------------------------------------------------------------

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
    rf"(?:\bmrn|\bmedical\srecord|\b{_NUMBERED}(?=[\s-]?(?:{_NUMBER}|#))"
    r"|\bnhs|\bssn|\bsocial\ssecurity|\bversicherten(?:nummer|nr)|\bpatienten(?:nummer|nr|-id))"
    rf"(?:[\s-]?{_NUMBER})*"
)
_YEAR = r"(?:19|20)\d\d"
# Years and nothing else are no number of anybody ("NHS 111" is a helpline); a year with more behind it may be
_NO_YEARS = rf"(?!(?:111[ -])?{_YEAR}(?:\s?[-/ ]\s?{_YEAR})*(?:[-/ ]\d\d)?(?!\w|[ -]+\d|[/.-]\w{{0,3}}\d))"
_IDENTIFIER = rf"(?=[a-z0-9 -]{{0,6}}\d{{2}})[a-z]{{0,4}}[ -]?{_NO_YEARS}\d[\d -]{{2,14}}\d"
_GAP = r"[ ./-]"  # between the parts of a phone number
_NO_MONTHS = rf"(?!0[1-9][/-]{_YEAR}[ -](?:0[1-9]|1[0-2])[/-]{_YEAR}(?!\d))"

_CALLED = r"\b(?:tele?(?:phone|fon)?|phone|mobile|mobil|cell|fax|call(?:\sback)?(?:\sme)?(?:\sat|\son)?)\b\.?(?:\sn(?:o|umber|r)\b)?"
_TOP = r"(?:xn--[a-z\d-]{2,59}|[^\W\d_]{2,24})"
_GIT = r"(?!git@[\w.-]+[:/][\w.~-]+/[\w.-])"  # an address of a repository, as `git clone` takes it

_EMAIL = rf"(?i)(?<![\w+-])(?<![\w+-]\.){_GIT}[\w%+-][\w.%+-]{{0,63}}(?:\\?@|%40)(?:[\w-]{{1,63}}\.){{1,5}}{_TOP}(?![\w-])"

# kind, fewest digits, whether `_` stands for a blank, pattern; what an earlier one took, a later one leaves alone
_PATTERNS = (
    ("e-mail address", 0, False, _EMAIL),
    ("date of birth", 0, True, rf"(?i){_BIRTH}\D{{0,25}}{_DATE}"),
    ("date of birth", 0, True, rf"(?i)(?<![\w.]){_DATE}\W{{1,4}}(?:\w+\W){{0,2}}{_BIRTH}"),
    ("record number", 0, True, r"(?i)\b(?:ssn|social\ssecurity)\b(?:\s(?:no|number)\b)?\W{0,6}\d{3}[ .-]?\d\d[ .-]?\d{4}(?![\w.-]?\d|\w)"),
    ("record number", 0, True, rf"(?i){_RECORD}\W{{0,6}}(?:is\s|was\s)?{_IDENTIFIER}"),
    ("record number", 0, False, r"(?<![\w.-])(?!000|666|9)\d{3}-\d{2}-\d{4}(?![\w.-]?\d|\w)"),  # as in the United States
    ("phone number", 8, False, rf"(?<![\w.+])\+[1-9]\d{{0,2}}{_GAP}?(?:\(\d{{1,4}}\){_GAP}?|\d{{1,5}}{_GAP}?){{2,6}}\d{{2,5}}(?![\w.]?\d)"),
    ("phone number", 10, False, rf"(?<![\w.,:+/-])00[1-9]\d{{0,2}}{_GAP}(?:\(?\d{{1,5}}\)?{_GAP}?){{2,5}}\d{{2,5}}(?![\w.]?\d)"),
    ("phone number", 10, False, r"(?<![\w.,:+/-])(?:\(\d{3}\)\s?|\d{3}[-. ])\d{3}[-. ]\d{4}(?![\w.-]?\d|\w)"),
    ("phone number", 9, False, rf"(?<![\w.,:+/-]){_NO_MONTHS}\(?0\d{{1,5}}\)?[ /-]\s?\d{{3,4}}(?:[ -]?\d{{2,5}}){{0,2}}(?![\w.:-]?\d|\w)"),
    ("phone number", 10, False, r"(?<![\w.,:+/-])0[1-9](?:[ .-]\d{2}){4}(?![\w.-]?\d|\w)"),
    ("phone number", 7, True, rf"(?i){_CALLED}\W{{0,4}}{_NO_YEARS}(?!\d{{4}}-\d\d-\d\d(?!\d))\+?\(?\d[\d ()./-]{{5,20}}\d(?!\w)"),
)
_COMPILED = tuple((kind, fewest, blanks, re.compile(pattern)) for kind, fewest, blanks, pattern in _PATTERNS)
_MOST_DIGITS = {"phone number": 15}
_WORTH_A_LOOK = re.compile(r"[\d@]")

# Of a cohort, not of a person. A dash joins two dates after "born" only: after "DOB" the second may be another column.
_PERIOD = re.compile(
    rf"(?i)(?<!\d)(?:{_DATE}\s(?:up\s)?(?:to|until|till|through|thru|bis|au|hasta|al?)\s{_DATE}"
    rf"|(?:between|zwischen|entre)\s{_DATE}\s(?:and|und|et|y)\s{_DATE})"
)
_DASHED = re.compile(rf"(?i)(?<!\d){_DATE}\s?-\s?{_DATE}")
_LONGEST = 80  # of a period
_BORN = re.compile(r"(?i)\b(?:born|geboren|n[ée]e?|nacid[oa])\b")


def matches(text: str) -> Iterator[tuple[str, str]]:
    """(kind, what matched), each place once."""
    text = normal(text)
    for kind, start, end in _spans(text):
        yield kind, text[start:end]


def matches_in_lines(lines: Iterable[str]) -> Iterator[tuple[int, str, str]]:
    """(index of the line where it begins, kind, what matched), in each line and from its end into the next, each place once."""
    before, taken = "", list[tuple[int, int]]()
    for index, line in enumerate(map(normal, lines)):
        own = list(_spans(line))
        here = [(start, end) for _, start, end in own]
        left, right = before.rstrip(" \t\\"), line.lstrip(" \t>")
        if left and right:
            # a wrap leaves out a blank, but for one after a hyphen
            text = left + ("" if left[-1] == "@" or re.search(r"\w-$", left) else " ")
            cut, shift = len(text), len(text) - (len(line) - len(right))
            known = sorted(taken + [(start + shift, end + shift) for start, end in here])
            for kind, start, end in _spans(text + right):
                if start < len(left) and cut < end and not _overlaps(start, end, known):
                    here.append((0, end - shift))
                    yield index - 1, kind, (text + right)[start:end]
        for kind, start, end in own:
            yield index, kind, line[start:end]
        before, taken = line, here


def _spans(text: str) -> Iterator[tuple[str, int, int]]:
    """(kind, start, end) in a text that is `normal`."""
    if not _WORTH_A_LOOK.search(text):
        return
    blanked = text.replace("_", " ")
    seen: list[tuple[int, int]] = []
    for kind, fewest, blanks, pattern in _COMPILED:
        for match in pattern.finditer(blanked if blanks else text):
            if not fewest <= sum(character.isdigit() for character in match[0]) <= _MOST_DIGITS.get(kind, 10**6):
                continue
            if kind == "date of birth" and _of_a_period(match):
                continue
            if not _overlaps(*match.span(), seen):
                insort(seen, match.span())
                yield kind, *match.span()


def _of_a_period(birth: re.Match[str]) -> bool:
    start, end = birth.span()
    around = birth.string, max(0, start - _LONGEST), end + _LONGEST
    patterns = (_PERIOD, _DASHED) if _BORN.search(birth[0]) else (_PERIOD,)
    return any(_overlaps(start, end, [period.span()]) for pattern in patterns for period in pattern.finditer(*around))


def _overlaps(start: int, end: int, spans: Sequence[tuple[int, int]]) -> bool:
    """Whether a span shares a character with one of `spans`, which are in order and share none with one another."""
    last = bisect_left(spans, (end,)) - 1
    return last >= 0 and spans[last][1] > start
