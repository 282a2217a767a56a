"""The loss of a stage: the method's formula -> its lines, every input with shape and meaning, every denominator."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence

import torch

from alignlab.algorithms import IDENTITY_TOLERANCE
from alignlab.explain.batch import Batch
from alignlab.explain.facts import Facts
from alignlab.explain.section import Section, lines, number, said

TOKENS, ROWS, PAIRS, STEP = "(B, T)", "(B,)", "(P,)", "one"
"""Shapes: B rows of T tokens in a microbatch, P pairs in it, one number for the whole optimiser step."""

GLOSSARY: Mapping[str, tuple[str, str]] = {
    "logprobs": (TOKENS, "log pi of each token under the policy that is trained, nats{at}"),
    "old_logprobs": (TOKENS, "the same under the policy that sampled, recorded while it sampled; a constant"),
    "reference_logprobs": (TOKENS, "the same under {reference}; a constant"),
    "reverse_kl": (TOKENS, "sum over the vocabulary of pi (log pi - log teacher) before each token{at}"),
    "entropy": (TOKENS, "entropy of the policy's distribution before each token, nats{at}"),
    "advantages": (TOKENS, "how much better than expected; a constant, made once a phase"),
    "values": (TOKENS, "the critic's value of the state before each token"),
    "old_values": (TOKENS, "the same while sampling; a constant"),
    "returns": (TOKENS, "what the critic is to predict: advantages before whitening + old values; a constant"),
    "mask": (TOKENS, "1 on completion tokens that are trained, 0 elsewhere"),
    "prompt_mask": (TOKENS, "1 on prompt tokens but the first, which nothing predicts"),
    "chosen": (PAIRS, "log pi of the chosen completion, summed over its tokens"),
    "rejected": (PAIRS, "log pi of the rejected completion, summed over its tokens"),
    "reference_chosen": (PAIRS, "the chosen completion's under {reference}; a constant"),
    "reference_rejected": (PAIRS, "the rejected completion's under {reference}; a constant"),
    "chosen_tokens": (PAIRS, "tokens of the chosen completion, 1 to {limit}, stop token included"),
    "rejected_tokens": (PAIRS, "tokens of the rejected completion, 1 to {limit}, stop token included"),
    "margin": (PAIRS, "by how much the data say that chosen is better; 0 where they do not"),
    "completion": (ROWS, "log pi of the completion, summed over its tokens"),
    "reference_completion": (ROWS, "the same under {reference}; a constant"),
    "labels": (ROWS, "true where the completion is desirable"),
    "reference_point": (ROWS, "max(0, mean log ratio of completions behind other prompts of the step); a constant"),
    "tokens": (ROWS, "completion tokens of the row, 1 to {limit}"),
    "kl_coef": (STEP, "weight of the KL; a controller moves it once a phase (see KL)"),
    "rows": (STEP, "rows of the step"),
    "pairs": (STEP, "pairs of the step"),
    "completion_tokens": (STEP, "completion tokens of all rows of the step, stop tokens included"),
    "prompt_tokens": (STEP, "prompt tokens of all rows of the step, the first of each left out"),
    "max_completion_tokens": (STEP, "{limit}, the completion limit, however long the completions are"),
}
REWARD_MODEL: Mapping[str, tuple[str, str]] = {
    "chosen": (PAIRS, "the raw score of the chosen completion, read at its last token"),
    "rejected": (PAIRS, "the raw score of the rejected completion, read at its last token"),
}
"""What these two are where a reward model is trained."""


def free_names(formula: Sequence[str]) -> list[str]:
    """The inputs of a formula in order of appearance: names that are read before they are assigned, no functions."""
    assigned: set[str] = set()
    found: dict[str, None] = {}
    for line in formula:
        (statement,) = ast.parse(line).body
        assert isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name)
        called = {node.func.id for node in ast.walk(statement) if isinstance(node, ast.Call)
                  and isinstance(node.func, ast.Name)}  # fmt: skip
        names = (n for n in ast.walk(statement.value) if isinstance(n, ast.Name))
        for name in sorted(names, key=lambda n: n.col_offset):
            if name.id not in assigned | called:
                found.setdefault(name.id)
        assigned.add(statement.targets[0].id)
    return list(found)


def inputs_of(facts: Facts) -> dict[str, tuple[str, str]]:
    """Every input of the formula with its shape and what it is."""
    trains_rewards = (role := facts.roles.get("reward_model")) is not None and role.trained
    known = {**GLOSSARY, **(REWARD_MODEL if trains_rewards else {})}
    words = _words(facts)
    undefined = ("?", "an input of this method's own")
    return {
        name: (shape, text.format_map(words))
        for name in free_names(facts.formula)
        for shape, text in (known.get(name, undefined),)
    }


def _words(facts: Facts) -> dict[str, str]:
    """What the glossary leaves open."""
    temperature = float(facts.get("temperature", 1.0))
    return {
        "at": f", at temperature {number(temperature)}" if facts.samples else "",
        "reference": "the teacher" if "teacher" in facts.roles else "the reference",
        "limit": number(facts.stage.data.max_completion_tokens),
    }


def loss_section(facts: Facts, batch: Batch | None) -> Section:
    """What the one number of an optimiser step is divided by, and what that means."""
    formula, limit = facts.formula, facts.stage.data.max_completion_tokens
    title = "Loss of an optimiser step, minimised"
    if not formula:
        return Section(title=title, lines=lines(("formula", "this method does not say: it has no formula()")))
    names = _denominator(formula[-1])
    per_row = any("row_mean" in line for line in formula)
    tokens = facts.stage.train.max_tokens_per_microbatch
    budget = f" and B x T <= {tokens:,}" if tokens else ""
    shape = (
        f"B <= {facts.stage.train.microbatch_rows} rows a microbatch{budget}, T <= "
        f"{facts.stage.data.max_prompt_tokens} prompt + {limit} completion tokens"
    )
    return Section(
        title=title,
        lines=lines(
            ("divided by", _divisor(names, batch, limit)) if batch and names else None,
            ("row_mean", f"divides each row by its own completion tokens, 1 to {number(limit)}") if per_row else None,
            ("shapes", shape),
        ),
        remarks=_remarks(facts, batch, formula),
    )


def _divisor(names: set[str], batch: Batch, limit: int) -> str:
    """What stands below the last fraction stroke, with its numbers."""
    rows, most = number(max(batch.rows)), "at most " if batch.at_most else ""
    if len(set(batch.rows)) > 1:
        rows = f"{number(min(batch.rows))} or {rows}"
    if "max_completion_tokens" in names:
        return f"rows x max_completion_tokens = {most}{rows} x {number(limit)}, however long the completions are"
    if "completion_tokens" in names:
        full = f"at most {rows} rows x {number(limit)} tokens = {number(max(batch.rows) * limit)}"
        weighted = ", and prompt_tokens by their weight" if "prompt_tokens" in names else ""
        return f"completion_tokens: counted over the whole step, {full}{weighted}"
    if "pairs" in names:
        return f"pairs = {most}{number(max(batch.steps))}"
    return f"rows = {most}{rows}"


def _denominator(line: str) -> set[str]:
    """Names below the last fraction stroke of an assignment."""
    (statement,) = ast.parse(line).body
    assert isinstance(statement, ast.Assign)
    value = statement.value
    if not (isinstance(value, ast.BinOp) and isinstance(value.op, ast.Div)):
        return set()
    return {node.id for node in ast.walk(value.right) if isinstance(node, ast.Name)}


def below_rounding(facts: Facts) -> str:
    """What there is to say of a clip range within which the numbers of the policy's type cannot tell ratios apart."""
    auto = facts.stage.model.dtype == "auto"
    dtype = "bfloat16" if auto else facts.stage.model.dtype
    rounding = IDENTITY_TOLERANCE[getattr(torch, dtype)] / 10
    ends = [facts.get("clip_high")] + ([facts.get("clip_low")] if facts.get("surrogate") != "cispo" else [])
    if min(ends) >= rounding:
        return ""
    where = f"{dtype}, which model.dtype auto is on CUDA" if auto else dtype
    return (
        f"A clip of {number(min(ends))} is below rounding, about {number(rounding)} nats a token in {where}: some "
        "ratios are clipped before any update, and their tokens have no gradient. Take model.dtype float32 or a wider "
        "clip."
    )


