"""Upload an exported folder to the model hub: only when asked, private unless told otherwise."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safesteer_lite.errors import ExportError, UsageError
from safesteer_lite.sources.hub import SOCKS


def check_push(name: str, public: bool = False) -> str:
    """See, before hours of work, that an upload can succeed and is shown to nobody whom the user did not mean.

    Args:
        name: `owner/name`, or a name alone for the token's owner.
        public: whether the user wants everybody to see what is uploaded.

    Returns:
        The whole name.

    Raises:
        UsageError: it is not a name that the hub allows, or everybody can see that repository and `public` is not set.
        ExportError: there is no token, it is refused, or the hub cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except ValueError as error:
        raise UsageError(f"--push {name!r} is not a name that the model hub allows.", "Give owner/name.") from error
    with _hub_errors(name):
        owner = HfApi().whoami()["name"]
        whole = name if "/" in name else f"{owner}/{name}"
        _refuse_to_publish(whole, public)
    return whole


def _refuse_to_publish(name: str, public: bool) -> None:
    """Refuse to upload to a repository that everybody can see, unless that is wanted.

    Raises:
        UsageError: there is such a repository.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        shown = not HfApi().model_info(name).private
    except RepositoryNotFoundError as error:
        # There is none yet, and it will be private; a gated one is there for everybody to find.
        shown = isinstance(error, GatedRepoError)
    if shown and not public:
        raise UsageError(
            f"{name} is public on the model hub already: everybody would see what is uploaded.",
            "Add --public if that is what you want, or choose another name.",
        )


def push(folder: Path, name: str, public: bool = False) -> str:
    """Upload every file of a folder.

    Args:
        folder: an exported folder; its sums should have been checked.
        name: from `check_push`.
        public: make a new repository public.

    Returns:
        The address of what was uploaded.

    Raises:
        UsageError: everybody can see that repository, and `public` is not set.
        ExportError: the hub refused or broke off; the folder stays as it is.
    """
    from huggingface_hub import HfApi

    hub = HfApi()
    command = f"hf upload {name} {shlex.quote(str(folder))} ." + ("" if public else " --private")
    again = f"The files stay in {folder}; `{command}` uploads them without exporting anew."
    with _hub_errors(name, again):
        # Asked once more: an export takes a while, and repositories are made public by a click.
        _refuse_to_publish(name, public)
        repository = hub.create_repo(name, private=not public, exist_ok=True)
        hub.upload_folder(repo_id=name, folder_path=folder, commit_message="Upload from safesteer-lite")
    return str(repository)


@contextmanager
def _hub_errors(name: str, again: str = "") -> Iterator[None]:
    """Turn what the hub and its client may say into errors that say what to do.

    Args:
        name: what was to be written to.
        again: what the user can do once the cause is gone; empty before there are files.
    """
    import httpx
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    def failed(message: str, hint: str) -> ExportError:
        return ExportError(message, f"{hint} {again}".strip())

    try:
        yield
    except LocalTokenNotFoundError as error:
        raise failed(
            f"Nothing was uploaded to {name}: there is no token for the model hub.",
            "Log in with `hf auth login`, or set HF_TOKEN to a token that may write.",
        ) from error
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status in (401, 403):
            raise failed(
                f"The model hub refuses to let this token write to {name} ({status}).",
                "Set HF_TOKEN to a token that may write there, or choose another name.",
            ) from error
        raise failed(f"The model hub refused {name} ({status or error}).", "Try again later.") from error
    except ImportError as error:
        raise failed(
            f"Nothing was uploaded to {name}: a SOCKS proxy needs one more package.", f"Run: {SOCKS}."
        ) from error
    except (OfflineModeIsEnabled, OSError, httpx.HTTPError) as error:
        raise failed(
            f"{name} could not be uploaded: the model hub cannot be reached.",
            "Connect, unset HF_HUB_OFFLINE, and try again.",
        ) from error
    except RuntimeError as error:
        # What the client makes of a large file's upload that broke off.
        raise failed(f"The upload to {name} broke off: {str(error).rstrip('.')}.", "Try again later.") from error
