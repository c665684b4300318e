"""The table of what each kernel occupies: registers, shared memory, stack, and the occupancy."""

from dataclasses import dataclass

from .nvrtc import Usage

WARP = 32


@dataclass
class Multiprocessor:
    """Limits of one streaming multiprocessor, from the CUDA C++ Programming Guide."""

    warps: int
    blocks: int
    registers: int
    shared: int


LIMITS = {
    "sm_80": Multiprocessor(warps=64, blocks=32, registers=65536, shared=164 * 1024),
    "sm_90": Multiprocessor(warps=64, blocks=32, registers=65536, shared=228 * 1024),
    "sm_100": Multiprocessor(warps=64, blocks=32, registers=65536, shared=228 * 1024),
}


def round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def occupancy(architecture: str, usage: Usage, threads: int, dynamic: int) -> int:
    """The share of a multiprocessor's warps that can be resident, in percent."""
    limits = LIMITS[architecture]
    warps = -(-threads // WARP)
    blocks = min(limits.blocks, limits.warps // warps)
    # A warp gets its registers in units of 256, and one warp in four shares a register file.
    registers = round_up(usage.registers * WARP, 256)
    blocks = min(blocks, limits.registers // registers // 4 * 4 // warps)
    # Each block gets 1 KiB more than it asks for, in units of 128 bytes.
    blocks = min(blocks, limits.shared // round_up(usage.shared + dynamic + 1024, 128))
    return 100 * blocks * warps // limits.warps


HEADER = "# kernel arch registers shared dynamic stack spills threads occupancy%".split(" ", 1)[
    1
].split()


def row(kernel: str, architecture: str, usage: Usage, threads: int, dynamic: int) -> list[str]:
    return [kernel, architecture] + [
        str(value)
        for value in (
            usage.registers,
            usage.shared,
            dynamic,
            usage.stack,
            usage.spills,
            threads,
            occupancy(architecture, usage, threads, dynamic),
        )
    ]
