"""Every error of `/v1` as the official client sees it: its class, its code, and the parameter it names."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import subprocess
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from django.conf import settings
from django.core.cache import cache
from django.core.files.uploadedfile import SimpleUploadedFile
from django.test import Client
from django.test.client import encode_multipart

from jobs.api import uploads
from llmtuner import body_limit
from tests.jobs.api.conftest import ApiUser, make_client, make_session, training_rows

pytestmark = pytest.mark.usefixtures("web")
MESSAGES: Any = [{"role": "user", "content": "hello"}]


def test_a_wrong_key_is_an_authentication_error(web: Any, users: dict[str, ApiUser]) -> None:
    for key in ("sk-llmt-wrong", users["alice"].key[:-1] + "x", users["alice"].expired, "sk-" + "a" * 5000):
        with pytest.raises(openai.AuthenticationError) as excinfo:
            make_client(web.url, key).models.list()
        assert excinfo.value.code == "invalid_api_key"
        assert excinfo.value.request_id


def test_a_revoked_key_is_rejected_at_once(web: Any, users: dict[str, ApiUser]) -> None:
    from accounts import api_keys

    key, secret = api_keys.create(users["alice"].user, "short", ["read"])
    client = make_client(web.url, secret)
    client.models.list()
    api_keys.revoke(users["alice"].user, key.pk)
    with pytest.raises(openai.AuthenticationError):
        client.models.list()


def test_a_key_allows_only_its_scopes(web: Any, users: dict[str, ApiUser]) -> None:
    reader = make_client(web.url, users["alice"].reader)
    reader.models.list()
    for call in (
        lambda: reader.files.create(file=("a.jsonl", training_rows()), purpose="fine-tune"),
        lambda: reader.models.delete("starter"),
        lambda: reader.chat.completions.create(model="starter", messages=MESSAGES),
    ):
        with pytest.raises(openai.PermissionDeniedError) as excinfo:
            call()
        assert excinfo.value.code == "insufficient_scope"


def test_keys_are_never_stored_in_plain_text(users: dict[str, ApiUser], folder: Any) -> None:
    from accounts.models import ApiKey

    dumped = json.dumps([str(row) for row in ApiKey.objects.values()])
    secrets = [users["alice"].key, users["alice"].reader, users["bob"].key]
    assert not [secret for secret in secrets if secret in dumped]
    assert files_with(folder, users["alice"].email)  # the search does find stored text
    for secret in secrets:
        assert not files_with(folder, secret[-24:])


def files_with(folder: Any, text: str) -> str:
    """In a separate process: closing SQLite's file in this one would release the locks this process holds on it."""
    result = subprocess.run(["grep", "-rlF", "-e", text, str(folder)], capture_output=True, text=True)
    return result.stdout


def test_two_different_credentials_are_rejected(web: Any, users: dict[str, ApiUser]) -> None:
    client = make_client(web.url, users["alice"].key, default_headers={"x-api-key": users["bob"].key})
    with pytest.raises(openai.BadRequestError, match="one credential"):
        client.models.list()


def test_unknown_ids_are_not_found(client: openai.OpenAI) -> None:
    for call in (
        lambda: client.files.retrieve("file-none"),
        lambda: client.files.content("file-results-01HZZZZZZZZZZZZZZZZZZZZZZZ"),
        lambda: client.fine_tuning.jobs.retrieve("ftjob-none"),
        lambda: client.fine_tuning.jobs.cancel("ftjob-none"),
        lambda: client.fine_tuning.jobs.list_events("ftjob-none"),
        lambda: client.fine_tuning.jobs.checkpoints.list("ftjob-none"),
        lambda: client.models.retrieve("ft:none:a:b:c"),
        lambda: client.models.delete("ft:none:a:b:c:ckpt-step-3"),
        lambda: client.chat.completions.create(model="ft:none:a:b:c", messages=MESSAGES),
        lambda: client.chat.completions.create(model="ft:none:a:b:c", messages=MESSAGES, stream=True),
        lambda: client.completions.create(model="none-such", prompt="x"),
        lambda: client.uploads.cancel("upload-none"),
        lambda: client.get("/nothing/here", cast_to=object),
    ):
        with pytest.raises(openai.NotFoundError) as excinfo:
            call()
        assert excinfo.value.body
        assert excinfo.value.request_id


