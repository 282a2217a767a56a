"""How the inputs of a loss come to be: models, rewards, scores, advantages, masks -> sections of lines."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import signature

from alignlab import registry
from alignlab.algorithms._online import NORMALISER_EPS, KLControl, ScoreShaping
from alignlab.explain.batch import Batch
from alignlab.explain.facts import Facts, in_words
from alignlab.explain.section import Line, Section, lines, listed, number, said
from alignlab.functional.advantages import group_advantages
from alignlab.functional.masked import _VARIANCE_EPSILON as WHITEN_EPS
from alignlab.pipeline.rewards import reward_entries
from alignlab.recipe import RewardEntry, Stage

GROUP_EPS: float = signature(group_advantages).parameters["eps"].default
"""Added to a standard deviation by the advantages of groups."""


# ---- models ----------------------------------------------------------------------------------------------------------


def models_section(facts: Facts, earlier: Mapping[str, Stage]) -> Section:
    """Who plays which part, and which of them are copies of the same weights."""
    stage, roles = facts.stage, facts.roles
    critic = roles.get("value_model")
    known = {
        "policy": f"starts as {facts.start}; {_trained(facts)}" if "policy" in roles else None,
        "reward_model": _reward_model(facts, earlier),
        "reference": _reference(facts) if "reference" in roles else None,
        "value_model": _critic(facts, critic.backbone) if critic else None,
        "teacher": f"{in_words(stage.teacher, earlier)}, frozen; same tokenizer" if "teacher" in roles else None,
    }
    dropout = "on in training, as the model has it" if stage.method.dropout else "off, so that logprobs can be compared"
    dtype = "auto (bfloat16 where an accelerator has it, else float32)"
    settings = [f"dtype {dtype if stage.model.dtype == 'auto' else stage.model.dtype}"]
    settings += ["a loss scale that follows overflows"] if stage.model.dtype == "float16" else []
    settings += ["activations computed anew in the backward pass"] if stage.train.gradient_checkpointing else []
    settings += ["AdamW's state and steps in the CPU's memory"] if stage.train.offload_optimizer else []
    return Section(
        title="Models",
        lines=lines(
            *((name.replace("_", " "), text) for name, text in known.items() if text),
            ("dropout", dropout),
            ("precision", "; ".join(settings)),
        ),
    )


def _trained(facts: Facts) -> str:
    adapter, quantised = facts.stage.model.adapter, facts.stage.model.quantization
    frozen = f"{quantised} weights, frozen" if quantised else "its weights frozen"
    if adapter is None:
        merged = ", its adapter merged into them" if facts.start_has_adapter else ""
        return f"every weight is trained{merged}"
    origin = "the LoRA adapter that it comes with" if facts.start_has_adapter else "a fresh LoRA adapter"
    where = listed(adapter.target_modules)
    return f"{frozen}; trained is {origin} (r {adapter.rank}, alpha {number(adapter.alpha)}, on {where})"


def _reward_model(facts: Facts, earlier: Mapping[str, Stage]) -> str | None:
    role = facts.roles.get("reward_model")
    if role is not None and role.trained:
        return (
            f"grown from {facts.start} with a scalar head drawn from N(0, 1/(H + 1)); {_trained(facts)}. After "
            "training its scores are shifted and scaled to mean 0, standard deviation 1 on the start policy's answers"
        )
    if facts.stage.reward_model is None and role is None:
        return None
    components = [name for name, _ in _components(facts)]
    uses = said(
        ("learned" in components, "scores the component `learned`"),
        (facts.get("dense_reward") == "potential" and facts.get("reward_placement") == "dense", "is the potential"),
        (facts.get("critic") == "reward_model", "lends the critic its trunk"),
    )
    return f"{in_words(facts.stage.reward_model, earlier)}, frozen; {listed(uses) or 'unused by this stage'}"


def _reference(facts: Facts) -> str:
    if not facts.policy_is_adapted:
        text = "a frozen copy of the start policy"
    elif facts.start_has_adapter:
        text = "the start policy with the adapter it came with, frozen; the weights below are the policy's"
    else:
        text = "the policy's own weights with its adapter switched off: no second copy"
    if facts.reference_is_cached:
        text += ". Its logprobs are computed once before training and kept under a hash of weights and rows"
    return text


def _critic(facts: Facts, backbone: str) -> str:
    return {
        "own": "a scalar head, at 0, on a copy of the start policy's trunk; no trained weight is shared",
        "shared": "a scalar head, at 0, on the policy's own trunk: value gradients reach the policy",
        "reward_model": "a LoRA adapter and a scalar head on the frozen reward model's trunk",
    }[backbone] + "; it reads the state before each action"


# ---- rewards and scores ----------------------------------------------------------------------------------------------


def _components(facts: Facts) -> list[tuple[str, RewardEntry]]:
    used = facts.samples and (facts.method.needs_reward or facts.stage.reward)
    return reward_entries(facts.stage) if used else []


def reward_section(facts: Facts) -> Section | None:
    """The components of the reward, and what becomes of their sum before a method learns from it."""
    if not facts.samples:
        return None
    found = []
    for name, entry in _components(facts):
        about = (registry.resolve("rewards", name).__doc__ or "").strip().splitlines()
        tasks = f" on {listed(entry.tasks)}" if entry.tasks else " on every task"
        options = "".join(f", {key} {number(value)}" for key, value in entry.options.items())
        text = f"x {number(entry.weight)}{tasks}{options}" + (f": {about[0].rstrip('.')}" if about else "")
        found.append(Line(name, text))
    if not facts.method.needs_reward:
        found.append(Line("use", "none: the method learns without a reward; what stands here is only logged"))
        return Section(title="Reward of a completion", lines=tuple(found))
    default = (not facts.stage.reward, "The recipe names no reward: these are the defaults of its tasks.")
    data = facts.stage.data.task
    absent = [name for name, entry in _components(facts) if data and entry.tasks and not {*data} & {*entry.tasks}]
    silent = f"{listed(absent)}: none of the tasks is in data.task, so nothing is judged by it."
    shaping = facts.method if isinstance(facts.method, ScoreShaping) else None
    total = "the weighted sum of the components that apply"
    return Section(
        title="Reward of a completion",
        lines=(*found, Line("reward", total), *(score_lines(shaping, facts) if shaping else ())),
        remarks=said(default, (absent, silent), *(_score_remarks(shaping, facts) if shaping else ())),
    )


def score_lines(shaping: ScoreShaping, facts: Facts) -> tuple[Line, ...]:
    """What happens to a reward, in this order."""
    limit, buffer = facts.stage.data.max_completion_tokens, shaping.overlong_buffer
    steps = [
        (shaping.score_normaliser == "ema",
         f"(reward - running mean) / (running standard deviation + {number(NORMALISER_EPS)}), both over this and "
         f"earlier phases, of which a phase keeps {number(shaping.ema_decay)}, corrected for their start"),
        (shaping.reward_scale != 1, f"x {number(shaping.reward_scale)}"),
        (shaping.missing_stop_penalty, f"- {number(shaping.missing_stop_penalty)} where cut off at {limit} tokens"),
        (buffer is not None,
         f"- (tokens - {limit - (buffer or 0)}) / {buffer}, between 0 and 1: the soft overlong penalty"),
        (shaping.score_clip is not None, f"clipped to +- {number(shaping.score_clip)}"),
    ]  # fmt: skip
    active = [text for holds, text in steps if holds]
    if facts.get("normalise_components"):
        active = [text for holds, text in steps[2:4] if holds]
    numbered = "; ".join(f"{i}. {text}" for i, text in enumerate(active, 1))
    return lines(("score", numbered or "the reward as it is: no normaliser, scale, penalty or clip"))


def _score_remarks(shaping: ScoreShaping, facts: Facts) -> tuple[tuple[object, str], ...]:
    grouped = facts.get("baseline") in ("group", "leave_one_out")
    scaled = grouped and facts.get("scale") in ("group", "batch")
    normalised = shaping.score_normaliser == "ema"
    return (
        (normalised and scaled, "Under a group's mean and a standard deviation the running normaliser cancels out."),
        (normalised and grouped and not scaled,
         "Under a group's mean the running mean cancels out; the running scale stays."),
        (shaping.reward_scale != 1 and scaled, "reward_scale cancels out under a standard deviation, but for its eps."),
        (facts.get("normalise_components") and shaping.score_clip is not None,
         "normalise_components uses neither reward_scale nor score_clip."),
    )  # fmt: skip


# ---- advantages ------------------------------------------------------------------------------------------------------


def credit_section(facts: Facts) -> Section | None:
    """From scores to the advantages (and returns) of a phase, or to what is kept of it."""
    if facts.get("gae_lambda") is not None:
        return _gae(facts)
    if facts.get("baseline") is not None:
        return _group(facts)
    if facts.get("drop_constant") is not None:
        return _kept(facts)
    if facts.get("loss_kind") is not None and facts.samples:
        return _ranked(facts)
    if "teacher" in facts.roles and facts.get("objective") == "sampled":
        gamma = float(facts.get("gamma", 0.0))
        credit = f"plus {number(gamma)} x that of the next token" if gamma else "each token has its own only"
        line = ("advantage", f"log teacher - log pi_old of the sampled token, {credit}; no baseline, no whitening")
        return Section(title="Advantage of a token", lines=lines(line))
    return None


def _gae(facts: Facts) -> Section:
    get = facts.get
    gamma, lam = number(float(get("gamma"))), number(float(get("gae_lambda")))
    dense, spread = get("reward_placement") == "dense", get("dense_reward")
    placed = "all of it on the last token of the completion, the stop token if there is one"
    if dense:
        placed = {
            "share": "in equal shares, score / tokens on each token",
            "potential": f"all of it on the last token, plus {number(float(get('shaping_coef')))} x ({gamma} Phi(next "
            "state) - Phi(state)) on each, Phi the reward model's score of the prefix, 0 at the end",
            "given": "the token scores of the reward functions that give some; what is left of the score on the last",
        }[str(spread)]
    cutoff = {
        "zero": "0, as if it had ended there",
        "bootstrap": "the critic's value of where it was cut",
    }[str(get("at_cutoff"))]
    method = facts.method
    penalised = isinstance(method, KLControl) and method.penalises and method.kl_placement == "reward"
    whiten = f"/ sqrt(variance + {number(WHITEN_EPS)}) over all completion tokens of the phase"
    return Section(
        title="Advantages and returns of a token",
        lines=lines(
            ("score placed", placed),
            ("minus the KL", "kl_coef x KL of each token (see KL)") if penalised else None,
            ("whitened", f"token rewards {whiten}; their mean stays") if get("whiten_rewards") else None,
            ("error", f"delta_t = reward_t + {gamma} x V_(t+1) - V_t, V from the critic before the phase's steps"),
            ("advantage", f"A_t = delta_t + {gamma} x {lam} A_(t+1), backwards from the last token"),
            ("after a stop", "V = 0"),
            ("after a cut-off", f"V = {cutoff}"),
            ("return", "R_t = A_t + V_t, before any whitening of A"),
            ("then", f"(A - mean) {whiten}" if get("whiten_advantages") else "advantages are used as they are"),
            ("unjudged", "a completion that no component judges is left out"),
        ),
        remarks=said(
            (dense and spread == "share",
             "Equal shares keep the optimum at gamma 1, but return-to-go leaves only (T - t) / T of the score to token "
             "t of T, counted from 0: late tokens get too little credit."),
            (dense and spread == "share" and get("gamma") != 1,
             f"At gamma {gamma} shares are discounted, too: the same score counts less in a longer completion."),
            (not dense and get("gamma") != 1,
             f"At gamma {gamma} a score on the last of n tokens counts {gamma}^(n - 1) at the first: short ones gain."),
            (get("at_cutoff") == "zero", "A cut-off counts as an end, as in all peers; `bootstrap` goes on there."),
        ),
    )  # fmt: skip


def _group(facts: Facts) -> Section:
    get, group = facts.get, facts.get("group_size")
    decay = number(float(get("ema_decay")))
    below = {
        "group": f"the mean of its group of {group}",
        "leave_one_out": f"the mean of its {group - 1} siblings (RLOO)",
        "ema": f"the running mean of earlier phases' scores (a phase keeps {decay}); its own in the first phase",
    }[str(get("baseline"))]
    scale = {
        "group": f"/ (its group's standard deviation (n - 1) + {number(GROUP_EPS)})",
        "batch": f"/ (standard deviation (n - 1) of all scores of the phase + {number(GROUP_EPS)})",
        "none": "divided by nothing",
    }[str(get("scale"))]
    formula = f"(score - {below}) {scale}; the same for every token of the completion"
    if get("normalise_components"):
        formula = (
            f"each component: (value - group mean) / (group's standard deviation + {number(GROUP_EPS)}); then their "
            f"weighted sum, then (sum - mean) / (standard deviation + {number(GROUP_EPS)}) over the phase (GDPO)"
        )
    constant = "an advantage of exactly 0 (told by comparison, not by rounding): it teaches nothing"
    if get("baseline") == "ema":
        constant = "no special case: it has the distance of its score from the running mean"
    redraws = get("max_redraws")
    return Section(
        title="Advantage of a completion",
        lines=lines(
            ("advantage", formula),
            ("equal rewards", f"a group whose rewards are all the same has {constant}"),
            ("redraws", f"such groups are replaced by groups of other prompts, in at most {redraws} rounds")
            if redraws else None,
            ("unjudged", "a completion that no component judges is left out of mean and deviation; its advantage is 0"),
        ),
        remarks=said(
            (get("scale") == "group" and not get("normalise_components"),
             "Dividing by the group's deviation makes easy and hard prompts, whose rewards vary little, weigh more."),
            (get("baseline") == "leave_one_out" and get("scale") == "none",
             f"Siblings' mean instead of the group's is {group}/{group - 1} times the same advantage."),
            (redraws, "What is drawn is what the policy does not yet always or never do: the share of prompts moves."),
        ),
    )  # fmt: skip


def _kept(facts: Facts) -> Section:
    group, keep, least = facts.get("group_size"), facts.get("keep"), facts.get("min_reward")
    good = f" that score {number(least)} or more" if least is not None else ""
    kept = f"the best {keep} of {group}{good}" if keep is not None else f"all{good}"
    dull = "dropped" if facts.get("drop_constant") else "treated like any other"
    return Section(
        title="What is kept of a group",
        lines=lines(
            ("kept", f"{kept}; siblings of equal score in sampling order"),
            ("equal scores", f"a group that all scored the same is {dull}"),
            ("weight", "every kept token weighs the same: only the order of the scores counts"),
        ),
        remarks=said(
            (facts.get("temperature", 1.0) != 1,
             "The loss is at temperature 1 while sampling is not, as in the papers: that alone "
             f"{'sharpens' if facts.get('temperature', 1.0) < 1 else 'flattens'} the policy."),
        ),
    )  # fmt: skip


def _ranked(facts: Facts) -> Section:
    group = facts.get("group_size")
    return Section(
        title="Pairs",
        lines=lines(
            ("pair", f"the best and the worst of {group} by score; of equals the first sampled"),
            ("equal scores", "a group without two different scores makes no pair"),
        ),
    )


# ---- masks -----------------------------------------------------------------------------------------------------------


def mask_section(facts: Facts, batch: Batch | None) -> Section:
    """Which tokens are trained, at what temperature."""
    data, get = facts.stage.data, facts.get
    weight, limit = get("prompt_weight"), data.max_completion_tokens
    prompt = f"trained with weight {number(weight)}, but for the first token" if weight else "masked"
    if facts.samples:
        cut = f"sampling ends at a stop token or at {limit} tokens; a cut-off has no stop token"
        cut += ", and is left out of loss and denominator" if get("mask_truncated") else ", and its tokens are trained"
    else:
        cut = f"a completion of more than {limit} tokens is cut, keeping its stop token"
    scored = (role := facts.roles.get("reward_model")) is not None and role.trained
    own = "the end-of-turn or end-of-text token ends a completion, is one of its tokens, and is trained"
    if scored:
        own = "the score is read at the last token by the attention mask, never by the pad id"
    temperature = get("temperature")
    shown = None
    if temperature is not None:
        told = number(float(temperature))
        as_sampled = get("drop_constant") is None  # rejection sampling alone learns at temperature 1
        in_loss = f"every logit of the loss is divided by {told}, too" if as_sampled else "1 in the loss"
        shown = f"{told} for sampling; {in_loss}"
    return Section(
        title="Masks and temperature",
        lines=lines(
            ("prompt", f"{prompt}; rows with more than {data.max_prompt_tokens} prompt tokens are left out"),
            ("padding", "masked, and never attended; rows are padded on the right, prompts on the left to sample"
             if facts.samples else "masked, and never attended"),
            ("stop token", own),
            ("cut-offs" if facts.samples else "long ones", cut),
            ("temperature", shown) if shown else None,
        ),
        remarks=said(
            (get("mask_truncated"), "Masked completions still count in their group's baseline."),
            (get("mask_truncated") and get("missing_stop_penalty"),
             "What is masked is penalised too: the penalty only moves the group's baseline."),
            (limit < 8 and facts.samples, "So few tokens that most completions may be cut off."),
        ),
    )  # fmt: skip
