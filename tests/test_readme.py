"""The README says what is there: commands, configuration, examples, exit codes, files, links."""

from __future__ import annotations

import ast
import csv
import dataclasses
import inspect
import io
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import yaml

from pipeline import errors, run
from pipeline.arguments import COMMANDS, make_parser, parse
from pipeline.config import PipelineConfig, parse_config
from pipeline.evaluation_gates import check_gates
from pipeline.fine_tuner import FineTuner
from pipeline.formatter_promptbuilder import format_dataset

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    """The text under a second-level heading."""
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", README, re.MULTILINE | re.DOTALL)
    assert found, f"README.md has no section {title!r}"
    return found[1]


def blocks(language: str, text: str = README) -> list[str]:
    """Fenced blocks of a language, their indentation taken off."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^\1```$", text, re.MULTILINE | re.DOTALL)
    return [re.sub(rf"^{indent}", "", body, flags=re.MULTILINE) for indent, body in found]


def table(title: str) -> list[list[str]]:
    """The cells of a section's first table, header and rule left out."""
    lines = [line for line in section(title).splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines[2:]]


# --- commands --------------------------------------------------------------------------------------------------------


def test_the_table_has_every_command_and_no_other() -> None:
    named = [row[0].strip("`").removeprefix("pipeline ") for row in table("Commands")]
    assert [name for name in named if " " not in name] == list(COMMANDS)
    assert [name for name in named if " " in name] == ["version reserve", "version record"]


def command_lines() -> list[list[str]]:
    """Every `pipeline …` in a shell block, as arguments."""
    import shlex

    lines = "\n".join(blocks("bash")).replace("\\\n", " ").splitlines()
    found = [shlex.split(line, comments=True) for line in lines]
    return [words[words.index("pipeline") + 1 :] for words in found if "pipeline" in words]


def test_command_lines_are_understood() -> None:
    lines = command_lines()
    assert len(lines) >= 4
    for arguments in lines:
        assert parse(arguments).command in COMMANDS


def test_options_that_are_named_exist() -> None:
    known = set(re.findall(r"--[a-z][a-z-]+", "".join(_help_of_all())))
    others = {"--require-hashes", "--no-deps", "--rm", "--build", "--profile", "--exit-code-from", "--ours"}  # of pip, Compose, git
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README)) - others <= known


def _help_of_all() -> Iterator[str]:
    parser = make_parser()
    yield parser.format_help()
    for action in parser._subparsers._group_actions if parser._subparsers else ():
        choices: Any = action.choices
        for command in choices.values():
            yield command.format_help()


def test_the_two_commands() -> None:
    first = blocks("bash", section("Start"))[0].splitlines()
    assert [line.partition("#")[0].strip() for line in first] == ["uv run pipeline run", "uv run pytest"]


def test_the_stages_of_the_command_line_are_those_that_run() -> None:
    from pipeline import arguments

    assert arguments.STAGES == run.STAGES


# --- configuration ---------------------------------------------------------------------------------------------------


