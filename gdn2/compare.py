"""What models cost, side by side: the tables of `gdn2 info --compare`."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table

from gdn2.models import Gdn2Config
from gdn2.models.accounting import account
from gdn2.train import Run

ATTENTION = {"sliding_attention": "window", "full_attention": "attention"}  # in tables
NOTES = (
    "diff: of the blocks, to the first. State: numbers of the recurrent state, which is fp32, of a "
    "layer that has one and of all. At 4K, 1M: bytes that a sequence carries on behind so many "
    "(2^20) tokens; keys, values and last tokens in bfloat16. FLOPs: of the forward pass, mean "
    "over a sequence of this length. 1G = 1000M."
)


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What `account` counts of a model; `difference` is that of its blocks to the first model's."""

    preset: str
    mixers: list[str]
    mimo_rank: int
    blocks: int
    difference: float
    mixer_parameters: int
    mlp_parameters: int
    total: int
    state_floats_per_layer: int
    state_floats: int
    bytes_at_4k: int
    bytes_at_1m: int
    sequence_length: int
    operator_flops: int
    attention_flops: int
    forward_flops: int


def compare(runs: Sequence[tuple[str, Run]]) -> list[Costs]:
    """The costs of named runs, in their order."""
    costs: list[Costs] = []
    for name, run in runs:
        model, length = run.model, run.data.sequence_length
        facts = account(model, length=length)
        parameters, flops = facts["parameters"], facts["flops_per_token"]
        blocks = parameters["blocks"]
        floats = facts["state_bytes"]["recurrent"] // 4
        one = Costs(
            preset=name,
            mixers=model.mixers,
            mimo_rank=model.mimo_rank,
            blocks=blocks,
            difference=blocks / (costs[0].blocks if costs else blocks) - 1,
            mixer_parameters=sum(parameters["mixers"].values()),
            mlp_parameters=parameters["mlps"],
            total=parameters["total"],
            state_floats_per_layer=floats // (model.layer_types.count("linear_attention") or 1),
            state_floats=floats,
            bytes_at_4k=_carried_bytes(model, 4096),
            bytes_at_1m=_carried_bytes(model, 2**20),
            sequence_length=length,
            operator_flops=flops["operator"],
            attention_flops=flops["attention"],
            forward_flops=flops["forward"],
        )
        costs.append(one)
    return costs


def show(costs: Sequence[Costs]) -> None:
    """Print the costs as tables that fit into 80 columns."""
    parameters = _table("parameters", "layers", "blocks", "diff", "mixers", "MLPs", "total")
    state = _table("state", "a layer", "all layers", "at 4K", "at 1M")
    flops = _table("FLOPs per token", "length", "operator", "attention", "forward")
    for one in costs:
        parameters.add_row(
            one.preset,
            _mixers(one),
            short(one.blocks),
            f"{one.difference:+.2%}",
            *map(short, (one.mixer_parameters, one.mlp_parameters, one.total)),
        )
        carried = (one.bytes_at_4k, one.bytes_at_1m)
        state.add_row(
            one.preset,
            f"{one.state_floats_per_layer:,}",
            short(one.state_floats),
            *(f"{short(size)}B" for size in carried),
        )
        spent = (one.operator_flops, one.attention_flops, one.forward_flops)
        flops.add_row(one.preset, f"{one.sequence_length:,}", *map(short, spent))
    console = Console()
    if not console.is_terminal:
        console = Console(width=1000)  # cut nothing
    console.print(parameters, "", state, "", flops, "")
    console.print(NOTES, highlight=False, width=min(console.width, 100))


def short(count: int) -> str:
    """Four digits and a unit: 1,302,638,112 is 1.303G."""
    for size, unit in ((10**12, "T"), (10**9, "G"), (10**6, "M"), (10**3, "K")):
        if count >= size:
            return f"{count / size:#.4g}{unit}"
    return str(count)


def _carried_bytes(model: Gdn2Config, length: int) -> int:
    size: int = account(model, length=length)["state_bytes"]["total"]
    return size


def _mixers(one: Costs) -> str:
    names = [ATTENTION.get(name, name) for name in one.mixers]
    if one.mimo_rank > 1:
        names = [f"{name} rank {one.mimo_rank}" if name == "mamba3" else name for name in names]
    return " + ".join(names)


def _table(title: str, *heads: str) -> Table:
    """In a narrow terminal layers go over two lines, and nothing is cut off."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=0)
    table.add_column(title, no_wrap=True, overflow="fold")
    for head in heads:
        if head == "layers":
            table.add_column(head, overflow="fold", min_width=len("gated_deltanet +"))
        else:
            table.add_column(head, no_wrap=True, overflow="fold", justify="right")
    return table
