"""What a method prints as its loss, evaluated: lines of a formula and named arrays -> the number in `loss`.

The language is that of `Algorithm.formula`: assignments whose right-hand sides are names, numbers, + - * / **,
comparisons and calls of the functions below; anything else is an error. The same lines run over NumPy arrays and over
tensors, where the gradient can be compared as well.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from alignlab.models import unwrap
from alignlab.types import Batch, Step
from tests.algorithms.world import Run, raw_states

Functions = Mapping[str, Callable[..., Any]]
OPERATORS: dict[type[ast.AST], Callable[..., Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.Pow: operator.pow, ast.USub: operator.neg, ast.Gt: operator.gt, ast.Lt: operator.lt,
    ast.GtE: operator.ge, ast.LtE: operator.le,
}  # fmt: skip


# ---- the language ----------------------------------------------------------------------------------------------------


def evaluate(lines: Sequence[str] | Sequence[ast.Assign], inputs: Mapping[str, Any], functions: Functions) -> Any:
    """`loss` after the assignments.

    Raises:
        ValueError: a line is no such assignment, or a name that is read is neither an input nor assigned before.
    """
    names = dict(inputs)
    for line in parsed(lines):
        names[line.targets[0].id] = _value(line.value, names, functions)  # type: ignore[attr-defined]
    return names["loss"]


def parsed(lines: Sequence[str] | Sequence[ast.Assign]) -> list[ast.Assign]:
    found = []
    for line in lines:
        statements = [line] if isinstance(line, ast.AST) else ast.parse(line).body
        if len(statements) != 1 or not isinstance(one := statements[0], ast.Assign):
            raise ValueError(f"not an assignment: {line!r}")
        if len(one.targets) != 1 or not isinstance(one.targets[0], ast.Name):
            raise ValueError(f"not an assignment to a name: {line!r}")
        found.append(one)
    return found


def inputs_read(lines: Sequence[str]) -> set[str]:
    """The names that a formula takes as given: those read before they are assigned, functions left out."""
    given: set[str] = set()
    assigned: set[str] = set()
    for line in parsed(lines):
        called = {id(node.func) for node in ast.walk(line.value) if isinstance(node, ast.Call)}
        read = {n.id for n in ast.walk(line.value) if isinstance(n, ast.Name) and id(n) not in called}
        given |= read - assigned
        assigned.add(line.targets[0].id)  # type: ignore[attr-defined]
    return given


def _value(node: ast.AST, names: Mapping[str, Any], functions: Functions) -> Any:
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            return number
        case ast.Name(id=name) if name in names:
            return names[name]
        case ast.Name(id=name):
            raise ValueError(f"the formula reads {name!r}, which it has not been given; there are: {sorted(names)}")
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            return OPERATORS[type(op)](_value(left, names, functions), _value(right, names, functions))
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand, names, functions)
        case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in OPERATORS:
            return OPERATORS[type(op)](_value(left, names, functions), _value(right, names, functions))
        case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]) if name in functions:
            return functions[name](*(_value(argument, names, functions) for argument in arguments))
    raise ValueError(f"not in the language of formulas: {ast.unparse(node)}")


def numpy_functions(mask: np.ndarray | None = None) -> Functions:
    """The functions of `Algorithm.formula` over NumPy arrays; `row_mean` is over the mask (B, T)."""
    return {
        "abs": np.abs, "exp": np.exp, "log": np.log, "sqrt": np.sqrt, "clip": np.clip, "where": np.where,
        "sum": np.sum, "maximum": np.maximum, "minimum": np.minimum, "stop_gradient": lambda x: x,
        "sigmoid": lambda x: 1 / (1 + np.exp(-x)), "log_sigmoid": lambda x: -np.logaddexp(0, -x),
        "log1mexp": lambda x: np.log(-np.expm1(x)),
        "row_mean": lambda x: np.where(mask > 0, x, 0).sum(-1, keepdims=True) / mask.sum(-1, keepdims=True),
    }  # fmt: skip


def torch_functions(mask: Tensor | None = None) -> Functions:
    """The same over tensors, differentiable."""

    def of(x: Any) -> Tensor:
        return x if isinstance(x, Tensor) else torch.tensor(float(x), dtype=torch.float64)

    def row_mean(x: Tensor) -> Tensor:
        return torch.where(mask > 0, x, 0.0).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True)

    return {
        "abs": torch.abs, "exp": torch.exp, "log": torch.log, "sqrt": torch.sqrt, "sum": torch.sum,
        "clip": lambda x, low, high: torch.clamp(x, of(low), of(high)), "stop_gradient": torch.detach,
        "where": lambda test, x, y: torch.where(test, of(x), of(y)),
        "maximum": lambda x, y: torch.maximum(of(x), of(y)), "minimum": lambda x, y: torch.minimum(of(x), of(y)),
        "sigmoid": torch.sigmoid, "log_sigmoid": F.logsigmoid, "log1mexp": lambda x: torch.log(-torch.expm1(x)),
        "row_mean": row_mean,
    }  # fmt: skip


# ---- what a formula is about -----------------------------------------------------------------------------------------


def step_inputs(run: Run, step: Step) -> dict[str, Any]:
    """Everything a formula may read, for one optimiser step of a run: tensors, differentiable by the models' weights,
    from raw forward passes of single rows without padding, and the numbers that batches and state hold."""
    algorithm, models = run.algorithm, run.models
    temperature = 1.0 if algorithm.name == "rejection" else getattr(algorithm, "temperature", 1.0)
    rows: dict[str, list[Tensor]] = {}
    for batch, i, tokens, completion in _rows(step):
        found = {"mask": completion.double(), "prompt_mask": (~completion).double().index_fill(0, torch.tensor(0), 0)}
        if "policy" in models:
            logs = _logs(models["policy"], tokens, temperature)
            found |= {"logprobs": _taken(logs, tokens), "entropy": _shifted(-(logs.exp() * logs).sum(-1))}
        other = models.get("reference", models.get("teacher"))
        if other is not None:
            with torch.no_grad():
                other_logs = _logs(other, tokens, temperature)
            found["reference_logprobs"] = _taken(other_logs, tokens)
            found["reverse_kl"] = _shifted((logs.exp() * (logs - other_logs)).sum(-1))
        if "value_model" in models:
            head = models["value_model"].head
            (states,) = raw_states(models["value_model"], _single(tokens))
            found["values"] = _shifted((states @ head.weight[0] + head.bias[0])[:-1])
        for name in ("old_logprobs", "advantages", "old_values", "returns"):
            if getattr(batch, name) is not None:
                found[name] = getattr(batch, name)[i][batch.attention_mask[i]]
        for name, value in found.items():
            rows.setdefault(name, []).append(value)
    inputs: dict[str, Any] = {
        name: torch.nn.utils.rnn.pad_sequence(values, batch_first=True) for name, values in rows.items()
    }
    mask = inputs["mask"]
    return inputs | {
        "tokens": mask.sum(-1),
        "rows": float(len(mask)),
        "pairs": len(mask) / 2,
        "completion_tokens": mask.sum().item(),
        "prompt_tokens": inputs["prompt_mask"].sum().item(),
        "max_completion_tokens": float(run.source.sampling.max_completion_tokens),
        "kl_coef": run.state.algorithm.get("kl_coef"),
        **_of_pairs(run, step, inputs),
    }


def _of_pairs(run: Run, step: Step, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Completions as a whole, and those that were chosen and rejected: the halves of each microbatch."""
    sizes = [len(batch) for batch in step.microbatches]
    numbered = torch.arange(sum(sizes)).split(sizes)
    whole = {"completion_tokens_of_row": inputs["mask"].sum(-1)}
    for name in ("logprobs", "reference_logprobs"):
        if name in inputs:
            whole[name] = (inputs["mask"] * inputs[name]).sum(-1)
    if "reward_model" in run.models and run.algorithm.models()["reward_model"].trained:
        model = run.models["reward_model"]
        states = [raw_states(model, _single(tokens))[0][-1] for _, _, tokens, _ in _rows(step)]
        whole["logprobs"] = torch.stack(states) @ model.head.weight[0] + model.head.bias[0]
    names = {"logprobs": "", "reference_logprobs": "reference_", "completion_tokens_of_row": ""}
    found = {f"{names[name]}completion": value for name, value in whole.items() if name != "completion_tokens_of_row"}
    for field in ("labels", "reference_point"):
        if getattr(step.microbatches[0], field) is not None:
            found[field] = torch.cat([getattr(batch, field) for batch in step.microbatches])
    if all(size % 2 == 0 for size in sizes):
        for side, which in (("chosen", 0), ("rejected", 1)):
            index = torch.cat([part.chunk(2)[which] for part in numbered])
            for name, value in whole.items():
                suffix = "_tokens" if name == "completion_tokens_of_row" else ""
                found[f"{names[name]}{side}{suffix}"] = value[index]
        if step.microbatches[0].margin is not None:
            margins = [batch.margin.chunk(2)[0] for batch in step.microbatches if batch.margin is not None]
            found["margin"] = torch.cat(margins).double()
    return found


