"""A card in metadata/ -> README.md for the Hub: the Hub's own fields as front matter, then a page for people.

The page says what the card says and nothing else; what the card does not know, the page calls unknown. All text is escaped.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pipeline import card_page_figures as figures
from pipeline import card_page_sections as sections
from pipeline import yaml_text
from pipeline.markdown import Markdown, block, bullets, code, image, line, link, text
from pipeline.prompts import answer_schema, heading
from pipeline.publication import Published
from pipeline.records import Rating, RatingScale

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

    def run_of(self, version: str) -> Published | None:
        """The run of that model version, where it is known to be there."""
        run = self.known.get("run")
        return run if run and f"-model-{version}-data-" in run.name else None


def readme(kind: Kind, card: Mapping[str, Any], page: Page) -> str:
    """The text of README.md."""
    body = {"dataset": _dataset, "model": _model, "run": _run}[kind](card, page)
    title = f"# {text(_title(kind, card['pipeline']))}"
    shown = [f"## {name}\n\n{said}" for name, said in body if said and name]
    opening = [_names(kind, card, page), *(said for name, said in body if said and not name)]
    return "\n\n".join([f"---\n{yaml_text.dump(front_matter(kind, card, page))}---", title, *opening, *shown]) + "\n"


def front_matter(kind: Kind, card: Mapping[str, Any], page: Page) -> dict[str, Any]:
    """The card's fields for the Hub, with what is published named by its ID there; of the product's own, what identifies the version."""
    about = card["pipeline"]
    told = {name: value for name, value in card.items() if name not in ("pipeline", "configs", "datasets", "source_datasets")}
    if "pretty_name" in told:
        told["pretty_name"] = line(_title(kind, about))
    if kind == "model" and GGUF not in page.files:  # a repository without the file is no GGUF repository
        told = {name: value for name, value in told.items() if (name, value) != ("library_name", "gguf")}
        told["tags"] = [tag for tag in told["tags"] if tag != "gguf"]
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
    run = page.run_of(version)
    source = {"source": {"name": run.name, "url": run.url}} if run else {}
    return {**result, "dataset": dataset, **source}


def _dataset_id(card: Mapping[str, Any]) -> str | None:
    lineage = (card["pipeline"].get("lineage") or {}).get("dataset")
    return str(lineage.get("id")) if isinstance(lineage, Mapping) else None


def _title(kind: Kind, about: Mapping[str, Any]) -> str:
    """`Chief complaints: rated records, version 0001`, of the project `chief-complaints`."""
    what = {"dataset": "rated records", "model": "rating model", "run": "evaluation"}[kind]
    if kind == "model" and about["approach"]["method"] != "lora":
        what = "model set"
    return f"{heading(str(about['project']).replace('-', ' '))}: {what}, version {about['id']}"


def _names(kind: Kind, card: Mapping[str, Any], page: Page) -> Markdown:
    """The version's names, and the pages of what it was made from and evaluated in."""
    about = card["pipeline"]
    said = [", ".join(code(name) for name in (about.get("names") or [about["name"]]))]
    lineage = about.get("lineage") or {}
    if kind == "run" and isinstance(model := lineage.get("model"), Mapping):
        said.append(f"model {_linked(model['name'], page.published('model', model.get('id')))}")
    if isinstance(dataset := lineage.get("dataset"), Mapping):
        said.append(f"dataset {_linked(dataset['name'], page.published('dataset', _dataset_id(card)))}")
    if kind == "model" and (run := page.run_of(about["version"])):
        said.append(f"evaluation {_linked(run.name, run)}")
    return Markdown(" · ".join(said))


def _linked(name: str, published: Published | None) -> Markdown:
    return link(name, sections.tag_url(published)) if published else code(name)


Section = tuple[str, Markdown]  # heading ("" for the opening) and text


# --- the three -------------------------------------------------------------------------------------------------------


def _model(card: Mapping[str, Any], page: Page) -> list[Section]:
    about = card["pipeline"]
    tuned = about["approach"]["method"] == "lora"
    metrics = about.get("metrics") or {}
    own = "fine_tuned" if tuned else "model_set"
    return [
        ("", figures.verdict(metrics.get("verdict"))),
        ("", figures.gates_not_passed(metrics.get("gates") or ())),
        ("", _rated(about, "Rates records")),
        ("", _made_of(about, tuned)),
        ("Results", _results(metrics, own, page, _further(metrics, page.run_of(about["version"])))),
        ("Use and limits", sections.model_limits(tuned)),
        ("How to run it", _how_to_run(about, tuned, page)),
        ("Data", sections.data_of_model(about, page.published("dataset", _dataset_id(card)))),
        ("Training" if tuned else "Settings", figures.training(about)),
        *_endings("model", card, page),
    ]


