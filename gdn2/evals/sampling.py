"""Text from a prompt, handed over as it is made."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers.decoders import DecodeStream
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from gdn2.data import Encoder


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
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if not (self.greedy or self.temperature > 0):
            raise ValueError(f"temperature must be above 0 (or greedy), got {self.temperature}")
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
    """Continue `prompt` as the start of a document; `on_text` gets the prompt and what follows.

    The document separator goes before the prompt, and its return ends the text: with it the model
    says that the document is over.
    """
    choice: dict[str, Any] = {"do_sample": False}
    if not sampling.greedy:
        choice = {
            "do_sample": True,
            "temperature": sampling.temperature,
            "top_k": sampling.top_k or 0,  # 0 and 1.0: transformers' words for no cut
            "top_p": 1.0 if sampling.top_p is None else sampling.top_p,
        }
    tokens = torch.tensor([encoder.encode(prompt)], device=model.device)
    torch.manual_seed(sampling.seed)
    model.eval().generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        generation_config=GenerationConfig(
            max_new_tokens=sampling.max_new_tokens,
            eos_token_id=encoder.separator,
            pad_token_id=encoder.separator,
            **choice,
        ),
        streamer=_Streamer(encoder, on_text),
    )


class _Streamer(BaseStreamer):
    """Tokens to text; the bytes of a character wait for its last one."""

    def __init__(self, encoder: Encoder, on_text: Callable[[str], object]) -> None:
        self._tokenizer = encoder.tokenizer
        self._decode = DecodeStream(skip_special_tokens=True)
        self._on_text = on_text

    def put(self, value: Tensor) -> None:
        for token in value.flatten().tolist():
            text = self._decode.step(self._tokenizer, token)
            if text:
                self._on_text(text)

    def end(self) -> None:
        """Nothing is held back but an unfinished character, which is no text."""
