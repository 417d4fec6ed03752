"""The sections of a card's page, each from the card's own fields."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from pipeline.card_page_figures import NONE, name_of
from pipeline.markdown import Markdown, block, bullets, code, link, table, text
from pipeline.publication import REPO_TYPES, Published

if TYPE_CHECKING:
    from pipeline.version_names import Kind


# --- data ------------------------------------------------------------------------------------------------------------


def data(about: Mapping[str, Any]) -> Markdown:
    """Source, raters, ratings, splits and balance."""
    source, opinions = about["source"], about["data_quality"].get("opinions") or {}
    said = [
        Markdown(f"source: {text(source['source'])}; part of it: {text(source['subsource'])}"),
        Markdown(f"way of preparing it: {text(source['method'])}"),
        "rated by: experts of the team that made it; who and how many they were is not recorded",
        *(Markdown(f"also rated: {n} rows by {text(name_of(name))}") for name, n in opinions.items()),
        "splits: rows of one group, and near duplicates, are always in one split; test rows are never trained on",
    ]
    scale = [
        (
            rating["label"],
            code(rating["value"]),
            ", ".join(rating.get("aliases") or ()) or NONE,
            "can't tell" if rating.get("abstain") else "",
        )
        for rating in about["ratings"]
    ]
    order = "from low to high" if about.get("ordered") else "without order"
    labels = [rating["label"] for rating in about["ratings"]]
    splits = [
        (name, s["rows"], s["groups"], *(_share((s.get("labels") or {}).get(label, 0), s["rows"]) for label in labels))
        for name, s in about["splits"].items()
    ]
    tables = [table((f"Rating, {order}", "Value", "Also read as", ""), scale), table(("Split", "Rows", "Groups", *labels), splits)]
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
        said.append("words in a prompt: " + ", ".join(f"{name} {value:g}" for name, value in words.items()))
    return bullets(said)


def _share(n: int, rows: int) -> str:
    return f"{n} ({100 * n / rows:.0f} %)" if rows else str(n)


def data_of_model(about: Mapping[str, Any], dataset: Published | None) -> Markdown:
    of = (about.get("lineage") or {}).get("dataset") or {}
    if not of.get("name"):
        return Markdown("The dataset that it was made from is not recorded.")
    where = link(of["name"], tag_url(dataset)) if dataset else code(of["name"])
    trained = about.get("training") or {}
    refused = "; ".join(f"{n} × {text(reason)}" for reason, n in (trained.get("refused_rows") or {}).items())
    said = [
        Markdown(f"dataset: {where}, whose page tells its source, who rated it, its splits and its balance"),
        f"rows trained on: {trained['trained_rows']}" if trained.get("trained_rows") is not None else "rows trained on: not recorded",
    ]
    return bullets([*said, *([Markdown(f"rows refused: {refused}")] if refused else [])])


def training(about: Mapping[str, Any]) -> Markdown:
    """Settings and course of the training, and the checks of what came out."""
    settings = _leaves({"settings": about.get("hyperparameters") or {}}) + _leaves({"check": about.get("validation") or {}})
    trained = about.get("training") or {}
    course = ("best_epoch", "steps", "seconds", "peak_memory_bytes", "dtype", "threads")
    settings += [(f"training: {name}", trained[name]) for name in course if trained.get(name) is not None]
    return table(("What", "Value"), [(name, code(f"{value:.4g}" if isinstance(value, float) else value)) for name, value in settings])


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name, value in tree.items():
        path = f"{prefix}.{name}".removeprefix(".").replace("settings.", "").replace("check.", "check: ")
        found += _leaves(value, path) if isinstance(value, Mapping) else [(path, value)] if value not in (None, []) else []
    return found


# --- use -------------------------------------------------------------------------------------------------------------


def model_limits(tuned: bool) -> Markdown:
    return bullets(
        [
            "Meant for: suggesting ratings and reasons for records like those of its dataset, which a person then reviews.",
            "Not meant for: clinical or other decisions about people without review by someone qualified.",
            "It is small. It can be wrong with confidence, and its reason may not be why it chose a rating.",
            "It learnt from ratings of people, which can be wrong, and it repeats their habits.",
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
    """Names and digests of what this was made from, linked to their tags on the Hub where they are there."""
    rows: list[tuple[object, object, object]] = [("this version", code(about["name"]), code(about["key"]))]
    for role, of in (about.get("lineage") or {}).items():
        if not isinstance(of, Mapping):
            rows.append((role, NONE, code(of)))
            continue
        found = next((p for p in known.values() if p.kind == role and p.name[:4] == of.get("id")), None)
        rows.append((role, link(of["name"], tag_url(found)) if found else code(of["name"]), code(of.get("key", NONE))))
    base = about.get("base") or {}
    if base.get("digest"):
        on_hub = f" ({base['hub_id']} on the Hub)" if base.get("hub_id") else ""
        rows.append(("base model", code(f"{base['name']}{on_hub}"), code(base["digest"])))
    for build in about.get("builds") or ():
        rows.append((f"built {build.get('created', '')}".strip(), NONE, code(build.get("artifact") or NONE)))
    return table(("What", "Name", "Key or digest"), rows)


def reproduce(about: Mapping[str, Any]) -> Markdown:
    said = "In the project's own repository, with the same table of rows; the same inputs give the same version:"
    if not about.get("commit"):
        return Markdown(f"The commit that made it is not recorded. {said}\n\n{block('uv run pipeline run')}")
    return Markdown(f"{said}\n\n{block('git checkout ' + str(about['commit']) + chr(10) + 'uv run pipeline run')}")


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
    rows = [(code(e.get("name", NONE)), code(e.get("version", NONE)), e.get("status", NONE), e.get("created", NONE)) for e in entries]
    why = bullets(about.get("why") or ())
    return Markdown("\n\n".join(part for part in (why, table(("Name", "Version", "Status", "Made"), rows)) if part))


def tag_url(published: Published) -> str:
    """The version's page on the Hub: its tag, on the host that the published address names."""
    host = published.url.partition("://")[0] + "://" + published.url.partition("://")[2].partition("/")[0]
    datasets = "datasets/" if REPO_TYPES[published.kind] == "dataset" else ""
    return f"{host}/{datasets}{published.repo_id}/tree/{published.name}"
