"""What every command does with wrong input: one line that helps, an exit code, nothing half-done.

A case is a command line and what its message says. Words in braces are the files, folders and runs
that wrong_things.py makes: {data:junk} is a prepared folder with the flaw "junk". {out} is new.
"""

import fcntl
import io
import json
import os
import resource
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from wrong_things import TEXT, Things

from gdn2 import cli

TINY = "schedule.total_tokens=2048 schedule.warmup_tokens=0 log.validate_every_tokens=none"

PREPARE = [
    ("", "the following arguments are required: SOURCE, --out"),
    ("{texts}", "the following arguments are required: --out"),
    ("--out {out}", "the following arguments are required: SOURCE"),
    ("'' --out {out}", "a source must be a file, a folder or stdlib, got an empty name"),
    ("{texts} --out ''", "argument --out: the path is empty"),
    ("nowhere.txt --out {out}", "source nowhere.txt does not exist"),
    ("'no\nwhere' --out {out}", "source no where does not exist"),
    ("{long} --out {out}", "xxx: File name too long"),
    ("/dev/null --out {out}", "a pipe or a device can not be read twice"),
    ("/dev/full --out {out}", "a pipe or a device can not be read twice"),
    ("{fifo} --out {out}", "a pipe or a device can not be read twice"),
    ("- --out {out}", "source - does not exist"),
    ("{texts} {texts} --out {out}", "is given twice"),
    ("{texts}/more --out {out}", "does not exist"),
    ("{folder} --out {out}", "(or those with .gz or .zst); found: nothing"),
    ("{pictures} --out {out}", "found: 1 x .png, 1 x no suffix"),
    ("{empty.txt} --out {out}", "found 0 (skipped: 1 empty)"),
    ("{junk.txt} --out {out}", "found 0 (skipped: 1 not_utf8)"),
    ("{one.txt} --out {out}", "found 1 (skipped: none)"),
    ("{utf16.txt} --out {out}", "found 0 (skipped: 1 not_utf8)"),
    ("{junk.jsonl} --out {out}", "1 is not JSON: 'utf-16-be' codec can't decode byte 0x0a in"),
    ("{deep.jsonl} --out {out}", "1 is not JSON"),
    ("{digits.jsonl} --out {out}", "1 is not JSON: Exceeds the limit (4300 digits) for integer"),
    ("{utf16.jsonl} --out {out}", "1 is not JSON: 'utf-16-le' codec can't decode byte 0x0a in"),
    ("{numbers.jsonl} --out {out}", "1: column 'text' is int, expected text"),
    ("{arrays.jsonl} --out {out}", "1 has no column 'text'; it has: list"),
    ("{cut.jsonl} --out {out}", "2000 is not JSON: Unterminated string starting at: line 1"),
    ("{texts} --out {out} --text-column body", "1 has no column 'body'; it has: text"),
    ("{texts} --out {out} --text-column ''", "1 has no column ''; it has: text"),
    ("{texts} --out {out} --text-column 'te\nxt'", "1 has no column 'te\\nxt'; it has: text"),
    ("{texts} --out {out} --text-column te\udce9xt", "1 has no column 'te\\udce9xt'; it has: text"),
    ("{junk.parquet} --out {out}", "is not Parquet: Parquet magic bytes not found in footer."),
    ("{empty.parquet} --out {out}", "is not Parquet: Parquet file size is 0 bytes"),
    ("{body.parquet} --out {out}", "has no column 'text'; it has: body"),
    ("{numbers.parquet} --out {out}", "column 'text' is int64, expected string"),
    ("{norows.parquet} --out {out}", "found 0 (skipped: none)"),
    ("{plain.txt.gz} --out {out}", "is broken: Not a gzipped file (b'te')"),
    ("{plain.txt.zst} --out {out}", "is broken: Unable to decompress Zstandard data: Unknown"),
    ("{cut.jsonl.gz} --out {out}", "is broken: Compressed file ended before the end-of-stream"),
    ("{cut.jsonl.zst} --out {out}", "is broken: Compressed file ended before the end-of-stream"),
    ("{texts} --out {texts}", "out must be a folder, but"),
    ("{texts} --out {texts}/out", "can not be made: Not a directory; choose another"),
    ("{texts} --out /dev/full", "out must be a folder, but /dev/full is a file"),
    ("{texts} --out /proc/nothing/out", "/proc/nothing/out can not be made: No such file or"),
    ("{texts} --out /sys/gdn2", "/sys/gdn2 can not be made: "),
    ("{texts} --out {pictures}", "is not empty and was not begun by prepare: use another"),
    ("{pictures} --out {pictures}/out", "lies inside the source folder"),
    ("{texts} --out {data}", "vocab_size was 300 and is 8192"),
    ("{texts} --out {data:junk}", "is not JSON: Expecting value"),
    ("{texts} --out {journal:junk}", "is not JSON: Expecting value"),
    ("{texts} --out {journal:list}", "must be a JSON object, got list"),
    ("{texts} --out {journal:keys}", "is damaged: delete "),
    ("{texts} --out {journal:empty}", "is not JSON: Expecting value"),
    ("{texts} --out {out} --vocab-size 0", "vocab_size must be at least 257 (256 bytes and the"),
    ("{texts} --out {out} --vocab-size -300", "vocab_size must be at least 257 (256 bytes and"),
    ("{texts} --out {out} --vocab-size 3e2", "argument --vocab-size: invalid int value: '3e2'"),
    ("{texts} --out {out} --vocab-size nan", "argument --vocab-size: invalid int value: 'nan'"),
    ("{texts} --out {out} --vocab-size {digits}", "and at most 1,048,576, got 999"),
    ("{texts} --out {out} --val-fraction 0", "val_fraction must lie between 0 and 1, got 0.0"),
    ("{texts} --out {out} --val-fraction 1", "val_fraction must lie between 0 and 1, got 1.0"),
    ("{texts} --out {out} --val-fraction -0.1", "val_fraction must lie between 0 and 1, got -0.1"),
    ("{texts} --out {out} --val-fraction nan", "val_fraction must lie between 0 and 1, got nan"),
    ("{texts} --out {out} --val-fraction inf", "val_fraction must lie between 0 and 1, got inf"),
    ("{texts} --out {out} --val-fraction half", "argument --val-fraction: invalid float value:"),
    ("{texts} --out {out} --workers 0", "workers must be at least 1, got 0"),
    ("{texts} --out {out} --workers -1", "workers must be at least 1, got -1"),
    ("{texts} --out {out} --workers 1.5", "argument --workers: invalid int value: '1.5'"),
    ("{texts} --out {out} --tokenizer nowhere", "tokenizer nowhere does not exist"),
    ("{texts} --out {out} --tokenizer ''", "argument --tokenizer: the path is empty"),
    ("{texts} --out {out} --tokenizer {folder}", "has no tokenizer.json"),
    ("{texts} --out {out} --tokenizer {junk.txt}", "is not a tokenizer of the tokenizers"),
    ("{texts} --out {out} --tokenizer {empty.txt}", "is not a tokenizer of the tokenizers"),
    ("{texts} --out {out} --tokenizer {texts}", "is not a tokenizer of the tokenizers library:"),
    ("{texts} --out {out} --tokenizer {tokenizer:nospecial}", "has neither a BOS nor an EOS"),
    ("{texts} --out {out} --tokenizer {tokenizer:list}", "must be a JSON object, got list"),
    ("{texts} --out {out} --tokenizer {tokenizer:junk}", "is not JSON: Expecting value"),
    ("{texts} --out {out} --tokenizer {tokenizer:number}", "must be a text, got 5"),
    ("{texts} --out {out} --tokenizer {tokenizer:object}", "must be a text, got {'x': 1}"),
    ("{texts} --out {out} --tokenizer {tokenizer:absent}", "has no token '<nothing>', which"),
    ("{texts} --out {out} --tokenizer {tokenizer:slow}", "convert it first, with transformers"),
    ("{texts} --out {out} --tokenizer {data}/tokenizer --vocab-size 300", "argument"),
    ("{texts} --out {out} --vocab-size", "argument --vocab-size: expected one argument"),
    ("{texts} --out {out} --vocab 300", "unrecognized arguments: --vocab 300"),
    ("{texts} --out {out} --out {out}", "argument --out: given twice"),
    ("{texts} --out {out} --vocab-size 300 --vocab-size 300", "argument --vocab-size: given twice"),
    ("{texts} --out {out} --device cuda", "unrecognized arguments: --device cuda"),
    ("{texts} --out {out} optim.lr=1", "unrecognized arguments: optim.lr=1"),
]

