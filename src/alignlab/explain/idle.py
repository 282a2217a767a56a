"""What a recipe sets and nothing reads: stage -> key, and what makes it idle.

Only what differs from preset, variant and defaults counts: what a table brings along is nobody's mistake.
"""

from __future__ import annotations

from collections.abc import Iterator

from alignlab.algorithms._online import KLControl, ScoreShaping
from alignlab.data.prepared import is_folder
from alignlab.explain.batch import Batch
from alignlab.explain.differences import changed
from alignlab.explain.facts import Facts
from alignlab.explain.loss import below_rounding
from alignlab.pipeline.rewards import reward_entries
from alignlab.recipe import DataSection, EvaluationSection, Section


def idle(facts: Facts, batch: Batch | None) -> dict[str, str]:
    """Key as the recipe writes it -> why it does nothing here."""
    set_here = changed(facts.method)
    hyperparameters = {f"algorithm.{field}": why for field, why in _hyperparameters(facts, batch) if field in set_here}
    return hyperparameters | dict(_sections(facts))


# ---- the method's own ------------------------------------------------------------------------------------------------


def _hyperparameters(facts: Facts, batch: Batch | None) -> Iterator[tuple[str, str]]:
    method, get = facts.method, facts.get
    if isinstance(method, KLControl):
        yield from _of_kl(method)
    if isinstance(method, ScoreShaping):
        yield from _of_scores(method, facts)
    yield from _of_ratios(facts, batch)
    if get("reward_placement") is not None and (get("reward_placement"), get("dense_reward")) != ("dense", "potential"):
        yield "shaping_coef", "only dense_reward potential, placed dense, has a potential"
    if get("objective") == "full":
        yield "gamma", "objective full differentiates each token's own divergence; only sampled has credit to discount"
    if get("keep") is not None and get("keep") >= get("group_size"):
        yield "keep", "no group has more completions, so min_reward alone chooses"


def _of_kl(method: KLControl) -> Iterator[tuple[str, str]]:
    controller = method.kl_controller
    if method.kl_placement == "none":
        yield "kl_coef", "kl_placement is none"
    if not method.penalises:
        why = "kl_placement is none" if method.kl_placement == "none" else "kl_coef is 0"
        yield from ((field, why) for field in ("kl_estimator", "kl_threshold"))
        if method.kl_placement != "none":
            yield "kl_placement", why
    readers = {
        "kl_target_per_sequence": ("adaptive",),
        "kl_horizon": ("adaptive", "phased"),
        "kl_targets_per_token": ("phased", "lr_guard"),
        "kl_boundaries": ("phased", "lr_guard"),
        "lr_guard_factor": ("lr_guard",),
        "lr_guard_patience": ("lr_guard",),
    }
    for field, needed in readers.items():
        if controller not in needed:
            yield field, f"kl_controller is {controller}, not {' or '.join(needed)}"


def _of_scores(method: ScoreShaping, facts: Facts) -> Iterator[tuple[str, str]]:
    if method.score_normaliser == "none" and facts.get("baseline") != "ema":
        running = " or baseline ema" if facts.get("baseline") is not None else ""
        yield "ema_decay", f"only score_normaliser ema{running} keeps a running mean"
    ordered = facts.get("drop_constant") is not None or facts.get("loss_kind") is not None
    plain = not method.missing_stop_penalty and method.overlong_buffer is None and method.score_clip is None
    if ordered and plain and facts.get("min_reward") is None:
        why = "only the order of the scores counts, which neither scale nor normaliser changes"
        yield from ((field, why) for field in ("reward_scale", "score_normaliser"))


def _of_ratios(facts: Facts, batch: Batch | None) -> Iterator[tuple[str, str]]:
    """Clips, where there are any: of a kind without them, or that meet no ratio but 1."""
    clips = ("clip_low", "clip_high", "dual_clip", "value_clip", "stop_epochs_above_kl")
    if facts.get("objective") == "full":
        yield from ((field, "objective full has no ratio to clip") for field in clips)
    elif facts.get("clip_high") is not None and _single_step(batch) and not below_rounding(facts):
        why = "with one optimiser step a phase the policy is the one that sampled: every ratio is 1"
        yield from ((field, why) for field in clips)
    if facts.get("surrogate") == "cispo":
        yield "clip_low", "surrogate cispo bounds ratios from above only"


def _single_step(batch: Batch | None) -> bool:
    return batch is not None and batch.steps_per_phase == 1


# ---- other sections --------------------------------------------------------------------------------------------------


def _sections(facts: Facts) -> Iterator[tuple[str, str]]:
    stage = facts.stage
    data, schedule, evaluation = stage.data, stage.train.schedule, stage.evaluation
    no_file = data.path is None and data.hub is None
    if data.path is not None and "[" not in (data.split or "["):
        yield "data.split", "of a file only a slice of it counts, such as train[:200]"
    if data.path is not None and "[" not in (data.validation_split or "["):
        yield "data.validation_split", "of a file only a slice of it counts, such as train[200:]"
    elif data.validation_path or data.validation_split or no_file or is_folder(data.path):
        found = _set(data, DataSection(), ("validation_fraction",))
        yield from ((f"data.{key}", "validation has rows of its own") for key in found)
    if data.hub is None or data.path is not None:
        yield from ((f"data.{key}", "no hub set is read") for key in _set(data, DataSection(), ("hub_config",)))
    if schedule.shape == "constant" and schedule.floor:
        yield "train.schedule.floor", "shape constant never goes down"
    if evaluation.greedy:
        found = _set(evaluation, EvaluationSection(), ("temperature", "samples"))
        yield from ((f"evaluation.{key}", "greedy answers are always the same") for key in found)
    for key, measure in (("encoder", "bertscore"), ("word_limit", "verbosity")):
        if measure not in evaluation.measures and _set(evaluation, EvaluationSection(), (key,)):
            yield f"evaluation.{key}", f"only the measure {measure} reads it"
    if not evaluation.prompts_per_task and evaluation.every:
        yield "evaluation.every", "prompts_per_task is 0: there is no evaluation"
    asked = (facts.samples and (stage.algorithm.needs_reward or stage.reward)) or evaluation.best_of > 1
    if stage.reward and not asked:
        yield "reward", f"{facts.get('name', 'the method')} samples nothing that it could judge"
    scored = "reward_model" in facts.roles or (asked and "learned" in dict(reward_entries(stage)))
    if stage.reward_model and not scored:
        yield "reward_model", "no component `learned` of the reward, and nothing else, scores with it"


def _set(section: Section, default: Section, keys: tuple[str, ...]) -> list[str]:
    return [key for key in keys if getattr(section, key) != getattr(default, key)]
