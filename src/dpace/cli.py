"""The command line: `dpace VERB [recipe.yaml] [--group.field value]`. Heavy imports stand inside each verb."""

import os
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from dpace.config import (
    CheckConfig,
    CompareConfig,
    DoctorConfig,
    Dtype,
    ExportConfig,
    ImportConfig,
    Recipe,
    recipe_flags,
)

USAGE = """usage: dpace VERB [recipe.yaml] [--group.field value ...]

  demo      train a drafter for a real LLM on this machine and show what it gains
  respond   let the target answer the prompts
  train     train a drafter on the responses
  compare   train several objectives with several seeds, and say which is best
  bench     measure drafters against plain decoding on held-out prompts
  report    one HTML page from the folders that the others wrote
  check     prove that a drafter does not change the text
  doctor    say what would go wrong when a drafter is served
  generate  answer one prompt, or chat
  export    write a drafter for vLLM, SGLang, llama.cpp, transformers or speculators
  import    take over a drafter that another project trained

A recipe is flags written down; flags after it override it. `dpace VERB --help` lists them.
"""


@dataclass(frozen=True)
class GenerateConfig:
    """Answer one prompt with a drafter."""

    target: str
    """Folder or Hub id."""
    prompt: str | None = None
    """What to ask, or FILE.jsonl#ID for one of a file's prompts (demo#ID: of the demo's); with --stream a chat without it."""
    drafter: str | None = None
    """The drafter's folder; plain decoding without it."""
    stream: bool = False
    """Show the text as it comes; needs a drafter."""
    max_new_tokens: int = 256
    """Longest response in tokens."""
    temperature: float = 0.0
    """0 is greedy."""
    top_k: int = 0
    """Sample from so many most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Sample from the most likely tokens up to this probability."""
    min_p: float = 0.0
    """Sample from tokens with at least this share of the highest probability."""
    seed: int | None = None
    """Of the draws at temperature above 0."""
    thinking: bool = False
    """Switch thinking on, in chat templates that have the switch."""
    dtype: Dtype = "auto"
    """Of the weights: by default bf16 on a GPU and fp32 on a CPU, where texts are then equal token for token."""
    width: Literal["auto", "full"] = "auto"
    """Verify as much of a draft, or of what followed the last words before, as pays on this machine; or whole drafts."""
    verify_rule: Literal["equality", "speculative"] = "equality"
    """Above temperature 0: accept what equals the target's own draw, or by speculative sampling."""
    compile: bool = False
    """Compile steps of fixed shapes, as CUDA graphs on a GPU: whole drafts, rule equality, not with --stream."""


def main(argv: list[str] | None = None) -> int:
    """Run a verb; returns 0 for success, 1 for a failure told in one line, 2 for wrong usage."""
    argv = sys.argv[1:] if argv is None else argv
    verbs = {
        "demo": _demo,
        "respond": _respond,
        "train": _train,
        "compare": _compare,
        "bench": _bench,
        "report": _report,
        "check": _check,
        "doctor": _doctor,
        "generate": _generate,
        "export": _export,
        "import": _import,
    }
    if not argv or argv[0] not in verbs:
        is_help = bool(argv) and argv[0] in ("-h", "--help")
        print(
            USAGE if is_help or not argv else f"unknown verb {argv[0]!r}\n\n{USAGE}",
            file=sys.stdout if is_help else sys.stderr,
        )
        return 0 if is_help else 2
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        verbs[argv[0]](argv[1:])
    except (ValueError, OSError) as error:
        print(f"dpace {argv[0]}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(
            f"\ninterrupted; finished work is kept: the same `dpace {argv[0]}` command goes on from it", file=sys.stderr
        )
        return 130
    return 0


def _parse(config_class, verb: str, args: list[str]):
    import tyro

    recipe = []
    if args and args[0].endswith((".yaml", ".yml")):
        recipe, args = recipe_flags(args[0]), args[1:]
    args = [*recipe, *(_with_group(config_class, verb, arg) for arg in args)]
    return tyro.cli(config_class, prog=f"dpace {verb}", args=args)


def _with_group(config_class, verb: str, arg: str) -> str:
    """A verb's own group may be left out: `dpace bench --sets` is `dpace bench --bench.sets`."""
    groups: dict[str, Any] = {field.name: field.default_factory for field in fields(config_class)}
    name = arg.partition("=")[0].removeprefix("--").removeprefix("no-").replace("-", "_")
    if not arg.startswith("--") or name in groups or verb not in groups:
        return arg
    is_own = name in {field.name for field in fields(groups[verb])}
    prefix = f"--{verb}.no-" if arg.startswith("--no-") else f"--{verb}."
    return prefix + arg.removeprefix("--").removeprefix("no-") if is_own else arg


