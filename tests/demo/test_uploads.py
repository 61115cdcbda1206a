"""What visitors bring is not trusted."""

import zipfile

import pytest

from lorakit.demo import uploads
from lorakit.demo.examples import MOST, read_table
from lorakit.errors import CheckpointError, ConfigError

FILES = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"weights"}


def archive(path, members, **options):
    with zipfile.ZipFile(path, "w", **options) as opened:
        for name, content in members:
            opened.writestr(name, content)
    return path


def test_only_a_checkpoints_files_come_out(tmp_path):
    members = [(f"deep/{name}", content) for name, content in FILES.items()]
    members += [("../../evil.py", b"1"), ("/etc/evil", b"1"), ("deep/adapter_model.bin", b"pickle")]
    uploads.unpack([archive(tmp_path / "a.zip", members)], tmp_path / "out")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == FILES
    assert {path.name for path in tmp_path.rglob("*")} == {"a.zip", "out", *FILES}


def test_a_path_that_leads_out_leads_nowhere(tmp_path):
    members = [(f"../../{name}", content) for name, content in FILES.items()]
    uploads.unpack([archive(tmp_path / "a.zip", members)], tmp_path / "deep" / "out")
    assert {path.name for path in (tmp_path / "deep" / "out").iterdir()} == set(FILES)
    assert not (tmp_path.parent / "adapter_config.json").exists()


def test_what_grows_too_large_is_cut_off(tmp_path, monkeypatch):
    monkeypatch.setattr(uploads, "MOST_BYTES", 3 << 20)
    bomb = [("adapter_config.json", b"{}"), ("adapter_model.safetensors", bytes(50 << 20))]
    path = archive(tmp_path / "a.zip", bomb, compression=zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 1 << 20
    with pytest.raises(CheckpointError, match="larger than 3 MiB"):
        uploads.unpack([path], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("members", "told"),
    [
        ([("adapter_config.json", b"{}")], "adapter_model.safetensors is missing"),
        ([], "adapter_config.json is missing"),
        ([("a/adapter_config.json", b"{}"), ("b/adapter_config.json", b"{}")], "2 times"),
    ],
)
def test_archives_without_a_checkpoint(tmp_path, members, told):
    with pytest.raises(CheckpointError, match=told):
        uploads.unpack([archive(tmp_path / "a.zip", members)], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_file_that_only_says_that_it_is_an_archive(tmp_path):
    path = archive(tmp_path / "a.zip", FILES.items())
    for content in (b"", b"PK", path.read_bytes()[:-30], b"\0" * 100):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"a\.zip cannot be unpacked"):
            uploads.unpack([path], tmp_path / "out")


@pytest.mark.parametrize(
    ("names", "expected"),
    [(["legal.zip"], "legal"), (["my tenant (1).zip"], "my-tenant-1"), (list(FILES), ""), (["….zip"], "")],
)
def test_names(tmp_path, names, expected):
    assert uploads.name_of([tmp_path / name for name in names]) == expected


ROWS = [{"prompt": f"p{i}", "completion": f"c, {i}"} for i in range(4)]


@pytest.mark.parametrize(
    "text",
    [
        "\n".join(f"p{i}\tc, {i}" for i in range(4)),
        "prompt\tanswer\n" + "\n".join(f" p{i} \t c, {i} " for i in range(4)) + "\n\n",
        "Question,Answer\n" + "\n".join(f'p{i}, "c, {i}"' for i in range(4)),
    ],
)
def test_tables(text):
    assert read_table(text) == ROWS


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "0 rows"),
        ("a\tb", "1 rows"),
        ("\n".join(["a\tb"] * (MOST + 1)), f"{MOST + 1} rows"),
        ("a\tb\na\tb\na\tb\na", "row 4 has 1 cells"),
        ("a\tb\na\t\na\tb\na\tb", "row 2 has 1 cells"),
        ("a\tb\tc\na\tb\na\tb\na\tb", "row 1 has 3 cells"),
        ("a\t" + "b" * 5000 + "\na\tb\na\tb\na\tb", "row 1 is longer"),
    ],
)
def test_tables_that_cannot_be_read(text, told):
    with pytest.raises(ConfigError, match=told):
        read_table(text)
