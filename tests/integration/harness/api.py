"""The API from another language: descriptors come from the server's reflection, nothing is generated beforehand."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, duration_pb2, message_factory, timestamp_pb2

REFLECTION = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"
#: All of reflection's protocol that is used here; the field numbers are those of grpc/reflection/v1/reflection.proto.
_REFLECTION_FIELDS = {
    "Request": [
        ("file_by_filename", 3, "TYPE_STRING", ""),
        ("file_containing_symbol", 4, "TYPE_STRING", ""),
        ("list_services", 7, "TYPE_STRING", ""),
    ],
    "Files": [("file_descriptor_proto", 1, "TYPE_BYTES", "repeated")],
    "Service": [("name", 1, "TYPE_STRING", "")],
    "Services": [("service", 1, ".r.Service", "repeated")],
    "Response": [("files", 4, ".r.Files", ""), ("services", 6, ".r.Services", "")],
}


def _reflection() -> tuple[Any, Any]:
    file = descriptor_pb2.FileDescriptorProto(name="r.proto", package="r", syntax="proto3")
    for name, fields in _REFLECTION_FIELDS.items():
        message = file.message_type.add(name=name)
        for field, number, kind, many in fields:
            added = message.field.add(name=field, number=number)
            added.label = added.LABEL_REPEATED if many else added.LABEL_OPTIONAL
            if kind.startswith("."):
                added.type, added.type_name = added.TYPE_MESSAGE, kind
            else:
                added.type = getattr(added, kind)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    both = [pool.FindMessageTypeByName(f"r.{name}") for name in ("Request", "Response")]
    request, response = (message_factory.GetMessageClass(one) for one in both)
    return request, response


class Api:
    """`api.call("VmService", "GetVm", vm="web")`."""

    def __init__(self, socket: Path) -> None:
        # Without a name of its own a Unix socket's path would become the authority, which may hold any character.
        self._channel = grpc.insecure_channel(f"unix:{socket}", options=[("grpc.default_authority", "clawpot.invalid")])
        self._pool = descriptor_pool.DescriptorPool()
        self._request, self._response = _reflection()

    def __enter__(self) -> "Api":
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()

    def _ask(self, **request: str) -> Any:
        ask = self._channel.stream_stream(REFLECTION, self._request.SerializeToString, self._response.FromString)
        return next(iter(ask(iter([self._request(**request)]), timeout=60)))

    def services(self) -> list[str]:
        return [service.name for service in self._ask(list_services="*").services.service]

    def _service(self, name: str) -> Any:
        full = f"clawpot.v1.{name}"
        try:
            return self._pool.FindServiceByName(full)
        except KeyError:
            self._learn(full)
            return self._pool.FindServiceByName(full)

    def _learn(self, symbol: str) -> None:
        files = {}
        for data in self._ask(file_containing_symbol=symbol).files.file_descriptor_proto:
            file = descriptor_pb2.FileDescriptorProto.FromString(data)
            files[file.name] = file
        known: set[str] = set()

        def add(name: str) -> None:
            if name in known:
                return
            known.add(name)
            try:
                self._pool.FindFileByName(name)
                return
            except KeyError:
                pass
            if name not in files:
                found = self._fetch(name)
                files[name] = found
            for dependency in files[name].dependency:
                add(dependency)
            self._pool.Add(files[name])

        for name in list(files):
            add(name)

    def _fetch(self, name: str) -> Any:
        """A file that the server did not send along: one of protobuf's own."""
        file = descriptor_pb2.FileDescriptorProto()
        own = {module.DESCRIPTOR.name: module.DESCRIPTOR for module in (duration_pb2, timestamp_pb2)}
        if name in own:
            own[name].CopyToProto(file)
            return file
        return descriptor_pb2.FileDescriptorProto.FromString(self._ask(file_by_filename=name).files.file_descriptor_proto[0])

    def _method(self, service: str, method: str) -> Any:
        return self._service(service).methods_by_name[method]

    def _classes(self, service: str, method: str) -> tuple[str, Any, Any]:
        found = self._method(service, method)
        request, response = (message_factory.GetMessageClass(kind) for kind in (found.input_type, found.output_type))
        return f"/clawpot.v1.{service}/{method}", request, response

    def call(
        self, service: str, method: str, timeout: float = 60, metadata: list[tuple[str, str]] | None = None, **fields: Any
    ) -> Any:
        """One request, one answer. Raises `grpc.RpcError`."""
        path, request, response = self._classes(service, method)
        return self._channel.unary_unary(path, request.SerializeToString, response.FromString)(
            request(**fields), timeout=timeout, metadata=metadata
        )

    def stream(self, service: str, method: str, frames: Iterator[dict[str, Any]], timeout: float = 60) -> Iterator[Any]:
        path, request, response = self._classes(service, method)
        call = self._channel.stream_stream(path, request.SerializeToString, response.FromString)
        return iter(call((request(**frame) for frame in frames), timeout=timeout))

    def healthy(self, service: str) -> bool:
        """gRPC's own health check: `HealthCheckRequest{service=1}` → `{status=1}`, where 1 means serving."""
        name = service.encode()
        check = self._channel.unary_unary("/grpc.health.v1.Health/Check")
        return bool(check(b"\x0a" + bytes([len(name)]) + name, timeout=30) == b"\x08\x01")
