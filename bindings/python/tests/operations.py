"""Every operation of a process group, beside its definition, over tensors of all kinds.

`torchrun --standalone --nproc-per-node 2 operations.py`; PILLION_TORCH=backend or group chooses how
PyTorch has the backend.
"""

import ctypes
from datetime import timedelta

import torch
import torch.distributed as dist
from pillion.torch.groups import PillionProcessGroup

INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
COMPLEX = [torch.complex64, torch.complex128]


def values(rank: int, shape: tuple, dtype: torch.dtype) -> torch.Tensor:
    """What a rank has: small whole numbers, whose sums are exact in every type."""
    count = torch.Size(shape).numel()
    numbers = (torch.arange(count, dtype=torch.float64) * 7 + rank * 3 + 1) % 5 + 1
    tensor = numbers.reshape(shape).to(dtype)
    return torch.complex(tensor.real, tensor.real + 1).to(dtype) if dtype.is_complex else tensor


def odd(tensor: torch.Tensor) -> torch.Tensor:
    """The same elements, at an address that is no multiple of their size. PyTorch itself may crash
    on such a tensor, so only `plain` looks into it."""
    size = tensor.numel() * tensor.element_size()
    if not size:
        return tensor
    memory = torch.empty(size + 1, dtype=torch.uint8)
    ctypes.memmove(memory.data_ptr() + 1, tensor.contiguous().data_ptr(), size)
    lies = torch.frombuffer(memory.numpy(), dtype=tensor.dtype, count=tensor.numel(), offset=1)
    return lies.view(tensor.shape)


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """The same elements, where PyTorch would put them."""
    if not tensor.is_contiguous():
        return tensor.contiguous()
    copy = torch.empty(tensor.shape, dtype=tensor.dtype)
    ctypes.memmove(copy.data_ptr(), tensor.data_ptr(), tensor.numel() * tensor.element_size())
    return copy


def strided(tensor: torch.Tensor) -> torch.Tensor:
    """The same elements, not side by side."""
    wide = torch.zeros(*tensor.shape, 2, dtype=tensor.dtype)
    wide[..., 0] = tensor
    return wide[..., 0]


KINDS = [lambda tensor: tensor, odd, strided]
SHAPES = [(), (0,), (1,), (5,), (3, 4), (700, 3)]


