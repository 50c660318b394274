"""GPUs that are not there, as far as triton asks about them: names, limits, and a driver that compiles for one and refuses to run anything."""

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_LIMIT = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}  # bytes a block may have


class StandIn(DriverBase):
    """A driver for a GPU that is not there: it knows the target and refuses to run anything."""

    def __init__(self, name: str):
        self.name, self.target = name, TARGETS[name]

    @classmethod
    def is_active(cls):
        return False

    def map_python_to_cpp_type(self, kind):
        return kind

    def get_current_target(self):
        return self.target

    def get_active_torch_device(self):
        return torch.device("cpu")

    def get_benchmarker(self):
        raise RuntimeError("nothing can be timed here")

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=0):
        return 0

    def get_device_capability(self, device=0):
        return divmod(self.target.arch, 10) if self.target.backend == "cuda" else (9, 4)

    @property
    def utils(self):
        limit = SHARED_LIMIT[self.name]

        class Properties:
            @staticmethod
            def get_device_properties(_):
                return {"max_shared_mem": limit, "multiprocessor_count": 132, "warpSize": 32}

        return Properties
