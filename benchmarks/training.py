"""Our LoRA training against TRL's SFTTrainer on the same rows: tokens a second, peak memory, losses side by side.

    uv run --group benchmark python benchmarks/training.py
    uv run --group benchmark python benchmarks/training.py --csv ../shared/data/esnli/rated.csv --text premise hypothesis --steps 30
    uv run --group benchmark python benchmarks/training.py --csv ../shared/data/pubmedqa/rated.csv --text question context --steps 10

Both sides train the same dequantised weights of the same GGUF (read by this project's loader: TRL refuses a model that transformers read
from a GGUF until its quantization_config is stripped) with the same first LoRA weights, on the same rows in the same order, with the same
learning rate at each step. TRL's settings are its best on a CPU: loss on the answer alone, no gradient checkpointing, fused AdamW, the
faster number type of this machine, and rows without padding (`--trl padded` for padded batches). Each run is a process of its own; sides
alternate. A token counts when it belongs to a row: padding does not, a beginning that rows share counts once a row on both sides. The
first step is left out of the time. Peak memory is that of training (model, optimiser, activations), the loading left out where Linux lets
the mark be set back.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import itertools
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.config import PromptConfig, TrainConfig
from pipeline.prompts import user_text
from pipeline.records import Rating, RatingScale, Record, TokenRow

SAMPLE = Path(__file__).resolve().parents[1] / "data" / "chief_complaints.csv"
SAMPLE_TEXT, SAMPLE_RATING, SAMPLE_RATIONALE = ["chief_complaint", "triage_note"], "expert_rating", "expert_rationale"
SEED = 42


# --- the rows, in token ids, once for both sides -----------------------------------------------------------------------


def read_rows(options: argparse.Namespace) -> tuple[list[Record], RatingScale]:
    """As many rows as asked for, from the top again where the table is shorter."""
    with options.csv.open(encoding="utf-8-sig", newline="") as handle:
        table = [row for row in csv.DictReader(handle) if row[options.rating].strip()]
    labels = sorted({row[options.rating].strip() for row in table})
    scale = RatingScale(tuple(Rating(n, label) for n, label in enumerate(labels)))
    records = []
    for n, row in enumerate(itertools.islice(itertools.cycle(table), options.rows)):
        prompt = user_text({name: row[name] for name in options.text}, PromptConfig(), scale)
        records.append(Record(f"r{n}", f"r{n}", "train", prompt, row[options.rating].strip(), row[options.rationale]))
    return records, scale


def prepare(options: argparse.Namespace, model: Path) -> None:
    from pipeline.backends.llamacpp import open_engine
    from pipeline.training_rows import tokenised

    records, scale = read_rows(options)
    with open_engine(model, parallel=1) as engine:
        rows = tokenised(records, engine, scale, max_tokens=2048, context_tokens=engine.trained_context).train
    options.work.write_text(json.dumps([dataclasses.asdict(row) for row in rows]))


def load_rows(options: argparse.Namespace) -> list[TokenRow]:
    def tuples(value: Any) -> Any:
        return tuple(map(tuples, value)) if isinstance(value, list) else value

    return [TokenRow(**{key: tuples(value) for key, value in row.items()}) for row in json.loads(options.work.read_text())]


def train_config(options: argparse.Namespace) -> TrainConfig:
    return TrainConfig(
        epochs=1, batch_size=options.batch_size, learning_rate=options.learning_rate, rank=options.rank, alpha=2.0 * options.rank
    )


def batches(options: argparse.Namespace, rows: list[TokenRow]) -> list[list[TokenRow]]:
    """`steps` batches, in the order that our trainer would draw for its first epoch."""
    import torch

    torch.manual_seed(SEED * 1_000_003)
    order = torch.randperm(len(rows)).tolist()
    return [[rows[n] for n in order[at : at + options.batch_size]] for at in range(0, len(rows), options.batch_size)]


# --- the sides -------------------------------------------------------------------------------------------------------


class Clock:
    """Seconds and losses a step. The mark of the memory's peak is set back when it starts."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.losses: list[float] = []
        mark = Path("/proc/self/clear_refs")
        if mark.exists():
            mark.write_text("5")
        self.begun = time.perf_counter()

    def step(self, loss: float) -> None:
        self.ends.append(time.perf_counter())
        self.losses.append(loss)

    def report(self, tokens: Sequence[int]) -> dict[str, Any]:
        """The first step warms up: its tokens and time are left out where there are others."""
        first = 1 if len(self.ends) > 1 else 0
        seconds = self.ends[-1] - (self.ends[0] if first else self.begun)
        return {"tokens": sum(tokens[first:]), "seconds": seconds, "losses": self.losses, "peak_mb": peak_mb()}


