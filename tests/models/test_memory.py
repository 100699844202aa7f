from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gdn2.models import Gdn2Cache, Memory, load_memory, memory, read_tokens

EXACT = {"rtol": 1e-9, "atol": 1e-10}  # float64: only the order of sums differs
GREEDY = {"do_sample": False, "pad_token_id": 0}


@torch.no_grad()
def next_logits(model, memory):
    """Of what follows; uses the memory up."""
    return model(memory.last, past_key_values=memory.cache).logits[:, -1]


def saved(memory, model, folder) -> Path:
    path = folder / "memory"
    path.write_bytes(memory.to_bytes(model))
    return path


@pytest.mark.parametrize("length", [1, 2, 8, 9, 21])
def test_pieces_equal_the_whole(model, tokens, length, monkeypatch):
    monkeypatch.setattr(memory, "PIECE", 4)
    got = read_tokens(model, tokens[:, :length])
    assert (got.length, got.last.tolist()) == (length, tokens[:, length - 1 : length].tolist())
    torch.testing.assert_close(
        next_logits(model, got), model(tokens[:, :length]).logits[:, -1], **EXACT
    )


@pytest.mark.parametrize("first", [1, 3, 12, 21])
def test_a_loaded_memory_equals_reading_again(model, tokens, first, tmp_path):
    path = saved(read_tokens(model, tokens[:, :first]), model, tmp_path)
    loaded = read_tokens(model, tokens[:, first:], load_memory(path, model))
    assert loaded.length == 21
    torch.testing.assert_close(next_logits(model, loaded), model(tokens).logits[:, -1], **EXACT)


def test_a_loaded_memory_is_the_saved_one_bit_by_bit(model, tokens, tmp_path):
    kept = read_tokens(model, tokens)
    loaded = load_memory(saved(kept, model, tmp_path), model)
    assert torch.equal(next_logits(model, loaded), next_logits(model, kept))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_other_dtypes_it_equals_reading_again_to_rounding(hybrid, tokens, dtype, tmp_path):
    truth = hybrid(tokens).logits[:, -1]
    model = hybrid.to(dtype)
    path = saved(read_tokens(model, tokens[:, :12]), model, tmp_path)
    got = next_logits(model, read_tokens(model, tokens[:, 12:], load_memory(path, model)))
    error = (got - truth).abs().max()
    again = (model(tokens).logits[:, -1] - truth).abs().max()
    assert error < 2 * again + torch.finfo(dtype).eps * truth.abs().max()


def test_generation_from_a_loaded_memory_is_the_same_text(model, tokens, tmp_path):
    whole = model.generate(tokens, max_new_tokens=8, **GREEDY)
    kept = load_memory(saved(read_tokens(model, tokens), model, tmp_path), model)
    for _ in range(2):  # the second time from a copy of what the first began with
        start = kept.copy()
        got = model.generate(start.last, past_key_values=start.cache, max_new_tokens=8, **GREEDY)
        assert torch.equal(got[:, 1:], whole[:, 21:])


def test_going_on_from_a_copy_leaves_the_memory(model, tokens):
    kept = read_tokens(model, tokens[:, :12])
    read_tokens(model, tokens[:, 12:], kept.copy())
    next_logits(model, kept.copy())
    torch.testing.assert_close(
        next_logits(model, kept), model(tokens[:, :12]).logits[:, -1], **EXACT
    )


def test_a_file_is_as_large_as_any_other(make_model):
    model = make_model(["gdn2", "sliding_attention", "kda", "gated_deltanet"], num_hidden_layers=4)
    lengths = (1, 5, 6, 40, 2000)
    files = [
        read_tokens(model, torch.ones(1, length, dtype=torch.long)).to_bytes(model)
        for length in lengths
    ]
    assert len({len(file) for file in files}) == 1
    assert len(set(files)) == len(files)


def test_reading_takes_no_more_room_for_more_tokens(make_model, monkeypatch):
    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, tuple | list) else [out]:
                if isinstance(x, torch.Tensor) and x.is_floating_point():
                    self.numel = max(self.numel, x.numel())
            return out

    monkeypatch.setattr(memory, "PIECE", 16)
    model = make_model(["gdn2", "sliding_attention"])
    sizes = set()
    for length in (49, 801):
        with Largest() as largest:
            read_tokens(model, torch.ones(1, length, dtype=torch.long))
        sizes.add(largest.numel)
    assert len(sizes) == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"norm_eps": 1e-6}, "another model: norm_eps is 1e-05 there and 1e-06 here"),
        ({"mixers": ["gdn2"]}, "mixers is gdn2 sliding_attention there and gdn2 gdn2 here"),
        ({"sliding_window": 6}, "sliding_window is 5 there and 6 here"),
    ],
)
def test_the_memory_of_another_configuration_is_refused(
    hybrid, make_model, tokens, tmp_path, change, said
):
    path = saved(read_tokens(hybrid, tokens), hybrid, tmp_path)
    other = make_model(**{"mixers": ["gdn2", "sliding_attention"]} | change)
    with pytest.raises(ValueError, match=said):
        load_memory(path, other)


