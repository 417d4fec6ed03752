"""Which versions go to the Hub, from which cards, and what the gate stops. The Hub itself is in test_hub.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from pipeline import run_versions
from pipeline.backends.git import GitRemote
from pipeline.config import parse_config
from pipeline.errors import BackendError, ConfigError, OutputError, PrivacyError, UserError
from pipeline.ports import Hub, Remote
from pipeline.publication import Publication, Published
from pipeline.publish import pending
from pipeline.run_publish import PublishResult, Wanted, publish_versions
from tests.test_run import Job, job  # noqa: F401  a fixture
from tests.test_run_versions import FIRST, Team, team  # noqa: F401  a fixture
from tests.version_runs import git

ON = ("publish.enabled=true", "publish.namespace=org")


class MemoryHub:
    """Keeps what it is given; fails from the n-th publication on, where told."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.trees: dict[tuple[str, str], dict[str, bytes]] = {}
        self.fails_at = fails_at

    def publish(self, publication: Publication, *, create: bool = False, replace: bool = False) -> Published:
        if self.fails_at is not None and len(self.trees) >= self.fails_at:
            raise BackendError("the Hub is away")
        assert create
        files = {path: content if isinstance(content, bytes) else content.read_bytes() for path, content in publication.files.items()}
        changed = self.trees.setdefault((publication.repo_id, publication.name), files) is files
        commit = f"{len(self.trees):040x}"
        return Published(publication.kind, publication.name, publication.repo_id, commit, f"https://hub/{publication.name}", changed)

    def read_back(self, kind: str, repo_id: str, name: str) -> Published | None:
        return None


def no_hub() -> Hub:
    raise AssertionError("nothing may be sent")


def no_remote() -> Remote:
    raise AssertionError("no remote is needed")


def publish(team: Team, checkout: Path, hub: MemoryHub | None, *settings: str, remote: bool = False, **wanted: object) -> PublishResult:  # noqa: F811
    pipeline = team.pipeline(checkout, *ON, *settings)
    return publish_versions(
        pipeline, Wanted(**wanted), hub=(lambda: hub) if hub else no_hub, remote=(lambda: GitRemote(checkout)) if remote else no_remote  # type: ignore[arg-type,return-value]
    )  # fmt: skip


@pytest.fixture
def recorded(team: Team) -> Path:  # noqa: F811
    checkout = team.clone("one")
    team.pipeline(checkout, *ON).run()
    assert run_versions.record(team.pipeline(checkout, *ON), GitRemote(checkout)).publish
    return checkout


def test_what_was_recorded_waits_and_is_published_once(team: Team, recorded: Path) -> None:  # noqa: F811
    assert [line.name for line in pending(recorded / "metadata")] == list(FIRST.values())
    hub = MemoryHub()
    done = publish(team, recorded, hub, pending=True)
    assert [version.name for version in done.published] == [FIRST["dataset"], FIRST["run"], FIRST["model"]]
    assert {repo for repo, _ in hub.trees} == {"org/chief-complaints-dataset", "org/chief-complaints-runs", "org/chief-complaints-model"}
    assert pending(recorded / "metadata") == []
    assert publish(team, recorded, None, pending=True) == PublishResult()
    # the journal is committed by a second record, which finds nothing else to say
    second = run_versions.record(team.pipeline(recorded, *ON), GitRemote(recorded))
    assert git(recorded, "show", "--name-only", "--format=", str(second.recorded.commit)).split() == ["metadata/publications.jsonl"]
    assert git(recorded, "log", "-1", "--format=%s").strip() == "Record what was published"
    assert not second.publish
    assert git(recorded, "status", "--short") == ""


def test_by_default_nothing_of_a_record_goes(team: Team, recorded: Path) -> None:  # noqa: F811
    hub = MemoryHub()
    publish(team, recorded, hub)
    names = {path for tree in hub.trees.values() for path in tree}
    assert not [name for name in names if name.startswith(("data/", "outputs/")) or name.endswith((".gguf", ".jsonl"))]
    table = (recorded / "data" / "chief_complaints.csv").read_text(encoding="utf-8").splitlines()
    long = [cell for line in table[1:20] for cell in line.split(",") if len(cell.split()) >= 8]
    assert long
    sent = b"".join(content for tree in hub.trees.values() for content in tree.values()).decode("utf-8", "ignore")
    assert not [cell for cell in long if cell in sent]


