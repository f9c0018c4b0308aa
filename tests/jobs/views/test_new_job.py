"""The form of a new job: generated from the settings table, explained, estimated, and started."""

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
from tests.jobs.views.makers import make_dataset, make_model
from training.plan.catalog import Machine
from training.plan.config import FIELDS, Field

NEW, ESTIMATE = "/jobs/new/", "/jobs/new/estimate/"


@pytest.fixture
def dataset(alice: User) -> Dataset:
    return make_dataset(alice.owner_id)


def post(client: Client, where: str, dataset: Dataset, **data: str):
    return client.post(where, {"dataset": dataset.dataset_id, "base": "starter", **data})


def test_without_data_the_page_says_what_comes_first(alices: Client) -> None:
    text = alices.get(NEW).content.decode()
    assert "Upload a dataset first" in text
    assert reverse("jobs:datasets") in text


def squeezed(response: Any) -> str:
    """The page with every run of whitespace as one space, as a browser shows it."""
    return " ".join(response.content.decode().split())


def shown_fields() -> dict[str, Field]:
    """A setting with a single choice is not on the page."""
    return {name: spec for name, spec in FIELDS.items() if len(spec.choices) != 1}


def test_every_setting_is_there_with_a_label_and_its_meaning(alices: Client, dataset: Dataset) -> None:
    text = alices.get(NEW).content.decode()
    for name, spec in shown_fields().items():
        assert f'name="{name}"' in text, name
        assert f'<label for="id_{name}">{spec.label}</label>' in text, name


def test_automatic_values_carry_their_reason_and_an_estimate(alices: Client, dataset: Dataset) -> None:
    text = alices.get(NEW, {"dataset": dataset.dataset_id}).content.decode()
    assert "for 120 examples" in text
    assert re.search(r'id="estimate".*50% chance of finishing within', text, re.S)
    assert "Where" in text
    assert "highlighted tokens are trained on" in " ".join(text.split())


def test_start_makes_the_job_and_leads_to_its_page(alices: Client, alice: User, dataset: Dataset) -> None:
    answer = post(alices, NEW, dataset, epochs="2", learning_rate="", name="My first", prompts="Who?\nWhere?")
    job = access.list_jobs(alice.owner_id).rows[0]
    assert answer.status_code == 302
    assert answer["Location"] == reverse("jobs:job", args=[job.job_id])
    assert (job.name, job.status, job.settings, job.prompts) == (
        "My first",
        "queued",
        {"epochs": 2.0},
        ["Who?", "Where?"],
    )


def test_an_unnamed_job_is_named_after_its_data(alices: Client, alice: User) -> None:
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
def test_a_mistake_is_told_beside_its_field_and_nothing_starts(
    alices: Client, alice: User, dataset: Dataset, field: str, value: str, message: str
) -> None:
    answer = post(alices, NEW, dataset, **{field: value})
    assert answer.status_code == 422
    assert message in answer.content.decode()
    assert not len(access.list_jobs(alice.owner_id))


def test_extra_fields_change_nothing(alices: Client, alice: User, dataset: Dataset) -> None:
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


def test_updating_the_estimate_without_javascript_brings_the_whole_page_back(
    alices: Client, alice: User, dataset: Dataset
) -> None:
    text = post(alices, ESTIMATE, dataset, epochs="5").content.decode()
    assert re.search(r'name="epochs" value="5"', text)
    assert "<h1" in text
    assert not len(access.list_jobs(alice.owner_id))


def test_a_preset_fills_the_form(alices: Client, dataset: Dataset) -> None:
    text = post(alices, ESTIMATE, dataset, preset="quick").content.decode()
    assert re.search(r'name="epochs" value="1"', text)


def test_a_setting_goes_back_to_automatic(alices: Client, dataset: Dataset) -> None:
    text = post(alices, ESTIMATE, dataset, epochs="5", automatic="epochs").content.decode()
    assert re.search(r'name="epochs" value=""', text)


def test_htmx_gets_only_the_parts_that_change_by_one_read(alices: Client, dataset: Dataset) -> None:
    data = {"dataset": dataset.dataset_id, "base": "starter", "epochs": "5"}
    alices.post(ESTIMATE, data, headers={"HX-Request": "true"})  # what is remembered between keys is read
    with tables.count_calls() as counter:
        text = alices.post(ESTIMATE, data, headers={"HX-Request": "true"}).content.decode()
    assert "<html" not in text
    assert 'id="estimate" hx-swap-oob="true"' in text
    assert 'id="hint-epochs" hx-swap-oob="true"' in text
    assert tables.reads(counter) == 1, dict(counter)


def test_data_that_is_still_checked_can_be_chosen_already(alices: Client, alice: User) -> None:
    dataset = make_dataset(alice.owner_id, status="checking")
    assert "still being checked" in alices.get(NEW).content.decode()
    post(alices, NEW, dataset)
    assert access.list_jobs(alice.owner_id).rows[0].status == "validating"


