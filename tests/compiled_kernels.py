"""What the Triton kernels compile to for GPUs that are not here: registers, spills, shared memory.

    python tests/compiled_kernels.py            compare with compiled_kernels.csv
    python tests/compiled_kernels.py --some     the same with the largest of each member, for 9.0
    python tests/compiled_kernels.py --write    write that file

Every kernel that a preset launches, with bfloat16 operands, for compute capability 8.0 and 9.0. How
many heads there are changes addresses alone: each form and size is compiled once. The launches are
the library's own, on tensors without memory, and are compiled where they would run.
"""

import csv
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
import triton.backends.nvidia
from operator_cases import MEMBERS
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from gdn2 import presets
from gdn2.models import Gdn2Config
from gdn2.ops.contract import Operands
from gdn2.ops.triton import decode, gates, launch, norm, normed_conv, sequences

TABLE = Path(__file__).with_suffix(".csv")
COMPARED = "3.6"  # versions of Triton compile differently
TOOLS = Path(triton.backends.nvidia.__file__).parent / "bin"
SHARED = {80: 163 * 1024, 90: 227 * 1024}  # bytes that a program may have
TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


class Case(NamedTuple):
    """The operator of a member of the family with H key heads, for a compute capability."""

    member: str
    H: int
    HV: int
    K: int
    V: int
    capability: int


class Row(NamedTuple):
    member: str
    H: int
    HV: int
    K: int
    V: int
    capability: int
    kernel: str
    warps: int
    registers: int
    spills: int  # loads and stores of registers
    looped: int  # of these, in loops
    shared: int  # bytes
    wgmma: int
    mma: int


def cases() -> list[Case]:
    """Mamba-3 is Mamba-2 to the operator, and the more key heads the longer the strides."""
    sizes: dict[tuple, tuple] = {}
    for name in presets.PRESETS:
        model = presets.load_preset(name).model
        for mixer in model.mixers:
            member = "mamba2" if mixer == "mamba3" else mixer
            if member in MEMBERS:
                heads, channels = shape(mixer, model)
                sizes[member, *channels] = max(heads, sizes.get((member, *channels), heads))
    return [
        Case(member, *heads, *channels, capability)
        for (member, *channels), heads in sorted(sizes.items())
        for capability in SHARED
    ]


def shape(mixer: str, model: Gdn2Config) -> tuple[tuple[int, int], tuple[int, int]]:
    """Heads (H, HV) and channels (K, V) of a mixer's call of the operator."""
    if mixer in ("mamba2", "mamba3"):
        heads = model.mamba_inner_size // model.mamba_head_dim
        groups = model.num_groups if mixer == "mamba2" else heads
        return (groups, heads), (model.state_size, model.mamba_head_dim)
    heads = (model.num_heads, model.num_v_heads or model.num_heads)
    return heads, (model.head_k_dim, model.head_v_dim or model.head_k_dim)


def some_cases() -> list[Case]:
    """The largest of each member."""
    largest = {case.member: case for case in cases() if case.capability == max(SHARED)}
    return list(largest.values())


def compile_case(case: Case) -> list[Row]:
    state = torch.empty(1, case.HV, case.K, case.V, device="meta")
    return compile_calls(case, operands(case, 2**16, MEMBERS[case.member]), state, None)


def compile_calls(
    case: Case, x: Operands, state: torch.Tensor, cu_seqlens: torch.Tensor | None
) -> list[Row]:
    """The kernels of a long sequence, there and back, and of a single token."""
    token = x.map(lambda t: t[:, :1])
    slots = torch.empty(1, dtype=torch.int64, device="meta") if len(state) > 1 else None
    channels = case.HV * case.V
    inputs, weight, last = (
        torch.empty(shape, dtype=x.q.dtype, device="meta")
        for shape in ((1, 1, channels), (channels, 4), (len(state), channels, 3))
    )
    with mock.patch.object(launch, "capability", return_value=case.capability):
        launches = record(lambda: sequences.gated_delta_rule(x, 1.0, state, cu_seqlens))
        upstream = torch.empty_like(x.v), state
        launches += record(
            lambda: sequences.gated_delta_rule_backward(x, 1.0, state, cu_seqlens, *upstream)
        )
        launches += record(lambda: around(x))
        launches += record(lambda: decode.gated_delta_step(token, 1.0, state, slots))
        launches += record(lambda: decode.causal_conv_step(inputs, weight, None, True, last, slots))
    different = {label(kernel, arguments): (kernel, arguments) for kernel, arguments in launches}
    return [compile_launch(case, *one) for one in different.values()]


def around(x: Operands) -> None:
    """What stands around the operator in a layer, there and back."""
    B, T, H, K = x.k.shape
    inputs, weight, last = x.k.flatten(2), x.k.new_empty(H * K, 4), x.k.new_empty(B, H * K, 3)
    bias = weight[:, 0] if x.erase is None else None  # Mamba-2's
    described = (inputs, weight, bias, None, None, H * K, K, 1e-6)
    normed_conv._normed_conv._init_fn(*described)
    normed_conv._backward._init_fn(inputs, last, *described)
    form = () if x.log_decay is None or x.log_decay.ndim == 3 else (K,)
    decay = (
        x.k.new_empty(B, T, H, *form),
        x.k.new_empty(H, *(1 for _ in form)),
        x.k.new_empty(H, *form),
    )
    gates._log_decay._init_fn(*decay)
    gates._log_decay_backward._init_fn(x.k.new_empty(decay[0].shape, dtype=torch.float32), *decay)
    gates._gate._init_fn(x.k, 1.0)
    gates._gate_backward._init_fn(x.k, x.k, 1.0)
    gated = x.v, x.v, x.v.new_empty(x.v.shape[-1]), 1e-5, True
    norm._gated_rms_norm._init_fn(*gated)
    norm._backward._init_fn(x.v, *gated)


