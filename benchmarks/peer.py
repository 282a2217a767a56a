"""The peer's side: trl's trainer for the case, tuned for the machine, that waits for its turn before every step.

Tuned for the CPU means `bf16=False, gradient_checkpointing=False`; its own defaults (both True) are 2.7 times slower.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer, PrinterCallback, TrainerCallback
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)

from benchmarks.cases import Case, data, reward_of
from benchmarks.ours import Report, Turn


class _Gate(TrainerCallback):  # type: ignore[misc]
    def __init__(self, turn: Turn, report: Report, split: dict[str, float]) -> None:
        self.turn, self.report, self.split, self.started = turn, report, split, 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.turn()
        self.split.clear()
        self.started = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.report({"seconds": time.perf_counter() - self.started, **self.split})


def _timed(owner: Any, name: str, key: str, split: dict[str, float]) -> None:
    function = getattr(owner, name)

    def timed(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        result = function(*args, **kwargs)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        split[key] = split.get(key, 0.0) + time.perf_counter() - started
        return result

    setattr(owner, name, timed)


def run(case: Case, model: Path, folder: Path, steps: int, turn: Turn, report: Report, device: str = "auto") -> None:
    """Trains; calls `turn` before every optimiser step and `report` with its seconds after it."""
    gpu = torch.cuda.is_available() and device != "cpu"
    common: dict[str, Any] = {
        "output_dir": str(folder / "trl"), "max_steps": steps, "report_to": [], "save_strategy": "no",
        "disable_tqdm": True, "learning_rate": 1e-6, "lr_scheduler_type": "constant", "logging_steps": 1,
        "bf16": False, "gradient_checkpointing": False, "use_cpu": not gpu, "seed": 42,
        "model_init_kwargs": {"dtype": "float32"},
    }  # fmt: skip
    task = "SEQ_CLS" if case.method == "reward_model" else "CAUSAL_LM"
    adapter = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type=task) if case.adapter else None
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows, length = Dataset.from_list(_messages(case)), case.prompt_tokens + case.completion_tokens + 8
    shared: dict[str, Any] = {"train_dataset": rows, "processing_class": tokenizer, "peft_config": adapter}
    size = {"per_device_train_batch_size": case.items}
    trainer: Any
    match case.method:
        case "sft":
            trainer = SFTTrainer(str(model), args=SFTConfig(**common, **size, max_length=length), **shared)
        case "reward_model":
            trainer = RewardTrainer(str(model), args=RewardConfig(**common, **size, max_length=length), **shared)
        case "dpo":
            trainer = DPOTrainer(str(model), args=DPOConfig(**common, **size, max_length=length), **shared)
        case "grpo":
            batch = case.items * case.group
            arguments = GRPOConfig(
                **common, per_device_train_batch_size=batch, num_generations=case.group,
                max_completion_length=case.completion_tokens, beta=0.0, temperature=1.0, top_k=0,
            )  # fmt: skip
            trainer = GRPOTrainer(str(model), _reward, args=arguments, **shared)
        case _:
            raise ValueError(f"the peer has no {case.method}")
    split: dict[str, float] = {}
    trainer.remove_callback(PrinterCallback)
    if case.method == "grpo":
        _timed(trainer, "_generate_and_score_completions", "collect", split)
    _timed(trainer.accelerator, "backward", "backward", split)
    trainer.add_callback(_Gate(turn, report, split))
    trainer.train()


def _reward(completions: list[Any], **columns: Any) -> list[float]:
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [reward_of(text) for text in texts]


def _messages(case: Case) -> list[dict[str, Any]]:
    roles = {"prompt": "user", "completion": "assistant", "chosen": "assistant", "rejected": "assistant"}
    return [{k: [{"role": roles[k], "content": v}] for k, v in row.items() if k in roles} for row in data(case)]
