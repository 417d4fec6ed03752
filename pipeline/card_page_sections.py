"""The sections of a card's page, each from the card's own fields."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import yaml

from pipeline.card_page_figures import NONE, moment, name_outside, rows_of
from pipeline.config import PipelineConfig
from pipeline.markdown import Markdown, block, bullets, code, link, table, text
from pipeline.publication import REPO_TYPES, Published
from pipeline.records import to_plain

if TYPE_CHECKING:
    from pipeline.version_names import Kind

_WORDS = {"min": "fewest", "median": "median", "p95": "95th percentile", "max": "most"}
_FIELDS = {
    "record_id": "which record it is",
    "group": "rows of one group are always in one split",
    "prompt": "the whole message to a model: the instruction, then the record's texts",
    "rating": "the expert's rating, as its value",
    "label": "the expert's rating, in words",
    "rationale": "the expert's reason",
}
# what docker-compose.yml and the form of a workflow run set beside the commit's own pipeline.yaml
_SET_OUTSIDE = ("model.name", "model.engine", "train.epochs", "train.learning_rate", "train.batch_size")
_FILES = {"dataset": "formatted_dataset.csv", "run": "scores.json"}

# --- data ------------------------------------------------------------------------------------------------------------


def data(about: Mapping[str, Any]) -> Markdown:
    """Source, raters, ratings, splits and balance."""
    source, opinions = about["source"], about["data_quality"].get("opinions") or {}
    said = [
        Markdown(f"source: {text(source['source'])}; part of it: {text(source['subsource'])}"),
        Markdown(f"way of preparing it: {text(source['method'])}"),
        "rated by: experts of the team that made it; who and how many they were is not recorded",
        *(Markdown(f"also rated: {rows_of(n)} by {text(name_outside(name))}") for name, n in opinions.items()),
        "splits: rows of one group, and near duplicates, are always in one split; test rows are never trained on",
    ]
    scale = [
        (
            rating["label"],
            code(rating["value"]),
            ", ".join(rating.get("aliases") or ()) or NONE,
            "can't tell" if rating.get("abstain") else NONE,
        )
        for rating in about["ratings"]
    ]
    order = "from low to high" if about.get("ordered") else "without order"
    labels = [rating["label"] for rating in about["ratings"]]
    splits = [
        (name, s["rows"], s["groups"], *(_share((s.get("labels") or {}).get(label, 0), s["rows"]) for label in labels))
        for name, s in about["splits"].items()
    ]
    tables = [table((f"Rating, {order}", "Value", "Also read as", "Meaning"), scale), table(("Split", "Rows", "Groups", *labels), splits)]
    return Markdown("\n\n".join([bullets(said), *tables]))


def quality(found: Mapping[str, Any]) -> Markdown:
    said = [
        f"{found['rows_kept']} rows were kept of {found['rows_read']} read",
        *(f"left out: {n} × {reason}" for reason, n in (found.get("dropped_by_reason") or {}).items()),
        f"exact duplicates: {found.get('exact_duplicates', NONE)}; of those with different ratings: {found.get('label_conflicts', NONE)}",
        f"near duplicates: {found.get('near_duplicate_rows', NONE)} rows in {found.get('near_duplicate_clusters', NONE)} clusters",
        f"reasons that name another rating than their row's: {found.get('contradicting_rationales', NONE)}",
        f"rows without a reason: {found.get('without_rationale', NONE)}",
        *(found.get("notes") or ()),
    ]
    words = found.get("prompt_words") or {}
    if words:
        said.append("words in a prompt: " + ", ".join(f"{_WORDS.get(name, name)} {value:.0f}" for name, value in words.items()))
    return bullets(said)


def fields(features: Sequence[Mapping[str, Any]]) -> Markdown:
    """What each column of the published rows holds."""
    return table(("Field", "Type", "What it holds"), [(code(f["name"]), f["dtype"], _meaning(f["name"])) for f in features])


def _meaning(field: str) -> str:
    if field in _FIELDS:
        return _FIELDS[field]
    if field.startswith("meta_"):
        return f"the column {field.removeprefix('meta_')} of the original table"
    who, _, part = field.rpartition("_")
    person = "the copilot" if who == "copilot" else who.replace("_", " ", 1)
    return f"{person}'s {'reason' if part == 'rationale' else part}, where there is one"


def personal_data() -> Markdown:
    """What the privacy gate has done for this page, and what it can't do."""
    return text(
        "Personal data: before anything was sent here, all text was searched for e-mail addresses, phone numbers, dates of birth and record"
        " numbers and, outside of published rows, for words copied from the records where those were at hand; what was found had to be"
        " reviewed or allowed by a person. A name, a place or a rare story has no pattern and is not found: whether somebody could be"
        " recognised, only a person can judge."
    )


def _share(n: int, rows: int) -> str:
    return f"{n} ({100 * n / rows:.0f} %)" if rows else str(n)


