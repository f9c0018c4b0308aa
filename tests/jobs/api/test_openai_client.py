"""The published `openai` client, with only its address and key changed, can do everything, and every response fits the
client's own types."""

from __future__ import annotations

import csv
import hashlib
import io
import time
from collections.abc import Callable
from typing import Any, TypeVar

import openai
import pytest
from openai.types.fine_tuning import FineTuningJob

from tests.jobs.api.conftest import make_client, training_rows

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("studio")]
T = TypeVar("T")
_trained: dict[str, str] = {}  # the ID of the one job that all tests here share, once it has succeeded


def validated(response: T) -> T:
    """The client builds its objects without validation; this validates them."""
    data = response.to_dict(mode="json")  # type: ignore[attr-defined]
    if data.get("status") == "paused":  # from OpenAI's own example, but missing in its type
        data["status"] = "queued"
    type(response).model_validate(data)  # type: ignore[attr-defined]
    return response


def extension_of(resource: Any) -> Any:
    """What we add to OpenAI's fields."""
    return resource.to_dict()["llmtuner"]


def wait_for(poll: Callable[[], T], condition: Callable[[T], bool], seconds: float = 120) -> T:
    deadline = time.monotonic() + seconds
    while not condition(result := poll()):
        assert time.monotonic() < deadline, result
        time.sleep(0.3)
    return result


def wait_for_status(client: openai.OpenAI, job_id: str, *statuses: str) -> FineTuningJob:
    statuses = statuses or ("succeeded", "failed", "cancelled")
    return wait_for(lambda: client.fine_tuning.jobs.retrieve(job_id), lambda job: job.status in statuses)


@pytest.fixture
def file_id(client: openai.OpenAI) -> str:
    return client.files.create(file=("train.jsonl", training_rows()), purpose="fine-tune").id


@pytest.fixture
def job(client: openai.OpenAI) -> FineTuningJob:
    """A succeeded job, trained once for all tests."""
    if not _trained:
        file = client.files.create(file=("train.jsonl", training_rows()), purpose="fine-tune")
        created = validated(
            client.fine_tuning.jobs.create(
                model="starter",
                training_file=file.id,
                suffix="colours",
                seed=7,
                metadata={"team": "blue"},
                method={
                    "type": "supervised",
                    "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": 8}},
                },
                extra_body={
                    "llmtuner": {
                        "checkpoint_every_steps": 2,
                        "validation_fraction": 0.2,
                        "sequence_length": 64,
                    }
                },
            )
        )
        assert created.status in {"validating_files", "queued"}
        finished = wait_for_status(client, created.id)
        assert finished.status == "succeeded", finished.to_dict()
        _trained["id"] = created.id
    return client.fine_tuning.jobs.retrieve(_trained["id"])


@pytest.fixture
def model(client: openai.OpenAI, job: FineTuningJob) -> str:
    assert job.fine_tuned_model
    wait_for(lambda: [m.id for m in client.models.list()], lambda ids: job.fine_tuned_model in ids)
    return job.fine_tuned_model


def test_a_tuned_model_can_be_fine_tuned_again(
    client: openai.OpenAI, bob_client: openai.OpenAI, model: str, file_id: str
) -> None:
    further = validated(client.fine_tuning.jobs.create(model=model, training_file=file_id))
    assert further.model == model
    client.fine_tuning.jobs.cancel(further.id)
    bobs_file = bob_client.files.create(file=("train.jsonl", training_rows()), purpose="fine-tune").id
    messages = []
    for name in (model, model[:-2] + "~~"):
        with pytest.raises(openai.BadRequestError) as excinfo:
            bob_client.fine_tuning.jobs.create(model=name, training_file=bobs_file)
        messages.append(excinfo.value.message.replace(name, "…"))
    assert messages[0] == messages[1]


# ---- files -------------------------------------------------------------------------------------


def test_a_file_is_uploaded_checked_downloaded_and_deleted(client: openai.OpenAI) -> None:
    file = validated(client.files.create(file=("train.jsonl", training_rows()), purpose="fine-tune"))
    assert (file.bytes, file.filename, file.purpose) == (len(training_rows()), "train.jsonl", "fine-tune")
    ready = wait_for(lambda: validated(client.files.retrieve(file.id)), lambda f: f.status != "uploaded")
    assert ready.status == "processed"
    assert extension_of(ready)["summary"]
    assert client.files.content(file.id).read() == training_rows()
    assert file.id in [validated(f).id for f in client.files.list(purpose="fine-tune")]
    assert client.files.list(order="asc", limit=1).data[0].id <= file.id
    assert validated(client.files.delete(file.id)).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(file.id)


