"""Drafters of several kinds that accept something, and their exports."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dpace.config import ExportConfig
from dpace.drafter import Drafter, load_drafter
from dpace.drafter.drafter import make_drafter as make_made
from dpace.publish.export import export
from dpace.target import Target
from dpace.training.loop import TrainingLoop
from dpace.training.run import check_recipe, make_datasets
from tests.support.files import change_config, changed_weights
from tests.support.models import EOS, decode_whole, make_drafter, make_recipe, make_with_selector

WINDOWS = {
    "windows": {"sliding_window": 8},
    "causal windows": {"sliding_window": 8, "causal": True},
    "mixed layers": {"sliding_window": 8, "full_layers": (1,)},
    "causal": {"causal": True},
}
SELECTOR = {"conv_kernel_size": 2, "selector": "candidate_selector", "selector_candidates": 4}
KINDS = {"random": {}, "trained": {}, "convolutions": {"conv_kernel_size": 2}, "selector": SELECTOR, **WINDOWS}
"""Options of each kind; all but the first have the weights of one training, in which there were none of them."""
LILICORR = {"lilicorr": {}, "lilicorr, convolutions": {"conv_kernel_size": 2}}
"""The same of drafters with LiLiCorr, all of random weights."""
MARKOV = ("markov", "markov, anchored")
"""Drafters with DSpark's head; as dpace trains them, and as DeepSpec does."""
LAYOUTS = ("anchored", "small", "own")
"""Layouts of others: 5 slots that give 5 draft tokens, a head for `TOKENS` only, and tables for all tokens."""
TOKENS = [*range(4, 39), 51, EOS, 0]
"""Of a small vocabulary, in no order, with all tokens of the prompts: those are drafted in any case."""
RECORD = {"confidence_temperature": 1.5, "tau": 2.5, "target": "a"}
"""What a training leaves in the config."""
MAX_NEW_TOKENS = 40
"""More than any response here has, so that no engine drafts less at the end."""
quiet = pytest.mark.filterwarnings("ignore:.*:FutureWarning", "ignore:.*:UserWarning")
"""For what transformers and peft warn of."""
Steps = list[tuple[list[int], int]]
"""Text and number of verifications of each prompt."""


def our_steps(target: Target, drafter: Drafter, prompts) -> Steps:
    done = decode_whole(target, drafter, prompts, max_new_tokens=MAX_NEW_TOKENS)
    return [(out.token_ids, len(out.widths)) for out in done]


def train_from_anchor(target: Target, drafter: Drafter, responses, checkpoints: Path) -> None:
    """Teach slot 0 to predict the token behind the anchor, as no verb does."""
    for values in (vars(drafter.config), drafter.config.dflash_config):
        values["sample_from_anchor"] = True
    recipe = make_recipe(max_steps=50)
    parts = make_datasets(target, responses, [], recipe)
    drafter.train().requires_grad_()
    TrainingLoop(drafter, target, *parts, recipe, weigh=check_recipe(recipe), checkpoints=checkpoints).run()


def small_head(target: Target, change: float = 0.0) -> dict[str, torch.Tensor]:
    """The target's rows for `TOKENS`, or others, as speculators and vLLM store them."""
    rows = target.head.weight[torch.tensor(TOKENS)]
    t2d = torch.zeros(64, dtype=torch.bool)
    t2d[TOKENS] = True
    d2t = torch.tensor(TOKENS) - torch.arange(len(TOKENS))
    return {"lm_head.weight": rows + change * torch.randn_like(rows), "d2t": d2t, "t2d": t2d}


def own_tables(target: Target, change: float = 0.02) -> dict[str, torch.Tensor]:
    """An embedding and a head for all tokens that differ from the target's so much."""
    tables = {"embed_tokens.weight": target.model.get_input_embeddings().weight, "lm_head.weight": target.head.weight}
    return {name: table + change * torch.randn_like(table) for name, table in tables.items()}


def with_tables(folder: Path, path: Path, tables: dict[str, torch.Tensor], **changes) -> Path:
    """A copy whose weights have further tensors."""
    change_config(shutil.copytree(folder, path), **changes)
    with changed_weights(path) as weights:
        weights.update(tables)
    return path


@pytest.fixture(scope="session")
def folders(language_drafter, language_target, language_responses, make_once) -> dict[str, Path]:
    """A drafter of each kind and layout, in fp32 and with values that 16 bits change."""

    def fill(made: Path) -> None:
        torch.manual_seed(0)
        anchored, markov = {"block_size": 5}, {"selector": "markov_head"}
        others = {"anchored": anchored, "markov": markov, "markov, anchored": anchored | markov}
        for kind, options in {**KINDS, **LILICORR, **others}.items():
            make = make_with_selector if kind in LILICORR else make_drafter
            drafter = make(language_target, **{"block_size": 6, **options}).requires_grad_(False)
            if kind != "random" and kind not in LILICORR:
                drafter.load_state_dict(language_drafter.state_dict(), strict=False)
            for name, parameter in drafter.named_parameters():
                parameter.mul_(1.001)
                if "successor" in name or "markov_w2" in name:
                    parameter.add_(torch.randn_like(parameter), alpha=0.2)
                if "_conv." in name:
                    parameter.add_(torch.randn_like(parameter), alpha=0.05)
            if kind == "anchored":
                train_from_anchor(language_target, drafter, language_responses[:50], made / "checkpoints")
            if kind == "markov, anchored":
                drafter.load_state_dict(Drafter.from_pretrained(made / "anchored").state_dict(), strict=False)
                spec = replace(drafter.spec, sample_from_anchor=True)
                drafter = make_made(spec, drafter.state_dict())
            drafter.config.dpace = RECORD
            drafter.save_pretrained(made / kind)
        small = small_head(language_target, 0.01)
        with_tables(made / "trained", made / "small", small, draft_vocab_size=len(TOKENS))
        with_tables(made / "trained", made / "own", own_tables(language_target))

    made = make_once("kinds", fill)
    return {kind: made / kind for kind in (*KINDS, *LILICORR, *MARKOV, *LAYOUTS)}


@pytest.fixture(scope="session")
def folder(folders) -> Path:
    return folders["trained"]


@pytest.fixture(scope="session")
def prompts(questions) -> list[list[int]]:
    return questions[:4]


@pytest.fixture(scope="session")
def expected(folders, language_target, prompts) -> dict[str, Steps]:
    """What our decoder does with each kind of drafter."""
    return {
        kind: our_steps(language_target, load_drafter(folders[kind], language_target), prompts)
        for kind in (*KINDS, *MARKOV, *LAYOUTS)
    }


@pytest.fixture
def do_export(language_target, folders, target_gguf, tmp_path) -> Callable[..., Path]:
    def run(to, kind="trained", folder=None, **options) -> Path:
        settings = {"drafter": "x", "output": str(tmp_path / to), "name": "tiny-dflash", "target": "some/target"}
        if to == "gguf":
            settings["target_gguf"] = str(target_gguf)
        return export(folder or folders[kind], language_target, ExportConfig(to=to, **settings | options))

    return run
