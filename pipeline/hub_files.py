"""All files of one version as they would lie on the Hub: page, card, plots, figures; rows and weights each by their own switch only."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import yaml_text
from pipeline.card_checks import validate_card
from pipeline.card_page import GGUF, MODEL_SET, Page, front_matter, readme
from pipeline.config import PipelineConfig
from pipeline.errors import ArtifactError, UserError
from pipeline.hub_rows import Config, answers, dataset_rows, metrics
from pipeline.publication import Publication, Published
from pipeline.store import digest_file, read_json

if TYPE_CHECKING:
    from pipeline.version_names import Kind

Files = dict[str, bytes | Path]
_SUFFIXES: Mapping[Kind, str] = {"dataset": "dataset", "model": "model", "run": "runs"}
_STAGES = {
    "formatted_dataset.csv": "format", GGUF: "finetune", "adapter.gguf": "finetune", MODEL_SET: "finetune", "outputs.jsonl": "infer",
    "fine_tuning_metadata.json": "finetune",
}  # fmt: skip
_OLLAMA_CONTEXT = 4096  # tokens that Ollama gives a chat by default


def repo_id(kind: Kind, config: PipelineConfig) -> str:
    """NAMESPACE/PROJECT-model, -dataset or -runs.

    Raises:
        UserError: publish.namespace is not set, or the Hub takes no such name.
    """
    namespace = config.publish.namespace
    if not namespace:
        raise UserError("publish.namespace is not set", hint="set it to your user name or organisation on the Hub")
    name = f"{namespace}/{config.project}-{_SUFFIXES[kind]}"
    if any(line.startswith("base_model") for line in validate_card("model", {"base_model": name})):
        raise UserError(
            f"{name} can't be a repository on the Hub", hint="letters, digits, single - and _ and . only: see publish.namespace, project"
        )
    return name


def publication(
    kind: Kind,
    card: Mapping[str, Any],
    *,
    config: PipelineConfig,
    known: Mapping[Kind, Published],
    outputs: Path | None,
    weights: bool = False,
    rows: bool = False,
) -> Publication:
    """
    Args:
        card: of this version, as metadata/ has or had it.
        known: what is on the Hub already; the page links to it.
        outputs: the folder that the run left; needed for weights and rows only.
        weights, rows: whether model files, and whether anything that holds record text, go along.

    Raises:
        UserError: a file is not there, or is not the one that the card was made from; says which stage makes it.
        ArtifactError: a file is damaged, or the card breaks the Hub's rules.
    """
    from pipeline.backends import plots

    files: Files = {f"{kind}_card.yaml": yaml_text.dump(card).encode("utf-8")}
    pictures = {f"plots/{name}": plot for name, plot in plots.draw(card).items()}
    files |= {path: plot.png for path, plot in pictures.items()}
    configs: list[Config] = []
    notes: list[str] = []
    if kind == "run":
        configs.append(metrics(card))
        if rows:
            sources = [_source(outputs, name, card) for name in ("outputs.jsonl", "formatted_dataset.csv")]
            configs.insert(0, answers(sources[0], sources[1], card))
    elif kind == "dataset" and rows:
        configs.append(dataset_rows(_source(outputs, "formatted_dataset.csv", card), card))
    elif kind == "model" and card["pipeline"]["approach"]["method"] == "model_set":
        files |= {MODEL_SET: _source(outputs, MODEL_SET, card)} if rows else {}
    elif kind == "model" and weights:
        model_files, notes = _weights(card, outputs)
        files |= model_files
    for subset in configs:
        files |= subset.files
    page = Page(
        repo_id(kind, config), known, tuple(files), {path: plot.alt for path, plot in pictures.items()},
        tuple(subset.entry for subset in configs), tuple(subset.info for subset in configs), tuple(notes),
    )  # fmt: skip
    if problems := validate_card(kind, front_matter(kind, card, page)):
        raise ArtifactError(f"README.md of the {kind} breaks the Hub's rules:\n" + "\n".join(f"  - {problem}" for problem in problems))
    files = {"README.md": readme(kind, card, page).encode("utf-8"), **files}
    return Publication(kind, card["pipeline"]["name"], page.repo_id, config.publish.private, files)


# --- sources ---------------------------------------------------------------------------------------------------------


def _source(outputs: Path | None, name: str, card: Mapping[str, Any]) -> Path:
    """A file of the run, if it is the one that this version was made with: another one under this version's name would be a lie."""
    again = f"make it: `pipeline {_STAGES[name]}`, or publish without it"
    if outputs is None:
        raise UserError(f"{card['pipeline']['name']}: {name} of this version is not here", hint=again)
    path = outputs / name
    if not path.is_file():
        raise UserError(f"{path}: no such file", hint=again)
    expected = _digests(card, name, outputs)
    if expected and digest_file(path) not in expected:
        raise UserError(
            f"{path}: is not the file that {card['pipeline']['name']} was made with",
            hint=f"`pipeline run` with the configuration of that version makes it again (stage {_STAGES[name]})",
        )
    return path


def _digests(card: Mapping[str, Any], name: str, outputs: Path) -> set[str]:
    """What the card, or what the stage left beside the file, says that its digest is."""
    about = card["pipeline"]
    primary = {"dataset": "formatted_dataset.csv", "model": GGUF if about.get("approach", {}).get("method") == "lora" else MODEL_SET}
    if name == primary.get(about["kind"]):
        return {build["artifact"] for build in about.get("builds") or () if build.get("artifact")}
    if name == "adapter.gguf":
        made = outputs / "fine_tuning_metadata.json"
        return {str(digest) for digest in [(read_json(made).get("digests") or {}).get(name)] if digest} if made.is_file() else set()
    digest = (about.get("lineage") or {}).get(name)
    return {digest} if isinstance(digest, str) else set()


def _weights(card: Mapping[str, Any], outputs: Path | None) -> tuple[Files, list[str]]:
    """The model's files and those by which Ollama talks to it as it was trained; what is to be said of them."""
    gguf = _source(outputs, GGUF, card)
    files: Files = {GGUF: gguf, "adapter.gguf": _source(outputs, "adapter.gguf", card)}
    template, system, parameters = _manner(gguf)
    notes = []
    if template is None:
        notes.append("Ollama chooses a chat template by the one in the file; whether it puts a chat into the same words was not checked.")
    else:
        files["template"] = template.encode("utf-8")
    if system:
        files["system"] = system.encode("utf-8")
    about = card["pipeline"]
    settings = about.get("hyperparameters") or {}
    generate, prompt = settings.get("generate") or {}, settings.get("prompt_max_tokens") or 0
    longest = max(_OLLAMA_CONTEXT, prompt + generate.get("max_tokens", 0))
    params = {
        **parameters,
        "temperature": generate.get("temperature", 0.0),
        "num_predict": generate.get("max_tokens", 160),
        "num_ctx": min(longest, (about.get("base") or {}).get("context_length") or longest),
    }
    files["params"] = (json.dumps(params, ensure_ascii=False, indent=2, sort_keys=True) + "\n").encode("utf-8")
    return files, notes


def _manner(gguf: Path) -> tuple[str | None, str | None, dict[str, Any]]:
    """Template, system text and parameters: the server's where one served the model, else the file's own where it is known in Go."""
    made = gguf.with_name("fine_tuning_metadata.json")
    manner = read_json(made).get("served_with") if made.is_file() else None
    if manner is not None:
        return manner.get("template"), manner.get("system"), dict(manner.get("parameters") or {})
    from pipeline.backends.go_template import go_template

    found = go_template(gguf)
    return (found.template, found.system, {"stop": list(found.stop)}) if found else (None, None, {})
