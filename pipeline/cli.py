"""The `pipeline` command: argv -> a call; its result on stdout, everything else on stderr, an exit code. No logic.

Nothing heavy is imported before argv is understood, so that --help is there at once.
"""

from __future__ import annotations

import errno
import json
import os
import sys
import traceback
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.arguments import UsageError, make_parser, parse
from pipeline.errors import ArtifactError, BackendError, ConfigError, DataError, PipelineError, UserError

if TYPE_CHECKING:
    import pandas as pd

    from pipeline.config import PipelineConfig
    from pipeline.ports import Hub, Remote
    from pipeline.progress import Display
    from pipeline.run import Pipeline
    from pipeline.terminal import Part

HOLD_MINUTES = 720
UNTIL = {"run": "register"} | {stage: stage for stage in ("format", "finetune", "infer", "evaluate", "register", "report")}


@dataclass(frozen=True)
class Result:
    """What a command has to say: `facts` for programs, `parts` for people, drawn up when asked for."""

    facts: Mapping[str, Any]
    parts: Callable[[], Iterable[Part]]
    exit_code: int = 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and gives its exit code (`pipeline.errors`). Raises nothing but the SystemExit of --help and --version."""
    from pipeline import process

    argv = sys.argv[1:] if argv is None else list(argv)
    process.open_streams()
    if not argv:
        process.write_error(make_parser().format_help())
        return UsageError.exit_code
    as_json, verbose = "--json" in argv, 0
    try:
        with process.stopping_on_signals():
            try:
                args = parse(argv)
                verbose = args.verbose
                result = _work(args)
                facts = {"command": args.command, "exit_code": result.exit_code, **result.facts}
                process.write_out(_json_line(facts) if as_json else _text(result))
                return result.exit_code
            except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001  the one place where any failure becomes words and a number
                return _fail(error, as_json=as_json, verbose=verbose)
    finally:
        process.write_out("")  # --help into a closed pipe


def _work(args: Namespace) -> Result:
    from pipeline.process import logs_on_stderr, results_alone_on_stdout
    from pipeline.progress import display

    work = {
        "plan": _plan, "version": _version, "verify": _verify, "artifacts": _artifacts, "publish": _publish, "doctor": _doctor,
    }.get(args.command)  # fmt: skip
    with logs_on_stderr(args.verbose), results_alone_on_stdout():
        if work is not None:
            return work(args)
        with display() as progress:
            return _tune_table(args, progress) if args.command == "finetune" and "input" in args else _run(args, progress)


def _text(result: Result) -> str:
    text: str = _screen().text_of(*result.parts())
    return text


def _screen() -> Any:
    """pipeline.terminal, which draws with rich: not loaded under --json."""
    from pipeline import terminal

    return terminal


def _json_line(facts: Mapping[str, Any]) -> str:
    from pipeline.records import to_plain

    utf8 = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    return json.dumps(to_plain(facts), ensure_ascii=not utf8, allow_nan=False) + "\n"


# --- commands --------------------------------------------------------------------------------------------------------


def _run(args: Namespace, progress: Display) -> Result:
    pipeline = _pipeline(args, progress=progress, debug="debug" in args, fallback="no_fallback" not in args)
    begun = _now()
    result = pipeline.run(getattr(args, "until", UNTIL[args.command]), force="force" in args, replace="replace" in args)
    seconds = _now() - begun
    return Result({**vars(result), "seconds": round(seconds, 2)}, lambda: _screen().run_parts(result, seconds), result.exit_code)


def _plan(args: Namespace) -> Result:
    plan = _pipeline(args).plan()
    return Result({"stages": plan}, lambda: _screen().plan_parts(plan))


def _version(args: Namespace) -> Result:
    action = getattr(args, "action", None)
    belongs = {"explain": None, "dry_run": "reserve", "hold_minutes": "reserve", "source": "record", "reservation": "record"}
    flags = {"source": "--from"}
    if wrong := [flags.get(name, "--" + name.replace("_", "-")) for name, owner in belongs.items() if name in args and owner != action]:
        raise UsageError(
            f"{', '.join(wrong)}: not for `pipeline version{f' {action}' if action else ''}`", hint="see `pipeline version --help`"
        )
    if action:
        return _reserve(args) if action == "reserve" else _record(args)
    versions = _pipeline(args).versions(explain="explain" in args)
    return Result({"versions": versions}, lambda: _screen().version_parts(versions))


def _reserve(args: Namespace) -> Result:
    from datetime import timedelta

    from pipeline import github, run_versions

    minutes = getattr(args, "hold_minutes", HOLD_MINUTES)
    if minutes < 1:
        raise UsageError("--hold-minutes: must be 1 or more")
    dry_run = "dry_run" in args or github.wants_dry_run()
    pipeline = _pipeline(args)
    done = run_versions.reserve(
        pipeline, _remote(args, pipeline), hold=timedelta(minutes=minutes), dry_run=dry_run, pull_request="pull_request" in args
    )
    record = bool(done.allocations) and done.changed and not dry_run
    outputs = {"changed": str(done.changed).lower(), "record": str(record).lower(), "reservation": done.nonce or ""}
    github.write_outputs(outputs)
    versions = {kind: {"name": r.name, "existing": r.existing} for kind, r in done.allocations.items()}
    told = {"changed": done.changed, "reservation": done.nonce, "dry_run": dry_run, "versions": versions}
    rest = {"why": done.why, "abandoned": done.abandoned, "remarks": done.remarks}
    return Result({**told, **rest}, lambda: _screen().reserved_parts(done))


def _record(args: Namespace) -> Result:
    from pipeline import github, run_versions

    pipeline = _pipeline(args)
    source = Path(args.source) if "source" in args else None
    done = run_versions.record(
        pipeline, _remote(args, pipeline), source=source, nonce=getattr(args, "reservation", None) or None,
        pull_request="pull_request" in args,
    )  # fmt: skip
    recorded = done.recorded
    named = ", ".join(recorded.versions.values())
    github.write_outputs(
        {
            "commit": recorded.commit or "",
            "branch": recorded.branch if recorded.waits else "",
            "versions": named,
            "publish": str(done.publish).lower(),
        }
    )
    return Result(
        {**{each.name: getattr(recorded, each.name) for each in fields(recorded)}, "publish": done.publish},
        lambda: _screen().recorded_parts(recorded),
    )


def _artifacts(args: Namespace) -> Result:
    from pipeline import run_versions

    files = run_versions.collect(_pipeline(args), Path(args.folder))
    return Result({"folder": args.folder, "files": files}, lambda: _screen().artifact_parts(files, args.folder))


def _publish(args: Namespace) -> Result:
    from pipeline.progress import display
    from pipeline.run_publish import Wanted, publish_versions

    if "pending" in args and args.names:
        raise UsageError("--pending publishes what the journal names: versions don't go with it", hint="leave out one or the other")
    if "to" in args and "dry_run" not in args:
        raise UsageError("--to goes with --dry-run", hint="add --dry-run, or leave --to out")
    pipeline = _pipeline(args)
    given = {name: True for name in ("pending", "dry_run", "rows", "weights", "replace") if name in args}
    to = Path(args.to) if "to" in args else None
    wanted = Wanted(tuple(args.names), reviewed=getattr(args, "reviewed", None), to=to, **given)
    with display() as progress:
        done = publish_versions(pipeline, wanted, hub=_hub, remote=lambda: _remote(args, pipeline), progress=progress)
    return Result({each.name: getattr(done, each.name) for each in fields(done)}, lambda: _screen().published_parts(done, wanted.dry_run))


def _hub() -> Hub:
    from pipeline.backends.hub import HubClient

    return HubClient()


def _verify(args: Namespace) -> Result:
    problems = _pipeline(args).verify(full="full" in args)
    return Result({"problems": problems}, lambda: _screen().verify_parts(problems), ArtifactError.exit_code if problems else 0)


def _doctor(args: Namespace) -> Result:
    """With a configuration that can't be read this is one of the things to mend, and the rest is checked without it."""
    from pipeline.machine import Check, doctor, machine_facts

    config, broken = None, []
    try:
        config = _config_if_any(args)
    except ConfigError as error:
        broken = [Check("settings", False, str(error), error.hint or "correct these lines")]
    checks = [*broken, *doctor(machine_facts(config.output_path if config else Path()), config)]
    ok = all(check.ok is not False for check in checks)
    return Result({"ok": ok, "checks": checks}, lambda: _screen().doctor_parts(checks))