def test_the_model_names_the_commit_of_its_rows(team: Team, recorded: Path) -> None:  # noqa: F811
    hub = MemoryHub()
    done = publish(team, recorded, hub)
    page = hub.trees["org/chief-complaints-model", FIRST["model"]]["README.md"].decode()
    fields = yaml.safe_load(page.split("---")[1])
    result = fields["model-index"][0]["results"][0]
    assert result["dataset"]["revision"] == done.published[0].commit
    assert result["source"]["url"] == done.published[1].url


def test_a_dry_run_shows_everything_and_sends_nothing(team: Team, recorded: Path) -> None:  # noqa: F811
    pages = team.folder / "pages"
    done = publish(team, recorded, None, dry_run=True, to=pages)
    assert {f"{preview.repo_id}/{file.path}" for preview in done.previews for file in preview.files} == {
        path.relative_to(pages).as_posix() for path in pages.rglob("*") if path.is_file()
    }
    with pytest.raises(OutputError, match="is there already"):
        publish(team, recorded, None, dry_run=True, to=pages)
    assert [preview.name for preview in done.previews] == [FIRST["dataset"], FIRST["run"], FIRST["model"]]
    model = done.previews[2]
    assert {"README.md", "model_card.yaml"} <= {file.path for file in model.files}
    assert next(file.fields for file in model.files if file.path == "README.md")["license"]  # type: ignore[index]
    assert len(pending(recorded / "metadata")) == 3


def test_after_a_failure_the_rest_is_published(team: Team, recorded: Path) -> None:  # noqa: F811
    hub = MemoryHub(fails_at=1)
    with pytest.raises(BackendError):
        publish(team, recorded, hub, pending=True)
    assert [line.name for line in pending(recorded / "metadata")] == [FIRST["model"], FIRST["run"]]
    hub.fails_at = None
    done = publish(team, recorded, hub, pending=True)
    assert [version.name for version in done.published] == [FIRST["run"], FIRST["model"]]
    page = hub.trees["org/chief-complaints-model", FIRST["model"]]["README.md"].decode()
    assert "0" * 39 + "1" in page, "the dataset's commit is known from the journal"


def test_an_older_version_is_published_from_the_commit_of_its_tag(team: Team, recorded: Path) -> None:  # noqa: F811
    team.pipeline(recorded, *ON, "train.epochs=2").run()
    run_versions.record(team.pipeline(recorded, *ON, "train.epochs=2"), GitRemote(recorded))
    assert yaml.safe_load((recorded / "metadata" / "model_card.yaml").read_text("utf-8"))["pipeline"]["id"] == "0002"
    hub = MemoryHub()
    fresh = team.clone("fresh")
    publish(
        team,
        fresh,
        hub,
        "train.epochs=2",
        "publish.weights=true",
        "publish.artifacts=[weights]",
        remote=True,
        names=(FIRST["model"], "0001-test-1.0.0.0"),
    )
    assert set(hub.trees) == {("org/chief-complaints-dataset", FIRST["dataset"]), ("org/chief-complaints-model", FIRST["model"])}
    card = yaml.safe_load(hub.trees["org/chief-complaints-model", FIRST["model"]]["model_card.yaml"])
    assert card["pipeline"]["hyperparameters"]["train"]["epochs"] == 3
    with pytest.raises(UserError, match="no such version"):
        publish(team, fresh, hub, remote=True, names=("0009-model-1.0.0.0",))
    with pytest.raises(UserError, match="not a version name"):
        publish(team, fresh, hub, names=("latest",))


