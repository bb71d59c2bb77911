# A sweep as a graph of notebook runs: outputs/<notebook>/<run>/DONE is the target of each. What a sweep file says, and how
# it becomes runs: lib/sweeps.py.
#
#   snakemake --cores 2 --configfile sweeps/quick.yaml        (or make sweep SWEEP=…)
import json
import sys
from pathlib import Path

sys.path.insert(0, workflow.basedir)
from lib import sweeps

try:
    RUNS = sweeps.expand(config)
except sweeps.SweepError as error:
    sys.exit(str(error))
OUTPUT = sweeps.output_of(config)
PLANNED = lambda wildcards: RUNS[f"{wildcards.notebook}/{wildcards.run}"]
if workflow.is_main_process:
    print(f"{config['name']}: {len(RUNS)} runs below {OUTPUT}/, then {OUTPUT}/report/index.html", file=sys.stderr)


rule all:
    input:
        [f"{OUTPUT}/{run}/DONE" for run in RUNS],  # a report of what there is does not make the rest needless
        f"{OUTPUT}/report/index.html",


rule notebook:
    input:
        sources=lambda wildcards: sweeps.sources(wildcards.notebook),
        files=lambda wildcards: PLANNED(wildcards).files,
        upstream=lambda wildcards: [f"{OUTPUT}/{run}/DONE" for run in PLANNED(wildcards).upstream],
    output:
        f"{OUTPUT}/{{notebook}}/{{run}}/DONE",
        f"{OUTPUT}/{{notebook}}/{{run}}/metrics.json",
    log:
        f"{OUTPUT}/{{notebook}}/{{run}}/notebook.ipynb",
    threads: lambda wildcards: PLANNED(wildcards).threads
    resources:
        gpu=lambda wildcards: PLANNED(wildcards).resources.get("gpu", 0),
        mem_mb=lambda wildcards: PLANNED(wildcards).resources.get("mem_mb", 4000),
        runtime=lambda wildcards: PLANNED(wildcards).resources.get("runtime", 240),
    params:
        values=lambda wildcards: json.dumps(PLANNED(wildcards).parameters),
        folder=lambda wildcards: f"{OUTPUT}/{wildcards.notebook}/{wildcards.run}",
    shell:
        "python -m lib.sweeps {wildcards.notebook} {params.folder:q} {params.values:q}"
        " {threads} {resources.gpu} {input.files:q} {input.upstream:q}"


rule report:
    input:
        [f"{OUTPUT}/{run}/DONE" for run in RUNS],
        sorted(str(file) for file in Path("report").glob("*.*")),
    output:
        f"{OUTPUT}/report/index.html",
    localrule: True
    shell:
        "python report/build.py {OUTPUT:q}"


# The report of what was finished is worth having all the same.
onerror:
    shell("python report/build.py {OUTPUT:q} || true")
    print(*sweeps.unfinished(Path(OUTPUT), RUNS), sep="\n", file=sys.stderr)