def _tune_table(args: Namespace, progress: Display) -> Result:
    """`finetune --input`: the fine-tuner on one formatted table, without pipeline.yaml."""
    if "config" in args or args.overrides:
        raise UsageError("--input trains on that table alone: --config and --set don't go with it", hint="leave out one or the other")
    from pipeline.config import parse_config
    from pipeline.fine_tuner import FineTuner

    config = parse_config(_flag_settings(args), source="the flags of finetune")
    begun = _now()
    rows = _read_formatted_table(Path(args.input))
    try:
        success, metadata = FineTuner("debug" in args, "no_fallback" not in args, progress=progress).process_dataset(
            rows,
            model_name=config.model.name,
            target_topics=getattr(args, "topics", ""),
            output_dir=config.output_dir,
            epochs=config.train.epochs,
            learning_rate=config.train.learning_rate,
            batch_size=config.train.batch_size,
            seed=config.seed,
        )
    except DataError as error:  # the fine-tuner was handed rows and can't know the file's name
        raise DataError(args.input, error.problems, hint=error.hint) from error
    seconds = _now() - begun
    return Result(
        {"success": success, "seconds": round(seconds, 2), "metadata": metadata},
        lambda: _screen().tuned_parts(metadata, Path(config.output_dir), seconds),
        0 if success else BackendError.exit_code,
    )


