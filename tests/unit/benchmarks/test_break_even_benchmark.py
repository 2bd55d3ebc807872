"""benchmarks/break_even.py with the command of the page, at tiny size."""

from tests.support.scripts import run_script


def test_the_command_of_the_page_times_refused_drafts(language_folder, random_drafter_folder, capsys):
    size = "--contexts 1 20 --requests 1 3".split()
    run_script("break_even.py", language_folder, random_drafter_folder, *size)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    rows = {line[0]: [float(cell) for cell in line[1:]] for line in lines if line and line[0] in ("1", "20")}
    assert len(rows) == 2 and all(len(row) == 2 and min(row) > 0 for row in rows.values())
