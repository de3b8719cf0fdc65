"""LeNet's convolutions on a CPU by compiled code (convolution.c), for AVX-512 and for AVX2.

An image takes 10 us of a core, 19 us, and by torch's operations 34 (AMD Zen 5). It is compiled for both when the
package is installed, if there is a C compiler.
"""

import ctypes
import functools
from ctypes import c_float, c_int, c_size_t, c_void_p
from importlib.machinery import PathFinder

import torch
from torch import Tensor

import lenet
from lenet.model import LeNet, pixel_scaling

# By the images it takes at a time, the fastest first: what the processor has to have, in torch's words.
NEEDS = {16: {"avx512_f"}, 8: {"avx2", "fma3"}}
MODULE = "lenet._convolution"  # and then their number
FEATURES = 400
ACTIVATIONS = ("sigmoid", "tanh", "relu")  # by their numbers in C


def library() -> ctypes.CDLL | None:
    """The fastest compiled code that this machine can run; None where it was not compiled, or for another machine."""
    return library_for(found) if (found := lanes()) else None


def lanes() -> int | None:
    """How many images the `library` takes at a time."""
    return next(filter(library_for, NEEDS), None)


@functools.cache
def library_for(lanes: int) -> ctypes.CDLL | None:
    """That which takes so many images at a time, if this machine can run it."""
    # That which belongs to this code: an installed package may be of another version than the code of a Ray job.
    spec, processor = PathFinder.find_spec(f"{MODULE}{lanes}", lenet.__path__), torch.cpu.get_capabilities()
    if spec is None or spec.origin is None or not all(processor.get(need) for need in NEEDS[lanes]):
        return None
    try:
        found = ctypes.CDLL(spec.origin)
    except OSError:
        return None
    found.room.restype = c_size_t
    found.forward.argtypes = [c_void_p, c_int, c_int, c_float, c_float, *[c_void_p] * 4, c_int, c_int, *[c_void_p] * 2]
    found.backward.argtypes = [c_void_p, c_int, c_void_p, c_int, c_int, *[c_void_p] * 5]
    return found


class CompiledConvolutions:
    """Both layers, for `count` images of `side` pixels, in buffers of its own, by the `library`.

    Raises RuntimeError where there is none.
    """

    def __init__(
        self, model: LeNet, gradients: dict[int, Tensor], count: int, side: int, code: ctypes.CDLL | None = None
    ) -> None:
        code = code or library()
        if code is None:
            raise RuntimeError(f"{MODULE} was not compiled for this machine")
        self.code, self.count, self.side = code, count, side
        self.kinds = ACTIVATIONS.index(model.activation), int(model.pooling == "max")
        self.scaling = pixel_scaling(model)
        weight1, bias1, weight2, bias2 = list(model.parameters())[:4]
        # C has weights in rows; the model may have them in another order.
        self.weights = [(weight1, torch.empty(weight1.shape)), (weight2, torch.empty(weight2.shape))]
        self.turned = torch.empty(5, 5, *weight2.shape[:2])
        self.gradients = [(gradients[id(weight)], torch.empty(weight.shape)) for weight in (weight1, weight2)]
        self.biases, self.bias_gradients = (bias1, bias2), (gradients[id(bias1)], gradients[id(bias2)])
        self.kept = torch.empty(code.room(count), dtype=torch.uint8)
        self.features = torch.empty(FEATURES, count)

    def forward(self, images: Tensor) -> Tensor:
        """uint8 (count, side, side) to features (400, count)."""
        for weight, rows in self.weights:
            rows.copy_(weight)
        (_, rows1), (_, rows2) = self.weights
        bias1, bias2 = self.biases
        images = images.contiguous()  # if it is a copy, it has to live as long as C reads it
        self.code.forward(
            images.data_ptr(), self.count, self.side, *self.scaling,
            rows1.data_ptr(), bias1.data_ptr(), rows2.data_ptr(), bias2.data_ptr(), *self.kinds,
            self.kept.data_ptr(), self.features.data_ptr(),
        )  # fmt: skip
        return self.features

    def backward(self, gradient: Tensor) -> None:
        """Write the parameters' gradients, from that of the features, (400, count)."""
        self.turned.copy_(self.weights[1][1].permute(2, 3, 0, 1))
        (_, rows1), (_, rows2) = self.gradients
        bias1, bias2 = self.bias_gradients
        self.code.backward(
            gradient.data_ptr(), self.count, self.turned.data_ptr(), *self.kinds, self.kept.data_ptr(),
            rows1.data_ptr(), bias1.data_ptr(), rows2.data_ptr(), bias2.data_ptr(),
        )  # fmt: skip
        for into, rows in self.gradients:
            into.copy_(rows)
