"""The typed recipe: YAML or JSON (+ `extends`, + key=value) -> a closed, frozen Recipe, written out resolved.

A recipe is one stage, or a list of `stages` with shared defaults beside it; `preset: trl` beside an algorithm gives it
that library's defaults. Every key is checked, and all that is wrong is said at once, with the nearest valid name.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, cast

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
from ruamel.yaml import YAML
from ruamel.yaml.constructor import DuplicateKeyError
from ruamel.yaml.error import YAMLError

from alignlab import registry
from alignlab.algorithms import Algorithm, Hyperparameters
from alignlab.data import placeholders
from alignlab.diagnosis import DiagnosisLimits
from alignlab.errors import UserError

M = TypeVar("M", bound=BaseModel)
MAX_BYTES = 1_000_000
"""A recipe larger than this is not a recipe."""
MAX_NODES = 100_000
"""Nor is one with more values than this."""


def _as_tuple(value: object) -> object:
    """`task: reasoning` means `task: [reasoning]`."""
    return (value,) if isinstance(value, str) else value


Names = Annotated[tuple[str, ...], BeforeValidator(_as_tuple)]


def _one_folder(name: str) -> str:
    """A name that becomes a folder below runs/, and leads nowhere else."""
    if name in ("", ".", "..") or re.search(r"[/\\\x00-\x1f]", name):
        raise ValueError(f"{name!r} cannot be a folder name, not even with a path before it; --output chooses a place")
    return name


FolderName = Annotated[str, AfterValidator(_one_folder)]


def _template(template: str | None) -> str | None:
    placeholders(template)
    return template


class Section(BaseModel):
    """Closed and frozen; attribute docstrings are the documentation of the keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


class AdapterSection(Section):
    """A LoRA adapter (arXiv:2106.09685)."""

    rank: int = Field(8, ge=1)
    """r of the two factors."""
    alpha: float = Field(16.0, gt=0)
    """The update is scaled by alpha / rank."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout before the first factor; only supervised fine-tuning uses it."""
    target_modules: Names = ("all-linear",)
    """Names of linear layers; `all-linear` is all but the head."""


class ModelSection(Section):
    """The model a run starts from."""

    name: str = "starter"
    """`starter`, a folder, or a hub id such as google/gemma-3-270m-it."""
    revision: str | None = None
    """Hub revision."""
    weights: Literal["pretrained", "random"] = "pretrained"
    """`random` draws the weights from the seed and takes only the shape."""
    dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = "auto"
    """`auto`: bfloat16 where an accelerator has it, else float32."""
    attention: Literal["auto", "sdpa", "eager"] = "auto"
    """Attention implementation; `auto` knows which models need eager."""
    adapter: AdapterSection | None = None
    """null trains every weight."""
    quantization: Literal["4bit", "8bit"] | None = None
    """Stores the linear layers' frozen weights in few bits: `4bit` is NF4 with double quantisation (QLoRA,
    arXiv:2305.14314), `8bit` the weights of LLM.int8 (arXiv:2208.07339). Only with an adapter."""
    overrides: dict[str, Any] = {}
    """Configuration values to replace with `weights: random`."""

    @field_validator("adapter", mode="before")
    @classmethod
    def _lora_by_name(cls, value: object) -> object:
        if value == "qlora":
            raise ValueError("for QLoRA take model.adapter=lora model.quantization=4bit")
        if isinstance(value, str) and value != "lora":
            raise ValueError(f"{value!r} is no adapter; there is lora, or its settings, e.g. {{rank: 16, alpha: 32}}")
        return {} if value == "lora" else value

    @model_validator(mode="after")
    def _trainable(self) -> ModelSection:
        if self.quantization and self.adapter is None:
            raise ValueError(f"{self.quantization} weights cannot be trained: set adapter: lora or drop quantization")
        return self