def test_a_file_expires_when_requested(client: openai.OpenAI, users: Any) -> None:
    expires_after: Any = {"anchor": "created_at", "seconds": 3600}
    file = validated(
        client.files.create(
            file=("t.jsonl", training_rows()), purpose="fine-tune", expires_after=expires_after
        )
    )
    assert file.expires_at is not None
    assert abs(file.expires_at - file.created_at - 3600) <= 5
    upload = client.uploads.upload_file_chunked(
        file=training_rows(),
        filename="t.jsonl",
        bytes=len(training_rows()),
        mime_type="application/jsonl",
        purpose="fine-tune",
    )
    assert upload.file is not None
    assert upload.file.expires_at is None
    for invalid in ({"anchor": "created_at", "seconds": 60}, {"anchor": "never", "seconds": 3600}):
        with pytest.raises(openai.BadRequestError):
            client.files.create(file=("t.jsonl", training_rows()), purpose="fine-tune", expires_after=invalid)  # type: ignore[arg-type]
    upload_with_expiry = client.uploads.create(
        bytes=3, filename="a.txt", mime_type="text/plain", purpose="fine-tune", expires_after=expires_after
    )
    part = client.uploads.parts.create(upload_with_expiry.id, data=b"abc")
    completed = client.uploads.complete(upload_with_expiry.id, part_ids=[part.id])
    assert completed.file is not None
    assert completed.file.expires_at


def test_the_client_pages_through_files(client: openai.OpenAI) -> None:
    ids = [
        client.files.create(file=("p.jsonl", training_rows(3 + n)), purpose="fine-tune").id for n in range(5)
    ]
    listed = [file.id for file in client.files.list(limit=2)]
    assert [id for id in listed if id in ids] == ids[::-1]
    assert len(listed) == len(set(listed))
    first = client.files.list(limit=2)
    assert first.has_more
    assert len(first.data) == 2


def test_a_malformed_file_reports_the_line(client: openai.OpenAI) -> None:
    file = client.files.create(file=("bad.jsonl", b'{"messages": [}\n' * 3), purpose="fine-tune")
    rejected = wait_for(lambda: validated(client.files.retrieve(file.id)), lambda f: f.status != "uploaded")
    assert rejected.status == "error"
    assert "1" in (rejected.status_details or "")


def test_a_file_is_uploaded_in_parts_with_its_md5(client: openai.OpenAI) -> None:
    data = training_rows(200)
    upload = validated(
        client.uploads.upload_file_chunked(
            file=data,
            filename="parts.jsonl",
            bytes=len(data),
            mime_type="application/jsonl",
            purpose="fine-tune",
            part_size=4096,
            md5=hashlib.md5(data).hexdigest(),
        )
    )
    assert upload.status == "completed"
    assert upload.file is not None
    assert client.files.content(upload.file.id).read() == data


def test_parts_are_joined_in_the_given_order_and_invalid_ones_rejected(client: openai.OpenAI) -> None:
    upload = validated(
        client.uploads.create(bytes=6, filename="a.txt", mime_type="text/plain", purpose="fine-tune")
    )
    second = validated(client.uploads.parts.create(upload.id, data=b"def"))
    first = validated(client.uploads.parts.create(upload.id, data=b"abc"))
    with pytest.raises(openai.BadRequestError):
        client.uploads.complete(upload.id, part_ids=[first.id])
    with pytest.raises(openai.BadRequestError):
        client.uploads.complete(upload.id, part_ids=[first.id, second.id], md5="0" * 32)
    with pytest.raises(openai.BadRequestError):
        client.uploads.complete(upload.id, part_ids=[first.id, first.id])
    with pytest.raises(openai.BadRequestError):
        client.uploads.parts.create(upload.id, data=b"x" * 100)
    completed = client.uploads.complete(upload.id, part_ids=[first.id, second.id])
    assert completed.file is not None
    assert client.files.content(completed.file.id).read() == b"abcdef"
    repeated = client.uploads.complete(upload.id, part_ids=[first.id, second.id])
    assert repeated.file is not None
    assert repeated.file.id == completed.file.id


