"""The only place that knows a chat template, its control tokens and where a turn ends.

messages -> prompt ids; text -> completion ids that end with the stop token; completion ids -> text.

One `stop_ids` and one BOS rule serve training, sampling, evaluation and serving. Ids are concatenated and never
re-tokenised, so the prompt is a prefix of every row by construction. What people write is text: a literal
`<end_of_turn>` in it never becomes a control token.
"""

from __future__ import annotations

import copy
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from jinja2 import TemplateError
from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerBase

from alignlab.errors import UserError
from alignlab.types import Message, Prompt, Row

_PROBE = (Message("user", "alignlabprobeuser"), Message("assistant", "alignlabprobeassistant"))
_PROBE_SYSTEM = Message("system", "alignlabprobesystem")


def turn_error(messages: Sequence[Message]) -> str | None:
    """Why these messages are no prompt; None if they are: perhaps a system message, then user, assistant, .. user."""
    offset = int(bool(messages) and messages[0].role == "system")
    for i, message in enumerate(messages[offset:]):
        number, expected = offset + i + 1, ("user", "assistant")[i % 2]
        if message.role not in ("system", "user", "assistant"):
            return f"message {number} has the unknown role {message.role!r}; there are system, user and assistant"
        if message.role == "system":
            return f"message {number} is a system message; only the first message may be one"
        if message.role != expected:
            return f"message {number} is from {message.role}, expected {expected}: turns alternate, the user begins"
    if len(messages) == offset:
        return "there is no user message"
    return None if messages[-1].role == "user" else "the last message is the assistant's; a prompt ends with the user's"


