r"""lm-eval gives a target the same score with a drafter as without; skipped where lm-eval is not installed.

pip install lm-eval==0.4.13
pytest -m slow tests/integration/test_lm_eval.py
"""

from unittest.mock import Mock

import pytest
import yaml

from dpace.decode import custom_generate
from tests.support.files import write_rows


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of lm-eval and what it imports
def test_the_scores_are_equal(language_target, language_drafter, language_prompts, tmp_path):
    """By its `gen_kwargs`, which go on to transformers' `generate`."""
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    task = {
        "task": "language",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["w9"], "max_gen_toks": 16, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    (tmp_path / "language.yaml").write_text(yaml.safe_dump(task))
    prompts = language_prompts[50:58]

    def evaluate(answers: list[str], **options) -> tuple[float, list[str]]:
        rows = [{"prompt": prompt, "answer": answer} for prompt, answer in zip(prompts, answers, strict=True)]
        write_rows(tmp_path / "rows.jsonl", rows)
        model = HFLM(pretrained=language_target.model, tokenizer=language_target.tokenizer, batch_size=1)
        tasks = TaskManager(include_path=str(tmp_path), include_defaults=False)
        done = lm_eval.simple_evaluate(model, tasks=["language"], task_manager=tasks, bootstrap_iters=0, **options)
        texts = [sample["filtered_resps"][0] for sample in done["samples"]["language"]]
        return done["results"]["language"]["exact_match,none"], texts

    _, texts = evaluate(["?"] * 8)
    answers = [*texts[:5], "?", "?", "?"]
    plain = evaluate(answers)
    decode = Mock(wraps=custom_generate(language_target, language_drafter))
    assert plain == (0.625, texts) == evaluate(answers, gen_kwargs={"custom_generate": lambda *a, **k: decode(*a, **k)})
    assert decode.call_count == len(prompts)