def _first_as(name: str, args: list[str]) -> list[str]:
    """Let values that stand first be those of a flag."""
    return [f"--{name}", *args] if args and not args[0].startswith("-") else args


def _demo(args: list[str]) -> None:
    from dpace.demo.run import DemoConfig

    config = _parse(DemoConfig, "demo", args)

    from dpace.demo.run import demo_recipe, find_target, run_demo, summary
    from dpace.report.tables import console, results_table, slots_table

    results = run_demo(config)
    console().print(results_table(results), slots_table(results))
    for line in summary(results):
        print(line)
    output = Path(demo_recipe(config).output)
    print(f"\nwritten: {output}/results.json, acceptance.png, weights.png, the drafter in {output}/dpace")
    prompt = f"{config.prompts or 'demo'}#{results['rows'][0]['responses'][0]['id']}"
    print(
        "next:",
        _command("generate", target=find_target(results["target"]), drafter=output / "dpace", prompt=f'"{prompt}"'),
    )


def _respond(args: list[str]) -> None:
    recipe = _parse(Recipe, "respond", args)
    from dpace.data.prompts import split_prompts
    from dpace.data.responses import write_responses

    parts = split_prompts(recipe.prompts)
    path = Path(recipe.output) / "responses.jsonl"
    responses = write_responses(
        _load_target(recipe),
        [*parts.train, *parts.validation, *parts.heldout],
        path,
        recipe.respond,
    )
    print(f"{len(responses)} responses in {path}")
    print("next: dpace train", *args)


def _train(args: list[str]) -> None:
    recipe = _parse(Recipe, "train", args)
    from torch import distributed

    from dpace.data.prompts import split_prompts
    from dpace.data.responses import read_responses
    from dpace.train.run import make_datasets, train

    path = Path(recipe.output) / "responses.jsonl"
    responses = {response.id: response for response in read_responses(path)} if path.exists() else {}
    answered, validation, _ = (
        [responses[p.id] for p in part if p.id in responses] for part in split_prompts(recipe.prompts)
    )
    if not answered:
        raise ValueError(f"{path} has no answers to these prompts; run `dpace respond` with the same recipe first")
    folder = Path(recipe.output) / "drafter"
    target = _load_target(recipe)
    train(target, *make_datasets(target, answered, validation, recipe), recipe, folder)
    if distributed.is_initialized():
        distributed.destroy_process_group()
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"drafter in {folder}")
        print("next: dpace bench", *args)


def _compare(args: list[str]) -> None:
    config = _parse(CompareConfig, "compare", args)
    from dpace.compare import compare
    from dpace.report.tables import compare_table, console

    results = compare(_load_target(config), config)
    console().print(compare_table(results))
    output = Path(config.output)
    print(
        f"written: {output}/results.json, tau.png, acceptance.png, weights.png, a drafter for each objective and seed"
    )
    best = output / results["rows"][0]["drafter"] / f"seed-{config.seeds[0]}"
    print("next:", _command("generate", target=config.target, drafter=best, prompt='"..."'))


def _bench(args: list[str]) -> None:
    recipe = _parse(Recipe, "bench", args)
    from dpace.data.prompts import split_prompts
    from dpace.data.public_sets import read_sets
    from dpace.drafter import load_drafter
    from dpace.measure.benchmark import bench
    from dpace.report.tables import console, drafters_table, predictions_table, results_table, slots_table

    if recipe.bench.sets:
        prompts = read_sets(recipe.bench.sets, recipe.bench.sets_dir)
    else:
        prompts = split_prompts(recipe.prompts).heldout
    if recipe.bench.server:
        return _bench_servers(recipe, prompts)
    if recipe.bench.plain_server:
        raise ValueError("--bench.plain-server is the baseline of a --bench.server; name that too")
    target = _load_target(recipe)
    folders = recipe.bench.drafters or (str(Path(recipe.output) / "drafter"),)
    drafters = {Path(folder).name: load_drafter(folder, target) for folder in folders}
    if len(drafters) < len(folders):
        raise ValueError(f"two drafters' folders have the same name among {', '.join(folders)}; rename one")
    results = bench(target, drafters, prompts, recipe.bench, recipe.output)
    console().print(results_table(results), slots_table(results))
    for make, key in ((drafters_table, "comparisons"), (predictions_table, "predictions")):
        if results[key]:
            console().print(make(results[key]))
    print(f"written: {recipe.output}/results.json")
    print("next:", _command("generate", target=recipe.target, drafter=folders[0], prompt='"..."'))


