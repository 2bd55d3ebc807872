"""Run one engine in its own environment, for `benchmarks/engines.py`.

Reads a request file and writes an answer file. Imports nothing from dpace.
"""

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path


def measured(request: dict, decode: Callable[[list[int], int], tuple[list[int], int]]) -> dict:
    """Time `decode`, which turns a prompt and a number of tokens into text and a count of verifications.

    A first call is not counted.
    """
    decode(request["prompts"][0], request["max_new_tokens"])
    answer = {"texts": [], "seconds": [], "steps": []}
    for ids in request["prompts"]:
        text, seconds, steps = [], [], 0
        for _ in range(request["rounds"]):
            start = time.perf_counter()
            decode(ids, 1)
            middle = time.perf_counter()
            text, steps = decode(ids, request["max_new_tokens"])
            seconds.append(time.perf_counter() - middle - (middle - start))
        answer["texts"].append(text)
        answer["seconds"].append(min(seconds))
        answer["steps"].append(steps)
    return answer


def run_vllm(request: dict) -> dict:
    """Decode greedily in fp32, with the drafter where there is one."""
    os.environ |= {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "HF_HUB_OFFLINE": "1",
    }
    import vllm

    speculative = None
    if request["drafter"]:
        drafts = request["num_draft_tokens"]
        speculative = {"method": "dflash", "model": request["drafter"], "num_speculative_tokens": drafts}
    llm = vllm.LLM(
        request["target"],
        dtype="float32",
        max_model_len=request.get("max_model_len", 1024),
        max_num_seqs=1,
        enforce_eager=True,
        disable_log_stats=False,
        speculative_config=speculative,
    )

    def num_drafts() -> int:
        return int(sum(m.value for m in llm.get_metrics() if m.name == "vllm:spec_decode_num_drafts"))

    def decode(ids: list[int], count: int) -> tuple[list[int], int]:
        before = num_drafts()
        settings = vllm.SamplingParams(temperature=0, max_tokens=count)
        (output,) = llm.generate([{"prompt_token_ids": ids}], settings, use_tqdm=False)
        return list(output.outputs[0].token_ids), num_drafts() - before

    return {"version": vllm.__version__, **measured(request, decode)}


def run_mlx(request: dict) -> dict:
    """Decode greedily in fp32, with z-lab's loop where there is a drafter."""
    import importlib.metadata

    import mlx.core
    import mlx_lm
    from dflash import model_mlx as zlab

    zlab.snapshot_download = lambda folder, **_: folder  # z-lab's loader accepts Hub ids only
    config = json.loads((Path(request["target"]) / "config.json").read_text())
    rope = config.get("rope_parameters", config)  # mlx-lm uses 10000 where rope_theta is not at the top level
    model, tokenizer = mlx_lm.load(request["target"], model_config={"rope_theta": rope["rope_theta"]})
    model.set_dtype(mlx.core.float32)
    drafter = zlab.load_draft(request["drafter"]) if request["drafter"] else None

    def decode(ids: list[int], count: int) -> tuple[list[int], int]:
        if drafter is None:
            return [part.token for part in mlx_lm.stream_generate(model, tokenizer, ids, max_tokens=count)], 0
        parts = list(zlab.stream_generate(model, drafter, tokenizer, ids, max_tokens=count))
        return [token for part in parts for token in part.tokens], sum(part.accepted is not None for part in parts)

    version = f"{importlib.metadata.version('dflash')}, mlx {importlib.metadata.version('mlx')}"
    return {"version": version, **measured(request, decode)}


def run_openvino(request: dict) -> dict:
    """Export by the commands of the model card where that was not done yet, and decode greedily.

    A target in fp32 is computed so, its cache too, and others as OpenVINO does by default. The drafter is in fp32: in
    bf16, the default on a CPU with AMX, 2026.4.1 ended with SIGFPE for it, and for a target in fp16.
    """
    import importlib.metadata

    import numpy as np
    import openvino_genai
    from openvino import Tensor

    # offline, optimum-intel 2.2.0 ends with an error where it quantizes
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_OFFLINE")}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    for command in request["commands"]:
        *_, output = shlex.split(command)
        if not (Path(request["place"]) / output).exists():
            subprocess.run(shlex.split(command), cwd=request["place"], env=environment, check=True)
    target, drafter = (shlex.split(command)[-1] for command in request["commands"])
    os.chdir(request["place"])
    settings: dict = {"INFERENCE_NUM_THREADS": request.get("num_threads", 1)}
    if request["precision"] == "fp32":
        settings |= {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
    options = {"scheduler_config": openvino_genai.SchedulerConfig(), **settings}
    if request["drafter"]:
        settings["INFERENCE_PRECISION_HINT"] = "f32"
        options["draft_model"] = openvino_genai.draft_model(drafter, "CPU", **settings)
    pipeline = openvino_genai.LLMPipeline(target, "CPU", **options)
    config = pipeline.get_generation_config()
    config.do_sample = False
    if request["drafter"]:
        config.num_assistant_tokens = request["num_draft_tokens"]

    def decode(ids: list[int], count: int) -> tuple[list[int], int]:
        config.max_new_tokens = count
        found = pipeline.generate(Tensor(np.array([ids])), config)
        parts = found.extended_perf_metrics  # the prompt is the target's first step
        return list(found.tokens[0]), len(parts.main_model_metrics.raw_metrics.m_durations) - 1 if parts else 0

    return {"version": importlib.metadata.version("openvino-genai"), **measured(request, decode)}


def run_speculators(request: dict) -> dict:
    """Load the exported folder and convert the published one to `output`; count equal tensors in both."""
    import importlib.metadata

    import torch
    from safetensors.torch import load_file
    from speculators import SpeculatorModel
    from speculators.convert.dflash import DFlashConverter

    weights = load_file(Path(request["drafter"]) / "model.safetensors")
    loaded = SpeculatorModel.from_pretrained(request["drafter"]).state_dict()
    DFlashConverter().convert(request["published"], request["output"], base_model=request["target"])
    converted = load_file(Path(request["output"]) / "model.safetensors")
    equal = [
        sum(name in tensors and torch.equal(tensors[name], tensor) for name, tensor in weights.items())
        for tensors in (loaded, converted)
    ]
    return {"version": importlib.metadata.version("speculators"), "equal": equal, "tensors": len(weights)}


if __name__ == "__main__":
    _, engine, asked, answered = sys.argv
    runs = {
        "vllm": run_vllm,
        "mlx": run_mlx,
        "openvino": run_openvino,
        "speculators": run_speculators,
    }
    run = runs[engine]
    Path(answered).write_text(json.dumps(run(json.loads(Path(asked).read_text()))))
