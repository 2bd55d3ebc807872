"""Hundreds of hostile command lines: each is to end in one clear line, before any model is loaded.

A case is a name, a function that makes files in an empty folder and gives the arguments, and what the line has to name.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

TARGET = "/no/such/target"
"""What is not refused before ends here, with a line that no case expects."""


class Case(NamedTuple):
    """One command line."""

    name: str
    make: Callable[[Path], list[str]]
    names: str
    """Regular expression of what the line has to name."""
    code: int = 1


def write(path: Path, data: str | bytes) -> str:
    path.write_bytes(data.encode("utf-8", "surrogatepass") if isinstance(data, str) else data)
    return str(path)


def flag_cases() -> Iterator[Case]:
    """Flags that do not exist, stand twice, lack a value or have one of another type."""
    lines = {
        "unknown": (["train", "--train.learning-rat", "1"], r"learning-rat.*did you mean --train.learning-rate"),
        "unknown value": (["train", "extra"], "extra"),
        "no value": (["respond", "--output"], "--output"),
        "flag as value": (["respond", "--output", "--thinking"], "--output"),
        "text for a number": (["train", "--train.learning-rate", "fast"], "learning-rate.*fast"),
        "fraction for an integer": (["train", "--train.batch-size", "1.5"], "batch-size.*1.5"),
        "empty number": (["train", "--train.batch-size", ""], "batch-size"),
        "hexadecimal": (["train", "--train.batch-size", "0x10"], "batch-size.*0x10"),
        "unknown dtype": (["respond", "--dtype", "float8"], "dtype"),
        "unknown objective": (["train", "--loss.objective", "dpce"], "objective"),
        "unknown width": (["bench", "--bench.widths", "wide"], "widths.*wide"),
        "value for a switch": (["respond", "--thinking", "5"], "5"),
        "control characters": (["respond", "\x1b[2J\x07"], r"\\x1b"),
        "half a character": (["respond", "\udc80"], "udc80"),
        "group without a field": (["respond", "--respond", "5"], "respond"),
        "no target": (["check", "--drafter", "x"], "target"),
        "no drafter": (["check", "--target", "x"], "drafter"),
        "generate without target": (["generate", "--prompt", "a"], "target"),
        "another verb's flag": (["generate", "--objective", "dpace", "--target", "x"], "objective"),
        "unknown check dtype": (["check", "--target", "x", "--drafter", "y", "--dtypes", "int8"], "dtypes"),
    }
    for name, (args, names) in lines.items():
        yield Case(f"flag: {name}", lambda _, args=args: args, names, 2)


def range_cases() -> Iterator[Case]:
    """Values outside their range."""
    recipe = {
        "respond.max-new-tokens": "0 -1 3000000000",
        "respond.temperature": "-1 nan inf",
        "respond.batch-size": "0 -4",
        "respond.seed": "-1 4294967296",
        "prompts.limit": "0 -1",
        "prompts.num-heldout": "-1",
        "prompts.num-validation": "-1",
        "drafter.num-layers": "0 -1",
        "drafter.block-size": "1 0 -3 100000",
        "drafter.num-features": "0",
        "drafter.mask-token-id": "-1",
        "drafter.norm-scale": "0 -1 nan inf",
        "loss.alpha": "-0.1 1.1 nan",
        "loss.alpha-end": "-0.1 1.1 nan",
        "loss.gamma": "0 -1 inf",
        "loss.base": "0 nan",
        "train.learning-rate": "0 -1 nan inf",
        "train.num-epochs": "0 -1 nan inf",
        "train.max-steps": "0 -2",
        "train.warmup-ratio": "-0.1 2 nan",
        "train.batch-size": "0",
        "train.gradient-accumulation-steps": "0",
        "train.num-anchors": "0",
        "train.max-length": "1",
        "train.max-grad-norm": "-1 inf",
        "train.weight-decay": "-1 nan",
        "train.seed": "-1",
        "train.logging-steps": "0",
        "train.eval-steps": "0 -5",
        "train.feature-cache-gib": "-1 nan inf",
        "bench.temperatures": "-1 nan",
        "bench.max-new-tokens": "0",
        "bench.num-prompts": "-1",
        "bench.widths": "0 -1",
        "bench.concurrencies": "0",
        "bench.seed": "-1",
    }
    for flag, values in recipe.items():
        verb = {"respond": "respond", "prompts": "respond", "bench": "bench"}.get(flag.split(".")[0], "train")
        for value in values.split():
            args = [verb, "--target", TARGET, f"--{flag}={value}"]
            yield Case(f"range: {flag} {value}", lambda _, args=args: args, f"--{flag} is .*expected")
    generate = {"max-new-tokens": "0", "temperature": "-1 nan", "top-k": "-1", "top-p": "0 2 nan", "min-p": "-1 2"}
    for flag, values in {**generate, "seed": "-1"}.items():
        for value in values.split():
            args = ["generate", "--target", TARGET, "--prompt", "a", f"--{flag}={value}"]
            yield Case(f"range: generate {flag} {value}", lambda _, args=args: args, f"--{flag} is .*expected")
    for flag in ("num-prompts", "max-new-tokens", "seed"):
        args = ["check", "--target", TARGET, "--drafter", "x", f"--{flag}=-1"]
        yield Case(f"range: check {flag}", lambda _, args=args: args, f"--{flag} is -1, expected")
    lists = {
        "layers descend": (["train", "--drafter.target-layer-ids", "3", "1"], "ascending"),
        "negative layer": (["train", "--drafter.target-layer-ids=-1"], "target-layer-ids"),
        "layer twice": (["train", "--drafter.target-layer-ids", "1", "1"], "1 twice"),
        "temperature twice": (["bench", "--temperatures", "0", "0.0"], "twice"),
        "seeds twice": (["compare", "--seeds", "1", "1"], "--seeds has 1 twice"),
        "empty output": (["respond", "--output", ""], "--output is ''"),
        "blank target": (["respond", "--target", "  "], "--target is '  '"),
        "empty prompt": (["generate", "--target", TARGET, "--prompt", ""], "--prompt is ''"),
        "prompt that is no Unicode": (["generate", "--target", TARGET, "--prompt", "a\udc80"], "--prompt is .*udc80"),
        "output that is no Unicode": (["respond", "--output", "\udcff"], "--output is .*udcff"),
    }
    for name, (args, names) in lists.items():
        yield Case(f"range: {name}", lambda _, args=args: args, names)


def objective_cases() -> Iterator[Case]:
    """Objectives of one's own that are no function, or whose weights no loss can have."""
    ones = "slots.is_scored.float()"
    bodies = {
        "function": ("", "has no weigh"),
        "not a function": ("weigh = 5", "is int, expected a function"),
        "broken": ("1 / 0", "cannot be imported, ZeroDivisionError"),
        "needs a package": ("import no_such_package", "cannot be imported, ModuleNotFoundError.*no_such_package"),
        "no arguments": ("def weigh(): pass", "fails on a batch.*TypeError"),
        "no weights": ("def weigh(slots): pass", "gives NoneType, expected a tensor"),
        "shape": (f"def weigh(slots): return {ones}[0]", r"gives \(3, 16\), expected a tensor \(2, 3, 16\)"),
        "negative": (f"def weigh(slots): return -{ones}", "gives the weight -1"),
        "not finite": (f"def weigh(slots): return {ones} / 0", "gives the weight inf"),
        "value": ("def make(x):\n    def f(slots): return x\n    return f\nweigh = make(set())", "set"),
    }
    for number, (name, (body, names)) in enumerate(bodies.items()):

        def make(path: Path, body=body, name=f"hostile_objective_{number}") -> list[str]:
            write(path / f"{name}.py", body)
            return ["train", "--target", TARGET, "--loss.objective", f"{name}:weigh"]

        yield Case(f"objective: {name}", make, names)
    missing = "there is no module no_such_module"
    yield Case("objective: module", lambda _: ["train", "--loss.objective", "no_such_module.a:weigh"], missing)
    yield Case("objective: compare", lambda _: ["compare", "--objectives", "no_such_module:weigh+kl"], missing)
    yield Case("objective: unknown", lambda _: ["compare", "--objectives", "dpce"], "there is no objective 'dpce'")


