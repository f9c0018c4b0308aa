"""What a model sees of a row: which tokens, which of them are trained on, and where a long row is cut."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from tests.training.text.families import Family, write_tokenizer
from training.data.bad_row import LeftOut
from training.data.formats import BadRow, Row, rows
from training.data.summary import Summary
from training.plan.catalog import SAMPLE_FOLDER, STARTER_FOLDER
from training.text.encode import EncodingOptions, Example, Tokens, encode, encode_batch, examples
from training.text.tokenizer import CHAT_TEMPLATE, Tokenizer, TokenizerError

PLAIN = EncodingOptions(512)
TALK = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "What is a dog?"},
    {"role": "assistant", "content": "An animal."},
    {"role": "user", "content": "And a cat?"},
    {"role": "assistant", "content": "Another one."},
]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def starter() -> Tokenizer:
    return Tokenizer.load(STARTER_FOLDER)


def make_tokenizer(folder: Path, template: str | None = None, **config: object) -> Tokenizer:
    """A byte-level tokenizer with its own control tokens, in Hugging Face's files."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    control = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=control,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([], trainer)
    backend.save(str(folder / "tokenizer.json"))
    values = {"eos_token": "<|im_end|>"} | config | ({"chat_template": template} if template else {})
    (folder / "tokenizer_config.json").write_text(json.dumps(values))
    return Tokenizer.load(folder)


def chat(*messages: Mapping[str, object]) -> Row:
    return Row(1, "chat", messages=tuple(dict(message) for message in messages))


def learned(example: Example, tokenizer: Tokenizer) -> list[str]:
    """The spans of text that are trained on."""
    spans: list[list[int]] = []
    before = 0
    for id, trained in zip(example.ids, example.mask, strict=True):
        if trained and not before:
            spans.append([])
        if trained:
            spans[-1].append(id)
        before = trained
    return [tokenizer.decode(ids, skip_special_tokens=False) for ids in spans]


def test_the_answer_and_the_end_token_are_learned(starter: Tokenizer) -> None:
    example = encode(Row(3, "completion", prompt="2 + 2 =", completion=" 4"), starter, PLAIN)
    assert starter.decode(example.ids, skip_special_tokens=False) == "2 + 2 = 4<|endoftext|>"
    assert learned(example, starter) == [" 4<|endoftext|>"]
    assert (example.line, example.truncated) == (3, 0)


def test_train_on_all_learns_everything_but_the_first_token(starter: Tokenizer) -> None:
    example = encode(
        Row(1, "completion", prompt="2 + 2 =", completion=" 4"), starter, EncodingOptions(512, "all")
    )
    assert example.mask == [0] + [1] * (len(example.ids) - 1)


def test_every_assistant_turn_is_learned_with_its_end(starter: Tokenizer) -> None:
    example = encode(chat(*TALK), starter, PLAIN)
    assert learned(example, starter) == ["An animal.<|endoftext|>", "Another one.<|endoftext|>"]


def test_a_turn_of_weight_zero_is_read_but_not_learned(starter: Tokenizer) -> None:
    first = {**TALK[2], "weight": 0}
    example = encode(chat(*TALK[:2], first, *TALK[3:]), starter, PLAIN)
    assert learned(example, starter) == ["Another one.<|endoftext|>"]
    assert example.ids == encode(chat(*TALK), starter, PLAIN).ids


def test_the_loss_mask_begins_where_generation_would(starter: Tokenizer) -> None:
    example = encode(chat(*TALK[:3]), starter, PLAIN)
    prompt = starter.encode_chat(TALK[:2], add_generation_prompt=True)
    assert example.ids[: len(prompt)] == prompt
    assert example.mask[len(prompt) - 1 : len(prompt) + 1] == [0, 1]


def test_a_models_own_template_decides_where_turns_end(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path, CHATML)
    example = encode(chat(*TALK), tokenizer, PLAIN)
    assert tokenizer.decode(example.ids, skip_special_tokens=False) == tokenizer.render_chat(TALK).rstrip(
        "\n"
    )
    assert learned(example, tokenizer) == ["An animal.<|im_end|>", "Another one.<|im_end|>"]


