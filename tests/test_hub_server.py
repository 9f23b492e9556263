"""Test the Hub server through the stock client, which reads its settings once, so each use is a process."""

from __future__ import annotations

import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from subprocess import CompletedProcess
from urllib.error import HTTPError

import pytest
from hub_server import HubServer

REPOSITORY = "tester/model"
CARD = b"---\nlicense: mit\n---\n# Model\n"
WEIGHTS = os.urandom(300_000)

PUSH = """
import sys
from huggingface_hub import HfApi
api = HfApi()
url = api.create_repo(sys.argv[1], exist_ok=True, private="private" in sys.argv[3:])
assert url.repo_id == sys.argv[1]
api.upload_folder(repo_id=sys.argv[1], folder_path=sys.argv[2])
"""

DOWNLOAD = """
import sys
from huggingface_hub import snapshot_download
snapshot_download(sys.argv[1], local_dir=sys.argv[2], revision=sys.argv[3])
"""

REVISIONS = """
import sys
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RevisionNotFoundError
repository = sys.argv[1]
api = HfApi()
assert api.whoami()["name"] == "tester"
api.create_tag(repository, tag="v1")
api.create_branch(repository, branch="dev/next")
api.upload_file(repo_id=repository, path_or_fileobj=b"new", path_in_repo="config.json", revision="dev/next")
api.delete_file("sub/notes.txt", repository, revision="dev/next")
for revision, expected in [("v1", b"{}"), ("main", b"{}"), ("dev/next", b"new")]:
    with open(hf_hub_download(repository, "config.json", revision=revision), "rb") as stream:
        assert stream.read() == expected, revision
assert "sub/notes.txt" not in api.list_repo_files(repository, revision="dev/next")
assert api.file_exists(repository, "sub/notes.txt") and not api.file_exists(repository, "absent.txt")
info = api.model_info(repository, revision="v1", files_metadata=True)
assert {file.rfilename: file.size for file in info.siblings}["model.safetensors"] == 300_000
for revision, name, expected in [
    ("absent", "config.json", RevisionNotFoundError),
    ("v1", "absent", EntryNotFoundError),
]:
    try:
        hf_hub_download(repository, name, revision=revision)
    except expected:
        continue
    raise AssertionError(f"{name} was found at {revision}")
try:
    api.create_branch(repository, branch="dev/next")
except HfHubHTTPError as error:
    assert error.response.status_code == 409
else:
    raise AssertionError("a branch was created twice")
"""

REFUSED = """
import sys
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import RepositoryNotFoundError
repository, folder = sys.argv[1:]
api = HfApi()
for call in [
    lambda: api.model_info(repository),
    lambda: hf_hub_download(repository, "config.json"),
    lambda: snapshot_download(repository),
    lambda: api.upload_folder(repo_id=repository, folder_path=folder),
]:
    try:
        call()
    except RepositoryNotFoundError as error:
        assert error.response.status_code == 401
        assert error.response.headers["X-Error-Code"] == "RepoNotFound"
    else:
        raise AssertionError("a private repository was served")
assert not api.repo_exists(repository)
"""


@pytest.fixture
def hub() -> Iterator[HubServer]:
    """Run a server with no repositories."""
    with HubServer() as server:
        yield server


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Write a folder with regular files and one that goes through LFS."""
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    (folder / "README.md").write_bytes(CARD)
    (folder / "config.json").write_bytes(b"{}")
    (folder / "sub" / "notes.txt").write_bytes(b"notes")
    (folder / "sub" / "имя файла.txt").write_bytes(b"")
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    return folder


def run_client(environment: dict[str, str], script: str, *arguments: str | Path) -> CompletedProcess[str]:
    """Run a script in a process of its own and return how it ended."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


def succeed(environment: dict[str, str], script: str, *arguments: str | Path) -> None:
    """Run a script that has to succeed."""
    result = run_client(environment, script, *arguments)
    assert result.returncode == 0, result.stderr


def read_folder(folder: Path) -> dict[str, bytes]:
    """Return the content of each file below a folder, but for the client's own."""
    paths = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    return {path.as_posix(): (folder / path).read_bytes() for path in paths if path.parts[0] != ".cache"}


def test_uploaded_folder_comes_back(hub: HubServer, model: Path, tmp_path: Path) -> None:
    """Push a folder, push it again unchanged and download it without a token."""
    environment = hub.environment()
    succeed(environment, PUSH, REPOSITORY, model)
    succeed(environment, PUSH, REPOSITORY, model)
    expected = read_folder(model)
    assert hub.read(REPOSITORY, "model.safetensors") == WEIGHTS
    assert hub.files(REPOSITORY) == {**expected, "model.safetensors": len(WEIGHTS)}
    assert len(hub.history(REPOSITORY)) == 2
    assert [request.status for request in hub.log if request.route == "lfs_put"] == [200]
    succeed(hub.environment(token=None), DOWNLOAD, REPOSITORY, tmp_path / "copy", "main")
    assert read_folder(tmp_path / "copy") == expected
    assert hub.log[-1].route == "resolve"
    assert hub.log[-1].token is None