TRAIN = [
    ("", "the following arguments are required: PRESET, --data, --out"),
    ("'' --data {data} --out {out}", "there is no preset ''"),
    ("debug", "the following arguments are required: --data, --out"),
    ("debug --data {data}", "the following arguments are required: --out"),
    ("debug --out {out}", "the following arguments are required: --data"),
    ("debgu --data {data} --out {out}", "there is no preset 'debgu'; close: debug"),
    ("'de\nbug' --data {data} --out {out}", "there is no preset 'de\\nbug'; close: debug"),
    ("debug.py --data {data} --out {out}", "there is no preset 'debug.py'; close: debug"),
    ("debug demo_gdn2 --data {data} --out {out}", "unrecognized arguments: demo_gdn2"),
    ("debug --data nowhere --out {out}", "nowhere has no manifest.json: not a folder that prepare"),
    ("debug --data '' --out {out}", "argument --data: the path is empty"),
    ("debug --data {data} --out ''", "argument --out: the path is empty"),
    ("debug --data {texts} --out {out}", "has no manifest.json: not a folder that prepare"),
    ("debug --data {folder} --out {out}", "has no manifest.json: not a folder that prepare"),
    ("debug --data /dev/null --out {out}", "/dev/null has no manifest.json: not a folder that"),
    ("debug --data {journal:keys} --out {out}", "has no manifest.json: not a folder that prepare"),
    ("debug --data {data:junk} --out {out}", "is not JSON: Expecting value"),
    ("debug --data {data:empty} --out {out}", "is not JSON: Expecting value"),
    ("debug --data {data:list} --out {out}", "must be a JSON object, got list"),
    ("debug --data {data:version} --out {out}", "version must be 1, got 2"),
    ("debug --data {data:missing} --out {out}", "missing 1 required positional argument:"),
    ("debug --data {data:types} --out {out}", "is damaged: its vocab_size is 'many'. Prepare the"),
    ("debug --data {data:splits} --out {out}", "is damaged ("),
    ("debug --data {data:split} --out {out}", "is damaged: its splits are train, not train,"),
    ("debug --data {data:shards} --out {out}", "is damaged ("),
    ("debug --data {data:negative} --out {out}", "is damaged: its totals of train are not the"),
    ("debug --data {data:dtype} --out {out}", "is damaged: its dtype is 'object', for a"),
    ("debug --data {data:separator} --out {out}", "is damaged: its separator is 1000000, of 300"),
    ("debug --data {data:outside} --out {out}", "is damaged: its shards of train are not all"),
    ("debug --data {data:extra} --out {out}", "unexpected keyword argument 'sauce'"),
    ("debug --data {data:deep} --out {out}", "is not JSON"),
    ("debug --data {data:noshard} --out {out}", "is missing"),
    ("debug --data {data:cutshard} --out {out}", "bytes, expected"),
    ("debug --data {data:othershard} --out {out}", "is not the shard of the manifest: other"),
    ("debug --data {data:noindex} --out {out}", "is missing"),
    ("debug --data {data:badindex} --out {out}", "ends at token 0, expected"),
    ("debug --data {data:notokenizer} --out {out}", "is missing or not the tokenizer that encoded"),
    ("debug --data {data:othertokenizer} --out {out}", "is missing or not the tokenizer that"),
    ("debug --data {data:badsettings} --out {out}", "tokenizer_config.json is not JSON"),
    ("debug --data {data} --out {texts}", "can not be a folder: it is a file; choose another"),
    ("debug --data {data} --out {texts}/run", "can not be made: Not a directory; choose"),
    ("debug --data {data} --out /dev/full", "/dev/full can not be a folder: it is a file; choose"),
    ("debug --data {data} --out /sys/gdn2", "/sys/gdn2 can not be made: "),
    ("debug --data {data} --out {pictures}", "is not empty and was not begun by train: choose"),
    ("debug --data {data} --out {data}", "is not empty and was not begun by train: choose"),
    ("debug --data {data} --out {run}", "schedule.total_tokens 2048 -> 20480"),
    (
        "debug --data {data} --out {run} schedule.warmup_tokens=0 optim.lr=1",
        "undo: optim.lr 0.006 -> 1.0",
    ),
    ("debug --data {data} --out {run:configjunk}", "is not empty and was not begun by train:"),
    ("debug --data {data} --out {run:configlist}", "is not empty and was not begun by train:"),
    ("debug --data {data} --out {run:configshape}", "is not empty and was not begun by train:"),
    ("debug --data {data} --out {out} --device", "argument --device: expected one argument"),
    ("debug --data {data} --out {out} --device ''", "argument --device: invalid choice: ''"),
    ("debug --data {data} --out {out} --device tpu", "argument --device: invalid choice: 'tpu'"),
    ("debug --data {data} --out {out} --device cuda:99", "argument --device: invalid choice:"),
    ("debug --data {data} --out {out} --device cpu --device cpu", "argument --device: given twice"),
    ("debug --data {data} --out {out} --resume", "unrecognized arguments: --resume"),
    ("debug --data {data} --out {out} --optim.lr=1", "unrecognized arguments: --optim.lr=1"),
    ("debug --data {data} --out {out} optim.lr", "unrecognized arguments: optim.lr; settings are"),
    ("debug --data {data} --out {out} optim.lr=", "optim.lr must be float, got ''"),
    ("debug --data {data} --out {out} optim.lr=1 optim.lr=2", "optim.lr is given twice"),
    ("debug --data {data} --out {out} model.vocab_size=100", "the model's vocabulary, 100, is"),
    ("debug --data {data} --out {out} seed=-1", "seed must be at least 0 and below 2^63, got -1"),
    (
        "debug --data {data} --out {out} data.sequence_length=1e9 schedule.tokens_per_step=8e9",
        "schedule.tokens_per_step must be at most 2,147,483,647, got",
    ),
    (
        "debug --data {data} --out {out} data.sequence_length=8192 schedule.tokens_per_step=65536",
        "got 8192: take shorter sequences or prepare more text",
    ),
    (
        "debug --data {data} --out {out} schedule.total_tokens=1e18 schedule.tokens_per_step=512e9",
        "schedule.tokens_per_step must be at most 2,147,483,647, got",
    ),
    ("debug --data {data} --out {out} model.pad_token_id=99999", "pad_token_id must be a token"),
    ("debug --data {data} --out {out} model.bos_token_id=-7", "bos_token_id must be a token"),
]

