"""Attention maps: those of open_clip's and timm's own attention, of whole and pruned models, and their files."""

import json
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch
from families import FAMILIES, images, make
from safetensors import safe_open

from lib import attention_maps, blocks, evaluate, params, runs
from lib.params import ParameterError
from lib.pruners.anchors import Anchors
from lib.pruners.avit import AViT
from lib.pruners.baselines import EViT, GridDrop, ToMe, TopK
from lib.pruners.surgery import Plan, remove
from lib.pruners.tokens import FixedPatches, TokenPruner
from lib.pruners.ucb import UCB
from lib.starts import Start

PRUNERS = {"anchors": lambda vit: Anchors(vit, 3, 4), "topk": lambda vit: TopK(vit, 0.5, [0, 1]),
           "evit": lambda vit: EViT(vit, 0.5, [0, 2]), "nothing": TokenPruner}  # fmt: skip


def seen_by_timm(vit, x):
    """The probabilities (B, H, N, N) that timm's own unfused attention makes in every block, and the logits."""
    seen = []
    for block in vit.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].detach().float()))
    return seen, vit(x)


@pytest.mark.parametrize("family", FAMILIES)
def test_maps_are_timms(family):
    vit = make(family)
    found = attention_maps.extract(TokenPruner(vit), images(vit))
    expected, logits = seen_by_timm(vit, images(vit))
    assert len(found.attention) == len(expected) == 3
    for block in range(3):
        torch.testing.assert_close(found.attention[block], expected[block], rtol=0, atol=1e-6)
        prefix = vit.num_prefix_tokens
        patches = vit.patch_embed.num_patches
        assert found.tokens[block].tolist() == [[-1] * prefix + [*range(patches)]] * 3
    torch.testing.assert_close(found.logits, logits.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batch_first", [True, False], ids=["NLD", "LND"])
def test_maps_are_those_of_multihead_attention(batch_first):
    transformer = pytest.importorskip("open_clip.transformer", reason="open_clip is not installed")
    visual = transformer.VisionTransformer(64, 16, 48, 3, 4, 4.0, output_dim=7)
    if not batch_first:
        visual.transformer = transformer.Transformer(48, 3, 4, 4.0, batch_first=False)
    generator, seen = torch.Generator().manual_seed(0), []
    with torch.no_grad():
        for parameter in visual.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    x = torch.randn(3, 3, 64, 64, generator=generator, dtype=torch.float64)
    found = attention_maps.extract(TokenPruner(visual.double().eval()), x)
    for block in visual.transformer.resblocks:
        block.attn.register_forward_pre_hook(lambda attn, fed: seen.append((attn, fed[0].detach())))
    logits = visual(x)
    assert len(seen) == len(found.attention) == 3
    for (attn, fed), map_, tokens in zip([*seen], found.attention, found.tokens, strict=True):
        with torch.no_grad():
            _, expected = torch.nn.MultiheadAttention.forward(
                attn, fed, fed, fed, need_weights=True, average_attn_weights=False
            )
        torch.testing.assert_close(map_, expected.float(), rtol=0, atol=1e-6)
        assert tokens.tolist() == [[-1, *range(16)]] * 3
    torch.testing.assert_close(found.logits, logits.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", PRUNERS)
@pytest.mark.parametrize("family", ["vit", "registers"])
def test_maps_of_a_pruned_model_are_of_what_runs_in_it(family, name):
    vit = make(family)
    pruner, prefix = PRUNERS[name](vit).train(), vit.num_prefix_tokens
    x, before = images(vit), {key: value.clone() for key, value in vit.state_dict().items()}
    found = attention_maps.extract(pruner, x)
    assert pruner.training and all(torch.equal(value, before[key]) for key, value in vit.state_dict().items())
    trace = pruner.trace(x)
    torch.testing.assert_close(found.logits, trace.logits.float(), rtol=0, atol=0)
    attention, _ = pruner.counts() if name != "nothing" else ([prefix + 16] * 3, None)
    for block, (map_, tokens) in enumerate(zip(found.attention, found.tokens, strict=True)):
        number = attention[block]
        assert map_.shape == (3, 3, number, number) and tokens.shape == (3, number)
        assert map_.dtype == torch.float32 and tokens.dtype == torch.int64
        torch.testing.assert_close(map_.sum(dim=3), torch.ones(3, 3, number))
        assert (tokens[:, :prefix] == -1).all()
        for image in range(3):
            went = [*range(16)] if block == 0 else trace.kept[block - 1][image].tolist()
            assert sorted(patch for patch in tokens[image].tolist() if patch >= 0) == went


def test_maps_of_a_pruned_block_are_of_the_tokens_that_are_left():
    """A later block's map, from the first block's output by hand."""
    vit = make("vit")
    pruner = Anchors(vit, 3, 4, start_block=0)
    found, x = attention_maps.extract(pruner, images(vit)), images(vit)
    inputs = []
    for block in vit.blocks[1:]:
        block.norm1.register_forward_hook(lambda _, __, out: inputs.append(out))
    pruner(x)
    for index, fed in enumerate(inputs, start=1):
        q, k, _ = vit.blocks[index].attn.qkv(fed).reshape(3, 8, 3, 3, 16).permute(2, 0, 3, 1, 4)
        expected = torch.stack([torch.softmax(q[:, head] @ k[:, head].mT / 4, dim=2) for head in range(3)], dim=1)
        torch.testing.assert_close(found.attention[index], expected.float(), rtol=0, atol=1e-6)


def test_frozen_patches_keep_their_place_on_the_grid():
    frozen = FixedPatches(make("vit"), [2, 5, 11, 15])
    found = attention_maps.extract(frozen, images(frozen.vit))
    assert [tokens.tolist() for tokens in found.tokens] == [[[-1, 2, 5, 11, 15]] * 3] * 3
    pruned = attention_maps.extract(GridDrop(frozen.vit, 0.5, [0]), images(frozen.vit))
    assert {*pruned.tokens[1][0].tolist()} < {-1, 2, 5, 11, 15} and pruned.tokens[1].shape == (3, 3)


@pytest.mark.parametrize(
    "method", [lambda vit: ToMe(vit, 2), AViT, lambda vit: UCB(vit, 0.5)], ids=["tome", "avit", "ucb"]
)
def test_what_attends_in_a_way_of_its_own_is_refused_by_name(method):
    pruner = method(make("vit"))
    with pytest.raises(blocks.UnsupportedBlock, match=rf"{type(pruner).__name__} attends in a way of its own: no maps"):
        attention_maps.extract(pruner, images(pruner.vit))


def test_blocks_without_heads_are_refused():
    vit = make("vit")
    parts = {"heads": [[0, 1, 2], [], [0, 1, 2]], "neurons": [[*range(192)]] * 3}
    with pytest.raises(blocks.UnsupportedBlock, match="block 1 has no head left: no map of it"):
        attention_maps.extract(TokenPruner(remove(vit, Plan(**parts))), images(vit))


def filled():
    vit = make("vit")
    pruner = Anchors(vit, 3, 4)
    return pruner, attention_maps.extract(pruner, images(vit))


@pytest.mark.parametrize("suffix", [".h5", ".hdf5", ".safetensors"])
def test_files_come_back_whole(tmp_path, suffix):
    pruner, maps = filled()
    path, about = tmp_path / f"maps{suffix}", {"grid": [4, 4], "classes": ["a", "ü"], "pruner": pruner.arguments}
    labels, pictures = np.array([2, 0, 1]), np.arange(3 * 8 * 8 * 3, dtype=np.uint8).reshape(3, 8, 8, 3)
    attention_maps.save(path, maps, about, labels=labels, images=pictures)
    arrays, facts = attention_maps.load(path)
    assert facts == about | {"axes": "image, head, query, key"}
    expected = {"logits": maps.logits.numpy(), "labels": labels, "images": pictures}
    for block in range(3):
        expected[f"block_0{block}/attention"] = maps.attention[block].numpy()
        expected[f"block_0{block}/tokens"] = maps.tokens[block].numpy()
    assert arrays.keys() == expected.keys()
    for name, array in expected.items():
        assert arrays[name].dtype == array.dtype and np.array_equal(arrays[name], array), name
    assert [each.name for each in tmp_path.iterdir()] == [path.name], "nothing beside it"
    if suffix == ".safetensors":
        with safe_open(path, "np") as file:
            assert json.loads(file.metadata()["grid"]) == [4, 4]
    else:
        with h5py.File(path) as file:
            assert json.loads(file.attrs["grid"]) == [4, 4] and file["block_00/attention"].compression == "gzip"


def test_other_suffixes_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"^maps.npz: expected a name that ends in \.h5, \.hdf5 or \.safetensors$"):
        attention_maps.save(tmp_path / "maps.npz", filled()[1], {})
    assert not [*tmp_path.iterdir()]


@pytest.fixture
def clip_run(tmp_path):
    """A run of clip_zeroshot.ipynb with these parameters, as far as its folder."""
    opened = []

    def make_run(**values):
        declaration = params.declared_in(runs.root() / "notebooks" / "clip_zeroshot.ipynb")
        checked = params.check(declaration, {"output_dir": str(tmp_path), "run_name": "t", **values})
        opened.append(runs.Run("clip_zeroshot", declaration, checked))
        return opened[-1]

    yield make_run
    for run in opened:
        run.close()


@pytest.mark.parametrize(
    ("values", "fault"),
    [({"attention_output": "maps.h5"}, "attention_output is 'maps.h5', but extract_attention is off: leave it out"),
     ({"img_idxs": [7]}, r"img_idxs is \[7\], but extract_attention is off"),
     *(({"extract_attention": True, "attention_output": name}, f"attention_output is '{name}': expected a file's name "
        r"that ends in \.h5, \.hdf5, \.safetensors")
       for name in ("maps.npz", "maps", "", "folder/maps.h5", "../maps.h5", "/tmp/maps.h5")),
     ({"extract_attention": True, "attention_output": "model.safetensors"}, "'model.safetensors', the run's model")],
)  # fmt: skip
def test_parameters_for_no_file_are_refused(clip_run, values, fault):
    with pytest.raises(ParameterError, match=fault):
        attention_maps.check(clip_run(**values))


def test_parameters_for_a_file_pass(clip_run):
    attention_maps.check(clip_run())
    for name in ("maps.h5", "a.b.hdf5", "maps.safetensors"):
        attention_maps.check(clip_run(extract_attention=True, attention_output=name))


def test_file_of_a_run_holds_what_was_measured(clip_run, tiny, vit):
    run = clip_run(extract_attention=True, attention_output="maps.h5", img_idxs=[4, 0, 8])
    start, pruner = Start("", vit.eval(), tiny, {}), Anchors(vit, 2, 3, start_block=0)
    path = attention_maps.of_run(run, start, pruner)
    arrays, facts = attention_maps.load(path)
    assert path == run.dir / "maps.h5" and arrays["block_01/attention"].shape == (3, 2, 6, 6)
    assert np.array_equal(arrays["images"], tiny.test.images[[4, 0, 8]]) and arrays["labels"].tolist() == [1, 0, 2]
    assert arrays["indices"].tolist() == [4, 0, 8] and facts["grid"] == [4, 4]
    assert facts["pruner"]["k_anchors"] == 2 and facts["parameters"] == run.params
    expected = evaluate.predict(pruner, tiny.test, mean=tiny.mean, std=tiny.std).logits[[4, 0, 8]]
    torch.testing.assert_close(torch.from_numpy(arrays["logits"]), expected)
    whole, facts = attention_maps.load(attention_maps.of_run(run, start, vit))
    assert facts["pruner"] == {} and not np.array_equal(whole["logits"], arrays["logits"])


@pytest.mark.parametrize("index", [9, 1000])
def test_images_beyond_the_test_set_are_refused(clip_run, tiny, vit, index):
    run = clip_run(extract_attention=True, img_idxs=[0, index])
    with pytest.raises(ParameterError, match=f"img_idxs hold {index}: expected indices below 9, the test images"):
        attention_maps.of_run(run, SimpleNamespace(vit=vit, images=tiny), vit)
    assert not (run.dir / "attention.h5").exists()
