"""Tile sizes: the files that ship can be read and make sense to the kernels."""

import dataclasses

import pytest
import torch

from lorakit_kernels import paged, sgmv, tuning
from lorakit_kernels.prefill import block_r
from lorakit_kernels.tuning import Dense, Paged, Tiles, file_name, read, tiles, write

FILES = sorted(tuning._FOLDER.glob("*.json"))


def test_a_device_names_its_file():
    assert file_name("NVIDIA H100 80GB HBM3") == "NVIDIA_H100_80GB_HBM3.json"
    assert file_name("NVIDIA A100-SXM4-80GB") == "NVIDIA_A100_SXM4_80GB.json"
    assert file_name(" GPU (tm) ") == "GPU_tm.json"


def test_there_is_a_fallback():
    fallback = tuning._FOLDER / "fallback.json"
    assert fallback in FILES
    assert tiles(torch.device("cpu")) == read(fallback)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_files_suit_the_kernels(path):
    assert path.name == file_name(path.stem)
    sizes = read(path)
    assert sizes.decode_tokens >= 1
    decode, many = sizes.decode, sizes.prefill
    # Triton's tiles and warps are powers of two.
    for name, size in (dataclasses.asdict(decode) | dataclasses.asdict(many)).items():
        assert isinstance(size, int) and size >= 1, name
        assert size & (size - 1) == 0 or name in ("split_k", "shrink_stages", "expand_stages"), name
    # Sums are written by whole tiles of ranks, so the most ranks must be whole tiles.
    assert sgmv.RANKS % decode.block_r == 0
    # What a matrix unit multiplies at least.
    assert min(many.block_m, many.block_k, many.block_n, block_r(sgmv.RANKS, 4, torch.float32)) >= 16
    assert many.split_k % many.block_k == 0
    if sizes.dense is not None:
        own = dataclasses.asdict(sizes.dense)
        assert all(size >= 1 and (size & (size - 1) == 0 or name == "stages") for name, size in own.items())
        assert min(sizes.dense.block_n, sizes.dense.block_k) >= 16
    for own in filter(None, (sizes.paged, sizes.paged_many)):
        assert own.block >= 16 and own.block & (own.block - 1) == 0
        # What a row is cut into is of whole tiles.
        assert paged._LEAST % own.block == 0 and own.warps in (1, 2, 4, 8) and own.stages >= 1
    assert (sizes.paged is None) == (sizes.paged_many is None)
    assert max(decode.shrink_warps, decode.expand_warps, many.shrink_warps, many.expand_warps) <= 32


@pytest.mark.parametrize(
    ("dense", "attention"),
    [(None, {}), (Dense(64, 32, 128, 4, 3), {"paged": Paged(64, 4, 2), "paged_many": Paged(32, 1, 3)})],
)
def test_what_is_written_is_read(tmp_path, dense, attention):
    fallback = read(tuning._FOLDER / "fallback.json")
    sizes = Tiles(
        decode_tokens=7,
        decode=dataclasses.replace(fallback.decode, block_k=1024),
        prefill=dataclasses.replace(fallback.prefill, block_m=128),
        prefill_wide=dataclasses.replace(fallback.prefill, block_m=16),
        dense=dense,
        **attention,
    )
    write(tmp_path / "some.json", sizes)
    assert read(tmp_path / "some.json") == sizes != fallback


def test_a_file_with_a_size_that_is_not_known_is_refused(tmp_path):
    path = tmp_path / "some.json"
    write(path, read(tuning._FOLDER / "fallback.json"))
    path.write_text(path.read_text().replace('"block_k"', '"block_q"'))
    with pytest.raises(TypeError):
        read(path)
