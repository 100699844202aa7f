import subprocess
import sys

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

from gdn2.models import Gdn2ForCausalLM, load_checkpoint


def save_step(model, folder):
    folder.mkdir(parents=True)
    dcp.save({"model": model.state_dict()}, checkpoint_id=folder, no_dist=True)
    model.config.save_pretrained(folder)


def assert_same_weights(model, other):
    state = other.state_dict()
    assert model.state_dict().keys() == state.keys()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, state[name]), name


@pytest.mark.parametrize("tied", [False, True])
def test_save_and_load_round_trip(make_model, tokens, tmp_path, tied):
    model = make_model(["gdn2", "sliding_attention"], tie_word_embeddings=tied).float()
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "modeling_gdn2.py",
    }
    for loaded in (
        Gdn2ForCausalLM.from_pretrained(tmp_path),
        AutoModelForCausalLM.from_pretrained(tmp_path),
    ):
        assert_same_weights(loaded, model)
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)
        assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    assert torch.equal(
        AutoModel.from_pretrained(tmp_path)(tokens).last_hidden_state,
        model.model(tokens).last_hidden_state,
    )


SMALL_PARAMETERS = {
    "gdn2": {"A_log", "dt_bias"},
    "kda": {"A_log", "dt_bias"},
    "gated_deltanet": {"A_log", "dt_bias"},
    "deltanet": set(),
    "mamba2": {"A_log", "dt_bias", "D"},
    "mamba3": {"dt_bias", "D", "B_bias", "C_bias"},
}


@pytest.mark.parametrize("mixer", SMALL_PARAMETERS)
def test_these_parameters_and_no_others_stay_float32_in_a_narrow_model(mixer, make_model, tmp_path):
    make_model([mixer, "sliding_attention"]).float().save_pretrained(tmp_path)
    model = Gdn2ForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    dtypes = {torch.float32: set(), torch.bfloat16: set()}
    for name, parameter in model.named_parameters():
        dtypes[parameter.dtype].add(name)
    wide = {f"model.layers.0.mixer.{name}" for name in SMALL_PARAMETERS[mixer]}
    assert dtypes[torch.float32] == wide
    assert "lm_head.weight" in dtypes[torch.bfloat16]


def test_a_parameter_missing_from_a_checkpoint_is_drawn_and_the_others_stay(hybrid, tmp_path):
    model = hybrid.float()
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    missing = ("model.layers.0.mixer.A_log", "model.layers.1.mlp.down_proj.weight")
    for name in missing:
        del weights[name]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = Gdn2ForCausalLM.from_pretrained(tmp_path).state_dict()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, loaded[name]) == (name not in missing), name
    assert ((loaded[missing[0]] >= 0) & (loaded[missing[0]] <= 2.8)).all()
    assert loaded[missing[1]].abs().max() <= 0.5 * 32**-0.5


TRUSTED = """
import sys
from pathlib import Path
from transformers import AutoConfig, AutoModelForCausalLM
source, target = map(Path, sys.argv[1:])
assert not any(name.split(".")[0] == "gdn2" for name in sys.modules)
model = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=True)
assert type(model).__module__ == "gdn2.models.modeling", type(model)
model.save_pretrained(target)
assert AutoConfig.from_pretrained(target, trust_remote_code=True).mixers == model.config.mixers
AutoModelForCausalLM.from_pretrained(target, trust_remote_code=True).save_pretrained(target)
for path in source.iterdir():
    assert path.read_bytes() == (target / path.name).read_bytes(), path.name
assert sorted(p.name for p in source.iterdir()) == sorted(p.name for p in target.iterdir())
"""


def test_stock_clients_load_and_save_again_with_trust_remote_code(hybrid, tmp_path):
    hybrid.float().save_pretrained(tmp_path / "a")
    environment = {"HF_HOME": str(tmp_path / "hf"), "PATH": "", "HF_HUB_OFFLINE": "1"}
    subprocess.run(
        [sys.executable, "-c", TRUSTED, str(tmp_path / "a"), str(tmp_path / "b")],
        check=True,
        env=environment,
    )


def test_a_run_is_its_newest_step(make_model, tmp_path):
    models = {}
    for step in (2, 10):
        models[step] = make_model(["gdn2"], tie_word_embeddings=step == 10)
        models[step].lm_head.weight.data += step
        save_step(models[step].float(), tmp_path / "checkpoints" / f"step_{step:08d}")
    (tmp_path / "checkpoints" / "step_00000011.tmp").mkdir()
    (tmp_path / "config.json").write_text('{"model": "a resolved run"}')
    (tmp_path / "final").mkdir()
    model, chosen = load_checkpoint(tmp_path)
    assert chosen == tmp_path / "checkpoints" / "step_00000010"
    assert not model.training
    assert_same_weights(model, models[10])
    model, chosen = load_checkpoint(tmp_path / "checkpoints" / "step_00000002")
    assert_same_weights(model, models[2])


def test_a_run_without_steps_is_its_final_folder(hybrid, tmp_path):
    hybrid.float().save_pretrained(tmp_path / "final")
    model, chosen = load_checkpoint(str(tmp_path))
    assert chosen == tmp_path / "final"
    assert_same_weights(model, hybrid)


def test_what_is_no_checkpoint_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*nowhere"):
        load_checkpoint(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"expected a run with checkpoints/step_\* or final/"):
        load_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="must have model_type 'gdn2', got 'llama'"):
        load_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type":')
    with pytest.raises(ValueError, match=r"config\.json is not JSON"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("file", [".metadata", "__0_0.distcp"])
def test_a_damaged_step_is_named(hybrid, tmp_path, file):
    folder = tmp_path / "step_00000001"
    save_step(hybrid.float(), folder)
    (folder / file).write_bytes(b"")
    with pytest.raises(RuntimeError, match=r"cannot read .*step_00000001: .*Error"):
        load_checkpoint(folder)


def test_a_damaged_folder_of_hugging_face_is_named(hybrid, tmp_path):
    hybrid.float().save_pretrained(tmp_path / "final")
    weights = tmp_path / "final" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(RuntimeError, match=r"cannot read .*final: "):
        load_checkpoint(tmp_path)
    weights.unlink()
    with pytest.raises(RuntimeError, match=r"cannot read .*final: "):
        load_checkpoint(tmp_path)
