"""Write a drafter's model card: what it is, what it gave, how it was trained, and the commands that serve it."""

import sys
from pathlib import Path
from typing import Any

import torch
import yaml

from dpace.config import Engine, Format
from dpace.drafter import Drafter, fingerprint
from dpace.engines.serving import serve_command
from dpace.measure.results import BenchResults, read_results
from dpace.report.tables import copied_note, with_interval
from dpace.spec import DrafterSpec

TAGS = ["dflash", "speculative-decoding", "block-diffusion", "draft-model", "efficiency"]
_LIBRARIES = {"speculators": "speculators", "gguf": "gguf"}

VLLM = """**vLLM**

```bash
{vllm}
```
"""
SGLANG = """**SGLang** (not run by us: it needs a GPU)

```bash
{sglang}
```
"""
TRANSFORMERS = """**transformers** (5.15 or newer, one prompt at a time)

```python
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{target}")
target = AutoModelForCausalLM.from_pretrained("{target}", dtype="auto").eval()
drafter = AutoModel.from_pretrained("{drafter}", trust_remote_code=True, dtype=target.dtype).eval()
messages = [{{"role": "user", "content": "..."}}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
output = target.generate(
    **inputs, assistant_model=drafter, speculation_type="dflash", do_sample=False, max_new_tokens=256
)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```
"""
LLAMACPP = """**llama.cpp** (without `--spec-draft-n-max` it drafts 3 tokens, which this drafter was not trained for)

```bash
{llamacpp}
```

`TARGET.gguf` in f16, bf16 or f32 keeps the target's text; quantized targets round a block and a token differently.
"""
TO_GGUF = """For llama.cpp:

```bash
dpace export FOLDER --target {target} --to gguf --target-gguf TARGET.gguf --output FOLDER-gguf
```
"""


def write_card(
    path: Path,
    spec: DrafterSpec,
    *,
    to: Format,
    name: str,
    target_name: str,
    license: str,
    dtype: torch.dtype,
    source: Path,
    drafter: Drafter,
) -> None:
    """Write `README.md` beside what was exported.

    Args:
        path: the folder, or the GGUF file in it.
        spec: of the drafter.
        to: what was written.
        name: what the drafter is called: a Hub id or a folder's name.
        target_name: what the target is called; left out of `base_model` where it is a folder of this machine.
        license: of the weights.
        dtype: of the matrices.
        source: the drafter's own folder. The card has its `recipe.yaml`, and those rows of the `results.json` beside
            the folder that were measured with these weights.
        drafter: as it was measured, in the target's dtype.
    """
    shown = Path(target_name).name if Path(target_name).is_dir() else target_name
    facts = {
        "target": f"`{shown}`",
        "block size": f"{spec.block_size}: the anchor and {spec.num_draft_tokens} draft tokens",
        "target_layer_ids": f"{list(spec.target_layer_ids)}: 0-based, their output",
        "mask token": str(spec.mask_token_id),
        "layers, hidden size": f"{spec.num_layers}, {spec.hidden_size}",
        "weights": str(dtype).removeprefix("torch."),
    }
    names = {"target": shown, "drafter": name}
    given: dict[Engine, str] = {"vllm": name, "sglang": name, "llamacpp": path.name}
    for engine, drafter_name in given.items():
        names[engine] = serve_command(engine, drafter_name, shown, spec.block_size)
    commands = {"speculators": [VLLM], "gguf": [LLAMACPP]}.get(to, [VLLM, SGLANG, TRANSFORMERS, TO_GGUF])
    parts = [
        _front_matter(to, target_name, license),
        f"# {Path(name).name}",
        f"A DFlash drafter for `{shown}`. It is not a model of its own: it proposes tokens, the target keeps those "
        "that it would have written itself.",
        "| | |\n|---|---|\n" + "\n".join(f"| {key} | {value} |" for key, value in facts.items()),
        *_results(source, drafter, facts["weights"]),
        "## How to serve it",
        *(text.format(**names).rstrip() for text in commands),
        *_recipe(source),
    ]
    folder = path.parent if to == "gguf" else path
    (folder / "README.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _front_matter(to: Format, target_name: str, license: str) -> str:
    """What the Hub reads."""
    front: dict[str, Any] = {
        "library_name": _LIBRARIES.get(to, "transformers"),
        "pipeline_tag": "text-generation",
        "license": license,
    }
    if not Path(target_name).is_dir():
        front["base_model"] = target_name
    front["tags"] = [*TAGS, *({"speculators": ["vllm"], "gguf": ["gguf"]}.get(to, ["vllm", "sglang"]))]
    return f"---\n{yaml.safe_dump(front, sort_keys=False)}---"


def _results(source: Path, drafter: Drafter, dtype: str) -> list[str]:
    """Measured rows whose weights are this drafter's."""
    path = source.parent / "results.json"
    if not path.exists():
        return []
    try:
        results = read_results(path)
    except (ValueError, OSError) as error:  # another program's file, or another version's
        print(f"the model card has no measured numbers: {error}", file=sys.stderr)
        return []
    if not isinstance(results, BenchResults):
        return []
    weights = fingerprint(drafter)
    rows = [row for row in results.rows if results.drafters.get(row.drafter) == weights]
    if not rows:
        return []
    lines = [
        f"| {row.set} | {row.temperature:g} | {row.width} | {with_interval(row.tau, row.tau_interval)} | "
        f"{with_interval(row.decode_speedup, row.decode_speedup_interval)} | {row.num_same_text}/{row.num_responses} |"
        for row in rows
    ]
    hardware = results.hardware
    measured = (
        f"Measured with {results.engine} in {results.dtype} on {hardware.device} ({hardware.cores} cores), at most "
        f"{results.max_new_tokens} tokens a response. tau: tokens emitted per verification. decode_speedup: tokens a "
        "second over plain decoding of the same prompts. In brackets: 95 % intervals over prompts"
        + copied_note(rows, start="; ")
        + "."
    )
    if dtype != results.dtype:
        measured += f" The weights here are {dtype}, rounded from those that were measured."
    head = "| set | T | width | tau | decode_speedup | same text |\n|---|---|---|---|---|---|"
    return ["## Results", measured, "\n".join([head, *lines])]


def _recipe(source: Path) -> list[str]:
    """What `dpace train` was told, without where files are."""
    path = source / "recipe.yaml"
    if not path.exists():
        return []
    recipe = yaml.safe_load(path.read_text())
    kept = {name: recipe[name] for name in ("respond", "drafter", "loss", "train") if name in recipe}
    objective = recipe.get("loss", {}).get("objective")
    said = f"Trained by dpace, objective `{objective}`"
    if objective == "dpace":
        said += " ([D-PACE](https://arxiv.org/abs/2605.18810))"
    return ["## Recipe", f"{said}.", f"```yaml\n{yaml.safe_dump(kept, sort_keys=False)}```"]