# --- what commands are made from -------------------------------------------------------------------------------------


def _pipeline(args: Namespace, **settings: Any) -> Pipeline:
    from pipeline import run

    return run.Pipeline(_config(args), **settings)


def _config(args: Namespace) -> PipelineConfig:
    from pipeline.config import DEFAULT_FILE, load_config

    path = Path(getattr(args, "config", DEFAULT_FILE))
    flags = _flag_settings(args, path.resolve().parent) if args.command == "finetune" else {}
    return load_config(path, [*_environment_overrides(), *args.overrides, *_as_overrides(flags)])


def _environment_overrides() -> list[str]:
    """PIPELINE_SET: a KEY=VALUE a line, as --set takes them. What a container's surroundings say of every command in it; and what was
    typed into the form of a manual workflow run."""
    from pipeline import github

    return [line.strip() for line in os.environ.get("PIPELINE_SET", "").splitlines() if line.strip()] + github.input_settings()


def _remote(args: Namespace, pipeline: Pipeline) -> Remote:
    from pipeline.backends.git import GitRemote

    return GitRemote(pipeline.config.root, remote=getattr(args, "remote", "origin"))


def _config_if_any(args: Namespace) -> PipelineConfig | None:
    """What the file or, without one, --set alone says; None where there is neither."""
    from pipeline.config import DEFAULT_FILE, load_config

    if "config" in args or Path(DEFAULT_FILE).exists():
        return _config(args)
    overrides = [*_environment_overrides(), *args.overrides]
    return replace(load_config(os.devnull, overrides), root=Path()) if overrides else None


def _flag_settings(args: Namespace, root: Path = Path()) -> dict[str, Any]:
    """The flags of `finetune` that were given, as a tree of settings whose paths start from `root`; those of flags start here."""
    given = vars(args)
    train = {name: given[name] for name in ("epochs", "learning_rate", "batch_size") if name in given}
    tree: dict[str, Any] = {"seed": given["seed"]} if "seed" in given else {}
    if train:
        tree["train"] = train
    if "model" in given:
        tree["model"] = {"name": given["model"]}
    if "topics" in given:
        tree["prompt"] = {"topic": ", ".join(given["topics"])}
    if "output_dir" in given:
        tree["output_dir"] = given["output_dir"] if root.absolute() == Path.cwd() else str(Path(given["output_dir"]).absolute())
    return tree


