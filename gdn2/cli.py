"""gdn2 prepare | train | eval | generate | info: parse, call, and turn errors into exit codes.

0 done; 2 wrong input (one line on stderr says which); 1 failure; 130 Ctrl-C. Every command
imports what it needs when it runs, so that `--help` is instant and a missing extra names itself.
"""

import argparse
import errno
import io
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from opcode import opmap
from pathlib import Path
from typing import Any, NoReturn

PACKAGE = Path(__file__).parent
WRONG_INPUT = (ValueError, ImportError, NotImplementedError)
WRONG_PATH = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError)
WRONG_PATH_NUMBERS = (errno.ENAMETOOLONG, errno.ELOOP)
FAILURE = (RuntimeError, ArithmeticError)
MESSAGE = 1200  # characters


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    _complete_streams()
    parser = _build_parser()
    try:
        args, rest = parser.parse_known_args(argv)
        args.overrides = _overrides(args.parser, rest)
        args.run(args)
        sys.stdout.flush()
    except SystemExit as stop:  # argparse: --help or a wrong option
        return stop.code if isinstance(stop.code, int) else 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader has gone
        _give_up_stdout()
        return 1
    except (*WRONG_INPUT, *FAILURE) as error:
        if not _is_said_by_gdn2(error):
            raise
        return _complain(error, 2 if isinstance(error, WRONG_INPUT) else 1)
    except OSError as error:
        if not _give_up_stdout() and error.filename is None:
            error.filename = "stdout"
        wrong = isinstance(error, WRONG_PATH) or error.errno in WRONG_PATH_NUMBERS
        return _complain(error, 2 if wrong else 1)
    except MemoryError as error:
        return _complain(error, 1)
    return 0


def _is_said_by_gdn2(error: BaseException) -> bool:
    """Whether a `raise` of this package raised it: its words are then for the user.

    All else of these types, from a library or from an operation of ours that should have worked,
    is a bug and keeps its traceback. The system's own errors (OSError) need no such words.
    """
    trace = error.__traceback__
    assert trace is not None
    while trace.tb_next is not None:
        trace = trace.tb_next
    code = trace.tb_frame.f_code
    raised = code.co_code[trace.tb_lasti] == opmap["RAISE_VARARGS"]
    return raised and Path(code.co_filename).is_relative_to(PACKAGE)


def _complain(error: BaseException, code: int) -> int:
    message = str(error) or type(error).__name__
    if isinstance(error, OSError) and error.strerror:
        where = error.filename if error.filename2 is None else error.filename2
        message = error.strerror if where is None else f"{where}: {error.strerror}"
    print(_one_line(f"gdn2: error: {message}"), file=sys.stderr)
    return code


def _one_line(text: str) -> str:
    """Without what would move the cursor, and not longer than a screen."""
    text = " ".join(text.split())
    if len(text) > MESSAGE:
        text = f"{text[: MESSAGE - 200]} ... {text[-200:]}"
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _complete_streams() -> None:
    """A stream that the caller closed goes nowhere, and no file of ours takes its number.

    Text that the terminal's encoding does not have is written as escapes.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _give_up_stdout() -> bool:
    """Whether it still takes text; if not, what it holds must not fail again at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return False
    return True


# --- commands --------------------------------------------------------------------------------


def _prepare(args: argparse.Namespace) -> None:
    from gdn2.data import prepare

    options = ("tokenizer", "vocab_size", "text_column", "val_fraction", "workers")
    given = {name: getattr(args, name) for name in options if name in args}
    prepare(args.sources, args.out, **given)


def _train(args: argparse.Namespace) -> None:
    run = _resolve_run(args.preset, args.overrides)
    from gdn2.train.loop import train

    train(run, data=args.data, out=args.out, device=args.device)


def _eval(args: argparse.Namespace) -> None:
    from gdn2.evals.perplexity import evaluate_checkpoint, show
    from gdn2.models.device import prepare_device

    prepare_device(args.device)
    out = args.out or args.checkpoint
    show(evaluate_checkpoint(args.checkpoint, data=args.data, out=out, device=args.device))
    print(f"wrote {out / 'eval.json'} and {out / 'eval.png'}", file=sys.stderr)