def _bench_servers(recipe: Recipe, prompts: list) -> None:
    from transformers import AutoTokenizer

    from dpace.data.responses import Chat
    from dpace.demo.run import find_target
    from dpace.measure.servers import bench_servers
    from dpace.report.tables import console, servers_table

    name, settings = find_target(recipe.target), recipe.bench
    chat = Chat(name, AutoTokenizer.from_pretrained(name), recipe.thinking)
    results = bench_servers(chat, settings.server or "", settings.plain_server, prompts, settings, recipe.output)
    console().print(servers_table(results))
    print(f"written: {recipe.output}/servers.json")
    print(f"next: dpace report {recipe.output}")


@dataclass(frozen=True)
class ReportConfig:
    """Write report.html, one page without network, and the same as Markdown: dpace report FOLDER [FOLDER ...]."""

    folders: tuple[str, ...]
    """Of demo, bench or compare; given first, or with this flag."""
    output: str | None = None
    """The HTML file; report.html in the first folder by default."""


def _report(args: list[str]) -> None:
    config = _parse(ReportConfig, "report", _first_as("folders", args))
    from dpace.report.page import write_report

    written = write_report(config.folders, config.output or Path(config.folders[0]) / "report.html")
    print("written:", ", ".join(map(str, written)))


def _check(args: list[str]) -> None:
    config = _parse(CheckConfig, "check", args)
    from dpace.data.prompts import read_heldout
    from dpace.drafter import load_drafter
    from dpace.measure.check import check
    from dpace.report.tables import check_table, console

    prompts = read_heldout(config.prompts)
    failed = []
    for dtype in config.dtypes:
        target = _load_target(config, dtype)
        findings = check(target, load_drafter(config.drafter, target), prompts, config)
        console().print(check_table(findings, f"{Path(target.name).name} in {dtype}"))
        failed += [f"{finding.name} ({dtype})" for finding in findings if not finding.is_passed]
    if failed:
        raise ValueError(f"failed: {', '.join(failed)}; do not serve this pair before the cause is found")
    print("passed")


def _doctor(args: list[str]) -> None:
    config = _parse(DoctorConfig, "doctor", _first_as("drafter", args))
    from dpace.engines.doctor import RUN, diagnose
    from dpace.engines.published import serve_command
    from dpace.report.tables import console, doctor_table

    target = _load_target(config)
    diagnoses = diagnose(config.drafter, target, engine=config.engine, responses=config.responses)
    measured = {check.name for check in RUN}
    shown = [d for d in diagnoses if d.result != "passes" or d.check in measured]
    console().print(doctor_table(shown, f"{config.drafter} for {target.short_name}"))
    silent = [d.check for d in diagnoses if d not in shown]
    console().print(f"{len(silent)} other checks pass:", ", ".join(silent), "\n", highlight=False)
    failed = [d.check for d in diagnoses if d.result == "fails"]
    if failed:
        raise ValueError(f"failed: {', '.join(failed)}; the table says what to do")
    print("passed")
    if config.engine:
        size = next(int(d.found) for d in diagnoses if d.check == "block_size")
        print("serve with:", serve_command(config.engine, config.drafter, config.target, size), sep="\n")
    print("next:", _command("check", target=config.target, drafter=config.drafter))


def _generate(args: list[str]) -> None:
    config = _parse(GenerateConfig, "generate", args)
    if config.stream and config.drafter is None:
        raise ValueError("--stream shows what a drafter does; name one with --drafter")
    if config.compile and (config.stream or config.drafter is None or config.verify_rule != "equality"):
        raise ValueError("--compile needs --drafter, and goes with neither --stream nor --verify-rule speculative")
    if config.prompt is None and not config.stream:
        raise ValueError("nothing to answer; give --prompt, or --stream for a chat")
    from dpace.data.prompts import find_prompt
    from dpace.data.responses import encode_chat
    from dpace.decode.batch import generate_batch
    from dpace.decode.loop import generate, generate_plain
    from dpace.drafter import load_drafter

    target = _load_target(config)
    options = {
        name: getattr(config, name) for name in ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "seed")
    }
    speculative = {"width": config.width, "verify_rule": config.verify_rule}
    if config.stream and config.drafter:
        messages = find_prompt(config.prompt) if config.prompt else []
        return _chat(target, load_drafter(config.drafter, target), messages, {**options, **speculative})
    token_ids = encode_chat(target, find_prompt(config.prompt or ""))
    if config.drafter is None:
        generation = generate_plain(target, token_ids, **options)
    elif config.compile:
        (generation,) = generate_batch(
            target, load_drafter(config.drafter, target), [token_ids], **options, compile=True
        )
    else:
        generation = generate(target, load_drafter(config.drafter, target), token_ids, **options, **speculative)
    print(target.tokenizer.decode(generation.token_ids, skip_special_tokens=True))
    speed = generation.num_decode_tokens / max(generation.decode_seconds, 1e-9)
    tau = f", tau {generation.acceptance.tau:.2f}" if generation.accepted_lengths else ""
    print(f"{len(generation.token_ids)} tokens, {speed:.1f} tokens/s{tau}", file=sys.stderr)
    if config.drafter is None:
        print("next: dpace demo, to train a drafter", file=sys.stderr)


