"""Attention of decode steps over a paged cache: what it gives, what it writes, and where it may be used."""

import dataclasses

import pytest
import torch
from batches import BF16, FP16, FP32, relative

from lorakit_kernels import paged, tuning
from lorakit_kernels.tuning import Paged

PAGE, LEAST, BLOCKS = 64, 32, 24
SMALL = Paged(block=16, warps=1, stages=2)
# On both sides of a tile, of a page and of a part; none yet; a row that pads the batch.
LENGTHS = (0, 1, 15, 16, 31, 32, 33, 63, 64, 150, -1)
HEADS = {"a query each": (4, 4), "shared by 2": (4, 2), "shared by 16": (16, 1)}
"""Heads of queries, and of keys."""


def case(device, heads, dtype=BF16, lengths=LENGTHS, size=64):
    """The arguments of `attend` but for the scale; what no row has is NaN."""
    generator = torch.Generator().manual_seed(len(lengths))

    def random(*shape):
        return torch.randn(shape, generator=generator).to(device, dtype)

    queries, keys = heads
    n = len(lengths)
    free = torch.randperm(BLOCKS, generator=generator).tolist()
    table = torch.full((n, max(max(lengths), 0) // PAGE + 2), -1, dtype=torch.int32)
    # As the engine's cache has them: a token's keys and values lie one behind the other.
    storage = random(BLOCKS, PAGE, 2, keys, size).fill_(float("nan"))
    for row, length in enumerate(lengths):
        for place in range(length // PAGE + 1 if length >= 0 else 0):
            table[row, place] = free.pop()
            used = min(PAGE, length - place * PAGE)
            storage[table[row, place], :used] = random(used, 2, keys, size)
    return (
        random(n, queries, size),
        random(n, keys, size),
        random(n, keys, size),
        *storage.unbind(2),
        torch.tensor(lengths, dtype=torch.int32, device=device),
        table.to(device),
        torch.zeros(n * keys, dtype=torch.int32, device=device),
    )


def exact(query, key, value, keys, values, lengths, table, tickets, scale):
    """In double precision: (outputs, the caches afterwards)."""
    keys, values, outs = keys.clone(), values.clone(), []
    for row, length in enumerate(lengths.tolist()):
        if length < 0:
            outs.append(torch.zeros_like(query[row]).double())
            continue
        blocks = table[row, : length // PAGE + 1].long()
        for cache, new in ((keys, key), (values, value)):
            cache[blocks[-1], length % PAGE] = new[row]
        repeats = query.shape[1] // key.shape[1]
        k, v = (
            cache[blocks].flatten(0, 1)[: length + 1].double().repeat_interleave(repeats, 1) for cache in (keys, values)
        )
        weights = (torch.einsum("hd,thd->ht", query[row].double(), k) * scale).softmax(-1)
        outs.append(torch.einsum("ht,thd->hd", weights, v))
    return torch.stack(outs), (keys, values)


def same(one, other):
    """Equal, NaN also to NaN."""
    return torch.allclose(one.float(), other.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("heads", "dtype", "parts"),
    [(heads, BF16, parts) for heads in HEADS.values() for parts in (1, 16)] + [((4, 2), FP16, 4)],
    ids=str,
)
def test_each_row_attends_to_what_it_has_and_its_new_token(device, monkeypatch, heads, dtype, parts):
    monkeypatch.setattr(paged, "parts_of", lambda programs: parts)
    given = case(device, heads, dtype)
    expected, caches = exact(*given, 0.1)
    found = paged.attend_by(SMALL, *given, 0.1, least=LEAST)
    assert relative(found, expected) < (2e-3 if dtype == FP16 else 1e-2)
    assert found[-1].eq(0).all(), "a row that pads the batch"
    assert all(same(cache, own) for cache, own in zip(given[3:5], caches, strict=True)), "a place a row, and no other"
    assert not given[-1].any(), "the next layer draws the same tickets"


def test_rows_that_pad_are_left_as_they_were(device):
    given = case(device, (4, 2))
    out = torch.full_like(given[0], 7.0)
    assert paged.attend_by(SMALL, *given, 0.1, out, least=LEAST) is out
    assert out[-1].eq(7).all(), "a row that pads the batch"
    assert out[:-1].equal(paged.attend_by(SMALL, *case(device, (4, 2)), 0.1, least=LEAST)[:-1])


def test_large_scores_do_not_overflow(device):
    given = case(device, (4, 2))
    expected, _ = exact(*given, 50.0)
    found = paged.attend_by(SMALL, *given, 50.0, least=LEAST)
    assert found.isfinite().all() and relative(found, expected) < 2e-2


def test_of_equal_batches_every_bit_is_equal(device, monkeypatch):
    """Parts are summed up by whichever program ends last, in the order of the row's tokens."""
    monkeypatch.setattr(paged, "parts_of", lambda programs: 16)
    found = {
        paged.attend_by(SMALL, *case(device, (4, 2)), 0.1, least=LEAST).float().cpu().numpy().tobytes()
        for _ in range(3)
    }
    assert len(found) == 1


def test_what_shares_the_batch_changes_no_bit_if_rows_are_cut_alike(device):
    given = case(device, (4, 2))
    together = paged.attend_by(SMALL, *given, 0.1, least=LEAST)
    alone = [one[9:10] if i not in (3, 4) else one for i, one in enumerate(given)]
    assert paged.parts_of(2) == paged.parts_of(2 * len(LENGTHS))
    assert paged.attend_by(SMALL, *alone, 0.1, least=LEAST).equal(together[9:10])


@pytest.mark.parametrize(("programs", "parts"), [(1, 16), (8, 16), (128, 16), (150, 8), (512, 4), (1500, 1), (9999, 1)])
def test_few_rows_are_cut_into_more_parts(programs, parts):
    assert paged.parts_of(programs) == parts


def test_what_it_does_not_take(device, monkeypatch):
    tiles = dataclasses.replace(tuning.tiles(device), paged=SMALL, paged_many=SMALL)
    monkeypatch.setattr(paged, "tiles", lambda device: tiles)
    query, key, _, keys, values, *_ = case(device, (4, 2))
    on_gpu = device.type == "cuda"
    assert paged.can_attend(query, key, keys, values) == on_gpu
    assert not paged.can_attend(query.to(FP32), key, keys.to(FP32), values.to(FP32))
    assert not paged.can_attend(query.to(FP16), key, keys, values)
    assert not paged.can_attend(query[..., :48], key[..., :48], keys[..., :48], values[..., :48])
    assert not paged.can_attend(query, key, keys[:, :24], values[:, :24])
    assert not paged.can_attend(query, key, keys.mT.contiguous().mT, values)
    assert not paged.can_attend(query.repeat(1, 40, 1), key, keys, values)


def test_a_gpu_that_nobody_measured_keeps_flash_attention():
    fallback = tuning.read(tuning._FOLDER / "fallback.json")
    assert fallback.paged is None and fallback.for_paged(9999) is None


@pytest.mark.gpu
@pytest.mark.parametrize(
    "lengths", [[208] * 32, [8000], [33000, 5], [20, 1900, 700, 256, 255, 511, 0, -1] * 12], ids=len
)
@pytest.mark.parametrize("heads", [(32, 32), (32, 8), (16, 1)], ids=str)
def test_with_the_tiles_of_this_gpu(monkeypatch, heads, lengths):
    """In a CUDA graph that is replayed, as the engine has it."""
    device = torch.device("cuda")
    monkeypatch.setitem(globals(), "PAGE", 256)
    monkeypatch.setitem(globals(), "BLOCKS", sum(max(length, 0) // 256 + 1 for length in lengths) + 1)
    given = list(case(device, heads, lengths=lengths, size=128))
    if not paged.can_attend(given[0], given[1], given[3], given[4]):
        pytest.skip("this GPU has no tiles for it")
    expected, _ = exact(*given, 0.09)
    assert relative(paged.attend(*given, 0.09), expected) < 1e-2
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = [paged.attend(*given, 0.09) for _ in range(4)]
    for _ in range(3):
        graph.replay()
        assert all(relative(out, expected) < 1e-2 for out in outs) and not given[-1].any()
