import dataclasses
import importlib.metadata
import json
import math
import shutil
import signal
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from gdn2.data import Samples, TokenDataset
from gdn2.models import Gdn2ForCausalLM, load_checkpoint
from gdn2.train import Run, override_all, run_from_dict, run_to_dict
from gdn2.train.loop import backward, step_batches, train
from gdn2.train.metrics import Metrics

CPU = torch.device("cpu")


def rows(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def without_speed(out: Path) -> list[dict]:
    return [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in rows(out)]


def weights(out: Path) -> bytes:
    return (out / "final" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def finished(tiny_run: Run, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody interrupted."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    train(tiny_run, data=data, out=out)
    return out


def test_a_run_learns_and_writes_a_line_a_step(finished, tiny_run):
    lines = rows(finished)
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert [line["tokens"] for line in lines] == [128 * step for step in range(1, 9)]
    assert [step for step, line in enumerate(lines, 1) if "val_loss" in line] == [4, 8]
    assert [step for step, line in enumerate(lines, 1) if "gates" in line] == [3, 6]
    assert lines[2]["gates"].keys() == lines[5]["gates"].keys()
    assert all(math.isfinite(mean) and mean for mean in lines[5]["gates"].values())
    assert lines[0]["loss"] == pytest.approx(math.log(300), rel=0.1)
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.3
    assert lines[-1]["val_loss"] < lines[3]["val_loss"]
    assert lines[-1]["lr"] == pytest.approx(1e-3)
    assert all(line["grad_norm"] > 0 and line["tokens_per_second"] > 0 for line in lines)
    assert (finished / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_folder_holds_the_newest_steps_and_the_final_model(finished):
    assert sorted(path.name for path in finished.iterdir()) == [
        "checkpoints",
        "config.json",
        "final",
        "loss.png",
        "metrics.jsonl",
    ]
    steps = sorted(path.name for path in (finished / "checkpoints").iterdir())
    assert steps == ["step_00000006", "step_00000008"]
    record = json.loads((finished / "config.json").read_text())
    assert set(record) == {"run", "data", "versions", "commit"}
    for folder in (finished / "final", finished / "checkpoints" / steps[-1]):
        assert json.loads((folder / "run.json").read_text()) == record
        assert AutoTokenizer.from_pretrained(folder).eos_token_id == 0


def test_the_last_step_and_the_final_model_are_the_same(finished):
    final = AutoModelForCausalLM.from_pretrained(finished / "final").state_dict()
    step, chosen = load_checkpoint(finished)
    assert chosen.name == "step_00000008"
    assert step.config.eos_token_id == step.config.pad_token_id == 0
    assert step.state_dict().keys() == final.keys()
    assert all(torch.equal(value, final[name]) for name, value in step.state_dict().items())


def test_the_recorded_run_repeats_the_run(finished, data, tmp_path):
    record = json.loads((finished / "config.json").read_text())
    train(run_from_dict(record["run"]), data=data, out=tmp_path / "again")
    assert weights(tmp_path / "again") == weights(finished)
    assert without_speed(tmp_path / "again") == without_speed(finished)


def test_a_finished_run_says_so_and_is_left_alone(finished, tiny_run, data, capsys):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    train(tiny_run, data=data, out=finished)
    assert "is finished after 8 steps" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in finished.rglob("*")}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_saves_and_the_same_command_goes_on(
    number, finished, tiny_run, data, tmp_path, monkeypatch, capsys
):
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    log = Metrics.log

    def log_and_signal(self, row):
        log(self, row)
        if row["step"] == 5:
            signal.raise_signal(number)

    with monkeypatch.context() as patch:
        patch.setattr(Metrics, "log", log_and_signal)
        with pytest.raises(KeyboardInterrupt):
            train(tiny_run, data=data, out=tmp_path)
    assert "stopped and saved after step 5" in capsys.readouterr().out
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    assert (tmp_path / "checkpoints" / "step_00000005").is_dir()
    assert len(rows(tmp_path)) == 5

    train(tiny_run, data=data, out=tmp_path)
    assert "going on after step 5" in capsys.readouterr().out
    assert weights(tmp_path) == weights(finished)
    assert without_speed(tmp_path) == without_speed(finished)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_what_is_not_finite_stops_before_the_update(
    where, finished, tiny_run, data, tmp_path, monkeypatch
):
    loss, calls = Gdn2ForCausalLM.loss, []

    def broken_loss(self, tokens, labels, cu_seqlens=None):
        total, valid = loss(self, tokens, labels, cu_seqlens)
        calls.append(self.training)
        if self.training and calls.count(True) == 10:  # in step 5: two passes a step
            if where == "loss":
                total = total * math.nan
            else:
                self.lm_head.weight.register_hook(lambda gradient: gradient * math.inf)
        return total, valid

    with monkeypatch.context() as patch:
        patch.setattr(Gdn2ForCausalLM, "loss", broken_loss)
        with pytest.raises(RuntimeError, match=r"step 5: loss .*gradient norm (nan|inf)"):
            train(tiny_run, data=data, out=tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000003"]
    assert len(rows(tmp_path)) == 4
    train(tiny_run, data=data, out=tmp_path)  # nothing broken was kept
    assert weights(tmp_path) == weights(finished)
    assert without_speed(tmp_path) == without_speed(finished)


def test_weights_that_an_update_broke_are_not_saved(
    finished, tiny_run, data, tmp_path, monkeypatch
):
    update, calls = torch.optim.AdamW.step, []

    def break_step_6(self, *arguments):
        update(self, *arguments)
        calls.append(self)
        if len(calls) == 6:  # the second that is saved; its loss and gradient are finite
            self.param_groups[1]["params"][0].data.view(-1)[0] = math.inf

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", break_step_6)
        with pytest.raises(RuntimeError, match=r"step 6: .*weights that are not finite \(model\."):
            train(tiny_run, data=data, out=tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000003"]
    train(tiny_run, data=data, out=tmp_path)
    assert weights(tmp_path) == weights(finished)


@pytest.mark.parametrize("error", [OSError("no room"), ValueError("no font")])
def test_a_plot_that_fails_costs_no_checkpoint(
    error, finished, tiny_run, data, tmp_path, monkeypatch, capsys
):
    def fail(*_):
        raise error

    monkeypatch.setattr("gdn2.train.metrics.plot_loss", fail)
    train(tiny_run, data=data, out=tmp_path)
    assert f"warning: {tmp_path / 'loss.png'} is not drawn: {error}" in capsys.readouterr().out
    assert weights(tmp_path) == weights(finished)


def test_a_step_is_saved_before_it_is_shown(tiny_run, data, tmp_path, monkeypatch):
    def show(self, row):
        if row["step"] == 3:
            raise OSError("no room for this line")

    monkeypatch.setattr(Metrics, "show", show)
    with pytest.raises(OSError, match="no room for this line"):
        train(tiny_run, data=data, out=tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000003"]
    assert len(rows(tmp_path)) == 3


@pytest.fixture(scope="module")
def stopped(tiny_run, data, tmp_path_factory) -> Path:
    """A run that stopped after its first checkpoint, at step 3."""
    out = tmp_path_factory.mktemp("runs") / "stopped"
    log = Metrics.log

    def log_and_stop(self, row):
        log(self, row)
        if row["step"] == 4:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Metrics, "log", log_and_stop)
        with pytest.raises(KeyboardInterrupt):
            train(tiny_run, data=data, out=out)
    return out


@pytest.fixture
def begun(stopped, tmp_path) -> Path:
    return shutil.copytree(stopped, tmp_path / "begun")


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("optim.lr=0.02", r"optim\.lr 0\.01 -> 0\.02"),
        ("schedule.total_tokens=3000", r"schedule\.total_tokens 1000 -> 3000"),
        ("model.intermediate_size=48", r"model\.intermediate_size 32 -> 48"),
        ("data.packing=concat", r"data\.packing packed -> concat"),
        ("seed=6", r"seed 5 -> 6"),
    ],
)
def test_a_run_does_not_go_on_as_another(begun, tiny_run, data, assignment, message):
    with pytest.raises(ValueError, match=f"holds another run.*{message}"):
        train(override_all(tiny_run, [assignment]), data=data, out=begun)


def test_a_run_goes_on_whose_record_lacks_settings_that_came_later(begun, tiny_run, data):
    path = begun / "config.json"
    record = json.loads(path.read_text())
    for name in ("erase_gate", "conv_bias", "mimo_rank"):
        del record["run"]["model"][name]
    record["run"]["model"]["mamba_inner_size"] = 128  # which no layer reads
    path.write_text(json.dumps(record))
    train(tiny_run, data=data, out=begun)
    assert (begun / "final").is_dir()


def test_a_finished_run_is_not_another_run_either(finished, tiny_run, data):
    with pytest.raises(ValueError, match="holds another run"):
        train(override_all(tiny_run, ["schedule.total_tokens=3000"]), data=data, out=finished)


def test_a_run_does_not_go_on_with_other_data(begun, tiny_run, other_data):
    with pytest.raises(ValueError, match=r"trained on other data .*tokenizer_sha256 and shards"):
        train(tiny_run, data=other_data, out=begun)


def test_a_run_may_go_on_with_other_logging_checkpoints_and_micro_batches(
    begun, finished, tiny_run, data, capsys
):
    began = (begun / "config.json").read_text()
    changes = ["checkpoint.keep=1", "log.every_steps=1", "parallel.micro_batch_size=1"]
    train(override_all(tiny_run, changes), data=data, out=begun)
    assert [path.name for path in (begun / "checkpoints").iterdir()] == ["step_00000008"]
    assert "began: run.parallel.micro_batch_size 2 -> 1; run.che" in capsys.readouterr().out
    assert (begun / "config.json").read_text() == began
    record = json.loads((begun / "final" / "run.json").read_text())
    assert record["run"]["parallel"]["micro_batch_size"] == 1
    assert rows(begun)[-1]["loss"] == pytest.approx(rows(finished)[-1]["loss"], rel=1e-4)


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "notes.txt"])
@pytest.mark.parametrize("text", ['{"model_type": "gdn2"}', "[1]", "no JSON"])
def test_what_train_did_not_write_is_left_alone(name, text, tiny_run, data, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match="not empty and was not begun by train"):
        train(tiny_run, data=data, out=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == text


def test_a_model_is_not_trained_into_its_own_folder(finished, tiny_run, data):
    before = (finished / "final" / "config.json").read_bytes()
    with pytest.raises(ValueError, match="not begun by train"):
        train(tiny_run, data=data, out=finished / "final")
    assert (finished / "final" / "config.json").read_bytes() == before


def test_a_run_that_goes_on_with_another_torch_says_so_and_keeps_what_it_began_with(
    begun, tiny_run, data, monkeypatch, capsys
):
    began = json.loads((begun / "config.json").read_text())
    version = importlib.metadata.version
    monkeypatch.setattr(
        "importlib.metadata.version", lambda name: "9.9" if name == "torch" else version(name)
    )
    train(tiny_run, data=data, out=begun)
    torch_version = began["versions"]["torch"]
    assert f"began: versions.torch {torch_version} -> 9.9" in capsys.readouterr().out
    assert json.loads((begun / "config.json").read_text()) == began
    record = json.loads((begun / "final" / "run.json").read_text())
    assert record["versions"]["torch"] == "9.9"


def test_a_vocabulary_that_is_too_small_names_the_override(tiny_run, data, tmp_path):
    run = override_all(tiny_run, ["model.vocab_size=100"])
    with pytest.raises(ValueError, match=r"100, .*300.*: add model\.vocab_size=300"):
        train(run, data=data, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_holds_no_data_is_refused(tiny_run, tmp_path):
    with pytest.raises(FileNotFoundError, match="manifest"):
        train(tiny_run, data=tmp_path, out=tmp_path / "out")


@pytest.mark.parametrize(("device", "error"), [("tpu0", ValueError), ("mps", ValueError)])
def test_only_cpu_and_cuda_are_devices(device, error, tiny_run, data, tmp_path):
    with pytest.raises(error, match=f"device must be cpu or cuda, got '{device}'"):
        train(tiny_run, data=data, out=tmp_path / "out", device=device)


def samples_of(data: Path, run: Run) -> Samples:
    return Samples(
        TokenDataset(data, "train"),
        seq_len=run.data.sequence_length,
        packing=run.data.packing,
        seed=run.seed,
    )


def test_a_step_reads_its_own_sequences_whatever_the_micro_batch(tiny_run, data):
    samples = samples_of(data, tiny_run)
    for step in (1, 2, 7):
        expected = samples.batch((step - 1) * 4, 4).tokens.flatten()
        for size in ("1", "2", "4"):
            run = override_all(tiny_run, [f"parallel.micro_batch_size={size}"])
            batches = step_batches(run, samples, step)
            assert len(batches) == 4 // int(size)
            assert torch.equal(torch.cat([batch.tokens.flatten() for batch in batches]), expected)


@pytest.mark.parametrize("packing", ["packed", "concat"])
def test_micro_batches_add_up_to_the_whole_step(packing, tiny_run, data):
    """Also where some have fewer valid labels than others: a mean of means would be wrong."""
    run = override_all(tiny_run, [f"data.packing={packing}"])
    torch.manual_seed(0)
    model = Gdn2ForCausalLM(run.model)
    results = []
    for size in ("1", "2", "4"):
        run = override_all(run, [f"parallel.micro_batch_size={size}"])
        batches = step_batches(run, samples_of(data, run), 1)
        batches[0].labels.view(-1)[:20] = -100
        loss = backward(model, batches, CPU)
        results.append([loss, *(p.grad.clone() for p in model.parameters())])
        model.zero_grad()
    for result in results[1:]:
        for value, expected in zip(result, results[0], strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-6)


def test_checkpointed_activations_change_memory_not_gradients(tiny_run, data, tmp_path):
    results = []
    for checkpointing in ("false", "true"):
        changes = [
            f"parallel.gradient_checkpointing={checkpointing}",
            "schedule.total_tokens=256",
            "schedule.warmup_tokens=0",
        ]
        train(override_all(tiny_run, changes), data=data, out=tmp_path / checkpointing)
        results.append([row["loss"] for row in rows(tmp_path / checkpointing)])
    assert results[1] == pytest.approx(results[0], rel=1e-5)


def test_validation_is_optional(tiny_run, data, tmp_path):
    log = dataclasses.replace(tiny_run.log, validate_every_tokens=None)
    run = override_all(dataclasses.replace(tiny_run, log=log), ["schedule.total_tokens=256"])
    train(run, data=data, out=tmp_path)
    assert not any("val_loss" in row for row in rows(tmp_path))


def test_the_run_is_not_changed_by_training_it(tiny_run, finished):
    assert run_to_dict(tiny_run)["model"]["eos_token_id"] is None
