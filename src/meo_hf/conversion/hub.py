"""Push a finished output to the Hub in one commit."""

from __future__ import annotations

import json
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from meo_hf.conversion.report import REPORT_NAME
from meo_hf.conversion.source import first_line, public_name
from meo_hf.errors import HubError, LoginError, UsageError


def check_push(repo_id: str | None, private: bool, revision: str | None, message: str | None) -> None:
    """Raise UsageError for options of a push without one, or for a name that no repository can have."""
    if repo_id is None:
        options = {"--private": private, "--push-revision": revision, "--commit-message": message}
        if idle := [name for name, value in options.items() if value]:
            raise UsageError(f"{idle[0]} has no effect without --push-to-hub: add that, or leave it out")
        return
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UsageError(f"--push-to-hub {repo_id!r} is no name of a repository: {first_line(error)}") from None


def check_login(repo_id: str, private: bool, token: str | None) -> None:
    """Raise LoginError or UsageError before a long conversion if its push would be refused, or seen by all."""
    api = HfApi(token=token)
    try:
        user = api.whoami()["name"]
        whole_id = repo_id if "/" in repo_id else f"{user}/{repo_id}"
        public = private and api.repo_exists(whole_id) and not api.repo_info(whole_id).private
    except Exception as error:  # the HTTP library below has errors of its own kind
        raise LoginError(
            f"the Hub does not accept the login ({first_line(error)}): run `hf auth login` or give --token"
        ) from None
    if public:
        raise UsageError(f"{whole_id} exists and is public: give another repository, or leave --private out")


def push_folder(
    folder: Path, repo_id: str, *, private: bool, revision: str | None, message: str, token: str | None
) -> str:
    """Create the repository if needed and upload a folder as one commit; returns the commit's address.

    Raises HubError if the Hub refuses or cannot be reached; the local folder is complete all the same.
    """
    api = HfApi(token=token)
    # the report names folders of this machine; `_public` takes them out, `hf upload` would not
    options = f"--exclude {REPORT_NAME}" + (f" --revision {revision}" if revision else "")
    again = f"{folder} is complete, push it with `hf upload {repo_id} {folder} {options}`"
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
    except Exception as error:  # as above
        cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
        raise HubError(f"pushing to {repo_id} failed ({first_line(cause)}), nothing of it is there; {again}") from error
    return str(done.commit_url)


def _public(file: Path) -> bytes | str:
    """Return what to upload of a file: the report without the paths of this machine, anything else as it is."""
    if file.name != REPORT_NAME:
        return str(file)
    report = json.loads(file.read_text("utf-8"))
    report["output"] = Path(report["output"]).name
    for source in (report["source"], *report.get("experts", ())):
        source["id"] = public_name(source["id"])
    report["licenses"] = {public_name(name): value for name, value in report["licenses"].items()}
    return (json.dumps(report, indent=2, ensure_ascii=False) + "\n").encode()
