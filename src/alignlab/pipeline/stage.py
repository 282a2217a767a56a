"""One stage being trained: what is built once, and the order in which things happen -> a finished run folder."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import psutil
import torch
from torch import nn

import alignlab
from alignlab.algorithms import Models
from alignlab.checkpoint import find_checkpoint, load_checkpoint, save_checkpoint, seal
from alignlab.conversation import Template
from alignlab.data import Kind
from alignlab.errors import UserError
from alignlab.evaluation import Evaluation, check_gradable, evaluate_policy, evaluate_reward_model
from alignlab.forward import rewards as score_rows
from alignlab.generate import Sampling
from alignlab.models import (
    ADAPTER_FILE,
    LoraChoice,
    Model,
    ModelChoice,
    ScalarModel,
    disable_dropout,
    frozen_policy,
    has_adapter,
    load_generation_config,
    load_policy,
    load_reward_model,
    load_tokenizer,
    location,
    make_reference,
    make_reward_model,
    make_value_model,
    num_parameters,
    save_model,
    unwrap,
)
from alignlab.optim import AdamWChoice, Schedule, build_optimizers
from alignlab.pipeline.identity import DONE, StageResult, code_fingerprint
from alignlab.pipeline.items import first_of_each_task, load_items, load_reported, pair_fits, validation_prompts
from alignlab.pipeline.rewards import build_rewards
from alignlab.recipe import ModelSection, Stage, dump_yaml, read_mapping
from alignlab.rollout import Limits, Source, encode_examples, encode_pairs, fitting_prompts, sample_prompts
from alignlab.tracking import HISTORY, Tracker, read_jsonl, write_json
from alignlab.train import Finished, RunError, train, trained_modules
from alignlab.types import LoopState, Pair, Row

NORMALISATION_PROMPTS = 128
"""Prompts the reference answers to set a reward model's mean 0 and standard deviation 1."""


@dataclass(frozen=True, kw_only=True)
class Session:
    """What all stages of one command share."""

    device: torch.device
    cache: Path
    """Folder of stages that other recipes start from."""
    debug: bool = False
    quiet: bool = False
    tracking: tuple[str, ...] = ()
    earlier: dict[str, StageResult] = field(default_factory=dict)
    """Finished stages of the recipe at hand, by name."""


def default_cache() -> Path:
    """$ALIGNLAB_CACHE, or ~/.cache/alignlab."""
    return Path(os.environ.get("ALIGNLAB_CACHE") or Path.home() / ".cache" / "alignlab")


