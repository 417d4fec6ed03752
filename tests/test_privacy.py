"""The privacy gate: what it finds, what it must leave alone, and how a review lets exactly what was reviewed pass."""

from __future__ import annotations

import io
import json
import random
import re
import sys
import time
import unicodedata
from datetime import date
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
from pipeline.privacy_patterns import matches, normal
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
        ("mrn_0012345", "record number"),
        ("patient_id: 0012345", "record number"),
        ('"patient-id": "0012345"', "record number"),
        ("ssn 123 45 6789", "record number"),
        ("social_security_number: 123.45.6789", "record number"),
        ("case no. 2019-123", "record number"),
        ("case no. 2019/045", "record number"),
        ("MRN 2019 1234", "record number"),
        ("date_of_birth: 1961-12-04", "date of birth"),
        ("children born 2015-01-01", "date of birth"),
        ("DOB 04/12/1961 - 05/06/2024", "date of birth"),  # the second is of a visit
        ("born 2015-01-01 to 2018-12-31, dob 1961-12-04", "date of birth"),
        ("phone_number: 5550132", "phone number"),
        ("user@github.com", "e-mail address"),
        ("git@hospital.org: our address", "e-mail address"),
        ("…jane@hospital.org", "e-mail address"),
        ("mailto:jane%40hospital.org", "e-mail address"),
        ("jane@hospital.xn--p1ai", "e-mail address"),
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
        "source: NHS 2019-2021 admissions", "NHS 111 2019", "NHS 2019–2021", "NHS in 2019/20", "case no. 2019", "insurance number 2019.",
        "case no. 2019 2020 2021", "call 2019-2021", "call on 2019-01-02", "02-2019 12-2020", "children born 2015-01-01 to 2018-12-31",
        "children born 2015-01-01 – 2018-12-31", "born 2015-01-01 until 2018-12-31", "born between 1/1/2015 and 31/12/2018",
        "2015-01-01 to 2018-12-31 (birth date)", "git@github.com:org/data.git", "ssh://git@github.com/org/data.git", "https://…@host.org",
        "label: J45.909, E11.9, ICD-10 F32.1", "orcid 0000-0002-1825-0097", "ISSN 0140-6736", "doi 10.1234/567-890-1234",
        "p95 3.141592653589793", "peak_memory_bytes: 3012345678", "https://huggingface.co/datasets/org/x/tree/0012-train-1.0.0.0",
    ],
)  # fmt: skip
def test_figures_versions_and_digests_are_no_persons(text: str) -> None:
    assert kinds(text) == []


figures = st.one_of(
    st.from_regex(r"[0-9]{4}-(model|train|valid|test)-[0-9]{1,2}(\.[0-9]{1,2}){3}", fullmatch=True),
    st.from_regex(r"(sha256:)?[0-9a-f]{40,64}", fullmatch=True),
    st.tuples(st.dates(date(1000, 1, 1)), st.times()).map(lambda at: f"{at[0]}T{at[1].isoformat('seconds')}+00:00"),
    st.dates(date(1000, 1, 1)).map(str),
    st.floats(allow_nan=False, allow_infinity=False).map(repr),
    st.floats(-100, 100).map(lambda value: f"{value:+.1f} [{value - 1:+.1f}, {value + 1:+.1f}]"),
    st.integers(0, 10**15).map(str),
    # no version is written 00.…, or in 3, 3 and 4 figures, as phone numbers are
    st.from_regex(r"(0|[1-9][0-9]{0,3})\.[0-9]{1,3}\.[0-9]{1,6}(rc[0-9])?", fullmatch=True).filter(
        lambda version: not re.match(r"\d{3}\.\d{3}\.\d{4}", version)
    ),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(figures, min_size=1, max_size=4), st.sampled_from([" | ", ", ", "; ", "\n", ": "]))
def test_no_figure_of_a_card_looks_personal(parts: list[str], between: str) -> None:
    assert [found for line in between.join(parts).split("\n") for found in matches(line)] == []
    assert scan({"card.yaml": between.join(parts).encode()}) == ()


