"""Fetching GLIDE's files from a server that breaks off."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

import models
from models import ModelError, fetching, glide_hub
from models.presets import GLIDE, GlidePreset
from tests.tiny import tiny_glide


class Server(BaseHTTPRequestHandler):
    """Serves `files`, at most `most` bytes a request; remembers where the requests began."""

    files: dict[str, bytes] = {}
    most = 10**9
    ranges = True
    begun: list[tuple[str, int]] = []

    def do_GET(self) -> None:
        content = self.files.get(self.path.lstrip("/"))
        if content is None:
            self.send_error(404)
            return
        asked = self.headers.get("Range") if self.ranges else None
        begin = int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0
        self.begun.append((self.path.lstrip("/"), begin))
        if asked and begin >= len(content):
            self.send_error(416)
            return
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(len(content) - begin))
        self.end_headers()
        self.wfile.write(content[begin : begin + self.most])

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""


@contextmanager
def serving() -> Iterator[tuple[type[Server], str]]:
    """A server of its own class, and its address."""
    kind = type("Serving", (Server,), {"files": {}, "begun": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), kind)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield kind, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Server]]:
    """A server at the published address, of tiny networks that count as the published ones; and an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with serving() as (kind, address):
        monkeypatch.setattr(glide_hub, "ADDRESS", address)
        for name, factor in (("base", 1), ("upsample", 4)):
            model = tiny_glide(factor=factor)
            config = replace(model.text.config, vocab_size=50257, length=128)
            text = type(model.text)(config)
            torch.save(model.unet.state_dict() | text.state_dict(), tmp_path / f"{name}.pt")
            kind.files[f"{name}.pt"] = (tmp_path / f"{name}.pt").read_bytes()
            preset = GlidePreset(model.unet.config, config, model.schedule, model.resolution, factor)
            monkeypatch.setitem(GLIDE, name, preset)
        yield kind


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "cache" / "oneword" / "glide").iterdir())


def test_both_files_are_fetched_once(server: type[Server], tmp_path: Path) -> None:
    model = models.load("glide")
    assert (model.source, model.resolution, model.upsampler.resolution) == ("glide", 16, 64)
    assert files(tmp_path) == ["base.pt", "upsample.pt"]
    assert (tmp_path / "cache/oneword/glide/base.pt").read_bytes() == server.files["base.pt"]
    models.load("glide")
    assert server.begun == [("base.pt", 0), ("upsample.pt", 0)]


@pytest.mark.parametrize("load", [models.load, models.load_noisy_clip])
def test_a_dtype_that_cannot_be_is_refused_before_anything_is_fetched(
    server: type[Server], load: Callable[..., object]
) -> None:
    with pytest.raises(ModelError, match="float16 on a CPU runs hundreds of times slower than float32: use [^;]*$"):
        load("glide", dtype="float16", device="cpu")
    assert not server.begun


@pytest.mark.parametrize("name", glide_hub.CASCADES)
def test_a_cascade_is_of_a_base_and_its_upsampler(name: str) -> None:
    """Both see what is kept of an image, or neither does."""
    base, upsample = (GLIDE[part] for part in glide_hub.CASCADES[name])
    assert (base.inpaints, upsample.inpaints) == (name == "glide-inpaint",) * 2
    assert (base.factor, upsample.factor, upsample.resolution) == (1, 4, 4 * base.resolution)


@pytest.mark.parametrize("ranges", [True, False])
def test_a_broken_download_goes_on_where_it_broke_off(server: type[Server], tmp_path: Path, ranges: bool) -> None:
    server.most = 1000
    with pytest.raises(ModelError, match=r"ended after 1000 of .*put the file at .*base\.pt"):
        models.load("glide")
    assert files(tmp_path) == ["base.pt.part"]
    server.most, server.ranges = 10**9, ranges
    models.load("glide")
    assert server.begun == [("base.pt", 0), ("base.pt", 1000 if ranges else 0), ("upsample.pt", 0)]
    assert (tmp_path / "cache/oneword/glide/base.pt").read_bytes() == server.files["base.pt"]


@pytest.mark.parametrize("theirs_is_whole", [True, False])
def test_two_processes_may_go_on_with_one_download(
    server: type[Server], tmp_path: Path, theirs_is_whole: bool
) -> None:
    server.most = 1000
    with pytest.raises(ModelError, match="ended after 1000 of"):
        models.load("glide")
    whole, answer = server.files["base.pt"], server.do_GET
    path, part = (tmp_path / "cache/oneword/glide" / name for name in ("base.pt", "base.pt.part"))

    def both(self: Server) -> None:
        if part.is_file():                              # not of the upsampler
            with open(part, "r+b") as file:
                file.write(whole if theirs_is_whole else whole[:2000])
            if theirs_is_whole:
                part.replace(path)
        answer(self)

    server.most, server.do_GET = 10**9, both
    models.load("glide")
    assert path.read_bytes() == whole
    assert files(tmp_path) == ["base.pt", "upsample.pt"]
    assert server.begun == [("base.pt", 0), ("base.pt", 1000), ("upsample.pt", 0)]