def recipe_cases() -> Iterator[Case]:
    """Recipes of every broken kind."""
    bomb = "a: &a [x, x]\n" + "".join(f"{n}: &{n} [*{m}, *{m}]\n" for m, n in zip("abcdefgh", "bcdefghi", strict=True))
    texts: dict[str, tuple[str | bytes, str]] = {
        "open list": ("a: [1", "line 1"),
        "tab": ("train:\n\tseed: 1", "line 2"),
        "binary": (b"\xff\xfe\x00", "UTF-8|utf-8"),
        "NUL": ("output: \0", "cannot read the recipe"),
        "empty": ("", "holds null"),
        "list": ("- a", "holds"),
        "number": ("3", "holds 3"),
        "two documents": ("output: a\n---\noutput: b", "single document"),
        "alias bomb": (bomb, "aliases"),
        "anchor": ("output: &a x", "anchors"),
        "python object": ("output: !!python/object/apply:os.system [ls]", "python/object"),
        "binary tag": ("output: !!binary aGk=", "no tags"),
        "deep lists": ("[" * 5000, "levels"),
        "deep mappings": ("{a: " * 3000, "levels"),
        "endless number": (f"train: {{seed: {'9' * 5000}}}", "train.seed"),
        "key twice": ("output: a\noutput: b", "line 2.*'output' is given twice"),
        "inner key twice": ("train:\n  seed: 1\n  seed: 2", "line 3.*'seed' is given twice"),
        "key in two spellings": (
            "train:\n  batch-size: 1\n  batch_size: 2",
            "'train.batch-size' .did you mean",
        ),
        "key that is a number": ("1: 2", "key 1"),
        "key that is a list": ("? [a]\n: b", "key"),
        "unknown key": ("outptu: a", "'outptu' .did you mean output"),
        "unknown inner key": ("train:\n  learning_rat: 1", "train.learning_rat.*did you mean train.learning_rate"),
        "merge key": ("<<: {output: a}", "<<"),
        "null output": ("output: null", "output is null"),
        "empty output": ("output:", "output is null"),
        "null seed": ("train: {seed: ~}", "train.seed is null"),
        "null group": ("train:", "train is null"),
        "group is a number": ("train: 5", "train is 5"),
        "group is a list": ("train: [1]", r"train is \[1\]"),
        "value is a group": ("output: {a: 1}", "output is .*expected a text"),
        "list for a number": ("train: {learning_rate: [1, 2]}", "train.learning_rate is .*expected a number"),
        "text for a number": ("train: {learning_rate: fast}", "train.learning_rate is 'fast'"),
        "number as a text": ("train: {learning_rate: '1'}", "train.learning_rate is '1'"),
        "fraction for an integer": ("train: {batch_size: 2.0}", "train.batch_size is 2.0"),
        "octal": ("train: {seed: 010}", "train.seed is '010'"),
        "sexagesimal": ("train: {seed: 1:30}", "train.seed is '1:30'"),
        "switch for a number": ("train: {seed: true}", "train.seed is True"),
        "number for a switch": ("thinking: 1", "thinking is 1"),
        "text for a switch": ("thinking: 'yes'", "thinking is 'yes'"),
        "number for a text": ("output: 5", "output is 5.*quotes"),
        "switch for a text": ("output: no", "output is False.*quotes"),
        "unknown objective": ("loss: {objective: dpce}", "loss.objective is 'dpce', expected one of .*module:function"),
        "unknown choice": ("dtype: float31", "dtype is 'float31', expected one of"),
        "unknown choice in a list": ("bench: {widths: [wide]}", "bench.widths"),
        "null in a list": ("bench: {temperatures: [null]}", "bench.temperatures"),
        "empty list": ("bench: {temperatures: []}", "temperatures is empty"),
        "not a number": ("train: {learning_rate: .nan}", "learning_rate is nan"),
        "infinite": ("train: {num_epochs: .inf}", "num_epochs is inf"),
        "negative": ("train: {batch_size: -1}", "batch_size is -1"),
        "NUL in a text": ('output: "a\\0b"', "output is"),
        "control characters": ('output: "a"\n"\\e[2J": 1', r"x1b"),
        "half a character": ('output: "\\ud800"', "surrogates"),
        "another verb's option": ("prompt: a", "'prompt'"),
    }
    for name, (text, names) in texts.items():
        yield Case(f"recipe: {name}", lambda d, text=text: ["train", write(d / "r.yaml", text)], names)
    yield Case("recipe: missing", lambda d: ["train", str(d / "no.yaml")], "no.yaml")
    yield Case("recipe: a folder", lambda d: ["train", str(folder(d / "r.yaml"))], "r.yaml.*folder")
    yield Case("recipe: a device", lambda d: ["train", str(link(d / "r.yaml", "/dev/zero"))], "device")
    yield Case("recipe: too large", lambda d: ["train", large(d / "r.yaml")], "bytes")
    yield Case("recipe: many", lambda d: ["train", write(d / "r.yaml", "- x\n" * 500_000)], "1,048,576 bytes")
    yield Case("recipe: second", lambda d: ["train", "--output", "o", write(d / "r.yaml", "output: a")], "r.yaml", 2)


