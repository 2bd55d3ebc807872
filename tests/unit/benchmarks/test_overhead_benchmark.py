"""benchmarks/overhead.py with its command, at tiny size."""

import re

from tests.support.scripts import run_script


def test_the_command_times_objectives_and_the_parts_of_a_step(language_folder, capsys):
    run_script("overhead.py", "1", language_folder)
    printed = capsys.readouterr().out
    assert len(re.findall(r"tokens  dpace +[\d.]+ ms  x [\d.]+ \[", printed)) == 2
    for name in ("drafter", "loss", "backward pass", "clipping, optimizer", "whole step"):
        assert len(re.findall(rf"^  {name} +[\d.]+ ms +[\d.]+ GFLOP +\d+% of that$", printed, re.MULTILINE)) == 2