def _remarks(facts: Facts, batch: Batch | None, formula: Sequence[str]) -> tuple[str, ...]:
    final = formula[-1]
    clips = "ratio" in " ".join(formula) and facts.get("clip_high") is not None
    narrow = below_rounding(facts) if clips else ""
    single = batch is not None and batch.steps_per_phase == 1
    grouped = facts.get("baseline") == "group" and facts.get("surrogate") is not None
    return said(
        ("completion_tokens" in _denominator(final),
         "One mean over all tokens of the step: long completions have more say than short ones."),
        ("row_mean" in final,
         "A mean of row means: a token of a short completion counts for more than one of a long completion."),
        ("max_completion_tokens" in final,
         "A constant below: the loss shrinks with max_completion_tokens, so the learning rate depends on that limit."),
        (clips and single and not narrow,
         "One optimiser step a phase: at it the ratio is 1 everywhere, so nothing is ever clipped, and the gradient is "
         "that of advantages x log pi."),
        (grouped and clips,
         "A loss near 0 is normal: the advantages of a group cancel at ratio 1, their gradients do not."),
        (facts.get("surrogate") == "sequence",
         "The clip ranges of a sequence ratio are far smaller than a token's (3e-4 and 4e-4 in the paper)."),
        (narrow, narrow),
        (facts.get("rpo_alpha"), "rpo_alpha adds the chosen completion's mean negative log-likelihood a token."),
    )  # fmt: skip
