"""What the report says of a comparison: its rows with all that is known of each arm, the columns of its tables, which
arm is best at each budget and how sure that is, in words.

It reads the JSON tables that compare.ipynb wrote. Those of older comparisons, which lack some, do as well.
"""

import re
from typing import Any, NamedTuple

SURE = 0.05  # p below which a difference is called one
SPEEDS = (1.25, 1.5, 2, 3, 4)  # budgets: at least so many times the baseline's speed
SHARES = (0.75, 0.5, 0.35, 0.25)  # and at most this share of its multiply-adds
POINTS = ("difference", "low", "high", "difference_random", "low_random", "high_random")
BRIEF = ("score", "difference", "difference_random", "speedup", "macs_g")  # columns of the table of budgets
TITLES = {"top1": "accuracy", "top5": "top-5 accuracy", "f1_macro": "macro-F1"}
# What a comparison may hold besides its summary, and what is not said without it.
PARTS = {
    "paired": "paired intervals, Holm-corrected p and differences to random choices",
    "volumes": "which method is best over all budgets",
    "calibration": "calibration after temperature scaling",
    "foreground": "where patches stay",
}


class Column(NamedTuple):
    """key: of the number that the column is sorted by; style: of the text, from a row's values."""

    title: str
    key: str
    style: str
    hint: str = ""

    def text(self, row: dict[str, Any]) -> str:
        return signed(self.style.format_map(row)) if row.get(self.key) is not None else "–"


def columns(metric: str, paired: bool) -> list[Column]:
    """Of the main table, after the arm's."""
    title, interval = TITLES.get(metric, metric), "{difference:+.1f} [{low:+.1f}, {high:+.1f}]"
    difference = (
        Column("to baseline", "difference", interval, "accuracy of the first seed, points, paired 95 % interval"),
        Column("p, Holm", "p_holm", "{p_holm_text}", "McNemar's test, corrected for all rows at once"),
    )
    uncorrected = (
        Column("to baseline", "difference", "{difference:+.1f}", "points, means over seeds"),
        Column("p", "p", "{p_text}", "McNemar's test of the first seed, not corrected for many comparisons"),
    )
    random = Column(
        "to random",
        "difference_random",
        "{difference_random:+.1f} [{low_random:+.1f}, {high_random:+.1f}]",
        "accuracy of the first seed against random choices at the same cost, points, paired 95 % interval",
    )
    return [
        Column("seeds", "seeds", "{seeds}"),
        Column(f"{title}, %", "score", "{score_text}", "mean over seeds ± half of its 95 % interval"),
        *(difference if paired else uncorrected),
        random,
        Column("GMACs", "macs_g", "{macs_g:.3f}", "multiply-adds per image, 10⁹"),
        Column("M parameters", "params_m", "{params_m:.2f}"),
        Column("ms / batch", "latency_ms", "{latency_ms:.1f}", "median"),
        Column("speed", "speedup", "{speedup:.2f}×", "against the baseline, timed in turns"),
    ]


MORE = [
    Column("speed, middle half", "speedup_iqr", "± {half_iqr:.2f}", "half of the interquartile range of the ratios"),
    Column("of ceiling", "of_ceiling", "{of_ceiling:.0%}", "share of the speed with tokens chosen for nothing"),
    Column("ECE", "ece", "{ece:.3f}", "expected calibration error, test images"),
    Column("ECE scaled", "ece_scaled", "{ece_scaled:.3f}", "after temperature scaling on the validation images"),
    Column("temperature", "temperature", "{temperature:.2f}"),
    Column("foreground", "precision", "{precision:.0%}", "share of the kept patches that is foreground"),
    Column("by chance", "precision_random", "{precision_random:.0%}", "of as many patches at random"),
    Column("foreground kept", "recall", "{recall:.0%}", "share of the foreground that stays"),
    Column("blocks / patch", "mean_depth", "{mean_depth:.2f}", "mean number of blocks that a patch runs"),
    Column("macro-F1", "f1_macro", "{f1_macro:.3f}"),
    Column("random arm", "random", "{random}", "random choices at the same cost, within 5 % of the multiply-adds"),
    Column("p to it", "p_random", "{p_random_text}", "McNemar's test"),
]


def more(metrics: dict[str, Any]) -> list[Column]:
    """MORE, and behind what it says of speed the speed-ups in the comparison's further settings."""
    settings = [name for name in (metrics.get("elsewhere") or [{}])[0] if name != "arm"]
    hint = "speed against the baseline at other batch sizes or in another precision, timed in turns"
    return [*MORE[:2], *(Column(f"speed, {name}", name, f"{{{name}:.2f}}×", hint) for name in settings), *MORE[2:]]