@pytest.mark.parametrize(
    ("name", "text", "kind"),
    [
        ("README.md", "jane＠hospital.org", "e-mail address"),
        ("README.md", "jane\u200b@hospital.org", "e-mail address"),
        ("README.md", "jane@hos\u00adpital.org", "e-mail address"),
        ("README.md", "jane&#64;hospital.org", "e-mail address"),
        ("README.md", r"jane\_doe\@hospital.org", "e-mail address"),
        ("card.yaml", r'who: "jane\x40hospital.org"', "e-mail address"),
        ("card.yaml", r'who: "jane\U00000040hospital.org"', "e-mail address"),
        ("rows.json", r'{"who": "jane\u0040hospital.org"}', "e-mail address"),
        ("card.yaml", r'who: "1961-12-04\nborn"', "date of birth"),
        ("notes.txt", r"jane\@hospital.org", "e-mail address"),
        ("README.md", "555\u2011123\u20114567", "phone number"),
        ("README.md", "phone ٠١٢٣٤٥٦٧٨٩", "phone number"),
        ("README.md", "+49\u202f176\u202f123\u202f4567", "phone number"),
        ("README.md", "dob 1961–12–04", "date of birth"),
        ("README.md", "dob 1961−12−04", "date of birth"),
        ("README.md", "born\u00a01961-12-04", "date of birth"),
    ],
)
def test_no_dress_of_a_text_hides_what_it_says(name: str, text: str, kind: str) -> None:
    assert [found.kind for found in scan({name: text.encode()})] == [kind]


def test_characters_that_show_nothing_are_taken_out_and_each_dash_is_one() -> None:
    every = [chr(code) for code in range(sys.maxunicode + 1)]
    assert normal("".join(c for c in every if unicodedata.category(c) == "Cf")) == ""
    assert set(normal("".join(c for c in every if unicodedata.category(c) == "Pd"))) == {"-"}
    assert set(normal("".join(c for c in every if unicodedata.category(c) == "Nd"))) == set("0123456789")
    assert normal("a\x00b\tc") == "ab\tc"


@pytest.mark.parametrize(
    ("name", "text", "found"),
    [
        ("README.md", "contact born\n1961-12-04 phone\n+49 151\n2345678\n", [("line 1", "date of birth"), ("line 3", "phone number")]),
        ("README.md", "> call 0176\n>   1234567 now", [("line 1", "phone number")]),
        ("README.md", "the number 555-123-\n4567", [("line 1", "phone number")]),
        ("card.yaml", "why: see\n  patient id\n  0012345", [("line 2", "record number")]),
        ("card.yaml", 'why: "mail jane@hos\\\n  pital.org"', [("line 1", "e-mail address")]),
        ("card.yaml", 'why: "mail\\\n  \\ jane@hospital.org\\\n "\nn: 1', [("line 1", "e-mail address")]),
        ("README.md", "dob\n\n1961-12-04", []),  # another paragraph
        ("README.md", "call 0176 1234567\n2024 rows", [("line 1", "phone number")]),
        ("README.md", "born\n1961-12-04\nborn", [("line 1", "date of birth")]),
        ("README.md", "| born |\n| 1961-12-04 |\n", [("line 1", "date of birth")]),
        ("README.md", "dob 1961-12-04\ndob 1961-12-04", [("line 1", "date of birth"), ("line 2", "date of birth")]),
        ("README.md", "children born 2015-01-01\nto 2018-12-31", [("line 1", "date of birth")]),  # each line counts alone, too
        ("README.md", "- 0176\n- 1234567", []),
    ],
)
def test_what_goes_on_in_the_next_line_is_found_once(name: str, text: str, found: list[tuple[str, str]]) -> None:
    assert [(f.place, f.kind) for f in scan({name: text.encode()})] == found


