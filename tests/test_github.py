"""What GitHub Actions tells a job and takes from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config import load_config
from pipeline.errors import ConfigError, OutputError, UserError
from pipeline.github import INPUTS, SETTINGS, input_settings, run_name, wants_dry_run, write_outputs


def settings(**inputs: Any) -> list[str]:
    return input_settings({INPUTS: json.dumps(inputs)})


# --- inputs ----------------------------------------------------------------------------------------------------------


def test_each_input_becomes_a_setting_with_its_type() -> None:
    found = settings(dataset="data/x.csv", base_model="tiny:q4", epochs="5", learning_rate="2e-4", batch_size="8", publish="yes")
    assert found == ['dataset.path="data/x.csv"', 'model.name="tiny:q4"', "train.epochs=5", "train.learning_rate=0.0002",
                     "train.batch_size=8", "publish.enabled=true"]  # fmt: skip


def test_every_input_is_a_key_of_the_configuration(tmp_path: Path) -> None:
    file = tmp_path / "pipeline.yaml"
    file.write_text("project: demo\ndataset: {license: mit}\npublish: {namespace: org}\n", encoding="utf-8")
    inputs = {"dataset": "x.csv", "base_model": "m", "epochs": "5", "learning_rate": "0.1", "batch_size": "2", "publish": "yes"}
    assert set(inputs) == set(SETTINGS)
    config = load_config(file, settings(**inputs))
    assert (config.dataset.path, config.model.name, config.train.epochs, config.publish.enabled) == ("x.csv", "m", 5, True)
    assert (config.train.learning_rate, config.train.batch_size) == (0.1, 2)


@pytest.mark.parametrize("text", ["", "null", "  ", "{}", '{"dataset": "", "epochs": null, "publish": "as configured", "other": "x"}'])
def test_what_was_left_empty_stays_as_configured(text: str) -> None:
    assert input_settings({INPUTS: text}) == []
    assert input_settings({}) == []


@pytest.mark.parametrize(("told", "wanted"), [(True, "true"), (False, "false"), ("yes", "true"), ("No", "false"), ("TRUE", "true")])
def test_a_box_that_was_ticked_and_a_chosen_word_are_the_same(told: object, wanted: str) -> None:
    assert settings(publish=told) == [f"publish.enabled={wanted}"]


@pytest.mark.parametrize(
    "text",
    ["x.csv\ntrain.epochs: 9", "a: b", "a # b", "#", "'", '"', "'\"'", "[1, 2]", "{a: b}", "--set", "-", "!!python/object:os.system", "*x",
     "&x", "|", "%TAG", "yes", "0899", "1e5", "null", "~", "a=b", "$(touch x)", "`x`", "${{ github.token }}", "x\\", "\\n", "data/🙂/ü.csv",
     "a\x85b\u2028c", "\ufeffx", "x\x00y", "\\ud83d\\ude42", "?", "<<: *x"],
)  # fmt: skip
def test_whatever_is_typed_is_one_text_of_the_one_key(tmp_path: Path, text: str) -> None:
    (setting,) = settings(base_model=text)
    key, _, value = setting.partition("=")
    assert (key, yaml.safe_load(value)) == ("model.name", text)
    assert "\n" not in setting
    file = tmp_path / "pipeline.yaml"
    file.write_text("project: demo\n", encoding="utf-8")
    if "\0" not in text:
        config = load_config(file, [setting])
        assert (config.model.name, config.train.epochs) == (text, 3)


@given(st.text(st.characters(exclude_categories=["Cs"])).filter(lambda text: text.strip() == text != ""))
def test_any_text_reads_back(text: str) -> None:
    if text != "as configured":
        assert yaml.safe_load(settings(dataset=text)[0].partition("=")[2]) == text


def test_all_inputs_that_are_no_numbers_are_named_at_once() -> None:
    with pytest.raises(ConfigError, match="the inputs of this workflow run") as error:
        settings(epochs="five", learning_rate="nan", batch_size="1.5", publish="maybe")
    assert error.value.problems == (
        "epochs: 'five' is not a number", "learning_rate: 'nan' is not a number", "batch_size: '1.5' is not a number",
        "publish: 'maybe' is not yes or no",
    )  # fmt: skip
    assert error.value.hint == "run the workflow again with other inputs"


@pytest.mark.parametrize("text", ["[]", "7", '"x"', "{", "true", "[" * 100_000])
def test_inputs_that_are_no_object_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="PIPELINE_INPUTS is not a JSON object") as error:
        input_settings({INPUTS: text})
    assert error.value.hint == "give it toJSON(inputs)"


@pytest.mark.parametrize(("told", "wanted"), [(True, True), ("true", True), ("yes", True), (False, False), ("", False), (None, False)])
def test_a_dry_run_is_one_where_it_was_asked_for(told: object, wanted: bool) -> None:
    assert wants_dry_run({INPUTS: json.dumps({"dry_run": told})}) is wanted
    assert not wants_dry_run({})


# --- the run and its outputs -------------------------------------------------------------------------------------------


def test_attempts_of_one_workflow_run_have_one_name_and_runs_elsewhere_have_their_own() -> None:
    first, second = ({"GITHUB_RUN_ID": "7", "GITHUB_RUN_ATTEMPT": attempt, "GITHUB_REPOSITORY": "o/r"} for attempt in "12")
    assert run_name(first) == run_name(second) == "workflow run 7 of o/r"
    assert run_name({"GITHUB_RUN_ID": "8", "GITHUB_REPOSITORY": "o/r"}) != run_name(first)
    assert run_name({}) != run_name({})


def test_outputs_are_added_to_the_file_and_go_nowhere_without_one(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_text("a=b\n", encoding="utf-8")
    write_outputs({"changed": "true", "text": "a=b: ü"}, {"GITHUB_OUTPUT": str(path)})
    assert path.read_text(encoding="utf-8") == "a=b\nchanged=true\ntext=a=b: ü\n"
    write_outputs({"changed": "true"}, {})


@pytest.mark.parametrize("value", ["a\nb=c", "a\rb=c"])
def test_no_output_can_smuggle_in_another(tmp_path: Path, value: str) -> None:
    with pytest.raises(ValueError, match="versions: more than a line"):
        write_outputs({"versions": value}, {"GITHUB_OUTPUT": str(tmp_path / "out")})
    assert not (tmp_path / "out").exists()


def test_outputs_that_cannot_be_written_are_an_error_with_the_path(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="can't be written"):
        write_outputs({"a": "b"}, {"GITHUB_OUTPUT": str(tmp_path / "missing" / "out")})