CHECKPOINTS = [  # of eval and of generate
    ("''", "argument CHECKPOINT: the path is empty"),
    ("nowhere", "no checkpoint at nowhere: there is no such folder"),
    ("'no\nwhere'", "no checkpoint at no where: there is no such folder"),
    ("{texts}", "there is no such folder"),
    ("/dev/null", "no checkpoint at /dev/null: there is no such folder"),
    ("{folder}", "expected a run with checkpoints/step_* or final/, a step"),
    ("{data}", "expected a run with checkpoints/step_* or final/, a step"),
    ("{long}", "xxx: File name too long"),
    ("{run:nosteps}", "expected a run with checkpoints/step_* or final/, a step"),
    ("{hf:junk}", "is not JSON: Expecting value"),
    ("{hf:empty}", "is not JSON: Expecting value"),
    ("{hf:list}", "must have model_type 'gdn2', got []"),
    ("{hf:number}", "must have model_type 'gdn2', got 5"),
    ("{hf:binary}", "is not JSON: Expecting value"),
    ("{hf:other}", "must have model_type 'gdn2', got 'llama'"),
    ("{hf:typed}", "must have model_type 'gdn2', got ['gdn2']"),
    ("{hf:key}", "is wrong: Gdn2Config has no key 'hiden_size': did you mean"),
    ("{hf:type}", "is wrong: hidden_size must be a positive integer, got 'wide'"),
    ("{hf:zero}", "is wrong: num_heads must be a positive integer, got 0"),
    ("{hf:nan}", "is wrong: norm_eps must be a positive finite number, got nan"),
    ("{hf:mixers}", "is wrong: mixers must be names of ["),
    ("{hf:huge}", "is wrong: hidden_size must be at most 268,435,456, got"),
    ("{hf:layers}", "is wrong: num_hidden_layers must be at most 10,000, got"),
    ("{hf:deep}", "is not JSON"),
    ("{hf:notokenizer}", "has no tokenizer.json"),
    ("{hf:junktokenizer}", "is not a tokenizer of the tokenizers library"),
    ("{hf:junkconfig}", "is not JSON: Expecting value"),
    ("{step:noconfig}", "expected a run with checkpoints/step_* or final/, a step"),
]