def _generate(args: argparse.Namespace) -> None:
    prompts = _prompts(args)
    texts = len(prompts) * args.fork
    if args.fork < 1:
        raise ValueError(f"--fork must be at least 1, got {args.fork}")
    if args.fork > 1 and args.greedy:
        raise ValueError("--fork with --greedy would write the same text again and again")
    if args.save_state and texts > 1:
        raise ValueError(f"--save-state is for the state behind one text, got {texts} texts")
    from gdn2.evals.sampling import Sampling, write_texts

    options = ("max_new_tokens", "temperature", "top_k", "top_p", "greedy", "seed")
    sampling = Sampling(**{name: getattr(args, name) for name in options})

    from gdn2.data import load_encoder
    from gdn2.data.durable import write_file
    from gdn2.models.device import prepare_device
    from gdn2.models.loading import load_checkpoint
    from gdn2.models.memory import load_memory

    prepare_device(args.device)
    if args.save_state:
        _try_to_write(args.save_state)
    model, chosen = load_checkpoint(args.checkpoint)
    encoder = load_encoder(chosen)
    print(f"gdn2: {chosen}", file=sys.stderr)
    model.to(args.device)
    memory = write_texts(
        model,
        encoder,
        prompts,
        sampling,
        forks=args.fork,
        start=load_memory(args.load_state, model) if args.load_state else None,
        on_prompt=_print_at_once if args.prompt_file is None else None,
        on_text=_print_at_once,
    )
    if args.save_state:
        write_file(args.save_state, memory.to_bytes(model))
        print(f"gdn2: wrote {args.save_state}, {memory.length:,} tokens", file=sys.stderr)


def _print_at_once(text: str) -> None:
    print(text, end="", flush=True)


def _info(args: argparse.Namespace) -> None:
    if args.compare:
        _compare(args)
        return
    if args.preset is None:
        args.parser.error("the following arguments are required: PRESET")
    run = _resolve_run(args.preset, args.overrides)
    from gdn2.models.accounting import account
    from gdn2.train import run_to_dict

    facts = {
        "run": run_to_dict(run),
        "training": {
            "tokens": run.schedule.total_tokens,
            "tokens_per_step": run.schedule.tokens_per_step,
            "steps": run.total_steps,
        },
        **account(run.model, length=run.data.sequence_length),
    }
    print(json.dumps(facts, indent=2) if args.json else "\n".join(_outline(facts)).lstrip())


def _compare(args: argparse.Namespace) -> None:
    """`--compare` takes what follows it, settings too."""
    words = [*filter(None, [args.preset]), *args.compare]
    names = [word for word in words if "=" not in word]
    if not names:
        args.parser.error("the following arguments are required: PRESET")
    overrides = [*(word for word in words if "=" in word), *args.overrides]
    runs = [(name, _resolve_run(name, overrides)) for name in names]
    from gdn2.compare import compare, show

    costs = compare(runs)
    if args.json:
        print(json.dumps([asdict(one) for one in costs], indent=2))
    else:
        show(costs)


def _outline(tree: dict[str, Any], indent: int = 0) -> list[str]:
    """Nested facts, one a line."""
    lines = []
    for name, value in tree.items():
        head = "  " * indent + name
        if isinstance(value, dict):
            lines += ["", head] if indent == 0 else [head]
            lines += _outline(value, indent + 1)
        else:
            text = f"{value:,}" if type(value) is int else value
            lines.append(f"{head:<32} {text}")
    return lines


# --- what the commands share -----------------------------------------------------------------


def _resolve_run(preset: str, overrides: Sequence[str]) -> Any:
    import gdn2.train  # first: it names the extra that has all that a run needs
    from gdn2.presets import load_preset

    return gdn2.train.override_all(load_preset(preset), overrides)


def _prompts(args: argparse.Namespace) -> list[str]:
    if args.prompt is not None:
        return [args.prompt]
    if args.prompt_file is not None:
        return [_read_text("--prompt-file", args.prompt_file)]
    if args.prompts is not None:
        prompts = _read_text("--prompts", args.prompts).splitlines()
        if not prompts:
            raise ValueError(f"--prompts {args.prompts} has no line")
        return prompts
    if args.load_state is None:
        raise ValueError("generate needs one of --prompt, --prompts, --prompt-file, --load-state")
    return [""]


def _read_text(option: str, path: Path) -> str:
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{option} {path} is not UTF-8: {error}") from error


