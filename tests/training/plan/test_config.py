"""Settings: one table defines all valid values, and every error says what to change."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from training.plan import config
from training.plan.config import FIELDS, ConfigError, Settings, parse
from training.plan.run_file import Run

FIRST_RELEASE = "ad4dae69a98bdf91333ac545c47d03254c6be1aa92ed368fedd4f672c0c8270a"


def test_the_adapter_keeps_its_stored_name() -> None:
    assert parse({"method": "lora"}) == parse({"adapter": "lora"})
    stored = parse({"adapter": "lora"}).stored()
    assert (stored["method"], "adapter" in stored, "objective" in stored) == ("lora", False, False)
    assert parse(stored) == parse({"adapter": "lora"})


def test_two_names_for_the_adapter_must_agree() -> None:
    with pytest.raises(ConfigError, match="differ"):
        parse({"method": "full", "adapter": "lora"})


def test_a_checkpoint_of_the_first_release_is_recognized() -> None:
    """The hash that the first release wrote for these settings."""
    assert config.settings_hash(parse({"method": "lora", "epochs": 2}, 1), 1) == FIRST_RELEASE


def test_a_new_setting_or_default_changes_no_earlier_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "SCHEMA", 3)
    monkeypatch.setitem(config.ADDED, "deterministic", 3)
    monkeypatch.setitem(config.FORMER_DEFAULTS, "beta1", (3, 0.5))
    assert (parse({}, 2).beta1, parse({}, 3).beta1, parse({}).beta1) == (0.5, 0.9, 0.9)
    hashes = [config.settings_hash(parse(values, 2), 2) for values in ({}, {"deterministic": True})]
    assert hashes[0] != hashes[1]
    monkeypatch.undo()
    monkeypatch.setattr(config, "FIELDS", {n: f for n, f in FIELDS.items() if n != "deterministic"})
    plain = {n: v for n, v in parse({"beta1": 0.5}).stored().items() if n != "deterministic"}
    monkeypatch.setattr(Settings, "stored", lambda self: plain)
    # the hash that a program without this setting would write
    assert config.settings_hash(parse({"beta1": 0.5})) == hashes[0]


def test_lora_of_earlier_jobs_keeps_its_targets_and_rank() -> None:
    """Settings of the first schema, in a run file, stored whole, and copied into a new request."""
    earlier = parse({"adapter": "lora"}, 1)
    assert (earlier.lora_rank, earlier.lora_alpha, earlier.lora_targets) == (8, 16, config.ATTENTION)
    assert earlier.stored()["lora_targets"] is None  # as the first release wrote and reads it
    assert config.parse_stored(earlier.stored()) == earlier
    assert parse(config.as_of_today({"adapter": "lora", "epochs": 2}, 1)) == replace(earlier, epochs=2)
    today = parse({"adapter": "lora"})
    assert (today.lora_rank, today.lora_alpha, today.lora_targets) == (16, 32, config.ALL_LINEAR)
    assert config.parse_stored(today.stored()) == today
    chosen = parse({"adapter": "lora", "lora_targets": "attention"})
    assert config.parse_stored(chosen.stored()) == chosen


def test_every_field_has_a_help_text() -> None:
    assert all(f.help and f.label for f in FIELDS.values())


def test_automatic_fields_stay_open_by_default() -> None:
    settings = parse({})
    assert settings.learning_rate is None
    assert settings.schedule == "linear"


def test_auto_and_empty_mean_automatic() -> None:
    assert parse({"epochs": "auto", "batch_size": "", "learning_rate": None}) == parse({})


def test_numbers_arrive_as_text_from_forms() -> None:
    settings = parse(
        {"epochs": "2.5", "batch_size": "16", "keep_best": "off", "lora_targets": "c_attn, c_fc"}
    )
    assert (settings.epochs, settings.batch_size, settings.keep_best) == (2.5, 16, False)
    assert settings.lora_targets == ("c_attn", "c_fc")


def test_what_is_parsed_can_be_written_and_parsed_again() -> None:
    settings = parse({"method": "lora", "lora_targets": ["c_attn"], "epochs": 3, "warmup": 10})
    assert parse(json.loads(json.dumps(settings.as_dict()))) == settings


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"learning_rate": 0}, "learning_rate"),
        ({"learning_rate": "fast"}, "learning_rate"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"learning_rate": 10**400}, "learning_rate"),
        ({"epochs": "9" * 5000}, "epochs"),
        ({"epochs": True}, "epochs"),
        ({"batch_size": 2.5}, "batch_size"),
        ({"batch_size": 8, "batch_tokens": 512}, "batch_tokens"),
        ({"batch_tokens": 512, "micro_batch_tokens": 1024}, "micro_batch_tokens"),
        ({"warmup": 0.7}, "warmup"),
        ({"warmup": 10, "max_steps": 10}, "warmup"),
        ({"schedule": "zigzag"}, "schedule"),
        ({"dropout": 1}, "dropout"),
        ({"keep_best": "perhaps"}, "keep_best"),
        ({"lora_targets": 3}, "lora_targets"),
        ({"lerning_rate": 1}, "lerning_rate"),
    ],
)
def test_it_refuses_impossible_settings_and_names_the_field(values: dict[str, object], field: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        parse(values)
    assert refusal.value.field == field
    assert len(refusal.value.message) > 10


def test_a_run_file_names_missing_keys() -> None:
    with pytest.raises(ConfigError) as refusal:
        Run.parse({"base": "starter", "work_dir": "/tmp/x"})
    assert refusal.value.field == "train_file"


def test_early_stopping_needs_held_out_examples_or_a_validation_file() -> None:
    run = {
        "base": "b",
        "train_file": "t",
        "work_dir": "w",
        "settings": {"early_stopping_patience": 2, "validation_fraction": 0},
    }
    with pytest.raises(ConfigError, match="held-out examples") as refusal:
        Run.parse(run)
    assert refusal.value.field == "early_stopping_patience"
    assert Run.parse(run | {"validation_file": "v"}).settings.early_stopping_patience == 2


def test_a_run_file_survives_a_round_trip() -> None:
    run = Run.parse(
        {"base": "b", "train_file": "t", "work_dir": "w", "settings": {"epochs": 2}, "prompts": ["a"]}
    )
    assert Run.parse(json.loads(json.dumps(run.as_dict()))) == run


def test_other_settings_have_another_hash() -> None:
    assert config.settings_hash(parse({"seed": 1})) != config.settings_hash(parse({"seed": 2}))
