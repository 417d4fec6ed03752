"""Results as calm text and tables for people: what each command prints on stdout without --json. No logic, no record text."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.process import printable
from pipeline.progress import duration

if TYPE_CHECKING:
    from pipeline.machine import Check
    from pipeline.run import RunResult, StagePlan
    from pipeline.run_publish import PublishResult
    from pipeline.version_record import Recorded
    from pipeline.version_reserve import Reserved

WIDTH_OF_A_FILE = 160  # columns, where stdout is no terminal and COLUMNS is not set
Part = str | Text | Table


def text_of(*parts: Part) -> str:
    """The parts one below the other as stdout can show them: its colours (none with NO_COLOR), its width.

    A Text is prose and wraps on a terminal; a str is a line that is never broken: it may hold a path.
    """
    width = None if sys.stdout.isatty() or os.environ.get("COLUMNS") else WIDTH_OF_A_FILE
    console = Console(file=sys.stdout, width=width, highlight=False, markup=False, emoji=False)
    with console.capture() as captured:
        for number, part in enumerate(parts):
            if isinstance(part, Table) and number:
                console.print()
            whole_line = isinstance(part, str) or (isinstance(part, Text) and not console.is_terminal)
            console.print(printable(part) if isinstance(part, str) else part, soft_wrap=whole_line)
            if isinstance(part, Table):
                console.print()
    return "\n".join(line.rstrip() for line in captured.get().splitlines()) + "\n"


# --- a run -----------------------------------------------------------------------------------------------------------


def run_parts(result: RunResult, seconds: float) -> Iterator[Part]:
    """Verdict first; then the systems, versions, files, stages; one line when nothing changed."""
    if result.unchanged:
        yield from _unchanged(result)
        if result.exit_code:
            yield from _verdict(result)
        return
    if result.verdict:
        yield from _verdict(result)
    if result.systems:
        yield _systems(result.systems)
    yield from _pairs({**{f"{kind} version": name for kind, name in result.versions.items()}, **_files(result.files)})
    if not result.verdict:
        yield from (f"{outcome.stage}: {outcome.summary}" for outcome in result.stages if outcome.action == "ran")
    cached = [outcome.stage for outcome in result.stages if outcome.action == "cached"]
    yield f"done in {duration(seconds)}" + (f"; unchanged and not run again: {', '.join(cached)}" if cached else "")


def _unchanged(result: RunResult) -> Iterator[Part]:
    stages = ", ".join(outcome.stage for outcome in result.stages)
    report = f"; report: {shown_path(result.files['report'])}" if "report" in result.files else ""
    yield f"nothing changed, nothing to run: {stages} are cached, their inputs and files are as the last run left them{report}"


def _verdict(result: RunResult) -> Iterator[Part]:
    yield Text(printable(result.verdict or ""), style="bold")
    gates = {100: "an evaluation gate failed", 101: "an evaluation gate could not be decided on these rows"}
    if result.exit_code in gates:
        yield Text(f"{gates[result.exit_code]} (exit code {result.exit_code})", style="red")


def _systems(systems: Sequence[Mapping[str, Any]]) -> Table:
    table = _table("system", ">accuracy", "95 % interval", ">macro F1", ">rows", ">invalid")
    for system in systems:
        low, high = system["low"], system["high"]
        interval = f"{100 * low:.1f} to {_percent(high)}" if low is not None and high is not None else "–"
        table.add_row(
            system["name"], _percent(system["accuracy"]), interval, _percent(system["macro_f1"]), str(system["n"]), str(system["n_invalid"])
        )
    return table


def _files(files: Mapping[str, str]) -> dict[str, str]:
    """What people open first, first."""
    order = dict.fromkeys(name for name in ("report", "summary", "model", *files) if name in files)
    return {name: shown_path(files[name]) for name in order}


def plan_parts(plan: Sequence[StagePlan]) -> Iterator[Part]:
    due = [stage for stage in plan if stage.action == "run"]
    if not due:
        yield Text("nothing to do: every stage is up to date", style="bold")
    table = _table("stage", "what happens", ">time", "why")
    for stage in plan:
        time = "" if stage.action == "cached" else "not known" if stage.seconds is None else f"about {duration(stage.seconds)}"
        table.add_row(stage.stage, stage.action, time, stage.why)
    yield table
    known = [stage.seconds for stage in due if stage.seconds is not None]
    if known:
        unknown = len(due) - len(known)
        rest = f", and {unknown} stage{'s' * (unknown > 1)} whose time is not known" if unknown else ""
        yield f"about {duration(sum(known))} in all{rest}"


def tuned_parts(metadata: Mapping[str, Any], folder: Path, seconds: float) -> Iterator[Part]:
    """What `finetune --input` made."""
    tuned = metadata["approach"] == "fine_tuning"
    reason = f"a model set was made instead of fine-tuning: {metadata['reason']}"
    yield Text("a fine-tuned model was made and checked" if tuned else reason, style="bold")
    facts: dict[str, Any] = {"rows": metadata["data"]["rows"]}
    training = metadata.get("training")
    if training:
        best = next(epoch for epoch in training["epochs"] if epoch["epoch"] == training["best_epoch"])
        facts["best epoch"] = f"{training['best_epoch']} of {len(training['epochs'])}"
        losses = {"train": best["train_loss"], "valid": best["valid_loss"]}
        facts["loss"] = ", ".join(f"{loss:.3f} on {split}" for split, loss in losses.items() if loss is not None)
    made = "fine_tuned_model.gguf" if tuned else "model_set_config.json"
    yield from _pairs({**facts, "result": shown_path(folder / made), "figures": shown_path(folder / "fine_tuning_metadata.json")})
    yield f"done in {duration(seconds)}"


# --- the rest --------------------------------------------------------------------------------------------------------


def version_parts(versions: Sequence[Mapping[str, Any]]) -> Iterator[Part]:
    if not versions:
        yield Text("no version is recorded, and none can be foretold before the first run: `pipeline run`")
        return
    further = list(dict.fromkeys(key for entry in versions for key in entry if key not in ("kind", "name", "state", "why")))
    table = _table("kind", "name", "state", *further)
    for entry in versions:
        table.add_row(*(str(entry.get(key) or "") for key in ("kind", "name", "state", *further)))
    yield table
    for entry in versions:
        why = [entry["why"]] if isinstance(entry.get("why"), str) else entry.get("why") or ()
        yield from (Text(f"{entry['name']}: {sentence}") for sentence in why)


def reserved_parts(done: Reserved) -> Iterator[Part]:
    if not done.changed:
        yield Text("nothing changed: these inputs are recorded already, and no run is needed", style="bold")
    elif not done.allocations:
        yield Text("nothing is held", style="bold")
    else:
        yield Text("a run would make new versions; nothing was held" if done.dry_run else "held for the run:", style="bold")
    yield from _pairs({kind: f"{r.name}{' (recorded already)' if r.existing else ''}" for kind, r in done.allocations.items()})
    yield from (f"  {sentence}" for sentence in done.why)
    if done.abandoned:
        yield f"recorded as abandoned, since their runs did not come back: {', '.join(done.abandoned)}"
    yield from done.remarks


def recorded_parts(done: Recorded) -> Iterator[Part]:
    if done.commit is None:
        yield Text("nothing to record: the remote has all of it", style="bold")
    elif done.waits:
        yield Text(f"pushed to the branch {done.branch}: open a pull request from it", style="bold")
    else:
        yield Text(f"recorded on {done.branch} as {done.commit[:12]}", style="bold")
    yield from _pairs(dict(done.versions))
    yield from (f"{old} is called {new} now: its name was taken meanwhile" for old, new in done.renamed.items())
    for what, names in (("failed", done.failed), ("abandoned", done.abandoned)):
        if names:
            yield f"recorded as {what}: {', '.join(names)}"
    yield from done.remarks
    if done.in_own_checkout is False:
        yield "this checkout does not follow by itself: drop its own changes of metadata/, then `git pull`"


def published_parts(done: PublishResult, dry_run: bool) -> Iterator[Part]:
    for preview in done.previews:
        there = "; it is there already, so nothing would" if preview.published else ""
        yield Text(f"{preview.name} would go to {preview.repo_id} ({'private' if preview.private else 'public'}){there}", style="bold")
        table = _table("file", ">bytes")
        for file in preview.files:
            table.add_row(file.path, str(file.size))
        yield table
        for file in preview.files:
            if file.fields:
                yield f"{file.path}:"
                yield from ("  " + line for line in _yaml_lines(file.fields))
    for version in done.published:
        yield f"{version.name}: {'published' if version.changed else 'there already'}: {version.url}"
    if not done.published and not done.previews:
        yield Text("nothing waits to be published", style="bold")
    elif dry_run:
        yield "nothing was sent"
    yield from done.remarks


def _yaml_lines(fields: Mapping[str, Any]) -> list[str]:
    from pipeline import yaml_text

    return yaml_text.dump(fields).splitlines()


def artifact_parts(files: Sequence[str], folder: str) -> Iterator[Part]:
    yield f"{len(files)} files copied to {folder}"


def verify_parts(problems: Sequence[str]) -> Iterator[Part]:
    if not problems:
        yield "metadata and outputs are whole"
        return
    yield Text(f"{len(problems)} problem{'s' * (len(problems) > 1)}:", style="bold")
    yield from (f"  - {problem}" for problem in problems)


def doctor_parts(checks: Sequence[Check]) -> Iterator[Part]:
    states = {True: ("ok", "green"), False: ("missing", "red"), None: ("–", "dim")}
    table = _table("what", "", "found")
    for check in checks:
        word, style = states[check.ok]
        found = Text(check.found)
        if check.advice:
            found.append(f"\n→ {check.advice}", style="" if check.ok is False else "dim")
        table.add_row(check.name, Text(word, style=style), found)
    yield table
    missing = [check.name for check in checks if check.ok is False]
    yield f"to be mended: {', '.join(missing)}" if missing else "all that is needed is here"


# --- pieces ----------------------------------------------------------------------------------------------------------


def _table(*headings: str) -> Table:
    """A table; the column of a heading that begins with > is set to the right."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="dim")
    for number, heading in enumerate(headings):
        justify: Literal["left", "right"] = "right" if heading.startswith(">") else "left"
        table.add_column(heading.removeprefix(">"), justify=justify, overflow="fold", no_wrap=number == 0)
    return table


def _pairs(facts: Mapping[Any, Any]) -> Iterator[str]:
    """Lines rather than a table: a path must stay one word, however long."""
    width = max(map(len, facts), default=0)
    yield from (f"{name:<{width}}  {value}" for name, value in facts.items())


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %"


def shown_path(path: str | Path) -> str:
    """Relative to the working directory where it lies below it."""
    path = Path(path).absolute()
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
