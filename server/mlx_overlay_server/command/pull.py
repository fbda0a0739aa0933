"""`mlx-omni-server pull`: downloads a model from the Hub into the real Hugging Face cache, never into a user's folder.

After a download that was stopped, files that are complete are not fetched again.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time

import hf_overlay
from hf_overlay import IncompleteModel, Model, ModelNotFound, OverlayError, Session, SourceAway
from hf_overlay.text import printable

from mlx_overlay_server import children
from mlx_overlay_server.command import models
from mlx_overlay_server.command.output import print_json, say
from mlx_overlay_server.models import download
from mlx_overlay_server.progress import Bar


def pull(options: argparse.Namespace) -> int:
    """Download a model unless it is here, and print the folder from which it is loaded."""
    model = _here(options)
    if was_here := model is not None:
        say(f"{options.id} is here already")
    else:
        _download(options)
        model = _here(options)
        if model is None:
            raise OverlayError(f"{options.id} was downloaded, but is not a model that mlx-lm loads")
    if options.json:
        return print_json({"id": model.id, "path": model.path, "was_here": was_here})
    print(printable(model.path))
    return 0


def _here(options: argparse.Namespace) -> Model | None:
    """Return the model if a folder or the cache has it. Raises OverlayError for one that must not be replaced."""
    try:
        return models.catalog(options).find(options.id)
    except (SourceAway, IncompleteModel):  # the user's own folder has it: nothing is downloaded in its place
        raise
    except ModelNotFound:
        return None


def _download(options: argparse.Namespace) -> None:
    with hf_overlay.open_session(
        options.model_paths,
        below=options.below,
        maps=dict(options.maps),
        kind="mlx",
        encoders=True,
        exclude=options.exclude,
    ) as session:
        if session.is_offline:
            raise OverlayError("HF_HUB_OFFLINE is set, so nothing is downloaded; unset it")
        if (why := session.why_no_downloads) is not None:
            raise OverlayError(f"{options.id} is not downloaded: {why}")
        began = time.monotonic()
        nbytes = asyncio.run(_fetch(session, options.id))
        say(f"{options.id}: {nbytes / 1e6:.0f} MB in {time.monotonic() - began:.0f} s")


async def _fetch(session: Session, model_id: str) -> int:
    """Download a model as the server does, with a bar, and return its bytes. Raises OverlayError."""
    total = 0
    async with children.running(
        "mlx_overlay_server.models.download",
        model_id,
        environ=session.environment,
        inherit=(session.owner_fd,),  # the session's lock: should this process be killed, the download needs its tree
    ) as child:
        with Bar(model_id) as bar:
            async for line in child.lines():
                report = json.loads(line)
                if "error" in report:
                    raise OverlayError(download.failure(model_id, report, 0).message)
                if "found" in report:
                    session.expect_model(model_id)
                    child.write(b"\n")
                else:
                    total = report["total"]
                    bar.show(report["done"], total)
        if status := await child.wait():
            raise OverlayError(download.failure(model_id, {}, status).message)
    return total
