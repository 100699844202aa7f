import json
from dataclasses import replace
from pathlib import Path

import pytest

from gdn2.data import Encoder, Samples, TokenDataset, load_encoder, prepare
from gdn2.presets import debug
from gdn2.train import Run
from recipes.demo.corpus import seen_documents, split_documents

TEXTS = [f"{n}: " + "dλ/dt = -λ🦊\r\n\t" * (n % 9 + 1) + "\x00\x7f" for n in range(50)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    (folder / "texts.jsonl").write_text(lines)
    prepare([folder / "texts.jsonl"], folder / "data", vocab_size=300, val_fraction=0.3, workers=1)
    return folder / "data"


@pytest.fixture(scope="module")
def encoder(folder: Path) -> Encoder:
    return load_encoder(folder / "tokenizer")


def short_run(steps: int) -> Run:
    run = debug()
    return replace(
        run,
        data=replace(run.data, sequence_length=16),
        parallel=replace(run.parallel, micro_batch_size=2),
        schedule=replace(
            run.schedule, tokens_per_step=64, warmup_tokens=0, total_tokens=64 * steps
        ),
    )


def test_both_splits_give_back_every_text(folder: Path, encoder: Encoder) -> None:
    splits = [split_documents(TokenDataset(folder, s), encoder) for s in ("train", "validation")]
    assert all(splits)
    assert sorted(splits[0] + splits[1]) == sorted(text.encode() for text in TEXTS)


def test_a_whole_epoch_sees_all_bytes_but_those_after_the_last_block(
    folder: Path, encoder: Encoder
) -> None:
    dataset = TokenDataset(folder, "train")
    epoch = seen_documents(dataset, encoder, short_run(10_000))
    whole = b"".join(split_documents(dataset, encoder))
    assert sum(map(len, epoch)) > len(whole) - 16 * max(map(len, epoch))
    assert all(text in whole for text in epoch)
    assert epoch == seen_documents(dataset, encoder, short_run(20_000)), "again is not more"


def test_a_short_run_sees_the_samples_of_its_steps(folder: Path, encoder: Encoder) -> None:
    dataset, run = TokenDataset(folder, "train"), short_run(3)
    seen = seen_documents(dataset, encoder, run)
    samples = Samples(dataset, seq_len=16, packing=run.data.packing, seed=run.seed)
    tokens = samples.batch(0, 12).tokens[0].tolist()
    assert run.total_steps * run.sequences_per_step == 12
    text = encoder.tokenizer.decode(tokens, skip_special_tokens=True)
    ascii_only = [character for character in text if character.isascii()]
    assert [chr(byte) for byte in b"".join(seen) if byte < 128] == ascii_only


def test_no_text_reaches_over_a_separator(folder: Path, encoder: Encoder) -> None:
    seen = seen_documents(TokenDataset(folder, "train"), encoder, short_run(10_000))
    assert not any(text.count(b": ") > 1 for text in seen)
