"""Fine-tuning jobs: ask, watch, cancel."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lathe.client.jobsettings import messages_of
from lathe.client.names import full_name
from lathe.client.paging import pages
from lathe.client.transport import Transport, new_request_id
from lathe.common.errors import DeadlineExceeded, Unavailable
from lathe.v1 import jobs_pb2 as pb
from lathe.v1.jobs_pb2_grpc import JobsServiceStub

ENDED = frozenset({pb.JOB_STATE_SUCCEEDED, pb.JOB_STATE_FAILED, pb.JOB_STATE_CANCELLED})
_RECONNECT_S = 0.5


class Jobs:
    """The jobs of the caller's project."""

    def __init__(self, transport: Transport, project: str) -> None:
        self._transport = transport
        self._project = project
        self._stub = JobsServiceStub(transport.channel)

    def create(
        self,
        model: str,
        training_dataset: str,
        *,
        validation_dataset: str = "",
        suffix: str = "",
        seed: int | None = None,
        n_epochs: int | None = None,
        batch_size: int | None = None,
        learning_rate_multiplier: float | None = None,
        lora_r: int | None = None,
        lora_alpha: float | None = None,
        target_modules: Sequence[str] = (),
        method: str = "supervised",
        settings: Mapping[str, Any] | None = None,
        engine_class: str = "",
        dedicated: bool = False,
        workers: int = 1,
        metadata: Mapping[str, str] | None = None,
    ) -> pb.Job:
        """Ask for `model` (a base or a tuned one, with which it goes on) to be tuned. What is None is chosen (`auto`).

        method: supervised, dpo, orpo or kto. settings: whatever else it takes by its name in the contract, such as
        `{"beta": 0.2, "use_dora": True, "schedule": "linear"}` (docs/hyperparameters.md).
        engine_class: one of those that the operator offers; the default if empty. dedicated: on an engine of its own.
        workers: processes that train it together, on an engine of its own.

        Raises NotFound for the model or a dataset, InvalidArgument naming the field or setting,
        ResourceExhausted for a quota.
        """
        named = {
            "n_epochs": n_epochs,
            "batch_size": batch_size,
            "learning_rate_multiplier": learning_rate_multiplier,
            "lora_r": lora_r,
            "lora_alpha": lora_alpha,
            "target_modules": target_modules,
        }
        job = self._asked(model, training_dataset, validation_dataset, method, named | dict(settings or {}))
        job.compute.CopyFrom(pb.ComputeSpec(engine_class=engine_class, dedicated=dedicated, workers=workers))
        job.MergeFrom(pb.Job(suffix=suffix, seed=seed, metadata=metadata or {}))
        request = pb.CreateJobRequest(parent=self._project, job=job, request_id=new_request_id())
        return self._transport.call(self._stub.CreateJob, request)

    def estimate(
        self,
        model: str,
        training_dataset: str,
        *,
        validation_dataset: str = "",
        suffix: str = "",
        seed: int | None = None,
        method: str = "supervised",
        settings: Mapping[str, Any] | None = None,
        engine_class: str = "",
        dedicated: bool = False,
        workers: int = 1,
        replaces: pb.ReplacedPrompt | None = None,
        timeout: float = 600.0,
    ) -> pb.EstimateJobResponse:
        """What `create` with the same arguments would take; nothing is started.

        settings: any of the job's, n_epochs and lora_r too. replaces: what a request of the tuned model saves; the
        answer then has a break_even. timeout: how long to wait for the audit of the files; at 0 the answer may be
        `pending`.

        Raises what `create` raises, InvalidArgument for files that cannot be trained on, DeadlineExceeded.
        """
        job = self._asked(model, training_dataset, validation_dataset, method, settings or {})
        job.compute.CopyFrom(pb.ComputeSpec(engine_class=engine_class, dedicated=dedicated, workers=workers))
        job.MergeFrom(pb.Job(suffix=suffix, seed=seed))
        request = pb.EstimateJobRequest(parent=self._project, job=job, replaces=replaces)
        deadline, pause = time.monotonic() + timeout, 0.05
        while True:
            found = self._transport.call(self._stub.EstimateJob, request)
            if not found.pending or timeout <= 0:
                return found
            if time.monotonic() + pause > deadline:
                raise DeadlineExceeded(f"{training_dataset} was not audited within {timeout:.0f} seconds.")
            time.sleep(pause)
            pause = min(pause * 1.5, 1.0)

    def _asked(
        self, model: str, training: str, validation: str, method: str, settings: Mapping[str, Any]
    ) -> pb.Job:
        chosen, options = messages_of(method, settings)
        return pb.Job(
            model=model,
            training_dataset=full_name(self._project, "datasets", training),
            validation_dataset=validation and full_name(self._project, "datasets", validation),
            method=chosen,
            training=options,
        )

    def get(self, name: str) -> pb.Job:
        """Raises NotFound."""
        return self._transport.call(self._stub.GetJob, pb.GetJobRequest(name=self._name(name)))

    def list(
        self, states: Sequence[pb.JobState.ValueType] = (), metadata: Mapping[str, str] | None = None
    ) -> Iterator[pb.Job]:
        """Newest first; only those in `states` and with all pairs of `metadata`, when given."""
        request = pb.ListJobsRequest(parent=self._project, states=states, metadata=metadata or {})
        return pages(self._transport, self._stub.ListJobs, request, "jobs")

    def cancel(self, name: str) -> pb.Job:
        """CANCELLED at once or CANCELLING. Raises NotFound, FailedPrecondition once it has ended otherwise."""
        return self._transport.call(self._stub.CancelJob, pb.CancelJobRequest(name=self._name(name)))

    def receipt(self, name: str) -> str:
        """What the job was made from and computed with, as JSON.

        Raises NotFound, FailedPrecondition until it has succeeded.
        """
        request = pb.GetJobReceiptRequest(name=self._name(name))
        return self._transport.call(self._stub.GetJobReceipt, request).document

    def rerun(self, name: str) -> pb.Job:
        """A new job that repeats this one from its receipt; its end says how far the weights are from each other.

        Raises NotFound, FailedPrecondition until it has succeeded or when its model is another by now.
        """
        request = pb.RerunJobRequest(name=self._name(name), request_id=new_request_id())
        return self._transport.call(self._stub.RerunJob, request)

    def events(self, name: str) -> Iterator[pb.JobEvent]:
        """Everything that happened so far, newest first."""
        request = pb.ListJobEventsRequest(parent=self._name(name), page_size=1000)
        return pages(self._transport, self._stub.ListJobEvents, request, "events")

    def checkpoints(self, name: str) -> Iterator[pb.JobCheckpoint]:
        """Newest first."""
        request = pb.ListJobCheckpointsRequest(parent=self._name(name))
        return pages(self._transport, self._stub.ListJobCheckpoints, request, "checkpoints")

    def watch(
        self, name: str, *, after_sequence: int = 0, patience: float = 120.0
    ) -> Iterator[pb.WatchJobResponse]:
        """The job and its events as they happen, every event once, until the job has ended.

        A connection that breaks is made again, going on after the last event, for `patience` seconds without an
        answer; then Unavailable. Raises NotFound.
        """
        name, ended = self._name(name), False
        deadline = time.monotonic() + patience
        while True:
            request = pb.WatchJobRequest(name=name, after_sequence=after_sequence)
            try:
                for update in self._transport.stream(self._stub.WatchJob, request):
                    deadline = time.monotonic() + patience
                    if update.events:
                        after_sequence = update.events[-1].sequence
                    ended = update.job.state in ENDED
                    yield update
                if ended:
                    return
            except (Unavailable, DeadlineExceeded) as error:
                if time.monotonic() + _RECONNECT_S > deadline:
                    raise Unavailable(f"{name} cannot be watched: {error.message}") from error
            time.sleep(_RECONNECT_S)

    def _name(self, name: str) -> str:
        return full_name(self._project, "jobs", name)
