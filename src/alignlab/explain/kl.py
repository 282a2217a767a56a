"""Where the KL sits in a stage: placement, estimator, coefficient and controller -> lines and what they mean."""

from __future__ import annotations

from alignlab.algorithms._online import KLControl
from alignlab.explain.batch import Batch
from alignlab.explain.facts import Facts
from alignlab.explain.section import Line, Section, lines, listed, number, said

ESTIMATORS = {
    "k1": "k1 = d: unbiased, may be negative for a sample",
    "k2": "k2 = d^2 / 2: biased, never negative",
    "k3": "k3 = exp(-d) - 1 + d: unbiased, never negative",
}
"""With d = log pi - log reference of the sampled token."""
LARGEST_ERROR = 0.2
"""How far from 1 a controller lets KL / target be (arXiv:1909.08593)."""


def kl_section(facts: Facts, batch: Batch | None, phases: int | None) -> Section:
    """Where the KL to the reference acts, or that it does not."""
    title = "KL to the reference"
    method = facts.method
    if isinstance(method, KLControl):
        return Section(
            title=title, lines=_controlled(method, batch, phases), remarks=_remarks(method, facts, batch, phases)
        )
    if "teacher" in facts.roles:
        return Section(title="KL to the teacher", lines=_distilled(facts))
    if "policy" not in facts.roles:
        return Section(title=title, lines=lines(("where", "nowhere: this stage trains no policy")))
    beta = facts.get("beta")
    if "reference" in facts.roles and beta is not None:
        text = (
            f"nowhere as a term: beta = {number(beta)} weighs log pi - log reference, and so holds the policy: "
            "the larger, the closer it stays"
        )
        meant = "The optimum is that of reward - beta KL(policy || reference), for the reward that explains the pairs."
        exact = facts.get("loss_kind") == "sigmoid" and not facts.get("average_logprobs")
        return Section(title=title, lines=lines(("where", text)), remarks=said((exact, meant)))
    return Section(
        title=title,
        lines=lines(("where", "nowhere: the method has no reference; only learning rate and length of training hold")),
    )


def _controlled(method: KLControl, batch: Batch | None, phases: int | None) -> tuple[Line, ...]:
    if not method.measures_kl:
        why = "kl_coef is 0" if method.kl_placement != "none" else "kl_placement is none"
        return lines(("where", f"nowhere: {why}, so no reference is loaded and no KL is measured"))
    if not method.penalises:
        where = "nowhere in reward or loss; measured for the learning-rate guard only"
        return lines(("where", where), ("controller", _controller(method, batch, phases)))
    of_tokens = method.kl_placement == "loss" or "gae_lambda" in type(method).model_fields
    where = {
        "reward": f"in the reward: kl_coef x {method.kl_estimator} comes off "
        + ("each token's reward" if of_tokens else "the completion's score, summed over its tokens")
        + ", detached (d of the sampling policy)",
        "loss": f"in the loss: kl_coef x {method.kl_estimator} of each token is added to its term, and differentiated",
    }[method.kl_placement]
    threshold = method.kl_threshold
    free = f"{number(threshold)} nats a token: a completion pays only if its mean is above, for what is above"
    return lines(
        ("where", where),
        ("estimator", f"{ESTIMATORS[method.kl_estimator]}; d = log pi - log reference of the sampled token, nats"),
        ("threshold", free) if threshold is not None else None,
        ("coefficient", f"kl_coef = {number(method.kl_coef)}"
                        + (", to begin with" if method.kl_controller in ("adaptive", "phased") else "")),
        ("controller", _controller(method, batch, phases)),
    )  # fmt: skip


