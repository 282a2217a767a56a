"""What ships is what the seeded build makes, and the tokenizer keeps its promises."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import jinja2
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from alignlab.starter import ASSETS, DATA
from alignlab.tasks import demonstrations, get_task

BUILD = Path(__file__).parents[2] / "recipes" / "starter" / "build.py"
LARGEST_ASSETS = 12_000_000
"""Bytes of all package data."""
TOKENIZER = AutoTokenizer.from_pretrained(ASSETS)


@pytest.fixture(scope="module")
def build() -> ModuleType:
    spec = importlib.util.spec_from_file_location("starter_build", BUILD)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def ids(text: str) -> list[int]:
    encoded: list[int] = TOKENIZER.encode(text, add_special_tokens=False)
    return encoded


def render(messages: list[tuple[str, str]], generate: bool = False) -> str:
    turns = [{"role": role, "content": content} for role, content in messages]
    return str(TOKENIZER.apply_chat_template(turns, tokenize=False, add_generation_prompt=generate))


def test_shipped_data_are_what_the_build_makes(build: ModuleType) -> None:
    made = dict(build.data_files())
    shipped = {path.relative_to(DATA).as_posix(): path for path in DATA.rglob("*.jsonl")}
    assert set(made) == set(shipped)
    for name, text in made.items():
        assert hashlib.sha256(shipped[name].read_bytes()).digest() == hashlib.sha256(text.encode()).digest(), name


def test_a_small_part_is_the_beginning_of_the_file(build: ModuleType) -> None:
    text = build.jsonl(demonstrations(get_task("code"), "test", 5, build.SEED))
    assert (DATA / "code" / "test.jsonl").read_bytes().startswith(text.encode())


def test_rows_hold_what_training_and_grading_need() -> None:
    first = json.loads((DATA / "reasoning" / "train.jsonl").read_text("utf-8").splitlines()[0])
    assert set(first) == {"id", "task", "messages", "completion", "answer", "meta"}
    assert first["messages"][0]["role"] == "user"
    pair = json.loads((DATA / "safety" / "pairs.train.jsonl").read_text("utf-8").splitlines()[0])
    assert set(pair) == {"id", "task", "messages", "chosen", "rejected", "meta"}


def test_assets_are_small() -> None:
    assert sum(path.stat().st_size for path in ASSETS.rglob("*") if path.is_file()) < LARGEST_ASSETS


@pytest.mark.slow
def test_the_shipped_tokenizer_is_what_the_build_makes(build: ModuleType, tmp_path: Path) -> None:
    build.build(tmp_path / "assets", tmp_path / "corpus.jsonl", build.CORPUS_ROWS)
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "assets" / name).read_bytes() == (ASSETS / name).read_bytes()


@given(st.text(max_size=60))
def test_any_text_round_trips(text: str) -> None:
    for token in TOKENIZER.all_special_tokens:
        text = text.replace(token, "")
    assert TOKENIZER.decode(ids(text)) == text


@pytest.mark.parametrize("text", ["", " ", "  \n\t a  b ", "née Ωß 東京 😀", "\u0000\u200d", "a .b , c's", "x<y</z>"])
def test_chosen_texts_round_trip(text: str) -> None:
    assert TOKENIZER.decode(ids(text)) == text


@given(st.text(alphabet="0123456789 +-.,x", max_size=30))
def test_every_digit_is_a_token_of_its_own(text: str) -> None:
    tokens = [TOKENIZER.decode([token]) for token in ids(text)]
    assert [token for token in tokens if any(c.isdigit() for c in token)] == [c for c in text if c.isdigit()]


def test_control_tokens_have_gemma_roles() -> None:
    names = ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"]
    assert TOKENIZER.convert_tokens_to_ids(names) == [0, 1, 2, 3, 4]
    assert [TOKENIZER.pad_token_id, TOKENIZER.eos_token_id, TOKENIZER.bos_token_id] == [0, 1, 2]
    assert TOKENIZER.unk_token is None
    assert set(TOKENIZER.all_special_ids) == {0, 1, 2, 3, 4}
    assert ids("2") == TOKENIZER("2").input_ids  # adds no BOS by itself: the template writes it


def test_tags_are_single_tokens() -> None:
    assert len(ids("<reasoning></reasoning><answer></answer>")) == 4


def test_template_by_hand() -> None:
    """The three renderings that define the Gemma 3 format."""
    system = render([("system", "Be helpful."), ("user", "Hello")], generate=True)
    assert system == "<bos><start_of_turn>user\nBe helpful.\n\nHello<end_of_turn>\n<start_of_turn>model\n"
    turns = render([("user", " Hi "), ("assistant", " 8\n"), ("user", "Why?")])
    assert turns == (
        "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n8<end_of_turn>\n"
        "<start_of_turn>user\nWhy?<end_of_turn>\n"
    )
    assert ids("<bos><start_of_turn>")[:2] == [2, 3]


@pytest.mark.parametrize(
    "roles", [("assistant",), ("user", "user"), ("user", "system"), ("system", "assistant"), ("user", "tool")]
)
def test_template_refuses_other_orders(roles: tuple[str, ...]) -> None:
    with pytest.raises(jinja2.TemplateError, match="alternate"):
        render([(role, "x") for role in roles])


def test_config_is_a_small_gemma(build: ModuleType) -> None:
    config: Any = AutoConfig.from_pretrained(ASSETS)
    assert config.model_type == "gemma3_text"
    assert config.vocab_size == len(TOKENIZER)
    assert config.to_dict() == build.model_config(len(TOKENIZER)).to_dict() | {
        "transformers_version": config.transformers_version,
        "_name_or_path": str(ASSETS),
    }
    assert set(config.layer_types) == {"sliding_attention", "full_attention"}
    assert GenerationConfig.from_pretrained(ASSETS).eos_token_id == [1, 4]


def test_adopt_takes_the_newest_policy(build: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"no policy/model\.safetensors"):
        build.adopt(tmp_path, tmp_path)
    for i, text in enumerate(("old", "new")):
        weights = tmp_path / "run" / "checkpoints" / str(i) / "policy" / "model.safetensors"
        weights.parent.mkdir(parents=True)
        weights.write_text(text)
        os.utime(weights, (i, i))
    build.adopt(tmp_path / "run", tmp_path)
    assert (tmp_path / "model.safetensors").read_text() == "new"
