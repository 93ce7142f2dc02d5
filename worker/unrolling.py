"""From the step of one micro-batch to a step of many: its nodes once for each, the gradients averaged, one update.

The Program that comes out is the whole that a parallel job is cut from, and the reference that its pieces equal bit for
bit. Pure: no torch.
"""

from __future__ import annotations

from protocol import params
from protocol.program import Arg, Input, Node, Program, Real, Ref
from worker.program_writer import Handle, ProgramWriter, moved
from worker.step_parts import NotParallel, StepParts

__all__ = ["added", "check_counts", "mean", "micro_batch_of", "numbered", "unrolled"]


def unrolled(program: Program, micro_batches: int, *, replicas: int = 1) -> Program:
    """One step of `micro_batches` of what `program` takes as its batch: each batch input has so many times the rows.

    Micro-batch m reads rows m*b to (m+1)*b, draws random numbers of its own, and its gradients are added to those of
    the micro-batches before it; the sums are divided by their number before the update. The loss is the mean of theirs.
    replicas: as if that many replicas did so at once, one after the other in the rows: their means are added in order
    and divided by their number. One micro-batch of one replica is `program` itself.
    Raises NotParallel for a step that is more than gradients and an update of them.
    """
    if micro_batches == 1 and replicas == 1:
        return program
    parts = StepParts(program)
    check_counts(parts, micro_batches * replicas)
    writer = ProgramWriter()
    batches = [item.name for item in program.inputs_of("batch")]
    whole = {number: writer.add(_widened(item, micro_batches * replicas)) for number, item in enumerate(program.inputs)}
    whole |= {number: writer.add(item) for number, item in enumerate(program.constants, len(program.inputs))}
    wanted = (*parts.gradients, program.loss)
    groups: list[dict[int, Handle]] = []
    for replica in range(replicas):
        sums: dict[int, Handle] = {}
        for index in range(replica * micro_batches, (replica + 1) * micro_batches):
            values = dict(whole)
            for number, item in enumerate(program.inputs):
                if item.name in batches:
                    values[number] = micro_batch_of(writer, whole[number], index, parts.rows)
            for number in parts.other_nodes:
                if number not in values:
                    node = numbered(parts, parts.node(number), index)
                    values[number] = writer.node(node.op, moved(node.args, values.__getitem__), node.type, node.source)
                    if not parts.varying[number]:
                        whole[number] = values[number]
            for number in wanted:
                found = values[number]
                sums[number] = added(writer, sums[number], found) if number in sums else found
        groups.append({number: mean(writer, total, micro_batches) for number, total in sums.items()})
    values = dict(whole)
    for number in wanted:
        total = groups[0][number]
        for group in groups[1:]:
            total = added(writer, total, group[number])
        values[number] = mean(writer, total, replicas)
    for number in parts.update_nodes:
        node = parts.node(number)
        values[number] = writer.node(node.op, moved(node.args, values.__getitem__), node.type, node.source)
    updates = {update.name: values[update.value] for update in program.updates}
    made, _ = writer.finish(updates, values[program.loss])
    made.check()
    return made


def check_counts(parts: StepParts, copies: int) -> None:
    """Refuse a step that does not split, or so many copies of it that no Program holds them. Raises NotParallel."""
    parts.check()
    nodes = copies * len(parts.other_nodes) + len(parts.update_nodes)
    if nodes > params.PROGRAM_NODES_MAX or copies * parts.random_nodes > params.RANDOM_NODES_MAX:
        raise NotParallel(
            f"{copies} micro-batches of {len(parts.other_nodes)} nodes are {nodes}, at most {params.PROGRAM_NODES_MAX}",
            next_step="lower micro_batches in job.toml and raise size in [batch] by as much",
        )


def numbered(parts: StepParts, node: Node, index: int) -> Node:
    """A node as micro-batch `index` has it: a random one draws from a stream of its own, wherever it runs."""
    if node.op != "ichiba.uniform" or not index:
        return node
    key, number, shape = node.args
    assert isinstance(number, int)
    return Node(node.op, (key, number + index * parts.random_nodes, shape), node.dtype, node.shape, node.source)


def micro_batch_of(writer: ProgramWriter, whole: Handle, index: int, rows: int) -> Handle:
    """The rows of micro-batch `index` out of a batch input; the input itself where it has no others."""
    kind = writer.type_of(whole)
    if kind.shape[0] == rows:
        return whole
    args: tuple[Arg, ...] = (Ref(whole), 0, index * rows, (index + 1) * rows, 1)
    return writer.node("slice.Tensor", args, kind._replace(shape=(rows, *kind.shape[1:])))


def mean(writer: ProgramWriter, total: Handle, count: int) -> Handle:
    """A sum of `count` float32 tensors, divided by it."""
    if count == 1:
        return total
    return writer.node("div.Tensor", (Ref(total), Real.of(float(count))), writer.type_of(total))


def added(writer: ProgramWriter, total: Handle, more: Handle) -> Handle:
    """A sum and one more tensor."""
    return writer.node("add.Tensor", (Ref(total), Ref(more)), writer.type_of(total))


def _widened(item: Input, times: int) -> Input:
    if item.role != "batch":
        return item
    return Input(item.name, item.role, item.dtype, (item.shape[0] * times, *item.shape[1:]), item.init)
