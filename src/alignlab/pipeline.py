"""Stages of a recipe: Recipe -> for each stage, models and data -> the loop -> a run folder; resumed at the first unfinished.

A run folder holds recipe.yaml (resolved), provenance.json, log_history.jsonl, completions.jsonl, evaluation.json,
checkpoints/ and the result: policy/ or reward_model/. A stage that another stage starts from is trained once and found
again by its key, a hash of everything that decides its weights.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import resource
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import nn

import alignlab
from alignlab import registry, starter
from alignlab.algorithms import Models
from alignlab.checkpoint import file_hash, find_checkpoint, load_checkpoint, save_checkpoint, seal, verify
from alignlab.conversation import Template
from alignlab.data import DataSource, Kind, load_examples
from alignlab.errors import UserError
from alignlab.evaluation import Evaluation, evaluate_policy, evaluate_reward_model
from alignlab.forward import rewards as score_rows
from alignlab.generate import Sampling
from alignlab.models import (
    ADAPTER_FILE,
    LoraChoice,
    ModelChoice,
    ScalarModel,
    disable_dropout,
    frozen_policy,
    has_adapter,
    hush_progress_bars,
    load_generation_config,
    load_policy,
    load_reward_model,
    load_tokenizer,
    location,
    make_reference,
    make_reward_model,
    make_value_model,
    num_parameters,
    pick_device,
    save_model,
)
from alignlab.optim import AdamWChoice, Schedule, build_optimizers
from alignlab.recipe import ModelSection, Recipe, RewardEntry, Stage, dump_yaml, load_recipe
from alignlab.rollout import (
    Limits,
    Reward,
    Source,
    encode_examples,
    encode_pairs,
    fitting_prompts,
    sample_prompts,
)
from alignlab.tasks import get_task
from alignlab.tracking import HISTORY, Tracker, read_jsonl, write_json
from alignlab.train import Finished, RunError, train, trained_modules
from alignlab.types import LoopState, Pair, Prompt, Row

Split = Literal["train", "validation", "test"]
DONE = "stage.json"
"""Written last: a folder with it is a finished stage."""
NORMALISATION_PROMPTS = 128
"""Prompts the reference answers to set a reward model's mean 0 and standard deviation 1."""


@dataclass(frozen=True, kw_only=True)
class StageResult:
    """A finished stage: its folder, its key, and what it cost."""

    folder: Path
    key: str
    kind: str
    """`policy` or `reward_model`."""
    ledger: dict[str, float]
    cached: bool = False

    @property
    def model(self) -> Path:
        return self.folder / self.kind


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


# ---- running ---------------------------------------------------------------------------------------------------------


def run_recipe(
    recipe: Recipe, output: Path, *, resume: bool = False, debug: bool = False, cache: Path | None = None, quiet: bool = False
) -> list[StageResult]:
    """Runs every stage that is not finished, each into a folder of its own (a single stage into `output` itself).

    Raises:
        UserError: `output` holds another run, or something in recipe, data or model cannot be used.
        RunError: the run broke off; its last checkpoint is intact.
    """
    hush_progress_bars()
    session = Session(
        device=pick_device(recipe.device), cache=cache or default_cache(), debug=debug, quiet=quiet, tracking=recipe.tracking
    )
    _claim(output, recipe, resume)
    results: list[StageResult] = []
    for number, stage in enumerate(recipe.stages):
        folder = output if len(recipe.stages) == 1 else output / stage.name
        if stage.start is None and number:
            before = [r for r in results if r.kind == "policy"]
            stage = stage.model_copy(update={"start": str(before[-1].folder)}) if before else stage
        result = run_stage(stage, recipe.seed, folder, session, resume=resume)
        session.earlier[stage.name] = result
        results.append(result)
    return results


def _claim(output: Path, recipe: Recipe, resume: bool) -> None:
    """Writes the resolved recipe, or refuses a folder that belongs to another run."""
    path = output / "recipe.yaml"
    text = recipe.to_yaml()
    if path.is_file() and not resume:
        if path.read_text("utf-8") != text or not _finished_all(recipe, output):
            raise UserError(f"{output} already holds a run; add --resume to go on with it, or choose another --output")
    output.mkdir(parents=True, exist_ok=True)
    if not path.is_file():
        path.write_text(text, "utf-8")


def _finished_all(recipe: Recipe, output: Path) -> bool:
    folders = [output] if len(recipe.stages) == 1 else [output / s.name for s in recipe.stages]
    return all((folder / DONE).is_file() for folder in folders)