INVALID_CHAT: dict[str, dict[str, Any]] = {
    "messages": {"messages": []},
    "temperature": {"temperature": 9},
    "top_p": {"top_p": 1.5},
    "n": {"n": 100},
    "max_tokens": {"max_tokens": 10**9},
    "max_completion_tokens": {"max_completion_tokens": 0},
    "stop": {"stop": ["x"] * 1000},
    "seed": {"seed": 2**70},
    "top_logprobs": {"top_logprobs": 3},
    "logit_bias": {"logit_bias": {str(i): 1 for i in range(50_000)}},
    "presence_penalty": {"presence_penalty": 1.5},
    "tools": {"tools": [{"type": "function", "function": {}}]},
    "tool_choice": {"tool_choice": {"type": "function", "function": {"name": "f"}}},
    "response_format": {"response_format": {"type": "json_object"}},
    "stream_options": {"stream_options": {"include_usage": True}},
    "llmtuner": {"extra_body": {"llmtuner": {"beams": 4}}},
    "llmtuner.top_k": {"extra_body": {"llmtuner": {"top_k": -1}}},
}


@pytest.mark.parametrize("param", INVALID_CHAT)
def test_an_invalid_chat_error_names_the_parameter(param: str, client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as excinfo:
        client.chat.completions.create(**{"model": "starter", "messages": MESSAGES, **INVALID_CHAT[param]})
    assert (excinfo.value.param or "").startswith(param)


INVALID_JOB: dict[str, dict[str, Any]] = {
    "model": {"model": "gpt-5"},
    "training_file": {"training_file": "file-none"},
    "validation_file": {"validation_file": "file-none"},
    "suffix": {"suffix": "x" * 65},
    "seed": {"seed": -1},
    "metadata": {"metadata": {str(i): "x" for i in range(17)}},
    "hyperparameters.n_epochs": {"hyperparameters": {"n_epochs": 10**9}},
    "hyperparameters.batch_size": {"hyperparameters": {"batch_size": 0}},
    "hyperparameters.learning_rate_multiplier": {"hyperparameters": {"learning_rate_multiplier": -1}},
    "hyperparameters.epochs": {"hyperparameters": {"epochs": 3}},
    "method.type": {"method": {"type": "dpo", "dpo": {}}},
    "integrations": {"integrations": [{"type": "wandb", "wandb": {"project": "p"}}]},
    "llmtuner.learning_rate": {"extra_body": {"llmtuner": {"learning_rate": -1}}},
    "llmtuner.sequence_length": {"extra_body": {"llmtuner": {"sequence_length": 10**9}}},
    "llmtuner.owner": {"extra_body": {"llmtuner": {"owner": "user-BOB"}}},
    "llmtuner.prompts": {"extra_body": {"llmtuner": {"prompts": "not a list"}}},
}


@pytest.mark.parametrize("param", INVALID_JOB)
def test_an_invalid_job_error_names_the_parameter(param: str, client: openai.OpenAI) -> None:
    file = client.files.create(file=("a.jsonl", training_rows()), purpose="fine-tune")
    with pytest.raises(openai.BadRequestError) as excinfo:
        client.fine_tuning.jobs.create(**{"model": "starter", "training_file": file.id, **INVALID_JOB[param]})
    assert excinfo.value.param == param
    assert excinfo.value.body


def test_internal_fields_in_a_request_are_ignored(client: openai.OpenAI, users: dict[str, ApiUser]) -> None:
    file = client.files.create(file=("a.jsonl", training_rows()), purpose="fine-tune")
    internal_fields = {
        "owner": users["bob"].owner,
        "status": "succeeded",
        "epoch": 9,
        "is_staff": True,
        "id": "ftjob-mine",
    }
    job = client.fine_tuning.jobs.create(model="starter", training_file=file.id, extra_body=internal_fields)
    assert job.id != "ftjob-mine"
    assert job.status in {"validating_files", "queued"}
    assert job.organization_id == users["alice"].owner
    client.fine_tuning.jobs.cancel(job.id)


def test_another_users_file_cannot_be_a_training_file(
    client: openai.OpenAI, bob_client: openai.OpenAI
) -> None:
    file = bob_client.files.create(file=("b.jsonl", training_rows()), purpose="fine-tune")
    errors = []
    for id in (file.id, "file-01HZZZZZZZZZZZZZZZZZZZZZZZ"):
        with pytest.raises(openai.BadRequestError) as excinfo:
            client.fine_tuning.jobs.create(model="starter", training_file=id)
        errors.append(excinfo.value.body)
    assert errors[0] == errors[1]


def test_too_many_requests_are_a_rate_limit_error(client: openai.OpenAI, users: dict[str, ApiUser]) -> None:
    window = int(time.time() // 60)
    keys = [f"v1:{users['alice'].owner}:{window + n}" for n in (0, 1)]
    try:
        cache.set_many(dict.fromkeys(keys, 10**6), 120)
        with pytest.raises(openai.RateLimitError) as excinfo:
            client.models.list()
        assert 1 <= int(excinfo.value.response.headers["retry-after"]) <= 60
    finally:
        cache.delete_many(keys)


def post_raw(
    url: str, body: bytes, key: str, content_type: str = "application/json", **headers: str
) -> tuple[int, dict[str, Any]]:
    request = urllib.request.Request(
        url,
        data=body,
        method="POST",
        headers={"Authorization": f"Bearer {key}", "Content-Type": content_type, **headers},
    )
    try:
        with urllib.request.urlopen(request, timeout=20) as response:
            return response.status, json.loads(response.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b"[]",
        b'"x"',
        b'{"model": NaN}',
        b'{"a": 1, "a": 2}',
        b"\xff",
        b'{"a":' * 500 + b"1" + b"}" * 500,
        b"",
    ],
)
def test_malformed_bodies_are_bad_requests(body: bytes, web: Any, users: dict[str, ApiUser]) -> None:
    status, payload = post_raw(f"{web.url}/v1/chat/completions", body, users["alice"].key)
    assert status == 400
    assert payload["error"]["type"] == "invalid_request_error"


def test_a_huge_body_is_rejected_before_it_is_sent(web: Any, users: dict[str, ApiUser]) -> None:
    host, port = web.url.removeprefix("http://").split(":")
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", int(port)), timeout=10) as connection:
        connection.sendall(f"{head}Content-Length: 104857600\r\n\r\n".encode())
        assert b" 413 " in connection.recv(4096)
    with socket.create_connection(("127.0.0.1", int(port)), timeout=10) as connection:
        connection.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
        chunk = b"10000\r\n" + b"x" * 65536 + b"\r\n"
        try:
            for _ in range(200):  # 12.8 MB; the server stops reading after 4
                connection.sendall(chunk)
        except OSError:
            pass
        else:
            connection.sendall(b"0\r\n\r\n")
        with contextlib.suppress(ConnectionError):  # the server may close while we still send
            assert b" 413 " in connection.recv(4096)
    assert make_client(web.url, users["alice"].key).models.list().data


def test_open_uploads_are_limited(client: openai.OpenAI) -> None:
    def begin_upload() -> Any:
        return client.uploads.create(bytes=3, filename="a.txt", mime_type="text/plain", purpose="fine-tune")

    opened = []
    with pytest.raises(openai.RateLimitError) as excinfo:  # noqa: PT012  any of the calls may be the one rejected
        for _ in range(uploads.MAX_OPEN + 1):
            opened.append(begin_upload())
    assert excinfo.value.code == "quota_exceeded"
    for upload in opened:
        client.uploads.cancel(upload.id)
    client.uploads.cancel(begin_upload().id)


@pytest.mark.parametrize("path", ["/v1/files", "/datasets/upload/", "/v1/uploads/upload-1/parts"])
@pytest.mark.parametrize("length", ["Content-Length: 104857600", "Transfer-Encoding: chunked"])
def test_an_unauthenticated_upload_is_rejected_unread(
    path: str, length: str, web: Any, users: dict[str, ApiUser]
) -> None:
    host, port = web.url.removeprefix("http://").split(":")
    head = f"POST {path} HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: multipart/form-data; boundary=b\r\n"
    head += f"Authorization: Bearer {users['alice'].expired}\r\nCookie: session=none\r\n"
    with socket.create_connection(("127.0.0.1", int(port)), timeout=10) as connection:
        connection.sendall(f"{head}{length}\r\n\r\n".encode())
        assert connection.recv(4096).split()[1] in (b"401", b"413")


def test_concurrent_uploads_are_limited_per_user(web: Any, users: dict[str, ApiUser]) -> None:
    host, port = web.url.removeprefix("http://").split(":")
    limit = settings.JOBS["max_uploads_per_owner"]

    def begin_upload(user: ApiUser, stack: contextlib.ExitStack) -> socket.socket:
        head = f"POST /v1/files HTTP/1.1\r\nHost: {host}:{port}\r\nAuthorization: Bearer {user.key}\r\n"
        head += "Content-Type: multipart/form-data; boundary=b\r\nContent-Length: 104857600\r\n\r\n"
        connection = stack.enter_context(socket.create_connection(("127.0.0.1", int(port)), timeout=2))
        connection.sendall(head.encode() + b"--b\r\n")
        return connection

    with contextlib.ExitStack() as stack:
        for _ in range(limit):
            with pytest.raises(TimeoutError):  # the server waits for the rest
                begin_upload(users["alice"], stack).recv(1)
        assert begin_upload(users["alice"], stack).recv(4096).split()[1] == b"429"
        with pytest.raises(TimeoutError):
            begin_upload(users["bob"], stack).recv(1)
    time.sleep(0.5)  # all connections are closed now
    with contextlib.ExitStack() as stack, pytest.raises(TimeoutError):
        begin_upload(users["alice"], stack).recv(1)


def test_an_upload_slot_is_free_once_the_response_arrives(web: Any, users: dict[str, ApiUser]) -> None:
    """As many clients as upload slots, each sending its next part as soon as the last response arrives."""
    page, part = Client(), bytes(body_limit.MAX_BODY + 1)  # just large enough to need a slot
    page.force_login(users["alice"].user)
    headers = {"Cookie": f"session={page.cookies['session'].value}"}

    def send_parts(_: int) -> set[int]:
        statuses = set()
        for _ in range(15):
            connection = http.client.HTTPConnection("127.0.0.1", int(web.url.rsplit(":", 1)[1]), timeout=30)
            connection.request("PUT", "/datasets/uploads/upload-1/parts/1/", part, headers)
            statuses.add(connection.getresponse().status)
            connection.close()
        return statuses

    with ThreadPoolExecutor(settings.JOBS["max_uploads_per_owner"]) as executor:
        assert set().union(*executor.map(send_parts, range(settings.JOBS["max_uploads_per_owner"]))) == {403}


def test_a_large_authenticated_upload_is_accepted(
    client: openai.OpenAI, web: Any, users: dict[str, ApiUser]
) -> None:
    data = training_rows(100_000)
    assert len(data) > body_limit.MAX_BODY
    file = client.files.create(file=("large.jsonl", data), purpose="fine-tune")
    assert file.bytes == len(data)
    client.files.delete(file.id)

    page = Client()
    page.force_login(users["alice"].user)
    form = encode_multipart("b", {"file": SimpleUploadedFile("large.jsonl", data)})
    headers = {
        "Content-Type": "multipart/form-data; boundary=b",
        "Cookie": f"session={page.cookies['session'].value}",
    }
    request = urllib.request.Request(f"{web.url}/datasets/upload/", form, headers, method="POST")
    with pytest.raises(urllib.error.HTTPError) as excinfo:
        urllib.request.urlopen(request, timeout=20)
    assert excinfo.value.code == 403  # read to the end, and only then rejected for the missing CSRF token


def test_a_session_cookie_does_not_authenticate(web: Any, users: dict[str, ApiUser]) -> None:
    cookie = f"{settings.SESSION_COOKIE_NAME}={make_session(users['alice'].user).session_key}"
    request = urllib.request.Request(f"{web.url}/v1/models", headers={"Cookie": cookie})
    with pytest.raises(urllib.error.HTTPError) as excinfo:
        urllib.request.urlopen(request, timeout=10)
    assert excinfo.value.code == 401


def test_the_docs_page_loads_nothing_from_other_sites(web: Any) -> None:
    with urllib.request.urlopen(f"{web.url}/v1/docs", timeout=20) as response:
        page = response.read().decode()
        assert "script-src 'self'" in response.headers["Content-Security-Policy"]
    assert "/v1/fine_tuning/jobs" in page
    assert "http://cdn" not in page
    assert "https://cdn" not in page
    with urllib.request.urlopen(f"{web.url}/v1/openapi.json", timeout=20) as response:
        document = json.loads(response.read())
    assert len(document["paths"]) >= 18


def test_the_client_verifies_our_webhooks() -> None:
    from jobs.notifications import webhooks
    from jobs.store.tables import Job, WebhookDelivery

    job = Job("user-A", "ftjob-01HZZZZZZZZZZZZZZZZZZZZZZZ", status="succeeded", ended_at=time.time())
    secret = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
    body = {
        "id": "evt-1",
        "object": "event",
        "type": "fine_tuning.job.succeeded",
        "created_at": int(job.ended_at),
    }
    delivery = WebhookDelivery("user-A", "d#1", payload=json.dumps(body | {"data": {"id": job.job_id}}))
    client = openai.OpenAI(api_key="none", webhook_secret=secret)
    event: Any = client.webhooks.unwrap(delivery.payload, webhooks.signed(secret, delivery))
    assert event.type == "fine_tuning.job.succeeded"
    assert event.data.id == job.job_id
    with pytest.raises(openai.InvalidWebhookSignatureError):
        client.webhooks.unwrap(delivery.payload + " ", webhooks.signed(secret, delivery))


def test_webhooks_are_created_listed_and_deleted(client: openai.OpenAI, bob_client: openai.OpenAI) -> None:
    created = client.webhooks.create(
        name="ends", url="https://hooks.example.com/in", event_types=["fine_tuning.job.succeeded"]
    )
    assert created.signing_secret.startswith("whsec_")
    result = client.webhooks.retrieve(created.id)
    assert (result.url, result.event_types) == (created.url, ["fine_tuning.job.succeeded"])
    assert created.id in [hook.id for hook in client.webhooks.list()]
    with pytest.raises(openai.NotFoundError):
        bob_client.webhooks.retrieve(created.id)
    with pytest.raises(openai.NotFoundError):
        bob_client.webhooks.delete(created.id)
    valid: dict[str, Any] = {"name": "n", "url": "https://x.example"}
    valid["event_types"] = ["fine_tuning.job.failed"]
    for invalid in (
        {"url": "ftp://x"},
        {"url": "https://user:pw@x.example"},
        {"event_types": ["batch.completed"]},
    ):
        with pytest.raises(openai.BadRequestError):
            client.webhooks.create(**(valid | invalid))
    assert client.webhooks.delete(created.id).deleted
