"""Models: the list, a model's page, its files as one zip, and the playground's form."""

from __future__ import annotations

import io
import zipfile

import pytest
from django.test import AsyncClient, Client
from django.urls import reverse

from accounts.models import User
from jobs.registry import tuned_models
from jobs.store import access
from tests.jobs.views.makers import make_job, make_model


def test_every_page_of_a_model_tuned_from_the_hub_opens(alices: Client, alice: User) -> None:
    """Its id has a slash, as names on the Hub have."""
    model = make_model(alice.owner_id, root="people/tiny")
    page = reverse("jobs:model", args=[model.model_id])
    assert page in alices.get(reverse("jobs:models")).content.decode()
    assert model.model_id in alices.get(page).content.decode()
    job = make_job(alice.owner_id, "succeeded", model_id=model.model_id)
    assert page in alices.get(reverse("jobs:job", args=[job.job_id])).content.decode()
    assert alices.get(reverse("jobs:download_model", args=[model.model_id])).status_code == 200
    alices.post(reverse("jobs:model_names", args=[model.model_id]), {"aliases": "ft:gpt-4o:acme::abc"})
    assert b"ft:gpt-4o:acme::abc" in alices.get(page).content
    alices.post(reverse("jobs:delete_model", args=[model.model_id]))
    assert alices.get(page).status_code == 404


def test_an_empty_list_says_how_models_come(alices: Client) -> None:
    assert "Your fine-tuned models will appear here" in alices.get(reverse("jobs:models")).content.decode()


def test_a_models_page_has_numbers_files_and_a_playground(alices: Client, alice: User) -> None:
    model = make_model(alice.owner_id)
    text = alices.get(reverse("jobs:model", args=[model.model_id])).content.decode()
    for part in (
        model.model_id,
        "1.250",
        "93%",
        "model.safetensors",
        model.files[1]["sha256"],
        "Generate",
    ):
        assert part in text


@pytest.mark.django_db(transaction=True)
async def test_the_zip_holds_every_file_and_is_streamed(alice: User) -> None:
    client = AsyncClient()
    await client.aforce_login(alice, backend="allauth.account.auth_backends.AuthenticationBackend")
    model = make_model(alice.owner_id)
    answer = await client.get(reverse("jobs:download_model", args=[model.model_id]))
    assert answer.is_async
    assert answer["Content-Type"] == "application/zip"
    content = b"".join([part async for part in answer.streaming_content])
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        assert archive.testzip() is None
        names = {name.rpartition("/")[2]: name for name in archive.namelist()}
        assert archive.read(names["model.safetensors"]) == b"weights" * 1000


OLD_NAME = "ft:gpt-4o-mini-2024-07-18:acme::9abcDEFg"


def test_a_model_takes_the_name_of_one_tuned_at_openai(alices: Client, alice: User, bob: User) -> None:
    model, other = make_model(alice.owner_id), make_model(alice.owner_id)
    names = reverse("jobs:model_names", args=[model.model_id])
    answer = alices.post(names, {"aliases": f"{OLD_NAME}\n{OLD_NAME}"}, follow=True)
    assert f"The model can now also be used as {OLD_NAME}." in answer.content.decode()
    assert tuned_models.get_for(alice.owner_id, OLD_NAME).model_id == model.model_id
    with pytest.raises(access.NotFound):
        tuned_models.get_for(bob.owner_id, OLD_NAME)
    taken = alices.post(
        reverse("jobs:model_names", args=[other.model_id]), {"aliases": OLD_NAME}, follow=True
    )
    assert f"is already an alias of {model.model_id}" in taken.content.decode()
    alices.post(names, {"aliases": ""})
    with pytest.raises(access.NotFound):
        tuned_models.get_for(alice.owner_id, OLD_NAME)


@pytest.mark.parametrize(
    "names",
    [
        "gpt2",
        "starter",
        "ft:",
        "ft:a/b",
        "ft:../../etc",
        "ft:" + "a" * 300,
        " ".join(f"ft:a:{n}" for n in range(9)),
    ],
)
def test_a_name_that_is_none_of_openais_is_refused(alices: Client, alice: User, names: str) -> None:
    model = make_model(alice.owner_id)
    alices.post(reverse("jobs:model_names", args=[model.model_id]), {"aliases": names})
    assert not tuned_models.get_for(alice.owner_id, model.model_id).aliases


def test_delete(alices: Client, alice: User) -> None:
    model = make_model(alice.owner_id)
    answer = alices.post(reverse("jobs:delete_model", args=[model.model_id]), follow=True)
    assert "The model and its files were deleted." in answer.content.decode()
    assert alices.get(reverse("jobs:model", args=[model.model_id])).status_code == 404


def test_the_playground_offers_own_models_and_the_starter(alices: Client, alice: User) -> None:
    model = make_model(alice.owner_id)
    text = alices.get(
        reverse("jobs:playground"), {"model": model.model_id, "prompt": "Hello"}
    ).content.decode()
    assert f'value="{model.model_id}" data-base="starter" selected' in text
    assert 'value="starter"' in text
    assert ">Hello</textarea>" in text


@pytest.mark.parametrize(
    ("field", "value", "label"),
    [
        ("temperature", "9", "Temperature"),
        ("top_p", "0", "Top-p"),
        ("max_tokens", "100000000", "Max tokens"),
        ("prompt", "", "Prompt"),
    ],
)
def test_the_playground_refuses_what_makes_no_sense(
    alices: Client, field: str, value: str, label: str
) -> None:
    data = {
        "model": "starter",
        "prompt": "x",
        "temperature": "0",
        "top_p": "1",
        "max_tokens": "8",
        field: value,
    }
    answer = alices.post(reverse("jobs:playground_stream"), data)
    assert answer.status_code == 422
    assert f"{label}: " in answer.json()["error"]


def test_another_persons_model_is_no_model(bobs: Client, alice: User) -> None:
    data = {"model": make_model(alice.owner_id).model_id, "prompt": "x"}
    answer = bobs.post(reverse("jobs:playground_stream"), data)
    unknown = bobs.post(reverse("jobs:playground_stream"), data | {"model": "ft:starter:none:x:y"})
    assert answer.status_code == unknown.status_code == 404
    assert answer.json() == unknown.json()
