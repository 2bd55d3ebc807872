from contextlib import nullcontext
from unittest.mock import Mock

import pytest
import torch

from dpace.target import Target
from tests.support.models import make_target


def test_features_embedding_and_head_are_those_of_the_model(family, random_target):
    token_ids = torch.randint(4, 64, (2, 40))
    assert not any(parameter.requires_grad for parameter in random_target.model.parameters())
    with torch.no_grad():
        out = random_target.model(token_ids, output_hidden_states=True)
        hidden = random_target.hidden(token_ids)
    states = out.hidden_states
    features = random_target.features(token_ids, [1, 3])
    torch.testing.assert_close(features, torch.cat([states[2], states[4]], dim=-1))
    torch.testing.assert_close(random_target.embed(token_ids), states[0], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(random_target.head.logits(hidden), out.logits, rtol=1e-3, atol=1e-4)
    assert (random_target.embed_scale != 1) == family.startswith("gemma")
    assert (random_target.head.softcap is not None) == (family == "gemma2")


def test_layers_above_and_the_head_do_not_run(random_target):
    ran = Mock(return_value=None)
    for module in (random_target.layers[4], random_target.model.get_output_embeddings()):
        module.register_forward_hook(ran)
    random_target.features(torch.randint(4, 64, (1, 8)), [0, 3])
    assert ran.call_count == 0
    random_target.model(torch.randint(4, 64, (1, 8)))
    assert ran.call_count == 2


@pytest.mark.parametrize("precision", ["highest", "high"])
def test_rounded_products_are_accepted_where_torch_is_told_to_round(precision):
    model = make_target("qwen3").model
    model.get_output_embeddings().register_forward_hook(lambda _m, _args, logits: logits.bfloat16().float())
    torch.set_float32_matmul_precision(precision)
    try:
        with pytest.raises(ValueError, match="scaled table") if precision == "highest" else nullcontext():
            Target(model)
    finally:
        torch.set_float32_matmul_precision("highest")
