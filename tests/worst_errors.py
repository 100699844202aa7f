"""Print the worst errors of the operator's guarantees and of the model's logits, as Markdown.

    .venv/bin/python tests/worst_errors.py

Errors are relative to the largest true entry (log-decay's gradient under extreme gates: to that of
the terms that it is the difference of). The truth is the token loop in float64.
"""

import itertools

import torch
from operator_cases import (
    EXTREMES,
    FORMS,
    GATE_FORMS,
    LAYOUTS,
    C,
    Case,
    cast,
    error,
    extreme_inputs,
    make_inputs,
    natural_sizes,
    run,
)

from gdn2.models import Gdn2Config, Gdn2ForCausalLM
from gdn2.ops import gated_delta_rule, gated_delta_step


def against_truth(case: Case, inputs: dict, dtype: torch.dtype) -> tuple[float, float]:
    """Worst error of (outputs and state, gradients)."""
    inputs = cast(inputs, dtype)
    exact = cast(inputs, torch.float64)
    truth, got = run(exact, case, backend="reference"), run(inputs, case, backend="chunked")
    sizes = natural_sizes(truth, exact)
    errors = {name: error(got[name], truth[name], sizes[name]) for name in truth}
    forward = max(errors.pop("out"), errors.pop("new_state"))
    return forward, max(errors.values())


def worst(cases, dtype: torch.dtype) -> tuple[float, float]:
    return tuple(map(max, zip(*(against_truth(c, x, dtype) for c, x in cases), strict=True)))


def all_forms():
    for forms, layout in itertools.product(GATE_FORMS, LAYOUTS.values()):
        case = Case(*forms, **{**layout, "K": 32, "V": 32})
        yield case, make_inputs(case)


def extremes():
    for extreme, decay in itertools.product(EXTREMES, ("head", "channel")):
        case = Case(decay=decay, B=1, T=2 * C + 1, K=16, V=16)
        yield case, extreme_inputs(extreme, case)


def split(dtype: torch.dtype) -> float:
    """A prefix, a second piece and single tokens, against one run."""
    errors = []
    for decay, P in itertools.product(FORMS, (1, C - 1, C, C + 9)):
        case = Case(decay, T=2 * C + 3, K=32, V=32)
        inputs = make_inputs(case, dtype=dtype)
        whole, last = gated_delta_rule(**inputs)
        state, outs = inputs.pop("state"), []
        for piece in (slice(0, P), slice(P, 2 * C)):
            tokens = {n: x if x is None else x[:, piece] for n, x in inputs.items()}
            out, state = gated_delta_rule(**tokens, state=state)
            outs.append(out)
        for t in range(2 * C, case.T):
            token = {n: x if x is None else x[:, t] for n, x in inputs.items()}
            out, state = gated_delta_step(**token, state=state)
            outs.append(out.unsqueeze(1))
        errors += [error(torch.cat(outs, 1), whole), error(state, last)]
    return max(errors)


@torch.no_grad()
def logit_differences(mixers: list[str]) -> dict[str, float]:
    """Relative to the largest logit."""
    torch.manual_seed(0)
    config = Gdn2Config(
        vocab_size=101,
        hidden_size=64,
        num_hidden_layers=4,
        mixers=mixers,
        num_heads=2,
        head_k_dim=32,
        num_attention_heads=2,
        attention_head_dim=32,
        sliding_window=24,
        intermediate_size=128,
    )
    model = Gdn2ForCausalLM(config).eval()
    sequences = [torch.randint(0, 101, (n,)) for n in (90, 33, 7)]
    alone = [model(s[None]).logits[0] for s in sequences]
    width = max(map(len, sequences))
    worst = dict.fromkeys(("padded left", "padded right", "packed", "prefill and decode"), 0.0)
    for how, left in (("padded left", True), ("padded right", False)):
        batch, mask = torch.zeros(3, width, dtype=torch.long), torch.zeros(3, width).long()
        places = [slice(width - len(s), None) if left else slice(len(s)) for s in sequences]
        for i, (s, place) in enumerate(zip(sequences, places, strict=True)):
            batch[i, place], mask[i, place] = s, 1
        logits = model(batch, attention_mask=mask).logits
        for i, place in enumerate(places):
            worst[how] = max(worst[how], error(logits[i, place], alone[i]))
    bounds = torch.tensor([0, *itertools.accumulate(map(len, sequences))])
    packed = model(torch.cat(sequences)[None], cu_seqlens=bounds).logits[0]
    worst["packed"] = error(packed, torch.cat(alone))
    for s, truth in zip(sequences, alone, strict=True):
        out = model(s[None, :5], use_cache=True)
        logits = [out.logits[0]]
        for token in s[5:]:
            out = model(token[None, None], past_key_values=out.past_key_values, use_cache=True)
            logits.append(out.logits[0])
        how = "prefill and decode"
        worst[how] = max(worst[how], error(torch.cat(logits), truth))
    return worst


def form_row(forms: tuple[str | None, ...]) -> str:
    """Float32 (this backend, then a float32 token loop) and bfloat16 against the truth."""
    case = Case(*forms, B=1, T=300, K=64, V=64)
    inputs = make_inputs(case)
    single = cast(inputs, torch.float32)
    exact = cast(single, torch.float64)
    truth, loop = (run(x, case, backend="reference") for x in (exact, single))
    loops = {name: error(loop[name], truth[name]) for name in truth}
    outputs = max(loops.pop("out"), loops.pop("new_state"))
    numbers = [
        *against_truth(case, inputs, torch.float32),
        outputs,
        max(loops.values()),
        *against_truth(case, inputs, torch.bfloat16),
    ]
    cells = [*(str(form or "-") for form in forms), *(f"{x:.1e}" for x in numbers)]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    print("| guarantee | float64 outputs | gradients | float32 outputs | gradients |")
    print("|---|---|---|---|---|")
    both = (torch.float64, torch.float32)
    for name, cases in (
        ("equality with the token loop, 27 gate forms x 4 layouts", all_forms),
        ("extreme gates", extremes),
    ):
        cells = [f"{x:.1e}" for dtype in both for x in worst(cases(), dtype)]
        print(f"| {name} | {' | '.join(cells)} |")
    print(f"| split, then single tokens | {split(both[0]):.1e} | - | {split(both[1]):.1e} | - |")
    print()
    print("| float32 logits against those of each sequence alone | largest difference |")
    print("|---|---|")
    for mixers in (["gdn2"], ["kda"], ["gated_deltanet"], ["gdn2", "sliding_attention"]):
        for how, difference in logit_differences(mixers).items():
            print(f"| {', '.join(mixers)}: {how} | {difference:.1e} |")
    print()
    pairs = [f"{name} {what}" for name in ("float32", "loop") for what in ("out", "grad")]
    print(f"| decay | erase | write | {' | '.join(pairs)} | bfloat16 out | grad |")
    print("|---" * 9 + "|")
    for forms in GATE_FORMS:
        print(form_row(forms))


if __name__ == "__main__":
    main()