def test_rejected_data_cannot(alices: Client, alice: User, dataset: Dataset) -> None:
    answer = post(alices, NEW, make_dataset(alice.owner_id, status="rejected"))
    assert answer.status_code == 422
    assert "or rejected. Choose another one." in answer.content.decode()


# ---- the base ------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path: Path, settings: Any) -> Iterator[HubServer]:
    hub_models._refused.clear()
    folder = write_repository(tmp_path)
    with running({"people/tiny": folder}) as server:
        settings.HF_ENDPOINT = server.url
        yield server


def test_the_chosen_bases_facts_are_shown(alices: Client, dataset: Dataset) -> None:
    text = alices.get(NEW, {"base": "gpt2"}).content.decode()
    facts = re.search(r'id="base-parts".*?</div>\s*</label>|id="base-parts".*', text, re.S)
    assert facts
    for word in ("124,439,808", "50,257 tokens", "MIT", "English", "548", "Full fine-tuning", "LoRA"):
        assert word in facts[0], word
    for name in ("Parameters", "Layers", "Width", "Heads", "Context", "Vocabulary", "License", "Languages"):
        assert f">{name}</dt>" in facts[0]


def test_a_model_of_the_hub_is_checked_added_and_chosen(
    alices: Client, alice: User, dataset: Dataset, hub: HubServer
) -> None:
    text = post(alices, "/jobs/new/base/", dataset, hub="people/tiny", epochs="7").content.decode()
    assert re.search(r'value="people/tiny"[^>]*checked', text)
    assert re.search(r'name="epochs" value="7"', text)  # nothing of the form is lost
    assert "Added from the Hub" in alices.get(NEW).content.decode()
    assert post(alices, NEW, dataset, base="people/tiny").status_code == 302
    assert access.list_jobs(alice.owner_id).rows[0].base_snapshot["revision"] == COMMIT


def test_a_hub_id_may_be_typed_and_started_at_once(
    alices: Client, alice: User, dataset: Dataset, hub: HubServer
) -> None:
    assert post(alices, NEW, dataset, hub="people/tiny").status_code == 302
    assert access.list_jobs(alice.owner_id).rows[0].base == "people/tiny"


@pytest.mark.parametrize("where", [NEW, "/jobs/new/base/"])
def test_a_refused_model_is_told_beside_its_field(
    alices: Client, alice: User, dataset: Dataset, hub: HubServer, where: str
) -> None:
    answer = post(alices, where, dataset, hub="people/other")
    assert answer.status_code == 422
    assert re.search(
        r'id="hint-hub"\s+class="field-error">\s*The Hub has no (public )?model (named )?people/other',
        answer.content.decode(),
    )
    assert not len(access.list_jobs(alice.owner_id))


def test_ones_own_model_can_be_the_base_and_nobody_elses(
    alices: Client, alice: User, bob: User, dataset: Dataset
) -> None:
    mine, theirs = make_model(alice.owner_id, name="Mine"), make_model(bob.owner_id, name="Theirs")
    text = alices.get(NEW).content.decode()
    assert mine.model_id in text
    assert theirs.model_id not in text
    answer = post(alices, NEW, dataset, base=theirs.model_id)
    nobodys = post(alices, NEW, dataset, base=theirs.model_id[:-2] + "~~")
    assert answer.status_code == nobodys.status_code == 422
    message = r'class="field-error">\s*(There is no base model [^<]*)<'
    told = [re.search(message, a.content.decode())[1] for a in (answer, nobodys)]
    assert told[0].replace(theirs.model_id, "") == told[1].replace(theirs.model_id[:-2] + "~~", "")
    assert post(alices, NEW, dataset, base=mine.model_id).status_code == 302
    job = access.list_jobs(alice.owner_id).rows[0]
    assert job.base == mine.model_id
    child = make_model(alice.owner_id, name="Child", base=mine.model_id, base_snapshot=job.base_snapshot)
    page = alices.get(reverse("jobs:model", args=[child.model_id])).content.decode()
    assert re.search(rf'href="{re.escape(reverse("jobs:model", args=[mine.model_id]))}">Mine</a>', page)
    assert "Fine-tune further" in page
    assert "“Mine”" in alices.get(reverse("jobs:job", args=[job.job_id])).content.decode()


# ---- settings that explain themselves ------------------------------------------------------------------------------


def hint_of(text: str, name: str) -> str:
    found = re.search(rf'id="hint-{name}"[^>]*>(.*?)</span>\s*</div>', text, re.S)
    assert found, name
    return " ".join(re.sub(r"<[^>]+>", " ", found[1]).split())


