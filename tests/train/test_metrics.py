import json

import pytest

from gdn2.train.metrics import Metrics, plot_loss, truncate


def row(step, **more):
    return {
        "step": step,
        "tokens": 128 * step,
        "loss": 5.0 / step,
        "grad_norm": 0.5,
        "lr": 1e-3,
        "tokens_per_second": 1000.0,
        **more,
    }


def write(path, steps, tail=""):
    path.write_text("".join(json.dumps(row(step)) + "\n" for step in steps) + tail)


def steps_of(path):
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    ("tail", "step", "left"),
    [
        ("", 3, [1, 2, 3]),
        ("", 5, [1, 2, 3, 4, 5]),
        ("", 0, []),
        ('{"step": 6, "tok', 5, [1, 2, 3, 4, 5]),
        ('{"step": 6}', 6, [1, 2, 3, 4, 5]),
        ("\0\0\0\0", 5, [1, 2, 3, 4, 5]),
    ],
)
def test_resuming_keeps_the_whole_lines_up_to_the_resumed_step(tmp_path, tail, step, left):
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 6), tail)
    truncate(path, step)
    assert steps_of(path) == left


def test_every_step_has_one_line_after_an_interruption(tmp_path):
    for done, last in ((0, 7), (5, 12)):
        with Metrics(tmp_path, total=12, done=done, print_every=5) as metrics:
            for step in range(done + 1, last + 1):
                metrics.log(row(step))
                metrics.show(row(step))
    assert steps_of(tmp_path / "metrics.jsonl") == list(range(1, 13))


def test_without_a_terminal_some_steps_are_printed(tmp_path, capsys):
    with Metrics(tmp_path, total=12, done=0, print_every=5) as metrics:
        for step in range(1, 13):
            metrics.show(row(step, **({"val_loss": 1.25} if step == 7 else {})))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == [
        f"step {step}/12" for step in (1, 5, 7, 7, 10, 12)
    ]
    for word in ("loss 5.0000", "grad norm 0.500", "lr 1.00e-03", "1,000 tokens/s", "ETA 0:00:0"):
        assert word in lines[0]
    assert "validation loss 1.2500" in lines[3]


def test_the_plot_is_a_picture_that_replaces_the_old_one(tmp_path):
    metrics, target = tmp_path / "metrics.jsonl", tmp_path / "loss.png"
    write(metrics, range(1, 6), json.dumps(row(6, val_loss=1.0)) + "\n")
    plot_loss(metrics, target)
    first = target.read_bytes()
    assert first.startswith(b"\x89PNG")
    write(metrics, range(1, 12))
    plot_loss(metrics, target)
    assert target.read_bytes() != first
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".tmp"] == []
