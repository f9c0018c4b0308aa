"""Generation compared with that of transformers, and the guarantees of streamed text."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers

from tests.training.tiny import gpt2, write_model
from training.models.decoder import TransformerDecoder, sample
from training.models.generate import GenerateError, GenerateOptions, TextStream, Token, generate
from training.models.transformer import Transformer
from training.text.tokenizer import Tokenizer

PROMPT = "the cat sat"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(folder: Path) -> Transformer:
    return Transformer.load(folder)


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.load(folder)


@pytest.fixture(scope="module")
def theirs(folder: Path) -> transformers.GPT2LMHeadModel:
    return transformers.GPT2LMHeadModel.from_pretrained(folder, attn_implementation="eager").eval()


def write(model, tokenizer, prompt: str = PROMPT, **options):
    return generate(model, tokenizer, tokenizer.encode(prompt), GenerateOptions(ignore_eos=True, **options))


@pytest.mark.parametrize("pack", [True, False])
def test_greedy_tokens_are_those_of_transformers(model, tokenizer, theirs, pack):
    ids = tokenizer.encode(PROMPT)
    options = GenerateOptions(max_tokens=30, ignore_eos=True)
    [ours] = generate(model, tokenizer, ids, options, decoder=model.decoder(pack))
    whole = theirs.generate(
        torch.tensor([ids]), max_new_tokens=30, min_new_tokens=30, do_sample=False, pad_token_id=0
    )
    assert ours.ids == whole[0, len(ids) :].tolist()


def test_cached_logits_equal_those_of_the_whole_text(model, theirs):
    decoder = model.decoder()
    ids = list(range(5, 25))
    cache, logits = decoder.prefill(ids[:7], room=30)
    rows = [logits] + [decoder.step([cache], [i])[0] for i in ids[7:]]
    with torch.no_grad():
        truth = theirs(torch.tensor([ids])).logits[0, 6:]
    torch.testing.assert_close(torch.stack(rows), truth, rtol=1e-4, atol=1e-4)


def test_sequences_of_unequal_length_do_not_disturb_each_other(model):
    decoder = model.decoder()
    prompts = [[7, 8, 9], list(range(20, 40)), [3]]
    alone = []
    for prompt in prompts:
        cache, _ = decoder.prefill(prompt, room=30)
        alone.append(decoder.step([cache], [11])[0])
    caches = [decoder.prefill(prompt, room=30)[0] for prompt in prompts]
    torch.testing.assert_close(decoder.step(caches, [11] * 3), torch.stack(alone), rtol=1e-4, atol=1e-5)


def test_a_seed_reproduces_the_text_and_each_sequence_differs(model, tokenizer):
    first = write(model, tokenizer, max_tokens=20, temperature=1.0, seed=7, n=3)
    again = write(model, tokenizer, max_tokens=20, temperature=1.0, seed=7, n=3)
    assert [c.ids for c in first] == [c.ids for c in again]
    assert len({tuple(c.ids) for c in first}) == 3
    assert write(model, tokenizer, max_tokens=20, temperature=1.0, seed=8)[0].ids != first[0].ids


def test_logprobs_are_those_of_transformers(model, tokenizer, theirs):
    [ours] = write(model, tokenizer, max_tokens=6, logprobs=3, temperature=0.7, seed=1)
    ids = tokenizer.encode(PROMPT) + ours.ids
    with torch.no_grad():
        truth = torch.log_softmax(theirs(torch.tensor([ids])).logits[0], -1)
    for i, token in enumerate(ours.tokens):
        row = truth[len(ids) - 7 + i]
        assert token.logprob == pytest.approx(float(row[token.id]), abs=1e-4)
        assert [lp for _, lp in token.top] == pytest.approx(row.topk(3).values.tolist(), abs=1e-4)


def test_echo_gives_the_prompt_back_with_its_logprobs(model, tokenizer, theirs):
    ids = tokenizer.encode(PROMPT)
    [ours] = write(model, tokenizer, max_tokens=0, logprobs=1, echo=True)
    with torch.no_grad():
        truth = torch.log_softmax(theirs(torch.tensor([ids])).logits[0], -1)
    assert ours.text == PROMPT
    assert ours.finish_reason == "length"
    assert ours.tokens[0].logprob is None
    assert [t.logprob for t in ours.tokens[1:]] == pytest.approx(
        [float(truth[i, t]) for i, t in enumerate(ids[1:])], abs=1e-4
    )


def test_generation_stops_at_the_end_token_and_does_not_show_it(tokenizer):
    model = gpt2(seed=3)
    ids = tokenizer.encode(PROMPT)
    written = write(model, tokenizer, max_tokens=30)[0].ids
    end = replace(tokenizer, backend=tokenizer.backend)
    end.__dict__["eos_id"] = written[4]  # the fifth token it generates becomes the end token
    [ours] = generate(model, end, ids, GenerateOptions(max_tokens=30))
    assert ours.ids == written[: written.index(written[4])]
    assert ours.finish_reason == "stop"


def test_generation_stops_at_the_context_and_refuses_a_longer_prompt(tokenizer):
    model = gpt2(context=16)
    assert len(write(model, tokenizer, max_tokens=100)[0].ids) == 16 - len(tokenizer.encode(PROMPT))
    with pytest.raises(GenerateError, match="maximum context length is 16 tokens"):
        write(model, tokenizer, prompt="the cat " * 20)


def test_generation_can_be_cancelled_between_two_tokens(model, tokenizer):
    received: list[Token] = []
    [ours] = generate(
        model,
        tokenizer,
        [5, 6],
        GenerateOptions(max_tokens=30, ignore_eos=True),
        received.append,
        lambda: len(received) >= 4,
    )
    assert (len(ours.ids), ours.finish_reason) == (4, "cancelled")


# --- sampling --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"),
    [
        (0, 1.0, 0),
        (5, 1.0, 0),
        (0, 0.6, 0),
        (8, 0.5, 0),
        (0, 0.999, 0),
        (0, 1.0, 0.1),
        (20, 1.0, 0.2),
        (0, 0.9, 0.05),
        (0, 1.0, 0.0001),
    ],
)
def test_sampling_follows_the_distribution_of_transformers_filters(top_k, top_p, min_p):
    logits = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 2
    scores = logits[None] / 0.8
    if top_k:
        scores = transformers.TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = transformers.TopPLogitsWarper(top_p)(None, scores)
    if min_p:
        scores = transformers.MinPLogitsWarper(min_p)(None, scores)
    truth = torch.softmax(scores[0], -1)
    draws = 4000
    counts = torch.zeros(1000)
    # evenly spaced numbers instead of random ones: the counts are the probabilities, to within 1 / draws
    for i in range(draws):
        counts[sample(logits, 0.8, top_k, top_p, (i + 0.5) / draws, min_p)] += 1
    assert float((counts / draws - truth).abs().max()) <= 1.5 / draws


def test_top_p_zero_takes_the_most_likely_token():
    logits = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    assert {sample(logits, 2.0, 0, 0.0, i / 10) for i in range(10)} == {int(logits.argmax())}


def test_the_repetition_penalty_is_that_of_transformers(model, tokenizer, theirs):
    ids = tokenizer.encode(PROMPT)
    [plain] = write(model, tokenizer, max_tokens=30)
    [ours] = write(model, tokenizer, max_tokens=30, repetition_penalty=1.7)
    whole = theirs.generate(
        torch.tensor([ids]),
        max_new_tokens=30,
        min_new_tokens=30,
        do_sample=False,
        repetition_penalty=1.7,
        pad_token_id=0,
        suppress_tokens=None,
    )
    assert ours.ids == whole[0, len(ids) :].tolist()
    assert ours.ids != plain.ids


# --- text ------------------------------------------------------------------------------------------


def stream(tokenizer: Tokenizer, ids: list[int], stop: tuple[str, ...] = ()) -> tuple[str, list[str]]:
    text = TextStream(tokenizer, [], stop)
    pieces = []
    for i in ids:
        pieces.append(text.push(i))
        if text.stopped:
            return "".join(pieces), pieces
    return "".join([*pieces, text.finish()]), pieces


def test_characters_are_never_cut_in_streamed_text(tokenizer):
    text = "naïve 猫 🎉 end"
    whole, pieces = stream(tokenizer, tokenizer.encode(text))
    assert whole == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_invalid_bytes_are_released_eventually(tokenizer):
    lone = tokenizer.encode("🎉")[:1]
    whole, _ = stream(tokenizer, lone * 20 + tokenizer.encode(" the cat"))
    assert whole.endswith(" the cat")


@pytest.mark.parametrize("seed", range(30))
def test_a_stop_string_may_span_tokens(tokenizer, seed):
    rng = random.Random(seed)
    text = "".join(rng.choice(["the ", "cat", "猫", "sat on", "é", "a", "b", "ab", "aab"]) for _ in range(12))
    a, b = sorted(rng.sample(range(len(text)), 2))
    whole, pieces = stream(tokenizer, tokenizer.encode(text), (text[a:b], "never there"))
    assert whole == text[: text.find(text[a:b])]
    for i in range(len(pieces)):  # and no piece ever contained text that the stop string removes
        assert whole.startswith("".join(pieces[: i + 1]))


def test_a_decoder_reads_weights_without_copying_them_while_training(model):
    decoder = TransformerDecoder(model.a, model.state_dict(), pack=False)
    assert decoder.embedding.data_ptr() == model.head().data_ptr()
