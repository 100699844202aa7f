"""The training loop.

A step is a function of the weights, the optimizer's state and its own number: step n reads
sequences n*S ... (n+1)*S - 1 of one endless stream. So a run that was killed goes on from its
newest checkpoint as if nothing had happened, to the bit on a CPU.
"""

from __future__ import annotations

import math
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from gdn2.data import Batch, Manifest, Samples, TokenDataset, load_encoder, load_manifest
from gdn2.data.durable import locked, write_json
from gdn2.models import Gdn2ForCausalLM
from gdn2.models.loss import IGNORED
from gdn2.train.checkpoint import Checkpoints, write_folder
from gdn2.train.config import Run, override_all
from gdn2.train.metrics import Metrics
from gdn2.train.optim import build_optimizer, learning_rate
from gdn2.train.parallel import (
    autocast,
    keep_freed_memory,
    naming_full_memory,
    prepare_device,
    to_device,
)
from gdn2.train.record import describe_run, differences, read_record, refuse_another_run

SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")  # the data's separator, if None


def train(run: Run, *, data: Path, out: Path, device: str = "cpu") -> None:
    """Train ``run`` on the prepared folder ``data`` into ``out``; called again, it goes on.

    Raises ValueError for a run that does not fit the data or what ``out`` holds, RuntimeError
    for a loss, gradient or weight that is not finite and for a disk that takes no checkpoint, and
    KeyboardInterrupt after SIGINT or SIGTERM, once the current step is done and saved.
    """
    data, out = Path(data), Path(out)
    place = prepare_device(device)
    keep_freed_memory()
    manifest = load_manifest(data)
    if run.model.vocab_size < manifest.vocab_size:
        raise ValueError(
            f"the model's vocabulary, {run.model.vocab_size}, is smaller than the data's, "
            f"{manifest.vocab_size}: add model.vocab_size={manifest.vocab_size}"
        )
    special = [name for name in SPECIAL_TOKENS if getattr(run.model, name) is None]
    run = override_all(run, [f"model.{name}={manifest.separator}" for name in special])
    with locked(out):
        _train(run, manifest, data=data, out=out, device=place)


def _train(run: Run, manifest: Manifest, *, data: Path, out: Path, device: torch.device) -> None:
    final, checkpoints = out / "final", Checkpoints(out / "checkpoints", keep=run.checkpoint.keep)
    record = describe_run(run, manifest, data)
    began, step = read_record(out), checkpoints.newest() or 0
    if began and (step or final.exists()):
        refuse_another_run(out, began, record)
    if final.exists():
        print(f"{out} is finished after {run.total_steps} steps; its model is in {final}")
        return
    checkpoints.tidy()
    samples = Samples(
        TokenDataset(data, "train"),
        seq_len=run.data.sequence_length,
        packing=run.data.packing,
        seed=run.seed,
    )
    validation = validation_batches(run, data)
    if load_encoder(data / "tokenizer").separator != manifest.separator:
        raise ValueError(f"{data / 'tokenizer'} has another separator than its data")
    torch.manual_seed(run.seed)
    with naming_full_memory(f"a model of hidden_size {run.model.hidden_size:,}"):
        model = AutoModelForCausalLM.from_config(run.model, dtype=torch.float32)
        model = model.to(device).train()
    if run.parallel.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    optimizer = build_optimizer(model, run.optim)
    if step:
        checkpoints.load(step, model, optimizer)
    else:
        write_json(out / "config.json", record)

    def write_about(folder: Path) -> None:
        """What makes a folder readable on its own: tokenizer, model configuration, run."""
        shutil.copytree(data / "tokenizer", folder, dirs_exist_ok=True)
        model.config.save_pretrained(folder)
        write_json(folder / "run.json", record)

    def write_final(folder: Path) -> None:
        write_about(folder)
        transformers_logging.disable_progress_bar()  # it would break into ours
        model.save_pretrained(folder)

    save_every = run.steps(run.checkpoint.every_tokens)
    validate_every = run.steps(run.log.validate_every_tokens or run.schedule.total_tokens)
    progress = Metrics(out, total=run.total_steps, done=step, print_every=run.log.every_steps)
    with stop_signals() as stop, progress as metrics:
        if step:
            metrics.plot()  # a kill may have come between the checkpoint and its plot
            metrics.say(f"going on after step {step}, from {checkpoints.path(step)}")
        if step and began and (changed := differences(began, record)):
            metrics.say(f"changed since the run began: {'; '.join(changed)}")
        while step < run.total_steps:
            step += 1
            row = train_step(run, model, optimizer, samples, step, device)
            if step % run.log.every_steps == 0:
                row["gates"] = model.statistics()  # waits for the device
            if validation and (step % validate_every == 0 or step == run.total_steps):
                row["val_loss"] = validation_loss(model, validation, device)
            metrics.log(row)
            stopping = stop.is_set()
            if step % save_every == 0 or step == run.total_steps or stopping:
                check_weights(model, step)
                metrics.sync()
                tokens = step * run.schedule.tokens_per_step
                checkpoints.save(step, model, optimizer, tokens=tokens, write_more=write_about)
                metrics.plot()
            metrics.show(row)
            if stopping and step < run.total_steps:
                metrics.say(f"stopped and saved after step {step}; the same command goes on")
                raise KeyboardInterrupt
        write_folder(final, write_final)
        metrics.say(f"finished after {step} steps; the model is in {final}")


