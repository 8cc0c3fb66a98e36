"""A TensorRT for RTX without a GPU: engines that compile a kernel for each batch size where no cache has it."""

from __future__ import annotations

import json
from types import SimpleNamespace

from fake_cuda import FakeContext, FakeEngine, fake_tensorrt


class FakeRuntimeCache:
    """Kernels by batch size; refuses what another release wrote, as the library does."""

    def __init__(self, engine):
        self.engine = engine
        self.kernels = set()

    def serialize(self):
        return json.dumps([self.engine.release, sorted(self.kernels)]).encode()

    def deserialize(self, data):
        try:
            release, kernels = json.loads(data)
        except ValueError:
            release, kernels = None, []
        if release != self.engine.release:
            self.engine.logger.log(self.engine.logger.WARNING, "the runtime cache does not fit")
            return False
        self.kernels |= set(kernels)
        return True


class FakeRuntimeConfig:
    def __init__(self, engine):
        self.engine = engine
        self.cache = None
        self.strategy = None
        self.dynamic_shapes_kernel_specialization_strategy = None

    def create_runtime_cache(self):
        return FakeRuntimeCache(self.engine)

    def set_runtime_cache(self, cache):
        self.cache = cache
        return True

    def set_execution_context_allocation_strategy(self, strategy):
        self.strategy = strategy


class RtxContext(FakeContext):
    def __init__(self, engine, config):
        super().__init__(engine)
        self.config = config

    def execute_async_v3(self, stream):
        cache = self.config.cache
        if cache is None or self.batch not in cache.kernels:
            self._engine.compiled.append(self.batch)
        if cache is not None:
            cache.kernels.add(self.batch)
        return super().execute_async_v3(stream)


class RtxEngine(FakeEngine):
    """`compiled`: the batch sizes that kernels were compiled for, in order."""

    release = "1.7.1"

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.compiled = []

    def create_runtime_config(self):
        return FakeRuntimeConfig(self)

    def create_execution_context(self, config):
        assert config.strategy == "user"
        assert config.dynamic_shapes_kernel_specialization_strategy == "eager"
        return RtxContext(self, config)


def fake_tensorrt_rtx(cuda, **options):
    """As `fake_tensorrt`, with a runtime cache."""
    module = fake_tensorrt(cuda, version="1.7.1", kind=RtxEngine, **options)
    module.IRuntimeCache = FakeRuntimeCache
    module.DynamicShapesKernelSpecializationStrategy = SimpleNamespace(EAGER="eager")
    return module
