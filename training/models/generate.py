"""Text generation: a prompt in, tokens out one by one.

`open_sequences` reads a prompt once and starts sequences from it. `advance` generates one token for each
sequence in one batched pass through the model. `generate` is the simple loop over the two; serving/serve.py
advances the sequences of many requests together (continuous batching, as in Orca, OSDI 2022).
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor

from training.data.bad_row import BadRow
from training.data.messages import read_messages, tools_from_text
from training.models.decoder import Decoder, penalized, sample
from training.models.load import load_model
from training.plan import hub
from training.text.call_forms import Call, CallForm
from training.text.tokenizer import Tokenizer
from training.text.tool_calls import CallStream, call_form, overlap

FinishReason = Literal["stop", "length", "cancelled", "tool_calls"]
TopLogprobs = list[tuple[str, float]]


@dataclass(frozen=True)
class GenerateOptions:
    """How to generate. The defaults are greedy, so the same prompt gives the same text."""

    max_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0  # least probability of a token, relative to the most likely one
    repetition_penalty: float = 1.0  # for tokens already in the prompt or the text; 1 = none
    stop: tuple[str, ...] = ()
    seed: int | None = None
    n: int = 1
    logprobs: int | None = None  # k: those of the chosen and of the k most likely tokens, before temperature
    echo: bool = False
    ignore_eos: bool = False
    # Tools that the prompt describes, if their calls are to be separated from the text.
    tools: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True)
class Token:
    """One generated token. Joined, the `text`s are the completion.

    While a character is incomplete or a stop string may have begun, `text` is empty and comes with a later
    token."""

    index: int
    id: int
    token: str
    text: str
    logprob: float | None = None
    top: TopLogprobs = field(default_factory=list)


@dataclass
class Completion:
    """One of the `n` completions."""

    index: int
    text: str
    ids: list[int]
    finish_reason: FinishReason
    tokens: list[Token]
    calls: list[Call] = field(default_factory=list)


class GenerateError(ValueError):
    """The request cannot be answered. `code` is short and stable, the message is for the user."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def generate(
    model: Any,
    tokenizer: Tokenizer,
    prompt_ids: Sequence[int],
    options: GenerateOptions,
    on_token: Callable[[Token], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    decoder: Decoder | None = None,
    form: CallForm | None = None,
) -> list[Completion]:
    """Generates `options.n` completions of `prompt_ids`. Calls `on_token` for each token; `should_stop` ends
    it early.

    Without a `decoder` the model's weights are read in place. To generate a lot, pass
    `model.decoder()`. Raises GenerateError if the prompt is too long."""
    decoder = decoder or model.decoder(pack=False)
    sequences = open_sequences(decoder, tokenizer, prompt_ids, options, form=form)
    written: list[list[Token]] = [[] for _ in sequences]

    def record(sequence: TextSequence, token: Token) -> None:
        written[sequence.index].append(token)
        if on_token is not None:
            on_token(token)

    for sequence in sequences:
        for token in sequence.prompt_tokens:
            record(sequence, token)
    while live := [s for s in sequences if s.finish_reason is None]:
        if should_stop is not None and should_stop():
            for sequence in live:
                sequence.finish_reason = "cancelled"
            break
        advance(decoder, live, record)
    return [
        Completion(
            s.index,
            "".join(t.text for t in written[s.index]),
            s.ids,
            s.finish_reason or "length",
            tokens,
            s.calls,
        )
        for s, tokens in zip(sequences, written, strict=True)
    ]


# --- sequences -------------------------------------------------------------------------------------


