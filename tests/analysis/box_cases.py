"""Tile states by the box test, checked against brute force."""

from __future__ import annotations

import torch
from analysis_cases import BATCH, HEADS, Instance, true_states

from flexmask.analysis import box_test
from flexmask.ir import Expr, simplify
from flexmask.runtime.classify import UNKNOWN, classify
from flexmask.runtime.grid import Grid


def tile_states(predicate: Expr, instance: Instance, block_q: int, block_kv: int) -> torch.Tensor:
    """int8 [B, H, nQ, nK]: 0 EMPTY, 2 FULL, 3 UNKNOWN."""
    grid = Grid(instance.q_len, instance.kv_len, block_q, block_kv, BATCH, HEADS)
    return classify(box_test(simplify(predicate), len(instance.tensors)), grid, instance.tensors, instance.scalars)


def check_boxes(predicate: Expr, instance: Instance, block_q: int, block_kv: int) -> torch.Tensor:
    """EMPTY and FULL are true of every tile; returns which tiles are UNKNOWN though not PARTIAL."""
    found = tile_states(predicate, instance, block_q, block_kv)
    truth = true_states(instance.keep(predicate), block_q, block_kv)
    assert torch.equal(torch.where(found == UNKNOWN, truth, found), truth), f"{predicate}\n{instance}\nfound {found}\ntruth {truth}"
    return (found == UNKNOWN) & (truth != 1)
