"""A process that has imported the real huggingface_hub with HF_ENDPOINT set, and publishes on demand, each time in a child of its own.

It reads one JSON command a line and answers with one line; before a child starts it tells the child's process ID and waits for a line,
so that a test can arrange for that process to be killed.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import sys
import traceback
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

# before the fork: importing takes half a second
import huggingface_hub
import huggingface_hub._commit_api
import huggingface_hub.hf_api
import huggingface_hub.repocard

from pipeline import publish
from pipeline.backends.hub import HubClient
from pipeline.backends.hub_session import Patience
from pipeline.errors import PipelineError
from pipeline.publication import Publication, Published

QUICK = Patience(waits_s=(0.1, 0.2, 0.4, 0.8), seen_waits_s=(0.1, 0.2, 0.4), longest_rate_wait_s=60, connect_s=2, answer_s=2)


def publication(asked: dict[str, Any]) -> Publication:
    files = {path: Path(told["file"]) if isinstance(told, dict) else told.encode() for path, told in asked["files"].items()}
    return Publication(asked["kind"], asked["name"], asked["repo_id"], asked.get("private", True), files)


def told(found: Published | None) -> dict[str, Any] | None:
    return found and {name: getattr(found, name) for name in ("kind", "name", "repo_id", "commit", "url", "changed")}


def publish_one(client: HubClient, asked: dict[str, Any]) -> Any:
    return told(client.publish(publication(asked), create=asked.get("create", False), replace=asked.get("replace", False)))


def read_back(client: HubClient, asked: dict[str, Any]) -> Any:
    return told(client.read_back(asked["kind"], asked["repo_id"], asked["name"]))


def everything(client: HubClient, asked: dict[str, Any]) -> Any:
    """`publish_all` of one dataset, run and model; the model's card names the others as they were published."""

    def build(kind: Any, published: Any) -> Publication:
        card = "".join(f"{known}: {found.commit} {found.url}\n" for known, found in sorted(published.items()))
        return publication(
            {**asked["versions"][kind], "kind": kind, "files": {**asked["versions"][kind]["files"], "README.md": f"---\n{card}---\n"}}
        )

    planned = [publish.Planned(kind, version["name"], version["repo_id"], build) for kind, version in asked["versions"].items()]
    how = {name: asked.get(name, False) for name in ("create", "again")}
    return [told(found) for found in publish.publish_all(planned, client, Path(asked["metadata"]), **how)]


def load_card(client: HubClient, asked: dict[str, Any]) -> Any:
    card_class = getattr(huggingface_hub, asked["card"])
    card = card_class.load(asked["repo_id"], token=os.environ["HF_TOKEN"])
    return {"data": card.data.to_dict(), "text": card.text, "content": card.content}


WORK: dict[str, Callable[[HubClient, dict[str, Any]], Any]] = {
    "publish": publish_one, "read_back": read_back, "everything": everything, "load_card": load_card,
}  # fmt: skip


def run(asked: dict[str, Any], answer: int) -> None:
    """In the child: the work, and its result, its error or its traceback as JSON into a pipe. `said`: all that was printed or logged."""
    os.environ.update(asked.get("env", {}))
    slept: list[float] = []
    said = io.StringIO()
    logging.basicConfig(stream=said, level=logging.DEBUG, force=True)
    library = logging.getLogger("huggingface_hub")
    library.handlers.clear()
    library.setLevel(logging.DEBUG)
    library.propagate = True
    now = datetime(2026, 3, 1, 12, 0, 0, tzinfo=UTC)
    client = HubClient(patience=QUICK, sleep=slept.append, now=lambda: now)
    result: dict[str, Any] = {}
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            result["result"] = WORK[asked["do"]](client, asked)
        except PipelineError as error:
            whole = "".join(traceback.format_exception(error))
            result["error"] = {
                "type": type(error).__name__,
                "exit": error.exit_code,
                "text": str(error),
                "hint": error.hint,
                "trace": whole,
            }
        except BaseException as error:  # noqa: BLE001
            result["bug"] = "".join(traceback.format_exception(error))
    result |= {"slept": slept, "said": said.getvalue(), "oidc": os.environ.get("HF_OIDC_RESOURCE")}
    with os.fdopen(answer, "w") as pipe:
        json.dump(result, pipe)


def main() -> None:
    replies = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        asked = json.loads(line)
        start_read, start_write = os.pipe()
        answer_read, answer_write = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(answer_read)
            os.close(start_write)
            os.read(start_read, 1)
            try:
                run(asked, answer_write)
            finally:
                os._exit(0)
        os.close(answer_write)
        os.close(start_read)
        print(child, file=replies, flush=True)
        sys.stdin.readline()
        os.write(start_write, b"1")
        os.close(start_write)
        with os.fdopen(answer_read) as pipe:
            text = pipe.read()
        os.waitpid(child, 0)
        print(text or '{"killed": true}', file=replies, flush=True)


if __name__ == "__main__":
    main()
