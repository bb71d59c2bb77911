"""The README's worked example does what the README says of it."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch
from families import FAMILIES, images, make

from lib import evaluate, models, training_free
from lib.pruners import baselines
from lib.pruners.dropping import predicted_macs

README = (Path(__file__).resolve().parents[1] / "README.md").read_text()
NAME = "lib.pruners.sampled"


@pytest.fixture
def sampled(tmp_path, monkeypatch):
    """The module that the README shows, as if it lay where it says."""
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "(Dropping)" in block]
    assert len([line for line in code.splitlines() if line.strip()]) <= 20
    file = tmp_path / "sampled.py"
    file.write_text(code)
    spec = importlib.util.spec_from_file_location(NAME, file)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, NAME, module)
    spec.loader.exec_module(module)
    monkeypatch.setitem(baselines.DROPPING, "sampled", module.Sampled)
    return module.Sampled


@pytest.mark.parametrize("family", FAMILIES)
def test_it_keeps_as_many_as_asked_and_nothing_dropped_is_bare(sampled, family):
    vit = make(family)
    x = images(vit)
    torch.testing.assert_close(sampled(vit, 1.0)(x), vit(x), rtol=0, atol=1e-11)
    pruner = sampled(vit, 0.5, blocks=[0, 1])
    trace = pruner.trace(x)
    assert [kept.shape[1] for kept in trace.kept] == [8, 4, 4] == [n - pruner.prefix for n in pruner.counts()[1]]
    assert not torch.equal(trace.kept[0], baselines.TopK(vit, 0.5, [0, 1]).trace(x).kept[0])
    torch.testing.assert_close(torch.cat([pruner(each) for each in x.split(1)]), pruner(x), rtol=0, atol=1e-11)


def test_it_draws_in_proportion_to_attention(sampled):
    pruner = sampled(make("vit"), 0.5)
    scores, ids = torch.full((1, 16), 1e-3, dtype=torch.float64), torch.arange(16)[None]
    scores[0, 5] = 1.0
    chosen = [pruner.select(index, scores, ids, 1).item() for index in range(200)]
    assert chosen.count(5) > 180 and len({*chosen}) > 1


def test_it_runs_at_a_price_and_is_saved(sampled, tmp_path):
    vit = models.create("vit_digits", 3).eval()
    rules = {"method": "sampled", "blocks": [], "seed": 0, "alpha": 0.5, "start_block": 1, "normalise_scores": "minmax"}
    dense = evaluate.closed_form_macs(vit) / 1e9
    pruner = training_free.build(vit, rules, macs_g=dense / 2)
    assert 0.47 * dense < predicted_macs(pruner) <= 0.5 * dense
    models.save(pruner, tmp_path / "model")
    x = torch.rand(2, 3, 48, 48)
    torch.testing.assert_close(models.load(tmp_path)(x), pruner.eval()(x))
