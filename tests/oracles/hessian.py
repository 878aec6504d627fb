"""Hessian accumulation and factoring in float64, by an inverse and two Cholesky factorizations."""

import numpy as np


def accumulate(inputs: np.ndarray) -> np.ndarray:
    """Sum of the outer products of all tokens of `inputs [..., K]`."""
    tokens = np.asarray(inputs, np.float64).reshape(-1, inputs.shape[-1])
    total = np.zeros((tokens.shape[1], tokens.shape[1]))
    for token in tokens:
        total += np.outer(token, token)
    return total


def damped(h: np.ndarray, damping: float) -> tuple[np.ndarray, np.ndarray]:
    """Rows by descending diagonal, and the Hessian in that order with the damping on its diagonal."""
    h = np.asarray(h, np.float64)
    perm = np.argsort(-np.diagonal(h), kind="stable")
    return perm, h[np.ix_(perm, perm)] + damping * np.eye(len(h))


def first_damping(h: np.ndarray) -> float:
    """0.12 of the mean diagonal, at least 1e-5."""
    return max(0.12 * float(np.mean(np.diagonal(np.asarray(h, np.float64)))), 1e-5)


def factorize(h: np.ndarray, damping: float) -> tuple[np.ndarray, np.ndarray]:
    """Permutation, and the upper factor `U` with `U^T U` the inverse of the permuted damped Hessian."""
    perm, ordered = damped(h, damping)
    lower = np.linalg.cholesky(ordered)
    half = np.linalg.inv(lower)
    return perm, np.linalg.cholesky(half.T @ half).T