def label(kernel: Any, arguments: dict[str, Any]) -> str:
    """A kernel's name and what it is launched for; the way back repeats some launches."""
    finds = f" for {arguments['FIND']}" if "FIND" in arguments else ""
    return kernel.__name__ + finds + " back" * arguments.get("BACK", False)


def operands(
    case: Case, T: int, form: tuple[str | None, ...], dtype: torch.dtype = torch.bfloat16
) -> Operands:
    """Gates are those of value heads."""

    def tensor(heads: int, *channels: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(1, T, heads, *channels, dtype=dtype, device="meta")

    def gate(form: str | None, channels: int, dtype: torch.dtype = dtype) -> torch.Tensor | None:
        if form is None:
            return None
        return tensor(case.HV, *((channels,) if form == "channel" else ()), dtype=dtype)

    decay, erase, write = form
    return Operands(
        tensor(case.H, case.K),
        tensor(case.H, case.K),
        tensor(case.HV, case.V),
        gate(decay, case.K, torch.float32),
        gate(erase, case.K),
        gate(write, case.V),
    )


def record(call: Callable[[], object]) -> list[tuple[Any, dict[str, Any]]]:
    """The kernels that `call` would launch, each with its arguments and options."""
    launches = []

    def run(kernel, *, grid, warmup, **arguments):
        launches.append((kernel, arguments))

    with mock.patch.object(JITFunction, "run", run):
        call()
    return launches


def compile_launch(case: Case, kernel: Any, arguments: dict[str, Any]) -> Row:
    signature, constants, attributes = {}, {}, {}
    for i, (name, parameter) in enumerate(zip(kernel.arg_names, kernel.params, strict=True)):
        x = arguments[name]
        aligned = isinstance(x, torch.Tensor)
        if parameter.is_constexpr or x is None:
            signature[name], constants[name] = "constexpr", x
        elif isinstance(x, torch.Tensor):
            signature[name] = TYPES[x.dtype]
        elif isinstance(x, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
            aligned = x % 16 == 0 and not parameter.do_not_specialize
        if aligned and signature[name] != "constexpr":  # as the launcher finds it
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {name: arguments[name] for name in ("num_warps", "num_stages")}
    target = GPUTarget("cuda", case.capability, 32)
    compiled = triton.compile(source, target=target, options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = dump("--dump-resource-usage", file.name)
        sass = dump("--dump-sass", file.name)
    found = re.findall(r"/\*(\w{4,5})\*/ +(.+?);", sass)
    instructions = [(int(at, 16), text) for at, text in found]
    spills = [at for at, text in instructions if re.search(r"\b(LDL|STL)\b", text)]
    jumps = [(at, re.search(r"\bBRA\b.* 0x(\w+)", text)) for at, text in instructions]
    loops = [(int(to[1], 16), at) for at, to in jumps if to and int(to[1], 16) < at]
    return Row(
        *case,
        kernel=label(kernel, arguments),
        warps=options["num_warps"],
        registers=int(re.findall(r"REG:(\d+)", usage)[0]),
        spills=len(spills),
        looped=sum(any(first <= at <= last for first, last in loops) for at in spills),
        shared=compiled.metadata.shared,
        wgmma=len(re.findall(r"\bHGMMA\b", sass)),
        mma=len(re.findall(r"\bHMMA\b", sass)),
    )


def dump(what: str, file: str) -> str:
    command = [TOOLS / "cuobjdump", what, file]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def compile_all(chosen: Iterable[Case]) -> list[Row]:
    with ProcessPoolExecutor(2) as processes:
        return [row for rows in processes.map(compile_case, chosen) for row in rows]


def committed() -> list[Row]:
    with TABLE.open(newline="") as file:
        numbers = csv.DictReader(file)
        return [Row(**{n: int(x) if x.isdigit() else x for n, x in r.items()}) for r in numbers]


def main() -> int:
    if triton.knobs.runtime.interpret:
        print("TRITON_INTERPRET is set: nothing compiles", file=sys.stderr)
        return 2
    some = "--some" in sys.argv
    rows = compile_all(some_cases() if some else cases())
    if "--write" in sys.argv:
        with TABLE.open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerows([Row._fields, *rows])
        print(f"wrote {len(rows)} rows to {TABLE}")
        return 0
    compared = triton.__version__.startswith(COMPARED)
    expected = committed() if compared else []
    for row in rows:
        print("  " if row in expected or not compared else "! ", *row)
    print(f"Triton {triton.__version__}:", "compared" if compared else "not compared", len(rows))
    wrong = set(rows) - set(expected) if some else set(rows) ^ set(expected)
    return int(compared and bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
