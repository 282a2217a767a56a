"""`alignlab judge compare`: runs and files, every kind of judge, what is written, what goes wrong."""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from alignlab import starter
from alignlab.errors import UserError
from alignlab.judge import client as client_module
from alignlab.judge.cache import Reply
from alignlab.judge.local import LocalClient, RewardModelScorer
from alignlab.tracking import write_json
from alignlab.types import Message, Prompt
from tests.judge.server import Act, error, serving
from tests.judge.test_prompts import fences
from tests.runs import ROOT, alignlab, debug_run, rows, start_alignlab, strict_json, write_rows


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(client_module, "FIRST_WAIT", 0.005)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test-123")
    yield


def longer(number: int, body: dict[str, Any]) -> Act:
    shown = {name: text for name, _, text in fences(body["messages"][1]["content"])}
    a, b = len(shown["answer A"]), len(shown["answer B"])
    return Act(f"Reason.\nVerdict: {'A' if a > b else 'B' if b > a else 'tie'}")


def answers(path: Path, texts: list[str], **more: Any) -> Path:
    return write_rows(
        path,
        [
            {"prompt_id": f"p{i}", "prompt": f"question {i}", "completion": text, "category": "xy"[i % 2], **more}
            for i, text in enumerate(texts)
        ],
    )


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    one = answers(tmp_path / "one.jsonl", ["long answer"] * 6 + ["x"] * 2, model="google/gemma-3-1b-it")
    return one, answers(tmp_path / "two.jsonl", ["short"] * 8)


