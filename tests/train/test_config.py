import dataclasses
import json

import pytest

from gdn2.train import (
    CheckpointConfig,
    DataConfig,
    LogConfig,
    OptimConfig,
    ParallelConfig,
    ScheduleConfig,
    override_all,
    run_from_dict,
    run_to_dict,
)


def test_a_run_survives_json(tiny_run):
    tree = json.loads(json.dumps(run_to_dict(tiny_run)))
    again = run_from_dict(tree)
    assert run_to_dict(again) == tree
    assert dataclasses.replace(again, model=tiny_run.model) == tiny_run
    assert again.model.to_dict() == tiny_run.model.to_dict()


def test_total_and_warmup_round_up_to_whole_steps(tiny_run):
    schedule = ScheduleConfig(
        total_tokens=100_000_000_000, warmup_tokens=1_000_000_000, tokens_per_step=524_288
    )
    run = dataclasses.replace(tiny_run, schedule=schedule)
    assert (run.total_steps, run.warmup_steps) == (190_735, 1_908)
    assert (run.sequences_per_step, run.micro_batches(ranks=8)) == (16_384, 1_024)


def test_only_tokens_per_step_must_divide(tiny_run):
    with pytest.raises(ValueError, match=r"tokens_per_step must be a multiple .* = 96, got 128"):
        override_all(tiny_run, ["parallel.micro_batch_size=3"])
    with pytest.raises(ValueError, match="ranks = 2 x 32 x 3"):
        tiny_run.micro_batches(ranks=3)


def test_a_run_is_frozen(tiny_run):
    with pytest.raises(dataclasses.FrozenInstanceError):
        tiny_run.seed = 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        tiny_run.optim.lr = 1.0


@pytest.mark.parametrize(
    ("path", "text", "expected"),
    [
        ("optim.lr", "3e-4", 3e-4),
        ("optim.betas", "0.8,0.9", (0.8, 0.9)),
        ("optim.decay_all", "true", True),
        ("schedule.total_tokens", "1e6", 1_000_000),
        ("data.packing", "concat", "concat"),
        ("log.validate_every_tokens", "none", None),
        ("seed", "7", 7),
        ("model.hidden_size", "64", 64),
    ],
)
def test_an_override_changes_one_setting(tiny_run, path, text, expected):
    changed = override_all(tiny_run, [f"{path}={text}"])
    value = changed
    for name in path.split("."):
        value = getattr(value, name)
    assert value == expected
    before, after = run_to_dict(tiny_run), run_to_dict(changed)
    section, _, name = path.partition(".")
    for tree in (before, after):
        del (tree[section] if name else tree)[name or section]
    assert before == after


def test_overrides_below_model_rebuild_the_model(tiny_run):
    changed = override_all(tiny_run, ["model.mixers=gdn2,kda"])
    assert list(changed.model.mixers) == ["gdn2", "kda"]
    assert "sliding_attention" not in changed.model.layer_types
    assert tiny_run.model.mixers != changed.model.mixers


def test_the_order_of_overrides_does_not_matter(tiny_run):
    assignments = ["data.sequence_length=48", "schedule.tokens_per_step=96"]
    forward, backward = (override_all(tiny_run, a) for a in (assignments, assignments[::-1]))
    assert run_to_dict(forward) == run_to_dict(backward)
    assert forward.micro_batches(ranks=1) == 1


@pytest.mark.parametrize(
    ("path", "text", "message"),
    [
        ("optim.lrr", "1", "optim has no field 'lrr'; close: lr"),
        ("optm.lr", "1", "Run has no field 'optm'; close: optim"),
        ("model.hiden_size", "1", "model has no field 'hiden_size'; close: hidden_size"),
        ("model.id2label", "{}", "model has no field 'id2label'"),
        ("model.hidden_size", "abc", "model.hidden_size must be int, got 'abc'"),
        ("model.num_heads", "2.5", "model.num_heads must be int"),
        ("optim.lr", "fast", "optim.lr must be float, got 'fast'"),
        ("optim.lr", "-1", "optim.lr must be finite and above 0, got -1"),
        ("optim.lr", "nan", "optim.lr must be finite and above 0, got nan"),
        ("optim.lr", "inf", "optim.lr must be finite and above 0, got inf"),
        ("optim.weight_decay", "nan", "optim.weight_decay must be finite and at least 0"),
        ("optim.weight_decay", "inf", "optim.weight_decay must be finite and at least 0"),
        ("schedule.min_lr_ratio", "nan", "schedule.min_lr_ratio must be in"),
        ("optim.betas", "0.9,nan", "optim.betas must be"),
        ("log.validate_every_tokens", "inf", "log.validate_every_tokens must be"),
        ("data.packing", "loose", "data.packing must be .*packed.*concat.*, got 'loose'"),
        ("optim", "1", "optim is a section"),
        ("seed.x", "1", "seed is a single value"),
        ("log", "", "log is a section"),
    ],
)
def test_wrong_overrides_say_what_is_wrong(tiny_run, path, text, message):
    with pytest.raises(ValueError, match=message):
        override_all(tiny_run, [f"{path}={text}"])


def test_an_override_is_an_assignment(tiny_run):
    with pytest.raises(ValueError, match=r"a\.b=value, got 'optim.lr'"):
        override_all(tiny_run, ["optim.lr"])


def test_a_stored_run_with_unknown_or_mistyped_entries_is_refused(tiny_run):
    tree = run_to_dict(tiny_run)
    with pytest.raises(ValueError, match="optim has no field 'momentum'"):
        run_from_dict({**tree, "optim": {**tree["optim"], "momentum": 0.9}})
    with pytest.raises(ValueError, match=r"schedule.total_tokens must be int, got '10'"):
        run_from_dict({**tree, "schedule": {**tree["schedule"], "total_tokens": "10"}})


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: DataConfig(sequence_length=0), "data.sequence_length"),
        (lambda: DataConfig(sequence_length=8, packing="x"), "data.packing"),
        (lambda: OptimConfig(lr=1.0, betas=(0.9, 1.0)), "optim.betas"),
        (lambda: OptimConfig(lr=1.0, weight_decay=-0.1), "optim.weight_decay"),
        (lambda: OptimConfig(lr=1.0, max_grad_norm=0.0), "optim.max_grad_norm"),
        (
            lambda: ScheduleConfig(total_tokens=10, warmup_tokens=11, tokens_per_step=1),
            "schedule.warmup_tokens",
        ),
        (
            lambda: ScheduleConfig(
                total_tokens=1, warmup_tokens=0, tokens_per_step=1, min_lr_ratio=2.0
            ),
            "schedule.min_lr_ratio",
        ),
        (lambda: ParallelConfig(micro_batch_size=0), "parallel.micro_batch_size"),
        (lambda: CheckpointConfig(every_tokens=1, keep=0), "checkpoint.keep"),
        (lambda: LogConfig(validate_every_tokens=0), "log.validate_every_tokens"),
    ],
)
def test_sections_refuse_senseless_values(build, message):
    with pytest.raises(ValueError, match=message):
        build()
