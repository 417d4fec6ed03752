"""The git remote in bad weather: real repositories, refused pushes, strange checkouts, tokens."""

from __future__ import annotations

import base64
import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from pipeline.backends.git import BOT, TOKEN, GitRemote
from pipeline.errors import BackendError, PipelineError, PushLostError, UserError
from tests.version_runs import ToyRun, clone, done, git, healthy, make_remote, names, refs, reserved, toy


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    return make_remote(tmp_path)


def ready(run: ToyRun) -> ToyRun:
    run.reserve()
    run.run()
    return run


def everything(run: ToyRun) -> dict[str, Any]:
    """The user's clone as a failed command must leave it."""
    files = {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file() and ".git" not in path.parts}
    told = [git(run.folder, *command) for command in (("status", "--porcelain"), ("rev-parse", "HEAD"), ("ls-files", "--stage"))]
    return {"files": files, "told": told, "config": (run.folder / ".git/config").read_text(encoding="utf-8")}


def hook(repository: Path, name: str, script: str) -> None:
    path = repository / "hooks" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    path.chmod(0o755)


# --- refused and out of reach ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    ["GH006: Protected branch update failed for refs/heads/main.", "GH013: Repository rule violations found for refs/heads/main.",
     "You are not allowed to push code to protected branches on this project."],
    ids=["GitHub", "GitHub rulesets", "GitLab"],
)  # fmt: skip
def test_a_protected_branch_is_named_as_the_reason_with_the_two_ways_out(bare: Path, words: str) -> None:
    run = ready(toy(bare))
    hook(bare, "pre-receive", f'grep -q refs/heads/main && echo "{words}" >&2 && exit 1; exit 0')
    before, here = refs(bare), everything(run)
    with pytest.raises(BackendError, match="the remote origin refused the push") as error:
        run.record()
    assert words in str(error.value)
    assert "past the rules" in error.value.hint
    assert "`pipeline version record --pull-request`" in error.value.hint
    assert (refs(bare), everything(run)) == (before, here)
    assert run.record(pull_request=True).waits, "and that way is open"


def test_a_remote_that_went_away_is_found_again_by_the_same_command(bare: Path) -> None:
    run = ready(toy(bare))
    here = everything(run)
    bare.rename(bare.parent / "away")
    with pytest.raises(BackendError, match="git ls-remote on the remote origin failed") as error:
        run.record()
    assert TOKEN in error.value.hint
    assert everything(run) == here
    (bare.parent / "away").rename(bare)
    assert run.record().versions["model"] == "0001-model-1.0.0.0"
    healthy(bare)


def test_a_network_that_is_down_is_tried_again_with_growing_pauses(bare: Path) -> None:
    run, waited = toy(bare), list[float]()
    git(run.folder, "remote", "set-url", "origin", "http://nowhere.invalid/x.git")
    with pytest.raises(BackendError, match="Could not resolve host") as error:
        GitRemote(run.folder, sleep=waited.append).look()
    assert error.value.hint == "check the network; nothing was lost: run the same command again"
    assert len(waited) == 3
    assert waited[0] <= 2 < sum(waited) <= 14


def test_a_remote_without_a_commit_is_called_that(bare: Path, tmp_path: Path) -> None:
    git(tmp_path, "init", "--quiet", "--bare", "--initial-branch=main", "empty.git")
    run = toy(bare)
    git(run.folder, "remote", "set-url", "origin", f"file://{tmp_path}/empty.git")
    with pytest.raises(BackendError, match="the remote origin has no default branch yet") as error:
        run.reserve()
    assert error.value.hint == "push the first commit to it"


def test_without_a_remote_or_a_repository_the_error_says_what_is_missing(bare: Path, tmp_path: Path) -> None:
    run = toy(bare)
    git(run.folder, "remote", "rename", "origin", "upstream")
    with pytest.raises(UserError, match="this repository has no remote called origin") as error:
        run.reserve()
    assert "`git remote add origin URL`" in error.value.hint
    assert GitRemote(run.folder, remote="upstream").look().branch == "main"
    plain = tmp_path / "plain"
    plain.mkdir()
    with pytest.raises(UserError, match="is in no git repository") as error:
        GitRemote(plain)
    assert "git init" in error.value.hint


def test_without_git_the_error_says_so(bare: Path, tmp_path: Path) -> None:
    run = toy(bare)
    with pytest.raises(UserError, match="there is no git here") as error:
        GitRemote(run.folder, environ={"PATH": str(tmp_path / "nothing")})
    assert error.value.hint == "install git"