def folder(path: Path) -> Path:
    path.mkdir()
    return path


def link(path: Path, to: str) -> Path:
    path.symlink_to(to)
    return path


def large(path: Path) -> str:
    """A file of 65 MB that takes no room."""
    with path.open("wb") as file:
        file.truncate(65 * 2**20 + 2**20)
    return str(path)


def prompt_cases() -> Iterator[Case]:
    """Files of prompts of every broken kind, for the verbs that read them."""
    lines: dict[str, tuple[str | bytes, str]] = {
        "empty": ("", "holds no prompt"),
        "blank lines": ("\n \n", "holds no prompt"),
        "no JSON": ("{broken\n", ":1: the line is not JSON"),
        "cut": ('{"prompt": "a"}\n{"prompt": "b', ":2: the line is not JSON"),
        "a list": ("[1]\n", ":1: expected a JSON object, found list"),
        "a text": ('"a"\n', "found str"),
        "null": ("null\n", "found NoneType"),
        "no UTF-8": (b'{"prompt": "\xff"}\n', ":1: the line is not JSON"),
        "UTF-16": ('{"prompt": "a"}\n'.encode("utf-16"), ":1: the line is not JSON"),
        "deep": ("[" * 100_000 + "\n", ":1: the line is not JSON"),
        "endless number": ('{"prompt": "a", "id": ' + "9" * 5000 + "}\n", ":1: the line is not JSON"),
        "key twice": ('{"prompt": "a", "prompt": "b"}\n', "'prompt' is given twice"),
        "NUL bytes": (b"\0\0\0\n", ":1: the line is not JSON"),
        "carriage returns only": ('{"prompt": "a"}\r{"prompt": "b"}', ":1: the line is not JSON"),
    }
    rows: dict[str, tuple[object, str]] = {
        "nothing": ({}, "found nothing"),
        "another key": ({"text": "a"}, "found text"),
        "two kinds": ({"prompt": "a", "turns": ["b"]}, "`turns` and `prompt`"),
        "prompt null": ({"prompt": None}, "`prompt` is null"),
        "prompt number": ({"prompt": 5}, "`prompt` is 5"),
        "prompt list": ({"prompt": ["a"]}, "`prompt` is"),
        "prompt blank": ({"prompt": " \n"}, "not empty"),
        "turns text": ({"turns": "abc"}, "`turns` is .*expected a list"),
        "turns empty": ({"turns": []}, "`turns` is empty"),
        "turns null": ({"turns": None}, "`turns` is null"),
        "turns of numbers": ({"turns": [1]}, "`turns` is 1"),
        "turns of null": ({"turns": ["a", None]}, "`turns` is null"),
        "turns with a blank": ({"turns": ["a", " "]}, "not empty"),
        "turns of lists": ({"turns": [["a"]]}, "`turns` is"),
        "messages text": ({"messages": "a"}, "`messages` is .*expected a list"),
        "messages empty": ({"messages": []}, "`messages` is empty"),
        "messages of texts": ({"messages": ["a"]}, "no `role`"),
        "messages an object": ({"messages": {"role": "user", "content": "a"}}, "expected a list"),
        "message without role": ({"messages": [{"content": "a"}]}, "no `role`"),
        "message without content": ({"messages": [{"role": "user"}]}, "no text in `content`"),
        "content null": ({"messages": [{"role": "user", "content": None}]}, "`content` of a message is null"),
        "content parts": ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "`content` of a message"),
        "role number": ({"messages": [{"role": 1, "content": "a"}]}, "`role` of a message is 1"),
        "tool calls": ({"messages": [{"role": "user", "content": "a", "tools": [1]}]}, "`tools` of a message"),
        "last is assistant": ({"messages": [{"role": "assistant", "content": "a"}]}, "without a text of the user"),
        "id null": ({"prompt": "a", "id": None}, "`id` is null"),
        "id list": ({"prompt": "a", "id": [1]}, "`id` is"),
        "id switch": ({"prompt": "a", "id": True}, "`id` is true"),
        "id empty": ({"prompt": "a", "id": ""}, "`id` is"),
        "id not a number": ({"prompt": "a", "id": float("nan")}, "`id` is NaN"),
        "set number list": ({"prompt": "a", "set": []}, "`set` is"),
        "half a character": ({"prompt": "a\ud800"}, "half a character"),
        "half a character in the id": ({"prompt": "a", "id": "\udfff"}, "half a character"),
        "escape sequences": ({"prompt": "a", "id": {"\x1b[2J": 1}}, "`id` is"),
    }
    lines |= {name: (json.dumps(row) + "\n", f"p.jsonl:1: .*{names}") for name, (row, names) in rows.items()}
    twice = '{"prompt": "a", "id": 1}\n{"prompt": "b", "id": "1"}\n'
    lines["id twice"] = (twice, ":2: the id '1' occurs twice")
    lines["own number twice"] = ('{"prompt": "a", "id": "2"}\n{"prompt": "b"}\n', ":2: the id '2' occurs twice")
    lines["too few"] = ('{"prompt": "a"}\n', "at least 10")
    for name, (text, names) in lines.items():
        yield Case(f"prompts: {name}", lambda d, text=text: respond(d, write(d / "p.jsonl", text)), names)
        if name in ("no JSON", "prompt null", "empty"):
            yield Case(f"prompts of check: {name}", lambda d, t=text: check(d, write(d / "p.jsonl", t)), names)
            yield Case(
                f"prompts of generate: {name}",
                lambda d, t=text: ["generate", "--target", TARGET, "--prompt", write(d / "p.jsonl", t) + "#1"],
                names,
            )
    yield Case("prompts: missing", lambda d: respond(d, str(d / "p.jsonl")), "p.jsonl")
    yield Case("prompts: a folder", lambda d: respond(d, str(folder(d / "p.jsonl"))), "p.jsonl: it is a folder")
    yield Case("prompts: a device", lambda d: respond(d, str(link(d / "p.jsonl", "/dev/zero"))), "a device")
    yield Case("prompts: a loop", lambda d: respond(d, str(link(d / "p.jsonl", "p.jsonl"))), "p.jsonl")
    yield Case("prompts: one endless line", lambda d: respond(d, large(d / "p.jsonl")), "p.jsonl:1: .*bytes")
    yield Case("prompts: name too long", lambda d: respond(d, str(d / ("p" * 300))), "ppp.*too long")
    yield Case("prompts: below a file", lambda d: respond(d, write(d / "f", "x") + "/p.jsonl"), "f/p.jsonl")
    yield Case("heldout: missing", lambda d: [*respond(d, good(d)), "--prompts.heldout-path", str(d / "h")], "/h")
    yield Case(
        "heldout: trained on",
        lambda d: [*respond(d, good(d)), "--prompts.heldout-path", write(d / "h.jsonl", '{"prompt": " q3 ", "id": 7}')],
        "held-out prompt '7' .*also a training prompt, '4'",
    )