def test_revisions(hub: HubServer, model: Path) -> None:
    """Read and write through branches and tags."""
    environment = hub.environment()
    succeed(environment, PUSH, REPOSITORY, model)
    succeed(environment, REVISIONS, REPOSITORY)
    assert hub.files(REPOSITORY)["config.json"] == b"{}"
    assert hub.files(REPOSITORY, revision="dev/next")["config.json"] == b"new"
    assert hub.history(REPOSITORY, "v1") == hub.history(REPOSITORY)


@pytest.mark.parametrize("token", [None, "hf_wrong"])
def test_private_repository_is_hidden(hub: HubServer, model: Path, token: str | None) -> None:
    """Refuse a private repository to everyone but its owner."""
    succeed(hub.environment(), PUSH, REPOSITORY, model, "private")
    before = hub.history(REPOSITORY)
    succeed(hub.environment(token=token), REFUSED, REPOSITORY, model)
    assert hub.history(REPOSITORY) == before
    refused = [request for request in hub.log if request.token == token and REPOSITORY in request.path]
    assert {request.status for request in refused} == {401}


def test_public_repository_needs_a_token_for_writing(hub: HubServer, model: Path) -> None:
    """Refuse a push without a token."""
    succeed(hub.environment(), PUSH, REPOSITORY, model)
    before = hub.history(REPOSITORY)
    result = run_client(hub.environment(token=None), PUSH, REPOSITORY, model)
    assert result.returncode != 0
    assert "401" in result.stderr
    assert hub.history(REPOSITORY) == before


@pytest.mark.parametrize(("route", "status"), [("lfs_put", 507), ("commit", None)])
def test_interrupted_upload(hub: HubServer, model: Path, route: str, status: int | None) -> None:
    """Break an upload midway, see nothing of it on the branch and repeat it with success."""
    (model / "more.safetensors").write_bytes(WEIGHTS[::-1])
    environment = hub.environment()
    hub.fail_next(route, status=status)
    assert run_client(environment, PUSH, REPOSITORY, model).returncode != 0
    assert status in [request.status for request in hub.log if request.route == route]
    assert hub.files(REPOSITORY) == {}
    assert len(hub.history(REPOSITORY)) == 1
    succeed(environment, PUSH, REPOSITORY, model)
    assert hub.files(REPOSITORY).keys() == read_folder(model).keys()
    assert len(hub.history(REPOSITORY)) == 2
    # What had arrived before the break is not sent again.
    assert [request.status for request in hub.log if request.route == "lfs_put"].count(200) == 2


def test_client_survives_a_cut_connection(hub: HubServer, model: Path) -> None:
    """Cut an LFS upload once, which the client repeats by itself."""
    hub.fail_next("lfs_put", status=None)
    succeed(hub.environment(), PUSH, REPOSITORY, model)
    assert [request.status for request in hub.log if request.route == "lfs_put"] == [None, 200]
    assert hub.read(REPOSITORY, "model.safetensors") == WEIGHTS


def test_unknown_route_cannot_fail(hub: HubServer) -> None:
    """Refuse to plan a failure that could never happen."""
    with pytest.raises(ValueError, match="lfs_putt"):
        hub.fail_next("lfs_putt")


def test_range(hub: HubServer, model: Path) -> None:
    """Send the rest of a file, as an interrupted download asks for it."""
    succeed(hub.environment(), PUSH, REPOSITORY, model)
    url = f"{hub.url}/{REPOSITORY}/resolve/main/model.safetensors"
    with urllib.request.urlopen(urllib.request.Request(url, headers={"Range": "bytes=100000-"})) as answer:
        assert answer.status == 206
        assert answer.headers["Content-Range"] == "bytes 100000-299999/300000"
        assert answer.read() == WEIGHTS[100_000:]


def test_unknown_token_can_be_refused_everywhere() -> None:
    """Refuse a wrong token before looking for the repository."""
    with HubServer(reject_unknown_tokens=True) as hub:
        request = urllib.request.Request(f"{hub.url}/api/models/{REPOSITORY}")
        request.add_header("Authorization", "Bearer hf_wrong")
        with pytest.raises(HTTPError) as caught:
            urllib.request.urlopen(request)
        assert caught.value.code == 401
        assert caught.value.headers["X-Error-Message"] == "Invalid credentials in Authorization header"


def test_environment_replaces_the_callers_settings(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the caller's client settings out, and give each process an empty cache."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_TOKEN", "hf_caller")
    monkeypatch.setenv("UNRELATED", "kept")
    environment = hub.environment(token=None)
    assert "HF_HUB_OFFLINE" not in environment
    assert "HF_TOKEN" not in environment
    assert environment["UNRELATED"] == "kept"
    assert environment["HF_HOME"] != hub.environment()["HF_HOME"]
