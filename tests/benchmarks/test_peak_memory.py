from benchmarks.peak_memory import main


def test_a_row_for_every_length(capsys):
    assert main(["--lengths", "64", "96", "--threads", "1"], call=lambda f, *args: f(*args)) == 0
    text = capsys.readouterr().out
    assert "peak beyond MB" in text
    assert [line.split()[1] for line in text.splitlines() if "│" in line] == ["64", "96"]