@dataclass
class TextSequence:
    """One completion in progress."""

    index: int
    options: GenerateOptions
    tokenizer: Tokenizer
    cache: Any
    logits: Tensor  # (V,): of the next token
    stream: TextStream
    room: int  # tokens it may still generate
    rng: random.Random
    prompt: Sequence[int] = ()
    ids: list[int] = field(default_factory=list)
    prompt_tokens: list[Token] = field(default_factory=list)  # only if they are to be echoed
    finish_reason: FinishReason | None = None
    call_stream: CallStream | None = None

    @property
    def calls(self) -> list[Call]:
        return self.call_stream.calls if self.call_stream else []

    def next_token(self) -> Token | None:
        """Draws the next token from `logits`. None if it is the end token."""
        options = self.options
        logits = self.logits
        if options.repetition_penalty != 1:
            logits = penalized(logits, [*self.prompt, *self.ids], options.repetition_penalty)
        token_id = sample(
            logits, options.temperature, options.top_k, options.top_p, self.rng.random(), options.min_p
        )
        if token_id in self.tokenizer.ends.ids and not options.ignore_eos:
            rest = self._finish("stop", self.stream.finish())
            return self._token(token_id, rest, hidden=True) if rest else None
        self.ids.append(token_id)
        self.room -= 1
        text = self.stream.push(token_id)
        if self.stream.stopped:
            text = self._finish("stop", text)
        elif self.room <= 0:
            text = self._finish("length", text + self.stream.finish())
        elif self.call_stream:
            text = self.call_stream.push(text)
        return self._token(token_id, text)

    def _finish(self, reason: FinishReason, text: str) -> str:
        """The last text. The reason is tool_calls if the answer ended by itself with calls in it."""
        if self.call_stream:
            text = self.call_stream.push(text) + self.call_stream.finish()
        self.finish_reason = "tool_calls" if self.calls and reason == "stop" else reason
        return text

    def _token(self, token_id: int, text: str, hidden: bool = False) -> Token:
        if hidden:  # the end token is never shown; it only releases pending text
            return Token(self.index, token_id, "", text)
        name = self.tokenizer.decode([token_id], skip_special_tokens=False)
        if self.options.logprobs is None:
            return Token(self.index, token_id, name, text)
        logprob, top = logprobs_of(self.logits, token_id, self.options.logprobs, self.tokenizer)
        return Token(self.index, token_id, name, text, logprob, top)


def check_length(count: int, context: int, options: GenerateOptions) -> None:
    """Raises GenerateError if a prompt of `count` tokens leaves no room for an answer.

    The message has OpenAI's wording, because clients search for it."""
    only_scored = options.echo and options.max_tokens == 0
    if count > context or (count == context and not only_scored):
        raise GenerateError(
            "prompt_too_long",
            f"This model's maximum context length is {context} tokens. However, your prompt has {count} tokens"
            f"{'' if count > context else ', which leaves no room for an answer'}. Please reduce its length.",
        )