DAMAGED_CHECKPOINTS = [
    ("{hf:noweights}", "Error no file named model.safetensors, or pytorch_model.bin,"),
    ("{hf:emptyweights}", "Error while deserializing header: header too small"),
    ("{hf:junkweights}", "Error while deserializing header: header too large"),
    ("{hf:cutweights}", "Error while deserializing header: incomplete metadata, file"),
    ("{hf:lessweights}", "it does not hold model.layers."),
    ("{hf:moreweights}", "it also holds extra. Are config.json and the weights of one"),
    ("{hf:otherweights}", "it has another shape of model.layers."),
    ("{hf:nanweights}", "not finite: model.layers."),
    ("{hf:wider}", "it has another shape of lm_head.weight,"),
    ("{step:nometadata}", "Error no file named model.safetensors, or pytorch_model.bin,"),
    ("{step:junkmetadata}", "invalid load key"),
    ("{step:emptymetadata}", "EOFError('Ran out of input')"),
    ("{step:nodata}", "FileNotFoundError(2, 'No such file or directory')"),
    ("{step:cutdata}", "EOFError(). Copy it again, or take another step"),
    ("{step:junkdata}", "IndexError('pop from empty list')"),
    ("{step:other}", "ValueError('Size mismatch between saved torch.Size([2]) and"),
    ("{step:wider}", "ValueError('Size mismatch between saved torch.Size([2048,"),
]

EVAL = [
    ("", "the following arguments are required: CHECKPOINT"),
    ("--data {data}", "the following arguments are required: CHECKPOINT"),
    ("{run} {run}", "unrecognized arguments: "),
    ("{run} optim.lr=1", "unrecognized arguments: optim.lr=1"),
    ("{run} --json", "unrecognized arguments: --json"),
    ("{run} --seed 1", "unrecognized arguments: --seed 1"),
    ("{run} --out {out} --data nowhere", "nowhere has no manifest.json: not a folder that prepare"),
    ("{run} --out {out} --data ''", "argument --data: the path is empty"),
    ("{run} --out {out} --data {texts}", "has no manifest.json: not a folder that prepare"),
    ("{run} --out {out} --data {folder}", "has no manifest.json: not a folder that prepare"),
    ("{run} --out {out} --data {data:junk}", "is not JSON: Expecting value"),
    ("{run} --out {out} --data {data:split}", "is damaged: its splits are train, not train,"),
    ("{run} --out {out} --data {data:novalidation}", "is missing"),
    ("{run} --out {out} --data {data:cutvalidation}", "bytes, expected"),
    ("{run} --out {out} --data {data:othertokenizer}", "is missing or not the tokenizer that"),
    ("{run} --out {out} --data {data:notokenizer}", "is missing or not the tokenizer that encoded"),
    ("{run} --out {out} --data {data:outvalidation}", "is damaged: its shards of validation are"),
    ("{run} --out ''", "argument --out: the path is empty"),
    ("{run} --out {texts}", "can not be a folder: it is a file; choose another"),
    ("{run} --out {texts}/out", "can not be made: Not a directory; choose another"),
    ("{run} --out /dev/full", "/dev/full can not be a folder: it is a file; choose another"),
    ("{run} --out /sys/gdn2", "/sys/gdn2 can not be made: "),
    ("{run} --out /proc/nothing", "/proc/nothing can not be made: No such file or directory;"),
    ("{run} --out {out} --out {out}", "argument --out: given twice"),
    ("{run} --device tpu", "argument --device: invalid choice: 'tpu' (choose from 'cpu',"),
    ("{run} --device cuda:99", "argument --device: invalid choice: 'cuda:99' (choose from"),
    ("{run} --device", "argument --device: expected one argument"),
    ("{run} --device cpu --device cpu", "argument --device: given twice"),
    ("{hf:norun} --out {out}", "does not say what it was trained on; give --data DIR"),
    ("{hf:runjunk} --out {out}", "is not JSON: Expecting value"),
    ("{hf:runlist} --out {out}", "must be a JSON object, got list"),
    ("{hf:runkeys} --out {out}", "is damaged: it must have data.path and"),
    ("{hf:runlength} --out {out}", "is damaged: it must have data.path and"),
    ("{hf:runnegative} --out {out}", "is damaged: it must have data.path and"),
    ("{hf:runhuge} --out {out}", "is damaged: it must have data.path and"),
    ("{hf:runpath} --out {out}", "is damaged: it must have data.path and"),
    ("{hf:rungone} --out {out}", "was trained on /gone, which is not there now; give --data DIR"),
    ("{hf:rundeep} --out {out}", "is not JSON"),
]

