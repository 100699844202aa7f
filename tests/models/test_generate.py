"""transformers' `generate` and pipelines on our model, against slow loops without a cache."""

import itertools

import pytest
import torch
from transformers import AutoTokenizer, TextIteratorStreamer, pipeline

from gdn2.data.tokenize import save_tokenizer, train_tokenizer
from gdn2.models import Gdn2Cache

GREEDY = {"do_sample": False, "pad_token_id": 0, "eos_token_id": 0}
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    texts = ["The gate opens, the state decays: S = S + k v. \n"] * 4
    save_tokenizer(train_tokenizer(texts, 280), folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@pytest.fixture
def speaker(make_model, tokenizer):
    return make_model(["gdn2", "sliding_attention"], vocab_size=len(tokenizer))


@torch.no_grad()
def greedy(model, tokens, count, stop=lambda tokens: False):
    """One row, every prefix computed again, until `stop` or the end of a document (0)."""
    tokens = list(tokens)
    for _ in range(count):
        logits = model(torch.tensor([tokens]), use_cache=False).logits
        tokens.append(int(logits[0, -1].argmax()))
        if tokens[-1] == 0 or stop(tokens):
            break
    return tokens


@torch.no_grad()
def test_beam_search_with_enough_beams_finds_the_best_of_all(make_model):
    model = make_model(["gdn2", "sliding_attention"], vocab_size=6)
    prompts = torch.tensor([[1, 5, 2, 4], [3, 3, 1, 2]])
    out = model.generate(
        prompts,
        num_beams=36,
        num_return_sequences=4,
        max_new_tokens=3,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
        output_scores=True,
        return_dict_in_generate=True,
    )
    endings = torch.tensor(list(itertools.product(range(6), repeat=3)))
    for i, prompt in enumerate(prompts):
        every = torch.cat([prompt.expand(216, -1), endings], 1)
        logits = model(every, use_cache=False).logits[:, 3:6].log_softmax(-1)
        scores = logits.gather(2, endings[..., None]).sum((1, 2)) / 3
        best = scores.topk(4)
        assert torch.equal(out.sequences[4 * i : 4 * i + 4], every[best.indices])
        torch.testing.assert_close(
            out.sequences_scores[4 * i : 4 * i + 4].double(), best.values, rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("options", [{"do_sample": True}, {"do_sample": True, "num_beams": 3}])
def test_several_samples_of_a_prompt_equal_those_without_a_cache(model, tokens, options):
    def sample(**more):
        torch.manual_seed(5)
        return model.generate(
            tokens,
            num_return_sequences=3,
            max_new_tokens=6,
            pad_token_id=0,
            **options,
            **more,
        )

    got = sample()
    assert got.shape == (9, 27)
    assert torch.equal(got, sample(use_cache=False))
    assert len({tuple(row) for row in got.tolist()}) > 3


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("piece", [1, 4, 21, 100])
def test_a_prompt_in_pieces_gives_the_same_text(model, tokens, piece, padded):
    mask = torch.ones_like(tokens)
    if padded:
        mask[1, :9], mask[2, :20] = 0, 0
    options = {"attention_mask": mask, "max_new_tokens": 6, **GREEDY}
    got = model.generate(tokens, prefill_chunk_size=piece, **options)
    assert torch.equal(got, model.generate(tokens, **options))


def test_text_stops_at_a_string(speaker, tokenizer):
    prompt = tokenizer("The gate").input_ids
    whole = greedy(speaker, prompt, 24)
    texts = [tokenizer.decode(token) for token in whole]
    stop = next(t for t in texts[len(prompt) + 4 :] if t.strip() and t.isascii())
    expected = greedy(
        speaker,
        prompt,
        24,
        lambda tokens: stop in tokenizer.decode(tokens[len(prompt) :]),
    )
    assert len(prompt) < len(expected) < len(whole)
    options = {"stop_strings": [stop], "tokenizer": tokenizer, "max_new_tokens": 24, **GREEDY}
    for more in ({}, {"use_cache": False}):
        got = speaker.generate(torch.tensor([prompt]), **options, **more)
        assert got[0].tolist() == expected


def test_a_streamer_gets_the_text_as_it_comes(speaker, tokenizer):
    prompt = tokenizer("The gate", return_tensors="pt")
    streamer = TextIteratorStreamer(tokenizer)
    out = speaker.generate(**prompt, max_new_tokens=12, streamer=streamer, **GREEDY)
    pieces = list(streamer)
    assert "".join(pieces) == tokenizer.decode(out[0])
    assert len(pieces) > 2


def test_generation_from_embeddings_is_that_from_tokens(model, tokens):
    embeddings = model.get_input_embeddings()(tokens)
    got = model.generate(inputs_embeds=embeddings, max_new_tokens=6, **GREEDY)
    assert torch.equal(got, model.generate(tokens, max_new_tokens=6, **GREEDY)[:, 21:])


def test_a_pipeline_writes_what_generate_writes(speaker, tokenizer):
    speak = pipeline("text-generation", model=speaker, tokenizer=tokenizer)
    prompts = ["The gate opens, the state", "The"]  # padded to one length
    outputs = speak(prompts, batch_size=2, max_new_tokens=8, return_tensors=True, **GREEDY)
    for prompt, (output,) in zip(prompts, outputs, strict=True):
        ids = tokenizer(prompt).input_ids
        expected = greedy(speaker, ids, 8)
        got = output["generated_token_ids"]
        begin = next(i for i, token in enumerate(got) if token)
        assert got[begin : begin + len(expected)] == expected
        assert not any(got[begin + len(expected) :])


def test_a_chat_template_leads_to_generate(speaker, tokenizer):
    tokenizer.chat_template = TEMPLATE
    chat = [{"role": "user", "content": "The gate?"}]
    inputs = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    prompt = tokenizer("user: The gate?\nassistant:").input_ids
    assert inputs["input_ids"].tolist() == [prompt]
    got = speaker.generate(**inputs, max_new_tokens=8, **GREEDY)
    expected = greedy(speaker, prompt, 8)
    assert got[0].tolist() == expected
    speak = pipeline("text-generation", model=speaker, tokenizer=tokenizer)
    (answer,) = speak(chat, max_new_tokens=8, **GREEDY)
    assert answer["generated_text"] == [
        *chat,
        {
            "role": "assistant",
            "content": tokenizer.decode(expected[len(prompt) :], skip_special_tokens=True),
        },
    ]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"assistant_model": None}, "assisted generation, because a recurrent state can not be"),
        ({"prompt_lookup_num_tokens": 2}, "assisted generation, because a recurrent state"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "contrastive search, because a recurrent state can"),
        (
            {"penalty_alpha": 0.6, "top_k": 4, "trust_remote_code": True},
            "contrastive search, because a recurrent state can not be rolled back; generate "
            "supports greedy search, sample, beam search, beam sample",
        ),
        ({"dola_layers": "low"}, "dola generation; generate supports greedy search"),
    ],
)
def test_what_can_not_work_is_refused(hybrid, tokens, options, said):
    if "assistant_model" in options:
        options = {"assistant_model": hybrid}
    with pytest.raises(NotImplementedError, match=f"can not do {said}"):
        hybrid.generate(tokens[:1], max_new_tokens=4, **GREEDY, **options)
    with pytest.raises(NotImplementedError, match="can not forget"):
        Gdn2Cache(2).crop(1)
