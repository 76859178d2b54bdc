"""config.json of a model on the Hugging Face hub: downloaded as data, never run, and every failure explained."""

from __future__ import annotations

import re
import socket
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

from planner.errors import PlanError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[\w.-]{1,96}", re.ASCII)


def download_config(hub_id: str, nearest: str = "") -> bytes:
    """The bytes of config.json of ``hub_id``: the current ones, or without network those in the local cache.

    Args:
        hub_id: ``org/name``.
        nearest: what else would work, for the messages.

    Raises:
        PlanError: huggingface_hub is not installed, the hub is out of reach, no such model, a licence to accept.
    """
    try:
        from huggingface_hub import constants, errors, hf_hub_download
    except ImportError as error:
        raise PlanError(
            hub_id,
            "reading from the hub needs huggingface_hub, which is not installed: pip install huggingface_hub.",
            nearest,
        ) from error
    # The order matters: a gated repository is a kind of missing one, an unreachable file a kind of missing file.
    try:
        offline = not _has_address(constants.ENDPOINT)
        return Path(hf_hub_download(hub_id, "config.json", local_files_only=offline)).read_bytes()
    except errors.GatedRepoError as error:
        page = f"https://huggingface.co/{hub_id}"
        why = f"the hub wants its licence accepted first, on {page}, and that account's token in HF_TOKEN."
        raise PlanError(hub_id, why, nearest) from error
    except errors.RepositoryNotFoundError as error:
        why = "the hub has no such model, or only for those it is shared with."
        raise PlanError(hub_id, why, nearest) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        why = "the hub is out of reach and the local cache does not hold this model's config.json."
        raise PlanError(hub_id, why, nearest or "A folder with its config.json works without network.") from error
    except errors.EntryNotFoundError as error:
        why = "that repository has no config.json."
        raise PlanError(hub_id, why, nearest or "Of a GGUF repository, download the file and name it.") from error
    except errors.HFValidationError as error:
        raise PlanError(hub_id, f"is no name the hub can have: {_first_line(error)}.", nearest) from error
    except (errors.HfHubHTTPError, OSError) as error:  # every other answer, and lost connections
        raise PlanError(hub_id, f"the hub did not answer: {_first_line(error)}.", nearest) from error


def _has_address(endpoint: str) -> bool:
    """Whether it makes sense to ask. Without network huggingface_hub itself tries on for half a minute."""
    if getproxies():
        return True  # the proxy looks names up, this machine may not be able to
    try:
        socket.getaddrinfo(urlsplit(endpoint).hostname, None)
    except OSError:
        return False
    return True


def _first_line(error: Exception) -> str:
    lines: Sequence[str] = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
