"""models' messages: proto to model and back."""

from __future__ import annotations

from lathe.common import names
from lathe.models.model import Adapter, AdapterObject, BaseModel, BaseModelState, Lineage, ModelFile
from lathe.models.service import NewBaseModel, Resolved
from lathe.text.families import METHODS
from lathe.v1 import models_pb2 as pb

_STATES = {
    BaseModelState.UPLOADING: pb.BASE_MODEL_STATE_UPLOADING,
    BaseModelState.READY: pb.BASE_MODEL_STATE_READY,
}


def new_base_model(request: pb.CreateBaseModelRequest) -> NewBaseModel:
    given = request.base_model
    return NewBaseModel(
        id=request.base_model_id,
        display_name=given.display_name,
        files=tuple(ModelFile(file.path, file.size_bytes, file.sha256) for file in given.files),
        license=given.license,
        training_cutoff=given.training_cutoff,
        source=given.source,
    )


def file_pb(file: ModelFile) -> pb.ModelFile:
    return pb.ModelFile(
        path=file.path,
        size_bytes=file.size_bytes,
        sha256=file.sha256,
        object_key=file.object_key if file.stored else "",
    )


def base_model_pb(model: BaseModel) -> pb.BaseModel:
    facts = model.facts
    message = pb.BaseModel(
        name=model.name,
        display_name=model.display_name,
        state=_STATES[model.state],
        digest=model.digest,
        tokenizer_digest=facts.tokenizer_digest,
        template_digest=facts.template_digest,
        files=[file_pb(file) for file in model.files],
        architecture=facts.architecture,
        parameter_count=facts.parameter_count,
        context_length=facts.context_length,
        tunable=facts.tunable,
        not_tunable_reason=facts.not_tunable_reason,
        # What this version can do, not the one that imported it.
        methods=METHODS if facts.tunable else (),
        target_modules=facts.target_modules,
        chat_template=facts.chat_template,
        license=model.license,
        training_cutoff=model.training_cutoff,
        source=model.source,
    )
    message.create_time.FromDatetime(model.create_time)
    return message


def adapter_pb(adapter: Adapter) -> pb.Adapter:
    lineage = adapter.lineage
    message = pb.Adapter(
        name=adapter.name,
        model_id=adapter.model_id,
        base_model=names.BASE_MODEL.format(adapter.base_model),
        object=pb.AdapterObject(prefix=adapter.object.prefix, manifest_sha256=adapter.object.manifest_sha256),
        lineage=pb.Lineage(
            job=lineage.job,
            attempt=lineage.attempt,
            step=lineage.step,
            dataset_sha256=lineage.dataset_sha256,
            audit_key=lineage.audit_key,
            base_digest=lineage.base_digest,
            hyperparameters_json=lineage.hyperparameters_json,
            seed=lineage.seed,
            code_version=lineage.code_version,
            method=lineage.method,
            parent_model_id=lineage.parent_model_id,
            parent_manifest_sha256=lineage.parent_manifest_sha256,
        ),
        is_final=adapter.is_final,
    )
    message.create_time.FromDatetime(adapter.create_time)
    return message


def adapter_object(message: pb.AdapterObject) -> AdapterObject:
    return AdapterObject(message.prefix, message.manifest_sha256)


def lineage(message: pb.Lineage) -> Lineage:
    return Lineage(
        job=message.job,
        attempt=message.attempt,
        step=message.step,
        dataset_sha256=message.dataset_sha256,
        audit_key=message.audit_key,
        base_digest=message.base_digest,
        hyperparameters_json=message.hyperparameters_json,
        seed=message.seed,
        code_version=message.code_version,
        method=message.method or "supervised",
        parent_model_id=message.parent_model_id,
        parent_manifest_sha256=message.parent_manifest_sha256,
    )


def resolved_pb(resolved: Resolved) -> pb.ResolvedModel:
    message = pb.ResolvedModel(base_model=base_model_pb(resolved.base_model))
    if resolved.adapter is not None:
        message.adapter.CopyFrom(adapter_pb(resolved.adapter))
    return message