def _try_to_write(path: Path) -> None:
    """Raise now what would be raised after the work."""
    from gdn2.data.durable import open_for_writing

    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, not a file to write")
    with open_for_writing(path) as stream:
        Path(stream.name).unlink()


# --- the command line ------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """No abbreviations, examples kept as written, errors in one line."""

    def __init__(self, **settings: Any) -> None:
        kind = argparse.RawDescriptionHelpFormatter
        super().__init__(allow_abbrev=False, formatter_class=kind, **settings)
        self.register("type", Path, _path)
        self.register("action", None, _Once)
        self.register("action", "store_true", partial(_Once, nargs=0, const=True, default=False))

    def error(self, message: str) -> NoReturn:
        text = _one_line(f"{self.prog}: error: {message}")
        self.exit(2, f"{text} (see {self.prog} --help)\n")


class _Once(argparse.Action):
    """Keep a value. An option that is given twice is an error: neither is the last word."""

    seen = False

    def __call__(
        self,
        parser: argparse.ArgumentParser,  # noqa: ARG002
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,  # noqa: ARG002
    ) -> None:
        if self.seen:
            raise argparse.ArgumentError(self, "given twice")
        self.seen = True
        setattr(namespace, self.dest, self.const if self.nargs == 0 else values)


def _overrides(parser: argparse.ArgumentParser, rest: Sequence[str]) -> list[str]:
    """What argparse left over: assignments where the command takes them, else an error."""
    takes_them = parser.get_default("overrides") is not None
    wrong = [text for text in rest if not takes_them or text.startswith("-") or "=" not in text]
    if wrong:
        hint = "; settings are a.b=value" if takes_them else ""
        parser.error(f"unrecognized arguments: {' '.join(wrong)}{hint}")
    return list(rest)


