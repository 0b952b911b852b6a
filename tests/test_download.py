"""Downloads from a real server on this machine: whole and checked, or a sentence."""

import hashlib
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest

from models.download import DownloadError, fetch

CONTENT = b"weights" * 1000
NAME = f"net-{hashlib.sha256(CONTENT).hexdigest()[:8]}.pth"


class Quiet(SimpleHTTPRequestHandler):
    """Serves the folder it is given and writes no log."""

    def log_message(self, *_):
        pass


@pytest.fixture
def address(tmp_path):
    published = tmp_path / "published"
    published.mkdir()
    (published / NAME).write_bytes(CONTENT)
    (published / "net-00000000.pth").write_bytes(CONTENT)

    def handler(*arguments):
        return Quiet(*arguments, directory=str(published))

    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join(10)


def test_a_file_is_fetched_once(address, tmp_path):
    path = fetch(f"{address}/{NAME}", tmp_path / "kept")
    assert path.read_bytes() == CONTENT
    again = fetch(f"http://127.0.0.1:9/{NAME}", tmp_path / "kept")
    assert again == path
    assert list((tmp_path / "kept").iterdir()) == [path]


def test_a_damaged_file_is_fetched_anew(address, tmp_path):
    (tmp_path / NAME).write_bytes(b"half of it")
    assert fetch(f"{address}/{NAME}", tmp_path).read_bytes() == CONTENT


def test_another_hash_leaves_nothing(address, tmp_path):
    with pytest.raises(DownloadError, match="sha256 differs"):
        fetch(f"{address}/net-00000000.pth", tmp_path / "kept")
    assert list((tmp_path / "kept").iterdir()) == []


def test_no_network_says_where_to_put_the_file(tmp_path):
    with pytest.raises(DownloadError, match=f"put the file at .*{NAME}"):
        fetch(f"http://127.0.0.1:9/{NAME}", tmp_path)


def test_a_missing_file_is_a_sentence(address, tmp_path):
    with pytest.raises(DownloadError, match="404"):
        fetch(f"{address}/net-12345678.pth", tmp_path)


def test_a_name_without_hash_is_refused(tmp_path):
    with pytest.raises(DownloadError, match="cannot be checked"):
        fetch("http://127.0.0.1:9/net.pth", tmp_path)
