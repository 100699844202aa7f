"""Trains in forked children, so that many can be killed without importing torch for each.

Reads a line that is a JSON job (run, data, out, threads, die_at) and answers with the child's
process id; reads an empty line and answers, when the child has ended, with its exit code (-9:
killed).
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch

from gdn2.train import run_from_dict
from gdn2.train.loop import train

FILE_OPERATIONS = ("fsync", "mkdir", "rename", "replace", "unlink", "rmdir")


def die_before(operation: int) -> None:
    """Kill this process at its ``operation``-th change of a folder or sync, counted from 1."""
    count = 0

    def dying(original):
        def change(*args, **kwargs):
            nonlocal count
            count += 1
            if count == operation:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        return change

    for name in FILE_OPERATIONS:
        setattr(os, name, dying(getattr(os, name)))


def work(job: dict) -> None:
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    torch.set_num_threads(job["threads"])
    if job["die_at"]:
        die_before(job["die_at"])
    try:
        train(run_from_dict(job["run"]), data=Path(job["data"]), out=Path(job["out"]))
    except KeyboardInterrupt:
        os._exit(130)
    except BaseException:  # noqa: BLE001 - this is the process entry
        sys.excepthook(*sys.exc_info())
        os._exit(1)
    os._exit(0)


for line in sys.stdin:
    if line.strip():
        child = os.fork()
        if child == 0:
            work(json.loads(line))
        print(child, flush=True)
    else:
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