def run_stage(stage: Stage, seed: int, folder: Path, session: Session, *, resume: bool) -> StageResult:
    """Trains one stage to its end, or finds it finished."""
    start, reward_stage = _dependency(stage.start, "policy", session), _dependency(stage.reward_model, "reward_model", session)
    if start is not None and "name" in stage.model.model_fields_set:
        raise UserError(f"stage {stage.name}: model.name has no effect, as start: {stage.start} decides the weights; drop one")
    key, contract = stage_key(stage, seed, start, reward_stage)
    done = _finished(folder, key)
    if done is not None:
        _say(session, f"{stage.name}: already complete in {folder}")
        return done
    folder.mkdir(parents=True, exist_ok=True)
    with _Lock(folder):
        run = _Run(stage, seed, folder, session, start, reward_stage, key, contract)
        return run.go(resume)


def _dependency(reference: str | None, kind: str, session: Session) -> StageResult | None:
    """The finished stage a name, recipe file or run folder stands for; a recipe is trained into the cache if need be."""
    if reference is None:
        return None
    if reference in session.earlier:
        return _of_kind(session.earlier[reference], kind, reference)
    path = Path(reference)
    if path.is_dir():
        for candidate in (path, *sorted(p for p in path.iterdir() if p.is_dir())):
            if (candidate / DONE).is_file() and (candidate / kind).is_dir():
                return _read_done(candidate)
        raise UserError(f"{path}: not a finished run with a {kind}; train it first")
    return cached_stage(path, kind, session)


def cached_stage(path: Path, kind: str, session: Session) -> StageResult:
    """The last stage of a recipe file, from the cache or trained into it now."""
    recipe = load_recipe(path, debug=session.debug)
    inner = replace(session, earlier={}, tracking=())
    result: StageResult | None = None
    for stage in recipe.stages:
        if stage.start is None and result is not None and result.kind == "policy":
            stage = stage.model_copy(update={"start": str(result.folder)})
        start = _dependency(stage.start, "policy", inner)
        reward_stage = _dependency(stage.reward_model, "reward_model", inner)
        key, _ = stage_key(stage, recipe.seed, start, reward_stage)
        folder = session.cache / f"{recipe.name}-{key[:16]}"
        found = _finished(folder, key)
        if found is None:
            _say(session, f"{path.name}: training {stage.name} first (kept in {folder})")
            found = run_stage(stage, recipe.seed, folder, inner, resume=True)
        inner.earlier[stage.name] = result = found
    assert result is not None
    return _of_kind(result, kind, reference=str(path))


def _of_kind(result: StageResult, kind: str, reference: str) -> StageResult:
    if result.kind != kind:
        raise UserError(f"{reference}: gives a {result.kind}, but a {kind} is needed here")
    return result


def _finished(folder: Path, key: str) -> StageResult | None:
    if not (folder / DONE).is_file():
        return None
    result = _read_done(folder)
    if result.key != key:
        raise UserError(f"{folder}: holds a finished stage of another recipe, data or model; choose another --output")
    problem = verify(result.model)
    if problem:
        raise UserError(f"{result.model}: {problem}; delete {folder} and train it again")
    return result


def _read_done(folder: Path) -> StageResult:
    done = json.loads((folder / DONE).read_text("utf-8"))
    return StageResult(folder=folder, key=done["key"], kind=done["kind"], ledger=done["ledger"], cached=True)


def _say(session: Session, line: str) -> None:
    if not session.quiet:
        print(line, file=sys.stderr)


# ---- identity --------------------------------------------------------------------------------------------------------


def stage_key(
    stage: Stage, seed: int, start: StageResult | None, reward_stage: StageResult | None
) -> tuple[str, dict[str, Any]]:
    """A hash of everything that decides a stage's weights, and the same as named parts (what a resume must find)."""
    settings = _flat(stage.model_dump(mode="json", serialize_as_any=True, exclude={"name", "start", "reward_model"}))
    parts = settings | {
        "seed": seed,
        "start": start.key if start else _model_fingerprint(stage.model),
        "reward_model": reward_stage.key if reward_stage else None,
        "data": data_fingerprint(stage),
    }
    full = {**parts, "code": code_fingerprint()}
    return hashlib.sha256(json.dumps(full, sort_keys=True).encode()).hexdigest(), parts


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, Mapping) and value:
        return {k: v for key, below in value.items() for k, v in _flat(below, f"{prefix}{key}.").items()}
    return {prefix.removesuffix("."): value}


