"""Recipes that come with dpace, whose names stand for their files on the command line, and the verbs."""

from pathlib import Path

RECIPES = {path.stem: path for path in sorted(Path(__file__).parent.glob("*.yaml"))}
"""File of each recipe, by name."""
TARGETS = Path(__file__).with_name("targets")
"""Folder with the sizes of the recipes' targets, each in a folder of its name, from its `config.json` on the Hub."""
MAIN_VERBS = {
    "demo": "train a drafter for a real LLM on this machine, and show its gain",
    "respond": "let the target answer the prompts",
    "train": "train a drafter on the responses",
    "bench": "measure drafters against no drafter, on held-out prompts",
    "generate": "answer one prompt, or chat",
    "serve": "answer over HTTP, as OpenAI's API does",
    "export": "write a drafter for vLLM, SGLang, llama.cpp and other engines",
}
"""One line of help for each verb on the way from prompts to a served drafter, in its order."""
VERBS = MAIN_VERBS | {
    "prompts": "let the target write prompts, where you have none",
    "plan": "say what a recipe takes: data, memory by part, disk, steps and time",
    "compare": "train with several objectives and seeds, and say which is best",
    "report": "write one HTML page from the folders that other verbs wrote",
    "check": "prove that a drafter does not change the text",
    "doctor": "say what would go wrong when a drafter is served",
    "import": "read a drafter that another project trained, and write it for dpace",
}
"""One line of help for each verb; `dpace.verbs` has a file for each."""
OF_RECIPES = ("plan", "respond", "train", "compare", "bench")
"""Verbs that take a recipe."""
OF_FOLDERS = ("report", "doctor", "export", "import")
"""Verbs whose folder may stand first."""
