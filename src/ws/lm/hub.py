"""The hub: a repository's files as a local folder, and a local folder as a repository.

All of it is `huggingface_hub`'s own client, with its cache, its log-in and its environment variables; what is added is
that a hub out of reach is noticed in seconds, and that whatever goes wrong is said in one sentence. The client is
imported where it is used: it takes most of a second, and most commands never ask the hub.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from ws.errors import WsError, did_you_mean

_ID = re.compile(r"([^@/\s]+/[^@/\s]+)(?:@(\S+))?")


def parse_id(name: str) -> tuple[str, str | None] | None:
    """The repository and the revision in `user/repo` or `user/repo@revision`; None for what cannot be such a name."""
    match = _ID.fullmatch(name)
    if match is None:
        return None
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(match.group(1))
    except HFValidationError:
        return None
    return match.group(1), match.group(2)


@lru_cache(maxsize=1)
def hub_is_out_of_reach() -> bool:
    """One short probe: without it every file request retries for half a minute before it gives up.

    Behind a proxy nothing can be told from here, so the hub is taken to be there.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or getproxies().keys() - {"no"}:
        return bool(constants.HF_HUB_OFFLINE)
    address = urlsplit(constants.ENDPOINT)
    try:
        port = address.port or (80 if address.scheme == "http" else 443)
        socket.create_connection((address.hostname, port), timeout=5).close()
    except OSError:
        return True
    return False


def no_folder(name: str | Path) -> str:
    """What is said of a name that is no folder and cannot be a repository's."""
    return f"There is no folder {name}; give an existing one, or a repository on the hub as user/name."


# ---- fetching -------------------------------------------------------------------------------------------------------


def find(name: str | Path, patterns: Sequence[str]) -> Path:
    """The folder of this name, or else the local copy of the hub repository `user/repo` or `user/repo@revision`.

    Raises:
        WsError: neither a folder nor a repository's name, or the repository cannot be had; see `fetch`.
    """
    if Path(name).is_dir():
        return Path(name)
    parsed = parse_id(str(name))
    if parsed is None:
        raise WsError(no_folder(name))
    return fetch(parsed[0], patterns, parsed[1])


def fetch(repo: str, patterns: Sequence[str], revision: str | None = None, kind: str = "model") -> Path:
    """The local folder of a hub repository's files, fetched unless they are in the cache already.

    Args:
        repo: `user/name`.
        patterns: which files, as names or wildcards over their paths; no other file is fetched.
        revision: a branch, tag or commit, None for the main branch.
        kind: `model` or `dataset`.

    Raises:
        WsError: the repository or revision is unknown, private or gated, holds none of the files, or the hub is out of
            reach and the files are not in the cache.
    """
    import httpx
    from huggingface_hub import snapshot_download

    try:
        snapshot = snapshot_download(
            repo,
            repo_type=kind,
            revision=revision,
            allow_patterns=list(patterns),
            local_files_only=hub_is_out_of_reach(),
        )
    except (httpx.HTTPError, OSError, ValueError) as problem:
        raise WsError(_why_not_fetched(repo, revision, problem, kind)) from problem
    folder = Path(snapshot)
    if not any(True for pattern in patterns for _ in folder.glob(pattern)):
        there = _files_like(repo, patterns[0], folder, revision, kind) if kind == "dataset" else []
        hint = did_you_mean(patterns[0], there) if there else ""
        raise WsError(f"The repository {repo} on the hub holds none of the files {', '.join(patterns)}.{hint}")
    return folder


def _files_like(repo: str, pattern: str, folder: Path, revision: str | None, kind: str) -> list[str]:
    """The repository's files beside one that it lacks and of its suffix; out of reach of the hub those at hand."""
    import httpx
    from huggingface_hub import HfApi

    beside = PurePosixPath(pattern).with_stem("*")
    try:
        names = [] if hub_is_out_of_reach() else HfApi().list_repo_files(repo, revision=revision, repo_type=kind)
    except (httpx.HTTPError, OSError, ValueError):
        names = []
    return [n for n in names if PurePosixPath(n).match(str(beside))] or [
        file.relative_to(folder).as_posix() for file in sorted(folder.glob(str(beside)))
    ]


def commit_of(file: Path) -> str | None:
    """The commit that a fetched file is of; None for a file that was not fetched."""
    return next((name for name in file.parts if re.fullmatch(r"[0-9a-f]{40}", name)), None)


