"""An emulator of Google Cloud Storage on localhost: gcp-storage-emulator, and what that leaves out.

    python -m tests.bucket

serves an empty bucket, gs://bucket, until its standard input ends. It forbids to write objects whose names match
`FORBIDDEN`.
"""

import contextlib
import functools
import http.server
import logging
import re
import subprocess
import sys
import threading
from urllib.parse import parse_qs, unquote, urlsplit

NAME = "bucket"
FORBIDDEN = r"forbidden|/checkpoints/13/variables/"


@contextlib.contextmanager
def emulator():
    """Starts the emulator, and yields the environment variables of programs that are to use it."""
    command = [sys.executable, "-m", "tests.bucket"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        address = process.stdout.readline().strip()
        yield {
            "STORAGE_EMULATOR_HOST": address,  # for gcsfs and google-cloud-storage
            "TENSORSTORE_GCS_HTTP_URL": address,
            "CLOUD_STORAGE_EMULATOR_ENDPOINT": address,  # for array_record
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # It would ask the real service what kind of bucket this is.
        }
        process.stdin.close()


def serve():
    from gcp_storage_emulator.handlers import buckets
    from gcp_storage_emulator.server import RequestHandler
    from gcp_storage_emulator.storage import Storage

    logging.disable()

    class Memory(Storage):
        def _write_config_to_file(self):
            pass  # Nothing reads it here, and it is written anew for each object.

    class Server(http.server.HTTPServer):  # One request at a time: so what was checked still holds when it is written.
        request_queue_size = 128

        def handle_error(self, request, client_address):
            pass  # Clients end connections whose answer they need not know to the end.

    class Handler(RequestHandler):
        """Adds generations of objects and preconditions on them, and forbids what is forbidden."""

        timeout = 20  # seconds that a client may be silent within a request: the others wait for it

        def do_POST(self):
            if "/moveTo/" in self.path:
                self._refuse(400)  # Then gcsfs copies the object and deletes the first one.
            else:
                self._answer(super().do_POST)

        def do_PUT(self):
            self._answer(super().do_PUT)

        def do_DELETE(self):
            self._answer(super().do_DELETE)

        def send_response(self, code, message=None):
            super().send_response(code, message)
            name, query = self._object()
            if self.command == "GET" and code < 300 and name and query.get("alt") == ["media"]:
                self.send_header("x-goog-generation", self._generation(name))

        def _answer(self, handle):
            name, query = self._object()
            if self.command != "DELETE" and re.search(FORBIDDEN, name or ""):
                self._refuse(403)
            elif name and query.get("ifGenerationMatch", [self._generation(name)]) != [self._generation(name)]:
                self._refuse(412)
            else:
                handle()

        def _refuse(self, status):
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def _object(self):
            """The name of the object that the request is about, and its query."""
            url = urlsplit(self.path)
            query = parse_qs(url.query)
            found = re.search(r"/b/[^/]+/o(?:/([^/]+))?$", url.path)
            return found and (unquote(found[1]) if found[1] else query.get("name", [None])[0]), query

        def _generation(self, name):
            return self.storage.objects.get(NAME, {}).get(name, {}).get("generation", "0")

    storage = Memory(use_memory_fs=True)
    buckets.create_bucket(NAME, storage)
    with Server(("127.0.0.1", 0), functools.partial(Handler, storage)) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}).start()
        print(f"http://127.0.0.1:{server.server_address[1]}", flush=True)
        sys.stdin.read()
        server.shutdown()


if __name__ == "__main__":
    serve()
