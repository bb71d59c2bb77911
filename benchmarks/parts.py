"""Parts of a pretrained ViT removed one-shot: accuracy against multiply-adds and measured time, without fine-tuning.

    python benchmarks/parts.py --weights FILE --images DATA [--arch vit_tiny_patch16_224] [--normalise half]

DATA: a dataset whose labels are the model's classes. Some of its images (--analyse, drawn with seed 0) decide what
goes, all others are the test. ACDC by threshold; Fisher, magnitude and random by ratio, and at as many heads and
neurons as each ACDC result keeps, so that costs are equal. p: McNemar's test against Fisher at the same cost.
"""

import argparse

import numpy as np
import pandas as pd
import torch

from lib import data, evaluate, models, runs
from lib.pruners import acdc, components, eap, rankings, surgery


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--images", required=True)
    parser.add_argument("--arch", default="vit_tiny_patch16_224")
    parser.add_argument("--normalise", default="half", choices=("data", *data.STATISTICS))
    parser.add_argument("--analyse", type=int, default=128, help="images that decide")
    parser.add_argument("--ratios", type=float, nargs="*", default=[0.9, 0.8, 0.7, 0.6, 0.5])
    parser.add_argument(
        "--thresholds", type=float, nargs="*", default=[0.003, 0.01, 0.03], help="of ACDC, rule increment"
    )
    parser.add_argument("--repeats", type=int, default=20)
    arguments = parser.parse_args()
    images = data.load(runs.resolve(arguments.images), img_size=224, root=runs.root() / "data")
    images = images.normalised(arguments.normalise)
    order = np.random.default_rng(0).permutation(len(images.test))
    looked_at, images.test = (images.test.take(np.sort(part)) for part in np.split(order, [arguments.analyse]))
    vit = models.create(arguments.arch, len(images.classes), 224, runs.resolve(arguments.weights)).eval()
    batches = [(evaluate.inputs(looked_at.images[i : i + 32], images), torch.as_tensor(looked_at.labels[i : i + 32]))
               for i in range(0, len(looked_at), 32)]  # fmt: skip

    scores = {"fisher": eap.scores(vit, batches)} | {name: make(vit) for name, make in rankings.PARTS.items()}
    table = acdc.against(acdc.effects(vit, [x for x, _ in batches[:2]], ("head", "neuron")), scores)
    print("Spearman's rank correlation with the KL of removing each head, each group of 64 neurons alone:")
    print(evaluate.rank_correlation(table, "effect", by="kind").round(2).to_string(), "\n", flush=True)

    plans = {"dense": surgery.Plan()}
    for threshold in arguments.thresholds:
        found = acdc.decide(vit, [x for x, _ in batches], threshold, "increment", ("head", "neuron"), progress=False)
        plan = components.plan(vit, [each.part for each in found if each.removed])
        plans[f"acdc τ={threshold:g}"] = plan
        print(f"acdc τ={threshold:g}: {plan.shares(vit)}", flush=True)
        if plan.shares(vit)["head"] > 0:
            plans |= {f"{name} like τ={threshold:g}": eap.plan(each, plan.shares(vit)) for name, each in scores.items()}
    plans |= {f"{name} {ratio:g}": eap.plan(each, ratio) for ratio in arguments.ratios for name, each in scores.items()}
    small = {name: surgery.remove(vit, plan) for name, plan in plans.items()}

    found = {name: evaluate.test(model, images) for name, model in small.items()}
    speed = evaluate.latency(small, evaluate.batch(images, 32), repeats=arguments.repeats, baseline="dense")
    table = pd.DataFrame({name: scores for name, (scores, _) in found.items()}).T[
        ["top1", "nll_nats", "macs_g", "params_m"]
    ]
    table = table.astype(float).join(speed.set_index("model")[["speedup"]])
    answers = {name: (each.logits.argmax(dim=1) == each.labels).numpy() for name, (_, each) in found.items()}
    partner = {name: f"fisher {name.partition(' ')[2]}" for name in plans}
    partner |= {name: name.replace("acdc", "fisher like") for name in plans if name.startswith("acdc")}
    table["p"] = [evaluate.mcnemar(answers[name], answers[other])["p_value"] if other in answers else None
                  for name, other in partner.items()]  # fmt: skip
    print(f"{arguments.arch}: {len(looked_at)} images decide, {len(images.test)} are the test, "
          f"{torch.get_num_threads()} threads")  # fmt: skip
    print(table.round(3).to_string())


if __name__ == "__main__":
    main()
