"""The privacy gate: what it finds, what it must leave alone, and how a review lets exactly what was reviewed pass."""

from __future__ import annotations

import io
import json
import random
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import yaml_text
from pipeline.errors import PrivacyError
from pipeline.privacy import check, check_repository, record_texts, review_code, scan
from pipeline.privacy_patterns import matches
from tests.test_cards import cards

RECORD = "Woke at night with a dry cough, felt hot, and could not lie flat on the couch."


def kinds(text: str) -> list[str]:
    return [finding.kind for finding in scan({"README.md": text.encode()})]


def parquet(**columns: list[Any]) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.table(columns), out)
    return out.getvalue()


# --- patterns --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("write to jane.doe+x@mail.hospital.org today", "e-mail address"),
        ("müller@klinik-köln.de", "e-mail address"),
        (r"jane\@hospital.org", "e-mail address"),
        ("call +49 176 1234567", "phone number"),
        ("+49 (0)30 1234-5678", "phone number"),
        ("+1 (415) 555-0132", "phone number"),
        ("+4917612345678", "phone number"),
        ("0049 176 1234567", "phone number"),
        ("(415) 555-0132", "phone number"),
        ("415-555-0132", "phone number"),
        ("415.555.0132", "phone number"),
        ("020 7946 0958", "phone number"),
        ("0176/1234567", "phone number"),
        ("01 23 45 67 89", "phone number"),
        ("phone: 5550132", "phone number"),
        ("tel. 12 34 56 78", "phone number"),
        ("DOB 04/12/1961", "date of birth"),
        ("D.O.B.: 1961-12-04", "date of birth"),
        ("date of birth was 4 December 1961", "date of birth"),
        ("born on Dec 4th, 1961", "date of birth"),
        ("geboren am 4.12.1961", "date of birth"),
        ("1961-12-04 (date of birth)", "date of birth"),
        ("MRN-0042", "record number"),
        ("MRN: 83 771", "record number"),
        ("patient id: A-204811", "record number"),
        ("Patient No. 204811", "record number"),
        ("SSN 123-45-6789", "record number"),
        ("078-05-1120", "record number"),
        ("NHS number 943 476 5919", "record number"),
        ("medical record #88172", "record number"),
    ],
)
def test_what_looks_personal_is_found(text: str, kind: str) -> None:
    assert kind in kinds(text)
    assert kind in kinds(f"| seen | {text} | 3 |")


@pytest.mark.parametrize(
    "text",
    [
        "0899-model-1.0.0.0-data-1.0.0.0", "2026.10.11549", "2026-01-02T03:04:05+00:00", "2026-01-02T03:04:05Z", "created 2026-01-02",
        "+41.3 [−0.3, +80.5]", "72.3 [68.6, 75.8]", "134515008", "1\u202f234\u202f567\u202f890", "0.612 0.580 0.640", "10.0.0.12",
        "huggingface_hub 2.4.0", "sha256:0123456789012345678901234567890123456789012345678901234567890123", "@media", "a@b",
        "the patient was born in the hospital", "case notes 2023 and patients 2024", "seen at 0800 120/80", "1e-05", "rows 12-34-56",
        "n: 100 200 300", "| 0012 | 0013 | 0014 |", "uv run pipeline run", "ollama run hf.co/org/demo-model:fine_tuned_model.gguf",
        "p95 3.141592653589793", "peak_memory_bytes: 3012345678", "https://huggingface.co/datasets/org/x/tree/0012-train-1.0.0.0",
    ],
)  # fmt: skip
def test_figures_versions_and_digests_are_no_persons(text: str) -> None:
    assert kinds(text) == []


