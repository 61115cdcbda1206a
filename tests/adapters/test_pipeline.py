"""The pipeline: blocks are hashed and written in order, buffers are not filled too early, errors come out."""

from __future__ import annotations

import threading

import pytest
import torch
from blake3 import blake3

from lorakit.adapters import pipeline
from lorakit.adapters.pipeline import Pipeline
from lorakit.errors import BankError


def test_blocks_are_hashed_and_written_in_order_though_buffers_are_used_again() -> None:
    written = bytearray(100 * 8)
    gate = threading.Event()
    done: list[str] = []
    digest, taken = blake3(), set()

    def write(block: memoryview, place: int) -> None:
        gate.wait(10)
        written[place : place + block.nbytes] = block

    line = Pipeline()
    try:
        for number in range(100):
            if number == pipeline._DEPTH - 1:
                gate.set()  # until now nothing is written, and every buffer must be another
                assert len(taken) == number
            buffer = line.buffer(8)
            taken.add(buffer.data_ptr())
            buffer.fill_(number)
            line.send(buffer.numpy().data, write, 8 * number, digest)
        line.then(lambda: done.append(digest.hexdigest()))
        line.finish()
    finally:
        line.close()
    wanted = b"".join(bytes([number]) * 8 for number in range(100))
    assert written == wanted
    assert done == [blake3(wanted).hexdigest()]
    assert len(taken) <= pipeline._DEPTH


def test_a_buffer_that_is_too_small_is_replaced() -> None:
    line = Pipeline()
    try:
        line.send(line.buffer(4).numpy().data[:4], lambda block, place: None, 0, blake3())
        line.finish()
        assert line.buffer(4000).numel() >= 4000
    finally:
        line.close()


def test_what_cannot_be_written_is_told_and_ends_it() -> None:
    def fail(block: memoryview, place: int) -> None:
        raise BankError("no space")

    line = Pipeline()
    done: list[int] = []
    try:
        line.send(torch.zeros(8, dtype=torch.uint8).numpy().data, fail, 0, blake3())
        line.then(lambda: done.append(1))
        with pytest.raises(BankError, match="no space"):
            line.finish()
    finally:
        line.close()
    assert not done