def test_an_upload_can_be_cancelled(client: openai.OpenAI) -> None:
    upload = client.uploads.create(bytes=3, filename="a.txt", mime_type="text/plain", purpose="fine-tune")
    assert validated(client.uploads.cancel(upload.id)).status == "cancelled"
    with pytest.raises(openai.BadRequestError):
        client.uploads.parts.create(upload.id, data=b"abc")


# ---- jobs --------------------------------------------------------------------------------------


def test_a_finished_job_has_openais_fields(client: openai.OpenAI, job: FineTuningJob) -> None:
    validated(job)
    assert job.status == "succeeded"
    assert job.model == "starter"
    assert job.seed == 7
    assert job.metadata == {"team": "blue"}
    assert job.hyperparameters.n_epochs == 2
    assert job.hyperparameters.batch_size == 8
    assert job.fine_tuned_model
    assert job.fine_tuned_model.startswith("ft:starter:")
    assert ":colours:" in job.fine_tuned_model
    assert job.trained_tokens
    assert job.finished_at
    extension = extension_of(job)
    assert extension["settings"]["sequence_length"] == 64
    assert extension["plan"]["settings"]["learning_rate"] > 0


def test_jobs_are_listed_and_filtered(client: openai.OpenAI, job: FineTuningJob) -> None:
    assert job.id in [validated(result).id for result in client.fine_tuning.jobs.list(limit=1)]
    blue = list(client.fine_tuning.jobs.list(metadata={"team": "blue"}))
    assert job.id in [result.id for result in blue]
    assert all((result.metadata or {})["team"] == "blue" for result in blue)
    assert not client.fine_tuning.jobs.list(metadata={"team": "red"}).data


def test_events_are_paged_from_newest_to_oldest(client: openai.OpenAI, job: FineTuningJob) -> None:
    events = [validated(event) for event in client.fine_tuning.jobs.list_events(job.id, limit=3)]
    numbers = [int(event.id.rpartition("-")[2]) for event in events]
    assert numbers == list(range(max(numbers), 0, -1))
    metrics = [event for event in events if event.type == "metrics"]
    data: list[Any] = [event.to_dict()["data"] for event in metrics]
    assert any("train_loss" in values for values in data)
    assert all(event.message for event in events)


def test_events_stream_until_the_end(client: openai.OpenAI, job: FineTuningJob) -> None:
    listed = [event.id for event in client.fine_tuning.jobs.list_events(job.id, limit=1000)]
    with client.fine_tuning.jobs.with_streaming_response.list_events(
        job.id, extra_query={"stream": "true"}
    ) as response:
        lines = [line for line in response.iter_lines() if line.startswith("data: ")]
    assert lines[-1] == "data: [DONE]"
    assert len(lines) - 1 == len(listed)


def test_checkpoints_are_listed_and_generate_text(
    client: openai.OpenAI, job: FineTuningJob, model: str
) -> None:
    result = [
        validated(checkpoint) for checkpoint in client.fine_tuning.jobs.checkpoints.list(job.id, limit=1)
    ]
    assert result
    assert [c.step_number for c in result] == sorted((c.step_number for c in result), reverse=True)
    assert result[0].fine_tuned_model_checkpoint == model  # the last checkpoint is the model itself
    assert result[1:]
    assert all(c.fine_tuned_model_checkpoint == f"{model}:ckpt-step-{c.step_number}" for c in result[1:])
    name = result[1].fine_tuned_model_checkpoint
    assert validated(client.models.retrieve(name)).id == name
    response = client.chat.completions.create(
        model=name, messages=[{"role": "user", "content": "colour 1?"}], max_tokens=4, temperature=0
    )
    assert validated(response).choices[0].finish_reason in {"stop", "length"}


def test_the_result_file_is_a_csv_of_the_loss_curve(client: openai.OpenAI, job: FineTuningJob) -> None:
    (file_id,) = job.result_files
    file = validated(client.files.retrieve(file_id))
    content = client.files.content(file_id).read()
    assert (file.purpose, file.bytes) == ("fine-tune-results", len(content))
    table = list(csv.DictReader(io.StringIO(content.decode())))
    assert {"step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy"} == set(
        table[0]
    )
    assert [float(row["train_loss"]) for row in table if row["train_loss"]]
    assert [float(row["valid_loss"]) for row in table if row["valid_loss"]]
    assert file_id in [f.id for f in client.files.list(purpose="fine-tune-results")]