def train_step(
    run: Run,
    model: Gdn2ForCausalLM,
    optimizer: torch.optim.Optimizer,
    samples: Samples,
    step: int,
    device: torch.device,
) -> dict[str, Any]:
    """One update, the ``step``-th counted from 1; returns its row of the metrics."""
    started = time.perf_counter()
    lr = learning_rate(
        step,
        peak=run.optim.lr,
        warmup_steps=run.warmup_steps,
        total_steps=run.total_steps,
        min_ratio=run.schedule.min_lr_ratio,
    )
    for group in optimizer.param_groups:
        group["lr"] = lr
    loss = backward(model, step_batches(run, samples, step), device)
    norm = clip_grad_norm_(model.parameters(), run.optim.max_grad_norm)
    loss_value, norm_value = torch.stack([loss, norm]).tolist()  # waits for the device, once
    if not (math.isfinite(loss_value) and math.isfinite(norm_value)):
        raise RuntimeError(
            f"step {step}: loss {loss_value}, gradient norm {norm_value}. Stopped before the "
            f"update, so the checkpoints are good; a lower optim.lr may help"
        )
    optimizer.step()
    optimizer.zero_grad()
    return {
        "step": step,
        "tokens": step * run.schedule.tokens_per_step,
        "loss": loss_value,
        "grad_norm": norm_value,
        "lr": lr,
        "tokens_per_second": run.schedule.tokens_per_step / (time.perf_counter() - started),
    }


def check_weights(model: Gdn2ForCausalLM, step: int) -> None:
    """Raise RuntimeError if a weight is not finite: such a step must not become the newest one."""
    broken = [name for name, weight in model.named_parameters() if not weight.isfinite().all()]
    if broken:
        raise RuntimeError(
            f"step {step}: its update left weights that are not finite ({', '.join(broken[:3])}). "
            f"Not saved, so the checkpoints are good; a lower optim.lr may help"
        )


def step_batches(run: Run, samples: Samples, step: int) -> list[Batch]:
    """The micro-batches of one step: a function of its number alone."""
    count, first = run.parallel.micro_batch_size, (step - 1) * run.sequences_per_step
    passes = run.micro_batches(ranks=1)
    return [samples.batch(first + index * count, count) for index in range(passes)]


def backward(model: Gdn2ForCausalLM, batches: list[Batch], device: torch.device) -> Tensor:
    """Add the gradient of the mean loss over all valid tokens of ``batches``; return that loss."""
    valid = sum(int((batch.labels != IGNORED).sum()) for batch in batches)
    total = torch.zeros((), device=device)
    for batch in batches:
        batch = to_device(batch, device)
        with autocast(device):
            loss_sum, _ = model.loss(batch.tokens, batch.labels, batch.cu_seqlens)
        (loss_sum / valid).backward()
        total += loss_sum.detach() / valid
    return total


def validation_batches(run: Run, data: Path) -> list[Batch]:
    """The same few micro-batches of the validation split each time; none if it is too short."""
    dataset = TokenDataset(data, "validation")
    length = run.data.sequence_length
    if run.log.validate_every_tokens is None or dataset.num_tokens < length:
        return []
    samples = Samples(dataset, seq_len=length, packing=run.data.packing, seed=0)
    total = min(samples.num_samples, max(1, run.log.validation_tokens // length))
    size = run.parallel.micro_batch_size
    return [samples.batch(first, min(size, total - first)) for first in range(0, total, size)]


@torch.no_grad()
def validation_loss(model: Gdn2ForCausalLM, batches: list[Batch], device: torch.device) -> float:
    """Mean loss per valid token."""
    total, valid = torch.zeros((), device=device), 0
    model.eval()
    for batch in batches:
        valid += int((batch.labels != IGNORED).sum())
        batch = to_device(batch, device)
        with autocast(device):
            total += model.loss(batch.tokens, batch.labels, batch.cu_seqlens)[0]
    model.train()
    return total.item() / valid


@contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """An event that SIGINT or SIGTERM sets; a second signal acts as it always does."""
    stop = threading.Event()
    handlers: dict[int, Any] = {}

    def restore() -> None:
        for number, handler in handlers.items():
            signal.signal(number, handler)

    def ask(number: int, frame: object) -> None:  # noqa: ARG001
        stop.set()
        restore()

    for number in (signal.SIGINT, signal.SIGTERM):
        handlers[number] = signal.signal(number, ask)
    try:
        yield stop
    finally:
        restore()
