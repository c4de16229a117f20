"""The tables that several commands print."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibquant.cli import console

if TYPE_CHECKING:
    from torch import Tensor

    from calibquant.export.artifact import Size
    from calibquant.export.onnx_content import OnnxContent
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
        if m["deployed"] is not None:
            rows.append([
                "  its deploy.onnx", "", console.kilobytes((run.folder / "deploy.onnx").stat().st_size),
                console.percent(m["deployed"]["top1"]), console.percent(m["deployed"]["agreement"]),
                console.interval(m["deployed"]["agreement_interval"]),
            ])  # fmt: skip
    title = (
        f"{first['quantized']['count']} {first['evaluated_on']}, {first['calibration_images']} for calibration; "
        f"placement {first['placement']}, boundary {first['boundary']}"
    )
    console.print_table(title, ["network", "weight bits", "size", "top-1 %", "agreement %", "95 % interval"], rows)
    for name, reason in {
        n: r for run in runs for n, r in (run.metrics["parity"] or {}).get("not_written", {}).items()
    }.items():
        console.out.print(f"{name} was not written: {reason}")


def show_comparison(result: dict[str, Any]) -> None:
    """The closing table of a comparison: mean ± sd of each method at each setting."""
    from calibquant.studies.compare.markdown import facts, score_table

    console.out.print(facts(result))
    console.print_table("Mean ± sd (seeds)", *score_table(result))


def show_layers(layers: Sequence[dict[str, Any]]) -> None:
    """What became of each layer that was Gram-rounded."""
    rows = [
        [
            layer["layer"], console.percent(layer["loss_before"]), console.percent(layer["loss_after"]),
            "kept" if layer["kept"] else "rolled back", f"{layer['seconds']:.1f}",
        ]
        for layer in layers
    ]  # fmt: skip
    header = ["weight", "nearest", "Gram", "result", "seconds"]
    console.print_table("Gram rounding: squared error of each layer's outputs in percent", header, rows)


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
    coverage = model.coverage()
    noted = any(row.note for row in coverage)
    rows = [
        [
            row.node, row.op, "–" if row.weight_bits is None else f"{row.weight_bits:.3g}",
            " ".join("float" if bits is None else f"{bits:.3g}" for bits in row.input_bits), row.reason,
            *([row.note] if noted else []),
        ]
        for row in coverage
    ]  # fmt: skip
    header = ["node", "op", "weight bits", "input bits", "stays float because", *(["note"] if noted else [])]
    console.print_table("Coverage", header, rows)
    console.out.print(model.summary())


def show_ranges(model: QuantModel) -> None:
    """The activation quantizers with their scales."""
    rows = []
    for quantizer in model.activation_quantizers.values():
        scale, zero_point = "dynamic", "dynamic"
        if not quantizer.dynamic:
            scales, zero_points = quantizer.get()
            scale, zero_point = _span(scales, ".5g"), _span(zero_points, "d")
        rows.append([quantizer.name, f"{quantizer.mean_bits:.3g}", scale, zero_point, quantizer.plan.role])
    console.print_table("Activation ranges", ["quantizer", "bits", "scale", "zero point", "role"], rows)


def _span(values: Tensor, form: str) -> str:
    """A value, or the smallest and the largest of several."""
    low, high = values.min().item(), values.max().item()
    return f"{low:{form}}" if values.dim() == 0 else f"{low:{form}} to {high:{form}}"


def show_bytes(size: Size, files: dict[str, int]) -> None:
    """What the parts of the artifact take, and the files of the run that hold the network."""
    rows = [
        ["weights' codes", size.codes],
        ["scales and zero points", size.scales],
        ["float32 remainder (biases, unfolded norms)", size.remainder],
        ["all tensors", size.packed],
        ["as float32", size.float32],
        *files.items(),
    ]
    console.print_table("Bytes", ["part", "bytes"], [[str(part), f"{count:,}"] for part, count in rows])


def show_export(result: dict[str, Any]) -> None:
    """The closing table of an export: files, parity, what was left out and changed, accumulators."""
    rows = [
        [row["file"], f"{row['bytes']:,}", "–" if row["opset"] is None else str(row["opset"]), f"{row['of_float']:.3f}"]
        for row in result["files"]
    ]
    if "vectors" in result:
        rows.append([f"{result['vectors']}/", "–", "–", "–"])
    console.print_table("Files", ["file", "bytes", "opset", "of float"], rows)
    if "parity" in result:
        _show_parity(result)
    for name, reason in result.get("left_out", {}).items():
        console.out.print(f"{name} was not written: {reason}")
    for text in result.get("notes", ()):
        console.out.print(f"Note: {text}")
    if result.get("audit"):
        _show_audit(result["audit"])


def _show_parity(result: dict[str, Any]) -> None:
    parity = result["parity"]
    rows = []
    for file in parity["files"]:
        flips = file["flips"]
        changed = "–" if file["decisions"] is None else f"{len(flips)} of {file['decisions']}"
        rows.append([
            file["file"], file["against"], str(file["images"]), f"{file['relative']:.1e}", changed,
            "–" if not flips else f"{sum(flip['within'] for flip in flips)} of {len(flips)}",
        ])  # fmt: skip
    title = f"Parity in ONNX Runtime {parity['runtime']} on {parity['images']} {result['of']}"
    header = ["file", "against", "images", "largest difference", "decisions changed", "of these within the logit error"]
    console.print_table(title, header, rows)
    for other in ("simulation", "executor"):
        if parity[other]:
            console.out.print(_code_line(parity[other], other, parity["approximate"]))
    if parity["exact_on"]:
        console.out.print(f"deploy.onnx is exact on {parity['exact_on']}")


def _code_line(rows: Sequence[dict[str, Any]], other: str, approximate: Sequence[str]) -> str:
    total, differing = sum(row["count"] for row in rows), sum(row["differing"] for row in rows)
    text = f"deploy.onnx and the {other}: {differing:,} of {total:,} codes differ"
    if differing:
        worst = max(rows, key=lambda row: row["largest"])
        text += f", by up to {worst['largest']} steps ({worst['step']})"
    if other == "executor" and approximate:
        text += f"; computed in float, within one step of the grid: {', '.join(approximate)}"
    return text


def _show_audit(audit: Sequence[dict[str, Any]]) -> None:
    rows = [
        [
            row["step"], row["op"], str(row["products"]), f"{row['largest']:,}", str(row["bits"]),
            "none" if row["fits"] is None else f"int{row['fits']}", row["pairs"],
        ]
        for row in audit
    ]  # fmt: skip
    header = ["layer", "op", "products", "largest sum", "bits", "fits", "pairs in 16 bits"]
    console.print_table("Accumulators in the worst case", header, rows)
    narrow, wide = (sum((row["fits"] or 64) <= width for row in audit) for width in (16, 32))
    console.out.print(f"{narrow} of {len(audit)} layers fit int16 accumulators, {wide} int32")


def show_onnx(path: Path, content: OnnxContent) -> None:
    """What is inside an ONNX file."""
    console.out.print(
        f"{path}: {content.bytes:,} bytes, opset {content.opset}, IR {content.ir}, by {content.producer or 'unknown'}"
    )
    console.print_table("Nodes", ["op", "count"], [[op, str(count)] for op, count in content.nodes.items()])
    rows = [[t.type, str(t.count), f"{t.values:,}", f"{t.bytes:,}"] for t in content.tensors]
    console.print_table("Stored tensors", ["type", "count", "values", "bytes"], rows)
    if content.activation_bits:
        limits = ", ".join(f"{count} of {bits} bits" for bits, count in content.activation_bits.items())
        console.out.print(f"Quantized activations: {limits}")
    console.out.print(f"Convolutions and products on quantized inputs and weights: {content.integer}")
    if content.stays_float:
        console.out.print(f"Stays float: {', '.join(content.stays_float)}")
    for text in content.notes:
        console.out.print(f"Note: {text}")


def show_deployed(result: dict[str, Any], name: str) -> None:
    """The accuracy of an exported file, beside that of the float network and of the simulation."""
    columns = {
        title: result[key]
        for key, title in (("float", "float"), ("quantized", "simulated"), ("deployed", name))
        if result.get(key) is not None
    }
    rows = [["images", *(str(scores["count"]) for scores in columns.values())]]
    for key, title in (("top1", "top-1 %"), ("top5", "top-5 %"), ("agreement", "agreement with float %")):
        if any(scores[key] is not None for scores in columns.values()):
            rows.append([title, *(console.percent(scores[key]) for scores in columns.values())])
    losses = ["–" if scores["loss"] is None else f"{scores['loss']:.4f}" for scores in columns.values()]
    rows.append(["loss", *losses])
    if "agreement_with_simulation" in result:
        ends = [*["–"] * (len(columns) - 1), console.percent(result["agreement_with_simulation"])]
        rows.append(["agreement with the simulation %", *ends])
    console.print_table("Accuracy", ["measure", *columns], rows)


def show_classes(result: dict[str, Any]) -> None:
    """The scores of each class and the pairs that are confused most, where a result has them."""
    if "classes" in result:
        rows = [
            [
                row["name"], str(row["images"]), console.percent(row["accuracy"]), console.percent(row["precision"]),
                console.percent(row["f1"]), str(row["predicted"]),
            ]
            for row in result["classes"]
        ]  # fmt: skip
        header = ["class", "images", "accuracy (recall) %", "precision %", "F1 %", "predicted"]
        console.print_table("Classes", header, rows)
    if "confusion" in result:
        pairs = result["confusion"]["most_confused"]
        rows = [[p["label"], p["prediction"], str(p["images"]), console.percent(p["share"])] for p in pairs]
        console.print_table("Confused most", ["label", "predicted", "images", "of the label's %"], rows)
        console.out.print(f"Confusion matrix: {result['confusion']['file']}")


def show_bench(result: dict[str, Any]) -> None:
    """Latency and throughput."""
    rows = [
        [
            t["network"], str(t["threads"]), str(t["batch"]), f"{t['milliseconds']:.3f}",
            f"{t['images_per_second']:.1f}", f"{t['ratio']:.2f} ({t['ratio_low']:.2f}–{t['ratio_high']:.2f})",
            console.kilobytes(t["bytes"]),
        ]
        for t in result["timings"]
    ]  # fmt: skip
    title = f"{result['run']}, ONNX Runtime {result['runtime']}, medians of {result['rounds']} rounds (quartiles)"
    header = ["network", "threads", "batch", "ms", "images/s", "times float", "size"]
    console.print_table(title, header, rows)
    for text in result["notes"]:
        console.out.print(f"Note: {text}")