def _build_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="gdn2", description="Train, evaluate and sample Gated DeltaNet-2 models.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)

    def command(name: str, run: Any, help: str, examples: str, **settings: Any) -> _Parser:
        epilog = "examples:\n" + "\n".join(f"  gdn2 {name} {line}" for line in examples.split("\n"))
        sub = commands.add_parser(name, help=help, description=help, epilog=epilog, **settings)
        sub.set_defaults(run=run, parser=sub)
        return sub

    sub = command(
        "prepare",
        _prepare,
        "Turn text into token shards with a train and a validation split.",
        "stdlib --out data/stdlib --vocab-size 4096\n"
        "essays/ notes.txt more.jsonl.zst --out data/mine\n"
        "fineweb/*.parquet --out data/fineweb --tokenizer tokenizer.json --workers 8",
    )
    sub.add_argument(
        "sources",
        nargs="+",
        metavar="SOURCE",
        help="text or JSONL (also .gz or .zst), Parquet, a folder of them, or `stdlib`: this "
        "interpreter's own library sources (a folder of that name is ./stdlib)",
    )
    sub.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    # Options that are not given stay absent: gdn2.data.prepare has the defaults.
    tokenizer = sub.add_mutually_exclusive_group()
    _option(tokenizer, "--tokenizer", "PATH", "use this tokenizer (folder or file)", type=Path)
    _option(
        tokenizer,
        "--vocab-size",
        "N",
        "size of the byte-level BPE to train (default: 8192)",
        type=int,
    )
    _option(sub, "--text-column", "NAME", "column or key that holds the text (default: text)")
    _option(sub, "--val-fraction", "F", "share of validation (default: 0.01)", type=float)
    _option(sub, "--workers", "N", "processes that tokenize (default: all cores)", type=int)

    sub = command(
        "train",
        _train,
        "Train a preset; the same command resumes a run that was stopped.",
        "debug --data data/stdlib --out runs/debug\n"
        "gdn2_1p3b --data data/fineweb --out runs/1p3b --device cuda optim.lr=3e-4",
        usage="gdn2 train PRESET --data DIR --out RUN [--device cpu|cuda] [a.b=value ...]",
    )
    _add_preset(sub)
    sub.add_argument("--data", type=Path, required=True, metavar="DIR", help="prepared folder")
    sub.add_argument("--out", type=Path, required=True, metavar="RUN", help="folder of the run")
    _add_device(sub)

    sub = command(
        "eval",
        _eval,
        "Score a checkpoint on validation text: loss, bits per byte, perplexity by position.",
        "runs/debug\nruns/debug/final --data data/stdlib --out scores",
    )
    _add_checkpoint(sub)
    sub.add_argument("--data", type=Path, metavar="DIR", help="default: what the run trained on")
    sub.add_argument(
        "--out", type=Path, metavar="DIR", help="for eval.json and eval.png (default: CHECKPOINT)"
    )
    _add_device(sub)

    sub = command(
        "generate",
        _generate,
        "Continue a prompt; the text goes to stdout as it comes, and nothing else does.",
        "runs/debug --prompt 'import '\n"
        "runs/debug --prompts prompts.txt --temperature 0.8 --top-p 0.95 --seed 1\n"
        "runs/debug --prompt 'def ' --greedy --max-new-tokens 64\n"
        "runs/debug --prompt-file book.txt --max-new-tokens 0 --save-state book.state\n"
        "runs/debug --load-state book.state --prompt 'In the end ' --fork 3",
    )
    _add_checkpoint(sub)
    prompt = sub.add_mutually_exclusive_group()
    prompt.add_argument(
        "--prompt", type=_utf8, metavar="TEXT", help="start of a document, may be empty"
    )
    prompt.add_argument("--prompts", type=Path, metavar="FILE", help="one prompt a line")
    prompt.add_argument(
        "--prompt-file",
        type=Path,
        metavar="FILE",
        help="one prompt of any length; it is read in pieces and not printed",
    )
    sub.add_argument(
        "--load-state",
        type=Path,
        metavar="FILE",
        help="go on from this state; a prompt then follows what made it",
    )
    sub.add_argument(
        "--save-state",
        type=Path,
        metavar="FILE",
        help="keep the state behind the text, of constant size (safetensors)",
    )
    sub.add_argument(
        "--fork",
        type=int,
        default=1,
        metavar="N",
        help="N continuations of each prompt, with the seeds SEED, SEED + 1, ... (default: 1)",
    )
    sub.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="default: 128")
    sub.add_argument("--temperature", type=float, default=1.0, metavar="T", help="default: 1.0")
    sub.add_argument("--top-k", type=int, metavar="N", help="only the N likeliest tokens")
    sub.add_argument("--top-p", type=float, metavar="P", help="only the likeliest, P in all")
    sub.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")
    sub.add_argument("--greedy", action="store_true", help="always the likeliest token")
    _add_device(sub)

    sub = command(
        "info",
        _info,
        "Show a preset: resolved settings, parameters, FLOPs per token, state size, steps.",
        "gdn2_1p3b\ngdn2_1p3b_hybrid --json model.num_hidden_layers=24\n"
        "--compare gdn2_1p3b kda_1p3b mamba3_mimo_1p3b transformer_1p3b",
        usage="gdn2 info [PRESET] [--compare PRESET ...] [--json] [a.b=value ...]",
    )
    _add_preset(sub, nargs="?")
    sub.add_argument("--compare", nargs="+", metavar="PRESET", help="costs side by side")
    sub.add_argument("--json", action="store_true", help="as JSON")
    return parser


def _path(text: str) -> Path:
    """An argument; Path would take an empty one, of a shell variable that is not set, as `.`."""
    if not text:
        raise argparse.ArgumentTypeError("the path is empty")
    return Path(text)


def _utf8(text: str) -> str:
    """An argument; bytes that are not UTF-8 come as lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise argparse.ArgumentTypeError("the text is not UTF-8") from error
    return text


def _option(group: Any, flag: str, metavar: str, help: str, type: Any = str) -> None:
    group.add_argument(flag, metavar=metavar, help=help, type=type, default=argparse.SUPPRESS)


def _add_preset(sub: argparse.ArgumentParser, nargs: str | None = None) -> None:
    sub.add_argument("preset", nargs=nargs, metavar="PRESET", help="a name of gdn2/presets.py")
    sub.set_defaults(overrides=[])
    sub.description = f"{sub.description}\nSettings: a.b=value, as `gdn2 info PRESET` lists them."


def _add_checkpoint(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "checkpoint",
        type=Path,
        metavar="CHECKPOINT",
        help="a run (its newest step), a step folder or a Hugging Face folder",
    )


def _add_device(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")


if __name__ == "__main__":
    sys.exit(main())