figures = st.one_of(
    st.from_regex(r"[0-9]{4}-(model|train|valid|test)-[0-9]{1,2}(\.[0-9]{1,2}){3}", fullmatch=True),
    st.from_regex(r"(sha256:)?[0-9a-f]{40,64}", fullmatch=True),
    st.datetimes().map(lambda moment: moment.isoformat(timespec="seconds") + "+00:00"),
    st.dates().map(str),
    st.floats(allow_nan=False, allow_infinity=False).map(repr),
    st.floats(-100, 100).map(lambda value: f"{value:+.1f} [{value - 1:+.1f}, {value + 1:+.1f}]"),
    st.integers(0, 10**15).map(str),
    st.from_regex(r"[0-9]{1,4}\.[0-9]{1,3}\.[0-9]{1,6}(rc[0-9])?", fullmatch=True),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(figures, min_size=1, max_size=4), st.sampled_from([" | ", ", ", "; ", "\n", ": "]))
def test_no_figure_of_a_card_looks_personal(parts: list[str], between: str) -> None:
    assert [found for line in between.join(parts).split("\n") for found in matches(line)] == []


def test_the_cards_themselves_are_clean() -> None:
    files = {f"{kind}_card.yaml": yaml_text.dump(card).encode() for kind, card in cards().items()}
    assert scan(files, [RECORD]) == ()


def test_a_finding_names_the_place_and_shows_only_the_start() -> None:
    [found] = scan({"a/README.md": b"one\ntwo\nmail jane.doe@hospital.org now\n"})
    assert (found.file, found.place, found.kind) == ("a/README.md", "line 3", "e-mail address")
    assert found.shown == "jane.d…"
    assert "hospital" not in str(found) + repr(found)
    assert found.digest not in repr(found)


def test_a_tables_cells_are_read_with_their_columns_names() -> None:
    files = {"data/train.parquet": parquet(meta_dob=["1961-12-04", None], prompt=["fine", "call 0176/1234567"], n=[1, 2], x=[0.5, 1.5])}
    assert [(f.place, f.kind) for f in scan(files, rows_allowed=True)] == [
        ("row 1, meta_dob", "date of birth"), ("row 2, prompt", "phone number"),
    ]  # fmt: skip


def test_what_can_not_be_read_does_not_pass() -> None:
    found = scan({"params": b"\xff\xfe\x00", "metrics/metrics.parquet": b"PAR1 no", "plots/a.png": b"\x89PNG\xff"})
    assert [(f.file, f.kind) for f in found] == [
        ("metrics/metrics.parquet", "can't be read, so can't be checked"), ("params", "can't be read, so can't be checked"),
    ]  # fmt: skip


# --- verbatim text ---------------------------------------------------------------------------------------------------


def test_eight_words_of_a_record_are_found_whatever_their_dress() -> None:
    for text in (
        "they said: WOKE AT NIGHT -- with\na dry   cough, *felt* hot.",
        "| Woke at night | with a dry cough, felt |",
        "Woke at night with a dry cough&#44; felt",
    ):
        [found] = scan({"README.md": text.encode()}, [RECORD])
        assert (found.kind, found.place) == ("record text", "line 1")
    assert scan({"README.md": b"woke at night with a dry cough"}, [RECORD]) == ()
    assert scan({"README.md": b"woke at night with a dry cough and felt hot"}, [RECORD]) == ()


def test_escapes_of_yaml_and_json_hide_nothing() -> None:
    text = 'Woke "at\nnight"\twith \\ a dry cough, félt hot'
    record = 'woke "at night" with \\ a dry cough félt hot'
    for name, written in (("model_card.yaml", yaml_text.dump({"why": text})), ("model_set_config.json", json.dumps({"why": text}))):
        assert [found.kind for found in scan({name: written.encode()}, [record])] == ["record text"]


def test_words_of_two_records_or_two_files_make_no_run() -> None:
    assert scan({"README.md": b"a b c d e f g h"}, ["a b c d", "e f g h"]) == ()
    assert scan({"a.md": b"a b c d", "b.md": b"e f g h"}, ["a b c d e f g h"]) == ()
    cells = parquet(x=["a b c d", "e f g h"])
    assert scan({"metrics/metrics.parquet": cells}, ["a b c d e f g h"]) == ()


def test_scripts_without_blanks_count_characters() -> None:
    assert [f.kind for f in scan({"README.md": "患者は夜に乾いた咳で目が覚めた。".encode()}, ["「夜に乾いた咳で目が覚めた」"])] == [
        "record text"
    ]


