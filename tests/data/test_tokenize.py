"""The separator before every text and nothing else special; transformers reads what we write."""

import json

import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors

from gdn2.data.tokenize import (
    MIN_VOCAB_SIZE,
    copy_tokenizer,
    load_encoder,
    save_tokenizer,
    train_tokenizer,
)

TRICKY = ["a<|endoftext|>b", "<|endoftext|>", "  tab\t\r\n\0 ", "na\u00efve \u4e16\U0001f600"]


@pytest.fixture(scope="module")
def own(tmp_path_factory, make_texts):
    folder = tmp_path_factory.mktemp("own")
    save_tokenizer(train_tokenizer(make_texts(50), 300), folder)
    return folder


def given(folder, *, post_processor=True, specials=("<unk>", "<s>", "</s>"), config=None):
    """A Llama-like tokenizer, which adds <s> by itself and would cut at 4 tokens."""
    folder.mkdir()
    vocabulary = {c: i for i, c in enumerate([*specials, *"abcdefgh <>/s"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token=specials[0]))
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in specials])
    if post_processor:
        pair = ("<s>", vocabulary["<s>"])
        tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[pair])
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=16, pad_token=specials[0])
    tokenizer.save(str(folder / "tokenizer.json"))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_own_tokenizer_has_one_special_token_with_id_0(own):
    encoder = load_encoder(own)
    assert (encoder.separator, encoder.separator_token) == (0, "<|endoftext|>")
    added = encoder.tokenizer.get_added_tokens_decoder()
    assert [(i, token.content) for i, token in added.items()] == [(0, "<|endoftext|>")]
    assert encoder.vocab_size == 300


@pytest.mark.parametrize("text", TRICKY)
def test_the_separator_comes_first_and_no_text_produces_it(own, text):
    encoder = load_encoder(own)
    first, *ids = encoder.encode(text)
    assert first == 0
    assert 0 not in ids
    assert encoder.tokenizer.decode(ids, skip_special_tokens=False) == text


def test_training_is_deterministic_and_text_may_contain_the_separator(make_texts):
    texts = [*make_texts(30), *TRICKY]
    assert train_tokenizer(texts, 280).to_str() == train_tokenizer(texts, 280).to_str()


def test_the_smallest_vocabulary_still_encodes_everything(make_texts):
    tokenizer = train_tokenizer(make_texts(3), MIN_VOCAB_SIZE)
    assert tokenizer.get_vocab_size() == MIN_VOCAB_SIZE
    assert tokenizer.decode(tokenizer.encode("\u4e16 !").ids) == "\u4e16 !"


def test_transformers_loads_both_and_agrees(own, tmp_path):
    transformers = pytest.importorskip("transformers")
    llama = given(tmp_path / "llama", post_processor=False)
    copy_tokenizer(llama / "tokenizer.json", _folder(tmp_path / "copy"))
    for folder, text in ((own, "the gate\n decay"), (tmp_path / "copy", "abc fed")):
        encoder = load_encoder(folder)
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        assert theirs.bos_token == theirs.eos_token == encoder.separator_token
        assert theirs.bos_token_id == encoder.separator
        assert theirs(text, truncation=False).input_ids == encoder.encode(text)[1:]
        assert len(theirs) == encoder.vocab_size


def _folder(path):
    path.mkdir()
    return path


def test_of_a_given_tokenizer_bos_plays_the_separator_once_and_nothing_is_cut(tmp_path):
    config = {"bos_token": {"content": "<s>", "special": True}, "eos_token": "</s>"}
    encoder = load_encoder(given(tmp_path / "t", config=config))
    assert encoder.encode("abcdefg") == [1, 3, 4, 5, 6, 7, 8, 9]
    assert encoder.encode("<s>") == [1, *(encoder.tokenizer.token_to_id(c) for c in "<s>")]


def test_without_bos_eos_plays_the_separator(tmp_path):
    config = {"bos_token": None, "eos_token": "</s>"}
    assert load_encoder(given(tmp_path / "t", config=config)).separator == 2


def test_special_tokens_map_counts_where_the_config_is_silent(tmp_path):
    folder = given(tmp_path / "t", config={"model_max_length": 10})
    (folder / "special_tokens_map.json").write_text('{"eos_token": "</s>"}')
    assert load_encoder(folder).separator_token == "</s>"


def test_a_bare_file_is_read_by_the_usual_names(tmp_path):
    assert load_encoder(given(tmp_path / "t") / "tokenizer.json").separator_token == "<s>"
    eos = given(tmp_path / "e", post_processor=False, specials=("<unk>", "<|endoftext|>"))
    assert load_encoder(eos / "tokenizer.json").separator_token == "<|endoftext|>"


def test_a_copy_keeps_the_file_and_gets_settings(tmp_path):
    source = given(tmp_path / "t")
    (source / "tokenizer.json").rename(source / "mine.json")
    copy_tokenizer(source / "mine.json", _folder(tmp_path / "copy"))
    copied = tmp_path / "copy" / "tokenizer.json"
    assert copied.read_bytes() == (source / "mine.json").read_bytes()
    assert load_encoder(tmp_path / "copy").separator_token == "<s>"
    assert json.loads((tmp_path / "copy/tokenizer_config.json").read_text())["bos_token"] == "<s>"


def test_a_copy_keeps_given_settings_and_leaves_weights(tmp_path):
    source = given(tmp_path / "t", config={"eos_token": "</s>"})
    (source / "model.safetensors").write_bytes(b"weights")
    copy_tokenizer(source, _folder(tmp_path / "copy"))
    names = sorted(file.name for file in (tmp_path / "copy").iterdir())
    assert names == ["tokenizer.json", "tokenizer_config.json"]
    assert load_encoder(tmp_path / "copy").separator_token == "</s>"


def test_unusable_tokenizers_are_refused_with_the_reason(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tokenizer .*nothing does not exist"):
        load_encoder(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"has no tokenizer\.json"):
        load_encoder(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(ValueError, match=r"tokenizer\.model but no tokenizer\.json: convert it"):
        load_encoder(tmp_path)
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ValueError, match=r"broken\.json is not a tokenizer"):
        load_encoder(tmp_path / "broken.json")
    silent = given(tmp_path / "t", post_processor=False, specials=("<unk>",), config={})
    with pytest.raises(ValueError, match=r"neither a BOS nor an EOS token .* tokens: <unk>"):
        load_encoder(silent)
    foreign = given(tmp_path / "f", config={"bos_token": "<begin>"})
    with pytest.raises(ValueError, match="has no token '<begin>'"):
        load_encoder(foreign)
    (foreign / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json is not JSON"):
        load_encoder(foreign)


def test_byte_level_tokenizers_of_others_round_trip(tmp_path, make_texts):
    """A GPT-2-like file: ByteLevel with <|endoftext|> as its last token."""
    tokenizer = train_tokenizer(make_texts(5), 260)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(str(tmp_path / "gpt.json"))
    encoder = load_encoder(tmp_path / "gpt.json")
    assert encoder.tokenizer.decode(encoder.encode("caf\u00e9\n")[1:]) == "caf\u00e9\n"