def _why_not_fetched(repo: str, revision: str | None, problem: Exception, kind: str = "model") -> str:
    from huggingface_hub import errors

    at, option = f" at {revision}" if revision else "", "" if kind == "model" else f" --repo-type {kind}"
    if isinstance(problem, errors.GatedRepoError):
        return f"The repository {repo} is gated: ask for access on its page, then log in with `hf auth login`."
    if isinstance(problem, errors.RepositoryNotFoundError):
        return (
            f"There is no folder {repo}, and the hub has no repository of this name that you may read; check the "
            "spelling, or log in with `hf auth login` if it is private."
        )
    if isinstance(problem, errors.RevisionNotFoundError):
        return f"The repository {repo} has no revision {revision!r}; leave it out for the main branch."
    if isinstance(problem, errors.HfHubHTTPError):
        return f"The hub refused to hand out {repo}{at} ({_reason(problem)}); log in again with `hf auth login`."
    if isinstance(problem, errors.HFValidationError):
        return f"{repo!r} cannot name a repository on the hub; it has the form user/name."
    return (
        f"There is no folder {repo}, and as a repository{at} it is not, or not wholly, in the local cache while the "
        f"hub could not be reached; run `hf download {repo}{option}` where there is a network and copy the cache or "
        "the folder."
    )


# ---- sending --------------------------------------------------------------------------------------------------------


def check_name(repo: str) -> str:
    """`repo` if it has the form `user/name`; otherwise a `WsError`."""
    if parse_id(repo) != (repo, None):
        raise WsError(f"{repo!r} cannot name a repository on the hub; it has the form user/name, such as ada/honesty.")
    return repo


def send(folder: Path, repo: str, message: str, private: bool = False, replaces: Sequence[str] = ()) -> str:
    """Make a folder's files the content of a hub repository, in one commit: all of them arrive or none does.

    Args:
        folder: whose files are sent, without subfolders.
        repo: `user/name`; made when it does not exist.
        message: of the commit.
        private: only you, or your organisation, may read it.
        replaces: names that the commit deletes from the repository where the folder has no such file.

    Returns:
        The address of the repository.

    Raises:
        WsError: the hub is out of reach, nobody is logged in or may write there, or a repository that was to be private
            is public.
    """
    import httpx
    from huggingface_hub import HfApi, get_token

    check_name(repo)
    if hub_is_out_of_reach():
        raise WsError(
            f"The hub could not be reached, so nothing was sent to {repo}; try again where there is a network."
        )
    if not get_token():
        raise WsError(f"Nobody is logged in, so nothing was sent to {repo}; run `hf auth login` or set HF_TOKEN.")
    api = HfApi()
    try:
        address = str(api.create_repo(repo, private=private or None, exist_ok=True))
        info = api.model_info(repo)
        if private and not info.private:
            raise WsError(f"The repository {repo} exists and is public; make it private on its page, or rename yours.")
        there = {file.rfilename for file in info.siblings or ()}
        api.create_commit(repo, _operations(folder, there & set(replaces)), commit_message=message)
    except (httpx.HTTPError, OSError, ValueError) as problem:
        raise WsError(_why_not_sent(repo, problem)) from problem
    return address


def _operations(folder: Path, replaced: set[str]) -> list[Any]:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    files = sorted(f for f in folder.iterdir() if f.is_file())
    gone = sorted(replaced - {f.name for f in files})
    return [CommitOperationDelete(name) for name in gone] + [CommitOperationAdd(f.name, f) for f in files]


def _why_not_sent(repo: str, problem: Exception) -> str:
    from huggingface_hub.errors import HfHubHTTPError

    status = problem.response.status_code if isinstance(problem, HfHubHTTPError) else None
    if status == 401:
        return f"The hub does not accept your token, so nothing was sent to {repo}; log in again with `hf auth login`."
    if status in (403, 404):
        return f"Your token may not write to {repo}, so nothing was sent; use your own name, or a token that may write."
    return f"The files were not sent to {repo}, whose content is as it was: {_reason(problem)}."


def _reason(problem: Exception) -> str:
    """What a library's error says, on one line and without the full stop."""
    return " ".join(str(problem).split()).rstrip(".:") or type(problem).__name__
