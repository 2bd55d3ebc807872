import itertools
from dataclasses import replace
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from accelerate.tracking import GeneralTracker
from safetensors.torch import load_file

from dpace.batches.dataset import ResponseDataset
from dpace.config import LossConfig
from dpace.decode.loop import generate
from dpace.drafter import Drafter, load_drafter
from dpace.measure import heldout
from dpace.measure.heldout import heldout_acceptance
from dpace.measure.results import read_log
from dpace.metrics import Acceptance
from dpace.target.target import HEAD_INPUT
from dpace.train.finish import measure_and_calibrate
from dpace.train.loop import TrainingLoop
from dpace.train.progress import open_trackers
from dpace.train.run import keep_features, make_datasets, train
from tests.conftest import LANGUAGE_RECIPE, make_drafter, make_recipe
from tests.support.files import read_json


def short(**changes):
    """A recipe of a few steps; blocks that grow have 8 slots in the end."""
    drafter = replace(LANGUAGE_RECIPE.drafter, block_size=8 if changes.get("grow_blocks") else 6)
    recipe = make_recipe(**{"max_steps": 3, "eval_steps": 3, "logging_steps": 1, "num_anchors": 4, **changes})
    return replace(recipe, drafter=drafter)


def weights_of(drafter):
    return torch.cat([p.detach().flatten() for p in drafter.parameters()])


def weigh_at_random(slots):
    return torch.rand(slots.is_scored.shape)


def run_recipe(target, responses, heldout, recipe, folder, **options):
    return train(target, *make_datasets(target, responses, heldout, recipe), recipe, folder, **options)


def measured(responses):
    return ResponseDataset(responses, max_length=64, num_anchors=None, seed=0)


def run(target, responses, folder, weigh=None, **changes):
    """Train, and give the weights of the best step before they were rounded."""
    run_recipe(target, responses[:21], responses[50:52], short(**changes), folder, weigh=weigh)
    step = read_json(folder / "trainer_state.json")["best_global_step"]
    return weights_of(Drafter.from_pretrained(folder / "checkpoints" / f"checkpoint-{step}"))


@pytest.mark.parametrize(
    ("optimizer", "grow_blocks", "weigh"), [("muon", False, weigh_at_random), ("adamw", True, None)]
)
def test_a_resumed_run_ends_with_the_same_weights(
    optimizer, grow_blocks, weigh, language_target, language_responses, tmp_path, monkeypatch
):
    """And with the same log; also with an objective that draws."""
    changes = {"max_steps": 8, "eval_steps": 3, "batch_size": 4, "optimizer": optimizer, "grow_blocks": grow_blocks}
    changes |= {"logging_steps": 4}  # the checkpoint stands between two entries
    whole = run(language_target, language_responses, tmp_path / "whole", weigh, **changes)
    take_step, steps = TrainingLoop.take_step, []

    def watched(self, batches):
        steps.append(self.state.global_step)
        if len(steps) == 6:
            raise KeyboardInterrupt
        take_step(self, batches)

    monkeypatch.setattr(TrainingLoop, "take_step", watched)
    with pytest.raises(KeyboardInterrupt):
        run(language_target, language_responses, tmp_path / "resumed", weigh, **changes)
    resumed = run(language_target, language_responses, tmp_path / "resumed", weigh, **changes)
    assert steps == [0, 1, 2, 3, 4, 5, 3, 4, 5, 6, 7]
    assert torch.equal(resumed, whole)
    logs = [read_log(tmp_path / name) for name in ("whole", "resumed")]
    for entry in itertools.chain(*logs):
        entry.pop("step_seconds", None)
        entry.pop("tokens_per_second", None)
    assert logs[0] == logs[1]