GENERATE = [
    ("", "the following arguments are required: CHECKPOINT"),
    ("{run}", "generate needs one of --prompt, --prompts, --prompt-file,"),
    ("--prompt a", "the following arguments are required: CHECKPOINT"),
    ("{run} {run} --prompt a", "unrecognized arguments: "),
    ("{run} --prompt a --prompt b", "argument --prompt: given twice"),
    ("{run} --prompt", "argument --prompt: expected one argument"),
    ("{run} --prompt a --prompts {texts}", "argument --prompts: not allowed with argument"),
    ("{run} --prompt caf\udce9", "argument --prompt: the text is not UTF-8"),
    ("{run} --prompt-file nowhere --prompt a", "argument --prompt: not allowed with argument"),
    ("{run} --prompt-file nowhere", "nowhere: No such file or directory"),
    ("{run} --prompt-file ''", "argument --prompt-file: the path is empty"),
    ("{run} --prompt-file {folder}", "Is a directory"),
    ("{run} --prompt-file {junk.txt}", "is not UTF-8: 'utf-8' codec can't decode byte 0x80 in"),
    ("{run} --prompts nowhere", "nowhere: No such file or directory"),
    ("{run} --prompts ''", "argument --prompts: the path is empty"),
    ("{run} --prompts {folder}", "Is a directory"),
    ("{run} --prompts {empty.txt}", "has no line"),
    ("{run} --prompts {junk.txt}", "is not UTF-8: 'utf-8' codec can't decode byte 0x80 in"),
    ("{run} --prompts {utf16.txt}", "is not UTF-8: 'utf-8' codec can't decode byte 0xff in"),
    ("{run} --prompts {run}/final/model.safetensors", "is not UTF-8: 'utf-8' codec can't decode"),
    ("{run} --prompt a --max-new-tokens -1", "max_new_tokens must be at least 0, got -1"),
    ("{run} --prompt a --max-new-tokens 1.5", "argument --max-new-tokens: invalid int value:"),
    ("{run} --prompt a --max-new-tokens many", "argument --max-new-tokens: invalid int value:"),
    ("{run} --prompt a --max-new-tokens", "argument --max-new-tokens: expected one argument"),
    (
        "{run} --prompt a --temperature 0",
        "temperature must be finite and above 0 (or greedy), got 0.0",
    ),
    (
        "{run} --prompt a --temperature -1",
        "temperature must be finite and above 0 (or greedy), got -1.0",
    ),
    (
        "{run} --prompt a --temperature nan",
        "temperature must be finite and above 0 (or greedy), got nan",
    ),
    ("{run} --prompt a --temperature hot", "argument --temperature: invalid float value: 'hot'"),
    ("{run} --prompt a --top-k 0", "top_k must be at least 1, got 0"),
    ("{run} --prompt a --top-k -1", "top_k must be at least 1, got -1"),
    ("{run} --prompt a --top-k 2.5", "argument --top-k: invalid int value: '2.5'"),
    ("{run} --prompt a --top-p 0", "top_p must be in (0, 1], got 0.0"),
    ("{run} --prompt a --top-p -0.5", "top_p must be in (0, 1], got -0.5"),
    ("{run} --prompt a --top-p 1.5", "top_p must be in (0, 1], got 1.5"),
    ("{run} --prompt a --top-p nan", "top_p must be in (0, 1], got nan"),
    ("{run} --prompt a --top-p most", "argument --top-p: invalid float value: 'most'"),
    ("{run} --prompt a --seed 1.5", "argument --seed: invalid int value: '1.5'"),
    ("{run} --prompt a --seed 1 --seed 2", "argument --seed: given twice"),
    ("{run} --prompt a --greedy --greedy --max-new-tokens 2", "argument --greedy: given twice"),
    ("{run} --prompt a --greedy=yes", "argument --greedy: ignored explicit argument 'yes'"),
    ("{run} --prompt a --device tpu", "argument --device: invalid choice: 'tpu' (choose from"),
    ("{run} --prompt a --device cuda:99", "argument --device: invalid choice: 'cuda:99' (choose"),
    ("{run} --prompt a --data {data}", "unrecognized arguments: --data"),
    ("{run} --prompt a model.vocab_size=3", "unrecognized arguments: model.vocab_size=3"),
    ("{run} --prompt a --temperature 1e-45", "temperature must be finite and above 0 (or greedy)"),
    ("{run} --prompt a --temperature inf", "temperature must be finite and above 0 (or greedy)"),
    ("{run} --prompt a --seed -1", "seed must be at least 0 and below 2^63, got -1"),
    ("{run} --prompt a --seed 18446744073709551616", "and below 2^63, got 18446"),
]

