"""argv -> argparse.Namespace: the commands, their options and their help.

An option that is not given is absent: defaults live in config.py.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

from pipeline import __version__
from pipeline.errors import UserError

STAGES = ("format", "finetune", "infer", "evaluate", "version", "report", "register")  # those of run.py, which loads too much for a --help


class UsageError(UserError):
    """argv is not a command of this program."""


@dataclass(frozen=True)
class Command:
    """The texts of one command: a line, a paragraph, and (command line, what it does) pairs."""

    help: str
    description: str
    examples: tuple[tuple[str, str], ...]


COMMANDS = {
    "run": Command(
        "do the whole job: format, finetune, infer, evaluate, version, report, register",
        "Does the whole job and ends with a verdict: formats the rated table, fine-tunes the model (or makes a model set where that can't "
        "be), lets every system answer the test rows, scores the answers, allocates versions, writes the cards and the report. Stages "
        "whose inputs did not change are not run again; an interrupted run goes on where it stopped. "
        "Exit codes 100 and 101 say that an evaluation gate failed or could not be decided.",
        (
            ("pipeline run", "everything that pipeline.yaml in this folder asks for"),
            ("pipeline run --set train.epochs=5 --set seed=7", "the same with other settings"),
            ("pipeline run --until finetune --force", "format and train anew, then stop"),
        ),
    ),
    "plan": Command(
        "show what `run` would do, and how long it would take",
        "Shows each stage with what would happen to it: run, or taken from what an earlier run left, why, and about how long. "
        "Nothing is run and nothing is written.",
        (("pipeline plan", "before a long run"), ("pipeline plan --set train.epochs=5", "what one changed setting would cost")),
    ),
    "format": Command(
        "rated table -> formatted_dataset.csv",
        "Reads the rated table, standardises the ratings, builds the prompts, splits the rows into train, valid and test, and writes "
        "formatted_dataset.csv with data_quality.json beside it. What is wrong with the table is named by row and column, all at once.",
        (
            ("pipeline format", "check a new table before training on it"),
            ("pipeline format --set dataset.path=data/mine.csv", "another table"),
        ),
    ),
    "finetune": Command(
        "formatted rows -> fine_tuned_model.gguf, or model_set_config.json",
        "Fine-tunes the base model on the formatted rows and checks that the merged file answers as the trained model does. Where the "
        "model can't be trained, a model set is made instead, unless --no-fallback is given. With --input it works on that formatted "
        "CSV alone and needs no pipeline.yaml; without it, it works on what pipeline.yaml describes, and the flags go above the "
        "file's settings.",
        (
            ("pipeline finetune", "what pipeline.yaml describes, formatting first when that is due"),
            (
                'pipeline finetune --input outputs/formatted_dataset.csv --topics "respiratory infections" --epochs 3',
                "one table alone",
            ),
        ),
    ),
    "infer": Command(
        "test rows x systems -> outputs.jsonl",
        "Lets each system (base, fine-tuned, model set) answer the test rows. Answers that are there already are kept, so that an "
        "interrupted run goes on row by row. The stages before it are run when they are due.",
        (("pipeline infer", "the answers, without scores"),),
    ),
    "evaluate": Command(
        "outputs.jsonl -> scores.json and a verdict",
        "Scores the answers and compares the systems on the same rows, with intervals. The stages before it are run when they are due. "
        "Exit codes 100 and 101 say that an evaluation gate failed or could not be decided.",
        (("pipeline evaluate", "scores and verdict"), ("pipeline evaluate --json | jq .systems", "the figures for a program")),
    ),
    "register": Command(
        "what was made -> a model of the Ollama server",
        "Keeps the fine-tuned model (or the model set) on the Ollama server under its version's name, so that others can call it. With "
        "model.engine: embedded there is no server and nothing happens. The stages before it are run when they are due: what another "
        "engine answered is asked of the server first.",
        (
            ("pipeline register", "register it again after it was deleted from the server"),
            ("pipeline register --replace", "also where the server has another model of that name"),
        ),
    ),
    "report": Command(
        "scores -> report.html and summary.md",
        "Writes the report page and the summary. The stages before it are run when they are due, so this does what `pipeline run` does.",
        (("pipeline report", "write the pages again after they were deleted"),),
    ),
    "version": Command(
        "show versions; hold them before a run, record them after it",
        "Without an ACTION, shows the versions recorded under metadata/, and which ones the present configuration has or would get. "
        "`reserve` looks whether anything changed since the last recorded run and, if so, holds the next IDs and numbers on the remote, "
        "so that two runs at once never get the same. `record` makes one commit of what a run left in metadata/ on the remote's newest "
        "state and pushes it together with the version tags; what others recorded meanwhile stays, and a version whose ID was taken gets "
        "another. Neither touches your branch, index or files, except that `record` moves your branch on where it can. After a branch is "
        "merged, `record` gives the run that was made on it its versions. In a workflow both hand on what they did as step outputs.",
        (
            ("pipeline version --explain", "which value changed from what to what"),
            ("pipeline version reserve --dry-run", "would a run make new versions, and which"),
            ("pipeline version record", "commit, tag and push what the last run made"),
            ("pipeline version record --from handover --reservation 5d1c07e9a2b4f386", "in CI: what another job's run left"),
        ),
    ),
    "verify": Command(
        "check that metadata and outputs are whole",
        "Reads versions, cards and output files and names everything that contradicts what was recorded. Exit code 4 when there is "
        "a problem.",
        (("pipeline verify", "after a merge, or before publishing"), ("pipeline verify --json", "the problems for a program")),
    ),
    "artifacts": Command(
        "copy what CI may keep of a run",
        "Copies the metadata folder and what `publish.artifacts` lists into a new folder. The default list holds no record text.",
        (("pipeline artifacts outputs/artifacts", "what a workflow uploads"),),
    ),
    "publish": Command(
        "cards and metrics of a version -> the Hugging Face Hub",
        "Publishes the current versions, or those named, to NAMESPACE/PROJECT-dataset, -model and -runs, a tag for each version. Cards and "
        "metrics go by default; rows and weights only when told. Before anything leaves, all of it is looked through for what seems "
        "personal; exit code 5 names the places. What is there already is not sent again. The token is that of HF_TOKEN; without one the "
        "workflow's own identity is used (Trusted Publishers).",
        (
            ("pipeline publish --dry-run", "every file and field that would go"),
            ("pipeline publish --pending", "what was recorded and not published yet"),
            ("pipeline publish 0003-model-1.0.1.0 --weights", "an older version, with its GGUF from the output folder"),
        ),
    ),
    "doctor": Command(
        "say what this machine can do, and what to do about what is missing",
        "Looks at processor, memory, disk, packages, base model, GPU, Docker and Ollama, and at the dataset and output folder when there "
        "is a pipeline.yaml; it works without one. Its exit code is 0 whatever it finds: with --json, `ok` says whether all that is "
        "needed is here.",
        (
            ("pipeline doctor", "on a new machine"),
            ("pipeline doctor --set model.name=hf.co/OWNER/REPO/FILE.gguf", "for another base model"),
        ),
    ),
}


class _Formatter(argparse.HelpFormatter):
    """Fills paragraphs to the terminal's width and leaves the examples as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if text.startswith("example"):
            return text
        return super()._fill_text(text, width, indent)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message, hint=f"`{self.prog} --help` shows what there is")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """`command`, the lists `overrides` and the number `verbose` always; of the rest only what was given.

    Raises:
        UsageError: argv makes no sense. SystemExit: after --help or --version.
    """
    args = make_parser().parse_args(list(argv))
    args.overrides = getattr(args, "early_overrides", []) + getattr(args, "overrides", [])
    args.verbose = getattr(args, "early_verbose", 0) + getattr(args, "verbose", 0)
    return args


