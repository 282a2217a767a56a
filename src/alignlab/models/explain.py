"""What went wrong while loading, in one line: any exception of a loader -> a UserError that says what to do."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError

from alignlab.errors import UserError


@contextmanager
def explained(name: str) -> Iterator[None]:
    """Inside, whatever a loader of the model `name` raises becomes a UserError of one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"model {name!r} {_advice(name, error)}") from error


def brief(error: BaseException, most: int = 160) -> str:
    """What an error says, on one line and not too long."""
    words = " ".join(str(error).split()) or type(error).__name__
    return words if len(words) <= most else f"{words[:most]}..."


def listed(names: Iterable[str], most: int = 5) -> str:
    """The first few names, and how many more there are."""
    known = list(names)
    more = f" and {len(known) - most} more" if len(known) > most else ""
    return ", ".join(known[:most]) + more


def require_fit(where: str, missing: Iterable[str], unexpected: Iterable[str], mismatched: Iterable[str]) -> None:
    """Refuses weights that are not exactly those of the model.

    Raises:
        UserError: any of the three is not empty; the names are listed.
    """
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape": mismatched}
    wrong = [f"{kind}: {listed(sorted(names))}" for kind, names in kinds.items() if names]
    if wrong:
        raise UserError(f"{where}: weights that do not fit this model, {'; '.join(wrong)}")


def _advice(name: str, error: Exception) -> str:
    text, page = str(error), f"https://huggingface.co/{name}"
    if gated := _cause(error, GatedRepoError):
        if getattr(getattr(gated, "response", None), "status_code", 401) == 403:
            return f"is gated and your account has no access yet: accept its licence at {page}, wait for the approval"
        return f"is gated: accept its licence at {page}, then log in with `hf auth login` or set HF_TOKEN"
    if _cause(error, RevisionNotFoundError):
        return f"has no such revision; see {page} for those it has"
    if _cause(error, RepositoryNotFoundError):
        return "was not found: neither a folder nor a public model on the hub; check the spelling, or log in if private"
    if _cause(error, LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError):
        return "is not here and the model hub cannot be reached; check the spelling, or download it and give its folder"
    if _cause(error, SafetensorError):
        return f"has a damaged weights file ({brief(error)}); download it again"
    if "trust_remote_code" in text:
        return "needs code from its own repository, which alignlab never runs; choose a model that transformers knows"
    if "no file named model.safetensors" in text:
        return "has no safetensors weights (pickles are refused); convert it to safetensors first"
    if "Unrecognized configuration class" in text:
        return "is no causal language model; choose a decoder-only text model"
    if "Should have a `model_type`" in text or "does not recognize this architecture" in text:
        return (
            "is of a type that the installed transformers does not know; check its config.json, or update transformers"
        )
    return f"could not be loaded: {brief(error)}"


def _cause(error: BaseException | None, *kinds: type[BaseException]) -> BaseException | None:
    """The first exception of one of these kinds behind an error."""
    while error is not None and not isinstance(error, kinds):
        error = error.__cause__ or error.__context__
    return error
