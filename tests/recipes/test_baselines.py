import math
import random
import shutil
import subprocess
from collections import Counter, defaultdict

import numpy as np
import pytest

from recipes.demo.baselines import CONTEXT, ByteNgram, compressed_bits_per_byte


def witten_bell_ref(training: list[bytes], document: bytes) -> list[float]:
    """The definition, with dictionaries."""
    after: dict[bytes, Counter[int]] = defaultdict(Counter)
    for text in training:
        for i, byte in enumerate(text):
            for order in range(min(i, CONTEXT) + 1):
                after[text[i - order : i]][byte] += 1

    def probability(context: bytes, byte: int) -> float:
        lower = probability(context[1:], byte) if context else 1 / 256
        followers = after.get(context)
        if followers is None:
            return lower
        return (followers[byte] + len(followers) * lower) / (followers.total() + len(followers))

    return [probability(document[max(0, i - CONTEXT) : i], b) for i, b in enumerate(document)]


def some_documents(seed: int, count: int) -> list[bytes]:
    draw = random.Random(seed)
    words = [b"the ", b"then ", b"he ", b"\x00\xff", b"a", b"\n"]
    return [b"".join(draw.choices(words, k=draw.randrange(30))) for _ in range(count)]


@pytest.mark.parametrize("seed", range(5))
def test_ngram_equals_the_definition(seed: int) -> None:
    training, documents = some_documents(seed, 12), some_documents(100 + seed, 4)
    documents.append(b"unseen \x80 bytes, the end")
    model = ByteNgram(training)
    for document in documents:
        np.testing.assert_allclose(
            model.probabilities(document), witten_bell_ref(training, document), rtol=1e-12
        )


@pytest.mark.parametrize("context", [b"", b"t", b"he", b"then", b"zzzz", b"\x00\xffa"])
def test_probabilities_of_the_256_bytes_sum_to_one(context: bytes) -> None:
    model = ByteNgram(some_documents(0, 12))
    p = [model.probabilities(context + bytes([byte]))[-1] for byte in range(256)]
    assert math.isclose(sum(p), 1, rel_tol=1e-12)
    assert min(p) > 0


def test_nothing_seen_is_eight_bits() -> None:
    assert ByteNgram([]).bits_per_byte([b"anything"]) == 8


def test_bits_per_byte_is_the_mean_over_bytes_and_contexts_stop_at_documents() -> None:
    training, documents = some_documents(1, 12), some_documents(2, 5)
    model = ByteNgram(training)
    p = np.concatenate([model.probabilities(document) for document in documents])
    assert math.isclose(model.bits_per_byte(documents), -np.log2(p).mean(), rel_tol=1e-12)


def test_training_text_is_cheaper_than_other_text() -> None:
    model = ByteNgram([b"def f(x):\n    return x\n" * 20])
    assert model.bits_per_byte([b"def f(x):\n"]) < 1 < model.bits_per_byte([b"quite another"])


def test_compressors_do_not_depend_on_the_order_of_documents() -> None:
    documents = some_documents(3, 50)
    assert compressed_bits_per_byte(documents) == compressed_bits_per_byte(documents[::-1])


@pytest.mark.parametrize("command", ["gzip -9 -n -c", "xz -9 -c"])
def test_compressors_agree_with_the_programs(command: str) -> None:
    name = command.split()[0]
    if shutil.which(name) is None:
        pytest.skip(f"{name} is not installed")
    text = b"".join(some_documents(4, 400))
    program = subprocess.run(command.split(), input=text, capture_output=True, check=True).stdout
    size = compressed_bits_per_byte([text])[name] * len(text) / 8
    assert abs(size - len(program)) <= 0.02 * len(program)  # zlib builds differ a little


def test_no_text_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one byte"):
        compressed_bits_per_byte([b""])
