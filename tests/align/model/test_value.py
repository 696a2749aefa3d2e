"""The network of a critic: whose weights it has, and which state the value at a token is of."""

from __future__ import annotations

from pathlib import Path

import torch

from align.model.policy import Policy
from align.model.value import ValueModel

IDS = torch.tensor([[5, 6, 7, 8, 9]])


def test_the_trunk_of_a_critic_has_the_weights_of_its_folder(model_folder: Path, policy: Policy) -> None:
    trunk = dict(ValueModel.load(model_folder).trunk.named_parameters())
    of_policy = dict(policy.model.model.named_parameters())
    assert trunk.keys() == of_policy.keys()
    assert all(torch.equal(trunk[name], of_policy[name]) for name in trunk)


@torch.no_grad()
def test_the_value_at_a_token_is_what_the_network_says_after_the_token_before(model_folder: Path) -> None:
    model = ValueModel.load(model_folder)
    model.head.weight.copy_(torch.linspace(-1, 1, model.head.in_features))
    values = model.values(IDS)
    assert values[0, 0] == 0, "token 0 is drawn in no state"
    for t in range(1, IDS.shape[1]):
        torch.testing.assert_close(values[0, t], model(IDS[:, :t])[0, -1])