def test_an_endpoint_judges_and_a_second_run_calls_nothing(pair: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    with serving(longer) as fake:
        command = ["judge", "compare", *pair, "--base-url", fake.url, "--cache", tmp_path / "cache", "--output", out]
        done = alignlab(*command)
        assert done.code == 0, done.err
        assert fake.calls == 16
        first = (out / "judge.json").read_bytes(), (out / "verdicts.jsonl").read_bytes()
        again = alignlab(*command, "--max-calls", "0")
        assert again.code == 0, again.err
        assert "16 of 16 replies were in the cache; called: 0 calls" in again.err
        assert fake.calls == 16
    assert ((out / "judge.json").read_bytes(), (out / "verdicts.jsonl").read_bytes()) == first
    found = strict_json((out / "judge.json").read_text("utf-8"))
    assert (found["a"], found["b"], found["judge"], found["kind"]) == ("one", "two", "gpt-4o-mini", "judge")
    assert (found["wins"], found["losses"], found["win_rate"]) == (6, 2, 0.75)
    assert set(found["categories"]) == {"x", "y"}
    verdicts = rows(out / "verdicts.jsonl")
    assert len(verdicts) == 8 and verdicts[0]["system_a"] == "one" and verdicts[0]["replies"][0].startswith("Reason.")
    assert "75.0 %" in done.out and "one against two, before the judge gpt-4o-mini" in done.out
    assert "sk-test-123" not in done.out + done.err + "".join(
        p.read_text("utf-8") for p in tmp_path.rglob("*") if p.is_file()
    )


def test_few_decided_games_go_by_the_exact_test(tmp_path: Path) -> None:
    one = answers(tmp_path / "one.jsonl", ["longer"] * 4 + [f"one {i}" for i in range(8)])
    two = answers(tmp_path / "two.jsonl", ["short"] * 4 + [f"two {i}" for i in range(8)])
    with serving(longer) as fake:
        done = alignlab("judge", "compare", one, two, "--base-url", fake.url, "--output", tmp_path / "o")
    assert done.code == 0, done.err
    found = strict_json((tmp_path / "o" / "judge.json").read_text("utf-8"))
    assert (found["wins"], found["ties"], found["losses"], found["p"]) == (4, 8, 0, 0.125)
    assert any("only 4 of 12 games were decided" in w and "p 0.125" in w for w in found["warnings"])
    all_games = next(line for line in done.out.splitlines() if "│ all" in line)
    assert all_games.rstrip(" │").endswith("0.125")
    assert "only 4 of 12 games were decided" in done.out and "p: exact sign test" in done.out


def test_relatives_are_warned_of(pair: tuple[Path, Path], tmp_path: Path) -> None:
    with serving(longer) as fake:
        done = alignlab("judge", "compare", *pair, "--base-url", fake.url, "--judge", "gemini-2.0-flash", cwd=tmp_path)
    assert "of one family with google/gemma-3-1b-it" in done.out
    assert (tmp_path / "runs" / "judge" / "one-two" / "judge.json").is_file()


def test_a_used_up_budget_is_one_line_and_the_same_command_goes_on(pair: tuple[Path, Path], tmp_path: Path) -> None:
    with serving(longer) as fake:
        command = [
            "judge",
            "compare",
            *pair,
            "--base-url",
            fake.url,
            "--cache",
            tmp_path / "c",
            "--output",
            tmp_path / "o",
        ]
        stopped = alignlab(*command, "--max-calls", "5")
        assert stopped.code == 2 and len(stopped.errors) == 1
        assert "the budget is used up: max_calls is 5; spent: 5 calls" in stopped.errors[0]
        assert not (tmp_path / "o").exists()
        done = alignlab(*command, "--max-calls", "11")
        assert done.code == 0 and fake.calls == 16


def test_what_goes_wrong_is_one_line(pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = pair
    other = write_rows(tmp_path / "other.jsonl", [{"prompt_id": "p0", "prompt": "another question", "completion": "x"}])
    apart = write_rows(tmp_path / "apart.jsonl", [{"prompt_id": "q0", "prompt": "q", "completion": "x"}])
    mute = write_rows(tmp_path / "mute.jsonl", [{"prompt_id": "p0", "completion": "x"}])
    empty = tmp_path / "folder"
    empty.mkdir()
    with serving([error(401, "bad key")]) as fake:
        url = ["--base-url", fake.url]
        for arguments, said in (
            ([one, two, *url], "refuses the key in OPENAI_API_KEY (401): bad key"),
            ([one, two, "--base-url", "http://127.0.0.1:9/v1"], "cannot be reached"),
            ([one, other, *url], "prompt 'p0' is one thing to one and another to other"),
            ([one, apart, *url], "no prompt was answered by all of them"),
            ([one, mute, *url], "says nothing of what was asked"),
            ([one, one, *url], "is named twice"),
            ([one, empty, *url], "no evaluation_samples.json"),
            ([one, tmp_path / "none.jsonl", *url], "no such file"),
            ([one, two, "--oracle", "--model", "starter"], "--model, --oracle name different judges"),
            ([one, two, "--oracle", *url], "--oracle, --base-url name different judges"),
            ([one, two, "--reward-model", empty], "not a finished run with a reward model"),
            ([one, two, "--oracle"], "has no task whose grader could be the oracle"),
            ([one, two, *url, "--max-cost", "1"], "max_cost needs prices"),
        ):
            done = alignlab("judge", "compare", *arguments, "--cache", tmp_path / "c", cwd=tmp_path)
            assert done.code == 2 and len(done.errors) == 1, (arguments, done.err)
            assert said in done.errors[0], done.errors
    monkeypatch.delenv("OPENAI_API_KEY")
    done = alignlab("judge", "compare", one, two, "--cache", tmp_path / "c", cwd=tmp_path)
    line = "judge: no key for 'gpt-4o-mini' in the environment variable OPENAI_API_KEY; set it"
    assert done.code == 2 and len(done.errors) == 1 and line in done.errors[0] and "spent" not in done.errors[0]


def test_what_is_in_the_cache_needs_no_key(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module.ChatClient, "_call", lambda self, question: Reply(text="Verdict: A"))
    command = ["judge", "compare", *pair, "--cache", tmp_path / "c", "--output", tmp_path / "o"]
    assert alignlab(*command).code == 0
    monkeypatch.delenv("OPENAI_API_KEY")
    for more in ([], ["--max-calls", "0"]):
        done = alignlab(*command, *more)
        assert done.code == 0 and "16 of 16 replies were in the cache; called: 0 calls" in done.err
    alone = alignlab(*command[:-3], tmp_path / "other", "--output", tmp_path / "o", "--max-calls", "0")
    assert alone.code == 2 and "the budget is used up: max_calls is 0" in alone.errors[0]


def keys_of(content: Any) -> set[str]:
    """Names of keys at every depth, but for those that are names of data."""
    if isinstance(content, list):
        return {key for value in content for key in keys_of(value)}
    if not isinstance(content, dict):
        return set()
    named = {"categories", "turns", "wins", "annotators", "slots"}
    below = {key for name, value in content.items() for key in keys_of(_values(value) if name in named else value)}
    return set(content) | below


def _values(content: Any) -> list[Any]:
    return list(content.values()) if isinstance(content, dict) else []


def test_the_pages_explain_every_key(pair: tuple[Path, Path], tmp_path: Path) -> None:
    docs = {name: (ROOT / "docs" / f"{name}.md").read_text("utf-8") for name in ("judge", "human")}
    with serving(longer) as fake:
        alignlab("judge", "compare", *pair, "--base-url", fake.url, "--output", tmp_path / "o")
    found = keys_of(strict_json((tmp_path / "o" / "judge.json").read_text("utf-8")))
    told = docs["judge"]
    assert {"win_rate", "length_controlled", "flip_rate", "coefficient"} <= found
    assert not [key for key in found - {"schema"} if f"`{key}`" not in told]
    votes = write_rows(
        tmp_path / "votes.jsonl",
        [
            {"prompt_id": f"p{i}", "a": "one", "b": "two", "winner": "ab"[i % 2], "rater": r}
            for i in range(8)
            for r in "xy"
        ],
    )
    command = ["judge", "agreement", "--human", votes, "--judge", tmp_path / "o" / "verdicts.jsonl"]
    assert alignlab(*command, "-o", tmp_path / "a.json").code == 0
    found = keys_of(strict_json((tmp_path / "a.json").read_text("utf-8")))
    unexplained = {key for key in found if f"`{key}`" not in told and not key.endswith("_interval")}
    assert unexplained == {"schema", "raters"}


@pytest.mark.slow
def test_ctrl_c_is_no_error_and_the_same_command_goes_on(tmp_path: Path) -> None:
    def slow(number: int, body: dict[str, Any]) -> Act:
        return replace(longer(number, body), wait=0.05)

    one = answers(tmp_path / "one.jsonl", [f"long answer {i}" for i in range(60)])
    two = answers(tmp_path / "two.jsonl", [f"short {i}" for i in range(60)])
    with serving(slow) as fake:
        command = ["judge", "compare", one, two, "--base-url", fake.url, "--cache", tmp_path / "c"]
        command += ["--output", tmp_path / "o", "--concurrency", "2"]
        process = start_alignlab(*command)
        deadline = time.monotonic() + 120
        while fake.calls < 20 and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 130 and "stopped; the same command goes on" in err, err
        kept = len(list((tmp_path / "c").rglob("*.json")))
        assert 20 <= kept < 120 and kept == fake.calls  # what was under way is kept too
        fake.script = longer
        done = alignlab(*command)
        assert done.code == 0 and fake.calls == 120
        assert f"{kept} of 120 replies were in the cache" in done.err
        assert f"{120 - kept} of {120 - kept} replies" in done.err


# ---- offline judges --------------------------------------------------------------------------------------------------


def test_runs_are_compared_by_their_evaluations(tmp_path: Path) -> None:
    sft = debug_run("starter/sft.yaml")
    dpo = debug_run("starter/dpo.yaml")
    with serving(longer) as fake:
        done = alignlab("judge", "compare", sft, dpo, "--base-url", fake.url, "--output", tmp_path, "-n", "5")
    assert done.code == 0, done.err
    found = strict_json((tmp_path / "judge.json").read_text("utf-8"))
    assert found["games"] == 5
    asked = "\n".join(m["content"] for body in fake.requests for m in body["messages"])
    samples = strict_json((sft / "evaluation_samples.json").read_text("utf-8"))
    other = strict_json((dpo / "evaluation_samples.json").read_text("utf-8"))
    first = next(s for s, o in zip(samples, other, strict=True) if s["text"] != o["text"])  # the same need no judge
    assert first["text"] in asked
    data = {row["id"]: row for task in starter.DATA.iterdir() for row in rows(task / "validation.jsonl")}
    assert data[first["prompt_id"]]["messages"][-1]["content"] in asked


def test_an_evaluation_apart_is_read_with_the_prompts_of_its_run(tmp_path: Path) -> None:
    """Samples by decoding, without what was asked: the greedy ones, and the prompts of the run's data."""
    run = debug_run("starter/sft.yaml")
    samples = strict_json((run / "evaluation_samples.json").read_text("utf-8"))
    for name, text in (("one", "first"), ("two", "second")):
        greedy = [{**row, "text": f"{text} {i}"} for i, row in enumerate(samples)]
        (tmp_path / name).mkdir()
        write_json(tmp_path / name / "evaluation_samples.json", {"sampled": samples, "greedy": greedy})
        write_json(tmp_path / name / "evaluation.json", {"run": str(run)})
    with serving(longer) as fake:
        done = alignlab("judge", "compare", tmp_path / "one", tmp_path / "two", "--base-url", fake.url, "-n", "3",
                        "--output", tmp_path / "o")  # fmt: skip
    assert done.code == 0, done.err
    assert strict_json((tmp_path / "o" / "judge.json").read_text("utf-8"))["losses"] == 3
    (tmp_path / "one" / "evaluation_samples.json").write_text("{", "utf-8")
    broken = alignlab("judge", "compare", tmp_path / "one", tmp_path / "two", "--oracle", cwd=tmp_path)
    assert broken.code == 2 and "damaged" in broken.errors[0]


def test_a_reward_model_judges_and_says_whose_teacher_it_was(tmp_path: Path) -> None:
    sft, ppo = debug_run("starter/sft.yaml"), debug_run("starter/ppo.yaml")
    reward_model = debug_run("starter/reward_model.yaml")
    done = alignlab("judge", "compare", sft, ppo, "--reward-model", reward_model, "--output", tmp_path)
    assert done.code == 0, done.err
    found = strict_json((tmp_path / "judge.json").read_text("utf-8"))
    assert found["kind"] == "reward model" and found["flip_rate"] is None
    assert any("trained against this very reward model" in w for w in found["warnings"])
    verdicts = rows(tmp_path / "verdicts.jsonl")
    for row in verdicts:
        left, right = map(float, row["replies"])
        assert row["winner"] == ("a" if left > right else "b" if right > left else "tie")
    alone = alignlab("judge", "compare", sft, debug_run("starter/dpo.yaml"), "--reward-model", reward_model,
                     "--output", tmp_path / "2")  # fmt: skip
    assert "very reward model" not in alone.out


def test_the_oracle_is_the_task_itself(tmp_path: Path) -> None:
    sft, dpo = debug_run("starter/sft.yaml"), debug_run("starter/dpo.yaml")
    graded = {row["prompt_id"] for row in strict_json((sft / "evaluation_samples.json").read_text("utf-8"))
              if row["score"] is not None}  # fmt: skip
    done = alignlab("judge", "compare", sft, dpo, "--oracle", "--output", tmp_path)
    assert done.code == 0 and graded, done.err
    found = strict_json((tmp_path / "judge.json").read_text("utf-8"))
    assert found["kind"] == "oracle" and "before the oracle" in done.out and "before the judge" not in done.out


def test_a_reward_model_scores_as_it_does_in_training() -> None:
    from alignlab.conversation import Template
    from alignlab.models import ModelChoice, load_generation_config, load_reward_model, load_tokenizer
    from alignlab.rewards.learned import learned
    from alignlab.types import Completion

    folder = debug_run("starter/reward_model.yaml") / "reward_model"
    asked = [Prompt(messages=(Message("user", f"What is {i} + 2?"),), id=str(i)) for i in range(5)]
    texts = ["4", "It is five.", "", "x" * 20, "seven or so"]
    template = Template.of(load_tokenizer(str(folder)), load_generation_config(str(folder)))
    model = load_reward_model(folder, ModelChoice(name=str(folder)))
    completions = [Completion(token_ids=(), logprobs=(), finish_reason="stop", text=text) for text in texts]
    expected = learned(asked, completions, reward_model=model, template=template)
    assert RewardModelScorer(folder, device="cpu")(asked, texts) == pytest.approx(expected, abs=1e-5)


def test_a_local_model_is_a_client_with_a_cache(tmp_path: Path) -> None:
    asked = [[Message("user", f"What is {i} + 2?")] for i in range(3)]
    client = LocalClient("starter", max_tokens=12, cache=tmp_path, device="cpu", max_rows=2)
    replies = client.complete(asked)
    assert len(replies) == 3 and all(isinstance(reply, str) for reply in replies) and any(replies)
    again = LocalClient("starter", max_tokens=12, cache=tmp_path, device="cpu")
    again.model = None  # type: ignore[assignment]  # it has nothing to answer
    assert again.complete(asked) == replies and again.replayed == 3
    moved = tmp_path / "moved"
    shutil.copytree(starter.ASSETS, moved, ignore=shutil.ignore_patterns("data"))
    elsewhere = LocalClient(moved, max_tokens=12, cache=tmp_path, device="cpu")
    elsewhere.model = None  # type: ignore[assignment]  # the same weights in another place are the same judge
    assert elsewhere.complete(asked) == replies


def test_a_question_that_does_not_fit_is_said() -> None:
    client = LocalClient("starter", max_tokens=12, device="cpu")
    with pytest.raises(
        UserError, match=r"judge starter: a question and its reply take up to \d+ tokens, but .* is 2048"
    ):
        client.complete([[Message("user", "many words " * 2000)]])


def test_a_local_model_judges_from_the_command_line(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """The starter cannot judge: what it says is no verdict, and counts as none."""
    command = ["judge", "compare", *pair, "--model", "starter", "--max-tokens", "4", "-n", "1"]
    done = alignlab(*command, "--cache", tmp_path / "c", "--output", tmp_path / "o")
    assert done.code == 0, done.err
    found = strict_json((tmp_path / "o" / "judge.json").read_text("utf-8"))
    assert (found["judge"], found["kind"], found["games"], found["unread"]) == ("starter", "judge", 1, 1)
    assert found["win_rate"] is None and "no verdict could be read" in done.out


def test_a_run_can_be_the_judge(pair: tuple[Path, Path], tmp_path: Path) -> None:
    run = debug_run("starter/sft.yaml")
    done = alignlab("judge", "compare", *pair, "--model", run, "--max-tokens", "4", "-n", "1",
                    "--cache", tmp_path / "c", "--output", tmp_path / "o")  # fmt: skip
    assert done.code == 0, done.err
    assert "of one family" not in done.out
    other = debug_run("starter/dpo.yaml")
    kin = alignlab("judge", "compare", run, other, "--model", run, "--max-tokens", "4", "-n", "1",
                   "--cache", tmp_path / "c", "--output", tmp_path / "p")  # fmt: skip
    assert "of one family with starter" in kin.out
