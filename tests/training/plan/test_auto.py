"""Automatic settings get good values, each with a reason; chosen values stay."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from training.data.summary import Summary
from training.plan.auto_settings import PRESETS, resolve
from training.plan.catalog import (
    GPT2_FAMILY,
    BaseModel,
    Machine,
    find,
    fits,
    from_config,
    starter,
    training_memory,
)
from training.plan.config import FIELDS, Settings, parse
from training.plan.estimate import FinishedJob, estimate

MACHINE = Machine("cpu", "2 cores", 16 << 30, 2)
AUTOMATIC = {
    "epochs",
    "batch_size",
    "learning_rate",
    "dropout",
    "sequence_length",
    "validation_fraction",
    "micro_batch_tokens",
}


def gpt2() -> BaseModel:
    base = find("gpt2")
    assert base is not None
    return base


def data(examples: int = 480, longest: int = 100) -> Summary:
    return Summary(
        examples=examples,
        tokens=60 * examples,
        trained_tokens=20 * examples,
        longest=longest,
        kind="completion",
    )


def test_every_automatic_field_is_filled_with_a_reason() -> None:
    settings, reasons = resolve(Settings(), data(), gpt2(), MACHINE)
    assert set(reasons) == AUTOMATIC
    assert all(getattr(settings, name) is not None for name in AUTOMATIC)
    assert "480 examples" in reasons["epochs"]


def test_chosen_values_stay_and_need_no_reason() -> None:
    chosen = parse({"epochs": 7, "learning_rate": 3e-4, "dropout": 0.2})
    settings, reasons = resolve(chosen, data(), gpt2(), MACHINE)
    assert (settings.epochs, settings.learning_rate, settings.dropout) == (7, 3e-4, 0.2)
    assert not {"epochs", "learning_rate", "dropout"} & set(reasons)


def test_resolving_twice_changes_nothing() -> None:
    once, _ = resolve(Settings(), data(), gpt2(), MACHINE)
    assert resolve(once, data(9), gpt2(), MACHINE) == (once, {})


@pytest.mark.parametrize(
    ("examples", "epochs"), [(4, 25), (10, 10), (33, 3), (100, 3), (8000, 3), (12_000, 2), (100_000, 1)]
)
def test_epochs_follow_the_number_of_examples(examples: int, epochs: int) -> None:
    assert resolve(Settings(), data(examples), gpt2(), MACHINE)[0].epochs == epochs


def test_steps_or_a_batch_in_tokens_replace_epochs_and_batch_size() -> None:
    settings, _ = resolve(parse({"max_steps": 10, "batch_tokens": 4096}), data(), gpt2(), MACHINE)
    assert (settings.epochs, settings.batch_size) == (None, None)


@pytest.mark.parametrize("examples", [1, 30, 500, 10**6])
@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("base", [*GPT2_FAMILY, starter()], ids=lambda b: b.id)
def test_automatic_values_are_always_legal(base: BaseModel, method: str, examples: int) -> None:
    settings, _ = resolve(parse({"method": method}), data(examples, 5000), base, MACHINE)
    assert parse(settings.as_dict()) == settings
    assert settings.sequence_length == base.context


def test_small_models_get_larger_steps_and_adapters_larger_still() -> None:
    rates = [
        resolve(Settings(), data(), base, MACHINE)[0].learning_rate or 0
        for base in (starter(), gpt2(), GPT2_FAMILY[-1])
    ]
    assert rates == sorted(rates, reverse=True)
    assert resolve(parse({"adapter": "lora"}), data(), gpt2(), MACHINE)[0].learning_rate == pytest.approx(
        10 * rates[1]
    )


def test_presets_are_settings() -> None:
    for values in PRESETS.values():
        assert set(values) <= set(FIELDS)
        parse(values)


# --- the catalog ----------------------------------------------------------------------------------


def test_parameter_counts_equal_those_of_the_files() -> None:
    """Layers, width and vocabulary give exactly the published numbers."""
    from training.plan.catalog import from_config

    for base in GPT2_FAMILY:
        config = {
            "model_type": "gpt2",
            "n_embd": base.width,
            "n_layer": base.layers,
            "n_head": base.heads,
            "vocab_size": base.vocab,
        }
        assert from_config(config).parameters == base.parameters


@pytest.mark.parametrize("number", [10**400, 10**12, 0, -1], ids=["1e400", "1e12", "0", "-1"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_config_with_impossible_sizes_is_refused_or_read_without_them(kind: str, number: int) -> None:
    sizes = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "intermediate_size": 128,
        "max_position_embeddings": 512,
        "vocab_size": 100,
    }
    for name in sizes:
        config = {"model_type": kind} | sizes | {name: number}
        if name in ("hidden_size", "num_hidden_layers", "vocab_size"):
            with pytest.raises(ValueError, match="not a supported language model"):
                from_config(config)
        else:
            base = from_config(config)
            assert 0 < base.parameters < 10**6
            assert base.heads > 0


def test_the_starter_is_bundled_and_small() -> None:
    base = starter()
    assert base.folder
    assert 3e6 < base.parameters < 5e6
    assert base.download < 12 << 20


def test_find_accepts_the_long_names_of_models() -> None:
    assert find("openai-community/gpt2-medium") == find("gpt2-medium")
    assert find("somebody/else") is None


def test_lora_fits_when_full_fine_tuning_does_not() -> None:
    large = GPT2_FAMILY[-2]
    full = fits(large, MACHINE)
    assert not full.fits
    assert "LoRA would fit" in full.why
    assert fits(large, MACHINE, "lora").fits
    assert training_memory(large, "lora") < training_memory(large)


# --- the estimate ---------------------------------------------------------------------------------


def predicted(**changes: object) -> float:
    settings, _ = resolve(parse(changes), data(), gpt2(), MACHINE)
    return estimate(gpt2(), settings, data(), MACHINE).seconds_p50


def test_more_work_takes_longer() -> None:
    assert predicted(epochs=1) < predicted(epochs=3) < predicted(epochs=9)
    assert predicted(adapter="lora") < predicted()
    assert predicted(gradient_checkpointing=True) > predicted()


def test_the_estimate_counts_the_steps_that_training_takes() -> None:
    settings, _ = resolve(
        parse({"epochs": 3, "batch_size": 8, "validation_fraction": 0.1}), data(), gpt2(), MACHINE
    )
    estimated = estimate(gpt2(), settings, data(), MACHINE)
    assert (estimated.steps, estimated.tokens) == (162, 3 * 432 * 60)
    assert estimated.seconds_p50 == pytest.approx(sum(estimated.parts.values()))
    assert estimated.seconds_p50 < estimated.seconds_p90


def past(base: BaseModel, times: float, noise: float = 0.0, seed: int = 0, **changes: object) -> FinishedJob:
    """A finished job whose parts took `times` as long as estimated."""
    rng = random.Random(seed)
    settings, _ = resolve(parse(changes), data(), base, MACHINE)
    estimated = estimate(base, settings, data(), MACHINE)
    took = {
        part: times * sum(of.values()) * (1 + noise * rng.uniform(-1, 1))
        for part, of in estimated.work.items()
    }
    peak = 1.2 * estimated.memory
    return FinishedJob(estimated.work, took, estimated.memory_parts, peak, base.id, settings.adapter)


def test_bf16_is_estimated_faster_for_large_models_on_cpus_with_bf16() -> None:
    def seconds(base: BaseModel, machine: Machine) -> list[float]:
        chosen = [resolve(Settings(precision=p), data(), base, machine)[0] for p in ("fp32", "bf16")]
        return [estimate(base, settings, data(), machine).parts["training"] for settings in chosen]

    fp32, bf16 = seconds(gpt2(), replace(MACHINE, bf16=True))
    assert 1.2 < fp32 / bf16 < 1.5
    fp32, bf16 = seconds(starter(), replace(MACHINE, bf16=True))
    assert fp32 < bf16
    fp32, bf16 = seconds(gpt2(), MACHINE)
    assert fp32 == bf16


def test_finished_jobs_correct_the_estimate() -> None:
    settings, _ = resolve(Settings(), data(), gpt2(), MACHINE)
    fresh = estimate(gpt2(), settings, data(), MACHINE)
    before = [past(gpt2(), 2, 0.05, seed, epochs=1 + seed) for seed in range(11)]
    learned = estimate(gpt2(), settings, data(), MACHINE, past=before)
    assert learned.seconds_p50 == pytest.approx(2 * fresh.seconds_p50, rel=0.05)
    assert learned.memory == pytest.approx(1.2 * fresh.memory, rel=0.01)
    assert learned.seconds_p90 <= 1.35 * learned.seconds_p50
    assert fresh.seconds_p90 == pytest.approx(1.5 * fresh.seconds_p50)
    assert "11 jobs" in learned.basis


def test_jobs_with_the_same_model_and_adapter_count_most() -> None:
    settings, _ = resolve(Settings(), data(), gpt2(), MACHINE)
    fresh = estimate(gpt2(), settings, data(), MACHINE)
    before = [past(gpt2(), 2, epochs=n) for n in (1, 2, 3)] + [
        past(starter(), 0.5, epochs=n) for n in (1, 2, 3, 4)
    ]
    learned = estimate(gpt2(), settings, data(), MACHINE, past=before)
    assert learned.seconds_p50 == pytest.approx(2 * fresh.seconds_p50, rel=0.1)


def test_the_estimate_corrects_a_single_slow_part() -> None:
    """Saving takes three times as long as estimated and everything else as estimated, which delays a short job relatively
    more than a long one."""

    def slow(epochs: float) -> FinishedJob:
        job = past(gpt2(), 1, epochs=epochs)
        more = 2 * job.work["training"]["checkpoints"] + 2 * sum(job.work["export"].values())
        return replace(
            job,
            took=job.took | {"training": job.took["training"] + more, "export": 3 * job.took["export"]},
        )

    settings, _ = resolve(parse({"epochs": 1}), data(), gpt2(), MACHINE)
    learned = estimate(gpt2(), settings, data(), MACHINE, past=[slow(n) for n in (1, 2, 4, 6, 8)])
    assert sum(learned.parts.values()) == pytest.approx(sum(slow(1).took.values()), rel=0.05)
    assert learned.parts["export"] == pytest.approx(slow(1).took["export"], rel=0.1)


def test_queue_time_adds_time_but_no_cost() -> None:
    settings, _ = resolve(Settings(), data(), gpt2(), MACHINE)
    alone = estimate(gpt2(), settings, data(), MACHINE, price_per_hour=1.0)
    waiting = estimate(gpt2(), settings, data(), MACHINE, price_per_hour=1.0, queue=100)
    assert waiting.seconds_p50 == pytest.approx(alone.seconds_p50 + 100)
    assert waiting.cost_p50 == alone.cost_p50
    assert ("Waiting for a worker", "100 s") in waiting.rows or (
        "Waiting for a worker",
        "2 min",
    ) in waiting.rows


def test_cost_uses_the_operators_price() -> None:
    settings, _ = resolve(Settings(), data(), gpt2(), replace(MACHINE, cores=1))
    estimated = estimate(gpt2(), settings, data(), MACHINE, price_per_hour=3.6)
    assert estimated.cost_p50 == pytest.approx(estimated.seconds_p50 / 1000)
    assert estimated.rows[-1][0] == "Cost"


def test_the_estimate_counts_the_answers_that_are_scored() -> None:
    def seconds(task: str, answer: int = 10, **changes: object) -> float:
        summary = replace(data(), trained_tokens=data().examples * answer)
        settings, _ = resolve(parse({"task": task, **changes}), summary, gpt2(), MACHINE)
        return estimate(gpt2(), settings, summary, MACHINE).work["evaluation"]["scores"]

    assert seconds("text") == seconds("chat", validation_fraction=0) == 0
    assert 0 < seconds("chat", answer=5) < seconds("chat", answer=40)
