"""A hub on this machine that breaks off where it is told to, and what `make_shards` makes of it, phase by phase.

A process of its own: the hub's clients read their address once. Prints [phase, exit code, error lines, chunks kept] of
each phase.
"""

import contextlib
import io
import json
import os
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "a" * 40
ROWS = [json.dumps({"text": f"row {number} says {number * 7919} " * 9}) + "\n" for number in range(120)]
FILES = {f"data-{part}.jsonl": "".join(ROWS[60 * part : 60 * part + 60]).encode() for part in (0, 1)}


class Hub(BaseHTTPRequestHandler):
    """Answers what a streamed data set of two files asks for."""

    # Ends the connection in the middle of an answer whose path holds this.
    breaks_off_in = "nothing"

    def log_message(self, *_):
        pass

    def answer(self, body: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        named = {"Content-Length": str(len(body)), "X-Repo-Commit": COMMIT, "ETag": '"0"'} | headers
        for name, value in named.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if self.breaks_off_in in self.path else body)

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        asked = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        tree = [{"type": "file", "path": name, "size": len(data), "oid": "b" * 40} for name, data in FILES.items()]
        name = path.rpartition("/")[2]
        if "/paths-info/" in path:
            self.answer(json.dumps([entry for entry in tree if entry["path"] in asked]).encode())
        elif path.endswith(f"/tree/{COMMIT}"):
            self.answer(json.dumps(tree).encode())
        elif path.startswith("/api/datasets/some/set") and "/tree/" not in path:
            siblings = [{"rfilename": entry["path"]} for entry in tree]
            self.answer(json.dumps({"id": "some/set", "sha": COMMIT, "siblings": siblings}).encode())
        elif name in FILES:
            whole = FILES[name]
            first, last = (self.headers.get("Range") or f"bytes=0-{len(whole) - 1}").partition("=")[2].split("-")
            part = whole[int(first) : int(last or len(whole)) + 1]
            of = {"Content_Range": f"bytes {first}-{int(first) + len(part) - 1}/{len(whole)}"}
            self.answer(part, 206 if "Range" in self.headers else 200, **of)
        else:
            self.answer(b"{}", 404, X_Error_Code="EntryNotFound")

    do_HEAD = do_POST = do_GET


def main(out: Path, tokenizer: str) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        os.environ |= {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(out / "hf")}
        threading.Thread(target=server.serve_forever, daemon=True).start()
        import datasets

        from attnres.commands import make_shards
        from attnres.data.corpus import chunks

        chunks.CHUNK_DOCUMENTS = 20
        # The clients try again for minutes.
        time.sleep = lambda _: None
        datasets.config.STREAMING_READ_MAX_RETRIES = 1
        results = []

        def run(phase: str, breaks_off_in: str, words: str) -> None:
            Hub.breaks_off_in = breaks_off_in
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said:
                code = make_shards.main(f"--hub some/set {words}".split())
            lines = [line for line in said.getvalue().splitlines() if line.startswith("error: ")]
            results.append([phase, code, lines, len(list(out.glob("out.building/chunks/0*")))])

        fractions = "--validation 0.1 --probe-pilot 0.1 --probe-confirm 0.1"
        words = f"--out {out / 'out'} --tokenizer {tokenizer} --workers 1 {fractions}"
        run("commit", "/revision/main", words)
        run("listing", "/tree/", words)
        run("file", "data-1.jsonl", words)
        run("whole", "nothing", words)
        run("tokenizer", "/api/", f"--out {out / 'other'} --tokenizer some/model")
        server.shutdown()
    run("gone", "nothing", f"--out {out / 'other'} --tokenizer {tokenizer}")
    sys.stdout.write(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
