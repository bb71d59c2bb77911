"""The benchmarks run and measure what they say: on one small model, without a claim on any time."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY

from lib import evaluate, models, training_free
from lib.pruners.baselines import ToMe
from lib.pruners.dropping import predicted_macs

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"


def load(name):
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def avit():
    return load("avit")


@pytest.fixture
def depths():
    found = torch.randint(1, 7, (5, 65), generator=torch.Generator().manual_seed(0))
    found[:, 0] = torch.tensor([6, 6, 4, 3, 6])  # of the class token
    return found.minimum(found[:, :1])


@pytest.mark.parametrize("mode", ["mask", "gather"])
def test_planted_tokens_halt_where_they_are_told(avit, depths, mode):
    model = avit.Planted(models.create("vit_digits", 10), depths, mode=mode).eval()
    images = torch.randn(5, 3, 48, 48)
    assert torch.equal(model.trace(images).depth, depths[:, 1:])
    running = model.halting(images).running.sum(dim=0)
    assert torch.equal(running, depths)


def test_the_ceiling_runs_as_many_tokens(avit, depths):
    row = avit.against_ceiling("vit_digits", depths, repeats=1)
    assert row["mean_depth"] == pytest.approx(depths[:, 1:].double().mean().item())
    assert all(row[name] > 0 for name in ("mask", "gather", "ceiling", "share"))
    assert {*avit.ways_to_attend("vit_digits", depths, repeats=1)} >= {"rectangular", "by_count", "padded", "nested"}


def test_ways_to_attend_agree(avit):
    from lib.pruners.avit import _attend_by_count

    attn, counts = models.create("vit_digits", 10).eval().blocks[0].attn, [1, 3, 3, 8]
    q, k, v = torch.randn(3, 1, 3, 15, 32)
    expected = _attend_by_count(attn, q, k, v, counts)
    torch.testing.assert_close(avit.attend_nested(q, k, v, counts), expected)
    torch.testing.assert_close(avit.attend_bucketed(attn, q, k, v, counts), expected)


def test_the_recorded_depths_are_of_the_models_they_are_planted_in(avit):
    for arch in ("vit_tiny_patch16_224", "vit_small_patch16_224"):
        found = avit.depths(arch, 100)
        assert found.shape == (100, 197) and found.min() >= 1 and found.max() == 12
        assert (found <= found[:, :1]).all(), "no patch outlives its image"
    with pytest.raises(SystemExit, match="vit_digits does not fit"):
        avit.depths("vit_digits", 1)


@pytest.mark.filterwarnings("ignore:k_anchors")
def test_every_token_method_is_held_against_its_ceiling():
    table = load("tokens").against_ceiling("vit_digits", batch=2, repeats=1, fewer=1.5)
    assert {*table.method} == {*training_free.METHODS}
    assert ((table["MACs"] >= 1.5) & (table["MACs"] < 1.6)).all(), "as mild as that allows"
    assert (table[["speed-up", "ceiling", "share"]] > 0).all(axis=None)


def test_a_schedule_is_timed_as_it_is_given():
    schedule = [0, 9, 7, 5, 0, 0]
    table = load("tokens").against_ceiling("vit_digits", 2, 1, 1.5, ["tome", "ward"], schedule=schedule)
    dense = models.create("vit_digits", 10)
    whole, merged = predicted_macs(ToMe(dense, 0)), predicted_macs(ToMe(dense, schedule))
    assert table["MACs"].tolist() == pytest.approx([whole / merged] * 2, rel=2e-3)  # without the head of 1,000 classes


def test_merging_is_measured_on_weights_of_the_hub(monkeypatch, tiny_h5, capsys):
    """By --weights' default; without a hub from random ones that say what they were fed."""
    merging = load("merging")

    def hub(arch, num_classes, size, weights, **_):
        assert weights == "pretrained"
        vit = models.create("vit_digits", num_classes, **TINY | {"img_size": size, "patch_size": 28}).eval()
        vit.pretrained_cfg |= {"mean": (0.4, 0.5, 0.6), "std": (0.1, 0.2, 0.3)}
        return vit

    monkeypatch.setattr(merging.starts, "models", SimpleNamespace(**vars(models) | {"create": hub}))
    batch, seen = evaluate.batch, []
    monkeypatch.setattr(merging.evaluate, "batch", lambda images, count: seen.append(images) or batch(images, count))
    command = ["merging.py", "--images", str(tiny_h5), "--calibrate", "3", "--ceilings", "1.1", "--ways", "ToMe"]
    for how, mean in (("data", (0.4, 0.5, 0.6)), ("half", (0.5, 0.5, 0.5))):
        monkeypatch.setattr("sys.argv", [*command, "--normalise", how])
        merging.main()
        assert seen[-1].mean == mean and "| ToMe" in capsys.readouterr().out


def test_every_way_of_merging_costs_the_same_and_is_measured_as_it_answers():
    merging, vit = load("merging"), models.create("vit_digits", 10).eval()
    generator = torch.Generator().manual_seed(0)
    x, labels = torch.randn(12, 3, 48, 48, generator=generator), torch.arange(12) % 10
    table = merging.measured(vit, torch.randn(16, 3, 48, 48, generator=generator), x, labels, [1.5]).set_index("way")
    assert [*table.index] == ["dense", *merging.WAYS, "ToMe, scheduled", "Ward, scheduled", "Top-K", "EViT"]
    assert table["fewer MACs"][1:].between(1.5, 1.6).all() and table.p[2:].notna().all()
    assert (table.counted < table["fewer MACs"])[1:].all() and table.counted["Ward"] < table.counted["ToMe"]
    clean = vit(x).double().log_softmax(1)
    assert table.NLL["dense"] == pytest.approx(-clean[range(12), labels].mean().item(), abs=1e-6)
    assert table.top1["dense"] == (clean.argmax(1) == labels).double().mean().item() and (table.KL[1:] > 0).all()
    assert (table["NLL low"] <= table["NLL high"])[2:].all()
    again = merging.measured(vit, x, x, labels, [1.5], ["Ward", "ToMe"]).set_index("way")
    assert again.p.notna().to_dict() == {"dense": False, "Ward": False, "ToMe": True}
    assert again["NLL low"]["ToMe"] <= again.NLL["ToMe"] - again.NLL["Ward"] <= again["NLL high"]["ToMe"]
    found = {name: pruner.rs for name, pruner in merging.arms(vit, 0.03, x, ["ToMe", "Ward, each 2 blocks"])}
    assert [*found] == ["ToMe", "Ward, each 2 blocks"] and all(found["ToMe"])
    assert [each > 0 for each in found["Ward, each 2 blocks"]] == [True, False] * 3


def test_made_runs_are_read_as_arms_and_seeds(tmp_path):
    taken, found = load("compare").seconds(30, tmp_path)
    assert taken > 0 and found == 3


def test_moves_of_a_slider_are_timed_each_on_another_strength(monkeypatch):
    explore, drawn = load("explore"), []
    draw = explore.widgets.Explorer.draw
    monkeypatch.setattr(
        explore.widgets.Explorer, "draw", lambda self: (draw(self), drawn.append(self.strengths[0].value))
    )
    taken = explore.moves("checkpoints/vit_digits.safetensors", "topk", 3)
    assert len(taken) == 3 and all(seconds > 0 for seconds in taken)
    assert len({*drawn[-3:]}) == 3 and drawn[0] not in drawn[-3:]