def same(actual: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    actual = plain(actual)
    assert torch.equal(actual, expected.to(actual.dtype)), f"{what}: {actual} where {expected} was expected"


def reductions(rank: int, world: int) -> None:
    combine = {
        dist.ReduceOp.SUM: lambda all: all.sum(0),
        dist.ReduceOp.PRODUCT: lambda all: all.prod(0),
        dist.ReduceOp.MIN: lambda all: all.min(0).values,
        dist.ReduceOp.MAX: lambda all: all.max(0).values,
    }
    for dtype in INTEGERS + FLOATS + COMPLEX:
        for shape in SHAPES:
            each = torch.stack([values(p, shape, dtype) for p in range(world)])
            wide = each if dtype.is_complex or dtype == torch.float64 else each.to(torch.int64)
            for op, of in combine.items():
                if dtype.is_complex and op != dist.ReduceOp.SUM:
                    continue
                expected = of(wide)
                for kind in KINDS:
                    tensor = kind(each[rank].clone())
                    dist.all_reduce(tensor, op)
                    same(tensor, expected, f"all_reduce {op} {dtype} {shape}")
                tensor = each[rank].clone()
                dist.reduce(tensor, world - 1, op)
                same(tensor, expected if rank == world - 1 else each[rank], f"reduce {op} {dtype} {shape}")
            if shape and shape[0]:
                parts = [strided(values(rank + p, shape, dtype)) for p in range(world)]
                output = torch.empty(shape, dtype=dtype)
                dist.reduce_scatter(output, parts)
                expected = sum(values(p + rank, shape, dtype) for p in range(world))
                same(output, expected, f"reduce_scatter {dtype} {shape}")
                output = odd(torch.empty(shape, dtype=dtype))
                dist.reduce_scatter_tensor(output, torch.cat(parts))
                same(output, expected, f"reduce_scatter_tensor {dtype} {shape}")
    for op, of in ((dist.ReduceOp.BAND, torch.bitwise_and), (dist.ReduceOp.BXOR, torch.bitwise_xor)):
        tensor, expected = values(rank, (9,), torch.int32), values(0, (9,), torch.int32)
        for p in range(1, world):
            expected = of(expected, values(p, (9,), torch.int32))
        dist.all_reduce(tensor, op)
        same(tensor, expected, f"all_reduce {op}")


def averages(rank: int, world: int) -> None:
    """AVG and PREMUL_SUM beside their formulas in f64, within half a unit of the result's last place
    for each rounding."""
    for dtype in FLOATS:
        each = [torch.rand(1001, generator=torch.Generator().manual_seed(p)).to(dtype) for p in range(world)]
        unit = torch.finfo(dtype).eps / 2
        # A sum in f32, or f64, is rounded for each rank, scaled, and the result rounded to the type.
        bound = unit + (world + 1) * (2.0**-53 if dtype == torch.float64 else 2.0**-24)
        for op, factor in ((dist.ReduceOp.AVG, 1 / world), (dist._make_nccl_premul_sum(0.3), 0.3)):
            exact = sum(tensor.double() for tensor in each) * factor
            tensor = each[rank].clone()
            dist.all_reduce(tensor, op)
            error = ((tensor.double() - exact).abs() / exact).max().item()
            assert error <= bound * 1.01, f"{op} of {dtype}: an error of {error}, more than {bound}"


def moves(rank: int, world: int) -> None:
    for dtype in INTEGERS + FLOATS + COMPLEX + [torch.bool, torch.float8_e4m3fn]:
        for shape in SHAPES:
            each = [
                values(p, shape, torch.float32).to(dtype)
                if dtype.itemsize == 1 and dtype.is_floating_point
                else values(p, shape, dtype)
                for p in range(world)
            ]
            for kind in KINDS:
                if dtype.is_floating_point and dtype.itemsize == 1 and kind is not KINDS[0]:
                    continue
                check = lambda tensor, expected, what: same(
                    plain(tensor).view(-1).view(torch.uint8) if dtype.itemsize == 1 else tensor,
                    expected.view(-1).view(torch.uint8) if dtype.itemsize == 1 else expected,
                    f"{what} {dtype} {shape}",
                )
                outputs = [kind(torch.zeros(shape).to(dtype)) for _ in range(world)]
                dist.all_gather(outputs, kind(each[rank].clone()))
                [check(output, expected, "all_gather") for output, expected in zip(outputs, each)]
                tensor = kind(each[rank].clone())
                dist.broadcast(tensor, 1 % world)
                check(tensor, each[1 % world], "broadcast")
                outputs = [kind(torch.zeros(shape).to(dtype)) for _ in range(world)]
                dist.gather(kind(each[rank].clone()), outputs if rank == 0 else None, 0)
                if rank == 0:
                    [check(output, expected, "gather") for output, expected in zip(outputs, each)]
                tensor = kind(torch.zeros(shape).to(dtype))
                dist.scatter(tensor, each if rank == 0 else None, 0)
                check(tensor, each[rank], "scatter")
                outputs = [kind(torch.zeros(shape).to(dtype)) for _ in range(world)]
                dist.all_to_all(outputs, [kind(each[(rank + p) % world].clone()) for p in range(world)])
                [check(output, each[(p + rank) % world], "all_to_all") for p, output in enumerate(outputs)]
            if shape:
                output = torch.empty((world * shape[0], *shape[1:]), dtype=dtype)
                dist.all_gather_into_tensor(output, each[rank].clone())
                check(
                    output,
                    torch.cat([each[p].view(torch.uint8) if dtype.itemsize == 1 else each[p] for p in range(world)]),
                    "all_gather_into_tensor",
                )
    # In place, of unequal parts, and of the same tensor for every rank.
    whole = torch.zeros(3 * world)
    whole[3 * rank : 3 * rank + 3] = rank + 1
    dist.all_gather_into_tensor(whole, whole[3 * rank : 3 * rank + 3])
    same(whole, torch.arange(1, world + 1).repeat_interleave(3), "all_gather_into_tensor in place")
    rows = [p + 1 for p in range(world)]
    output = torch.empty(world * (rank + 1), 2, dtype=torch.int16)
    dist.all_to_all_single(output, torch.full((sum(rows), 2), rank, dtype=torch.int16), [rank + 1] * world, rows)
    same(output[:, 1], torch.arange(world).repeat_interleave(rank + 1), "all_to_all_single")
    once = torch.full((2,), float(rank))
    outputs = [torch.empty(2) for _ in range(world)]
    dist.all_to_all(outputs, [once] * world)
    same(torch.stack(outputs)[:, 0], torch.arange(world), "all_to_all of one tensor")
    dist.gather(outputs[rank], outputs if rank == 0 else None, 0)


def messages(rank: int, world: int) -> None:
    if world < 2:
        return
    if rank == 0:
        # Tags in another order than they were sent in, and without one's own name.
        second, first, any_of_all = torch.empty(4), torch.empty(3), torch.zeros(1, dtype=torch.int16)
        later = dist.irecv(second, 1, tag=2)
        dist.recv(first, 1, tag=1)
        later.wait()
        # Of one backend among several, PyTorch's C++ says no whatever the work says.
        assert later.is_completed() == isinstance(dist.group.WORLD, PillionProcessGroup)
        same(first, torch.full((3,), 1.0), "a message with tag 1")
        same(second, torch.full((4,), 2.0), "a message with tag 2")
        came = sorted(dist.recv(any_of_all, tag=3) for _ in range(world - 1))
        assert came == list(range(1, world)), came
    else:
        if rank == 1:
            dist.isend(torch.full((4,), 2.0), 0, tag=2)  # Nobody waits for it.
            dist.send(torch.full((3,), 1.0), 0, tag=1)
        dist.send(strided(torch.full((1,), rank, dtype=torch.int16)), 0, tag=3)
    ring = [
        dist.P2POp(dist.isend, torch.full((1000,), float(rank)), (rank + 1) % world),
        dist.P2POp(dist.irecv, received := torch.empty(1000), (rank - 1) % world),
    ]
    for work in dist.batch_isend_irecv(ring):
        work.wait()
    same(received[:1], torch.tensor([float((rank - 1) % world)]), "a message along the ring")


def works(rank: int, world: int) -> None:
    total = world * (world + 1) / 2
    tensors = [torch.full((100_000,), float(rank + 1)) for _ in range(8)]
    under_way = [dist.all_reduce(tensor, async_op=True) for tensor in tensors]
    futures = [work.get_future() for work in under_way]
    doubled = [future.then(lambda done: done.value()[0] * 2) for future in futures]
    for tensor, future in zip(tensors, doubled):
        assert future.wait()[-1].item() == 2 * total and tensor[0].item() == total
    # A callback that starts another operation, and waits for it, as PyTorch's PowerSGD does.
    first = dist.all_reduce(torch.ones(10), async_op=True).get_future()
    second = first.then(lambda done: dist.all_reduce(done.value()[0], async_op=True).get_future().wait()[0] + 1)
    assert second.wait()[0].item() == world * world + 1
    # The result of a leaf that is not contiguous, and of one that cannot be written.
    leaf = torch.nn.Parameter(torch.ones(6, 4)).t()
    with torch.no_grad():
        dist.all_reduce(leaf, async_op=True).get_future().wait()
    same(leaf.detach(), torch.full((4, 6), world), "an async all_reduce of a leaf")
    try:
        dist.all_reduce(torch.ones(1).expand(4), async_op=True).get_future().wait()
        raise AssertionError("an expanded tensor was written")
    except RuntimeError as error:
        assert "single memory location" in str(error), error
    work = dist.barrier(async_op=True)
    work.wait()
    tensor = strided(torch.full((1000,), float(rank + 1)))
    dist.all_reduce(tensor, async_op=True).get_future().wait()
    same(tensor, torch.full((1000,), total), "an async all_reduce of a strided tensor")


def groups(rank: int, world: int) -> None:
    members = list(range(world))[::-1]
    group = dist.new_group(members, timeout=timedelta(seconds=60))
    same_group = dist.new_group([rank], use_local_synchronization=True)
    tensor = torch.ones(3)
    dist.all_reduce(tensor, group=same_group)
    same(tensor, torch.ones(3), "all_reduce alone")
    objects = [None] * world
    dist.all_gather_object(objects, {"rank": rank, "text": "x" * (rank + 1)}, group=group)
    assert [given["rank"] for given in objects] == sorted(members), objects
    dist.monitored_barrier(group, timedelta(seconds=60))
    dist.destroy_process_group(group)
    dist.destroy_process_group(same_group)


def refusals(rank: int, world: int) -> None:
    def refused(call, words: str) -> None:
        try:
            call()
        except Exception as error:
            assert words in str(error), error
        else:
            raise AssertionError(f"nothing was refused; expected {words!r}")

    refused(lambda: dist.all_reduce(torch.ones(2).to_sparse(), dist.ReduceOp.MAX), "sparse")
    refused(lambda: dist.all_reduce(torch.ones(2).to(torch.float8_e4m3fn)), "float8")
    if isinstance(dist.group.WORLD, PillionProcessGroup):  # Otherwise PyTorch answers itself.
        refused(lambda: dist.all_reduce(torch.empty(2, device="meta")), "meta")
    refused(lambda: dist.all_reduce(torch.ones(2), dist.ReduceOp.BAND), "band of f32")
    tensors = [torch.ones(2) for _ in range(world + 1)]
    refused(lambda: dist.all_gather(tensors, torch.ones(2)), "one for each")
    refused(lambda: dist.all_to_all(tensors, tensors), "one for each")
    refused(lambda: dist.reduce_scatter(torch.ones(2), tensors[:-2]), "one for each")
    numbers = [torch.ones(2, dtype=torch.complex64) for _ in range(world)]
    refused(lambda: dist.reduce_scatter(torch.ones(2, dtype=torch.complex64), numbers, dist.ReduceOp.MAX), "reduction")
    # None of that has reached another rank.
    dist.barrier()


def main() -> None:
    dist.init_process_group("pillion", timeout=timedelta(seconds=120))
    rank, world = dist.get_rank(), dist.get_world_size()
    for check in (reductions, averages, moves, messages, works, groups, refusals):
        check(rank, world)
    dist.destroy_process_group()
    if rank == 0:
        print(f"operations of {world} ranks: well")


if __name__ == "__main__":
    main()