def good(path: Path) -> str:
    return write(path / "good.jsonl", "".join(json.dumps({"prompt": f"q{i}"}) + "\n" for i in range(12)))


def respond(path: Path, prompts: str) -> list[str]:
    return ["respond", "--target", TARGET, "--output", str(path / "out"), "--prompts.path", prompts]


def check(path: Path, prompts: str) -> list[str]:
    return ["check", "--target", TARGET, "--drafter", str(path), "--prompts", prompts]


def path_cases() -> Iterator[Case]:
    """Folders and files that are missing, of another kind or another's."""

    def other(path: Path, name: str) -> list[str]:
        write(folder(path / "out") / name, "another's")
        return respond(path, good(path))

    for name in ("responses.jsonl", "responses.meta.json"):
        yield Case(f"path: another's {name}", lambda d, n=name: other(d, n), f"{name} was not written by dpace")
    yield Case(
        "path: output is a file",
        lambda d: [*respond(d, good(d))[:3], "--prompts.path", good(d), "--output", write(d / "f", "x")],
        "/f: File exists",
    )
    yield Case(
        "path: output below a file",
        lambda d: ["respond", "--prompts.path", good(d), "--output", write(d / "f", "x") + "/out"],
        "/f",
    )
    yield Case("path: output in /proc", lambda d: ["respond", "--output", "/proc/dpace/out"], "/proc")
    yield Case("path: output too long", lambda d: ["respond", "--output", "o" * 300], "ooo.*too long")
    for verb, rest in {"respond": [], "generate": ["--prompt", "a"]}.items():
        targets = {
            "missing": lambda d: str(d / "no"),
            "a file": lambda d: write(d / "model.bin", "x"),
            "an empty folder": lambda d: str(folder(d / "empty")),
            "home": lambda d: "~/no-such-model",
            "no name": lambda d: "a b/c",
            "three parts": lambda d: "a/b/c",
            "control characters": lambda d: "\x1b[31mred",
            "line ends": lambda d: "a\nb",
        }
        for name, make in targets.items():
            extra = (lambda d: ["--output", str(d / "out")]) if verb == "respond" else (lambda d: [])
            args = lambda d, v=verb, m=make, r=rest, e=extra: [v, *r, "--target", m(d), *e(d)]  # noqa: E731
            yield Case(f"target of {verb}: {name}", args, "there is no folder|has no config.json")
    drafters = {"missing": lambda d: str(d / "no"), "a file": lambda d: write(d / "f", "x")}
    for name, make in drafters.items():
        start = ["generate", "--target", TARGET, "--prompt", "a", "--drafter"]
        yield Case(f"drafter of generate: {name}", lambda d, m=make, s=start: [*s, m(d)], "--drafter .*folder")
        start = ["check", "--target", TARGET, "--drafter"]
        yield Case(f"drafter of check: {name}", lambda d, m=make, s=start: [*s, m(d)], "--drafter .*folder")
    demos = {
        "prompts missing": (lambda d: ["--prompts", str(d / "no.jsonl")], "no.jsonl"),
        "prompts broken": (lambda d: ["--prompts", write(d / "p.jsonl", "{")], "p.jsonl:1: the line is not JSON"),
        "output is a file": (lambda d: ["--output", write(d / "f", "x")], "/f: File exists"),
        "another's results": (lambda d: [another(d), "--output", str(d)][1:], "results.json was not written by dpace"),
        "target missing": (lambda d: ["--target", TARGET, "--output", str(d / "out")], "there is no folder"),
    }
    for name, (make, names) in demos.items():
        yield Case(f"demo: {name}", lambda d, m=make: ["demo", *m(d)], names)
    combinations = {
        "stream without drafter": (["--stream"], "--stream needs a drafter"),
        "compile without drafter": (["--compile", "--prompt", "a"], "--compile needs --drafter"),
        "nothing to answer": ([], "no prompt to answer"),
        "unknown id": (["--prompt", "demo#nothing"], "no prompt with the id 'nothing'"),
        "missing file": (["--prompt", "/no/such.jsonl#1"], "/no/such.jsonl"),
    }
    for name, (args, names) in combinations.items():
        yield Case(f"generate: {name}", lambda _, args=args: ["generate", "--target", TARGET, *args], names)
    kept = {
        "missing": (lambda d: str(d / "r.jsonl"), "r.jsonl"),
        "empty": (lambda d: write(d / "r.jsonl", ""), "has no response"),
        "broken": (lambda d: write(d / "r.jsonl", "{\n"), "r.jsonl:1: the line is not JSON"),
        "half": (lambda d: write(d / "r.jsonl", '{"id": "a"}\n'), "r.jsonl:1: .*missing"),
        "no meta": (lambda d: kept_responses(d), "does not tell temperature"),
        "broken meta": (lambda d: kept_responses(d, "{"), "r.meta.json.*delete it"),
        "meta list": (lambda d: kept_responses(d, "[]"), "r.meta.json holds list"),
        "meta of another type": (lambda d: kept_responses(d, '{"temperature": "0"}'), "temperature is"),
        "spans outside": (lambda d: kept_responses(d, response_spans=[[0, 9]]), r"response_spans has \[0, 9\]"),
        "spans backwards": (lambda d: kept_responses(d, response_spans=[[2, 1]]), r"response_spans has \[2, 1\]"),
        "spans of three": (lambda d: kept_responses(d, response_spans=[[0, 1, 2]]), "response_spans"),
        "negative token": (lambda d: kept_responses(d, token_ids=[-1, 2, 3]), "token_ids has -1"),
        "text as tokens": (lambda d: kept_responses(d, token_ids="abc"), "token_ids is 'abc'"),
        "fraction as token": (lambda d: kept_responses(d, token_ids=[1, 2.5, 3]), "token_ids"),
        "id number": (lambda d: kept_responses(d, id=5), "id is 5"),
    }
    for name, (make, names) in kept.items():
        args = lambda d, m=make: [*check(d, "demo"), "--responses", m(d)]  # noqa: E731
        yield Case(f"responses of check: {name}", args, names)


def another(path: Path) -> str:
    return write(path / "results.json", "another's")


def kept_responses(path: Path, meta: str | None = None, **changes) -> str:
    row = {"id": "a", "set": "s", "messages": [], "token_ids": [1, 2, 3], "response_spans": [[1, 3]], **changes}
    if meta is not None:
        write(path / "r.meta.json", meta)
    return write(path / "r.jsonl", json.dumps(row) + "\n")


CASES = [*flag_cases(), *range_cases(), *objective_cases(), *recipe_cases(), *prompt_cases(), *path_cases()]
