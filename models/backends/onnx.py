"""Every part exported to ONNX once and run by onnxruntime, on its CUDA or CPU provider.

Exports lie in the setup's cache under their weights' digest: `<part>.<sha256 of the file>.onnx`, with digest,
part and versions in the metadata. What does not match on load is exported again.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from secrets import token_hex
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from models.backbones.interface import Segment
from models.backends.interface import TOLERANCE, Backend, BackendUnavailable, Executor, Place, Setup, relative_error
from models.backends.parts import Part, Program, make_programs
from models.store import sha256

OPSET = 20  # Gelu and LayerNormalization as single operators
FORMAT = 1
LIMIT_BYTES = 1_500_000_000  # an ONNX file ends at 2 GiB
KINDS = {torch.float32: np.float32, torch.int64: np.int64}
log = logging.getLogger(__name__)


def build(setup: Setup) -> Backend:
    """Load, or first export, every part. Unavailable without onnxruntime, or an exporter where one is needed."""
    began = time.monotonic()
    if setup.precision != "fp32":
        raise BackendUnavailable(f"exports run in fp32, this network in {setup.precision}: set OFFRAMP_PRECISION")
    exports, segments = Exports(setup), short_segments(setup)
    programs = make_programs(setup, segments, exports.program)
    took = time.monotonic() - began
    note = f"{exports.provider[0]}, {len(programs.programs)} parts ({exports.made} exported) in {took:.1f} s"
    return Executor("onnx", note, setup, programs, segments)


def provider_for(device: torch.device) -> tuple[str, dict[str, int]]:
    """onnxruntime's provider for a torch device and its options; float32 stays float32."""
    if device.type == "cuda":
        return "CUDAExecutionProvider", {"device_id": device.index or 0, "use_tf32": 0}
    return "CPUExecutionProvider", {}


