{{/*
"Who may call whom" of docs/architecture.md as data, and the NetworkPolicy of a component that follows from it.
Both ends of an edge are opened: a call needs the caller's egress and the answerer's ingress.
*/}}

{{- define "lathe.calls" -}}
gateway: [accounts, datasets, models, jobs, engine]
jobs: [accounts, datasets, models]
datasets: [models]
engine: [jobs]
{{- end -}}

{{- define "lathe.databaseUsers" -}}
[accounts, datasets, gateway, jobs, migrate, models]
{{- end -}}

{{- define "lathe.storeUsers" -}}
[datasets, engine, gateway, models]
{{- end -}}

{{/* A peer: pods of this release with a component. */}}
{{- define "lathe.peer" -}}
- podSelector:
    matchLabels:
      {{- include "lathe.selector" . | nindent 6 }}
{{- end -}}

{{- define "lathe.peers" -}}
{{- range .components }}
{{ include "lathe.peer" (dict "root" $.root "component" .) }}
{{- end }}
{{- end -}}

{{- define "lathe.blocks" -}}
{{- range . }}
- ipBlock: {cidr: {{ . | quote }}}
{{- end }}
{{- end -}}

{{- define "lathe.policySpec" -}}
podSelector:
  matchLabels:
    {{- include "lathe.selector" . | nindent 4 }}
policyTypes: [Ingress, Egress]
ingress:
  {{- include "lathe.ingress" . | nindent 2 }}
egress:
  {{- include "lathe.egress" . | nindent 2 }}
{{- end -}}

{{- define "lathe.ingress" -}}
{{- $policy := .root.Values.networkPolicy -}}
{{- $component := .component -}}
{{- $calls := include "lathe.calls" . | fromYaml -}}
{{- $callers := list -}}
{{- range $caller, $called := $calls -}}
{{- if has $component $called }}{{ $callers = append $callers $caller }}{{ end -}}
{{- end -}}
{{- if eq .component "gateway" }}
# Anyone: this is the platform's door.
- ports: [{port: 7460, protocol: TCP}, {port: 8080, protocol: TCP}]
{{- end }}
{{- with $callers }}
- ports: [{port: 7460, protocol: TCP}]
  from:
    {{- include "lathe.peers" (dict "root" $.root "components" .) | nindent 4 }}
{{- end }}
{{- if eq .component "postgres" }}
- ports: [{port: 5432, protocol: TCP}]
  from:
    {{- include "lathe.peers" (dict "root" .root "components" (include "lathe.databaseUsers" . | fromYamlArray)) | nindent 4 }}
{{- else if eq .component "seaweedfs" }}
- ports: [{port: 8333, protocol: TCP}]
  from:
    {{- include "lathe.peers" (dict "root" .root "components" (include "lathe.storeUsers" . | fromYamlArray)) | nindent 4 }}
{{- else if ne .component "migrate" }}
{{- with $policy.metricsFrom }}
- ports: [{port: 9090, protocol: TCP}]
  from:
    {{- toYaml . | nindent 4 }}
{{- end }}
{{- end }}
{{- if and (eq .component "engine") $policy.kuberayNamespaces }}
# The operator hands an engine's Ray its job; nobody else reaches Ray. Its chart and its plain manifests label it differently.
- ports: [{port: 8265, protocol: TCP}]
  from:
    {{- range $labels := list "{app.kubernetes.io/name: kuberay-operator}" "{app.kubernetes.io/name: kuberay, app.kubernetes.io/component: kuberay-operator}" }}
    - namespaceSelector:
        matchExpressions:
          - {key: kubernetes.io/metadata.name, operator: In, values: {{ $policy.kuberayNamespaces | toJson }}}
      podSelector:
        matchLabels: {{ $labels }}
    {{- end }}
{{- end }}
{{- end -}}

{{- define "lathe.egress" -}}
{{- $policy := .root.Values.networkPolicy -}}
{{- $called := default list (get (include "lathe.calls" . | fromYaml) .component) -}}
- ports: [{port: 53, protocol: UDP}, {port: 53, protocol: TCP}]
  {{- with $policy.dns.to }}
  to:
    {{- toYaml . | nindent 4 }}
  {{- end }}
{{- with $called }}
- ports: [{port: 7460, protocol: TCP}]
  to:
    {{- include "lathe.peers" (dict "root" $.root "components" .) | nindent 4 }}
{{- end }}
{{- if has .component (include "lathe.databaseUsers" . | fromYamlArray) }}
{{- if include "lathe.tryoutPostgres" .root }}
- ports: [{port: 5432, protocol: TCP}]
  to:
    {{- include "lathe.peer" (dict "root" .root "component" "postgres") | nindent 4 }}
{{- else }}
- ports: [{port: {{ $policy.database.port }}, protocol: TCP}]
  to:
    {{- include "lathe.blocks" $policy.database.cidrs | nindent 4 }}
{{- end }}
{{- end }}
{{- if has .component (include "lathe.storeUsers" . | fromYamlArray) }}
{{- if include "lathe.tryoutStore" .root }}
- ports: [{port: 8333, protocol: TCP}]
  to:
    {{- include "lathe.peer" (dict "root" .root "component" "seaweedfs") | nindent 4 }}
{{- else }}
- ports: [{port: {{ $policy.store.port }}, protocol: TCP}]
  to:
    {{- include "lathe.blocks" $policy.store.cidrs | nindent 4 }}
{{- end }}
{{- end }}
{{- with .root.Values.imports }}
{{- if and .enabled (eq $.component "datasets") }}
# What users name; the service itself refuses addresses inside.
- ports:
    {{- range .egress.ports }}
    - {port: {{ . }}, protocol: TCP}
    {{- end }}
  to:
    {{- include "lathe.blocks" .egress.cidrs | nindent 4 }}
{{- end }}
{{- end }}
{{- if eq .component "jobs" }}
- ports:
    {{- range $policy.kubernetesApi.ports }}
    - {port: {{ . }}, protocol: TCP}
    {{- end }}
  to:
    {{- include "lathe.blocks" $policy.kubernetesApi.cidrs | nindent 4 }}
{{- end }}
{{- end -}}
