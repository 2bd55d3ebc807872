"""Write a drafter's model card: what it is, its results, how it was trained and how to serve it.

What comes in is a spec, the drafter as it was measured, and the results beside its folder; what goes out is
`README.md`. It has each engine's command (`ENGINES`), which `dpace doctor` and the documentation print too.
"""

import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import yaml

from dpace.config import Engine, Format
from dpace.drafter import Drafter
from dpace.drafter.spec import DrafterSpec
from dpace.engines.folder import mapping, read_recipe_values
from dpace.measure.results import BenchResults, read_results
from dpace.report.sections import speeds
from dpace.report.tables import as_code, as_markdown, to_markdown
from dpace.system.ledger import write_text
from dpace.system.loading import fingerprint


class Serving(NamedTuple):
    """How one engine serves a drafter."""

    command: str
    """The command, the configuration or the line of Python, with fields that `serve_command` fills in."""
    card: str = ""
    """Part of the model card, with `{target}`, `{drafter}` and `{command}` to fill in; empty where there is none."""


ENGINES: dict[Engine, Serving] = {
    "vllm": Serving(
        "vllm serve {quoted_target} --speculative-config {config}",
        """**vLLM**

```bash
{command}
```

Add `--per-request-spec-decode-metrics summary`, and each response has its own acceptance. Adaptive verification
verifies no more of a draft than pays under the load: `"enable_adaptive_verification": true` in the speculative config.
It needs Model Runner V2 with full CUDA graphs (not run by us).
""",
    ),
    "sglang": Serving(
        "python -m sglang.launch_server --model-path {quoted_target} --speculative-algorithm DFLASH "
        "--speculative-draft-model-path {quoted_drafter} --speculative-dflash-block-size {block_size}",
        """**SGLang** (not run by us)

```bash
{command}
```
""",
    ),
    "llamacpp": Serving(
        "llama-server -m TARGET.gguf -md {gguf} --spec-type draft-{kind} --spec-draft-n-max {count}",
        """**llama.cpp** (without `--spec-draft-n-max` it drafts 3 tokens, which this drafter was not trained for)

```bash
{command}
```

By default it verifies all that is drafted. `--spec-draft-p-min 0.5` ends a draft before its first token of a lower
probability; try a few values on your prompts.

`TARGET.gguf` in f16, bf16 or f32 keeps the target's text; quantized targets round a block and a token differently.
""",
    ),
    "tensorrt": Serving(
        "# config.yaml, for: trtllm-serve {quoted_target} --config config.yaml\n"
        "speculative_config:\n  decoding_type: DFlash\n  speculative_model: {scalar}\n  max_draft_len: {count}",
        """**TensorRT-LLM** (not run by us)

```yaml
{command}
```

`draft_len_schedule` has the draft length up to each number of requests at once, and no drafts above the last one.
""",
    ),
    "transformers": Serving(
        "model.generate(**inputs, assistant_model=Drafter.from_pretrained({drafter!r}, dtype=model.dtype), "
        'speculation_type="dflash", do_sample=False)',
        """**transformers** (5.15 or newer, one prompt at a time)

```python
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{target}")
target = AutoModelForCausalLM.from_pretrained("{target}", dtype="auto").eval()
drafter = AutoModel.from_pretrained("{drafter}", trust_remote_code=True, dtype=target.dtype).eval()
messages = [{{"role": "user", "content": "..."}}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
options = {{"speculation_type": "dflash", "do_sample": False, "max_new_tokens": 256}}
output = target.generate(**inputs, assistant_model=drafter, **options)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```
""",
    ),
    "zlab": Serving(
        "dflash_generate(DFlashDraftModel.from_pretrained({drafter!r}, dtype=model.dtype), model, token_ids, "
        "max_new_tokens, stop_token_ids, 0.0)",
    ),
}
"""Source: the engines' own documentation; docs/results.md says which were run."""

CARD_ENGINES: dict[Format, tuple[Engine, ...]] = {"speculators": ("vllm",), "gguf": ("llamacpp",)}
"""Engines that a model card has commands for; of all other formats, `PUBLISHED`."""
PUBLISHED: tuple[Engine, ...] = ("vllm", "sglang", "tensorrt", "transformers")
"""Engines that a model card of the published layout has commands for; the last one does not run a head."""
CONVERSION = (
    "For llama.cpp: `dpace export FOLDER --target {target} --to gguf{plain} --target-gguf TARGET.gguf --output "
    "FOLDER-gguf`."
)
"""What a model card of the published layout says of llama.cpp."""


