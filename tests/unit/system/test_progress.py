"""Progress without a terminal."""

from dpace.system.progress import progress_bar


def test_lines_stand_for_a_bar_without_a_terminal(capsys, monkeypatch):
    seconds = 0.0
    monkeypatch.setattr("dpace.system.progress.time.monotonic", lambda: seconds)
    with progress_bar() as bar:
        task = bar.add_task("working", total=12, info="")
        for i in range(12):
            seconds += 10
            bar.update(task, advance=1, info=f"at {i}")
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("working:")]
    assert [line.split(" of ")[0] for line in lines] == [f"working: {n}" for n in (1, 4, 7, 10, 12)]
    assert "ETA 0:01:" in lines[0] and lines[0].endswith("; at 0") and "ETA" not in lines[-1]
