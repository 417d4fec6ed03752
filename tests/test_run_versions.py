"""The whole pipeline on fakes, in a clone of a git remote: held, run, handed over, recorded."""

from __future__ import annotations

import json
import shutil
from datetime import timedelta
from pathlib import Path

import pytest
import yaml

from pipeline import run_versions
from pipeline.backends.git import GitRemote
from pipeline.errors import ArtifactError, OutputError, PrivacyError, UserError
from pipeline.run import Pipeline
from pipeline.versions import verify
from tests.test_run import ROOT, Job, job  # noqa: F401  a fixture
from tests.version_runs import checked_out, clone, git, make_remote, state_of

HOLD = timedelta(hours=6)
FIRST = {"dataset": "0001-train-1.0.0.0", "model": "0001-model-1.0.0.0", "run": "0001-model-1.0.0.0-data-1.0.0.0"}


class Team:
    """A remote with the sample's project, and clones of it."""

    def __init__(self, folder: Path, job: Job) -> None:  # noqa: F811
        self.folder, self.job = folder, job
        table = (ROOT / "data" / "chief_complaints.csv").read_text(encoding="utf-8")
        config = (ROOT / "pipeline.yaml").read_text(encoding="utf-8")
        self.bare = make_remote(folder, files={"pipeline.yaml": config, "data/chief_complaints.csv": table})

    def clone(self, name: str) -> Path:
        return clone(self.bare, self.folder / name)

    def pipeline(self, checkout: Path, *settings: str) -> Pipeline:
        self.job.folder = checkout
        return self.job.pipeline(*settings)

    def push(self, checkout: Path, *, rows: int) -> None:
        """Takes rows away from the table, commits and pushes."""
        table = checkout / "data" / "chief_complaints.csv"
        lines = table.read_text(encoding="utf-8").splitlines(keepends=True)
        table.write_text("".join(lines[:-rows]), encoding="utf-8")
        git(checkout, "commit", "--quiet", "-am", "Fewer rows")
        git(checkout, "push", "--quiet", "origin", "HEAD")


@pytest.fixture
def team(tmp_path: Path, job: Job, monkeypatch: pytest.MonkeyPatch) -> Team:  # noqa: F811
    for role in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{role}_NAME", "Somebody")
        monkeypatch.setenv(f"GIT_{role}_EMAIL", "somebody@example.org")
    folder = tmp_path / "team"
    folder.mkdir()
    return Team(folder, job)


def test_held_run_handed_over_and_recorded(team: Team) -> None:
    bump, run, recorder = team.clone("bump"), team.clone("run"), team.clone("record")
    held = run_versions.reserve(team.pipeline(bump), GitRemote(bump), hold=HOLD)
    assert held.changed
    assert {kind: r.name for kind, r in held.allocations.items()} == FIRST
    assert not team.job.engines, "holding versions asks no model"

    (run / "outputs").mkdir()
    shutil.copy(bump / "outputs" / "reservation.json", run / "outputs")
    pipeline = team.pipeline(run)
    assert pipeline.run().versions == FIRST
    handover = run / "outputs" / "artifacts"
    files = run_versions.collect(pipeline, handover)
    assert "summary.md" in files
    assert "metadata/versions/index.jsonl" in files
    assert not [name for name in files if name.endswith((".html", ".csv", ".gguf")) and name != "metadata/versions/splits.csv"]

    done = run_versions.record(team.pipeline(recorder), GitRemote(recorder), source=handover, nonce=held.nonce)
    assert done.recorded.commit == git(team.bare, "rev-parse", "main").strip()
    assert not done.publish
    assert state_of(team.bare)["tags"] == sorted(
        ["0001-model-1.0.0.0", FIRST["run"], "0001-train-1.0.0.0", "0001-valid-1.0.0.0", "0001-test-1.0.0.0"]
    )
    assert verify(checked_out(team.bare, team.folder / "seen")) == []
    assert "[skip ci]" in git(team.bare, "log", "-1", "--format=%B", "main")

    fresh = team.clone("fresh")
    again = run_versions.reserve(team.pipeline(fresh), GitRemote(fresh), hold=HOLD)
    assert (again.changed, again.nonce) == (False, None)
    assert all("unchanged" in sentence for sentence in again.why)
    assert state_of(team.bare)["commits"] == 2


