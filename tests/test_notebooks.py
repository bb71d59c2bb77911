"""Every notebook, run by papermill with tiny parameters, top to bottom, and what it leaves behind."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import nbformat
import numpy as np
import pytest
import torch

from lib import attention_maps, models, params
from lib.pruners import schedule
from lib.pruners.baselines import ToMe
from lib.pruners.ward import Ward

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
TINY = {"batch_size": 16, "augment": "none"}
SCORES = {  # of every model in a comparison, over 4 classes
    *("top1", "precision_macro", "recall_macro", "f1_macro", "per_class_accuracy", "confidence", "confidence_correct"),
    *("confidence_incorrect", "confidence_gap", "entropy_nats", "nll_nats", "brier", "ece", "macs_g", "params_m"),
    *("latency_ms", "throughput_ips", "accuracy_per_ms", "pareto_latency", "pareto_macs", "pareto_params"),
}


def command(notebook: str, folder: Path, **values) -> tuple[Path, list[str]]:
    """The run folder and the papermill command of a notebook, with these parameters, as run `t` below folder."""
    values = {"output_dir": str(folder), "run_name": "t", **values}
    declared = params.declared_in(ROOT / "notebooks" / f"{notebook}.ipynb")
    assert values.keys() <= declared.keys(), "a parameter that the notebook does not declare"
    run = folder / notebook / values["run_name"]
    run.mkdir(parents=True, exist_ok=True)
    files = [str(ROOT / "notebooks" / f"{notebook}.ipynb"), str(run / "notebook.ipynb")]
    options = ["-k", "python3", "--no-progress-bar", "-y", json.dumps(values)]
    return run, [sys.executable, "-m", "papermill", *files, *options]


def papermill(notebook: str, folder: Path, cwd: Path = ROOT, **values) -> tuple[Path, subprocess.CompletedProcess]:
    """Run a notebook to its end: its run folder and the process's result."""
    run, line = command(notebook, folder, **values)
    return run, subprocess.run(line, cwd=cwd, capture_output=True, text=True, env=ENVIRONMENT)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("outputs")


@pytest.fixture(scope="module")
def dataset(folder) -> str:
    """120 images of 48x48 in the one-file format, with masks; the class can be read off their brightness."""
    rng = np.random.default_rng(0)
    labels = np.arange(120) % 4
    images = rng.integers(0, 40, (120, 48, 48, 3)) + 60 * labels[:, None, None, None]
    masks = np.zeros((120, 48, 48), dtype=bool)
    masks[:, 12:24, 12:30] = True
    path = folder / "tiny.h5"
    with h5py.File(path, "w") as file:
        file["images"], file["labels"], file["masks"] = images.astype(np.uint8), labels, masks
    return str(path)


@pytest.fixture(scope="module")
def dense(folder, dataset) -> Path:
    run, result = papermill("dense", folder, dataset=dataset, weights="", epochs=2, **TINY)
    assert result.returncode == 0, result.stderr[-3000:]
    return run


@pytest.fixture(scope="module")
def stage1(folder, dense) -> Path:
    run, result = papermill("ucb_stage1", folder, ckpt=str(dense), keep_ratio=0.9, **TINY)
    assert result.returncode == 0, result.stderr[-3000:]
    return run


