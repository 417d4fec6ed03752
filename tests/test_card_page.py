"""A card's page on the Hub: front matter for every parser, text that stays text, and nothing that the card does not say."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
import shlex
from collections.abc import Mapping
from html.parser import HTMLParser
from typing import Any

import pytest
import yaml
from huggingface_hub import DatasetCard, ModelCard
from hypothesis import example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from pipeline import card_page_figures as figures
from pipeline import card_page_sections as sections
from pipeline import markdown, yaml_text
from pipeline.card_checks import validate_card
from pipeline.card_page import Page, front_matter, readme
from pipeline.config import _override, parse_config
from pipeline.prompts import answer_schema
from pipeline.publication import Published
from pipeline.records import to_plain
from tests.test_cards import PUBLISHED, cards, config, read_1_2

HUB = "https://huggingface.co"
DATASET = Published("dataset", "0012-train-1.0.0.0", "org/demo-dataset", "d" * 40, f"{HUB}/datasets/org/demo-dataset", True)
RUN = Published("run", "0899-model-1.0.0.0-data-1.0.0.0", "org/demo-runs", "e" * 40, f"{HUB}/datasets/org/demo-runs", True)
KINDS = ("dataset", "model", "run")
HOSTILE = [
    "| a | b |", "`code` ``x``", "<script>alert(1)</script>", "<img src=x onerror=y>", "[text](http://evil.example)", "![i](http://evil.example)",
    "---\nlicense: mit\n---", "# heading\n\n# another", "\u202egnp.exe", "- item", "1. item", "> quote", "*b* _i_ ~~s~~", "$x^2$",
    "&lt;b&gt;", "https://evil.example www.evil.example", "@everyone", "a\\", "\\|", "line\r\nbreak", "{{ x }} {% y %}", "```\nfence\n```",
    "    indented", "a: b #c", "<!-- -->", "\x00\x1b[31m", "日本語 ä 🙂", "=====", "[^1] [ref]: http://evil.example",
]  # fmt: skip


def repo(kind: str) -> str:
    return f"org/demo-{'runs' if kind == 'run' else kind}"


def text_of(kind: Any, card: Mapping[str, Any], **page: Any) -> str:
    return readme(kind, card, Page(repo(kind), **page))


def body(text: str) -> str:
    return text.split("\n---\n", 1)[1]


class Seen(HTMLParser):
    """What a reader sees of rendered Markdown: tags, addresses, text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.addresses: set[str] = set()
        self.text = ""
        self.widths: list[int] = []
        self.feed(MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(text))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.addresses |= {str(value) for name, value in attrs if name in ("href", "src")}
        if tag == "img":
            self.text += str(dict(attrs).get("alt"))
        if tag == "tr":
            self.widths.append(0)
        if tag in ("td", "th"):
            self.widths[-1] += 1

    def handle_data(self, data: str) -> None:
        self.text += data


# --- front matter ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_hubs_own_classes_read_a_page_back(kind: Any) -> None:
    card = cards(**PUBLISHED)[kind]
    page = Page(repo(kind), {"dataset": DATASET, "run": RUN})
    text = readme(kind, card, page)
    found = (ModelCard if kind == "model" else DatasetCard)(text)
    told = front_matter(kind, card, page)
    assert validate_card(kind, told) == []
    assert yaml.safe_load(found.data.to_yaml()) == told
    assert yaml.safe_load(text.split("---\n")[1]) == read_1_2(text.split("---\n")[1]) == told
    assert found.text.strip() == body(text).strip()
    assert told["pipeline"] == {
        "schema_version": 1, "project": "demo", "kind": kind, "id": "0899", "name": card["pipeline"]["name"], 
        "version": "1.0.0.0", "key": "sha256:key",
    }  # fmt: skip


def test_every_id_stays_text_in_the_front_matter() -> None:
    card, ids = cards()["model"], [f"{number:04d}" for number in range(10_000)]
    told: dict[str, list[str]] = {"index": [], "ids": []}
    for id in ids:
        card["pipeline"]["id"] = card["model-index"][0]["name"] = id
        made = front_matter("model", card, Page("org/demo-model"))
        told["index"].append(made["model-index"][0]["name"])
        told["ids"].append(made["pipeline"]["id"])
    written = yaml_text.dump(told)  # as `readme` writes it; ten thousand pages would only repeat the rest
    for found in (yaml.load(written, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)), read_1_2(written)):
        assert found == {"index": ids, "ids": ids}
    for id in ("0420", "0899", "0010", "0000"):
        card["pipeline"]["id"] = id
        assert read_1_2(text_of("model", card).split("---\n")[1])["pipeline"]["id"] == id