def make_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="pipeline",
        description="Fine-tunes a small language model on records that experts rated, compares it honestly with its base, and versions and "
        "documents what comes out.",
        epilog="examples:\n  pipeline run           the whole job, as pipeline.yaml describes it\n"
        "  pipeline doctor        what this machine can do\n  pipeline run --help    what a command does and takes",
        formatter_class=_Formatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    _shared_options(parser, early="early_")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands", required=True)
    for name, texts in COMMANDS.items():
        command = commands.add_parser(
            name,
            help=texts.help,
            description=texts.description,
            epilog=_examples(texts),
            formatter_class=_Formatter,
            allow_abbrev=False,
            argument_default=argparse.SUPPRESS,
        )
        _own_options(name, command)
        _shared_options(command)
    return parser


def _examples(command: Command) -> str:
    lines = [f"  {line}\n      {what}" for line, what in command.examples]
    return "\n".join(["example:" if len(lines) == 1 else "examples:", *lines])


def _shared_options(parser: argparse.ArgumentParser, early: str = "") -> None:
    """Those that stand before the command or after it; `early` keeps the two apart where both count."""
    group = parser.add_argument_group("options of every command")
    group.add_argument("--config", metavar="FILE", help="the configuration (default: pipeline.yaml in this folder)")
    group.add_argument(
        "--set",
        metavar="KEY=VALUE",
        dest=f"{early}overrides",
        action="append",
        help="a setting above the file's, such as train.epochs=5; may be repeated",
    )
    group.add_argument("--json", action="store_true", help="print one JSON object on stdout and nothing else")
    group.add_argument(
        "-v",
        "--verbose",
        dest=f"{early}verbose",
        action="count",
        help="log more and show tracebacks; twice: still more, which may hold record text",
    )
    group.add_argument("--debug", action="store_true", help="keep a debug log of fine-tuning in the output folder (may hold record text)")
    group.add_argument("--version", action="version", version=f"pipeline {__version__}", help="show the version of this program and leave")


