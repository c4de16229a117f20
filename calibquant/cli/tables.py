"""The tables that several commands print."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from calibquant.cli import console

if TYPE_CHECKING:
    from calibquant.export.artifact import Size
    from calibquant.pipeline import Run
    from calibquant.quantization import QuantModel


def show_result(runs: Sequence[Run]) -> None:
    """The closing table of one or more runs of one network."""
    first = runs[0].metrics
    size, top1 = console.kilobytes(first["size"]["float32"]), console.percent(first["float"]["top1"])
    rows = [["float", "32", size, top1, "–", "–"]]
    for run in runs:
        m = run.metrics
        method = "" if m["reconstruction"] == "none" else f" {m['reconstruction']}"
        rows.append([
            m["setting"] + method, f"{m['size']['weight_bits']:.2f}", console.kilobytes(m["size"]["file"]),
            console.percent(m["quantized"]["top1"]), console.percent(m["quantized"]["agreement"]),
            console.interval(m["quantized"]["agreement_interval"]),
        ])  # fmt: skip
    title = (
        f"{first['quantized']['count']} {first['evaluated_on']}, {first['calibration_images']} for calibration; "
        f"placement {first['placement']}, boundary {first['boundary']}"
    )
    console.print_table(title, ["network", "weight bits", "size", "top-1 %", "agreement %", "95 % interval"], rows)


def show_comparison(result: dict[str, Any]) -> None:
    """The closing table of a comparison: mean ± sd of each method at each setting."""
    from calibquant.studies.compare.markdown import facts, score_table

    console.out.print(facts(result))
    console.print_table("Mean ± sd (seeds)", *score_table(result))


def show_units(units: Sequence[dict[str, Any]]) -> None:
    """What became of each reconstructed unit."""
    rows = [
        [
            unit["unit"], unit["phase"], f"{unit['loss_before']:.4g}", f"{unit['loss_after']:.4g}",
            "kept" if unit["kept"] else "rolled back", f"{100 * unit['settled']:.0f}", f"{unit['seconds']:.1f}",
        ]
        for unit in units
    ]  # fmt: skip
    header = ["unit", "learned", "loss before", "loss after", "result", "roundings settled %", "seconds"]
    console.print_table("Reconstructed units", header, rows)


def show_errors(errors: Sequence[dict[str, Any]]) -> None:
    """How the error grows through the network, before and after reconstruction."""
    rows = [[row["after"], console.percent(row["nearest"]), console.percent(row["reconstructed"])] for row in errors]
    console.print_table(
        "Relative feature error: |quantized - float| / |float| in percent, on calibration images",
        ["after node", "nearest rounding", "reconstructed"], rows,
    )  # fmt: skip


def show_coverage(model: QuantModel) -> None:
    """The compute nodes with their bits, or why they stay float."""
    rows = [
        [
            row.node, row.op, "–" if row.weight_bits is None else str(row.weight_bits),
            " ".join("float" if bits is None else str(bits) for bits in row.input_bits), row.reason,
        ]
        for row in model.coverage()
    ]  # fmt: skip
    console.print_table("Coverage", ["node", "op", "weight bits", "input bits", "stays float because"], rows)
    console.out.print(model.summary())


def show_ranges(model: QuantModel) -> None:
    """The activation quantizers with their scales."""
    rows = []
    for quantizer in model.activation_quantizers.values():
        scale, zero_point = "dynamic", "dynamic"
        if not quantizer.dynamic:
            scale, zero_point = f"{quantizer.get()[0].item():.5g}", str(int(quantizer.get()[1]))
        rows.append([quantizer.name, str(quantizer.plan.grid.bits), scale, zero_point, quantizer.plan.role])
    console.print_table("Activation ranges", ["quantizer", "bits", "scale", "zero point", "role"], rows)


def show_bytes(size: Size, file: int) -> None:
    """What the parts of the artifact take."""
    rows = [
        ["weights' codes", size.codes],
        ["scales and zero points", size.scales],
        ["float32 remainder (biases, unfolded norms)", size.remainder],
        ["all tensors", size.packed],
        ["file", file],
        ["as float32", size.float32],
    ]
    console.print_table("Bytes", ["part", "bytes"], [[str(part), f"{count:,}"] for part, count in rows])