def test_checkpoints_apart_from_measurements(language_target, language_responses, tmp_path, monkeypatch):
    """The best weights are kept at every measurement; a run that is killed and moved goes on from the newest."""
    changes = {"max_steps": 8, "eval_steps": 1, "save_steps": 3, "batch_size": 4, "learning_rate": 1e-3}
    run(language_target, language_responses, tmp_path / "whole", **changes)
    state = read_json(tmp_path / "whole" / "trainer_state.json")
    kept = {p.name for p in (tmp_path / "whole" / "checkpoints").iterdir()}
    assert kept == {"checkpoint-8", f"checkpoint-{state['best_global_step']}"}
    save, steps = TrainingLoop.save, []
    taus = iter([5.0, 1.0, 2.0, 3.0, 6.0])

    def interrupted(self):
        steps.append(self.state.global_step)
        if steps[-1] == 5:
            raise KeyboardInterrupt
        save(self)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingLoop, "save", interrupted)
        patch.setattr(
            "dpace.train.loop.heldout_acceptance",
            lambda *_, **__: SimpleNamespace(tau=next(taus), interval=lambda: (0.0, 9.0), bounds=()),
        )
        with pytest.raises(KeyboardInterrupt):
            run(language_target, language_responses, tmp_path / "resumed", **changes)
    folders = {p.name for p in (tmp_path / "resumed" / "checkpoints").iterdir()}
    assert steps == [1, 3, 5] and folders == {"checkpoint-1", "checkpoint-3"}
    monkeypatch.setattr(TrainingLoop, "save", lambda self: steps.append(self.state.global_step) or save(self))
    moved = (tmp_path / "resumed").rename(tmp_path / "moved")
    best = run(language_target, language_responses, moved, **changes)
    assert steps[3] > 3 and not [p for p in moved.rglob("*.unfinished")]
    written = weights_of(Drafter.from_pretrained(moved))
    assert torch.equal(written, best.bfloat16()), "of step 1, whose tau of 5 stays the best"
    assert {p.name for p in (moved / "checkpoints").iterdir()} == {"checkpoint-1", "checkpoint-8"}


def test_training_learns(language_target, language_drafter, language_responses):
    acceptance = heldout_acceptance(language_drafter, language_target, measured(language_responses[50:]))
    assert acceptance.tau > 2.0
    untrained = make_drafter(language_target, block_size=6, mask_token_id=3)
    assert heldout_acceptance(untrained, language_target, measured(language_responses[50:])).tau < 1.5


def test_heldout_acceptance_is_that_of_decoding(language_target, language_drafter, language_responses):
    """What is measured in training is what decoding accepts, response by response."""
    responses = language_responses[50:]
    in_training = heldout_acceptance(language_drafter, language_target, measured(responses))
    decoded = []
    for response in responses:
        ((start, end),) = response.response_spans
        generation = generate(
            language_target, language_drafter, response.token_ids[:start], max_new_tokens=end - start, width="full"
        )
        assert generation.token_ids == response.token_ids[start:end]
        decoded.append(generation.acceptance)
    together = Acceptance.of_prompts(decoded)
    assert in_training.rows.tolist() == together.rows.tolist()
    assert in_training.tau == together.tau


def test_what_is_measured_is_what_is_written(language_target, language_responses, tmp_path):
    """In 16 bits, half the size of a checkpoint; tau and the temperature are those of the folder as it is loaded."""
    written = run_recipe(language_target, language_responses[:21], language_responses[50:], short(), tmp_path)
    checkpoint = tmp_path / "checkpoints" / "checkpoint-3" / "model.safetensors"
    exact, rounded = load_file(checkpoint), load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(rounded[name], tensor.bfloat16()) for name, tensor in exact.items())
    assert {tensor.dtype for tensor in exact.values()} == {torch.float32}
    num_bytes = [sum(tensor.nbytes for tensor in tensors.values()) for tensors in (exact, rounded)]
    assert num_bytes[0] == 2 * num_bytes[1] > 1.9 * (tmp_path / "model.safetensors").stat().st_size
    config = read_json(tmp_path / "config.json")
    assert config["dtype"] == "bfloat16" and config["dpace"]["dtype"] == "float32"
    loaded, data = load_drafter(tmp_path, language_target), measured(language_responses[50:])
    assert torch.equal(weights_of(loaded), weights_of(written)) and loaded.dtype == torch.float32
    ((acceptance, temperature),) = measure_and_calibrate(loaded, language_target, data, [None])
    assert acceptance.tau == heldout_acceptance(loaded, language_target, data).tau
    assert config["dpace"]["tau"] == acceptance.tau and config["dpace"]["tau_interval"] == [*acceptance.interval()]
    assert config["dpace"]["confidence_temperature"] == temperature
    entry = read_log(tmp_path)[0]
    assert sum(entry[f"weight_share/{k}"] for k in range(1, 6)) == pytest.approx(1) and "slot_accuracy/1" in entry
    again = run_recipe(language_target, language_responses[:21], language_responses[50:], short(), tmp_path)
    assert torch.equal(weights_of(again), weights_of(written)) and again.dtype == torch.float32


