"""The formatter: tables of every kind in, the same records out; every bad input a message; splits that hold."""

from __future__ import annotations

import csv
import gzip
import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.config import PipelineConfig, parse_config
from pipeline.errors import ArtifactError, ConfigError, DataError, OutputError
from pipeline.formatted_dataset import write_formatted
from pipeline.formatter_promptbuilder import format_dataset, read_formatted, read_quality, row_key
from pipeline.near_duplicates import SIMILAR, near_duplicates
from pipeline.records import SPLITS, Opinion, Rating, RatingScale, Record, Split
from pipeline.splits import plan_splits

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
SCALE = RatingScale((Rating(0, "Does Not Match", ("no match",)), Rating(-1, "Unknown", abstain=True), Rating(1, "Match")))
HEADER = ["id", "text", "rating", "why"]
LABELS = ("Match", "Does Not Match", "Unknown")
WORDS = tuple(
    "cough fever pain arm leg chest cold rash head ache night week fall burn cut sore throat dizzy weak numb".split()  # noqa: SIM905
)


def sentence(n: int, length: int = 12) -> str:
    return f"patient {n} " + " ".join(random.Random(n).choices(WORDS, k=length))


def rated(n: int = 30) -> list[list[str]]:
    return [[f"r{k}", sentence(k), LABELS[k % 3], f"because of sign {k}"] for k in range(n)]


def config_for(path: Path, **dataset: Any) -> PipelineConfig:
    columns = {"id": "id", "text": ["text"], "rating": "rating", "rationale": "why"} | dataset.pop("columns", {})
    return parse_config({"dataset": {"path": path.name, "columns": columns, **dataset}}, root=path.parent)


def save(path: Path, rows: list[list[str]], header: list[str] = HEADER, delimiter: str = ",", ends: str = "\n") -> Path:
    with path.open("w", encoding="utf-8", newline="") as handle:
        csv.writer(handle, delimiter=delimiter, lineterminator=ends).writerows([header, *rows])
    return path


def records_of(path: Path, **dataset: Any) -> tuple[Record, ...]:
    config = config_for(path, **dataset)
    format_dataset(config, path.parent / "out")
    return read_formatted(path.parent / "out" / "formatted_dataset.csv", config.dataset.scale)


def refusal(path: Path, **dataset: Any) -> str:
    """The message and hint of the DataError; what was there before must be untouched."""
    out = path.parent / "out"
    out.mkdir(exist_ok=True)
    (out / "formatted_dataset.csv").write_text("before")
    with pytest.raises(DataError) as caught:
        format_dataset(config_for(path, **dataset), out)
    assert caught.value.exit_code == 2
    assert [p.name for p in out.iterdir()] == ["formatted_dataset.csv"]
    assert (out / "formatted_dataset.csv").read_text() == "before"
    assert str(path) in str(caught.value)
    return f"{caught.value}\n{caught.value.hint}"


# --- what comes out --------------------------------------------------------------------------------------------------


def test_a_table_becomes_records(tmp_path: Path) -> None:
    rows = [[*row, f"d{n // 3}", "match" if n % 2 else "", "ward A"] for n, row in enumerate(rated())]
    path = save(tmp_path / "t.csv", rows, [*HEADER, "day", "bot", "ward"])
    config = config_for(path, columns={"group": "day"}, copilot={"rating": "bot"}, keep=["ward"])
    quality = format_dataset(config, tmp_path / "out")
    records = read_formatted(tmp_path / "out" / "formatted_dataset.csv", config.dataset.scale)
    assert [r.record_id for r in records] == [row[0] for row in rows]
    first = records[1]
    assert first.prompt.endswith(f"\n\nText: {sentence(1)}")
    assert (first.label, first.rationale, first.group) == ("Does Not Match", "because of sign 1", "d0")
    assert first.opinions == {"copilot": Opinion("Match", None)}
    assert records[0].opinions == {}
    assert first.meta == {"ward": "ward A"}
    assert quality.rows_read == quality.rows_kept == 30
    assert quality.opinions == {"copilot": 15}
    assert sum(s.rows for s in quality.splits.values()) == 30
    assert quality == read_quality(tmp_path / "out" / "data_quality.json")


