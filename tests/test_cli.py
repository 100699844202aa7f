import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gdn2 import cli
from gdn2.data import load_manifest
from gdn2.models import load_checkpoint

TEXT = "The gate opens and the state decays. The gate closes and the state remains.\n"
TINY_RUN = (
    "schedule.total_tokens=4096",
    "schedule.warmup_tokens=0",
    "log.validate_every_tokens=none",
)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    rows = [{"text": f"{n}. " + TEXT * (1 + n % 7)} for n in range(80)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def data(texts: Path) -> Path:
    out = texts.parent / "data"
    assert gdn2("prepare", texts, "--out", out, "--vocab-size", 300, "--val-fraction", 0.1) == 0
    return out


@pytest.fixture(scope="module")
def run(data: Path) -> Path:
    out = data.parent / "run"
    assert gdn2("train", "debug", "--data", data, TINY_RUN[0], "--out", out, *TINY_RUN[1:]) == 0
    return out


def gdn2(*words: object) -> int:
    return cli.main([str(word) for word in words])


def complaint(capsys: pytest.CaptureFixture[str]) -> str:
    """The last line of stderr: what went wrong, after whatever progress there was."""
    text = capsys.readouterr().err
    assert text.endswith("\n")
    assert "Traceback" not in text
    return text.splitlines()[-1]


# --- wrong input ---


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("", "COMMAND"),
        ("trian", "invalid choice: 'trian'"),
        ("prepare --out DIR", "SOURCE"),
        ("prepare nowhere.txt --out OUT", "nowhere.txt does not exist"),
        ("prepare TEXTS", "--out"),
        ("prepare TEXTS --out OUT --vocab-size many", "invalid int value: 'many'"),
        ("prepare TEXTS --out OUT --vocab-size 300 --tokenizer DIR", "not allowed with"),
        ("prepare TEXTS --out OUT --vocab-size 3", "vocab"),
        ("prepare TEXTS --out OUT --val-fraction 2", "val_fraction"),
        ("prepare TEXTS --out OUT --text-column body", "no column 'body'; it has: text"),
        ("prepare TEXTS --out OUT optim.lr=1", "unrecognized arguments: optim.lr=1"),
        ("train demo_gdn --data DIR --out OUT", "demo_gdn2"),
        ("train debug --out OUT", "--data"),
        ("train debug --data nowhere --out OUT", "nowhere"),
        ("train debug --data DIR --out OUT extra", "unrecognized arguments: extra"),
        ("train debug --data DIR --out OUT --lr 3", "unrecognized arguments: --lr"),
        ("train debug --data DIR --out OUT --optim.lr=3", "unrecognized arguments: --optim.lr=3"),
        ("train debug --data DIR --out OUT optim.rl=3", "no field 'rl'"),
        ("train debug --data DIR --out OUT optim.lr=fast", "optim.lr must be float, got 'fast'"),
        ("train debug --data DIR --out OUT --device tpu", "invalid choice: 'tpu'"),
        ("train debug --dat DIR --out OUT", "--data"),
        ("eval nowhere", "nowhere"),
        ("eval DIR", "no checkpoint in"),
        ("eval RUN --data nowhere", "nowhere"),
        ("generate RUN", "--prompt"),
        ("generate RUN --prompt a --prompts TEXTS", "not allowed with"),
        ("generate RUN --prompt caf\udce9", "not UTF-8"),
        ("generate RUN --prompts nowhere.txt", "nowhere.txt"),
        ("generate RUN --prompts EMPTY", "has no line"),
        ("generate RUN --prompts LATIN", "is not UTF-8"),
        ("generate nowhere --prompt a", "nowhere"),
        ("generate RUN --prompt-file LATIN", "--prompt-file"),
        ("generate RUN --prompt-file nowhere.txt", "nowhere.txt"),
        ("generate RUN --load-state nowhere", "nowhere"),
        ("generate RUN --load-state TEXTS", "is damaged or not the memory of a model"),
        ("generate RUN --load-state WEIGHTS", "is not the memory of a model"),
        ("generate RUN --load-state DIR", "is a folder"),
        ("generate RUN --prompt a --save-state DIR", "is a folder"),
        ("generate RUN --prompt a --save-state TEXTS/x", "texts.jsonl"),
        ("generate RUN --prompts TEXTS --save-state OUT", "the state behind one text, got 80"),
        ("generate RUN --prompt a --fork 2 --save-state OUT", "behind one text, got 2 texts"),
        ("generate RUN --prompt a --fork 2 --greedy", "the same text again"),
        ("generate RUN --prompt a --fork 0", "--fork must be at least 1, got 0"),
        ("generate RUN --prompt a --max-new-tokens -1", "max_new_tokens must be at least 0"),
        ("generate RUN --prompt a --temperature 0", "temperature must be finite and above 0"),
        ("generate RUN --prompt a --top-k 0", "top_k must be at least 1"),
        ("generate RUN --prompt a --top-p 1.5", "top_p must be in (0, 1]"),
        ("info gdn_1p3b", "gdn2_1p3b"),
        ("info debug model.hidden_size=abc", "model.hidden_size must be int, got 'abc'"),
        ("info debug --jsn", "unrecognized arguments: --jsn"),
        ("info --compare", "--compare: expected at least one argument"),
        ("info --compare model.hidden_size=64", "arguments are required: PRESET"),
        ("info --compare debug gdn_1p3b", "close: gdn2_1p3b"),
        ("info --compare debug model.hidden_size=abc", "hidden_size must be int, got 'abc'"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(
    line: str, said: str, run: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    (tmp_path / "folder").mkdir()
    places = {
        "DIR": tmp_path / "folder" if line.startswith("eval DIR") else run.parent / "data",
        "OUT": tmp_path / "out",
        "RUN": run,
        "TEXTS": texts,
        "EMPTY": tmp_path / "empty.txt",
        "LATIN": tmp_path / "latin.txt",
        "WEIGHTS": run / "final" / "model.safetensors",
        "TEXTS/x": texts / "x",
    }
    capsys.readouterr()
    assert gdn2(*(places.get(word, word) for word in line.split())) == 2
    text = complaint(capsys)
    assert text.startswith("gdn2")
    assert said in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("command", ["train debug --data {data} --out {out}", "eval {run}"])
def test_cuda_without_cuda_is_refused(
    command: str, data: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = command.format(data=data, run=run, out=tmp_path / "out")
    capsys.readouterr()
    assert gdn2(*line.split(), "--device", "cuda") == 2
    assert "no CUDA device" in complaint(capsys)


def test_data_of_another_tokenizer_is_refused(
    texts: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    assert gdn2("prepare", texts, "--out", other, "--vocab-size", 280, "--val-fraction", 0.1) == 0
    capsys.readouterr()
    assert gdn2("eval", run, "--data", other, "--out", tmp_path / "scores") == 2
    assert "another tokenizer" in complaint(capsys)
    assert not (tmp_path / "scores").exists()


# --- exit codes ---


def failing(error: BaseException, file: str) -> Callable[..., None]:
    """A function of `file` that raises `error`."""
    names = {"error": error}
    exec(compile("def fail(*args, **kwargs):\n    raise error", file, "exec"), names)
    return names["fail"]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ValueError("wrong"), 2),
        (FileNotFoundError("wrong"), 2),
        (ImportError("wrong"), 2),
        (NotImplementedError("wrong"), 2),
        (RuntimeError("wrong\nover two lines"), 1),
        (OSError(28, "No space left on device"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_exit_codes(
    error: BaseException,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("gdn2.data.prepare", failing(error, cli.__file__))
    assert gdn2("prepare", "stdlib", "--out", "nowhere") == code
    if code != 130:
        assert complaint(capsys).startswith("gdn2: error: ")


@pytest.mark.parametrize(
    ("error", "file"),
    [
        (KeyError("bug"), cli.__file__),
        (ValueError("bug"), torch.__file__),
        (RuntimeError("bug"), torch.__file__),
        (ImportError("bug"), torch.__file__),
    ],
)
def test_a_bug_keeps_its_traceback(
    error: Exception, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gdn2.data.prepare", failing(error, file))
    with pytest.raises(type(error), match="bug"):
        gdn2("prepare", "stdlib", "--out", "nowhere")


def test_an_operation_of_ours_that_fails_is_a_bug_too(monkeypatch: pytest.MonkeyPatch) -> None:
    names: dict[str, Any] = {"x": torch.ones(3)}
    exec(compile("def fail(*args, **kwargs):\n    x @ x[1:]", cli.__file__, "exec"), names)
    monkeypatch.setattr("gdn2.data.prepare", names["fail"])
    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        gdn2("prepare", "stdlib", "--out", "nowhere")


@pytest.mark.parametrize("place", ["step", "final"])
def test_a_damaged_checkpoint_is_one_line_and_exit_code_1(
    place: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    step = max((run / "checkpoints").iterdir())
    damaged = shutil.copytree(step if place == "step" else run / "final", tmp_path / "damaged")
    (weights,) = damaged.glob("*.distcp" if place == "step" else "*.safetensors")
    weights.write_bytes(weights.read_bytes()[:100])
    capsys.readouterr()
    assert gdn2("eval", damaged) == 1
    assert complaint(capsys).startswith(f"gdn2: error: cannot read {damaged}: ")


def test_eval_says_what_to_give_where_the_data_is_gone(
    run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = shutil.copytree(run / "final", tmp_path / "moved")
    record = json.loads((moved / "run.json").read_text())
    record["data"]["path"] = str(tmp_path / "gone")
    (moved / "run.json").write_text(json.dumps(record))
    capsys.readouterr()
    assert gdn2("eval", moved) == 2
    assert f"trained on {tmp_path / 'gone'}, which is not there now; give --data DIR" in complaint(
        capsys
    )
    (moved / "run.json").write_text("{")
    assert gdn2("eval", moved, "--data", data) == 2
    assert "run.json is not JSON" in complaint(capsys)


@pytest.mark.parametrize("command", ["", "prepare", "train", "eval", "generate", "info"])
def test_help_has_examples_and_is_no_error(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gdn2(*command.split(), "--help") == 0
    text = capsys.readouterr().out
    assert f"usage: gdn2 {command}".strip() in text
    assert not command or f"examples:\n  gdn2 {command} " in text


def test_help_imports_nothing_heavy() -> None:
    code = "import sys; from gdn2.cli import main; main(['train', '--help']); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "numpy", "transformers", "pyarrow"} & set(done.stdout.split())


def test_a_reader_that_leaves_is_no_drama() -> None:
    command = [sys.executable, "-m", "gdn2.cli", "info", "gdn2_1p3b"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1


# --- commands ---


def test_train_again_changes_nothing(run: Path, data: Path) -> None:
    before = (run / "metrics.jsonl").read_bytes()
    assert gdn2("train", "debug", "--data", data, "--out", run, *TINY_RUN) == 0
    assert (run / "metrics.jsonl").read_bytes() == before


def test_eval_of_every_kind_of_checkpoint_is_the_same(
    run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (step,) = sorted((run / "checkpoints").iterdir())[-1:]
    results = []
    for index, checkpoint in enumerate((run, step, run / "final")):
        out = tmp_path / str(index)
        assert gdn2("eval", checkpoint, "--out", out) == 0
        assert (out / "eval.png").read_bytes().startswith(b"\x89PNG")
        results.append(json.loads((out / "eval.json").read_text()))
    names = ("loss", "bits_per_byte", "perplexity", "tokens", "bytes", "by_position")
    first, *others = ([result[name] for name in names] for result in results)
    assert others == [first, first]
    validation = load_manifest(data).splits["validation"]
    assert (results[0]["tokens"], results[0]["bytes"]) == (validation.tokens, validation.bytes)
    shown = capsys.readouterr().out
    assert f"{results[0]['bits_per_byte']:.4f}" in shown
    assert str(results[0]["context"]) in shown.split()


def test_eval_writes_into_the_run_by_default(run: Path) -> None:
    assert gdn2("eval", run) == 0
    assert json.loads((run / "eval.json").read_text())["sequence_length"] == 64


def test_generate_prints_text_and_nothing_else(
    run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ("generate", run, "--prompt", "The gate δ ", "--max-new-tokens", 20)
    capfd.readouterr()
    outputs = []
    for options in (("--greedy",), ("--greedy",), ("--seed", 1), ("--seed", 1), ("--seed", 2)):
        assert gdn2(*words, *options) == 0
        outputs.append(capfd.readouterr().out)
    assert all(text.startswith("The gate δ ") and text.endswith("\n") for text in outputs)
    assert outputs[0] == outputs[1]
    assert outputs[2] == outputs[3] != outputs[4]


def test_prompts_of_a_file_do_not_disturb_each_other(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.txt").write_text("The gate \nThe state \n")
    alone = []
    for prompt in ("The gate ", "The state "):
        capsys.readouterr()
        assert gdn2("generate", run, "--prompt", prompt, "--max-new-tokens", 8) == 0
        alone.append(capsys.readouterr().out)
    words = ("--prompts", tmp_path / "prompts.txt", "--max-new-tokens", 8)
    assert gdn2("generate", run, *words) == 0
    assert capsys.readouterr().out == "\n".join(alone)


def test_a_kept_state_goes_on_as_if_the_text_had_been_read_again(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def generate(*words: object) -> str:
        capsys.readouterr()
        assert gdn2("generate", run, *words, "--greedy", "--max-new-tokens", 24) == 0
        return capsys.readouterr().out

    state, prompt = tmp_path / "state", tmp_path / "prompt.txt"
    prompt.write_text(40 * TEXT)  # more than a window
    words = ("--prompt-file", prompt, "--save-state", state, "--max-new-tokens", 0)
    assert gdn2("generate", run, *words) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"state", "prompt.txt"}
    begun = state.read_bytes()
    whole = generate("--prompt-file", prompt)
    assert generate("--load-state", state) == whole
    whole = generate("--prompt", prompt.read_text() + " gate")
    assert prompt.read_text() + generate("--load-state", state, "--prompt", " gate") == whole
    assert state.read_bytes() == begun
    again = ("--load-state", state, "--save-state", state, "--max-new-tokens", 0)
    assert gdn2("generate", run, *again, "--prompt", " gate") == 0
    assert len(state.read_bytes()) == len(begun)
    assert prompt.read_text() + " gate" + generate("--load-state", state) == whole


def test_forks_are_the_texts_of_their_seeds(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = tmp_path / "state"
    words = ("--prompt", "The gate", "--max-new-tokens", 0)
    assert gdn2("generate", run, *words, "--save-state", state) == 0
    words = ("generate", run, "--load-state", state, "--max-new-tokens", 40)
    alone = []
    for seed in (7, 8, 9):
        capsys.readouterr()
        assert gdn2(*words, "--seed", seed) == 0
        alone.append(capsys.readouterr().out)
    assert len(set(alone)) == 3
    for _ in range(2):
        assert gdn2(*words, "--seed", 7, "--fork", 3) == 0
        assert capsys.readouterr().out == "\n".join(alone)


def test_every_prompt_branches_from_the_state(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state, prompts = tmp_path / "state", tmp_path / "prompts.txt"
    prompts.write_text(" opens\n closes\n")
    words = ("--prompt", "The gate", "--max-new-tokens", 0, "--save-state", state)
    assert gdn2("generate", run, *words) == 0
    words = ("generate", run, "--load-state", state, "--max-new-tokens", 8)
    alone = []
    for prompt, seeds in ((" opens", (3, 4)), (" closes", (3, 4))):
        for seed in seeds:
            capsys.readouterr()
            assert gdn2(*words, "--prompt", prompt, "--seed", seed) == 0
            alone.append(capsys.readouterr().out)
    assert gdn2(*words, "--prompts", prompts, "--fork", 2, "--seed", 3) == 0
    assert capsys.readouterr().out == "\n".join(alone)


def test_a_state_of_other_weights_is_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = tmp_path / "state"
    words = ("--prompt", "The gate", "--max-new-tokens", 0)
    assert gdn2("generate", run, *words, "--save-state", state) == 0
    assert gdn2("generate", run / "final", *words[2:], "--load-state", state) == 0
    other = shutil.copytree(run / "final", tmp_path / "other")
    model, _ = load_checkpoint(other)
    model.lm_head.weight.data.mul_(2)
    model.save_pretrained(other)
    capsys.readouterr()
    kept = tmp_path / "kept"
    assert gdn2("generate", other, *words, "--load-state", state, "--save-state", kept) == 2
    assert "the same configuration with other weights" in complaint(capsys)
    assert {path.name for path in tmp_path.iterdir()} == {"state", "other"}


def test_a_state_that_can_not_be_written_leaves_the_old_one(
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    state = tmp_path / "state"
    words = ("generate", run, "--prompt", "The gate", "--max-new-tokens", 0, "--save-state", state)
    assert gdn2(*words) == 0
    before = state.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    capsys.readouterr()
    assert gdn2(*words) == 1
    assert "no room to write" in complaint(capsys)
    assert state.read_bytes() == before


def test_info_of_the_paper_s_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert gdn2("info", "gdn2_1p3b", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["parameters"]["blocks"] == 1_302_638_112
    assert facts["training"] == {
        "tokens": 100_000_000_000,
        "tokens_per_step": 524_288,
        "steps": 190_735,
    }
    assert gdn2("info", "gdn2_1p3b_hybrid") == 0
    assert "1,300,314,384" in capsys.readouterr().out


def test_info_takes_overrides_wherever_they_stand(capsys: pytest.CaptureFixture[str]) -> None:
    assert gdn2("info", "debug", "model.vocab_size=512", "--json", "optim.lr=1e-4") == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["run"]["model"]["vocab_size"], facts["run"]["optim"]["lr"]) == (512, 1e-4)


SYSTEMS_OF_THE_PAPER = (
    "gdn2_1p3b",
    "gated_deltanet_1p3b",
    "kda_1p3b",
    "deltanet_1p3b",
    "mamba2_1p3b",
    "mamba3_siso_1p3b",
    "mamba3_mimo_1p3b",
    "transformer_1p3b",
    "sliding_window_1p3b",
    "gated_deltanet_1p3b_hybrid",
)


def test_info_compares_presets_with_one_row_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert gdn2("info", "--compare", *SYSTEMS_OF_THE_PAPER) == 0
    lines = capsys.readouterr().out.splitlines()
    for name in SYSTEMS_OF_THE_PAPER:
        assert sum(line.split()[:1] == [name] for line in lines) == 3  # tables
    text = "\n".join(" ".join(line.split()) for line in lines)
    assert "mamba3_mimo_1p3b mamba3 rank 4 1.305G +0.22% 540.9M 764.4M 1.453G" in text
    assert "gated_deltanet_1p3b_hybrid gated_deltanet + window 1.304G +0.12%" in text
    assert "gdn2_1p3b 262,144 4.719M 19.54MB 19.54MB" in text
    assert "transformer_1p3b 0 0 679.5MB 173.9GB" in text
    assert "transformer_1p3b 4,096 0 339.8M 3.083G" in text


def test_info_compares_as_json_what_info_says(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("demo_gdn2", "model.vocab_size=512", "debug")
    assert gdn2("info", "--compare", *words, "--json", "data.sequence_length=128") == 0
    first, second = json.loads(capsys.readouterr().out)
    assert (first["preset"], second["preset"]) == ("demo_gdn2", "debug")
    assert first["difference"] == 0
    assert second["difference"] == pytest.approx(second["blocks"] / first["blocks"] - 1)
    settings = ("model.vocab_size=512", "data.sequence_length=128")
    assert gdn2("info", "debug", "--json", *settings) == 0
    facts = json.loads(capsys.readouterr().out)
    assert second["total"] == facts["parameters"]["total"]
    assert second["mlp_parameters"] == facts["parameters"]["mlps"]
    assert 4 * second["state_floats"] == facts["state_bytes"]["recurrent"]
    assert second["bytes_at_1m"] == facts["state_bytes"]["total"]  # a window does not grow
    assert second["forward_flops"] == facts["flops_per_token"]["forward"]


def test_info_compares_one_preset_and_the_one_before_the_option(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for words in (("--compare", "debug", "demo_kda"), ("debug", "--compare", "demo_kda")):
        assert gdn2("info", *words, "--json") == 0
        names = [one["preset"] for one in json.loads(capsys.readouterr().out)]
        assert names == ["debug", "demo_kda"]
    assert gdn2("info", "--compare", "debug") == 0
    assert "debug" in capsys.readouterr().out


@pytest.mark.parametrize("width", [80, 100])
def test_info_cuts_nothing_off_in_a_terminal(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("NO_COLOR", "1")
    assert gdn2("info", "--compare", *SYSTEMS_OF_THE_PAPER) == 0
    text = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    assert "\u2026" not in text
    assert all(len(line) <= width for line in text.splitlines())
    for name in SYSTEMS_OF_THE_PAPER:
        assert len(re.findall(rf"^{name} ", text, re.MULTILINE)) == 3
