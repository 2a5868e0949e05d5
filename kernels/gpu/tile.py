"""The tile that a program of a matrix product computes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    """Rows of x (or of an expert's pairs), columns of the result, and how much of K at a time, at most."""

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int