@dataclass(frozen=True, kw_only=True, eq=False)
class Template:
    """A tokenizer and what follows from its chat template; made by `Template.of`.

    Example (Gemma 3): `encode_prompt` of the user message `2+3?` is `<bos><start_of_turn>user\\n2+3?<end_of_turn>\\n
    <start_of_turn>model\\n` as ids, `encode_completion("5")` is `5<end_of_turn>` as ids, and `stop_ids` is {1, 106}.
    """

    tokenizer: PreTrainedTokenizerBase
    stop_ids: frozenset[int]
    """Every id that ends a completion: the end of text (one or several) and the end of a turn."""
    turn_end_id: int
    """What the template writes after an assistant turn (`<end_of_turn>`, `<|im_end|>`); else the end of text."""
    eos_id: int
    """The end of text; ends the completions of prompts without messages."""
    pad_id: int
    """What padding is written with. It may equal a stop id: masks come from lengths, never from ids."""
    bos_id: int | None
    adds_bos: bool
    """Whether the tokenizer puts BOS before every text, i.e. the model was trained with it."""
    takes_system: bool
    """Whether the template writes a system message; if not, it goes before the first user text, as in Gemma 3."""
    control: Mapping[str, int]
    """Control tokens and their ids: the special ones, and those that the template writes."""
    anchor: str = field(default="", repr=False)
    """Control token after which a text is tokenised as it is inside a row: without a space for the sentence start."""
    nonce: str = field(default_factory=lambda: secrets.token_hex(8), repr=False)

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, *configs: object) -> Template:
        """Around a fast tokenizer. `configs` (model config, generation config) add their end-of-text and other ids.

        Raises:
            UserError: the tokenizer is a slow one, names no end of text, or its template refuses a plain conversation.
        """
        if not tokenizer.is_fast:
            raise UserError(f"{_name(tokenizer)} is a slow tokenizer; one with a tokenizer.json is needed")
        eos_ids, bos_ids, pad_ids = (
            [i for source in (tokenizer, *configs) for i in _ids(source, key)]
            for key in ("eos_token_id", "bos_token_id", "pad_token_id")
        )
        added = {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.content.strip()}
        special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        turns, with_system = _probe(tokenizer) if tokenizer.chat_template else ("", "")
        turn_end = _matcher(added).search(turns.rpartition(_PROBE[1].content)[2])
        stops = ([] if turn_end is None else [added[turn_end[0]]]) + eos_ids
        if not stops:
            raise UserError(f"{_name(tokenizer)} names no end of text (eos_token), so completions could never stop")
        written = special.union(_matcher(added).findall(turns + with_system))
        template = cls(
            tokenizer=tokenizer,
            stop_ids=frozenset(stops),
            turn_end_id=stops[0],
            eos_id=(eos_ids or stops)[0],
            pad_id=(pad_ids or eos_ids or stops)[0],  # by presence, not truthiness: Gemma's pad id is 0
            bos_id=next(iter(bos_ids), None),
            adds_bos=bool(bos_ids) and list(tokenizer("a")["input_ids"])[:1] == bos_ids[:1],
            takes_system=_PROBE_SYSTEM.content in with_system,
            control={token: i for token, i in added.items() if token in written},
        )
        anchors = [token for token, i in template.control.items() if i in template.stop_ids]
        anchored = [replace(template, anchor=token) for token in anchors]
        return next((t for t in anchored if t.decode(t.encode_completion(" a b\n", stop=False)) == " a b\n"), template)

    # ---- to ids ------------------------------------------------------------------------------------------------------

    def encode_prompt(self, prompt: Prompt) -> tuple[int, ...]:
        """Ids up to and including the generation prompt, with exactly one BOS if the model wants one.

        Without messages: BOS alone if there is one (plain text).

        Raises:
            UserError: no chat template, roles that do not alternate, or text that cannot be encoded; names the prompt.
        """
        bos = () if self.bos_id is None else (self.bos_id,)
        if not prompt.messages:
            return bos
        where = f"prompt {prompt.id!r}"
        if problem := turn_error(prompt.messages):
            raise UserError(f"{where}: {problem}")
        messages = prompt.messages
        if messages[0].role == "system" and not self.takes_system:
            messages = (Message("user", f"{messages[0].content}\n\n{messages[1].content}"), *messages[2:])
        safe = [replace(message, content=self._hide(message.content)) for message in messages]
        ids = self._encode(_render(self.tokenizer, safe, where, generation_prompt=True), where)
        return ids if ids[:1] == bos or not self.adds_bos else bos + ids

    def encode_completion(self, text: str, stop: bool = True, chat: bool = True) -> tuple[int, ...]:
        """Ids of the text as given, then the stop token: the end of the turn, or of the text where `chat` is False."""
        ids = self._encode(self.anchor + self._hide(text), f"completion {text[:40]!r}")
        return ids[bool(self.anchor) :] + ((self.turn_end_id if chat else self.eos_id,) if stop else ())

    def row(self, prompt: Prompt, completion: str) -> Row:
        """Prompt ids and completion ids, stop token included."""
        ids = self.encode_completion(completion, chat=bool(prompt.messages))
        return Row(prompt_ids=self.encode_prompt(prompt), completion_ids=ids)

    # ---- to text -----------------------------------------------------------------------------------------------------

    def decode(self, ids: Iterable[int]) -> str:
        """The text of a completion, without the stop, pad and other control tokens at its end."""
        kept = list(ids)
        while kept and (kept[-1] in self.stop_ids or kept[-1] in self._control_ids):
            kept.pop()
        anchor = [self.control[self.anchor]] if self.anchor else []
        text = self.tokenizer.decode(anchor + kept, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return str(text).removeprefix(self.anchor)

    # ---- people's text is never a control token ----------------------------------------------------------------------
    # Hazard: the forms below must not occur in what people write, so they carry a nonce. It never reaches the ids.

    @cached_property
    def _controls(self) -> re.Pattern[str]:
        return _matcher(self.control)

    @cached_property
    def _control_ids(self) -> frozenset[int]:
        return frozenset(self.control.values()) - {self.tokenizer.unk_token_id}  # any odd character may become <unk>

    def _hide(self, text: str) -> str:
        """What looks like a control token in people's text, replaced while the template is rendered around it."""
        return self._controls.sub(lambda found: f"\ue002{self.nonce}.{self.control[found[0]]}\ue003", text)

    def _reveal(self, text: str) -> str:
        token = {str(i): token for token, i in self.control.items()}
        return re.sub(f"\ue002{self.nonce}\\.(\\d+)\ue003", lambda found: token[found[1]], text)

    def _mark(self, token: str) -> str:
        """What a control token of the template is written as for `_literal`."""
        return f"\ue000{self.nonce}.{self.control[token]}\ue001"

    @cached_property
    def _literal(self) -> tuple[Tokenizer, dict[int | None, int]]:
        """A tokenizer to which control tokens are plain text, except where they are marked; id of a mark -> real id."""
        backend = copy.deepcopy(_backend(self.tokenizer))
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
        backend.add_special_tokens(list(self.control))  # those of the template that were not special
        for token, i in self.control.items():
            like, mark = self.tokenizer.added_tokens_decoder[i], self._mark(token)
            backend.add_tokens([AddedToken(mark, normalized=False, lstrip=like.lstrip, rstrip=like.rstrip)])
        return backend, {backend.token_to_id(self._mark(token)): i for token, i in self.control.items()}

    def _encode(self, text: str, where: str) -> tuple[int, ...]:
        """Ids of a rendered text: its control tokens count, hidden ones are plain text."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"{where} holds {text[error.start]!r}, half of a surrogate pair; take it out") from error
        if self.nonce not in text:
            # Through the tokenizer, not its backend, which may still carry somebody's truncation. Not verbose: it would
            # warn of texts longer than the model's window, which whoever encodes still measures, cuts or leaves out.
            return tuple(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        backend, real = self._literal
        marked = self._controls.sub(lambda found: self._mark(found[0]), text)
        ids = backend.encode(self._reveal(marked), add_special_tokens=False).ids
        if forged := self._control_ids.intersection(ids):
            token = next(token for token, i in self.control.items() if i in forged)
            raise UserError(f"{where}: {_name(self.tokenizer)} cannot write {token!r} as plain text; take it out")
        return tuple(real.get(i, i) for i in ids)


def _probe(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """A rendered conversation without and with a system message; the second is empty where the template refuses it."""
    turns = _render(tokenizer, _PROBE, "a conversation", generation_prompt=False)
    try:
        return turns, _render(tokenizer, (_PROBE_SYSTEM, *_PROBE), "a system message", generation_prompt=False)
    except UserError:
        return turns, ""


def _render(
    tokenizer: PreTrainedTokenizerBase, messages: Iterable[Message], where: str, generation_prompt: bool
) -> str:
    if not tokenizer.chat_template:
        raise UserError(f"{where}: {_name(tokenizer)} has no chat template; take the model's instruction-tuned variant")
    turns = [{"role": message.role, "content": message.content} for message in messages]
    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=generation_prompt))
    except TemplateError as error:
        raise UserError(f"{where}: the chat template of {_name(tokenizer)} refuses it: {error}") from error


def _matcher(tokens: Iterable[str]) -> re.Pattern[str]:
    """Finds any of the tokens, the longest first; nothing where there are none."""
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)")


def _ids(source: object, key: str) -> list[int]:
    """An id, several, or none."""
    value: Any = getattr(source, key, None)
    return [] if value is None else [int(i) for i in value] if isinstance(value, list | tuple) else [int(value)]


def _backend(tokenizer: Any) -> Tokenizer:
    backend: Tokenizer = tokenizer.backend_tokenizer
    return backend


def _name(tokenizer: PreTrainedTokenizerBase) -> str:
    return repr(tokenizer.name_or_path or type(tokenizer).__name__)