def test_the_file_is_as_designed(tmp_path: Path) -> None:
    record = Record(
        "a",
        "g",
        "train",
        'say "x",\nplease',
        "Match",
        "",
        {"second": Opinion(None, "so"), "copilot": Opinion("Unknown", None)},
        {"w": "=1"},
    )
    write_formatted(tmp_path / "f.csv", [record], SCALE, systems=("copilot", "second"), meta=("w",))
    assert (tmp_path / "f.csv").read_bytes().decode() == (
        "record_id,group,split,prompt,rating,label,rationale,copilot_rating,copilot_rationale,rater_second_rating,rater_second_rationale,meta_w\n"
        'a,g,train,"say ""x"",\nplease",1,Match,,Unknown,,,so,=1\n'
    )


def test_formatting_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    path = save(tmp_path / "t.csv", rated())
    files = []
    for name in ("one", "two"):
        format_dataset(config_for(path), tmp_path / name)
        files.append([(tmp_path / name / f).read_bytes() for f in ("formatted_dataset.csv", "data_quality.json")])
    assert files[0] == files[1]


@pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t.jsonl", "t.ndjson", "t.parquet", "t.csv.gz", "t.jsonl.gz"])
def test_every_format_gives_the_same_records(tmp_path: Path, name: str) -> None:
    expected = records_of(save(tmp_path / "plain.csv", rated()))
    path = tmp_path / name
    kind = name.removesuffix(".gz").rsplit(".", 1)[1]
    lines = "\n".join(json.dumps(dict(zip(HEADER, row, strict=True))) for row in rated())
    if kind == "parquet":
        pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        pq.write_table(pa.table({name: [row[n] for row in rated()] for n, name in enumerate(HEADER)}), path)
    elif kind in ("csv", "tsv"):
        save(path, rated(), delimiter="\t" if kind == "tsv" else ",")
    else:
        path.write_text(lines)
    if name.endswith(".gz"):
        path.write_bytes(gzip.compress(path.read_bytes()))
    assert records_of(path) == expected


@pytest.mark.parametrize(("mark", "ends"), [(b"\xef\xbb\xbf", "\n"), (b"", "\r\n"), (b"\xef\xbb\xbf", "\r\n"), (b"", "\r")])
def test_byte_order_mark_and_line_ends_are_forgiven(tmp_path: Path, mark: bytes, ends: str) -> None:
    rows = rated()
    rows[4][1] += "\nnext line"
    expected = records_of(save(tmp_path / "plain.csv", rows))
    path = save(tmp_path / "t.csv", [[cell.replace("\n", ends) for cell in row] for row in rows], ends=ends)
    path.write_bytes(mark + path.read_bytes())
    assert records_of(path) == expected


def test_ratings_are_forgiven_case_spaces_aliases_and_number_forms(tmp_path: Path) -> None:
    forms = ["Match", " match ", "MATCH", "1", "1.0", "+1", "No  Match", "does not match", "0", "0.0", "-1", "-1.0", "unknown"]
    rows = [[f"r{n}", sentence(n), forms[n % len(forms)], ""] for n in range(52)]
    labels = [r.label for r in records_of(save(tmp_path / "t.csv", rows))][: len(forms)]
    assert labels == ["Match"] * 6 + ["Does Not Match"] * 4 + ["Unknown"] * 3