def open_sequences(
    decoder: Decoder,
    tokenizer: Tokenizer,
    prompt_ids: Sequence[int],
    options: GenerateOptions,
    first: int = 0,
    form: CallForm | None = None,
) -> list[TextSequence]:
    """Reads the prompt once and starts `options.n` sequences from it, numbered from `first`. Their tool calls
    are read in this form. Raises GenerateError."""
    prompt = list(prompt_ids) or [tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id]
    check_length(len(prompt), decoder.context, options)
    # the context holds prompt and answer together
    room = min(options.max_tokens, decoder.context - len(prompt))
    scores = options.echo and options.logprobs is not None
    # Echo with log-probabilities needs the logits of every prompt token, everything else only the last.
    cache, logits = decoder.prefill(prompt, len(prompt) + room, all_tokens=scores)
    echoed = _echo(logits if scores else None, prompt, tokenizer, options) if options.echo else []
    last = logits[-1] if scores else logits
    seed = options.seed if options.seed is not None else random.SystemRandom().getrandbits(63)
    form = form if options.tools else None
    markup = form.markup if form else ()
    return [
        TextSequence(
            first + index,
            options,
            tokenizer,
            cache if index == 0 else decoder.fork(cache),
            last,
            TextStream(tokenizer, prompt, options.stop, markup),
            room,
            # Each sequence has its own generator, so its text does not depend on what else is generated.
            random.Random(f"{seed}:{index}"),  # noqa: S311 (sampling text, not keeping secrets)
            prompt=prompt,
            prompt_tokens=[Token(first + index, t.id, t.token, t.text, t.logprob, t.top) for t in echoed],
            finish_reason=None if room > 0 else "length",
            # All choices of a request end in one line, so they share what may be held back.
            call_stream=CallStream(form, options.tools, MAX_HELD // options.n) if form else None,
        )
        for index in range(options.n)
    ]


def advance(
    decoder: Decoder, sequences: Sequence[TextSequence], record: Callable[[TextSequence, Token], None]
) -> None:
    """Generates one token for each sequence. `record` is called before the pass that computes the next
    logits."""
    for sequence in sequences:
        token = sequence.next_token()
        if token is not None:
            record(sequence, token)
    live = [s for s in sequences if s.finish_reason is None]
    if live:
        logits = decoder.step([s.cache for s in live], [s.ids[-1] for s in live])  # (B, V)
        for sequence, row in zip(live, logits, strict=True):
            sequence.logits = row
    for sequence in sequences:
        if sequence.finish_reason is not None:
            sequence.cache = None  # frees its keys and values, by far the largest part of a finished request


def logprobs_of(logits: Tensor, token_id: int, count: int, tokenizer: Tokenizer) -> tuple[float, TopLogprobs]:
    """Natural log-probabilities of a token and of the `count` most likely ones, before temperature. logits
    (V,)."""
    scores = torch.log_softmax(logits.float(), -1)
    values, ids = torch.topk(scores, min(count, scores.numel()))
    names = tokenizer.token_texts(ids.tolist())
    return float(scores[token_id]), list(zip(names, values.tolist(), strict=True))


def _echo(
    logits: Tensor | None, prompt: list[int], tokenizer: Tokenizer, options: GenerateOptions
) -> list[Token]:
    """The prompt as tokens. The first has no log-probability: nothing predicts it."""
    stream = TextStream(tokenizer, [], ())
    tokens = []
    for i, token_id in enumerate(prompt):
        text = stream.push(token_id) + (stream.finish() if i == len(prompt) - 1 else "")
        name = tokenizer.decode([token_id], skip_special_tokens=False)
        if logits is None or i == 0:
            tokens.append(Token(0, token_id, name, text))
        else:
            logprob, top = logprobs_of(logits[i - 1], token_id, options.logprobs or 0, tokenizer)
            tokens.append(Token(0, token_id, name, text, logprob, top))
    return tokens


# --- text ------------------------------------------------------------------------------------------

MAX_HELD = 200_000  # characters of tool calls; a worker reads lines of at most a megabyte
MAX_PENDING_TOKENS = 8  # a character has at most four bytes; invalid bytes must not be held back forever
BROKEN = "\ufffd"


class TextStream:
    """Incremental detokenization: token ids in, final text out.

    Characters come out whole even if they span several tokens. A stop string and everything after it never
    come out."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int],
        stop: Sequence[str],
        markup: Sequence[str] = (),
    ) -> None:
        """`markup`: control tokens that come out as text; all others do not."""
        self.shown = {i for i in map(tokenizer.backend.token_to_id, markup) if i in tokenizer.special_ids}
        # Decoding starts a few tokens early: some tokenizers write a space only between words.
        self.ids = list(prompt_ids[-4:])
        self.tokenizer, self.stop = tokenizer, [s for s in stop if s]
        self.start, self.done = 0, len(self.ids)  # ids[start:done] are decoded already and give context
        self.pending = ""  # whole characters that may be the start of a stop string
        self.stopped = False

    def push(self, token_id: int) -> str:
        self.ids.append(token_id)
        return self._release(self._decode(final=False), final=False)

    def finish(self) -> str:
        """The text that is still pending, at the end."""
        return "" if self.stopped else self._release(self._decode(final=True), final=True)

    def _decode(self, final: bool) -> str:
        known = self._text(self.ids[self.start : self.done]).rstrip(BROKEN)
        text = self._text(self.ids[self.start :])
        # an incomplete UTF-8 sequence decodes to U+FFFD: wait for the rest of it
        if text.endswith(BROKEN) and not final and len(self.ids) - self.done < MAX_PENDING_TOKENS:
            return ""
        self.start, self.done = self.done, len(self.ids)
        return text[len(known) :]

    def _text(self, ids: list[int]) -> str:
        if not self.shown:
            return self.tokenizer.decode(ids)
        visible = [i for i in ids if i in self.shown or i not in self.tokenizer.special_ids]
        return self.tokenizer.decode(visible, skip_special_tokens=False)

    def _release(self, text: str, final: bool) -> str:
        text = self.pending + text
        stops = [at for at in (text.find(s) for s in self.stop) if at >= 0]
        if stops:
            self.stopped, self.pending = True, ""
            return text[: min(stops)]
        # hold back the longest suffix that could still become a stop string
        keep = 0 if final else max((overlap(text, s) for s in self.stop), default=0)
        self.pending = text[len(text) - keep :]
        return text[: len(text) - keep]


# --- command line ----------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", required=True, help="a model folder, `starter`, or a model name on the Hub"
    )
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("--prompt", help="text to continue")
    group.add_argument(
        "--messages", help='a conversation, or a file with one, as JSON: [{"role": "user", "content": …}]'
    )
    parser.add_argument("--tools", type=Path, help="a JSON file with tool definitions, used with --messages")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 = always the most likely token")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--min-p", type=float, default=0.0)
    parser.add_argument("--repetition-penalty", type=float, default=1.0)
    parser.add_argument("--stop", action="append", default=[], help="stop before this text (can be repeated)")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--n", type=int, default=1, help="number of completions")
    parser.add_argument("--json", action="store_true", help="print one JSON object per completion")


def main(args: argparse.Namespace) -> int:
    """Prints the text while it is generated; several completions one after another. Tool calls come last,
    one per line."""
    try:
        messages = _messages(args.messages) if args.messages else None
        tools = tools_from_text(args.tools.read_text(encoding="utf-8")) if args.tools else []
    except BadRow as error:
        print(f"{error}. {error.fix}", file=sys.stderr)
        return 2
    if tools and messages is None:
        print("--tools needs a conversation. Use --messages instead of --prompt.", file=sys.stderr)
        return 2
    folder = hub.locate(args.model)
    tokenizer, decoder = Tokenizer.load(folder), load_model(folder).decoder()
    prompt = prompt_ids(args.prompt if messages is None else messages, tokenizer, tools)
    ends = () if messages is None else tokenizer.ends.texts
    options = GenerateOptions(
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
        stop=(*args.stop, *ends),
        seed=args.seed,
        n=args.n,
        tools=tuple(tools),
    )
    form = call_form(tokenizer) if tools else None
    live = args.n == 1 and not args.json
    show = (lambda token: print(token.text, end="", flush=True)) if live else None
    for completion in generate(None, tokenizer, prompt, options, show, decoder=decoder, form=form):
        if args.json:
            row: dict[str, Any] = {
                "index": completion.index,
                "text": completion.text,
                "finish_reason": completion.finish_reason,
            }
            if completion.calls:
                row["tool_calls"] = [call._asdict() for call in completion.calls]
            print(json.dumps(row, ensure_ascii=False))
        else:
            print("" if live else f"[{completion.index}] {completion.text}")
            for call in completion.calls:
                print(f"Calls {call.name} with {json.dumps(call.arguments, ensure_ascii=False)}")
    return 0


def _messages(text: str) -> list[dict[str, Any]]:
    """The conversation of the command line. Raises BadRow."""
    if not text.lstrip().startswith("["):
        text = Path(text).read_text(encoding="utf-8")
    return list(read_messages(0, text, {}, extended=True))


def prompt_ids(
    prompt: str | list[int] | list[dict[str, Any]],
    tokenizer: Tokenizer,
    tools: Sequence[Mapping[str, Any]] = (),
) -> list[int]:
    """The token ids of a prompt or conversation, built exactly as in training. Token ids are only
    validated."""
    if isinstance(prompt, str):
        ids = tokenizer.encode(prompt)
        return ids if tokenizer.bos_id is None else [tokenizer.bos_id, *ids]
    if prompt and isinstance(prompt[0], int):
        return check_ids(prompt, tokenizer.vocab_size)
    return tokenizer.encode_chat(cast(list[dict[str, Any]], prompt), add_generation_prompt=True, tools=tools)


def check_ids(ids: Sequence[Any], vocab_size: int) -> list[int]:
    """The ids as a list. Raises GenerateError unless each is a valid token id."""
    wrong = next((i for i in ids if type(i) is not int or not 0 <= i < vocab_size), None)
    if wrong is not None:
        raise GenerateError(
            "bad_request", f"{wrong!r} is not a token id: this model's ids are 0 to {vocab_size - 1}"
        )
    return list(ids)