def _own_options(name: str, parser: argparse.ArgumentParser) -> None:
    if name == "finetune":
        _finetune_options(parser)
    if name == "run":
        parser.add_argument("--force", action="store_true", help="run every stage anew, changed or not")
        parser.add_argument("--until", metavar="STAGE", choices=STAGES, help=f"stop after this stage: {', '.join(STAGES)}")
    if name in ("run", "register"):
        parser.add_argument("--replace", action="store_true", help="replace a model of the Ollama server that has the version's name")
    if name in ("run", "finetune"):
        parser.add_argument(
            "--no-fallback", action="store_true", help="fail where the model can't be trained, instead of making a model set"
        )
    if name == "version":
        _version_options(parser)
    if name == "verify":
        parser.add_argument("--full", action="store_true", help="read every record again, also those that were found whole before")
    if name == "artifacts":
        parser.add_argument("folder", metavar="FOLDER", help="where to copy to; new or empty")
    if name == "publish":
        _publish_options(parser)


def _version_options(parser: argparse.ArgumentParser) -> None:
    actions = ("reserve", "record")
    parser.add_argument("action", metavar="ACTION", nargs="?", default=None, choices=actions, help="reserve or record; without one, show")
    parser.add_argument("--explain", action="store_true", help="say which values changed, from what to what")
    parser.add_argument("--dry-run", action="store_true", help="reserve: say what would be held, and hold nothing")
    parser.add_argument(
        "--hold-minutes", metavar="N", type=int, help="reserve: how long a run may take before it counts as lost (default: 720)"
    )
    parser.add_argument(
        "--from", metavar="FOLDER", dest="source", help="record: a folder with the metadata of another job's run; it may be missing"
    )
    parser.add_argument("--reservation", metavar="CODE", help="record: which reservation the run had")
    parser.add_argument("--remote", metavar="NAME", help="reserve, record: the git remote (default: origin)")
    parser.add_argument(
        "--pull-request", action="store_true", help="record: push a branch for a pull request; reserve: leave what was abandoned to it"
    )


def _publish_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("names", metavar="NAME", nargs="*", default=[], help="versions; without any, those that the cards describe")
    parser.add_argument("--pending", action="store_true", help="what is recorded as waiting, and nothing else")
    parser.add_argument("--dry-run", action="store_true", help="show every file and field that would go, and send nothing")
    parser.add_argument("--to", metavar="FOLDER", help="with --dry-run: write the files here, to look at; new or empty")
    parser.add_argument("--rows", action="store_true", help="also the rows and answers, which are record text")
    parser.add_argument("--weights", action="store_true", help="also the model's GGUF, with what Ollama needs to run it")
    parser.add_argument(
        "--replace", action="store_true", help="also what is there with other content: a new commit, to which the tag moves"
    )
    parser.add_argument("--reviewed", metavar="CODE", help="let exactly the findings pass that were shown with this code")


def _finetune_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--input", metavar="FILE", help="a formatted CSV: fine-tune on it alone, without pipeline.yaml")
    parser.add_argument("--model", metavar="NAME", help="the base model: a GGUF file, the embedded default, or hf.co/OWNER/REPO/FILE.gguf")
    parser.add_argument("--topics", metavar="TOPIC", nargs="+", help="what the ratings are about; one or more")
    parser.add_argument("--output-dir", metavar="FOLDER", help="where the results go")
    parser.add_argument("--epochs", metavar="N", type=int, help="times over the rows")
    parser.add_argument("--learning-rate", metavar="RATE", type=float, help="step size, such as 0.0001")
    parser.add_argument("--batch-size", metavar="N", type=int, help="rows per step")
    parser.add_argument("--seed", metavar="N", type=int, help="of everything random")
