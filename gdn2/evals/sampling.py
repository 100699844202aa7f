"""Text from a prompt, handed over as it is made."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from tokenizers.decoders import DecodeStream
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from gdn2.data import Encoder
from gdn2.models.memory import Memory, read_tokens


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen, and how often.

    `top_k` and `top_p` cut the distribution after `temperature`; `greedy` takes the likeliest
    token and ignores all three.
    """

    max_new_tokens: int = 128
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    greedy: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 0:
            raise ValueError(f"max_new_tokens must be at least 0, got {self.max_new_tokens}")
        # Logits are divided by it in float32.
        if not (self.greedy or 1e-30 <= self.temperature < math.inf):
            raise ValueError(
                f"temperature must be finite and above 0 (or greedy), got {self.temperature}"
            )
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be at least 0 and below 2^63, got {self.seed}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")


def sample_text(
    model: Any,
    encoder: Encoder,
    prompt: str,
    sampling: Sampling,
    *,
    on_text: Callable[[str], object],
) -> None:
    """Continue `prompt` as the start of a document; `on_text` gets the prompt and what follows."""
    on_text(prompt)
    continue_text(model, encoder, read_text(model, encoder, prompt), sampling, on_text=on_text)


def write_texts(
    model: Any,
    encoder: Encoder,
    prompts: Sequence[str],
    sampling: Sampling,
    *,
    forks: int = 1,
    start: Memory | None = None,
    on_prompt: Callable[[str], object] | None,
    on_text: Callable[[str], object],
) -> Memory:
    """Continue every prompt `forks` times, and return the memory of the last text.

    A prompt is the start of a document, or follows what `start` remembers. Each is read once; its
    forks have the seeds ``seed``, ``seed + 1``, ... A line ends every text, an empty one is between
    two of them.
    """
    for index, prompt in enumerate(prompts):
        behind_prompt = read_text(model, encoder, prompt, start and start.copy())
        for fork in range(forks):
            if index or fork:
                on_text("\n")
            if on_prompt is not None:
                on_prompt(prompt)
            memory = continue_text(
                model,
                encoder,
                behind_prompt.copy(),
                replace(sampling, seed=sampling.seed + fork),
                on_text=on_text,
            )
            on_text("\n")
    return memory


def read_text(model: Any, encoder: Encoder, text: str, memory: Memory | None = None) -> Memory:
    """Read `text` as the start of a document, or after a `memory`, which is used up."""
    tokens = encoder.encode(text)
    if max(tokens) >= model.config.vocab_size:
        raise ValueError(
            f"the tokenizer gives token {max(tokens)}, but the model knows "
            f"{model.config.vocab_size}: they do not belong together"
        )
    if memory is not None:
        tokens = tokens[1:]  # no separator: the document goes on
    row = torch.tensor([tokens], dtype=torch.long, device=model.device)
    return read_tokens(model.eval(), row, memory)


def continue_text(
    model: Any,
    encoder: Encoder,
    memory: Memory,
    sampling: Sampling,
    *,
    on_text: Callable[[str], object],
) -> Memory:
    """Go on from a memory, which is used up; what follows goes to `on_text` and into the result.

    The document separator ends the text: with it the model says that the document is over.
    """
    if not sampling.max_new_tokens:
        return memory
    choice: dict[str, Any] = {"do_sample": False}
    if not sampling.greedy:
        choice = {
            "do_sample": True,
            "temperature": sampling.temperature,
            "top_k": sampling.top_k or 0,  # 0 and 1.0: transformers' words for no cut
            "top_p": 1.0 if sampling.top_p is None else sampling.top_p,
        }
    torch.manual_seed(sampling.seed)
    tokens = model.generate(
        memory.last,
        attention_mask=torch.ones_like(memory.last),
        past_key_values=memory.cache,
        generation_config=GenerationConfig(
            max_new_tokens=sampling.max_new_tokens,
            eos_token_id=encoder.separator,
            pad_token_id=encoder.separator,
            return_dict_in_generate=True,
            **choice,
        ),
        streamer=_Streamer(encoder, on_text),
    ).sequences
    memory.cache.num_columns = 0
    return Memory(memory.cache, tokens[:, -1:], memory.length + tokens.shape[1] - 1)


class _Streamer(BaseStreamer):
    """Tokens to text; the bytes of a character wait for its last one.

    The first token has been read already: decoders want it for the space that may come next.
    """

    def __init__(self, encoder: Encoder, on_text: Callable[[str], object]) -> None:
        self._tokenizer = encoder.tokenizer
        self._decode = DecodeStream(skip_special_tokens=True)
        self._on_text = on_text
        self._begun = False

    def put(self, value: Tensor) -> None:
        text = self._decode.step(self._tokenizer, int(value))
        if text and self._begun:
            self._on_text(text)
        self._begun = True

    def end(self) -> None:
        """Nothing is held back but an unfinished character, which is no text."""
