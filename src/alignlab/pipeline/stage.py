"""One stage being trained: what is built once, and the order in which things happen -> a finished run folder."""

from __future__ import annotations

import math
import os
import platform
import resource
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import psutil
import torch
from torch import nn

import alignlab
from alignlab import kernels
from alignlab.algorithms import Models
from alignlab.checkpoint import find_checkpoint, load_checkpoint, save_checkpoint, seal
from alignlab.conversation import Template
from alignlab.data import Kind, fingerprint
from alignlab.diagnosis import score_noise, summarise
from alignlab.errors import UserError
from alignlab.evaluation import (
    EVALUATION_PHASE,
    EVALUATION_SEED,
    SCHEMA,
    Evaluation,
    evaluate_policy,
    evaluate_reward_model,
)
from alignlab.evaluation.measures import check_prompts
from alignlab.evaluation.perplexity import perplexity_estimate, token_nats
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
    recompute_activations,
    save_model,
    unwrap,
)
from alignlab.optim import AdamWChoice, MasterAdamW, Schedule, build_optimizers
from alignlab.pipeline.best import METRICS, best_phase, considered, keep_best, prune_best, restore_best
from alignlab.pipeline.identity import DONE, StageResult, Teacher, code_fingerprint, makes
from alignlab.pipeline.items import (
    demonstrations_of,
    first_of_each_task,
    held_out_items,
    limits_of,
    load_items,
    load_reported,
    measure_settings,
    of_evaluation,
    of_perplexity,
    pair_fits,
    text_measures,
)
from alignlab.pipeline.reference import UsesReference, fill_reference
from alignlab.pipeline.rewards import build_rewards, require_fit
from alignlab.recipe import BestSection, ModelSection, Stage, dump_yaml, read_mapping
from alignlab.rewards.learned import same_tokenizer
from alignlab.rollout import (
    Reward,
    Source,
    encode_examples,
    encode_labelled,
    encode_pairs,
    fitting_prompts,
    sample_prompts,
)
from alignlab.tracking import HISTORY, Tracker, read_jsonl, write_json
from alignlab.train import RunError, record, train, trained_modules
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
    finished_only: bool = False
    """Stages of other recipes are found, never trained."""
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
        teacher: Teacher | None = None,
    ) -> None:
        self.stage, self.seed, self.folder, self.session = stage, seed, folder, session
        self.start, self.reward_stage, self.key, self.contract = start, reward_stage, key, contract
        self.teacher = teacher
        self.algorithm, self.roles = stage.method, stage.method.models()
        self.choice = stage_choice(stage, str(start.model) if start else None)
        tokenizer = load_tokenizer(self.choice.name, self.choice.revision)
        self.template = Template.of(tokenizer, load_generation_config(self.choice.name, self.choice.revision))
        self.limits = limits_of(stage)
        self.num_phases = stage.train.num_phases
        """Of this run; with `epochs` it follows from the data."""
        self._start: Any = None
        self._held_out: list[Any] = []
        self._demonstrations: list[Row] = []
        self._references: dict[str, str] = {}
        self._reference_seconds = 0.0
        self.kind = makes(stage)

    def go(self, resume: bool) -> StageResult:
        stage, started = self.stage, time.time()
        models = self._models()
        optimizers = self._optimizers(models)
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
            source = self._source(tracker)
            self.num_phases = self._length(source)
            tracker.expect(self.num_phases)
            if resume:
                found = find_checkpoint(checkpoints)
                for problem in found.skipped:
                    tracker.say(f"{stage.name}: skipped checkpoint {problem}")
                if found.folder is None and found.skipped:
                    raise UserError(f"{checkpoints}: no usable checkpoint is left; delete {self.folder} to start again")
                if found.folder is not None:
                    state = load_checkpoint(found.folder, models=trained, optimizers=optimizers, contract=self.contract)
                    tracker.say(f"{stage.name}: resumed after phase {state.phase} of {self.num_phases}")
            tracker.rewind(state.phase)
            self._held_out = self._load_held_out()
            self._demonstrations = self._load_demonstrations()
            self._write_record(models, started)
            source = self._with_reference(source, models, tracker)
            if state.phase == 0:
                state = self._evaluate_during(models, state, tracker)
            state = self._loop(models, optimizers, source, state, tracker, trained, checkpoints)
            evaluation, best = self._finish(models, state, tracker)
        ledger = self._ledger(state)
        outcome = {"diagnosis": summarise(read_jsonl(self.folder / HISTORY)), **best}
        write_json(
            self.folder / "evaluation.json",
            {**self._evaluation_record(evaluation), "ledger": ledger, **outcome},
        )
        write_json(
            self.folder / DONE,
            {
                "key": self.key,
                "kind": self.kind,
                "ledger": ledger,
                "phases": state.phase,
                "stop_reason": state.stop_reason,
                **outcome,
            },
        )
        shutil.rmtree(self.folder / "best", ignore_errors=True)
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
            prune_best(self.folder, checkpoints)

        loop = train(
            self.algorithm, models, optimizers, source, state,
            num_phases=self.num_phases, schedule=Schedule(**settings.schedule.model_dump()), tracker=tracker,
            log_completions=settings.log_completions, limits=settings.diagnosis,
        )  # fmt: skip
        finished = next(loop, None)
        while finished is not None:
            state = finished.state
            every = self.stage.evaluation.every
            if every and state.phase % every == 0 and not self._over(state):
                state = self._evaluate_during(models, state, tracker)
            if self._over(state) or state.phase % settings.save_every == 0:
                save(state)
            try:
                finished = loop.send(state)
            except StopIteration:
                finished = None
        return state

    def _over(self, state: LoopState) -> bool:
        return state.phase == self.num_phases or bool(state.stop_reason)

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
        elif kind == "labelled":
            source = replace(source, labelled=encode_labelled(items, self.template, self.limits))
        else:
            prompts = fitting_prompts(items, self.template, self.limits)
            source = replace(source, prompts=prompts, rewards=self.rewards)
        kept = (source.examples, source.pairs, source.labelled, source.prompts)
        dropped = len(items) - sum(map(len, kept))
        if dropped:
            tracker.say(f"{stage.name}: left out {dropped} of {len(items)} {kind}: too long, or the same after cutting")
        return source

    def _with_reference(self, source: Source, models: dict[str, Any], tracker: Tracker) -> Source:
        """Where the method's rows are known before training, the source brings their reference logprobs along."""
        if not isinstance(self.algorithm, UsesReference):
            return source
        filled = fill_reference(
            source, self.algorithm, models["reference"],
            seed=self.seed, num_phases=self.num_phases, cache=self.session.cache,
            say=lambda line: tracker.say(f"{self.stage.name}: {line}"),
        )  # fmt: skip
        self._reference_seconds = filled.seconds
        evaluation = self.stage.evaluation
        if not (self._held_out and evaluation.kl_to_start and (self.start or evaluation.best)):
            del models["reference"]  # a copy of all weights that nothing asks for any more
        return filled.source

    @cached_property
    def rewards(self) -> list[Reward]:
        """What training and the choice among candidates score completions with."""
        return build_rewards(self.stage, lambda: self.learned)

    @cached_property
    def learned(self) -> dict[str, Any]:
        """The stage's reward model and its template, loaded once."""
        return learned_reward(self.stage, self.reward_stage, self.template, self.session)

    def _length(self, source: Source) -> int:
        """Phases of the run: as many as said, or as the asked-for passes over the data take."""
        epochs = self.stage.train.epochs
        if epochs is None:
            return self.stage.train.num_phases
        return math.ceil(epochs * source.num_items / items_per_phase(self.stage))

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
            elif name == "reward_model" and role.trained:
                models[name] = make_reward_model(models.pop("policy"), seed=self.seed)
            elif name == "reward_model":
                models[name] = self._reward_model_for_ids()
            elif name == "teacher":
                models[name] = self._load_teacher()
        critic = self.roles.get("value_model")
        if critic is not None:  # last, as it may grow from the reward model
            given = models.get("reward_model")
            models["value_model"] = make_value_model(policy, critic.backbone, given, seed=self.seed)
        for name, role in self.roles.items():
            if isinstance(models[name], nn.Module):
                models[name].train(role.trained and self.algorithm.dropout)
                if role.trained and self.stage.train.gradient_checkpointing:
                    recompute_activations(models[name])
        return models

    def _optimizers(self, models: Mapping[str, Any]) -> dict[str, MasterAdamW]:
        settings = self.stage.train
        device = torch.device("cpu") if settings.offload_optimizer else None
        return build_optimizers(self.roles, models, AdamWChoice(**settings.adamw.model_dump()), device=device)

    def _reward_model_for_ids(self) -> ScalarModel:
        """The frozen reward model, once it is sure that it reads the ids that the policy writes."""
        assert self.reward_stage is not None  # see check_recipe
        if not self.learned["same_ids"]:
            raise UserError(
                f"stage {self.stage.name}: the reward model {self.reward_stage.model} has another tokenizer than the "
                f"policy {self.choice.name!r}, whose tokens it reads as they are with these settings of the algorithm; "
                "choose one with the same tokenizer"
            )
        return cast(ScalarModel, self.learned["reward_model"])

    def _load_teacher(self) -> Model:
        """The frozen teacher, once it is sure that it reads the same ids as the policy."""
        assert self.teacher is not None
        own, other = self.template.tokenizer, load_tokenizer(self.teacher.model)
        same_words, same_chat = own.get_vocab() == other.get_vocab(), own.chat_template == other.chat_template
        if not (same_words and same_chat):
            raise UserError(
                f"stage {self.stage.name}: teacher {self.teacher.name!r} has another "
                f"{'chat template' if same_words else 'vocabulary'} than the policy {self.choice.name!r}; it judges "
                "the policy's tokens one by one, so choose a teacher with the same tokenizer"
            )
        choice = replace(model_choice(self.stage.model, self.teacher.model), adapter=None)
        return frozen_policy(choice, self.session.device)

    def _require_fit(self, policy: Model) -> None:
        """The tokenizer's ids have embeddings, and prompt and completion together fit the model's context."""
        config = unwrap(policy).config.get_text_config()
        if len(self.template.tokenizer) > config.vocab_size:
            raise UserError(
                f"model {self.choice.name!r}: its tokenizer has {len(self.template.tokenizer)} entries, but there "
                f"are only {config.vocab_size} embeddings; they do not belong together"
            )
        context = getattr(config, "max_position_embeddings", None)
        if context is not None:
            require_context(self.stage, self.choice.name, context)

    # ---- evaluation and result ---------------------------------------------------------------------------------------

    def _evaluate_during(self, models: Models, state: LoopState, tracker: Tracker) -> LoopState:
        """Held-out numbers at this point of training, as a row of the log; the state with what they change in it."""
        if not self.stage.evaluation.every or self.kind != "policy":
            return state
        evaluation = self._evaluate(models)
        if evaluation is None:
            return state
        state = self._recorded(evaluation, state, tracker, phase=max(0, state.phase - 1))
        if self.stage.evaluation.best is None or state.phase == 0:  # the untrained policy is no candidate
            return state
        before, state = state, considered(state, evaluation.metrics, self.stage.evaluation.best)
        if state.best != before.best:
            keep_best(self.folder, state, models["policy"])
        return state

    def _recorded(
        self, evaluation: Evaluation, state: LoopState, tracker: Tracker, *, phase: int, ends: bool = True
    ) -> LoopState:
        """Logs an evaluation as a row under the number of a phase, with what it says about the run."""
        metrics = {f"evaluation/{name}": value for name, value in evaluation.metrics.items()}
        error = score_noise(evaluation.scores, evaluation.tasks) if "score" in evaluation.metrics else None
        if error is not None:
            metrics["evaluation/score_standard_error"] = error
        row = {"phase": phase, "phases_done": state.phase, **metrics}
        return record(tracker, self.stage.train.diagnosis, state, row, ends=ends)

    def _load_held_out(self) -> list[Any]:
        """The prompts or pairs of every evaluation; read before training, so that what is wrong with them is said then.

        Raises:
            UserError: there are none, or their task cannot grade them.
        """
        count = self.stage.evaluation.prompts_per_task
        if not count:
            return []
        items = held_out_items(self.stage)
        if self.kind == "reward_model":
            pairs = first_of_each_task(items, count)
            return [pair for pair in pairs if pair_fits(pair, self.template, self.limits)]
        with of_evaluation():
            prompts = first_of_each_task(fitting_prompts(items, self.template, self.limits), count)
            if measures := text_measures(self.stage):
                load = partial(load_items, self.stage, "examples", "validation")
                self._references = demonstrations_of(prompts, load)
                check_prompts(measures, prompts, [self._references.get(p.id, p.answer) for p in prompts])
            return prompts

    def _load_demonstrations(self) -> list[Row]:
        """Held-out completions whose perplexity every evaluation measures; none where it is not asked for.

        Raises:
            UserError: the data have none.
        """
        if not self.stage.evaluation.measures_perplexity:
            return []
        with of_perplexity():
            examples = load_items(self.stage, "examples", "validation")
            examples = first_of_each_task(examples, self.stage.evaluation.prompts_per_task)
            return encode_examples(examples, self.template, self.limits)

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
        reference = self._start_policy(models) if settings.kl_to_start and (self.start or settings.best) else None
        found = evaluate_policy(
            models["policy"], self._held_out, self.template, sampling, samples=settings.samples, reference=reference,
            best_of=settings.best_of, rewards=self.rewards if settings.best_of > 1 else (),
            measures=text_measures(self.stage), references=self._references, settings=measure_settings(self.stage),
        )  # fmt: skip
        if not self._demonstrations:
            return found
        nats = token_nats(
            models["policy"], self._demonstrations, pad_id=self.template.pad_id, max_rows=self.limits.microbatch_rows
        )
        return found.with_estimates(perplexity_estimate(nats, [str(row.prompt_ids) for row in self._demonstrations]))

    def _evaluation_record(self, evaluation: Evaluation | None) -> dict[str, Any]:
        """What evaluation.json says of the result; that there was no evaluation, where there was none."""
        if evaluation is None:
            return {"schema": SCHEMA}
        settings, data = self.stage.evaluation, self.stage.data
        decoding = {
            "name": "greedy" if settings.greedy else "sampled", "temperature": settings.temperature, "top_k": 0,
            "greedy": settings.greedy, "samples": settings.samples, "best_of": settings.best_of,
            "max_completion_tokens": self.limits.max_completion_tokens,
            "seed": EVALUATION_SEED, "phase": EVALUATION_PHASE,
        }  # fmt: skip
        return {
            **evaluation.to_json(),
            "kind": self.kind,
            **({"decoding": decoding, "measures": list(settings.measures)} if self.kind == "policy" else {}),
            "data": {"source": data.path or data.hub or f"starter: {', '.join(data.task)}", "split": "validation",
                     "prompts": len(self._held_out), "fingerprint": fingerprint(self._held_out)},
        }  # fmt: skip

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

    def _finish(
        self, models: Models, state: LoopState, tracker: Tracker
    ) -> tuple[Evaluation | None, dict[str, int | None]]:
        """After the last phase: normalise a reward model, evaluate, choose the best policy, and write the result.

        Returns:
            The result's evaluation, and what the records say about the choice.
        """
        if self.kind == "reward_model":
            self._normalise(models["reward_model"])
        evaluation = self._evaluate(models)
        if evaluation is not None:  # numbered one phase on, so that a resume at the end drops it and logs it anew
            state = self._recorded(evaluation, state, tracker, phase=state.phase, ends=False)
        section, chosen = self.stage.evaluation.best, dict[str, int | None]()
        if section is not None and evaluation is not None:
            state = considered(state, evaluation.metrics, section)
            tracker.say(f"{self.stage.name}: {_choice(state, section)}")
            chosen = {"best_phase": best_phase(state)}
            if chosen["best_phase"] not in (None, state.phase):
                restore_best(self.folder, state, models["policy"])
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
        return evaluation, chosen

    def _normalise(self, model: ScalarModel) -> None:
        """Shift and scale so that the starting policy's own answers score mean 0 and standard deviation 1."""
        pairs = cast(list[Pair], load_items(self.stage, "pairs", "train"))
        spread_out = [pair.prompt for pair in pairs[:: max(1, math.ceil(len(pairs) / NORMALISATION_PROMPTS))]]
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
        packages = ["torch", "transformers", "peft", "tokenizers", "safetensors", "numpy"]
        packages += ["bitsandbytes"] if self.choice.quantization else []
        write_json(
            self.folder / "provenance.json",
            {
                "alignlab": alignlab.__version__,
                "code": code_fingerprint(),
                "key": self.key,
                "seed": self.seed,
                "start": self.contract["start"],
                "reward_model": self.contract["reward_model"],
                "teacher": self.contract["teacher"],
                "data": self.contract["data"],
                "model": {"name": self.choice.name, "parameters": num_parameters(models[self.kind]),
                          "trained": num_parameters(models[self.kind], trained_only=True),
                          "dtype": str(unwrap(models[self.kind]).dtype).removeprefix("torch."),
                          "quantization": self.choice.quantization},
                "template": {"stop_ids": sorted(self.template.stop_ids), "bos_id": self.template.bos_id,
                             "pad_id": self.template.pad_id},
                "versions": {"python": platform.python_version(), **{p: metadata.version(p) for p in packages}},
                "machine": {"platform": platform.platform(), "device": str(self.session.device),
                            "threads": torch.get_num_threads(), "cores": os.cpu_count(),
                            "kernels": kernels.ready()},
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
        if self.teacher:
            found["teacher"] = self.teacher.name
        return found

    def _ledger(self, state: LoopState) -> dict[str, float]:
        """What the stage consumed; seconds are those of collecting and stepping, from the log, and those that its
        reference logprobs took when they were computed."""
        rows = read_jsonl(self.folder / HISTORY)
        seconds = sum(row.get("time/collect") or 0.0 for row in rows) + sum(row.get("time/step") or 0.0 for row in rows)
        seconds += self._reference_seconds
        counted = ("prompts", "completions", "generated_tokens", "trained_rows", "trained_tokens")
        return {
            **{name: state.counters.get(name, 0.0) for name in counted},
            "optimizer_steps": float(state.step),
            "phases": float(state.phase),
            "seconds": seconds,
            "peak_memory_bytes": peak_memory(self.session.device),
        }  # fmt: skip


def _choice(state: LoopState, section: BestSection) -> str:
    """Which policy is the result, in words."""
    phase, limit = best_phase(state), f"{section.kl_per_token_limit:g} nats a token"
    if phase is None:
        return f"no evaluated policy was within {limit} of the start; the result is the last one"
    return (
        f"of the evaluated policies within {limit} of the start, the one after phase {phase} has the best "
        f"{METRICS[section.metric][0]}, {state.best[section.metric]:.4g}; it is the result"
    )


def peak_memory(device: torch.device) -> float:
    """Bytes: the accelerator's peak allocation, or the largest resident size of this process so far."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    status = Path("/proc/self/status")
    if status.is_file():  # ru_maxrss starts at what the parent had before this program began
        lines = status.read_text("utf-8").splitlines()
        return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(peak if sys.platform == "darwin" else peak * 1024)


def learned_reward(
    stage: Stage, reward_stage: StageResult | None, template: Template, session: Session
) -> dict[str, Any]:
    """What the reward `learned` scores with: the stage's reward model and its own template.

    Args:
        template: the policy's, whose completions are scored.
    """
    assert reward_stage is not None
    note = require_fit(stage, reward_stage.folder, reward_stage.key)
    if note and not session.quiet:
        print(note, file=sys.stderr)
    folder = reward_stage.model
    choice = replace(model_choice(stage.model, str(folder)), adapter=None)
    model = load_reward_model(folder, choice, device=session.device)
    own = Template.of(load_tokenizer(str(folder)), load_generation_config(str(folder)))
    return {"reward_model": model, "template": own, "same_ids": same_tokenizer(template, own)}


def stage_choice(stage: Stage, start: str | None) -> ModelChoice:
    """What a stage's policy is loaded from: the folder of the policy it starts from, or the model it names."""
    choice = model_choice(stage.model, start or stage.model.name)
    return replace(choice, weights="pretrained", overrides={}, revision=None) if start else choice


def items_per_phase(stage: Stage) -> int:
    """Training items that a phase uses."""
    names = ("examples_per_step", "pairs_per_step", "prompts_per_phase")
    each = next((getattr(stage.algorithm, name) for name in names if hasattr(stage.algorithm, name)), None)
    if not isinstance(each, int):
        raise UserError(f"stage {stage.name}: this method does not say what a phase uses; set num_phases")
    return each


def require_context(stage: Stage, model: str, context: int) -> None:
    """Prompt and completion together fit the model's context."""
    longest = stage.data.max_prompt_tokens + stage.data.max_completion_tokens
    if longest > context:
        raise UserError(
            f"stage {stage.name}: data.max_prompt_tokens + data.max_completion_tokens = {longest}, but the context of "
            f"{model!r} is {context} tokens; lower one of them"
        )


def model_choice(section: ModelSection, name: str) -> ModelChoice:
    """The recipe's model section as plain arguments, for its own model or for a folder that training made."""
    own = {"revision", "weights", "overrides"} if name == section.name else set()
    adapter = LoraChoice(**section.adapter.model_dump()) if section.adapter else None
    plain = section.model_dump(include={"dtype", "attention", "quantization", *own})
    return ModelChoice(**plain, name=name, adapter=adapter)


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