class DataSection(Section):
    """Where examples, pairs or prompts come from. Without path and hub: the starter data of the tasks."""

    task: Names = ()
    """Tasks that grade the prompts; the starter's are reasoning, safety, clinical, code."""
    path: str | None = None
    """JSON, JSONL, CSV or parquet file (or URL), or a folder that `alignlab data prepare` wrote."""
    validation_path: str | None = None
    """A file of its own for validation; otherwise a seeded hash splits off `validation_fraction`."""
    hub: str | None = None
    """Name of a hub data set."""
    hub_config: str | None = None
    """Configuration of the hub data set."""
    split: str | None = None
    """Split with an optional slice: `train`, `train[:200]`."""
    validation_split: str | None = None
    """Split of the hub data set for validation."""
    validation_fraction: float = Field(0.1, gt=0, lt=1)
    """Share of a single file that is held out, by a hash of each row's prompt."""
    columns: dict[str, str] = {}
    """Our name -> the file's column name, e.g. {prompt: question}."""
    format: str = "auto"
    """Row format; `auto` detects it from the columns."""
    system_prompt: str | None = None
    """System message in front of every conversation."""
    prompt_template: Annotated[str | None, AfterValidator(_template)] = None
    """Text of the user's turn with at least one `{column}` field, `{prompt}` being the message as it stands; a literal
    brace is written twice. In a recipe in quotes, "Summarise: {dialogue}", and on the command line in two kinds of
    them: 'data.prompt_template="Summarise: {dialogue}"'."""
    limit: int | None = Field(None, ge=1)
    """Use only the first rows."""
    max_prompt_tokens: int = Field(512, ge=1)
    """Rows with longer prompts are left out."""
    max_completion_tokens: int = Field(128, ge=1)
    """Longer completions are cut, keeping their stop token; also the sampling limit."""


class ScheduleSection(Section):
    """Learning rate over the run as a factor on each role's peak."""

    shape: Literal["constant", "linear", "cosine"] = "constant"
    """How it goes down after the warm-up."""
    warmup: float = Field(0.0, ge=0, lt=1)
    """Share of the phases in which it rises."""
    floor: float = Field(0.0, ge=0, le=1)
    """Factor at the end."""


class AdamWSection(Section):
    """AdamW for every trained role."""

    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.999, ge=0, lt=1)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    """Of matrices; norms and biases are never decayed."""


class DiagnosisSection(DiagnosisLimits, Section):
    """When a number of a running run counts as unusual, and which findings end it."""


class TrainSection(Section):
    """The loop."""

    num_phases: int = Field(100, ge=1)
    """Phases: one optimiser step each offline; one round of sampling and its steps online."""
    epochs: float | None = Field(None, gt=0)
    """Passes over the training items instead of a number of phases; the last pass ends with a whole phase."""
    schedule: ScheduleSection = ScheduleSection()
    adamw: AdamWSection = AdamWSection()
    microbatch_rows: int = Field(64, ge=2)
    """Rows in one forward and backward pass; changes memory and speed, never the gradient."""
    max_tokens_per_microbatch: int | None = Field(None, ge=1)
    """Tokens in one pass as well, counted as if rows were padded to the longest; a longer row goes alone."""
    sampling_rows: int = Field(512, ge=1)
    """Rows sampled at once, if their keys and values fit the next one."""
    sampling_cache_mb: int = Field(2048, ge=1)
    """Megabytes for the keys and values of rows sampled at once; neither changes what is sampled."""
    gradient_checkpointing: bool = False
    """Computes the activations of trained models anew in the backward pass: less memory, a third slower, the same
    gradients (arXiv:1604.06174)."""
    offload_optimizer: bool = False
    """Keeps AdamW's moments, the gradients and float32 copies of trained weights in the CPU's memory, and steps there:
    an accelerator then holds the weights alone (arXiv:2101.06840). On the CPU the same bits, and a copy too many."""
    save_every: int = Field(20, ge=1)
    """Phases between checkpoints; one is always taken at the end."""
    keep_checkpoints: int = Field(2, ge=1)
    """Newest checkpoints kept."""
    log_completions: int = Field(16, ge=0)
    """Rollouts a phase written to completions.jsonl; 0 = none."""
    diagnosis: DiagnosisSection = DiagnosisSection()

    @model_validator(mode="after")
    def _one_length(self) -> TrainSection:
        default = type(self).model_fields["num_phases"].default
        if self.epochs is not None and self.num_phases != default:
            given = f"num_phases {self.num_phases} and epochs {self.epochs:g}"
            raise ValueError(f"{given} both say how long; set one to null")
        return self

    @field_validator("num_phases", mode="before")
    @classmethod
    def _null_is_the_default(cls, value: object) -> object:
        return cls.model_fields["num_phases"].default if value is None else value