def data_of_model(about: Mapping[str, Any], dataset: Published | None) -> Markdown:
    of = (about.get("lineage") or {}).get("dataset") or {}
    if not of.get("name"):
        return Markdown("The dataset that it was made from is not recorded.")
    where = link(of["name"], tag_url(dataset)) if dataset else code(of["name"])
    trained, tuned = about.get("training") or {}, about["approach"]["method"] == "lora"
    count = trained.get("trained_rows", "not recorded") if tuned else "none, since no weights were changed"
    refused = "; ".join(f"{n} × {text(reason)}" for reason, n in (trained.get("refused_rows") or {}).items())
    said = [
        Markdown(f"dataset: {where}, whose page tells its source, who rated it, its splits and its balance"),
        f"rows trained on: {count}",
    ]
    return bullets([*said, *([Markdown(f"rows refused: {refused}")] if refused else [])])


# --- use -------------------------------------------------------------------------------------------------------------


def model_limits(tuned: bool) -> Markdown:
    return bullets(
        [
            "Meant for: suggesting ratings and reasons for records like those of its dataset, which a person then reviews.",
            "Not meant for: clinical or other decisions about people without review by someone qualified.",
            "It is small. It can be wrong with confidence, and its reason may not be why it chose a rating.",
            "It learnt from ratings of people, which can be wrong, and it repeats their habits."
            if tuned
            else "It is compared with ratings of people, which can be wrong.",
            "Records of another kind, place, time or language than the dataset's were not tested.",
            *(["Weights can remember rows that they were trained on. Treat them with the care that the rows need."] if tuned else []),
        ]
    )


def dataset_limits() -> Markdown:
    return bullets(
        [
            "Meant for: training and testing models that rate records like these.",
            "Not meant for: decisions about people, and not for finding out who a record is about.",
            "Ratings are judgements of people and can be wrong; so are the reasons.",
            "Whether the records stand for any larger population is not known.",
        ]
    )


def run_limits() -> Markdown:
    return bullets(
        [
            "The figures hold for these test rows; the intervals say how far other rows of the same kind may lie from them.",
            "Experts' ratings are taken as right. They can be wrong.",
            "Not meant as evidence that a model may decide about people without review.",
        ]
    )


# --- origin ----------------------------------------------------------------------------------------------------------


def lineage(about: Mapping[str, Any], known: Mapping[Kind, Published]) -> Markdown:
    """Names and digests of what this was made from, each once, linked to their tags on the Hub where they are there."""
    parts: Mapping[str, Any] = about.get("lineage") or {}
    rows: list[tuple[object, object, str]] = [("this version", code(about["name"]), about["key"])]
    for role, of in parts.items():
        if isinstance(of, Mapping):
            found = next((p for p in known.values() if p.kind == role and p.name[:4] == of.get("id")), None)
            rows.append((role, link(of["name"], tag_url(found)) if found else code(of["name"]), of.get("key") or NONE))
    base = about.get("base") or {}
    if base.get("digest"):
        on_hub = f" ({base['hub_id']} on the Hub)" if base.get("hub_id") else ""
        rows.append(("base model", code(f"{base['name']}{on_hub}"), base["digest"]))
    tuned = (about.get("approach") or {}).get("method") == "lora"
    file = _FILES.get(about["kind"]) or ("fine_tuned_model.gguf" if tuned else "model_set_config.json")
    for build in about.get("builds") or ():
        rows.append((f"built {moment(build.get('created', ''))}".strip(), code(file), build.get("artifact") or NONE))
    rows += [(role, NONE, of) for role, of in parts.items() if not isinstance(of, Mapping)]
    once: dict[object, Sequence[object]] = {}
    for number, (what, name, digest) in enumerate(rows):
        once.setdefault(number if digest == NONE else digest, (what, name, code(digest)))
    return table(("What", "Name", "Key or digest"), once.values())


def reproduce(about: Mapping[str, Any]) -> Markdown:
    """The commands that make this version again."""
    chosen = [f"--set {shlex.quote(f'{name}={_as_yaml(value)}')}" for name, value in settings(about)]
    run = " \\\n  ".join(["uv run pipeline run", *chosen])
    more = {
        "run": " Add the settings of its model and of its dataset, which stand on their pages.",
        "model": " Add the settings of its rows, which stand on the dataset's page.",
    }
    said = (
        f"In the project's own repository, with the same table of rows; the same inputs give the same version.{more.get(about['kind'], '')}"
        f" What is not set like this is as in pipeline.yaml{' of that commit' if about.get('commit') else ''}."
    )
    if not about.get("commit"):
        return Markdown(f"The commit that made it is not recorded. {said}\n\n{block(run)}")
    shown = block(f"git checkout {about['commit']}\n{run}")
    return Markdown(
        f"{said}\n\n{shown}\n\nA commit that is checked out like this is on no branch, so the run calls its versions provisional and"
        " records none; that does not change what it makes."
    )