OVERRIDES = [
    ("=", "Run has no field ''; close: model, data"),
    ("=1", "Run has no field ''; close: model, data"),
    (".=1", "Run has no field ''; close: model, data"),
    (".lr=1", "Run has no field ''; close: model, data"),
    ("lr=1", "Run has no field 'lr'; close: model, data"),
    ("optim.=1", "optim is a section; set one of optim.{lr, betas, eps,"),
    ("optim=1", "optim is a section; set one of optim.{lr, betas, eps,"),
    ("optim.rl=1", "optim has no field 'rl'; close: lr, betas"),
    ("optim.lr.x=1", "optim has no field 'lr.x'; close: lr"),
    ("seed.x=1", "seed is a single value, it has no field 'x'"),
    ("optim.lr=", "optim.lr must be float, got ''"),
    ("optim.lr=fast", "optim.lr must be float, got 'fast'"),
    ("optim.lr=nan", "optim.lr must be finite and above 0, got nan"),
    ("optim.lr=inf", "optim.lr must be finite and above 0, got inf"),
    ("optim.lr=0", "optim.lr must be finite and above 0, got 0.0"),
    ("optim.lr=-1", "optim.lr must be finite and above 0, got -1.0"),
    ("optim.lr=1,2", "optim.lr must be float, got '1,2'"),
    ("optim.lr=[1]", "optim.lr must be float, got '[1]'"),
    ("optim.lr=none", "optim.lr must be float, got 'none'"),
    ("optim.lr=true", "optim.lr must be float, got 'true'"),
    ("optim.lr={digits}", "optim.lr must be finite and above 0, got inf"),
    ("'optim.lr=1\n2'", "optim.lr must be float, got '1\\n2'"),
    ("optim.lr=1 optim.lr=2", "optim.lr is given twice"),
    ("optim.lr={deep}", "optim.lr must be float, got"),
    ("optim.lr=caf\udce9", "optim.lr must be float, got 'caf\\udce9'"),
    ("optim.betas=0.9", "optim.betas must be tuple[float, float], got '0.9'"),
    ("optim.betas=0.9,0.95,0.99", "optim.betas must be tuple[float, float], got '0.9,0.95,0.99'"),
    ("optim.betas=0.9,1", "optim.betas must be two numbers in [0, 1), got (0.9, 1.0)"),
    ("optim.betas=nan,0.9", "optim.betas must be two numbers in [0, 1), got (nan, 0.9)"),
    ("optim.betas=0.9,{digits}", "optim.betas must be tuple[float, float], got"),
    ("optim.betas=,", "optim.betas must be tuple[float, float], got ','"),
    ("optim.eps=0", "optim.eps must be finite and above 0, got 0.0"),
    ("optim.weight_decay=-1", "optim.weight_decay must be finite and at least 0, got -1.0"),
    ("optim.weight_decay=nan", "optim.weight_decay must be finite and at least 0, got nan"),
    ("optim.decay_all=maybe", "optim.decay_all must be bool, got 'maybe'"),
    ("optim.max_grad_norm=0", "optim.max_grad_norm must be finite and above 0, got 0.0"),
    ("schedule.total_tokens=0", "schedule.total_tokens must be finite and above 0, got 0"),
    ("schedule.total_tokens=-1", "schedule.total_tokens must be finite and above 0, got -1"),
    ("schedule.total_tokens=1.5", "schedule.total_tokens must be int, got '1.5'"),
    ("schedule.total_tokens=nan", "schedule.total_tokens must be int, got 'nan'"),
    ("schedule.warmup_tokens=1e9", "schedule.warmup_tokens must lie between 0 and total_tokens"),
    ("schedule.min_lr_ratio=2", "schedule.min_lr_ratio must be in [0, 1], got 2.0"),
    ("schedule.min_lr_ratio=nan", "schedule.min_lr_ratio must be in [0, 1], got nan"),
    ("schedule.tokens_per_step=7", "schedule.tokens_per_step must be a multiple of"),
    ("schedule.tokens_per_step={digits}", "schedule.tokens_per_step must be at most"),
    ("parallel.micro_batch_size=0", "parallel.micro_batch_size must be finite and above 0, got 0"),
    ("parallel.micro_batch_size=3", "schedule.tokens_per_step must be a multiple of"),
    ("parallel.gradient_checkpointing=2", "parallel.gradient_checkpointing must be bool, got '2'"),
    ("checkpoint.every_tokens=0", "checkpoint.every_tokens must be finite and above 0, got 0"),
    ("checkpoint.keep=0", "checkpoint.keep must be finite and above 0, got 0"),
    ("log.every_steps=0", "log.every_steps must be finite and above 0, got 0"),
    ("log.validate_every_tokens=0", "log.validate_every_tokens must be finite and above 0, got 0"),
    ("log.validation_tokens=-1", "log.validation_tokens must be finite and above 0, got -1"),
    ("data.sequence_length=0", "data.sequence_length must be finite and above 0, got 0"),
    ("data.packing=loose", "data.packing must be 'packed' or 'concat', got 'loose'"),
    ("data.packing=", "data.packing must be 'packed' or 'concat', got ''"),
    ("seed=-1", "seed must be at least 0 and below 2^63, got -1"),
    ("seed=1.5", "seed must be int, got '1.5'"),
    ("seed=none", "seed must be int, got 'none'"),
    ("seed={digits}", "seed must be at least 0 and below 2^63, got"),
    ("model.hidden_size=0", "hidden_size must be a positive integer, got 0"),
    ("model.hidden_size=-8", "hidden_size must be a positive integer, got -8"),
    ("model.hidden_size=wide", "model.hidden_size must be int, got 'wide'"),
    ("model.hidden_size=nan", "model.hidden_size must be int, got 'nan'"),
    ("model.hidden_size=none", "model.hidden_size must be int, got 'none'"),
    ("model.hidden_size=1e18", "hidden_size must be at most 268,435,456, got"),
    ("model.hidden_size={digits}", "hidden_size must be at most 268,435,456, got"),
    ("model.vocab_size=0", "vocab_size must be a positive integer, got 0"),
    ("model.vocab_size=1e30", "vocab_size must be at most 268,435,456, got"),
    ("model.num_hidden_layers=3", "mixers has 2 names, which do not divide num_hidden_layers = 3"),
    ("model.num_hidden_layers=1e9", "num_hidden_layers must be at most 10,000, got 1,000,000,000"),
    ("model.num_hidden_layers=1e300", "num_hidden_layers must be at most 10,000, got"),
    ("model.mixers=lstm", "mixers must be names of ["),
    ("model.mixers=", "mixers must be names of ["),
    ("model.mixers=[]", "mixers must be a list of names, got []"),
    ("model.mixers=gdn2,,kda", "mixers must be names of ["),
    ("model.mixers=[1]", "mixers must be names of ["),
    ("model.mixers=[[]]", "mixers must be names of ["),
    ("model.mixers=[", "mixers must be names of ["),
    ("model.num_heads=0", "num_heads must be a positive integer, got 0"),
    ("model.num_heads=1e9 model.head_k_dim=1e9", "num_heads must be at most 268,435,456, got"),
    ("model.num_v_heads=3", "num_v_heads must be a multiple of num_heads = 2, got 3"),
    ("model.num_heads=3", "num_v_heads must be a multiple of num_heads = 3, got 2"),
    ("model.head_k_dim=0", "head_k_dim must be a positive integer, got 0"),
    ("model.head_v_dim=-1", "head_v_dim must be a positive integer or None, got -1"),
    ("model.conv_size=0", "conv_size must be a positive integer, got 0"),
    ("model.conv_size=1e18", "conv_size must be at most 268,435,456, got"),
    ("model.erase_range=3", "erase_range must be 1.0 or 2.0, got 3.0"),
    ("model.erase_range=nan", "erase_range must be 1.0 or 2.0, got nan"),
    ("model.output_gate=relu", "output_gate must be None (the mixer's own) or one of ('silu',"),
    ("model.output_gate_rank=0", 'output_gate_rank must be "native" (the mixer\'s own), None'),
    ("model.output_gate_rank=full", "model.output_gate_rank must be int | 'native' | None, got"),
    ("model.output_gate_rank=1e18", 'output_gate_rank must be "native" (the mixer\'s own), None'),
    ("model.intermediate_size=0", "intermediate_size must be a positive integer, got 0"),
    ("model.attention_head_dim=7", "attention_head_dim must be even (rotary pairs), got 7"),
    ("model.num_attention_heads=0", "num_attention_heads must be a positive integer, got 0"),
    ("model.rope_theta=0", "rope_theta must be a positive finite number, got 0.0"),
    ("model.rope_theta=nan", "rope_theta must be a positive finite number, got nan"),
    ("model.rope_theta=inf", "rope_theta must be a positive finite number, got inf"),
    ("model.sliding_window=0", "sliding_window must be a positive integer, got 0"),
    ("model.norm_eps=nan", "norm_eps must be a positive finite number, got nan"),
    ("model.norm_eps=inf", "norm_eps must be a positive finite number, got inf"),
    ("model.norm_eps=-1", "norm_eps must be a positive finite number, got -1.0"),
    ("model.initializer_range=inf", "initializer_range must be a positive finite number, got inf"),
    ("model.initializer_range=nan", "initializer_range must be a positive finite number, got nan"),
    ("model.tie_word_embeddings=perhaps", "model.tie_word_embeddings must be bool, got 'perhaps'"),
    ("model.max_position_embeddings=0", "max_position_embeddings must be a positive integer, got"),
    ("model.use_cache=2", "model.use_cache must be bool, got '2'"),
    ("model.bos_token_id=-1", "bos_token_id must be a token below vocab_size = 2,048 or"),
    ("model.bos_token_id=2048", "bos_token_id must be a token below vocab_size = 2,048 or"),
    ("model.eos_token_id=1.5", "model.eos_token_id must be int | list[int] | None, got '1.5'"),
    ("model.eos_token_id=[1,99999]", "eos_token_id must be a token below vocab_size = 2,048 or"),
    ("model.pad_token_id=1e9", "pad_token_id must be a token below vocab_size = 2,048 or"),
    ("model.torch_dtype=float16", "model has no field 'torch_dtype'; close: vocab_size"),
    ("model.layer_types=[]", "model has no field 'layer_types'; close: vocab_size"),
    ("model=1", "model is a section; set one of model.{vocab_size,"),
]