def test_every_setting_says_its_meaning_and_range_whatever_its_value(
    alices: Client, dataset: Dataset
) -> None:
    for typed in ({}, {"epochs": "5", "weight_decay": "0.2"}):
        text = post(alices, ESTIMATE, dataset, **typed).content.decode()
        for name, spec in shown_fields().items():
            assert spec.help.split("<")[0][:40] in hint_of(text, name).replace("&#x27;", "'"), name
            if spec.minimum is not None and spec.maximum is not None:
                assert " to " in hint_of(text, name), name


def test_a_value_of_ones_own_is_set_beside_the_automatic_one(alices: Client, dataset: Dataset) -> None:
    text = post(alices, ESTIMATE, dataset, epochs="5", weight_decay="0.2").content.decode()
    assert re.match(r"Set by you\. Automatic: \d+, for 120 examples", hint_of(text, "epochs"))
    assert hint_of(text, "weight_decay").startswith("Set by you. Default: 0.01.")
    difference = re.search(r'id="difference".*?</div>', text, re.S)
    assert difference
    assert "Epochs 5" in difference[0]
    assert "Weight decay 0.2" in difference[0]
    plain = post(alices, ESTIMATE, dataset, epochs="5", reset="1").content.decode()
    assert "Using automatic settings." in plain
    assert re.search(r'name="epochs" value=""', plain)


def test_an_automatic_value_can_be_locked(alices: Client, alice: User, dataset: Dataset) -> None:
    text = post(alices, ESTIMATE, dataset, lock="epochs").content.decode()
    locked = re.search(r'name="epochs" value="(\d+)"', text)
    assert locked
    few = make_dataset(alice.owner_id, report={"examples": 10})
    later = post(alices, ESTIMATE, few, epochs=locked[1]).content.decode()
    assert re.search(rf'name="epochs" value="{locked[1]}"', later)
    assert f"Automatic: {locked[1]}," not in later


def test_warnings_say_what_will_happen_and_stop_nothing(
    alices: Client, alice: User, dataset: Dataset
) -> None:
    text = post(alices, ESTIMATE, dataset, validation_fraction="0", epochs="30").content.decode()
    assert "cannot tell learning from memorizing" in text
    assert "usually only repeats its examples" in text
    assert post(alices, NEW, dataset, validation_fraction="0", epochs="30").status_code == 302


@pytest.mark.parametrize(("units", "words"), [(True, "is slower in bf16"), (False, "has no bf16 units")])
def test_bf16_is_warned_of_where_it_gains_nothing(
    alices: Client, dataset: Dataset, monkeypatch: pytest.MonkeyPatch, units: bool, words: str
) -> None:
    monkeypatch.setattr(estimates, "machine", lambda: Machine("cpu", "2 cores", 16 << 30, 2, bf16=units))
    assert words in post(alices, ESTIMATE, dataset, precision="bf16").content.decode()
    assert "bf16</p>" not in post(alices, ESTIMATE, dataset).content.decode()


# ---- exact counts for another tokenizer ----------------------------------------------------------------------------


def test_counts_of_another_tokenizer_are_asked_for_and_shown(
    alices: Client, alice: User, dataset: Dataset
) -> None:
    text = squeezed(alices.get(NEW, {"base": "gpt2"}))
    assert "These counts use the starter model's tokenizer" in text
    assert "Based on the starter model's token counts" in text
    text = squeezed(post(alices, "/jobs/new/count/", dataset, base="gpt2", epochs="7"))
    assert "Counting tokens with the GPT-2 small tokenizer" in text
    assert re.search(r'name="epochs" value="7"', text)
    found = tables.get(DatasetReport, dataset.dataset_id, "gpt2")
    assert found is not None
    found.update(
        actions=[
            DatasetReport.status.set("ready"),
            DatasetReport.summary.set(dataset.summary | {"tokens": 777_777}),
        ]
    )
    text = squeezed(alices.get(NEW, {"base": "gpt2-medium"}))  # it reads as gpt2 does
    assert "777,777 tokens" in text
    assert "These counts use" not in text
    assert "Based on the starter" not in text
    page = squeezed(alices.get(reverse("jobs:dataset", args=[dataset.dataset_id])))
    assert "778K tokens" in page
    answer = alices.get(reverse("jobs:dataset", args=[dataset.dataset_id]), {"as": "gpt2"})
    assert "Report for gpt2" in squeezed(answer)


def test_a_dataset_can_be_read_as_another_base_from_its_page(
    alices: Client, bobs: Client, alice: User, dataset: Dataset
) -> None:
    address = reverse("jobs:read_as", args=[dataset.dataset_id])
    answer = alices.post(address, {"base": "gpt2-xl"})
    assert answer["Location"].endswith("?as=gpt2")
    assert "Counting tokens with the gpt2-xl tokenizer" in squeezed(alices.get(answer["Location"]))
    assert bobs.post(address, {"base": "gpt2"}).status_code == 404
    told = alices.post(address, {"base": "nobody/none"}, follow=True).content.decode()
    assert "Unknown model: nobody/none." in told
