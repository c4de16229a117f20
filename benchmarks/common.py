"""What the benchmark scripts share: where real data lies, and writing results as JSON and Markdown."""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path
from typing import Any

from calibquant.cli.waiting import wait_briefly

wait_briefly()  # before torch is imported

import torch  # noqa: E402

from calibquant.export.processor import runtime_saturates  # noqa: E402

RESULTS = Path(__file__).parent / "results"


def parser(description: str | None) -> argparse.ArgumentParser:
    """--data: the folder of real data (see its use in each script); --runs: where run folders go."""
    result = argparse.ArgumentParser(description=description)
    result.add_argument(
        "--data", type=Path, required=True, help="folder with weights/, imagenet/, cifar-10-batches-bin/"
    )
    result.add_argument("--runs", type=Path, default=Path("runs"), help="folder that receives the run folders")
    result.add_argument("--threads", type=int, default=torch.get_num_threads())
    return result


def processor() -> dict[str, str]:
    """The features of this processor on which figures depend, and how ONNX Runtime's 8-bit kernels add here."""
    info = Path("/proc/cpuinfo")
    flags = set(info.read_text(encoding="utf-8", errors="replace").split()) if info.is_file() else set()
    known = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "asimddp", "i8mm")
    found = " ".join(flag for flag in known if flag in flags) or "not known"
    kernels = "saturating" if runtime_saturates() else "exact"
    return {"machine": platform.machine(), "features": found, "8-bit kernels": kernels}


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["-"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def write(name: str, command: str, facts: dict[str, Any], markdown: str) -> None:
    """results/<name>.json and results/<name>.md; both name the command that makes them."""
    RESULTS.mkdir(exist_ok=True)
    machine = {"python": platform.python_version(), "torch": torch.__version__, "processor": processor()}
    text = json.dumps({"command": command, "machine": machine, **facts}, indent=1)
    (RESULTS / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    (RESULTS / f"{name}.md").write_text(f"Made by `{command}`.\n\n{markdown}", encoding="utf-8")
    print(markdown)
