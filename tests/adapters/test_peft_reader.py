"""Reading checkpoints: what is damaged, unsafe or no checkpoint is refused by name, and nothing is run or written."""

import json
import math
import os
import pickle
import struct
import tempfile
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft_folders import CONFIG, WEIGHTS, base_of, edit_config, edit_tensors, key_of, save, small, tree
from safetensors.torch import load_file, save_file

from lorakit.adapters import peft_reader
from lorakit.adapters.dtypes import SAFETENSORS_DTYPES
from lorakit.adapters.peft_reader import (
    PICKLE,
    _map_safetensors,
    default_name,
    describe,
    read_checkpoint,
    reading_ahead,
)
from lorakit.errors import CheckpointError, LorakitError


@pytest.fixture(scope="module")
def tenant():
    return small()


@pytest.fixture
def folder(tenant, tmp_path):
    return save(tenant, tmp_path / "tenant")


def as_pickle(folder: Path, value=None) -> Path:
    """Turns a folder's safetensors into the pickle of old, or writes another value."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    torch.save(tensors if value is None else value, folder / PICKLE)
    return folder / PICKLE


def header_of(path: Path) -> tuple[dict, bytes]:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write_header(path: Path, header: object, payload: bytes) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + payload)


# What is read


def test_a_folder_gives_its_configuration_and_tensors(folder):
    checkpoint = read_checkpoint(folder)
    assert checkpoint.source == str(folder)
    assert checkpoint.peft_type == "LORA"
    assert dict(checkpoint.config) == json.loads((folder / CONFIG).read_text())
    stored = load_file(folder / WEIGHTS)
    assert {f"base_model.model.{key}" for key in checkpoint.tensors} == stored.keys()
    assert all(torch.equal(tensor, stored[f"base_model.model.{key}"]) for key, tensor in checkpoint.tensors.items())


def test_a_safe_pickle_gives_the_same_tensors(folder):
    expected = read_checkpoint(folder).tensors
    as_pickle(folder)
    tensors = read_checkpoint(folder).tensors
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[key], expected[key]) for key in expected)


def test_parameters_in_a_pickle_are_read_as_plain_tensors(folder):
    tensors = load_file(folder / WEIGHTS)
    as_pickle(folder, {key: torch.nn.Parameter(tensor) for key, tensor in tensors.items()})
    assert not any(tensor.requires_grad for tensor in read_checkpoint(folder).tensors.values())


def test_safetensors_are_preferred_to_a_pickle_beside_them(folder):
    (folder / PICKLE).write_bytes(b"never opened")
    assert read_checkpoint(folder).tensors


def test_a_live_model_gives_its_active_adapter():
    tenant = small(0)
    tenant.add_adapter("second", tenant.peft_config["default"])
    first = read_checkpoint(tenant)
    tenant.set_adapter("second")
    with torch.no_grad():
        for name, parameter in tenant.named_parameters():
            if ".second." in name:
                parameter.fill_(0.5)
    second = read_checkpoint(tenant)
    assert describe(tenant) == "PeftModel:second" and default_name(tenant) == "second"
    assert second.tensors.keys() == first.tensors.keys()
    assert all((tensor == 0.5).all() for tensor in second.tensors.values())
    assert not all((tensor == 0.5).all() for tensor in first.tensors.values())


def test_two_adapters_active_together_are_refused():
    tenant = small(0)
    tenant.add_adapter("second", tenant.peft_config["default"])
    tenant.base_model.set_adapter(["default", "second"])
    with pytest.raises(CheckpointError, match=r"PeftModel:default.*\['default', 'second'\].*set_adapter"):
        read_checkpoint(tenant)


def test_reading_a_live_model_leaves_no_file(tenant, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    read_checkpoint(tenant)
    assert tree(tmp_path) == {}


def test_a_live_model_that_cannot_be_written_out_is_a_typed_error(tenant, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    with pytest.raises(CheckpointError, match=r"PeftModel:default.*temporary.*TMPDIR"):
        read_checkpoint(tenant)


def test_linked_files_are_read_as_the_hub_cache_has_them(folder, tmp_path):
    linked = tmp_path / "linked"
    linked.mkdir()
    for name in (CONFIG, WEIGHTS):
        (linked / name).symlink_to(folder / name)
    assert read_checkpoint(linked).tensors.keys() == read_checkpoint(folder).tensors.keys()
    (tmp_path / "link").symlink_to(linked, target_is_directory=True)
    assert read_checkpoint(tmp_path / "link").tensors


def test_paths_may_hold_any_characters(tenant, tmp_path):
    for name in ("mit Leerzeichen", "schön-法律", "[bold]", "a=b"):
        assert read_checkpoint(save(tenant, tmp_path / name)).source.endswith(name)


@pytest.mark.parametrize(
    ("source", "name"),
    [("runs/sql", "sql"), ("runs/sql/", "sql"), ("runs/sql/../law", "law"), ("org/legal-lora", "legal-lora")],
)
def test_default_names(source, name):
    assert default_name(source) == default_name(Path(source)) == name


def test_the_folder_one_is_in_has_its_own_name(tmp_path, monkeypatch):
    (tmp_path / "sql" / "deep").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "sql" / "deep")
    assert (default_name("."), default_name(".."), default_name("./")) == ("deep", "sql", "deep")


# Places that hold no checkpoint


@pytest.mark.parametrize("source", ["", None, 3, b"runs/sql", ["runs/sql"], {"sql": "runs/sql"}])
def test_what_is_no_source_is_said_so(source):
    with pytest.raises(CheckpointError, match=r"a folder, a Hub id or a live PeftModel"):
        read_checkpoint(source)


def test_a_model_without_peft_is_said_so():
    with pytest.raises(CheckpointError, match=r"LlamaForCausalLM.*a live PeftModel"):
        read_checkpoint(base_of())


@pytest.mark.parametrize("source", ["org/not-in-the-cache", "nowhere", "a/b/c/d", "weird name!", "x\0y", "x" * 5000])
def test_nothing_there_offline(source):
    with pytest.raises(CheckpointError, match=r"(neither a folder here nor|too long).*Check") as caught:
        read_checkpoint(source)
    assert len(str(caught.value)) < 1000 + len(source)


def test_a_file_for_a_folder(folder):
    with pytest.raises(CheckpointError, match=r"is a file; name the folder"):
        read_checkpoint(folder / WEIGHTS)


def test_a_folder_of_adapters_names_them(folder):
    with pytest.raises(CheckpointError, match=r"holds no adapter_config.json; its subfolders \['tenant'\]"):
        read_checkpoint(folder.parent)
    (folder / CONFIG).unlink()
    with pytest.raises(CheckpointError, match=r"no adapter_config.json; name a folder that PEFT saved to"):
        read_checkpoint(folder)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_folder_or_a_dangling_link_for_a_file(folder, name):
    (folder / name).unlink()
    (folder / name).mkdir()
    with pytest.raises(CheckpointError, match=name):
        read_checkpoint(folder)
    (folder / name).rmdir()
    (folder / name).symlink_to(folder / "gone")
    with pytest.raises(CheckpointError, match=name):
        read_checkpoint(folder)
    (folder / name).unlink()
    (folder / name).symlink_to(folder / name)
    with pytest.raises(CheckpointError, match=name):
        read_checkpoint(folder)


@pytest.mark.parametrize("forbidden", ["tenant", CONFIG, WEIGHTS])
def test_what_may_not_be_read_is_a_typed_error(folder, monkeypatch, forbidden):
    """The system's refusal, played: as root nothing is forbidden."""

    def refuse(real):
        def call(path, *args, **kwargs):
            if Path(path).name == forbidden:
                raise PermissionError(13, "Permission denied", str(path))
            return real(path, *args, **kwargs)

        return call

    monkeypatch.setattr(Path, "read_text", refuse(Path.read_text))
    monkeypatch.setattr(Path, "iterdir", refuse(Path.iterdir))
    monkeypatch.setattr(Path, "stat", refuse(Path.stat))
    monkeypatch.setattr("lorakit.adapters.peft_reader.load_file", refuse(load_file))
    with pytest.raises(CheckpointError, match=r"tenant.*(Permission|PermissionError)"):
        read_checkpoint(folder)