def test_a_long_text_is_measured_in_parts(language_target, language_drafter, language_responses, monkeypatch):
    """The same accepted lengths however many blocks are drafted at once, from features kept or computed."""
    data = measured(language_responses[50:54])
    whole = heldout_acceptance(language_drafter, language_target, data)
    monkeypatch.setattr(heldout, "SCORED_BLOCKS", 3)
    assert heldout_acceptance(language_drafter, language_target, data).rows.tolist() == whole.rows.tolist()
    data.keep_features(language_target, language_drafter.target_layer_ids, limit_bytes=2.0**30)
    assert data.features is not None
    assert heldout_acceptance(language_drafter, language_target, data).rows.tolist() == whole.rows.tolist()


def test_features_of_other_layers_are_computed_anew(language_target, language_responses, tmp_path):
    """Datasets that one recipe made are passed on with another."""
    recipe = replace(make_recipe(), loss=LossConfig(token_loss="kl"))
    other = replace(recipe, drafter=replace(recipe.drafter, num_features=1))
    assert recipe.drafter.num_features == 2
    datasets = make_datasets(language_target, language_responses[:3], language_responses[50:52], recipe)
    kept = datasets[0].features
    keep_features(language_target, *datasets, make_recipe())
    assert datasets[0].features is kept, "what these layers' features have more does not count"
    for asked in (other, recipe):
        keep_features(language_target, *datasets, asked)
        ids = Drafter.layer_ids(language_target, asked.drafter)
        for data, is_trained_on in zip(datasets, (True, False), strict=True):
            text = data.token_ids(0)[None]
            expected = language_target.features(text, ids + [HEAD_INPUT] * is_trained_on)[0]
            torch.testing.assert_close(data.features[0], expected, rtol=1e-4, atol=1e-4)
    no_room = replace(other, train=replace(other.train, feature_cache_gib=0.0))
    keep_features(language_target, *datasets, no_room)
    assert [data.features for data in datasets] == [None, None]
    keep_features(language_target, *datasets, recipe)
    train(language_target, *datasets, replace(other, train=replace(other.train, max_steps=1)), tmp_path)
    ids = Drafter.layer_ids(language_target, other.drafter)
    assert not any(data.lacks(ids) for data in datasets)


def weigh_next_to_nothing(slots):
    return 1e-9 * slots.token_probs


def test_weights_near_zero_are_told_once(language_target, language_responses, tmp_path, capsys):
    run(language_target, language_responses, tmp_path / "a", weigh_next_to_nothing)
    assert capsys.readouterr().err.count("the objective gives all slots weights near 0 (") == 1
    run(language_target, language_responses, tmp_path / "b")
    assert "near 0" not in capsys.readouterr().err


EACH = {
    "loss.objective": "uniform",
    "loss.token_loss": "kl",
    "loss.alpha": 0.1,
    "loss.alpha_end": 0.1,
    "loss.reduction": "batch",
    "loss.vocabulary": "seen",
    "train.learning_rate": 1e-3,
    "train.warmup_ratio": 1.0,
    "train.weight_decay": 0.5,
    "train.max_grad_norm": 1e-3,
    "train.group_by_length": False,
    "train.num_anchors": 3,
    "train.max_length": 20,
    "train.seed": 7,
    "train.optimizer": "muon",
    "train.products": "bfloat16",
    "train.grow_blocks": True,
    "drafter.norm_scale": 0.5,
    "drafter.causal": True,
}
"""Another value of each option that changes results."""