def _model_fingerprint(model: ModelSection) -> str:
    folder = Path(location(model.name))
    if not folder.is_dir():
        return f"{model.name}@{model.revision or 'main'}"
    files = sorted(p for p in folder.iterdir() if p.suffix in (".json", ".safetensors", ".jinja"))
    if model.weights == "random":
        files = [p for p in files if p.suffix != ".safetensors"]
    return _hash_files(files)


def data_fingerprint(stage: Stage) -> str:
    """sha256 over the data files of a stage; a hub set is known by its name, revision is the hub's."""
    data = stage.data
    if data.path and Path(data.path).expanduser().is_file():
        extra = [Path(data.validation_path)] if data.validation_path else []
        return _hash_files([Path(data.path).expanduser(), *extra])
    if data.path or data.hub:
        return f"{data.path or data.hub}/{data.hub_config}/{data.split}"
    return _hash_files(sorted(p for task in data.task for p in (starter.DATA / task).glob("*.jsonl")))


def code_fingerprint() -> str:
    """sha256 over the package's sources that can change a weight or a score."""
    root = Path(alignlab.__file__).parent
    outside = {"study", "cli.py", "serving"}
    return _hash_files(sorted(p for p in root.rglob("*.py") if p.relative_to(root).parts[0] not in outside))


def _hash_files(files: Sequence[Path]) -> str:
    joined = "\n".join(f"{p.name} {file_hash(p)}" for p in files)
    return hashlib.sha256(joined.encode()).hexdigest()


# ---- one stage -------------------------------------------------------------------------------------------------------


