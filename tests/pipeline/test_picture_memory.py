"""Proves that large pictures take little memory, and that running out of it is no fault of theirs."""

import io
import subprocess
import sys
import textwrap

import numpy as np
import numpy.typing as npt
from PIL import Image


def png(pixels: npt.NDArray[np.uint16]) -> bytes:
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG")
    return data.getvalue()


def decode_alone(program: str, data: bytes) -> "subprocess.CompletedProcess[str]":
    """Run it in a process of its own, where `data` is the picture and `memory` tells the bytes of a kind of its own."""
    before = """
        import resource, sys, threading
        from concurrent.futures import ThreadPoolExecutor
        from pathlib import Path
        from pipeline.pictures import decode_batch

        def memory(kind):
            lines = Path("/proc/self/status").read_text().splitlines()
            return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith(kind))

        data = sys.stdin.buffer.read()
    """
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(before) + textwrap.dedent(program)],
        input=data.decode("latin-1"),
        encoding="latin-1",
        capture_output=True,
        check=False,
    )


def test_large_pictures_are_decoded_one_at_a_time() -> None:
    """Four begun at once, each of which takes 10 bytes a pixel."""
    side = 5000
    program = f"""
        before, peak, over = memory("RssAnon"), [0], threading.Event()

        def watch():
            while not over.wait(0.002):
                peak[0] = max(peak[0], memory("RssAnon"))

        threading.Thread(target=watch).start()
        with ThreadPoolExecutor(4) as pool:
            assert (decode_batch(pool, [data] * 4, 28).images == 156).all()
        over.set()
        print((peak[0] - before) / {side**2})
    """
    done = decode_alone(program, png(np.full((side, side), 40000, np.uint16)))
    assert float(done.stdout) < 30, done.stderr  # what is freed stays with the thread: Pillow allocates in small blocks


def test_no_memory_left_is_not_a_bad_picture() -> None:
    program = """
        resource.setrlimit(resource.RLIMIT_AS, (memory("VmSize") + 2**28,) * 2)
        with ThreadPoolExecutor(1) as pool:
            print(decode_batch(pool, [data], 28).bad)
    """
    done = decode_alone(program, png(np.zeros((8000, 8000), np.uint16)))
    assert done.stderr.splitlines()[-1].startswith(("MemoryError", "numpy._core._exceptions._ArrayMemoryError")), done
