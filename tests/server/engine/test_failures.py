"""Errors of the GPU are known by their texts, which are MLX's and Metal's own."""

from __future__ import annotations

import pytest
from mlx_overlay_server.engine.failures import failure, gpu_failure, is_late, load_failure
from mlx_overlay_server.errors import Failed, Unavailable

_METAL = "[METAL] Command buffer execution failed: "
MEMORY = (
    _METAL + "Insufficient Memory (00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory).",
    _METAL + "Speicher reicht nicht aus (00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory).",
    "[metal::malloc] Attempting to allocate 34359738368 bytes which is greater than the maximum allowed buffer size.",
    "[metal::malloc] Resource limit (499000) exceeded.",
    "[malloc] Unable to allocate 34359738368 bytes.",
    "cudaMallocAsync(&data, size, stream) failed: out of memory",
)
TIME = (
    _METAL + "Caused GPU Timeout Error (00000002:kIOGPUCommandBufferCallbackErrorTimeout).",
    _METAL + "Caused GPU Hang Error (00000003:kIOGPUCommandBufferCallbackErrorHang).",
    _METAL + "Impacting Interactivity (0000000e:kIOGPUCommandBufferCallbackErrorImpactingInteractivity).",
    _METAL + "Internal Error (0000000e:Internal Error).",
)
OTHER = (
    _METAL + "Discarded (victim of GPU error/recovery) (00000005:kIOGPUCommandBufferCallbackErrorInnocentVictim).",
    _METAL + "Ignored (for causing prior errors) (00000004:kIOGPUCommandBufferCallbackErrorSubmissionsIgnored).",
    _METAL + "Caused GPU Address Fault Error (0000000b:kIOGPUCommandBufferCallbackErrorPageFault).",
)


@pytest.mark.parametrize(
    ("text", "code", "word"),
    [
        *((text, "gpu_out_of_memory", "memory") for text in MEMORY),
        *((text, "gpu_timeout", "time") for text in TIME),
        *((text, "gpu_failed", "the GPU failed") for text in OTHER),
    ],
)
def test_an_error_of_the_gpu_says_what_has_run_out(text: str, code: str, word: str) -> None:
    error = failure(RuntimeError(text))
    assert isinstance(error, Unavailable)
    assert (error.status, error.code) == (503, code)
    assert word in error.message
    assert "again" in error.message
    assert "kIOGPU" not in error.message
    of_a_load = load_failure(RuntimeError(text), "/models/m")
    assert (of_a_load.status, of_a_load.code) == (503, code)
    assert word in of_a_load.message


def test_only_errors_of_command_buffers_may_come_from_earlier_work() -> None:
    late = [text for text in (*MEMORY, *TIME, *OTHER) if is_late(RuntimeError(text))]
    assert late == [text for text in (*MEMORY, *TIME, *OTHER) if text.startswith(_METAL)]


@pytest.mark.parametrize(
    "error", [RuntimeError("[matmul] shapes do not fit"), ValueError(MEMORY[0]), MemoryError(), RuntimeError()]
)
def test_other_errors_are_no_errors_of_the_gpu(error: Exception) -> None:
    assert gpu_failure(error) is None
    assert not is_late(error)
    assert isinstance(failure(error), Failed)
    assert load_failure(error, "/models/m").code == "model_load_failed"


def test_an_error_that_is_meant_for_clients_stays_as_it_is() -> None:
    error = Unavailable("the model was unloaded")
    assert failure(error) is error