class _Run:
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
        tokenizer = load_tokenizer(self.choice.name, self.choice.revision)
        self.template = Template.of(tokenizer, load_generation_config(self.choice.name, self.choice.revision))
        self.limits = Limits(
            max_prompt_tokens=stage.data.max_prompt_tokens,
            max_completion_tokens=stage.data.max_completion_tokens,
            microbatch_rows=stage.train.microbatch_rows,
            sampling_rows=stage.train.sampling_rows,
        )
        self._start: Any = None
        self.kind = "reward_model" if self.roles.get("reward_model") and self.roles["reward_model"].trained else "policy"

    def go(self, resume: bool) -> StageResult:
        stage, started = self.stage, time.time()
        source = self._source()
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
            self._write_record(models, started)
            if state.phase == 0:
                self._evaluate_during(models, state, tracker)
            state = self._loop(models, optimizers, source, state, tracker, trained, checkpoints)
            evaluation = self._finish(models, source)
        ledger = self._ledger(state)
        write_json(self.folder / "evaluation.json", {**evaluation.to_json(), "ledger": ledger} if evaluation else {"ledger": ledger})
        write_json(
            self.folder / DONE,
            {"key": self.key, "kind": self.kind, "ledger": ledger, "phases": state.phase, "stop_reason": state.stop_reason},
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

    def _source(self) -> Source:
        stage, kind = self.stage, self.algorithm.data_kind
        items = load_items(stage, kind, "train")
        if not items:
            raise UserError(f"stage {stage.name}: the data have no {kind} to train on")
        sampling = Sampling(
            temperature=getattr(stage.algorithm, "temperature", 1.0), max_completion_tokens=self.limits.max_completion_tokens
        )
        source = Source(template=self.template, device=self.session.device, limits=self.limits, sampling=sampling)
        if kind == "examples":
            return replace(source, examples=encode_examples(items, self.template, self.limits))
        if kind == "pairs":
            return replace(source, pairs=encode_pairs(items, self.template, self.limits))
        prompts = fitting_prompts(items, self.template, self.limits)
        return replace(source, prompts=prompts, rewards=self._rewards())

    def _rewards(self) -> list[Reward]:
        """The recipe's reward, or the default rewards of the tasks, each on its own task."""
        entries: list[tuple[str, RewardEntry]] = list(self.stage.reward.items())
        if not entries:
            by_name: dict[str, dict[str, float]] = {}
            for task in self.stage.data.task:
                for name, weight in get_task(task).default_reward.items():
                    by_name.setdefault(name, {})[task] = weight
            entries = [
                (name, RewardEntry(weight=weight, tasks=tuple(t for t, w in tasks.items() if w == weight)))
                for name, tasks in by_name.items()
                for weight in sorted(set(tasks.values()))
            ]
        if not entries:
            raise UserError(f"stage {self.stage.name}: no reward; name one under `reward`, or a task with a default reward")
        return [self._reward(name, entry) for name, entry in entries]

    def _reward(self, name: str, entry: RewardEntry) -> Reward:
        found = registry.resolve("rewards", name)
        function = getattr(found, name, found)
        if not callable(function):
            raise UserError(f"reward {name!r}: its module has no function called {name}")
        options = entry.options
        if name == "learned":
            if self.reward_stage is None:
                raise UserError(f"stage {self.stage.name}: reward `learned` needs `reward_model: RECIPE or RUN`")
            choice = model_choice(self.stage.model, str(self.reward_stage.model))
            model = load_reward_model(self.reward_stage.model, replace(choice, adapter=None), device=self.session.device)
            tokenizer = load_tokenizer(str(self.reward_stage.model))
            template = Template.of(tokenizer, load_generation_config(str(self.reward_stage.model)))
            options = {**options, "reward_model": model, "template": template}
        try:
            bound = partial(function, **options)
            bound([], [])
        except TypeError as error:
            raise UserError(f"reward {name!r}: {error}") from error
        return Reward(name=name, function=bound, weight=entry.weight, tasks=entry.tasks)

    # ---- models ------------------------------------------------------------------------------------------------------

    def _models(self) -> dict[str, Any]:
        """Builds every role the method asks for; all randomness in it comes from the run's seed."""
        policy = load_policy(self.choice, seed=self.seed, device=self.session.device)
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

    # ---- evaluation and result ---------------------------------------------------------------------------------------

    def _evaluate_during(self, models: Models, state: LoopState, tracker: Tracker) -> None:
        """Held-out numbers at this point of training, as a row of the log."""
        if not self.stage.evaluation.every or self.kind != "policy":
            return
        evaluation = self._evaluate(models)
        if evaluation is not None:
            row = {f"evaluation/{k}": v for k, v in evaluation.metrics.items()}
            tracker.log({"phase": max(0, state.phase - 1), "step": state.step, "phases_done": state.phase, **row})

    def _evaluate(self, models: Models) -> Evaluation | None:
        settings = self.stage.evaluation
        if not settings.prompts_per_task:
            return None
        if self.kind == "reward_model":
            return self._evaluate_reward_model(models)
        prompts = validation_prompts(self.stage, settings.prompts_per_task, self.template, self.limits)
        if not prompts:
            return None
        sampling = Sampling(
            temperature=settings.temperature, greedy=settings.greedy, max_completion_tokens=self.limits.max_completion_tokens
        )
        reference = self._start_policy(models) if settings.kl_to_start and self.start else None
        return evaluate_policy(
            models["policy"], prompts, self.template, sampling, samples=settings.samples, reference=reference
        )

    def _start_policy(self, models: Models) -> Any:
        """The policy this stage started from, frozen: the method's reference, or loaded once for evaluation."""
        if "reference" in models:
            return models["reference"]
        if self._start is None:
            self._start = frozen_policy(self.choice, self.session.device)
        return self._start

    def _evaluate_reward_model(self, models: Models) -> Evaluation | None:
        pairs = cast(list[Pair], load_items(self.stage, "pairs", "validation"))
        pairs = _first_of_each_task(pairs, self.stage.evaluation.prompts_per_task)
        fitting = [p for p in pairs if encode_pairs_or_none(p, self.template, self.limits)]
        if not fitting:
            return None
        source = Source(
            template=self.template, device=self.session.device, limits=self.limits, sampling=Sampling(),
            pairs=encode_pairs(fitting, self.template, self.limits),
        )  # fmt: skip
        return evaluate_reward_model(models["reward_model"], source, [p.prompt.task for p in fitting])

    def _finish(self, models: Models, source: Source) -> Evaluation | None:
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
        prompts = [p.prompt for p in cast(list[Pair], load_items(self.stage, "pairs", "train"))[: NORMALISATION_PROMPTS * 4]]
        prompts = fitting_prompts(prompts, self.template, self.limits)[:: max(1, len(prompts) // NORMALISATION_PROMPTS)]
        reference = frozen_policy(self.choice, self.session.device)
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
            raise RunError("the reward model gives every reference answer the same score; it has learned nothing to use")
        model.set_normalisation(scores.mean().item(), spread)

    # ---- record ------------------------------------------------------------------------------------------------------

    def _write_record(self, models: Models, started: float) -> None:
        path = self.folder / "recipe.yaml"
        if not path.is_file():
            stage = {"name": self.folder.name, "seed": self.seed, **self.stage.model_dump(mode="json", serialize_as_any=True)}
            path.write_text(dump_yaml({k: v for k, v in stage.items()}), "utf-8")
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

    def _ledger(self, state: LoopState) -> dict[str, float]:
        """What the stage consumed; seconds are those of collecting and stepping, from the log."""
        rows = read_jsonl(self.folder / HISTORY)
        seconds = sum(row.get("time/collect") or 0.0 for row in rows) + sum(row.get("time/step") or 0.0 for row in rows)
        return {
            **{k: state.counters.get(k, 0.0) for k in ("prompts", "completions", "generated_tokens", "trained_rows", "trained_tokens")},
            "optimizer_steps": float(state.step),
            "phases": float(state.phase),
            "seconds": seconds,
            "peak_memory_bytes": peak_memory(self.session.device),
        }  # fmt: skip


def peak_memory(device: torch.device) -> float:
    """Bytes: the accelerator's peak allocation, or the largest resident size of this process so far."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(peak if sys.platform == "darwin" else peak * 1024)


# ---- data of a stage -------------------------------------------------------------------------------------------------


def load_items(stage: Stage, kind: Kind, split: Split) -> list[Any]:
    """Examples, pairs or prompts of a stage's train, validation or test split (files and hub sets have no test split)."""
    items: list[Any] = []
    for source in _data_sources(stage, kind, split):
        items += load_examples(source, kind, "train" if split == "train" else "validation").items
    return items


def _data_sources(stage: Stage, kind: Kind, split: Split) -> list[DataSource]:
    data = stage.data
    if data.path is None and data.hub is None:
        if not data.task:
            raise UserError(f"stage {stage.name}: data names neither a task of the starter, nor a path, nor a hub set")
        return [_starter_source(stage.name, task, kind, split, data.limit) for task in data.task]
    if len(data.task) > 1:
        raise UserError(f"stage {stage.name}: one file or hub set is one task, not {', '.join(data.task)}")
    keys = ("validation_path", "hub_config", "split", "validation_split", "validation_fraction", "columns", "system_prompt",
            "prompt_template", "limit", "format")  # fmt: skip
    hub = None if data.path else data.hub
    task = data.task[0] if data.task else ""
    return [DataSource(path=data.path, hub=hub, task=task, **{k: getattr(data, k) for k in keys})]


def _starter_source(stage: str, task: str, kind: Kind, split: Split, limit: int | None) -> DataSource:
    prefix = "pairs." if kind == "pairs" else ""
    train, held_out = (starter.DATA / task / f"{prefix}{s}.jsonl" for s in ("train", "validation" if split == "train" else split))
    for path in (train, held_out):
        if not path.is_file():
            raise UserError(f"stage {stage}: the starter has no {path.stem} data for {task!r}; name a file in data.path")
    return DataSource(path=str(train), validation_path=str(held_out), task=task, limit=limit)


def validation_prompts(stage: Stage, per_task: int, template: Template, limits: Limits, split: Split = "validation") -> list[Prompt]:
    """The first `per_task` held-out prompts of every task, those that fit."""
    prompts = cast(list[Prompt], load_items(stage, "prompts", split))
    return _first_of_each_task(fitting_prompts(prompts, template, limits), per_task)


def _first_of_each_task(items: Sequence[Any], count: int) -> list[Any]:
    taken: dict[str, int] = {}
    kept = []
    for item in items:
        task = item.task if isinstance(item, Prompt) else item.prompt.task
        taken[task] = taken.get(task, 0) + 1
        if taken[task] <= count:
            kept.append(item)
    return kept


def encode_pairs_or_none(pair: Pair, template: Template, limits: Limits) -> bool:
    """Whether a pair fits the limits and stays two different rows."""
    try:
        return bool(encode_pairs([pair], template, limits))
    except UserError:
        return False


def model_choice(section: ModelSection, name: str) -> ModelChoice:
    """The recipe's model section as plain arguments, for the model or folder of that name."""
    adapter = LoraChoice(**section.adapter.model_dump()) if section.adapter else None
    return ModelChoice(**{**section.model_dump(exclude={"adapter", "name"}), "name": name, "adapter": adapter})


class _Lock:
    """One process a run folder: a file with the owner's process id; a dead owner's lock is taken over."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / ".lock"

    def __enter__(self) -> None:
        for _ in range(2):
            try:
                with self.path.open("x", encoding="utf-8") as stream:
                    stream.write(str(os.getpid()))
                return
            except FileExistsError:
                owner = self.path.read_text("utf-8").strip()
                if owner.isdigit() and int(owner) != os.getpid() and _alive(int(owner)):
                    raise UserError(f"{self.path.parent}: process {owner} is running this; wait for it or stop it") from None
                self.path.unlink(missing_ok=True)

    def __exit__(self, *error: object) -> None:
        self.path.unlink(missing_ok=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
