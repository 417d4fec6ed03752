"""A version comes to the Hub whole, once, with its tag, whatever the Hub or the network does; and no token is ever told.

The real huggingface_hub speaks with the double, in a process of its own: it reads HF_ENDPOINT when it is imported.
"""

from __future__ import annotations

import copy
import json
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.publication import is_owned, url_of
from tests.hub_double import (
    ID_TOKEN_REQUEST,
    TOKEN,
    Fault,
    HubDouble,
    HubProcess,
    after,
    drops,
    hangs,
    id_token,
    invalid,
    meanwhile,
    page,
    rate_limited,
    says,
)  # fmt: skip

NAME, NEWER, REPO = "0001-model-1.0.0.0", "0002-model-1.0.1.0", "ns/p-model"
SIDE = f"publishing-{NAME}"
CARD = "---\nlicense: mit\ntags: [one]\n---\n# A model\n"
WEIGHTS = "\0" * 9000
FILES = {"README.md": CARD, "model_card.yaml": "a: 1\n", "metrics/scores.json": "{}", "adapter.gguf": WEIGHTS}
CLAIMS = {"repository": "me/code", "branch": "main", "workflow": "publish.yml"}
GITHUB = {
    "GITHUB_ACTIONS": "true", "GITHUB_REPOSITORY": "me/code", "GITHUB_REF_NAME": "main",
    "GITHUB_WORKFLOW_REF": "me/code/.github/workflows/publish.yml@refs/heads/main", "ACTIONS_ID_TOKEN_REQUEST_TOKEN": ID_TOKEN_REQUEST,
}  # fmt: skip


@pytest.fixture(scope="module")
def server() -> Iterator[HubDouble]:
    with HubDouble(tokens={TOKEN: None}) as double:
        yield double


@pytest.fixture(scope="module")
def client(server: HubDouble, tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubProcess]:
    with HubProcess(server, tmp_path_factory.mktemp("hub-home")) as process:
        yield process


@pytest.fixture
def hub(server: HubDouble) -> HubDouble:
    server.reset()
    server.create(REPO)
    return server


@pytest.fixture
def publish(client: HubProcess, hub: HubDouble) -> Callable[..., dict[str, Any]]:
    def call(**asked: Any) -> dict[str, Any]:
        given = {"kind": "model", "name": NAME, "repo_id": REPO, "files": FILES} | asked
        return no_secret(client.do("publish", **given))

    return call


def no_secret(answer: dict[str, Any]) -> dict[str, Any]:
    """Whatever happens, no token is in any message, log, traceback or hint."""
    whole = json.dumps(answer)
    assert "Distinctive" not in whole
    assert "hf_jwt_" not in whole
    assert id_token(CLAIMS) not in whole
    return answer


def done(answer: dict[str, Any]) -> dict[str, Any]:
    assert "error" not in answer, answer["error"]["trace"]
    return dict(answer["result"])


def failed(answer: dict[str, Any], kind: str = "BackendError") -> dict[str, Any]:
    assert "error" in answer, answer["result"]
    error = dict(answer["error"])
    assert error["type"] == kind, error["trace"]
    assert error["hint"]
    return error


def published_once(hub: HubDouble, commits: int = 2) -> None:
    """The repository holds the version in one commit, with its tag there."""
    repository = hub.repository(REPO)
    assert [commit.title for commit in repository.commits][1:] == [NAME] * (commits - 1)
    assert repository.tags == {NAME: repository.head.id}
    assert repository.files == {path: text.encode() for path, text in FILES.items()} | {".gitattributes": b"*.gguf filter=lfs\n"}


# --- the way it should go --------------------------------------------------------------------------------------------


def test_a_version_is_one_commit_and_a_tag(hub: HubDouble, publish: Callable[..., dict[str, Any]], client: HubProcess) -> None:
    answer = publish()
    head = hub.repository(REPO).head
    assert done(answer) == {
        "kind": "model", "name": NAME, "repo_id": REPO, "commit": head.id, "url": f"{hub.address}/{REPO}/tree/{NAME}", "changed": True,
    }  # fmt: skip
    assert answer["slept"] == []
    published_once(hub)
    assert head.files["adapter.gguf"].lfs
    assert not head.files["README.md"].lfs
    assert hub.operations().count("commit") == 1
    assert all(request.authorized for request in hub.requests if request.operation != "lfs-put")  # its address is signed
    assert done(client.do("read_back", kind="model", repo_id=REPO, name=NAME)) == {**answer["result"], "changed": False}


def test_the_same_again_changes_nothing(hub: HubDouble, publish: Callable[..., dict[str, Any]]) -> None:
    publish()
    hub.requests.clear()
    assert done(publish())["changed"] is False
    assert hub.operations() == ["info", "refs", "tree"]
    published_once(hub)


