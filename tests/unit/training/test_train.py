"""A training learns, every option counts, and what is measured is what is written."""

from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.utils import get_total_norm

from dpace.batches.dataset import ResponseDataset
from dpace.config import LossConfig, TrainConfig
from dpace.decode.loop import generate
from dpace.drafter import Drafter, load_drafter
from dpace.loss import block_loss
from dpace.measure import heldout
from dpace.measure.heldout import heldout_acceptance
from dpace.measure.results import read_log
from dpace.metrics import Acceptance
from dpace.training.finish import measure_and_calibrate
from dpace.training.loop import TrainingLoop, num_steps, read_ahead, score_blocks
from dpace.training.progress import open_trackers
from dpace.training.run import keep_features, make_datasets, train
from tests.support.files import read_json
from tests.support.models import make_recipe


def short(drafter=None, **changes):
    """A recipe of a few steps."""
    return make_recipe(drafter, **{"max_steps": 3, "eval_steps": 3, "logging_steps": 1, "num_anchors": 4, **changes})


def weights_of(drafter):
    return torch.cat([p.detach().flatten() for p in drafter.parameters()])


def run_recipe(target, responses, heldout, recipe, folder, **options):
    return train(target, *make_datasets(target, responses, heldout, recipe), recipe, folder, **options)


@pytest.fixture
def run(language_target, language_responses):
    """Train on a few answers."""

    def run(recipe, folder, heldout=slice(50, 52), **options):
        parts = language_responses[:21], language_responses[heldout]
        return run_recipe(language_target, *parts, recipe, folder, **options)

    return run


def measured(responses):
    return ResponseDataset(responses, max_length=64, num_anchors=None, seed=0)


def weigh_at_random(slots):
    return torch.rand(slots.is_scored.shape)


def test_a_resumed_run_ends_with_the_same_weights_and_log(run, tmp_path, monkeypatch):
    """Also with an objective that draws, and with blocks that grow."""
    train = {"max_steps": 8, "eval_steps": 3, "batch_size": 4}
    recipe = short({"block_size": 8}, **train, optimizer="muon", grow_blocks=True)
    take_step = TrainingLoop.take_step
    steps = []

    def watched(self, batches):
        steps.append(self.state.global_step)
        if len(steps) == 6:
            raise KeyboardInterrupt
        take_step(self, batches)

    whole = run(recipe, tmp_path / "whole", weigh=weigh_at_random)
    monkeypatch.setattr(TrainingLoop, "take_step", watched)
    with pytest.raises(KeyboardInterrupt):
        run(recipe, tmp_path / "resumed", weigh=weigh_at_random)
    resumed = run(recipe, tmp_path / "resumed", weigh=weigh_at_random)
    assert steps == [0, 1, 2, 3, 4, 5, 3, 4, 5, 6, 7]
    assert torch.equal(weights_of(resumed), weights_of(whole))
    logs = [[entry | {"step_seconds": 0} for entry in read_log(tmp_path / name)] for name in ("whole", "resumed")]
    assert logs[0] == logs[1]


def test_checkpoints_apart_from_measurements(run, tmp_path, monkeypatch):
    """The best weights are kept at every measurement; a run that is killed and moved goes on from the newest."""
    recipe = short(max_steps=8, eval_steps=1, save_steps=3, batch_size=4)
    save = TrainingLoop.save
    steps = []
    taus = iter([5.0, 1.0, 2.0, 3.0, 6.0, *[2.0] * 5])

    def interrupted(self):
        steps.append(self.state.global_step)
        if steps == [1, 3, 5]:
            raise KeyboardInterrupt
        save(self)

    def kept(folder):
        return {path.name for path in (folder / "checkpoints").iterdir()}

    monkeypatch.setattr(TrainingLoop, "save", interrupted)
    measure = "dpace.training.loop.heldout_acceptance"
    monkeypatch.setattr(measure, lambda *_, **__: SimpleNamespace(tau=next(taus), bounds=()))
    with pytest.raises(KeyboardInterrupt):
        run(recipe, tmp_path / "d")
    assert kept(tmp_path / "d") == {"checkpoint-1", "checkpoint-3"}
    moved = (tmp_path / "d").rename(tmp_path / "moved")
    written = run(recipe, moved)
    assert steps == [1, 3, 5, 6, 8] and kept(moved) == {"checkpoint-1", "checkpoint-8"}
    best = Drafter.from_pretrained(moved / "checkpoints" / "checkpoint-1")
    assert torch.equal(weights_of(written), weights_of(best).bfloat16().float()), "of step 1, whose tau is the best"


