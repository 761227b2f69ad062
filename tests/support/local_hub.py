"""A Hub that is a folder of this machine: real HTTP, with the ways of the real one that a client can notice."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch
from golden_files import golden


class LocalHub:
    """Serves the folders `<root>/<owner>/<name>`, and `<name>@<revision>` beside them, as repositories.

    As with the real Hub, weights are on another server to which `resolve/` redirects, their ETag looks like a
    SHA-256, and ranges are answered.

    Attributes:
        address: for `HF_ENDPOINT`.
        downloaded: the files of which a whole or a rest was asked for, in order; headers of weights are not counted.
        ranges: the `Range` of each GET of weights, None where there was none.
        cut_after: bytes after which the next answer with a whole file ends, as a bad line does; once.
        sends_etag: whether answers have an ETag.
    """

    def __init__(self, root: Path):
        self.root = root
        self.cut_after: int | None = None
        self.sends_etag = True
        self.forget()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                parts = self.path.partition("?")[0].replace("%2F", "/").strip("/").split("/")
                if parts[:2] == ["api", "models"]:
                    repository, *rest = parts[3:]
                    self.answer(hub.describe(f"{parts[2]}/{repository}", tree="tree" in rest), {})
                elif self.server is hub.servers[1]:
                    self.send_weights(hub.root.joinpath(*parts))
                elif parts[2:3] == ["resolve"]:
                    self.resolve(*parts[:2], parts[3], "/".join(parts[4:]))
                else:
                    self.answer(None, {})

            do_HEAD = do_GET

            def resolve(self, owner: str, name: str, revision: str, file: str) -> None:
                repository = hub.root / owner / name
                commits = {hub.commit(folder): folder for folder in repository.parent.glob(f"{name}*")}
                named = repository if revision == "main" else repository.with_name(f"{name}@{revision}")
                folder = commits.get(revision, named)
                error = next(
                    (code for code, there in (
                        ("RepoNotFound", repository), ("RevisionNotFound", folder), ("EntryNotFound", folder / file),
                    ) if not there.exists()),
                    None,
                )  # fmt: skip
                headers = {"X-Repo-Commit": hub.commit(folder)}
                if error is not None:
                    self.answer(None, {**headers, "X-Error-Code": error})
                    return
                if hub.sends_etag:
                    headers["X-Linked-Etag" if file.endswith(".safetensors") else "ETag"] = hub.etag(folder / file)
                if not file.endswith(".safetensors"):
                    hub.downloaded += [file] * (self.command == "GET")
                    self.answer((folder / file).read_bytes(), headers)
                    return
                size = str((folder / file).stat().st_size)
                location = f"{hub.weights_address}/{(folder / file).relative_to(hub.root)}"
                self.answer(b"", {**headers, "X-Linked-Size": size, "Location": location}, status=302)

            def send_weights(self, file: Path) -> None:
                size, asked = file.stat().st_size, self.headers.get("Range")
                first, last = 0, size - 1
                if asked is not None:
                    start, end = re.fullmatch(r"bytes=(\d+)-(\d*)", asked).groups()
                    first, last = int(start), min(int(end or last), last)
                self.send_response(200 if asked is None else 206)
                self.send_header("Content-Length", str(last + 1 - first))
                self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
                self.send_header("Accept-Ranges", "bytes")
                self.end_headers()
                if self.command != "GET":
                    return
                hub.ranges.append(asked)
                if last == size - 1 and not (asked or "").startswith("bytes=0-"):
                    hub.downloaded.append(str(file.relative_to(hub.root)).split("/", 2)[2])
                    if hub.cut_after is not None:
                        last, hub.cut_after = first + hub.cut_after - 1, None
                with open(file, "rb") as content:
                    content.seek(first)
                    while first <= last:
                        piece = content.read(min(1 << 20, last + 1 - first))
                        self.wfile.write(piece)
                        first += len(piece)
                self.close_connection = True

            def answer(self, body: bytes | None, headers: dict[str, str], status: int = 200) -> None:
                self.send_response(404 if body is None else status)
                for name, value in {**headers, "Content-Length": str(len(body or b""))}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body or b"")

            def log_message(self, *arguments) -> None:
                pass

        self.servers = [ThreadingHTTPServer(("127.0.0.1", 0), Handler) for _ in range(2)]
        self.address, self.weights_address = (f"http://127.0.0.1:{server.server_port}" for server in self.servers)
        for server in self.servers:
            threading.Thread(target=server.serve_forever, daemon=True).start()

    def forget(self) -> None:
        """Forget what was asked for so far."""
        self.downloaded: list[str] = []
        self.ranges: list[str | None] = []

    @staticmethod
    def etag(file: Path) -> str:
        """A new one whenever the file is."""
        state = f"{file}{file.stat().st_size}{file.stat().st_mtime_ns}"
        return f'"{hashlib.sha256(state.encode()).hexdigest()}"'

    @staticmethod
    def commit(folder: Path) -> str:
        """A new one whenever a file of the folder is."""
        files = (file for file in sorted(folder.rglob("*")) if file.is_file())
        state = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        return hashlib.sha1(f"{folder}{state}".encode()).hexdigest()

    def describe(self, repository: str, tree: bool) -> bytes | None:
        folder = self.root / repository
        if not folder.is_dir():
            return None
        files = {str(file.relative_to(folder)): file for file in sorted(folder.rglob("*")) if file.is_file()}
        if tree:
            listing = [
                {"type": "file", "path": name, "size": file.stat().st_size, "oid": self.etag(file).strip('"')}
                for name, file in files.items()
            ]
            return json.dumps(listing).encode()
        siblings = [{"rfilename": name} for name in files]
        return json.dumps({"id": repository, "sha": self.commit(folder), "siblings": siblings}).encode()

    def close(self) -> None:
        for server in self.servers:
            server.shutdown()
            server.server_close()


def write_released(path: Path, preset: str) -> None:
    """A file with the names, shapes and size of a released tokenizer, all zeros, which take no room on a disk."""
    shapes = json.loads(golden(f"official_autoencoder_keys_{preset}.json").read_text())["keys"]
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * torch.Size(shape).numel()
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
