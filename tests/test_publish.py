"""What is to be published is noted down, then done; whenever the program dies, the next call finishes, and nothing is there twice."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import ArtifactError, BackendError
from pipeline.publication import Publication, Published
from pipeline.publish import JOURNAL, Place, Planned, mark_pending, merge_journals, pending, preview_all, publish_all, published
from pipeline.store import write_text
from pipeline.version_names import Kind
from tests.hub_double import TOKEN, WRITES, HubDouble, HubProcess

PLACES: dict[Kind, Place] = {
    "dataset": ("dataset", "0001-train-1.0.0.0", "ns/p-dataset"),
    "run": ("run", "0001-model-1.0.0.0-data-1.0.0.0", "ns/p-runs"),
    "model": ("model", "0001-model-1.0.0.0", "ns/p-model"),
}
NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)


class FakeHub:
    """The port `Hub` in memory; fails where `broken` says so."""

    def __init__(self) -> None:
        self.sent: list[Publication] = []
        self.replaced: list[bool] = []
        self.there: dict[Place, Published] = {}
        self.broken: str | None = None

    def publish(self, publication: Publication, *, create: bool = False, replace: bool = False) -> Published:
        if publication.kind == self.broken:
            raise BackendError("the Hub is down", hint="run again")
        self.sent.append(publication)
        self.replaced.append(replace)
        place = publication.kind, publication.name, publication.repo_id
        self.there[place] = Published(*place, f"{len(self.sent):040x}", f"https://hub/{publication.name}", changed=True)
        return self.there[place]

    def read_back(self, kind: Kind, repo_id: str, name: str) -> Published | None:
        return self.there.get((kind, name, repo_id))


class Unchanged(FakeHub):
    """Has all of it already."""

    def publish(self, publication: Publication, *, create: bool = False, replace: bool = False) -> Published:
        self.replaced.append(replace)
        return self.there[publication.kind, publication.name, publication.repo_id]


def build(kind: Kind, found: Mapping[Kind, Published]) -> Publication:
    names = "".join(f"{known}: {version.commit} {version.url}\n" for known, version in sorted(found.items()))
    card = f"---\nlicense: mit\nid: '0899'\n{names}---\n# Card\n".encode()
    return Publication(*PLACES[kind], private=True, files={"README.md": card, f"{kind}_card.yaml": b"a: {b: 1}\n"})


def planned(*kinds: Kind) -> list[Planned]:
    return [Planned(*PLACES[kind], build) for kind in kinds]


def journal(metadata: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (metadata / JOURNAL).read_text(encoding="utf-8").splitlines()]


# --- order -----------------------------------------------------------------------------------------------------------


def test_dataset_then_run_then_model_each_naming_those_before(tmp_path: Path) -> None:
    hub = FakeHub()
    results = publish_all(planned("model", "dataset", "run"), hub, tmp_path, now=lambda: NOON)
    assert [result.kind for result in results] == ["dataset", "run", "model"]
    card = hub.sent[2].files["README.md"]
    assert isinstance(card, bytes)
    assert f"dataset: {1:040x} https://hub/0001-train-1.0.0.0\nrun: {2:040x}" in card.decode()
    assert [line["state"] for line in journal(tmp_path)] == ["pending"] * 3 + ["published"] * 3
    assert (tmp_path / JOURNAL).read_text().splitlines()[-1] == (
        f'{{"at": "2026-03-01T12:00:00Z", "commit": "{3:040x}", "kind": "model", "name": "0001-model-1.0.0.0", "repo": "ns/p-model", '
        '"state": "published", "url": "https://hub/0001-model-1.0.0.0"}'
    )
    assert pending(tmp_path) == []


def test_what_is_done_is_not_done_again(tmp_path: Path) -> None:
    hub = FakeHub()
    first = publish_all(planned("dataset", "run", "model"), hub, tmp_path)
    text = (tmp_path / JOURNAL).read_text()
    again = publish_all(planned("dataset", "run", "model"), hub, tmp_path)
    assert len(hub.sent) == 3
    assert [result.commit for result in again] == [result.commit for result in first]
    assert not any(result.changed for result in again)
    assert (tmp_path / JOURNAL).read_text() == text
    assert published(tmp_path)[PLACES["run"]].url == first[1].url


def test_a_failure_keeps_what_was_done(tmp_path: Path) -> None:
    hub = FakeHub()
    hub.broken = "run"
    with pytest.raises(BackendError):
        publish_all(planned("dataset", "run", "model"), hub, tmp_path)
    assert [line.kind for line in pending(tmp_path)] == ["run", "model"]
    hub.broken = None
    publish_all(planned("dataset", "run", "model"), hub, tmp_path)
    assert [publication.kind for publication in hub.sent] == ["dataset", "run", "model"]
    assert pending(tmp_path) == []


def test_versions_published_earlier_are_known(tmp_path: Path) -> None:
    hub = FakeHub()
    dataset = Published(*PLACES["dataset"], "d" * 40, "https://hub/old", changed=False)
    publish_all(planned("model"), hub, tmp_path, known={"dataset": dataset})
    assert b"d" * 40 in hub.sent[0].files["README.md"]  # type: ignore[operator]


def test_a_builder_that_gives_another_version_is_a_bug(tmp_path: Path) -> None:
    wrong = Planned(*PLACES["run"], lambda kind, found: build("model", found))
    with pytest.raises(ValueError, match="another version"):
        publish_all([wrong], FakeHub(), tmp_path)
    stray = Planned(*PLACES["run"], lambda kind, found: Publication(*PLACES["run"], True, {"README.md": b"", "secrets/.env": b""}))
    with pytest.raises(ValueError, match=r"secrets/\.env"):
        publish_all([stray], FakeHub(), tmp_path)
    with pytest.raises(ValueError, match="two versions"):
        publish_all(planned("run", "run"), FakeHub(), tmp_path)


# --- again -----------------------------------------------------------------------------------------------------------


def test_again_sends_what_was_published(tmp_path: Path) -> None:
    hub = FakeHub()
    publish_all(planned("dataset", "model"), hub, tmp_path, now=lambda: NOON)
    text = (tmp_path / JOURNAL).read_text()
    results = publish_all(planned("dataset", "model"), hub, tmp_path, again=True, now=lambda: NOON + timedelta(hours=1))
    assert hub.replaced == [False, False, True, True]
    assert [result.commit for result in results] == [f"{number:040x}" for number in (3, 4)]
    assert f"dataset: {3:040x}".encode() in hub.sent[3].files["README.md"]  # type: ignore[operator]
    assert (tmp_path / JOURNAL).read_text().startswith(text)
    assert [(line["state"], line["at"][11:13]) for line in journal(tmp_path)[4:]] == [("published", "13")] * 2
    assert [published(tmp_path)[PLACES[kind]].commit for kind in ("dataset", "model")] == [result.commit for result in results]
    assert pending(tmp_path) == []
    assert [result.commit for result in publish_all(planned("dataset", "model"), hub, tmp_path)] == [result.commit for result in results]
    assert len(hub.sent) == 4


def test_again_without_a_change_adds_no_line(tmp_path: Path) -> None:
    hub = FakeHub()
    publish_all(planned("dataset"), hub, tmp_path)
    text = (tmp_path / JOURNAL).read_text()
    same = Unchanged()
    same.there = hub.there
    publish_all(planned("dataset"), same, tmp_path, again=True)
    assert same.replaced == [True]
    assert (tmp_path / JOURNAL).read_text() == text


def test_again_notes_a_move_whose_line_was_never_written(tmp_path: Path) -> None:
    """The run before died after it had moved the tag: now nothing changes, and the journal is behind."""
    publish_all(planned("dataset"), FakeHub(), tmp_path)
    ahead = Unchanged()
    ahead.there[PLACES["dataset"]] = Published(*PLACES["dataset"], "e" * 40, "https://hub/e", changed=False)
    publish_all(planned("dataset"), ahead, tmp_path, again=True)
    assert published(tmp_path)[PLACES["dataset"]].commit == "e" * 40


def test_again_replaces_what_no_journal_knows(tmp_path: Path) -> None:
    hub = FakeHub()
    publish_all(planned("dataset"), hub, tmp_path, again=True)
    assert hub.replaced == [True]
    assert [line["state"] for line in journal(tmp_path)] == ["pending", "published"]


def test_a_clock_that_goes_back_hides_no_line(tmp_path: Path) -> None:
    hub = FakeHub()
    publish_all(planned("dataset"), hub, tmp_path, now=lambda: NOON)
    [result] = publish_all(planned("dataset"), hub, tmp_path, again=True, now=lambda: NOON - timedelta(days=1))
    assert published(tmp_path)[PLACES["dataset"]].commit == result.commit
    assert journal(tmp_path)[-1]["at"] == "2026-03-01T12:00:01Z"


def published_line(commit: str, at: str) -> str:
    kind, name, repo = PLACES["dataset"]
    told = {"at": at, "commit": commit * 40, "kind": kind, "name": name, "repo": repo, "state": "published", "url": "u"}
    return json.dumps(told, sort_keys=True) + "\n"


@pytest.mark.parametrize(
    ("ours", "theirs", "latest"),
    [
        ([("a", "12:00Z"), ("b", "14:00Z")], [("a", "12:00Z"), ("c", "13:00Z")], "b"),
        ([("a", "12:00Z"), ("b", "13:00Z")], [("a", "12:00Z"), ("c", "14:00Z")], "c"),
        ([("a", "12:00Z"), ("b", "13:00Z"), ("a", "14:00Z")], [("a", "12:00Z")], "a"),
        ([("a", "12:00Z")], [("a", "12:00Z"), ("b", "13:00Z"), ("a", "14:00Z")], "a"),
        ([("a", "12:00Z"), ("b", "12:00Z")], [], "b"),
        ([("a", "12:00+02:00"), ("b", "11:00Z")], [("c", "10:30")], "b"),
    ],
)
def test_the_latest_line_holds_after_a_merge(
    tmp_path: Path, ours: list[tuple[str, str]], theirs: list[tuple[str, str]], latest: str
) -> None:
    sides = ["".join(published_line(commit, f"2026-03-01T{at}") for commit, at in lines) for lines in (ours, theirs)]
    for merged in (merge_journals(*sides), merge_journals(*reversed(sides)), sides[0] + sides[1], sides[1] + sides[0]):
        (tmp_path / JOURNAL).write_text(merged)
        assert published(tmp_path)[PLACES["dataset"]].commit == latest * 40


# --- what can't be built whole any more ------------------------------------------------------------------------------


def incomplete(kind: Kind) -> Planned:
    return Planned(*PLACES[kind], build, incomplete=True)


def test_what_a_cut_off_attempt_published_is_taken(tmp_path: Path) -> None:
    hub = FakeHub()
    mark_pending(tmp_path, [PLACES["dataset"], PLACES["model"]])
    hub.there[PLACES["dataset"]] = Published(*PLACES["dataset"], "d" * 40, "https://hub/d", changed=False)
    results = publish_all([incomplete("dataset"), *planned("model")], hub, tmp_path)
    assert [publication.kind for publication in hub.sent] == ["model"]
    assert results[0].commit == published(tmp_path)[PLACES["dataset"]].commit == "d" * 40
    assert b"d" * 40 in hub.sent[0].files["README.md"]  # type: ignore[operator]
    assert pending(tmp_path) == []


def test_what_is_not_there_is_published_as_it_can_be_built(tmp_path: Path) -> None:
    hub = FakeHub()
    publish_all([incomplete("dataset")], hub, tmp_path)
    assert len(hub.sent) == 1
    text = (tmp_path / JOURNAL).read_text()
    publish_all([incomplete("dataset")], hub, tmp_path, again=True)  # files that are there are not taken away
    assert len(hub.sent) == 1
    assert (tmp_path / JOURNAL).read_text() == text


# --- the journal -----------------------------------------------------------------------------------------------------


def test_marking_twice_is_marking_once(tmp_path: Path) -> None:
    assert pending(tmp_path) == []
    assert mark_pending(tmp_path, []) == []
    assert not (tmp_path / JOURNAL).exists()
    assert mark_pending(tmp_path, PLACES.values(), now=lambda: NOON) == list(PLACES.values())
    text = (tmp_path / JOURNAL).read_text()
    assert mark_pending(tmp_path, [*PLACES.values(), PLACES["run"]]) == []
    assert (tmp_path / JOURNAL).read_text() == text
    assert [line.place for line in pending(tmp_path)] == list(PLACES.values())
    other = ("model", "0001-model-1.0.0.0", "elsewhere/p-model")
    assert mark_pending(tmp_path, [other]) == [other]


def test_a_line_without_its_end_is_ended(tmp_path: Path) -> None:
    mark_pending(tmp_path, [PLACES["run"]])
    path = tmp_path / JOURNAL
    path.write_text(path.read_text().rstrip("\n"))
    mark_pending(tmp_path, [PLACES["model"]])
    assert len(journal(tmp_path)) == 2


GOOD = '{"at": "2026-03-01T12:00:00Z", "commit": null, "kind": "run", "name": "n", "repo": "r", "state": "pending", "url": null}'


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("<<<<<<< HEAD", "marks of a merge"),
        (GOOD[:40], "line 2"),
        ("[" * 100_000, "line 2"),
        ("[]", "fields"),
        ('{"kind": "run"}', "fields"),
        (GOOD.replace('"run"', '"other"'), "'other'"),
        (GOOD.replace("pending", "begun"), "'begun'"),
        (GOOD.replace('"n"', "7"), "a text"),
        (GOOD.replace("2026-03-01T12:00:00Z", "yesterday"), "isoformat"),
        (GOOD.replace("pending", "published"), "40 hex digits"),
        (GOOD.replace('"url": null', '"url": "u"'), "pending and has"),
    ],
)
def test_a_damaged_line_is_named(tmp_path: Path, line: str, word: str) -> None:
    path = tmp_path / JOURNAL
    path.write_text(f"{GOOD}\n{line}\n", encoding="utf-8")
    for read in (pending, published, lambda metadata: publish_all(planned("run"), FakeHub(), metadata)):
        with pytest.raises(ArtifactError, match=r"publications\.jsonl: damaged at line 2") as caught:
            read(tmp_path)
        assert word in str(caught.value)
        assert caught.value.hint
    assert path.read_text(encoding="utf-8") == f"{GOOD}\n{line}\n"


def test_a_journal_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / JOURNAL).write_bytes(b"\xff\xfe")
    with pytest.raises(ArtifactError, match="can't be read"):
        pending(tmp_path)


def test_journals_of_two_clones_merge(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    mark_pending(ours, [PLACES["dataset"]], now=lambda: NOON)
    (theirs).mkdir()
    (theirs / JOURNAL).write_text((ours / JOURNAL).read_text())
    publish_all(planned("dataset"), FakeHub(), ours)
    mark_pending(theirs, [PLACES["run"]])
    mark_pending(ours, [PLACES["model"]])
    a, b = (ours / JOURNAL).read_text(), (theirs / JOURNAL).read_text()
    merged = merge_journals(a, b)
    assert merged.startswith(a)
    assert merged.splitlines() == [*a.splitlines(), b.splitlines()[1]]
    assert merge_journals(merged, a) == merge_journals(merged, merged) == merged
    (tmp_path / JOURNAL).write_text(merge_journals(b, a))
    assert {line.kind for line in pending(tmp_path)} == {"run", "model"}
    with pytest.raises(ArtifactError, match=r"theirs.*line 1"):
        merge_journals(a, "{")
    assert merge_journals("", "") == ""


_DONE = GOOD.replace("pending", "published").replace('"url": null', '"url": "u"').replace("null", f'"{"a" * 40}"')
_LINES = [
    line.replace("T12:00", time).replace('"run"', kind).replace('"n"', '"n\u2028"')
    for line in (GOOD, _DONE)
    for time in ("T12:00", "T13:00")
    for kind in ('"run"', '"model"')
]


@given(st.lists(st.sampled_from(_LINES)), st.lists(st.sampled_from(_LINES)), st.lists(st.sampled_from(_LINES)))
def test_merging_loses_nothing_and_its_order_does_not_matter(a: list[str], b: list[str], c: list[str]) -> None:
    texts = ["".join(f"{line}\n" for line in lines) for lines in (a, b, c)]
    merged = merge_journals(merge_journals(texts[0], texts[1]), texts[2])

    def told(lines: list[str]) -> set[tuple[str, ...]]:
        return {tuple(json.loads(line)[name] or "" for name in ("kind", "name", "repo", "state", "commit")) for line in lines if line}

    assert told(merged.split("\n")) == told([*a, *b, *c])
    assert len(merged.split("\n")) == len(told([*a, *b, *c])) + 1
    assert merged == merge_journals(texts[0], merge_journals(texts[1], texts[2]))


# --- preview ---------------------------------------------------------------------------------------------------------


def test_a_preview_tells_everything_and_does_nothing(tmp_path: Path) -> None:
    weights = tmp_path / "fine_tuned_model.gguf"
    weights.write_bytes(bytes(1234))

    def with_weights(kind: Kind, found: Mapping[Kind, Published]) -> Publication:
        plain = build(kind, found)
        return Publication(*PLACES[kind], False, {**plain.files, "fine_tuned_model.gguf": weights, "system": b"You rate."})

    metadata = tmp_path / "metadata"
    previews = preview_all([Planned(*PLACES["model"], with_weights), *planned("dataset")], metadata)
    assert not metadata.exists()
    assert [(preview.kind, preview.private, preview.published) for preview in previews] == [
        ("dataset", True, False),
        ("model", False, False),
    ]
    files = {file.path: (file.size, file.fields) for file in previews[1].files}
    dataset = f"{'0' * 40} https://huggingface.co/datasets/ns/p-dataset/tree/0001-train-1.0.0.0"
    assert files["README.md"][1] == {"license": "mit", "id": "0899", "dataset": dataset}
    assert {path: told for path, told in files.items() if path != "README.md"} == {
        "model_card.yaml": (10, {"a": {"b": 1}}), "fine_tuned_model.gguf": (1234, None), "system": (9, None),
    }  # fmt: skip


def test_a_preview_of_what_is_there(tmp_path: Path) -> None:
    results = publish_all(planned("dataset"), FakeHub(), tmp_path)
    dataset, model = preview_all(planned("dataset", "model"), tmp_path)
    assert (dataset.published, model.published) == (True, False)
    [card] = [file for file in model.files if file.path == "README.md"]
    assert card.fields is not None
    assert results[0].commit in card.fields["dataset"]


def test_a_preview_of_a_bad_card(tmp_path: Path) -> None:
    def files(**content: bytes | Path) -> list[Planned]:
        return [Planned(*PLACES["run"], lambda kind, found: Publication(*PLACES["run"], True, content))]

    assert preview_all(files(**{"README.md": b"no front matter"}), tmp_path)[0].files[0].fields == {}
    for content in (
        {"README.md": b"---\na: [\n---\n"},
        {"run_card.yaml": b"{"},
        {"README.md": tmp_path / "none"},
        {"template": tmp_path / "none"},
    ):
        with pytest.raises(ArtifactError):
            preview_all(files(**content), tmp_path)


# --- killed at every step --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server() -> Iterator[HubDouble]:
    with HubDouble(tokens={TOKEN: None}) as double:
        yield double


@pytest.fixture(scope="module")
def client(server: HubDouble, tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubProcess]:
    with HubProcess(server, tmp_path_factory.mktemp("hub-home")) as process:
        yield process


VERSIONS = {
    kind: {"name": place[1], "repo_id": place[2], "files": {"metrics/a.json": "{}", "plots/a.svg": "\0" * 5000}}
    for kind, place in PLACES.items()
}  # fmt: skip


def everything(client: HubProcess, metadata: Path, dies: tuple[int, bool] | None = None) -> dict[str, Any]:
    return client.do("everything", versions=VERSIONS, metadata=str(metadata), create=True, dies=dies)


def test_all_through_the_real_client(client: HubProcess, server: HubDouble, tmp_path: Path) -> None:
    server.reset()
    results = everything(client, tmp_path)["result"]
    assert [result["kind"] for result in results] == ["dataset", "run", "model"]
    card = server.repository("ns/p-model").files["README.md"].decode()
    for result in results[:2]:
        assert f"{result['kind']}: {result['commit']} {result['url']}" in card
    assert "Distinctive" not in (tmp_path / JOURNAL).read_text()


@pytest.mark.parametrize("served", [False, True], ids=["before", "after"])
def test_killed_at_every_request(client: HubProcess, server: HubDouble, tmp_path: Path, served: bool) -> None:
    """Repositories are missing at first, so that making them is among the steps."""
    server.reset()
    everything(client, tmp_path / "whole")
    wanted, steps = outcome(server), server.operations()
    assert len(steps) > 30
    for at, step in enumerate(steps, 1):
        if served and step not in WRITES | {"lfs-put", "lfs-verify"} and at < len(steps):
            continue  # as killed before the next one
        server.reset()
        metadata = tmp_path / f"{at}"
        answer = everything(client, metadata, dies=(at, served))
        assert answer == {"killed": True}, at
        lines = journal(metadata)
        assert [line["state"] for line in lines[:3]] == ["pending"] * 3
        answer = everything(client, metadata)
        assert "error" not in answer, answer["error"]["trace"]
        assert outcome(server) == wanted, at
        assert pending(metadata) == []
        assert journal(metadata)[: len(lines)] == lines
        assert len(journal(metadata)) == 6


def test_killed_at_every_request_while_it_is_published_again(client: HubProcess, server: HubDouble, tmp_path: Path) -> None:
    """One version with more files than before: the tag, the head of main and the journal agree in the end."""
    server.reset()
    kind, name, repo = PLACES["model"]
    before = {kind: {"name": name, "repo_id": repo, "files": {"metrics/a.json": "{}"}}}
    client.do("everything", versions=before, metadata=str(tmp_path / "start"), create=True)
    start, text = copy.deepcopy(server.repositories), (tmp_path / "start" / JOURNAL).read_text()
    server.requests.clear()
    client.do("everything", versions={kind: VERSIONS[kind]}, metadata=str(tmp_path / "start"), again=True)
    wanted, steps = outcome(server), server.operations()
    assert "delete-tag" in steps
    for at in range(1, len(steps) + 2):
        server.reset()
        server.repositories = copy.deepcopy(start)
        metadata = tmp_path / f"{at}"
        write_text(metadata / JOURNAL, text)
        asked: dict[str, Any] = {"versions": {kind: VERSIONS[kind]}, "metadata": str(metadata), "again": True}
        assert client.do("everything", dies=(min(at, len(steps)), at > len(steps)), **asked) == {"killed": True}
        answer = client.do("everything", **asked)
        assert "error" not in answer, answer["error"]["trace"]
        assert outcome(server) == wanted, at
        assert published(metadata)[PLACES["model"]].commit == server.repository(repo).tags[name] == server.repository(repo).head.id
        assert len(journal(metadata)) == 3


def outcome(server: HubDouble) -> dict[str, Any]:
    """All that is there: every commit with its tree, every tag."""
    return {
        name: (
            [(commit.id, commit.title, {path: blob.oid for path, blob in commit.files.items()}) for commit in repository.commits],
            repository.tags,
        )
        for name, repository in server.repositories.items()
    }
