"""Builds what the starter ships besides weights: seeded data, the tokenizer, the model's shape.

seeds -> data/*.jsonl, pretraining corpus -> tokenizer -> config.json; a trained policy -> model.safetensors.

    python recipes/starter/build.py                       # data, corpus, tokenizer, config
    alignlab train recipes/starter/pretrain.yaml          # trains the model on the corpus
    python recipes/starter/build.py --adopt RUN_FOLDER    # ships the trained weights
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import Gemma3TextConfig, GenerationConfig, PreTrainedTokenizerFast

from alignlab.starter import ASSETS
from alignlab.tasks import Split, demonstrations, get_task, pairs, pretraining
from alignlab.types import Example, Pair

TASKS = ("reasoning", "safety", "clinical", "code")
SEED = 20240
DEMONSTRATIONS: dict[Split, int] = {"train": 1200, "validation": 200, "test": 300}
PAIRS: dict[Split, int] = {"train": 1200, "validation": 200}
CORPUS_SHARES = {"reasoning": 0.58, "safety": 0.1, "clinical": 0.14, "code": 0.18}
CORPUS_ROWS = 60_000
CORPUS = Path("runs/starter-corpus/pretrain.jsonl")

VOCABULARY_SIZE = 1280
CONTROL_TOKENS = ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>")
"""In the order of their ids, from 0. All are special: dropped by `decode(..., skip_special_tokens=True)`."""
PIECES = r"</?[a-z]+>| [-+*/%=<>]+ (?=\d)|\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}<]+| ?<|\s+(?!\S)|\s"
"""What a token may not reach beyond: a tag, an operator before a digit, one digit, a word, marks, white space."""
CHAT_TEMPLATE = """\
{{ bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set preamble = messages[0]['content'] + '\\n\\n' %}
    {%- set turns = messages[1:] %}
{%- else %}
    {%- set preamble = '' %}
    {%- set turns = messages %}
{%- endif %}
{%- for turn in turns %}
    {%- if turn['role'] != ('user' if loop.index0 % 2 == 0 else 'assistant') %}
        {{- raise_exception('Roles must alternate user, assistant, user, ..; a system message may only come first.') }}
    {%- endif %}
    {{- '<start_of_turn>' + ('user' if turn['role'] == 'user' else 'model') + '\\n' }}
    {{- (preamble if loop.first else '') + turn['content'] | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<start_of_turn>model\\n' }}
{%- endif %}
"""
"""The format of Gemma 3: no system turn, content trimmed, the assistant is called model."""


def row(item: Example | Pair) -> dict[str, Any]:
    """One line of a data file: `messages` hold the prompt; the completion(s), answer and meta stand beside them."""
    if isinstance(item, Example):
        said = {"completion": item.completion}
    else:
        said = {"chosen": item.chosen, "rejected": item.rejected}
    answer = {} if item.prompt.answer is None else {"answer": item.prompt.answer}
    messages = [asdict(message) for message in item.prompt.messages]
    return (
        {"id": item.prompt.id, "task": item.prompt.task, "messages": messages}
        | said
        | answer
        | {"meta": dict(item.prompt.meta)}
    )


def jsonl(items: Iterable[Example | Pair]) -> str:
    return "".join(json.dumps(row(item), ensure_ascii=False, separators=(",", ":")) + "\n" for item in items)


def data_files() -> Iterator[tuple[str, str]]:
    """`(path below assets/data, text)` of every data file."""
    for name in TASKS:
        task = get_task(name)
        for split, count in DEMONSTRATIONS.items():
            yield f"{name}/{split}.jsonl", jsonl(demonstrations(task, split, count, SEED))
        for split, count in PAIRS.items():
            yield f"{name}/pairs.{split}.jsonl", jsonl(pairs(task, split, count, SEED))


def corpus(num_rows: int) -> list[Example]:
    """Unaligned behaviour of all tasks; interleaved so that any prefix has about the same shares."""
    parts = [pretraining(get_task(name), round(num_rows * share), SEED) for name, share in CORPUS_SHARES.items()]
    placed = [((i + 0.5) / len(part), item) for part in parts for i, item in enumerate(part)]
    return [item for _, item in sorted(placed, key=lambda pair: pair[0])]


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE over the whole byte alphabet: any UTF-8 text round-trips, and no token holds two digits."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        min_frequency=2,
        special_tokens=list(CONTROL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    wrapped = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        additional_special_tokens=["<start_of_turn>", "<end_of_turn>"],
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def model_config(vocab_size: int) -> Gemma3TextConfig:
    """A small Gemma 3: every field that shapes the model is set, as the class defaults are no real model's."""
    return Gemma3TextConfig(
        architectures=["Gemma3ForCausalLM"],
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=32,
        query_pre_attn_scalar=32,
        hidden_activation="gelu_pytorch_tanh",
        max_position_embeddings=2048,
        sliding_window=64,
        layer_types=["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        rope_parameters={
            "full_attention": {"rope_type": "default", "rope_theta": 1_000_000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        },
        rms_norm_eps=1e-6,
        initializer_range=0.088,
        attention_bias=False,
        attention_dropout=0.0,
        attn_logit_softcapping=None,
        final_logit_softcapping=None,
        tie_word_embeddings=True,
        use_cache=True,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
        dtype="float32",
    )


def generation_config() -> GenerationConfig:
    return GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=True, pad_token_id=0, eos_token_id=[1, 4], bos_token_id=2
    )


def build(assets: Path, corpus_path: Path, num_rows: int) -> None:
    """Writes everything but the weights."""
    for path, text in data_files():
        write(assets / "data" / path, text)
    examples = corpus(num_rows)
    write(corpus_path, jsonl(examples))
    words = (text for item in examples for text in (item.prompt.messages[0].content, item.completion))
    tokenizer = train_tokenizer(words)
    tokenizer.save_pretrained(assets)
    model_config(len(tokenizer)).save_pretrained(assets)
    generation_config().save_pretrained(assets)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", newline="\n")


def adopt(run_folder: Path, assets: Path) -> None:
    """Copies the weights of a run's newest policy into the assets."""
    found = sorted(run_folder.rglob("policy/model.safetensors"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise SystemExit(f"build.py: no policy/model.safetensors below {run_folder}; give the folder of a finished run")
    shutil.copyfile(found[-1], assets / "model.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--adopt", type=Path, metavar="RUN_FOLDER", help="only ship the weights of this finished run")
    parser.add_argument("--assets", type=Path, default=ASSETS, help="where to write (default: inside the package)")
    parser.add_argument("--corpus", type=Path, default=CORPUS, help=f"pretraining corpus (default: {CORPUS})")
    parser.add_argument("--rows", type=int, default=CORPUS_ROWS, help=f"its rows (default: {CORPUS_ROWS})")
    options = parser.parse_args()
    if options.adopt:
        adopt(options.adopt, options.assets)
    else:
        build(options.assets, options.corpus, options.rows)


if __name__ == "__main__":
    main()