# Broken configurations


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not readable as JSON"),
        ("{", "not readable as JSON"),
        ("r: 8", "not readable as JSON"),
        ('{"peft_type": "LORA"', "not readable as JSON"),
        ("\ud800", "not readable as JSON"),
        ("[" * 100_000, "not readable as JSON"),
        ('{"a":' * 100_000, "not readable as JSON"),
        ("[]", "names no peft_type"),
        ('"LORA"', "names no peft_type"),
        ("null", "names no peft_type"),
        ("3", "names no peft_type"),
        ("{}", "names no peft_type"),
        ('{"r": 8}', "names no peft_type"),
        ('{"peft_type": null}', "names no peft_type"),
        ('{"peft_type": 3}', "names no peft_type"),
        ('{"peft_type": ["LORA"]}', "names no peft_type"),
    ],
    ids=lambda text: repr(text[:20]),
)
def test_a_broken_configuration(folder, text, message):
    (folder / CONFIG).write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(CheckpointError, match=rf"tenant.*adapter_config.json.*{message}"):
        read_checkpoint(folder)


# Broken weights


def lengths(folder: Path) -> dict[str, int]:
    size = (folder / WEIGHTS).stat().st_size
    header = 8 + struct.unpack("<Q", (folder / WEIGHTS).read_bytes()[:8])[0]
    return {
        "empty": 0,
        "in the header's length": 5,
        "after the header's length": 8,
        "in the header": header // 2,
        "before the header's last byte": header - 1,
        "after the header": header,
        "in the data": (header + size) // 2,
        "before the last byte": size - 1,
    }