def test_mixed_types_in_jsonl(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    cells: list[Any] = [1, 1.0, "1", "Match"]
    items = [{"id": n, "text": n if n == 7 else sentence(n), "rating": cells[n // 3 % 4] if n % 3 else 0, "why": None} for n in range(30)]
    path.write_text("\n".join(map(json.dumps, items)))
    records = records_of(path)
    assert [r.label for r in records] == [("Match" if n % 3 else "Does Not Match") for n in range(30)]
    assert records[7].prompt.endswith("Text: 7")
    assert records[7].record_id == "7"


def test_ids_without_a_column_are_digests_of_the_texts(tmp_path: Path) -> None:
    records = records_of(save(tmp_path / "t.csv", rated()), columns={"id": None})
    assert len({r.record_id for r in records}) == 30
    assert all(len(r.record_id) == 16 and set(r.record_id) <= set("0123456789abcdef") for r in records)
    assert row_key(records[0].prompt) != records[0].record_id


def test_texts_that_look_like_nothing_or_a_formula_stay(tmp_path: Path) -> None:
    odd = ["NA", "null", "None", "=1+1", "-5", "#N/A", "@x", "1e5", "TRUE", "'"]
    rows = rated() + [[f"o{n}", text, LABELS[n % 3], text] for n, text in enumerate(odd)]
    found = {r.record_id: r for r in records_of(save(tmp_path / "t.csv", rows))}
    for n, text in enumerate(odd):
        assert found[f"o{n}"].prompt.endswith(f"Text: {text}")
        assert found[f"o{n}"].rationale == text


def test_a_megabyte_in_a_cell(tmp_path: Path) -> None:
    rows = rated()
    rows[3][1] = " ".join(f"w{n}" for n in range(180_000))
    assert len(rows[3][1]) > 1_000_000
    assert records_of(save(tmp_path / "t.csv", rows))[3].prompt.endswith(rows[3][1])


def test_a_label_that_looks_like_a_formula(tmp_path: Path) -> None:
    ratings = [{"value": 0, "label": "=no()"}, {"value": 1, "label": "+yes"}]
    rows = [[f"r{n}", sentence(n), "=no()" if n % 2 else "+yes", ""] for n in range(20)]
    assert records_of(save(tmp_path / "t.csv", rows), ratings=ratings)[1].label == "=no()"


# --- what is dropped and noted ---------------------------------------------------------------------------------------


def test_rows_are_dropped_and_counted_by_reason(tmp_path: Path) -> None:
    rows = rated()
    rows += [["e1", "  ", "Match", ""], ["e2", "NaN", "Match", ""], ["e3", "some text", "", ""], ["e4", "more text", "n/a", ""]]
    rows += [["d1", sentence(0), "Match", "other"], ["c1", sentence(1), "Match", ""], list(rows[2])]
    path = save(tmp_path / "t.csv", rows)
    quality = format_dataset(config_for(path), tmp_path / "out")
    assert quality.dropped_by_reason == {"empty rating": 2, "empty text": 2, "exact duplicate": 2, "same text, different ratings": 2}
    assert [d.row for d in quality.dropped] == [2, 31, 32, 33, 34, 35, 36, 37]
    assert (quality.exact_duplicates, quality.label_conflicts, quality.rows_kept) == (2, 1, 29)


def test_no_rationale_is_allowed_and_noted(tmp_path: Path) -> None:
    path = save(tmp_path / "t.csv", [[*row[:3], "" if n else "seen"] for n, row in enumerate(rated())])
    assert "29 of 30 rows have no rationale." in format_dataset(config_for(path), tmp_path / "out").notes
    quality = format_dataset(config_for(path, columns={"rationale": None}), tmp_path / "out")
    assert any("No rationale column" in note for note in quality.notes)
    assert (quality.without_rationale, quality.rationale_words) == (30, {})


def test_an_opinion_off_the_scale_is_no_rating_and_noted(tmp_path: Path) -> None:
    rows = [[*row, "can't say" if n < 4 else "Match", "a reason" if n == 0 else ""] for n, row in enumerate(rated())]
    path = save(tmp_path / "t.csv", rows, [*HEADER, "bot", "bot_why"])
    config = config_for(path, copilot={"rating": "bot", "rationale": "bot_why"})
    quality = format_dataset(config, tmp_path / "out")
    records = read_formatted(tmp_path / "out" / "formatted_dataset.csv", SCALE)
    assert records[0].opinions == {"copilot": Opinion(None, "a reason")}
    assert records[1].opinions == {}
    assert quality.opinions == {"copilot": 27}
    assert "copilot: 4 cells are not on the scale (rows 1, 2, 3 and 1 more) and count as no rating." in quality.notes


CONTRADICTING = [
    ("Match", "Does Not Match because there is no cough."),
    ("Match", "Unknown"),
    ("Match", "Some words. Rated as no match."),
    ("Match", 'the rating is "Unknown".'),
    ("Does Not Match", "This is a match because of the cough."),
]
CONSISTENT = [
    ("Does Not Match", "Does Not Match because there is no cough."),
    ("Match", "This does not match every sign, yet fever and cough do."),
    ("Match", "Unknown cause of fever, but it fits."),
    ("Match", "Match because of cough; the onset is unknown."),
    ("Does Not Match", "Signs match a fracture."),
    ("Unknown", "Could be a match."),
]


def test_rationales_that_name_another_rating_are_found(tmp_path: Path) -> None:
    cases = CONTRADICTING + CONSISTENT
    rows = rated() + [[f"c{n}", sentence(100 + n), label, why] for n, (label, why) in enumerate(cases)]
    quality = format_dataset(config_for(save(tmp_path / "t.csv", rows)), tmp_path / "out")
    assert quality.contradicting_rationales == tuple(f"c{n}" for n in range(len(CONTRADICTING)))


# --- bad input -------------------------------------------------------------------------------------------------------


def plain(text: str | bytes) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        path = folder / "t.csv"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return make


BAD = {
    "missing": (lambda folder: folder / "t.csv", ["no such file"]),
    "folder": (lambda folder: (folder / "t.csv").mkdir() or folder / "t.csv", ["is a folder"]),
    "extension": (lambda folder: folder / "t.xlsx", [".xlsx", "CSV UTF-8"]),
    "empty": (plain(""), ["is empty"]),
    "blank": (plain("\n \n"), ["is empty"]),
    "header only": (plain("id,text,rating,why\n"), ["a header but no row"]),
    "latin-1": (plain("id,text,rating,why\n1,caf\xe9,Match,x\n".encode("latin-1")), ["byte 0xe9", "line 2", "iconv"]),
    "utf-16": (plain("id,text,rating,why\n".encode("utf-16")), ["UTF-16", "UTF-8"]),
    "utf-16 unmarked": (plain("id,text,rating,why\n".encode("utf-16-le")), ["UTF-16"]),
    "NUL": (plain("id,text,rating,why\n1,a\0b,Match,x\n"), ["NUL", "line 2"]),
    "ragged": (plain('id,text,rating,why\n1,"a\nb",Match,x\n2,a,b,Match,x\n3,a\n'), ["line 4: 5 cells", "line 5: 2 cells", "header has 4"]),
    "open quote": (plain('id,text,rating,why\n1,"a,Match,x\n2,b,Match,x\n'), ["line 2", "never closed"]),
    "quote": (plain('id,text,rating,why\n1,"a" b,Match,x\n'), ["line 2", "closing quote"]),
    "duplicate header": (plain("id,text,text,rating,why\n1,a,b,Match,x\n"), ["'text' 2 times"]),
    "missing columns": (plain("id,txt,Rating,reason\n1,a,Match,x\n"), ["did you mean 'txt'", "did you mean 'Rating'", "no column 'why'", "there: 'id'"]),  # noqa: E501
    "semicolons": (plain("id;text;rating;why\n1;a;Match;x\n"), ["semicolons", "commas"]),
    "tabs": (plain("id\ttext\trating\twhy\n1\ta\tMatch\tx\n"), ["tabs", ".tsv"]),
    "one rating": (plain("id,text,rating,why\n1,a b,Match,x\n2,c d,match,x\n"), ["every row left is rated 'Match'"]),
    "nothing left": (plain("id,text,rating,why\n1,,Match,x\n2,c d,,x\n"), ["no row is left", "1 empty text", "1 empty rating"]),
    "no id": (plain("id,text,rating,why\n,a,Match,x\n,c,Unknown,x\n"), ["no id in rows 1, 2"]),
    "same id": (plain("id,text,rating,why\n7,a,Match,x\n7,c,Unknown,x\n"), ["one id for different rows: rows 1, 2"]),
    "lack": (plain("id,text,rating,why\n1,a b c,Match,x\n2,d e f,Unknown,x\n3,g h i,Match,\n"), ["has no row rated 'Unknown'", "such rows in all: 1, in groups: 1", "seed"]),  # noqa: E501
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_tables(tmp_path: Path, case: str) -> None:
    make, expected = BAD[case]
    message = refusal(make(tmp_path))
    for part in expected:
        assert part in message


def test_unknown_ratings_are_listed_with_counts_and_rows_all_at_once(tmp_path: Path) -> None:
    rows = rated()
    rows[3][2] = rows[9][2] = "Mach"
    rows[5][2] = "x" * 300
    rows[6][0] = rows[7][0]
    message = refusal(save(tmp_path / "t.csv", rows))
    assert "unknown rating 'Mach', 2 times (rows 4, 10); did you mean 'Match'?" in message
    assert "a text of 300 characters, once (row 6)" in message
    assert "xxxx" not in message
    assert "one id for different rows: rows 7, 8" in message
    assert "known ratings: 0 = Does Not Match (no match)" in message


def test_a_wrong_rating_column_shows_few_values(tmp_path: Path) -> None:
    message = refusal(save(tmp_path / "t.csv", rated()), columns={"rating": "why", "rationale": None})
    assert "20 more unknown values" in message


def test_no_record_text_in_any_message(tmp_path: Path) -> None:
    secret = "Jane Roe of Elm Street"
    rows = [[row[0], f"{secret} {n} {row[1]}", "bad" if n == 3 else row[2], f"{secret} {n}"] for n, row in enumerate(rated())]
    rows[5][0] = "r4"
    message = refusal(save(tmp_path / "t.csv", rows))
    path = tmp_path / "u.jsonl"
    path.write_text(f'{{"id": "1", "text": "{secret}", "rating": "Match", "why": }}\n')
    assert secret not in message + refusal(path)


def test_an_opinion_column_where_nothing_is_known_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "t.csv", [[*row, "A+"] for row in rated()], [*HEADER, "bot"])
    assert "column 'bot': unknown rating 'A+', 30 times" in refusal(path, copilot={"rating": "bot"})


def test_text_that_holds_the_answer_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "t.csv", rated())
    with pytest.raises(ConfigError, match="'rating' is both text and rating"):
        format_dataset(config_for(path, columns={"text": ["text", "rating"]}), tmp_path / "out")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"id": "1", "text": "a", "rating": ', "line 3: not JSON at character"),
        ('["a"]', "line 3: not a JSON object"),
        ('{"id": "1", "text": ["a", "b"], "rating": "Match"}', "column 'text', row 3, line 3: holds a list or an object"),
        ('{"id": "1", "text": "a\\u0000b", "rating": "Match"}', "holds a NUL character"),
        ('{"id": "1", "text": "a\\ud800b", "rating": "Match"}', "half a surrogate pair"),
    ],
)
def test_bad_jsonl(tmp_path: Path, line: str, expected: str) -> None:
    path = tmp_path / "t.jsonl"
    lines = [json.dumps(dict(zip(HEADER, row, strict=True))) for row in rated()]
    path.write_text("\n".join([*lines[:2], line, *lines[2:]]))
    assert expected in refusal(path)


@pytest.mark.parametrize("cut", [0, 100, -100])
def test_damaged_parquet_and_gzip(tmp_path: Path, cut: int) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({name: [row[n] for row in rated()] for n, name in enumerate(HEADER)}), path)
    path.write_bytes(path.read_bytes()[:cut])
    assert "is empty" in refusal(path) if cut == 0 else "is damaged or not a Parquet file" in refusal(path)
    zipped = tmp_path / "t.csv.gz"
    zipped.write_bytes(gzip.compress(save(tmp_path / "t.csv", rated()).read_bytes())[: cut or 5])
    assert "gzip" in refusal(zipped)