def test_an_old_checkout_takes_the_recorded_splits_and_versions(team: Team) -> None:
    """A second attempt works on the commit that it began with; the history has grown since."""
    old, first = team.clone("old"), team.clone("first")
    team.pipeline(first).run()
    run_versions.record(team.pipeline(first), GitRemote(first))
    held = run_versions.reserve(team.pipeline(old), GitRemote(old), hold=HOLD)
    assert not held.changed
    told = json.loads((old / "outputs" / "reservation.json").read_text(encoding="utf-8"))
    assert len(told["assigned"]) > 200
    assert all(allocation["existing"] for allocation in told["allocations"])
    assert team.pipeline(old).run().versions == FIRST


def test_a_run_that_could_not_train_keeps_its_id(team: Team) -> None:
    checkout = team.clone("one")
    held = run_versions.reserve(team.pipeline(checkout), GitRemote(checkout), hold=HOLD)
    assert held.allocations["model"].described["segments"][2]["value"]["method"] == "lora"
    team.job.trainer.why_not = "an architecture of its own"
    pipeline = team.pipeline(checkout)
    made = pipeline.run()
    assert made.versions["model"].startswith("0001-model-")
    done = run_versions.record(team.pipeline(checkout), GitRemote(checkout))
    assert done.recorded.versions == made.versions
    assert not [tag for tag in state_of(team.bare)["tags"] if tag.startswith("reserved/")]
    assert verify(checkout / "metadata") == []
    assert git(checkout, "status", "--short") == ""


