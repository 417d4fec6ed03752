"""The Ollama engine beside a plain loop with the ollama package, and beside the embedded engine, on the models of a finished run.

    uv run pipeline run --config FOLDER/pipeline.yaml --set model.engine=ollama
    uv run python benchmarks/serving.py --config FOLDER/pipeline.yaml --rows 40

Speed: both sides ask the same server, with the same slots, for the same rows of the fine-tuned model under the same schema and limit,
greedily; the loop sends one row after the other, as the package's examples do. Alternating rounds, medians. Log-probabilities of the
rating are part of our side only. Agreement: the embedded engine answers the run's test rows from the prompts that the server renders;
counted is how often both give the same rating. Share: how much of the run's seconds were neither training nor generation.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.inference import machine
from pipeline.backends.serving import open_serving
from pipeline.config import PipelineConfig, load_config
from pipeline.formatter_promptbuilder import read_formatted
from pipeline.inference_runner import read_answers
from pipeline.ports import BaseModel, Engine, Serving
from pipeline.prompts import answer_schema, messages_for, parse_answer
from pipeline.records import Answer, Prompt, RatingScale
from pipeline.run import STAGES
from pipeline.store import RunFolder


def rates(config: PipelineConfig, engine: Engine, name: str, prompts: Sequence[Prompt], rounds: int) -> None:
    import ollama

    client, schema = ollama.Client(), answer_schema(config.dataset.scale)
    options = {"temperature": 0, "num_ctx": 1024, "num_predict": config.generate.max_tokens}

    def ours() -> int:
        done = engine.complete(prompts, config.dataset.scale, config.generate, max_prompt_tokens=config.prompt.max_tokens)
        return sum(completion.output_tokens for completion in done)

    def plain() -> int:
        tokens = 0
        for prompt in prompts:
            messages = [{"role": message.role, "content": message.content} for message in prompt.messages]
            reply = client.chat(model=name, messages=messages, format=schema, options=options)
            tokens += reply.eval_count or 0
        return tokens

    sides: dict[str, Callable[[], int]] = {"ours": ours, "plain loop": plain}
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for number in range(rounds):
        for side in list(sides) if number % 2 else list(sides)[::-1]:
            sides[side]() if number == 0 else None  # loads the model with this side's context first
            started = time.perf_counter()
            tokens = sides[side]()
            seconds[side].append(time.perf_counter() - started)
            print(f"round {number + 1}  {side:11}{len(prompts) / seconds[side][-1]:6.2f} rows/s  {tokens} tokens", flush=True)
    pairs = [plain / ours for plain, ours in zip(seconds["plain loop"], seconds["ours"], strict=True)]
    print(f"ratio of rows/s, ours to the plain loop: {statistics.median(pairs):.2f} (rounds {min(pairs):.2f} to {max(pairs):.2f})")


def agreement(config: PipelineConfig, serving: Serving, base: BaseModel, prompts: Sequence[Prompt]) -> None:
    scale: RatingScale = config.dataset.scale
    for system, model in (("base", base.path), ("fine_tuned", config.output_path / "fine_tuned_model.gguf")):
        answers = read_answers(config.output_path / "outputs.jsonl", record_ids=[p.record_id for p in prompts], systems=[system])
        served = {answer.record_id: answer for answer in answers}
        with serving.on_file(base)(model) as engine:
            asked = [prompt for prompt in prompts if prompt.record_id in served]
            started = time.perf_counter()
            done = list(engine.complete(asked, scale, config.generate, max_prompt_tokens=config.prompt.max_tokens))
            seconds = time.perf_counter() - started
        other = [served[c.record_id] for c in done if parse_answer(c.text, c.finish, scale)[0] != served[c.record_id].label]
        lengths = sum(c.prompt_tokens == served[c.record_id].prompt_tokens for c in done)
        n, same = len(done), len(done) - len(other)
        print(f"{system}: {same} of {n} ratings as the server's ({100 * same / n:.1f} %), {lengths} prompts of the same length")
        gaps, among = [margin(answer) for answer in served.values()], [margin(answer) for answer in other]
        print(f"  from the server's likeliest rating to the next: median {middle(gaps)} of all, {middle(among)} where the engines differ")
        near, near_among = (sum(gap is not None and gap < 0.1 for gap in some) for some in (gaps, among))
        print(f"  below 0.1: {near} of {n}, {near_among} of the {len(among)} that differ; embedded {n / seconds:.2f} rows/s")


def margin(answer: Answer) -> float | None:
    """How far the likeliest rating lies before the next; None where the server does not list it."""
    if answer.probabilities is None:
        return None
    first, second = sorted(answer.probabilities.values(), reverse=True)[:2]
    return first - second


def middle(gaps: Sequence[float | None]) -> str:
    known = [gap for gap in gaps if gap is not None]
    return f"{statistics.median(known):.2f}" if known else "unknown"


def share(folder: RunFolder) -> None:
    stages = {stage: (folder.manifest(stage) or {}).get("facts", {}) for stage in STAGES}
    total = sum(facts.get("seconds", 0.0) for facts in stages.values())
    made = json.loads((folder / "fine_tuning_metadata.json").read_text(encoding="utf-8"))
    training = made["training"]["seconds"]
    generation = sum(counts["seconds"] for counts in stages["infer"]["counts"]["systems"].values())
    rest = 100 * (total - training - generation) / total
    print(f"of {total:.0f} s: training {training:.0f}, generation {generation:.0f}, neither {rest:.1f} %")
    print("seconds by stage: " + ", ".join(f"{stage} {facts.get('seconds', 0)}" for stage, facts in stages.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("pipeline.yaml"), help="of a run that is finished")
    parser.add_argument("--rows", type=int, default=40, help="for speed (0: not measured); agreement takes all test rows")
    parser.add_argument("--rounds", type=int, default=3)
    chosen = parser.parse_args()
    config = load_config(chosen.config, ["model.engine=ollama", *filter(None, os.environ.get("PIPELINE_SET", "").splitlines())])
    rows = [
        record for record in read_formatted(config.output_path / "formatted_dataset.csv", config.dataset.scale) if record.split == "test"
    ]
    prompts = [Prompt(record.record_id, messages_for(record)) for record in rows]
    serving = open_serving("ollama")
    base = serving.find(config.model.name, root=config.root, allow_download=False, verify=False)
    print(f"machine: {machine()}; Ollama {serving.facts['ollama']}, slots {os.environ.get('OLLAMA_NUM_PARALLEL', '1')}")
    share(RunFolder(config.output_path))
    if chosen.rows:
        with serving.serve(base, config.output_path / "fine_tuned_model.gguf") as engine:
            rates(config, engine, getattr(engine, "model", ""), prompts[: chosen.rows], chosen.rounds)
    agreement(config, serving, base, prompts)


if __name__ == "__main__":
    main()