class BestSection(Section):
    """The result is the best policy that an evaluation of the run has seen, rather than the last one."""

    kl_per_token_limit: float = Field(gt=0)
    """The gate: only a policy at most so far from the start (nats a token, k1, on its own held-out completions) may
    win. Document 001 aims at .05, later .01."""
    metric: Literal["perplexity", "score"] = "score"
    """What decides among those: the lowest perplexity of held-out demonstrations (document 001), or the highest score;
    of equals the earlier."""


class EvaluationSection(Section):
    """Held-out evaluation by sampling, during and after training."""

    every: int = Field(0, ge=0)
    """Phases between evaluations; 0 = only at the end."""
    prompts_per_task: int = Field(50, ge=0)
    """Validation prompts (or pairs of a reward model) of each task; 0 = no evaluation."""
    samples: int = Field(1, ge=1)
    """Completions a prompt."""
    temperature: float = Field(1.0, gt=0)
    """Sampling temperature."""
    greedy: bool = False
    """Take the likeliest token instead of sampling."""
    kl_to_start: bool = True
    """Measure the KL to the policy training started from (a frozen copy of it stays in memory)."""
    best_of: int = Field(1, ge=1)
    """Candidates of each completion; the one with the highest training reward of the stage is graded. Costs that many
    times the tokens; where the reward is the grader itself, the score is pass@n."""
    perplexity: bool = False
    """Also measure the perplexity of held-out demonstrations; `best.metric: perplexity` implies it."""
    measures: Names = ()
    """What else is measured on the completions: bertscore, bleu, calibration, distinct, exact_match, gsm8k,
    harmlessness, pass_at_k, rouge, verbosity."""
    encoder: str = ""
    """Encoder of the measure `bertscore`: a folder or a hub id."""
    word_limit: int = Field(60, ge=1)
    """Words an answer may have in the measure `verbosity`."""
    best: BestSection | None = None
    """Which policy becomes the result; null = the last one."""

    @property
    def measures_perplexity(self) -> bool:
        asked = self.perplexity or "perplexity" in self.measures
        return asked or (self.best is not None and self.best.metric == "perplexity")

    @model_validator(mode="after")
    def _best_needs_candidates(self) -> EvaluationSection:
        if (self.best or self.perplexity or self.measures) and not self.prompts_per_task:
            raise ValueError("best, perplexity and measures are of evaluations; set prompts_per_task above 0")
        if self.best and not self.every:
            raise ValueError("best chooses among evaluations; set every to the phases between them")
        if self.best and (self.greedy or not self.kl_to_start):
            raise ValueError("best measures the KL to the start on samples; leave out greedy, and kl_to_start: false")
        return self


class RewardEntry(Section):
    """One component of the reward; any further key is an option of its function."""

    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False)

    weight: float = 1.0
    tasks: Names = ()
    timeout: float | None = Field(None, gt=0)
    """Seconds that one call may take; null: ten minutes for a function of one's own, any time for alignlab's."""

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


def _is_dropped(name: str, value: object) -> bool:
    """`learned: null` takes an inherited component out."""
    head, colon, weight = name.rpartition(":")
    if value is None and colon and re.fullmatch(r"[-+.\d][-+.\de]*", weight):
        raise ValueError(f"a space is missing after the colon of {name!r}: write {{{head}: {weight}}}")
    return value is None


def _entry(name: str, value: object) -> object:
    """`length: 1` means `length: {weight: 1}`."""
    if isinstance(value, str | list):
        raise ValueError(f"{name}: a weight is needed, or {{weight: 1}} with options beside it, not {value!r}")
    return {"weight": value} if isinstance(value, int | float) else value


