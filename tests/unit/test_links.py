"""Links, dead links and pipes in the folder that is written to: nothing outside of it changes, and nothing waits."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest

from dpace.cli import main
from dpace.system.ledger import MARKER
from dpace.system.provenance import Hardware
from tests.support.files import read_json, write_prompts

TINY = (
    "--prompts.num-heldout 2 --prompts.num-validation 2 --respond.max-new-tokens 8 --drafter.num-layers 1 "
    "--drafter.block-size 4 --train.max-steps 2 --train.eval-steps 2 --train.num-anchors 4 --bench.temperatures 0 "
    "--bench.max-new-tokens 4 --bench.widths full --bench.num-prompts 1"
)
LINES = {
    "prompts": "prompts --count 2 --max-new-tokens 24 --temperature 8",
    "respond": f"respond {TINY}",
    "train": f"train {TINY}",
    "bench": f"bench {TINY}",
    "compare": f"compare {TINY} --objectives dflash --seeds 0",
    "export": "export {drafter} --to zlab",
}
WRITTEN = {
    "prompts": ["prompts.jsonl", "prompts.meta.json"],
    "respond": ["responses.jsonl", "responses.rank-0.jsonl"],
    "train": ["drafter", "drafter/checkpoints", "drafter/checkpoints/checkpoint-2", "drafter/model.safetensors"],
    "bench": ["bench-*.jsonl", "results.json"],
    "compare": ["dflash", "dflash/seed-0", "decode", "results.json"],
    "export": ["config.json"],
}
"""What each verb adds to, writes anew or removes, and so must be its own."""
HARDWARE = ("dpace.measure.benchmark.find_hardware", lambda _: Hardware(device="cpu", cores=1, torch_threads=1))
"""The name of bench's records follows from it; here it is the same in each process."""
CASES = [(verb, name, kind) for verb in WRITTEN for name in WRITTEN[verb] for kind in ("link", "dead link", "pipe")]


@pytest.fixture(scope="session")
def finished(make_once, language_folder, language_prompts):
    """What `respond`, `train` and `bench` have written."""

    def fill(folder):
        prompts = write_prompts(folder / "asked.jsonl", language_prompts[:12])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(*HARDWARE)
            for verb in ("respond", "train", "bench"):
                rest = f"--target {language_folder} --prompts.path {prompts} --output {folder / 'out'}"
                assert main([*LINES[verb].split(), *rest.split()]) == 0

    return make_once("links", fill)


def names_of(folder: Path) -> dict:
    return {path: path.lstat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.parametrize(("verb", "pattern", "kind"), CASES)
def test_what_is_not_a_folders_own_stays_as_it_is(
    verb, pattern, kind, finished, language_folder, language_drafter_folder, tmp_path, capsys, monkeypatch
):
    """Whatever the marker says, and also where a run was killed before its end."""
    monkeypatch.setattr(*HARDWARE)
    out = tmp_path / "out"
    if verb in ("respond", "train", "bench"):
        shutil.copytree(finished / "out", out)
        (out / "drafter" / "provenance.json").unlink()
    out.mkdir(exist_ok=True)
    path = next(out.glob(pattern), out / pattern)
    path.parent.mkdir(exist_ok=True)
    (outside := tmp_path / "outside").mkdir()
    if path.exists():
        shutil.move(path, outside / "there")
    elif path.suffix:
        (outside / "there").write_text("unfinished")
    else:
        (outside / "there").mkdir()
    for folder in {out, path.parent}:
        written = []
        if (folder / MARKER).exists():
            written = read_json(folder / MARKER)["files"]
        (folder / MARKER).write_text(json.dumps({"files": [*written, path.name]}))
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(outside / ("there" if kind == "link" else "missing"))
    before = names_of(outside)
    line = LINES[verb].format(drafter=language_drafter_folder)
    prompts = "" if verb in ("prompts", "export") else f"--prompts.path {finished / 'asked.jsonl'}"
    code = main(f"{line} --target {language_folder} {prompts} --output {out}".split())
    said = capsys.readouterr().err
    assert names_of(outside) == before
    assert code == 1 and re.search(rf"{path.name}.* is a (link|folder, a device) or a pipe.*;", said), said
