"""The sparse mappings of ``zeta.ops``, as its documentation describes them.

Both functions project each row, along the last dimension, on the simplex with at most ``k`` non-zero entries. The
package's own code differs from its documentation: one function ignores ``k``, and the other is a softmax over the first
dimension.
"""

from __future__ import annotations

from torch import Tensor

from sparse_attn import ops


def sparsemax(x: Tensor, k: int) -> Tensor:
    """Sparsemax of the ``k`` largest scores of each row, :func:`sparse_attn.sparse_softmax`.

    Args:
        x: Scores (..., d); masked entries as in :func:`sparse_attn.entmax`.
        k: How many scores to keep, from 1 to d. Ties go to the lowest index.

    Returns:
        Probabilities of ``x``'s shape and dtype.

    Raises:
        TypeError: ``x`` is not floating or ``k`` is not an int.
        ValueError: ``k`` is below 1 or above d.

    Example:
        >>> import torch
        >>> sparsemax(torch.tensor([[1.0, 1.2, 1.4, 1.6, 1.8]]), k=3)
        tensor([[0.0000, 0.0000, 0.1333, 0.3333, 0.5333]])

    Reference:
        Kyrillidis et al. 2013 (ICML), "Sparse projections onto the simplex", algorithm 1.
    """
    return ops.sparse_softmax(x, k)


def sparse_softmax(z: Tensor, k: int = 3) -> Tensor:
    """The same as :func:`sparsemax`, under another name and with a default for ``k``.

    Args:
        z: Scores (..., d).
        k: How many scores to keep, from 1 to d. Ties go to the lowest index.

    Returns:
        Probabilities of ``z``'s shape and dtype.

    Raises:
        TypeError: ``z`` is not floating or ``k`` is not an int.
        ValueError: ``k`` is below 1 or above d.

    Example:
        >>> import torch
        >>> sparse_softmax(torch.tensor([2.0, 1.5, 0.1, -1.0, 3.2, 0.7]), k=3)
        tensor([0., 0., 0., 0., 1., 0.])
    """
    return ops.sparse_softmax(z, k)