class StageRun:
    """One stage being trained: what is built once, and the order in which things happen."""

    def __init__(
        self,
        stage: Stage,
        seed: int,
        folder: Path,
        session: Session,
        start: StageResult | None,
        reward_stage: StageResult | None,
        key: str,
        contract: dict[str, Any],
    ) -> None:
        self.stage, self.seed, self.folder, self.session = stage, seed, folder, session
        self.start, self.reward_stage, self.key, self.contract = start, reward_stage, key, contract
        self.algorithm, self.roles = stage.method, stage.method.models()
        self.choice = model_choice(stage.model, str(start.model) if start else stage.model.name)
        if start:
            self.choice = replace(self.choice, weights="pretrained", overrides={}, revision=None)
        tokenizer = load_tokenizer(self.choice.name, self.choice.revision)
        self.template = Template.of(tokenizer, load_generation_config(self.choice.name, self.choice.revision))
        self.limits = Limits(
            max_prompt_tokens=stage.data.max_prompt_tokens,
            max_completion_tokens=stage.data.max_completion_tokens,
            microbatch_rows=stage.train.microbatch_rows,
            sampling_rows=stage.train.sampling_rows,
        )
        self._start: Any = None
        self._held_out: list[Any] = []
        self.kind = (
            "reward_model" if self.roles.get("reward_model") and self.roles["reward_model"].trained else "policy"
        )

    def go(self, resume: bool) -> StageResult:
        stage, started = self.stage, time.time()
        models = self._models()
        optimizers = build_optimizers(self.roles, models, AdamWChoice(**stage.train.adamw.model_dump()))
        trained = trained_modules(models, self.roles)
        checkpoints = self.folder / "checkpoints"
        state = LoopState(seed=self.seed)
        tracker = Tracker(
            self.folder,
            num_phases=stage.train.num_phases,
            title=stage.name,
            metrics_file=self.algorithm.metrics_file,
            mirrors=self.session.tracking,
            config=self.contract,
            quiet=self.session.quiet,
        )
        with tracker:
            if resume:
                found = find_checkpoint(checkpoints)
                for problem in found.skipped:
                    tracker.say(f"{stage.name}: skipped checkpoint {problem}")
                if found.folder is None and found.skipped:
                    raise UserError(f"{checkpoints}: no usable checkpoint is left; delete {self.folder} to start again")
                if found.folder is not None:
                    state = load_checkpoint(found.folder, models=trained, optimizers=optimizers, contract=self.contract)
                    tracker.say(f"{stage.name}: resumed after phase {state.phase} of {stage.train.num_phases}")
            tracker.rewind(state.phase)
            source = self._source(tracker)
            self._held_out = self._load_held_out()
            self._write_record(models, started)
            if state.phase == 0:
                self._evaluate_during(models, state, tracker)
            state = self._loop(models, optimizers, source, state, tracker, trained, checkpoints)
            evaluation = self._finish(models)
            if evaluation is not None:  # numbered one phase on, so that a resume at the end drops it and logs it anew
                tracker.log(_evaluation_row(evaluation, state, phase=state.phase))
        ledger = self._ledger(state)
        write_json(
            self.folder / "evaluation.json",
            {**evaluation.to_json(), "ledger": ledger} if evaluation else {"ledger": ledger},
        )
        write_json(
            self.folder / DONE,
            {
                "key": self.key,
                "kind": self.kind,
                "ledger": ledger,
                "phases": state.phase,
                "stop_reason": state.stop_reason,
            },
        )
        return StageResult(folder=self.folder, key=self.key, kind=self.kind, ledger=ledger)

    def _loop(
        self,
        models: Models,
        optimizers: Mapping[str, torch.optim.Optimizer],
        source: Source,
        state: LoopState,
        tracker: Tracker,
        trained: Mapping[str, nn.Module],
        checkpoints: Path,
    ) -> LoopState:
        settings = self.stage.train

        def save(state: LoopState) -> None:
            save_checkpoint(
                checkpoints, state=state, models=trained, optimizers=optimizers, contract=self.contract,
                keep=settings.keep_checkpoints,
            )  # fmt: skip

        finished: Finished | None = None
        for finished in train(
            self.algorithm, models, optimizers, source, state,
            num_phases=settings.num_phases, schedule=Schedule(**settings.schedule.model_dump()), tracker=tracker,
            log_completions=settings.log_completions,
        ):  # fmt: skip
            last = finished.state.phase == settings.num_phases or bool(finished.state.stop_reason)
            every = self.stage.evaluation.every
            if every and finished.state.phase % every == 0 and not last:
                self._evaluate_during(models, finished.state, tracker)
            if last or finished.state.phase % settings.save_every == 0:
                save(finished.state)
        return finished.state if finished else state

    # ---- data --------------------------------------------------------------------------------------------------------

    def _source(self, tracker: Tracker) -> Source:
        stage, kind = self.stage, cast(Kind, self.algorithm.data_kind)
        items, reports = load_reported(stage, kind, "train")
        for report in reports if stage.data.path or stage.data.hub else ():
            tracker.say(f"{stage.name}: {report}")
        temperature = getattr(stage.algorithm, "temperature", 1.0)
        sampling = Sampling(temperature=temperature, max_completion_tokens=self.limits.max_completion_tokens)
        source = Source(template=self.template, device=self.session.device, limits=self.limits, sampling=sampling)
        if kind == "examples":
            source = replace(source, examples=encode_examples(items, self.template, self.limits))
        elif kind == "pairs":
            source = replace(source, pairs=encode_pairs(items, self.template, self.limits))
        else:
            prompts = fitting_prompts(items, self.template, self.limits)
            source = replace(source, prompts=prompts, rewards=build_rewards(stage, self._learned))
        dropped = len(items) - len(source.examples) - len(source.pairs) - len(source.prompts)
        if dropped:
            tracker.say(f"{stage.name}: left out {dropped} of {len(items)} {kind}: too long, or the same after cutting")
        return source

    def _learned(self) -> dict[str, Any]:
        """What the reward `learned` scores with: the stage's reward model and its own template."""
        assert self.reward_stage is not None
        folder = self.reward_stage.model
        choice = replace(model_choice(self.stage.model, str(folder)), adapter=None)
        model = load_reward_model(folder, choice, device=self.session.device)
        template = Template.of(load_tokenizer(str(folder)), load_generation_config(str(folder)))
        return {"reward_model": model, "template": template}

    # ---- models ------------------------------------------------------------------------------------------------------

    def _models(self) -> dict[str, Any]:
        """Builds every role the method asks for; all randomness in it comes from the run's seed."""
        policy = load_policy(self.choice, seed=self.seed, device=self.session.device)
        self._require_fit(policy)
        fresh_adapter = has_adapter(policy) and not (Path(location(self.choice.name)) / ADAPTER_FILE).is_file()
        if not self.algorithm.dropout:
            disable_dropout(policy)
        models: dict[str, Any] = {"policy": policy}
        for name, role in self.roles.items():
            if name == "reference":
                models[name] = make_reference(policy, fresh_adapter=fresh_adapter)
            elif name == "reward_model":
                models[name] = make_reward_model(models.pop("policy"), seed=self.seed)
            elif name == "value_model":
                models[name] = make_value_model(policy, role.backbone)
        for name, role in self.roles.items():
            if isinstance(models[name], nn.Module):
                models[name].train(role.trained and self.algorithm.dropout)
        return models

    def _require_fit(self, policy: Model) -> None:
        """The tokenizer's ids have embeddings, and prompt and completion together fit the model's context."""
        config, limits = unwrap(policy).config.get_text_config(), self.limits
        if len(self.template.tokenizer) > config.vocab_size:
            raise UserError(
                f"model {self.choice.name!r}: its tokenizer has {len(self.template.tokenizer)} entries, but there "
                f"are only {config.vocab_size} embeddings; they do not belong together"
            )
        longest = limits.max_prompt_tokens + limits.max_completion_tokens
        context = getattr(config, "max_position_embeddings", longest)
        if longest > context:
            raise UserError(
                f"stage {self.stage.name}: data.max_prompt_tokens + data.max_completion_tokens = {longest}, but the "
                f"context of {self.choice.name!r} is {context} tokens; lower one of them"
            )

    # ---- evaluation and result ---------------------------------------------------------------------------------------

    def _evaluate_during(self, models: Models, state: LoopState, tracker: Tracker) -> None:
        """Held-out numbers at this point of training, as a row of the log."""
        if not self.stage.evaluation.every or self.kind != "policy":
            return
        evaluation = self._evaluate(models)
        if evaluation is not None:
            tracker.log(_evaluation_row(evaluation, state, phase=max(0, state.phase - 1)))

    def _load_held_out(self) -> list[Any]:
        """The prompts or pairs of every evaluation; read before training, so that what is wrong with them is said then.

        Raises:
            UserError: there are none, or their task cannot grade them.
        """
        count = self.stage.evaluation.prompts_per_task
        if not count:
            return []
        try:
            if self.kind == "reward_model":
                pairs = first_of_each_task(load_items(self.stage, "pairs", "validation"), count)
                return [pair for pair in pairs if pair_fits(pair, self.template, self.limits)]
            prompts = validation_prompts(self.stage, count, self.template, self.limits)
            check_gradable(prompts)
        except UserError as error:
            raise UserError(f"evaluation: {error}; evaluation.prompts_per_task=0 switches evaluation off") from error
        return prompts

    def _evaluate(self, models: Models) -> Evaluation | None:
        settings = self.stage.evaluation
        if not self._held_out:
            return None
        if self.kind == "reward_model":
            return self._evaluate_reward_model(models)
        sampling = Sampling(
            temperature=settings.temperature,
            greedy=settings.greedy,
            max_completion_tokens=self.limits.max_completion_tokens,
        )
        reference = self._start_policy(models) if settings.kl_to_start and self.start else None
        return evaluate_policy(
            models["policy"], self._held_out, self.template, sampling, samples=settings.samples, reference=reference
        )

    def _start_policy(self, models: Models) -> Any:
        """The policy this stage started from, frozen: the method's reference, or loaded once for evaluation."""
        if "reference" in models:
            return models["reference"]
        if self._start is None:
            self._start = frozen_policy(self.choice, self.session.device, seed=self.seed)
        return self._start

    def _evaluate_reward_model(self, models: Models) -> Evaluation:
        source = Source(
            template=self.template, device=self.session.device, limits=self.limits, sampling=Sampling(),
            pairs=encode_pairs(self._held_out, self.template, self.limits),
        )  # fmt: skip
        return evaluate_reward_model(models["reward_model"], source, [p.prompt.task for p in self._held_out])

    def _finish(self, models: Models) -> Evaluation | None:
        """After the last phase: normalise a reward model, evaluate, and write the result."""
        if self.kind == "reward_model":
            self._normalise(models["reward_model"])
        evaluation = self._evaluate(models)
        target, partial_folder = self.folder / self.kind, self.folder / f".partial-{self.kind}"
        shutil.rmtree(partial_folder, ignore_errors=True)
        save_model(models[self.kind], partial_folder)
        tokenizer = load_tokenizer(self.choice.name, self.choice.revision)
        tokenizer.save_pretrained(str(partial_folder))
        generation = load_generation_config(self.choice.name, self.choice.revision)
        if generation is not None:
            generation.eos_token_id = sorted(self.template.stop_ids)
            generation.save_pretrained(str(partial_folder))
        seal(partial_folder)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(partial_folder, target)
        if evaluation is not None and evaluation.samples:
            write_json(self.folder / "evaluation_samples.json", evaluation.samples)
        return evaluation

    def _normalise(self, model: ScalarModel) -> None:
        """Shift and scale so that the starting policy's own answers score mean 0 and standard deviation 1."""
        pairs = cast(list[Pair], load_items(self.stage, "pairs", "train"))
        spread_out = [pair.prompt for pair in pairs[:: max(1, len(pairs) // NORMALISATION_PROMPTS)]]
        prompts = fitting_prompts(spread_out, self.template, self.limits)
        reference = frozen_policy(self.choice, self.session.device, seed=self.seed)
        ids = [self.template.encode_prompt(p) for p in prompts]
        sampling = Sampling(max_completion_tokens=self.limits.max_completion_tokens)
        sampled = sample_prompts(
            reference, prompts, ids, self.template, sampling, num_samples=1, seed=self.seed, phase=0
        )
        source = Source(template=self.template, device=self.session.device, limits=self.limits, sampling=sampling)
        rows = [Row(prompt_ids=i, completion_ids=c[0].token_ids) for i, c in zip(ids, sampled, strict=True)]
        with torch.no_grad():
            scores = torch.cat([score_rows(model, batch) for batch in source.plan_rows(rows)]).double()
        spread = scores.std().item()
        if len(rows) < 2 or not spread > 0:
            raise RunError(
                "the reward model gives every reference answer the same score; it has learned nothing to use"
            )
        model.set_normalisation(scores.mean().item(), spread)

    # ---- record ------------------------------------------------------------------------------------------------------

    def _write_record(self, models: Models, started: float) -> None:
        path = self.folder / "recipe.yaml"
        if not path.is_file() or "stages" not in read_mapping(path):  # a single stage's is the whole recipe's
            stage = self.stage.model_copy(update={"name": self.folder.name, **self._resolved()})
            path.write_text(
                dump_yaml({"seed": self.seed, **stage.model_dump(mode="json", serialize_as_any=True)}), "utf-8"
            )
        packages = ("torch", "transformers", "peft", "tokenizers", "safetensors", "numpy")
        write_json(
            self.folder / "provenance.json",
            {
                "alignlab": alignlab.__version__,
                "code": code_fingerprint(),
                "key": self.key,
                "seed": self.seed,
                "start": self.contract["start"],
                "reward_model": self.contract["reward_model"],
                "data": self.contract["data"],
                "model": {"name": self.choice.name, "parameters": num_parameters(models[self.kind]),
                          "trained": num_parameters(models[self.kind], trained_only=True)},
                "template": {"stop_ids": sorted(self.template.stop_ids), "bos_id": self.template.bos_id,
                             "pad_id": self.template.pad_id},
                "versions": {"python": platform.python_version(), **{p: metadata.version(p) for p in packages}},
                "machine": {"platform": platform.platform(), "device": str(self.session.device),
                            "threads": torch.get_num_threads(), "cores": os.cpu_count()},
                "command": sys.argv,
                "started": time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(started)),
            },
        )  # fmt: skip

    def _resolved(self) -> dict[str, Any]:
        """What the stage depends on as folders, so that it can be run again without the recipe it came from."""
        found: dict[str, Any] = {}
        if self.start:
            model = self.stage.model.model_copy(update={"name": ModelSection().name})
            found |= {"start": str(self.start.folder.resolve()), "model": model}
        if self.reward_stage:
            found["reward_model"] = str(self.reward_stage.folder.resolve())
        return found

    def _ledger(self, state: LoopState) -> dict[str, float]:
        """What the stage consumed; seconds are those of collecting and stepping, from the log."""
        rows = read_jsonl(self.folder / HISTORY)
        seconds = sum(row.get("time/collect") or 0.0 for row in rows) + sum(row.get("time/step") or 0.0 for row in rows)
        counted = ("prompts", "completions", "generated_tokens", "trained_rows", "trained_tokens")
        return {
            **{name: state.counters.get(name, 0.0) for name in counted},
            "optimizer_steps": float(state.step),
            "phases": float(state.phase),
            "seconds": seconds,
            "peak_memory_bytes": peak_memory(self.session.device),
        }  # fmt: skip


def _evaluation_row(evaluation: Evaluation, state: LoopState, *, phase: int) -> dict[str, Any]:
    """An evaluation as a row of the log, under the number of a phase."""
    metrics = {f"evaluation/{name}": value for name, value in evaluation.metrics.items()}
    return {"phase": phase, "step": state.step, "phases_done": state.phase, **metrics}


def peak_memory(device: torch.device) -> float:
    """Bytes: the accelerator's peak allocation, or the largest resident size of this process so far."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(peak if sys.platform == "darwin" else peak * 1024)


def model_choice(section: ModelSection, name: str) -> ModelChoice:
    """The recipe's model section as plain arguments, for its own model or for a folder that training made."""
    own = {"revision", "weights", "overrides"} if name == section.name else set()
    adapter = LoraChoice(**section.adapter.model_dump()) if section.adapter else None
    return ModelChoice(**section.model_dump(include={"dtype", "attention", *own}), name=name, adapter=adapter)


class Lock:
    """One process a run folder: a file with the owner's process id; a dead owner's lock is taken over."""

    def __init__(self, folder: Path, wait: bool = False) -> None:
        self.path, self.wait = folder / ".lock", wait

    def __enter__(self) -> None:
        while True:
            try:
                with self.path.open("x", encoding="utf-8") as stream:
                    stream.write(str(os.getpid()))
                return
            except FileExistsError:
                owner = self._owner()
                if owner is not None and owner != os.getpid() and psutil.pid_exists(owner):
                    if self.wait:
                        time.sleep(0.5)
                        continue
                    raise UserError(
                        f"{self.path.parent}: process {owner} is running this; wait for it or stop it"
                    ) from None
                self.path.unlink(missing_ok=True)

    def __exit__(self, *error: object) -> None:
        self.path.unlink(missing_ok=True)

    def _owner(self) -> int | None:
        """The process id in the file, which may just have been created; None if nobody writes one or it is gone."""
        for _ in range(20):
            try:
                text = self.path.read_text("utf-8", errors="replace").strip()
            except FileNotFoundError:
                return None
            if text.isdigit():
                return int(text)
            time.sleep(0.01)
        return None