INFO = [
    ("debug optim.lr", "unrecognized arguments: optim.lr"),
    ("", "the following arguments are required: PRESET"),
    ("''", "there is no preset ''; close: gdn2_1p3b"),
    ("debgu", "there is no preset 'debgu'; close: debug"),
    ("DEBUG", "there is no preset 'DEBUG'; close: gdn2_1p3b"),
    ("'de\nbug'", "there is no preset 'de\\nbug'; close: debug"),
    ("caf\udce9", "there is no preset 'caf\\udce9'; close: gdn2_1p3b"),
    ("debug debug", "unrecognized arguments: debug"),
    ("--json", "the following arguments are required: PRESET"),
    ("debug --json --json", "argument --json: given twice"),
    ("debug --json=1", "argument --json: ignored explicit argument '1'"),
    ("debug --yaml", "unrecognized arguments: --yaml"),
    ("debug --device cpu", "unrecognized arguments: --device cpu"),
    ("debug --out {out}", "unrecognized arguments: --out"),
    ("{run}", "'; close: gdn2_1p3b"),
    ("{texts}", "'; close: gdn2_1p3b"),
]

FAILURES = [
    (
        "debug --data {data} --out {out} model.vocab_size=268435456 model.hidden_size=1048576",
        "no memory for a model of hidden_size 1,048,576",
    ),
    (f"debug --data {{data}} --out {{run:metrics}} {TINY}", "metrics.jsonl:1 is damaged"),
    (f"debug --data {{data}} --out {{run:stepdata}} {TINY}", "EOFError(). Copy it again"),
    (f"debug --data {{data}} --out {{run:stepmetadata}} {TINY}", "invalid load key"),
]


# --- the laws -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def things(tmp_path_factory: pytest.TempPathFactory) -> Things:
    root = tmp_path_factory.mktemp("wrong")
    rows = [{"text": f"{n}. " + TEXT * (1 + n % 7)} for n in range(80)]
    (root / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "things").mkdir()
    made = Things(root / "things", root / "data", root / "run")
    for line in (
        "prepare {texts} --out {data} --vocab-size 300 --val-fraction 0.1",
        f"train debug --data {{data}} --out {{run}} {TINY}",
    ):
        assert cli.main(made.expand(line, root / "out")) == 0
    return made


