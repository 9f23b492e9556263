"""Options that several commands take, with one wording each."""

from __future__ import annotations

from enum import Enum
from typing import Annotated

import typer


class Verify(str, Enum):
    """How much is checked."""

    full = "full"
    sample = "sample"
    none = "none"


Src = Annotated[str, typer.Argument(metavar="SRC", help="Hub id, folder or .gguf file.")]
Token = Annotated[str | None, typer.Option(help="Token for the Hub; default: the one you are logged in with.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing model folder.")]
Seed = Annotated[int, typer.Option(help="Seed of everything that is drawn.")]
MaxShardSize = Annotated[str, typer.Option(help="Largest weight file, like 500MB.")]
SourceRevision = Annotated[str | None, typer.Option(help="Branch, tag or commit of SRC.")]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run SRC's own code.")]
AllowPickle = Annotated[
    bool, typer.Option("--allow-pickle", help="Read .bin weights too (weights_only, no code is run).")
]
PushToHub = Annotated[str | None, typer.Option(metavar="REPO", help="Push the result to this repository.")]
Private = Annotated[bool, typer.Option("--private", help="Create the repository private.")]
PushRevision = Annotated[str | None, typer.Option(help="Branch to push to.")]
CommitMessage = Annotated[str | None, typer.Option(help="Message of the pushed commit.")]
