from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from gdn2.data import Encoder, load_encoder
from gdn2.data.tokenize import save_tokenizer, train_tokenizer
from gdn2.evals.sampling import Sampling, continue_text, read_text, sample_text
from gdn2.models import Gdn2Config, Gdn2ForCausalLM

CORPUS = ["The gate opens, the state decays: S = S + k v. δ 🦊 \n"] * 4


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(train_tokenizer(CORPUS, 280), folder)
    return load_encoder(folder)


@pytest.fixture(scope="module")
def model(encoder: Encoder) -> Gdn2ForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_heads": 2, "head_k_dim": 16}
    attention = {"num_attention_heads": 2, "attention_head_dim": 16, "sliding_window": 8}
    config = Gdn2Config(
        vocab_size=encoder.vocab_size,
        mixers=["gdn2", "sliding_attention"],
        intermediate_size=32,
        initializer_range=1.0,
        **sizes,
        **attention,
    )
    return Gdn2ForCausalLM(config)


def texts(model: Any, encoder: Encoder, prompt: str, **settings: Any) -> list[str]:
    pieces: list[str] = []
    sample_text(model, encoder, prompt, Sampling(**settings), on_text=pieces.append)
    return pieces


class Script:
    """Stands in for a model: says these tokens, remembers what it was asked."""

    device = torch.device("cpu")
    config = SimpleNamespace(num_hidden_layers=0, vocab_size=10**6)

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = tokens
        self.asked: list[int] = []

    def eval(self) -> "Script":
        return self

    def model(self, tokens: Tensor, past_key_values: Any) -> None:
        self.asked += tokens[0].tolist()

    def generate(self, tokens: Tensor, *, streamer: Any, **options: Any) -> SimpleNamespace:
        self.asked += tokens[0].tolist()
        self.options = options
        streamer.put(tokens)
        for token in self.tokens:
            streamer.put(torch.tensor([token]))
        streamer.end()
        return SimpleNamespace(sequences=torch.cat([tokens, torch.tensor([self.tokens])], 1))


def test_the_separator_goes_first_and_is_never_text(encoder: Encoder) -> None:
    script = Script([*encoder.encode("opens")[1:], encoder.separator])
    assert "".join(texts(script, encoder, "The gate ")) == "The gate opens"
    assert script.asked == encoder.encode("The gate ")
    assert script.asked[0] == encoder.separator
    assert script.options["generation_config"].eos_token_id == encoder.separator


def test_the_separator_s_name_in_a_prompt_is_ordinary_text(encoder: Encoder) -> None:
    script = Script([encoder.separator])
    assert "".join(texts(script, encoder, encoder.separator_token)) == encoder.separator_token
    assert script.asked.count(encoder.separator) == 1


def test_characters_come_whole_and_at_once(encoder: Encoder) -> None:
    text = "日🦊é\n\n z"
    tokens = encoder.encode(text)[1:]
    assert len(tokens) > len(text)
    pieces = texts(Script(tokens), encoder, "δ")
    assert "".join(pieces) == "δ" + text
    assert "�" not in "".join(pieces)
    assert len(pieces) > 3


def test_one_candidate_is_greedy(model: Gdn2ForCausalLM, encoder: Encoder) -> None:
    greedy = texts(model, encoder, "The", greedy=True, max_new_tokens=24)
    assert texts(model, encoder, "The", top_k=1, max_new_tokens=24) == greedy
    assert texts(model, encoder, "The", top_p=1e-6, max_new_tokens=24) == greedy
    assert texts(model, encoder, "The", temperature=1e-4, max_new_tokens=24) == greedy
    assert texts(model, encoder, "The", max_new_tokens=24) != greedy


def test_greedy_text_is_the_model_s_argmax(model: Gdn2ForCausalLM, encoder: Encoder) -> None:
    tokens = encoder.encode("The")
    with torch.no_grad():
        for _ in range(12):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    assert encoder.separator not in tokens[1:], "the seed must give a text that goes on"
    pieces = texts(model, encoder, "The", greedy=True, max_new_tokens=12)
    assert "".join(pieces) == encoder.tokenizer.decode(tokens).rstrip("�")


def test_a_text_in_two_parts_is_the_text(model: Gdn2ForCausalLM, encoder: Encoder) -> None:
    """Read in two parts, written in two parts: the tokens are those of one part."""
    ends = []
    for prompts, counts in ((["The gate opens"], [16]), (["The gate", " opens"], [5, 0, 11])):
        memory = None
        for prompt in prompts:
            memory = read_text(model, encoder, prompt, memory)
        assert memory is not None
        pieces: list[str] = []
        for count in counts:
            sampling = Sampling(max_new_tokens=count, greedy=True)
            memory = continue_text(model, encoder, memory, sampling, on_text=pieces.append)
        with torch.no_grad():
            logits = model(memory.last, past_key_values=memory.cache).logits
        ends.append((memory.length, memory.last, logits))
    (length, last, logits), other = ends
    assert length == len(encoder.encode("The gate opens")) + 16
    assert (length, last) == other[:2]
    torch.testing.assert_close(logits, other[2], rtol=1e-4, atol=1e-4)


def test_an_empty_prompt_begins_a_document(model: Gdn2ForCausalLM, encoder: Encoder) -> None:
    assert "".join(texts(model, encoder, "", max_new_tokens=8))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"max_new_tokens": -1}, "max_new_tokens must be at least 0, got -1"),
        ({"temperature": 0.0}, r"temperature must be finite and above 0 \(or greedy\), got 0.0"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0.0"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Sampling(**settings)
