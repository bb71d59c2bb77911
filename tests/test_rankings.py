"""Rankings of parts that look at no data: shaped like EAP's, so that eap.plan and surgery take them."""

import pytest
import torch
from families import make

from lib.pruners import components, eap, rankings
from lib.pruners.surgery import Plan, remove


@pytest.mark.parametrize("name", rankings.PARTS)
@pytest.mark.parametrize("family", ["vit", "layerscale", "qk norm", "scaled norms"])
def test_there_is_a_score_for_each_part_that_is_there(name, family):
    vit = make(family)
    if family != "scaled norms":
        vit = remove(vit, Plan(heads=[[0], [], [0, 2]], neurons=[[0, 1], None, []]))
    scores, there = rankings.PARTS[name](vit), components.exist(vit)
    assert {*scores} == {*components.KINDS}
    for kind, mask in there.items():
        assert torch.equal(~scores[kind].isnan(), mask), kind
    plan = eap.plan(scores, 0.5, parts=("block",))
    assert sum(plan.blocks) == 1


def test_magnitude_is_the_norm_of_what_removal_takes_away():
    vit = make("vit")
    found, total = rankings.magnitude_parts(vit), sum(p.square().sum() for p in vit.parameters())
    for part in components.of(vit, group_size=1, parts=("head", "neuron", "block"))[::37]:
        small = remove(vit, components.plan(vit, [part]))
        gone = total - sum(p.square().sum() for p in small.parameters())
        torch.testing.assert_close(torch.tensor(components.score(found, part)).double() ** 2, gone.detach())


def test_random_is_drawn_by_its_seed():
    vit = make("vit")
    first, again, other = (rankings.random_parts(vit, seed) for seed in (0, 0, 1))
    assert torch.equal(first["head"], again["head"]) and not torch.equal(first["head"], other["head"])
