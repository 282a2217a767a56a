"""The peer's side: trl's trainer for the case, tuned for the machine or with its own defaults, that waits for its turn.

Tuned means the same precision as ours and no gradient checkpointing (`bf16=False, gradient_checkpointing=False` in
float32). Its own defaults are both True, over weights in float32.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer, PrinterCallback, TrainerCallback
from trl import (  # type: ignore[attr-defined]
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)

from benchmarks.cases import SEED, lengths, peer_rows, reward_of
from benchmarks.worker import Job, Report, Turn, synchroniser


class Stopwatch:
    """Seconds of one step by part; each part waits for the device where that is asked for."""

    def __init__(self, synchronise: Callable[[], None]) -> None:
        self.synchronise = synchronise
        self.exact = False
        self.parts: dict[str, float] = {}

    def start(self) -> float:
        if self.exact:
            self.synchronise()
        return time.perf_counter()

    def stop(self, part: str, started: float) -> None:
        if self.exact:
            self.synchronise()
        self.parts[part] = self.parts.get(part, 0.0) + time.perf_counter() - started

    def timed(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        """The function, every call of it charged to the part."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            started = self.start()
            try:
                return function(*args, **kwargs)
            finally:
                self.stop(part, started)

        timed.__name__ = getattr(function, "__name__", part)  # trl names a reward after its function
        return timed


class Gate(TrainerCallback):
    """A step is all that happens between two turns, as on our side: preparing data, training, logging.

    trl logs every step, and that is the last thing that it does in one.
    """

    def __init__(self, turn: Turn, report: Report, watch: Stopwatch, tokens: dict[str, Any]) -> None:
        self.turn, self.report, self.watch, self.tokens = turn, report, watch, tokens
        self.started = self.stepping = 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        if not self.started:
            self._begin()

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.stepping = self.watch.start()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.watch.stop("optimiser", self.stepping)

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        logs: dict[str, float] = kwargs["logs"]
        if "train_runtime" in logs:  # the summary at the end
            return
        self.watch.synchronise()
        seconds = time.perf_counter() - self.started
        self.report({"seconds": seconds, **self.watch.parts, **{k: float(v) for k, v in self.tokens.items()}}, logs)
        self._begin()

    def _begin(self) -> None:
        self.watch.exact = self.turn()
        self.watch.parts.clear()
        self.tokens.clear()
        self.started = time.perf_counter()


def trainer(job: Job, reward: Callable[..., Any]) -> Any:
    """trl's trainer for the job's case, as its users build it."""
    case, model = job.case, str(job.model)
    common: dict[str, Any] = {
        "output_dir": str(job.folder / "trl"), "max_steps": job.steps, "report_to": [], "save_strategy": "no",
        "disable_tqdm": True, "learning_rate": 1e-6, "lr_scheduler_type": "constant", "logging_steps": 1,
        "use_cpu": job.device == "cpu", "seed": SEED,
    }  # fmt: skip
    if job.side == "trl":
        brief = job.precision == "bfloat16"
        dtype = "bfloat16" if brief else "float32"
        common |= {"bf16": brief, "gradient_checkpointing": False, "model_init_kwargs": {"dtype": dtype}}
    task = "SEQ_CLS" if case.method == "reward_model" else "CAUSAL_LM"
    adapter = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type=task) if case.adapter else None
    rows, longest = Dataset.from_list(messages(peer_rows(case, job.steps))), case.prompt_tokens + case.completion_tokens
    shared: dict[str, Any] = {
        "train_dataset": rows,
        "processing_class": AutoTokenizer.from_pretrained(model),
        "peft_config": adapter,
    }
    if case.sampled:
        if case.method != "grpo":
            raise ValueError(f"the peer has no {case.method}")
        arguments = GRPOConfig(
            **common, per_device_train_batch_size=case.items * case.group, num_generations=case.group,
            max_completion_length=case.completion_tokens, beta=0.0, temperature=1.0, top_k=0, shuffle_dataset=False,
        )  # fmt: skip
        return GRPOTrainer(model, reward, args=arguments, **shared)
    common |= {
        "per_device_train_batch_size": case.items,
        "max_length": longest + 8,
        "train_sampling_strategy": "sequential",
    }
    if case.method == "sft":
        return SFTTrainer(model, args=SFTConfig(**common), **shared)
    if case.method == "dpo":
        return DPOTrainer(model, args=DPOConfig(**common), **shared)
    return RewardTrainer(model, args=RewardConfig(**common), **shared)


def run(job: Job, turn: Turn, report: Report) -> None:
    """Trains; calls `turn` before every optimiser step and `report` with what it measured after it."""
    watch, tokens = Stopwatch(synchroniser(job.device)), dict[str, Any]()
    made = trainer(job, watch.timed(reward, "rewards"))
    made.remove_callback(PrinterCallback)
    if job.case.sampled:
        made.model.generate = watch.timed(made.model.generate, "sampling")
    made.accelerator.backward = watch.timed(made.accelerator.backward, "backward")
    made.accelerator.clip_grad_norm_ = watch.timed(made.accelerator.clip_grad_norm_, "optimiser")
    compute = watch.timed(made.compute_loss, "loss")
    said = [lengths(row)[1] for row in peer_rows(job.case, job.steps)]

    def counting(model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if job.case.sampled:
            count = (mask := inputs["completion_mask"]).sum()  # read after the step, so that nothing waits for it here
            tokens.update(trained_tokens=count, sampled_tokens=count, sampled_rows=len(mask))
        else:
            first = made.state.global_step * job.case.items
            tokens.update(trained_tokens=sum(said[first : first + job.case.items]))
        return compute(model, inputs, *args, **kwargs)

    made.compute_loss = counting
    made.add_callback(Gate(turn, report, watch, tokens))
    made.train()


def reward(completions: list[Any], **columns: Any) -> list[float]:
    """What completions earn, as trl asks for it."""
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [reward_of(text) for text in texts]


def messages(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows as trl reads conversations."""
    roles = {"prompt": "user", "completion": "assistant", "chosen": "assistant", "rejected": "assistant"}
    return [{k: [{"role": roles[k], "content": v}] for k, v in row.items() if k in roles} for row in rows]
