"""The highest logits of rows: found, put into a message, read from one."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fusionroute.errors import invalid
from fusionroute.short_rows import ShortRow
from fusionroute.v1 import common_pb2, expert_pb2
from fusionroute.wire import matrix_to_numpy, rows_to_matrix


def top_of_rows(rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` highest logits of rows [n, V]: ids [n, count], logits [n, count], highest first, equal ones by id."""
    ids = torch.empty((len(rows), count), dtype=torch.int64)
    logits = torch.empty((len(rows), count), dtype=rows.dtype)
    for index, row in enumerate(rows):
        found, places = torch.topk(row, count)
        # Which of several equal ones topk takes at the edge, and their order, are its secret.
        edge = found[-1]
        above = places[found > edge]
        equal = torch.from_numpy(
            np.flatnonzero((row == edge).numpy())[: count - len(above)]
        )  # torch: 20 times slower
        chosen = torch.cat([above.sort().values, equal])
        values = row[chosen]
        order = torch.argsort(values, descending=True, stable=True)
        ids[index], logits[index] = chosen[order], values[order]
    return ids, logits


def top_logits_to_message(
    ids: Tensor, logits: Tensor, dtype: common_pb2.Dtype.ValueType = common_pb2.DTYPE_UNSPECIFIED
) -> expert_pb2.TopLogits:
    """As `top_of_rows` gives them. Raises InvalidRequest as `rows_to_matrix`."""
    matrix = rows_to_matrix(logits, dtype)
    return expert_pb2.TopLogits(
        num_rows=len(ids),
        num_logits=ids.shape[1],
        ids=ids.numpy().astype("<u4").tobytes(),
        logits=matrix.data,
        dtype=matrix.dtype,
    )


def short_rows(top: expert_pb2.TopLogits, width: int, count: int) -> list[ShortRow]:
    """What is known of each row.

    Args:
        top: from a peer, so nothing about it is believed but the order.
        width: columns of a whole row, V.
        count: logits that were asked for.

    Raises:
        InvalidRequest: naming what is not as it was asked for.
    """
    if top.num_logits != count:
        raise invalid("top.num_logits", top.num_logits, f"{count} were asked for")
    found = top.ids
    if len(found) != top.num_rows * count * 4:
        raise invalid("top.ids", f"{len(found)} bytes", f"{top.num_rows} rows of {count} ids")
    ids = np.frombuffer(found, "<u4").astype(np.int64).reshape(top.num_rows, count)
    if ids.size and int(ids.max()) >= width:
        raise invalid("top.ids", int(ids.max()), f"ids go from 0 to {width - 1}")
    matrix = common_pb2.Matrix(dtype=top.dtype, num_rows=top.num_rows, width=count, data=top.logits)
    logits = matrix_to_numpy(matrix, count)
    return [ShortRow(each, row, width) for each, row in zip(ids, logits, strict=True)]