@pytest.mark.parametrize("place", list(range(8)))
def test_truncated_weights(folder, place):
    what, length = list(lengths(folder).items())[place]
    os.truncate(folder / WEIGHTS, length)
    with pytest.raises(CheckpointError, match=r"adapter_model.safetensors is damaged or truncated"):
        pytest.fail(f"read though cut {what}: {read_checkpoint(folder)}")


def lies(header: dict, payload: bytes) -> dict[str, object]:
    key = sorted(header)[1]
    entry = header[key]
    begin, end = entry["data_offsets"]

    def with_entry(**changes):
        return {**header, key: {**entry, **changes}}

    return {
        "a list": [],
        "no mapping": {**header, key: 3},
        "an unknown dtype": with_entry(dtype="F99"),
        "a dtype of another size": with_entry(dtype="F64"),
        "a shape of another size": with_entry(shape=[*entry["shape"], 2]),
        "a huge shape": with_entry(shape=[1 << 62, 1 << 62]),
        "a negative size": with_entry(shape=[-1, 4]),
        "offsets out of the file": with_entry(data_offsets=[begin + len(payload), end + len(payload)]),
        "offsets turned round": with_entry(data_offsets=[end, begin]),
        "a hole": {name: value for name, value in header.items() if name != key},
    }


@pytest.mark.parametrize("lie", lies({"__metadata__": {}, "x": {"shape": [1], "data_offsets": [0, 4]}}, b""))
def test_a_header_that_lies(folder, lie):
    header, payload = header_of(folder / WEIGHTS)
    write_header(folder / WEIGHTS, lies(header, payload)[lie], payload)
    with pytest.raises(CheckpointError, match=r"adapter_model.safetensors is damaged or truncated"):
        read_checkpoint(folder)


def test_a_header_of_impossible_length(folder):
    data = (folder / WEIGHTS).read_bytes()
    for length in (0, 1, len(data), 1 << 40, (1 << 64) - 1):
        (folder / WEIGHTS).write_bytes(struct.pack("<Q", length) + data[8:])
        with pytest.raises(CheckpointError, match="damaged or truncated"):
            read_checkpoint(folder)


def test_no_weights(folder):
    save_file({}, folder / WEIGHTS)
    with pytest.raises(CheckpointError, match="holds no tensor"):
        read_checkpoint(folder)
    (folder / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=r"neither adapter_model.safetensors nor adapter_model.bin.*save"):
        read_checkpoint(folder)


