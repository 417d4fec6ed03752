"""LoRA training: its loss, gradients, schedule, checkpoints and export, on tiny models of each architecture."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from pipeline.backends import gguf, lora, lora_model, packs
from pipeline.backends.base_model import resolve
from pipeline.config import TrainConfig
from pipeline.errors import ArtifactError, FineTuningNotSupportedError, TrainingFailedError
from pipeline.rating_tree import rating_tree
from pipeline.records import TokenRow
from tests.tiny_models import Tiny, tiny_model, write_tiny  # noqa: F401  a fixture

ARCHITECTURES = ("llama", "qwen2", "qwen3")
CONFIG = TrainConfig(epochs=2, batch_size=4, rank=4, alpha=8.0, learning_rate=1e-2)
SHARED = tuple(range(100, 112))
RATINGS = {"No": (31, 40), "Yes": (31, 41)}  # two answers that part at their second token
TREE = rating_tree({label: (*path, 50) for label, path in RATINGS.items()})
END = 2

TinyModel = Callable[..., Path]


def make_rows(n: int, seed: int = 1, name: str = "r") -> list[TokenRow]:
    """Rows of different lengths with a shared beginning; the rating follows from the prompt's last token."""
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(n):
        own = rng.integers(1000, 1200, rng.integers(3, 12)).tolist()
        label = ("No", "Yes")[own[-1] % 2]
        rationale = rng.integers(2000, 2100, rng.integers(2, 9)).tolist()
        rows.append(TokenRow(f"{name}{number}", (*SHARED, *own, 60, 61), (*RATINGS[label], 50, *rationale, END), (1,), ((40, 41),)))
    return rows


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny matrices gain nothing from threads, and other work on the machine is left alone."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def small_model(tiny_model: TinyModel) -> TinyModel:  # noqa: F811
    return functools.partial(tiny_model, vocabulary=2304)


@pytest.fixture
def llama(small_model: TinyModel) -> Iterator[gguf.GgufFile]:
    with gguf.open_gguf(small_model("llama")) as file:
        yield file


def make_run(base: gguf.GgufFile, folder: Path, config: TrainConfig = CONFIG, **settings: Any) -> lora.LoraRun:
    options = {"seed": 5, "folder": folder, "key": "sha256:test", "dtype": torch.float32, **settings}
    return lora.LoraRun(base, options.pop("train", make_rows(10)), options.pop("valid", make_rows(4, 2, "v")), config, **options)


def stir(layers: dict[str, lora_model.LoraLinear]) -> None:
    """Gives B values, so that the change is not zero."""
    generator = torch.Generator().manual_seed(9)
    for layer in layers.values():
        layer.b.data = 0.05 * torch.randn(layer.b.shape, generator=generator)


def gradients(layers: dict[str, lora_model.LoraLinear]) -> dict[str, torch.Tensor]:
    found = {}
    for name, layer in layers.items():
        assert layer.a.grad is not None
        assert layer.b.grad is not None
        found |= {f"{name}.a": layer.a.grad, f"{name}.b": layer.b.grad}
        layer.a.grad = layer.b.grad = None
    return found


# --- the model -------------------------------------------------------------------------------------------------------

VARIANTS = [
    *((architecture, {"weights": "F32", "tied": True}) for architecture in ARCHITECTURES),
    ("llama", {"weights": "Q8_0", "tied": False}),
    ("qwen2", {"weights": "Q4_0", "tied": False}),
    ("qwen3", {"weights": "F16", "tied": False}),
]


@pytest.mark.filterwarnings("ignore::UserWarning")  # transformers speaks about its own loader
@pytest.mark.parametrize(("architecture", "settings"), VARIANTS)
def test_the_loaded_model_is_the_one_transformers_loads(small_model: TinyModel, architecture: str, settings: dict[str, Any]) -> None:
    from transformers import AutoModelForCausalLM

    path = small_model(architecture, **settings)
    head = {"head_dim": Tiny(architecture).head_size} if architecture == "qwen3" else {}  # their loader overlooks this key
    theirs = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32, **head).eval()
    tokens = torch.tensor([[*make_rows(1)[0].prompt, *range(500, 540)]])
    with gguf.open_gguf(path) as file, torch.no_grad():
        ours: Any = lora_model.load_model(file, torch.float32)
        torch.testing.assert_close(ours(tokens).logits, theirs(tokens).logits, atol=1e-4, rtol=1e-4)
        assert not any(parameter.requires_grad for parameter in ours.parameters())
        assert ours.config.tie_word_embeddings is settings["tied"]