def test_files_on_disk_are_sent_as_they_are(hub: HubDouble, publish: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    (tmp_path / "big").write_bytes(bytes(range(256)) * 40)
    (tmp_path / "empty").write_bytes(b"")
    files = {"README.md": {"file": str(tmp_path / "big")}, "fine_tuned_model.gguf": {"file": str(tmp_path / "big")}}
    assert "can't be read" in failed(publish(files={"adapter.gguf": {"file": str(tmp_path / "none")}}), "ArtifactError")["text"]
    del files["README.md"]
    files["data/test.parquet"] = files["params"] = {"file": str(tmp_path / "empty")}
    done(publish(files=files))
    assert hub.repository(REPO).files["fine_tuned_model.gguf"] == bytes(range(256)) * 40
    assert hub.repository(REPO).files["params"] == b""
    assert done(publish(files=files))["changed"] is False


def test_a_version_deletes_its_own_files_only(hub: HubDouble, publish: Callable[..., dict[str, Any]]) -> None:
    theirs = {"notes.md": b"kept", "docs/figure.png": b"kept", "data/raw.csv": b"kept", ".gitattributes": b"theirs"}
    ours = {"plots/old.svg": b"<svg/>", "plots/deep/old.svg": b"<svg/>", "data/old.parquet": b"PAR1", "params": b"{}", "README.md": b"old"}
    hub.repository(REPO).push(theirs | ours)
    hub.page_size = 3  # the listing comes in pages
    done(publish())
    assert hub.repository(REPO).files == theirs | {path: text.encode() for path, text in FILES.items()}
    assert hub.operations().count("commit") == 1
    assert done(publish())["changed"] is False
    assert not [path for path in theirs if is_owned(path)]


def test_a_newer_version_follows_and_the_older_tag_stays(hub: HubDouble, publish: Callable[..., dict[str, Any]]) -> None:
    first = done(publish())["commit"]
    second = done(publish(name="0002-model-1.0.1.0", files={"README.md": CARD + "newer"}))["commit"]
    repository = hub.repository(REPO)
    assert repository.tags == {NAME: first, "0002-model-1.0.1.0": second}
    assert set(repository.files) == {".gitattributes", "README.md"}
    assert done(publish())["commit"] == first  # the older one again: its tag tells that it is there
    assert repository.head.id == second


def test_equal_content_needs_a_tag_only(hub: HubDouble, publish: Callable[..., dict[str, Any]]) -> None:
    first = done(publish())
    again = done(publish(name="0002-model-1.0.0.0"))
    assert (again["commit"], again["changed"]) == (first["commit"], True)
    assert hub.operations().count("commit") == 1


def test_a_tag_with_other_content_is_never_moved(hub: HubDouble, publish: Callable[..., dict[str, Any]]) -> None:
    commit = done(publish())["commit"]
    for files in ({**FILES, "README.md": CARD + "changed"}, {"README.md": CARD}, {**FILES, "params": "{}"}):
        error = failed(publish(files=files))
        assert NAME in error["text"]
        assert "other content" in error["text"]
        assert "new version" in error["hint"]
        assert "--replace" in error["hint"]
    assert hub.repository(REPO).tags == {NAME: commit}
    assert len(hub.repository(REPO).commits) == 2


def test_a_dataset_goes_to_a_dataset_repository(hub: HubDouble, publish: Callable[..., dict[str, Any]], client: HubProcess) -> None:
    given = {
        "kind": "dataset",
        "name": "0001-train-1.0.0.0",
        "repo_id": "ns/p-dataset",
        "files": {"README.md": CARD, "data/a.parquet": "PAR1"},
    }
    answer = publish(**given, create=True, private=False)
    assert done(answer)["url"] == url_of("dataset", "ns/p-dataset", "0001-train-1.0.0.0", hub.address)
    assert not hub.repository("ns/p-dataset", "dataset").private
    assert set(hub.repositories) == {REPO, "datasets/ns/p-dataset"}
    assert done(publish(**given, private=False))["changed"] is False


def test_nothing_to_read_back(client: HubProcess, hub: HubDouble) -> None:
    for repo_id in (REPO, "ns/none"):
        assert client.do("read_back", kind="model", repo_id=repo_id, name=NAME)["result"] is None


def test_a_card_reads_back(hub: HubDouble, publish: Callable[..., dict[str, Any]], client: HubProcess) -> None:
    """With the classes that people load cards with."""
    done(publish())
    loaded = no_secret(client.do("load_card", card="ModelCard", repo_id=REPO))["result"]
    assert (loaded["data"]["license"], loaded["data"]["tags"], loaded["text"]) == ("mit", ["one"], "# A model\n")
    data = {"README.md": "---\nlicense: cc0-1.0\npretty_name: '0899'\n---\nRows\n"}
    done(publish(kind="dataset", name="0001-train-1.0.0.0", repo_id="ns/p-dataset", files=data, create=True))
    loaded = no_secret(client.do("load_card", card="DatasetCard", repo_id="ns/p-dataset"))["result"]
    assert loaded["data"] == {"license": "cc0-1.0", "pretty_name": "0899"}


# --- repositories ----------------------------------------------------------------------------------------------------


def test_a_missing_repository_is_made_only_when_allowed(hub: HubDouble, publish: Callable[..., dict[str, Any]]) -> None:
    del hub.repositories[REPO]
    error = failed(publish())
    assert "no such repository" in error["text"]
    assert "create it on the Hub" in error["hint"]
    assert not hub.repositories
    assert "create" not in hub.operations()
    done(publish(create=True))
    published_once(hub)
    assert hub.repository(REPO).private


def test_a_repository_made_by_another_meanwhile(hub: HubDouble, publish: Callable[..., dict[str, Any]]) -> None:
    del hub.repositories[REPO]
    hub.fail("create", meanwhile(lambda: hub.create(REPO)))
    done(publish(create=True))
    published_once(hub)


def test_a_private_publication_never_goes_to_a_public_repository(hub: HubDouble, publish: Callable[..., dict[str, Any]]) -> None:
    hub.repository(REPO).private = False
    error = failed(publish(), "PrivacyError")
    assert error["exit"] == 5
    assert not set(hub.operations()) - {"info"}
    done(publish(private=False))


def test_a_gitignore_of_the_repository_is_found_out(hub: HubDouble, publish: Callable[..., dict[str, Any]]) -> None:
    """The client leaves out what the Hub says is ignored, and says nothing."""
    hub.ignored = {"metrics/scores.json"}
    error = failed(publish())
    assert "metrics/scores.json" in error["text"]
    assert ".gitignore" in error["hint"]
    assert not hub.repository(REPO).tags


@pytest.mark.parametrize("repo_id", ["ns/a--b", "ns/p..q", "ns/-p"])
def test_a_name_that_the_hub_does_not_allow(publish: Callable[..., dict[str, Any]], repo_id: str) -> None:
    assert "publish.namespace" in failed(publish(repo_id=repo_id), "UserError")["hint"]


# --- what is final ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", ["info", "refs", "commits", "preupload", "commit", "tag", "lfs-batch", "lfs-verify"])
@pytest.mark.parametrize("status", [401, 403])
def test_a_token_that_is_not_accepted_is_tried_once(hub: HubDouble, publish: Callable[..., dict[str, Any]], status: int, at: str) -> None:
    hub.fail(at, says(status, f"Invalid token {TOKEN}"), times=None)
    answer = publish()
    error = failed(answer)
    assert f"HTTP {status}" in error["text"]
    assert "HF_TOKEN" in error["hint"]
    assert f"write access to {REPO}" in error["hint"]
    assert hub.operations().count(at) == 1
    assert answer["slept"] == []


def test_a_token_of_nobody(hub: HubDouble, publish: Callable[..., dict[str, Any]]) -> None:
    error = failed(publish(env={"HF_TOKEN": "hf_NobodyDistinctive"}))
    assert "Invalid credentials" in error["text"]
    assert hub.operations() == ["info"]


def test_the_hub_finds_a_fault_in_the_card(hub: HubDouble, publish: Callable[..., dict[str, Any]]) -> None:
    hub.fail("validate-yaml", invalid('"license" must be one of [apache-2.0, …]', "another"))
    error = failed(publish())
    assert '"license" must be one of [apache-2.0, …]; another' in error["text"]
    assert hub.operations().count("validate-yaml") == 1
    assert "datasets" in failed(publish(files={**FILES, "README.md": "---\ndatasets: [null]\n---\n"}))["text"]
    assert len(hub.repository(REPO).commits) == 1
    assert not hub.objects


@pytest.mark.parametrize(("status", "word"), [(400, "finds a fault"), (402, "refused"), (404, "no such repository"), (413, "refused")])
def test_what_the_hub_refuses_is_not_asked_again(hub: HubDouble, publish: Callable[..., dict[str, Any]], status: int, word: str) -> None:
    hub.fail("commit", says(status, "because of this"), times=None)
    answer = publish()
    error = failed(answer)
    assert word in error["text"]
    assert "because of this" in error["text"]
    assert hub.operations().count("commit") == 1
    assert answer["slept"] == []


# --- what passes -----------------------------------------------------------------------------------------------------

READS = ["info", "refs", "commits", "tree", "validate-yaml"]
WRITES = ["preupload", "lfs-batch", "lfs-put", "lfs-verify", "commit", "tag"]
UNDONE = {"500": says(500), "503": says(503), "dropped": drops, "page": page(), "page 502": page(502)}
DONE = {"500 after it was done": after(says(500)), "dropped after it was done": after(drops)}


@pytest.mark.parametrize(
    ("at", "fault"), [(at, fault) for at in READS for fault in UNDONE] + [(at, fault) for at in WRITES for fault in [*UNDONE, *DONE]]
)
def test_once_is_survived(hub: HubDouble, publish: Callable[..., dict[str, Any]], at: str, fault: str) -> None:
    hub.fail(at, (UNDONE | DONE)[fault])
    answer = publish()
    assert done(answer)["changed"] is True
    assert len(answer["slept"]) == 1
    published_once(hub)


@pytest.mark.parametrize("fault", [says(412), says(409), says(408)], ids=["412", "409", "408"])
def test_a_commit_is_tried_again_with_the_head_read_anew(hub: HubDouble, publish: Callable[..., dict[str, Any]], fault: Fault) -> None:
    hub.fail("commit", fault)
    answer = publish()
    done(answer)
    assert len(answer["slept"]) == 1
    assert hub.operations().count("commits") == 2
    published_once(hub)


def test_somebody_else_commits_meanwhile(hub: HubDouble, publish: Callable[..., dict[str, Any]]) -> None:
    hub.fail("commit", meanwhile(lambda: hub.repository(REPO).push({"notes.md": b"theirs", "params": b"theirs"})))
    done(publish())
    repository = hub.repository(REPO)
    assert [commit.title for commit in repository.commits] == ["initial commit", "somebody's edit", NAME]
    assert repository.files["notes.md"] == b"theirs"
    assert "params" not in repository.files


def test_somebody_else_commits_before_the_tag_is_set(hub: HubDouble, publish: Callable[..., dict[str, Any]]) -> None:
    """The version's commit is found again though it is the head no more."""
    hub.fail("tag", says(500))
    hub.fail("tree", lambda handler, work: work(), times=2)  # before and after the commit
    hub.fail("tree", says(500))
    hub.fail("info", lambda handler, work: work())
    hub.fail("info", meanwhile(lambda: hub.repository(REPO).push({"README.md": b"edited"})))
    done(publish())
    repository = hub.repository(REPO)
    assert [commit.title for commit in repository.commits] == ["initial commit", NAME, "somebody's edit"]
    assert repository.tags == {NAME: repository.commits[1].id}


def test_a_head_that_moves_for_ever(hub: HubDouble, publish: Callable[..., dict[str, Any]]) -> None:
    hub.only_pull_requests()
    answer = publish()
    error = failed(answer)
    assert "HTTP 412" in error["text"]
    assert "pull requests only" in error["hint"]
    assert hub.operations().count("commit") == 5
    assert len(answer["slept"]) == 4
    for slept, wait in zip(answer["slept"], (0.1, 0.2, 0.4, 0.8), strict=True):
        assert 0.5 * wait <= slept <= 1.5 * wait
    assert len(hub.repository(REPO).commits) == 1


def test_waits_differ(hub: HubDouble, publish: Callable[..., dict[str, Any]]) -> None:
    """So that two who met once don't meet again and again."""
    hub.only_pull_requests()
    assert publish()["slept"] != publish()["slept"]


@pytest.mark.parametrize(
    ("fault", "word"), [(says(500), "HTTP 500"), (drops, "no answer"), (page(), "not the Hub"), (says(409), "HTTP 409")]
)
def test_for_ever_ends(hub: HubDouble, publish: Callable[..., dict[str, Any]], fault: Fault, word: str) -> None:
    hub.fail("commit", fault, times=None)
    answer = publish()
    assert word in failed(answer)["text"]
    assert len(answer["slept"]) == 4
    assert not hub.repository(REPO).tags


@pytest.mark.parametrize("fault", [says(500), drops])
def test_a_commit_that_lands_each_time_and_says_it_did_not(hub: HubDouble, publish: Callable[..., dict[str, Any]], fault: Fault) -> None:
    hub.fail("commit", after(fault), times=None)
    assert done(publish())["changed"] is True
    assert hub.operations().count("commit") == 1
    published_once(hub)


def test_a_silent_hub(hub: HubDouble, publish: Callable[..., dict[str, Any]]) -> None:
    hub.fail("info", hangs(2.5))  # huggingface_hub itself would wait for ever
    answer = publish()
    done(answer)
    assert "took too long" in answer["said"]
    hub.fail("commit", after(hangs(2.5)))
    done(publish(name="0002-model-1.0.1.0", files={"README.md": "other"}))
    assert hub.operations().count("commit") == 2


def test_nobody_there(client: HubProcess, publish: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    with HubDouble() as gone:
        pass
    with HubProcess(gone, tmp_path) as lonely:
        error = failed(no_secret(lonely.do("publish", kind="model", name=NAME, repo_id=REPO, files=FILES)))
    assert f"no answer from {gone.address}" in error["text"]
    assert "HF_ENDPOINT" in error["hint"]


# --- an older version ------------------------------------------------------------------------------------------------

NEWER_FILES = {"README.md": CARD + "newer", "fine_tuned_model.gguf": "\0" * 8000}
GITATTRIBUTES = {".gitattributes": b"*.gguf filter=lfs\n"}


def as_bytes(files: dict[str, str]) -> dict[str, bytes]:
    return {path: text.encode() for path, text in files.items()} | GITATTRIBUTES


@pytest.fixture
def newer(hub: HubDouble, publish: Callable[..., dict[str, Any]]) -> str:
    """The commit of a newer version that is there."""
    commit = str(done(publish(name=NEWER, files=NEWER_FILES))["commit"])
    hub.requests.clear()
    return commit


def published_aside(hub: HubDouble, newer: str, files: dict[str, str] = FILES) -> None:
    """The older version is under its tag, main has the newer one, and no branch is left."""
    repository = hub.repository(REPO)
    assert repository.head.id == newer
    assert repository.files == as_bytes(NEWER_FILES)
    assert set(repository.tags) == {NAME, NEWER}
    assert repository.tags[NEWER] == newer
    assert repository.tagged(NAME) == as_bytes(files)
    assert repository.branches == {}


def test_an_older_version_leaves_main_alone(hub: HubDouble, publish: Callable[..., dict[str, Any]], newer: str, client: HubProcess) -> None:
    answer = done(publish())
    published_aside(hub, newer)
    assert (answer["changed"], answer["commit"]) == (True, hub.repository(REPO).tags[NAME])
    writes = [operation for operation in hub.operations() if operation in ("branch", "commit", "tag", "delete-branch", "delete-tag")]
    assert writes == ["branch", "commit", "tag", "delete-branch"]
    assert [commit.id for commit in hub.repository(REPO).lines[answer["commit"]]][-2] == newer  # made from main's head
    hub.requests.clear()
    assert done(publish()) == answer | {"changed": False}
    assert hub.operations() == ["info", "refs", "tree"]
    assert done(client.do("read_back", kind="model", repo_id=REPO, name=NAME))["commit"] == answer["commit"]


def test_an_older_version_keeps_what_others_put_there(hub: HubDouble, publish: Callable[..., dict[str, Any]]) -> None:
    done(publish(name=NEWER, files=NEWER_FILES))
    hub.repository(REPO).push({"notes.md": b"theirs"})
    done(publish())
    assert hub.repository(REPO).tagged(NAME) == as_bytes(FILES) | {"notes.md": b"theirs"}
    assert hub.repository(REPO).files == as_bytes(NEWER_FILES) | {"notes.md": b"theirs"}


def test_a_newer_version_whose_tag_is_not_set_yet_counts(hub: HubDouble, publish: Callable[..., dict[str, Any]], newer: str) -> None:
    tags = hub.repository(REPO).tags
    del tags[NEWER]
    done(publish())
    assert hub.repository(REPO).head.id == newer
    assert done(publish(name=NEWER, files=NEWER_FILES))["commit"] == newer
    published_aside(hub, newer)


@pytest.mark.parametrize("tag", ["9999-release", "v2", "0000-model-1.0.0.0", "2024-01-01", "0001-model-1.0.9.0"])
def test_tags_that_are_no_newer_version_do_not_count(hub: HubDouble, publish: Callable[..., dict[str, Any]], tag: str) -> None:
    repository = hub.repository(REPO)
    repository.tags[tag] = repository.head.id
    done(publish())
    assert repository.head.id == repository.tags[NAME]
    assert "branch" not in hub.operations()


def test_an_older_version_that_equals_the_newer_one_needs_a_tag_only(
    hub: HubDouble, publish: Callable[..., dict[str, Any]], newer: str
) -> None:
    assert done(publish(files=NEWER_FILES))["commit"] == newer
    assert not {"branch", "commit"} & set(hub.operations())


def test_a_newer_version_comes_meanwhile(hub: HubDouble, publish: Callable[..., dict[str, Any]]) -> None:
    """After the look at the tags and before the commit."""

    def come() -> None:
        repository = hub.repository(REPO)
        repository.push({path: text.encode() for path, text in NEWER_FILES.items()}, NEWER)
        repository.tags[NEWER] = repository.head.id

    hub.fail("commit", meanwhile(come))
    done(publish())
    published_aside(hub, hub.repository(REPO).commits[1].id)


SIDE_WRITES = ["branch", "preupload", "lfs-put", "commit", "tag", "delete-branch"]


@pytest.mark.parametrize(
    ("at", "fault"),
    [(at, fault) for at in SIDE_WRITES for fault in [*UNDONE, *DONE]]
    + [("commit", "412"), ("commit", "409"), ("branch", "409"), ("tag", "409")],
)
def test_once_is_survived_beside_main(hub: HubDouble, publish: Callable[..., dict[str, Any]], newer: str, at: str, fault: str) -> None:
    hub.fail(at, (UNDONE | DONE | {"412": says(412), "409": says(409)})[fault])
    answer = publish()
    assert done(answer)["changed"] is True
    published_aside(hub, newer)
    assert len(hub.repository(REPO).lines) == 3  # never a second commit


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize("at", ["branch", "delete-branch"])
def test_a_token_that_may_not_branch(hub: HubDouble, publish: Callable[..., dict[str, Any]], newer: str, at: str, status: int) -> None:
    hub.fail(at, says(status), times=None)
    answer = publish()
    assert f"HTTP {status}" in failed(answer)["text"]
    assert answer["slept"] == []
    assert hub.repository(REPO).head.id == newer


def test_a_branch_that_moves_for_ever(hub: HubDouble, publish: Callable[..., dict[str, Any]], newer: str) -> None:
    hub.only_pull_requests()
    answer = publish()
    assert "HTTP 412" in failed(answer)["text"]
    assert len(answer["slept"]) == 4
    hub.no_faults()
    done(publish())
    published_aside(hub, newer)
    assert hub.operations().count("branch") == 1  # the one that was left


@pytest.mark.parametrize("left", ["empty", "behind", "other content", "whole", "tagged"])
def test_a_branch_that_was_left(hub: HubDouble, publish: Callable[..., dict[str, Any]], newer: str, left: str) -> None:
    repository = hub.repository(REPO)
    repository.branches[SIDE] = repository.commits[:-1] if left == "behind" else repository.commits
    if left == "other content":
        repository.push({"README.md": b"stale", "adapter.gguf": b"stale", "params": b"{}"}, NAME, SIDE)
    elif left in ("whole", "tagged"):
        gone: dict[str, bytes | None] = dict.fromkeys(set(NEWER_FILES) - set(FILES))
        repository.push(gone | {path: text.encode() for path, text in FILES.items()}, NAME, SIDE)
    if left == "tagged":
        repository.tags[NAME] = repository.branches[SIDE][-1].id
    assert done(publish())["changed"] is (left != "tagged")
    published_aside(hub, newer)
    assert "branch" not in hub.operations()
    assert hub.operations().count("commit") == (0 if left in ("whole", "tagged") else 1)


def test_branches_that_others_left_are_deleted_once_their_tags_keep_them(
    hub: HubDouble, publish: Callable[..., dict[str, Any]], newer: str
) -> None:
    repository = hub.repository(REPO)
    for name in ("0003-model-1.0.0.0", "0004-model-1.0.0.0", "0005-model-1.0.0.0"):
        repository.branches[f"publishing-{name}"] = repository.commits
        repository.push({"params": name.encode()}, name, f"publishing-{name}")
    repository.tags["0003-model-1.0.0.0"] = repository.branches["publishing-0003-model-1.0.0.0"][-1].id
    repository.tags["0004-model-1.0.0.0"] = newer  # on its way to be moved
    repository.branches["mine"] = repository.branches[NEWER] = repository.commits
    done(publish(name=NEWER, files=NEWER_FILES))
    assert set(repository.branches) == {"mine", NEWER, "publishing-0004-model-1.0.0.0", "publishing-0005-model-1.0.0.0"}


def test_another_publishes_the_same_older_version_meanwhile(hub: HubDouble, publish: Callable[..., dict[str, Any]], newer: str) -> None:
    """It is there, tagged and its branch deleted, when this one would commit."""
    repository = hub.repository(REPO)

    def finish() -> None:
        gone: dict[str, bytes | None] = dict.fromkeys(set(NEWER_FILES) - set(FILES))
        repository.tags[NAME] = repository.push(gone | {path: text.encode() for path, text in FILES.items()}, NAME, SIDE).id
        del repository.branches[SIDE]

    hub.fail("commit", meanwhile(finish))
    done(publish())
    published_aside(hub, newer)
    assert len(repository.lines) == 3


@pytest.mark.parametrize("at", ["delete-branch", "delete-tag"])
def test_another_deletes_meanwhile(hub: HubDouble, publish: Callable[..., dict[str, Any]], newer: str, at: str) -> None:
    """Whichever way the Hub says that there is nothing to delete."""
    repository = hub.repository(REPO)
    done(publish(files={"README.md": CARD}))
    hub.fail(at, meanwhile(lambda: repository.branches.clear() if at == "delete-branch" else repository.tags.pop(NAME)))
    done(publish(replace=True))
    published_aside(hub, newer)
    hub.fail(at, after(says(400, "Reference does not exist")))
    done(publish(replace=True, files={"README.md": CARD}))
    published_aside(hub, newer, {"README.md": CARD})
    hub.fail(at, says(400, "not now"))
    assert "not now" in failed(publish(replace=True))["text"]


def test_a_branch_that_is_shown_late(hub: HubDouble, publish: Callable[..., dict[str, Any]], newer: str) -> None:
    hub.fail("commit", meanwhile(lambda: hub.lag(refs=1)))
    hub.fail("commit", says(500))
    done(publish())
    published_aside(hub, newer)
    hub.fail("branch", after(drops))
    hub.fail("refs", lambda handler, work: work())
    hub.fail("refs", meanwhile(lambda: hub.lag(refs=1)))
    done(publish(name="0000-model-1.0.0.0"))
    assert hub.repository(REPO).branches == {}
    assert hub.operations().count("branch") == 3


# --- in the place of what is there -----------------------------------------------------------------------------------

MORE = {**FILES, "fine_tuned_model.gguf": "\0" * 7000}


def test_a_tag_is_moved_when_told(hub: HubDouble, publish: Callable[..., dict[str, Any]]) -> None:
    """The newest version: main has what the tag has."""
    first = done(publish())["commit"]
    hub.requests.clear()
    second = done(publish(files=MORE, replace=True))
    repository = hub.repository(REPO)
    assert second["changed"] is True
    assert [commit.id for commit in repository.commits[1:]] == [first, second["commit"]]
    assert repository.tags == {NAME: second["commit"]}
    assert repository.files == as_bytes(MORE)
    assert [operation for operation in hub.operations() if "tag" in operation] == ["delete-tag", "tag"]
    assert hub.operations()[-2:] == ["tag", "refs"]
    assert done(publish(files=MORE, replace=True)) == second | {"changed": False}
    third = done(publish(replace=True))["commit"]  # and back: not to the commit that is the head no more
    assert third not in (first, second["commit"])
    assert repository.head.id == repository.tags[NAME] == third
    assert repository.files == as_bytes(FILES)


def test_an_older_tag_is_moved_beside_main(hub: HubDouble, publish: Callable[..., dict[str, Any]]) -> None:
    first = done(publish())["commit"]
    newer = done(publish(name=NEWER, files=NEWER_FILES))["commit"]
    second = done(publish(files=MORE, replace=True))["commit"]
    published_aside(hub, newer, MORE)
    third = done(publish(files={"README.md": CARD}, replace=True))["commit"]
    published_aside(hub, newer, {"README.md": CARD})
    assert len({first, second, third}) == 3
    assert done(publish(replace=True))["commit"] == first  # main has it still
    published_aside(hub, newer)
    assert "other content" in failed(publish(files=MORE))["text"]


def test_to_replace_what_is_not_there_is_to_publish_it(hub: HubDouble, publish: Callable[..., dict[str, Any]]) -> None:
    assert done(publish(replace=True))["changed"] is True
    published_once(hub)
    assert done(publish(replace=True))["changed"] is False
    assert "delete-tag" not in hub.operations()


@pytest.mark.parametrize("older", [False, True], ids=["newest", "older"])
@pytest.mark.parametrize(
    ("at", "fault"), [(at, fault) for at in ("delete-tag", "tag") for fault in [*UNDONE, *DONE, "409"]] + [("commit", "412")]
)
def test_once_is_survived_while_a_tag_is_moved(
    hub: HubDouble, publish: Callable[..., dict[str, Any]], at: str, fault: str, older: bool
) -> None:
    done(publish())
    newer = done(publish(name=NEWER, files=NEWER_FILES))["commit"] if older else ""
    made = len(hub.repository(REPO).lines)
    hub.fail(at, (UNDONE | DONE | {"412": says(412), "409": says(409)})[fault])
    answer = publish(files=MORE, replace=True)
    assert done(answer)["changed"] is True
    assert len(answer["slept"]) == 1
    if older:
        published_aside(hub, newer, MORE)
    assert hub.repository(REPO).tagged(NAME) == as_bytes(MORE)
    assert len(hub.repository(REPO).lines) == made + 1


def test_a_moved_tag_that_is_shown_late(hub: HubDouble, publish: Callable[..., dict[str, Any]]) -> None:
    done(publish())
    before = hub.repository(REPO).refs

    def late() -> None:
        hub.repository(REPO).before = before

    hub.fail("refs", lambda handler, work: work())
    hub.fail("refs", meanwhile(late), times=2)
    hub.fail("tag", meanwhile(lambda: hub.lag(refs=2)))
    answer = publish(files=MORE, replace=True)
    assert done(answer)["commit"] == hub.repository(REPO).head.id
    assert answer["slept"] == [0.1, 0.2]


def test_two_replace_at_once(hub: HubDouble, publish: Callable[..., dict[str, Any]]) -> None:
    """The other one's tag is there when this one would set its own: the last one holds, and nobody is told what is not so."""
    repository = hub.repository(REPO)
    done(publish())

    def other() -> None:
        repository.tags[NAME] = repository.push({"README.md": b"theirs"}, NAME).id

    hub.fail("tag", meanwhile(other))
    answer = done(publish(files=MORE, replace=True))
    assert repository.tags == {NAME: answer["commit"]}
    assert repository.tagged(NAME) == as_bytes(MORE)


def test_a_move_that_was_cut_short_is_finished_without_being_told(hub: HubDouble, publish: Callable[..., dict[str, Any]]) -> None:
    done(publish())
    hub.fail("tag", says(403))
    failed(publish(files=MORE, replace=True))
    assert hub.repository(REPO).tags == {}
    done(publish(files=MORE))
    assert hub.repository(REPO).tags == {NAME: hub.repository(REPO).head.id}
    assert len(hub.repository(REPO).commits) == 3


# --- killed ----------------------------------------------------------------------------------------------------------


def outcome(hub: HubDouble) -> Any:
    repository = hub.repository(REPO)
    return [commit.id for commit in repository.commits], repository.tags, repository.branches, repository.tagged(NAME)


@pytest.mark.parametrize("flow", ["older", "replaced", "older replaced"])
def test_killed_at_every_request(hub: HubDouble, publish: Callable[..., dict[str, Any]], client: HubProcess, flow: str) -> None:
    """Before each request is served, and after the last: the next call ends where an undisturbed one does."""
    if flow != "older":
        done(publish(files={"README.md": CARD, "template": "before"}))
    if flow != "replaced":
        done(publish(name=NEWER, files=NEWER_FILES))
    start = copy.deepcopy(hub.repository(REPO)), dict(hub.objects)

    def anew() -> None:
        hub.reset()
        hub.repositories[REPO], hub.objects = copy.deepcopy(start[0]), dict(start[1])

    anew()
    asked = {"replace": flow != "older"}
    done(publish(**asked))
    wanted, steps = outcome(hub), hub.operations()
    assert {"older": "branch", "replaced": "delete-tag", "older replaced": "delete-branch"}[flow] in steps
    given: dict[str, Any] = {"kind": "model", "name": NAME, "repo_id": REPO, "files": FILES} | asked
    for at in range(1, len(steps) + 2):
        anew()
        served = at > len(steps)
        assert client.do("publish", dies=(min(at, len(steps)), served), **given) == {"killed": True}, at
        repository = hub.repository(REPO)
        assert repository.head.id in {wanted[0][-1], start[0].head.id}
        assert repository.tags.get(NEWER) == start[0].tags.get(NEWER)
        done(publish(**asked))
        assert outcome(hub) == wanted, (at, steps[: at - 1])


# --- rate limits -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by_retry_after", [False, True])
@pytest.mark.parametrize("at", ["info", "preupload", "commit", "tag"])
def test_a_short_limit_is_waited_for(hub: HubDouble, publish: Callable[..., dict[str, Any]], at: str, by_retry_after: bool) -> None:
    hub.fail(at, rate_limited(55, by_retry_after=by_retry_after))
    answer = publish()
    done(answer)
    assert answer["slept"] == [56]
    published_once(hub)


def test_a_long_limit_is_told(hub: HubDouble, publish: Callable[..., dict[str, Any]]) -> None:
    hub.fail("preupload", rate_limited(3000))
    answer = publish()
    assert "for the next 3000 s" in failed(answer)["text"]
    assert "come back after 12:50:00 UTC" in failed(answer)["hint"]
    assert answer["slept"] == []
    hub.fail("commit", says(429))
    assert "128 commits an hour" in failed(publish())["hint"]
    hub.fail("commit", rate_limited(5), times=None)
    answer = publish()
    failed(answer)
    assert answer["slept"] == [6, 6, 6]


# --- a head that lags ------------------------------------------------------------------------------------------------


def test_what_the_hub_tells_late(hub: HubDouble, publish: Callable[..., dict[str, Any]]) -> None:
    hub.fail("tag", meanwhile(lambda: hub.lag(refs=2, info=9)))
    answer = publish()
    done(answer)
    assert answer["slept"] == [0.1, 0.2]
    published_once(hub)


def test_a_list_of_commits_that_lags_behind_a_lost_answer(hub: HubDouble, publish: Callable[..., dict[str, Any]]) -> None:
    """The old head is committed to again; the client finds nothing to send and gives the head that it is told of."""
    hub.fail("commit", after(drops))
    hub.fail("commits", lambda handler, work: work())
    hub.fail("commits", meanwhile(lambda: hub.lag(commits=1)))
    assert done(publish())["changed"] is True
    assert (hub.operations().count("preupload"), hub.operations().count("commit")) == (2, 1)
    published_once(hub)


def test_nothing_to_change_by_one_account_and_much_by_another(hub: HubDouble, publish: Callable[..., dict[str, Any]]) -> None:
    """Both what the client compares with and what it then gives as the head are old: not taken for a commit."""
    hub.fail("commit", after(drops))
    hub.fail("commits", lambda handler, work: work())
    hub.fail("commits", meanwhile(lambda: hub.lag(commits=1, info=1)))
    answer = publish()
    done(answer)
    assert len(answer["slept"]) == 2
    published_once(hub)


def test_a_list_of_commits_that_lags_behind_somebody_else(hub: HubDouble, publish: Callable[..., dict[str, Any]]) -> None:
    def push() -> None:
        hub.repository(REPO).push({"notes.md": b"theirs"})
        hub.lag(commits=2)

    hub.fail("commit", meanwhile(push))
    done(publish())
    assert hub.operations().count("commit") == 4
    assert [commit.title for commit in hub.repository(REPO).commits] == ["initial commit", "somebody's edit", NAME]


def test_a_commit_that_is_not_seen_at_once(hub: HubDouble, publish: Callable[..., dict[str, Any]]) -> None:
    hub.fail("tag", says(404, "Invalid rev id", code="RevisionNotFound"))
    done(publish())
    published_once(hub)


def test_a_tag_that_is_never_shown(hub: HubDouble, publish: Callable[..., dict[str, Any]]) -> None:
    hub.fail("tag", meanwhile(lambda: hub.lag(refs=99)))
    assert "is not shown" in failed(publish())["text"]
    hub.lag(refs=0)
    assert done(publish())["changed"] is False
    published_once(hub)


def test_a_tag_that_another_sets_meanwhile(hub: HubDouble, publish: Callable[..., dict[str, Any]]) -> None:
    def other() -> None:
        repository = hub.repository(REPO)
        repository.tags[NAME] = repository.commits[0].id

    hub.fail("tag", meanwhile(other))
    assert "other content" in failed(publish())["text"]
    assert hub.repository(REPO).tags == {NAME: hub.repository(REPO).commits[0].id}


# --- tokens ----------------------------------------------------------------------------------------------------------


def test_no_token(hub: HubDouble, publish: Callable[..., dict[str, Any]]) -> None:
    for env in ({}, {"HF_TOKEN": " \n"}):
        error = failed(publish(env=env), "UserError")
        assert error["exit"] == 2
        assert "HF_TOKEN" in error["hint"]
        assert "id-token: write" in error["hint"]
    assert not hub.requests


def test_a_token_with_odd_characters_is_not_quoted(hub: HubDouble, publish: Callable[..., dict[str, Any]]) -> None:
    for token in ("hf_Distinctive\u2026", "hf_Distinctive and more", "hf_Distinctive\x01"):
        failed(publish(env={"HF_TOKEN": token}), "UserError")
    assert not hub.requests


def test_secrets_that_look_like_nothing_are_not_told_either(hub: HubDouble, publish: Callable[..., dict[str, Any]]) -> None:
    hub.fail("info", says(403, "the token plain-Distinctive-token may not"))
    assert "the token *** may not" in failed(publish(env={"HF_TOKEN": "plain-Distinctive-token"}))["text"]
    hub.fail("id-token", says(401, f"bad request token {ID_TOKEN_REQUEST}"))
    assert "bad request token ***" in failed(publish(env=keyless(hub)))["text"]
    hub.fail("oauth", says(400, f"{id_token(CLAIMS)} is no subject"))
    assert "*** is no subject" in failed(publish(env=keyless(hub)))["text"]
    hub.fail("info", says(500, "of hf_SomebodyElsesDistinctive"))  # neither sent nor known
    assert "hf_Somebody" not in publish()["said"]


def test_a_login_serves_as_well(hub: HubDouble, tmp_path: Path) -> None:
    (tmp_path / "token").write_text(TOKEN + "\n")
    with HubProcess(hub, tmp_path) as process:
        done(no_secret(process.do("publish", env={}, kind="model", name=NAME, repo_id=REPO, files=FILES)))


def test_offline(hub: HubDouble, tmp_path: Path) -> None:
    with HubProcess(hub, tmp_path, HF_HUB_OFFLINE="1") as process:
        error = failed(process.do("publish", kind="model", name=NAME, repo_id=REPO, files=FILES), "UserError")
    assert "HF_HUB_OFFLINE" in error["text"]
    assert not hub.requests


def keyless(hub: HubDouble, **more: str) -> dict[str, str]:
    hub.claims = dict(CLAIMS)
    return {**GITHUB, "ACTIONS_ID_TOKEN_REQUEST_URL": f"{hub.address}/github/id-token", **more}


def test_a_job_needs_no_token(hub: HubDouble, publish: Callable[..., dict[str, Any]]) -> None:
    hub.publishers[REPO] = hub.publishers["datasets/ns/p-runs"] = CLAIMS
    hub.create("ns/p-runs", "dataset")
    answer = publish(env=keyless(hub))
    done(answer)
    assert answer["oidc"] is None
    assert hub.audience == hub.address
    published_once(hub)
    run = {"kind": "run", "name": f"{NAME}-data-1.0.0.0", "repo_id": "ns/p-runs", "files": {"README.md": CARD}}
    answer = publish(**run, env=keyless(hub, HF_OIDC_RESOURCE="somebody/else"))
    done(answer)
    assert answer["oidc"] == "somebody/else"
    assert hub.operations().count("oauth") == 2
    assert hub.tokens is not None
    assert set(hub.tokens.values()) == {None, REPO, "datasets/ns/p-runs"}


def test_hf_token_goes_before_github(hub: HubDouble, publish: Callable[..., dict[str, Any]]) -> None:
    done(publish(env=keyless(hub, HF_TOKEN=TOKEN)))
    assert "oauth" not in hub.operations()


def test_a_job_with_a_token_of_another_ci(hub: HubDouble, publish: Callable[..., dict[str, Any]]) -> None:
    hub.publishers[REPO] = CLAIMS
    done(publish(env={"HF_OIDC_RESOURCE": REPO, "HF_OIDC_ID_TOKEN": id_token(CLAIMS)}))
    published_once(hub)


@pytest.mark.parametrize("claims", [None, {**CLAIMS, "branch": "other"}])
def test_a_job_that_is_no_publisher_is_told_what_to_enter(
    hub: HubDouble, publish: Callable[..., dict[str, Any]], claims: dict[str, str] | None
) -> None:
    hub.publishers |= {REPO: claims} if claims else {}
    answer = publish(env=keyless(hub))
    error = failed(answer)
    assert "No Trusted Publisher" in error["text"]
    assert f"{hub.address}/{REPO} must exist first" in error["hint"]
    assert "repository me/code, branch main, workflow publish.yml" in error["hint"]
    assert hub.operations() == ["id-token", "oauth"]
    assert answer["slept"] == []


def test_a_job_without_permission_for_a_token(hub: HubDouble, publish: Callable[..., dict[str, Any]]) -> None:
    error = failed(publish(env={"HF_OIDC_RESOURCE": "x", "GITHUB_ACTIONS": "true"}))
    assert "id-token: write" in error["hint"]
    failed(publish(env={"HF_OIDC_RESOURCE": "x"}))
    hub.publishers[REPO] = CLAIMS
    hub.fail("oauth", says(500))
    hub.fail("id-token", says(503))
    done(publish(env=keyless(hub)))


# --- the double by itself --------------------------------------------------------------------------------------------


def test_the_double_runs_as_a_process(tmp_path: Path) -> None:
    port, state = tmp_path / "port", tmp_path / "state.json"
    command = [
        sys.executable,
        "-m",
        "tests.hub_double",
        "--port-file",
        str(port),
        "--state-file",
        str(state),
        "--repository",
        f"datasets/{REPO}",
    ]
    with subprocess.Popen(command, cwd=Path(__file__).parents[1]) as process:
        for _ in range(200):
            if port.exists():
                break
            time.sleep(0.05)
        request = urllib.request.Request(
            port.read_text() + "/api/repos/create",
            data=json.dumps({"name": "new", "organization": "ns", "private": True}).encode(),
            headers={"Authorization": "Bearer any", "Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=10) as reply:
            assert reply.status == 200
        found = json.loads(state.read_text())["repositories"]
        process.send_signal(signal.SIGTERM)
    assert set(found) == {"ns/new", f"datasets/{REPO}"}
    assert re.fullmatch("[0-9a-f]{40}", found["ns/new"]["head"])
    assert found["ns/new"]["files"][".gitattributes"]["text"].startswith("*.gguf")
    assert process.returncode == 0
    assert json.loads(state.read_text())["requests"] == [["POST", "/api/repos/create", True]]
