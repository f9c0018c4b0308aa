"""The new-job form: generated from the settings table, with help, warnings, an estimate, and submission."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from django.test import Client
from django.urls import reverse

from accounts.models import User
from jobs.lifecycle import estimates
from jobs.registry import hub_models
from jobs.store import access, tables
from jobs.store.tables import Dataset, DatasetReport
from tests.hub_server import COMMIT, HubServer, running, write_repository
from tests.jobs.views.makers import dataset_page, make_dataset, make_model, page_text
from training.plan.catalog import Machine
from training.plan.config import FIELDS, Field

NEW, ESTIMATE = "/jobs/new/", "/jobs/new/estimate/"


@pytest.fixture
def dataset(alice: User) -> Dataset:
    return make_dataset(alice.owner_id)


def post(client: Client, url: str, dataset: Dataset, **data: str) -> Any:
    return client.post(url, {"dataset": dataset.dataset_id, "base": "starter", **data})


def test_without_a_dataset_the_page_links_to_the_upload(alices: Client) -> None:
    text = alices.get(NEW).content.decode()
    assert "Upload a dataset first" in text
    assert reverse("jobs:datasets") in text


def shown_fields() -> dict[str, Field]:
    """All but the settings with a single choice, which the page omits."""
    return {name: field for name, field in FIELDS.items() if len(field.choices) != 1}


def test_every_setting_has_an_input_and_a_label(alices: Client, dataset: Dataset) -> None:
    text = alices.get(NEW).content.decode()
    for name, field in shown_fields().items():
        assert f'name="{name}"' in text, name
        assert f'<label for="id_{name}">{field.label}</label>' in text, name


def test_automatic_values_show_their_reason_and_an_estimate(alices: Client, dataset: Dataset) -> None:
    text = alices.get(NEW, {"dataset": dataset.dataset_id}).content.decode()
    assert "for 120 examples" in text
    assert re.search(r'id="estimate".*50% chance of finishing within', text, re.S)
    assert "Where" in text
    assert "highlighted tokens are trained on" in " ".join(text.split())


def test_submitting_creates_the_job_and_opens_its_page(alices: Client, alice: User, dataset: Dataset) -> None:
    response = post(
        alices, NEW, dataset, epochs="2", learning_rate="", name="My first", prompts="Who?\nWhere?"
    )
    job = access.list_jobs(alice.owner_id).rows[0]
    assert response.status_code == 302
    assert response["Location"] == reverse("jobs:job", args=[job.job_id])
    assert (job.name, job.status, job.settings, job.prompts) == (
        "My first",
        "queued",
        {"epochs": 2.0},
        ["Who?", "Where?"],
    )


def test_an_unnamed_job_is_named_after_its_dataset(alices: Client, alice: User) -> None:
    post(alices, NEW, make_dataset(alice.owner_id, name="support-march.jsonl"))
    assert access.list_jobs(alice.owner_id).rows[0].name == "Support march"


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("epochs", "-1", "Must be at least 0.01."),
        ("epochs", "1e9", "Must be at most 1000."),
        ("epochs", "nan", "Enter a number."),
        ("batch_size", "1.5", "Enter a whole number."),
        ("learning_rate", "fast", "Enter a number."),
        ("adapter", "magic", "Choose one of none, lora."),
        ("suffix", "Not A Slug", "lowercase letters"),
        ("base", "", "Choose a base model"),
    ],
)
def test_an_invalid_value_is_reported_and_nothing_starts(
    alices: Client, alice: User, dataset: Dataset, field: str, value: str, message: str
) -> None:
    response = post(alices, NEW, dataset, **{field: value})
    assert response.status_code == 422
    assert message in response.content.decode()
    assert not len(access.list_jobs(alice.owner_id))


def test_preference_pairs_are_refused_in_words(alices: Client, alice: User) -> None:
    pairs = make_dataset(alice.owner_id, report={"kind": "preference"})
    response = post(alices, NEW, pairs)
    assert response.status_code == 422
    assert "preference pairs (a better and a worse answer)" in response.content.decode()
    assert not len(access.list_jobs(alice.owner_id))


def test_extra_fields_are_ignored(alices: Client, alice: User, dataset: Dataset) -> None:
    post(
        alices,
        NEW,
        dataset,
        owner="user-X",
        status="succeeded",
        fencing_token="9",
        priority="99",
        id="ftjob-1",
    )
    job = access.list_jobs(alice.owner_id).rows[0]
    assert (job.owner, job.status, job.fencing_token, job.priority) == (alice.owner_id, "queued", 0, 0)


def test_updating_the_estimate_without_javascript_returns_the_whole_page(
    alices: Client, alice: User, dataset: Dataset
) -> None:
    text = post(alices, ESTIMATE, dataset, epochs="5").content.decode()
    assert re.search(r'name="epochs" value="5"', text)
    assert "<h1" in text
    assert not len(access.list_jobs(alice.owner_id))


def test_a_preset_fills_the_form(alices: Client, dataset: Dataset) -> None:
    text = post(alices, ESTIMATE, dataset, preset="quick").content.decode()
    assert re.search(r'name="epochs" value="1"', text)


def test_a_setting_can_be_reset_to_automatic(alices: Client, dataset: Dataset) -> None:
    text = post(alices, ESTIMATE, dataset, epochs="5", automatic="epochs").content.decode()
    assert re.search(r'name="epochs" value=""', text)


def test_htmx_gets_only_the_changed_parts_with_one_read(alices: Client, dataset: Dataset) -> None:
    data = {"dataset": dataset.dataset_id, "base": "starter", "epochs": "5"}
    alices.post(ESTIMATE, data, headers={"HX-Request": "true"})  # fills the caches that outlive a request
    with tables.count_calls() as counter:
        text = alices.post(ESTIMATE, data, headers={"HX-Request": "true"}).content.decode()
    assert "<html" not in text
    assert 'id="estimate" hx-swap-oob="true"' in text
    assert 'id="hint-epochs" hx-swap-oob="true"' in text
    assert tables.reads(counter) == 1, dict(counter)


def test_a_dataset_still_being_checked_can_be_chosen(alices: Client, alice: User) -> None:
    dataset = make_dataset(alice.owner_id, status="checking")
    assert "still being checked" in alices.get(NEW).content.decode()
    post(alices, NEW, dataset)
    assert access.list_jobs(alice.owner_id).rows[0].status == "validating"


def test_a_rejected_dataset_cannot_be_chosen(alices: Client, alice: User, dataset: Dataset) -> None:
    response = post(alices, NEW, make_dataset(alice.owner_id, status="rejected"))
    assert response.status_code == 422
    assert "or rejected. Choose another one." in response.content.decode()


# ---- the base model ------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path: Path, settings: Any) -> Iterator[HubServer]:
    hub_models._refused.clear()
    folder = write_repository(tmp_path)
    with running({"acme/tiny": folder}) as server:
        settings.HF_ENDPOINT = server.url
        yield server


def test_details_of_the_chosen_base_model_are_shown(alices: Client, dataset: Dataset) -> None:
    text = alices.get(NEW, {"base": "gpt2"}).content.decode()
    details = re.search(r'id="base-parts".*?</div>\s*</label>|id="base-parts".*', text, re.S)
    assert details
    for detail in ("124,439,808", "50,257 tokens", "MIT", "English", "548", "Full fine-tuning", "LoRA"):
        assert detail in details[0], detail
    for name in ("Parameters", "Layers", "Width", "Heads", "Context", "Vocabulary", "License", "Languages"):
        assert f">{name}</dt>" in details[0]


def test_a_hub_model_can_be_taken_off_the_list_while_a_job_uses_it(
    alices: Client, alice: User, bobs: Client, bob: User, dataset: Dataset, hub: HubServer
) -> None:
    post(alices, "/jobs/new/base/", dataset, hub="acme/tiny")
    post(alices, NEW, dataset, base="acme/tiny")
    remove = reverse("jobs:remove_base")
    text = page_text(alices.get(NEW, {"base": "acme/tiny"}))
    assert f'formaction="{remove}"' in text
    assert f'formaction="{remove}"' not in page_text(alices.get(NEW, {"base": "gpt2"}))
    assert "was removed" not in page_text(post(bobs, remove, make_dataset(bob.owner_id), base="acme/tiny"))
    text = page_text(post(alices, remove, dataset, base="acme/tiny", epochs="7"))
    assert "acme/tiny was removed from your base models" in text
    assert re.search(r'value="starter"[^>]*checked', text)
    assert re.search(r'name="epochs" value="7"', text)  # the rest of the form is kept
    assert "Added from the Hub" not in text
    assert post(alices, NEW, dataset, base="acme/tiny").status_code == 422
    assert access.list_jobs(alice.owner_id).rows[0].base_snapshot["revision"] == COMMIT


def test_a_hub_model_is_checked_added_and_selected(
    alices: Client, alice: User, dataset: Dataset, hub: HubServer
) -> None:
    text = post(alices, "/jobs/new/base/", dataset, hub="acme/tiny", epochs="7").content.decode()
    assert re.search(r'value="acme/tiny"[^>]*checked', text)
    assert re.search(r'name="epochs" value="7"', text)  # the rest of the form is kept
    assert "Added from the Hub" in alices.get(NEW).content.decode()
    assert post(alices, NEW, dataset, base="acme/tiny").status_code == 302
    assert access.list_jobs(alice.owner_id).rows[0].base_snapshot["revision"] == COMMIT


def test_a_hub_id_can_be_typed_and_used_at_once(
    alices: Client, alice: User, dataset: Dataset, hub: HubServer
) -> None:
    assert post(alices, NEW, dataset, hub="acme/tiny").status_code == 302
    assert access.list_jobs(alice.owner_id).rows[0].base == "acme/tiny"


@pytest.mark.parametrize("url", [NEW, "/jobs/new/base/"])
def test_a_rejected_hub_model_is_reported_beside_its_field(
    alices: Client, alice: User, dataset: Dataset, hub: HubServer, url: str
) -> None:
    response = post(alices, url, dataset, hub="acme/other")
    assert response.status_code == 422
    assert re.search(
        r'id="hint-hub"\s+class="field-error">\s*The Hub has no (public )?model (named )?acme/other',
        response.content.decode(),
    )
    assert not len(access.list_jobs(alice.owner_id))


def test_only_ones_own_models_can_be_the_base(
    alices: Client, alice: User, bob: User, dataset: Dataset
) -> None:
    own_model, bobs_model = make_model(alice.owner_id, name="Mine"), make_model(bob.owner_id, name="Theirs")
    text = alices.get(NEW).content.decode()
    assert own_model.model_id in text
    assert bobs_model.model_id not in text
    response = post(alices, NEW, dataset, base=bobs_model.model_id)
    for_unknown = post(alices, NEW, dataset, base=bobs_model.model_id[:-2] + "~~")
    assert response.status_code == for_unknown.status_code == 422
    message = r'class="field-error">\s*(There is no base model [^<]*)<'
    messages = [re.findall(message, each.content.decode())[0] for each in (response, for_unknown)]
    assert messages[0].replace(bobs_model.model_id, "") == messages[1].replace(
        bobs_model.model_id[:-2] + "~~", ""
    )
    assert post(alices, NEW, dataset, base=own_model.model_id).status_code == 302
    job = access.list_jobs(alice.owner_id).rows[0]
    assert job.base == own_model.model_id
    child = make_model(alice.owner_id, name="Child", base=own_model.model_id, base_snapshot=job.base_snapshot)
    page = alices.get(reverse("jobs:model", args=[child.model_id])).content.decode()
    assert re.search(rf'href="{re.escape(reverse("jobs:model", args=[own_model.model_id]))}">Mine</a>', page)
    assert "Fine-tune further" in page
    assert "“Mine”" in alices.get(reverse("jobs:job", args=[job.job_id])).content.decode()


# ---- help and warnings ---------------------------------------------------------------------------------------------


def hint_of(text: str, name: str) -> str:
    match = re.search(rf'id="hint-{name}"[^>]*>(.*?)</span>\s*</div>', text, re.S)
    assert match, name
    return " ".join(re.sub(r"<[^>]+>", " ", match[1]).split())


def test_every_setting_shows_its_help_and_range_for_any_value(alices: Client, dataset: Dataset) -> None:
    for fields in ({}, {"epochs": "5", "weight_decay": "0.2"}):
        text = post(alices, ESTIMATE, dataset, **fields).content.decode()
        for name, field in shown_fields().items():
            assert field.help.split("<")[0][:40] in hint_of(text, name).replace("&#x27;", "'"), name
            if field.minimum is not None and field.maximum is not None:
                assert " to " in hint_of(text, name), name


def test_a_chosen_value_is_shown_beside_the_automatic_one(alices: Client, dataset: Dataset) -> None:
    text = post(alices, ESTIMATE, dataset, epochs="5", weight_decay="0.2").content.decode()
    assert re.match(r"Set by you\. Automatic: \d+, for 120 examples", hint_of(text, "epochs"))
    assert hint_of(text, "weight_decay").startswith("Set by you. Default: 0.01.")
    changes = re.search(r'id="difference".*?</div>', text, re.S)
    assert changes
    assert "Epochs 5" in changes[0]
    assert "Weight decay 0.2" in changes[0]
    plain = post(alices, ESTIMATE, dataset, epochs="5", reset="1").content.decode()
    assert "Using automatic settings." in plain
    assert re.search(r'name="epochs" value=""', plain)


def test_an_automatic_value_can_be_locked(alices: Client, alice: User, dataset: Dataset) -> None:
    text = post(alices, ESTIMATE, dataset, lock="epochs").content.decode()
    locked = re.search(r'name="epochs" value="(\d+)"', text)
    assert locked
    small_dataset = make_dataset(alice.owner_id, report={"examples": 10})
    later = post(alices, ESTIMATE, small_dataset, epochs=locked[1]).content.decode()
    assert re.search(rf'name="epochs" value="{locked[1]}"', later)
    assert f"Automatic: {locked[1]}," not in later


def test_warnings_explain_the_effect_and_block_nothing(alices: Client, alice: User, dataset: Dataset) -> None:
    text = post(alices, ESTIMATE, dataset, validation_fraction="0", epochs="30").content.decode()
    assert "cannot tell learning from memorizing" in text
    assert "usually only repeats its examples" in text
    assert post(alices, NEW, dataset, validation_fraction="0", epochs="30").status_code == 302


@pytest.mark.parametrize(("units", "expected"), [(True, "is slower in bf16"), (False, "has no bf16 units")])
def test_bf16_without_a_benefit_shows_a_warning(
    alices: Client, dataset: Dataset, monkeypatch: pytest.MonkeyPatch, units: bool, expected: str
) -> None:
    monkeypatch.setattr(estimates, "machine", lambda: Machine("cpu", "2 cores", 16 << 30, 2, bf16=units))
    assert expected in post(alices, ESTIMATE, dataset, precision="bf16").content.decode()
    assert "bf16</p>" not in post(alices, ESTIMATE, dataset).content.decode()


# ---- token counts of another tokenizer -----------------------------------------------------------------------------


def test_token_counts_of_another_tokenizer_are_requested_and_shown(
    alices: Client, alice: User, dataset: Dataset
) -> None:
    text = page_text(alices.get(NEW, {"base": "gpt2"}))
    assert "These counts use the starter model's tokenizer" in text
    assert "Based on the starter model's token counts" in text
    text = page_text(post(alices, "/jobs/new/count/", dataset, base="gpt2", epochs="7"))
    assert "Counting tokens with the GPT-2 small tokenizer" in text
    assert re.search(r'name="epochs" value="7"', text)
    report = tables.get(DatasetReport, dataset.dataset_id, "gpt2")
    assert report is not None
    report.update(
        actions=[
            DatasetReport.status.set("ready"),
            DatasetReport.summary.set(dataset.summary | {"tokens": 777_777}),
        ]
    )
    text = page_text(alices.get(NEW, {"base": "gpt2-medium"}))  # it has gpt2's tokenizer
    assert "777,777 tokens" in text
    assert "These counts use" not in text
    assert "Based on the starter" not in text
    assert "778K tokens" in dataset_page(alices, dataset)
    response = alices.get(reverse("jobs:dataset", args=[dataset.dataset_id]), {"as": "gpt2"})
    assert "Report for gpt2" in page_text(response)


def test_a_dataset_page_can_count_tokens_for_another_base(
    alices: Client, bobs: Client, alice: User, dataset: Dataset
) -> None:
    read_as_url = reverse("jobs:read_as", args=[dataset.dataset_id])
    response = alices.post(read_as_url, {"base": "gpt2-xl"})
    assert response["Location"].endswith("?as=gpt2")
    assert "Counting tokens with the gpt2-xl tokenizer" in page_text(alices.get(response["Location"]))
    assert bobs.post(read_as_url, {"base": "gpt2"}).status_code == 404
    text = alices.post(read_as_url, {"base": "nobody/none"}, follow=True).content.decode()
    assert "Unknown model: nobody/none." in text