def settings(about: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The recorded settings that are not the defaults, and those that are often set outside of pipeline.yaml."""
    found: dict[str, Any] = {}
    if name := (about.get("base") or {}).get("name"):
        found["model.name"] = name
    builds: Sequence[Mapping[str, Any]] = about.get("builds") or ({},)
    if engine := (builds[-1].get("machine") or {}).get("engine"):
        found["model.engine"] = engine
    for values in (about.get("segments") or {}).values():
        found |= values if isinstance(values, Mapping) else {}
    sections = {**(about.get("hyperparameters") or {}), "evaluate": about.get("evaluate") or {}}
    for section, values in sections.items():
        found |= {f"{section}.{name}": value for name, value in values.items()} if isinstance(values, Mapping) else {section: values}
    if "prompt_max_tokens" in found:
        found["prompt.max_tokens"] = found.pop("prompt_max_tokens")
    known = {name: _default(name) for name in found}
    return [
        (name, value) for name, value in found.items() if known[name] and (name in _SET_OUTSIDE or value != known[name][0]) and value != ""
    ]


def _default(name: str) -> tuple[Any, ...]:
    """The default of a setting, alone in a tuple; an empty one where there is no such setting."""
    value: Any = PipelineConfig()
    for part in name.split("."):
        if value is None:  # a section that is not there by default
            return (None,)
        if not dataclasses.is_dataclass(value) or part not in {f.name for f in dataclasses.fields(value)} - {"root"}:
            return ()
        value = getattr(value, part)
    return (to_plain(value),)


def _as_yaml(value: Any) -> str:
    """The value as `--set` reads it, on one line."""
    if isinstance(value, str) and re.fullmatch(r"[A-Za-z][\w ,:./-]*", value, re.ASCII):
        try:
            if yaml.safe_load(value) == value:
                return value
        except yaml.YAMLError:
            pass
    shown = json.dumps(value, ensure_ascii=False)
    if isinstance(value, float) and "e" in shown and "." not in shown:
        shown = shown.replace("e", ".0e")  # YAML takes 1e-05 for a text
    return "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in shown)


def licence(kind: Kind, card: Mapping[str, Any]) -> Markdown:
    about, name = card["pipeline"], card.get("license")
    called = card.get("license_name", NONE) if name == "other" else name
    origin = about.get("license_from") or {
        "dataset": "the configuration of the project (dataset.license), for the rows",
        "run": "the dataset whose rows the answers are about",
    }.get(kind, "not recorded")
    if called in (NONE, "not-stated", "unknown"):
        return Markdown(f"Not stated. It would come from: {text(origin)}. Ask whoever published this before you use it.")
    return Markdown(f"{code(called)}; from: {text(origin)}.")


def versions(about: Mapping[str, Any]) -> Markdown:
    """The last versions, newest first."""
    entries: Iterable[Mapping[str, Any]] = reversed(about.get("versions") or [])
    rows = [
        (code(e.get("name", NONE)), code(e.get("version", NONE)), e.get("status", NONE), moment(e.get("created", NONE))) for e in entries
    ]
    why = bullets(about.get("why") or ())
    return Markdown("\n\n".join(part for part in (why, table(("Name", "Version", "Status", "Made"), rows)) if part))


def tag_url(published: Published) -> str:
    """The version's page on the Hub: its tag, on the host that the published address names."""
    host = published.url.partition("://")[0] + "://" + published.url.partition("://")[2].partition("/")[0]
    datasets = "datasets/" if REPO_TYPES[published.kind] == "dataset" else ""
    return f"{host}/{datasets}{published.repo_id}/tree/{published.name}"


# --- what is not known -----------------------------------------------------------------------------------------------


def unknown(kind: Kind, card: Mapping[str, Any]) -> Markdown:
    """What the card calls unknown, and what its own gaps are; nothing where there are none."""
    about = card["pipeline"]
    found = list(about.get("unknown") or ())
    stated = card.get("license_name") if card.get("license") == "other" else card.get("license")
    if stated in (None, "not-stated", "unknown") and not any(str(sentence).startswith("the licence") for sentence in found):
        found.append("the licence")
    if not about.get("commit"):
        found.append("the commit that made it")
    if kind == "dataset":
        found += ["who the experts were, and how many", "whether the records stand for any larger population"]
    if kind == "model":
        dataset, tuned = (about.get("lineage") or {}).get("dataset") or {}, about["approach"]["method"] == "lora"
        found += [] if dataset.get("name") else ["the dataset that it was made from"]
        found += ["how many rows it was trained on"] if tuned and (about.get("training") or {}).get("trained_rows") is None else []
        found += [] if tuned or about["approach"].get("reason") else ["why no weights were changed"]
    return bullets(found)