def _dataset(card: Mapping[str, Any], page: Page) -> list[Section]:
    about, quality = card["pipeline"], card["pipeline"]["data_quality"]
    rows, bare = quality["rows_kept"], quality.get("without_rationale") or 0
    reasons = "each with a rating and a reason" if not bare else f"each with a rating, {rows - bare} of them with a reason"
    load = Markdown("The rows are not published; this page and the card beside it hold counts and figures only.")
    if page.configs:
        load = block(
            f'from datasets import load_dataset\n\nrows = load_dataset("{page.repo_id}", revision="{about["name"]}", split="test")',
            "python",
        )
        load = Markdown("\n\n".join([load, *(sections.fields(info["features"]) for info in page.dataset_info)]))
    return [
        ("", Markdown(f"**{rows} records that experts rated, {reasons},** split into training, validation and test rows.")),
        ("", _rated(about, "Rated")),
        ("Data", sections.data(about)),
        ("Quality", sections.quality(quality)),
        ("How to load it", load),
        ("Use and limits", Markdown(f"{sections.dataset_limits()}\n\n{sections.personal_data()}")),
        *_endings("dataset", card, page),
    ]


def _run(card: Mapping[str, Any], page: Page) -> list[Section]:
    about = card["pipeline"]
    load = [f'load_dataset("{page.repo_id}", "{config["config_name"]}", revision="{about["name"]}")' for config in page.configs]
    return [
        ("", figures.verdict(about.get("verdict"))),
        ("", figures.gates_not_passed(about.get("gates") or ())),
        ("", _rated(about, "Rated")),
        ("", Markdown("The systems below on frozen test rows, which training never saw; the column Rows says how many each rated.")),
        ("Results", _results(about, about.get("primary") or "", page)),
        ("Gates", figures.gates(about.get("gates") or ())),
        ("Notes", bullets(figures.said(note) for note in about.get("notes") or ())),
        ("How to load it", block("from datasets import load_dataset\n\n" + "\n".join(load), "python") if load else Markdown()),
        ("Use and limits", Markdown(f"{sections.run_limits()}\n\n{sections.personal_data()}")),
        *_endings("run", card, page),
    ]


# --- parts -----------------------------------------------------------------------------------------------------------


def _rated(about: Mapping[str, Any], opening: str) -> Markdown:
    """What records are rated for, and with which answers; nothing from a card that does not say so."""
    prompt = about.get("prompt") or {}
    *first, last = map(str, prompt.get("labels") or [""])
    if not first:
        return Markdown()
    answers = f"{', '.join(first)} or {last}"
    topic = prompt.get("topic")
    return text(f"{opening} for: {topic}. Answers: {answers}, with a reason." if topic else f"{opening} as {answers}, with a reason.")


def _made_of(about: Mapping[str, Any], tuned: bool) -> Markdown:
    base = about.get("base") or {}
    name = code(base["name"]) if base.get("name") else "a base model that was not found where this was made"
    size = _size(base.get("parameters") or 0)
    if tuned:
        return Markdown(f"A small language model: {name}{size}, fine-tuned with LoRA on rows that experts rated.")
    why = text(about["approach"].get("reason") or "the reason is not recorded")
    what = "An instruction" if _without_examples(about) else "Instruction and solved examples"
    return Markdown(f"{what} for {name}{size}, so that it rates a record and says why. No weights were changed: {why}.")


def _without_examples(about: Mapping[str, Any]) -> bool:
    """Whether a model set is known to hold no record: none may have helped."""
    return (about.get("validation") or {}).get("examples") == 0


def _size(parameters: int) -> str:
    for unit, word in ((10**9, "billion"), (10**6, "million")):
        if parameters >= unit:
            return f" ({parameters / unit:.3g} {word} parameters)"
    return f" ({parameters} parameters)" if parameters else ""


