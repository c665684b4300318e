"""Compiles the kernels with NVRTC, the compiler that the program itself uses at run time."""

import ctypes
import re
from dataclasses import dataclass
from pathlib import Path

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")

OPTIONS = (
    "--std=c++17",
    "--fmad=false",
    "--ptxas-options=--warn-on-spills",
    "--ptxas-options=--warning-as-error",
    # Changes no code: the assembler reports the registers and memory of each kernel in the log.
    "--ptxas-options=--verbose",
)


@dataclass
class Usage:
    """What the assembler reports for one kernel."""

    registers: int = 0
    shared: int = 0
    stack: int = 0
    spills: int = 0


@dataclass
class Program:
    """The kernels compiled for one architecture."""

    architecture: str
    ptx: str
    cubin: bytes
    usage: dict[str, Usage]


class CompileError(Exception):
    pass


def source_of(folder: Path) -> str:
    """Concatenates the sources in the order in which the program concatenates them."""
    files = [folder / "common.cuh", folder / "tensor.cuh"] + sorted(folder.glob("*.cu"))
    texts = []
    for file in files:
        if file.exists():
            texts.append(f'#line 1 "{file.name}"\n{file.read_text()}\n')
    if not texts:
        raise CompileError(f"no kernels in {folder}")
    return "".join(texts)


class Nvrtc:
    def __init__(self, tools: Path):
        found = sorted(tools.glob("lib/python3*/site-packages/nvidia/*/lib/libnvrtc.so.*"))
        if not found:
            raise FileNotFoundError(f"no libnvrtc under {tools}: run ci/install-cuda-tools {tools}")
        self.library = ctypes.CDLL(str(found[0]))

    def compile(self, source: str, architecture: str) -> Program:
        """Fails on errors, on spills and on any line of the log that is not a report."""
        program = ctypes.c_void_p()
        name = b"kernels.cu"
        self._check(
            self.library.nvrtcCreateProgram(
                ctypes.byref(program), source.encode(), name, 0, None, None
            )
        )
        try:
            options = [*OPTIONS, f"--gpu-architecture={architecture}"]
            array = (ctypes.c_char_p * len(options))(*(o.encode() for o in options))
            status = self.library.nvrtcCompileProgram(program, len(options), array)
            log = self._read(program, "ProgramLog").decode(errors="replace")
            usage, complaints = parse_log(log)
            if status != 0 or complaints:
                raise CompileError(
                    f"{architecture}: " + ("\n".join(complaints) or f"error {status}")
                )
            ptx = self._read(program, "PTX").decode()
            return Program(architecture, ptx, self._read(program, "CUBIN"), usage)
        finally:
            self.library.nvrtcDestroyProgram(ctypes.byref(program))

    def _read(self, program: ctypes.c_void_p, what: str) -> bytes:
        size = ctypes.c_size_t()
        self._check(getattr(self.library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
        buffer = ctypes.create_string_buffer(size.value)
        self._check(getattr(self.library, f"nvrtcGet{what}")(program, buffer))
        # NVRTC ends text with a zero byte and counts that byte; a cubin has none.
        return buffer.raw if what == "CUBIN" else buffer.raw.rstrip(b"\0")

    def _check(self, status: int) -> None:
        if status != 0:
            self.library.nvrtcGetErrorString.restype = ctypes.c_char_p
            raise CompileError(self.library.nvrtcGetErrorString(status).decode())


def parse_log(log: str) -> tuple[dict[str, Usage], list[str]]:
    """Splits a log into each kernel's usage and the lines that are complaints."""
    usage: dict[str, Usage] = {}
    complaints = []
    kernel = None
    for line in log.splitlines():
        if match := re.search(r"Function properties for (\S+)", line):
            kernel = usage.setdefault(match[1], Usage())
        elif kernel and (
            match := re.search(
                r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line
            )
        ):
            kernel.stack = int(match[1])
            kernel.spills = int(match[2]) + int(match[3])
        elif kernel and (match := re.search(r"Used (\d+) registers", line)):
            kernel.registers = int(match[1])
            if match := re.search(r"(\d+) bytes smem", line):
                kernel.shared = int(match[1])
        elif line.strip() and not re.match(r"ptxas (info|\s+\.)\s*:?", line):
            complaints.append(line)
    return usage, complaints