class Stage(Section):
    """One training stage: what is trained, from where, on what, how."""

    name: str
    """Its folder, and what later stages call it."""
    algorithm: Hyperparameters
    """The method and its hyperparameters: `{name: grpo, ...}`."""
    start: str | None = None
    """The policy it starts from: an earlier stage, a recipe file, or a run folder; null = the stage before, or the
    model."""
    reward_model: str | None = None
    """The reward model it uses: an earlier stage, a recipe file, or a run folder."""
    teacher: str | None = None
    """The frozen policy it distils: an earlier stage, a recipe file, a run folder, or a model (folder or hub id) with
    the same tokenizer."""
    model: ModelSection = ModelSection()
    data: DataSection = DataSection()
    reward: dict[str, RewardEntry] = {}
    """Component -> weight, or {weight, tasks, and its options}, or null to take it out; empty = the tasks' default
    rewards."""
    train: TrainSection = TrainSection()
    evaluation: EvaluationSection = EvaluationSection()

    @field_validator("algorithm", mode="before")
    @classmethod
    def _typed_algorithm(cls, value: object) -> object:
        if isinstance(value, BaseModel):
            return value
        if isinstance(value, str):
            value = {"name": value}
        if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
            raise ValueError("needs a name, e.g. {name: grpo}")
        return algorithm_class(value["name"]).model_validate(dict(value))

    @field_validator("model", mode="before")
    @classmethod
    def _model_by_name(cls, value: object) -> object:
        return {"name": value} if isinstance(value, str) else value

    @field_validator("reward", mode="before")
    @classmethod
    def _weights(cls, value: object) -> object:
        if isinstance(value, str | list):
            named = ", ".join(f"{name}: 1" for name in ([value] if isinstance(value, str) else value))
            raise ValueError(f"a mapping of components to weights is needed, reward={{{named}}}")
        if not isinstance(value, Mapping):
            return value or {}
        kept = {k: _entry(str(k), v) for k, v in value.items() if not _is_dropped(str(k), v)}
        if value and not kept:
            raise ValueError("every component is null; leave `reward` out for the default rewards of the tasks")
        return kept

    @field_validator("name")
    @classmethod
    def _folder_name(cls, value: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", value):
            raise ValueError(f"{value!r} cannot be a folder name; use letters, digits, - and _")
        return value

    @property
    def method(self) -> Algorithm:
        return cast(Algorithm, self.algorithm)

    @model_validator(mode="after")
    def _only_a_policy_has_a_best(self) -> Stage:
        role = self.method.models().get("reward_model")
        if role is not None and role.trained and (self.evaluation.best or self.evaluation.perplexity):
            raise ValueError("evaluation.best and evaluation.perplexity are of a policy, but it trains a reward model")
        if role is not None and role.trained and self.evaluation.measures:
            raise ValueError("evaluation.measures are of a policy, but it trains a reward model")
        return self


class Recipe(Section):
    """What `alignlab train` runs, resolved."""

    name: FolderName
    seed: int = Field(42, ge=0)
    """Every random choice of the run is a function of it."""
    device: str = "auto"
    """`auto` (CUDA, MPS, CPU), or a torch device."""
    tracking: Names = ()
    """Mirrors of the log: tensorboard, wandb."""
    stages: tuple[Stage, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _distinct_stages(self) -> Recipe:
        names = [stage.name for stage in self.stages]
        double = sorted({n for n in names if names.count(n) > 1})
        if double:
            raise ValueError(f"two stages are called {', '.join(double)}")
        return self

    def to_yaml(self) -> str:
        return dump_yaml(self.model_dump(mode="json", serialize_as_any=True))


DEBUG: Mapping[str, Mapping[str, int | None]] = {
    "train": {"num_phases": 2, "epochs": None, "save_every": 1},
    "evaluation": {"prompts_per_task": 2, "every": 0, "samples": 1},
}
"""The most that `--debug` leaves of every stage: two phases, and an evaluation on a handful of prompts. Less stays."""
DEBUG_SIZES = {"prompts_per_phase": 2, "pairs_per_step": 4, "examples_per_step": 4, "group_size": 4, "keep": 1}
"""The most that `--debug` leaves of what a method uses a phase."""
DEBUG_ROWS = 64
"""Rows of each source that `--debug` uses."""


def algorithm_class(name: str) -> type[Hyperparameters]:
    """The hyperparameter class of a method's name or dotted path."""
    found = registry.resolve("algorithms", name)
    found = getattr(found, "ALGORITHM", found)
    if not (isinstance(found, type) and issubclass(found, BaseModel)):
        raise UserError(f"algorithm {name!r} is not a method: its module has no ALGORITHM class")
    return cast(type[Hyperparameters], found)


# ---- reading ---------------------------------------------------------------------------------------------------------


def load_recipe(path: Path, overrides: Sequence[str] = (), *, debug: bool = False) -> Recipe:
    """Reads, merges, checks and resolves a recipe.

    Args:
        overrides: `key.subkey=value`; of one stage of several: `stages.NAME.key=value`.
        debug: two phases a stage, in seconds.

    Raises:
        UserError: with everything that is wrong, one line each.
    """
    raw = apply_overrides(read_mapping(path), overrides)
    return parse_recipe(raw, path, debug=debug)


def parse_recipe(raw: Mapping[str, Any], path: Path, *, debug: bool = False) -> Recipe:
    """A read mapping -> Recipe; relative `start`, `reward_model` and `teacher` are looked for beside `path`."""
    raw = dict(raw)
    if "arms" in raw:
        raise UserError(f"{path}: this is a study, as it has `arms`; run it with alignlab study {path}")
    shared = {k: raw.pop(k) for k in list(raw) if k in {*Stage.model_fields, "preset"} - {"name"}}
    stages = raw.pop("stages", None)
    if stages is None:
        stages = [{"name": _stage_name(shared), **shared}]
        shared = {}
    elif not isinstance(stages, list) or not all(isinstance(s, Mapping) for s in stages):
        raise UserError(f"{path}: stages must be a list of mappings")
    merged = [_with_preset(merge(shared, s)) for s in stages]
    for stage in merged:
        stage.setdefault("name", _stage_name(stage))
        if debug:
            _make_small(stage)
    names = {stage["name"] for stage in merged}
    for stage in merged:
        for key in ("start", "reward_model"):
            if isinstance(stage.get(key), str) and stage[key] not in names:
                stage[key] = _beside(stage[key], path)
        if isinstance(stage.get("teacher"), str) and stage["teacher"] not in names:
            stage["teacher"] = _teacher_beside(stage["teacher"], path)
        if isinstance(stage.get("data"), Mapping):
            stage["data"] = _data_beside(stage["data"], path)
    raw.setdefault("name", path.stem)
    return validate(Recipe, {**raw, "stages": merged}, str(path))


def _make_small(stage: dict[str, Any]) -> None:
    """In debug there are few phases, a phase is small too, and few rows are read for it."""
    for section, most in DEBUG.items():
        if isinstance(given := stage.get(section, {}), Mapping):
            stage[section] = {**given, **{key: _at_most(given.get(key), value) for key, value in most.items()}}
    data = stage.get("data", {})
    if isinstance(data, Mapping):
        limit = data.get("limit")
        stage["data"] = {**data, "limit": min(limit, DEBUG_ROWS) if isinstance(limit, int) else limit or DEBUG_ROWS}
    algorithm = _named("algorithm", stage.get("algorithm"))
    if isinstance(algorithm, Mapping) and algorithm.get("name") in registry.names("algorithms"):
        fields = algorithm_class(algorithm["name"]).model_fields
        sizes = {key: algorithm.get(key, fields[key].default) for key in DEBUG_SIZES if key in fields}
        small = {key: min(size, DEBUG_SIZES[key]) for key, size in sizes.items() if isinstance(size, int)}
        stage["algorithm"] = {**algorithm, **small}
    evaluation = stage.get("evaluation")
    if isinstance(evaluation, Mapping) and evaluation.get("best"):
        stage["evaluation"] = {**evaluation, "every": 1}


def _at_most(given: object, most: int | None) -> object:
    """What is given, if that is less, or no number (which is said later); else the most there may be."""
    if most is None or given is None:
        return most
    return min(given, most) if isinstance(given, int | float) else given


def _with_preset(stage: dict[str, Any]) -> dict[str, Any]:
    """`preset: trl` beside the algorithm is the algorithm's, unless that names one itself."""
    preset, algorithm = stage.pop("preset", None), _named("algorithm", stage.get("algorithm"))
    return stage | {"algorithm": {"preset": preset, **algorithm}} if preset and isinstance(algorithm, dict) else stage


def _stage_name(stage: Mapping[str, Any]) -> str:
    algorithm = stage.get("algorithm")
    name = algorithm.get("name") if isinstance(algorithm, Mapping) else algorithm
    return str(name).rsplit(".", 1)[-1] if name else "stage"


def _data_beside(data: Mapping[str, Any], recipe: Path) -> dict[str, Any]:
    """Data files and folders of a recipe are looked for beside it, then from where we stand."""
    found = dict(data)
    for key in ("path", "validation_path"):
        given = found.get(key)
        if isinstance(given, str) and given and (recipe.parent / given).exists():
            found[key] = str((recipe.parent / given).resolve())
    return found


def _beside(name: str, recipe: Path) -> str:
    """A path in a recipe is relative to the recipe; one that exists from where we stand is taken too."""
    given = Path(name).expanduser()
    for candidate in (given if given.is_absolute() else recipe.parent / given, given):
        if candidate.exists():
            return str(candidate.resolve())
    raise UserError(f"{recipe}: {name!r} is neither a stage of this recipe, nor a recipe file, nor a run folder")


def _teacher_beside(name: str, recipe: Path) -> str:
    """The same of a teacher, which may also be a model's name; what ends like a recipe file has to be one."""
    if name == "starter":
        return name
    try:
        return _beside(name, recipe)
    except UserError:
        if Path(name).suffix in (".yaml", ".yml", ".json"):
            raise
        return name


def read_mapping(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A YAML or JSON file as a mapping, with what it `extends` (paths relative to it) merged underneath."""
    if not path.is_file():
        raise UserError(f"{path}: no such recipe file" if not path.is_dir() else f"{path}: a folder, not a recipe file")
    if path.stat().st_size > MAX_BYTES:
        raise UserError(f"{path}: {path.stat().st_size} bytes; a recipe is at most {MAX_BYTES}")
    if path.resolve() in seen:
        raise UserError(f"{path}: extends itself through {' -> '.join(p.name for p in seen)}")
    try:
        value = YAML(typ="safe", pure=True).load(path.read_text("utf-8-sig"))
    except DuplicateKeyError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise UserError(f"{path}, line {line}: {str(error.problem).split(' with value')[0]}; remove one") from error
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"{path}{where}: not valid YAML: {problem}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    if value is None:
        raise UserError(f"{path}: the file is empty")
    if not isinstance(value, dict):
        raise UserError(f"{path}: the top level is a {type(value).__name__}; a recipe is a mapping of keys")
    _require_small(value, path)
    parents = value.pop("extends", None) or []
    base: dict[str, Any] = {}
    for parent in [parents] if isinstance(parents, str) else parents:
        base = merge(base, read_mapping((path.parent / parent), (*seen, path.resolve())))
    return merge(base, value)


def _require_small(value: object, path: Path) -> None:
    """Refuses anchors that unfold to more than a recipe can be, before anything copies them."""
    left, count = [value], 0
    while left:
        at = left.pop()
        count += 1
        if count > MAX_NODES:
            raise UserError(f"{path}: unfolds to more than {MAX_NODES} values; this is not a recipe")
        left += at.values() if isinstance(at, dict) else at if isinstance(at, list) else []


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Deep merge; what is `over` wins. An algorithm of another name replaces the one below it whole."""
    result = dict(base)
    for key, value in over.items():
        below = _named(key, result.get(key))
        if isinstance(value, Mapping) and isinstance(below, Mapping):
            other_method = key == "algorithm" and value.get("name", below.get("name")) != below.get("name")
            result[key] = dict(value) if other_method else merge(below, value)
        else:
            result[key] = value
    return result


def _named(key: str, value: Any) -> Any:
    """`model: starter` means `model: {name: starter}`, and so for the algorithm."""
    return {"name": value} if key in ("algorithm", "model") and isinstance(value, str) else value


def apply_overrides(raw: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """`a.b=value` on a mapping; the value is read as YAML, so numbers, lists and null work."""
    result = cast(dict[str, Any], _copied(raw))
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise UserError(f"{text!r}: an override is key=value, e.g. train.num_phases=10")
        try:
            parsed = YAML(typ="safe", pure=True).load(value) if value.strip() else None
        except YAMLError:
            parsed = value
        at: Any = result
        parts = key.strip().split(".")
        for i, part in enumerate(parts[:-1]):
            at = _descend(at, part, ".".join(parts[: i + 1]), text)
        if isinstance(at, list):
            raise UserError(f"{text!r}: {'.'.join(parts[:-1])} is a list; name one of its stages")
        below = at.get(parts[-1])
        by_name = parts[-1] == "model" and isinstance(below, dict) and isinstance(parsed, str)
        at[parts[-1]] = {**below, "name": parsed} if by_name else parsed
    return result


def _descend(at: Any, part: str, so_far: str, text: str) -> Any:
    if isinstance(at, list):
        for item in at:
            if isinstance(item, dict) and (item.get("name") or _stage_name(item)) == part:
                return item
        raise UserError(f"{text!r}: no stage {part!r}; there are {[i.get('name') or _stage_name(i) for i in at]}")
    below = _named(part, at.get(part))
    if below is None:
        below = {}
    if not isinstance(below, dict | list):
        raise UserError(f"{text!r}: {so_far} is {below!r}, which has no keys")
    at[part] = below
    return below


def _copied(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _copied(v) for k, v in value.items()}
    return [_copied(v) for v in value] if isinstance(value, list) else value


# ---- checking --------------------------------------------------------------------------------------------------------


def validate(model: type[M], raw: Mapping[str, Any], source: str) -> M:
    """Validates a mapping; every problem becomes one line with its key, and unknown keys get the nearest valid one."""
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        lines = [f"{source}: {line}" for line in dict.fromkeys(_explain(error, raw, model))]
        raise UserError("\n".join(lines)) from None


def _explain(error: ValidationError, raw: Mapping[str, Any], model: type[BaseModel]) -> Iterable[str]:
    for problem in error.errors(include_url=False):
        if problem["type"] == "too_short" and problem["loc"] == ("stages",) and raw.get("stages"):
            continue  # an echo: the stages are there, but none of them is valid
        where = _readable(problem["loc"], raw)
        if problem["type"] == "extra_forbidden":
            name, known = str(problem["loc"][-1]), _known_keys(problem["loc"], raw, model)
            elsewhere = [section for section, keys in _sections().items() if name in keys and model is Recipe]
            hint = registry.did_you_mean(name, known) or (
                f"it belongs into {' or '.join(elsewhere)}" if elsewhere else f"known are {', '.join(sorted(known))}"
            )
            yield f"{where}: unknown key; {hint}"
        elif problem["type"] == "missing":
            yield f"{where}: missing"
        else:
            message = problem["msg"].removeprefix("Value error, ")
            given = problem.get("input")
            if problem["type"] == "string_type" and isinstance(given, Mapping | list):
                kind = "mapping" if isinstance(given, Mapping) else "list"
                quoted = f"put it in quotes, on the command line in two kinds of them: '{where}=\"...\"'"
                message = f"needs text, but YAML reads a {kind} here; {quoted}"
            shown = f", not {given!r}" if isinstance(given, str | int | float | bool) and "not " not in message else ""
            yield f"{where}: {message[0].lower() + message[1:]}{shown}"


def _readable(loc: Sequence[int | str], raw: Mapping[str, Any]) -> str:
    """('stages', 0, 'train', 'x') -> 'train.x' for one stage, 'stages.sft.train.x' for several."""
    parts = list(loc)
    if len(parts) > 1 and parts[0] == "stages" and isinstance(parts[1], int):
        stages = raw.get("stages", [])
        parts = parts[2:] if len(stages) == 1 else ["stages", stages[parts[1]].get("name", parts[1]), *parts[2:]]
    return ".".join(str(p) for p in parts) or "recipe"


def _sections() -> dict[str, set[str]]:
    sections = {
        k: set(f.annotation.model_fields)
        for k, f in Stage.model_fields.items()
        if isinstance(f.annotation, type) and issubclass(f.annotation, BaseModel) and k != "algorithm"
    }
    for name in registry.names("algorithms"):
        sections.setdefault("algorithm", set()).update(algorithm_class(name).model_fields)
    return sections


def _known_keys(loc: Sequence[int | str], raw: Mapping[str, Any], top: type[BaseModel]) -> list[str]:
    """Valid keys at the place of an unknown one."""
    if "algorithm" in loc:
        at: Any = raw
        for part in loc[: list(loc).index("algorithm") + 1]:
            at = at[part]
        name = at["name"] if isinstance(at, Mapping) else at
        return list(algorithm_class(name).model_fields)
    model: type[BaseModel] | None = top
    for part in loc[:-1]:
        if part == "stages":
            model = Stage
        elif isinstance(part, str) and model is not None and part in model.model_fields:
            annotation = model.model_fields[part].annotation
            options = [annotation, *getattr(annotation, "__args__", ())]
            model = next((a for a in options if isinstance(a, type) and issubclass(a, BaseModel)), None)
    known = [*model.model_fields, *(("preset",) if model is Stage else ())] if model else []
    return known + [k for k in (*Stage.model_fields, "preset") if k != "name"] if model is Recipe else known


def dump_yaml(value: object) -> str:
    """YAML 1.2 text of plain values, keys in order; reads back to the same values."""
    yaml = YAML()
    yaml.default_flow_style = False
    yaml.width = 120
    stream = io.StringIO()
    yaml.dump(_finite(value), stream)
    return stream.getvalue()


def _finite(value: object) -> object:
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("a recipe holds finite numbers only")
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    return [_finite(v) for v in value] if isinstance(value, list | tuple) else value
