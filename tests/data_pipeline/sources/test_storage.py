"""Finding and opening inputs: patterns, storages, and failures told apart from what files hold."""

import io
import zipfile

import pytest
from fsspec.registry import known_implementations

from data_pipeline.__main__ import main
from data_pipeline.sources import storage
from data_pipeline.sources.base import BadShardError, StorageError
from data_pipeline.sources.storage import find_inputs, open_input


@pytest.fixture
def folder(tmp_path):
    """Four tars, a folder that is called like one, and something else."""
    for name in ("00000.tar", "00001.tar", "00003.tar", "deep/down/00009.tar", "notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    (tmp_path / "00002.tar").mkdir()
    return tmp_path


def names(found, folder):
    return [str(path).removeprefix(f"{folder}/") for path in found]


def read(url):
    with open_input(url) as file:
        return file.read()


def drain(file, size):
    return b"".join(iter(lambda: file.read(size), b""))


# --- patterns ----------------------------------------------------------------------------------

PATTERNS = {
    "*.tar": ["00000.tar", "00001.tar", "00003.tar"],
    "0000?.tar": ["00000.tar", "00001.tar", "00003.tar"],
    "0000[13].tar": ["00001.tar", "00003.tar"],
    "**/*.tar": ["00000.tar", "00001.tar", "00003.tar", "deep/down/00009.tar"],
    "00000.tar": ["00000.tar"],
    "{00000..00001}.tar": ["00000.tar", "00001.tar"],
    "{00003,00001}.tar": ["00001.tar", "00003.tar"],
    "{0000,deep/down/0000}*.tar": ["00000.tar", "00001.tar", "00003.tar", "deep/down/00009.tar"],
}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_of_paths(folder, pattern):
    assert names(find_inputs(f"{folder}/{pattern}"), folder) == PATTERNS[pattern]


@pytest.mark.parametrize("pattern", [p for p in PATTERNS if "**" not in p])
def test_patterns_of_urls(folder, pattern):
    found = find_inputs(f"file://{folder}/{pattern}")
    assert names(found, f"file://{folder}") == PATTERNS[pattern]
    assert [read(url).decode() for url in found] == PATTERNS[pattern]


def test_several_patterns_keep_their_order_and_each_file_comes_once(folder):
    found = find_inputs([f"{folder}/00003.tar", f"{folder}/*.tar", f"{folder}/00000.tar"])
    assert names(found, folder) == ["00003.tar", "00000.tar", "00001.tar"]


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_named_file_that_is_missing_keeps_its_place(folder, scheme):
    found = find_inputs(f"{scheme}{folder}/{{00000..00004}}.tar")
    assert names(found, f"{scheme}{folder}") == [f"0000{i}.tar" for i in range(5)]
    for missing in (found[2], found[4]):  # 00002 is a folder
        with pytest.raises(BadShardError, match=r"No such file: .*0000[24]\.tar"):
            read(missing)


def test_home_is_found_though_the_shell_did_not_see_it(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    assert names(find_inputs("~/*1.tar"), folder) == ["00001.tar"]
    assert names(find_inputs("~/{00000,00001}.tar"), folder) == ["00000.tar", "00001.tar"]
    assert read("~/00001.tar") == b"00001.tar"


def test_file_that_is_called_like_a_pattern_is_found(tmp_path):
    (tmp_path / "a[1].tar").write_bytes(b"x")
    assert find_inputs(f"{tmp_path}/a[1].tar") == [f"{tmp_path}/a[1].tar"]


@pytest.mark.parametrize("scheme", ["", "file://"])
@pytest.mark.parametrize("pattern", ["*.zip", "1.tar", "{1..3}.tar", "", "none/*.tar", "00002.tar"])
def test_pattern_that_matches_no_file_says_what_to_give(folder, scheme, pattern):
    with pytest.raises(ValueError, match=r"no file matches .*give a pattern of inputs such as"):
        find_inputs([f"{folder}/*.tar", f"{scheme}{folder}/{pattern}"])


def test_unbalanced_braces_are_refused(folder):
    with pytest.raises(ValueError, match="Unbalanced braces"):
        find_inputs(f"{folder}/{{00000.tar")


# --- storages ----------------------------------------------------------------------------------


def test_memory(memory):
    for name in ("grit/1.tar", "grit/0.tar", "grit/deep/2.tar"):
        memory.pipe(f"/{name}", name.encode())
    assert find_inputs("memory://grit/*.tar") == ["memory://grit/0.tar", "memory://grit/1.tar"]
    assert find_inputs("memory://grit/{0..1}.tar") == ["memory://grit/0.tar", "memory://grit/1.tar"]
    assert read("memory://grit/1.tar") == b"grit/1.tar"
    with pytest.raises(BadShardError, match="No such file: memory://grit/7"):
        read("memory://grit/7.tar")


def test_url_of_a_storage_inside_another_is_kept_whole(tmp_path):
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        for name in ("0.tar", "1.tar"):
            archive.writestr(name, name)
    found = find_inputs(f"zip://*.tar::file://{tmp_path}/all.zip")
    assert found == [f"zip://{n}.tar::file://{tmp_path}/all.zip" for n in (0, 1)]
    assert read(found[1]) == b"1.tar"


def test_user_and_host_of_a_url_are_kept(flaky):
    flaky._strip_protocol = classmethod(lambda cls, path: path.split("@host", 1)[-1])
    flaky.files["/data/0.tar"] = b"x"
    assert find_inputs("flaky://me@host/data/*.tar") == ["flaky://me@host/data/0.tar"]


def test_path_that_its_storage_writes_otherwise_is_spelt_out(flaky):
    flaky._strip_protocol = classmethod(lambda cls, path: path.split("://")[-1].replace("//", "/"))
    flaky.files["data/0.tar"] = b"x"
    assert find_inputs("flaky://data//*.tar") == ["flaky://data/0.tar"]


def test_thousands_of_names_are_not_all_asked_for(flaky, monkeypatch):
    asked = []
    info = flaky.info
    monkeypatch.setattr(flaky, "info", lambda self, path: asked.append(path) or info(self, path))
    flaky.files["00003.tar"] = b"x"
    assert len(find_inputs("flaky://{00000..04999}.tar")) == 5000
    assert len(asked) <= 64


NOWHERE = {
    "unknown": ("nowhere://bucket/*.tar", r"Protocol not known: nowhere\); give a path, or a URL"),
    "of a package": ("someone://bucket/*.tar", r"another package: pip install 'someonefs' \(Get"),
    "of an extra": ("fancy://bucket/0.tar", r"another package: pip install 'fsspec\[fancy\]'"),
}


@pytest.mark.parametrize("name", NOWHERE)
@pytest.mark.parametrize("use", [find_inputs, read])
def test_storage_that_is_not_there_says_what_to_do(name, use, monkeypatch):
    for protocol, place in (("someone", "someonefs.Files"), ("fancy", "fsspec.fancy.Files")):
        known = {"class": place, "err": "Get it first"}
        monkeypatch.setitem(known_implementations, protocol, known)
    url, message = NOWHERE[name]
    with pytest.raises(ValueError, match=message):
        use(url)


@pytest.mark.parametrize("pattern", ["*.tar", "0.tar", "{0..9}.tar"])
def test_storage_that_can_not_be_listed_is_no_empty_one(flaky, pattern):
    flaky.fail_listing = True
    with pytest.raises(ValueError, match=r"can't be looked up: PermissionError: access denied"):
        find_inputs(f"flaky://{pattern}")


@pytest.mark.parametrize("use", [find_inputs, read])
def test_storage_that_can_not_be_reached(flaky, monkeypatch, use):
    def refuse(self, *_, **__):
        raise TimeoutError("no answer")

    monkeypatch.setattr(flaky, "__init__", refuse)
    expected = ValueError if use is find_inputs else StorageError
    with pytest.raises(expected, match=r"flaky://0\.tar can't be .*TimeoutError: no answer"):
        use("flaky://0.tar")


# --- opening and reading -----------------------------------------------------------------------


def test_what_can_not_be_a_file_is_missing(tmp_path):
    (tmp_path / "file").write_bytes(b"x")
    for name in ("none", "", "file/below", "x" * 300):
        with pytest.raises(BadShardError, match="No such file"):
            read(f"{tmp_path}/{name}")


def test_file_that_is_there_but_can_not_be_opened_is_no_missing_one(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(storage, "open", refuse, raising=False)  # root may read everything
    with pytest.raises(StorageError, match=r"x\.tar can't be opened: PermissionError"):
        read(f"{tmp_path}/x.tar")


@pytest.mark.parametrize("size", [1, 100, -1])
def test_failure_in_the_middle_is_the_storage_s(flaky, size):
    flaky.files["0.tar"] = bytes(1000)
    flaky.fail_at = 500
    with (
        open_input("flaky://0.tar") as file,
        pytest.raises(StorageError, match=r"reading flaky://0\.tar failed: ConnectionResetError"),
    ):
        drain(file, size)
    assert flaky.bytes_read == (0 if size < 0 else 500)


class Short(io.BytesIO):
    """Knows that it has 1,000 bytes, and gives 500."""

    size = 1000


@pytest.mark.parametrize("size", [100, 300, 10_000, -1])
def test_end_before_the_size_that_the_storage_states_is_a_failure(flaky, monkeypatch, size):
    monkeypatch.setattr(flaky, "open", lambda *_, **__: Short(bytes(500)))
    with (
        open_input("flaky://0.tar") as file,
        pytest.raises(StorageError, match="nothing after byte 500 of 1000"),
    ):
        drain(file, size)


def test_file_is_closed_whatever_happens(tmp_path):
    (tmp_path / "a").write_bytes(b"x")
    with pytest.raises(KeyError), open_input(f"{tmp_path}/a") as file:
        raise KeyError
    assert file.closed


# --- HTTP --------------------------------------------------------------------------------------


def test_http(server):
    server.files.update({"/0.tar": b"zero", "/1.tar": b"one", "/a.txt": b"text"})
    tars = [f"{server.url}/0.tar", f"{server.url}/1.tar"]
    assert find_inputs(f"{server.url}/*.tar") == tars
    assert find_inputs(f"{server.url}/{{0..1}}.tar") == tars
    assert [read(url) for url in tars] == [b"zero", b"one"]


def test_http_query_is_no_wildcard(server):
    server.files["/0.tar"] = b"zero"
    assert find_inputs(f"{server.url}/0.tar?token=[x]*") == [f"{server.url}/0.tar?token=[x]*"]
    assert read(f"{server.url}/0.tar?token=x") == b"zero"


def test_http_missing_file_is_missing(server):
    with pytest.raises(BadShardError, match="No such file"):
        read(f"{server.url}/0.tar")
    with pytest.raises(ValueError, match="no file matches"):
        find_inputs(f"{server.url}/0.tar")


@pytest.mark.parametrize("pattern", ["0.tar", "{0..3}.tar", "*.tar"])
def test_http_server_that_is_down_is_no_missing_file(server, pattern):
    server.stop()
    with pytest.raises(ValueError, match=r"can't be looked up: .*Connect call failed"):
        find_inputs(f"{server.url}/{pattern}")
    with pytest.raises(StorageError, match=r"can't be opened: .*Cannot connect to host"):
        read(f"{server.url}/0.tar")


@pytest.mark.parametrize("fault", ["cut", "page", "busy"])
def test_http_failure_in_the_middle_is_the_storage_s(server, fault):
    server.files["/0.tar"] = bytes(12_000_000)
    server.fault = fault
    with open_input(f"{server.url}/0.tar") as file, pytest.raises(StorageError, match="failed"):
        drain(file, 10_000)


@pytest.mark.parametrize("fault", [None, "plain"])
def test_http_whole_file_in_few_requests(server, fault):
    server.files["/0.tar"] = bytes(range(250)) * 48_000  # 12 MB
    server.fault = fault
    with open_input(f"{server.url}/0.tar") as file:
        assert drain(file, 10_000) == server.files["/0.tar"]
    assert len(server.requests) <= 6


# --- as it is typed ----------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["none/*.tar", "file:///none/{0..9}.tar", "nowhere://b/*.tar"])
def test_command_says_in_one_line_what_is_wrong_with_a_pattern(tmp_path, capsys, pattern):
    assert main(["grit", "--input", pattern, "--output", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("alpha-clip-data: ")
    assert pattern in line
    assert not (tmp_path / "out").exists()
