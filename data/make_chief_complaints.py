"""Writes chief_complaints.csv beside this file from the hand-written cases in cases.txt. Standard library only.

    python data/make_chief_complaints.py

Each case is written down by hand: complaint, note, rating, rationales. This script changes only how complaint and note are spelled
(abbreviations, casing, a slip of the keyboard, a clerk's remark) and deals the records to facilities and days. Every decision
is drawn from a SHA-256 of the seed and the case, so the same cases give the same bytes on every machine and Python version,
and a case that is edited or added leaves the spelling of the others alone.
"""

from __future__ import annotations

import csv
import hashlib
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path

SEED = 20310107
FOLDER = Path(__file__).resolve().parent
RATINGS = {"M": "Match", "N": "Does Not Match", "U": "Unknown"}
COLUMNS = (
    "record_id", "facility_day", "chief_complaint", "triage_note", "expert_rating", "expert_rationale",
    "copilot_rating", "copilot_rationale", "second_rating", "second_rationale",
)  # fmt: skip

FACILITIES = ("north", "harbour", "millbrook", "eastgate", "hillside", "westlake")  # invented
FIRST_DAY = date(2031, 1, 7)
DAYS = 20

# What the expert's cell may read instead of the label: people type, and the mapping of ratings forgives that.
LOOSE_RATINGS = {"M": ("MATCH", "match"), "N": ("no match", "No Match", "does not match"), "U": ("unknown", "UNKNOWN")}
LOOSE_SHARE = 0.06

# Ways to say the same; a note that uses one of them may use another.
SYNONYMS = (
    (r"SOB", ("short of breath", "SOB", "dyspnoea")),
    (r"c/o", ("c/o", "complains of")),
    (r"w/", ("w/", "with")),
    (r"pt", ("pt", "patient", "Pt")),
    (r"hx", ("hx", "history")),
    (r"yest", ("yest", "yesterday", "yday")),
    (r"wks", ("wks", "weeks", "wk")),
    (r"creps", ("creps", "crackles", "crepitations")),
    (r"[Cc]rackles", ("crackles", "creps")),
    (r"sats", ("sats", "SpO2", "O2 sats")),
    (r"[Aa]febrile", ("afebrile", "afeb", "no temperature")),
    (r"phlegm", ("phlegm", "sputum")),
    (r"(\d)d", (r"\1d", r"\1 days", r"\1/7")),
    (r"(\d) days", (r"\1 days", r"\1d", r"\1/7")),
)
REMARKS = ("NKDA.", "Bay 4.", "Bay 11.", "Own GP informed.", "Triaged 14:20.", "Triaged 03:05.", "Seen in chairs.", "Old notes requested.")

CASE = re.compile(r"(?P<rating>[MNU]) \| (?P<complaint>.+?) \| (?P<note>.+)")
OPINION = re.compile(r"(?P<who>copilot|second) (?P<rating>[MNU]): (?P<rationale>.+)")


@dataclass(frozen=True)
class Case:
    """One hand-written case; ratings are the letters of RATINGS."""

    rating: str
    complaint: str
    note: str
    rationale: str
    opinions: dict[str, tuple[str, str]]  # "copilot" or "second" -> rating, rationale

    def draw(self, what: str) -> float:
        """A number in [0, 1) that depends on the seed, the case and the question."""
        digest = hashlib.sha256(f"{SEED}|{what}|{self.complaint}|{self.note}".encode()).digest()
        return int.from_bytes(digest[:7], "big") / 2**56

    def pick(self, what: str, options: Sequence[str]) -> str:
        return options[int(self.draw(what) * len(options))]


def read_cases(text: str) -> list[Case]:
    """The cases of cases.txt in their order. ValueError names the block that can't be read."""
    lines = (line for line in text.splitlines() if not line.startswith("#"))
    blocks = [block.strip() for block in re.split(r"\n\s*\n", "\n".join(lines)) if block.strip()]
    return [_read_case(block) for block in blocks]


