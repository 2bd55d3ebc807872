"""benchmarks/respond.py with its command, at tiny size."""

from tests.support.scripts import run_script


def test_answers_before_and_with_the_tree_are_equal(language_folder, capsys):
    size = "--prompts 6 --tokens 4 --batch-size 4".split()
    run_script("respond.py", "--beginnings", "--target", language_folder, *size)
    table = capsys.readouterr().out
    assert "; 6 of 6 texts equal" in table and "; 2 of 2 texts equal" in table