def test_a_server_that_says_nothing_is_not_waited_for(server: type[Server], monkeypatch: pytest.MonkeyPatch) -> None:
    answered = threading.Event()
    monkeypatch.setattr(fetching, "TIMEOUT", 0.1)
    server.do_GET = lambda self: answered.wait(3)
    with pytest.raises(ModelError, match=r"base\.pt cannot be fetched \(timed out\)"):
        models.load("glide")
    answered.set()


@pytest.mark.parametrize("said", [None, ""])
def test_without_a_folder_for_caches_there_is_the_user_s_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str | None
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if said is not None:
        monkeypatch.setenv("XDG_CACHE_HOME", said)
    assert fetching.cache("glide") == tmp_path / ".cache/oneword/glide"


@pytest.mark.parametrize("more", [b"", b"and what belongs to another file"])
def test_a_part_that_is_all_there_is_fetched_anew(server: type[Server], tmp_path: Path, more: bytes) -> None:
    folder = tmp_path / "cache/oneword/glide"
    folder.mkdir(parents=True)
    (folder / "base.pt.part").write_bytes(server.files["base.pt"] + more)
    models.load("glide")
    assert (folder / "base.pt").read_bytes() == server.files["base.pt"]


def test_a_file_of_other_shapes_is_refused_by_name(server: type[Server], tmp_path: Path) -> None:
    other = tiny_glide()
    torch.save(other.unet.state_dict() | other.text.state_dict(), tmp_path / "other.pt")
    server.files["base.pt"] = (tmp_path / "other.pt").read_bytes()
    with pytest.raises(ModelError, match=r"token_embedding\.weight.*remove .*base\.pt to have it fetched anew"):
        models.load("glide")


def test_the_other_network_in_its_place_is_refused(server: type[Server]) -> None:
    server.files["upsample.pt"] = server.files["base.pt"]
    with pytest.raises(ModelError, match=r"upsample\.pt is GLIDE's base, and should be its upsample; remove"):
        models.load("glide")


def test_a_page_in_place_of_a_file_is_refused_by_name(server: type[Server]) -> None:
    page = b"<html>please log in</html>"
    server.files |= {"base.pt": page, "clip_text_enc.pt": page, "clip_image_enc.pt": page}
    for load in (lambda: models.load("glide"), models.load_noisy_clip):
        with pytest.raises(ModelError, match=r"\.pt.*remove .*\.pt to have it fetched anew"):
            load()


def test_a_server_that_does_not_say_how_long_a_file_is(server: type[Server], monkeypatch: pytest.MonkeyPatch) -> None:
    send = server.send_header
    monkeypatch.setattr(server, "send_header", lambda self, name, to: name == "Content-Length" or send(self, name, to))
    assert models.load("glide").upsampler is not None
    assert models.load("glide", upsampler=False).upsampler is None


def test_what_is_no_answer_and_no_place_are_said(
    server: type[Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "taken").write_text("a file, not a folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "taken"))
    with pytest.raises(ModelError, match=r"base\.pt is not in the cache and .* cannot be fetched"):
        models.load("glide")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(server, "do_GET", lambda self: self.wfile.write(b"not http\r\n\r\n"))
    with pytest.raises(ModelError, match=r"base\.pt is not in the cache and .* cannot be fetched"):
        models.load("glide")


def test_without_a_network_the_addresses_are_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: type[Server]
) -> None:
    monkeypatch.setattr(glide_hub, "ADDRESS", "http://127.0.0.1:1")
    with pytest.raises(ModelError, match=r"http://127\.0\.0\.1:1/base\.pt cannot be fetched.*1/upsample\.pt"):
        models.load("glide")
    assert files(tmp_path) == []


def test_of_two_files_the_one_that_the_server_lacks_is_named(server: type[Server], tmp_path: Path) -> None:
    del server.files["upsample.pt"]
    said = r"/upsample\.pt cannot be fetched \(Not Found\): .* \(needed in all: [^,]*/upsample\.pt\)$"
    with pytest.raises(ModelError, match=said):
        models.load("glide")
    assert files(tmp_path) == ["base.pt"]