def leaves(kind: Any, prefix: str = "") -> Iterator[str]:
    """Every key of pipeline.yaml, sections followed down."""
    for name, hint in get_type_hints(kind).items():
        if name == "root":
            continue
        if dataclasses.is_dataclass(hint):
            yield from leaves(hint, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def documented() -> dict[str, str]:
    return {row[0].strip("`"): row[1].strip("`") for row in table("Configuration")}


def test_every_key_is_documented_and_no_other() -> None:
    assert list(documented()) == list(leaves(PipelineConfig))


def test_documented_defaults_are_the_defaults() -> None:
    plain = parse_config({})
    for key, text in documented().items():
        tree: dict[str, Any] = {}
        *parents, last = key.split(".")
        place = tree
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = yaml.safe_load(text)
        assert parse_config(tree) == plain, f"{key}: {text}"


def test_another_default_is_noticed() -> None:
    assert parse_config({"train": {"epochs": 4}}) != parse_config({})


def test_examples_of_configuration_are_valid() -> None:
    examples = blocks("yaml")
    assert len(examples) == 3
    for example in examples:
        config = parse_config(yaml.safe_load(example))
        gates = check_gates(config.evaluate, systems=["base", "fine_tuned"], scale=config.dataset.scale)
        assert len(gates) == len(config.evaluate.gates)


def test_own_data_as_described(tmp_path: Path) -> None:
    """The table and the configuration of the README fit together: a longer table of that kind is formatted."""
    own = section("Your own data in five minutes")
    header, *rows = list(csv.reader(io.StringIO(blocks("csv", own)[0])))
    with (tmp_path / "tickets.csv").open("w", encoding="utf-8", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(header)
        for n in range(60):
            _, _, subject, body, verdict, reason = rows[n % 3]
            words = " ".join(f"{n}-{k}-{chr(97 + n % 26) * (k + 2)}" for k in range(12))
            writer.writerow([f"T-{n}", f"C-{n}", subject, f"{body} {words}", verdict, reason])
    config = parse_config(yaml.safe_load(blocks("yaml", own)[0]), root=tmp_path)
    quality = format_dataset(config, config.output_path)
    assert quality.rows_kept == 60
    assert {label for split in quality.splits.values() for label in split.labels} == {"Billing", "Not Billing", "Unclear"}


# --- Python, exit codes, models --------------------------------------------------------------------------------------


def test_the_python_example_calls_what_is_there() -> None:
    (code,) = blocks("python")
    calls = {
        node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", ""): {word.arg for word in node.keywords}
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.Call)
    }
    assert calls["FineTuner"] <= set(inspect.signature(FineTuner).parameters)
    assert calls["process_dataset"] <= set(inspect.signature(FineTuner.process_dataset).parameters)


def test_exit_codes_are_those_of_the_errors() -> None:
    documented = {int(code) for row in table("Exit codes") for code in row[0].split(",")}
    kinds = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, errors.PipelineError)]
    others = {0, errors.GATE_FAILED, errors.GATE_INCONCLUSIVE, errors.INTERRUPTED, errors.TERMINATED}
    assert documented == {kind.exit_code for kind in kinds} | others


def test_architectures_are_those_that_train() -> None:
    source = ast.parse((ROOT / "pipeline" / "backends" / "lora_model.py").read_text(encoding="utf-8"))
    named = {ast.unparse(node.target): node.value for node in source.body if isinstance(node, ast.AnnAssign)}
    table_of = named["ARCHITECTURES"]
    assert isinstance(table_of, ast.Dict)
    known = [ast.literal_eval(key) for key in table_of.keys if key]
    sentence = next(line for line in section("Base models").splitlines() if line.startswith("Models of the architectures"))
    assert re.findall(r"`([a-z0-9]+)`", sentence) == known


# --- files and links -------------------------------------------------------------------------------------------------


def tree() -> dict[str, str]:
    """path -> its line's description, from the README's file tree."""
    found: dict[str, str] = {}
    folders: list[str] = []
    for line in blocks("", section("Files of the project"))[0].splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        name, _, words = line.strip().partition(" ")
        folders = [*folders[:depth], name]
        found["".join(folders)] = words.strip()
    return found


def test_the_tree_is_the_real_one() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("needs the git repository, to know which files belong to it")
    listed = subprocess.run(
        ["git", "-c", "safe.directory=*", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    real = set()
    for name in listed.stdout.splitlines():
        if not (ROOT / name).exists():
            continue  # deleted, and not committed yet
        parts = name.split("/")
        real.add(name if parts[0] == "pipeline" or len(parts) == 1 else f"{parts[0]}/")
    named = {path for path in tree() if path not in ("pipeline/", "pipeline/backends/")}
    assert named == real


def test_every_file_has_a_line() -> None:
    assert not [path for path, words in tree().items() if not words and not path.endswith("/")]


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "data/README.md", "metadata/README.md"])
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    headings = {re.sub(r"[^\w -]", "", line.lstrip("# ").lower()).replace(" ", "-") for line in text.splitlines() if line.startswith("#")}
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("#"):
            assert target[1:] in headings, target
        elif not target.startswith("https://"):
            assert ((ROOT / page).parent / target.partition("#")[0]).exists(), target


def test_files_that_contributing_names_exist() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for name in re.findall(r"`([\w./]+\.(?:py|yaml|toml|lock|md))`", text):
        if name == "uv.lock":  # made by uv, never committed
            continue
        assert (ROOT / name).exists() or (ROOT / "pipeline" / name).exists(), name