def test_what_is_on_the_hub_is_named_by_its_id_and_commit() -> None:
    told = front_matter("model", cards()["model"], Page("org/demo-model", {"dataset": DATASET, "run": RUN}))
    [result] = told["model-index"][0]["results"]
    assert told["datasets"] == ["org/demo-dataset"]
    assert result["dataset"] == {"name": "0012-test-1.0.0.0", "type": "org/demo-dataset", "split": "test", "revision": "d" * 40}
    assert result["source"] == {"name": RUN.name, "url": RUN.url}
    assert front_matter("run", cards()["run"], Page("org/demo-runs", {"dataset": DATASET}))["source_datasets"] == ["org/demo-dataset"]


def test_what_is_not_there_is_left_out() -> None:
    card = cards(**PUBLISHED)["model"]
    for known in ({}, {"dataset": Published("dataset", "0013-train-1.0.0.0", "org/x", "d" * 40, HUB, True)}):
        told = front_matter("model", card, Page("org/demo-model", known))
        assert "datasets" not in told
    other = Published("run", "0900-model-2.0.0.0-data-1.0.0.0", "org/demo-runs", "e" * 40, HUB, True)
    del card["model-index"][0]["results"][0]["source"]
    assert "source" not in front_matter("model", card, Page("org/demo-model", {"run": other}))["model-index"][0]["results"][0]
    assert "configs" not in front_matter("dataset", cards(**PUBLISHED)["dataset"], Page("org/demo-dataset"))


# --- the page --------------------------------------------------------------------------------------------------------


def test_a_page_says_what_it_is_about_and_how_sure_that_is() -> None:
    text = text_of("model", cards()["model"], known={"dataset": DATASET})
    assert body(text).split("\n\n")[2:3] == ["**Not decided.**"]
    for said in (
        "# Demo: rating model, version 0899\n\n`0899-model-1.0.0.0`", "| fine-tuned | 80.0\u00a0[50.0,\u00a090.0] |",
        "| base | 40.0\u00a0[50.0,\u00a090.0] |", "+20.0\u00a0[−10.0,\u00a0+50.0]",
        f"[0012-train-1.0.0.0]({HUB}/datasets/org/demo-dataset/tree/0012-train-1.0.0.0)", "not meant for: clinical", "remember rows",
        "`apache-2.0`; from: the base model, whose weights these are.", "sha256:adapter", "uv run pipeline run",
        "chrf of 1 of the 3 rationales", "commit that made it is not recorded",
    ):  # fmt: skip
        assert said.lower() in text.lower(), said


def test_the_commit_is_part_of_how_to_make_it_again() -> None:
    card = cards()["run"]
    card["pipeline"]["commit"] = "c" * 40
    text = text_of("run", card)
    assert f"```bash\ngit checkout {'c' * 40}\nuv run pipeline run\n```" in text
    assert "calls its versions provisional" in text
    assert "the commit that made it" not in text