def test_files_of_rows_may_hold_rows_when_that_is_allowed_and_nothing_else_may() -> None:
    files = {
        "data/train.parquet": parquet(prompt=[RECORD]),
        "README.md": RECORD.encode(),
        "model_set_config.json": json.dumps([RECORD]).encode(),
    }
    assert {found.file for found in scan(files, [RECORD], rows_allowed=True)} == {"README.md"}
    assert {found.file for found in scan(files, [RECORD])} == set(files)


def test_the_instruction_that_all_prompts_share_is_no_record_text() -> None:
    instruction = "Rate the record below as an expert would for how well it fits the topic."
    rows = [
        {
            "record_id": "r1",
            "prompt": f"{instruction}\n\nNote: {RECORD}",
            "rationale": "Because of",
            "copilot_rationale": "x",
            "label": "No",
        }
    ]
    texts = list(record_texts(rows, instruction))
    assert texts == [f"\n\nNote: {RECORD}", "Because of", "x"]
    assert scan({"README.md": instruction.encode()}, texts) == ()


def test_many_records_are_compared_in_seconds() -> None:
    chance = random.Random(1)
    words = [f"w{chance.randrange(10**6):x}" for _ in range(20_000)]
    records = [" ".join(chance.choices(words, k=40)) for _ in range(20_000)]
    card = "\n".join(" ".join(chance.choices(words, k=12)) for _ in range(2_000))
    stolen = " ".join(records[7_777].split()[10:19])
    start = time.perf_counter()
    [found] = scan({"README.md": f"{card}\n{stolen}\n{card}".encode()}, iter(records))
    assert found.place == "line 2001"
    assert time.perf_counter() - start < 10


# --- review ----------------------------------------------------------------------------------------------------------


def test_a_review_lets_exactly_what_was_reviewed_pass() -> None:
    findings = scan({"README.md": b"mail jane.doe@hospital.org\n"})
    check(())
    with pytest.raises(PrivacyError, match=r"README\.md, line 1: e-mail address: jane\.d…") as caught:
        check(findings)
    assert caught.value.exit_code == 5
    code = review_code(findings)
    assert code in caught.value.hint
    check(findings, code)
    for other in (b"mail jane.dow@hospital.org\n", b"\nmail jane.doe@hospital.org\n", b"jane.doe@hospital.org +49 176 1234567"):
        with pytest.raises(PrivacyError, match="is of other findings"):
            check(scan({"README.md": other}), code)
    with pytest.raises(PrivacyError):
        check(findings, "")


def test_many_findings_are_counted_and_every_file_is_named() -> None:
    text = "\n".join(f"a{n}@b.org" for n in range(130))
    with pytest.raises(PrivacyError, match=r"131 places(.|\n)*line 100: (.|\n)*and 31 more: 30 in a\.md, 1 in b\.md"):
        check(scan({"a.md": text.encode(), "b.md": b"a@b.org"}))


# --- GitHub Actions --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("event", "refused"),
    [
        ({"repository": {"private": True}}, None),
        ({"repository": {"private": False}}, "is public"),
        ({"repository": {"private": "true"}}, "may be public"),
        ({"repository": {}}, "may be public"),
        ({}, "may be public"),
        ([], "may be public"),
        (None, "may be public"),
    ],
)
def test_a_public_repository_reads_no_rows_that_are_not_shareable(tmp_path: Path, event: Any, refused: str | None) -> None:
    environ = {"GITHUB_ACTIONS": "true", "GITHUB_EVENT_PATH": str(tmp_path / "event.json"), "GITHUB_REPOSITORY": "o/r"}
    if event is not None:
        (tmp_path / "event.json").write_text(json.dumps(event), encoding="utf-8")
    check_repository(True, environ)
    check_repository(False, {**environ, "GITHUB_ACTIONS": ""})
    if refused is None:
        check_repository(False, environ)
        return
    with pytest.raises(PrivacyError, match=f"o/r {refused}") as caught:
        check_repository(False, environ)
    assert "dataset.shareable" in caught.value.hint