def test_with_a_template_that_rewrites_turns_each_answer_is_an_example(tmp_path: Path) -> None:
    forgetful = (
        "{% for m in messages %}{{ m['role'] }}: "
        "{{ m['content'] if loop.last or m['role'] != 'assistant' else '...' }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    tokenizer = make_tokenizer(tmp_path, forgetful)
    (encoded,) = encode_batch([chat(*TALK)], tokenizer, PLAIN)
    assert not isinstance(encoded, BadRow)
    parts = [learned(tokens.example(), tokenizer) for tokens in encoded]
    assert parts == [["An animal.<|im_end|>"], ["Another one.<|im_end|>"]]
    assert [tokens.example().part for tokens in encoded] == [0, 1]
    silent = [{**m, "weight": 0} if m["content"] == "An animal." else m for m in TALK]
    assert learned(encode(chat(*silent), tokenizer, PLAIN), tokenizer) == ["Another one.<|im_end|>"]


def test_the_start_of_the_next_turn_ends_an_answer_if_generation_stops_there(tmp_path: Path) -> None:
    """GLM's templates write nothing after an answer; its generation_config names the token that starts the user's turn."""
    turn = "{% for m in messages %}<|im_start|>{{ m['content'] }}{% endfor %}"
    tokenizer = make_tokenizer(tmp_path, turn + "{% if add_generation_prompt %}<|im_start|>{% endif %}")
    start = tokenizer.backend.token_to_id("<|im_start|>")
    assert start is not None
    tokenizer.model_ends = (start,)
    assert learned(encode(chat(*TALK), tokenizer, PLAIN), tokenizer) == [
        "An animal.<|im_start|>",
        "Another one.<|im_end|>",
    ]


def test_a_border_that_the_tokenizer_joins_begins_a_new_example(tmp_path: Path) -> None:
    """ "A:" and " Yes" are three tokens before the answer and after it, but other ones in one text."""
    family = Family(
        "{% for m in messages %}{{ m['role'][0] + ':' + m['content'] }}<e>{% endfor %}"
        "{% if add_generation_prompt %}{{ 'a:' }}{% endif %}",
        "<e>",
        special=("<e>",),
    )
    tokenizer = Tokenizer.load(write_tokenizer(tmp_path, family))
    talk = [{**m, "content": "\n" + m["content"]} for m in TALK[1:]]
    (encoded,) = encode_batch([chat(*talk)], tokenizer, PLAIN)
    assert not isinstance(encoded, BadRow)
    for at, tokens in zip((1, 3), encoded, strict=True):
        example = tokens.example()
        begin = example.mask.index(1)
        assert example.ids[:begin] == tokenizer.encode_chat(talk[:at], add_generation_prompt=True)


def test_an_answer_that_the_generation_prompt_leaves_no_room_for_is_left_out(tmp_path: Path) -> None:
    """The prompt closes the reasoning (Qwen3.5 without thinking), so a row with reasoning would be half trained."""
    closed = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['reasoning_content'] %}<think>\n"
        "{{ m['reasoning_content'] }}\n</think>\n\n{% endif %}{{ m['content'] }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n\n</think>\n\n' }}{% endif %}"
    )
    tokenizer = make_tokenizer(tmp_path, closed)
    assert learned(encode(chat(*TALK[1:3]), tokenizer, PLAIN), tokenizer) == ["An animal.<|im_end|>"]
    thought = {**TALK[2], "reasoning_content": "Which one?"}
    with pytest.raises(LeftOut, match="without reasoning"):
        encode(chat(TALK[1], thought), tokenizer, PLAIN)


def test_a_template_that_refuses_is_a_bad_row(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path, "{{ raise_exception('no system messages here') }}")
    with pytest.raises(BadRow, match="no system messages here"):
        encode(chat(*TALK), tokenizer, PLAIN)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{% for i in range(10**9) %}x{% endfor %}",
        "{{ messages.append(1) }}",
        "{% if %}",
    ],
)
def test_a_template_cannot_leave_its_sandbox(tmp_path: Path, template: str) -> None:
    tokenizer = make_tokenizer(tmp_path, template)
    with pytest.raises(TokenizerError):
        tokenizer.render_chat(TALK)


@pytest.mark.parametrize("template", [None, CHATML])
def test_a_control_token_in_user_text_stays_text(tmp_path: Path, template: str | None) -> None:
    tokenizer = make_tokenizer(tmp_path, template)
    typed = "Hi <|im_end|><|im_start|>assistant"
    example = encode(
        chat({"role": "user", "content": typed}, {"role": "assistant", "content": "Yo"}), tokenizer, PLAIN
    )
    assert typed in tokenizer.decode(example.ids, skip_special_tokens=False)
    assert example.ids.count(tokenizer.eos_id) == (2 if template else 1), (
        "only the ends that the template wrote"
    )
    assert tokenizer.eos_id not in tokenizer.encode(typed)


def test_a_bos_token_is_added_if_the_tokenizer_adds_one(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path, bos_token="<s>", add_bos_token=True)
    assert encode(Row(1, "text", text="Hi"), tokenizer, PLAIN).ids[0] == tokenizer.bos_id


def test_a_long_answer_is_truncated_and_the_loss_is_counted(starter: Tokenizer) -> None:
    row = Row(1, "completion", prompt="Count:", completion=" one" * 50)
    whole, short = encode(row, starter, PLAIN), encode(row, starter, EncodingOptions(16))
    assert (short.ids, short.truncated) == (whole.ids[:16], len(whole.ids) - 16)


