"""What the Hub would refuse in a card, checked offline. Rules: huggingface/hub-docs modelcard.md, datasetcard.md and the licence list;
split names: `datasets`. The Hub may change its rules; it checks again when a card is pushed."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

HUB_LICENSES = frozenset(
    """
    apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m afl-3.0 artistic-2.0
    bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0
    cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0
    cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 agpl-3.0
    gfdl gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc lppl-1.3c ms-pl mpl-2.0 odc-by odbl openrail++ osl-3.0 postgresql ofl-1.1 ncsa
    unlicense zlib pddl lgpl-lr deepfloyd-if-license llama2 llama3 llama3.1 llama3.2 llama3.3 gemma unknown other
    """.split()  # noqa: SIM905 (sixty quoted lines say no more)
)
_REQUIRED = {
    "dataset": ("language", "license", "pretty_name", "annotations_creators", "size_categories", "task_categories", "tags", "pipeline"),
    "model": ("language", "license", "pipeline_tag", "tags", "pipeline"),
    "run": ("language", "license", "pretty_name", "size_categories", "task_categories", "tags", "pipeline"),
}
_LISTS = {
    "size_categories": {
        "n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "10M<n<100M", "100M<n<1B", "1B<n<10B", "10B<n<100B", "100B<n<1T", "n>1T",
    },
    "annotations_creators": {"crowdsourced", "found", "expert-generated", "machine-generated", "no-annotation", "other"},
    "multilinguality": {"monolingual", "multilingual", "translation", "other"},
}  # fmt: skip
_PRODUCT = {"id": r"[0-9]{4}", "name": r"[0-9]{4}-.+", "version": r"[0-9.]+(-data-[0-9.]+)?", "key": r"sha256:.+", "project": r".+"}
_LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z0-9]{2,8})*|code|multilingual")
_HUB_ID = re.compile(r"(?!.*(--|\.\.))[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*(?<![.-])(?<!\.git)")
_SPLIT = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")
_CONFIG_NAME = re.compile(r'[^<>:/\\|?*"]+')
_REVISION = re.compile(r"[0-9a-f]{40}")
_LICENSE_NAME = re.compile(r"[a-z0-9][a-z0-9.-]*")


def validate_card(kind: str, card: Mapping[str, Any]) -> list[str]:
    """One line a problem, naming the field; empty when the card is fit for the Hub. `kind`: dataset, model or run."""
    problems = [f"{field}: missing" for field in _REQUIRED[kind] if field not in card]
    problems += [f"{field}: is null" for field, value in card.items() if value is None]
    problems += [f"{path}: not a finite number" for path in _not_finite(card)]
    problems += _simple_fields(card)
    problems += _ids(card)
    problems += _configs(card["configs"]) if card.get("configs") is not None else []
    problems += _model_index(card["model-index"]) if "model-index" in card else []
    return problems + _product(kind, card.get("pipeline"))


def _simple_fields(card: Mapping[str, Any]) -> Iterator[str]:
    license = card.get("license")
    if license is not None and license not in HUB_LICENSES:
        yield f"license: {license!r} is not an id that the Hub knows; write `other` and a license_name"
    if license == "other" and not _matches(_LICENSE_NAME, card.get("license_name")):
        yield "license_name: needed beside `license: other`, in small letters, digits, dots and dashes"
    languages = card.get("language", [])
    for language in languages if isinstance(languages, list) else [languages]:
        if not _matches(_LANGUAGE, language):
            yield f"language: {language!r} is not an ISO 639 code such as en"
    for field, known in _LISTS.items():
        values = card.get(field, [])
        if not isinstance(values, list):
            yield f"{field}: must be a list"
            continue
        yield from (f"{field}: {value!r} is not one of {', '.join(sorted(known))}" for value in values if value not in known)
    for field in ("tags", "task_categories", "metrics"):
        if not _is_texts(card.get(field, [])):
            yield f"{field}: must be a list of texts"
    for field in ("pretty_name", "pipeline_tag", "library_name"):
        if field in card and not isinstance(card[field], str):
            yield f"{field}: must be text"


def _ids(card: Mapping[str, Any]) -> Iterator[str]:
    for field in ("base_model", "datasets"):
        values = card.get(field, [])
        for value in values if isinstance(values, list) else [values]:
            if not _matches(_HUB_ID, value):
                yield f"{field}: {value!r} is not a Hub ID (OWNER/REPOSITORY); the name that a server uses is none"
    for value in card.get("source_datasets", []):
        if value not in ("original", "extended") and not _matches(_HUB_ID, value):
            yield f"source_datasets: {value!r} is neither `original` nor a Hub ID"
    if card.get("base_model_relation", "finetune") not in ("finetune", "adapter", "quantized", "merge"):
        yield f"base_model_relation: {card['base_model_relation']!r} is not one of finetune, adapter, quantized, merge"


def _configs(configs: Any) -> Iterator[str]:
    if not isinstance(configs, list) or not all(isinstance(config, Mapping) for config in configs):
        yield "configs: must be a list of mappings"
        return
    for number, config in enumerate(configs):
        if not _matches(_CONFIG_NAME, config.get("config_name")):
            yield f"configs[{number}].config_name: needed, without any of <>:/\\|?*"
        seen: set[str] = set()
        for file in config.get("data_files") or [{}]:
            split = file.get("split")
            if not file.get("path"):
                yield f"configs[{number}].data_files: each needs a path"
            if not _matches(_SPLIT, split):
                yield f"configs[{number}].data_files: the split {split!r} may hold letters, digits, underscores and inner dots only"
            elif split in ("valid", "val", "dev"):
                yield f"configs[{number}].data_files: the Hub's name for the split {split!r} is validation"
            if split in seen:
                yield f"configs[{number}].data_files: the split {split!r} is there twice"
            seen.add(str(split))


def _model_index(index: Any) -> Iterator[str]:
    if not isinstance(index, list) or not all(isinstance(model, Mapping) for model in index):
        yield "model-index: must be a list of mappings"
        return
    for n, model in enumerate(index):
        if not _is_text(model.get("name")):
            yield f"model-index[{n}].name: missing"
        results = model.get("results")
        if not isinstance(results, list) or not results:
            yield f"model-index[{n}].results: needs at least one result; leave model-index out when there is none"
            continue
        for m, result in enumerate(results):
            yield from _result(f"model-index[{n}].results[{m}]", result if isinstance(result, Mapping) else {})


def _result(where: str, result: Mapping[str, Any]) -> Iterator[str]:
    for part, fields in (("task", ("type",)), ("dataset", ("type", "name"))):
        value = result.get(part)
        for field in fields:
            if not isinstance(value, Mapping) or not _is_text(value.get(field)):
                yield f"{where}.{part}.{field}: missing"
    dataset = result.get("dataset")
    if isinstance(dataset, Mapping):
        if "revision" in dataset and not _matches(_REVISION, dataset["revision"]):
            yield f"{where}.dataset.revision: must be a full commit id of 40 hex digits"
        if "split" in dataset and not _matches(_SPLIT, dataset["split"]):
            yield f"{where}.dataset.split: {dataset['split']!r} may hold letters, digits, underscores and inner dots only"
    metrics = result.get("metrics")
    for number, metric in enumerate(metrics if isinstance(metrics, list) and metrics else [{}]):
        if not isinstance(metric, Mapping) or not _is_text(metric.get("type")) or metric.get("value") is None:
            yield f"{where}.metrics[{number}]: needs a type and a value"
    source = result.get("source", {"url": "-"})
    if not isinstance(source, Mapping) or not _is_text(source.get("url")):
        yield f"{where}.source.url: needed where a source is given"


def _product(kind: str, block: Any) -> list[str]:
    if not isinstance(block, Mapping):
        return [] if block is None else ["pipeline: must be a mapping"]
    problems = [
        f"pipeline.{name}: must be text in quotes, {p}" for name, p in _PRODUCT.items() if not _matches(re.compile(p), block.get(name))
    ]
    if block.get("kind") != kind:
        problems.append(f"pipeline.kind: must be {kind}")
    if not isinstance(block.get("schema_version"), int):
        problems.append("pipeline.schema_version: must be a number")
    versions = block.get("versions")
    if not isinstance(versions, list):
        return [*problems, "pipeline.versions: must be a list"]
    bad = [v for v in versions if not isinstance(v, Mapping) or not _matches(re.compile(_PRODUCT["id"]), v.get("id"))]
    return problems + (["pipeline.versions: each needs an id of four digits in quotes"] if bad else [])


def _not_finite(value: Any, path: str = "") -> Iterator[str]:
    if isinstance(value, float) and not math.isfinite(value):
        yield path
    for key, item in value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list | tuple) else ():
        yield from _not_finite(item, f"{path}.{key}" if path else str(key))


def _matches(pattern: re.Pattern[str], value: Any) -> bool:
    return isinstance(value, str) and pattern.fullmatch(value) is not None


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(_is_text(item) for item in value)