def trace(target, responses, recipe, folder):
    """What a training logs, and its weights; every third answer has one anchor, so that reductions differ."""
    answers = [
        replace(response, response_spans=[[start, start + 2]]) if number % 3 == 0 else response
        for number, response in enumerate(responses[:21])
        for start, _ in response.response_spans
    ]
    weights = weights_of(run_recipe(target, answers, [], recipe, folder))
    return [[entry.get(name) for name in ("loss", "nll", "grad_norm")] for entry in read_log(folder)], weights


@pytest.fixture(scope="module")
def usual(language_target, language_responses, tmp_path_factory):
    return trace(language_target, language_responses, of_eight_slots(), tmp_path_factory.mktemp("usual"))


def of_eight_slots():
    recipe = short(batch_size=4)
    return replace(recipe, drafter=replace(recipe.drafter, block_size=8, num_layers=1))


@pytest.mark.parametrize("option", EACH)
def test_each_option_changes_the_training(option, usual, language_target, language_responses, tmp_path):
    group, name = option.split(".")
    recipe = of_eight_slots()
    recipe = replace(recipe, **{group: replace(getattr(recipe, group), **{name: EACH[option]})})
    log, weights = trace(language_target, language_responses, recipe, tmp_path)
    assert log != usual[0]
    assert not torch.equal(weights, usual[1])


def test_the_last_step_is_measured_and_can_be_kept(language_target, language_responses, tmp_path):
    """Also where it is no multiple of eval_steps; without validation responses the last drafter is kept."""
    run(language_target, language_responses, tmp_path / "a", max_steps=3, eval_steps=2)
    assert [entry["step"] for entry in read_log(tmp_path / "a") if "eval_tau" in entry] == [2, 3]
    run_recipe(language_target, language_responses[:8], [], short(max_steps=3), tmp_path / "b")
    log = read_log(tmp_path / "b")
    assert log[-1]["step"] == 3 and not any("eval_tau" in entry for entry in log)


def test_nothing_to_train_on_and_a_used_mask_token_are_refused(language_target, language_responses, tmp_path):
    empty = [replace(language_responses[0], response_spans=[])]
    with pytest.raises(ValueError, match="nothing to train on"):
        run_recipe(language_target, empty, language_responses[50:52], short(), tmp_path)
    spoilt = [replace(language_responses[0], token_ids=[3, *language_responses[0].token_ids[1:]])]
    with pytest.raises(ValueError, match="contains the mask token 3"):
        run_recipe(language_target, spoilt, language_responses[50:52], short(), tmp_path)


def test_trackers_get_the_log_and_one_that_fails_is_left_out(
    language_target, language_responses, tmp_path, monkeypatch, capsys
):
    class Kept(GeneralTracker):
        name, requires_logging_directory, tracker = "wandb", False, None
        entries: ClassVar[list] = []
        servers: ClassVar[list] = []

        def __init__(self, project):
            self.entries.append(project)

        def store_init_configuration(self, values):
            self.entries.append(values["train.max_steps"])
            self.servers.append(values["train.feature_servers"])

        def log(self, values, step=None, **_):
            self.entries.append((step, sorted(values)))

    class Failing(Kept):
        def log(self, values, step=None, **_):
            raise KeyError("no key")

    classes = {"wandb": Kept, "trackio": Failing}
    monkeypatch.setattr("dpace.train.progress.LOGGER_TYPE_TO_CLASS", classes)
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    run(language_target, language_responses, tmp_path, report_to=("trackio", "wandb"))
    log = read_log(tmp_path)
    assert [entry["step"] for entry in log] == [1, 2, 3, 3]
    expected = [(entry["step"], sorted(set(entry) - {"step"})) for entry in log]
    assert Kept.entries == ["dpace", 3, "mine", 3, *expected]
    assert capsys.readouterr().err.count("the tracker trackio failed ('no key'); the training goes on") == 1
    with open_trackers(short(report_to=("wandb",), feature_servers=("http://ann:secret@a:1",))):
        assert Kept.servers[-1] == "['http://a:1']"