def test_a_memory_that_lacks_settings_that_came_later(hybrid, tokens, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        traits = memory._traits(hybrid)
        older = {name: value for name, value in traits.items() if name != "decay_lower_bound"}
        patch.setattr(memory, "_traits", lambda _: older)
        path = saved(read_tokens(hybrid, tokens), hybrid, tmp_path)
    assert load_memory(path, hybrid).length == 21


def test_a_pattern_of_mixers_is_the_list_it_stands_for(make_model, tokens, tmp_path):
    model = make_model(["gdn2"])
    path = saved(read_tokens(model, tokens), model, tmp_path)
    same = make_model(["gdn2", "gdn2"], max_position_embeddings=8, eos_token_id=3)
    assert load_memory(path, same).length == 21


def test_the_memory_of_other_weights_is_refused(hybrid, tokens, tmp_path):
    path = saved(read_tokens(hybrid, tokens), hybrid, tmp_path)
    weight = hybrid.model.layers[1].mlp.up_proj.weight.data
    before = weight[3, 4].clone()
    weight[3, 4] = torch.nextafter(before, before + 1)
    with pytest.raises(ValueError, match="same configuration with other weights"):
        load_memory(path, hybrid)
    weight[3, 4] = before
    assert load_memory(path, hybrid).length == 21
    with pytest.raises(ValueError, match="other weights"):
        load_memory(path, hybrid.float())


def test_what_is_no_memory_is_refused(hybrid, tokens, tmp_path):
    path = saved(read_tokens(hybrid, tokens), hybrid, tmp_path)
    data, damaged = path.read_bytes(), tmp_path / "damaged"
    for content in (b"", b"text, and no more", data[:4], data[:200], data[:-1], data + b"\0"):
        damaged.write_bytes(content)
        with pytest.raises(ValueError, match="damaged is damaged or not the memory of a model"):
            load_memory(damaged, hybrid)
    tensors = load_file(path)
    save_file(tensors, damaged)
    with pytest.raises(ValueError, match="damaged is not the memory of a model"):
        load_memory(damaged, hybrid)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_memory(tmp_path / "nowhere", hybrid)
    with pytest.raises(IsADirectoryError, match="is a folder"):
        load_memory(tmp_path, hybrid)


def test_a_memory_of_many_rows_keeps_them_apart(model, tokens, tmp_path):
    together = load_memory(saved(read_tokens(model, tokens), model, tmp_path), model)
    assert together.cache.batch_size == 3
    for row, logits in zip(tokens, next_logits(model, together), strict=True):
        torch.testing.assert_close(
            next_logits(model, read_tokens(model, row[None]))[0], logits, **EXACT
        )


def test_tokens_of_other_shapes_are_refused(hybrid, tokens):
    kept = read_tokens(hybrid, tokens)
    for wrong in (tokens[:1], tokens[0]):
        with pytest.raises(ValueError, match=r"\[3, T\], as the memory has 3 rows, got \["):
            read_tokens(hybrid, wrong, kept)
    for wrong in (tokens[:, :0], tokens[0]):
        with pytest.raises(ValueError, match=r"tokens must be \[N, >= 1\], got \["):
            read_tokens(hybrid, wrong)


def test_a_cache_of_generate_makes_a_memory(hybrid, tokens, tmp_path):
    """What the command line saves behind a text: the cache has not seen the last token."""
    out = hybrid.generate(tokens, max_new_tokens=5, return_dict_in_generate=True, **GREEDY)
    assert isinstance(out.past_key_values, Gdn2Cache)
    out.past_key_values.num_columns = 0
    kept = Memory(out.past_key_values, out.sequences[:, -1:], out.sequences.shape[1])
    loaded = load_memory(saved(kept, hybrid, tmp_path), hybrid)
    torch.testing.assert_close(
        next_logits(hybrid, loaded), hybrid(out.sequences).logits[:, -1], **EXACT
    )
