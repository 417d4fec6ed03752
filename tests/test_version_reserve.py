"""IDs and numbers that are held on a real git remote before a run begins."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest

from pipeline.backends.git import GitRemote
from pipeline.errors import ArtifactError, BackendError, PushLostError, UserError
from pipeline.records import canonical
from pipeline.version_reservations import Reservation, read_tags
from pipeline.version_reserve import TRIES, Reserved
from pipeline.versions import Registry
from tests.version_runs import (
    Killer,
    before_push,
    done,
    git,
    healthy,
    later,
    make_remote,
    names,
    refs,
    reserved,
    toy,
)

NOW = datetime.now(UTC)


def ids(found: Reserved) -> list[str]:
    return [reservation.id for reservation in found.allocations.values()]


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    return make_remote(tmp_path)


# --- what is held ----------------------------------------------------------------------------------------------------


def test_the_first_versions_are_held_and_nothing_is_committed(bare: Path) -> None:
    head = git(bare, "rev-parse", "main")
    found = toy(bare).reserve()
    assert found.changed
    assert {kind: r.name for kind, r in found.allocations.items()} == {
        "dataset": "0001-train-1.0.0.0", "model": "0001-model-1.0.0.0", "run": "0001-model-1.0.0.0-data-1.0.0.0",
    }  # fmt: skip
    assert reserved(bare) == ["dataset/id-0001", "dataset/number-1", "model/id-0001", "model/number-1", "run/id-0001"]
    assert git(bare, "rev-parse", "main") == head
    assert found.why[0] == "new: 0001-train-1.0.0.0"


def test_a_reservation_tells_people_who_holds_it_and_how_long(bare: Path) -> None:
    toy(bare).reserve()
    text = git(bare, "tag", "--list", "--format=%(contents)", "reserved/model/id-0001")
    assert text.startswith("0001-model-1.0.0.0 is held for run one until 20")


def test_where_nothing_changed_nothing_is_pushed(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = toy(bare)
    done(run)
    before, pushed = refs(bare), before_push(monkeypatch)
    found = run.reserve()
    assert (found.changed, found.nonce, pushed) == (False, None, [])
    assert all(reservation.existing for reservation in found.allocations.values())
    assert refs(bare) == before


def test_a_dry_run_says_what_would_be_held_and_pushes_nothing(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy(bare, "old").reserve(now=later(-24))
    before, pushed = refs(bare), before_push(monkeypatch)
    found = toy(bare).reserve(dry_run=True)
    assert (found.changed, found.dry_run, ids(found), pushed) == (True, True, ["0002"] * 3, [])
    assert refs(bare) == before


def test_a_second_attempt_of_a_run_gets_what_the_first_held_and_pushes_nothing(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = toy(bare, "attempt-1", name="workflow run 7").reserve()
    toy(bare, "other", source="b").reserve()
    before, pushed = refs(bare), before_push(monkeypatch)
    second = toy(bare, "attempt-2", name="workflow run 7").reserve()
    assert (second.nonce, ids(second)) == (first.nonce, ids(first))
    assert pushed == []
    assert refs(bare) == before


def test_a_second_attempt_that_wants_something_else_keeps_its_ids(bare: Path) -> None:
    first = toy(bare, "attempt-1", name="workflow run 7").reserve()
    again = toy(bare, "attempt-2", name="workflow run 7", source="b", method="model_set")
    second = again.reserve()
    assert (second.nonce, ids(second)) == (first.nonce, ids(first))
    again.run()
    again.record()
    assert reserved(bare) == []
    assert names(healthy(bare), "model") == ["0001-model-1.0.0.0"]


def test_one_workflow_run_that_was_started_twice_makes_one_version(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = (toy(bare, folder, name="workflow run 7") for folder in ("one", "two"))
    before_push(monkeypatch, two.reserve)
    assert ids(one.reserve()) == ["0001"] * 3
    one.run()
    two.run()
    one.record()
    two.record()
    assert names(healthy(bare), "run") == ["0001-model-1.0.0.0-data-1.0.0.0"]
    assert reserved(bare) == []


def test_other_rows_under_the_same_recipe_hold_a_models_id_and_no_number(bare: Path) -> None:
    done(toy(bare))
    found = toy(bare, "two", rows="others").reserve()
    assert found.allocations["model"].name == "0002-model-1.0.0.0"
    assert reserved(bare) == ["dataset/id-0002", "dataset/number-1.0.0.1", "model/id-0002", "run/id-0002"]


# --- two at once -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at_once", [False, True], ids=["one after the other", "between look and push"])
@pytest.mark.parametrize(
    ("other", "numbers"),
    [({"source": "b"}, {"1.0.0.0", "2.0.0.0"}), ({"rows": "others"}, {"1.0.0.0", "1.0.0.1"})],
    ids=["other source", "same new source, other rows"],
)
def test_two_runs_get_different_ids_and_numbers(
    bare: Path, monkeypatch: pytest.MonkeyPatch, at_once: bool, other: dict[str, str], numbers: set[str]
) -> None:
    first, second = toy(bare, "first"), toy(bare, "second", **other)
    if at_once:
        pushed = before_push(monkeypatch, second.reserve)
        first.reserve()
        assert len(pushed) == 3, "the first push is lost to the second run's, then made anew"
    else:
        first.reserve()
        second.reserve()
    for run in (first, second):
        run.run()
        run.record()
    registry = healthy(bare)
    assert {entry.version for entry in registry.versions("dataset")} == numbers
    assert [entry.id for kind in ("dataset", "model", "run") for entry in registry.versions(kind)] == ["0001", "0002"] * 3  # type: ignore[arg-type]
    assert not any("taken meanwhile" in why for n in ("0001", "0002") for why in registry.read("dataset", n)["why"])
    assert reserved(bare) == []


def test_whoever_loses_every_push_gives_up_and_nothing_is_held(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(self: GitRemote, updates: object) -> None:
        raise PushLostError("somebody was faster")

    monkeypatch.setattr(GitRemote, "push", lost)
    before, waited = refs(bare), list[float]()
    with pytest.raises(BackendError, match=f"{TRIES} pushes in a row were overtaken by others") as error:
        toy(bare).reserve(sleep=waited.append)
    assert error.value.hint == "run again when less is going on"
    assert len(waited) == TRIES
    assert max(waited) <= 5 < sum(waited)
    assert refs(bare) == before


# --- what changes after the reservation --------------------------------------------------------------------------------


def test_a_run_that_comes_to_make_a_model_set_keeps_its_id_and_gets_other_numbers(bare: Path) -> None:
    done(toy(bare))
    run = toy(bare, "two", rows="others")
    assert run.reserve().allocations["model"].name == "0002-model-1.0.0.0"
    assert run.run("model_set")["model"].name == "0002-model-1.0.1.0"
    run.record()
    registry = healthy(bare)
    assert names(registry, "model") == ["0001-model-1.0.0.0", "0002-model-1.0.1.0"]
    assert names(registry, "run") == ["0001-model-1.0.0.0-data-1.0.0.0", "0002-model-1.0.1.0-data-1.0.0.1"]
    assert reserved(bare) == []


def test_what_was_never_recorded_is_abandoned_by_the_next_and_its_id_stays_taken(bare: Path) -> None:
    toy(bare, "lost", source="b").reserve(now=later(-24))
    found = toy(bare).reserve()
    assert found.abandoned == ("0001-train-1.0.0.0", "0001-model-1.0.0.0", "0001-model-1.0.0.0-data-1.0.0.0")
    assert ids(found) == ["0002"] * 3
    assert found.allocations["dataset"].name == "0002-train-2.0.0.0", "the number keeps its meaning too"
    registry = healthy(bare)
    assert names(registry, "model", "abandoned") == ["0001-model-1.0.0.0"]
    told = registry.read("model", "0001")["note"]
    assert told == "the run that it was held for did not come back in time (held for run lost)"
    assert not any("id-0001" in tag for tag in reserved(bare))


def test_where_everything_goes_through_pull_requests_nothing_is_committed(bare: Path) -> None:
    toy(bare, "lost", source="b").reserve(now=later(-24))
    head, held = git(bare, "rev-parse", "main"), reserved(bare)
    found = toy(bare).reserve(pull_request=True)
    assert (found.abandoned, ids(found)) == ((), ["0002"] * 3)
    assert found.allocations["dataset"].name == "0002-train-2.0.0.0"
    assert git(bare, "rev-parse", "main") == head
    assert set(held) < set(reserved(bare))


def test_a_late_run_that_nobody_missed_keeps_its_names(bare: Path) -> None:
    run = toy(bare)
    run.reserve(now=later(-24))
    run.run()
    recorded = run.record()
    assert (recorded.renamed, recorded.abandoned) == ({}, ())
    assert names(healthy(bare), "model") == ["0001-model-1.0.0.0"]
    assert reserved(bare) == []


def test_a_run_that_was_given_up_too_early_gets_another_id_and_nothing_is_lost(bare: Path) -> None:
    slow, other = toy(bare, "slow"), toy(bare, "other", source="b", rows="others")
    slow.reserve(now=later(-24))  # its clock is behind
    slow.run()
    assert done(other).versions["model"] == "0002-model-1.0.0.0"
    recorded = slow.record()
    assert recorded.renamed["0001-model-1.0.0.0"] == "0003-model-1.0.0.0"
    registry = healthy(bare)
    assert names(registry, "dataset") == ["0002-train-2.0.0.0", "0003-train-1.0.0.0"]
    assert names(registry, "dataset", "abandoned") == ["0001-train-1.0.0.0"]
    assert reserved(bare) == []


def test_a_reservation_from_the_future_is_kept_and_named(bare: Path) -> None:
    toy(bare, "ahead", source="b").reserve(now=later(48))
    found = toy(bare).reserve()
    assert ids(found) == ["0002"] * 3
    assert found.abandoned == ()
    assert "0001-model-1.0.0.0 was reserved at" in found.remarks[1]
    assert found.remarks[1].endswith("which is still to come: a clock is wrong")


# --- what others left on the remote --------------------------------------------------------------------------------------


def message(**changed: object) -> str:
    described = {"name": "0001-model-1.0.0.0", "names": ["0001-model-1.0.0.0"], "version": "1.0.0.0", "key": "sha256:k",
                 "segments": [{"digest": "sha256:d"}] * 4, "beside": {}, "lineage": {}}  # fmt: skip
    told = {"kind": "model", "id": "0001", "nonce": "n", "run": "r", "created": NOW.isoformat(), "expires": NOW.isoformat(),
            "described": described}  # fmt: skip
    return f"title\n\n{canonical({**told, **changed})}\n"


@pytest.mark.parametrize(
    "text",
    ["", "no JSON", "title\n\n[]", "title\n\n{}", "title\n\n" + "[" * 100_000, message(kind="zebra"), message(id="1"), message(id="../x"),
     message(created="2026-01-02T03:04:05"), message(expires="2026-01-02T03:04:05"), message(expires="soon"), message(described=[]),
     message(described={"name": "0001-model-1.0.0.0"}), message(described=None)],
    ids=["empty", "text", "list", "no fields", "deep", "kind", "id", "path", "no zone", "no zone at the end", "no time", "list inside",
         "little inside", "nothing inside"],
)  # fmt: skip
def test_a_reservation_that_means_nothing_is_not_read(text: str) -> None:
    assert read_tags({"reserved/model/id-0001": text}).unread == ("reserved/model/id-0001",)
    assert read_tags({"reserved/model/id-0001": message()}).unread == ()


def test_a_tag_that_is_no_reservation_is_named_and_left_alone(bare: Path) -> None:
    git(bare, "tag", "reserved/mine", "main")
    before = refs(bare)
    found = toy(bare).reserve()
    assert found.remarks == (
        "the tag reserved/mine is no reservation that can be read: delete it with `git push origin :refs/tags/reserved/mine`",
    )
    assert ids(found) == ["0001"] * 3
    assert before.items() <= refs(bare).items()


def test_one_that_is_in_the_way_stops_and_says_how_to_get_rid_of_it(bare: Path) -> None:
    person = ("-c", "user.name=S", "-c", "user.email=s@e")
    git(bare, *person, "tag", "-m", message(kind="zebra"), "reserved/model/id-0001", "main")
    before, run = refs(bare), toy(bare)
    with pytest.raises(ArtifactError, match="the tag reserved/model/id-0001 on the remote is no reservation that can be read") as error:
        run.reserve()
    assert error.value.hint.startswith("delete it with `git push origin :refs/tags/reserved/model/id-0001`")
    assert refs(bare) == before
    git(run.folder, "push", "--quiet", "origin", ":refs/tags/reserved/model/id-0001")
    assert ids(run.reserve()) == ["0001"] * 3


def test_a_number_that_was_held_and_came_to_nothing_can_be_held_again(bare: Path) -> None:
    """A record in a pull request that became a model set leaves the number of the training it was held for."""
    run = toy(bare)
    done(run)
    old, remote = run.plan(Registry.load(run.metadata))["model"], run.remote
    left = Reservation("model", old.id, old.described(), "nonce", "a run whose record was merged", NOW.isoformat(), NOW.isoformat())
    tag = "reserved/dataset/number-1.0.0.1"
    remote.push({f"refs/tags/{tag}": remote.tag(tag, "", left.message())})
    toy(bare, "two", rows="others").reserve()
    assert "dataset/number-1.0.0.1" in reserved(bare)
    assert "held for run two" in git(bare, "tag", "--list", "--format=%(contents)", tag)


def test_tags_whose_history_was_pushed_away_keep_their_ids_taken(bare: Path) -> None:
    done(toy(bare, "gone"))
    git(bare, "update-ref", "refs/heads/main", "main^")
    run = toy(bare, source="b")
    assert ids(run.reserve()) == ["0002"] * 3
    run.run()
    assert run.record().versions["model"] == "0002-model-1.0.0.0"


def test_after_9999_no_version_is_held_and_the_error_says_what_to_do(bare: Path) -> None:
    done(toy(bare, "recorded"))
    git(bare, "tag", "9999-model-1.0.0.0", "main")
    before = refs(bare)
    with pytest.raises(UserError, match="no ID is left for a new model version: 9999 was the last of four digits") as error:
        toy(bare, source="b", rows="others").reserve()
    assert error.value.hint == "start a new project: another `project` name and an empty metadata folder"
    assert refs(bare) == before
    assert not toy(bare, "again").reserve().changed, "what is recorded is found all the same"


# --- killed ----------------------------------------------------------------------------------------------------------


def test_a_reserve_that_was_killed_anywhere_is_simply_run_again(tmp_path: Path) -> None:
    """Before each of its calls of git, and after the last ones."""
    bare, killer = make_remote(tmp_path), Killer(tmp_path)
    run = toy(bare, name="workflow run 7")
    nothing, calls = refs(bare), 1
    while killer.kills(run.reserve, before=calls):
        assert refs(bare) == nothing
        calls += 1
    assert calls > 10
    first, held = run.reserve(), refs(bare)
    assert ids(first) == ["0001"] * 3, "the attempt that was let through held them"
    other = toy(bare, "other", name="workflow run 8", rows="others")
    assert killer.kills(other.reserve, after=calls - 1), "killed after the push"
    assert len(refs(bare)) > len(held)
    assert ids(other.reserve()) == ["0002"] * 3
    for each in (run, other):
        each.run()
        each.record()
    assert names(healthy(bare), "model") == ["0001-model-1.0.0.0", "0002-model-1.0.0.0"]
    assert reserved(bare) == []


def test_what_killed_runs_held_is_settled_by_a_later_reserve(tmp_path: Path) -> None:
    """Outside of workflows no two attempts have the same name."""
    bare, killer = make_remote(tmp_path), Killer(tmp_path)
    toy(bare, "first").reserve(dry_run=True)
    before = len(refs(bare))
    for n in range(2):
        run = toy(bare, f"killed-{n}", rows=f"{n}")
        assert killer.kills(run.reserve, after=16)
    assert len(refs(bare)) > before
    found = toy(bare, "later", rows="others").reserve(now=later(24))
    assert (len(found.abandoned), ids(found)) == (6, ["0003"] * 3)
    assert {tag.rpartition("-")[2] for tag in reserved(bare) if "/id-" in tag} == {"0003"}
    assert names(healthy(bare), "run", "abandoned")


def test_a_plain_fetch_takes_no_reservation_along(bare: Path) -> None:
    """It would come back with the next `git push --tags`."""
    other = toy(bare, "other")
    done(toy(bare, "first"))
    toy(bare, "second", source="b").reserve()
    git(other.folder, "fetch", "--quiet")
    assert "0001-model-1.0.0.0" in git(other.folder, "tag", "--list")
    assert "reserved" not in git(other.folder, "tag", "--list")
