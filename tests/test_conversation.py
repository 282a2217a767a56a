"""Templates of Gemma 3, Gemma 1 and SmolLM2 around small tokenizers of the same kinds, trained here.

The chat templates below are this project's own wording of the public formats; expected ids and texts come from the
formats, from `apply_chat_template` on ordinary text, or from counting control tokens, never from `Template` itself.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from alignlab.conversation import Template, turn_error
from alignlab.errors import UserError
from alignlab.types import Message, Prompt

GEMMA = """{{- bos_token -}}
{%- if messages[0].role == 'system' -%}
  {%- set lead = messages[0].content + '\n\n' -%}{%- set turns = messages[1:] -%}
{%- else -%}
  {%- set lead = '' -%}{%- set turns = messages -%}
{%- endif -%}
{%- for turn in turns -%}
  {%- if (turn.role == 'user') != (loop.index0 is even) -%}{{ raise_exception('turns must alternate') }}{%- endif -%}
  {{- '<start_of_turn>' + ('model' if turn.role == 'assistant' else turn.role) + '\n' -}}
  {{- (lead if loop.first else '') + turn.content | trim + '<end_of_turn>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}"""
GEMMA1 = "{%- if messages[0].role == 'system' -%}{{ raise_exception('no system role') }}{%- endif -%}" + GEMMA
CHATML = """{%- if messages[0].role != 'system' -%}
  {{- '<|im_start|>system\nYou are a small helper.<|im_end|>\n' -}}
{%- endif -%}
{%- for turn in messages -%}
  {{- '<|im_start|>' + turn.role + '\n' + turn.content + '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"""
CORPUS = [
    "user model assistant system You are a small helper. Be helpful. How many apples does Mia have now?",
    "She has 17 and finds 25 more, so 42.  Two  spaces\nand\n\nlines; naïve café 你好 <b>bold</b> <|pipe|>",
    "The end of turn is the end of turn, and the start of turn is the start.",
] * 20
GEMMA_CONTROL = ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"]
CHATML_CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def byte_level(special: list[str], plain: list[str] = []) -> Tokenizer:  # noqa: B006
    """As the starter's and SmolLM2's: bytes, digits alone, no space put in front."""
    tokenizer = Tokenizer(models.BPE())
    digits, rest = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, rest])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in plain])
    return tokenizer