def signed(text: str) -> str:
    """With real minus signs before numbers."""
    return re.sub(r"(?<!\w)-(?=\d)", "−", text)


def probability(p: float | None) -> str:
    if p is None:
        return "–"
    return "< 0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def rows(metrics: dict[str, Any], metric: str) -> list[dict[str, Any]]:
    """One per arm: all that the comparison's tables say of it, differences in points of 100."""
    found = []
    parts = ("paired", "calibration", "foreground", "elsewhere")
    by_arm = {name: {row["arm"]: row for row in metrics.get(name, [])} for name in parts}
    speed = {row["model"]: row for row in metrics.get("speed", [])}
    for row in metrics.get("summary", []):
        row = dict(row) | {"difference_of_means": 100 * row["difference"]}
        for table in by_arm.values():
            row |= table.get(row["arm"], {})
        row["speedup_iqr"] = speed.get(row["arm"], {}).get("speedup_iqr")
        row["half_iqr"] = (row["speedup_iqr"] or 0) / 2
        row |= {name: 100 * row[name] for name in POINTS if row.get(name) is not None}
        row["baseline"] = row["arm"] == metrics.get("baseline")
        row["setting"] = row["arm"].removeprefix(row.get("method") or "").strip()
        row["score"] = 100 * row[metric]
        row["score_text"] = f"{row['score']:.1f}" + (f" ± {100 * row['±']:.1f}" if row.get("±") is not None else "")
        row |= {f"{name}_text": probability(row.get(name)) for name in ("p", "p_holm", "p_random")}
        row["verdict"] = verdict(row)
        if row["baseline"]:
            row["difference"] = None  # of no interest
        found.append(row)
    return found


def verdict(row: dict[str, Any]) -> str:
    """ "better" or "worse" than the baseline, "" where they are not told apart: by the first seed, if the mean over
    seeds does not say the opposite."""
    p = row.get("p_holm", row.get("p"))
    if p is None or p >= SURE or row["difference"] * row["difference_of_means"] <= 0:
        return ""
    return "better" if row["difference"] > 0 else "worse"


def sure(row: dict[str, Any]) -> str:
    """How sure it is that an arm is as good as it looks, in words."""
    if row["baseline"]:
        return "It is the baseline."
    named = {
        "": "Not told apart from the baseline",
        "better": "Better than the baseline",
        "worse": "Worse than the baseline",
    }
    by = "" if row["seeds"] == 1 else ", by the first seed"
    said = [f"{named[row['verdict']]}{by}: {row['difference']:+.1f} points"]
    if row.get("low") is not None:
        said[0] += f", 95 % interval {row['low']:+.1f} to {row['high']:+.1f}, p {_relation(row['p_holm_text'])}."
    else:
        said[0] += f", p {_relation(row['p_text'])}, not corrected for many comparisons."
    if row.get("difference_random") is not None:
        said.append(f"{row['difference_random']:+.1f} to random choices at the same cost.")
    said.append("One training run: another seed may differ." if row["seeds"] == 1
                else f"Means over {row['seeds']} seeds: {row['difference_of_means']:+.1f}.")  # fmt: skip
    return signed(" ".join(said))


def _relation(p: str) -> str:
    return p if p.startswith("<") else f"= {p}"


def budgets(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The most accurate arm at each budget of time and of multiply-adds, and the next best of another method."""
    base = next((row for row in rows if row["baseline"]), None)
    if base is None:
        return []
    wishes = [(f"{1 / least:.0%} of its time", "speedup", -least) for least in SPEEDS]
    wishes += [(f"{most:.0%} of its multiply-adds", "macs_g", most * base["macs_g"]) for most in SHARES]
    found = []
    for wish, cost, limit in wishes:
        sign = -1 if cost == "speedup" else 1
        within = [row for row in rows if row.get(cost) is not None and sign * row[cost] <= limit]
        within.sort(key=lambda row: -row["score"])
        if within:
            others = [row for row in within if row["method"] != within[0]["method"]]
            found.append({"wish": wish, "row": within[0], "next": _behind(within[0], others)})
    return found


def _behind(best: dict[str, Any], others: list[dict[str, Any]]) -> str:
    if not others:
        return "no other is this cheap"
    gap = f"{best['score'] - others[0]['score']:.1f}"
    return f"{others[0]['arm']}, " + ("level" if gap == "0.0" else f"{gap} behind")
