"""Progress without a terminal."""

from dpace.config import PromptsConfig
from dpace.prompts.prompts import split_prompts
from dpace.system import progress
from dpace.system.progress import progress_bar
from tests.support.files import write_prompts


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
    assert lines[1].endswith("ETA 0:01:20; at 3") and "ETA" not in lines[0] + lines[-1]


def test_answering_shows_tokens_before_its_first_batch_is_done(language_folder, run_line, tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    path = write_prompts(tmp_path / "p.jsonl", [f"w{i} w{i + 1}" for i in range(12)])
    line = f"respond --target {language_folder} --prompts.path {path} --output {tmp_path / 'out'} --max-new-tokens 8"
    said = run_line(line).err
    lines = [line for line in said.splitlines() if line.startswith("answering prompts: 0 of 12")]
    assert "token 2 of at most 8, 12 of 12 prompts are open" in lines[1], lines


def test_one_rank_says_what_all_have_to_say(run_line, tmp_path, capsys, monkeypatch):
    """A reason comes from all."""
    path = write_prompts(tmp_path / "p.jsonl", [f"w{i % 20}" for i in range(40)])
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        split_prompts(PromptsConfig(path=path, num_heldout=1, num_validation=1))
        assert capsys.readouterr().err.count("2 prompts left out: copies of held-out") == 1 - rank
        assert "cannot read none.jsonl" in run_line("respond --prompts.path none.jsonl", 1).err
