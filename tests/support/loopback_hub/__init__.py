"""A Hugging Face Hub on this machine that unmodified clients download from, and that counts every byte it serves.

    with LoopbackHub() as hub:
        commit = hub.add_repo("org/name", {"config.json": b"{}", "model.safetensors": weights})
        succeed(["hf", "download", "org/name"], hub.environment(home))
        assert hub.bytes_served("org/name") == 2 + len(weights)

It answers as the Hub does, in what clients look at: files kept in git by a relative redirect to a cached copy, files
kept in LFS by an absolute one to a signed address on another host, errors by status and X-Error-Code.

That other host ("the CDN") is a second port under another name of this machine: clients follow a redirect to a host
they take for the Hub's own, some releases comparing ports and some not, and then would not find what is in the first
answer. Nothing here asks a name server or connects to anything.
"""

from tests.support.loopback_hub.answers import Request
from tests.support.loopback_hub.files import in_lfs, virtual_bytes
from tests.support.loopback_hub.hub import LoopbackHub
from tests.support.loopback_hub.repos import RepoType
from tests.support.loopback_hub.routes import TOKEN

__all__ = ["TOKEN", "LoopbackHub", "RepoType", "Request", "in_lfs", "virtual_bytes"]