def test_a_job_is_paused_resumed_and_cancelled(client: openai.OpenAI, file_id: str) -> None:
    created = client.fine_tuning.jobs.create(
        model="starter",
        training_file=file_id,
        hyperparameters={"n_epochs": 50, "batch_size": 1},
        extra_body={"llmtuner": {"sequence_length": 64, "validation_fraction": 0}},
    )
    wait_for_status(client, created.id, "running")
    client.fine_tuning.jobs.pause(created.id)
    assert validated(wait_for_status(client, created.id, "paused")).status == "paused"
    assert validated(client.fine_tuning.jobs.resume(created.id)).status in {
        "validating_files",
        "queued",
        "running",
    }
    assert validated(client.fine_tuning.jobs.cancel(created.id)).status == "cancelled"
    assert client.fine_tuning.jobs.cancel(created.id).status == "cancelled"
    with pytest.raises(openai.BadRequestError):
        client.fine_tuning.jobs.resume(created.id)


def test_a_repeated_submission_creates_one_job(client: openai.OpenAI, file_id: str) -> None:
    def create(**options: Any) -> FineTuningJob:
        return client.fine_tuning.jobs.create(model="starter", training_file=file_id, **options)

    created = {create(suffix="twice").id for _ in range(3)}
    created |= {create(suffix="keyed", extra_headers={"Idempotency-Key": "k-1"}).id for _ in range(3)}
    assert len(created) == 2
    with pytest.raises(openai.BadRequestError, match="another request"):
        create(suffix="other", extra_headers={"Idempotency-Key": "k-1"})
    for job_id in created:
        assert client.fine_tuning.jobs.cancel(job_id).status == "cancelled"
    second = create(suffix="twice")
    assert second.id not in created  # once the first has ended, the same request starts a new job
    client.fine_tuning.jobs.cancel(second.id)


# ---- models and generation ---------------------------------------------------------------------

MESSAGES: Any = [{"role": "system", "content": "Name a colour."}, {"role": "user", "content": "colour 3?"}]


def test_models_are_listed_and_described(client: openai.OpenAI, model: str) -> None:
    listed = [validated(result).id for result in client.models.list()]
    assert {"starter", "gpt2", model} <= set(listed)
    assert validated(client.models.retrieve(model)).id == model
    assert validated(client.models.retrieve("starter")).owned_by == "llmtuner"


def test_a_model_can_be_used_by_its_openai_name(
    web: Any, users: Any, client: openai.OpenAI, model: str
) -> None:
    from jobs.registry import tuned_models

    old = "ft:gpt-4o-mini-2024-07-18:acme::9abcDEFg"
    tuned_models.set_aliases(users["alice"].owner, model, [old])
    assert validated(client.models.retrieve(old)).id == old
    options: Any = {"messages": MESSAGES, "max_tokens": 8, "temperature": 0}
    response = validated(client.chat.completions.create(model=old, **options))
    assert response.model == old
    assert (
        response.choices[0].message
        == client.chat.completions.create(model=model, **options).choices[0].message
    )
    with pytest.raises(openai.NotFoundError):
        make_client(web.url, users["bob"].key).chat.completions.create(model=old, **options)
    tuned_models.set_aliases(users["alice"].owner, model, [])
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve(old)


def test_a_streamed_chat_equals_the_whole_response(client: openai.OpenAI, model: str) -> None:
    options: Any = {"model": model, "messages": MESSAGES, "max_tokens": 8, "temperature": 0}
    whole = validated(client.chat.completions.create(**options))
    assert whole.usage is not None
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    chunks = list(
        client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True})
    )
    for chunk in chunks:
        validated(chunk)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason


def test_sampling_with_a_seed_is_repeatable(client: openai.OpenAI, model: str) -> None:
    def sample(seed: int) -> list[str | None]:
        response = client.chat.completions.create(
            model=model, messages=MESSAGES, max_tokens=8, temperature=1.5, seed=seed, n=3
        )
        return [choice.message.content for choice in validated(response).choices]

    assert sample(1) == sample(1)
    assert len({*sample(1), *sample(2), *sample(3)}) > 1


