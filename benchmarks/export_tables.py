"""The page of the exports' benchmark, from its rows."""

from __future__ import annotations

from typing import Any

import common

from calibquant.studies.bench import PEER

TRACED = 6  # flips of a row that are followed to the first code that differs
UNTRAINED = "ResNet-18"
Row = dict[str, Any]

RATIO = "{ratios[%d][0]:.2f} ({ratios[%d][1]:.2f}–{ratios[%d][2]:.2f})"
COLUMNS = {
    "parity": {
        "images": "{codes[images]}", "codes": "{codes[compared]:,}", "other than the executor's": "{codes[differing]}",
        "other than the simulation's (steps)": "{codes[simulation_differing]:,} ({codes[simulation_largest]})",
        "decisions": "{images}", "changed": "{changed}",
        "changed by the simulation in float32": "{float32[changed]}",
        "top-1 simulated; deployed": "{top1[0]:.2%}; {top1[1]:.2%}",
        "logit error (median; largest)": "{logit_error_median:.1e}; {logit_error_largest:.1e}",
        "same logits in the older runtime": "{old[runtime]}: {old[images_equal]}/{old[images]}",
    },
    "size": {"float": "{bytes[float.onnx]:,}", "deploy": "{bytes[deploy.onnx]:,}",
             "--storage int8": "{bytes[deploy-int8.onnx]:,}", "both give the same logits": "{same}"},
    "openvino": {"OpenVINO": "{openvino}", "file": "{file}", "images": "{images}", "decisions changed": "{changed}",
                 "logits differ by at most": "{largest:.2g}"},
    "speed": {"file": "{what}", "batch": "{batch}", "ms a batch": "{ms:.2f}",
              "times as fast as float (quartiles)": RATIO % (0, 0, 0), f"as {PEER}": RATIO % (1, 1, 1)},
    "flips": {"image": "{image}", "margin": "{margin:.2g}", "logit error": "{error:.2g}",
              "first value with other codes": "{step}", "codes": "{codes} of {of}",
              "the simulation's distance from a tie": "{tie_simulation:.0e}"},
}  # fmt: skip


def table(part: str, rows: list[Row], inner: str = "") -> str:
    """A line for each row, or for each of the rows within it."""
    lines = [[row["network"], row["setting"], *(text.format(**line) for text in COLUMNS[part].values())]
             for row in rows for line in (row[inner] if inner else [row])]  # fmt: skip
    return common.table(["network", "setting", *COLUMNS[part]], lines)


def flips(rows: list[Row]) -> str:
    """The share of equal decisions, and the first flips of each row."""
    trained = [row for row in rows if row["network"] != UNTRAINED]
    count, wrong = (sum(row[key] for row in trained) for key in ("images", "changed"))
    within = [flip["within"] for row in rows for flip in row["flips"]]
    traced = [row | {"flips": [flip for flip in row["flips"] if "step" in flip]} for row in rows]
    text = f"\nONNX Runtime {rows[0]['runtime']}. Of trained networks {count - wrong} of {count} decisions are equal; "
    text += f"{sum(within)} of {len(within)} flips have a margin within their image's logit error. "
    return text + f"The first {TRACED} flips of a row:\n\n" + table("flips", traced, "flips")


def tables(facts: dict[str, list[Row]]) -> str:
    text = "Boundary `qdrop`, integer placement, nearest rounding, `mse` ranges, one thread.\n"
    for part, every in facts.items():
        rows = [row for row in every if "error" not in row]
        if rows:
            text += f"\n## {part.capitalize()}\n\n" + table(part, rows, "rows" if part == "speed" else "")
        text += flips(rows) if rows and part == "parity" else ""
        text += "".join(f"\n{r['network']} {r['setting']} failed: {r['error']}\n" for r in every if "error" in r)
    return text