def test_the_recorded_settings_make_the_version_again() -> None:
    """What a form or a shell set beside the commit is in the commands, in words that a shell and the configuration read back."""
    chosen: dict[str, Any] = {
        "train": {"epochs": 3, "learning_rate": 1e-05}, "prompt": {"topic": "it's 50 % \"coughs\": #1\u2028é 🙂", "max_tokens": 99},
        "generate": {"max_tokens": 48}, "model": {"name": "smollm2:135m"},
        "evaluate": {"metrics": ["chrf"], "gates": {"a.b": {"value": "> 0"}}},
        "dataset": {"columns": {"text": ["a b", "yes"]}, "raters": {"x": {"rating": "r"}}, "copilot": {"rating": "null"}},
    }  # fmt: skip
    made = config(**chosen)
    segment = {name: getattr(made.dataset.columns, name) for name in ("text", "rating")}
    card = cards(**chosen)
    card["model"]["pipeline"]["base"]["name"] = made.model.name
    card["model"]["pipeline"]["builds"] = [{"machine": {"engine": "ollama"}}]
    card["dataset"]["pipeline"]["segments"] = {
        "C": {f"dataset.columns.{name}": value for name, value in to_plain(segment).items()}
        | {"dataset.raters": {"x": {"rating": "r", "rationale": None}}, "dataset.copilot.rating": "null", "rows": "sha256:x"},
        "D": {"prompt.topic": made.prompt.topic, "prompt.instruction": None},
    }
    overrides: list[str] = []
    for kind in KINDS:
        words = shlex.split(
            text_of(kind, card[kind]).split("## Make it again")[1].split("```bash\n")[1].split("\n```")[0].replace("\\\n", "")
        )
        assert words[:4] == ["uv", "run", "pipeline", "run"]
        assert set(words[4::2]) <= {"--set"}
        overrides += words[5::2]
    assert {override.partition("=")[0] for override in overrides} == {
        "model.name", "model.engine", "train.epochs", "train.learning_rate", "train.batch_size", "prompt.topic", "prompt.max_tokens",
        "generate.max_tokens", "evaluate.metrics", "evaluate.gates", "dataset.columns.text", "dataset.raters", "dataset.copilot.rating",
    }  # fmt: skip
    tree: dict[str, Any] = {"project": "demo"}
    for override in overrides:
        _override(tree, override)
    again = parse_config(tree)
    assert again == dataclasses.replace(made, model=dataclasses.replace(made.model, engine="ollama"))


def test_a_page_tells_what_is_rated_and_how_to_ask() -> None:
    card = cards(prompt={"topic": "coughs"}, dataset={"columns": {"text": ["chief_complaint", "triage_note"]}})
    for kind in KINDS:
        assert "for: coughs. Answers: Does Not Match, Unknown or Match, with a reason." in text_of(kind, card[kind])
    told = card["model"]["pipeline"]["prompt"]
    text = text_of("model", card["model"])
    assert f"```text\n{told['instruction']}\n\nChief complaint: {{chief complaint}}\nTriage note: {{triage note}}\n```" in text
    schema = json.loads(text.split("```json\n")[1].split("\n```")[0])
    assert schema == answer_schema(config().dataset.scale)
    del card["model"]["pipeline"]["prompt"]
    older = text_of("model", card["model"])
    assert "What it expects: one user message" in older
    assert "coughs" not in older


def test_a_gate_that_did_not_pass_stands_right_after_the_verdict() -> None:
    made = cards()
    gates = [
        {"gate": "a", "outcome": "passed", "words": "Passed: a is 1."},
        {"gate": "b", "outcome": "failed", "words": "Failed: b is -0.5; asked: value > 0."},
        {"gate": "c", "outcome": "inconclusive", "words": "Inconclusive: c is 0.5."},
    ]
    made["run"]["pipeline"]["gates"] = made["model"]["pipeline"]["metrics"]["gates"] = gates
    for kind in ("run", "model"):
        shown = body(text_of(kind, made[kind])).split("\n\n")
        assert shown[3:5] == ["**Gate failed:** b is −0.5; asked: value &gt; 0.", "**Gate undecided:** c is 0.5."]


def test_a_models_page_leads_to_the_systems_that_it_does_not_show() -> None:
    card = cards()["model"]
    card["pipeline"]["metrics"]["notes"] = ["The 3 rows form 2 groups."]
    url = f"{HUB}/datasets/org/demo-runs/tree/{RUN.name}"
    text = text_of("model", card, known={"dataset": DATASET, "run": RUN})
    assert f"The 3 rows form 2 groups. [The run's page]({url}) compares further systems: the copilot." in text
    assert f"evaluation [{RUN.name}]({url})" in text
    assert "The run compares further systems: the copilot." in text_of("model", card)
    del card["pipeline"]["metrics"]["others"]
    assert f"[The run's page]({url}) compares further systems." in text_of("model", card, known={"run": RUN})