def peak_mb() -> int:
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().split("VmHWM:")[1].split()[0]) // 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (1 << 20 if sys.platform == "darwin" else 1 << 10)


def run_ours(options: argparse.Namespace, model: Path) -> dict[str, Any]:
    import torch

    from pipeline.backends import gguf, lora

    rows = load_rows(options)
    with gguf.open_gguf(model) as base, tempfile.TemporaryDirectory() as folder:
        run = lora.LoraRun(
            base, rows, [], train_config(options), seed=SEED, folder=Path(folder), key="benchmark", dtype=getattr(torch, options.dtype)
        )
        plain = run._step
        clock = Clock()

        def step(batch: Sequence[TokenRow], number: int) -> tuple[float, float]:
            loss, answers = plain(batch, number)
            clock.step(loss / answers)
            return loss, answers

        run._step = step  # type: ignore[method-assign]
        run.run()
        return clock.report([sum(row.size for row in batch) for batch in batches(options, rows)])


def run_trl(options: argparse.Namespace, model: Path) -> dict[str, Any]:
    import torch
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from torch.utils.data import SequentialSampler
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from pipeline.backends import gguf, lora, lora_model

    config, in_order = train_config(options), batches(options, load_rows(options))
    with gguf.open_gguf(model) as base:
        adapted = peft_model(lora_model.load_model(base, getattr(torch, options.dtype)), config)
    rows = [row for batch in in_order for row in batch]
    columns = {
        "input_ids": [[*row.prompt, *row.answer] for row in rows],
        "labels": [[*[-100] * len(row.prompt), *row.answer] for row in rows],
    }
    # Rows come in token ids; the trainer wants a tokenizer for its padding token only.
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1, "pad": 2}, "a")), pad_token="pad", eos_token="pad"
    )
    trained = [weight for weight in adapted.parameters() if weight.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=config.learning_rate, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: lora.learning_rate_at(step, len(in_order)))

    class InOrder(SFTTrainer):  # type: ignore[misc]
        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            return SequentialSampler(self.train_dataset)

    class Times(TrainerCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.clock: Clock | None = None

        def on_train_begin(self, *arguments: Any, **settings: Any) -> None:
            self.clock = Clock()

        def on_log(self, arguments: Any, state: Any, control: Any, logs: Any = None, **settings: Any) -> None:
            if self.clock is not None and "loss" in (logs or {}):
                self.clock.step(float(logs["loss"]))

    times = Times()
    with tempfile.TemporaryDirectory() as folder:
        settings = SFTConfig(
            output_dir=folder, use_cpu=True, bf16=options.dtype == "bfloat16", per_device_train_batch_size=options.batch_size,
            num_train_epochs=1, max_grad_norm=lora.CLIP_NORM, gradient_checkpointing=False, padding_free=options.trl == "padding_free",
            max_length=None, dataset_kwargs={"skip_prepare_dataset": True}, logging_steps=1, report_to=[], save_strategy="no",
            disable_tqdm=True, dataloader_pin_memory=False, seed=SEED,
        )  # fmt: skip
        InOrder(
            adapted, settings, train_dataset=Dataset.from_dict(columns), processing_class=tokenizer,
            optimizers=(optimiser, schedule), callbacks=[times],
        ).train()  # fmt: skip
    assert times.clock is not None
    return times.clock.report([sum(row.size for row in batch) for batch in in_order])


def peft_model(plain: Any, config: TrainConfig) -> Any:
    """PEFT's LoRA on the same layers, with the first weights that our trainer draws from the same seed."""
    import torch
    from peft import LoraConfig, get_peft_model

    from pipeline.backends import lora_model

    torch.manual_seed(SEED)
    first = {}
    for path, module in plain.named_modules():
        if path.rpartition(".")[2] in lora_model.TARGETS:
            first[path] = torch.empty(config.rank, module.in_features)
            torch.nn.init.kaiming_uniform_(first[path], a=math.sqrt(5))
    adapted: Any = get_peft_model(
        plain,
        LoraConfig(
            r=config.rank, lora_alpha=config.alpha, target_modules=list(lora_model.TARGETS), lora_dropout=0.0, task_type="CAUSAL_LM"
        ),
    )
    for path, values in first.items():
        adapted.base_model.model.get_submodule(path).lora_A.default.weight.data = values
    return adapted


# --- comparing -------------------------------------------------------------------------------------------------------


def in_process(side: str, arguments: Sequence[str]) -> dict[str, Any]:
    done = subprocess.run([sys.executable, __file__, *arguments, "--side", side], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{side}:\n{done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def compare(options: argparse.Namespace, arguments: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        arguments = [*arguments, "--work", str(Path(folder) / "rows.json")]
        facts = in_process("prepare", arguments)
        arguments += ["--dtype", facts["dtype"]]
        load = f"; load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
        size = f"{facts['rows']} rows of {facts['tokens'] / facts['rows']:.0f} tokens, {facts['shared']} of them shared"
        print(f"{size}; {facts['dtype']}; {facts['threads']} threads{load}")
        results: dict[str, list[dict[str, Any]]] = {"ours": [], "trl": []}
        for number in range(options.repeats):
            for side in ("ours", "trl") if number % 2 == 0 else ("trl", "ours"):
                result = in_process(side, arguments)
                results[side].append(result)
                print(f"round {number + 1}  {side:5}{speed(result):8.0f} tokens/s  {result['peak_mb']:6} MB", flush=True)
    print("\nloss a step   ours     trl")
    for step, (a, b) in enumerate(zip(results["ours"][-1]["losses"], results["trl"][-1]["losses"], strict=True), 1):
        print(f"{step:11}  {a:.4f}  {b:.4f}")
    ours, trl = (statistics.median(map(speed, results[side])) for side in ("ours", "trl"))
    ratios = [speed(a) / speed(b) for a, b in zip(results["ours"], results["trl"], strict=True)]
    memory = {side: statistics.median(result["peak_mb"] for result in results[side]) for side in results}
    rounds = f"{statistics.median(ratios):.2f} (rounds {min(ratios):.2f} to {max(ratios):.2f})"
    print(f"\nmedian row tokens/s: ours {ours:.0f}, TRL {trl:.0f}; ratio {rounds}")
    print(f"median peak memory: ours {memory['ours']:.0f} MB, TRL {memory['trl']:.0f} MB; ratio {memory['ours'] / memory['trl']:.2f}")


def speed(result: dict[str, Any]) -> float:
    return float(result["tokens"] / result["seconds"])


def facts_of(options: argparse.Namespace) -> dict[str, Any]:
    import torch

    from pipeline.backends import lora, packs

    rows = load_rows(options)
    dtype = options.dtype or str(lora.fastest_dtype()).removeprefix("torch.")
    shared = packs.shared_prefix(rows)
    return {
        "rows": len(rows),
        "tokens": sum(row.size for row in rows),
        "shared": shared,
        "dtype": dtype,
        "threads": torch.get_num_threads(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a GGUF file; the embedded default unless given")
    parser.add_argument("--csv", type=Path, default=SAMPLE, help="a rated table; the sample unless given")
    parser.add_argument("--text", nargs="+", help="its text columns")
    parser.add_argument("--rating", help="its rating column")
    parser.add_argument("--rationale", help="its rationale column")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--rows", type=int, help="rows to train on once; steps times batch size unless given")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rank", type=int, default=TrainConfig.rank)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="the faster one here unless given")
    parser.add_argument("--trl", choices=["padding_free", "padded"], default="padding_free", help="how TRL makes its batches")
    parser.add_argument("--side", choices=["prepare", "ours", "trl"], help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    sample = options.csv == SAMPLE
    options.text = options.text or (SAMPLE_TEXT if sample else ["text"])
    options.rating = options.rating or (SAMPLE_RATING if sample else "rating")
    options.rationale = options.rationale or (SAMPLE_RATIONALE if sample else "rationale")
    options.rows = options.rows or options.steps * options.batch_size
    if options.side is None:
        compare(options, sys.argv[1:])
        return
    from pipeline.backends.base_model import EMBEDDED_NAME, resolve

    model = options.model or resolve(EMBEDDED_NAME).path
    if options.side == "prepare":
        prepare(options, model)
        result = facts_of(options)
    else:
        result = run_ours(options, model) if options.side == "ours" else run_trl(options, model)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
