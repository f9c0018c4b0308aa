"""Completions and chats as at OpenAI: each parameter takes effect, is rejected by name, or is ignored as documented."""

from __future__ import annotations

import hashlib
import re
from typing import Any

import openai
import pytest

from jobs.api import parameters
from jobs.api.schemas import generation as schemas
from jobs.registry import tuned_models
from jobs.store import blobs, tables
from jobs.store.tables import TunedModel
from tests.jobs.api.conftest import ApiUser
from tests.services import ROOT
from training.text.tokenizer import Tokenizer

pytestmark = pytest.mark.slow
STARTER = ROOT / "training/starter/model"
MESSAGES: Any = [{"role": "user", "content": "colour?"}]
PROMPT = "A lamp is"


@pytest.fixture
def inference_client(web_with_inference: Any, client: openai.OpenAI) -> openai.OpenAI:
    """Alice's client, with a worker running to answer it."""
    return client


def complete(client: openai.OpenAI, **options: Any) -> str:
    response = client.completions.create(
        **{"model": "starter", "prompt": PROMPT, "max_tokens": 12, "temperature": 0, **options}
    )
    return response.choices[0].text


# ---- parameters ------------------------------------------------------------------------------------------------------


def test_the_docs_have_the_table_of_parameters() -> None:
    text = (ROOT / "docs/api.md").read_text()
    section = re.search(r"<!-- parameters -->\n(.*?)\n<!-- /parameters -->", text, re.DOTALL)
    assert section, "docs/api.md has no section for the parameters"
    assert section[1] == parameters.as_markdown()


@pytest.mark.parametrize(
    ("place", "schema"),
    [
        ("chat", schemas.ChatCreate),
        ("completions", schemas.CompletionCreate),
        ("message", schemas.Message),
    ],
)
def test_the_table_lists_what_the_schema_accepts(place: str, schema: Any) -> None:
    assert parameters.names(place, "supported") == set(schema.model_fields)


UNSUPPORTED: dict[str, Any] = {
    "function_call": {"name": "f"},
    "modalities": ["text", "audio"],
    "audio": {"voice": "alloy", "format": "wav"},
    "web_search_options": {},
    "prediction": {"type": "content", "content": "x"},
    "reasoning_effort": "high",
    "verbosity": "low",
    "guided_json": {"type": "object"},
    "guided_choice": ["a", "b"],
    "structured_outputs": {"json": {}},
    "tool_choice": "required",
    "response_format": {"type": "json_object"},
    "presence_penalty": 0.5,
    "frequency_penalty": -1,
    "logit_bias": {"50256": -100},
    "beams": 4,  # an unknown parameter
}


@pytest.mark.parametrize("name", UNSUPPORTED)
@pytest.mark.parametrize("endpoint", ["chat/completions", "completions"])
def test_an_unsupported_parameter_is_rejected_by_name(
    client: openai.OpenAI, endpoint: str, name: str
) -> None:
    body: dict[str, Any] = {"messages": MESSAGES} if endpoint.startswith("chat") else {"prompt": PROMPT}
    body |= {"model": "starter", name: UNSUPPORTED[name]}
    with pytest.raises(openai.BadRequestError) as excinfo:
        client.post(f"/{endpoint}", cast_to=object, body=body)
    assert excinfo.value.param == name
    assert name in excinfo.value.message


def test_other_unsupported_parameters_are_rejected_with_any_value(client: openai.OpenAI) -> None:
    for name in parameters.names("chat", "refused") - set(UNSUPPORTED):
        with pytest.raises(openai.BadRequestError) as excinfo:
            client.post(
                "/chat/completions",
                cast_to=object,
                body={"model": "starter", "messages": MESSAGES, name: "something"},
            )
        assert excinfo.value.param == name