def short_segments(setup: Setup) -> list[Segment]:
    """The setup's segments, those too large for one file cut in pieces that run on the same rows."""
    weights = sum(p.numel() * p.element_size() for p in setup.backbone.parameters())
    most = max(1, LIMIT_BYTES * setup.backbone.depth // max(weights, 1))
    return [
        Segment(start, min(start + most, segment.stop), segment.rank)
        for segment in setup.segments
        for start in range(segment.start, segment.stop, most)
    ]


class BadExport(Exception):
    """A file that is not, or no longer, the export of a part of this network."""


class Exports:
    """The exported parts of one model in the cache; `made` counts those that had to be exported.

    Raises:
        BackendUnavailable: there is no onnxruntime for the device.
    """

    def __init__(self, setup: Place) -> None:
        if not importlib.util.find_spec("onnxruntime"):
            raise BackendUnavailable("the package onnxruntime is not installed: install the extra `cpu` or `gpu`")
        import onnxruntime

        self.setup, self.provider, self.made = setup, provider_for(setup.device), 0
        if self.provider[0] not in onnxruntime.get_available_providers():
            raise BackendUnavailable(
                f"onnxruntime has no {self.provider[0]} here: install onnxruntime-gpu (extra `gpu`)"
            )
        self.folder = setup.cache / "onnx" / (setup.weights[:16] or "unnamed")

    def program(self, part: Part) -> Program:
        """The part's session, from its file where that is good, else exported anew (and the reason logged)."""
        for path in sorted(self.folder.glob(f"{part.name}.*.onnx")):
            try:
                return self._load(part, path)
            except BadExport as error:
                log.warning("%s: exported again", error)
                path.unlink(missing_ok=True)
            except FileNotFoundError:  # another process found it wanting
                continue
        try:
            return self._load(part, self._export(part))
        except OSError as error:
            raise BackendUnavailable(f"cannot keep exports: {error}; set OFFRAMP_CACHE_DIR") from error
        except BadExport as error:
            raise BackendUnavailable(f"the exporter made a wrong file: {error}") from error

    def _metadata(self, part: Part) -> dict[str, str]:
        """What a file must say to be the part's."""
        origin = {"weights": self.setup.weights, "part": part.name, "opset": OPSET, "format": FORMAT}
        return {f"offramp.{key}": str(value) for key, value in origin.items()}

    def _load(self, part: Part, path: Path) -> Program:
        import onnxruntime

        if sha256(path)[:32] != path.name.split(".")[-2]:
            raise BadExport(f"{path} is damaged")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.add_session_config_entry("session.force_spinning_stop", "1")
        try:
            session = onnxruntime.InferenceSession(path, options, providers=[self.provider])
        except Exception as error:
            raise BackendUnavailable(f"onnxruntime cannot run {path}: {error}") from error
        if session.get_providers()[0] != self.provider[0]:
            raise BackendUnavailable(f"onnxruntime's {self.provider[0]} does not start: its CUDA libraries are missing")
        said = session.get_modelmeta().custom_metadata_map
        for key, value in self._metadata(part).items():
            if said.get(key) != value:
                raise BadExport(f"{path} has {key} {said.get(key)}, not {value}")
        on_host = self.setup.device.type == "cpu"
        program = HostSession(session, part) if on_host else BoundSession(session, part, self.setup.device)
        self._check(part, program, path)
        return program

    def _check(self, part: Part, program: Program, path: Path) -> None:
        """Against the network as it is: its code or settings may have changed where its weights did not."""
        given = part.example(2)
        try:
            with torch.no_grad():
                error = max(map(relative_error, program(*given), part.run(*given)))
        except Exception as problem:  # inputs or outputs that the part no longer has
            raise BadExport(f"{path} does not run as {part.name}: {problem}") from problem
        if not error <= TOLERANCE:
            raise BadExport(f"{path} differs from the network by {error:.1e}")

    def _export(self, part: Part) -> Path:
        """Write the part's file; a crash leaves none that counts, and two processes at once write one each."""
        for package in ("onnx", "onnxscript"):
            if not importlib.util.find_spec(package):
                raise BackendUnavailable(f"exporting to ONNX needs the package {package}")
        self.folder.mkdir(parents=True, exist_ok=True)
        self.made += 1
        try:
            program = self._trace(part)
        except Exception as error:
            raise BackendUnavailable(f"{part.name} cannot be exported to ONNX: {error}") from error
        program.model.metadata_props.update(self._metadata(part))
        fresh = self.folder / f"{part.name}.{token_hex(8)}.new"
        program.save(fresh, external_data=False)
        return fresh.replace(self.folder / f"{part.name}.{sha256(fresh)[:32]}.onnx")

    def _trace(self, part: Part) -> torch.onnx.ONNXProgram:
        rows = torch.export.Dim("rows", min=1, max=max(self.setup.rows, 2))
        with _quiet(), torch.no_grad():
            graph = torch.export.export(
                _Module(part),
                part.example(2),
                dynamic_shapes=(tuple({0: rows} for _ in part.inputs),),
                strict=True,
            )
            program = torch.onnx.export(
                graph,
                dynamo=True,
                opset_version=OPSET,
                input_names=part.inputs,
                output_names=part.outputs,
                verbose=False,
            )
        assert program is not None
        return program


class HostSession:
    """A program run on CPU tensors where they lie: no copies, the outputs are onnxruntime's own arrays."""

    def __init__(self, session: Any, part: Part) -> None:
        self.session, self.part = session, part

    def __call__(self, *tensors: Tensor) -> list[Tensor]:
        """Outputs for the part's inputs."""
        given = {name: tensor.numpy() for name, tensor in zip(self.part.inputs, tensors, strict=True)}
        return [torch.from_numpy(array) for array in self.session.run(None, given)]


class BoundSession:
    """A program run on device tensors where they lie, by address."""

    def __init__(self, session: Any, part: Part, device: torch.device) -> None:
        self.session, self.part, self.device = session, part, device
        with torch.no_grad():
            self.shapes = [tensor.shape[1:] for tensor in part.run(*part.example(1))]

    def __call__(self, *tensors: Tensor) -> list[Tensor]:
        """Outputs for the part's inputs, on the same device."""
        binding = self.session.io_binding()
        where = self.device.type, self.device.index or 0
        given = [tensor.contiguous() for tensor in tensors]
        made = [torch.empty(len(given[0]), *shape, device=self.device) for shape in self.shapes]
        for name, tensor in zip(self.part.inputs, given, strict=True):
            binding.bind_input(name, *where, KINDS[tensor.dtype], tuple(tensor.shape), tensor.data_ptr())
        for name, tensor in zip(self.part.outputs, made, strict=True):
            binding.bind_output(name, *where, np.float32, tuple(tensor.shape), tensor.data_ptr())
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()  # onnxruntime has a stream of its own
        self.session.run_with_iobinding(binding)
        return made


class _Module(nn.Module):
    """A part as the exporter wants it."""

    def __init__(self, part: Part) -> None:
        super().__init__()
        self.part, self.network = part, part.network

    def forward(self, *tensors: Tensor) -> Sequence[Tensor]:
        return self.part.run(*tensors)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's warnings about packages and arguments that are not used here."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logger.setLevel(before)
