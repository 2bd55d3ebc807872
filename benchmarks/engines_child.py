"""What `benchmarks/engines.py` runs in an engine's own environment. Imports nothing of dpace; a request file in, an answer file out."""

import json
import os
import sys
import time
from pathlib import Path


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
        max_model_len=1024,
        max_num_seqs=1,
        enforce_eager=True,
        disable_log_stats=False,
        speculative_config=speculative,
    )

    def decode(ids: list[int], count: int) -> tuple[list[int], float]:
        start = time.perf_counter()
        settings = vllm.SamplingParams(temperature=0, max_tokens=count)
        (output,) = llm.generate([{"prompt_token_ids": ids}], settings, use_tqdm=False)
        return list(output.outputs[0].token_ids), time.perf_counter() - start

    def num_drafts() -> int:
        found = [m.value for m in llm.get_metrics() if m.name == "vllm:spec_decode_num_drafts"]
        return int(sum(found))

    decode(request["prompts"][0], request["max_new_tokens"])
    answer = {"version": vllm.__version__, "texts": [], "seconds": [], "steps": []}
    for ids in request["prompts"]:
        text, seconds, steps = [], [], 0
        for _ in range(request["rounds"]):
            first = decode(ids, 1)[1]
            before = num_drafts()
            text, whole = decode(ids, request["max_new_tokens"])
            steps = num_drafts() - before
            seconds.append(whole - first)
        answer["texts"].append(text)
        answer["seconds"].append(min(seconds))
        answer["steps"].append(steps)
    return answer


def run_speculators(request: dict) -> dict:
    """Load the folder and compare the weights with those of the file."""
    import importlib.metadata

    import torch
    from safetensors.torch import load_file
    from speculators import SpeculatorModel

    model = SpeculatorModel.from_pretrained(request["drafter"])
    found, weights = model.state_dict(), load_file(Path(request["drafter"]) / "model.safetensors")
    equal = sum(name in found and torch.equal(found[name].cpu(), tensor) for name, tensor in weights.items())
    return {"version": importlib.metadata.version("speculators"), "equal": equal, "tensors": len(weights)}


if __name__ == "__main__":
    _, engine, asked, answered = sys.argv
    run = {"vllm": run_vllm, "speculators": run_speculators}[engine]
    Path(answered).write_text(json.dumps(run(json.loads(Path(asked).read_text()))))