def test_parquet_cells_of_other_types(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path, numbers = tmp_path / "t.parquet", [1.0, 0.0, None] * 10
    texts = [sentence(n) for n in range(30)]
    pq.write_table(pa.table({"text": texts, "rating": numbers, "id": list(range(30)), "why": [["a"]] * 30}), path)
    assert "column 'why', row 1: holds a list or an object; make it one text first (and 29 more rows)" in refusal(path)
    assert [r.label for r in records_of(path, columns={"rationale": None})] == ["Match", "Does Not Match"] * 10


def test_an_output_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(OutputError):
        format_dataset(config_for(save(tmp_path / "t.csv", rated())), tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


def test_the_output_is_not_taken_as_input(tmp_path: Path) -> None:
    path = save(tmp_path / "formatted_dataset.csv", rated())
    with pytest.raises(DataError, match="what this stage writes"):
        format_dataset(config_for(path), tmp_path)


# --- splits ----------------------------------------------------------------------------------------------------------


def splits_of(path: Path, **dataset: Any) -> dict[str, Split]:
    return {r.record_id: r.split for r in records_of(path, **dataset)}


def test_groups_and_near_duplicates_stay_together_and_shares_are_met(tmp_path: Path) -> None:
    rng = random.Random(5)
    rows = [[f"r{n}", sentence(n, 30), rng.choice(LABELS), "", f"g{rng.randrange(70)}"] for n in range(300)]
    rows += [[f"c{n}", f"{sentence(n, 30)}, again", rows[n][2], "", f"h{n}"] for n in range(20)]
    path = save(tmp_path / "t.csv", rows, [*HEADER, "day"])
    config = config_for(path, columns={"group": "day"})
    quality = format_dataset(config, tmp_path / "out")
    records = {r.record_id: r for r in read_formatted(tmp_path / "out" / "formatted_dataset.csv", SCALE)}
    where: dict[str, set[str]] = {}
    for row in rows:
        where.setdefault(row[4], set()).add(records[row[0]].split)
    assert all(len(splits) == 1 for splits in where.values())
    assert all(records[f"c{n}"].split == records[f"r{n}"].split and records[f"c{n}"].group == records[f"r{n}"].group for n in range(20))
    assert (quality.near_duplicate_clusters, quality.near_duplicate_rows) == (20, 40)
    for split, share in (("train", 0.6), ("valid", 0.1), ("test", 0.3)):
        assert abs(quality.splits[split].rows / 320 - share) < 0.03
        assert all(quality.splits[split].labels.values())


def test_the_order_of_rows_and_the_wording_of_the_prompt_do_not_move_rows(tmp_path: Path) -> None:
    rows = rated(90)
    before = splits_of(save(tmp_path / "a.csv", rows), columns={"id": "id"})
    after = splits_of(save(tmp_path / "b.csv", rows[::-1]), columns={"id": "id"})
    assert before == after
    config = config_for(tmp_path / "a.csv")
    config = replace(config, prompt=replace(config.prompt, topic="colds"))
    format_dataset(config, tmp_path / "out")
    assert before == {r.record_id: r.split for r in read_formatted(tmp_path / "out" / "formatted_dataset.csv", SCALE)}


def test_assigned_rows_stay_and_a_bridge_is_dropped(tmp_path: Path) -> None:
    path = save(tmp_path / "t.csv", [[*row, f"g{n}"] for n, row in enumerate(rated(60))], [*HEADER, "day"])
    first = records_of(path, columns={"group": "day"})
    assigned = {row_key(r.prompt): r.split for r in first}
    train, test = next(r for r in first if r.split == "train"), next(r for r in first if r.split == "test")
    rows = [[*row, f"g{n}"] for n, row in enumerate(rated(60))] + [
        [f"n{n}", sentence(500 + n), LABELS[n % 3], "", f"x{n}"] for n in range(60)
    ]
    rows.append(["joins", sentence(900), "Match", "", train.group])
    text = next(row[1] for row in rows if row[0] == test.record_id)
    rows.append(["bridge", f"{text}!", "Match", "", train.group])
    rows.append(["beside", f"{text}?", "Match", "", "new"])
    save(path, rows, [*HEADER, "day"])
    quality = format_dataset(config_for(path, columns={"group": "day"}), tmp_path / "out", assigned=assigned)
    second = {r.record_id: r for r in read_formatted(tmp_path / "out" / "formatted_dataset.csv", SCALE)}
    assert all(second[r.record_id].split == r.split for r in first)
    assert quality.dropped_by_reason == {"would bridge two splits": 1}
    assert "bridge" not in second
    assert (second["joins"].split, second["beside"].split) == ("train", "test")
    assert abs(quality.splits["test"].rows / len(second) - 0.3) < 0.03
    assert "60 rows keep the split that an earlier version gave them." in quality.notes
    assert not any("Leakage" in note for note in quality.notes)


def test_a_new_row_after_another_still_grows_every_split() -> None:
    names, labels, splits = [], [], []
    for n in range(60):
        names.append(f"n{n}")
        labels.append("a")
        plan = plan_splits(
            names, [""] * (n + 1), labels, near_duplicates([f"text {k} {k} {k}" for k in range(n + 1)]),
            shares={"train": 0.6, "valid": 0.1, "test": 0.3}, seed=1, assigned=[*splits, None],
        )  # fmt: skip
        assert plan.splits[:n] == tuple(splits)
        splits = list(plan.splits)
    assert [splits.count(split) for split in SPLITS] == pytest.approx([36, 6, 18], abs=2)


def given_split(tmp_path: Path, cells: list[str]) -> Path:
    rows = [[*row, cells[n % len(cells)]] for n, row in enumerate(rated(63))]
    return save(tmp_path / "t.csv", rows, [*HEADER, "part"])


def test_a_given_split_column_wins(tmp_path: Path) -> None:
    path = given_split(tmp_path, ["Train", "TRAINING", "validation", "test"] * 3 + ["dev"])
    splits = splits_of(path, columns={"split": "part"})
    names = {"Train": "train", "TRAINING": "train", "validation": "valid", "dev": "valid", "test": "test"}
    with path.open(newline="") as handle:
        assert splits == {row["id"]: names[row["part"]] for row in csv.DictReader(handle)}


@pytest.mark.parametrize(
    ("cells", "fixed", "free"),
    [(["test", "dev"], {"test": "test"}, {"train", "valid"}), (["test", "train"], {"test": "test"}, {"train", "valid"}),
     (["test", ""], {"test": "test"}, {"train", "valid"}), (["train", "", "", ""], {"train": "train"}, {"valid", "test"})],
)  # fmt: skip
def test_a_column_that_gives_some_splits_leaves_the_rest_to_the_hash(
    tmp_path: Path, cells: list[str], fixed: dict[str, str], free: set[str]
) -> None:
    path = given_split(tmp_path, cells)
    splits = splits_of(path, columns={"split": "part"})
    with path.open(newline="") as handle:
        rows = list(csv.DictReader(handle))
    assert all(splits[row["id"]] == fixed[row["part"]] for row in rows if row["part"] in fixed)
    assert {splits[row["id"]] for row in rows if row["part"] not in fixed} == free


def test_bad_split_cells_are_refused(tmp_path: Path) -> None:
    message = refusal(given_split(tmp_path, ["train", "valid", "test", "holdout", ""]), columns={"split": "part"})
    assert "'holdout' is no split (rows 4, 9, 14 and 9 more)" in message
    assert "no split in rows 5, 10, 15 and" in message


def test_leakage_in_a_given_split_is_noted_not_moved(tmp_path: Path) -> None:
    rows = [[*row, ("train", "valid", "test")[n // 3 % 3]] for n, row in enumerate(rated(63))]
    rows.append(["copy", f"{rows[0][1]}!", rows[0][2], "", "test"])
    path = save(tmp_path / "t.csv", rows, [*HEADER, "part"])
    quality = format_dataset(config_for(path, columns={"split": "part"}), tmp_path / "out")
    assert any(note.startswith("Leakage: 1 groups or clusters") for note in quality.notes)
    assert read_formatted(tmp_path / "out" / "formatted_dataset.csv", SCALE)[-1].split == "test"


# --- near duplicates -------------------------------------------------------------------------------------------------


def triples(text: str) -> set[tuple[str, ...]]:
    words = text.split()
    return {tuple(words[n : n + 3]) for n in range(len(words) - 2)}


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000))
def test_near_duplicates_are_those_that_comparing_all_pairs_finds(seed: int) -> None:
    rng = random.Random(seed)
    texts = [" ".join(rng.choices(WORDS, k=rng.randint(6, 60))) for _ in range(30)]
    for _ in range(30):
        words = rng.choice(texts).split()
        words[rng.randrange(len(words)) : rng.randrange(len(words))] = rng.choices(WORDS, k=rng.randint(0, 2))
        texts.append(" ".join(words) if len(words) > 2 else "a b c")
    sets = [triples(text) for text in texts]
    expected = {(a, b) for a in range(60) for b in range(a) if len(sets[a] & sets[b]) >= SIMILAR * len(sets[a] | sets[b]) - 1e-9}
    found = near_duplicates(texts)
    pairs = {tuple(pair) for pair in found.pairs.tolist()}
    for a in range(60):
        for b in range(a):
            one, other = sorted((int(found.classes[a]), int(found.classes[b])))
            assert ((a, b) in expected) == (one == other or (one, other) in pairs)
    assert found.complete


def test_filled_in_forms_are_not_one_cluster_but_their_copies_are() -> None:
    form = "the patient was seen by the nurse on duty and then by the doctor who found nothing of note and sent home with the advice for"
    texts = [f"{form} {WORDS[n % 20]} {n}" for n in range(400)] + [f"{form} {WORDS[3]} 3!", f"Today {form} {WORDS[4]} 4"]
    clusters = near_duplicates(texts).clusters()
    assert clusters[3] == clusters[400]
    assert clusters[4] == clusters[401]
    assert len(set(clusters.tolist())) == 400


def test_texts_without_words_or_spaces() -> None:
    clusters = near_duplicates(
        ["!!!", "???", "!!!", "胸が痛いと言っています昨日から咳も出ます", "胸が痛いと言っています、昨日から咳も出ます。", ""]
    ).clusters()
    assert clusters[0] == clusters[2] != clusters[1]
    assert clusters[3] == clusters[4]


# --- reading back ----------------------------------------------------------------------------------------------------

TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=30)
FILLED = TEXTS.filter(bool)
OPINIONS = st.builds(Opinion, st.sampled_from([*LABELS, None]), st.one_of(st.none(), FILLED)).filter(lambda o: bool(o.label or o.rationale))


@st.composite
def record_sets(draw: st.DrawFn) -> tuple[list[Record], list[str], list[str]]:
    raters = draw(st.lists(FILLED.filter(lambda name: name != "copilot"), unique=True, max_size=2))
    systems = (["copilot"] if draw(st.booleans()) else []) + raters
    meta = draw(st.lists(TEXTS, unique=True, max_size=2))
    ids = draw(st.lists(FILLED, unique=True, max_size=5))
    records = [
        Record(
            record_id,
            draw(TEXTS),
            draw(st.sampled_from(SPLITS)),
            draw(FILLED),
            draw(st.sampled_from(LABELS)),
            draw(TEXTS),
            {system: draw(OPINIONS) for system in systems if draw(st.booleans())},
            {column: draw(TEXTS) for column in meta},
        )
        for record_id in ids
    ]
    return records, systems, meta


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(record_sets())
def test_records_come_back_exactly(tmp_path: Path, drawn: tuple[list[Record], list[str], list[str]]) -> None:
    records, systems, meta = drawn
    write_formatted(tmp_path / "f.csv", records, SCALE, systems=systems, meta=meta)
    assert read_formatted(tmp_path / "f.csv", SCALE) == tuple(records)


def test_a_damaged_formatted_dataset_is_named_by_row_and_column(tmp_path: Path) -> None:
    path = tmp_path / "f.csv"
    with pytest.raises(ArtifactError, match="no such file"):
        read_formatted(path, SCALE)
    header = "record_id,group,split,prompt,rating,label,rationale,copilot_rating,copilot_rationale\n"
    path.write_text(header + "a,g,train,p,1,Match,,,\nb,g,holdout,p,1,Match,,,\nc,g,test,p,0,Match,,Huh,\nd,g,test,,1,Match,,,\ne,g\n")
    with pytest.raises(DataError) as caught:
        read_formatted(path, SCALE)
    assert [problem.split(":")[0] for problem in caught.value.problems] == [
        "row 2, column 'split'", "row 3, column 'rating'", "row 3, column 'copilot_rating'", "row 4, column 'prompt'", "row 5",
    ]  # fmt: skip
    for text, expected in (("", "is empty"), ("a,b\n1,2\n", "column 1 is 'a', not 'record_id'"), (header + '"a', "broken")):
        path.write_text(text)
        with pytest.raises(DataError, match=expected):
            read_formatted(path, SCALE)
    path.write_bytes(header.encode() + b"\xff")
    with pytest.raises(DataError, match="not UTF-8"):
        read_formatted(path, SCALE)


def test_a_damaged_quality_file(tmp_path: Path) -> None:
    for text in ("{}", "[", '{"rows_read": "many"}'):
        (tmp_path / "q.json").write_text(text)
        with pytest.raises(ArtifactError):
            read_quality(tmp_path / "q.json")


# --- real tables -----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not SHARED.exists(), reason="the real tables are not here")
def test_esnli(tmp_path: Path) -> None:
    columns = {"id": "id", "text": ["premise", "hypothesis"], "rating": "rating", "rationale": "rationale", "group": "premise_id"}
    ratings = [{"value": label, "label": label} for label in ("entailment", "neutral", "contradiction")]
    config = parse_config({"dataset": {"path": "esnli/rated.csv", "columns": columns, "ratings": ratings, "ordered": False}}, root=SHARED)
    quality = format_dataset(config, tmp_path)
    assert (quality.rows_read, quality.contradicting_rationales) == (2363, ())
    assert quality.splits["test"].rows == pytest.approx(0.3 * 2363, abs=10)
    assert sum(split.groups for split in quality.splits.values()) <= 800


@pytest.mark.skipif(not SHARED.exists(), reason="the real tables are not here")
def test_pubmedqa_keeps_its_official_test_rows(tmp_path: Path) -> None:
    columns = {"id": "pmid", "text": ["question", "context"], "rating": "rating", "rationale": "rationale", "split": "official_split"}
    ratings = [{"value": label, "label": label} for label in ("no", "maybe", "yes")]
    dataset = {"path": "pubmedqa/rated.csv", "columns": columns, "ratings": ratings, "raters": {"second": {"rating": "second_rating"}}}
    quality = format_dataset(parse_config({"dataset": dataset}, root=SHARED), tmp_path)
    assert quality.splits["test"].rows == 500
    assert {split: quality.splits[split].rows for split in ("train", "valid")} == pytest.approx({"train": 429, "valid": 71}, abs=3)
    test = [
        r for r in read_formatted(tmp_path / "formatted_dataset.csv", parse_config({"dataset": dataset}).dataset.scale) if r.split == "test"
    ]
    assert sum(r.opinions["second"].label == r.label for r in test) == 390  # the paper's 78.0 %