def _results(told: Mapping[str, Any], own: str, page: Page, further: str = "") -> Markdown:
    pictures = [image(path, alt) for path, alt in page.plots.items()]
    if not told.get("systems"):
        return Markdown("\n\n".join(["How good it is, is unknown: it has not been evaluated.", *pictures]))
    parts = [
        figures.systems(told), further, *pictures, figures.comparisons(told), figures.ratings(told, own), figures.rationales(told),
    ]  # fmt: skip
    return Markdown("\n\n".join(part for part in parts if part))


def _further(metrics: Mapping[str, Any], run: Published | None) -> Markdown:
    """Under a model's table: how to read it, and where the systems are that it does not show."""
    others = metrics.get("others")
    shown = link("The run's page", sections.tag_url(run)) if run else "The run"
    said = [figures.said(note) for note in metrics.get("notes") or ()]
    if others or (run and others is None):  # an older card does not say which
        named = ": " + ", ".join(figures.name_outside(name) for name in others) if others else ""
        said.append(Markdown(f"{shown} compares further systems{text(named)}."))
    return Markdown(" ".join(said))


def _how_to_run(about: Mapping[str, Any], tuned: bool, page: Page) -> Markdown:
    here = about.get("how_to_run") or {}
    ollama = block("\n".join(map(_with_uv, _lines(here.get("ollama"))))) if here.get("ollama") else Markdown()
    parts = []
    if GGUF in page.files:
        parts += [block(f"ollama run hf.co/{page.repo_id}:{GGUF}")]
        parts += [text("While the repository is private, Ollama needs your key in your account on the Hub.")]
        parts += [Markdown(f"With llama.cpp instead: {code(f'llama-server --hf-repo {page.repo_id} --hf-file {GGUF}')}")]
    elif tuned:
        parts += [text("The weights are not published. In the project's folder, where they were made or made again:"), ollama]
        parts += [Markdown(f"With llama.cpp instead: {code(command)}") for command in _lines(here.get("llama.cpp"))]
    elif MODEL_SET in page.files:
        parts += [
            Markdown(f"{code(MODEL_SET)} holds the messages and options: send them to the base model with your record as the last turn.")
        ]
    else:
        holds = "" if _without_examples(about) else " holds solved examples from the records and"
        parts += [text(f"The model set{holds} is not published. In the project's folder:")]
        parts += [ollama or text(here.get("elsewhere") or "")]
    parts += [text(note) for note in page.notes]
    parts += _how_to_ask(about) or ([text(f"What it expects: {here['prompt']}.")] if here.get("prompt") else [])
    return Markdown("\n\n".join(part for part in parts if part))


def _how_to_ask(about: Mapping[str, Any]) -> list[Markdown]:
    """The message that a record is asked about with, to be copied, and the answer that comes back."""
    prompt = about.get("prompt") or {}
    if not prompt.get("instruction"):
        return []
    texts = "\n".join(f"{name}: {{{name.lower()}}}" for name in prompt.get("headings") or ())
    generate = (about.get("hyperparameters") or {}).get("generate") or {}
    limit = f", at most {generate['max_tokens']} tokens" if generate.get("max_tokens") else ""
    schema = answer_schema(RatingScale(tuple(Rating(n, label) for n, label in enumerate(prompt["labels"]))))
    return [
        text("Ask about each record in a user message of its own, with its texts where the braces are; leave out a line without a text:"),
        block(f"{prompt['instruction']}\n\n{texts}", "text"),
        Markdown(
            f"The figures on this page were measured at temperature {generate.get('temperature', 0):g}{limit}, with answers held to this"
            f" JSON Schema ({code('format')} in Ollama's API, {code('response_format')} in llama.cpp's):"
        ),
        block(json.dumps(schema, ensure_ascii=False), "json"),
    ]


def _lines(commands: Any) -> list[str]:
    return [commands] if isinstance(commands, str) else list(commands or ())


def _with_uv(command: str) -> str:
    """Cards of older versions name the command alone."""
    return f"uv run {command}" if command.startswith("pipeline ") else command


def _endings(kind: Kind, card: Mapping[str, Any], page: Page) -> list[Section]:
    about = card["pipeline"]
    beside = f"{kind}_card.yaml"
    full = link(beside, None) if beside not in page.files else Markdown(f"[{beside}]({beside})")
    return [
        ("Lineage", sections.lineage(about, page.known)),
        ("Make it again", sections.reproduce(about)),
        ("Licence", sections.licence(kind, card)),
        ("What is unknown", sections.unknown(kind, card)),
        ("Versions", Markdown(f"{sections.versions(about)}\n\nThe whole record of this version, with every setting and check: {full}.")),
    ]