def test_a_folder_outside_of_the_repository_is_refused(bare: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="lies outside the repository"):
        toy(bare).remote.folder(tmp_path / "elsewhere")


# --- pushes ----------------------------------------------------------------------------------------------------------


def test_a_push_is_all_or_nothing(bare: Path) -> None:
    remote = toy(bare).remote
    head = remote.look().head
    git(bare, "tag", "there", "main")
    before = refs(bare)
    with pytest.raises(PushLostError):
        remote.push({"refs/tags/new": remote.tag("new", head, "x"), "refs/tags/there": remote.tag("there", head, "x")})
    assert refs(bare) == before
    remote.push({"refs/tags/new": remote.tag("new", head, "x"), "refs/tags/gone": None})
    assert refs(bare).keys() - before.keys() == {"refs/tags/new"}, "what was deleted already is no reason to fail"


@pytest.mark.parametrize(("kind", "name"), [("tag", "reserved"), ("branch", "pipeline")])
def test_a_name_in_the_way_of_ours_is_named_and_not_waited_for(bare: Path, kind: str, name: str) -> None:
    git(bare, kind, name, "main")
    run = toy(bare)
    run.run()
    before = refs(bare)
    with pytest.raises(BackendError, match=f"the {kind} {name} on the remote origin is in the way") as error:
        run.reserve() if kind == "tag" else run.record(pull_request=True)
    assert error.value.hint == f"rename it: names that begin with {name}/ are needed"
    assert refs(bare) == before


def test_what_was_there_before_does_not_count_as_pushed(bare: Path) -> None:
    remote = toy(bare).remote
    tag = remote.tag("new", remote.look().head, "x")
    remote.push({"refs/tags/new": tag})
    with pytest.raises(PushLostError, match=r"already there: .*refs/tags/new"):
        remote.push({"refs/tags/new": tag})


