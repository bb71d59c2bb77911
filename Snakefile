# A sweep as a graph of notebook runs: outputs/<notebook>/<run>/DONE is the target of each.
#
#   snakemake --cores 2 --configfile sweeps/demo.yaml
#
# A sweep file lists stages. Every list among a stage's parameters is varied, every combination is a run. `needs` says
# which parameter takes the run of an earlier stage, named by notebook or notebook/stage: the one that agrees in all
# parameters both stages vary. A list of them is only waited for: what a comparison's glob is to find.
import itertools
import json
import re
import sys
from pathlib import Path

from lib import params

OUTPUT = config.get("output_dir", "outputs")
THREADS = config.get("threads", 1)


def expand_stages(stages):
    """{"notebook/run": {"parameters": …, "varied": …, "upstream": [runs], "stage": …}}; parameters are checked first."""
    found = {}
    for stage in stages:
        notebook, label, given = stage["notebook"], stage.get("name", config["name"]), stage.get("parameters", {})
        declared = params.declared_in(Path(f"notebooks/{notebook}.ipynb"))
        # a parameter that is a list itself varies over a list of lists
        whole = {name for name, one in declared.items() if one.type is list and not any(
                 isinstance(value, list) for value in given.get(name) or [])}  # fmt: skip
        lists = {name: values for name, values in given.items() if isinstance(values, list) and name not in whole}
        earlier = dict(found)
        for combination in itertools.product(*lists.values()):
            varied = dict(zip(lists, combination))
            values = {**given, **varied}
            shown = [Path(v).stem if "/" in str(v) else v if isinstance(v, str) else f"{k}{v}" for k, v in varied.items()]
            name = re.sub(r"[^\w.=-]+", "_", "-".join([label, *shown]))
            if f"{notebook}/{name}" in found:
                sys.exit(f"{notebook}/{name}: two runs of this name, expected another name for one of the stages")
            upstream = []
            for parameter, needed in stage.get("needs", {}).items():
                wanted = {needed} if isinstance(needed, str) else {*needed}
                known = {stage for run, other in earlier.items() for stage in (run.split("/")[0], other["stage"])}
                if wanted - known:
                    sys.exit(f"{notebook}/{name}: its {parameter} needs {', '.join(wanted - known)}, no earlier stage")
                agreeing = [
                    run
                    for run, other in earlier.items()
                    if wanted & {run.split("/")[0], other["stage"]}
                    and all(varied.get(k, v) == v for k, v in other["varied"].items())
                ]
                upstream += agreeing
                if isinstance(needed, str) and len(agreeing) != 1:
                    sys.exit(f"{notebook}/{name}: {len(agreeing)} runs of {needed} fit its {parameter}, expected one")
                if isinstance(needed, str):
                    values[parameter] = f"{OUTPUT}/{agreeing[0]}"
            values |= {"run_name": name, "output_dir": OUTPUT}
            try:
                params.check(declared, values)
            except params.ParameterError as error:
                sys.exit(f"{notebook} in this sweep: {error}")
            run = {"parameters": values, "varied": varied, "upstream": upstream, "stage": f"{notebook}/{label}"}
            found[f"{notebook}/{name}"] = run
    return found


if "stages" not in config:
    sys.exit("no sweep given: snakemake --cores 2 --configfile sweeps/demo.yaml")
RUNS = expand_stages(config["stages"])
print(f"{config['name']}: {len(RUNS)} runs below {OUTPUT}/, then {OUTPUT}/report/index.html", file=sys.stderr)


rule all:
    input:
        f"{OUTPUT}/report/index.html",


rule notebook:
    input:
        source="notebooks/{notebook}.ipynb",
        lib=sorted(str(file) for file in Path("lib").rglob("*.py")),
        upstream=lambda wildcards: [f"{OUTPUT}/{run}/DONE" for run in RUNS[f"{wildcards.notebook}/{wildcards.run}"]["upstream"]],
    output:
        f"{OUTPUT}/{{notebook}}/{{run}}/DONE",
        f"{OUTPUT}/{{notebook}}/{{run}}/metrics.json",
    log:
        f"{OUTPUT}/{{notebook}}/{{run}}/notebook.ipynb",
    threads: THREADS
    params:
        values=lambda wildcards: json.dumps(RUNS[f"{wildcards.notebook}/{wildcards.run}"]["parameters"]),
    # A run that was finished once is here because the notebook or lib changed: it trains anew. One that was stopped
    # has no provenance yet and goes on from its last state.
    shell:
        """
        run=$(dirname {log}); began=$SECONDS
        if [ -e $run/provenance.json ]; then rm -rf $run/last $run/parts $run/provenance.json; fi
        echo "$(date +%T) start {wildcards.notebook}/{wildcards.run}"
        OMP_NUM_THREADS={threads} papermill {input.source} {log} -k python3 --no-progress-bar -y {params.values:q} \
            > $run/log.txt 2>&1 || {{ echo "failed: {wildcards.notebook}/{wildcards.run}, see $run/log.txt"; \
            tail -n 2 $run/log.txt; exit 1; }}
        echo "$(date +%T) done  {wildcards.notebook}/{wildcards.run} ($((SECONDS - began)) s)"
        """


rule report:
    input:
        [f"{OUTPUT}/{run}/DONE" for run in RUNS],
        "report/build.py",
    output:
        f"{OUTPUT}/report/index.html",
    shell:
        "python report/build.py {OUTPUT}"