def _read_case(block: str) -> Case:
    head, *rest = (line.strip() for line in block.splitlines())
    case, opinions = CASE.fullmatch(head), [OPINION.fullmatch(line) for line in rest[1:]]
    if case is None or not rest or not all(opinions):
        raise ValueError(f"cases.txt: can't read the case that starts with {head[:60]!r}")
    given = {opinion["who"]: (opinion["rating"], opinion["rationale"]) for opinion in opinions if opinion}
    return Case(case["rating"], case["complaint"], case["note"], rest[0], given)


# --- style -----------------------------------------------------------------------------------------------------------


def styled(case: Case) -> tuple[str, str]:
    """Complaint and note as one of many hands would have typed them; what they say stays the same."""
    complaint, note = case.complaint, _reworded(case)
    if case.draw("typo") < 0.2:
        note = _mistyped(case, note)
    if case.draw("remark") < 0.15 and 8 < len(note.split()) <= 35:
        note = f"{note.rstrip('. ')}. {case.pick('which remark', REMARKS)}"
    if case.draw("stop") < 0.2:
        note = note.rstrip(".")
    casing = case.draw("casing")
    if casing < 0.07:
        return complaint.upper(), note.upper()
    return (complaint.lower(), note.lower()) if casing < 0.22 else (complaint, note)


def _reworded(case: Case) -> str:
    note = case.note
    for pattern, options in SYNONYMS:
        if case.draw(pattern) < 0.5:
            note = re.sub(rf"(?<![\w/-]){pattern}(?![\w/-])", case.pick(f"which {pattern}", options), note)
    return note


def _mistyped(case: Case, note: str) -> str:
    """Two letters swapped, or one left out, inside one of the longer words."""
    words = [found.span() for found in re.finditer(r"[a-z]{6,}", note)]
    if not words:
        return note
    start, end = words[int(case.draw("typo word") * len(words))]
    at = start + 1 + int(case.draw("typo place") * (end - start - 3))
    slip = note[at + 1] + note[at] if case.draw("typo kind") < 0.5 else note[at]
    return note[:at] + slip + note[at + 2 :]


# --- the table -------------------------------------------------------------------------------------------------------


def deal(cases: Sequence[Case]) -> list[tuple[str, Case]]:
    """Every case with its facility and day: three to six a day, on some of the days."""
    days = [f"{name}-{FIRST_DAY + timedelta(days=day)}" for name in FACILITIES for day in range(DAYS)]
    days.sort(key=lambda name: hashlib.sha256(f"{SEED}|{name}".encode()).digest())
    waiting = sorted(cases, key=lambda case: case.draw("order"))
    dealt: list[tuple[str, Case]] = []
    for day in days:
        size = 3 + hashlib.sha256(f"{SEED}|size|{day}".encode()).digest()[0] % 4
        dealt += [(day, case) for case in waiting[len(dealt) : len(dealt) + size]]
    if len(dealt) < len(cases):
        raise ValueError(f"{len(cases)} cases don't fit into {len(days)} days")
    return sorted(dealt, key=lambda pair: pair[0])


def row(number: int, day: str, case: Case) -> list[str]:
    """The cells of one record, in the order of COLUMNS; an opinion that was not given is empty."""
    loose = case.draw("loose") < LOOSE_SHARE
    rating = case.pick("which loose", LOOSE_RATINGS[case.rating]) if loose else RATINGS[case.rating]
    cells = [f"ed-{number:04d}", day, *styled(case), rating, case.rationale]
    for who in ("copilot", "second"):
        letter, rationale = case.opinions.get(who, ("", ""))
        cells += [RATINGS.get(letter, ""), rationale]
    return cells


def table(cases: Sequence[Case]) -> str:
    """The whole CSV: UTF-8 text, RFC 4180 quoting, line feeds."""
    out = io.StringIO(newline="")
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows(row(number, day, case) for number, (day, case) in enumerate(deal(cases), start=1))
    return out.getvalue()


def main() -> None:
    cases = read_cases((FOLDER / "cases.txt").read_text(encoding="utf-8"))
    target = FOLDER / "chief_complaints.csv"
    target.write_bytes(table(cases).encode("utf-8"))
    print(f"{target.name}: {len(cases)} records")


if __name__ == "__main__":
    main()