def test_a_page_claims_no_more_than_the_card_knows() -> None:
    made = cards()
    assert "10 records that experts rated, each with a rating, 9 of them with a reason,**" in text_of("dataset", made["dataset"])
    made["dataset"]["pipeline"]["data_quality"]["without_rationale"] = 0
    assert "each with a rating and a reason,**" in text_of("dataset", made["dataset"])
    made["run"]["pipeline"] |= {"commit": "c" * 40, "unknown": []}
    assert "What is unknown" in text_of("run", made["run"])  # the licence
    made["run"] |= {"license": "mit"}
    assert "What is unknown" not in text_of("run", made["run"])
    made["model"]["pipeline"]["approach"]["method"] = "model_set"
    made["model"]["pipeline"]["validation"] = {"examples": 0, "how": "no examples"}
    text = text_of("model", made["model"])
    assert "rows trained on: none, since no weights were changed" in text
    assert "solved examples" not in text.replace("Solved examples in it", "")


def test_a_digest_stands_once() -> None:
    about = cards()["model"]["pipeline"]
    about["lineage"] |= {"model of base": about["base"]["digest"], "model of fine_tuned": "sha256:made", "scores.json": "sha256:s"}
    about["builds"] = [{"artifact": "sha256:made", "created": "2026-01-02T03:04:05+00:00"}] * 2
    rows = sections.lineage(about, {}).splitlines()[2:]
    digests = [row.rsplit("|", 2)[1].strip() for row in rows]
    assert len(set(digests)) == len(digests)
    assert "| built 2026-01-02 03:04\u00a0UTC | `fine_tuned_model.gguf` | `sha256:made` |" in rows
    assert not any("model of" in row for row in rows)


@pytest.mark.parametrize(
    ("same", "near", "said"),
    [
        (4, 0, "likeliest on all of them."),
        (3, 1, "likeliest on 3 of them; on 1 the two likeliest ratings were so close that"),
        (2, 1, "on 1 they differed by more."),
    ],
)
def test_the_check_of_what_is_served_is_told_in_words(same: int, near: int, said: str) -> None:
    about = cards()["model"]["pipeline"]
    about["validation"] = {"rows": 4, "merged": {"same_rating": same, "near_ties": near}}
    text = figures.training(about)
    assert said in text
    assert len(text.split("\n\n")[0].splitlines()) <= 14
    assert "| Memory at most | 0.0 GB |" in text
    assert "| Time | 2 s |" in text


def test_reasons_stand_side_by_side() -> None:
    told = cards()["run"]["pipeline"]
    told["systems"]["copilot"]["rationale"] = [{"metric": "rouge", "estimate": {"value": 0.5}, "n_unscored": 1}]
    lines = figures.rationales(told).splitlines()
    assert "| System | chrF | ROUGE-L |" in lines
    assert "| copilot | – | 0.500, 1 row without a score |" in lines


def test_only_published_weights_are_run_from_the_hub() -> None:
    card = cards()["model"]
    assert "hf.co" not in text_of("model", card).replace("huggingface.co", "")
    assert "uv run pipeline register --set model.engine=ollama\nollama run 0899-model-1.0.0.0" in text_of("model", card)
    text = text_of("model", card, files=("fine_tuned_model.gguf",), notes=("A note.",))
    assert "ollama run hf.co/org/demo-model:fine_tuned_model.gguf" in text
    assert "A note." in text
    assert "not published" not in text


def test_a_model_set_is_no_published_weight() -> None:
    card = cards()["model"]
    card["pipeline"]["approach"] = {"method": "model_set", "reason": "too few rows"}
    text = text_of("model", card)
    assert "No weights were changed: too few rows." in text
    assert "is not published" in text
    assert "remember rows" not in text
    assert "`model_set_config.json` holds" in text_of("model", card, files=("model_set_config.json",))


def test_what_is_unknown_is_said() -> None:
    card = cards()["model"]
    card["license"], card["license_name"] = "other", "not-stated"
    card["pipeline"] |= {"base": None, "metrics": None, "lineage": {}, "training": None, "unknown": ["who made it"]}
    text = text_of("model", card)
    for said in (
        "has not been evaluated",
        "a base model that was not found",
        "Not stated.",
        "- who made it",
        "dataset that it was made from is not",
    ):
        assert said in text
    assert "None" not in body(text)


