"""The command line: `dpace VERB [recipe.yaml] [--group.field value]`."""

import importlib
import os
import sys

VERBS = {
    "demo": "train a drafter for a real LLM on this machine and show what it gains",
    "respond": "let the target answer the prompts",
    "train": "train a drafter on the responses",
    "compare": "train with several objectives and seeds, and say which objective is best",
    "bench": "measure drafters against the baseline (no drafter) on held-out prompts",
    "report": "write one HTML page from the folders that other verbs wrote",
    "check": "prove that a drafter does not change the text",
    "doctor": "say what would go wrong when a drafter is served",
    "generate": "answer one prompt, or chat",
    "export": "write a drafter for vLLM, SGLang, llama.cpp, transformers or speculators",
    "import": "read a drafter that another project trained, and write it for dpace",
}
"""One line of help for each verb; `dpace.verbs` has a file for each."""

USAGE = "\n".join(
    [
        "usage: dpace VERB [recipe.yaml] [--group.field value ...]",
        "",
        *(f"  {verb:<9} {text}" for verb, text in VERBS.items()),
        "",
        "A recipe is a YAML file of options; command-line flags override it. `dpace VERB --help` lists the options.",
        "",
    ]
)


def main(argv: list[str] | None = None) -> int:
    """Run a verb.

    Returns:
        0 for success, 1 for a failure whose reason was printed, 2 for wrong usage, 130 after Ctrl-C.
    """
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] not in VERBS:
        is_help = bool(argv) and argv[0] in ("-h", "--help")
        print(
            USAGE if is_help or not argv else f"unknown verb {argv[0]!r}; choose one of those below\n\n{USAGE}",
            file=sys.stdout if is_help else sys.stderr,
        )
        return 0 if is_help else 2
    verb = argv[0]
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    module = importlib.import_module(f"dpace.verbs.{'import_' if verb == 'import' else verb}")  # `import` is a keyword
    try:
        module.run(argv[1:])
    except (ValueError, OSError) as error:
        print(f"dpace {verb}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\ninterrupted; finished work is kept: run the same `dpace {verb}` command to continue", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
