"""Forgetting: texts as rows, a run against its start; likelier answers; the harness's tasks on a model of ours."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from alignlab import starter
from alignlab.conversation import Template
from alignlab.errors import UserError
from alignlab.evaluation.forgetting import forgetting, own_rows, text_rows
from alignlab.evaluation.harness import check_harness, load_tasks, run_harness
from alignlab.evaluation.open_prompts import open_prompts, reference_paragraphs
from alignlab.evaluation.perplexity import perplexity, preferred, surprise, token_nats
from alignlab.models import ModelChoice, frozen_policy, load_tokenizer
from alignlab.types import Message, Prompt
from tests.runs import small_model

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_model(tmp_path_factory.mktemp("models") / "small")


@pytest.fixture(scope="module")
def template(folder: Path) -> Template:
    return Template.of(load_tokenizer(str(folder)), None)


def load(folder: Path, shift: float = 0.0) -> torch.nn.Module:
    model = frozen_policy(ModelChoice(name=str(folder), dtype="float64"), CPU)
    with torch.no_grad():
        model.model.norm.weight.add_(shift)  # type: ignore[union-attr, operator]
    return model


def test_the_texts_are_what_is_said_of_them() -> None:
    prompts = open_prompts()
    assert len(prompts) == 50 == len({p.id for p in prompts}) == len({p.messages[0].content for p in prompts})
    text = "\n".join(reference_paragraphs())
    assert 2000 < len(text.encode()) < 4000 and len(reference_paragraphs()) >= 8 and text.isascii()


def test_plain_text_follows_bos_and_has_no_stop_token(template: Template) -> None:
    rows = text_rows(template, ["Rivers bend.", "word " * 500], context=64)
    assert all(row.prompt_ids == template.encode_prompt(Prompt(messages=(), id="")) for row in rows)
    assert template.decode(rows[0].completion_ids) == "Rivers bend."
    assert rows[0].completion_ids[-1] not in template.stop_ids and len(rows[1]) == 64


def test_a_run_that_is_its_start_forgot_nothing_and_a_changed_one_is_measured(folder: Path, template: Template) -> None:
    paragraphs, prompts = reference_paragraphs()[:4], open_prompts()[:4]
    same = forgetting(load(folder), load(folder), template, paragraphs, prompts, context=200, max_tokens=8)  # type: ignore[arg-type]
    assert same["forgetting/text_nats"].value == 0.0 == same["forgetting/own_nats"].value
    other, start = load(folder, 2.0), load(folder)
    found = forgetting(other, start, template, paragraphs, prompts, context=200, max_tokens=8)  # type: ignore[arg-type]
    rise = math.log(found["forgetting/text_perplexity"].value / found["forgetting/text_perplexity_start"].value)
    assert found["forgetting/text_nats"].value == pytest.approx(rise) and abs(rise) > 1e-3
    own = math.log(found["forgetting/own_perplexity"].value / found["forgetting/own_perplexity_start"].value)
    assert found["forgetting/own_nats"].value == pytest.approx(own)
    assert found["forgetting/own_nats"].low < own < found["forgetting/own_nats"].high
    alone = forgetting(other, None, template, paragraphs, prompts, context=200, max_tokens=8)  # type: ignore[arg-type]
    assert set(alone) == {"forgetting/text_perplexity", "forgetting/text_bits_per_byte"}


def test_the_starts_own_answers_are_its_likeliest_tokens(folder: Path, template: Template) -> None:
    model = load(folder)
    (row,) = own_rows(model, template, open_prompts()[:1], 4)  # type: ignore[arg-type]
    logits = model(input_ids=torch.tensor([[*row.prompt_ids, *row.completion_ids]])).logits[0]
    assert row.completion_ids == tuple(logits[len(row.prompt_ids) - 1 : -1].argmax(-1).tolist())


# ---- perplexity and preference ---------------------------------------------------------------------------------------


def test_bits_per_byte_counts_bytes_and_perplexity_tokens(folder: Path, template: Template) -> None:
    prompt = Prompt(messages=(Message("user", "?"),), id="p")
    texts = ["ab", "é é é", "a longer text"]
    rows = [template.row(prompt, text) for text in texts]
    nats = token_nats(load(folder), rows, pad_id=template.pad_id)  # type: ignore[arg-type]
    found = surprise(nats, texts, ["p", "q", "r"])
    total = sum(map(sum, nats))
    assert found["policy/perplexity"].value == pytest.approx(perplexity(load(folder), rows, pad_id=template.pad_id))  # type: ignore[arg-type]
    assert found["policy/bits_per_byte"].value == pytest.approx(total / math.log(2) / (2 + 8 + 13))
    assert found["policy/perplexity"].low < found["policy/perplexity"].value < found["policy/perplexity"].high


def test_the_likelier_answer_by_text_and_by_token() -> None:
    """Chosen 3 tokens of 1 nat, rejected one of 2: as a text the rejected is likelier, token by token the chosen."""
    found = preferred([[1.0, 1.0, 1.0], [1.0]], [[2.0], [1.0]])
    assert found == {"preference/likelier_text": [0.0, 0.5], "preference/likelier_token": [1.0, 0.5]}


# ---- the harness -----------------------------------------------------------------------------------------------------


@pytest.fixture
def task(tmp_path: Path) -> Path:
    rows = [json.loads(line) for line in (starter.DATA / "reasoning" / "test.jsonl").read_text().splitlines()[:4]]
    data = tmp_path / "mine.jsonl"
    data.write_text("".join(json.dumps({"q": r["messages"][0]["content"], "a": r["answer"]}) + "\n" for r in rows))
    path = tmp_path / "mine.yaml"
    path.write_text(
        f"task: mine\ndataset_path: json\ndataset_kwargs: {{data_files: {data}}}\ntest_split: train\n"
        "output_type: generate_until\ndoc_to_text: '{{q}}'\ndoc_to_target: '{{a}}'\n"
        'generation_kwargs: {until: ["\\n"], max_gen_toks: 32}\n'
        "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n"
        "filter_list: [{name: number, filter: [{function: regex, regex_pattern: '(-?[0-9]+)', group_select: -1}, "
        "{function: take_first}]}]\n"
    )
    return path


@pytest.mark.slow
def test_a_local_task_of_the_harness_runs(task: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    check_harness()
    template = Template.of(load_tokenizer("starter"), None)
    policy = frozen_policy(ModelChoice(name="starter"), CPU)
    found = run_harness(
        policy, template, [str(task)], manager=load_tasks([str(task)]), limit=3, batch_size=4, chat=True
    )
    assert set(found["results"]["mine"]) == {"exact_match,number", "exact_match_stderr,number"}
    assert found["results"]["mine"]["exact_match,number"] in {0.0, 1 / 3, 2 / 3, 1.0}
    assert found["chat_template"] is True and found["examples"] == {"mine": 3}
    json.dumps(found)
    with pytest.raises(UserError, match=r"suite lm-eval: the data of gsm8k are neither on this machine nor is the hub"):
        run_harness(policy, template, ["gsm8k"], manager=load_tasks(["gsm8k"]), limit=1, batch_size=1)
    with pytest.raises(UserError, match=r"no task 'gsm8kk'; did you mean 'gsm8k'"):
        load_tasks(["gsm8kk"])
    with pytest.raises(UserError, match=r"nowhere\.yaml: no such file"):
        load_tasks(["nowhere.yaml"])


def test_a_missing_harness_is_said_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'alignlab\[lm-eval\]'"):
        check_harness()
