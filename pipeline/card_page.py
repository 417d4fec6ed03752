"""A card in metadata/ -> README.md for the Hub: the Hub's own fields as front matter, then a page for people.

The page says what the card says and nothing else; what the card does not know, the page calls unknown. All text is escaped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pipeline import card_page_figures as figures
from pipeline import card_page_sections as sections
from pipeline import yaml_text
from pipeline.markdown import Markdown, block, bullets, code, image, link, text
from pipeline.publication import Published

if TYPE_CHECKING:
    from pipeline.version_names import Kind

GGUF, MODEL_SET = "fine_tuned_model.gguf", "model_set_config.json"


@dataclass(frozen=True, slots=True)
class Page:
    """What a page says beside its card. `known`: what is on the Hub already, and can be linked to."""

    repo_id: str
    known: Mapping[Kind, Published] = field(default_factory=dict)
    files: Sequence[str] = ()  # paths that lie beside it in the repository
    plots: Mapping[str, str] = field(default_factory=dict)  # path -> what the picture shows
    configs: Sequence[Mapping[str, Any]] = ()
    dataset_info: Sequence[Mapping[str, Any]] = ()
    notes: Sequence[str] = ()  # on running a model: sentences

    def published(self, kind: Kind, id: str | None) -> Published | None:
        """That version on the Hub, where it is known to be there."""
        found = self.known.get(kind)
        return found if found and id and found.name[:4] == id else None


def readme(kind: Kind, card: Mapping[str, Any], page: Page) -> str:
    """The text of README.md."""
    body = {"dataset": _dataset, "model": _model, "run": _run}[kind](card, page)
    title = f"# {text(card['pipeline']['project'])}: {text(_title(kind, card['pipeline']))}"
    shown = [f"## {heading}\n\n{said}" for heading, said in body if said and heading] + []
    opening = [said for heading, said in body if said and not heading]
    return "\n\n".join([f"---\n{yaml_text.dump(front_matter(kind, card, page))}---", title, *opening, *shown]) + "\n"


def front_matter(kind: Kind, card: Mapping[str, Any], page: Page) -> dict[str, Any]:
    """The card's fields for the Hub, with what is published named by its ID there; of the product's own, what identifies the version."""
    about = card["pipeline"]
    told = {name: value for name, value in card.items() if name not in ("pipeline", "configs", "datasets", "source_datasets")}
    dataset = page.published("dataset", _dataset_id(card))
    if dataset:
        told["datasets" if kind == "model" else "source_datasets"] = [dataset.repo_id]
    if told.get("model-index"):
        results = [_result(result, about["version"], page) for result in told["model-index"][0]["results"]]
        told["model-index"] = [{**told["model-index"][0], "results": results}]
    if page.configs:
        told["configs"] = [dict(config) for config in page.configs]
    if page.dataset_info:
        told["dataset_info"] = [dict(info) for info in page.dataset_info]
        if len(page.dataset_info) == 1:
            [told["dataset_info"]] = told["dataset_info"]
    told["pipeline"] = {name: about[name] for name in ("schema_version", "project", "kind", "id", "name", "version", "key")}
    return told


def _result(result: Mapping[str, Any], version: str, page: Page) -> dict[str, Any]:
    """A result with the dataset and the run that it comes from, as far as they are on the Hub."""
    dataset = dict(result["dataset"])
    if on_hub := page.published("dataset", str(dataset["name"])[:4]):
        dataset |= {"type": on_hub.repo_id, "revision": on_hub.commit}
    run = page.known.get("run")
    source = {"source": {"name": run.name, "url": run.url}} if run and f"-model-{version}-data-" in run.name else {}
    return {**result, "dataset": dataset, **source}


def _dataset_id(card: Mapping[str, Any]) -> str | None:
    lineage = (card["pipeline"].get("lineage") or {}).get("dataset")
    return str(lineage.get("id")) if isinstance(lineage, Mapping) else None


def _title(kind: Kind, about: Mapping[str, Any]) -> str:
    return " / ".join(about["names"]) if kind == "dataset" else str(about["name"])


Section = tuple[str, Markdown]  # heading ("" for the opening) and text


# --- the three -------------------------------------------------------------------------------------------------------


def _model(card: Mapping[str, Any], page: Page) -> list[Section]:
    about = card["pipeline"]
    tuned, base = about["approach"]["method"] == "lora", about.get("base") or {}
    metrics = about.get("metrics") or {}
    own = "fine_tuned" if tuned else "model_set"
    name = code(base["name"]) if base.get("name") else "a base model that was not found where this was made"
    what = (
        f"A small language model that rates a record and says why: {name}, fine-tuned with LoRA on rows that experts rated."
        if tuned
        else f"Instruction and solved examples for {name}, so that it rates a record and says why. No weights were changed:"
        f" {text(about['approach'].get('reason') or 'the reason is not recorded')}."
    )
    return [
        ("", figures.verdict(metrics.get("verdict"))),
        ("", Markdown(what)),
        ("Results", _results(metrics, own, page)),
        ("Use and limits", sections.model_limits(tuned)),
        ("How to run it", _how_to_run(about, tuned, page)),
        ("Data", sections.data_of_model(about, page.published("dataset", _dataset_id(card)))),
        ("Training", sections.training(about)),
        *_endings("model", card, page),
    ]


def _dataset(card: Mapping[str, Any], page: Page) -> list[Section]:
    about = card["pipeline"]
    rows = about["data_quality"]["rows_kept"]
    opening = f"**{rows} records that experts rated, each with a rating and a reason,** split into training, validation and test rows."
    if page.configs:
        load = block(
            f'from datasets import load_dataset\n\nrows = load_dataset("{page.repo_id}", revision="{about["name"]}", split="test")',
            "python",
        )
    else:
        load = Markdown("The rows are not published; this page and the card beside it hold counts and figures only.")
    return [
        ("", Markdown(opening)),
        ("Data", sections.data(about)),
        ("Quality", sections.quality(about["data_quality"])),
        ("How to load it", load),
        ("Use and limits", sections.dataset_limits()),
        *_endings("dataset", card, page),
    ]


def _run(card: Mapping[str, Any], page: Page) -> list[Section]:
    about = card["pipeline"]
    load = [f'load_dataset("{page.repo_id}", "{config["config_name"]}", revision="{about["name"]}")' for config in page.configs]
    return [
        ("", figures.verdict(about.get("verdict"))),
        ("", Markdown("Base, fine-tuned and other systems on the same frozen test rows, which training never saw.")),
        ("Results", _results(about, about.get("primary") or "", page)),
        ("Gates", figures.gates(about.get("gates") or ())),
        ("Notes", bullets(about.get("notes") or ())),
        ("How to load it", block("from datasets import load_dataset\n\n" + "\n".join(load), "python") if load else Markdown()),
        ("Use and limits", sections.run_limits()),
        *_endings("run", card, page),
    ]


# --- parts -----------------------------------------------------------------------------------------------------------


def _results(told: Mapping[str, Any], own: str, page: Page) -> Markdown:
    pictures = [image(path, alt) for path, alt in page.plots.items()]
    if not told.get("systems"):
        return Markdown("\n\n".join(["How good it is, is unknown: it has not been evaluated.", *pictures]))
    parts = [figures.systems(told), *pictures, figures.comparisons(told), figures.ratings(told, own), figures.rationales(told)]
    return Markdown("\n\n".join(part for part in parts if part))


def _how_to_run(about: Mapping[str, Any], tuned: bool, page: Page) -> Markdown:
    here = about.get("how_to_run") or {}
    local = [command for name in ("ollama", "llama.cpp") for command in _lines(here.get(name))]
    parts = []
    if GGUF in page.files:
        lines = f"ollama run hf.co/{page.repo_id}:{GGUF}\nllama-server --hf-repo {page.repo_id} --hf-file {GGUF}"
        parts += [block(lines), text("While the repository is private, Ollama needs your key in your account on the Hub.")]
    elif tuned:
        parts += [
            Markdown("The weights are not published. In the project's folder, on the machine that made them or after the command below:")
        ]
        parts += [block("\n".join(local))] if local else []
    elif MODEL_SET in page.files:
        parts += [
            Markdown(f"{code(MODEL_SET)} holds the messages and options: send them to the base model with your record as the last turn.")
        ]
    else:
        parts += [Markdown("The model set holds solved examples from the records and is not published. In the project's folder:")]
        parts += [block("\n".join(local))] if local else [text(here.get("elsewhere") or "")]
    parts += [text(note) for note in page.notes]
    if here.get("prompt"):
        parts.append(text(f"What it expects: {here['prompt']}."))
    return Markdown("\n\n".join(part for part in parts if part))


def _lines(commands: Any) -> list[str]:
    return [commands] if isinstance(commands, str) else list(commands or ())


def _endings(kind: Kind, card: Mapping[str, Any], page: Page) -> list[Section]:
    about = card["pipeline"]
    beside = f"{kind}_card.yaml"
    full = link(beside, None) if beside not in page.files else Markdown(f"[{beside}]({beside})")
    return [
        ("Lineage", sections.lineage(about, page.known)),
        ("Make it again", sections.reproduce(about)),
        ("Licence", sections.licence(kind, card)),
        ("What is unknown", bullets(about.get("unknown") or ["nothing that this card knows of"])),
        ("Versions", Markdown(f"{sections.versions(about)}\n\nThe whole record of this version: {full}.")),
    ]