@pytest.mark.parametrize("prefix", ["", "model.", "base_model.model_", "module.base_model.model."])
def test_keys_without_pefts_prefix(folder, prefix):
    def rename(tensors):
        for key in list(tensors)[:2]:
            tensors[prefix + key.removeprefix("base_model.model.")] = tensors.pop(key)

    edit_tensors(folder, rename)
    with pytest.raises(CheckpointError, match=r"2 keys do not begin with 'base_model.model.'.*save_pretrained"):
        read_checkpoint(folder)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.int8, torch.uint8, torch.int64, torch.bool, torch.float8_e4m3fn]
)
def test_dtypes_that_are_not_served(folder, dtype):
    def cast(tensors):
        key = key_of(tensors, "q_proj", "lora_B")
        tensors[key] = tensors[key].to(dtype)

    edit_tensors(folder, cast)
    with pytest.raises(CheckpointError, match=rf"q_proj.lora_B.weight is {str(dtype)[6:]}; save .* as float32"):
        read_checkpoint(folder)


# Pickles


class Payload:
    """Writes a file if unpickled, and then looks like a checkpoint."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return exec, (f"open({str(self.path)!r}, 'w').close()",)


@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_pickle_is_not_run(folder, tmp_path, legacy):
    proof = tmp_path / "proof"
    tensors = load_file(folder / WEIGHTS)
    as_pickle(folder)
    torch.save({**tensors, "x": Payload(proof)}, folder / PICKLE, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError, match=r"adapter_model.bin.*may run code.*Save it again"):
        read_checkpoint(folder)
    assert not proof.exists()
    torch.load(folder / PICKLE, weights_only=False)
    assert proof.exists(), "the payload works, so the reader did refuse it"


@pytest.mark.parametrize(
    "value",
    [
        [torch.ones(2)],
        {"a": 3},
        {3: torch.ones(2)},
        {"state_dict": {"a": torch.ones(2)}},
        torch.ones(2),
        "text",
        None,
        {"base_model.model.x": torch.ones(2, 2).to_sparse()},
        {"base_model.model.x": torch.empty(2, 2, device="meta")},
        {"base_model.model.x": torch.ones(1).expand(1 << 44)},
        {"base_model.model.x": torch.ones(2, dtype=torch.complex64)},
    ],
    ids=lambda value: str(type(value).__name__),
)
def test_a_pickle_of_something_else(folder, value):
    (folder / WEIGHTS).unlink()
    torch.save(value, folder / PICKLE)
    with pytest.raises(CheckpointError, match=r"adapter_model.bin|save the adapter as float32"):
        read_checkpoint(folder)


def test_a_plain_pickle_and_garbage(folder):
    (folder / WEIGHTS).unlink()
    for data in (b"", b"\x80", b"PK\x03\x04", b"garbage", pickle.dumps({"a": 1}), pickle.dumps(os.system), b"\0" * 99):
        (folder / PICKLE).write_bytes(data)
        with pytest.raises(CheckpointError, match=r"adapter_model.bin"):
            read_checkpoint(folder)


# How it is mapped


@pytest.mark.parametrize("pad", range(8))
def test_every_dtype_is_read_as_the_library_reads_it_wherever_it_lies(tmp_path, pad):
    path, payload, header = tmp_path / "file", b"", {}
    for code, dtype in SAFETENSORS_DTYPES.items():
        for name, shape in (("matrix", [3, 5]), ("none", [0, 2]), ("number", [])):
            nbytes = math.prod(shape) * dtype.itemsize
            offsets = [len(payload), len(payload) + nbytes]
            header[f"{code}.{name}"] = {"dtype": code, "shape": shape, "data_offsets": offsets}
            payload += bytes(index % 2 if code == "BOOL" else 7 * index % 251 for index in range(nbytes))
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8 + pad)
    path.write_bytes(struct.pack("<Q", len(text)) + text + payload)
    ours, theirs = _map_safetensors(path), load_file(path)
    assert list(ours) == list(theirs)
    for key, tensor in theirs.items():
        assert (ours[key].dtype, ours[key].shape) == (tensor.dtype, tensor.shape)
        assert ours[key].data_ptr() % tensor.dtype.itemsize == 0
        assert bytes(ours[key].view(-1).view(torch.uint8)) == bytes(tensor.clone().view(-1).view(torch.uint8))


def test_a_dtype_that_only_the_library_knows(tmp_path):
    text = json.dumps({"x": {"dtype": "F4", "shape": [4, 4], "data_offsets": [0, 8]}}).encode()
    (tmp_path / "file").write_bytes(struct.pack("<Q", len(text)) + text + bytes(range(8)))
    ours, theirs = _map_safetensors(tmp_path / "file"), load_file(tmp_path / "file")
    assert ours["x"].dtype == theirs["x"].dtype and ours["x"].shape == theirs["x"].shape


def test_a_file_that_is_replaced_while_it_is_read(folder, monkeypatch):
    real = peft_reader.safe_open

    def opened(path, framework):
        file = real(path, framework=framework)
        os.rename(path, f"{path}.old")
        Path(path).write_bytes(Path(f"{path}.old").read_bytes()[:-4])
        return file

    monkeypatch.setattr(peft_reader, "safe_open", opened)
    with pytest.raises(CheckpointError, match="damaged or truncated: it changed while it was read"):
        read_checkpoint(folder)


def test_reading_ahead_asks_for_two_and_leaves_out_what_is_no_folder(tenant, folder, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(peft_reader, "_read_ahead", asked.append)
    sources = [folder, tenant, "org/hub-id", tmp_path / "absent"]
    with reading_ahead(sources) as ask:
        for _ in range(9):
            ask()
        for _ in range(2000):  # the rest is cancelled at the end
            if len(asked) < 3:
                time.sleep(0.005)
    assert asked == [folder / WEIGHTS, Path("org/hub-id") / WEIGHTS, tmp_path / "absent" / WEIGHTS]
    monkeypatch.undo()
    with reading_ahead(sources):
        pass  # and what cannot be opened is no error


# Any damage


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """The bytes of a sound checkpoint's files, the pickle's too."""
    folder = save(small(), tmp_path_factory.mktemp("sound"))
    weights = (folder / WEIGHTS).read_bytes()
    torch.save(load_file(folder / WEIGHTS), folder / PICKLE)
    files = {CONFIG: (folder / CONFIG).read_bytes(), WEIGHTS: weights, PICKLE: (folder / PICKLE).read_bytes()}
    return files.items  # a function, as its repr is short


@settings(max_examples=150)
@given(data=st.data())
@pytest.mark.parametrize("file", [CONFIG, WEIGHTS, PICKLE])
def test_any_bytes_are_read_or_refused(sound, file, data):
    damaged = bytearray(dict(sound())[file])
    # Most of a file is its tensors' values; what can go wrong is before and behind them.
    edge = min(len(damaged), 4096)
    anywhere = st.one_of(st.integers(0, edge - 1), st.integers(len(damaged) - edge, len(damaged) - 1))
    for _ in range(data.draw(st.integers(0, 3))):
        place = data.draw(anywhere)
        damaged[place : place + data.draw(st.integers(0, 9))] = data.draw(st.binary(max_size=9))
    if data.draw(st.booleans()):
        del damaged[data.draw(anywhere) :]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for other, content in sound():
            if other in (file, CONFIG) or (other == WEIGHTS and file == CONFIG):
                (folder / other).write_bytes(damaged if other == file else content)
        before = tree(folder)
        try:
            assert read_checkpoint(folder).tensors
        except LorakitError as error:
            assert name in str(error)
        assert tree(folder) == before


@settings(max_examples=100)
@given(
    field=st.sampled_from(["peft_type", "r", "lora_alpha", "target_modules", "x", "base_model_name_or_path"]),
    value=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=5,
    ),
)
def test_any_json_is_read_or_refused(tenant, tmp_path_factory, field, value):
    folder = tmp_path_factory.getbasetemp() / "any-json"
    if not folder.exists():
        save(tenant, folder)
    before = (folder / CONFIG).read_text()
    edit_config(folder, **{field: value})
    try:
        # As text: NaN is not equal to itself.
        assert json.dumps(read_checkpoint(folder).config[field]) == json.dumps(value)
    except LorakitError as error:
        assert str(folder) in str(error)
    finally:
        (folder / CONFIG).write_text(before)