def test_chat_returns_log_probabilities(client: openai.OpenAI, model: str) -> None:
    response = validated(
        client.chat.completions.create(
            model=model, messages=MESSAGES, max_tokens=4, temperature=0, logprobs=True, top_logprobs=3
        )
    )
    logprobs = response.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content
    for token in logprobs.content:
        assert token.logprob <= 0
        assert len(token.top_logprobs) == 3
        assert max(top.logprob for top in token.top_logprobs) == pytest.approx(token.logprob)


def test_completions_support_log_probabilities_stop_and_echo(client: openai.OpenAI, model: str) -> None:
    options: Any = {"model": model, "prompt": "The colour is", "max_tokens": 8, "temperature": 0}
    plain = validated(client.completions.create(**options))
    assert plain.choices[0].text
    scored = validated(client.completions.create(**options, logprobs=2)).choices[0]
    assert scored.text == plain.choices[0].text
    assert scored.logprobs is not None
    assert scored.logprobs.tokens
    assert (
        len(scored.logprobs.tokens)
        == len(scored.logprobs.token_logprobs or [])
        == len(scored.logprobs.top_logprobs or [])
    )
    echoed = client.completions.create(**options, echo=True).choices[0]
    assert echoed.text == "The colour is" + plain.choices[0].text
    cut = plain.choices[0].text.strip()[1:3]
    stopped = client.completions.create(**options, stop=[cut]).choices[0]
    assert stopped.finish_reason == "stop"
    assert stopped.text == plain.choices[0].text[: plain.choices[0].text.index(cut)]
    streamed = "".join(
        c.choices[0].text for c in client.completions.create(**options, stream=True) if c.choices
    )
    assert streamed == plain.choices[0].text


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_longer_than_the_context_is_rejected(client: openai.OpenAI, stream: bool) -> None:
    with pytest.raises(openai.BadRequestError) as excinfo:
        client.completions.create(model="starter", prompt="colour " * 600, stream=stream)
    assert excinfo.value.code == "context_length_exceeded"


def test_choices_are_numbered_across_prompts(client: openai.OpenAI, model: str) -> None:
    response = validated(
        client.completions.create(model=model, prompt=["One", "Two"], n=2, max_tokens=3, seed=1)
    )
    assert [choice.index for choice in response.choices] == [0, 1, 2, 3]
    assert response.usage is not None
    assert response.usage.completion_tokens >= 4


def test_closing_a_stream_frees_its_slot(client: openai.OpenAI, model: str) -> None:
    for _ in range(6):  # more than may run at once: unless slots are freed, the last ones are rejected
        stream = client.completions.create(model="starter", prompt="Once", max_tokens=400, stream=True)
        next(iter(stream))
        stream.close()
        time.sleep(0.5)
    client.completions.create(model="starter", prompt="Once", max_tokens=1)


def test_an_openai_base_model_is_rejected_with_alternatives(client: openai.OpenAI, file_id: str) -> None:
    with pytest.raises(openai.BadRequestError) as excinfo:
        client.fine_tuning.jobs.create(model="gpt-4o-mini", training_file=file_id)
    assert "starter" in str(excinfo.value)
    assert "BASE_MODEL_ALIASES" in str(excinfo.value)
    assert excinfo.value.param == "model"


async def test_the_async_client_works_too(web: Any, users: Any, model: str) -> None:
    async with openai.AsyncOpenAI(
        base_url=f"{web.url}/v1", api_key=users["alice"].key, max_retries=0
    ) as client:
        assert model in [validated(result).id async for result in client.models.list()]
        stream = await client.chat.completions.create(
            model=model, messages=MESSAGES, max_tokens=4, stream=True
        )
        assert [validated(chunk) async for chunk in stream][-1].choices[0].finish_reason
        files = [file.id async for file in client.files.list(limit=2)]
        assert files
        jobs = [validated(job).id async for job in client.fine_tuning.jobs.list(limit=1)]
        assert jobs
        with pytest.raises(openai.NotFoundError):
            await client.fine_tuning.jobs.retrieve("ftjob-0000")


def test_a_deleted_model_is_not_found(web: Any, users: Any, client: openai.OpenAI, model: str) -> None:
    with pytest.raises(openai.NotFoundError):
        make_client(web.url, users["bob"].key).models.delete(model)
    deleted = validated(client.models.delete(model))
    assert (deleted.id, deleted.deleted) == (model, True)
    _trained.clear()
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve(model)
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model=model, messages=MESSAGES)
