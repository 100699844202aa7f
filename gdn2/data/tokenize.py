"""Text to ids: train a byte-level BPE or adopt a given tokenizer; separator before every text."""

import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from gdn2.data.durable import naming_full_disk, read_json, write_file, write_json

SEPARATOR_TOKEN = "<|endoftext|>"
DEFAULT_VOCAB_SIZE = 8192
MIN_VOCAB_SIZE = 257  # 256 bytes and the separator
MAX_VOCAB_SIZE = 2**20  # the library that trains takes memory for all of them at once
TOKENIZER = "tokenizer.json"
CONFIG = "tokenizer_config.json"
COPIED = (TOKENIZER, CONFIG, "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
SLOW = ("tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
# What the begin (end) of a text is called where no tokenizer_config.json says it.
USUAL_BOS = ("<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>", "[BOS]", "[CLS]")
USUAL_EOS = ("</s>", "<eos>", "<|end_of_text|>", "<|endoftext|>", "[EOS]", "[SEP]")


@dataclass(frozen=True)
class Encoder:
    """A tokenizer and its separator, which stands before every document and every prompt.

    Nothing else is added, and text that looks like a special token is ordinary text.
    """

    tokenizer: Tokenizer
    separator: int
    separator_token: str

    @property
    def vocab_size(self) -> int:
        return max(self.tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        encodings = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [[self.separator, *encoding.ids] for encoding in encodings]


def load_encoder(path: str | os.PathLike) -> Encoder:
    """Load a folder with tokenizer.json or such a file; BOS, else EOS, becomes the separator."""
    file = find_tokenizer(path)
    data = file.read_bytes()
    try:
        tokenizer = Tokenizer.from_buffer(data)
    except Exception as error:  # the type that `tokenizers` raises
        raise ValueError(f"{file} is not a tokenizer of the tokenizers library: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # in `tokenizers`: split their text, do not match it
    token = _separator_token(file, tokenizer)
    separator = tokenizer.token_to_id(token)
    if separator is None:
        raise ValueError(f"{file} has no token {token!r}, which {CONFIG} names as BOS or EOS")
    return Encoder(tokenizer, separator, token)


def find_tokenizer(path: str | os.PathLike) -> Path:
    path = Path(path)
    if path.is_file():
        return path
    if (path / TOKENIZER).is_file():
        return path / TOKENIZER
    if not path.is_dir():
        raise FileNotFoundError(f"tokenizer {path} does not exist")
    slow = [name for name in SLOW if (path / name).is_file()]
    if slow:
        raise ValueError(
            f"{path} has {slow[0]} but no {TOKENIZER}: convert it first, with transformers: "
            f"AutoTokenizer.from_pretrained({str(path)!r}).save_pretrained(FOLDER)"
        )
    raise ValueError(f"{path} has no {TOKENIZER}")


def _separator_token(file: Path, tokenizer: Tokenizer) -> str:
    config = _config_beside(file)
    for name in ("bos_token", "eos_token"):
        token = config.get(name)
        token = token.get("content", token) if isinstance(token, dict) else token
        if not isinstance(token, str | None):
            raise ValueError(f"{name} beside {file} must be a text, got {token!r}")
        if token:
            return token
    special = {t.content for t in tokenizer.get_added_tokens_decoder().values() if t.special}
    for token in (*USUAL_BOS, *USUAL_EOS):
        if token in special and not config:
            return token
    raise ValueError(
        f"{file} has neither a BOS nor an EOS token to put between documents; its special tokens: "
        f"{', '.join(sorted(special)) or 'none'}. Name one as bos_token in {CONFIG} beside it"
    )


def _config_beside(file: Path) -> dict:
    """The settings beside a file of the usual name; any other file stands alone."""
    config: dict = {}
    if file.name == TOKENIZER:
        for name in ("special_tokens_map.json", CONFIG):
            if (file.parent / name).is_file():
                config |= read_json(file.parent / name)
    return config


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE without normalisation: decoding gives back every text exactly.

    The vocabulary is smaller than asked for where the texts have too few pairs to merge.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[SEPARATOR_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write a trained tokenizer so that transformers.AutoTokenizer loads it."""
    write_file(folder / TOKENIZER, tokenizer.to_str(pretty=True).encode())
    _write_config(folder, SEPARATOR_TOKEN)


def copy_tokenizer(path: str | os.PathLike, folder: Path) -> None:
    """Copy a given tokenizer; a file without settings gets them."""
    file = find_tokenizer(path)
    names = COPIED if file.name == TOKENIZER else ()
    with naming_full_disk(folder / TOKENIZER):
        for name in names:
            if (file.parent / name).is_file():
                shutil.copyfile(file.parent / name, folder / name)
        shutil.copyfile(file, folder / TOKENIZER)
    if not (folder / CONFIG).is_file():
        _write_config(folder, load_encoder(file).separator_token)


def _write_config(folder: Path, separator_token: str) -> None:
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": separator_token,
        "eos_token": separator_token,
        "clean_up_tokenization_spaces": False,
    }
    write_json(folder / CONFIG, config)