def test_a_branch_that_was_set_to_another_history_is_looked_at_again(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = toy(bare, "one"), toy(bare, "two")
    done(two)
    plain, moves = GitRemote._fetch, [lambda: git(bare, "update-ref", "refs/heads/main", "main^")]

    def fetch(self: GitRemote, asked: Any) -> None:
        if moves:
            moves.pop()()
        plain(self, asked)

    monkeypatch.setattr(GitRemote, "_fetch", fetch)
    assert one.remote.look().head == git(bare, "rev-parse", "main").strip()


def test_a_folder_of_the_commit_holds_what_was_given_and_the_rest_stays(bare: Path, tmp_path: Path) -> None:
    run = toy(bare)
    content = tmp_path / "content"
    (content / "deep").mkdir(parents=True)
    for name, data in {"a b.txt": b"x\r\n", "deep/ü.yaml": b"\x00\xff", 'quo"te': b""}.items():
        (content / name).write_bytes(data)
    remote = run.remote
    first = remote.commit(remote.look().head, "metadata", content, "one")
    assert first
    assert remote.commit(first, "metadata", content, "again") is None
    remote.files_at(first, "metadata", tmp_path / "back")
    assert {p.relative_to(content): p.read_bytes() for p in content.rglob("*") if p.is_file()} == {
        p.relative_to(tmp_path / "back"): p.read_bytes() for p in (tmp_path / "back").rglob("*") if p.is_file()
    }
    (content / "a b.txt").unlink()
    second = remote.commit(first, "metadata", content, "two")
    assert second
    kept = git(run.folder, "ls-tree", "-r", "-z", "--name-only", second).split("\0")
    assert kept[:-1] == [".gitignore", "metadata/deep/ü.yaml", 'metadata/quo"te', "pipeline.yaml"]
    assert git(run.folder, "show", "-s", "--format=%B", second).strip() == "two"


# --- strange checkouts -------------------------------------------------------------------------------------------------


def test_a_shallow_clone_records_and_keeps_the_history_that_it_has(bare: Path) -> None:
    seed = bare.parent / "seed"
    for n in range(4):
        git(seed, "-c", "user.name=S", "-c", "user.email=s@e", "commit", "--quiet", "--allow-empty", "-m", f"{n}")
    git(seed, "push", "--quiet", str(bare), "main")
    toy(bare, "other", rows="others").reserve()
    run = ready(toy(bare, "shallow", "--depth=3"))
    assert git(run.folder, "rev-list", "--count", "HEAD").strip() == "3"
    assert run.record().in_own_checkout
    assert git(run.folder, "rev-list", "--count", "HEAD").strip() == "4"
    healthy(bare)


def test_a_clone_without_blobs_records(bare: Path) -> None:
    git(bare, "config", "uploadpack.allowFilter", "true")
    done(toy(bare, "first"))
    run = ready(toy(bare, "partial", "--filter=blob:none", "--depth=1", rows="others"))
    assert run.record().in_own_checkout
    assert names(healthy(bare), "model") == ["0001-model-1.0.0.0", "0002-model-1.0.0.0"]


def test_an_object_that_is_missing_is_an_error_that_says_what_to_do(bare: Path) -> None:
    with pytest.raises(BackendError, match=f"the object {'0' * 40} is not in this repository") as error:
        list(toy(bare).remote._objects(["0" * 40]))
    assert error.value.hint == "run `git fsck`, or clone again"


def test_on_a_detached_head_the_remote_gets_it_and_the_checkout_stays(bare: Path) -> None:
    run = toy(bare)
    git(run.folder, "checkout", "--quiet", "--detach")
    before = git(run.folder, "rev-parse", "HEAD", "main")
    assert not ready(run).record().in_own_checkout
    assert git(run.folder, "rev-parse", "HEAD", "main") == before
    healthy(bare)


def test_what_is_changed_and_staged_stays_so(bare: Path) -> None:
    run = toy(bare)
    (run.folder / "pipeline.yaml").write_text("project: changed\n", encoding="utf-8")
    for name in ("staged", "untracked"):
        (run.folder / name).write_text(name, encoding="utf-8")
    git(run.folder, "add", "staged")
    before = git(run.folder, "status", "--porcelain")
    assert before == " M pipeline.yaml\nA  staged\n?? untracked\n"
    assert ready(run).record().in_own_checkout
    assert git(run.folder, "status", "--porcelain") == before
    assert "staged" not in git(bare, "ls-tree", "-r", "--name-only", "main")


def test_hooks_of_the_clone_are_not_run(bare: Path) -> None:
    run = toy(bare)
    for name in ("pre-commit", "commit-msg", "pre-push", "post-commit", "reference-transaction", "post-index-change"):
        hook(run.folder / ".git", name, f"echo {name} >> {bare.parent}/ran; exit 1")
    ready(run).record()
    assert not (bare.parent / "ran").exists()
    healthy(bare)


@pytest.mark.parametrize(
    ("person", "wanted"),
    [({}, " ".join([BOT[0], f"<{BOT[1]}>"])), ({"user.name": "Jo"}, f"{BOT[0]} <{BOT[1]}>"),
     ({"user.name": "Jo <x>", "user.email": "jo@example.org"}, "Jo x <jo@example.org>")],
    ids=["nobody", "half", "brackets"],
)  # fmt: skip
def test_who_commits_is_who_git_knows_or_the_bot(bare: Path, monkeypatch: pytest.MonkeyPatch, person: dict[str, str], wanted: str) -> None:
    for name in ("GIT_CONFIG_GLOBAL", "GIT_CONFIG_SYSTEM"):
        monkeypatch.setenv(name, os.devnull)
    run = toy(bare)
    for key, value in person.items():
        git(run.folder, "config", key, value)
    done(run)
    assert set(git(bare, "log", "-1", "--format=%an <%ae>%n%cn <%ce>", "main").splitlines()) == {wanted}
    assert wanted in git(bare, "cat-file", "tag", "0001-model-1.0.0.0")


@pytest.mark.parametrize("attributes", ["", "* text eol=crlf\n", "* text=auto\nmetadata/** filter=spoil\n"], ids=["none", "crlf", "filter"])
def test_line_ends_and_filters_of_the_checkout_change_no_byte(bare: Path, attributes: str) -> None:
    if attributes:
        seed = bare.parent / "seed"
        (seed / ".gitattributes").write_text(attributes, encoding="utf-8")
        git(seed, "add", ".gitattributes")
        git(seed, "-c", "user.name=S", "-c", "user.email=s@e", "commit", "--quiet", "-m", "Attributes")
        git(seed, "push", "--quiet", str(bare), "main")
    options = [
        part for key in ("core.autocrlf=true", "filter.spoil.clean=tr a-z A-Z", "filter.spoil.smudge=tr A-Z a-z") for part in ("-c", key)
    ]
    run = toy(bare, "first", *options)
    done(run)
    files = git(bare, "ls-tree", "-r", "--name-only", "main", "metadata").split()
    texts = {
        file: subprocess.run(["git", "-C", bare, "cat-file", "blob", f"main:{file}"], capture_output=True, check=True).stdout
        for file in files
    }
    assert not any(b"\r" in text for text in texts.values())
    assert b"kind: model" in texts["metadata/versions/model-0001.yaml"]
    again = toy(bare, "second", *options, rows="others")
    if "filter" not in attributes:
        assert b"\r\n" in (again.metadata / "model_card.yaml").read_bytes(), "the test needs a checkout with other line ends"
    assert done(again).versions["model"] == "0002-model-1.0.0.0"
    for file in (file for file in files if "-0001" in file):
        assert (
            subprocess.run(["git", "-C", bare, "cat-file", "blob", f"main:{file}"], capture_output=True, check=True).stdout == texts[file]
        )
    assert names(healthy(bare), "model") == ["0001-model-1.0.0.0", "0002-model-1.0.0.0"]


def test_metadata_may_lie_in_a_subfolder_of_the_repository(tmp_path: Path) -> None:
    from pipeline.version_record import record
    from pipeline.version_reserve import Planned, reserve
    from pipeline.versions import verify
    from tests.version_runs import HOLD

    bare = make_remote(tmp_path, files={"experiments/one/pipeline.yaml": "project: toy\n", "metadata/other.txt": "of somebody else\n"})
    for n in (1, 2):
        folder = clone(bare, tmp_path / f"clone-{n}")
        run = ToyRun(folder / "experiments/one", rows=f"{n}", name=f"{n}")
        remote = run.remote
        place = remote.folder(run.metadata)
        assert place == "experiments/one/metadata"
        held = reserve(remote, place, lambda registry, *_, run=run: Planned(run.plan(registry)), run=run.name, hold=HOLD)  # type: ignore[misc]
        run.run()
        told = record(remote, place, run.metadata, nonce=held.nonce, own_checkout=True)
        assert (told.versions["model"], told.in_own_checkout) == (f"000{n}-model-1.0.0.0", True)
        assert git(folder, "status", "--porcelain") == ""
        assert verify(run.metadata) == []
    assert git(bare, "show", "main:metadata/other.txt") == "of somebody else\n"
    assert not git(bare, "ls-tree", "-r", "--name-only", "main", "metadata/versions")


def test_git_inside_of_a_hook_of_another_repository_is_not_misled(bare: Path, tmp_path: Path) -> None:
    run = toy(bare)
    wrong = {"GIT_DIR": str(tmp_path / "x"), "GIT_INDEX_FILE": str(tmp_path / "y"), "GIT_WORK_TREE": str(tmp_path), "GIT_PREFIX": "z/"}
    assert GitRemote(run.folder, environ={**os.environ, **wrong}).look().branch == "main"


# --- tokens ----------------------------------------------------------------------------------------------------------

SECRET = "ghp_" + "s3cr3t" * 4
ENCODED = base64.b64encode(f"x-access-token:{SECRET}".encode()).decode()


class Site:
    """A web server that writes down what it is told and lets nobody in, or sends people elsewhere."""

    def __init__(self, answer: int = 403, location: str = "") -> None:
        self.seen: list[list[str]] = []
        seen = self.seen

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                seen.append(self.headers.get_all("Authorization") or [])
                self.send_response(answer)
                if location:
                    self.send_header("Location", location + self.path)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *arguments: object) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.fixture
