"""Banks of random adapters: which bytes are shared, and that nothing else is."""

import pytest
import torch
from tiny import CPU, TINY

from lorakit import MultiLoraModel
from lorakit.bench.llamas import twin
from lorakit.bench.random_bank import RandomBank


@pytest.fixture(scope="module")
def base():
    return TINY.build(CPU)


@pytest.fixture
def bank(base):
    return RandomBank(base, 5, rank=3, dtype=torch.float32, contents=2)


def outputs(model, names):
    ids = torch.tensor([[1, 2, 3]]).expand(len(names), -1)
    with torch.no_grad():
        return model(ids, adapter_ids=names).logits


def test_every_adapter_is_its_own(base, bank):
    names = [f"tenant-{number:04d}" for number in range(5)]
    assert bank.names == names and len({entry.blake3 for entry in bank.values()}) == 5
    model = MultiLoraModel(base, bank)
    found = outputs(model, [None, *names])
    assert len(model.pool.keys) == model.pool.loads == 5
    assert len({slot.address for slot in map(model.pool.get, model.pool.keys)}) == 5
    # Two contents, in turn; both act.
    torch.testing.assert_close(found[1], found[3])
    torch.testing.assert_close(found[2], found[4])
    assert min((found[1] - found[2]).abs().max(), (found[1] - found[0]).abs().max()) > 1e-3


def test_on_the_disk_they_are_the_same(base, bank, tmp_path):
    written = bank.on_disk(tmp_path / "bank")
    written.verify()
    assert written.names == bank.names
    names = bank.names[:2]
    assert torch.equal(
        outputs(MultiLoraModel(base, written), names), outputs(MultiLoraModel(base, bank), names)
    )  # in a bank their hashes are their contents'
    assert written["tenant-0000"].blake3 != bank["tenant-0000"].blake3


def test_all_of_them_in_host_memory(base, bank):
    model = MultiLoraModel(base, bank, adapter_memory=2 * 2 * bank["tenant-0000"].nbytes)
    bank.hold_in_host(model)
    assert model.pool.host.keys == [entry.blake3 for entry in bank.values()]
    assert model.pool.host.nbytes == sum(entry.nbytes for entry in bank.values())
    fresh = outputs(MultiLoraModel(base, bank), bank.names[:2])
    for _ in range(2):
        assert torch.equal(outputs(model, bank.names[:2]), fresh)
        for name in bank.names[2:]:
            outputs(model, [name])
    assert model.pool.loads > 5 and model.pool.evictions == model.pool.loads - len(model.pool.keys)
    assert model.pool.loaded_bytes == model.pool.loads * bank["tenant-0000"].nbytes


def test_a_twin_has_the_same_weights_and_other_modules(base):
    other = twin(base)
    for (name, one), (_, two) in zip(base.named_parameters(), other.named_parameters(), strict=True):
        assert one is two, name
    assert not set(map(id, base.modules())) & set(map(id, other.modules()))
    assert torch.equal(outputs(MultiLoraModel(base), [None]), outputs(MultiLoraModel(other), [None]))