def test_the_gate_names_the_place_and_a_review_lets_it_pass(team: Team, recorded: Path) -> None:  # noqa: F811
    card = recorded / "metadata" / "dataset_card.yaml"
    told = yaml.safe_load(card.read_text(encoding="utf-8"))
    told["pipeline"]["source"]["source"] = "complaints, ask jane.roe@hospital.example or 555-867-5309"
    card.write_text(yaml.safe_dump(told), encoding="utf-8")
    with pytest.raises(PrivacyError) as stopped:
        publish(team, recorded, None)
    assert "org/chief-complaints-dataset/dataset_card.yaml, line" in str(stopped.value)
    assert "jane.roe@hospital.example" not in str(stopped.value)
    code = stopped.value.hint.split()[-1]
    with pytest.raises(PrivacyError, match="other findings"):
        publish(team, recorded, None, reviewed="0" * len(code))
    assert len(publish(team, recorded, MemoryHub(), reviewed=code).published) == 3


def test_a_record_in_a_card_is_found_also_where_only_the_table_is_here(team: Team, recorded: Path) -> None:  # noqa: F811
    fresh = team.clone("fresh")
    table = (fresh / "data" / "chief_complaints.csv").read_text(encoding="utf-8").splitlines()
    text = next(cell for line in table[1:] for cell in line.split(",") if len(cell.split()) >= 9)
    card = fresh / "metadata" / "run_card.yaml"
    told = yaml.safe_load(card.read_text(encoding="utf-8"))
    told["pipeline"]["notes"].append(f"such as: {text.upper()}")
    card.write_text(yaml.safe_dump(told), encoding="utf-8")
    with pytest.raises(PrivacyError, match="record text"):
        publish(team, fresh, None)


def test_no_namespace_no_publication(team: Team, recorded: Path) -> None:  # noqa: F811
    with pytest.raises(UserError, match=r"publish\.namespace"):
        publish(team, recorded, None, "publish.namespace=null")


def test_rows_and_weights_go_when_told(team: Team, recorded: Path) -> None:  # noqa: F811
    hub = MemoryHub()
    publish(team, recorded, hub, rows=True)
    rows = {"data/train.parquet", "data/validation.parquet", "data/test.parquet"}
    assert rows <= set(hub.trees["org/chief-complaints-dataset", FIRST["dataset"]])
    assert "outputs/base.parquet" in hub.trees["org/chief-complaints-runs", FIRST["run"]]
    (recorded / "outputs" / "formatted_dataset.csv").unlink()
    with pytest.raises(UserError, match=r"formatted_dataset\.csv"):
        publish(team, recorded, MemoryHub(), rows=True)