def _as_overrides(tree: Mapping[str, Any], prefix: str = "") -> list[str]:
    lines: list[str] = []
    for key, value in tree.items():
        lines += _as_overrides(value, f"{prefix}{key}.") if isinstance(value, dict) else [f"{prefix}{key}={json.dumps(value)}"]
    return lines


def _read_formatted_table(path: Path) -> pd.DataFrame:
    """Every column of a CSV or TSV as text.

    Raises:
        DataError: no such file, wrong encoding, ragged rows, a header that names a column twice.
    """
    import csv

    from pipeline.tables import DELIMITERS, long_cells, read_table

    delimiter = DELIMITERS.get(path.suffix.lower())
    if delimiter is None:
        raise DataError(str(path), ["is not named .csv or .tsv"], hint="--input takes formatted_dataset.csv, which `pipeline format` makes")
    header: list[str] = []
    try:
        with path.open(encoding="utf-8-sig", newline="") as lines, long_cells():
            header = next((row for row in csv.reader(lines, delimiter=delimiter) if row), [])
    except (OSError, ValueError, csv.Error):
        pass  # read_table names what is wrong
    try:
        table = read_table(path, {name.strip(): "--input" for name in header} or {"prompt": "--input", "rating": "--input"})
    except DataError as error:
        hint = error.hint.replace("dataset.path", "--input").replace(", relative to pipeline.yaml", "")
        raise DataError(error.source, error.problems, hint=hint) from error
    import pandas as pd

    return pd.DataFrame(table.values, dtype=object)


def _now() -> float:
    import time

    return time.monotonic()


# --- failure ---------------------------------------------------------------------------------------------------------


def _fail(error: Exception | KeyboardInterrupt, *, as_json: bool, verbose: int) -> int:
    """Says what happened, without a traceback unless -v, and gives the exit code."""
    from pipeline.process import Interrupted, printable, write_error, write_out

    if verbose and not isinstance(error, KeyboardInterrupt | UsageError):
        write_error("".join(traceback.format_exception(error)).rstrip())
    known = _in_our_words(error)
    write_error(printable(f"{known}" if isinstance(known, Interrupted) else f"error: {known}"))
    if known.hint:
        write_error(printable(f"hint: {known.hint}"))
    if as_json:
        kind = type(error if isinstance(error, PipelineError) else known).__name__
        write_out(_json_line({"error": {"type": kind, "message": str(known), "hint": known.hint, "exit_code": known.exit_code}}))
    return known.exit_code


def _in_our_words(error: Exception | KeyboardInterrupt) -> PipelineError:
    """The failure as an error of ours. What is unforeseen is named by type and place: its message may hold text of a record."""
    from pipeline.process import Interrupted

    if isinstance(error, PipelineError):
        return error
    if isinstance(error, KeyboardInterrupt):
        return Interrupted(error)
    if isinstance(error, MemoryError):
        return BackendError("out of memory", hint="close other programs, lower train.batch_size, or choose a smaller base model")
    if isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith("pipeline"):
        return UserError(f"the package {error.name} is not installed", hint="run `uv sync`")
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError("the disk is full", hint="free some space, or name a folder on another disk with output_dir")
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return UserError(f"{error.filename or 'a file'}: {error.strerror}", hint="check the owner and rights of the file and its folder")
    *_, last = traceback.extract_tb(error.__traceback__)
    place = f"{Path(last.filename).name}, line {last.lineno}"
    hint = "please report it with what -v adds; look through that first, it may hold text of your records"
    return PipelineError(f"a bug: {type(error).__name__} in {place}", hint=hint)


if __name__ == "__main__":
    sys.exit(main())