def test_plots_come_with_words_for_who_can_not_see_them() -> None:
    assert "![Accuracy: a\\]\\(b](plots/a.png)".replace("\\(", "(") in text_of(
        "run", cards()["run"], plots={"plots/a.png": "Accuracy: a](b"}
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("hostile", HOSTILE)
def test_text_from_data_stays_text(kind: Any, hostile: str) -> None:
    clean, card = cards()[kind], copy.deepcopy(cards()[kind])
    about = card["pipeline"]
    about["project"] = about["verdict"] = hostile
    about["why"], about["unknown"], about["notes"] = [hostile], [hostile], [hostile]
    about["versions"] = [{"id": "0001", "name": hostile, "version": hostile, "status": hostile, "created": hostile}]
    if kind == "dataset":
        about["source"] = dict.fromkeys(about["source"], hostile)
        about["ratings"] = [{"value": hostile, "label": hostile, "aliases": [hostile], "abstain": True}]
        about["splits"]["train"]["labels"] = {hostile: 3}
        about["data_quality"]["dropped_by_reason"] = {hostile: 1}
        about["data_quality"]["opinions"] = {hostile: 1}
        about["data_quality"]["notes"] = [hostile]
    told = about if kind == "run" else about.get("metrics")
    if told:
        told["verdict"] = hostile
        told["systems"] = {hostile: next(iter(told["systems"].values())), **told["systems"]}
        told["systems"]["fine_tuned"]["per_rating"] = {hostile: next(iter(told["systems"]["base"]["per_rating"].values()))}
        about["gates"] = [{"gate": hostile, "outcome": "passed", "words": hostile}]
    if kind == "model":
        about["base"]["name"] = about["approach"]["reason"] = about["license_from"] = hostile
        about["hyperparameters"][hostile] = hostile
        about["metrics"] |= {"notes": [hostile], "others": [hostile]}
    about["prompt"] = {"topic": hostile, "labels": [hostile, "b"], "instruction": hostile, "headings": [hostile]}
    about["segments"] = {"A": {"dataset.source": hostile, "dataset.raters": {hostile: hostile}}}
    plots = {"plots/a.png": hostile}
    text = text_of(kind, card, plots=plots)
    assert yaml.safe_load(text.split("\n---\n")[0].removeprefix("---\n"))["pipeline"]["id"] == "0899"
    (ModelCard if kind == "model" else DatasetCard)(text)
    seen, plain = Seen(body(text)), Seen(body(text_of(kind, clean, plots=plots)))
    assert seen.tags <= plain.tags | {"table", "thead", "tbody", "tr", "th", "td", "h2", "ul", "li"}
    assert seen.addresses <= {"plots/a.png", f"{kind}_card.yaml"}
    assert not re.search("[\u202a-\u202e\x00\x1b]", body(text))
    if hostile.isprintable():
        shown = hostile.replace("|", "¦")
        assert " ".join(hostile.split()) in seen.text or " ".join(shown.split()) in seen.text
    rows = [width for width in seen.widths if width]
    assert set(rows) <= {1, 2, 3, 4, 5, 6, 7}


@settings(deadline=None, max_examples=300)
@given(st.text(max_size=30))
@example("__0__")
def test_escaped_text_renders_as_itself(value: str) -> None:
    expected = markdown.line(value)
    for made in (f"{markdown.text(value)}", f"x {markdown.text(value)} x", f"- {markdown.text(value)}"):
        seen = Seen(f"{made}\n")
        assert seen.tags <= {"p", "ul", "li"}
        assert expected in " ".join(seen.text.split()) or expected.split() == seen.text.replace("x ", "").replace(" x", "").split()
    seen = Seen(f"| a | b |\n| --- | --- |\n| {markdown.text(value)} | {markdown.code(value)} |\n")
    assert seen.widths == [2, 2]
    assert seen.tags <= {"table", "thead", "tbody", "tr", "th", "td", "code"}


def test_no_address_but_a_web_address_becomes_a_link() -> None:
    assert markdown.link("a]b", "javascript:alert(1)") == "a\\]b"
    assert markdown.link("a", "https://x.y/a)b") == "a"
    assert markdown.link("a", "https://x.y/z") == "[a](https://x.y/z)"
