import pytest
import torch

from gdn2.models import Gdn2Cache

EXACT = {"rtol": 1e-9, "atol": 1e-10}  # float64: only the order of sums differs
GREEDY = {"do_sample": False, "pad_token_id": 0}


def cache_bytes(cache):
    return sum(x.nbytes for state in cache.states for x in state if isinstance(x, torch.Tensor))


@pytest.mark.parametrize("prefill", [1, 4, 20])
@torch.no_grad()
def test_prefill_and_decode_equal_the_full_forward(model, tokens, prefill):
    full = model(tokens)
    out = model(tokens[:, :prefill])
    logits, cache = [out.logits], out.past_key_values
    for t in range(prefill, 21):
        out = model(tokens[:, t : t + 1], past_key_values=cache)
        assert out.past_key_values is cache
        logits.append(out.logits)
    torch.testing.assert_close(torch.cat(logits, 1), full.logits, **EXACT)
    for state, expected in zip(cache.states, full.past_key_values.states, strict=True):
        if hasattr(state, "length"):
            assert torch.equal(state.length, expected.length)
        else:
            for x, y in zip(state, expected, strict=True):
                torch.testing.assert_close(x, y, **EXACT)


def test_chunks_of_a_padded_prompt_equal_the_full_forward(model, tokens):
    mask = torch.ones_like(tokens)
    mask[1, :9], mask[2, :20] = 0, 0
    full = model(tokens, attention_mask=mask).logits
    cache, logits = Gdn2Cache(2), []
    for start, end in ((0, 8), (8, 10), (10, 11), (11, 21)):
        out = model(tokens[:, start:end], attention_mask=mask[:, :end], past_key_values=cache)
        logits.append(out.logits)
    torch.testing.assert_close(torch.cat(logits, 1), full, **EXACT)


@torch.no_grad()
def test_batched_greedy_generation_equals_recomputing_every_prefix(model, tokens):
    mask = torch.ones_like(tokens)
    mask[1, :9], mask[2, :19] = 0, 0
    prompts = tokens * mask
    got = model.generate(prompts, attention_mask=mask, max_new_tokens=9, **GREEDY)
    for row, keep, out in zip(prompts, mask.bool(), got, strict=True):
        oracle = row[keep][None]
        for _ in range(9):
            token = model(oracle, use_cache=False).logits[:, -1].argmax(-1)
            oracle = torch.cat([oracle, token[None]], 1)
        assert out[21:].tolist() == oracle[0, -9:].tolist()


@torch.no_grad()
def test_sampling_with_a_cache_equals_sampling_without(hybrid, tokens):
    def sample(**options):
        torch.manual_seed(3)
        return hybrid.generate(
            tokens, do_sample=True, top_k=20, max_new_tokens=8, pad_token_id=0, **options
        )

    assert torch.equal(sample(), sample(use_cache=False))
    assert sample(num_return_sequences=2).shape == (6, 29)


@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_beam_search_with_a_cache_equals_beam_search_without(model, tokens, padded):
    mask = torch.ones_like(tokens)
    if padded:
        mask[1, :9] = 0

    def search(**options):
        return model.generate(
            tokens, attention_mask=mask, num_beams=3, max_new_tokens=6, **GREEDY, **options
        )

    assert torch.equal(search(), search(use_cache=False))


@torch.no_grad()
def test_generation_goes_on_from_a_cache(hybrid, tokens):
    whole = hybrid.generate(tokens, max_new_tokens=8, **GREEDY)
    first = hybrid.generate(tokens, max_new_tokens=4, return_dict_in_generate=True, **GREEDY)
    again = hybrid.generate(
        first.sequences, max_new_tokens=4, past_key_values=first.past_key_values, **GREEDY
    )
    assert torch.equal(again, whole)


@torch.no_grad()
def test_the_cache_does_not_grow_with_the_context(make_model):
    model = make_model(["gdn2", "sliding_attention", "kda", "gated_deltanet"], num_hidden_layers=4)
    sizes = set()
    for length in (6, 40, 400):
        out = model(torch.ones(2, length, dtype=torch.long))
        sizes.add(cache_bytes(out.past_key_values))
        out = model(torch.ones(2, 1, dtype=torch.long), past_key_values=out.past_key_values)
        sizes.add(cache_bytes(out.past_key_values))
    assert len(sizes) == 1


@torch.no_grad()
def test_the_cache_of_full_attention_grows_by_a_token(make_model, tokens):
    model = make_model(["full_attention"])
    cache = model(tokens).past_key_values
    before = cache_bytes(cache)
    model(tokens[:, :1], past_key_values=cache)
    assert cache_bytes(cache) - before == 2 * 2 * 3 * 16 * 8  # layers, k and v, rows, width, fp64


@torch.no_grad()
def test_repeated_and_selected_rows_go_on_alone(model, tokens):
    cache = model(tokens).past_key_values
    assert cache.batch_size == 3
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([4, 0]))
    got = model(tokens[:2, :1], past_key_values=cache).logits
    for i, row in enumerate((2, 0)):
        alone = model(torch.cat([tokens[row], tokens[i, :1]])[None]).logits[:, -1:]
        torch.testing.assert_close(got[i : i + 1], alone, **EXACT)


def test_reset_forgets_everything(hybrid, tokens):
    cache = hybrid(tokens).past_key_values
    cache.reset()
    assert cache.get_seq_length() == 0
    torch.testing.assert_close(
        hybrid(tokens, past_key_values=cache).logits, hybrid(tokens).logits, rtol=0, atol=0
    )