def _controller(method: KLControl, batch: Batch | None, phases: int | None) -> str:
    targets = listed(number(target) for target in method.kl_targets_per_token)
    when = f", the next from phase {listed(map(str, method.kl_boundaries))} on" if method.kl_boundaries else ""
    moves = (
        "kl_coef x (1 + clip(KL / target - 1, -0.2, 0.2) x "
        f"{number(min(float(batch.completions), method.kl_horizon)) if batch else 'n'} / {number(method.kl_horizon)}) "
        "once a phase"
    )
    match method.kl_controller:
        case "adaptive":
            return f"adaptive: {moves}, target {number(method.kl_target_per_sequence)} nats a completion (k1)"
        case "phased":
            return f"phased: {moves}, target {targets} nats a token (k1){when}"
        case "lr_guard":
            return (
                f"lr_guard: over {targets} nats a token (k1){when}, the policy's learning rate x "
                f"{number(method.lr_guard_factor)} unless the KL has fallen since the last time, at most "
                f"{method.lr_guard_patience} times in a row; then the run stops"
            )
    return "fixed: it stays as it is"


def _distilled(facts: Facts) -> tuple[Line, ...]:
    if facts.get("objective") == "full":
        where = "the loss is the reverse KL to the teacher at every token, over the whole vocabulary, differentiated"
    else:
        where = (
            "the advantages are minus the reverse KL to the teacher, k1 on the sampled token, detached; "
            f"discount of later tokens' {number(float(facts.get('gamma', 0.0)))}"
        )
    return lines(("where", where), ("reference", "none: the teacher is what the policy is drawn to"))


def _remarks(method: KLControl, facts: Facts, batch: Batch | None, phases: int | None) -> tuple[str, ...]:
    in_loss = method.penalises and method.kl_placement == "loss"
    in_reward = method.penalises and method.kl_placement == "reward"
    moved = method.penalises and method.kl_controller in ("adaptive", "phased")
    fastest = LARGEST_ERROR * batch.completions / method.kl_horizon if batch else 0.0
    over_run = f", a factor of {(1 + fastest) ** (phases - 1):.3g} over the run" if phases else ""
    beyond = [b for b in method.kl_boundaries if phases is not None and b >= phases]
    single = batch is not None and batch.steps_per_phase == 1
    return said(
        (in_loss and method.kl_estimator == "k1",
         "k1 in the loss has a gradient of mean zero on policy: this term adds noise and holds nothing. Take k2, or "
         "kl_placement: reward."),
        (in_loss and method.kl_estimator == "k2",
         "On policy k2 in the loss has the gradient of the true reverse KL (arXiv:2510.01555)."),
        (in_loss and method.kl_estimator == "k3",
         "k3 in the loss has the gradient of the reverse KL only nearly, while policy and reference are close "
         "(arXiv:2510.01555); k2 has it exactly, on policy."),
        (in_loss and not single,
         "After a phase's first step the samples are no longer the policy's own; the KL term is not corrected for it."),
        (in_reward and method.kl_estimator != "k1",
         f"In the reward only k1 gives the gradient of the reverse KL; {method.kl_estimator} is another penalty."),
        (in_reward and method.kl_estimator == "k1",
         "k1 in the reward, detached, is the reverse KL in expectation: the objective of RLHF as it is written."),
        (in_reward and facts.get("baseline") == "group",
         "The group's mean takes off what is common: siblings are told apart by the differences of their KL."),
        (moved and fastest < 0.05,
         f"The controller is slow here: at most {100 * fastest:.2g} % a phase{over_run}. Lower kl_horizon for more."),
        (beyond, f"The run has {phases} phases: the target of boundary {listed(map(str, beyond))} is never reached."),
        (in_reward and facts.get("scale") == "group",
         "Where siblings earn the same, the group's deviation is that of their KL alone, and noise becomes advantages "
         "of full size: scale none or batch goes better with a KL in the reward."),
        (method.kl_controller == "lr_guard", "The run may stop early: that is what the guard is for."),
        (method.kl_controller == "lr_guard" and not method.penalises and len(method.kl_targets_per_token) > 1,
         "Nothing pulls the policy back: a KL that is above a later target when that begins ends the run there."),
    )  # fmt: skip
