"""Steps replayed from a CUDA graph."""

from contextlib import contextmanager, nullcontext

import pytest
import torch
from test_step import assert_official, golden_step

from dinofast.runtime import cuda_graph

pytestmark = pytest.mark.usefixtures("forget_graphs")


# ---- the CUDA graph
class Replayed:
    """Stands in for a CUDA graph: what is recorded is done again at each replay, into the memory of
    the recording."""

    recording = None

    def replay(self):
        stats, grads = self.made
        for p in self.parameters:
            p.grad = None
        new = self.whole()
        for old, now in zip(
            (*stats.values(), *grads),
            (*new.values(), *(p.grad for p in self.parameters)),
            strict=True,
        ):
            old.copy_(now)


@pytest.fixture
def recorder(monkeypatch):
    """Streams and graphs on a CPU; the recording itself does nothing to the model, as on a GPU."""

    class Stream:
        def wait_stream(self, other):
            pass

    @contextmanager
    def record(graph, stream, capture_error_mode):
        assert capture_error_mode == "thread_local"
        yield

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Replayed)
    monkeypatch.setattr(torch.cuda, "graph", record)


def test_the_graph_gives_the_official_trajectory(recorder):
    """Three steps as they are, then replays: also across the epoch in which the last layer is no
    longer frozen."""
    step = golden_step()
    center = step.model.dino_loss.center
    parameters = [p for p in step.model.student.parameters() if p.requires_grad]
    calls = []

    def whole(crops, teacher_temp):
        calls.append([x.data_ptr() for x in crops])
        before = center.clone()
        stats = step._whole(crops, teacher_temp)
        if len(calls) == cuda_graph.WARM_UP + 1:  # what is recorded is not done
            center.copy_(before)
        return stats

    step.graph = cuda_graph.CUDAGraphStep(whole, parameters)
    plain = step.graph._record

    def record(crops, teacher_temp):
        plain(crops, teacher_temp)
        graph = step.graph._graph
        graph.parameters, graph.made = parameters, (step.graph._stats, step.graph._grads)
        graph.whole = lambda: whole(step.graph._inputs[:-1], step.graph._inputs[-1])

    step.graph._record = record
    assert_official(step, step.model)
    assert len(calls) == 8 + 1 and len({tuple(c) for c in calls[cuda_graph.WARM_UP :]}) == 1