def arrays(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The same inputs for NumPy."""
    return {k: v.detach().numpy() if isinstance(v, Tensor) else v for k, v in inputs.items()}


def _rows(step: Step) -> Iterator[tuple[Batch, int, Tensor, Tensor]]:
    """(batch, row, its token ids, which of them are the completion's) of every row of a step, padding left out."""
    for batch in step.microbatches:
        for i, attended in enumerate(batch.attention_mask):
            yield batch, i, batch.input_ids[i][attended], batch.completion_mask[i][attended]


def _single(tokens: Tensor) -> Batch:
    ones = torch.ones_like(tokens, dtype=torch.bool)[None]
    return Batch(input_ids=tokens[None], attention_mask=ones, completion_mask=ones)


def _logs(model: Any, tokens: Tensor, temperature: float) -> Tensor:
    """(T - 1, V): log-softmax of what predicts each token but the first."""
    return (unwrap(model)(input_ids=tokens[None]).logits[0, :-1] / temperature).log_softmax(-1)  # type: ignore[operator]


def _taken(logs: Tensor, tokens: Tensor) -> Tensor:
    return _shifted(logs.gather(1, tokens[1:, None])[:, 0])


def _shifted(values: Tensor) -> Tensor:
    """Index t belongs to token t, and nothing predicts the first."""
    return torch.cat([values.new_zeros(1), values])


# ---- mutants ---------------------------------------------------------------------------------------------------------

HARMLESS = (20, 0)
"""Numbers that bound what is never reached, or stand for nothing."""


def mutants(lines: Sequence[str]) -> Iterator[tuple[str, list[ast.Assign]]]:
    """Every formula that differs from this one in a number, an operator, a sign or a function; and which it is."""
    count = sum(1 for line in parsed(lines) for _ in ast.walk(line.value))
    for place in range(count):
        changed = parsed(lines)
        nodes = [(line, node) for line in changed for node in ast.walk(line.value)]
        line, node = nodes[place]
        if _changed(node):
            yield ast.unparse(line), changed


def _changed(node: ast.AST) -> bool:
    """Changes a node in place, where there is something to change."""
    swaps: dict[type[ast.AST], type[Any]] = {
        ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Gt: ast.Lt, ast.Lt: ast.Gt,
    }  # fmt: skip
    functions = {"maximum": "minimum", "minimum": "maximum", "stop_gradient": "abs"}  # of what is positive: dropped
    match node:
        case ast.Constant(value=number) if number not in HARMLESS:
            node.value = number * 1.5
        case ast.BinOp(op=op) if type(op) in swaps:
            node.op = swaps[type(op)]()
        case ast.Compare(ops=[op]) if type(op) in swaps:
            node.ops = [swaps[type(op)]()]
        case ast.UnaryOp(op=ast.USub()) if not isinstance(node.operand, ast.Constant):
            node.operand = ast.UnaryOp(ast.USub(), node.operand)
        case ast.Call(func=ast.Name(id=name)) if name in functions:
            node.func = ast.Name(functions[name], ast.Load())
        case _:
            return False
    return True