def _export(args: list[str]) -> None:
    config = _parse(ExportConfig, "export", _first_as("drafter", args))
    import torch

    from dpace.data.prompts import first_of_each_set, read_heldout
    from dpace.data.responses import encode_chat
    from dpace.engines.export import export, push

    target = _load_target(config, "auto")
    chosen = first_of_each_set(read_heldout(config.prompts), config.num_prompts)
    prompts = [encode_chat(target, prompt.turns[0]) for prompt in chosen]
    done = export(
        config.drafter,
        target,
        to=config.to,
        output=config.output,
        name=config.push or config.output,
        target_name=config.target,
        target_gguf=config.target_gguf,
        dtype=None if config.dtype == "keep" else getattr(torch, config.dtype),
        license=config.license,
        prompts=prompts,
        max_new_tokens=config.max_new_tokens,
    )
    print(f"{done.num_tensors} of {done.num_tensors} tensors read back bit for bit", end="")
    print(f"; rounded by at most {done.rounding:.1g} (relative)" if done.rounding else "")
    if done.acceptance:
        print(f"logits of a block differ by {done.logit_error:.1g} (relative)")
        print(f"accepted lengths equal on {len(prompts)} of {len(prompts)} prompts, tau {done.acceptance.tau:.2f}")
    print(f"written: {done.path}, {config.output}/README.md")
    if config.push:
        print("uploaded:", push(config.output, config.push))
    print(f"next: the commands in {config.output}/README.md")


def _import(args: list[str]) -> None:
    config = _parse(ImportConfig, "import", _first_as("source", args))
    from dpace.demo.run import find_target
    from dpace.engines.export import import_drafter
    from dpace.engines.published import verifier_name

    target = config.target or verifier_name(config.source)
    target = find_target(target) if target else None
    drafter = import_drafter(config.source, config.output, target=target)
    print(
        f"blocks of {drafter.block_size}, features of layers {drafter.target_layer_ids}, mask token {drafter.mask_token_id}"
    )
    print(f"written: {config.output}")
    print("next:", _command("check", target=config.target or "TARGET", drafter=config.output))


def _chat(target, drafter, messages: list[dict[str, str]], options: dict) -> None:
    """Answer the messages, or the user's lines until the end of input; show speed and accepted lengths after each answer."""
    import time

    from dpace.data.responses import encode_chat
    from dpace.decode.streaming import stream

    is_one_answer = bool(messages)
    while True:
        if not messages or messages[-1]["role"] != "user":
            try:
                line = input("> ").strip()
            except EOFError:
                return
            if not line:
                continue
            messages.append({"role": "user", "content": line})
        steps, text, started = [], "", 0.0
        for piece in stream(target, drafter, encode_chat(target, messages), **options, on_step=steps.append):
            started = started or time.perf_counter()
            text += piece
            print(piece, end="", flush=True)
        seconds = time.perf_counter() - started
        print()
        tokens = sum(len(step.token_ids) for step in steps[1:])
        lengths = " ".join(str(step.accepted) for step in steps[1:])
        print(f"{tokens / max(seconds, 1e-9):.1f} tokens/s; accepted: {lengths}", file=sys.stderr)
        if is_one_answer:
            return
        messages.append({"role": "assistant", "content": text})


def _load_target(config, dtype: str | None = None):
    import torch

    from dpace.demo.run import find_target
    from dpace.target import Target

    name = dtype or getattr(config, "dtype", "auto")
    options = {
        "dtype": None if name == "auto" else getattr(torch, name),
        "thinking": getattr(config, "thinking", False),
    }
    return Target.load(find_target(config.target), **options)


def _command(verb: str, **flags) -> str:
    """A command to copy."""
    return " ".join([f"dpace {verb}", *(f"--{name} {value}" for name, value in flags.items())])


if __name__ == "__main__":
    sys.exit(main())