def sites() -> Iterator[Callable[..., Site]]:
    made: list[Site] = []

    def make(*how: Any) -> Site:
        made.append(Site(*how))
        return made[-1]

    yield make
    for site in made:
        site.close()


def with_token(run: ToyRun, address: str, **environ: str) -> GitRemote:
    git(run.folder, "remote", "set-url", "origin", address)
    return GitRemote(run.folder, environ={**os.environ, TOKEN: SECRET, **environ}, sleep=lambda s: None)


def test_the_token_goes_to_the_remotes_own_site_and_is_seen_nowhere_else(
    bare: Path, sites: Callable[..., Site], monkeypatch: pytest.MonkeyPatch
) -> None:
    site, run, commands = sites(), toy(bare), list[list[str]]()
    plain = subprocess.run

    def watched(command: list[str], **settings: Any) -> Any:
        commands.append([str(part) for part in command])
        assert TOKEN not in settings["env"]
        return plain(command, **settings)

    remote = with_token(run, f"{site.address}/owner/name.git")
    before = (run.folder / ".git/config").read_text(encoding="utf-8")
    monkeypatch.setattr(subprocess, "run", watched)
    with pytest.raises(BackendError, match="403") as error:
        remote.look()
    assert site.seen == [[f"Basic {ENCODED}"]], "once: who is refused is not asked again"
    assert f"the rights of the token in {TOKEN} (contents: write)" in error.value.hint
    for text in (str(error.value), error.value.hint, *(part for command in commands for part in command), before):
        assert SECRET not in text
        assert ENCODED not in text
    assert (run.folder / ".git/config").read_text(encoding="utf-8") == before


