import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from gdn2 import presets
from gdn2.train import Run, override_all
from recipes.demo.__main__ import main
from recipes.demo.demo import ALL_TWINS, TITLES, TWINS, CommandFailed, run_demo
from recipes.demo.report import Report, render_html

SOURCE = '''def gate_{n}(state, decay):
    """Return <b>state</b> & decay, {n} times."""
    for step in range({n}):
        state = state * decay
    return state
'''
MIXERS = {"gdn2": ["gdn2"], "gdn2_hybrid": ["gdn2", "sliding_attention"]}


def tiny(mixers: list[str]) -> Callable[[], Run]:
    def preset() -> Run:
        settings = ["schedule.total_tokens=3072", "model.vocab_size=400"]
        return override_all(presets.debug(), [*settings, f"model.mixers={json.dumps(mixers)}"])

    return preset


class Tags(HTMLParser):
    """Opening tags that were never closed, and everything that is fetched."""

    VOID = ("meta", "br", "line", "circle", "polyline", "rect")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.seen: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        self.fetched += [f"{tag} {name}" for name, _ in attrs if name in ("src", "href", "data")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


def parse(html: str) -> Tags:
    tags = Tags()
    tags.feed(html)
    assert tags.open == []
    return tags


def run_tiny(out: Path, **mixers: list[str]) -> Report:
    """The demo beside the folder `source`, with twins of these mixers."""
    with pytest.MonkeyPatch.context() as patch:
        for name in mixers:
            patch.setitem(presets.PRESETS, f"tiny_{name}", tiny(mixers[name]))
        twins = {name: f"tiny_{name}" for name in mixers}
        return run_demo(out, source=str(out.parents[1] / "source"), twins=twins)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Report, Path]:
    folder = tmp_path_factory.mktemp("demo")
    (folder / "source").mkdir()
    for n in range(150):
        (folder / "source" / f"gate_{n}.py").write_text(SOURCE.replace("{n}", str(n)) * (n % 5 + 1))
    out = folder / "runs" / "demo"
    return run_tiny(out, **MIXERS), out


def test_report_json_has_what_scripts_rely_on(demo: tuple[Report, Path]) -> None:
    report = json.loads((demo[1] / "report.json").read_text())
    assert list(report) == [
        "twins",
        "baselines",
        "validation_bytes",
        "machine",
        "versions",
        "commit",
    ]
    assert [twin["name"] for twin in report["twins"]] == list(MIXERS)
    for twin in report["twins"]:
        assert set(twin) == {"name", "parameters", "bits_per_byte", "tokens_per_second"}
        scores = json.loads((demo[1] / twin["name"] / "eval.json").read_text())
        assert twin["bits_per_byte"] == scores["bits_per_byte"]
        assert report["validation_bytes"] == scores["bytes"]
    assert set(report["baselines"]) == {"gzip", "xz", "ngram5"}
    assert all(0 < value < 8 for value in report["baselines"].values())


def test_report_html_stands_alone(demo: tuple[Report, Path]) -> None:
    html = (demo[1] / "report.html").read_text(encoding="utf-8")
    tags = parse(html)
    assert tags.fetched == []
    assert not tags.seen & {"script", "link", "img", "iframe"}
    assert "url(" not in html
    assert "@import" not in html
    assert "gdn2 prepare" in html
    assert "prefers-color-scheme: dark" in html


def test_a_page_of_all_twins_tells_them_apart(demo: tuple[Report, Path]) -> None:
    systems = {name.removesuffix("_hybrid") for name in ALL_TWINS}
    assert len(ALL_TWINS) == 16
    assert systems == set(TITLES)
    assert set(TWINS.items()) <= set(ALL_TWINS.items())
    twins = []
    for number, name in enumerate(ALL_TWINS):
        system = name.removesuffix("_hybrid")
        look = {"color": list(TITLES).index(system), "dashed": system != name}
        bits = 3 - number / 16
        twins.append(replace(demo[0].twins[0], name=name, title=name, bits_per_byte=bits, **look))
    html = render_html(replace(demo[0], twins=twins))
    parse(html)
    for number in range(len(TITLES)):
        assert len(re.findall(rf"--series-{number}: #\w+;", html)) == 2  # light and dark
        assert f"svg .name-{number} " in html
    assert html.count('class="curve dashed"') == 2 * 7
    table = [html.index(f"</i>{twin.title}<") for twin in twins]
    assert table == sorted(table, reverse=True)  # the best first