@pytest.fixture(scope="module")
def stage2(folder, stage1) -> Path:
    # from inside notebooks/, as a person in Jupyter would
    run, result = papermill(
        "ucb_stage2", folder, ROOT / "notebooks", stage1_checkpoint_path=str(stage1), frozen_keep_ratio=0.25, **TINY
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return run


@pytest.fixture(scope="module")
def avit(folder, dense) -> Path:
    run, result = papermill("avit", folder, ckpt=str(dense), gate_center=1.0, distill_weight=0.5, **TINY)
    assert result.returncode == 0, result.stderr[-3000:]
    return run


def check_run(run: Path, *figures: str, trained: bool = True) -> dict:
    """The artefacts that every run has; returns its metrics."""
    names = ("DONE", "params.json", "provenance.json", "test.npz", "model.json")
    for name in (*names, "metrics.jsonl") if trained else names:
        assert (run / name).stat().st_size > 0, name
    assert {picture.stem for picture in (run / "figures").glob("*.png")} >= {*figures}
    assert not list(run.rglob("*.tmp*"))
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["n"] == 24 and metrics["dataset"] == "tiny.h5" and 0 <= metrics["top1"] <= 1
    provenance = json.loads((run / "provenance.json").read_text())
    assert provenance["command"].startswith("papermill notebooks/") and provenance["dataset_digest"]
    with np.load(run / "test.npz") as arrays:
        assert (arrays["logits"].argmax(1) == arrays["labels"]).mean() == metrics["top1"]
    return metrics


def test_dense(dense):
    metrics = check_run(dense, "training", "confusion")
    assert metrics["method"] == "dense" and metrics["keep_ratio"] == 1
    lines = [json.loads(line) for line in (dense / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2]
    assert models.load(dense).num_classes == 4


def test_ucb_stage1(stage1):
    metrics = check_run(stage1, "counts", "counts_per_block", "kept_by_ratio", "count_histogram", "foreground")
    assert "method" not in metrics, "a step on the way, not an arm of comparisons"
    model = models.load(stage1)
    gains = (model.ucb_count_scores - 1).sum(dim=-1)
    steps = 86 // 16
    torch.testing.assert_close(gains, torch.full_like(gains, 57.0 * steps))  # 0.9 of 64 patches


def test_ucb_stage2(stage1, stage2):
    metrics = check_run(stage2, "kept", "training", "confusion")
    assert metrics["method"] == "ucb" and metrics["keep_ratio"] == 0.25 and metrics["speedup"] > 0
    assert metrics["macs_g"] < 0.3 * metrics["dense_macs_g"]
    assert metrics["foreground_precision_random"] == pytest.approx(6 / 64)
    frozen = models.load(stage2)
    assert torch.equal(frozen.kept, models.load(stage1).ranked(0.25)) and len(frozen.kept) == 16


@pytest.mark.parametrize("selection", ["random", "centre"])
def test_other_sets(folder, stage1, selection):
    run, result = papermill(
        "ucb_stage2", folder, selection=selection, stage1_checkpoint_path=str(stage1), run_name=selection, **TINY
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert check_run(run, "kept")["method"] == selection


def test_dense_from_a_run_is_the_tuned_baseline(folder, dataset, dense):
    values = {"dataset": dataset, "weights": str(dense), "run_name": "tuned", **TINY}
    run, result = papermill("dense", folder, **values)
    assert result.returncode == 0, result.stderr[-3000:]
    assert check_run(run)["method"] == "dense-tuned"
    assert json.loads((run / "provenance.json").read_text())["start"] == str(dense)


def test_dense_on_shrunken_images(folder, dataset, dense):
    values = {"dataset": dataset, "weights": str(dense), "shrink_to": 36, "run_name": "shrunken", **TINY}
    run, result = papermill("dense", folder, **values)
    assert result.returncode == 0, result.stderr[-3000:]
    metrics, whole = check_run(run), json.loads((dense / "metrics.json").read_text())
    assert metrics["method"] == "low-resolution-tuned" and metrics["keep_ratio"] == 36 / 64
    assert metrics["macs_g"] < 0.6 * whole["macs_g"] and models.load(run).vit.patch_embed.num_patches == 36
    facts = [json.loads((each / "provenance.json").read_text())["dataset_digest"] for each in (run, dense)]
    assert facts[0] == facts[1], "the same test images: it stands beside the others in a comparison"


def test_avit(avit):
    metrics = check_run(avit, "training", "halting", "depth", "confusion")
    assert metrics["method"] == "avit-finetuned" and metrics["setting"] == "ponder 0.03"
    assert 1 <= metrics["mean_depth"] < 6 and metrics["macs_g"] < metrics["dense_macs_g"]
    assert metrics["speedup"] > 0 and -1 <= metrics["depth_foreground_correlation"] <= 1
    row = json.loads((avit / "metrics.jsonl").read_text())
    parts = {"task": 1, "ponder": 0.03, "distr": 0.01, "distill": 0.5}
    assert row["train_loss"] == pytest.approx(sum(weight * row[f"train_{name}"] for name, weight in parts.items()))
    model = models.load(avit)
    assert model.mode == "gather" and model.arguments["gate_center"] == 1


def test_avit_from_scratch(folder, dataset):
    values = {"ckpt": "scratch", "dataset": dataset, "learn_gate": True, "run_name": "scratch", **TINY}
    run, result = papermill("avit", folder, ROOT / "notebooks", **values)
    assert result.returncode == 0, result.stderr[-3000:]
    assert check_run(run)["method"] == "avit"
    assert json.loads((run / "provenance.json").read_text())["start"] == ""


def test_avit_visual(folder, dense, avit):
    run, result = papermill("avit_visual", folder, ckpt=str(avit), img_idxs=[0, 5, 9999], extremes=3, repeats=3)
    assert result.returncode == 0, result.stderr[-3000:]
    assert {picture.stem for picture in (run / "figures").glob("*.png")} == {"maps", "easy_hard", "halting"}
    metrics = json.loads((run / "metrics.json").read_text())
    assert [row["method"] for row in metrics["table"]] == ["dense", "avit-finetuned"]
    assert all(row["ms_per_image"] > 0 for row in metrics["table"]) and metrics["correlation_n"] > 0
    assert "method" not in metrics, "no arm of comparisons"


@pytest.mark.parametrize("method, strength, beside", [("topk", 0.3, "tome"), ("avit", -1.0, "eap")])
def test_explore(folder, dense, avit, method, strength, beside):
    model = avit if method == "avit" else dense
    values = {"model": str(model), "image": "5", "method": method, "strength": strength, "beside": beside}
    run, result = papermill("explore", folder, ROOT / "notebooks", run_name=method, **values)
    assert result.returncode == 0, result.stderr[-3000:]
    assert (run / "DONE").exists() and not list(run.rglob("*.tmp*"))
    figures = {picture.stem for picture in (run / "figures").glob("*.png")}
    assert figures == {"blocks", f"{method}_slider", f"{beside}_slider", "price"}
    metrics = json.loads((run / "metrics.json").read_text())
    assert "method" not in metrics, "no arm of comparisons"
    whole, first, second = metrics["views"]
    assert [whole["method"], first["method"], second["method"]] == ["dense", method, beside]
    assert whole["strength"] is None and first["strength"] == (1.0 if method == "avit" else 0.3), "avit: as saved"
    for view in (whole, first, second):
        assert view["answer"] in {"0", "1", "2", "3"} and 0.25 <= view["confidence"] <= 1 and view["latency_ms"] > 0
        assert view["fewer_macs"] == pytest.approx(whole["macs_g"] / view["macs_g"])
    assert first["macs_g"] < whole["macs_g"] and second["macs_g"] < whole["macs_g"]
    assert json.loads((run / "provenance.json").read_text())["start"] == str(model)
    *_, last = nbformat.read(run / "notebook.ipynb", 4).cells
    assert any("application/vnd.jupyter.widget-view+json" in output.data for output in last.outputs), "its controls"


@pytest.fixture(scope="module")
def comparison(folder, dense, stage1, stage2, avit) -> tuple[Path, str]:
    """A comparison of all runs and a state dict from elsewhere, and what it printed."""
    unfinished = folder / "ucb_stage2" / "half"
    unfinished.mkdir(parents=True)
    (unfinished / "params.json").write_text("{}")
    torch.save(models.load(dense).state_dict(), folder / "theirs.pth")
    values = {"runs": f"{folder}/*/*", "models": [f"vit_digits={folder}/theirs.pth"], "repeats": 3}
    run, result = papermill("compare", folder, **values, latency_batches=[2], latency_bf16=True)
    assert result.returncode == 0, result.stderr[-3000:]
    printed = "".join(output.get("text", "") for cell in nbformat.read(run / "notebook.ipynb", 4).cells
                      for output in cell.get("outputs", []))  # fmt: skip
    return run, printed


def test_compare(comparison):
    run, printed = comparison
    metrics = json.loads((run / "metrics.json").read_text())
    arms = {row["arm"]: row for row in metrics["summary"]}
    assert {"dense 1", "ucb 0.25", "avit-finetuned ponder 0.03"} <= {*arms}
    assert arms["avit-finetuned ponder 0.03"]["keep_ratio"] is None and arms["dense 1"]["mean_depth"] is None
    assert arms["dense 1"]["speedup"] == 1 and arms["dense 1"]["difference"] == 0
    theirs = {"method": "given", "top1": arms["dense 1"]["top1"], "p": 1, "difference": 0}
    assert theirs.items() <= arms["theirs"].items(), "the dense weights again, as a state dict"
    evaluation = json.loads((run / "evaluation_metrics.json").read_text())
    assert evaluation.keys() == arms.keys()
    for arm, row in evaluation.items():
        assert row.keys() >= SCORES, arm
        assert row["throughput_ips"] == pytest.approx(1000 * row["batch_size"] / row["latency_ms"])
        assert row["latency_ms"] == pytest.approx(arms[arm]["latency_ms"]) and row["top1"] == arms[arm]["top1"]
    assert len(metrics["advice"]) == 5
    check_evidence(metrics, arms)
    assert {picture.stem for picture in (run / "figures").glob("*.png")} == {
        *("kept", "overlap", "accuracy_macs", "accuracy_latency", "evaluation_results")
    }
    assert (run / "runs.csv").exists() and (run / "runs.parquet").exists() and (run / "summary.csv").exists()
    assert "ucb_stage2/half: not finished" in printed


def check_evidence(metrics: dict, arms: dict[str, dict]) -> None:
    """What a comparison says beside its summary, whose rows are `arms`."""
    tables = {name: {row["arm"]: row for row in metrics[name]} for name in ("paired", "calibration", "foreground")}
    assert tables["paired"].keys() == tables["calibration"].keys() == arms.keys()
    for arm, row in tables["paired"].items():
        assert row["p"] == arms[arm]["p"] and row["low"] <= row["difference"] <= row["high"], arm
        assert (row["p_holm"] is None) if arm == metrics["baseline"] else row["p"] <= row["p_holm"] <= 1
    volumes = {row["method"]: row["volume"] for row in metrics["volumes"]}
    assert volumes.keys() == {row["method"] for row in arms.values()} and volumes["dense"] == 0
    assert 0 <= volumes["ucb"] <= 1 and [*volumes.values()] == sorted(volumes.values(), reverse=True)
    dense, theirs = ({**tables["calibration"][arm], "arm": 0} for arm in ("dense 1", "theirs"))
    assert dense["temperature"] > 0 and dense == pytest.approx(theirs, rel=1e-3), "the same weights"
    pruned = {"ucb 0.25", "avit-finetuned ponder 0.03"}
    assert pruned <= tables["foreground"].keys() <= arms.keys() - {"dense 1", "theirs"}
    for row in tables["foreground"].values():
        assert row["precision_random"] == pytest.approx(6 / 64) and 0 <= row["precision"] <= 1
    timed = {row["model"]: row["speedup"] for row in metrics["speed"]}
    elsewhere = {row.pop("arm"): row for row in metrics["elsewhere"]}
    settings = {"batch 2, fp32", f"batch {metrics['speed'][0]['batch_size']}, bf16"}
    assert elsewhere.keys() == arms.keys() and all(row.keys() == settings for row in elsewhere.values())
    assert {*elsewhere["dense 1"].values()} == {1} and all(elsewhere["ucb 0.25"].values())
    share = timed["avit-finetuned ponder 0.03"] / timed["ceiling of avit-finetuned ponder 0.03"]
    assert arms["avit-finetuned ponder 0.03"]["of_ceiling"] == pytest.approx(share)
    assert arms["ucb 0.25"]["of_ceiling"] is arms["dense 1"]["of_ceiling"] is None, "they choose nothing"


@pytest.fixture(scope="module")
def acdc(folder, dense) -> Path:
    values = {"model_path": str(dense), "threshold": 0.05, "group_size": 96, "thresholds": [0, 0.05], **TINY}
    run, result = papermill("acdc", folder, **values)
    assert result.returncode == 0, result.stderr[-3000:]
    return run


def test_acdc(dense, acdc):
    metrics = check_run(acdc, "kl_path", "parts", "training", "confusion")
    assert metrics["method"] == "acdc" and metrics["setting"] == "increment 0.05"
    assert (acdc / "last" / "search.jsonl").read_text().count("\n") == 1 + metrics["tried"]
    assert 0 < metrics["removed"] < metrics["tried"] <= metrics["parts"] == 6 * (1 + 2 + 3 + 4)
    assert metrics["macs_g"] < metrics["dense_macs_g"] and metrics["speedup"] > 0 and metrics["kl_nats"] > 0
    nothing, same = metrics["thresholds"]
    assert nothing["macs_g"] == metrics["dense_macs_g"] and nothing["kl_nats"] == 0
    assert same["kl_nats"] == metrics["kl_nats"] and same["macs_g"] == pytest.approx(metrics["macs_g"])
    whole, small = models.load(dense), models.load(acdc)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in whole.parameters())
    with pytest.raises(AssertionError):  # fine-tuned: the kept rows are no longer those of the dense model
        torch.testing.assert_close(small.cls_token, whole.cls_token)


def test_acdc_screened_and_not_tuned(folder, dense):
    values = {
        "model_path": str(dense),
        "rule": "absolute",
        "threshold": 1e-5,
        "screen_margin": 1.0,
        "finetune_epochs": 0,
    }
    values |= {
        "thresholds": [],
        "effect_images": 0,
        "parts": ["head", "neuron"],
        "run_name": "screened",
        "batch_size": 16,
    }
    run, result = papermill("acdc", folder, ROOT / "notebooks", **values)
    assert result.returncode == 0, result.stderr[-3000:]
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["tried"] < metrics["parts"] and metrics["kl_nats"] < 1e-5
    assert metrics["top1"] == metrics["oneshot_top1"]


LOTTERY = {"weights": "", "rate": 0.34, "pruning_times": 2, **TINY}


def check_states(run: Path, *figures: str) -> list[dict]:
    metrics = check_run(run, "states", "weights", "confusion", *figures)
    rows = metrics["states"]
    assert [row["state"] for row in rows] == [0, 1, 2]
    assert [row["density"] for row in rows] == pytest.approx([1, 0.66, 0.66**2])
    assert len({row["initial_sha1"] for row in rows}) == 1
    assert metrics["top1"] == rows[-1]["top1"] and metrics["macs_g"] == rows[-1]["macs_g"]
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 3
    return rows


def test_refill(folder, dataset):
    values = {"dataset": dataset, "prune_target": "both", "criteria": "saliency", "analysis_batches": 1}
    run, result = papermill("refill", folder, **values, **LOTTERY)
    assert result.returncode == 0, result.stderr[-3000:]
    rows = check_states(run, "alive")
    assert [row["heads_kept"] for row in rows] == pytest.approx([1, 1 / 3, 1 / 3])  # 0.66 of 3 heads are 1.98
    assert [sum(map(len, row["plan"]["neurons"])) / 6 for row in rows] == [384, 253, 167]
    assert rows[0]["macs_g"] > rows[1]["macs_g"] > rows[2]["macs_g"]
    assert sum(p.numel() for p in models.load(run).parameters()) == 1e6 * rows[2]["params_m"]


def test_refill_of_single_weights_saves_nothing(folder, dataset):
    values = {"dataset": dataset, "vit_structured": False, "run_name": "elements", **LOTTERY}
    run, result = papermill("refill", folder, ROOT / "notebooks", **values)
    assert result.returncode == 0, result.stderr[-3000:]
    rows = check_states(run)
    assert [row["sparsity"] for row in rows] == pytest.approx([1 - row["density"] for row in rows], abs=1e-5)
    assert len({row["macs_g"] for row in rows}) == len({row["params_m"] for row in rows}) == 1


def test_rsst(folder, dataset):
    values = {"dataset": dataset, "arch": "res20s", "prune_target": "mlp", "criteria": "l1", "epochs": 1}
    values |= {"reg_granularity_prune": 1e-3, "RST_schedule": "exp_custom", "exponents": 2.0}
    run, result = papermill("rsst", folder, **values, **LOTTERY)
    assert result.returncode == 0, result.stderr[-3000:]
    rows = check_states(run, "alive", "driven_out")
    assert [len(row["plan"]["neurons"][0]) for row in rows] == [16, 10, 6]
    assert "norm_ratio" not in rows[0] and 1e-3 < rows[1]["norm_ratio"] < 2
    shown = nbformat.read(run / "notebook.ipynb", as_version=4)
    text = "".join(str(output) for cell in shown.cells if cell.cell_type == "code" for output in cell.outputs)
    assert "what is cut still has" in text  # a λ this small drives nothing out, and the run says so


def test_token_baselines(folder, dense):
    run, result = papermill(
        *("token_baselines", folder), model_path=str(dense), method="evit", keep_ratio=0.5, ceilings=[1.5], shares=[0.5]
    )
    assert result.returncode == 0, result.stderr[-3000:]
    metrics = check_run(run, "kept", "overlap", "ceilings", "settings", trained=False)
    assert metrics["method"] == "evit" and metrics["tokens"] == [
        65,
        34,
        34,
        19,
        11,
        11,
    ]  # 32 + 1, 17 + 1, 9 + 1 patches
    assert metrics["macs_g"] < metrics["dense_macs_g"] and 0 < metrics["share_of_ceiling"] < 2
    assert 0 <= metrics["agreement"] <= 1 and models.load(run).keep_ratio == 0.5
    whole, *rows = metrics["ceilings"]
    assert whole["method"] == "dense" and whole["agreement"] == 1 and whole["top1"] == metrics["dense_top1"]
    assert [row["method"] for row in rows] == ["random", "grid", "topk", "evit", "tome", "ward", "anchors"]
    assert all(0.9 * whole["macs_g"] / 1.5 < row["macs_g"] < 1.01 * whole["macs_g"] / 1.5 for row in rows)
    whole, *rows = metrics["settings"]
    assert whole["method"] == "dense" and whole["setting"] is None and len(rows) == 5 + 5 + 3 + 2
    assert {row["tokens"] for row in rows} == {1 + 32} and {row["n"] for row in rows} == {8}, "validation images"
    assert [row["method"] for row in metrics["foreground"]] == ["random", "grid", "topk", "evit", "anchors"]
    for row in metrics["foreground"]:
        assert row["precision_random"] == pytest.approx(6 / 64) and 0 <= row["precision"] <= 1
        if row["method"] != "evit":  # that keeps a fused token for a patch in some images
            assert 6 * row["recall"] == pytest.approx(64 * row["recall_random"] * row["precision"])


def test_token_baselines_where_no_method_can_be_so_cheap(folder, dense):
    values = {"model_path": str(dense), "keep_ratio": 0.5, "ceilings": [1000.0], "run_name": "no-cheaper"}
    run, result = papermill("token_baselines", folder, **values)
    assert result.returncode == 0, result.stderr[-3000:]
    assert [row["method"] for row in check_run(run, "kept", "overlap", trained=False)["ceilings"]] == ["dense"]


def test_token_baselines_of_bare_weights(folder, dataset, dense):
    torch.save(models.load(dense).state_dict(), folder / "bare.pth")
    values = {"model_path": str(folder / "bare.pth"), "dataset": dataset, "ceilings": [], "run_name": "bare"}
    run, result = papermill("token_baselines", folder, **values)
    assert result.returncode == 0, result.stderr[-3000:]
    metrics = check_run(run, "kept", "overlap", trained=False)
    assert metrics["dense_top1"] == json.loads((dense / "metrics.json").read_text())["top1"]
    assert metrics["settings"] == metrics["ceilings"] == [] and models.load(run).keep_ratio == 0.7
    assert models.origin(run, "baselines.TopK")["data"]["dataset"] == dataset


@pytest.mark.parametrize("method", ["tome", "anchors"])
def test_token_baselines_under_a_ceiling(folder, dense, method):
    tuning = {"finetune_epochs": 2, "learning_rate": 1e-3, "batch_size": 8}
    values = {"model_path": str(dense), "method": method, "macs_g": 0.03, "ceilings": [], "run_name": method} | tuning
    run, result = papermill("token_baselines", folder, ROOT / "notebooks", **values)
    assert result.returncode == 0, result.stderr[-3000:]
    metrics = check_run(run, "training", "kept")
    assert 0.027 < metrics["macs_g"] < 0.0303 and metrics["ceilings"] == []
    assert metrics["method"] == f"{method}-tuned" and metrics["oneshot_nll_nats"] != metrics["nll_nats"]
    assert metrics["dense_top1"] == json.loads((dense / "metrics.json").read_text())["top1"], "dense stays as it was"


def check_merging(run: Path, kind: type, method: str, unit: str, ways: list[str | None]) -> dict:
    """What a run of merging.ipynb leaves; returns its metrics."""
    metrics = check_run(run, "schedules", "kept", trained=False)
    best, model = schedule.read(run / "schedule.json"), models.load(run)
    assert metrics["method"] == method and metrics["schedule"] == best._asdict() and best.unit == unit
    asked = json.loads((run / "params.json").read_text())["latency_ms"]  # a time differs from run to run, a budget not
    spent = f"{asked:g} ms" if asked else f"{best.cost:.3g} GMACs"
    assert metrics["setting"] == f"{spent}, scheduled" and metrics["share_of_ceiling"] > 0
    assert type(model) is kind and model.r == best.r and metrics["tokens"] == model.counts()[1]
    assert [row["schedule"] for row in metrics["ways"]] == ways and metrics["ways"][0]["method"] == "dense"
    whole, *_, chosen = metrics["ways"]
    assert whole["agreement"] == 1 and whole["top1"] == metrics["dense_top1"] and chosen["method"] == method
    assert chosen["top1"] == metrics["top1"] and chosen["agreement"] == metrics["agreement"]
    return metrics


def test_merging(folder, dense):
    """For a budget of multiply-adds, and once more by the schedule that was found."""
    values = {"model_path": str(dense), "gamma": 1.0, "calibration_images": 16, "latency_batch": 4}
    run, result = papermill("merging", folder, macs_g=0.03, **values)
    assert result.returncode == 0, result.stderr[-3000:]
    metrics = check_merging(run, Ward, "ward", "GMACs", [None, "even", "chosen"])
    assert 0.028 < metrics["schedule"]["cost"] <= 0.03 and metrics["macs_g"] == pytest.approx(0.03, rel=0.07)
    assert metrics["schedule"]["images"] == 8, "all validation images"
    assert models.load(run).gamma == 1
    values = {"model_path": str(dense), "method": "tome", "schedule_path": str(run / "schedule.json")}
    again, result = papermill("merging", folder, ROOT / "notebooks", run_name="again", latency_batch=4, **values)
    assert result.returncode == 0, result.stderr[-3000:]
    ways = [None, "chosen"] if metrics["schedule"]["width"] else [None, "even", "chosen"]
    found = check_merging(again, ToMe, "tome", "GMACs", ways)
    unseen = {"kl_nats": None, "images": 0}  # by this run's images
    assert found["schedule"] == metrics["schedule"] | unseen and found["tokens"] == metrics["tokens"]


def test_merging_for_a_time(folder, dense):
    """A time that the dense model takes on any machine: nothing has to go."""
    values = {"model_path": str(dense), "method": "tome", "latency_ms": 1e5, "calibration_images": 16}
    run, result = papermill("merging", folder, ROOT / "notebooks", run_name="time", latency_batch=4, **values)
    assert result.returncode == 0, result.stderr[-3000:]
    metrics = check_merging(run, ToMe, "tome", "ms", [None, "even", "chosen"])
    assert metrics["schedule"]["r"] == [0] * 6 and 0 < metrics["schedule"]["cost"] < 1e5
    assert metrics["agreement"] == 1 and metrics["macs_g"] == pytest.approx(metrics["dense_macs_g"])


def test_clip_zeroshot(folder, dataset, dense):
    """Without a model the notebook trains one on captions, and takes it the next time; whole, and pruned by anchors."""
    pytest.importorskip("open_clip", reason="open_clip is not installed")
    values = {"dataset": dataset, "weights": str(dense), "epochs": 6, "batch_size": 16}
    more = {"extract_attention": True, "img_idxs": [0, 5, 23], "shares": [0.5], "k_anchors": 8.0, "top_m": 24.0}
    run, result = papermill("clip_zeroshot", folder, **values, **more)
    assert result.returncode == 0, result.stderr[-3000:]
    metrics = check_run(run, "kept", "settings", trained=False)
    assert metrics["method"] == "anchors" and metrics["tokens"] == [65, 33, 33, 33, 33, 33]
    assert metrics["macs_g"] < 0.7 * metrics["dense_macs_g"] and metrics["speedup"] > 0
    assert len(metrics["settings"]) == 1 + 5 + 5 + 3 + 2 and metrics["dense_top1"] >= 0.5, "it has learnt its captions"

    clip = next(folder.glob("clip_zeroshot/*/clip"))
    made = check_run(clip.parent, "training")
    assert made["method"] == "clip" and made["top1"] == metrics["dense_top1"]
    arrays, facts = attention_maps.load(run / "attention.h5")
    zero, whole = (json.loads((run / f"{name}.json").read_text()) for name in ("zeroshot", "zeroshot_dense"))
    assert whole.keys() == {"dataset", "model", "pretrained", "task", "metrics", "language"}
    assert zero.keys() == {*whole, "pruning"} and zero["pruning"] == facts["pruner"]
    assert zero["metrics"] == {"acc1": metrics["top1"], "acc5": None, "mean_per_class_recall": metrics["recall_macro"]}
    assert zero["task"] == "zeroshot_classification" and zero["dataset"] == "tiny.h5"
    assert whole == json.loads((clip.parent / "zeroshot.json").read_text()) | {"model": zero["model"]}
    assert zero["model"] == f"local-dir:{clip}" and whole["metrics"]["acc1"] == metrics["dense_top1"]

    assert arrays["indices"].tolist() == [0, 5, 23] and facts["grid"] == [8, 8] and facts["pruner"]["top_m"] == 24
    assert [arrays[f"block_0{block}/attention"].shape for block in (0, 1, 5)] == [(3, 3, n, n) for n in (65, 65, 33)]
    with np.load(run / "test.npz") as saved:
        np.testing.assert_allclose(arrays["logits"], saved["logits"][[0, 5, 23]], rtol=1e-4, atol=1e-4)

    again, result = papermill(
        *("clip_zeroshot", folder, ROOT / "notebooks"),
        **values,
        enable_pruning=False,
        latency_batch=32,
        shares=[],
        run_name="whole",
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert len([*folder.glob("clip_zeroshot/*/clip")]) == 1, "found, not made again"
    found = check_run(again, trained=False)
    assert found["method"] == "clip" and found["top1"] == metrics["dense_top1"] and "speedup" not in found
    assert json.loads((again / "zeroshot.json").read_text()) == whole
    assert not (again / "attention.h5").exists() and found["settings"] == []


def test_eap(folder, dense, acdc):
    values = {"model_path": str(dense), "keep_ratio": 0.5, "ratios": [0.9, 0.5], "group_size": 2, **TINY}
    run, result = papermill("eap", folder, **values)
    assert result.returncode == 0, result.stderr[-3000:]
    metrics = check_run(run, "parts", "score_effect", "ratios", "training", "confusion")
    assert metrics["method"] == "eap-fisher" and metrics["keep_ratio"] == 0.5
    assert metrics["heads_kept"] == 0.5 and metrics["neurons_kept"] == 0.5
    assert {*metrics["rank_correlation"]["neuron"]} == {"fisher", "ce", "taylor", "magnitude", "random"}
    costs = {row["keep_ratio"]: row["macs_g"] for row in metrics["ratios"]}
    assert all(row["macs_g"] == pytest.approx(costs[row["keep_ratio"]]) for row in metrics["ratios"]), "equal cost"

    cheap = {"effect_images": 0, "ratios": [], "finetune_epochs": 0, "batch_size": 16}
    for name, more in {
        "like": {"objective": "magnitude", "like": str(acdc)},
        "task": {"use_task_loss": True, "parts": ["block", "attn", "mlp"]},
        "path": {"objective": "ig", "use_task_loss": True},
    }.items():
        run, result = papermill("eap", folder, model_path=str(dense), run_name=name, **cheap, **more)
        assert result.returncode == 0, result.stderr[-3000:]
        found = json.loads((run / "metrics.json").read_text())
        assert found["method"] == {"like": "magnitude parts", "task": "eap-ce", "path": "eap-ig"}[name]
        if name == "like":
            reference = json.loads((acdc / "metrics.json").read_text())
            kept = ("heads_kept", "neurons_kept")
            assert [found[share] for share in kept] == [reference[share] for share in kept]
            assert found["setting"] == "like t"


def test_report(folder, stage2, comparison):
    """The index stands alone: pictures inside, links only to pages that are there, nothing left out unsaid."""
    result = subprocess.run([sys.executable, ROOT / "report" / "build.py", folder], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    page = folder / "report" / "index.html"
    assert result.stdout.strip() == f"report: {page.resolve()}"
    text = page.read_text()
    links = re.findall(r'href="([^"]+)"', text)
    assert "ucb_stage2-t.html" in links and all((page.parent / link).exists() for link in links)
    pictures = re.findall(r'src="([^"]+)"', text)
    assert len(pictures) >= 3 and all(picture.startswith("data:image/") for picture in pictures)
    assert "papermill notebooks/ucb_stage2.ipynb" in text
    for title in ("What each method lets the model see", "Everything measured", "Accuracy against measured time"):
        assert f'alt="{title}"' in text
    assert "<th>M parameters</th>" in text
    executed = (page.parent / "ucb_stage2-t.html").read_text()
    assert "UCB stage 2" in executed and "data:image/png" in executed


def test_stage2_makes_what_it_needs(folder, dataset, dense, tmp_path):
    """Without a stage-1 checkpoint the notebook makes one, saying so, and takes it the next time."""
    script = f"""
from lib import runs
first = runs.ensure("ucb_stage1", {str(folder)!r}, ckpt={str(dense)!r}, batch_size=16, augment="none")
again = runs.ensure("ucb_stage1", {str(folder)!r}, ckpt={str(dense)!r}, batch_size=16, augment="none")
assert first == again and (first / "DONE").exists() and (first / "notebook.ipynb").exists()
"""
    result = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "no finished run with" in result.stdout and "ucb_stage1: using" in result.stdout


@pytest.mark.parametrize("notebook", ["dense", "ucb_stage1", "ucb_stage2", "avit", "acdc", "eap"])
def test_killed_in_training_the_same_command_ends_in_the_same_bits(folder, dataset, dense, stage1, tmp_path, notebook):
    values = {
        "dense": {"dataset": dataset, "weights": "", "epochs": 12},
        "ucb_stage1": {"ckpt": str(dense), "num_train_epochs": 12},
        "ucb_stage2": {"stage1_checkpoint_path": str(stage1), "num_train_epochs": 12},
        "avit": {"ckpt": str(dense), "gate_center": 1.0, "learn_gate": True, "epochs": 12},
        "acdc": {"model_path": str(dense), "threshold": 0.05, "thresholds": [], "finetune_epochs": 12},
        "eap": {"model_path": str(dense), "ratios": [], "finetune_epochs": 12},
    }[notebook] | {**TINY, "augment": "shift"}
    whole, result = papermill(notebook, tmp_path / "whole", **values)
    assert result.returncode == 0, result.stderr[-2000:]

    run, line = command(notebook, tmp_path / "killed", **values)
    process = subprocess.Popen(line, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while len(list(run.glob("last/state-*.pt"))) < 2:
        assert process.poll() is None, "ended before it could be killed"
        time.sleep(0.01)
    os.kill(int((run / "lock.pid").read_text()), signal.SIGKILL)  # the kernel, in the middle of its training
    assert process.wait(timeout=60) != 0 and not (run / "DONE").exists()

    run, result = papermill(notebook, tmp_path / "killed", **values)
    assert result.returncode == 0, result.stderr[-2000:]
    assert (run / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert (run / "test.npz").read_bytes() == (whole / "test.npz").read_bytes()
    rows = [[json.loads(row) for row in (each / "metrics.jsonl").read_text().splitlines()] for each in (run, whole)]
    assert len(rows[0]) == 12
    assert [{**row, "seconds": 0} for row in rows[0]] == [{**row, "seconds": 0} for row in rows[1]]


@pytest.mark.parametrize("notebook", ["rsst", "refill"])
def test_killed_in_a_state_the_same_command_ends_in_the_same_bits(dataset, tmp_path, notebook):
    values = {"dataset": dataset, **LOTTERY, "epochs": 4, "augment": "shift", "rewind": "finetune"}
    whole, result = papermill(notebook, tmp_path / "whole", **values)
    assert result.returncode == 0, result.stderr[-2000:]

    run, line = command(notebook, tmp_path / "killed", **values)
    process = subprocess.Popen(line, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list(run.glob("parts/state01/last/state-*.pt")):
        assert process.poll() is None, "ended before it could be killed"
        time.sleep(0.01)
    os.kill(int((run / "lock.pid").read_text()), signal.SIGKILL)
    assert process.wait(timeout=60) != 0 and not (run / "DONE").exists()

    run, result = papermill(notebook, tmp_path / "killed", **values)
    assert result.returncode == 0, result.stderr[-2000:]
    for file in ("model.safetensors", "test.npz", *(f"parts/state0{i}/{name}" for i in range(3)
                 for name in ("model.safetensors", "state.json"))):  # fmt: skip
        assert (run / file).read_bytes() == (whole / file).read_bytes(), file


@pytest.mark.parametrize(
    ("notebook", "values", "message"),
    [("dense", {"epochs": 0}, "epochs is 0: expected a value in [1, 100000]"),
     ("dense", {"arch": "vit_digit"}, "did you mean vit_digits?"),
     ("dense", {"dataset": "digit"}, "did you mean 'digits'"),
     ("ucb_stage1", {"ckpt": "checkpoints/vit_digits.safetensors", "arch": "vit_cifar"}, "but ckpt brings its own"),
     ("ucb_stage2", {"stage1_checkpoint_path": "checkpoints/vit_digits.safetensors"}, "expected ucb.UCB"),
     ("ucb_stage1", {"keep_ratio": 1.5}, "keep_ratio is 1.5: expected a value in (0, 1]"),
     ("ucb_stage1", {"ckpt": "scratch", "warmup_steps": 10**6}, "warmup_steps is 1000000: expected fewer than all "),
     ("ucb_stage2", {"selection": "randm"}, "did you mean random?"),
     ("ucb_stage2", {"stage1_checkpoint_path": "nowhere"}, "model nowhere not found"),
     ("avit", {"ckpt": "scratch", "distill_weight": 1.0}, "but ckpt scratch has no trained model"),
     ("avit", {"distr_kl": "backward"}, "expected one of forward, reverse"),
     ("avit", {"ckpt": "checkpoints/vit_digits.safetensors", "dataset": "cifar10"}, "but ckpt brings its own"),
     ("avit_visual", {"ckpt": "checkpoints/vit_digits.safetensors"}, "holds a bare model: expected avit.AViT"),
     ("avit_visual", {"img_idxs": [-1]}, "img_idxs is -1: expected a value in [0, 10000000]"),
     ("refill", {"arch": "resnet20", "weights": ""}, "this model has no heads to remove: expected mlp"),
     ("rsst", {"rewind": "rewind_lt"}, "rewind_epoch is 0: expected an epoch of state 0, from 1 to 1"),
     ("rsst", {"exponents": 3.0}, "exponents is 3.0, but RST_schedule is 'x', which has no exponent: leave it out"),
     ("token_baselines", {"method": "top"}, "did you mean topk?"),
     ("clip_zeroshot", {"model": "ViT-B-23"}, "did you mean ViT-B-32?"),
     ("clip_zeroshot", {"model": "ViT-B-32", "pretrained": "openay"}, "'openay' is not a known tag"),
     ("acdc", {"finetune_epochs": 1, "warmup_epochs": 1}, "warmup_epochs is 1.0: expected less than all of 1 epochs"),
     ("eap", {"optimizer": "adamm"}, "optimizer is 'adamm': expected one of timm's, such as adamw, sgd, muon, did you"),
     ("eap", {"parts": ["head"], "group_size": 8}, "group_size is 8, but no neurons are among the parts: leave it out"),
     ("acdc", {"num_processes": 3}, "batch_size is 64: expected a multiple of num_processes, 3"),
     ("acdc", {"finetune_epochs": 0, "seed": 1}, "seed is 1, but finetune_epochs is 0: leave it out"),
     ("acdc", {"finetune_epochs": 0, "optimizer": "sgd"}, "optimizer is 'sgd', but finetune_epochs is 0"),
     ("eap", {"finetune_epochs": 0, "learning_rate": 1e-3}, "learning_rate is 0.001, but finetune_epochs is 0"),
     ("clip_zeroshot", {"attention_output": "maps.h5"}, "'maps.h5', but extract_attention is off: leave it out"),
     ("clip_zeroshot", {"templates": ["a photo"]}, "expected texts with one {} for the class"),
     ("explore", {"strength": 7.0}, "strength is 7: expected for topk the share of the running patches that stay"),
     ("compare", {"runs": "nowhere/*"}, "no finished run in")],
)  # fmt: skip
def test_faults_end_in_one_clear_line(tmp_path, notebook, values, message):
    run, result = papermill(notebook, tmp_path, **values)
    assert result.returncode != 0
    assert message in result.stderr.strip().splitlines()[-1], result.stderr[-2000:]
    assert not (run / "DONE").exists() and not (run / "metrics.json").exists()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_notebook_has_a_test_above(path):
    assert f"def test_{path.stem}(" in Path(__file__).read_text()