def test_heldout_acceptance_is_that_of_decoding(language_target, language_drafter, language_responses, monkeypatch):
    """What is measured in training is what decoding accepts, also in parts, and from features that are kept."""
    data = measured(language_responses[50:])
    whole = heldout_acceptance(language_drafter, language_target, data)
    decoded = []
    for response in language_responses[50:]:
        ((start, end),) = response.response_spans
        generation = generate(
            language_target, language_drafter, response.token_ids[:start], max_new_tokens=end - start, width="full"
        )
        assert generation.token_ids == response.token_ids[start:end]
        decoded.append(generation.acceptance)
    assert whole.rows.tolist() == Acceptance.of_prompts(decoded).rows.tolist()
    monkeypatch.setattr(heldout, "SCORED_BLOCKS", 3)
    data.keep_features(language_target, language_drafter.target_layer_ids, limit_bytes=2.0**30)
    assert data.features is not None
    assert heldout_acceptance(language_drafter, language_target, data).rows.tolist() == whole.rows.tolist()


def test_what_is_measured_is_what_is_written(run, language_target, language_responses, tmp_path):
    """In 16 bits, half the size of a checkpoint; tau and the temperature are those of the folder as it is loaded."""
    written = run(short(), tmp_path, slice(50, None))
    exact = load_file(tmp_path / "checkpoints" / "checkpoint-3" / "model.safetensors")
    rounded = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(rounded[name], tensor.bfloat16()) for name, tensor in exact.items())
    config = read_json(tmp_path / "config.json")
    assert config["dtype"] == "bfloat16" and config["dpace"]["dtype"] == "float32"
    loaded, data = load_drafter(tmp_path, language_target), measured(language_responses[50:])
    assert torch.equal(weights_of(loaded), weights_of(written))
    ((acceptance, temperature),) = measure_and_calibrate(loaded, language_target, data, [None])
    assert acceptance.tau == heldout_acceptance(loaded, language_target, data).tau
    expected = {"tau": acceptance.tau, "tau_interval": [*acceptance.interval()], "confidence_temperature": temperature}
    assert config["dpace"].items() >= expected.items()
    log = read_log(tmp_path)
    assert sum(log[0][f"weight_share/{k}"] for k in range(1, 6)) == pytest.approx(1) and "slot_accuracy/1" in log[0]
    assert [entry["step"] for entry in log if "eval_tau" in entry] == [3]


def test_features_of_other_layers_are_computed_anew(language_target, language_responses):
    """Datasets that one recipe made are passed on with another."""
    recipe = replace(short(), loss=LossConfig(token_loss="kl"))
    datasets = make_datasets(language_target, language_responses[:3], language_responses[50:52], recipe)
    kept = datasets[0].features
    keep_features(language_target, *datasets, short())
    assert datasets[0].features is kept, "what these layers' features have more does not count"
    other = replace(recipe, drafter=replace(recipe.drafter, num_features=1))
    keep_features(language_target, *datasets, other)
    ids = Drafter.layer_ids(language_target, other.drafter)
    assert [(data.kept_layer_ids, data.has_head_input) for data in datasets] == [(ids, True), (ids, False)]
    assert [part.shape[1] for part in datasets[0].features[0]] == [48, 48]
    assert datasets[1].features[0].head_input is None
    keep_features(language_target, *datasets, replace(recipe, train=replace(recipe.train, feature_cache_gib=0.0)))
    assert [data.features for data in datasets] == [None, None]