def test_ignored_parameters_and_neutral_values_are_accepted(inference_client: openai.OpenAI) -> None:
    harmless: dict[str, Any] = {
        "user": "u-1",
        "safety_identifier": "s",
        "store": False,
        "metadata": {"a": "b"},
        "service_tier": "auto",
        "prompt_cache_key": "k",
        "parallel_tool_calls": True,
    }
    assert set(harmless) <= parameters.names("chat", "ignored")
    neutral = {
        name: row.neutral[0]
        for (place, name), row in parameters.ROWS.items()
        if place == "chat" and row.neutral
    }
    unset = dict.fromkeys(parameters.names("chat", "refused"))
    response = inference_client.chat.completions.create(
        model="starter", messages=MESSAGES, max_tokens=2, extra_body={**unset, **neutral, **harmless}
    )
    assert response.choices[0].message.role == "assistant"


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "assistant", "content": None}, "messages.1.content"),
        ({"role": "assistant", "content": None, "tool_calls": []}, "messages.1.content"),
        ({"role": "user", "content": "", "tool_calls": [{"id": "c"}]}, "messages.1.tool_calls"),
        ({"role": "assistant", "content": "4", "tool_call_id": "c"}, "messages.1.tool_call_id"),
        ({"role": "user", "content": "x", "name": "bob"}, "messages.1.name"),
        ({"role": "user", "content": "x", "mood": "good"}, "messages.1.mood"),
    ],
)
def test_an_unsupported_message_is_rejected_with_its_position(
    client: openai.OpenAI, message: Any, param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as excinfo:
        client.chat.completions.create(model="starter", messages=[*MESSAGES, message])
    assert excinfo.value.param == param
    assert "messages.1" in excinfo.value.message
    assert "valid" not in excinfo.value.message  # our own message, not pydantic's


def test_a_models_reply_can_be_sent_back(inference_client: openai.OpenAI) -> None:
    first = inference_client.chat.completions.create(model="starter", messages=MESSAGES, max_tokens=3)
    history = [
        *MESSAGES,
        first.choices[0].message.model_dump(),
        {"role": "user", "content": "And?", "name": None},
    ]
    assert inference_client.chat.completions.create(model="starter", messages=history, max_tokens=2).choices


def test_top_k_min_p_and_repetition_penalty_take_effect(inference_client: openai.OpenAI) -> None:
    greedy = complete(inference_client, max_tokens=30)
    hot = {"max_tokens": 30, "temperature": 2, "seed": 5}
    assert complete(inference_client, **hot) != greedy
    assert complete(inference_client, **hot, extra_body={"top_k": 1}) == greedy
    assert complete(inference_client, **hot, extra_body={"min_p": 1.0}) == greedy
    assert complete(inference_client, max_tokens=30, extra_body={"repetition_penalty": 2.0}) != greedy
    for name, invalid in (("top_k", -2), ("min_p", 1.5), ("repetition_penalty", 0)):
        with pytest.raises(openai.BadRequestError) as excinfo:
            complete(inference_client, extra_body={name: invalid})
        assert (excinfo.value.param or "").startswith(name)


# ---- completions -----------------------------------------------------------------------------------------------------


def test_prompts_may_be_token_ids(inference_client: openai.OpenAI) -> None:
    tokenizer = Tokenizer.load(STARTER)
    ids = tokenizer.encode(PROMPT)
    assert complete(inference_client, prompt=ids) == complete(inference_client)
    response = inference_client.completions.create(
        model="starter", prompt=[ids, tokenizer.encode("The dog")], max_tokens=8, temperature=0, echo=True
    )
    assert [choice.text for choice in response.choices] == [
        PROMPT + complete(inference_client, max_tokens=8),
        "The dog" + complete(inference_client, prompt="The dog", max_tokens=8),
    ]
    invalid_prompts: list[Any] = [[[1, 2], []], [1, "a"], [[1], "a"], [], [10**6], [-1]]
    for prompt in invalid_prompts:
        with pytest.raises(openai.BadRequestError) as excinfo:
            inference_client.completions.create(model="starter", prompt=prompt)
        assert (excinfo.value.param or "prompt").startswith("prompt")


def test_one_request_takes_up_to_128_prompts(inference_client: openai.OpenAI) -> None:
    prompts = [f"The {i} dogs" for i in range(128)]
    response = inference_client.completions.create(
        model="starter", prompt=prompts, max_tokens=3, temperature=0
    )
    assert [choice.index for choice in response.choices] == list(range(128))
    for i in (0, 17, 127):
        assert response.choices[i].text == complete(inference_client, prompt=prompts[i], max_tokens=3)
    assert response.usage
    assert response.usage.prompt_tokens == sum(len(Tokenizer.load(STARTER).encode(text)) for text in prompts)
    with pytest.raises(openai.BadRequestError) as excinfo:
        inference_client.completions.create(model="starter", prompt=["x"] * 129)
    assert excinfo.value.param == "prompt"
    streamed: dict[int, str] = {}
    for chunk in inference_client.completions.create(
        model="starter", prompt=prompts[:9], max_tokens=3, temperature=0, stream=True
    ):
        for choice in chunk.choices:
            streamed[choice.index] = streamed.get(choice.index, "") + choice.text
    assert streamed == {i: response.choices[i].text for i in range(9)}


def test_a_prompt_is_scored_without_generating(inference_client: openai.OpenAI) -> None:
    response = inference_client.completions.create(
        model="starter", prompt=[PROMPT, "The dog"], max_tokens=0, echo=True, logprobs=0
    )
    assert [choice.text for choice in response.choices] == [PROMPT, "The dog"]
    for choice in response.choices:
        assert choice.logprobs
        scores = choice.logprobs.token_logprobs or []
        assert scores[0] is None  # type: ignore[comparison-overlap]  # as OpenAI has it
        assert all(score < 0 for score in scores[1:])
        assert choice.finish_reason == "length"
    assert response.usage
    assert response.usage.completion_tokens == 0


def test_values_without_effect_are_accepted(inference_client: openai.OpenAI) -> None:
    greedy = complete(inference_client)
    assert complete(inference_client, temperature=1, top_p=0) == greedy
    assert complete(inference_client, stop="") == greedy
    assert complete(inference_client, stop=["", ""]) == greedy
    chat = inference_client.chat.completions.create
    assert chat(model="starter", messages=MESSAGES, max_tokens=2, top_logprobs=0).choices[0].logprobs is None
    scored = chat(model="starter", messages=MESSAGES, max_tokens=2, logprobs=True, top_logprobs=0).choices[0]
    assert scored.logprobs
    assert [token.top_logprobs for token in scored.logprobs.content or []] == [[], []]


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_longer_than_the_context_gets_openais_error(
    inference_client: openai.OpenAI, stream: bool
) -> None:
    long_prompt = "colour " * 900
    calls: dict[str, Any] = {
        "prompt": lambda: inference_client.completions.create(
            model="starter", prompt=long_prompt, stream=stream
        ),
        "messages": lambda: inference_client.chat.completions.create(
            model="starter", messages=[{"role": "user", "content": long_prompt}], stream=stream
        ),
    }
    for param, call in calls.items():
        with pytest.raises(openai.BadRequestError) as excinfo:
            call()
        assert excinfo.value.code == "context_length_exceeded"
        assert excinfo.value.param == param
        assert re.search(r"This model's maximum context length is \d+ tokens\.", excinfo.value.message)


def make_model(user: ApiUser, name: str, *, truncate: str = "") -> str:
    """A tuned model with the files of the starter; only half of the file `truncate` is stored."""
    model = TunedModel(user.owner, f"ft:starter:{name}::12345678", name=name, base="starter", method="full")
    model.prefix, model.files = f"models/{name}", []
    for path in sorted(STARTER.iterdir()):
        content = path.read_bytes()
        stored = content[: len(content) // 2] if path.name == truncate else content
        blobs.put_file(f"{model.prefix}/{path.name}", [stored])
        file_entry = {
            "name": path.name,
            "bytes": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
        }
        model.files.append(file_entry)
    tables.put_new(model)
    return str(model.model_id)


@pytest.mark.parametrize("stream", [False, True])
def test_a_truncated_model_is_reported_as_damaged(
    inference_client: openai.OpenAI, users: dict[str, ApiUser], stream: bool
) -> None:
    model = make_model(users["alice"], f"truncated-{stream}", truncate="model.safetensors")
    with pytest.raises(openai.BadRequestError, match="damaged") as excinfo:  # clients do not retry this error
        inference_client.chat.completions.create(model=model, messages=MESSAGES, stream=stream)
    assert excinfo.value.code == "model_damaged"
    assert "Try again" not in excinfo.value.message


def test_a_damaged_local_copy_is_downloaded_again(
    inference_client: openai.OpenAI, users: dict[str, ApiUser]
) -> None:
    model = make_model(users["alice"], "repaired")
    weights = tuned_models.fetch(tuned_models.get_for(users["alice"].owner, model)) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(openai.BadRequestError, match="damaged"):
        complete(inference_client, model=model)
    assert complete(inference_client, model=model) == complete(inference_client)