def serve_command(engine: Engine, drafter: str, target: str, block_size: int, *, from_anchor: bool = False) -> str:
    """Return the command, or the line of Python, with which an engine drafts whole blocks.

    Args:
        engine: of `ENGINES`.
        drafter: its folder, file or Hub id.
        target: its target's.
        block_size: of a `Drafter`: the anchor and the draft tokens.
        from_anchor: see `DrafterSpec.sample_from_anchor`; llama.cpp runs such drafters as DSpark's without a head.
    """
    config = {"method": "dflash", "model": drafter, "num_speculative_tokens": block_size - 1}
    return ENGINES[engine].command.format(
        drafter=drafter,
        quoted_drafter=shlex.quote(drafter),
        quoted_target=shlex.quote(target),
        gguf=shlex.quote(drafter) if drafter.endswith(".gguf") else "DRAFTER.gguf",
        kind="dspark" if from_anchor else "dflash",
        config=shlex.quote(json.dumps(config)),
        scalar=json.dumps(drafter),
        count=block_size - 1,
        block_size=block_size,
    )


def card_sections(
    to: Format,
    *,
    drafter: str,
    gguf: str,
    target: str,
    block_size: int,
    from_anchor: bool = False,
    has_head: bool = False,
    has_tables: bool = False,
    has_gguf: bool = True,
) -> list[str]:
    """Write the parts of a model card that say how to serve the drafter.

    Args:
        to: format that was written.
        drafter: name that engines are given for it.
        gguf: name of the drafter's GGUF file, for llama.cpp.
        target: name of the target.
        block_size: of a `Drafter`.
        from_anchor: see `serve_command`.
        has_head: whether the drafter has a head, which not every engine runs.
        has_tables: whether it has an embedding, LM head or draft vocabulary of its own, which only vLLM runs.
        has_gguf: whether a GGUF file can hold it.
    """
    sections = []
    published = PUBLISHED[:1] if has_tables else PUBLISHED[:-1] if has_head else PUBLISHED
    for engine in CARD_ENGINES.get(to, published):
        name = gguf if engine == "llamacpp" else drafter
        command = serve_command(engine, name, target, block_size, from_anchor=from_anchor)
        sections.append(ENGINES[engine].card.format(drafter=drafter, target=target, command=command).rstrip())
    conversion = CONVERSION.format(target=target, plain=" --plain" * has_head)
    return [*sections, conversion] if has_gguf and to not in CARD_ENGINES else sections


TAGS = ["dflash", "speculative-decoding", "block-diffusion", "draft-model", "efficiency"]


