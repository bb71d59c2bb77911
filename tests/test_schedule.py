"""Schedules of merging: as strong as a budget asks, chosen as the definition of successive halving says, on images that
are not tested on; and what merging.ipynb refuses."""

import json
import math
import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import TINY
from families import images, make
from PIL import Image

from lib import costs, evaluate, merging, models, params, runs
from lib.pruners import schedule
from lib.pruners.baselines import ToMe
from lib.pruners.dropping import Unreachable, predicted_macs
from lib.pruners.surgery import Plan, remove
from lib.pruners.ward import Ward
from lib.starts import Start

BELLS = [(centre, width) for centre in schedule.CENTRES for width in schedule.WIDTHS]
ROOT = Path(__file__).resolve().parents[1]


# shapes and strengths


def test_bells_are_symmetric_about_their_peak():
    for depth in (5, 6, 12):
        for width in schedule.WIDTHS:
            found = schedule.bell(depth, 0.5, width)
            assert found == pytest.approx(found[::-1]) and found[: depth // 2] == sorted(found[: depth // 2])
            early, late = schedule.bell(depth, 0.3, width), schedule.bell(depth, 0.7, width)
            assert early == pytest.approx(late[::-1])
    for centre, width in BELLS:
        found = schedule.bell(12, centre, width)
        assert abs((found.index(max(found)) + 0.5) / 12 - centre) <= 0.5 / 12 + 1e-9, "the block nearest to the centre"
    assert schedule.bell(10, 0.25, 0.2)[2] == 1 and schedule.bell(10, 0.25, 0.2)[4] == pytest.approx(math.exp(-0.5))


@pytest.mark.parametrize(("depth", "belong"), [(1, 1), (2, 2), (6, 6), (8, 8), (9, 8), (12, 8), (24, 16), (32, 21)])
def test_two_thirds_of_the_blocks_belong_to_a_bell_or_eight(depth, belong):
    for centre, width in BELLS:
        found = schedule.bell(depth, centre + 1e-6, width)  # between two blocks as far from it
        merging = [block for block, height in enumerate(found) if height]
        assert len(merging) == belong and merging == [*range(merging[0], merging[-1] + 1)]
        left = [abs((block + 0.5) / depth - centre) for block in range(depth) if block not in merging]
        assert all(abs((block + 0.5) / depth - centre) <= min(left, default=1) + 1e-5 for block in merging)
    assert sum(height > 0 for height in schedule.bell(24, 0.5 + 0.5 / 24, 0.2)) == 17, "of two as far both"


def test_a_spaced_shape_is_zero_between():
    vit, shape = make("vit", depth=5), [1.0, 2.0, 3.0, 4.0, 5.0]
    spaced = lambda every: schedule.spaced(shape, schedule.merging(vit.blocks, every))  # noqa: E731
    assert (spaced(1), spaced(2), spaced(9)) == ([1, 2, 3, 4, 5], [1, 0, 3, 0, 5], [1, 0, 0, 0, 0])
    vit = remove(vit, Plan(heads=[[], None, None, [], None]))  # blocks without heads merge nothing
    assert (spaced(1), spaced(2), spaced(9)) == ([0, 2, 3, 0, 5], [0, 2, 0, 0, 5], [0, 2, 0, 0, 0])
    for every in (0, -1, 1.5):
        with pytest.raises(ValueError, match=rf"^every is {every}: expected a whole number of blocks from 1$"):
            spaced(every)


@pytest.mark.parametrize("every", [(1,), (2,), (5,)])
def test_no_schedule_has_a_block_without_heads_merge(every):
    vit = remove(make("vit", depth=5), Plan(heads=[[], None, None, [], None]))
    best, candidates = schedule.choose(vit, ToMe, images(vit, 8), 0.99 * predicted_macs(ToMe(vit, 0)), every=every)
    assert all(each.r[0] == each.r[3] == 0 < sum(each.r) == 16 - ToMe(vit, each.r).counts()[1][-1] + 1
               for each in candidates)  # fmt: skip
    assert best in candidates


@pytest.mark.parametrize("shape", [[1.0] * 8, *(schedule.bell(8, *each) for each in BELLS)])
def test_a_fitted_schedule_merges_as_many_as_must_go_in_proportion_to_its_shape(shape):
    for gone in range(0, 25, 3):  # so few that no block has to merge half
        r = schedule.fitted(shape, 64, lambda r: 64 - sum(r), 64 - gone)
        assert sum(r) == gone, "the mildest"
        shares = np.cumsum(shape) / sum(shape)
        assert np.abs(np.cumsum(r) - gone * shares).max() <= 1 + 1e-9, "but for rounding"


@pytest.mark.parametrize("kind", [ToMe, Ward])
@pytest.mark.parametrize("shape", [[1.0] * 6, schedule.bell(6, 0.3, 0.22), schedule.bell(6, 0.75, 0.15)])
def test_a_fitted_schedule_costs_at_most_the_limit_and_one_patch_milder_costs_more(shape, kind):
    vit = make("vit", depth=6, img_size=128)
    cost = lambda r: predicted_macs(kind(vit, r))  # noqa: E731
    whole = cost([0] * 6)
    for share in (0.95, 0.9, 0.85):
        r = schedule.fitted(shape, 64, cost, share * whole)
        milder = schedule.fitted(shape, 64, lambda r: 64 - sum(r), 64 - sum(r) + 1)
        assert cost(r) <= share * whole < cost(milder) and sum(milder) == sum(r) - 1


def test_a_fitted_schedule_never_merges_more_than_half_of_what_runs():
    for centre, width in BELLS:
        for left in (40, 20, 10, 5):
            r = schedule.fitted(schedule.bell(8, centre, width), 64, lambda r: 64 - sum(r), left)
            running = 64
            for each in r or []:
                assert 0 <= each <= running // 2
                running -= each
    assert schedule.fitted([1.0] * 3, 16, lambda r: 16 - sum(r), 2) == [8, 4, 2]


def test_a_fitted_schedule_is_nothing_where_nothing_must_go_and_none_where_it_cannot():
    whole = lambda r: 16 - sum(r)  # noqa: E731
    assert schedule.fitted([1.0] * 3, 16, whole, 16) == schedule.fitted([1.0] * 3, 16, whole, 99) == [0, 0, 0]
    assert schedule.fitted([1.0] * 3, 16, whole, 1) is None
    assert schedule.fitted([1.0, 0.0, 0.0], 16, whole, 7) is None


# choosing


@pytest.fixture(scope="module")
def vit():
    return make("vit", depth=6, img_size=96)


@pytest.fixture(scope="module")
def x(vit):
    return images(vit, 64)


def kl(vit, pruner, x):
    """KL(dense ‖ merged) of every image, by the definition."""
    with torch.inference_mode():
        p, q = (model(x).double().softmax(1) for model in (vit, pruner))
    return (p * (p / q).log()).sum(1).tolist()


@pytest.mark.parametrize("kind", [ToMe, partial(Ward, gamma=1.0)], ids=["tome", "ward"])
@pytest.mark.parametrize("count", [64, 50, 9, 3, 1])
def test_the_chosen_schedule_is_what_successive_halving_leaves(vit, x, count, kind, monkeypatch):
    monkeypatch.setattr(schedule, "BATCH", 10)  # a round may be several batches
    x = x[:count]
    whole = predicted_macs(ToMe(vit, 0))
    best, candidates = schedule.choose(vit, kind, x, 0.7 * whole)
    assert best == candidates[0] and len({tuple(each.r) for each in candidates}) == len(candidates) > 8
    errors = {tuple(each.r): kl(vit, kind(vit, each.r), x) for each in candidates}
    rounds = math.ceil(math.log2(len(candidates)))
    firsts = [first for left in range(rounds - 1, -1, -1) if (first := count >> left)]  # images of every round
    running, seen = [*errors], {}
    for first in firsts:
        seen |= {r: (sum(errors[r][:first]) / first, first) for r in running}
        running = sorted(running, key=lambda r: seen[r][0])[: (len(running) + 1) // 2]
    assert tuple(best.r) == running[0] and best.images == count
    for each in candidates:
        mean, first = seen[tuple(each.r)]
        assert each.images == first and each.kl_nats == pytest.approx(mean, rel=1e-7, abs=1e-12)
        assert each.cost == predicted_macs(kind(vit, each.r)) <= 0.7 * whole and each.unit == "GMACs"
    assert [(-each.images, each.kl_nats) for each in candidates] == sorted(
        (-each.images, each.kl_nats) for each in candidates
    )


def test_candidates_are_even_merging_and_bells_that_meet_the_budget(vit, x):
    limit = 0.7 * predicted_macs(ToMe(vit, 0))
    _, candidates = schedule.choose(vit, ToMe, x[:16], limit)
    even = [each for each in candidates if each.width is None]
    assert len(even) == 1 and max(even[0].r) - min(even[0].r) <= 1
    for each in candidates:
        shape = [1.0] * 6 if each.width is None else schedule.bell(6, each.centre, each.width)
        assert each.r == schedule.fitted(shape, 36, lambda r: predicted_macs(ToMe(vit, r)), limit)
        assert each.width is None or (each.centre, each.width) in BELLS


def test_without_need_nothing_merges(vit, x):
    best, candidates = schedule.choose(vit, Ward, x[:4], predicted_macs(ToMe(vit, 0)))
    assert candidates == [best] and best.r == [0] * 6 and best.images == 4
    assert best.kl_nats == pytest.approx(0, abs=1e-12)


def test_a_budget_below_all_is_refused_in_one_line(vit, x):
    fault = "no schedule costs at most 1e-05 GMACs: expected a higher limit"
    with pytest.raises(Unreachable, match=f"^{re.escape(fault)}$"):
        schedule.choose(vit, Ward, x[:4], 1e-5)


def test_training_mode_and_dropout_change_nothing_and_stay(x):
    """Dense and merged are compared as they answer, not as they train."""
    settings = {"depth": 6, "img_size": 96}
    still = make("vit", **settings)
    vit = make("vit", **settings, proj_drop_rate=0.3, drop_path_rate=0.3).train()
    vit.blocks[2].eval()
    flags, before = [module.training for module in vit.modules()], {k: v.clone() for k, v in vit.state_dict().items()}
    limit = 0.7 * predicted_macs(ToMe(vit, 0))
    assert schedule.choose(vit, Ward, x[:16], limit) == schedule.choose(still, Ward, x[:16], limit)
    assert [module.training for module in vit.modules()] == flags
    assert all(torch.equal(value, before[name]) for name, value in vit.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in vit.parameters())


def test_another_cost_is_the_budget_in_its_unit(vit, x):
    best, candidates = schedule.choose(vit, ToMe, x[:8], 150.0, lambda pruner: float(sum(pruner.counts()[1])), "tokens")
    assert all(each.cost == sum(ToMe(vit, each.r).counts()[1]) <= 150 for each in candidates)
    assert best.unit == "tokens"


def test_candidates_merge_in_every_block_or_in_every_second(vit, x):
    _, candidates = schedule.choose(vit, ToMe, x[:8], 0.7 * predicted_macs(ToMe(vit, 0)), every=(1, 2))
    assert {each.every for each in candidates} == {1, 2}
    assert all(each.r[1::2] == [0, 0, 0] for each in candidates if each.every == 2)
    assert {each.shape for each in candidates} == {"even", "bell", "even, each 2 blocks", "bell, each 2 blocks"}
    alone = [schedule.choose(vit, ToMe, x[:8], 0.7 * predicted_macs(ToMe(vit, 0)), every=(n,))[1] for n in (1, 2)]
    assert sorted({tuple(each.r) for part in alone for each in part}) == sorted(tuple(each.r) for each in candidates)


# files


CHOSEN = schedule.Schedule([4, 0, 2], 0.3, 0.22, 0.0123, 64, 1.5, "GMACs")


@pytest.mark.parametrize("width", [0.22, None])
@pytest.mark.parametrize("every", [1, 2])
def test_a_schedule_is_read_as_it_was_written(tmp_path, width, every):
    chosen = CHOSEN._replace(width=width, every=every)
    (tmp_path / "schedule.json").write_text(chosen.to_json() + "\n")
    assert schedule.read(tmp_path / "schedule.json") == chosen and "\n" not in chosen.to_json()


def test_a_file_that_does_not_say_how_often_is_of_every_block(tmp_path):
    content = CHOSEN._asdict()
    del content["every"]
    (tmp_path / "schedule.json").write_text(json.dumps(content))
    assert schedule.read(tmp_path / "schedule.json") == CHOSEN


@pytest.mark.parametrize(
    ("text", "fault"),
    [(CHOSEN.to_json()[:-9], "holds no schedule ("),
     ("[]", "holds no schedule ("),
     ("", "holds no schedule ("),
     (json.dumps({name: value for name, value in CHOSEN._asdict().items() if name != "unit"}),
      "holds no schedule ('unit'): expected a JSON object of r, centre, width, kl_nats, images, cost, unit"),
     (CHOSEN._replace(r=[4, -1, 2]).to_json(), ": r is [4, -1, 2]: expected a number of tokens from 0 for each block"),
     (CHOSEN._replace(r=[4, 0.5]).to_json(), ": r is [4, 0.5]: expected a number of tokens from 0 for each block"),
     (CHOSEN._replace(r=4).to_json(), ": r is 4: expected a number of tokens from 0 for each block")],
)  # fmt: skip
def test_a_file_without_a_schedule_is_refused_in_one_line(tmp_path, text, fault):
    path = tmp_path / "schedule.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="expected") as caught:
        schedule.read(path)
    assert str(caught.value).startswith(str(path)) and fault in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_file_is_refused_in_one_line(tmp_path):
    with pytest.raises(
        ValueError, match=r"^.*schedule\.json holds no schedule \(.*No such file.*expected a JSON"
    ) as one:
        schedule.read(tmp_path / "schedule.json")
    assert "\n" not in str(one.value)


# milliseconds


def parts_of(pruner):
    """Tokens, pairs of tokens, matching blocks: a class token does not see what the last block merges."""
    attention, mlp = pruner.counts()
    merging = [a != b for a, b in zip(attention, mlp, strict=True)]
    matching = sum(merging[:-1] if pruner.vit.global_pool == "token" else merging)
    return np.array([sum(mlp), sum(n * n for n in attention), matching, 1])


def timed(monkeypatch, time):
    """Latency as a function of the model; what was timed, and on which images."""
    seen = []

    def latency(pruners, images, **_):
        seen.append((pruners, images))
        return pd.DataFrame({"model": [*pruners], "latency_ms": [time(pruner) for pruner in pruners.values()]})

    monkeypatch.setattr(costs, "latency", latency)
    return seen


RANDOM_RS = [np.random.default_rng(seed).integers(0, 7, 6).tolist() for seed in range(20)]


@pytest.mark.parametrize("price", [(0.02, 3e-4, 0.7, 5.0), (0.02, 0.0, 0.0, 1.0), (0.0, 1e-3, 0.3, 0.0)])
@pytest.mark.parametrize("kind", [ToMe, Ward])
def test_a_time_made_of_known_parts_is_found_again(vit, x, monkeypatch, price, kind):
    seen = timed(monkeypatch, lambda pruner: float(parts_of(pruner) @ price))
    cost = schedule.milliseconds(vit, kind, x[:4])
    ((pruners, images),) = seen
    assert len(pruners) > 4 and images is not None and torch.equal(images, x[:4])
    assert all(type(pruner) is kind and pruner.vit is vit for pruner in pruners.values())
    for r in [[0] * 6, [6] * 6, *RANDOM_RS]:
        assert cost(kind(vit, r)) == pytest.approx(parts_of(kind(vit, r)) @ price, rel=1e-6)


def test_an_estimate_is_never_negative_and_falls_with_merging_in_the_same_blocks(vit, x, monkeypatch):
    rng = np.random.default_rng(0)
    timed(monkeypatch, lambda _: float(rng.exponential()))  # noise alone
    for _ in range(5):
        cost = schedule.milliseconds(vit, ToMe, x[:2])
        for r in RANDOM_RS:
            more = [each + (each > 0) for each in r]
            assert cost(ToMe(vit, r)) >= cost(ToMe(vit, more)) >= 0


def test_a_budget_in_milliseconds_is_met_by_the_estimate(vit, x, monkeypatch):
    timed(monkeypatch, lambda pruner: float(parts_of(pruner) @ (0.02, 3e-4, 0.1, 1.0)))
    cost = schedule.milliseconds(vit, Ward, x[:2])
    limit = 0.75 * cost(Ward(vit, 0))
    best, candidates = schedule.choose(vit, Ward, x[:8], limit, cost, "ms")
    assert best.unit == "ms" and all(each.cost == cost(Ward(vit, each.r)) <= limit for each in candidates)
    assert sum(best.r) > 0


# merging.ipynb


@pytest.fixture
def start(tiny):
    torch.manual_seed(0)
    vit = models.create("vit_digits", 3, **{**TINY, "depth": 4}).eval()
    return Start("", vit, tiny, {})


@pytest.fixture
def given(tmp_path, monkeypatch):
    """A run of merging.ipynb with these parameters; caches lie in a folder of the test."""
    monkeypatch.setattr(merging, "root", lambda: tmp_path)
    opened = []

    def make_run(**values):
        declaration = params.declared_in(ROOT / "notebooks" / "merging.ipynb")
        values = params.check(declaration, {"output_dir": str(tmp_path), "run_name": f"run{len(opened)}", **values})
        opened.append(runs.Run("merging", declaration, values))
        return opened[-1]

    yield make_run
    for run in opened:
        run.close()


def test_the_method_merges_as_the_parameters_say(start, given):
    ward, tome = merging.method(given(gamma=1.5)), merging.method(given(method="tome"))
    assert type(ward(start.vit, [1, 0, 2, 0])) is Ward and ward(start.vit, [1, 0, 2, 0]).gamma == 1.5
    assert ward(start.vit, [1, 0, 2, 0]).rs == [1, 0, 2, 0] and type(tome(start.vit, 3)) is ToMe


@pytest.mark.parametrize(
    ("ask", "values", "fault"),
    [("method", {"method": "tome", "gamma": 1.0}, "gamma is 1.0, but method is 'tome'"),
     ("budget", {"macs_g": 0.1, "latency_ms": 5.0}, "macs_g is 0.1, but latency_ms is the budget"),
     ("found", {"merge_every": [2], "schedule_path": "x"}, "merge_every is [2], but schedule_path is given"),
     ("found", {"macs_g": 0.1, "schedule_path": "x"}, "macs_g is 0.1, but schedule_path is given"),
     ("found", {"latency_ms": 0.1, "schedule_path": "x"}, "latency_ms is 0.1, but schedule_path is given"),
     ("found", {"calibration_images": 16, "schedule_path": "x"},
      "calibration_images is 16, but schedule_path is given"),
     ("found", {"calibrate_on": "y", "schedule_path": "x"}, "calibrate_on is 'y', but schedule_path is given")],
)  # fmt: skip
def test_parameters_that_would_do_nothing_are_refused(start, given, ask, values, fault):
    with pytest.raises(params.ParameterError, match=f"^{re.escape(fault)}: leave it out$"):
        getattr(merging, ask)(*((given(**values),) if ask == "method" else (given(**values), start, ToMe)))


def test_the_budget_is_half_of_dense_where_none_is_given(start, given, monkeypatch):
    limit, cost, unit, every = merging.budget(given(), start, Ward)
    assert limit == pytest.approx(costs.closed_form_macs(start.vit) / 2e9, rel=1e-12)
    assert cost is predicted_macs and unit == "GMACs" and every == [1]
    assert merging.budget(given(merge_every=[2, 3]), start, Ward)[3] == [2, 3]
    assert merging.budget(given(macs_g=1e-4), start, Ward)[0] == 1e-4
    seen = timed(monkeypatch, lambda pruner: float(parts_of(pruner) @ (0.02, 3e-4, 0.7, 5.0)))
    limit, cost, unit, every = merging.budget(given(latency_ms=7.0, latency_batch=4), start, Ward)
    assert (
        (limit, unit, every) == (7.0, "ms", [1, 2])
        and cost(Ward(start.vit, 0)) > 5
        and seen[0][1].shape == (4, 3, 12, 12)
    )


def test_a_time_is_not_taken_of_fewer_images_than_asked_for(start, given):
    images = len(start.images.test)
    fault = f"latency_batch is {images + 1}: expected at most the {images} test images"
    with pytest.raises(params.ParameterError, match=f"^{fault}$"):
        merging.budget(given(latency_ms=7.0, latency_batch=images + 1), start, Ward)


def test_validation_images_decide_and_every_first_part_is_spread_over_them(start, given):
    found = merging.images_of(given(), start)
    val = evaluate.inputs(start.images.val.images, start.images)
    places = [next(place for place, image in enumerate(val) if torch.equal(image, each)) for each in found]
    assert sorted(places) == list(range(9)), "all, where there are fewer than asked for"
    assert places[:2] == [0, 8], "not the first of a file, that may be sorted by class"
    few = start._replace(images=replace(start.images, val=start.images.train))
    assert len(merging.images_of(given(calibration_images=16), few)) == 16


def test_images_of_another_dataset_decide_normalised_as_the_models_own(start, given, tmp_path):
    rng, folder = np.random.default_rng(0), tmp_path / "others"
    for label in "abc":
        (folder / label).mkdir(parents=True)
        for name in range(10):
            pixels = rng.integers(0, 256, (12, 12, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(folder / label / f"{name}.png")
    found = merging.images_of(given(calibrate_on=str(folder)), start)
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (start.images.mean, start.images.std))
    pixels = 255 * (found * std + mean)
    assert found.shape[1:] == (3, 12, 12) and (pixels - pixels.round()).abs().max() < 1e-3
    own = evaluate.inputs(start.images.val.images, start.images)
    assert not any(torch.equal(one, other) for one in found for other in own)


def test_images_that_are_tested_on_do_not_decide(start, given, tiny_h5):
    path = str(tiny_h5)
    fault = f"calibrate_on is {path!r}, the images that are tested on: expected others"
    with pytest.raises(params.ParameterError, match=f"^{re.escape(fault)}$"):
        merging.images_of(given(calibrate_on=path), start)


def test_without_images_but_test_images_another_dataset_is_asked_for(start, given):
    none = start.images.val.take(np.arange(0))
    bare = start._replace(images=replace(start.images, val=none, train=none))
    fault = f"{start.images.name} has no validation images: expected a dataset as calibrate_on"
    with pytest.raises(params.ParameterError, match=f"^{re.escape(fault)}$"):
        merging.images_of(given(), bare)


def test_a_schedule_is_looked_for_and_used_again(start, given, tmp_path):
    run = given(macs_g=0.7 * predicted_macs(ToMe(start.vit, 0)))
    best, candidates = merging.found(run, start, Ward)
    direct = schedule.choose(start.vit, Ward, merging.images_of(run, start), run.params["macs_g"])
    assert (best, candidates) == direct
    path = run.dir / "schedule.json"
    assert schedule.read(path) == best
    again = given(schedule_path=str(path))
    unseen = best._replace(kl_nats=None, images=0)  # by this run's images: it may be of another model
    assert merging.found(again, start, Ward) == (unseen, [unseen])
    assert schedule.read(again.dir / "schedule.json") == unseen
    foreign = best._replace(cost=9.87, unit="ms")  # of another machine
    path.write_text(foreign.to_json())
    assert merging.found(again, start, Ward) == (unseen, [unseen]), "the cost is this model's"
    other = tmp_path / "other.json"
    other.write_text(CHOSEN.to_json())
    with pytest.raises(params.ParameterError, match=r"other\.json is for 3 blocks: expected one for 4$"):
        merging.found(given(schedule_path=str(other)), start, Ward)


def test_a_match_that_is_not_made_costs_no_time():
    """In a last block whose patches nobody reads."""
    for family, matched in (("vit", 2), ("no class token", 3)):
        assert schedule._work(ToMe(make(family), [3, 2, 1]))[2] == matched / 10
