"""Push a finished output to the Hub in one commit."""

from __future__ import annotations

import json
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from meo_hf.conversion.report import REPORT_NAME
from meo_hf.conversion.source import public_name
from meo_hf.errors import HubError, UsageError


def check_login(token: str | None) -> None:
    """Raise HubError before a long conversion if the Hub would refuse its push."""
    try:
        HfApi(token=token).whoami()
    except (HfHubHTTPError, OSError) as error:
        raise HubError(
            f"the Hub does not accept the login ({_reason(error)}): run `hf auth login` or give --token"
        ) from None


def push_folder(
    folder: Path, repo_id: str, *, private: bool, revision: str | None, message: str, token: str | None
) -> str:
    """Create the repository if needed and upload a folder as one commit; returns the commit's address.

    Raises HubError if the Hub refuses or cannot be reached; the local folder is complete all the same.
    """
    api = HfApi(token=token)
    try:
        repo_id = api.create_repo(repo_id, private=private or None, exist_ok=True).repo_id
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        operations = [
            CommitOperationAdd(file.relative_to(folder).as_posix(), _public(file))
            for file in sorted(folder.rglob("*"))
            if file.is_file()
        ]
        done = api.create_commit(repo_id, operations, revision=revision, commit_message=message)
    except HFValidationError as error:
        raise UsageError(f"--push-to-hub {repo_id!r}: {_reason(error)}") from None
    except (HfHubHTTPError, OSError) as error:
        raise HubError(
            f"pushing to {repo_id} failed ({_reason(error)}); {folder} is complete: push it again with "
            f"`hf upload {repo_id} {folder}`"
        ) from error
    return str(done.commit_url)


def _public(file: Path) -> bytes | str:
    """Return what to upload of a file: the report without the paths of this machine, anything else as it is."""
    if file.name != REPORT_NAME:
        return str(file)
    report = json.loads(file.read_text("utf-8"))
    report["output"] = Path(report["output"]).name
    for source in (report["source"], *report["experts"]):
        source["id"] = public_name(source["id"])
    report["licenses"] = {public_name(name): value for name, value in report["licenses"].items()}
    return (json.dumps(report, indent=2, ensure_ascii=False) + "\n").encode()


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