def write_card(
    path: Path,
    spec: DrafterSpec,
    *,
    to: Format,
    name: str,
    target_name: str,
    license: str,
    dtype: str,
    is_rounded: bool,
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
        is_rounded: whether the export changed their values.
        source: the drafter's own folder. The card has its `recipe.yaml`, and those rows of the `results.json` beside
            the folder that were measured with these weights.
        drafter: as it was measured, in the target's dtype.
    """
    is_local = Path(target_name).is_dir()
    has_tables = bool(spec.has_own_embed_tokens or spec.has_own_lm_head or spec.draft_vocab_size)
    engines = {"speculators": ["vllm"], "gguf": ["gguf"]}.get(to, ["vllm", "sglang"][: 1 if has_tables else None])
    front = {  # which the Hub reads
        "library_name": to if to in CARD_ENGINES else "transformers",
        "pipeline_tag": "text-generation",
        "license": license,
        **({} if is_local else {"base_model": target_name}),
        "tags": [*TAGS, *engines],
    }
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# {as_markdown(Path(name).name)}",
        f"A DFlash drafter for `{as_code(target_name)}`. It is not a model to use alone: it proposes tokens, and the "
        "target keeps those that it would have written itself.",
        *[f"`{as_code(target_name)}` is a folder: elsewhere, put the target's Hub id in its place below."] * is_local,
        _facts_table(spec, target_name, dtype),
        _results_section(source, drafter, dtype if is_rounded else None),
        "## How to serve it",
        *card_sections(
            to,
            drafter=name,
            gguf=path.name,
            target=target_name,
            block_size=spec.num_draft_tokens + 1,
            from_anchor=spec.sample_from_anchor,
            has_head=spec.head is not None,
            has_tables=has_tables,
            has_gguf=spec.rope["rope_type"] == "default" and spec.is_causal != "sliding",
        ),
        *_recipe_section(source, mapping(getattr(drafter.config, "dpace", None)).get("objective_sha256")),
    ]
    folder = path.parent if to == "gguf" else path
    write_text(folder / "README.md", "\n\n".join(filter(None, parts)) + "\n")


def _facts_table(spec: DrafterSpec, target: str, weights: str) -> str:
    """Write the table of what the drafter is."""
    facts = {
        "target": f"`{as_code(target)}`",
        "block size": f"{spec.block_size}: one known token and {spec.num_draft_tokens} draft tokens",
        "target_layer_ids": f"{list(spec.target_layer_ids)}: counted from 0; the drafter reads their output",
        "mask token": str(spec.mask_token_id),
        "layers, hidden size": f"{spec.num_layers}, {spec.hidden_size}",
        "weights": weights,
    }
    if spec.head:
        sizes = f"{spec.head.num_layers} layers of width {spec.head_width}"
        facts["head"] = f"LiLiCorr, over the {spec.head.candidate_topk} best tokens of each slot, {sizes}"
    elif spec.conv_kernel_size:
        facts["convolutions"] = f"over {spec.conv_kernel_size} slots, as in DFlash2, with a candidate selector of zeros"
    if spec.draft_vocab_size:
        facts["draft vocabulary"] = f"{spec.draft_vocab_size} of {spec.vocab_size} tokens"
    if spec.sample_from_anchor:
        facts["first slot"] = "the known token's own predicts (`sample_from_anchor`), which vLLM 0.32 does not run"
    if spec.sliding_window:
        facts["window"] = f"{spec.sliding_window} tokens in {spec.layer_types.count('sliding_attention')} layers"
    if spec.is_causal:
        facts["causal"] = f"{'sliding' if spec.is_causal == 'sliding' else 'all'} layers: no slot sees a slot after it"
    return "| | |\n|---|---|\n" + "\n".join(f"| {key} | {value} |" for key, value in facts.items())


def _results_section(source: Path, drafter: Drafter, rounded_to: str | None) -> str:
    """Write what `dpace bench` measured with these weights; empty where there is nothing."""
    path = source.resolve().parent / "results.json"
    try:
        results = read_results(path) if path.exists() else None
    except (ValueError, OSError) as error:  # another program's file, or another version's
        print(f"the model card has no measured numbers of {path.name}: {error}", file=sys.stderr)
        return ""
    if not isinstance(results, BenchResults):
        return ""
    weights = fingerprint(drafter, results.dtype)  # they may have been loaded in another one here
    rows = [row for row in results.rows if results.drafters.get(row.drafter) == weights]
    measured = (
        f"Measured for {Path(results.target).name} with {results.engine} in {results.dtype} on "
        f"{results.hardware.device} ({results.hardware.cores} cores), at most {results.max_new_tokens} tokens a "
        "response. tau: tokens emitted per verification. decode_speedup: tokens a second over plain decoding (the "
        "baseline, in brackets) of the same prompts. With intervals of 95 % over prompts."
    )
    if rounded_to:
        measured += f" The weights here are {rounded_to}, rounded from those that were measured."
    table = speeds(replace(results, rows=rows))._replace(title="Results", text=measured, note="")
    return to_markdown(table) if rows else ""


PLACES = ("server", "init", "feature_files", "feature_servers")
"""Options that name files and servers."""


def _recipe_section(source: Path, objective_sha256: object) -> list[str]:
    """Repeat the recipe of `dpace train`, without the places of files and servers, and name the objective."""
    problems: dict[str, str] = {}
    recipe = read_recipe_values(source, problems)
    for problem in problems.values():
        print(f"the model card has no recipe: {source / 'recipe.yaml'}: {problem}", file=sys.stderr)
    kept = {
        name: {key: value for key, value in mapping(recipe[name]).items() if key not in PLACES}
        for name in ("respond", "drafter", "loss", "train")
        if name in recipe
    }
    if not kept:
        return []
    objective = mapping(recipe.get("loss")).get("objective")
    sentence = f"Trained by dpace, objective `{as_code(str(objective))}`"
    if objective == "dpace":
        sentence += " ([D-PACE](https://arxiv.org/abs/2605.18810))"
    if objective_sha256:
        sentence += f" (source: sha256 `{as_code(str(objective_sha256))}`)"
    text = yaml.safe_dump(kept, sort_keys=False).replace("```", "~~~")
    return ["## Recipe", f"{sentence}.", f"```yaml\n{text}```"]