def test_a_long_line_full_of_findings_is_read_in_seconds() -> None:
    for text in ("born 2015-01-01 to ", "a@b.org ", "2019 ", "+49 ", "d.o.b"):
        start = time.perf_counter()
        list(matches(text * (100_000 // len(text))))
        assert time.perf_counter() - start < 5


# --- what the team lets go -------------------------------------------------------------------------------------------


def test_what_the_team_allows_is_no_finding_and_nothing_else_is() -> None:
    text = b"mail Data@Hospital.org or x.data@hospital.org, +49 30 1234567\n2024 rows"
    assert [f.length for f in scan({"README.md": text}, allowed=["data@hospital.org", " +49  30\u200b 1234567"])] == [
        len("x.data@hospital.org")
    ]
    assert len(scan({"README.md": text}, allowed=["hospital.org", "data@", ""])) == 3
    sentence = "Woke at night with a dry cough, felt hot."
    assert scan({"README.md": sentence.encode()}, [RECORD], allowed=[sentence]) == ()
    assert len(scan({"README.md": RECORD.encode()}, [RECORD], allowed=[sentence])) == 1
    [unread] = scan({"params": b"\xff"}, allowed=["UnicodeDecodeError"])
    assert unread.shown == "UnicodeDecodeError"


def test_records_that_were_not_compared_close_the_gate() -> None:
    why = "the records are not here"
    [found] = scan({"a.md": b"fine", "b.md": b"fine"}, records_missing=why, allowed=[why])
    assert str(found) == "all files, -: not compared with the records: the records are not here"
    [other] = scan({"a.md": b"fine"}, records_missing="can't be read")
    assert review_code([found]) != review_code([other])
    with pytest.raises(PrivacyError, match="not compared with the records"):
        check([found])
    check([found], review_code([found]))


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
        "Wo\u200bke at night with a d\u00adry cough, felt",
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


def test_digits_of_other_scripts_are_the_same_word() -> None:
    assert len(scan({"README.md": "he was ٧٢ and woke at night coughing".encode()}, ["He was 72 and woke at night coughing"])) == 1


def test_cells_that_hold_lists_hide_nothing() -> None:
    cells = parquet(notes=[["jane＠hospital.org", "born\n1961-12-04", "she wöke at night with a dry cough"]])
    found = scan({"metrics/metrics.parquet": cells}, ["she wöke at night with a dry cough"])
    assert [(f.place, f.kind) for f in found] == [("row 1, notes", kind) for kind in ("date of birth", "e-mail address", "record text")]


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
    check(scan({"README.md": b"a line\nmore\nmail jane.doe@hospital.org\n"}), code)  # where it stands says nothing about a person
    for other in (b"jane.dow@hospital.org", b"jane.doe@hospital.org\njane.doe@hospital.org", b"jane.doe@hospital.org +49 176 1234567"):
        with pytest.raises(PrivacyError, match="is of other findings"):
            check(scan({"README.md": other}), code)
    with pytest.raises(PrivacyError, match="is of other findings"):
        check(scan({"model_card.yaml": b"mail jane.doe@hospital.org\n"}), code)
    with pytest.raises(PrivacyError):
        check(findings, "")


def test_a_review_of_what_can_not_be_read_is_of_its_bytes(tmp_path: Path) -> None:
    (tmp_path / "b").write_bytes(b"\xffb")
    codes = [review_code(scan({"params": content})) for content in (b"\xffa", b"\xffb", tmp_path / "b", tmp_path / "none")]
    assert codes[1] == codes[2]
    assert len(set(codes)) == 3


def test_a_public_message_shows_nothing_of_what_was_found() -> None:
    text = f"jane.doe@hospital.org\n{RECORD}\n".encode()
    findings = scan({"README.md": text, "params": b"\xff"}, [RECORD], records_missing="row 'Qx7' is broken")
    with pytest.raises(PrivacyError) as caught:
        check(findings, public=True)
    said = str(caught.value)
    assert "README.md, line 1: e-mail address: 21 characters" in said
    assert "README.md, line 2: record text: " in said
    assert "params, whole file: can't be read, so can't be checked\n" in said + "\n"
    assert not re.search(r"jane|hospital|…|woke|Qx7", said + caught.value.hint, re.IGNORECASE)
    assert review_code(findings) in caught.value.hint
    with pytest.raises(PrivacyError, match=r"jane\.d…"):
        check(findings)


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


@pytest.mark.parametrize(("said", "refused"), [("true", None), ("false", "is public"), ("", "may be public"), ("True", "may be public")])
@pytest.mark.parametrize("path", ["missing.json", "", None])
def test_a_container_without_the_event_is_told_by_the_workflow(tmp_path: Path, path: str | None, said: str, refused: str | None) -> None:
    environ = {"GITHUB_ACTIONS": "true", "PIPELINE_PRIVATE_REPOSITORY": said}
    if path is not None:
        environ["GITHUB_EVENT_PATH"] = str(tmp_path / path) if path else ""
    if refused is None:
        check_repository(False, environ)
        return
    with pytest.raises(PrivacyError, match=refused) as caught:
        check_repository(False, environ)
    assert ("PIPELINE_PRIVATE_REPOSITORY" in caught.value.hint) == (refused == "may be public")


@pytest.mark.parametrize("event", [{"repository": {"private": False}}, {}, None])
def test_the_event_goes_before_what_the_workflow_says(tmp_path: Path, event: Any) -> None:
    (tmp_path / "event.json").write_text(json.dumps(event) if event is not None else "no JSON", encoding="utf-8")
    environ = {"GITHUB_ACTIONS": "true", "GITHUB_EVENT_PATH": str(tmp_path / "event.json"), "PIPELINE_PRIVATE_REPOSITORY": "true"}
    with pytest.raises(PrivacyError, match="public"):
        check_repository(False, environ)