@pytest.mark.parametrize(
    ("told", "about"),
    [
        ({"publish": {"enabled": True}}, "publish.namespace: needed"),
        ({"publish": {"enabled": True, "namespace": "my org"}}, "publish.namespace: 'my org' can't be part"),
        ({"project": "a--b", "publish": {"enabled": True, "namespace": "org"}}, "project: 'a--b' can't be part"),
        ({"publish": {"artifacts": ["everything"]}}, "publish.artifacts"),
    ],
)
def test_what_the_hub_would_refuse_is_said_before_the_run(told: dict[str, dict[str, object]], about: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_config(told)
    assert about in str(error.value)
    parse_config({**told, "publish": {**told["publish"], "enabled": False, "artifacts": []}})


def test_what_stops_one_version_does_not_stop_later_ones(team: Team, recorded: Path) -> None:  # noqa: F811
    card = recorded / "metadata" / "dataset_card.yaml"
    told = yaml.safe_load(card.read_text(encoding="utf-8"))
    told["pipeline"]["source"]["source"] = "ask jane.roe@hospital.example"
    card.write_text(yaml.safe_dump(told), encoding="utf-8")
    git(recorded, "commit", "--quiet", "-am", "A card by hand")
    git(recorded, "tag", "--force", "0001-train-1.0.0.0", "HEAD")
    git(recorded, "push", "--quiet", "--force", "origin", "main", "0001-train-1.0.0.0")
    later = (*ON, "dataset.source=another", "train.epochs=2")
    team.pipeline(recorded, *later).run()
    run_versions.record(team.pipeline(recorded, *later), GitRemote(recorded))
    hub = MemoryHub()
    with pytest.raises(PrivacyError, match="3 versions were published, these were not") as stopped:
        publish(team, recorded, hub, *later[2:], remote=True, pending=True)
    assert "jane.roe@" not in str(stopped.value)
    assert {name for _, name in hub.trees} == {"0002-train-2.0.0.0", "0002-model-1.0.1.0", "0002-model-1.0.1.0-data-2.0.0.0"}


def test_a_pending_version_whose_tag_is_gone_does_not_stop_the_others(team: Team, recorded: Path) -> None:  # noqa: F811
    later = (*ON, "train.epochs=2")
    team.pipeline(recorded, *later).run()
    run_versions.record(team.pipeline(recorded, *later), GitRemote(recorded))
    git(recorded, "push", "--quiet", "origin", f":refs/tags/{FIRST['model']}")
    hub = MemoryHub()
    with pytest.raises(UserError, match=f"{FIRST['model']}: no such version"):
        publish(team, recorded, hub, *later[2:], remote=True, pending=True)
    assert {"0002-model-1.0.1.0", FIRST["run"], FIRST["dataset"]} <= {name for _, name in hub.trees}


def test_rows_that_only_the_configuration_asks_for_and_that_are_gone_are_left_out(team: Team, recorded: Path) -> None:  # noqa: F811
    (recorded / "outputs" / "outputs.jsonl").unlink()
    hub = MemoryHub()
    done = publish(team, recorded, hub, "publish.rows=true", pending=True)
    assert [remark for remark in done.remarks if "goes without rows and weights" in remark]
    assert "outputs/base.parquet" not in hub.trees["org/chief-complaints-runs", FIRST["run"]]
    assert "data/train.parquet" in hub.trees["org/chief-complaints-dataset", FIRST["dataset"]]


def test_without_the_records_a_person_has_to_look(team: Team, recorded: Path) -> None:  # noqa: F811
    for path in (recorded / "outputs" / "formatted_dataset.csv", recorded / "data" / "chief_complaints.csv"):
        path.unlink()
    with pytest.raises(PrivacyError, match="not compared with the records") as stopped:
        publish(team, recorded, None)
    assert len(publish(team, recorded, MemoryHub(), reviewed=stopped.value.hint.split()[-1]).published) == 3


def test_the_teams_own_address_may_go(team: Team, recorded: Path) -> None:  # noqa: F811
    card = recorded / "metadata" / "dataset_card.yaml"
    told = yaml.safe_load(card.read_text(encoding="utf-8"))
    told["pipeline"]["source"]["source"] = "complaints, ask data@team.example"
    card.write_text(yaml.safe_dump(told), encoding="utf-8")
    with pytest.raises(PrivacyError):
        publish(team, recorded, None)
    assert publish(team, recorded, MemoryHub(), "publish.allowed=data@team.example").published


def test_a_dry_run_leaves_the_files_also_where_the_gate_closes(team: Team, recorded: Path) -> None:  # noqa: F811
    card = recorded / "metadata" / "run_card.yaml"
    told = yaml.safe_load(card.read_text(encoding="utf-8"))
    told["pipeline"]["notes"].append("ask jane.roe@hospital.example")
    card.write_text(yaml.safe_dump(told), encoding="utf-8")
    with pytest.raises(PrivacyError):
        publish(team, recorded, None, dry_run=True, to=team.folder / "pages")
    assert "jane.roe@" in (team.folder / "pages" / "org" / "chief-complaints-runs" / "run_card.yaml").read_text(encoding="utf-8")


def test_what_is_published_is_sent_again_only_when_told(team: Team, recorded: Path) -> None:  # noqa: F811
    publish(team, recorded, MemoryHub())
    hub = MemoryHub()
    publish(team, recorded, hub)
    assert not hub.trees
    publish(team, recorded, hub, replace=True)
    assert len(hub.trees) == 3
