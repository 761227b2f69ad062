"""Gradients that have no gradients of their own say so: the dispatcher alone would warn, and give zeros."""

from __future__ import annotations

import torch

__all__ = ["refuse_second_derivative"]


def refuse_second_derivative(backward_op: str) -> None:
    """Lets `backward_op`, an operator that computes the gradient of another, raise when it is differentiated itself.

    What comes of it is a RuntimeError, as of torch's own `once_differentiable`, in the backward pass of a second
    derivative (`create_graph=True`).
    """

    def refuse(ctx, *grads) -> tuple:
        raise RuntimeError(
            f"{backward_op.removeprefix('gpstoken::').removesuffix('_backward')} has no second derivative. "
            "Leave its inputs out of what is differentiated twice, such as a gradient penalty."
        )

    torch.library.register_autograd(backward_op, refuse, setup_context=lambda ctx, inputs, output: None)
