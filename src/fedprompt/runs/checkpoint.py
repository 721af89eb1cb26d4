"""Saved server states: written so that a crash at any instant leaves a good checkpoint behind.

A checkpoint of round 12 is two files of `RUN_DIR/state/`: `round_00012.safetensors` with all
tensors and `round_00012.json` with the round, the checksums and what the experiment wants to
remember. The JSON is written last, so a checkpoint without it does not exist. The last two are
kept: should the newest be damaged, loading falls back to the one before and says so.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from fedprompt.core.errors import CheckpointError
from fedprompt.core.files import TEMPORARY_FILES, Json, atomic_write, json_ready, sync_folder

if TYPE_CHECKING:
    from fedprompt.core.types import ServerState


logger = logging.getLogger(__name__)

FORMAT_VERSION = 2
"""2: a tensor's path says its part (`shared/adaptation.NAME`); a prompt generator's memory has a
field of its own."""
KEPT_CHECKPOINTS = 2
CHECKPOINT_FILES = re.compile(r"round_(\d{5,})\.(safetensors|json)")


@dataclasses.dataclass(frozen=True)
class LoadedState:
    """What `load_latest` found."""

    state: ServerState
    extra: Json
    """The mapping that was given to `save_state`, as JSON keeps it (NaN comes back as None)."""
    warnings: list[str]
    """One line for each newer checkpoint that had to be passed over."""


def save_state(folder: Path, state: ServerState, extra: Mapping[str, object] | None = None) -> Path:
    """Save `state` as the newest checkpoint and remove all but the last two.

    Checkpoints of later rounds are removed as well: a run that was taken back to round 11 has no
    round 12.

    Args:
        folder: the run's `state/` folder; created when missing.
        state: what to save; its tensors are copied, never aliased.
        extra: small values to keep beside it; anything that JSON can hold.

    Returns:
        The checkpoint's JSON file.

    Raises:
        CheckpointError: the files cannot be written; earlier checkpoints are untouched.
        InputError: `extra` holds something that JSON cannot.
    """
    from safetensors.torch import save

    # safetensors refuses tensors that share storage, so every tensor gets its own.
    flat = {
        name: tensor.detach().cpu().clone().contiguous() for name, tensor in state.tensors().items()
    }
    payload = save(flat)
    card = json_ready(
        {
            "format": FORMAT_VERSION,
            "round": state.round_index,
            "sha256": hashlib.sha256(payload).hexdigest(),
            "state_sha256": state.sha256(),
            "extra": extra or {},
        }
    )
    card["card_sha256"] = _card_digest(card)
    tensors_path, card_path = _paths(folder, state.round_index)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # A card of an earlier attempt would vouch for tensors that are about to be replaced.
        card_path.unlink(missing_ok=True)
        atomic_write(tensors_path, payload)
        atomic_write(card_path, json.dumps(card, indent=2) + "\n")
        _prune(folder, state.round_index)
    except OSError as error:
        raise CheckpointError(
            f"cannot save round {state.round_index} in {folder}: {error.strerror or error}; "
            "make room or allow writing there, then resume from the last saved round"
        ) from error
    return card_path


def load_latest(folder: Path) -> LoadedState:
    """Load the newest checkpoint whose checksums hold.

    Raises:
        CheckpointError: there is no good checkpoint; the message says what is wrong with each.
    """
    problems: list[str] = []
    for round_index in _saved_rounds(folder):
        try:
            state, extra = _load(folder, round_index)
        except CheckpointError as error:
            problems.append(str(error))
            continue
        warnings = [f"{problem}; fell back to round {round_index}" for problem in problems]
        for warning in warnings:
            logger.warning("%s", warning)
        return LoadedState(state, extra, warnings)
    got = "; ".join(problems) if problems else "none"
    raise CheckpointError(
        f"no usable checkpoint in {folder}: expected round_NNNNN.json beside tensors with the same "
        f"checksum, got {got}; start the run again with --overwrite"
    )


def _paths(folder: Path, round_index: int) -> tuple[Path, Path]:
    stem = f"round_{round_index:05d}"
    return folder / f"{stem}.safetensors", folder / f"{stem}.json"


def _saved_rounds(folder: Path) -> list[int]:
    """Rounds that have a card, newest first."""
    if not folder.is_dir():
        return []
    matches = [CHECKPOINT_FILES.fullmatch(path.name) for path in folder.iterdir()]
    rounds = [int(match[1]) for match in matches if match and match[2] == "json"]
    return sorted(rounds, reverse=True)


def _load(folder: Path, round_index: int) -> tuple[ServerState, Json]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    from fedprompt.core.types import ServerState

    tensors_path, card_path = _paths(folder, round_index)
    card = _read_card(card_path)
    if card["round"] != round_index:
        raise CheckpointError(
            f"{card_path.name}: expected round {round_index}, got {card['round']}"
        )
    try:
        payload = tensors_path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{tensors_path.name}: {error.strerror or error}") from error
    digest = hashlib.sha256(payload).hexdigest()
    if digest != card["sha256"]:
        raise CheckpointError(
            f"{tensors_path.name} is damaged: expected sha256 {card['sha256'][:12]}, "
            f"got {digest[:12]} ({len(payload)} bytes)"
        )
    try:
        tensors = {name: tensor.clone() for name, tensor in load(payload).items()}
        state = ServerState.from_tensors(round_index, tensors)
    except (SafetensorError, KeyError, ValueError) as error:
        raise CheckpointError(f"{tensors_path.name} holds no server state: {error}") from error
    if state.sha256() != card["state_sha256"]:
        raise CheckpointError(
            f"{tensors_path.name}: expected state {card['state_sha256'][:12]}, "
            f"got {state.sha256()[:12]}"
        )
    return state, card["extra"]


def _read_card(path: Path) -> Json:
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path.name}: {error.strerror or error}") from error
    except ValueError as error:
        raise CheckpointError(f"{path.name} is damaged: no JSON ({error})") from error
    if not isinstance(card, dict):
        raise CheckpointError(f"{path.name} is damaged: expected a JSON object")
    if card.get("format") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path.name}: expected format {FORMAT_VERSION}, got {card.get('format')}; another "
            "version of fedprompt wrote it (manifest.json names it): go on with that one"
        )
    if card.get("card_sha256") != _card_digest(card):
        raise CheckpointError(f"{path.name} is damaged: its checksum does not hold")
    return card


def _card_digest(card: Mapping[str, object]) -> str:
    """SHA-256 of the card's fields, its own checksum left out."""
    fields = {key: value for key, value in card.items() if key != "card_sha256"}
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def _prune(folder: Path, newest: int) -> None:
    """Keep the last checkpoints up to round `newest`; remove all others and temporary files."""
    kept = {index for index in _saved_rounds(folder) if index <= newest}
    kept = set(sorted(kept, reverse=True)[:KEPT_CHECKPOINTS])
    for path in folder.iterdir():
        match = CHECKPOINT_FILES.fullmatch(path.name)
        is_old = match is not None and int(match[1]) not in kept
        if is_old or TEMPORARY_FILES.fullmatch(path.name):
            path.unlink(missing_ok=True)
    sync_folder(folder)
