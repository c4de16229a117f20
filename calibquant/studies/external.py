"""8-bit quantization by other tools, as baselines: PyTorch's own PTQ and ONNX Runtime's, in their usual settings."""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import chain
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, fx, nn

from calibquant.errors import ModelError
from calibquant.evaluation.onnx_network import OnnxNetwork
from calibquant.export.file_names import FLOAT
from calibquant.export.onnx_content import parse
from calibquant.export.onnx_writer import float_onnx
from calibquant.export.session import brief, open_session
from calibquant.pipeline import Prepared
from calibquant.quantization import QuantModel, make_plan
from calibquant.recipe import QuantRecipe

Images = npt.NDArray[np.float32]
LEAVE_OUT = "leave this method out"


@dataclass(frozen=True, eq=False)
class Converted:
    """A network that another tool has quantized.

    Args:
        network: from images (N, C, H, W) to logits, on the CPU.
        bytes: of the file, or of the tensors that the network reads where the tool writes none.
        weight_bits: mean bits of a weight, those that it left in float32 included.
    """

    network: nn.Module
    bytes: int
    weight_bits: float


@dataclass(frozen=True)
class External:
    """Another tool's method.

    Args:
        convert: from the float network and batches of calibration images (N, C, H, W).
        package: what it imports.
        install: how a user gets that.
    """

    convert: Callable[[Prepared, Iterable[Tensor]], Converted]
    package: str
    install: str

    def check(self, name: str) -> None:
        """See that the package is there.

        Raises:
            ModelError: it is not.
        """
        if find_spec(self.package) is None:
            raise ModelError(name, f"needs {self.package}, which is not installed", self.install)


def framework_int8(prepared: Prepared, batches: Iterable[Tensor]) -> Converted:
    """PyTorch's static PTQ (PT2E, package torchao) as its x86 backend sets it up, simulated by PyTorch.

    Weights int8, symmetric, per channel, by min-max; activations uint8 per tensor from histograms; convolutions and
    linear layers with what the backend fuses to them. It gets the captured network, BatchNorm folded.

    Raises:
        ModelError: the tool does not take the network.
    """
    batches = iter(batches)
    example = next(batches)
    with quiet(), torch.no_grad():
        try:
            network = _pt2e(prepared.teacher, example, chain([example], batches))
        except Exception as error:  # tools of another package, which raise anything
            raise ModelError("framework-int8", f"does not take the network ({brief(error)})", LEAVE_OUT) from None
    read = _tensors_read(network)
    low = sum(t.numel() for t in read if t.dtype == torch.int8 and t.dim() > 1)
    if not low:
        raise ModelError("framework-int8", "quantizes nothing of this network", LEAVE_OUT)
    size = sum(t.numel() * t.element_size() for t in read)
    return Converted(network, size, _mean_bits(prepared, low))


def _pt2e(network: fx.GraphModule, example: Tensor, batches: Iterable[Tensor]) -> fx.GraphModule:
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    two = torch.cat([example, example])[:2]  # a batch of one image would be taken for a constant size
    sizes = ({0: torch.export.Dim("batch")},)
    # strict: without it the backend knows layers by their modules, and those that share one ReLU stop it.
    exported = torch.export.export(network, (two,), dynamic_shapes=sizes, strict=True).module()
    backend = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    observed = prepare_pt2e(exported, backend)
    for batch in batches:
        observed(batch)
    return convert_pt2e(observed)


def _tensors_read(network: fx.GraphModule) -> list[Tensor]:
    """The tensors that the graph reads; the float weights, which a converted network keeps too, are not."""
    state = network.state_dict()
    names = {str(node.target) for node in network.graph.nodes if node.op == "get_attr"}
    return [tensor for name, tensor in state.items() if name in names]


def onnxruntime_int8(prepared: Prepared, batches: Iterable[Tensor]) -> Converted:
    """ONNX Runtime's quantize_static of float.onnx, run by ONNX Runtime; see `static_peer`.

    Raises:
        ModelError: the tool does not take the network.
    """
    batches = iter(batches)
    example = next(batches)
    model = QuantModel(prepared.teacher, make_plan(prepared.teacher, QuantRecipe()))  # only its float network counts
    data = static_peer(float_onnx(model, example), (batch.numpy() for batch in chain([example], batches)))
    low = sum(int(np.prod(t.dims)) for t in parse("quantized.onnx", data).graph.initializer
              if t.data_type == _int8() and len(t.dims) > 1)  # fmt: skip
    network = OnnxNetwork(open_session("onnxruntime-int8", data, torch.get_num_threads()))
    return Converted(network, len(data), _mean_bits(prepared, low))


def _int8() -> int:
    from onnx import TensorProto

    return int(TensorProto.INT8)


def _mean_bits(prepared: Prepared, low: int) -> float:
    """Bits of a weight where `low` of them have 8 bits and the others 32."""
    weights = sum(p.numel() for p in prepared.network.parameters() if p.dim() > 1)
    return 32 - 24 * low / weights


METHODS = {
    "framework-int8": External(framework_int8, "torchao", "pip install 'calibquant[baselines]'"),
    "onnxruntime-int8": External(onnxruntime_int8, "onnxruntime", "pip install 'onnxruntime>=1.25'"),
}


def static_peer(model: bytes, images: Iterable[Images]) -> bytes:
    """What ONNX Runtime's own quantizer makes of a float network: QDQ, uint8 activations, int8 weights per channel.

    Args:
        model: an ONNX file.
        images: calibration images in batches, float32 (N, C, H, W).

    Raises:
        ModelError: it does not take the network.
    """
    name = open_session(FLOAT, model, 1).inputs[0][0]
    feeds = ({name: batch} for batch in images)
    with tempfile.TemporaryDirectory() as folder, quiet():
        source, target = Path(folder) / FLOAT, Path(folder) / "quantized.onnx"
        source.write_bytes(model)
        try:
            _quantize_static(source, target, feeds)
            return target.read_bytes()
        except ImportError as error:
            raise ModelError(PEER, f"is not available ({brief(error)})", "pip install onnx sympy") from None
        except Exception as error:  # a tool of another package, which raises anything
            raise ModelError(PEER, f"does not take float.onnx ({brief(error)})", "its figure is left out") from None


PEER = "ONNX Runtime quantize_static W8A8"


def _quantize_static(source: Path, target: Path, feeds: Iterator[dict[str, Images]]) -> None:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def get_next(self) -> dict[str, Images] | None:
            return next(feeds, None)

    quantize_static(
        str(source), str(target), Reader(), quant_format=QuantFormat.QDQ, per_channel=True,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
    )  # fmt: skip


@contextmanager
def quiet() -> Iterator[None]:
    """Other tools set up logging when they are imported, and warn of what they are asked for."""
    root, disabled = logging.root, logging.root.manager.disable
    handlers, level = list(root.handlers), root.level
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        root.handlers[:] = handlers
        root.setLevel(level)