def test_a_merged_branch_gets_its_versions_without_training_again(team: Team) -> None:
    checkout = team.clone("one")
    git(checkout, "switch", "--quiet", "-c", "try")
    made = team.pipeline(checkout, "train.epochs=2").run()
    assert "provisional" in next(o.summary for o in made.stages if o.stage == "version")
    assert not (checkout / "metadata").exists()
    with pytest.raises(UserError, match="only the default branch"):
        run_versions.record(team.pipeline(checkout, "train.epochs=2"), GitRemote(checkout))
    config = yaml.safe_load((checkout / "pipeline.yaml").read_text(encoding="utf-8"))
    config["train"]["epochs"] = 2
    (checkout / "pipeline.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    git(checkout, "commit", "--quiet", "-am", "Two epochs")
    git(checkout, "switch", "--quiet", "main")
    git(checkout, "merge", "--quiet", "try")
    git(checkout, "push", "--quiet", "origin", "main")

    engines, trained = len(team.job.engines), len(team.job.trainer.asked)
    done = run_versions.record(team.pipeline(checkout), GitRemote(checkout))
    assert done.recorded.new == tuple(FIRST.values())
    assert done.recorded.in_own_checkout
    assert (len(team.job.engines), len(team.job.trainer.asked)) == (engines, trained)
    assert git(checkout, "status", "--short") == ""
    assert verify(checkout / "metadata") == []


def test_another_branch_holds_nothing(team: Team) -> None:
    checkout = team.clone("one")
    git(checkout, "switch", "--quiet", "-c", "try")
    held = run_versions.reserve(team.pipeline(checkout), GitRemote(checkout), hold=HOLD)
    assert (held.changed, held.nonce, dict(held.allocations)) == (True, None, {})
    assert state_of(team.bare)["tags"] == []


def test_two_clones_that_recorded_apart_are_put_together(team: Team) -> None:
    one, two = team.clone("one"), team.clone("two")
    team.pipeline(one).run()
    team.pipeline(two, "train.epochs=1").run()
    run_versions.record(team.pipeline(one), GitRemote(one))
    done = run_versions.record(team.pipeline(two, "train.epochs=1"), GitRemote(two))
    assert done.recorded.renamed == {"0001-model-1.0.0.0": "0002-model-1.0.1.0", FIRST["run"]: "0002-model-1.0.1.0-data-1.0.0.0"}
    assert done.recorded.versions["dataset"] == "0001-train-1.0.0.0"
    seen = checked_out(team.bare, team.folder / "seen")
    assert verify(seen) == []
    assert sorted(path.name for path in (seen / "runs").iterdir()) == [f"{FIRST['run']}.jsonl", "0002-model-1.0.1.0-data-1.0.0.0.jsonl"]


def test_artifacts_are_those_that_are_listed(team: Team, tmp_path: Path) -> None:
    checkout = team.clone("one")
    team.pipeline(checkout).run()
    listed = "publish.artifacts=[report, outputs, dataset, training_data, scores, weights]"
    files = run_versions.collect(team.pipeline(checkout, listed), tmp_path / "all")
    wanted = {"report.html", "outputs.jsonl", "formatted_dataset.csv", "training_data.jsonl", "scores.json", "fine_tuned_model.gguf"}
    assert wanted <= set(files)
    assert "summary.md" not in files
    with pytest.raises(OutputError, match="is there already"):
        run_versions.collect(team.pipeline(checkout), tmp_path / "all")


def test_rows_get_the_split_that_a_run_under_way_gave_them(team: Team) -> None:
    """Two pushes with the same new rows, of which either may be recorded first: both give them the same split, and the same again is
    the same version."""
    one, two = team.clone("one"), team.clone("two")
    team.push(one, rows=200)
    git(two, "pull", "--quiet")
    team.pipeline(one).run()
    run_versions.record(team.pipeline(one), GitRemote(one))
    table = (ROOT / "data" / "chief_complaints.csv").read_text(encoding="utf-8").splitlines(keepends=True)
    for checkout, rows in ((one, 150), (two, 220)):
        (checkout / "data" / "chief_complaints.csv").write_text("".join(table[:rows]), encoding="utf-8")
        run_versions.reserve(team.pipeline(checkout), GitRemote(checkout), hold=HOLD)
    for checkout in (two, one):  # whoever reserved last ends first
        team.pipeline(checkout).run()
        done = run_versions.record(team.pipeline(checkout), GitRemote(checkout))
        assert not [remark for remark in done.recorded.remarks if "another split" in remark]
    for rows in (150, 220):
        fresh = team.clone(f"fresh-{rows}")
        (fresh / "data" / "chief_complaints.csv").write_text("".join(table[:rows]), encoding="utf-8")
        assert not run_versions.reserve(team.pipeline(fresh), GitRemote(fresh), hold=HOLD).changed


def test_the_same_wish_is_not_tried_again_where_a_model_set_was_made_instead(team: Team) -> None:
    checkout = team.clone("one")
    commit_held = run_versions.reserve(team.pipeline(checkout), GitRemote(checkout), hold=HOLD)
    team.job.trainer.why_not = "an architecture of its own"
    team.pipeline(checkout).run()
    done = run_versions.record(team.pipeline(checkout), GitRemote(checkout))
    record = yaml.safe_load((checkout / "metadata" / "versions" / "model-0001.yaml").read_text(encoding="utf-8"))
    assert (record["asked"], done.recorded.failed) == (commit_held.allocations["model"].key, ())
    fresh = team.clone("fresh")
    again = run_versions.reserve(team.pipeline(fresh), GitRemote(fresh), hold=HOLD)
    assert (again.changed, {kind: r.name for kind, r in again.allocations.items()}) == (False, dict(done.recorded.versions))
    changed = run_versions.reserve(team.pipeline(fresh, "train.epochs=2"), GitRemote(fresh), hold=HOLD)
    assert changed.changed, "another recipe is another wish"


def test_a_dry_run_leaves_what_is_held(team: Team) -> None:
    checkout = team.clone("one")
    run_versions.reserve(team.pipeline(checkout), GitRemote(checkout), hold=HOLD)
    before = (checkout / "outputs" / "reservation.json").read_bytes()
    would = run_versions.reserve(team.pipeline(checkout, "train.epochs=2"), GitRemote(checkout), hold=HOLD, dry_run=True)
    assert (would.changed, would.dry_run) == (True, True)
    assert (checkout / "outputs" / "reservation.json").read_bytes() == before
    assert team.pipeline(checkout).run().versions == FIRST


def test_a_reservation_does_not_let_another_branch_record(team: Team) -> None:
    checkout = team.clone("one")
    run_versions.reserve(team.pipeline(checkout), GitRemote(checkout), hold=HOLD)
    git(checkout, "switch", "--quiet", "-c", "feature")
    assert "provisional" in next(o.summary for o in team.pipeline(checkout).run().stages if o.stage == "version")
    with pytest.raises(UserError, match="only the default branch"):
        run_versions.record(team.pipeline(checkout), GitRemote(checkout))


def test_a_record_that_is_repeated_still_says_what_waits(team: Team) -> None:
    on = ("publish.enabled=true", "publish.namespace=org")
    checkout = team.clone("one")
    team.pipeline(checkout, *on).run()
    assert run_versions.record(team.pipeline(checkout, *on), GitRemote(checkout)).publish
    assert run_versions.record(team.pipeline(checkout, *on), GitRemote(checkout)).publish


def test_a_history_that_contradicts_itself_is_told_before_the_run(team: Team) -> None:
    checkout = team.clone("one")
    team.pipeline(checkout).run()
    run_versions.record(team.pipeline(checkout), GitRemote(checkout))
    card = checkout / "metadata" / "run_card.yaml"
    card.write_text(card.read_text(encoding="utf-8").replace("0001-model-1.0.0.0-data", "0007-model-1.0.0.0-data"), encoding="utf-8")
    git(checkout, "commit", "--quiet", "-am", "By hand")
    git(checkout, "push", "--quiet", "origin", "main")
    fresh = team.clone("fresh")
    with pytest.raises(ArtifactError, match="contradict") as error:
        run_versions.reserve(team.pipeline(fresh, "train.epochs=2"), GitRemote(fresh), hold=HOLD)
    assert "run_card.yaml" in str(error.value)
    assert "/tmp/" not in str(error.value)


@pytest.mark.parametrize("branch", ["main", "feature"])
def test_what_the_workflow_could_not_publish_is_said_before_the_run(team: Team, monkeypatch: pytest.MonkeyPatch, branch: str) -> None:
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    checkout = team.clone("one")
    git(checkout, "switch", "--quiet", "-C", branch)
    rows = ("publish.enabled=true", "publish.namespace=org", "publish.rows=true", "publish.artifacts=[outputs]")
    with pytest.raises(UserError, match=r"publish\.rows is on, and the workflow keeps no dataset"):
        run_versions.reserve(team.pipeline(checkout, *rows), GitRemote(checkout), hold=HOLD)


@pytest.mark.parametrize("branch", ["main", "feature"])
def test_a_public_repository_is_left_before_a_row_is_read(team: Team, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, branch: str) -> None:
    event = tmp_path / "event.json"
    event.write_text(json.dumps({"repository": {"private": False, "default_branch": "main"}}), encoding="utf-8")
    for name, value in {"GITHUB_ACTIONS": "true", "GITHUB_EVENT_PATH": str(event)}.items():
        monkeypatch.setenv(name, value)
    checkout = team.clone("one")
    git(checkout, "switch", "--quiet", "-C", branch)
    (checkout / "data" / "chief_complaints.csv").write_text("not even a table", encoding="utf-8")
    with pytest.raises(PrivacyError, match="public"):
        run_versions.reserve(team.pipeline(checkout, "dataset.shareable=false"), GitRemote(checkout), hold=HOLD)
    assert state_of(team.bare)["tags"] == []