def test_scaled_positions_in_a_tensor_are_applied(small_model: TinyModel) -> None:
    with gguf.open_gguf(small_model("llama", rope_freqs=True)) as scaled, gguf.open_gguf(small_model("llama")) as plain:
        with_factors: Any = lora_model.load_model(scaled, torch.float32)
        without: Any = lora_model.load_model(plain, torch.float32)
        factors = torch.from_numpy(scaled.dequantised("rope_freqs.weight"))
    torch.testing.assert_close(with_factors.model.rotary_emb.inv_freq * factors, without.model.rotary_emb.inv_freq)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_our_lora_is_pefts(small_model: TinyModel, architecture: str) -> None:
    from peft import LoraConfig, get_peft_model

    with gguf.open_gguf(small_model(architecture)) as file:
        ours: Any = lora_model.load_model(file, torch.float32)
        layers = lora_model.add_lora(ours, CONFIG, seed=1)
        stir(layers)
        theirs: Any = get_peft_model(
            lora_model.load_model(file, torch.float32),
            LoraConfig(r=CONFIG.rank, lora_alpha=CONFIG.alpha, target_modules=list(lora_model.TARGETS), lora_dropout=0.0),
        )
    adapted = {
        gguf.tensor_name(name.removeprefix("base_model.model.") + ".weight"): module
        for name, module in theirs.named_modules()
        if hasattr(module, "lora_A")
    }
    assert adapted.keys() == layers.keys()
    for name, layer in layers.items():
        adapted[name].lora_A.default.weight.data = layer.a.detach().clone()
        adapted[name].lora_B.default.weight.data = layer.b.detach().clone()
        torch.testing.assert_close(layer.delta(), adapted[name].get_delta_weight("default"))
    tokens = torch.tensor([make_rows(1)[0].prompt])
    a, b = ours(tokens).logits, theirs(tokens).logits
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    for logits in (a, b):
        F.cross_entropy(logits[0, :-1], tokens[0, 1:]).backward()
    for name, layer in layers.items():
        torch.testing.assert_close(layer.a.grad, adapted[name].lora_A.default.weight.grad, atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(layer.b.grad, adapted[name].lora_B.default.weight.grad, atol=1e-6, rtol=1e-4)


def test_other_architectures_are_refused_by_name(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "gemma2.gguf", Tiny("gemma2", vocabulary=64))
    with (
        gguf.open_gguf(path) as file,
        pytest.raises(FineTuningNotSupportedError, match=r"gemma2 can't be trained; llama, qwen2, qwen3 can"),
    ):
        lora_model.model_config(file)
    why = lora.LoraTrainer().unsupported(resolve(str(path)))
    assert why is not None
    assert "gemma2" in why


@pytest.mark.parametrize(
    ("keys", "tensor", "words"),
    [
        ({"expert_count": 4}, "", "experts"),
        ({"rope.dimension_count": 8}, "", "a part of each head"),
        ({}, "blk.0.attn_q.bias", "attn_q.bias"),
        ({}, "blk.1.ffn_gate_inp.weight", "ffn_gate_inp"),
    ],
)
def test_variants_that_would_be_learnt_wrongly_are_refused(llama: gguf.GgufFile, keys: dict[str, int], tensor: str, words: str) -> None:
    llama.keys = {**llama.keys, **{f"llama.{key}": value for key, value in keys.items()}}
    if tensor:
        llama.tensors = {**llama.tensors, tensor: llama.tensors["output_norm.weight"]}
    with pytest.raises(FineTuningNotSupportedError, match=words):
        lora_model.model_config(llama)


def test_a_missing_or_misshapen_tensor_is_named(llama: gguf.GgufFile) -> None:
    name = "blk.1.ffn_up.weight"
    info = llama.tensors[name]
    llama.tensors = {**llama.tensors, name: dataclasses.replace(info, shape=info.shape[::-1])}
    with pytest.raises(ArtifactError, match=r"blk\.1\.ffn_up\.weight has shape"):
        lora_model.load_model(llama, torch.float32)
    llama.tensors = {other: info for other, info in llama.tensors.items() if other != name}
    with pytest.raises(ArtifactError, match=r"blk\.1\.ffn_up\.weight is missing"):
        lora_model.load_model(llama, torch.float32)


# --- rows and loss ---------------------------------------------------------------------------------------------------


def loss_row_by_row(model: Any, row: TokenRow, weight: float) -> torch.Tensor:
    """The plain way: the whole row, all logits, a loss on each answer token given what stands before it."""
    tokens = torch.tensor([*row.prompt, *row.answer])
    losses = F.cross_entropy(model(tokens[None, :-1]).logits[0].float(), tokens[1:], reduction="none")[len(row.prompt) - 1 :]
    weights = torch.ones(len(row.answer))
    weights[list(row.rating_tokens)] = weight
    return (losses * weights).sum()


@pytest.mark.parametrize("weight", [1.0, 3.0])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_packed_rows_give_the_loss_and_gradients_of_rows_alone(small_model: TinyModel, architecture: str, weight: float) -> None:
    rows = make_rows(5)
    rows.append(dataclasses.replace(rows[0], record_id="short", prompt=SHARED))  # nothing of its own before the answer
    shared = packs.shared_prefix(rows)
    assert shared == len(SHARED)
    with gguf.open_gguf(small_model(architecture)) as file:
        model = lora_model.load_model(file, torch.float32)
    layers = lora_model.add_lora(model, CONFIG, seed=1)
    stir(layers)
    whole = sum((loss_row_by_row(model, row, weight) for row in rows), torch.tensor(0.0))
    whole.backward()
    expected = gradients(layers)
    groups = packs.pack_rows(rows, shared, limit=70)
    assert 1 < len(groups) < len(rows)
    packed = sum((packs.pack_loss(model, packs.make_pack(group, shared, weight)) for group in groups), torch.tensor(0.0))
    packed.backward()
    torch.testing.assert_close(packed, whole, atol=1e-4, rtol=1e-5)
    found = gradients(layers)
    for name, gradient in expected.items():
        assert gradient.abs().max() > 1e-4
        torch.testing.assert_close(found[name], gradient, atol=1e-4 * float(gradient.abs().max()), rtol=1e-3)


def test_a_pack_learns_the_answer_and_its_end_only() -> None:
    rows = make_rows(3)
    pack = packs.make_pack(rows, len(SHARED))
    prompt_tokens = {token for row in rows for token in row.prompt}
    for number, row in enumerate(rows):
        mine = pack.row == number
        assert pack.labels[mine].tolist() == list(row.answer)
        assert pack.labels[mine].tolist()[-1] == END
        assert pack.tokens[pack.at[mine]].tolist() == [row.prompt[-1], *row.answer[:-1]]
        assert pack.decides[mine].tolist() == [place == 1 for place in range(len(row.answer))]
        assert pack.positions[pack.at[mine]].tolist() == list(range(len(row.prompt) - 1, row.size - 1))
    assert not prompt_tokens & set(pack.labels.tolist())
    assert len(pack.tokens) == len(SHARED) + sum(row.size - 1 - len(SHARED) for row in rows)  # no padding, the beginning once
    assert packs.make_pack(rows[:1], len(SHARED)).mask is None


def test_nothing_after_a_rows_place_or_in_another_row_is_seen() -> None:
    rows = make_rows(3)
    pack = packs.make_pack(rows, len(SHARED))
    assert pack.mask is not None
    start = len(SHARED)
    for row in rows:
        end = start + row.size - 1 - len(SHARED)
        for place in range(start, end):
            assert pack.mask[place].nonzero().flatten().tolist() == [*range(len(SHARED)), *range(start, place + 1)]
        start = end


def test_rows_are_packed_whole_and_within_the_limit() -> None:
    rows = make_rows(20)
    groups = packs.pack_rows(rows, len(SHARED), limit=60)
    assert sorted(row.record_id for group in groups for row in group) == sorted(row.record_id for row in rows)
    for group in groups:
        assert len(group) == 1 or len(SHARED) + sum(row.size - len(SHARED) for row in group) <= 60
    [alone] = packs.pack_rows(rows[:1], len(SHARED), limit=5)
    assert alone == rows[:1]


def test_rating_weight_counts_the_ratings_place_more(llama: gguf.GgufFile) -> None:
    model = lora_model.load_model(llama, torch.float32)
    rows = make_rows(2)
    plain, heavy = packs.make_pack(rows, len(SHARED)), packs.make_pack(rows, len(SHARED), 5.0)
    with torch.no_grad():
        losses = F.cross_entropy(packs.answer_logits(model, plain), plain.labels, reduction="none")
        assert heavy.weights.sum() == plain.weights.sum() + 2 * 4
        torch.testing.assert_close(packs.pack_loss(model, plain), losses.sum())
        torch.testing.assert_close(packs.pack_loss(model, heavy), losses.sum() + 4 * losses[plain.decides].sum())


def test_the_learning_rate_rises_over_a_tenth_and_falls_to_nothing() -> None:
    rates = [lora.learning_rate_at(step, 40) for step in range(40)]
    assert rates[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert max(rates) == 1.0
    assert rates[4] == 1.0
    assert all(a - b == pytest.approx(1 / 36) for a, b in itertools.pairwise(rates[4:]))
    assert rates[-1] == pytest.approx(1 / 36)
    assert all(0 < lora.learning_rate_at(step, steps) <= 1 for steps in (1, 2, 3, 7) for step in range(steps))


# --- a run -----------------------------------------------------------------------------------------------------------


def weights_of(run: lora.LoraRun) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in run.parameters]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_training_learns_and_says_what_it_did(llama: gguf.GgufFile, tmp_path: Path) -> None:
    steps: list[tuple[str, int, int]] = []
    run = make_run(llama, tmp_path, progress=lambda stage, done, total, note="": steps.append((stage, done, total)))
    frozen = {name: weight.clone() for name, weight in run.model.state_dict().items() if not name.endswith((".a", ".b"))}
    before = run.evaluate(run.train_rows)[0]
    result = run.run()
    assert steps == [("train", n, 6) for n in range(1, 7)]
    assert result.steps == 6
    assert result.trained_rows == 10
    assert result.row_tokens == sum(row.size for row in make_rows(10)) == result.epochs[0].tokens
    assert result.answer_tokens == sum(len(row.answer) for row in make_rows(10))
    assert result.shared_prefix_tokens == len(SHARED)
    assert result.dtype == "float32"
    assert [figures.epoch for figures in result.epochs] == [1, 2]
    assert result.seconds == pytest.approx(sum(figures.seconds for figures in result.epochs))
    assert run.evaluate(run.train_rows)[0] < before - 0.5
    for name, weight in run.model.state_dict().items():
        if name in frozen:
            assert torch.equal(weight, frozen[name]), name
    assert not run.model.training


def test_evaluation_counts_plainly(llama: gguf.GgufFile, tmp_path: Path) -> None:
    run = make_run(llama, tmp_path)
    stir(run.lora)
    rows = make_rows(12, 3)
    loss, accuracy = run.evaluate(rows)
    total, right = 0.0, 0
    with torch.no_grad():
        for row in rows:
            total += float(loss_row_by_row(run.model, row, 1.0))
            logits = run.model(torch.tensor([[*row.prompt, row.answer[0]]])).logits[0, -1]
            right += (logits[40] > logits[41]).item() == (row.answer[1] == 40)
    assert loss == pytest.approx(total / sum(len(row.answer) for row in rows), rel=1e-5)
    assert accuracy == right / len(rows)
    assert 0 < right < len(rows)


def test_the_epoch_with_the_lowest_validation_loss_remains(llama: gguf.GgufFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(llama, tmp_path, dataclasses.replace(CONFIG, epochs=3))
    losses, seen = iter([2.0, 1.0, 3.0]), []

    def evaluate(rows: object) -> tuple[float, float]:
        seen.append(weights_of(run))
        return next(losses), 0.5

    monkeypatch.setattr(run, "evaluate", evaluate)
    result = run.run()
    assert result.best_epoch == 2
    assert same(weights_of(run), seen[1])
    assert not same(seen[1], seen[2])


def test_without_valid_rows_the_training_loss_decides(llama: gguf.GgufFile, tmp_path: Path) -> None:
    result = make_run(llama, tmp_path, valid=[]).run()
    assert result.best_epoch == min(result.epochs, key=lambda figures: figures.train_loss).epoch
    assert all(figures.valid_loss is None and figures.valid_accuracy is None for figures in result.epochs)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_killed_run_resumes_to_the_same_weights(
    llama: gguf.GgufFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dropout: float
) -> None:
    config = dataclasses.replace(CONFIG, epochs=4, dropout=dropout)
    whole = make_run(llama, tmp_path / "whole", config)
    expected = whole.run()
    killed = make_run(llama, tmp_path / "killed", config)
    epoch = killed._epoch

    def dies(number: int) -> tuple[float, int]:
        if number == 2:
            killed._step(killed.train_rows[:4], 6)  # in the middle of the third epoch
            raise KeyboardInterrupt
        return epoch(number)

    monkeypatch.setattr(killed, "_epoch", dies)
    with pytest.raises(KeyboardInterrupt):
        killed.run()
    torch.manual_seed(12345)
    resumed = make_run(llama, tmp_path / "killed", config)
    assert resumed.state.epoch == 2
    found = resumed.run()
    assert same(weights_of(resumed), weights_of(whole))
    assert found.best_epoch == expected.best_epoch
    plain = [dataclasses.replace(figures, seconds=0) for figures in found.epochs]
    assert plain == [dataclasses.replace(figures, seconds=0) for figures in expected.epochs]


def test_dropout_is_at_work_and_off_for_evaluation(llama: gguf.GgufFile, tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, epochs=1)
    plain, dropping = make_run(llama, tmp_path / "a", config), make_run(llama, tmp_path / "b", dataclasses.replace(config, dropout=0.5))
    plain.run()
    dropping.run()
    assert not same(weights_of(plain), weights_of(dropping))
    assert dropping.evaluate(dropping.valid_rows) == dropping.evaluate(dropping.valid_rows)


@pytest.mark.parametrize("damage", ["cut", "garbage", "empty", "another run's"])
def test_a_checkpoint_that_is_no_use_starts_anew(llama: gguf.GgufFile, tmp_path: Path, damage: str) -> None:
    make_run(llama, tmp_path, dataclasses.replace(CONFIG, epochs=1)).run()
    path = tmp_path / ".checkpoint" / "state.pt"
    whole = path.read_bytes()
    path.write_bytes({"cut": whole[: len(whole) // 2], "garbage": b"\x80\x02garbage", "empty": b"", "another run's": whole}[damage])
    key = "sha256:other" if damage == "another run's" else "sha256:test"
    run = make_run(llama, tmp_path, dataclasses.replace(CONFIG, epochs=1), key=key)
    assert run.state.epoch == 0
    assert run.run().epochs[0].train_loss > 0
    assert make_run(llama, tmp_path, dataclasses.replace(CONFIG, epochs=1), key=key).state.epoch == 1


def test_the_checkpoint_is_this_questions_only(small_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora, "fastest_dtype", lambda: torch.float32)
    base, rows, trainer = resolve(str(small_model("llama"))), make_rows(4), lora.LoraTrainer()
    config = dataclasses.replace(CONFIG, epochs=1)
    keys = set()
    for train, settings, seed in (
        (rows, config, 5),
        (rows[:3], config, 5),
        (rows, dataclasses.replace(config, rank=2), 5),
        (rows, config, 6),
    ):
        keys.add(trainer.train(base, train, rows[:2], settings, seed=seed, folder=tmp_path).run.key)
    assert len(keys) == 4


def test_a_loss_that_is_not_finite(llama: gguf.GgufFile, tmp_path: Path) -> None:
    run = make_run(llama, tmp_path)
    run.parameters[1].data.fill_(math.inf)
    with pytest.raises(TrainingFailedError, match=r"not finite at step 1 of 6"):
        run.run()
    assert not (tmp_path / ".checkpoint").exists()


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")]
)
def test_memory_that_runs_out(llama: gguf.GgufFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fails(*arguments: object) -> torch.Tensor:
        raise error

    run = make_run(llama, tmp_path)
    monkeypatch.setattr(lora, "pack_loss", fails)
    with pytest.raises(TrainingFailedError, match="out of memory") as caught:
        run.run()
    assert caught.value.hint


def test_other_errors_are_not_hidden(llama: gguf.GgufFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: object) -> torch.Tensor:
        raise RuntimeError("a bug")

    run = make_run(llama, tmp_path)
    monkeypatch.setattr(lora, "pack_loss", fails)
    with pytest.raises(RuntimeError, match="a bug"):
        run.run()


def test_the_estimate_grows_with_the_work(small_model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora, "_gemm_speed", lambda dtype: 1e9)
    base, trainer = resolve(str(small_model("llama"))), lora.LoraTrainer()

    def estimate(n: int, **settings: Any) -> tuple[float, int]:
        found = trainer.estimate(base, make_rows(n), make_rows(4, 2), dataclasses.replace(CONFIG, **settings))
        return found.seconds, found.memory_bytes

    assert estimate(8)[0] > 0
    assert estimate(8)[1] > base.facts.size_bytes
    assert estimate(80)[0] > 5 * estimate(8)[0]
    assert estimate(8, epochs=4)[0] == pytest.approx(2 * estimate(8)[0])
    assert trainer.estimate(base, make_rows(4), [], CONFIG).seconds > 0


# --- export ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_merged_file_loads_as_the_trained_model(small_model: TinyModel, tmp_path: Path, architecture: str) -> None:
    with gguf.open_gguf(small_model(architecture, weights="F16")) as base:
        run = make_run(base, tmp_path)
        trained = lora.TrainedLora(run, run.run())
        facts = trained.write(tmp_path)
        assert facts["merged_tensors"] == {"F16": 14}
        assert facts["kept_cosine_lowest"] > 0.99
        trained.write_unchanged(tmp_path / "unchanged.gguf")
        tokens = torch.tensor([make_rows(1)[0].prompt])
        with gguf.open_gguf(tmp_path / "fine_tuned_model.gguf") as merged, torch.no_grad():
            reloaded: Any = lora_model.load_model(merged, torch.float32)
            torch.testing.assert_close(reloaded(tokens).logits, run.model(tokens).logits, atol=0.02, rtol=0.01)
            plain: Any = lora_model.load_model(base, torch.float32)
            assert (reloaded(tokens).logits - plain(tokens).logits).abs().max() > 0.2
        with gguf.open_gguf(tmp_path / "unchanged.gguf") as unchanged, torch.no_grad():
            again: Any = lora_model.load_model(unchanged, torch.float32)
            assert torch.equal(again(tokens).logits, plain(tokens).logits)


def test_rating_probabilities_are_those_of_the_branches(llama: gguf.GgufFile, tmp_path: Path) -> None:
    run = make_run(llama, tmp_path, dataclasses.replace(CONFIG, epochs=1))
    trained = lora.TrainedLora(run, run.run())
    prompt = make_rows(1)[0].prompt
    [found] = trained.rating_probabilities([prompt], TREE)
    with torch.no_grad():
        logits = run.model(torch.tensor([[*prompt, 31]])).logits[0, -1]
    first = torch.softmax(logits[[40, 41]], 0)
    assert found == pytest.approx({"No": float(first[0]), "Yes": float(first[1])}, rel=1e-4)
    top = trained.top_logprobs((*prompt, 31), 5)
    best = torch.log_softmax(logits, 0).topk(5)
    assert list(top) == best.indices.tolist()
    assert list(top.values()) == pytest.approx(best.values.tolist(), rel=1e-4)
