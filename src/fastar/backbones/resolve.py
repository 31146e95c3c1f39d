"""Where published weights are: a file or a folder here, or a repository of the Hugging Face hub.

A checkpoint is named by
- a file: `.safetensors`, `.pt`, `.pth`, `.bin`, or the `.index.json` of one that was cut into shards;
- a folder: one of ours (`save_backbone`), a diffusers folder (its part `transformer`, `vae` or `text_encoder`), or one
  with a single file of weights; safetensors are preferred;
- a hub id: `owner/name[@revision][:file]`. Looked for in the folder `store` first, as `store/owner/name[/file]`, so
  that a machine without a network finds what was put there under the same name; then in the hub's cache and on the hub.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from fastar.backbones.storage import CONFIG, WEIGHTS

INDEX, SAFE, PICKLED = ".index.json", (".safetensors",), (".pt", ".pth", ".bin")
ANY = ((INDEX,), SAFE, PICKLED)
HUB_ID = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[\w./-]+))?(?::(?P<file>[^:]+))?"
)


@dataclass(frozen=True)
class Weights:
    """The files of one network, in order; `config` is the config.json beside them, None if there is none."""

    files: tuple[Path, ...]
    config: Path | None = None

    @property
    def folder(self) -> Path:
        return self.files[0].parent

    @property
    def ours(self) -> bool:
        """Whether `save_backbone` wrote them."""
        return self.config is not None and _is_ours(self.config)


def find_weights(
    checkpoint: str | Path,
    *,
    part: str,
    usual: Sequence[str] = (),
    beside: Sequence[str] = (),
    store: str | Path = "checkpoints",
) -> Weights:
    """The weights that `checkpoint` names; see the module for what that may be.

    Args:
        checkpoint: path or hub id.
        part: folder of the network in a diffusers folder: transformer, vae, text_encoder.
        usual: names under which the network lies in a folder that holds several, such as Wan2.1_VAE.pth.
        beside: patterns of other files that are needed from a hub repository, such as those of a tokenizer.
        store: folder where checkpoints are put; what begins with it, or with another folder that is here, is a path.

    Raises:
        FileNotFoundError: there is no such file, or the hub cannot be reached and has not been before: one sentence
            says what to download and where to put it.
        ValueError: a folder without weights, or with several of which none is preferred.
    """
    path, store = Path(checkpoint).expanduser(), Path(store)
    hub = HUB_ID.fullmatch(str(checkpoint))
    local = path.exists() or path.is_relative_to(store) or path.suffix in (*SAFE, *PICKLED)
    if hub is not None and hub["file"] is None and (local or path.parent.is_dir()):
        hub = None  # folder/model.pt, or a folder of a folder that is here
    if hub is None:
        if not path.exists():
            raise FileNotFoundError(
                f"there is no checkpoint {checkpoint}: give a file ({', '.join((*SAFE, *PICKLED))}), a folder, or a "
                "hub id, owner/name[@revision][:file]"
            )
        return _at(path, part, usual)
    kept = store / hub["repo"] / (hub["file"] or "")
    if kept.exists():
        return _at(kept, part, usual)
    return _on_hub(hub["repo"], hub["revision"], hub["file"], part, usual, beside, kept)


def _at(path: Path, part: str, usual: Sequence[str]) -> Weights:
    """The weights at a path that exists."""
    if path.is_dir():
        found = _in_folder(path, part, usual)
        if found is None:
            raise ValueError(
                f"the folder {path} holds no weights ({', '.join((*SAFE, *PICKLED))}), nor does a folder {part} in it"
            )
        path = found
    config = path.parent / CONFIG
    beside = config if config.is_file() else None
    if path.name.endswith(INDEX):
        return Weights(_shards(path), beside)
    if path.suffix not in (*SAFE, *PICKLED):
        raise ValueError(f"{path} is no file of weights: give one of {', '.join((*SAFE, *PICKLED))}")
    return Weights((path,), beside)


def _in_folder(
    folder: Path, part: str, usual: Sequence[str], endings: Sequence[tuple[str, ...]] = ANY
) -> Path | None:
    """The file in `folder`, or its `part`, that holds the weights or lists their shards; None without any.

    Beside those of the usual names, files are looked for by `endings`, the first first.
    """
    if (folder / WEIGHTS).is_file() and (folder / CONFIG).is_file() and _is_ours(folder / CONFIG):
        return folder / WEIGHTS
    if (folder / part).is_dir():
        return _in_folder(folder / part, part, usual)  # whatever it holds
    names = sorted(file.name for file in folder.iterdir() if file.is_file())
    called = [[name for name in names if fnmatch(name, pattern)] for pattern in usual]
    for some in [*called, *([name for name in names if name.endswith(ending)] for ending in endings)]:
        if len(some) > 1:
            raise ValueError(f"the folder {folder} holds several files of weights: name {' or '.join(some)}")
        if some:
            return folder / some[0]
    return None


def _shards(index: Path) -> tuple[Path, ...]:
    try:
        listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} does not list shards (weight_map): restore it") from error
    files = tuple(index.parent / name for name in sorted(set(listed)))
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of the {len(files)} shards that {index} lists are missing, {missing[0]} first: download "
            "them, too"
        )
    return files


def _is_ours(config: Path) -> bool:
    try:
        return "format_version" in json.loads(config.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError):
        return False


def _on_hub(
    repo: str,
    revision: str | None,
    file: str | None,
    part: str,
    usual: Sequence[str],
    beside: Sequence[str],
    kept: Path,
) -> Weights:
    """Weights of a hub repository, downloaded unless they are in the hub's cache."""
    try:
        import huggingface_hub
        from huggingface_hub.errors import (
            EntryNotFoundError,
            HFValidationError,
            LocalEntryNotFoundError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )
    except ImportError as error:
        raise ValueError(
            f"{repo} is a hub id, which needs huggingface_hub: pip install -e '.[wan]'"
        ) from error
    whole = repo + (f"@{revision}" if revision else "")
    command = (
        f"hf download {repo}" + (f" {file}" if file else "") + (f" --revision {revision}" if revision else "")
    )
    try:
        if file is not None and Path(file).suffix in (*SAFE, *PICKLED):
            return _at(Path(huggingface_hub.hf_hub_download(repo, file, revision=revision)), part, usual)
        inside = f"{file}/" if file else ""
        # a repository holds more than one network, in more than one format: the first that fits is fetched
        for endings in ((), ((INDEX,), SAFE), (PICKLED,)):
            named = [f"*{ending}" for some in endings for ending in some] or [f"{part}/*", *usual, *beside]
            snapshot = huggingface_hub.snapshot_download(
                repo,
                revision=revision,
                allow_patterns=[f"{inside}{name}" for name in (*named, CONFIG)],
                ignore_patterns=[f"{inside}*/*"] if endings else None,
            )
            folder = Path(snapshot) / (file or "")
            if folder.is_dir() and (weights := _in_folder(folder, part, usual, endings)) is not None:
                return _at(weights, part, usual)
    except (LocalEntryNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(
            f"{whole} is neither here nor in the hub's cache, and the hub cannot be reached: with a network, run "
            f"`{command} --local-dir {repo.rpartition('/')[2]}`, and put that folder here as {_folder_of(kept, file)}"
        ) from error
    except (RepositoryNotFoundError, RevisionNotFoundError, EntryNotFoundError, HFValidationError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise FileNotFoundError(
            f"there is no checkpoint {whole}{f':{file}' if file else ''}, neither here nor on the hub ({reason})"
        ) from error
    except OSError as error:
        reason = str(error).strip().partition("\n")[0]
        raise FileNotFoundError(
            f"{whole} could not be downloaded ({reason}): try again, or run `{command}`"
        ) from error
    raise FileNotFoundError(
        f"the repository {whole} has no weights at its top nor in {part}/: name the file, {repo}:FILE"
    )


def _folder_of(kept: Path, file: str | None) -> Path:
    """The folder of a repository in the store, where `kept` is its `file`."""
    return kept.parents[len(Path(file).parts) - 1] if file else kept
