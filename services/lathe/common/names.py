"""Resource names (Google AIP-122): `projects/{project}/datasets/{dataset}` and the like."""

from __future__ import annotations

import re
from dataclasses import dataclass

from lathe.common.errors import FieldViolation, InvalidArgument

# Ids may hold what a tuned model's id holds (`ft:base:project:suffix:id`), but never a slash.
_SEGMENT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:~-]{0,254}")
_PROJECT = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")


@dataclass(frozen=True, slots=True)
class Pattern:
    """A name pattern such as `projects/{project}/jobs/{job}`; parses and formats names of that shape."""

    template: str

    @property
    def variables(self) -> tuple[str, ...]:
        return tuple(part[1:-1] for part in self.template.split("/") if part.startswith("{"))

    def format(self, *ids: str) -> str:
        """Put the ids in, left to right. Raises InvalidArgument for an id that cannot be a segment."""
        if len(ids) != len(self.variables):
            raise ValueError(f"{self.template} takes {len(self.variables)} ids, got {len(ids)}")
        values = iter(ids)
        parts = [
            _checked(part[1:-1], next(values), "name") if part.startswith("{") else part
            for part in self.template.split("/")
        ]
        return "/".join(parts)

    def parse(self, name: str, *, field: str = "name") -> tuple[str, ...]:
        """The ids in `name`, left to right. Raises InvalidArgument naming `field` and the pattern."""
        expected = self.template.split("/")
        given = name.split("/")
        if len(expected) != len(given):
            raise _wrong(name, self.template, field)
        ids: list[str] = []
        for want, have in zip(expected, given, strict=True):
            if want.startswith("{"):
                ids.append(_checked(want[1:-1], have, field))
            elif want != have:
                raise _wrong(name, self.template, field)
        return tuple(ids)

    def matches(self, name: str) -> bool:
        """Whether `name` has this shape."""
        try:
            self.parse(name)
        except InvalidArgument:
            return False
        return True


# Below it are the bytes of imports of base models; what else is in staging is of datasets.
IMPORT_STAGING = "staging/import-"


def import_staging(base_model_id: str) -> str:
    """The prefix under which the files of an import are kept in the object store until they are whole."""
    return f"{IMPORT_STAGING}{base_model_id}/"


def _wrong(name: str, template: str, field: str) -> InvalidArgument:
    message = f"{field} {name!r} must have the form {template!r}."
    return InvalidArgument(message, reason="INVALID_NAME", violations=[FieldViolation(field, message)])


def _checked(variable: str, value: str, field: str) -> str:
    pattern = _PROJECT if variable == "project" else _SEGMENT
    if pattern.fullmatch(value):
        return value
    rule = (
        "1 to 63 lower-case letters, digits and hyphens, with a letter or digit at both ends"
        if variable == "project"
        else "1 to 255 letters, digits and any of . _ : ~ -, beginning with a letter or digit"
    )
    message = f"{field}: {value!r} is no {variable} id; it must be {rule}."
    raise InvalidArgument(message, reason="INVALID_NAME", violations=[FieldViolation(field, message)])


PROJECT = Pattern("projects/{project}")
API_KEY = Pattern("projects/{project}/apiKeys/{api_key}")
DATASET = Pattern("projects/{project}/datasets/{dataset}")
BASE_MODEL = Pattern("baseModels/{base_model}")
ADAPTER = Pattern("projects/{project}/adapters/{adapter}")
JOB = Pattern("projects/{project}/jobs/{job}")
CHECKPOINT = Pattern("projects/{project}/jobs/{job}/checkpoints/{checkpoint}")
DEPLOYMENT = Pattern("projects/{project}/deployments/{deployment}")


def project_of(name: str, *, field: str = "name") -> str:
    """The project id of any name under `projects/`. Raises InvalidArgument if there is none."""
    parts = name.split("/")
    if len(parts) < 2 or parts[0] != "projects":
        raise _wrong(name, "projects/{project}/...", field)
    return _checked("project", parts[1], field)


def last_id(name: str) -> str:
    """The last segment: the resource's own id."""
    return name.rsplit("/", 1)[-1]