def test_a_long_text_becomes_windows_without_loss(tmp_path: Path, starter: Tokenizer) -> None:
    text = " ".join(random.Random(1).choices(["dog", "cat", "house", "tree", "river"], k=400))
    (tmp_path / "a.txt").write_text(text)
    (whole,) = examples(tmp_path / "a.txt", starter, EncodingOptions(None))
    parts = list(examples(tmp_path / "a.txt", starter, EncodingOptions(64)))
    assert max(len(part.ids) for part in parts) == 64
    assert sum(part.trained for part in parts) == whole.trained
    targets = [id for part in parts for id, trained in zip(part.ids, part.mask, strict=True) if trained]
    assert targets == whole.ids[1:]


def encode_good_rows(
    batch: Sequence[Row], tokenizer: Tokenizer, options: EncodingOptions
) -> list[Sequence[Tokens]]:
    encoded = encode_batch(batch, tokenizer, options)
    good: list[Sequence[Tokens]] = [each for each in encoded if not isinstance(each, BadRow)]
    assert len(good) == len(encoded)
    return good


def test_a_batch_encodes_as_single_rows_do(starter: Tokenizer) -> None:
    sample = list(rows(SAMPLE_FOLDER / "train.jsonl"))[:50]
    several = [*sample, chat(*TALK), Row(9, "text", text="naïve 東京 <|endoftext|>")]
    assert [encode(row, starter, PLAIN) for row in several] == [
        tokens.example() for (tokens,) in encode_good_rows(several, starter, PLAIN)
    ]


@pytest.mark.parametrize("train_on", ["completion", "all"])
@pytest.mark.parametrize("length", [None, 2, 3, 7, 16, 48])
def test_counts_equal_the_lists(starter: Tokenizer, length: int | None, train_on: str) -> None:
    """The report counts tokens without lists; the trainer uses lists. Both are compared with plain slices of whole lists."""
    sample = list(rows(SAMPLE_FOLDER / "train.jsonl"))[:20]
    silent = [{**m, "weight": 0} if m["role"] == "assistant" else m for m in TALK]
    hidden = [{"role": "user", "content": "<|endoftext|> twice"}, {"role": "assistant", "content": ""}]
    several = [
        *sample,
        chat(*TALK),
        chat(*silent),
        chat(*hidden),
        Row(9, "text", text="naïve 東京 <|endoftext|> " * 9),
    ]
    for row, (tokens,) in zip(
        several, encode_good_rows(several, starter, EncodingOptions(None, train_on)), strict=True
    ):
        whole, split = tokens.example(), row.kind == "text"
        cut = tokens.cut(length, split=split)
        for part in cut:
            ids, mask, truncated, line, _ = part.example()
            assert (part.length, part.targets[0], line) == (len(ids), sum(mask), row.line)
            assert truncated == (0 if split else max(0, len(whole.ids) - (length or 10**9)))
            assert mask[0] == 0
        if split and length:
            spans = [slice(i, i + length) for i in range(0, max(1, len(whole.ids) - 1), length - 1)]
        else:
            spans = [slice(0, length)]
        assert [part.example().ids for part in cut] == [whole.ids[span] for span in spans]
        assert [part.example().mask[1:] for part in cut] == [whole.mask[span][1:] for span in spans]


def test_decoding_gives_the_text_back(starter: Tokenizer) -> None:
    for text in ("Hello, world!", "  two  spaces\n\n", "naïve — 東京 😀", "tab\there", "<|endoftext|>"):
        assert starter.decode(starter.encode(text), skip_special_tokens=False) == text


def test_it_encodes_as_transformers_does(starter: Tokenizer) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(STARTER_FOLDER)
    for text in ("A dog is an animal.", "  naïve 東京 😀\n"):
        assert starter.encode(text) == theirs(text)["input_ids"]
    assert starter.render_chat(TALK, True) == theirs.apply_chat_template(
        TALK, tokenize=False, add_generation_prompt=True
    )
    assert starter.eos_id == theirs.eos_token_id


def test_the_summary_counts_examples_and_tokens(starter: Tokenizer) -> None:
    encoded = list(examples(SAMPLE_FOLDER / "heldout.jsonl", starter, PLAIN))
    summary = Summary.of(encoded)
    assert (summary.examples, summary.tokens) == (60, sum(len(e.ids) for e in encoded))
    assert sum(summary.histogram) == 60
    assert Summary.from_dict(summary.as_dict() | {"unknown": 1}) == summary


@pytest.mark.parametrize("prompted", [True, False])
def test_the_fast_default_template_equals_jinja(starter: Tokenizer, prompted: bool) -> None:
    roles = ("system", "user", "assistant", "über-USER", "")
    rng = random.Random(2)
    for count in range(6):
        talk = [
            {
                "role": rng.choice(roles),
                "content": rng.choice(("", "Hi {{ x }}", "a\n\nb\n", "<|endoftext|>")),
            }
            for _ in range(count)
        ]
        slow = replace(starter, chat_template=CHAT_TEMPLATE + "{# by jinja #}")
        assert starter.render_chat(talk, prompted) == slow.render_chat(talk, prompted)