def test_each_option_changes_the_weights_of_two_steps(make_loop):
    """Those that no golden case has."""

    def train_with(norm_scale=1.0, **options):
        loop = make_loop(short({"norm_scale": norm_scale}, batch_size=4, **options))
        for _, batches in zip(range(2), loop.batches_of_steps(), strict=False):
            loop.take_step(batches)
        return weights_of(loop.drafter)

    usual = train_with()
    others = {"weight_decay": 0.5, "max_grad_norm": 1e-3, "group_by_length": False, "products": "bfloat16"}
    for option, value in {**others, "max_length": 20, "seed": 7, "norm_scale": 0.5}.items():
        assert not torch.equal(train_with(**{option: value}), usual), option


def test_batches_that_are_read_ahead_are_the_same(make_loop):
    """Over two epochs, with blocks that grow; and an error arrives."""

    def train_with(read):
        loop = make_loop(make_recipe(max_steps=8, num_anchors=4, batch_size=4, grow_blocks=True))
        assert loop.steps_per_epoch < 8
        for batches in read(loop.batches_of_steps()):
            loop.take_step(batches)
        return weights_of(loop.drafter)

    assert torch.equal(train_with(read_ahead), train_with(iter))
    steps = read_ahead(1 / (2 - number) for number in range(3))
    assert [next(steps), next(steps)] == [0.5, 1.0]
    with pytest.raises(ZeroDivisionError):
        next(steps)


def test_the_gradient_is_that_of_the_mean_loss(make_loop):
    loop = make_loop(short(batch_size=3, max_grad_norm=0.0))
    (batch,) = next(loop.batches_of_steps())
    out, blocks = score_blocks(loop.trained, loop.scorer, loop.send(batch), forward=loop.forward)
    loss, num_items = block_loss(out.losses, blocks.is_scored, out.weights)
    loss = loss / num_items
    expected = get_total_norm(torch.autograd.grad(loss, list(loop.drafter.parameters())))
    loop.take_step([batch])
    entry = loop.log.entry(loop.accelerator)
    right = out.is_match[..., 2][blocks.is_scored[..., 2]].float().mean()
    assert entry["slot_accuracy/2"] == pytest.approx(right.item())
    assert (entry["loss"], entry["grad_norm"]) == pytest.approx((loss.item(), expected.item()), rel=1e-4)


def test_nothing_to_train_on_and_a_used_mask_token_are_refused(language_target, language_responses, tmp_path):
    one = language_responses[0]
    for changes, message in (
        ({"response_spans": []}, "nothing to train on"),
        ({"token_ids": [3, *one.token_ids[1:]]}, "contains the mask token 3"),
    ):
        with pytest.raises(ValueError, match=message):
            run_recipe(language_target, [replace(one, **changes)], [], short(), tmp_path)


def test_trackers_get_the_log_and_one_that_fails_is_left_out(run, tmp_path, monkeypatch, capsys):
    good, failing = (mock.Mock(requires_logging_directory=False) for _ in range(2))
    failing.return_value.log.side_effect = KeyError("no key")
    monkeypatch.setattr("dpace.training.progress.LOGGER_TYPE_TO_CLASS", {"wandb": good, "trackio": failing})
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    run(short(report_to=("trackio", "wandb")), tmp_path, slice(0))
    log = read_log(tmp_path)
    assert [entry["step"] for entry in log] == [1, 2, 3]  # without validation, tau is not measured
    tracker = good.return_value
    assert tracker.log.call_args_list == [mock.call(entry, step=entry["step"]) for entry in log]
    assert good.call_args == mock.call("mine")
    tracker.start.assert_called_once_with()
    tracker.finish.assert_called_once_with()
    assert capsys.readouterr().err.count("the tracker trackio failed ('no key'); the training goes on") == 1
    with open_trackers(short(report_to=("wandb",), feature_servers=("http://a:1",))):
        (settings,) = tracker.store_init_configuration.call_args.args
    assert settings["train.feature_servers"] == "('http://a:1',)" and settings["train.max_steps"] == 3


def test_steps_follow_from_epochs_and_ranks():
    """As the paper's: 100,000 conversations, two in a step, six times."""
    paper = TrainConfig(num_epochs=6, batch_size=2)
    assert num_steps(paper, 100_000) == 300_000
    assert num_steps(replace(paper, num_epochs=1.5, gradient_accumulation_steps=3), 13, num_ranks=2) == 3
    assert num_steps(replace(paper, max_steps=7), 100_000) == 7