def test_another_site_does_not_get_the_token(bare: Path, sites: Callable[..., Site]) -> None:
    own, other = sites(), sites()
    remote = with_token(toy(bare), f"{own.address}/x.git")
    git(remote.top, "remote", "set-url", "origin", f"{other.address}/x.git")
    with pytest.raises(BackendError):
        remote.look()
    assert own.seen == []
    assert other.seen == [[]]


def test_a_site_that_sends_us_elsewhere_does_not_pass_the_token_on(bare: Path, sites: Callable[..., Site]) -> None:
    other = sites()
    own = sites(302, other.address)
    with pytest.raises(BackendError):
        with_token(toy(bare), f"{own.address}/x.git").look()
    assert own.seen == [[f"Basic {ENCODED}"]]
    assert all(told == [] for told in other.seen)


def test_credentials_that_a_checkout_step_left_do_not_stand_beside_the_token(bare: Path, sites: Callable[..., Site]) -> None:
    """Two Authorization headers are a bad request to GitHub."""
    site, run = sites(), toy(bare)
    git(run.folder, "config", f"http.{site.address}/.extraheader", "AUTHORIZATION: basic b2xk")
    told = {"GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": "http.userAgent", "GIT_CONFIG_VALUE_0": "as configured"}
    with pytest.raises(BackendError):
        with_token(run, f"{site.address}/x.git", **told).look()
    assert site.seen == [[f"Basic {ENCODED}"]]


def test_a_remote_that_is_no_web_site_gets_no_token(bare: Path) -> None:
    run = toy(bare)
    assert not any(name.startswith("GIT_CONFIG_KEY") for name in with_token(run, f"file://{bare}")._environment())


@pytest.mark.parametrize("password", ["hunter2hunter2", "p@ss:w0rd"])
def test_a_password_in_the_address_is_masked(bare: Path, sites: Callable[..., Site], password: str) -> None:
    site, run = sites(), toy(bare)
    address = site.address.replace("http://", f"http://user:{password}@") + "/x.git"
    git(run.folder, "remote", "set-url", "origin", address)
    with pytest.raises(PipelineError) as error:
        GitRemote(run.folder, sleep=lambda s: None).look()
    assert not any(part in f"{error.value} {error.value.hint}" for part in (password, "p@ss", "w0rd", "user:"))


def test_what_git_says_is_masked_before_anybody_sees_it(bare: Path) -> None:
    remote = with_token(toy(bare), "https://host.invalid/x.git")
    said = f"fatal: https://user:p@ss@host.invalid/x.git and {SECRET} and Authorization: Basic {ENCODED}, see https://host.invalid/a@b"
    assert remote._safe(said) == "fatal: https://…@host.invalid/x.git and … and Authorization: Basic …, see https://host.invalid/a@b"


def test_a_password_in_the_address_does_not_keep_the_token_from_its_site(bare: Path, sites: Callable[..., Site]) -> None:
    site = sites()
    with pytest.raises(BackendError):
        with_token(toy(bare), site.address.replace("http://", "http://user:old@") + "/x.git").look()
    assert site.seen[0][-1] == f"Basic {ENCODED}"


def test_a_port_with_403_in_it_is_no_missing_right(bare: Path) -> None:
    run, waited = toy(bare), list[float]()
    git(run.folder, "remote", "set-url", "origin", "http://127.0.0.1:4030/x-401.git")
    with pytest.raises(BackendError) as error:
        GitRemote(run.folder, sleep=waited.append).look()
    assert "check the network" in error.value.hint
    assert len(waited) == 3
    assert reserved(bare) == []