@pytest.mark.parametrize(
    ("words", "out", "twins"),
    [
        ([], "runs/demo", TWINS),
        (["--all"], "runs/demo-all", ALL_TWINS),
        (["--all", "--out", "x"], "x", ALL_TWINS),
    ],
)
def test_the_command_line_chooses_twins(
    words: list[str], out: str, twins: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    monkeypatch.setattr("sys.argv", ["recipes.demo", *words])
    monkeypatch.setattr("recipes.demo.demo.run_demo", lambda *a, **b: calls.append((*a, b)))
    assert main() == 0
    assert calls == [(Path(out), {"twins": twins})]


def test_text_of_models_and_machines_cannot_break_the_page(demo: tuple[Report, Path]) -> None:
    evil = "<script>alert('&')</script>"
    twins = [replace(twin, title=evil, samples=[(evil, evil * 2)]) for twin in demo[0].twins]
    report = replace(
        demo[0],
        twins=twins,
        machine={"processor": evil},
        versions={evil: evil},
        commit=evil,
        sampling=evil,
        commands=[evil],
    )
    html = render_html(report)
    assert "script" not in parse(html).seen
    assert "<script" not in html


def test_the_verdict_names_what_is_passed_and_what_is_not(demo: tuple[Report, Path]) -> None:
    bits = min(twin.bits_per_byte for twin in demo[0].twins)
    above, below = bits + 1, bits - 1

    def verdict(**baselines: float) -> str:
        return render_html(replace(demo[0], baselines=baselines))

    some = verdict(gzip=above, xz=below, ngram5=below)
    assert "Passed: gzip -9. Not passed: xz -9, byte 5-gram.</p>" in some
    none = verdict(gzip=below, xz=below, ngram5=below)
    assert "Passed: no baseline yet. Not passed: gzip -9, xz -9, byte 5-gram.</p>" in none
    every = verdict(gzip=above, xz=above, ngram5=above)
    assert "Passed: gzip -9, xz -9, byte 5-gram.</p>" in every


def test_a_command_that_fails_ends_the_demo_with_its_code(tmp_path: Path) -> None:
    with pytest.raises(CommandFailed) as failed:
        run_demo(tmp_path / "out", source=str(tmp_path / "nowhere"), twins={"gdn2": "debug"})
    assert failed.value.args == (2,)


def test_the_report_of_finished_twins_says_where_they_come_from(
    demo: tuple[Report, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(demo[1].parents[1] / "source", tmp_path / "source")
    out = shutil.copytree(demo[1], tmp_path / "runs" / "demo")
    for name in MIXERS:
        assert demo[0].commit == (from_commit("a" * 40, out / name) or "unknown")
    assert run_tiny(out, **MIXERS).commit == "a" * 40
    assert json.loads((out / "report.json").read_text())["commit"] == "a" * 40

    from_commit("b" * 40, out / "gdn2_hybrid")
    (out / "report.json").unlink()
    with pytest.raises(CommandFailed) as failed:
        run_tiny(out, **MIXERS)
    assert failed.value.args == (2,)
    assert f"delete {out / 'gdn2'} and {out / 'gdn2_hybrid'}, run" in capsys.readouterr().err
    assert not (out / "report.json").exists()


def from_commit(commit: str, run: Path) -> str | None:
    """Let `run` come from another commit; the one it came from."""
    old = None
    for path in (run / "config.json", run / "final" / "run.json"):
        record = json.loads(path.read_text())
        old, record["commit"] = record["commit"], commit
        path.write_text(json.dumps(record))
    return old


def test_an_unfinished_twin_of_other_code_is_refused_before_anything_is_trained(
    demo: tuple[Report, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = shutil.copytree(demo[1], tmp_path / "runs" / "demo")
    from_commit("a" * 40, out / "gdn2")
    shutil.rmtree(out / "gdn2_hybrid")
    with pytest.raises(CommandFailed):
        run_tiny(out, **MIXERS)
    assert f"delete {out / 'gdn2'}, run" in capsys.readouterr().err
    assert not (out / "gdn2_hybrid").exists()


def test_a_twin_of_another_preset_is_named(
    demo: tuple[Report, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(CommandFailed) as failed:
        run_tiny(demo[1], gdn2=["kda"])
    assert failed.value.args == (2,)
    assert f"delete {demo[1] / 'gdn2'}, run" in capsys.readouterr().err