def gemma_pieces(special: list[str]) -> Tokenizer:
    """As Gemma's: spaces become a visible letter, unknown characters bytes; runs of newlines are tokens."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("▁"), "merged_with_next")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=[*special, "<unk>", *fallback], show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    # Training made the byte tokens special too; only the control tokens may be.
    state = tokenizer.to_str()
    clean = Tokenizer.from_str(_without_added(state, fallback))
    clean.add_tokens([AddedToken("\n" * count, normalized=False, special=False) for count in (1, 2, 3)])
    return clean


def _without_added(state: str, tokens: list[str]) -> str:
    loaded = json.loads(state)
    loaded["added_tokens"] = [token for token in loaded["added_tokens"] if token["content"] not in tokens]
    return json.dumps(loaded)


def metaspace(special: list[str]) -> Tokenizer:
    """As recent Llama-2 descendants': a space is put before the first word of a text, and only there."""
    tokenizer = Tokenizer(models.BPE(unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    letters = sorted({character for line in CORPUS for character in line} - {" "})
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=letters, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def wrap(tokenizer: Tokenizer, template: str | None, adds_bos: bool = False, **tokens: Any) -> PreTrainedTokenizerBase:
    if adds_bos:
        bos = tokens["bos_token"]
        ids = [(bos, tokenizer.token_to_id(bos))]
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=ids)
    untyped: Any = PreTrainedTokenizerFast
    wrapped: PreTrainedTokenizerBase = untyped(tokenizer_object=tokenizer, **tokens)
    wrapped.chat_template = template
    return wrapped


GEMMA_TOKENS: dict[str, Any] = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
CHATML_TOKENS: dict[str, Any] = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
MAKERS: dict[str, Callable[[], PreTrainedTokenizerBase]] = {
    "starter": lambda: wrap(byte_level(GEMMA_CONTROL), GEMMA, adds_bos=True, **GEMMA_TOKENS),
    "gemma3": lambda: wrap(gemma_pieces(GEMMA_CONTROL), GEMMA, adds_bos=True, **GEMMA_TOKENS),
    "gemma1": lambda: wrap(gemma_pieces(GEMMA_CONTROL), GEMMA1, adds_bos=True, **GEMMA_TOKENS),
    "smollm2": lambda: wrap(byte_level(CHATML_CONTROL), CHATML, **CHATML_TOKENS),
}
BOTH_KINDS = ("starter", "gemma3", "smollm2")


@cache
def tokenizer_of(name: str) -> PreTrainedTokenizerBase:
    return MAKERS[name]()


@cache
def template_of(name: str) -> Template:
    return Template.of(tokenizer_of(name))


def prompt(*contents: str, system: str | None = None) -> Prompt:
    turns = [Message(("user", "assistant")[i % 2], content) for i, content in enumerate(contents)]
    lead = [] if system is None else [Message("system", system)]
    return Prompt(messages=(*lead, *turns), id="p/7")


def official(name: str, messages: tuple[Message, ...], generation_prompt: bool = True) -> list[int]:
    turns = [{"role": message.role, "content": message.content} for message in messages]
    ids: Any = tokenizer_of(name).apply_chat_template(
        turns, tokenize=True, add_generation_prompt=generation_prompt, return_dict=False
    )
    return list(ids)


def text_of(name: str, ids: tuple[int, ...]) -> str:
    return str(tokenizer_of(name).decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


ORDINARY = [
    prompt("How many apples?"),
    prompt("17+25=?", "42", "and 42+1?"),
    prompt("  led and trailed by spaces \n"),
    prompt("\n\nlines\n\n\nand naïve 你好 <b>bold</b>\t"),
    prompt("How many?", system="Be helpful."),
    prompt("a", " 42 ", "b", "c\n", "d", system="Be  brief.\n"),
]


# ---- prompts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", ORDINARY)
@pytest.mark.parametrize("name", BOTH_KINDS)
def test_prompt_ids_are_those_of_the_template(name: str, asked: Prompt) -> None:
    assert list(template_of(name).encode_prompt(asked)) == official(name, asked.messages)


@pytest.mark.parametrize("name", BOTH_KINDS)
def test_row_is_the_conversation_of_the_template(name: str) -> None:
    asked = prompt("17+25=?", "42", "Mia finds 3 more. How many?")
    row = template_of(name).row(asked, "She has 45 apples.")
    whole = official(name, (*asked.messages, Message("assistant", "She has 45 apples.")), generation_prompt=False)
    newline = tokenizer_of(name)("\n", add_special_tokens=False)["input_ids"]
    assert [*row.prompt_ids, *row.completion_ids, *newline] == whole  # the template ends turns with a newline


def test_gemma_text() -> None:
    ids = template_of("gemma3").encode_prompt(prompt("Hello", system="Be helpful."))
    expected = "<bos><start_of_turn>user\nBe helpful.\n\nHello<end_of_turn>\n<start_of_turn>model\n"
    assert text_of("gemma3", ids) == expected


def test_gemma1_folds_the_system_message_as_gemma3_does() -> None:
    asked = prompt("Hello", "Hi", "How many?", system="Be helpful.")
    assert not template_of("gemma1").takes_system
    assert template_of("gemma3").takes_system
    assert template_of("gemma1").encode_prompt(asked) == template_of("gemma3").encode_prompt(asked)


def test_a_template_that_ignores_system_messages_gets_them_folded() -> None:
    deaf = (
        "{% for turn in messages %}{% if turn.role != 'system' %}{{ turn.content + eos_token }}{% endif %}{% endfor %}"
    )
    template = Template.of(wrap(byte_level(GEMMA_CONTROL), deaf, **GEMMA_TOKENS))
    ids = template.encode_prompt(prompt("Hello", system="Be helpful."))
    assert template.tokenizer.decode(list(ids)) == "Be helpful.\n\nHello<eos>"


def test_smollm2_default_system_turn_stands_once() -> None:
    text = text_of("smollm2", template_of("smollm2").encode_prompt(prompt("a", "b", "c")))
    assert text.count("You are a small helper.") == 1
    text = text_of("smollm2", template_of("smollm2").encode_prompt(prompt("a", system="Be helpful.")))
    assert "small helper" not in text
    assert text.count("<|im_start|>system") == 1


@pytest.mark.parametrize("name", ["starter", "gemma3", "gemma1"])
@pytest.mark.parametrize("asked", [*ORDINARY, Prompt(messages=(), id="text")])
def test_exactly_one_bos_where_the_model_wants_one(name: str, asked: Prompt) -> None:
    row = template_of(name).row(asked, "42")
    bos = tokenizer_of(name).bos_token_id
    assert (*row.prompt_ids, *row.completion_ids).count(bos) == 1
    assert row.prompt_ids[0] == bos


def test_negative_control_the_naive_path_doubles_bos() -> None:
    tokenizer = tokenizer_of("gemma3")
    text = tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    assert tokenizer(text)["input_ids"].count(tokenizer.bos_token_id) == 2


def test_bos_is_added_where_the_template_forgets_it() -> None:
    template = Template.of(
        wrap(byte_level(GEMMA_CONTROL), GEMMA.replace("{{- bos_token -}}", ""), adds_bos=True, **GEMMA_TOKENS)
    )
    assert template.encode_prompt(prompt("a")) == template_of("starter").encode_prompt(prompt("a"))


def test_no_bos_where_the_model_wants_none() -> None:
    template = Template.of(
        wrap(byte_level(GEMMA_CONTROL), GEMMA.replace("{{- bos_token -}}", ""), adds_bos=False, **GEMMA_TOKENS)
    )
    assert template.encode_prompt(prompt("a")) == template_of("starter").encode_prompt(prompt("a"))[1:]


def test_plain_text_prompts_are_bos_alone_and_end_with_the_end_of_text() -> None:
    asked = Prompt(messages=(), id="text")
    gemma = template_of("gemma3")
    row = gemma.row(asked, "once")
    assert row.prompt_ids == (gemma.bos_id,)
    assert row.completion_ids[-1] == gemma.eos_id != gemma.turn_end_id
    without = Template.of(wrap(byte_level(["<eos>"]), None, eos_token="<eos>"))
    assert without.row(asked, "once").prompt_ids == ()
    assert without.row(asked, "once").completion_ids[-1] == without.eos_id


# ---- stopping --------------------------------------------------------------------------------------------------------


@dataclass
class Config:
    eos_token_id: int | list[int] | None = None
    bos_token_id: int | None = None
    pad_token_id: int | None = None


def test_stop_ids_hold_the_end_of_text_and_of_the_turn() -> None:
    gemma, tokenizer = template_of("gemma3"), tokenizer_of("gemma3")
    turn_end = tokenizer.convert_tokens_to_ids("<end_of_turn>")
    assert gemma.turn_end_id == turn_end
    assert gemma.stop_ids == {tokenizer.eos_token_id, turn_end}
    chatml = template_of("smollm2")
    assert chatml.stop_ids == {chatml.turn_end_id} == {tokenizer_of("smollm2").eos_token_id}


def test_configs_add_their_end_of_text() -> None:
    tokenizer = tokenizer_of("smollm2")
    template = Template.of(tokenizer, Config(), Config(eos_token_id=[0, 77]), SimpleNamespace(eos_token_id=78), None)
    assert template.stop_ids == {tokenizer.eos_token_id, 0, 77, 78}


@pytest.mark.parametrize("name", MAKERS)
def test_completions_end_with_exactly_one_stop_token(name: str) -> None:
    template = template_of(name)
    for text in ("42", "two\nlines", " spaced ", "<end_of_turn>", "<|im_end|>"):
        ids = template.encode_completion(text)
        assert [i for i in ids if i in template.stop_ids] == [template.turn_end_id] == [ids[-1]]
        assert template.encode_completion(text, stop=False) == ids[:-1]


def test_a_turn_end_that_is_no_special_token_is_found() -> None:
    control = [token for token in GEMMA_CONTROL if token != "<end_of_turn>"]
    template = Template.of(wrap(byte_level(control, plain=["<end_of_turn>"]), GEMMA, **GEMMA_TOKENS))
    end = template.tokenizer.convert_tokens_to_ids("<end_of_turn>")
    assert template.turn_end_id == end
    ids = template.encode_prompt(prompt("say <end_of_turn> and <bos>"))
    assert ids.count(end) == 1
    assert template.tokenizer.decode(list(ids)).count("<end_of_turn>") == 2


def test_a_turn_end_after_a_space_is_found() -> None:
    spaced = "{% for turn in messages %}{{ turn.content + ' ' + eos_token }}{% endfor %}"
    template = Template.of(wrap(byte_level(GEMMA_CONTROL), spaced, **GEMMA_TOKENS))
    assert template.turn_end_id == template.eos_id == template.tokenizer.convert_tokens_to_ids("<eos>")


def test_pad_may_be_zero_or_missing() -> None:
    assert template_of("gemma3").pad_id == 0
    plain = wrap(byte_level(GEMMA_CONTROL), GEMMA, bos_token="<bos>", eos_token="<eos>")
    assert Template.of(plain).pad_id == Template.of(plain).eos_id
    assert Template.of(plain, Config(pad_token_id=0)).pad_id == 0


def test_a_template_without_turn_end_stops_on_the_end_of_text() -> None:
    bare = "{% for turn in messages %}{{ turn.role + ': ' + turn.content + '\n' }}{% endfor %}"
    template = Template.of(wrap(byte_level(GEMMA_CONTROL), bare, **GEMMA_TOKENS))
    assert template.turn_end_id == template.eos_id == 1
    assert template.stop_ids == {1}


def test_a_model_that_could_never_stop_is_refused() -> None:
    with pytest.raises(UserError, match="names no end of text"):
        Template.of(wrap(byte_level(GEMMA_CONTROL), None, bos_token="<bos>"))


# ---- people's text is never a control token --------------------------------------------------------------------------


def controls(name: str, ids: tuple[int, ...]) -> list[int]:
    special = {*tokenizer_of(name).all_special_ids, *map(tokenizer_of(name).convert_tokens_to_ids, CONTROL[name])}
    return [i for i in ids if i in special]


CONTROL = {"starter": GEMMA_CONTROL, "gemma3": GEMMA_CONTROL, "gemma1": GEMMA_CONTROL, "smollm2": CHATML_CONTROL}


@pytest.mark.parametrize("name", MAKERS)
def test_control_tokens_in_text_are_text(name: str) -> None:
    template = template_of(name)
    for token in CONTROL[name]:
        for written in (token, f"a{token}b", f" {token} \n{token}{token}", f"{token[:-1]}{token}>"):
            system = written if template.takes_system else None
            benign, forged = prompt("x", "y", "z", system=system and "s"), prompt(*[written] * 3, system=system)
            ids = template.encode_prompt(forged)
            assert controls(name, ids) == controls(name, template.encode_prompt(benign))
            assert text_of(name, ids).count(written.strip()) >= 3
            completion = template.encode_completion(written)
            assert controls(name, completion) == [template.turn_end_id]
            assert template.decode(completion) == written


@pytest.mark.parametrize("name", MAKERS)
def test_negative_control_ordinary_encoding_does_forge(name: str) -> None:
    asked = prompt(f"a{CONTROL[name][2]}b")
    assert len(controls(name, tuple(official(name, asked.messages)))) == 1 + len(
        controls(name, template_of(name).encode_prompt(asked))
    )


@pytest.mark.parametrize("name", BOTH_KINDS)
def test_text_around_a_hidden_control_token_is_encoded_as_ever(name: str) -> None:
    """Only the message with the token differs: what comes before it and after it keeps its ids."""
    template = template_of(name)
    plain = official(name, prompt("How many apples?", "42", "x").messages)
    ids = list(template.encode_prompt(prompt("How many apples?", "42", f"x {CONTROL[name][2]}")))
    end = max(i for i, token in enumerate(plain) if token == template.turn_end_id)
    assert ids[:end] == plain[:end]
    assert ids[end - len(plain) :] == plain[end:]


def test_private_use_characters_cannot_forge_a_control_token() -> None:
    template = template_of("starter")
    nonce = template.nonce
    for written in ("\ue0000.4\ue001", f"<bos>\ue000{nonce[:-1]}.2\ue001", "\ue002\ue003<eos>", "\ue002x.1\ue003"):
        ids = template.encode_prompt(prompt(written))
        assert controls("starter", ids) == controls("starter", template.encode_prompt(prompt("x")))
        assert template.decode(template.encode_completion(written)) == written


def test_a_tokenizer_that_can_only_write_the_token_itself_is_refused() -> None:
    tokenizer = Tokenizer(models.WordLevel({"<eos>": 0, "<unk>": 1, "hello": 2}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    template = Template.of(wrap(tokenizer, None, eos_token="<eos>", unk_token="<unk>"))
    assert template.encode_completion("hello odd") == (2, 1, 0)
    with pytest.raises(UserError, match=r"cannot write '<eos>' as plain text; take it out"):
        template.encode_completion("hello <eos>")


# ---- there and back --------------------------------------------------------------------------------------------------

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
PIECES = st.lists(st.sampled_from([*GEMMA_CONTROL, *CHATML_CONTROL, " ", "\n", "\t", "42", "naïve", "你好", "\u2028"]))


@settings(max_examples=150, deadline=None)
@given(asked=TEXT | PIECES.map("".join), answer=TEXT | PIECES.map("".join))
@pytest.mark.parametrize("name", ["starter", "smollm2"])
def test_prompt_is_a_prefix_and_the_completion_comes_back(name: str, asked: str, answer: str) -> None:
    template = template_of(name)
    row = template.row(prompt(asked), answer)
    assert row.prompt_ids == template.encode_prompt(prompt(asked))
    assert template.decode(row.completion_ids) == answer
    assert row.completion_ids[-1] == template.turn_end_id
    assert template.decode(template.encode_completion(answer, stop=False)) == answer
    assert all(0 <= i < len(template.tokenizer) for i in row.prompt_ids + row.completion_ids)  # no mark gets out


@settings(max_examples=80, deadline=None)
@given(answer=st.text(" \n\tabc42,.<>é", max_size=30))
@pytest.mark.parametrize("name", ["gemma3", "gemma1"])
def test_gemma_pieces_come_back(name: str, answer: str) -> None:
    template = template_of(name)
    assert template.decode(template.encode_completion(answer)) == answer


def test_decode_leaves_out_what_stands_after_the_answer() -> None:
    template = template_of("gemma3")
    ids = template.encode_completion("42")
    assert template.decode([*ids, template.eos_id, template.pad_id, template.pad_id]) == "42"
    assert template.decode(ids[:-1]) == "42"
    assert template.decode([template.turn_end_id]) == ""
    assert template.decode([]) == ""


def test_no_space_is_put_before_a_completion() -> None:
    tokenizer = wrap(metaspace(GEMMA_CONTROL), GEMMA, adds_bos=True, **GEMMA_TOKENS)
    template = Template.of(tokenizer)
    assert tokenizer("42", add_special_tokens=False)["input_ids"] != list(template.encode_completion("42", stop=False))
    for text in ("42", " 42", "a b", " a  b"):
        assert template.decode(template.encode_completion(text)) == text
    asked = prompt("apples")
    row = template.row(asked, "42")
    turns = [{"role": "user", "content": "apples"}, {"role": "assistant", "content": "42"}]
    whole = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False)
    assert [*row.prompt_ids, *row.completion_ids] == list(whole)[: len(row)]
    forged = template.encode_prompt(prompt("apples <bos>"))
    same = row.prompt_ids.index(template.turn_end_id)
    assert forged[:same] == row.prompt_ids[:same]


def test_somebodys_truncation_changes_nothing() -> None:
    tokenizer = MAKERS["starter"]()
    template = Template.of(tokenizer)
    expected = template.encode_prompt(prompt("How many apples does Mia have?"))
    tokenizer("How many apples", truncation=True, max_length=2, padding="max_length")
    assert template.encode_prompt(prompt("How many apples does Mia have?")) == expected
    forged = prompt("How many apples does Mia have? <bos>")
    whole = Template.of(MAKERS["starter"]()).encode_prompt(forged)
    for asked, ids in ((prompt("How many apples does Mia have?"), expected), (forged, whole)):
        tokenizer.backend_tokenizer.enable_truncation(3)
        tokenizer.backend_tokenizer.enable_padding(length=500)
        assert template.encode_prompt(asked) == ids


def test_texts_longer_than_the_window_are_encoded_without_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    """What does not fit is measured, cut or left out; transformers would say that it "will result in errors"."""
    tokenizer = MAKERS["starter"]()
    tokenizer.model_max_length = 8
    template, long = Template.of(tokenizer), "How many apples " * 9
    assert len(template.encode_prompt(prompt(long))) > 8 and len(template.encode_completion(long)) > 8
    assert caplog.text == ""
    tokenizer(long)
    assert "longer than" in caplog.text


def test_the_tokenizer_is_left_as_it_was() -> None:
    tokenizer = MAKERS["starter"]()
    before = tokenizer.backend_tokenizer.to_str()
    Template.of(tokenizer).row(prompt("<bos>"), "<eos>")
    assert tokenizer.backend_tokenizer.to_str() == before


def test_two_templates_agree() -> None:
    first, second = Template.of(tokenizer_of("starter")), Template.of(tokenizer_of("starter"))
    assert first.nonce != second.nonce
    assert first.row(prompt("a<bos>"), "<eos>b") == second.row(prompt("a<bos>"), "<eos>b")


# ---- what is refused -------------------------------------------------------------------------------------------------

BAD = {
    "two users": ([("user", "a"), ("user", "b")], "message 2 is from user, expected assistant"),
    "assistant first": ([("assistant", "a"), ("user", "b")], "message 1 is from assistant, expected user"),
    "assistant last": ([("user", "a"), ("assistant", "b")], "a prompt ends with the user's"),
    "unknown role": ([("user", "a"), ("tool", "b")], "unknown role 'tool'"),
    "late system": ([("user", "a"), ("system", "b")], "message 2 is a system message"),
    "two systems": ([("system", "a"), ("system", "b"), ("user", "c")], "message 2 is a system message"),
    "system alone": ([("system", "a")], "there is no user message"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("name", MAKERS)
def test_roles_that_do_not_alternate_are_refused_with_the_prompt(name: str, case: str) -> None:
    turns, said = BAD[case]
    asked = Prompt(messages=tuple(Message(role, content) for role, content in turns), id="file/12")  # type: ignore[arg-type]
    with pytest.raises(UserError) as caught:
        template_of(name).encode_prompt(asked)
    assert said in str(caught.value)
    assert "prompt 'file/12'" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_good_turns_have_no_error() -> None:
    assert turn_error(prompt("a", "b", "c", system="s").messages) is None
    assert turn_error(prompt("a").messages) is None


def test_chat_without_a_chat_template_is_refused() -> None:
    template = Template.of(wrap(byte_level(GEMMA_CONTROL), None, **GEMMA_TOKENS))
    with pytest.raises(UserError, match=r"prompt 'p/7': .* has no chat template"):
        template.encode_prompt(prompt("a"))


def test_a_template_that_refuses_is_said_with_the_prompt() -> None:
    picky = GEMMA.replace(
        "{{- bos_token -}}", "{%- if 'x' in messages[0].content -%}{{ raise_exception('no x') }}{%- endif -%}"
    )
    template = Template.of(wrap(byte_level(GEMMA_CONTROL), picky, **GEMMA_TOKENS))
    with pytest.raises(UserError, match=r"prompt 'p/7': the chat template .* refuses it: no x"):
        template.encode_prompt(prompt("x"))


def test_half_a_character_is_refused() -> None:
    with pytest.raises(UserError, match=r"prompt 'p/7' holds '\\ud800', half of a surrogate pair"):
        template_of("starter").encode_prompt(prompt("a\ud800"))


def test_a_slow_tokenizer_is_refused() -> None:
    with pytest.raises(UserError, match="slow tokenizer"):
        Template.of(SimpleNamespace(is_fast=False, name_or_path="old"))  # type: ignore[arg-type]