@pytest.fixture
def call(
    things: Things,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[[str], tuple[int, str]]:
    """Run a command line in an empty folder; its code and its only complaint."""

    def run(line: str) -> tuple[int, str]:
        words = things.expand(line, tmp_path / "out")
        monkeypatch.chdir(tmp_path)
        capsys.readouterr()
        code = cli.main(words)
        text = capsys.readouterr().err
        assert "Traceback" not in text
        *before, last = text.splitlines()
        assert last.startswith("gdn2")
        assert ": error: " in last
        assert last.isprintable()
        assert len(last) < 1400
        assert not [line for line in before if "error" in line]
        assert len(before) <= 3
        for name in ("manifest.json", "final", "eval.json", "eval.png"):
            assert not (tmp_path / "out" / name).exists()
        return code, last

    return run


def lines(command: str, cases: list[tuple[str, str]], form: str = "{}") -> list[Any]:
    cases = [(f"{command} {form.replace('{}', line)}", said) for line, said in cases]
    return [pytest.param(line, said, id=ascii(line)[1:-1][:120]) for line, said in cases]


def test_there_are_thirty_cases_of_every_command() -> None:
    checkpoints = len(CHECKPOINTS) + len(DAMAGED_CHECKPOINTS)
    for cases in (PREPARE, TRAIN, EVAL, GENERATE, INFO + OVERRIDES):
        assert len(cases) + checkpoints * (cases in (EVAL, GENERATE)) >= 30


@pytest.mark.parametrize(
    ("line", "said"),
    [
        *lines("prepare", PREPARE),
        *lines("train", TRAIN),
        *lines("eval", EVAL),
        *lines("eval", CHECKPOINTS, "{} --out {out} --data {data}"),
        *lines("generate", GENERATE),
        *lines("generate", CHECKPOINTS, "{} --prompt a --max-new-tokens 2"),
        *lines("info", INFO),
        *lines("info", OVERRIDES, "debug {}"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(
    line: str, said: str, call: Callable[[str], tuple[int, str]]
) -> None:
    code, message = call(line)
    assert said in message
    assert code == 2


@pytest.mark.parametrize(
    ("line", "said"),
    [
        *lines("train", FAILURES),
        *lines("eval", DAMAGED_CHECKPOINTS, "{} --out {out} --data {data}"),
        *lines("generate", DAMAGED_CHECKPOINTS, "{} --prompt a --max-new-tokens 2"),
    ],
)
def test_failure_is_one_line_and_exit_code_1(
    line: str, said: str, call: Callable[[str], tuple[int, str]]
) -> None:
    code, message = call(line)
    assert said in message
    assert code == 1


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """A disk that takes no larger file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    ("line", "size"),
    [
        ("prepare {texts} --out {out}", 0),
        ("prepare {texts} --out {out}", 2000),
        ("prepare {texts} --out {out} --tokenizer {data}/tokenizer", 3000),
        (f"train debug --data {{data}} --out {{out}} {TINY}", 0),
        (f"train debug --data {{data}} --out {{out}} {TINY}", 20_000),
        ("eval {run} --out {out}", 0),
        ("eval {run} --out {out}", 2000),
    ],
)
def test_a_full_disk_is_named_and_leaves_nothing_that_looks_whole(
    line: str, size: int, call: Callable[[str], tuple[int, str]]
) -> None:
    with largest_file(size):
        code, message = call(line)
    assert code == 1
    assert "out" in message


@pytest.mark.parametrize(
    "line", ["prepare {texts} --out {out}", f"train debug --data {{data}} --out {{out}} {TINY}"]
)
def test_a_folder_in_use_is_left_alone(
    line: str, tmp_path: Path, call: Callable[[str], tuple[int, str]]
) -> None:
    (tmp_path / "out").mkdir()
    descriptor = os.open(tmp_path / "out", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    code, message = call(line)
    os.close(descriptor)
    assert code == 1
    assert "is in use by another process" in message
    assert not list((tmp_path / "out").iterdir())


def pipe_without_reader() -> io.TextIOWrapper:
    reader, writer = os.pipe()
    os.close(reader)
    return open(writer, "w")


PRINTING = ("eval {run} --out {out}", "generate {run} --prompt a --max-new-tokens 2", "info debug")


@pytest.mark.parametrize("line", PRINTING)
def test_stdout_without_a_reader_is_exit_code_1_and_no_word(
    line: str, things: Things, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors = io.StringIO()
    monkeypatch.setattr(sys, "stderr", errors)
    with monkeypatch.context() as patch, pipe_without_reader() as stdout:
        patch.setattr(sys, "stdout", stdout)
        assert cli.main(things.expand(line, tmp_path / "out")) == 1
    assert "error" not in errors.getvalue()


@pytest.mark.parametrize("line", PRINTING)
def test_stdout_on_a_full_disk_is_said_once(
    line: str,
    things: Things,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with monkeypatch.context() as patch, open("/dev/full", "w") as stdout:
        patch.setattr(sys, "stdout", stdout)
        assert cli.main(things.expand(line, tmp_path / "out")) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "gdn2: error: stdout: No space left on device"


@pytest.mark.parametrize("line", PRINTING)
def test_stdout_of_a_poor_encoding_gets_escapes(
    line: str, things: Things, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = io.BytesIO()
    stdout = io.TextIOWrapper(raw, "ascii")
    monkeypatch.setattr(sys, "stdout", stdout)
    words = things.expand(line.replace("prompt a", "prompt δ"), tmp_path / "out")
    assert cli.main(words) == 0
    assert raw.getvalue().isascii()


def test_closed_streams_are_no_drama() -> None:
    command = f"{shlex.quote(sys.executable)} -m gdn2.cli"
    for end in ("--help >&-", "--help >&- 2>&- <&-"):
        subprocess.run(f"{command} {end}", shell=True, check=True)
    done = subprocess.run(f"{command} nonsense 2>&-", shell=True, check=False, capture_output=True)
    assert (done.returncode, done.stdout) == (2, b"")


def test_names_that_are_not_utf8_are_names(things: Things, tmp_path: Path) -> None:
    source, out = tmp_path / "caf\udce9.jsonl", tmp_path / "o\udce9"
    shutil.copyfile(things["texts"], source)
    for _ in range(2):
        assert cli.main(["prepare", str(source), "--out", str(out), "--vocab-size", "300"]) == 0
    assert json.loads((out / "manifest.json").read_text())["sources"][0]["name"] == str(source)


@pytest.mark.parametrize(
    "line",
    [
        "prepare {texts} --out {out}",
        "train debug --data {data} --out {out}",
        "eval {run} --out {out}",
    ],
)
def test_a_read_only_folder_is_refused_before_the_work(
    line: str,
    call: Callable[[str], tuple[int, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    access = os.access  # chmod does not stop root
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK and access(path, mode))
    code, message = call(line)
    assert code == 2
    assert message.endswith("out is read-only; choose another")


def test_a_wrong_option_does_not_spoil_the_folder(
    call: Callable[[str], tuple[int, str]], things: Things, tmp_path: Path
) -> None:
    assert call("prepare {texts} --out {out} --text-column body")[0] == 2
    line = "prepare {texts} --out {out} --vocab-size 300"
    assert cli.main(things.expand(line, tmp_path / "out")) == 0
