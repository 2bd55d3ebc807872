"""The target's hidden states on disk are those that it computes, whatever happens to the process or the files."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from safetensors.torch import save_file

from dpace.batches import feature_files
from dpace.batches.dataset import ResponseDataset
from dpace.batches.feature_files import FeatureFiles, keep_on_disk
from dpace.config import TrainConfig
from dpace.target import Target
from dpace.training.run import make_datasets
from tests.support.crash import kill, operations_of
from tests.support.models import make_recipe
from tests.support.stub_server import PAGES, StubServer, pages

LAYERS = [1, 3]


@pytest.fixture(autouse=True)
def small_files(monkeypatch):
    """Several files from few texts: one for each."""
    monkeypatch.setattr(feature_files, "SHARD_BYTES", 1)
    monkeypatch.setattr("dpace.batches.dataset.FEATURE_BATCH", 4)


@pytest.fixture
def keep(language_target, language_responses, tmp_path):
    """Keep the first texts on disk, and give the dataset."""

    def keep(count=10, with_head_input=False, **options):
        dataset = ResponseDataset(language_responses[:count], max_length=64, num_anchors=4, seed=0)
        config = TrainConfig(feature_files=str(tmp_path / "kept"), **options)
        keep_on_disk(language_target, dataset, LAYERS, config, with_head_input=with_head_input)
        return dataset

    return keep


@pytest.fixture
def no_target(monkeypatch):
    return lambda: monkeypatch.setattr(Target, "read_features", lambda *_, **__: pytest.fail("the target was asked"))


def computed(target, dataset, **options):
    texts = [dataset.token_ids(i)[None] for i in range(len(dataset))]
    return [target.read_features(text, LAYERS, **options).change(lambda values: values[0].float()) for text in texts]


def test_rows_are_those_of_the_target(keep, language_target):
    dataset = keep(with_head_input=True)
    for found, expected in zip(dataset.features, computed(language_target, dataset, with_head_input=True), strict=True):
        torch.testing.assert_close([*found], [*expected], rtol=1e-5, atol=1e-6)


def test_only_new_texts_are_computed(keep, no_target):
    keep(6)
    with mock.patch.object(Target, "read_features", autospec=True, side_effect=Target.read_features) as features:
        keep(10)
    assert sum(len(call.args[1]) for call in features.call_args_list) == 4
    no_target()
    assert len(keep(10).features) == 10 and len(keep(3).features) == 3


def test_training_reads_from_disk_and_validation_does_not(language_target, language_responses, tmp_path):
    recipe = make_recipe(feature_files=str(tmp_path))
    datasets = make_datasets(language_target, language_responses[:3], language_responses[50:52], recipe)
    assert [type(dataset.features) for dataset in datasets] == [FeatureFiles, list]


@pytest.mark.wide
def test_killed_it_goes_on(keep, language_target, tmp_path):
    folder = tmp_path / "kept"
    operations = operations_of(lambda: keep(6), folder)
    assert len(operations) > 6
    for at in range(1, len(operations), 2):
        shutil.rmtree(folder)
        kill(lambda: keep(6), folder, at)
        dataset = keep(6)
        torch.testing.assert_close([*dataset.features], computed(language_target, dataset), rtol=1e-4, atol=1e-5)
        assert not list(folder.rglob("*.unfinished/*"))  # an empty folder stays where all was written


def test_a_damaged_file_is_named(keep):
    dataset = keep()
    path = dataset.features.rows[dataset.features.names[0]]
    data = path.read_bytes()
    for cut in (data[:-3], data[:50], b""):
        path.write_bytes(cut)
        with pytest.raises(ValueError, match="delete it, and the same command computes its rows again"):
            keep()
    path.unlink()
    kept = keep().features
    assert len(list(kept)) == 10
    row = kept[0].layers.clone()  # the file is read where it lies, and is written over
    for spoil in (lambda rows: rows[:, 1:], lambda rows: rows * torch.nan):
        save_file({dataset.features.names[0]: spoil(row).contiguous()}, path)
        with pytest.raises(ValueError, match="expected finite ones of shape"):
            FeatureFiles(path.parent, kept.names, kept.lengths, kept.widths)[0]


def test_more_than_the_disk_has_is_refused_before_any_work(keep, no_target, monkeypatch):
    no_target()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    with pytest.raises(ValueError, match=r"need .* GiB, and 0.0 GiB are free"):
        keep()


class Vllm(StubServer):
    """A vLLM that writes hidden states, as its `ExampleHiddenStatesConnector` does; `fault` spoils what it gives."""

    def __init__(self, target: Target, folder: Path):
        super().__init__(pages(PAGES["vllm"]), self.answer)
        self.target, self.folder = target, folder
        self.fault = ""

    def answer(self, request):
        ids = torch.tensor(request.body["prompt"])
        below = self.fault == "other layers"
        with self.lock:
            rows = Target.features(self.target, ids[None], [i - below for i in LAYERS])[0]
        hidden = rows.unflatten(-1, (len(LAYERS), -1)).contiguous()
        tensors = {"hidden_states": hidden, "token_ids": ids}
        match self.fault:
            case "cut":
                tensors["hidden_states"] = hidden[1:]
            case "another text":
                tensors["token_ids"] = ids + 1
        path = self.folder / f"{id(request)}.safetensors"
        save_file(tensors, path)
        if self.fault == "torn":
            path.write_bytes(path.read_bytes()[:100])
        named = "/etc/passwd" if self.fault == "another file" else str(path)
        request.send({"kv_transfer_params": {"hidden_states_path": named}})


@pytest.fixture
def vllm(language_target, tmp_path):
    (tmp_path / "shared").mkdir()
    server = Vllm(language_target, tmp_path / "shared")
    yield server
    server.close()


def test_servers_give_the_same_rows(keep, vllm, language_target, monkeypatch):
    """Ranks wait for one another where the target reads, and not where servers do."""
    joined = mock.Mock()
    monkeypatch.setattr(Target, "join_features", joined)
    monkeypatch.setattr("dpace.system.ranks.num_short", lambda _: 1)
    dataset = keep(feature_servers=[vllm.url, vllm.url.replace("127.0.0.1", "localhost")])
    torch.testing.assert_close([*dataset.features], computed(language_target, dataset), rtol=1e-4, atol=1e-5)
    assert len(vllm.requests) == len(dataset) + 1 and not list(vllm.folder.iterdir())
    keep(feature_servers=[vllm.url])
    assert len(vllm.requests) == len(dataset) + 1 and joined.call_count == 0
    keep(2)
    assert joined.call_count == 1


@pytest.mark.parametrize(
    ("fault", "said"),
    {
        "cut": "wrote hidden states of the shape",
        "another text": "of another text",
        "torn": "cannot be read",
        "another file": "names no file of hidden states",
        "other layers": r"other hidden states .*eagle_aux_hidden_state_layer_ids \[2, 4\]",
    }.items(),
)
def test_what_a_server_does_wrong_is_one_line(fault, said, keep, vllm):
    vllm.fault = fault
    with pytest.raises(ValueError, match=said) as refused:
        keep(feature_servers=[vllm.url])
    assert "\n" not in str(refused.value)
