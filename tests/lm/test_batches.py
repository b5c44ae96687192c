"""Batches: results come back in order, and a batch that does not fit is made smaller."""

from __future__ import annotations

import pytest
import torch
from test_architectures import TOK, build

from ws.errors import WsError
from ws.lm.batches import in_batches, left_pad, next_logits, packed_logits, positions_of, row_logits, with_batch_size


@pytest.mark.parametrize("batch_size", [1, 2, 5, None])
def test_results_come_in_the_order_of_the_items_which_go_by_length(batch_size):
    items, parts = ["aaa", "b", "cc", "dddd", ""], []

    def run(part):
        parts.append(part)
        return [item.upper() for item in part]

    assert in_batches(items, run, batch_size, 3, len, "items", "item") == ["AAA", "B", "CC", "DDDD", ""]
    assert [item for part in parts for item in part] == sorted(items, key=len)
    assert max(map(len, parts)) == (batch_size or 3)


@pytest.mark.parametrize("size", [0, -1])
def test_a_size_at_which_nothing_would_be_run_is_refused(size):
    """Nothing asked would read as scores of 0 and certain answers, and be kept as the base's."""
    with pytest.raises(WsError, match="`batch_size` must be at least 1"):
        in_batches(["a"], list, size, 3, len, "items", "item")


def test_a_size_that_does_not_fit_falls_and_one_that_was_asked_for_does_not():
    tried = []

    def run(size):
        tried.append(size)
        if size > 7:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return size

    assert with_batch_size(run, None, 12) == tried[-1] <= 7
    assert tried == sorted(tried, reverse=True)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        with_batch_size(run, 12, 12)


def test_where_not_even_one_row_fits_there_is_one_sentence():
    def run(size):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")

    def broken(size):
        raise RuntimeError("shapes do not match")

    with pytest.raises(WsError, match="Not even one row at a time fits into memory"):
        with_batch_size(run, None, 3)
    with pytest.raises(RuntimeError, match="shapes"):
        with_batch_size(broken, None, 3)


def test_packed_rows_and_rows_of_their_own_give_the_same_logits():
    """Two answers of different lengths behind one start, in one row; each against a plain forward pass."""
    model, starts = build("llama"), [[5, 9, 11, 20], [7, 8]]
    parts = [[[30, 31], [40]], [[50], [60, 61, 62]]]
    logits, ends = packed_logits(model, TOK.pad_token_id, starts, parts, every=True)
    last, _ = packed_logits(model, TOK.pad_token_id, starts, parts)
    for m, part in enumerate(parts):
        for row, (start, tail) in enumerate(zip(starts, part, strict=True)):
            with torch.no_grad():
                wanted = model(torch.tensor([start + tail])).logits[0, -len(tail) :]
            stop = int(ends[m]) + 1
            torch.testing.assert_close(logits[row, stop - len(tail) : stop], wanted, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(last[row, m], wanted[-1], atol=1e-4, rtol=1e-4)


def test_padding_stands_on_the_left_and_has_no_position():
    tokens, mask = left_pad([[3, 4, 5], [6]], 0, torch.device("cpu"))
    assert tokens.tolist() == [[3, 4, 5], [0, 0, 6]]
    assert positions_of(mask).tolist() == [[0, 1, 2], [0, 0, 0]]
    model = build("llama")
    with torch.no_grad():
        whole = row_logits(model, TOK.pad_token_id, [[7, 8, 9], [10]])
        torch.testing.assert_close(whole[1, -1], model(torch.tensor([[10]])).logits[0, -1], atol=1e-4, rtol=1e-4)
        padded, real = left_pad([[7, 8, 9], [10]], TOK.pad_token_id, model.device)
        torch.testing.assert_close(next_logits(model, padded, real, None), whole[:, -1])
